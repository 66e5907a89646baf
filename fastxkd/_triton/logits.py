"""Tiles of logits and their exponents, base 2.

With f = log2(e)/T and x = f (s - max s), the sums of e_s = 2^x and e_t = 2^y are S_s and S_t,
q = e_s/S_s, p = e_t/S_t. The hard part is the softmax at T = 1: a power of e_s where T is a small
integer, otherwise exponentials of its own.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# What triton.jit decorates is not Python, and its tensors have no types that mypy knows.
from __future__ import annotations

import triton
import triton.language as tl

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


@triton.jit
def load(matrix, offsets, inside, F: tl.constexpr):
    # What is not there is -inf: its exponential adds nothing.
    return tl.load(matrix + offsets, inside, other=-INF).to(F)


@triton.jit
def reciprocal(total):
    return tl.where(total == 0, 0, 1 / total)


@triton.jit
def guarded(p, ratio):
    # A class without probability has no say, though its logarithm is infinite.
    return tl.where(p == 0, 0, p * ratio)


@triton.jit
def power(e, POWER: tl.constexpr):
    if POWER == 1:
        return e
    elif POWER == 2:
        return e * e
    elif POWER == 3:
        return e * e * e
    else:
        return (e * e) * (e * e)


@triton.jit
def offset_of(highest, factor):
    # The rounding of this product is common to the row, where it cancels. A row of nothing but
    # -inf must not take its maximum off itself.
    return tl.where(highest == -INF, 0, highest * factor)


@triton.jit
def next_offset(offset, highest, factor):
    """The offset after another block of the row, and by how much the earlier exponents fall.

    Offsets are kept as rounded, so that what falls is what the exponents were reckoned with.
    """
    new = tl.maximum(offset, highest * factor)
    return new, tl.where(offset == -INF, 0, new - offset)


@triton.jit
def exponent(logits, factor, offset):
    return tl.fma(logits, factor, -offset)


@triton.jit
def softplus2(d):
    return tl.maximum(d, 0) + tl.log2(1 + tl.exp2(-tl.abs(d)))


@triton.jit
def weighted_exponents(
    logits, factor, offset, class_weight, cols, inside, POWER: tl.constexpr, F: tl.constexpr
):
    """Label smoothing's terms: the classes' weights times their exponents of the hard part."""
    if POWER > 0:
        x = POWER * exponent(logits, factor, offset[:, None])
    else:
        x = exponent(logits, tl.full([], LOG2E, F), offset[:, None])
    if class_weight is None:
        return tl.where(inside, x, 0)
    else:
        # As wide as the logits, and so in their layout.
        cols = tl.broadcast_to(cols[None, :], x.shape)
        return guarded(tl.load(class_weight + cols, inside, other=0).to(F), x)
