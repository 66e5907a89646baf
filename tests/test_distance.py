"""distance, and the correlations made of it, against the formulas in float64 and PyPI's dcor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastxkd.metrics import distance_correlation, partial_distance_correlation
from fastxkd.metrics.similarity import centre
from fastxkd.ops import _library, pairs
from fastxkd.ops import distance as op
from tests import oracles
from tests.conftest import needs

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

X = [[0, 0], [1, 0], [0, 2], [3, 1], [2, 2], [4, -1]]
Y = [[1], [0], [2], [5], [3], [4]]
G = [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]
INNER = {
    (0, 0): 0.7712818,
    (1, 1): 1.5555556,
    (2, 2): 0.5333333,
    (0, 1): 0.9107848,
    (0, 2): 0.0491285,
    (1, 2): 0.3142697,
}

# rows and widths of each matrix: one tile, several, ragged ones, tiny and wide features
SIZES = [
    (4, [1]),
    (5, [3, 1]),
    (33, [7, 64, 2]),
    (511, [5, 3]),
    (513, [16]),
    (1100, [8, 3]),
    (40, list(range(1, 14))),
]


def golden(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.tensor(m, dtype=dtype) for m in (X, Y, G)]


def related(n: int, widths: list[int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Features that have something to do with each other."""
    common = torch.randn(n, 3, dtype=torch.float64)
    return [
        (common @ torch.randn(3, d, dtype=torch.float64)).add(torch.randn(n, d)).to(dtype)
        for d in widths
    ]


def names(features: list[Tensor]) -> list[str]:
    return [f"x{i}" for i in range(len(features))]


