"""Whether everything in a run directory is what was written: every file, hashed again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fastxkd.runs import journal
from fastxkd.runs.durable import Stamp, read_regular, stamp_of
from fastxkd.runs.journal import End, Entry
from fastxkd.runs.layout import (
    ERRORS,
    JOURNAL,
    MAPS,
    RUN,
    RUN_BYTES,
    SCORES,
    UNFINISHED,
    Layout,
    gaps,
    parse_run,
)


class Problem(NamedTuple):
    """Something in a run directory that is not as it was written.

    Attributes:
        path: the file, relative to the run.
        what: a sentence about it.
        chunk: the chunk that it belongs to, if it belongs to one.
    """

    path: str
    what: str
    chunk: int | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


def verify(
    path: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None
) -> list[Problem]:
    """Read every file of a run again and compare its size and SHA-256 with the journal.

    Args:
        path: the directory of a run.
        progress: called with (chunks looked at, chunks of the run).

    Returns:
        What is wrong: files that are missing, altered, or belong to nothing; lines of the journal
        that make no sense; chunks that are not there. Empty if the run is complete and every byte
        is the one that was written. A damaged file that is deleted is made again by the command
        of the run.

    Raises:
        ValueError: ``path`` is no run at all, or its ``run.json`` is damaged.
    """
    out = Path(path).expanduser()
    mark = out / RUN
    if not os.path.lexists(mark):
        raise ValueError(f"path: {out} is no run, it has no {RUN}")
    layout, _ = parse_run(mark, read_regular(mark, RUN_BYTES))
    return list(_problems(out, layout, progress))


def _problems(
    out: Path, layout: Layout, progress: Callable[[int, int], None] | None
) -> Iterator[Problem]:
    complete = os.path.lexists(out / JOURNAL)
    for name, document in layout.documents().items():
        found = _stamp(out, name)
        if not isinstance(found, Stamp):
            yield Problem(name, found)
        elif found.size != len(document) or read_regular(out / name, found.size) != document:
            yield Problem(name, "it does not describe the arrays of this run")
    damaged: list[str] = []
    newest: dict[int, journal.Place] = {}
    end = None
    failed, digest, size = 0, hashlib.sha256(), 0
    for place, entry in journal.read(out, layout, damaged=damaged):
        if isinstance(entry, End):
            end = entry
        else:
            newest[entry.chunk] = place
    for sentence in damaged:
        yield Problem(JOURNAL if complete else "journal", sentence)
    for count, chunk in enumerate(sorted(newest), 1):
        entry = journal.entry_at(newest[chunk], layout)
        for failure in entry.errors:
            line = journal.failure_line(failure)
            digest.update(line)
            failed, size = failed + 1, size + len(line)
        yield from _differences(out, entry)
        if progress is not None:
            progress(count, layout.chunks)
    missing = gaps(sorted(newest), 0, layout.chunks)
    if complete:
        yield from _end(out, end, End(failed, Stamp(size, digest.hexdigest())))
        yield from _strangers(out, layout, set(newest))
        if missing:
            yield Problem(JOURNAL, f"chunks {missing} have no line")
    elif missing:
        yield Problem(RUN, f"the run is not complete, chunks {missing} are not done yet")
    else:
        yield Problem(RUN, "every chunk is done, but the run was not finished")


def _differences(out: Path, entry: Entry) -> Iterator[Problem]:
    for name, stamp in entry.stamps.items():
        found = _stamp(out, name)
        if not isinstance(found, Stamp):
            yield Problem(name, found, entry.chunk)
        elif found.size != stamp.size:
            what = f"it has {found.size:,} bytes, {stamp.size:,} were written"
            yield Problem(name, what, entry.chunk)
        elif found != stamp:
            yield Problem(name, "its content was altered (another SHA-256)", entry.chunk)


def _end(out: Path, end: End | None, counted: End) -> Iterator[Problem]:
    """Whether the last line, the lines before it and errors.jsonl tell the same."""
    if end is None:
        yield Problem(JOURNAL, "it is cut short, its last line is missing")
        return
    if end.failed != counted.failed:
        what = f"it has {counted.failed} failed images, and says {end.failed}"
        yield Problem(JOURNAL, what)
    elif end.errors != counted.errors:
        yield Problem(JOURNAL, f"its failed images are not those of {ERRORS}")
    found = _stamp(out, ERRORS)
    if not isinstance(found, Stamp):
        yield Problem(ERRORS, found)
    elif found != end.errors:
        yield Problem(ERRORS, "it is not the file that was written")


def _strangers(out: Path, layout: Layout, chunks: set[int]) -> Iterator[Problem]:
    """Files below maps and scores, or unfinished ones above them, that the run does not have."""
    documents = set(layout.documents())
    ours = {(Path(name).parent, Path(name).name) for name in documents}
    last = {Path(layout.map_file(name, 0)).parent: name for name in layout.arrays}
    for folder, _, names in os.walk(out, followlinks=False):
        below = Path(folder).relative_to(out)
        inside = below.parts[:1] in ((MAPS,), (SCORES,))
        for name in sorted(names):
            path = (below / name).as_posix()
            if UNFINISHED.fullmatch(name):
                yield Problem(path, "a process was killed while it wrote this; it can be deleted")
            elif (
                inside
                and (below, name) not in ours
                and not _of_a_chunk(path, layout, chunks, last.get(below))
            ):
                yield Problem(path, "no part of the run")


def _of_a_chunk(path: str, layout: Layout, chunks: set[int], array: str | None) -> bool:
    number = Path(path).name.removeprefix("c.").partition(".")[0]
    if not (number.isascii() and number.isdigit() and len(number) < 20):
        return False
    chunk = int(number)
    if chunk not in chunks:
        return False
    return path == (layout.map_file(array, chunk) if array else layout.score_file(chunk))


def _stamp(out: Path, name: str) -> Stamp | str:
    """Size and hash of a file of the run, or why there are none."""
    path = out
    for part in Path(name).parts[:-1]:
        path = path / part
        if path.is_symlink():
            return f"its folder {path.relative_to(out)} is a symbolic link"
    if not os.path.lexists(out / name):
        return "it is missing"
    try:
        return stamp_of(out / name)
    except ValueError as error:
        return str(error).removeprefix(f"{out / name}: ")
