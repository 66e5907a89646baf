"""The CUDA kernels of distance, run on the CPU by the emulator of csrc/emulator/simt.h, against
float64: the kernels by their addresses, and the operator around them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastxkd.metrics import partial_distance_correlation
from fastxkd.metrics.similarity import sums as walked_sums
from fastxkd.ops import _distance_gpu as gpu
from fastxkd.ops import _library, pairs
from fastxkd.ops import _tiles as tiles
from fastxkd.ops import distance as op
from tests import oracles, test_emulator
from tests.test_distance import related, sums, true_sums

module = test_emulator.module
emulator = test_emulator.emulator
either = test_emulator.either

CODES, guarded, untouched = test_emulator.CODES, test_emulator.guarded, test_emulator.untouched
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NARROW = 16
# rows and columns of a tile, widths of the matrices: one block, blocks cut short, narrow ones
TILES = [
    (1, 1, [1]),
    (4, 4, [3, 40]),
    (33, 70, [16, 17, 2]),
    (100, 31, [20, 64, 5, 1, 33]),
    (64, 96, [33]),
]


def launch(
    emulator: ModuleType,
    features: list[Tensor],
    rows: slice,
    cols: slice,
    *,
    shifts: Tensor | None = None,
    narrow: int = NARROW,
    into: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``[K, rows, cols]`` distances, less the shifts; the sums go ``into`` (products, row_sums)."""
    exact = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    k, n = len(features), features[0].shape[0]
    size = rows.stop - rows.start, cols.stop - cols.start
    whole, grams = guarded((k, *size), exact)
    centred = [f.to(exact) - f.to(exact).mean(0) for f in features]
    for gram, x, f in zip(grams, centred, features, strict=True):
        if f.shape[1] > narrow:
            gram.copy_(x[rows] @ x[cols].T)
    norms = [torch.stack([x[at].square().sum(1) for x in centred]) for at in (rows, cols)]
    shifts = torch.zeros(k, dtype=torch.float64) if shifts is None else shifts
    room = emulator.distance_workspace(k, *size, 0) if into else 0
    around, scratch = guarded((room,), torch.float64)
    emulator.distance_tile(
        0,
        0,
        scratch.data_ptr(),
        [g.data_ptr() for g in grams],
        [f.data_ptr() for f in features],
        [f.stride(0) for f in features],
        [CODES[f.dtype] for f in features],
        [f.shape[1] for f in features],
        norms[0].data_ptr(),
        norms[1].data_ptr(),
        shifts.data_ptr(),
        into[0].data_ptr() if into else 0,
        into[1].data_ptr() if into else 0,
        *size,
        rows.start,
        cols.start,
        n,
        rows.start == cols.start,
        CODES[exact],
        narrow,
    )
    assert untouched(whole)
    assert untouched(around)
    return grams


def true_tile(features: list[Tensor], rows: slice, cols: slice) -> Tensor:
    return torch.stack([oracles.distances(f.double())[rows, cols] for f in features])


def close(
    found: Tensor, features: list[Tensor], rows: slice, cols: slice, tolerance: float
) -> None:
    """A Gram product's rounding is relative to the norms, not to the distance that is left."""
    true = true_tile(features, rows, cols).square()
    norms = torch.stack([(f.double() - f.double().mean(0)).square().sum(1) for f in features])
    limit = tolerance * (true + norms[:, rows, None] + norms[:, None, cols])
    assert ((found.double().square() - true).abs() <= limit).all()


# --- the kernels


