"""Work that another thread does, in order and at most a few pieces behind."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any


class Background:
    """Calls ``work`` in a thread of its own, in the order of :meth:`put`.

    Its first error ends the work and surfaces in the next :meth:`put`, or at the end of the
    ``with`` block. Where the block ends in an error of its own, what still waits is dropped and
    what is being done is finished.

    Args:
        work: what to do with the arguments of each ``put``.
        waiting: how many may wait; ``put`` blocks until there is room, which bounds the memory.

    >>> done = []
    >>> with Background(done.append) as background:
    ...     background.put(1)
    ...     background.put(2)
    >>> done
    [1, 2]
    """

    def __init__(self, work: Callable[..., object], waiting: int = 2) -> None:
        self._work = work
        self._queue: queue.Queue[tuple[Any, ...] | None] = queue.Queue(waiting)
        self._error: BaseException | None = None
        self._dropping = False
        self._thread = threading.Thread(target=self._run, name="fastxkd-writer", daemon=True)

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._dropping = error is not None
        self._queue.put(None)
        self._thread.join()
        if error is None:
            self._surface()

    def put(self, *arguments: Any) -> None:
        self._surface()
        self._queue.put(arguments)

    def _surface(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        # Goes on taking after an error: nobody shall wait for room for ever.
        while (arguments := self._queue.get()) is not None:
            if self._error is not None or self._dropping:
                continue
            try:
                self._work(*arguments)
            except BaseException as error:
                self._error = error
