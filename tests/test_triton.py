"""The Triton kernels against autograd in float64.

On a machine without a GPU Triton's interpreter runs them. It must be chosen before the kernels are
imported and would reach into torch.compile's own kernels, so the cases run in a process of their
own, which reports every one of them; where there is a GPU a second such process runs them on it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import needs

ROOT = Path(__file__).resolve().parent.parent
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", "dkd")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1, 1), (3, 2), (7, 33), (41, 1271), (3, 5003))
TEMPERATURES = (0.5, 1.0, 2.0, 3.0, 4.0, 7.3)
INF, NAN = float("inf"), float("nan")
IGNORE = -100
GUARD = 4096  # no block is longer
DEFAULTS: dict[str, Any] = {
    "temperature": 4.0,
    "ce_weight": 0.3,
    "kd_weight": 0.9,
    "divergence": "forward_kl",
    "alpha": 1.0,
    "beta": 0.5,
    "ignore_index": IGNORE,
    "label_smoothing": 0.0,
    "class_weight": None,
    "row_weight": None,
    "reduction": "batchmean",
}


# --- the oracle


def _sum_where(p: Tensor, ratio: Tensor) -> Tensor:
    """sum p * ratio over the classes with a probability; the others have infinite logarithms."""
    return (p * ratio.masked_fill(p == 0, 0)).sum(1)


def divergence_of(
    student: Tensor, teacher: Tensor, labels: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """[rows], of softened logits, differentiable."""
    log_q, log_p = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
    q, p = log_q.exp(), log_p.exp()
    kind, beta = options["divergence"], options["beta"]
    if kind == "forward_kl":
        return _sum_where(p, log_p - log_q.masked_fill(p == 0, 0))
    if kind == "reverse_kl":
        return _sum_where(q, log_q.masked_fill(q == 0, 0) - log_p)
    if kind == "jsd":
        log_m = (beta * p + (1 - beta) * q).clamp_min(1e-300 if q.dtype == torch.float64 else 1e-37)
        log_m = log_m.log()
        to_teacher = _sum_where(p, log_p - log_m)
        return beta * to_teacher + (1 - beta) * _sum_where(q, log_q.masked_fill(q == 0, 0) - log_m)
    if kind == "tvd":
        return (q - p).abs().sum(1) / 2
    assert labels is not None
    rows, classes = student.shape
    at = F.one_hot(labels, classes).bool()

    def split(z: Tensor) -> tuple[Tensor, Tensor]:
        """log of (target, rest), and log of the distribution among the rest."""
        rest = z[~at].reshape(rows, classes - 1)
        both = torch.stack([z[at], rest.logsumexp(1)], 1) if classes > 1 else z[at][:, None]
        return F.log_softmax(both, 1), F.log_softmax(rest, 1)

    (log_b_q, log_r_q), (log_b_p, log_r_p) = split(student), split(teacher)
    target = _sum_where(log_b_p.exp(), log_b_p - log_b_q)
    gone = log_r_p == -INF
    rest = _sum_where(log_r_p.exp(), log_r_p - log_r_q.masked_fill(gone, 0))
    return options["alpha"] * target + beta * rest


def dist_of(student: Tensor, teacher: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
    """Of softened logits [rows, classes], row i counted weight_i times; differentiable."""

    def rho(u: Tensor, v: Tensor, w: Tensor, dim: int) -> Tensor:
        def norm(x: Tensor) -> Tensor:
            square = (w * x * x).sum(dim)
            # Kept off the square root's pole, where autograd would find 0 / 0.
            return torch.where(square > 0, square.where(square > 0, 1.0).sqrt(), 0.0)

        return (w * u * v).sum(dim) / (norm(u) * norm(v) + 1e-8)

    q, p = student.softmax(1), teacher.softmax(1)
    classes, total, w = q.shape[1], weight.sum(), weight[:, None]
    of_rows = rho(q - 1 / classes, p - 1 / classes, torch.ones_like(w), 1)
    mean_q, mean_p = (w * q).sum(0) / total, (w * p).sum(0) / total
    of_columns = rho(q - mean_q, p - mean_p, w, 0)
    inter, intra = 1 - (weight * of_rows).sum() / total, 1 - of_columns.mean()
    return options["alpha"] * inter + options["beta"] * intra


def oracle_parts(
    student: Tensor, teacher: Tensor, labels: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(hard, soft) in the dtype of the student's logits."""
    dtype, temperature = student.dtype, options["temperature"]
    rows = student.shape[0]
    keep = torch.arange(rows)
    if labels is not None:
        keep = (labels != options["ignore_index"]).nonzero()[:, 0]
    s, t = student[keep], teacher[keep].to(dtype)
    y = None if labels is None else labels[keep]
    on_row = torch.ones(len(keep), dtype=torch.float64)
    if options["row_weight"] is not None:
        on_row = options["row_weight"][keep].double()
    hard, soft, on_label = s.new_zeros(len(keep)), s.new_zeros(len(keep)), on_row
    if y is not None and options["ce_weight"] != 0:
        weight = options["class_weight"]
        if weight is not None:
            on_label = on_row * weight.double()[y]
        hard = F.cross_entropy(
            s,
            y,
            weight=None if weight is None else weight.to(dtype),
            label_smoothing=options["label_smoothing"],
            reduction="none",
        )
        hard = options["ce_weight"] * on_row.to(dtype) * hard
    scale = options["kd_weight"] * temperature**2
    if options["divergence"] == "dist" and options["kd_weight"] != 0:
        # A mean of its own: there is nothing of a row to return.
        value = s.new_zeros(())
        if on_row.sum() > 0:
            value = dist_of(s / temperature, t / temperature, on_row.to(dtype), options)
        hard = hard.sum() / on_label.sum().to(dtype) if on_label.sum() > 0 else 0 * hard.sum()
        return hard, scale * value
    if options["kd_weight"] != 0 and len(keep):
        soft = divergence_of(s / temperature, t / temperature, y, options)
        soft = scale * on_row.to(dtype) * soft
    if options["reduction"] == "none":
        place = student.new_zeros(rows)
        return place.index_add(0, keep, hard), place.index_add(0, keep, soft)
    hard, soft = hard.sum(), soft.sum()
    if options["reduction"] == "batchmean":
        hard = hard / on_label.sum().to(dtype) if on_label.sum() > 0 else 0 * hard
        soft = soft / on_row.sum().to(dtype) if on_row.sum() > 0 else 0 * soft
    return hard, soft


