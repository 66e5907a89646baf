"""Times variants of one computation against each other: interleaved, medians, the floor beside
each, samples that other processes disturbed thrown away. README.md says what the columns mean."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import _machine
from benchmarks._machine import ROOT, Reading
from benchmarks._results import RESULTS, Row, append

ENOUGH = 3  # undisturbed samples that a median needs
Call = Callable[[], object]


class Skip(Exception):
    """A case that cannot run here; its text says why."""


@dataclass
class Case:
    """Variants of one computation. The first is the floor; "ours" is what the others are held to.

    ``floor_bytes`` are what the floor moves; ``notes`` gives further figures of a variant (errors).
    A variant returns nothing that outlives the call.
    """

    variants: dict[str, Call]
    floor_bytes: int | None = None
    notes: Callable[[], dict[str, str]] = dict


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` at the first call, so that building a case costs nothing."""
    made: list[Callable[..., Any]] = []

    def call(*arguments: Any) -> Any:
        if not made:
            import torch

            made.append(torch.compile(function, dynamic=False))
        return made[0](*arguments)

    return call


class Spec(NamedTuple):
    """How to run a case: built late, since cases may be gigabytes. 0 threads: torch's default."""

    name: str
    build: Callable[[], Case]
    threads: Sequence[int] = (0,)
    rounds: int = 9
    resident: bool = False  # also measure resident memory, each variant in a process of its own


@dataclass
class Samples:
    """Seconds and page faults per call; noisy when too few samples were undisturbed."""

    clean: list[tuple[float, float]] = field(default_factory=list)
    disturbed: list[tuple[float, float]] = field(default_factory=list)
    by_round: dict[int, float] = field(default_factory=dict)  # the undisturbed ones

    def settle(self) -> tuple[list[float], list[float], bool]:
        noisy = len(self.clean) < ENOUGH
        used = self.clean + self.disturbed if noisy else self.clean
        return [s for s, _ in used], [f for _, f in used], noisy


def _sample(call: Call, count: int, read: Callable[[], Reading]) -> tuple[float, float, bool]:
    before = read()
    for _ in range(count):
        call()
    after = read()
    seconds, faults = after.begin - before.end, after.faults - before.faults
    return seconds / count, faults / count, _machine.polluted(before, after)


def _calls_for(call: Call, seconds: float, read: Callable[[], Reading]) -> int:
    """Calls that fill ``seconds``; the first call is a warm-up (compilation, caches)."""
    call()
    count = 1
    while True:
        each = max(_sample(call, count, read)[0], 1e-9)
        if each * count >= seconds:
            return count
        # A fifth more: the next sample must not fall short for running a little faster.
        count = min(count * 10, max(count + 1, math.ceil(1.2 * seconds / each)))


def measure(
    variants: dict[str, Call],
    *,
    rounds: int,
    budget: float = 40.0,
    seconds: float = 0.05,
    read: Callable[[], Reading] = _machine.read,
) -> dict[str, Samples]:
    """Samples of every variant, in shuffled rounds so that drift hits all alike.

    Ends when each has ``rounds`` undisturbed samples; on a busy machine after three times as many
    rounds or, at least ``ENOUGH`` of them, ``budget`` seconds. The samples say what they are.
    """
    counts = {name: _calls_for(call, seconds, read) for name, call in variants.items()}
    samples = {name: Samples() for name in variants}
    order = list(variants)
    shuffle = random.Random(0).shuffle
    start = read().end
    for done in range(1, 3 * rounds + 1):
        shuffle(order)
        gc.collect()
        for name in order:
            each, faults, disturbed = _sample(variants[name], counts[name], read)
            if each * counts[name] < 0.8 * seconds:  # counted while others slowed it down
                counts[name], disturbed = math.ceil(1.2 * seconds / max(each, 1e-9)), True
            kept = samples[name].disturbed if disturbed else samples[name].clean
            kept.append((each, faults))
            if not disturbed:
                samples[name].by_round[done] = each
        enough = all(len(s.clean) >= rounds for s in samples.values())
        if enough or (done >= ENOUGH and read().end - start > budget):
            break
    return samples


def paired(own: Samples, floor: Samples) -> float | None:
    """Median of the ratios within a round, in which drift of the machine cancels."""
    both = own.by_round.keys() & floor.by_round.keys()
    if len(both) < ENOUGH:
        return None
    return statistics.median(own.by_round[k] / floor.by_round[k] for k in both)


def rows_of(
    samples: dict[str, Samples],
    floor_bytes: int | None,
    peaks: dict[str, int],
    notes: dict[str, str],
    **key: Any,
) -> list[Row]:
    settled = {name: s.settle() for name, s in samples.items()}
    medians = {name: statistics.median(seconds) for name, (seconds, _, _) in settled.items()}
    first = next(iter(medians))
    floor, ours = medians[first], medians.get("ours")
    rows = []
    for name, (seconds, faults, noisy) in settled.items():
        rows.append(
            Row(
                **key,
                variant=name,
                median_ms=medians[name] * 1e3,
                min_ms=min(seconds) * 1e3,
                max_ms=max(seconds) * 1e3,
                times_floor=medians[name] / floor,
                paired_floor=paired(samples[name], samples[first]),
                times_ours=None if ours is None else medians[name] / ours,
                floor_gb_s=floor_bytes and floor_bytes / medians[name] / 1e9,
                faults=statistics.median(faults),
                kept=len(seconds),
                discarded=0 if noisy else len(samples[name].disturbed),
                noisy=int(noisy),
                peak_bytes=peaks.get(name),
                note=notes.get(name, ""),
            )
        )
    return rows


