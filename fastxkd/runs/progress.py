"""What a person sees while a run works: moving bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastxkd._extras import require
from fastxkd.train import Progress

# Between two lines about images.
LINE_SECONDS = 10.0


def _accuracy(record: Mapping[str, Any]) -> str:
    return "" if record["accuracy"] is None else f"  accuracy {record['accuracy']:.3f}"


class LineProgress(Progress):
    """One line per stage and epoch, for logs and pipes."""

    def __init__(self, write: Any = print) -> None:
        self._write = write
        self._stage, self._steps, self._done, self._began = "", 0, 0, 0.0
        self._last: float | None = None

    def start(self, stage: str, steps: int, done: int) -> None:
        self._stage, self._steps, self._done = stage, steps, done
        self._first, self._began = done, time.monotonic()
        if done == steps:
            self._write(f"{stage}: already trained")
        elif done:
            self._write(f"{stage}: resumes at step {done:,} of {steps:,}")
        else:
            self._write(f"{stage}: {steps:,} steps")

    def step(self, epoch: int, loss: float | None) -> None:
        self._done += 1

    def epoch(self, record: Mapping[str, Any]) -> None:
        elapsed = max(time.monotonic() - self._began, 1e-9)
        rate = (self._done - self._first) / elapsed
        left = (self._steps - self._done) / rate if rate else 0.0
        self._write(
            f"{self._stage}: epoch {record['epoch']}  loss {record['loss']:.4f}{_accuracy(record)}"
            f"  {rate:.1f} steps/s  {left:.0f} s left"
        )

    def measure(self, what: str, done: int, total: int) -> None:
        if done == total:
            self._write(f"comparison: {what} of {total:,} images")

    def images(self, done: int, total: int, failed: int) -> None:
        """A line for the first images, every ten seconds, and at the end."""
        now = time.monotonic()
        if self._last is None:
            self._first, self._began, self._last = done, now, now - LINE_SECONDS
        elif done == self._done or (done < total and now - self._last < LINE_SECONDS):
            return
        self._last, self._done = now, done
        rate = (done - self._first) / max(now - self._began, 1e-9)
        left = f"  {(total - done) / rate:.0f} s left" if rate and done < total else ""
        speed = f"  {rate:.1f} images/s" if rate else ""
        lost = f"  {failed:,} failed" if failed else ""
        self._write(f"explained: {done:,} of {total:,} images{speed}{left}{lost}")


class BarProgress(Progress):
    """One bar per stage with rate and remaining time (rich)."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._stage, self._last = "", ""
        self._task: Any = None
        self._measures: dict[str, Any] = {}

    def start(self, stage: str, steps: int, done: int) -> None:
        self._stage, self._last = stage, "already trained" if done == steps else ""
        self._task = self._bars.add_task(stage, total=steps, note=self._last)
        # rich measures the rate from the updates it sees, so the steps made before are no update.
        self._bars.reset(self._task, completed=done, total=steps)

    def step(self, epoch: int, loss: float | None) -> None:
        note = f"epoch {epoch + 1}" + ("" if loss is None else f"  loss {loss:.3f}") + self._last
        self._bars.update(self._task, advance=1, note=note)

    def epoch(self, record: Mapping[str, Any]) -> None:
        self._last = _accuracy(record)
        note = f"epoch {record['epoch']}  loss {record['loss']:.3f}{self._last}"
        self._bars.update(self._task, note=note)

    def measure(self, what: str, done: int, total: int) -> None:
        if what not in self._measures:
            self._measures[what] = self._bars.add_task(what, total=total, note="")
        self._bars.update(self._measures[what], completed=done)

    def images(self, done: int, total: int, failed: int) -> None:
        if self._task is None:
            self._task = self._bars.add_task("explained", total=total, note="")
            self._bars.reset(self._task, completed=done, total=total)
        note = f"{failed:,} failed" if failed else ""
        self._bars.update(self._task, completed=done, note=note)


@contextmanager
def shown_progress(console: Any) -> Iterator[LineProgress | BarProgress]:
    """Bars on a terminal, lines otherwise."""
    if not console.is_terminal:
        yield LineProgress(lambda line: console.out(line, highlight=False))
        return
    rich = require("rich.progress", extra="cli")

    class Rate(rich.ProgressColumn):  # type: ignore[name-defined, misc]
        def render(self, task: Any) -> Any:
            speed = task.finished_speed or task.speed
            return require("rich.text", extra="cli").Text(f"{speed:.1f}/s" if speed else "")

    columns = (
        rich.TextColumn("{task.description:>12}"),
        rich.BarColumn(bar_width=24),
        rich.MofNCompleteColumn(),
        Rate(),
        rich.TimeRemainingColumn(compact=True),
        rich.TextColumn("{task.fields[note]}", style="dim"),
    )
    with rich.Progress(*columns, console=console) as bars:
        yield BarProgress(bars)
