"""Shards of WebDataset: tar files whose members, grouped by name, are samples.

Every shard's headers are read once; afterwards any sample is one read at a known offset. Nothing
is extracted, unpickled or run, and only local files are opened.
"""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from torch import Tensor

from fastxkd._extras import require
from fastxkd.runs.names import Names, printable
from fastxkd.runs.pictures import EXTENSIONS, open_file, read_image
from fastxkd.runs.sources import Settings, Source
from fastxkd.runs.tar import Damaged, Member, members

_IMAGES = {extension[1:] for extension in EXTENSIONS}
_LABELS = ("cls", "json")
_LABEL_KEYS = ("label", "cls", "class", "target")
_LABEL_BYTES = 1 << 20
_MOST_SHARDS = 1_000_000
_WHOLE = re.compile(r"-?[0-9]{1,18}")
_META = re.compile(rb"__[^/]*__($|/)")
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class ShardSource(Source):
    """Samples of tar files in the order of the shards and of the members in them."""

    def __init__(self, spec: str, paths: Sequence[str], settings: Settings) -> None:
        require("PIL.Image", extra="cli")  # now, rather than as the failure of every image
        self._paths = list(paths)
        self._stamps: list[tuple[int, int]] = []
        self._shards, self._kinds = array("i"), array("b")
        self._images, self._label_places = array("q"), array("q")
        self._problems: dict[int, str] = {}
        self._names = Names(self._index())
        if len(self._problems) == len(self._names) and self._problems:
            reason = self._problems[0]
            raise ValueError(
                f"data: no image in the {len(paths)} shard(s) of {spec}; the first: "
                f"{self.name(0)}: {reason}"
            )
        size, channels = settings.image_size or 224, settings.channels or 3
        super().__init__(spec, len(self._names), None, (channels, size, size), settings)

    def name(self, index: int) -> str:
        return printable(self._names[index])

    def _index(self) -> Iterator[bytes]:
        """Fill the arrays, one entry per sample, and hand out the samples' names."""
        parents = os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in self._paths])
        for shard, path in enumerate(self._paths):
            shown = os.fsencode(os.path.relpath(os.path.abspath(path), parents))
            with _open_shard(path) as file:
                state = os.fstat(file.fileno())
                self._stamps.append((state.st_size, state.st_mtime_ns))
                for sample in _samples(file.fileno()):
                    if sample.problem is not None:
                        self._problems[len(self._shards)] = sample.problem
                    self._shards.append(shard)
                    self._images.extend(sample.image)
                    self._label_places.extend(sample.label)
                    self._kinds.append(sample.label_kind)
                    yield shown + b"/" + sample.name if sample.name else shown

    def _read(self, index: int) -> tuple[Tensor, int | None]:
        if index in self._problems:
            raise ValueError(self._problems[index])
        shard = self._shards[index]
        with open_file(self._paths[shard]) as file:
            state = os.fstat(file.fileno())
            if (state.st_size, state.st_mtime_ns) != self._stamps[shard]:
                raise ValueError("its shard was changed after this run had read what is in it")
            start, size = self._images[2 * index : 2 * index + 2]
            limit = self.settings.max_pixels
            # 16-bit RGBA, not compressed at all, is the most that so many pixels can take.
            if size > 8 * limit + (1 << 20):
                raise ValueError(f"{size:,} bytes, more than {limit:,} pixels can take")
            content = _exactly(file.fileno(), size, start)
            label = self._label(file.fileno(), index)
        channels, side, _ = self.shape
        pixels = read_image(io.BytesIO(content), side, channels=channels, max_pixels=limit)
        return pixels, label

    def _label(self, descriptor: int, index: int) -> int | None:
        kind = self._kinds[index]
        if kind < 0:
            return None
        start, size = self._label_places[2 * index : 2 * index + 2]
        if size > _LABEL_BYTES:
            raise ValueError(f"a label ({_LABELS[kind]}) of {size:,} bytes")
        content = _exactly(descriptor, size, start)
        if _LABELS[kind] == "cls":
            text = content.decode("ascii", "replace").strip()
            if not _WHOLE.fullmatch(text):
                raise ValueError(f"expected a whole number as label (cls), got {text[:40]!r}")
            label: int | None = int(text)
        else:
            label = _json_label(content)
        return label if label is not None and label >= 0 else None

    def describe(self) -> dict[str, Any]:
        places = hashlib.sha256(self._names.digest().encode("ascii"))
        for column in (self._shards, self._images, self._label_places, self._kinds):
            places.update(column.tobytes())
        return {
            **super().describe(),
            "shards": len(self._paths),
            "fingerprint": places.hexdigest(),
        }


def open_shards(spec: str, settings: Settings) -> ShardSource:
    """Open ``webdataset:SHARDS``, plain tar files found by glob (``*``) or by brackets.

    ``{000..012}`` counts with as many digits as were written, ``{a,b}`` lists. Members are one
    sample as WebDataset has it: neighbours whose paths are equal up to the first dot of the file
    name. Its image is the first member with an image's extension; its label is ``.cls`` (a whole
    number) or ``label``, ``cls``, ``class`` or ``target`` in ``.json`` (a whole number, or one as
    text); other members, pickles (``.pyd``, ``.pth``) among them, are never opened.

    A sample without an image, with a member twice, with a link or a device among its members, or
    with a path that is absolute or climbs (``..``) is an error of that image. So is the end of a
    shard that is cut off or damaged: one image stands for what may have been lost there.

    The index takes about 50 bytes a sample and the length of its name.

    Raises:
        ValueError: no shard, a shard that is missing, compressed or no regular file, no images.
    """
    pattern = spec.partition(":")[2]
    if re.match(r"[a-z0-9]+://|pipe:", pattern):
        raise ValueError(f"data: only local shards can be read, got {pattern!r}")
    paths: list[str] = []
    for name in _expand(os.path.expanduser(pattern)):
        found = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name]
        if not found or not os.path.exists(found[0]):
            raise ValueError(f"data: no shard {printable(name)}")
        paths.extend(found)
    return ShardSource(spec, paths, settings)


