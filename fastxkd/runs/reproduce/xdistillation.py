"""XDistillation's claims (Alharbi, Vu and Thai 2021): whether explanations are inherited.

The teacher, the student without a teacher and the student of plain distillation are those of the
capacity experiment (fashion.py). Students of the method are shown the teacher's Grad-CAM maps by
way of an autoencoder: the whole method and two ablations; plain distillation is the third. The own
map of one more is held to the teacher's, which is no part of the paper.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastxkd import GradCAM
from fastxkd.metrics.agreement import cosine_agreement
from fastxkd.metrics.fidelity import explanation_fidelity, joined
from fastxkd.runs.answers import accuracy, balanced
from fastxkd.runs.data import ImageData, TrainBatches
from fastxkd.runs.explained_batches import ExplainedBatches, explanation_cache
from fastxkd.runs.explanation_cache import ExplanationCache
from fastxkd.runs.reproduce import fashion
from fastxkd.runs.reproduce.claims import Claim
from fastxkd.runs.reproduce.fashion import FashionModels, noticed
from fastxkd.runs.reproduce.tasks import Context, Measurement, Training
from fastxkd.runs.reproduce.training import STAGES
from fastxkd.runs.reproduce.xdistillation_claims import HELD, NAME, claims_of
from fastxkd.train.autoencoder import ExplanationAutoencoder
from fastxkd.train.distiller import Distiller, TrainSettings, fingerprint
from fastxkd.train.fusion import ExplainedStudent
from fastxkd.train.teacher_maps import TeacherExplanations
from fastxkd.train.xdistillation import PhiTrainer, XDistiller

TEACHER, SCRATCH, KD = "large", "small", "direct"
# How each student differs from the whole method.
STUDENTS: dict[str, dict[str, Any]] = {
    "xdistilled": {},
    "phi frozen": {"freeze_phi": True},
    "no first stage": {"phi_epochs": 0},
    HELD: {"match_weight": 1.0, "match_layer": f"student.{STAGES[-1]}"},
}
_BATCH = 100


@dataclass(frozen=True)
class Size:
    """How much is trained and measured; the paper says none of it, so all is an interpretation.

    Attributes:
        models: of teacher and students.
        phi_epochs: of the autoencoder's first stage.
        fusion: how the student is told, see :class:`fastxkd.train.fusion.ExplainedStudent`.
        explainers: of the teacher's maps that the autoencoder learns.
        samples: test images that explanations are compared on, balanced over the classes.
        steps: of the deletion and insertion curves.
    """

    models: fashion.Size = fashion.FULL
    phi_epochs: int = 3
    fusion: str = "concat"
    explainers: Sequence[str] = ("gradcam",)
    samples: int = 1000
    steps: int = 14


FULL = Size()
QUICK = Size(models=fashion.QUICK, phi_epochs=3, samples=300, steps=7)


class XDistillationStudy:
    """Trains and measures what the claims need, for any number of seeds."""

    name = NAME

    def __init__(self, data: ImageData, size: Size = FULL) -> None:
        self.size, self.models = size, FashionModels(data, size.models)
        self.data = self.models.data
        self.notice = noticed(self.data)

    def tasks(self, seed: int) -> list[Training | Measurement]:
        shared = self.models.trainings([SCRATCH, KD], seed)
        students = [self._training(name, seed) for name in STUDENTS]
        keys = [self.models.key(name, seed) for name in (TEACHER, SCRATCH, KD)]
        measurement = Measurement(
            key=f"{NAME}/{seed}/fidelity",
            kind=f"{NAME}/fidelity",
            facts={
                **self.data.settings(),
                "samples": self.size.samples,
                "steps": self.size.steps,
            },
            needs=[*keys, *(student.key for student in students)],
            measure=self._measure,
            guess=0.1 * self.size.samples,
        )
        return [*shared, self._phi(seed), *students, measurement]

    def _phi(self, seed: int) -> Training:
        """The first stage, which the students that have one share."""
        size = self.size
        settings = size.models.settings(seed, guided=True)
        facts = {
            **self.data.settings(),
            **{name: getattr(settings, name) for name in ("batch_size", "warmup", "seed")},
            "explainers": list(size.explainers),
            "phi_epochs": size.phi_epochs,
        }
        return Training(
            key=self._key("phi", seed),
            kind=f"{NAME}/phi",
            facts=facts,
            needs=[self.models.key(TEACHER, seed)],
            build=partial(self._autoencoder, seed),
            prepare=partial(self._prepare_phi, settings=settings, facts=facts),
        )

    def _training(self, name: str, seed: int) -> Training:
        size = self.size
        settings = size.models.settings(seed, guided=True)
        options = {"phi_epochs": size.phi_epochs, **STUDENTS[name]}
        facts = {
            **self.models.facts(SCRATCH, settings),
            "fusion": size.fusion,
            "explainers": list(size.explainers),
            **options,
        }
        needs = [self.models.key(TEACHER, seed)]
        if options.pop("phi_epochs"):
            needs.append(self._key("phi", seed))
        return Training(
            key=self._key(name, seed),
            kind=f"{NAME}/{name}",
            facts=facts,
            needs=needs,
            build=partial(self._build, seed),
            prepare=partial(
                self._prepare, settings=settings, options=options, stage=name, facts=facts
            ),
        )

    def _key(self, name: str, seed: int) -> str:
        return f"{NAME}/{seed}/{name.replace(' ', '-')}"

    def _autoencoder(self, seed: int) -> ExplanationAutoencoder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return ExplanationAutoencoder(self.data.channels, maps=len(self.size.explainers))

    def _build(self, seed: int) -> ExplainedStudent:
        student, phi = self.models.build(SCRATCH, seed)(), self._autoencoder(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return ExplainedStudent(student, phi, fusion=self.size.fusion)

    def _explanations(self, teacher: nn.Module) -> TeacherExplanations:
        return TeacherExplanations(
            teacher, list(self.size.explainers), target_layers=STAGES[-1], batch_size=256
        )

    def _prepare(
        self,
        model: nn.Module,
        teachers: Sequence[nn.Module],
        context: Context,
        *,
        settings: TrainSettings,
        options: Mapping[str, Any],
        stage: str,
        facts: Mapping[str, Any],
    ) -> Distiller:
        assert isinstance(model, ExplainedStudent)
        teacher, *phi = teachers
        if phi:
            assert model.phi is not None
            model.phi.load_state_dict(phi[0].state_dict())
        return XDistiller(
            model,
            self._batches(teacher, settings, context),
            settings,
            teacher=teacher,
            device=context.device,
            checkpoint=context.checkpoint,
            identity=facts,
            stage=stage,
            progress=context.watch,
            phi_epochs=0,
            **options,
        )

    def _prepare_phi(
        self,
        model: nn.Module,
        teachers: Sequence[nn.Module],
        context: Context,
        *,
        settings: TrainSettings,
        facts: Mapping[str, Any],
    ) -> Distiller:
        (teacher,) = teachers
        return PhiTrainer(
            model,
            self._batches(teacher, settings, context),
            settings,
            epochs=self.size.phi_epochs,
            device=context.device,
            checkpoint=context.checkpoint,
            identity=facts,
            progress=context.watch,
        )

    def _batches(
        self, teacher: nn.Module, settings: TrainSettings, context: Context
    ) -> TrainBatches:
        common: dict[str, Any] = {
            "batch_size": settings.batch_size,
            "seed": settings.seed,
            "device": context.device,
        }
        if context.rehearsal:
            return _Blank(self.data, maps=len(self.size.explainers), **common)
        return ExplainedBatches(self.data, self._maps(teacher, context), **common)

    def _maps(self, teacher: nn.Module, context: Context) -> ExplanationCache:
        return explanation_cache(
            _folder(teacher, context),
            self._explanations(teacher),
            self.data,
            device=context.device,
            progress=context.watch.tick,
        )

    def _measure(self, models: Sequence[nn.Module], context: Context) -> dict[str, float]:
        data, device = self.data, context.device
        teacher, scratch, plain, *told = models
        students = {"scratch": scratch, "kd": plain, **dict(zip(STUDENTS, told, strict=True))}
        chosen = balanced(data.test.labels, np.arange(len(data.test)), self.size.samples)
        found = {"teacher/accuracy": accuracy(teacher, data, data.test, 256, device)}
        for number, (name, student) in enumerate(students.items(), 1):
            found[f"{name}/accuracy"] = accuracy(student, data, data.test, 256, device)
            parts, drawn = [], []
            for batch in data.batches(data.test, _BATCH, chosen):
                images = data.normalize(batch.images, device)
                parts.append(
                    explanation_fidelity(
                        student,
                        teacher,
                        images,
                        _gradcam(student),
                        _gradcam(teacher),
                        curves=name in ("kd", "xdistilled", HELD),
                        steps=self.size.steps,
                    )
                )
                if isinstance(student, ExplainedStudent):
                    wanted = self._explanations(teacher)(images)
                    drawn.append(_drawn(student, images, wanted))
            found |= {f"{name}/{what}": value for what, value in joined(parts).means().items()}
            if drawn:
                found[f"{name}/drawn"] = float(torch.cat(drawn).mean())
            context.watch.tick(number, len(students))
        # All that learn from the maps of this teacher are trained.
        shutil.rmtree(_folder(teacher, context), ignore_errors=True)
        return found

    def claims(self, seeds: Sequence[Mapping[str, Mapping[str, float]]]) -> list[Claim]:
        """The verdicts on the abstract's two claims, and on the ablations."""
        return claims_of([seed["fidelity"] for seed in seeds])


