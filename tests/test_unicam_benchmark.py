"""The benchmark of UniCAM measures what it says, at a tiny size."""

from __future__ import annotations

import re

import torch
from torch import nn

from benchmarks import _machine, unicam
from tests import oracles


def test_naive_form_is_the_definition_and_holds_the_broadcast() -> None:
    inputs = unicam._inputs(12, 6, 10)
    true = oracles.unicam_weights(*(x.double() for x in inputs))
    double = unicam.naive_weights(*(x.double() for x in inputs))
    torch.testing.assert_close(double, true, rtol=1e-10, atol=1e-15)
    case = unicam.case(12, 6, 10)
    peaks = {name: _machine.peak_allocated(call) for name, call in case.variants.items()}
    broadcast = 12 * 12 * 600 * 4
    assert peaks["naive autograd"] > 2 * broadcast
    assert peaks["ours"] < broadcast / 4
    assert peaks["floor: read both"] < 64
    assert case.floor_bytes == 2 * 12 * 600 * 4


def test_many_samples_note_their_memory() -> None:
    case = unicam.many(24, 8, 20)
    for call in case.variants.values():
        call()
    assert "naive autograd" not in case.variants
    found = re.match(r"([\d.]+) GB with its inputs of ([\d.]+) GB; .*: 0 GB", case.notes()["ours"])
    assert found is not None
    # Nothing of size n x n x d: less than a copy of each input beside them.
    peak = _machine.peak_allocated(case.variants["ours"])
    assert 0 < peak < 2 * 24 * 8 * 400 * 4


def test_calls_of_two_models() -> None:
    student, base = (nn.Sequential(nn.Conv2d(3, k, 3), nn.ReLU()).eval() for k in (4, 5))
    runs: list[int] = []
    for model in (student, base):
        model.register_forward_hook(lambda *_: runs.append(1))
    case = unicam.calls(student, base, "1", torch.randn(8, 3, 10, 10), 12)
    calls = {}
    for _ in range(2):  # the first of a reference set makes it
        for name, call in case.variants.items():
            runs.clear()
            call()
            calls[name] = len(runs)
    # Each measured call is what the floor is: one pass of each model.
    assert calls == {"floor: two forwards": 2, "ours, against 12 others": 2, "ours": 2}


def test_full_size_cases_are_those_of_the_record() -> None:
    names = [spec.name for spec in unicam.specs(False)]
    assert "weights, n = 32, 2048x7x7" in names
    assert "weights, n = 1024, 2048x7x7" in names
    assert "call, ResNet-50, 32 images, 224 px" in names
    assert 2048 * 7 * 7 == 100352
