"""The GPU benchmark's stages and report, on the CPU and at a small size."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastxkd
from benchmarks import gpu
from benchmarks.gpu import losses
from benchmarks.gpu import stage as stages
from tests import test_gpu

BACKENDS = ("cpu", "reference") if fastxkd.ops._library._cpu is not None else ("reference",)
TINY = gpu.Plan(
    device="cpu",
    backends=BACKENDS,
    shapes=((6, 50), (3, 9)),
    dtypes=("float32", "bfloat16"),
    copied=1 << 16,
    flushed=1 << 10,
    linear=(8, 6, 5, 40),
    maps=((2, 3, 4, 4),),
    samples=(12, 5),
    layers=(3, 12, 5),
    units=(3, 5, 4),
    masks=(2, 9, 7),
    rounds=2,
    seconds=0.002,
    compile=False,
)
DIVERGENCES = len(TINY.divergences)


def here(command: list[str], env: dict[str, str], log: Path, seconds: float) -> int | None:
    """Stages in this process; commands only say what they are."""
    if "FASTXKD_GPU_JOB" not in env:
        with log.open("a") as file:
            file.write(f"\n$ command\n{' '.join(command[1:4])} did it\n")
        return 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTXKD_GPU_JOB", env["FASTXKD_GPU_JOB"])
        try:
            gpu.stage_process()
        except Exception as error:
            with log.open("a") as file:
                file.write(f"\n$ stage\n{stages.brief(error)}\n")
            return 1
    return 0


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "in_process", here)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)


@pytest.mark.usefixtures("in_this_process")
def test_whole_pipeline(tmp_path: Path) -> None:
    report = gpu.run(TINY, tmp_path / "out", budget=300)
    assert [(s["stage"], s["state"]) for s in report.stages] == [
        (job.name, "done") for job in gpu.JOBS
    ]
    assert report.bandwidth is not None
    assert report.bandwidth["bytes_per_s"] > 0
    assert report.bandwidth["tensor_bytes"] == 1 << 16
    cases: dict[str, list[str]] = {}
    for row in report.rows:
        cases.setdefault(row["case"], []).append(row["variant"])
        assert 0 < row["min_ms"] <= row["ms"] <= row["max_ms"]
        assert row["call_ms"] > 0
        assert row["times_floor"] > 0
    assert sorted(cases)[:3] == [
        f"cam gradcam 2x3x4x4 {case}"
        for case in ("channels_last bfloat16", "channels_last float32", "contiguous bfloat16")
    ]
    by_backend = [f"{b}{o}" for b in BACKENDS for o in ("", ", backward")]
    assert cases["cam gradcam++ 2x3x4x4 contiguous float32"] == [
        "floor: read both",
        *by_backend,
        "eager",
    ]
    last = cases["cam layercam 2x3x4x4 channels_last bfloat16"]
    assert last == ["floor: read both", *BACKENDS, "eager"]
    assert cases["distance_correlation 12x5 float32"]
    mine = [f"{b}{o}" for b in BACKENDS for o in (", operator", "")]
    for case in ("6x50 float32", "6x50 bfloat16", "3x9 float32", "3x9 bfloat16"):
        found = cases[f"kd_loss {case}"]
        assert found.count("floor: add(s, t, out=g)") == 2
        assert set(mine) <= set(found)
        assert {f"{m}, {d}" for m in mine for d in TINY.divergences[1:]} <= set(found)
        assert {"eager", *(f"eager, {d}" for d in TINY.divergences[1:])} <= set(found)
        assert len(found) == 2 + DIVERGENCES * (2 * len(BACKENDS) + 1)
    assert cases["linear_kd_loss 8x6/5 to 40 bfloat16"] == [
        "floor: four products",
        "eager",
        "logits, kd_loss",
        "ours",
    ]
    # Three times the logits, over the time, over the bandwidth.
    row = next(r for r in report.rows if r["case"] == "kd_loss 6x50 float32")
    share = 3 * 6 * 50 * 4 / (row["ms"] * 1e-3) / report.bandwidth["bytes_per_s"]
    assert row["bandwidth"] == pytest.approx(share)
    kernel = next(r for r in report.rows if r["variant"] == f"{BACKENDS[0]}, operator")
    assert kernel["peak_bytes"] >= 6 * 50 * 4
    for row in report.rows:
        if row["case"].startswith("concepts") and row["note"]:
            assert row["note"] == "the same integers"
        elif row["note"]:
            limit = 1e-5 if "float32" in row["case"] else 0.1
            assert float(row["note"].rsplit(" ", 1)[1]) < limit, row
    assert sum("loss off by" in row["note"] for row in report.rows) == 4 * DIVERGENCES * (
        len(BACKENDS) + 1
    )
    assert all("Liger" in x["what"] for x in report.left_out)
    assert len(report.left_out) == 4
    names = {c["what"] for c in report.checks}
    of_backend = DIVERGENCES + len(test_gpu.CAM_METHODS) + 1  # and concepts
    assert len(names) == len(BACKENDS) * of_backend * 2 + len(test_gpu.LOSSES)
    assert [c for c in report.checks if not c["passed"]] == []

    kept = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert kept == dataclasses.asdict(report)
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert f"| torch | {torch.__version__} |" in text
    assert "| commit |" in text
    assert "| build | done |" in text
    assert "| kd_loss 3x9 bfloat16 | eager, dkd |" in text
    assert f"{len(names)} checks, 0 failed" in text
    assert "## Left out" in text


@pytest.mark.usefixtures("in_this_process")
def test_a_failing_stage_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(stage: gpu.Stage) -> None:
        stage.put("left out", what="this", why="that")
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    jobs = (
        gpu.Job("broken", 10, broken),
        gpu.Job("bandwidth", 10, gpu.bandwidth),
    )
    monkeypatch.setattr(gpu, "JOBS", jobs)
    report = gpu.run(TINY, tmp_path, budget=100, jobs=jobs)
    first, second = report.stages
    assert (first["state"], second["state"]) == ("failed (1)", "done")
    assert first["text"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert report.left_out == [{"what": "this", "why": "that"}]
    assert report.bandwidth is not None
    text = (tmp_path / "gpu.md").read_text()
    assert "| broken | failed (1) |" in text
    assert "an illegal memory access" in text


@pytest.mark.usefixtures("in_this_process")
def test_without_time_stages_are_named_and_not_begun(tmp_path: Path) -> None:
    report = gpu.run(TINY, tmp_path, budget=gpu.GRACE)
    assert {s["state"] for s in report.stages} == {"out of time"}
    assert [s["stage"] for s in report.stages] == [job.name for job in gpu.JOBS]
    assert report.rows == []


def stage(tmp_path: Path, seconds: float = 60.0, bandwidth: float | None = None) -> gpu.Stage:
    return gpu.Stage(TINY, tmp_path / "lines", seconds, bandwidth)


def told(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]


def test_a_failing_variant_does_not_end_the_others(tmp_path: Path) -> None:
    def fails() -> None:
        raise ValueError("no\nsecond line")

    at_work = stage(tmp_path)
    at_work.measure("case", stages.Variant("wrong", fails), None)
    at_work.measure("case", stages.Variant("right", lambda: torch.ones(1000).sum()), None)
    wrong, right = told(tmp_path)
    assert (wrong["kind"], wrong["what"], wrong["why"]) == (
        "left out",
        "case: wrong",
        "ValueError: no",
    )
    assert (right["kind"], right["variant"]) == ("row", "right")
    assert right["bandwidth"] is None
    assert right["times_floor"] is None
    assert right["peak_bytes"] >= 4000


def test_a_variant_that_breaks_the_device_ends_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work = stage(tmp_path)

    def out_of_order() -> None:
        raise RuntimeError("CUDA error")

    def breaks() -> None:
        monkeypatch.setattr(at_work.clock, "synchronize", out_of_order)
        raise RuntimeError("misaligned address")

    with pytest.raises(RuntimeError, match="misaligned"):
        at_work.measure("case", stages.Variant("breaks", breaks), None)
    assert not (tmp_path / "lines").exists()


def test_when_the_time_is_up_nothing_more_begins(tmp_path: Path) -> None:
    at_work = stage(tmp_path, seconds=-1)
    at_work.measure("case", stages.Variant("late", lambda: pytest.fail("begun")), None)
    gpu.kd_loss_kernels(at_work)
    found = told(tmp_path)
    assert {x["why"] for x in found} == {"no time left"}
    assert found[0]["what"] == "case: late"
    assert len(found) == 1 + 2 * 4


def test_clock_times_calls_and_what_comes_before_is_not_timed() -> None:
    clock = stages.Clock(dataclasses.replace(TINY, rounds=7, seconds=10.0))
    done: list[str] = []

    def call() -> None:
        done.append("call")
        time.sleep(0.003)

    def before() -> None:
        done.append("before")
        time.sleep(0.02)

    seconds = clock.samples(call, before)
    assert done == ["before", "call"] * 7
    assert all(0.003 <= s < 0.02 for s in seconds)
    done.clear()
    assert 0.003 <= clock.each(call, about=10.0) < 0.02
    assert done == ["call"] * 5
    assert clock.peak(lambda: (torch.ones(1 << 10), torch.ones(1 << 10))) == 2 * 4 << 10


def test_eager_forms_are_the_losses_of_the_library() -> None:
    student, teacher, labels = test_gpu.logits(9, 33, torch.float64)
    for name, options in test_gpu.DIVERGENCES.items():
        beta = {"jsd": {"beta": 0.5}, "dist": {"beta": 1.0}}.get(name, {})
        hard, soft = test_gpu.parts_of(student, teacher, labels, options | beta)
        for loss in (losses.eager, losses.ours):
            torch.testing.assert_close(loss(student, teacher, labels, name), hard + soft)
        batch = losses.Batch(9, 33, torch.float64, torch.device("cpu"))
        batch.student, batch.teacher, batch.labels = student, teacher, labels
        with fastxkd.use_backend("reference"):
            found, _, grad = losses.operator(batch, name)()  # type: ignore[misc]
        torch.testing.assert_close(found, hard + soft)
        assert grad.shape == student.shape
    torch.testing.assert_close(
        losses.forward_kl(student, teacher, labels),
        losses.eager(student, teacher, labels, "forward_kl"),
    )


def test_a_wrong_loss_shows_in_the_note() -> None:
    batch = losses.Batch(9, 33, torch.float32, torch.device("cpu"))
    right = batch.deviation(lambda s, t, y: losses.eager(s, t, y, "forward_kl"), "forward_kl")
    assert float(right.rsplit(" ", 1)[1]) < 1e-5
    wrong = batch.deviation(lambda s, t, y: 1.5 * losses.eager(s, t, y, "forward_kl"), "forward_kl")
    assert wrong == "loss off by 5.0e-01"


def test_liger_is_used_as_its_interface_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's losses under its names; its cross-entropy spoils the logits, as the real one."""

    class CrossEntropy(torch.nn.CrossEntropyLoss):
        def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            found = F.cross_entropy(logits.clone(), labels)
            with torch.no_grad():
                logits.data.zero_()
            return found

    peer = type(sys)("liger_kernel.transformers")
    peer.LigerKLDIVLoss = torch.nn.KLDivLoss  # type: ignore[attr-defined]
    peer.LigerCrossEntropyLoss = CrossEntropy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", type(sys)("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", peer)
    batch = losses.Batch(9, 33, torch.float32, torch.device("cpu"))
    assert float(batch.deviation(losses.liger(), "forward_kl").rsplit(" ", 1)[1]) < 1e-5


