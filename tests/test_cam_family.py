"""The wider CAM family against its formulas, written out here in float64, one image at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastxkd
from fastxkd import cam
from fastxkd.cam.maps import principal_map
from tests.conftest import needs

GRADIENTS = [
    cam.GradCAM, cam.HiResCAM, cam.GradCAMElementWise, cam.GradCAMPlusPlus, cam.XGradCAM,
    cam.LayerCAM, cam.EigenGradCAM, cam.FinerCAM,
]  # fmt: skip
EVERY = [*GRADIENTS, cam.EigenCAM, cam.CAM, cam.ScoreCAM, cam.AblationCAM]
TRIALS = [cam.ScoreCAM, cam.AblationCAM]


class Net(nn.Module):
    """Ends in a mean over positions and a linear head, in 2 or 3 dimensions."""

    def __init__(self, dims: int = 2, channels: int = 9) -> None:
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.stem = nn.Sequential(conv(3, 6, 3, stride=2), nn.ReLU())
        self.body = nn.Sequential(conv(6, channels, 3), nn.ReLU(inplace=True))
        self.head = nn.Linear(channels, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.stem(images)).flatten(2).mean(2))


@pytest.fixture
def net() -> Net:
    return Net().double().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 21, 17, dtype=torch.float64)


# --- the oracle


def component(parts: Tensor) -> Tensor:
    """[c, ...] -> [...], by a full SVD; the loadings' sum is positive, or the largest value."""
    rows = parts.flatten(1).T
    rows = rows - rows.mean(0)
    _, _, vh = torch.linalg.svd(rows, full_matrices=True)
    found = rows @ vh[0]
    loadings = vh[0].sum()
    sign = loadings if abs(loadings) > 0.01 else found[found.abs().argmax()]
    return (found if sign >= 0 else -found).reshape(parts.shape[1:])


def parts_of(method: str, a: Tensor, g: Tensor) -> Tensor:
    """[c, ...] of one image: what is summed, or projected."""
    space = tuple(range(1, a.dim()))
    if method == "EigenCAM":
        return a
    if method in ("HiResCAM", "EigenGradCAM"):
        return a * g
    if method == "LayerCAM":
        return a * F.relu(g)
    if method == "GradCAMElementWise":
        return F.relu(a * g)
    if method in ("GradCAM", "FinerCAM"):
        return a * g.mean(space, keepdim=True)
    total = a.sum(space, keepdim=True)
    if method == "XGradCAM":
        return a * (a * g / (total + 1e-7)).sum(space, keepdim=True)
    alpha = (g**2 / (2 * g**2 + total * g**3 + 1e-6)).masked_fill(g == 0, 0)
    return a * (F.relu(g) * alpha).sum(space, keepdim=True)


def raw(method: str, a: Tensor, g: Tensor, smooth: bool = False) -> Tensor:
    parts = parts_of(method, a, g)
    return component(parts) if smooth or method.startswith("Eigen") else parts.sum(0)


def min_max(m: Tensor) -> Tensor:
    m = m - m.min()
    return m / (1e-7 + m.max())


def finished(m: Tensor, size: tuple[int, ...]) -> Tensor:
    mode = "bilinear" if m.dim() == 2 else "trilinear"
    return min_max(F.interpolate(min_max(F.relu(m))[None, None], size=size, mode=mode)[0, 0])


def finer(logits: Tensor, k: int, ranks: list[int], alpha: float) -> Tensor:
    order = sorted(
        range(len(logits)), key=lambda j: abs(float(logits[j].detach() - logits[k].detach()))
    )
    p = logits.softmax(0)
    others = [order[r] for r in ranks]
    assert order[0] == k
    return sum(p[j] * (logits[k] - alpha * logits[j]) for j in others) / sum(p[j] for j in others)


def by_hand(
    method: str, model: nn.Module, layer: nn.Module, images: Tensor, targets: list[int],
    *, size: Any = None, smooth: bool = False, as_maps: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:  # fmt: skip
    maps = []
    for image, k in zip(images, targets, strict=True):
        kept: list[Tensor] = []
        handle = layer.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out) or +out)
        logits = model(image[None])[0]
        handle.remove()
        score = finer(logits, k, [1, 2, 3], 1.0) if method == "FinerCAM" else logits[k]
        (g,) = torch.autograd.grad(score, kept[0])
        a, g = as_maps(kept[0].detach())[0], as_maps(g)[0]
        maps.append(finished(raw(method, a, g, smooth), size or image.shape[1:]))
    return torch.stack(maps)


def close(found: Tensor, expected: Tensor, atol: float = 1e-9) -> None:
    assert expected.abs().max() > 1e-4  # a map of zeros compares with anything
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# --- from tensors

A = torch.tensor([[[1.0, 2], [0, 3]], [[2, 0], [1, 1]], [[0, 1], [4, 2]]])[None]
G = torch.tensor([[[0.5, -0.2], [0.1, 0.3]], [[-0.4, 0.2], [0, 0.1]], [[0.2, 0.2], [-0.1, 0.4]]])[
    None
]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("elementwise", [[0.5, 0.2], [0.0, 1.8]]),
        ("eigencam", [[-1.4121570, -0.8338047], [2.6744726, -0.4285109]]),
        ("eigengradcam", [[0.0924763, -0.4725753], [-0.5373471, 0.9174460]]),
    ],
)
def test_golden_vectors(method: str, expected: list[list[float]]) -> None:
    g = None if method == "eigencam" else G
    found = fastxkd.cam_from(A, g, method, normalize=None, relu=False)
    torch.testing.assert_close(found, torch.tensor([expected]), rtol=0, atol=1e-6)


OPERATOR = {
    "GradCAM": "gradcam", "HiResCAM": "hirescam", "LayerCAM": "layercam", "XGradCAM": "xgradcam",
    "GradCAMPlusPlus": "gradcam++", "GradCAMElementWise": "elementwise", "EigenCAM": "eigencam",
    "EigenGradCAM": "eigengradcam",
}  # fmt: skip


def check_tensors(name: str, smooth: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a, g = torch.rand(shape).to(dtype), torch.randn(shape).to(dtype)
    a = a - 0.1 if name == "GradCAMElementWise" else a
    given = None if name == "EigenCAM" else g
    found = fastxkd.cam_from(
        a, given, OPERATOR[name], normalize=None, relu=False, eigen_smooth=smooth
    )
    expected = torch.stack(
        [raw(name, x.double(), y.double(), smooth) for x, y in zip(a, g, strict=True)]
    )
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=exact * expected.abs().max())
    size = tuple(2 * length + 1 for length in shape[2:])
    maps = fastxkd.cam_from(a, given, OPERATOR[name], size, eigen_smooth=smooth)
    close(maps.double(), torch.stack([finished(m, size) for m in expected]), atol=1e-5)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


