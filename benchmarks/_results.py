"""results.csv: what a row holds, appending rows, and finding the newest ones."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks._machine import ROOT

RESULTS = ROOT / "benchmarks" / "results.csv"


@dataclass
class Row:
    benchmark: str
    case: str
    threads: int
    allocator: str
    variant: str
    median_ms: float
    min_ms: float
    max_ms: float
    times_floor: float
    times_ours: float | None
    floor_gb_s: float | None  # the floor's bytes over this variant's time
    faults: float  # page faults per call
    kept: int
    discarded: int
    noisy: int
    peak_bytes: int | None = None
    resident_bytes: int | None = None
    note: str = ""
    paired_floor: float | None = None  # median of the ratios to the floor within a round


FACTS = ("timestamp", "commit", "dirty", "gated", "cpu", "cores", "torch")
COLUMNS = (*FACTS, *(f.name for f in fields(Row)))


def append(rows: list[Row], facts: dict[str, str], path: Path = RESULTS) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            values = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow(facts | values)


def newest(path: Path = RESULTS) -> list[tuple[dict[str, str], Row]]:
    """The rows of the last run of each case, thread count and allocator, with their facts."""
    last: dict[tuple[str, ...], str] = {}
    with path.open(newline="") as file:
        records = list(csv.DictReader(file))
    for r in records:
        key = (r["benchmark"], r["case"], r["threads"], r["allocator"])
        last[key] = max(last.get(key, ""), r["timestamp"])
    return [
        (r, _row(r))
        for r in records
        if last[r["benchmark"], r["case"], r["threads"], r["allocator"]] == r["timestamp"]
    ]


def _row(record: dict[str, str]) -> Row:
    values: dict[str, object] = {}
    for f in fields(Row):
        text = record[f.name]
        if str(f.type) == "str":
            values[f.name] = text
        elif text == "":
            values[f.name] = None
        else:
            values[f.name] = int(text) if "int" in str(f.type) else float(text)
    return Row(**values)  # type: ignore[arg-type]