def test_numbers_tell_a_wrong_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = dataclasses.replace(
        TINY, backends=("reference",), dtypes=("float32",), divergences=("forward_kl", "tvd")
    )
    monkeypatch.setattr(test_gpu, "LOSSES", {"at": test_gpu.LOSSES["at"]})
    monkeypatch.setattr(test_gpu, "CAM_METHODS", ("gradcam", "layercam"))
    real, right = test_gpu.loss_of, fastxkd.cam_from

    def off(student: Any, teacher: Any, labels: Any, options: Any) -> torch.Tensor:
        return (1.001 if "divergence" in options else 1) * real(student, teacher, labels, options)

    def off_map(a: Any, g: Any, method: str, size: Any) -> torch.Tensor:
        return (1.001 if method == "layercam" else 1) * right(a, g, method, size)

    monkeypatch.setattr(test_gpu, "loss_of", off)
    monkeypatch.setattr(fastxkd, "cam_from", off_map)
    areas = test_gpu.concepts.label_areas
    monkeypatch.setattr(test_gpu.concepts, "label_areas", lambda *given: areas(*given) + 1)
    gpu.numbers(gpu.Stage(plan, tmp_path / "lines", 60, None))
    assert [(c["what"], c["passed"]) for c in told(tmp_path)] == [
        ("reference, forward_kl, float32", True),
        ("reference, tvd, float32", False),
        ("reference, cam gradcam, float32", True),
        ("reference, cam layercam, float32", False),
        ("reference, concepts, float32", False),
        ("at", True),
    ]


