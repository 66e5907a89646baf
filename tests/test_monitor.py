"""The monitor: its numbers are those of the step, and the step does not notice."""

from __future__ import annotations

import copy
import gc
import io
import json
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastxkd
from fastxkd.metrics.pooling import compared
from fastxkd.train import ExplanationMonitor, Record, _lane, _log
from fastxkd.train._pool import Pool
from tests import oracles
from tests.conftest import needs

CLASSES, BATCH, SIDE = 3, 16, 12


class Net(nn.Module):
    """Batch norm, dropout, and an in-place operation on the monitored layer's output."""

    def __init__(self, width: int, *, side: int = 3, seed: int = 0, dropout: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3), nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(side)
        )
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        found = self.body(self.stem(images)).relu_()
        return self.head(self.drop(found.mean((2, 3))))


def student(**options: Any) -> Net:
    return Net(5, seed=1, **options)


def teacher() -> Net:
    return Net(7, side=4, seed=2).eval()


def base() -> Net:
    return Net(5, seed=3).eval()


def batches(count: int, n: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(7)
    images = torch.randn(count, n, 1, SIDE, SIDE)
    return [(x, torch.arange(n) % CLASSES) for x in images]


def guidance(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def train(
    learner: nn.Module,
    guide: nn.Module,
    monitor: ExplanationMonitor | None,
    given: list[tuple[Tensor, Tensor]],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    teacher_first: bool = False,
    guide_by: Callable[[nn.Module, Tensor], Tensor] = guidance,
) -> torch.optim.Optimizer:
    optimizer = optimizer or torch.optim.SGD(learner.parameters(), lr=0.1, momentum=0.9)
    for images, labels in given:
        with nullcontext() if monitor is None else monitor.step(labels):
            wanted = guide_by(guide, images) if teacher_first else None
            logits = learner(images)
            wanted = guide_by(guide, images) if wanted is None else wanted
            loss = fastxkd.kd_loss(logits, wanted, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return optimizer


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- The numbers


def explained_by_hand(
    model: Net, images: Tensor, labels: Tensor, where: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Activation, gradient and logits of a copy of the model, by hooks of our own."""
    model = copy.deepcopy(model)
    kept: list[Tensor] = []
    getattr(model, where).register_forward_hook(lambda m, i, o: kept.append(o.clone()) or kept[0])
    # What goes on from the layer is a copy, so that relu_ leaves the activation alone.
    getattr(model, where).register_forward_hook(lambda m, i, o: o.clone())
    logits = model(images)
    score = sum(logits[i, label] for i, label in enumerate(labels.tolist()))
    (gradient,) = torch.autograd.grad(score, kept[0])
    return kept[0].detach(), gradient, logits.detach()


@pytest.mark.parametrize("method", ["gradcam", "layercam", "gradcam++"])
def test_numbers_are_those_of_the_formulas(method: str) -> None:
    learner, guide, without = student(dropout=0.0), teacher(), base()
    ((images, labels),) = batches(1)
    expected = {}
    seen = {
        "student": explained_by_hand(learner, images, labels, "body"),
        "teacher": explained_by_hand(guide, images, labels, "body"),
        "base": explained_by_hand(without, images, labels, "body"),
    }
    maps = {}
    for role in ("student", "teacher"):
        activation, gradient, _ = (x.double() for x in seen[role])
        raw = oracles.cam_raw(activation, gradient, method)
        maps[role] = oracles.cam_finish(raw, (4, 4), True, 2)
    cosines = F.cosine_similarity(maps["student"].flatten(1), maps["teacher"].flatten(1))
    expected["last/agreement"] = cosines.mean()
    features = {role: x[0].double() for role, x in seen.items()}
    onehot = F.one_hot(labels).double()
    expected["last/fss"] = oracles.correlation(
        features["student"], features["base"], unbiased=False
    )
    expected["last/fss_teacher"] = oracles.correlation(
        features["student"], features["teacher"], unbiased=False
    )
    for role, x in features.items():
        expected[f"last/rs_{role}"] = oracles.correlation(x, onehot, unbiased=True)
    s, b = features["student"], features["base"]
    expected["last/rs_distilled"] = oracles.partial(s, onehot, b, semi=True)
    expected["last/rs_residual"] = oracles.partial(b, onehot, s, semi=True)

    monitor = ExplanationMonitor(
        learner, guide, {"last": ("body", "body")}, base=without, method=method, pool=BATCH
    )
    train(learner, guide, monitor, [(images, labels)])
    monitor.close()
    (record,) = monitor.history
    assert record.step == 0
    assert record.values.keys() == expected.keys()
    for name, value in expected.items():
        assert record.values[name] == pytest.approx(float(value), abs=2e-5), name


@pytest.mark.parametrize("measure", ["pearson", "spearman", "top"])
def test_agreement_measures(measure: str) -> None:
    learner = student(dropout=0.0)
    ((images, labels),) = batches(1)
    monitor = ExplanationMonitor(
        learner, learner_twin := copy.deepcopy(learner), "body", agreement=measure, pool=BATCH
    )
    train(learner, learner_twin, monitor, [(images, labels)])
    monitor.close()
    # The twin is in training mode as the student is: the same maps.
    assert monitor.history[0].values["body/agreement"] == pytest.approx(1.0)


def test_classes_without_labels_are_the_students_own() -> None:
    learner, guide = student(dropout=0.0), teacher()
    ((images, _),) = batches(1)
    predicted = copy.deepcopy(learner)(images).argmax(1)
    found = []
    for labels in (None, predicted):
        monitor = ExplanationMonitor(
            copy.deepcopy(learner), guide, "body", metrics=["agreement", "fss"], pool=BATCH
        )
        with monitor.step(labels):
            monitor._sides["student"].model(images)
            guidance(guide, images)
        monitor.close()
        found.append(monitor.history[0].values)
    assert found[0] == found[1]


def test_soft_labels() -> None:
    learner, guide = student(dropout=0.0), teacher()
    ((images, labels),) = batches(1)
    soft = 0.9 * F.one_hot(labels, CLASSES).float() + 0.1 * torch.rand(BATCH, CLASSES)
    monitor = ExplanationMonitor(learner, guide, "body", pool=BATCH)
    features = explained_by_hand(learner, images, labels, "body")[0].double()
    with monitor.step(soft):
        learner(images)
        guidance(guide, images)
    monitor.close()
    wanted = oracles.correlation(features, soft.double(), unbiased=True)
    assert monitor.history[0].values["body/rs_student"] == pytest.approx(float(wanted), abs=2e-5)


# --- The step does not notice


def frozen(model: nn.Module, images: Tensor) -> Tensor:
    """Without no_grad, but no weight asks for a gradient."""
    return model(images)


def by_set_grad_enabled(model: nn.Module, images: Tensor) -> Tensor:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    try:
        return model(images)
    finally:
        torch.set_grad_enabled(before)


def in_inference_mode(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        logits = model(images)
    return logits.clone()


WAYS = {
    "no_grad": guidance,
    "frozen": frozen,
    "set_grad_enabled": by_set_grad_enabled,
    "inference_mode": in_inference_mode,
}


@pytest.mark.parametrize("teacher_first", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_weights_end_bit_identical(way: str, teacher_first: bool) -> None:
    given = batches(6)
    ends = []
    for monitored in (True, False):
        learner, guide, without = student(), teacher(), base()
        if way == "frozen":
            guide.requires_grad_(False)
        monitor = None
        if monitored:
            monitor = ExplanationMonitor(
                learner,
                guide,
                {"early": ("stem", "stem"), "last": ("body", "body")},
                base=without,
                every=2,
                pool=2 * BATCH,
                probe=(given[0][0][:5], given[0][1][:5]),
                probe_every=3,
            )
        torch.manual_seed(11)
        optimizer = train(
            learner, guide, monitor, given, teacher_first=teacher_first, guide_by=WAYS[way]
        )
        ends.append(
            [
                learner.state_dict(),
                optimizer.state_dict(),
                torch.get_rng_state(),
                guide.state_dict(),
                [m.training for model in (learner, guide, without) for m in model.modules()],
                [p.grad for p in learner.parameters()],
                torch.is_grad_enabled(),
            ]
        )
        assert all(p.grad is None for model in (guide, without) for p in model.parameters())
        assert hooks(learner) == hooks(guide) == hooks(without) == 0
        if monitor is not None:
            monitor.close()
            assert [r.step for r in monitor.history] == [0, 2, 4]
            assert "last/rs_distilled" in monitor.history[1].values
            assert [f.step for f in monitor.frames] == [0, 3]
    assert same(*ends)


class Attentive(nn.Module):
    """Tokens, a class token, and torch's own attention, which has a fast path without a graph."""

    num_prefix_tokens = 1

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.patch = nn.Conv2d(1, 16, 4, stride=4)
        self.first = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.last = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).mT
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
        return self.head(self.last(self.first(tokens))[:, 0])


def test_a_transformer_teacher_keeps_its_fast_path() -> None:
    guide = Attentive(4).eval()
    ((images, labels),) = batches(1)
    alone = guidance(guide, images)
    learner = student()
    monitor = ExplanationMonitor(learner, guide, {"last": ("body", "first")}, pool=BATCH)
    with monitor.step(labels):
        learner(images)
        seen = guidance(guide, images)
    monitor.close()
    assert torch.equal(seen, alone)
    assert not seen.requires_grad
    assert monitor.history[0].values.keys() >= {"last/agreement", "last/fss_teacher"}


def test_others_hooks_on_the_teacher_see_what_they_would() -> None:
    learner, guide = student(), teacher()
    ((images, labels),) = batches(1)
    monitor = ExplanationMonitor(learner, guide, "body", pool=BATCH)
    calls: list[bool] = []
    guide.drop.register_forward_hook(lambda m, i, o: calls.append(o.requires_grad))
    with monitor.step(labels), fastxkd.capture(guide, ["stem", "body"]) as captured:
        logits = learner(images)
        wanted = guidance(guide, images)
        features = captured.activations
    assert not any(f.requires_grad for f in features.values())
    assert not wanted.requires_grad
    assert calls == [False]
    assert torch.equal(features["body"], explained_by_hand(guide, images, labels, "body")[0])
    fastxkd.kd_loss(logits, wanted, labels).backward()
    monitor.close()
    assert "body/agreement" in monitor.history[0].values


def test_a_teacher_that_learns_too_keeps_its_gradient() -> None:
    """Mutual learning: its pass has a graph of its own, which the monitor must not cut."""
    gradients = []
    for monitored in (True, False):
        learner, guide = student(dropout=0.0), teacher().train()
        guide.drop.p = 0.0
        ((images, labels),) = batches(1)
        monitor = ExplanationMonitor(learner, guide, "body", pool=BATCH) if monitored else None
        with nullcontext() if monitor is None else monitor.step(labels):
            both = learner(images), guide(images)
            sum(F.cross_entropy(logits, labels) for logits in both).backward()
        gradients.append([p.grad for m in (learner, guide) for p in m.parameters()])
    assert same(*gradients)
    assert all(g is not None for g in gradients[0])


def test_a_frozen_trunk() -> None:
    """The layer has no graph of its own: only the head learns."""
    learner, guide = student(dropout=0.0), teacher()
    learner.stem.requires_grad_(False)
    learner.body.requires_grad_(False)
    ((images, labels),) = batches(1)
    monitor = ExplanationMonitor(learner, guide, "body", pool=BATCH)
    train(learner, guide, monitor, [(images, labels)])
    monitor.close()
    assert 0 < monitor.history[0].values["body/agreement"] <= 1


def test_no_graph_is_kept_alive() -> None:
    learner, guide = student(), teacher()
    ((images, labels),) = batches(1)
    monitor = ExplanationMonitor(learner, guide, "body", pool=BATCH)
    with monitor.step(labels):
        logits = learner(images)
        guidance(guide, images)
        node = weakref.ref(logits)
        del logits
        gc.collect()
    assert node() is None
    monitor.close()


def test_between_measured_steps_nothing_is_hooked() -> None:
    learner, guide = student(), teacher()
    monitor = ExplanationMonitor(learner, guide, "body", every=3)
    counts = []
    for images, labels in batches(5):
        with monitor.step(labels):
            counts.append(hooks(learner) + hooks(guide))
            learner(images)
            guidance(guide, images)
    assert [count > 0 for count in counts] == [True, False, False, True, False]
    assert hooks(learner) == hooks(guide) == 0
    assert monitor.count == 5


# --- What counts as a step


def test_the_teachers_stored_logits() -> None:
    """It does not run in the step: the monitor runs it on the student's images."""
    learner, guide = student(dropout=0.0), teacher()
    ((images, labels),) = batches(1)
    twin = copy.deepcopy(learner)
    found = []
    for model, stored in ((learner, True), (twin, False)):
        monitor = ExplanationMonitor(model, guide, "body", pool=BATCH)
        with monitor.step(labels):
            model(images)
            if not stored:
                guidance(guide, images)
        monitor.close()
        found.append(monitor.history[0].values)
    assert found[0] == pytest.approx(found[1], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_another_precision_that_the_monitor_runs_itself(dtype: torch.dtype) -> None:
    ((images, labels),) = batches(1)
    found = []
    for other in (torch.float32, dtype):
        guide, twin = teacher().to(other), base().to(other)
        monitor = ExplanationMonitor(student(dropout=0.0), guide, "body", base=twin, pool=BATCH)
        with monitor.step(labels):
            monitor._sides["student"].model(images)
        monitor.close()
        found.append(monitor.history[0].values)
    # The rounding of their weights and activations.
    assert found[0] == pytest.approx(found[1], abs=30 * torch.finfo(dtype).eps + 1e-5)


def test_a_checkpoint_that_hides_its_gradient_is_named() -> None:
    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = nn.Conv2d(1, 5, 3), nn.Conv2d(5, 5, 3)
            self.head = nn.Linear(5, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            found = checkpoint(self.body, self.stem(images), use_reentrant=True)
            return self.head(found.mean((2, 3)))

    ((images, labels),) = batches(1)
    for layer in ("stem", "body"):
        learner = Saving()
        monitor = ExplanationMonitor(learner, teacher(), {"one": (layer, "body")}, pool=BATCH)
        with pytest.raises(ValueError, match="use_reentrant=True"), monitor.step(labels):
            learner(images)
        assert hooks(learner) == 0
        metrics = ["fss", "rs"]
        monitor = ExplanationMonitor(
            learner, teacher(), {"one": (layer, "body")}, pool=BATCH, metrics=metrics
        )
        with monitor.step(labels):
            learner(images).sum().backward()
        monitor.close()
        assert "one/fss_teacher" in monitor.history[0].values


def monitors() -> int:
    gc.collect()
    return sum(type(x) is ExplanationMonitor for x in gc.get_objects())


@pytest.mark.parametrize("way", ["copied", "saved"])
def test_a_copy_made_in_a_step_is_watched_by_nobody(way: str) -> None:
    learner, guide = student(dropout=0.0), teacher()
    monitor = ExplanationMonitor(
        learner, guide, "body", pool=BATCH, logits=lambda output: output, sink=lambda *given: None
    )
    ((images, labels),) = batches(1)
    before = monitors()
    with monitor.step(labels):
        if way == "copied":
            twin = copy.deepcopy(learner)
        else:
            file = io.BytesIO()
            torch.save(learner, file)
            assert file.tell() < 20 * sum(p.numel() for p in learner.parameters()) + 20_000
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert torch.equal(twin(images), learner(images))
        assert monitors() == before
    monitor.close()
    assert hooks(learner) == 0
    assert len(monitor.history) == 1
    assert torch.equal(twin(images), learner(images))


def test_numbers_of_steps() -> None:
    learner, guide = student(), teacher()
    monitor = ExplanationMonitor(learner, guide, "body", pool=BATCH)
    labels = torch.zeros(4, dtype=torch.long)
    for wrong in (labels, 2.0, "3"):
        with pytest.raises(TypeError, match=r"step: expected a whole number, got .*; labels are"):
            monitor.begin_step(wrong)  # type: ignore[arg-type]
    assert hooks(learner) == 0
    assert monitor.begin_step(torch.tensor(100)) is True  # type: ignore[arg-type]
    monitor.abandon_step()
    # A second epoch that begins at 0 again.
    with monitor.step(labels, step=7):
        pass
    with monitor.step(labels, step=7):
        pass
    with pytest.warns(UserWarning, match="step 1 comes after step 7"), monitor.step(step=1):
        pass
    with monitor.step(step=2):
        pass


@pytest.mark.parametrize("inside", [False, True])
def test_validation_is_no_step(inside: bool) -> None:
    learner, guide = student(), teacher()
    (images, labels), (others, _) = batches(2)
    expected = ExplanationMonitor(copy.deepcopy(learner), guide, "body", pool=BATCH)
    torch.manual_seed(5)
    train(expected._sides["student"].model, guide, expected, [(images, labels)])
    expected.close()

    monitor = ExplanationMonitor(learner, guide, "body", pool=BATCH)

    def validate() -> None:
        learner.eval()
        for mode in (torch.no_grad, torch.enable_grad):  # some forget no_grad
            with mode():
                learner(others)
                guidance(guide, others)
        learner.train()

    if not inside:
        validate()
    with monitor.step(labels):
        if inside:
            validate()
        torch.manual_seed(5)
        learner(images)
        guidance(guide, images)
        if inside:
            validate()
    monitor.close()
    assert monitor.history == expected.history


def test_a_step_without_the_student_says_so_once() -> None:
    learner, guide = student(), teacher()
    monitor = ExplanationMonitor(learner, guide, "body", every=1)
    labels = torch.zeros(4, dtype=torch.long)
    message = r"nothing was measured in step 0: the student ran no"
    with pytest.warns(UserWarning, match=message), monitor.step(labels):
        pass
    with monitor.step(torch.zeros(4, dtype=torch.long)):
        pass
    monitor.close()
    assert monitor.history == []


def test_micro_batches_are_one_record() -> None:
    learner, guide = student(dropout=0.0), teacher()
    parts = batches(4)
    alone = []
    for images, labels in parts[:2]:
        one = ExplanationMonitor(copy.deepcopy(learner), guide, "body", metrics="agreement")
        with one.step(labels):
            one._sides["student"].model(images)
            guidance(guide, images)
        one.close()
        alone.append(one.history[0].values["body/agreement"])
    monitor = ExplanationMonitor(learner, guide, "body", every=1, pool=2 * BATCH)
    for i, (images, labels) in enumerate(parts):
        with monitor.step(labels, step=i // 2):
            learner(images)
            guidance(guide, images)
    monitor.close()
    assert [record.step for record in monitor.history] == [0, 1]
    assert all("body/fss_teacher" in record.values for record in monitor.history)
    assert monitor.history[0].values["body/agreement"] == pytest.approx(sum(alone) / 2, abs=1e-6)


def test_several_passes_in_one_step_pair_with_the_teachers() -> None:
    learner, guide = student(dropout=0.0), teacher()
    (one, labels), (two, _) = batches(2)
    monitor = ExplanationMonitor(learner, guide, "body", every=1, pool=2 * BATCH)
    with monitor.step(labels):
        guidance(guide, two)
        guidance(guide, one)
        learner(one)
        learner(two)
    monitor.close()
    apart = ExplanationMonitor(student(dropout=0.0), guide, "body", every=1, pool=2 * BATCH)
    for images in (one, two):
        with apart.step(labels, step=0):
            apart._sides["student"].model(images)
            guidance(guide, images)
    apart.close()
    assert monitor.history == apart.history


def test_labels_among_the_keywords() -> None:
    class Model(Net):
        def forward(self, images: Tensor, labels: Tensor | None = None) -> Any:
            return SimpleNamespace(logits=super().forward(images), loss=None)

    learner, guide = Model(5, seed=1), teacher()
    ((images, labels),) = batches(1)
    monitor = ExplanationMonitor(learner, guide, "body", pool=BATCH)
    with monitor.step():
        learner(images=images, labels=labels)
        guidance(guide, images)
    monitor.close()
    assert "body/rs_student" in monitor.history[0].values


# --- Things go wrong


@pytest.mark.parametrize("where", ["student", "teacher", "loss"])
def test_an_exception_in_the_step_leaves_nothing(where: str) -> None:
    learner, guide = student(), teacher()
    (images, labels), (again, _) = batches(2)
    monitor = ExplanationMonitor(learner, guide, "body", every=1, pool=BATCH)
    wrong = torch.zeros(4, 2, SIDE, SIDE)

    def broken() -> None:
        with monitor.step(labels):
            learner(wrong if where == "student" else images)
            guidance(guide, wrong if where == "teacher" else images)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError if where == "loss" else RuntimeError):
        broken()
    assert hooks(learner) == hooks(guide) == 0
    assert torch.is_grad_enabled()
    assert monitor.count == 0
    train(learner, guide, monitor, [(again, labels)])
    monitor.close()
    assert [record.step for record in monitor.history] == [0]


def test_a_step_left_open_is_given_up() -> None:
    learner, guide = student(), teacher()
    given = batches(3)
    monitor = ExplanationMonitor(learner, guide, "body", every=1, pool=BATCH)
    for step, (images, labels) in enumerate(given):
        assert monitor.begin_step(step, labels)
        learner(images)
        guidance(guide, images)
        if step != 1:
            monitor.end_step()
    monitor.end_step()  # no step is open: nothing happens
    monitor.close()
    assert [record.step for record in monitor.history] == [0, 2]
    assert hooks(learner) == hooks(guide) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "nowhere"}, "layers: Net has no layer named 'nowhere'"),
        ({"layers": {}}, "layers: expected at least one layer, got none"),
        ({"layers": {"a": ("body",)}}, "layers: expected 'a' in student, teacher, got 1 places"),
        ({"metrics": []}, "metrics: expected one or more of agreement, fss, rs, unicam, got none"),
        ({"metrics": ["fsr"]}, "metrics: expected one or more of agreement, .* got 'fsr'"),
        ({"metrics": "unicam"}, "metrics: unicam compares the student with a base; pass base="),
        ({"method": "weights"}, "method: expected one of gradcam, .* got 'weights'"),
        ({"agreement": "ssim"}, "agreement: expected one of cosine, .* got 'ssim'"),
        ({"pool": 3}, "pool: expected at least 4 images for distances, got 3"),
        ({"every": 0}, "every: expected at least 1, got 0"),
        ({"sink": "log.txt"}, "sink: expected a path that ends in .csv or .jsonl, got 'log.txt'"),
        ({"probe": torch.rand(3, 8, 8)}, r"probe: expected floats \[p, channels, height, width\]"),
        (
            {"probe": (torch.rand(3, 1, 8, 8), torch.zeros(2))},
            "probe: expected 3 class indices as its labels",
        ),
        ({"probe": torch.rand(3, 3, 8, 8), "mean": [0.5, 0.5]}, "mean: expected 1 or 3 numbers"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExplanationMonitor(student(), teacher(), **{"layers": "body", **changes})


def test_wrong_types() -> None:
    for changes, message in (
        ({"student": "resnet18"}, "student: expected a Module, got str"),
        ({"sink": 3}, "sink: expected a callable or a path, got int"),
        ({"every": 2.0}, "every: expected an int, got float"),
        ({"probe": "images"}, "probe: expected a Tensor of images, got str"),
        ({"layers": {3: "body"}}, "layers: expected names for them, got 3"),
    ):
        given = {"student": student(), "teacher": teacher(), "layers": "body", **changes}
        with pytest.raises(TypeError, match=message):
            ExplanationMonitor(**given)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "labels: rs and unicam ask for the labels of the batch"),
        (torch.zeros(3, dtype=torch.long), "labels: expected 16 class indices, one per image"),
        (torch.zeros(BATCH), r"labels: expected 16 class indices, .* got torch.float32 \[16\]"),
        (torch.zeros(BATCH, dtype=torch.bool), "labels: .* got torch.bool"),
    ],
)
def test_wrong_labels(labels: Tensor | None, message: str) -> None:
    learner = student()
    monitor = ExplanationMonitor(learner, teacher(), "body")
    with pytest.raises(ValueError, match=message), monitor.step(labels):
        learner(batches(1)[0][0])
    assert hooks(learner) == 0


def test_an_output_without_logits() -> None:
    class Map(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(1, 2, 3)

        def forward(self, images: Tensor) -> Any:
            return {"map": self.body(images)}

    learner = Map()
    ((images, labels),) = batches(1)
    monitor = ExplanationMonitor(learner, teacher(), "body", pool=BATCH)
    message = r"student: expected logits .* got dict; pass logits="
    with pytest.raises(ValueError, match=message), monitor.step(labels):
        learner(images)

    def logits(output: Any) -> Tensor:
        found = output["map"] if isinstance(output, dict) else output
        return found.mean((2, 3)) if found.dim() > 2 else found

    monitor = ExplanationMonitor(learner, teacher(), "body", pool=BATCH, logits=logits)
    with monitor.step(labels):
        learner(images)
    monitor.close()
    # The student has two classes of the three: of the third it explains its own.
    assert "body/agreement" in monitor.history[0].values


def test_a_layer_that_the_logits_do_not_depend_on() -> None:
    learner = student()
    learner.aside = nn.Linear(1, 1)
    guide = teacher()
    guide.aside = nn.Linear(1, 1)
    ((images, labels),) = batches(1)
    monitor = ExplanationMonitor(learner, guide, {"aside": ("aside", "aside")})
    message = "'aside' was never reached in the forward pass"
    with pytest.raises(ValueError, match=message), monitor.step(labels):
        learner(images)


def test_a_layer_without_positions_has_features_only() -> None:
    ((images, labels),) = batches(1)
    for metrics in (None, ["fss", "rs"]):
        learner, guide = student(), teacher()
        monitor = ExplanationMonitor(learner, guide, "drop", metrics=metrics, pool=BATCH)
        if metrics is None:
            message = r"layers: 'drop' of the student: expected spatial .*, got \[16, 5\]"
            with pytest.raises(ValueError, match=message):
                train(learner, guide, monitor, [(images, labels)])
            continue
        train(learner, guide, monitor, [(images, labels)])
        monitor.close()
        names = {"drop/fss_teacher", "drop/rs_student", "drop/rs_teacher"}
        assert monitor.history[0].values.keys() == names


def test_a_layer_with_one_position_has_features_only() -> None:
    ((images, labels),) = batches(1)
    learner, guide = student(side=1), teacher()
    given = {"one": ("body", "body"), "more": ("stem", "stem")}
    monitor = ExplanationMonitor(learner, guide, given, every=1, metrics=["agreement", "fss"])
    with pytest.warns(UserWarning, match="layer 'one' of the student has a single pos") as told:
        train(learner, guide, monitor, [(images, labels)] * 2)
    assert len(told) == 1
    monitor.close()
    assert [record.values.keys() for record in monitor.history] == [{"more/agreement"}] * 2


def test_maps_that_stay_zero_are_told_of() -> None:
    class Aside(Net):
        """Logits that do not change with what its layer gives, from time to time."""

        def forward(self, images: Tensor) -> Tensor:
            found = self.body(self.stem(images))
            return self.head(found.mean((2, 3)) * (0 if self.blank else 1))

        blank = True

    learner, guide = Aside(5, seed=1), teacher()
    monitor = ExplanationMonitor(learner, guide, "body", every=1, metrics="agreement")
    train(learner, guide, monitor, batches(2))
    learner.blank = False
    train(learner, guide, monitor, batches(1))
    learner.blank = True
    train(learner, guide, monitor, batches(2))
    with pytest.warns(UserWarning, match="'body' of the student were zero for 3 batches") as told:
        train(learner, guide, monitor, batches(5))
    monitor.close()
    assert len(told) == 1
    assert len(monitor.history) == 10
    assert monitor.history[-1].values.keys() == {"body/agreement"}


def test_nan_is_reported_and_not_raised() -> None:
    learner, guide = student(dropout=0.0), teacher()
    ((images, labels),) = batches(1)
    images[3] = float("nan")
    monitor = ExplanationMonitor(learner, guide, "body", pool=BATCH)
    train(learner, guide, monitor, [(images, labels)])
    monitor.close()
    assert (
        monitor.history[0].values["body/agreement"] != monitor.history[0].values["body/agreement"]
    )


# --- Pools


def test_scores_come_when_the_pool_is_full() -> None:
    learner, guide = student(), teacher()
    monitor = ExplanationMonitor(learner, guide, "body", every=1, pool=40)
    train(learner, guide, monitor, batches(7))
    monitor.close()
    full = ["body/fss_teacher" in record.values for record in monitor.history]
    # 16, 32, 48 >= 40; and anew.
    assert full == [False, False, True, False, False, True, False]
    assert all("body/agreement" in record.values for record in monitor.history)


def test_images_without_a_label_are_left_out_of_the_pool() -> None:
    options: Any = {"fss": True, "rs": True, "unicam": False}
    torch.manual_seed(0)
    rows = {f"a/{role}": torch.rand(12, 6) for role in ("student", "teacher")}
    labels = torch.arange(12) % 3
    expected = Pool(9, ["a"], ["student", "teacher"], **options).add(
        {name: row[3:] for name, row in {**rows, "labels": labels}.items()}
    )
    labels = torch.where(torch.arange(12) < 3, -100, labels)
    pool = Pool(9, ["a"], ["student", "teacher"], **options)
    assert pool.add({name: row[:3] for name, row in {**rows, "labels": labels}.items()}) == {}
    assert len(pool) == 0
    assert pool.add({**rows, "labels": labels}) == expected
    assert expected.keys() == {"a/fss_teacher", "a/rs_student", "a/rs_teacher"}


def test_images_of_another_size_begin_a_new_pool() -> None:
    pool = Pool(8, ["a"], ["student", "teacher"], fss=True, rs=False, unicam=False)
    wide, narrow = ({f"a/{r}": torch.rand(4, w) for r in ("student", "teacher")} for w in (6, 5))
    assert pool.add(wide) == {}
    assert pool.add(narrow) == {}
    assert len(pool) == 4
    assert pool.add(narrow).keys() == {"a/fss_teacher"}
    assert len(pool) == 0


def test_wide_layers_are_averaged_over_blocks() -> None:
    x = torch.rand(2, 8, 6, 6)
    assert torch.equal(compared(x, 288), x.flatten(1))
    expected = x.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    torch.testing.assert_close(compared(x, 72), expected.flatten(1))
    assert compared(torch.rand(2, 8, 4, 6, 6), 100).shape[1] <= 100
    assert compared(x.bfloat16(), 288).dtype == torch.float32
    assert compared(x.double(), 288).dtype == torch.float64


# --- Delivery


def test_records_go_to_sinks_a_step_later_and_in_order() -> None:
    learner, guide = student(), teacher()
    told: list[tuple[int, dict[str, float]]] = []
    monitor = ExplanationMonitor(
        learner, guide, "body", every=2, sink=[lambda s, v, p: told.append((s, v))], pool=BATCH
    )
    lengths = []
    for images, labels in batches(5):
        train(learner, guide, monitor, [(images, labels)])
        lengths.append(len(told))
    assert lengths == [0, 1, 1, 2, 2]
    monitor.flush()
    assert told == [tuple(record) for record in monitor.history]
    assert [step for step, _ in told] == [0, 2, 4]


class Late:
    """A device whose copies take their time, as a CUDA event would say."""

    def __init__(self) -> None:
        self.done = False
        self.waits = 0

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.waits += 1
        self.done = True


def test_nobody_waits_for_what_has_not_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Late] = []

    def send(self: _lane.Lane, tensors: dict[str, Tensor]) -> _lane.Parcel:
        events.append(Late())
        return _lane.Parcel(dict(tensors), events[-1])  # type: ignore[arg-type]

    monkeypatch.setattr(_lane.Lane, "send", send)
    learner, guide = student(), teacher()
    monitor = ExplanationMonitor(learner, guide, "body", every=1, pool=BATCH)
    train(learner, guide, monitor, batches(3))
    assert monitor.history == []
    events[1].done = True  # the second overtakes the first: order is kept
    train(learner, guide, monitor, batches(1))
    assert monitor.history == []
    events[0].done = True
    train(learner, guide, monitor, batches(1))
    assert [record.step for record in monitor.history] == [0, 1]
    assert sum(event.waits for event in events) == 0
    monitor.close()
    assert [record.step for record in monitor.history] == [0, 1, 2, 3, 4]
    assert sum(event.waits for event in events) == 3


def test_the_lane_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls: wait for the step's stream, work, keep the memory, copy, record."""
    calls: list[str] = []

    class Stream:
        def wait_stream(self, other: str) -> None:
            calls.append(f"wait for {other}")

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        calls.append("enter")
        yield
        calls.append("leave")

    class Event(Late):
        def record(self, stream: Stream) -> None:
            calls.append("record")

    fake = SimpleNamespace(
        Stream=lambda device: Stream(),
        Event=Event,
        stream=within,
        current_stream=lambda device: "the step",
    )
    empty = torch.empty

    def pinned(*shape: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        if pin_memory:
            calls.append("pinned")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(torch, "empty", pinned)

    class Given:
        def record_stream(self, stream: Stream) -> None:
            calls.append("kept")

    lane = _lane.Lane(torch.device("cuda", 0))
    with lane.beside([Given()]):  # type: ignore[list-item]
        calls.append("work")
        parcel = lane.send({"x": torch.arange(3.0)})
    assert calls == ["wait for the step", "enter", "work", "pinned", "record", "leave", "kept"]
    assert not parcel.arrived()
    assert parcel.arrived(wait=True)
    assert torch.equal(parcel.open()["x"], torch.arange(3.0))


def test_a_sink_that_fails_does_not_end_the_training() -> None:
    learner, guide = student(), teacher()
    told = []

    def full(step: int, values: Any, pictures: Any) -> None:
        raise OSError(28, "No space left on device")

    monitor = ExplanationMonitor(
        learner, guide, "body", every=1, sink=[full, lambda s, v, p: told.append(s)], pool=BATCH
    )
    with pytest.warns(UserWarning, match=r"step 0 was not written: OSError: .*No space left"):
        train(learner, guide, monitor, batches(2))
    with pytest.warns(UserWarning, match="step 1 was not written"):
        monitor.close()
    assert told == [0, 1]
    assert len(monitor.history) == 2


def test_a_long_history_keeps_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_log, "MOST_RECORDS", 8)
    log = _log.Log([])
    for step in range(20):
        values = {"agreement": float(step)} | ({"fss": 1.0} if step % 4 == 3 else {})
        log.expect(step, _lane.Parcel({}, None), lambda d, t, v=values: _all(d, v))
    log.deliver(None)
    assert len(log.history) <= 9
    assert log.history[-1].step == 19
    assert sum("fss" in record.values for record in log.history) >= 4
    assert log.history[0].values["agreement"] < log.history[-1].values["agreement"]


def _all(draft: _log.Draft, values: dict[str, float]) -> None:
    for name, value in values.items():
        draft.add(name, value, 1)


# --- Checkpoints


def test_resuming_gives_the_records_of_a_training_that_never_stopped() -> None:
    given = batches(9)
    probe = given[0][0][:5]

    def made() -> tuple[Net, Net, ExplanationMonitor]:
        learner, guide = student(), teacher()
        return (
            learner,
            guide,
            ExplanationMonitor(
                learner,
                guide,
                "body",
                base=base(),
                every=2,
                pool=3 * BATCH,
                probe=probe,
                probe_every=4,
            ),
        )

    torch.manual_seed(0)
    learner, guide, whole = made()
    torch.manual_seed(1)
    train(learner, guide, whole, given)
    whole.close()

    learner, guide, before = made()
    torch.manual_seed(1)
    optimizer = train(learner, guide, before, given[:4])
    buffer = io.BytesIO()
    torch.save(
        [learner.state_dict(), optimizer.state_dict(), before.state_dict(), torch.get_rng_state()],
        buffer,
    )
    train(learner, guide, before, given[4:])  # lost

    learner, guide, after = made()
    buffer.seek(0)
    weights, moments, watched, random = torch.load(buffer, weights_only=True)
    learner.load_state_dict(weights)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(moments)
    after.load_state_dict(watched)
    torch.set_rng_state(random)
    train(learner, guide, after, given[4:], optimizer=optimizer)
    after.close()
    assert after.history == whole.history
    assert any("body/rs_distilled" in record.values for record in after.history)
    assert same(after.frames, whole.frames)
    assert after.count == whole.count == 9


def test_another_monitors_state_is_refused() -> None:
    state = ExplanationMonitor(student(), teacher(), "body").state_dict()
    with pytest.raises(ValueError, match=r"resume: this monitor .* pool was 256, now 64"):
        ExplanationMonitor(student(), teacher(), "body", pool=64).load_state_dict(state)
    with pytest.raises(ValueError, match="probe: expected one as in the monitor whose state"):
        ExplanationMonitor(
            student(), teacher(), "body", probe=torch.rand(2, 1, SIDE, SIDE)
        ).load_state_dict(state)


# --- Pictures


def test_what_is_no_state_is_refused() -> None:
    monitor = ExplanationMonitor(student(), teacher(), "body")
    for wrong in ({}, [], None):
        with pytest.raises(ValueError, match="state: expected what state_dict"):
            monitor.load_state_dict(wrong)  # type: ignore[arg-type]


def test_frames_are_the_maps_of_the_explainers() -> None:
    learner, guide, without = student(), teacher(), base()
    given = batches(3)
    images, labels = torch.rand(6, 1, SIDE, SIDE), torch.arange(6) % CLASSES
    told: list[dict[str, Tensor]] = []
    monitor = ExplanationMonitor(
        learner, guide, {"last": ("body", "body")}, base=without, every=2, pool=BATCH,
        probe=(images, labels), probe_every=2,
        sink=lambda step, values, pictures: told.append(pictures or {}),
    )  # fmt: skip
    train(learner, guide, monitor, given)
    monitor.close()
    assert [frame.step for frame in monitor.frames] == [0, 2]

    def gradcam(model: nn.Module) -> Tensor:
        return fastxkd.GradCAM(model, "body")(images, labels, size=None)

    frame = monitor.frames[-1]
    torch.testing.assert_close(frame.maps["last/student"], gradcam(learner))
    torch.testing.assert_close(monitor.probe.fixed["last/teacher"], gradcam(guide))
    torch.testing.assert_close(monitor.probe.fixed["last/base"], gradcam(without))
    unicam = fastxkd.UniCAM(learner, without, "body")(images, labels, size=None)
    torch.testing.assert_close(frame.maps["last/distilled"], unicam.distilled, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(frame.maps["last/residual"], unicam.residual, atol=1e-4, rtol=1e-4)
    moving = {"last/student", "last/distilled", "last/residual"}
    assert [set(pictures) for pictures in told] == [moving | {"last/teacher", "last/base"}, moving]
    for picture in told[0].values():
        assert picture.shape == (3, SIDE, 6 * SIDE)
        assert picture.dtype == torch.uint8


def test_without_labels_the_probe_explains_the_teachers_classes() -> None:
    learner, guide = student(), teacher()
    images = torch.rand(3, 1, SIDE, SIDE)
    monitor = ExplanationMonitor(
        learner, guide, "body", probe=images, probe_every=1, metrics="agreement"
    )
    train(learner, guide, monitor, batches(2))
    monitor.close()
    wanted = guidance(guide, images).argmax(1)
    found = monitor.frames[-1].maps["body/student"]
    torch.testing.assert_close(found, fastxkd.GradCAM(learner, "body")(images, wanted, size=None))
    assert monitor.frames[-1].maps.keys() == {"body/student"}  # no base, no UniCAM


def test_frames_stay_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastxkd.train.monitor.MOST_FRAMES", 4)
    learner, guide = student(), teacher()
    monitor = ExplanationMonitor(
        learner, guide, "body", probe=torch.rand(1, 1, SIDE, SIDE), probe_every=1
    )
    train(learner, guide, monitor, batches(9))
    monitor.close()
    steps = [frame.step for frame in monitor.frames]
    assert len(steps) <= 4
    assert steps[0] == 0
    assert steps[-1] == 8


@pytest.mark.parametrize("kind", ["unit", "normalised", "unknown", "five channels"])
def test_pictures_of_any_probe(kind: str) -> None:
    channels = 5 if kind == "five channels" else 3
    unit = torch.rand(4, channels, 8, 8)
    images = {"normalised": (unit - 0.45) / 0.22, "unknown": 30 * unit - 15}.get(kind, unit)
    given = {"mean": (0.45,) * 3, "std": [0.22]} if kind == "normalised" else {}

    def model() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        )

    monitor = ExplanationMonitor(model(), model(), {"c": ("0", "0")}, probe=images, **given)
    picture = monitor.probe.picture
    assert picture.shape == (4, 8, 8, 3)
    if kind in ("unit", "normalised"):
        assert abs(picture.transpose(0, 3, 1, 2) - 255 * unit.numpy()).max() <= 0.51
    elif kind == "unknown":
        assert (picture.min(), picture.max()) == (0, 255)
    else:
        assert (picture[..., 0] == picture[..., 2]).all()


# --- The page


def test_the_page(tmp_path: Path) -> None:
    needs("jinja2")
    learner, guide, without = student(), teacher(), base()
    monitor = ExplanationMonitor(
        learner, guide, {"<b>last": ("body", "body")}, base=without, every=1, pool=BATCH,
        probe=(torch.rand(5, 1, SIDE, SIDE), torch.arange(5) % CLASSES), probe_every=2,
    )  # fmt: skip
    train(learner, guide, monitor, batches(5))
    path = monitor.report(tmp_path / "deep" / "film.html")
    assert [p.name for p in path.parent.iterdir()] == ["film.html"]
    page = path.read_text("utf-8")
    assert page == monitor.report(tmp_path / "again.html").read_text("utf-8")
    assert page.count("<svg") == 4  # agreement, FSS, RS, gained and left behind
    assert "<b>last" not in page
    assert "&lt;b&gt;last" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)
    for step in ("step 0", "step 2", "step 4"):
        assert step in page
    assert page.count('class="heat"') == 5 * (3 * 3 + 2)
    for record in monitor.history:
        assert f"{record.values['<b>last/agreement']:.4f}" in page


