"""The README's table of claims, and the way back from ``claims.json``."""

from __future__ import annotations

import json
import math

from benchmarks import claims as tool
from fastxkd.runs.reproduce.claims import FAILS, HOLDS, Claim, Part


def claim(key: str, values: list[float], **more: object) -> Claim:
    parts = [Part("first | last", values), Part("level", [0.5, 0.7], decides=False, level=True)]
    return Claim(key, f"What {key} says.", "70.8", "a difference", parts, **more)


def content(*claims: Claim, seeds: int = 2) -> dict:
    plain = {"settings": {"seeds": list(range(seeds))}, "claims": [c.to_json() for c in claims]}
    return json.loads(json.dumps(plain))


def test_a_claim_comes_back_from_its_json():
    for made in (
        claim("unicam.a", [0.1, 0.3], unit="points", digits=1, note="so"),
        claim("unicam.b", [0.1, math.nan]),
    ):
        back = Claim.from_json(json.loads(json.dumps(made.to_json())))
        assert json.dumps(back.to_json()) == json.dumps(made.to_json())
        assert back.verdict() == made.verdict()


def test_the_table_has_the_first_runs_numbers_and_every_verdict():
    more = claim("unicam.a", [0.30, 0.31], digits=2)
    less = claim("unicam.a", [-0.30, -0.31], digits=2)
    alone = claim("xdistillation.b", [0.30, 0.31])
    found = tool.table({"all": content(more, alone), "quick": content(less, seeds=3)}).splitlines()
    assert found[0] == "`all`, 2 seeds: of 2 claims 2 hold, 0 do not, 0 are not decided."
    assert found[1].startswith("`quick`, 3 seeds: of 1 claims 0 hold, 1 does not")
    (row,) = [line for line in found if "What unicam.a says." in line]
    assert row.split(" | ")[-2:] == [HOLDS, f"{FAILS} |"]
    assert "first \\| last: +0.30 \\[" in row
    assert "level" not in row
    (row,) = [line for line in found if "xdistillation.b" in line]
    assert row.split(" | ")[-2:] == [HOLDS, "- |"]
    widths = {line.replace("\\|", "").count("|") for line in found if line.startswith("|")}
    assert len(widths) == 1


def test_the_readme_has_the_recorded_claims():
    assert tool.table(tool.recorded()) in tool.README.read_text()
