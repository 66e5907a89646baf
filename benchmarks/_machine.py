"""What a measurement needs to know of the machine: who else used it, memory, its description."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TICK = 1 / os.sysconf("SC_CLK_TCK")

# Freed blocks stay in the heap instead of going back to the kernel, and big ones get huge pages:
# what is left is the code's own time. Both allocators are reported, since users run the first.
ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "tuned": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "MALLOC_TOP_PAD_": str(1 << 26),
        "THP_MEM_ALLOC_ENABLE": "1",
    },
}


def environment(allocator: str) -> dict[str, str]:
    """The environment of a process that runs under this allocator setting."""
    inherited = {k: v for k, v in os.environ.items() if k not in ALLOCATORS["tuned"]}
    return inherited | ALLOCATORS[allocator]


class Reading(NamedTuple):
    """Clocks at one moment, seconds; ``begin`` and ``end`` enclose the taking of the others."""

    begin: float
    cpu: float  # of this process, all threads
    busy: float  # of every process, all cores, the time stolen by other machines included
    waited: float  # threads of this process that were ready, and had no core
    faults: int  # page faults of this process
    end: float


def read() -> Reading:
    begin = time.perf_counter()
    waited, busy = _waited(), _busy()
    faults, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
    return Reading(begin, cpu, busy, waited, faults, time.perf_counter())


def _waited() -> float:
    nanoseconds = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread that ended meanwhile
            nanoseconds += int(task.read_text().split()[1])
    return nanoseconds * 1e-9


def _busy() -> float:
    try:
        total = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:  # not Linux: every sample counts as undisturbed
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, total)
    return (user + nice + system + irq + softirq + steal) * TICK


def polluted(before: Reading, after: Reading) -> bool:
    """Whether others disturbed what ran between two readings.

    Either they used more than 8 % of a core (beyond the two ticks by which the kernel's count may
    be off), or threads of this process waited for a core for more than 3 % of the time.
    """
    wall = after.begin - before.end
    others = (after.busy - before.busy) - (after.cpu - before.cpu)
    return others > 0.08 * wall + 2 * TICK or after.waited - before.waited > 0.03 * wall


def peak_allocated(call: Callable[[], object]) -> int:
    """Highest sum of tensor memory during a call above what was held before it, in bytes.

    Counts every allocation of torch's CPU allocator, exactly; not numpy's and not scratch memory
    of C++ code.
    """
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory() as folder, _silent_stderr():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@contextmanager
def _silent_stderr() -> Iterator[None]:
    # The profiler's native library reports its starts and stops there.
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def peak_resident(call: Callable[[], object]) -> int | None:
    """Growth of this process's resident memory over two calls in a loop, in bytes.

    A call before them loads libraries and fills their caches; what it leaves free goes back to the
    kernel first. Counts numpy and scratch memory too, but also what the allocator keeps unused; the
    kernel's counters are off by some hundred kilobytes. None where Linux's /proc is missing.
    """
    call()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    start = _status("VmRSS")
    for _ in range(2):
        call()
    return max(0, _status("VmHWM") - start)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def facts() -> dict[str, str]:
    """What every row of the results says about where it comes from."""
    import torch

    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results.csv")
    return {
        "timestamp": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()),
        "commit": commit or "unknown",
        "dirty": "" if commit is None else str(int(bool(changed))),
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "torch": torch.__version__,
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1] for line in lines if line.startswith("model name")), "")
    import torch

    return f"{model.strip() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
