"""What a run over a data set does with a batch, and the rows of a chunk that come of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastxkd.pages.numbers import finite
from fastxkd.runs.chunks import Array
from fastxkd.runs.loading import NO_LABEL, Images, Loaded
from fastxkd.runs.methods import Methods, statistics
from fastxkd.runs.sources import spread

_log = logging.getLogger("fastxkd")
Targets = Literal["predicted", "label"] | int

# Of images looked at for UniCAM's reference set, per image that is kept: to find every class.
CANDIDATES = 4
STATISTICS = ("mean", "spread", "peak_y", "peak_x")
COLUMNS = {
    "name": "string",
    "label": "int64",
    "status": "string",
    "predicted": "int64",
    "target": "int64",
    "logit": "float32",
    "probability": "float32",
}


class Answer(NamedTuple):
    """Of a batch: why rows failed, and name -> values of every row, on their way to the host."""

    failed: dict[int, str]
    values: dict[str, Tensor]
    there: Any  # a CUDA event, or None: they are there already

    def wait(self) -> None:
        if self.there is not None:
            self.there.synchronize()


class Work:
    """Maps and scores of batches.

    Args:
        images: the data set.
        methods: what is computed.
        device: where the models are.
        targets: ``"predicted"``, ``"label"`` or a class.
        dtype: what maps are stored as.
    """

    def __init__(
        self,
        images: Images,
        methods: Methods,
        device: torch.device,
        targets: Targets,
        dtype: torch.dtype,
    ) -> None:
        self.images, self.methods, self.device = images, methods, device
        self.targets, self.dtype = targets, dtype
        self.classes: int | None = None  # known after a rehearsal

    def pixels(self, images: Tensor) -> Tensor:
        """What the models take."""
        return self.images.source.normalize(images, self.device)

    def prepare(self, samples: int, batch_size: int) -> dict[str, dict[str, Any]]:
        """UniCAM's reference set, from all over the data set, the same at every start; layer ->
        its scores.

        Raises:
            ValueError: too few images, or labels of one class only.
        """
        if not self.methods.asks_for_labels:
            return {}
        places = spread(len(self.images.source), CANDIDATES * samples)
        classes: set[int] = set()

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for first in range(0, len(places), batch_size):
                batch = self.images[places[first : first + batch_size]]
                labelled = batch.labels != NO_LABEL
                labelled[list(batch.failed)] = False
                if bool(labelled.any()):
                    labels = batch.labels[labelled]
                    classes.update(labels.tolist())
                    pixels = self.pixels(batch.images[labelled])
                    yield pixels, labels.to(self.device)

        scores = self.methods.prepare(batches, samples)
        if len(classes) < 2:
            raise ValueError(
                "data: unicam asks for labels of at least 2 classes, got"
                f" {len(classes)} in the {len(places)} images looked at"
            )
        return {
            layer: {k: v if isinstance(v, str) else finite(v) for k, v in found._asdict().items()}
            for layer, found in scores.items()
        }

    def rehearse(self, places: Sequence[int]) -> dict[str, Array]:
        """Explain a few images before any work is done; the arrays that they give.

        Raises:
            ValueError: a model, layers, methods or targets that do not fit.
        """
        batch = self.images[list(places)]
        logits = self.methods.logits(self.pixels(batch.images))
        self.classes = logits.shape[1]
        if not bool(logits.isfinite().any()):
            raise ValueError("model: its outputs are not finite; are its weights damaged?")
        if isinstance(self.targets, int) and not 0 <= self.targets < self.classes:
            raise ValueError(f"targets: expected 0 <= class < {self.classes}, got {self.targets}")
        failed, values, _ = answer = self.answer(batch)
        if len(failed) == len(places):
            raise ValueError(f"data: {batch.names[0]} cannot be explained: {failed[0]}")
        answer.wait()
        arrays = {}
        for name in self.methods.arrays:
            shape = tuple(values[name].shape[1:])
            if len(shape) != 2:
                raise ValueError(f"layers: expected maps [height, width] of {name}, got {shape}")
            if shape == (1, 1):
                raise ValueError(
                    f"layers: {name} has a single position, of which a map says nothing; name one"
                    " further to the front"
                )
            spread = values[f"{name}_spread"][[row not in failed for row in range(len(places))]]
            if bool(((spread == 0) | (spread > 1 - 1e-6)).all()):
                _log.warning(
                    "layers: the maps %s of the first images are flat; does the answer depend on"
                    " the layer's positions?",
                    name,
                )
            arrays[name] = Array(shape, str(self.dtype).removeprefix("torch."))
        return arrays

    def answer(self, batch: Loaded) -> Answer:
        failed = self._failed(batch)
        labels = batch.labels.clone()
        labels[list(failed)] = 0
        labels = labels.clamp(min=0).to(self.device, non_blocking=True)
        targets = None
        if self.targets == "label":
            targets = labels
        elif self.targets != "predicted":
            targets = torch.full_like(labels, self.targets)
        found = self.methods(self.pixels(batch.images), labels, targets)
        column = found.targets[:, None]
        values = {
            "predicted": found.logits.argmax(1),
            "target": found.targets,
            "logit": found.logits.gather(1, column)[:, 0].float(),
            "probability": found.logits.double().softmax(1).gather(1, column)[:, 0],
        }
        for name, maps in found.maps.items():
            values[name] = self._stored(maps)
            for what, numbers in statistics(maps).items():
                values[f"{name}_{what}"] = numbers
        values = {name: value.to("cpu", non_blocking=True) for name, value in values.items()}
        there = None
        if self.device.type == "cuda":
            there = torch.cuda.Event()
            there.record(torch.cuda.current_stream(self.device))
        return Answer(failed, values, there)

    def _failed(self, batch: Loaded) -> dict[int, str]:
        failed = dict(batch.failed)
        if self.targets != "label" and not self.methods.asks_for_labels:
            return failed
        most = self.methods.most_classes
        if self.targets == "label":
            most = self.classes if most is None else min(most, self.classes or most)
        for row, label in enumerate(batch.labels.tolist()):
            if label == NO_LABEL:
                failed.setdefault(row, "it has no label, which is asked for")
            elif most is not None and label >= most:
                failed.setdefault(row, f"its label {label} is none of {most} classes")
        return failed

    def _stored(self, maps: Tensor) -> Tensor:
        if self.dtype != torch.uint8:
            return maps.to(self.dtype)
        return (255 * maps.nan_to_num(0, 0, 0)).round().to(torch.uint8)


def columns_of(arrays: Iterable[str]) -> dict[str, str]:
    """The columns of the scores: what there is of every image, and four numbers of each map."""
    return COLUMNS | {f"{name}_{what}": "float32" for name in arrays for what in STATISTICS}


class Chunk:
    """The rows of one chunk, as they come in."""

    def __init__(self, number: int, rows: range, arrays: Mapping[str, Array]) -> None:
        self.number, self.rows = number, rows
        self.maps = {
            name: np.zeros((len(rows), *array.shape), array.dtype) for name, array in arrays.items()
        }
        self.scores: dict[str, list[Any]] = {name: [] for name in columns_of(arrays)}
        self.errors: list[dict[str, Any]] = []

    def put(self, batch: Loaded, answer: Answer) -> int:
        """Add a batch; how many of it failed."""
        answer.wait()
        failed, values = answer.failed, answer.values
        at, count = batch.first - self.rows.start, len(batch.names)
        for name, maps in self.maps.items():
            maps[at : at + count] = values[name].numpy()
        for what, known in [
            ("its logits are", values["logit"].isfinite()),
            *((f"its map {name} is", values[f"{name}_mean"].isfinite()) for name in self.maps),
        ]:
            for row in (~known).nonzero()[:, 0].tolist():
                failed.setdefault(row, f"{what} not finite")
        for name in self.scores.keys() - {"name", "label", "status"}:
            numbers: list[Any] = values[name].tolist()
            for row in failed:
                numbers[row] = None
            self.scores[name] += numbers
        self.scores["name"] += batch.names
        self.scores["label"] += [None if x == NO_LABEL else x for x in batch.labels.tolist()]
        self.scores["status"] += ["failed" if row in failed else "ok" for row in range(count)]
        self.errors += [
            {"index": batch.first + row, "path": batch.names[row], "reason": failed[row]}
            for row in sorted(failed)
        ]
        return len(failed)

    @property
    def full(self) -> bool:
        return len(self.scores["name"]) == len(self.rows)
