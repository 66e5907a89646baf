"""Dissections as a directory: what lies there, what is broken, what goes on after a kill."""

from __future__ import annotations

import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastxkd import cli
from fastxkd.metrics.dissection import DissectionTally, NetworkDissection
from fastxkd.metrics.unit_thresholds import unit_thresholds
from fastxkd.runs import reader, unit_activations
from fastxkd.runs.best_images import BestImages
from fastxkd.runs.concept_data import ConceptImages, ConceptSource, open_concepts
from fastxkd.runs.dissect import dissect
from fastxkd.runs.dissected import open_dissection
from fastxkd.runs.dissection_report import chart, roles
from fastxkd.runs.durable import Lock
from tests.concept_sets import (
    IMAGE,
    SIZE,
    colours,
    row,
    save,
    write_broden,
    write_broden_tables,
    write_index,
)
from tests.conftest import needs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ("units.csv", "units.parquet", "counts.json", "errors.jsonl")
NETS = """
from torch import nn
def net(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(968, num_classes))
"""


@pytest.fixture(autouse=True)
def _installed() -> None:
    for module in ("numcodecs", "pyarrow", "jinja2", "PIL", "typer", "rich", "matplotlib"):
        needs(module)


@pytest.fixture
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time of a small run is its page."""
    page = importlib.import_module("fastxkd.runs.dissection_report")
    monkeypatch.setattr(page, "write_dissection_report", lambda *given, **more: None)


def net(seed: int = 0, units: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, units, 3, 2), nn.ReLU(), nn.Conv2d(units, 4, 3))


def source(root: Path, count: int = 12, broken: tuple[int, ...] = ()) -> ConceptSource:
    write_broden(root, count)
    for i in broken:
        (root / f"images/im/{i:03d}_object.png").unlink()
    return open_concepts(f"broden:{root}", image_size=IMAGE)


def results(out: Path) -> dict[str, bytes]:
    found = {name: (out / name).read_bytes() for name in RESULTS}
    return found | {p.name: p.read_bytes() for p in sorted((out / "tallies").iterdir())}


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "units.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("spool", [True, False])
@pytest.mark.usefixtures("_no_page")
def test_the_run_is_the_metric_on_the_images_that_can_be_used(tmp_path, spool):
    concepts = source(tmp_path / "data", 12, broken=(2, 7))
    model = net()
    done = dissect(
        model, concepts, tmp_path / "run", layers="1", q=0.1, chunk=5, batch_size=2, spool=spool
    )
    assert (done.images, [failure.index for failure in done.failed]) == (12, [2, 7])
    dissection = NetworkDissection(model, "1", concepts.concepts, q=0.1)
    maps, annotations = [], []
    for first, stop in ((0, 2), (2, 4), (4, 5), (5, 7), (7, 9), (9, 10), (10, 12)):
        batch = ConceptImages(concepts)[first, stop]
        # The images that cannot be used run along: others may differ in a bit without them.
        maps.append(dissection.activations(concepts.normalize(batch.images))[batch.kept])
        annotations.append((batch.masks[batch.kept], batch.labels[batch.kept]))
    tally = DissectionTally(unit_thresholds(lambda: maps, 0.1), concepts.concepts)
    for values, (masks, labels) in zip(maps, annotations, strict=True):
        tally.update(values, masks, labels)
    wanted, found = tally.compute(), done.models["model"].dissection
    assert torch.equal(found.intersections, wanted.intersections)
    assert torch.equal(found.thresholds, wanted.thresholds)
    assert torch.equal(found.iou(), wanted.iou())
    assert found.units == wanted.units
    assert found.images == 10
    table = rows(tmp_path / "run")
    assert [line["name"] for line in table] == [unit.name for unit in wanted.units]
    assert [float(line["iou"]) for line in table] == [unit.iou for unit in wanted.units]
    parquet = needs("pyarrow.parquet").read_table(tmp_path / "run/units.parquet").to_pylist()
    assert [line["label"] for line in parquet] == wanted.labels.tolist()
    counts = json.loads((tmp_path / "run/counts.json").read_text())
    assert counts["failed"] == 2
    assert counts["models"]["model"]["detectors"] == wanted.detectors
    errors = [json.loads(s) for s in (tmp_path / "run/errors.jsonl").read_text().splitlines()]
    assert [error["path"] for error in errors] == ["im/002.png", "im/007.png"]
    assert errors[0]["reason"].startswith("index.csv row 4: im/002_object.png: FileNotFoundError")
    assert not (tmp_path / "run/activations").exists()
    assert not (tmp_path / "run/.lock").exists()


@pytest.mark.usefixtures("_no_page")
def test_with_and_without_a_spool_are_one(tmp_path):
    concepts = source(tmp_path / "data", 9, broken=(4,))
    for name, options in (("one", {}), ("four", {"spool": False}), ("workers", {"workers": 1})):
        dissect(net(), concepts, tmp_path / name, layers="1", q=0.1, chunk=4, **options)
    assert results(tmp_path / "one") == results(tmp_path / "four")
    assert results(tmp_path / "one") == results(tmp_path / "workers")


def test_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("fastxkd.runs.dissect"), "_UNTIL_GONE", 0.0)
    (tmp_path / "run").mkdir()
    lock = Lock(tmp_path / "run/.lock")
    lock.take(0)
    with pytest.raises(ValueError, match="another run is writing in"):
        dissect(net(), source(tmp_path / "data", 3), tmp_path / "run", layers="1", q=0.1)
    lock.release()


def test_activations_stay_on_request(tmp_path):
    concepts = source(tmp_path / "data", 5)
    options: dict[str, Any] = {"layers": "1", "q": 0.1, "gallery": 0}
    done = dissect(net(), concepts, tmp_path / "run", keep=True, **options)
    kept = reader.open(tmp_path / "run/activations/model").maps["activations"]
    maps = torch.from_numpy(kept[:])
    found = done.models["model"]
    assert torch.equal(unit_thresholds(maps, 0.1), found.dissection.thresholds)
    assert torch.equal(found.best.peaks[:, 0], maps.amax((0, 2, 3)))
    page = (tmp_path / "run/report.html").read_text("utf-8")
    assert "No unit is shown" in page


@pytest.mark.usefixtures("_no_page")
def test_passes_over_the_data(tmp_path, monkeypatch):
    concepts = source(tmp_path / "data", 6)
    seen: list[tuple[str, int, int]] = []
    keep: list[int] = []
    real = NetworkDissection.activations

    def counted(self: Any, images: Any) -> Any:
        keep.append(len(images))
        return real(self, images)

    monkeypatch.setattr(NetworkDissection, "activations", counted)
    for spool, passes in ((True, (1,)), (False, (3, 4))):
        keep.clear()
        dissect(
            net(), concepts, tmp_path / f"{spool}", layers="1", q=0.1, spool=spool,
            progress=lambda *told: seen.append(told),
        )  # fmt: skip
        # Besides two images to see what the model gives.
        assert (sum(keep) - 2) / 6 in passes
    assert ("activations", 6, 6) in seen
    assert ("activations, pass 2", 6, 6) in seen
    assert ("concepts", 6, 6) in seen


@pytest.mark.usefixtures("_no_page")
def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    concepts = source(tmp_path / "data", 12, broken=(3,))
    options: dict[str, Any] = {"layers": "1", "q": 0.1, "chunk": 3, "batch_size": 2}
    dissect(net(), concepts, tmp_path / "whole", **options)
    real, calls = NetworkDissection.activations, 0

    def falters(self: Any, images: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:  # one to begin with, two for each chunk: in the third
            raise KeyboardInterrupt
        return real(self, images)

    monkeypatch.setattr(NetworkDissection, "activations", falters)
    with pytest.raises(KeyboardInterrupt):
        dissect(net(), concepts, tmp_path / "run", **options)
    assert (tmp_path / "run/activations/model/journal").is_dir()
    dissect(net(), concepts, tmp_path / "run", **options)
    # Not the two chunks that were there: one look, then two chunks of two batches.
    assert calls == 6 + 1 + 4
    assert results(tmp_path / "run") == results(tmp_path / "whole")
    # Complete, it computes nothing more.
    dissect(net(), concepts, tmp_path / "run", **options)
    assert calls == 12
    assert results(tmp_path / "run") == results(tmp_path / "whole")


def interrupt(patched: pytest.MonkeyPatch, name: str, at: int) -> None:
    """Ctrl-C in a call of a function of the run."""
    module = importlib.import_module("fastxkd.runs.dissect")
    real, calls = getattr(module, name), 0

    def once(*given: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return real(*given, **more)

    patched.setattr(module, name, once)


@pytest.mark.usefixtures("_no_page")
def test_a_kill_between_thresholds_and_tables(tmp_path, monkeypatch):
    concepts = source(tmp_path / "data", 7)
    options: dict[str, Any] = {"layers": "1", "q": 0.1, "names": ["a", "b"], "chunk": 4}
    models = [net(0), net(1)]
    dissect(models, concepts, tmp_path / "whole", **options)
    for name in ("save_model", "write_tables", "unit_thresholds"):
        with monkeypatch.context() as patched:
            interrupt(patched, name, 1 if name == "write_tables" else 2)
            with pytest.raises(KeyboardInterrupt):
                dissect(models, concepts, tmp_path / name, **options)
        dissect(models, concepts, tmp_path / name, **options)
        assert results(tmp_path / name) == results(tmp_path / "whole")


@pytest.mark.usefixtures("_no_page")
def test_other_settings_are_refused_and_starting_over_is_not(tmp_path):
    concepts = source(tmp_path / "data", 5)
    options: dict[str, Any] = {"layers": "1", "q": 0.1}
    dissect(net(), concepts, tmp_path / "run", **options)
    before = results(tmp_path / "run")
    with pytest.raises(ValueError, match=r"q was 0.1, now 0.2"):
        dissect(net(), concepts, tmp_path / "run", layers="1", q=0.2)
    with pytest.raises(ValueError, match=r"models\.model\.weights was"):
        dissect(net(1), concepts, tmp_path / "run", **options)
    assert results(tmp_path / "run") == before
    dissect(net(1), concepts, tmp_path / "run", resume=False, **options)
    dissect(net(1), concepts, tmp_path / "fresh", **options)
    assert results(tmp_path / "run") == results(tmp_path / "fresh") != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("all of it")
    for resume in (True, False):
        with pytest.raises(ValueError, match="is not empty and not a run to continue"):
            dissect(net(), concepts, tmp_path / "mine", resume=resume, **options)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_several_models(tmp_path):
    concepts = source(tmp_path / "data", 10, broken=(1,))
    small = net(1, units=5)
    nn.init.constant_(small[0].bias, 0.1)
    done = dissect(
        [net(), small], concepts, tmp_path / "run", layers="1", q=0.1, names=["student", "base"],
        gallery=2,
    )  # fmt: skip
    alone = dissect(small, concepts, tmp_path / "alone", layers="1", q=0.1, gallery=0)
    assert done.models["base"].dissection.units == alone.models["model"].dissection.units
    assert len(rows(tmp_path / "run")) == 8 + 5
    page = (tmp_path / "run/report.html").read_text("utf-8")
    assert "Concept detectors: " in page
    assert "<svg" in page
    assert page.count("<article") == 2 * 2
    assert page.count("data:image/png") == 2 * 2 * 4
    assert "im/001_object.png: FileNotFoundError" in page
    again = open_dissection(tmp_path / "run")
    assert again["student"].dissection.units == done.models["student"].dissection.units
    assert torch.equal(again["base"].dissection.iou(), alone.models["model"].dissection.iou())
    assert roles(["student", "x", "base"]) == ["student", "teacher", "base"]
    assert roles(["model"]) == ["student"]
    # Three colours are all there are.
    models = list(done.models.values())
    assert chart(models)
    assert chart(models * 2) == ""


class Blind(nn.Module):
    """Not finite for dark images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, images: Any) -> Any:
        dark = images.mean((1, 2, 3), keepdim=True) < -0.9
        return self.layer(torch.where(dark, torch.inf, images))


