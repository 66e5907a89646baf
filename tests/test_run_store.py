"""The directory of a run over a data set: written once, read by others, hostile or not."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastxkd.runs
from fastxkd.cam import render
from fastxkd.runs import chunks, durable, layout, reader, verify
from fastxkd.runs.chunks import Array, RunWriter
from tests.conftest import needs
from tests.runs_on_disk import (
    ARRAYS,
    CHUNK,
    CONFIDENCE,
    FAILED,
    GRADCAM,
    IMAGES,
    SETTINGS,
    UNICAM,
    complete,
    content,
    stored,
    temporaries,
    tree,
    write,
    writer,
)


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    # No power is cut here, and disks are slow; test_run_faults.py looks at what is synced.
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="module", autouse=True)
def _needed() -> None:
    needs("pyarrow")
    needs("numcodecs")


@pytest.fixture(scope="module")
def _finished(_needed: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("finished") / "run"
    complete(out)
    return tree(out)


@pytest.fixture
def run(tmp_path: Path, _finished: dict[str, bytes]) -> Path:
    """A complete run of its own for the test."""
    _plant(tmp_path / "run", _finished)
    return tmp_path / "run"


def _plant(out: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)


# What others see


def test_zarr_reads_the_maps(run: Path) -> None:
    zarr = needs("zarr")
    group = zarr.open(str(run / "maps"), mode="r")
    for name, values in stored().items():
        array = group[name]
        assert array.metadata.zarr_format == 3
        assert array.shards == (CHUNK, *ARRAYS[name].shape)
        assert array.dtype == values.dtype
        np.testing.assert_array_equal(array[:], values)
        np.testing.assert_array_equal(array[3:9, 1], values[3:9, 1])
    assert sorted(dict(group.members(max_depth=None))) == ["gradcam", "unicam", "unicam/layer4"]


@pytest.mark.parametrize("images", [1, 130, 300])
def test_zarr_reads_blocks(tmp_path: Path, images: int) -> None:
    """A chunk of more than a megabyte is packed in blocks, the last chunk has fewer."""
    zarr = needs("zarr")
    values = np.random.RandomState(0).rand(images, 64, 64).astype(np.float32)
    arrays = {"gradcam": Array((64, 64), "float32")}
    out = tmp_path / "run"
    with RunWriter(out, {}, images=images, chunk=128, arrays=arrays, columns={}) as some:
        assert some.layout.block("gradcam") == 64
        for chunk in some.pending():
            rows = some.rows(chunk)
            some.write(chunk, {"gradcam": values[rows.start : rows.stop]}, {})
        some.finish()
    array = zarr.open(str(out / "maps/gradcam"), mode="r")
    assert array.chunks == (64, 64, 64)
    np.testing.assert_array_equal(array[:], values)
    np.testing.assert_array_equal(reader.open(out).maps["gradcam"][:], values)


def test_pyarrow_reads_the_scores_as_one_data_set(run: Path) -> None:
    dataset = needs("pyarrow.dataset")
    table = dataset.dataset(run / "scores").to_table()
    assert table["index"].to_pylist() == list(range(IMAGES))
    assert [str(kind) for kind in table.schema.types] == [
        "int64",
        "string",
        "int64",
        "float",
        "bool",
    ]
    assert table["label"].to_pylist() == [None if i in FAILED else i % 3 for i in range(IMAGES)]
    np.testing.assert_array_equal(table["confidence"].to_numpy(), CONFIDENCE)


def test_errors_are_lines_of_json(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "errors.jsonl").read_text().splitlines()]
    assert lines == [
        {"index": 5, "path": "images/5.png", "reason": FAILED[5]},
        {"index": 10, "path": "images/10.png", "reason": FAILED[10]},
    ]
    settings = json.loads((run / "run.json").read_text())["settings"]
    assert settings == {"model": "cnn-small", "size": [3, 5], "seed": 0}


def test_nothing_else_is_left(run: Path) -> None:
    assert sorted(tree(run)) == [
        "errors.jsonl",
        "journal.jsonl",
        "maps/gradcam/c.0.0.0",
        "maps/gradcam/c.1.0.0",
        "maps/gradcam/c.2.0.0",
        "maps/gradcam/zarr.json",
        "maps/unicam/layer4/c.0.0.0",
        "maps/unicam/layer4/c.1.0.0",
        "maps/unicam/layer4/c.2.0.0",
        "maps/unicam/layer4/zarr.json",
        "maps/unicam/zarr.json",
        "maps/zarr.json",
        "run.json",
        "scores/00000000.parquet",
        "scores/00000001.parquet",
        "scores/00000002.parquet",
    ]
    assert not (run / "journal").exists()


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """A file's name may be bytes that are no UTF-8: Python reads them as lone surrogates."""
    name = "caf\udce9<b>.png"
    out = tmp_path / "run"
    with RunWriter(out, {}, images=1, chunk=1, arrays={}, columns={"name": "string"}) as some:
        some.write(0, {}, {"name": [name]}, [{"index": 0, "path": name, "reason": "x" * 5000}])
        some.finish()
    found = reader.open(out)
    assert found[0].scores["name"] == "caf\\udce9<b>.png"
    assert found.errors == [{"index": 0, "path": name, "reason": "x" * 1000}]


