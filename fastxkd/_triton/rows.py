"""Rows: their labels and weights, the cross-entropy, and what becomes of losses and gradients."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# What triton.jit decorates is not Python, and its tensors have no types that mypy knows.
from __future__ import annotations

import triton
import triton.language as tl

from fastxkd._triton.divergences import DECOUPLED
from fastxkd._triton.logits import LN2, LOG2E, exponent, reciprocal, softplus2

MEAN = tl.constexpr(2)


@triton.jit
def rows_of_tile(
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
def means(
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
    if REDUCTION != MEAN:
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
        soft_mean = reciprocal(tl.sum(soft.to(tl.float64), 0)).to(F)
        if HARD and class_weight is not None:
            return reciprocal(tl.sum(hard.to(tl.float64), 0)).to(F), soft_mean
        else:
            return soft_mean, soft_mean


@triton.jit
def sum_of_weights(class_weight, classes, F: tl.constexpr):
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
def at_label(matrix, offsets, label, counts, classes, F: tl.constexpr):
    there = counts & (label >= 0) & (label < classes)
    return tl.load(matrix + offsets + label, there, other=0).to(F)


@triton.jit
def cross_entropy(
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
    if DIVERGENCE == DECOUPLED:
        log_whole = x_label + softplus2(log_sum - x_label)
        value = picked * softplus2(log_sum - x_label)
    else:
        log_whole = log_sum
        value = picked * (log_sum - x_label)
    mass = picked
    if SMOOTH:
        share = label_smoothing / classes
        value += share * (weight_sum * log_whole - weight_dot)
        mass += share * weight_sum
    if DIVERGENCE == DECOUPLED:
        on_h = tl.where(sum_h == 0, 0, mass * tl.exp2(-log_whole))
        return value * LN2, on_h, mass * tl.exp2(x_label - log_whole) - picked
    else:
        return value * LN2, mass / sum_h, -picked


@triton.jit
def hard_part(
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
    DIVERGENCE: tl.constexpr,
    POWER: tl.constexpr,
    SMOOTH: tl.constexpr,
    F: tl.constexpr,
):
    """Per row, all weights in it: the loss, and of the gradient the factor of e^s, what the label's
    class gets on top, and what every class's weight takes off."""
    if POWER > 0:
        x_label = POWER * exponent(s_label, factor, offset_s)
    else:
        x_label = exponent(s_label, tl.full([], LOG2E, F), offset_h)
    weight = 0 * on_row + 1
    if class_weight is not None:
        weight = at_label(class_weight, 0 * label, label, counts, classes, F)
    value, on_h, on_label = cross_entropy(
        sum_h,
        x_label,
        weight,
        weight_sum,
        weight_dot,
        label_smoothing,
        classes,
        DIVERGENCE,
        SMOOTH,
    )
    scale = ce_weight * hard_mean * on_row
    share = scale * label_smoothing / classes
    return ce_weight * on_row * value, on_h * scale, on_label * scale, share


@triton.jit
def store_loss(hard, soft, row, exists, counts, loss, parts, rows, REDUCTION: tl.constexpr):
    hard = tl.where(counts, hard, 0)
    soft = tl.where(counts, soft, 0)
    if REDUCTION == 0:
        tl.store(loss + row, hard + soft, exists)
    tl.store(parts + row, hard, exists)
    tl.store(parts + rows + row, soft, exists)


@triton.jit
def comes_last(turn):
    """Whether all other programs have been here; what they have stored can then be read."""
    tl.debug_barrier()  # the atomic is one thread's; the others must have stored by then
    last = tl.atomic_add(turn, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        tl.store(turn, 0)
    return last


@triton.jit
def total_of(values, count):
    """In double precision, always in the same order."""
    BLOCK: tl.constexpr = 1024
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK).to(tl.int64)
        # Past the L1 cache, which does not see other processors' stores.
        total += tl.load(values + at, at < count, other=0, cache_modifier=".cg").to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def store_totals(hard, soft, loss, parts, F: tl.constexpr):
    tl.store(parts, hard.to(F))
    tl.store(parts + 1, soft.to(F))
    tl.store(loss, (hard + soft).to(F))


@triton.jit
def add_up(row_parts, loss, parts, turn, rows, hard_mean, soft_mean, F: tl.constexpr):
    """The last program to come here adds up the rows that all of them have stored."""
    if comes_last(turn):
        hard = total_of(row_parts, rows) * hard_mean
        soft = total_of(row_parts + rows, rows) * soft_mean
        store_totals(hard, soft, loss, parts, F)


@triton.jit
def store_gradient(
    grad,
    offsets,
    exists,
    counts,
    label,
    cols,
    inside,
    g,
    class_weight,
    on_label,
    share,
    DIVERGENCE: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTH: tl.constexpr,
    F: tl.constexpr,
):
    """``g`` and what the label and label smoothing put on top."""
    if HARD and SMOOTH:
        if class_weight is None:
            g -= share[:, None]
        else:
            g -= share[:, None] * tl.load(class_weight + cols, inside, other=0).to(F)[None, :]
    if HARD or DIVERGENCE == DECOUPLED:
        g = tl.where(cols[None, :] == label[:, None], g + on_label[:, None], g)
    # An ignored row may hold anything, NaN included: select, do not multiply by zero.
    g = tl.where(counts[:, None], g, 0)
    tl.store(grad + offsets, g.to(grad.dtype.element_ty), exists[:, None] & inside[None, :])
