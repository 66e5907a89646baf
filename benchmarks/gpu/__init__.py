"""``python -m benchmarks.gpu --out DIR``: everything a CUDA machine can say, in eight minutes.

Builds the CUDA extension, runs the tests that need a device, and times the kernels against the
machine's own copy bandwidth, eager torch, torch.compile and Liger-Kernel. Needs torch, numpy,
pytest and this repository; nvcc and setuptools with pybind11 for the build. Writes DIR/gpu.md,
DIR/gpu.json and DIR/gpu.log; what fails or runs out of time is said there, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks._machine import ROOT
from benchmarks.gpu.checks import numbers
from benchmarks.gpu.concepts import concept_kernels
from benchmarks.gpu.distances import distance_kernels
from benchmarks.gpu.losses import kd_loss_kernels, kd_loss_peers, linear_loss
from benchmarks.gpu.maps import cam_kernels
from benchmarks.gpu.report import Report, facts, markdown, write
from benchmarks.gpu.stage import Plan, Stage, bandwidth

GRACE = 10.0  # seconds that a stage gets beyond its time before it is ended


def build(plan: Plan) -> list[str]:
    return [sys.executable, "setup.py", "build_ext", "--inplace"]


def tests(plan: Plan) -> list[str]:
    # Without the project's pytest settings, which may ask for plugins that are not there.
    settings = [
        "-c",
        os.devnull,
        "--rootdir",
        str(ROOT),
        "-p",
        "no:cacheprovider",
        "-o",
        "markers=gpu",
    ]
    return [sys.executable, "-m", "pytest", *settings, "-v", "--tb=short", *plan.tests]


@dataclass(frozen=True)
class Job:
    """A stage: a command of its own, or a function that fills in the report."""

    name: str
    seconds: float
    work: Callable[[Plan], list[str]] | Callable[[Stage], None]
    command: bool = False


# In the order of what would be missed most. The seconds are shares: a stage gets its own of what is
# left, so the time that one does not need goes to those after it.
JOBS = (
    Job("build", 100, build, command=True),
    Job("bandwidth", 25, bandwidth),
    Job("kernels", 110, kd_loss_kernels),
    Job("tests", 100, tests, command=True),
    Job("cam", 40, cam_kernels),
    Job("peers", 100, kd_loss_peers),
    Job("numbers", 35, numbers),
    Job("linear", 25, linear_loss),
    Job("distance", 30, distance_kernels),
    Job("concepts", 25, concept_kernels),
)


def environment(plan: Plan) -> dict[str, str]:
    env = dict(os.environ)
    if plan.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        arch = os.environ.get("FASTXKD_CUDA_ARCH") or f"{major}{minor}"
        # The C++ kernels take a minute more and are not what this is about.
        env |= {"FASTXKD_CUDA": "1", "FASTXKD_CPU": "0", "FASTXKD_CUDA_ARCH": arch}
    return env


def in_process(command: list[str], env: dict[str, str], log: Path, seconds: float) -> int | None:
    """The exit status; None when it did not end in time, and was ended with all it had started."""
    with log.open("a") as file:
        file.write(f"\n$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def run_stage(job: Job, plan: Plan, report: Report, log: Path, seconds: float) -> None:
    begin, mark = time.monotonic(), log.stat().st_size if log.exists() else 0
    with tempfile.TemporaryDirectory() as folder:
        lines, env = Path(folder, "lines"), environment(plan)
        if job.command:
            command = job.work(plan)
        else:
            command = [sys.executable, "-m", "benchmarks.gpu"]
            speed = report.bandwidth and report.bandwidth["bytes_per_s"]
            task = {
                "stage": job.name,
                "plan": asdict(plan),
                "lines": str(lines),
                "seconds": seconds,
                "bandwidth": speed,
            }
            env["FASTXKD_GPU_JOB"] = json.dumps(task)
        code = in_process(command, env, log, seconds + (0 if job.command else GRACE))  # type: ignore[arg-type]
        report.take(lines)
    said = log.read_bytes()[mark:].decode(errors="replace")
    state = {0: "done", None: "out of time"}.get(code, f"failed ({code})")
    text = "" if code == 0 and not job.command else last_words(said)
    took = round(time.monotonic() - begin, 1)
    report.stages.append({"stage": job.name, "state": state, "seconds": took, "text": text})


def last_words(said: str) -> str:
    """Its last line, the error or the summary; of tests that did not end, how far they came."""
    lines = [line.strip(" =") for line in said.splitlines()[1:] if line.strip(" =")]
    ended = re.findall(r"^tests/\S+ (PASSED|FAILED|SKIPPED|ERROR)", said, re.MULTILINE)
    if ended and not re.search(r" in [\d.]+s", lines[-1]):
        return "so far " + ", ".join(f"{ended.count(s)} {s.lower()}" for s in sorted(set(ended)))
    return lines[-1][:200] if lines else ""


def stage_process() -> None:
    """The other side: a stage in this process, as the environment says."""
    task = json.loads(os.environ["FASTXKD_GPU_JOB"])
    plan = Plan(**{k: _tuples(v) if isinstance(v, list) else v for k, v in task["plan"].items()})
    job = next(job for job in JOBS if job.name == task["stage"])
    guard = torch.cuda.device(0) if plan.device == "cuda" else nullcontext()
    with guard:
        stage = Stage(plan, Path(task["lines"]), task["seconds"], task["bandwidth"])
        job.work(stage)  # type: ignore[arg-type]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def run(plan: Plan, out: Path, budget: float, jobs: tuple[Job, ...] = JOBS) -> Report:
    """All stages, their files in ``out`` after each of them."""
    until = time.monotonic() + budget
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.write_text("")
    report = Report(facts(plan))
    shares = sum(job.seconds for job in jobs)
    for job in jobs:
        left = until - time.monotonic() - GRACE
        seconds = left * job.seconds / shares
        if seconds < min(5.0, budget / 20):
            text = "the stages before took the time"
            report.stages.append(
                {"stage": job.name, "state": "out of time", "seconds": 0.0, "text": text}
            )
        else:
            print(f"gpu: {job.name}, up to {seconds:.0f} s", file=sys.stderr)
            run_stage(job, plan, report, log, seconds)
            print(f"gpu: {job.name}: {report.stages[-1]['state']}", file=sys.stderr)
        shares -= job.seconds
        write(report, out)
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the report")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds in all (480)")
    parser.add_argument("--only", default="", metavar="STAGES", help="some of them, by comma")
    chosen = parser.parse_args(arguments)
    wanted = [name for name in chosen.only.split(",") if name]
    unknown = set(wanted) - {job.name for job in JOBS}
    if unknown:
        known = ", ".join(job.name for job in JOBS)
        parser.error(f"--only: expected stages of {known}, got {', '.join(sorted(unknown))}")
    if not chosen.budget > 0:
        parser.error(f"--budget: expected a number of seconds above 0, got {chosen.budget}")
    if not torch.cuda.is_available():
        why = (
            "this torch is built without CUDA" if torch.version.cuda is None else "torch sees none"
        )
        print(f"benchmarks.gpu: needs a CUDA device: {why}", file=sys.stderr)
        return 2
    jobs = tuple(job for job in JOBS if not wanted or job.name in wanted)
    report = run(Plan(), chosen.out, chosen.budget, jobs)
    print(markdown(report))
    passed = all(c["passed"] for c in report.checks)
    return 0 if passed and all(s["state"] == "done" for s in report.stages) else 1
