"""Losses on relations: not where the samples of a batch are, but how they lie to each other.

Of the features they need the Gram matrix or the distances, one product of size n x n x d for
each side going forward and one going back. That is their floor; what they do with the n x n
numbers is small beside it, and plain torch serves for it. The one exception is the angles of
:func:`rkd_loss`, n^3 of them, which are made and used a few megabytes at a time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxkd.losses.features import (
    Features,
    check_layers,
    check_pair,
    unit_rows,
)
from fastxkd.losses.logits import kd_loss
from fastxkd.metrics.similarity import inner_products
from fastxkd.ops._library import differentiable_once, exact_dtype, unobserved, wants_function
from fastxkd.ops.rkd import reciprocal, rkd

NAMES = ("student_features", "teacher_features")
KERNELS = ("gaussian", "bilinear")
PKT_EPS = 1e-7


def _check(student: Tensor, teacher: Tensor, least: int, what: str) -> None:
    check_pair(student, teacher)
    _check_rows(NAMES[0], student, least, what)


def _check_rows(name: str, tensor: Tensor, least: int, what: str) -> None:
    if tensor.shape[0] < least:
        raise ValueError(
            f"{name}: expected at least {least} samples, for {what}; got {tensor.shape[0]}"
            f" in {list(tensor.shape)}"
        )


def _check_number(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")


def _check_count(name: str, value: int, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


# --- Gram matrices: SP, CC, PKT


class _OnGram(torch.autograd.Function):
    """A loss of the two Gram matrices, with its slope in the student's, made going forward.

    Autograd would take some twenty calls for it, and send the gradient back through both factors of
    a product whose symmetry needs it once.
    """

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, kind: str, gamma: float, order: int
    ) -> tuple[Tensor, Tensor]:
        exact = exact_dtype(student, teacher)
        grams = [x @ x.T for x in (student.to(exact), teacher.to(exact))]
        if kind == "sp":
            loss, slope = _on_rows(*grams)
        elif kind == "bilinear":
            loss, slope = _mean_square(grams[0] - grams[1])
        else:
            (cosines, norms), (targets, _) = _cosines(grams[0]), _cosines(grams[1])
            if kind == "gaussian":
                loss, slope = _on_series(cosines, targets, gamma, order)
            else:
                loss, slope = _on_conditional(cosines, targets)
            slope = _through_cosines(slope, cosines, norms)
        return loss, slope + slope.T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], output[1])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 5
        student, slope = ctx.saved_tensors
        grad = (slope * upstream) @ student.to(slope.dtype)
        return grad.to(student.dtype), None, None, None, None


class _OnGramEager(torch.autograd.Function):
    """For plain eager calls: without ``setup_context``, whose use makes torch inspect a signature
    at every call, which is a tenth of a small batch's time."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:  # type: ignore[override]
        loss, slope = _OnGram.forward(*arguments)
        ctx.save_for_backward(arguments[0], slope)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        return _OnGram.backward(ctx, upstream)


def _on_gram(
    student: Tensor, teacher: Tensor, kind: str, gamma: float = 0.0, order: int = 0
) -> Tensor:
    _check(student, teacher, 2, "relations between them")
    student, teacher = (x.reshape(x.shape[0], -1) for x in (student, teacher))
    arguments = (student, teacher, kind, gamma, order)
    loss: Tensor
    # Autocast would round the Gram matrices to 16 bits, below what relations differ by.
    with torch.autocast(student.device.type, enabled=False):
        if not wants_function(student):
            loss, _ = _OnGram.forward(*arguments)
        elif unobserved(student):
            loss = _OnGramEager.apply(*arguments)
        else:
            loss, _ = _OnGram.apply(*arguments)
    return loss


def _mean_square(error: Tensor) -> tuple[Tensor, Tensor]:
    return error.square().mean(), error * (2 / error.numel())


