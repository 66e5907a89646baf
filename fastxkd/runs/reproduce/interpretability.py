"""What distillation does to interpretability (Han, Kim, Choi and Yoon 2023), on composed pictures.

A small network is trained alone, with smoothed labels, by itself, and by EfficientNet-Lite0 with a
head for these classes; then the units of its last stage are dissected. Objects, colours and
textures are the concepts: the paper's scenes are textures here, the background of each picture.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastxkd import capture
from fastxkd.losses import at_loss
from fastxkd.metrics.class_similarity import group_entropy
from fastxkd.metrics.dissection import NetworkDissection
from fastxkd.runs.reproduce.claims import Claim
from fastxkd.runs.reproduce.concept_bank import (
    Bank,
    BankBatches,
    ConceptBanks,
    FeatureBatches,
    answers,
    blank,
    head,
    notice,
)
from fastxkd.runs.reproduce.interpretability_claims import (
    NAME,
    claims_of,
    detectors_from,
    smoothed_at,
)
from fastxkd.runs.reproduce.tasks import Context, Measurement, Training
from fastxkd.runs.reproduce.training import Widths, network
from fastxkd.train.distiller import Batches, Distiller, TrainSettings, fingerprint

LAYER = "body.stage4"
# Superclasses for the entropy, an interpretation as all of them are.
GROUPS = {
    "animals": ("bird", "insect", "mammal", "sea animal"),
    "plants": ("flower", "fruit", "vegetable"),
    "things": ("road sign", "tool", "vehicle"),
}
_PATCH = 2


@dataclass(frozen=True)
class Size:
    """How much is trained and measured.

    Attributes:
        train, test: pictures to learn from, and to dissect and test on.
        widths, depths: of the student; its last width is the number of units that are dissected.
        temperature, kd_weight: of distillation; the paper's code has 1 and 4, and a half.
        smoothing: of the smoothed labels.
        attention_weight: of attention transfer.
        temperatures: of distillation from a teacher of smoothed labels.
        iou_thresholds: from which a unit is a detector. The first decides, and is the paper's; at
            the others detectors are counted as well and shown.
    """

    train: int = 6000
    test: int = 2000
    epochs: int = 16
    head_epochs: int = 10
    batch_size: int = 50
    lr: float = 0.05
    widths: Widths = (16, 32, 64, 128)
    depths: Widths = (1, 1, 1, 1)
    temperature: float = 4.0
    kd_weight: float = 0.5
    smoothing: float = 0.1
    attention_weight: float = 1000.0
    temperatures: Sequence[float] = (1.0, 2.0, 4.0, 8.0)
    iou_thresholds: Sequence[float] = (0.05, 0.075)


FULL = Size()
QUICK = Size(train=1500, test=500, epochs=15, temperatures=(1.0, 4.0))


@dataclass(frozen=True)
class _Model:
    """One of the students: what teaches it, and how."""

    teacher: str | None = None
    temperature: float | None = None
    kd_weight: float = 0.0
    attention_weight: float = 0.0
    smoothing: float = 0.0


class InterpretabilityStudy:
    """Trains and measures what the claims need, for any number of seeds.

    Args:
        size: :data:`FULL`, :data:`QUICK` or another.
        stamps: folder of the stamps; None: where Debian has them.

    Raises:
        ValueError, ImportError: no stamps, no pretrained teacher.
    """

    name = NAME

    def __init__(self, size: Size = FULL, *, stamps: Path | None = None) -> None:
        self.size = size
        self.banks = ConceptBanks(size.train, size.test, stamps=stamps)
        self._facts = self.banks.facts()
        self.notice = notice(self._facts)
        soft = {"temperature": size.temperature, "kd_weight": size.kd_weight}
        self.models = {
            "scratch": _Model(),
            "smoothed": _Model(smoothing=size.smoothing),
            "kd": _Model("teacher", **soft),
            "attention": _Model("teacher", attention_weight=size.attention_weight),
            "attention-kd": _Model("teacher", attention_weight=size.attention_weight, **soft),
            "self": _Model("scratch", **soft),
            **{
                smoothed_at(t): _Model("smoothed-teacher", temperature=t, kd_weight=size.kd_weight)
                for t in size.temperatures
            },
        }

    def tasks(self, seed: int) -> list[Training | Measurement]:
        pictures = Measurement(
            key=f"{NAME}/pictures",
            kind=f"{NAME}/pictures",
            facts=self._facts,
            needs=[],
            measure=self._pictures,
            guess=0.06 * (self.size.train + self.size.test),
        )
        heads = [self._head(name, seed) for name in ("teacher", "smoothed-teacher")]
        students = [self._student(name, seed) for name in self.models]
        measurement = Measurement(
            key=f"{NAME}/{seed}/units",
            kind=f"{NAME}/units",
            facts={
                **self._facts,
                "groups": {name: list(g) for name, g in GROUPS.items()},
                "iou_thresholds": list(self.size.iou_thresholds),
            },
            needs=[training.key for training in (*heads, *students)],
            measure=self._measure,
            guess=0.02 * self.size.test,
        )
        return [pictures, *heads, *students, measurement]

    def _pictures(self, models: Sequence[nn.Module], context: Context) -> dict[str, float]:
        return {part: len(self._bank(part, context).labels) for part in ("train", "test")}

    def _bank(self, part: str, context: Context) -> Bank:
        if context.rehearsal:
            return blank(getattr(self.size, part), len(self.banks.classes))
        return self.banks.get(part, context.ledger.cached("pictures"), context.watch.tick)

    def _head(self, name: str, seed: int) -> Training:
        size = self.size
        settings = TrainSettings(
            epochs=size.head_epochs,
            batch_size=size.batch_size,
            # A head that knows its pictures by heart has nothing more to say about them.
            lr=0.002,
            weight_decay=0.1,
            seed=seed,
            label_smoothing=size.smoothing if name == "smoothed-teacher" else 0.0,
        )
        facts = {**_decisive(settings), "pictures": self._facts}

        def prepare(model: nn.Module, teachers: Sequence[nn.Module], context: Context) -> Distiller:
            batches = FeatureBatches(self._bank("train", context), settings, context.device)
            return Distiller(model, batches, settings, **_common(context, name, facts))

        return Training(
            key=f"{NAME}/{seed}/{name}",
            kind=f"{NAME}/{name}",
            facts=facts,
            needs=[],
            build=partial(head, len(self.banks.classes), seed),
            prepare=prepare,
        )

    def _student(self, name: str, seed: int) -> Training:
        size, model = self.size, self.models[name]
        settings = TrainSettings(
            epochs=size.epochs,
            batch_size=size.batch_size,
            lr=size.lr,
            seed=seed,
            temperature=model.temperature or 1.0,
            ce_weight=1.0 - model.kd_weight,
            kd_weight=model.kd_weight,
            label_smoothing=model.smoothing,
        )
        facts = {
            **_decisive(settings),
            "pictures": self._facts,
            "network": [list(size.widths), list(size.depths)],
            "attention_weight": model.attention_weight,
        }

        def prepare(
            student: nn.Module, teachers: Sequence[nn.Module], context: Context
        ) -> Distiller:
            bank = self._bank("train", context)
            common = _common(context, name, facts)
            if not teachers or model.teacher == "scratch":
                batches = BankBatches(bank, settings, context.device)
                teacher = teachers[0] if teachers else None
                return Distiller(student, batches, settings, teacher=teacher, **common)
            guidance = answers(teachers[0], bank, context.device, features=True)
            batches = BankBatches(bank, settings, context.device, guidance=guidance)
            common["identity"] = {**facts, "head": fingerprint(teachers[0].state_dict())}
            return BankDistiller(
                student, batches, settings, attention_weight=model.attention_weight, **common
            )

        return Training(
            key=f"{NAME}/{seed}/{name}",
            kind=f"{NAME}/{name}",
            facts=facts,
            needs=[] if model.teacher is None else [f"{NAME}/{seed}/{model.teacher}"],
            build=partial(self._build, seed),
            prepare=prepare,
        )

    def _build(self, seed: int) -> nn.Module:
        body = network(
            self.size.widths,
            self.size.depths,
            num_classes=len(self.banks.classes),
            in_channels=3 * _PATCH**2,
            seed=seed,
        )
        # Pixels become channels: 56 x 56 x 3 to 28 x 28 x 12, with nothing lost.
        return nn.Sequential(OrderedDict(stem=nn.PixelUnshuffle(_PATCH), body=body))

    def _measure(self, models: Sequence[nn.Module], context: Context) -> dict[str, float]:
        bank, device = self._bank("test", context), context.device
        teacher, smoothed, *rest = models
        students = dict(zip(self.models, rest, strict=True))
        found = {}
        for name, model in (("teacher", teacher), ("smoothed-teacher", smoothed)):
            right = answers(model, bank, device, features=True).argmax(1) == bank.labels
            found[f"{name}/accuracy"] = float(right.double().mean())
        groups = _groups(self.banks.classes)
        for number, (name, student) in enumerate(students.items(), 1):
            logits = answers(student, bank, device, features=False)
            found[f"{name}/accuracy"] = float((logits.argmax(1) == bank.labels).double().mean())
            found[f"{name}/entropy"] = float(group_entropy(logits, bank.labels, groups).mean())
            found[f"{name}/softmax entropy"] = float(group_entropy(logits).mean())
            dissect = NetworkDissection(
                student,
                LAYER,
                self.banks.concepts,
                iou_threshold=self.size.iou_thresholds[0],
                device=device,
            )
            units = dissect(_Dissected(bank, device))
            found[f"{name}/detectors"] = units.detectors
            found[f"{name}/unique"] = units.unique_detectors
            for least in self.size.iou_thresholds[1:]:
                found[f"{name}/{detectors_from(least)}"] = sum(u.iou >= least for u in units.units)
            for category, counts in units.counts.items():
                found[f"{name}/{category}"] = counts.detectors
            context.watch.tick(number, len(students))
        return found

    def claims(self, seeds: Sequence[Mapping[str, Mapping[str, float]]]) -> list[Claim]:
        """The verdicts on the paper's tables, from the measurements of each seed."""
        size = self.size
        measured = [seed["units"] for seed in seeds]
        return claims_of(measured, size.temperatures, size.widths[-1], size.iou_thresholds)


