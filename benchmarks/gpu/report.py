"""gpu.json and gpu.md: what the stages have found, and the machine they found it on."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import _machine
from benchmarks.gpu.stage import Plan


@dataclass
class Report:
    """What gpu.json holds."""

    facts: dict[str, str]
    stages: list[dict[str, Any]] = field(default_factory=list)
    bandwidth: dict[str, float] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def take(self, lines: Path) -> None:
        """What a stage has written, up to where it ended."""
        if not lines.exists():
            return
        for line in lines.read_text().splitlines():
            try:
                value = json.loads(line)
            except json.JSONDecodeError:  # cut off with the stage
                continue
            kind = value.pop("kind")
            if kind == "bandwidth":
                self.bandwidth = value
            else:
                {"row": self.rows, "check": self.checks, "left out": self.left_out}[kind].append(
                    value
                )


def facts(plan: Plan) -> dict[str, str]:
    found = _machine.facts()
    found["python"] = platform.python_version()
    if plan.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["device"] = f"{properties.name}, {properties.multi_processor_count} processors"
        found["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        found["CUDA of torch"] = str(torch.version.cuda)
        fields_ = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        try:
            run = subprocess.run(
                ["nvidia-smi", f"--query-gpu={fields_}", "--format=csv,noheader", "-i", "0"],
                capture_output=True,
                text=True,
                timeout=20,
            )
            values = run.stdout.strip().split(", ")
            names = ("driver", "clock", "highest clock", "memory clock", "power limit", "degrees")
            found |= dict(zip(names, values, strict=False)) if run.returncode == 0 else {}
        except (OSError, subprocess.TimeoutExpired):
            found["driver"] = "unknown: no nvidia-smi"
    else:
        found["device"] = plan.device
    for package in ("triton", "liger_kernel"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        found[package] = version
    return found


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return [*lines, *(f"| {' | '.join(_cell(v) for v in row)} |" for row in rows)]


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def markdown(report: Report) -> str:
    lines = ["# fastxkd on a GPU", ""]
    lines += _table(("", ""), list(report.facts.items()))
    if report.bandwidth:
        speed = report.bandwidth["bytes_per_s"] / 1e9
        lines += ["", f"Copy bandwidth (clone, bytes read and written): {speed:.0f} GB/s."]
    lines += ["", "## Stages", ""]
    found = [(s["stage"], s["state"], f"{s['seconds']:.0f} s", s["text"]) for s in report.stages]
    lines += _table(("stage", "", "took", "last line"), found)
    lines += ["", "## Times", ""]
    lines.append(
        "Medians of single calls on the device with a cold cache; per call back to back; share of"
        " the copy bandwidth that moving the floor's bytes in that time makes; times the floor."
    )
    rows = []
    for r in sorted(report.rows, key=_place(report.rows)):
        share = "" if r["bandwidth"] is None else f"{100 * r['bandwidth']:.0f} %"
        floor = "" if r["times_floor"] is None else f"{r['times_floor']:.3g}"
        times = (f"{r['ms']:.4g}", f"{r['min_ms']:.4g} to {r['max_ms']:.4g}", f"{r['call_ms']:.4g}")
        figures = (*times, share, floor, _size(r["peak_bytes"]), r["note"])
        rows.append((r["case"], r["variant"], *figures))
    head = ("case", "variant", "ms", "range", "call ms", "bandwidth", "x floor", "peak", "")
    lines += ["", *_table(head, rows)]
    if report.checks:
        failed = sum(not c["passed"] for c in report.checks)
        lines += ["", f"## Numbers: {len(report.checks)} checks, {failed} failed", ""]
        verdicts = [
            (c["what"], "ok" if c["passed"] else "**FAILED**", c["text"]) for c in report.checks
        ]
        lines += _table(("", "", "against float64"), verdicts)
    if report.left_out:
        lines += ["", "## Left out", ""]
        lines += _table(("", "why"), [(x["what"], x["why"]) for x in report.left_out])
    return "\n".join([*lines, ""])


def _place(rows: list[dict[str, Any]]) -> Callable[[dict[str, Any]], int]:
    """Cases in the order they came in, the rows of a case together."""
    order: dict[str, int] = {}
    for row in rows:
        order.setdefault(row["case"], len(order))
    return lambda row: order[row["case"]]


def write(report: Report, out: Path) -> None:
    (out / "gpu.json").write_text(json.dumps(asdict(report), indent=1))
    (out / "gpu.md").write_text(markdown(report))
