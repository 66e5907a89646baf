"""Callbacks that put an ``ExplanationMonitor`` into other people's trainers.

``lightning`` and ``transformers`` each import their package when they are imported themselves, so
nothing of either is needed, or loaded, before.
"""

from __future__ import annotations

from typing import Any


def sinks(given: Any, *more: Any) -> list[Any]:
    """A user's ``sink=`` (none, one or several) and those of the trainer, in one list."""
    if given is None:
        return list(more)
    return [*(given if isinstance(given, (list, tuple)) else [given]), *more]
