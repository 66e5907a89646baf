"""cam against the formulas in float64, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastxkd
from fastxkd.ops.cam import METHODS, cam_map
from tests import oracles

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FAMILY = [m for m in METHODS if m != "weights"]

# (n, channels, height, width) and the size of the output
SHAPES = [
    ((1, 1, 1, 1), None),
    ((1, 1, 1, 1), (4, 3)),
    ((2, 3, 2, 2), (5, 7)),
    ((3, 300, 7, 7), (56, 56)),
    ((2, 17, 5, 9), (3, 4)),
    ((2, 8, 1, 6), (6, 2)),
    ((4, 64, 14, 13), None),
    ((2, 513, 7, 5), (31, 224)),
    ((1, 9, 33, 31), (8, 40)),
]

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every other channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "some of the images": lambda x: torch.cat([x, x])[: len(x)],
    "cropped": lambda x: F.pad(x, (1, 2, 3, 1), value=torch.nan)[..., 3:-1, 1:-2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "channels_last, some channels": lambda x: torch.cat([x, x], 1).contiguous(
        memory_format=torch.channels_last
    )[:, : x.shape[1]],
    "images expanded": lambda x: x[:1].expand(x.shape),
}

# Three channels of two by two
A = [[[1, 2], [0, 3]], [[2, 0], [1, 1]], [[0, 1], [4, 2]]]
G = [[[0.5, -0.2], [0.1, 0.3]], [[-0.4, 0.2], [0, 0.1]], [[0.2, 0.2], [-0.1, 0.4]]]
GOLDEN = {
    "gradcam": ([[0.125, 0.525], [0.675, 0.85]], [[0, 0.551724], [0.758621, 1]]),
    "gradcam++": ([[0.4435929, 0.6357937], [0.9170105, 1.1672731]], None),
    "xgradcam": (
        [[-0.1833333, 0.4190476], [0.1678571, 0.4964286]],
        [[0, 0.8441245], [0.3381294, 1]],
    ),
    "hirescam": ([[-0.3, -0.2], [-0.4, 1.8]], [[0, 0], [0, 1]]),
    "layercam": ([[0.5, 0.2], [0, 1.8]], [[0.2777778, 0.1111111], [0, 1]]),
    "elementwise": ([[0.5, 0.2], [0, 1.8]], [[0.2777778, 0.1111111], [0, 1]]),
}


def pair(shape: tuple[int, ...], dtype: torch.dtype, method: str) -> tuple[Tensor, Tensor]:
    """Activations as after a ReLU, gradients of either sign, maps that are positive somewhere. With
    elementwise, which is layercam where no activation is negative, some are."""
    activations = (torch.rand(shape) - 0.2 * (method == "elementwise")).to(dtype)
    gradients = (torch.randn(shape[:2] if method == "weights" else shape) + 0.3).to(dtype)
    return activations, gradients


def check(a: Tensor, g: Tensor, method: str, size: Any, relu: bool, normalize: int) -> Tensor:
    found = cam_map(a, g, method=method, size=size, relu=relu, normalize=normalize)
    exact = torch.float64 if a.dtype == torch.float64 else torch.float32
    size = size or tuple(a.shape[2:])
    assert found.dtype == exact
    assert found.shape == (a.shape[0], *size)

    def truth(dtype: torch.dtype) -> Tensor:
        raw = oracles.cam_raw(a.detach().to(dtype), g.detach().to(dtype), method)
        return oracles.cam_finish(raw, size, relu, normalize).double()

    true, eager = truth(torch.float64), truth(exact)
    scale = true.abs().max().clamp(min=1e-3)
    eps = 1e-12 if exact == torch.float64 else 1e-6
    assert (found.double() - true).abs().max() <= (eager - true).abs().max() + eps * scale
    return found


@pytest.mark.parametrize("method", GOLDEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_golden_vectors(backend: str, dtype: torch.dtype, method: str) -> None:
    a, g = torch.tensor([A], dtype=dtype), torch.tensor([G], dtype=dtype)
    raw, final = GOLDEN[method]
    raw = torch.tensor([raw], dtype=dtype)
    found = fastxkd.cam_from(a, g, method, normalize=None, relu=False)
    torch.testing.assert_close(found, raw, rtol=0, atol=1e-6)
    found = fastxkd.cam_from(a, g, method, normalize=None)
    torch.testing.assert_close(found, raw.clamp(min=0), rtol=0, atol=1e-6)
    if final is not None:
        found = fastxkd.cam_from(a, g, method)
        torch.testing.assert_close(found, torch.tensor([final], dtype=dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        ("gradcam", [0.175, -0.025, 0.175]),
        ("gradcam++", [0.2174071, 0.1130929, 0.2009794]),
        ("xgradcam", [0.1666667, -0.175, 0.0857143]),
    ],
)
def test_golden_channel_weights(backend: str, method: str, weights: list[float]) -> None:
    """A method with weights is the bare weighted sum of its weights."""
    a, g = torch.tensor([A], dtype=torch.float64), torch.tensor([G], dtype=torch.float64)
    given = torch.tensor([weights], dtype=torch.float64)
    torch.testing.assert_close(
        fastxkd.cam_from(a, g, method, normalize=None, relu=False),
        fastxkd.cam_from(a, given, "weights", normalize=None, relu=False),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_matches_float64(backend: str, method: str, shape: Any, size: Any) -> None:
    check(*pair(shape, torch.float32, method), method, size, True, 2)
    check(*pair(shape, torch.float64, method), method, size, False, 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_input_is_read_exactly(backend: str, dtype: torch.dtype, method: str) -> None:
    for shape, size in SHAPES[2:5]:
        check(*pair(shape, dtype, method), method, size, True, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(backend: str, dtype: torch.dtype, method: str, layout: str) -> None:
    """Activations and gradients may each lie in memory as they like."""
    a, g = pair((3, 24, 7, 6), dtype, method)
    lay = LAYOUTS[layout]
    check(lay(a), g, method, (9, 11), True, 1)
    if method != "weights":
        check(lay(a), lay(g), method, (9, 11), True, 1)
        check(a, lay(g), method, (9, 11), True, 1)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("normalize", [0, 1, 2])
@pytest.mark.parametrize("size", [None, (14, 15), (3, 2)], ids=str)
def test_finishing(backend: str, size: Any, normalize: int, relu: bool) -> None:
    a, g = pair((3, 10, 7, 6), torch.float32, "hirescam")
    check(a, g, "hirescam", size, relu, normalize)


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (7, 5), (13, 10), (64, 3)], ids=str)
def test_resizing_is_interpolate(backend: str, size: tuple[int, int]) -> None:
    a = torch.rand(2, 1, 7, 5, dtype=torch.float64)
    found = fastxkd.cam_from(a, torch.ones(2, 1, dtype=a.dtype), "weights", size, None)
    expected = F.interpolate(a, size=size, mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_class_activation_maps_of_a_linear_head(backend: str) -> None:
    """GAP + linear: gradients are W_c / hw, so three methods agree, and maps sum to the logit."""
    a = torch.rand(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(5, 3).double()
    logits = head(a.mean((2, 3)))
    (g,) = torch.autograd.grad(logits[:, 1].sum(), a)
    maps = {m: fastxkd.cam_from(a.detach(), g, m, None, None, relu=False) for m in FAMILY}
    cam = torch.einsum("c,nchw->nhw", head.weight[1], a).detach() / 12
    torch.testing.assert_close(maps["gradcam"], cam, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(maps["hirescam"], cam, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(maps["xgradcam"], cam, rtol=1e-6, atol=1e-7)
    without_bias = (logits[:, 1] - head.bias[1]).detach()
    for method in ("gradcam", "hirescam"):
        torch.testing.assert_close(maps[method].sum((1, 2)), without_bias, rtol=1e-12, atol=1e-14)


def test_hirescam_is_complete(backend: str) -> None:
    """Bias-free ReLU net above: the map sums to the logit (Euler); Grad-CAM's does not."""
    a = torch.rand(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    net = nn.Sequential(
        nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3, False)
    ).double()
    logits = net(a)
    (g,) = torch.autograd.grad(logits[:, 2].sum(), a)
    total = fastxkd.cam_from(a.detach(), g, "hirescam", None, None, relu=False).sum((1, 2))
    torch.testing.assert_close(total, logits[:, 2].detach(), rtol=1e-12, atol=1e-14)
    other = fastxkd.cam_from(a.detach(), g, "gradcam", None, None, relu=False).sum((1, 2))
    assert (other - logits[:, 2]).abs().min() > 1e-4


