"""UniCAM against a memory bank: an image's map is its own, whoever else is in the batch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastxkd
from fastxkd.cam import _unicam_distances, unicam_weights
from tests import oracles
from tests.test_unicam_objectives import OBJECTIVES, given, naive, one_hot


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(True))
        self.two = nn.Sequential(nn.Conv2d(width, 8, 3, stride=2), nn.ReLU(True))
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return self.pool(self.two(self.one(images))).flatten(1)


@pytest.fixture
def models() -> tuple[Net, Net]:
    return Net().double().eval(), Net(7).double().eval()


def data(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    labels = torch.arange(n) % 3
    images = torch.randn(n, 3, 14, 10, dtype=torch.float64) + 0.5 * labels[:, None, None, None]
    return images.to(dtype), labels


def relative(found: Tensor, true: Tensor) -> float:
    return ((found.double() - true).norm() / true.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("m", [4, 5, 40])
def test_each_sample_joins_the_reference_alone(m: int, objective: Any, dtype: torch.dtype) -> None:
    n, labels = 6, torch.arange(6 + m) % 3
    a = torch.randn(n + m, 5, 4, 3, dtype=torch.float64) + labels[:, None, None, None]
    b = torch.randn(n + m, 9, dtype=torch.float64) + 0.5 * labels[:, None]
    a, b = a.to(dtype), b.to(dtype)
    targets = given(labels[:n], objective)
    reference = (a[n:], b[n:]) if targets is None else (a[n:], b[n:], labels[n:])
    found = unicam_weights(a[:n], b[:n], targets, objective=objective, reference=reference)
    true = []
    for i in range(n):
        one = [torch.cat([x[n:], x[i : i + 1]]).double() for x in (a, b, one_hot(labels))]
        true.append(naive(*one, objective)[-1].mean((1, 2)))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(found, torch.stack(true)) < (1e-9 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("features", [None, "pool"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_maps_do_not_depend_on_company(
    models: tuple[Net, Net], objective: Any, features: str | None
) -> None:
    images, labels = data(30)
    bank, others = slice(0, 16), (torch.randn(5, 3, 14, 10).double() * 9, torch.arange(5))
    unicam = fastxkd.UniCAM(*models, ["one", "two"], features=features, objective=objective)
    reference = unicam.reference(images[bank], labels[bank])
    together = unicam(images[16:], labels[16:], reference=reference)
    assert together.distilled.shape == (14, 14, 10)
    for i in (0, 7, 13):
        own = slice(16 + i, 17 + i)
        alone = unicam(images[own], labels[own], reference=reference)
        strangers = torch.cat([others[0], images[own]]), torch.cat([others[1], labels[own]])
        crowd = unicam(*strangers, reference=reference)
        for kind in ("distilled", "residual"):
            expected = getattr(together, kind)[i]
            for out, at in ((alone, 0), (crowd, 5)):
                torch.testing.assert_close(getattr(out, kind)[at], expected, rtol=0, atol=1e-8)
        assert alone.scores == together.scores
    # Compared with each other, they do depend on it.
    first, second = unicam(images[16:24], labels[16:24]), unicam(images[16:], labels[16:])
    assert not torch.allclose(first.distilled, second.distilled[:8], atol=1e-2)


def test_maps_do_not_depend_on_company_in_float32(models: tuple[Net, Net]) -> None:
    student, base = (model.float() for model in models)
    images, labels = data(40, torch.float32)
    unicam = fastxkd.UniCAM(student, base, ["two"])
    reference = unicam.reference(images[:16], labels[:16])
    # Half of them are in the reference set as well.
    together = unicam(images[8:24], labels[8:24], reference=reference)
    for i in range(16):
        own = slice(8 + i, 9 + i)
        alone = unicam(images[own], labels[own], reference=reference)
        torch.testing.assert_close(alone.distilled[0], together.distilled[i], rtol=0, atol=1e-3)


def test_an_image_that_is_in_the_reference() -> None:
    """Nothing points from an image to itself, also where two passes round it differently."""
    labels = torch.arange(20) % 3
    a = torch.randn(20, 5, 4, 3, dtype=torch.float64) + labels[:, None, None, None]
    b = torch.randn(20, 9, dtype=torch.float64) + 0.5 * labels[:, None]
    true = []
    for i in range(4):
        one = [torch.cat([x, x[i : i + 1]]) for x in (a, b, one_hot(labels))]
        true.append(naive(*one, "semi_partial")[-1].mean((1, 2)))
    for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        reference = (a.to(dtype), b.to(dtype), labels)
        for noise in (0.0, 4 * torch.finfo(dtype).eps):
            x, y = (t[:4] * (1 + noise * torch.randn(t[:4].shape)) for t in (a, b))
            found = unicam_weights(x.to(dtype), y.to(dtype), labels[:4], reference=reference)
            assert relative(found, torch.stack(true)) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_distances_keep_their_digits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of near neighbours, far from the origin, in many panels."""
    monkeypatch.setattr(_unicam_distances, "PANEL_ELEMENTS", 256)
    monkeypatch.setattr(_unicam_distances, "FEWEST_COLUMNS", 32)
    x = torch.randn(20, 333, dtype=torch.float64) + 100
    x[1::4] = x[::4] * (1 + 1e-3 * torch.randn(5, 333))
    x = x.to(dtype)
    x[3] = x[2]
    true = oracles.distances(x.double())
    limit = 1e-6 if dtype == torch.float32 else 1e-11
    own = _unicam_distances.own_distances(x, "x", 20)
    torch.testing.assert_close(own, true, rtol=limit, atol=0)
    assert torch.equal(own, own.T)
    cross = _unicam_distances.cross_distances(x[:7], x[5:])
    torch.testing.assert_close(cross, true[:7, 5:], rtol=limit, atol=0)
    assert cross[5, 0] == cross[6, 1] == own[2, 3] == 0


