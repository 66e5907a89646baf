"""The panel over time: how the scores moved, and the probe's maps as a film strip, in one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fastxkd.cam import render
from fastxkd.pages import charts
from fastxkd.pages.images import shrink
from fastxkd.pages.numbers import count, number, score
from fastxkd.pages.page import render_page
from fastxkd.train._log import Record, merged
from fastxkd.train._probe import shown
from fastxkd.train.sinks import write_whole

if TYPE_CHECKING:
    from fastxkd.train.monitor import ExplanationMonitor

# A chart's width has room for no more points.
MOST_POINTS = 120
# Pictures side by side in a strip, so that the last is in sight.
MOST_FRAMES = 7
MOST_IMAGES = 16
_ROLES = {"student": "Student", "teacher": "Teacher", "base": "Base"}
_MARKS = {"teacher": "■", "base": "●", "student": "◆"}
# Title, whether it lies in [0, 1], and series: measure, name in the legend, colour, hollow.
_CHARTS: tuple[tuple[str, bool, tuple[tuple[str, str, str, bool], ...]], ...] = (
    ("Agreement of maps", True, (("agreement", "student and teacher", "student", False),)),
    (
        "Feature similarity (FSS)",
        True,
        (
            ("fss_teacher", "student and teacher", "teacher", False),
            ("fss", "student and base", "base", False),
        ),
    ),
    (
        "Relevance to the labels (RS)",
        False,
        (
            ("rs_teacher", "teacher", "teacher", False),
            ("rs_base", "base", "base", False),
            ("rs_student", "student", "student", False),
        ),
    ),
    (
        "Gained and left behind (RS)",
        False,
        (
            ("rs_distilled", "distilled", "student", False),
            ("rs_residual", "residual", "base", True),
        ),
    ),
)
_STRIPS = (
    ("student", "Student", "what speaks for the class, by "),
    ("distilled", "Distilled", "UniCAM: in the student, not in the base"),
    ("residual", "Residual", "UniCAM: in the base, not in the student"),
)


def write_film(monitor: ExplanationMonitor, path: str | Path) -> Path:
    """Write the page of a monitor; the file appears whole or not at all.

    Returns:
        ``path``.

    Raises:
        ValueError: ``path`` is a folder.
        ImportError: jinja2, matplotlib or Pillow is missing (extra ``report``).
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path: expected a file such as film.html, got the folder {path}")
    # Names that are not valid UTF-8 reach us as lone surrogates, which UTF-8 cannot hold.
    write_whole(path, render_film(monitor).encode("utf-8", "backslashreplace"))
    return path


def render_film(monitor: ExplanationMonitor) -> str:
    """The page as text; the same monitor gives the same text."""
    records = grouped(monitor.history, MOST_POINTS)
    return render_page(
        "film.html.j2",
        layers=[_layer(layer, records) for layer in monitor.layers],
        table=_table(records),
        records=len(monitor.history),
        images=list(_images(monitor)),
        left_out=0 if monitor.probe is None else max(0, len(monitor.probe.images) - MOST_IMAGES),
        frames=len(monitor.frames),
        facts=_facts(monitor.settings()),
        summary=_summary(monitor.history, monitor.layers),
        last=monitor.history[-1].step if monitor.history else None,
        marks=_MARKS,
    )


