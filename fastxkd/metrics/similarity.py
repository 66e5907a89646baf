"""Distance correlation, partial distance correlation, and the FSS and RS scores made of them.

Everything here is arithmetic on the few numbers that one sweep over pairs yields
(``ops.distance``). With plain distance matrices a, b and row sums ``a_i.``, the inner product of
the U-centred matrices needs no centred matrix:

    <A, B> = [sum_{i != j} a_ij b_ij - 2/(n-2) sum_i a_i. b_i. + a.. b.. / ((n-1)(n-2))] / (n(n-3))

and that of the doubly centred ones:

    <A, B> = sum a_ij b_ij / n^2 - 2 sum_i a_i. b_i. / n^3 + a.. b.. / n^4
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastxkd.ops.distance import distance_sums
from fastxkd.ops.pairs import Pairs
from fastxkd.ops.ring import agree
from fastxkd.ops.stored import Features, OneHot


class InnerProducts(NamedTuple):
    """K x K inner products of centred distance matrices, and what of them is rounding."""

    values: Tensor  # [K, K], or [K, K, n]: one of each for every sample left out
    noise: Tensor  # [K]: a squared norm that rounding of the distances alone may reach
    dtype: torch.dtype  # of a score: that of the distances

    def correlation(self, k: int, l: int) -> Tensor:  # noqa: E741
        v = self.values
        return _ratio(v[k, l], v[k, k], v[l, l], self.undefined(k, l))

    def semi_partial(self, k: int, l: int, g: int) -> Tensor:  # noqa: E741
        """P_DC(k | l; g): correlation of what of k is orthogonal to l, with g as it is."""
        v = self.values
        a, rest = self._rest(k, l)
        return _ratio(v[k, g] - a * v[l, g], rest, v[g, g], self.undefined(k, g, given=l))

    def undefined(self, k: int, l: int, *, given: int | None = None) -> Tensor:  # noqa: E741
        """Where a score of k and l, or of what of k is orthogonal to ``given``, is 0 for want of
        anything to compare."""
        nothing = self._constant(k) | self._constant(l)
        if given is not None:
            # Nothing of k is left beside given: the remainder is rounding.
            rest = self._rest(k, given)[1]
            nothing = nothing | (rest <= 1e-10 * self.values[k, k] + self.noise[k])
        return nothing

    def _rest(self, k: int, l: int) -> tuple[Tensor, Tensor]:  # noqa: E741
        """What of k lies along l, in units of l, and the squared norm of what does not."""
        v = self.values
        a = torch.where(self._constant(l), 0, v[k, l] / v[l, l].where(~self._constant(l), 1))
        return a, v[k, k] - 2 * a * v[k, l] + a * a * v[l, l]

    def _constant(self, k: int) -> Tensor:
        return self.values[k, k] <= self.noise[k]


def _ratio(cross: Tensor, first: Tensor, second: Tensor, undefined: Tensor) -> Tensor:
    product = (first * second).where(~undefined, 1)
    # Cauchy and Schwarz bound it; rounding does not know.
    return torch.where(undefined, 0, cross / product.sqrt()).clamp(-1, 1)


def inner_products(
    features: Sequence[Features],
    names: Sequence[str],
    *,
    unbiased: bool,
    group: dist.ProcessGroup | None = None,
) -> InnerProducts:
    return centre(*sums(features, names, group), unbiased=unbiased)


def sums(
    features: Sequence[Features], names: Sequence[str], group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, torch.dtype]:
    """``(products, row_sums)`` of ``ops.distance``, and the dtype of the distances.

    Tensors go to the operator, differentiably; mapped features and those of other processes are
    walked over panel by panel.
    """
    if group is None and all(isinstance(f, Tensor) for f in features):
        tensors = [f for f in features if isinstance(f, Tensor)]
        return *distance_sums(tensors, list(names)), _result_dtype(*tensors)
    pairs = Pairs(features, names, group)
    return *pairs.sums(), pairs.dtype


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
    return InnerProducts(values, relative * products.diagonal() / n**2, dtype)


def _result_dtype(*features: Tensor) -> torch.dtype:
    wide = any(f.dtype == torch.float64 for f in features)
    return torch.float64 if wide else torch.float32


def distance_correlation(
    x: Features,
    y: Features,
    *,
    unbiased: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Squared distance correlation of two sets of features of the same ``n`` samples.

    .. math:: R^{*2} = \langle A, B\rangle / \sqrt{\langle A, A\rangle \langle B, B\rangle}

    with A, B the U-centred distance matrices (Székely and Rizzo 2014), or the doubly centred ones
    for ``unbiased=False``. Equals ``dcor.u_distance_correlation_sqr`` and
    ``dcor.distance_correlation_sqr``.

    Args:
        x, y: ``[n, ...]``, n >= 4, flattened per sample; float32, float64, bfloat16 or float16.
            Dimensions need not agree. Tensors, or features that do not fit in memory: a
            ``numpy.memmap``, a tensor of ``torch.from_file``, a ``get_slice`` of a safetensors
            file, read panel by panel.
        unbiased: in [-1, 1] around 0 for independent features; otherwise in [0, 1], and biased
            upwards for few samples of many dimensions.
        group: processes (``torch.distributed``) that each pass the rows they have; all of them
            call, and all get the score of all rows. Tiles of features travel in a ring.

    Returns:
        A scalar, float64 for float64 features, else float32; 0 where a feature is constant.
        Differentiable in tensors of one process; memory beyond the features does not grow with
        ``n^2``.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, fewer than 4 samples.

    >>> import torch
    >>> x = torch.tensor([[0., 0], [1, 0], [0, 2], [3, 1], [2, 2], [4, -1]])
    >>> y = torch.tensor([[1.], [0], [2], [5], [3], [4]])
    >>> round(distance_correlation(x, y).item(), 4)
    0.8315
    """
    found = inner_products([x, y], ["x", "y"], unbiased=unbiased, group=group)
    return found.correlation(0, 1).to(found.dtype)


