"""``python -m benchmarks.profile NAME``: where the time of a benchmark's variants goes.

Every case of ``benchmarks/NAME.py`` runs under torch.profiler, on the CPU and on a GPU where there
is one, and, where nvtx is installed, in NVTX ranges for Nsight Systems. The table has a row for
each variant, operator and kernel; ``--out`` keeps it whole as a CSV file, beside a trace of each
case for chrome://tracing or ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import re
import sys
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks._harness import Case, Skip, Spec
from benchmarks._machine import _silent_stderr

PREFIX = "benchmark: "  # of the ranges around variants, to tell them from those of torch
SIZES = {
    **dict.fromkeys(("double", "long int", "long", "c10::complex<float>"), 8),
    **dict.fromkeys(("c10::BFloat16", "c10::Half", "short int", "short"), 2),
    **dict.fromkeys(("bool", "signed char", "unsigned char"), 1),
}
# Views, memory, and what is a view or a copy, which then shows as an operator of its own.
WITHOUT_TRAFFIC = re.compile(
    "(un)?(squeeze|flatten|bind)_?|view(_as)?|expand(_as)?|(new_)?empty(_like|_strided)?|chunk"
    "|alias|as_strided|broadcast_to|contiguous|detach|diagonal|lift_fresh|[mn](umpy_)?[TH]|movedim"
    "|narrow|permute|reshape|resize_|select|set_|slice|split|t|to|transpose|type_as"
)
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass
class Row:
    """Everything is for one call of the variant.

    ``total_ms`` includes what ran inside, ``self_ms`` does not: of a variant that is Python, the
    autograd engine, and kernels called without torch's dispatcher, which no profiler row shows.
    ``bytes`` are an estimate, see :func:`traffic`.
    """

    benchmark: str
    case: str
    variant: str
    kind: str  # "variant", "operator" or "kernel"
    name: str
    calls: float
    self_ms: float
    total_ms: float
    bytes: int | None
    gb_s: float | None
    times_floor: float  # total_ms over the floor's


# --- from a trace to rows


@dataclass
class Node:
    """An operator in the trace, with those that it called."""

    event: dict[str, Any]
    children: list[Node] = field(default_factory=list)

    @property
    def end(self) -> float:
        return float(self.event["ts"] + self.event["dur"])

    @property
    def own_ms(self) -> float:
        return float(self.event["dur"] - sum(c.event["dur"] for c in self.children)) / 1e3


def forest(events: Iterable[dict[str, Any]]) -> list[Node]:
    """The outermost operators of every thread."""
    roots: list[Node] = []
    open_in: dict[Any, list[Node]] = {}
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        stack = open_in.setdefault((event["pid"], event["tid"]), [])
        # Times are microseconds since boot in a double: the last digits of equal ends may differ.
        while stack and event["ts"] + event["dur"] > stack[-1].end + 0.01:
            stack.pop()
        node = Node(event)
        (stack[-1].children if stack else roots).append(node)
        stack.append(node)
    return roots


def _tensor_bytes(dims: list[Any], strides: list[Any], kind: str) -> int:
    if dims and isinstance(dims[0], list):  # a list of tensors, whose dtype is not recorded
        inner = strides if len(strides) == len(dims) else [[]] * len(dims)
        return sum(_tensor_bytes(d, s, "float") for d, s in zip(dims, inner, strict=True))
    count = 1
    for i, size in enumerate(dims):
        repeated = len(strides) == len(dims) and strides[i] == 0
        count *= 1 if repeated else size
    return count * SIZES.get(kind, 4)


def _arguments(event: dict[str, Any]) -> int:
    recorded = event.get("args", {})
    kinds, dims = recorded.get("Input type", []), recorded.get("Input Dims", [])
    strides = recorded.get("Input Strides") or [[]] * len(dims)
    return sum(
        _tensor_bytes(d, s, kind)
        for d, s, kind in zip(dims, strides, kinds, strict=True)
        if kind not in ("", "Scalar", "ScalarList", "GenericList", "None")
    )


class Memory:
    """Allocations in the order of their time: what a span of time left behind."""

    def __init__(self, events: Iterable[dict[str, Any]]) -> None:
        found = (e for e in events if e.get("name") == "[memory]")
        self.events = sorted(found, key=lambda e: e["ts"])
        self.times = [e["ts"] for e in self.events]

    def results(self, begin: float, end: float) -> int:
        alive: dict[Any, int] = {}
        for event in self.events[bisect_left(self.times, begin) : bisect_right(self.times, end)]:
            size, address = event["args"]["Bytes"], event["args"]["Addr"]
            if size > 0:
                alive[address] = size
            else:
                alive.pop(address, None)
        return sum(alive.values())


def traffic(node: Node, memory: Memory) -> int:
    """Bytes that an operator moves at least: its tensors by shape and dtype, and its results.

    A tensor counts once, also one that is read and written; expanded dimensions count as one;
    results are what it allocated and did not free. What only makes views or memory moves nothing.
    One that does its work by calling others moves what they do, where that is more.
    """
    inside = sum(traffic(child, memory) for child in node.children)
    space, _, name = node.event["name"].rpartition("::")
    # Nodes of the autograd graph pass tensors on, their operators do the work.
    if not space or space.startswith(("autograd", "torch::autograd")):
        return inside
    if space == "aten" and WITHOUT_TRAFFIC.fullmatch(name):
        return inside
    results = memory.results(node.event["ts"], node.end)
    return max(inside, _arguments(node.event) + results)


def _covered_ms(nodes: list[Node]) -> float:
    """Time in which at least one of them ran, on whatever thread."""
    covered, until = 0.0, float("-inf")
    for node in sorted(nodes, key=lambda n: n.event["ts"]):
        covered += max(0.0, node.end - max(until, node.event["ts"]))
        until = max(until, node.end)
    return covered / 1e3


@dataclass
class _Sum:
    calls: int = 0
    self_ms: float = 0.0
    total_ms: float = 0.0
    bytes: int = 0

    def add(self, node: Node, memory: Memory, nested: bool) -> None:
        self.calls += 1
        self.self_ms += node.own_ms
        if not nested:  # an operator that calls itself: the outer one has it all
            self.total_ms += node.event["dur"] / 1e3
            self.bytes += traffic(node, memory)


def _sums(nodes: list[Node], memory: Memory) -> dict[str, _Sum]:
    sums: dict[str, _Sum] = {}

    def visit(node: Node, above: frozenset[str]) -> None:
        name = node.event["name"]
        sums.setdefault(name, _Sum()).add(node, memory, name in above)
        for child in node.children:
            visit(child, above | {name})

    for node in nodes:
        visit(node, frozenset())
    return sums


def _row(
    benchmark: str,
    case: str,
    variant: str,
    kind: str,
    name: str,
    s: _Sum,
    *,
    calls: int,
    floor_ms: float,
) -> Row:
    return Row(
        benchmark,
        case,
        variant,
        kind,
        name,
        calls=s.calls / calls,
        self_ms=s.self_ms / calls,
        total_ms=s.total_ms / calls,
        bytes=round(s.bytes / calls) or None,
        gb_s=s.bytes / s.total_ms / 1e6 if s.bytes and s.total_ms else None,
        times_floor=s.total_ms / calls / floor_ms if floor_ms else float("nan"),
    )


def rows_of(trace: dict[str, Any], benchmark: str, case: str) -> list[Row]:
    """Rows of every variant in a chrome trace, the first one being the floor."""
    events = trace["traceEvents"]
    timed = [e for e in events if e.get("ph") == "X"]
    spans: dict[str, list[dict[str, Any]]] = {}
    for event in sorted(timed, key=lambda e: e["ts"]):
        if event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX):
            spans.setdefault(event["name"].removeprefix(PREFIX), []).append(event)
    work = [
        e
        for e in timed
        if e.get("cat") in ("cpu_op", "user_annotation", *DEVICE_WORK)
        and not e["name"].startswith(PREFIX)
    ]
    rows: list[Row] = []
    floor_ms = 0.0
    for variant, ranges in spans.items():
        mine = [
            e for e in work if any(r["ts"] <= e["ts"] <= r["ts"] + r["dur"] + 0.01 for r in ranges)
        ]
        on_device = [e for e in mine if e["cat"] in DEVICE_WORK]
        nodes = forest(e for e in mine if e["cat"] not in DEVICE_WORK)
        begin, end = ranges[0]["ts"], ranges[-1]["ts"] + ranges[-1]["dur"]
        memory = Memory(e for e in events if begin <= e.get("ts", -1) <= end)
        calls, total = len(ranges), sum(r["dur"] for r in ranges) / 1e3
        floor_ms = floor_ms or total / calls
        row = partial(_row, benchmark, case, variant, calls=calls, floor_ms=floor_ms)
        moved = sum(traffic(node, memory) for node in nodes)
        whole = _Sum(calls, max(0.0, total - _covered_ms(nodes)), total, moved)
        kernels: dict[str, _Sum] = {}
        for event in on_device:
            found = kernels.setdefault(event["name"], _Sum())
            found.calls += 1
            found.self_ms += event["dur"] / 1e3
            found.total_ms += event["dur"] / 1e3
        parts = [row("operator", name, s) for name, s in _sums(nodes, memory).items()]
        parts += [row("kernel", name, s) for name, s in kernels.items()]
        rows += [row("variant", variant, whole), *sorted(parts, key=lambda r: -r.self_ms)]
    return rows


# --- running


def _nvtx_domain() -> Any:
    try:
        return importlib.import_module("nvtx").get_domain("fastxkd.benchmarks")
    except ImportError:
        return None


@contextmanager
def _named(name: str, domain: Any) -> Iterator[None]:
    if domain is not None:
        domain.push_range(domain.get_event_attributes(message=name))
    try:
        with record_function(PREFIX + name):
            yield
    finally:
        if domain is not None:
            domain.pop_range()


def trace_of(variants: dict[str, Callable[[], object]], calls: int, path: Path) -> dict[str, Any]:
    """The chrome trace, kept in ``path``, of some calls of each; one before them is not in it."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]

    def finish() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    for call in variants.values():
        call()
    finish()
    domain = _nvtx_domain()
    with _silent_stderr():
        with profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
            for name, call in variants.items():
                for _ in range(calls):
                    with _named(name, domain):
                        call()
                        finish()  # inside: what the variant launched is its own
        profiler.export_chrome_trace(str(path))
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def chosen_variants(case: Case, wanted: list[str]) -> dict[str, Callable[[], object]]:
    """The floor, and the variants whose name contains one of the texts; all without any text."""
    floor = next(iter(case.variants))
    chosen = {
        name: call
        for name, call in case.variants.items()
        if name == floor or not wanted or any(text in name for text in wanted)
    }
    if wanted and len(chosen) == 1 and not any(text in floor for text in wanted):
        names = ", ".join(repr(name) for name in case.variants)
        raise SystemExit(f"--variant: none contains {' or '.join(wanted)}; there are {names}")
    return chosen