# What decides the bytes


def test_bytes_are_those_of_one_rank(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 ranks that write in another order, and stop, and go on as 2: the same files."""
    monkeypatch.setattr(chunks, "_UNTIL_SEEN", 0)
    out = tmp_path / "ranks"
    some = [writer(out, rank=rank, ranks=3, token="first") for rank in range(3)]
    assert [part.pending() for part in some] == [[0, 1, 2]] * 3
    assert [part.mine() for part in some] == [[0], [1], [2]]
    write(some[2], 2)
    for part in some:
        part.close()
    some = [writer(out, rank=rank, ranks=2, token="second") for rank in range(2)]
    assert [part.pending() for part in some] == [[0, 1]] * 2
    write(some[1], 1)
    assert some[0].pending() == [0, 1]
    assert some[1].mine() == []
    late = writer(out, rank=1, ranks=2, token="second")
    assert late.pending() == [0, 1]
    late.close()
    with pytest.raises(ValueError, match="chunks 0 are missing"):
        some[0].finish()
    with pytest.raises(ValueError, match="only rank 0"):
        some[1].finish()
    write(some[0], 0)
    assert some[0].finish() == chunks.Summary(out, IMAGES, 3, 2)
    for part in some:
        part.close()
    assert tree(out) == tree(run)


def test_bytes_of_a_chunk_do_not_depend_on_the_time(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 2e9)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("a", "elsewhere", "c", "d", "e")))
    complete(tmp_path / "later", facts={"host": "elsewhere"})
    later, now = tree(tmp_path / "later"), tree(run)
    assert json.loads(later.pop("run.json"))["facts"] == {"host": "elsewhere"}
    now.pop("run.json")
    assert later == now


def test_columns_keep_their_order(tmp_path: Path, run: Path) -> None:
    from tests.runs_on_disk import COLUMNS

    out = tmp_path / "other"
    with writer(out) as some:
        write(some, 1)
    complete(out, columns=dict(reversed(COLUMNS.items())))
    assert tree(out) == tree(run)


# Who may write


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"settings": {**SETTINGS, "seed": 1}}, "seed was 0, now 1"),
        ({"images": 12}, "images was 11, now 12"),
        ({"chunk": 5}, "chunk was 4, now 5"),
        ({"columns": {"name": "string"}}, "columns.label was 'int64', now None"),
        (
            {"arrays": {"gradcam": Array((3, 5), "float32")}},
            "arrays.gradcam.dtype was 'float16', now 'float32'",
        ),
    ],
)
def test_other_settings_are_refused(run: Path, changes: dict[str, Any], match: str) -> None:
    before = tree(run)
    with pytest.raises(ValueError, match=match):
        writer(run, **changes)
    assert tree(run) == before


def test_strangers_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "photos"
    out.mkdir()
    (out / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(ValueError, match=r"it holds cat\.jpg"):
        writer(out)
    (out / "cat.jpg").unlink()
    (out / "run.json").write_text('{"fastxkd": "0.1", "settings": {}}')
    with pytest.raises(ValueError, match=r"not the run\.json of a run over a data set"):
        writer(out)
    assert sorted(tree(out)) == ["run.json"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        writer(tmp_path / "file")


def test_links_are_refused(tmp_path: Path, run: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    os.rename(run / "scores", tmp_path / "scores")
    os.symlink(tmp_path / "elsewhere", run / "scores")
    with pytest.raises(ValueError, match="scores is a symbolic link"):
        writer(run)
    with pytest.raises(ValueError, match="scores: it is a symbolic link"):
        reader.open(run)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_second_writer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_UNTIL_GONE", 0.1)
    monkeypatch.setattr(chunks, "_UNTIL_CLAIMED", 0.1)
    out = tmp_path / "run"
    with writer(out, ranks=2, token="one") as first:
        with pytest.raises(ValueError, match=f"another run .process {os.getpid()} on .* writing"):
            writer(out)
        with pytest.raises(ValueError, match="no rank 0 with this token"):
            writer(out, rank=1, ranks=2, token="two")
        second = writer(out, rank=1, ranks=2, token="one")
        first.close()
        # Rank 0 is gone and rank 1 still writes.
        with pytest.raises(ValueError, match="another run"):
            writer(out)
        write(second, 1)
        second.close()
    with writer(out) as third:
        assert third.pending() == [0, 2]


_HOLDER = """
import sys
from pathlib import Path
from tests.runs_on_disk import writer, write
some = writer(Path(sys.argv[1]))
write(some, 0)
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_killed_writer_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    place = Path(__file__).parents[1]
    held = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(place)},
    )
    try:
        assert held.stdout is not None
        assert held.stdout.readline() == b"ready\n"
        monkeypatch.setattr(chunks, "_UNTIL_GONE", 0.1)
        with pytest.raises(ValueError, match=f"process {held.pid} on"):
            writer(out)
    finally:
        held.kill()
        held.wait()
        for pipe in (held.stdin, held.stdout):
            if pipe is not None:
                pipe.close()
    with writer(out) as some:
        assert some.pending() == [1, 2]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_worker_does_not_hold_the_lock_of_its_parent(tmp_path: Path) -> None:
    """A DataLoader's worker that outlives a killed parent for some seconds."""
    lock = durable.Lock(tmp_path / ".lock")
    lock.take(0)
    hear, tell = os.pipe()
    child = os.fork()
    if not child:
        os.close(tell)
        os.read(hear, 1)
        os._exit(0)
    os.close(hear)
    lock.release()  # the parent dies, the child lives
    try:
        other = durable.Lock(tmp_path / ".lock")
        other.take(5)  # the child needs a moment to begin
        other.release()
    finally:
        os.close(tell)
        os.waitpid(child, 0)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="token: 2 ranks need one"):
        writer(out, ranks=2)
    with pytest.raises(ValueError, match="rank: expected 0 to"):
        writer(out, rank=1)
    for name in ("../x", "a//b", "/etc", ".hidden", "a/zarr.json", "__x", "", "a.tmp", "ä"):
        with pytest.raises(ValueError, match="arrays: expected names"):
            writer(out, arrays={name: Array((1,), "uint8")})
    with pytest.raises(ValueError, match="inside the array a"):
        writer(out, arrays={"a": Array((1,), "uint8"), "a/b": Array((1,), "uint8")})
    with pytest.raises(ValueError, match="dtype 'int8'"):
        writer(out, arrays={"a": Array((1,), "int8")})
    with pytest.raises(ValueError, match="GiB"):
        writer(out, chunk=1 << 16, arrays={"a": Array((1000, 1000), "uint8")})
    with pytest.raises(ValueError, match="'index' is added"):
        writer(out, columns={"index": "int64"})
    with pytest.raises(ValueError, match="x is 'object'"):
        writer(out, columns={"x": "object"})
    with pytest.raises(ValueError, match="images: expected a whole number"):
        writer(out, images=0)
    with pytest.raises(TypeError, match="settings: expected JSON"):
        writer(out, settings={"model": object()})
    assert not out.exists()