@pytest.mark.parametrize("name", OPERATOR)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 7, 6), (2, 30, 3, 4), (2, 5, 3, 4, 5)], ids=str)
@DTYPES
def test_tensors(name: str, smooth: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_tensors(name, smooth, shape, dtype)


@pytest.mark.parametrize("name", [name for name in OPERATOR if not name.startswith("Eigen")])
@DTYPES
def test_volumes_on_every_kernel(backend: str, name: str, dtype: torch.dtype) -> None:
    check_tensors(name, False, (2, 5, 3, 4, 5), dtype)


@pytest.mark.parametrize("method", ["elementwise", "eigencam", "eigengradcam", "gradcam"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 14, 3, 3), (1, 3, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("smooth", [False, True])
def test_gradients(method: str, shape: tuple[int, ...], smooth: bool) -> None:
    a = torch.rand(shape, dtype=torch.float64).requires_grad_(True)
    g = torch.randn(shape, dtype=torch.float64).requires_grad_(True)

    def maps(a: Tensor, g: Tensor) -> Tensor:
        given = None if method == "eigencam" else g
        more: dict[str, Any] = {"normalize": None, "relu": False, "eigen_smooth": smooth}
        return fastxkd.cam_from(a, given, method, **more)

    inputs = (a, g.detach()) if method == "eigencam" else (a, g)
    assert torch.autograd.gradcheck(maps, inputs)


def test_gradient_of_a_deficient_component() -> None:
    """Channels that are zero make equal eigenvalues, which must not make NaN."""
    a = torch.rand(1, 6, 2, 2, dtype=torch.float64)
    a[:, 2:] = 0
    leaf = a.clone().requires_grad_(True)
    fastxkd.cam_from(leaf, None, "eigencam", normalize=None).square().sum().backward()
    assert leaf.grad.isfinite().all()
    assert leaf.grad.abs().max() > 0
    for empty in (torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 2, 1)):
        leaf = empty.requires_grad_(True)
        maps = fastxkd.cam_from(leaf, None, "eigencam")
        maps.sum().backward()
        assert torch.equal(maps, torch.zeros_like(maps))
        assert leaf.grad.isfinite().all()


def test_the_sign_after_a_layer_norm() -> None:
    """Channels that sum up to nothing: rounding must not decide, whatever the dtype."""
    a = F.layer_norm(torch.randn(8, 6, 5, 32).double(), [32]).permute(0, 3, 1, 2)
    expected = fastxkd.cam_from(a, None, "eigencam", normalize=None, relu=False)
    peak = expected.flatten(1).gather(1, expected.flatten(1).abs().argmax(1, keepdim=True))
    assert (peak > 0).all()
    found = fastxkd.cam_from(a.float(), None, "eigencam", normalize=None, relu=False)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def of_few_parts(shape: tuple[int, ...]) -> Tensor:
    """What layers give: a few patterns that channels share, noise, a ReLU."""
    n, channels, *space = shape
    patterns = torch.randn(n, 4, *[length // 2 for length in space])
    patterns = F.interpolate(patterns, space, mode="bilinear")
    return (torch.einsum("nck,nkhw->nchw", torch.rand(n, channels, 4), patterns)
            + 0.3 * torch.randn(shape)).clamp(min=0)  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 64, 40, 30), (2, 300, 7, 7)], ids=str)
@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1e-30, 0), (1e35, 0), (1, 1e2), (1, 1e4)])
def test_digits_of_a_component(shape: tuple[int, ...], scale: float, offset: float) -> None:
    """Whatever the activations' size, or their mean's beside their spread."""
    a = of_few_parts(shape) * scale + offset
    expected = torch.stack([component(x) for x in a.double()])
    found = fastxkd.cam_from(a, None, "eigencam", normalize=None, relu=False).double()
    exact = 1e-6 * expected.abs().max()
    torch.testing.assert_close(found, expected, rtol=0, atol=float(exact))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("shape", [(1, 12, 8, 8), (1, 90, 5, 5)], ids=str)
def test_components_close_together(shape: tuple[int, ...], gap: float, dtype: torch.dtype) -> None:
    """Whichever they come to, no direction has more variance, and the gradient is finite."""
    rows = torch.randn(shape[1], shape[2] * shape[3], dtype=torch.float64)
    u, s, vh = torch.linalg.svd(rows - rows.mean(1, keepdim=True), full_matrices=False)
    s[1] = s[0] * (1 - gap)
    a = ((u * s) @ vh).reshape(shape).to(dtype).requires_grad_(True)
    found = fastxkd.cam_from(a, None, "eigencam", normalize=None, relu=False)
    share = found.detach().double().square().sum() / s[0] ** 2
    torch.testing.assert_close(share, torch.ones_like(share), rtol=0, atol=1e-6)
    found.square().sum().backward()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 24, 12, 10), (2, 90, 5, 5)], ids=str)
def test_gradients_of_float32(shape: tuple[int, ...]) -> None:
    """Against autograd through a float64 ``eigh``."""
    a, upstream = of_few_parts(shape), torch.randn(shape[0], *shape[2:])
    leaf = a.double().requires_grad_(True)
    rows = leaf.flatten(2) - leaf.flatten(2).mean(2, keepdim=True)
    loadings = torch.linalg.eigh(rows @ rows.mT)[1][..., -1]
    maps = (loadings * loadings.sum(1, keepdim=True).sign())[:, None] @ rows
    (maps[:, 0] * upstream.flatten(1)).sum().backward()
    found = a.requires_grad_(True)
    more: dict[str, Any] = {"normalize": None, "relu": False}
    (fastxkd.cam_from(found, None, "eigencam", **more) * upstream).sum().backward()
    exact = 2e-6 * leaf.grad.abs().max()
    torch.testing.assert_close(found.grad.double(), leaf.grad, rtol=0, atol=float(exact))


