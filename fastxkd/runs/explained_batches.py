"""Training batches with the teacher's maps, moved exactly as their images were."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastxkd.runs.data import ArraySplit, ImageData, Split, TrainBatches, augment
from fastxkd.runs.explanation_cache import ExplanationCache
from fastxkd.train.teacher_maps import TeacherExplanations

__all__ = ["ExplainedBatches", "explanation_cache"]


class ExplainedBatches(TrainBatches):
    """:class:`TrainBatches` whose steps are images, labels and maps ``[n, k, h, w]``.

    The maps are those of the images as they are on disk; where an image is shifted and mirrored,
    its map is shifted and mirrored with it, pixel by pixel. That is an interpretation: the teacher
    would explain the moved image slightly otherwise.

    Args:
        data: see :class:`TrainBatches`.
        maps: a complete cache of ``data.train``, see :func:`explanation_cache`.
        options: as for :class:`TrainBatches`.
    """

    def __init__(self, data: ImageData, maps: ExplanationCache, **options: Any) -> None:
        super().__init__(data, **options)
        if maps.shape[0] != len(self.split):
            raise ValueError(
                f"maps: expected those of {len(self.split)} training images, got {maps.shape[0]}"
            )
        if not maps.complete:
            raise ValueError("maps: the cache is not complete; call fill() first")
        self.maps = maps

    def iterate(self, first: int, last: int) -> Iterator[tuple[Tensor, ...]]:
        """Normalised images, labels and maps of the steps ``first .. last - 1``, on the device."""
        for step, batch in zip(range(first, last), self._source(first, last), strict=True):
            self.data.skipped.update(batch.errors)
            maps = self.moved(step, batch.indices)
            yield (
                self.data.normalize(batch.images, self.device),
                batch.labels.to(self.device, non_blocking=True),
                maps.to(self.device, non_blocking=True),
            )

    def moved(self, step: int, indices: Tensor) -> Tensor:
        """The maps of the images at ``indices`` as they lie over the images of this step."""
        maps = self.maps.read(indices)
        if not self.augmented or not len(indices):
            return maps
        return augment(maps, indices, seed=self.seed, epoch=step // self.steps_per_epoch)


def explanation_cache(
    folder: str | Path,
    explanations: TeacherExplanations,
    data: ImageData,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> ExplanationCache:
    """The maps of ``data.train``, computed where they are not on disk yet.

    Args:
        folder, explanations, options: see :class:`ExplanationCache`.
        device: the teacher's.
        progress: called with (images that have maps, images).

    Raises:
        ValueError: the folder holds the maps of another teacher, or of other data.
    """
    split = data.train
    if split is None:
        raise ValueError(f"data: {data.spec!r} was loaded without training images")
    cache = ExplanationCache(
        folder,
        explanations,
        count=len(split),
        image_size=(data.image_size, data.image_size),
        data={**data.settings(), "images": split_digest(split)},
        **options,
    )

    def load(indices: np.ndarray) -> tuple[Tensor, Tensor]:
        batch = split.load(indices)
        data.skipped.update(batch.errors)
        return data.normalize(batch.images, device), batch.indices

    if not cache.complete:
        cache.fill(load, progress)
    return cache


def split_digest(split: Split) -> str:
    """What tells these images from others: pixels in memory, names on disk, and labels."""
    digest = hashlib.sha256(np.ascontiguousarray(split.labels).tobytes())
    if isinstance(split, ArraySplit):
        digest.update(split.images.contiguous().numpy().tobytes())
    else:
        for index in range(len(split)):
            digest.update(split.name(index).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:16]