def test_chunks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with writer(tmp_path / "run") as some:
        arrays, scores, errors = content(some.rows(1))
        refused: list[tuple[Any, Any, Any, str]] = [
            ({"gradcam": arrays["gradcam"]}, scores, errors, "expected gradcam, unicam/layer4"),
            ({**arrays, "gradcam": GRADCAM[:3]}, scores, errors, r"\[4, 3, 5\] float16, got \[3"),
            ({**arrays, "gradcam": GRADCAM[:4].astype("f4")}, scores, errors, "got .* float32"),
            (arrays, {}, errors, "expected the columns name"),
            (arrays, {**scores, "label": [1]}, errors, "label has 1 values for 4 images"),
            (arrays, {**scores, "label": ["a"] * 4}, errors, "label is no column of int64"),
            (arrays, {**scores, "label": np.ones(4)}, errors, "label is no column of int64"),
            (arrays, {**scores, "name": [1] * 4}, errors, "name is no column of string"),
            (arrays, scores, [{"index": 0, "path": "", "reason": ""}], "index 0 in chunk 1"),
            (arrays, scores, errors * 2, "at most once"),
            (arrays, scores, [{"index": 5}], "expected index, path and reason"),
            (arrays, scores, [{"index": 5, "path": None, "reason": ""}], "must be text"),
        ]
        for *given, match in refused:
            with pytest.raises(ValueError, match=match):
                some.write(1, *given)
        assert some.pending() == [0, 1, 2]
        write(some, 1)
        with pytest.raises(ValueError, match="1 is done already"):
            write(some, 1)
        with pytest.raises(ValueError, match="expected 0 to 2, got 3"):
            some.rows(3)
    assert temporaries(tmp_path / "run") == []


def test_tensors_and_arrays_are_scores(tmp_path: Path) -> None:
    torch = needs("torch")
    out = tmp_path / "run"
    columns = {"a": "int64", "b": "float32", "c": "bool"}
    with RunWriter(out, {}, images=2, chunk=2, arrays={}, columns=columns) as some:
        values = {
            "a": torch.tensor([1, 2], dtype=torch.int32),
            "b": np.array([0.5, np.nan]),
            "c": [True, None],
        }
        some.write(0, {}, values)
        some.finish()
    found = reader.open(out).scores.to_pydict()
    assert found["a"] == [1, 2]
    assert found["b"][0] == 0.5
    assert np.isnan(found["b"][1])
    assert found["c"] == [True, None]


# Going on


def test_a_lost_file_is_made_again(run: Path) -> None:
    before = tree(run)
    for name in ("maps/gradcam/c.1.0.0", "scores/00000002.parquet", "errors.jsonl"):
        (run / name).unlink()
    (run / "maps/unicam/layer4/c.1.0.0").write_bytes(b"cut")
    with writer(run) as some:
        assert some.pending() == [1, 2]
        assert reader.open(run).complete is False
        write(some, 2)
    with writer(run) as some:
        assert some.pending() == [1]
        write(some, 1)
        some.finish()
    assert tree(run) == before


def test_a_complete_run_is_left_alone(run: Path) -> None:
    times = {name: (run / name).stat().st_mtime_ns for name in tree(run)}
    with writer(run) as some:
        assert some.pending() == some.mine() == []
        assert some.finish() == chunks.Summary(run, IMAGES, 3, 2)
        with pytest.raises(ValueError, match="done already"):
            write(some, 0)
    assert {name: (run / name).stat().st_mtime_ns for name in tree(run)} == times


