"""kd_loss in plain torch, with the gradient in closed form.

No autograd in here: compiled code runs operators below autograd, where it would find no graph.
With z = s/T, log q = log softmax(z), log p the teacher's, each divergence D has

    forward KL    sum p (log p - log q)                  dD/dz = q - p
    reverse KL    sum q (log q - log p) = R              dD/dz = q (log q - log p - R)
    JSD           b KL(p||m) + (1-b) KL(q||m)            dD/dz = (1-b) q (log q - log m - KL(q||m))
                  with m = b p + (1-b) q
    TVD           sum |q - p| / 2                        dD/dz = q (sgn - sum q sgn) / 2
    decoupled     a KL(target or not) + b KL(the rest)   see _decoupled
    DIST          1 - correlation of rows, of columns    see dist.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastxkd.reference.dist import dist

FORWARD_KL, REVERSE_KL, JSD, TVD, DECOUPLED, DIST = range(6)
LOGITS, PROBABILITIES = range(2)


def dense_teacher(
    teacher: Tensor,
    indices: Tensor | None,
    weights: list[float],
    form: int,
    temperature: float,
    classes: int,
) -> Tensor:
    """Logits [rows, classes] whose softmax at T is the target that the arguments describe.

    ``teacher`` is [rows, k] or, of several models, [models, rows, k]; with ``indices`` of the same
    shape its k values belong to those classes and the other classes have probability 0.
    """
    exact = torch.float64 if teacher.dtype == torch.float64 else torch.float32
    values = teacher
    if form == PROBABILITIES:
        values = teacher.to(exact).log()
    if indices is not None:
        missing = torch.full(
            (*teacher.shape[:-1], classes),
            -torch.inf,
            dtype=values.dtype,
            device=values.device,
        )
        values = missing.scatter_(-1, indices, values)
    if values.dim() == 2:
        return values
    log_weights = torch.tensor(weights, dtype=exact, device=values.device).log()
    log_p = torch.log_softmax(values.to(exact) / temperature, -1)
    # A class that no teacher knows has -inf in all of them; logsumexp gives -inf, as it must.
    return temperature * torch.logsumexp(log_p + log_weights[:, None, None], 0)


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
    """``student`` and ``teacher`` are [rows, classes]; ``teacher`` may have a wider dtype."""
    rows, classes = student.shape
    exact = torch.float64 if student.dtype == torch.float64 else torch.float32
    s, t = student.to(exact), teacher.to(exact)  # [rows, classes]
    counts = torch.ones(rows, dtype=torch.bool, device=s.device)
    if labels is not None:
        counts = labels != ignore_index
        labels = labels.where(counts, 0)
    on_row = s.new_ones(rows) if row_weight is None else row_weight.to(exact)
    on_row = torch.where(counts, on_row, 0)
    row_mean = _reciprocal(on_row.sum()) if reduction == 2 else s.new_ones(())

    hard, soft = s.new_zeros(rows), s.new_zeros(rows)
    of_batch = s.new_zeros(())  # a soft part that is not a sum over rows
    grad = torch.zeros_like(s) if need_grad else None
    weight_mean = row_mean
    if labels is not None and ce_weight != 0:
        weight = s.new_ones(classes) if class_weight is None else class_weight.to(exact)
        on_label = weight[labels]  # [rows]
        if reduction == 2:
            weight_mean = _reciprocal((on_label * on_row).sum())
        log_prob = torch.log_softmax(s, 1)
        picked = (1 - label_smoothing) * on_label
        hard = -picked * log_prob.gather(1, labels[:, None])[:, 0]
        spread = label_smoothing / classes * weight  # [classes]
        if label_smoothing > 0:
            hard = hard - torch.where(weight == 0, 0, spread * log_prob).sum(1)
        hard = ce_weight * on_row * hard
        if grad is not None:
            target = torch.zeros_like(s).scatter_(1, labels[:, None], picked[:, None]) + spread
            mass = (picked + spread.sum())[:, None]
            scale = ce_weight * weight_mean * on_row[:, None]
            grad += scale * (mass * log_prob.exp() - target)
    if kd_weight != 0 and divergence == DIST:
        value, slope = dist(s / temperature, t / temperature, on_row, alpha, beta)
        of_batch = kd_weight * temperature**2 * value
        if grad is not None:
            grad += kd_weight * temperature * slope
    elif kd_weight != 0:
        if divergence == DECOUPLED:
            assert labels is not None
            value, slope = _decoupled(s / temperature, t / temperature, labels, alpha, beta)
        else:
            value, slope = _divergence(s / temperature, t / temperature, divergence, beta)
        soft = kd_weight * temperature**2 * on_row * value
        if grad is not None:
            grad += kd_weight * temperature * row_mean * on_row[:, None] * slope

    # An ignored row may hold anything, NaN included: select, do not multiply by zero.
    hard, soft = torch.where(counts, hard, 0), torch.where(counts, soft, 0)
    if reduction != 0:
        hard, soft = hard.sum() * weight_mean, soft.sum() * row_mean + of_batch
    if grad is None:
        return hard + soft, torch.stack([hard, soft]), student.new_empty(0)
    grad = torch.where(counts[:, None], grad, 0).to(student.dtype)
    return hard + soft, torch.stack([hard, soft]), grad.contiguous()


def _reciprocal(total: Tensor) -> Tensor:
    """1 / total; 0 where nothing counts."""
    return torch.where(total != 0, 1 / total, 0)


def _weighted(p: Tensor, ratio: Tensor) -> Tensor:
    """p * ratio, 0 where p is: a masked class has an infinite logarithm and no say."""
    return torch.where(p == 0, 0, p * ratio)


def _from_highest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits less their row's highest, and log sum exp of those."""
    logits = logits - logits.amax(1, keepdim=True)
    return logits, logits.exp().sum(1, keepdim=True).log()


