"""The page of a run over a data set: what was done, what came out, a few images with their maps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastxkd.cam import render
from fastxkd.pages.images import fit, place_of, shrink
from fastxkd.pages.numbers import number
from fastxkd.pages.page import render_page
from fastxkd.runs import reader
from fastxkd.runs.chunks import Summary
from fastxkd.runs.durable import put
from fastxkd.runs.layout import REPORT
from fastxkd.runs.report import facts_of
from fastxkd.runs.sources import Source, spread

TITLES = {
    "gradcam": "Grad-CAM",
    "gradcampp": "Grad-CAM++",
    "xgradcam": "XGrad-CAM",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
    "elementwise": "Element-wise Grad-CAM",
    "eigengradcam": "EigenGrad-CAM",
    "eigencam": "Eigen-CAM",
    "cam": "CAM",
    "finercam": "Finer-CAM",
    "scorecam": "Score-CAM",
    "ablationcam": "Ablation-CAM",
    "unicam-distilled": "UniCAM, distilled",
    "unicam-residual": "UniCAM, residual",
}
_ERRORS_SHOWN = 200


def write_run_report(
    summary: Summary,
    source: Source,
    *,
    gallery: int = 12,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write ``report.html`` into a complete run. Reads the scores chunk by chunk.

    Args:
        summary: what :meth:`fastxkd.runs.chunks.RunWriter.finish` returned.
        source: the data set, for the pictures; images it does not give any more are left out.
        gallery: how many to show, from places all over the data set.
        class_names: of the model's outputs; None: numbers.
    """
    run = reader.open(summary.out)
    wanted = spread(summary.images, gallery) if gallery else []
    totals = Totals(list(run.maps), wanted)
    for chunk in run.done:
        totals.add(run.scores_of(chunk))
    # Other outputs than the data's classes cannot be right or wrong about them.
    if class_names is None and source.classes is not None:
        totals.labelled = 0
    items = [_item(run, source, row, class_names) for row in totals.shown]
    page = render_page(
        "run.html.j2",
        extra="runs",
        summary=summary,
        settings=run.settings,
        model=run.settings["model"]["name"],
        totals=totals,
        unicam=any(name.startswith("unicam") for name in run.maps),
        rows=[(_title(name), *totals.means(name)) for name in run.maps],
        gallery=[item for item in items if item is not None],
        errors=run.errors[:_ERRORS_SHOWN],
        facts=facts_of(_plain_facts(run)),
        data=facts_of(_flat(run.settings["data"])),
        chosen=facts_of(_settings(run.settings)),
    )
    put(summary.out / REPORT, page.encode("utf-8", "backslashreplace"), f"{os.getpid()}-0")


class Totals:
    """Sums over the scores of a run, and the rows of a few images."""

    def __init__(self, arrays: Sequence[str], wanted: Sequence[int]) -> None:
        self.done = self.labelled = self.right = 0
        self.probability = 0.0
        self.shown: list[dict[str, Any]] = []
        self._wanted = set(wanted)
        self._sums = {name: np.zeros(2) for name in arrays}

    def add(self, table: Any) -> None:
        """One file of scores."""
        column = {
            name: table[name].to_numpy(zero_copy_only=False)
            for name in ("label", "predicted", "probability", "status", "index")
        }
        ok = column["status"] == "ok"
        label, predicted = (column[name].astype(np.float64) for name in ("label", "predicted"))
        labelled = ok & ~np.isnan(label)
        self.done += int(ok.sum())
        self.labelled += int(labelled.sum())
        self.right += int((label[labelled] == predicted[labelled]).sum())
        self.probability += float(column["probability"].astype(np.float64)[ok].sum())
        for name, sums in self._sums.items():
            for at, what in enumerate(("mean", "spread")):
                values = table[f"{name}_{what}"].to_numpy(zero_copy_only=False)
                sums[at] += values.astype(np.float64)[ok].sum()
        for place, index in enumerate(column["index"].tolist()):
            if ok[place] and index in self._wanted:
                (row,) = table.slice(place, 1).to_pylist()
                self.shown.append(row)

    def means(self, name: str) -> tuple[float, float]:
        mean, spread = self._sums[name] / max(self.done, 1)
        return (float(mean), float(spread)) if self.done else (float("nan"), float("nan"))

    @property
    def accuracy(self) -> float | None:
        return self.right / self.labelled if self.labelled else None

    @property
    def certainty(self) -> float | None:
        return self.probability / self.done if self.done else None