def test_a_component_where_products_are_rounded() -> None:
    a = torch.rand(2, 64, 20, 20)  # no component stands out
    expected = torch.stack([component(x) for x in a.double()])
    with torch.autocast("cpu"):
        found = principal_map(a)
    assert found.dtype == torch.float32
    exact = 1e-6 * expected.abs().max()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=float(exact))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(3, 4, 5, 5), (3, 40, 5, 5)], ids=str)
def test_an_image_that_is_not_finite_stays_alone(wrong: float, shape: tuple[int, ...]) -> None:
    a, upstream = torch.rand(shape), torch.rand(3, 5, 5)
    rest = a[[0, 2]].requires_grad_(True)
    alone = fastxkd.cam_from(rest, None, "eigencam")
    (alone * upstream[[0, 2]]).sum().backward()
    a[1, 2, 3, 3] = wrong
    a.requires_grad_(True)
    found = fastxkd.cam_from(a, None, "eigencam", normalize=None)
    assert found[1].isnan().all()
    found = fastxkd.cam_from(a, None, "eigencam")
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], alone)
    (found * upstream)[[0, 2]].sum().backward()
    torch.testing.assert_close(a.grad[[0, 2]], rest.grad)
    assert not a.grad[1].any()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: fastxkd.cam_from(A, G, "eigencam"), ValueError, "gradients: expected None"),
        (lambda: fastxkd.cam_from(A, None, "eigengradcam"), TypeError, "gradients: expected a Ten"),
        (lambda: fastxkd.cam_from(A, None), TypeError, "gradients: expected a Tensor, got None"),
        (lambda: fastxkd.cam_from(None, None, "eigencam"), TypeError, "activations: expected a T"),
        (
            lambda: fastxkd.cam_from(A.long(), None, "eigencam"),
            TypeError,
            "activations: expected a floating-point dtype, got torch.int64",
        ),
        (
            lambda: fastxkd.cam_from(A, G.double(), "eigengradcam"),
            TypeError,
            "gradients: expected dtype and device of activations, torch.float32",
        ),
        (
            lambda: fastxkd.cam_from(A, G[:, :2], "eigengradcam"),
            ValueError,
            r"gradients: expected \[1, 3, 2, 2\] to match activations .*got \[1, 2, 2, 2\]",
        ),
        (
            lambda: fastxkd.cam_from(A[0], G[0], "eigengradcam"),
            ValueError,
            r"activations: expected spatial maps .*or volumes .*got shape \[3, 2, 2\]",
        ),
        (
            lambda: fastxkd.cam_from(A[..., None], G[..., None], size=(4, 4)),
            ValueError,
            r"size: expected 3 lengths of at least 1, got \(4, 4\)",
        ),
    ],
)
def test_wrong_tensors(call: Callable[[], Tensor], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


# --- from models


@pytest.mark.parametrize("explainer", [*GRADIENTS, cam.EigenCAM], ids=lambda e: e.__name__)
@pytest.mark.parametrize("layer", ["stem", "body"])
@pytest.mark.parametrize("smooth", [False, True])
def test_gradient_family(
    net: Net, images: Tensor, explainer: Any, layer: str, smooth: bool
) -> None:
    found = explainer(net, layer)(images, [2, 0, 4], eigen_smooth=smooth)
    expected = by_hand(
        explainer.__name__, net, net.get_submodule(layer), images, [2, 0, 4], smooth=smooth
    )
    close(found, expected)


@pytest.mark.parametrize(
    "explainer", [e for e in EVERY if e is not cam.EigenCAM], ids=lambda e: e.__name__
)
def test_every_kind_of_target(net: Net, images: Tensor, explainer: Any) -> None:
    index = [3, 0, 3]
    with explainer(net, "body") as explain:
        expected = explain(images, index, normalize=None)
        for targets in (tuple(index), torch.tensor(index), torch.tensor(index).numpy()):
            assert explain(images, targets, normalize=None).equal(expected)
        assert explain.outputs.equal(net(images).detach())
        # One class for all.
        assert explain(images, 3, normalize=None)[::2].allclose(expected[::2], atol=1e-12)
        best = net(images).argmax(1)
        assert explain(images).equal(explain(images, best))
        if explainer is not cam.FinerCAM:  # where callables replace the score
            each = [lambda row, k=k: row[k] for k in index]
            close(explain(images, each, normalize=None), expected, 1e-12)
            third = explain(images, 3, normalize=None)
            close(explain(images, lambda row: row[3], normalize=None), third, 1e-12)
        if explainer not in TRIALS:

            def score(out: Tensor) -> Tensor:
                return (out[torch.arange(3), index] * out.new_tensor([1, 2, 3])).sum()

            parts = [explain(images, objective=lambda out, i=i: score(out * F.one_hot(
                torch.tensor(i), 3)[:, None])) for i in range(3)]  # fmt: skip
            whole = explain(images, objective=score)
            for i, part in enumerate(parts):
                torch.testing.assert_close(whole[i], part[i], rtol=0, atol=1e-9)


@pytest.mark.parametrize("explainer", [cam.GradCAM, cam.CAM], ids=lambda e: e.__name__)
def test_an_objective_that_ties_images_together(net: Net, images: Tensor, explainer: Any) -> None:
    """A score that is no sum over images."""

    def spread(out: Tensor) -> Tensor:
        return out.softmax(1).var(0).sum()

    activations = net.body(net.stem(images)).detach().requires_grad_(True)
    (g,) = torch.autograd.grad(spread(net.head(activations.flatten(2).mean(2))), activations)
    scale = 1 if explainer is cam.GradCAM else activations[0, 0].numel()
    expected = F.relu((g.mean((2, 3), keepdim=True) * activations).sum(1)) * scale
    found = explainer(net, "body")(images, objective=spread, normalize=None, size=None)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-15)
    assert expected.max() > 0


# --- CAM


@pytest.mark.parametrize("dims", [2, 3])
def test_cam_sums_up_to_the_logit(dims: int) -> None:
    model = Net(dims).double().eval()
    images = torch.randn(2, 3, *[11] * dims, dtype=torch.float64)
    nn.init.uniform_(model.head.weight, 0.0, 1.0)  # nothing for the ReLU to take away
    maps = cam.CAM(model, "body")(images, [1, 4], normalize=None, size=None)
    logits = model(images)[[0, 1], [1, 4]] - model.head.bias[[1, 4]]
    torch.testing.assert_close(maps.flatten(1).mean(1), logits.detach())