def partial_distance_correlation(
    x: Features,
    y: Features,
    *,
    given: Features,
    semi_partial: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Distance correlation of ``x`` and ``y`` with what ``given`` explains taken out.

    With U-centred matrices and :math:`A' = A - \langle A,C\rangle/\langle C,C\rangle\, C`,

    .. math:: pdcor(x, y; given) = \langle A', B'\rangle / (|A'| |B'|)

    (Székely and Rizzo 2014; ``dcor.partial_distance_correlation``). With ``semi_partial=True`` only
    ``x`` is projected, :math:`P_{DC}(x|given; y) = \langle A', B\rangle / (|A'| |B|)`: the score of
    UniCAM (Adhane et al. 2025), where x is the student, given the base and y the labels.

    Args:
        x, y, given: ``[n, ...]``, n >= 4, of any float dtype, in memory or mapped, as in
            :func:`distance_correlation`.
        group: as there.

    Returns:
        A scalar in [-1, 1]; 0 where ``x`` or ``y`` is constant or wholly explained by ``given``.
        Differentiable in tensors of one process.

    >>> import torch
    >>> x = torch.tensor([[0., 0], [1, 0], [0, 2], [3, 1], [2, 2], [4, -1]])
    >>> y = torch.tensor([[1.], [0], [2], [5], [3], [4]])
    >>> labels = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1, 2, 2])).float()
    >>> round(partial_distance_correlation(x, labels, given=y).item(), 4)
    -0.4033
    >>> round(partial_distance_correlation(x, labels, given=y, semi_partial=True).item(), 4)
    -0.3786
    """
    found = inner_products([x, y, given], ["x", "y", "given"], unbiased=True, group=group)
    value = found.semi_partial(0, 2, 1)
    if not semi_partial:
        explained = found.correlation(1, 2)
        left = 1 - explained.square()
        gone = left <= 1e-10
        value = torch.where(gone, 0, value / left.where(~gone, 1).sqrt()).clamp(-1, 1)
    return value.to(found.dtype)


def label_embeddings(
    targets: Tensor, *, name: str = "targets", group: dist.ProcessGroup | None = None
) -> Tensor:
    """Class indices ``[n]`` as one-hot vectors; embeddings ``[n, e]`` as they are.

    Classes are numbered by those present: distances between one-hot vectors do not depend on how
    many classes there are beside them. With ``group``, by those present in any process.
    """
    found = label_rows(targets, name=name, group=group)
    return found if isinstance(found, Tensor) else found[:]


def label_rows(
    targets: Tensor, *, name: str = "targets", group: dist.ProcessGroup | None = None
) -> Tensor | OneHot:
    """:func:`label_embeddings`, of which only the rows that are read are made."""

    def classes() -> list[int] | None:
        check_targets(targets, name)
        if group is None or targets.is_floating_point():
            return None
        return targets.unique().tolist()  # type: ignore[no-any-return]

    everyone = agree(classes, group)
    if len({some is None for some in everyone}) > 1:
        raise ValueError(f"{name}: expected class indices in every process or in none")
    if targets.is_floating_point():
        return targets
    if group is None:
        present, index = targets.unique(return_inverse=True)
        return OneHot(index, len(present))
    joint = torch.tensor(sorted({c for some in everyone for c in some or []}), dtype=targets.dtype)
    index = torch.searchsorted(joint.to(targets.device), targets.contiguous())
    return OneHot(index, len(joint))


def check_targets(targets: Any, name: str) -> None:
    """Class indices ``[n]`` or embeddings ``[n, e]``."""
    if not isinstance(targets, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(targets).__name__}")
    if targets.is_floating_point():
        if targets.dim() < 2:
            raise ValueError(
                f"{name}: expected embeddings [n, e] or int64 class indices [n],"
                f" got {targets.dtype} {list(targets.shape)}"
            )
    elif targets.dim() != 1 or targets.dtype == torch.bool or targets.is_complex():
        raise ValueError(
            f"{name}: expected int64 class indices [n], got {targets.dtype} {list(targets.shape)}"
        )


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
    student: Mapping[str, Features],
    base: Mapping[str, Features],
    targets: Tensor,
    *,
    teacher: Mapping[str, Features] | None = None,
    group: dist.ProcessGroup | None = None,
) -> list[LayerScores]:
    """FSS and RS of every layer of student, base and teacher, from one sweep over pairs.

    FSS is the (biased) distance correlation of two models' features; RS the U-centred one of
    features and labels; distilled and residual RS the semi-partial one of what student and base
    do not share (Adhane et al. 2025; for the choice of estimators see
    :class:`FeatureSimilarityScore`).

    Args:
        student, base, teacher: features ``[n, ...]`` by layer name, in memory or mapped as in
            :func:`distance_correlation`. Layers pair up in order.
        targets: class indices ``[n]`` or embeddings ``[n, e]``.
        group: processes that each pass the rows they have, as in :func:`distance_correlation`.

    Raises:
        ValueError: a different number of layers, rows that do not match, n < 4.
    """
    sides = paired(student, base, teacher)
    features = [f for side in sides.values() for f in side.values()]
    names = [f"{name}[{layer!r}]" for name, side in sides.items() for layer in side]
    features.append(
        label_embeddings(targets) if group is None else label_rows(targets, group=group)
    )
    found = sums(features, [*names, "targets"], group)
    biased, unbiased = (centre(*found, unbiased=flag) for flag in (False, True))
    count, labels = len(student), len(features) - 1
    rows = []
    for i, layer in enumerate(student):
        members = [i, count + i, *([] if teacher is None else [2 * count + i]), labels]
        scores = scores_of_layer(biased, unbiased, members)
        rows.append(named_scores(layer, {name: float(v) for name, v in scores.items()}))
    return rows


def named_scores(layer: str, scores: dict[str, float]) -> LayerScores:
    return LayerScores(layer, *(scores.get(name) for name in LayerScores._fields[1:]))  # type: ignore[arg-type]


def paired(
    student: Mapping[str, Features],
    base: Mapping[str, Features],
    teacher: Mapping[str, Features] | None,
) -> dict[str, Mapping[str, Features]]:
    """The models by name, all of as many layers."""
    sides = {"student": student, "base": base} | ({} if teacher is None else {"teacher": teacher})
    for name, side in sides.items():
        if not isinstance(side, Mapping):
            raise TypeError(f"{name}: expected features by layer name, got {type(side).__name__}")
        if len(side) != len(student):
            raise ValueError(
                f"{name}: expected {len(student)} layers to pair with the student's,"
                f" got {len(side)}: {', '.join(side)}"
            )
    return sides


def scores_of_layer(
    biased: InnerProducts, unbiased: InnerProducts, members: list[int]
) -> dict[str, Tensor]:
    """The fields of :class:`LayerScores`; ``members``: student, base, teacher if any, labels."""
    s, b, *teacher, labels = members
    scores = {
        "fss": biased.correlation(s, b),
        "rs_student": unbiased.correlation(s, labels),
        "rs_base": unbiased.correlation(b, labels),
        "rs_distilled": unbiased.semi_partial(s, b, labels),
        "rs_residual": unbiased.semi_partial(b, s, labels),
    }
    for t in teacher:
        scores["fss_teacher"] = biased.correlation(s, t)
        scores["rs_teacher"] = unbiased.correlation(t, labels)
    return scores


def normalized_rows(features: Tensor) -> Tensor:
    """``[n, width]`` rows of length 1, or 0 where all values are 0; float64 for float64, else
    float32: 16 bits do not hold the squares."""
    rows = features.detach().reshape(features.shape[0], -1).to(_result_dtype(features))
    # By the largest first: neither do float32's hold those of every number.
    largest = rows.abs().amax(1, keepdim=True)
    return F.normalize(rows / largest.where(largest != 0, 1), dim=1)