def _folder(teacher: nn.Module, context: Context) -> Path:
    return context.ledger.cached(f"maps-{fingerprint(teacher.state_dict())}")


class _Blank(TrainBatches):
    """Batches with maps of nothing, to time a step before there is a teacher to explain."""

    def __init__(self, data: ImageData, *, maps: int, **options: Any) -> None:
        super().__init__(data, **options)
        self._count = maps

    def iterate(self, first: int, last: int) -> Any:
        for images, *rest in super().iterate(first, last):
            shape = (len(images), self._count, *images.shape[2:])
            yield images, *rest, torch.zeros(shape, device=images.device)


def _gradcam(model: nn.Module) -> Callable[..., Tensor]:
    layer = STAGES[-1]
    if isinstance(model, ExplainedStudent):
        layer = f"student.{layer}"

    def explain(images: Tensor, targets: Tensor) -> Tensor:
        with GradCAM(model, target_layers=[layer]) as cam:
            maps: Tensor = cam(images, targets)
        return maps

    return explain


def _drawn(student: ExplainedStudent, images: Tensor, wanted: Tensor) -> Tensor:
    with torch.no_grad():
        maps = student.explain(images)
    return torch.stack(
        [cosine_agreement(a, b) for a, b in zip(maps.unbind(1), wanted.unbind(1), strict=True)]
    ).mean(0)
