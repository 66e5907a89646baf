"""Where the records of an :class:`~fastxkd.train.ExplanationMonitor` go.

A sink is any callable ``(step, values, pictures)``: the step's number, names to numbers, and names
to pictures (uint8 ``[3, height, width]``) or None. One with a method ``close`` is closed with the
monitor. None of these opens anything before its first record.

Files are continued: what they hold of the first new step, or of later ones, is replaced. So a
training that goes on from a checkpoint leaves every step once, and one that starts over replaces
the records of the one before.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from torch import Tensor

from fastxkd._extras import require

Sink = Callable[[int, dict[str, float], "dict[str, Tensor] | None"], object]


class JSONLSink:
    """One JSON object a line: ``step`` and the values; null where one is not finite.

    Every line is on its way to the disk when the next step begins. Pictures are left out.

    Args:
        path: the file; its folder is made if need be.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp(), "log.jsonl")
    >>> sink = JSONLSink(path)
    >>> sink(0, {"conv/agreement": 0.5}, None)
    >>> sink.close()
    >>> path.read_text()
    '{"step": 0, "conv/agreement": 0.5}\\n'
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _file(path)
        self._file: TextIO | None = None

    def __call__(self, step: int, values: Mapping[str, float], pictures: Any = None) -> None:
        if self._file is None:
            self._file = self._open(step)
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with _or_close(self):
            self._file.write(json.dumps({"step": step, **known}) + "\n")
            self._file.flush()

    def _open(self, step: int) -> TextIO:
        if self.path.exists():
            lines = _whole_lines(self.path).splitlines(keepends=True)
            steps = [_step_of(line, self.path) for line in lines]
            kept = [line for line, at in zip(lines, steps, strict=True) if at < step]
            write_whole(self.path, "".join(kept).encode())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class CSVSink:
    """A table with a column for ``step`` and for every value; empty where a step has none.

    A value that comes up later gets a column of its own: the file is written again then. Pictures
    are left out.

    Args:
        path: the file; its folder is made if need be.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _file(path)
        self._columns: list[str] = []
        self._file: TextIO | None = None

    def __call__(self, step: int, values: Mapping[str, float], pictures: Any = None) -> None:
        new = [name for name in values if name not in self._columns]
        if self._file is None or new:
            before = step if self._file is None else math.inf
            self.close()
            self._open(before, new)
        assert self._file is not None
        row = {"step": str(step)} | {name: repr(value) for name, value in values.items()}
        with _or_close(self):
            csv.DictWriter(self._file, ["step", *self._columns], restval="").writerow(row)
            self._file.flush()

    def _open(self, before: float, new: Sequence[str]) -> None:
        """The file, with the rows of earlier steps and the columns wanted."""
        rows: list[dict[str, str]] = []
        if self.path.exists():
            table = csv.DictReader(io.StringIO(_whole_lines(self.path), newline=""))
            columns = table.fieldnames or ["step"]
            if "step" not in columns:
                raise ValueError(f"path: {self.path} is there, and no table of steps")
            self._columns = [name for name in columns if name != "step"]
            whole = [r for r in table if None not in r and None not in r.values()]
            rows = [r for r in whole if r["step"].isdecimal() and int(r["step"]) < before]
        self._columns += [name for name in new if name not in self._columns]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["step", *self._columns], restval="")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.path, text.getvalue().encode())
        self._file = self.path.open("a", encoding="utf-8", newline="")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class TensorBoardSink:
    """Scalars and pictures for TensorBoard, each under its own name.

    Args:
        folder: of the event files, made if need be; or a ``SummaryWriter`` of yours, which is not
            closed.

    Raises:
        ImportError: at the first record, where tensorboard is missing (extra ``monitor``).
    """

    def __init__(self, folder: str | Path | Any) -> None:
        self._own = isinstance(folder, (str, Path))
        self._folder = folder
        self._writer: Any = None if self._own else folder
        if not self._own and not callable(getattr(folder, "add_scalar", None)):
            raise TypeError(
                f"folder: expected a path or a SummaryWriter, got {type(folder).__name__}"
            )

    def __call__(
        self,
        step: int,
        values: Mapping[str, float],
        pictures: Mapping[str, Tensor] | None = None,
    ) -> None:
        if self._writer is None:
            require("tensorboard", extra="monitor")
            from torch.utils.tensorboard import SummaryWriter

            # Events from this step on that an earlier process has left are hidden.
            self._writer = SummaryWriter(str(self._folder), purge_step=step)  # type: ignore[no-untyped-call]
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        for name, picture in (pictures or {}).items():
            self._writer.add_image(name, picture, step)

    def close(self) -> None:
        if self._writer is None:
            return
        self._writer.flush()
        if self._own:
            self._writer.close()
            self._writer = None


class _Run(Protocol):
    """What is asked of a run of Weights & Biases."""

    def log(self, data: dict[str, Any]) -> Any: ...

    def define_metric(self, name: str, step_metric: str | None = None) -> Any: ...


class WandbSink:
    """Scalars and pictures for a run of Weights & Biases.

    They have a step of their own, ``PREFIX/step``: the run's counter stays with whoever else logs
    to it.

    Args:
        run: what ``wandb.init`` returned; None: the run that is active at the first record.
        prefix: in front of every name.

    Raises:
        ImportError: at the first record, where wandb is missing.
        ValueError: at the first record, where no run is active.
    """

    def __init__(self, run: _Run | None = None, *, prefix: str = "explained") -> None:
        self._run = run
        self._prefix = prefix
        self._defined = False

    def __call__(
        self,
        step: int,
        values: Mapping[str, float],
        pictures: Mapping[str, Tensor] | None = None,
    ) -> None:
        run = self._ready()
        data: dict[str, Any] = {f"{self._prefix}/step": step}
        data |= {f"{self._prefix}/{name}": value for name, value in values.items()}
        if pictures:
            image = require("wandb", extra="monitor").Image
            for name, picture in pictures.items():
                data[f"{self._prefix}/{name}"] = image(picture.permute(1, 2, 0).numpy())
        run.log(data)

    def _ready(self) -> _Run:
        if self._run is None:
            self._run = require("wandb", extra="monitor").run
            if self._run is None:
                raise ValueError("run: no run of wandb is active; call wandb.init() or pass one")
        if not self._defined:
            self._run.define_metric(f"{self._prefix}/step")
            self._run.define_metric(f"{self._prefix}/*", step_metric=f"{self._prefix}/step")
            self._defined = True
        return self._run


_BY_SUFFIX: dict[str, Callable[[str | Path], Sink]] = {".csv": CSVSink, ".jsonl": JSONLSink}


def open_sinks(given: Sink | str | Path | Sequence[Sink | str | Path] | None) -> list[Sink]:
    """Callables as they are, paths by their suffix.

    Raises:
        TypeError, ValueError: neither.
    """
    several: list[Any] = [] if given is None else [given]
    if isinstance(given, (list, tuple)):
        several = [*given]
    sinks: list[Sink] = []
    for one in several:
        if isinstance(one, (str, Path)):
            kind = _BY_SUFFIX.get(Path(one).suffix.lower())
            if kind is None:
                raise ValueError(
                    f"sink: expected a path that ends in {' or '.join(_BY_SUFFIX)}, got"
                    f" {str(one)!r}; TensorBoardSink takes a folder"
                )
            sinks.append(kind(one))
        elif callable(one):
            sinks.append(one)
        else:
            raise TypeError(f"sink: expected a callable or a path, got {type(one).__name__}")
    return sinks


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def _file(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path: expected a file, got the folder {path}")
    return path


def _whole_lines(path: Path) -> str:
    """A text file without the line that a crash has cut short."""
    text = path.read_bytes().decode("utf-8", "replace")
    return text[: text.rfind("\n") + 1]


@contextlib.contextmanager
def _or_close(sink: JSONLSink | CSVSink) -> Iterator[None]:
    """After a write that failed the next record opens the file anew, without the half line."""
    try:
        yield
    except OSError:
        with contextlib.suppress(OSError):
            sink.close()
        sink._file = None
        raise


def _step_of(line: str, path: Path) -> int:
    """Of a line of :class:`JSONLSink`."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    step = found.get("step") if isinstance(found, dict) else None
    if not isinstance(step, int):
        raise ValueError(f"path: {path} is there, and no log of steps")
    return step
