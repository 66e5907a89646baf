"""UniCAM where the compared feature is not the explained layer, and layers of every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastxkd
from fastxkd.cam import to_maps, tokens_to_maps
from tests import oracles
from tests.test_unicam_objectives import naive, one_hot

LABELS = torch.arange(12) % 3


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(True))
        self.layer = nn.Conv2d(width, 8, 3, stride=2)
        self.relu = nn.ReLU(True)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.wide = nn.Linear(32, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.layer(self.trunk(images)))
        return self.head(self.wide(self.pool(x).flatten(1)).tanh())

    def from_layer(self, activation: Tensor) -> Tensor:
        return self.pool(activation.relu())


@pytest.fixture
def models() -> tuple[Net, Net]:
    return Net().double().eval(), Net(7).double().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(12, 3, 18, 14, dtype=torch.float64) + LABELS[:, None, None, None]


def kept(model: nn.Module, layer: str, images: Any) -> Tensor:
    with torch.no_grad(), fastxkd.capture(model, layer) as captured:
        model(images)
    return captured.activations[layer]


def true_map(
    a: Tensor,
    feature: Callable[[Tensor], Tensor],
    other: Tensor,
    objective: str = "semi_partial",
    spatial: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Raw map of ``a``: autograd through the feature and the n x n x d differences."""
    leaf = a.clone().requires_grad_(True)
    f = feature(leaf)
    (gradient,) = torch.autograd.grad(f, leaf, naive(f, other, one_hot(LABELS), objective))
    weights = spatial(gradient).flatten(2).mean(2)
    maps, broad = spatial(a), [1] * (spatial(a).dim() - 2)
    return (weights.reshape(*weights.shape, *broad) * maps).sum(1).clamp(min=0)


FEATURES: dict[str, tuple[Any, Callable[[Net, Tensor], Tensor]]] = {
    "another module": ("pool", lambda net, a: net.from_layer(a)),
    "further up": ("wide", lambda net, a: net.wide(net.from_layer(a).flatten(1))),
    "function": (lambda a: a.square().mean((2, 3)), lambda net, a: a.square().mean((2, 3))),
    "module of its own": (nn.AdaptiveMaxPool2d(3), lambda net, a: nn.AdaptiveMaxPool2d(3)(a)),
    "the layer": ("layer", lambda net, a: a),
}


@pytest.mark.parametrize("objective", ["semi_partial", "partial", "residual_argmax"])
@pytest.mark.parametrize("how", FEATURES)
def test_features_that_are_not_the_layer(
    models: tuple[Net, Net], images: Tensor, how: str, objective: Any
) -> None:
    student, base = models
    features, direct = FEATURES[how]
    unicam = fastxkd.UniCAM(student, base, ["layer"], features=features, objective=objective)
    out = unicam(images, LABELS, size=None, normalize=None)
    a, b = kept(student, "layer", images), kept(base, "layer", images)
    with torch.no_grad():
        f, g = direct(student, a), direct(base, b)
    for found, net, x, other in ((out.distilled, student, a, g), (out.residual, base, b, f)):
        true = true_map(x, lambda t, net=net: direct(net, t), other, objective)
        torch.testing.assert_close(found, true, rtol=1e-8, atol=1e-12 + 1e-9 * true.max().item())
    true_scores = fastxkd.layer_scores({"layer": f}, {"layer": g}, LABELS)
    assert out.scores[0].layer == "layer"
    assert out.scores[0][1:] == pytest.approx(true_scores[0][1:], abs=1e-9)


def mean_of(*outputs: Any) -> Tensor:
    """Maps at the layers' resolutions, brought to the images', their mean."""
    grown = [
        nn.functional.interpolate(out.distilled[:, None], (18, 14), mode="bilinear")[:, 0]
        for out in outputs
    ]
    return oracles.cam_finish(torch.stack(grown).mean(0), (18, 14), False, 1)


def test_each_layer_has_its_own_feature(models: tuple[Net, Net], images: Tensor) -> None:
    student, base = models
    layers: list[Any] = ["trunk", "layer"]
    alone = fastxkd.UniCAM(student, base, ["trunk"])(images, LABELS, size=None)
    pool = fastxkd.UniCAM(student, base, ["layer"], features="pool")(images, LABELS, size=None)
    for features in ([None, student.pool], ["trunk", "pool"]):
        both = fastxkd.UniCAM(student, base, layers, features=features)(images, LABELS)
        torch.testing.assert_close(both.distilled, mean_of(alone, pool), rtol=0, atol=1e-6)
        for row, single in zip(both.scores, (alone, pool), strict=True):
            assert row[1:] == pytest.approx(single.scores[0][1:], abs=1e-9)
    # One gradient does not leak into another layer's: both features hang on "trunk" here.
    shared = fastxkd.UniCAM(student, base, layers, features="pool")(images, LABELS)
    deep = fastxkd.UniCAM(student, base, ["trunk"], features="pool")(images, LABELS, size=None)
    torch.testing.assert_close(shared.distilled, mean_of(deep, pool), rtol=0, atol=1e-6)


