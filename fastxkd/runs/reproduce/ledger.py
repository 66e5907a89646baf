"""The folder of a reproduction: trained models in files, measurements in a journal.

Whatever kills the process, each model and each measurement is there whole or not at all: a model's
file is renamed into place before its line is written, a line counts once it ends. Every start has a
journal file of its own, so that nobody writes behind a line that a crash cut short; the last line
about a key counts, and only if it was made from the same facts that are asked for now.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastxkd
from fastxkd._extras import require
from fastxkd.runs.durable import Lock, Log, make_folders, put, read_regular, remove, stamp_of
from fastxkd.runs.journal import _lines
from fastxkd.runs.store import refuse_strangers
from fastxkd.train.checkpoint import check_settings

RUN, JOURNAL, MODELS, CHECKPOINTS, CACHE, LOCK = (
    "run.json",
    "journal",
    "models",
    "checkpoints",
    "cache",
    ".lock",
)
RESULTS = ("claims.json", "claims.md", "report.html")
OURS = (RUN, JOURNAL, MODELS, CHECKPOINTS, CACHE, LOCK, *RESULTS)
_PATIENCE = 3.0
_MARK = "reproduce"


def digest(facts: Mapping[str, Any]) -> str:
    """Of plain values: two pieces of work with the same one have the same result."""
    text = json.dumps(facts, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Ledger:
    """Opens or continues the reproduction in ``out``; use it as a context.

    Args:
        settings: plain values that must be the same for work to be continued.

    Raises:
        ValueError: the folder holds something else, was started with other settings, or another
            process is writing in it.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self.out = out
        mark = out / RUN
        if mark.exists():
            try:
                stored = dict(json.loads(read_regular(mark, 1 << 20))["reproduce"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"out: {mark} is no reproduction's ({error}); choose another folder"
                ) from error
            check_settings(stored, settings, f"the reproduction in {out}")
        refuse_strangers(out, OURS if mark.exists() else (LOCK,))
        make_folders(out)
        self._lock = Lock(out / LOCK)
        self._lock.take(_PATIENCE)
        content = {"fastxkd": fastxkd.__version__, "reproduce": settings}
        put(mark, json.dumps(content, indent=2).encode(), _MARK)
        make_folders(out / JOURNAL)
        self._known: dict[str, dict[str, Any]] = {}
        numbers = [0]
        for path in sorted((out / JOURNAL).glob("*.jsonl")):
            numbers.append(int(path.stem) if path.stem.isdecimal() else 0)
            for number, _, line in _lines(path):
                try:
                    entry = _entry(json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path}: line {number} is damaged ({error}); remove the line, and what "
                        "it was about is done again"
                    ) from error
                self._known[entry["key"]] = entry
        self._log: Log | None = None
        self._next = out / JOURNAL / f"{max(numbers) + 1:04d}.jsonl"

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        if self._log is not None:
            self._log.close()
        remove(self.out / LOCK)
        self._lock.release()

    def known(self, key: str, facts: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was recorded under ``key`` for these facts; not a model whose file was damaged."""
        entry = self._known.get(key)
        if entry is None or entry.get("facts") != digest(facts):
            return None
        file = entry.get("file")
        if file is not None:
            path = self.model_file(key)
            try:
                if path.exists() and list(stamp_of(path)) != file:
                    return None
            except ValueError:
                return None
        return entry

    def last(self, key: str) -> dict[str, Any] | None:
        """What was recorded under ``key`` at last, whatever it was made from."""
        return self._known.get(key)

    def seconds(self) -> dict[str, list[float]]:
        """How long finished work of each kind took."""
        found: dict[str, list[float]] = {}
        for entry in self._known.values():
            found.setdefault(entry["kind"], []).append(entry["seconds"])
        return found

    def record(
        self, key: str, kind: str, facts: Mapping[str, Any], seconds: float, **content: Any
    ) -> dict[str, Any]:
        if self._log is None:
            self._log = Log(self._next)
        entry = {"key": key, "kind": kind, "facts": digest(facts), "seconds": seconds, **content}
        self._log.add(json.dumps(entry, allow_nan=False).encode() + b"\n")
        # As another start will read it.
        self._known[key] = json.loads(json.dumps(entry))
        return self._known[key]

    def checkpoint(self, key: str) -> Path:
        return self.out / CHECKPOINTS / key / "state.pt"

    def forget(self, key: str) -> None:
        """Remove the checkpoints of a training that is done; there may be one for each stage."""
        folder = self.checkpoint(key).parent
        if folder.is_dir():
            for path in folder.iterdir():
                remove(path)
            folder.rmdir()

    def model_file(self, key: str) -> Path:
        return self.out / MODELS / f"{key}.safetensors"

    def save(self, key: str, model: nn.Module) -> list[Any]:
        """Write a model's file; returns its stamp for the journal."""
        # Clones: safetensors refuses tensors that share memory, as tied weights do.
        state = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in model.state_dict().items()
        }
        path = self.model_file(key)
        make_folders(path.parent)
        return list(put(path, require("safetensors.torch", extra="cli").save(state), _MARK))

    def load(self, key: str, model: nn.Module) -> nn.Module:
        """``model`` with the weights recorded under ``key``, in eval mode."""
        state = require("safetensors.torch", extra="cli").load_file(self.model_file(key))
        model.load_state_dict(state)
        return model.eval()

    def write(self, name: str, text: str) -> None:
        put(self.out / name, text.encode("utf-8", "backslashreplace"), _MARK)

    def cached(self, name: str) -> Path:
        """A place for a file that can be made again, its folder made."""
        make_folders(self.out / CACHE)
        return self.out / CACHE / name


def _entry(found: Any) -> dict[str, Any]:
    """What was read from a line, if it is of a model or of a measurement."""
    kinds: dict[str, Any] = {"key": str, "kind": str, "facts": str, "seconds": (int, float)}
    kinds |= {"values": dict} if "values" in found else {"fingerprint": str, "file": list}
    for name, kind in kinds.items():
        if not isinstance(found[name], kind):
            raise TypeError(f"{name} is {found[name]!r}")
    return dict(found)
