"""rkd: the relational loss, distances between samples and the n^3 angles between three.

Plain torch on the distance matrix, a few megabytes of angles at a time, on every device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastxkd.ops._library import define, differentiable_once, exact_dtype, wants_function
from fastxkd.ops._rows import power_of_two, reciprocal
from fastxkd.ops._transforms import one_by_one
from fastxkd.ops.distance import pair_distances

# Smallest distance that counts: the published code's eps in its square root.
LEAST_DISTANCE = 1e-6
# And for a direction, of features whose largest number is 1: sides of r : 1 cost float64 the digits
# of r in the law of cosines, and this many leave seven.
LEAST_LENGTH = 1e-9
# Three buffers of this many angles: a few megabytes each, that the last-level cache keeps. Smaller
# ones lose more to the calls between them than they win.
ANGLES = 1 << 20
# Up to so many samples angles in float64 cost no more than the calls for them.
FEW = 64
# Beyond this ratio of distances float32 has no five digits of an angle left, see _arithmetic.
SCALES = 64


def _fake_rkd(
    student: Tensor, teacher: Tensor, on_distance: float, on_angle: float, need_grad: bool
) -> tuple[Tensor, Tensor]:
    exact = exact_dtype(student, teacher)
    shape = student.shape if need_grad else (0,)
    return student.new_empty((), dtype=exact), student.new_empty(shape, dtype=exact)


@define(
    "rkd(Tensor student, Tensor teacher, float on_distance, float on_angle, bool need_grad)"
    " -> (Tensor loss, Tensor grad)",
    _fake_rkd,
)
def _rkd(
    student: Tensor, teacher: Tensor, on_distance: float, on_angle: float, need_grad: bool
) -> tuple[Tensor, Tensor]:
    exact = exact_dtype(student, teacher)
    shape = student.shape
    student, teacher = (x.reshape(x.shape[0], -1).to(exact) for x in (student, teacher))
    # Only ratios of distances count: squares of the scaled ones neither vanish nor overflow.
    scales = [power_of_two(x, (0, 1)) for x in (student, teacher)]
    student, distances, targets = _arithmetic(student * scales[0], teacher * scales[1])
    # Both parts are functions of the student's distances: one gradient in them, one product with
    # the features at the end.
    pull = torch.zeros_like(distances) if need_grad else None
    loss = distances.new_zeros((), dtype=torch.float64)
    if on_distance:
        least = [LEAST_DISTANCE * scale for scale in scales]
        loss += _distance_part(distances, targets, least, on_distance, pull)
    if on_angle:
        loss += _angle_part(distances, targets, on_angle, pull)
    if pull is None:
        return loss.to(exact), student.new_empty(0, dtype=exact)
    weight = (pull + pull.T).mul_(reciprocal(distances, LEAST_LENGTH))
    student = student - student.mean(0)  # the gradient sees differences, the product should too
    grad = weight.sum(1, keepdim=True) * student
    grad.addmm_(weight, student, alpha=-1)
    return loss.to(exact), grad.to(exact).mul_(scales[0]).view(shape)


def _arithmetic(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The student's features and both distances, in a dtype that holds the angles.

    Distances of many dimensions are nearly equal, and the loss is made of what they differ by: they
    are taken from differences, not from products. All is float64 where samples are few, or where
    sides of r : 1 are among them, of which the law of cosines costs the digits of r: rare enough to
    be worth an answer and no thought.
    """
    if len(student) > FEW:
        distances, targets = (pair_distances(x) for x in (student, teacher))
        if not any(_far_apart(d) for d in (distances, targets)):
            return student, distances.to(student.dtype), targets.to(student.dtype)
    student, teacher = student.double(), teacher.double()
    return student, pair_distances(student), pair_distances(teacher)


def _far_apart(distances: Tensor) -> bool:
    nearest = torch.where(distances > LEAST_LENGTH, distances, math.inf).min()
    return bool(distances.max() > SCALES * nearest)


