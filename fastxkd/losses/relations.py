"""Losses on relations: not where the samples of a batch are, but how far from each other.

Of the features they need the distances, one product of size n x n x d for each side going forward
and one going back. The angles of :func:`rkd_loss`, n^3 of them, are made and used a few megabytes
at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxkd.losses._criterion import Criterion
from fastxkd.metrics.similarity import inner_products
from fastxkd.ops._checks import (
    NAMES,
    Features,
    check_factors,
    check_flags,
    check_layers,
    check_pair,
    check_rows,
)
from fastxkd.ops._library import differentiable_once, exact_dtype, transformed
from fastxkd.ops._rows import power_of_two, unit_rows
from fastxkd.ops._transforms import one_by_one
from fastxkd.ops.rkd import rkd

__all__ = ["DCLoss", "RKDLoss", "dc_loss", "rkd_loss"]

# --- RKD


def rkd_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
) -> Tensor:
    r"""Relational knowledge distillation: distances between samples and angles of three.

    .. math::
        L = w_d\, \mathrm{mean}_{ij}\, \ell\!\left(\frac{d^s_{ij}}{\bar d^s},
        \frac{d^t_{ij}}{\bar d^t}\right)
        + w_a\, \mathrm{mean}_{ijk}\, \ell\!\left(\cos\angle^s_{ijk}, \cos\angle^t_{ijk}\right)

    with :math:`\ell` the smooth L1 loss (of threshold 1), :math:`\bar d` the mean distance of
    different samples, and angles at j between i and k. Means are over all n^2 pairs and n^3
    triples, as in the published code. Widths may differ. Usual factor: 1.

    Angles come from distances by the law of cosines and the gradient from theirs, in the forward
    pass: memory grows with n^2 and n d. In the distances, samples nearer than 1e-6 count as that
    far apart, the published eps; angles do not depend on the size of the features. Samples
    nearer than 1e-9 of the largest feature have no direction: cosine 0, gradient 0.

    Args:
        student_features: ``[n, ...]``, n >= 3 (2 without angles), flattened per sample; any float
            dtype.
        teacher_features: the same n, without gradient.
        distance_weight, angle_weight: at least 0; a part of weight 0 is not computed.

    Returns:
        A scalar, float64 if one feature is float64, else float32. Differentiable once.

    Raises:
        ValueError, TypeError: shapes, dtypes or weights that do not fit, too few samples, a teacher
            that requires grad.

    Park et al. 2019, Relational Knowledge Distillation.

    >>> import torch
    >>> x = torch.tensor([[0.0, 0], [1, 0], [0, 1]])
    >>> round(rkd_loss(x, torch.tensor([[0.0], [1], [2]])).item(), 4)
    8.274
    """
    check_factors(distance_weight=distance_weight, angle_weight=angle_weight)
    least, what = (3, "an angle between three") if angle_weight else (2, "a distance between two")
    check_pair(student_features, teacher_features)
    check_rows(NAMES[0], student_features, least, what)
    arguments = (student_features, teacher_features, float(distance_weight), float(angle_weight))
    return rkd(*arguments)


class RKDLoss(Criterion):
    """:func:`rkd_loss` as a module: ``criterion(student_features, teacher_features)``.

    >>> import torch
    >>> x = torch.randn(8, 4)
    >>> RKDLoss(angle_weight=0)(x, x).item()
    0.0
    """

    def __init__(self, *, distance_weight: float = 25.0, angle_weight: float = 50.0) -> None:
        check_factors(distance_weight=distance_weight, angle_weight=angle_weight)
        super().__init__(distance_weight=distance_weight, angle_weight=angle_weight)

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        return rkd_loss(student_features, teacher_features, **self.options())


# --- distance correlation


def dc_loss(
    student_features: Features, teacher_features: Features, *, normalize_rows: bool = True
) -> Tensor:
    r"""Distance correlation as a loss: what of the teacher's distances the student's do not tell.

    .. math:: L = \mathrm{mean}_{layers}\, (1 - R^2(F_s, F_t))

    with :math:`R^2` the squared distance correlation of the doubly centred distances, as in
    ``fastxkd.distance_correlation(..., unbiased=False)``. Widths may differ. Usual factor: 1.

    Args:
        student_features: ``[n, ...]``, n >= 4, flattened per sample, or a list of layers; any float
            dtype. The estimate is biased upwards for few samples: batches of 32 or more.
        teacher_features: the same n, without gradient, or as many layers.
        normalize_rows: give each sample's features length 1 first.

    Returns:
        A scalar in [0, 1], float64 if a feature is float64, else float32; 1 for a layer that is
        constant. Differentiable once; memory beyond the features does not grow with ``n^2``.

    Raises:
        ValueError, TypeError: shapes, dtypes or lengths that do not fit, too few samples, a teacher
            that requires grad.

    Székely, Rizzo and Bakirov 2007, Measuring and Testing Dependence by Correlation of Distances;
    as a training loss: Zhen et al. 2022, On the Versatile Uses of Partial Distance Correlation in
    Deep Learning.

    >>> import torch
    >>> x = torch.tensor([[0.0, 0], [1, 0], [0, 2], [3, 1], [2, 2], [4, -1]])
    >>> y = torch.tensor([[1.0], [0], [2], [5], [3], [4]])
    >>> round(dc_loss(x, y, normalize_rows=False).item(), 4)
    0.2236
    >>> round(dc_loss([x, x], [x, y], normalize_rows=False).item(), 4)
    0.1118
    """
    check_flags(normalize_rows=normalize_rows)
    losses = []
    for names, student, teacher in check_layers(student_features, teacher_features):
        check_pair(student, teacher, names)
        check_rows(names[0], student, 4, "a correlation of distances")
        if transformed():
            loss, _ = _Transformed.apply(student, teacher, normalize_rows)
        else:
            loss = _layer(student, teacher, normalize_rows)
        losses.append(loss)
    exact = exact_dtype(*losses)
    return torch.stack([x.to(exact) for x in losses]).mean()


def _layer(student: Tensor, teacher: Tensor, normalize_rows: bool) -> Tensor:
    exact = exact_dtype(student, teacher)
    rows = [x.reshape(x.shape[0], -1).to(exact) for x in (student, teacher)]
    # The correlation does not see the size of all distances together.
    rows = [unit_rows(x) if normalize_rows else x * power_of_two(x, (0, 1)) for x in rows]
    found = inner_products(rows, list(NAMES), unbiased=False).correlation(0, 1)
    return (1 - found).to(exact)


class _Transformed(torch.autograd.Function):
    """:func:`_layer` for ``torch.func``: the operator below it takes lists, which have no rule."""

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, normalize_rows: bool) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = student.detach().requires_grad_(True)
            loss = _layer(leaf, teacher.detach(), normalize_rows)
            (grad,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None
        (grad,) = ctx.saved_tensors
        return (grad * upstream).to(grad.dtype), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return one_by_one(_Transformed, info, in_dims, *arguments)


class DCLoss(Criterion):
    """:func:`dc_loss` as a module: ``criterion(student_features, teacher_features)``.

    >>> import torch
    >>> x = torch.randn(8, 4)
    >>> round(DCLoss()(x, x).item(), 5)
    0.0
    """

    def __init__(self, *, normalize_rows: bool = True) -> None:
        check_flags(normalize_rows=normalize_rows)
        super().__init__(normalize_rows=normalize_rows)

    def forward(self, student_features: Features, teacher_features: Features) -> Tensor:
        return dc_loss(student_features, teacher_features, **self.options())
