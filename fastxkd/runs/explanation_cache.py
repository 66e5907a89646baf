"""A teacher's maps of a whole data set on disk, so that each is computed once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastxkd.ops._checks import check_choice, check_counts
from fastxkd.runs.durable import Lock, explained, make_folders, put, sync_folder
from fastxkd.train.checkpoint import check_settings
from fastxkd.train.distiller import fingerprint
from fastxkd.train.teacher_maps import TeacherExplanations

__all__ = ["ExplanationCache"]

FORMAT = 1
DTYPES = ("float16", "float32")
_PATIENCE = 2.0
_AGAIN = "then run the same command again: it continues after the last whole chunk"
# Indices to normalised images [m, channels, h, w], and which of the indices they are: those of
# images that cannot be read are left out.
Load = Callable[[np.ndarray], tuple[Tensor, Tensor]]


class ExplanationCache:
    """Maps ``[count, k, h, w]`` in one file, beside a journal of which of them are there.

    ``maps.npy`` is a plain NumPy file, mapped into memory and read where it is asked.
    ``maps.jsonl`` names the teacher (a digest of its weights), the explanations and the data in its
    first line, and has a line with a SHA-256 for every chunk: whatever is interrupted, a chunk
    counts once it is whole and on the disk.

    Args:
        folder: made if need be. One that holds the maps of another teacher, of other explanations
            or of other data is refused.
        explanations: see :class:`TeacherExplanations`.
        count: images of the data set.
        image_size: (h, w) of the maps that are read.
        data: what tells this data set from another, plain values.
        size: (h, w) of the maps on disk; they are resized (bilinear) when they are read. None: as
            ``image_size``, nothing is lost. Smaller, an interpretation of no paper, is for disks.
        dtype: of the maps on disk, ``"float16"`` (values are in [0, 1]) or ``"float32"``.
        chunk: images computed and written at once; part of what is random is drawn per chunk.

    Raises:
        ValueError: another teacher, other explanations, other data (named); a journal that is
            damaged; maps that are not what their checksum says.
    """

    def __init__(
        self,
        folder: str | Path,
        explanations: TeacherExplanations,
        *,
        count: int,
        image_size: tuple[int, int],
        data: Mapping[str, Any] | None = None,
        size: tuple[int, int] | None = None,
        dtype: str = "float16",
        chunk: int = 256,
    ) -> None:
        check_counts(count=count, chunk=chunk)
        check_choice("dtype", dtype, DTYPES)
        for name, pair in (("image_size", image_size), ("size", size or image_size)):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(f"{name}: expected (h, w), got {pair!r}")
            for side in pair:
                check_counts(**{name: side})
        self.folder, self.explanations = Path(folder), explanations
        self.image_size = (image_size[0], image_size[1])
        stored = (size or image_size)[:2]
        self.shape = (count, explanations.maps, *stored)
        self.chunk, self.dtype = chunk, np.dtype(dtype)
        identity: dict[str, Any] = {
            "format": FORMAT,
            "teacher_weights": fingerprint(explanations.teacher.state_dict()),
            **explanations.settings(),
            "shape": list(self.shape),
            "dtype": dtype,
            "chunk": chunk,
            "data": dict(data or {}),
        }
        try:
            self.identity: dict[str, Any] = json.loads(json.dumps(identity, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise TypeError(f"data, options: expected plain values, {error}") from error
        self._journal, self._file = self.folder / "maps.jsonl", self.folder / "maps.npy"
        self._maps: np.memmap[Any, Any] | None = None
        self._done: dict[int, str] = {}
        self._open()

    @property
    def key(self) -> str:
        """A digest of everything that decides the maps."""
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def chunks(self) -> int:
        return -(-self.shape[0] // self.chunk)

    @property
    def complete(self) -> bool:
        return len(self._done) == self.chunks

    def fill(self, load: Load, progress: Callable[[int, int], None] | None = None) -> int:
        """Compute what is missing.

        Args:
            load: of indices, int64 ``[m]``, to the images that can be read of them, on the
                teacher's device, and their indices. An image that is left out gets maps of 0.
            progress: called with (images that have maps, images).

        Returns:
            How many images were explained now.

        Raises:
            ValueError: another process is at it; maps with NaN.
            OSError: the disk is full, or the like; what was written before stays.
        """
        lock = Lock(self.folder / ".lock")
        lock.take(_PATIENCE)
        try:
            self._open()  # another process may have been at it
            return self._fill(load, progress)
        finally:
            lock.release()

    def _fill(self, load: Load, progress: Callable[[int, int], None] | None) -> int:
        made = 0
        for number in range(self.chunks):
            if number in self._done:
                continue
            rows = self._rows(number)
            images, kept = load(np.arange(rows.start, rows.stop))
            maps = np.zeros((rows.stop - rows.start, *self.shape[1:]), self.dtype)
            if len(images):
                found = self.explanations(images, draw=number)
                wrong = ~found.flatten(1).isfinite().all(1)
                if bool(wrong.any()):
                    index = int(np.asarray(kept)[int(wrong.nonzero()[0])])
                    raise ValueError(
                        f"explanations: those of image {index} are not finite; is the image, and"
                        " is what the teacher answers?"
                    )
                if found.shape[2:] != self.shape[2:]:
                    found = _resized(found, (self.shape[2], self.shape[3]))
                maps[np.asarray(kept) - rows.start] = found.cpu().numpy().astype(self.dtype)
            self._put(number, maps)
            made += len(images)
            if progress is not None:
                progress(min(rows.stop, self.shape[0]), self.shape[0])
        return made

    def read(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Maps of the images at ``indices``, float32 ``[m, k, h, w]`` on the CPU.

        Raises:
            ValueError: an index whose maps are not there yet, or of no image.
        """
        rows = np.asarray(indices, dtype=np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.shape[0]:
            raise ValueError(
                f"indices: expected 0 to {self.shape[0] - 1}, got {rows.min()} to {rows.max()}"
            )
        missing = {int(n) for n in np.unique(rows // self.chunk)} - self._done.keys()
        if missing:
            raise ValueError(
                f"indices: {self.folder} has no maps of chunk {min(missing)} yet; call fill() first"
            )
        found = torch.from_numpy(np.asarray(self._mapped()[rows], dtype=np.float32))
        if tuple(found.shape[2:]) != self.image_size:
            found = _resized(found, self.image_size)
        return found

    def verify(self) -> list[int]:
        """Read every chunk again; returns the numbers of those that are not what was written."""
        return [n for n in sorted(self._done) if _digest(self._chunk(n)) != self._done[n]]

    def _rows(self, number: int) -> slice:
        return slice(number * self.chunk, min((number + 1) * self.chunk, self.shape[0]))

    def _chunk(self, number: int) -> np.ndarray[Any, Any]:
        return np.ascontiguousarray(self._mapped()[self._rows(number)])

    def _mapped(self, mode: str = "r") -> np.memmap[Any, Any]:
        # Opened for writing, a file that was cut short would be made longer.
        if self._maps is None or (mode == "r+" and self._maps.mode == "r"):
            self._maps = np.lib.format.open_memmap(self._file, mode=mode)  # type: ignore[no-untyped-call]
        assert self._maps is not None
        return self._maps

    def _put(self, number: int, maps: np.ndarray[Any, Any]) -> None:
        mapped = self._mapped("r+")
        mapped[self._rows(number)] = maps
        # The maps reach the disk before the line that says so.
        mapped.flush()
        digest = _digest(maps)
        line = json.dumps({"chunk": number, "sha256": digest}).encode() + b"\n"
        try:
            with self._journal.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise explained(error, self._journal, _AGAIN) from error
        self._done[number] = digest

    def _open(self) -> None:
        """Make ``_done`` what the journal says; begin one where there is none."""
        if not self._journal.exists():
            self._create()
            return
        lines = self._journal.read_bytes().split(b"\n")
        torn = len(lines[-1])
        try:
            head, *rest = (json.loads(line) for line in lines[:-1])
            if not isinstance(head, dict):
                raise TypeError("its first line holds no settings")
            done = {int(entry["chunk"]): str(entry["sha256"]) for entry in rest}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"explanations: {self._journal} is damaged ({error}); remove {self.folder} to"
                " compute the maps again"
            ) from error
        check_settings(head, self.identity, f"the explanations in {self.folder}")
        if torn:  # a crash cut the last line short
            with self._journal.open("r+b") as file:
                file.truncate(file.seek(0, 2) - torn)
        known = self._done
        self._done = {n: digest for n, digest in done.items() if 0 <= n < self.chunks}
        if self._done != known or self._maps is None:
            self._check_file()

    def _check_file(self) -> None:
        try:
            mapped = self._mapped()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"explanations: {self._file} is damaged or missing ({error}); remove"
                f" {self.folder} to compute the maps again"
            ) from error
        if mapped.shape != self.shape or mapped.dtype != self.dtype:
            raise ValueError(
                f"explanations: {self._file} holds {mapped.dtype} {list(mapped.shape)}, expected"
                f" {self.dtype} {list(self.shape)}; remove {self.folder} to compute the maps again"
            )
        wrong = self.verify()
        if wrong:
            raise ValueError(
                f"explanations: chunk {wrong[0]} of {self._file} is not what was written; remove"
                f" {self.folder} to compute the maps again"
            )

    def _create(self) -> None:
        check_folder(self.folder)
        make_folders(self.folder)
        # A file with holes: no more than what is written takes room.
        mapped = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
            self._file, mode="w+", dtype=self.dtype, shape=self.shape
        )
        mapped.flush()
        self._maps = mapped
        sync_folder(self.folder)
        put(self._journal, json.dumps(self.identity).encode() + b"\n", "cache")


def check_folder(folder: Path) -> None:
    """Raise ValueError for one that a cache can neither be made in nor lie in."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"explanations: {folder} is a file, expected a folder")
    names = [path.name for path in folder.glob("*")] if folder.is_dir() else []
    strangers = [name for name in names if name != "maps.npy" and not name.startswith(".")]
    if strangers and "maps.jsonl" not in names:
        raise ValueError(
            f"explanations: {folder} holds something else ({strangers[0]}); choose another folder"
        )


def _digest(maps: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(maps).tobytes()).hexdigest()


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