def test_autocast_does_not_reach_the_statistics() -> None:
    labels = torch.arange(12) % 3
    a, b = torch.randn(12, 5, 8, 8) + labels[:, None, None, None], torch.randn(12, 9)
    for reference in (None, (a[4:], b[4:], labels[4:])):
        outside = unicam_weights(a, b, labels, reference=reference)
        with torch.autocast("cpu", torch.bfloat16):
            inside = unicam_weights(a, b, labels, reference=reference)
        assert torch.equal(inside, outside)


def test_two_threads_on_one_explainer(models: tuple[Net, Net]) -> None:
    images, labels = data(40)
    unicam = fastxkd.UniCAM(*models, ["one", "two"], features=[None, "pool"])
    reference = unicam.reference(images[:16], labels[:16])
    parts = [slice(16, 24), slice(24, 40)] * 4
    expected = [unicam(images[p], labels[p], reference=reference).distilled for p in parts]
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda p: unicam(images[p], labels[p], reference=reference), parts)
        for out, true in zip(found, expected, strict=True):
            torch.testing.assert_close(out.distilled, true, rtol=0, atol=1e-8)
    assert not any(len(m._forward_hooks) for model in models for m in model.modules())


def test_reference_from_a_loader(models: tuple[Net, Net]) -> None:
    images, labels = data(18)
    unicam = fastxkd.UniCAM(*models, ["two"])
    loader = DataLoader(TensorDataset(images, labels), batch_size=5)
    there, here = unicam.reference(loader), unicam.reference(images, labels)
    assert len(there) == len(here) == 18
    assert torch.equal(there.labels, here.labels)
    for a, b in ((there.student, here.student), (there.base, here.base)):
        torch.testing.assert_close(a[0].features, b[0].features, rtol=0, atol=1e-12)
        torch.testing.assert_close(a[0].distances, b[0].distances, rtol=0, atol=1e-9)
    with torch.no_grad():
        (bank,), direct = here.student, models[0].two(models[0].one(images))
    torch.testing.assert_close(bank.features, direct, rtol=0, atol=1e-12)
    torch.testing.assert_close(bank.pooled, direct.mean((2, 3)), rtol=0, atol=1e-12)
    torch.testing.assert_close(bank.distances, oracles.distances(direct), rtol=0, atol=1e-9)
    features = [{"two": side[0].features} for side in (here.student, here.base)]
    (expected,) = fastxkd.layer_scores(*features, labels)
    assert here.scores[0][1:] == pytest.approx(expected[1:], abs=1e-9)


def test_reference_is_small_and_balanced(models: tuple[Net, Net]) -> None:
    """Of data sorted by class, as folders are, each class has its share."""
    images, _ = data(60)
    labels = torch.tensor([7] * 40 + [2] * 15 + [5] * 5)
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    unicam = fastxkd.UniCAM(*models, ["two"], features="pool")
    reference = unicam.reference(loader, samples=12)
    assert sorted(reference.labels.tolist()) == [2] * 4 + [5] * 4 + [7] * 4
    (bank,) = reference.student
    first = [*range(4), *range(40, 44), *range(55, 59)]
    with torch.no_grad():
        direct = models[0].pool(models[0].two(models[0].one(images[first])))
    order = reference.labels.argsort(stable=True)
    expected = labels[first].argsort(stable=True)
    torch.testing.assert_close(bank.features[order], direct[expected], rtol=0, atol=1e-12)
    # No batch is kept alive by one of its rows, and what is not kept is not run.
    assert bank.features.untyped_storage().nbytes() == bank.features.nbytes
    assert models[0].seen < 40
    few = unicam.reference(loader, samples=4)
    assert len(few) == 4
    assert len(few.labels.unique()) == 3


