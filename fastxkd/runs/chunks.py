"""Writing a run over a data set: chunks that are whole or absent, each done exactly once.

A run directory:

    run.json        settings, sizes, arrays and columns; facts of the machine that began it
    maps/           a Zarr v3 group, one array per method (and layer), one file per chunk of images
    scores/         one Parquet file per chunk, one row per image
    journal/        while the run goes on: what is finished, one file per start and rank
    journal.jsonl   instead of it when every chunk is there: the mark of a complete run
    errors.jsonl    then, too: {"index", "path", "reason"} of every image that failed, by index
    .lock           held by the ranks that write now

A chunk is a range of images. Its files are written under temporary names, synced and renamed, their
folders synced, and only then does a line of the journal say that the chunk is done, with the size
and SHA-256 of each file. Whatever a killed process leaves behind is either in the journal or will
be done again. In a complete run no byte of maps, scores, errors and journal depends on the time,
the host, the number of ranks, or how often it was started.
"""

from __future__ import annotations

import json
import operator
import os
import stat
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

import fastxkd
from fastxkd.runs import journal
from fastxkd.runs.durable import (
    Lock,
    Log,
    explained,
    make_folders,
    put,
    read_regular,
    remove,
    sync_folder,
)
from fastxkd.runs.journal import End, Entry, Failure
from fastxkd.runs.layout import (
    ERRORS,
    FILL,
    FORMAT,
    JOURNAL,
    LOCK,
    OURS,
    RUN,
    RUN_BYTES,
    STARTS,
    UNFINISHED,
    Array,
    Layout,
    gaps,
    pack,
    parse_run,
)
from fastxkd.runs.store import refuse_strangers
from fastxkd.runs.tables import to_parquet, to_table
from fastxkd.train.checkpoint import check_settings

__all__ = ["Array", "RunWriter", "Summary"]

# A killed process may need a moment to be gone, on other machines a longer one; and rank 0, to look
# through a large directory. Network disks may show what another machine wrote a minute late.
_UNTIL_GONE, _UNTIL_ALL_GONE, _UNTIL_CLAIMED, _UNTIL_SEEN = 3.0, 30.0, 60.0, 60.0
_REASON = 1000


class Summary(NamedTuple):
    """What lies in a complete run."""

    out: Path
    images: int
    chunks: int
    failed: int