def _title(array: str) -> str:
    method, _, layer = array.partition("/")
    return f"{TITLES.get(method, method)}, {layer}" if layer else TITLES.get(method, method)


def _named(index: int | None, names: Sequence[str] | None) -> str:
    if index is None:
        return ""
    return names[index] if names is not None and 0 <= index < len(names) else f"class {index}"


def _item(
    run: Any, source: Source, row: Mapping[str, Any], names: Sequence[str] | None
) -> dict[str, Any] | None:
    index = row["index"]
    try:
        sample = source[index]
        picture = _picture(sample.image)
    except Exception:  # a source may lose an image between the work and the report
        return None
    height, width = picture.shape[:2]
    panels = []
    for array in run.maps:
        heat = np.asarray(run.maps[array][index])
        if heat.dtype == np.uint8:
            heat = heat / np.float32(255)
        heat = heat.astype(np.float32)
        top = float(heat.max())
        panel = {"title": _title(array), "heat": None, "note": "", "alt": ""}
        if np.isfinite(top):
            heat = heat / top if top > 1 else heat
            flat = top - float(heat.min()) < 1e-6
            panel["note"] = "flat map: no place stands out" if flat else ""
            where = "flat" if flat else f"strongest at the {place_of(heat)}"
            panel["alt"] = f"{_title(array)} of image {index}: {where}"
            panel["heat"] = render.data_uri(render.heat_png(fit(heat, height, width)))
        else:
            panel["note"] = "no map"
        panels.append(panel)
    label, predicted = row["label"], row["predicted"]
    return {
        "index": index,
        "name": row["name"],
        "label": _named(label, source.classes or names),
        "predicted": _named(predicted, names),
        "target": _named(row["target"], names),
        "probability": row["probability"],
        "right": None
        if label is None or (names is None and source.classes)
        else label == predicted,
        "size": f"{width} × {height}",
        "image": render.data_uri(render.png(shrink(picture))),
        "small": max(height, width) <= 64,
        "panels": panels,
    }


def _picture(image: torch.Tensor) -> render.Picture:
    """``[c, h, w]`` as a person should see it; floats that are no pixels on their own scale."""
    image = image if image.shape[0] in (1, 3) else image[:1]
    if image.dtype != torch.uint8:
        image = image.float().nan_to_num(0, 0, 0)
        low, high = float(image.min()), float(image.max())
        if low < 0 or high > 1:
            image = (image - low) / max(high - low, 1e-12)
    return render.to_picture(image)


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    rest = {k: v for k, v in settings.items() if k not in ("data", "model", "base")}
    for role in ("model", "base"):
        if settings[role] is not None:
            rest[role] = settings[role]["name"]
            rest[f"{role}'s weights"] = settings[role]["weights"]
    return rest


def _plain_facts(run: Any) -> dict[str, Any]:
    facts = dict(run.facts)
    command = facts.pop("command", None)
    facts.pop("backends", None)
    versions = facts.pop("versions", {})
    weights = facts.pop("weights", {})
    scores = facts.pop("unicam_reference", {})
    named = {
        f"weights of the {role}": f"{w['path']} ({w['sha256']})" for role, w in weights.items()
    }
    layers = {
        f"UniCAM's reference at {layer}": ", ".join(
            f"{key} {number(value, 3)}" for key, value in found.items() if isinstance(value, float)
        )
        for layer, found in scores.items()
    }
    return {"command": " ".join(command or []), **facts, **versions, **named, **layers}


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    long = {k: v for k, v in data.items() if isinstance(v, (list, tuple)) and len(v) > 20}
    return {k: f"{len(v):,}" if k in long else v for k, v in data.items()}
