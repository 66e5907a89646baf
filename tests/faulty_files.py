"""A disk that fails on demand: the k-th thing that a program asks of the files below a folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType
from typing import Any

# "ENOSPC" and "killed" are in "torn" and "killed in a write", but for writes that fail whole.
KINDS = ("EIO", "torn", "dead", "killed in a write")
COUNTED = ("open", "write", "fsync", "ftruncate", "replace", "mkdir", "rmdir", "unlink")


class Killed(BaseException):
    """What a killed process does after the moment of its death: nothing, not even clean up."""


class FaultyFiles:
    """Patches ``os`` for files below ``root``; leaving the ``with`` block undoes it.

    ``COUNTED`` calls count; of ``open`` those for writing and those of folders.

    kind:
        "EIO", "ENOSPC": call ``at`` raises it.
        "torn": call ``at``, if it is a write, takes half of the bytes, and the next write ENOSPC;
            another call raises ENOSPC.
        "dead": call ``at`` and all after it raise EIO, so that nothing can be cleaned up.
        "killed": call ``at`` never happens and nothing happens after it.
        "killed in a write": the same, but a write takes half of the bytes first.
        "brief": every write takes at most 7 bytes; nothing fails.
    """

    def __init__(self, root: Path, kind: str = "EIO", at: int = 0) -> None:
        self.root, self.kind, self.at = os.fspath(root), kind, at
        self.calls: list[str] = []
        self.fired = False
        self._torn = -1
        self._real = {name: getattr(os, name) for name in COUNTED}

    def __enter__(self) -> FaultyFiles:
        for name in COUNTED:
            setattr(os, name, getattr(self, f"_{name}"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)

    def _below(self, path: Any) -> bool:
        text = isinstance(path, str)
        return text and (path == self.root or path.startswith(self.root + os.sep))

    def _count(self, what: str, where: Any) -> bool:
        """Count a call, or make it fail; whether it is to be counted."""
        path: Any = f"/proc/self/fd/{where}"
        path = os.readlink(path) if isinstance(where, int) else os.fspath(where)
        if not self._below(path):
            return False
        over = self.fired and self.kind.startswith("killed")
        if over:
            raise Killed
        self.calls.append(f"{what} {os.path.relpath(path, self.root)}")
        if what == "write" and where == self._torn:
            self._torn = -1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        due = 0 < self.at <= len(self.calls) and (self.kind == "dead" or not self.fired)
        if self.kind == "brief" or not due:
            return True
        self.fired = True
        if self.kind in ("torn", "killed in a write") and what == "write":
            self._torn = where
            return True
        if self.kind.startswith("killed"):
            raise Killed
        number = errno.ENOSPC if self.kind in ("ENOSPC", "torn") else errno.EIO
        raise OSError(number, os.strerror(number))

    def _open(self, path: Any, flags: int, *more: Any, **others: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) or os.path.isdir(path):
            self._count("open", path)
        file: int = self._real["open"](path, flags, *more, **others)
        return file

    def _write(self, file: int, data: Any) -> int:
        already = self._torn
        if self._count("write", file):
            if self.kind == "brief":
                data = data[:7]
            if self._torn != already and self._torn == file:
                taken: int = self._real["write"](file, data[: max(1, len(data) // 2)])
                if self.kind == "killed in a write":
                    raise Killed
                return taken
        written: int = self._real["write"](file, data)
        return written

    def _fsync(self, file: int) -> None:
        # Nothing is synced: no power is cut here, and disks are slow.
        self._count("fsync", file)

    def _ftruncate(self, file: int, size: int) -> None:
        self._count("ftruncate", file)
        self._real["ftruncate"](file, size)

    def _replace(self, old: Any, new: Any, **more: Any) -> None:
        self._count("replace", new)
        self._real["replace"](old, new, **more)

    def _mkdir(self, path: Any, *more: Any, **others: Any) -> None:
        self._count("mkdir", path)
        self._real["mkdir"](path, *more, **others)

    def _rmdir(self, path: Any, **more: Any) -> None:
        self._count("rmdir", path)
        self._real["rmdir"](path, **more)

    def _unlink(self, path: Any, **more: Any) -> None:
        self._count("unlink", path)
        self._real["unlink"](path, **more)
