"""The networks of Fashion-MNIST that two studies share: trained once, whoever asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from fastxkd.runs.data import ImageData
from fastxkd.runs.reproduce.tasks import Context, Training
from fastxkd.runs.reproduce.training import STAGES, Hints, Widths, distiller, network, part_of
from fastxkd.train.distiller import Distiller, TrainSettings

PLACE = "fashion"
# First weights of one seed and another start are those of no other seed below this.
_STARTS = 1_000_000


@dataclass(frozen=True)
class Size:
    """How much is trained. What the papers leave open is an interpretation here.

    Attributes:
        train_images: of the training images, balanced over the classes; None: all.
        epochs: of every training.
        widths, depths: of the networks.
        temperature, ce_weight, kd_weight: of a teacher's logits; UniCAM's code has other values
            for other networks, XDistillation's are not known.
        hints: of attention- and feature-based guidance, beside the labels alone.
    """

    train_images: int | None = None
    epochs: int = 4
    batch_size: int = 64
    lr: float = 0.05
    widths: Mapping[str, Widths] = field(
        default_factory=lambda: {
            "large": (24, 48, 64, 96),
            "medium": (16, 32, 48, 64),
            "small": (8, 16, 24, 32),
        }
    )
    depths: Mapping[str, Widths] = field(
        default_factory=lambda: {
            "large": (1, 2, 2, 2),
            "medium": (1, 1, 1, 1),
            "small": (1, 1, 1, 1),
        }
    )
    temperature: float = 4.0
    ce_weight: float = 0.1
    kd_weight: float = 0.9
    hints: Mapping[str, Hints] = field(
        default_factory=lambda: {
            "attention": Hints("attention", STAGES[1:], 1000.0),
            "feature": Hints("feature", STAGES, 5.0),
        }
    )

    def settings(self, seed: int, *, guided: bool) -> TrainSettings:
        return TrainSettings(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            seed=seed,
            temperature=self.temperature,
            ce_weight=self.ce_weight if guided else 1.0,
            kd_weight=self.kd_weight if guided else 0.0,
        )


FULL = Size()
QUICK = Size(train_images=6000)


@dataclass(frozen=True)
class _Model:
    """One of the models: its network, its teacher, how that guides it, and which first weights.

    Models of one network and the same ``start`` begin with the same weights.
    """

    network: str
    teacher: str | None = None
    guidance: str = "response"
    start: int = 0


MODELS = {
    # A student of its teacher's architecture; the teacher is the base. The students begin with
    # first weights of their own, an interpretation: the paper does not say.
    "base": _Model("medium"),
    "response": _Model("medium", "base", start=1),
    "attention": _Model("medium", "base", "attention", start=1),
    "feature": _Model("medium", "base", "feature", start=1),
    # A small student of a large teacher, with and without an assistant between them; here the base
    # and the students begin alike.
    "large": _Model("large"),
    "assistant": _Model("medium", "large"),
    "small": _Model("small"),
    "direct": _Model("small", "large"),
    "assisted": _Model("small", "assistant"),
}


class FashionModels:
    """Trainings of :data:`MODELS` on ``data``."""

    def __init__(self, data: ImageData, size: Size) -> None:
        self.size, self.data = size, part_of(data, size.train_images)

    def key(self, name: str, seed: int) -> str:
        return f"{PLACE}/{seed}/{name}"

    def trainings(self, names: Sequence[str], seed: int) -> list[Training]:
        """Of these models and of those that they learn from, teachers first."""
        wanted: dict[str, None] = {}
        for name in names:
            chain = [name]
            while (teacher := MODELS[chain[-1]].teacher) is not None:
                chain.append(teacher)
            wanted.update(dict.fromkeys(reversed(chain)))
        return [self._training(name, seed) for name in wanted]

    def build(self, name: str, seed: int) -> Callable[[], nn.Module]:
        """What makes the untrained network of a model."""
        shape, start = MODELS[name].network, MODELS[name].start
        return partial(
            network,
            self.size.widths[shape],
            self.size.depths[shape],
            num_classes=len(self.data.classes),
            in_channels=self.data.channels,
            seed=seed + _STARTS * start,
        )

    def facts(self, name: str, settings: TrainSettings) -> dict[str, Any]:
        """What decides the weights of a model, beside its teacher's."""
        shape = MODELS[name].network
        decisive = ("epochs", "batch_size", "lr", "seed", "temperature", "ce_weight", "kd_weight")
        return {
            **self.data.settings(),
            **{option: getattr(settings, option) for option in decisive},
            "network": [list(self.size.widths[shape]), list(self.size.depths[shape])],
            **({"start": MODELS[name].start} if MODELS[name].start else {}),
        }

    def _training(self, name: str, seed: int) -> Training:
        model = MODELS[name]
        guided = model.teacher is not None
        settings = self.size.settings(seed, guided=guided and model.guidance == "response")
        hints = self.size.hints.get(model.guidance) if guided else None
        facts = {**self.facts(name, settings), **(hints.facts() if hints else {})}
        return Training(
            key=self.key(name, seed),
            kind=f"{PLACE}/{name}",
            facts=facts,
            needs=[] if model.teacher is None else [self.key(model.teacher, seed)],
            build=self.build(name, seed),
            prepare=partial(self._prepare, settings=settings, hints=hints, stage=name, facts=facts),
        )

    def _prepare(
        self,
        model: nn.Module,
        teachers: Sequence[nn.Module],
        context: Context,
        *,
        settings: TrainSettings,
        hints: Hints | None,
        stage: str,
        facts: Mapping[str, Any],
    ) -> Distiller:
        return distiller(
            model,
            self.data,
            settings,
            context,
            stage=stage,
            facts=facts,
            teacher=teachers[0] if teachers else None,
            hints=hints,
        )


def noticed(data: ImageData) -> str:
    """Where the images come from, and how many of them are used."""
    trained = 0 if data.train is None else len(data.train)
    used = (
        f" Trained on {trained:,} of the training images."
        if f"{trained:,}" not in data.notice
        else ""
    )
    return f"{data.notice}{used}"
