"""Activations as rows of features no wider than asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def compared_size(shape: Sequence[int], limit: int) -> list[int]:
    """``[C, ...]`` with its space made smaller until the product is within the limit, or is C.

    >>> compared_size([64, 56, 56], 16_384)
    [64, 16, 16]
    """
    each = math.prod(shape)
    if each <= limit or len(shape) not in (3, 4):
        return list(shape)
    scale = (limit / each) ** (1 / (len(shape) - 1))
    return [shape[0], *(max(1, int(side * scale)) for side in shape[1:])]


def compared(activations: Tensor, limit: int) -> Tensor:
    """``[n, C, ...]`` as features ``[n, at most limit]``, float32 or float64.

    Maps and volumes with more numbers per image are averaged over blocks first, to the largest grid
    that fits.
    """
    exact = torch.float64 if activations.dtype == torch.float64 else torch.float32
    activations = activations.to(exact)
    size = compared_size(activations.shape[1:], limit)
    if size != list(activations.shape[1:]):
        pool: Any = F.adaptive_avg_pool2d if len(size) == 3 else F.adaptive_avg_pool3d
        activations = pool(activations, tuple(size[1:]))
    return activations.flatten(1)
