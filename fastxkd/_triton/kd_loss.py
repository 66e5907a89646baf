"""kd_loss in Triton: one launch for loss and gradient.

A program works on a tile of rows, then on the next one that no other program has. It first adds up
the weights of all rows, which are what a mean divides by: few bytes, and one launch less. The last
program to finish adds the losses of the rows, always in the same order.

Exponents are base 2. With f = log2(e)/T and x = f (s - max s), the sums of e_s = 2^x and
e_t = 2^y are S_s and S_t, q = e_s/S_s, p = e_t/S_t. Every divergence has a gradient

    on_e e_s + on_w w    (forward KL, decoupled: w = e_t; reverse KL: w = e_s (x - y); JSD, TVD: w
                          is the term of the sum that defines them, see _mixture_terms)

with two numbers per row, so one formula serves all; what belongs to the label alone comes on top.
A label outside of the classes makes its row NaN: to raise, the host would have to wait.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# What triton.jit decorates is not Python, and its tensors have no types that mypy knows.
from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastxkd.ops._library import ticket
from fastxkd.reference.kd_loss import DECOUPLED, FORWARD_KL, JSD, REVERSE_KL, TVD

_FORWARD_KL, _REVERSE_KL = tl.constexpr(FORWARD_KL), tl.constexpr(REVERSE_KL)
_JSD, _TVD, _DECOUPLED = tl.constexpr(JSD), tl.constexpr(TVD), tl.constexpr(DECOUPLED)
_MEAN = tl.constexpr(2)
_LOG2E, _LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
_INF = tl.constexpr(float("inf"))
# Probabilities below add nothing that a sum of them could hold.
_NEGLIGIBLE = tl.constexpr(1e-30)

# By the bytes of a number that the kernels compute with: the longest row that is kept in registers
# (more would fit, but then no second block does, and memory waits while this one computes), the
# block in which longer rows are read, the numbers of a thread, and the registers it may have with
# 4, 8 and 16 warps. Left alone, ptxas takes as many as it likes, or spills to go below some number
# of its own. The common case needs fewer than the others, and a second block then has room.
# benchmarks/registers.py shows what the compilers make of it; nothing may spill.
ON_CHIP = {4: 4096, 8: 512}
LOOPED_BLOCK = {4: 2048, 8: 512}
PER_THREAD = {4: 8, 8: 2}
REGISTERS = {4: {4: 96, 8: 128, 16: 128}, 8: {4: 255, 8: 255, 16: 128}}
LEAN_REGISTERS = {4: 80, 8: 80, 16: 64}


@triton.jit
def _load(matrix, offsets, inside, F: tl.constexpr):
    # What is not there is -inf: its exponential adds nothing.
    return tl.load(matrix + offsets, inside, other=-_INF).to(F)


@triton.jit
def _inverse(total):
    return tl.where(total == 0, 0, 1 / total)


@triton.jit
def _guarded(p, ratio):
    # A class without probability has no say, though its logarithm is infinite.
    return tl.where(p == 0, 0, p * ratio)


@triton.jit
def _power(e, POWER: tl.constexpr):
    if POWER == 1:
        return e
    elif POWER == 2:
        return e * e
    elif POWER == 3:
        return e * e * e
    else:
        return (e * e) * (e * e)


@triton.jit
def _offset(highest, factor):
    # The rounding of this product is common to the row, where it cancels. A row of nothing but
    # -inf must not take its maximum off itself.
    return tl.where(highest == -_INF, 0, highest * factor)


@triton.jit
def _moved(offset, highest, factor):
    """The offset after another block of the row, and by how much the earlier exponents fall.

    Offsets are kept as rounded, so that what falls is what the exponents were reckoned with.
    """
    new = tl.maximum(offset, highest * factor)
    return new, tl.where(offset == -_INF, 0, new - offset)


@triton.jit
def _exponent(logits, factor, offset):
    return tl.fma(logits, factor, -offset)


@triton.jit
def _softplus2(d):
    return tl.maximum(d, 0) + tl.log2(1 + tl.exp2(-tl.abs(d)))


@triton.jit
def _means(
    labels,
    class_weight,
    row_weight,
    rows,
    classes,
    ignore_index,
    HARD: tl.constexpr,
    REDUCTION: tl.constexpr,
    F: tl.constexpr,
):
    """What the sums over the rows are multiplied with: hard part, soft part."""
    BLOCK: tl.constexpr = 1024
    if REDUCTION != _MEAN:
        one = tl.full([], 1, F)
        return one, one
    elif labels is None and row_weight is None:
        mean = (1 / rows.to(tl.float64)).to(F)
        return mean, mean
    else:
        hard = tl.zeros([BLOCK], F)
        soft = tl.zeros([BLOCK], F)
        for start in range(0, rows, BLOCK):
            row = start + tl.arange(0, BLOCK).to(tl.int64)
            counts = row < rows
            on_row = tl.full([BLOCK], 1, F)
            if row_weight is not None:
                on_row = tl.load(row_weight + row, counts, other=0).to(F)
            if labels is not None:
                label = tl.load(labels + row, counts, other=0)
                counts = counts & (label != ignore_index)
            soft += tl.where(counts, on_row, 0)
            if HARD and class_weight is not None:
                known = counts & (label >= 0) & (label < classes)
                hard += on_row * tl.load(class_weight + label, known, other=0).to(F)
        soft_mean = _inverse(tl.sum(soft.to(tl.float64), 0)).to(F)
        if HARD and class_weight is not None:
            return _inverse(tl.sum(hard.to(tl.float64), 0)).to(F), soft_mean
        else:
            return soft_mean, soft_mean


@triton.jit
def _sum_of_weights(class_weight, classes, F: tl.constexpr):
    if class_weight is None:
        return classes.to(F)
    else:
        BLOCK: tl.constexpr = 1024
        total = tl.zeros([BLOCK], F)
        for start in range(0, classes, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            total += tl.load(class_weight + cols, cols < classes, other=0).to(F)
        return tl.sum(total.to(tl.float64), 0).to(F)


@triton.jit
def _weighted_exponents(
    logits, factor, offset, class_weight, cols, inside, POWER: tl.constexpr, F: tl.constexpr
):
    """Label smoothing's terms: the classes' weights times their exponents of the hard part."""
    if POWER > 0:
        x = POWER * _exponent(logits, factor, offset[:, None])
    else:
        x = _exponent(logits, tl.full([], _LOG2E, F), offset[:, None])
    if class_weight is None:
        return tl.where(inside, x, 0)
    else:
        # As wide as the logits, and so in their layout.
        cols = tl.broadcast_to(cols[None, :], x.shape)
        return _guarded(tl.load(class_weight + cols, inside, other=0).to(F), x)


@triton.jit
def _rows_of_tile(
    tile, labels, row_weight, rows, classes, ignore_index, ROWS: tl.constexpr, F: tl.constexpr
):
    """Row numbers, which of them exist, which count, their labels and weights."""
    row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
    exists = row < rows
    counts = exists
    label = tl.full([ROWS], -1, tl.int64)
    on_row = tl.full([ROWS], 1, F)
    if row_weight is not None:
        on_row = tl.load(row_weight + row, exists, other=0).to(F)
    if labels is not None:
        label = tl.load(labels + row, exists, other=0)
        counts = exists & (label != ignore_index)
        on_row = tl.where((label >= 0) & (label < classes), on_row, float("nan"))
    return row, exists, counts, label, on_row


@triton.jit
def _at_label(matrix, row, stride, label, counts, classes, F: tl.constexpr):
    there = counts & (label >= 0) & (label < classes)
    return tl.load(matrix + row * stride + label, there, other=0).to(F)


@triton.jit
def _divergence_term(e_s, e_t, x, y, DIVERGENCE: tl.constexpr):
    """What the KLs sum up, before it is divided by the sum of the exponentials."""
    if DIVERGENCE == _REVERSE_KL:
        return _guarded(e_s, x - y)
    else:
        return _guarded(e_t, y - x)


@triton.jit
def _mixture_terms(q, p, beta, DIVERGENCE: tl.constexpr):
    """Of JSD q log2 q/m and p log2 p/m, of TVD q sgn(q - p) and |q - p|."""
    if DIVERGENCE == _JSD:
        # A quotient, not a difference of logarithms: it keeps its digits where q and p agree.
        inverse = 1 / (beta * p + (1 - beta) * q)
        u = tl.where(q <= _NEGLIGIBLE, 0, q * tl.log2(q * inverse))
        v = tl.where(p <= _NEGLIGIBLE, 0, p * tl.log2(p * inverse))
        return u, v
    else:
        d = q - p
        return tl.where(d > 0, q, tl.where(d < 0, -q, 0 * d)), tl.abs(d)


@triton.jit
def _soft(
    sum_s,
    sum_t,
    first,
    second,
    x_label,
    y_label,
    alpha,
    beta,
    DIVERGENCE: tl.constexpr,
):
    """Per row: the divergence, on_e and on_w of its gradient, and what the label gets on top.

    ``first`` is the sum of the divergence's terms, of JSD and TVD ``second`` that of the others.
    """
    inverse_s, inverse_t = _inverse(sum_s), _inverse(sum_t)
    on_label = 0 * sum_s
    if DIVERGENCE == _FORWARD_KL:
        value = (first * inverse_t + tl.log2(sum_s * inverse_t)) * _LN2
        return value, inverse_s, -inverse_t, on_label
    elif DIVERGENCE == _REVERSE_KL:
        mean = first * inverse_s
        value = (mean + tl.log2(sum_t * inverse_s)) * _LN2
        on_w = inverse_s * _LN2
        return value, -mean * on_w, on_w, on_label
    elif DIVERGENCE == _JSD:
        value = (beta * second + (1 - beta) * first) * _LN2
        on_w = (1 - beta) * _LN2
        return value, -on_w * first * inverse_s, on_w + on_label, on_label
    elif DIVERGENCE == _TVD:
        return second / 2, -first * inverse_s / 2, 0.5 + on_label, on_label
    else:
        # sum_s, sum_t and first are those of the rest, without the label's class.
        d_s, d_t = tl.log2(sum_s) - x_label, tl.log2(sum_t) - y_label
        log_q, log_q_rest = -_softplus2(d_s), -_softplus2(-d_s)
        log_p, log_p_rest = -_softplus2(d_t), -_softplus2(-d_t)
        q, q_rest, p, p_rest = (
            tl.exp2(log_q),
            tl.exp2(log_q_rest),
            tl.exp2(log_p),
            tl.exp2(log_p_rest),
        )
        target = _guarded(p, log_p - log_q) + _guarded(p_rest, log_p_rest - log_q_rest)
        # Nothing among the rest: one class, or all others masked.
        known = (sum_s != 0) & (sum_t != 0)
        among = first * inverse_t + tl.where(known, tl.log2(sum_s * inverse_t), 0)
        # The same number twice; the one without the 1 in it keeps its digits.
        shift = alpha * tl.where(q > 0.5, p_rest - q_rest, q - p)
        value = (alpha * target + beta * among) * _LN2
        return value, (beta - shift) * inverse_s, -beta * inverse_t, shift


@triton.jit
def _hard(
    sum_h,
    x_label,
    weight,
    weight_sum,
    weight_dot,
    label_smoothing,
    classes,
    DIVERGENCE: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """Per row: cross-entropy, factor of e^s in its gradient, what the label gets on top.

    ``x_label`` is the label's exponent on the scale of sum_h, ``weight`` its class's weight.
    """
    log_sum = tl.log2(sum_h)
    picked = (1 - label_smoothing) * weight
    if DIVERGENCE == _DECOUPLED:
        log_whole = x_label + _softplus2(log_sum - x_label)
        value = picked * _softplus2(log_sum - x_label)
    else:
        log_whole = log_sum
        value = picked * (log_sum - x_label)
    mass = picked
    if SMOOTH:
        share = label_smoothing / classes
        value += share * (weight_sum * log_whole - weight_dot)
        mass += share * weight_sum
    if DIVERGENCE == _DECOUPLED:
        on_h = tl.where(sum_h == 0, 0, mass * tl.exp2(-log_whole))
        return value * _LN2, on_h, mass * tl.exp2(x_label - log_whole) - picked
    else:
        return value * _LN2, mass / sum_h, -picked


@triton.jit
def _store_loss(hard, soft, row, exists, counts, loss, parts, rows, REDUCTION: tl.constexpr):
    hard = tl.where(counts, hard, 0)
    soft = tl.where(counts, soft, 0)
    if REDUCTION == 0:
        tl.store(loss + row, hard + soft, exists)
    tl.store(parts + row, hard, exists)
    tl.store(parts + rows + row, soft, exists)


@triton.jit
def _add_up(row_parts, loss, parts, turn, rows, hard_mean, soft_mean, F: tl.constexpr):
    """The last program to come here adds up what all of them have stored."""
    BLOCK: tl.constexpr = 1024
    tl.debug_barrier()  # the atomic is one thread's; the others must have stored by then
    if tl.atomic_add(turn, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        hard = tl.zeros([BLOCK], tl.float64)
        soft = tl.zeros([BLOCK], tl.float64)
        for start in range(0, rows, BLOCK):
            row = start + tl.arange(0, BLOCK).to(tl.int64)
            # Past the L1 cache, which does not see other processors' stores.
            hard += tl.load(row_parts + row, row < rows, other=0, cache_modifier=".cg").to(
                tl.float64
            )
            soft += tl.load(row_parts + rows + row, row < rows, other=0, cache_modifier=".cg").to(
                tl.float64
            )
        hard_sum = tl.sum(hard, 0) * hard_mean
        soft_sum = tl.sum(soft, 0) * soft_mean
        tl.store(parts, hard_sum.to(F))
        tl.store(parts + 1, soft_sum.to(F))
        tl.store(loss, (hard_sum + soft_sum).to(F))
        tl.store(turn, 0)


@triton.jit
def _end_of_rows(
    sum_s,
    sum_t,
    sum_h,
    first,
    second,
    weight_sum,
    weight_dot,
    offset_s,
    offset_t,
    offset_h,
    student,
    teacher,
    student_stride,
    teacher_stride,
    class_weight,
    row,
    exists,
    counts,
    label,
    on_row,
    factor,
    temperature,
    ce_weight,
    kd_weight,
    alpha,
    beta,
    label_smoothing,
    hard_mean,
    soft_mean,
    loss,
    row_parts,
    rows,
    classes,
    DIVERGENCE: tl.constexpr,
    POWER: tl.constexpr,
    REDUCTION: tl.constexpr,
    HARD: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    F: tl.constexpr,
):
    """From the sums of a tile's rows to their losses, which are stored, and the gradient's factors:
    on_e, on_w, on_h, what the label's class gets on top, and what every class's weight takes off.
    """
    hard = 0 * on_row
    soft = 0 * on_row
    on_e, on_w, on_h, on_label, share = hard, hard, hard, hard, hard
    if HARD or DIVERGENCE == _DECOUPLED:
        s_label = _at_label(student, row, student_stride, label, counts, classes, F)
    if HARD:
        if POWER > 0:
            x_hard = POWER * _exponent(s_label, factor, offset_s)
        else:
            x_hard = _exponent(s_label, tl.full([], _LOG2E, F), offset_h)
        weight = 0 * on_row + 1
        if class_weight is not None:
            weight = _at_label(class_weight, 0 * row, 0, label, counts, classes, F)
        value, on_h, on_label = _hard(
            sum_h,
            x_hard,
            weight,
            weight_sum,
            weight_dot,
            label_smoothing,
            classes,
            DIVERGENCE,
            SMOOTH,
        )
        hard = ce_weight * on_row * value
        scale = ce_weight * hard_mean * on_row
        on_h *= scale
        on_label *= scale
        share = scale * label_smoothing / classes
    if SOFT:
        x_label, y_label = hard, hard
        if DIVERGENCE == _DECOUPLED:
            t_label = _at_label(teacher, row, teacher_stride, label, counts, classes, F)
            x_label = _exponent(s_label, factor, offset_s)
            y_label = _exponent(t_label, factor, offset_t)
        value, on_e, on_w, shift = _soft(
            sum_s, sum_t, first, second, x_label, y_label, alpha, beta, DIVERGENCE
        )
        soft = kd_weight * temperature * temperature * on_row * value
        scale = kd_weight * temperature * soft_mean * on_row
        on_e *= scale
        on_w *= scale
        on_label += scale * shift
    _store_loss(hard, soft, row, exists, counts, loss, row_parts, rows, REDUCTION)
    return on_e, on_w, on_h, on_label, share


@triton.jit
def _store_gradient(
    grad,
    offsets,
    exists,
    counts,
    label,
    cols,
    inside,
    e_s,
    w,
    h,
    class_weight,
    on_e,
    on_w,
    on_h,
    on_label,
    share,
    DIVERGENCE: tl.constexpr,
    HARD: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    F: tl.constexpr,
):
    g = 0 * e_s
    if HARD:
        g = on_h[:, None] * h
    if SOFT:
        g = tl.fma(on_e[:, None], e_s, tl.fma(on_w[:, None], w, g))
    if HARD and SMOOTH:
        if class_weight is None:
            g -= share[:, None]
        else:
            g -= share[:, None] * tl.load(class_weight + cols, inside, other=0).to(F)[None, :]
    if HARD or DIVERGENCE == _DECOUPLED:
        g = tl.where(cols[None, :] == label[:, None], g + on_label[:, None], g)
    # An ignored row may hold anything, NaN included: select, do not multiply by zero.
    g = tl.where(counts[:, None], g, 0)
    tl.store(grad + offsets, g.to(grad.dtype.element_ty), exists[:, None] & inside[None, :])


@triton.jit
def _kd_loss_on_chip(
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    """Rows that fit into registers, read once. Classes and strides come in units of ALIGN."""
    classes = units * ALIGN
    student_stride = student_units * ALIGN
    teacher_stride = teacher_units * ALIGN
    factor, temperature = tl.full([], factor, F), tl.full([], temperature, F)
    ce_weight, kd_weight = tl.full([], ce_weight, F), tl.full([], kd_weight, F)
    alpha, beta = tl.full([], alpha, F), tl.full([], beta, F)
    label_smoothing = tl.full([], label_smoothing, F)
    MIXTURE: tl.constexpr = (DIVERGENCE == _JSD) | (DIVERGENCE == _TVD)
    hard_mean, soft_mean = _means(
        labels, class_weight, row_weight, rows, classes, ignore_index, HARD, REDUCTION, F
    )
    weight_sum = tl.full([], 0, F)
    if SMOOTH:
        weight_sum = _sum_of_weights(class_weight, classes, F)
    cols = tl.arange(0, BLOCK)
    inside = cols < classes
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row, exists, counts, label, on_row = _rows_of_tile(
            tile, labels, row_weight, rows, classes, ignore_index, ROWS, F
        )
        wanted = counts[:, None] & inside[None, :]
        s = _load(student, row[:, None] * student_stride + cols[None, :], wanted, F)
        if SOFT:
            t = _load(teacher, row[:, None] * teacher_stride + cols[None, :], wanted, F)
        logits = s
        if DIVERGENCE == _DECOUPLED:
            rest = cols[None, :] != label[:, None]
            s = tl.where(rest, s, -_INF)
            t = tl.where(rest, t, -_INF)

        sums = 0 * on_row
        sum_t, sum_h, first, second, weight_dot = sums, sums, sums, sums, sums
        offset_t, offset_h = sums, sums
        highest = tl.max(s, 1)
        offset_s = _offset(highest, factor)
        x = _exponent(s, factor, offset_s[:, None])
        e_s = tl.exp2(x)
        sum_s = tl.sum(e_s, 1)
        w = e_s
        if SOFT:
            offset_t = _offset(tl.max(t, 1), factor)
            y = _exponent(t, factor, offset_t[:, None])
            e_t = tl.exp2(y)
            sum_t = tl.sum(e_t, 1)
            if MIXTURE:
                q = e_s * _inverse(sum_s)[:, None]
                p = e_t * _inverse(sum_t)[:, None]
                w, v = _mixture_terms(q, p, beta, DIVERGENCE)
                first, second = tl.sum(w, 1), tl.sum(v, 1)
            else:
                w = _divergence_term(e_s, e_t, x, y, DIVERGENCE)
                first = tl.sum(w, 1)
                if DIVERGENCE != _REVERSE_KL:
                    w = e_t
        h = e_s
        if HARD:
            if POWER > 0:
                h = _power(e_s, POWER)
                offset = offset_s
            else:
                log2e = tl.full([], _LOG2E, F)
                offset_h = _offset(highest, log2e)
                h = tl.exp2(_exponent(s, log2e, offset_h[:, None]))
                offset = offset_h
            sum_h = tl.sum(h, 1)
            if SMOOTH:
                terms = _weighted_exponents(
                    logits, factor, offset, class_weight, cols, wanted, POWER, F
                )
                weight_dot = tl.sum(terms, 1)
        on_e, on_w, on_h, on_label, share = _end_of_rows(
            sum_s,
            sum_t,
            sum_h,
            first,
            second,
            weight_sum,
            weight_dot,
            offset_s,
            offset_t,
            offset_h,
            student,
            teacher,
            student_stride,
            teacher_stride,
            class_weight,
            row,
            exists,
            counts,
            label,
            on_row,
            factor,
            temperature,
            ce_weight,
            kd_weight,
            alpha,
            beta,
            label_smoothing,
            hard_mean,
            soft_mean,
            loss,
            row_parts,
            rows,
            classes,
            DIVERGENCE,
            POWER,
            REDUCTION,
            HARD,
            SOFT,
            SMOOTH,
            F,
        )
        if grad is not None:
            _store_gradient(
                grad,
                row[:, None] * classes + cols[None, :],
                exists,
                counts,
                label,
                cols,
                inside,
                e_s,
                w,
                h,
                class_weight,
                on_e,
                on_w,
                on_h,
                on_label,
                share,
                DIVERGENCE,
                HARD,
                SOFT,
                SMOOTH,
                F,
            )
    if REDUCTION != 0:
        _add_up(row_parts, loss, parts, turn, rows, hard_mean, soft_mean, F)


@triton.jit
def _kd_loss_looped(
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    """Longer rows, block after block: sums relative to the highest logit so far, then the gradient;
    JSD and TVD know their terms only in between, when q and p are known. Every sweep turns back
    where the one before has ended: what was read last is still in the L2 cache.
    """
    classes = units * ALIGN
    student_stride = student_units * ALIGN
    teacher_stride = teacher_units * ALIGN
    factor, temperature = tl.full([], factor, F), tl.full([], temperature, F)
    ce_weight, kd_weight = tl.full([], ce_weight, F), tl.full([], kd_weight, F)
    alpha, beta = tl.full([], alpha, F), tl.full([], beta, F)
    label_smoothing = tl.full([], label_smoothing, F)
    log2e = tl.full([], _LOG2E, F)
    last = (tl.cdiv(classes, BLOCK) - 1) * BLOCK
    MIXTURE: tl.constexpr = (DIVERGENCE == _JSD) | (DIVERGENCE == _TVD)
    hard_mean, soft_mean = _means(
        labels, class_weight, row_weight, rows, classes, ignore_index, HARD, REDUCTION, F
    )
    weight_sum = tl.full([], 0, F)
    if SMOOTH:
        weight_sum = _sum_of_weights(class_weight, classes, F)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row, exists, counts, label, on_row = _rows_of_tile(
            tile, labels, row_weight, rows, classes, ignore_index, ROWS, F
        )
        student_row = row[:, None] * student_stride
        teacher_row = row[:, None] * teacher_stride
        # Lane by lane, one addition across the lanes at the end.
        acc_s = tl.zeros([ROWS, BLOCK], F)
        acc_t, acc_h, acc_first, acc_second, acc_x = acc_s, acc_s, acc_s, acc_s, acc_s
        none = tl.full([ROWS], -_INF, F)
        offset_s, offset_t, offset_h, anchor = none, none, none, 0 * on_row
        for start in range(0, classes, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            inside = cols < classes
            wanted = counts[:, None] & inside[None, :]
            s = _load(student, student_row + cols[None, :], wanted, F)
            logits = s
            if DIVERGENCE == _DECOUPLED:
                rest = cols[None, :] != label[:, None]
                s = tl.where(rest, s, -_INF)
            highest = tl.max(s, 1)
            new_s, shift_s = _moved(offset_s, highest, factor)
            decay_s = tl.exp2(-shift_s)[:, None]
            base_s = tl.where(new_s == -_INF, 0, new_s)
            x = _exponent(s, factor, base_s[:, None])
            e_s = tl.exp2(x)
            if SOFT:
                t = _load(teacher, teacher_row + cols[None, :], wanted, F)
                if DIVERGENCE == _DECOUPLED:
                    t = tl.where(rest, t, -_INF)
                new_t, shift_t = _moved(offset_t, tl.max(t, 1), factor)
                decay_t = tl.exp2(-shift_t)[:, None]
                base_t = tl.where(new_t == -_INF, 0, new_t)
                y = _exponent(t, factor, base_t[:, None])
                e_t = tl.exp2(y)
                if not MIXTURE:
                    # Every earlier x - y changes by the same number.
                    moved = (shift_s - shift_t)[:, None]
                    term = _divergence_term(e_s, e_t, x, y, DIVERGENCE)
                    if DIVERGENCE == _REVERSE_KL:
                        acc_first = decay_s * (acc_first - moved * acc_s) + term
                    else:
                        acc_first = decay_t * (acc_first + moved * acc_t) + term
                acc_t = decay_t * acc_t + e_t
                offset_t = new_t
            if HARD:
                if POWER > 0:
                    acc_h = _power(decay_s, POWER) * acc_h + _power(e_s, POWER)
                else:
                    new_h, shift_h = _moved(offset_h, highest, log2e)
                    base_h = tl.where(new_h == -_INF, 0, new_h)
                    e_h = tl.exp2(_exponent(s, log2e, base_h[:, None]))
                    acc_h = tl.exp2(-shift_h)[:, None] * acc_h + e_h
                    offset_h = new_h
                if SMOOTH:
                    # Relative to the first block's offset, which is as good as the last one's.
                    anchor = tl.where(start == 0, base_s if POWER > 0 else base_h, anchor)
                    acc_x += _weighted_exponents(
                        logits, factor, anchor, class_weight, cols, wanted, POWER, F
                    )
            acc_s = decay_s * acc_s + e_s
            offset_s = new_s
        sum_s, sum_t, sum_h = tl.sum(acc_s, 1), tl.sum(acc_t, 1), tl.sum(acc_h, 1)
        offset_s = tl.where(offset_s == -_INF, 0, offset_s)
        offset_t = tl.where(offset_t == -_INF, 0, offset_t)
        offset_h = tl.where(offset_h == -_INF, 0, offset_h)
        weight_dot = tl.sum(acc_x, 1)
        if SMOOTH:
            if POWER > 0:
                weight_dot -= POWER * (offset_s - anchor) * weight_sum
            else:
                weight_dot -= (offset_h - anchor) * weight_sum
        inverse_s, inverse_t = _inverse(sum_s)[:, None], _inverse(sum_t)[:, None]
        if MIXTURE:
            for back in range(0, classes, BLOCK):
                cols = last - back + tl.arange(0, BLOCK)
                wanted = counts[:, None] & (cols < classes)[None, :]
                s = _load(student, student_row + cols[None, :], wanted, F)
                t = _load(teacher, teacher_row + cols[None, :], wanted, F)
                q = inverse_s * tl.exp2(_exponent(s, factor, offset_s[:, None]))
                p = inverse_t * tl.exp2(_exponent(t, factor, offset_t[:, None]))
                u, v = _mixture_terms(q, p, beta, DIVERGENCE)
                acc_first += u
                acc_second += v
        on_e, on_w, on_h, on_label, share = _end_of_rows(
            sum_s,
            sum_t,
            sum_h,
            tl.sum(acc_first, 1),
            tl.sum(acc_second, 1),
            weight_sum,
            weight_dot,
            offset_s,
            offset_t,
            offset_h,
            student,
            teacher,
            student_stride,
            teacher_stride,
            class_weight,
            row,
            exists,
            counts,
            label,
            on_row,
            factor,
            temperature,
            ce_weight,
            kd_weight,
            alpha,
            beta,
            label_smoothing,
            hard_mean,
            soft_mean,
            loss,
            row_parts,
            rows,
            classes,
            DIVERGENCE,
            POWER,
            REDUCTION,
            HARD,
            SOFT,
            SMOOTH,
            F,
        )
        if grad is not None:
            for back in range(0, classes, BLOCK):
                cols = (back if MIXTURE else last - back) + tl.arange(0, BLOCK)
                inside = cols < classes
                wanted = counts[:, None] & inside[None, :]
                s = _load(student, student_row + cols[None, :], wanted, F)
                if DIVERGENCE == _DECOUPLED:
                    rest = cols[None, :] != label[:, None]
                    s = tl.where(rest, s, -_INF)
                x = _exponent(s, factor, offset_s[:, None])
                e_s = tl.exp2(x)
                w, h = e_s, e_s
                if SOFT:
                    t = _load(teacher, teacher_row + cols[None, :], wanted, F)
                    if DIVERGENCE == _DECOUPLED:
                        t = tl.where(rest, t, -_INF)
                    y = _exponent(t, factor, offset_t[:, None])
                    w = tl.exp2(y)
                    if MIXTURE:
                        w, _ = _mixture_terms(inverse_s * e_s, inverse_t * w, beta, DIVERGENCE)
                    elif DIVERGENCE == _REVERSE_KL:
                        w = _divergence_term(e_s, w, x, y, DIVERGENCE)
                if HARD:
                    if POWER > 0:
                        h = _power(e_s, POWER)
                    else:
                        h = tl.exp2(_exponent(s, log2e, offset_h[:, None]))
                _store_gradient(
                    grad,
                    row[:, None] * classes + cols[None, :],
                    exists,
                    counts,
                    label,
                    cols,
                    inside,
                    e_s,
                    w,
                    h,
                    class_weight,
                    on_e,
                    on_w,
                    on_h,
                    on_label,
                    share,
                    DIVERGENCE,
                    HARD,
                    SOFT,
                    SMOOTH,
                    F,
                )
    if REDUCTION != 0:
        _add_up(row_parts, loss, parts, turn, rows, hard_mean, soft_mean, F)


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


class Launch(NamedTuple):
    """A kernel with everything it is called with; benchmarks/registers.py compiles it without a
    device."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self, tensor: Tensor) -> None:
        with torch.cuda.device_of(tensor):
            self.kernel[(self.programs,)](**self.arguments, **self.options)


