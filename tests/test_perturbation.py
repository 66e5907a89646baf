"""Deletion, insertion, change of confidence and ADCC."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastxkd
from fastxkd import adcc, blurred, confidence_change, deletion_curve, insertion_curve
from tests import oracles
from tests.conftest import needs

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CURVES = [deletion_curve, insertion_curve]


def model_of(classes: int = 5) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, classes),
    )


def data(n: int = 4, h: int = 8, w: int = 9, dtype: torch.dtype = torch.float64) -> Any:
    images = torch.randn(n, 3, h, w, dtype=torch.float64)
    maps = torch.rand(n, h, w, dtype=torch.float64)
    return images.to(dtype), maps.to(dtype)


# --- the formulas, one image and one step at a time


def curve_of(
    model: nn.Module, image: Tensor, m: Tensor, target: int, first: Tensor, last: Tensor, steps: int
) -> list[float]:
    order = sorted(range(m.numel()), key=lambda k: (-m.flatten()[k].item(), k))
    scores = []
    for step in range(steps + 1):
        x = first.clone()
        for k in order[: step * m.numel() // steps]:
            i, j = divmod(k, m.shape[1])
            x[:, i, j] = last[:, i, j]
        scores.append(model(x[None])[0].softmax(0)[target].item())
    return scores


def area(y: list[float]) -> float:
    return (sum(y) - y[0] / 2 - y[-1] / 2) / (len(y) - 1)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("steps", [None, 1, 5, 72])
@pytest.mark.parametrize("curve", CURVES)
def test_curve_is_the_formula(
    curve: Callable[..., fastxkd.PerturbationCurve], steps: int | None, n: int
) -> None:
    model, (images, maps) = model_of().double().eval(), data(n)
    targets = [0, 3, 1, 4][:n]
    baseline = torch.randn(3, 1, 1, dtype=torch.float64)
    if curve is deletion_curve:
        found = curve(model, images, maps, targets, steps=steps, baseline=baseline)
        first, last = images, baseline.expand_as(images)
    else:
        found = curve(model, images, maps, targets, steps=steps)
        first, last = blurred(images), images
    assert found.scores.shape == (n, (steps or 8) + 1)
    for i in range(n):
        with torch.no_grad():
            y = curve_of(model, images[i], maps[i], targets[i], first[i], last[i], steps or 8)
        assert found.scores[i].tolist() == pytest.approx(y, abs=1e-10)
        assert found.auc[i].item() == pytest.approx(area(y), abs=1e-10)


def test_defaults() -> None:
    """Deletion goes to 0, insertion comes from the blurred image; a number is a colour."""
    model, (images, maps) = model_of().double(), data()
    zero = torch.zeros_like(images)
    assert torch.equal(
        deletion_curve(model, images, maps).scores,
        deletion_curve(model, images, maps, baseline=zero).scores,
    )
    assert torch.equal(
        insertion_curve(model, images, maps).scores,
        insertion_curve(model, images, maps, start=blurred(images)).scores,
    )
    ends = deletion_curve(model, images, maps, 2, baseline=0.5).scores[:, -1]
    model.eval()
    true = model(torch.full_like(images, 0.5)).softmax(1)[:, 2]
    assert torch.allclose(ends, true)
    # One is the other backwards, where they go between the same images and the order is reversed.
    back = insertion_curve(model, images, -maps, 2, start=0.0, steps=8).scores.flip(1)
    there = deletion_curve(model, images, maps, 2, steps=8).scores
    assert torch.allclose(there, back, atol=1e-12)


def test_steps_of_rise() -> None:
    """224 steps of 224 pixels at 224 x 224."""
    counts: list[int] = []

    def model(x: Tensor) -> Tensor:
        counts.extend((x == 0).sum((1, 2, 3)).tolist())
        return x.mean((2, 3))

    images = torch.ones(1, 1, 224, 224)
    found = deletion_curve(model, images, torch.rand(1, 224, 224), 0, score="logit")
    assert found.scores.shape == (1, 225)
    assert counts == [224 * k for k in range(225)]
    assert found.auc.item() == pytest.approx(0.5)


def test_blur_is_that_of_rise() -> None:
    ndimage = needs("scipy.ndimage")
    point = np.zeros((11, 11))
    point[5, 5] = 1
    kernel = torch.from_numpy(ndimage.gaussian_filter(point, 5))
    images = torch.randn(2, 3, 20, 17, dtype=torch.float64)
    true = torch.nn.functional.conv2d(images.flatten(0, 1)[:, None], kernel[None, None], padding=5)
    found = blurred(images)
    assert torch.allclose(found, true.view_as(images), rtol=0, atol=1e-9)
    for dtype in DTYPES:
        low = blurred(images.to(dtype))
        assert low.dtype == dtype
        exact = blurred(images.to(dtype).double())
        assert (low.double() - exact).abs().max() < torch.finfo(dtype).eps + 1e-6


@pytest.mark.parametrize("steps_at_once", [2, 5, 100])
@pytest.mark.parametrize("curve", CURVES)
def test_steps_at_once_changes_nothing(
    curve: Callable[..., fastxkd.PerturbationCurve], steps_at_once: int
) -> None:
    model, (images, maps) = model_of().double(), data()
    one = curve(model, images, maps)
    many = curve(model, images, maps, steps_at_once=steps_at_once)
    assert torch.allclose(one.scores, many.scores, rtol=0, atol=1e-12)


def test_memory_is_that_of_one_step() -> None:
    images, maps = torch.randn(4, 3, 64, 64), torch.rand(4, 64, 64)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def peak(steps: int, at_once: int) -> int:
        return oracles.peak_bytes(
            lambda: deletion_curve(model, images, maps, steps=steps, steps_at_once=at_once)
        )

    peak(2, 1)
    few, many, wide = peak(4, 1), peak(64, 1), peak(64, 16)
    assert many < 1.1 * few
    assert wide > 3 * few


@pytest.mark.parametrize("curve", CURVES)
def test_constant_maps_go_in_reading_order(
    curve: Callable[..., fastxkd.PerturbationCurve],
) -> None:
    model, (images, maps) = model_of().double(), data()
    reading = -torch.arange(72, dtype=torch.float64).view(1, 8, 9).expand_as(maps)
    flat = curve(model, images, torch.zeros_like(maps), 1)
    assert torch.equal(flat.scores, curve(model, images, reading, 1).scores)


# --- change of confidence


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("relative", [True, False])
def test_confidence_is_the_formula(relative: bool, n: int) -> None:
    model, (images, maps) = model_of().double().eval(), data(n)
    found = confidence_change(model, images, maps, 1, relative=relative)
    for i in range(n):
        y, o = (model(x[None])[0].softmax(0)[1].item() for x in (images[i], images[i] * maps[i]))
        drop = max(0.0, y - o) / (y if relative else 1)
        assert found.drop[i].item() == pytest.approx(drop, abs=1e-12)
        assert found.increase[i].item() == float(o > y)


def test_peer_confidence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their imports
        peer = needs("pytorch_grad_cam.metrics.cam_mult_image")
        target = needs("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget
    model, (images, maps) = model_of().eval(), data(8, dtype=torch.float32)
    targets = [target(i % 5) for i in range(8)]
    arguments = (images, maps.numpy(), targets, model)
    found = confidence_change(model, images, maps, targets, score="logit", relative=False)
    assert found.drop.tolist() == pytest.approx(peer.DropInConfidence()(*arguments), abs=1e-6)
    assert found.increase.tolist() == peer.IncreaseInConfidence()(*arguments).tolist()
    assert 0 < found.increase.sum() < 8


def test_maps_at_their_ends() -> None:
    model, (images, maps) = model_of().double().eval(), data()
    all_of_it = confidence_change(model, images, torch.ones_like(maps))
    assert all_of_it.drop.tolist() == all_of_it.increase.tolist() == [0] * 4
    nothing = confidence_change(model, images, torch.zeros_like(maps), 2)
    y, o = (model(x).softmax(1)[:, 2] for x in (images, torch.zeros_like(images)))
    assert torch.allclose(nothing.drop, ((y - o) / y).clamp(min=0))
    # A probability that underflows cannot drop.
    sure = confidence_change(lambda x: 1e4 * x[:, :2, 0, 0], images.abs() + 1, maps, 0)
    certain = confidence_change(
        lambda x: torch.tensor([[-1e4, 1e4]]).expand(len(x), 2), images, maps, 0
    )
    assert not sure.drop.isnan().any()
    assert certain.drop.tolist() == [0] * 4


# --- ADCC


def explainer(x: Tensor, targets: Tensor) -> Tensor:
    m = x.abs().sum(1) + targets.view(-1, 1, 1)
    low, high = m.amin((1, 2), keepdim=True), m.amax((1, 2), keepdim=True)
    return (m - low) / (high - low + 1e-7)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("n", [1, 4])
def test_adcc_is_the_formula(n: int, given: bool) -> None:
    model, (images, maps) = model_of().double().eval(), data(n)
    found = adcc(model, images, explainer, 1, maps=maps if given else None)
    for i in range(n):
        target = torch.tensor([1])
        m = maps[i] if given else explainer(images[i : i + 1], target)[0]
        masked = (images[i] * m)[None]
        again = explainer(masked, target)[0]
        coherency = (np.corrcoef(m.flatten(), again.flatten())[0, 1] + 1) / 2
        y, o = (model(x)[0].softmax(0)[1].item() for x in (images[i : i + 1], masked))
        drop, complexity = max(0.0, y - o) / y, m.mean().item()
        value = 3 / (1 / coherency + 1 / (1 - complexity) + 1 / (1 - drop))
        row = [score[i].item() for score in found]
        assert row == pytest.approx([value, coherency, complexity, drop], abs=1e-10)


def test_adcc_with_an_explainer_of_the_library() -> None:
    model, (images, _) = model_of().double(), data()
    cam = fastxkd.GradCAM(model, "2")
    found = adcc(model, images, cam)
    named = model.eval()(images).argmax(1)
    again = adcc(model, images, cam, named, maps=cam(images, named))
    for a, b in zip(found, again, strict=True):
        assert torch.equal(a, b)
    assert ((found.adcc >= 0) & (found.adcc <= 1)).all()


def test_adcc_at_its_ends() -> None:
    model, (images, maps) = model_of().double(), data()
    constant = adcc(model, images, lambda x, targets: torch.full_like(maps, 0.5), 0)
    assert constant.coherency.tolist() == [0.5] * 4
    full = adcc(model, images, lambda x, targets: torch.ones_like(maps), 0)
    assert full.complexity.tolist() == [1] * 4
    assert full.adcc.tolist() == [0] * 4


# --- what all have in common


def calls(images: Tensor, maps: Tensor) -> dict[str, Callable[[Any], Tensor]]:
    return {
        "deletion": lambda model: deletion_curve(model, images, maps, 0).auc,
        "insertion": lambda model: insertion_curve(model, images, maps, 0).auc,
        "drop": lambda model: confidence_change(model, images, maps, 0).drop,
        "increase": lambda model: confidence_change(model, images, maps, 0).increase,
        "adcc": lambda model: adcc(model, images, explainer, 0, maps=maps).adcc,
    }


NAMES = list(calls(torch.zeros(1), torch.zeros(1)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    model, (images, maps) = model_of().to(dtype), data(dtype=dtype)
    found = calls(images, maps)[name](model)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The same weights and images in float64: the model's own rounding is what is left.
    true = calls(images.double(), maps.double())[name](model.double())
    if name == "increase":  # a comparison, which rounding decides where nothing changed
        assert set(found.tolist()) <= {0.0, 1.0}
    else:
        assert torch.allclose(found.double(), true, atol=4 * torch.finfo(dtype).eps + 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_of_its_image_only(name: str) -> None:
    model, (images, maps) = model_of().double(), data()
    clean = calls(images, maps)[name](model)
    for tensor in (images[1, 0], maps[1]):
        before = tensor[3, 3].clone()
        tensor[3, 3] = torch.nan
        found = calls(images, maps)[name](model)
        tensor[3, 3] = before
        assert found.isnan().tolist() == [False, True, False, False]
        assert torch.allclose(found[[0, 2, 3]], clean[[0, 2, 3]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_left_as_it_was(name: str) -> None:
    model, (images, maps) = model_of().double(), data()
    model.train()
    model[1].eval()
    flags = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = calls(images.requires_grad_(), maps.requires_grad_())[name](model)
    assert not found.requires_grad
    assert flags == [m.training for m in model.modules()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_refused(name: str) -> None:
    model = model_of()
    images, maps = data(dtype=torch.float32)
    for bad, text in (
        (maps[:, :5], r"maps: expected \[4, 8, 9\], one value a pixel"),
        (maps[:3], r"maps: expected \[4, 8, 9\]"),
        (maps[:, None], r"maps: expected \[n, h, w\]"),
    ):
        with pytest.raises(ValueError, match=text):
            calls(images, bad)[name](model)
    with pytest.raises(TypeError, match="maps: expected a floating-point dtype"):
        calls(images, maps > 0)[name](model)
    with pytest.raises(ValueError, match=r"images: expected \[n, channels, h, w\]"):
        calls(images[0], maps)[name](model)
    with pytest.raises(ValueError, match=r"model: expected it to return \[4, classes\]"):
        calls(images, maps)[name](lambda x: x)
    with pytest.raises(TypeError, match="model: expected a callable"):
        calls(images, maps)[name](None)


def test_options_are_refused() -> None:
    model, (images, maps) = model_of(), data(dtype=torch.float32)
    for curve in CURVES:
        with pytest.raises(ValueError, match="steps: expected at most one for each of 72 pixels"):
            curve(model, images, maps, steps=73)
        with pytest.raises(ValueError, match="steps: expected at least 1"):
            curve(model, images, maps, steps=0)
        with pytest.raises(ValueError, match="steps_at_once: expected at least 1"):
            curve(model, images, maps, steps_at_once=0)
        with pytest.raises(ValueError, match="score: expected one of"):
            curve(model, images, maps, score="margin")
        with pytest.raises(ValueError, match="targets: expected 0 <= class < 5, got -1"):
            curve(model, images, maps, -1)
    with pytest.raises(ValueError, match=r"baseline: expected a shape that broadcasts"):
        deletion_curve(model, images, maps, baseline=torch.zeros(2))
    with pytest.raises(TypeError, match="baseline: expected a number"):
        deletion_curve(model, images, maps, baseline="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"start: expected a shape that broadcasts"):
        insertion_curve(model, images, maps, start=torch.zeros(7, 3, 8, 9))
    for low, high in ((-1, 0), (0.5, 2)):
        with pytest.raises(ValueError, match=r"maps: expected values in \[0, 1\]"):
            confidence_change(model, images, low + (high - low) * maps)
        with pytest.raises(ValueError, match=r"maps: expected values in \[0, 1\]"):
            adcc(model, images, explainer, maps=low + (high - low) * maps)
    with pytest.raises(ValueError, match="relative: expected False with score='logit'"):
        confidence_change(model, images, maps, score="logit")
    with pytest.raises(TypeError, match="relative: expected a bool"):
        confidence_change(model, images, maps, relative=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="explain: expected a callable"):
        adcc(model, images, maps)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="targets: expected class indices"):
        adcc(model, images, explainer, [lambda row: row[0]] * 4)
    with pytest.raises(ValueError, match=r"explain: expected \[n, h, w\]"):
        adcc(model, images, lambda x, targets: x)


# --- the metrics

METRICS: dict[str, Callable[[], Any]] = {
    "deletion": lambda: fastxkd.DeletionAUC(steps=6),
    "insertion": lambda: fastxkd.InsertionAUC(steps=6, start=0.0),
    "drop": fastxkd.AverageDrop,
    "increase": fastxkd.AverageIncrease,
    "adcc": fastxkd.ADCC,
}


def single(name: str, model: nn.Module, images: Tensor, maps: Tensor) -> Tensor:
    if name == "deletion":
        return deletion_curve(model, images, maps, steps=6).auc
    if name == "insertion":
        return insertion_curve(model, images, maps, steps=6, start=0.0).auc
    if name == "adcc":
        return adcc(model, images, explainer, maps=maps).adcc
    return getattr(confidence_change(model, images, maps), name)


@pytest.mark.parametrize("name", METRICS)
def test_metric_over_batches_is_one_batch(name: str) -> None:
    model, (images, maps) = model_of().double(), data(7)
    metric, left, right = (METRICS[name]() for _ in range(3))

    def given(rows: Tensor) -> dict[str, Any]:
        extra = {"explain": explainer} if name == "adcc" else {}
        return {"model": model, "images": images[rows], "maps": maps[rows], **extra}

    true = single(name, model, images, maps)
    for i, rows in enumerate(torch.arange(7).split([2, 4, 1])):
        of_batch = metric(**given(rows))
        assert of_batch.item() == pytest.approx(true[rows].mean().item(), abs=1e-6)
        (left if i else right).update(**given(rows))
    left.merge_state(right)
    for m in (metric, left, pickle.loads(pickle.dumps(metric))):
        assert m.compute().shape == ()
        assert m.compute().item() == pytest.approx(true.mean().item(), abs=1e-6)
    assert metric.higher_is_better is (name not in ("deletion", "drop"))
    metric.reset()
    with (
        pytest.raises(ValueError, match=f"{type(metric).__name__}: compute"),
        pytest.warns(UserWarning, match="compute"),
    ):
        metric.compute()
    metric.reset()
    metric.update(**given(torch.arange(2)))
    assert metric.compute().item() == pytest.approx(true[:2].mean().item(), abs=1e-6)


def test_metrics_in_a_collection() -> None:
    torchmetrics = needs("torchmetrics")
    model, (images, maps) = model_of().double(), data(6)
    collection = torchmetrics.MetricCollection(
        {name: make() for name, make in METRICS.items() if name != "adcc"}
    )
    for rows in torch.arange(6).split(4):
        collection.update(model=model, images=images[rows], maps=maps[rows])
    for name, value in collection.compute().items():
        true = single(name, model, images, maps).mean().item()
        assert value.item() == pytest.approx(true, abs=1e-6), name


def test_metric_options() -> None:
    model, (images, maps) = model_of().double(), data()
    drop = fastxkd.AverageDrop(score="logit", relative=False)
    drop.update(model, images, maps, 2)
    true = confidence_change(model, images, maps, 2, score="logit", relative=False).drop.mean()
    assert drop.compute().item() == pytest.approx(true.item(), abs=1e-6)
    auc = fastxkd.DeletionAUC(steps=3, baseline=0.7, score="logit", steps_at_once=2)
    auc.update(model, images, maps, 2)
    true = deletion_curve(model, images, maps, 2, steps=3, baseline=0.7, score="logit").auc.mean()
    assert auc.compute().item() == pytest.approx(true.item(), abs=1e-6)


@pytest.mark.parametrize("name", METRICS)
def test_metric_over_processes(name: str) -> None:
    """What two processes have seen, gathered as torchmetrics does."""
    model, (images, maps) = model_of().double(), data(5)

    def given(rows: slice) -> dict[str, Any]:
        extra = {"explain": explainer} if name == "adcc" else {}
        return {"model": model, "images": images[rows], "maps": maps[rows], **extra}

    here, there = (METRICS[name]() for _ in range(2))
    here.update(**given(slice(2)))
    there.update(**given(slice(2, 5)))
    others = iter([getattr(there, state) for state in there._reductions])
    here.sync(dist_sync_fn=lambda x, group: [x, next(others)], distributed_available=lambda: True)
    true = single(name, model, images, maps).mean().item()
    assert (here.total / here.images).item() == pytest.approx(true, abs=1e-12)
    here.unsync()
    assert here.compute().item() == pytest.approx(
        single(name, model, images, maps)[:2].mean().item(), abs=1e-6
    )


def test_a_collection_keeps_metrics_apart_that_agree_at_first() -> None:
    torchmetrics = needs("torchmetrics")
    model, (images, maps) = model_of().double(), data(6)
    collection = torchmetrics.MetricCollection(
        {"drop": fastxkd.AverageDrop(), "increase": fastxkd.AverageIncrease()}
    )
    whole = torch.ones_like(maps[:2])
    collection.update(model=model, images=images[:2], maps=whole)  # nothing changes
    assert collection.compute() == {"drop": 0, "increase": 0}
    collection.update(model=model, images=images[2:], maps=maps[2:])
    change = confidence_change(model, images, torch.cat([whole, maps[2:]]))
    found = collection.compute()
    assert found["drop"].item() == pytest.approx(change.drop.mean().item(), abs=1e-6)
    assert found["increase"].item() == pytest.approx(change.increase.mean().item(), abs=1e-6)
    assert found["drop"] != found["increase"]


def test_metric_in_and_out_of_inference_mode() -> None:
    model, (images, maps) = model_of().double(), data()
    metric = fastxkd.AverageDrop()
    with torch.inference_mode():
        metric(model, images[:2], maps[:2])
    metric(model, images[2:], maps[2:])
    true = confidence_change(model, images, maps).drop.mean().item()
    assert metric.compute().item() == pytest.approx(true, abs=1e-6)


def test_metric_options_are_refused_when_made() -> None:
    curves: tuple[type[Any], ...] = (fastxkd.DeletionAUC, fastxkd.InsertionAUC)
    for curve in curves:
        with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
            curve(steps=0)
        with pytest.raises(TypeError, match="steps: expected an int, got float"):
            curve(steps=2.5)
        with pytest.raises(ValueError, match="steps_at_once: expected at least 1, got 0"):
            curve(steps_at_once=0)
    for metric in (*curves, fastxkd.AverageDrop, fastxkd.AverageIncrease):
        with pytest.raises(ValueError, match="score: expected one of probability, logit, got 'bo"):
            metric(score="bogus")
    with pytest.raises(TypeError, match="baseline: expected a number, got str"):
        fastxkd.DeletionAUC(baseline="x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="start: expected a number, got str"):
        fastxkd.InsertionAUC(start="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="relative: expected False with score='logit'"):
        fastxkd.AverageDrop(score="logit")
    with pytest.raises(TypeError, match="relative: expected a bool, got int"):
        fastxkd.AverageDrop(relative=1)  # type: ignore[arg-type]
    fastxkd.AverageIncrease(score="logit")  # has no division