@pytest.mark.parametrize("complete_before", [True, False])
def test_damage_is_named_and_mended(run: Path, complete_before: bool) -> None:
    before = tree(run)
    if not complete_before:
        (run / "journal").mkdir()
        (run / "journal.jsonl").rename(run / "journal/0001-0000.jsonl")
    altered = bytearray((run / "maps/gradcam/c.0.0.0").read_bytes())
    altered[20] ^= 1
    (run / "maps/gradcam/c.0.0.0").write_bytes(altered)
    (run / "scores/00000001.parquet").unlink()
    (run / "maps/zarr.json").write_text("{}")
    problems = {problem.path: problem for problem in verify(run) if problem.path != "run.json"}
    assert set(problems) == {
        "maps/gradcam/c.0.0.0",
        "scores/00000001.parquet",
        "maps/zarr.json",
    }
    assert problems["maps/gradcam/c.0.0.0"].chunk == 0
    assert "altered" in str(problems["maps/gradcam/c.0.0.0"])
    assert problems["scores/00000001.parquet"][1:] == ("it is missing", 1)
    (run / "maps/gradcam/c.0.0.0").unlink()
    complete(run)
    assert tree(run) == before
    assert verify(run) == []


def test_what_a_killed_process_leaves(tmp_path: Path, run: Path) -> None:
    """A torn line, a chunk that no journal has, unfinished files of three kinds."""
    out = tmp_path / "other"
    with writer(out) as some:
        write(some, 0)
        write(some, 1)
    [log] = (out / "journal").iterdir()
    whole = log.read_bytes()
    log.write_bytes(whole[:-20])
    for name in ("maps/gradcam/.c.2.0.0.1-0.tmp", ".run.json.0-0.tmp", "scores/.x.3-12.tmp"):
        (out / name).write_bytes(b"half")
    (out / "maps/gradcam/c.2.0.0").write_bytes(b"not in the journal")
    assert reader.open(out).done == [0]
    with writer(out) as some:
        assert temporaries(out) == []
        assert some.pending() == [1, 2]
    complete(out)
    assert tree(out) == tree(run)


def test_the_later_line_counts(tmp_path: Path) -> None:
    """A chunk whose file was lost is done again, with another content perhaps."""
    out = tmp_path / "run"
    with writer(out) as some:
        write(some, 0)
        write(some, 1)
    (out / "maps/gradcam/c.0.0.0").unlink()
    with writer(out) as some:
        assert some.pending() == [0, 2]
        arrays, scores, errors = content(some.rows(0))
        some.write(0, {**arrays, "gradcam": arrays["gradcam"] * 0}, scores, errors)
        found = reader.open(out)
        assert (found.maps["gradcam"][:4] == 0).all()
        write(some, 2)
        some.finish()
    assert verify(out) == []
    assert (reader.open(out).maps["gradcam"][:4] == 0).all()


def test_a_damaged_line_is_done_again(tmp_path: Path, run: Path) -> None:
    out = tmp_path / "other"
    with writer(out) as some:
        for chunk in some.pending():
            write(some, chunk)
    [log] = (out / "journal").iterdir()
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(
        lines[0] + b'{"chunk": 1, "files": {"../../etc/passwd": [1, "x"]}}\n' + lines[2]
    )
    with pytest.raises(ValueError, match=r"0001-0000\.jsonl: line 2: chunk 1 names .*etc/passwd"):
        reader.open(out)
    assert any("line 2" in problem.what for problem in verify(out))
    with writer(out) as some:
        assert some.pending() == [1]
    complete(out)
    assert tree(out) == tree(run)


# Reading


def test_maps_index_like_an_array(run: Path) -> None:
    found = reader.open(run)
    mask = np.arange(IMAGES) % 3 == 1
    for name, values in stored().items():
        maps = found.maps[name]
        assert maps.shape == values.shape
        assert (maps.dtype, maps.ndim, len(maps)) == (values.dtype, values.ndim, IMAGES)
        keys: list[Any] = [
            0,
            -1,
            np.int64(7),
            slice(None),
            slice(2, 9),
            slice(-3, None, -2),
            slice(5, 5),
            [],
            [10, 0, 0, -11, 4],
            np.array([3, 8], np.uint8),
            mask,
            list(map(bool, mask)),
            ...,
            (),
            (4, 1),
            (slice(3, 8), 0, slice(1, 2)),
            ([9, 1], slice(None), -1),
            (..., 0),
        ]
        for key in keys:
            np.testing.assert_array_equal(maps[key], values[key], err_msg=str(key))
        np.testing.assert_array_equal(np.asarray(maps), values)
        np.testing.assert_array_equal(np.stack(list(maps)), values)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(maps))[3], values[3])
        for beyond in (IMAGES, -IMAGES - 1, [0, IMAGES], np.array([2**64 - 1], np.uint64)):
            with pytest.raises(IndexError, match="of 11 images"):
                maps[beyond]
        with pytest.raises(IndexError, match="a mask of 3"):
            maps[[True, False, True]]
        for odd in ("a", 1.5, [0.5], None, [[1]]):
            with pytest.raises(TypeError, match="index: expected"):
                maps[odd]


