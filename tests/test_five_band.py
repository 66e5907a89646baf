"""Five-band score, its curve, and the images whose zones are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastxkd.metrics.five_band import (
    FiveBandScores,
    five_band_curve,
    five_band_score,
    five_bands,
)
from fastxkd.metrics.interpretability import FiveBandScore
from fastxkd.runs.cnn import SmallCNN
from fastxkd.runs.data import TrainBatches
from fastxkd.runs.three_zones import MARKS, three_zone_data, three_zones
from fastxkd.train import Distiller, TrainSettings

T = (-0.7, -0.3, 0.3, 0.7)


def band(x: float, t: Any = T) -> int:
    if x <= t[0]:
        return -2
    if x <= t[1]:
        return -1
    if x <= t[2]:
        return 0
    return 1 if x <= t[3] else 2


def score(h: np.ndarray, h0: np.ndarray, t: Any = T, t0: Any = T) -> list[float]:
    """One pixel after the other, as the definition reads."""
    if h.ndim == 3:
        h = h.sum(0)
    h = h / abs(h).max() if abs(h).max() else h
    tp = fp = tn = fn = same = 0
    for x, y in zip(h.ravel(), h0.ravel(), strict=True):
        a, b = band(x, t), band(y, t0)
        same += a == b
        if a != 0 and b != 0 and a == b:
            tp += 1
        if a != 0 and b == 0:
            fp += 1
        if a != 0 and b != 0 and a != b:
            fp += 1
        tn += a == 0 and b == 0
        fn += a == 0 and b != 0
    e = 1e-6
    return [same / h.size, tp / (tp + fn + e), tp / (tp + fp + e), fp / (fp + tn + e)]


def pairs(n: int = 4, channels: int | None = 3) -> tuple[Tensor, Tensor]:
    shape = (n, 6, 7) if channels is None else (n, channels, 6, 7)
    zones = torch.tensor([0.0, 0.0, 0.4, 0.9], dtype=torch.float64)[torch.randint(4, (n, 6, 7))]
    return torch.randn(shape, dtype=torch.float64), zones


def test_bands_and_their_edges() -> None:
    values = torch.tensor(
        [-1, -0.7, -0.69, -0.3, -0.29, 0, 0.3, 0.31, 0.7, 0.71, 1], dtype=torch.float64
    )
    assert five_bands(values).tolist() == [-2, -2, -1, -1, 0, 0, 0, 1, 1, 2, 2]
    others = five_bands(values, (-0.5, 0.0, 0.1, 0.3))
    assert others.tolist() == [-2, -2, -2, -1, -1, -1, 1, 2, 2, 2, 2]


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_on_a_threshold_is_below_it_in_every_dtype(dtype: torch.dtype) -> None:
    """0.3 in float32 is more than 0.3 in float64, and -0.7 too."""
    values = [[[-0.7, -0.3, 0.3, 0.7, 1.0]]]
    on = torch.tensor(values, dtype=dtype)
    assert five_bands(on).tolist() == [[[-2, -1, 0, 1, 2]]]
    for h in (on, torch.tensor([[[-7, -3, 3, 7, 10]]], dtype=dtype)):
        for truth in DTYPES:
            scores = five_band_score(h, torch.tensor(values, dtype=truth))
            # Four of band -2, -1, 1 and 2, one of band 0, and all of them found.
            wanted = [1, 4 / (4 + 1e-6), 4 / (4 + 1e-6), 0]
            assert [v.item() for v in scores] == pytest.approx(wanted, abs=1e-7)


def test_by_hand() -> None:
    """Ten pixels, counted on paper.

    bands of h   0  1  2  2  0 -1  1  0  2 -2
    of the truth 0  1  2  1  1  0  0  0  2  2    equal: 5; TP 3, FP 4, TN 2, FN 1
    """
    h = torch.tensor([0.0, 0.5, 1.0, 0.8, 0.1, -0.5, 0.4, 0.3, 0.9, -0.9]).view(1, 1, 10)
    truth = torch.tensor([0.0, 0.4, 0.9, 0.4, 0.4, 0.0, 0.0, 0.0, 0.9, 0.9]).view(1, 1, 10)
    found = five_band_score(5 * h, truth)
    assert [v.item() for v in found] == pytest.approx([5 / 10, 3 / 4, 3 / 7, 4 / 6], abs=1e-6)


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_is_the_definition(channels: int | None) -> None:
    h, truth = pairs(channels=channels)
    found = five_band_score(h, truth)
    assert all(v.dtype == torch.float64 for v in found)
    wanted = [score(a, b) for a, b in zip(h.numpy(), truth.numpy(), strict=True)]
    assert torch.stack(list(found), 1).tolist() == [pytest.approx(row, abs=1e-12) for row in wanted]


def test_thresholds_of_both_are_used() -> None:
    h, truth = pairs()
    t, t0 = (-0.9, -0.1, 0.1, 0.5), (-0.5, -0.4, 0.45, 0.95)
    found = five_band_score(h, truth, thresholds=t, truth_thresholds=t0)
    wanted = [score(a, b, t, t0) for a, b in zip(h.numpy(), truth.numpy(), strict=True)]
    assert torch.stack(list(found), 1).tolist() == [pytest.approx(row, abs=1e-12) for row in wanted]


def test_curve_shrinks_the_attribution_s_thresholds_only() -> None:
    h, truth = pairs()
    found = five_band_curve(h, truth)
    assert found.recall.shape == (4, 56)
    for step in (0, 1, 30, 55):
        d = 0.005 * step
        t = (-0.7 + d, -0.3 + d, 0.3 - d, 0.7 - d)
        wanted = [score(a, b, t) for a, b in zip(h.numpy(), truth.numpy(), strict=True)]
        at = torch.stack([v[:, step] for v in found], 1)
        assert at.tolist() == [pytest.approx(row, abs=1e-12) for row in wanted]
    first = five_band_score(h, truth)
    assert all(torch.equal(a[:, 0], b) for a, b in zip(found, first, strict=True))


def test_scalings_agree_and_zero_stays() -> None:
    h, truth = pairs()
    a, b = (five_band_score(h, truth, scaling=s) for s in ("after_sum", "before_sum"))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    nothing = five_band_score(torch.zeros(1, 6, 7), truth[:1].float())
    assert nothing.recall.item() == nothing.precision.item() == 0
    assert nothing.accuracy.item() == pytest.approx((truth[0] == 0).double().mean().item())
    perfect = five_band_score(truth / 0.9, truth)
    assert perfect.accuracy.tolist() == [1] * 4
    assert perfect.recall.tolist() == pytest.approx([1] * 4, abs=1e-5)


def test_a_threshold_may_be_0_where_it_does_not_shrink() -> None:
    h, truth = pairs()
    t = (-0.5, -0.1, 0.0, 0.5)
    metric = FiveBandScore(thresholds=t)
    metric.update(h, truth)
    wanted = five_band_score(h, truth, thresholds=t).accuracy.mean().item()
    assert metric.compute()["accuracy"].item() == pytest.approx(wanted, abs=1e-7)


def test_nan_stays_with_its_image() -> None:
    h, truth = pairs()
    h[1, 0, 0, 0] = torch.nan
    truth[2, 3, 3] = torch.nan
    for v in five_band_score(h, truth):
        assert v.isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("steps", [1, 4])
def test_metric_is_the_mean(steps: int) -> None:
    h, truth = pairs(7)
    metric = FiveBandScore(steps=steps, delta=0.05)
    metric.update(h[:3], truth[:3])
    metric.update(h[3:], truth[3:])
    found, curve = metric.compute(), five_band_curve(h, truth, steps=steps, delta=0.05)
    for name in FiveBandScores._fields:
        wanted = getattr(curve, name).mean(0)
        torch.testing.assert_close(
            found[name], (wanted if steps > 1 else wanted[0]).float(), rtol=1e-6, atol=1e-7
        )


MAPS = torch.zeros(2, 4, 4)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda: five_band_score(MAPS[:1], MAPS),
            ValueError,
            r"attributions: expected \[2, 4, 4\]",
        ),
        (lambda: five_band_score(MAPS[0], MAPS), ValueError, "attributions: expected"),
        (lambda: five_band_score(MAPS, MAPS[0]), ValueError, r"truth: expected \[n, h, w\]"),
        (lambda: five_band_score(MAPS.long(), MAPS), TypeError, "attributions: expected a float"),
        (
            lambda: five_band_score(MAPS, MAPS, thresholds=(0.1, 0.2, 0.3)),
            ValueError,
            "thresholds: expected four numbers",
        ),
        (
            lambda: five_band_score(MAPS, MAPS, truth_thresholds=(0, 2, 1, 3)),
            ValueError,
            "truth_thresholds: expected four",
        ),
        (lambda: five_band_score(MAPS, MAPS, scaling="max"), ValueError, "scaling: expected one"),
        (
            lambda: five_band_curve(MAPS, MAPS, delta=0.02, steps=16),
            ValueError,
            "delta: expected at least 0 and 15 times less than the threshold 0.3, got 0.02",
        ),
        (lambda: five_band_curve(MAPS, MAPS, delta=-1), ValueError, "delta: expected"),
        (lambda: five_band_curve(MAPS, MAPS, steps=0), ValueError, "steps: expected at least 1"),
        (lambda: FiveBandScore(steps=99), ValueError, "delta: expected"),
        (lambda: three_zones(4, classes=13), ValueError, "classes: expected 2 to 12, got 13"),
        (lambda: three_zones(4, size=8), ValueError, "size: expected at least 16"),
        (lambda: three_zones(4, channels=2), ValueError, "channels: expected 1 or 3"),
        (lambda: three_zones(4, zone="object"), ValueError, "zone: expected one of mark, patch"),
        (lambda: three_zones(0), ValueError, "count: expected at least 1"),
        (lambda: three_zones(1, first=-1), ValueError, "first: expected"),
        (lambda: three_zones(1, seed=1.5), TypeError, "seed: expected an int, got float"),
    ],
)
def test_what_does_not_fit_is_named(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()


# --- the images


@pytest.mark.parametrize("channels", [1, 3])
def test_zones_lie_where_the_picture_has_them(channels: int) -> None:
    found = three_zones(48, classes=12, size=32, channels=channels)
    assert found.images.shape == (48, channels, 32, 32)
    assert found.images.dtype == torch.uint8
    assert found.labels.tolist() == [*range(12)] * 4
    assert set(found.truth.unique().tolist()) == set(torch.tensor([0.0, 0.4, 0.9]).tolist())
    for image, truth in zip(found.images.float().mean(1), found.truth, strict=True):
        zones = [truth == value for value in torch.tensor([0.0, 0.4, 0.9])]
        ground, body, mark = (image[zone].mean().item() for zone in zones)
        assert mark < 60 < 120 < body
        assert ground < body
        assert 0.15 < (~zones[0]).float().mean() < 0.6


def test_an_image_depends_on_seed_and_number_alone() -> None:
    whole = three_zones(300, classes=5, size=16, seed=3)
    part = three_zones(7, classes=5, size=16, seed=3, first=200)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[200:207], b)
    other = three_zones(300, classes=5, size=16, seed=4)
    assert not torch.equal(whole.images, other.images)
    assert len({image.numpy().tobytes() for image in whole.images}) == 300


def test_patch_holds_the_mark() -> None:
    mark, patch = (three_zones(24, classes=12, zone=zone).truth for zone in ("mark", "patch"))
    assert ((patch > 0.5) | (mark < 0.5)).all()
    assert torch.equal(mark > 0, patch > 0)
    assert ((patch > 0.5).sum() > 1.3 * (mark > 0.5).sum()).item()


def test_nothing_but_the_mark_tells_the_class() -> None:
    """Means over each class of all that is not the mark lie within sampling error."""
    found = three_zones(1200, classes=4, size=16, zone="patch")
    image = found.images.double().mean(1)
    outside = image.where(found.truth < 0.5, torch.nan).flatten(1).nanmean(1)
    size = (found.truth > 0).flatten(1).double().mean(1)
    for value in (outside, size):
        means = torch.stack([value[found.labels == k].mean() for k in range(4)])
        error = value.std() / (1200 / 4) ** 0.5
        assert (means - value.mean()).abs().max() < 4 * error


def test_marks_differ() -> None:
    u, v = np.meshgrid(np.linspace(-1, 1, 41), np.linspace(-1, 1, 41))
    drawn = [mark(u, v) for mark in MARKS.values()]
    for i, a in enumerate(drawn):
        assert 0.1 < a.mean() < 0.75
        assert all((a != b).mean() > 0.08 for b in drawn[:i])


def test_data_can_be_learned_and_scored() -> None:
    found = three_zone_data(400, 80, classes=2, channels=1)
    torch.manual_seed(0)
    model = SmallCNN((8, 12, 16, 16), (1, 1, 1, 1), num_classes=2, in_channels=1)
    settings = TrainSettings(epochs=10, batch_size=32, lr=0.05)
    batches = TrainBatches(found.data, batch_size=32, seed=0, augmented=False)
    Distiller(model, batches, settings).fit()
    batch = found.data.test.load(range(80))
    images = found.data.normalize(batch.images)
    with torch.no_grad():
        right = (model(images).argmax(1) == batch.labels).float().mean()
    assert right > 0.8
    assert found.test_truth.shape == (80, 32, 32)
    later = three_zones(80, classes=2, channels=1, first=400)
    assert torch.equal(batch.images, later.images)