def _on_rows(gram: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1: of a slope only what is across the row is left."""
    inverses, targets = (
        reciprocal(torch.linalg.vector_norm(g, dim=1, keepdim=True)) for g in (gram, target)
    )
    rows = gram * inverses
    loss, slope = _mean_square(rows - target * targets)
    along = (slope * rows).sum(1, keepdim=True)
    return loss, (slope - along * rows) * inverses


def _cosines(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines, and the products of norms that they were divided by, 1 for 0.

    From the Gram matrix: the features themselves are read by its product alone. Divided by the
    product of two norms, not by one after the other: features of width 1 are then at 1 and -1
    exactly. Rounding may not leave that range: pkt_loss takes the logarithm of what is left to -1.
    """
    norms = gram.diagonal().sqrt()
    products = torch.outer(norms, norms)
    products.masked_fill_(products == 0, 1)
    return (gram / products).clamp_(-1, 1), products


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
    slope = teacher.div_(shifted).mul_(-1 / teacher.numel())
    common = (slope * student).sum(1, keepdim=True)
    return loss, slope.sub_(common).div_(2 * sums)


def _conditional(cosines: Tensor) -> tuple[Tensor, Tensor]:
    kernel = (cosines + 1).div_(2)
    sums = kernel.sum(1, keepdim=True)
    return kernel / sums, sums


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

    or ``kernel="bilinear"``, :math:`K_{ij} = f_i \cdot f_j` of the features as they are. Widths may
    differ. The factor is open: the 0.02 that is often quoted belongs to another term, the mean
    product of neighbouring rows' differences.

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
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}")
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma: expected a finite number above 0, got {gamma}")
    _check_count("order", order)
    return _on_gram(student_features, teacher_features, kernel, float(gamma), order)


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
    pass: memory grows with n^2 and n d. Samples nearer than 1e-6 count as that far apart, and equal
    ones have no direction: cosine 0, gradient 0.

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
    _check_number("distance_weight", distance_weight)
    _check_number("angle_weight", angle_weight)
    least, what = (3, "an angle between three") if angle_weight else (2, "a distance between two")
    _check(student_features, teacher_features, least, what)
    arguments = (student_features, teacher_features, float(distance_weight), float(angle_weight))
    return rkd(*arguments)


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
    students, teachers = check_layers(student_features, teacher_features, NAMES)
    losses = []
    for index, pair in enumerate(zip(students, teachers, strict=True)):
        single = isinstance(student_features, Tensor)
        names = [name if single else f"{name}[{index}]" for name in NAMES]
        check_pair(*pair, (names[0], names[1]))
        _check_rows(names[0], pair[0], 4, "a correlation of distances")
        exact = exact_dtype(*pair)
        rows = [x.reshape(x.shape[0], -1) for x in pair]
        if normalize_rows:
            rows = [unit_rows(x.to(exact)) for x in rows]
        found = inner_products(rows, names, unbiased=False).correlation(0, 1)
        losses.append((1 - found).to(exact_dtype(*students, *teachers)))
    return torch.stack(losses).mean()


# --- CKD


