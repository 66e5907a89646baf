"""Records of steps: completed as their measurements arrive, kept, and handed on in order."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from fastxkd.train._lane import Parcel
from fastxkd.train.sinks import Sink

# Of more records two neighbours become one: their mean.
MOST_RECORDS = 4096


class Record(NamedTuple):
    """What one step has shown; names are ``layer/measure``."""

    step: int
    values: dict[str, float]


@dataclass
class Draft:
    """A record some of whose measurements may still be on their way to the host."""

    step: int
    coming: deque[tuple[Parcel, Arrived]] = field(default_factory=deque)
    totals: dict[str, tuple[float, int]] = field(default_factory=dict)
    pictures: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: float, weight: int) -> None:
        """A part of the mean that the record will have of ``name``."""
        total, weights = self.totals.get(name, (0.0, 0))
        self.totals[name] = total + value * weight, weights + weight


# Reads what a parcel holds into the draft of its step.
Arrived = Callable[[Draft, dict[str, Tensor]], None]


class Log:
    """The records of a training.

    Args:
        sinks: told every record, once its step is over and all about it has arrived.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = list(sinks)
        self.history: list[Record] = []
        self._drafts: deque[Draft] = deque()

    def expect(self, step: int, parcel: Parcel, arrived: Arrived) -> None:
        if not self._drafts or self._drafts[-1].step != step:
            self._drafts.append(Draft(step))
        self._drafts[-1].coming.append((parcel, arrived))

    def expected(self, step: int) -> int:
        """How many parcels of ``step``, the last one, are on their way."""
        last = self._drafts[-1] if self._drafts else None
        return len(last.coming) if last is not None and last.step == step else 0

    def forget(self, step: int, beyond: int) -> None:
        """Drop the parcels of ``step`` that came after the first ``beyond``."""
        while self.expected(step) > beyond:
            self._drafts[-1].coming.pop()

    def deliver(self, current: int | None) -> None:
        """Hand on the records of steps before ``current``, as far as they have arrived; None: of
        all steps, and wait for them."""
        while self._drafts:
            draft = self._drafts[0]
            while draft.coming and draft.coming[0][0].arrived(wait=current is None):
                parcel, arrived = draft.coming.popleft()
                arrived(draft, parcel.open())
            if draft.coming or draft.step == current:
                return
            self._drafts.popleft()
            self._publish(draft)

    def _publish(self, draft: Draft) -> None:
        values = {name: total / weight for name, (total, weight) in draft.totals.items()}
        if not values and not draft.pictures:
            return
        if values:
            self.history.append(Record(draft.step, values))
        if len(self.history) > MOST_RECORDS:
            last = self.history[-1:] if len(self.history) % 2 else []
            pairs = zip(self.history[::2], self.history[1::2], strict=False)
            self.history[:] = [*(merged([*pair]) for pair in pairs), *last]
        for sink in self.sinks:
            try:
                sink(draft.step, values, draft.pictures or None)
            except Exception as error:  # a full disk must not end a training
                warnings.warn(
                    f"ExplanationMonitor: the record of step {draft.step} was not written:"
                    f" {type(error).__name__}: {error}",
                    stacklevel=5,
                )

    def close(self) -> None:
        self.deliver(None)
        for sink in self.sinks:
            shut = getattr(sink, "close", None)
            if callable(shut):
                shut()

    def state_dict(self) -> list[Any]:
        return [[record.step, dict(record.values)] for record in self.history]

    def load_state_dict(self, state: Sequence[Any]) -> None:
        self._drafts.clear()
        self.history[:] = [Record(step, dict(values)) for step, values in state]


def merged(records: Sequence[Record]) -> Record:
    """Neighbours as one: the mean of each value over the records that have it, at the last step."""
    names = dict.fromkeys(name for record in records for name in record.values)
    found = {name: [r.values[name] for r in records if name in r.values] for name in names}
    means = {name: math.fsum(values) / len(values) for name, values in found.items()}
    return Record(records[-1].step, means)
