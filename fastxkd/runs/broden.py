"""Concepts in the layout of Broden: tables of images, labels and categories beside the masks.

index.csv      image, split, ih, iw, sh, sw and a column per category: masks (files below
               images/) or numbers of labels, several with ';'
category.csv   name, first, last, count, frequency
label.csv      number, name, category, frequency, coverage, syns
c_NAME.csv     of each category: code, number, name, frequency, coverage
images/        images and masks; the label of a pixel is R + 256 G
"""

from __future__ import annotations

import csv
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastxkd.metrics.concept_scores import Concepts
from fastxkd.runs.concept_data import MOST_LABELS, ConceptSource, is_number, stacked
from fastxkd.runs.folders import _inside
from fastxkd.runs.names import Names, printable
from fastxkd.runs.sources import Settings

INDEX, LABELS, CATEGORIES = "index.csv", "label.csv", "category.csv"
_FIXED = ("image", "split", "ih", "iw", "sh", "sw")
# As spreadsheets write it: with a mark in front, or without.
_ENCODING = "utf-8-sig"
# Between the fields of a row that is kept as one name.
_MARK = "\0"


class BrodenSource(ConceptSource):
    """Rows of ``index.csv`` that have labels, in order; only their text is kept."""

    def __init__(
        self,
        spec: str,
        root: Path,
        rows: tuple[Names, array[int]],
        concepts: Concepts,
        mask_size: tuple[int, int],
        settings: Settings,
        **options: Any,
    ) -> None:
        self._rows, self._numbers = rows
        super().__init__(spec, len(self._rows), concepts, mask_size, settings, **options)
        self.root = root
        self._images = root / "images"
        self._boundary = os.path.realpath(root)

    def name(self, index: int) -> str:
        return printable(self._rows[index].split(_MARK.encode(), 1)[0])

    def row(self, index: int) -> int:
        """The row of ``index.csv`` an image comes from, as an editor counts: its header is 1."""
        return self._numbers[index]

    def _annotations(self, index: int) -> tuple[Tensor, list[int]]:
        place = f"{INDEX} row {self._numbers[index]}"
        _, height, width, *fields = self._rows[index].decode("utf-8").split(_MARK)
        if (height, width) != tuple(map(str, self._stored_size)):
            expected = " x ".join(map(str, self._stored_size))
            raise ValueError(
                f"{place}: masks of sh x sw = {height} x {width}, expected {expected} like the"
                " other images"
            )
        masks: list[np.ndarray[Any, Any]] = []
        labels: list[int] = []
        for field in fields:
            items = [item.strip() for item in field.split(";") if item.strip()]
            if all(item.isdecimal() for item in items):
                labels += self._labels_in(items, place)
                continue
            for item in items:
                if item.isdecimal():  # beside masks of its category: a label of every pixel
                    (label,) = self._labels_in([item], place)
                    masks.append(np.full(self.mask_size, label, np.int32))
                else:
                    masks.append(self._mask(self._file(item, place), f"{place}: {item}"))
        return stacked(masks, self.mask_size), labels

    def _picture(self, index: int) -> Tensor:
        place = f"{INDEX} row {self._numbers[index]}"
        image = self._rows[index].decode("utf-8").split(_MARK, 1)[0]
        return self._image(self._file(image, place), f"{place}: {image}")

    def _file(self, name: str, place: str) -> Path:
        path = self._images / name
        if not _inside(os.path.realpath(path), self._boundary):
            raise ValueError(f"{place}: {name} leads out of the data folder")
        return path

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "folder": str(self.root),
            "fingerprint": self._rows.digest(),
        }