@pytest.mark.usefixtures("_no_page")
def test_activations_that_are_not_finite_cost_that_image_only(tmp_path):
    write_broden(tmp_path / "data", 8)
    save(tmp_path / "data/images/im/005.png", np.zeros((IMAGE, IMAGE, 3), np.uint8))
    concepts = open_concepts(f"broden:{tmp_path / 'data'}", image_size=IMAGE)
    for spool in (True, False):
        done = dissect(
            [Blind(), net()], concepts, tmp_path / f"{spool}", layers=["layer", "1"],
            names=["blind", "sighted"], q=0.1, spool=spool,
        )  # fmt: skip
        assert [(f.index, f.reason) for f in done.failed] == [
            (5, "blind: its activations are not finite")
        ]
        assert done.models["blind"].dissection.images == 7
        assert done.models["sighted"].dissection.images == 8


@pytest.mark.parametrize("spool", [True, False])
def test_a_model_that_can_use_no_image_says_why(tmp_path, spool):
    concepts = source(tmp_path / "data", 5, broken=(0,))
    blind = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Threshold(torch.inf, torch.inf))
    with pytest.raises(ValueError, match=r"none of its images, the first: im/000\.png: index\.csv"):
        dissect(blind, concepts, tmp_path / "run", layers="1", q=0.1, spool=spool)


