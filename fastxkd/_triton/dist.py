"""DIST in Triton: correlations along rows and columns, in four launches.

A column's correlation takes every row's softmax, and the gradient of a row every column's
correlation: two waits of all programs for one another, which only the end of a launch is.

1. rows: sums of exponentials, moments of each row, cross-entropy; of all that a few numbers a row.
2. columns: moments of a run of rows, for each column.
3. the runs put together, correlations of the columns, and, by the last program, the loss.
4. the gradient, for which q and p are made once more: read again they are fewer bytes than stored.

Moments are those of deviations from a mean, never raw sums of squares: near-uniform probabilities
differ in their last digits. With u and v the deviations of q and p, a and b their norms,
push = 1 / (a b + EPS), rho = push u.v and ratio = rho b / a, softmax passes on to the logits

    slope_ij = w_i (alpha / W push_i (ratio_i u - v) + beta / C push_j (ratio_j u - v))

where the first u and v deviate from 1/C, the others from the column's mean. There are no atomics on
floats: the bits are the same every time.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# What triton.jit decorates is not Python, and its tensors have no types that mypy knows.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastxkd._triton.divergences import DIST
from fastxkd._triton.logits import LOG2E, exponent, load, power, reciprocal
from fastxkd._triton.plan import (
    DIST_REGISTERS,
    DOWN_ROWS,
    FINISH,
    Device,
    Launch,
    alignment,
    block_of,
    columns_of,
    tile_of,
)
from fastxkd._triton.rows import (
    MEAN,
    at_label,
    comes_last,
    hard_part,
    means,
    rows_of_tile,
    store_gradient,
    store_loss,
    store_totals,
    sum_of_weights,
    total_of,
)
from fastxkd._triton.sums import hard_sum_on_chip, sums_looped, sums_on_chip
from fastxkd.ops._library import ticket
from fastxkd.reference.dist import EPS

_EPS = tl.constexpr(EPS)
# Of a row, from one launch to the next: numbers of the student's softmax (offset, reciprocal sum in
# two parts), three of the teacher's, and others; the last four are the hard part's.
NUMBERS = 13
_STUDENT, _TEACHER = tl.constexpr(0), tl.constexpr(3)
_WEIGHT, _RATIO, _PUSH = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
_OFFSET_H, _ON_H = tl.constexpr(9), tl.constexpr(10)
_ON_LABEL, _SHARE = tl.constexpr(11), tl.constexpr(12)
# Of a column, for a run of rows: means of q and p, sums of u u, v v and u v; for all of them: the
# means in two parts each, the ratio and the push.
MOMENTS, FACTORS = 5, 6
_MOMENTS = tl.constexpr(MOMENTS)


@triton.jit
def _correlation(uu, vv, uv):
    """rho, ratio and push; without spread rho is 0, and stays 0."""
    # Where there is no spread rounding may leave less than nothing.
    a, b = tl.sqrt(tl.where(uu < 0, 0, uu)), tl.sqrt(tl.where(vv < 0, 0, vv))
    push = 1 / (a * b + _EPS)
    rho = uv * push
    return rho, tl.where(a > 0, rho * b / a, 0), push


@triton.jit
def _inverse_of(total, deviations, uniform, classes, F: tl.constexpr):
    """1 / total in two parts, and how much more that is than 1 / total was in one.

    Probabilities add up to 1, and what theirs do not is the rounding of the total. It would be
    common to the row: a column of near-equal probabilities would take it for a difference.
    """
    more = 1 / (deviations.to(tl.float64) + uniform.to(tl.float64) * classes)
    exact = (1 / total).to(tl.float64) * more
    inverse = exact.to(F)
    return inverse, (exact - inverse.to(tl.float64)).to(F), more


@triton.jit
def _deviation(e, inverse, low, mean, mean_low):
    """e / total - mean. No digit of the quotient is lost before the difference is taken: equal rows
    must not deviate, since 1 / EPS makes something of next to nothing."""
    if e.dtype == tl.float64:
        # There is no longer number to keep the mean in: the quotient is rounded as the mean is.
        return tl.fma(e, inverse[:, None], tl.zeros_like(e)) - mean
    else:
        return tl.fma(e, low[:, None], tl.fma(e, inverse[:, None], -mean)) - mean_low


@triton.jit
def _exponentials(matrix, offsets, wanted, factor, offset, F: tl.constexpr):
    # 0 where nothing is wanted.
    return tl.exp2(exponent(load(matrix, offsets, wanted, F), factor, offset[:, None]))


@triton.jit
def _store_softmax(there, rows, offset, inverse, low, exists):
    tl.store(there, offset, exists)
    tl.store(there + rows, inverse, exists)
    tl.store(there + 2 * rows, low, exists)


@triton.jit
def _load_softmax(there, rows, counts):
    offset = tl.load(there, counts, other=0)
    inverse = tl.load(there + rows, counts, other=0)
    return offset, inverse, tl.load(there + 2 * rows, counts, other=0)


@triton.jit
def _dist_rows(
    student,
    teacher,
    labels,
    class_weight,
    row_weight,
    numbers,
    row_parts,
    row_means,
    rows: tl.int64,
    units: tl.int64,
    student_units: tl.int64,
    teacher_units: tl.int64,
    factor: tl.float64,
    temperature: tl.float64,
    ce_weight: tl.float64,
    kd_weight: tl.float64,
    alpha: tl.float64,
    label_smoothing: tl.float64,
    ignore_index: tl.int64,
    POWER: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTH: tl.constexpr,
    ALIGN: tl.constexpr,
    ON_CHIP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    classes = units * ALIGN
    student_stride = student_units * ALIGN
    teacher_stride = teacher_units * ALIGN
    factor, temperature = tl.full([], factor, F), tl.full([], temperature, F)
    ce_weight, kd_weight = tl.full([], ce_weight, F), tl.full([], kd_weight, F)
    alpha, label_smoothing = tl.full([], alpha, F), tl.full([], label_smoothing, F)
    uniform = (1 / classes.to(tl.float64)).to(F)
    hard_mean, soft_mean = means(
        labels, class_weight, row_weight, rows, classes, ignore_index, HARD, MEAN, F
    )
    tl.store(row_means, hard_mean)
    tl.store(row_means + 1, soft_mean)
    weight_sum = tl.full([], 0, F)
    if SMOOTH:
        weight_sum = sum_of_weights(class_weight, classes, F)
    last = (tl.cdiv(classes, BLOCK) - 1) * BLOCK
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row, exists, counts, label, on_row = rows_of_tile(
            tile, labels, row_weight, rows, classes, ignore_index, ROWS, F
        )
        counts = counts & (on_row != 0)
        student_row = row[:, None] * student_stride
        teacher_row = row[:, None] * teacher_stride
        if ON_CHIP:
            cols = tl.arange(0, BLOCK)
            wanted = counts[:, None] & (cols < classes)[None, :]
            s = load(student, student_row + cols[None, :], wanted, F)
            t = load(teacher, teacher_row + cols[None, :], wanted, F)
            sum_s, sum_t, offset_s, offset_t, highest, _, _, e_s, e_t = sums_on_chip(
                s, t, factor, True
            )
            u = tl.where(wanted, tl.fma((1 / sum_s)[:, None], e_s, -uniform), 0)
            v = tl.where(wanted, tl.fma((1 / sum_t)[:, None], e_t, -uniform), 0)
            sum_u, sum_v = tl.sum(u, 1), tl.sum(v, 1)
            uu, vv, uv = tl.sum(u * u, 1), tl.sum(v * v, 1), tl.sum(u * v, 1)
            sum_h, weight_dot, offset_h = 0 * on_row, 0 * on_row, 0 * on_row
            if HARD:
                sum_h, weight_dot, offset_h, _ = hard_sum_on_chip(
                    s,
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
            sum_s, sum_t, sum_h, weight_dot, offset_s, offset_t, offset_h, _ = sums_looped(
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
                DIST,
                POWER,
                HARD,
                True,
                SMOOTH,
                ROWS,
                BLOCK,
                F,
            )
            acc_u = tl.zeros([ROWS, BLOCK], F)
            acc_v, acc_uu, acc_vv, acc_uv = acc_u, acc_u, acc_u, acc_u
            for back in range(0, classes, BLOCK):
                cols = last - back + tl.arange(0, BLOCK)
                wanted = counts[:, None] & (cols < classes)[None, :]
                e_s = _exponentials(
                    student, student_row + cols[None, :], wanted, factor, offset_s, F
                )
                e_t = _exponentials(
                    teacher, teacher_row + cols[None, :], wanted, factor, offset_t, F
                )
                u = tl.where(wanted, tl.fma((1 / sum_s)[:, None], e_s, -uniform), 0)
                v = tl.where(wanted, tl.fma((1 / sum_t)[:, None], e_t, -uniform), 0)
                acc_u += u
                acc_v += v
                acc_uu += u * u
                acc_vv += v * v
                acc_uv += u * v
            sum_u, sum_v = tl.sum(acc_u, 1), tl.sum(acc_v, 1)
            uu, vv, uv = tl.sum(acc_uu, 1), tl.sum(acc_vv, 1), tl.sum(acc_uv, 1)

        inverse_s, low_s, more_s = _inverse_of(sum_s, sum_u, uniform, classes, F)
        inverse_t, low_t, more_t = _inverse_of(sum_t, sum_v, uniform, classes, F)
        # Of two classes ratio u and v cancel: the ratio is rounded once, and is that of the very
        # probabilities that the gradient will see.
        rho, ratio, push = _correlation(
            uu * more_s * more_s, vv * more_t * more_t, uv * more_s * more_t
        )
        soft = kd_weight * temperature * temperature * alpha * on_row * (1 - rho).to(F)
        scale = kd_weight * temperature * alpha * soft_mean * on_row
        hard = 0 * on_row
        on_h, on_label, share = hard, hard, hard
        if HARD:
            s_label = at_label(student, row * student_stride, label, counts, classes, F)
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
                DIST,
                POWER,
                SMOOTH,
                F,
            )
            tl.store(numbers + _OFFSET_H * rows + row, offset_h, exists)
            tl.store(numbers + _ON_H * rows + row, on_h, exists)
            tl.store(numbers + _ON_LABEL * rows + row, on_label, exists)
            tl.store(numbers + _SHARE * rows + row, share, exists)
        store_loss(hard, soft, row, exists, counts, row_parts, row_parts, rows, MEAN)
        # Every other number of a row that does not count is left unread.
        tl.store(numbers + _WEIGHT * rows + row, tl.where(counts, on_row, 0), exists)
        _store_softmax(numbers + _STUDENT * rows + row, rows, offset_s, inverse_s, low_s, exists)
        _store_softmax(numbers + _TEACHER * rows + row, rows, offset_t, inverse_t, low_t, exists)
        tl.store(numbers + _RATIO * rows + row, ratio.to(F), exists)
        tl.store(numbers + _PUSH * rows + row, (scale * push).to(F), exists)


@triton.jit
def _dist_columns(
    student,
    teacher,
    numbers,
    moments,
    run_weights,
    rows: tl.int64,
    units: tl.int64,
    student_units: tl.int64,
    teacher_units: tl.int64,
    factor: tl.float64,
    runs: tl.int64,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    """Moments of every runs-th tile of rows: of a tile from its means, and then Chan's formula in
    double precision, which loses nothing to many tiles. From the last row back: what launch 1 has
    read last is still in the L2 cache, and launch 4 begins with what was read last here.
    """
    classes = units * ALIGN
    student_stride = student_units * ALIGN
    teacher_stride = teacher_units * ALIGN
    factor = tl.full([], factor, F)
    blocks = tl.cdiv(classes, BLOCK)
    run = tl.program_id(0) // blocks
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = cols < classes
    total = tl.full([], 0, tl.float64)
    mean_q = tl.zeros([BLOCK], tl.float64)
    mean_p, uu, vv, uv = mean_q, mean_q, mean_q, mean_q
    tiles = tl.cdiv(rows, ROWS)
    for tile in range(run, tiles, runs):
        row = (tiles - 1 - tile) * ROWS + tl.arange(0, ROWS)
        weight = tl.load(numbers + _WEIGHT * rows + row, row < rows, other=0)
        counts = weight != 0
        offset_s, inverse_s, low_s = _load_softmax(numbers + _STUDENT * rows + row, rows, counts)
        offset_t, inverse_t, low_t = _load_softmax(numbers + _TEACHER * rows + row, rows, counts)
        wanted = counts[:, None] & inside[None, :]
        student_at = row[:, None] * student_stride + cols[None, :]
        teacher_at = row[:, None] * teacher_stride + cols[None, :]
        e_s = _exponentials(student, student_at, wanted, factor, offset_s, F)
        e_t = _exponentials(teacher, teacher_at, wanted, factor, offset_t, F)
        of_tile = tl.sum(weight.to(tl.float64), 0)
        inverse = reciprocal(of_tile)
        weight = weight[:, None]
        mean = inverse.to(F)
        near_q = tl.sum(weight * inverse_s[:, None] * e_s, 0) * mean
        near_p = tl.sum(weight * inverse_t[:, None] * e_t, 0) * mean
        u = _deviation(e_s, inverse_s, low_s, near_q[None, :], 0.0)
        v = _deviation(e_t, inverse_t, low_t, near_p[None, :], 0.0)
        # What the deviations add up to is what the means lack.
        left_q, left_p = tl.sum(weight * u, 0).to(tl.float64), tl.sum(weight * v, 0).to(tl.float64)
        by_q = near_q.to(tl.float64) + left_q * inverse - mean_q
        by_p = near_p.to(tl.float64) + left_p * inverse - mean_p
        total += of_tile
        share = of_tile * reciprocal(total)
        between = (total - of_tile) * share
        mean_q += share * by_q
        mean_p += share * by_p
        uu += tl.sum(weight * u * u, 0).to(tl.float64) - left_q * left_q * inverse
        vv += tl.sum(weight * v * v, 0).to(tl.float64) - left_p * left_p * inverse
        uv += tl.sum(weight * u * v, 0).to(tl.float64) - left_q * left_p * inverse
        uu += between * by_q * by_q
        vv += between * by_p * by_p
        uv += between * by_q * by_p
    tl.store(run_weights + run, total)  # by all programs of the run, the same
    there = moments + run * _MOMENTS * classes + cols
    tl.store(there, mean_q, inside)
    tl.store(there + classes, mean_p, inside)
    tl.store(there + 2 * classes, uu, inside)
    tl.store(there + 3 * classes, vv, inside)
    tl.store(there + 4 * classes, uv, inside)


@triton.jit
def _dist_finish(
    moments,
    run_weights,
    columns,
    column_parts,
    row_parts,
    row_means,
    loss,
    parts,
    turn,
    rows: tl.int64,
    classes: tl.int64,
    runs: tl.int64,
    temperature: tl.float64,
    kd_weight: tl.float64,
    beta: tl.float64,
    RUNS: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    """Moments of all rows from those of the runs, all in double precision."""
    temperature, kd_weight = (
        tl.full([], temperature, tl.float64),
        tl.full([], kd_weight, tl.float64),
    )
    beta = tl.full([], beta, tl.float64)
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < classes
    weights = tl.zeros([RUNS], tl.float64)
    acc_q = tl.zeros([RUNS, BLOCK], tl.float64)
    acc_p, acc_uu, acc_vv, acc_uv = acc_q, acc_q, acc_q, acc_q
    for start in range(0, runs, RUNS):
        run = start + tl.arange(0, RUNS)
        weight = tl.load(run_weights + run, run < runs, other=0)
        wanted = (run < runs)[:, None] & inside[None, :]
        there = moments + run[:, None] * (_MOMENTS * classes) + cols[None, :]
        weights += weight
        acc_q += weight[:, None] * tl.load(there, wanted, other=0)
        acc_p += weight[:, None] * tl.load(there + classes, wanted, other=0)
    mean = reciprocal(tl.sum(weights, 0))
    mean_q, mean_p = tl.sum(acc_q, 0) * mean, tl.sum(acc_p, 0) * mean
    for start in range(0, runs, RUNS):
        run = start + tl.arange(0, RUNS)
        weight = tl.load(run_weights + run, run < runs, other=0)[:, None]
        wanted = (run < runs)[:, None] & inside[None, :]
        there = moments + run[:, None] * (_MOMENTS * classes) + cols[None, :]
        by_q = tl.load(there, wanted, other=0) - mean_q[None, :]
        by_p = tl.load(there + classes, wanted, other=0) - mean_p[None, :]
        acc_uu += tl.load(there + 2 * classes, wanted, other=0) + weight * by_q * by_q
        acc_vv += tl.load(there + 3 * classes, wanted, other=0) + weight * by_p * by_p
        acc_uv += tl.load(there + 4 * classes, wanted, other=0) + weight * by_q * by_p
    rho, ratio, push = _correlation(tl.sum(acc_uu, 0), tl.sum(acc_vv, 0), tl.sum(acc_uv, 0))
    scale = kd_weight * temperature * beta / classes
    there = columns + cols
    tl.store(there, mean_q.to(F), inside)
    tl.store(there + classes, (mean_q - mean_q.to(F).to(tl.float64)).to(F), inside)
    tl.store(there + 2 * classes, mean_p.to(F), inside)
    tl.store(there + 3 * classes, (mean_p - mean_p.to(F).to(tl.float64)).to(F), inside)
    tl.store(there + 4 * classes, ratio.to(F), inside)
    tl.store(there + 5 * classes, (scale * push).to(F), inside)
    tl.store(column_parts + tl.program_id(0), tl.sum(tl.where(inside, 1 - rho, 0), 0))
    if comes_last(turn):
        hard_mean, soft_mean = tl.load(row_means), tl.load(row_means + 1)
        intra = scale * temperature * total_of(column_parts, tl.num_programs(0))
        # Without weight there is no column to correlate.
        intra = tl.where(soft_mean == 0, 0, intra)
        hard = total_of(row_parts, rows) * hard_mean
        soft = total_of(row_parts + rows, rows) * soft_mean
        store_totals(hard, soft + intra, loss, parts, F)


@triton.jit
def _along_column(e, inverse, low, columns, cols, inside, classes):
    mean = tl.load(columns + cols, inside, other=0)[None, :]
    mean_low = tl.load(columns + classes + cols, inside, other=0)[None, :]
    return _deviation(e, inverse, low, mean, mean_low)


@triton.jit
def _slope(
    e_s,
    e_t,
    inverse_s,
    low_s,
    inverse_t,
    low_t,
    ratio,
    push,
    weight,
    uniform,
    columns,
    cols,
    inside,
    classes,
):
    u = _along_column(e_s, inverse_s, low_s, columns, cols, inside, classes)
    v = _along_column(e_t, inverse_t, low_t, columns + 2 * classes, cols, inside, classes)
    ratio_column = tl.load(columns + 4 * classes + cols, inside, other=0)[None, :]
    push_column = tl.load(columns + 5 * classes + cols, inside, other=0)[None, :]
    slope = weight[:, None] * push_column * tl.fma(ratio_column, u, -v)
    u = _deviation(e_s, inverse_s, low_s, uniform, 0.0)
    v = _deviation(e_t, inverse_t, low_t, uniform, 0.0)
    return tl.fma(push[:, None], tl.fma(ratio[:, None], u, -v), slope)


@triton.jit
def _dist_gradient(
    student,
    teacher,
    labels,
    class_weight,
    numbers,
    columns,
    grad,
    rows: tl.int64,
    units: tl.int64,
    student_units: tl.int64,
    teacher_units: tl.int64,
    factor: tl.float64,
    POWER: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTH: tl.constexpr,
    ALIGN: tl.constexpr,
    ON_CHIP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    classes = units * ALIGN
    student_stride = student_units * ALIGN
    teacher_stride = teacher_units * ALIGN
    factor = tl.full([], factor, F)
    uniform = (1 / classes.to(tl.float64)).to(F)
    log2e = tl.full([], LOG2E, F)
    last = (tl.cdiv(classes, BLOCK) - 1) * BLOCK
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        exists = row < rows
        weight = tl.load(numbers + _WEIGHT * rows + row, exists, other=0)
        counts = weight != 0
        offset_s, inverse_s, low_s = _load_softmax(numbers + _STUDENT * rows + row, rows, counts)
        offset_t, inverse_t, low_t = _load_softmax(numbers + _TEACHER * rows + row, rows, counts)
        ratio = tl.load(numbers + _RATIO * rows + row, counts, other=0)
        push = tl.load(numbers + _PUSH * rows + row, counts, other=0)
        label = tl.full([ROWS], -1, tl.int64)
        offset_h, on_h, on_label, share = weight, weight, weight, weight
        if HARD:
            label = tl.load(labels + row, counts, other=-1)
            offset_h = tl.load(numbers + _OFFSET_H * rows + row, counts, other=0)
            on_h = tl.load(numbers + _ON_H * rows + row, counts, other=0)
            on_label = tl.load(numbers + _ON_LABEL * rows + row, counts, other=0)
            share = tl.load(numbers + _SHARE * rows + row, counts, other=0)
        student_row = row[:, None] * student_stride
        teacher_row = row[:, None] * teacher_stride
        if not ON_CHIP:
            acc = tl.zeros([ROWS, BLOCK], F)
            for start in range(0, classes, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                inside = cols < classes
                wanted = counts[:, None] & inside[None, :]
                e_s = _exponentials(
                    student, student_row + cols[None, :], wanted, factor, offset_s, F
                )
                e_t = _exponentials(
                    teacher, teacher_row + cols[None, :], wanted, factor, offset_t, F
                )
                q = inverse_s[:, None] * e_s
                slope = _slope(
                    e_s,
                    e_t,
                    inverse_s,
                    low_s,
                    inverse_t,
                    low_t,
                    ratio,
                    push,
                    weight,
                    uniform,
                    columns,
                    cols,
                    inside,
                    classes,
                )
                acc += q * slope
            mean = tl.sum(acc, 1)
        # On chip a row is one block, and this one turn.
        for back in range(0, BLOCK if ON_CHIP else classes, BLOCK):
            cols = (0 if ON_CHIP else last) - back + tl.arange(0, BLOCK)
            inside = cols < classes
            wanted = counts[:, None] & inside[None, :]
            s = load(student, student_row + cols[None, :], wanted, F)
            e_s = tl.exp2(exponent(s, factor, offset_s[:, None]))
            e_t = _exponentials(teacher, teacher_row + cols[None, :], wanted, factor, offset_t, F)
            q = inverse_s[:, None] * e_s
            slope = _slope(
                e_s,
                e_t,
                inverse_s,
                low_s,
                inverse_t,
                low_t,
                ratio,
                push,
                weight,
                uniform,
                columns,
                cols,
                inside,
                classes,
            )
            if ON_CHIP:
                mean = tl.sum(q * slope, 1)
            g = q * (slope - mean[:, None])
            if HARD:
                if POWER > 0:
                    h = power(e_s, POWER)
                else:
                    h = tl.exp2(exponent(s, log2e, offset_h[:, None]))
                g = tl.fma(on_h[:, None], h, g)
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
                DIST,
                HARD,
                SMOOTH,
                F,
            )


def plan(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    alpha: float,
    beta: float,
    ignore_index: int,
    label_smoothing: float,
    loss: Tensor,
    parts: Tensor,
    grad: Tensor | None,
    device: Device,
) -> list[Launch]:
    """The launches for these arguments, whose rows are contiguous."""
    rows, classes = student.shape
    size = loss.element_size()
    hard = labels is not None and ce_weight != 0
    class_weight = class_weight if hard else None
    on_chip, block = block_of(classes, size)
    block = max(block, 4)  # a thread has no registers for more rows than 512 / 4 make
    rows_of_tile, programs, options = tile_of(block, rows, size, device, DIST_REGISTERS)
    column_block, runs, column_options = columns_of(classes, rows, size, device)
    finish_block = min(triton.next_power_of_2(classes), FINISH[1])
    finishing = triton.cdiv(classes, finish_block)

    def scratch(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=student.device)

    numbers = scratch(loss.dtype, NUMBERS, rows)
    row_parts, row_means = scratch(loss.dtype, 2, rows), scratch(loss.dtype, 2)
    moments = scratch(torch.float64, runs, MOMENTS, classes)
    run_weights = scratch(torch.float64, runs)
    columns, column_parts = scratch(loss.dtype, FACTORS, classes), scratch(torch.float64, finishing)
    exact = tl.float64 if size == 8 else tl.float32

    def matrices(width: int) -> dict[str, Any]:
        strides = student.stride(0), teacher.stride(0)
        align = alignment(student.element_size(), classes, *strides, width=width)
        return {
            "student": student,
            "teacher": teacher,
            "numbers": numbers,
            "rows": rows,
            "units": classes // align,
            "student_units": strides[0] // align,
            "teacher_units": strides[1] // align,
            "factor": 1.4426950408889634 / temperature,
            "ALIGN": align,
            "F": exact,
        }

    by_row: dict[str, Any] = {
        **matrices(16),
        "labels": labels,
        "class_weight": class_weight,
        "POWER": int(temperature) if temperature in (1, 2, 3, 4) else 0,
        "HARD": hard,
        "SMOOTH": hard and label_smoothing > 0,
        "ON_CHIP": on_chip,
        "ROWS": rows_of_tile,
        "BLOCK": block,
    }
    launches = [
        Launch(
            _dist_rows,
            programs,
            {
                **by_row,
                "row_weight": row_weight,
                "row_parts": row_parts,
                "row_means": row_means,
                "temperature": temperature,
                "ce_weight": ce_weight,
                "kd_weight": kd_weight,
                "alpha": alpha,
                "label_smoothing": label_smoothing,
                "ignore_index": ignore_index,
            },
            options,
        ),
        Launch(
            _dist_columns,
            triton.cdiv(classes, column_block) * runs,
            {
                # Eight columns would be more than a thread has registers for.
                **matrices(16 if student.element_size() > 2 else 8),
                "moments": moments,
                "run_weights": run_weights,
                "runs": runs,
                "ROWS": DOWN_ROWS,
                "BLOCK": column_block,
            },
            column_options,
        ),
        Launch(
            _dist_finish,
            finishing,
            {
                "moments": moments,
                "run_weights": run_weights,
                "columns": columns,
                "column_parts": column_parts,
                "row_parts": row_parts,
                "row_means": row_means,
                "loss": loss,
                "parts": parts,
                "turn": ticket(student),
                "rows": rows,
                "classes": classes,
                "runs": runs,
                "temperature": temperature,
                "kd_weight": kd_weight,
                "beta": beta,
                "RUNS": FINISH[0],
                "BLOCK": finish_block,
                "F": exact,
            },
            column_options,
        ),
    ]
    if grad is not None:
        launches.append(
            Launch(_dist_gradient, programs, {**by_row, "columns": columns, "grad": grad}, options)
        )
    return launches
