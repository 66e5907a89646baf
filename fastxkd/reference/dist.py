"""DIST in plain torch: Pearson correlations along rows and columns, with the gradient.

With u and v two centred vectors, a and b their norms and rho = u.v / (a b + EPS),
d rho / d u = v / (a b + EPS) - rho b / (a (a b + EPS)) u.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8  # beside the product of the norms, as in the published code


def dist(
    student: Tensor, teacher: Tensor, on_row: Tensor, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """``alpha`` times 1 - the rows' mean correlation plus ``beta`` times that of the columns.

    Returns the value [] and its gradient [rows, classes] with respect to the softened student
    logits. ``on_row`` [rows] counts each row as often as it says; a row of 0 may hold anything.
    """
    classes = student.shape[1]
    counts = (on_row != 0)[:, None]
    # Selected, not multiplied by 0.
    q, p = (torch.where(counts, torch.softmax(x, 1), 0) for x in (student, teacher))
    weight = on_row[:, None]  # [rows, 1]
    total = on_row.sum()
    share = torch.where(total != 0, 1 / total, 0)
    value, slope = q.new_zeros(()), torch.zeros_like(q)
    if alpha != 0:
        u, v = (torch.where(counts, x - 1 / classes, 0) for x in (q, p))
        correlation, pull, push = _correlation(u, v, 1)
        mean = (correlation[:, 0] * on_row).sum() * share
        value = value + torch.where(total != 0, alpha * (1 - mean), 0)
        slope += alpha * share * weight * (pull * u - push * v)
    if beta != 0:
        # From the first row that counts: equal rows must leave nothing for 1 / EPS to magnify.
        first = counts.to(torch.int64).argmax(0)  # [1]
        u, v = (torch.where(counts, x - x.index_select(0, first), 0) for x in (q, p))
        u, v = (torch.where(counts, x - (weight * x).sum(0) * share, 0) for x in (u, v))
        root = weight.sqrt()
        correlation, pull, push = _correlation(root * u, root * v, 0)
        value = value + torch.where(total != 0, beta * (1 - correlation.mean()), 0)
        slope += beta / classes * weight * (pull * u - push * v)
    return value, q * (slope - (q * slope).sum(1, keepdim=True))


def _correlation(u: Tensor, v: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """rho along ``dim``, and the factors of u and of -v in the gradient of -rho."""
    a, b = (torch.linalg.vector_norm(x, dim=dim, keepdim=True) for x in (u, v))
    norms = a * b + EPS
    correlation = (u * v).sum(dim, keepdim=True) / norms
    # Without spread rho is 0, and stays 0.
    pull = torch.where(a > 0, correlation * b / (a * norms), 0)
    return correlation, pull, torch.where(b == 0, 0, 1 / norms)