class Device(NamedTuple):
    processors: int
    lanes: int  # threads of a warp
    nvidia: bool


@lru_cache
def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    nvidia = torch.version.hip is None
    lanes = 32 if nvidia else properties.warp_size
    return Device(properties.multi_processor_count, lanes, nvidia)


def device_of(tensor: Tensor) -> Device:
    return _gpu(tensor.device.index) if tensor.device.type == "cuda" else Device(1, 32, True)


def _tile(
    block: int, rows: int, size: int, device: Device, lean: bool = False
) -> tuple[int, int, dict[str, Any]]:
    """Rows of a tile, programs, the compiler's options; for ``rows`` rows of ``block`` numbers."""
    of_tile = max(512 // block, 1)
    warps = of_tile * block // (PER_THREAD[size] * device.lanes)
    warps = min(max(warps, 128 // device.lanes), 512 // device.lanes)
    # Enough to fill the device: 1024 threads on every processor.
    programs = device.processors * (1024 // (warps * device.lanes))
    # Sums of products are rounded once, whatever the default of the version.
    options = {"num_warps": warps, "enable_fp_fusion": True}
    if device.nvidia:
        options["maxnreg"] = (LEAN_REGISTERS if lean else REGISTERS[size])[warps]
    return of_tile, min(triton.cdiv(rows, of_tile), programs), options


def _alignment(itemsize: int, *numbers: int) -> int:
    """How many elements make 16 bytes, when all numbers are multiples of that, else 1.

    Triton asks of a number only whether it is a multiple of 16, which 1000 is not.
    """
    count = 16 // itemsize
    return count if all(n % count == 0 for n in numbers) else 1


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
) -> Launch:
    """The launch for these arguments, whose rows are contiguous."""
    rows, classes = student.shape
    hard, soft = labels is not None and ce_weight != 0, kd_weight != 0
    if not soft:
        temperature, divergence = 1.0, FORWARD_KL
    size = loss.element_size()
    on_chip = classes <= ON_CHIP[size]
    block = triton.next_power_of_2(classes) if on_chip else LOOPED_BLOCK[size]
    power = int(temperature) if temperature in (1, 2, 3, 4) else 0
    smooth = hard and label_smoothing > 0
    lean = (
        on_chip
        and size == 4
        and power > 0
        and not smooth
        and class_weight is None
        and row_weight is None
        and divergence not in (JSD, DECOUPLED)
    )
    rows_of_tile, programs, options = _tile(block, rows, size, device, lean)
    align = _alignment(student.element_size(), classes, student.stride(0), teacher.stride(0))
    return Launch(
        _kd_loss_on_chip if on_chip else _kd_loss_looped,
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
            "ROWS": rows_of_tile,
            "BLOCK": block,
            "F": tl.float64 if size == 8 else tl.float32,
        },
        options,
    )


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
    plan(
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
    ).run(student)
    return loss, parts, grad


def plan_scale(grad: Tensor, upstream: Tensor, device: Device) -> Launch:
    rows, classes = grad.shape
    size = 8 if grad.dtype == torch.float64 else 4
    block = min(triton.next_power_of_2(classes), LOOPED_BLOCK[size])
    rows_of_tile, programs, options = _tile(block, rows, size, device)
    align = _alignment(grad.element_size(), classes)
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
