"""UniCAM's channel weights in closed form, against autograd through the published definition, and
whole calls, against the two models' forward passes.

The naive form writes the distances as the formula does, with every difference of two samples in
memory: n x n x d numbers. The floor of the weights is one reading of the two activations.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

import fastxkd
from benchmarks import _machine
from benchmarks._harness import Case, Spec, main
from benchmarks.cam import resnet50
from fastxkd.cam import unicam_weights

TESTS = [
    "tests/test_unicam.py",
    "tests/test_unicam_objectives.py",
    "tests/test_unicam_features.py",
    "tests/test_unicam_reference.py",
]
# As published.
SCORE_EPS = 1e-18
PROJECTION_EPS = 1e-12


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


def _inputs(n: int, channels: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Activations of two models that share something, also with the labels. Made in place: at
    n = 1024 each is 400 MB."""
    classes = max(2, n // 4)
    labels = torch.eye(classes)[torch.arange(n) % classes]
    pattern = 0.3 * (labels @ torch.randn(classes, channels))[:, :, None, None]
    shape = (n, channels, side, side)
    base = torch.randn(shape).add_(pattern).clamp_(min=0)
    activations = torch.randn(shape).add_(pattern).add_(base, alpha=0.5).clamp_(min=0)
    return activations, base, labels


def case(n: int, channels: int, side: int) -> Case:
    inputs = _inputs(n, channels, side)
    activations, base, _ = inputs

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


def many(n: int, channels: int, side: int) -> Case:
    """More samples than the naive form has memory for: n x n x d numbers, several times."""
    inputs = _inputs(n, channels, side)
    activations, base, _ = inputs
    given = sum(x.numel() * x.element_size() for x in inputs)

    def ours() -> Tensor:
        return unicam_weights(*inputs)

    def notes() -> dict[str, str]:
        with_inputs = (given + _machine.peak_allocated(ours)) / 1e9
        naive = n * n * activations[0].numel() * activations.element_size() / 1e9
        text = (
            f"{with_inputs:.2f} GB with its inputs of {given / 1e9:.2f} GB; one of the naive"
            f" form's broadcasts: {naive:,.0f} GB"
        )
        return {"ours": text}

    variants = {"floor: read both": lambda: (activations.sum(), base.sum()), "ours": ours}
    return Case(variants, 2 * activations.numel() * activations.element_size(), notes)


def calls(student: nn.Module, base: nn.Module, layer: str, images: Tensor, bank: int) -> Case:
    """Both maps and the scores of a batch, against the forward passes of the two models."""
    labels = torch.arange(len(images)) % 8
    unicam = fastxkd.UniCAM(student, base, [layer])
    references: list[fastxkd.cam.unicam.UniCAMReference] = []

    def forward() -> None:
        with torch.no_grad():
            student(images)
            base(images)

    def against() -> Tensor:
        if not references:  # at the first call, which is not timed
            others = torch.randn(bank, *images.shape[1:])
            parts = (x.split(len(images)) for x in (others, torch.arange(bank) % 8))
            references.append(unicam.reference([*zip(*parts, strict=True)], samples=bank))
        return unicam(images, labels, reference=references[0]).distilled

    variants = {
        "floor: two forwards": forward,
        f"ours, against {bank} others": against,
        "ours": lambda: unicam(images, labels).distilled,
    }
    return Case(variants)


def resnets(batch: int, side: int, bank: int) -> Case:
    return calls(resnet50(), resnet50(), "layer4.2", torch.randn(batch, 3, side, side), bank)


def specs(quick: bool) -> list[Spec]:
    shapes = [(32, 2048, 7)] if quick else [(32, 2048, 7), (64, 512, 7)]
    found = [
        Spec(f"weights, n = {n}, {c}x{side}x{side}", partial(case, n, c, side), resident=not quick)
        for n, c, side in shapes
    ]
    if quick:
        return [*found, Spec("call, ResNet-50, 4 images, 96 px", partial(resnets, 4, 96, 8))]
    return [
        *found,
        Spec("weights, n = 1024, 2048x7x7", partial(many, 1024, 2048, 7), resident=True),
        Spec("call, ResNet-50, 32 images, 224 px", partial(resnets, 32, 224, 64), rounds=7),
    ]


if __name__ == "__main__":
    main("unicam", specs, TESTS, __doc__)