def grouped(records: Sequence[Record], most: int) -> list[Record]:
    """At most ``most`` records: means of as many neighbours as it takes."""
    size = -(-len(records) // most)
    return [merged(records[i : i + size]) for i in range(0, len(records), size)] if size else []


def _layer(layer: str, records: Sequence[Record]) -> dict[str, Any]:
    drawn = []
    for title, share, measures in _CHARTS:
        # A score comes when a pool is full: its line runs over those steps only.
        names = [f"{layer}/{measure}" for measure, *_ in measures]
        rows = [r for r in records if any(name in r.values for name in names)]
        series = [
            charts.Series(label, role, [r.values.get(name) for r in rows], hollow=hollow)
            for name, (_, label, role, hollow) in zip(names, measures, strict=True)
            if any(name in r.values for r in rows)
        ]
        if not series:
            continue
        values = [v for one in series for v in one.values if v is not None and v == v]
        within = share and all(0 <= value <= 1 for value in values)
        svg = charts.lines(
            f"{layer}-{title}", [r.step for r in rows], series, xlabel="step",
            ylim=(0, 1) if within else None,
        )  # fmt: skip
        if svg:
            drawn.append((title, f"{title} of {layer} over the steps", svg))
    return {"name": layer, "charts": drawn}


def _table(records: Sequence[Record]) -> dict[str, Any]:
    columns = list(dict.fromkeys(name for record in records for name in record.values))
    return {
        "columns": columns,
        "rows": [[count(r.step), *(score(r.values.get(c)) for c in columns)] for r in records],
    }


def _summary(history: Sequence[Record], layers: Sequence[str]) -> list[str]:
    """First and last of what was measured more than once."""
    sentences = []
    words = {
        "agreement": "agreement with the teacher",
        "fss_teacher": "FSS with the teacher",
        "rs_student": "RS",
    }
    for layer in layers:
        parts = []
        for measure, what in words.items():
            name = f"{layer}/{measure}"
            values = [record.values[name] for record in history if name in record.values]
            if len(values) > 1:
                parts.append(f"{what} {number(values[0])} → {number(values[-1])}")
        if parts:
            sentences.append(f"{layer}: {', '.join(parts)}.")
    return sentences


def _images(monitor: ExplanationMonitor) -> Iterator[dict[str, Any]]:
    """Of every image of the probe the strips of all layers."""
    probe, frames = monitor.probe, _spread(monitor.frames, MOST_FRAMES)
    if probe is None or not frames:
        return
    for i, picture in enumerate(probe.picture[:MOST_IMAGES]):
        small = shrink(picture)
        strips = []
        for layer in monitor.layers:
            fixed = [
                _panel(probe.fixed, f"{layer}/{role}", i, small, _ROLES[role], role)
                for role in ("teacher", "base")
                if f"{layer}/{role}" in probe.fixed
            ]
            for key, title, what in _STRIPS:
                name = f"{layer}/{key}"
                moving = [
                    _panel(f.maps, name, i, small, f"step {count(f.step)}", key)
                    for f in frames
                    if name in f.maps
                ]
                if moving:
                    here = fixed if key == "student" else []
                    strips.append(
                        {
                            "layer": layer,
                            "title": title,
                            "what": what + monitor.method if key == "student" else what,
                            "panels": here + moving,
                        }
                    )
        label = None if probe.labels is None else int(probe.labels[i])
        yield {
            "index": i + 1,
            "label": label,
            "image": render.data_uri(render.png(small)),
            "size": f"{picture.shape[1]} × {picture.shape[0]}",
            "small": max(picture.shape[:2]) <= 64,
            "strips": strips,
        }


def _panel(
    maps: Mapping[str, Tensor], name: str, index: int, picture: Any, title: str, key: str
) -> dict[str, Any]:
    values = maps[name][index].numpy()
    known = values[np.isfinite(values)]
    note = ""
    if known.size == 0:
        note = "no map: its values are not finite"
    elif float(known.max()) - float(known.min()) < 1e-6:
        note = "flat map"
    heat = None
    if known.size:
        heat = render.data_uri(render.heat_png(shown(values, picture.shape[:2])))
    alt = f"{name}, {title}, image {index + 1}{': ' + note if note else ''}"
    return {"title": title, "key": key, "heat": heat, "note": note, "alt": alt}


def _spread(frames: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` of them, evenly apart, the first and the last among them."""
    if len(frames) <= most:
        return list(frames)
    return [frames[round(i)] for i in np.linspace(0, len(frames) - 1, most)]


def _facts(settings: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for key, value in settings.items()
    }
