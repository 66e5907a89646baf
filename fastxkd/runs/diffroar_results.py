"""What a DiffROAR run found, and what of it is on the disk."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastxkd
from fastxkd.metrics.input_gradients import KEPT
from fastxkd.runs.durable import Lock, make_folders, put, read_regular, remove
from fastxkd.runs.store import checkpoint_file, refuse_strangers
from fastxkd.train.checkpoint import check_settings

RESULT, LOCK = "diffroar.json", ".lock"
_OURS = (RESULT, LOCK, "checkpoints")
_PATIENCE, _LIMIT = 3.0, 1 << 24


@dataclass(frozen=True)
class DiffROAR:
    """Accuracies after retraining, ``top[i][j]`` with fraction i and seed j, and their differences.

    >>> found = DiffROAR((0.1, 1.0), (0, 1), ((0.8, 0.7), (0.9, 0.9)), ((0.5, 0.6), (0.9, 0.9)))
    >>> [round(mean, 3) for mean in found.mean], [round(std, 3) for std in found.std]
    ([0.2, 0.0], [0.141, 0.0])
    """

    fractions: tuple[float, ...]
    seeds: tuple[int, ...]
    top: tuple[tuple[float, ...], ...]
    bottom: tuple[tuple[float, ...], ...]

    @property
    def differences(self) -> tuple[tuple[float, ...], ...]:
        """Top less bottom of each fraction and seed: 0 for a random ranking, above it for one that
        finds what counts."""
        return tuple(
            tuple(a - b for a, b in zip(top, bottom, strict=True))
            for top, bottom in zip(self.top, self.bottom, strict=True)
        )

    @property
    def mean(self) -> tuple[float, ...]:
        return tuple(map(statistics.fmean, self.differences))

    @property
    def std(self) -> tuple[float | None, ...]:
        """Over retrainings, with n - 1 under the line; None with a single one."""
        return tuple(_std(row) for row in self.differences)

    def to_json(self) -> dict[str, Any]:
        return {
            "fractions": list(self.fractions),
            "seeds": list(self.seeds),
            "top": [list(row) for row in self.top],
            "bottom": [list(row) for row in self.bottom],
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def text(self) -> str:
        """A table in lines."""
        lines = [f"{'pixels':>7}  {'top':>7}  {'bottom':>7}  {'DiffROAR':>8}  {'std':>6}"]
        rows = zip(self.fractions, self.top, self.bottom, self.mean, self.std, strict=True)
        for fraction, top, bottom, mean, std in rows:
            spread = "-" if std is None else f"{std:.4f}"
            lines.append(
                f"{fraction:>7.1%}  {statistics.fmean(top):>7.4f}  {statistics.fmean(bottom):>7.4f}"
                f"  {mean:>+8.4f}  {spread:>6}"
            )
        return "\n".join(lines)


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def refuse_others(out: Path) -> None:
    """Raise if ``out`` holds anything but such a run."""
    refuse_strangers(out, _OURS if (out / RESULT).exists() else (LOCK,))


class Results:
    """Accuracies that are known, in ``diffroar.json`` as soon as they are."""

    def __init__(self, out: Path | None, facts: Mapping[str, Any], *, resume: bool) -> None:
        self.out, self._facts = out, facts
        self._known: dict[tuple[str, float, int], float] = {}
        if out is None:
            return
        file = out / RESULT
        if file.exists() and resume:
            self._read(file)
        refuse_others(out)
        self._write()

    @classmethod
    @contextmanager
    def open(cls, out: Path | None, facts: Mapping[str, Any], *, resume: bool) -> Iterator[Results]:
        if out is None:
            yield cls(None, facts, resume=resume)
            return
        # Looked at before anything is made in it, and again under the lock.
        refuse_others(out)
        make_folders(out)
        lock = Lock(out / LOCK)
        lock.take(_PATIENCE)
        try:
            yield cls(out, facts, resume=resume)
        finally:
            remove(out / LOCK)
            lock.release()

    def _read(self, file: Path) -> None:
        try:
            content = json.loads(read_regular(file, _LIMIT))
            stored, rows = content["settings"], content["accuracies"]
            known = {(row[0], float(row[1]), int(row[2])): float(row[3]) for row in rows}
            if not isinstance(stored, dict) or not all(0 <= x <= 1 for x in known.values()):
                raise ValueError("its settings or accuracies cannot be")
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"out: {file} is damaged ({error}); choose another folder") from error
        check_settings(stored, self._facts, f"the run in {self.out}")
        self._known = known

    def _write(self, result: DiffROAR | None = None) -> None:
        if self.out is None:
            return
        content = {
            "fastxkd": fastxkd.__version__,
            "settings": self._facts,
            "accuracies": [[*key, value] for key, value in self._known.items()],
            "result": None if result is None else result.to_json(),
        }
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        put(self.out / RESULT, text.encode(), "diffroar")

    def known(self, keep: str, fraction: float, seed: int) -> float | None:
        return self._known.get((keep, float(fraction), seed))

    @staticmethod
    def key(keep: str, fraction: float, seed: int) -> str:
        return f"{keep}-{float(fraction)}-{seed}"

    def checkpoint(self, key: str) -> Path | None:
        return None if self.out is None else checkpoint_file(self.out, key)

    def add(self, keep: str, fraction: float, seed: int, reached: float) -> None:
        if not math.isfinite(reached):
            raise ValueError("data: none of the test images can be read")
        self._known[keep, float(fraction), seed] = reached
        self._write()
        file = self.checkpoint(self.key(keep, fraction, seed))
        if file is not None:
            # The accuracy is on the disk: the weights are of no more use.
            remove(file)

    def finish(self, fractions: Sequence[float], seeds: Sequence[int]) -> DiffROAR:
        kept: dict[str, list[tuple[float, ...]]] = {keep: [] for keep in KEPT}
        for keep, rows in kept.items():
            for fraction in map(float, fractions):
                of = "top" if fraction == 1 else keep
                rows.append(tuple(self._known[of, fraction, seed] for seed in seeds))
        result = DiffROAR(
            tuple(map(float, fractions)), tuple(seeds), tuple(kept["top"]), tuple(kept["bottom"])
        )
        self._write(result)
        return result
