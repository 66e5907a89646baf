"""The side of the road: where a step's measurements are worked out without holding it up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Parcel:
    """Tensors on their way to the host."""

    def __init__(self, tensors: dict[str, Tensor], event: torch.cuda.Event | None) -> None:
        self._tensors = tensors
        self._event = event

    def arrived(self, *, wait: bool = False) -> bool:
        """Whether they are there; ``wait`` until they are."""
        if self._event is None or self._event.query():
            return True
        if wait:
            self._event.synchronize()
        return wait

    def open(self) -> dict[str, Tensor]:
        return self._tensors


class Lane:
    """On a CUDA device a stream beside the step's own; on the CPU the step's own time.

    Nothing here makes the host wait for the device: copies go to pinned memory, and the host asks
    an event, a step later, whether they have arrived.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def beside(self, given: Iterable[Tensor]) -> Iterator[None]:
        """Work on tensors that the step's stream has made, after it has made them.

        Their memory is not given to others before this stream is done with it.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield
        for tensor in given:
            tensor.record_stream(self._stream)

    def send(self, tensors: Mapping[str, Tensor]) -> Parcel:
        """Copies on the host; called within :meth:`beside`."""
        if self._stream is None:
            return Parcel(dict(tensors), None)
        copies = {}
        for name, tensor in tensors.items():
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copies[name] = pinned.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record(self._stream)
        return Parcel(copies, event)
