"""NVTX ranges around the operators, which profilers such as Nsight Systems show on a time line.

``FASTXKD_NVTX=1``, read when fastxkd is imported, turns them on; a decorated function is the very
function it was without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from fastxkd._extras import require

Function = TypeVar("Function", bound=Callable[..., Any])


def _read_environment() -> Any:
    """The domain that ranges go to; None when they are off."""
    value = os.environ.get("FASTXKD_NVTX", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"FASTXKD_NVTX: expected 0 or 1, got {value!r}")
    if value != "1":
        return None
    try:
        return require("nvtx", extra="profile").get_domain("fastxkd")
    except ImportError as error:
        raise ImportError(f"FASTXKD_NVTX=1: {error}") from None


_domain = _read_environment()


def ranged(name: str) -> Callable[[Function], Function]:
    """Decorator: calls are ranges called ``name`` in the domain ``fastxkd``.

    For what runs below the dispatcher, which compilers do not look into.
    """

    def decorate(function: Function) -> Function:
        if _domain is None:
            return function
        event = _domain.get_event_attributes(message=name)

        @wraps(function)
        def within(*arguments: Any, **named: Any) -> Any:
            _domain.push_range(event)
            try:
                return function(*arguments, **named)
            finally:
                _domain.pop_range()

        return cast(Function, within)

    return decorate
