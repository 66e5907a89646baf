"""The monitor in trainings of every kind: none of them notices it, and it sees the same in all."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastxkd.train.monitor import ExplanationMonitor
from tests.monitored import (
    BATCHES,
    LAYERS,
    OPTIONS,
    Images,
    distil,
    optimizer_of,
    plain,
    processes,
    records,
    same_weights,
    student,
    teacher,
    twins,
    untouched,
)

EVERY = {**OPTIONS, "every": 1}


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


def both(**options: Any) -> tuple[nn.Module, list[tuple[int, dict[str, float]]]]:
    """Train with and without, compare all that is left; the student and what was measured."""
    outcomes = []
    guide = teacher()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    for monitored in (True, False):
        learner = options.pop("learner", None) or student(dropout=0.2)
        torch.manual_seed(3)
        monitor = plain(
            learner,
            guide,
            Images().batches(),
            monitored=monitored,
            **{k: v() if k == "scaler" else v for k, v in options.items()},
        )
        outcomes.append((learner, monitor, torch.get_rng_state()))
        assert untouched(learner, guide)
    (learner, monitor, drawn), (alone, _, drawn_alone) = outcomes
    assert same_weights(learner, alone)
    assert torch.equal(drawn, drawn_alone)
    assert all(torch.equal(before[name], value) for name, value in guide.state_dict().items())
    assert all(p.grad is None for p in guide.parameters())
    return learner, records(monitor)


# --- Numbers of less precision


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype: torch.dtype, scaled: bool) -> None:
    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**10)

    more = {"scaler": scaler} if scaled else {}
    _, mixed = both(autocast=dtype, options=EVERY, **more)
    _, full = both(options=EVERY)
    assert [step for step, _ in mixed] == [step for step, _ in full] == list(range(BATCHES))
    # The first step, whose weights are the same, differs by the roundings of the dtype.
    assert mixed[0][1] != full[0][1]
    assert mixed[0][1] == pytest.approx(full[0][1], abs=0.05)


# --- Gradient accumulation


def test_accumulated_batches_are_one_record() -> None:
    _, found = both(accumulate=2, options=EVERY)
    assert [step for step, _ in found] == list(range(BATCHES // 2))


def test_accumulated_batches_are_one_large_batch() -> None:
    """Without batch norm, whose statistics are those of the parts."""
    runs = []
    for accumulate in (1, 2):
        batches = Images().batches()
        if accumulate == 1:
            batches = [
                (torch.cat([a, b]), torch.cat([c, d]))
                for (a, c), (b, d) in zip(batches[::2], batches[1::2], strict=True)
            ]
        learner = student(norm=False)
        monitor = plain(
            learner, teacher(), batches, accumulate=accumulate, options={"every": 1, "pool": 16}
        )
        runs.append(records(monitor))
    whole, parts = runs
    assert len(whole) == len(parts) == BATCHES // 2
    for (step, values), (same_step, others) in zip(whole, parts, strict=True):
        assert step == same_step
        assert {"last/agreement", "last/fss_teacher", "last/rs_student"} <= values.keys()
        assert others == pytest.approx(values, abs=1e-5)


# --- torch.compile


@pytest.mark.parametrize("how", ["wrapped", "in place"])
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_compiled(who: str, how: str) -> None:
    """By a backend that computes as eager torch does, so that bits can be compared."""

    def compiled(model: nn.Module) -> nn.Module:
        if how == "wrapped":
            return torch.compile(model, backend="aot_eager")
        model.compile(backend="aot_eager")
        return model

    torch.compiler.reset()
    runs = []
    for monitored in (True, False):
        learner, guide = student(), teacher()
        run = (
            compiled(learner) if who != "teacher" else learner,
            compiled(guide) if who != "student" else guide,
        )
        monitor = plain(*run, Images().batches(), monitored=monitored)
        runs.append((learner, monitor))
        assert untouched(learner, guide)
    assert same_weights(runs[0][0], runs[1][0])
    eager = plain(student(), teacher(), Images().batches())
    assert records(runs[0][1]) == records(eager)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor uses torch.jit
def test_compiled_by_inductor() -> None:
    """Measured steps run eagerly, so that layers can be seen: equal but for their rounding."""
    runs = []
    for monitored in (True, False):
        torch.compiler.reset()
        learner = student()
        monitor = plain(torch.compile(learner), teacher(), Images().batches(), monitored=monitored)
        runs.append((learner, monitor))
    torch.compiler.reset()
    (learner, monitor), (alone, _) = runs
    for mine, other in zip(learner.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    eager = records(plain(student(), teacher(), Images().batches()))
    for (step, values), (same_step, others) in zip(records(monitor), eager, strict=True):
        assert step == same_step
        assert values == pytest.approx(others, abs=1e-4)


# --- Checkpoints


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resumed(stop: int) -> None:
    """In the middle of a pool, and of what is on its way to the sink."""
    batches = Images().batches()
    options = {"every": 1, "pool": 24}

    def train(
        learner: nn.Module, monitor: ExplanationMonitor, optimizer: Any, first: int, last: int
    ) -> None:
        guide = monitored_teacher
        for step in range(first, last):
            images, labels = batches[step]
            with monitor.step(labels, step=step):
                loss = distil(learner, guide, images, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    monitored_teacher = teacher()
    learner = student()
    monitor = ExplanationMonitor(learner, monitored_teacher, LAYERS, **options)
    train(learner, monitor, optimizer_of(learner), 0, BATCHES)
    monitor.close()

    first = student()
    optimizer = optimizer_of(first)
    stopped = ExplanationMonitor(first, monitored_teacher, LAYERS, **options)
    train(first, stopped, optimizer, 0, stop)
    kept = io.BytesIO()
    content = [first.state_dict(), optimizer.state_dict(), stopped.state_dict()]
    torch.save(content, kept)
    stopped.abandon_step()

    second = student()
    optimizer = optimizer_of(second)
    resumed = ExplanationMonitor(second, monitored_teacher, LAYERS, **options)
    weights, momentum, state = torch.load(io.BytesIO(kept.getvalue()), weights_only=True)
    second.load_state_dict(weights)
    optimizer.load_state_dict(momentum)
    resumed.load_state_dict(state)
    train(second, resumed, optimizer, stop, BATCHES)
    resumed.close()
    assert same_weights(second, learner)
    assert records(resumed) == records(monitor)
    assert any("last/fss_teacher" in values for _, values in records(monitor))


# --- Several processes


def rank(folder: str) -> None:
    """One of two; each with a monitor or none, and rank 0 with a training of twins beside it."""
    own = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    shares = [Images().batches()[r::2] for r in range(2)]
    found: dict[str, Any] = {}
    for name, options in {
        "one": EVERY,
        "all": {**EVERY, "rank": None},
        "wrapper": EVERY,
        "alone": None,
    }.items():
        learner, guide = student(), teacher()
        parallel = nn.parallel.DistributedDataParallel(learner)
        watched = parallel if name == "wrapper" else learner
        monitor = options and ExplanationMonitor(watched, guide, LAYERS, **options)
        optimizer = optimizer_of(learner)
        for step, (images, labels) in enumerate(shares[own]):
            if monitor:
                monitor.begin_step(step, labels)
            loss = distil(parallel, guide, images, labels)
            if monitor:
                monitor.end_step()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if monitor:
            monitor.close()
            found[name] = records(monitor)
        found[f"{name} weights"] = learner.state_dict()
    for first in range(2):
        learner = student()
        order = [*shares[first:], *shares[:first]]
        monitor = twins(learner, teacher(), order, options={**EVERY, "rank": None})
        found[f"twin {first}"] = records(monitor)
        found[f"twin {first} weights"] = learner.state_dict()
    torch.save(found, f"{folder}/{own}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")
    folder: Path = tmp_path_factory.mktemp("ranks")
    yield processes("tests.test_monitor_modes:rank", folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["one", "all", "wrapper"])
def test_data_parallel_weights(ranks: list[dict[str, Any]], name: str) -> None:
    for own, found in enumerate(ranks):
        for kind in ("alone", f"twin {own}"):
            expected = found[f"{kind} weights"]
            weights = found[f"{name} weights"]
            assert list(weights) == list(expected)
            for key, value in weights.items():
                # DistributedDataParallel gives everybody rank 0's statistics.
                if own == 0 or kind == "alone" or "running" not in key:
                    assert torch.equal(value, expected[key]), (own, kind, key)


def test_data_parallel_values(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert [step for step, _ in first["twin 0"]] == list(range(BATCHES // 2))
    assert first["one"] == first["wrapper"] == first["all"] == first["twin 0"]
    assert second["one"] == second["wrapper"] == []
    assert second["all"] == second["twin 1"]