class BankDistiller(Distiller):
    """A :class:`Distiller` whose batches bring the teacher's logits and attention along."""

    def __init__(
        self,
        student: nn.Module,
        batches: Batches,
        settings: TrainSettings,
        *,
        attention_weight: float = 0.0,
        **rest: Any,
    ) -> None:
        self.attention_weight = attention_weight
        super().__init__(student, batches, settings, **rest)

    def _loss(self, images: Tensor, labels: Tensor, *more: Tensor) -> Tensor:
        guidance, attention = more
        with capture(self.student, [LAYER]) as own:
            logits = self.student(images)
        loss: Tensor = self._criterion(logits, guidance, labels)
        if self.attention_weight:
            loss = loss + self.attention_weight * at_loss(own.activations[LAYER], attention)
        return loss


class _Dissected:
    """Pictures and masks of a bank, as often as they are asked for."""

    def __init__(self, bank: Bank, device: torch.device) -> None:
        self.bank, self.device = bank, device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.arange(len(self.bank.labels)).split(128):
            yield self.bank.pixels(rows, self.device), self.bank.masks[rows]


def _common(context: Context, stage: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "device": context.device,
        "checkpoint": context.checkpoint,
        "identity": facts,
        "stage": stage,
        "progress": context.watch,
    }


def _decisive(settings: TrainSettings) -> dict[str, Any]:
    names = ("epochs", "batch_size", "lr", "weight_decay", "seed", "label_smoothing")
    soft = ("temperature", "ce_weight", "kd_weight")
    return {name: getattr(settings, name) for name in (*names, *soft)}


def _groups(classes: Sequence[str]) -> list[int]:
    place = {name: number for number, names in enumerate(GROUPS.values()) for name in names}
    return [place[name] for name in classes]
