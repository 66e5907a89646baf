"""What to measure, and a stage at work: calls timed on a device, and what they found."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import _machine


@dataclass(frozen=True)
class Plan:
    """What to measure and where; another device and small shapes make a test of it."""

    device: str = "cuda"
    backends: tuple[str, ...] = ("cuda", "triton")
    shapes: tuple[tuple[int, int], ...] = ((4096, 32000), (256, 1000), (128, 100), (8192, 151936))
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    divergences: tuple[str, ...] = ("forward_kl", "reverse_kl", "jsd", "tvd", "dkd", "dist")
    copied: int = 1 << 31  # bytes of the tensor whose copy gives the bandwidth
    flushed: int = 1 << 28  # bytes read between samples: more than a cache holds
    linear: tuple[int, int, int, int] = (4096, 2048, 4096, 32000)  # rows, widths, classes
    maps: tuple[tuple[int, ...], ...] = ((32, 256, 56, 56), (8, 2048, 7, 7))
    samples: tuple[int, int] = (4096, 512)  # rows and width, for distances
    layers: tuple[int, int, int] = (7, 20000, 1024)  # matrices, rows and width, for their sums
    units: tuple[int, int, int] = (64, 512, 7)  # images, units and the side of their maps
    masks: tuple[int, int, int] = (4, 112, 1200)  # layers, their side, and labels
    tests: tuple[str, ...] = ("tests/test_gpu.py", "-m", "gpu")
    rounds: int = 25
    seconds: float = 0.4  # for the samples of one figure
    compile: bool = True


class Clock:
    """Times calls on a device: by events where there are some, else by the host's clock."""

    def __init__(self, plan: Plan) -> None:
        self.device = torch.device(plan.device)
        self.on_gpu = self.device.type == "cuda"
        self.rounds, self.seconds = plan.rounds, plan.seconds
        self.cold = torch.zeros(max(plan.flushed // 4, 1), device=self.device)
        self.scratch = torch.zeros((), device=self.device)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def _flush(self) -> None:
        # Reading, not writing: lines that must go back to memory would be charged to the call.
        torch.sum(self.cold, dim=0, out=self.scratch)
        if self.on_gpu and hasattr(torch.cuda, "_sleep"):
            torch.cuda._sleep(2_000_000)  # a millisecond, in which the host queues the launches

    def _sample(self, call: Callable[[], object]) -> float:
        self._flush()
        if not self.on_gpu:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def samples(
        self, call: Callable[[], object], before: Callable[[], object] | None = None
    ) -> list[float]:
        """Seconds of single calls on a cold cache: at least five, else until the time is up."""
        found: list[float] = []
        until = time.monotonic() + self.seconds
        while len(found) < 5 or (len(found) < self.rounds and time.monotonic() < until):
            if before is not None:
                before()
            found.append(self._sample(call))
        return found

    def each(self, call: Callable[[], object], about: float) -> float:
        """Seconds per call back to back, host and device together; one takes ``about`` so many."""
        count = min(max(int(self.seconds / 4 / about), 5), 200)
        self.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        self.synchronize()
        return (time.perf_counter() - begin) / count

    def peak(self, call: Callable[[], object]) -> int:
        """Bytes of tensors alive at once during a call, beyond those before it."""
        if not self.on_gpu:
            return _machine.peak_allocated(call)
        self.synchronize()
        held = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - held


@dataclass
class Row:
    """One line of the table."""

    case: str
    variant: str
    ms: float  # median of single calls on the device, cache cold
    min_ms: float
    max_ms: float
    call_ms: float  # per call back to back: what a training loop waits
    bandwidth: float | None  # share of the measured bandwidth that moving the floor's bytes makes
    times_floor: float | None  # over the floor of the same case
    peak_bytes: int
    note: str = ""


class Variant(NamedTuple):
    name: str
    call: Callable[[], object]
    before: Callable[[], object] | None = None  # not timed
    note: Callable[[], str] | None = None


class Stage:
    """A stage at work: what it has found goes to the file at once, so that no end can lose it."""

    def __init__(self, plan: Plan, lines: Path, seconds: float, bandwidth: float | None) -> None:
        self.plan, self.lines, self.bandwidth = plan, lines, bandwidth
        self.until = time.monotonic() + seconds
        self.clock = Clock(plan)
        self.floors: dict[str, float] = {}

    def put(self, kind: str, **value: Any) -> None:
        with self.lines.open("a") as file:
            file.write(json.dumps({"kind": kind, **value}) + "\n")

    def left_out(self, what: str, why: str) -> None:
        self.put("left out", what=what, why=why)

    def in_time(self, what: str) -> bool:
        if time.monotonic() < self.until:
            return True
        self.left_out(what, "no time left")
        return False

    def check_device(self, error: Exception) -> None:
        """Some errors leave a device on which nothing of this process runs any more: then the stage
        is over."""
        try:
            self.clock.synchronize()
        except Exception:
            raise error from None

    def measure(self, case: str, variant: Variant, floor_bytes: int | None) -> None:
        """A row, or why there is none: a variant that fails takes no other with it."""
        what = f"{case}: {variant.name}"
        if not self.in_time(what):
            return
        try:
            variant.call()  # warm-up: compilation, caches
            self.clock.synchronize()
            note = variant.note() if variant.note else ""
            seconds = self.clock.samples(variant.call, variant.before)
            row = Row(
                case,
                variant.name,
                *(1e3 * f(seconds) for f in (statistics.median, min, max)),
                call_ms=1e3 * self.clock.each(variant.call, statistics.median(seconds)),
                bandwidth=None,
                times_floor=None,
                peak_bytes=self.clock.peak(variant.call),
                note=note,
            )
        except Exception as error:
            self.check_device(error)
            self.left_out(what, brief(error))
            return
        if variant.name.startswith("floor"):
            self.floors[case] = row.ms
        if floor_bytes and self.bandwidth:
            row.bandwidth = floor_bytes / (row.ms * 1e-3) / self.bandwidth
        if case in self.floors:
            row.times_floor = row.ms / self.floors[case]
        self.put("row", **asdict(row))


def brief(error: BaseException) -> str:
    first = (str(error) or "no message").strip().splitlines()[0]
    return f"{type(error).__name__}: {first if len(first) <= 160 else first[:157] + '...'}"


def on_backend(backend: str, call: Callable[..., Any]) -> Callable[..., Any]:
    import fastxkd

    def chosen(*arguments: Any) -> Any:
        with fastxkd.use_backend(backend):
            return call(*arguments)

    return chosen


def bandwidth(stage: Stage) -> None:
    plan = stage.plan
    size = plan.copied
    if stage.clock.on_gpu:
        size = min(size, torch.cuda.mem_get_info(stage.clock.device)[0] // 4)
    x = torch.randn(size // 4, device=stage.clock.device)
    y = torch.empty_like(x)
    y.copy_(x)
    clones = stage.clock.samples(lambda: x.clone())
    copies = stage.clock.samples(lambda: y.copy_(x))
    moved = 2 * x.numel() * x.element_size()
    stage.put(
        "bandwidth",
        bytes_per_s=moved / statistics.median(clones),
        copy_bytes_per_s=moved / statistics.median(copies),
        tensor_bytes=x.numel() * x.element_size(),
    )
