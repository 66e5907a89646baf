"""What a person sees of hours of work: a plan with its cost, and how much time is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastxkd.pages.numbers import count, seconds
from fastxkd.runs.progress import LINE_SECONDS
from fastxkd.train import Progress

if TYPE_CHECKING:
    from fastxkd.runs.reproduce.tasks import Task


class Watch(Progress):
    """A line for each piece of work, and one every ten seconds within it.

    The time left is the sum of what the pieces still to do cost: what such a piece took before,
    else what a few timed steps promise.

    Args:
        say: takes a line.
        clock: for tests.
    """

    def __init__(
        self, say: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._clock = say, clock
        self._costs: dict[str, list[float]] = {}
        self._left: list[str] = []
        self._all = 0
        self._title, self._kind = "", ""
        self._steps = self._done = 0
        self._last = clock()

    @classmethod
    def silent(cls) -> Watch:
        return cls(lambda line: None)

    def plan(
        self, tasks: Sequence[Task], pending: Sequence[Task], costs: Mapping[str, float]
    ) -> None:
        self._costs = {kind: [cost] for kind, cost in costs.items()}
        self._left = [task.kind for task in pending]
        self._all = len(tasks)
        done = len(tasks) - len(pending)
        again = f", {count(done)} of them done before" if done else ""
        self._say(
            f"plan: {count(len(tasks))} pieces of work{again}; about {seconds(self._ahead())} on "
            "this machine"
        )
        for kind in dict.fromkeys(self._left):
            number = self._left.count(kind)
            self._say(f"  {number:3d} x {kind}: {seconds(self._cost(kind))} each")

    def _cost(self, kind: str) -> float:
        past = self._costs.get(kind, [0.0])
        return sum(past) / len(past)

    def _ahead(self) -> float:
        return sum(map(self._cost, self._left))

    def begin(self, title: str, kind: str) -> None:
        if kind in self._left:
            self._left.remove(kind)
        self._title, self._kind = title, kind
        self._steps = self._done = 0
        self._last = self._clock()
        position = self._all - len(self._left)
        left = self._cost(kind) + self._ahead()
        self._say(f"[{position}/{self._all}] {title}  about {seconds(left)} left")

    def end(self, took: float) -> None:
        self._costs.setdefault(self._kind, []).append(took)
        if len(self._costs[self._kind]) == 2:
            # What was measured replaces what was guessed.
            del self._costs[self._kind][0]

    def start(self, stage: str, steps: int, done: int) -> None:
        self._steps, self._done = steps, done
        if 0 < done < steps:
            self._say(f"  {stage}: resumes at step {count(done)} of {count(steps)}")

    def step(self, epoch: int, loss: float | None) -> None:
        self._done += 1
        self.tick(self._done, self._steps, "" if loss is None else f"  loss {loss:.3f}")

    def tick(self, done: int, steps: int, note: str = "") -> None:
        """So much of the piece at work is done; says so every ten seconds."""
        now = self._clock()
        if now - self._last < LINE_SECONDS or not steps:
            return
        self._last = now
        rest = self._cost(self._kind) * max(0.0, 1 - done / steps)
        self._say(
            f"  {self._title}: {100 * done / steps:.0f} %{note}  about "
            f"{seconds(rest + self._ahead())} left"
        )

    def epoch(self, record: Mapping[str, Any]) -> None:
        pass
