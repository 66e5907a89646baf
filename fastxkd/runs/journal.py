"""The journal of a run over a data set: which chunks are done, and what their files must be.

While a run goes on every start of every rank has a file of its own, ``journal/START-RANK.jsonl``,
so that nobody ever writes behind a line that a crash cut short. A complete run has one file for
them, ``journal.jsonl``: the chunks in order, and a last line that says so. The last line about a
chunk counts: only a chunk whose files were lost is done again.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastxkd.runs.durable import Stamp, open_regular
from fastxkd.runs.layout import JOURNAL, STARTS, Layout, is_whole, shortened

START_FILE = re.compile(r"([0-9]{4,9})-([0-9]{4,9})\.jsonl")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LINE_BYTES = 1 << 27
_FAILURE = ("index", "path", "reason")


@dataclass(frozen=True)
class Failure:
    """An image that has no maps, and why."""

    index: int
    path: str
    reason: str


class Entry(NamedTuple):
    """One line: a chunk that is done."""

    chunk: int
    stamps: dict[str, Stamp]
    errors: list[Failure]


class End(NamedTuple):
    """The last line of the journal of a complete run."""

    failed: int
    errors: Stamp


class Place(NamedTuple):
    """Where a line stands; ``start`` is 0 in the journal of a complete run."""

    path: Path
    number: int
    offset: int
    start: int


def entry_line(entry: Entry) -> bytes:
    files = {path: list(stamp) for path, stamp in sorted(entry.stamps.items())}
    errors = [asdict(failure) for failure in entry.errors]
    return _line({"chunk": entry.chunk, "files": files, "errors": errors})


def end_line(end: End) -> bytes:
    return _line({"complete": True, "failed": end.failed, "errors": list(end.errors)})


def failure_line(failure: Failure) -> bytes:
    return _line(asdict(failure))


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


def parse_line(layout: Layout, line: bytes) -> Entry | End:
    """A line of the journal.

    Raises:
        ValueError: it is not one that this run can have; says what is wrong with it.
    """
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError("not an object")
    if content.get("complete") is True:
        failed = content.get("failed")
        if not is_whole(failed) or not 0 <= failed <= layout.images:
            raise ValueError(f"{shortened(failed)} failed images of {layout.images}")
        return End(failed, _stamp(content.get("errors")))
    chunk, files, errors = (content.get(name) for name in ("chunk", "files", "errors"))
    if not is_whole(chunk) or not 0 <= chunk < layout.chunks:
        raise ValueError(f"chunk {shortened(chunk)} of {layout.chunks}")
    if not isinstance(files, dict) or set(files) != set(layout.files(chunk)):
        raise ValueError(f"chunk {chunk} names {shortened(files)}, not its own files")
    stamps = {path: _stamp(files[path]) for path in layout.files(chunk)}
    return Entry(chunk, stamps, parse_errors(layout, chunk, errors))


def parse_errors(layout: Layout, chunk: int, errors: Any) -> list[Failure]:
    """The failed images of a chunk, by index.

    Raises:
        ValueError: an index of another chunk, or twice, or something else that is no failure.
    """
    rows = layout.rows(chunk)
    if not isinstance(errors, list):
        raise ValueError(f"errors: expected a list, got {type(errors).__name__}")
    found: dict[int, Failure] = {}
    for error in errors:
        if not isinstance(error, Mapping) or set(error) != set(_FAILURE):
            raise ValueError(f"errors: expected index, path and reason, got {shortened(error)}")
        index, path, reason = (error[name] for name in _FAILURE)
        if not is_whole(index) or index not in rows or index in found:
            raise ValueError(
                f"errors: index {shortened(index)} in chunk {chunk}, expected each of "
                f"{rows.start} to {rows.stop - 1} at most once"
            )
        if not isinstance(path, str) or not isinstance(reason, str):
            raise ValueError(f"errors: path and reason of image {index} must be text")
        found[index] = Failure(index, path, reason)
    return [found[index] for index in sorted(found)]


def starts(out: Path) -> list[tuple[int, int, Path]]:
    """(start, rank, file) of the journal of a run that goes on, in the order they count."""
    folder = out / STARTS
    if folder.is_symlink():
        raise ValueError(f"{folder}: it is a symbolic link, a run has none")
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror})") from error
    matches = [match for name in names if (match := START_FILE.fullmatch(name))]
    return sorted((int(match[1]), int(match[2]), folder / match[0]) for match in matches)


def read(
    out: Path, layout: Layout, *, damaged: list[str] | None = None
) -> Iterator[tuple[Place, Entry | End]]:
    """Every line, in an order in which the last one about a chunk is the true one.

    Args:
        damaged: takes a sentence for every line that makes no sense, which is then left out.

    Raises:
        ValueError: without ``damaged``, for such a line; names the file and the line.
    """
    whole = out / JOURNAL
    files = [(0, 0, whole)] if os.path.lexists(whole) else starts(out)
    for start, _, path in files:
        try:
            for number, offset, line in _lines(path):
                place = Place(path, number, offset, start)
                try:
                    content = parse_line(layout, line)
                except ValueError as error:
                    if damaged is None:
                        raise ValueError(f"{path}: line {number}: {error}") from error
                    damaged.append(f"line {number} of {path.relative_to(out)}: {error}")
                else:
                    yield place, content
        except ValueError as error:
            if damaged is None:
                raise
            damaged.append(str(error))


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(number, offset, line) of every whole line; a last one that a crash cut short is left out."""
    offset = 0
    with os.fdopen(open_regular(path), "rb") as file:
        for number in itertools.count(1):
            line = file.readline(_LINE_BYTES + 1)
            if len(line) > _LINE_BYTES:
                raise ValueError(f"{path}: line {number} has more than {_LINE_BYTES:,} bytes")
            if not line.endswith(b"\n"):
                return
            yield number, offset, line
            offset += len(line)


def entry_at(place: Place, layout: Layout) -> Entry:
    """The entry that stands at a place."""
    with os.fdopen(open_regular(place.path), "rb") as file:
        file.seek(place.offset)
        entry = parse_line(layout, file.readline(_LINE_BYTES))
    if not isinstance(entry, Entry):
        raise ValueError(f"{place.path}: changed while it was read")
    return entry


def _stamp(value: Any) -> Stamp:
    if isinstance(value, list) and len(value) == 2:
        size, sha256 = value
        sized = is_whole(size) and 0 <= size < 2**62
        if sized and isinstance(sha256, str) and _SHA256.fullmatch(sha256):
            return Stamp(size, sha256)
    raise ValueError(f"expected [size, sha256], got {shortened(value)}")
