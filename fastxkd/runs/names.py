"""A million file names without a million Python strings."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable

__all__ = ["Names", "printable"]


class Names:
    """An immutable sequence of byte strings in two blocks of memory.

    A Python string costs about 50 bytes beside its text, and touching it after a fork copies the
    page it lies on, because its reference count does. Two blocks cost their text and 8 bytes a
    name, and forked workers share them.

    >>> names = Names([b"cat/1.png", b"dog/2.png"])
    >>> len(names), names[1]
    (2, b'dog/2.png')
    """

    def __init__(self, names: Iterable[bytes] = ()) -> None:
        self._text, self._ends = bytearray(), array("q")
        for name in names:
            self._text += name
            self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self._ends):
            raise IndexError(f"index: expected 0 to {len(self._ends) - 1}, got {index}")
        return bytes(self._text[self._ends[index - 1] if index else 0 : self._ends[index]])

    def digest(self) -> str:
        """SHA-256 of the names and where one ends and the next begins."""
        found = hashlib.sha256(self._text)
        found.update(self._ends.tobytes())
        return found.hexdigest()


def printable(name: str | bytes) -> str:
    r"""``name`` as text for any encoder and any terminal: the rest becomes escapes.

    >>> printable(b"caf\xe9\x1b[2J.png")
    'caf\\xe9\\x1b[2J.png'
    """
    text = name if isinstance(name, str) else name.decode("utf-8", "surrogateescape")
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # a byte that is no UTF-8, as Python holds it in a name
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