def _picks(
    n: int, count: int, size: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """``[count, size]`` indices below n, different within a row, each such row equally likely."""
    source = device if generator is None else generator.device
    drawn: list[Tensor] = []
    for k in range(size):
        pick = torch.randint(n - k, (count,), generator=generator, device=source)
        # A number below n - k names one of those left: step over the smaller ones already drawn.
        if drawn:
            for taken in torch.stack(drawn).sort(0).values:
                pick = pick + (pick >= taken).long()
        drawn.append(pick)
    return torch.stack(drawn, 1).to(device)


def _differences(values: Tensor, picks: Tensor, positives: int) -> Tensor:
    """Mean of the picked positives minus mean of the negatives, ``[relations, classes]``."""
    weights = [1 / positives] * positives
    weights += [-1 / (picks.shape[1] - positives)] * (picks.shape[1] - positives)
    total = values.new_zeros(())
    for pick, weight in zip(picks.unbind(1), weights, strict=True):
        total = total + weight * values.index_select(0, pick)
    return total


def ckd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    relations: int | None = None,
    positives: int = 2,
    negatives: int = 1,
    temperature: float = 4.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Comparative knowledge distillation: differences of logits between groups of samples.

    .. math::
        d(z) = \mathrm{mean}_{i \in P}\, z_i - \mathrm{mean}_{i \in N}\, z_i, \quad
        L = T^2\, KL\big(\sigma(d(z_t)/T) \,\|\, \sigma(d(z_s)/T)\big)

    averaged over relations (P, N) drawn at random from the batch. With labels the same between the
    difference of one-hot labels and :math:`d(z_s)` is added. The teacher answers once per sample
    for any number of relations, so its logits may come from a cache. Usual factor: 1.

    Args:
        student_logits: ``[n, classes]``, any float dtype.
        teacher_logits: the same shape, any float dtype, without gradient.
        labels: int64 class indices ``[n]``.
        relations: how many to draw; as many as rows by default.
        positives, negatives: samples in P and in N, all of a relation different: n must hold them.
        temperature: T, above 0.
        generator: draws the relations; torch's default one otherwise.

    Returns:
        A scalar, float64 if one side is float64, else float32.

    Raises:
        ValueError, TypeError: shapes, dtypes, labels or options that do not fit, too few samples, a
            teacher that requires grad.
        RuntimeError: a second backward through the same loss, as with :func:`kd_loss`.

    Wilf et al. 2023, Comparative Knowledge Distillation.

    >>> import torch
    >>> student, teacher = torch.eye(4), 3 * torch.eye(4)
    >>> draw = torch.Generator().manual_seed(0)
    >>> round(ckd_loss(student, teacher, relations=1000, generator=draw).item(), 1)
    0.5
    """
    names = ("student_logits", "teacher_logits")
    check_pair(student_logits, teacher_logits, names)
    if student_logits.dim() != 2:
        raise ValueError(
            f"student_logits: expected [n, classes], got shape {list(student_logits.shape)}"
        )
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher_logits: expected the shape of student_logits {list(student_logits.shape)},"
            f" got {list(teacher_logits.shape)}"
        )
    n, classes = student_logits.shape
    count = n if relations is None else relations
    _check_count("relations", count)
    _check_count("positives", positives)
    _check_count("negatives", negatives)
    _check_rows(names[0], student_logits, positives + negatives, "the groups of a relation")
    if labels is not None:
        _check_labels(labels, student_logits)
    exact = exact_dtype(student_logits, teacher_logits)
    picks = _picks(n, count, positives + negatives, generator, student_logits.device)
    student, teacher = (
        _differences(z.to(exact), picks, positives) for z in (student_logits, teacher_logits)
    )
    loss = _kl(student, teacher, temperature)
    if labels is not None:
        one_hot = F.one_hot(labels, classes).to(exact)
        loss = loss + _kl(student, _differences(one_hot, picks, positives), temperature)
    return loss


def _kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    loss = kd_loss(student, teacher, temperature=temperature, ce_weight=0.0, kd_weight=1.0)
    assert isinstance(loss, Tensor)
    return loss


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a Tensor or None, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected torch.int64 class indices, got {labels.dtype}")
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels: expected {list(logits.shape[:1])} to match student_logits"
            f" {list(logits.shape)}, got {list(labels.shape)}"
        )
    # A compiler cannot look at values; one_hot then complains in its own words.
    if not torch.compiler.is_compiling():
        low, high = (int(x) for x in labels.aminmax())
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(
                f"labels: expected classes from 0 to {logits.shape[1] - 1},"
                f" got {low if low < 0 else high}"
            )


# --- modules


class SPLoss(nn.Module):
    """:func:`sp_loss` as a module: ``criterion(student_features, teacher_features)``.

    >>> import torch
    >>> x = torch.randn(8, 4)
    >>> SPLoss()(x, x).item()
    0.0
    """

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        return sp_loss(student_features, teacher_features)


class CCLoss(nn.Module):
    """:func:`cc_loss` as a module: ``criterion(student_features, teacher_features)``.

    >>> import torch
    >>> x = torch.randn(8, 4)
    >>> CCLoss(kernel="bilinear")(x, x).item()
    0.0
    """

    def __init__(self, *, kernel: str = "gaussian", gamma: float = 0.4, order: int = 2) -> None:
        super().__init__()
        self.kernel = kernel
        self.gamma = gamma
        self.order = order

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        return cc_loss(
            student_features,
            teacher_features,
            kernel=self.kernel,
            gamma=self.gamma,
            order=self.order,
        )

    def extra_repr(self) -> str:
        return f"kernel={self.kernel!r}, gamma={self.gamma}, order={self.order}"


class PKTLoss(nn.Module):
    """:func:`pkt_loss` as a module: ``criterion(student_features, teacher_features)``.

    >>> import torch
    >>> x = torch.randn(8, 4)
    >>> PKTLoss()(x, x).item()
    0.0
    """

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        return pkt_loss(student_features, teacher_features)


class RKDLoss(nn.Module):
    """:func:`rkd_loss` as a module: ``criterion(student_features, teacher_features)``.

    >>> import torch
    >>> x = torch.randn(8, 4)
    >>> RKDLoss(angle_weight=0)(x, x).item()
    0.0
    """

    def __init__(self, *, distance_weight: float = 25.0, angle_weight: float = 50.0) -> None:
        super().__init__()
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        return rkd_loss(
            student_features,
            teacher_features,
            distance_weight=self.distance_weight,
            angle_weight=self.angle_weight,
        )

    def extra_repr(self) -> str:
        return f"distance_weight={self.distance_weight}, angle_weight={self.angle_weight}"


class DCLoss(nn.Module):
    """:func:`dc_loss` as a module: ``criterion(student_features, teacher_features)``.

    >>> import torch
    >>> x = torch.randn(8, 4)
    >>> round(DCLoss()(x, x).item(), 5)
    0.0
    """

    def __init__(self, *, normalize_rows: bool = True) -> None:
        super().__init__()
        self.normalize_rows = normalize_rows

    def forward(self, student_features: Features, teacher_features: Features) -> Tensor:
        return dc_loss(student_features, teacher_features, normalize_rows=self.normalize_rows)

    def extra_repr(self) -> str:
        return f"normalize_rows={self.normalize_rows}"


class CKDLoss(nn.Module):
    """:func:`ckd_loss` as a module: ``criterion(student_logits, teacher_logits, labels)``.

    >>> import torch
    >>> z = torch.randn(8, 4)
    >>> round(CKDLoss(relations=100)(z, z).item(), 5)
    0.0
    """

    def __init__(
        self,
        *,
        relations: int | None = None,
        positives: int = 2,
        negatives: int = 1,
        temperature: float = 4.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.relations = relations
        self.positives = positives
        self.negatives = negatives
        self.temperature = temperature
        self.generator = generator

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        return ckd_loss(
            student_logits,
            teacher_logits,
            labels,
            relations=self.relations,
            positives=self.positives,
            negatives=self.negatives,
            temperature=self.temperature,
            generator=self.generator,
        )

    def extra_repr(self) -> str:
        return (
            f"relations={self.relations}, positives={self.positives},"
            f" negatives={self.negatives}, temperature={self.temperature}"
        )