def run_case(
    benchmark: str, spec: Spec, threads: int, allocator: str, *, quick: bool, seconds: float = 0.05
) -> list[Row]:
    import torch

    torch.set_num_threads(threads)
    torch.compiler.reset()
    torch.manual_seed(0)
    case = spec.build()
    if quick and allocator == "tuned":  # compiled once is enough for a quick look
        case.variants.pop("torch.compile", None)
    rounds = min(spec.rounds, 5) if quick else spec.rounds
    budget = 8.0 if quick else 40.0
    samples = measure(case.variants, rounds=rounds, budget=budget, seconds=seconds)
    peaks, notes = {}, {}
    if allocator == "default":  # the other one changes times, not these
        peaks = {name: _machine.peak_allocated(call) for name, call in case.variants.items()}
        notes = case.notes()
    key = {"benchmark": benchmark, "case": spec.name, "allocator": allocator}
    return rows_of(samples, case.floor_bytes, peaks, notes, threads=threads, **key)


def _resident(spec: Spec, variant: str, threads: int) -> int | None:
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    return _machine.peak_resident(spec.build().variants[variant])


def _worker(benchmark: str, specs: list[Spec], job: dict[str, Any]) -> Any:
    if job["resident"]:
        name, variant, threads = job["resident"]
        return _resident(next(s for s in specs if s.name == name), variant, threads)
    import torch

    default, rows = torch.get_num_threads(), []
    for spec in specs:
        for asked in [job["threads"]] if job["threads"] else spec.threads:
            threads = asked or default
            print(f"{benchmark}: {spec.name}, {job['allocator']} allocator", file=sys.stderr)
            try:
                found = run_case(benchmark, spec, threads, job["allocator"], quick=job["quick"])
            except Skip as why:
                print(f"{benchmark}: {spec.name} left out: {why}", file=sys.stderr)
                break
            rows += [asdict(row) for row in found]
            gc.collect()
    return rows


def _in_process(benchmark: str, options: list[str], job: dict[str, Any], allocator: str) -> Any:
    """The answer of a fresh process, which alone can have another allocator or a clean heap."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, "-m", f"benchmarks.{benchmark}", *options]
        job = job | {"allocator": allocator, "answer": str(answer)}
        environment = _machine.environment(allocator) | {"FASTXKD_BENCH_JOB": json.dumps(job)}
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if code != 0:
            sys.exit(f"{' '.join(command)} ({allocator} allocator) ended with {code}")
        return json.loads(answer.read_text())


def gate(tests: list[str]) -> None:
    """Exit unless the tests of what is measured pass: the speed of a wrong result is no result."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", *tests]
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        sys.exit(f"not written: {' '.join(tests)} must pass first (--no-gate writes all the same)")


def main(
    benchmark: str, specs: Callable[[bool], list[Spec]], tests: list[str], about: str | None
) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{benchmark}", description=about)
    parser.add_argument("--quick", action="store_true", help="a look in half a minute")
    parser.add_argument("--threads", type=int, default=0, help="instead of each case's own choice")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--write", action="store_true", help=f"append to {RESULTS.name}")
    parser.add_argument("--no-gate", action="store_true", help="write without running the tests")
    chosen = parser.parse_args()
    selected = [s for s in specs(chosen.quick) if chosen.only in s.name]
    if "FASTXKD_BENCH_JOB" in os.environ:
        job = json.loads(os.environ["FASTXKD_BENCH_JOB"])
        Path(job["answer"]).write_text(json.dumps(_worker(benchmark, selected, job)))
        return
    if not selected:
        parser.error(f"--only: no case contains {chosen.only!r}")
    if chosen.write and chosen.quick:
        parser.error("--write: a quick look is not kept; run without --quick")
    if chosen.write and not chosen.no_gate:
        gate(tests)
    job = {"threads": chosen.threads, "quick": chosen.quick, "resident": None}
    options = ["--quick"] * chosen.quick + ["--only", chosen.only]
    rows = []
    for allocator in _machine.ALLOCATORS:
        rows += [Row(**row) for row in _in_process(benchmark, options, job, allocator)]
    in_need = {s.name for s in selected if s.resident}
    for row in rows:
        if row.case in in_need and row.allocator == "default":
            which = {"resident": [row.case, row.variant, row.threads]}
            row.resident_bytes = _in_process(benchmark, options, job | which, "default")

    from benchmarks.table import report

    print(report(rows))
    if chosen.write:
        append(rows, _machine.facts() | {"gated": str(int(not chosen.no_gate))})
