"""Images of which only the most or the least relevant pixels are left."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastxkd.metrics.input_gradients import kept_ranks, ranked_pixels
from fastxkd.runs.data import Batch, ImageData, Split
from fastxkd.train import Progress

LABELS = ("true", "predicted")
BATCH = 256


def mean_pixel(data: ImageData, *, batch_size: int = BATCH) -> Tensor:
    """The mean of the training images, uint8 ``[channels]``: rounded to what images hold."""
    assert data.train is not None
    total, pixels = torch.zeros(data.channels, dtype=torch.int64), 0
    for batch in data.batches(data.train, batch_size):
        total += batch.images.sum((0, 2, 3), dtype=torch.int64)
        pixels += batch.images[:, 0].numel()
    return (total / max(1, pixels)).round().to(torch.uint8)


def rank_pixels(
    model: nn.Module,
    data: ImageData,
    split: Split,
    *,
    of: str = "loss",
    channels: str = "max",
    labels: str = "true",
    batch_size: int = BATCH,
    device: torch.device | str = "cpu",
    stage: str = "ranking",
    progress: Progress | None = None,
) -> Tensor:
    """Ranks of every image's pixels by its input gradient, ``[n, h, w]``, 0 the most relevant.

    Args:
        of, channels: of :func:`fastxkd.metrics.input_gradients.ranked_pixels`.
        labels: whose loss or logit it is: the image's class, or what the model takes it for.

    Returns:
        int16, or int32 where there are more pixels, on the CPU; 0 for images that cannot be read.

    Raises:
        ValueError: NaN in a gradient.
    """
    progress = progress or Progress()
    size = data.image_size
    dtype = torch.int16 if size * size <= torch.iinfo(torch.int16).max else torch.int32
    ranks = torch.zeros(len(split), size, size, dtype=dtype)
    progress.start(stage, -(-len(split) // batch_size), 0)
    for batch in data.batches(split, batch_size):
        images = data.normalize(batch.images, device)
        known = batch.labels.to(device) if labels == "true" else None
        found = ranked_pixels(model, images, known, of=of, channels=channels)
        ranks[batch.indices] = found.to("cpu", dtype)
        progress.step(0, None)
    progress.finish()
    return ranks


class MaskedSplit(Split):
    """``inner`` with the pixels that count, and ``fill`` in place of the others.

    Args:
        ranks: of :func:`rank_pixels`.
        fraction, keep: of :func:`fastxkd.metrics.input_gradients.kept_pixels`.
        fill: uint8 ``[channels]``.
    """

    def __init__(
        self, inner: Split, ranks: Tensor, *, fraction: float, keep: str, fill: Tensor
    ) -> None:
        self.labels = inner.labels
        self.inner, self.ranks, self.fill = inner, ranks, fill[:, None, None]
        self.fraction, self.keep = fraction, keep

    def name(self, index: int) -> str:
        return self.inner.name(index)

    def load(self, indices: Sequence[int] | np.ndarray) -> Batch:
        batch = self.inner.load(indices)
        if not len(batch.labels):
            return batch
        kept = kept_ranks(self.ranks[batch.indices], self.fraction, keep=self.keep)
        return batch._replace(images=batch.images.where(kept[:, None], self.fill))


def masked_data(
    data: ImageData, ranks: dict[str, Tensor], *, fraction: float, keep: str, fill: Tensor
) -> ImageData:
    """``data`` with both its splits masked by ``ranks["train"]`` and ``ranks["test"]``."""
    assert data.train is not None
    train, test = (
        MaskedSplit(split, ranks[name], fraction=fraction, keep=keep, fill=fill)
        for name, split in (("train", data.train), ("test", data.test))
    )
    return dataclasses.replace(data, train=train, test=test)
