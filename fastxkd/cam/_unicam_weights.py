"""UniCAM's objectives in closed form: from distance matrices to weights of pairs of samples.

With A, C, T the U-centred distance matrices of the explained model, the one that is taken out and
the labels, <X, Y> = c sum XY, c = 1/(n(n-3)), and without(X) = X - <X, C> / (<C, C> + e') C,

    semi_partial     J = <R, T> / sqrt(<R, R> <T, T> + e),  R = without(A)
    partial          the same of without(T) for T: R is orthogonal to C already
    residual_argmax  J = sum_i max_{j != i} R_ij

Centring and ``without`` are orthogonal projections, hence their own adjoints, so dJ/dD needs no
autograd. With P = dJ/dR, for the correlations

    P = c (T/den - <R, T> <T, T>/den^3 R),  den = sqrt(<R, R> <T, T> + e)

and for the last the centred symmetric part of the matrix with a one at the maximum of each row,

    W = without(P),  V_ij = 2 W_ij / D_ij,  0 on the diagonal and where D_ij = 0

and dJ/dx_i = sum_j V_ij (x_i - x_j): linear in the features, so its spatial mean, which is all that
a channel weight is, needs only pooled activations.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fastxkd.cam._unicam_distances import (
    Distances,
    cross_distances,
    exact_dtype,
    joint_labels,
    own_distances,
)
from fastxkd.metrics.similarity import label_embeddings
from fastxkd.ops.distance import check_features

Objective = Literal["semi_partial", "partial", "residual_argmax"]
SCORE_EPS = 1e-18
PROJECTION_EPS = 1e-12
# What is left of a matrix beside another, as a share of it, that is taken for nothing.
NOTHING_LEFT = 1e-10
# Entries of matrices at a time.
CHUNK_ELEMENTS = 1 << 21


def check_objective(objective: str) -> None:
    if objective not in get_args(Objective):
        raise ValueError(
            f"objective: expected one of {', '.join(get_args(Objective))}, got {objective!r}"
        )


def check_samples(argument: str, n: int, objective: str) -> None:
    """4, the fewest that distances can be centred of, are too few beside a base."""
    if n == 4 and objective != "residual_argmax":
        raise ValueError(
            f"{argument}: expected at least 5, got 4: beside a base their distances have one"
            f" direction left, and {objective} is 1 or -1 whatever they are; pass more, or a"
            " reference set"
        )


def _u_centred(d: Tensor) -> Tensor:
    n = d.shape[-1]
    rows = d.sum(-1, keepdim=True)
    total = rows.sum(-2, keepdim=True) / ((n - 1) * (n - 2))
    return _hollow(d - (rows + rows.mT) / (n - 2) + total)


def _hollow(x: Tensor, value: float = 0.0) -> Tensor:
    x.diagonal(dim1=-2, dim2=-1).fill_(value)
    return x


def pair_weights(
    own: Distances,
    base: Distances,
    labels: Distances | None,
    objective: str,
    dtype: torch.dtype,
) -> Tensor:
    """``V_ij`` ``[n, m]``; with a reference set that of sample i, added to the set alone, and its
    member j. ``dtype`` is what distances of features were computed in."""
    given = [x for x in (own, base, labels) if x is not None]
    if own.within is None:
        return _pair_weights([x.to for x in given], objective, dtype)
    n, m = own.to.shape
    sets = [x.within for x in given if x.within is not None]
    strips = []
    step = max(1, CHUNK_ELEMENTS // (m + 1) ** 2)
    for begin in range(0, n, step):
        joined = []
        for x, within in zip(given, sets, strict=True):
            row = x.to[begin : begin + step]
            d = row.new_zeros(len(row), m + 1, m + 1)
            d[:, :m, :m] = within
            d[:, m, :m] = d[:, :m, m] = row
            joined.append(d)
        strips.append(_pair_weights(joined, objective, dtype)[:, m, :m])
    return torch.cat(strips)


def _pair_weights(matrices: list[Tensor], objective: str, dtype: torch.dtype) -> Tensor:
    """V of the module's text for ``[..., n, n]`` distances of features, base and, if any, labels.

    Zero where there is nothing to differentiate: features, labels or what is left of them beside
    the base are constant, but for the rounding of their distances.
    """
    d, base = matrices[:2]
    n = d.shape[-1]
    scale = 1 / (n * (n - 3))
    # Rounded distances leave the square of their rounding, as in metrics.similarity.
    rounding = max((64 * torch.finfo(dtype).eps) ** 2, 64 * torch.finfo(torch.float64).eps)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return scale * (x * y).sum((-2, -1), keepdim=True)

    def left(rest: Tensor, centred: Tensor, distances: Tensor) -> Tensor:
        mean_square = distances.square().mean((-2, -1), keepdim=True)
        return inner(rest, rest) > NOTHING_LEFT * inner(centred, centred) + rounding * mean_square

    a, c = _u_centred(d), _u_centred(base)
    projection = inner(c, c) + PROJECTION_EPS

    def without_base(x: Tensor) -> Tensor:
        return x - inner(x, c) / projection * c

    r = without_base(a)
    defined = left(r, a, d)
    if objective == "residual_argmax":
        largest = _hollow(r.clone(), -torch.inf).argmax(-1, keepdim=True)
        chosen = torch.zeros_like(r).scatter_(-1, largest, 1.0)
        p = _u_centred((chosen + chosen.mT) / 2)
    else:
        t = centred = _u_centred(matrices[2])
        if objective == "partial":
            t = without_base(t)
        defined = defined & left(t, centred, matrices[2])
        rt, tt = inner(r, t), inner(t, t)
        den = (inner(r, r) * tt + SCORE_EPS).sqrt()
        p = scale * (t / den - rt * tt / den**3 * r)
    w = without_base(p)
    return _hollow(torch.where(defined & (d != 0), 2 * w / d.where(d != 0, 1), 0))


def pulled(pairs: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``sum_j V_ij (x_i - x_j)`` ``[n, k]`` of rows ``[n, k]`` and columns ``[m, k]``."""
    return pairs.sum(1, keepdim=True) * rows - pairs @ columns


