"""Students taught by logits, by attention maps and by features, on the Distiller of the library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastxkd import capture
from fastxkd.losses import ATLoss, FitNetLoss
from fastxkd.runs.answers import balanced
from fastxkd.runs.cnn import SmallCNN
from fastxkd.runs.data import ArraySplit, ImageData, TrainBatches
from fastxkd.runs.reproduce.tasks import Context
from fastxkd.train.distiller import Batches, Distiller, TrainSettings

STAGES = ("stage1", "stage2", "stage3", "stage4")
Widths = tuple[int, int, int, int]


def network(
    widths: Widths, depths: Widths, *, num_classes: int, in_channels: int, seed: int
) -> SmallCNN:
    """A small network whose first weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallCNN(widths, depths, num_classes=num_classes, in_channels=in_channels)


def part_of(data: ImageData, train_images: int | None) -> ImageData:
    """``data`` with so many of its training images, balanced over the classes; None: with all."""
    if train_images is None or data.train is None or train_images >= len(data.train):
        return data
    chosen = balanced(data.train.labels, np.arange(len(data.train)), train_images)
    batch = data.train.load(np.sort(chosen))
    return ImageData(
        data.spec,
        data.classes,
        ArraySplit(batch.images, batch.labels.numpy()),
        data.test,
        data.channels,
        data.image_size,
        data.mean,
        data.std,
        data.notice,
    )


@dataclass(frozen=True)
class Hints:
    """What a student is shown of its teacher's layers.

    ``"attention"`` is attention transfer; ``"feature"`` the features themselves behind a 1x1
    convolution, FitNets' loss at every stage. The papers' own feature method (the overhaul of Heo
    et al.) is not in the library: taking this one is an interpretation.

    Attributes:
        layers: of student and teacher alike.
        weight: of the mean over the layers; 1000 is usual for attention, whose loss is a mean over
            positions of maps of length 1.
    """

    kind: Literal["attention", "feature"]
    layers: Sequence[str]
    weight: float

    def facts(self) -> dict[str, Any]:
        return {"hints": self.kind, "hint_layers": list(self.layers), "hint_weight": self.weight}


class HintDistiller(Distiller):
    """A :class:`Distiller` whose student also follows layers of its teacher.

    Args:
        hints: which layers, and how much they weigh.
        rest: of :class:`Distiller`; ``teacher`` is needed.
    """

    def __init__(
        self,
        student: nn.Module,
        batches: Batches,
        settings: TrainSettings,
        *,
        hints: Hints,
        identity: Mapping[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        self.hints = hints
        facts = {**(identity or {}), **hints.facts()}
        super().__init__(student, batches, settings, identity=facts, **rest)

    def _make_criterion(self) -> nn.Module:
        assert self.teacher is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            hints = [
                _criterion(self.hints.kind, self.student, self.teacher, layer)
                for layer in self.hints.layers
            ]
        return nn.ModuleDict({"logits": super()._make_criterion(), "hints": nn.ModuleList(hints)})

    def _loss(self, images: Tensor, labels: Tensor, *more: Tensor) -> Tensor:
        assert self.teacher is not None
        assert isinstance(self._criterion, nn.ModuleDict)
        layers, criteria = list(self.hints.layers), self._criterion["hints"]
        assert isinstance(criteria, nn.ModuleList)
        with self._autocast():
            with capture(self.student, layers) as own:
                logits = self.student(images)
            with torch.no_grad(), capture(self.teacher, layers) as theirs:
                guidance = self.teacher(images)
            hints = [
                criterion(own.activations[layer], theirs.activations[layer].detach())
                for criterion, layer in zip(criteria, layers, strict=True)
            ]
        soft: Tensor = self._criterion["logits"](logits.float(), guidance.float(), labels)
        return soft + self.hints.weight * torch.stack(hints).mean()


def distiller(
    model: nn.Module,
    data: ImageData,
    settings: TrainSettings,
    context: Context,
    *,
    stage: str,
    facts: Mapping[str, Any],
    teacher: nn.Module | None = None,
    hints: Hints | None = None,
    augmented: bool = True,
) -> Distiller:
    """What trains ``model`` in place: on labels, on a teacher's logits, on its layers."""
    batches = TrainBatches(
        data,
        batch_size=settings.batch_size,
        seed=settings.seed,
        augmented=augmented,
        device=context.device,
    )
    common: dict[str, Any] = {
        "teacher": teacher,
        "device": context.device,
        "checkpoint": context.checkpoint,
        "identity": facts,
        "stage": stage,
        "progress": context.watch,
    }
    if hints is None:
        return Distiller(model, batches, settings, **common)
    return HintDistiller(model, batches, settings, hints=hints, **common)


def _criterion(kind: str, student: nn.Module, teacher: nn.Module, layer: str) -> nn.Module:
    if kind == "attention":
        return ATLoss()
    return FitNetLoss(*(_channels(model.get_submodule(layer)) for model in (student, teacher)))


def _channels(stage: nn.Module) -> int:
    convolutions = [m for m in stage.modules() if isinstance(m, nn.Conv2d)]
    return convolutions[-1].out_channels
