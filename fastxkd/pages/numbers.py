"""Numbers as people read them: dashes for what is missing, true minus signs, thin spaces."""

from __future__ import annotations

import math
from typing import Any


def finite(value: Any) -> float | None:
    """The value as a float, or None where it is missing, NaN or infinite."""
    return float(value) if value is not None and math.isfinite(value) else None


def number(value: Any, digits: int = 2, sign: bool = False) -> str:
    """``0.82``, ``−0.02``, ``+0.02``; a dash for what was not measured."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    # "-0.00" says less than nothing.
    text = text.lstrip("+-") if float(text) == 0 else text
    return text.replace("-", "−")


def score(value: Any) -> str:
    """Four digits: relevance scores are small."""
    return number(value, 4)


def percent(value: Any, sign: bool = False) -> str:
    """``84.2 %``."""
    text = number(None if value is None else 100 * value, 1, sign)
    return text if text == "–" else f"{text}\u202f%"


def count(value: Any) -> str:
    """``24,138``."""
    return f"{value:,}"


def seconds(value: Any) -> str:
    """``0.84 s``, ``12.3 s``, ``4 min 05 s``, ``1 h 02 min``."""
    if finite(value) is None:
        return "–"
    if value < 59.95:
        return f"{value:.{2 if value < 9.995 else 1}f}\u202fs"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60}\u202fmin {whole % 60:02d}\u202fs"
    return f"{whole // 3600}\u202fh {whole % 3600 // 60:02d}\u202fmin"
