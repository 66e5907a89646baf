"""From a plan to a folder: train teacher, base and student, compare them, write the report."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastxkd._extras import require
from fastxkd.runs.answers import accuracy
from fastxkd.runs.comparison import FEATURE_LIMIT, Comparison, check_sizes, compare_models
from fastxkd.runs.data import ImageData, TrainBatches, load_data
from fastxkd.runs.layers import choose_layers
from fastxkd.runs.models import load_model
from fastxkd.runs.progress import BarProgress, LineProgress
from fastxkd.runs.store import (
    checkpoint_file,
    claim_folder,
    refuse_strangers,
    run_facts,
    save_weights,
    write_results,
)
from fastxkd.train.distiller import Distiller, TrainSettings, fingerprint


@dataclass
class DistillPlan:
    """What ``fastxkd distill`` was asked for; see its options."""

    teacher: str
    student: str
    data: str
    out: Path
    settings: TrainSettings = field(default_factory=TrainSettings)
    teacher_weights: Path | None = None
    student_weights: Path | None = None
    teacher_epochs: int | None = None
    teacher_lr: float | None = None
    layers: Sequence[str] | None = None
    teacher_layers: Sequence[str] | None = None
    image_size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    held_out: float = 0.2
    augment: bool = True
    device: str = "auto"
    workers: int = 0
    resume: bool = True
    checkpoint_seconds: float = 30.0
    max_samples: int = 1000
    gallery: int = 12
    explained: int = 128
    feature_limit: int = FEATURE_LIMIT
    title: str = ""

    def teacher_settings(self) -> TrainSettings:
        own: dict[str, Any] = {"epochs": self.teacher_epochs, "lr": self.teacher_lr}
        return dataclasses.replace(
            self.settings, **{name: value for name, value in own.items() if value is not None}
        )


@dataclass
class ComparePlan:
    """What ``fastxkd compare`` was asked for; see its options."""

    teacher: str
    student: str
    data: str
    out: Path
    teacher_weights: Path | None = None
    student_weights: Path | None = None
    base: str | None = None
    base_weights: Path | None = None
    layers: Sequence[str] | None = None
    base_layers: Sequence[str] | None = None
    teacher_layers: Sequence[str] | None = None
    num_classes: int | None = None
    class_names: Path | None = None
    image_size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    held_out: float = 0.0
    seed: int = 0
    batch_size: int = 64
    device: str = "auto"
    max_samples: int = 1000
    gallery: int = 12
    explained: int = 128
    feature_limit: int = FEATURE_LIMIT


def pick_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device, else the CPU.

    Raises:
        ValueError: a device this machine or this torch does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device: {name!r} cannot be used here ({reason})") from error
    return device


def check_before_work(plan: DistillPlan | ComparePlan) -> None:
    """What would otherwise fail only after the training: packages and sizes of the comparison."""
    for module in ("safetensors", "PIL", "jinja2", "matplotlib"):
        require(module, extra="cli")
    check_sizes(plan.gallery, plan.max_samples, plan.explained, plan.feature_limit)
    if isinstance(plan, DistillPlan):
        plan.teacher_settings()
        if plan.workers < 0:
            raise ValueError(f"workers: expected 0 or more, got {plan.workers}")


def run_distill(plan: DistillPlan, progress: LineProgress | BarProgress) -> Comparison:
    """Carry out a plan; finished stages of an earlier, interrupted run are not repeated.

    Raises:
        ValueError: an option that does not fit, or a folder that holds something else.
    """
    began = time.monotonic()
    check_before_work(plan)
    device = pick_device(plan.device)
    # Nothing else makes a resumed run on a GPU end with the same bits.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    data = load_data(
        plan.data,
        image_size=plan.image_size,
        mean=plan.mean,
        std=plan.std,
        held_out=plan.held_out,
        seed=plan.settings.seed,
    )
    if data.train is None:
        raise ValueError("held_out: expected a share above 0, to have images to train on")
    models, specs = _models(plan, data)
    example = _example(data)
    for role, model in models.items():
        _check_outputs(role, model, example, data)
    choose_layers(
        models, example, student=plan.layers, base=plan.layers, teacher=plan.teacher_layers
    )
    claim_folder(plan.out, _plan_settings(plan, data), resume=plan.resume)

    history: dict[str, list[dict[str, Any]]] = {}
    elapsed: dict[str, float] = {}
    for role in ("teacher", "base", "student"):
        if role == "teacher" and plan.teacher_weights is not None:
            models[role].to(device).eval()
            continue
        distiller = _stage(plan, role, models, data, specs, device, progress)
        history[role] = distiller.fit(resume=plan.resume)
        elapsed[f"train {role}"] = sum(record["seconds"] for record in history[role])
    save_weights(models, plan.out)

    started = time.monotonic()
    comparison = compare_models(
        models,
        data,
        specs=specs,
        title=plan.title or f"{plan.teacher} teaches {plan.student} on {plan.data}",
        layers=plan.layers,
        base_layers=plan.layers,
        teacher_layers=plan.teacher_layers,
        device=device,
        max_samples=plan.max_samples,
        gallery=plan.gallery,
        explained=plan.explained,
        feature_limit=plan.feature_limit,
        history=history,
        progress=progress.measure,
    )
    elapsed["compare"] = time.monotonic() - started
    elapsed["this run"] = time.monotonic() - began
    comparison.run = run_facts(data, device, plan.settings.seed, elapsed, comparison.run)
    comparison.run["settings"] = _plan_settings(plan, data)
    write_results(comparison, plan.out)
    return comparison


def run_compare(plan: ComparePlan, progress: LineProgress | BarProgress) -> Comparison:
    """Compare checkpoints that exist; without ``base`` the teacher serves as one.

    Raises:
        ValueError: an option that does not fit, or a folder that holds something else.
    """
    began = time.monotonic()
    check_before_work(plan)
    device = pick_device(plan.device)
    refuse_strangers(plan.out)
    data = load_data(
        plan.data,
        image_size=plan.image_size,
        mean=plan.mean,
        std=plan.std,
        held_out=plan.held_out,
        seed=plan.seed,
    )
    outputs = None
    if plan.class_names is not None:
        outputs = plan.class_names.read_text("utf-8").splitlines()
    count = plan.num_classes or len(data.classes)
    wanted = {
        "teacher": (plan.teacher, plan.teacher_weights),
        "base": (plan.base, plan.base_weights),
        "student": (plan.student, plan.student_weights),
    }
    models, specs = {}, {}
    for role, (spec, weights) in wanted.items():
        if spec is None:
            continue
        models[role] = load_model(
            spec, num_classes=count, in_channels=data.channels, weights=weights
        )
        specs[role] = spec
    if plan.base is None:
        if plan.base_weights is not None:
            raise ValueError("base_weights: given without base")
        models["base"] = models["teacher"]
        specs["base"] = "the teacher itself"
    started = time.monotonic()
    comparison = compare_models(
        models,
        data,
        specs=specs,
        title=f"{plan.teacher} and {plan.student} on {plan.data}",
        layers=plan.layers,
        base_layers=plan.base_layers,
        teacher_layers=plan.teacher_layers,
        device=device,
        batch_size=plan.batch_size,
        max_samples=plan.max_samples,
        gallery=plan.gallery,
        explained=plan.explained,
        feature_limit=plan.feature_limit,
        outputs=outputs,
        progress=progress.measure,
    )
    elapsed = {"compare": time.monotonic() - started, "this run": time.monotonic() - began}
    comparison.run = run_facts(data, device, plan.seed, elapsed, comparison.run)
    if plan.base is None:
        comparison.run["base"] = (
            "No base was given, so the teacher serves as base. Distilled is then what the student "
            "has and the teacher has not; it says what guidance changed only if teacher and "
            "student share their architecture."
        )
    write_results(comparison, plan.out)
    return comparison


def _models(plan: DistillPlan, data: ImageData) -> tuple[dict[str, nn.Module], dict[str, str]]:
    shape = {"num_classes": len(data.classes), "in_channels": data.channels}
    # Each model's first weights depend on the seed alone, not on what was built before it.
    torch.manual_seed(plan.settings.seed)
    teacher = load_model(plan.teacher, weights=plan.teacher_weights, **shape)
    torch.manual_seed(plan.settings.seed)
    student = load_model(plan.student, weights=plan.student_weights, **shape)
    models = {"teacher": teacher, "base": copy.deepcopy(student), "student": student}
    return models, {"teacher": plan.teacher, "base": plan.student, "student": plan.student}


def _example(data: ImageData) -> torch.Tensor:
    assert data.train is not None
    found = next(data.batches(data.train, 2), None)
    if found is None:
        raise ValueError(f"data: none of the first training images of {data.spec!r} can be read")
    return data.normalize(found.images)


def _check_outputs(role: str, model: nn.Module, example: torch.Tensor, data: ImageData) -> None:
    model.eval()
    with torch.no_grad():
        output = model(example)
    if not isinstance(output, torch.Tensor) or output.shape != (len(example), len(data.classes)):
        got = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ValueError(
            f"{role}: expected logits [{len(example)}, {len(data.classes)}] for {len(example)} "
            f"images and the {len(data.classes)} classes of the data, got {got}"
        )


def _stage(
    plan: DistillPlan,
    role: str,
    models: dict[str, nn.Module],
    data: ImageData,
    specs: dict[str, str],
    device: torch.device,
    progress: LineProgress | BarProgress,
) -> Distiller:
    settings = plan.teacher_settings() if role == "teacher" else plan.settings
    batches = TrainBatches(
        data,
        batch_size=settings.batch_size,
        seed=settings.seed,
        augmented=plan.augment,
        workers=plan.workers,
        device=device,
    )
    assert data.test is not None
    return Distiller(
        models[role],
        batches,
        settings,
        teacher=models["teacher"] if role == "student" else None,
        evaluate=lambda model: accuracy(model, data, data.test, 256, device),
        device=device,
        checkpoint=checkpoint_file(plan.out, role),
        checkpoint_seconds=plan.checkpoint_seconds,
        identity={
            **data.settings(),
            "augment": plan.augment,
            "model": specs[role],
            "initial_weights": fingerprint(models[role].state_dict()),
        },
        stage=role,
        progress=progress,
    )


def _plan_settings(plan: DistillPlan, data: ImageData) -> dict[str, Any]:
    """Everything that decides the trained weights, under the names of the options."""
    return {
        "teacher": plan.teacher,
        "teacher_weights": None if plan.teacher_weights is None else str(plan.teacher_weights),
        "student": plan.student,
        "student_weights": None if plan.student_weights is None else str(plan.student_weights),
        **data.settings(),
        **dataclasses.asdict(plan.settings),
        "held_out": plan.held_out,
        "augment": plan.augment,
        "teacher_epochs": plan.teacher_epochs,
        "teacher_lr": plan.teacher_lr,
    }
