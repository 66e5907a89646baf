"""The divergences: what is summed up of each, and what value and gradient the sums make.

Every divergence that is a sum over rows has a gradient

    on_e e_s + on_w w    (forward KL, decoupled: w = e_t; reverse KL: w = e_s (x - y); JSD, TVD: w
                          is the term of the sum that defines them, see mixture_terms)

with two numbers per row, so one formula serves all; what belongs to the label alone comes on top.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# What triton.jit decorates is not Python, and its tensors have no types that mypy knows.
from __future__ import annotations

import triton
import triton.language as tl

from fastxkd._triton.logits import LN2, guarded, reciprocal, softplus2
from fastxkd.reference import kd_loss as reference

FORWARD_KL, REVERSE_KL = tl.constexpr(reference.FORWARD_KL), tl.constexpr(reference.REVERSE_KL)
JSD, TVD = tl.constexpr(reference.JSD), tl.constexpr(reference.TVD)
DECOUPLED, DIST = tl.constexpr(reference.DECOUPLED), tl.constexpr(reference.DIST)
# Probabilities below add nothing that a sum of them could hold.
_NEGLIGIBLE = tl.constexpr(1e-30)


@triton.jit
def divergence_term(e_s, e_t, x, y, DIVERGENCE: tl.constexpr):
    """What the KLs sum up, before it is divided by the sum of the exponentials."""
    if DIVERGENCE == REVERSE_KL:
        return guarded(e_s, x - y)
    else:
        return guarded(e_t, y - x)


@triton.jit
def mixture_terms(q, p, beta, DIVERGENCE: tl.constexpr):
    """Of JSD q log2 q/m and p log2 p/m, of TVD q sgn(q - p) and |q - p|."""
    if DIVERGENCE == JSD:
        # A quotient, not a difference of logarithms: it keeps its digits where q and p agree.
        over_m = 1 / (beta * p + (1 - beta) * q)
        u = tl.where(q <= _NEGLIGIBLE, 0, q * tl.log2(q * over_m))
        v = tl.where(p <= _NEGLIGIBLE, 0, p * tl.log2(p * over_m))
        return u, v
    else:
        d = q - p
        return tl.where(d > 0, q, tl.where(d < 0, -q, 0 * d)), tl.abs(d)


@triton.jit
def soft_part(
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
    inverse_s, inverse_t = reciprocal(sum_s), reciprocal(sum_t)
    on_label = 0 * sum_s
    if DIVERGENCE == FORWARD_KL:
        value = (first * inverse_t + tl.log2(sum_s * inverse_t)) * LN2
        return value, inverse_s, -inverse_t, on_label
    elif DIVERGENCE == REVERSE_KL:
        mean = first * inverse_s
        value = (mean + tl.log2(sum_t * inverse_s)) * LN2
        on_w = inverse_s * LN2
        return value, -mean * on_w, on_w, on_label
    elif DIVERGENCE == JSD:
        value = (beta * second + (1 - beta) * first) * LN2
        on_w = (1 - beta) * LN2
        return value, -on_w * first * inverse_s, on_w + on_label, on_label
    elif DIVERGENCE == TVD:
        return second / 2, -first * inverse_s / 2, 0.5 + on_label, on_label
    else:
        # sum_s, sum_t and first are those of the rest, without the label's class.
        d_s, d_t = tl.log2(sum_s) - x_label, tl.log2(sum_t) - y_label
        log_q, log_q_rest = -softplus2(d_s), -softplus2(-d_s)
        log_p, log_p_rest = -softplus2(d_t), -softplus2(-d_t)
        q, q_rest, p, p_rest = (
            tl.exp2(log_q),
            tl.exp2(log_q_rest),
            tl.exp2(log_p),
            tl.exp2(log_p_rest),
        )
        target = guarded(p, log_p - log_q) + guarded(p_rest, log_p_rest - log_q_rest)
        # Nothing among the rest: one class, or all others masked.
        known = (sum_s != 0) & (sum_t != 0)
        among = first * inverse_t + tl.where(known, tl.log2(sum_s * inverse_t), 0)
        # The same number twice; the one without the 1 in it keeps its digits.
        shift = alpha * tl.where(q > 0.5, p_rest - q_rest, q - p)
        value = (alpha * target + beta * among) * LN2
        return value, (beta - shift) * inverse_s, -beta * inverse_t, shift
