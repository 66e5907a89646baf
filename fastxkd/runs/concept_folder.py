"""Concepts as a folder of images and masks, to read and to write.

    labels.csv        number, name, category: every label, numbered from 1
    images/           images, in folders of any depth
    masks/LAYER/      per layer (any name) one mask per image: the image's path, as .png;
                      a pixel is the number of its label, 0 for none
    images.csv        optional: image, labels: numbers of labels of the whole image, with ';'

A pixel can have as many labels as there are layers. Masks are grey or palette images of 8 or 16
bits, or colours with R + 256 G, all of one size and none a JPEG; images are stretched over them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastxkd._extras import require
from fastxkd.cam.render import to_picture
from fastxkd.metrics.concept_scores import Concepts
from fastxkd.runs.broden import _number, _rows
from fastxkd.runs.concept_data import ConceptSource, stacked
from fastxkd.runs.folders import _inside, _walk
from fastxkd.runs.names import Names, printable
from fastxkd.runs.pictures import open_image
from fastxkd.runs.sources import Settings, spread

LABELS, IMAGES, MASKS, WHOLE = "labels.csv", "images", "masks", "images.csv"
# Masks looked at to learn the size of all.
_PROBED = 25
# Where there are labels of whole images only.
_DEFAULT_SIZE = (112, 112)


class ConceptFolder(ConceptSource):
    """Images below ``images/`` that have a mask or labels, in the order of their paths."""

    def __init__(
        self,
        spec: str,
        root: Path,
        names: Names,
        layers: list[dict[str, str]],
        whole: dict[str, tuple[int, str]],
        concepts: Concepts,
        mask_size: tuple[int, int],
        settings: Settings,
        **options: Any,
    ) -> None:
        self._names, self._layers, self._whole = names, layers, whole
        super().__init__(spec, len(names), concepts, mask_size, settings, **options)
        self.root = root
        self._boundary = os.path.realpath(root)

    def name(self, index: int) -> str:
        return printable(self._names[index])

    def _annotations(self, index: int) -> tuple[Tensor, list[int]]:
        name = os.fsdecode(self._names[index])
        stem = os.path.splitext(name)[0]
        labels: list[int] = []
        if name in self._whole:
            row, text = self._whole[name]
            items = [item.strip() for item in text.split(";") if item.strip()]
            labels = self._labels_in(items, f"{WHOLE} row {row}")
        files = [layer[stem] for layer in self._layers if stem in layer]
        masks = [self._mask(self._file(file, file), file) for file in files]
        return stacked(masks, self.mask_size), labels

    def _picture(self, index: int) -> Tensor:
        name = os.fsdecode(self._names[index])
        image = f"{IMAGES}/{name}"
        place = f"{WHOLE} row {self._whole[name][0]}: {image}" if name in self._whole else image
        return self._image(self._file(image, place), place)

    def _file(self, name: str, place: str) -> Path:
        path = self.root / name
        if not _inside(os.path.realpath(path), self._boundary):
            raise ValueError(f"{place} leads out of the data folder")
        return path

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "folder": str(self.root),
            "fingerprint": hashlib.sha256(
                f"{self._names.digest()} {self._layers} {self._whole}".encode()
            ).hexdigest(),
        }


def open_concept_folder(
    spec: str,
    root: Path,
    settings: Settings,
    *,
    size: int | None = None,
    allow_empty: bool = False,
) -> ConceptFolder:
    """Open a folder of images and masks; the layout is the module's.

    Images without masks and labels are left out. A mask or a row of ``images.csv`` without its
    image counts as an image that is missing.

    Raises:
        ValueError: ``labels.csv`` is missing or damaged, no image has labels, a category has no
            label, two images or masks of a layer have one path but for their ending; names file
            and row.
    """
    if not root.is_dir():
        raise ValueError(f"data: {root} is not a folder")
    concepts = _concepts(root / LABELS)
    images: dict[str, list[str]] = defaultdict(list)
    if (root / IMAGES).is_dir():
        for name in _walk(str(root / IMAGES)):
            images[os.path.splitext(name)[0]].append(name)
    masks = root / MASKS
    folders = sorted(p.name for p in masks.iterdir() if p.is_dir()) if masks.is_dir() else []
    layers: list[dict[str, str]] = []
    for layer in folders:
        layers.append({})
        for name in _walk(str(masks / layer)):
            stem, file = os.path.splitext(name)[0], f"{MASKS}/{layer}/{name}"
            if (other := layers[-1].setdefault(stem, file)) != file:
                raise ValueError(f"data: {root}: {other} and {file} are masks of one image")
            if len(images[stem]) > 1:
                both = " and ".join(f"{IMAGES}/{name}" for name in images[stem])
                raise ValueError(f"data: {root}: {both} would have one mask, {file}")
    whole: dict[str, tuple[int, str]] = {}
    if os.path.lexists(root / WHOLE):
        for number, row in _rows(root / WHOLE, ("image", "labels")):
            name = os.path.normpath(row["image"])
            if name in whole:
                raise ValueError(
                    f"data: {root / WHOLE} row {number}: {name} comes twice, first in row"
                    f" {whole[name][0]}"
                )
            if row["labels"].strip(" ;"):
                whole[name] = number, row["labels"]
    labelled = {stem for layer in layers for stem in layer}
    wanted = {name for stem in labelled for name in images[stem] or [f"{stem}.png"]} | set(whole)
    if not wanted:
        raise ValueError(f"data: {root} has neither masks in {MASKS}/LAYER/ nor labels in {WHOLE}")
    names = Names(os.fsencode(name) for name in sorted(wanted))
    stored = _size(root, [file for layer in layers for file in layer.values()])
    options = {"size": size, "allow_empty": allow_empty}
    return ConceptFolder(spec, root, names, layers, whole, concepts, stored, settings, **options)


def _concepts(path: Path) -> Concepts:
    names: dict[int, str] = {}
    kinds: dict[int, str] = {}
    for number, row in _rows(path, ("number", "name", "category")):
        label = _number(path, number, row["number"])
        if label in names:
            raise ValueError(f"data: {path} row {number}: label {label} comes twice")
        if not row["category"]:
            raise ValueError(f"data: {path} row {number}: label {label} has no category")
        names[label], kinds[label] = row["name"] or str(label), row["category"]
    if not names:
        raise ValueError(f"data: {path} has no labels")
    categories = tuple(dict.fromkeys(kinds.values()))
    place = {category: i for i, category in enumerate(categories)}
    most = max(names) + 1
    return Concepts(
        tuple(names.get(label, "") for label in range(most)),
        categories,
        tuple(place[kinds[label]] if label in kinds else 0 for label in range(most)),
    )


def _size(root: Path, files: Sequence[str]) -> tuple[int, int]:
    """(h, w) of most masks."""
    sizes: Counter[tuple[int, int]] = Counter()
    for place in spread(len(files), _PROBED) if files else ():
        try:
            with open_image(root / files[place]) as image:
                sizes[image.size[1], image.size[0]] += 1
        except Exception:  # it will be found, and said, when its turn comes
            continue
    return sizes.most_common(1)[0][0] if sizes else _DEFAULT_SIZE


def write_concept_folder(source: ConceptSource, out: str | os.PathLike[str]) -> Path:
    """Write a concept source as a folder that ``conceptfolder:`` reads with the same content.

    Raises:
        ValueError: ``out`` is there and not empty.
        fastxkd.runs.sources.ImageError: an image of the source cannot be had.
    """
    pillow = require("PIL.Image", extra="runs")
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"out: {out} is not empty")
    (out / IMAGES).mkdir(parents=True, exist_ok=True)
    concepts, whole = source.concepts, []
    rows = [
        (label, name, concepts.category_of(label))
        for label, name in enumerate(concepts.names)
        if label and name
    ]
    (out / LABELS).write_text(_table(("number", "name", "category"), rows), "utf-8")
    for index in range(len(source)):
        sample = source[index]
        name = f"{index:06d}.png"
        pillow.fromarray(to_picture(sample.image)).save(out / IMAGES / name)
        for layer, mask in enumerate(sample.masks.numpy()):
            folder = out / MASKS / str(layer)
            folder.mkdir(parents=True, exist_ok=True)
            colours = np.stack([mask & 255, mask >> 8, np.zeros_like(mask)], 2).astype(np.uint8)
            pillow.fromarray(colours).save(folder / name)
        if sample.labels:
            whole.append((name, ";".join(map(str, sample.labels))))
    if whole:
        (out / WHOLE).write_text(_table(("image", "labels"), whole), "utf-8")
    return out


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
