"""The CUDA kernels, run on the CPU by the emulator of csrc/emulator/simt.h, against float64.

No GPU is needed: the source that nvcc compiles is compiled by g++, thread for thread.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
SANITIZED = os.environ.get("FASTXKD_SANITIZE") == "1"
NAME = "fastxkd._emulator"

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "tvd", "dkd"]
DIST = "dist"  # which is no sum over rows: tests of its own, below
SHAPES = [(1, 1), (3, 2), (7, 33), (41, 1271), (5, 4097), (2, 20001)]
INF = float("inf")
IGNORE = -100
GUARD = 64  # elements around every output


def build(folder: Path, environment: dict[str, str]) -> Path:
    # What was built before is kept: only a change is compiled again.
    environment = {**environment, "FASTXKD_CPU": "0", "FASTXKD_CUDA": "0", "FASTXKD_EMULATOR": "1"}
    # The preloaded sanitizers are for the tests, not for the compiler.
    environment.pop("LD_PRELOAD", None)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        # Tests of several files want it, which may run side by side.
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = subprocess.run(
            [
                *[sys.executable, "setup.py", "-q", "build_ext"],
                *[f"--build-lib={folder}", f"--build-temp={folder / 'temp'}"],
            ],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
    assert made.returncode == 0, made.stdout + made.stderr
    (path,) = (folder / "fastxkd").glob("_emulator.*")
    return path


@pytest.fixture(scope="module")
def module() -> ModuleType:
    if not (ROOT / "setup.py").exists() or shutil.which("g++") is None:
        pytest.skip("no source checkout with a C++ compiler")
    folder = ROOT / "build" / ("emulator-sanitize" if SANITIZED else "emulator")
    path = build(folder, dict(os.environ))
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(params=["forward", "reversed"])
def emulator(request: pytest.FixtureRequest, module: ModuleType) -> Iterator[ModuleType]:
    """Both orders of the warps: what depends on one lacks a barrier."""
    module.set_device(2, request.param == "reversed")
    yield module
    module.set_device(2, False)


@pytest.fixture
def either(module: ModuleType) -> ModuleType:
    """For what the order of the warps has nothing to do with."""
    module.set_device(2, False)
    return module


# The oracle: the formulas, differentiable, in the dtype of the logits.


def product(p: Tensor, ratio: Tensor, dead: Tensor) -> Tensor:
    """Sum of p * ratio over the classes that are not dead."""
    return (p.masked_fill(dead, 0) * ratio.masked_fill(dead, 0)).sum(1)


def divergence(
    z: Tensor, w: Tensor, labels: Tensor | None, kind: str, alpha: float, beta: float
) -> Tensor:
    """[rows], of the softened logits z of the student and w of the teacher."""
    log_q, log_p = torch.log_softmax(z, 1), torch.log_softmax(w, 1)
    q, p = log_q.exp(), log_p.exp()
    no_q, no_p = z == -INF, w == -INF
    if kind == "forward_kl":
        return product(p, log_p - log_q.masked_fill(no_p, 0), no_p)
    if kind == "reverse_kl":
        return product(q, log_q.masked_fill(no_q, 0) - log_p, no_q)
    if kind == "jsd":
        b = torch.tensor(beta, dtype=z.dtype)
        both = no_q & no_p
        x, y = log_q.masked_fill(both, 0), log_p.masked_fill(both, 0)
        log_m = torch.logaddexp(y + b.log(), x + (1 - b).log())
        return b * product(p, y - log_m, no_p) + (1 - b) * product(
            q, x.masked_fill(no_q, 0) - log_m, no_q
        )
    if kind == "tvd":
        return (q - p).abs().sum(1) / 2
    assert labels is not None
    target = torch.zeros_like(z, dtype=torch.bool).scatter(1, labels[:, None], True)

    def halves(logits: Tensor) -> Tensor:
        rest = torch.logsumexp(logits.masked_fill(target, -INF), 1)
        return torch.log_softmax(torch.stack([logits[target], rest], 1), 1)

    two_q, two_p = halves(z), halves(w)
    dead = two_p == -INF
    value = alpha * product(two_p.exp(), two_p - two_q.masked_fill(dead, 0), dead)
    if z.shape[1] > 1:
        rest_q, rest_p = (torch.log_softmax(v.masked_fill(target, -INF), 1) for v in (z, w))
        dead = target | no_p
        value = value + beta * product(rest_p.exp(), rest_p - rest_q.masked_fill(dead, 0), dead)
    return value


def dist(q: Tensor, p: Tensor, weight: Tensor, alpha: float, beta: float) -> Tensor:
    """DIST of probabilities: 1 - the mean correlation of rows and, of columns, their weights in
    every mean and sum."""

    def correlations(u: Tensor, v: Tensor, dim: int) -> Tensor:
        return (u * v).sum(dim) / (u.norm(dim=dim) * v.norm(dim=dim) + 1e-8)

    total = weight.sum()
    if total == 0:
        return (q * 0).sum()
    classes = q.shape[1]
    inter = 1 - (weight * correlations(q - 1 / classes, p - 1 / classes, 1)).sum() / total
    w = weight[:, None]
    # The same norm and product as with the weights inside the sums.
    u, v = (w.sqrt() * (x - (w * x).sum(0) / total) for x in (q, p))
    return alpha * inter + beta * (1 - correlations(u, v, 0).mean())


def parts(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    divergence_: str = "forward_kl",
    alpha: float = 1.0,
    beta: float = 0.4,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = IGNORE,
    reduction: str = "batchmean",
) -> Tensor:
    """[2] or [2, rows]: the hard and the soft part with their weights."""
    rows, classes = student.shape
    counts = torch.ones(rows, dtype=torch.bool) if labels is None else labels != ignore_index
    s, t = student[counts], teacher[counts].to(student.dtype)
    y = None if labels is None else labels[counts]
    on_row = (torch.ones(rows) if row_weight is None else row_weight).to(s.dtype)[counts]
    hard, soft = s.new_zeros(len(s)), s.new_zeros(len(s))
    on_label = torch.ones_like(on_row)
    if y is not None:
        weight = (torch.ones(classes) if class_weight is None else class_weight).to(s.dtype)
        on_label = weight[y]
        hard = torch.nn.functional.cross_entropy(
            s, y, weight, label_smoothing=label_smoothing, reduction="none"
        )
        hard = ce_weight * hard
    if kd_weight and divergence_ == DIST:
        q, p = (torch.softmax(x / temperature, 1) for x in (s, t))
        value = kd_weight * temperature**2 * dist(q, p, on_row, alpha, beta)
        divisor = (on_row * on_label).sum()
        mean = (hard * on_row).sum() / divisor if divisor > 0 else hard.sum() * 0
        return torch.stack([mean, value])
    if kd_weight:
        z, w = s / temperature, t / temperature
        soft = divergence(z, w, y, divergence_, alpha, beta)
        soft = kd_weight * temperature**2 * soft
    both = torch.stack([hard, soft]) * on_row
    if reduction == "none":
        return both.new_zeros(2, rows).index_copy(1, counts.nonzero()[:, 0], both)
    total = both.sum(1)
    if reduction == "sum":
        return total
    divisors = torch.stack([(on_row * on_label).sum(), on_row.sum()])
    return torch.where(divisors == 0, 0, total / divisors)


def oracle(
    student: Tensor, teacher: Tensor, labels: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_(True)
    both = parts(leaf, teacher, labels, **options)
    both.sum().backward()
    assert leaf.grad is not None
    return both.detach(), leaf.grad


# The kernel, called with addresses, every output between guards.


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    size = int(torch.tensor(shape).prod()) if shape else 1
    whole = torch.full((size + 2 * GUARD,), 77.0, dtype=dtype)
    whole[GUARD : GUARD + size] = float("nan")
    return whole, whole[GUARD : GUARD + size].view(shape)


def untouched(whole: Tensor) -> bool:
    return bool((whole[:GUARD] == 77).all() and (whole[-GUARD:] == 77).all())


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def launch(
    emulator: ModuleType,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    divergence_: str = "forward_kl",
    alpha: float = 1.0,
    beta: float = 0.4,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = IGNORE,
    reduction: str = "batchmean",
    need_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, parts, grad)"""
    rows, classes = student.shape
    exact = torch.float64 if student.dtype == torch.float64 else torch.float32
    kind, code = [*DIVERGENCES, DIST].index(divergence_), CODES[student.dtype]
    shape = (rows,) if reduction == "none" else ()
    buffers = [
        guarded(shape, exact),
        guarded((2, *shape), exact),
        guarded((emulator.kd_loss_workspace(rows, classes, kind, code, 0),), torch.float64),
    ]
    buffers.append(guarded((rows, classes), student.dtype))
    (_, loss), (_, both), (_, scratch), (_, grad) = buffers
    class_weight, row_weight = (
        None if w is None else w.to(torch.float64).contiguous() for w in (class_weight, row_weight)
    )
    ticket = torch.zeros(1, dtype=torch.int32)
    status = emulator.kd_loss(
        0,
        0,
        ticket.data_ptr(),
        scratch.data_ptr(),
        student.data_ptr(),
        teacher.data_ptr(),
        address(labels),
        address(class_weight),
        address(row_weight),
        0,
        grad.data_ptr() if need_grad else 0,
        loss.data_ptr(),
        both.data_ptr(),
        rows,
        classes,
        student.stride(0),
        classes,
        teacher.stride(0),
        0,
        (),
        0,
        temperature,
        ce_weight,
        kd_weight,
        kind,
        alpha,
        beta,
        label_smoothing,
        ignore_index,
        ["none", "sum", "batchmean"].index(reduction),
        code,
        CODES[teacher.dtype],
    )
    assert status == -1
    assert ticket.item() == 0
    assert all(untouched(whole) for whole, _ in buffers)
    if not need_grad:
        assert grad.isnan().all()
    return loss, both, grad if need_grad else None


