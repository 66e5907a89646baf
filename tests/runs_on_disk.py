"""A small run over a data set, and how tests look at what it left on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastxkd.runs.chunks import Array, RunWriter, Summary

IMAGES, CHUNK = 11, 4
ARRAYS = {"gradcam": Array((3, 5), "float16"), "unicam/layer4": Array((2, 2), "uint8")}
COLUMNS = {"name": "string", "label": "int64", "confidence": "float32", "right": "bool"}
SETTINGS = {"model": "cnn-small", "size": (3, 5), "seed": 0}
FAILED = {5: "cannot identify image file", 10: "truncated"}

_random = np.random.RandomState(0)
GRADCAM = _random.rand(IMAGES, 3, 5).astype(np.float16)
UNICAM = _random.randint(1, 256, (IMAGES, 2, 2)).astype(np.uint8)
CONFIDENCE = _random.rand(IMAGES).astype(np.float32)


def stored() -> dict[str, np.ndarray[Any, Any]]:
    """What a reader finds: rows of failed images are NaN, or 0 in uint8."""
    gradcam, unicam = GRADCAM.copy(), UNICAM.copy()
    gradcam[list(FAILED)], unicam[list(FAILED)] = np.nan, 0
    return {"gradcam": gradcam, "unicam/layer4": unicam}


def writer(out: Path, **changes: Any) -> RunWriter:
    sizes: dict[str, Any] = {"images": IMAGES, "chunk": CHUNK}
    given = {**sizes, "arrays": ARRAYS, "columns": COLUMNS, **changes}
    return RunWriter(out, given.pop("settings", SETTINGS), **given)


def content(rows: range) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Arrays, scores and errors of a chunk; what failed images have in them does not matter."""
    part = slice(rows.start, rows.stop)
    scores = {
        "name": [f"images/{row}.png" for row in rows],
        "label": [None if row in FAILED else row % 3 for row in rows],
        "confidence": CONFIDENCE[part],
        "right": [row % 2 == 0 for row in rows],
    }
    errors = [
        {"index": row, "path": f"images/{row}.png", "reason": FAILED[row]}
        for row in reversed(rows)
        if row in FAILED
    ]
    return {"gradcam": GRADCAM[part], "unicam/layer4": UNICAM[part]}, scores, errors


def write(some: RunWriter, chunk: int) -> None:
    some.write(chunk, *content(some.rows(chunk)))


def complete(out: Path, **changes: Any) -> Summary:
    """Start or continue the run, to its end."""
    with writer(out, **changes) as some:
        for chunk in some.pending():
            write(some, chunk)
        return some.finish()


def tree(out: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def temporaries(out: Path) -> list[str]:
    return [name for name in tree(out) if name.endswith(".tmp")]