def test_xgradcam_keeps_the_sum(backend: str) -> None:
    a, g = pair((2, 6, 5, 4), torch.float64, "xgradcam")
    total = fastxkd.cam_from(a, g, "xgradcam", None, None, relu=False).sum((1, 2))
    torch.testing.assert_close(total, (a * g).sum((1, 2, 3)), rtol=1e-6, atol=1e-7)


def test_layercam_of_positive_activations_is_element_wise(backend: str) -> None:
    a, g = pair((2, 6, 5, 4), torch.float64, "layercam")
    found = fastxkd.cam_from(a, g, "layercam", None, None, relu=False)
    torch.testing.assert_close(found, F.relu(a * g).sum(1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", FAMILY)
def test_final_is_raw_finished(backend: str, method: str) -> None:
    a, g = pair((2, 6, 5, 4), torch.float64, method)
    raw = fastxkd.cam_from(a, g, method, None, None, relu=False)
    low = F.relu(raw).amin((1, 2), keepdim=True)
    high = F.relu(raw).amax((1, 2), keepdim=True)
    final = (F.relu(raw) - low) / (high - low + 1e-7)
    torch.testing.assert_close(fastxkd.cam_from(a, g, method), final, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [None, (9, 9)], ids=str)
def test_flat_maps_become_zero(backend: str, size: Any, dtype: torch.dtype) -> None:
    for method, (a, g) in {
        "all zero": (torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)),
        "no gradient": (torch.rand(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)),
        "constant": (torch.full((1, 3, 4, 4), 2.0), torch.full((1, 3, 4, 4), 0.5)),
        "all negative": (torch.rand(1, 3, 4, 4), torch.full((1, 3, 4, 4), -1.0)),
    }.items():
        for name in FAMILY:
            found = fastxkd.cam_from(a.to(dtype), g.to(dtype), name, size)
            assert found.abs().max() == 0, (method, name)


def test_range(backend: str) -> None:
    for method in FAMILY:
        a, g = pair((5, 12, 6, 6), torch.float32, method)
        g += 1
        for size in (None, (20, 17)):
            found = fastxkd.cam_from(a, g, method, size)
            assert found.min() >= 0
            assert found.max() <= 1
            assert (found.amin((1, 2)) == 0).all()
            assert (found.amax((1, 2)) > 0.99).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("method", METHODS)
def test_bad_value_stays_in_its_image(backend: str, method: str, layout: str, bad: float) -> None:
    a, g = pair((4, 20, 5, 6), torch.float32, method)
    clean = fastxkd.cam_from(LAYOUTS[layout](a), g, method, (9, 9))
    a[2, 3, 1, 1] = bad
    dirty = fastxkd.cam_from(LAYOUTS[layout](a), g, method, (9, 9))
    rest = torch.arange(4) != 2
    assert torch.equal(dirty[rest], clean[rest])
    if bad != bad:
        assert dirty[2].isnan().all()


@pytest.mark.parametrize("method", FAMILY)
def test_nan_gradient_is_not_hidden(backend: str, method: str) -> None:
    a, g = pair((2, 20, 5, 6), torch.float32, method)
    g[1, 3, 1, 1] = float("nan")
    found = fastxkd.cam_from(a, g, method)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("finished", [False, True])
def test_gradcheck(backend: str, method: str, finished: bool) -> None:
    a, g = pair((2, 3, 4, 3), torch.float64, method)
    a += 0.1

    def work(x: Tensor, y: Tensor) -> Tensor:
        if not finished:
            return fastxkd.cam_from(x, y, method, None, None, relu=False)
        return fastxkd.cam_from(x, y, method, (6, 5))

    inputs = (a.requires_grad_(True), g.requires_grad_(True))
    assert torch.autograd.gradcheck(work, inputs, eps=1e-7, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_matches_float64(
    backend: str, dtype: torch.dtype, layout: str, method: str
) -> None:
    a, g = pair((2, 30, 7, 7), dtype, method)
    upstream = torch.randn(2, 7, 7, dtype=torch.float64)

    def gradients(make: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(kind).requires_grad_(True) for x in (a, g)]
        laid = [LAYOUTS[layout](x) if x.dim() == 4 else x for x in leaves]
        out = make(*laid)
        out.backward(upstream.to(out.dtype))
        return [x.grad for x in leaves]

    exact = torch.float64 if dtype == torch.float64 else torch.float32
    true = gradients(lambda x, y: oracles.cam_raw(x, y, method), torch.float64)
    eager = gradients(lambda x, y: oracles.cam_raw(x, y, method), exact)
    found = gradients(
        lambda x, y: fastxkd.cam_from(x, y, method, normalize=None, relu=False), dtype
    )
    eps = 1e-12 if exact == torch.float64 else 1e-6
    for f, e, t in zip(found, eager, true, strict=True):
        assert f.dtype == dtype
        limit = (e.double() - t).norm() + eps * t.norm()
        if dtype != exact:
            limit += 1.2 * (t.to(dtype).double() - t).norm()
        assert (f.double() - t).norm() <= limit


def test_without_graph_and_with_it_agree(backend: str) -> None:
    for method in FAMILY:
        a, g = pair((2, 6, 5, 4), torch.float32, method)
        plain = fastxkd.cam_from(a, g, method, (9, 9))
        graph = fastxkd.cam_from(a.requires_grad_(True), g, method, (9, 9))
        assert graph.requires_grad
        assert not plain.requires_grad
        torch.testing.assert_close(graph.detach(), plain, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            assert torch.equal(fastxkd.cam_from(a, g, method, (9, 9)), plain)


@pytest.mark.parametrize("method", METHODS)
def test_opcheck(backend: str, method: str) -> None:
    a, g = pair((2, 6, 5, 4), torch.float32, method)
    for layout in ("contiguous", "channels_last"):
        laid = LAYOUTS[layout](a)
        arguments = (laid, g, method, [9, 8], True, 2)
        torch.library.opcheck(torch.ops.fastxkd.cam.default, arguments)
        upstream = torch.rand(2, 5, 4)
        torch.library.opcheck(torch.ops.fastxkd.cam_backward.default, (upstream, laid, g, method))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo's own, of autograd.Function
def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    a, g = pair((2, 6, 5, 4), torch.float32, "gradcam")

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return fastxkd.cam_from(x.relu(), y, "gradcam", (9, 9)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, g), loss(a, g))
    leaves = [x.requires_grad_(True) for x in (a, g)]
    for found, expected in zip(
        torch.autograd.grad(compiled(a, g), leaves),
        torch.autograd.grad(loss(a, g), leaves),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_left_alone(backend: str, method: str) -> None:
    a, g = pair((2, 6, 5, 4), torch.float32, method)
    before = a.clone(), g.clone()
    fastxkd.cam_from(a, g, method, (9, 9))
    fastxkd.cam_from(a.requires_grad_(True), g, method, (9, 9)).sum().backward()
    assert torch.equal(a, before[0])
    assert torch.equal(g, before[1])


@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_threads_gives_the_same_bits(backend: str, method: str) -> None:
    if backend == "reference":
        pytest.skip("torch's own reductions may split differently")
    a, g = pair((3, 600, 14, 14), torch.float32, method)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = a.clone().requires_grad_(True)
            raw = fastxkd.cam_from(leaf, g, method, normalize=None)
            raw.sum().backward()
            found.append((fastxkd.cam_from(a, g, method, (56, 56)), raw.detach(), leaf.grad))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, found[0], strict=True))


def test_empty_batch_of_maps(backend: str) -> None:
    found = fastxkd.cam_from(torch.zeros(0, 3, 4, 4), torch.zeros(0, 3, 4, 4), size=(8, 8))
    assert found.shape == (0, 8, 8)
