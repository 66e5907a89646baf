"""Folders of images: one sub-folder per class, with or without a split of their own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastxkd._extras import require
from fastxkd.runs.data import DEFAULT_MEAN, DEFAULT_STD, ImageData, Split

_EXTENSIONS = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
_TEST_FOLDERS = ("val", "test", "valid", "validation")
_CACHE_BYTES = 512 << 20


class FolderSplit(Split):
    """Image files, decoded when asked for; the first half gigabyte stays in memory."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], image_size: int) -> None:
        self.paths, self.labels = list(paths), np.asarray(labels, dtype=np.int64)
        self.image_size = image_size
        self._cache: dict[int, Tensor] = {}
        self._room = _CACHE_BYTES // (3 * image_size * image_size)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def _read(self, index: int) -> Tensor:
        cached = self._cache.get(index)
        if cached is None:
            cached = read_image(self.paths[index], self.image_size)
            if len(self._cache) < self._room:
                self._cache[index] = cached
        return cached


def read_image(path: Path, size: int) -> Tensor:
    """Decode a file to uint8 RGB [3, size, size]: EXIF turned, transparency on white.

    The shorter side is scaled to ``size`` and the middle is cut out.
    """
    image_module = require("PIL.Image", extra="cli")
    operations = require("PIL.ImageOps", extra="cli")
    with image_module.open(path) as file:
        image = operations.exif_transpose(file)
        if image.mode.startswith("I;16"):
            image = image_module.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = image_module.new("RGBA", image.size, (255, 255, 255, 255))
            image = image_module.alpha_composite(white, image)
        fitted = operations.fit(
            image.convert("RGB"), (size, size), method=image_module.Resampling.BILINEAR
        )
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()


def _images_below(folder: Path) -> list[Path]:
    found = [
        Path(place) / name
        for place, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in _EXTENSIONS and not name.startswith(".")
    ]
    return sorted(found)


def _class_folders(root: Path) -> dict[str, list[Path]]:
    """Class name -> image files, sorted; folders without an image are no class."""
    folders = sorted(
        entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    found = {folder.name: _images_below(folder) for folder in folders}
    return {name: paths for name, paths in found.items() if paths}


def load_folder(spec: str, root: Path, image_size: int, held_out: float, seed: int) -> ImageData:
    """Open ``ROOT/CLASS/**`` or ``ROOT/train/CLASS/**`` with ``ROOT/val`` or ``ROOT/test``.

    A tree without its own test images is split: ``held_out`` of every class, at least one image,
    chosen by ``seed``.

    Raises:
        ValueError: no such folder, fewer than two classes, classes without a counterpart.
    """
    if not root.is_dir():
        raise ValueError(f"data: {root} is not a folder")
    has_split = (root / "train").is_dir()
    trained = _class_folders(root / "train" if has_split else root)
    if len(trained) < 2:
        raise ValueError(
            f"data: expected at least 2 folders with images (one per class) in "
            f"{root / 'train' if has_split else root}, got {len(trained)}"
            f" ({', '.join(trained) or 'none'}); images look like {' '.join(sorted(_EXTENSIONS))}"
        )
    classes = list(trained)
    if has_split:
        own = next((root / name for name in _TEST_FOLDERS if (root / name).is_dir()), None)
        if own is None:
            raise ValueError(
                f"data: {root} has a 'train' folder but none of {', '.join(_TEST_FOLDERS)}"
            )
        tested = _class_folders(own)
        strangers = [name for name in tested if name not in trained]
        if strangers or not tested:
            raise ValueError(
                f"data: expected the classes of {root / 'train'} in {own}, got "
                f"{', '.join(strangers[:5]) or 'no images'}"
            )
        how = f"training images from train/, test images from {own.name}/"
    elif held_out == 0:
        trained, tested, how = {}, trained, "all images are test images"
    else:
        trained, tested = _hold_out(trained, held_out, seed)
        how = f"{held_out:.0%} of every class held out for testing, chosen by seed {seed}"

    def split(files: dict[str, list[Path]]) -> FolderSplit:
        paths = [path for name in classes for path in files.get(name, [])]
        labels = [classes.index(name) for name in classes for _ in files.get(name, [])]
        return FolderSplit(paths, labels, image_size)

    train, test = split(trained) if trained else None, split(tested)
    notice = (
        f"Images of {root}: {len(train) if train else 0:,} training and {len(test):,} test files "
        f"in {len(classes)} classes; {how}. Scaled by the shorter side to {image_size} px and cut "
        "out from the middle."
    )
    return ImageData(spec, classes, train, test, 3, image_size, DEFAULT_MEAN, DEFAULT_STD, notice)


def _hold_out(
    files: dict[str, list[Path]], share: float, seed: int
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    random = np.random.RandomState(seed & 0xFFFFFFFF)
    trained: dict[str, list[Path]] = {}
    tested: dict[str, list[Path]] = {}
    for name, paths in files.items():
        if len(paths) < 2:
            raise ValueError(
                f"data: class {name!r} has {len(paths)} image; at least 2 are needed to hold one "
                "out for testing"
            )
        aside = set(random.permutation(len(paths))[: max(1, round(share * len(paths)))].tolist())
        if len(aside) == len(paths):
            aside.pop()
        tested[name] = [path for at, path in enumerate(paths) if at in aside]
        trained[name] = [path for at, path in enumerate(paths) if at not in aside]
    return trained, tested
