"""What the processes of one run agree on: who takes which chunk, and how far all of them are.

``torchrun`` starts them and hosts the key-value store at which they meet; a process that is alone
talks to a dictionary. Small numbers and short texts are all that passes there: results go to the
disk, and nobody waits for anybody but at the start and at the end.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

# Seconds between two looks at what others have not written yet: at first, and in the long run.
_SOON, _LATER = 0.01, 0.5
_calls = itertools.count()


class Store(Protocol):
    """The part of ``torch.distributed.Store`` that is used."""

    def set(self, key: str, value: str) -> Any: ...
    def get(self, key: str) -> bytes: ...
    def add(self, key: str, amount: int) -> int: ...
    def check(self, keys: list[str]) -> bool: ...


class _Alone:
    """The store of a process without others."""

    def __init__(self) -> None:
        self.texts: dict[str, bytes] = {}
        self.numbers: dict[str, int] = {}

    def set(self, key: str, value: str) -> None:
        self.texts[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.texts[key]

    def add(self, key: str, amount: int) -> int:
        self.numbers[key] = self.numbers.get(key, 0) + amount
        return self.numbers[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.texts or key in self.numbers for key in keys)


class Ranks:
    """This process among the ``ranks`` of a run, and what it tells the others.

    Every rank makes the same calls in the same order, which is how they know what belongs
    together.

    >>> alone = Ranks(0, 1)
    >>> alone.from_first(lambda: {"pending": [3, 5]})
    {'pending': [3, 5]}
    >>> list(alone.claims([3, 5]))
    [3, 5]
    """

    def __init__(
        self, rank: int, ranks: int, local_rank: int = 0, store: Store | None = None
    ) -> None:
        self.rank, self.ranks, self.local_rank = rank, ranks, local_rank
        self._store: Store = _Alone() if store is None else store
        self._steps = itertools.count()

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` gives on rank 0, on every rank; anything that JSON can write.

        Raises:
            ValueError: on the others, where ``make`` raised on rank 0, with the same words.
        """
        key = f"first/{next(self._steps)}"
        if self.rank == 0:
            try:
                value = make()
            except (ValueError, TypeError, OSError) as error:
                self._store.set(key, json.dumps({"error": str(error)}))
                self._everybody(f"{key}/heard")
                raise
            self._store.set(key, json.dumps({"value": value}))
            return value
        _until(lambda: self._store.check([key]))
        found = json.loads(self._store.get(key))
        if "error" in found:
            self._store.add(f"{key}/heard", 1)
            raise ValueError(found["error"])
        return found["value"]  # type: ignore[no-any-return]

    def claims(self, pending: Sequence[int]) -> Iterator[int]:
        """Out of what is pending on every rank alike, the next one that nobody has taken yet.

        A fast rank takes more than a slow one.
        """
        key = f"claims/{next(self._steps)}"
        while (at := self._store.add(key, 1) - 1) < len(pending):
            yield pending[at]

    def count(self, what: str, amount: int = 0) -> int:
        """Add to a number that all ranks add to; what it is now."""
        return self._store.add(f"count/{what}", amount)

    def wait(self) -> None:
        """Until every rank has come here."""
        self._everybody(f"wait/{next(self._steps)}")

    def _everybody(self, key: str) -> None:
        if self._store.add(key, 1) < self.ranks:
            _until(lambda: self._store.add(key, 0) >= self.ranks)


def _until(true: Callable[[], bool]) -> None:
    pause = _SOON
    while not true():
        time.sleep(pause)
        pause = min(2 * pause, _LATER)


def started_by_torchrun() -> bool:
    """Whether a launcher watches this process and starts it again when it ends in an error."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def meet() -> Ranks:
    """The ranks that ``torchrun`` has started, or this process alone.

    Raises:
        ValueError: ``WORLD_SIZE`` says that there are others, but not where to meet them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(0, 1)
    from torch.distributed.distributed_c10d import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    store, rank, ranks = next(rendezvous("env://"))
    # A restart, and every further run in one program, begins with empty shelves.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = PrefixStore(f"fastxkd/{attempt}/{next(_calls)}", store)
    return Ranks(rank, ranks, int(os.environ.get("LOCAL_RANK", "0")), own)
