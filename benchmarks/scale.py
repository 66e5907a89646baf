"""What a run over a data set costs past this machine: arithmetic, and a schedule played through.

    python -m benchmarks.scale      # the tables of docs/scale.md, and the constants they rest on

Nothing here is timed. Constants are the newest rows of results.csv; a GPU's rates are the reader's.
The schedule is a discrete-event simulation of ``fastxkd explain`` under torchrun: ranks that take
chunks, some of them slower, ranks that die, the restart of all.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from benchmarks._results import newest
from fastxkd.ops import _distance_gpu as gpu
from fastxkd.ops import pairs

RATE = 1000.0  # images a second of one rank: a unit, to be scaled by the reader's own
PRODUCTS = 10e12  # float32 operations a second in matrix products: a unit, too
SEEDS = range(3)


# --- The schedule ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A run: its chunks, who computes them, and what goes wrong."""

    chunks: int
    ranks: int
    seconds: float  # that a chunk takes an undisturbed rank
    spread: float = 0.0  # of that time from chunk to chunk, as a share of it (log-normal)
    slow: float = 0.0  # share of the ranks that are slower
    slowdown: float = 1.0  # by this factor
    failures: float = 0.0  # of one rank, per hour of computing
    restart: float = 120.0  # seconds from a failure to computing again
    together: bool = True  # torchrun: when one rank fails, all begin again
    dealt: bool = True  # every ranks-th pending chunk is a rank's own; else who is free takes one


@dataclass(frozen=True)
class Outcome:
    seconds: float
    done: int
    failures: int
    lost: float  # seconds of computing that were done again

    def efficiency(self, plan: Plan) -> float:
        """Computing that was needed, over what the ranks could have done meanwhile."""
        return plan.chunks * plan.seconds / (plan.ranks * self.seconds)


def simulate(plan: Plan, seed: int = 0) -> Outcome:
    """Play the run through, event by event."""
    return _Schedule(plan, random.Random(seed)).play()


class _Schedule:
    def __init__(self, plan: Plan, chance: random.Random) -> None:
        self.plan, self.chance = plan, chance
        slow = math.ceil(plan.slow * plan.ranks)
        self.pace = [plan.slowdown if r < slow else 1.0 for r in range(plan.ranks)]
        self.pending = set(range(plan.chunks))
        self.queues: list[deque[int]] = []
        self.at: list[tuple[int, float] | None] = [None] * plan.ranks  # chunk, since when
        self.turn = [0] * plan.ranks  # events of an earlier turn no longer count
        self.down: set[int] = set()
        self.events: list[tuple[float, int, str, int, int]] = []
        self.count = self.failures = 0
        self.lost = self.now = 0.0

    def play(self) -> Outcome:
        self._deal()
        for rank in range(self.plan.ranks):
            self._begin(rank)
        while self.pending:
            self.now, _, what, rank, turn = heapq.heappop(self.events)
            if turn != self.turn[rank]:
                continue
            if what == "failed":
                self._fail(rank)
                continue
            current = self.at[rank]
            if what == "done" and current is not None:
                self.pending.remove(current[0])
                self.at[rank] = None
            self.down.discard(rank)
            self._begin(rank)
        done = self.plan.chunks - len(self.pending)
        return Outcome(self.now, done, self.failures, self.lost)

    def _deal(self) -> None:
        left = sorted(self.pending)
        parts = self.plan.ranks if self.plan.dealt else 1
        self.queues = [deque(left[r::parts]) for r in range(parts)]

    def _queue(self, rank: int) -> deque[int]:
        return self.queues[rank if self.plan.dealt else 0]

    def _later(self, seconds: float, what: str, rank: int) -> None:
        self.count += 1
        event = (self.now + seconds, self.count, what, rank, self.turn[rank])
        heapq.heappush(self.events, event)

    def _begin(self, rank: int) -> None:
        queue = self._queue(rank)
        if not queue:
            return
        self.at[rank] = queue.popleft(), self.now
        takes = self.plan.seconds * self.pace[rank]
        if self.plan.spread:
            variance = math.log1p(self.plan.spread**2)
            takes *= self.chance.lognormvariate(-variance / 2, math.sqrt(variance))
        # Failures have no memory: asking at every chunk anew is asking once.
        rate = self.plan.failures / 3600
        fails = self.chance.expovariate(rate) if rate else math.inf
        self._later(min(takes, fails), "failed" if fails < takes else "done", rank)

    def _fail(self, rank: int) -> None:
        self.failures += 1
        stopped = range(self.plan.ranks) if self.plan.together else [rank]
        for each in stopped:
            current = self.at[each]
            if current is not None:
                self.lost += self.now - current[1]
                self._queue(each).appendleft(current[0])
            self.at[each] = None
            self.turn[each] += 1
            self.down.add(each)
        if self.plan.together:
            self._deal()
        for each in stopped:
            self._later(self.plan.restart, "up", each)
        if not self.plan.dealt and not self.plan.together:
            idle = (r for r in range(self.plan.ranks) if self.at[r] is None and r not in self.down)
            for someone in idle:  # takes what the failed rank has left
                self._begin(someone)
                break


