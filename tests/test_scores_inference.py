"""Standard errors and p-values against the plain formulas in numpy: every score computed anew."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastxkd
from fastxkd.metrics import inference
from fastxkd.ops import pairs
from tests import oracles

Array = np.ndarray[Any, Any]


def distances(x: Array) -> Array:
    x = x.reshape(len(x), -1)
    return np.sqrt(((x[:, None] - x[None]) ** 2).sum(2))


def centred(d: Array, unbiased: bool) -> Array:
    n = len(d)
    rows = d.sum(1)
    if not unbiased:
        return d - (rows[:, None] + rows) / n + rows.sum() / n**2
    found = d - (rows[:, None] + rows) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(found, 0)
    return found


def cosine(a: Array, b: Array) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def score(x: Array, y: Array, z: Array | None, unbiased: bool) -> float:
    a, b = (centred(distances(m), unbiased) for m in (x, y))
    if z is not None:
        c = centred(distances(z), unbiased)
        a = a - (a * c).sum() / (c * c).sum() * c
    return cosine(a, b)


def left_out(x: Array, y: Array, z: Array | None, unbiased: bool) -> Array:
    keep = [np.arange(len(x)) != m for m in range(len(x))]
    return np.array([score(x[k], y[k], None if z is None else z[k], unbiased) for k in keep])


def spread(each: Array) -> float:
    return float(np.sqrt((len(each) - 1) / len(each) * ((each - each.mean()) ** 2).sum()))


def data(n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    common = torch.randn(n, 3, dtype=torch.float64)
    return [
        (common @ torch.randn(3, d, dtype=torch.float64) + torch.randn(n, d)).to(dtype)
        for d in (4, 3, 2)
    ]


def arrays(*features: Tensor) -> list[Array]:
    return [f.double().numpy() for f in features]


@pytest.fixture(params=["one tile", "tiles", "panels"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "one tile":
        monkeypatch.setattr(pairs, "TILE", 32)
    if request.param == "panels":
        monkeypatch.setattr(pairs, "PANEL_BYTES", 1)


VARIANTS = pytest.mark.parametrize(
    ("unbiased", "partial"), [(True, False), (False, False), (True, True)]
)


# --- jackknife


@VARIANTS
@pytest.mark.parametrize("n", [5, 6, 23, 75])
def test_jackknife_is_the_score_n_times(
    backend: str, sizes: None, n: int, unbiased: bool, partial: bool
) -> None:
    x, y, z = data(n)
    given = z if partial else None
    found = fastxkd.jackknife(x, y, given=given, unbiased=unbiased)
    a, b, c = arrays(x, y, z)
    each = left_out(a, b, c if partial else None, unbiased)
    whole = score(a, b, c if partial else None, unbiased)
    assert found.value.item() == pytest.approx(whole, rel=1e-10, abs=1e-12)
    assert found.standard_error.item() == pytest.approx(spread(each), rel=1e-9)


@pytest.mark.parametrize("unbiased", [True, False])
def test_every_inner_product_without_a_sample(backend: str, unbiased: bool) -> None:
    n = 40
    features = data(n)
    walk = pairs.Pairs(features, ["x", "y", "z"])
    (_,), (without,) = inference._both(walk, (unbiased,))
    assert without.values.shape == (3, 3, n)
    for m in range(n):
        keep = torch.arange(n) != m
        a = [centred(distances(f), unbiased) for f in arrays(*(f[keep] for f in features))]
        size = (n - 1) * (n - 4) if unbiased else (n - 1) ** 2
        true = torch.tensor([[(p * q).sum() / size for q in a] for p in a])
        torch.testing.assert_close(without.values[:, :, m], true, rtol=1e-10, atol=1e-14)


@VARIANTS
def test_jackknife_of_float32(backend: str, unbiased: bool, partial: bool) -> None:
    x, y, z = data(300, torch.float32)
    given = z if partial else None
    found = fastxkd.jackknife(x, y, given=given, unbiased=unbiased)
    exact = [m.double() for m in (x, y, z)]
    true = fastxkd.jackknife(*exact[:2], given=exact[2] if partial else None, unbiased=unbiased)
    assert found.value.dtype == found.standard_error.dtype == torch.float32
    assert found.standard_error.item() == pytest.approx(true.standard_error.item(), rel=1e-5)


def test_jackknife_far_from_the_origin(backend: str) -> None:
    x, y, _ = data(60)
    true = fastxkd.jackknife(x, y).standard_error
    found = fastxkd.jackknife(1e4 + x, y - 1e4).standard_error
    assert found.item() == pytest.approx(true.item(), rel=1e-7)


def test_jackknife_of_class_indices(backend: str) -> None:
    x, _, _ = data(30)
    labels = torch.arange(30) % 3
    found = fastxkd.jackknife(x, labels)
    one_hot = torch.nn.functional.one_hot(labels).double()
    true = spread(left_out(*arrays(x, one_hot), None, True))
    assert found.standard_error.item() == pytest.approx(true, rel=1e-9)


def test_jackknife_of_a_constant_is_zero(backend: str) -> None:
    x, _, z = data(12)
    constant = torch.full((12, 3), 2.5, dtype=torch.float64)
    for found in (
        fastxkd.jackknife(x, constant),
        fastxkd.jackknife(constant, x, unbiased=False),
        fastxkd.jackknife(constant, x, given=z),
    ):
        assert found == (0, 0)


def test_the_standard_error_is_that_of_samples() -> None:
    """What it is for: the spread of the score over fresh samples of one distribution."""
    rotation = torch.randn(2, 3, dtype=torch.float64)

    def sample() -> tuple[Tensor, Tensor]:
        x = torch.randn(60, 2, dtype=torch.float64)
        return x, x @ rotation + torch.randn(60, 3)

    estimates = [fastxkd.jackknife(*sample()) for _ in range(100)]
    spread_of_scores = torch.stack([e.value for e in estimates]).std().item()
    mean_error = torch.stack([e.standard_error for e in estimates]).mean().item()
    assert mean_error == pytest.approx(spread_of_scores, rel=0.3)


@pytest.mark.parametrize("with_teacher", [True, False])
def test_layer_standard_errors(backend: str, with_teacher: bool) -> None:
    labels = torch.arange(25) % 3
    student, base, teacher = (
        {f"{who}{i}": data(25)[i] + labels[:, None] for i in range(2)} for who in "sbt"
    )
    rows = fastxkd.layer_standard_errors(
        student, base, labels, teacher=teacher if with_teacher else None
    )
    assert [row.layer for row in rows] == ["s0", "s1"]
    g = torch.nn.functional.one_hot(labels).double()
    for row, s, b, t in zip(rows, student.values(), base.values(), teacher.values(), strict=True):
        wanted = {
            "fss": (s, b, None, False),
            "fss_teacher": (s, t, None, False),
            "rs_student": (s, g, None, True),
            "rs_base": (b, g, None, True),
            "rs_teacher": (t, g, None, True),
            "rs_distilled": (s, g, b, True),
            "rs_residual": (b, g, s, True),
        }
        for name, (x, y, z, unbiased) in wanted.items():
            found = getattr(row, name)
            if name.endswith("teacher") and not with_teacher:
                assert found is None
                continue
            a, c, e = (None if m is None else m.numpy() for m in (x, y, z))
            assert found == pytest.approx(spread(left_out(a, c, e, unbiased)), rel=1e-8), name


def test_jackknife_memory() -> None:
    n = 3000
    x, y = torch.randn(n, 8), torch.randn(n, 8)
    fastxkd.jackknife(x[:10], y[:10])
    assert oracles.peak_bytes(lambda: fastxkd.jackknife(x, y)) < n * n * 4 / 3


# --- permutations


def explicit(
    x: Array, y: Array, z: Array | None, unbiased: bool, orders: list[Tensor]
) -> tuple[float, float]:
    a, b = (centred(distances(m), unbiased) for m in (x, y))
    if z is not None:
        c = centred(distances(z), unbiased)
        a = a - (a * c).sum() / (c * c).sum() * c
    seen = cosine(a, b)
    others = [cosine(a, b[order.numpy()][:, order.numpy()]) for order in orders]
    return seen, (1 + sum(o >= seen - 1e-12 for o in others)) / (1 + len(orders))


def drawn(n: int, count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(n, generator=generator) for _ in range(count)]


@VARIANTS
@pytest.mark.parametrize("memory", [1 << 30, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_p_values_of_explicit_permutations(
    backend: str, sizes: None, dtype: torch.dtype, memory: int, unbiased: bool, partial: bool
) -> None:
    n = 70
    x, y, z = data(n, dtype)
    x = x + 9 * torch.randn(n, 4, dtype=dtype)  # little dependence: p-values that say something
    found = fastxkd.permutation_test(
        x,
        y,
        given=z if partial else None,
        unbiased=unbiased,
        permutations=60,
        generator=torch.Generator().manual_seed(7),
        memory=memory,
    )
    a, b, c = arrays(x, y, z)
    seen, p = explicit(a, b, c if partial else None, unbiased, drawn(n, 60, 7))
    assert found.value.item() == pytest.approx(seen, abs=1e-5 if dtype == torch.float32 else 1e-11)
    assert 0.02 < p < 1
    assert found.p_value == pytest.approx(p, abs=1e-12)
    assert found.permutations == 60


@pytest.mark.parametrize("classes", [3, 40])
@pytest.mark.parametrize("form", ["indices", "embeddings"])
@VARIANTS
def test_p_values_of_labels(
    backend: str, sizes: None, classes: int, form: str, unbiased: bool, partial: bool
) -> None:
    """A matrix of classes by classes stands for the labels'; 40 are too many for n = 70."""
    n = 70
    x, _, z = data(n)
    labels = torch.randint(classes, (n,))
    embeddings = torch.randn(classes, 5, dtype=torch.float64)[labels]
    indices = form == "indices"
    found = fastxkd.permutation_test(
        x,
        labels if indices else embeddings,
        given=z if partial else None,
        unbiased=unbiased,
        permutations=50,
        generator=torch.Generator().manual_seed(3),
    )
    y = torch.nn.functional.one_hot(labels).double() if indices else embeddings
    a, b, c = arrays(x, y, z)
    seen, p = explicit(a, b, c if partial else None, unbiased, drawn(n, 50, 3))
    assert found.value.item() == pytest.approx(seen, abs=1e-11)
    assert found.p_value == pytest.approx(p, abs=1e-12)