@pytest.mark.usefixtures("_no_page")
def test_the_disk_must_hold_what_stays(tmp_path, monkeypatch):
    concepts = source(tmp_path / "data", 3)
    one = 3 * 4 * (8 * 11 * 11)  # images, bytes, activations
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * one - 1))
    more: dict[str, Any] = {"layers": "1", "q": 0.1}
    with pytest.raises(ValueError, match="out: the activations of 3 images are"):
        dissect([net(), net(1)], concepts, tmp_path / "kept", keep=True, **more)
    dissect([net(), net(1)], concepts, tmp_path / "run", **more)


@pytest.mark.usefixtures("_no_page")
@pytest.mark.parametrize(
    ("spool", "words"),
    [(True, r"im/003\.png changed while the run went on"), (False, "image 3 changed while")],
)
def test_data_that_changes_on_the_way_is_noticed(tmp_path, monkeypatch, spool, words):
    concepts = source(tmp_path / "data", 6)
    real, passes = unit_activations.Recomputed.batches, 0

    def lost(self: Any, *given: Any, **more: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 2:
            (tmp_path / "data/images/im/003_object.png").unlink()
        return real(self, *given, **more)

    monkeypatch.setattr(unit_activations.Recomputed, "batches", lost)
    with pytest.raises(ValueError, match=words):
        dissect(net(), concepts, tmp_path / "run", layers="1", q=0.1, spool=spool)


def test_best_images():
    made = torch.Generator().manual_seed(0)
    maps = torch.rand(30, 3, 4, 5, generator=made)
    best = BestImages(4)
    order = torch.randperm(30, generator=made).tolist()
    for start in range(0, 30, 7):
        some = order[start : start + 7]
        best.update(some, maps[some])
    for u in range(3):
        peaks = maps[:, u].amax((1, 2))
        wanted = peaks.argsort(descending=True)[:4]
        assert best.images[u].tolist() == wanted.tolist()
        assert torch.equal(best.peaks[u], peaks[wanted])
        assert torch.equal(best.maps[u], maps[wanted, u])
    few = BestImages(4)
    few.update([9], maps[:1])
    assert few.images.tolist() == [[9, -1, -1, -1]] * 3


def test_what_does_not_fit_is_named(tmp_path):
    concepts = source(tmp_path / "data", 3)
    for given, words in (
        ({"names": ["a", "b"]}, "names: expected one for each of 1 models, got 2"),
        ({"names": ["a/b"]}, "names: expected letters"),
        ({"layers": ["1", "1"]}, "layers: expected one for each of 1 models, got 2"),
        ({"layers": "nine"}, "layer: Sequential has no layer named 'nine'"),
        ({"q": 1.5}, "q: expected a share between 0 and 1"),
        ({"chunk": 0}, "chunk: expected an int of at least 1"),
        ({"size": 5}, "data: this source is open already"),
    ):
        with pytest.raises(ValueError, match=words):
            dissect(net(), concepts, tmp_path / "run", **{"layers": "1", **given})
    with pytest.raises(ValueError, match="names: expected each once, got a, a"):
        dissect([net(), net()], concepts, tmp_path / "run", layers="1", names=["a", "a"])
    with pytest.raises(ValueError, match="model: expected at least one"):
        dissect([], concepts, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="holds no dissection"):
        open_dissection(tmp_path / "data")


@pytest.mark.usefixtures("_no_page")
def test_damaged_numbers_are_named(tmp_path):
    concepts = source(tmp_path / "data", 4)
    dissect(net(), concepts, tmp_path / "run", layers="1", q=0.1)
    path = tmp_path / "run/tallies/model.npz"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"model\.npz: it is damaged"):
        dissect(net(), concepts, tmp_path / "run", layers="1", q=0.1)


