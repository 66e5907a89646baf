"""kd_loss in Triton: one launch for loss and gradient, but for DIST, whose launches dist.py has.

A program works on a tile of rows, then on the next one that no other program has. It first adds up
the weights of all rows, which are what a mean divides by: few bytes, and one launch less. The last
program to finish adds the losses of the rows, always in the same order.

Rows that fit into registers are read once. Longer ones come block after block: sums relative to the
highest logit so far, then the gradient; JSD and TVD know their terms only in between, when q and p
are known. Every sweep turns back where the one before has ended: what was read last is still in the
L2 cache. A label outside of the classes makes its row NaN: to raise, the host would have to wait.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# What triton.jit decorates is not Python, and its tensors have no types that mypy knows.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastxkd._triton import dist
from fastxkd._triton.divergences import (
    DECOUPLED,
    JSD,
    REVERSE_KL,
    TVD,
    divergence_term,
    mixture_terms,
    soft_part,
)
from fastxkd._triton.logits import LOG2E, exponent, load, power, reciprocal
from fastxkd._triton.plan import (
    LEAN_REGISTERS,
    LOOPED_BLOCK,
    REGISTERS,
    Device,
    Launch,
    alignment,
    block_of,
    device_of,
    tile_of,
)
from fastxkd._triton.rows import (
    add_up,
    at_label,
    hard_part,
    means,
    rows_of_tile,
    store_gradient,
    store_loss,
    sum_of_weights,
)
from fastxkd._triton.sums import hard_sum_on_chip, sums_looped, sums_on_chip, without_label
from fastxkd.ops._library import ticket
from fastxkd.reference import kd_loss as reference


@triton.jit
def _kd_loss(
    student,
    teacher,
    labels,
    class_weight,
    row_weight,
    grad,
    loss,
    parts,
    row_parts,
    turn,
    rows: tl.int64,
    units: tl.int64,
    student_units: tl.int64,
    teacher_units: tl.int64,
    factor: tl.float64,
    temperature: tl.float64,
    ce_weight: tl.float64,
    kd_weight: tl.float64,
    alpha: tl.float64,
    beta: tl.float64,
    label_smoothing: tl.float64,
    ignore_index: tl.int64,
    DIVERGENCE: tl.constexpr,
    POWER: tl.constexpr,
    REDUCTION: tl.constexpr,
    HARD: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    ALIGN: tl.constexpr,
    ON_CHIP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    """Classes and strides come in units of ALIGN."""
    classes = units * ALIGN
    student_stride = student_units * ALIGN
    teacher_stride = teacher_units * ALIGN
    factor, temperature = tl.full([], factor, F), tl.full([], temperature, F)
    ce_weight, kd_weight = tl.full([], ce_weight, F), tl.full([], kd_weight, F)
    alpha, beta = tl.full([], alpha, F), tl.full([], beta, F)
    label_smoothing = tl.full([], label_smoothing, F)
    log2e = tl.full([], LOG2E, F)
    MIXTURE: tl.constexpr = (DIVERGENCE == JSD) | (DIVERGENCE == TVD)
    hard_mean, soft_mean = means(
        labels, class_weight, row_weight, rows, classes, ignore_index, HARD, REDUCTION, F
    )
    weight_sum = tl.full([], 0, F)
    if SMOOTH:
        weight_sum = sum_of_weights(class_weight, classes, F)
    last = (tl.cdiv(classes, BLOCK) - 1) * BLOCK
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row, exists, counts, label, on_row = rows_of_tile(
            tile, labels, row_weight, rows, classes, ignore_index, ROWS, F
        )
        student_row = row[:, None] * student_stride
        teacher_row = row[:, None] * teacher_stride
        second = 0 * on_row
        if ON_CHIP:
            cols = tl.arange(0, BLOCK)
            inside = cols < classes
            wanted = counts[:, None] & inside[None, :]
            logits = load(student, student_row + cols[None, :], wanted, F)
            s = without_label(logits, cols, label, DIVERGENCE)
            t = s
            if SOFT:
                t = load(teacher, teacher_row + cols[None, :], wanted, F)
                t = without_label(t, cols, label, DIVERGENCE)
            sum_s, sum_t, offset_s, offset_t, highest, x, y, e_s, w = sums_on_chip(
                s, t, factor, SOFT
            )
            first, sum_h, weight_dot, offset_h, h = second, second, second, second, e_s
            if MIXTURE:
                q, p = reciprocal(sum_s)[:, None] * e_s, reciprocal(sum_t)[:, None] * w
                w, v = mixture_terms(q, p, beta, DIVERGENCE)
                first, second = tl.sum(w, 1), tl.sum(v, 1)
            elif SOFT:
                term = divergence_term(e_s, w, x, y, DIVERGENCE)
                first = tl.sum(term, 1)
                if DIVERGENCE == REVERSE_KL:
                    w = term
            if HARD:
                sum_h, weight_dot, offset_h, h = hard_sum_on_chip(
                    logits,
                    s,
                    e_s,
                    highest,
                    offset_s,
                    factor,
                    class_weight,
                    cols,
                    wanted,
                    POWER,
                    SMOOTH,
                    F,
                )
        else:
            sum_s, sum_t, sum_h, weight_dot, offset_s, offset_t, offset_h, first = sums_looped(
                student,
                teacher,
                student_row,
                teacher_row,
                class_weight,
                classes,
                counts,
                label,
                factor,
                weight_sum,
                DIVERGENCE,
                POWER,
                HARD,
                SOFT,
                SMOOTH,
                ROWS,
                BLOCK,
                F,
            )
            inverse_s, inverse_t = reciprocal(sum_s)[:, None], reciprocal(sum_t)[:, None]
            if MIXTURE:
                acc_first = tl.zeros([ROWS, BLOCK], F)
                acc_second = acc_first
                for back in range(0, classes, BLOCK):
                    cols = last - back + tl.arange(0, BLOCK)
                    wanted = counts[:, None] & (cols < classes)[None, :]
                    s = load(student, student_row + cols[None, :], wanted, F)
                    t = load(teacher, teacher_row + cols[None, :], wanted, F)
                    q = inverse_s * tl.exp2(exponent(s, factor, offset_s[:, None]))
                    p = inverse_t * tl.exp2(exponent(t, factor, offset_t[:, None]))
                    u, v = mixture_terms(q, p, beta, DIVERGENCE)
                    acc_first += u
                    acc_second += v
                first, second = tl.sum(acc_first, 1), tl.sum(acc_second, 1)

        hard = 0 * on_row
        soft = 0 * on_row
        on_e, on_w, on_h, on_label, share = hard, hard, hard, hard, hard
        if HARD or DIVERGENCE == DECOUPLED:
            s_label = at_label(student, row * student_stride, label, counts, classes, F)
        if HARD:
            hard, on_h, on_label, share = hard_part(
                s_label,
                sum_h,
                weight_sum,
                weight_dot,
                offset_s,
                offset_h,
                class_weight,
                label,
                counts,
                on_row,
                factor,
                ce_weight,
                label_smoothing,
                hard_mean,
                classes,
                DIVERGENCE,
                POWER,
                SMOOTH,
                F,
            )
        if SOFT:
            x_label, y_label = soft, soft
            if DIVERGENCE == DECOUPLED:
                t_label = at_label(teacher, row * teacher_stride, label, counts, classes, F)
                x_label = exponent(s_label, factor, offset_s)
                y_label = exponent(t_label, factor, offset_t)
            value, on_e, on_w, shift = soft_part(
                sum_s, sum_t, first, second, x_label, y_label, alpha, beta, DIVERGENCE
            )
            soft = kd_weight * temperature * temperature * on_row * value
            scale = kd_weight * temperature * soft_mean * on_row
            on_e *= scale
            on_w *= scale
            on_label += scale * shift
        store_loss(hard, soft, row, exists, counts, loss, row_parts, rows, REDUCTION)

        if grad is not None:
            if ON_CHIP:
                g = 0 * e_s
                if HARD:
                    g = on_h[:, None] * h
                if SOFT:
                    g = tl.fma(on_e[:, None], e_s, tl.fma(on_w[:, None], w, g))
                store_gradient(
                    grad,
                    row[:, None] * classes + cols[None, :],
                    exists,
                    counts,
                    label,
                    cols,
                    inside,
                    g,
                    class_weight,
                    on_label,
                    share,
                    DIVERGENCE,
                    HARD,
                    SMOOTH,
                    F,
                )
            else:
                for back in range(0, classes, BLOCK):
                    cols = (back if MIXTURE else last - back) + tl.arange(0, BLOCK)
                    inside = cols < classes
                    wanted = counts[:, None] & inside[None, :]
                    s = load(student, student_row + cols[None, :], wanted, F)
                    s = without_label(s, cols, label, DIVERGENCE)
                    x = exponent(s, factor, offset_s[:, None])
                    e_s = tl.exp2(x)
                    g = 0 * e_s
                    if HARD:
                        if POWER > 0:
                            h = power(e_s, POWER)
                        else:
                            h = tl.exp2(exponent(s, log2e, offset_h[:, None]))
                        g = on_h[:, None] * h
                    if SOFT:
                        t = load(teacher, teacher_row + cols[None, :], wanted, F)
                        t = without_label(t, cols, label, DIVERGENCE)
                        y = exponent(t, factor, offset_t[:, None])
                        w = tl.exp2(y)
                        if MIXTURE:
                            w, _ = mixture_terms(inverse_s * e_s, inverse_t * w, beta, DIVERGENCE)
                        elif DIVERGENCE == REVERSE_KL:
                            w = divergence_term(e_s, w, x, y, DIVERGENCE)
                        g = tl.fma(on_e[:, None], e_s, tl.fma(on_w[:, None], w, g))
                    store_gradient(
                        grad,
                        row[:, None] * classes + cols[None, :],
                        exists,
                        counts,
                        label,
                        cols,
                        inside,
                        g,
                        class_weight,
                        on_label,
                        share,
                        DIVERGENCE,
                        HARD,
                        SMOOTH,
                        F,
                    )
    if REDUCTION != 0:
        add_up(row_parts, loss, parts, turn, rows, hard_mean, soft_mean, F)


@triton.jit
def _scale(
    grad,
    upstream,
    rows: tl.int64,
    units: tl.int64,
    PER_ROW: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    """Rows times their factors; where these are 1, which is the rule, nothing is read."""
    classes = units * ALIGN
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        if PER_ROW:
            factor = tl.load(upstream + row, row < rows, other=1)
        else:
            factor = tl.load(upstream + 0 * row)
        changes = (row < rows) & (factor != 1)
        if tl.max(changes.to(tl.int32), 0) != 0:
            for start in range(0, classes, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                offsets = row[:, None] * classes + cols[None, :]
                wanted = changes[:, None] & (cols < classes)[None, :]
                g = tl.load(grad + offsets, wanted, other=0).to(F) * factor[:, None]
                tl.store(grad + offsets, g.to(grad.dtype.element_ty), wanted)


def plan(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    divergence: int,
    alpha: float,
    beta: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    loss: Tensor,
    parts: Tensor,
    grad: Tensor | None,
    device: Device,
) -> list[Launch]:
    """The launches for these arguments, whose rows are contiguous."""
    rows, classes = student.shape
    hard, soft = labels is not None and ce_weight != 0, kd_weight != 0
    if not soft:
        temperature, divergence = 1.0, reference.FORWARD_KL
    if divergence == reference.DIST:
        return dist.plan(
            student,
            teacher,
            labels,
            class_weight,
            row_weight,
            temperature,
            ce_weight,
            kd_weight,
            alpha,
            beta,
            ignore_index,
            label_smoothing,
            loss,
            parts,
            grad,
            device,
        )
    size = loss.element_size()
    on_chip, block = block_of(classes, size)
    power = int(temperature) if temperature in (1, 2, 3, 4) else 0
    smooth = hard and label_smoothing > 0
    lean = (
        on_chip
        and size == 4
        and power > 0
        and not smooth
        and class_weight is None
        and row_weight is None
        and divergence not in (reference.JSD, reference.DECOUPLED)
    )
    rows_of_tile, programs, options = tile_of(
        block, rows, size, device, LEAN_REGISTERS if lean else REGISTERS
    )
    align = alignment(student.element_size(), classes, student.stride(0), teacher.stride(0))
    return [
        Launch(
            _kd_loss,
            programs,
            {
                "student": student,
                "teacher": teacher,
                "labels": labels,
                "class_weight": class_weight if hard else None,
                "row_weight": row_weight,
                "grad": grad,
                "loss": loss,
                "parts": parts,
                "row_parts": parts if reduction == 0 else parts.new_empty((2, rows)),
                "turn": ticket(student),
                "rows": rows,
                "units": classes // align,
                "student_units": student.stride(0) // align,
                "teacher_units": teacher.stride(0) // align,
                "factor": 1.4426950408889634 / temperature,
                "temperature": temperature,
                "ce_weight": ce_weight,
                "kd_weight": kd_weight,
                "alpha": alpha,
                "beta": beta,
                "label_smoothing": label_smoothing,
                "ignore_index": ignore_index,
                "DIVERGENCE": divergence,
                "POWER": power,
                "REDUCTION": reduction,
                "HARD": hard,
                "SOFT": soft,
                "SMOOTH": smooth,
                "ALIGN": align,
                "ON_CHIP": on_chip,
                "ROWS": rows_of_tile,
                "BLOCK": block,
                "F": tl.float64 if size == 8 else tl.float32,
            },
            options,
        )
    ]


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    divergence: int,
    alpha: float,
    beta: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.kd_loss.kd_loss``."""
    rows, classes = student.shape
    device = student.device
    exact = torch.float64 if student.dtype == torch.float64 else torch.float32
    if student.stride(1) != 1 and classes > 1:
        student = student.contiguous()
    if teacher.stride(1) != 1 and classes > 1:
        teacher = teacher.contiguous()
    labels = None if labels is None else labels.contiguous()
    class_weight = None if class_weight is None else class_weight.to(exact).contiguous()
    row_weight = None if row_weight is None else row_weight.to(exact).contiguous()
    shape = (rows,) if reduction == 0 else ()
    grad = torch.empty((rows, classes) if need_grad else (0,), dtype=student.dtype, device=device)
    if rows == 0:
        zeros = torch.zeros((3, *shape), dtype=exact, device=device)
        return zeros[0].clone(), zeros[1:], grad
    loss = torch.empty(shape, dtype=exact, device=device)
    parts = torch.empty((2, *shape), dtype=exact, device=device)
    for launch in plan(
        student,
        teacher,
        labels,
        class_weight,
        row_weight,
        temperature,
        ce_weight,
        kd_weight,
        divergence,
        alpha,
        beta,
        ignore_index,
        label_smoothing,
        reduction,
        loss,
        parts,
        grad if need_grad else None,
        device_of(student),
    ):
        launch.run(student)
    return loss, parts, grad


def plan_scale(grad: Tensor, upstream: Tensor, device: Device) -> Launch:
    rows, classes = grad.shape
    size = 8 if grad.dtype == torch.float64 else 4
    block = min(triton.next_power_of_2(classes), LOOPED_BLOCK[size])
    rows_of_tile, programs, options = tile_of(block, rows, size, device, REGISTERS)
    align = alignment(grad.element_size(), classes)
    return Launch(
        _scale,
        programs,
        {
            "grad": grad,
            "upstream": upstream,
            "rows": rows,
            "units": classes // align,
            "PER_ROW": upstream.dim() == 1,
            "ALIGN": align,
            "ROWS": rows_of_tile,
            "BLOCK": block,
            "F": tl.float64 if size == 8 else tl.float32,
        },
        options,
    )


def kd_loss_scale_(grad: Tensor, upstream: Tensor) -> None:
    """grad [rows, classes], contiguous, times upstream: one number, or [rows]."""
    if grad.numel():
        plan_scale(grad, upstream, device_of(grad)).run(grad)