def _expand(pattern: str) -> Iterator[str]:
    """Every name that ``{000..012}`` and ``{a,b}`` in ``pattern`` stand for.

    >>> list(_expand("{a,b}-{08..10}.tar"))[:4]
    ['a-08.tar', 'a-09.tar', 'a-10.tar', 'b-08.tar']
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[Sequence[str]] = []
    names = 1
    for at, part in enumerate(parts):
        if at % 2 == 0:
            choices.append([part])
            continue
        counted = re.fullmatch(r"([0-9]{1,12})\.\.([0-9]{1,12})", part)
        if counted:
            first, last = int(counted[1]), int(counted[2])
            padded = any(digits[0] == "0" and len(digits) > 1 for digits in counted.groups())
            width = max(map(len, counted.groups())) if padded else 1
            length = max(0, last - first + 1)
            if names * length <= _MOST_SHARDS:
                choices.append([f"{number:0{width}d}" for number in range(first, last + 1)])
        elif "," in part:
            choices.append(part.split(","))
            length = len(choices[-1])
        else:
            choices.append([f"{{{part}}}"])
            length = 1
        names *= length
        if not 0 < names <= _MOST_SHARDS:
            raise ValueError(f"data: {pattern!r} stands for {names:,} shards")
    return map("".join, itertools.product(*choices))


def _open_shard(path: str) -> Any:
    try:
        file = open_file(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"data: the shard {printable(path)} cannot be read: {reason}") from error
    start = os.pread(file.fileno(), 8, 0)
    packed = next((name for magic, name in _PACKED.items() if start.startswith(magic)), None)
    if packed is not None:
        file.close()
        raise ValueError(
            f"data: the shard {printable(path)} is compressed ({packed}), so its images cannot be "
            "read one by one; unpack it to a plain .tar"
        )
    return file


class _Group:
    """Members seen so far of the sample being read."""

    def __init__(self, key: bytes, first: bytes) -> None:
        self.key, self.name = key, first
        self.parts: dict[str, Member] = {}
        self.problem: str | None = None
        self.image = self.label = (0, 0)
        self.label_kind = -1

    def add(self, suffix: str, member: Member) -> None:
        shown = printable(member.name)
        if member.problem is not None:
            self.problem = self.problem or f"its member {shown} is {member.problem}"
        elif _climbs(member.name):
            self.problem = self.problem or "a path that leaves the folder it would be unpacked in"
        elif suffix in self.parts:
            self.problem = self.problem or f"two members are named {shown}"
        self.parts.setdefault(suffix, member)

    def finished(self) -> _Group:
        """With ``image`` and ``label`` chosen, or the problem that prevents it."""
        suffixes = [suffix for suffix in self.parts if suffix in _IMAGES]
        # "input.png" is an image too if there is no plain "png".
        suffixes += [s for s in self.parts if s not in _IMAGES and s.rpartition(".")[2] in _IMAGES]
        if suffixes:
            image = self.parts[suffixes[0]]
            self.name, self.image = image.name, (image.start, image.size)
        elif self.problem is None:
            self.problem = f"no image among its members ({', '.join(self.parts)})"
        for kind, suffix in enumerate(_LABELS):
            if suffix in self.parts and self.label_kind < 0:
                label = self.parts[suffix]
                self.label, self.label_kind = (label.start, label.size), kind
        return self


def _samples(descriptor: int) -> Iterator[_Group]:
    group: _Group | None = None
    try:
        for member in members(descriptor):
            folder, slash, file = member.name.rpartition(b"/")
            stem, dot, suffix = file.partition(b".")
            if not dot or not stem or _META.match(member.name):
                continue
            key = folder + slash + stem
            if group is None or key != group.key:
                if group is not None:
                    yield group.finished()
                group = _Group(key, member.name)
            group.add(printable(suffix).lower(), member)
    except Damaged as error:
        if group is not None:
            yield group.finished()
        group = _Group(b"", b"")
        group.problem = f"{error}; whatever came after that is lost"
        yield group
    else:
        if group is not None:
            yield group.finished()


def _climbs(name: bytes) -> bool:
    path = PurePosixPath(os.fsdecode(name))
    return path.is_absolute() or ".." in path.parts


def _exactly(descriptor: int, size: int, start: int) -> bytes:
    parts = []
    while size:
        part = os.pread(descriptor, min(size, 1 << 30), start)
        if not part:
            raise ValueError("its shard ends in the middle of it")
        parts.append(part)
        start, size = start + len(part), size - len(part)
    return b"".join(parts)


def _json_label(content: bytes) -> int | None:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its label (json) cannot be read: {error}") from None
    if isinstance(found, dict):
        found = next((found[key] for key in _LABEL_KEYS if key in found), None)
    if isinstance(found, str) and _WHOLE.fullmatch(found):
        return int(found)
    return found if isinstance(found, int) and not isinstance(found, bool) else None