def run_case(
    benchmark: str, spec: Spec, *, wanted: list[str], calls: int, out: Path | None
) -> list[Row]:
    torch.compiler.reset()
    torch.manual_seed(0)
    variants = chosen_variants(spec.build(), wanted)
    with tempfile.TemporaryDirectory() as folder:
        words = re.sub(r"[^A-Za-z0-9.]+", "-", f"{benchmark}-{spec.name}").strip("-")
        path = (out or Path(folder)) / f"{words}.trace.json"
        return rows_of(trace_of(variants, calls, path), benchmark, spec.name)


def names() -> list[str]:
    """The benchmarks: scripts of this folder that have cases."""
    found = Path(__file__).parent.glob("[!_]*.py")
    return sorted(p.stem for p in found if re.search(r"^def specs\(", p.read_text(), re.MULTILINE))


# --- the table


def _number(value: float | None, digits: str) -> str:
    return "" if value is None else format(value, digits)


def markdown(rows: list[Row], top: int) -> str:
    """A table of the variants, each with the ``top`` rows of it that took most time."""
    lines = [
        "| | calls | self ms | total ms | MiB | GB/s | x floor |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    left, hidden = 0, 0

    def rest() -> None:
        if hidden:
            lines.append(f"| &nbsp;&nbsp;... {hidden} more | | | | | | |")

    for r in rows:
        if r.kind == "variant":
            rest()
            left, hidden, name = top, 0, f"**{r.name}**"
        elif left == 0:
            hidden += 1
            continue
        else:
            left -= 1
            name = r.name if len(r.name) <= 60 else f"{r.name[:57]}..."
            name = f"&nbsp;&nbsp;{'GPU: ' if r.kind == 'kernel' else ''}`{name}`"
        cells = [
            name.replace("|", "\\|"),
            f"{r.calls:g}",
            f"{r.self_ms:.4g}",
            f"{r.total_ms:.4g}",
            _number(None if r.bytes is None else r.bytes / 2**20, ".4g"),
            _number(r.gb_s, ".3g"),
            f"{r.times_floor:.3g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    rest()
    return "\n".join(lines)


def write(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = asdict(row).items()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("name", metavar="NAME", choices=names(), help=", ".join(names()))
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="TEXT", help="and the floor; repeatable"
    )
    parser.add_argument("--quick", action="store_true", help="the small cases")
    parser.add_argument("--calls", type=int, default=5, help="of each variant (5)")
    parser.add_argument("--top", type=int, default=8, help="rows of each variant to print (8)")
    parser.add_argument("--threads", type=int, default=0, help="instead of torch's default")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the table and the traces")
    chosen = parser.parse_args(arguments)
    if chosen.calls < 1:
        parser.error(f"--calls: expected at least 1, got {chosen.calls}")
    specs = importlib.import_module(f"benchmarks.{chosen.name}").specs(chosen.quick)
    selected = [s for s in specs if chosen.only in s.name]
    if not selected:
        parser.error(f"--only: no case contains {chosen.only!r}")
    if not torch.cuda.is_available():
        print("profile: no CUDA device, so the rows are those of the CPU", file=sys.stderr)
    if _nvtx_domain() is None:
        print(
            "profile: nvtx is not installed, so there are no NVTX ranges"
            " (pip install 'fastxkd[profile]')",
            file=sys.stderr,
        )
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for spec in selected:
        try:
            found = run_case(
                chosen.name, spec, wanted=chosen.variant, calls=chosen.calls, out=chosen.out
            )
        except Skip as why:
            print(f"profile: {spec.name} left out: {why}", file=sys.stderr)
            continue
        rows += found
        threads = torch.get_num_threads()
        print(
            f"\n### {chosen.name}: {spec.name}\n\n{threads} thread{'s' * (threads > 1)}, means of"
            f" {chosen.calls} calls under the profiler\n\n{markdown(found, chosen.top)}"
        )
    if chosen.out:
        write(rows, chosen.out / f"{chosen.name}.csv")


if __name__ == "__main__":
    main()
