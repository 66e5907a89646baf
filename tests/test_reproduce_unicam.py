"""`fastxkd reproduce unicam`, very small: what is trained, measured, and survives a kill."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastxkd import cli
from fastxkd.runs.data import ArraySplit, ImageData, load_data
from fastxkd.runs.reproduce import fashion, training, unicam
from fastxkd.runs.reproduce.claims import FAILS, HOLDS
from fastxkd.runs.reproduce.run import run_studies
from fastxkd.runs.reproduce.tasks import Context
from fastxkd.runs.reproduce.watch import Watch
from fastxkd.train.distiller import TrainSettings, fingerprint
from tests.conftest import needs

ROOT = Path(__file__).resolve().parents[1]
SAME = dict.fromkeys(("large", "medium", "small"), (4, 4, 6, 6))
TINY = fashion.Size(
    train_images=80, epochs=1, batch_size=16, widths=SAME, depths=dict.fromkeys(SAME, (1, 1, 1, 1))
)


@pytest.fixture(autouse=True)
def _installed():
    for module in ("safetensors", "jinja2"):
        needs(module)


def small_data() -> ImageData:
    data = load_data("builtin")
    test = data.test.load(range(100))
    data.test = ArraySplit(test.images, test.labels.numpy())
    return data


def study() -> unicam.UnicamStudy:
    data = small_data()
    return unicam.UnicamStudy(data, TINY, samples=40)


def run(out: Path, seeds: int = 2, say=lambda line: None):
    return run_studies(
        [study()], out, range(seeds), settings={}, device=torch.device("cpu"), say=say
    )


def test_it_makes_everything_and_nothing_twice(tmp_path):
    lines: list[str] = []
    outcome = run(tmp_path, say=lines.append)
    assert len(outcome.claims) == 12
    assert len({claim.id for claim in outcome.claims}) == 12
    assert {claim.study for claim in outcome.claims} == {"unicam"}
    assert all(len(part.values) == 2 for claim in outcome.claims for part in claim.parts)
    assert sum("x fashion/" in line for line in lines) == 9
    assert "plan: 20 pieces of work; about" in lines[0]
    names = {path.name for path in tmp_path.iterdir()}
    assert {"claims.json", "claims.md", "report.html", "run.json", "models"} <= names
    assert not list((tmp_path / "checkpoints").rglob("*.pt"))
    assert len(list((tmp_path / "models").rglob("*.safetensors"))) == 18
    content = (tmp_path / "claims.json").read_text()
    lines.clear()
    run(tmp_path, say=lines.append)
    assert not [line for line in lines if line.startswith("[")]
    assert (tmp_path / "claims.json").read_text() == content
    # One more seed adds to what is there.
    run(tmp_path, 3, say=lines.append)
    assert len([line for line in lines if line.startswith("[")]) == 10
    found = json.loads((tmp_path / "claims.json").read_text())
    first = json.loads(content)
    for new, old in zip(found["claims"], first["claims"], strict=True):
        for part, before in zip(new["parts"], old["parts"], strict=True):
            assert part["values"][:2] == before["values"]


def test_guidance_reaches_the_student():
    data = study().data
    device = torch.device("cpu")
    context = Context(device, Watch.silent(), None)
    settings = TrainSettings(epochs=1, batch_size=16, ce_weight=1.0, kd_weight=0.0)
    teacher = training.network(SAME["small"], (1, 1, 1, 1), num_classes=10, in_channels=1, seed=3)
    weights = {}
    for name, hints in {
        "none": None,
        "idle": training.Hints("attention", training.STAGES[1:], 0.0),
        "attention": training.Hints("attention", training.STAGES[1:], 1000.0),
        "feature": training.Hints("feature", training.STAGES, 5.0),
    }.items():
        student = training.network(
            SAME["small"], (1, 1, 1, 1), num_classes=10, in_channels=1, seed=0
        )
        start = fingerprint(student.state_dict())
        made = training.distiller(
            student, data, settings, context, stage=name, facts={}, teacher=teacher, hints=hints
        )
        made.fit()
        assert fingerprint(student.state_dict()) != start
        weights[name] = student.state_dict()
    for key, value in weights["none"].items():
        torch.testing.assert_close(weights["idle"][key], value, rtol=1e-4, atol=1e-5)
    plain = weights["none"]["stage3.0.0.weight"]
    for name in ("attention", "feature"):
        assert float((weights[name]["stage3.0.0.weight"] - plain).norm()) > 1e-3


def test_regressors_learn_and_come_back_from_a_checkpoint(tmp_path):
    data = study().data
    teacher = training.network((4, 4, 4, 4), (1, 1, 1, 1), num_classes=10, in_channels=1, seed=3)
    settings = TrainSettings(epochs=2, batch_size=16, ce_weight=1.0, kd_weight=0.0)

    def made(checkpoint):
        student = training.network(
            (4, 4, 6, 6), (1, 1, 1, 1), num_classes=10, in_channels=1, seed=0
        )
        context = Context(torch.device("cpu"), Watch.silent(), None, checkpoint)
        hints = training.Hints("feature", training.STAGES, 5.0)
        return training.distiller(
            student, data, settings, context, stage="s", facts={}, teacher=teacher, hints=hints
        )

    whole = made(None)
    before = fingerprint(whole._criterion.state_dict())
    whole.fit()
    assert fingerprint(whole._criterion.state_dict()) != before

    class Stop(KeyboardInterrupt):
        pass

    def stop(step):
        if step == 7:
            raise Stop

    broken = made(tmp_path / "c.pt")
    broken.on_step = stop
    with pytest.raises(Stop):
        broken.fit()
    resumed = made(tmp_path / "c.pt")
    resumed.fit()
    assert fingerprint(resumed.student.state_dict()) == fingerprint(whole.student.state_dict())
    assert fingerprint(resumed._criterion.state_dict()) == fingerprint(
        whole._criterion.state_dict()
    )


def test_parts_of_the_data_are_balanced_and_in_order():
    data = load_data("builtin")
    part = training.part_of(data, 50)
    assert sorted(part.train.labels.tolist()) == sorted(list(range(10)) * 5)
    assert len(training.part_of(data, None).train) == 2000
    assert training.part_of(data, 10**6) is data


def scores(student: float, base: float, distilled: float, residual: float) -> dict[str, float]:
    found = {f"{name}/accuracy": 0.9 for name in fashion.MODELS}
    for pair in unicam.PAIRS:
        for number, stage in enumerate(unicam.STAGES):
            found[f"{pair}/{stage}/rs"] = student + (0.01 if pair == "feature" else 0)
            found[f"{pair}/{stage}/rs base"] = base
            found[f"{pair}/{stage}/fss"] = 0.3 + 0.1 * number
            found[f"{pair}/{stage}/distilled"] = distilled
            found[f"{pair}/{stage}/residual"] = residual
    return found


def test_claims_say_what_the_scores_say():
    draw = random.Random(0).random

    def seeds(*numbers: float):
        return [scores(*(value + 1e-4 * draw() for value in numbers)) for _ in range(4)]

    good = {claim.id: claim for claim in unicam._claims(seeds(0.5, 0.3, 0.2, 0.1))}
    for kind in unicam.GUIDANCE:
        assert good[f"unicam.{kind}-above-base"].verdict() == HOLDS
        assert good[f"unicam.{kind}-distilled-above-residual"].verdict() == HOLDS
    assert good["unicam.feature-best"].verdict() == HOLDS
    assert good["unicam.capacity-gap"].verdict() == FAILS
    assert good["unicam.fss-rises"].verdict() == HOLDS
    assert good["unicam.fss-rises"].parts[0].interval().mean == pytest.approx(0.1)
    bad = {claim.id: claim for claim in unicam._claims(seeds(0.3, 0.5, 0.1, 0.2))}
    assert bad["unicam.response-above-base"].verdict() == FAILS
    assert bad["unicam.response-distilled-above-residual"].verdict() == FAILS
    assert bad["unicam.capacity-gap"].verdict() == HOLDS


ATTEMPTS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
# The first optimiser imports a compiler.
torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
import jinja2, safetensors.torch
import fastxkd.runs.reproduce.run
from tests.test_reproduce_unicam import run

out, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def attempt(folder):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(Path(folder))
            code = 0
        finally:
            os._exit(code)
    return child

began = time.monotonic()
assert os.waitpid(attempt(f"{out}/whole"), 0)[1] == 0
length = time.monotonic() - began
draw, killed, number = random.Random(seed).random, 0, 0
while killed < kills:
    while True:
        child, until = attempt(f"{out}/run {number}"), time.monotonic() + 0.7 * length * draw()
        status = None
        while status is None and time.monotonic() < until:
            pid, found = os.waitpid(child, os.WNOHANG)
            status = found if pid else None
            time.sleep(0.001)
        if status is None:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        if status == 0:
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
        killed += 1
    number += 1
print(number)
"""