def test_base_features_of_another_kind(models: tuple[Net, Net], images: Tensor) -> None:
    student, base = models
    unicam = fastxkd.UniCAM(student, base, "layer", "trunk", features="wide", base_features="layer")
    out = unicam(images, LABELS, size=None, normalize=None)
    a, b = kept(student, "layer", images), kept(base, "trunk", images)
    f, g = kept(student, "wide", images), kept(base, "layer", images)
    true = true_map(a, lambda t: student.wide(student.from_layer(t).flatten(1)), g)
    torch.testing.assert_close(out.distilled, true, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(out.residual, true_map(b, base.layer, f), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_gradients_survive_16_bits(images: Tensor, dtype: torch.dtype) -> None:
    """1e6 times larger features have 1e-6 of the gradient; fp16 ends at 6e-8."""
    student, base = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval() for _ in range(2))
    pool = nn.AdaptiveAvgPool2d(3)
    feature: Any = lambda a: pool(a * 2000)  # noqa: E731
    maps = []
    for kind in (dtype, torch.float64):
        # The same rounded weights and images: only the way from there differs.
        nets = [net.to(dtype).to(kind) for net in (student, base)]
        unicam = fastxkd.UniCAM(*nets, ["1"], features=feature)
        maps.append(unicam(images.to(dtype).to(kind), LABELS, normalize=None).distilled.double())
    assert maps[1].max() > 0
    assert ((maps[0] - maps[1]).norm() / maps[1].norm()).item() < 0.1


def test_graph_starts_at_the_layer(models: tuple[Net, Net], images: Tensor) -> None:
    seen: list[tuple[str, bool]] = []
    for model in models:
        for name in ("trunk", "relu"):
            getattr(model, name).register_forward_hook(
                lambda _, __, output, name=name: seen.append((name, output.requires_grad))
            )
    out = fastxkd.UniCAM(*models, ["layer"], features="pool")(images, LABELS)
    assert seen == [("trunk", False), ("relu", True)] * 2
    assert not out.distilled.requires_grad
    assert all(p.grad is None for model in models for p in model.parameters())
    seen.clear()
    fastxkd.UniCAM(*models, ["layer"])(images, LABELS)
    assert not any(graph for _, graph in seen)


def _failing(activation: Tensor) -> Tensor:
    raise RuntimeError("no feature today")


@pytest.mark.parametrize("fails", ["", "student", "base", "feature"])
def test_models_are_left_as_they_were(
    models: tuple[Net, Net], images: Tensor, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in models:
        model.train()
        model.pool.eval()
        model.head.weight.grad = torch.ones_like(model.head.weight)

    def state() -> list[Any]:
        return [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            for model in models
            for m in model.modules()
        ] + [torch.is_grad_enabled(), torch.is_inference_mode_enabled()]

    if fails in ("student", "base"):
        model = models[fails == "base"]
        monkeypatch.setattr(model.wide, "forward", _failing)
    before = state()
    values = [v.clone() for model in models for v in model.state_dict().values()]
    features: Any = _failing if fails == "feature" else "pool"
    unicam = fastxkd.UniCAM(*models, ["layer"], features=features)
    if fails:
        for call in (lambda: unicam(images, LABELS), lambda: unicam.reference(images, LABELS)):
            with pytest.raises(RuntimeError, match="no feature today"):
                call()
            assert state() == before
    else:
        with torch.inference_mode():
            inside = unicam(images.clone(), LABELS.clone())
        out = unicam(images, LABELS)
        torch.testing.assert_close(inside.distilled, out.distilled, rtol=0, atol=1e-12)
    assert state() == before
    after = [v for model in models for v in model.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(after, values, strict=True))
    assert all((model.head.weight.grad == 1).all() for model in models)


def test_features_that_do_not_fit(models: tuple[Net, Net], images: Tensor) -> None:
    def call(**arguments: Any) -> Any:
        return fastxkd.UniCAM(*models, **({"target_layers": ["layer"]} | arguments))(images, LABELS)

    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"features": "trunk"}, ValueError, "features: does not depend on target layer 'layer'"),
        (
            {"base_features": lambda a: torch.ones(12, 3)},
            ValueError,
            "base_features: does not depend on target layer 'layer'",
        ),
        ({"features": "pol"}, ValueError, "features: Net has no layer named 'pol'; did you mean"),
        ({"features": 3}, TypeError, "features: expected names or modules of Net, got int"),
        (
            {"features": ["pool", "wide"]},
            ValueError,
            "features: expected one, or one for each of 1",
        ),
        ({"features": lambda a: a.mean()}, ValueError, "features: expected 12 rows, one per image"),
        ({"features": lambda a: [a]}, TypeError, "features: expected a function that returns a Te"),
        ({"base_layers": ["head"]}, ValueError, "target layer 'head': expected spatial"),
        ({"base_features": "layr"}, ValueError, "base_features: Net has no layer named 'layr'"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            call(**arguments)


# --- layouts and inputs


class Tokens(nn.Module):
    """Patches, a class token in front, one block."""

    def __init__(self, width: int = 5, prefix: int = 1) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 6, stride=6)
        self.first = nn.Parameter(torch.randn(1, prefix, width))
        self.block = nn.Sequential(nn.Linear(width, width), nn.GELU())
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT
        x = self.block(torch.cat([self.first.expand(len(x), -1, -1), x], 1))
        return self.head(self.norm(x)[:, 0])


