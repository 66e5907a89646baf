"""Where the members of a tar file lie: headers only, nothing is extracted and nothing trusted.

Python's ``tarfile`` believes what a header says: a size below zero sends some versions round in
circles, and an extended header of any size is read into memory. What is needed here is little:
names, offsets and sizes of regular files, and a clear word where a file stops making sense.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Damaged", "Member", "members"]

_BLOCK = 512
_LONGEST_EXTENSION = 1 << 20
_REGULAR, _FOLDER = (b"0", b"\0", b"7"), b"5"
KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a named pipe",
}


class Damaged(Exception):
    """The file is no tar file from ``offset`` on."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(offset, reason)
        self.offset, self.reason = offset, reason

    def __str__(self) -> str:
        return f"{self.reason} (byte {self.offset:,})"


class Member(NamedTuple):
    """``problem`` says why the content cannot be used; then ``start`` and ``size`` mean nothing."""

    name: bytes
    start: int
    size: int
    problem: str | None = None


def members(descriptor: int) -> Iterator[Member]:
    """Everything but folders in an open, uncompressed tar file (ustar, GNU, pax), in order.

    Raises:
        Damaged: after the last member that could be found, if the file goes wrong there.
    """
    length = os.fstat(descriptor).st_size
    position = 0
    long_name: bytes | None = None
    extended: dict[bytes, bytes] = {}
    while True:
        head = os.pread(descriptor, _BLOCK, position)
        if len(head) < _BLOCK:
            what = "empty" if not length else "cut off: it has no end mark"
            raise Damaged(position, f"the file is {what}")
        if not any(head):
            return
        _check_sum(head, position)
        kind = head[156:157]
        size = _number(head[124:136], position)
        if b"size" in extended and kind not in b"xgLK":
            size = _decimal(extended[b"size"], position)
        start = position + _BLOCK
        if kind in KINDS or kind == _FOLDER:
            # Whatever size these give, no content follows.
            size = 0
        if start + size > length:
            raise Damaged(position, f"a member of {size:,} bytes goes past the end of the file")
        following = start + -(-size // _BLOCK) * _BLOCK
        if kind in (b"x", b"g", b"L", b"K"):
            if size > _LONGEST_EXTENSION:
                raise Damaged(position, f"an extended header of {size:,} bytes")
            content = os.pread(descriptor, size, start)
            if kind == b"L":
                long_name = content.partition(b"\0")[0]
            elif kind == b"x":
                extended = _records(content, position)
            elif kind == b"g" and {b"path", b"size"} & set(_records(content, position)):
                raise Damaged(position, "a global header that renames or resizes all members")
        else:
            name = extended.get(b"path", long_name or _name(head))
            if kind == b"\0" and name.endswith(b"/"):
                kind = _FOLDER
            problem = KINDS.get(kind)
            if kind == b"S" or any(key.startswith(b"GNU.sparse") for key in extended):
                problem = "a sparse file"
            elif problem is None and kind not in _REGULAR and kind != _FOLDER:
                problem = f"of the unknown kind {kind!r}"
            if kind != _FOLDER:
                yield Member(name, start, size, problem)
            long_name, extended = None, {}
        position = following


def _check_sum(head: bytes, position: int) -> None:
    stored = _number(head[148:156], position)
    rest = head[:148] + b" " * 8 + head[156:]
    # Some old programs summed signed bytes.
    if stored != sum(rest) and stored != sum(rest) - 256 * sum(byte > 127 for byte in rest):
        raise Damaged(position, "no tar header where one should be")


def _number(field: bytes, position: int) -> int:
    """Octal digits, or base 256 after a first byte of 0x80 for what is too large for them."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if any(digit not in b"01234567" for digit in digits):
        raise Damaged(position, "no tar header where one should be")
    return int(digits, 8) if digits else 0


def _decimal(digits: bytes, position: int) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise Damaged(position, "an extended header whose size is no number")
    return int(digits)


def _name(head: bytes) -> bytes:
    name, prefix = head[:100].partition(b"\0")[0], head[345:500].partition(b"\0")[0]
    return prefix + b"/" + name if prefix and head[257:263] == b"ustar\0" else name


def _records(content: bytes, position: int) -> dict[bytes, bytes]:
    """The ``length key=value`` lines of a pax header."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(content) and content[at]:
        blank = content.find(b" ", at, at + 20)
        digits = content[at:blank]
        end = at + (int(digits) if digits.isdigit() else 0)
        key, equals, value = content[blank + 1 : max(end - 1, 0)].partition(b"=")
        if not at < blank < end <= len(content) or not equals:
            raise Damaged(position, "an extended header that cannot be read")
        found[key] = value
        at = end
    return found
