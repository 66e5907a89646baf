"""The images of a run over a whole data set: asked for by index, and failing one at a time.

A source knows how many images it has before any of them is opened. ``source[i]`` is a
:class:`Sample`, or an :class:`ImageError` that says why this one image cannot be had; whatever
makes the whole source useless is a ``ValueError`` when it is opened. Sources go to workers by fork
and by pickle, and image ``i`` is the same in all of them.
"""

from __future__ import annotations

import hashlib
import operator
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastxkd.runs import data as images_of
from fastxkd.runs.names import printable
from fastxkd.runs.pictures import PIXEL_LIMIT

__all__ = [
    "PIXEL_LIMIT",
    "SPECS",
    "ImageError",
    "Sample",
    "Settings",
    "Source",
    "open_source",
    "spread",
]

SPECS = (
    "builtin, fashion-mnist[:ROOT], imagefolder:ROOT, webdataset:SHARDS, hf:PATH, "
    "torchvision:NAME:ROOT, package.module:factory, path/to/file.py:factory or a data set with a "
    "length and items (the specs for data with parts take #train, #test, ... at their end)"
)


class Sample(NamedTuple):
    """image uint8 or float32 [C, H, W]; label None where there is none; name for people."""

    image: Tensor
    label: int | None
    name: str


class ImageError(Exception):
    """One image cannot be had; ``str`` says why, ``name`` is its path or place in the data."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Settings:
    """How images are prepared; None where the data set decides."""

    image_size: int | None = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    max_pixels: int = PIXEL_LIMIT

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 8:
            raise ValueError(f"image_size: expected at least 8, got {self.image_size}")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"channels: expected 1 or 3, got {self.channels}")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels: expected at least 1, got {self.max_pixels}")


class Source(torch.utils.data.Dataset[Sample]):
    """Images by index; see :func:`open_source`.

    Attributes:
        spec: what was opened, in the user's words where there are any.
        classes: their names by label; None if the data has none.
        shape: (C, H, W) of every image.
        mean, std: one per channel, for pixels in [0, 1]; None if the data hands out floats, which
            are taken to be what the model wants.
    """

    def __init__(
        self,
        spec: str,
        count: int,
        classes: list[str] | None,
        shape: tuple[int, int, int],
        settings: Settings,
        *,
        floats: bool = False,
    ) -> None:
        if count < 1:
            raise ValueError(f"data: {spec} has no images")
        self.spec, self.shape, self.settings = spec, shape, settings
        self.classes = None if classes is None else [printable(name) for name in classes]
        self._count, self._dtype = count, torch.float32 if floats else torch.uint8
        self.mean: tuple[float, ...] | None = None
        self.std: tuple[float, ...] | None = None
        if floats:
            for name in ("image_size", "channels", "mean", "std"):
                if getattr(settings, name) is not None:
                    raise ValueError(
                        f"{name}: the images of {spec} are floats {list(shape)}, which are taken "
                        f"as they are; got {getattr(settings, name)}"
                    )
            return
        self.mean = images_of.per_channel("mean", settings.mean, images_of.DEFAULT_MEAN, shape[0])
        self.std = images_of.per_channel("std", settings.std, images_of.DEFAULT_STD, shape[0])
        if min(self.std) <= 0:
            raise ValueError(f"std: expected positive numbers, got {list(self.std)}")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        index = operator.index(index)
        if not 0 <= index < self._count:
            raise IndexError(f"index: expected 0 to {self._count - 1}, got {index}")
        try:
            image, label = self._read(index)
            self._check(image, label)
        # A decoder or a user's data set may raise anything; none of it may end a run.
        except Exception as error:
            raise ImageError(self.name(index), images_of.why(error)) from error
        return Sample(image, label, self.name(index))

    def name(self, index: int) -> str:
        """What to call image ``index``; its path from the root of the data where it has one."""
        return f"image {index}"

    def _read(self, index: int) -> tuple[Tensor, int | None]:
        raise NotImplementedError

    def _check(self, image: Tensor, label: int | None) -> None:
        if image.shape != self.shape or image.dtype != self._dtype:
            raise ValueError(
                f"expected {self._dtype} {list(self.shape)} like the other images, got "
                f"{image.dtype} {list(image.shape)}"
            )
        if image.is_floating_point() and not torch.isfinite(image).all():
            raise ValueError("pixels that are NaN or infinite")
        most = 1 << 63 if self.classes is None else len(self.classes)
        if label is not None and not 0 <= label < most:
            raise ValueError(f"label {label}, expected 0 to {most - 1}")

    def normalize(self, images: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Images [m, C, H, W] of this source as the model wants them: float32 on ``device``."""
        if self.mean is None or self.std is None:
            return images.to(device, non_blocking=True)
        return images_of.normalize(images, self.mean, self.std, device)

    def describe(self) -> dict[str, Any]:
        """What must be equal for two runs to see the same images, for JSON.

        ``fingerprint`` stands for what is in the data: names and a few files, or all pixels where
        those are in memory anyway; of objects, which can only be asked for one item after another,
        a few items.
        """
        return {
            "data": self.spec,
            "images": len(self),
            "classes": self.classes,
            "shape": list(self.shape),
            "mean": None if self.mean is None else list(self.mean),
            "std": None if self.std is None else list(self.std),
            "max_pixels": self.settings.max_pixels,
        }


