"""Optional dependencies, imported late and missed politely."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, *, extra: str) -> ModuleType:
    """Import ``module`` or say which extra brings it.

    Raises:
        ImportError: ``module`` is not installed; the text names the ``pip`` command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).split(".")[0]
        if missing != module.split(".")[0]:
            raise
        raise ImportError(
            f"this feature needs the package {missing!r}: pip install 'fastxkd[{extra}]'"
        ) from error
