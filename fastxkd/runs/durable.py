"""Files that survive: whole or absent after a crash, and a lock that dies with its holder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

AGAIN = "then run the same command again: it continues after the last whole chunk"
_REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room or ask for a larger quota",
    errno.EACCES: "give this user the right to write there",
    errno.EROFS: "choose a folder on a disk that can be written",
    errno.EIO: "the disk or the way to it failed: mend it",
}
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


class Stamp(NamedTuple):
    """What tells a file from a damaged one."""

    size: int
    sha256: str


def explained(error: OSError, path: Path, again: str = AGAIN) -> OSError:
    """The same error, naming the file and what to do about it."""
    remedy = f"{_REMEDIES.get(error.errno or 0, 'mend that')}, {again}"
    reason = error.strerror or str(error) or type(error).__name__
    return OSError(error.errno or errno.EIO, f"{reason}; {remedy}", str(path))


def put(path: Path, content: bytes | Iterable[bytes], mark: str) -> Stamp:
    """Write a file so that a crash at any moment leaves the old one, the new one, or none.

    ``mark`` tells this writer's unfinished files from another's. When this returns, the file
    and its name have reached the disk.

    Raises:
        OSError: the unfinished file is gone (or is removed at the next start).
    """
    unfinished = path.with_name(f".{path.name}.{mark}.tmp")
    digest, size = hashlib.sha256(), 0
    try:
        try:
            file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _NO_LINKS, 0o666)
            try:
                for piece in (content,) if isinstance(content, bytes) else content:
                    write_all(file, piece)
                    digest.update(piece)
                    size += len(piece)
                os.fsync(file)
            finally:
                os.close(file)
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise explained(error, path) from error
    return Stamp(size, digest.hexdigest())


def write_all(file: int, data: bytes) -> None:
    """``os.write`` until everything is written: the system may take less at a time."""
    left = memoryview(data)
    while left:
        taken = os.write(file, left)
        if taken <= 0:
            raise OSError(errno.EIO, "the system took no byte and gave no reason")
        left = left[taken:]


def sync_folder(folder: Path) -> None:
    """Names are in the folder, and the folder must reach the disk, too."""
    file = os.open(folder, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        os.fsync(file)
    finally:
        os.close(file)


def make_folders(folder: Path) -> None:
    """``folder`` and what is missing above it, on the disk when this returns."""
    if folder.is_dir():
        return
    make_folders(folder.parent)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise explained(error, folder) from error


def remove(path: Path) -> None:
    """Unlink, if it is there."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    except OSError as error:
        raise explained(error, path) from error


def open_regular(path: Path) -> int:
    """A descriptor for reading; links, pipes and devices are refused before they can block.

    Raises:
        ValueError: the file is missing or is no regular file.
    """
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _NO_LINKS)
    except OSError as error:
        linked = "it is a symbolic link" if path.is_symlink() else error.strerror
        raise ValueError(f"{path}: cannot be read ({linked})") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ValueError(f"{path}: expected a regular file")
    return file


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a small file.

    Raises:
        ValueError: missing, no regular file, or more than ``limit`` bytes.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        # A file with holes can claim any size: look before anything is allocated.
        size = os.fstat(file.fileno()).st_size
        content = file.read(limit + 1) if size <= limit else b""
    if max(size, len(content)) > limit:
        raise ValueError(f"{path}: expected at most {limit:,} bytes")
    return content


