"""DiffROAR: masked images, retraining, and that being killed changes no bit of the result."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastxkd.runs.data import ArraySplit, Batch, ImageData, Split, load_data
from fastxkd.runs.diffroar import diffroar
from fastxkd.runs.diffroar_results import RESULT, DiffROAR
from fastxkd.runs.masked import MaskedSplit, mean_pixel, rank_pixels
from fastxkd.train import Progress, TrainSettings

SETTINGS = TrainSettings(epochs=4, batch_size=8, lr=0.5)
# So slow that every step counts.
SLOW = TrainSettings(epochs=3, batch_size=8, lr=0.01)


def pixels(n: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """2 x 2 images: the first pixel is the class, the second and third noise, the last nothing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    images = torch.randint(256, (n, 1, 2, 2), generator=generator, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.where(labels == 1, 230, 20).to(torch.uint8)
    images[:, 0, 1, 1] = 100
    return images, labels.numpy()


def data(train: Split | None = None) -> ImageData:
    train = train or ArraySplit(*pixels(64, 0))
    test = ArraySplit(*pixels(40, 1))
    return ImageData("pixels", ["dark", "bright"], train, test, 1, 2, (0.5,), (0.5,), "Made up.")


def linear(*weights: float) -> nn.Module:
    """The second class's logit has these slopes, the first's none."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0] * 4, weights]))
        model[1].bias.zero_()
    return model


def student() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))


def run(model: nn.Module, out: Path | None = None, **options: Any) -> DiffROAR:
    options = {"fractions": (0.25, 1.0), "seeds": (0, 1), "settings": SETTINGS, **options}
    options.setdefault("student", student)
    return diffroar(model, options.pop("data", None) or data(), out, **options)


# --- cases that can be worked out


def test_by_hand() -> None:
    """A quarter of four pixels is one. With the class in it a line separates all images; with the
    pixel that is the same everywhere, of two equal classes one is right."""
    knows = run(linear(3.0, 1.0, 1.0, 0.1))
    assert knows.top == ((1.0, 1.0), (1.0, 1.0))
    assert knows.bottom == ((0.5, 0.5), (1.0, 1.0))
    assert knows.mean == (0.5, 0.0)
    assert knows.std == (0.0, 0.0)
    errs = run(linear(0.1, 1.0, 1.0, 3.0))
    assert errs.mean == (-0.5, 0.0)


def test_of_the_logit_of_the_predicted_class() -> None:
    found = run(linear(3.0, 1.0, 1.0, 0.1), of="logit", labels="predicted", seeds=(3,))
    # Images taken for the first class have a slope of 0 everywhere: its logit is constant.
    # Ranked in reading order, their first pixel is the top one all the same.
    assert found.top[0] == (1.0,)
    assert found.std == (None, None)


@pytest.mark.parametrize(("labels", "reached"), [("true", 1.0), ("predicted", 0.5)])
def test_labels_say_whose_gradient_it_is(labels: str, reached: float) -> None:
    """The first class's logit looks at the pixel that tells, the second's at the one that does not,
    and the model takes everything for the second."""
    model = linear(0.0, 0.0, 0.0, 1.0)
    with torch.no_grad():
        model[1].weight[0, 0] = 1.0
        model[1].bias[1] = 9.0
    found = run(model, of="logit", labels=labels, fractions=(0.25,), seeds=(0,))
    assert found.top == ((reached,),)


def test_statistics() -> None:
    found = DiffROAR((0.1,), (0, 1, 2), ((0.9, 0.7, 0.8),), ((0.5, 0.6, 0.1),))
    apart = [0.4, 0.1, 0.7]
    assert found.differences[0] == pytest.approx(apart)
    assert found.mean[0] == pytest.approx(0.4)
    assert found.std[0] == pytest.approx(statistics.stdev(apart)) == pytest.approx(0.3)
    lines = found.text().splitlines()
    assert lines[0].split() == ["pixels", "top", "bottom", "DiffROAR", "std"]
    assert lines[1].split() == ["10.0%", "0.8000", "0.4000", "+0.4000", "0.3000"]


# --- masks


def test_masked_split_by_hand() -> None:
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    ranks = torch.tensor([[[0, 1], [2, 3]], [[3, 2], [1, 0]]], dtype=torch.int16)
    fill = torch.tensor([200, 201, 202], dtype=torch.uint8)
    inner = ArraySplit(images, np.array([1, 0]))
    for keep, kept in (
        ("top", [[1, 1, 0, 0], [0, 0, 1, 1]]),
        ("bottom", [[0, 0, 1, 1], [1, 1, 0, 0]]),
    ):
        split = MaskedSplit(inner, ranks, fraction=0.5, keep=keep, fill=fill)
        batch = split.load([1, 0])
        assert batch.labels.tolist() == [0, 1]
        for at, index in enumerate((1, 0)):
            where = torch.tensor(kept[index]).bool().view(2, 2)
            for channel in range(3):
                wanted = images[index, channel].where(where, fill[channel])
                assert torch.equal(batch.images[at, channel], wanted)
    assert len(split) == 2
    assert split.name(1) == "image 1"
    assert not len(split.load([]).labels)


def test_mean_of_each_channel() -> None:
    images = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    images[:, 1] //= 4
    colour = data(ArraySplit(images, np.arange(5) % 2))
    colour.channels = 3
    wanted = images.double().mean((0, 2, 3)).round().tolist()
    assert mean_pixel(colour, batch_size=2).tolist() == wanted
    assert wanted[1] < 40 < 90 < wanted[0]


def test_mean_and_ranks_of_real_images() -> None:
    found = load_data("builtin")
    assert found.train is not None
    whole = found.train.load(range(len(found.train))).images
    assert mean_pixel(found).tolist() == [round(whole.double().mean().item())]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 5), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 576, 10))
    ranks = rank_pixels(model, found, found.test, batch_size=200)
    assert ranks.dtype == torch.int16
    assert torch.equal(ranks.flatten(1).sort().values, torch.arange(784).short().expand(500, -1))
    again = rank_pixels(model, found, found.test, batch_size=500)
    # Batches of other sizes may round otherwise: neighbours may change places.
    assert (ranks.int() - again.int()).abs().float().mean() < 1


class Broken(ArraySplit):
    """Its third image cannot be read."""

    def load(self, indices: Any) -> Batch:
        batch = super().load(indices)
        fine = batch.indices != 2
        errors = [] if fine.all() else [("image 2", "OSError: torn")]
        return Batch(batch.images[fine], batch.labels[fine], batch.indices[fine], errors)


def test_images_that_cannot_be_read_are_left_out() -> None:
    source = data(Broken(*pixels(64, 0)))
    found = run(linear(3.0, 1.0, 1.0, 0.1), data=source, seeds=(0,))
    assert found.mean == (0.5, 0.0)
    assert source.skipped == {"image 2": "OSError: torn"}


# --- on the disk


class Watch(Progress):
    """Counts steps and stages; stops at one step as a kill would, in the middle of everything."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.steps, self.stages = stop, 0, []  # type: ignore[var-annotated]

    def start(self, stage: str, steps: int, done: int) -> None:
        self.stages.append((stage, done))

    def step(self, epoch: int, loss: float | None) -> None:
        self.steps += 1
        if self.steps == self.stop:
            raise RuntimeError("killed")


MODEL = linear(3.0, 1.0, 1.0, 0.1)


STEPS = 2 + 6 * 24  # two of the ranking, and six trainings


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffROAR, bytes]:
    out = tmp_path_factory.mktemp("diffroar") / "whole"
    found = run(MODEL, out, settings=SLOW, progress=(watch := Watch()))
    assert watch.steps == STEPS
    return found, (out / RESULT).read_bytes()


