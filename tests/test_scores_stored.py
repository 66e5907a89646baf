"""Features in mapped files, and features made narrow: nothing needs n x d in memory."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastxkd
from fastxkd.metrics import projection
from fastxkd.ops import pairs, stored
from fastxkd.ops.distance import distance_sums
from tests import oracles
from tests.conftest import needs

Array = np.ndarray[Any, Any]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def mapped_numpy(x: Tensor, path: Path) -> Array:
    x.numpy().tofile(path)
    return np.memmap(path, dtype=str(x.dtype).split(".")[1], mode="r", shape=tuple(x.shape))


def mapped_torch(x: Tensor, path: Path) -> Tensor:
    x.view(torch.uint8).numpy().tofile(path)
    return torch.from_file(str(path), size=x.numel(), dtype=x.dtype).view(x.shape)


def lazy_safetensors(x: Tensor, path: Path) -> Any:
    safetensors = needs("safetensors")
    needs("safetensors.torch").save_file({"other": torch.ones(3), "x": x}, path)
    return safetensors.safe_open(path, "pt").get_slice("x")


WAYS: dict[str, Callable[[Tensor, Path], Any]] = {
    "numpy": mapped_numpy,
    "torch": mapped_torch,
    "safetensors": lazy_safetensors,
}


def data(n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    common = torch.randn(n, 3, dtype=torch.float64)
    return [
        (common @ torch.randn(3, 12, dtype=torch.float64) + torch.randn(n, 12)).to(dtype)
        for _ in range(3)
    ]


@pytest.fixture(params=["one tile", "tiles", "panels"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "one tile":
        monkeypatch.setattr(pairs, "TILE", 32)
    if request.param == "panels":
        monkeypatch.setattr(pairs, "PANEL_BYTES", 70 * 36 * 4)


# --- sums over pairs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [4, 31, 64, 150])
def test_sums_are_those_of_the_operator(
    backend: str, sizes: None, n: int, dtype: torch.dtype
) -> None:
    features = data(n, dtype)
    products, row_sums = pairs.Pairs(features, "xyz").sums()
    d = torch.stack([oracles.distances(f.double()) for f in features])
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    true = torch.einsum("kij,lij->kl", d, d)
    torch.testing.assert_close(products, true, rtol=tolerance, atol=0)
    torch.testing.assert_close(row_sums, d.sum(2), rtol=tolerance, atol=0)


def test_tiles_cover_every_pair_once(backend: str, sizes: None) -> None:
    n = 150
    features = data(n)
    whole = torch.zeros(3, n, n, dtype=torch.float64)
    for tile in pairs.Pairs(features, "xyz").tiles():
        for k, block in enumerate(tile.distances):
            whole[k, tile.rows, tile.cols] += block
            if not tile.diagonal:
                whole[k, tile.cols, tile.rows] += block.T
    for found, x in zip(whole, features, strict=True):
        torch.testing.assert_close(found, oracles.distances(x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_in_any_order(backend: str, dtype: torch.dtype) -> None:
    x, y, _ = data(40, dtype)
    walk = pairs.Pairs([x, y], "xy")
    rows, cols = torch.randperm(40)[:9], torch.randperm(40)[:14]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for feature, found, own in zip(
        (x, y), walk.between(rows, cols), walk.between(rows, rows), strict=True
    ):
        true = oracles.distances(feature.double()).to(dtype)
        torch.testing.assert_close(found, true[rows][:, cols], rtol=tolerance, atol=1e-7)
        torch.testing.assert_close(own, true[rows][:, rows], rtol=tolerance, atol=1e-7)
        assert (own.diagonal() == 0).all()


def test_near_duplicates_keep_their_digits(backend: str, sizes: None) -> None:
    x = torch.randn(60, 64)
    x = 10 * x / x.norm(dim=1, keepdim=True)
    x = torch.cat([x, x + 1e-4 * torch.randn(60, 64)])
    true = oracles.distances(x.double())
    for tile in pairs.Pairs([x], "x").tiles():
        torch.testing.assert_close(
            tile.distances[0].double(), true[tile.rows, tile.cols], rtol=1e-5, atol=0
        )


def test_sorted_rows_far_apart(backend: str) -> None:
    """The means are of some rows only; where they lie must not matter."""
    x = 1e3 * torch.arange(700.0)[:, None] // 100 + torch.randn(700, 16)
    products, row_sums = pairs.Pairs([x], "x").sums()
    true = oracles.distances(x.double())
    torch.testing.assert_close(products[0, 0], true.square().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(row_sums[0], true.sum(1), rtol=1e-6, atol=0)


# --- where features may be


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_mapped_features(
    backend: str, tmp_path: Path, dtype: torch.dtype, way: str
) -> None:
    if way == "numpy" and dtype == torch.bfloat16:
        pytest.skip("numpy has no bfloat16")
    x, y, z = data(90, dtype)
    mapped = [WAYS[way](m, tmp_path / str(i)) for i, m in enumerate((x, y, z))]
    exact = [m.double() for m in (x, y, z)]
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for found, true in (
        (
            fastxkd.distance_correlation(*mapped[:2]),
            oracles.correlation(*exact[:2], unbiased=True),
        ),
        (
            fastxkd.distance_correlation(mapped[0], y, unbiased=False),
            oracles.correlation(*exact[:2], unbiased=False),
        ),
        (
            fastxkd.partial_distance_correlation(*mapped[:2], given=mapped[2]),
            oracles.partial(*exact, semi=False),
        ),
    ):
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert found.item() == pytest.approx(true.item(), abs=tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_everything_of_mapped_features(tmp_path: Path, way: str) -> None:
    x, y, z = (m.view(60, 3, 4) for m in data(60))
    a, b, c = (WAYS[way](m, tmp_path / str(i)) for i, m in enumerate((x, y, z)))
    labels = torch.arange(60) % 3
    for call in (fastxkd.layer_scores, fastxkd.layer_standard_errors):
        found = call({"l": a}, {"l": b}, labels, teacher={"l": c})[0][1:]
        true = call({"l": x}, {"l": y}, labels, teacher={"l": z})[0][1:]
        assert found == pytest.approx(true, abs=1e-11)
    found, true = (fastxkd.jackknife(p, q, given=r) for p, q, r in ((a, b, c), (x, y, z)))
    assert [f.item() for f in found] == pytest.approx([t.item() for t in true], abs=1e-11)
    noisy = x + 9 * torch.randn_like(x)
    for memory in (1 << 30, 0):
        p = [
            fastxkd.permutation_test(
                noisy,
                other,
                permutations=20,
                memory=memory,
                generator=torch.Generator().manual_seed(0),
            ).p_value
            for other in (b, y)
        ]
        assert p[0] == p[1]


def test_mapped_features_are_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, d = 6000, 1024
    monkeypatch.setattr(pairs, "PANEL_BYTES", 1 << 22)
    x = torch.randn(n, d)
    x[:, :5] += torch.nn.functional.one_hot(torch.arange(n) % 5)
    labels = torch.arange(n) % 5
    mapped = mapped_numpy(x, tmp_path / "x")
    g = torch.nn.functional.one_hot(labels).float()
    found: list[float] = []
    peak = oracles.peak_bytes(lambda: found.append(fastxkd.distance_correlation(mapped, g).item()))
    whole = n * d * 4
    assert peak < 0.7 * whole  # a panel as it is and centred, the tile of columns, distances
    assert found == pytest.approx([fastxkd.distance_correlation(x, g).item()], abs=1e-7)
    narrow = fastxkd.RandomProjection(64)
    monkeypatch.setattr(projection, "READ", 1 << 20)
    assert oracles.peak_bytes(lambda: narrow(mapped)) < 0.7 * whole


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_read_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    x = torch.randn(20, 2, 3).to(dtype)
    ways = {k: w for k, w in WAYS.items() if not (k == "numpy" and dtype == torch.bfloat16)}
    for name, way in ways.items():
        rows = stored.Rows(way(x, tmp_path / name), "x")
        assert (rows.n, rows.width, rows.dtype) == (20, 6, dtype)
        assert torch.equal(rows.read(slice(3, 8)), x[3:8].flatten(1)), name
        index = torch.tensor([7, 0, 19, 7])
        assert torch.equal(rows.take(index), x[index].flatten(1)), name


def test_wrong_features(tmp_path: Path) -> None:
    x, y, _ = data(20)
    with pytest.raises(TypeError, match=r"y: expected float32, .* got int64"):
        fastxkd.distance_correlation(x, y.numpy().astype("int64"))
    with pytest.raises(TypeError, match=r"y: expected float32, .* got I64"):
        fastxkd.distance_correlation(x, lazy_safetensors(y.long(), tmp_path / "y"))
    with pytest.raises(ValueError, match="y: expected 20 rows as in x, got 19"):
        fastxkd.distance_correlation(x, y[1:].numpy())
    with pytest.raises(ValueError, match=r"y: expected features \[n, ...\] .*\[20\]"):
        fastxkd.distance_correlation(x, y[:, 0].numpy())
    with pytest.raises(ValueError, match="x: expected at least 4 rows"):
        fastxkd.distance_correlation(x[:3].numpy(), y[:3])
    with pytest.raises(TypeError, match="y: expected a Tensor, got str"):
        fastxkd.distance_correlation(x, "y")  # type: ignore[arg-type]


# --- random projection


def squared_ratios(x: Tensor, narrow: Tensor) -> Tensor:
    n = len(x)
    above = torch.triu_indices(n, n, 1)
    before, after = (oracles.distances(m.double().flatten(1)).square() for m in (x, narrow))
    return after[above[0], above[1]] / before[above[0], above[1]]


def test_projected_distances_keep_within_the_bound() -> None:
    n, error = 40, 0.3
    width = fastxkd.projected_width(n, error=error)
    assert width == math.ceil(math.log(n * n / 0.01) / (error**2 / 4 - error**3 / 6))
    x = torch.randn(n, 8, 600)
    for seed in range(5):
        ratios = squared_ratios(x, fastxkd.RandomProjection(width, seed=seed)(x))
        assert (ratios - 1).abs().max() <= error
        # And of the spread that random signs give: the bound is not kept by chance of a bug.
        assert ratios.std().item() == pytest.approx(math.sqrt(2 / width), rel=0.2)
        assert ratios.mean().item() == pytest.approx(1, abs=0.03)


def test_projection_is_a_matrix_of_signs() -> None:
    for width in (1, 7, 8, 19):
        signs = fastxkd.RandomProjection(width)(torch.eye(300)) * math.sqrt(width)
        torch.testing.assert_close(signs.abs(), torch.ones(300, width))
        assert abs(signs.mean()) < 4 / math.sqrt(300 * width)
    signs = fastxkd.RandomProjection(64)(torch.eye(300)) * 8
    gram = signs.T @ signs / 300
    assert (gram - torch.eye(64)).abs().max() < 0.35


def test_projection_is_one_whatever_it_is_called_with(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(30, 500, dtype=torch.float64)
    project = fastxkd.RandomProjection(33, seed=3)
    whole = project(x)
    assert whole.dtype == torch.float64
    parts = torch.cat([project(x[:7]), fastxkd.RandomProjection(33, seed=3)(x[7:])])
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    copy = pickle.loads(pickle.dumps(project))
    assert len(pickle.dumps(project)) < 500  # not the signs, which the seed tells
    torch.testing.assert_close(copy(x), whole, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(projection, "BLOCK", 33 * 64)
    for name in ("READ", "READ_ROWS", "ROWS"):
        monkeypatch.setattr(projection, name, 500 * 4 if name == "READ" else 7)
    torch.testing.assert_close(project(x), whole, rtol=1e-12, atol=1e-12)
    strided = torch.empty(500, 30, dtype=torch.float64).T
    strided.copy_(x)
    torch.testing.assert_close(project(strided), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(project(x.numpy()), whole, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(fastxkd.RandomProjection(33, seed=4)(x), whole)
    before = torch.get_rng_state()
    fastxkd.RandomProjection(8)(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_error_of_a_width_and_width_of_an_error() -> None:
    for n, error in ((50, 0.5), (1000, 0.1), (20_000, 0.3)):
        width = fastxkd.projected_width(n, error=error, failure=0.05)
        found = fastxkd.RandomProjection(width).relative_error(n, failure=0.05)
        assert found == pytest.approx(error, rel=1e-3)
        assert found <= error
    assert fastxkd.RandomProjection(3).relative_error(1000) == math.inf


@pytest.mark.parametrize("unbiased", [True, False])
def test_scores_keep_within_their_bound(unbiased: bool) -> None:
    n = 60
    y = torch.randn(n, 2, dtype=torch.float64)
    spread = torch.rand(n, 1, dtype=torch.float64) * 3  # distances that differ much
    x = (y * spread) @ torch.randn(2, 3000, dtype=torch.float64)
    true = oracles.correlation(x, y, unbiased=unbiased).item()
    project = fastxkd.RandomProjection(2000)
    narrow = project(x)
    found = fastxkd.distance_correlation(narrow, y, unbiased=unbiased).item()
    bound = project.score_error(narrow, unbiased=unbiased)
    assert 0 < bound < 2
    assert abs(found - true) < bound
    assert abs(found - true) < 0.01
    # The bound from its definition.
    d = oracles.distances(narrow)
    centre = oracles.u_centred if unbiased else oracles.double_centred
    rho = 1 / math.sqrt(1 - project.relative_error(n)) - 1
    assert bound == pytest.approx((2 * rho * d.norm() / centre(d).norm()).item(), rel=1e-6)
    constant = torch.ones(n, 2000)
    assert project.score_error(constant) == math.inf


@pytest.mark.parametrize("mode", ["dataset", "batch"])
def test_metrics_project_features_and_not_labels(mode: str) -> None:
    x, y, z = data(40)
    labels = torch.arange(40) % 4
    project = fastxkd.RandomProjection(8, seed=1)
    for options in ({"projection": project}, {"projection": 8, "seed": 0}):
        own = fastxkd.RandomProjection(8, seed=int(options.get("seed", 1)))  # type: ignore[call-overload]
        fss = fastxkd.FeatureSimilarityScore(mode, projection=options["projection"])
        rs = fastxkd.RelevanceScore(mode, projection=options["projection"])
        fss.update(x, y)
        rs.update(x, labels, z)
        true = fastxkd.distance_correlation(own(x), own(y), unbiased=False)
        assert fss.compute().item() == pytest.approx(true.item(), abs=1e-6)
        g = torch.nn.functional.one_hot(labels).double()
        true = fastxkd.partial_distance_correlation(own(x), g, given=own(z), semi_partial=True)
        assert rs.compute().item() == pytest.approx(true.item(), abs=1e-6)
    scaled = fastxkd.FeatureSimilarityScore(mode, projection=project, normalize_rows=True)
    scaled.update(x, y)
    unit = [m / m.norm(dim=1, keepdim=True) for m in (x, y)]
    true = fastxkd.distance_correlation(*(project(m) for m in unit), unbiased=False)
    assert scaled.compute().item() == pytest.approx(true.item(), abs=1e-6)


def test_wrong_projections() -> None:
    with pytest.raises(ValueError, match="width: expected at least 1, got 0"):
        fastxkd.RandomProjection(0)
    with pytest.raises(TypeError, match=r"projection: expected an int or .*, got float"):
        fastxkd.FeatureSimilarityScore(projection=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="projection: expected a width of at least 1, got 0"):
        fastxkd.RelevanceScore(projection=0)
    with pytest.raises(ValueError, match="n: expected at least 2 rows, got 1"):
        fastxkd.projected_width(1, error=0.1)
    for name, options in (("error", {"error": 1.0}), ("failure", {"error": 0.1, "failure": 0.0})):
        with pytest.raises(ValueError, match=rf"{name}: expected a number in \(0, 1\)"):
            fastxkd.projected_width(10, **options)
    with pytest.raises(TypeError, match="student: expected a Tensor"):
        fastxkd.FeatureSimilarityScore(projection=4).update([1.0], torch.ones(1, 2))  # type: ignore[arg-type]


def test_the_operator_gets_tensors(backend: str) -> None:
    """Features in memory take the differentiable operator; both ways agree."""
    x, y, _ = data(50)
    for found, true in zip(
        pairs.Pairs([x, y], "xy").sums(), distance_sums([x, y], ["x", "y"]), strict=True
    ):
        torch.testing.assert_close(found, true, rtol=1e-12, atol=0)