def _divergence(
    student: Tensor, teacher: Tensor, divergence: int, beta: float
) -> tuple[Tensor, Tensor]:
    """Value [rows] and gradient [rows, classes] with respect to the softened student logits."""
    log_q, log_p = torch.log_softmax(student, 1), torch.log_softmax(teacher, 1)
    # Not exp(log q): a large negative logarithm has lost the digits.
    q, p = torch.softmax(student, 1), torch.softmax(teacher, 1)
    if divergence == FORWARD_KL:
        return _weighted(p, log_p - log_q).sum(1), q - p
    if divergence == REVERSE_KL:
        u = _weighted(q, log_q - log_p)
        value = u.sum(1)
        return value, u - q * value[:, None]
    if divergence == JSD:
        # From the gap of the logits: logarithms of p, q and m would be rounded before they cancel.
        (t, log_p_mass), (s, log_q_mass) = _from_highest(teacher), _from_highest(student)
        gap = (t - s) - (log_p_mass - log_q_mass)  # log p - log q, [rows, classes]
        share = torch.where(gap > 0, gap.new_full((), 1 - beta), beta)
        near = torch.log1p(share * torch.expm1(-gap.abs()))  # of the larger one to the mixture
        u = _weighted(q, -near - gap.clamp(min=0))
        to_student = u.sum(1)
        to_teacher = _weighted(p, gap.clamp(max=0) - near).sum(1)
        value = beta * to_teacher + (1 - beta) * to_student
        return value, (1 - beta) * (u - q * to_student[:, None])
    difference = q - p
    # torch's sign of NaN is 0
    u = torch.where(difference.isnan(), difference, q * difference.sign())
    return difference.abs().sum(1) / 2, (u - q * u.sum(1, keepdim=True)) / 2


def _decoupled(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """alpha * KL of (target, rest) + beta * KL among the rest; both against the label's class.

    With r the probability of the rest and ^ the distributions among it, d/dz of the target is
    alpha (q_k - p_k) and of another class beta (q^ - p^) - alpha (q_k - p_k) q^.
    """
    at = labels[:, None]

    def split(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rest = z.scatter(1, at, -torch.inf)
        # Taken off first: the logarithm of a sum far from 0 would round the digits away.
        highest = rest.amax(1, keepdim=True)
        highest = torch.where(highest == -torch.inf, 0, highest)
        z, rest = z - highest, rest - highest
        mass = rest.exp().sum(1)
        total = mass.log()
        picked = z.gather(1, at)[:, 0]
        whole = torch.logaddexp(total, picked)
        return picked - whole, total - whole, rest, mass

    def among(rest: Tensor, mass: Tensor) -> Tensor:
        # Without another class (or with all of them masked) there is nothing among the rest.
        return torch.where(mass[:, None] == 0, 0, torch.softmax(rest, 1))

    log_q, log_q_rest, student_rest, student_mass = split(student)
    log_p, log_p_rest, teacher_rest, teacher_mass = split(teacher)
    q, q_rest, q_among = log_q.exp(), log_q_rest.exp(), among(student_rest, student_mass)
    p, p_rest, p_among = log_p.exp(), log_p_rest.exp(), among(teacher_rest, teacher_mass)
    target = _weighted(p, log_p - log_q) + _weighted(p_rest, log_p_rest - log_q_rest)
    others = _weighted(p_among, teacher_rest - student_rest).sum(1)
    others = others + _weighted(p_among.sum(1), (student_mass / teacher_mass).log())
    # The same number twice; the one without the 1 in it keeps its digits.
    shift = torch.where(q > 0.5, p_rest - q_rest, q - p)[:, None]
    slope = beta * (q_among - p_among) - alpha * shift * q_among
    return alpha * target + beta * others, slope.scatter(1, at, alpha * shift)