def test_a_run_indexes_like_an_array(run: Path) -> None:
    found = fastxkd.runs.open(run)
    assert len(found) == IMAGES
    assert found.complete
    assert found.settings == {"model": "cnn-small", "size": [3, 5], "seed": 0}
    image = found[-1]
    assert image.index == 10
    assert image.error == FAILED[10]
    assert np.isnan(image.maps["gradcam"]).all()
    assert found[3].error is None
    assert found[3].scores == {
        "index": 3,
        "name": "images/3.png",
        "label": 0,
        "confidence": pytest.approx(CONFIDENCE[3]),
        "right": False,
    }
    some = found[[7, 0, 5]]
    assert some.indices.tolist() == [7, 0, 5]
    assert some.scores["index"].to_pylist() == [7, 0, 5]
    assert some.errors == {5: FAILED[5]}
    np.testing.assert_array_equal(some.maps["unicam/layer4"][:2], UNICAM[[7, 0]])
    assert len(found[4:4].scores) == 0
    assert [image.index for image in found] == list(range(IMAGES))
    assert found.scores["name"].to_pylist() == [f"images/{i}.png" for i in range(IMAGES)]
    assert [error["index"] for error in found.errors] == sorted(FAILED)
    assert pickle.loads(pickle.dumps(found))[6].scores["name"] == "images/6.png"
    assert "11 images" in repr(found)


