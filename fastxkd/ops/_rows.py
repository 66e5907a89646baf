"""Rows of any size: brought to numbers whose squares neither vanish nor overflow."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxkd.ops._library import unobserved


def reciprocal(values: Tensor, least: float = 0.0) -> Tensor:
    """1 / x, and 0 up to ``least``: what has no length has no direction and pulls at nothing."""
    return values.reciprocal().masked_fill_(values <= least, 0)


def at_hand(values: Tensor) -> bool:
    """Whether numbers may be looked at: a compiler has none, and a device is not waited for."""
    return values.device.type == "cpu" and unobserved(values)


def ordinary(values: Tensor) -> bool:
    """Whether these numbers, at least 0, have squares with all their digits in float32."""
    low, high = values.aminmax()
    return low.item() > 1e-12 and high.item() < 1e12


def power_of_two(values: Tensor, dims: int | tuple[int, ...] = -1) -> Tensor:
    """What to multiply ``values`` with, so that the largest over ``dims`` is between 0.5 and 1.

    A power of two: the product has the digits of the values, and what does not depend on their size
    is the same to the last bit. A constant to autograd. Within the range of the dtype's normal
    numbers, hence 2^125 for zeros.
    """
    values = values.detach()
    largest = torch.maximum(values.amax(dims, keepdim=True), -values.amin(dims, keepdim=True))
    least = torch.finfo(values.dtype).tiny
    largest = largest.clamp(least, 0.5 / least)
    return torch.frexp(largest).mantissa / largest


def unit_rows(rows: Tensor) -> Tensor:
    """Rows, along the last dimension, of length 1; rows of zeros stay and pass no gradient."""
    if at_hand(rows):
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        if ordinary(norm):
            return rows / norm
    # The norm of what is 1 long does not depend on the scale, so no gradient is due to it.
    rows = rows * power_of_two(rows)
    square = rows.square().sum(-1, keepdim=True)
    alive = square != 0
    return torch.where(alive, rows * torch.where(alive, square, 1).rsqrt(), 0)
