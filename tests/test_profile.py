"""NVTX ranges, on and off, and the profile of a benchmark."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import distance, profile
from benchmarks._harness import Case, Skip, Spec
from fastxkd import _ranges
from fastxkd.ops import cam as cam_ops
from fastxkd.ops import distance as distance_ops

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = ("cam", "cam_backward", "distance", "distance_backward")


# --- the switch


def python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Code in a process of its own, where ``folder`` comes before what is installed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("FASTXKD_")} | environment
    env["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=env,
        cwd=folder,
    )


CALLS = """
import torch, fastxkd
torch.manual_seed(3)
x, y = torch.randn(20, 5).requires_grad_(True), torch.randn(20, 3)
a, g = torch.rand(2, 6, 5, 4).requires_grad_(True), torch.randn(2, 6, 5, 4)
score, maps = fastxkd.distance_correlation(x, y), fastxkd.cam_from(a, g, size=(9, 8))
score.backward()
maps.square().sum().backward()
results = [t.detach() for t in (score, maps, x.grad, a.grad)]
"""
PRINTED = "import json\nprint(json.dumps([t.tolist() for t in results]))\n"

# What a profiler would be told, with the names of the nvtx package.
RECORDER = """
class Domain:
    def __init__(self, name):
        self.name, self.open, self.seen = name, [], []
    def get_event_attributes(self, message=None, color=None, category=None, payload=None):
        return (self.name, message)
    def push_range(self, attributes):
        self.open.append(attributes)
        self.seen.append(attributes)
    def pop_range(self):
        self.open.pop()

domains = {}

def get_domain(name=None):
    return domains.setdefault(name, Domain(name))
"""

COMPILED = """
import warnings
import nvtx
(domain,) = nvtx.domains.values()
assert domain.open == []
eager, domain.seen = domain.seen, []
warnings.simplefilter("ignore", DeprecationWarning)  # dynamo's own, of autograd.Function

def both(x, y, a, g):
    return fastxkd.distance_correlation(x, y), fastxkd.cam_from(a, g, size=(9, 8))

x.grad = a.grad = None
found = torch.compile(both, fullgraph=True, backend="aot_eager")(x, y, a, g)
(found[0] + found[1].square().sum()).backward()
for one, other in zip([*found, x.grad, a.grad], results):
    torch.testing.assert_close(one, other)
torch.library.opcheck(torch.ops.fastxkd.cam.default, (g, g, "gradcam", [5, 4], True, 1))
torch.library.opcheck(torch.ops.fastxkd.distance.default, ([y, y],))
assert domain.open == []
compiled, domain.seen = domain.seen, []
try:  # what the operator raises passes through, and its range is closed
    torch.ops.fastxkd.cam(g, g, "no such method", [5, 4], True, 1)
    raise SystemExit("not raised")
except KeyError:
    pass
