"""The page of a dissection: detectors per category, concepts, best units with their images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastxkd._extras import require
from fastxkd.cam import render
from fastxkd.metrics.concept_scores import Unit
from fastxkd.pages import charts
from fastxkd.pages.page import render_page
from fastxkd.runs.concept_data import ConceptSource
from fastxkd.runs.dissected import REPORT, RUN, DissectedModel, failures, without_pixels
from fastxkd.runs.durable import put, read_regular
from fastxkd.runs.layout import RUN_BYTES
from fastxkd.runs.report import facts_of
from fastxkd.runs.run_report import _flat

ROLES = ("teacher", "base", "student")
_MARKS = {"teacher": "■", "base": "●", "student": "◆"}
_ERRORS_SHOWN, _CONCEPTS_SHOWN = 200, 60
_SIDE = 160
# Outside of its mask a picture is grey and dark; the concept's border is drawn in this colour.
_DIM, _BORDER = 0.35, (255, 214, 0)


def write_dissection_report(
    out: Path, models: Sequence[DissectedModel], source: ConceptSource, *, gallery: int = 12
) -> None:
    """Write ``report.html`` of a dissection.

    Args:
        out: the directory of the run.
        models: what was found.
        source: the data, for the pictures; images it does not give any more are left out.
        gallery: units shown per model, the best first.
    """
    run = json.loads(read_regular(out / RUN, RUN_BYTES))
    markup = require("markupsafe", extra="runs").Markup
    lost, found = failures(models), concepts_found(models)
    first = models[0].dissection
    page = render_page(
        "dissection.html.j2",
        extra="runs",
        models=[
            {"model": m, "role": role, "mark": _MARKS[role], "units": units(m, source, gallery)}
            for m, role in zip(models, roles([m.name for m in models]), strict=True)
        ],
        categories=first.concepts.categories,
        chart=markup(chart(models)),
        found=found[:_CONCEPTS_SHOWN],
        more_found=max(0, len(found) - _CONCEPTS_SHOWN),
        empty=without_pixels(first.concepts, first.label_areas),
        composed=run["settings"]["data"]["data"].startswith("composed"),
        images=len(source),
        failed=len({failure.index for failure in lost}),
        errors=lost[:_ERRORS_SHOWN],
        more_errors=max(0, len(lost) - _ERRORS_SHOWN),
        chosen=facts_of(_settings(run["settings"])),
        data=facts_of(_flat(run["settings"]["data"])),
        facts=facts_of(_plain(run["facts"])),
    )
    put(out / REPORT, page.encode("utf-8", "backslashreplace"), "0-0")


def roles(names: Sequence[str]) -> list[str]:
    """A colour for each model: its own where it is called like a role, else one that is left."""
    left = [role for role in ("student", "base", "teacher") if role not in names]
    return [
        name if name in ROLES else (left.pop(0) if left else ROLES[place % len(ROLES)])
        for place, name in enumerate(names)
    ]


def chart(models: Sequence[DissectedModel]) -> str:
    """Detectors per category; empty for more models than there are colours."""
    if len(models) > len(ROLES):
        return ""
    names = models[0].dissection.concepts.categories
    at = list(range(1, len(names) + 1))
    series = [
        charts.Series(m.name, role, [m.dissection.counts[name].detectors for name in names])
        for m, role in zip(models, roles([m.name for m in models]), strict=True)
    ]
    return charts.bars("detectors", at, series, xlabel="category", ticks=(at, list(names)))


def concepts_found(models: Sequence[DissectedModel]) -> list[dict[str, Any]]:
    """Every concept that some unit detects: how many do in each model, and the best IoU."""
    found: dict[int, dict[str, Any]] = {}
    for place, model in enumerate(models):
        for unit in model.dissection.units:
            if not unit.detector:
                continue
            row = found.setdefault(
                unit.label,
                {
                    "name": unit.name,
                    "category": unit.category,
                    "units": [0] * len(models),
                    "best": 0.0,
                },
            )
            row["units"][place] += 1
            row["best"] = max(row["best"], unit.iou)
    return sorted(found.values(), key=lambda row: (-sum(row["units"]), -row["best"], row["name"]))


def units(model: DissectedModel, source: ConceptSource, wanted: int) -> list[dict[str, Any]]:
    """The best units, no concept twice before every concept had its turn, with their pictures."""
    best = sorted(model.dissection.units, key=lambda unit: (-unit.iou, unit.unit))
    seen: dict[int, int] = {}
    order: list[tuple[int, int, Unit]] = []
    for place, unit in enumerate(best):
        if unit.label:
            seen[unit.label] = turn = seen.get(unit.label, 0) + 1
            order.append((turn, place, unit))
    chosen = [unit for _, _, unit in sorted(order, key=lambda row: row[:2])[:wanted]]
    return [{"unit": unit, "pictures": _pictures(model, source, unit)} for unit in chosen]


def _pictures(model: DissectedModel, source: ConceptSource, unit: Unit) -> list[dict[str, Any]]:
    pictures = []
    best = model.best
    for index, map in zip(best.images[unit.unit].tolist(), best.maps[unit.unit], strict=True):
        if index < 0:
            continue
        try:
            sample = source[index]
        except Exception:  # a source may lose an image between the work and the report
            continue
        mask = F.interpolate(map[None, None], (_SIDE, _SIDE), mode="bilinear")[0, 0]
        above = mask.numpy() > unit.threshold
        concept = (sample.masks == unit.label).any(0) if len(sample.masks) else torch.zeros(1, 1)
        concept = F.interpolate(concept[None, None].float(), (_SIDE, _SIDE))[0, 0] > 0.5
        whole = unit.label in sample.labels
        shown = whole or bool(concept.any())
        pictures.append(
            {
                "index": index,
                "name": sample.name,
                "image": render.data_uri(render.png(_lit(sample.image, above, concept.numpy()))),
                "shown": shown,
                "alt": f"Image {index}: unit {unit.unit} is on in {above.mean():.0%} of it;"
                f" {unit.name} is {'' if shown else 'not '}there",
            }
        )
    return pictures


def _lit(
    image: torch.Tensor, above: np.ndarray[Any, Any], concept: np.ndarray[Any, Any]
) -> render.Picture:
    """The image where the unit is on, dim grey elsewhere, the concept's border on it."""
    small = F.interpolate(image[None].float(), (_SIDE, _SIDE), mode="bilinear", antialias=True)
    picture = render.to_picture(small[0].round().clamp(0, 255).to(torch.uint8))
    grey = picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    lit = np.where(above[..., None], picture, (_DIM * grey)[..., None])
    border = concept & ~_shrunk(concept)
    lit[border] = _BORDER
    done: render.Picture = np.rint(lit).astype(np.uint8)
    return done


def _shrunk(mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Without the pixels at its edge."""
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return inner


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    rest = {k: v for k, v in settings.items() if k not in ("data", "models")}
    for name, model in settings["models"].items():
        rest[name] = f"{model['name']}, layer {model['layer']}"
        rest[f"weights of {name}"] = model["weights"]
    return rest


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    left_out = ("command", "backends", "versions", "weights", "unicam_reference")
    rest = {k: v for k, v in facts.items() if k not in left_out}
    files = {f"file of {k}": f"{v['path']} ({v['sha256']})" for k, v in facts["weights"].items()}
    return {"command": " ".join(facts["command"]), **rest, **facts["versions"], **files}
