"""Runs over a data set on several ranks that torchrun starts: the same bytes, whoever dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastxkd.runs import reader
from fastxkd.runs.verify import verify
from tests.conftest import needs
from tests.test_explain import files

ROOT = Path(__file__).resolve().parents[1]
# Rank 2 of the first attempt dies in the middle of its work, where it is told to.
DATA = """
import os, signal, time
import torch
HERE = os.path.dirname(__file__)
class Data(torch.utils.data.Dataset):
    def __init__(self):
        made = torch.Generator().manual_seed(3)
        self.images = torch.randint(0, 256, (96, 1, 16, 16), generator=made, dtype=torch.uint8)
        self.read = 0
    def __len__(self):
        return 96
    def __getitem__(self, i):
        if i == 31:
            raise OSError("this one is broken")
        self.read += 1
        rank, attempt = os.environ.get("RANK"), os.environ.get("TORCHELASTIC_RESTART_COUNT")
        if rank is not None and self.read > 4:
            with open(f"{HERE}/read.{attempt}", "a") as file:
                file.write(f"{rank} {i}\\n")
        time.sleep(0.01)
        if os.environ.get("DIE") and (rank, attempt) == ("2", "0") and self.read > 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.images[i], i % 5
def data():
    return Data()
def net(num_classes, in_channels):
    from tests.test_explain import net
    return net(0, num_classes, in_channels)
"""

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _installed() -> None:
    for module in ("numcodecs", "pyarrow", "jinja2", "PIL", "typer", "rich"):
        needs(module)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "things.py").write_text(DATA)
    return tmp_path


def start(place: Path, out: str, ranks: int, *more: str, **variables: str) -> tuple[int, str]:
    """Status and output of a run; 0 ranks: without torchrun."""
    torchrun = [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *more,
    ]  # fmt: skip
    command = [
        sys.executable, "-W", "ignore", *(torchrun if ranks else []), "-m", "fastxkd", "explain",
        "--model", f"{place}/things.py:net", "--data", f"{place}/things.py:data",
        "--num-classes", "5", "--out", str(place / out), "--chunk", "4", "--batch-size", "2",
        "--methods", "gradcam,unicam", "--base", f"{place}/things.py:net", "--reference", "8",
    ]  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive",
        **variables,
    }  # fmt: skip
    done = subprocess.run(
        command, env=environment, cwd=place, capture_output=True, text=True, timeout=250
    )
    return done.returncode, done.stdout + done.stderr


def readers(place: Path, attempt: int) -> dict[str, set[int]]:
    """Rank -> images that it has asked for, in an attempt."""
    found: dict[str, set[int]] = {}
    for line in (place / f"read.{attempt}").read_text().splitlines():
        rank, image = line.split()
        found.setdefault(rank, set()).add(int(image))
    return found


def test_as_many_ranks_as_you_like_the_same_bytes(place):
    status, text = start(place, "alone", 0)
    assert status == 3, text  # one image is broken
    whole = files(place / "alone")
    for ranks in (1, 2, 4):
        (place / "read.0").unlink(missing_ok=True)
        status, text = start(place, f"run {ranks}", ranks)
        assert status == 0, text  # for torchrun, done is done
        assert "1 of 96 images failed" in text
        assert files(place / f"run {ranks}") == whole
        assert verify(place / f"run {ranks}") == []
        assert set(readers(place, 0)) == {str(rank) for rank in range(ranks)}
        assert text.count("report: ") == 1
        assert json.loads((place / f"run {ranks}" / "run.json").read_text())["facts"]["ranks"] == (
            ranks
        )


def test_a_rank_that_dies_is_started_again_and_the_run_completes(place):
    status, text = start(place, "alone", 0)
    assert status == 3, text
    status, text = start(place, "run", 4, "--max-restarts", "2", DIE="1")
    assert status == 0, text
    assert "SIGKILL" in text or "-9" in text or "exitcode" in text
    assert (place / "read.1").exists()  # there was a second attempt
    assert not (place / "read.2").exists()
    assert files(place / "run") == files(place / "alone")
    assert verify(place / "run") == []
    assert reader.open(place / "run").complete


def test_ranks_that_cannot_begin_all_say_why(place):
    (place / "run").mkdir()
    (place / "run" / "letter.txt").write_text("dear")
    status, text = start(place, "run", 2)
    assert status != 0
    assert "is not empty and not a run to continue" in text
    assert (place / "run" / "letter.txt").read_text() == "dear"