def test_names_from_files_are_escaped(tmp_path):
    write_broden(tmp_path / "data", 3)
    evil = '<img src=x onerror="alert(1)">'
    text = (tmp_path / "data/label.csv").read_text()
    (tmp_path / "data/label.csv").write_text(
        text.replace(",cat,", f',"{evil.replace(chr(34), chr(34) * 2)}",')
    )
    concepts = open_concepts(f"broden:{tmp_path / 'data'}", image_size=IMAGE)
    assert concepts.concepts.names[1] == evil
    dissect(net(), concepts, tmp_path / "run", layers="1", q=0.3)
    page = (tmp_path / "run/report.html").read_text("utf-8")
    assert evil not in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_verb(tmp_path, capsys):
    write_broden(tmp_path / "data", 9)
    (tmp_path / "nets.py").write_text(NETS)
    command = [
        "dissect", "--model", f"{tmp_path / 'nets.py'}:net", "--num-classes", "3", "--layer", "1",
        "--data", f"broden:{tmp_path / 'data'}", "--image-size", str(IMAGE), "--q", "0.1",
        "--threshold", "0.04", "--gallery", "1", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    assert cli.main(command) == 0
    said = capsys.readouterr()
    assert "Concept detectors" in said.out
    assert "report.html" in said.out
    settings = json.loads((tmp_path / "run/run.json").read_text())["settings"]
    assert (settings["q"], settings["iou_threshold"]) == (0.1, 0.04)
    (tmp_path / "data/images/im/004.png").unlink()
    assert cli.main([*command, "--no-resume", "--no-spool"]) == 3
    assert "1 of 9 images were left out" in capsys.readouterr().err
    assert cli.main([*command, "--size", "6"]) == 2
    assert "was started with other settings" in capsys.readouterr().err
    two = [*command[:2], command[2], "--model", *command[2:-1], str(tmp_path / "two"),
           "--name", "student", "--name", "base"]  # fmt: skip
    assert cli.main(two) == 3
    assert [line["model"] for line in rows(tmp_path / "two")] == ["student"] * 8 + ["base"] * 8


def test_a_category_that_no_mask_shows_is_named(tmp_path, capsys):
    write_broden(tmp_path / "data", 4)
    for file in (tmp_path / "data/images/im").glob("*_color_*.png"):
        save(file, colours(np.zeros((SIZE, SIZE), int)))
    for i in range(4):
        save(tmp_path / f"data/images/im/{i:03d}_object.png", colours(np.ones((SIZE, SIZE), int)))
    (tmp_path / "nets.py").write_text(NETS)
    command = [
        "dissect", "--model", f"{tmp_path / 'nets.py'}:net", "--num-classes", "3", "--layer", "1",
        "--data", f"broden:{tmp_path / 'data'}", "--image-size", str(IMAGE), "--gallery", "1",
        "--out", str(tmp_path / "run"), "--allow-empty",
    ]  # fmt: skip
    assert cli.main(command) == 0
    assert "no image that was used has a pixel of: color" in capsys.readouterr().err
    found = json.loads((tmp_path / "run/counts.json").read_text())
    assert found["models"]["model"]["categories_without_pixels"] == ["color"]


def write_many(root: Path, count: int) -> list[int]:
    """Ten thousand rows of few files, and 20 that are broken, four kinds of them."""
    write_broden_tables(root)
    random = np.random.RandomState(0)
    for i in range(20):
        save(root / f"images/{i}.png", random.randint(0, 256, (8, 8, 3)).astype(np.uint8))
        mask = random.choice([0, 1, 3], (SIZE, SIZE))
        save(root / f"images/{i}_object.png", colours(mask))
    save(root / "images/large.png", colours(np.ones((SIZE, SIZE + 1), int)))
    save(root / "images/unknown.png", colours(np.full((SIZE, SIZE), 999)))
    save(root / "images/empty.png", colours(np.zeros((SIZE, SIZE), int)))
    broken = sorted(random.choice(count, 20, replace=False).tolist())
    table = []
    for i in range(count):
        mask = f"{i % 20}_object.png"
        if i in broken:
            mask = ("large.png", "unknown.png", "none.png", "empty.png")[broken.index(i) % 4]
        table.append(row(f"{i % 20}.png", mask, "2", "5"))
    write_index(root, table)
    return broken


@pytest.mark.slow
def test_ten_thousand_images_of_which_twenty_are_broken(tmp_path, capsys):
    broken = write_many(tmp_path / "data", 10_000)
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU())\n"
    )
    status = cli.main([
        "dissect", "--model", f"{tmp_path / 'nets.py'}:net", "--num-classes", "3", "--layer", "1",
        "--data", f"broden:{tmp_path / 'data'}", "--image-size", "8", "--q", "0.1",
        "--chunk", "1024", "--batch-size", "128", "--out", str(tmp_path / "run"),
    ])  # fmt: skip
    assert status == 3
    assert "20 of 10,000 images were left out" in capsys.readouterr().err
    errors = [json.loads(s) for s in (tmp_path / "run/errors.jsonl").read_text().splitlines()]
    assert [error["index"] for error in errors] == broken
    reasons = ("large.png: 12 x 13 pixels", "unknown.png: unknown label 999",
               "none.png: FileNotFoundError", "empty.png: no pixel has a label")  # fmt: skip
    for i, error in enumerate(errors):
        assert error["reason"].startswith(f"index.csv row {broken[i] + 2}: {reasons[i % 4]}")
    counts = json.loads((tmp_path / "run/counts.json").read_text())
    assert counts["models"]["model"]["images"] == 9_980


