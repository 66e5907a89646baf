"""DIST: a student that ranks like its teacher, whatever the size of its probabilities."""

from __future__ import annotations

from torch import Tensor, nn

from fastxkd.losses.logits import KDLossParts
from fastxkd.ops.dist_loss import dist_parts
from fastxkd.ops.kd_loss import check_logits

__all__ = ["DISTLoss", "dist_loss"]


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    ce_weight: float = 1.0,
    kd_weight: float = 2.0,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    return_parts: bool = False,
) -> Tensor | KDLossParts:
    r"""Correlation with the teacher along classes and along samples (Huang et al., NeurIPS 2022).

    .. math::
        L = ce\_weight \cdot CE + kd\_weight \cdot T^2 \big(
            w_1 (1 - \mathrm{mean}_i\, \rho(q_{i:}, p_{i:}))
            + w_2 (1 - \mathrm{mean}_j\, \rho(q_{:j}, p_{:j}))\big)

    with q and p the softened probabilities and rho Pearson's correlation, to whose norms 1e-8 is
    added as in the published code: *inter* along each sample's classes, *intra* along each class's
    samples. The published recipe has ``kd_weight=2`` and T = 1 on ImageNet, 4 on CIFAR.

    Args:
        student_logits: ``[..., classes]`` with at least two dimensions; any float dtype.
        teacher_logits: the same shape and dtype, without gradient.
        labels: int64 ``[...]``; without them the hard part is 0.
        temperature: T, above 0.
        ce_weight, kd_weight: factors of the cross-entropy and of ``T^2`` times the correlations.
        inter_weight, intra_weight: w1 and w2; a part of weight 0 is not computed.
        ignore_index: rows with this label count in no part, the columns' correlations included.
        label_smoothing, class_weight: of the cross-entropy, as in :func:`fastxkd.kd_loss`.
        return_parts: return :class:`KDLossParts` instead of the loss alone.

    Returns:
        A scalar, float32 (float64 for float64 logits). The mean ties a batch together: there is no
        other reduction. Rows or columns without spread correlate with nothing: 0.

    Raises:
        ValueError, TypeError: as :func:`fastxkd.kd_loss`, and for a negative weight.

    >>> import torch
    >>> student = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.0]])
    >>> teacher = torch.tensor([[3.0, 0.0, -2.0], [0.0, 1.0, 0.0]])
    >>> round(dist_loss(student, teacher, torch.tensor([0, 1]), temperature=1.0).item(), 4)
    1.0649
    """
    for name, value in (("inter_weight", inter_weight), ("intra_weight", intra_weight)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    check_logits(
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
    )
    classes = student_logits.shape[-1]
    scale = kd_weight * temperature**2
    loss, parts = dist_parts(
        student_logits.reshape(-1, classes),
        teacher_logits.reshape(-1, classes),
        None if labels is None else labels.reshape(-1),
        class_weight,
        float(temperature),
        float(ce_weight),
        float(scale * inter_weight),
        float(scale * intra_weight),
        ignore_index,
        float(label_smoothing),
    )
    return KDLossParts(loss, parts[0], parts[1]) if return_parts else loss


class DISTLoss(nn.Module):
    """:func:`dist_loss` as a module: ``criterion(student_logits, teacher_logits, labels)``.

    >>> import torch
    >>> logits = torch.eye(3)
    >>> round(DISTLoss()(logits, logits, torch.tensor([0, 1, 2])).item(), 4)
    0.5516
    """

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        ce_weight: float = 1.0,
        kd_weight: float = 2.0,
        inter_weight: float = 1.0,
        intra_weight: float = 1.0,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        return_parts: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight
        self.inter_weight = inter_weight
        self.intra_weight = intra_weight
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weight", class_weight)
        self.return_parts = return_parts

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None
    ) -> Tensor | KDLossParts:
        return dist_loss(
            student_logits,
            teacher_logits,
            labels,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            kd_weight=self.kd_weight,
            inter_weight=self.inter_weight,
            intra_weight=self.intra_weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            class_weight=self.class_weight,
            return_parts=self.return_parts,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, ce_weight={self.ce_weight},"
            f" kd_weight={self.kd_weight}, inter_weight={self.inter_weight},"
            f" intra_weight={self.intra_weight}"
        )