def oracle(
    student: Tensor, teacher: Tensor, labels: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_(True)
    parts = oracle_parts(leaf, teacher, labels, options)
    loss = parts[0] + parts[1]
    (grad,) = torch.autograd.grad(loss.sum() + 0 * leaf[:0].sum(), leaf)
    return loss.detach(), torch.stack([p.detach() for p in parts]), grad


# --- inputs and comparison; from here on it is the other process that runs


def logits(
    rows: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    *,
    scale: float = 1.0,
    ignored: float = 0.0,
    mask: str = "",
    peak: float = 0.0,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 7919 + classes)
    student = scale * torch.randn(rows, classes, generator=generator) + offset
    teacher = scale * torch.randn(rows, classes, generator=generator)
    y = torch.randint(classes, (rows,), generator=generator)
    every = torch.arange(rows)
    if peak:
        student[every, y] += abs(peak)
        teacher[every, y if peak > 0 else (y + 1) % classes] += abs(peak)
    if mask:
        teacher[every, (y + 1) % classes] = -INF
        if mask == "both":
            student[every, (y + 1) % classes] = -INF
    y[torch.rand(rows, generator=generator) < ignored] = IGNORE
    return student.to(dtype), teacher.to(dtype), y


class Guards:
    """Buffers of what the kernels write, with known numbers before and after them: the interpreter
    does not notice a store out of bounds."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []
        self.real = torch.empty

    def empty(self, shape: Any, *, dtype: torch.dtype, device: Any) -> Tensor:
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 2 * GUARD,), 77.0, dtype=dtype, device=device)
        self.buffers.append((buffer, count))
        out = buffer[GUARD : GUARD + count].view(shape)
        return out.fill_(NAN) if dtype.is_floating_point else out

    def check(self) -> None:
        for buffer, count in self.buffers:
            assert (buffer[:GUARD] == 77).all(), "stored before the beginning"
            assert (buffer[GUARD + count :] == 77).all(), "stored past the end"


def run(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    options: dict[str, Any],
    need_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel itself, on the device of this process."""
    from fastxkd._triton import kd_loss as kernels
    from fastxkd.ops._logits import DIVERGENCES as codes
    from fastxkd.ops._logits import REDUCTIONS

    def there(value: Any) -> Any:
        return value.to(DEVICE) if isinstance(value, Tensor) else value

    o = {name: there(value) for name, value in options.items()}
    guards = Guards()
    torch.empty = guards.empty  # type: ignore[assignment]
    try:
        results = kernels.kd_loss(
            there(student),
            there(teacher),
            there(labels),
            o["class_weight"],
            o["row_weight"],
            o["temperature"],
            o["ce_weight"],
            o["kd_weight"],
            codes[o["divergence"]],
            o["alpha"],
            o["beta"],
            o["ignore_index"],
            o["label_smoothing"],
            REDUCTIONS[o["reduction"]],
            need_grad,
        )
    finally:
        torch.empty = guards.real
    guards.check()
    return tuple(r.cpu() for r in results)  # type: ignore[return-value]


def truncated(grad: Tensor) -> Tensor:
    """To bfloat16 as the interpreter stores it: the lower half of a float32's bits cut off."""
    return (grad.float().view(torch.int32) & -65536).view(torch.float32).double()


def check(
    student: Tensor, teacher: Tensor, labels: Tensor | None, **changes: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's error may exceed eager's of the same dtype by rounding of the last digit; a
    16-bit gradient's that of storing it by a fifth."""
    options = DEFAULTS | changes
    loss, parts, grad = run(student, teacher, labels, options)
    double = student.dtype == torch.float64
    assert loss.dtype == parts.dtype == (torch.float64 if double else torch.float32)
    assert (grad.dtype, grad.shape) == (student.dtype, student.shape)
    assert grad.is_contiguous()

    true_loss, true_parts, true_grad = oracle(student.double(), teacher.double(), labels, options)
    half = student.dtype in (torch.bfloat16, torch.float16)
    # In float16 eager's squares underflow to 0 / 0: DIST is held to float32's error.
    narrow = student.float() if half and options["divergence"] == "dist" else student
    eager_loss, eager_parts, eager_grad = oracle(narrow, teacher, labels, options)
    assert (loss.shape, parts.shape) == (true_loss.shape, true_parts.shape)
    eps = 1e-12 if double else 1e-6
    luckless = torch.zeros(())
    if options["divergence"] != "dist":
        # Errors of single rows, in quadrature: in eager's own sum they may cancel by luck.
        by_row = options | {"reduction": "none"}
        rows_true = sum(oracle_parts(student.double(), teacher.double(), labels, by_row))
        rows_eager = sum(oracle_parts(student, teacher, labels, by_row))
        luckless = (rows_eager.double() - rows_true).norm()
        if options["reduction"] == "batchmean":
            luckless /= student.shape[0]
    for ours, true, eager in (
        (loss, true_loss, eager_loss),
        (parts, true_parts, eager_parts),
    ):
        off, eager_off = (ours.double() - true).norm(), (eager.double() - true).norm()
        limit = max(eager_off, luckless) + eps * max(true.norm(), 1)
        assert off <= limit, f"loss off by {off:.3g}, at most {limit:.3g}"

    # The size of what the gradient is the difference of: a scale where they cancel to nothing.
    terms = options["ce_weight"] + options["kd_weight"] * options["temperature"]
    terms *= student.shape[0] ** (-0.5 if options["reduction"] == "batchmean" else 0.5)
    norm = max(true_grad.norm(), 0.1 * terms)
    off = (grad.double() - true_grad).norm()
    limit = (eager_grad.double() - true_grad).norm() + eps * norm
    if half:
        stored = true_grad.to(student.dtype).double()
        if DEVICE == "cpu" and student.dtype == torch.bfloat16:
            stored = truncated(true_grad)
        limit = 1.2 * (stored - true_grad).norm() + eps * norm
    assert off <= limit, f"gradient off by {off:.3g}, at most {limit:.3g}"
    return loss, parts, grad


def every_divergence(
    how: dict[str, Any],
    shape: tuple[int, int],
    divergences: tuple[str, ...] = DIVERGENCES,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
    **changes: Any,
) -> None:
    """On both kernels: the looped one in blocks far smaller than it has, for its turns."""
    from fastxkd._triton import plan

    usual = plan.ON_CHIP, plan.LOOPED_BLOCK
    for looped in (False, True):
        if looped:
            plan.ON_CHIP, plan.LOOPED_BLOCK = {4: 0, 8: 0}, {4: 32, 8: 16}
        try:
            for divergence in divergences:
                for dtype in dtypes:
                    given = logits(*shape, dtype, **how)
                    try:
                        check(*given, divergence=divergence, **changes)
                    except AssertionError as error:
                        name = "looped" if looped else "on chip"
                        raise AssertionError(f"{name}, {divergence}, {dtype}: {error}") from error
        finally:
            plan.ON_CHIP, plan.LOOPED_BLOCK = usual


CASES: dict[str, Callable[[], None]] = {}
WEIGHTS = torch.linspace(0, 2, 33)
ROW_WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.0, 0.25, 3.0, 1.5, 0.75, 1.25])


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__.removeprefix("_").replace("_", " ")] = function
    return function


