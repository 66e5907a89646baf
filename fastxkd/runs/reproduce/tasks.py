"""Pieces of work with a result that lasts: a model that is trained, numbers that are measured."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastxkd.runs.reproduce.ledger import Ledger
from fastxkd.runs.reproduce.watch import Watch
from fastxkd.train.distiller import Distiller, fingerprint

# Steps that are timed before a plan is shown; the quickest counts, as the first ones warm up.
_PROBED = 4


@dataclass(frozen=True)
class Context:
    """Where a piece of work is done.

    In a rehearsal, to time a few steps, nothing of it lasts: what takes long to make, such as
    pictures or maps, may be replaced by anything of the same shape.
    """

    device: torch.device
    watch: Watch
    ledger: Ledger
    checkpoint: Path | None = None
    rehearsal: bool = False


@dataclass(frozen=True)
class Training:
    """A model to be trained.

    Attributes:
        key: ``study/seed/name``, also where its file lies.
        kind: ``study/name``: what takes as long for any seed.
        facts: plain values that decide the weights.
        needs: keys of the models it learns from.
        build: the model before training; the same weights whenever it is called.
        prepare: (model, the models needed, context) -> what trains it in place.
    """

    key: str
    kind: str
    facts: Mapping[str, Any]
    needs: Sequence[str]
    build: Callable[[], nn.Module]
    prepare: Callable[[nn.Module, Sequence[nn.Module], Context], Distiller]


@dataclass(frozen=True)
class Measurement:
    """Numbers to be taken of trained models; ``guess`` is about how many seconds that takes."""

    key: str
    kind: str
    facts: Mapping[str, Any]
    needs: Sequence[str]
    measure: Callable[[Sequence[nn.Module], Context], Mapping[str, float]]
    guess: float = 5.0


Task = Training | Measurement


def work_through(tasks: Sequence[Task], context: Context) -> dict[str, dict[str, float]]:
    """Do what is not done yet, in order; returns the measurements by key."""
    trainings = {task.key: task for task in tasks if isinstance(task, Training)}
    ledger, watch = context.ledger, context.watch
    pending = _pending(tasks, ledger)
    watch.plan(tasks, pending, costs(pending, trainings, context))
    while pending:
        task = pending[0]
        watch.begin(task.key, task.kind)
        watch.end(_do(task, trainings, context)["seconds"])
        # What is left depends on the weights that came out.
        pending = _pending(tasks, ledger)
    for key in trainings:
        # A kill may have come between a model's line and this.
        ledger.forget(key)
    entries = {task.key: ledger.last(task.key) for task in tasks}
    return {
        key: {name: math.nan if v is None else v for name, v in entry["values"].items()}
        for key, entry in entries.items()
        if entry is not None and "values" in entry
    }


def _pending(tasks: Sequence[Task], ledger: Ledger) -> list[Task]:
    """What is to be done, or may be, if it is made from what is not known yet."""
    last = {task.key: entry for task in tasks if (entry := ledger.last(task.key)) is not None}
    found: list[Task] = []
    needed: set[str] = set()
    for task in reversed(tasks):
        if any(key not in last for key in task.needs):
            found.append(task)
        # Weights that somebody took away are missed once something is to be made from them.
        elif not ledger.known(task.key, _facts(task, last)) or (
            task.key in needed and not ledger.model_file(task.key).exists()
        ):
            found.append(task)
            needed.update(task.needs)
    return found[::-1]


def _do(task: Task, trainings: Mapping[str, Training], context: Context) -> dict[str, Any]:
    ledger = context.ledger
    made = {key: entry for key in task.needs if (entry := ledger.last(key)) is not None}
    facts = _facts(task, made)
    models = [_loaded(trainings[key], context) for key in task.needs]
    if isinstance(task, Training):
        return _train(task, facts, models, context)
    began = time.monotonic()
    values = {
        name: float(value) if math.isfinite(value) else None
        for name, value in task.measure(models, context).items()
    }
    return ledger.record(task.key, task.kind, facts, time.monotonic() - began, values=values)


def _train(
    task: Training, facts: Mapping[str, Any], models: Sequence[nn.Module], context: Context
) -> dict[str, Any]:
    ledger = context.ledger
    checkpoint = ledger.checkpoint(task.key)
    here = Context(context.device, context.watch, ledger, checkpoint)
    model = task.build()
    began = time.monotonic()
    history = task.prepare(model, models, here).fit()
    stamp = ledger.save(task.key, model)
    entry = ledger.record(
        task.key,
        task.kind,
        facts,
        # What this start took, or all starts together.
        max(time.monotonic() - began, math.fsum(record["seconds"] for record in history)),
        fingerprint=fingerprint(model.state_dict()),
        file=stamp,
        loss=history[-1]["loss"],
    )
    ledger.forget(task.key)
    return entry


def _facts(task: Task, done: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What decides a result: also the very weights of the models it is made from."""
    models = {key: done[key]["fingerprint"] for key in task.needs}
    return {"kind": task.kind, **task.facts, "models": models}


def _loaded(training: Training, context: Context) -> nn.Module:
    return context.ledger.load(training.key, training.build()).to(context.device)


def costs(
    pending: Sequence[Task], trainings: Mapping[str, Training], context: Context
) -> dict[str, float]:
    """Seconds by kind: as long as the last ones took, else from a few timed steps."""
    found = {
        kind: math.fsum(past) / len(past) for kind, past in context.ledger.seconds().items() if past
    }
    for task in pending:
        if task.kind in found:
            continue
        if isinstance(task, Measurement):
            found[task.kind] = task.guess
            continue
        # Teachers that are not trained yet take as long to ask as those that are.
        teachers = [trainings[key].build().to(context.device).eval() for key in task.needs]
        quiet = Context(context.device, Watch.silent(), context.ledger, rehearsal=True)
        found[task.kind] = probe(task.prepare(task.build(), teachers, quiet))
    return found


def probe(distiller: Distiller) -> float:
    """Seconds the whole training will take, from a few of its steps; what is trained is lost."""
    distiller.student.train()
    if distiller.teacher is not None:
        distiller.teacher.eval()
    clock = [time.monotonic()]
    with torch.random.fork_rng(devices=[]):
        for batch in distiller.batches.iterate(0, min(_PROBED, distiller.steps)):
            distiller._advance(*batch)
            clock.append(time.monotonic())
    return distiller.steps * min(after - before for before, after in itertools.pairwise(clock))
