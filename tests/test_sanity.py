"""Randomised weights must change a map."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastxkd
from fastxkd import randomisation_check
from fastxkd.metrics.agreement import MEASURES


class Net(nn.Module):
    """With batch norm, a parameter of its own, and layers without parameters between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.shift = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x) + self.shift).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(2)
    return Net()


def cam_of(model: nn.Module) -> Callable[..., Tensor]:
    return fastxkd.GradCAM(model, "body.1")


def edges_of(model: nn.Module) -> Callable[..., Tensor]:
    """What Adebayo et al. warn of: looks like an explanation, knows nothing of the model."""

    def explain(images: Tensor, targets: Any = None) -> Tensor:
        return F.pad((images[..., 1:] - images[..., :-1]).abs().sum(1), (0, 1))

    return explain


def images_of(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 12, 12)


LAYERS = ("head", "body.0", "stem.1", "stem.0", "")


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("cascade", [True, False])
def test_is_the_recipe(cascade: bool, measure: str) -> None:
    """One layer after the other, written out."""
    model, images = net(), images_of()
    layers = ["head", "body.0", "stem"]
    found = randomisation_check(
        model, cam_of, images, 1, layers=layers, measure=measure, cascade=cascade, seed=7
    )
    trained = cam_of(model)(images, 1)
    random = deepcopy(model)
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        for row, name in zip(found.agreement, layers, strict=True):
            if not cascade:
                random = deepcopy(model)
            if name == "stem":
                random.stem[0].reset_parameters()
                random.stem[1].reset_parameters()
            else:
                random.get_submodule(name).reset_parameters()
            true = MEASURES[measure](trained, cam_of(random)(images, 1))
            assert torch.equal(row, true)
    assert found.layers == ("head", "body.0", "stem")


def test_layers_from_the_top_down_by_default() -> None:
    model, images = net(), images_of()
    found = randomisation_check(model, cam_of, images)
    assert found.layers == LAYERS
    assert found.agreement.shape == (5, 4)
    assert found.agreement.isfinite().all()


def test_a_map_of_the_model_changes_and_one_of_the_image_does_not() -> None:
    images = images_of(8)
    torch.manual_seed(0)
    model = Net()
    head = ["head", "body", "stem"]
    faithful = randomisation_check(model, cam_of, images, layers=head).agreement.mean(1)
    edges = randomisation_check(model, edges_of, images, layers=head).agreement
    assert faithful[-1] < 0.5
    assert torch.equal(edges, torch.ones_like(edges))


def test_only_the_layer_asked_for_is_randomised() -> None:
    seen: list[dict[str, Tensor]] = []

    def spy(model: nn.Module) -> Callable[..., Tensor]:
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return cam_of(model)

    model = net()
    randomisation_check(model, spy, images_of(), layers=["body.0", "head"])
    randomisation_check(model, spy, images_of(), layers=["body.0", "head"], cascade=False)

    def changed(state: dict[str, Tensor]) -> set[str]:
        return {k for k, v in state.items() if not torch.equal(v, seen[0][k])}

    body, head = ({f"{name}.weight", f"{name}.bias"} for name in ("body.0", "head"))
    assert [changed(s) for s in seen] == [set(), body, body | head, set(), body, head]


def test_parameters_without_a_way_to_reset_keep_mean_and_spread() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3, padding=1)
            self.scale = nn.Parameter(3 + 0.1 * torch.randn(5, 40, 40))
            self.gain = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return (self.conv(x) * self.scale * self.gain).mean((2, 3))

    seen: list[nn.Module] = []

    def spy(model: nn.Module) -> Callable[..., Tensor]:
        seen.append(deepcopy(model))
        return fastxkd.GradCAM(model, "conv")

    randomisation_check(Scaled(), spy, torch.randn(2, 3, 40, 40))
    trained, last = seen[0], seen[-1]
    assert not torch.equal(last.scale, trained.scale)
    assert last.scale.mean().item() == pytest.approx(3, abs=0.01)
    assert last.scale.std().item() == pytest.approx(0.1, rel=0.05)
    assert last.gain != trained.gain
    assert last.gain.isfinite()


def test_a_reset_that_leaves_a_parameter_out_is_completed() -> None:
    """As of torch's older weight_norm, whose parameters are not those that Linear resets."""

    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 4)
            self.length = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.length

    seen: list[Tensor] = []

    def spy(model: nn.Module) -> Callable[..., Tensor]:
        seen.append(model.get_submodule("2").length.detach().clone())
        return fastxkd.GradCAM(model, "0")

    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), Scaled())
    model[1] = nn.Sequential(model[1], nn.Flatten())
    randomisation_check(model, spy, torch.randn(2, 3, 5, 5), layers="2")
    assert (seen[0] != seen[1]).all()


def test_by_default_a_module_does_not_take_those_under_it_along() -> None:
    seen: list[dict[str, Tensor]] = []

    def spy(model: nn.Module) -> Callable[..., Tensor]:
        seen.append({k: v.clone() for k, v in model.named_parameters()})
        return cam_of(model)

    found = randomisation_check(net(), spy, images_of(), cascade=False)
    assert found.layers[-1] == ""  # the model itself, for the sake of one parameter
    assert [k for k, v in seen[-1].items() if not torch.equal(v, seen[0][k])] == ["shift"]


def test_attention_is_randomised() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.mix = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.conv(x).flatten(2).transpose(1, 2)
            return self.mix(tokens, tokens, tokens)[0].mean(1)

    seen: list[Tensor] = []

    def spy(model: nn.Module) -> Callable[..., Tensor]:
        seen.append(model.get_submodule("mix").in_proj_weight.detach().clone())
        return fastxkd.GradCAM(model, "conv")

    randomisation_check(Tokens(), spy, torch.randn(2, 3, 5, 5), layers="mix")
    assert not torch.equal(*seen)


