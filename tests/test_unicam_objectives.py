"""Every objective of UniCAM in closed form against autograd through its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastxkd
from fastxkd.cam import unicam_weights
from fastxkd.cam.unicam import class_prototypes
from tests import oracles

OBJECTIVES = ["semi_partial", "partial", "residual_argmax"]
SHAPES = [((8, 5, 3, 2), (8, 7)), ((21, 6, 5, 4), (21, 6, 10, 8)), ((12, 4, 2, 3, 2), (12, 9))]


def naive(a: Tensor, base: Tensor, labels: Tensor, objective: str) -> Tensor:
    """``dJ/da`` by autograd, of n x n x d differences."""
    leaf = a.detach().requires_grad_(True)
    p, c, g = (oracles.u_centred(oracles.distances(x)) for x in (leaf, base, labels))
    c_norm = oracles.inner(c, c) + 1e-12
    residual = p - oracles.inner(p, c) / c_norm * c
    if objective == "residual_argmax":
        n = len(a)
        others = ~torch.eye(n, dtype=torch.bool)
        score = sum((residual[i][others[i]].max() for i in range(n)), torch.zeros(()))
    else:
        if objective == "partial":
            g = g - oracles.inner(g, c) / c_norm * c
        norms = oracles.inner(residual, residual) * oracles.inner(g, g)
        score = oracles.inner(residual, g) / (norms + 1e-18).sqrt()
    return torch.autograd.grad(score, leaf)[0]


def batch(shape: Any, base: Any, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    labels = torch.arange(shape[0]) % 3
    shift = labels.double()
    a, b = (
        torch.randn(s, dtype=torch.float64) + k * shift.reshape(-1, *[1] * (len(s) - 1))
        for s, k in ((shape, 1.0), (base, 0.7))
    )
    return a.to(dtype), b.to(dtype), labels


def one_hot(labels: Tensor) -> Tensor:
    return nn.functional.one_hot(labels).double()


def given(labels: Tensor, objective: str) -> Tensor | None:
    return None if objective == "residual_argmax" else labels


def relative(found: Tensor, true: Tensor) -> float:
    return ((found.double() - true).norm() / true.norm()).item()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("shape", "base"), SHAPES, ids=str)
def test_weights_are_the_gradient(shape: Any, base: Any, objective: Any) -> None:
    a, b, labels = batch(shape, base)
    true = naive(a, b, one_hot(labels), objective).flatten(2).mean(2)
    found = unicam_weights(a, b, given(labels, objective), objective=objective)
    assert found.shape == shape[:2]
    assert relative(found, true) < 1e-10


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_in_low_precision(dtype: torch.dtype, objective: Any) -> None:
    a, b, labels = batch((21, 6, 5, 4), (21, 6, 10, 8), dtype)
    true = naive(a.double(), b.double(), one_hot(labels), objective).mean((2, 3))
    found = unicam_weights(a, b, given(labels, objective), objective=objective)
    assert found.dtype == torch.float32
    assert relative(found, true) < 1e-3


@pytest.mark.parametrize("objective", ["semi_partial", "partial"])
def test_objective_is_the_score_of_that_name(objective: Any) -> None:
    """Autograd through ``partial_distance_correlation`` gives the same weights."""
    a, b, labels = batch((15, 6, 4, 3), (15, 8))
    leaf = a.clone().requires_grad_(True)
    semi = objective == "semi_partial"
    score = fastxkd.partial_distance_correlation(leaf, one_hot(labels), given=b, semi_partial=semi)
    score.backward()
    found = unicam_weights(a, b, labels, objective=objective)
    assert relative(found, leaf.grad.mean((2, 3))) < 1e-8


def test_partial_is_semi_partial_of_another_size() -> None:
    """pdcor = P_DC / sqrt(1 - Corr(base, labels)^2), and the root does not depend on A."""
    a, b, labels = batch((15, 6, 4, 3), (15, 8))
    semi = unicam_weights(a, b, labels)
    c, g = (oracles.u_centred(oracles.distances(x)) for x in (b, one_hot(labels)))
    root = (1 - oracles.inner(c, g).square() / oracles.inner(c, c) / oracles.inner(g, g)).sqrt()
    assert root < 0.99
    assert relative(unicam_weights(a, b, labels, objective="partial"), semi / root) < 1e-9
    residual = unicam_weights(a, b, objective="residual_argmax")
    unit = [w / w.norm(dim=1, keepdim=True) for w in (semi, residual)]
    assert relative(*unit) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nothing_left_beside_the_base(dtype: torch.dtype, objective: Any) -> None:
    """The base's distances are the student's, but for their scale and their rounding."""
    a, _, labels = batch((12, 6, 4, 4), (12, 5), dtype)
    targets = given(labels, objective)
    assert not unicam_weights(a, a.clone(), targets, objective=objective).any()
    assert not unicam_weights(a, 3 * a + 1, targets, objective=objective).any()
    assert unicam_weights(a, a.square(), targets, objective=objective).any()


def test_labels_that_the_base_explains() -> None:
    a, _, labels = batch((12, 6, 4, 4), (12, 5))
    base = 2 * one_hot(labels)
    assert not unicam_weights(a, base, labels, objective="partial").any()
    assert unicam_weights(a, base, labels, objective="semi_partial").any()


def test_targets_and_objectives_that_do_not_fit() -> None:
    a, b, labels = batch((8, 5, 3, 2), (8, 7))
    with pytest.raises(ValueError, match="targets: expected None, residual_argmax has no use"):
        unicam_weights(a, b, labels, objective="residual_argmax")
    with pytest.raises(TypeError, match="targets: partial expects a Tensor, got NoneType"):
        unicam_weights(a, b, objective="partial")
    with pytest.raises(ValueError, match=r"objective: expected one of semi_partial, .*got 'pdc'"):
        unicam_weights(a, b, labels, objective="pdc")  # type: ignore[arg-type]
    net = nn.Sequential(nn.Conv2d(1, 2, 3))
    with pytest.raises(ValueError, match=r"objective: expected one of semi_partial, .*got 'pdc'"):
        fastxkd.UniCAM(net, net, ["0"], objective="pdc")  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_explainer_takes_the_objective(objective: Any) -> None:
    student, base = (nn.Sequential(nn.Conv2d(2, k, 3), nn.ReLU()).double() for k in (4, 5))
    images, labels = torch.randn(9, 2, 8, 7, dtype=torch.float64), torch.arange(9) % 3
    unicam = fastxkd.UniCAM(student, base, ["1"], objective=objective)
    out = unicam(images, labels, size=None, normalize=None)
    with torch.no_grad():
        a, b = student(images), base(images)
    for found, x, y in ((out.distilled, a, b), (out.residual, b, a)):
        weights = naive(x, y, one_hot(labels), objective).mean((2, 3))
        true = oracles.cam_raw(x, weights, "weights").clamp(min=0)
        torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-12)


# --- what class indices stand for


def test_class_prototypes() -> None:
    features, labels = torch.randn(10, 2, 3, dtype=torch.float64), torch.arange(10) % 4
    found = class_prototypes(features, labels)
    flat = features.flatten(1)
    for k in range(4):
        mean = torch.stack([x / x.norm() for x, y in zip(flat, labels, strict=True) if y == k])
        true = mean.mean(0) / mean.mean(0).norm()
        torch.testing.assert_close(found[k], true, rtol=1e-12, atol=1e-12)
    assert class_prototypes(features.half(), labels).dtype == torch.float32


def test_class_prototypes_of_what_is_not_there() -> None:
    x = torch.rand(4, 3)
    for features, labels, message in (
        (x, torch.tensor([0, 0, 2, 2]), "labels: class 1 of 0 ... 2 has no feature"),
        (x, torch.arange(3), "labels: expected 4, one per feature, got 3"),
        (x, torch.rand(4), "labels: expected int64 class indices"),
        (x[:, 0], torch.arange(4), r"features: expected \[n, ...\], got \[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            class_prototypes(features, labels)
    with pytest.raises(TypeError, match="features: expected a floating-point dtype"):
        class_prototypes(torch.arange(4)[:, None], torch.arange(4))
    with pytest.raises(TypeError, match="labels: expected a Tensor, got list"):
        class_prototypes(x, [0, 1, 2, 3])  # type: ignore[arg-type]


def test_class_embeddings_stand_for_indices() -> None:
    student, base = (nn.Sequential(nn.Conv2d(2, k, 3), nn.ReLU()) for k in (4, 5))
    images, labels = torch.randn(12, 2, 8, 7), torch.arange(12) % 3
    table = class_prototypes(torch.randn(12, 10), labels)
    named = fastxkd.UniCAM(student, base, ["1"], class_embeddings=table)
    plain = fastxkd.UniCAM(student, base, ["1"])
    found, expected, other = (
        named(images, labels),
        plain(images, table[labels]),
        plain(images, labels),
    )
    assert torch.equal(found.distilled, expected.distilled)
    assert found.scores == expected.scores
    assert not torch.allclose(found.distilled, other.distilled, atol=1e-3)
    # Embeddings given image by image are what they are, also beside a table.
    assert torch.equal(named(images, table[labels]).residual, expected.residual)
    with pytest.raises(ValueError, match="expected 0 <= class < 3, the class_embeddings, got 3"):
        named(images, labels + 1)
    with pytest.raises(ValueError, match=r"class_embeddings: expected floats \[classes, e\]"):
        fastxkd.UniCAM(student, base, ["1"], class_embeddings=labels)
    with pytest.raises(TypeError, match="class_embeddings: expected a Tensor, got list"):
        fastxkd.UniCAM(student, base, ["1"], class_embeddings=[[1.0]])  # type: ignore[arg-type]
