"""The schedule that docs/scale.md rests on: played through against what can be worked out."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

from benchmarks import scale
from benchmarks.scale import Plan, simulate, sweep, with_failures
from fastxkd.ops import pairs

DOCUMENT = Path(__file__).parents[1] / "docs" / "scale.md"
CALM = Plan(chunks=37, ranks=5, seconds=10.0)


@pytest.mark.parametrize("dealt", [True, False])
@pytest.mark.parametrize(("chunks", "ranks"), [(1, 1), (37, 5), (40, 5), (3, 8), (12, 1)])
def test_nothing_goes_wrong(chunks: int, ranks: int, dealt: bool) -> None:
    plan = replace(CALM, chunks=chunks, ranks=ranks, dealt=dealt)
    found = simulate(plan)
    assert found.seconds == pytest.approx(math.ceil(chunks / ranks) * 10)
    assert (found.done, found.failures, found.lost) == (chunks, 0, 0)
    assert found.efficiency(plan) == pytest.approx(chunks / ranks / math.ceil(chunks / ranks))


def test_one_slow_rank_of_chunks_dealt_out() -> None:
    plan = replace(CALM, chunks=400, ranks=8, slow=0.125, slowdown=1.5)
    assert simulate(plan).seconds == pytest.approx(50 * 15)


def test_one_slow_rank_of_chunks_taken() -> None:
    """Together they are as fast as 7 ranks and two thirds; who takes the last chunk is late by
    less than one."""
    plan = replace(CALM, chunks=4000, ranks=8, slow=0.125, slowdown=1.5, dealt=False)
    least = 4000 * 10 / (7 + 1 / 1.5)
    assert least <= simulate(plan).seconds < least + 15


def test_spread_leaves_the_mean() -> None:
    plan = replace(CALM, chunks=20_000, ranks=1, spread=0.5)
    # of 20,000 chunks, by the central limit theorem, within four standard errors
    assert simulate(plan, 1).seconds == pytest.approx(200_000, rel=4 * 0.5 / math.sqrt(20_000))


@pytest.mark.parametrize(
    ("ranks", "together", "failures", "restart"),
    [(1, True, 60.0, 30.0), (1, False, 60.0, 30.0), (4, True, 30.0, 5.0), (1, True, 360.0, 1.0)],
)
def test_failures_in_closed_form(
    ranks: int, together: bool, failures: float, restart: float
) -> None:
    """Failures without memory: a round of s seconds takes (exp(f s) - 1) (1 / f + r)."""
    plan = Plan(3000 * ranks, ranks, 10.0, failures=failures, restart=restart, together=together)
    found = [simulate(plan, seed) for seed in range(3)]
    assert fmean(o.seconds for o in found) == pytest.approx(with_failures(plan), rel=0.03)
    assert all(o.done == plan.chunks for o in found)
    # A chunk is done once after so many attempts that were lost, on all ranks at once.
    computing = sum(o.lost + plan.chunks * plan.seconds for o in found)
    expected = computing / 3600 * failures
    assert sum(o.failures for o in found) == pytest.approx(expected, rel=4 / math.sqrt(expected))


def test_one_failure_alone_costs_less_than_one_of_all() -> None:
    plan = Plan(2000, 8, 10.0, failures=20.0, restart=30.0)
    together = fmean(simulate(plan, s).seconds for s in range(3))
    alone = [simulate(replace(plan, together=False), s).seconds for s in range(3)]
    taken = [simulate(replace(plan, together=False, dealt=False), s).seconds for s in range(3)]
    assert fmean(taken) < fmean(alone) < together


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("dealt", [True, False])
def test_every_chunk_is_done_and_time_is_accounted_for(dealt: bool, together: bool) -> None:
    for seed in range(20):
        plan = Plan(
            23, 4, 10.0, 0.3, 0.25, 2.0, failures=90.0, restart=7.0, together=together, dealt=dealt
        )
        found = simulate(plan, seed)
        assert found.done == 23
        assert found.failures > 0
        assert found.lost > 0
        assert found == simulate(plan, seed)  # the same chances, the same run


def test_rarer_failures_and_shorter_chunks_cost_less() -> None:
    plan = Plan(64 * 20, 64, 100.0, failures=1.0, restart=60.0)
    assert with_failures(replace(plan, failures=0.1)) < with_failures(plan)
    short = replace(plan, chunks=plan.chunks * 10, seconds=10.0)
    assert with_failures(short) < with_failures(plan)
    # For rare failures: half a chunk and a restart for each.
    rare = replace(plan, failures=0.001)
    lost = 64 * 0.001 / 3600 * (plan.seconds / 2 + plan.restart)
    assert with_failures(rare) / (20 * 100.0) - 1 == pytest.approx(lost, rel=0.01)


@pytest.mark.parametrize(("rows", "widths"), [(5000, (512, 64)), (6000, (300, 300, 10))])
def test_sweep_is_that_of_the_walk(
    monkeypatch: pytest.MonkeyPatch, rows: int, widths: tuple[int, ...]
) -> None:
    monkeypatch.setattr(pairs, "PANEL_BYTES", 1 << 20)
    walk = pairs.Pairs([torch.zeros(rows, w) for w in widths], [f"x{w}" for w in widths])
    found = sweep(rows, 1, widths, on_gpu=False)
    assert found.panels == len(range(0, rows, walk.panel))
    assert found.panels > 1
    assert found.sent == 0
    pairs_seen = sum(len(t.left[0]) * len(t.right[0]) for t in walk.tiles())
    # Products of the tiles: two operations a pair and column; the diagonal's tiles are whole.
    assert found.operations == pytest.approx(2 * pairs_seen * sum(widths), rel=0.15)


def test_the_document_has_the_tables_that_the_script_prints() -> None:
    text = DOCUMENT.read_text()
    for table in (scale.costs(), scale.sweeps(), scale.schedules()):
        assert table in text


def test_the_document_names_constants_that_were_measured() -> None:
    """Its figures are rows of results.csv, of the run that it names."""
    results = (DOCUMENT.parents[1] / "benchmarks" / "results.csv").read_text()
    found = re.findall(r"`([^`]+)` of ([0-9T:-]+): ([0-9.]+) ms", DOCUMENT.read_text())
    assert len(found) >= 3
    for variant, timestamp, median in found:
        rows = [r for r in results.splitlines() if r.startswith(timestamp) and variant in r]
        assert any(f",{median}" in r for r in rows), (variant, timestamp)
