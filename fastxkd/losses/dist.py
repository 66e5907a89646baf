"""DIST: a student that ranks like its teacher, whatever the size of its probabilities."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastxkd.losses._criterion import Criterion
from fastxkd.ops._logits import check_kept, check_options
from fastxkd.ops.kd_loss import KDLossParts, loss_of_logits

__all__ = ["DISTLoss", "dist_loss"]


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
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
    row_weight: Tensor | None = None,
    teacher_form: str = "logits",
    teacher_indices: Tensor | Sequence[Tensor] | None = None,
    teacher_weights: Sequence[float] | None = None,
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
        teacher_logits: the same shape, without gradient, or a list of them; see
            :func:`fastxkd.kd_loss`.
        labels: int64 ``[...]``; without them the hard part is 0.
        temperature: T, from 1e-6 to 1e6.
        ce_weight, kd_weight: factors of the cross-entropy and of ``T^2`` times the correlations.
        inter_weight, intra_weight: w1 and w2.
        ignore_index: rows with this label count in no part, the columns' correlations included.
        label_smoothing, class_weight: of the cross-entropy, as in :func:`fastxkd.kd_loss`.
        row_weight: ``[...]``, at least 0: how often a row counts, in every mean and correlation.
        teacher_form, teacher_indices, teacher_weights: as in :func:`fastxkd.kd_loss`.
        return_parts: return :class:`KDLossParts` instead of the loss alone.

    Returns:
        A scalar, float32 (float64 for float64 logits). The columns tie a batch together: there is
        no other reduction. Rows or columns without spread correlate with nothing: 0.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`fastxkd.kd_loss`.

    >>> import torch
    >>> student = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.0]])
    >>> teacher = torch.tensor([[3.0, 0.0, -2.0], [0.0, 1.0, 0.0]])
    >>> round(dist_loss(student, teacher, torch.tensor([0, 1]), temperature=1.0).item(), 4)
    1.0649
    """
    return loss_of_logits(
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        divergence="dist",
        alpha=inter_weight,
        beta=intra_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        row_weight=row_weight,
        teacher_form=teacher_form,
        teacher_indices=teacher_indices,
        teacher_weights=teacher_weights,
        reduction="batchmean",
        return_parts=return_parts,
        offered=("dist",),
    )


class DISTLoss(Criterion):
    """:func:`dist_loss` as a module: ``criterion(student_logits, teacher_logits, labels)``.

    >>> import torch
    >>> logits = torch.eye(3)
    >>> round(DISTLoss()(logits, logits, torch.tensor([0, 1, 2])).item(), 4)
    0.5516
    """

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
        teacher_form: str = "logits",
        teacher_weights: Sequence[float] | None = None,
        return_parts: bool = False,
    ) -> None:
        check_options(
            temperature,
            ce_weight,
            kd_weight,
            "dist",
            inter_weight,
            intra_weight,
            ignore_index,
            label_smoothing,
            teacher_form,
            "batchmean",
            offered=("dist",),
        )
        check_kept(class_weight, teacher_weights)
        super().__init__(
            temperature=temperature,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            inter_weight=inter_weight,
            intra_weight=intra_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
            teacher_form=teacher_form,
            teacher_weights=teacher_weights,
            return_parts=return_parts,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | Sequence[Tensor],
        labels: Tensor | None = None,
        *,
        row_weight: Tensor | None = None,
        teacher_indices: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor | KDLossParts:
        return dist_loss(
            student_logits,
            teacher_logits,
            labels,
            row_weight=row_weight,
            teacher_indices=teacher_indices,
            **self.options(),
        )