class RunWriter:
    """The one writer of a run directory, or one rank of it.

    Args:
        out: the directory; new, empty, or a run with the same settings to continue.
        settings: what must be equal for two runs to see the same numbers (JSON values).
        images: length of the data set.
        chunk: images per chunk; the last chunk may have fewer.
        arrays: name -> :class:`Array`. A name may have folders in it: ``gradcam/layer4``.
        columns: name -> "string", "int64", "float32", "float64" or "bool": the columns of the
            scores. A first column ``index`` is added.
        facts: what else ``run.json`` records (versions, command, machine); not compared, and
            kept from the first start.
        rank, ranks: of the processes that share the run. Rank 0 claims the directory; the others
            wait for it, up to a minute.
        token: the same for the ranks of one start, another one at every start (a restart by
            torchrun is a start): draw it on rank 0 and broadcast it. ``None`` with one rank.

    Raises:
        ValueError: ``out`` holds something else, a run with other settings, or another process
            writes in it; or rank 0 with this token never came.
        OSError: the disk refused; the text names the file and what to do.

    A writer is for one thread at a time. A chunk in the journal whose files are gone, or have
    another size, is pending again.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        settings: Mapping[str, Any],
        *,
        images: int,
        chunk: int,
        arrays: Mapping[str, Array],
        columns: Mapping[str, str],
        facts: Mapping[str, Any] | None = None,
        rank: int = 0,
        ranks: int = 1,
        token: str | None = None,
    ) -> None:
        if not 0 <= rank < ranks:
            raise ValueError(f"rank: expected 0 to ranks - 1 = {ranks - 1}, got {rank}")
        if ranks > 1 and not token:
            raise ValueError(f"token: {ranks} ranks need one, the same for all of this start")
        self.out = Path(out)
        self.rank, self.ranks, self.token = rank, ranks, token or uuid.uuid4().hex
        wanted = {name: Array(tuple(array.shape), array.dtype) for name, array in arrays.items()}
        self.layout = Layout(images, chunk, wanted, dict(columns))
        self._settings = _as_json("settings", settings)
        self._facts = _as_json("facts", facts or {})
        self._summary: Summary | None = None
        self._log: Log | None = None
        self._again: set[int] = set()
        self._lock = Lock(self.out / LOCK)
        try:
            self._start = self._claim() if rank == 0 else self._join()
            done = self._done_before()
        except BaseException:
            self._lock.release()
            raise
        self._snapshot = [chunk for chunk in range(self.layout.chunks) if chunk not in done]
        self._left = set(self._snapshot)

    def pending(self) -> list[int]:
        """Chunks that nobody had finished when this start began, less those written here since.

        Before the first ``write`` it is the same list on every rank, whenever it is asked.
        """
        return sorted(self._left)

    def mine(self) -> list[int]:
        """The part of ``pending()`` that falls to this rank: every ``ranks``-th of the list.

        Together the ranks of one start have every pending chunk, and none has another's.
        """
        return [chunk for chunk in self._snapshot[self.rank :: self.ranks] if chunk in self._left]

    def rows(self, chunk: int) -> range:
        """The images of a chunk."""
        return self.layout.rows(chunk)

    def write(
        self,
        chunk: int,
        arrays: Mapping[str, np.ndarray[Any, Any]],
        scores: Mapping[str, Any],
        errors: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Put a chunk on the disk; when this returns it survives a power cut.

        Args:
            arrays: name -> [rows, *shape] for every array of the run. Rows of failed images are
                replaced by NaN (uint8: 0), whatever is in them.
            scores: column -> one value per row (array, list or tensor; ``None`` is a null) for
                every column of the run.
            errors: {"index": image, "path": its name, "reason": why} of the failed images. A
                reason is cut after 1,000 characters.

        Raises:
            ValueError: a name, shape, dtype, length or index that does not fit, or a chunk that
                is done.
            OSError: nothing of this chunk counts, no temporary is left, all others are intact;
                the call may be repeated, and so may the run.
        """
        chunk = operator.index(chunk)
        rows = self.rows(chunk)
        if chunk not in self._left:
            raise ValueError(f"chunk: {chunk} is done already")
        failures = [
            replace(failure, reason=failure.reason[:_REASON])
            for failure in journal.parse_errors(self.layout, chunk, list(errors))
        ]
        if set(arrays) != set(self.layout.arrays):
            raise ValueError(
                f"arrays: expected {', '.join(self.layout.arrays)}, got {', '.join(arrays)}"
            )
        values = {
            name: self._values(name, np.asarray(arrays[name]), rows, failures)
            for name in self.layout.arrays
        }
        table = to_parquet(to_table(self.layout, chunk, scores))
        mark, stamps = self._mark(), {}
        for name, array in self.layout.arrays.items():
            block = self.layout.block(name)
            pieces = pack(values[name], array, block, self.layout.chunk // block)
            path = self.layout.map_file(name, chunk)
            stamps[path] = put(self.out / path, pieces, mark)
        path = self.layout.score_file(chunk)
        stamps[path] = put(self.out / path, table, mark)
        if self._log is None:
            make_folders(self.out / STARTS)
            self._log = Log(self.out / STARTS / f"{self._start:04d}-{self.rank:04d}.jsonl")
        self._log.add(journal.entry_line(Entry(chunk, stamps, failures)))
        self._left.remove(chunk)

    def finish(self) -> Summary:
        """Mark the run complete: on rank 0, when every rank has written its last chunk.

        Raises:
            ValueError: chunks are missing (named), or this is not rank 0.
            OSError: the disk refused; call again or start again.
        """
        if self.rank:
            raise ValueError(f"rank: only rank 0 can finish a run, this is {self.rank}")
        if self._summary is None:
            self._summary = self._complete(self._places())
        self._clear_starts()
        remove(self._lock.path)
        self._left.clear()
        return self._summary

    def close(self) -> None:
        """Let go of the directory. A run that is not finished can be continued."""
        if self._log is not None:
            self._log.close()
        self._log = None
        self._left.clear()
        self._lock.release()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _claim(self) -> int:
        """Take the directory for this start; returns the number of the start."""
        self._inspect()
        make_folders(self.out)
        self._lock.take(_UNTIL_GONE if self.ranks == 1 else _UNTIL_ALL_GONE)
        # What was seen without the lock may be old.
        if not self._inspect():
            content = {
                "format": FORMAT,
                "fastxkd": fastxkd.__version__,
                "settings": self._settings,
                **self.layout.to_json(),
                "facts": self._facts,
            }
            put(self.out / RUN, json.dumps(content, indent=2).encode() + b"\n", "0-0")
        self._sweep()
        for folder in self.layout.folders():
            make_folders(self.out / folder)
        for path, document in self.layout.documents().items():
            if not _holds(self.out / path, document):
                put(self.out / path, document, "0-0")
        start = self._survey()
        self._lock.share(
            {
                "token": self.token,
                "process": os.getpid(),
                "host": os.uname().nodename,
                "start": start,
                "again": sorted(self._again),
            }
        )
        return start

    def _join(self) -> int:
        words = self._lock.join(self.token, _UNTIL_CLAIMED)
        if not self._inspect():
            raise ValueError(f"out: {self.out} is no run, though rank 0 claimed it")
        self._again = set(words["again"])
        if os.path.lexists(self.out / JOURNAL):
            self._summary = self._look_at_complete()
        return int(words["start"])

    def _done_before(self) -> set[int]:
        """What the starts before this one did, and what is still there of it."""
        if self._summary is not None:
            return set(range(self.layout.chunks))
        lines = journal.read(self.out, self.layout, damaged=[])
        return {
            entry.chunk
            for place, entry in lines
            if isinstance(entry, Entry) and place.start < self._start
        } - self._again

    def _inspect(self) -> bool:
        """Whether ``out`` is a run with these settings; raises if it is anything else but empty."""
        mark = self.out / RUN
        known = os.path.lexists(mark)
        refuse_strangers(self.out, OURS if known else (LOCK,))
        inside = {Path(name) for name in (*OURS, *self.layout.folders())}
        inside |= {parent for path in inside for parent in path.parents if parent != Path()}
        for path in sorted(inside):
            if (self.out / path).is_symlink():
                raise ValueError(f"out: {self.out / path} is a symbolic link, a run has none")
        if not known:
            return False
        stored, content = parse_run(mark, read_regular(mark, RUN_BYTES))
        what = f"the run in {self.out}"
        check_settings(content["settings"], self._settings, what)
        check_settings(stored.to_json(), self.layout.to_json(), what)
        # Equal, but for the order of columns, on which the bytes of the scores depend.
        self.layout = stored
        return True

    def _survey(self) -> int:
        """See what is done and what of it is lost; returns the number of this start."""
        if os.path.lexists(self.out / JOURNAL):
            self._summary = self._look_at_complete()
            self._clear_starts()
            if self._summary is not None:
                return 1
            # Its lines go on as those of the zeroth start. No file of the old starts is left, so
            # that at no moment two journals disagree.
            make_folders(self.out / STARTS)
            remove(self.out / ERRORS)
            self._rename(self.out / JOURNAL, self.out / STARTS / "0000-0000.jsonl")
        newest: dict[int, bool] = {}
        for _, entry in journal.read(self.out, self.layout, damaged=[]):
            if isinstance(entry, Entry):
                newest[entry.chunk] = self._intact(entry)
        self._again = {chunk for chunk, intact in newest.items() if not intact}
        return 1 + max((start for start, _, _ in journal.starts(self.out)), default=0)

    def _look_at_complete(self) -> Summary | None:
        """The summary of a run whose journal says that it is complete, if it still is."""
        seen, end = set(), None
        damaged: list[str] = []
        for _, entry in journal.read(self.out, self.layout, damaged=damaged):
            if isinstance(entry, End):
                end = entry
            elif self._intact(entry):
                seen.add(entry.chunk)
        if damaged or end is None or len(seen) < self.layout.chunks:
            return None
        if _size(self.out / ERRORS) != end.errors.size:
            return None
        return self._summarised(end.failed)

    def _summarised(self, failed: int) -> Summary:
        return Summary(self.out, self.layout.images, self.layout.chunks, failed)

    def _intact(self, entry: Entry) -> bool:
        return all(_size(self.out / path) == stamp.size for path, stamp in entry.stamps.items())

    def _lost(self, place: journal.Place, entry: Entry) -> bool:
        """Whether a line tells of files that were gone when this start began."""
        old = place.start < self._start and place.path.name != JOURNAL
        return old and entry.chunk in self._again

    def _places(self) -> dict[int, journal.Place]:
        """Where the line of every chunk stands, once they are all there."""
        latest = time.monotonic() + (_UNTIL_SEEN if self.ranks > 1 else 0)
        while True:
            places: dict[int, journal.Place] = {}
            damaged: list[str] = []
            for place, entry in journal.read(self.out, self.layout, damaged=damaged):
                if isinstance(entry, Entry) and not self._lost(place, entry):
                    places[entry.chunk] = place
            missing = gaps(sorted(places), 0, self.layout.chunks)
            if not missing:
                return places
            if time.monotonic() >= latest:
                odd = "".join(f" ({sentence})" for sentence in damaged[:1])
                raise ValueError(
                    f"out: {self.out} is not complete, chunks {missing} are missing{odd}; the "
                    "same command continues it"
                )
            time.sleep(0.5)

    def _complete(self, places: Mapping[int, journal.Place]) -> Summary:
        """Write errors.jsonl, then the journal in order, whose last line is the mark."""
        failed = 0

        def failures() -> Iterator[bytes]:
            nonlocal failed
            for chunk in range(self.layout.chunks):
                for failure in journal.entry_at(places[chunk], self.layout).errors:
                    failed += 1
                    yield journal.failure_line(failure)

        stamp = put(self.out / ERRORS, failures(), self._mark())

        def lines() -> Iterator[bytes]:
            for chunk in range(self.layout.chunks):
                yield journal.entry_line(journal.entry_at(places[chunk], self.layout))
            yield journal.end_line(End(failed, stamp))

        put(self.out / JOURNAL, lines(), self._mark())
        return self._summarised(failed)

    def _clear_starts(self) -> None:
        """Remove the journals that journal.jsonl stands for."""
        if self._log is not None:
            self._log.close()
        self._log = None
        for _, _, path in journal.starts(self.out):
            remove(path)
        folder = self.out / STARTS
        try:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
                sync_folder(self.out)
        except OSError as error:
            raise explained(error, folder) from error

    def _rename(self, old: Path, new: Path) -> None:
        try:
            os.replace(old, new)
            sync_folder(new.parent)
            sync_folder(old.parent)
        except OSError as error:
            raise explained(error, old) from error

    def _sweep(self) -> None:
        """Remove what a killed process was in the middle of."""
        below = {Path(folder) for folder in self.layout.folders()}
        for folder in below | {parent for path in below for parent in path.parents}:
            _sweep(self.out / folder)
        _sweep(self.out / STARTS)

    def _mark(self) -> str:
        return f"{self._start}-{self.rank}"

    def _values(
        self, name: str, values: np.ndarray[Any, Any], rows: range, failures: Sequence[Failure]
    ) -> np.ndarray[Any, Any]:
        array = self.layout.arrays[name]
        if values.shape != (len(rows), *array.shape) or values.dtype != np.dtype(array.dtype):
            raise ValueError(
                f"arrays: expected {name} as {[len(rows), *array.shape]} {array.dtype}, "
                f"got {list(values.shape)} {values.dtype}"
            )
        if failures:
            values = values.copy()
            values[[failure.index - rows.start for failure in failures]] = FILL[array.dtype]
        return values


def _as_json(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a file, so that tuples and lists are equal when a run is resumed."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(content), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: expected JSON values ({error})") from error
    return plain


def _holds(path: Path, content: bytes) -> bool:
    try:
        return read_regular(path, len(content)) == content
    except ValueError:
        return False


def _size(path: Path) -> int | None:
    """Size of a regular file, if there is one."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _sweep(folder: Path) -> None:
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        unfinished = [entry.name for entry in entries if UNFINISHED.fullmatch(entry.name)]
    for name in unfinished:
        remove(folder / name)
