"""What lies where in the directory of a run over a data set, and how its files are packed.

Everything here is computed from a few numbers in ``run.json``. A reader that takes no path, size or
codec from any other file cannot be led astray by one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from fastxkd._extras import require

FORMAT = 1
RUN, JOURNAL, STARTS, ERRORS, LOCK = "run.json", "journal.jsonl", "journal", "errors.jsonl", ".lock"
MAPS, SCORES, REPORT = "maps", "scores", "report.html"
OURS = (RUN, JOURNAL, STARTS, ERRORS, LOCK, MAPS, SCORES, REPORT)
UNFINISHED = re.compile(r"\..+\.\d+-\d+\.tmp")

FILL: dict[str, Any] = {
    "uint8": 0,
    "float16": float("nan"),
    "float32": float("nan"),
    "float64": float("nan"),
}
COLUMNS = ("string", "int64", "float32", "float64", "bool")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}){0,7}")
# Everything above is a damaged or hostile file, and nobody's run.
_MOST_IMAGES, _MOST_PER_CHUNK, _MOST_NAMES = 10**11, 1 << 20, 1000
_CHUNK_BYTES = 1 << 31
_BLOCK_BYTES = 1 << 20
ABSENT = 2**64 - 1
_LEVEL = 1
RUN_BYTES = 1 << 26


class Array(NamedTuple):
    """One array of a run: ``shape`` of the part that belongs to one image, and its ``dtype``.

    dtype: "float16", "float32", "float64" (a failed image is NaN) or "uint8" (it is 0).
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def image_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize) * math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The sizes that decide where everything is.

    Raises:
        ValueError: a number or name that is none, or out of all proportion.
    """

    images: int
    chunk: int
    arrays: dict[str, Array]
    columns: dict[str, str]

    def __post_init__(self) -> None:
        _whole("images", self.images, _MOST_IMAGES)
        _whole("chunk", self.chunk, _MOST_PER_CHUNK)
        _names("arrays", self.arrays)
        _names("columns", self.columns)
        for name, array in self.arrays.items():
            if array.dtype not in FILL:
                raise ValueError(
                    f"arrays: {name} has dtype {array.dtype!r}, expected {', '.join(FILL)}"
                )
            if len(array.shape) > 8:
                raise ValueError(f"arrays: {name} has {len(array.shape)} dimensions per image")
            for size in array.shape:
                _whole(f"arrays: {name}", size, _CHUNK_BYTES)
            if self.chunk * array.image_bytes > _CHUNK_BYTES:
                raise ValueError(
                    f"chunk: {self.chunk} images of {name}, {list(array.shape)} {array.dtype}, "
                    f"are {self.chunk * array.image_bytes / 2**30:.1f} GiB; expected at most 2 GiB "
                    "per chunk"
                )
            inside = [other for other in self.arrays if other.startswith(f"{name}/")]
            if inside:
                raise ValueError(f"arrays: {inside[0]} would lie inside the array {name}")
        for name, kind in self.columns.items():
            if kind not in COLUMNS:
                raise ValueError(f"columns: {name} is {kind!r}, expected {', '.join(COLUMNS)}")
        if "index" in self.columns:
            raise ValueError("columns: 'index' is added by the run itself")

    @property
    def chunks(self) -> int:
        return -(-self.images // self.chunk)

    def rows(self, chunk: int) -> range:
        """The images of a chunk."""
        if not 0 <= chunk < self.chunks:
            raise ValueError(f"chunk: expected 0 to {self.chunks - 1}, got {chunk}")
        return range(chunk * self.chunk, min((chunk + 1) * self.chunk, self.images))

    def map_file(self, name: str, chunk: int) -> str:
        key = ".".join(["c", str(chunk), *("0" for _ in self.arrays[name].shape)])
        return f"{MAPS}/{name}/{key}"

    def score_file(self, chunk: int) -> str:
        return f"{SCORES}/{chunk:08d}.parquet"

    def files(self, chunk: int) -> list[str]:
        """Every file of a chunk, relative to the run."""
        maps = [self.map_file(name, chunk) for name in self.arrays]
        return [*maps, self.score_file(chunk)]

    def folders(self) -> list[str]:
        """The folders that files of chunks are in."""
        return [*(f"{MAPS}/{name}" for name in self.arrays), SCORES]

    def block(self, name: str) -> int:
        """Images that are packed together: a divisor of the chunk, near a megabyte.

        One image can then be read without unpacking its whole chunk.
        """
        most = _BLOCK_BYTES // self.arrays[name].image_bytes
        if self.chunk <= most:
            return self.chunk
        return max(size for size in range(1, max(1, most) + 1) if self.chunk % size == 0)

    def documents(self) -> dict[str, bytes]:
        """Path -> content of the Zarr metadata: groups and arrays."""
        parents = {
            "/".join(name.split("/")[:depth])
            for name in self.arrays
            for depth in range(name.count("/") + 1)
        }
        group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
        found = {
            "/".join(filter(None, (MAPS, parent, "zarr.json"))): _document(group)
            for parent in sorted(parents)
        }
        for name in self.arrays:
            found[f"{MAPS}/{name}/zarr.json"] = _document(self._array(name))
        return found

    def _array(self, name: str) -> dict[str, Any]:
        shape, dtype = self.arrays[name]
        plain: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
        packed = {"name": "zstd", "configuration": {"level": _LEVEL, "checksum": True}}
        sharded = {
            "chunk_shape": [self.block(name), *shape],
            "codecs": [plain if dtype != "uint8" else {"name": "bytes"}, packed],
            "index_codecs": [plain],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [self.images, *shape],
            "data_type": dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.chunk, *shape]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": FILL[dtype] if dtype == "uint8" else "NaN",
            "codecs": [{"name": "sharding_indexed", "configuration": sharded}],
            "attributes": {},
        }

    def to_json(self) -> dict[str, Any]:
        arrays = {
            name: {"shape": list(array.shape), "dtype": array.dtype}
            for name, array in self.arrays.items()
        }
        return {
            "images": self.images,
            "chunk": self.chunk,
            "arrays": arrays,
            "columns": dict(self.columns),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Layout:
        try:
            arrays = {
                name: Array(tuple(array["shape"]), array["dtype"])
                for name, array in content["arrays"].items()
            }
            columns = dict(content["columns"].items())
            if not all(isinstance(kind, str) for kind in columns.values()):
                raise TypeError("columns: expected names of types")
            if not all(isinstance(array.dtype, str) for array in arrays.values()):
                raise TypeError("arrays: expected names of types")
            images, chunk = content["images"], content["chunk"]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the sizes of a run ({error!r})") from error
        return cls(images, chunk, arrays, columns)


def parse_run(path: Path, content: bytes) -> tuple[Layout, dict[str, Any]]:
    """The sizes in ``run.json``, and all of it.

    Raises:
        ValueError: damaged, or not of a run over a data set; names the file.
    """
    try:
        whole = json.loads(content)
        if not isinstance(whole, dict) or "arrays" not in whole:
            raise ValueError("it is not the run.json of a run over a data set")
        if whole.get("format") != FORMAT:
            raise ValueError(f"it has format {whole.get('format')!r}, expected {FORMAT}")
        if not isinstance(whole.get("settings"), dict) or not isinstance(whole.get("facts"), dict):
            raise ValueError("it has no settings or no facts")
        return Layout.from_json(whole), whole
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def pack(values: np.ndarray[Any, Any], array: Array, block: int, blocks: int) -> list[bytes]:
    """The images of a chunk as the bytes of its file: packed blocks, then where each one is."""
    compress = require("numcodecs.zstd", extra="runs").compress
    index = np.full((blocks, 2), ABSENT, np.dtype("<u8"))
    pieces, offset = [], 0
    little = np.dtype(array.dtype).newbyteorder("<")
    for number, start in enumerate(range(0, len(values), block)):
        part = np.ascontiguousarray(values[start : start + block], little)
        if len(part) < block:
            whole = np.full((block, *array.shape), FILL[array.dtype], little)
            whole[: len(part)] = part
            part = whole
        pieces.append(compress(part.reshape(-1).view(np.uint8), _LEVEL, True))
        index[number] = offset, len(pieces[-1])
        offset += len(pieces[-1])
    return [*pieces, index.tobytes()]


def unpack(data: bytes, array: Array, block: int) -> np.ndarray[Any, Any]:
    """One block as [block, *shape].

    Raises:
        ValueError: damaged, or of another size than it should have.
    """
    wanted = block * array.image_bytes
    if _content_size(data) != wanted:
        raise ValueError(f"expected a Zstandard frame of {wanted:,} bytes")
    values = np.empty(wanted, np.uint8)
    try:
        require("numcodecs.zstd", extra="runs").decompress(data, values)
    except (RuntimeError, ValueError) as error:
        raise ValueError(str(error)) from error
    little = np.dtype(array.dtype).newbyteorder("<")
    native: np.ndarray[Any, Any] = values.view(little).astype(array.dtype, copy=False)
    return native.reshape(block, *array.shape)


def _content_size(data: bytes) -> int | None:
    """What a Zstandard frame says it holds (RFC 8878, 3.1.1.1), before anything is unpacked."""
    if data[:4] != b"\x28\xb5\x2f\xfd" or len(data) < 6:
        return None
    descriptor = data[4]
    single, kind = descriptor >> 5 & 1, descriptor >> 6
    size = (single, 2, 4, 8)[kind]
    start = 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    field = data[start : start + size]
    if not size or len(field) < size:
        return None
    return int.from_bytes(field, "little") + (256 if size == 2 else 0)


def ranges(numbers: Iterable[int]) -> str:
    """``1, 3-5, 9``: the first few of these numbers, for messages."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return _listed(found)