class ArraySource(Source):
    """Images in memory: uint8 [n, H, W]."""

    def __init__(
        self,
        spec: str,
        arrays: tuple[np.ndarray, np.ndarray],
        classes: Sequence[str],
        settings: Settings,
    ) -> None:
        self._images, self._labels = arrays
        size = settings.image_size or self._images.shape[-1]
        shape = (settings.channels or 1, size, size)
        super().__init__(spec, len(self._images), list(classes), shape, settings)

    def _read(self, index: int) -> tuple[Tensor, int | None]:
        # A copy: what is handed out may be changed, what is kept may not.
        pixels = torch.from_numpy(self._images[index].copy())[None]
        if pixels.shape[1:] != self.shape[1:]:
            pixels = images_of.resize(pixels[None], self.shape[-1])[0]
        return pixels.repeat(self.shape[0], 1, 1), int(self._labels[index])

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256(np.ascontiguousarray(self._images).data)
        digest.update(np.ascontiguousarray(self._labels).data)
        return {**super().describe(), "fingerprint": digest.hexdigest()}


def spread(count: int, wanted: int) -> list[int]:
    """Up to ``wanted`` places evenly over ``count``, so that sorted data has all its classes.

    >>> spread(10, 4)
    [0, 3, 6, 9]
    """
    places = np.linspace(0, count - 1, min(count, wanted)).astype(np.int64)
    return np.unique(places).tolist()  # type: ignore[no-any-return]


def open_source(
    data: object,
    *,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    channels: int | None = None,
    max_pixels: int = PIXEL_LIMIT,
    follow_links: bool = False,
) -> Source:
    """Open a data set of any kind for a run over all of it.

    Args:
        data: one of

            - ``builtin[#train]``, ``fashion-mnist[:ROOT][#train]``: as for training; the test
              images unless ``#train`` is asked for;
            - ``imagefolder:ROOT[#PART]``: class folders or a flat folder, see
              :func:`fastxkd.runs.folders.open_folder`;
            - ``webdataset:SHARDS``: tar files by glob or by brackets (``train-{000..012}.tar``),
              see :func:`fastxkd.runs.shards.open_shards`;
            - ``hf:PATH[#SPLIT]``: written by ``save_to_disk`` of Hugging Face ``datasets``, see
              :func:`fastxkd.runs.huggingface.open_saved`;
            - ``torchvision:NAME:ROOT[#SPLIT]``, ``package.module:factory``,
              ``path/to/file.py:factory``, or any object with a length and items, see
              :func:`fastxkd.runs.items.open_items`.
        image_size: side in pixels that images are scaled and cut to. Default: 28 for
            Fashion-MNIST, 224 for files; for images in a data set the shorter side of the first,
            at most 224; tensors keep their size.
        mean, std: one number or one per channel, for pixels in [0, 1]; default 127/255, 128/255.
        channels: 3 for RGB or 1 for grey. Default: 3 for files, as the first image otherwise.
        max_pixels: images that claim more are refused before they are decoded.
        follow_links: read files that symbolic links (or paths in a saved data set) place outside
            the folder that was named.

    Raises:
        ValueError: unknown spec, missing or unreadable data, no images, options that do not fit.
        TypeError: ``data`` has no length or no items.
    """
    settings = Settings(
        image_size,
        channels,
        None if mean is None else tuple(map(float, mean)),
        None if std is None else tuple(map(float, std)),
        max_pixels,
    )
    if isinstance(data, Source):
        if settings != Settings() or follow_links:
            raise ValueError("data: this source is open already; give the options when opening it")
        return data
    if not isinstance(data, str):
        from fastxkd.runs.items import open_items

        return open_items(data, settings, follow_links=follow_links)
    text, split = _part(data)
    kind, _, rest = text.partition(":")
    if kind in ("builtin", "fashion-mnist"):
        if split not in (None, "train", "test") or (kind == "builtin" and text != kind):
            raise ValueError(f"data: expected {SPECS}, got {data!r}")
        part = split or "test"
        arrays = (
            images_of.read_builtin(part)
            if kind == "builtin"
            else images_of.read_idx_pair(images_of.fashion_mnist_folder(rest), part)
        )
        return ArraySource(data, arrays, images_of.FASHION_MNIST_CLASSES, settings)
    if kind == "imagefolder" and rest:
        from fastxkd.runs.folders import open_folder

        folder = Path(os.path.expanduser(rest))
        return open_folder(data, folder, split, settings, follow_links=follow_links)
    if kind == "webdataset" and rest:
        from fastxkd.runs.shards import open_shards

        return open_shards(data, settings)
    if kind == "hf" and rest:
        from fastxkd.runs.huggingface import open_saved

        saved = Path(os.path.expanduser(rest))
        return open_saved(data, saved, split, settings, follow_links=follow_links)
    if rest and kind not in ("imagefolder", "webdataset", "hf"):
        from fastxkd.runs.items import open_spec

        return open_spec(data, text, split, settings)
    raise ValueError(f"data: expected {SPECS}, got {data!r}")


def _part(spec: str) -> tuple[str, str | None]:
    """``spec`` without its ``#part``; a path that has that mark in its name keeps it."""
    found = re.fullmatch(r"(.+)#([\w.-]+)", spec)
    places = (spec.partition(":")[2], spec.rpartition(":")[2])
    if found is None or any(os.path.exists(os.path.expanduser(place)) for place in places if place):
        return spec, None
    return found[1], found[2]
