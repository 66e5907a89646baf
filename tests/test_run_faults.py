"""What is left of a run when the disk fails, or the process is killed, at every possible moment."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path

import numpy as np
import pytest

from fastxkd.runs import reader, verify
from fastxkd.runs.chunks import RunWriter
from tests.conftest import needs
from tests.faulty_files import COUNTED, KINDS, FaultyFiles, Killed
from tests.runs_on_disk import complete, content, stored, temporaries, tree, write, writer


@pytest.fixture(scope="module", autouse=True)
def _needed() -> None:
    needs("pyarrow")
    needs("numcodecs")


@pytest.fixture(scope="module")
def undisturbed(_needed: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    complete(out)
    return tree(out)


def _what_is_done_is_intact(out: Path) -> None:
    """Every chunk that a reader takes for done has the right maps and scores."""
    if not (out / "run.json").exists():
        return
    run = reader.open(out)
    for chunk in run.done:
        rows = run.layout.rows(chunk)
        found = run[rows.start : rows.stop]
        for name, values in stored().items():
            np.testing.assert_array_equal(found.maps[name], values[rows.start : rows.stop])
        assert found.scores["name"].to_pylist() == content(rows)[1]["name"]
    assert not [problem for problem in verify(out) if problem.chunk is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_every_call_fails_once(tmp_path: Path, kind: str, undisturbed: dict[str, bytes]) -> None:
    fired, at = True, 0
    seen: set[str] = set()
    while fired:
        at += 1
        out = tmp_path / f"{at}"
        with FaultyFiles(out, kind, at) as files:
            try:
                complete(out)
                error = None
            except (OSError, Killed) as raised:
                error = raised
        fired = files.fired
        if fired:
            call = files.calls[at - 1]
            seen.add(call.partition(" ")[0])
            if kind.startswith("killed"):
                assert isinstance(error, Killed), call
            else:
                assert isinstance(error, OSError), call
                _is_clear(error, out, call)
            if kind in ("EIO", "torn") and not call.startswith("unlink"):
                assert temporaries(out) == [], call
        _what_is_done_is_intact(out)
        with FaultyFiles(out):
            summary = complete(out)
        assert tree(out) == undisturbed, f"{kind} at call {at}"
        assert (summary.images, summary.chunks, summary.failed) == (11, 3, 2)
    assert seen == set(COUNTED)
    assert at > 100


def _is_clear(error: OSError, out: Path, call: str) -> None:
    """The error names the file and says what to do."""
    assert error.errno in (errno.EIO, errno.ENOSPC), call
    assert isinstance(error.filename, str), call
    assert Path(error.filename) == out or out in Path(error.filename).parents, call
    assert "run the same command again" in str(error), call


def test_short_writes(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    with FaultyFiles(tmp_path / "run", "brief"):
        complete(tmp_path / "run")
    assert tree(tmp_path / "run") == undisturbed


def test_the_same_writer_goes_on(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """Whoever makes room need not start again: the call may be repeated."""
    out = tmp_path / "run"
    with FaultyFiles(out):
        some = writer(out)
        write(some, 0)
    with FaultyFiles(out) as files:
        write(some, 1)
    calls = len(files.calls)
    for at in range(1, calls + 1):
        with FaultyFiles(out, "torn", at), pytest.raises(OSError, match="make room"):
            write(some, 2)
        assert some.pending() == [2]
        assert reader.open(out).done == [0, 1]
    with FaultyFiles(out):
        write(some, 2)
        some.finish()
        some.close()
    assert tree(out) == undisturbed


def test_a_torn_journal_that_cannot_be_mended(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "run"
    with FaultyFiles(out) as files:
        some = writer(out)
        write(some, 0)
        count = len(files.calls)
        write(some, 1)
    per_chunk = len(files.calls) - count
    with FaultyFiles(out, "torn", per_chunk - 1) as files:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.ftruncate", _refuse)
            with pytest.raises(OSError, match=r"0001-0000\.jsonl"):
                write(some, 2)
        assert files.calls[per_chunk - 2].startswith("write journal/")
    with FaultyFiles(out), pytest.raises(OSError, match="cut short"):
        write(some, 2)
    some.close()
    assert reader.open(out).done == [0, 1]
    complete(out)
    assert tree(out) == undisturbed


def _refuse(file: int, size: int) -> None:
    raise OSError(errno.EIO, "no")


def test_killed_twice(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """A second start that dies, too, at every moment: also of the tidying up that it does."""
    fired, at = True, 0
    while fired:
        at += 3
        out = tmp_path / f"{at}"
        with FaultyFiles(out, "killed", 60), pytest.raises(Killed):
            complete(out)
        with FaultyFiles(out, "killed", at) as files, contextlib.suppress(Killed):
            complete(out)
        fired = files.fired
        _what_is_done_is_intact(out)
        with FaultyFiles(out):
            complete(out)
        assert tree(out) == undisturbed, at


def test_killed_while_a_lost_file_is_made_again(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    fired, at = True, 0
    while fired:
        at += 2
        out = tmp_path / f"{at}"
        with FaultyFiles(out):
            complete(out)
        (out / "maps/gradcam/c.1.0.0").unlink()
        with FaultyFiles(out, "killed", at) as files, contextlib.suppress(Killed):
            complete(out)
        fired = files.fired
        with FaultyFiles(out):
            complete(out)
        assert tree(out) == undisturbed, at
    assert at > 20


def test_chunks_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill at every moment, no chunk that a journal has is written again."""
    written: list[int] = []
    real = RunWriter.write

    def counted(self: RunWriter, chunk: int, *args: object) -> None:
        real(self, chunk, *args)  # type: ignore[arg-type]
        written.append(chunk)

    monkeypatch.setattr(RunWriter, "write", counted)
    fired, at = True, 0
    while fired:
        at += 5
        out = tmp_path / f"{at}"
        written.clear()
        with FaultyFiles(out, "killed", at) as files, contextlib.suppress(Killed):
            complete(out)
        fired = files.fired
        with FaultyFiles(out):
            complete(out)
        # One line may be on the disk although write() did not return.
        assert sorted(written) in ([0, 1, 2], [0, 1], [0, 2], [1, 2]), at
        assert len(set(written)) == len(written)
