"""Distances of a batch's features to each other, or to those of a reference set."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastxkd.metrics.similarity import label_embeddings
from fastxkd.ops._distance_gpu import full_precision
from fastxkd.ops.distance import check_features

# A squared distance below this share of the squared norms is taken from the differences: from
# the Gram product it has lost its digits.
NEAR = {torch.float32: 1e-2, torch.float64: 1e-5}
# Values of a panel of features, and its columns at least.
PANEL_ELEMENTS = 1 << 20
FEWEST_COLUMNS = 2048


class Distances(NamedTuple):
    """Of n samples to m others, float64; without a reference set to each other."""

    to: Tensor  # [n, m]
    within: Tensor | None = None  # [m, m], of the reference set


def own_distances(features: Tensor, name: str, n: int) -> Tensor:
    """``[n, n]`` float64 distances of features ``[n, ...]``, checked."""
    check_features([features], [name])
    if len(features) != n:
        raise ValueError(f"{name}: expected {n} rows, one per image, got {len(features)}")
    return _distances(features, None)


def cross_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """``[n, m]`` float64 distances of features ``[n, ...]`` and ``[m, ...]``.

    Where two are one and the same but for rounding, as an image is that is also in the reference
    set, the direction between them is rounding, and their distance 0.
    """
    found = _distances(rows, columns)
    eps = max(torch.finfo(x.dtype).eps for x in (rows, columns))
    return found.masked_fill(found <= eps**0.5 * found.mean(1, keepdim=True), 0)


@torch.no_grad()
def _distances(rows: Tensor, columns: Tensor | None) -> Tensor:
    """Gram products of narrow panels, centred in cache and added in float64: a panel is all the
    memory it takes. ``None``: between the rows themselves."""
    rows = rows.flatten(1)
    others = rows if columns is None else columns.flatten(1)
    n, m = len(rows), len(others)
    exact = exact_dtype(rows, others)
    gram = rows.new_zeros(n, m, dtype=torch.float64)
    norms = gram.new_zeros(n, 1), gram.new_zeros(1, m)
    width = max(FEWEST_COLUMNS, PANEL_ELEMENTS // (n + m))
    with torch.autocast(rows.device.type, enabled=False):
        for x, y in zip(rows.split(width, 1), others.split(width, 1), strict=True):
            y = y.to(exact)
            mean = y.mean(0)
            y = y - mean
            x = y if columns is None else x.to(exact) - mean
            with full_precision(x):
                gram += x @ y.mT
            if columns is not None:
                norms[0].add_(torch.linalg.vector_norm(x, dim=1).double().square()[:, None])
                norms[1].add_(torch.linalg.vector_norm(y, dim=1).double().square())
    if columns is None:
        gram = (gram + gram.mT) / 2  # a product need not be symmetric to the last digit
        norms = gram.diagonal()[:, None], gram.diagonal()[None]
    both = norms[0] + norms[1]
    square = both - 2 * gram
    near = square <= NEAR[exact] * both
    if columns is None:
        near = near.triu(1)
        square.fill_diagonal_(0)
    for part in near.nonzero().split(max(1, PANEL_ELEMENTS // rows.shape[1])):
        i, j = part.unbind(1)
        between = rows[i].to(exact) - others[j].to(exact)
        square[i, j] = torch.linalg.vector_norm(between, dim=1).double().square()
        if columns is None:
            square[j, i] = square[i, j]
    return square.sqrt()


def exact_dtype(*features: Tensor) -> torch.dtype:
    """What distances of features are computed in."""
    wide = any(f.dtype == torch.float64 for f in features)
    return torch.float64 if wide else torch.float32


def joint_labels(own: Tensor, others: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Embeddings, in float64, of the labels of a batch and of its reference set."""
    if own.is_floating_point() != others.is_floating_point():
        kinds = ["embeddings" if x.is_floating_point() else "class indices" for x in (own, others)]
        raise ValueError(f"{name}: expected {kinds[1]} as in the reference set, got {kinds[0]}")
    if own.shape[1:] != others.shape[1:]:
        raise ValueError(
            f"{name}: expected {list(others.shape[1:])} a row as in the reference set,"
            f" got {list(own.shape[1:])}"
        )
    both = label_embeddings(torch.cat([own, others.to(own.device)]), name=name).double()
    return both[: len(own)], both[len(own) :]