def test_labels_of_every_kind(models: tuple[Net, Net]) -> None:
    images, labels = data(24)
    table = torch.randn(4, 10)
    plain = fastxkd.UniCAM(*models, ["two"])
    named = fastxkd.UniCAM(*models, ["two"], class_embeddings=table)
    bank, rest = slice(0, 16), slice(16, 24)
    by_class = named.reference(images[bank], labels[bank])
    embedded = plain.reference(images[bank], table[labels[bank]])
    indexed = plain.reference(images[bank], labels[bank])
    expected = plain(images[rest], table[labels[rest]], reference=embedded).distilled
    found = named(images[rest], labels[rest], reference=by_class).distilled
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    other = plain(images[rest], labels[rest], reference=indexed).distilled
    assert not torch.allclose(found, other, atol=1e-3)
    # A class that the reference set does not have is as far from each of its classes.
    stranger = plain(images[rest], torch.full((8,), 77), reference=indexed)
    assert stranger.distilled.isfinite().all()
    with pytest.raises(ValueError, match="expected class indices as in the reference set, got emb"):
        plain(images[rest], table[labels[rest]], reference=indexed)
    with pytest.raises(ValueError, match=r"expected \[10\] a row as in the reference set, got \[9"):
        plain(images[rest], table[labels[rest], :9], reference=embedded)
    # The first embeddings, there being no classes to balance.
    few = plain.reference(images, table[labels], samples=5)
    assert torch.equal(few.labels, table[labels[:5]])


def test_references_that_do_not_fit(models: tuple[Net, Net]) -> None:
    images, labels = data(12)
    unicam = fastxkd.UniCAM(*models, ["two"])
    one = fastxkd.UniCAM(*models, ["one"]).reference(images, labels)
    both = fastxkd.UniCAM(*models, ["one", "two"]).reference(images, labels)
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: unicam(images, labels, reference=one), ValueError, "reference: expected features"),
        (
            lambda: unicam(images, labels, reference=both),
            ValueError,
            "reference: expected one of 1",
        ),
        (lambda: unicam(images, labels, reference=images), TypeError, "what UniCAM.reference() re"),
        (lambda: unicam(images[:0], labels[:0], reference=one), ValueError, "of at least 1"),
        (lambda: unicam.reference(images[:3], labels[:3]), ValueError, "at least 4 samples, got 3"),
        (
            lambda: unicam.reference(images, labels, samples=3),
            ValueError,
            "samples: expected at le",
        ),
        (lambda: unicam.reference(images), TypeError, "data: expected images beside labels=, or b"),
        (lambda: unicam.reference([images]), TypeError, r"data: expected batches \(images, labels"),
        (lambda: unicam.reference(images, labels[:5]), ValueError, "labels: expected 12 rows, one"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message.replace("()", r"\(\)")):
            call()
    a, b = torch.rand(6, 3, 2, 2), torch.rand(6, 5)
    y = labels[:6]
    for arguments, error, message in (
        ((a[:3], b[:3], y[:3]), ValueError, "reference activations: expected at least 4 rows"),
        ((a, b), TypeError, "reference: expected a tuple of 3 Tensors, got 2"),
        ((a, b, [0] * 6), TypeError, "reference: expected a Tensor, got list"),
        ((a[:, :2], b, y), ValueError, r"expected activations of \[3, 2, 2\] a row, got \[2, 2, 2"),
        ((a, b, None), TypeError, "reference: expected a Tensor, got NoneType"),
        ((a, b[:5], y), ValueError, "base_features: expected 6 rows as in reference activ"),
        ((a, b, y[:5]), ValueError, "reference: expected 6 targets, got 5"),
    ):
        with pytest.raises(error, match=message):
            unicam_weights(a, b, y, reference=arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="base_features: expected 6 rows, one per image, got 5"):
        unicam_weights(a, b[:5], y, reference=(a, b, y))
    with pytest.raises(
        TypeError, match=r"activations: expected a floating-point dtype, got torch.int"
    ):
        unicam_weights(a.long(), b, y, reference=(a, b, y))
