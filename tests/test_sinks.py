"""Where records go: TensorBoard itself, files that survive crashes, and callables."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fastxkd.train import CSVSink, JSONLSink, TensorBoardSink, WandbSink
from fastxkd.train.sinks import open_sinks, write_whole
from tests.conftest import needs

NAN = float("nan")
# Its import touches what newer setuptools, protobuf and numpy deprecate.
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@quiet
def test_tensorboard_shows_scalars_and_pictures(tmp_path: Path) -> None:
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path / "events")
    assert not (tmp_path / "events").exists()  # nothing is opened before the first record
    picture = torch.arange(3 * 4 * 6, dtype=torch.uint8).view(3, 4, 6)
    sink(0, {"last/agreement": 0.25}, {"last/student": picture})
    sink(50, {"last/agreement": 0.5, "last/fss_teacher": 0.125}, None)
    sink.close()
    found = EventAccumulator(str(tmp_path / "events"), size_guidance={"images": 0}).Reload()
    values = [(event.step, event.value) for event in found.Scalars("last/agreement")]
    assert values == [(0, 0.25), (50, 0.5)]
    assert [event.step for event in found.Scalars("last/fss_teacher")] == [50]
    (image,) = found.Images("last/student")
    assert (image.step, image.width, image.height) == (0, 6, 4)
    pillow = needs("PIL.Image")
    import io

    decoded = np.asarray(pillow.open(io.BytesIO(image.encoded_image_string)))
    assert np.array_equal(decoded, picture.permute(1, 2, 0).numpy())


@quiet
def test_tensorboard_hides_what_a_lost_process_wrote(tmp_path: Path) -> None:
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lost = TensorBoardSink(tmp_path)
    for step in (0, 10, 20):
        lost(step, {"a": float(step)}, None)
    lost.close()
    resumed = TensorBoardSink(tmp_path)
    for step in (10, 20):
        resumed(step, {"a": -float(step)}, None)
    resumed.close()
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("a")
    assert [(event.step, event.value) for event in found] == [(0, 0), (10, -10), (20, -20)]


@quiet
def test_tensorboard_by_a_writer_of_the_users(tmp_path: Path) -> None:
    needs("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    sink = TensorBoardSink(writer)
    sink(1, {"a": 1.0}, None)
    sink.close()
    writer.add_scalar("b", 2.0, 1)  # not closed: it is the user's
    writer.close()
    with pytest.raises(TypeError, match="folder: expected a path or a SummaryWriter, got int"):
        TensorBoardSink(3)


def test_tensorboard_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"fastxkd\[monitor\]"):
        TensorBoardSink(tmp_path)(0, {"a": 1.0}, None)


class Run:
    """What a run of Weights & Biases is asked for."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str | None]] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, data: dict[str, Any]) -> None:
        self.logged.append(data)


def wandb(run: Run | None) -> ModuleType:
    module = ModuleType("wandb")
    module.run = run  # type: ignore[attr-defined]
    module.Image = lambda pixels: ("image", pixels.shape)  # type: ignore[attr-defined]
    return module


def test_wandb_has_a_step_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    monkeypatch.setitem(sys.modules, "wandb", wandb(run))
    sink = WandbSink()
    sink(0, {"a/agreement": 0.5}, {"a/student": torch.zeros(3, 4, 8, dtype=torch.uint8)})
    sink(10, {"a/agreement": 0.75}, None)
    assert run.metrics == [("explained/step", None), ("explained/*", "explained/step")]
    assert run.logged == [
        {
            "explained/step": 0,
            "explained/a/agreement": 0.5,
            "explained/a/student": ("image", (4, 8, 3)),
        },
        {"explained/step": 10, "explained/a/agreement": 0.75},
    ]
    other = Run()
    WandbSink(other, prefix="kd")(3, {"x": 1.0}, None)
    assert other.logged == [{"kd/step": 3, "kd/x": 1.0}]


def test_wandb_without_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", wandb(None))
    with pytest.raises(ValueError, match="run: no run of wandb is active"):
        WandbSink()(0, {"a": 1.0}, None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="'wandb'"):
        WandbSink()(0, {"a": 1.0}, None)


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.jsonl"
    sink = JSONLSink(path)
    assert not path.parent.exists()
    sink(0, {"a": 0.1, "b": NAN, "c": float("inf")}, None)
    assert lines(path) == [{"step": 0, "a": 0.1, "b": None, "c": None}]  # without close
    sink(5, {"a": 1 / 3}, None)
    sink.close()
    assert lines(path)[1] == {"step": 5, "a": 1 / 3}


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.csv"
    sink = CSVSink(path)
    sink(0, {"a": 0.1}, None)
    sink(5, {"a": 1 / 3, 'odd, "name"': NAN}, None)
    sink(9, {'odd, "name"': 2.0}, None)
    sink.close()
    assert rows(path) == [
        {"step": "0", "a": "0.1", 'odd, "name"': ""},
        {"step": "5", "a": repr(1 / 3), 'odd, "name"': "nan"},
        {"step": "9", "a": "", 'odd, "name"': "2.0"},
    ]


@pytest.mark.parametrize("kind", [CSVSink, JSONLSink])
def test_a_file_is_continued_and_no_step_is_there_twice(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / ("log.csv" if kind is CSVSink else "log.jsonl")
    lost = kind(path)
    for step in (0, 10, 20, 30):
        lost(step, {"a": float(step)}, None)
    lost.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])  # killed in the middle of a line
    resumed = kind(path)
    for step in (20, 30):
        resumed(step, {"a": float(step)}, None)
    resumed.close()
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    again = kind(path)
    again(0, {"a": 7.0}, None)
    again.close()
    found = rows(path) if kind is CSVSink else lines(path)
    assert [(str(row["step"]), float(row["a"])) for row in found] == [("0", 7.0)]


@pytest.mark.parametrize("kind", [CSVSink, JSONLSink])
def test_a_strangers_file_is_left_alone(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("dear diary\nnothing happened\n")
    with pytest.raises(ValueError, match=r"path: .*notes is there, and no (log|table) of steps"):
        kind(path)(0, {"a": 1.0}, None)
    assert path.read_text() == "dear diary\nnothing happened\n"
    with pytest.raises(ValueError, match="path: expected a file, got the folder"):
        kind(tmp_path)


@pytest.mark.parametrize("kind", [CSVSink, JSONLSink])
def test_after_a_full_disk_the_file_is_whole_again(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    sink = kind(path)
    sink(0, {"a": 1.0}, None)

    class Full:
        """Writes half of what it is given."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, text: str) -> int:
            self.file.write(text[: len(text) // 2])
            self.file.flush()
            raise OSError(28, "No space left on device")

        def flush(self) -> None: ...

        def close(self) -> None:
            self.file.close()

    sink._file = Full(sink._file)
    with pytest.raises(OSError, match="No space left"):
        sink(1, {"a": 2.0}, None)
    sink(2, {"a": 3.0}, None)
    sink.close()
    found = rows(path) if kind is CSVSink else lines(path)
    assert [int(row["step"]) for row in found] == [0, 2]


def test_write_whole_leaves_the_old_file_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def broken(number: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_sinks_by_what_they_are(tmp_path: Path) -> None:
    told = []
    table, log, function = open_sinks(
        [tmp_path / "a.csv", str(tmp_path / "b.JSONL"), lambda *given: told.append(given)]
    )
    assert isinstance(table, CSVSink)
    assert isinstance(log, JSONLSink)
    function(1, {}, None)
    assert told == [(1, {}, None)]
    assert open_sinks(None) == []
    assert len(open_sinks(print)) == 1
