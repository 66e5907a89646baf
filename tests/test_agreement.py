"""How far two maps agree."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastxkd
from fastxkd.metrics import agreement
from tests.conftest import needs

MEASURES: dict[str, Callable[..., Tensor]] = agreement.MEASURES
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


# --- the formulas, one image and one pixel at a time


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / lengths) if lengths else 0.0


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    if (a == a.flat[0]).all() or (b == b.flat[0]).all():
        return 0.0
    return cosine(a - a.mean(), b - b.mean())


def ranks(a: np.ndarray) -> np.ndarray:
    flat = a.ravel()
    return np.array([(flat < v).sum() + ((flat == v).sum() + 1) / 2 for v in flat])


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return pearson(ranks(a), ranks(b))


def ssim(a: np.ndarray, b: np.ndarray, r: float = 1.0, window: int = 11, s: float = 1.5) -> float:
    place = np.arange(window) - window // 2
    weight = np.exp(-(place[:, None] ** 2 + place[None, :] ** 2) / (2 * s * s))
    weight /= weight.sum()
    values = []
    for i in range(a.shape[0] - window + 1):
        for j in range(a.shape[1] - window + 1):
            p, q = (m[i : i + window, j : j + window] for m in (a, b))
            mp, mq = (weight * p).sum(), (weight * q).sum()
            vp, vq = (weight * (p - mp) ** 2).sum(), (weight * (q - mq) ** 2).sum()
            cov = (weight * (p - mp) * (q - mq)).sum()
            c1, c2 = (0.01 * r) ** 2, (0.03 * r) ** 2
            values.append(
                (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
            )
    return float(np.mean(values))


def top(a: np.ndarray, b: np.ndarray, fraction: float = 0.1) -> float:
    count = max(1, round(fraction * a.size))
    chosen = [set(sorted(range(m.size), key=lambda k: (-m.flat[k], k))[:count]) for m in (a, b)]
    return len(chosen[0] & chosen[1]) / len(chosen[0] | chosen[1])


ORACLES = {"cosine": cosine, "pearson": pearson, "spearman": spearman, "ssim": ssim, "top": top}


def pair(n: int = 5, h: int = 14, w: int = 17) -> tuple[Tensor, Tensor]:
    first = torch.rand(n, h, w, dtype=torch.float64)
    return first, (first + torch.rand(n, h, w, dtype=torch.float64)) / 2


def expected(name: str, first: Tensor, second: Tensor, **options: Any) -> list[float]:
    rows = zip(first.double().numpy(), second.double().numpy(), strict=True)
    return [ORACLES[name](a, b, **options) for a, b in rows]


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("name", MEASURES)
def test_is_the_formula(name: str, n: int) -> None:
    first, second = pair(n)
    found = MEASURES[name](first, second)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected(name, first, second), abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MEASURES)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """Of maps as they are after rounding, ties included: nothing is lost beyond the answer."""
    first, second = (m.to(dtype) for m in pair())
    found = MEASURES[name](first, second)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.tolist() == pytest.approx(expected(name, first, second), abs=1e-6)
    mixed = MEASURES[name](first, second.double())
    assert mixed.dtype == torch.float64
    assert mixed.tolist() == pytest.approx(expected(name, first, second), abs=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_ties(name: str) -> None:
    first, second = ((4 * m).round() / 4 for m in pair())
    found = MEASURES[name](first, second)
    assert found.tolist() == pytest.approx(expected(name, first, second), abs=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_constant_maps(name: str) -> None:
    first, second = pair(4)
    first[0], second[1], first[2], second[2] = 0.3, 0.7, 0.1, 0.1
    first[3], second[3] = 0, 0
    found = MEASURES[name](first, second)
    assert found.tolist() == pytest.approx(expected(name, first, second), abs=1e-12)
    if name in ("pearson", "spearman"):
        assert found.tolist() == [0, 0, 0, 0]
    if name == "ssim":
        assert found[2:].tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("name", MEASURES)
def test_a_map_agrees_with_itself(name: str) -> None:
    first, _ = pair()
    for dtype in DTYPES:
        found = MEASURES[name](first.to(dtype), first.to(dtype))
        assert found.tolist() == pytest.approx([1] * 5, abs=1e-6)
        assert (found <= 1).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e30])
@pytest.mark.parametrize("name", ["cosine", "pearson", "spearman", "top"])
def test_scale_is_no_matter(name: str, scale: float) -> None:
    first, second = (m.float() for m in pair())
    found = MEASURES[name](first * scale, second)
    assert found.tolist() == pytest.approx(MEASURES[name](first, second).tolist(), abs=1e-6)


def test_pearson_of_a_large_offset() -> None:
    """float32 maps far from 0: their own rounding is all that is lost."""
    first, second = ((m + 1000).float() for m in pair())
    found = agreement.pearson_agreement(first, second)
    assert found.tolist() == pytest.approx(expected("pearson", first, second), abs=1e-6)


@pytest.mark.parametrize("name", MEASURES)
def test_nan_is_of_its_image_only(name: str) -> None:
    first, second = pair()
    clean = MEASURES[name](first, second)
    first[1, 2, 3] = torch.nan
    second[3, 5, 5] = torch.nan
    found = MEASURES[name](first, second)
    assert found.isnan().tolist() == [False, True, False, True, False]
    assert torch.equal(found[[0, 2, 4]], clean[[0, 2, 4]])


@pytest.mark.parametrize("name", MEASURES)
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    first, second = pair()
    whole = MEASURES[name](first, second)
    each = [MEASURES[name](*p) for p in zip(first.split(1), second.split(1), strict=True)]
    assert torch.allclose(whole, torch.cat(each), rtol=0, atol=1e-12)
    strided = (first.transpose(1, 2).contiguous().transpose(1, 2), second)
    assert torch.allclose(MEASURES[name](*strided), whole, rtol=0, atol=1e-12)
    assert not MEASURES[name](first.requires_grad_(), second).requires_grad


def test_scipy_correlations() -> None:
    stats = needs("scipy.stats")
    first, second = ((8 * m).round() for m in pair())
    for name, function in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        true = [
            function(a.ravel(), b.ravel()).statistic
            for a, b in zip(first.numpy(), second.numpy(), strict=True)
        ]
        assert MEASURES[name](first, second).tolist() == pytest.approx(true, abs=1e-12)


def test_torchmetrics_ssim() -> None:
    functional = needs("torchmetrics.functional.image")
    first, second = pair(3, 30, 26)
    _, windows = functional.structural_similarity_index_measure(
        first[:, None], second[:, None], data_range=1.0, reduction="none", return_full_image=True
    )
    # It averages over windows that reach beyond the border as well.
    true = windows[:, 0, 5:-5, 5:-5].mean((1, 2))
    assert torch.allclose(agreement.ssim_agreement(first, second), true, rtol=0, atol=1e-7)


def test_skimage_ssim() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    first, second = pair(3, 30, 26)
    true = [
        metrics.structural_similarity(
            a, b, data_range=1.0, gaussian_weights=True, use_sample_covariance=False
        )
        for a, b in zip(first.numpy(), second.numpy(), strict=True)
    ]
    assert agreement.ssim_agreement(first, second).tolist() == pytest.approx(true, abs=1e-9)


def test_ssim_options() -> None:
    first, second = (m * 255 for m in pair(2, 9, 8))
    found = agreement.ssim_agreement(first, second, data_range=255, window=7, sigma=2.0)
    true = expected("ssim", first, second, r=255, window=7, s=2.0)
    assert found.tolist() == pytest.approx(true, abs=1e-12)


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5, 1])
def test_top_fraction(fraction: float) -> None:
    first, second = pair()
    found = agreement.top_agreement(first, second, fraction=fraction)
    true = expected("top", first, second, fraction=fraction)
    assert found.tolist() == pytest.approx(true, abs=1e-12)


def test_opposite_maps() -> None:
    first, _ = pair()
    for name in ("pearson", "spearman"):
        assert MEASURES[name](first, -first).tolist() == pytest.approx([-1] * 5)
    assert agreement.top_agreement(first, -first).tolist() == [0] * 5


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize(
    ("first", "second", "error", "text"),
    [
        (3, torch.rand(2, 12, 12), TypeError, "first: expected a Tensor, got int"),
        (torch.rand(2, 12, 12), None, TypeError, "second: expected a Tensor, got NoneType"),
        (torch.ones(2, 12, 12).int(), torch.rand(2, 12, 12), TypeError, "first: .*floating-point"),
        (torch.rand(12, 12), torch.rand(12, 12), ValueError, r"first: expected \[n, h, w\]"),
        (torch.rand(0, 12, 12), torch.rand(0, 12, 12), ValueError, "first: .*none of them 0"),
        (torch.rand(2, 12, 12), torch.rand(2, 12, 11), ValueError, "second: expected the shape"),
    ],
    ids=str,
)
def test_refuses(name: str, first: Any, second: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        MEASURES[name](first, second)


def test_refuses_options() -> None:
    first, second = pair(2, 8, 20)
    for window, text in ((11, "at most the 8 of the .*, got 11"), (4, "pixels, got 4")):
        with pytest.raises(ValueError, match=f"window: expected an odd number of .*{text}"):
            agreement.ssim_agreement(first, second, window=window)
    with pytest.raises(ValueError, match="data_range: expected"):
        agreement.ssim_agreement(first, second, window=7, data_range=0)
    with pytest.raises(ValueError, match="sigma: expected"):
        agreement.ssim_agreement(first, second, window=7, sigma=-1)
    for fraction in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="fraction: expected 0 < fraction <= 1"):
            agreement.top_agreement(first, second, fraction=fraction)
    with pytest.raises(TypeError, match="fraction: expected a number"):
        agreement.top_agreement(first, second, fraction="a")  # type: ignore[arg-type]


# --- the metric


def test_metric_over_batches_is_one_batch() -> None:
    first, second = pair(7)
    metric, left, right = (fastxkd.ExplanationAgreement() for _ in range(3))
    for i, rows in enumerate(torch.arange(7).split([2, 4, 1])):
        value = metric(first[rows], second[rows])
        for name, of_batch in value.items():
            true = MEASURES[name](first[rows], second[rows]).mean().item()
            assert of_batch.item() == pytest.approx(true, abs=1e-6), name
        (left if i else right).update(first[rows], second[rows])
    left.merge_state(right)
    copy = pickle.loads(pickle.dumps(metric))
    for m in (metric, left, copy):
        found = m.compute()
        assert list(found) == list(MEASURES)
        for name, value in found.items():
            true = MEASURES[name](first, second).mean().item()
            assert value.shape == ()
            assert value.item() == pytest.approx(true, abs=1e-6), name
    metric.reset()
    with (
        pytest.raises(ValueError, match="ExplanationAgreement: compute"),
        pytest.warns(UserWarning, match="compute"),
    ):
        metric.compute()
    metric.reset()
    metric.update(first[:1], second[:1])
    true = MEASURES["cosine"](first[:1], second[:1]).item()
    assert metric.compute()["cosine"].item() == pytest.approx(true, abs=1e-6)


def test_metric_options() -> None:
    first, second = (m * 9 for m in pair(3, 9, 9))
    metric = fastxkd.ExplanationAgreement(
        ("top", "ssim"), fraction=0.3, data_range=9, window=5, sigma=1.0
    )
    metric.update(first, second)
    found = metric.compute()
    assert list(found) == ["top", "ssim"]
    true = expected("top", first, second, fraction=0.3)
    assert found["top"].item() == pytest.approx(np.mean(true), abs=1e-6)
    true = expected("ssim", first, second, r=9, window=5, s=1.0)
    assert found["ssim"].item() == pytest.approx(np.mean(true), abs=1e-6)
    for bad in ((), ("cosine", "cosine"), ("mse",)):
        with pytest.raises(ValueError, match="measures: expected one or more of"):
            fastxkd.ExplanationAgreement(bad)
    for options, error, text in (
        ({"window": 4}, ValueError, "window: expected an odd number of pixels, got 4"),
        ({"window": 5.0}, TypeError, "window: expected an int, got float"),
        ({"fraction": 2}, ValueError, "fraction: expected 0 < fraction <= 1, got 2"),
        ({"sigma": 0}, ValueError, "sigma: expected a finite number above 0"),
        ({"data_range": "1"}, TypeError, "data_range: expected a number, got str"),
    ):
        with pytest.raises(error, match=text):
            fastxkd.ExplanationAgreement(**options)  # type: ignore[arg-type]


def test_metric_in_a_collection() -> None:
    torchmetrics = needs("torchmetrics")
    first, second = pair()
    collection = torchmetrics.MetricCollection(
        {"a": fastxkd.ExplanationAgreement(["cosine"]), "b": fastxkd.ExplanationAgreement(["top"])}
    )
    for rows in torch.arange(5).split(2):
        collection.update(first[rows], second[rows])
    values = [v.item() for v in collection.compute().values()]
    true = [MEASURES[m](first, second).mean().item() for m in ("cosine", "top")]
    assert sorted(values) == pytest.approx(sorted(true), abs=1e-6)
