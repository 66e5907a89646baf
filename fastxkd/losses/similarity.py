"""Losses on similarities of samples, all of them functions of the Gram matrix: SP, CC, PKT.

One product of size n x n x d for each side going forward and one going back: that is their floor;
what they do with the n x n numbers is small beside it, and plain torch serves for it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastxkd.losses._blocks import without_autocast
from fastxkd.losses._criterion import Criterion
from fastxkd.ops._checks import (
    NAMES,
    check_choice,
    check_counts,
    check_pair,
    check_positive,
    check_rows,
)
from fastxkd.ops._library import differentiable_once, exact_dtype, unobserved, wants_function
from fastxkd.ops._rows import at_hand, ordinary, power_of_two, reciprocal

__all__ = ["CCLoss", "PKTLoss", "SPLoss", "cc_loss", "pkt_loss", "sp_loss"]

KERNELS = ("gaussian", "bilinear")
PKT_EPS = 1e-7


# --- what is made of the Gram matrix, and its slope


class _OnGram(torch.autograd.Function):
    """A loss of the two Gram matrices, with its slope in the student's, made going forward.

    Autograd would take some twenty calls for it, and send the gradient back through both factors of
    a product whose symmetry needs it once. Features whose squares would vanish or overflow are
    multiplied by a power of two for each row first, which cosines do not see.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, kind: str, gamma: float, order: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = exact_dtype(student, teacher)
        rows = [student.to(exact), teacher.to(exact)]
        grams, scales = _grams(rows, kind)
        if kind == "sp":
            loss, slope = _on_rows(*grams, *scales)
        elif kind == "bilinear":
            loss, slope = _mean_square(grams[0] - grams[1])
        else:
            (cosines, norms), (targets, _) = _cosines(grams[0]), _cosines(grams[1])
            if kind == "gaussian":
                loss, slope = _on_series(cosines, targets, gamma, order)
            else:
                loss, slope = _on_conditional(cosines, targets)
            slope = _through_cosines(slope, cosines, norms)
        return loss, slope + slope.T, scales[0]

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], *output[1:])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 5
        student, slope, scale = ctx.saved_tensors
        rows = student.to(slope.dtype)
        with without_autocast(student):
            grad = (slope * (upstream * scale)) @ (rows * scale if scale.dim() else rows)
        return grad.to(student.dtype), None, None, None, None


class _OnGramEager(torch.autograd.Function):
    """For plain eager calls: without ``setup_context``, whose use makes torch inspect a signature
    at every call, which is a tenth of a small batch's time."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:  # type: ignore[override]
        loss, slope, scale = _OnGram.forward(*arguments)
        ctx.save_for_backward(arguments[0], slope, scale)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        return _OnGram.backward(ctx, upstream)


def _on_gram(
    student: Tensor, teacher: Tensor, kind: str, gamma: float = 0.0, order: int = 0
) -> Tensor:
    check_pair(student, teacher)
    check_rows(NAMES[0], student, 2, "relations between them")
    student, teacher = (x.reshape(x.shape[0], -1) for x in (student, teacher))
    arguments = (student, teacher, kind, gamma, order)
    loss: Tensor
    # Autocast would round the Gram matrices to 16 bits, below what relations differ by.
    with without_autocast(student):
        if not wants_function(student):
            loss, *_ = _OnGram.forward(*arguments)
        elif unobserved(student):
            loss = _OnGramEager.apply(*arguments)
        else:
            loss, *_ = _OnGram.apply(*arguments)
    return loss


def _grams(rows: list[Tensor], kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """Both Gram matrices, and what the rows were multiplied by: ``[n, 1]``, or 1 for all."""
    if kind == "bilinear" or at_hand(rows[0]):  # the bilinear kernel is not free of scale
        grams = [x @ x.T for x in rows]
        if kind == "bilinear" or all(ordinary(gram.diagonal()) for gram in grams):
            return grams, [x.new_ones(()) for x in rows]
    scales = [power_of_two(x) for x in rows]
    rows = [x * scale for x, scale in zip(rows, scales, strict=True)]
    return [x @ x.T for x in rows], scales


def _mean_square(error: Tensor) -> tuple[Tensor, Tensor]:
    return error.square().mean(), error * (2 / error.numel())


def _on_rows(
    gram: Tensor, target: Tensor, scale: Tensor, target_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows of length 1: of a slope only what is across the row is left.

    A row does not depend on the scale of its own sample, but its columns do on theirs: they get
    back what the samples differ by.
    """
    (rows, inverses), (targets, _) = _unit_rows(gram, scale), _unit_rows(target, target_scale)
    loss, slope = _mean_square(rows - targets)
    along = (slope * rows).sum(1, keepdim=True)
    return loss, (slope - along * rows) * inverses


