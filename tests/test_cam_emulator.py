"""The CUDA kernels of cam, run on the CPU by the emulator, against the formulas in float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastxkd.ops.cam import METHODS
from tests import oracles, test_emulator
from tests.test_emulator import CODES, DTYPES, guarded, untouched

# As tests.test_emulator has them; the extension is compiled once for all files.
emulator = test_emulator.emulator
either = test_emulator.either
module = test_emulator.module

OWN_WEIGHTS = ("gradcam", "gradcam++", "xgradcam")
# (n, channels, height, width) and the size of the output. Planes that 16 bytes divide, of which
# several channels together do, of which none do; more than a warp, more than a block.
SHAPES: list[tuple[tuple[int, int, int, int], tuple[int, int]]] = [
    ((1, 1, 1, 1), (4, 3)),
    ((2, 3, 2, 2), (5, 7)),
    ((3, 40, 1, 1), (1, 1)),
    ((2, 64, 7, 7), (20, 33)),
    ((2, 17, 5, 9), (3, 4)),
    ((2, 8, 1, 6), (6, 2)),
    ((1, 300, 4, 5), (4, 5)),
    ((1, 24, 14, 13), (14, 13)),
    ((1, 9, 33, 31), (8, 40)),
    ((1, 4, 52, 48), (52, 48)),
]
NAN = float("nan")


def pair(shape: tuple[int, ...], dtype: torch.dtype, method: str) -> tuple[Tensor, Tensor]:
    """Both of either sign, with maps that are positive somewhere."""
    generator = torch.Generator().manual_seed(sum(shape))
    a = torch.rand(shape, generator=generator) - 0.2
    g = torch.randn(shape[:2] if method == "weights" else shape, generator=generator) + 0.3
    return a.to(dtype), g.to(dtype)


def strides_of(a: Tensor, g: Tensor) -> list[int]:
    """(image, channel, position) of both, whose rows lie one after the other."""
    if g.dim() == 2:
        return [*_strides(a), *g.stride(), 0]
    return [*_strides(a), *_strides(g)]


def _strides(x: Tensor) -> list[int]:
    if x.shape[2] > 1 and x.shape[3] > 1:
        assert x.stride(2) == x.shape[3] * x.stride(3)
    return [x.stride(0), x.stride(1), x.stride(3) if x.shape[3] > 1 else x.stride(2)]


def laid(x: Tensor, layout: str) -> Tensor:
    """The same numbers, elsewhere in memory; NaN around them."""
    if x.dim() == 2 or layout == "contiguous":
        return x
    n, channels, height, width = x.shape
    if layout == "channels last":
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if layout == "every other channel":
        wide = torch.full((n, channels, 2, height, width), NAN, dtype=x.dtype)
        wide[:, :, 0] = x
        return wide[:, :, 0]
    at = 3 if layout.endswith("odd") else 0
    if layout.startswith("channels last"):
        wide = torch.full((n, height, width, channels + 8), NAN, dtype=x.dtype)
        wide[..., at : at + channels] = x.permute(0, 2, 3, 1)
        return wide[..., at : at + channels].permute(0, 3, 1, 2)
    wide = torch.full((n, channels * height * width + 8), NAN, dtype=x.dtype)
    inside = wide[:, at : at + channels * height * width].unflatten(1, x.shape[1:])
    return inside.copy_(x)


def launch(
    emulator: ModuleType,
    a: Tensor,
    g: Tensor,
    method: str,
    size: tuple[int, int] | None = None,
    *,
    relu: bool = True,
    normalize: int = 2,
) -> Tensor:
    size = size or tuple(a.shape[2:])  # type: ignore[assignment]
    exact = torch.float64 if a.dtype == torch.float64 else torch.float32
    sizes, strides = [*a.shape, *size], strides_of(a, g)  # type: ignore[misc]
    code = CODES[a.dtype]
    room = emulator.cam_workspace(sizes, strides, METHODS[method], code, 0)
    whole, out = guarded((a.shape[0], *size), exact)  # type: ignore[misc]
    around, scratch = guarded((room,), torch.float64)
    emulator.cam(
        0,
        0,
        scratch.data_ptr(),
        a.data_ptr(),
        g.data_ptr(),
        out.data_ptr(),
        sizes,
        strides,
        METHODS[method],
        relu,
        normalize,
        code,
    )
    assert untouched(whole)
    assert untouched(around)
    return out


def check(emulator: ModuleType, a: Tensor, g: Tensor, method: str, **options: Any) -> Tensor:
    """The error may exceed that of the same formula in eager torch by a rounding."""
    found = launch(emulator, a, g, method, **options)
    size = options.get("size") or tuple(a.shape[2:])
    relu, normalize = options.get("relu", True), options.get("normalize", 2)
    exact = found.dtype

    def truth(dtype: torch.dtype) -> Tensor:
        raw = oracles.cam_raw(a.to(dtype), g.to(dtype), method)
        return oracles.cam_finish(raw, size, relu, normalize).double()

    true, eager = truth(torch.float64), truth(exact)
    eps = 1e-12 if exact == torch.float64 else 1e-6
    limit = (eager - true).abs().max() + eps * true.abs().max().clamp(min=1e-3)
    assert (found.double() - true).abs().max() <= limit
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(emulator: ModuleType, dtype: torch.dtype, method: str) -> None:
    for shape, size in SHAPES:
        a, g = pair(shape, dtype, method)
        for layout in ("contiguous", "channels last"):
            x, y = laid(a, layout), laid(g, layout)
            check(emulator, x, y, method, size=size)
            check(emulator, x, y, method, relu=False, normalize=0)


LAYOUTS = (
    "every other channel",
    "images apart",
    "images apart, odd",
    "channels last, some channels",
    "channels last, some channels, odd",
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_alignment(
    either: ModuleType, dtype: torch.dtype, method: str, layout: str
) -> None:
    """Sixteen bytes where they are, single elements elsewhere; both tensors or one of them."""
    plain = "channels last" if layout.startswith("channels") else "contiguous"
    for shape in ((2, 24, 7, 7), (3, 16, 6, 4)):
        a, g = pair(shape, dtype, method)
        for x, y in ((layout, layout), (layout, plain), (plain, layout)):
            check(either, laid(a, x), laid(g, y), method, size=(9, 11))


@pytest.mark.parametrize("method", OWN_WEIGHTS)
def test_one_image_for_all(either: ModuleType, method: str) -> None:
    a, g = pair((1, 16, 5, 5), torch.float32, method)
    many = launch(either, a.expand(3, -1, -1, -1), g.expand(3, -1, -1, -1), method)
    assert torch.equal(many, launch(either, a, g, method).expand(3, -1, -1))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("normalize", [0, 1, 2])
@pytest.mark.parametrize("size", [None, (14, 15), (3, 2), (1, 1), (2, 40), (70, 3)], ids=str)
def test_finishing(emulator: ModuleType, size: Any, normalize: int, relu: bool) -> None:
    for dtype in (torch.float32, torch.float64):
        a, g = pair((2, 10, 7, 6), dtype, "hirescam")
        check(emulator, a, g, "hirescam", size=size, normalize=normalize, relu=relu)


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (7, 5), (13, 10), (64, 3)], ids=str)
def test_resizing_is_interpolate(either: ModuleType, size: tuple[int, int]) -> None:
    a = torch.rand(2, 1, 7, 5, dtype=torch.float64)
    one = torch.ones(2, 1, dtype=a.dtype)
    found = launch(either, a, one, "weights", size, relu=False, normalize=0)
    expected = F.interpolate(a, size=size, mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_flat_maps_become_zero(either: ModuleType, method: str) -> None:
    given = {"weights": (2, 3)}.get(method, (2, 3, 4, 4))
    for value in (0.0, 0.5, -1.0):
        g = torch.full(given, value)
        for size in ((4, 4), (9, 10)):
            found = launch(either, torch.full((2, 3, 4, 4), 2.0), g, method, size)
            assert (found == 0).all()


def test_nothing_exceeds_the_range(either: ModuleType) -> None:
    for shape, size in SHAPES[3:]:
        found = launch(either, *pair(shape, torch.float32, "layercam"), "layercam", size)
        assert found.min() == 0
        assert 0.99 < found.max() <= 1


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [NAN, float("inf")], ids=str)
def test_bad_value_stays_in_its_image(
    either: ModuleType, bad: float, method: str, layout: str
) -> None:
    a, g = pair((4, 20, 5, 6), torch.float32, method)
    clean = launch(either, laid(a, layout), laid(g, layout), method, (9, 9))
    rest = torch.arange(4) != 2
    for spoilt in (0, 1):
        x, y = a.clone(), g.clone()
        (x, y)[spoilt][2, 3] = bad
        dirty = launch(either, laid(x, layout), laid(y, layout), method, (9, 9))
        assert torch.equal(dirty[rest], clean[rest])
        if bad != bad:
            assert dirty[2].isnan().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("method", METHODS)
def test_any_device_and_the_same_bits(module: ModuleType, method: str, layout: str) -> None:
    """Few processors and many, which cut the sum over channels otherwise; either order of warps."""
    a, g = (laid(x, layout) for x in pair((2, 96, 5, 5), torch.float32, method))
    try:
        for processors in (1, 3, 100):
            module.set_device(processors, False)
            first = check(module, a, g, method)
            module.set_device(processors, True)
            assert torch.equal(check(module, a, g, method), first)
    finally:
        module.set_device(2, False)


def test_many_channels_on_a_small_device(either: ModuleType) -> None:
    """Runs of the longest length, and a last one that is shorter."""
    for method in ("gradcam", "hirescam"):
        check(either, *pair((1, 1100, 3, 5), torch.float32, method), method)
        check(either, *pair((1, 1100, 8, 8), torch.bfloat16, method), method)


# The gradient of the raw map.


def launch_backward(
    emulator: ModuleType, upstream: Tensor, a: Tensor, g: Tensor, method: str
) -> tuple[Tensor, Tensor]:
    n, channels, height, width = a.shape
    buffers = [guarded(tuple(x.shape), x.dtype) for x in (a, g)]
    emulator.cam_backward(
        0,
        0,
        a.data_ptr(),
        g.data_ptr(),
        upstream.data_ptr(),
        *(inside.data_ptr() for _, inside in buffers),
        n,
        channels,
        height * width,
        METHODS[method],
        CODES[a.dtype],
    )
    assert all(untouched(whole) for whole, _ in buffers)
    return buffers[0][1], buffers[1][1]


def check_backward(emulator: ModuleType, a: Tensor, g: Tensor, method: str) -> None:
    """As the forward; 16-bit gradients may be off by a fifth more than pure rounding."""
    generator = torch.Generator().manual_seed(5)
    upstream = torch.randn(a.shape[0], *a.shape[2:], dtype=torch.float64, generator=generator)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_(True) for x in (a, g)]
        oracles.cam_raw(leaves[0], leaves[1], method).backward(upstream.to(dtype))
        return [x.grad for x in leaves]  # type: ignore[misc]

    exact = torch.float64 if a.dtype == torch.float64 else torch.float32
    upstream = upstream.to(exact).double()
    found = launch_backward(emulator, upstream.to(exact), a, g, method)
    eps = 1e-12 if exact == torch.float64 else 1e-6
    for ours, true, eager in zip(found, gradients(torch.float64), gradients(exact), strict=True):
        limit = (eager.double() - true).norm() + eps * true.norm()
        if a.dtype != exact:
            limit += 1.2 * (true.to(a.dtype).double() - true).norm()
        assert (ours.double() - true).norm() <= limit


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_matches_float64(emulator: ModuleType, dtype: torch.dtype, method: str) -> None:
    for shape, _ in SHAPES:
        check_backward(emulator, *pair(shape, dtype, method), method)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_of_a_nan(either: ModuleType, method: str) -> None:
    """It comes through, and only where it belongs."""
    a, g = pair((3, 4, 5, 5), torch.float32, method)
    upstream = torch.rand(3, 5, 5)
    clean = launch_backward(either, upstream, a, g, method)
    for spoilt in (0, 1):
        x, y = a.clone(), g.clone()
        (x, y)[spoilt][1, 2] = NAN
        found = launch_backward(either, upstream, x, y, method)
        assert found[0][1, 2].isnan().any() or found[1][1, 2].isnan().any()
        for ours, expected in zip(found, clean, strict=True):
            assert torch.equal(ours[[0, 2]], expected[[0, 2]])
            assert torch.equal(ours[1, [0, 1, 3]], expected[1, [0, 1, 3]])


def test_empty_batch(either: ModuleType) -> None:
    none = torch.zeros(0, 3, 4, 4)
    assert launch(either, none, none, "gradcam", (8, 8)).shape == (0, 8, 8)
    assert launch_backward(either, none[:, 0].contiguous(), none, none, "gradcam")[0].numel() == 0


def test_what_no_kernel_serves(either: ModuleType) -> None:
    for too_large in ([0, 1 << 28, 1, 1, 1, 1], [0, 1, 1 << 14, 1 << 14, 1, 1]):
        with pytest.raises(ValueError, match=r"2\^27 channels or positions"):
            either.cam_workspace(too_large, [1] * 6, 0, 0, 0)
    with pytest.raises(ValueError, match="unknown method"):
        either.cam_workspace([1] * 6, [1] * 6, 7, 0, 0)
    with pytest.raises(ValueError, match="unknown dtype"):
        either.cam_workspace([1] * 6, [1] * 6, 0, 4, 0)
    with pytest.raises(ValueError, match=r"2\^30 or more"):
        either.cam(0, 0, 0, 0, 0, 0, [1, 1, 1 << 10, 1, 1 << 20, 1], [1] * 6, 0, True, 0, 0)
    with pytest.raises(ValueError, match="six sizes and six strides"):
        either.cam_workspace([1] * 5, [1] * 6, 0, 0, 0)
