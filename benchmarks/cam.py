"""Class activation maps: whole explainers against the bare forward pass, and the operator alone.

The floor of an explainer is the forward pass without a graph; that of the operator is one reading
of activations and gradients, and that of EigenCAM one of the activations.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastxkd
from benchmarks._harness import Case, Skip, Spec, compiled, main
from fastxkd.reference import cam as reference
from tests._torchvision import declare_operators

TESTS = ["tests/test_cam.py", "tests/test_cam_family.py"]


def _imported(module: str, package: str) -> object:
    declare_operators()
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Skip(f"needs {package} ({error})") from None


def resnet50() -> nn.Module:
    """Random weights, and batch statistics that keep the activations of an ordinary size."""
    models = _imported("torchvision.models", "torchvision")
    model = models.resnet50(weights=None)  # type: ignore[attr-defined]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # a plain average: one batch sets them
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 96, 96))
    return model.eval()


def explainers(model: nn.Module, layer: nn.Module, images: Tensor) -> Case:
    peer = _imported("pytorch_grad_cam", "grad-cam")
    targets = _imported("pytorch_grad_cam.utils.model_targets", "grad-cam")
    n = len(images)
    classes = list(range(n))
    callables = [targets.ClassifierOutputTarget(c) for c in classes]  # type: ignore[attr-defined]

    def forward() -> None:
        with torch.no_grad():
            model(images)

    def ours() -> Tensor:
        with fastxkd.GradCAM(model, [layer]) as explainer:
            return explainer(images, classes)  # type: ignore[no-any-return]

    def theirs() -> np.ndarray:
        with peer.GradCAM(model=model, target_layers=[layer]) as explainer:  # type: ignore[attr-defined]
            return explainer(input_tensor=images, targets=callables)  # type: ignore[no-any-return]

    variants: dict[str, Callable[[], Any]] = {"floor: forward": forward, "pytorch-grad-cam": theirs}
    for name, made in (("captum", in_captum), ("torchcam", in_torchcam)):
        with contextlib.suppress(Skip):  # they are compared where they are installed
            variants[name] = made(model, layer, images, classes)

    def notes() -> dict[str, str]:
        maps = ours().numpy()
        peers = list(variants)[1:]
        off = [np.abs(maps - np.asarray(variants[name]())).max() for name in peers]
        pairs = zip(peers, off, strict=True)
        text = ", ".join(f"{name}'s by at most {by:.1e}" for name, by in pairs)
        return {"ours": f"maps differ from {text}"}

    return Case(variants | {"ours": ours}, notes=notes)


def _finished(raw: Tensor, size: torch.Size) -> Tensor:
    """Up-sampled and between 0 and 1: [n, 1, h, w] to [n, H, W]."""
    maps = F.interpolate(raw.relu(), size, mode="bilinear").squeeze(1)
    maps = maps - maps.amin((1, 2), keepdim=True)
    return (maps / (reference.MIN_MAX_EPS + maps.amax((1, 2), keepdim=True))).detach()


def in_captum(
    model: nn.Module, layer: nn.Module, images: Tensor, classes: list[int]
) -> Callable[[], Tensor]:
    attr = _imported("captum.attr", "captum")

    def call() -> Tensor:
        explainer = attr.LayerGradCam(model, layer)  # type: ignore[attr-defined]
        return _finished(explainer.attribute(images, target=classes), images.shape[2:])

    return call


def in_torchcam(
    model: nn.Module, layer: nn.Module, images: Tensor, classes: list[int]
) -> Callable[[], Tensor]:
    methods = _imported("torchcam.methods", "torchcam")

    def call() -> Tensor:
        with methods.GradCAM(model, target_layer=layer) as extractor:  # type: ignore[attr-defined]
            raw = extractor(classes, model(images), normalized=False)[0]
        return _finished(raw[:, None], images.shape[2:])

    return call


def in_numpy(a: np.ndarray, g: np.ndarray, method: str) -> np.ndarray:
    """The map as numpy code in explainers computes it."""
    if method in ("hirescam", "layercam"):
        raw = ((g if method == "hirescam" else np.maximum(g, 0)) * a).sum(axis=1)
    else:
        if method == "gradcam":
            weights = g.mean(axis=(2, 3))
        else:
            squares = g**2
            total = a.sum(axis=(2, 3), keepdims=True)
            alpha = squares / (2 * squares + total * squares * g + reference.PLUS_PLUS_EPS)
            weights = (np.maximum(g, 0) * np.where(g != 0, alpha, 0)).sum(axis=(2, 3))
        raw = (weights[:, :, None, None] * a).sum(axis=1)
    raw = np.maximum(raw, 0)
    raw -= raw.min(axis=(1, 2), keepdims=True)
    return raw / (reference.MIN_MAX_EPS + raw.max(axis=(1, 2), keepdims=True))


def operator(shape: tuple[int, int, int, int], method: str, *, with_compile: bool) -> Case:
    activations = torch.randn(shape).clamp(min=0)  # after a ReLU, as in most layers
    gradients = torch.randn(shape) / shape[2] / shape[3]
    size = list(shape[2:])
    in_torch: Callable[..., Tensor] = reference.cam
    fast = compiled(in_torch)
    arrays = activations.numpy(), gradients.numpy()
    arguments = (activations, gradients, method, size, True, 1)
    variants: dict[str, Callable[[], object]] = {
        "floor: read both": lambda: (activations.sum(), gradients.sum()),
        "numpy": lambda: in_numpy(*arrays, method),
        "eager (einsum)" if "gradcam" in method else "eager": lambda: in_torch(*arguments),
        "torch.compile": lambda: fast(*arguments),
        "ours": lambda: fastxkd.cam_from(activations, gradients, method),
    }
    if not with_compile:
        variants.pop("torch.compile")

    def notes() -> dict[str, str]:
        exact = in_numpy(*(x.astype(np.float64) for x in arrays), method)
        off = np.abs(fastxkd.cam_from(activations, gradients, method).numpy() - exact).max()
        return {"ours": f"maps differ from float64 numpy by at most {off:.1e}"}

    return Case(variants, 2 * activations.numel() * activations.element_size(), notes)


def component(shape: tuple[int, int, int, int]) -> Case:
    """EigenCAM. The full decompositions are of one image: they take seconds."""
    peer = _imported("pytorch_grad_cam.utils.svd_on_activations", "grad-cam")
    activations = torch.randn(shape).clamp(min=0)
    one = activations[:1]
    rows = one.flatten(2).mT - one.flatten(2).mean(2)[:, None]  # [1, p, c]

    def ours(x: Tensor) -> Tensor:
        return fastxkd.cam_from(x, None, "eigencam", normalize=None, relu=False)

    def theirs() -> np.ndarray:
        return peer.get_2d_projection(one.numpy())  # type: ignore[attr-defined, no-any-return]

    def notes() -> dict[str, str]:
        exact = torch.linalg.eigh(rows.double().mT @ rows.double())[1][..., -1:]
        expected = (rows.double() @ exact * exact.sum().sign())[..., 0].reshape(-1, *shape[2:])
        reach = expected.max() - expected.min()
        off = (ours(one) - expected).abs().max() / reach
        found = torch.from_numpy(theirs())
        peers = min((found - expected).abs().max(), (found + expected).abs().max()) / reach
        what = "of their range from float64"
        return {
            "ours": f"maps differ by at most {off:.1e} {what}",
            "pytorch-grad-cam, 1 image": f"1 of {shape[0]}; differs by {peers:.1e} {what}",
            "torch full SVD, 1 image": f"1 of {shape[0]}",
        }

    variants: dict[str, Callable[[], object]] = {
        "floor: read": activations.sum,
        "pytorch-grad-cam, 1 image": theirs,
        "torch full SVD, 1 image": lambda: torch.linalg.svd(rows, full_matrices=True),
        "ours": lambda: ours(activations),
    }
    return Case(variants, activations.numel() * activations.element_size(), notes)


def _resnet_case(batch: int) -> Case:
    model = resnet50()
    return explainers(model, model.layer4[-1], torch.randn(batch, 3, 224, 224))  # type: ignore[index]


def specs(quick: bool) -> list[Spec]:
    found = [
        Spec(
            f"GradCAM, ResNet-50 layer4, {n}x224x224", partial(_resnet_case, n), resident=not quick
        )
        for n in ([2] if quick else [8, 32])
    ]
    for shape in [(8, 2048, 7, 7)] if quick else [(8, 2048, 7, 7), (32, 256, 56, 56)]:
        for method in ["gradcam"] if quick else ["gradcam", "hirescam", "layercam", "gradcam++"]:
            label = f"operator {method}, {'x'.join(map(str, shape))}"
            found.append(Spec(label, partial(operator, shape, method, with_compile=not quick)))
        if shape == (32, 256, 56, 56):
            found.append(Spec(f"EigenCAM, {'x'.join(map(str, shape))}", partial(component, shape)))
    return found


if __name__ == "__main__":
    main("cam", specs, TESTS, __doc__)
