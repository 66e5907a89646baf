"""Checkpoints that are whole or absent, hold data only, and know which run they belong to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FORMAT = 1


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` so that a crash at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    with unfinished.open("wb") as file:
        torch.save({"format": FORMAT, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    if os.name == "posix":
        # The rename is in the folder, and the folder must reach the disk too.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, read without unpickling anything but data.

    Raises:
        ValueError: damaged, cut short, or not a checkpoint of this library.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that were altered can fail anywhere in torch's reader
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"checkpoint: {path} is damaged or cut short ({reason}); delete it to train this "
            "stage again"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"checkpoint: {path} is not a checkpoint of this version of fastxkd")
    return content


def check_settings(stored: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Refuse to continue ``what`` with other settings than it was started with.

    Raises:
        ValueError: names up to three settings that differ, with both values; ``data.images`` is
            the setting ``images`` in ``data``.
    """
    stored, wanted = _flat(stored), _flat(wanted)
    different = [
        f"{name} was {_short(stored.get(name))}, now {_short(wanted.get(name))}"
        for name in dict.fromkeys([*wanted, *stored])
        if stored.get(name) != wanted.get(name)
    ]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise ValueError(
            f"resume: {what} was started with other settings: {'; '.join(different[:3])}{more}. "
            "Use the same settings, another output folder, or start over without resuming"
        )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inside = _flat(value) if isinstance(value, Mapping) else {}
        found |= {f"{name}.{key}": part for key, part in inside.items()} or {name: value}
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}..."
