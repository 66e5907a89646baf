"""ring: tiles of features pass from process to process; what goes wrong in one, all hear of.

Every process sends the tile at hand to the next one and takes the previous one's while it works on
it: memory is two tiles. Half a round shows every pair of tiles to one of the two processes that own
it; where both would meet (half way round an even ring) each takes every other pair.

A process in which something raises goes on handing tiles on until all meet (``settle``), so that
none is left waiting for it; there all raise. One that is gone leaves broken connections: gloo
notices at once, others after the timeout of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Part = TypeVar("Part")


class Lost(RuntimeError):
    """A process does not answer any more: nothing can be agreed on with it."""


class Turn(NamedTuple):
    """A tile that passes by."""

    owner: int
    tile: list[Tensor]
    # Whose number of tile rows and tile columns adds up to even (0) or odd (1) is this process's
    # to do, the other the owner's; None: all of it.
    parity: int | None


class Ring:
    """The processes of a group in the order of their ranks, or one alone."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        _check(group)
        self.group = group
        self.world = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self._problem: Exception | None = None

    def failed(self, problem: Exception) -> None:
        """Raise it or, among others, keep it until they are met."""
        if self.group is None:
            raise problem
        self._problem = self._problem or problem

    @contextmanager
    def until_met(self) -> Iterator[None]:
        """What fails in here is raised by ``settle``, in all processes."""
        try:
            yield
        except Lost:
            raise
        except Exception as error:
            self.failed(error)

    def settle(self) -> None:
        """All go on, or all raise, with what failed in one."""
        problem, self._problem = self._problem, None

        def mine() -> None:
            if problem is not None:
                raise problem

        agree(mine, self.group)

    def reduce(self, *totals: Tensor) -> None:
        """Add up, in place, what every process has found."""
        if self.group is not None:
            for total in totals:
                dist.all_reduce(total, group=self.group)

    def turns(self, tile: list[Tensor], sizes: Sequence[int]) -> Iterator[Turn]:
        """The tile of this process, then the others' as they come by, of so many rows each."""
        last = self.world // 2
        for step in range(last + 1):
            owner = (self.rank - step) % self.world
            both = step > 0 and 2 * step == self.world
            # The next tile is under way while the caller works on this one.
            arriving = self._hand_on(tile, sizes[owner - 1]) if step < last else None
            yield Turn(owner, tile, int(self.rank > owner) if both else None)
            if arriving is not None:
                tile = arriving()

    def _hand_on(self, tile: list[Tensor], size: int) -> Callable[[], list[Tensor]]:
        """Send the tile to the next process; returns what waits for the previous one's, which has
        ``size`` rows."""
        assert self.group is not None
        taken = [x.new_empty(size, x.shape[1]) for x in tile]
        after, before = (
            dist.get_global_rank(self.group, (self.rank + way) % self.world) for way in (1, -1)
        )
        work = []
        for mine, theirs in zip(tile, taken, strict=True):
            # As bytes: not every backend knows every dtype.
            if mine.numel():
                sent = mine.contiguous().view(torch.uint8)
                work.append(dist.P2POp(dist.isend, sent, after, self.group))
            if theirs.numel():
                received = theirs.view(torch.uint8)
                work.append(dist.P2POp(dist.irecv, received, before, self.group))

        def lost(error: RuntimeError) -> Lost:
            return Lost(
                f"rank {self.rank} lost a process of its group while features were handed on,"
                f" the one before it, {before}, or after it, {after}: {error}"
            )

        try:
            requests = dist.batch_isend_irecv(work) if work else []
        except RuntimeError as error:
            raise lost(error) from error

        def arrived() -> list[Tensor]:
            try:
                for request in requests:
                    request.wait()
            except RuntimeError as error:
                raise lost(error) from error
            work.clear()  # what was sent had to stay until here
            return taken

        return arrived


def agree(mine: Callable[[], Part], group: dist.ProcessGroup | None) -> list[Part]:
    """What ``mine()`` returns in every process of the group, or one alone.

    If it raises in one, all raise, so that none is left waiting for another.
    """
    _check(group)
    if group is None:
        return [mine()]
    problem: Exception | None = None
    said: tuple[str, str] | None = None
    parts: list[Part] = []
    try:
        parts = [mine()]
    except Exception as error:
        # In words: not every exception can be sent.
        problem, said = error, (_kind(error), str(error))
    answers: list[tuple[tuple[str, str] | None, list[Part]]]
    answers = [(said, parts)] * dist.get_world_size(group)
    dist.all_gather_object(answers, (said, parts), group=group)
    if problem is not None:
        raise problem
    for rank, (theirs, _) in enumerate(answers):
        if theirs is not None:
            kind, text = theirs
            if kind in _OURS:
                raise _OURS[kind](f"on rank {rank}: {text}")
            raise RuntimeError(f"on rank {rank}: {kind}: {text}")
    return [part for _, parts in answers for part in parts]


def _check(group: Any) -> None:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a ProcessGroup, got {type(group).__name__}")


_OURS: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError}


def _kind(error: Exception) -> str:
    for name, kind in _OURS.items():
        if isinstance(error, kind):
            return name
    return type(error).__name__