# --- processes


def test_a_process_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "print('begun', flush=True)\ntime.sleep(60)"
    )
    log = tmp_path / "log"
    begin = time.monotonic()
    assert gpu.in_process([sys.executable, "-c", code], dict(os.environ), log, 3.0) is None
    assert time.monotonic() - begin < 30
    assert log.read_text().endswith("begun\n")
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child is still running")


def test_a_stage_in_a_process_of_its_own(tmp_path: Path) -> None:
    (job,) = [job for job in gpu.JOBS if job.name == "bandwidth"]
    report = gpu.Report({})
    log = tmp_path / "log"
    gpu.run_stage(job, TINY, report, log, 60)
    assert report.stages[0]["state"] == "done", log.read_text()
    assert report.bandwidth is not None
    assert report.bandwidth["copy_bytes_per_s"] > 0


def test_what_was_written_before_the_end_is_kept(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    check = {"kind": "check", "what": "one", "passed": True, "text": "ok"}
    lines.write_text(json.dumps(check) + '\n{"kind": "row", "ca')
    report = gpu.Report({})
    report.take(lines)
    report.take(tmp_path / "never written")
    assert [c["what"] for c in report.checks] == ["one"]
    assert report.rows == []


def test_last_words() -> None:
    assert gpu.last_words("") == ""
    assert gpu.last_words("\n$ python -m x\nTrace\nValueError: no\n\n") == "ValueError: no"
    done = "$ pytest\ntests/a.py::one PASSED [ 50%]\n==== 1 passed, 1 failed in 3.2s ===="
    assert gpu.last_words(f"\n{done}") == "1 passed, 1 failed in 3.2s"
    cut = "\n$ pytest\ntests/a.py::one PASSED [ 3%]\ntests/a.py::b FAILED [ 6%]\ntests/a.py::c "
    assert gpu.last_words(cut) == "so far 1 failed, 1 passed"


@pytest.mark.slow
def test_the_commands_exist() -> None:
    plan = gpu.Plan()
    assert gpu.build(plan)[1:] == ["setup.py", "build_ext", "--inplace"]
    assert (gpu.ROOT / "setup.py").is_file()
    command = gpu.tests(plan)
    assert all((gpu.ROOT / part).is_file() for part in command if part.endswith(".py"))
    run = subprocess.run([*command, "--collect-only"], cwd=gpu.ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "test_graph_capture_and_replay[cuda-" in run.stdout


def test_without_a_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("benchmarks.gpu: needs a CUDA device: ")
    assert not (tmp_path / "out").exists()
    for options, message in (
        (["--only", "kernels,speed"], "--only: expected stages of build, .*, got speed"),
        (["--budget", "0"], "--budget: expected a number of seconds above 0"),
    ):
        with pytest.raises(SystemExit):
            gpu.main(["--out", str(tmp_path), *options])
        assert re.search(message, capsys.readouterr().err)
