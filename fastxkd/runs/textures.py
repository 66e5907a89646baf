"""Grounds to put things on: three photographs that come with scikit-image, and what can be drawn.

Sixteen of them, so that each covers a small share of a data set: a unit that is on in half a per
cent of all positions can reach an IoU of 0.05 only with a concept that covers less than a tenth of
the pixels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastxkd._extras import require

Plane = np.ndarray[Any, Any]
PHOTOGRAPHED = ("grass", "gravel", "brick")
DRAWN = (
    "lined", "banded", "checked", "dotted", "grid", "zigzag", "waves", "rings", "scales", "woven",
    "speckled", "cloudy", "blotched",
)  # fmt: skip
TEXTURES = (*PHOTOGRAPHED, *DRAWN)


def ground(texture: str, side: int, random: np.random.RandomState) -> Plane:
    """uint8 [side, side, 3]: a texture at a random place, level and contrast, with a faint tint."""
    if texture in PHOTOGRAPHED:
        photo = _photograph(texture)
        photo = np.tile(photo, [-(-side // length) for length in photo.shape])
        y, x = (random.randint(length - side + 1) for length in photo.shape)
        grey = photo[y : y + side, x : x + side]
    else:
        grey = np.asarray(_drawn(texture, side, random), np.float64)
    grey = (grey - grey.mean()) / max(float(grey.std()), 1e-9)
    level, contrast = random.uniform(90, 180), random.uniform(20, 45)
    picture = level + contrast * grey[..., None] + random.uniform(-12, 12, 3)
    return np.clip(picture, 0, 255).astype(np.uint8)


@lru_cache(maxsize=len(PHOTOGRAPHED))
def _photograph(name: str) -> Plane:
    grey: Plane = getattr(require("skimage.data", extra="concepts"), name)()
    return grey.astype(np.float64)


def _drawn(texture: str, side: int, random: np.random.RandomState) -> Plane:
    """A pattern of random direction and size; any scale of grey."""
    if texture == "speckled":
        return random.normal(size=(side, side))
    if texture in ("cloudy", "blotched"):
        coarse = torch.from_numpy(random.normal(size=(1, 1, 9, 9)))
        soft = F.interpolate(coarse, (side, side), mode="bicubic")[0, 0].numpy()
        return np.asarray(soft if texture == "cloudy" else soft > 0)
    period, angle = random.uniform(12, 24) * side / 224, random.uniform(0, np.pi)
    y, x = (np.mgrid[:side, :side] - random.uniform(0.25, 0.75, (2, 1, 1)) * side) / period
    # Along and across, in periods, and the places within a period.
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    in_u, in_v = u % 1, v % 1
    if texture == "lined":
        return in_u < 0.2
    if texture == "banded":
        return np.sin(np.pi * u)
    if texture == "checked":
        return (in_u < 0.5) ^ (in_v < 0.5)
    if texture == "dotted":
        return np.hypot(in_u - 0.5, in_v - 0.5) < 0.3
    if texture == "grid":
        return (in_u < 0.15) | (in_v < 0.15)
    if texture == "zigzag":
        return (u + np.abs(in_v - 0.5)) % 1 < 0.35
    if texture == "waves":
        return np.sin(2 * np.pi * u + 1.8 * np.sin(np.pi * v))
    if texture == "rings":
        return np.sin(2 * np.pi * np.hypot(u, v))
    if texture == "scales":
        shifted = (u + 0.5 * (np.floor(v) % 2)) % 1
        return np.hypot(shifted - 0.5, in_v) % 0.6
    assert texture == "woven", texture
    return np.where((np.floor(u) + np.floor(v)) % 2, 3 * u % 1, 3 * v % 1) < 0.4
