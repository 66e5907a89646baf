"""The Triton kernels of distance, by the operator around them, against float64.

As in test_triton the interpreter runs them where there is no GPU, in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastxkd
from fastxkd.metrics import partial_distance_correlation
from fastxkd.metrics.similarity import sums as walked_sums
from fastxkd.ops import _distance_gpu as gpu
from fastxkd.ops import distance as op
from tests import oracles
from tests.conftest import needs
from tests.test_distance import related, sums, true_sums

ROOT = Path(__file__).resolve().parent.parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICE = "cpu"
CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__.removeprefix("_").replace("_", " ")] = function
    return function


def tolerance(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else 1e-6


def there(features: list[Tensor]) -> list[Tensor]:
    return [f.to(DEVICE) for f in features]


def _matches(n: int, widths: list[int], dtype: torch.dtype) -> None:
    features = related(n, widths, dtype)
    for found, true in zip(sums(there(features)), true_sums(features), strict=True):
        torch.testing.assert_close(found.cpu(), true, rtol=tolerance(dtype), atol=0)
    d = op.distance_matrix(features[0].to(DEVICE), "x", rows=n).cpu().double()
    torch.testing.assert_close(
        d, oracles.distances(features[0].double()), rtol=5 * tolerance(dtype), atol=0
    )
    assert (d.diagonal() == 0).all()


# Every number of a row is a turn of the interpreter: few of them, and many dtypes of few rows.
for _n, _widths in ((4, [1]), (9, [7, 20, 2]), (40, [20, 3, 16, 1, 2])):
    for _dtype in DTYPES if _n < 40 else DTYPES[:1]:
        CASES[f"{_n} rows, widths {_widths}, {str(_dtype)[6:]}"] = partial(
            _matches, _n, _widths, _dtype
        )


@case
def _mixed_dtypes_and_layouts() -> None:
    x, y, z = related(34, [18, 5, 30])
    wide = torch.full((68, 9), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    wide[::2, 1:6] = y.bfloat16().to(DEVICE)
    given = [x.to(DEVICE), wide[::2, 1:6], z.float().to(DEVICE).view(34, 2, 3, 5).transpose(1, 3)]
    plain = [f.reshape(34, -1).double().cpu() for f in given]
    for found, true in zip(sums(given), true_sums(plain), strict=True):
        torch.testing.assert_close(found.cpu(), true, rtol=1e-12, atol=0)


@case
def _near_neighbours_keep_their_digits() -> None:
    for dtype, apart in ((torch.float32, 1e-4), (torch.float64, 1e-8)):
        x = 10 * torch.nn.functional.normalize(torch.randn(20, 40, dtype=dtype))
        x = torch.cat([x, x + apart * torch.randn(20, 40, dtype=dtype)])
        d = op.distance_matrix(x.to(DEVICE), "x", rows=40).cpu().double()
        pairs = torch.arange(20)
        near = oracles.distances(x.double())[pairs, pairs + 20]
        torch.testing.assert_close(d[pairs, pairs + 20], near, rtol=tolerance(dtype), atol=0)


@case
def _exact_duplicates_are_at_distance_0() -> None:
    for dtype in DTYPES:
        for width in (5, 40):
            x = torch.randn(40, width).to(dtype)
            x[33] = x[2]
            d = op.distance_matrix(x.to(DEVICE), "x", rows=40)
            assert (d.diagonal() == 0).all()
            assert d[2, 33] == d[33, 2] == 0
            assert int((d == 0).sum()) == 42


@case
def _what_is_no_number_stays_none() -> None:
    x = torch.randn(40, 5)
    x[4, 2] = torch.nan
    d = op.distance_matrix(x.to(DEVICE), "x", rows=40).cpu()
    assert d[4, torch.arange(40) != 4].isnan().all()
    assert d[torch.arange(40) != 4][:, torch.arange(40) != 4].isfinite().all()
    products, _ = sums(there([x, torch.randn(40, 20)]))
    assert products[0].isnan().all()


@case
def _shares_of_a_tile_and_groups_of_matrices() -> None:
    """Programs that share a tile, end within a block, and have matrices that are not there."""
    from fastxkd._triton import distance, plan

    features = related(40, [1, 18, 2, 1, 1, 2, 1, 1, 1], torch.float32)
    usual = distance.BLOCK, distance.device_of
    try:
        for processors in (1, 3):
            distance.BLOCK = {4: 16, 8: 16}
            distance.device_of = lambda _, count=processors: plan.Device(count, 32, True)
            if DEVICE == "cpu":
                for found, true in zip(sums(features), true_sums(features), strict=True):
                    torch.testing.assert_close(found, true, rtol=1e-6, atol=0)
    finally:
        distance.BLOCK, distance.device_of = usual


@case
def _gradients() -> None:
    def true(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return oracles.partial(a, b, c, semi=False)

    def ours(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return partial_distance_correlation(a, b, given=c)

    for dtype in DTYPES:
        given = related(34, [20, 2, 1], dtype)

        def gradient(
            work: Callable[..., Tensor], kind: torch.dtype, device: str, given: Any = given
        ) -> Tensor:
            leaf, *rest = (f.to(device, kind) for f in given)
            leaf = leaf.clone().requires_grad_(True)
            work(leaf, *rest).backward()
            assert leaf.grad is not None
            return leaf.grad.cpu()

        exact = torch.float64 if dtype == torch.float64 else torch.float32
        expected = gradient(true, torch.float64, "cpu")
        limit = (gradient(true, exact, "cpu").double() - expected).norm()
        if dtype != exact:
            limit = 1.2 * (expected.to(dtype).double() - expected).norm()
        found = gradient(ours, dtype, DEVICE)
        assert found.dtype == dtype
        limit += (1e-11 if dtype == torch.float64 else 1e-6) * expected.norm()
        assert (found.double() - expected).norm() <= limit, dtype


@case
def _features_that_are_walked_over_in_panels() -> None:
    if DEVICE == "cpu":
        features = related(67, [20, 2], torch.float32)
        # Of arrays, which are read, and not looked at where they lie.
        products, row_sums, _ = walked_sums([f.numpy() for f in features], ["x", "y"])
        for found, true in zip((products, row_sums), true_sums(features), strict=True):
            torch.testing.assert_close(found, true, rtol=1e-6, atol=0)


@case
def _pair_distances() -> None:
    for dtype in (torch.float32, torch.float64):
        for n, width in ((1, 1), (2, 40), (33, 100)):
            x = 100 + torch.randn(n, width, dtype=dtype)
            found = op.pair_distances(x.to(DEVICE)).cpu()
            true = oracles.distances(x.double())
            torch.testing.assert_close(found, true, rtol=tolerance(dtype), atol=0)
            assert torch.equal(found, found.T)


@case
def _the_same_bits_every_time() -> None:
    features = there(related(40, [20, 2], torch.float32))
    first = sums(features)
    for found, again in zip(first, sums(features), strict=True):
        assert torch.equal(found, again)
    torch.testing.assert_close(first[0], first[0].T, rtol=0, atol=0)


# --- the two processes


def work(device: str) -> None:
    global DEVICE
    DEVICE = device
    if device == "cpu":
        gpu.TILE = 32  # several of few rows
    judge(CASES, device)


def judge(cases: dict[str, Callable[[], None]], device: str) -> None:
    """Names of cases on stdin; on stdout what was wrong with each, "" for nothing."""
    if device == "cpu":
        from tests.test_triton import patch_once

        patch_once()
    # Of numpy, on infinities and NaN in lanes that are masked off.
    warnings.simplefilter("ignore", RuntimeWarning)
    verdicts = {}
    for name in json.load(sys.stdin):
        torch.manual_seed(0)
        wrong = ""
        try:
            with fastxkd.use_backend("triton"):
                cases[name]()
        except Exception:
            wrong = traceback.format_exc()
        verdicts[name] = wrong
    json.dump(verdicts, sys.stdout)


@lru_cache
def verdicts(module: str, device: str, names: tuple[str, ...]) -> dict[str, str]:
    """Of those cases of a test module, whose ``work`` calls :func:`judge` in the other process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    process = subprocess.run(
        [sys.executable, "-c", f"from {module} import work; work({device!r})"],
        input=json.dumps(names),
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}\n{process.stderr}")
    return json.loads(process.stdout)  # type: ignore[no-any-return]


DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_kernel(name: str, device: str, request: pytest.FixtureRequest) -> None:
    needs("triton")
    chosen = {
        item.callspec.params["name"]
        for item in request.session.items
        if getattr(item, "originalname", "") == "test_kernel" and item.path == request.path
    }
    wrong = verdicts("tests.test_distance_triton", device, tuple(sorted(chosen)))[name]
    assert not wrong, wrong
