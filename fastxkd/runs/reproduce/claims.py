"""What a paper claims, what was measured, and the rule that decides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastxkd.runs.reproduce.statistics import Interval, interval

CONFIDENCE = 0.95
HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided"


@dataclass(frozen=True)
class Part:
    """One number of a claim, measured once for each seed.

    Attributes:
        name: of a layer, a method; what distinguishes it from the claim's other parts.
        values: one per seed, in the order of the seeds; differences where a claim compares, so that
            what a seed does to both sides cancels.
        side: where the claim says the mean lies: "above" or "below" ``bound``.
        decides: False for a number that is shown but is not part of the claim.
        level: not a difference: what one model has by itself; decides nothing.
    """

    name: str
    values: Sequence[float]
    side: Literal["above", "below"] = "above"
    bound: float = 0.0
    decides: bool = True
    level: bool = False

    def __post_init__(self) -> None:
        if self.level and self.decides:
            raise ValueError(f"level: {self.name} is shown, so decides must be False")

    def interval(self, confidence: float = CONFIDENCE) -> Interval:
        return interval(self.values, confidence)

    def clear(self, side: str, confidence: float) -> bool:
        """Whether the interval lies on that side of the bound, all of it."""
        found = self.interval(confidence)
        return found.low > self.bound if side == "above" else found.high < self.bound


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper beside our numbers.

    Attributes:
        id: ``study.what``; stays the same from version to version.
        statement: the paper's sentence in our words.
        paper: the paper's numbers, empty where they are not known.
        measured: what ``parts`` are the numbers of.
        parts: with several that decide, the claim is about all of them.
        note: where our experiment is not the paper's.
        unit: "" for plain numbers, "points" for shares, shown in percentage points.
    """

    id: str
    statement: str
    paper: str
    measured: str
    parts: Sequence[Part]
    note: str = ""
    unit: Literal["", "points"] = ""
    digits: int = 3

    @property
    def study(self) -> str:
        return self.id.partition(".")[0]

    @property
    def deciding(self) -> list[Part]:
        return [part for part in self.parts if part.decides]

    def verdict(self) -> str:
        """Whether it holds.

        A claim about all of its parts holds if each interval lies on the claimed side: no part can
        hide behind another, so no correction is due. It does not hold if some part lies on the
        other side, with intervals widened (Bonferroni) so that all of them together have the stated
        confidence. Anything else is not decided, and so is a single seed.
        """
        parts = self.deciding
        if parts and all(part.clear(part.side, CONFIDENCE) for part in parts):
            return HOLDS
        joint = 1 - (1 - CONFIDENCE) / max(1, len(parts))
        if any(part.clear(_other(part.side), joint) for part in parts):
            return FAILS
        return OPEN

    def rule(self) -> str:
        """In words, from the parts, so that it cannot say anything else than what was done."""
        parts = self.deciding
        bounds = sorted({(part.side, part.bound) for part in parts})
        points = self.unit == "points"
        where = " or ".join(
            f"{side} {100 * bound:g} points" if points and bound else f"{side} {bound:g}"
            for side, bound in bounds
        )
        level = f"{100 * CONFIDENCE:g} %"
        if len(parts) == 1:
            other = _other(parts[0].side)
            return f"holds if the {level} interval lies {where}; does not hold if it lies {other}"
        which = "each on its side: " if len(bounds) > 1 else ""
        return (
            f"holds if the {level} interval of each of the {len(parts)} lies {which}{where}; does "
            f"not hold if one lies on the other side, {level} for all together"
        )

    def write(self, value: float, *, sign: bool = True) -> str:
        """A number of this claim as text; plain characters, for tables in any file."""
        if not math.isfinite(value):
            return "?"
        shown = 100 * value if self.unit == "points" else value
        text = f"{shown:{'+' if sign else ''}.{self.digits}f}"
        return text.lstrip("+-") if float(text) == 0 else text

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not finite becomes None. No times: the same run, the same text."""
        return {
            "id": self.id,
            "statement": self.statement,
            "paper": self.paper,
            "measured": self.measured,
            "unit": self.unit,
            "digits": self.digits,
            "note": self.note,
            "rule": self.rule(),
            "confidence": CONFIDENCE,
            "parts": [_part(part) for part in self.parts],
            "verdict": self.verdict(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Claim:
        """What :meth:`to_json` wrote."""
        plain = ("id", "statement", "paper", "measured", "note", "unit", "digits")
        parts = [
            Part(
                part["name"],
                [math.nan if value is None else value for value in part["values"]],
                *(part[name] for name in ("side", "bound", "decides", "level")),
            )
            for part in content["parts"]
        ]
        return cls(parts=parts, **{name: content[name] for name in plain})


def _part(part: Part) -> dict[str, Any]:
    found = part.interval()
    return {
        "name": part.name,
        "mean": _finite(found.mean),
        "interval": [_finite(found.low), _finite(found.high)],
        "values": [_finite(value) for value in part.values],
        "side": part.side,
        "bound": part.bound,
        "decides": part.decides,
        "level": part.level,
    }


def _other(side: str) -> str:
    return "below" if side == "above" else "above"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
