"""Comparative distillation: what the logits of some samples differ by from those of others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastxkd.losses._criterion import Criterion
from fastxkd.losses._soft import soft_loss
from fastxkd.ops._checks import (
    check_classes,
    check_counts,
    check_generator,
    check_labels,
    check_pair,
    check_rows,
)
from fastxkd.ops._library import exact_dtype
from fastxkd.ops._logits import check_temperature

__all__ = ["CKDLoss", "ckd_loss"]


def _picks(
    n: int, count: int, size: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """``[count, size]`` indices below n, different within a row, each such row equally likely."""
    source = device if generator is None else generator.device
    drawn: list[Tensor] = []
    for k in range(size):
        pick = torch.randint(n - k, (count,), generator=generator, device=source)
        # A number below n - k names one of those left: step over the smaller ones already drawn.
        if drawn:
            for taken in torch.stack(drawn).sort(0).values:
                pick = pick + (pick >= taken).long()
        drawn.append(pick)
    return torch.stack(drawn, 1).to(device)


def _differences(values: Tensor, picks: Tensor, positives: int) -> Tensor:
    """Mean of the picked positives minus mean of the negatives, ``[relations, classes]``."""
    weights = [1 / positives] * positives
    weights += [-1 / (picks.shape[1] - positives)] * (picks.shape[1] - positives)
    total = values.new_zeros(())
    for pick, weight in zip(picks.unbind(1), weights, strict=True):
        total = total + weight * values.index_select(0, pick)
    return total


def ckd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    relations: int | None = None,
    positives: int = 2,
    negatives: int = 1,
    temperature: float = 4.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Comparative knowledge distillation: differences of logits between groups of samples.

    .. math::
        d(z) = \mathrm{mean}_{i \in P}\, z_i - \mathrm{mean}_{i \in N}\, z_i, \quad
        L = T^2\, KL\big(\sigma(d(z_t)/T) \,\|\, \sigma(d(z_s)/T)\big)

    averaged over relations (P, N) drawn at random from the batch. With labels the same between the
    difference of one-hot labels and :math:`d(z_s)` is added. The teacher answers once per sample
    for any number of relations, so its logits may come from a cache. Usual factor: 1.

    Args:
        student_logits: ``[n, classes]``, any float dtype.
        teacher_logits: the same shape, any float dtype, without gradient.
        labels: int64 class indices ``[n]``.
        relations: how many to draw; as many as rows by default.
        positives, negatives: samples in P and in N, all of a relation different: n must hold them.
        temperature: T, from 1e-6 to 1e6.
        generator: draws the relations; torch's default one otherwise.

    Returns:
        A scalar, float64 if one side is float64, else float32.

    Raises:
        ValueError, TypeError: shapes, dtypes, labels or options that do not fit, too few samples, a
            teacher that requires grad.
        RuntimeError: a second backward through the same loss, as with :func:`kd_loss`.

    Wilf et al. 2023, Comparative Knowledge Distillation.

    >>> import torch
    >>> student, teacher = torch.eye(4), 3 * torch.eye(4)
    >>> draw = torch.Generator().manual_seed(0)
    >>> round(ckd_loss(student, teacher, relations=1000, generator=draw).item(), 1)
    0.5
    """
    names = ("student_logits", "teacher_logits")
    _check_options(relations, positives, negatives, temperature, generator)
    check_pair(student_logits, teacher_logits, names)
    if student_logits.dim() != 2:
        raise ValueError(
            f"student_logits: expected [n, classes], got shape {list(student_logits.shape)}"
        )
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher_logits: expected the shape of student_logits {list(student_logits.shape)},"
            f" got {list(teacher_logits.shape)}"
        )
    n, classes = student_logits.shape
    count = n if relations is None else relations
    check_rows(names[0], student_logits, positives + negatives, "the groups of a relation")
    if labels is not None:
        check_labels(labels, names[0], student_logits)
        check_classes(labels, classes)
    exact = exact_dtype(student_logits, teacher_logits)
    picks = _picks(n, count, positives + negatives, generator, student_logits.device)
    student, teacher = (
        _differences(z.to(exact), picks, positives) for z in (student_logits, teacher_logits)
    )
    loss = soft_loss(student, teacher, temperature)
    if labels is not None:
        one_hot = F.one_hot(labels, classes).to(exact)
        loss = loss + soft_loss(student, _differences(one_hot, picks, positives), temperature)
    return loss


def _check_options(
    relations: int | None,
    positives: int,
    negatives: int,
    temperature: float,
    generator: torch.Generator | None,
) -> None:
    check_counts(relations=1 if relations is None else relations)
    check_counts(positives=positives, negatives=negatives)
    check_temperature(temperature)
    check_generator(generator)


class CKDLoss(Criterion):
    """:func:`ckd_loss` as a module: ``criterion(student_logits, teacher_logits, labels)``.

    >>> import torch
    >>> z = torch.randn(8, 4)
    >>> round(CKDLoss(relations=100)(z, z).item(), 5)
    0.0
    """

    def __init__(
        self,
        *,
        relations: int | None = None,
        positives: int = 2,
        negatives: int = 1,
        temperature: float = 4.0,
        generator: torch.Generator | None = None,
    ) -> None:
        _check_options(relations, positives, negatives, temperature, generator)
        super().__init__(
            relations=relations,
            positives=positives,
            negatives=negatives,
            temperature=temperature,
            generator=generator,
        )

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        return ckd_loss(student_logits, teacher_logits, labels, **self.options())