@pytest.mark.parametrize("few", [1, 32], ids=["looked up", "by matrix product"])
@pytest.mark.parametrize("unbiased", [True, False])
def test_every_source_of_entries_gives_the_same_sums(
    monkeypatch: pytest.MonkeyPatch, few: int, unbiased: bool
) -> None:
    n = 90
    monkeypatch.setattr(inference, "FEW_CLASSES", few)
    monkeypatch.setattr(inference, "PRODUCT_BYTES", 1 << 14)
    x, _, _ = data(n)
    labels = torch.randint(5, (n,))
    embeddings = torch.randn(5, 4, dtype=torch.float64)[labels]
    walk = pairs.Pairs([x, embeddings], ["x", "y"])
    _, row_sums = walk.sums()
    fixed = torch.from_numpy(centred(distances(x.numpy()), unbiased))
    orders = torch.stack(drawn(n, 6, 0))
    b = torch.from_numpy(centred(distances(embeddings.numpy()), unbiased))
    true = torch.stack([(fixed * b[o][:, o]).sum() for o in orders])
    effect = inference._effects(row_sums[1:], False)[0]
    alone = pairs.Pairs([embeddings], ["y"])
    distinct = inference._distinct(embeddings, embeddings, walk)
    assert distinct is not None
    for source in (
        distinct,
        inference._Matrix(alone, effect),
        inference._Recomputed(alone, effect),
    ):
        found = source.dots(fixed, orders, orders, True)
        torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-9)


