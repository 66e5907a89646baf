"""The loss on logits that are never there: from hidden states and the weights of the heads."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxkd.losses._criterion import Criterion
from fastxkd.losses.logits import KDLossParts
from fastxkd.ops._logits import check_kept, check_options
from fastxkd.ops.linear_kd_loss import check_chunks, linear_kd_loss_parts

__all__ = ["LinearKDLoss", "linear_kd_loss"]


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "batchmean",
    return_parts: bool = False,
    chunk_rows: int | None = None,
    accumulate_dtype: torch.dtype | None = None,
) -> Tensor | KDLossParts:
    r""":func:`fastxkd.kd_loss` of two linear heads, without either's matrix of logits.

    .. math::
        L = kd\_loss(h_s W_s^T + b_s, \; h_t W_t^T + b_t, \; y)

    computed for ``chunk_rows`` rows at a time, gradients included: while a chunk's logits exist,
    their gradient is taken back through the student's head. With a vocabulary for classes the
    logits would be the largest thing in memory, several times over. The price is that of the
    products: two going forward, two going back.

    Args:
        student_hidden: ``[..., width]`` with at least two dimensions: what the head gets.
        student_weight: ``[classes, width]``, as in ``torch.nn.Linear``.
        teacher_hidden: ``[..., width_t]``; the teacher's width may be another.
        teacher_weight: ``[classes, width_t]``.
        labels: int64 class indices ``[...]``; without them the hard part is 0.
        student_bias, teacher_bias: ``[classes]``.
        temperature, ce_weight, kd_weight, divergence, beta, ignore_index, label_smoothing,
        class_weight, row_weight, return_parts: as in :func:`fastxkd.kd_loss`.
        reduction: ``"batchmean"``, ``"sum"`` or ``"none"`` (one value per row). Of a mean or sum
            the gradients are made in the forward pass. With ``"none"`` they depend on what comes
            from above for each row: backward goes through the chunks again, at the price of two
            more products.
        chunk_rows: rows whose logits exist at a time. Their number changes speed and memory, and
            the result by no more than rounding. Without: 1024, on a GPU 2048.
        accumulate_dtype: in which the gradient of a 16-bit ``student_weight`` is summed over the
            chunks. Without: float32, rounded once at the end. The dtype itself saves the memory of
            a float32 gradient and rounds at every chunk.

    All but the labels have one dtype, float32, bfloat16, float16 or float64, which is that of the
    logits too; under autocast its own. Gradients go to ``student_hidden``, ``student_weight`` and
    ``student_bias``, as far as they require it; what does not costs no product.

    Returns:
        A scalar, or ``[...]`` for ``reduction="none"``; float32 (float64 for float64 inputs). With
        every row ignored, loss and gradients are 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, labels or factors that do not fit; a hidden
            state, weight or bias of the teacher, or a weight of classes or rows, that requires
            grad.
        RuntimeError: a second backward through the same mean or sum. The gradients are computed in
            the forward pass and handed on; call ``linear_kd_loss`` again instead.

    >>> import torch, fastxkd
    >>> student, teacher = torch.nn.Linear(4, 1000), torch.nn.Linear(6, 1000).requires_grad_(False)
    >>> hidden, guidance = torch.randn(32, 4), torch.randn(32, 6)
    >>> labels = torch.randint(1000, (32,))
    >>> loss = linear_kd_loss(
    ...     hidden,
    ...     student.weight,
    ...     guidance,
    ...     teacher.weight,
    ...     labels,
    ...     student_bias=student.bias,
    ...     teacher_bias=teacher.bias,
    ...     chunk_rows=8,
    ... )
    >>> loss.backward()
    >>> student.weight.grad.shape
    torch.Size([1000, 4])
    >>> same = fastxkd.kd_loss(student(hidden), teacher(guidance), labels)
    >>> bool(torch.isclose(loss, same))
    True
    """
    loss, parts = linear_kd_loss_parts(
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        labels,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        divergence=divergence,
        beta=beta,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        row_weight=row_weight,
        reduction=reduction,
        chunk_rows=chunk_rows,
        accumulate_dtype=accumulate_dtype,
    )
    return KDLossParts(loss, parts[0], parts[1]) if return_parts else loss


class LinearKDLoss(Criterion):
    """:func:`linear_kd_loss` as a module: ``criterion(student_hidden, student.head.weight,
    teacher_hidden, teacher.head.weight, labels)``.

    Takes the keyword arguments of :func:`linear_kd_loss`; ``class_weight`` becomes a buffer and
    follows ``.to(device)``. What belongs to a batch or a model, ``row_weight`` and the biases, goes
    into the call. The heads stay with their models: this module has no parameters.

    >>> import torch
    >>> criterion = LinearKDLoss(temperature=2.0)
    >>> hidden, weight = torch.zeros(2, 5), torch.zeros(3, 5)
    >>> round(criterion(hidden, weight, hidden, weight, torch.tensor([0, 1])).item(), 4)
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
        reduction: str = "batchmean",
        return_parts: bool = False,
        chunk_rows: int | None = None,
        accumulate_dtype: torch.dtype | None = None,
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
            "logits",
            reduction,
        )
        check_kept(class_weight)
        check_chunks(chunk_rows, accumulate_dtype)
        super().__init__(
            temperature=temperature,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            divergence=divergence,
            beta=beta,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
            reduction=reduction,
            return_parts=return_parts,
            chunk_rows=chunk_rows,
            accumulate_dtype=accumulate_dtype,
        )

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor | KDLossParts:
        return linear_kd_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            row_weight=row_weight,
            **self.options(),
        )