def test_cam_is_grad_cam_there(net: Net, images: Tensor) -> None:
    close(cam.CAM(net, "body")(images, [2, 0, 4]), cam.GradCAM(net, "body")(images, [2, 0, 4]))
    named = cam.CAM(net, "body", head="head")(images)
    assert named.equal(cam.CAM(net, "body", head=net.head)(images))


def test_cam_with_a_convolution_as_head(images: Tensor) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 5, 1), nn.Flatten()
    ).double()
    close(cam.CAM(model, "1")(images, 2), cam.GradCAM(model, "1")(images, 2))


def test_cam_where_it_is_not_defined(net: Net, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"'stem': expected \[n, 9, ...\], what the head takes"):
        cam.CAM(net, "stem")(images)
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
                         nn.Linear(4, 5)).double()  # fmt: skip
    with pytest.raises(ValueError, match=r"'1': the output is not the head's answer.*use GradCAM"):
        cam.CAM(flat, "1")(images)
    with pytest.raises(ValueError, match="target_layers: expected the one before the head, got 2"):
        cam.CAM(net, ["stem", "body"])
    with pytest.raises(ValueError, match="head: expected a Linear or a 1 x 1 convolution, got Se"):
        cam.CAM(net, "body", head="stem")
    with pytest.raises(ValueError, match="head: Sequential has no linear layer"):
        cam.CAM(nn.Sequential(nn.Conv2d(3, 4, 3)), "0")


# --- FinerCAM


@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize("comparisons", [[1], [2, 4], [1, 2, 3, 9]], ids=str)
def test_finer_score(net: Net, images: Tensor, alpha: float, comparisons: list[int]) -> None:
    logits = net(images).detach()
    ranks = [r for r in comparisons if r < 5]

    def score(out: Tensor) -> Tensor:
        return sum(finer(row, k, ranks, alpha) for row, k in zip(out, [2, 0, 4], strict=True))

    explain = cam.FinerCAM(
        net, "stem", base_method=cam.LayerCAM, alpha=alpha, comparisons=comparisons
    )
    found = explain(images, [2, 0, 4], normalize=None)
    expected = cam.LayerCAM(net, "stem")(images, objective=score, normalize=None)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-15)
    assert score(logits).isfinite()
    assert expected.max() > 0


def test_finer_cam_refuses(net: Net, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"comparisons: \[5\] leave no other of 5 classes"):
        cam.FinerCAM(net, "stem", comparisons=[5])(images)
    for wrong in ([], [0]):
        with pytest.raises(ValueError, match="comparisons: expected ranks from 1 on"):
            cam.FinerCAM(net, "stem", comparisons=wrong)
    with pytest.raises(TypeError, match="base_method: expected an explainer of gradients"):
        cam.FinerCAM(net, "stem", base_method=cam.EigenCAM)


# --- trials


@torch.no_grad()
def by_trial(
    name: str, model: nn.Module, layer: nn.Module, images: Tensor, targets: list[int], axis: int = 0
) -> Tensor:
    """Raw maps [n, ...]: image after image, channel after channel, everything run again."""
    maps = []
    for image, k in zip(images, targets, strict=True):
        kept: list[Tensor] = []
        handle = layer.register_forward_hook(lambda _, __, out, kept=kept: kept.append(+out))
        y = float(model(image[None])[0, k])
        handle.remove()
        a = kept[0][0].detach()
        scores = []
        for c in range(a.shape[axis]):
            if name == "ScoreCAM":
                mode = "bilinear" if a.dim() == 3 else "trilinear"
                m = F.interpolate(a[None, c : c + 1], image.shape[1:], mode=mode,
                                  align_corners=True)[0]  # fmt: skip
                m = (m - m.min()) / (m.max() - m.min() + 1e-8)
                scores.append(float(model(image[None] * m)[0, k]))
            else:
                gone = a.clone()
                gone.select(axis, c).zero_()
                handle = layer.register_forward_hook(lambda *_, gone=gone: gone[None])
                scores.append((y - float(model(image[None])[0, k])) / y)
                handle.remove()
        weights = torch.tensor(scores, dtype=a.dtype)
        weights = weights.softmax(0) if name == "ScoreCAM" else weights
        maps.append(torch.tensordot(weights, a, ([0], [axis])))
    return torch.stack(maps)


@pytest.mark.parametrize("explainer", TRIALS, ids=lambda e: e.__name__)
@pytest.mark.parametrize("layer", ["stem", "body", "body.0"])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_trials(net: Net, images: Tensor, explainer: Any, layer: str, batch_size: int) -> None:
    targets = [2, 0, 4]
    explain = explainer(net, layer, batch_size=batch_size)
    found = explain(images, targets, normalize=None, size=None)
    name = explainer.__name__
    if layer == "body.0":
        net.body[1] = nn.ReLU()  # the hooks here keep what an in-place one would overwrite
    expected = F.relu(by_trial(name, net, net.get_submodule(layer), images, targets))
    close(found, expected)


class Residual(nn.Module):
    """A path around the layer, and a shape taken from before it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.layer = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).relu()
        n = len(x)
        y = self.layer(x).relu()
        if self.kind == "sum":
            y = x + y
        elif self.kind == "cat":
            y = torch.cat([x[:, :3], y[:, 3:]], 1)
        return self.head(y.reshape(n, 6, -1).mean(2))


@pytest.mark.parametrize("kind", ["sum", "cat", "chain"])
@pytest.mark.parametrize("n", [1, 3])
def test_ablation_where_the_trunk_matters(images: Tensor, kind: str, n: int) -> None:
    model, targets = Residual(kind).double().eval(), [2, 0, 4][:n]
    found = cam.AblationCAM(model, "layer", batch_size=4)(
        images[:n], targets, normalize=None, size=None
    )
    expected = F.relu(by_trial("AblationCAM", model, model.layer, images[:n], targets))
    close(found, expected)


def test_ablation_runs_the_trunk_for_one_image(net: Net, images: Tensor) -> None:
    rows: list[int] = []
    net.stem.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    cam.AblationCAM(net, "body", batch_size=10)(images, 1)
    assert rows == [3, 1, 1, 1, 1]  # the images, the trial, 27 channels in chunks of 10


def test_ablation_far_below() -> None:
    """Where no activation is 0: pytorch-grad-cam's value, that grows along its batch of 2."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(3, 4)).double()  # fmt: skip
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        a = model[:2](images)
        expected = []
        for i, k in enumerate((1, 3)):
            y = model[2:](a[i : i + 1])[0, k]
            weights = []
            for c in range(3):
                gone = a[i].clone()
                gone[c] = a[i].min() - 1e7 * (c % 2 + 1)
                weights.append((y - model[2:](gone[None])[0, k]) / y)
            expected.append(F.relu(torch.tensordot(torch.stack(weights), a[i], 1)))
    explain = cam.AblationCAM(model, "1", batch_size=2, value="below")
    found = explain(images, [1, 3], normalize=None)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=0)