def _matches(shape: tuple[int, int], dtype: torch.dtype, divergence: str) -> None:
    check(*logits(*shape, dtype), divergence=divergence)


for _shape in SHAPES:
    for _dtype in DTYPES:
        for _divergence in DIVERGENCES:
            # Many rows cost the interpreter seconds: one dtype with every divergence is enough.
            if _shape[0] < 10 or _dtype == torch.float32 or _divergence == "forward_kl":
                _name = f"{_shape[0]} x {_shape[1]}, {str(_dtype)[6:]}, {_divergence}"
                CASES[_name] = partial(_matches, _shape, _dtype, _divergence)

for _name, (_how, _changes) in {
    **{f"T={t}": ({}, {"temperature": t}) for t in TEMPERATURES},
    **{f"T={t}, scale 10": ({"scale": 10}, {"temperature": t}) for t in (0.5, 1.0, 4.0, 7.3)},
    "only hard": ({}, {"kd_weight": 0.0}),
    "only soft": ({}, {"ce_weight": 0.0}),
    "both weights 0": ({}, {"ce_weight": 0.0, "kd_weight": 0.0}),
    "ignore some": ({"ignored": 0.4}, {}),
    "ignore_index is a class": ({}, {"ignore_index": 1}),
    "sum": ({"ignored": 0.3}, {"reduction": "sum", "class_weight": WEIGHTS}),
    "none": ({"ignored": 0.3}, {"reduction": "none", "class_weight": WEIGHTS}),
    "none, row weight": ({"ignored": 0.3}, {"reduction": "none", "row_weight": ROW_WEIGHTS}),
    "label smoothing": ({"ignored": 0.3}, {"label_smoothing": 0.1}),
    "label smoothing 1, T=2.5": ({}, {"label_smoothing": 1.0, "temperature": 2.5}),
    "class weight": ({}, {"class_weight": WEIGHTS}),
    "row weight": ({"ignored": 0.3}, {"row_weight": ROW_WEIGHTS}),
    "all weights and smoothing": (
        {"ignored": 0.3},
        {"class_weight": WEIGHTS, "row_weight": ROW_WEIGHTS, "label_smoothing": 0.2},
    ),
    "all weights and smoothing, T=2.5, sum": (
        {"ignored": 0.3},
        {
            "class_weight": WEIGHTS.double(),
            "row_weight": ROW_WEIGHTS.double(),
            "label_smoothing": 0.2,
            "temperature": 2.5,
            "reduction": "sum",
        },
    ),
    "alpha and beta": ({}, {"alpha": 0.3, "beta": 0.8}),
    "masked in both": ({"mask": "both"}, {}),
    "masked in both, T=1": ({"mask": "both"}, {"temperature": 1.0}),
    "peaked, right": ({"peak": 30.0}, {}),
    "peaked, wrong": ({"peak": -30.0}, {}),
    "peaked, T=1": ({"peak": 60.0}, {"temperature": 1.0}),
    "offset": ({"offset": 100.0}, {}),
    "offset, smoothing": ({"offset": 100.0}, {"label_smoothing": 0.1, "temperature": 2.5}),
}.items():
    CASES[_name] = partial(every_divergence, _how, (9, 33), **_changes)


