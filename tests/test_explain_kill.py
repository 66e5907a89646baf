"""Runs over a data set that are killed, or whose disk fills up, and end with the same bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastxkd import cli
from fastxkd.runs import durable, reader
from fastxkd.runs.explain import explain
from fastxkd.runs.verify import verify
from tests.conftest import needs
from tests.test_explain import Pictures, files, net

ROOT = Path(__file__).resolve().parents[1]
KILLS = 30

# Runs in a process of its own, which imports everything once and forks for every attempt: a kill
# then costs what the run had done, not ten seconds of imports. The parent has no threads.
ATTEMPTS = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import fastxkd.runs.run_report, numcodecs.zstd, pyarrow.parquet, pyarrow.compute, jinja2, PIL.Image
from fastxkd.runs.explain import explain
from tests.test_explain import Pictures, net

out, workers, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

def attempt(folder):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            explain(net(), Pictures(60, broken=(7, 40)), folder, chunk=3, batch_size=2,
                    methods=["gradcam", "layercam"], workers=workers)
            code = 0
        finally:
            os._exit(code)
    return child

def ended(child, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.001)
    return None

def waited(child):
    began = time.monotonic()
    assert os.waitpid(child, 0)[1] == 0
    return time.monotonic() - began

waited(attempt(f"{out}/whole"))
length = waited(attempt(f"{out}/whole again"))
draw = random.Random(seed).random
killed, progress, run = 0, [], 0
while killed < kills:
    folder = f"{out}/run {run}"
    while True:
        child = attempt(folder)
        status = ended(child, length * draw())
        if status is None:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        if status == 0:
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
        killed += 1
        scores = f"{folder}/scores"
        progress.append(len(os.listdir(scores)) if os.path.isdir(scores) else -1)
    run += 1
print(json.dumps({"killed": killed, "runs": run, "progress": progress, "length": length}))
"""


@pytest.fixture(autouse=True)
def _installed() -> None:
    for module in ("numcodecs", "pyarrow", "jinja2", "PIL"):
        needs(module)


def check(run: Path, whole: dict[str, bytes]) -> None:
    """Complete, the same bytes, every chunk once, nothing left over."""
    assert files(run) == whole
    assert verify(run) == []
    assert reader.open(run).complete
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    chunks = [line["chunk"] for line in lines if "chunk" in line]
    assert chunks == list(range(20))
    names = {path.name for path in run.rglob("*")}
    assert not [name for name in names if name.endswith(".tmp") or name in ("journal", ".lock")]
    assert (run / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills"), [(0, KILLS), (1, 4)])
def test_killed_at_random_moments_and_started_again(tmp_path, workers, kills):
    seed = random.SystemRandom().randrange(10**6)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ATTEMPTS, str(tmp_path), str(workers), str(kills),
         str(seed)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-3000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] >= kills
    if kills == KILLS:  # in all stages: before anything was written, in the middle, near the end
        assert len(set(found["progress"])) > 3, f"seed {seed}: {found}"
    whole = files(tmp_path / "whole")
    assert files(tmp_path / "whole again") == whole
    for number in range(found["runs"]):
        check(tmp_path / f"run {number}", whole)
    errors = reader.open(tmp_path / "run 0").errors
    assert [error["index"] for error in errors] == [7, 40]


class Full:
    """A disk with room for so many bytes, in place of ``write_all``."""

    def __init__(self, room: int) -> None:
        self.room, self.write = room, durable.write_all

    def __call__(self, file: int, data: bytes) -> None:
        if len(data) > self.room:
            self.write(file, data[: self.room])
            self.room = 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        self.write(file, data)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.99])
def test_a_full_disk_ends_the_run_clearly_and_loses_nothing(tmp_path, monkeypatch, share):
    options: Any = {"chunk": 3, "batch_size": 2, "methods": ["gradcam", "layercam"]}
    counted = Full(1 << 40)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "write_all", counted)
        explain(net(), Pictures(60, broken=(7, 40)), tmp_path / "whole", **options)
    whole, bytes_in_all = files(tmp_path / "whole"), (1 << 40) - counted.room
    with monkeypatch.context() as patch:
        patch.setattr(durable, "write_all", Full(int(share * bytes_in_all)))
        with pytest.raises(OSError, match="No space left on device") as error:
            explain(net(), Pictures(60, broken=(7, 40)), tmp_path / "run", **options)
    assert error.value.errno == errno.ENOSPC
    assert str(tmp_path / "run") in str(error.value)
    assert "make room" in str(error.value)
    assert "same command" in str(error.value)
    run = reader.open(tmp_path / "run") if (tmp_path / "run" / "run.json").exists() else None
    before = [] if run is None else run.done
    for chunk in before:
        name = f"scores/{chunk:08d}.parquet"
        assert (tmp_path / "run" / name).read_bytes() == whole[name]
    if share >= 0.6:
        assert before
    explain(net(), Pictures(60, broken=(7, 40)), tmp_path / "run", **options)
    check(tmp_path / "run", whole)


def test_the_command_says_it_in_one_line(tmp_path, monkeypatch, capsys):
    for module in ("typer", "rich", "safetensors"):
        needs(module)
    words = [
        "explain", "--model", "cnn-small", "--data", "builtin", "--out", str(tmp_path / "run"),
        "--gallery", "2",
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(durable, "write_all", Full(60_000))
        assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("fastxkd: error: ")
    assert "No space left on device; make room" in error
    assert cli.main(words) == 0
    assert verify(tmp_path / "run") == []