def test_ablation_of_a_share(net: Net, images: Tensor) -> None:
    """Channels that are not tried weigh nothing; which ones are, by a loop."""
    explain = cam.AblationCAM(net, "body", ratio_channels_to_ablate=0.25)
    found = explain(images, 1, normalize=None, size=None)
    with torch.no_grad():
        activations = net.body(net.stem(images))
    for i, a in enumerate(activations):
        strong = min_max(component(a).abs()) > 0.01
        shares = []
        for channel in a:
            size = channel - channel.min()
            shares.append(float((size * strong).sum() / size.sum()) if size.sum() > 0 else 0.0)
        order = sorted(range(9), key=lambda c: shares[c])
        tried = order[:2] + order[-2:]
        y = net.head(a.mean((1, 2)))[1]
        total = torch.zeros_like(a[0])
        for c in tried:
            gone = a.clone()
            gone[c] = 0
            total += (y - net.head(gone.mean((1, 2)))[1]).detach() / y.detach() * a[c]
        torch.testing.assert_close(found[i], F.relu(total), rtol=1e-9, atol=1e-12)
    assert found.max() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e(differentiable=True), "differentiable: (Score|Ablation)CAM has no gradient"),
        (lambda e: e(objective=torch.sum), "objective: .*scores images one by one; pass targets"),
        (lambda e: e(len), "targets: expected the callable to return a Tensor, got 5"),
    ],
)
@pytest.mark.parametrize("explainer", TRIALS, ids=lambda e: e.__name__)
def test_trials_refuse(net: Net, images: Tensor, explainer: Any, call: Any, message: str) -> None:
    explain = explainer(net, "body")
    with pytest.raises(ValueError, match=message):
        call(lambda *a, **kw: explain(images, *a, **kw))


def test_trial_arguments(net: Net) -> None:
    with pytest.raises(ValueError, match="batch_size: expected an int of at least 1, got 0"):
        cam.ScoreCAM(net, "body", batch_size=0)
    with pytest.raises(ValueError, match="value: expected 'zero' or 'below', got 'mean'"):
        cam.AblationCAM(net, "body", value="mean")
    for share in (0, 1.5):
        with pytest.raises(ValueError, match=r"ratio_channels_to_ablate: expected a share in"):
            cam.AblationCAM(net, "body", ratio_channels_to_ablate=share)
    with pytest.raises(ValueError, match=r"target layer 'head': expected spatial activations"):
        cam.ScoreCAM(net, ["body", "head"])(torch.rand(1, 3, 21, 17).double())
    with pytest.raises(ValueError, match="objective: EigenCAM explains activations, not a score"):
        cam.EigenCAM(net, "body")(torch.rand(1, 3, 21, 17).double(), objective=torch.sum)


# --- layouts


@pytest.mark.parametrize(
    ("shape", "image", "prefix", "grid"),
    [
        ((2, 197, 5), (224, 224), None, (14, 14)),
        ((2, 196, 5), (224, 224), None, (14, 14)),
        ((2, 196, 5), (224, 224), 1, (14, 14)),  # a layer before the class token joins
        ((2, 201, 5), (224, 224), None, (14, 14)),  # registers
        ((2, 9, 5), (32, 32), 5, (2, 2)),
        ((2, 9, 5), (32, 32), None, (3, 3)),
        ((2, 31, 5), (24, 20), None, (6, 5)),
        ((2, 1 + 8 * 24, 5), (64, 192), None, (8, 24)),
        ((2, 7, 7, 96), (224, 224), None, (7, 7)),
        ((2, 56, 56, 20), (224, 224), None, (56, 56)),
        ((2, 4, 6, 32), (64, 96), None, (4, 6)),
    ],
    ids=str,
)
def test_transformer_layouts(
    shape: tuple[int, ...], image: tuple[int, int], prefix: int | None, grid: tuple[int, int]
) -> None:
    x = torch.randn(shape)
    found = cam.to_maps(x, image, prefix)
    expected = x[:, -(grid[0] * grid[1]) :] if x.dim() == 3 else x.flatten(1, 2)
    assert found.shape == (shape[0], shape[-1], *grid)
    assert found.flatten(2).equal(expected.mT)


@pytest.mark.parametrize(
    ("shape", "image"),
    [
        ((2, 7, 7, 7), (224, 224)),
        ((2, 64, 7, 7), (224, 224)),
        ((2, 6, 5, 4), (24, 20)),  # looks like [6, 5] maps of 4 channels, and is not
        ((2, 10, 5, 4), (24, 20)),
        ((2, 5), (24, 20)),
    ],
    ids=str,
)
def test_layouts_that_stay(shape: tuple[int, ...], image: tuple[int, int]) -> None:
    x = torch.randn(shape)
    assert cam.to_maps(x, image) is x


def test_tokens_without_a_grid() -> None:
    with pytest.raises(ValueError, match=r"reshape_transform: 195 tokens form no grid .*224 x 224"):
        cam.to_maps(torch.rand(2, 195, 4), (224, 224))


def test_tokens_before_images(images: Tensor) -> None:
    """[tokens, n, c] must not pass for a batch."""
    model = nn.Sequential(nn.Conv2d(3, 4, 7, stride=7), nn.Flatten(2), nn.Identity()).double()
    model[2].forward = lambda x: x.permute(2, 0, 1)
    model.append(nn.LayerNorm(4)).double()
    with pytest.raises(
        ValueError, match=r"layer '3': expected spatial .*got \[6, 3, 4\]; use resh"
    ):
        cam.GradCAM(model, "3")(images, objective=lambda out: out[0, :, 1].sum())


class Tokens(nn.Module):
    def __init__(self, registers: int) -> None:
        super().__init__()
        self.num_prefix_tokens = 1 + registers
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.tokens = nn.Parameter(torch.randn(1, 1 + registers, 16))
        self.block = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.last = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT
        x = self.block(torch.cat([self.tokens.expand(len(x), -1, -1), x], 1))
        return self.head(self.last(x)[:, 0])


