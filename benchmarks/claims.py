"""``python -m benchmarks.claims [--write]``: the papers' claims and which hold, for the README.

Made from results/claims-all.json and results/claims-quick.json, the ``claims.json`` of
``fastxkd reproduce all`` without and with ``--quick``; ``--write`` puts it into the README.
"""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from benchmarks._machine import ROOT
from fastxkd.runs.reproduce.claims import Claim
from fastxkd.runs.reproduce.table import TITLES, Outcome, escaped, said, summary

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
# The long run first: where both measured a claim, its numbers are shown.
RUNS = {"all": RESULTS / "claims-all.json", "quick": RESULTS / "claims-quick.json"}
_PLACE = re.compile(r"(?<=<!-- claims -->\n).*(?=<!-- /claims -->)", re.DOTALL)


def table(runs: dict[str, dict[str, Any]]) -> str:
    """A line for each claim, study by study, with the numbers of the first run and all verdicts."""
    claims = {
        name: {found["id"]: Claim.from_json(found) for found in content["claims"]}
        for name, content in runs.items()
    }
    first = next(iter(claims.values()))
    lines = []
    for name, content in runs.items():
        counted = Outcome(list(claims[name].values()), {}, {})
        seeds = len(content["settings"]["seeds"])
        lines.append(f"`{name}`, {seeds} seeds: of {len(claims[name])} claims {summary(counted)}.")
    lines += ["", f"| claim | the paper | here, {next(iter(runs))} | {' | '.join(runs)} |"]
    lines.append("| --- | --- | --- |" + " --- |" * len(runs))
    study = ""
    for key, claim in first.items():
        if claim.study != study:
            study = claim.study
            lines.append(f"| **{escaped(TITLES[study])}** | | |" + " |" * len(runs))
        numbers = "; ".join(escaped(said(claim, part)) for part in claim.deciding)
        verdicts = [found[key].verdict() if key in found else "-" for found in claims.values()]
        cells = [escaped(claim.statement), escaped(claim.paper) or "-", numbers, *verdicts]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def recorded() -> dict[str, dict[str, Any]]:
    return {name: json.loads(path.read_text()) for name, path in RUNS.items() if path.exists()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put it into the README")
    text = table(recorded())
    if not parser.parse_args().write:
        print(text, end="")
        return
    readme = README.read_text()
    if not _PLACE.search(readme):
        raise SystemExit(f"{README.name}: expected the lines <!-- claims --> and <!-- /claims -->")
    README.write_text(_PLACE.sub(lambda _: text, readme))


if __name__ == "__main__":
    main()