@pytest.mark.parametrize("size", TILES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distances(
    emulator: ModuleType, dtype: torch.dtype, size: tuple[int, int, list[int]]
) -> None:
    rows, cols, widths = size
    features = related(rows + cols, widths, dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for at in ((0, rows), (rows, rows + cols)), ((0, min(rows, cols)),) * 2:
        where = [slice(*a) for a in at]
        close(launch(emulator, features, *where), features, *where, tolerance)


@pytest.mark.parametrize("size", TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_are_added_to_what_is_there(
    emulator: ModuleType, dtype: torch.dtype, size: tuple[int, int, list[int]]
) -> None:
    rows, cols, widths = size
    features = related(rows + cols, widths, dtype)
    k, n = len(features), rows + cols
    shifts = torch.linspace(1, 3, k, dtype=torch.float64)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for diagonal in (False, True):
        top, left = slice(0, rows), slice(0, rows) if diagonal else slice(rows, n)
        before = torch.randn(k, k, dtype=torch.float64), torch.randn(k, n, dtype=torch.float64)
        wholes, into = zip(*(guarded(tuple(b.shape), torch.float64) for b in before), strict=True)
        for place, b in zip(into, before, strict=True):
            place.copy_(b)
        found = launch(emulator, features, top, left, shifts=shifts, into=into).double()
        assert all(untouched(whole) for whole in wholes)
        d = true_tile(features, top, left) - shifts[:, None, None]
        if diagonal:
            d *= 1 - torch.eye(rows, dtype=torch.float64)
        torch.testing.assert_close(found, d, rtol=0, atol=10 * tolerance)
        # The sums of the very distances that were stored: terms cancel, and one rounds like all.
        d, times = found, 1 if diagonal else 2
        products = torch.einsum("kij,lij->kl", d, d) * times
        limit = tolerance * times * d.abs().amax() ** 2 * rows * cols + 1e-14
        torch.testing.assert_close(into[0] - before[0], products, rtol=0, atol=float(limit))
        limit = tolerance * d.abs().amax() * max(rows, cols) + 1e-14
        row_sums = torch.zeros(k, n, dtype=torch.float64)
        row_sums[:, top] += d.sum(2)
        if not diagonal:
            row_sums[:, left] += d.sum(1)
        torch.testing.assert_close(into[1] - before[1], row_sums, rtol=0, atol=float(limit))


def test_bits_do_not_depend_on_the_order_of_warps(module: ModuleType) -> None:
    features = related(150, [3, 40, 20, 7, 90], torch.float32)
    found = []
    for reversed_ in (False, True, False):
        module.set_device(2, reversed_)
        into = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(5, 150, dtype=torch.float64)
        launch(module, features, slice(0, 70), slice(70, 150), into=into)
        found.append(into)
    module.set_device(2, False)
    for products, row_sums in found[1:]:
        assert torch.equal(products, found[0][0])
        assert torch.equal(row_sums, found[0][1])
        assert torch.equal(products, products.T)


def test_many_processors_share_a_tile(module: ModuleType) -> None:
    """More shares than one of a tile, and shares that end within a run."""
    features = related(200, [30, 4, 20, 9, 5], torch.float32)
    true = true_tile(features, slice(0, 99), slice(99, 200))
    for processors in (1, 3, 64):
        module.set_device(processors, False)
        into = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(5, 200, dtype=torch.float64)
        launch(module, features, slice(0, 99), slice(99, 200), into=into)
        expected = 2 * torch.einsum("kij,lij->kl", true, true)
        torch.testing.assert_close(into[0], expected, rtol=1e-6, atol=0)
    module.set_device(2, False)


def test_more_matrices_than_one_launch_takes(either: ModuleType) -> None:
    features = related(12, [1 + k % 20 for k in range(70)], torch.float32)
    into = torch.zeros(70, 70, dtype=torch.float64), torch.zeros(70, 12, dtype=torch.float64)
    launch(either, features, slice(0, 12), slice(0, 12), into=into)
    for found, true in zip(into, true_sums(features), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_near_neighbours_keep_their_digits(emulator: ModuleType, dtype: torch.dtype) -> None:
    """Pairs 1e-4 (1e-8) apart at a norm of 10: the Gram product has no digit of their distance."""
    apart, tolerance = (1e-4, 1e-6) if dtype == torch.float32 else (1e-8, 1e-12)
    x = 10 * torch.nn.functional.normalize(torch.randn(40, 64, dtype=dtype))
    x = torch.cat([x, x + apart * torch.randn(40, 64, dtype=dtype)])
    found = launch(emulator, [x], slice(0, 40), slice(40, 80))[0].double()
    true = oracles.distances(x.double())[:40, 40:]
    torch.testing.assert_close(found, true, rtol=1e-5 if dtype == torch.float32 else 1e-9, atol=0)
    near = found.diagonal(), true.diagonal()
    torch.testing.assert_close(*near, rtol=tolerance, atol=0)


def test_exact_duplicates_and_the_diagonal_are_0(emulator: ModuleType) -> None:
    for dtype in DTYPES:
        for width in (5, 300):
            x = torch.randn(40, width).to(dtype)
            x[33] = x[2]
            d = launch(emulator, [x], slice(0, 40), slice(0, 40))[0]
            assert (d.diagonal() == 0).all()
            assert d[2, 33] == 0
            assert d[33, 2] == 0
            assert (
                (d == 0).sum(1)
                == torch.where(torch.isin(torch.arange(40), torch.tensor([2, 33])), 2, 1)
            ).all()


def test_features_in_strides_between_others(emulator: ModuleType) -> None:
    wide = torch.full((40, 60), torch.nan)
    for begin, width in ((1, 9), (20, 33)):
        x = torch.randn(40, width)
        wide[:, begin : begin + width] = x
        given = wide[:, begin : begin + width]
        found = launch(emulator, [given], slice(3, 20), slice(20, 40))
        assert torch.equal(found, launch(emulator, [x], slice(3, 20), slice(20, 40)))


def test_what_is_no_number_stays_none(emulator: ModuleType) -> None:
    for width in (5, 40):
        x = torch.randn(20, width)
        x[4, 2] = torch.nan
        d = launch(emulator, [x], slice(0, 10), slice(10, 20), narrow=NARROW)[0]
        # Centred features are NaN throughout, those that were given in one row.
        assert d[4].isnan().all()
        assert d[torch.arange(10) != 4].isfinite().all()


def test_arguments_that_no_kernel_serves(either: ModuleType) -> None:
    x = [torch.randn(8, 20) for _ in range(2)]
    with pytest.raises(ValueError, match="narrow"):
        launch(either, x, slice(0, 4), slice(4, 8), narrow=either.DISTANCE_NARROW + 1)
    apart = torch.empty(3, 4, 4)
    with pytest.raises(ValueError, match="one after the other"):
        either.distance_tile(
            *(0, 0, 0, [apart[0].data_ptr(), apart[2].data_ptr()], [0, 0], [20, 20], [0, 0]),
            *([20, 20], 0, 0, 0, 0, 0, 4, 4, 0, 4, 0, False, 0, 0),
        )
    with pytest.raises(ValueError, match="one entry per matrix"):
        either.distance_tile(
            *(0, 0, 0, [apart.data_ptr()], [0, 0], [20], [0]),
            *([20], 0, 0, 0, 0, 0, 4, 4, 0, 4, 0, False, 0, 0),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_of_the_gradient(emulator: ModuleType, dtype: torch.dtype) -> None:
    exact = torch.float64
    for rows, cols, k in ((1, 1, 1), (7, 300, 3), (40, 33, 5)):
        d = torch.rand(k, rows, cols, dtype=dtype)
        d[:, 0, cols // 2] = 0
        factors = torch.randn(k, dtype=dtype)
        on_rows, on_cols = torch.randn(rows, dtype=exact), torch.randn(cols, dtype=exact)
        if k > 1:
            factors[0] = 0
            d[0, rows - 1, 0] = torch.inf
        v = (
            on_rows[:, None]
            + on_cols
            + torch.einsum("k,kij->ij", factors.to(exact), d.to(exact).nan_to_num(posinf=0))
        )
        for of in range(1 if k > 1 else 0, k):
            whole, found = guarded((rows, cols), dtype)
            emulator.distance_grad_tile(
                *(0, 0, d.data_ptr(), found.data_ptr(), factors.data_ptr()),
                *(on_rows.data_ptr(), on_cols.data_ptr(), k, of, rows, cols, CODES[dtype]),
            )
            assert untouched(whole)
            true = torch.where(d[of] == 0, 0, v / d[of].to(exact))
            scale = 1e-6 if dtype == torch.float32 else 1e-14
            limit = scale * (1 + k) * 4 / d[of].to(exact).clamp_min(1e-30)
            assert ((found.to(exact) - true).abs() <= limit.masked_fill(d[of] == 0, 0)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pair_distances(emulator: ModuleType, dtype: torch.dtype) -> None:
    for n, width in ((1, 1), (2, 40), (16, 32), (33, 65), (50, 7)):
        x = 100 + torch.randn(n, width, dtype=dtype)
        whole, out = guarded((n, n), torch.float64)
        emulator.pair_distances(0, 0, x.data_ptr(), out.data_ptr(), n, width, CODES[dtype])
        assert untouched(whole)
        true = oracles.distances(x.double())
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(out, true, rtol=tolerance, atol=0)
        assert torch.equal(out, out.T)


# --- the operator around them


@pytest.fixture
def as_on_a_gpu(either: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that a tensor of a GPU takes, in tiles of 32 rows."""
    for place in (op, tiles, pairs):
        monkeypatch.setattr(place, "serve", lambda operator, tensor: "cuda")
    monkeypatch.setattr(gpu, "cuda_kernels", lambda tensor: (either, 0, 0))
    monkeypatch.setattr(gpu, "TILE", 32)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_matches_float64(dtype: torch.dtype) -> None:
    for n, widths in ((4, [1]), (33, [7, 64, 2]), (70, [20, 3, 16, 17, 5])):
        features = related(n, widths, dtype)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        for found, true in zip(sums(features), true_sums(features), strict=True):
            torch.testing.assert_close(found, true, rtol=tolerance, atol=0)
        d = op.distance_matrix(features[0], "x", rows=n).double()
        torch.testing.assert_close(
            d, oracles.distances(features[0].double()), rtol=tolerance, atol=0
        )


@pytest.mark.usefixtures("as_on_a_gpu")
def test_operator_of_mixed_dtypes_and_layouts() -> None:
    x, y, z = related(40, [24, 5, 30])
    wide = torch.full((80, 9), torch.nan, dtype=torch.bfloat16)
    wide[::2, 1:6] = y.bfloat16()
    features = [x, wide[::2, 1:6], z.float().view(40, 2, 3, 5).transpose(1, 3)]
    plain = [f.reshape(40, -1).double() for f in features]
    for found, true in zip(sums(features), true_sums(plain), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_operator(dtype: torch.dtype) -> None:
    x, y, z = related(60, [20, 4, 17], dtype)

    def work(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return partial_distance_correlation(a, b, given=c)

    def true(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return oracles.partial(a, b, c, semi=False)

    def gradient(kind: torch.dtype, of: Any) -> Tensor:
        leaf = x.detach().to(kind).requires_grad_(True)
        of(leaf, y.to(kind), z.to(kind)).backward()
        assert leaf.grad is not None
        return leaf.grad

    exact = torch.float64 if dtype == torch.float64 else torch.float32
    expected = gradient(torch.float64, true)
    eager = (gradient(exact, true).double() - expected).norm()
    if dtype != exact:
        eager = 1.2 * (expected.to(dtype).double() - expected).norm()
    found = gradient(dtype, work)
    assert found.dtype == dtype
    limit = eager + (1e-11 if dtype == torch.float64 else 1e-6) * expected.norm()
    assert (found.double() - expected).norm() <= limit


@pytest.mark.usefixtures("as_on_a_gpu")
def test_features_from_a_file(tmp_path: Path) -> None:
    x, y = related(75, [20, 3], torch.float32)
    mapped = []
    for name, feature in (("x", x), ("y", y)):
        np.save(tmp_path / f"{name}.npy", feature.numpy())
        mapped.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    products, row_sums, dtype = walked_sums(mapped, ["x", "y"])
    assert dtype == torch.float32
    for found, true in zip((products, row_sums), true_sums([x, y]), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_pair_distances_of_the_operator() -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(37, 100, dtype=dtype).T.contiguous().T
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(
            op.pair_distances(x), oracles.distances(x.double()), rtol=tolerance, atol=0
        )


@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_host_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number goes from a tensor to Python, forward or backward; nor one the other way, whose
    copy would wait as well."""
    features = [f.requires_grad_(True) for f in related(70, [20, 3], torch.float32)]

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the host asks for a number")

    for name in (
        "item",
        "tolist",
        "cpu",
        "numpy",
        "__bool__",
        "__float__",
        "__int__",
        "new_tensor",
    ):
        monkeypatch.setattr(Tensor, name, refuse)
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, refuse)
    products, row_sums = sums(features)
    torch.autograd.grad([products.sum(), row_sums.sum()], features)
    op.distance_matrix(features[0], "x", rows=70)
    op.pair_distances(features[0])


def test_tiles_of_a_gpu_are_bounded() -> None:
    """In rows, in the bytes of all tiles, and in the numbers of a strip of centred rows."""
    assert gpu.tile_rows([1024] * 7, torch.float32) == gpu.TILE
    for widths in ([64] * 50, [64] * 300, [1 << 20], [200_000] * 3, [1]):
        for dtype in (torch.float32, torch.float64):
            rows = gpu.tile_rows(widths, dtype)
            assert rows % 32 == 0
            assert 32 <= rows <= gpu.TILE
            assert rows == 32 or rows**2 * len(widths) * dtype.itemsize <= gpu.TILES_BYTES
            assert rows == 32 or rows * sum(widths) <= gpu.STRIP_ELEMENTS


class _Somewhere:
    """What full_precision asks of a tensor."""

    device, dtype = torch.device("cuda"), torch.float32


def test_products_are_not_rounded_to_tf32() -> None:
    """Whichever way the caller has allowed it; afterwards it is allowed again."""
    how, everything = torch.backends.cuda.matmul, torch.backends
    tensor: Any = _Somewhere()
    if not hasattr(how, "fp32_precision"):
        pytest.skip("this torch has one switch, which is tested below")
    usual = torch.get_float32_matmul_precision()
    try:
        for allow in ("ieee", "none", "tf32"):
            how.fp32_precision = allow
            for _ in range(2):
                with gpu.full_precision(tensor):
                    assert how.fp32_precision in ("ieee", "none")
                assert how.fp32_precision == allow
        torch.set_float32_matmul_precision("high")
        with gpu.full_precision(tensor):
            assert how.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "high"
        # Handed down from the setting of everything, and still so afterwards.
        torch.set_float32_matmul_precision("highest")
        how.fp32_precision = "none"
        everything.fp32_precision = "tf32"
        assert how.fp32_precision == "tf32"
        guard = gpu.full_precision(tensor)
        with guard:
            assert how.fp32_precision == "ieee"
        assert how.fp32_precision == "tf32"
        guard = gpu.full_precision(tensor)
        guard.__enter__()
        assert guard.__exit__(ValueError, ValueError(), None) is False
        assert how.fp32_precision == "tf32"
        everything.fp32_precision = "none"
        assert how.fp32_precision == "none"
    finally:
        everything.fp32_precision = "none"
        how.fp32_precision = "none"
        torch.set_float32_matmul_precision(usual)


def test_products_of_an_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Switch:
        allow_tf32 = True

    switch, tensor = Switch(), _Somewhere()
    monkeypatch.setattr(torch.backends.cuda, "matmul", switch)
    with gpu.full_precision(tensor):  # type: ignore[arg-type]
        assert switch.allow_tf32 is False
    assert switch.allow_tf32 is True


def test_it_has_kernels_on_a_gpu() -> None:
    assert "distance" in _library.ON_GPU
