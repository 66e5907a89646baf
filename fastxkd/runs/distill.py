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
from fastxkd.runs.fidelity import measure_fidelity
from fastxkd.runs.layers import choose_layers, default_layers
from fastxkd.runs.models import check_normalisation, load_model
from fastxkd.runs.progress import BarProgress, LineProgress
from fastxkd.runs.store import (
    checkpoint_file,
    claim_folder,
    refuse_strangers,
    run_facts,
    save_weights,
    write_results,
)
from fastxkd.runs.xdistill import (
    ExplainedOptions,
    check_cam,
    check_method,
    check_options,
    explained_student,
    explained_trainer,
    recipe,
)
from fastxkd.train.distiller import Distiller, TrainSettings, fingerprint
from fastxkd.train.fusion import ExplainedStudent
from fastxkd.train.xdistillation import XDistiller


@dataclass
class DistillPlan:
    """What ``fastxkd distill`` was asked for; see its options.

    A teacher called ``self`` is of the student's architecture. ``method`` is one of
    :data:`fastxkd.runs.xdistill.METHODS`; all but ``kd`` take ``shown``.
    """

    teacher: str
    student: str
    data: str
    out: Path
    settings: TrainSettings = field(default_factory=TrainSettings)
    method: str = "kd"
    shown: ExplainedOptions | None = None
    generations: int = 1
    teacher_weights: Path | None = None
    student_weights: Path | None = None
    teacher_epochs: int | None = None
    teacher_lr: float | None = None
    teacher_label_smoothing: float | None = None
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
        own: dict[str, Any] = {
            "epochs": self.teacher_epochs,
            "lr": self.teacher_lr,
            "label_smoothing": self.teacher_label_smoothing,
        }
        return dataclasses.replace(
            self.settings, **{name: value for name, value in own.items() if value is not None}
        )

    @property
    def teacher_spec(self) -> str:
        return self.student if self.teacher == "self" else self.teacher

    @property
    def options(self) -> ExplainedOptions:
        return self.shown or ExplainedOptions()


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
        if plan.teacher_weights is not None and plan.teacher_label_smoothing is not None:
            raise ValueError(
                "teacher_label_smoothing: expected None with teacher_weights, which are not trained"
            )
        if plan.workers < 0:
            raise ValueError(f"workers: expected 0 or more, got {plan.workers}")
        check_method(plan.method)
        if plan.generations < 1:
            raise ValueError(f"generations: expected at least 1, got {plan.generations}")
        if plan.method == "kd":
            if plan.shown is not None:
                raise ValueError("shown: expected None with method='kd'")
            return
        check_options(plan.method, plan.options)
        if plan.generations > 1:
            raise ValueError(f"generations: expected 1 with method={plan.method!r}")


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
    named = _named_layers(plan, models)
    layers = choose_layers(models, example, **named)
    if plan.method == "xdistill":
        check_cam(models, plan.options, layers, example)
    everyone = dict(models)
    if plan.method != "kd" and plan.options.reference_kd:
        everyone["kd"] = copy.deepcopy(models["base"])
    claim_folder(plan.out, _plan_settings(plan, data), resume=plan.resume)
    history = _train(plan, everyone, data, specs, layers, device, progress)
    elapsed = {f"train {role}": _seconds(history[role]) for role in history}
    student = models["student"]
    built = {}
    if isinstance(student, ExplainedStudent):
        built["student"] = recipe(student, plan.student, data)
    save_weights(everyone, plan.out, built)

    started = time.monotonic()
    comparison = compare_models(
        models,
        data,
        specs=specs,
        title=plan.title or f"{plan.teacher_spec} teaches {plan.student} on {plan.data}",
        layers=named["student"],
        base_layers=named["base"],
        teacher_layers=named["teacher"],
        device=device,
        max_samples=plan.max_samples,
        gallery=plan.gallery,
        explained=plan.explained,
        feature_limit=plan.feature_limit,
        history=history,
        progress=progress.measure,
    )
    if isinstance(student, ExplainedStudent):
        comparison.fidelity = measure_fidelity(
            everyone,
            data,
            layers={role: names[-1] for role, names in layers.items()},
            method=plan.method,
            explainers=plan.options.explainers,
            join=plan.options.join,
            sign=plan.options.sign,
            matched=plan.options.match_weight > 0,
            device=device,
            images=plan.explained,
            gallery=plan.gallery,
            seed=plan.settings.seed,
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
        _check_normalisation(plan, role, models[role], data, spec, weights)
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
    teacher = load_model(plan.teacher_spec, weights=plan.teacher_weights, **shape)
    torch.manual_seed(plan.settings.seed)
    student = load_model(plan.student, weights=plan.student_weights, **shape)
    models = {"teacher": teacher, "base": copy.deepcopy(student), "student": student}
    specs = {"teacher": plan.teacher_spec, "base": plan.student, "student": plan.student}
    for role, weights in (("teacher", plan.teacher_weights), ("student", plan.student_weights)):
        _check_normalisation(plan, role, models[role], data, specs[role], weights)
    if plan.method != "kd":
        models["student"] = explained_student(
            student,
            plan.method,
            plan.options,
            channels=data.channels,
            layer=plan.layers[-1] if plan.layers else default_layers(student, _example(data))[-1],
            seed=plan.settings.seed,
        )
        specs["student"] = f"{plan.student}, {plan.method}"
    return models, specs


def _check_normalisation(
    plan: DistillPlan | ComparePlan,
    role: str,
    model: nn.Module,
    data: ImageData,
    spec: str,
    weights: Path | None,
) -> None:
    if plan.mean is None and plan.std is None:
        check_normalisation(role, spec, model, weights, data.mean, data.std)


def _named_layers(
    plan: DistillPlan, models: dict[str, nn.Module]
) -> dict[str, Sequence[str] | None]:
    """The layers that were named, role to names; an explained student has them one level down."""
    named: dict[str, Sequence[str] | None] = {
        "student": plan.layers,
        "base": plan.layers,
        "teacher": plan.teacher_layers,
    }
    if plan.layers is None or plan.method == "kd":
        return named
    named["student"] = [f"student.{name}" for name in plan.layers]
    alike = type(models["teacher"]) is type(models["base"])
    known = dict(models["teacher"].named_modules())
    if plan.teacher_layers is None and alike and all(name in known for name in plan.layers):
        named["teacher"] = plan.layers
    return named


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


def _train(
    plan: DistillPlan,
    models: dict[str, nn.Module],
    data: ImageData,
    specs: dict[str, str],
    layers: dict[str, list[str]],
    device: torch.device,
    progress: LineProgress | BarProgress,
) -> dict[str, list[dict[str, Any]]]:
    """Train all models, the student last; returns role to records of its epochs."""
    history: dict[str, list[dict[str, Any]]] = {}

    def train(role: str, model: nn.Module, guide: nn.Module | None = None) -> None:
        spec = specs.get(role, plan.student)
        distiller = _stage(plan, role, model, guide, data, spec, layers, device, progress)
        records = distiller.fit(resume=plan.resume)
        if isinstance(distiller, XDistiller) and distiller.phi_history:
            history["phi"] = distiller.phi_history
        history[role] = records

    guide = models["teacher"]
    if plan.teacher_weights is None:
        train("teacher", guide)
    guide.to(device).eval()
    train("base", models["base"])
    if "kd" in models:
        train("kd", models["kd"], guide)
    for generation in range(1, plan.generations):
        born = copy.deepcopy(models["student"])
        train(f"generation-{generation}", born, guide)
        guide = born
    train("student", models["student"], guide)
    return history


def _seconds(epochs: list[dict[str, Any]]) -> float:
    return sum(epoch["seconds"] for epoch in epochs)


def _stage(
    plan: DistillPlan,
    role: str,
    model: nn.Module,
    guide: nn.Module | None,
    data: ImageData,
    spec: str,
    layers: dict[str, list[str]],
    device: torch.device,
    progress: LineProgress | BarProgress,
) -> Distiller:
    settings = plan.teacher_settings() if role == "teacher" else plan.settings
    batch_options: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "augmented": plan.augment,
        "workers": plan.workers,
        "device": device,
    }
    assert data.test is not None
    common: dict[str, Any] = {
        "teacher": guide,
        "evaluate": lambda model: accuracy(model, data, data.test, 256, device),
        "device": device,
        "checkpoint": checkpoint_file(plan.out, role),
        "checkpoint_seconds": plan.checkpoint_seconds,
        "identity": {
            **data.settings(),
            "augment": plan.augment,
            "model": spec,
            "initial_weights": fingerprint(model.state_dict()),
        },
        "stage": role,
        "progress": progress,
    }
    if isinstance(model, ExplainedStudent):
        return explained_trainer(
            model,
            data,
            settings,
            plan.method,
            plan.options,
            layers=layers,
            folder=plan.options.explanations or plan.out / "explanations",
            batch_options=batch_options,
            measure=progress.measure,
            **common,
        )
    return Distiller(model, TrainBatches(data, **batch_options), settings, **common)


def _plan_settings(plan: DistillPlan, data: ImageData) -> dict[str, Any]:
    """Everything that decides the trained weights, under the names of the options."""
    settings = {
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
    # What came later is named only where it is used, so that earlier runs can be resumed.
    if plan.settings.label_smoothing == 0:
        del settings["label_smoothing"]
    if plan.teacher_label_smoothing is not None:
        settings["teacher_label_smoothing"] = plan.teacher_label_smoothing
    if plan.generations > 1:
        settings["generations"] = plan.generations
    if plan.method != "kd":
        settings |= {"method": plan.method, **plan.options.settings(plan.method)}
    return settings