@pytest.mark.parametrize("explainer", [*GRADIENTS, cam.EigenCAM, *TRIALS], ids=lambda e: e.__name__)
@pytest.mark.parametrize("registers", [0, 4])
def test_tokens(explainer: Any, registers: int) -> None:
    model = Tokens(registers).double().eval()
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    found = explainer(model, "block")(images, [3, 1])

    def as_maps(x: Tensor) -> Tensor:
        return x[:, 1 + registers :].transpose(1, 2).reshape(len(x), 16, 2, 3)

    explicit = explainer(model, "block", cam.tokens_to_maps(2, 3, prefix=1 + registers))
    assert explicit(images, [3, 1]).equal(found)
    assert explainer(model, "block", as_maps)(images, [3, 1]).allclose(found, atol=1e-12)
    name = explainer.__name__
    if name == "ScoreCAM":
        return  # masks are of the maps; the formula is the one tested above
    if name == "AblationCAM":
        raws = by_trial(name, model, model.block, images, [3, 1], axis=1)
        raws = raws[:, 1 + registers :].reshape(2, 2, 3)
        expected = torch.stack([finished(m, (8, 12)) for m in raws])
    else:
        expected = by_hand(name, model, model.block, images, [3, 1], as_maps=as_maps)
    close(found, expected)


@pytest.mark.parametrize(
    "explainer", [cam.GradCAM, cam.EigenCAM, *TRIALS], ids=lambda e: e.__name__
)
def test_swin(explainer: Any) -> None:
    swin = needs("torchvision").models.swin_transformer.SwinTransformer
    model = swin([4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=5).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    layer = model.features[3]  # [n, 4, 4, 16]
    found = explainer(model, [layer])(images, [3, 1])
    explicit = explainer(model, [layer], lambda x: x.permute(0, 3, 1, 2))(images, [3, 1])
    assert found.shape == (2, 32, 32)
    assert found.equal(explicit)
    assert found.max() > 0.5


# --- volumes


@pytest.mark.parametrize("explainer", EVERY, ids=lambda e: e.__name__)
@pytest.mark.parametrize("smooth", [False, True])
def test_volumes(explainer: Any, smooth: bool) -> None:
    model = Net(3).double().eval()
    images = torch.randn(2, 3, 13, 11, 9, dtype=torch.float64)
    found = explainer(model, "body")(images, [3, 1], eigen_smooth=smooth)
    assert found.shape == (2, 13, 11, 9)
    name = explainer.__name__
    if name in ("ScoreCAM", "AblationCAM"):
        if smooth:
            return  # their weights are in by_trial's sums
        raws = by_trial(name, model, model.body, images, [3, 1])
        expected = torch.stack([finished(m, (13, 11, 9)) for m in raws])
    else:
        # CAM is Grad-CAM here.
        name = "GradCAM" if name == "CAM" else name
        expected = by_hand(name, model, model.body, images, [3, 1], smooth=smooth)
    close(found, expected)
    if explainer is cam.GradCAM:
        both = explainer(model, ["stem", "body"])(images, 3, size=(4, 5, 6))
        assert both.shape == (2, 4, 5, 6)


# --- several inputs


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.mix, self.head = nn.Linear(2, 4), nn.Linear(4, 5)

    def forward(self, images: Tensor, notes: Tensor, scale: float = 1.0) -> Tensor:
        x = self.conv(images).relu().mean((2, 3)) * self.mix(notes).exp()
        return self.head(scale * x)


@pytest.mark.parametrize(
    "explainer", [cam.GradCAM, cam.EigenCAM, *TRIALS], ids=lambda e: e.__name__
)
@pytest.mark.parametrize("smooth", [False, True])
def test_several_inputs(images: Tensor, explainer: Any, smooth: bool) -> None:
    """The second input is the images' own, row by row."""
    model, notes = Two().double().eval(), torch.randn(3, 2, dtype=torch.float64)
    explain = explainer(model, "conv")
    found = explain((images, notes, 2.0), [1, 4, 0], smooth)
    by_name = explain({"images": images, "notes": notes, "scale": 2.0}, [1, 4, 0], smooth)
    assert by_name.equal(found)
    assert explain.outputs.equal(model(images, notes, 2.0).detach())
    for i, k in enumerate([1, 4, 0]):

        class Alone(nn.Module):
            def __init__(self, i: int) -> None:
                super().__init__()
                self.model, self.i = model, i

            def forward(self, images: Tensor) -> Tensor:
                return self.model(images, notes[self.i].expand(len(images), 2), 2.0)

        alone = explainer(Alone(i), "model.conv")(images[i : i + 1], k, smooth)
        close(found[i : i + 1], alone)


def test_inputs_without_images(net: Net) -> None:
    with pytest.raises(TypeError, match="images: expected a Tensor, got list without one"):
        cam.GradCAM(net, "body")([1, 2])
    with pytest.raises(TypeError, match="images: expected a Tensor, got str"):
        cam.GradCAM(net, "body")("cat.png")


# --- smoothing


@pytest.mark.parametrize("explainer", EVERY, ids=lambda e: e.__name__)
@pytest.mark.parametrize("eigen", [False, True])
def test_aug_smooth(net: Net, images: Tensor, explainer: Any, eigen: bool) -> None:
    explain = explainer(net, "body")
    found = explain(images, None, True, eigen)
    assert explain.outputs.equal(net(images).detach())
    classes = net(images).argmax(1)  # of the images themselves, in every view
    views = [
        explain(images * factor, classes, eigen_smooth=eigen) for factor in (0.9, 1.0, 1.1)
    ] + [
        explain(images.flip(3) * factor, classes, eigen_smooth=eigen).flip(2)
        for factor in (0.9, 1.0, 1.1)
    ]
    close(found, torch.stack(views).mean(0), 1e-12)


def test_aug_smooth_of_everything(net: Net, images: Tensor) -> None:
    with cam.GradCAM(net, ["stem", "body"]) as explain:
        each = explain(images, 1, aug_smooth=True, aggregate=None, size=None, normalize=None)
        flipped = explain(images.flip(3), 1, aug_smooth=True, aggregate=None, size=None,
                          normalize=None)  # fmt: skip
        for maps, mirror in zip(each, flipped, strict=True):
            torch.testing.assert_close(maps, mirror.flip(2))
        arrays = explain(images, 1, True, output="numpy", aggregate=None)
        assert [a.shape for a in arrays] == [(3, 21, 17)] * 2
        objective = explain(images, aug_smooth=True, objective=lambda out: out[:, 1].sum())
        close(objective, explain(images, 1, aug_smooth=True), 1e-12)


@pytest.mark.parametrize(
    "explainer", [e for e in EVERY if e not in TRIALS], ids=lambda e: e.__name__
)
@pytest.mark.parametrize(("aug", "eigen"), [(False, False), (True, False), (False, True)])
def test_losses_on_maps(net: Net, images: Tensor, explainer: Any, aug: bool, eigen: bool) -> None:
    """Against finite differences, down to the first layer."""
    weight = net.stem[0].weight
    aim = torch.rand(3, 21, 17, dtype=torch.float64)

    def loss(differentiable: bool) -> Tensor:
        maps = explainer(net, "body")(images, 1, aug, eigen, differentiable=differentiable)
        assert maps.requires_grad == differentiable
        return (maps - aim).square().mean()

    loss(True).backward()
    direction = torch.randn_like(weight)
    h = 1e-7
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * h * direction)
        values.append(loss(False).item())
        with torch.no_grad():
            weight.sub_(sign * h * direction)
    numeric = (values[0] - values[1]) / (2 * h)
    assert abs(numeric) > 1e-6
    assert (weight.grad * direction).sum().item() == pytest.approx(numeric, rel=1e-3)


