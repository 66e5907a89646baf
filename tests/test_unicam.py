"""UniCAM in closed form against autograd through the n x n x d broadcast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastxkd
from fastxkd.cam import unicam_weights
from fastxkd.metrics import LayerScores
from tests import oracles

# (n, c, h, w) of the explained layer and the shape of the base's
SHAPES = [
    ((5, 1, 1, 1), (5, 1)),
    ((8, 5, 3, 2), (8, 7)),
    ((32, 16, 7, 7), (32, 16, 7, 7)),
    ((33, 12, 5, 4), (33, 6, 10, 8)),
]


def batch(
    shape: tuple[int, ...], base: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.arange(shape[0]) % 3
    shift = labels.to(torch.float64)
    a = torch.randn(shape, dtype=torch.float64) + shift[:, None, None, None]
    b = torch.randn(base, dtype=torch.float64)
    b += shift.reshape(-1, *[1] * (len(base) - 1)) * 0.7
    return a.to(dtype), b.to(dtype), labels


def one_hot(labels: Tensor) -> Tensor:
    return nn.functional.one_hot(labels).double()


def relative(found: Tensor, true: Tensor) -> float:
    return ((found.double() - true).norm() / true.norm()).item()


@pytest.mark.parametrize(("shape", "base"), SHAPES, ids=str)
def test_weights_are_the_gradient(shape: Any, base: Any) -> None:
    a, b, labels = batch(shape, base)
    true = oracles.unicam_weights(a, b, one_hot(labels))
    found = unicam_weights(a, b, labels)
    assert found.shape == shape[:2]
    assert found.dtype == torch.float64
    assert relative(found, true) < 1e-10


@pytest.mark.parametrize("objective", ["semi_partial", "partial"])
def test_four_images_leave_nothing_beside_a_base(objective: Any) -> None:
    a, b, labels = batch((4, 6, 4, 4), (4, 5))
    with pytest.raises(ValueError, match="activations: expected at least 5, got 4: beside a base"):
        unicam_weights(a, b, labels, objective=objective)
    assert unicam_weights(a, b, objective="residual_argmax").abs().max() > 1e-3
    own, others = (x[:1] for x in (a, b, labels)), (a, b, labels)
    assert unicam_weights(*own, objective=objective, reference=others).shape == (1, 6)
    conv = nn.Sequential(nn.Conv2d(3, 4, 3))
    unicam = fastxkd.UniCAM(conv, conv, "0", objective=objective)
    with pytest.raises(ValueError, match="images: expected at least 5, got 4"):
        unicam(torch.rand(4, 3, 8, 8), labels)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-3), (torch.float16, 1e-3)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(("shape", "base"), SHAPES[1:], ids=str)
def test_weights_in_low_precision(shape: Any, base: Any, dtype: torch.dtype, limit: float) -> None:
    """Features are rounded by their dtype, the computation is not."""
    a, b, labels = batch(shape, base, dtype)
    true = oracles.unicam_weights(a.double(), b.double(), one_hot(labels))
    found = unicam_weights(a, b, labels)
    assert found.dtype == torch.float32
    assert relative(found, true) < limit


def test_weights_of_wide_features() -> None:
    a, b, labels = batch((16, 64, 28, 28), (16, 64, 28, 28), torch.float32)
    true = oracles.unicam_weights(a.double(), b.double(), one_hot(labels))
    assert relative(unicam_weights(a, b, labels), true) < 1e-3


def test_label_embeddings() -> None:
    a, b, labels = batch((24, 6, 4, 4), (24, 5))
    embeddings = torch.randn(3, 10, dtype=torch.float64)[labels]
    true = oracles.unicam_weights(a, b, embeddings)
    assert relative(unicam_weights(a, b, embeddings), true) < 1e-10
    assert relative(unicam_weights(a, b, labels), true) > 1e-3
    # One-hot by hand is what indices stand for, whatever the classes are called.
    by_index = unicam_weights(a, b, labels)
    assert relative(unicam_weights(a, b, one_hot(labels)), by_index) < 1e-12
    assert relative(unicam_weights(a, b, 5 * labels + 100), by_index) < 1e-12


def test_layouts() -> None:
    a, b, labels = batch((24, 6, 4, 4), (24, 5, 3, 3))
    expected = unicam_weights(a, b, labels)
    last = torch.channels_last
    found = unicam_weights(
        a.contiguous(memory_format=last), b.contiguous(memory_format=last), labels
    )
    assert relative(found, expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_to_be_relevant_to(dtype: torch.dtype) -> None:
    a, b, labels = batch((12, 6, 4, 4), (12, 5), dtype)
    assert not unicam_weights(a, b, torch.full_like(labels, 2)).any()
    assert not unicam_weights(torch.ones_like(a), b, labels).any()


def test_constant_base_takes_nothing_out() -> None:
    a, b, labels = batch((12, 6, 4, 4), (12, 5))
    leaf = a.clone().requires_grad_(True)
    oracles.correlation(leaf, one_hot(labels), unbiased=True).backward()
    found = unicam_weights(a, torch.ones_like(b), labels)
    assert relative(found, leaf.grad.mean((2, 3))) < 1e-10


def test_duplicate_images() -> None:
    a, b, labels = batch((12, 6, 4, 4), (12, 5))
    a[4], b[4] = a[1], b[1]
    true = oracles.unicam_weights(a, b, one_hot(labels))
    assert relative(unicam_weights(a, b, labels), true) < 1e-10


# --- the explainer


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(True))
        self.two = nn.Sequential(nn.Conv2d(width, 8, 3, stride=2), nn.ReLU(True))
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.two(self.one(images)).mean((2, 3)))


@pytest.fixture
def models() -> tuple[Net, Net]:
    return Net().eval(), Net(7).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(12, 3, 18, 14)


LABELS = torch.arange(12) % 3


def kept(model: Net, layer: str, images: Tensor) -> Tensor:
    with torch.no_grad(), fastxkd.capture(model, layer) as captured:
        model(images)
    return captured.activations[layer]


def assert_scores(found: list[LayerScores], expected: list[LayerScores]) -> None:
    for row, true in zip(found, expected, strict=True):
        assert row.layer == true.layer
        assert row[1:] == pytest.approx(true[1:], abs=1e-6)


def test_maps_and_scores(models: tuple[Net, Net], images: Tensor) -> None:
    student, base = models
    out = fastxkd.UniCAM(student, base, ["two"])(images, LABELS)
    a, b = kept(student, "two", images), kept(base, "two", images)
    g = one_hot(LABELS)
    for found, x, y in ((out.distilled, a, b), (out.residual, b, a)):
        assert found.shape == (12, 18, 14)
        assert found.dtype == torch.float32
        assert 0 <= found.min() <= found.max() <= 1
        weights = oracles.unicam_weights(x.double(), y.double(), g)
        raw = oracles.cam_raw(x.double(), weights, "weights")
        true = oracles.cam_finish(raw, (18, 14), True, 2)
        torch.testing.assert_close(found.double(), true, rtol=0, atol=5e-3)
    assert_scores(out.scores, fastxkd.layer_scores({"two": a}, {"two": b}, LABELS))
    assert not out.distilled.requires_grad


def test_exact_in_float64(models: tuple[Net, Net], images: Tensor) -> None:
    student, base = (m.double() for m in models)
    images = images.double()
    out = fastxkd.UniCAM(student, base, ["one"])(images, LABELS, size=None, normalize=None)
    a, b = kept(student, "one", images), kept(base, "one", images)
    weights = oracles.unicam_weights(a, b, one_hot(LABELS))
    true = oracles.cam_raw(a, weights, "weights").clamp(min=0)
    assert out.distilled.shape == (12, 16, 12)
    assert out.distilled.dtype == torch.float64
    torch.testing.assert_close(out.distilled, true, rtol=1e-9, atol=1e-12)


def test_swapped_models_swap_the_maps(models: tuple[Net, Net], images: Tensor) -> None:
    student, base = models
    layers = ["one", "two"]
    there = fastxkd.UniCAM(student, base, layers)(images, LABELS)
    back = fastxkd.UniCAM(base, student, layers)(images, LABELS)
    torch.testing.assert_close(there.distilled, back.residual, rtol=0, atol=1e-5)
    torch.testing.assert_close(there.residual, back.distilled, rtol=0, atol=1e-5)
    assert not torch.allclose(there.distilled, there.residual, atol=1e-2)
    for a, b in zip(there.scores, back.scores, strict=True):
        assert a.rs_distilled == pytest.approx(b.rs_residual, abs=1e-5)
        assert a.fss == pytest.approx(b.fss, abs=1e-5)


def test_several_layers_are_the_mean(models: tuple[Net, Net], images: Tensor) -> None:
    student, base = (m.double() for m in models)
    images = images.double()
    each = [fastxkd.UniCAM(student, base, [layer])(images, LABELS) for layer in ("one", "two")]
    both = fastxkd.UniCAM(student, base, ["one", "two"])(images, LABELS)
    assert [row.layer for row in both.scores] == ["one", "two"]
    for row, single in zip(both.scores, each, strict=True):
        assert row.rs_distilled == pytest.approx(single.scores[0].rs_distilled, abs=1e-9)
    # Each map is scaled to [0, 1] at its own resolution, then they are averaged and scaled again.
    maps = []
    for layer in ("one", "two"):
        a, b = kept(student, layer, images), kept(base, layer, images)
        weights = unicam_weights(a, b, LABELS)
        # Min-max has an epsilon, which does not see how small a gradient of the batch is.
        weights /= weights.abs().amax(1, keepdim=True)
        raw = oracles.cam_raw(a, weights, "weights")
        maps.append(oracles.cam_finish(raw, (18, 14), True, 1))
    true = oracles.cam_finish(torch.stack(maps).mean(0), (18, 14), False, 1)
    torch.testing.assert_close(both.distilled, true, rtol=0, atol=1e-9)


def test_layers_pair_by_order(models: tuple[Net, Net], images: Tensor) -> None:
    student, base = models
    unicam = fastxkd.UniCAM(student, base, target_layers=[student.two], base_layers=["one"])
    out = unicam(images, LABELS, size=None)
    assert out.distilled.shape == (12, 7, 5)
    a, b = kept(student, "two", images), kept(base, "one", images)
    assert_scores(out.scores, fastxkd.layer_scores({"two": a}, {"one": b}, LABELS))


def test_embeddings(models: tuple[Net, Net], images: Tensor) -> None:
    unicam = fastxkd.UniCAM(*models, ["two"])
    indexed, embedded = unicam(images, LABELS), unicam(images, one_hot(LABELS).float())
    torch.testing.assert_close(indexed.distilled, embedded.distilled, rtol=0, atol=1e-5)


def test_one_class_only(models: tuple[Net, Net], images: Tensor) -> None:
    out = fastxkd.UniCAM(*models, ["two"])(images, torch.zeros(12, dtype=torch.int64))
    assert not out.distilled.any()
    assert not out.residual.any()
    assert out.scores[0].rs_distilled == 0


@pytest.mark.parametrize("fails", [False, True])
def test_models_are_left_as_they_were(models: tuple[Net, Net], images: Tensor, fails: bool) -> None:
    for model in models:
        model.train()
        model.two.eval()
        model.head.weight.grad = torch.ones_like(model.head.weight)

    def state() -> list[Any]:
        return [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            for model in models
            for m in model.modules()
        ] + [torch.is_grad_enabled()]

    before = state()
    values = [v.clone() for model in models for v in model.state_dict().values()]
    unicam = fastxkd.UniCAM(*models, ["one", "two"])
    if fails:
        with pytest.raises(RuntimeError):
            unicam(torch.randn(12, 5, 18, 14), LABELS)
    else:
        with torch.inference_mode():
            inside = unicam(images, LABELS)
        out = unicam(images, LABELS)
        assert torch.equal(inside.distilled, out.distilled)
    assert state() == before
    after = [v for model in models for v in model.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(after, values, strict=True))
    assert all((model.head.weight.grad == 1).all() for model in models)


def test_memory_does_not_hold_the_broadcast() -> None:
    a, b, labels = batch((32, 64, 28, 28), (32, 64, 28, 28), torch.float32)
    peak = oracles.peak_bytes(lambda: unicam_weights(a, b, labels))
    broadcast = 32 * a.numel() * a.element_size()
    assert peak < broadcast / 50