def open_broden(
    spec: str,
    root: Path,
    split: str | None,
    settings: Settings,
    *,
    categories: Sequence[str] | None = None,
    size: int | None = None,
    allow_empty: bool = False,
) -> BrodenSource:
    """Open a folder in the layout of Broden.

    Labels keep their numbers in ``label.csv``. A label of several categories belongs to the one
    that it covers most of by ``c_*.csv``; of equals to the last in ``category.csv``, as in the
    authors' code. A category that has numbers only in a row gives labels of the whole image; rows
    without any label are left out, as there. ``sh`` and ``sw`` of most rows are the size of all
    masks: rows that differ are broken ones.

    Args:
        split: rows with this value in the column ``split``; None: all.
        categories: None: all in ``category.csv``.
        size, allow_empty: as in :func:`fastxkd.runs.concept_data.open_concepts`.

    Raises:
        ValueError: a table that is missing or damaged, a category without labels or without a
            single annotated image; names file and row.
    """
    if not root.is_dir():
        raise ValueError(f"data: {root} is not a folder")
    names, rows_of = _categories(root, categories)
    concepts = _labels(root, names)
    missing = [name for name in names if name not in _header(root / INDEX)]
    if missing:
        raise ValueError(
            f"data: {root / CATEGORIES} row {rows_of[missing[0]]}: {INDEX} has no column for the"
            f" category {missing[0]!r}"
        )
    numbers: array[int] = array("q")
    seen: Counter[str] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    splits: set[str] = set()

    def kept() -> Iterator[bytes]:
        for number, row in _rows(root / INDEX, (*_FIXED[:2], "sh", "sw")):
            splits.add(row["split"])
            fields = [row.get(name) or "" for name in names]
            if (split is not None and row["split"] != split) or not any(fields):
                continue
            seen.update(name for name, field in zip(names, fields, strict=True) if field)
            sizes[row["sh"], row["sw"]] += 1
            numbers.append(number)
            yield _MARK.join((row["image"], row["sh"], row["sw"], *fields)).encode("utf-8")

    rows = Names(kept())
    if not len(rows):
        there = ", ".join(sorted(splits)) or "none"
        raise ValueError(
            f"data: {root / INDEX} has no row with labels"
            + ("" if split is None else f" in the split {split!r}; its splits are {there}")
        )
    without = [name for name in names if not seen[name]]
    if without:
        raise ValueError(
            f"data: {root / CATEGORIES} row {rows_of[without[0]]}: no image of {INDEX} has pixels"
            f" or labels of the category {without[0]!r}"
        )
    (height, width), _ = sizes.most_common(1)[0]
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ValueError(f"data: {root / INDEX}: sh x sw is {height!r} x {width!r} in most rows")
    stored = (int(height), int(width))
    options = {"size": size, "allow_empty": allow_empty}
    return BrodenSource(spec, root, (rows, numbers), concepts, stored, settings, **options)


def _categories(root: Path, wanted: Sequence[str] | None) -> tuple[list[str], dict[str, int]]:
    """Names of the categories, and the row each of them stands in."""
    rows = {row["name"]: number for number, row in _rows(root / CATEGORIES, ("name",))}
    unknown = [name for name in wanted or () if name not in rows]
    if unknown or not rows:
        raise ValueError(
            f"data: {root / CATEGORIES} has the categories {', '.join(rows) or '(none)'}"
            + (f", not {unknown[0]!r}" if unknown else "")
        )
    return [name for name in rows if wanted is None or name in wanted], rows


def _labels(root: Path, categories: list[str]) -> Concepts:
    """Labels by number, each with the category that covers it most."""
    names: dict[int, str] = {}
    for number, row in _rows(root / LABELS, ("number", "name")):
        label = _number(root / LABELS, number, row["number"])
        if label in names:
            raise ValueError(f"data: {root / LABELS} row {number}: label {label} comes twice")
        names[label] = row["name"] or str(label)
    best: dict[int, tuple[float, int]] = {}
    for place, category in enumerate(categories):
        path, count = root / f"c_{category}.csv", 0
        for number, row in _rows(path, ("number", "coverage")):
            label = _number(path, number, row["number"])
            if label not in names:
                raise ValueError(f"data: {path} row {number}: label {label} is not in {LABELS}")
            coverage = _coverage(path, number, row["coverage"])
            best[label] = max(best.get(label, (0.0, -1)), (coverage, place))
            count += 1
        if not count:
            raise ValueError(f"data: {path}: the category {category!r} has no labels")
    most = max(best) + 1
    return Concepts(
        tuple(names[label] if label in best else "" for label in range(most)),
        tuple(categories),
        tuple(best[label][1] if label in best else 0 for label in range(most)),
    )


def _coverage(path: Path, row: int, text: str) -> float:
    try:
        if (coverage := float(text)) >= 0:
            return coverage
    except ValueError:
        pass
    raise ValueError(
        f"data: {path} row {row}: coverage is {text!r}, expected a number that is not below 0"
    )


def _number(path: Path, row: int, text: str) -> int:
    if is_number(text) and 0 < int(text) < MOST_LABELS:
        return int(text)
    raise ValueError(
        f"data: {path} row {row}: the number of a label is {text[:40]!r}, expected 1 to"
        f" {MOST_LABELS - 1}"
    )


def _header(path: Path) -> list[str]:
    try:
        with path.open(encoding=_ENCODING, newline="") as file:
            return next(csv.reader(file, strict=True), [])
    except (OSError, ValueError) as error:
        raise ValueError(f"data: {path} cannot be read ({error})") from error


def _rows(path: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(row, fields) of a table; rows are counted as an editor does, so that the header is 1.

    Raises:
        ValueError: it cannot be read, or lacks a column; a field that is missing is empty.
    """
    missing = [name for name in needed if name not in _header(path)]
    if missing:
        raise ValueError(f"data: {path} has no column {missing[0]!r}")
    read = 1
    try:
        with path.open(encoding=_ENCODING, newline="") as file:
            # Strictly: a quotation mark that nothing closes would swallow the rest of the table.
            reader = csv.DictReader(file, restval="", strict=True)
            for row in reader:
                read = reader.line_num
                yield read, {k: v for k, v in row.items() if k is not None}
    except csv.Error as error:
        raise ValueError(f"data: {path} row {read + 1}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data: {path} cannot be read ({error})") from error