@pytest.mark.parametrize("features", [None, "norm"])
def test_tokens_against_convolutions(models: tuple[Net, Net], features: str | None) -> None:
    """A transformer and a network of another resolution: any pair explains each other."""
    student, base = Tokens().double().eval(), models[1]
    images = torch.randn(12, 3, 24, 24, dtype=torch.float64) + LABELS[:, None, None, None]
    unicam = fastxkd.UniCAM(
        student, base, ["block"], ["layer"], features=features, base_features="layer"
    )
    out = unicam(images, LABELS, size=None, normalize=None)
    a, b = kept(student, "block", images), kept(base, "layer", images)
    through: Any = student.norm if features else lambda t: t
    with torch.no_grad():
        f = through(a)
    true = true_map(a, through, b, spatial=lambda x: to_maps(x, (24, 24)))
    assert out.distilled.shape == (12, 4, 4)
    torch.testing.assert_close(out.distilled, true, rtol=1e-8, atol=1e-12)
    assert out.residual.shape == (12, 10, 10)
    torch.testing.assert_close(out.residual, true_map(b, lambda t: t, f), rtol=1e-8, atol=1e-12)
    assert unicam(images, LABELS).distilled.shape == (12, 24, 24)


def test_reshape_transform(models: tuple[Net, Net]) -> None:
    student, base = (Tokens(5, 2).double().eval() for _ in range(2))
    images = torch.randn(12, 3, 24, 12, dtype=torch.float64) + LABELS[:, None, None, None]
    reshape = tokens_to_maps(4, 2, prefix=2)
    out = fastxkd.UniCAM(student, base, ["block"], None, reshape)(
        images, LABELS, size=None, normalize=None
    )
    a, b = kept(student, "block", images), kept(base, "block", images)
    true = true_map(b, lambda t: t, a, spatial=reshape)
    assert out.residual.shape == (12, 4, 2)
    torch.testing.assert_close(out.residual, true, rtol=1e-8, atol=1e-12)
    # The base's own layout, where it is another.
    mixed = fastxkd.UniCAM(
        student, models[0], ["block"], ["layer"], reshape, base_reshape_transform=lambda x: x
    )
    assert mixed(images, LABELS, size=None).residual.shape == (12, 10, 4)


def test_volumes() -> None:
    nets = [nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU()).double() for _ in range(2)]
    images = torch.randn(12, 1, 5, 6, 7, dtype=torch.float64)
    out = fastxkd.UniCAM(*nets, ["1"])(images, LABELS, size=None, normalize=None)
    a, b = (kept(net, "1", images) for net in nets)
    torch.testing.assert_close(out.distilled, true_map(a, lambda t: t, b), rtol=1e-8, atol=1e-12)
    assert fastxkd.UniCAM(*nets, ["1"])(images, LABELS).distilled.shape == (12, 5, 6, 7)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)

    def forward(self, pixels: Tensor, scale: Tensor, shift: float = 0.0) -> Tensor:
        return self.conv(pixels * scale[:, None, None, None] + shift)


def test_several_model_inputs() -> None:
    nets = [TwoInputs(), TwoInputs()]
    pixels, scale = torch.randn(12, 2, 8, 8), torch.rand(12) + 0.5
    unicam = fastxkd.UniCAM(*nets, ["conv"])
    by_position = unicam((pixels, scale, 0.3), LABELS)
    by_name = unicam({"pixels": pixels, "scale": scale, "shift": 0.3}, LABELS)
    assert torch.equal(by_position.distilled, by_name.distilled)
    plain = unicam((pixels * scale[:, None, None, None] + 0.3, torch.ones(12)), LABELS)
    torch.testing.assert_close(by_position.residual, plain.residual, rtol=0, atol=1e-4)
    reference = unicam.reference((pixels, scale, 0.3), LABELS, samples=6)
    assert len(reference) == 6
    (bank,) = reference.student
    with torch.no_grad():
        direct = nets[0](pixels, scale, 0.3)[:6]
    torch.testing.assert_close(bank.features, direct, rtol=0, atol=1e-5)
