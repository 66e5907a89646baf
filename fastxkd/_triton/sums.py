"""Sums of exponentials over the rows of a tile, of the student, the teacher and the hard part.

Rows that are kept in registers are summed up at once; longer ones block after block, relative to
the highest logit so far.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# What triton.jit decorates is not Python, and its tensors have no types that mypy knows.
from __future__ import annotations

import triton
import triton.language as tl

from fastxkd._triton.divergences import DECOUPLED, DIST, JSD, REVERSE_KL, TVD, divergence_term
from fastxkd._triton.logits import (
    INF,
    LOG2E,
    exponent,
    load,
    next_offset,
    offset_of,
    power,
    weighted_exponents,
)


@triton.jit
def without_label(logits, cols, label, DIVERGENCE: tl.constexpr):
    if DIVERGENCE == DECOUPLED:
        return tl.where(cols[None, :] != label[:, None], logits, -INF)
    else:
        return logits


@triton.jit
def sums_on_chip(s, t, factor, SOFT: tl.constexpr):
    """Per row the sums, the offsets and the highest logit; then x, y, e_s and e_t."""
    highest = tl.max(s, 1)
    offset_s = offset_of(highest, factor)
    x = exponent(s, factor, offset_s[:, None])
    e_s = tl.exp2(x)
    sum_s = tl.sum(e_s, 1)
    if SOFT:
        offset_t = offset_of(tl.max(t, 1), factor)
        y = exponent(t, factor, offset_t[:, None])
        e_t = tl.exp2(y)
        return sum_s, tl.sum(e_t, 1), offset_s, offset_t, highest, x, y, e_s, e_t
    else:
        return sum_s, 0 * sum_s, offset_s, 0 * sum_s, highest, x, x, e_s, e_s


@triton.jit
def hard_sum_on_chip(
    logits,
    s,
    e_s,
    highest,
    offset_s,
    factor,
    class_weight,
    cols,
    wanted,
    POWER: tl.constexpr,
    SMOOTH: tl.constexpr,
    F: tl.constexpr,
):
    """Per row the sum at T = 1, label smoothing's and the offset; then the exponentials."""
    if POWER > 0:
        h = power(e_s, POWER)
        offset_h = offset_s
    else:
        log2e = tl.full([], LOG2E, F)
        offset_h = offset_of(highest, log2e)
        h = tl.exp2(exponent(s, log2e, offset_h[:, None]))
    sum_h = tl.sum(h, 1)
    weight_dot = 0 * sum_h
    if SMOOTH:
        terms = weighted_exponents(logits, factor, offset_h, class_weight, cols, wanted, POWER, F)
        weight_dot = tl.sum(terms, 1)
    return sum_h, weight_dot, offset_h, h


@triton.jit
def sums_looped(
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
    DIVERGENCE: tl.constexpr,
    POWER: tl.constexpr,
    HARD: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    """Per row the sums, label smoothing's among them, the offsets, and the sum of the divergence's
    terms where these need no more than the exponents."""
    AT_ONCE: tl.constexpr = (DIVERGENCE != JSD) & (DIVERGENCE != TVD) & (DIVERGENCE != DIST)
    log2e = tl.full([], LOG2E, F)
    # Lane by lane, one addition across the lanes at the end.
    acc_s = tl.zeros([ROWS, BLOCK], F)
    acc_t, acc_h, acc_first, acc_x = acc_s, acc_s, acc_s, acc_s
    none = tl.full([ROWS], -INF, F)
    offset_s, offset_t, offset_h, anchor = none, none, none, tl.zeros([ROWS], F)
    for start in range(0, classes, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < classes
        wanted = counts[:, None] & inside[None, :]
        logits = load(student, student_row + cols[None, :], wanted, F)
        s = without_label(logits, cols, label, DIVERGENCE)
        highest = tl.max(s, 1)
        new_s, shift_s = next_offset(offset_s, highest, factor)
        decay_s = tl.exp2(-shift_s)[:, None]
        base_s = tl.where(new_s == -INF, 0, new_s)
        x = exponent(s, factor, base_s[:, None])
        e_s = tl.exp2(x)
        if SOFT:
            t = load(teacher, teacher_row + cols[None, :], wanted, F)
            t = without_label(t, cols, label, DIVERGENCE)
            new_t, shift_t = next_offset(offset_t, tl.max(t, 1), factor)
            decay_t = tl.exp2(-shift_t)[:, None]
            base_t = tl.where(new_t == -INF, 0, new_t)
            y = exponent(t, factor, base_t[:, None])
            e_t = tl.exp2(y)
            if AT_ONCE:
                # Every earlier x - y changes by the same number.
                moved = (shift_s - shift_t)[:, None]
                term = divergence_term(e_s, e_t, x, y, DIVERGENCE)
                if DIVERGENCE == REVERSE_KL:
                    acc_first = decay_s * (acc_first - moved * acc_s) + term
                else:
                    acc_first = decay_t * (acc_first + moved * acc_t) + term
            acc_t = decay_t * acc_t + e_t
            offset_t = new_t
        if HARD:
            if POWER > 0:
                acc_h = power(decay_s, POWER) * acc_h + power(e_s, POWER)
            else:
                new_h, shift_h = next_offset(offset_h, highest, log2e)
                base_h = tl.where(new_h == -INF, 0, new_h)
                e_h = tl.exp2(exponent(s, log2e, base_h[:, None]))
                acc_h = tl.exp2(-shift_h)[:, None] * acc_h + e_h
                offset_h = new_h
            if SMOOTH:
                # Relative to the first block's offset, which is as good as the last one's.
                anchor = tl.where(start == 0, base_s if POWER > 0 else base_h, anchor)
                acc_x += weighted_exponents(
                    logits, factor, anchor, class_weight, cols, wanted, POWER, F
                )
        acc_s = decay_s * acc_s + e_s
        offset_s = new_s
    offset_s = tl.where(offset_s == -INF, 0, offset_s)
    offset_t = tl.where(offset_t == -INF, 0, offset_t)
    offset_h = tl.where(offset_h == -INF, 0, offset_h)
    weight_dot = tl.sum(acc_x, 1)
    if SMOOTH:
        if POWER > 0:
            weight_dot -= POWER * (offset_s - anchor) * weight_sum
        else:
            weight_dot -= (offset_h - anchor) * weight_sum
    sum_s, sum_t, sum_h = tl.sum(acc_s, 1), tl.sum(acc_t, 1), tl.sum(acc_h, 1)
    return sum_s, sum_t, sum_h, weight_dot, offset_s, offset_t, offset_h, tl.sum(acc_first, 1)
