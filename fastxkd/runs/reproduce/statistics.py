"""Confidence intervals over a few seeds, by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """A mean and what a confidence interval says of it; NaN where it says nothing."""

    mean: float
    low: float
    high: float


def t_within(t: float, freedom: int) -> float:
    """P(|T| < t) of Student's t; a finite sum for whole degrees of freedom.

    (Abramowitz and Stegun 26.7.3 and 26.7.4.)

    >>> round(t_within(2.776445, 4), 6)
    0.95
    """
    return _within(math.atan(t / math.sqrt(freedom)), freedom)


def _within(angle: float, freedom: int) -> float:
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = cosine if odd else 1.0, 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * cosine * cosine
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(confidence: float, freedom: int) -> float:
    """The t with P(|T| < t) = ``confidence``.

    Raises:
        ValueError: a confidence beyond (0, 1), no degree of freedom.

    >>> round(t_quantile(0.95, 2), 4)
    4.3027
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number in (0, 1), got {confidence}")
    if freedom < 1:
        raise ValueError(f"freedom: expected at least 1, got {freedom}")
    low, high = 0.0, math.pi / 2
    # Halving an angle: t itself has no upper end to begin with.
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The t interval of the mean of independent values: one for each seed.

    Of paired measurements give the differences. Normal differences are assumed; nobody can check
    that on five of them. One value has no interval, and a value that is not finite leaves nothing
    to say.

    >>> [round(value, 3) for value in interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    >>> interval([1.0])
    Interval(mean=1.0, low=nan, high=nan)
    """
    count = len(values)
    if not count or not all(map(math.isfinite, values)):
        return Interval(math.nan, math.nan, math.nan)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.nan, math.nan)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = t_quantile(confidence, count - 1) * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half)


def slope(at: Sequence[float], values: Sequence[float]) -> float:
    """Of the least-squares line through ``values`` over ``at``.

    >>> slope([1, 2, 3], [0.0, 0.5, 1.0])
    0.5
    """
    centre = math.fsum(at) / len(at)
    spread = math.fsum((x - centre) ** 2 for x in at)
    if not spread:
        raise ValueError(f"at: expected at least two places, got {list(at)}")
    return math.fsum((x - centre) * y for x, y in zip(at, values, strict=True)) / spread


def differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """first - second, seed by seed."""
    return [a - b for a, b in zip(first, second, strict=True)]
