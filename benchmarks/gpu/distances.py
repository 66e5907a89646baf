"""Distance correlation, and the sums that scores of many layers are made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.stage import Stage, Variant, on_backend


def gram_products(features: list[Tensor]) -> Callable[[], object]:
    """Of the tiles of one triangle, in float32: what no method by products can avoid."""
    from fastxkd.ops import _distance_gpu

    rows = _distance_gpu.tile_rows([x.shape[1] for x in features], features[0].dtype)
    out = torch.empty(rows, rows, dtype=features[0].dtype, device=features[0].device)

    def call() -> None:
        with _distance_gpu.full_precision(out):
            for x in features:
                strips = x.split(rows)
                for i, left in enumerate(strips):
                    for right in strips[i:]:
                        torch.mm(left, right.T, out=out[: len(left), : len(right)])

    return call


def distance_kernels(stage: Stage) -> None:
    """Distance correlation, and the sums that scores of many layers are made of; by backend, and
    in plain torch."""
    import fastxkd
    from fastxkd.ops.distance import distance_sums

    device = stage.clock.device
    torch.manual_seed(0)
    n, width = stage.plan.samples
    x, y = torch.randn(n, width, device=device), torch.randn(n, width, device=device)
    leaf = x.clone().requires_grad_(True)
    case = f"distance_correlation {n}x{width} float32"

    def backward() -> None:
        fastxkd.distance_correlation(leaf, y).backward()
        leaf.grad = None

    def deviation() -> str:
        few, others = x[:512], y[:512]
        found = fastxkd.distance_correlation(few, others).item()
        with fastxkd.use_backend("reference"):
            exact = fastxkd.distance_correlation(few.double(), others.double()).item()
        return f"off by {abs(found - exact):.1e}"

    backends = list(dict.fromkeys([*stage.plan.backends, "reference"]))
    stage.measure(case, Variant("floor: Gram products", gram_products([x, y])), None)
    for backend in backends:
        forward = partial(fastxkd.distance_correlation, x, y)
        note = on_backend(backend, deviation)
        stage.measure(case, Variant(backend, on_backend(backend, forward), note=note), None)
        both = Variant(f"{backend}, with backward", on_backend(backend, backward))
        stage.measure(case, both, None)

    count, n, width = stage.plan.layers
    features = [torch.randn(n, width, device=device) for _ in range(count - 1)]
    features.append(torch.eye(10, device=device)[torch.arange(n, device=device) % 10])
    names = [str(k) for k in range(count)]
    case = f"distance sums of {count} matrices {n}x{width} float32"
    stage.measure(case, Variant("floor: Gram products", gram_products(features[:-1])), None)
    for backend in backends:
        if backend != "reference":  # n x n differences of a thousand numbers: minutes
            call = partial(distance_sums, features, names)
            stage.measure(case, Variant(backend, on_backend(backend, call)), None)
