"""kd_loss in plain torch, with the gradient in closed form.

No autograd in here: compiled code runs operators below autograd, where it would find no graph.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    class_weight: Tensor | None,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = student.shape
    exact = torch.float64 if student.dtype == torch.float64 else torch.float32
    s, t = student.to(exact), teacher.to(exact)  # [rows, classes]
    counts = torch.ones(rows, dtype=torch.bool, device=s.device)
    if labels is not None:
        counts = labels != ignore_index
        labels = labels.where(counts, 0)
    count = counts.sum().to(exact)
    row_mean = 1 / count.clamp(min=1) if reduction == 2 else torch.ones_like(count)

    hard, soft = s.new_zeros(rows), s.new_zeros(rows)
    grad = torch.zeros_like(s) if need_grad else None
    weight_mean = row_mean
    if labels is not None and ce_weight != 0:
        weight = s.new_ones(classes) if class_weight is None else class_weight.to(exact)
        on_label = weight[labels]  # [rows]
        if reduction == 2:
            total = (on_label * counts).sum()
            weight_mean = torch.where(total > 0, 1 / total, 0)
        log_prob = torch.log_softmax(s, 1)
        picked = (1 - label_smoothing) * on_label
        hard = -picked * log_prob.gather(1, labels[:, None])[:, 0]
        spread = label_smoothing / classes * weight  # [classes]
        if label_smoothing > 0:
            hard = hard - torch.where(weight == 0, 0, spread * log_prob).sum(1)
        hard = ce_weight * hard
        if grad is not None:
            target = torch.zeros_like(s).scatter_(1, labels[:, None], picked[:, None]) + spread
            mass = (picked + spread.sum())[:, None]
            grad += ce_weight * weight_mean * (mass * log_prob.exp() - target)
    if kd_weight != 0:
        log_q = torch.log_softmax(s / temperature, 1)
        log_p = torch.log_softmax(t / temperature, 1)
        p = log_p.exp()
        soft = kd_weight * temperature**2 * torch.where(p == 0, 0, p * (log_p - log_q)).sum(1)
        if grad is not None:
            grad += kd_weight * temperature * row_mean * (log_q.exp() - p)

    hard, soft = torch.where(counts, hard, 0), torch.where(counts, soft, 0)
    if reduction != 0:
        hard, soft = hard.sum() * weight_mean, soft.sum() * row_mean
    if grad is None:
        return hard + soft, torch.stack([hard, soft]), student.new_empty(0)
    # An ignored row may hold anything, NaN included: select, do not multiply by zero.
    grad = torch.where(counts[:, None], grad, 0).to(student.dtype)
    return hard + soft, torch.stack([hard, soft]), grad.contiguous()
