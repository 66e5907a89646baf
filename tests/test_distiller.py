"""Training: the schedule, and that stopping anywhere changes no bit of the outcome."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastxkd.runs.cnn import SmallCNN
from fastxkd.runs.data import TrainBatches, load_data
from fastxkd.train import Distiller, Progress, TrainingDiverged, TrainSettings
from fastxkd.train.checkpoint import read_checkpoint
from fastxkd.train.distiller import learning_rate

SETTINGS = TrainSettings(epochs=3, batch_size=8, lr=0.05, seed=4)


class Batches:
    """Five batches of noise an epoch, the same for the same step."""

    def __init__(self, poison: int | None = None) -> None:
        self.poison = poison
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 5

    def iterate(self, first, last):
        for step in range(first, last):
            self.asked.append(step)
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(8, 1, 12, 12, generator=generator)
            if step == self.poison:
                images[0] = float("nan")
            yield images, torch.randint(0, 3, (8,), generator=generator)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = SmallCNN((4, 4, 6, 6), (1, 1, 1, 1), num_classes=3, in_channels=1)
    # Dropout draws random numbers, so a resumed run must pick up that thread as well.
    model.head = nn.Sequential(nn.Dropout(0.3), model.head)
    return model


def teacher() -> nn.Module:
    return network(99)


def make(path=None, **options) -> Distiller:
    settings = options.pop("settings", SETTINGS)
    batches = options.pop("batches", None) or Batches()
    return Distiller(network(), batches, settings, checkpoint=path, **options)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(a.state_dict()[k], b.state_dict()[k]) for k in a.state_dict())


def stop_at(step: int, act):
    def on_step(made: int) -> None:
        if made == step:
            act()

    return on_step


def raise_interrupt() -> None:
    raise KeyboardInterrupt


def test_learning_rate_climbs_then_falls_to_zero():
    settings = TrainSettings(lr=0.1, warmup=0.2)
    rates = [learning_rate(settings, step, 20) for step in range(20)]
    assert rates[:4] == pytest.approx([0.02, 0.04, 0.06, 0.08])
    assert rates[4] == pytest.approx(0.1)
    assert all(before > after for before, after in itertools.pairwise(rates[4:]))
    assert learning_rate(settings, 20, 20) == pytest.approx(0, abs=1e-12)


def test_training_equals_a_loop_written_out():
    guide, model = teacher().eval(), network()
    torch.manual_seed(SETTINGS.seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    losses = []
    for step, (images, labels) in enumerate(Batches().iterate(0, 15)):
        optimizer.param_groups[0]["lr"] = learning_rate(SETTINGS, step, 15)
        logits = model(images)
        with torch.no_grad():
            p = (guide(images) / 4).softmax(1)
        soft = 16 * F.kl_div((logits / 4).log_softmax(1), p, reduction="batchmean")
        loss = 0.1 * F.cross_entropy(logits, labels) + 0.9 * soft
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    trained = make(teacher=teacher())
    history = trained.fit()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained.student.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert [record["loss"] for record in history] == pytest.approx(
        [sum(losses[at : at + 5]) / 5 for at in (0, 5, 10)], rel=1e-3
    )
    assert [record["epoch"] for record in history] == [1, 2, 3]


def test_without_a_teacher_the_loss_is_cross_entropy():
    settings = TrainSettings(epochs=1, lr=1e-12, warmup=0, weight_decay=0)
    history = make(settings=settings).fit()
    torch.manual_seed(settings.seed)
    model = network()
    torch.manual_seed(settings.seed)
    expected = [F.cross_entropy(model(x), y).item() for x, y in Batches().iterate(0, 5)]
    assert history[0]["loss"] == pytest.approx(sum(expected) / 5, rel=1e-5)


@pytest.mark.parametrize("step", [1, 5, 7, 14])
@pytest.mark.parametrize("guided", [True, False])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, step, guided):
    guide = {"teacher": teacher()} if guided else {}
    whole = make(**guide)
    history = whole.fit()
    broken = make(tmp_path / "s.pt", on_step=stop_at(step, raise_interrupt), **guide)
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    torch.rand(100)
    batches = Batches()
    resumed = make(tmp_path / "s.pt", batches=batches, **guide)
    again = resumed.fit()
    assert batches.asked == list(range(step, 15))
    assert same_weights(whole.student, resumed.student)
    assert [(r["epoch"], r["loss"]) for r in again] == [(r["epoch"], r["loss"]) for r in history]


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_signals_wait_for_the_end_of_the_step(tmp_path, number, raised):
    before = signal.getsignal(number)
    kill = stop_at(8, lambda: os.kill(os.getpid(), number))
    with pytest.raises(raised) as caught:
        make(tmp_path / "s.pt", on_step=kill).fit()
    if raised is SystemExit:
        assert caught.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert read_checkpoint(tmp_path / "s.pt")["step"] in (8, 9)
    resumed, whole = make(tmp_path / "s.pt"), make()
    resumed.fit()
    whole.fit()
    assert same_weights(resumed.student, whole.student)


def test_training_outside_the_main_thread_works():
    found = []
    thread = threading.Thread(target=lambda: found.append(make().fit()))
    thread.start()
    thread.join()
    assert len(found[0]) == 3


_KILLED = """
import sys
import time
from tests.test_distiller import make, teacher
def slow(step):
    print(step, flush=True)
    time.sleep(0.05)
