"""Every public name with arguments nobody thought of: a result of the documented shape, or an error
in words; never a crash, never an input that has changed.

A case is a string of bytes, each a choice: 0 the ordinary one. Hypothesis finds the strings, the
same ones in every run, and shortens one that fails to what matters. ``FASTXKD_FUZZ_CASES`` sets how
many a name gets (under sanitizers, say). Run directories: test_fuzz_runs.py.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import fastxkd
from tests import fuzz_interpretability, test_fuzz_runs
from tests.fuzz_case import ASKED, Case, memory, profile
from tests.fuzz_plans import CHEAP, NETS, WITH_MODELS

CHOICES = 72  # bytes of a case
MANY, SOME = 290, 110  # cases of a name; of one that runs models
MANY_OF = CHEAP | fuzz_interpretability.CHEAP
PLANS = MANY_OF | WITH_MODELS | fuzz_interpretability.WITH_MODELS
CASES = {name: MANY if name in MANY_OF else SOME for name in PLANS}
NOTHING_TO_CALL = {"__version__", "losses", "metrics"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def parts(found: Any) -> list[Tensor]:
    given = found if isinstance(found, (tuple, list)) else (found,)
    return [part for part in given if isinstance(part, Tensor)]


def backward(found: Any, inputs: list[Tensor]) -> None:
    """Gradients of what was returned, without leaving any."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    for part in parts(found):
        if wanted and part.requires_grad:
            torch.autograd.grad(part.sum(), wanted, allow_unused=True, retain_graph=True)


def state() -> list[tuple[str, bool, bytes, bool]]:
    """All that a call could have changed of a model."""
    return [
        (f"{role}.{name}", module.training, memory(tensor), tensor.grad is None)
        for role, module in NETS.items()
        for name, tensor in module.named_parameters()
    ]


@pytest.mark.parametrize("name", sorted(PLANS))
def test_public_name(name: str) -> None:
    public, plan = getattr(fastxkd, name), PLANS[name]
    outcomes: Counter[str] = Counter()

    @profile(CASES[name])
    @hypothesis.given(st.binary(min_size=CHOICES, max_size=CHOICES))
    def run(choices: bytes) -> None:
        case = Case(choices)
        before = state()
        call, documented = plan(case, public)
        why = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = call()
                backward(found, [made for made, _ in case.made])
        except (ValueError, TypeError, RuntimeError) as error:
            why = f"{error}"
        if why is None:
            assert documented(found), f"returned {found!r:.300}"
            if case.ordinary:
                assert all(bool(part.isfinite().all()) for part in parts(found)), found
        assert why != "", "an error without a word"
        outcomes["answered" if why is None else "refused"] += 1
        assert case.unchanged(), "an input has changed"
        assert state() == before, "a model has changed"

    run()
    if not ASKED:
        assert outcomes.total() >= CASES[name]
        # What is ordinary is answered, and nonsense refused.
        assert outcomes["answered"] >= 1, outcomes
        assert outcomes["refused"] >= 1, outcomes


def test_every_public_name_is_here() -> None:
    assert set(PLANS) | NOTHING_TO_CALL == set(fastxkd.__all__)
    assert not any(callable(getattr(fastxkd, name)) for name in NOTHING_TO_CALL)


def test_how_many_cases() -> None:
    assert sum(CASES.values()) + test_fuzz_runs.CASES >= 20_000
