"""Runs over a data set: what is computed, what it is stored as, what is refused, what goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from torch import Tensor, nn

import fastxkd
from fastxkd import cli
from fastxkd.cam import CAM, AblationCAM, FinerCAM, ScoreCAM, cam_from
from fastxkd.runs import asked, reader
from fastxkd.runs.background import Background
from fastxkd.runs.explain import explain
from fastxkd.runs.methods import METHODS, SHARED, Methods, statistics
from fastxkd.runs.models import load_model
from fastxkd.runs.progress import LineProgress
from fastxkd.runs.ranks import Ranks
from fastxkd.runs.verify import verify
from tests._torchvision import declare_operators
from tests.conftest import needs
from tests.test_data import write_images

ROOT = Path(__file__).resolve().parents[1]
NETS = """
import torch
from fastxkd.runs.cnn import SmallCNN
def net(num_classes, in_channels):
    return SmallCNN((4, 4, 6, 6), (1, 1, 1, 1), num_classes=num_classes, in_channels=in_channels)
"""


@pytest.fixture(autouse=True)
def _installed() -> None:
    for module in ("numcodecs", "pyarrow", "jinja2", "PIL", "typer", "rich", "safetensors"):
        needs(module)


class Net(nn.Module):
    """Two convolutions, batch norm and dropout: everything that eval mode changes."""

    def __init__(self, classes: int = 5, channels: int = 1) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(channels, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, classes)
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.head(self.drop(self.late(self.early(images)).mean((2, 3))))
        return out


def net(seed: int = 0, classes: int = 5, channels: int = 1) -> Net:
    torch.manual_seed(seed)
    model = Net(classes, channels)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    return model


class Pictures:
    """A map-style data set of uint8 tensors; some of it may be broken."""

    def __init__(self, count: int = 23, broken: tuple[int, ...] = (), labels: bool = True) -> None:
        made = torch.Generator().manual_seed(1)
        self.images = torch.randint(0, 256, (count, 1, 16, 16), generator=made, dtype=torch.uint8)
        self.broken, self.labels, self.asked = broken, labels, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        self.asked += 1
        if index in self.broken:
            raise OSError(f"sector {index} is unreadable")
        image = self.images[index]
        return (image, index % 5) if self.labels else image


def pixels(images: Tensor) -> Tensor:
    return (images.float() - 127) / 128


def files(out: Path) -> dict[str, bytes]:
    """Everything whose bytes must follow from settings and data alone."""
    found = {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("run.json", "report.html")
    }
    assert found
    return found


def in_batches(count: int, chunk: int, batch_size: int) -> Iterator[slice]:
    for start in range(0, count, chunk):
        stop = min(count, start + chunk)
        for first in range(start, stop, batch_size):
            yield slice(first, min(stop, first + batch_size))


def test_what_lies_there_is_what_the_explainer_says(tmp_path):
    model, data = net(), Pictures()
    summary = explain(model, data, tmp_path / "run", chunk=8, batch_size=3, dtype="float32")
    assert summary == (tmp_path / "run", 23, 3, 0)
    run = reader.open(tmp_path / "run")
    assert run.complete
    cam = fastxkd.GradCAM(model, ["late"])
    expected, logits = [], []
    for rows in in_batches(23, 8, 3):
        expected.append(cam(pixels(data.images[rows]), size=None))
        logits.append(cam.outputs)
    maps, logits = torch.cat(expected), torch.cat(logits)
    assert torch.equal(torch.from_numpy(run.maps["gradcam"][:]), maps)
    plain = needs("zarr").open(tmp_path / "run" / "maps" / "gradcam", mode="r")
    assert np.array_equal(plain[:], maps.numpy())
    scores = needs("pyarrow.dataset").dataset(tmp_path / "run" / "scores").to_table().to_pydict()
    assert scores["index"] == list(range(23))
    assert scores["label"] == [i % 5 for i in range(23)]
    assert scores["name"] == [f"image {i}" for i in range(23)]
    assert set(scores["status"]) == {"ok"}
    assert scores["predicted"] == scores["target"] == logits.argmax(1).tolist()
    top = logits.max(1).values
    np.testing.assert_allclose(scores["logit"], top, rtol=1e-6)
    np.testing.assert_allclose(
        scores["probability"], logits.double().softmax(1).max(1).values, rtol=1e-6
    )
    np.testing.assert_allclose(scores["gradcam_mean"], maps.mean((1, 2)), rtol=1e-6)
    settings = run.settings
    assert settings["layers"] == ["late"]
    assert settings["model"]["name"].endswith("test_explain.Net")
    assert settings["data"]["images"] == 23
    assert run.facts["versions"]["torch"] == torch.__version__
    assert verify(tmp_path / "run") == []


@pytest.mark.parametrize("method", [name for name in METHODS if name != "unicam"])
def test_every_method_by_name(tmp_path, method):
    model, data = net(), Pictures(10)
    layers = ["late"] if method == "cam" else ["late", "early"]
    explain(
        model, data, tmp_path / "run", methods=method, layers=layers, chunk=10, batch_size=5,
        dtype="float32", targets="label",
    )  # fmt: skip
    run = reader.open(tmp_path / "run")
    labels = torch.arange(10) % 5
    native = {
        "gradcam++": fastxkd.GradCAMPlusPlus, "gradcam": fastxkd.GradCAM,
        "xgradcam": fastxkd.XGradCAM, "hirescam": fastxkd.HiResCAM, "layercam": fastxkd.LayerCAM,
        "elementwise": fastxkd.GradCAMElementWise, "eigengradcam": fastxkd.EigenGradCAM,
        "eigencam": fastxkd.EigenCAM, "cam": CAM, "finercam": FinerCAM, "scorecam": ScoreCAM,
        "ablationcam": AblationCAM,
    }[method]  # fmt: skip
    parts = [
        native(model, layers, batch_size=5)(
            pixels(data.images[rows]), labels[rows], size=None, aggregate=None
        )
        for rows in in_batches(10, 10, 5)
    ]
    names = ["cam"] if method == "cam" else [f"{method.replace('+', 'p')}/{x}" for x in layers]
    assert list(run.maps) == names
    for at, name in enumerate(names):
        maps = torch.cat([part[at] for part in parts])
        assert torch.equal(torch.from_numpy(run.maps[name][:]), maps), name
        assert maps.amax() > 0.5


def test_methods_of_one_gradient_share_one_pass(tmp_path):
    model = net()
    explainers = Methods(model, [*SHARED, "finercam"], ["late"])
    images = torch.randn(4, 1, 16, 16)
    found = explainers(images)
    assert model.calls == 2  # Finer-CAM has a score of its own
    assert list(found.maps) == [name.replace("+", "p") for name in (*SHARED, "finercam")]
    with fastxkd.capture(model.eval(), ["late"]) as captured:
        logits = model(images)
    assert torch.allclose(found.logits, logits)
    activations = captured.activations["late"]
    (gradient,) = torch.autograd.grad(logits.max(1).values.sum(), activations)
    for name in SHARED:
        expected = cam_from(
            activations.detach(), None if name == "eigencam" else gradient, name, None
        )
        assert torch.allclose(found.maps[name.replace("+", "p")], expected, atol=1e-5), name


def test_eigencam_alone_asks_for_no_gradient():
    class Hard(Net):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).round()  # nothing flows back through this

    found = Methods(Hard(), ["eigencam"], ["late"])(torch.randn(2, 1, 16, 16))
    assert found.maps["eigencam"].amax() > 0.5


@pytest.mark.parametrize(
    ("targets", "expected"), [("label", None), (np.int64(3), 3), ("predicted", None)]
)
def test_which_class_is_explained(tmp_path, targets, expected):
    model, data = net(), Pictures(8)
    explain(model, data, tmp_path / "run", targets=targets, dtype="float32", batch_size=8)
    found = reader.open(tmp_path / "run").scores.to_pydict()
    logits = model.eval()(pixels(data.images)).detach()
    wanted = {
        "label": [i % 5 for i in range(8)],
        3: [3] * 8,
        "predicted": logits.argmax(1).tolist(),
    }[targets]
    assert found["target"] == wanted
    assert found["predicted"] == logits.argmax(1).tolist()
    np.testing.assert_allclose(
        found["logit"], logits.gather(1, torch.tensor(wanted)[:, None])[:, 0], rtol=1e-5
    )


@pytest.mark.parametrize(("size", "shape"), [(None, (5, 5)), ("input", (16, 16)), ((3, 9), (3, 9))])
@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8"])
def test_sizes_and_kinds_of_maps(tmp_path, size, shape, dtype):
    model, data = net(), Pictures(5)
    explain(model, data, tmp_path / "run", size=size, dtype=dtype, batch_size=5)
    maps = fastxkd.GradCAM(model, ["late"])(pixels(data.images), size=size)
    found = reader.open(tmp_path / "run").maps["gradcam"][:]
    assert found.shape == (5, *shape)
    assert found.dtype == dtype
    if dtype == "uint8":
        assert np.array_equal(found, (255 * maps).round().to(torch.uint8).numpy())
    else:
        assert np.array_equal(found, maps.numpy().astype(dtype))


def test_magnitudes_are_kept_on_request(tmp_path):
    model, data = net(), Pictures(5)
    with pytest.raises(ValueError, match="dtype: expected float32 for maps with normalize=None"):
        explain(model, data, tmp_path / "run", normalize=None)
    explain(model, data, tmp_path / "run", normalize=None, dtype="float32", batch_size=5)
    maps = fastxkd.GradCAM(model, ["late"])(pixels(data.images), size=None, normalize=None)
    assert np.array_equal(reader.open(tmp_path / "run").maps["gradcam"][:], maps.numpy())
    assert abs(float(maps.amax()) - 1) > 1e-3


def test_unicam_against_a_reference_from_all_over_the_data(tmp_path):
    student, base, data = net(0), net(1), Pictures(40)
    options: Any = {"methods": ["gradcam", "unicam"], "base": base, "reference": 12}
    explain(student, data, tmp_path / "run", dtype="float32", chunk=10, batch_size=4, **options)
    run = reader.open(tmp_path / "run")
    assert list(run.maps) == ["gradcam", "unicam-distilled", "unicam-residual"]
    labels = torch.arange(40) % 5
    unicam = fastxkd.UniCAM(student, base, ["late"])
    places = np.unique(np.linspace(0, 39, 40).astype(int))
    batches = [
        (pixels(data.images[places[i : i + 4]]), labels[places[i : i + 4]]) for i in range(0, 40, 4)
    ]
    reference = unicam.reference(batches, samples=12)
    for rows in in_batches(40, 10, 4):
        out = unicam(pixels(data.images[rows]), labels[rows], reference=reference, size=None)
        assert torch.equal(torch.from_numpy(run.maps["unicam-distilled"][rows]), out.distilled)
        assert torch.equal(torch.from_numpy(run.maps["unicam-residual"][rows]), out.residual)
        assert float(out.distilled.amax()) > 0.5
    (facts,) = run.facts["unicam_reference"].values()
    assert facts["fss"] == pytest.approx(reference.scores[0].fss, abs=1e-6)
    # Company does not matter: other batches, the same maps but for the last digits.
    explain(student, data, tmp_path / "other", dtype="float32", chunk=7, batch_size=7, **options)
    other = reader.open(tmp_path / "other")
    for name in run.maps:
        np.testing.assert_allclose(run.maps[name][:], other.maps[name][:], atol=2e-4)


def test_unicam_takes_class_embeddings(tmp_path):
    data, options = Pictures(20), {"methods": "unicam", "base": net(1), "batch_size": 5}
    table = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "words.npy", table.numpy())
    explain(net(), data, tmp_path / "a", class_embeddings=table, **options)
    explain(net(), data, tmp_path / "b", class_embeddings=tmp_path / "words.npy", **options)
    explain(net(), data, tmp_path / "c", **options)
    assert files(tmp_path / "a") == files(tmp_path / "b") != files(tmp_path / "c")
    for wrong, text in [
        (table[:3], "class_embeddings"),
        (tmp_path / "words.txt", "expected a .npy or .safetensors file"),
        (tmp_path / "none.npy", "cannot be read"),
    ]:
        with pytest.raises(ValueError, match=text):
            explain(net(), data, tmp_path / "d", class_embeddings=wrong, **options)


def test_images_that_cannot_be_read_change_nothing_for_the_others(tmp_path):
    model, broken = net(), (2, 9, 22)
    explain(model, Pictures(), tmp_path / "whole", chunk=8, batch_size=3)
    seen: list[tuple[int, int, int]] = []
    summary = explain(
        model, Pictures(broken=broken), tmp_path / "run", chunk=8, batch_size=3,
        progress=lambda *numbers: seen.append(numbers),
    )  # fmt: skip
    assert summary.failed == 3
    assert seen[0] == (0, 23, 0)
    assert seen[-1] == (23, 23, 3)
    whole, run = reader.open(tmp_path / "whole"), reader.open(tmp_path / "run")
    good = [i for i in range(23) if i not in broken]
    assert np.array_equal(run.maps["gradcam"][good], whole.maps["gradcam"][good])
    assert np.isnan(run.maps["gradcam"][list(broken)]).all()
    found, expected = run.scores.to_pydict(), whole.scores.to_pydict()
    for name, values in found.items():
        assert [values[i] for i in good] == [expected[name][i] for i in good]
    for i in broken:
        assert found["status"][i] == "failed"
        assert found["logit"][i] is None
        assert found["predicted"][i] is None
    lines = (tmp_path / "run" / "errors.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"index": i, "path": f"image {i}", "reason": f"OSError: sector {i} is unreadable"}
        for i in broken
    ]
    assert "sector 9 is unreadable" in (tmp_path / "run" / "report.html").read_text()


def test_what_is_not_finite_is_a_failure_of_that_image(tmp_path):
    class Touchy(Net):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(
                images / (images.flatten(1).amin(1) > -0.9).float()[:, None, None, None]
            )

    data = Pictures(12)
    data.images[:] = data.images.clamp(min=40)
    data.images[[4, 7]] = 0
    model = Touchy()
    assert explain(model, data, tmp_path / "run", batch_size=6).failed == 2
    run = reader.open(tmp_path / "run")
    assert [error["index"] for error in run.errors] == [4, 7]
    assert all("not finite" in error["reason"] for error in run.errors)
    assert np.isnan(run.maps["gradcam"][[4, 7]]).all()
    assert np.isfinite(run.maps["gradcam"][[3, 5, 6, 8]]).all()


def test_workers_change_nothing(tmp_path):
    model = net()
    options: Any = {"chunk": 8, "batch_size": 3}
    explain(model, Pictures(broken=(5,)), tmp_path / "none", **options)
    explain(model, Pictures(broken=(5,)), tmp_path / "two", workers=2, **options)
    assert files(tmp_path / "none") == files(tmp_path / "two")


def test_a_process_that_loads_images_and_dies_is_named(tmp_path):
    class Deadly(Pictures):
        def __getitem__(self, index: int) -> Any:
            if index == 17 and torch.utils.data.get_worker_info() is not None:
                os._exit(9)
            return super().__getitem__(index)

    model, options = net(), {"chunk": 4, "batch_size": 2}
    with pytest.raises(OSError, match="workers: a process that loads images has died"):
        explain(model, Deadly(), tmp_path / "run", workers=1, **options)
    explain(model, Deadly(), tmp_path / "run", **options)
    assert verify(tmp_path / "run") == []


def test_a_second_writer_is_refused(tmp_path):
    model = net()

    def twice(done: int, total: int, failed: int) -> None:
        if done == 9:
            explain(model, Pictures(), tmp_path / "run", chunk=9)

    with pytest.raises(ValueError, match=r"out: another run .* is writing"):
        explain(model, Pictures(), tmp_path / "run", chunk=9, progress=twice)


def test_a_model_by_name_without_weights_is_said_to_be_random(tmp_path, caplog):
    explain("cnn-small", Pictures(5), tmp_path / "run", num_classes=5)
    assert "model: cnn-small without weights is made of random numbers" in caplog.text


class Stop(Exception):
    pass


def stopping(after: int) -> Callable[[int, int, int], None]:
    def progress(done: int, total: int, failed: int) -> None:
        if done >= after:
            raise Stop

    return progress


@pytest.mark.parametrize("after", [0, 3, 8, 9, 20])
def test_an_interrupted_run_goes_on(tmp_path, after):
    model = net()
    options: Any = {"chunk": 4, "batch_size": 3}
    explain(model, Pictures(), tmp_path / "whole", **options)
    with pytest.raises(Stop):
        explain(model, Pictures(), tmp_path / "run", progress=stopping(after), **options)
    assert not (tmp_path / "run" / "report.html").exists()
    done = reader.open(tmp_path / "run").done
    seen: list[int] = []
    data = Pictures()
    explain(model, data, tmp_path / "run", progress=lambda n, *_: seen.append(n), **options)
    assert seen[0] == 4 * len(done)
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    assert verify(tmp_path / "run") == []


def test_a_finished_run_is_left_alone(tmp_path):
    model = net()
    first = explain(model, Pictures(), tmp_path / "run", chunk=8)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "maps").rglob("*")}
    calls = model.calls
    assert explain(model, Pictures(), tmp_path / "run", chunk=8) == first
    assert model.calls - calls <= 4  # what is looked at before work begins
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "maps").rglob("*")}


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"methods": "layercam"}, "methods"),
        ({"layers": "early"}, "layers"),
        ({"dtype": "uint8"}, "dtype"),
        ({"batch_size": 4}, "batch_size"),
        ({"targets": 1}, "targets"),
        ({"chunk": 16}, "chunk"),
        ({"model": 1}, "weights"),
        ({"mean": [0.5]}, "mean"),
    ],
)
def test_a_run_with_other_settings_is_not_continued(tmp_path, changed, name):
    options: Any = {"chunk": 8, "batch_size": 3}
    explain(net(), Pictures(), tmp_path / "run", **options)
    before = files(tmp_path / "run")
    model = net(changed.pop("model", 0))
    with pytest.raises(ValueError, match=name):
        explain(model, Pictures(), tmp_path / "run", **{**options, **changed})
    assert files(tmp_path / "run") == before


def test_other_images_of_the_same_number_are_another_run(tmp_path):
    explain(net(), Pictures(6), tmp_path / "run")
    others = Pictures(6)
    others.images = 255 - others.images
    with pytest.raises(ValueError, match=r"other settings: data\.fingerprint was"):
        explain(net(), others, tmp_path / "run")


class Verbose(nn.Module):
    """Answers with more than its logits, in one of the usual ways."""

    def __init__(self, inner: Net, way: str) -> None:
        super().__init__()
        self.inner, self.way = inner, way

    def forward(self, images: Tensor) -> Any:
        logits = self.inner(images)
        if self.way == "attribute":
            return SimpleNamespace(logits=logits)
        return {"logits": logits} if self.way == "mapping" else (logits, images)


@pytest.mark.parametrize("way", ["attribute", "mapping", "tuple"])
def test_logits_among_other_answers(tmp_path, way):
    explain(net(), Pictures(5), tmp_path / "plain", methods=["gradcam", "scorecam"])
    model = Verbose(net(), way)
    explain(model, Pictures(5), tmp_path / "run", methods=["gradcam", "scorecam"])
    plain, run = (reader.open(tmp_path / name) for name in ("plain", "run"))
    assert run.settings["layers"] == ["inner.late"]
    for name in ("gradcam", "scorecam"):
        assert np.array_equal(run.maps[name][:], plain.maps[name][:])
    assert run.scores == plain.scores
    assert not isinstance(model(torch.zeros(1, 1, 16, 16)), Tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision(tmp_path, dtype):
    exact, model = net(), net().to(dtype)
    explain(exact, Pictures(5), tmp_path / "exact", dtype="float32")
    explain(model, Pictures(5), tmp_path / "run", dtype="float32")
    exact, run = (reader.open(tmp_path / name) for name in ("exact", "run"))
    # The rounding of weights and activations, through three layers.
    bound = 40 * torch.finfo(dtype).eps + 1e-5
    assert np.abs(run.maps["gradcam"][:] - exact.maps["gradcam"][:]).max() < bound
    assert run.errors == []
    base = net(1)
    if dtype != torch.float64:
        with pytest.raises(ValueError, match=f"base: expected weights of {dtype} like the model's"):
            explain(model, Pictures(), tmp_path / "both", methods="unicam", base=base)


def test_maps_that_say_nothing_are_told_of(tmp_path, caplog):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Upsample((3, 3)), nn.Flatten(),
        nn.Linear(36, 5),
    )  # fmt: skip
    with pytest.raises(ValueError, match="layers: gradcam has a single position"):
        explain(model, Pictures(5), tmp_path / "run", layers="1")
    assert not (tmp_path / "run").exists()
    explain(model, Pictures(5), tmp_path / "run", layers="2")
    assert "the maps gradcam of the first images are flat" in caplog.text
    caplog.clear()
    explain(net(), Pictures(5), tmp_path / "other")
    assert not caplog.text


def test_names_of_other_classes_than_the_models_are_not_given_to_them(tmp_path):
    class Named(Pictures):
        classes = ("vase", "urn", "jug", "pot", "can")

    explain(net(classes=5), Named(5), tmp_path / "same")
    explain(net(classes=9), Named(5), tmp_path / "other")
    same, other = (Path(tmp_path, x, "report.html").read_text() for x in ("same", "other"))
    assert "right" in same
    predicted = reader.open(tmp_path / "other").scores["predicted"].to_pylist()
    assert all(f"class {p}" in other for p in predicted)
    assert not any(f"class {p}" in same for p in range(9))
    assert "vase" in other  # the label


def test_a_home_folder_and_a_change_of_place(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    explain(net(), Pictures(5), "~/run")
    assert not (tmp_path / "~").exists()
    assert verify("~/run") == []
    run = reader.open("run")
    monkeypatch.chdir("/")
    assert run[4].error is None
    assert len(reader.open("~/run").scores) == 5
    assert reader.open("~/run")[range(3, 0, -2)].scores["index"].to_pylist() == [3, 1]


def test_published_weights_are_made_for_a_mean_of_their_own(tmp_path, caplog):
    declare_operators()
    needs("torchvision.models")
    data = [(torch.zeros(3, 32, 32, dtype=torch.uint8), i) for i in range(3)]
    model = load_model("torchvision:squeezenet1_1", num_classes=3, in_channels=3)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    given: Any = {
        "num_classes": 3, "weights": tmp_path / "w.pth", "layers": "features.3", "dtype": "uint8"
    }  # fmt: skip
    explain("torchvision:squeezenet1_1", data, tmp_path / "a", **given)
    assert "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225" in caplog.text
    caplog.clear()
    explain("torchvision:squeezenet1_1", data, tmp_path / "b", mean=[0.5], **given)
    assert "--mean" not in caplog.text
    # What lies in the folder of a run was trained by it.
    (tmp_path / "run.json").write_text("{}")
    explain("torchvision:squeezenet1_1", data, tmp_path / "c", **given)
    assert "--mean" not in caplog.text


def test_the_callers_blocks_change_nothing(tmp_path):
    model, data = net(), Pictures(6)
    explain(model, data, tmp_path / "plain")
    blocks = {
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
        "inference": torch.inference_mode(),
        "no_grad": torch.no_grad(),
    }
    for name, block in blocks.items():
        with block:
            explain(model, data, tmp_path / name)
        assert files(tmp_path / name) == files(tmp_path / "plain")


def test_a_compiled_model_that_has_run(tmp_path):
    explain(net(), Pictures(6), tmp_path / "plain")
    model = torch.compile(net().eval(), backend="eager")
    model(torch.zeros(1, 1, 16, 16))
    explain(model, Pictures(6), tmp_path / "run")
    plain, run = (reader.open(tmp_path / name) for name in ("plain", "run"))
    assert run.settings["layers"] == ["_orig_mod.late"]
    assert np.array_equal(run.maps["gradcam"][:], plain.maps["gradcam"][:])


def nan_weights() -> Net:
    model = net()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    return model


class Boxes(Net):
    def forward(self, images: Tensor) -> Any:
        return {"boxes": super().forward(images)}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"methods": "gradcamel"}, "methods: expected some of gradcam, .* got 'gradcamel'"),
        ({"methods": []}, "methods: .* got none"),
        ({"methods": ["gradcam", "gradcam"]}, "methods: expected each once"),
        ({"methods": "cam", "layers": ["early"]}, "does not fit|head"),
        ({"methods": "cam", "layers": ["early", "late"]}, "methods: cam does not fit"),
        ({"methods": "unicam"}, "base: unicam compares two models"),
        ({"base": net(1)}, "base: given without unicam"),
        ({"layers": ["lte"]}, "no layer named 'lte'; did you mean 'late'"),
        ({"layers": ["head"]}, "spatial|height"),
        ({"targets": 5}, "targets: expected 0 <= class < 5, got 5"),
        ({"targets": "best"}, "targets: expected 'predicted', 'label' or a class"),
        ({"targets": True}, "targets"),
        ({"class_names": ["a", "b"]}, "class_names: expected 5, one per output, got 2"),
        (
            {"model": net(channels=3)},
            r"model: it does not take images \[1, 16, 16\] torch.float32; .*Error: .*channels",
        ),
        ({"dtype": "bfloat16"}, "dtype: expected one of float16, float32, uint8"),
        ({"size": "big"}, "size"),
        ({"size": (0, 4)}, "size"),
        ({"chunk": 0}, "chunk: expected an int of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"workers": -1}, "workers: expected an int of at least 0"),
        ({"device": "warp"}, "device: 'warp' cannot be used here"),
        ({"model": "resnet"}, "num_classes|model"),
        ({"model": nan_weights()}, "model: 1 of its weights are not finite"),
        ({"model": Boxes()}, "model: expected logits"),
        ({"data": Pictures(0)}, "no images"),
        ({"data": Pictures(5, labels=False), "targets": "label"}, "no label"),
        ({"data": Pictures(40, broken=tuple(range(40)))}, "data"),
        ({"weights": "w.pth"}, "model: weights go with a model's name"),
        ({"std": [0.0]}, "std"),
    ],
)  # fmt: skip
def test_refused_before_any_work(tmp_path, given, text):
    options = dict(given)
    model, data = options.pop("model", None) or net(), options.pop("data", None) or Pictures(8)
    if given.get("data") is not None:
        data = given["data"]
    with pytest.raises((ValueError, TypeError), match=text):
        explain(model, data, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_neither_model_nor_its_name(tmp_path):
    with pytest.raises(TypeError, match="model: expected a module or the name of one, got int"):
        explain(3, Pictures(4), tmp_path / "run")  # type: ignore[arg-type]


def test_a_disk_that_is_too_small_is_noticed_first(tmp_path, monkeypatch):
    class Usage:
        free = 100

    monkeypatch.setattr(asked.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(ValueError, match="out: the maps of 23 images are"):
        explain(net(), Pictures(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    Usage.free = 23 * 5 * 5 * 2 // 2
    explain(net(), Pictures(), tmp_path / "run")


def test_strangers_are_not_touched(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(ValueError, match=r"holds cat\.png"):
        explain(net(), Pictures(4), tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.png"]


def test_the_model_and_the_random_numbers_are_left_as_they_were(tmp_path):
    model = net().train()
    model.late.eval()
    flags = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    explain(model, Pictures(9), tmp_path / "run", methods=["gradcam", "scorecam"], workers=1)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_report_escapes_what_it_is_told(tmp_path):
    names = ["<script>alert(1)</script>", *"bcde"]
    explain(net(), Pictures(9), tmp_path / "run", class_names=names, gallery=9)
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("<article") == 9
    assert "Grad-CAM" in page
    assert "9 of 9 images explained." in page


def test_statistics_of_maps():
    maps = torch.rand(7, 5, 9, generator=torch.Generator().manual_seed(0))
    maps[1] = 0
    maps[2] = 1
    maps[3] = 0
    maps[3, 4, 2] = 0.7
    maps[4, 0, 0] = torch.nan
    found = statistics(maps)
    for i in (0, 1, 2, 3, 5, 6):
        m = maps[i].numpy().astype(np.float64)
        energy = (m**2).mean()
        assert found["mean"][i] == pytest.approx(m.mean(), rel=1e-12)
        assert found["spread"][i] == pytest.approx(m.mean() ** 2 / energy if energy else 0)
        y, x = np.unravel_index(m.argmax(), m.shape)
        assert found["peak_y"][i] == pytest.approx((y + 0.5) / 5)
        assert found["peak_x"][i] == pytest.approx((x + 0.5) / 9)
    assert found["spread"][2] == pytest.approx(1)
    assert found["spread"][3] == pytest.approx(1 / 45)
    assert all(bool(value[4].isnan()) for value in found.values())


def test_work_in_the_background_keeps_order_and_says_what_went_wrong():
    done: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.002)
        if number == 5:
            raise OSError("disk on fire")
        done.append(number)

    def put(*numbers: int) -> None:
        with Background(work) as background:
            for number in numbers:
                background.put(number)

    with pytest.raises(OSError, match="disk on fire"):
        put(*range(100))
    assert done == [0, 1, 2, 3, 4]
    done.clear()
    put(1, 2, 3)
    assert done == [1, 2, 3]
    with pytest.raises(OSError, match="disk on fire"):
        put(5)  # found out at the end


def test_the_background_never_falls_far_behind_and_drops_what_waits_after_an_error():
    started, go, done = threading.Event(), threading.Event(), []

    def work(number: int) -> None:
        started.set()
        go.wait(10)
        done.append(number)

    def interrupted() -> None:
        with Background(work, waiting=1) as background:
            background.put(1)
            assert started.wait(10)
            background.put(2)
            late = threading.Thread(target=background.put, args=(3,))
            late.start()
            late.join(0.1)
            assert late.is_alive()  # no room: one is being done, one waits
            threading.Timer(0.2, go.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == [1]


def test_ranks_share_claims_words_and_counts():
    store = torch.distributed.HashStore()
    pending = list(range(0, 60, 2))
    taken: dict[int, list[int]] = {}
    heard: dict[int, Any] = {}

    def run(rank: int) -> None:
        ranks = Ranks(rank, 3, store=store)
        heard[rank] = ranks.from_first(lambda: {"token": "xyz"})
        ranks.wait()
        taken[rank] = []
        for claim in ranks.claims(pending):
            taken[rank].append(claim)
            time.sleep(0.001 * (rank + 1))
        ranks.count("done", len(taken[rank]))
        ranks.wait()
        heard[f"count {rank}"] = ranks.count("done")

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(claim for claims in taken.values() for claim in claims) == pending
    assert all(taken.values())
    assert [heard[rank] for rank in range(3)] == [{"token": "xyz"}] * 3
    assert [heard[f"count {rank}"] for rank in range(3)] == [30] * 3


def test_an_error_of_the_first_rank_is_everybodys():
    store = torch.distributed.HashStore()
    said: list[str] = []

    def run(rank: int) -> None:
        def fail() -> int:
            raise ValueError("out: it is a file")

        with pytest.raises(ValueError) as error:
            Ranks(rank, 2, store=store).from_first(fail)
        said.append(str(error.value))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert said == ["out: it is a file"] * 2


def test_lines_about_images(monkeypatch):
    clock, lines = [0.0], []
    monkeypatch.setattr("fastxkd.runs.progress.time.monotonic", lambda: clock[0])
    progress = LineProgress(lines.append)
    for second in range(25):
        clock[0] = float(second)
        progress.images(100 + 4 * second, 196, second // 10)
    progress.images(196, 196, 2)
    assert lines == [
        "explained: 100 of 196 images",
        "explained: 140 of 196 images  4.0 images/s  14 s left  1 failed",
        "explained: 180 of 196 images  4.0 images/s  4 s left  2 failed",
        "explained: 196 of 196 images  4.0 images/s  2 failed",
    ]


# The command


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    write_images(tmp_path / "images", {"a": 10, "b": 10}, size=(16, 16))
    return tmp_path


def words(place: Path, out: str = "run", **options: object) -> list[str]:
    chosen = {
        "model": f"{place}/nets.py:net",
        "data": f"imagefolder:{place}/images",
        "image_size": 16,
        "chunk": 4,
        "batch_size": 2,
        "out": place / out,
        **options,
    }
    return [
        "explain",
        *(w for name, value in chosen.items() for w in (f"--{name.replace('_', '-')}", str(value))),
    ]


def test_the_command_makes_everything_and_verifies_and_exports_it(place, capsys, monkeypatch):
    asked = words(place, methods="gradcam,hirescam", targets="label", size="8x8")
    monkeypatch.setattr(sys, "argv", ["/opt/bin/fastxkd", *asked])
    assert cli.main(asked) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"report: {place / 'run' / 'report.html'}"
    assert "explained: 20 of 20 images" in printed
    run = reader.open(place / "run")
    assert run.maps["hirescam"].shape == (20, 8, 8)
    assert run.scores["label"].to_pylist() == [0] * 10 + [1] * 10
    assert run.settings["model"]["name"] == f"{place}/nets.py:net"
    assert run.facts["command"] == ["fastxkd", *asked]
    assert cli.main(["explain", "--out", str(place / "run"), "--verify"]) == 0
    assert "every file is what it was" in capsys.readouterr().out
    for format in ("npz", "png"):
        assert cli.main(["explain", "--out", str(place / "run"), "--export", format]) == 0
        to = place / f"run-{format}"
        assert capsys.readouterr().out == f"exported: {to}\n"
        assert [path for path in to.rglob("*") if path.suffix == f".{format}"]
    images = ["--data", f"imagefolder:{place}/images", "--to", str(place / "over")]
    assert cli.main(["explain", "--out", str(place / "run"), "--export", "png", *images]) == 0
    assert len(list((place / "over").rglob("*.png"))) == 40
    capsys.readouterr()
    damaged = place / "run" / "maps" / "gradcam"
    file = next(path for path in sorted(damaged.iterdir()) if path.name != "zarr.json")
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    assert cli.main(["explain", "--out", str(place / "run"), "--verify"]) == 2
    errors = capsys.readouterr().err
    assert f"maps/gradcam/{file.name}: its content was altered" in errors
    assert "1 problem(s)" in errors


def test_five_in_a_hundred_corrupt(place, capsys):
    write_images(place / "many", {"a": 50, "b": 50}, size=(16, 16))
    broken = ["a/07.png", "a/31.png", "b/00.png", "b/25.png", "b/49.png"]
    shutil.copytree(place / "many", place / "hurt")
    for number, name in enumerate(broken):
        content = (place / "hurt" / name).read_bytes()
        cut = [b"", content[:20], content[: len(content) // 2], b"no picture", content[:-30]]
        (place / "hurt" / name).write_bytes(cut[number])
    options: Any = {"chunk": 16, "batch_size": 8}
    assert cli.main(words(place, data=f"imagefolder:{place}/many", **options)) == 0
    capsys.readouterr()
    assert cli.main(words(place, "run2", data=f"imagefolder:{place}/hurt", **options)) == 3
    assert "5 of 100 images failed, see" in capsys.readouterr().err
    whole, run = reader.open(place / "run"), reader.open(place / "run2")
    assert [Path(error["path"]).as_posix()[-8:] for error in run.errors] == broken
    assert all(len(error["reason"]) > 5 for error in run.errors)
    bad = [error["index"] for error in run.errors]
    good = [i for i in range(100) if i not in bad]
    assert np.array_equal(run.maps["gradcam"][good], whole.maps["gradcam"][good])
    assert np.isnan(run.maps["gradcam"][bad]).all()
    # Said again by the same command, which has nothing left to do.
    assert cli.main(words(place, "run2", data=f"imagefolder:{place}/hurt", **options)) == 3


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--model", "cnn-small"], "data: expected one, got none"),
        (["--data", "builtin"], "model: expected one, got none"),
        (["--verify", "--export", "npz"], "verify: expected --verify or --export, got both"),
        (["--verify", "--data", "builtin"], "verify: reads a run that is there"),
        (["--model", "cnn-small", "--data", "builtin", "--to", "x"], "to: given without --export"),
        (["--model", "cnn-small", "--data", "builtin", "--size", "big"], "size: expected layer"),
        (["--model", "cnn-small", "--data", "builtin", "--targets", "-1"], "targets: expected"),
        (
            ["--model", "cnn-small", "--data", "builtin", "--no-normalize"],
            "dtype: expected float32",
        ),
        (["--verify"], "is no run|is no folder"),
        (["--export", "bmp"], "format|is no"),
    ],
)
def test_what_the_command_refuses(tmp_path, capsys, given, text):
    import re

    assert cli.main(["explain", "--out", str(tmp_path / "run"), *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastxkd: error: ")
    assert re.search(text, error)
    assert error.count("\n") == 1


def test_a_run_that_goes_on_is_not_called_damaged(tmp_path, capsys):
    with pytest.raises(Stop):
        explain(net(), Pictures(), tmp_path / "run", chunk=4, batch_size=4, progress=stopping(12))
    capsys.readouterr()
    assert cli.main(["explain", "--out", str(tmp_path / "run"), "--verify"]) == 2
    said = capsys.readouterr().err
    assert "the run is not complete" in said
    assert "what is there is whole; the command of the run goes on" in said
    assert "damaged" not in said


def test_names_of_outputs_from_a_file(place, capsys):
    names = place / "names.txt"
    names.write_bytes(b"\xef\xbb\xbfvase\r\n<i>urn</i>\r\n\r\n")
    assert cli.main(words(place, class_names=str(names))) == 0
    page = (place / "run" / "report.html").read_text("utf-8")
    assert "\ufeff" not in page
    predicted = set(reader.open(place / "run").scores["predicted"].to_pylist())
    assert all(("vase", "&lt;i&gt;urn&lt;/i&gt;")[p] in page for p in predicted)
    names.write_text("vase\n")
    assert cli.main(words(place, "other", class_names=str(names))) == 2
    assert "class_names: expected 2, one per output, got 1" in capsys.readouterr().err


def test_weights_from_a_file_are_named_by_their_hash(place):
    import hashlib

    from fastxkd.runs.models import load_model

    torch.manual_seed(5)
    model = load_model(f"{place}/nets.py:net", num_classes=2, in_channels=3)
    needs("safetensors.torch").save_file(model.state_dict(), place / "w.safetensors")
    assert cli.main(words(place, weights=place / "w.safetensors")) == 0
    facts = reader.open(place / "run").facts["weights"]["model"]
    expected = hashlib.sha256((place / "w.safetensors").read_bytes()).hexdigest()
    assert facts == {"path": str(place / "w.safetensors"), "sha256": expected}
    assert cli.main(words(place, "drawn")) == 0
    assert files(place / "run") != files(place / "drawn")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_has_its_status_and_leaves_nobody_behind(place, number):
    (place / "slow.py").write_text(
        "import os, time, torch\n"
        "class Slow(torch.utils.data.Dataset):\n"
        "    def __len__(self):\n"
        "        return 60\n"
        "    def __getitem__(self, i):\n"
        f"        with open({str(place / 'who')!r}, 'a') as file:\n"
        "            file.write(f'{os.getpid()}\\n')\n"
        "        time.sleep(float(os.environ.get('SLOW', 0)))\n"
        "        return torch.full((3, 16, 16), i, dtype=torch.uint8), i % 2\n"
        "def slow():\n"
        "    return Slow()\n"
    )
    command = [sys.executable, "-m", "fastxkd", *words(
        place, data=f"{place}/slow.py:slow", num_classes=2, workers=2, image_size=16,
    )]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    environment["SLOW"] = "0.05"
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        scores = place / "run" / "scores"
        until = time.monotonic() + 100
        while time.monotonic() < until and not (scores.is_dir() and any(scores.iterdir())):
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], errors
    # A loader that was sending may still have its say behind it.
    assert "interrupted; the same command resumes where it stopped" in errors
    assert 0 < len(reader.open(place / "run").done) < 15
    for pid in {int(line) for line in (place / "who").read_text().splitlines()}:
        until = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert not Path(f"/proc/{pid}").exists()
    options: Any = {"data": f"{place}/slow.py:slow", "num_classes": 2, "image_size": 16}
    assert cli.main(words(place, **options)) == 0
    assert cli.main(words(place, "whole", **options)) == 0
    assert files(place / "run") == files(place / "whole")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(tmp_path):
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "from fastxkd.runs.explain import explain\n"
        "from tests.test_explain import net\n"
        "class Data:\n"
        "    def __len__(self):\n"
        "        return int(sys.argv[2])\n"
        "    def __getitem__(self, i):\n"
        "        if i % 50 == 7:\n"
        "            raise OSError('broken')\n"
        "        return torch.full((1, 16, 16), i % 251, dtype=torch.uint8), i % 5\n"
        "explain(net(), Data(), sys.argv[1], gallery=2)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    peaks = []
    for count in (2_000, 20_000):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / str(count)), str(count)],
            env=environment, cwd=ROOT, capture_output=True, text=True, timeout=250,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[1] <= 1.1 * peaks[0]


def test_options_of_the_data(place, tmp_path, capsys):
    """Grey images, one that is too large, and one outside that a link leads to."""
    write_images(tmp_path / "elsewhere", {"a": 1}, size=(16, 16))
    write_images(tmp_path / "large", {"a": 1}, size=(40, 40))
    images = place / "images" / "a"
    (images / "zlink.png").symlink_to(next((tmp_path / "elsewhere").rglob("*.png")))
    shutil.copy(next((tmp_path / "large").rglob("*.png")), images / "zlarge.png")
    options: Any = {"channels": 1, "max_pixels": 1000, "dtype": "float32", "size": "8x8"}
    assert cli.main(words(place, "inside", **options)) == 3
    assert cli.main([*words(place, "linked", **options), "--follow-links"]) == 3
    capsys.readouterr()
    inside, linked = reader.open(place / "inside"), reader.open(place / "linked")
    assert (len(inside.maps["gradcam"]), len(linked.maps["gradcam"])) == (22, 22)
    broken = [[Path(error["path"]).name for error in run.errors] for run in (inside, linked)]
    assert broken == [["zlarge.png", "zlink.png"], ["zlarge.png"]]
    assert inside.settings["data"]["shape"] == [1, 16, 16]
    assert inside.settings["data"]["max_pixels"] == 1000
