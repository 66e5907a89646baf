"""Losses on logits: labels and a teacher's soft targets in one pass."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from fastxkd.ops.kd_loss import kd_loss_parts

DIVERGENCES = ("forward_kl",)


class KDLossParts(NamedTuple):
    """What ``kd_loss(..., return_parts=True)`` returns: ``loss = hard + soft``.

    ``hard`` and ``soft`` carry their weights (``ce_weight``, ``kd_weight * T^2``) and no graph;
    they are for logging. Only ``loss`` is differentiable.
    """

    loss: Tensor
    hard: Tensor
    soft: Tensor


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    divergence: str = "forward_kl",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    reduction: str = "batchmean",
    return_parts: bool = False,
) -> Tensor | KDLossParts:
    r"""Knowledge distillation loss, value and gradient in one pass over the logits.

    .. math::
        L = ce\_weight \cdot CE(s, y)
            + kd\_weight \cdot T^2 \cdot KL(softmax(t / T) \,\|\, softmax(s / T))

    averaged over the rows that count. The factor :math:`T^2` is part of the loss (Hinton et al.
    2015, section 2), so ``kd_weight`` keeps its meaning when the temperature changes.

    Args:
        student_logits: ``[..., classes]`` with at least two dimensions, float32, bfloat16, float16
            or float64. The last dimension should be contiguous; rows may be strided or expanded.
        teacher_logits: the same shape and dtype, without gradient.
        labels: int64 class indices ``[...]``; without them the hard part is 0.
        temperature: T, above 0.
        ce_weight: factor of the cross-entropy.
        kd_weight: factor of ``T^2 * KL``.
        divergence: ``"forward_kl"``, the one form so far.
        ignore_index: rows with this label count in neither part.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``; in [0, 1].
        class_weight: ``[classes]`` weights of the cross-entropy, whose mean is then weighted, as in
            ``cross_entropy(weight=...)``. The soft part is not weighted.
        reduction: ``"batchmean"``, ``"sum"`` or ``"none"`` (one value per row).
        return_parts: return :class:`KDLossParts` instead of the loss alone.

    Returns:
        A scalar, or ``[...]`` for ``reduction="none"``; float32 (float64 for float64 logits):
        sums are accumulated in float32 or better and never rounded to a 16-bit dtype. With every
        row ignored, loss and gradient are 0. Classes at ``-inf`` in both models are masked out.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, labels or factors that do not fit, a teacher
            that requires grad.
        RuntimeError: a second backward through the same loss. The gradient is computed in the
            forward pass and handed on; call ``kd_loss`` again instead.

    >>> import torch
    >>> student = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.0]], requires_grad=True)
    >>> teacher = torch.tensor([[3.0, 0.0, -2.0], [0.0, 1.0, 0.0]])
    >>> loss = kd_loss(student, teacher, torch.tensor([0, 1]), temperature=2.0)
    >>> loss.backward()
    >>> round(loss.item(), 4), [round(g, 4) for g in student.grad[0].tolist()]
    (0.1855, [-0.1317, 0.06, 0.0717])
    """
    if divergence not in DIVERGENCES:
        raise ValueError(
            f"divergence: expected one of {', '.join(DIVERGENCES)}, got {divergence!r}"
        )
    loss, parts = kd_loss_parts(
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        reduction=reduction,
    )
    return KDLossParts(loss, parts[0], parts[1]) if return_parts else loss


class KDLoss(nn.Module):
    """:func:`kd_loss` as a module: ``criterion(student_logits, teacher_logits, labels)``.

    Takes the keyword arguments of :func:`kd_loss`; ``class_weight`` becomes a buffer and follows
    ``.to(device)``.

    >>> import torch
    >>> criterion = KDLoss(temperature=2.0)
    >>> logits = torch.zeros(2, 3)
    >>> round(criterion(logits, logits, torch.tensor([0, 1])).item(), 4)
    0.1099
    """

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
        divergence: str = "forward_kl",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        reduction: str = "batchmean",
        return_parts: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight
        self.divergence = divergence
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weight", class_weight)
        self.reduction = reduction
        self.return_parts = return_parts

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None
    ) -> Tensor | KDLossParts:
        return kd_loss(
            student_logits,
            teacher_logits,
            labels,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            kd_weight=self.kd_weight,
            divergence=self.divergence,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            class_weight=self.class_weight,
            reduction=self.reduction,
            return_parts=self.return_parts,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, ce_weight={self.ce_weight},"
            f" kd_weight={self.kd_weight}, reduction={self.reduction!r}"
        )
