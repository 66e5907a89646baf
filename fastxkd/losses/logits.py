"""Losses on logits: labels and a teacher's soft targets in one pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastxkd.losses._criterion import Criterion
from fastxkd.ops._logits import check_kept, check_options
from fastxkd.ops.kd_loss import KDLossParts, loss_of_logits

__all__ = ["DKDLoss", "KDLoss", "KDLossParts", "dkd_loss", "kd_loss"]


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    teacher_form: str = "logits",
    teacher_indices: Tensor | Sequence[Tensor] | None = None,
    teacher_weights: Sequence[float] | None = None,
    reduction: str = "batchmean",
    return_parts: bool = False,
) -> Tensor | KDLossParts:
    r"""Knowledge distillation loss, value and gradient in one pass over the logits.

    .. math::
        L = ce\_weight \cdot CE(s, y) + kd\_weight \cdot T^2 \cdot D(p, q), \quad
        p = softmax(t / T), \; q = softmax(s / T)

    averaged over the rows that count. The factor :math:`T^2` is part of the loss (Hinton et al.
    2015, section 2), so ``kd_weight`` keeps its meaning when the temperature changes. It is there
    for every divergence:

    ================  ==========================================================================
    ``"forward_kl"``  :math:`KL(p \| q)`, Hinton's; the student covers what the teacher does
    ``"reverse_kl"``  :math:`KL(q \| p)`; the student keeps to the teacher's modes (Gu et al. 2024)
    ``"jsd"``         :math:`\beta KL(p \| m) + (1 - \beta) KL(q \| m)` with
                      :math:`m = \beta p + (1 - \beta) q` (Agarwal et al. 2024); beta 0 and 1 are
                      read as forward and reverse KL
    ``"tvd"``         :math:`\tfrac12 \sum |p - q|`
    ================  ==========================================================================

    Args:
        student_logits: ``[..., classes]`` with at least two dimensions, float32, bfloat16, float16
            or float64. The last dimension should be contiguous; rows may be strided or expanded.
        teacher_logits: the same shape, without gradient; or a list of them, one for each teacher,
            whose softened probabilities are averaged. The dtype may differ, up to float32 (float64
            beside float64 logits): no copy is rounded.
        labels: int64 class indices ``[...]``; without them the hard part is 0.
        temperature: T, from 1e-6 to 1e6.
        ce_weight: factor of the cross-entropy.
        kd_weight: factor of ``T^2 * D``.
        divergence: D, see above.
        beta: the teacher's share in the mixture of ``"jsd"``, in [0, 1].
        ignore_index: rows with this label count in neither part.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``; in [0, 1].
        class_weight: ``[classes]`` weights of the cross-entropy, whose mean is then weighted, as in
            ``cross_entropy(weight=...)``. The soft part is not weighted.
        row_weight: ``[...]`` floating-point weights of the rows in both parts, at least 0 (not
            checked); ``"batchmean"`` divides by their sum, so that weights of 0 and 1 are a mask. A
            row of weight 0 must still be finite; ``ignore_index`` leaves out rows that are not.
        teacher_form: what ``teacher_logits`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``,
            the latter two as they are at T = 1; they are softened like logits.
        teacher_indices: int64 classes ``[..., k]``, distinct in a row (not checked), when
            ``teacher_logits`` is ``[..., k]`` and holds the values of these classes alone, as
            stored by offline teachers. The other classes have teacher probability 0; the k are
            softmaxed among themselves.
        teacher_weights: one for each of several teachers, scaled to sum to 1; equal without.
        reduction: ``"batchmean"``, ``"sum"`` or ``"none"`` (one value per row).
        return_parts: return :class:`KDLossParts` instead of the loss alone.

    Returns:
        A scalar, or ``[...]`` for ``reduction="none"``; float32 (float64 for float64 logits):
        sums are accumulated in float32 or better and never rounded to a 16-bit dtype. With every
        row ignored, loss and gradient are 0. Classes at ``-inf`` in both models are masked out.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, labels or factors that do not fit, a teacher
            that requires grad. On a GPU labels are not looked at from the host: a label outside the
            classes makes its row's loss and gradient NaN.
        RuntimeError: a second backward through the same loss. The gradient is computed in the
            forward pass and handed on; call ``kd_loss`` again instead.

    >>> import torch
    >>> student = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.0]], requires_grad=True)
    >>> teacher = torch.tensor([[3.0, 0.0, -2.0], [0.0, 1.0, 0.0]])
    >>> loss = kd_loss(student, teacher, torch.tensor([0, 1]), temperature=2.0)
    >>> loss.backward()
    >>> round(loss.item(), 4), [round(g, 4) for g in student.grad[0].tolist()]
    (0.1855, [-0.1317, 0.06, 0.0717])

    The two best classes of each row, as an offline teacher stores them:

    >>> values, indices = teacher.log_softmax(1).topk(2)
    >>> round(kd_loss(student, values, teacher_indices=indices, temperature=1.0).item(), 4)
    0.2023
    """
    return loss_of_logits(
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        divergence=divergence,
        alpha=0.0,
        beta=beta,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        row_weight=row_weight,
        teacher_form=teacher_form,
        teacher_indices=teacher_indices,
        teacher_weights=teacher_weights,
        reduction=reduction,
        return_parts=return_parts,
    )


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    temperature: float = 4.0,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    target_weight: float = 1.0,
    others_weight: float = 8.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    teacher_form: str = "logits",
    teacher_indices: Tensor | Sequence[Tensor] | None = None,
    teacher_weights: Sequence[float] | None = None,
    reduction: str = "batchmean",
    return_parts: bool = False,
) -> Tensor | KDLossParts:
    r"""Decoupled knowledge distillation (Zhao et al., CVPR 2022), in the same one pass.

    .. math::
        L = ce\_weight \cdot CE + kd\_weight \cdot T^2 (
            \alpha \, KL(b_t \| b_s) + \beta \, KL(\hat p_t \| \hat p_s))

    with :math:`b` the probabilities of the label's class and of all others together,
    :math:`\hat p` the distribution among the others. ``target_weight`` is alpha, ``others_weight``
    beta. With alpha = 1 and beta the teacher's probability of the others it would be the KL of
    :func:`kd_loss`. The published recipe multiplies the soft part by ``min(epoch / 20, 1)``: set
    ``kd_weight``.

    Arguments, results and errors are those of :func:`kd_loss`; ``labels`` are needed.

    >>> import torch
    >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[3.0, 0.0, -2.0]])
    >>> round(dkd_loss(student, teacher, torch.tensor([0])).item(), 4)
    1.3726
    """
    if labels is None:
        raise ValueError("labels: dkd_loss needs them to tell the target from the others, got None")
    return loss_of_logits(
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        divergence="dkd",
        alpha=target_weight,
        beta=others_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        row_weight=row_weight,
        teacher_form=teacher_form,
        teacher_indices=teacher_indices,
        teacher_weights=teacher_weights,
        reduction=reduction,
        return_parts=return_parts,
        offered=("dkd",),
    )


class KDLoss(Criterion):
    """:func:`kd_loss` as a module: ``criterion(student_logits, teacher_logits, labels)``.

    Takes the keyword arguments of :func:`kd_loss`; ``class_weight`` becomes a buffer and follows
    ``.to(device)``. What belongs to a batch, ``row_weight`` and ``teacher_indices``, goes into the
    call.

    >>> import torch
    >>> criterion = KDLoss(temperature=2.0)
    >>> logits = torch.zeros(2, 3)
    >>> round(criterion(logits, logits, torch.tensor([0, 1])).item(), 4)
    0.1099
    """

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        teacher_form: str = "logits",
        teacher_weights: Sequence[float] | None = None,
        reduction: str = "batchmean",
        return_parts: bool = False,
    ) -> None:
        check_options(
            temperature,
            ce_weight,
            kd_weight,
            divergence,
            0.0,
            beta,
            ignore_index,
            label_smoothing,
            teacher_form,
            reduction,
        )
        check_kept(class_weight, teacher_weights)
        super().__init__(
            temperature=temperature,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            divergence=divergence,
            beta=beta,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
            teacher_form=teacher_form,
            teacher_weights=teacher_weights,
            reduction=reduction,
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
        return kd_loss(
            student_logits,
            teacher_logits,
            labels,
            row_weight=row_weight,
            teacher_indices=teacher_indices,
            **self.options(),
        )


class DKDLoss(Criterion):
    """:func:`dkd_loss` as a module: ``criterion(student_logits, teacher_logits, labels)``.

    >>> import torch
    >>> logits = torch.zeros(2, 3)
    >>> round(DKDLoss()(logits, logits, torch.tensor([0, 1])).item(), 4)
    1.0986
    """

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        target_weight: float = 1.0,
        others_weight: float = 8.0,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        teacher_form: str = "logits",
        teacher_weights: Sequence[float] | None = None,
        reduction: str = "batchmean",
        return_parts: bool = False,
    ) -> None:
        check_options(
            temperature,
            ce_weight,
            kd_weight,
            "dkd",
            target_weight,
            others_weight,
            ignore_index,
            label_smoothing,
            teacher_form,
            reduction,
            offered=("dkd",),
        )
        check_kept(class_weight, teacher_weights)
        super().__init__(
            temperature=temperature,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            target_weight=target_weight,
            others_weight=others_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
            teacher_form=teacher_form,
            teacher_weights=teacher_weights,
            reduction=reduction,
            return_parts=return_parts,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | Sequence[Tensor],
        labels: Tensor,
        *,
        row_weight: Tensor | None = None,
        teacher_indices: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor | KDLossParts:
        return dkd_loss(
            student_logits,
            teacher_logits,
            labels,
            row_weight=row_weight,
            teacher_indices=teacher_indices,
            **self.options(),
        )
