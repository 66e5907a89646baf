"""Images whose zones are known: background, an object, and the mark on it that tells its class.

An image is a function of seed and number alone. Objects, colours, places and backgrounds are drawn
alike for all classes: nothing but the mark gives one away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastxkd.ops._checks import check_choice, check_counts
from fastxkd.runs.data import DEFAULT_MEAN, DEFAULT_STD, ArraySplit, ImageData, random_bits

# What the five-band score calls them: an object localises, its mark discriminates.
BACKGROUND, LOCALISATION, DISCRIMINATIVE = 0.0, 0.4, 0.9
ZONES = ("mark", "patch")
_SMALLEST = 16
_CHUNK = 128

Array = np.ndarray
Shape = Callable[[Array, Array], Array]

# In coordinates of the patch: u to the right, v downwards, both from -1 to 1.
MARKS: dict[str, Shape] = {
    "disc": lambda u, v: u * u + v * v < 0.64,
    "ring": lambda u, v: (u * u + v * v < 0.95) & (u * u + v * v > 0.36),
    "horizontal bar": lambda u, v: (abs(v) < 0.28) & (abs(u) < 0.95),
    "vertical bar": lambda u, v: (abs(u) < 0.28) & (abs(v) < 0.95),
    "plus": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.22) & (np.maximum(abs(u), abs(v)) < 0.95),
    "cross": lambda u, v: (abs(abs(u) - abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 0.9),
    "triangle": lambda u, v: (abs(v) < 0.85) & (abs(u) < (v + 0.85) / 1.8),
    "frame": lambda u, v: (np.maximum(abs(u), abs(v)) < 0.9) & (np.maximum(abs(u), abs(v)) > 0.5),
    "two dots": lambda u, v: (abs(u) - 0.55) ** 2 + v * v < 0.13,
    "corner": lambda u, v: (np.maximum(abs(u), abs(v)) < 0.9) & ((u < -0.35) | (v > 0.35)),
    "checks": lambda u, v: (np.maximum(abs(u), abs(v)) < 0.9) & (u * v > 0),
    "two bars": lambda u, v: (abs(abs(u) - 0.55) < 0.26) & (abs(v) < 0.9),
}


class ThreeZones(NamedTuple):
    """Of :func:`three_zones`."""

    images: Tensor  # uint8 [n, channels, size, size]
    labels: Tensor  # int64 [n]
    truth: Tensor  # float32 [n, size, size]: 0, 0.4 on the object, 0.9 on what tells its class


def three_zones(
    count: int,
    *,
    classes: int = 10,
    size: int = 32,
    channels: int = 3,
    zone: str = "mark",
    seed: int = 0,
    first: int = 0,
) -> ThreeZones:
    """Images for the five-band score (Tjoa & Guan 2020), after the zones of Han et al. (2023).

    Neither paper's images are to be had: a round object of some colour, place and size on a
    background of two shades and noise, and on the object one of twelve dark marks, the class.

    Args:
        count: images, their classes in turn.
        classes: 2 to 12.
        size: side in pixels, at least 16.
        channels: 1 or 3.
        zone: what tells the class: the ``"mark"`` itself, or all of the square ``"patch"`` it may
            take up, since where it is not tells, too. An interpretation.
        seed, first: image i of the answer is the image ``first + i`` of this seed, whatever else is
            asked for at the same time.

    Raises:
        ValueError, TypeError: numbers that do not fit.

    >>> found = three_zones(4, classes=2, size=16)
    >>> found.images.shape, found.labels.tolist(), found.truth.unique().tolist()[0]
    (torch.Size([4, 3, 16, 16]), [0, 1, 0, 1], 0.0)
    """
    check_counts(count=count, classes=classes, size=size)
    check_choice("zone", zone, ZONES)
    if not 2 <= classes <= len(MARKS):
        raise ValueError(f"classes: expected 2 to {len(MARKS)}, got {classes}")
    if size < _SMALLEST:
        raise ValueError(f"size: expected at least {_SMALLEST} pixels, got {size}")
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 or 3, got {channels}")
    if type(seed) is not int:
        raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
    if type(first) is not int or first < 0:
        raise ValueError(f"first: expected an int of 0 or more, got {first}")
    numbers = np.arange(first, first + count)
    parts = [
        _draw(numbers[start : start + _CHUNK], classes, size, channels, zone, seed)
        for start in range(0, count, _CHUNK)
    ]
    images, truth = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    return ThreeZones(images, torch.from_numpy(numbers % classes), truth)


def _draw(
    numbers: Array, classes: int, size: int, channels: int, zone: str, seed: int
) -> tuple[Array, Array]:
    draw = _Draws(seed, numbers)
    place = np.arange(size) + 0.5
    radius = size * draw(0.26, 0.4)
    x, y = (radius + (size - 2 * radius) * draw(0, 1) for _ in range(2))
    # A square patch of half the radius that lies a quarter of it off the centre stays inside.
    half, turn, off = 0.5 * radius, draw(0, 2 * np.pi), 0.25 * radius * draw(0, 1)
    on_object = (place[:, None] - y) ** 2 + (place - x) ** 2 < radius**2
    u = (place - x - off * np.cos(turn)) / half * np.ones((1, size, 1))
    v = (place[:, None] - y - off * np.sin(turn)) / half * np.ones((1, 1, size))
    on_patch = np.maximum(abs(u), abs(v)) < 1
    on_mark = np.zeros(on_patch.shape, dtype=bool)
    for label, mark in enumerate(list(MARKS.values())[:classes]):
        ours = numbers % classes == label
        on_mark[ours] = mark(u[ours], v[ours])
    # In planes: [n, channels, size, size].
    shape = (len(numbers), channels, 1, 1)
    low, rise = draw(0.15, 0.4, channels).reshape(shape), draw(-0.15, 0.15, 1)[:, None]
    ground = low + rise * (place / size + place[:, None] / size - 1)[None, None]
    body, ink = draw(0.55, 0.85, channels).reshape(shape), draw(0.0, 0.12, channels).reshape(shape)
    colours = np.where(on_object[:, None], body, ground)
    colours = np.where((on_mark & on_object)[:, None], ink, colours)
    colours = colours + draw(-0.05, 0.05, channels * size * size).reshape(colours.shape)
    images = np.clip(np.rint(255 * colours), 0, 255).astype(np.uint8)
    tells = on_mark if zone == "mark" else on_patch
    zones = np.where(tells & on_object, DISCRIMINATIVE, LOCALISATION)
    return images, np.where(on_object, zones, BACKGROUND).astype(np.float32)


class _Draws:
    """Numbers for each image that depend on seed, image and how often one has asked before."""

    def __init__(self, seed: int, numbers: Array) -> None:
        self.seed, self.numbers, self.asked = seed, numbers, 0

    def __call__(self, low: float, high: float, each: int | None = None) -> Array:
        """``[n, 1, 1]``, or ``[n, each, 1]``: uniform from low to high."""
        self.asked += 1
        width = each or 1
        place = self.numbers[:, None] * width + np.arange(width)
        bits = random_bits(self.seed, self.asked, place.reshape(-1))
        unit = (bits >> np.uint64(11)).astype(np.float64) / 2**53
        return (low + (high - low) * unit).reshape(-1, width, 1)


@dataclass(frozen=True)
class ThreeZoneData:
    """Of :func:`three_zone_data`: images for a run, and the zones of each."""

    data: ImageData
    train_truth: Tensor
    test_truth: Tensor


def three_zone_data(
    train: int = 2000,
    test: int = 500,
    *,
    classes: int = 10,
    size: int = 32,
    channels: int = 3,
    zone: str = "mark",
    seed: int = 0,
) -> ThreeZoneData:
    """:func:`three_zones` as data that models can be trained on; test images follow the others.

    >>> found = three_zone_data(20, 10, classes=4, size=16)
    >>> len(found.data.train), len(found.data.test), found.data.classes[:2], len(found.test_truth)
    (20, 10, ['disc', 'ring'], 10)
    """
    options = {"classes": classes, "size": size, "channels": channels, "seed": seed}
    check_counts(train=train, test=test)
    one = three_zones(train, zone=zone, **options)
    other = three_zones(test, zone=zone, first=train, **options)
    data = ImageData(
        # Train's number is where the test images begin.
        f"three-zones:{classes}:{channels}:{seed}:{train}",
        list(MARKS)[:classes],
        ArraySplit(one.images, one.labels.numpy()),
        ArraySplit(other.images, other.labels.numpy()),
        channels,
        size,
        DEFAULT_MEAN * channels,
        DEFAULT_STD * channels,
        "Synthetic: a mark that tells the class, on an object, on a background. "
        f"{train:,} training and {test:,} test images.",
    )
    return ThreeZoneData(data, one.truth, other.truth)
