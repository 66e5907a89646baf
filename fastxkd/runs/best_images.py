"""The images on which each unit is strongest, and its maps there, found in passing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class BestImages:
    """The ``count`` images with the highest peak of every unit; of equal peaks the first seen.

    Attributes:
        peaks: float32 [U, count], falling; -inf where there were fewer images.
        images: int64 [U, count]; -1 there.
        maps: float32 [U, count, h, w].

    >>> best = BestImages(2)
    >>> best.update([4, 7, 9], torch.tensor([[1.0, 5.0], [3.0, 5.0], [2.0, 6.0]])[..., None, None])
    >>> best.images.tolist()
    [[7, 9], [9, 4]]
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.peaks = torch.empty(0)
        self.images = torch.empty(0)
        self.maps = torch.empty(0)

    def update(self, indices: Sequence[int], activations: Tensor) -> None:
        """Look at a batch ``[n, U, h, w]`` of these images."""
        activations = activations.detach().float().cpu()
        units = activations.shape[1]
        if not self.peaks.numel():
            shape = (units, self.count)
            self.peaks = torch.full(shape, -torch.inf)
            self.images = torch.full(shape, -1)
            self.maps = torch.zeros(*shape, *activations.shape[2:])
        peaks = torch.cat([self.peaks, activations.amax((2, 3)).T], 1)
        numbers = torch.tensor(indices, dtype=torch.int64).expand(units, -1)
        images = torch.cat([self.images, numbers], 1)
        order = peaks.sort(dim=1, descending=True, stable=True).indices[:, : self.count]
        self.peaks, self.images = peaks.gather(1, order), images.gather(1, order)
        # Only what moves up is copied.
        which = torch.arange(units)[:, None].expand_as(order)
        old = order < self.count
        kept = self.maps[which, order.clamp(max=self.count - 1)]
        new = activations[(order - self.count).clamp(min=0), which]
        self.maps = torch.where(old[..., None, None], kept, new)