make(sys.argv[1], teacher=teacher(), checkpoint_seconds=0, on_step=slow).fit()
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    root = Path(__file__).resolve().parents[1]
    path = tmp_path / "s.pt"
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(path)],
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_WAIT_POLICY": "passive"},
    ) as process:
        for line in process.stdout:
            if int(line) == 7:
                process.kill()
                break
        process.wait(timeout=30)
    assert process.returncode == -signal.SIGKILL
    step = read_checkpoint(path)["step"]
    assert 6 <= step < 15
    resumed, whole = make(path, teacher=teacher()), make(teacher=teacher())
    resumed.fit()
    whole.fit()
    assert same_weights(resumed.student, whole.student)


def test_killed_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "s.pt"
    with pytest.raises(KeyboardInterrupt):
        make(path, on_step=stop_at(6, raise_interrupt)).fit()
    good = path.read_bytes()

    def cut_short(content, file):
        file.write(b"PK half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", cut_short)
    with pytest.raises(OSError, match="No space left"):
        make(path).fit()
    assert path.read_bytes() == good


def test_finished_training_is_not_repeated(tmp_path):
    first = make(tmp_path / "s.pt")
    history = first.fit()
    batches = Batches()
    second = make(tmp_path / "s.pt", batches=batches)
    assert second.fit() == history
    assert batches.asked == []
    assert same_weights(first.student, second.student)
    third = make(tmp_path / "s.pt", batches=batches)
    third.fit(resume=False)
    assert batches.asked == list(range(15))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lr": 0.2}, r"lr was 0.05, now 0.2"),
        ({"seed": 5}, r"seed was 4, now 5"),
        ({"epochs": 4}, r"epochs was 3, now 4"),
        ({"temperature": 2.0}, r"temperature was 4.0, now 2.0"),
    ],
)
def test_resuming_with_other_settings_is_refused(tmp_path, change, text):
    path = tmp_path / "s.pt"
    with pytest.raises(KeyboardInterrupt):
        make(path, teacher=teacher(), on_step=stop_at(3, raise_interrupt)).fit()
    before = path.read_bytes()
    settings = TrainSettings(**{**SETTINGS.__dict__, **change})
    with pytest.raises(ValueError, match=text):
        make(path, teacher=teacher(), settings=settings).fit()
    assert path.read_bytes() == before


def test_resuming_with_another_teacher_or_data_is_refused(tmp_path):
    path = tmp_path / "s.pt"
    make(path, teacher=teacher(), identity={"data": "a"}).fit()
    with pytest.raises(ValueError, match="teacher_weights was"):
        make(path, teacher=network(98), identity={"data": "a"}).fit()
    with pytest.raises(ValueError, match="data was 'a', now 'b'"):
        make(path, teacher=teacher(), identity={"data": "b"}).fit()


@pytest.mark.parametrize("keep", [0, 10, 700, -300])
def test_damaged_checkpoint_is_named(tmp_path, keep):
    path = tmp_path / "s.pt"
    make(path).fit()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"checkpoint: .*s\.pt is damaged or cut short .* delete"):
        make(path).fit()


