"""UniCAM's channel weights in closed form, against autograd through the published definition.

The naive form writes the distances as the formula does, with every difference of two samples in
memory: n x n x d numbers. The floor is one reading of the two activations.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks._harness import Case, Spec, main
from fastxkd.cam.unicam import PROJECTION_EPS, SCORE_EPS, unicam_weights

TESTS = ["tests/test_unicam.py"]


def _distances(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    squares = (flat[:, None] - flat[None, :]).square().sum(2)  # [n, n, d] on the way
    apart = squares > 0
    return torch.where(apart, squares.where(apart, 1).sqrt(), 0)


def _centred(d: Tensor) -> Tensor:
    n = len(d)
    means = d.sum(0) / (n - 2)
    off_diagonal = ~torch.eye(n, dtype=torch.bool)
    centred = d - means[:, None] - means[None, :] + d.sum() / ((n - 1) * (n - 2))
    return centred * off_diagonal


def naive_weights(activations: Tensor, base: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the semi-partial distance correlation, averaged over positions."""
    leaf = activations.detach().requires_grad_()
    a, c, t = (_centred(_distances(x)) for x in (leaf, base, labels))
    n = len(a)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum() / (n * (n - 3))

    rest = a - inner(a, c) / (inner(c, c) + PROJECTION_EPS) * c
    score = inner(rest, t) / (inner(rest, rest) * inner(t, t) + SCORE_EPS).sqrt()
    (gradient,) = torch.autograd.grad(score, leaf)
    return gradient.mean((2, 3))


def _difference(activations: Tensor, base: Tensor, labels: Tensor) -> float:
    naive = naive_weights(activations, base, labels)
    return float((unicam_weights(activations, base, labels) - naive).norm() / naive.norm())


def case(n: int, channels: int, side: int) -> Case:
    labels = torch.eye(max(2, n // 4))[torch.arange(n) % max(2, n // 4)]
    pattern = labels @ torch.randn(labels.shape[1], channels)
    shape = (n, channels, side, side)
    base = (torch.randn(shape) + 0.3 * pattern[:, :, None, None]).clamp(min=0)
    activations = (0.5 * base + torch.randn(shape) + 0.3 * pattern[:, :, None, None]).clamp(min=0)
    inputs = (activations, base, labels)

    def notes() -> dict[str, str]:
        single, double = _difference(*inputs), _difference(*(x.double() for x in inputs))
        text = f"differs from naive by {single:.1e} of it in float32, {double:.1e} in float64"
        return {"ours": text}

    variants = {
        "floor: read both": lambda: (activations.sum(), base.sum()),
        "naive autograd": lambda: naive_weights(*inputs),
        "ours": lambda: unicam_weights(*inputs),
    }
    return Case(variants, 2 * activations.numel() * activations.element_size(), notes)


def specs(quick: bool) -> list[Spec]:
    shapes = [(32, 2048, 7)] if quick else [(32, 2048, 7), (64, 512, 7)]
    return [
        Spec(f"weights, n = {n}, {c}x{side}x{side}", partial(case, n, c, side), resident=not quick)
        for n, c, side in shapes
    ]


if __name__ == "__main__":
    main("unicam", specs, TESTS, __doc__)
