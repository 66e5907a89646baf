"""The report: one HTML file that opens anywhere, with every picture and every number inside."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastxkd.cam import render
from fastxkd.pages import charts
from fastxkd.pages.images import fit, place_of, shrink
from fastxkd.pages.numbers import count, finite, number, percent, seconds
from fastxkd.pages.page import render_page
from fastxkd.runs import verdict

if TYPE_CHECKING:
    from fastxkd.runs.comparison import Comparison, GalleryItem

ROLES = ("teacher", "base", "student")
MAPS = {
    "teacher": ("Teacher", "Grad-CAM"),
    "base": ("Base", "Grad-CAM"),
    "student": ("Student", "Grad-CAM"),
    "distilled": ("Distilled", "UniCAM: in the student, not in the base"),
    "residual": ("Residual", "UniCAM: in the base, not in the student"),
}
LAYER_COLUMNS = (
    ("fss", "FSS", "to base"),
    ("fss_teacher", "FSS", "to teacher"),
    ("rs_teacher", "RS", "teacher"),
    ("rs_base", "RS", "base"),
    ("rs_student", "RS", "student"),
    ("rs_distilled", "RS", "distilled"),
    ("rs_residual", "RS", "residual"),
)
_SKIPPED_SHOWN = 200


def write_report(comparison: Comparison, path: str | Path) -> Path:
    """Write ``comparison`` as one self-contained HTML page.

    The file appears whole or not at all: it is written beside ``path`` and then put in its place.

    Args:
        comparison: what was compared; missing numbers (None, NaN) show as a dash.
        path: the file to write; its folder is made if need be.

    Returns:
        ``path``.

    Raises:
        ValueError: ``path`` is a folder.
        ImportError: jinja2, matplotlib or Pillow is missing (extra ``report``).
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path: expected a file such as report.html, got the folder {path}")
    # A file name that is not valid UTF-8 reaches us as lone surrogates, which UTF-8 cannot hold.
    page = render_report(comparison).encode("utf-8", "backslashreplace")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
    return path


def render_report(comparison: Comparison) -> str:
    """The page as text; the same comparison gives the same text."""
    # Outputs that are not the data's classes have other names: equal or not says nothing.
    named = comparison.run.get("accuracy_defined", True)
    return render_page(
        "report.html.j2",
        comparison=comparison,
        verdict=verdict.of(comparison),
        models=[model for role in ROLES for model in comparison.models if model.role == role],
        metrics=_metrics(comparison),
        layer_charts=[drawn for drawn in _layer_charts(comparison) if drawn[-1]],
        training_charts=[drawn for drawn in _training_charts(comparison) if drawn[-1]],
        columns=[
            column
            for column in LAYER_COLUMNS
            if any(finite(getattr(row, column[0])) is not None for row in comparison.layers)
        ],
        epochs=_epochs(comparison),
        gallery=[
            _item(index, item, named) for index, item in enumerate(comparison.gallery, start=1)
        ],
        has_base=verdict.has_base(comparison),
        fidelity=_fidelity(comparison),
        run=_run(comparison.run),
        marks={"teacher": "■", "base": "●", "student": "◆"},
    )


def _fidelity(comparison: Comparison) -> dict[str, Any] | None:
    if comparison.fidelity is None:
        return None
    from fastxkd.runs.fidelity_report import section

    return section(comparison.fidelity)


def _metrics(comparison: Comparison) -> list[dict[str, Any]]:
    """The cards: one measure each, its bars on one scale, and student against base in words."""
    metrics = []
    for change in verdict.changes(comparison):
        values = {model.role: getattr(model, change.key) for model in comparison.models}
        known = [value for value in change.values.values() if value is not None]
        top = max([*known, 1e-12]) if change.unit == "nats" else 1.0
        digits = functools.partial(number, digits=3)
        write = percent if change.unit == "points" else digits
        shares = {
            role: 100 * min(max((value or 0.0) / top, 0), 1)
            for role, value in change.values.items()
        }
        bars = [(role, write(values[role]), shares[role]) for role in ROLES if role in shares]
        metrics.append({"change": change, "bars": bars})
    return metrics


def _layer_charts(comparison: Comparison) -> list[tuple[str, str, str]]:
    rows = comparison.layers
    if not rows:
        return []
    at = list(range(1, len(rows) + 1))
    names = [row.layer for row in rows]
    # Names share 300 px; those that do not fit are numbers, as in the table beside the chart.
    fit = len("".join(names)) + 2 * len(names) <= 44 and all(name.isascii() for name in names)
    axes = {"xlabel": "layer", "ticks": (at, names if fit else [str(index) for index in at])}
    fss = [charts.Series("student and base", "student", [row.fss for row in rows])]
    relevance = [
        charts.Series("base", "base", [row.rs_base for row in rows]),
        charts.Series("student", "student", [row.rs_student for row in rows]),
    ]
    if any(finite(row.fss_teacher) is not None for row in rows):
        to_teacher = [row.fss_teacher for row in rows]
        fss.append(charts.Series("student and teacher", "teacher", to_teacher))
    if any(finite(row.rs_teacher) is not None for row in rows):
        of_teacher = [row.rs_teacher for row in rows]
        relevance.insert(0, charts.Series("teacher", "teacher", of_teacher))
    unique = [
        charts.Series("distilled", "student", [row.rs_distilled for row in rows]),
        charts.Series("residual", "base", [row.rs_residual for row in rows], hollow=True),
    ]
    similar = [v for row in rows for v in map(finite, (row.fss, row.fss_teacher)) if v is not None]
    within = all(0 <= value <= 1 for value in similar)
    return [
        (
            "Feature similarity (FSS)",
            "FSS per layer",
            charts.lines("fss", at, fss, ylim=(0, 1) if within else None, **axes),
        ),
        ("Relevance to the labels (RS)", "RS per layer", charts.lines("rs", at, relevance, **axes)),
        (
            "Gained and left behind (RS)",
            "Distilled and residual RS per layer",
            charts.bars("unique", at, unique, **axes),
        ),
    ]


