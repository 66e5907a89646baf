"""ReviewKD: every stage of the teacher is learned from the student's stage and all deeper ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxkd.losses._blocks import in_blocks, row_blocks, squared_error, without_autocast
from fastxkd.ops._checks import (
    Features,
    check_channels,
    check_counts,
    check_layers,
    check_pair,
    check_precision,
)
from fastxkd.ops._library import differentiable_once, exact_dtype, transformed

__all__ = ["ABF", "ReviewKDLoss", "hcl_loss"]


def hcl_loss(student_features: Features, teacher_features: Features) -> Tensor:
    r"""Hierarchical context loss of ReviewKD: squared differences at several resolutions.

    .. math::
        L = \sum_{stages} \frac{\mathrm{MSE}(F_s, F_t) + \sum_l w_l\, \mathrm{MSE}(pool_l F_s,
        pool_l F_t)}{1 + \sum_l w_l}, \quad w = \tfrac12, \tfrac14, \tfrac18

    with average pools to l x l for those of l = 4, 2, 1 that are smaller than the stage; the
    weights go to the pools that are left, in this order. Pooling is linear, so that the difference
    is pooled, once. Published factors: 0.6 to 8 with a warm-up of 20 epochs.

    Args:
        student_features: ``[n, channels, height, width]`` or ``[n, channels]``, or a list of them,
            any float dtype.
        teacher_features: the same shapes, without gradient.

    Returns:
        A scalar, float64 if a feature is float64, else float32. Differentiable once.

    Raises:
        ValueError, TypeError: shapes, dtypes or lengths that do not fit, a teacher that requires
            grad.

    Chen et al. 2021, Distilling Knowledge via Knowledge Review.

    >>> import torch
    >>> hcl_loss([torch.ones(2, 3, 8, 8)], [torch.zeros(2, 3, 8, 8)]).item()
    1.0
    """
    stages = []
    for names, student, teacher in check_layers(student_features, teacher_features):
        check_pair(student, teacher, names)
        _check_map(names[0], student)
        if student.shape != teacher.shape:
            raise ValueError(
                f"{names[1]}: expected the shape of {names[0]} {list(student.shape)},"
                f" got {list(teacher.shape)}"
            )
        stages.append(_stage(student, teacher))
    return sum(stages[1:], start=stages[0])


def _check_map(name: str, features: Tensor) -> None:
    if features.dim() not in (2, 4):
        raise ValueError(
            f"{name}: expected [n, channels] or [n, channels, height, width],"
            f" got shape {list(features.shape)}"
        )


def _stage(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared error of one stage, at its own size and at those of the pools, in their means."""
    size = student.shape[2:]
    levels = [level for level in (4, 2, 1) if size and level < min(size)]
    weights = [0.5**power for power in range(len(levels) + 1)]
    rows = student.shape[0] * student.shape[1]
    own, *pooled = (w / sum(weights) / rows for w in weights)
    own *= rows / student.numel()
    if not levels:
        return squared_error(student, teacher).sum() * own
    exact = exact_dtype(student, teacher)
    bins, factors = [], []
    for level, factor in zip(levels, pooled, strict=True):
        sides = [
            F.adaptive_avg_pool1d(torch.eye(length, dtype=exact, device=student.device), level)
            for length in size
        ]
        bins.append(torch.einsum("ia,jb->ijab", *sides).reshape(-1, level**2))
        factors.append(student.new_full((level**2,), factor / level**2, dtype=exact))
    # Autocast would round the pools to 16 bits.
    with without_autocast(student):
        loss, _ = _Pyramid.apply(student, teacher, torch.cat(bins, 1), torch.cat(factors), own)
    return loss