def test_what_is_not_done_is_not_read(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with writer(out) as some:
        write(some, 1)
        found = reader.open(out)
    assert not found.complete
    assert found.done == [1]
    assert found.scores["index"].to_pylist() == [4, 5, 6, 7]
    np.testing.assert_array_equal(found.maps["gradcam"][4:5], GRADCAM[4:5])
    for key in (0, slice(3, 6), slice(None), slice(None, None, -1)):
        with pytest.raises(ValueError, match="are not done yet, 1 of 3 are"):
            found.maps["gradcam"][key]
    with pytest.raises(ValueError, match="not done yet"):
        found[8]


def test_reading_is_lazy(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image of a run costs one block, and reading on in order unpacks each block once."""
    unpacked: list[int] = []
    real = layout.unpack
    monkeypatch.setattr(
        reader, "unpack", lambda data, *more: unpacked.append(len(data)) or real(data, *more)
    )
    for name in ("c.0.0.0", "c.2.0.0"):
        (run / "maps/gradcam" / name).unlink()
    found = reader.open(run)
    maps = found.maps["gradcam"]
    assert not unpacked
    for image in range(4, 8):
        maps[image]
    assert len(unpacked) == 1
    with pytest.raises(ValueError, match=r"c\.0\.0\.0: it is damaged or missing"):
        maps[0]


# Hostile directories


def _edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value)))


_RUN_EDITS: list[dict[str, Any]] = [
    {"images": -1},
    {"images": 10**30},
    {"images": True},
    {"images": "11"},
    {"images": 1.5},
    {"chunk": 0},
    {"chunk": 2**40},
    {"arrays": {"../../x": {"shape": [1], "dtype": "uint8"}}},
    {"arrays": {"/etc": {"shape": [1], "dtype": "uint8"}}},
    {"arrays": {"a": {"shape": [2**31, 2**31], "dtype": "uint8"}}},
    {"arrays": {"a": {"shape": [1] * 100, "dtype": "uint8"}}},
    {"arrays": {"a": {"shape": ["x"], "dtype": "uint8"}}},
    {"arrays": {"a": {"shape": [1], "dtype": "object"}}},
    {"arrays": {"a": {"shape": [1], "dtype": ["O"]}}},
    {"arrays": {f"a{i}": {"shape": [1], "dtype": "uint8"} for i in range(2000)}},
    {"arrays": [1]},
    {"arrays": None},
    {"columns": {"x": "pickle"}},
    {"columns": {"x": {}}},
    {"columns": ["x"]},
    {"format": 2},
    {"settings": []},
    {"facts": None},
]


@pytest.mark.parametrize("edit", _RUN_EDITS, ids=lambda edit: json.dumps(edit)[:40])
def test_an_edited_run_file(run: Path, edit: dict[str, Any]) -> None:
    _edit(run / "run.json", lambda content: {**content, **edit})
    for use in (reader.open, verify, writer):
        with pytest.raises(ValueError, match=r"run\.json: "):
            use(run)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff\xfe", b"1" * 10_000, b"\0" * 100],
    ids=lambda text: repr(text[:8]),
)
def test_a_run_file_that_is_none(run: Path, text: bytes) -> None:
    (run / "run.json").write_bytes(text)
    for use in (reader.open, verify, writer):
        with pytest.raises(ValueError, match=r"run\.json: "):
            use(run)


def test_no_run_at_all(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        for use in (reader.open, verify):
            with pytest.raises(ValueError, match=r"path: .* is no"):
                use(path)


@pytest.mark.parametrize(
    "line",
    [
        {"chunk": 9},
        {"chunk": True},
        {"files": {}},
        {"files": None},
        {"files": {"../x": [1, "0" * 64]}},
        {"errors": None},
        {"errors": [{"index": 0}]},
        {"errors": [{"index": 10**9, "path": "", "reason": ""}]},
        {"errors": [7]},
    ],
    ids=json.dumps,
)
def test_an_edited_journal(run: Path, line: dict[str, Any]) -> None:
    path = run / "journal.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], json.dumps({**json.loads(lines[1]), **line}), *lines[2:]]))
    with pytest.raises(ValueError, match=r"journal\.jsonl: line 2: "):
        reader.open(run)
    assert any("line 2 of journal.jsonl" in problem.what for problem in verify(run))


def test_edited_stamps(run: Path) -> None:
    path = run / "journal.jsonl"
    for stamp in (
        [1],
        [-1, "0" * 64],
        [1, "x" * 64],
        [True, "0" * 64],
        "x",
        None,
        [2**80, "0" * 64],
    ):
        lines = path.read_text().splitlines(keepends=True)
        entry = json.loads(lines[0])
        entry["files"]["scores/00000000.parquet"] = stamp
        path.write_text(json.dumps(entry) + "\n" + "".join(lines[1:]))
        with pytest.raises(ValueError, match=r"line 1: expected \[size, sha256\]"):
            reader.open(run)
        path.write_text("".join(lines))


def test_a_journal_that_lies_about_its_end(run: Path) -> None:
    path = run / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="its last line is missing"):
        reader.open(run)
    path.write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match="it has 2 of 3 chunks"):
        reader.open(run)
    assert [p.what for p in verify(run) if "no line" in p.what] == ["chunks 0 have no line"]
    path.write_text("".join(lines[:-1]) + lines[-1].replace('"failed":2', '"failed":1'))
    with pytest.raises(ValueError, match="2 failed images, and says 1"):
        reader.open(run)
    assert [str(p) for p in verify(run)] == ["journal.jsonl: it has 2 failed images, and says 1"]


def test_every_file_cut_short_or_altered(run: Path) -> None:
    """At every length and with a bit changed anywhere: what was written, or a ValueError."""
    values, names = stored(), [f"images/{i}.png" for i in range(IMAGES)]
    random = np.random.RandomState(0)
    for name in sorted(tree(run)):
        path, data = run / name, (run / name).read_bytes()
        lengths = random.randint(0, len(data), 5) if data else []
        places = random.randint(0, 8 * len(data), 14) if data else []
        changed = [data[:length] for length in lengths] + [_flipped(data, at) for at in places]
        for altered in changed:
            path.write_bytes(altered)
            try:
                found = reader.open(run)
                maps = {key: found.maps[key][:] for key in found.maps}
                read = found.scores["name"].to_pylist()
            except ValueError as raised:
                error: str | None = str(raised)
            else:
                error = None
            assert error is None or str(run) in error, name
            if error is None and name not in ("run.json", "journal.jsonl"):
                assert read == names, name
                for key in values:
                    np.testing.assert_array_equal(maps[key], values[key], err_msg=name)
            if name != "run.json":
                assert verify(run), (name, altered)
        path.write_bytes(data)


def _flipped(data: bytes, bit: int) -> bytes:
    content = bytearray(data)
    content[bit // 8] ^= 1 << bit % 8
    return bytes(content)


def test_files_that_are_none(tmp_path: Path, run: Path) -> None:
    """Links, pipes and folders in the place of files: no reading elsewhere, no waiting for ever."""
    secret = tmp_path / "secret"
    secret.write_bytes((run / "maps/gradcam/c.0.0.0").read_bytes())
    places: list[tuple[str, Callable[[], object]]] = [
        ("maps/gradcam/c.0.0.0", lambda: reader.open(run).maps["gradcam"][0]),
        ("scores/00000000.parquet", lambda: reader.open(run).scores),
        ("journal.jsonl", lambda: reader.open(run)),
        ("run.json", lambda: reader.open(run)),
    ]
    for name, use in places:
        path = run / name
        data = path.read_bytes()
        kinds: list[Callable[[Path], object]] = [
            lambda path: os.symlink(secret, path),
            lambda path: os.symlink("/dev/zero", path),
            lambda path: os.symlink(path.name, path),
            os.mkfifo,
            os.mkdir,
        ]
        for make in kinds:
            path.unlink()
            make(path)
            with pytest.raises(ValueError, match=path.name):
                use()
            if name != "run.json":
                assert any(path.name in str(problem) for problem in verify(run))
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            path.write_bytes(data)
    assert verify(run) == []


def _repack(run: Path, block: bytes, offset: int | None = None, size: int | None = None) -> None:
    """A file of a chunk of gradcam with this block, and a journal that says that it is right."""
    place = np.array([0 if offset is None else offset, len(block) if size is None else size], "<u8")
    _replace(run, "maps/gradcam/c.0.0.0", block + place.tobytes())


def _replace(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    lines = (run / "journal.jsonl").read_text().splitlines()
    entry = json.loads(lines[0])
    entry["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
    (run / "journal.jsonl").write_text("\n".join([json.dumps(entry), *lines[1:]]) + "\n")


def test_blocks_that_are_bombs(run: Path) -> None:
    zstd = needs("numcodecs.zstd")
    wanted = CHUNK * 3 * 5 * 2
    bomb = zstd.compress(bytes(1 << 28), 1, True)
    fits = zstd.compress(bytes(wanted), 1, True)
    half = zstd.compress(bytes(wanted // 2), 1, True)
    claims = bytearray(fits)
    assert claims[4] & 0xE0 == 0x20, "one byte of content size"
    for block in (
        bomb,
        half,
        half + half,
        fits + bomb,
        fits + fits,
        fits[:-1],
        fits[:5] + b"\xff" + fits[6:],
        b"",
        b"\x28\xb5\x2f\xfd",
        b"\x28\xb5\x2f\xfd\xff" + b"\xff" * 30,
        b"(\xb5/\xfd\x00Xa\x00\x00Hello World!",
        b"\x50\x2a\x4d\x18\xff\xff\xff\xff" + fits,
        fits + b"\0" * 4000,
    ):
        _repack(run, block)
        with pytest.raises(ValueError, match=r"c\.0\.0\.0: it is damaged"):
            reader.open(run).maps["gradcam"][0]
    for offset, size in ((0, 2**64 - 1), (2**64 - 1, 2**64 - 1), (2**63, 4), (1, len(fits))):
        _repack(run, fits, offset, size)
        with pytest.raises(ValueError, match=r"c\.0\.0\.0: it is damaged"):
            reader.open(run).maps["gradcam"][0]
    _repack(run, fits)
    assert (reader.open(run).maps["gradcam"][:4] == 0).all()


def test_scores_of_another_kind(run: Path) -> None:
    arrow, parquet = needs("pyarrow"), needs("pyarrow.parquet")
    table = parquet.read_table(run / "scores/00000000.parquet")
    others = [
        table.slice(1),
        table.drop_columns(["label"]),
        table.set_column(0, "index", arrow.array([0, 1, 2, 4])),
        table.set_column(2, "label", arrow.array(["a"] * 4)),
        parquet.read_table(run / "scores/00000001.parquet"),
    ]
    for other in others:
        sink = arrow.BufferOutputStream()
        parquet.write_table(other, sink)
        _replace(run, "scores/00000000.parquet", sink.getvalue().to_pybytes())
        with pytest.raises(ValueError, match=r"00000000\.parquet: it is damaged .*expected"):
            reader.open(run)[0]
    for junk in (b"", b"PAR1" * 10, b"PAR1" + b"\xff" * 100 + b"PAR1"):
        _replace(run, "scores/00000000.parquet", junk)
        with pytest.raises(ValueError, match=r"00000000\.parquet: it is damaged"):
            reader.open(run)[0]


def test_a_run_that_claims_to_be_endless(tmp_path: Path) -> None:
    """Nothing is allocated, and nothing counted through, for images that are not there."""
    out = tmp_path / "run"
    with writer(out) as some:
        write(some, 0)
    _edit(out / "run.json", lambda content: {**content, "images": 10**11, "chunk": 4})
    found = reader.open(out)
    assert len(found) == 10**11
    with pytest.raises(ValueError, match="chunks 1-24999999999 of"):
        found.maps["gradcam"][:]
    with pytest.raises(ValueError, match="not done yet"):
        found[:]
    assert "chunks 1-24999999999 are not done" in str(verify(out)[-1])
    assert len(found.scores) == 4


def test_strangers_in_a_complete_run(run: Path) -> None:
    (run / "maps/gradcam/c.7.0.0").write_bytes(b"x")
    (run / "maps/gradcam/notes").write_bytes(b"x")
    (run / "scores/00000000.parquet.bak").write_bytes(b"x")
    (run / "scores/.x.1-0.tmp").write_bytes(b"x")
    (run / "report.html").write_bytes(b"ours")
    assert sorted(problem.path for problem in verify(run)) == [
        "maps/gradcam/c.7.0.0",
        "maps/gradcam/notes",
        "scores/.x.1-0.tmp",
        "scores/00000000.parquet.bak",
    ]


# Other formats


def test_export_to_one_archive(tmp_path: Path, run: Path) -> None:
    assert fastxkd.runs.export(run, tmp_path / "all.npz") == 1
    with np.load(tmp_path / "all.npz", allow_pickle=False) as found:
        assert sorted(found) == [
            "failed",
            "maps/gradcam",
            "maps/unicam/layer4",
            "scores/confidence",
            "scores/index",
            "scores/label",
            "scores/name",
            "scores/right",
        ]
        for name, values in stored().items():
            np.testing.assert_array_equal(found[f"maps/{name}"], values)
        labels = [np.nan if i in FAILED else i % 3 for i in range(IMAGES)]
        np.testing.assert_array_equal(found["scores/label"], labels)
        assert found["scores/right"].dtype == bool
        assert found["scores/name"].tolist() == [f"images/{i}.png" for i in range(IMAGES)]
        assert np.flatnonzero(found["failed"]).tolist() == sorted(FAILED)
    first = (tmp_path / "all.npz").read_bytes()
    with pytest.raises(ValueError, match="is there already"):
        fastxkd.runs.export(run, tmp_path / "all.npz")
    fastxkd.runs.export(run, tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == first


def test_export_to_parts(tmp_path: Path, run: Path) -> None:
    seen: list[tuple[int, int]] = []
    count = fastxkd.runs.export(
        run,
        tmp_path / "parts",
        maps=["gradcam"],
        rows=slice(1, None),
        per_file=4,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert count == 3
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert sorted(tree(tmp_path / "parts")) == [f"part-0000{i}.npz" for i in range(3)]
    values = []
    for path in sorted((tmp_path / "parts").iterdir()):
        with np.load(path, allow_pickle=False) as found:
            assert "maps/unicam/layer4" not in found
            values.append(found["maps/gradcam"])
    np.testing.assert_array_equal(np.concatenate(values), stored()["gradcam"][1:])
    assert fastxkd.runs.export(run, tmp_path / "one") == 1


def test_export_to_pictures(tmp_path: Path, run: Path) -> None:
    image_module = needs("PIL.Image")
    out = tmp_path / "pictures"
    assert fastxkd.runs.export(run, out, "png", maps=["gradcam"], size=(6, 10)) == 9
    assert sorted(tree(out)) == [f"{i:08d}-{i}.png" for i in range(IMAGES) if i not in FAILED]
    with image_module.open(out / "00000003-3.png") as picture:
        shown = np.asarray(picture)
    heat = render.resize(GRADCAM[3].astype(np.float32), (6, 10))
    wanted = render.colors()[np.rint(heat * 255).astype(np.uint8)]
    np.testing.assert_array_equal(shown, wanted)
    images = np.random.RandomState(1).randint(0, 256, (IMAGES, 12, 20, 3)).astype(np.uint8)
    over = tmp_path / "over"
    count = fastxkd.runs.export(run, over, "png", images=images, rows=[3, 5], opacity=0.5)
    assert count == 2
    with image_module.open(over / "unicam/layer4/00000003-3.png") as picture:
        shown = np.asarray(picture)
    heat = UNICAM[3].astype(np.float32) / 255
    np.testing.assert_array_equal(shown, render.overlay(images[3], heat, opacity=0.5))
    with pytest.raises(ValueError, match="is not empty"):
        fastxkd.runs.export(run, over, "png", images=images)


def test_pictures_stay_in_their_folder(tmp_path: Path) -> None:
    needs("PIL.Image")
    names = [
        "../../../etc/passwd",
        "/etc/hosts",
        "..",
        "a\\..\\b.png",
        "x" * 5000,
        "<script>.png",
        "nul\0byte",
        None,
        "",
        "same.png",
        "SAME.jpg",
    ]
    out = tmp_path / "run"
    arrays = {"gradcam": Array((2, 2), "float32")}
    columns = {"name": "string"}
    images = len(names)
    with RunWriter(out, {}, images=images, chunk=4, arrays=arrays, columns=columns) as some:
        for chunk in some.pending():
            rows = some.rows(chunk)
            maps = np.full((len(rows), 2, 2), 0.5, np.float32)
            some.write(chunk, {"gradcam": maps}, {"name": names[rows.start : rows.stop]})
        some.finish()
    before = set(tree(tmp_path))
    assert fastxkd.runs.export(out, tmp_path / "pictures", "png") == images
    found = sorted(path.removeprefix("pictures/") for path in set(tree(tmp_path)) - before)
    assert found == [
        "00000000-passwd.png",
        "00000001-hosts.png",
        "00000002.png",
        "00000003-b.png",
        f"00000004-{'x' * 80}.png",
        "00000005-script.png",
        "00000006-nul_byte.png",
        "00000007.png",
        "00000008.png",
        "00000009-same.png",
        "00000010-SAME.png",
    ]


def test_exports_that_do_not_fit(tmp_path: Path, run: Path) -> None:
    out = tmp_path / "out"
    refused: list[tuple[dict[str, Any], str]] = [
        ({"maps": ["x"]}, "maps: expected some of gradcam, unicam/layer4, got x"),
        ({"format": "gif"}, "expected 'npz' or 'png', got 'gif'"),
        ({"per_file": 0}, "per_file: expected at least 1"),
        ({"format": "png", "names": "x"}, "names: expected one of"),
        ({"format": "png", "size": (0, 1)}, "size: expected"),
        ({"format": "png", "size": (1, 1), "images": [1]}, "size: with images"),
        ({"format": "png", "colormap": "jet"}, "colormap"),
    ]
    for options, match in refused:
        with pytest.raises(ValueError, match=match):
            fastxkd.runs.export(run, out, **options)
    assert not out.exists()
    with pytest.raises(ValueError, match=r"per_file: one\.npz is one file"):
        fastxkd.runs.export(run, tmp_path / "one.npz", per_file=3)


def test_maps_that_are_no_pictures(tmp_path: Path) -> None:
    needs("PIL.Image")
    for shape, value, match in (((2, 2), 7.0, "goes from 7 to 7"), ((2,), 0.5, r"has \[2\]")):
        out = tmp_path / f"{len(shape)}"
        arrays = {"gradcam": Array(shape, "float32")}
        with RunWriter(out, {}, images=1, chunk=1, arrays=arrays, columns={}) as some:
            some.write(0, {"gradcam": np.full((1, *shape), value, np.float32)}, {})
            some.finish()
        with pytest.raises(ValueError, match=match):
            fastxkd.runs.export(out, tmp_path / f"{len(shape)}.pictures", "png")
