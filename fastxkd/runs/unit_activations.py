"""The activations of a layer on a data set, as often as they are asked for, never all at once.

Either they are computed anew every time, or they wait on the disk in a run directory (chunks.py):
a killed run then goes on after its last whole chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastxkd.metrics.dissection import NetworkDissection
from fastxkd.runs import reader
from fastxkd.runs.chunks import Array, RunWriter
from fastxkd.runs.concept_data import ConceptBatch, ConceptImages
from fastxkd.runs.loading import load, ranges

ARRAY = "activations"
Progress = Callable[[str, int, int], None]  # of what, images done, of


class Found(NamedTuple):
    """The images of a batch that can be used, and their activations ``[n, U, h, w]``."""

    rows: list[int]
    activations: Tensor


class Recomputed:
    """Activations that are computed whenever they are asked for.

    Attributes:
        failed: index -> (name, reason) of the images left out, after the first time.

    Args:
        dissection: the model and its layer.
        images: the data.
        chunk, batch_size, workers: how it is read; batches are the same every time.
        progress: is told about every pass.
    """

    def __init__(
        self,
        dissection: NetworkDissection,
        images: ConceptImages,
        *,
        chunk: int,
        batch_size: int,
        workers: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self.dissection, self.images = dissection, images
        self._chunk, self._batch_size, self._workers = chunk, batch_size, workers
        self._progress = progress
        self.failed: dict[int, tuple[str, str]] = {}
        self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        """Batches of activations, of usable images only."""
        for _, found in self.with_batches("activations"):
            if found.rows:
                yield found.activations

    def with_batches(self, what: str) -> Iterator[tuple[ConceptBatch, Found]]:
        """Batches of the data, each with its activations."""
        failed: dict[int, tuple[str, str]] = {}
        self.passes += 1
        what = what if what != "activations" else f"{what}, pass {self.passes}"
        for batch in self.batches(what):
            found = self.compute(batch, failed)
            yield batch, found
        if self.passes > 1 and failed.keys() != self.failed.keys():
            changed = min(failed.keys() ^ self.failed.keys())
            raise ValueError(f"data: image {changed} changed while the run went on")
        self.failed = failed

    def batches(
        self, what: str, chunks: Iterable[int] | None = None, *, pixels: bool = True
    ) -> Iterator[ConceptBatch]:
        """Batches of the data, of these chunks or all; without pixels nothing but what is to be
        seen on them."""
        total = len(self.images.source)
        wanted = range(-(-total // self._chunk)) if chunks is None else chunks
        places = ranges(wanted, total, self._chunk, self._batch_size)
        pinned = self.dissection.device.type == "cuda"
        images = self.images if pixels else ConceptImages(self.images.source, pixels=False)
        loaded: Iterator[Any] = load(
            images,  # type: ignore[arg-type]  # any data set of batches by place
            places,
            workers=self._workers,
            pinned=pinned,
        )
        for batch in loaded:
            yield batch
            if self._progress is not None:
                self._progress(what, batch.first + len(batch.names), total)

    def compute(self, batch: ConceptBatch, failed: dict[int, tuple[str, str]]) -> Found:
        """Run the model; what fails is added to ``failed``."""
        rows = batch.kept
        for row, reason in batch.failed.items():
            failed[batch.first + row] = batch.names[row], reason
        # All of them, also those that failed: who shares a batch must depend on nothing else.
        images = self.images.source.normalize(batch.images, self.dissection.device)
        try:
            values = self.dissection.activations(images).float()
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"batch_size: {len(images)} images do not fit into the memory of"
                f" {self.dissection.device}"
            ) from error
        fine = values.isfinite().flatten(1).all(1).tolist()
        for row in rows:
            if not fine[row]:
                failed[batch.first + row] = batch.names[row], "its activations are not finite"
        rows = [row for row in rows if fine[row]]
        return Found(rows, values[rows])


class Stored:
    """Activations that are computed once and wait in ``folder``, a run of its own.

    Args:
        answers: what computes them.
        folder: new, or the same that an interrupted run left.
        settings: of that run; others are refused.
        shape: ``(U, h, w)``.
    """

    def __init__(
        self,
        answers: Recomputed,
        folder: Path,
        settings: dict[str, Any],
        shape: tuple[int, ...],
        *,
        chunk: int,
    ) -> None:
        self._answers = answers
        source = answers.images.source
        writer = RunWriter(
            folder,
            settings,
            images=len(source),
            chunk=chunk,
            arrays={ARRAY: Array(shape, "float32")},
            columns={"name": "string"},
        )
        with writer:
            pending = writer.pending()
            values = np.zeros((0, *shape), np.float32)
            names: list[str] = []
            failed: dict[int, tuple[str, str]] = {}
            for batch in answers.batches("activations", pending):
                number = batch.first // chunk
                rows = writer.rows(number)
                if not names:
                    values = np.zeros((len(rows), *shape), np.float32)
                found = answers.compute(batch, failed)
                at = [batch.first - rows.start + row for row in found.rows]
                values[at] = found.activations.cpu().numpy()
                names += batch.names
                if len(names) == len(rows):
                    errors = [
                        {"index": index, "path": failed[index][0], "reason": failed[index][1]}
                        for index in sorted(failed)
                    ]
                    writer.write(number, {ARRAY: values}, {"name": names}, errors)
                    names, failed = [], {}
            writer.finish()
        self._run = reader.open(folder)
        self.failed = {e["index"]: (e["path"], e["reason"]) for e in self._run.errors}

    def __iter__(self) -> Iterator[Tensor]:
        layout = self._run.layout
        for chunk in range(layout.chunks):
            rows = layout.rows(chunk)
            kept = [row for row in rows if row not in self.failed]
            if kept:
                yield self._read(kept)

    def with_batches(self, what: str) -> Iterator[tuple[ConceptBatch, Found]]:
        for batch in self._answers.batches(what, pixels=False):
            rows = [r for r in range(len(batch.names)) if batch.first + r not in self.failed]
            changed = set(rows) & batch.failed.keys()
            if changed:
                row = min(changed)
                raise ValueError(
                    f"data: {batch.names[row]} changed while the run went on: {batch.failed[row]}"
                )
            yield batch, Found(rows, self._read([batch.first + row for row in rows]))

    def _read(self, indices: list[int]) -> Tensor:
        values = self._run.maps[ARRAY][np.array(indices, dtype=np.int64)]
        return torch.from_numpy(values).to(self._answers.dissection.device)
