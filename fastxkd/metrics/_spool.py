"""Batches of activations on the disk instead of in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


class Spool:
    """Takes batches and gives them back in order, as often as asked.

    The file has no name: the system removes it when the process ends, however it ends.

    Args:
        folder: where there is room.

    >>> with Spool(tempfile.gettempdir()) as spool:
    ...     spool.add(torch.ones(2, 3))
    ...     spool.add(torch.zeros(1, 3))
    ...     [batch.sum().item() for batch in spool]
    [6.0, 0.0]
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"spool: expected a folder, got {type(folder).__name__}")
        if not Path(folder).is_dir():
            raise ValueError(f"spool: expected a folder, got {os.fspath(folder)}")
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed at the end)
        self._batches: list[tuple[torch.Size, torch.dtype]] = []

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, batch: Tensor) -> None:
        content = batch.detach().cpu().contiguous()
        self._file.seek(0, os.SEEK_END)
        # As bytes: NumPy does not know every dtype.
        self._file.write(content.view(-1).view(torch.uint8).numpy().data)
        self._batches.append((content.shape, content.dtype))

    def __iter__(self) -> Iterator[Tensor]:
        start = 0
        for shape, dtype in self._batches:
            content = bytearray(shape.numel() * dtype.itemsize)
            self._file.seek(start)
            # What was written is there: the file is nobody else's.
            start += self._file.readinto(content)  # type: ignore[attr-defined]
            found = (
                torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            )
            yield found.reshape(shape)