def pooled(spatial: Tensor) -> Tensor:
    """``[n, c]`` means over positions, in float64."""
    exact = torch.float64 if spatial.dtype == torch.float64 else torch.float32
    return spatial.mean(tuple(range(2, spatial.dim())), dtype=exact).double()


def unicam_weights(
    activations: Tensor,
    base_features: Tensor,
    targets: Tensor | None = None,
    *,
    objective: Objective = "semi_partial",
    reference: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Channel weights of UniCAM: the spatial mean of :math:`dJ/dA`, without autograd.

    Features are the flattened activations, distances those between the samples, and J
    (Adhane et al. 2025):

    ==================== ==========================================================================
    ``semi_partial``     the semi-partial distance correlation :math:`P_{DC}(A | base; targets)`
    ``partial``          the textbook one (Székely and Rizzo 2014), which takes the base out of the
                         targets too. The gradient has the same direction, and is the larger the
                         more of the targets the base explains: maps scaled to [0, 1] are the same
    ``residual_argmax``  :math:`\sum_i \max_{j \neq i} R_{ij}`, R the residual distance matrix
                         of A without the base: what the authors' first release maximised, no
                         targets in it. An interpretation: there the maximum was taken where
                         logits were expected, and ran over the other samples of the batch
    ==================== ==========================================================================

    Args:
        activations: ``[n, c, h, w]`` or ``[n, c, d, h, w]`` of the explained model, n >= 5
            (``residual_argmax``: 4).
        base_features: ``[n, ...]`` of the model that is taken out.
        targets: class indices ``[n]`` or embeddings ``[n, e]``; None for ``residual_argmax``.
        objective: one of the table.
        reference: the same three (two for ``residual_argmax``) tensors of m >= 4 other samples.
            Then J of sample i is that of the reference set and sample i alone, and its row of the
            result does not depend on the other samples; n may be 1.

    Returns:
        ``[n, c]`` in the dtype of the activations (float32 for 16-bit ones). All zero where every
        label is the same, or the base leaves nothing of activations or (``partial``) targets.

    Raises:
        ValueError, TypeError: too few samples, rows that do not match, targets missing or
            without use.

    >>> import torch
    >>> a, b = (torch.rand(8, 3, 4, 4, dtype=torch.float64) for _ in range(2))
    >>> labels = torch.arange(8) % 2
    >>> weights = unicam_weights(a, b, labels)
    >>> weights.shape
    torch.Size([8, 3])
    >>> alone = unicam_weights(a[:1], b[:1], labels[:1], reference=(a[1:], b[1:], labels[1:]))
    >>> torch.allclose(alone, weights[:1], rtol=1e-3)
    True
    """
    check_objective(objective)
    _check_spatial(activations, "activations")
    names = ["activations", "base_features", "targets"]
    given: list[Tensor] = [activations, base_features]
    if objective == "residual_argmax":
        if targets is not None:
            raise ValueError("targets: expected None, residual_argmax has no use for them")
    elif targets is None:
        raise TypeError(f"targets: {objective} expects a Tensor, got NoneType")
    else:
        given.append(targets)
    n = activations.shape[0]
    with torch.no_grad():
        if reference is None:
            check_samples("activations", n, objective)
            if targets is not None:
                given[2] = label_embeddings(targets).double()
            distances = [
                Distances(own_distances(x, name, n)) for x, name in zip(given, names, strict=False)
            ]
            columns = pooled(activations)
        else:
            others = _checked_reference(reference, given, names)
            if targets is not None:
                given[2], others[2] = joint_labels(targets, others[2], "targets")
            distances = [
                Distances(
                    cross_distances(x, y),
                    own_distances(y, f"reference {name}", len(y)),
                )
                for x, y, name in zip(given, others, names, strict=False)
            ]
            columns = pooled(others[0])
        labels = distances[2] if targets is not None else None
        dtype = exact_dtype(activations, base_features)
        pairs = pair_weights(distances[0], distances[1], labels, objective, dtype)
        return pulled(pairs, pooled(activations), columns).to(exact_dtype(activations))


def _checked_reference(
    reference: tuple[Tensor, ...], given: list[Tensor], names: list[str]
) -> list[Tensor]:
    if not isinstance(reference, (tuple, list)) or len(reference) != len(given):
        got = len(reference) if isinstance(reference, (tuple, list)) else type(reference).__name__
        raise TypeError(f"reference: expected a tuple of {len(given)} Tensors, got {got}")
    n = len(given[0])
    for name, own, other in zip(names, given, reference, strict=False):
        if not isinstance(own, Tensor) or not isinstance(other, Tensor):
            argument, value = (name, own) if not isinstance(own, Tensor) else ("reference", other)
            raise TypeError(f"{argument}: expected a Tensor, got {type(value).__name__}")
        if len(own) != n or n == 0:
            raise ValueError(f"{name}: expected {max(1, n)} rows, one per image, got {len(own)}")
        if name != "targets" and not own.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point dtype, got {own.dtype}")
        if name != "targets" and own.shape[1:] != other.shape[1:]:
            raise ValueError(
                f"reference: expected {name} of {list(own.shape[1:])} a row,"
                f" got {list(other.shape[1:])}"
            )
    if len(reference) == 3 and len(reference[2]) != len(reference[0]):
        raise ValueError(
            f"reference: expected {len(reference[0])} targets, got {len(reference[2])}"
        )
    check_features(list(reference[:2]), ["reference activations", "reference base_features"])
    return list(reference)


def _check_spatial(activations: Tensor, name: str) -> None:
    if not isinstance(activations, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(activations).__name__}")
    if activations.dim() not in (4, 5):
        raise ValueError(
            f"{name}: expected spatial maps [n, channels, height, width] or volumes"
            f" [n, channels, depth, height, width], got {list(activations.shape)}"
        )
