"""Sums over two features, a few samples at a time.

Losses on features move memory and compute little: the floor is to read both features once, and to
read them once more and write one gradient going back. In blocks of samples no temporary of a
feature's size leaves the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastxkd.ops._library import differentiable_once, exact_dtype, transformed

_NOTHING = nullcontext()
BLOCK_ELEMENTS = 1 << 18  # of float32: a megabyte, a core's share of most second-level caches

_AVERAGE_POOLS: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


def blockwise(features: Tensor) -> bool:
    """Whether blocks serve.

    Not on other devices, whose caches hide nothing from a launch, nor for a compiler, which fuses
    the operations itself, nor within ``torch.func``, where one tensor may be many.
    """
    return features.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()


def row_blocks(features: Tensor) -> list[slice]:
    """Slices of samples that stay in the cache between one operation and the next.

    One slice of all where there is nothing to gain.
    """
    n = features.shape[0]
    step = max(1, BLOCK_ELEMENTS * n // features.numel()) if blockwise(features) else n
    return [slice(begin, min(begin + step, n)) for begin in range(0, n, step)]


def in_blocks(features: Tensor, part: Callable[[slice], Tensor]) -> Tensor:
    """A tensor like ``features``, made block by block."""
    blocks = row_blocks(features)
    if len(blocks) == 1:
        return part(blocks[0]).to(features.dtype)
    out = torch.empty_like(features)
    for rows in blocks:
        out[rows] = part(rows)
    return out


def along_channels(values: Tensor, dim: int) -> Tensor:
    return values.view(-1, *[1] * (dim - 2))


def without_autocast(features: Tensor) -> AbstractContextManager[None]:
    """Where it is off it costs as much as a small matrix product to turn it off."""
    device = features.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    if len(row_blocks(student)) > 1:
        return squared_error(student, teacher).sum() / student.numel()
    exact = exact_dtype(student, teacher)
    return F.mse_loss(student.to(exact), teacher.to(exact))


class _SquaredError(torch.autograd.Function):
    """``[channels]`` sums of ``(student - teacher)^2`` over samples and positions."""

    generate_vmap_rule = True

    @staticmethod
    def forward(student: Tensor, teacher: Tensor) -> Tensor:
        exact = exact_dtype(student, teacher)
        others = [d for d in range(student.dim()) if d != 1]
        total = student.new_zeros(student.shape[1], dtype=torch.float64)
        for rows in row_blocks(student):
            error = student[rows].to(exact) - teacher[rows].to(exact)
            total = total + error.mul_(error).sum(others)
        return total.to(exact)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        student, teacher = ctx.saved_tensors
        factor = along_channels(2 * upstream, student.dim())
        exact = upstream.dtype

        def part(rows: slice) -> Tensor:
            error = student[rows].to(exact) - teacher[rows].to(exact)
            return error * factor if transformed() else error.mul_(factor)

        return in_blocks(student, part), None


def pooled(features: Tensor, size: Sequence[int], exact: torch.dtype) -> Tensor:
    if tuple(features.shape[2:]) == tuple(size):
        return features
    if len(size) not in _AVERAGE_POOLS:
        raise ValueError(
            "student_features, teacher_features: expected one to three spatial dimensions where"
            f" they differ in size, got {len(size)}"
        )
    # In float32 or better: an average of rounded numbers need not be rounded once more.
    return _AVERAGE_POOLS[len(size)](features.to(exact), list(size))


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both average-pooled to the smaller size, dimension by dimension."""
    if student.dim() != teacher.dim():
        raise ValueError(
            f"teacher_features: expected {student.dim()} dimensions as in student_features"
            f" {list(student.shape)}, got {list(teacher.shape)}"
        )
    size = [min(sizes) for sizes in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    exact = exact_dtype(student, teacher)
    return pooled(student, size, exact), pooled(teacher, size, exact)


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    error: Tensor = _SquaredError.apply(student, teacher)
    return error
