"""A run in formats that need none of our tools: NumPy archives, and pictures."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from fastxkd.cam import render
from fastxkd.runs import reader
from fastxkd.runs.durable import explained, make_folders, sync_folder
from fastxkd.runs.store import refuse_strangers

Progress = Callable[[int, int], None]

_PART_BYTES = 1 << 30
_ROUNDING = 1e-3
# The first moment that a zip file can tell: no byte may depend on when it was written.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def export(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: Literal["npz", "png"] = "npz",
    *,
    maps: Sequence[str] | None = None,
    rows: Any = None,
    per_file: int | None = None,
    images: Any = None,
    size: tuple[int, int] | None = None,
    colormap: str = "inferno",
    opacity: float = render.OPACITY,
    names: str = "name",
    progress: Progress | None = None,
) -> int:
    """Write the maps and scores of a run as ``.npz`` archives or as pictures.

    ``npz``: arrays ``maps/NAME`` [k, *shape], ``scores/COLUMN`` [k] (numbers with missing values
    as float64 with NaN, missing texts empty) and ``failed`` [k]. ``out`` ending in ``.npz`` is one
    file, anything else a folder of ``part-00000.npz``, ... Either is written a chunk at a time.

    ``png``: one picture per image and map, ``out[/MAP]/INDEX-NAME.png``; none of failed images.

    Args:
        path: the directory of a run.
        out: a file or folder that is not there yet, or an empty folder.
        maps: their names; ``None`` is all of them.
        rows: which images, as an index of :func:`fastxkd.runs.open`; ``None`` is all of them.
        per_file: ``npz`` in a folder: images per file. Default: as many chunks as have 1 GiB of
            maps.
        images: ``png``: what to lay the maps over: ``images[i]`` is image i, or has it as
            ``.image`` (see :func:`fastxkd.cam.render.overlay`). Without, the maps alone.
        size: ``png``: (height, width) of maps alone; ``None`` keeps theirs.
        colormap, opacity: ``png``: see :func:`fastxkd.cam.render.overlay`.
        names: ``png``: the column of the scores that names images.
        progress: called with (images written, images in all).

    Returns:
        The number of files.

    Raises:
        ValueError: no such run, map or image; ``out`` holds something; maps that are no pictures.
        OSError: the disk refused; the text names the file. What was written is whole.
    """
    run = reader.open(path)
    wanted = list(run.maps) if maps is None else list(maps)
    unknown = [name for name in wanted if name not in run.maps]
    if unknown:
        raise ValueError(
            f"maps: expected some of {', '.join(run.maps)}, got {', '.join(map(str, unknown))}"
        )
    places = run.places(slice(None) if rows is None else rows)
    if format == "npz":
        return _archives(run, Path(out).expanduser(), wanted, places, per_file, progress)
    if format == "png":
        draw = _Drawing(images, size, colormap, opacity)
        return _pictures(run, Path(out).expanduser(), wanted, places, draw, names, progress)
    raise ValueError(f"format: expected 'npz' or 'png', got {format!r}")


def _archives(
    run: reader.Run,
    out: Path,
    maps: list[str],
    places: np.ndarray[Any, Any],
    per_file: int | None,
    progress: Progress | None,
) -> int:
    if per_file is not None and per_file < 1:
        raise ValueError(f"per_file: expected at least 1, got {per_file}")
    if out.suffix == ".npz":
        if per_file is not None:
            raise ValueError(f"per_file: {out.name} is one file; name a folder to have several")
        if os.path.lexists(out):
            raise ValueError(f"out: {out} is there already; nothing was overwritten")
        make_folders(out.parent)
        parts = {out: places}
    else:
        refuse_strangers(out)
        make_folders(out)
        image = sum(run.layout.arrays[name].image_bytes for name in maps)
        chunks = _PART_BYTES // max(1, image * run.layout.chunk)
        count = per_file or max(1, chunks) * run.layout.chunk
        parts = {
            out / f"part-{number:05d}.npz": places[start : start + count]
            for number, start in enumerate(range(0, len(places), count))
        }
    done = 0
    for file, some in parts.items():
        with _created(file) as stream:
            _archive(run, stream, maps, some)
        done += len(some)
        if progress is not None:
            progress(done, len(places))
    return len(parts)


def _archive(
    run: reader.Run, stream: IO[bytes], maps: list[str], places: np.ndarray[Any, Any]
) -> None:
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name in maps:
            array = run.maps[name]
            pieces = (array[some] for some in _pieces(run, places))
            shape = (len(places), *array.shape[1:])
            _member(archive, f"maps/{name}", array.dtype, shape, pieces)
        for name, dtype in _dtypes(run, places).items():
            columns = (_column(run, name, dtype, some) for some in _pieces(run, places))
            _member(archive, f"scores/{name}", dtype, (len(places),), columns)
        failed = {error["index"] for error in run.errors}
        marks = np.fromiter((int(place) in failed for place in places), bool, len(places))
        _member(archive, "failed", marks.dtype, marks.shape, [marks])


def _member(
    archive: zipfile.ZipFile,
    name: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    pieces: Iterable[np.ndarray[Any, Any]],
) -> None:
    """One array of the archive, written as its pieces come."""
    info = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    with archive.open(info, "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype).tobytes())


def _pieces(run: reader.Run, places: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    for start in range(0, len(places), run.layout.chunk):
        yield places[start : start + run.layout.chunk]


def _dtypes(run: reader.Run, places: np.ndarray[Any, Any]) -> dict[str, np.dtype[Any]]:
    """What holds each column: that is known when all of it was seen."""
    kinds = {"index": "int64", **run.layout.columns}
    longest = dict.fromkeys(kinds, 1)
    missing = dict.fromkeys(kinds, False)
    for some in _pieces(run, places):
        table = run.scores_at(some)
        for name, kind in kinds.items():
            column = table.column(name)
            missing[name] |= column.null_count > 0
            if kind == "string":
                texts = (text for text in column.to_pylist() if text)
                longest[name] = max([longest[name], *map(len, texts)])
    return {
        name: np.dtype(f"U{longest[name]}")
        if kind == "string"
        else np.dtype("float64" if missing[name] and kind in ("int64", "bool") else kind)
        for name, kind in kinds.items()
    }


def _column(
    run: reader.Run, name: str, dtype: np.dtype[Any], places: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    values = run.scores_at(places).column(name).to_pylist()
    fill = "" if dtype.kind == "U" else np.nan
    return np.array([fill if value is None else value for value in values], dtype)


class _Drawing:
    """How maps become pictures."""

    def __init__(
        self, images: Any, size: tuple[int, int] | None, colormap: str, opacity: float
    ) -> None:
        self.images, self.size, self.opacity = images, size, opacity
        self.colormap, self.colors = colormap, render.colors(colormap)
        if size is not None and images is not None:
            raise ValueError("size: with images the pictures have their size")
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"size: expected (height, width), got {size}")

    def background(self, index: int) -> Any:
        if self.images is None:
            return None
        image = self.images[index]
        return getattr(image, "image", image)

    def picture(self, name: str, index: int, heat: np.ndarray[Any, Any], image: Any) -> bytes:
        if heat.ndim != 2:
            raise ValueError(f"maps: {name} has {list(heat.shape)} per image, expected [H, W]")
        scaled = heat.astype(np.float32) / (255 if heat.dtype == np.uint8 else 1)
        finite = scaled[np.isfinite(scaled)]
        if finite.size and not -_ROUNDING <= finite.min() <= finite.max() <= 1 + _ROUNDING:
            raise ValueError(
                f"maps: {name} of image {index} goes from {finite.min():.3g} to "
                f"{finite.max():.3g}; pictures are drawn of maps in [0, 1]"
            )
        if image is not None:
            laid = render.overlay(image, scaled, opacity=self.opacity, colormap=self.colormap)
            return render.png(laid)
        if self.size is not None:
            scaled = render.resize(scaled, self.size)
        levels = np.rint(np.clip(np.nan_to_num(scaled, nan=0.0), 0, 1) * 255).astype(np.uint8)
        return render.png(self.colors[levels])


def _pictures(
    run: reader.Run,
    out: Path,
    maps: list[str],
    places: np.ndarray[Any, Any],
    drawing: _Drawing,
    names: str,
    progress: Progress | None,
) -> int:
    if names not in run.layout.columns and names != "name":
        raise ValueError(f"names: expected one of {', '.join(run.layout.columns)}, got {names!r}")
    refuse_strangers(out)
    folders = {name: out / name if len(maps) > 1 else out for name in maps}
    for folder in folders.values():
        make_folders(folder)
    written = 0
    for count, place in enumerate(places, 1):
        image = run[int(place)]
        if image.error is None:
            background = drawing.background(image.index)
            file = f"{image.index:08d}{_safe(image.scores.get(names))}.png"
            for name, folder in folders.items():
                content = drawing.picture(name, image.index, image.maps[name], background)
                with _created(folder / file) as stream:
                    stream.write(content)
                written += 1
        if progress is not None:
            progress(count, len(places))
    return written


def _safe(name: Any) -> str:
    """``-`` and what of a name can be part of a file's name anywhere; empty if nothing can."""
    if not isinstance(name, str):
        return ""
    last = re.split(r"[/\\]", name)[-1]
    stem = last.rpartition(".")[0] or last
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("._-")[:80]
    return f"-{plain}" if plain else ""


@contextlib.contextmanager
def _created(path: Path) -> Iterator[IO[bytes]]:
    """A new file that is there under its name only when it is whole."""
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        try:
            with unfinished.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, "it is there already and was not overwritten")
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise explained(error, path, "then export again into a new folder") from error
