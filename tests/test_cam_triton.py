"""The Triton kernels of cam against the formulas in float64; how, says tests/test_triton.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import oracles
from tests.conftest import needs
from tests.test_triton import DEVICES, ROOT, Guards, patch_once, truncated

METHODS = ("gradcam", "hirescam", "layercam", "gradcam++", "xgradcam", "weights", "elementwise")
OWN_WEIGHTS = ("gradcam", "gradcam++", "xgradcam")
HALF = (torch.bfloat16, torch.float16)
NAN = float("nan")
DEVICE = "cpu"
Size = tuple[int, int]


# --- from here on it is the other process that runs


def pair(shape: tuple[int, ...], dtype: torch.dtype, method: str) -> tuple[Tensor, Tensor]:
    """Both of either sign, with maps that are positive somewhere."""
    generator = torch.Generator().manual_seed(sum(shape))
    a = torch.rand(shape, generator=generator) - 0.2
    g = torch.randn(shape[:2] if method == "weights" else shape, generator=generator) + 0.3
    return a.to(DEVICE, dtype), g.to(DEVICE, dtype)


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def run(
    a: Tensor, g: Tensor, method: str, size: Size | None, relu: bool = True, normalize: int = 2
) -> Tensor:
    """Through the operator, every buffer of it between guards."""
    import fastxkd

    guards = Guards()
    torch.empty = guards.empty  # type: ignore[assignment]
    try:
        with fastxkd.use_backend("triton"):
            shape = list(size or a.shape[2:])
            out = torch.ops.fastxkd.cam(a, g, method, shape, relu, normalize)
    finally:
        torch.empty = guards.real
    guards.check()
    return out.cpu()  # type: ignore[no-any-return]


def check(
    a: Tensor,
    g: Tensor,
    method: str,
    size: Size | None = None,
    relu: bool = True,
    normalize: int = 2,
) -> Tensor:
    """The error may exceed that of the same formula in eager torch by a rounding."""
    found = run(a, g, method, size, relu, normalize)
    exact = torch.float64 if a.dtype == torch.float64 else torch.float32
    shape = size or tuple(a.shape[2:])
    assert (found.dtype, found.shape) == (exact, (a.shape[0], *shape))

    def truth(dtype: torch.dtype) -> Tensor:
        raw = oracles.cam_raw(a.cpu().to(dtype), g.cpu().to(dtype), method)
        return oracles.cam_finish(raw, shape, relu, normalize).double()  # type: ignore[arg-type]

    true, eager = truth(torch.float64), truth(exact)
    eps = 1e-12 if exact == torch.float64 else 1e-6
    limit = (eager - true).abs().max() + eps * true.abs().max().clamp(min=1e-3)
    off = (found.double() - true).abs().max()
    assert off <= limit, f"off by {off:.3g}, at most {limit:.3g}"
    return found


def run_backward(upstream: Tensor, a: Tensor, g: Tensor, method: str) -> list[Tensor]:
    from fastxkd._triton import cam as kernels

    guards = Guards()
    found = [guards.empty(x.shape, dtype=x.dtype, device=x.device) for x in (a, g)]
    kernels.cam_backward(upstream, a, g, *found, method)
    guards.check()
    return [x.cpu() for x in found]


def check_backward(a: Tensor, g: Tensor, method: str) -> None:
    """As the forward; 16-bit gradients may be off by a fifth more than pure rounding."""
    exact = torch.float64 if a.dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(5)
    upstream = torch.randn(a.shape[0], *a.shape[2:], dtype=exact, generator=generator)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().cpu().to(dtype).requires_grad_(True) for x in (a, g)]
        oracles.cam_raw(leaves[0], leaves[1], method).backward(upstream.to(dtype))
        return [x.grad for x in leaves]  # type: ignore[misc]

    found = run_backward(upstream.to(DEVICE), a, g, method)
    eps = 1e-12 if exact == torch.float64 else 1e-6
    for ours, true, eager in zip(found, gradients(torch.float64), gradients(exact), strict=True):
        limit = (eager.double() - true).norm() + eps * true.norm()
        if a.dtype in HALF:
            stored = true.to(a.dtype).double()
            if DEVICE == "cpu" and a.dtype == torch.bfloat16:
                stored = truncated(true)  # as the interpreter stores it
            limit += 1.2 * (stored - true).norm()
        off = (ours.double() - true).norm()
        assert off <= limit, f"gradient off by {off:.3g}, at most {limit:.3g}"


CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__.strip("_").replace("_", " ")] = function
    return function


# Planes that 16 bytes divide, of which several channels together do, of which none do.
SHAPES: tuple[tuple[tuple[int, int, int, int], Size], ...] = (
    ((1, 1, 1, 1), (4, 3)),
    ((2, 3, 2, 2), (5, 7)),
    ((2, 72, 7, 7), (20, 9)),
    ((2, 17, 5, 9), (3, 4)),
)


def _matches(method: str) -> None:
    for shape, size in SHAPES:
        a, g = pair(shape, torch.float32, method)
        for x, y in ((a, g), (last(a), last(g))):
            check(x, y, method, size)
    a, g = pair((1, 300, 4, 4), torch.float32, method)
    check(a, g, method, relu=False, normalize=0)
    check(last(a), g, method, relu=False, normalize=0)


def _matches_in(dtype: torch.dtype, method: str) -> None:
    for shape, size in SHAPES[2:3]:
        a, g = pair(shape, dtype, method)
        for x, y in ((a, g), (last(a), last(g))):
            check(x, y, method, size)


def _gradient(method: str) -> None:
    for dtype in (torch.float32, torch.float64, *HALF):
        shapes = SHAPES if dtype == torch.float32 else SHAPES[2:3]
        for shape, _ in shapes:
            check_backward(*pair(shape, dtype, method), method)


for _method in METHODS:
    CASES[_method] = partial(_matches, _method)
    CASES[f"gradient, {_method}"] = partial(_gradient, _method)
    for _dtype in (torch.float64, *HALF):
        CASES[f"{_method}, {_dtype}"] = partial(_matches_in, _dtype, _method)


@case
def _in_many_small_tiles() -> None:
    """For the turns of the loops."""
    from fastxkd._triton import cam as kernels

    names = ("TILE", "ALONG", "FINISH", "PARTS", "LONGEST_RUN")
    small: tuple[Any, ...] = ({4: 128, 8: 64}, {4: (8, 16), 8: (4, 8)}, 16, 64, 16)
    kept = [getattr(kernels, name) for name in names]
    try:
        for name, value in zip(names, small, strict=True):
            setattr(kernels, name, value)
        for method in METHODS:
            for dtype in (torch.float32, torch.float64):
                a, g = pair((2, 44, 9, 11), dtype, method)
                check(a, g, method, (10, 13))
                check(last(a), last(g), method)
                check_backward(a[:, :7].contiguous(), g[:, :7].contiguous(), method)
    finally:
        for name, value in zip(names, kept, strict=True):
            setattr(kernels, name, value)


@case
def _finishing() -> None:
    for dtype in (torch.float32, torch.float64):
        a, g = pair((2, 10, 7, 6), dtype, "hirescam")
        for size in (None, (14, 15), (3, 2), (1, 1), (2, 40)):
            for normalize in (0, 1, 2):
                check(a, g, "hirescam", size, True, normalize)
            check(a, g, "hirescam", size, False, 1)


@case
def _layouts() -> None:
    """Strides of images and of channels, images that share their memory, places off 16 bytes."""
    for method in ("gradcam++", "layercam", "weights"):
        a, g = pair((2, 16, 6, 4), torch.bfloat16, method)
        wide = torch.full((2, 16, 2, 6, 4), NAN, dtype=a.dtype, device=DEVICE)
        wide[:, :, 0] = a
        check(wide[:, :, 0], g, method, (9, 11))
        flat = torch.full((2, 16 * 24 + 8), NAN, dtype=a.dtype, device=DEVICE)
        check(flat[:, 3:-5].unflatten(1, (16, 6, 4)).copy_(a), g, method, (9, 11))
        same = run(a[:1].expand(2, -1, -1, -1), g[:1].expand(2, *g.shape[1:]), method, None)
        assert torch.equal(same, run(a[:1], g[:1], method, None).expand(2, -1, -1))


@case
def _flat_maps_become_zero() -> None:
    for value in (0.0, 0.5, -1.0):
        a, g = torch.full((1, 3, 4, 4), 2.0), torch.full((1, 3, 4, 4), value)
        for size in ((4, 4), (9, 10)):
            for method in ("gradcam", "layercam"):
                assert not run(a.to(DEVICE), g.to(DEVICE), method, size).any()


@case
def _range_is_kept() -> None:
    for size in (None, (20, 9)):
        found = run(*pair((3, 12, 7, 7), torch.float32, "layercam"), "layercam", size)
        assert found.min() == 0
        assert 0.99 < found.max() <= 1


@case
def _bad_value_stays_in_its_image() -> None:
    for method in METHODS:
        a, g = pair((3, 8, 3, 4), torch.float32, method)
        for lay in (lambda x: x, last):
            clean = run(lay(a), lay(g), method, (6, 6))
            for bad, spoilt in ((NAN, 0), (float("inf"), 0), (NAN, 1)):
                x, y = a.clone(), g.clone()
                (x, y)[spoilt][1, 3] = bad
                dirty = run(lay(x), lay(y), method, (6, 6))
                assert torch.equal(dirty[[0, 2]], clean[[0, 2]]), method
                if bad != bad:
                    assert dirty[1].isnan().all(), method


@case
def _nan_in_the_gradient() -> None:
    upstream = torch.rand(3, 3, 4).to(DEVICE)
    for method in METHODS:
        a, g = pair((3, 4, 3, 4), torch.float32, method)
        clean = run_backward(upstream, a, g, method)
        for spoilt in (0, 1):
            x, y = a.clone(), g.clone()
            (x, y)[spoilt][1, 2] = NAN
            found = run_backward(upstream, x, y, method)
            assert found[0][1, 2].isnan().any() or found[1][1, 2].isnan().any(), method
            for ours, expected in zip(found, clean, strict=True):
                assert torch.equal(ours[[0, 2]], expected[[0, 2]])
                assert torch.equal(ours[1, [0, 1, 3]], expected[1, [0, 1, 3]])


@case
def _twice_the_same_bits() -> None:
    a, g = pair((2, 300, 7, 7), torch.float32, "xgradcam")
    first = run(a, g, "xgradcam", (14, 14))
    assert torch.equal(run(a, g, "xgradcam", (14, 14)), first)


@case
def _empty_batch() -> None:
    none = torch.zeros(0, 3, 4, 4, device=DEVICE)
    assert run(none, none, "gradcam", (8, 8)).shape == (0, 8, 8)
    assert [x.numel() for x in run_backward(none[:, 0], none, none, "gradcam")] == [0, 0]


@case
def _too_large_an_output() -> None:
    from fastxkd._triton import cam as kernels
    from fastxkd._triton.plan import Device

    a = torch.empty(1, 1, 1 << 10, 1, device="meta")
    out = torch.empty(1, 1 << 20, 1, device="meta")
    with pytest.raises(ValueError, match=r"size: .*2\^30, got \[1048576, 1\]"):
        kernels.plan(a, a, out, [1024, 1024, 1] * 2, "gradcam", True, 2, Device(1, 32, True))


@case
def _through_the_public_function() -> None:
    """With a graph and without, in both layouts."""
    import fastxkd

    a, g = pair((2, 9, 5, 4), torch.float32, "xgradcam")
    upstream = torch.rand(2, 10, 11)
    for lay in (lambda x: x, last):
        found = []
        for backend, device in (("reference", "cpu"), ("triton", DEVICE)):
            leaves = [lay(x).to(device).detach().requires_grad_(True) for x in (a, g)]
            with fastxkd.use_backend(backend):
                maps = fastxkd.cam_from(leaves[0], leaves[1], "xgradcam", (10, 11))
                grads = torch.autograd.grad(maps, leaves, upstream.to(device))
                plain = fastxkd.cam_from(*(x.detach() for x in leaves), "xgradcam", (10, 11))
            found.append([x.detach().cpu() for x in (maps, *grads, plain)])
        for ours, expected in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=2e-4, atol=1e-5)


# --- the two processes


def work(device: str) -> None:
    """Names of cases on stdin; on stdout what was wrong with each, "" for nothing, and seconds."""
    global DEVICE
    DEVICE = device
    if device == "cpu":
        patch_once()
    # Of numpy, on infinities and NaN in lanes that are masked off.
    warnings.simplefilter("ignore", RuntimeWarning)
    found = {}
    for name in json.load(sys.stdin):
        torch.manual_seed(0)
        begin, wrong = time.perf_counter(), ""
        try:
            CASES[name]()
        except Exception:
            wrong = traceback.format_exc()
        found[name] = (wrong, time.perf_counter() - begin)
    json.dump(found, sys.stdout)


@lru_cache
def verdicts(device: str, names: tuple[str, ...]) -> dict[str, tuple[str, float]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    process = subprocess.run(
        [sys.executable, "-c", f"from tests.test_cam_triton import work; work({device!r})"],
        input=json.dumps(names),
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}\n{process.stderr}")
    return json.loads(process.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_kernel(name: str, device: str, request: pytest.FixtureRequest) -> None:
    needs("triton")
    chosen = {
        item.callspec.params["name"]
        for item in request.session.items
        if getattr(item, "originalname", "") == "test_kernel" and item.path == request.path
    }
    wrong, _ = verdicts(device, tuple(sorted(chosen)))[name]
    assert not wrong, wrong


def test_every_method_has_a_kernel() -> None:
    from fastxkd.ops.cam import METHODS as every

    assert set(METHODS) == set(every)
    assert set(OWN_WEIGHTS) < set(METHODS)
