"""Which kernel serves a call: asked for, chosen, missing; per thread and in compiled code."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastxkd
from fastxkd.ops import _library
from fastxkd.reference import kd_loss as reference
from tests.conftest import BACKENDS

MISSING = ["cuda", "triton"]
BUILT = pytest.mark.skipif(_library._cpu is None, reason="the C++ kernels are not built")


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(9, 33), torch.randn(9, 33), torch.arange(9)


def every_operator() -> list[Tensor]:
    """One call of each operator, gradients included."""
    student, teacher, labels = inputs()
    x, y = torch.randn(20, 5).requires_grad_(True), torch.randn(20, 3)
    a = torch.rand(2, 6, 5, 4).requires_grad_(True)
    g = torch.randn(2, 6, 5, 4)
    leaf = student.requires_grad_(True)
    loss = fastxkd.kd_loss(leaf, teacher, labels)
    (2 * loss).backward()
    score = fastxkd.distance_correlation(x, y)
    score.backward()
    maps = fastxkd.cam_from(a, g, size=(9, 8))
    maps.square().sum().backward()
    weights = fastxkd.cam.unicam_weights(torch.rand(8, 3, 4, 4), torch.rand(8, 5), labels[:8] % 2)
    found = [loss, leaf.grad, score, x.grad, maps, a.grad, fastxkd.cam_from(a.detach(), g), weights]
    return [t.detach() for t in found if t is not None]


def served() -> set[str]:
    return {row.kernel for row in fastxkd.backends()}


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_gives_the_same_numbers(name: str) -> None:
    torch.manual_seed(1)
    expected = every_operator()
    torch.manual_seed(1)
    kind, _, level = name.partition("-")
    with fastxkd.use_backend(kind, isa=level or None):
        found = every_operator()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-5)


# --- use_backend


@BUILT
def test_nesting() -> None:
    assert served() == {"cpu"}
    with fastxkd.use_backend("reference"):
        assert served() == {"reference"}
        with fastxkd.use_backend("auto"):
            assert served() == {"cpu"}
            with fastxkd.use_backend("cuda"):
                assert served() == {"none"}
            assert served() == {"cpu"}
        assert served() == {"reference"}
    assert served() == {"cpu"}


@BUILT
def test_an_error_inside_ends_the_choice() -> None:
    with pytest.raises(KeyError), fastxkd.use_backend("reference"):
        raise KeyError
    assert served() == {"cpu"}


@BUILT
def test_the_choice_is_the_threads_own() -> None:
    seen: dict[str, Any] = {}
    chosen, looked = threading.Event(), threading.Event()

    def other() -> None:
        seen["default"] = served()
        with fastxkd.use_backend("reference"):
            chosen.set()
            looked.wait(10)
            seen["own"] = served()

    with fastxkd.use_backend("cuda"):
        thread = threading.Thread(target=other)
        thread.start()
        chosen.wait(10)
        seen["mine"] = served()
        looked.set()
        thread.join()
    assert seen == {"default": {"cpu"}, "own": {"reference"}, "mine": {"none"}}


@BUILT
def test_the_choice_is_the_tasks_own() -> None:
    async def task(name: str, turn: asyncio.Event, next_turn: asyncio.Event) -> set[str]:
        with fastxkd.use_backend(name):
            next_turn.set()
            await turn.wait()
            return served()

    async def both() -> list[set[str]]:
        first, second = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(task("reference", first, second), task("cpu", second, first))

    assert asyncio.run(both()) == [{"reference"}, {"cpu"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpu", None), "backend: expected one of auto, cpu, cuda, triton, reference, got 'gpu'"),
        (("", None), "backend: expected one of"),
        (("reference", "avx2"), "isa: only the 'cpu' backend has ISA levels.*'reference'"),
        (("cuda", "avx2"), "isa: only the 'cpu' backend has ISA levels.*'cuda'"),
        (("cpu", "sse9"), "isa: this build and processor run .*got 'sse9'"),
    ],
)
def test_unknown_names(arguments: tuple[str, str | None], message: str) -> None:
    name, isa = arguments
    with pytest.raises(ValueError, match=message), fastxkd.use_backend(name, isa=isa):
        pass


@pytest.mark.parametrize("name", MISSING)
def test_a_forced_backend_that_is_missing_raises(name: str) -> None:
    student, teacher, labels = inputs()
    a = torch.rand(2, 3, 4, 4)
    with fastxkd.use_backend(name):
        for operator, call in {
            "kd_loss": lambda: fastxkd.kd_loss(student, teacher, labels),
            "cam": lambda: fastxkd.cam_from(a, a),
            "distance": lambda: fastxkd.distance_correlation(student, teacher),
        }.items():
            with pytest.raises(
                RuntimeError,
                match=rf"(?i)use_backend\('{name}'\): cannot serve {operator}: .*{name}",
            ) as raised:
                call()
            has_one = operator in _library.ON_GPU
            assert ("do not run on cpu tensors" in str(raised.value).lower()) == has_one
    every_operator()


@BUILT
def test_levels_are_what_the_kernels_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real, told = _library._cpu, []
    spy = SimpleNamespace(LEVELS=real.LEVELS, best_level=real.best_level)

    def kd_loss(level: int, threads: int, *rest: Any) -> Any:
        told.append((level, threads))
        return real.kd_loss(level, threads, *rest)

    spy.kd_loss = kd_loss
    monkeypatch.setattr(_library, "_cpu", spy)
    levels = _library.isa_levels()
    assert levels[0] == "baseline"
    assert list(levels) == list(real.LEVELS)[: len(levels)]
    for level in levels:
        with fastxkd.use_backend("cpu", isa=level):
            fastxkd.kd_loss(*inputs())
        with fastxkd.use_backend("auto", isa=level):
            fastxkd.kd_loss(*inputs())
    fastxkd.kd_loss(*inputs())
    expected = [i for i in range(len(levels)) for _ in range(2)] + [len(levels) - 1]
    assert [level for level, _ in told] == expected
    assert {threads for _, threads in told} == {torch.get_num_threads()}


# --- the report


def test_backends_rows() -> None:
    rows = fastxkd.backends()
    assert {row.operator for row in rows} == {
        *("kd_loss", "cam", "distance", "principal", "concepts")
    }
    assert {row.device for row in rows} >= {"cpu"}
    assert all(isinstance(field, str) and field for row in rows for field in row)
    with fastxkd.use_backend("reference"):
        assert {(row.kernel, row.reason) for row in fastxkd.backends()} == {
            ("reference", "asked for")
        }
    with fastxkd.use_backend("triton"):
        for row in fastxkd.backends():
            assert row.kernel == "none"
            has_one = row.operator in _library.ON_GPU
            assert ("do not run on cpu" if has_one else "no triton kernel") in row.reason


@BUILT
def test_backends_name_the_level() -> None:
    for level in _library.isa_levels():
        with fastxkd.use_backend("auto", isa=level):
            assert all(level in row.reason for row in fastxkd.backends() if row.device == "cpu")


# --- without the extension


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    expected = every_operator()
    monkeypatch.setattr(_library, "_cpu", None)
    torch.manual_seed(1)
    for a, b in zip(every_operator(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-5)
    assert _library.isa_levels() == ()
    for row in fastxkd.backends():
        assert row.kernel == "reference"
        assert "not built" in row.reason
    with (
        fastxkd.use_backend("cpu"),
        pytest.raises(RuntimeError, match=r"use_backend\('cpu'\): cannot serve kd_loss.*not built"),
    ):
        fastxkd.kd_loss(*inputs())
    with (
        pytest.raises(ValueError, match="isa: this build and processor run none, got 'avx2'"),
        fastxkd.use_backend("cpu", isa="avx2"),
    ):
        pass


REPORT = """
import sys, torch
{before}
import fastxkd
torch.manual_seed(0)
s, t = torch.randn(9, 33), torch.randn(9, 33)
print(sorted({{row.kernel for row in fastxkd.backends()}}), fastxkd.backends()[0].reason)
print(round(fastxkd.kd_loss(s, t, torch.arange(9)).item(), 5))
"""


def python(before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("FASTXKD_")} | environment
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", REPORT.format(before=before)],
        capture_output=True,
        text=True,
        env=env,
        cwd=os.path.dirname(os.path.dirname(fastxkd.__file__)),
    )


def test_processes_without_extension_and_with_a_default() -> None:
    torch.manual_seed(0)
    student, teacher, _ = inputs()
    value = str(round(fastxkd.kd_loss(student, teacher, torch.arange(9)).item(), 5))
    hidden = python("sys.modules['fastxkd._cpu'] = None")
    assert hidden.returncode == 0, hidden.stderr
    assert hidden.stdout.split("\n")[0].startswith("['reference'] the C++ extension is not built")
    asked = python(FASTXKD_BACKEND="reference")
    assert asked.stdout.split("\n")[0] == "['reference'] asked for"
    for run in (hidden, asked):
        assert float(run.stdout.split("\n")[1]) == pytest.approx(float(value), abs=2e-5)


@BUILT
def test_environment_chooses_the_level() -> None:
    run = python(FASTXKD_ISA="baseline")
    assert run.stdout.split("\n")[0] == "['cpu'] C++, baseline"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FASTXKD_BACKEND", "gpu", "backend: expected one of"),
        ("FASTXKD_ISA", "sse9", "isa: this build and processor run"),
    ],
)
def test_environment_with_unknown_names(variable: str, value: str, message: str) -> None:
    run = python(**{variable: value})
    assert run.returncode != 0
    assert message in run.stderr
    assert variable in run.stderr


# --- compiled code


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo's own, of autograd.Function
def test_the_choice_holds_in_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    calls: list[int] = []
    real = reference.kd_loss

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return real(*arguments)

    student, teacher, labels = inputs()
    compiled = torch.compile(fastxkd.kd_loss, fullgraph=True, backend="aot_eager")
    leaf = student.requires_grad_(True)
    expected = compiled(leaf, teacher, labels).detach()
    # Only now: the compiled code knows nothing of it but what the operator looks up.
    monkeypatch.setattr(reference, "kd_loss", counted)
    compiled(leaf, teacher, labels)
    assert calls == ([] if _library._cpu is not None else [1])
    calls.clear()
    with fastxkd.use_backend("reference"):
        torch.testing.assert_close(compiled(leaf, teacher, labels).detach(), expected)
    assert calls == [1]
    with (
        fastxkd.use_backend("cuda"),
        pytest.raises(RuntimeError, match="CUDA kernels do not run on cpu tensors"),
    ):
        compiled(leaf, teacher, labels)
