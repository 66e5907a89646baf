"""Folders of images: one sub-folder per class, with or without a split of their own."""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastxkd._extras import require
from fastxkd.runs.data import DEFAULT_MEAN, DEFAULT_STD, ImageData, Split
from fastxkd.runs.names import Names, printable
from fastxkd.runs.pictures import EXTENSIONS, is_image, open_file, read_image
from fastxkd.runs.sources import Settings, Source, spread

_TEST_FOLDERS = ("val", "test", "valid", "validation")
_CACHE_BYTES = 512 << 20
# Files, and of each so much, that stand for all of them when a run is continued.
_SAMPLED, _SAMPLED_BYTES = 8, 1 << 20


class FolderSplit(Split):
    """Image files, decoded when asked for; the first half gigabyte stays in memory."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], image_size: int) -> None:
        self.paths, self.labels = list(paths), np.asarray(labels, dtype=np.int64)
        self.image_size = image_size
        self._cache: dict[int, Tensor] = {}
        self._room = _CACHE_BYTES // (3 * image_size * image_size)

    def name(self, index: int) -> str:
        return printable(str(self.paths[index]))

    def _read(self, index: int) -> Tensor:
        cached = self._cache.get(index)
        if cached is None:
            cached = read_image(self.paths[index], self.image_size)
            if len(self._cache) < self._room:
                self._cache[index] = cached
        return cached


class FolderSource(Source):
    """Files below ``root`` in the order of their paths; only their names are kept."""

    def __init__(
        self,
        spec: str,
        root: Path,
        classes: list[str] | None,
        found: tuple[Names, array[int]],
        settings: Settings,
        *,
        boundary: Path,
        follow_links: bool,
    ) -> None:
        require("PIL.Image", extra="cli")  # now, rather than as the failure of every image
        size, channels = settings.image_size or 224, settings.channels or 3
        self._names, self._labels = found
        super().__init__(spec, len(self._names), classes, (channels, size, size), settings)
        self.root, self._boundary = root, os.path.realpath(boundary)
        self._follow_links = follow_links

    def name(self, index: int) -> str:
        return printable(self._names[index])

    def _read(self, index: int) -> tuple[Tensor, int | None]:
        channels, size, _ = self.shape
        path = self._path(index)
        pixels = read_image(path, size, channels=channels, max_pixels=self.settings.max_pixels)
        return pixels, self._labels[index] if self._labels[index] >= 0 else None

    def _path(self, index: int) -> str:
        path = os.path.join(self.root, os.fsdecode(self._names[index]))
        if not self._follow_links and not _inside(os.path.realpath(path), self._boundary):
            raise ValueError(
                "a link that leads out of the data folder; links are followed on request only"
            )
        return path

    def describe(self) -> dict[str, Any]:
        found = hashlib.sha256(self._names.digest().encode())
        # Names say little of what is in the files; all of them would take too long to read.
        for index in spread(len(self), _SAMPLED):
            with contextlib.suppress(OSError, ValueError), open_file(self._path(index)) as file:
                found.update(hashlib.sha256(file.read(_SAMPLED_BYTES)).digest())
        return {
            **super().describe(),
            "folder": str(self.root),
            "fingerprint": found.hexdigest(),
            "follow_links": self._follow_links,
        }


def open_folder(
    spec: str, root: Path, split: str | None, settings: Settings, *, follow_links: bool
) -> FolderSource:
    """Open ``ROOT/CLASS/**``, the images of ``ROOT`` itself, or one part of ``ROOT/{train,val}``.

    Where ``root`` holds ``train`` and ``val`` (or ``test``), and no images elsewhere, the latter is
    opened unless ``split`` names another, and its classes are numbered as those of ``train`` are.
    One of them alone is opened, too, if it has class folders. Images that lie in no class folder
    have no label.

    Raises:
        ValueError: no such folder, no images, a folder that cannot be listed, a class folder that
            is a link out of ``root``, classes that ``train`` does not have.
    """
    if not root.is_dir():
        raise ValueError(f"data: {root} is not a folder")
    parts = _folders(root)
    own = _own_part(root, parts)
    if split is not None and split not in parts:
        raise ValueError(
            f"data: {root} has no folder {split!r}; it has {', '.join(parts) or 'none'}"
        )
    folder = root / split if split is not None else root if own is None else root / own
    if not follow_links:
        _refuse_outside(folder, root)
    classes, names, labels = _labelled(folder, root, follow_links)
    if not len(names):
        raise ValueError(
            f"data: no images in {folder}; images look like {' '.join(sorted(EXTENSIONS))}"
        )
    numbered = _with_images(root / "train") if own is not None and "train" in parts else []
    if numbered and classes:
        strangers = [name for name in classes if name not in numbered]
        if strangers:
            raise ValueError(
                f"data: expected the classes of {root / 'train'} in {folder}, got "
                f"{', '.join(map(printable, strangers[:5]))}"
            )
        place = {name: number for number, name in enumerate(numbered)}
        moved = [place[name] for name in classes]
        labels = array("i", (moved[label] if label >= 0 else -1 for label in labels))
        classes = numbered
    return FolderSource(
        spec,
        folder,
        classes or None,
        (names, labels),
        settings,
        boundary=root,
        follow_links=follow_links,
    )


def _own_part(root: Path, parts: Sequence[str]) -> str | None:
    """The folder that holds the images to explain, where ``root`` is divided into such."""
    known = ("train", *_TEST_FOLDERS)
    if not set(parts).intersection(known):
        return None
    # Tools and annotations may lie beside them.
    filled = _with_images(root)
    if not set(filled) <= set(known):
        return None
    if len(filled) == 1:
        return filled[0] if _with_images(root / filled[0]) else None
    return next((name for name in _TEST_FOLDERS if name in filled), None)


def _labelled(folder: Path, root: Path, follow_links: bool) -> tuple[list[str], Names, array[int]]:
    """Classes (folders with at least one image), all images below, and the class of each."""
    classes: list[str] = []
    labels = array("i")

    def walk() -> Iterator[bytes]:
        for name, is_folder in _listing(str(folder), "", links=True):
            if not is_folder:
                labels.append(-1)
                yield os.fsencode(name)
                continue
            if name.startswith("."):
                continue
            place = os.path.join(folder, name)
            known = False
            for below in _walk(place):
                if not known:
                    if not follow_links:
                        _refuse_outside(Path(place), root)
                    classes.append(name)
                    known = True
                labels.append(len(classes) - 1)
                yield os.fsencode(f"{name}/{below}")

    names = Names(walk())
    return classes, names, labels


def _inside(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _refuse_outside(folder: Path, root: Path) -> None:
    if not _inside(os.path.realpath(folder), os.path.realpath(root)):
        raise ValueError(
            f"data: the folder {printable(str(folder))} is a link that leads out of {root}; links "
            "are followed on request only (follow_links)"
        )


def _folders(folder: Path) -> list[str]:
    found = _listing(str(folder), "", links=True)
    return [name for name, is_folder in found if is_folder and name[0] != "."]


def _with_images(folder: Path) -> list[str]:
    return [name for name in _folders(folder) if next(_walk(os.path.join(folder, name)), None)]


def _listing(folder: str, below: str, *, links: bool = False) -> Iterator[tuple[str, bool]]:
    """(path from ``folder``, is a folder) of the folders and images in ``folder/below``, by name.

    Folders that are links are left out unless ``links``: a link to a parent has no end.
    """
    folders, files = [], []
    try:
        with os.scandir(os.path.join(folder, below)) as entries:
            for entry in entries:
                if _is_folder(entry):
                    if links or not entry.is_symlink():
                        folders.append(below + entry.name)
                elif is_image(entry.name):
                    files.append(below + entry.name)
    except OSError as error:
        place = printable(os.path.join(folder, below))
        raise ValueError(f"data: the folder {place} cannot be listed: {error.strerror}") from error
    folders.sort()
    files.sort()
    return heapq.merge(((name, True) for name in folders), ((name, False) for name in files))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _walk(folder: str) -> Iterator[str]:
    """Images at any depth below ``folder``, in the order of their paths, as paths from there."""
    open_folders = [_listing(folder, "")]
    while open_folders:
        for name, is_folder in open_folders[-1]:
            if is_folder:
                open_folders.append(_listing(folder, f"{name}/"))
                break
            yield name
        else:
            open_folders.pop()


def _images_below(folder: Path) -> list[Path]:
    return [folder / name for name in _walk(str(folder))]


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
    chosen by ``seed``. One with test images alone is for ``held_out=0``, which trains nothing.

    Raises:
        ValueError: no such folder, fewer than two classes, classes without a counterpart.
    """
    if not root.is_dir():
        raise ValueError(f"data: {root} is not a folder")
    has_split = (root / "train").is_dir()
    part = "train" if has_split else _own_part(root, _folders(root))
    if held_out > 0 and not has_split and part is not None:
        raise ValueError(
            f"data: {root} has a {part!r} folder but no 'train'; to hold images of it out for "
            f"testing, name that folder: {root / part}"
        )
    place = root / (part or "")
    trained = _class_folders(place)
    if len(trained) < 2:
        raise ValueError(
            f"data: expected at least 2 folders with images (one per class) in {place}, got "
            f"{len(trained)} ({', '.join(trained) or 'none'}); images look like "
            f"{' '.join(sorted(EXTENSIONS))}"
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
        how = "all images are test images" if part is None else f"test images from {part}/"
        trained, tested = {}, trained
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
    shown = [printable(name) for name in classes]
    return ImageData(spec, shown, train, test, 3, image_size, DEFAULT_MEAN, DEFAULT_STD, notice)


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
