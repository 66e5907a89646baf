"""``vmap`` for functions whose operator takes one batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def one_by_one(
    function: Any, info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """``vmap`` of an autograd function whose operator takes one batch: a loop."""

    def at(argument: Any, dim: Any, i: int) -> Any:
        batched = isinstance(argument, Tensor) and dim is not None
        return argument.select(dim, i) if batched else argument

    found = [
        function.apply(*(at(a, d, i) for a, d in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    stacked = tuple(torch.stack(outputs) for outputs in zip(*found, strict=True))
    return stacked, (0,) * len(stacked)