def test_nothing_is_left_behind() -> None:
    model, images = net(), images_of()
    model.train()
    model.stem.eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    rng = torch.random.get_rng_state()
    first = randomisation_check(model, cam_of, images)
    assert torch.equal(rng, torch.random.get_rng_state())
    again = randomisation_check(model, cam_of, images)
    other = randomisation_check(model, cam_of, images, seed=1)
    assert torch.equal(first.agreement, again.agreement)
    assert not torch.equal(first.agreement, other.agreement)

    def broken(given: nn.Module) -> Callable[..., Tensor]:
        if given is model:
            return cam_of(given)
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        randomisation_check(model, broken, images)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert flags == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_the_class_is_that_of_the_trained_model() -> None:
    asked: list[Tensor] = []

    def spy(model: nn.Module) -> Callable[..., Tensor]:
        def explain(images: Tensor, targets: Tensor) -> Tensor:
            asked.append(targets)
            return cam_of(model)(images, targets)

        return explain

    model, images = net().eval(), images_of()
    randomisation_check(model, spy, images, layers=["head", "body"])
    assert len(asked) == 3
    assert all(torch.equal(t, model(images).argmax(1)) for t in asked)


def test_batch_of_one_and_dtypes() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model, images = net().to(dtype), images_of(1).to(dtype)
        found = randomisation_check(model, cam_of, images, 0)
        assert found.agreement.shape == (5, 1)
        assert found.agreement.isfinite().all()


def test_nan_is_of_its_image_only() -> None:
    images = images_of()
    clean = randomisation_check(net(), cam_of, images, 0)
    images[2, 0, 0, 0] = torch.nan
    found = randomisation_check(net(), cam_of, images, 0)
    assert found.agreement.isnan().any(0).tolist() == [False, False, True, False]
    rest = [0, 1, 3]
    assert torch.allclose(found.agreement[:, rest], clean.agreement[:, rest], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model": lambda x: x}, TypeError, "model: expected a torch.nn.Module, got function"),
        ({"model": nn.Sequential(nn.Flatten())}, ValueError, "model: expected parameters"),
        ({"explainer": None}, TypeError, "explainer: expected a callable"),
        ({"explainer": lambda m: lambda x, targets: x}, ValueError, r"explainer: expected \[n, h"),
        ({"images": torch.rand(3, 12, 12)}, ValueError, r"images: expected \[n, channels"),
        ({"measure": "mse"}, ValueError, "measure: expected one of cosine, pearson"),
        ({"cascade": 1}, TypeError, "cascade: expected a bool"),
        ({"seed": 0.5}, TypeError, "seed: expected an int, got float"),
        ({"layers": ["stem.2"]}, ValueError, "layers: .* 'stem.2' has none"),
        ({"layers": ["neck"]}, ValueError, "layers: Net has no layer named 'neck'"),
    ],
)
def test_refuses(change: dict[str, Any], error: type[Exception], text: str) -> None:
    given: dict[str, Any] = {
        "model": net(),
        "explainer": cam_of,
        "images": torch.rand(2, 3, 12, 12),
        **change,
    }
    with pytest.raises(error, match=text):
        randomisation_check(**given)


# --- the metric


def test_metric_over_batches_is_one_batch() -> None:
    model, images = net(), images_of(5)
    layers = ["head", "body.0"]
    metric, left, right = (
        fastxkd.RandomisationCheck(cam_of, layers=layers, measure="pearson") for _ in range(3)
    )
    true = randomisation_check(
        model, cam_of, images, 1, layers=layers, measure="pearson"
    ).agreement.mean(1)
    for i, rows in enumerate(torch.arange(5).split([2, 3])):
        of_batch = metric(model, images[rows], 1)
        alone = randomisation_check(
            model, cam_of, images[rows], 1, layers=layers, measure="pearson"
        ).agreement.mean(1)
        assert [v.item() for v in of_batch.values()] == pytest.approx(alone.tolist(), abs=1e-5)
        (left if i else right).update(model, images[rows], 1)
    left.merge_state(right)
    fresh = fastxkd.RandomisationCheck(cam_of, layers=layers, measure="pearson")
    fresh.merge_state(left)
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert fresh.compute() == left.compute()
    for m in (metric, left, pickle.loads(pickle.dumps(metric))):
        found = m.compute()
        assert list(found) == layers
        assert [v.item() for v in found.values()] == pytest.approx(true.tolist(), abs=1e-5)
    metric.options["layers"] = ["head"]
    with pytest.raises(ValueError, match=r"model: expected the layers head, body\.0"):
        metric.update(model, images)
    other = fastxkd.RandomisationCheck(cam_of, layers=["head"], measure="pearson")
    other.update(model, images, 1)
    with pytest.raises(ValueError, match=r"incoming_state: expected the layers head, body\.0"):
        left.merge_state(other)
    metric.reset()
    with (
        pytest.raises(ValueError, match="RandomisationCheck: compute"),
        pytest.warns(UserWarning, match="compute"),
    ):
        metric.compute()


def test_metric_options_are_refused_when_made() -> None:
    with pytest.raises(TypeError, match="explainer: expected a callable, got NoneType"):
        fastxkd.RandomisationCheck(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"measure: expected one of cosine, .* got 'mse'"):
        fastxkd.RandomisationCheck(cam_of, measure="mse")
    with pytest.raises(TypeError, match="cascade: expected a bool, got int"):
        fastxkd.RandomisationCheck(cam_of, cascade=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="seed: expected an int, got float"):
        fastxkd.RandomisationCheck(cam_of, seed=0.5)  # type: ignore[arg-type]