@pytest.mark.parametrize("stop", [1, 13, 26, 27, STEPS])
def test_killed_and_resumed_is_the_same_to_the_bit(
    tmp_path: Path, whole: tuple[DiffROAR, bytes], stop: int
) -> None:
    options: dict[str, Any] = {"settings": SLOW, "checkpoint_seconds": 0.0}
    with pytest.raises(RuntimeError, match="killed"):
        run(MODEL, tmp_path / "run", progress=Watch(stop), **options)
    torch.rand(7)
    found = run(MODEL, tmp_path / "run", progress=(watch := Watch()), **options)
    assert found == whole[0]
    assert (tmp_path / "run" / RESULT).read_bytes() == whole[1]
    # Made again: the ranking, and the step that was torn apart.
    assert watch.steps == STEPS - max(0, stop - 3)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoints", RESULT]
    assert not [*tmp_path.glob("run/checkpoints/*")]
    again = run(MODEL, tmp_path / "run", progress=(watch := Watch()), **options)
    assert again == whole[0]
    assert watch.steps == 2


def test_what_is_on_the_disk(tmp_path: Path) -> None:
    found = run(MODEL, tmp_path / "run", seeds=(4,))
    content = json.loads((tmp_path / "run" / RESULT).read_text())
    assert content["result"] == json.loads(json.dumps(found.to_json()))
    assert content["accuracies"] == [
        ["top", 0.25, 4, 1.0],
        ["bottom", 0.25, 4, 0.5],
        ["top", 1.0, 4, 1.0],
    ]
    assert content["settings"]["fill"] == mean_pixel(data()).tolist()


