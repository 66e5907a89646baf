"""The claims as JSON, and as the Markdown table that a README can hold."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastxkd.runs.names import printable
from fastxkd.runs.reproduce.claims import CONFIDENCE, FAILS, HOLDS, OPEN, Claim, Part

TITLES = {
    "unicam": "What guidance adds to the layers (Adhane et al. 2025, UniCAM)",
    "interpretability": "What distillation does to interpretability (Han et al. 2023)",
    "xdistillation": "Inheriting the teacher's explanations (Alharbi et al. 2021, XDistillation)",
}
METHOD = (
    f"Means over seeds with {100 * CONFIDENCE:g} % t intervals, of differences within a seed "
    "wherever two models are compared (paired). Each interval is on its own: of twenty claims "
    "without any truth in them one would come out decided by chance. A few seeds say little about "
    "small effects: “not decided” is not “no”."
)


@dataclass
class Outcome:
    """Claims, what decides them (``settings``), and how this run went (``facts``)."""

    claims: list[Claim]
    settings: dict[str, Any]
    facts: dict[str, Any]

    def counts(self) -> dict[str, int]:
        found = Counter(claim.verdict() for claim in self.claims)
        return {verdict: found[verdict] for verdict in (HOLDS, FAILS, OPEN)}

    def by_study(self) -> dict[str, list[Claim]]:
        grouped: dict[str, list[Claim]] = {}
        for claim in self.claims:
            grouped.setdefault(claim.study, []).append(claim)
        return grouped


def to_json(outcome: Outcome) -> str:
    """What two runs of the same settings have in common, to the last character."""
    content = {
        "settings": outcome.settings,
        "verdicts": outcome.counts(),
        "claims": [claim.to_json() for claim in outcome.claims],
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def summary(outcome: Outcome) -> str:
    """``12 hold, 3 do not, 9 are not decided``."""
    counts = outcome.counts()
    words = {HOLDS: ("holds", "hold"), FAILS: ("does not", "do not"), OPEN: ("is", "are")}
    parts = []
    for verdict, (one, many) in words.items():
        text = f"{counts[verdict]} {one if counts[verdict] == 1 else many}"
        parts.append(f"{text} not decided" if verdict == OPEN else text)
    return ", ".join(parts)


def to_text(outcome: Outcome) -> str:
    """Claim by claim, for a terminal."""
    lines = []
    for study, claims in outcome.by_study().items():
        title = TITLES.get(study, study)
        lines += ["", title, "=" * len(title)]
        for claim in claims:
            lines += [
                "",
                f"{claim.id}: {claim.verdict().upper()}",
                *_wrapped(claim.statement),
                *_wrapped(f"the paper: {claim.paper or 'no number known'}"),
                *_wrapped(f"measured: {claim.measured}"),
                *(f"    {printable(said(claim, part))}" for part in claim.parts),
                *_wrapped(claim.rule()),
                *(_wrapped(claim.note) if claim.note else []),
            ]
    remark = outcome.settings.get("remark")
    return "\n".join(
        [
            *lines,
            "",
            *textwrap.wrap(f"Of {len(outcome.claims)} claims {summary(outcome)}. {METHOD}", 98),
            *([printable(remark)] if remark else []),
        ]
    )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(printable(text), 94, initial_indent="  ", subsequent_indent="  ")


def to_markdown(outcome: Outcome) -> str:
    settings = outcome.settings
    seeds = settings["seeds"]
    lines = [
        f"Of {len(outcome.claims)} claims {summary(outcome)} "
        f"({'quick, ' if settings.get('quick') else ''}{len(seeds)} "
        f"seed{'' if len(seeds) == 1 else 's'}).",
        "",
        *(f"{escaped(notice)}" for notice in settings.get("notices", ()) if notice),
        *([escaped(settings["remark"])] if settings.get("remark") else []),
    ]
    for study, claims in outcome.by_study().items():
        lines += ["", f"### {TITLES.get(study, study)}", "", *_rows(claims)]
    lines += ["", escaped(METHOD), ""]
    return "\n".join(lines)


def _rows(claims: list[Claim]) -> list[str]:
    rows = ["| claim | the paper | measured here | verdict |", "| --- | --- | --- | --- |"]
    for claim in claims:
        cells = [
            f"{escaped(claim.statement)}<br>`{claim.id}`",
            escaped(claim.paper) or "no number known",
            "<br>".join([escaped(claim.measured), *(escaped(said(claim, p)) for p in claim.parts)]),
            f"**{claim.verdict()}**",
        ]
        if claim.note:
            cells[0] += f"<br>{escaped(claim.note)}"
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def said(claim: Claim, part: Part) -> str:
    """``stage1: +0.0120 [+0.0080, +0.0160]``; plain text."""
    found = part.interval()
    mean, low, high = (claim.write(value, sign=not part.level) for value in found)
    unit = ""
    if claim.unit == "points":
        unit = " %" if part.level else " points"
    aside = "" if part.decides else " (shown, does not decide)"
    return f"{part.name}: {mean}{unit} [{low}, {high}]{aside}"


def escaped(text: str) -> str:
    """Text that means itself in a cell of a Markdown table.

    >>> print(escaped("a|b <c> *d*"))
    a\\|b &lt;c&gt; \\*d\\*
    """
    text = printable(" ".join(text.split()))
    for character, meaning in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(character, meaning)
    for character in "\\`*_[]|":
        text = text.replace(character, f"\\{character}")
    return text


def facts_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """The facts of a run as text, for a page."""
    found = {}
    for key, value in facts.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {inner}" for name, inner in value.items())
        elif isinstance(value, (list, tuple)):
            value = " ".join(map(str, value)) if key == "command" else ", ".join(map(str, value))
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        if value not in ("", None):
            found[key] = str(value)
    return found