def _distance_part(
    distances: Tensor, targets: Tensor, least: list[Tensor], factor: float, pull: Tensor | None
) -> Tensor:
    n = distances.shape[0]
    scaled, means = [], []
    for d, nearest in zip((distances, targets), least, strict=True):
        d = d.clamp_min(nearest.to(d.dtype)).fill_diagonal_(0)
        means.append(d.sum(dtype=torch.float64) / (n * (n - 1)))
        scaled.append(d / means[-1])
    error = scaled[0] - scaled[1]
    slope = error.clamp(-1, 1)
    loss = (slope * (error - slope / 2)).sum(dtype=torch.float64) * (factor / n**2)
    if pull is not None:
        # Every distance also moves the mean that all are divided by.
        common = (slope * scaled[0]).sum(dtype=torch.float64) / (n * (n - 1))
        on_distance = (slope - common) * (factor / n**2 / means[0])
        pull += torch.where(distances > least[0], on_distance, 0)
    return loss


def _angle_part(distances: Tensor, targets: Tensor, factor: float, pull: Tensor | None) -> Tensor:
    """Angles at j between i and k, for a few j at a time, by the law of cosines.

    With a = D_ji, b = D_jk, c = D_ik: cos = (a/b + b/a - c^2/(ab)) / 2, so that

        d cos / d a = 1/b - cos/a,   d cos / d c = -c/(ab)

    and neither the features nor n^3 numbers are needed at once. ``slope`` is the derivative of the
    smooth L1 loss, the error cut at 1; the loss itself is slope * (error - slope / 2).
    """
    n = distances.shape[0]
    factor /= n**3
    step = max(1, ANGLES // n**2)
    inverses, target_inverses = (
        reciprocal(distances, LEAST_LENGTH),
        reciprocal(targets, LEAST_LENGTH),
    )
    squares, target_squares = distances.square() / 2, targets.square() / 2
    halves, target_halves = distances / 2, targets / 2
    buffers = distances.new_empty(3, min(step, n), n, n)
    loss = distances.new_zeros((), dtype=torch.float64)
    opposite = torch.zeros_like(distances)
    for begin in range(0, n, step):
        at = slice(begin, min(begin + step, n))
        cosines, error, slope = buffers[:, : at.stop - at.start]
        near = inverses[at]
        _cosines_without_side(squares[at], squares, halves[at], near, cosines)
        cosines.mul_(near[:, :, None])
        _cosines_without_side(
            target_squares[at], target_squares, target_halves[at], target_inverses[at], error
        )
        torch.addcmul(cosines, error, target_inverses[at][:, :, None], value=-1, out=error)
        torch.clamp(error, -1, 1, out=slope)
        loss += error.sub_(slope, alpha=0.5).mul_(slope).sum()
        if pull is None:
            continue
        turned = cosines.mul_(slope).sum(2)
        straight = slope.mul_(near[:, None, :]).sum(2)
        # i and k are two sides alike: twice the one.
        pull[at] += (straight - near * turned) * (2 * factor)
        opposite += slope.mul_(near[:, :, None]).sum(0)
    if pull is not None:
        pull -= distances * opposite * factor
    return loss * factor


def _cosines_without_side(
    squares_at: Tensor, squares: Tensor, halves_at: Tensor, inverses_at: Tensor, out: Tensor
) -> None:
    """``out[j, i, k] = D_ji cos``; halves of D and D^2 come in, so that nothing is halved here."""
    torch.sub(squares_at[:, :, None], squares, out=out)
    torch.addcmul(halves_at[:, None, :], out, inverses_at[:, None, :], out=out)


class _RKD(torch.autograd.Function):
    """The gradient is made in the forward pass, where the angles are; backward scales it."""

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, on_distance: float, on_angle: float
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.fastxkd.rkd(  # type: ignore[no-any-return]
            student, teacher, on_distance, on_angle, True
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return one_by_one(_RKD, info, in_dims, *arguments)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None, None
        # Kept in float32 until here: a 16-bit gradient is rounded once.
        return (ctx.saved_tensors[0] * upstream).to(ctx.dtype), None, None, None


def rkd(student: Tensor, teacher: Tensor, on_distance: float, on_angle: float) -> Tensor:
    """Loss of checked features; differentiable once in the student's."""
    loss: Tensor
    if wants_function(student):
        loss, _ = _RKD.apply(student, teacher, on_distance, on_angle)
    else:
        loss, _ = torch.ops.fastxkd.rkd(student, teacher, on_distance, on_angle, False)
    return loss