def stamp_of(path: Path) -> Stamp:
    """Size and SHA-256 of a file, read in pieces.

    Raises:
        ValueError: missing, no regular file, or unreadable.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
                size += len(piece)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    return Stamp(size, digest.hexdigest())


class Log:
    """A file that only grows, by whole lines that are on the disk when ``add`` returns."""

    def __init__(self, path: Path) -> None:
        self.path, self._size, self._broken = path, 0, False
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | _NO_LINKS
            self._file = os.open(path, flags, 0o666)
            try:
                sync_folder(path.parent)
            except OSError:
                self.close()
                os.unlink(path)
                raise
        except OSError as error:
            raise explained(error, path) from error

    def add(self, line: bytes) -> None:
        if self._broken:
            raise OSError(
                errno.EIO, f"an earlier line was cut short; mend the disk, {AGAIN}", str(self.path)
            )
        try:
            write_all(self._file, line)
            os.fsync(self._file)
        except BaseException as error:
            # What follows a torn line would be torn as well.
            try:
                os.ftruncate(self._file, self._size)
            except OSError:
                self._broken = True
            if isinstance(error, OSError):
                raise explained(error, self.path) from error
            raise
        self._size += len(line)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


class Lock:
    """A file lock that several processes of one job hold together, and no other job beside them.

    Rank 0 takes it alone, which succeeds only if nobody of any job is left; it writes who it is
    into the file and then shares it. The other ranks wait for those words and share it, too. The
    system drops a process's part when the process ends, however it ends.
    """

    _held: ClassVar[weakref.WeakSet[Lock]] = weakref.WeakSet()

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, -1

    def _attempt(self, mode: int, *, create: bool) -> bool:
        import fcntl

        flags = os.O_RDWR | (os.O_CREAT if create else 0) | _NO_LINKS
        try:
            self._file = os.open(self.path, flags, 0o666)
            try:
                fcntl.flock(self._file, mode | fcntl.LOCK_NB)
            except BlockingIOError:
                self.release()
                return False
            # Whoever finished just now has removed the file, and this is a lock on nothing.
            if os.stat(self.path).st_ino != os.fstat(self._file).st_ino:
                self.release()
                return False
        except FileNotFoundError:
            self.release()
            return False
        except OSError as error:
            self.release()
            raise explained(error, self.path) from error
        self._held.add(self)
        return True

    def take(self, patience: float) -> None:
        """Alone, or not at all.

        Raises:
            ValueError: somebody else holds it after ``patience`` seconds (a killed process may
                need a moment to be gone).
        """
        import fcntl

        latest = time.monotonic() + patience
        while not self._attempt(fcntl.LOCK_EX, create=True):
            if time.monotonic() > latest:
                holder = self.read()
                who = f" (process {holder['process']} on {holder['host']})" if holder else ""
                raise ValueError(
                    f"out: another run{who} is writing in {self.path.parent}; wait until it ends, "
                    "or choose another folder"
                )
            time.sleep(0.02)

    def share(self, words: dict[str, Any]) -> None:
        """From alone to together with those who know ``words["token"]``.

        Raises:
            ValueError: another writer slipped in between.
        """
        import fcntl

        try:
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)
            write_all(self._file, json.dumps(words).encode() + b"\n")
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ValueError(f"out: another run is writing in {self.path.parent}") from None
        except OSError as error:
            self.release()
            raise explained(error, self.path) from error

    def join(self, token: str, patience: float) -> dict[str, Any]:
        """Wait for rank 0 to share the lock under ``token``; returns its words.

        Raises:
            ValueError: it did not within ``patience`` seconds.
        """
        import fcntl

        latest = time.monotonic() + patience
        # The words come first: trying the lock before they are there could keep rank 0 out.
        while self.read().get("token") != token or not self._attempt(fcntl.LOCK_SH, create=False):
            if time.monotonic() > latest:
                raise ValueError(
                    f"token: no rank 0 with this token came to {self.path.parent} within "
                    f"{patience:.0f} s; every start needs a token of its own that all ranks share"
                )
            time.sleep(0.02)
        words = self.read()
        if words.get("token") != token:
            self.release()
            raise ValueError(f"out: another run is writing in {self.path.parent}")
        return words

    def read(self) -> dict[str, Any]:
        """What the holder wrote; empty if nothing (whole) is there."""
        try:
            words = json.loads(read_regular(self.path, 1 << 24))
        except (ValueError, RecursionError):
            return {}
        needed = {"token": str, "process": int, "host": str, "start": int, "again": list}
        whole = isinstance(words, dict) and all(
            isinstance(words.get(name), kind) for name, kind in needed.items()
        )
        return words if whole else {}

    def release(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1
        self._held.discard(self)

    def __del__(self) -> None:
        self.release()

    @classmethod
    def _forget(cls) -> None:
        for lock in list(cls._held):
            lock.release()


if hasattr(os, "register_at_fork"):
    # A child (a DataLoader worker, say) must not keep a lock alive that its parent died with.
    os.register_at_fork(after_in_child=Lock._forget)