def sums(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    return op.distance_sums(features, names(features))


def true_sums(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    d = torch.stack([oracles.distances(f.double()) for f in features])
    return torch.einsum("kij,lij->kl", d, d), d.sum(2)


# --- golden vectors


def test_golden_inner_products(backend: str) -> None:
    found = centre(*sums(golden()), torch.float64, unbiased=True).values
    for (k, l), value in INNER.items():  # noqa: E741
        assert found[k, l].item() == pytest.approx(value, abs=1e-7)
        assert found[l, k].item() == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_golden_scores(backend: str, dtype: torch.dtype) -> None:
    x, y, g = golden(dtype)
    tolerance = 1e-7 if dtype == torch.float64 else 2e-6
    one = torch.ones_like(y)
    rows = [torch.nn.functional.normalize(m) for m in (x + 1, torch.cat([y, one], 1))]
    for found, value in {
        distance_correlation(x, y): 0.8315081,
        distance_correlation(x, g): 0.0765997,
        distance_correlation(y, g): 0.3450328,
        partial_distance_correlation(x, g, given=y, semi_partial=True): -0.3785653,
        partial_distance_correlation(y, g, given=x, semi_partial=True): 0.5064502,
        partial_distance_correlation(x, g, given=y): -0.4033338,
        distance_correlation(x, y, unbiased=False): 0.7764102,
        distance_correlation(*rows, unbiased=False): 0.2622047,
    }.items():
        assert found.dtype == dtype
        assert found.shape == ()
        # The printed biased values carry the 1e-9 that their code adds under the root.
        slack = 1e-6 if value in (0.7764102, 0.2622047) else 0
        assert found.item() == pytest.approx(value, abs=tolerance + slack)


@pytest.mark.parametrize(("n", "widths"), [(6, (2, 3, 1)), (57, (4, 9, 2)), (600, (3, 5, 2))])
def test_equals_dcor(backend: str, n: int, widths: tuple[int, ...]) -> None:
    dcor = needs("dcor")
    x, y, z = related(n, list(widths))
    a, b, c = x.numpy(), y.numpy(), z.numpy()
    for found, expected in (
        (distance_correlation(x, y), dcor.u_distance_correlation_sqr(a, b)),
        (distance_correlation(x, y, unbiased=False), dcor.distance_correlation_sqr(a, b)),
        (partial_distance_correlation(x, y, given=z), dcor.partial_distance_correlation(a, b, c)),
    ):
        assert found.item() == pytest.approx(float(expected), abs=1e-9)


def test_equals_dcor_of_two_thousand() -> None:
    """Several tiles on either side of the diagonal, Gram products of wide rows."""
    dcor = needs("dcor")
    x, y = related(2000, [96, 48])
    expected = dcor.u_distance_correlation_sqr(x.numpy(), y.numpy())
    assert distance_correlation(x, y).item() == pytest.approx(float(expected), abs=1e-9)


def test_semi_partial_is_pdcor_with_the_target_unprojected(backend: str) -> None:
    x, y, z = related(50, [3, 4, 2])
    semi = partial_distance_correlation(x, y, given=z, semi_partial=True)
    whole = partial_distance_correlation(x, y, given=z)
    left = 1 - distance_correlation(y, z) ** 2
    assert whole.item() == pytest.approx((semi / left.sqrt()).item(), abs=1e-12)
    assert semi.item() == pytest.approx(oracles.partial(x, y, z, semi=True).item(), abs=1e-12)
    assert whole.item() == pytest.approx(oracles.partial(x, y, z, semi=False).item(), abs=1e-12)


# --- the operator


@pytest.mark.parametrize(("n", "widths"), SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_match_float64(backend: str, dtype: torch.dtype, n: int, widths: list[int]) -> None:
    features = related(n, widths, dtype)
    products, row_sums = sums(features)
    true_products, true_rows = true_sums(features)
    assert products.dtype == row_sums.dtype == torch.float64
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(products, true_products, rtol=tolerance, atol=0)
    torch.testing.assert_close(row_sums, true_rows, rtol=tolerance, atol=0)
    torch.testing.assert_close(products, products.T, rtol=1e-14, atol=0)


@pytest.mark.parametrize("tile", [4, 7, 32])
def test_tiles_do_not_matter(backend: str, monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    features = related(67, [3, 40])
    expected = sums(features)
    monkeypatch.setattr(pairs, "TILE", max(tile, 32))
    monkeypatch.setattr(pairs, "STRIP_ELEMENTS", tile * 43)
    for found, value in zip(sums(features), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_of_low_precision_features(backend: str, dtype: torch.dtype) -> None:
    """The features are rounded by their dtype; nothing more is."""
    for n in (8, 100, 700):
        x, y, z = related(n, [6, 9, 3], dtype)
        exact = [m.double() for m in (x, y, z)]
        for found, true in (
            (distance_correlation(x, y), oracles.correlation(*exact[:2], unbiased=True)),
            (
                distance_correlation(x, y, unbiased=False),
                oracles.correlation(*exact[:2], unbiased=False),
            ),
            (
                partial_distance_correlation(x, y, given=z),
                oracles.partial(*exact, semi=False),
            ),
        ):
            assert found.dtype == torch.float32
            assert found.item() == pytest.approx(true.item(), abs=1e-5)


def test_near_duplicates_keep_their_digits(backend: str) -> None:
    """Pairs 1e-4 apart at a norm of 10: the Gram product alone has no digit of their distance."""
    x = torch.randn(40, 64)
    x = 10 * x / x.norm(dim=1, keepdim=True)
    x = torch.cat([x, x + 1e-4 * torch.randn(40, 64)])
    d = op.distance_matrix(x, "x", rows=80).double()
    true = oracles.distances(x.double())
    i = torch.arange(40)
    torch.testing.assert_close(d[i, i + 40], true[i, i + 40], rtol=1e-5, atol=0)
    torch.testing.assert_close(d, true, rtol=1e-5, atol=0)

    # As a sum over the matrix of near pairs alone: rows that are all near each other.
    near = torch.full((30, 64), 3.0) + 1e-4 * torch.randn(30, 64)
    products, _ = sums([near])
    torch.testing.assert_close(products, true_sums([near])[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_common_offset_costs_no_digits(backend: str, dtype: torch.dtype) -> None:
    x, y = ((1e4 + m).to(dtype) for m in related(120, [32, 20]))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(sums([x, y])[0], true_sums([x, y])[0], rtol=tolerance, atol=0)
    true = oracles.correlation(x.double(), y.double(), unbiased=True).item()
    assert distance_correlation(x, y).item() == pytest.approx(true, abs=5 * tolerance)


def test_exact_duplicates_are_at_distance_zero(backend: str) -> None:
    x = torch.randn(20, 300)
    x[7] = x[3]
    for dtype in DTYPES:
        d = op.distance_matrix(x.to(dtype), "x", rows=20)
        assert (d.diagonal() == 0).all()
        assert d[3, 7] == 0
        assert d[7, 3] == 0
        torch.testing.assert_close(d, d.T)


def test_distance_matrix_of_several_tiles(backend: str) -> None:
    (x,) = related(1100, [8])
    d = op.distance_matrix(x, "x", rows=1100)
    torch.testing.assert_close(d, oracles.distances(x), rtol=1e-12, atol=1e-14)


def test_wide_features(backend: str) -> None:
    """d = 70,000: distances concentrate, so that centring takes most of their digits away."""
    x, y = torch.randn(40, 70_000), torch.randn(40, 3)
    x[:, :40_000] += y.repeat(1, 40_000 // 3 + 1)[:, :40_000]
    cdist = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    a, b = oracles.u_centred(cdist), oracles.u_centred(oracles.distances(y.double()))
    true = (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()
    assert distance_correlation(x, y).item() == pytest.approx(true.item(), abs=1e-5)
    assert distance_correlation(x.double(), y).item() == pytest.approx(true.item(), abs=1e-9)


def test_wide_noise(backend: str) -> None:
    """The same without a signal: <A, A> is a millionth of the plain products."""
    x, y = torch.randn(40, 70_000), torch.randn(40, 70_000)
    a, b = (
        torch.cdist(m.double(), m.double(), compute_mode="donot_use_mm_for_euclid_dist")
        for m in (x, y)
    )
    a, b = oracles.u_centred(a), oracles.u_centred(b)
    true = (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()
    x32, y32 = (
        oracles.u_centred(torch.cdist(m, m, compute_mode="donot_use_mm_for_euclid_dist"))
        for m in (x, y)
    )
    eager = (x32 * y32).sum() / ((x32 * x32).sum() * (y32 * y32).sum()).sqrt()
    found = distance_correlation(x, y)
    assert abs(found.item() - true.item()) <= abs(eager.item() - true.item()) + 1e-4


def test_features_of_any_rank_and_layout(backend: str) -> None:
    x, y = torch.randn(12, 3, 4, 5), torch.randn(12, 7)
    expected = distance_correlation(x.flatten(1), y)
    torch.testing.assert_close(distance_correlation(x, y), expected)
    laid = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(distance_correlation(laid, y), expected)
    wide = torch.full((24, 9), torch.nan)
    wide[::2, 1:8] = y
    torch.testing.assert_close(distance_correlation(x, wide[::2, 1:8]), expected)


def test_mixed_dtypes(backend: str) -> None:
    x, y = related(30, [4, 5])
    true = oracles.correlation(x, y.float().double(), unbiased=True)
    found = distance_correlation(x, y.float())
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(true.item(), abs=1e-12)
    assert distance_correlation(x.float(), y.bfloat16()).dtype == torch.float32


def test_any_number_of_threads_gives_the_same_bits(backend: str) -> None:
    if backend == "reference":
        pytest.skip("torch's own reductions may split differently")
    # Few columns: the GEMM between the kernels is not ours, and must not be split by threads.
    features = related(600, [2, 3], torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(sums(features))
    finally:
        torch.set_num_threads(before)
    for products, rows in found[1:]:
        assert torch.equal(products, found[0][0])
        assert torch.equal(rows, found[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_of_size_n_by_n(dtype: torch.dtype) -> None:
    n = 4000
    x, y = torch.randn(n, 16, dtype=dtype), torch.randn(n, 8, dtype=dtype)
    if _library.serve("distance", x) != "cpu":
        pytest.skip("the C++ kernels are not built")
    matrix = n * n * x.element_size()
    assert oracles.peak_bytes(lambda: distance_correlation(x, y)) < matrix / 6
    leaf = x.clone().requires_grad_(True)
    assert oracles.peak_bytes(lambda: distance_correlation(leaf, y).backward()) < matrix / 3
    assert oracles.peak_bytes(lambda: x[:, None, 0] * x[None, :, 0]) >= matrix


def test_memory_of_a_sweep_is_that_of_panels() -> None:
    """What the benchmark takes at n = 20,000 beside seven features: panels, whatever n is."""
    features = [torch.randn(2500, 1024) for _ in range(7)]
    if _library.serve("distance", features[0]) != "cpu":
        pytest.skip("the C++ kernels are not built")
    peak = oracles.peak_bytes(lambda: sums(features))
    assert peak < 100e6


def test_wide_features_are_not_copied() -> None:
    x, y = torch.randn(300, 100_000), torch.randn(300, 4)
    if _library.serve("distance", x) != "cpu":
        pytest.skip("the C++ kernels are not built")
    peak = oracles.peak_bytes(lambda: distance_correlation(x, y))
    assert peak < 100e6 < x.numel() * x.element_size()


# --- gradients


def scores(x: Tensor, y: Tensor, z: Tensor) -> dict[str, Any]:
    return {
        "unbiased": distance_correlation(x, y),
        "biased": distance_correlation(x, y, unbiased=False),
        "partial": partial_distance_correlation(x, y, given=z),
        "semi-partial": partial_distance_correlation(x, y, given=z, semi_partial=True),
    }


@pytest.mark.parametrize("score", ["unbiased", "biased", "partial", "semi-partial"])
@pytest.mark.parametrize("n", [5, 37])
def test_gradcheck(backend: str, monkeypatch: pytest.MonkeyPatch, n: int, score: str) -> None:
    monkeypatch.setattr(pairs, "STRIP_ELEMENTS", 32 * 6)  # 37 rows are two tiles
    inputs = tuple(m.requires_grad_(True) for m in related(n, [2, 3, 1]))
    assert torch.autograd.gradcheck(
        lambda *m: scores(*m)[score], inputs, fast_mode=n > 5, atol=1e-7, rtol=1e-5
    )


def test_gradcheck_of_the_sums(backend: str) -> None:
    inputs = tuple(m.requires_grad_(True) for m in related(6, [2, 3]))
    assert torch.autograd.gradcheck(lambda *m: sums(list(m)), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_matches_float64(backend: str, dtype: torch.dtype) -> None:
    x, y, z = related(60, [5, 4, 2], dtype)

    def gradient(kind: torch.dtype, work: Any) -> Tensor:
        leaf = x.detach().to(kind).requires_grad_(True)
        work(leaf, y.to(kind), z.to(kind)).backward()
        assert leaf.grad is not None
        return leaf.grad

    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for score, oracle in {
        "unbiased": lambda a, b, c: oracles.correlation(a, b, unbiased=True),
        "biased": lambda a, b, c: oracles.correlation(a, b, unbiased=False),
        "partial": lambda a, b, c: oracles.partial(a, b, c, semi=False),
        "semi-partial": lambda a, b, c: oracles.partial(a, b, c, semi=True),
    }.items():
        true = gradient(torch.float64, oracle)
        eager = gradient(exact, oracle).double()
        found = gradient(dtype, lambda a, b, c, score=score: scores(a, b, c)[score])
        assert found.dtype == dtype
        eps = 1e-11 if dtype == torch.float64 else 1e-5
        limit = (eager - true).norm() + eps * true.norm()
        if dtype != exact:
            limit += 1.2 * (true.to(dtype).double() - true).norm()
        assert (found.double() - true).norm() <= limit, score


def test_gradient_reaches_only_who_wants_it(backend: str) -> None:
    x, y, z = related(12, [2, 3, 1])
    y.requires_grad_(True)
    partial_distance_correlation(x, y, given=z).backward()
    assert x.grad is None
    assert z.grad is None
    assert y.grad is not None
    assert y.grad.abs().sum() > 0


def test_duplicates_get_a_finite_subgradient(backend: str) -> None:
    """The distance has no derivative at 0; the pair's own share is left out."""
    x, y, z = related(12, [3, 2, 2])
    x[5], x[6], z[1] = x[2], x[2], z[0]
    leaves = [m.requires_grad_(True) for m in (x, y, z)]
    for name in ("unbiased", "biased", "partial", "semi-partial"):
        grads = torch.autograd.grad(scores(*leaves)[name], leaves, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads), name
    found = torch.autograd.grad(scores(*leaves)["unbiased"], x)[0]
    true = torch.autograd.grad(oracles.correlation(x, y, unbiased=True), x)[0]
    torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-13)


# --- features without a score


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, 1234.567, -1e-3], ids=str)
def test_constant_features_score_zero(backend: str, dtype: torch.dtype, value: float) -> None:
    x, y, z = related(20, [5, 3, 2], dtype)
    constant = torch.full((20, 5), value, dtype=dtype)
    for inputs in ((constant, y, z), (x, constant, z), (constant, constant, constant)):
        leaves = [m.clone().requires_grad_(True) for m in inputs]
        for name, score in scores(*leaves).items():
            assert score.item() == 0, name
            for grad in torch.autograd.grad(score, leaves, allow_unused=True):
                assert grad is None or grad.isfinite().all(), name
    # Nothing to take out: the semi-partial score is the plain one.
    plain = distance_correlation(x, y)
    for semi in (True, False):
        found = partial_distance_correlation(x, y, given=constant, semi_partial=semi)
        torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [4, 9, 300])
def test_all_distances_equal_scores_zero(backend: str, dtype: torch.dtype, n: int) -> None:
    """A label for every sample: the U-centred matrix is 0 up to rounding, and so is the score."""
    labels, x = torch.eye(n, dtype=dtype), torch.randn(n, 6, dtype=dtype)
    assert distance_correlation(x, labels).item() == 0
    assert partial_distance_correlation(x, labels, given=torch.randn(n, 2)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("factor", [1.0, 2.0, 3.0, -0.7], ids=str)
@pytest.mark.parametrize("n", [8, 64, 600])
def test_wholly_explained_scores_zero(
    backend: str, dtype: torch.dtype, factor: float, n: int
) -> None:
    """x is given up to a factor and rounding: nothing of it is left, and noise is no score."""
    x, y = related(n, [6, 3], dtype)
    for semi in (True, False):
        found = partial_distance_correlation(x, y, given=factor * x.float(), semi_partial=semi)
        assert abs(found.item()) <= 1e-3, semi


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scores_stay_in_range(backend: str, dtype: torch.dtype) -> None:
    for n in (4, 5, 8, 100):
        for _ in range(10):
            x, y, z = (torch.randn(n, 3, dtype=dtype) for _ in range(3))
            for name, score in scores(x, y, z).items():
                low = 0 if name == "biased" else -1
                assert low - 1e-5 <= score.item() <= 1 + 1e-5, name
            assert distance_correlation(x, 3 * x).item() == pytest.approx(1, abs=1e-4)


# --- torch's own checks


def test_opcheck(backend: str) -> None:
    features = related(6, [2, 3], torch.float32)
    torch.library.opcheck(torch.ops.fastxkd.distance.default, (features,))
    arguments = (features, torch.rand(2, 2).double(), torch.rand(2, 6).double(), [True, False])
    torch.library.opcheck(torch.ops.fastxkd.distance_backward.default, arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo's own, of autograd.Function
def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    x, y, _ = related(20, [3, 2, 1], torch.float32)
    compiled = torch.compile(
        lambda a, b: distance_correlation(a.tanh(), b), fullgraph=True, backend="aot_eager"
    )
    leaf = x.clone().requires_grad_(True)
    other = x.clone().requires_grad_(True)
    found, expected = compiled(leaf, y), distance_correlation(other.tanh(), y)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def test_inputs_are_left_alone(backend: str) -> None:
    features = related(20, [3, 2], torch.float32)
    before = [f.clone() for f in features]
    leaves = [f.requires_grad_(True) for f in features]
    distance_correlation(*leaves).backward()
    assert all(torch.equal(a, b) for a, b in zip(features, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (2, 1), (9, 33), (64, 1271), (37, 2048)], ids=str)
def test_pair_distances(backend: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """To the last digits also where rows nearly coincide: differences, no products."""
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[-1] = rows[0] + 1e-3
    rows = rows.to(dtype)
    exact = (rows.double()[:, None] - rows.double()).norm(dim=2)
    found = op.pair_distances(rows)
    assert found.dtype == torch.float64
    eps = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found, exact, rtol=eps, atol=0)
    strided = torch.zeros(shape[0], 2 * shape[1], dtype=dtype)[:, ::2]
    strided[:] = rows
    assert torch.equal(op.pair_distances(strided), found)


@pytest.mark.parametrize("far", [30, 1000])
def test_one_row_far_from_all_others(backend: str, far: float) -> None:
    """Its products are 10^6 times those that decide."""
    x = torch.randn(200, 64)
    y = torch.randn(200, 16) + x[:, :16]
    x[-1] *= far
    found = distance_correlation(x, y).item()
    exact = distance_correlation(x.double(), y.double()).item()
    assert abs(found - exact) < 1e-6
