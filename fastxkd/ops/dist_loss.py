"""dist_loss: cross-entropy and DIST, correlations along rows and columns of probabilities.

In plain torch on every device, with the gradient in closed form. The columns tie all rows of a
batch together: probabilities have to be there twice, once for the columns' means and once for the
gradient, so 5u would be this loss's floor where ``kd_loss`` has 3u.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxkd.ops._library import define, differentiable_once, exact_dtype, wants_function
from fastxkd.ops.kd_loss import _kd_loss

EPS = 1e-8  # beside the product of the norms, as in the published code


def _fake(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    class_weight: Tensor | None,
    temperature: float,
    ce_weight: float,
    inter_weight: float,
    intra_weight: float,
    ignore_index: int,
    label_smoothing: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    exact = exact_dtype(student)
    grad = student.new_empty(student.shape if need_grad else [0])
    return student.new_empty((), dtype=exact), student.new_empty([2], dtype=exact), grad


@define(
    "dist_loss(Tensor student, Tensor teacher, Tensor? labels, Tensor? class_weight,"
    " float temperature, float ce_weight, float inter_weight, float intra_weight,"
    " int ignore_index, float label_smoothing, bool need_grad)"
    " -> (Tensor loss, Tensor parts, Tensor grad)",
    _fake,
)
def _dist_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    class_weight: Tensor | None,
    temperature: float,
    ce_weight: float,
    inter_weight: float,
    intra_weight: float,
    ignore_index: int,
    label_smoothing: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``inter_weight * inter + intra_weight * intra`` and the cross-entropy, over counted rows."""
    # Single precision from here on, so that both gradients are rounded once, together.
    s, t = (x.to(exact_dtype(student)) for x in (student, teacher))
    rest: tuple[Any, ...] = (
        None,
        None,
        [],
        0,
        1.0,
        ce_weight,
        0.0,
        0,
        0.0,
        0.0,
        ignore_index,
        label_smoothing,
        2,
    )
    hard, _, hard_grad = _kd_loss(s, t, labels, class_weight, *(*rest, need_grad))
    keep = None if labels is None else labels != ignore_index
    soft, grad = _correlations(s, t, keep, temperature, inter_weight, intra_weight, need_grad)
    parts = torch.stack([hard, soft])
    if grad is None:
        return hard + soft, parts, student.new_empty(0)
    return hard + soft, parts, grad.add_(hard_grad).to(student.dtype)


def _correlations(
    student: Tensor,
    teacher: Tensor,
    keep: Tensor | None,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    rows, classes = student.shape
    q, p = (torch.softmax(x / temperature, 1) for x in (student, teacher))
    if keep is None:
        count: Tensor | int = rows
    else:
        # What is left out may hold anything: selected away, not multiplied by 0.
        count = keep.sum().clamp(min=1).to(q.dtype)
        q, p = (torch.where(keep[:, None], x, 0) for x in (q, p))

    def centred(dim: int) -> tuple[Tensor, Tensor]:
        if dim == 1:  # probabilities: their mean is known
            found = [x - 1 / classes for x in (q, p)]
        else:
            found = [x - x.sum(0) / count for x in (q, p)]
        if keep is not None:
            found = [torch.where(keep[:, None], x, 0) for x in found]
        return found[0], found[1]

    loss = q.new_zeros(())
    slope = torch.zeros_like(q) if need_grad else None
    # The mean over rows, and over columns.
    for dim, weight, many in ((1, inter_weight, count), (0, intra_weight, classes)):
        if weight == 0:
            continue
        u, v = centred(dim)
        cross = (u * v).sum(dim, keepdim=True)
        a, b = u.norm(dim=dim, keepdim=True), v.norm(dim=dim, keepdim=True)
        norms = a * b + EPS
        correlation = cross / norms
        loss = loss + weight * (1 - correlation.sum() / many)
        if slope is not None:
            # d rho/du = v/norms - rho b/(a norms) u; without spread (a = 0) rho is 0 and stays.
            pull = torch.where(a > 0, correlation * b / (a * norms), 0)
            slope += weight / many * (pull * u - v / norms)
    if keep is not None:
        loss = torch.where(keep.any(), loss, 0)
    if slope is None:
        return loss, None
    return loss, (q * (slope - (q * slope).sum(1, keepdim=True))).div_(temperature)


class _DIST(torch.autograd.Function):
    """The gradient is made in the forward pass; backward scales it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.fastxkd.dist_loss.default(*arguments)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[2])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 11
        (grad,) = ctx.saved_tensors
        return (grad * upstream).to(grad.dtype), *(None,) * 10


def dist_parts(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    class_weight: Tensor | None,
    *factors: float,
) -> tuple[Tensor, Tensor]:
    """(loss, parts) of checked logits [rows, classes]; ``factors`` in the schema's order."""
    need_grad = student.requires_grad and torch.is_grad_enabled()
    operator = _DIST.apply if wants_function(student) else torch.ops.fastxkd.dist_loss.default
    loss, parts, _ = operator(student, teacher, labels, class_weight, *factors, need_grad)
    return loss, parts
