"""Reading a run over a data set: like an array, a block at a time, whatever its files contain."""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from fastxkd._extras import require
from fastxkd.runs import journal
from fastxkd.runs.durable import open_regular, read_regular
from fastxkd.runs.journal import End, Failure
from fastxkd.runs.layout import (
    ABSENT,
    JOURNAL,
    MAPS,
    RUN,
    RUN_BYTES,
    STARTS,
    Layout,
    gaps,
    parse_run,
    ranges,
    unpack,
)
from fastxkd.runs.tables import from_parquet, schema

_SCORE_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class Explained:
    """One image of a run.

    Attributes:
        maps: name -> what is stored of it, [*shape]; NaN (uint8: 0) if it failed.
        scores: column -> number, text or None.
        error: why it failed, or None.
    """

    index: int
    maps: dict[str, np.ndarray[Any, Any]]
    scores: dict[str, Any]
    error: str | None


@dataclass(frozen=True, eq=False)
class Selection:
    """Several images of a run.

    Attributes:
        indices: int64 [k].
        maps: name -> [k, *shape].
        scores: a pyarrow Table of k rows.
        errors: image -> why it failed.
    """

    indices: np.ndarray[Any, Any]
    maps: dict[str, np.ndarray[Any, Any]]
    scores: Any
    errors: dict[int, str]