# --- surroundings


class Boom(Exception):
    pass


@pytest.mark.parametrize("explainer", EVERY, ids=lambda e: e.__name__)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(images: Tensor, explainer: Any, fails: bool) -> None:
    net = Net()
    net.body[0] = nn.Sequential(nn.Conv2d(6, 9, 3), nn.BatchNorm2d(9))
    net.double().train()
    net.body.eval()
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if fails and calls >= 2:
            raise Boom

    def state() -> list[Any]:
        return [
            [m.training for m in net.modules()],
            [len(m._forward_hooks) for m in net.modules()],
            [p.grad for p in net.parameters()],
            torch.is_grad_enabled(),
        ]

    handle = net.head.register_forward_pre_hook(fail)
    before, values = state(), [x.clone() for x in net.state_dict().values()]
    kept = images.clone()
    explain = explainer(net, "body")
    if fails:
        with pytest.raises(Boom):
            explain(images, 1, aug_smooth=True)
    else:
        explain(images, 1, True, True)
    handle.remove()
    assert state() == before
    assert images.equal(kept)
    assert all(a.equal(b) for a, b in zip(net.state_dict().values(), values, strict=True))


@pytest.mark.parametrize("explainer", EVERY, ids=lambda e: e.__name__)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad_and_frozen(
    net: Net, images: Tensor, explainer: Any, context: Callable[[], Any]
) -> None:
    expected = explainer(net, "body")(images)
    net.requires_grad_(False)
    with context():
        found = explainer(net, "body")(images.clone())
    assert not found.requires_grad
    close(found, expected, 1e-12)


