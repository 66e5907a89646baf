r"""How sure a score is: standard errors by the jackknife, p-values by permutation.

Jackknife, in closed form. Let A, B be centred distance matrices of n samples, rows summing to 0,
and :math:`p_m = \sum_j A_{mj} B_{mj}`, :math:`S = \sum_m p_m`. Centring removes row effects and
constants, so it makes the same of A without sample m as of the plain distances without it; and the
row sums of A without m are :math:`-A_{im}`, their total 0 (:math:`A_{mm}` where centring leaves a
diagonal). Put into the formulas of ``metrics.similarity`` for n - 1 samples:

    U-centred:        <A, B> without m = [S - 2 (n-2)/(n-3) p_m] / ((n-1)(n-4))
    doubly centred:   <A, B> without m = [S - 2 c p_m + c^2 A_mm B_mm] / (n-1)^2,  c = n/(n-1)

A score without m is then arithmetic on these numbers: O(n K^2) after the sums, no score is
computed n times. It takes one sweep beyond the one that yields the row sums. Both in one is not
possible in memory O(n): p_m of centred matrices holds :math:`\sum_j a_{mj} b_{j.}`, entries of one
matrix times whole row sums of the other.

Permutation. If features and y were independent, any assignment of the rows of y would be as likely
as the one seen. Permuting y permutes its centred matrix, so norms stay what they are and only
:math:`\sum_{ij} A_{ij} B_{\pi(i)\pi(j)}` changes: each tile of A is computed once for all
permutations and each takes its entries of B, from where ``_entries_of`` finds them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastxkd.metrics.similarity import (
    InnerProducts,
    LayerScores,
    centre,
    label_embeddings,
    named_scores,
    paired,
    scores_of_layer,
)
from fastxkd.ops._checks import check_factors, check_flags
from fastxkd.ops.pairs import Pairs, Tile
from fastxkd.ops.ring import agree
from fastxkd.ops.stored import Features

INDEX_BYTES = 1 << 26  # of permutations that one sweep serves
PRODUCT_BYTES = 1 << 25  # of what a matrix product for several permutations writes
FEW_CLASSES = 32  # below, sums over classes by matrix product beat looking entries up


class Estimate(NamedTuple):
    """A score and its jackknife standard error."""

    value: Tensor
    standard_error: Tensor


class PermutationTest(NamedTuple):
    """A score, and how often a random assignment of samples scores as high."""

    value: Tensor
    p_value: float
    permutations: int


def jackknife(
    x: Features,
    y: Features,
    *,
    given: Features | None = None,
    unbiased: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Estimate:
    r"""Distance correlation of ``x`` and ``y`` with its standard error, exact delete-one jackknife.

    .. math:: SE^2 = \frac{n-1}{n} \sum_m (\theta_{(m)} - \bar\theta_{(\cdot)})^2

    with :math:`\theta_{(m)}` the score without sample m, all of them from two sweeps over pairs
    (closed form: see the module). Features of nearly no dependence have a degenerate score, whose
    error is overstated; test independence with :func:`permutation_test`.

    Args:
        x: features ``[n, ...]``, n >= 5, in memory or mapped.
        y: features, or class indices ``[n]``.
        given: then the score is the semi-partial :math:`P_{DC}(x | given; y)` of
            :func:`~fastxkd.partial_distance_correlation`.
        unbiased: as in :func:`~fastxkd.distance_correlation`; only so with ``given``.
        group: processes that each pass the rows they have, as there.

    Returns:
        Scalars ``(value, standard_error)``; not differentiable.

    >>> import torch
    >>> x = torch.tensor([[0., 0], [1, 0], [0, 2], [3, 1], [2, 2], [4, -1]])
    >>> y = torch.tensor([[1.], [0], [2], [5], [3], [4]])
    >>> value, error = jackknife(x, y)
    >>> round(value.item(), 4), round(error.item(), 4)
    (0.8315, 0.2675)
    """
    features, names = _operands(x, y, given, unbiased, group)
    pairs = Pairs(features, names, group)
    (found,), (without,) = _both(pairs, (unbiased,))
    score, each = (_score(products, given is not None) for products in (found, without))
    return Estimate(score.to(pairs.dtype), _spread(each).to(pairs.dtype))


def layer_standard_errors(
    student: Mapping[str, Features],
    base: Mapping[str, Features],
    targets: Tensor,
    *,
    teacher: Mapping[str, Features] | None = None,
    group: dist.ProcessGroup | None = None,
) -> list[LayerScores]:
    """The jackknife standard error of every number of :func:`~fastxkd.layer_scores`, in its place.

    Arguments as there, n >= 5. Two sweeps over pairs a layer.
    """
    sides = paired(student, base, teacher)
    labels = label_embeddings(targets, group=group)
    rows = []
    for layers in zip(*(side.items() for side in sides.values()), strict=True):
        names = [f"{name}[{layer!r}]" for name, (layer, _) in zip(sides, layers, strict=True)]
        pairs = Pairs([*(f for _, f in layers), labels], [*names, "targets"], group)
        _, (biased, unbiased) = _both(pairs, (False, True))
        scores = scores_of_layer(biased, unbiased, list(range(len(layers) + 1)))
        errors = {name: float(_spread(each)) for name, each in scores.items()}
        rows.append(named_scores(layers[0][0], errors))
    return rows


def _operands(
    x: Features,
    y: Features,
    given: Features | None,
    unbiased: bool,
    group: dist.ProcessGroup | None,
) -> tuple[list[Features], list[str]]:
    check_flags(unbiased=unbiased)
    if given is not None and not unbiased:
        raise ValueError("given: a partial score needs unbiased=True")
    classes = agree(lambda: isinstance(y, Tensor) and not y.is_floating_point(), group)
    if len(set(classes)) > 1:
        raise ValueError("y: expected class indices in every process or in none")
    if isinstance(y, Tensor) and classes[0]:
        y = label_embeddings(y, name="y", group=group)
    return [x, y, *([] if given is None else [given])], ["x", "y", "given"][
        : 2 + (given is not None)
    ]


def _score(products: InnerProducts, partial: bool) -> Tensor:
    return products.semi_partial(0, 2, 1) if partial else products.correlation(0, 1)


def _spread(each: Tensor) -> Tensor:
    n = each.shape[0]
    return ((n - 1) / n * (each - each.mean()).square().sum()).sqrt()


def _both(
    pairs: Pairs, estimators: Sequence[bool]
) -> tuple[list[InnerProducts], list[InnerProducts]]:
    """The inner products, and those with each sample left out, per estimator."""
    if pairs.n < 5:
        raise ValueError(
            f"{pairs.sources[0].name}: expected at least 5 rows to leave one out, got {pairs.n}"
        )
    products, row_sums = pairs.sums()
    found = [centre(products, row_sums, pairs.dtype, unbiased=flag) for flag in estimators]
    n, k = pairs.n, len(pairs.sources)
    effects = [_effects(row_sums, flag) for flag in estimators]
    shares = [row_sums.new_zeros(k, k, n) for _ in estimators]
    for tile in pairs.tiles():
        for flag, effect, share in zip(estimators, effects, shares, strict=True):
            centred = [
                _centred(tile, d, e, flag) for d, e in zip(tile.distances, effect, strict=True)
            ]
            for i in range(k):
                for j in range(i, k):
                    product = centred[i] * centred[j]
                    share[i, j, tile.rows] += product.sum(1)
                    if not tile.diagonal:
                        share[i, j, tile.cols] += product.sum(0)
    pairs.reduce(*shares)
    without = []
    for flag, effect, share, whole in zip(estimators, effects, shares, found, strict=True):
        for i in range(k):
            share[i, :i] = share[:i, i]
        total = share.sum(2, keepdim=True)
        if flag:
            values = (total - 2 * (n - 2) / (n - 3) * share) / ((n - 1) * (n - 4))
        else:
            c, diagonal = n / (n - 1), -2 * effect
            squares = diagonal[:, None] * diagonal[None]
            values = (total - 2 * c * share + c * c * squares) / (n - 1) ** 2
        without.append(whole._replace(values=values))
    return found, without


def _effects(row_sums: Tensor, unbiased: bool) -> Tensor:
    """``[K, n]`` e with which ``d_ij - e_i - e_j`` is centred (off the diagonal if unbiased)."""
    n = row_sums.shape[1]
    total = row_sums.sum(1, keepdim=True)
    if unbiased:
        return row_sums / (n - 2) - total / (2 * (n - 1) * (n - 2))
    return row_sums / n - total / (2 * n * n)


def _centred(tile: Tile, distances: Tensor, effect: Tensor, unbiased: bool) -> Tensor:
    effect = effect.to(distances.dtype)
    centred = distances - effect[tile.rows, None]
    centred -= effect[None, tile.cols]
    if unbiased and tile.diagonal:
        centred.fill_diagonal_(0)
    return centred


def permutation_test(
    x: Features,
    y: Features,
    *,
    given: Features | None = None,
    unbiased: bool = True,
    permutations: int = 999,
    generator: torch.Generator | None = None,
    memory: int = 1 << 30,
    group: dist.ProcessGroup | None = None,
) -> PermutationTest:
    r"""Test of independence of ``x`` and ``y`` by distance correlation.

    .. math:: p = \frac{1 + \#\{\pi : \theta_\pi \ge \theta\}}{1 + P}

    with :math:`\theta_\pi` the score after P random permutations of the rows of ``y``: one-sided,
    exact at any n, never 0 (Phipson and Smyth 2010). Scores that rounding cannot tell apart count
    as equal. With ``given``, what of ``x`` is orthogonal to ``given`` stays as it is and ``y`` is
    permuted, as in the tests of partial distance correlation of Székely and Rizzo (2014).

    Args:
        x, y, given, unbiased, group: as in :func:`jackknife`, n >= 4.
        permutations: P.
        generator: where they are drawn from, by default torch's. Of a ``group``, rank 0 draws.
        memory: bytes that the distance matrix of ``y`` may take. If y has few distinct rows
            (labels), the distances of those are all that is kept; else the matrix, if it fits; else
            the distances of y are computed for every permutation, at P times the time.

    Returns:
        :class:`PermutationTest`: score, p and P. Where the score is NaN (NaN or infinity in the
        features, or values whose squares are beyond their dtype), so is p.

    Raises:
        TypeError: options of another type.
        ValueError: with ``group``, features y whose matrix does not fit in ``memory``: rows of
            other processes cannot be permuted without it.

    >>> import torch
    >>> x = torch.arange(20.0)[:, None].cos()
    >>> y = x + 0.1 * torch.arange(20.0)[:, None].sin()
    >>> permutation_test(x, y, generator=torch.Generator().manual_seed(0)).p_value
    0.001
    """
    if isinstance(permutations, bool) or not isinstance(permutations, int):
        raise TypeError(f"permutations: expected an int, got {type(permutations).__name__}")
    if permutations < 1:
        raise ValueError(f"permutations: expected at least 1, got {permutations}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a Generator, got {type(generator).__name__}")
    features, names = _operands(x, y, given, unbiased, group)
    check_factors(memory=memory)
    pairs = Pairs(features, names, group)
    products, row_sums = pairs.sums()
    found = centre(products, row_sums, pairs.dtype, unbiased=unbiased)
    score = _score(found, given is not None).to(pairs.dtype)
    if bool(score.isnan()):
        return PermutationTest(score, math.nan, permutations)
    fixed = Pairs(
        [f for i, f in enumerate(features) if i != 1], ["x", "given"][: len(features) - 1], group
    )
    effects = _effects(row_sums, unbiased)
    weights = [1.0]
    if given is not None:
        norm = found.values[2, 2]
        constant = bool(norm <= found.noise[2])
        weights.append(0.0 if constant else -float(found.values[0, 2] / norm))
    entries = _entries_of(y, features[1], pairs, row_sums[1], memory)

    n, above = pairs.n, 0
    at_once = max(1, INDEX_BYTES // (8 * n))
    seen: Tensor | None = None
    tie = _rounding(found, weights, n, unbiased)
    for begin in range(-1, permutations, at_once):
        # The order as it came is the first one, so that ties are ties.
        drawn = [
            torch.arange(n) if i < 0 else _drawn(n, generator)
            for i in range(begin, min(begin + at_once, permutations))
        ]
        orders = torch.stack(drawn).to(pairs.device)
        if group is not None:
            dist.broadcast(orders, dist.get_global_rank(group, 0), group=group)
        totals = torch.zeros(len(orders), dtype=torch.float64, device=pairs.device)
        for tile in fixed.tiles():
            matrix = torch.zeros_like(tile.distances[0])
            for d, e, w in zip(tile.distances, _others(effects), weights, strict=True):
                matrix += w * _centred(tile, d, e, unbiased)
            dots = entries.dots(matrix, orders[:, tile.rows], orders[:, tile.cols], tile.diagonal)
            totals += dots if tile.diagonal else 2 * dots
        pairs.reduce(totals)
        if seen is None:
            seen, totals = totals[0], totals[1:]
        above += int((totals >= seen - tie).sum())
    nothing = bool(found.undefined(0, 1, given=None if given is None else 2))
    p_value = 1.0 if nothing else (1 + above) / (1 + permutations)
    return PermutationTest(score, p_value, permutations)


def _drawn(n: int, generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.randperm(n, generator=generator, device=device).cpu()


def _others(effects: Tensor) -> list[Tensor]:
    """All but those of y."""
    return [e for i, e in enumerate(effects) if i != 1]


def _rounding(found: InnerProducts, weights: list[float], n: int, unbiased: bool) -> Tensor:
    """By how much two sums that are equal may differ."""
    v = found.values
    square = v[0, 0]
    if len(weights) == 2:
        square = square + 2 * weights[1] * v[0, 2] + weights[1] ** 2 * v[2, 2]
    size = n * (n - 3) if unbiased else n * n
    return 16 * torch.finfo(found.dtype).eps * size * (square.clamp(min=0) * v[1, 1]).sqrt()


class _Entries(Protocol):
    """Where entries of the centred matrix of y come from. Any row effect may be off in them: it is
    orthogonal to the centred tiles they are multiplied with."""

    def dots(self, fixed: Tensor, rows: Tensor, cols: Tensor, diagonal: bool) -> Tensor:
        """``sum_ij fixed_ij B[rows[p, i], cols[p, j]]`` for every permutation p, float64."""


def _entries_of(
    y: Features, embedded: Features, pairs: Pairs, row_sums: Tensor, memory: int
) -> _Entries:
    own = _distinct(y, embedded, pairs)
    if own is not None:
        return own
    # Doubly centred whatever the estimator: with a diagonal that fits.
    effect = _effects(row_sums[None], False)[0].to(pairs.dtype)
    alone = Pairs([embedded], ["y"], pairs.group)
    if pairs.n**2 * pairs.dtype.itemsize <= memory:
        return _Matrix(alone, effect)
    if pairs.group is not None:
        raise ValueError(
            f"memory: the distances of y take {pairs.n**2 * pairs.dtype.itemsize} bytes in every"
            f" process of the group, got {memory}"
        )
    return _Recomputed(alone, effect)


def _distinct(y: Features, embedded: Features, pairs: Pairs) -> _Distinct | None:
    if not isinstance(y, Tensor) or not isinstance(embedded, Tensor):
        return None
    if not y.is_floating_point():
        index, unique = embedded.argmax(1), torch.eye(embedded.shape[1], device=embedded.device)
        if pairs.group is not None:
            # Of the own rows; the others' fill in theirs.
            whole = index.new_zeros(pairs.n)
            start = pairs.starts[pairs.rank]
            whole[start : start + pairs.own] = index
            pairs.reduce(whole)
            index = whole
    elif pairs.group is None and y.numel() <= 1 << 22:
        unique, index = y.detach().flatten(1).unique(dim=0, return_inverse=True)
    else:
        return None
    if len(unique) ** 2 > pairs.n:
        return None
    return _Distinct(unique, index, pairs.dtype)


class _Distinct:
    """Labels: the distances of c different rows, and which row is where."""

    def __init__(self, unique: Tensor, index: Tensor, dtype: torch.dtype) -> None:
        flat = unique.double()
        distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
        self.index, self.count = index, len(unique)
        sums = distances @ torch.bincount(index, minlength=self.count).double()
        n = len(index)
        effect = sums / n - sums[index].sum() / (2 * n * n)
        self.matrix = (distances - effect[:, None] - effect).to(dtype)

    def dots(self, fixed: Tensor, rows: Tensor, cols: Tensor, diagonal: bool) -> Tensor:
        rows, cols = self.index[rows], self.index[cols]
        if self.count > FEW_CLASSES:
            return torch.stack(
                [_dot(fixed, self.matrix[r[:, None], c]) for r, c in zip(rows, cols, strict=True)]
            )
        # Z_r^T fixed Z_c: sums of the tile by class, for many permutations in one product.
        found = []
        at_once = max(1, PRODUCT_BYTES // (fixed.dtype.itemsize * self.count * max(fixed.shape)))
        for r, c in zip(rows.split(at_once), cols.split(at_once), strict=True):
            left = F.one_hot(r, self.count).to(fixed.dtype).mT.reshape(-1, fixed.shape[0])
            right = F.one_hot(c, self.count).to(fixed.dtype)
            by_class = (left @ fixed).view(len(r), self.count, -1) @ right
            found.append((by_class.double() * self.matrix).sum((1, 2)))
        return torch.cat(found)


class _Matrix:
    """Kept whole."""

    def __init__(self, alone: Pairs, effect: Tensor) -> None:
        n = alone.n
        self.matrix = torch.zeros(n, n, dtype=alone.dtype, device=alone.device)
        for tile in alone.tiles():
            block = tile.distances[0] - effect[tile.rows, None] - effect[tile.cols]
            self.matrix[tile.rows, tile.cols] = block
            self.matrix[tile.cols, tile.rows] = block.T
        alone.reduce(self.matrix)

    def dots(self, fixed: Tensor, rows: Tensor, cols: Tensor, diagonal: bool) -> Tensor:
        return torch.stack(
            [_dot(fixed, self.matrix[r[:, None], c]) for r, c in zip(rows, cols, strict=True)]
        )


class _Recomputed:
    """From the features, for every permutation."""

    def __init__(self, alone: Pairs, effect: Tensor) -> None:
        self.alone, self.effect = alone, effect

    def dots(self, fixed: Tensor, rows: Tensor, cols: Tensor, diagonal: bool) -> Tensor:
        found = []
        for r, c in zip(rows, cols, strict=True):
            (block,) = self.alone.between(r, r if diagonal else c)
            found.append(_dot(fixed, block - self.effect[r, None] - self.effect[c]))
        return torch.stack(found)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1).sum(dtype=torch.float64)
