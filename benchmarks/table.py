"""Results as tables: one run on the terminal; ``python -m benchmarks.table``, the newest rows of
results.csv as Markdown."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from benchmarks._results import Row, newest


def _time(ms: float) -> str:
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.3g} ms" if ms >= 0.1 else f"{ms * 1e3:.3g} us"


def _size(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def _count(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def _groups(rows: Iterable[Row]) -> dict[tuple[str, str, int, str], list[Row]]:
    groups: dict[tuple[str, str, int, str], list[Row]] = {}
    for row in rows:
        key = (row.benchmark, row.case, row.threads, row.allocator)
        groups.setdefault(key, []).append(row)
    return groups


def report(rows: list[Row]) -> str:
    """One run in full: a block per case, thread count and allocator."""
    layout = "{:<28} {:>8} {:>19} {:>7} {:>7} {:>7} {:>6} {:>8} {:>8} {:>11} {:>11}"
    heads = ("median", "min .. max", "x floor", "paired", "x ours", "GB/s", "faults", "kept")
    lines = []
    for (_, case, threads, allocator), group in _groups(rows).items():
        lines += ["", f"{case}; {_count(threads)}, {allocator} allocator"]
        lines.append(layout.format("", *heads, "allocated", "resident"))
        for r in group:
            values = (
                _time(r.median_ms),
                f"{_time(r.min_ms)} .. {_time(r.max_ms)}",
                f"{r.times_floor:.2f}",
                "" if r.paired_floor is None else f"{r.paired_floor:.3f}",
                "" if r.times_ours is None else f"{r.times_ours:.2f}",
                "" if r.floor_gb_s is None else f"{r.floor_gb_s:.1f}",
                f"{r.faults:.0f}",
                f"{r.kept}/{r.kept + r.discarded}",
                _size(r.peak_bytes),
                _size(r.resident_bytes),
            )
            lines.append(layout.format(r.variant, *values) + "  NOISY" * r.noisy)
        lines += [f"  {r.variant}: {r.note}" for r in group if r.note]
    return "\n".join(lines[1:])


def markdown(rows: list[tuple[dict[str, str], Row]]) -> str:
    """A line per case and thread count: default allocator, the tuned one in brackets."""
    facts = {id(row): record for record, row in rows}
    lines = [
        "| benchmark | case | ours | × floor | the others, × ours | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    cases: dict[tuple[str, str, int], dict[str, list[Row]]] = {}
    for (benchmark, case, threads, allocator), group in _groups(r for _, r in rows).items():
        cases.setdefault((benchmark, case, threads), {})[allocator] = group
    for (benchmark, case, threads), by_allocator in cases.items():
        group = by_allocator.get("default") or next(iter(by_allocator.values()))
        ours = next((r for r in group if r.variant == "ours"), None)
        if ours is None:
            continue
        tuned = {r.variant: r for r in by_allocator.get("tuned", [])}
        others = []
        for r in group[1:]:
            if r is not ours and r.times_ours is not None:
                beside = tuned.get(r.variant)
                also = f" ({beside.times_ours:.3g}×)" if beside and beside.times_ours else ""
                others.append(f"{r.variant} {r.times_ours:.3g}×{also}")
        also = f" ({_time(tuned['ours'].median_ms)})" if "ours" in tuned else ""
        floor = f" ({tuned['ours'].times_floor:.3g})" if "ours" in tuned else ""
        cells = (
            benchmark,
            f"{case}, {_count(threads)}{_marks(facts, group)}",
            f"{_time(ours.median_ms)}{also}",
            f"{ours.times_floor:.3g}{floor}",
            ", ".join(others),
            ", ".join(_memory(r) for r in group if r.times_ours is not None),
        )
        lines.append(f"| {' | '.join(cells)} |")
    where = sorted({f"{f['cpu']}, {f['cores']} cores, torch {f['torch']}" for f, _ in rows})
    commits = sorted({f["commit"] for f, _ in rows})
    return "\n".join([*lines, "", f"Measured on {'; '.join(where)}; commit {', '.join(commits)}."])


def _memory(row: Row) -> str:
    size = row.peak_bytes if row.resident_bytes is None else row.resident_bytes
    return f"{row.variant} {_size(size)}"


def _marks(facts: dict[int, dict[str, str]], group: list[Row]) -> str:
    marks = []
    if any(r.noisy for r in group):
        marks.append("noisy")
    if any(facts[id(r)]["gated"] != "1" for r in group):
        marks.append("tests not run")
    if any(facts[id(r)]["dirty"] == "1" for r in group):
        marks.append("uncommitted changes")
    return f" [{', '.join(marks)}]" if marks else ""


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__).parse_args()
    found = newest()
    print(
        markdown(found)
        if found
        else "results.csv has no rows yet: python -m benchmarks.NAME --write"
    )
