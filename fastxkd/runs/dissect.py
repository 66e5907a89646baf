"""Network dissection of one or several models on a concept data set, as a directory.

concept source -> activations (unit_activations.py) -> thresholds -> tally (metrics/dissection)
               -> tables (dissected.py) and page (dissection_report.py)
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastxkd
from fastxkd._extras import require
from fastxkd.metrics.dissection import DissectionTally, NetworkDissection, Repeats
from fastxkd.metrics.unit_thresholds import Quantile, unit_thresholds
from fastxkd.runs import asked
from fastxkd.runs.best_images import BestImages
from fastxkd.runs.concept_data import ConceptImages, ConceptSource, open_concepts
from fastxkd.runs.dissected import (
    ACTIVATIONS,
    LOCK,
    OURS,
    RUN,
    TALLIES,
    DissectedModel,
    check_names,
    load_model,
    save_model,
    tally_file,
    write_tables,
)
from fastxkd.runs.durable import Lock, make_folders, put, read_regular, remove
from fastxkd.runs.explain import steady, terminable
from fastxkd.runs.journal import Failure
from fastxkd.runs.layout import RUN_BYTES
from fastxkd.runs.loading import readable
from fastxkd.runs.ranks import meet
from fastxkd.runs.store import refuse_strangers
from fastxkd.runs.unit_activations import Progress, Recomputed, Stored
from fastxkd.train.checkpoint import check_settings

Models = nn.Module | str | Sequence[nn.Module | str]
Texts = str | Sequence[str] | None
Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None
# A killed process may need a moment to be gone.
_UNTIL_GONE = 3.0
# Images kept of every unit, for the report.
_BEST = 4


@dataclass(frozen=True, eq=False)
class Dissected:
    """A run that is complete.

    Attributes:
        out: its directory.
        models: name -> what was found, in the order given.
        images: in the data set.
        failed: images that were left out, and why.
    """

    out: Path
    models: dict[str, DissectedModel]
    images: int
    failed: list[Failure]


def dissect(
    model: Models,
    data: object,
    out: str | os.PathLike[str],
    *,
    weights: Files = None,
    layers: Texts = None,
    names: Texts = None,
    q: float = 0.005,
    quantile: Quantile = "exact",
    iou_threshold: float = 0.05,
    repeats: Repeats = "each",
    spool: bool = True,
    keep: bool = False,
    num_classes: int | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
    allow_empty: bool = False,
    chunk: int = 64,
    batch_size: int = 32,
    workers: int = 0,
    device: str = "auto",
    gallery: int = 12,
    resume: bool = True,
    progress: Progress | None = None,
) -> Dissected:
    """Dissect a layer of one or several models; leave tables and a report in a directory.

    An image whose file, mask or row is broken is left out of thresholds and tallies and listed;
    the run goes on. The same call after an interruption goes on after the last whole chunk of
    activations (without a spool: after the last whole model) and ends with the same numbers.

    Args:
        model: a module or the name of one, see :func:`fastxkd.runs.models.load_model`; or several
            to compare.
        data: see :func:`fastxkd.runs.concept_data.open_concepts`.
        out: a new folder, or a run with these settings to continue.
        weights: files for models given by name, in their order.
        layers: one for each model, or one name for all; None: the last with positions.
        names: of the models in tables and report, in their order; None: ``model``, or
            ``model-1``, ...
        q, quantile, iou_threshold, repeats: as in :class:`fastxkd.NetworkDissection`.
        spool: the activations wait on the disk, in ``out``: each model runs over the data once;
            without, three or four times.
        keep: leave the activations there afterwards.
        num_classes: outputs of models given by name, where the data names no classes.
        image_size, mean, std, size, allow_empty: as in
            :func:`fastxkd.runs.concept_data.open_concepts`.
        chunk: images per chunk of activations, which is done or not done as a whole.
        batch_size: images per pass; lies within a chunk.
        workers: processes that load images.
        device: as in :func:`fastxkd.runs.explain`.
        gallery: units shown in the report, per model.
        resume: continue a run in ``out``; False: start over in it.
        progress: called with (what is being done, images done, images in all).

    Raises:
        ValueError, TypeError: something asked for does not fit; nothing of an old run was changed.
        OSError: the disk is full or broken.
        ImportError: numcodecs, pyarrow, jinja2 or Pillow is missing (extra ``runs``).
    """
    asked.check_numbers(chunk=chunk, batch_size=batch_size, workers=workers, gallery=gallery)
    for module in ("numcodecs", "pyarrow", "jinja2", "PIL", "matplotlib"):
        require(module, extra="runs")
    given: list[nn.Module | str] = [model] if isinstance(model, (nn.Module, str)) else list(model)
    count = len(given)
    if not count:
        raise ValueError("model: expected at least one, got none")
    files = _listed("weights", weights, count)
    wanted_layers = _listed("layers", layers, count)
    called = _listed("names", names, count)
    if names is None:
        called = ["model"] if count == 1 else [f"model-{i}" for i in range(1, count + 1)]
    check_names(called)
    ranks = meet()
    if ranks.ranks > 1:
        raise ValueError("dissect: runs in one process, torchrun started several")
    place = asked.pick_device(device, ranks)
    out = Path(out)
    with terminable(), steady():
        source = open_concepts(
            data, image_size=image_size, mean=mean, std=std, size=size, allow_empty=allow_empty
        )
        examples = readable(source)
        example = source.normalize(torch.stack([source[i].image for i in examples]), place)
        made: list[tuple[asked.Model, NetworkDissection, tuple[int, ...]]] = []
        for one, file, layer, name in zip(given, files, wanted_layers, called, strict=True):
            own = asked.make_model(one, name, file, num_classes, source, place)
            (chosen,) = asked.choose_layers(own.module, layer, example)
            dissection = NetworkDissection(
                own.module,
                chosen,
                source.concepts,
                q=q,
                quantile=quantile,
                iou_threshold=iou_threshold,
                repeats=repeats,
                device=place,
            )
            made.append((own, dissection, tuple(dissection.activations(example).shape[1:])))
        settings: dict[str, Any] = {
            "data": source.describe(),
            "models": {
                name: {**own.settings, "layer": dissection.layer, "shape": list(shape)}
                for name, (own, dissection, shape) in zip(called, made, strict=True)
            },
            "q": q,
            "quantile": quantile,
            "iou_threshold": iou_threshold,
            "repeats": repeats,
            "batch_size": batch_size,
            "chunk": chunk,
            "device": place.type,
        }
        if spool:
            _check_space(out, len(source), [shape for _, _, shape in made], keep=keep)
        used = {name: own.file for name, (own, _, _) in zip(called, made, strict=True)}
        lock = _claim(out, settings, asked.facts(place, ranks, workers, used, {}), resume)
        try:
            found: dict[str, DissectedModel] = {}
            for name, (_, dissection, shape) in zip(called, made, strict=True):
                if not os.path.lexists(tally_file(out, name)):
                    told = None if progress is None else _prefixed(progress, name, count)
                    answers = Recomputed(
                        dissection,
                        ConceptImages(source),
                        chunk=chunk,
                        batch_size=batch_size,
                        workers=workers,
                        progress=told,
                    )
                    stored: Recomputed | Stored = answers
                    if spool:
                        own_settings = {**settings, "models": settings["models"][name]}
                        folder = out / ACTIVATIONS / name
                        stored = Stored(answers, folder, own_settings, shape, chunk=chunk)
                    save_model(out, _dissected(name, dissection, stored))
                if not keep:
                    shutil.rmtree(out / ACTIVATIONS / name, ignore_errors=True)
                found[name] = load_model(out, name)
            lost = write_tables(out, list(found.values()))
            from fastxkd.runs.dissection_report import write_dissection_report

            write_dissection_report(out, list(found.values()), source, gallery=gallery)
            if not keep:
                shutil.rmtree(out / ACTIVATIONS, ignore_errors=True)
            remove(lock.path)
        finally:
            lock.release()
    return Dissected(out, found, len(source), lost)


def _dissected(
    name: str, dissection: NetworkDissection, stored: Recomputed | Stored
) -> DissectedModel:
    def answers() -> Iterator[Tensor]:
        some = False
        for batch in stored:
            some = True
            yield batch
        if not some:
            path, reason = stored.failed[min(stored.failed)]
            raise ValueError(
                f"data: {name} can use none of its images, the first: {path}: {reason}"
            )

    thresholds = unit_thresholds(answers, dissection.q, quantile=dissection.quantile)
    tally = DissectionTally(
        thresholds,
        dissection.concepts,
        iou_threshold=dissection.iou_threshold,
        repeats=dissection.repeats,
    )
    best = BestImages(_BEST)
    for batch, found in stored.with_batches("concepts"):
        if found.rows:
            tally.update(found.activations, batch.masks[found.rows], batch.labels[found.rows])
            best.update([batch.first + row for row in found.rows], found.activations)
    failed = tuple(Failure(index, *stored.failed[index]) for index in sorted(stored.failed))
    return DissectedModel(name, dissection.layer, tally.compute(), best, failed)


def _listed(name: str, given: Any, count: int) -> list[Any]:
    """One for each model."""
    if given is None or (isinstance(given, (str, os.PathLike)) and name == "layers"):
        return [given] * count
    several = [given] if isinstance(given, (str, os.PathLike)) else list(given)
    if len(several) != count:
        raise ValueError(f"{name}: expected one for each of {count} models, got {len(several)}")
    return several


def _check_space(out: Path, images: int, shapes: Sequence[tuple[int, ...]], *, keep: bool) -> None:
    """Refuse what the disk cannot hold: the activations of one model at a time, not packed; of
    all where they stay."""
    need = images * 4 * (sum if keep else max)(math.prod(shape) for shape in shapes)
    folder = out.expanduser().absolute()
    disk = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(disk).free
    if need <= free:
        return
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if need > free + there:
        raise ValueError(
            f"out: the activations of {images:,} images are {need / 1e9:.1f} GB, and {disk} has"
            f" {free / 1e9:.1f} GB left; do without a spool (each model then runs over the data"
            " three or four times), or take another disk"
        )


def _prefixed(progress: Progress, name: str, count: int) -> Progress:
    def told(what: str, done: int, total: int) -> None:
        progress(what if count == 1 else f"{name}: {what}", done, total)

    return told


def _claim(out: Path, settings: dict[str, Any], facts: dict[str, Any], resume: bool) -> Lock:
    """Take the directory: empty, or a run with the same settings; leave the mark of one.

    Raises:
        ValueError: it holds something else, a run with other settings, or somebody writes in it.
    """
    mark = out / RUN
    settings = json.loads(json.dumps(settings))  # as it comes back from the file
    known = os.path.lexists(mark)
    refuse_strangers(out, OURS if known else (LOCK,))
    if known and resume:
        try:
            stored = json.loads(read_regular(mark, RUN_BYTES))["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"out: {mark} is damaged ({error}); choose another folder") from error
        check_settings(stored, settings, f"the run in {out}")
    make_folders(out)
    lock = Lock(out / LOCK)
    lock.take(_UNTIL_GONE)
    if known and not resume:
        for folder in (ACTIVATIONS, TALLIES):
            shutil.rmtree(out / folder, ignore_errors=True)
        for name in set(OURS) - {ACTIVATIONS, TALLIES, LOCK}:
            remove(out / name)
    if not (known and resume):
        content = {"fastxkd": fastxkd.__version__, "settings": settings, "facts": facts}
        put(mark, json.dumps(content, indent=2).encode() + b"\n", "0-0")
    return lock


__all__ = ["ConceptSource", "Dissected", "dissect"]