def test_foreign_file_is_no_checkpoint(tmp_path):
    path = tmp_path / "s.pt"
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="is not a checkpoint of this version"):
        make(path).fit()


def test_nan_stops_and_names_the_step(tmp_path):
    path = tmp_path / "s.pt"
    with pytest.raises(TrainingDiverged, match=r"student: the loss became nan at step 9 of 15"):
        make(path, batches=Batches(poison=8), checkpoint_seconds=0).fit()
    stored = read_checkpoint(path)
    assert stored["step"] == 8
    assert all(torch.isfinite(value).all() for value in stored["model"].values())


def test_teacher_is_left_as_it_was():
    guide = teacher()
    guide.train()
    guide.head.eval()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    make(teacher=guide).fit()
    assert guide.training
    assert not guide.head.training
    assert all(torch.equal(before[name], value) for name, value in guide.state_dict().items())
    assert all(parameter.grad is None for parameter in guide.parameters())


def test_progress_sees_every_step_and_epoch():
    class Watch(Progress):
        def __init__(self):
            self.events = []

        def start(self, stage, steps, done):
            self.events.append((stage, steps, done))

        def step(self, epoch, loss):
            self.events.append(epoch)

        def epoch(self, record):
            self.events.append(record["accuracy"])

        def finish(self):
            self.events.append("end")

    watch = Watch()
    make(progress=watch, evaluate=lambda model: 0.5, stage="base").fit()
    assert watch.events == [
        ("base", 15, 0),
        *[event for epoch in range(3) for event in [epoch] * 5 + [0.5]],
        "end",
    ]


def test_amp_trains_in_bfloat16():
    seen = []
    distiller = make(settings=TrainSettings(epochs=1, amp=True), teacher=teacher())
    distiller.student.stage4.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    history = distiller.fit()
    assert set(seen) == {torch.bfloat16}
    assert history[0]["loss"] > 0
    assert all(p.dtype == torch.float32 for p in distiller.student.parameters())


def test_models_that_are_no_classifiers_are_refused():
    distiller = Distiller(nn.Conv2d(1, 3, 3), Batches(), SETTINGS)
    with pytest.raises(TypeError, match=r"student: expected .* logits \[N, classes\], got \[8, 3"):
        distiller.fit()


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"student": 3}, "student: expected a Module, got int"),
        ({"teacher": "x"}, "teacher: expected a Module, got str"),
        ({"settings": []}, "settings: expected a TrainSettings, got list"),
        ({"batches": None}, r"batches: expected an object with __len__\(\) and .*, got NoneType"),
        ({"batches": [1]}, r"batches: expected an object with __len__\(\) and .*, got list"),
    ],
)
def test_arguments_of_another_kind(wrong, text):
    given = {"student": network(), "batches": Batches(), "settings": SETTINGS, **wrong}
    with pytest.raises(TypeError, match=text):
        Distiller(**given)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"lr": 0.0}, "lr: expected a positive number, got 0.0"),
        ({"lr": float("nan")}, "lr: expected a positive number, got nan"),
        ({"kd_weight": -1.0}, "kd_weight: expected 0 or more, got -1.0"),
        ({"warmup": 1.0}, r"warmup: expected a share in \[0, 1\), got 1.0"),
        ({"batch_size": 1}, "batch_size: expected at least 2, got 1"),
    ],
)
def test_settings_out_of_range(options, text):
    with pytest.raises(ValueError, match=text):
        TrainSettings(**options)


def test_a_network_learns_real_images():
    data = load_data("builtin")
    batches = TrainBatches(data, batch_size=50, seed=0, augmented=False)
    model = SmallCNN((8, 8, 16, 16), (1, 1, 1, 1), num_classes=10, in_channels=1)
    history = Distiller(model, batches, TrainSettings(epochs=2, lr=0.1)).fit()
    assert history[1]["loss"] < 1.3 < history[0]["loss"] < 2.3
    with torch.no_grad():
        images = data.normalize(data.test.images)
        right = (model(images).argmax(1).numpy() == data.test.labels).mean()
    assert right > 0.5