@pytest.mark.slow
def test_killed_at_random_moments_and_started_again(tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ATTEMPTS, str(tmp_path), "6", str(seed)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-3000:]}"
    whole = (tmp_path / "whole" / "claims.json").read_bytes()
    for number in range(int(done.stdout.split()[-1])):
        folder = tmp_path / f"run {number}"
        assert (folder / "claims.json").read_bytes() == whole, f"seed {seed}"
        assert not list(folder.rglob("*.tmp"))
        assert not list((folder / "checkpoints").rglob("*.pt"))


def test_the_command_says_claims_one_by_one(tmp_path, monkeypatch, capsys):
    for module in ("typer", "rich"):
        needs(module)
    monkeypatch.setattr(fashion, "QUICK", TINY)
    command = ["reproduce", "unicam", "--quick", "--data", "builtin", "--seeds", "1"]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "data: the built-in subset, as asked for, not the full set" in printed
    assert "[10/10] unicam/0/scores" in printed
    assert printed.count("NOT DECIDED") == 12, "one seed decides nothing"
    assert "unicam.capacity-gap: NOT DECIDED" in printed
    assert printed.rstrip().endswith(f"report: {tmp_path / 'out' / 'report.html'}")
    content = json.loads((tmp_path / "out" / "claims.json").read_text())
    assert content["settings"]["seeds"] == [0]
    assert content["settings"]["remark"].startswith("data: the built-in subset")
    assert "the built-in subset" in (tmp_path / "out" / "report.html").read_text("utf-8")
    assert (
        cli.main(["reproduce", "unicam", "--data", "builtin", "--out", str(tmp_path / "out")]) == 2
    )
    assert "quick was True, now False" in capsys.readouterr().err