assert domain.seen and domain.open == []
import json
print(json.dumps([eager, compiled]))
"""


def test_off_is_the_very_function() -> None:
    def function() -> None: ...

    assert os.environ.get("FASTXKD_NVTX", "") != "1", "the suite runs with the ranges off"
    assert _ranges._domain is None
    assert _ranges.ranged("name")(function) is function
    for kernel in (
        cam_ops._cam,
        cam_ops._cam_backward,
        distance_ops._distance,
        distance_ops._distance_backward,
    ):
        assert not hasattr(kernel, "__wrapped__")


def test_on_records_every_operator_and_changes_no_result(tmp_path: Path) -> None:
    (tmp_path / "nvtx.py").write_text(RECORDER)
    run = python(CALLS + PRINTED + COMPILED, tmp_path, FASTXKD_NVTX="1")
    assert run.returncode == 0, run.stderr
    results, ranges = (json.loads(line) for line in run.stdout.splitlines())
    for names in ranges:
        assert {tuple(range_) for range_ in names} >= {("fastxkd", name) for name in OPERATORS}
    off: dict[str, Any] = {}
    exec(CALLS, off)
    for mine, theirs in zip(off["results"], results, strict=True):
        assert mine.tolist() == theirs


def test_on_with_the_package_itself(tmp_path: Path) -> None:
    if importlib.util.find_spec("nvtx") is None:
        pytest.skip("nvtx is not installed")
    run = python(CALLS + PRINTED, tmp_path, FASTXKD_NVTX="1")
    assert run.returncode == 0, run.stderr
    off: dict[str, Any] = {}
    exec(CALLS, off)
    assert json.loads(run.stdout) == [t.tolist() for t in off["results"]]


def test_on_without_the_package_names_the_extra(tmp_path: Path) -> None:
    hidden = "import sys\nsys.modules['nvtx'] = None\nimport fastxkd"
    run = python(hidden, tmp_path, FASTXKD_NVTX="1")
    assert run.returncode != 0
    assert "FASTXKD_NVTX=1: this feature needs the package 'nvtx'" in run.stderr
    assert "pip install 'fastxkd[profile]'" in run.stderr


def test_unknown_value_of_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTXKD_NVTX", "yes")
    with pytest.raises(ValueError, match="FASTXKD_NVTX: expected 0 or 1, got 'yes'"):
        _ranges._read_environment()
    for off in ("", "0"):
        monkeypatch.setenv("FASTXKD_NVTX", off)
        assert _ranges._read_environment() is None


# --- from a trace to rows


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "pid": 7,
        "tid": tid,
        "ts": ts,
        "dur": dur,
        "args": {name.replace("_", " "): value for name, value in args.items()},
    }


def memory(ts: float, size: int, address: int) -> dict[str, Any]:
    args = {"Bytes": size, "Addr": address}
    return {"ph": "i", "name": "[memory]", "pid": 7, "tid": 1, "ts": ts, "args": args}


def operands(*dims: list[int], kind: str = "float") -> dict[str, Any]:
    return {"Input_type": [kind] * len(dims), "Input_Dims": list(dims)}


def test_rows_of_a_written_trace() -> None:
    events = [
        event("user_annotation", "benchmark: floor", 0, 1000),
        event("cpu_op", "aten::add", 100, 500, **operands([10, 10], [10, 10], [10, 10])),
        # Two calls: Python, an operator that calls two, and one on another thread beside it.
        event("user_annotation", "benchmark: ours", 2000, 2000),
        event("cpu_op", "aten::outer", 2100, 800, **operands([10, 10])),
        event("cpu_op", "aten::mul", 2150, 200, **operands([10, 10], [10, 10], kind="c10::Half")),
        memory(2200, 200, 1),
        event("cpu_op", "aten::outer", 2400, 100, **operands([5])),
        memory(2600, 64, 2),
        memory(2650, -64, 2),
        event("cpu_op", "MulBackward0", 2500, 600, tid=2, **operands([10, 10])),
        event("cpu_op", "aten::view", 2550, 10, tid=2, **operands([10, 10])),
        event("user_annotation", "benchmark: ours", 5000, 1000),
        event("kernel", "fast_kernel", 5200, 300, tid=9),
        event("cpu_op", "aten::add", 6500, 10),  # of nobody
    ]
    rows = profile.rows_of({"traceEvents": events[::-1]}, "x", "c")
    floor, add, ours, outer, back, mul, kernel, view = [
        next(r for r in rows if (r.variant, r.name) == key)
        for key in [
            ("floor", "floor"),
            ("floor", "aten::add"),
            ("ours", "ours"),
            ("ours", "aten::outer"),
            ("ours", "MulBackward0"),
            ("ours", "aten::mul"),
            ("ours", "fast_kernel"),
            ("ours", "aten::view"),
        ]
    ]
    assert len(rows) == 8
    assert [r.kind for r in (floor, add, kernel)] == ["variant", "operator", "kernel"]
    assert (floor.calls, floor.self_ms, floor.total_ms, floor.times_floor) == (1, 0.5, 1.0, 1.0)
    assert (add.self_ms, add.total_ms, add.bytes, add.times_floor) == (0.5, 0.5, 1200, 0.5)
    assert add.gb_s == pytest.approx(1200 / 0.5e-3 / 1e9)
    assert floor.bytes == 1200
    # 3 ms in two calls, of which 2100 to 3100 lies in operators on either thread.
    assert (ours.calls, ours.total_ms, ours.self_ms) == (1, 1.5, pytest.approx(1.0))
    assert ours.times_floor == pytest.approx(1.5)
    # The inner one's time is in the outer's. Its two moved 600 and 20, more than its own 400 + 200.
    assert (outer.calls, outer.total_ms) == (1, pytest.approx(0.4))
    assert outer.self_ms == pytest.approx((800 - 200 - 100 + 100) / 2e3)
    assert (outer.bytes, mul.bytes) == (310, 300)
    assert ours.bytes == 310
    assert (back.bytes, view.bytes, kernel.bytes) == (None, None, None)
    assert (kernel.calls, kernel.self_ms, kernel.total_ms) == (0.5, 0.15, 0.15)


def traced(call: Any, tmp_path: Path) -> profile.Row:
    trace = profile.trace_of({"floor": call}, 2, tmp_path / "trace.json")
    (row,) = [r for r in profile.rows_of(trace, "x", "c") if r.kind == "variant"]
    return row


def test_bytes_of_real_operators(tmp_path: Path) -> None:
    unit = 64 * 96 * 4
    a, b, out = torch.randn(64, 96), torch.randn(64, 96), torch.empty(64, 96)
    half = a.to(torch.bfloat16)
    line = torch.randn(1, 96)
    cases = {
        "two read, one written": (lambda: torch.add(a, b, out=out), 3 * unit),
        "two read, a new one": (lambda: a * b, 3 * unit),
        "read, and twice the size written": (lambda: half.double(), unit // 2 + 2 * unit),
        "read and written in place": (lambda: out.copy_(a), 2 * unit),
        "a list": (lambda: torch.cat([a, b]), 4 * unit),
        "a view": (lambda: a.T, None),
        "nothing to do": (lambda: a.float().contiguous().reshape(96, 64), None),
        "an expanded row": (lambda: torch.add(a, line.expand(64, 96), out=out), 2 * unit + 96 * 4),
        "two operators": (lambda: (a * b).log_softmax(1), 5 * unit),
    }
    for name, (call, expected) in cases.items():
        assert traced(call, tmp_path).bytes == expected, name


# --- running


class Unseen:
    """Work that torch knows nothing of, as a C++ kernel called directly."""

    def __call__(self) -> None:
        sum(range(20_000))


def tiny() -> Case:
    x = torch.randn(32, 48)
    return Case(
        {
            "floor: copy": lambda: x.clone(),
            "eager": lambda: x.exp().sum(),
            "ours, kernel only": Unseen(),
        }
    )


def missing() -> Case:
    raise Skip("needs no-such-package")


@pytest.fixture
def tiny_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [Spec("tiny, 32x48", tiny), Spec("missing", missing)]
    monkeypatch.setattr(distance, "specs", lambda quick: specs)


@pytest.mark.usefixtures("tiny_benchmark")
def test_main_writes_table_and_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    profile.main(["distance", "--out", str(out), "--calls", "3", "--top", "1"])
    said = capsys.readouterr()
    assert "missing left out: needs no-such-package" in said.err
    if not torch.cuda.is_available():
        assert "no CUDA device" in said.err
    trace = json.loads((out / "distance-tiny-32x48.trace.json").read_text())
    names = [e["name"] for e in trace["traceEvents"]]
    assert names.count("benchmark: ours, kernel only") >= 3
    with (out / "distance.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {r["case"] for r in rows} == {"tiny, 32x48"}
    variants = [r for r in rows if r["kind"] == "variant"]
    assert [r["variant"] for r in variants] == ["floor: copy", "eager", "ours, kernel only"]
    assert float(variants[0]["times_floor"]) == 1
    kernel = variants[2]
    assert kernel["self_ms"] == kernel["total_ms"]
    assert kernel["bytes"] == ""
    assert float(kernel["total_ms"]) > 0
    assert {"aten::exp", "aten::sum"} <= {r["name"] for r in rows if r["variant"] == "eager"}
    table = said.out
    assert "### distance: tiny, 32x48" in table
    assert "| **ours, kernel only** | 1 |" in table
    assert "more |" in table


@pytest.mark.usefixtures("tiny_benchmark")
def test_variants_can_be_chosen_and_nvtx_may_be_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    profile.main(["distance", "--only", "tiny", "--variant", "kernel", "--calls", "1"])
    said = capsys.readouterr()
    assert "nvtx is not installed" in said.err
    assert "fastxkd[profile]" in said.err
    assert "**floor: copy**" in said.out
    assert "**ours, kernel only**" in said.out
    assert "eager" not in said.out
    with pytest.raises(SystemExit, match="--variant: none contains nobody; there are 'floor"):
        profile.main(["distance", "--only", "tiny", "--variant", "nobody"])


@pytest.mark.usefixtures("tiny_benchmark")
def test_variants_are_nvtx_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    spoken: dict[str, Any] = {}
    exec(RECORDER, spoken)
    recorder = type(sys)("nvtx")
    recorder.get_domain = spoken["get_domain"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvtx", recorder)
    profile.main(["distance", "--only", "tiny", "--calls", "2"])
    domain = spoken["domains"]["fastxkd.benchmarks"]
    assert [name for _, name in domain.seen] == [
        *["floor: copy"] * 2,
        *["eager"] * 2,
        *["ours, kernel only"] * 2,
    ]
    assert domain.open == []


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["no_such_benchmark"], "invalid choice: 'no_such_benchmark'"),
        (["distance", "--only", "huge"], "--only: no case contains 'huge'"),
        (["distance", "--calls", "0"], "--calls: expected at least 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            profile.main(arguments)
        assert message in capsys.readouterr().err


def test_every_benchmark_with_cases_is_known() -> None:
    assert set(profile.names()) >= {"kd_loss", "cam", "unicam", "distance"}
    assert not {"profile", "table", "gpu"} & set(profile.names())