class _Pyramid(torch.autograd.Function):
    """``own |d|^2 + sum_b factors_b |d bins_b|^2`` of the difference d.

    Every pool of every size is one column of ``bins [positions, 21]``, all of them one product
    while the difference is in the cache, and one that adds to it going back.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, bins: Tensor, factors: Tensor, own: float
    ) -> tuple[Tensor, Tensor]:
        total = bins.new_zeros((), dtype=torch.float64)
        pools = []
        for rows in row_blocks(student):
            error = _planes(student[rows], bins.dtype) - _planes(teacher[rows], bins.dtype)
            pools.append(error @ bins)
            total = total + error.mul_(error).sum()
        pooled = torch.cat(pools)
        return (total * own + (pooled.square().sum(0) * factors).sum()).to(bins.dtype), pooled

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4], output[1])
        ctx.own = inputs[4]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 5
        student, teacher, bins, factors, pooled = ctx.saved_tensors
        on_pools = pooled * (factors * (2 * upstream))
        on_own, channels = 2 * ctx.own * upstream, student.shape[1]

        def part(rows: slice) -> Tensor:
            error = _planes(student[rows], bins.dtype) - _planes(teacher[rows], bins.dtype)
            here = on_pools[rows.start * channels : rows.stop * channels]
            error = error * on_own if transformed() else error.mul_(on_own)
            return torch.addmm(error, here, bins.T).view(student[rows].shape)

        with without_autocast(student):
            return in_blocks(student, part), None, None, None, None


def _planes(images: Tensor, exact: torch.dtype) -> Tensor:
    return images.to(exact).reshape(-1, images.shape[2] * images.shape[3])


class ABF(nn.Module):
    """Attention-based fusion of ReviewKD: one stage of the student with what deeper stages left.

    ``forward(features, residual, size)`` returns the stage in the teacher's channels, at ``size``,
    and the residual for the next shallower stage.

    Args:
        student_channels, mid_channels, teacher_channels: of the stage, the residual, the result.
        fuse: whether there is a deeper stage; the deepest has no attention.
    """

    def __init__(
        self, student_channels: int, mid_channels: int, teacher_channels: int, *, fuse: bool
    ) -> None:
        super().__init__()
        reduce = nn.Conv2d(student_channels, mid_channels, 1, bias=False)
        expand = nn.Conv2d(mid_channels, teacher_channels, 3, padding=1, bias=False)
        for convolution in (reduce, expand):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.reduce = nn.Sequential(reduce, nn.BatchNorm2d(mid_channels))
        self.expand = nn.Sequential(expand, nn.BatchNorm2d(teacher_channels))
        self.attention = nn.Conv2d(2 * mid_channels, 2, 1) if fuse else None

    def forward(
        self, features: Tensor, residual: Tensor | None, size: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        x = self.reduce(features)
        if self.attention is not None and residual is not None:
            residual = F.interpolate(residual, x.shape[2:], mode="nearest")
            weights = self.attention(torch.cat([x, residual], 1)).sigmoid()
            x = x * weights[:, :1] + residual * weights[:, 1:]
        if tuple(x.shape[2:]) != tuple(size):
            x = F.interpolate(x, list(size), mode="nearest")
        return self.expand(x), x


class ReviewKDLoss(nn.Module):
    """ReviewKD: every teacher stage is learned from the student's stage and all deeper ones.

    Student stages are fused from the deepest to the shallowest by :class:`ABF` blocks; the fused
    ones are held to the teacher's by :func:`hcl_loss`.

    Args:
        student_channels, teacher_channels: of each stage, from the shallowest to the deepest,
            usually the pooled vector. Any number of stages; their sizes are those that come.
        mid_channels: width of the residual, by default the student's last stage, 512 at most.

    ``criterion(student_features, teacher_features)`` takes lists in that order of ``[n, channels,
    height, width]``; a vector may also be ``[n, channels]``. The student's are brought to the dtype
    of the parameters, and may not be wider. The published recipe takes the teacher's features
    before the last ReLU of their stage. The parameters belong to the training:
    pass ``criterion.parameters()`` to the optimiser too.

    Raises:
        ValueError, TypeError: lists of other lengths, channels or dtypes that do not fit, a teacher
            that requires grad.

    Chen et al. 2021, Distilling Knowledge via Knowledge Review.

    >>> import torch
    >>> criterion = ReviewKDLoss([8, 16, 16], [12, 24, 24])
    >>> student = [torch.randn(2, 8, 8, 8), torch.randn(2, 16, 4, 4), torch.randn(2, 16)]
    >>> teacher = [torch.randn(2, 12, 8, 8), torch.randn(2, 24, 4, 4), torch.randn(2, 24)]
    >>> criterion(student, teacher).shape
    torch.Size([])
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        mid_channels: int | None = None,
    ) -> None:
        super().__init__()
        if len(student_channels) != len(teacher_channels) or not student_channels:
            raise ValueError(
                "teacher_channels: expected as many stages as student_channels and at least one,"
                f" got {len(teacher_channels)} and {len(student_channels)}"
            )
        mid = min(512, student_channels[-1]) if mid_channels is None else mid_channels
        for name, channels in (
            ("student_channels", student_channels),
            ("teacher_channels", teacher_channels),
            ("mid_channels", [mid]),
        ):
            for count in channels:
                check_counts(**{name: count})
        self.student_channels = list(student_channels)
        self.teacher_channels = list(teacher_channels)
        self.mid_channels = mid
        deepest = len(self.student_channels) - 1
        self.fusions = nn.ModuleList(
            ABF(s, mid, t, fuse=index < deepest)
            for index, (s, t) in enumerate(zip(student_channels, teacher_channels, strict=True))
        )

    def forward(
        self, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]
    ) -> Tensor:
        layers = check_layers(student_features, teacher_features)
        if len(layers) != len(self.fusions):
            raise ValueError(
                f"student_features: expected {len(self.fusions)} stages, got {len(layers)}"
            )
        weight = next(self.parameters())
        students, teachers = [], []
        for index, (names, student, teacher) in enumerate(layers):
            check_pair(student, teacher, names)
            for name, features, channels in (
                (names[0], student, self.student_channels[index]),
                (names[1], teacher, self.teacher_channels[index]),
            ):
                _check_map(name, features)
                check_channels(name, features, channels)
            check_precision(names[0], student, weight)
            students.append(_image(student).to(weight.dtype))
            teachers.append(_image(teacher))
        fused: list[Tensor] = []
        residual = None
        for fusion, student, teacher in zip(
            reversed(self.fusions), reversed(students), reversed(teachers), strict=True
        ):
            out, residual = fusion(student, residual, teacher.shape[2:])
            fused.append(out)
        return hcl_loss(fused[::-1], teachers)

    def extra_repr(self) -> str:
        return f"{self.student_channels}, {self.teacher_channels}, mid_channels={self.mid_channels}"


def _image(features: Tensor) -> Tensor:
    return features[:, :, None, None] if features.dim() == 2 else features
