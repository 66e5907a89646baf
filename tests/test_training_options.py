# ruff: noqa: F811  (fixtures of another file)
"""Label smoothing and self-distillation: against the formula, by the command, and resumed."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from fastxkd import cli
from fastxkd.train import TrainSettings
from fastxkd.train.checkpoint import read_checkpoint
from tests.test_cli import _installed, place, same, weights, words  # noqa: F401
from tests.test_distiller import Batches, make, network, same_weights, teacher


def smoothed(logits: torch.Tensor, labels: torch.Tensor, a: float) -> torch.Tensor:
    """(1 - a) CE(y, p) + a CE(uniform, p), written out."""
    log_p = logits.log_softmax(1)
    own = -log_p.gather(1, labels[:, None])[:, 0]
    return ((1 - a) * own - a * log_p.mean(1)).mean()


@pytest.mark.parametrize("guided", [False, True])
def test_label_smoothing_is_the_papers(guided):
    settings = TrainSettings(epochs=1, lr=1e-12, warmup=0, weight_decay=0, label_smoothing=0.3)
    history = make(settings=settings, teacher=teacher() if guided else None).fit()
    torch.manual_seed(settings.seed)
    model, guide = network(), teacher().eval()
    torch.manual_seed(settings.seed)
    expected = []
    for images, labels in Batches().iterate(0, 5):
        logits = model(images)
        loss = smoothed(logits, labels, 0.3)
        if guided:
            p = (guide(images) / 4).softmax(1)
            soft = 16 * F.kl_div((logits / 4).log_softmax(1), p, reduction="batchmean")
            loss = 0.1 * loss + 0.9 * soft
        expected.append(loss.item())
    assert history[0]["loss"] == pytest.approx(sum(expected) / 5, rel=1e-5)


def test_label_smoothing_is_part_of_a_runs_identity(tmp_path):
    path = tmp_path / "s.pt"
    make(path).fit()
    assert "label_smoothing" not in read_checkpoint(path)["settings"]
    smooth = TrainSettings(epochs=3, batch_size=8, lr=0.05, seed=4, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing was None, now 0\.1"):
        make(path, settings=smooth).fit()
    with pytest.raises(ValueError, match=r"label_smoothing: expected a share in \[0, 1\], got 1.5"):
        TrainSettings(label_smoothing=1.5)


def test_a_smoothed_teacher_is_smoothed_alone(place):
    assert cli.main(words(place, "plain", epochs=1)) == 0
    assert cli.main(words(place, "smooth", epochs=1, teacher_label_smoothing=0.4)) == 0
    plain, smooth = weights(place / "plain"), weights(place / "smooth")
    assert same({"base": plain["base"]}, {"base": smooth["base"]})
    assert not same({"teacher": plain["teacher"]}, {"teacher": smooth["teacher"]})
    assert not same({"student": plain["student"]}, {"student": smooth["student"]})
    settings = json.loads((place / "smooth" / "metrics.json").read_text())["run"]["settings"]
    assert settings["teacher_label_smoothing"] == 0.4
    assert "label_smoothing" not in settings
    assert cli.main(words(place, "all", epochs=1, label_smoothing=0.4)) == 0
    everyone = weights(place / "all")
    assert same({"teacher": smooth["teacher"]}, {"teacher": everyone["teacher"]})
    assert not same({"base": smooth["base"]}, {"base": everyone["base"]})


def test_a_teacher_called_self_has_the_students_architecture(place, capsys):
    assert cli.main(words(place, teacher="self", teacher_epochs=2)) == 0
    content = json.loads((place / "out" / "metrics.json").read_text())
    assert [model["parameters"] for model in content["models"]] == [
        content["models"][2]["parameters"]
    ] * 3
    found = weights(place / "out")
    assert not same({"student": found["student"]}, {"student": found["base"]})
    named = words(place, "named", teacher=f"{place}/nets.py:small", teacher_epochs=2)
    assert cli.main(named) == 0
    assert same(found, weights(place / "named"))


def test_generations_are_a_chain_of_students(place):
    assert cli.main(words(place, epochs=1, generations=3)) == 0
    chained = weights(place / "out")
    given = place / "out" / "teacher.safetensors"
    guide = {"teacher_weights": given}
    for number in (1, 2, 3):
        assert cli.main(words(place, f"step{number}", epochs=1, **guide)) == 0
        guide = {
            "teacher": f"{place}/nets.py:small",
            "teacher_weights": place / f"step{number}" / "student.safetensors",
        }
    last = weights(place / "step3")["student"]
    assert same({"student": chained["student"]}, {"student": last})
    content = json.loads((place / "out" / "metrics.json").read_text())
    assert set(content["history"]) == {
        "teacher", "base", "generation-1", "generation-2", "student",
    }  # fmt: skip
    assert content["run"]["settings"]["generations"] == 3


def test_generations_are_resumed(place, capsys):
    command = words(place, epochs=1, generations=2)
    assert cli.main(command) == 0
    first = weights(place / "out")
    (place / "out" / "checkpoints" / "student.pt").unlink()
    capsys.readouterr()
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "generation-1: already trained" in printed
    assert same(first, weights(place / "out"))
    assert cli.main(words(place, epochs=1, generations=3)) == 2
    assert "generations was 2, now 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"generations": 0}, "generations: expected at least 1, got 0"),
        ({"label_smoothing": -0.1}, "label_smoothing: expected a share in [0, 1], got -0.1"),
        ({"teacher_label_smoothing": 2}, "label_smoothing: expected a share in [0, 1], got 2.0"),
        (
            {"teacher_label_smoothing": 0.1, "teacher_weights": "teacher.safetensors"},
            "teacher_label_smoothing: expected None with teacher_weights",
        ),
        ({"method": "magic"}, "method: expected one of kd, xdistill, medtex, got 'magic'"),
        (
            {"method": "xdistill", "generations": 2},
            "generations: expected 1 with method='xdistill'",
        ),
    ],
)
def test_mistakes_end_with_one_line(place, capsys, change, text):
    assert cli.main(words(place, **change)) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not (place / "out").exists()


def test_the_student_of_a_distiller_can_teach_the_next():
    first = make(teacher=teacher())
    first.fit()
    second = make(teacher=first.student)
    second.fit()
    assert not same_weights(first.student, second.student)
