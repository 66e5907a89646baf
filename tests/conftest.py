"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import signal

# Blocking waits: a spinning OpenMP region costs tens of milliseconds when the cores are taken.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A shell starts jobs in the background with Ctrl-C ignored; commands under test would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastxkd.ops import _library

CPU_LEVELS = [f"cpu-{level}" for level in _library.isa_levels()]
BACKENDS = [*CPU_LEVELS, "reference"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every kernel this machine runs, one after the other."""
    name, _, level = request.param.partition("-")
    with _library.use_backend(name, isa=level or None):
        yield request.param


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN: an output that a kernel forgets to write cannot pass."""

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = make(*args, **kwargs)
            if out.is_floating_point() and out.device.type == "cpu" and type(out) is torch.Tensor:
                with torch.no_grad():
                    out.fill_(float("nan"))
            return out

        return empty

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def needs(module: str) -> Any:
    """The module, or a skip; in CI, where everything must be installed, a failure."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have {module}: {error}")
        pytest.skip(f"{module} is not installed")
