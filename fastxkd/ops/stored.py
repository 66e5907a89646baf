"""Rows of features, wherever they are: tensors, a mapped file, a slice of a safetensors file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastxkd.ops._library import DTYPES

SAFETENSORS = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NUMPY = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


@runtime_checkable
class TensorSlice(Protocol):
    """What ``safetensors.safe_open(...).get_slice(name)`` returns: read when it is sliced."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, rows: Any) -> Tensor: ...


class Pieces:
    """Rows that came in pieces, as tensors that are left where they are."""

    def __init__(self, pieces: Sequence[Tensor], name: str = "features") -> None:
        self.pieces = list(pieces)
        first = self.pieces[0]
        for piece in self.pieces:
            if piece.shape[1:] != first.shape[1:] or piece.dtype != first.dtype:
                raise ValueError(
                    f"{name}: expected {first.dtype} {list(first.shape[1:])} a row as at first,"
                    f" got {piece.dtype} {list(piece.shape[1:])}"
                )
        self.ends = list(accumulate(len(piece) for piece in self.pieces))
        self.shape = (self.ends[-1], *first.shape[1:])
        self.dtype, self.device = first.dtype, first.device

    def __getitem__(self, rows: slice) -> Tensor:
        begin, end, _ = rows.indices(self.ends[-1])
        parts = [self.pieces[0][:0]]
        for at in range(bisect_right(self.ends, begin), len(self.pieces)):
            before = self.ends[at] - len(self.pieces[at])
            if before >= end:
                break
            parts.append(self.pieces[at][max(begin - before, 0) : end - before])
        return parts[1] if len(parts) == 2 else torch.cat(parts)


class OneHot:
    """Class indices ``[n]``, made into one-hot rows when they are read."""

    dtype = torch.float32

    def __init__(self, index: Tensor, classes: int) -> None:
        self.index, self.device, self.shape = index, index.device, (len(index), classes)

    def __getitem__(self, rows: slice) -> Tensor:
        return F.one_hot(self.index[rows], self.shape[1]).to(self.dtype)


# A mapped file is a Tensor (torch.from_file) or an array (numpy.memmap).
Features = Tensor | np.ndarray | TensorSlice | Pieces | OneHot


class Rows:
    """``[n, ...]`` features, flattened per row, of which only the rows asked for are read."""

    def __init__(self, features: Features, name: str) -> None:
        shape: tuple[int, ...]
        dtype: torch.dtype | None
        if isinstance(features, Tensor | Pieces | OneHot):
            shape, dtype, self.device = tuple(features.shape), features.dtype, features.device
        elif isinstance(features, np.ndarray):
            shape, dtype = features.shape, NUMPY.get(features.dtype.name)
            self.device = torch.device("cpu")
        elif isinstance(features, TensorSlice):
            shape = tuple(features.get_shape())
            dtype = SAFETENSORS.get(features.get_dtype())
            self.device = torch.device("cpu")
        else:
            raise TypeError(
                f"{name}: expected a Tensor, got {type(features).__name__}"
                " (a numpy array or a slice of a safetensors file will do as well)"
            )
        if dtype is None or dtype not in DTYPES:
            raise TypeError(
                f"{name}: expected float32, float64, bfloat16 or float16, got"
                f" {dtype or getattr(features, 'dtype', None) or features.get_dtype()}"  # type: ignore[union-attr]
            )
        if len(shape) < 2 or prod(shape[1:]) == 0:
            raise ValueError(
                f"{name}: expected features [n, ...] with at least one value a row,"
                f" got shape {list(shape)}"
            )
        self.features, self.name, self.dtype = features, name, dtype
        self.n, self.width = shape[0], prod(shape[1:])
        self.flat = _flat(features, self.n, self.width)

    def read(self, rows: slice) -> Tensor:
        """``[r, width]``, in memory, as it was given."""
        if self.flat is not None:
            return self.flat[rows]
        part: Any = self.features[rows]
        if isinstance(part, np.ndarray):
            # A copy: pages of a mapped file may be read-only, which no tensor can say.
            part = torch.from_numpy(np.array(part))
        return part.detach().reshape(part.shape[0], self.width)

    def take(self, index: Tensor) -> Tensor:
        """``[len(index), width]``: rows in any order."""
        if isinstance(self.features, Tensor):
            found = self.features.detach()[index]
        elif isinstance(self.features, np.ndarray):
            found = torch.from_numpy(self.features[index.numpy()])
        else:
            found = torch.cat([self.features[i : i + 1] for i in index.tolist()])
        return found.reshape(len(index), self.width)


def _flat(features: Features, n: int, width: int) -> Tensor | None:
    """``[n, width]`` where it lies, values of a row side by side; None if it does not lie so."""
    if not isinstance(features, Tensor):
        return None
    try:
        flat = features.detach().view(n, width)
    except RuntimeError:
        return None
    return flat if width == 1 or flat.stride(1) == 1 else None
