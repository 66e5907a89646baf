"""Pictures and maps at the size a page shows them at."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastxkd._extras import require
from fastxkd.cam import render

_LONGEST_SIDE = 512


def shrink(image: render.Picture) -> render.Picture:
    height, width = image.shape[:2]
    scale = _LONGEST_SIDE / max(height, width)
    if scale >= 1:
        return image
    pillow = require("PIL.Image", extra="report")
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.asarray(pillow.fromarray(image).resize(size, pillow.Resampling.LANCZOS))


def fit(heat: np.ndarray[Any, Any], height: int, width: int) -> np.ndarray[Any, Any]:
    """The map at the size it will be shown at; models may see an image at different sizes."""
    scale = min(1.0, _LONGEST_SIDE / max(height, width))
    size = (max(round(height * scale), 1), max(round(width * scale), 1))
    return render.resize(heat, size)


def place_of(heat: np.ndarray[Any, Any]) -> str:
    height, width = heat.shape
    row, column = np.unravel_index(int(np.nanargmax(heat)), heat.shape)
    down = ("upper", "middle", "lower")[min(3 * int(row) // height, 2)]
    across = ("left", "centre", "right")[min(3 * int(column) // width, 2)]
    return "centre" if (down, across) == ("middle", "centre") else f"{down} {across}"