def _unit_rows(gram: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1, and each number's factor in them."""
    if scale.dim() == 0:
        inverse = reciprocal(torch.linalg.vector_norm(gram, dim=1, keepdim=True))
        return gram * inverse, inverse
    columns = (scale.amin() / scale).T
    rows = gram * columns
    again = power_of_two(rows)
    rows = rows * again
    inverse = reciprocal(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
    return rows * inverse, (again * inverse) * columns


def _cosines(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines, and the products of norms that they were divided by, infinity for 0.

    From the Gram matrix: the features themselves are read by its product alone. Divided by the
    product of two norms, not by one after the other: features of width 1 are then at 1 and -1
    exactly. Rounding may not leave that range: pkt_loss takes the logarithm of what is left to -1.
    """
    norms = gram.diagonal().sqrt()
    products = norms[:, None] * norms
    products.masked_fill_(products == 0, math.inf)
    return (gram / products).clamp(-1, 1), products


def _through_cosines(slope: Tensor, cosines: Tensor, products: Tensor) -> Tensor:
    """The slope in the Gram matrix, whose diagonal holds the squared norms."""
    weighted = slope * cosines
    squares = products.diagonal()
    slope = slope / products
    slope.diagonal().sub_((weighted.sum(0) + weighted.sum(1)) / (2 * squares))
    return slope


def _on_series(cosines: Tensor, targets: Tensor, gamma: float, order: int) -> tuple[Tensor, Tensor]:
    # Horner, without the constant term: it drops out of the difference.
    factors = [
        math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(order + 1)
    ]
    kernels = []
    for x in (cosines, targets):
        series = x * factors[order]
        for factor in reversed(factors[1:order]):
            series.add_(factor).mul_(x)
        kernels.append(series)
    derivative = torch.full_like(cosines, order * factors[order])
    for p in reversed(range(1, order)):
        derivative.mul_(cosines).add_(p * factors[p])
    loss, slope = _mean_square(kernels[0] - kernels[1])
    return loss, slope * derivative


def _on_conditional(cosines: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    (student, sums), (teacher, _) = _conditional(cosines), _conditional(targets)
    shifted = student + PKT_EPS
    loss = (teacher * ((teacher + PKT_EPS) / shifted).log_()).mean()
    slope = (teacher / shifted).mul_(-1 / teacher.numel())
    common = (slope * student).sum(1, keepdim=True)
    return loss, (slope - common).div_(2 * sums)


def _conditional(cosines: Tensor) -> tuple[Tensor, Tensor]:
    kernel = (cosines + 1).div_(2)
    sums = kernel.sum(1, keepdim=True)
    return kernel / sums, sums


# --- the losses


def sp_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Similarity-preserving distillation: the rows of the batch's Gram matrix.

    .. math::
        L = \frac{1}{n^2} \left\| \hat G_s - \hat G_t \right\|_F^2, \quad
        \hat G = \text{rows of } F F^T \text{ with length } 1

    Widths may differ. Usual factor: 3000.

    Args:
        student_features: ``[n, ...]``, n >= 2, flattened per sample; any float dtype.
        teacher_features: the same n, without gradient.

    Returns:
        A scalar, float64 if one feature is float64, else float32. Differentiable once.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, too few samples, a teacher that
            requires grad.

    Tung and Mori 2019, Similarity-Preserving Knowledge Distillation.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> round(sp_loss(x, torch.tensor([[1.0], [1.0]])).item(), 4)
    0.2929
    """
    return _on_gram(student_features, teacher_features, "sp")


def cc_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    kernel: str = "gaussian",
    gamma: float = 0.4,
    order: int = 2,
) -> Tensor:
    r"""Correlation congruence: the difference of two kernel matrices.

    .. math:: L = \frac{1}{n^2} \| K_s - K_t \|_F^2

    with the Taylor series of a Gaussian kernel of features of length 1,

    .. math:: K_{ij} = e^{-2 \gamma} \sum_{p = 0}^{P} \frac{(2 \gamma)^p}{p!} \cos(f_i, f_j)^p

    or ``kernel="bilinear"``, :math:`K_{ij} = f_i \cdot f_j` of the features as they are: this loss
    grows with their fourth power, and overflows float32 at about 1e9. Widths may differ. The factor
    is open: the 0.02 that is often quoted belongs to another term, the mean product of neighbouring
    rows' differences.

    Args:
        student_features: ``[n, ...]``, n >= 2, flattened per sample; any float dtype.
        teacher_features: the same n, without gradient.
        kernel: ``"gaussian"`` or ``"bilinear"``.
        gamma: of the Gaussian kernel, above 0.
        order: P, the last term of its series.

    Returns:
        A scalar, float64 if one feature is float64, else float32. Differentiable once.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit, too few samples, a teacher
            that requires grad.

    Peng et al. 2019, Correlation Congruence for Knowledge Distillation.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> round(cc_loss(x, torch.tensor([[1.0], [1.0]]), kernel="bilinear").item(), 4)
    0.5
    """
    _check_kernel(kernel, gamma, order)
    return _on_gram(student_features, teacher_features, kernel, float(gamma), order)


def _check_kernel(kernel: str, gamma: float, order: int) -> None:
    check_choice("kernel", kernel, KERNELS)
    check_positive(gamma=gamma)
    check_counts(order=order)


def pkt_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Probabilistic knowledge transfer: neighbours as conditional probabilities.

    .. math::
        L = \frac{1}{n^2} \sum_{ij} p^t_{ij} \log \frac{p^t_{ij} + \epsilon}{p^s_{ij} + \epsilon},
        \quad p_{ij} = \frac{k_{ij}}{\sum_k k_{ik}}, \quad k_{ij} = \frac{1 + \cos(f_i, f_j)}{2}

    with eps = 1e-7: the cosine kernel, rows that sum to 1, and the mean over all pairs as in the
    published code. Widths may differ. Usual factor: 30000.

    Args:
        student_features: ``[n, ...]``, n >= 2, flattened per sample; any float dtype.
        teacher_features: the same n, without gradient.

    Returns:
        A scalar, float64 if one feature is float64, else float32. Differentiable once.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, too few samples, a teacher that
            requires grad.

    Passalis and Tefas 2018, Learning Deep Representations with Probabilistic Knowledge Transfer.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> round(pkt_loss(x, torch.tensor([[1.0], [1.0]])).item(), 4)
    0.0294
    """
    return _on_gram(student_features, teacher_features, "pkt")


class SPLoss(Criterion):
    """:func:`sp_loss` as a module: ``criterion(student_features, teacher_features)``.

    >>> import torch
    >>> x = torch.randn(8, 4)
    >>> SPLoss()(x, x).item()
    0.0
    """

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        return sp_loss(student_features, teacher_features)


class CCLoss(Criterion):
    """:func:`cc_loss` as a module: ``criterion(student_features, teacher_features)``.

    >>> import torch
    >>> x = torch.randn(8, 4)
    >>> CCLoss(kernel="bilinear")(x, x).item()
    0.0
    """

    def __init__(self, *, kernel: str = "gaussian", gamma: float = 0.4, order: int = 2) -> None:
        _check_kernel(kernel, gamma, order)
        super().__init__(kernel=kernel, gamma=gamma, order=order)

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        return cc_loss(student_features, teacher_features, **self.options())


class PKTLoss(Criterion):
    """:func:`pkt_loss` as a module: ``criterion(student_features, teacher_features)``.

    >>> import torch
    >>> x = torch.randn(8, 4)
    >>> PKTLoss()(x, x).item()
    0.0
    """

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        return pkt_loss(student_features, teacher_features)