def test_the_page_of_a_monitor_that_saw_nothing(tmp_path: Path) -> None:
    needs("jinja2")
    monitor = ExplanationMonitor(student(), teacher(), "body")
    page = monitor.report(tmp_path / "film.html").read_text("utf-8")
    assert "Nothing was measured yet." in page
    assert "No images were set aside" in page
    with pytest.raises(ValueError, match=r"path: expected a file such as .*, got the folder"):
        monitor.report(tmp_path)


def test_the_page_of_a_training_that_diverged(tmp_path: Path) -> None:
    needs("jinja2")
    learner, guide = student(), teacher()
    probe = torch.rand(4, 1, SIDE, SIDE)
    monitor = ExplanationMonitor(learner, guide, "body", every=1, pool=BATCH, probe=probe,
                                 probe_every=1)  # fmt: skip
    train(learner, guide, monitor, batches(1))
    with torch.no_grad():
        learner.head.weight.fill_(float("nan"))
    train(learner, guide, monitor, batches(2))
    page = monitor.report(tmp_path / "film.html").read_text("utf-8")
    assert "no map: its values are not finite" in page


def test_long_histories_are_drawn_as_means() -> None:
    from fastxkd.train.film import grouped

    records = [Record(i, {"a": float(i)}) for i in range(1000)]
    drawn = grouped(records, 120)
    assert len(drawn) <= 120
    assert drawn[0] == Record(8, {"a": 4.0})
    assert drawn[-1].step == 999
    assert grouped([], 120) == []


# --- The benchmark


def test_the_benchmark_times_the_same_training() -> None:
    needs("torchvision")
    from benchmarks import monitor as benchmark

    case = benchmark.case(4, 64, 2, {"ours": {"every": 1, "pool": 4}})
    for call in case.variants.values():
        call()
    watched = case.variants["ours"].func.__self__.monitor  # type: ignore[attr-defined]
    watched.flush()
    assert [record.step for record in watched.history] == [0, 1]
    measures = ("agreement", "fss_teacher", "rs_student", "rs_teacher")
    assert watched.history[0].values.keys() == {f"layer4/{name}" for name in measures}
    # Of a ResNet-18 by a ResNet-34, too.
    same, turns = case.notes()["ours"].split("; ")
    assert same == "weights after 3 steps: bit-identical to the floor's"
    assert re.fullmatch(r"4 steps in turn: \d+\.\d{3}x", turns)


# --- The manual


def test_the_manuals_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("jinja2")
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "monitor.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    scope: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in blocks:
            exec(compile(block, "docs/monitor.md", "exec"), scope)
    lines = [json.loads(line) for line in Path("explained.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert Path("film.html").exists()
