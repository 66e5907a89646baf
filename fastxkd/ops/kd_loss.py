"""kd_loss: schema, checks, kernels and gradient of the distillation loss.

The forward pass computes the gradient with respect to the student's logits while the row is in
cache; the backward pass only scales it by what comes from above.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastxkd.ops._library import (
    DTYPES,
    chosen,
    cuda_kernels,
    define,
    differentiable_once,
    exact_dtype,
    kernel_of,
    kernels,
    serve,
    ticket,
    unobserved,
    using,
    wants_function,
    wants_gradient,
)
from fastxkd.ops._logits import (
    DIVERGENCES,
    FORMS,
    OFFERED,
    REDUCTIONS,
    check_options,
    check_tensors,
    lift_of_float16,
    shares_of_teachers,
    stacked,
)
from fastxkd.ops._transforms import one_by_one
from fastxkd.reference import kd_loss as reference

SCHEMA = (
    "kd_loss(Tensor student, Tensor teacher, Tensor? labels, Tensor? class_weight,"
    " Tensor? row_weight, Tensor? teacher_indices, float[] teacher_weights, int teacher_form,"
    " float temperature, float ce_weight, float kd_weight, int divergence, float alpha,"
    " float beta, int ignore_index, float label_smoothing, int reduction, bool need_grad)"
    " -> (Tensor loss, Tensor parts, Tensor grad)"
)
ARGUMENTS = 18
BAD_INDEX = -3  # what the C++ kernel returns for a teacher index outside the classes


def _fake(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    teacher_indices: Tensor | None,
    teacher_weights: list[float],
    teacher_form: int,
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
    exact = exact_dtype(student)
    shape = [student.shape[0]] if reduction == 0 else []
    loss = student.new_empty(shape, dtype=exact)
    parts = student.new_empty([2, *shape], dtype=exact)
    grad = student.new_empty(student.shape if need_grad else [0])
    return loss, parts, grad


@define(SCHEMA, _fake)
def _kd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    teacher_indices: Tensor | None,
    teacher_weights: list[float],
    teacher_form: int,
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
    *,
    room: Tensor | None = None,
    wants_parts: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """student [rows, classes]; teacher [rows, k] or [models, rows, k], see ``dense_teacher``.

    What the dispatcher never gives: ``room``, where the C++ kernel may put the gradient; it may be
    ``student`` itself, since that kernel has read a row before it writes the gradient's. And
    ``wants_parts``: without it the C++ kernel leaves them out, the loss stands in their place.
    """
    backend = serve("kd_loss", student)
    rows, classes = student.shape
    if backend != "cpu":
        if labels is not None and labels.device.type == "cpu":
            _check_labels(labels, classes, ignore_index)
        # The other kernels know one form of teacher: logits of every class.
        if teacher_indices is not None and teacher_indices.device.type == "cpu":
            outside = (teacher_indices < 0) | (teacher_indices >= classes)
            if bool(outside.any()):
                raise _index_error(teacher_indices, classes)
        if teacher_indices is not None or teacher_form or teacher.dim() == 3:
            teacher = reference.dense_teacher(
                teacher, teacher_indices, teacher_weights, teacher_form, temperature, classes
            )
            teacher_indices, teacher_form = None, 0
        if teacher.dtype != student.dtype:
            teacher = teacher.to(exact_dtype(student))
    if backend in ("reference", "triton"):
        return kernel_of(backend, "kd_loss")(  # type: ignore[no-any-return]
            student,
            teacher,
            labels,
            class_weight,
            row_weight,
            temperature,
            ce_weight,
            kd_weight,
            divergence,
            alpha,
            beta,
            ignore_index,
            label_smoothing,
            reduction,
            need_grad,
        )
    if student.stride(1) != 1 and classes > 1:
        student = student.contiguous()
    if teacher.stride(-1) != 1 and teacher.shape[-1] > 1:
        teacher = teacher.contiguous()
    labels = None if labels is None else labels.contiguous()
    indices = None if teacher_indices is None else teacher_indices.contiguous()
    # The kernels read weights in double precision, whatever they came in.
    if class_weight is not None:
        class_weight = class_weight.to(torch.float64).contiguous()
    if row_weight is not None:
        row_weight = row_weight.to(torch.float64).contiguous()
    several = teacher.dim() == 3
    exact, device = exact_dtype(student), student.device
    # Each allocation costs a microsecond: none that is not wanted, and no argument that is.
    loss = torch.empty((rows,) if reduction == 0 else (), dtype=exact, device=device)
    parts = loss
    if wants_parts or backend != "cpu":
        parts = torch.empty((2, *loss.shape), dtype=exact, device=device)
    if not need_grad:
        grad = torch.empty(0, dtype=student.dtype, device=device)
    elif room is not None and backend == "cpu":
        grad = room
    elif student.is_contiguous():
        grad = torch.empty_like(student)
    else:
        grad = torch.empty((rows, classes), dtype=student.dtype, device=device)
    # cpu: the ISA level and the threads; cuda: the device and the stream, and what it works in.
    module, *how = kernels() if backend == "cpu" else cuda_kernels(student)
    if backend == "cuda":
        size = module.kd_loss_workspace(rows, classes, divergence, DTYPES[student.dtype], how[0])
        workspace = torch.empty(size, dtype=torch.float64, device=device)
        turn = ticket(student)
        how += [turn.data_ptr(), workspace.data_ptr()]
    outside = module.kd_loss(
        *how,
        student.data_ptr(),
        teacher.data_ptr(),
        0 if labels is None else labels.data_ptr(),
        0 if class_weight is None else class_weight.data_ptr(),
        0 if row_weight is None else row_weight.data_ptr(),
        0 if indices is None else indices.data_ptr(),
        grad.data_ptr() if need_grad else 0,
        loss.data_ptr(),
        0 if parts is loss else parts.data_ptr(),
        rows,
        classes,
        student.stride(0),
        teacher.shape[-1],
        teacher.stride(-2),
        teacher.stride(0) if several else 0,
        teacher_weights if several else (),
        teacher_form,
        temperature,
        ce_weight,
        kd_weight,
        divergence,
        alpha,
        beta,
        label_smoothing,
        ignore_index,
        reduction,
        DTYPES[student.dtype],
        DTYPES[teacher.dtype],
    )
    if outside >= 0 and labels is not None:
        raise _label_error(int(outside), labels, classes, ignore_index)
    if outside == BAD_INDEX and indices is not None:
        raise _index_error(indices, classes)
    return loss, parts, grad


def _label_error(row: int, labels: Tensor, classes: int, ignore_index: int) -> ValueError:
    return ValueError(
        f"labels: expected 0 <= label < {classes} (the classes of student_logits) or ignore_index"
        f" {ignore_index}, got {int(labels[row])} at position {row}"
    )


def _index_error(indices: Tensor, classes: int) -> ValueError:
    wrong = indices[(indices < 0) | (indices >= classes)]
    return ValueError(
        f"teacher_indices: expected 0 <= index < {classes} (the classes of student_logits), got"
        f" {int(wrong[0])}"
    )


def _check_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    outside = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if bool(outside.any()):
        raise _label_error(int(outside.nonzero()[0, 0]), labels, classes, ignore_index)


@define("kd_loss_scale_(Tensor(a!) grad, Tensor upstream) -> ()", lambda grad, upstream: None)
def _kd_loss_scale_(grad: Tensor, upstream: Tensor) -> None:
    per_row = upstream.dim() == 1
    backend = serve("kd_loss", grad)
    if backend == "reference":
        grad.mul_(upstream[:, None] if per_row else upstream)
        return
    exact = exact_dtype(grad)
    if upstream.dtype != exact or not upstream.is_contiguous():
        upstream = upstream.to(exact).contiguous()
    if backend == "triton":
        kernel_of(backend, "kd_loss", "kd_loss_scale_")(grad, upstream)
        return
    module, *how = kernels() if backend == "cpu" else cuda_kernels(grad)
    rows, classes = grad.shape
    module.kd_loss_scale(
        *how,
        grad.data_ptr(),
        upstream.data_ptr(),
        rows,
        classes,
        per_row,
        DTYPES[grad.dtype],
    )


class _KDLossEager(torch.autograd.Function):
    """For plain eager calls, where a small batch's time is call overhead: one input, one output,
    everything else in one tuple, and no ``setup_context``, whose use makes torch inspect the
    signature on every call."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student: Tensor, rest: tuple[Any, ...], parts: list[Tensor] | None
    ) -> Tensor:
        loss, found, grad = _kd_loss(student, *rest, wants_parts=parts is not None)
        if parts is not None:
            parts.append(found)
        # Kept outside save_for_backward, so that backward can hand the very buffer on instead of a
        # scaled copy: one matrix of logits at the peak, not two.
        ctx.kept = (grad, chosen())
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if torch.is_grad_enabled():
            return _backward_once(ctx, upstream)  # type: ignore[no-any-return]
        return _backward(ctx, upstream)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
    if ctx.kept is None:
        raise RuntimeError(
            "kd_loss: backward was called a second time; the gradient is handed on, not kept. "
            "Call kd_loss again for another backward pass"
        )
    (grad, choice), ctx.kept = ctx.kept, None
    if not unobserved(grad) or type(upstream) is not Tensor:
        torch.ops.fastxkd.kd_loss_scale_.default(grad, upstream)
        return grad, None, None
    # A plain loss.backward() comes with a one. On a GPU only the kernel may look.
    if upstream.dim() or upstream.device.type != "cpu" or upstream.item() != 1:
        # A GPU's backward runs on a thread of its own, which has not seen use_backend.
        with using(choice):
            _kd_loss_scale_(grad, upstream)
    return grad, None, None


