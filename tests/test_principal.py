"""principal: the first principal component, against numpy's full decomposition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import fastxkd
from fastxkd.ops import _library
from fastxkd.ops.principal import principal

SHAPES = [(2, 1, 9), (2, 9, 1), (3, 5, 7), (4, 17, 33), (2, 64, 64), (2, 40, 1000), (2, 300, 49)]


def decomposed(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Projections [n, p] and summed loadings [n], of any sign."""
    rows = x.double().numpy()
    rows = rows - rows.mean(2, keepdims=True)
    u, s, v = np.linalg.svd(rows, full_matrices=False)
    return s[:, :1] * v[:, 0], u[:, :, 0].sum(1)


def check(x: Tensor, exact: float, loadings: bool = True) -> None:
    found, sums = principal(x)
    assert found.dtype == sums.dtype == torch.float64
    expected, expected_sums = decomposed(x)
    found = (found - found.mean(1, keepdim=True)).numpy()
    sign = np.sign((found * expected).sum(1))
    reach = np.abs(expected).max(1, keepdims=True)
    off = np.abs(found * sign[:, None] - expected)
    assert (off <= exact * reach).all(), (off / reach).max()
    if loadings:
        np.testing.assert_allclose(sums.numpy() * sign, expected_sums, rtol=0, atol=30 * exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "strided"])
def test_component(backend: str, shape: tuple[int, ...], layout: str) -> None:
    x = torch.randn(shape).clamp(min=0) + torch.randn(shape[0], shape[1], 1)
    if layout == "channels last":
        x = x.mT.contiguous().mT
    elif layout == "strided":
        x = torch.stack([x, -x], -1).flatten(2)[..., ::2][:, :, : shape[2]]
    check(x, 2e-6 if backend == "reference" else 1e-8, loadings=shape[2] > 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    check(torch.randn(2, 20, 50).to(dtype), 2e-6 if backend == "reference" else 1e-8)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_far_from_one(backend: str, size: float) -> None:
    check(torch.randn(2, 8, 40) * size, 2e-6 if backend == "reference" else 1e-8)
    check(torch.randn(2, 40, 8).double() * size**5, 1e-8)


def test_components_that_are_nearly_as_large(backend: str) -> None:
    """A gap of 1 to 10^6 decides; of a larger matrix, so that many steps are taken."""
    q = torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64))[0]
    w = torch.linalg.qr(torch.randn(400, 400, dtype=torch.float64) - 0.5)[0][:, 1:201]
    w = torch.linalg.qr(w - w.mean(0))[0]
    values = torch.linspace(1, 0.1, 200, dtype=torch.float64)
    values[1] = values[0] - 1e-6
    check((q * values @ w.T)[None], 1e-6)


def test_equal_components_give_one_of_them(backend: str) -> None:
    x = torch.zeros(1, 2, 4)
    x[0, 0], x[0, 1] = torch.tensor([1.0, -1, 0, 0]), torch.tensor([0.0, 0, 1, -1])
    found, _ = principal(x)
    assert found.norm().item() == pytest.approx(2**0.5, rel=1e-6)


def test_nothing_to_see(backend: str) -> None:
    found, sums = principal(torch.full((2, 3, 10), 0.7))
    assert found.abs().max() < 1e-6
    assert sums.isfinite().all()
    found, sums = principal(torch.zeros(2, 30, 4))
    assert not found.any()
    assert sums.isfinite().all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(backend: str, wrong: float) -> None:
    x = torch.randn(3, 6, 20)
    alone, _ = principal(x)
    x[1, 2, 3] = wrong
    found, sums = principal(x)
    assert found[1].isnan().all()
    assert sums[1].isnan()
    torch.testing.assert_close(found[[0, 2]], alone[[0, 2]])


@pytest.mark.skipif(not _library.isa_levels(), reason="needs the C++ kernels")
def test_threads_and_company_change_nothing() -> None:
    x = torch.randn(5, 30, 90)
    before = torch.get_num_threads()
    with _library.use_backend("cpu"):
        try:
            torch.set_num_threads(1)
            one = principal(x)
            torch.set_num_threads(3)
            three = principal(x)
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
        assert torch.equal(principal(x[2:3])[0], one[0][2:3])


def test_the_operator_is_a_good_citizen() -> None:
    torch.library.opcheck(torch.ops.fastxkd.principal, (torch.randn(2, 5, 8),))


def test_compiled() -> None:
    x = torch.randn(2, 6, 5, 5)
    call = torch.compile(
        lambda a: fastxkd.cam_from(a, None, "eigencam"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(call(x), fastxkd.cam_from(x, None, "eigencam"))


def test_gradients_take_the_reference() -> None:
    x = torch.randn(2, 6, 30, requires_grad=True)
    projection, _ = principal(x)
    projection.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
