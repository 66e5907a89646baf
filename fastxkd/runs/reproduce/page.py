"""The report of a reproduction: one page with every claim, its numbers and its verdict."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fastxkd.pages import page as pages
from fastxkd.runs.durable import put
from fastxkd.runs.reproduce.claims import FAILS, HOLDS, Claim, Part
from fastxkd.runs.reproduce.table import METHOD, TITLES, Outcome, facts_of, summary

_MARKS = {HOLDS: ("right", "✓"), FAILS: ("wrong", "✗")}


def write_page(outcome: Outcome, path: Path) -> None:
    """Write ``outcome`` as one self-contained HTML page; whole or not at all.

    Raises:
        ImportError: jinja2 is missing (extra ``report``).
    """
    put(path, render_page(outcome).encode("utf-8", "backslashreplace"), "reproduce")


def render_page(outcome: Outcome) -> str:
    return pages.render_page(
        "claims.html.j2",
        title=f"Of {len(outcome.claims)} claims {summary(outcome)}",
        studies=[
            (study, TITLES.get(study, study), [_card(claim) for claim in claims])
            for study, claims in outcome.by_study().items()
        ],
        seeds=len(outcome.settings["seeds"]),
        notices=[text for text in outcome.settings.get("notices", ()) if text],
        remark=outcome.settings.get("remark", ""),
        method=METHOD,
        settings=facts_of(
            {k: v for k, v in outcome.settings.items() if k not in ("notices", "remark")}
        ),
        facts=facts_of(outcome.facts),
    )


def _card(claim: Claim) -> dict[str, Any]:
    verdict = claim.verdict()
    kind, mark = _MARKS.get(verdict, ("muted", "–"))
    scale = _scale([part for part in claim.parts if not part.level])
    return {
        "claim": claim,
        "verdict": verdict,
        "kind": kind,
        "mark": mark,
        "rule": claim.rule(),
        "rows": [_row(claim, part, scale) for part in claim.parts],
    }


def _row(claim: Claim, part: Part, scale: tuple[float, float]) -> dict[str, Any]:
    found = part.interval()
    mean, low, high = (claim.write(value, sign=not part.level) for value in found)
    drawn = not part.level and all(map(math.isfinite, found))
    return {
        "name": part.name,
        "mean": mean,
        "interval": f"{low} to {high}",
        "values": ", ".join(claim.write(value, sign=not part.level) for value in part.values),
        "side": part.side if part.decides else "",
        "decides": part.decides,
        # Of the width of a line from the scale's low to its high end, in percent.
        "line": [_place(value, scale) for value in (found.low, found.high, found.mean, part.bound)]
        if drawn
        else None,
    }


def _scale(parts: list[Part]) -> tuple[float, float]:
    """One for all parts of a claim, with their bounds on it."""
    ends = [
        value for part in parts for value in (*part.interval(), part.bound) if math.isfinite(value)
    ]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _place(value: float, scale: tuple[float, float]) -> float:
    low, high = scale
    return round(100 * min(max((value - low) / (high - low), 0.0), 1.0), 2)