def gaps(present: Iterable[int], start: int, stop: int) -> str:
    """The numbers from ``start`` to ``stop - 1`` that are not in ``present``, which is sorted."""
    found, expected = [], start
    for number in present:
        if start <= number < stop:
            if number > expected:
                found.append([expected, number - 1])
            expected = number + 1
    if expected < stop:
        found.append([expected, stop - 1])
    return _listed(found)


def _listed(pairs: Sequence[Sequence[int]]) -> str:
    named = [str(first) if first == last else f"{first}-{last}" for first, last in pairs[:5]]
    return ", ".join([*named, *(["..."] if len(pairs) > 5 else [])])


def is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(name: str, value: Any, most: int) -> None:
    if not is_whole(value) or not 1 <= value <= most:
        raise ValueError(
            f"{name}: expected a whole number from 1 to {most:,}, got {shortened(value)}"
        )


def _names(what: str, names: Mapping[str, Any]) -> None:
    if len(names) > _MOST_NAMES:
        raise ValueError(f"{what}: expected at most {_MOST_NAMES}, got {len(names)}")
    for name in names:
        parts = name.split("/") if isinstance(name, str) and _NAME.fullmatch(name) else []
        odd = [p for p in parts if p.startswith("__") or p.endswith(".tmp") or p == "zarr.json"]
        if not parts or odd:
            raise ValueError(
                f"{what}: expected names of letters, digits, '_', '.', '-', with '/' between "
                f"folders, got {shortened(name)}"
            )


def _document(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"


def shortened(value: Any) -> str:
    """Something from a damaged file, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 120 else text[:100] + "..."