KILLED = """
import os, signal, sys, torch
from fastxkd.metrics.dissection import NetworkDissection
from fastxkd.runs.concept_data import open_concepts
from fastxkd.runs.dissect import dissect
from tests.test_dissection_run import net

torch.set_num_threads(1)
data, out = sys.argv[1:]
real = NetworkDissection.activations

def attempt(after):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    calls = []
    def mortal(self, images):
        calls.append(1)
        if len(calls) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, images)
    NetworkDissection.activations = mortal
    concepts = open_concepts(f"broden:{data}", image_size=24)
    dissect(net(), concepts, out, layers="1", q=0.1, chunk=2, batch_size=2)
    os._exit(0)

statuses = [attempt(after) for after in (3, 2, 4, 3, 0)]
print([os.waitstatus_to_exitcode(status) for status in statuses])
"""


@pytest.mark.usefixtures("_no_page")
def test_killed_and_started_again(tmp_path):
    concepts = source(tmp_path / "data", 12, broken=(5,))
    dissect(net(), concepts, tmp_path / "whole", layers="1", q=0.1, chunk=2, batch_size=2)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "data"),
         str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, cwd=ROOT,
        capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    assert done.stdout.split("\n")[-2] == str([-9, -9, -9, -9, 0]), done.stderr
    assert results(tmp_path / "run") == results(tmp_path / "whole")
