"""What a dissection leaves on the disk.

run.json         settings, and facts of the machine that began it
activations/     while the run goes on (or with --keep): a run directory per model
tallies/         per model thresholds, counts and best images: all numbers of the result
units.csv, units.parquet   one row per unit and model
counts.json      detectors, in all and per category, of each model
errors.jsonl     {"index", "path", "reason"} of every image that was left out
report.html      the page
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastxkd._extras import require
from fastxkd.metrics.concept_scores import Concepts, Dissection
from fastxkd.runs.best_images import BestImages
from fastxkd.runs.durable import make_folders, put, read_regular
from fastxkd.runs.journal import Failure, failure_line

RUN, ACTIVATIONS, TALLIES, LOCK = "run.json", "activations", "tallies", ".lock"
UNITS, PARQUET, COUNTS = "units.csv", "units.parquet", "counts.json"
ERRORS, REPORT = "errors.jsonl", "report.html"
OURS = (RUN, ACTIVATIONS, TALLIES, LOCK, UNITS, PARQUET, COUNTS, ERRORS, REPORT)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_MARK = "0-0"
_TALLY_BYTES = 1 << 32


@dataclass(frozen=True, eq=False)
class DissectedModel:
    """One model of a run.

    Attributes:
        name: in tables and reports.
        layer: that was dissected.
        dissection: the result.
        best: the images on which each unit is strongest.
        failed: images that were left out.
    """

    name: str
    layer: str
    dissection: Dissection
    best: BestImages
    failed: tuple[Failure, ...]


def check_names(names: Sequence[str]) -> None:
    """Names of models become names of files."""
    for name in names:
        if not _NAME.fullmatch(name) or name.endswith(".tmp"):
            raise ValueError(f"names: expected letters, digits, '_', '.' and '-', got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"names: expected each once, got {', '.join(names)}")


def tally_file(out: Path, name: str) -> Path:
    return out / TALLIES / f"{name}.npz"


def save_model(out: Path, model: DissectedModel) -> None:
    """Write the numbers of a model; whole or not at all."""
    found = model.dissection
    about = {
        "name": model.name,
        "layer": model.layer,
        "concepts": asdict(found.concepts),
        "images": found.images,
        "iou_threshold": found.iou_threshold,
        "failed": [asdict(failure) for failure in model.failed],
    }
    content = io.BytesIO()
    np.savez(
        content,
        about=np.frombuffer(json.dumps(about).encode(), np.uint8),
        thresholds=found.thresholds.numpy(),
        intersections=found.intersections.numpy(),
        areas=found.areas.numpy(),
        label_areas=found.label_areas.numpy(),
        best_peaks=model.best.peaks.numpy(),
        best_images=model.best.images.numpy(),
        best_maps=model.best.maps.numpy(),
    )
    make_folders(out / TALLIES)
    put(tally_file(out, model.name), content.getvalue(), _MARK)


def load_model(out: Path, name: str) -> DissectedModel:
    """The numbers of a model.

    Raises:
        ValueError: they are not there, or damaged; names the file.
    """
    path = tally_file(out, name)
    try:
        with np.load(io.BytesIO(read_regular(path, _TALLY_BYTES)), allow_pickle=False) as arrays:
            given = {key: arrays[key] for key in arrays.files}
        about = json.loads(given["about"].tobytes())
        numbers = {
            key: torch.from_numpy(given[key])
            for key in ("thresholds", "intersections", "areas", "label_areas")
        }
        concepts = Concepts(**{key: tuple(value) for key, value in about["concepts"].items()})
        best = BestImages(given["best_images"].shape[1])
        best.peaks, best.images, best.maps = (
            torch.from_numpy(given[f"best_{key}"]) for key in ("peaks", "images", "maps")
        )
        found = Dissection(
            concepts=concepts,
            images=about["images"],
            iou_threshold=about["iou_threshold"],
            **numbers,
        )
        failed = tuple(Failure(**failure) for failure in about["failed"])
        return DissectedModel(about["name"], about["layer"], found, best, failed)
    except Exception as error:  # zipfile, NumPy and JSON each have their own
        raise ValueError(f"{path}: it is damaged or missing ({error})") from error


def open_dissection(out: str | os.PathLike[str]) -> dict[str, DissectedModel]:
    """The models of a run by name, as far as they are done: ``.dissection`` has every number, and
    ``.dissection.iou()`` is the whole table.

    Raises:
        ValueError: no such run, or damaged files.
    """
    folder = Path(out)
    names = sorted(path.stem for path in (folder / TALLIES).glob("*.npz"))
    if not names:
        raise ValueError(f"out: {folder} holds no dissection")
    return {name: load_model(folder, name) for name in names}


def failures(models: Sequence[DissectedModel]) -> list[Failure]:
    """Images that any model went without, by index; what only some of them lost says which."""
    found: dict[tuple[int, str], list[DissectedModel]] = {}
    names: dict[int, str] = {}
    for model in models:
        for failure in model.failed:
            found.setdefault((failure.index, failure.reason), []).append(model)
            names[failure.index] = failure.path
    return [
        Failure(
            index,
            names[index],
            reason
            if len(of) == len(models)
            else f"{', '.join(model.name for model in of)}: {reason}",
        )
        for (index, reason), of in sorted(found.items(), key=lambda item: item[0])
    ]


def without_pixels(concepts: Concepts, label_areas: torch.Tensor) -> list[str]:
    """Categories of which no image had a pixel or a label."""
    seen = {concepts.category[label] for label in label_areas.nonzero()[:, 0].tolist() if label}
    return [name for place, name in enumerate(concepts.categories) if place not in seen]


def write_tables(out: Path, models: Sequence[DissectedModel]) -> list[Failure]:
    """Everything but the page; returns the failures."""
    rows = [
        {"model": model.name, "layer": model.layer, **unit._asdict()}
        for model in models
        for unit in model.dissection.units
    ]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    put(out / UNITS, text.getvalue().encode("utf-8", "backslashreplace"), _MARK)
    put(out / PARQUET, _parquet(rows), _MARK)
    lost = failures(models)
    put(out / ERRORS, (failure_line(failure) for failure in lost), _MARK)
    counts = {model.name: _counts(model) for model in models}
    content = {"models": counts, "failed": len({failure.index for failure in lost})}
    put(out / COUNTS, json.dumps(content, indent=2).encode() + b"\n", _MARK)
    return lost


def _counts(model: DissectedModel) -> Mapping[str, Any]:
    found = model.dissection
    return {
        "layer": model.layer,
        "images": found.images,
        "units": len(found.units),
        "detectors": found.detectors,
        "unique_detectors": found.unique_detectors,
        "categories": {name: counts._asdict() for name, counts in found.counts.items()},
        "categories_without_pixels": without_pixels(found.concepts, found.label_areas),
    }


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    arrow, parquet = require("pyarrow", extra="runs"), require("pyarrow.parquet", extra="runs")
    sink = arrow.BufferOutputStream()
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    parquet.write_table(arrow.table(columns), sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content