def _training_charts(comparison: Comparison) -> list[tuple[str, str, str]]:
    drawn = []
    for key, title in (("accuracy", "Accuracy"), ("loss", "Loss")):
        found = {
            role: {epoch["epoch"]: epoch.get(key) for epoch in comparison.history[role]}
            for role in ROLES
            if comparison.history.get(role)
        }
        at = sorted({epoch for values in found.values() for epoch in values})
        series = [
            charts.Series(role, role, [values.get(epoch) for epoch in at])
            for role, values in found.items()
        ]
        percentage = key == "accuracy"
        svg = charts.lines(key, at, series, xlabel="epoch", percent=percentage) if at else ""
        drawn.append((title, f"{title} per epoch", svg))
    return drawn


def _epochs(comparison: Comparison) -> dict[str, Any]:
    rows = [
        {"role": role, **epoch} for role, epochs in comparison.history.items() for epoch in epochs
    ]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return {"columns": columns, "rows": [[_cell(c, row.get(c)) for c in columns] for row in rows]}


def _cell(column: str, value: Any) -> str:
    if column == "seconds":
        return seconds(value)
    if "accuracy" in column:
        return percent(value)
    return number(value, 4) if isinstance(value, float) or value is None else str(value)


def _item(index: int, item: GalleryItem, named: bool) -> dict[str, Any]:
    image = render.to_picture(np.asarray(item.image))
    height, width = image.shape[:2]
    panels = []
    for key, (title, method) in MAPS.items():
        name, chance = item.predictions.get(key, (None, None))
        panel: dict[str, Any] = {
            "key": key,
            "title": title,
            "method": method,
            "prediction": name,
            "probability": chance,
            "right": None if name is None or not (named and item.label) else name == item.label,
            "cosine": item.similarity.get(key),
            "heat": None,
            "note": "",
            "alt": f"{method.split(':')[0]} of the {title.lower()}, image {index}",
        }
        heat = item.maps.get(key)
        known = np.empty(0) if heat is None else heat[np.isfinite(heat)]
        if heat is None or known.size == 0:
            panel["note"] = "no map" if heat is None else "no map: its values are not finite"
        else:
            flat = float(known.max()) - float(known.min()) < 1e-6
            panel["note"] = "flat map: no place stands out" if flat else ""
            panel["alt"] += ": flat" if flat else f": strongest at the {place_of(heat)}"
            panel["heat"] = render.data_uri(render.heat_png(fit(heat, height, width)))
        panels.append(panel)
    return {
        "index": index,
        "label": item.label,
        "size": f"{width} × {height}",
        "image": render.data_uri(render.png(shrink(image))),
        "small": max(height, width) <= 64,
        "panels": panels,
    }


def _run(run: Mapping[str, Any]) -> dict[str, Any]:
    """``Comparison.run`` in the order of the page; keys it does not know come last, as they are."""
    rest = dict(run)
    command = rest.pop("command", None)
    skipped = rest.pop("skipped", None)
    elapsed = rest.pop("elapsed", None)
    data = rest.pop("data", None)
    backends = rest.pop("backends", None) or []
    rows = [_row(row) for row in backends]
    for said_elsewhere in ("accuracy_defined", "base"):
        rest.pop(said_elsewhere, None)
    versions = rest.pop("versions", None) or {}
    measured = _measured(rest)
    groups = {key: value for key, value in rest.items() if isinstance(value, Mapping)}
    return {
        "command": shlex.join(command) if isinstance(command, (list, tuple)) else command,
        "versions": versions,
        "elapsed": elapsed if isinstance(elapsed, Mapping) else {"total": elapsed},
        "data": data if isinstance(data, Mapping) else {"spec": data},
        "backend_columns": list(dict.fromkeys(key for row in rows for key in row)),
        "backends": rows,
        "skipped": skipped,
        "skipped_shown": _SKIPPED_SHOWN,
        "facts": facts_of(rest, but=groups),
        "groups": {"How it was measured": measured}
        | {key: facts_of(value) for key, value in groups.items()},
    }


def _measured(rest: dict[str, Any]) -> dict[str, str]:
    """How the scores and the maps came about; takes what it uses out of ``rest``."""
    found: dict[str, Any] = {}
    features = rest.pop("features", None)
    if isinstance(features, Mapping):
        found["features"] = features.get("what")
        found["numbers per image, at most"] = features.get("limit")
        for role, shapes in (features.get("shapes") or {}).items():
            found[f"features of the {role}"] = {
                layer: count(shape) if isinstance(shape, int) else shape
                for layer, shape in shapes.items()
            }
    else:
        found["features"] = features
    found["images scored"] = rest.pop("score_samples", None)
    found["images explained"] = rest.pop("explained_images", None)
    found["class explained"] = rest.pop("explained_class", None)
    found["layer explained"] = rest.pop("explained_layers", None)
    return facts_of(found)


def facts_of(values: Mapping[str, Any], but: Container[str] = ()) -> dict[str, str]:
    return {
        key: _plain(value) for key, value in values.items() if value is not None and key not in but
    }


def _row(row: Any) -> dict[str, Any]:
    return dict(row) if isinstance(row, Mapping) else row._asdict()  # type: ignore[no-any-return]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        shape = bool(value) and all(type(inner) is int for inner in value)
        return (" × " if shape else ", ").join(map(_plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return count(value) if isinstance(value, int) and value >= 10_000 else str(value)
