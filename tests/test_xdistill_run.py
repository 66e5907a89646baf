# ruff: noqa: F811  (fixtures of another file)
"""``fastxkd distill --method xdistill | medtex``: what it makes, resumes, compares and refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import torch

from fastxkd import cli
from fastxkd.runs.models import load_model
from tests.conftest import needs
from tests.test_cli import (  # noqa: F401
    _installed,
    as_options,
    environment,
    place,
    same,
    weights,
    words,
)

QUICK = {"epochs": 2, "teacher_epochs": 1, "method": "xdistill", "phi_epochs": 2}


def run_of(place, out: str = "out", **options) -> list[str]:
    return words(place, out, **{**QUICK, **options})


def test_it_makes_everything(place, capsys):
    assert cli.main(run_of(place)) == 0
    out = place / "out"
    printed = capsys.readouterr().out
    assert "phi: 8 steps" in printed
    assert "the teacher's maps of 32 images" in printed
    content = json.loads((out / "metrics.json").read_text())
    assert {role: len(epochs) for role, epochs in content["history"].items()} == {
        "teacher": 1, "base": 2, "kd": 2, "phi": 2, "student": 2,
    }  # fmt: skip
    rows = {row["role"]: row for row in content["fidelity"]["rows"]}
    assert set(rows) == {"base", "kd", "student", "phi"}
    assert content["fidelity"]["images"] == 8
    for role in ("base", "kd", "student"):
        for name in ("accuracy", "agreement", "deletion", "insertion", "top_10"):
            assert 0 <= rows[role][name] <= 1
        assert -1 <= rows[role]["pearson"] <= 1
    assert rows["phi"]["accuracy"] is None
    # The same measure in two places of the report.
    models = {model["role"]: model for model in content["models"]}
    for role in ("base", "student"):
        assert rows[role]["accuracy"] == pytest.approx(models[role]["accuracy"])
        assert rows[role]["cosine"] == pytest.approx(
            models[role]["explanation_agreement"], abs=1e-4
        )
    differences = {each["against"]: each for each in content["fidelity"]["differences"]}
    assert differences["kd"]["value"] == pytest.approx(
        rows["student"]["cosine"] - rows["kd"]["cosine"]
    )
    assert [row["layer"] for row in content["layers"]] == [f"student.stage{i}" for i in range(1, 5)]
    settings = content["run"]["settings"]
    assert (settings["method"], settings["fusion"], settings["phi_epochs"]) == (
        "xdistill", "concat", 2,
    )  # fmt: skip
    page = (out / "report.html").read_text("utf-8")
    assert 'id="fidelity"' in page
    assert "Plain distillation" in page
    assert page.count("gradcam of phi") == 4
    assert (out / "explanations" / "maps.npy").exists()


def test_the_student_is_loaded_again_by_every_verb(place, capsys):
    assert cli.main([*run_of(place), "--no-reference-kd"]) == 0
    out = place / "out"
    trained = json.loads((out / "metrics.json").read_text())
    assert {row["role"] for row in trained["fidelity"]["rows"]} == {"base", "student", "phi"}
    student = f"xdistill:{out}/student.safetensors"
    model = load_model(student, num_classes=2, in_channels=3)
    state = needs("safetensors.torch").load_file(out / "student.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    command = ["compare", *as_options({
        "teacher": f"{place}/nets.py:large", "teacher_weights": out / "teacher.safetensors",
        "base": f"{place}/nets.py:small", "base_weights": out / "base.safetensors",
        "student": student, "data": f"imagefolder:{place}/images", "image_size": 16,
        "held_out": 0.2, "gallery": 4, "out": place / "again",
    })]  # fmt: skip
    assert cli.main(command) == 0
    found = json.loads((place / "again" / "metrics.json").read_text())
    for one, other in zip(found["models"], trained["models"], strict=True):
        for name in ("accuracy", "agreement", "divergence", "explanation_agreement"):
            assert one[name] == pytest.approx(other[name], abs=1e-5)
    with pytest.raises(ValueError, match="made with num_classes=2, not 3"):
        load_model(student, num_classes=3, in_channels=3)
    with pytest.raises(ValueError, match="does not say how its student is built"):
        load_model(f"xdistill:{out}/base.safetensors", num_classes=2, in_channels=3)


@pytest.mark.parametrize(
    "options",
    [
        {"fusion": "gate", "phi_epochs": 0},
        {"fusion": "feature", "ssim_weight": 0.1},
        {"fusion": "attend", "layers": "stage2,stage3"},
        {"fusion": "none"},
        {"fusion": "none", "match_weight": 1},
        {"explainers": "cam,input_x_gradient", "join": "concat"},
        {"explainers": "gradcam,occlusion", "join": "mean", "first_weights": "random"},
    ],
)
def test_every_fusion_and_ablation_runs(place, options):
    chosen = {"epochs": 1, "phi_epochs": 1, "reference_kd": None, "max_samples": 8, **options}
    if options.get("fusion") == "none":
        chosen["phi_epochs"] = None
    given = {name: value for name, value in chosen.items() if value is not None}
    command = words(place, **{"teacher_epochs": 1, "method": "xdistill", **given})
    assert cli.main([*command, "--no-reference-kd"]) == 0
    content = json.loads((place / "out" / "metrics.json").read_text())
    phi = [row for row in content["fidelity"]["rows"] if row["role"] == "phi"]
    maps = {"none": 0}.get(options.get("fusion"), 1)
    if options.get("join") == "concat":
        maps = 2
    assert len(phi) == maps


def test_without_phi_the_student_is_the_reference(place):
    assert cli.main(run_of(place, fusion="none")) == 0
    load_file = needs("safetensors.torch").load_file
    student = load_file(place / "out" / "student.safetensors")
    plain = load_file(place / "out" / "kd.safetensors")
    for name, value in plain.items():
        assert torch.equal(value, student[f"student.{name}"])


def test_a_frozen_phi(place):
    assert cli.main([*run_of(place), "--freeze-phi", "--no-reference-kd"]) == 0
    found = weights(place / "out")["student"]
    checkpoint = torch.load(place / "out" / "checkpoints" / "student-phi.pt", weights_only=True)
    for name, value in checkpoint["model"].items():
        assert torch.equal(found[f"phi.{name}"], value)


@pytest.mark.parametrize("line", ["phi: epoch 2", "student: epoch 2"])
def test_stopped_and_resumed_equals_uninterrupted(place, environment, line):
    options = {"epochs": 4, "phi_epochs": 4, "checkpoint_seconds": 0}
    command = [*run_of(place, **options), "--no-reference-kd"]
    with subprocess.Popen(
        [sys.executable, "-m", "fastxkd", *command],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        for printed in process.stdout:
            if printed.startswith(line):
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert not (place / "out" / "report.html").exists()
    assert cli.main(command) == 0
    assert cli.main([*run_of(place, "whole", **options), "--no-reference-kd"]) == 0
    assert same(weights(place / "out"), weights(place / "whole"))


def test_maps_are_shared_between_runs_and_not_between_teachers(place, capsys):
    shared = place / "maps"
    first = [*run_of(place, "one", explanations=shared), "--no-reference-kd"]
    assert cli.main(first) == 0
    given = place / "one" / "teacher.safetensors"
    stamp = (shared / "maps.npy").stat().st_mtime_ns
    again = run_of(place, "two", explanations=shared, teacher_weights=given, fusion="gate")
    capsys.readouterr()
    assert cli.main([*again, "--no-reference-kd"]) == 0
    assert "the teacher's maps" not in capsys.readouterr().out
    assert (shared / "maps.npy").stat().st_mtime_ns == stamp
    other = run_of(place, "three", explanations=shared, seed=9)
    assert cli.main([*other, "--no-reference-kd"]) == 2
    assert "was started with other settings: teacher_weights was" in capsys.readouterr().err


def test_medtex(place, capsys):
    options = {"method": "medtex", "epochs": 2, "teacher_epochs": 1, "ce_weight": 0, "kd_weight": 1}
    assert cli.main(words(place, **options, vid_weight=0.5, sparsity_weight=0.1)) == 0
    content = json.loads((place / "out" / "metrics.json").read_text())
    assert {row["role"] for row in content["fidelity"]["rows"]} == {"base", "kd", "student", "phi"}
    settings = content["run"]["settings"]
    assert (settings["vid_weight"], settings["sparsity_weight"]) == (0.5, 0.1)
    assert not (place / "out" / "explanations").exists()
    model = load_model(f"xdistill:{place}/out/student.safetensors", num_classes=2, in_channels=3)
    assert model.fusion == "mask"
    layers = {"layers": "stage2,stage3"}
    assert cli.main([*words(place, "named", **options, **layers), "--no-reference-kd"]) == 0
    named = json.loads((place / "named" / "metrics.json").read_text())
    assert [(row["layer"], row["base_layer"], row["teacher_layer"]) for row in named["layers"]] == [
        ("student.stage2", "stage2", "stage2"),
        ("student.stage3", "stage3", "stage3"),
    ]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"method": "kd"}, "phi_epochs: belongs to --method xdistill, the method is kd"),
        ({"vid_weight": 1}, "vid_weight: belongs to --method medtex, the method is xdistill"),
        ({"fusion": "mask"}, "fusion: expected one of concat, gate, attend, feature, none, got"),
        ({"explainers": "lime"}, "explainers: expected some of gradcam"),
        ({"explainers": "gradcam,gradcam"}, "explainers: expected different ones, got gradcam, gr"),
        ({"explainers": "cam", "fusion": "feature"}, "explainers: cam asks for one head"),
        (
            {"explainers": "cam", "teacher_layers": "stage1", "layers": "stage1"},
            "what the head takes",
        ),
        ({"explanations": __file__}, "is a file, expected a folder"),
        ({"phi_epochs": -1}, "phi_epochs: expected 0 or more, got -1"),
        ({"phi_lr": 0}, "phi_lr: expected a finite number above 0, got 0.0"),
        ({"sign": "both"}, "sign: expected one of absolute, positive, got 'both'"),
        ({"explanation_weight": -1}, "explanation_weight: expected a finite number of at least 0"),
    ],
)
def test_mistakes_end_with_one_line(place, capsys, change, text):
    assert cli.main(run_of(place, **change)) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not (place / "out").exists()