@case
def _masked_in_teacher() -> None:
    for divergence in ("forward_kl", "jsd", "tvd", "dkd"):
        check(*logits(9, 33, mask="teacher"), divergence=divergence, temperature=2.0)
    options = DEFAULTS | {"divergence": "reverse_kl", "reduction": "none"}
    loss = run(*logits(9, 33, mask="teacher"), options)[0]
    assert (loss == INF).all()


@case
def _masked_in_student_alone_is_infinite() -> None:
    student, teacher, labels = logits(9, 33)
    student[2, (labels[2] + 1) % 33] = -INF
    for divergence in ("forward_kl", "dkd"):
        loss = run(
            student, teacher, labels, DEFAULTS | {"divergence": divergence, "reduction": "none"}
        )[0]
        assert loss[2] == INF
        assert loss[torch.arange(9) != 2].isfinite().all()
    check(student, teacher, labels, divergence="reverse_kl")


@case
def _no_labels() -> None:
    for divergence in DIVERGENCES[:4]:
        student, teacher, _ = logits(9, 33)
        check(student, teacher, None, divergence=divergence)
        check(student, teacher, None, divergence=divergence, row_weight=ROW_WEIGHTS)


@case
def _all_but_the_label_masked() -> None:
    """Nothing is left among the rest: that part of the decoupled loss is 0."""
    student, teacher, labels = logits(9, 33)
    for z in (student, teacher):
        z[4] = -INF
        z[4, labels[4]] = 1.0
    options = DEFAULTS | {"divergence": "dkd", "reduction": "none"}
    loss, _, grad = run(student, teacher, labels, options)
    assert loss[4] == 0
    assert not grad[4].any()
    assert loss.isfinite().all()
    assert grad.isfinite().all()


@case
def _ignored_rows_may_hold_anything() -> None:
    student, teacher, labels = logits(12, 33, ignored=0.5)
    gone = labels == IGNORE
    assert 0 < gone.sum() < 12
    for divergence in DIVERGENCES:
        options = DEFAULTS | {"divergence": divergence}
        clean = run(student, teacher, labels, options)
        dirty_student, dirty_teacher = student.clone(), teacher.clone()
        dirty_student[gone], dirty_teacher[gone] = NAN, INF
        dirty = run(dirty_student, dirty_teacher, labels, options)
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
        assert not dirty[2][gone].any()


