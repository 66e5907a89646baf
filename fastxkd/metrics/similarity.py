"""Distance correlation, partial distance correlation, and the FSS and RS scores made of them.

Everything here is arithmetic on the few numbers that one sweep over pairs yields
(``ops.distance``). With plain distance matrices a, b and row sums ``a_i.``, the inner product of
the U-centred matrices needs no centred matrix:

    <A, B> = [sum_{i != j} a_ij b_ij - 2/(n-2) sum_i a_i. b_i. + a.. b.. / ((n-1)(n-2))] / (n(n-3))

and that of the doubly centred ones:

    <A, B> = sum a_ij b_ij / n^2 - 2 sum_i a_i. b_i. / n^3 + a.. b.. / n^4
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastxkd.ops.distance import distance_sums


class InnerProducts(NamedTuple):
    """K x K inner products of centred distance matrices, and what of them is rounding."""

    values: Tensor
    noise: Tensor  # [K]: a squared norm that rounding of the distances alone may reach

    def correlation(self, k: int, l: int) -> Tensor:  # noqa: E741
        v = self.values
        return _ratio(v[k, l], v[k, k], v[l, l], self._constant(k) | self._constant(l))

    def semi_partial(self, k: int, l: int, g: int) -> Tensor:  # noqa: E741
        """P_DC(k | l; g): correlation of what of k is orthogonal to l, with g as it is."""
        v = self.values
        a = torch.where(self._constant(l), 0, v[k, l] / v[l, l].where(~self._constant(l), 1))
        rest = v[k, k] - 2 * a * v[k, l] + a * a * v[l, l]
        # Nothing of k is left beside l: the remainder is rounding.
        gone = self._constant(k) | self._constant(g) | (rest <= 1e-10 * v[k, k] + self.noise[k])
        return _ratio(v[k, g] - a * v[l, g], rest, v[g, g], gone)

    def _constant(self, k: int) -> Tensor:
        return self.values[k, k] <= self.noise[k]


def _ratio(cross: Tensor, first: Tensor, second: Tensor, undefined: Tensor) -> Tensor:
    product = (first * second).where(~undefined, 1)
    # Cauchy and Schwarz bound it; rounding does not know.
    return torch.where(undefined, 0, cross / product.sqrt()).clamp(-1, 1)


def inner_products(features: list[Tensor], names: list[str], *, unbiased: bool) -> InnerProducts:
    return centre(*distance_sums(features, names), _result_dtype(*features), unbiased=unbiased)


def centre(
    products: Tensor, row_sums: Tensor, dtype: torch.dtype, *, unbiased: bool
) -> InnerProducts:
    """Inner products of distances that were computed in ``dtype``."""
    n = row_sums.shape[1]
    totals = row_sums.sum(1)
    rows, total = row_sums @ row_sums.T, torch.outer(totals, totals)
    if unbiased:
        values = products - 2 / (n - 2) * rows + total / ((n - 1) * (n - 2))
        values = values / (n * (n - 3))
    else:
        values = products / n**2 - 2 * rows / n**3 + total / n**4
    # Rounded distances leave the square of their rounding, float64 sums their own.
    relative = max((64 * torch.finfo(dtype).eps) ** 2, 64 * torch.finfo(torch.float64).eps)
    return InnerProducts(values, relative * products.diagonal() / n**2)


def _result_dtype(*features: Tensor) -> torch.dtype:
    wide = any(f.dtype == torch.float64 for f in features)
    return torch.float64 if wide else torch.float32


def distance_correlation(x: Tensor, y: Tensor, *, unbiased: bool = True) -> Tensor:
    r"""Squared distance correlation of two sets of features of the same ``n`` samples.

    .. math:: R^{*2} = \langle A, B\rangle / \sqrt{\langle A, A\rangle \langle B, B\rangle}

    with A, B the U-centred distance matrices (Székely and Rizzo 2014), or the doubly centred ones
    for ``unbiased=False``. Equals ``dcor.u_distance_correlation_sqr`` and
    ``dcor.distance_correlation_sqr``.

    Args:
        x, y: ``[n, ...]``, n >= 4, flattened per sample; float32, float64, bfloat16 or float16.
            Dimensions need not agree.
        unbiased: in [-1, 1] around 0 for independent features; otherwise in [0, 1], and biased
            upwards for few samples of many dimensions.

    Returns:
        A scalar, float64 for float64 features, else float32; 0 where a feature is constant.
        Differentiable; memory beyond the features does not grow with ``n^2``.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, fewer than 4 samples.

    >>> import torch
    >>> x = torch.tensor([[0., 0], [1, 0], [0, 2], [3, 1], [2, 2], [4, -1]])
    >>> y = torch.tensor([[1.], [0], [2], [5], [3], [4]])
    >>> round(distance_correlation(x, y).item(), 4)
    0.8315
    """
    products = inner_products([x, y], ["x", "y"], unbiased=unbiased)
    return products.correlation(0, 1).to(_result_dtype(x, y))


def partial_distance_correlation(
    x: Tensor, y: Tensor, *, given: Tensor, semi_partial: bool = False
) -> Tensor:
    r"""Distance correlation of ``x`` and ``y`` with what ``given`` explains taken out.

    With U-centred matrices and :math:`A' = A - \langle A,C\rangle/\langle C,C\rangle\, C`,

    .. math:: pdcor(x, y; given) = \langle A', B'\rangle / (|A'| |B'|)

    (Székely and Rizzo 2014; ``dcor.partial_distance_correlation``). With ``semi_partial=True`` only
    ``x`` is projected, :math:`P_{DC}(x|given; y) = \langle A', B\rangle / (|A'| |B|)`: the score of
    UniCAM (Adhane et al. 2025), where x is the student, given the base and y the labels.

    Args:
        x, y, given: ``[n, ...]``, n >= 4, of any float dtype.

    Returns:
        A scalar in [-1, 1]; 0 where ``x`` or ``y`` is constant or wholly explained by ``given``.
        Differentiable.

    >>> import torch
    >>> x = torch.tensor([[0., 0], [1, 0], [0, 2], [3, 1], [2, 2], [4, -1]])
    >>> y = torch.tensor([[1.], [0], [2], [5], [3], [4]])
    >>> labels = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1, 2, 2])).float()
    >>> round(partial_distance_correlation(x, labels, given=y).item(), 4)
    -0.4033
    >>> round(partial_distance_correlation(x, labels, given=y, semi_partial=True).item(), 4)
    -0.3786
    """
    found = inner_products([x, y, given], ["x", "y", "given"], unbiased=True)
    value = found.semi_partial(0, 2, 1)
    if not semi_partial:
        explained = found.correlation(1, 2)
        left = 1 - explained.square()
        gone = left <= 1e-10
        value = torch.where(gone, 0, value / left.where(~gone, 1).sqrt()).clamp(-1, 1)
    return value.to(_result_dtype(x, y, given))


def label_embeddings(targets: Tensor, *, name: str = "targets") -> Tensor:
    """Class indices ``[n]`` as one-hot vectors; embeddings ``[n, e]`` as they are.

    Classes are numbered by those present: distances between one-hot vectors do not depend on how
    many classes there are beside them.
    """
    if not isinstance(targets, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(targets).__name__}")
    if targets.is_floating_point():
        if targets.dim() < 2:
            raise ValueError(
                f"{name}: expected embeddings [n, e] or int64 class indices [n],"
                f" got {targets.dtype} {list(targets.shape)}"
            )
        return targets
    if targets.dim() != 1 or targets.dtype == torch.bool:
        raise ValueError(
            f"{name}: expected int64 class indices [n], got {targets.dtype} {list(targets.shape)}"
        )
    present, index = targets.unique(return_inverse=True)
    return F.one_hot(index, len(present)).float()


class LayerScores(NamedTuple):
    """FSS and RS of one layer. Scores of the teacher are None where no teacher was given."""

    layer: str
    fss: float  # student against base
    fss_teacher: float | None  # student against teacher
    rs_student: float
    rs_base: float
    rs_teacher: float | None
    rs_distilled: float  # P_DC(student | base; labels)
    rs_residual: float  # P_DC(base | student; labels)


def layer_scores(
    student: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    targets: Tensor,
    *,
    teacher: Mapping[str, Tensor] | None = None,
) -> list[LayerScores]:
    """FSS and RS of every layer of student, base and teacher, from one sweep over pairs.

    FSS is the (biased) distance correlation of two models' features; RS the U-centred one of
    features and labels; distilled and residual RS the semi-partial one of what student and base
    do not share (Adhane et al. 2025; for the choice of estimators see
    :class:`FeatureSimilarityScore`).

    Args:
        student, base, teacher: features ``[n, ...]`` by layer name. Layers pair up in order.
        targets: class indices ``[n]`` or embeddings ``[n, e]``.

    Raises:
        ValueError: a different number of layers, rows that do not match, n < 4.
    """
    sides = {"student": student, "base": base} | ({} if teacher is None else {"teacher": teacher})
    for name, side in sides.items():
        if len(side) != len(student):
            raise ValueError(
                f"{name}: expected {len(student)} layers to pair with the student's,"
                f" got {len(side)}: {', '.join(side)}"
            )
    features = [f for side in sides.values() for f in side.values()]
    names = [f"{name}[{layer!r}]" for name, side in sides.items() for layer in side]
    features.append(label_embeddings(targets))
    sums, dtype = distance_sums(features, [*names, "targets"]), _result_dtype(*features)
    biased, unbiased = (centre(*sums, dtype, unbiased=flag) for flag in (False, True))
    count, labels = len(student), len(features) - 1
    rows = []
    for i, layer in enumerate(student):
        s, b, t = i, count + i, 2 * count + i
        rows.append(
            LayerScores(
                layer,
                fss=float(biased.correlation(s, b)),
                fss_teacher=None if teacher is None else float(biased.correlation(s, t)),
                rs_student=float(unbiased.correlation(s, labels)),
                rs_base=float(unbiased.correlation(b, labels)),
                rs_teacher=None if teacher is None else float(unbiased.correlation(t, labels)),
                rs_distilled=float(unbiased.semi_partial(s, b, labels)),
                rs_residual=float(unbiased.semi_partial(b, s, labels)),
            )
        )
    return rows


def normalized_rows(features: Tensor) -> Tensor:
    return F.normalize(features.reshape(features.shape[0], -1), dim=1)
