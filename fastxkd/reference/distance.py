"""distance in plain torch: strips of rows against all rows, differences taken exactly."""

from __future__ import annotations

import torch
from torch import Tensor

STRIP_BYTES = 1 << 26


def _strips(features: list[Tensor]) -> range:
    n = features[0].shape[0]
    return range(0, n, max(1, STRIP_BYTES // (8 * max(n, 1) * len(features))))


def _flat(features: list[Tensor]) -> list[Tensor]:
    wide = any(f.dtype == torch.float64 for f in features)
    exact = torch.float64 if wide else torch.float32
    return [f.reshape(f.shape[0], -1).to(exact) for f in features]


def _strip_distances(feature: Tensor, begin: int, end: int) -> Tensor:
    d = torch.cdist(
        feature[begin:end], feature, compute_mode="donot_use_mm_for_euclid_dist"
    )  # [end - begin, n]
    return d.double()


def distance(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    flat = _flat(features)
    n, k = flat[0].shape[0], len(flat)
    products = flat[0].new_zeros(k, k, dtype=torch.float64)
    row_sums = flat[0].new_zeros(k, n, dtype=torch.float64)
    strips = _strips(flat)
    for begin in strips:
        end = min(begin + strips.step, n)
        strip = torch.stack([_strip_distances(f, begin, end).flatten() for f in flat])
        products += strip @ strip.T
        row_sums[:, begin:end] = strip.view(k, end - begin, n).sum(2)
    return products, row_sums


def distance_backward(
    features: list[Tensor], grad_products: Tensor, grad_row_sums: Tensor, wanted: list[bool]
) -> list[Tensor]:
    flat = _flat(features)
    n, k = flat[0].shape[0], len(flat)
    symmetric = 2 * (grad_products + grad_products.T)
    grads = [
        torch.zeros_like(f) if w else f.new_empty(0) for f, w in zip(flat, wanted, strict=True)
    ]
    strips = _strips(flat)
    for begin in strips:
        end = min(begin + strips.step, n)
        strip = torch.stack([_strip_distances(f, begin, end) for f in flat])  # [k, rows, n]
        on_distance = torch.einsum("kl,lij->kij", symmetric, strip)
        on_distance += grad_row_sums[:, begin:end, None] + grad_row_sums[:, None, :]
        v = torch.where(strip == 0, 0, on_distance / strip)
        for index in range(k):
            if wanted[index]:
                weight, x = v[index].to(flat[index].dtype), flat[index]
                pulled = weight.sum(1, keepdim=True) * x[begin:end] - weight @ x
                grads[index][begin:end] += pulled
    return [
        g.view(f.shape).to(f.dtype) if w else f.new_empty(0)
        for g, f, w in zip(grads, features, wanted, strict=True)
    ]


def distance_matrix(features: Tensor) -> Tensor:
    (flat,) = _flat([features])
    return torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
