"""A distillation step that is watched by an ``ExplanationMonitor``, against the same step alone.

The floor is the step: the student's forward, the teacher's, the loss, backward, SGD. "ours" takes
Grad-CAM agreement, FSS and RS in every step, the scores of distances of that step's own batch (a
pool no larger than it); the others pool 256 images, as by default, or have a base too, which costs
its forward pass. Of fifty steps with ``every=50`` one is measured; the machine drifts by more than
that one step costs while fifty pass, so single steps of both loops in turn are added up as well.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

import fastxkd
from benchmarks._harness import Case, Skip, Spec, main
from fastxkd.train import ExplanationMonitor
from tests._torchvision import declare_operators

TESTS = ["tests/test_monitor.py"]
LAYERS = {"layer4": ("layer4", "layer4")}
COMPARED = 3  # steps after which weights with and without a monitor are held to each other


class Loop:
    """A student of its own, trained on one batch; with ``options`` under a monitor."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, n: int, size: int, options: Any = None
    ) -> None:
        self.student, self.teacher = copy.deepcopy(student).train(), teacher
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(n, 3, size, size, generator=generator)
        self.labels = torch.arange(n) % 10
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=1e-3, momentum=0.9)
        self.monitor = None
        if options is not None:
            self.monitor = ExplanationMonitor(self.student, teacher, LAYERS, **options)

    def steps(self, count: int) -> None:
        for _ in range(count):
            with nullcontext() if self.monitor is None else self.monitor.step(self.labels):
                logits = self.student(self.images)
                with torch.no_grad():
                    guidance = self.teacher(self.images)
                loss = fastxkd.kd_loss(logits, guidance, self.labels)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()


def case(n: int, size: int, steps: int, options: dict[str, dict[str, Any]]) -> Case:
    declare_operators()
    try:
        from torchvision.models import resnet18, resnet34
    except ImportError as error:
        raise Skip(f"needs torchvision ({error})") from None
    student, teacher = resnet18(weights=None), resnet34(weights=None).eval().requires_grad_(False)
    for given in options.values():
        if "base" in given:
            given["base"] = resnet18(weights=None).eval()
    loop = partial(Loop, student, teacher, n, size)
    variants: dict[str, Callable[[], object]] = {"floor: the step": partial(loop().steps, steps)}
    for name, given in options.items():
        variants[name] = partial(loop(given).steps, steps)

    def notes() -> dict[str, str]:
        ends = []
        for given in (None, options["ours"]):
            ran = loop(given)
            ran.steps(COMPARED)
            ends.append(ran.student.state_dict())
        equal = all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
        text = "bit-identical" if equal else "DIFFERENT"
        text = f"weights after {COMPARED} steps: {text} to the floor's"
        if steps > 1:
            alone, watched = in_turn(loop(), loop(options["ours"]), 2 * steps)
            text += f"; {2 * steps} steps in turn: {watched / alone:.3f}x"
        return {"ours": text}

    return Case(variants, notes=notes)


def in_turn(alone: Loop, watched: Loop, count: int) -> list[float]:
    """Seconds of ``count`` steps of both loops, taken by turns; the one to begin changes too."""
    seconds = [0.0, 0.0]
    alone.steps(1)
    for number in range(count):
        for which in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            (alone, watched)[which].steps(1)
            seconds[which] += time.perf_counter() - start
    return seconds


def specs(quick: bool) -> list[Spec]:
    n, size, between = (8, 32, 5) if quick else (64, 64, 50)
    shape = f"ResNet-18 from ResNet-34, {n}x3x{size}x{size}"
    every = {
        "ours": {"every": 1, "pool": n},
        "ours, pool of 256": {"every": 1},
        "ours, with a base": {"every": 1, "pool": n, "base": None},
    }
    seldom = {"ours": {"every": between, "pool": n}}
    return [
        Spec(f"every step, {shape}", partial(case, n, size, 1, every), rounds=15, resident=True),
        Spec(f"every {between}, {shape}", partial(case, n, size, between, seldom), rounds=5),
    ]


if __name__ == "__main__":
    main("monitor", specs, TESTS, __doc__)