def with_failures(plan: Plan) -> float:
    """Seconds in closed form, for chunks that all take the same time and fill the last round: a
    round of s seconds that begins again r seconds after every failure, at rate f, takes
    ``(exp(f s) - 1) (1 / f + r)`` in the mean."""
    rounds = math.ceil(plan.chunks / plan.ranks)
    rate = plan.failures / 3600 * (plan.ranks if plan.together else 1)
    if not rate:
        return rounds * plan.seconds
    return rounds * math.expm1(rate * plan.seconds) * (1 / rate + plan.restart)


# --- The sweep of FSS and RS ----------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """Every pair of rows of some features, over ranks of equally many rows."""

    panels: int  # a rank holds its rows panel by panel; the others' pass by once for each
    sent: float  # bytes that a rank sends, and as many that it takes
    operations: float  # of the products, per rank

    def rate(self, operations_per_second: float) -> float:
        """Bytes a second, each way, for the products not to wait."""
        return self.sent * operations_per_second / self.operations


def sweep(
    rows: int, ranks: int, widths: Sequence[int], *, itemsize: int = 4, on_gpu: bool
) -> Sweep:
    """What ``ops.pairs`` does with so many rows of features so wide."""
    own, row = math.ceil(rows / ranks), sum(widths) * itemsize
    tile, held = max(32, min(pairs.TILE, pairs.STRIP_ELEMENTS // sum(widths))), pairs.PANEL_BYTES
    if on_gpu:
        tile = min(gpu.TILE, math.isqrt(gpu.TILES_BYTES // (len(widths) * itemsize)))
        tile = max(32, min(tile, gpu.STRIP_ELEMENTS // sum(widths)) // 32 * 32)
        held = gpu.PANEL_BYTES
    panel = tile * max(1, min(held // row // tile, math.ceil(own / tile)))
    panels = math.ceil(own / panel)
    return Sweep(panels, panels * (ranks // 2) * own * row, rows**2 * sum(widths) / ranks)


# --- The tables -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSet:
    name: str
    images: int
    labels: int  # width of what RS compares with: classes, or an embedding of the caption


DATA = (
    DataSet("ImageNet-1k", 1_281_167, 1000),
    DataSet("ImageNet-21k", 14_197_122, 21_841),
    DataSet("LAION-400M", 413_000_000, 512),
)
IMAGE_BYTES = 110e3  # of a stored image: ImageNet's mean; the reader's own
MAPS = {"7x7 float16": 7 * 7 * 2, "224x224 uint8": 224 * 224}
WIDTHS = (2048, 2048)  # student and base, one layer
CALM = Plan(chunks=1, ranks=1, seconds=1.0, spread=0.1)
TAKEN = replace(CALM, dealt=False)  # as `explain` does it
SCENES = {
    "calm": TAKEN,
    "5 % of ranks 1.5x slower": replace(TAKEN, slow=0.05, slowdown=1.5),
    "the same, dealt out beforehand": replace(CALM, slow=0.05, slowdown=1.5),
    "a failure per 100 rank-hours": replace(TAKEN, failures=0.01),
    "both": replace(TAKEN, slow=0.05, slowdown=1.5, failures=0.01),
}
RUNS = (
    (DATA[0], 8, 1024),
    (DATA[0], 64, 512),
    (DATA[1], 64, 4096),
    (DATA[1], 512, 1024),
    (DATA[2], 512, 32768),
    (DATA[2], 512, 65536),
)


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def _bytes(size: float) -> str:
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 1e6:.3g} MB"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g} h" if seconds >= 3600 else f"{seconds / 60:.3g} min"


def costs() -> str:
    """One pass of one model with Grad-CAM, and what it writes and reads."""
    rows = []
    for data in DATA:
        size = [_bytes(data.images * each) for each in MAPS.values()]
        hours = _hours(data.images / RATE)
        rows.append(
            [data.name, f"{data.images:,}", hours, *size, _bytes(data.images * IMAGE_BYTES)]
        )
    heads = [
        "",
        "images",
        "one rank, at 1000 images/s",
        *(f"maps {name}" for name in MAPS),
        "read",
    ]
    return _table(heads, rows)


def sweeps(ranks: int = 64) -> str:
    """FSS and RS, exact over all pairs of images."""
    rows = []
    for data in DATA:
        found = sweep(data.images, ranks, [*WIDTHS, data.labels], on_gpu=True)
        held = data.images * sum(WIDTHS) * 4
        rows.append(
            [
                data.name,
                _bytes(held),
                f"{found.operations * ranks:.2g}",
                _hours(found.operations * ranks / PRODUCTS),
                _bytes(found.sent),
                f"{_bytes(found.rate(PRODUCTS))}/s",
            ]
        )
    heads = [
        "",
        "features, float32",
        "operations",
        "one rank, at 10 TFLOP/s",
        f"a rank of {ranks} sends",
        "so as not to wait",
    ]
    return _table(heads, rows)


def schedules() -> str:
    """Efficiency in every scene, from the simulation, and hours where all goes wrong."""
    rows = []
    for data, ranks, chunk in RUNS:
        size = {"chunks": math.ceil(data.images / chunk), "ranks": ranks, "seconds": chunk / RATE}
        cells, worst = [], 0.0
        for scene in SCENES.values():
            plan = replace(scene, **size)
            outcomes = [simulate(plan, seed) for seed in SEEDS]
            cells.append(f"{fmean(o.efficiency(plan) for o in outcomes):.1%}")
            worst = max(o.seconds for o in outcomes)
        rows.append([f"{data.name}, {ranks} ranks, chunks of {chunk}", *cells, _hours(worst)])
    return _table(["", *SCENES, "it takes, both"], rows)


def constants() -> str:
    """The newest measurements that the arithmetic rests on, or that they are missing."""
    wanted = {
        "forward, ResNet-50, 8 x 224 px": (
            "cam",
            "GradCAM, ResNet-50 layer4, 8x224x224",
            "floor: forward",
        ),
        "Grad-CAM, the same": ("cam", "GradCAM, ResNet-50 layer4, 8x224x224", "ours"),
        "one map of it alone": ("cam", "operator gradcam, 8x2048x7x7", "ours"),
        "FSS and RS of 13 matrices, n = 5000": (
            "distance",
            "FSS and RS, 4 layers x 3 models, n = 5000, d = 512",
            "ours",
        ),
    }
    found = {
        (row.benchmark, row.case, row.variant): (facts, row)
        for facts, row in newest()
        if row.allocator == "default"
    }
    rows = []
    for what, key in wanted.items():
        if key in found:
            facts, row = found[key]
            rows.append(
                [what, f"{row.median_ms:.4g} ms", f"{facts['timestamp'][:10]}, {facts['cpu']}"]
            )
        else:
            rows.append([what, "not measured", f"`python -m benchmarks.{key[0]} --write`"])
    return _table(["", "median", "of"], rows)


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__).parse_args()
    for title, table in (
        ("constants", constants()),
        ("costs", costs()),
        ("sweeps", sweeps()),
        ("schedules", schedules()),
    ):
        print(f"<!-- {title} -->\n{table}\n")


if __name__ == "__main__":
    main()