class Maps:
    """One array of a run, [images, *shape], read when and as far as it is asked for.

    Indexed by an integer, a slice, a list or array of integers, or a mask; further indices select
    within the images. ``numpy.asarray`` reads all of it.
    """

    def __init__(self, run: Run, name: str) -> None:
        self._run, self.name = run, name
        self._array = run.layout.arrays[name]
        self._block = run.layout.block(name)
        # Zstandard never needs more than this for a block.
        self._most = self._block * self._array.image_bytes * 129 // 128 + 1024
        # The block that was unpacked last: reading on in order unpacks each of them once.
        self._last: tuple[tuple[int, int], np.ndarray[Any, Any]] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._run.layout.images, *self._array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self._array.dtype)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray[Any, Any]]:
        return (self[image] for image in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if copy is False:
            raise ValueError("copy: what lies on the disk cannot be had without a copy")
        return self[:] if dtype is None else self[:].astype(dtype)

    def __repr__(self) -> str:
        return f"<{self.name} {list(self.shape)} {self._array.dtype}>"

    def __getitem__(self, key: Any) -> np.ndarray[Any, Any]:
        first, rest = (key[0], key[1:]) if isinstance(key, tuple) and key else (key, ())
        if first is Ellipsis or (isinstance(key, tuple) and not key):
            return self[:][key]
        rows = _rows(first, self._run)
        if isinstance(rows, int):
            found: np.ndarray[Any, Any] = self._read(np.array([rows]))[0]
            return found[rest] if rest else found
        values = self._read(rows)
        inside = (slice(None), *rest)
        return values[inside] if rest else values

    def _read(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        size, chunks = self._run.layout.chunk, rows // self._run.layout.chunk
        self._run.check_done(np.unique(chunks).tolist())
        values = np.empty((len(rows), *self._array.shape), self.dtype)
        blocks = rows % size // self._block
        order = np.lexsort((blocks, chunks))
        starts = np.flatnonzero(
            np.diff(chunks[order], prepend=-1) | np.diff(blocks[order], prepend=-1)
        )
        for some in np.split(order, starts[1:]) if len(rows) else ():
            block = self._unpacked(int(chunks[some[0]]), int(blocks[some[0]]))
            values[some] = block[rows[some] % size % self._block]
        return values

    def _unpacked(self, chunk: int, number: int) -> np.ndarray[Any, Any]:
        last = self._last
        if last is not None and last[0] == (chunk, number):
            return last[1]
        path = self._run.path / self._run.layout.map_file(self.name, chunk)
        blocks = self._run.layout.chunk // self._block
        try:
            values = unpack(_packed(path, number, blocks, self._most), self._array, self._block)
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error
        self._last = (chunk, number), values
        return values

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}


def _packed(path: Path, number: int, blocks: int, most: int) -> bytes:
    """The bytes of one block of a chunk's file."""
    file = open_regular(path)
    try:
        end = os.fstat(file).st_size - 16 * blocks
        place = os.pread(file, 16, end + 16 * number) if end >= 0 else b""
        if len(place) < 16:
            raise ValueError("it is cut short")
        start, size = (int(value) for value in np.frombuffer(place, "<u8"))
        if start == ABSENT or start + size > end or size > most:
            raise ValueError(f"block {number} lies outside of it")
        data = os.pread(file, size, start)
        if len(data) < size:
            raise ValueError("it is cut short")
        return data
    finally:
        os.close(file)


class Run:
    """A run over a data set: ``len``, ``run[i]``, ``run[10:20]``, iteration; see :func:`open`.

    Attributes:
        path: the directory.
        settings: what the run was asked for.
        facts: what else was recorded when it began: versions, command, machine.
        maps: name -> :class:`Maps`.
        complete: whether every image is there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # A program may change its working directory between opening and reading.
        self.path = Path(path).expanduser().absolute()
        if not self.path.is_dir():
            raise ValueError(f"path: {self.path} is no folder")
        mark = self.path / RUN
        if not os.path.lexists(mark):
            raise ValueError(f"path: {self.path} is no run, it has no {RUN}")
        self.layout, content = parse_run(mark, read_regular(mark, RUN_BYTES))
        self.settings: dict[str, Any] = content["settings"]
        self.facts: dict[str, Any] = content["facts"]
        refuse_links(self.path, self.layout)
        self._scores: dict[int, tuple[int, bytes]] = {}  # chunk -> size and SHA-256 of the file
        self._failures: dict[int, list[Failure]] = {}
        end: End | None = None
        for _, entry in journal.read(self.path, self.layout):
            if isinstance(entry, End):
                end = entry
                continue
            stamp = entry.stamps[self.layout.score_file(entry.chunk)]
            self._scores[entry.chunk] = stamp.size, bytes.fromhex(stamp.sha256)
            self._failures.pop(entry.chunk, None)
            if entry.errors:
                self._failures[entry.chunk] = entry.errors
        self.complete = os.path.lexists(self.path / JOURNAL)
        if self.complete:
            self._check_complete(end)
        self.maps = {name: Maps(self, name) for name in self.layout.arrays}
        self._table: tuple[int, Any] | None = None

    def _check_complete(self, end: End | None) -> None:
        path, failed = self.path / JOURNAL, sum(map(len, self._failures.values()))
        if end is None:
            raise ValueError(f"{path}: it is cut short, its last line is missing")
        if len(self._scores) != self.layout.chunks:
            raise ValueError(
                f"{path}: it has {len(self._scores)} of {self.layout.chunks} chunks, and says that "
                "it is complete"
            )
        if end.failed != failed:
            raise ValueError(f"{path}: it has {failed} failed images, and says {end.failed}")

    def __len__(self) -> int:
        return self.layout.images

    def __repr__(self) -> str:
        state = "complete" if self.complete else f"{len(self._scores)} chunks done"
        return f"<run {self.path}: {len(self):,} images, {', '.join(self.maps)}; {state}>"

    def __iter__(self) -> Iterator[Explained]:
        return (self[image] for image in range(len(self)))

    @overload
    def __getitem__(self, key: int) -> Explained: ...
    @overload
    def __getitem__(self, key: Any) -> Explained | Selection: ...
    def __getitem__(self, key: Any) -> Explained | Selection:
        rows = _rows(key, self)
        if isinstance(rows, int):
            maps = {name: array[rows] for name, array in self.maps.items()}
            table = self.scores_of(rows // self.layout.chunk)
            [scores] = table.slice(rows % self.layout.chunk, 1).to_pylist()
            return Explained(rows, maps, scores, self._why(rows))
        maps = {name: array[rows] for name, array in self.maps.items()}
        failed = {int(row): why for row in rows if (why := self._why(int(row))) is not None}
        return Selection(rows, maps, self.scores_at(rows), failed)

    def _why(self, image: int) -> str | None:
        failures = self._failures.get(image // self.layout.chunk, ())
        return next((failure.reason for failure in failures if failure.index == image), None)

    def places(self, key: Any) -> np.ndarray[Any, Any]:
        """What an index means: int64 [k] of images."""
        rows = _rows(key, self)
        return np.array([rows]) if isinstance(rows, int) else rows

    def scores_at(self, rows: np.ndarray[Any, Any]) -> Any:
        """The scores of images: a pyarrow Table with a row for each, in this order."""
        arrow = require("pyarrow", extra="runs")
        chunks = rows // self.layout.chunk
        order = np.argsort(chunks, kind="stable")
        parts = [
            self.scores_of(int(chunks[some[0]])).take(rows[some] % self.layout.chunk)
            for some in np.split(order, np.flatnonzero(np.diff(chunks[order])) + 1)
            if len(some)
        ]
        joined = arrow.concat_tables([schema(self.layout).empty_table(), *parts])
        return joined.take(np.argsort(order)).combine_chunks()

    @property
    def done(self) -> list[int]:
        """The chunks that are there, of ``layout.chunks``."""
        return sorted(self._scores)

    @property
    def scores(self) -> Any:
        """A pyarrow Table, one row per image; of a run that is not complete, of those done.

        All of it is in memory then; ``pyarrow.dataset.dataset(run.path / "scores")`` is not.
        """
        arrow = require("pyarrow", extra="runs")
        tables = [self.scores_of(chunk) for chunk in self.done]
        return arrow.concat_tables([schema(self.layout).empty_table(), *tables])

    def scores_of(self, chunk: int) -> Any:
        """The scores of a chunk: a pyarrow Table."""
        last = self._table
        if last is not None and last[0] == chunk:
            return last[1]
        self.check_done([chunk])
        path = self.path / self.layout.score_file(chunk)
        try:
            size, digest = self._scores[chunk]
            content = read_regular(path, min(size, _SCORE_BYTES))
            if hashlib.sha256(content).digest() != digest:
                raise ValueError("it is not the file that the journal tells of")
            table = from_parquet(content, self.layout, chunk)
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error
        self._table = chunk, table
        return table

    @cached_property
    def errors(self) -> list[dict[str, Any]]:
        """{"index", "path", "reason"} of every image that failed, by index."""
        return [
            asdict(failure) for chunk in sorted(self._failures) for failure in self._failures[chunk]
        ]

    def check_done(self, chunks: Iterable[int]) -> None:
        """Raise unless these chunks are there."""
        missing = [chunk for chunk in chunks if chunk not in self._scores]
        if missing:
            raise self._not_done(ranges(missing))

    def check_range(self, images: range) -> None:
        """Raise if there are more of these images than are done at all."""
        if len(images) > len(self._scores) * self.layout.chunk:
            ends = [image // self.layout.chunk for image in (images[0], images[-1])]
            raise self._not_done(gaps(self.done, min(ends), max(ends) + 1))

    def _not_done(self, chunks: str) -> ValueError:
        return ValueError(
            f"index: chunks {chunks} of {self.path} are not done yet, {len(self._scores)} of "
            f"{self.layout.chunks} are; images per chunk: {self.layout.chunk}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}


def open(path: str | os.PathLike[str]) -> Run:
    """Open the directory of a run over a data set.

    Nothing but its journal is read before it is asked for. A run that still goes on, or was
    interrupted, can be read as far as it is done.

    Args:
        path: what ``fastxkd explain --out`` made.

    Raises:
        ValueError: no such run, or a damaged one; names the file. The same holds for everything
            that is read later. No file can make code run: there is nothing to unpickle or import.

    Example:
        >>> import tempfile, numpy as np
        >>> from fastxkd.runs.chunks import Array, RunWriter
        >>> folder = tempfile.TemporaryDirectory()
        >>> with RunWriter(folder.name, {}, images=3, chunk=2, columns={"label": "int64"},
        ...                arrays={"gradcam": Array((4, 4), "float16")}) as writer:
        ...     for chunk in writer.pending():
        ...         n = len(writer.rows(chunk))
        ...         writer.write(chunk, {"gradcam": np.ones((n, 4, 4), "f2")}, {"label": [7] * n})
        ...     done = writer.finish()
        >>> run = open(folder.name)
        >>> len(run), run[2].scores, run[-2:].maps["gradcam"].shape
        (3, {'index': 2, 'label': 7}, (2, 4, 4))
        >>> run.maps["gradcam"][1, :, 0]
        array([1., 1., 1., 1.], dtype=float16)
        >>> folder.cleanup()
    """
    return Run(path)


def refuse_links(path: Path, layout: Layout) -> None:
    """Raise if a folder of a run is a link: what is read would lie elsewhere."""
    inside = {Path(folder) for folder in (*layout.folders(), MAPS, STARTS)}
    inside |= {parent for folder in inside for parent in folder.parents if parent != Path()}
    for folder in sorted(inside):
        if (path / folder).is_symlink():
            raise ValueError(f"{path / folder}: it is a symbolic link, a run has none")


def _rows(key: Any, run: Run) -> int | np.ndarray[Any, Any]:
    """A non-negative index, or int64 [k] of them.

    Raises:
        IndexError: beyond the images.
        TypeError: no index.
        ValueError: more images than are done.
    """
    images = len(run)
    if isinstance(key, slice):
        places = range(*key.indices(images))
        # What a damaged run.json says of the length must not be allocated.
        run.check_range(places)
        return np.arange(places.start, places.stop, places.step)
    if isinstance(key, range):
        key = np.arange(key.start, key.stop, key.step)
    if hasattr(key, "detach"):
        key = key.detach().cpu().numpy()
    if not isinstance(key, (list, np.ndarray)) or (isinstance(key, np.ndarray) and key.ndim == 0):
        try:
            image = operator.index(key)
        except TypeError:
            raise TypeError(
                f"index: expected an integer, a slice, a list of integers or a mask, got {key!r}"
            ) from None
        if not -images <= image < images:
            raise IndexError(f"index: {image} of {images} images")
        return image % images
    rows = np.asarray(key)
    if rows.ndim != 1 or (len(rows) and rows.dtype.kind not in "biu"):
        raise TypeError(
            f"index: expected integers or a mask in one dimension, got {rows.dtype} "
            f"{list(rows.shape)}"
        )
    if rows.dtype.kind == "b":
        if len(rows) != images:
            raise IndexError(f"index: a mask of {len(rows)} for {images} images")
        return np.flatnonzero(rows)
    if len(rows) and not -images <= rows.min() <= rows.max() < images:
        raise IndexError(f"index: {rows.min()} to {rows.max()} of {images} images")
    return rows.astype(np.int64) % images


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: it is damaged or missing ({error}); 'fastxkd explain --verify' names every such "
        "file, and the command of the run makes those again that are missing"
    )