@pytest.mark.parametrize("explainer", TRIALS, ids=lambda e: e.__name__)
def test_two_threads_on_one_model(net: Net, explainer: Any) -> None:
    """What one thread takes away at a layer, the other must not miss."""
    batches = [torch.randn(2, 3, 21, 17, dtype=torch.float64) for _ in range(8)]
    explainers = [explainer(net, "body", batch_size=size) for size in (2, 3)]
    expected = [explainers[i % 2](batch, i % 5) for i, batch in enumerate(batches)]
    gate = threading.Barrier(2)

    def work(i: int) -> Tensor:
        gate.wait(30)
        return explainers[i % 2](batches[i], i % 5)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, range(8)))
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-12)
    assert all(not m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("explainer", EVERY, ids=lambda e: e.__name__)
def test_bfloat16_and_arrays(net: Net, images: Tensor, explainer: Any) -> None:
    net, images = net.bfloat16(), images.bfloat16()
    found = explainer(net, "body")(images, 1)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    array = explainer(net, "body")(images, 1, output="numpy")
    assert torch.from_numpy(array).equal(found)


# --- layouts that sizes mislead about


class Wide(nn.Module):
    """64 channels of 64 x 128: by their sizes, 64 x 64 positions of 128 channels."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(64, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layer(images).flatten(2).mean(2))


WIDE = {
    "conv": lambda: nn.Conv2d(3, 64, 3, stride=(2, 1), padding=1),
    "norm": lambda: nn.Sequential(nn.Conv2d(3, 64, 1, stride=(2, 1)), nn.BatchNorm2d(64)),
    "pool": lambda: nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.MaxPool2d((2, 1))),
}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("explainer", [cam.GradCAM, cam.EigenCAM, cam.AblationCAM])
def test_convolutions_have_channels_second(name: str, explainer: Any) -> None:
    model, images = Wide(WIDE[name]()).double().eval(), torch.randn(2, 3, 128, 128).double()
    kinds = {cam.GradCAM: "GradCAM", cam.EigenCAM: "EigenCAM"}
    explain = explainer(model, "layer", batch_size=64)
    assert explain(images, 1, size=None).shape == (2, 64, 128)
    if explainer in kinds:
        expected = by_hand(kinds[explainer], model, model.layer, images, [1, 1])
        torch.testing.assert_close(explain(images, 1), expected, rtol=0, atol=1e-6)
    with fastxkd.capture(model, "layer") as captured:
        score = model(images)[:, 1].sum()
    assert captured.cam(score=score).shape == (2, 64, 128)


def test_flattened_positions_are_no_tokens() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(ValueError, match=r"reshape_transform: \[2, 4, 16\] of a Flatten are no to"):
        cam.GradCAM(model, "1")(torch.randn(2, 3, 4, 4))
    maps = cam.GradCAM(model, "1", lambda x: x.unflatten(2, (4, 4)))(torch.randn(2, 3, 4, 4))
    assert maps.shape == (2, 4, 4)


# --- classes far from the others


class Masked(nn.Module):
    """One class is masked; the images are needed again after the layer, or not."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 5)
        self.again = again
        self.register_buffer("mask", torch.tensor([0.0, 0, 0, 0, -1e9]))

    def forward(self, images: Tensor) -> Tensor:
        x = self.body(images).relu()
        x = x * images.mean(1, keepdim=True).sigmoid() if self.again else x
        return self.head(x.mean((2, 3))) + self.mask


@pytest.mark.parametrize("again", [False, True])
def test_ablation_beside_a_masked_class(again: bool) -> None:
    """The mask hides no images that the rest of the pass looks at."""
    model, images = Masked(again).double(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    images[1] += 3
    found = cam.AblationCAM(model, "body")(images, [0, 1, 2], normalize=None, size=None)
    for i, image in enumerate(images):
        alone = cam.AblationCAM(model, "body")(image[None], i, normalize=None, size=None)
        torch.testing.assert_close(found[i], alone[0], rtol=1e-6, atol=1e-9)
    assert found.abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ablation_where_the_score_is_zero(net: Net, images: Tensor, dtype: torch.dtype) -> None:
    net, images = net.to(dtype), images.to(dtype)
    kept: list[Tensor] = []

    def target(row: Tensor) -> Tensor:
        """Zero for the image as it is."""
        kept.append(row[1].detach())
        return row[1] - kept[0]

    found = cam.AblationCAM(net, "body")(images[:1], [target], normalize=None, size=None)[0]
    assert found.isfinite().all()
    assert found.max() > 0
    weights = []
    with torch.no_grad():
        a = net.body(net.stem(images[:1]))
        for channel in range(a.shape[1]):
            without = a.clone()
            without[:, channel] = 0
            weights.append(kept[0] - net.head(without.flatten(2).mean(2))[0, 1])
    summed = torch.einsum("c,chw->hw", torch.stack(weights), a[0]).relu()
    torch.testing.assert_close(found * 1e-7, summed, rtol=1e-3, atol=1e-6)


def test_plain_cam_beside_a_masked_class(net: Net, images: Tensor) -> None:
    """A bias of -1e9 neither hides a wrong layer nor spoils the right one."""
    expected = cam.CAM(net, "body")(images, 1)
    with torch.no_grad():
        net.head.bias[4] = -1e9
    torch.testing.assert_close(cam.CAM(net, "body")(images, 1), expected)
    model = nn.Sequential(net.stem, net.body, nn.Hardtanh(0, 0.01), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), net.head)  # fmt: skip
    with pytest.raises(ValueError, match="the output is not the head's answer"):
        cam.CAM(model, "1")(images, 1)


# --- errors that name the argument

WRONG: dict[str, tuple[Callable[[Any, Tensor], Any], type[Exception], str]] = {
    "no layers": (lambda net, x: cam.GradCAM(net, None), TypeError, "target_layers: .* NoneType"),
    "a number": (lambda net, x: cam.GradCAM(net, 3), TypeError, "target_layers: expected names"),
    "no module": (lambda net, x: cam.GradCAM(len, "a"), TypeError, "model: expected a Module"),
    "student": (lambda net, x: cam.UniCAM(3, net, "body"), TypeError, "student: expected a Module"),
    "base": (lambda net, x: cam.UniCAM(net, "b", "body"), TypeError, "base: expected a Module"),
    "capture": (lambda net, x: cam.capture(None, "a"), TypeError, "model: expected a Module"),
    "size": (lambda net, x: cam.GradCAM(net, "body")(x, size=32), TypeError, "size: .* got 32"),
    "half sizes": (
        lambda net, x: cam.GradCAM(net, "body")(x, size=(3.5, 4.0)),
        TypeError,
        r"size: .*whole numbers, got \(3.5, 4.0\)",
    ),
    "cam_from size": (lambda net, x: cam.cam_from(x, x, size=3), TypeError, "size: .* got 3"),
    "input": (lambda net, x: cam.cam_from(x, x, size="input"), ValueError, "size: .* got 'input'"),
    "relu": (lambda net, x: cam.cam_from(x, x, relu="no"), TypeError, "relu: .* got 'no'"),
    "eigen_smooth": (
        lambda net, x: cam.cam_from(x, x, eigen_smooth=None), TypeError, "eigen_smooth: .* None"
    ),
    "objective": (
        lambda net, x: cam.GradCAM(net, "body")(x, objective=3),
        TypeError,
        "objective: expected a callable on the model's output, got 3",
    ),
    "transform": (
        lambda net, x: cam.GradCAM(net, "body", (1, 2)), TypeError, "reshape_transform: .* tuple"
    ),
    "base transform": (
        lambda net, x: cam.UniCAM(net, net, "body", base_reshape_transform=3),
        TypeError,
        "base_reshape_transform: .* int",
    ),
    "comparisons": (
        lambda net, x: cam.FinerCAM(net, "body", comparisons=2), TypeError, "comparisons: .* got 2"
    ),
    "ranks": (
        lambda net, x: cam.FinerCAM(net, "body", comparisons=[1.5]),
        TypeError,
        r"comparisons: .* got \[1.5\]",
    ),
    "alpha": (
        lambda net, x: cam.FinerCAM(net, "body", alpha="1"), TypeError, "alpha: .* got str"
    ),
    "ratio": (
        lambda net, x: cam.AblationCAM(net, "body", ratio_channels_to_ablate="a"),
        TypeError,
        "ratio_channels_to_ablate: expected a number, got str",
    ),
    "bool": (lambda net, x: cam.GradCAM(net, "body")(x, True), TypeError, "targets: .* got True"),
    "bools": (
        lambda net, x: cam.GradCAM(net, "body")(x, [True, False, True]),
        TypeError,
        "targets: .* got bool",
    ),
    "bool tensor": (
        lambda net, x: cam.GradCAM(net, "body")(x, torch.ones(3, dtype=torch.bool)),
        ValueError,
        "targets: .* got torch.bool",
    ),
    "samples": (
        lambda net, x: cam.UniCAM(net, net, "body").reference(x, x, samples=5.5),
        TypeError,
        "samples: .* got 5.5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(net: Net, images: Tensor, name: str) -> None:
    call, error, text = WRONG[name]
    with pytest.raises(error, match=text):
        call(net, images)


def test_captured_weights_are_not_offered(net: Net, images: Tensor) -> None:
    with fastxkd.capture(net, "body") as captured:
        score = net(images).sum()
    for method in ("weights", "gradcan"):
        with pytest.raises(ValueError, match=rf"method: expected one of gradcam, .* got '{method}"):
            captured.cam(method, score=score)
    for wrong, text in ((3, "reshape_transform: "), ((1, 2), "reshape_transform: ")):
        with pytest.raises(TypeError, match=text):
            captured.cam(score=score, reshape_transform=wrong)
    with pytest.raises(TypeError, match="size: "):
        captured.cam(score=score, size=7)