@case
def _all_rows_ignored() -> None:
    nothing = torch.full((4, 6), NAN)
    for reduction in ("batchmean", "sum", "none"):
        for result in run(
            nothing, nothing, torch.full((4,), IGNORE), DEFAULTS | {"reduction": reduction}
        ):
            assert not result.any()


def _spoiled(divergence: str, spoil: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    options = DEFAULTS | {"divergence": divergence, "reduction": "none"}
    student, teacher, labels = logits(8, 33)
    clean_loss, _, clean = run(student, teacher, labels, options)
    spoil(student, teacher, labels)
    loss, _, grad = run(student, teacher, labels, options)
    rest = torch.arange(8) != 3
    assert loss[3].isnan()
    assert grad[3].isnan().all()
    assert torch.equal(loss[rest], clean_loss[rest])
    assert torch.equal(grad[rest], clean[rest])


@case
def _bad_value_stays_in_its_row() -> None:
    for divergence in DIVERGENCES:
        for bad in (NAN, INF):
            for whose in (0, 1):
                _spoiled(divergence, lambda *z: z[whose][3].__setitem__(5, bad))  # noqa: B023


@case
def _label_outside_of_the_classes_makes_its_row_NaN() -> None:
    for divergence in DIVERGENCES:
        for label in (33, -1, 40, 2**40):
            _spoiled(divergence, lambda *z: z[2].__setitem__(3, label))  # noqa: B023


@case
def _layouts() -> None:
    """Strided rows, expanded rows and transposed memory give what contiguous copies give."""
    for classes in (33, 64):
        student, teacher, labels = logits(7, classes)
        wide = torch.full((7, classes + 17), NAN)
        wide[:, 3 : 3 + classes] = student
        expected = run(student, teacher, labels, DEFAULTS)
        for s, t in (
            (wide[:, 3 : 3 + classes], teacher),
            (student, teacher.T.contiguous().T),
            (torch.stack([student, -student], 2).flatten(1)[:, ::2], teacher),
        ):
            found = run(s, t, labels, DEFAULTS)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        expanded = run(student[:1].expand(7, classes), teacher[:1].expand(7, -1), labels, DEFAULTS)
        repeated = run(student[:1].repeat(7, 1), teacher[:1].repeat(7, 1), labels, DEFAULTS)
        assert all(torch.equal(a, b) for a, b in zip(expanded, repeated, strict=True))


@case
def _rows_are_read_within_their_bounds() -> None:
    """NaN around the matrices: a load out of bounds would bring it in."""
    for shape in ((5, 33), (2, 5003)):
        student, teacher, labels = logits(*shape)
        expected = run(student, teacher, labels, DEFAULTS)
        around = []
        for z in (student, teacher):
            buffer = torch.full((z.numel() + 8192,), NAN)
            buffer[4096:-4096] = z.flatten()
            around.append(buffer[4096:-4096].view(shape))
        found = run(*around, labels, DEFAULTS)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@case
def _without_gradient() -> None:
    for shape in ((9, 33), (2, 5003)):
        for divergence in DIVERGENCES:
            options = DEFAULTS | {"divergence": divergence}
            loss, parts, grad = run(*logits(*shape), options, need_grad=False)
            expected = run(*logits(*shape), options)
            assert grad.numel() == 0
            assert torch.equal(loss, expected[0])
            assert torch.equal(parts, expected[1])


@case
def _no_rows() -> None:
    for reduction in ("batchmean", "sum", "none"):
        loss, parts, grad = run(
            torch.zeros(0, 5),
            torch.zeros(0, 5),
            torch.zeros(0, dtype=torch.int64),
            DEFAULTS | {"reduction": reduction},
        )
        shape = (0,) if reduction == "none" else ()
        assert (loss.shape, parts.shape, grad.shape) == (shape, (2, *shape), (0, 5))
        assert not loss.any()
        assert not parts.any()


@case
def _teacher_of_a_wider_dtype() -> None:
    for narrow in (torch.bfloat16, torch.float16):
        for divergence in DIVERGENCES:
            student, _, labels = logits(9, 33, narrow)
            _, teacher, _ = logits(9, 33)
            assert not torch.equal(teacher, teacher.to(narrow).float())
            check(student, teacher, labels, divergence=divergence)


@case
def _student_that_equals_the_teacher_has_no_soft_gradient() -> None:
    student, _, labels = logits(9, 33)
    for divergence in ("forward_kl", "jsd", "tvd"):
        options = DEFAULTS | {"divergence": divergence, "ce_weight": 0.0}
        _, parts, grad = run(student, student.clone(), labels, options)
        assert parts.abs().max() < 1e-6
        assert grad.abs().max() < 1e-8


@case
def _small_differences_keep_their_digits() -> None:
    """The label's gradient is q - p, of two numbers that float32 cannot tell from 1."""
    student, teacher, labels = logits(9, 33, peak=20.0)
    options = DEFAULTS | {
        "divergence": "dkd",
        "temperature": 1.0,
        "ce_weight": 0.0,
        "beta": 0.0,
    }
    grad = run(student, teacher, labels, options)[2].double()
    true = oracle(student.double(), teacher.double(), labels, options)[2]
    assert true.abs().max() < 1e-6
    torch.testing.assert_close(grad, true, rtol=1e-4, atol=0)


@case
def _twice_the_same_bits_and_the_ticket_goes_back_to_0() -> None:
    from fastxkd._triton import kd_loss as kernels

    own = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    real, kernels.ticket = kernels.ticket, lambda tensor: own  # type: ignore[assignment]
    try:
        first = run(*logits(41, 1271), DEFAULTS)
        assert not own.any()
        second = run(*logits(41, 1271), DEFAULTS)
        assert not own.any()
    finally:
        kernels.ticket = real
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _scaled(grad: Tensor, upstream: Tensor) -> Tensor:
    from fastxkd._triton import kd_loss as kernels

    guards = Guards()
    buffer = guards.empty(grad.shape, dtype=grad.dtype, device=DEVICE)
    buffer.copy_(grad)
    kernels.kd_loss_scale_(buffer, upstream.to(DEVICE))
    guards.check()
    return buffer.cpu()


@case
def _scaling() -> None:
    for dtype in DTYPES:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        for shape in ((1, 1), (7, 33), (5, 64), (3, 5003)):
            grad = torch.randn(shape).to(dtype)
            for upstream in (torch.tensor(0.37), 0.5 + torch.rand(shape[0])):
                upstream = upstream.to(exact)
                found = _scaled(grad, upstream).double()
                true = grad.double() * (upstream.double()[:, None] if upstream.dim() else upstream)
                stored = true.to(dtype).double()
                if DEVICE == "cpu" and dtype == torch.bfloat16:
                    stored = truncated(true)
                torch.testing.assert_close(found, stored, rtol=2e-7, atol=0)


@case
def _scaling_by_1_stores_nothing() -> None:
    grad = torch.randn(6, 33)
    some = torch.tensor([1.0, 2.0, 1.0, 1.0, -1.0, 1.0])
    stores: list[int] = []
    if DEVICE == "cpu":
        from triton.runtime import interpreter

        real = interpreter.interpreter_builder.create_masked_store

        def counted(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            stores.append(int(mask.data.sum()))
            return real(pointers, value, mask, *rest)

        interpreter.interpreter_builder.create_masked_store = counted
    assert torch.equal(_scaled(grad, torch.tensor(1.0)), grad)
    assert torch.equal(_scaled(grad, torch.ones(6)), grad)
    assert sum(stores) == 0
    assert torch.equal(_scaled(grad, some), grad * some[:, None])
    if DEVICE == "cpu":
        assert sum(stores) == 2 * 33
        interpreter.interpreter_builder.create_masked_store = real


@case
def _through_the_public_function() -> None:
    import fastxkd

    student, teacher, labels = logits(9, 33, ignored=0.3)
    there = [z.to(DEVICE) for z in (student, teacher, labels)]
    with fastxkd.use_backend("triton"):
        served = {
            b.kernel for b in fastxkd.backends() if (b.operator, b.device) == ("kd_loss", DEVICE)
        }
        assert served == {"triton"}
        for reduction in ("batchmean", "none"):
            for divergence in DIVERGENCES[:4]:
                chosen = {"divergence": divergence, "reduction": reduction, "ce_weight": 0.3}
                upstream = torch.rand(9 if reduction == "none" else ()) + 0.5
                leaf = there[0].clone().requires_grad_(True)
                loss = fastxkd.kd_loss(leaf, *there[1:], beta=0.5, kd_weight=0.9, **chosen)
                loss.backward(upstream.to(DEVICE))
                # The bits that the kernels give, which are held to the oracle here as well.
                kernel_loss, _, grad = check(student, teacher, labels, **chosen)
                assert torch.equal(loss.detach().cpu(), kernel_loss)
                factor = upstream[:, None] if upstream.dim() else upstream
                assert torch.equal(leaf.grad.cpu(), grad * factor)


# --- DIST, whose columns tie all rows together


dist_on_both = partial(every_divergence, divergences=("dist",))
EXTREMES = {"scale": 1e-4}, {"scale": 10.0}, {"peak": 30.0}, {"peak": -30.0}, {"offset": 100.0}
DIST_OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{f"T={t}": ({"ignored": 0.3}, {"temperature": t}) for t in (1.0, 2.5)},
    **{str(how): (how, {"temperature": t}) for how in EXTREMES for t in (1.0, 4.0)},
    "only rows": ({}, {"beta": 0.0}),
    "only columns": ({}, {"alpha": 0.0}),
    "only hard": ({}, {"kd_weight": 0.0}),
    "only soft": ({}, {"ce_weight": 0.0}),
    "near-uniform, only columns": ({"scale": 1e-4}, {"alpha": 0.0, "ce_weight": 0.0}),
    "masked in both": ({"mask": "both"}, {}),
    "masked in teacher": ({"mask": "teacher"}, {"temperature": 2.0}),
    "ignore_index is a class": ({}, {"ignore_index": 1}),
    "row weight": ({"ignored": 0.3}, {"row_weight": ROW_WEIGHTS}),
    "all weights and smoothing": (
        {"ignored": 0.3},
        {"class_weight": WEIGHTS, "row_weight": ROW_WEIGHTS / 3, "label_smoothing": 0.2},
    ),
    "all weights and smoothing, T=2.5": (
        {},
        {
            "class_weight": WEIGHTS.double(),
            "row_weight": ROW_WEIGHTS.double(),
            "label_smoothing": 0.2,
            "temperature": 2.5,
        },
    ),
}
for _name, (_how, _changes) in DIST_OPTIONS.items():
    if _how.get("scale", 1.0) < 1:
        # Of near-uniform probabilities in float64 the oracle knows no more digits than the kernel.
        _changes["dtypes"] = (torch.float32,)
    CASES[f"dist, {_name}"] = partial(dist_on_both, _how, (9, 33), **_changes)
for _shape in (*((9, c) for c in (1, 2, 3, 7, 100, 1025)), (1, 33), (2, 5003), (70, 40)):
    for _dtype in DTYPES[:1] if _shape[1] == 5003 else DTYPES:
        _name = f"dist, {_shape[0]} x {_shape[1]}, {str(_dtype)[6:]}"
        CASES[_name] = partial(_matches, _shape, _dtype, "dist")


@case
def _dist_of_several_runs() -> None:
    """Column moments come in runs of rows and blocks of columns, put together in tiles of runs."""
    from fastxkd._triton import plan

    usual = plan.DOWN_BLOCK, plan.FINISH, plan.device_of
    for processors, finish in ((1, (16, 32)), (2, (2, 8)), (8, (4, 16))):
        plan.DOWN_BLOCK = {4: 16, 8: 16}
        try:
            _with_device(processors, finish)
        finally:
            plan.DOWN_BLOCK, plan.FINISH, plan.device_of = usual


def _with_device(processors: int, finish: tuple[int, int]) -> None:
    from fastxkd._triton import dist, kd_loss, plan

    usual = dist.FINISH, kd_loss.device_of
    dist.FINISH = finish
    kd_loss.device_of = lambda tensor: plan.Device(processors, 32, True)
    try:
        for dtype in (torch.float32, torch.float64):
            given = logits(70, 40, dtype, ignored=0.2)
            check(*given, divergence="dist", row_weight=torch.rand(70))
    finally:
        dist.FINISH, kd_loss.device_of = usual


@case
def _dist_ignored_rows_and_rows_without_weight_may_hold_anything() -> None:
    student, teacher, labels = logits(12, 33, ignored=0.4)
    weight = torch.rand(12)
    weight[labels != IGNORE] += 0.1
    weight[(labels != IGNORE).nonzero()[0]] = 0.0
    gone = (labels == IGNORE) | (weight == 0)
    options = DEFAULTS | {"divergence": "dist", "row_weight": weight}
    clean = check(student, teacher, labels, divergence="dist", row_weight=weight)
    student[gone], teacher[gone] = NAN, INF
    dirty = run(student, teacher, labels, options)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert not dirty[2][gone].any()


@case
def _dist_without_weight_is_0() -> None:
    nothing = torch.full((4, 6), NAN)
    options = DEFAULTS | {"divergence": "dist"}
    for result in run(nothing, nothing, torch.full((4,), IGNORE), options):
        assert not result.any()
    options["row_weight"] = torch.zeros(9)
    for result in run(*logits(9, 33), options):
        assert not result.any()


@case
def _dist_has_no_gradient_without_spread() -> None:
    """Equal rows: no column has spread, and 1 / EPS must not make one of rounding."""
    student, teacher, _ = logits(1, 33)
    for dtype in (torch.float32, torch.float64):
        for rows in (1, 3, 9):
            weight = ROW_WEIGHTS[:rows] / 3
            given = (student.expand(rows, 33).to(dtype), teacher.expand(rows, 33).to(dtype))
            options = DEFAULTS | {"divergence": "dist", "alpha": 0.0, "ce_weight": 0.0}
            loss, _, grad = run(*given, None, options | {"row_weight": weight})
            torch.testing.assert_close(loss, 0.5 * 0.9 * 16 * torch.ones_like(loss))
            assert grad.abs().max() < 1e-9
    flat = torch.zeros(9, 33)
    grad = run(flat, logits(9, 33)[1], None, DEFAULTS | {"divergence": "dist"})[2]
    true = oracle(flat.double(), logits(9, 33)[1].double(), None, DEFAULTS | {"divergence": "dist"})
    assert (grad - true[2]).norm() <= 1e-6 * true[2].norm()


@case
def _dist_bad_value_makes_everything_NaN() -> None:
    """Every row has a share in every column."""
    for spoil in (
        lambda s, t, y: s[3].__setitem__(5, NAN),
        lambda s, t, y: s[3].__setitem__(5, INF),
        lambda s, t, y: t[3].__setitem__(5, NAN),
        lambda s, t, y: s[3].fill_(-INF),
        lambda s, t, y: y.__setitem__(3, 33),
        lambda s, t, y: y.__setitem__(3, 2**40),
    ):
        student, teacher, labels = logits(8, 33)
        spoil(student, teacher, labels)
        loss, _, grad = run(student, teacher, labels, DEFAULTS | {"divergence": "dist"})
        assert loss.isnan()
        assert grad.isnan().all()


@case
def _dist_layouts_bounds_and_bits() -> None:
    for shape in ((7, 33), (7, 64)):
        rows, classes = shape
        student, teacher, labels = logits(*shape)
        options = DEFAULTS | {"divergence": "dist"}
        expected = run(student, teacher, labels, options)
        around = torch.full((2, rows * classes + 8192), NAN)
        around[0, 4096:-4096], around[1, 4096:-4096] = student.flatten(), teacher.flatten()
        inner = [z[4096:-4096].view(shape) for z in around]
        wide = torch.full((rows, classes + 17), NAN)
        wide[:, 3 : 3 + classes] = student
        for s, t in (
            (student, teacher),
            (inner[0], inner[1]),
            (wide[:, 3 : 3 + classes], teacher.T.contiguous().T),
            (torch.stack([student, -student], 2).flatten(1)[:, ::2], teacher),
        ):
            found = run(s, t, labels, options)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        loss, parts, grad = run(student, teacher, labels, options, need_grad=False)
        assert torch.equal(loss, expected[0])
        assert torch.equal(parts, expected[1])
        assert grad.numel() == 0


@case
def _dist_teacher_of_a_wider_dtype() -> None:
    for narrow in (torch.bfloat16, torch.float16):
        student, _, labels = logits(9, 33, narrow)
        check(student, logits(9, 33)[1], labels, divergence="dist")


# --- the two processes

DEVICE = "cpu"


def patch_once() -> None:
    """The interpreter puts its functions in the place of Triton's at every call of a helper, which
    is half of its time; in a process where nothing else runs, once is enough."""
    from triton.runtime import interpreter

    real, done = interpreter._patch_lang, set()

    def patch(function: Any) -> Any:
        modules = frozenset(name for name in ("tl", "core") if name in function.__globals__)
        if modules not in done:
            done.add(modules)
            real(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch


def work(device: str) -> None:
    """Names of cases on stdin; on stdout what was wrong with each, "" for nothing, and seconds."""
    global DEVICE
    DEVICE = device
    if device == "cpu":
        patch_once()
    # Of numpy, on infinities and NaN in lanes that are masked off.
    warnings.simplefilter("ignore", RuntimeWarning)
    verdicts = {}
    for name in json.load(sys.stdin):
        torch.manual_seed(0)
        begin, wrong = time.perf_counter(), ""
        try:
            CASES[name]()
        except Exception:
            wrong = traceback.format_exc()
        verdicts[name] = (wrong, time.perf_counter() - begin)
    json.dump(verdicts, sys.stdout)


@lru_cache
def verdicts(device: str, names: tuple[str, ...]) -> dict[str, tuple[str, float]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    process = subprocess.run(
        [sys.executable, "-c", f"from tests.test_triton import work; work({device!r})"],
        input=json.dumps(names),
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}\n{process.stderr}")
    return json.loads(process.stdout)  # type: ignore[no-any-return]


DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_kernel(name: str, device: str, request: pytest.FixtureRequest) -> None:
    needs("triton")
    chosen = {
        item.callspec.params["name"]
        for item in request.session.items
        if getattr(item, "originalname", "") == "test_kernel" and item.path == request.path
    }
    wrong, _ = verdicts(device, tuple(sorted(chosen)))[name]
    assert not wrong, wrong