def logits(
    rows: int, classes: int, dtype: torch.dtype, *, scale: float = 1, ignored: float = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 7919 + classes)
    student = (scale * torch.randn(rows, classes, generator=generator)).to(dtype)
    teacher = (scale * torch.randn(rows, classes, generator=generator)).to(dtype)
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = IGNORE
    return student, teacher, labels


def check(
    emulator: ModuleType, student: Tensor, teacher: Tensor, labels: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The error may exceed that of the same computation in eager torch by a rounding.

    The logits are contiguous or have strides; the oracle takes copies.
    """
    loss, both, grad = launch(emulator, student, teacher, labels, **options)
    assert grad is not None
    options.pop("need_grad", None)
    true, true_grad = oracle(student.double(), teacher.double(), labels, options)
    eager, eager_grad = oracle(student.contiguous(), teacher.contiguous(), labels, options)
    eps = 1e-12 if student.dtype == torch.float64 else 1e-6
    rows = student.shape[0]
    # Errors of single rows, in quadrature: in eager's own sum they may cancel by luck.
    by_row = {**options, "reduction": "none"}
    luckless = (
        parts(student.contiguous(), teacher.contiguous(), labels, **by_row).double()
        - parts(student.double(), teacher.double(), labels, **by_row)
    ).norm()
    if options.get("reduction", "batchmean") == "batchmean":
        luckless /= rows
    off = (both.double() - true).norm()
    assert off <= max((eager.double() - true).norm(), luckless) + eps * max(true.norm(), 1)
    torch.testing.assert_close(loss, both[0] + both[1], rtol=1e-6, atol=0)

    size = options.get("ce_weight", 0.1) + options.get("kd_weight", 0.9) * options.get(
        "temperature", 4.0
    )
    batchmean = options.get("reduction", "batchmean") == "batchmean"
    norm = max(true_grad.norm(), 0.1 * size * rows**0.5 / (rows if batchmean else 1))
    grad_off = (grad.double() - true_grad).norm()
    assert grad_off <= (eager_grad.double() - true_grad).norm() + eps * norm
    if student.dtype in (torch.bfloat16, torch.float16):
        rounding = (true_grad.to(student.dtype).double() - true_grad).norm()
        assert grad_off <= 1.2 * rounding + eps * norm
    return loss, grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_matches_float64(
    emulator: ModuleType, kind: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    if shape[0] * shape[1] > 50000 and dtype != torch.float32:
        shape = (6, shape[1])
    check(emulator, *logits(*shape, dtype), divergence_=kind)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0, 7.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_temperatures(
    either: ModuleType, kind: str, dtype: torch.dtype, temperature: float
) -> None:
    for shape in ((7, 33), (2, 1100)):
        check(either, *logits(*shape, dtype), divergence_=kind, temperature=temperature)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_long_row_off_the_powers(emulator: ModuleType, kind: str) -> None:
    """The maximum rises on the way: sums of both kinds are brought to it."""
    student, teacher, labels = logits(2, 9001, torch.float32)
    ramp = torch.linspace(0, 8, 9001)
    student, teacher = student + ramp, teacher + ramp.flip(0)
    for temperature in (2.5, 3.0):
        check(emulator, student, teacher, labels, divergence_=kind, temperature=temperature)


OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "only hard": {"kd_weight": 0.0},
    "only soft": {"ce_weight": 0.0},
    "nothing": {"ce_weight": 0.0, "kd_weight": 0.0},
    "ignore_index is a class": {"ignore_index": 1},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing 1, off the powers": {"label_smoothing": 1.0, "temperature": 2.5},
    "class weight": {"class_weight": True},
    "class weight, smoothing": {"class_weight": True, "label_smoothing": 0.2},
    "class weight, smoothing, none": {
        "class_weight": True,
        "label_smoothing": 0.2,
        "reduction": "none",
        "temperature": 2.5,
    },
    "row weight": {"row_weight": True},
    "row weight, sum": {"row_weight": True, "reduction": "sum"},
    "row weight, class weight": {"row_weight": True, "class_weight": True},
    "alpha, beta": {"alpha": 0.3, "beta": 0.8},
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "dkd"])
def test_options(either: ModuleType, kind: str, dtype: torch.dtype, case: str) -> None:
    # Counted by every block for itself, and by a launch of their own.
    for rows in (9, 70):
        student, teacher, labels = logits(rows, 33, dtype, ignored=0.3)
        options = dict(OPTIONS[case])
        labels = labels.where(labels != IGNORE, options.get("ignore_index", IGNORE))
        if "class_weight" in options:
            options["class_weight"] = torch.linspace(0, 2, 33)
        if "row_weight" in options:
            options["row_weight"] = torch.linspace(0, 3, rows)
        check(either, student, teacher, labels, divergence_=kind, **options)


@pytest.mark.parametrize("kind", DIVERGENCES[:-1])
def test_no_labels(either: ModuleType, kind: str) -> None:
    student, teacher, _ = logits(7, 33, torch.float32)
    check(either, student, teacher, None, divergence_=kind)
    weight = torch.linspace(0, 3, 7)
    check(either, student, teacher, None, divergence_=kind, row_weight=weight)
    # Without a gradient the same loss, and nothing is written.
    for reduction in ("batchmean", "none"):
        options = {"divergence_": kind, "reduction": reduction}
        loss, _, _ = launch(either, student, teacher, None, **options)
        again, _, _ = launch(either, student, teacher, None, need_grad=False, **options)
        assert torch.equal(loss, again)


@pytest.mark.parametrize("shape", [(5, 131), (3, 1500), (2, 9001)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_alignment(
    emulator: ModuleType, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """Chunks of 16 bytes where all rows have them at the same place, element by element else:
    the same numbers, to the bit where the threads hold the same elements."""
    rows, classes = shape
    student, teacher, labels = logits(rows, classes, dtype)
    check(emulator, student, teacher, labels)

    def strided(x: Tensor, before: int, after: int) -> Tensor:
        wide = torch.full((rows, before + classes + after), float("nan"), dtype=dtype)
        wide[:, before : before + classes] = x
        return wide[:, before : before + classes]

    for at in ((0, 0), (8, 13), (3, 3), (1, 2), (5, 0)):
        s = strided(student, at[0], 16 - classes % 8)
        t = strided(teacher, at[1], 24 - classes % 8)
        check(emulator, s, t, labels, divergence_="reverse_kl")
    expanded = teacher[:1].expand(rows, classes)
    check(emulator, student, expanded, labels)


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 8, 9, 31, 255, 256, 257, 1023, 1024, 1025, 8192])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_boundary(either: ModuleType, dtype: torch.dtype, classes: int) -> None:
    check(either, *logits(2, classes, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("classes", [33, 1100, 9001])
def test_ignored_rows_may_hold_anything(
    either: ModuleType, classes: int, kind: str, dtype: torch.dtype
) -> None:
    student, teacher, labels = logits(4, classes, dtype)
    labels[1:3] = IGNORE
    for reduction in ("batchmean", "none"):
        options = {"divergence_": kind, "reduction": reduction}
        expected = launch(either, student, teacher, labels, **options)
        for value in (float("nan"), INF, -INF):
            spoilt, other = student.clone(), teacher.clone()
            spoilt[1:3], other[1:3] = value, value
            found = launch(either, spoilt, other, labels, **options)
            for a, b in zip(found, expected, strict=True):
                assert a is not None
                assert torch.equal(a, b)
            assert (found[2][1:3] == 0).all()
    every = launch(either, student, teacher, torch.full((4,), IGNORE), divergence_=kind)
    assert all((x == 0).all() for x in every)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("classes", [33, 1100, 9001])
def test_nothing_leaves_its_row(either: ModuleType, classes: int, kind: str) -> None:
    student, teacher, labels = logits(4, classes, torch.float32)
    options = {"divergence_": kind, "reduction": "none"}
    loss, both, grad = launch(either, student, teacher, labels, **options)
    others = [0, 2, 3]
    cases: list[tuple[Tensor, Tensor, Tensor]] = []
    for value in (float("nan"), INF):
        for at in (0, classes // 2, classes - 1):
            spoilt, other = student.clone(), teacher.clone()
            spoilt[1, at], other[1, at] = value, value
            cases += [(spoilt, teacher, labels), (student, other, labels)]
    for outside in (-1, classes, classes + 10**10, -(10**12)):
        wrong = labels.clone()
        wrong[1] = outside
        cases.append((student, teacher, wrong))
    for s, t, y in cases:
        found = launch(either, s, t, y, **options)
        assert found[0][1].isnan()
        assert found[2] is not None
        assert found[2][1].isnan().all()
        assert torch.equal(found[0][others], loss[others])
        assert torch.equal(found[1][:, others], both[:, others])
        assert torch.equal(found[2][others], grad[others])
        mean = launch(either, s, t, y, divergence_=kind)
        assert mean[0].isnan()
        assert mean[2][others].isfinite().all()


@pytest.mark.parametrize("classes", [9, 1100, 9001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_masked_classes(either: ModuleType, kind: str, dtype: torch.dtype, classes: int) -> None:
    """-inf in both is a class that does not exist; in one alone, what the formula says."""
    student, teacher, labels = logits(3, classes, dtype)
    gone = (labels + 1) % classes
    rows = torch.arange(3)
    student[rows, gone], teacher[rows, gone] = -INF, -INF
    # A run of them, longer than what a thread holds before it sees a number.
    student[0, : classes // 2], teacher[0, : classes // 2] = -INF, -INF
    labels[0] = classes - 1
    student[0, classes - 1] = teacher[0, classes - 1] = 1
    for temperature in (2.0, 2.5):
        check(either, student, teacher, labels, divergence_=kind, temperature=temperature)
    if kind != "reverse_kl":
        more = teacher.clone()
        more[1, (labels[1] + 2) % classes] = -INF
        check(either, student, more, labels, divergence_=kind)
    if kind in ("forward_kl", "dkd"):
        less = student.clone()
        less[1, (labels[1] + 2) % classes] = -INF
        assert launch(either, less, teacher, labels, divergence_=kind)[0] == INF


@pytest.mark.parametrize("classes", [33, 1100, 9001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_peaked_rows(either: ModuleType, kind: str, dtype: torch.dtype, classes: int) -> None:
    rows = torch.arange(3)
    for right in (True, False):
        student, teacher, labels = logits(3, classes, dtype)
        student[rows, labels] += 30
        teacher[rows, labels if right else (labels + 1) % classes] += 30
        for temperature in (1.0, 2.5):
            check(either, student, teacher, labels, divergence_=kind, temperature=temperature)
    # A teacher so far down that its probability rounds to 0, of a class the student excludes.
    student, teacher, labels = logits(3, classes, dtype)
    gone = (labels + 1) % classes
    student[rows, gone], teacher[rows, gone] = -INF, -5000.0
    if kind != "reverse_kl":
        loss, _, grad = launch(either, student, teacher, labels, divergence_=kind, temperature=1.0)
        assert loss.isfinite()
        assert grad.isfinite().all()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_equal_logits_cost_nothing(either: ModuleType, kind: str) -> None:
    student, _, labels = logits(3, 100, torch.float32)
    for shift in (0.0, 64.0):
        options = {"divergence_": kind, "ce_weight": 0.0}
        loss, _, grad = launch(either, student, student + shift, labels, **options)
        assert abs(loss) <= 1e-5
        if kind != "tvd" or shift == 0:  # whose gradient jumps where the two are equal
            assert grad.abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_teacher_of_wider_dtype(emulator: ModuleType, kind: str, dtype: torch.dtype) -> None:
    for shape in ((3, 33), (2, 1271), (2, 9000)):
        student, _, labels = logits(*shape, dtype)
        _, teacher, _ = logits(*shape, torch.float32)
        loss, _, grad = launch(emulator, student, teacher, labels, divergence_=kind)
        true, true_grad = oracle(student.double(), teacher.double(), labels, {"divergence_": kind})
        assert abs(loss.double() - true.sum()) <= 2e-6 * max(true.norm(), 1)
        rounding = (true_grad.to(dtype).double() - true_grad).norm()
        assert (grad.double() - true_grad).norm() <= 1.2 * rounding + 1e-6 * true_grad.norm()


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_one_sided_jsd_is_zero(either: ModuleType, beta: float) -> None:
    student, teacher, labels = logits(3, 33, torch.float32, scale=30)
    options = {"divergence_": "jsd", "beta": beta, "ce_weight": 0.0}
    loss, _, grad = launch(either, student, teacher, labels, **options)
    assert loss == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("classes", [1, 2])
def test_dkd_without_a_rest(either: ModuleType, classes: int) -> None:
    """One class, or all but the label's masked: nothing is left to compare."""
    student, teacher, labels = logits(3, classes, torch.float64)
    if classes == 2:
        student[torch.arange(3), 1 - labels] = -INF
        teacher[torch.arange(3), 1 - labels] = -INF
    loss, both, grad = launch(either, student, teacher, labels, divergence_="dkd")
    assert loss == 0
    assert (both == 0).all()
    assert (grad == 0).all()


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_empty_batch(either: ModuleType, kind: str, reduction: str) -> None:
    empty = torch.zeros(0, 7)
    labels = torch.zeros(0, dtype=torch.int64)
    loss, both, _ = launch(either, empty, empty, labels, divergence_=kind, reduction=reduction)
    assert (loss == 0).all()
    assert (both == 0).all()


@pytest.mark.parametrize("classes", [10, 700, 1200, 8300])
def test_fewer_blocks_than_rows(emulator: ModuleType, classes: int) -> None:
    """Any number of multiprocessors; the same bits from the same number."""
    student, teacher, labels = logits(37, classes, torch.float32, ignored=0.2)
    try:
        for processors in (1, 3):
            emulator.set_device(processors, False)
            first = check(emulator, student, teacher, labels)
            emulator.set_device(processors, True)
            again = check(emulator, student, teacher, labels)
            for a, b in zip(first, again, strict=True):
                assert torch.equal(a, b)
    finally:
        emulator.set_device(2, False)


@pytest.mark.parametrize("classes", [1, 33, 700, 2101])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(emulator: ModuleType, dtype: torch.dtype, classes: int) -> None:
    rows = 5
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    values, _, _ = logits(rows, classes, dtype)
    values[1] = float("nan")
    for upstream in (
        torch.tensor(0.3, dtype=exact),
        torch.tensor(1.0, dtype=exact),
        torch.tensor([1.0, 2.0, 0.0, 1.0, -0.7], dtype=exact),
    ):
        per_row = upstream.dim() == 1
        whole, grad = guarded((rows, classes), dtype)
        grad.copy_(values)
        emulator.kd_loss_scale(
            0, 0, grad.data_ptr(), upstream.data_ptr(), rows, classes, per_row, CODES[dtype]
        )
        expected = (values.to(exact) * (upstream[:, None] if per_row else upstream)).to(dtype)
        torch.testing.assert_close(grad, expected, rtol=0, atol=0, equal_nan=True)
        assert untouched(whole)


# DIST: one launch over the rows, one over the columns, one that merges them, one for the gradient.


def terms(
    student: Tensor, teacher: Tensor, labels: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """The size of what the gradient is a difference of: where u and v are parallel, as all pairs of
    two classes are, it cancels to nothing."""
    keep = torch.ones(len(student), dtype=torch.bool)
    if labels is not None:
        keep = labels != options.get("ignore_index", IGNORE)
    row_weight = options.get("row_weight")
    w = (torch.ones(len(student)) if row_weight is None else row_weight).double()[keep][:, None]
    temperature = options.get("temperature", 4.0)
    q, p = (torch.softmax(x.double()[keep] / temperature, 1) for x in (student, teacher))
    u, v = q - 1 / q.shape[1], p - 1 / p.shape[1]
    size = v.abs() / (u.norm(dim=1) * v.norm(dim=1) + 1e-8)[:, None] / w.sum()
    size = options.get("alpha", 1.0) * size
    u, v = (x - (w * x).sum(0) / w.sum() for x in (q, p))
    norms = (w.sqrt() * u).norm(dim=0) * (w.sqrt() * v).norm(dim=0) + 1e-8
    size = size + options["beta"] / q.shape[1] * v.abs() / norms
    return options["kd_weight"] * temperature * (w * q * size).norm()


def check_dist(
    emulator: ModuleType,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    condition: float = 1,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """``condition``: by how much the oracle, in float64 as well, magnifies its own rounding."""
    options = {"divergence_": DIST, "kd_weight": 2.0, "beta": 1.0, **options}
    loss, both, grad = launch(emulator, student, teacher, labels, **options)
    assert grad is not None
    unit = options["kd_weight"] * options.get("temperature", 4.0) ** 2
    unit *= options.get("alpha", 1.0) + options["beta"]
    true, true_grad = oracle(student.double(), teacher.double(), labels, options)
    # 16-bit eager has underflowing squares: it is not what anyone should be held to.
    exact = torch.float64 if student.dtype == torch.float64 else torch.float32
    eager, eager_grad = oracle(student.to(exact), teacher.to(exact), labels, options)
    eps = 1e-12 * condition if student.dtype == torch.float64 else 1e-6
    off = (both.double() - true).norm()
    assert off <= (eager.double() - true).norm() + eps * max(true.norm(), unit, 1)
    torch.testing.assert_close(loss, both[0] + both[1], rtol=1e-6, atol=1e-6)
    norm = max(true_grad.norm(), terms(student, teacher, labels, options), 0.1)
    grad_off = (grad.double() - true_grad).norm()
    if student.dtype in (torch.bfloat16, torch.float16):
        rounding = (true_grad.to(student.dtype).double() - true_grad).norm()
        assert grad_off <= 1.2 * rounding + eps * norm
    else:
        assert grad_off <= (eager_grad.double() - true_grad).norm() + eps * norm
    return loss, grad


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 100, 1000, 1025, 7001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dist_matches_float64(emulator: ModuleType, dtype: torch.dtype, classes: int) -> None:
    for rows in (1, 5) if classes > 1000 else (1, 3, 41):
        check_dist(emulator, *logits(rows, classes, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dist_of_many_rows(emulator: ModuleType, dtype: torch.dtype) -> None:
    """Runs of rows are merged; in between, rows and whole runs that do not count."""
    student, teacher, labels = logits(601, 9, dtype, ignored=0.3)
    check_dist(emulator, student, teacher, labels)
    labels[:200] = IGNORE
    student[:200] = float("nan")
    check_dist(emulator, student, teacher, labels, row_weight=torch.linspace(0, 3, 601))


DIST_OPTIONS: dict[str, dict[str, Any]] = {
    "only hard": {"kd_weight": 0.0},
    "only soft": {"ce_weight": 0.0},
    "only rows": {"beta": 0.0},
    "only columns": {"alpha": 0.0},
    "neither": {"alpha": 0.0, "beta": 0.0},
    "alpha, beta": {"alpha": 0.3, "beta": 1.7},
    "T = 1": {"temperature": 1.0},
    "T = 3": {"temperature": 3.0},
    "off the powers": {"temperature": 2.5},
    "ignore_index is a class": {"ignore_index": 1},
    "smoothing": {"label_smoothing": 0.1},
    "class weight, off the powers": {"class_weight": True, "temperature": 0.7},
    "class weight, smoothing": {"class_weight": True, "label_smoothing": 0.2},
    "row weight": {"row_weight": True},
    "everything": {
        "row_weight": True,
        "class_weight": True,
        "label_smoothing": 0.2,
        "temperature": 2.5,
    },
}


@pytest.mark.parametrize("case", DIST_OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dist_options(either: ModuleType, dtype: torch.dtype, case: str) -> None:
    for rows, classes in ((41, 33), (6, 1500), (3, 7001)):
        student, teacher, labels = logits(rows, classes, dtype, ignored=0.3)
        labels[0] = 2
        options = dict(DIST_OPTIONS[case])
        labels = labels.where(labels != IGNORE, options.get("ignore_index", IGNORE))
        if "class_weight" in options:
            options["class_weight"] = torch.linspace(0.5, 2, classes)
        if "row_weight" in options:
            options["row_weight"] = torch.tensor([0.25, 0.0, 3.0]).repeat(rows)[:rows]
        check_dist(either, student, teacher, labels, **options)
        if not {"ignore_index", "class_weight"} & set(options) and case != "only hard":
            check_dist(either, student, teacher, None, **options)
    # Without a gradient the same loss, and nothing is written.
    loss, _, _ = launch(either, student, teacher, labels, divergence_=DIST, **options)
    again, _, _ = launch(
        either, student, teacher, labels, divergence_=DIST, need_grad=False, **options
    )
    assert torch.equal(loss, again)


@pytest.mark.parametrize("shape", [(20, 131), (3, 1500), (2, 9001)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dist_strides_and_alignment(
    emulator: ModuleType, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    rows, classes = shape
    student, teacher, labels = logits(rows, classes, dtype)
    for at in ((0, 0), (8, 8), (3, 3), (1, 2), (5, 0)):
        wide = [torch.full((rows, classes + 40 - classes % 8), float("nan"), dtype=dtype)] * 2
        s, t = (w.clone()[:, i : i + classes] for w, i in zip(wide, at, strict=True))
        check_dist(emulator, s.copy_(student), t.copy_(teacher), labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [33, 1100, 9001])
def test_dist_of_rows_that_may_hold_anything(
    either: ModuleType, classes: int, dtype: torch.dtype
) -> None:
    student, teacher, labels = logits(6, classes, dtype)
    labels[1:3] = IGNORE
    labels[5] = IGNORE
    expected = launch(either, student, teacher, labels, divergence_=DIST)
    for value in (float("nan"), INF, -INF):
        spoilt, other = student.clone(), teacher.clone()
        spoilt[labels == IGNORE], other[labels == IGNORE] = value, value
        found = launch(either, spoilt, other, labels, divergence_=DIST)
        for a, b in zip(found, expected, strict=True):
            assert a is not None
            assert torch.equal(a, b)
        assert found[2] is not None
        assert (found[2][labels == IGNORE] == 0).all()
        every = launch(either, spoilt, other, torch.full((6,), IGNORE), divergence_=DIST)
        assert all((x == 0).all() for x in every)
    nothing = launch(either, student, teacher, labels, divergence_=DIST, row_weight=torch.zeros(6))
    assert all((x == 0).all() for x in nothing)
    empty = launch(either, student[:0], teacher[:0], labels[:0], divergence_=DIST)
    assert all((x == 0).all() for x in empty)


def test_dist_of_a_wrong_label(either: ModuleType) -> None:
    """Its row has no gradient, and the mean is none; what other rows learn stays finite."""
    student, teacher, labels = logits(4, 33, torch.float32)
    for outside in (-1, 33, 33 + 10**10, -(10**12)):
        labels[1] = outside
        for weight in (None, torch.tensor([1.0, 0.0, 1.0, 1.0])):
            loss, both, grad = launch(
                either, student, teacher, labels, divergence_=DIST, row_weight=weight
            )
            assert grad is not None
            assert loss.isnan()
            assert both.isnan().all()
            assert grad[1].isnan().all()
            assert grad[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [9, 1100, 9001])
def test_dist_masked_and_peaked(either: ModuleType, classes: int, dtype: torch.dtype) -> None:
    student, teacher, labels = logits(5, classes, dtype)
    rows = torch.arange(5)
    gone = (labels + 1) % classes
    student[rows, gone], teacher[rows, gone] = -INF, -INF
    student[0, : classes // 2], teacher[0, : classes // 2] = -INF, -INF
    labels[0] = classes - 1
    student[0, classes - 1] = teacher[0, classes - 1] = 1
    for temperature in (2.0, 2.5):
        check_dist(either, student, teacher, labels, temperature=temperature)
    # In one of the two alone.
    less, more = student.clone(), teacher.clone()
    less[1, (labels[1] + 2) % classes] = -INF
    more[2, (labels[2] + 2) % classes] = -INF
    check_dist(either, less, more, labels)
    for right in (True, False):
        student, teacher, labels = logits(5, classes, dtype)
        student[rows, labels] += 30
        teacher[rows, labels if right else (labels + 1) % classes] += 30
        for temperature in (1.0, 2.5):
            check_dist(either, student, teacher, labels, temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(130, 33), (40, 1100), (3, 9001)], ids=str)
def test_dist_of_next_to_nothing(
    either: ModuleType, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """Rows, or columns, or both, with a relative spread of 1e-4: an exponential in float32, rounded
    by 6e-8, leaves three digits of that, as many as bfloat16 stores and fewer than float16."""
    student, teacher, labels = logits(*shape, torch.float64)
    spread = 1e-3 if dtype == torch.float16 else 1e-4
    flat = [(spread * x).to(dtype) for x in (student, teacher)]
    options = {"temperature": 1.0, "condition": 1e4}
    check_dist(either, *flat, labels, **options)
    check_dist(either, flat[0], teacher.to(dtype), labels, **options)
    check_dist(either, student.to(dtype), flat[1], labels, **options)
    if dtype in (torch.float32, torch.float64):  # 16 bits cannot hold such logits
        same = [(x[:1] + 1e-4 * x).to(dtype) for x in (student, teacher)]
        check_dist(either, *same, labels, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dist_without_any_spread(either: ModuleType, dtype: torch.dtype) -> None:
    """Where nothing varies, nothing correlates, and 1e-8 beside 0 magnifies no rounding."""
    student, teacher, labels = logits(70, 40, dtype)
    one, other = student[:1].expand(70, 40), teacher[:1].expand(70, 40)
    for s, t in ((one, other), (one, teacher), (student, other)):
        check_dist(either, s, t, labels, condition=1e4)
    flat = torch.full((70, 33), 0.3, dtype=dtype)
    loss, grad = check_dist(either, flat, flat, None, temperature=1.0)
    assert loss == 4
    assert (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dist_with_a_teacher_of_wider_dtype(emulator: ModuleType, dtype: torch.dtype) -> None:
    for shape in ((20, 33), (4, 1271), (3, 9000)):
        student, _, labels = logits(*shape, dtype)
        _, teacher, _ = logits(*shape, torch.float32)
        check_dist(emulator, student, teacher, labels)


@pytest.mark.parametrize("classes", [10, 700, 8300])
def test_dist_on_fewer_blocks_than_rows(emulator: ModuleType, classes: int) -> None:
    student, teacher, labels = logits(37, classes, torch.float32, ignored=0.2)
    try:
        for processors in (1, 3):
            emulator.set_device(processors, False)
            first = check_dist(emulator, student, teacher, labels)
            emulator.set_device(processors, True)
            again = check_dist(emulator, student, teacher, labels)
            for a, b in zip(first, again, strict=True):
                assert torch.equal(a, b)
    finally:
        emulator.set_device(2, False)


def test_what_no_kernel_serves(either: ModuleType) -> None:
    student, teacher, labels = logits(3, 7, torch.float32)
    with pytest.raises(ValueError, match="dtypes of student and teacher"):
        launch(either, student, teacher.double(), labels)
    with pytest.raises(ValueError, match="decoupled divergence needs labels"):
        launch(either, student, teacher, None, divergence_="dkd")
    for reduction in ("none", "sum"):
        with pytest.raises(ValueError, match="DIST is a mean over the batch"):
            launch(either, student, teacher, labels, divergence_=DIST, reduction=reduction)


# The emulator itself: it must find what it is there to find.


@pytest.mark.parametrize(
    ("kernel", "error"),
    [
        ("divergent_shuffle", "divergent collective"),
        ("two_places", "divergent collective"),
        ("outside_the_mask", "lane 20, outside the mask"),
        ("partial_barrier", "partial barrier"),
        ("early_return", "has returned.*partial barrier|partial barrier"),
    ],
)
def test_emulator_rejects(emulator: ModuleType, kernel: str, error: str) -> None:
    with pytest.raises(RuntimeError, match=error):
        emulator.run(kernel)
    # And it is as good as new afterwards.
    assert emulator.run("exchange") == [i ^ 32 for i in range(64)]


def test_emulator_shows_a_missing_barrier(module: ModuleType) -> None:
    expected = [i ^ 32 for i in range(64)]
    for reverse in (False, True):
        module.set_device(2, reverse)
        assert module.run("missing_barrier") != expected
        assert module.run("exchange") == expected
    module.set_device(2, False)


def test_emulated_dynamic_shared_memory(emulator: ModuleType) -> None:
    assert emulator.run("dynamic") == [i ^ 63 for i in range(64)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(SANITIZED, reason="runs under the sanitizers already")
def test_under_the_sanitizers() -> None:
    """What the kernels read and write out of bounds, which the numbers need not show."""
    chosen = "boundary or strides or scale or rejects or options or (float64 and forward)"
    # Of DIST, whose launches are four to a case, what reaches every load and store.
    chosen = f"(not dist and ({chosen})) or (dist and (strides or many or everything))"
    # The order of the warps moves no address.
    chosen = f"({chosen}) and not reversed"
    under_the_sanitizers(__file__, chosen)


def under_the_sanitizers(file: str, chosen: str) -> None:
    """Tests of a file, in a process of their own."""
    compiler = shutil.which("g++")
    if compiler is None or not (ROOT / "setup.py").exists():
        pytest.skip("no source checkout with a C++ compiler")
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name=lib{name}.so"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("the compiler comes without its sanitizers")
    environment = {**os.environ, "FASTXKD_SANITIZE": "1"}
    build(ROOT / "build" / "emulator-sanitize", environment)
    environment["LD_PRELOAD"] = " ".join(libraries)
    environment["ASAN_OPTIONS"] = "detect_leaks=0"
    environment["UBSAN_OPTIONS"] = "halt_on_error=1:print_stacktrace=1"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", chosen],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