# With create_graph=True: a second derivative through the result is an error, not a zero.
_backward_once = differentiable_once(_backward)


class _KDLoss(torch.autograd.Function):
    """The same in the form that the compiler and ``torch.func`` need."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.fastxkd.kd_loss.default(*arguments)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, parts, grad = output
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return one_by_one(_KDLoss, info, in_dims, *arguments)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * ARGUMENTS
        (grad,) = ctx.saved_tensors
        factor = upstream.unsqueeze(-1) if upstream.dim() else upstream
        return (grad * factor).to(grad.dtype), *(None,) * (ARGUMENTS - 1)


class KDLossParts(NamedTuple):
    """What ``kd_loss(..., return_parts=True)`` returns: ``loss = hard + soft``.

    ``hard`` and ``soft`` carry their weights (``ce_weight``, ``kd_weight * T^2``) and no graph;
    they are for logging. Only ``loss`` is differentiable.
    """

    loss: Tensor
    hard: Tensor
    soft: Tensor


def loss_of_logits(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    labels: Tensor | None,
    *,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    divergence: str,
    alpha: float,
    beta: float,
    ignore_index: int,
    label_smoothing: float,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    teacher_form: str,
    teacher_indices: Tensor | Sequence[Tensor] | None,
    teacher_weights: Sequence[float] | None,
    reduction: str,
    return_parts: bool,
    offered: Sequence[str] = OFFERED,
) -> Tensor | KDLossParts:
    """The one way from the public functions to the operator; ``fastxkd.kd_loss`` has the words."""
    student: Tensor = student_logits
    teacher: Any = teacher_logits
    indices: Any = teacher_indices
    weights: tuple[float, ...] = ()
    if isinstance(teacher, (list, tuple)):
        weights = shares_of_teachers(teacher_weights, len(teacher))
        teacher = stacked("teacher_logits", teacher)
        indices = None if indices is None else stacked("teacher_indices", indices)
    elif teacher_weights is not None:
        raise ValueError(
            "teacher_weights: expected None with one teacher, got"
            f" {teacher_weights!r}; several teachers are a list of tensors"
        )
    check_tensors(student, teacher, labels, class_weight, row_weight, indices, bool(weights))
    check_options(
        temperature,
        ce_weight,
        kd_weight,
        divergence,
        alpha,
        beta,
        ignore_index,
        label_smoothing,
        teacher_form,
        reduction,
        offered,
    )
    if reduction == "batchmean" and student.numel() == 0:
        raise ValueError(
            f"student_logits: expected at least one row to take a mean of, got"
            f" {list(student.shape)}"
        )
    if divergence == "reverse_kl" and indices is not None:
        raise ValueError(
            "divergence: expected one that allows a teacher without the other classes, got"
            " 'reverse_kl': with teacher_indices it is infinite; use forward_kl, jsd or tvd"
        )
    shape = student.shape[:-1]
    if student.dim() != 2:
        student = student.reshape(-1, student.shape[-1])
        lead = (len(weights), -1) if weights else (-1,)
        teacher = teacher.reshape(*lead, teacher.shape[-1])
        indices = None if indices is None else indices.reshape(*lead, teacher.shape[-1])
        labels = None if labels is None else labels.reshape(-1)
        row_weight = None if row_weight is None else row_weight.reshape(-1)
    need_grad = wants_gradient(student)
    # The ends of the generalised JSD are the two KLs; the formula itself is 0 there.
    if divergence == "jsd" and beta in (0, 1):
        divergence = "reverse_kl" if beta else "forward_kl"
    lift = 1.0
    if need_grad and student.dtype == torch.float16 and reduction == "batchmean":
        lift = lift_of_float16(divergence, temperature, ce_weight, kd_weight, alpha, beta)
    rest: tuple[Any, ...] = (
        teacher,
        labels,
        class_weight,
        row_weight,
        indices,
        weights,
        FORMS[teacher_form],
        float(temperature),
        float(ce_weight) * lift,
        float(kd_weight) * lift,
        DIVERGENCES[divergence],
        float(alpha),
        float(beta),
        ignore_index,
        float(label_smoothing),
        REDUCTIONS[reduction],
        need_grad,
    )
    if not unobserved(student) or type(teacher) is not Tensor:
        operator = _KDLoss.apply if wants_function(student) else torch.ops.fastxkd.kd_loss.default
        loss, parts, _ = operator(student, *rest)
    elif need_grad:
        kept: list[Tensor] | None = [] if return_parts else None
        loss = _KDLossEager.apply(student, rest, kept)
        parts = kept[0] if kept else loss
    else:
        loss, parts, _ = _kd_loss(student, *rest, wants_parts=return_parts)
    if lift != 1:
        # What comes back from above is divided too, before it meets the gradient.
        loss = loss / lift
        parts = parts / lift if return_parts else loss
    if reduction == "none" and len(shape) != 1:
        loss = loss.reshape(shape)
        parts = parts.reshape(2, *shape) if return_parts else loss
    return KDLossParts(loss, parts[0], parts[1]) if return_parts else loss