def test_many_sweeps_draw_the_same_permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, _ = data(40)
    x = x + 9 * torch.randn_like(x)

    def p() -> float:
        generator = torch.Generator().manual_seed(1)
        return fastxkd.permutation_test(x, y, permutations=37, generator=generator).p_value

    first = p()
    monkeypatch.setattr(inference, "INDEX_BYTES", 8 * 40 * 5)
    assert p() == first
    assert 0.03 < first < 1


def test_without_a_generator_torch_draws() -> None:
    x, y, _ = data(30)
    x = x + 3 * torch.randn_like(x)
    torch.manual_seed(5)
    first = fastxkd.permutation_test(x, y, permutations=200)
    torch.manual_seed(5)
    assert fastxkd.permutation_test(x, y, permutations=200) == first
    orders = []
    torch.manual_seed(5)
    for _ in range(200):
        orders.append(torch.randperm(30))
    assert first.p_value == pytest.approx(explicit(*arrays(x, y), None, True, orders)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_scores_count(backend: str, dtype: torch.dtype) -> None:
    """Two samples off the rest: a permutation gives one of three scores."""
    x = torch.zeros(8, 3, dtype=dtype)
    x[:2] = torch.tensor([0.1, 0.7, 0.3])
    y = torch.zeros(8, 5, dtype=dtype)
    y[:2] = 1 / 3
    found = fastxkd.permutation_test(
        x, y, permutations=300, generator=torch.Generator().manual_seed(2)
    )
    fixed = sum(set(order[:2].tolist()) == {0, 1} for order in drawn(8, 300, 2))
    assert found.p_value == pytest.approx((1 + fixed) / 301)


def test_nothing_to_test_is_p_one(backend: str) -> None:
    x, y, z = data(20)
    constant = torch.ones(20, 3, dtype=torch.float64)
    for found in (
        fastxkd.permutation_test(x, constant, permutations=5),
        fastxkd.permutation_test(constant, y, permutations=5),
        fastxkd.permutation_test(x, torch.zeros(20, dtype=torch.long), permutations=5),
        fastxkd.permutation_test(z, y, given=z, permutations=5),
        *(
            fastxkd.permutation_test(z, y, given=factor * z, permutations=9)
            for factor in (2.0, -0.7, 3.3)
        ),
    ):
        assert found.value == 0
        assert found.p_value == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("which", ["x", "y", "given"])
def test_a_score_that_is_nan_has_no_p_value(backend: str, which: str, bad: float) -> None:
    x, y, z = data(30)
    {"x": x, "y": y, "given": z}[which][3, 1] = bad
    for target in (y, torch.arange(30) % 3) if which != "y" else (y,):
        found = fastxkd.permutation_test(
            x, target, given=z if which == "given" else None, permutations=99
        )
        assert found.value.isnan()
        assert math.isnan(found.p_value)
        assert found.permutations == 99


def test_squares_beyond_the_dtype_have_no_p_value(backend: str) -> None:
    x, y, _ = data(30, torch.float32)
    found = fastxkd.permutation_test(1e25 * x, y, permutations=99)
    exact = fastxkd.permutation_test(1e25 * x.double(), y, permutations=99)
    assert exact.p_value < 0.1
    assert found.value.isnan()
    assert math.isnan(found.p_value)


def test_a_nan_that_a_metric_has_seen_has_no_p_value() -> None:
    x, _, _ = data(24)
    x[5, 2] = float("nan")
    metric = fastxkd.RelevanceScore()
    metric.update(x, torch.arange(24) % 3)
    assert metric.compute().isnan()
    assert math.isnan(metric.p_value(99))


def test_p_values_of_independent_features_are_uniform() -> None:
    found = [
        fastxkd.permutation_test(torch.randn(20, 2), torch.randn(20, 2), permutations=39).p_value
        for _ in range(80)
    ]
    assert 0.38 < sum(found) / len(found) < 0.64
    assert sum(p <= 0.25 for p in found) < 36


def test_memory_of_permutations_is_bounded() -> None:
    n = 2000
    x, y = torch.randn(n, 8), torch.randn(n, 8)
    labels = torch.arange(n) % 10
    fastxkd.permutation_test(x[:10], y[:10], permutations=1)
    for target, memory in ((labels, 1 << 30), (y, 0)):
        peak = oracles.peak_bytes(
            lambda target=target, memory=memory: fastxkd.permutation_test(
                x, target, permutations=3, memory=memory
            )
        )
        assert peak < n * n * 4


# --- through the metric classes


def test_metrics_give_the_same(backend: str) -> None:
    x, y, z = data(40)
    x = x + 3 * torch.randn_like(x)
    labels = torch.arange(40) % 4
    fss, rs, partial = (
        fastxkd.FeatureSimilarityScore(),
        fastxkd.RelevanceScore(),
        fastxkd.RelevanceScore(),
    )
    for part in (slice(0, 15), slice(15, 40)):
        fss.update(x[part], y[part])
        rs.update(x[part], labels[part])
        partial.update(x[part], labels[part], z[part])
    for metric, target, given, unbiased in (
        (fss, y, None, False),
        (rs, labels, None, True),
        (partial, labels, z, True),
    ):
        error = fastxkd.jackknife(x, target, given=given, unbiased=unbiased).standard_error
        assert metric.standard_error().item() == pytest.approx(error.item(), rel=1e-6)
        p = fastxkd.permutation_test(
            x,
            target,
            given=given,
            unbiased=unbiased,
            permutations=40,
            generator=torch.Generator().manual_seed(4),
        ).p_value
        found = metric.p_value(40, generator=torch.Generator().manual_seed(4))
        assert found == p


def test_standard_error_of_a_mean_of_batches() -> None:
    x, y, _ = data(50)
    metric = fastxkd.FeatureSimilarityScore("batch")
    each = []
    for part in range(0, 50, 10):
        a, b = x[part : part + 10], y[part : part + 10]
        metric.update(a, b)
        each.append(score(*arrays(a, b), None, False))
        if part == 0:
            with pytest.raises(ValueError, match=r"expected at least 2 batches .* got 1"):
                metric.standard_error()
    # The jackknife over batches, literally.
    without = np.array([np.mean(each[:i] + each[i + 1 :]) for i in range(5)])
    assert metric.standard_error().item() == pytest.approx(spread(without), rel=1e-6)
    with pytest.raises(ValueError, match="p_value: expected mode='dataset'"):
        metric.p_value()


# --- errors


def test_wrong_arguments() -> None:
    x, y, z = data(12)
    for call in (fastxkd.jackknife, fastxkd.permutation_test):
        with pytest.raises(ValueError, match="given: a partial score needs unbiased=True"):
            call(x, y, given=z, unbiased=False)
        with pytest.raises(ValueError, match="y: expected 12 rows as in x, got 11"):
            call(x, y[1:])
        with pytest.raises(TypeError, match="x: expected a Tensor, got list"):
            call([1, 2], y)
        with pytest.raises(ValueError, match=r"x: expected features \[n, ...\]"):
            call(x[:, 0], y)
        with pytest.raises(ValueError, match="y: expected int64 class indices"):
            call(x, torch.zeros(12, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="x: expected at least 5 rows to leave one out, got 4"):
        fastxkd.jackknife(x[:4], y[:4])
    with pytest.raises(ValueError, match="x: expected at least 4 rows"):
        fastxkd.permutation_test(x[:3], y[:3])
    with pytest.raises(ValueError, match="permutations: expected at least 1, got 0"):
        fastxkd.permutation_test(x, y, permutations=0)
    with pytest.raises(TypeError, match="permutations: expected an int, got float"):
        fastxkd.permutation_test(x, y, permutations=9.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="generator: expected a Generator, got int"):
        fastxkd.permutation_test(x, y, generator=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="memory: expected a number, got str"):
        fastxkd.permutation_test(x, y, memory="1 GB")  # type: ignore[arg-type]
    for call in (fastxkd.jackknife, fastxkd.permutation_test):
        with pytest.raises(TypeError, match="unbiased: expected a bool, got str"):
            call(x, y, unbiased="no")