def test_other_settings_models_and_folders_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(MODEL, out, seeds=(0,))
    for changed, name in [
        ({"settings": TrainSettings(epochs=4, batch_size=8, lr=0.4)}, "lr was 0.5, now 0.4"),
        ({"of": "logit"}, "of was 'loss', now 'logit'"),
        ({"fractions": (0.5,)}, "fractions was"),
    ]:
        with pytest.raises(ValueError, match=name):
            run(MODEL, out, **{"seeds": (0,), **changed})
    with pytest.raises(ValueError, match="model_weights was"):
        run(linear(1.0, 2.0, 3.0, 4.0), out, seeds=(0,))
    run(linear(1.0, 2.0, 3.0, 4.0), out, seeds=(0,), resume=False)
    (out / RESULT).write_text("{}")
    with pytest.raises(ValueError, match=r"out: .* is damaged"):
        run(MODEL, out, seeds=(0,))
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"it holds thesis\.tex"):
        run(MODEL, strange)
    assert [p.name for p in strange.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "content",
    ['{"settings": [], "accuracies": []}', '{"settings": {}, "accuracies": [["top", 1, 0, 7]]}'],
)
def test_damaged_results_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / RESULT).write_text(content)
    with pytest.raises(ValueError, match=r"out: .* is damaged"):
        run(MODEL, tmp_path)


class Noisy(nn.Module):
    """Draws numbers, and is no two times the same."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear(3.0, 1.0, 1.0, 0.1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.inner(images * torch.rand_like(images))


def test_a_model_that_draws_numbers_is_resumed(tmp_path: Path) -> None:
    first = run(Noisy(), tmp_path / "run", fractions=(0.25,))
    torch.rand(7)
    assert run(Noisy(), tmp_path / "run", fractions=(0.25,)) == first


def test_what_cannot_be_done_is_said_before_the_ranking(tmp_path: Path) -> None:
    watch = Watch()
    with pytest.raises(ValueError, match="model: expected one of cnn-large"):
        run(MODEL, student="cnn-huge", progress=watch)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"it holds thesis\.tex"):
        run(MODEL, tmp_path, progress=watch)
    assert not watch.stages


def test_damaged_weights_are_not_measured() -> None:
    with pytest.raises(ValueError, match="got NaN in 64 images"):
        run(linear(float("nan"), 1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"fractions": ()}, ValueError, "fractions: expected one or more"),
        ({"fractions": (0.1, 0.1)}, ValueError, "fractions: expected one or more, each once"),
        ({"fractions": (1.5,)}, ValueError, "fraction: expected 0 < fraction <= 1"),
        ({"seeds": ()}, ValueError, "seeds: expected one or more"),
        ({"seeds": np.arange(2)}, TypeError, "seeds: expected int, got int64"),
        ({"of": "gradient"}, ValueError, "of: expected one of loss, logit"),
        ({"labels": "both"}, ValueError, "labels: expected one of true, predicted"),
        ({"channels": "mean"}, ValueError, "channels: expected one of max, sum"),
        ({"student": "cnn-huge"}, ValueError, "model: expected one of cnn-large"),
        ({"student": lambda: 3}, TypeError, "student: expected it to make a Module, got int"),
    ],
)
def test_what_does_not_fit_is_named(
    options: dict[str, Any], kind: type[Exception], text: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=text):
        run(MODEL, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_data_needs_training_images() -> None:
    source = data()
    source.train = None
    with pytest.raises(ValueError, match="'pixels' was loaded without training images"):
        run(MODEL, data=source)
