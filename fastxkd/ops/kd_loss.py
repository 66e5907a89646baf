"""kd_loss: schema, checks, kernels and gradient of the distillation loss.

The forward pass computes the gradient with respect to the student's logits while the row is in
cache; the backward pass only scales it by what comes from above.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxkd.ops._library import DTYPES, define, kernels, serve, unobserved
from fastxkd.reference import kd_loss as reference

REDUCTIONS = {"none": 0, "sum": 1, "batchmean": 2}


def _fake(
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
    exact = torch.float64 if student.dtype == torch.float64 else torch.float32
    shape = [student.shape[0]] if reduction == 0 else []
    loss = student.new_empty(shape, dtype=exact)
    parts = student.new_empty([2, *shape], dtype=exact)
    grad = student.new_empty(student.shape if need_grad else [0])
    return loss, parts, grad


@define(
    "kd_loss(Tensor student, Tensor teacher, Tensor? labels, Tensor? class_weight,"
    " float temperature, float ce_weight, float kd_weight, int ignore_index,"
    " float label_smoothing, int reduction, bool need_grad)"
    " -> (Tensor loss, Tensor parts, Tensor grad)",
    _fake,
)
def _kd_loss(
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
    if serve("kd_loss", student) == "reference":
        if labels is not None and labels.device.type == "cpu":
            _check_labels(labels, student.shape[1], ignore_index)
        return reference.kd_loss(
            student,
            teacher,
            labels,
            class_weight,
            temperature,
            ce_weight,
            kd_weight,
            ignore_index,
            label_smoothing,
            reduction,
            need_grad,
        )
    rows, classes = student.shape
    if student.stride(1) != 1 and classes > 1:
        student = student.contiguous()
    if teacher.stride(1) != 1 and classes > 1:
        teacher = teacher.contiguous()
    labels = None if labels is None else labels.contiguous()
    if class_weight is not None:
        class_weight = class_weight.to(torch.float64).contiguous()
    exact = torch.float64 if student.dtype == torch.float64 else torch.float32
    shape = (rows,) if reduction == 0 else ()
    loss = torch.empty(shape, dtype=exact)
    parts = torch.empty((2, *shape), dtype=exact)
    grad = torch.empty((rows, classes) if need_grad else (0,), dtype=student.dtype)
    module, level, threads = kernels()
    outside = module.kd_loss(
        level,
        threads,
        student.data_ptr(),
        teacher.data_ptr(),
        0 if labels is None else labels.data_ptr(),
        0 if class_weight is None else class_weight.data_ptr(),
        grad.data_ptr() if need_grad else 0,
        loss.data_ptr(),
        parts.data_ptr(),
        rows,
        classes,
        student.stride(0),
        teacher.stride(0),
        temperature,
        ce_weight,
        kd_weight,
        label_smoothing,
        ignore_index,
        reduction,
        DTYPES[student.dtype],
    )
    if outside >= 0 and labels is not None:
        raise _label_error(int(outside), labels, classes, ignore_index)
    return loss, parts, grad


def _label_error(row: int, labels: Tensor, classes: int, ignore_index: int) -> ValueError:
    return ValueError(
        f"labels: expected 0 <= label < {classes} (the classes of student_logits) or ignore_index"
        f" {ignore_index}, got {int(labels[row])} at position {row}"
    )


def _check_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    outside = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if bool(outside.any()):
        raise _label_error(int(outside.nonzero()[0, 0]), labels, classes, ignore_index)


@define("kd_loss_scale_(Tensor(a!) grad, Tensor upstream) -> ()", lambda grad, upstream: None)
def _kd_loss_scale_(grad: Tensor, upstream: Tensor) -> None:
    per_row = upstream.dim() == 1
    if serve("kd_loss", grad) == "reference":
        grad.mul_(upstream[:, None] if per_row else upstream)
        return
    module, level, threads = kernels()
    exact = torch.float64 if grad.dtype == torch.float64 else torch.float32
    upstream = upstream.to(exact).contiguous()
    rows, classes = grad.shape
    module.kd_loss_scale(
        level,
        threads,
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
        ctx: Any, student: Tensor, rest: tuple[Any, ...], parts: list[Tensor]
    ) -> Tensor:
        loss, found, grad = _kd_loss(student, *rest)
        parts.append(found)
        # Kept outside save_for_backward, so that backward can hand the very buffer on instead of a
        # scaled copy: one matrix of logits at the peak, not two.
        ctx.grad = grad
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if torch.is_grad_enabled():
            return _backward_once(ctx, upstream)  # type: ignore[no-any-return]
        return _backward(ctx, upstream)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
    grad, ctx.grad = ctx.grad, None
    if grad is None:
        raise RuntimeError(
            "kd_loss: backward was called a second time; the gradient is handed on, not kept. "
            "Call kd_loss again for another backward pass"
        )
    direct = unobserved(grad) and type(upstream) is Tensor
    (_kd_loss_scale_ if direct else torch.ops.fastxkd.kd_loss_scale_.default)(grad, upstream)
    return grad, None, None


# With create_graph=True: a second derivative through the result is an error, not a zero.
_backward_once = torch.autograd.function.once_differentiable(_backward)


class _KDLoss(torch.autograd.Function):
    """The same in the form that the compiler and ``torch.func`` need."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.fastxkd.kd_loss.default(*arguments)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, parts, grad = output
        ctx.mark_non_differentiable(parts, grad)
        ctx.set_materialize_grads(False)
        ctx.grad = grad

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 11
        factor = upstream.unsqueeze(-1) if upstream.dim() else upstream
        return (ctx.grad * factor).to(ctx.grad.dtype), *(None,) * 10


def kd_loss_parts(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    *,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    ignore_index: int,
    label_smoothing: float,
    class_weight: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """(loss, parts) of the checked arguments; see ``fastxkd.kd_loss`` for their meaning."""
    _check(
        student_logits,
        teacher_logits,
        labels,
        temperature,
        ce_weight,
        kd_weight,
        label_smoothing,
        class_weight,
        reduction,
    )
    shape = student_logits.shape[:-1]
    student = student_logits
    if student_logits.dim() != 2:
        student = student_logits.reshape(-1, student_logits.shape[-1])
        teacher_logits = teacher_logits.reshape(-1, student_logits.shape[-1])
        labels = None if labels is None else labels.reshape(-1)
    need_grad = student.requires_grad and torch.is_grad_enabled()
    rest = (
        teacher_logits,
        labels,
        class_weight,
        float(temperature),
        float(ce_weight),
        float(kd_weight),
        ignore_index,
        float(label_smoothing),
        REDUCTIONS[reduction],
        need_grad,
    )
    if not unobserved(student) or type(teacher_logits) is not Tensor:
        operator = _KDLoss.apply if need_grad else torch.ops.fastxkd.kd_loss.default
        loss, parts, _ = operator(student, *rest)
    elif need_grad:
        kept: list[Tensor] = []
        loss = _KDLossEager.apply(student, rest, kept)
        parts = kept[0]
    else:
        loss, parts, _ = _kd_loss(student, *rest)
    if reduction == "none" and len(shape) != 1:
        loss, parts = loss.reshape(shape), parts.reshape(2, *shape)
    return loss, parts


def _check(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    label_smoothing: float,
    class_weight: Tensor | None,
    reduction: str,
) -> None:
    if not isinstance(student, Tensor) or not isinstance(teacher, Tensor):
        culprit = "student_logits" if not isinstance(student, Tensor) else "teacher_logits"
        got = type(student if culprit == "student_logits" else teacher).__name__
        raise TypeError(f"{culprit}: expected a Tensor, got {got}")
    for name, tensor in (("labels", labels), ("class_weight", class_weight)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor or None, got {type(tensor).__name__}")
    if student.dim() < 2:
        raise ValueError(
            f"student_logits: expected [..., rows, classes], got shape {list(student.shape)}"
        )
    if not student.is_floating_point():
        raise TypeError(f"student_logits: expected a floating-point dtype, got {student.dtype}")
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"teacher_logits: expected {student.shape[-1]} classes as in student_logits"
            f" {list(student.shape)}, got {teacher.shape[-1]} in {list(teacher.shape)}"
        )
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher_logits: expected the shape of student_logits {list(student.shape)},"
            f" got {list(teacher.shape)}"
        )
    if student.shape[-1] == 0:
        raise ValueError(f"student_logits: expected at least one class, got {list(student.shape)}")
    if reduction == "batchmean" and student.numel() == 0:
        raise ValueError(
            f"student_logits: expected at least one row to take a mean of, got"
            f" {list(student.shape)}"
        )
    if student.dtype != teacher.dtype:
        raise TypeError(
            f"teacher_logits: expected the dtype of student_logits, {student.dtype},"
            f" got {teacher.dtype}"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"teacher_logits: expected the device of student_logits, {student.device},"
            f" got {teacher.device}"
        )
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "teacher_logits: expected a tensor without gradient, got one that requires grad;"
            " compute it under torch.no_grad() or pass teacher_logits.detach()"
        )
    if not temperature > 0 or temperature == float("inf"):
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    for name, value in (("ce_weight", ce_weight), ("kd_weight", kd_weight)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    if reduction not in REDUCTIONS:
        hint = (
            "; the 'mean' of KLDivLoss also divides by the classes, 'batchmean' is the mean"
            " over rows"
            if reduction == "mean"
            else ""
        )
        raise ValueError(
            f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}{hint}"
        )
    if labels is not None:
        if labels.dtype != torch.int64:
            raise TypeError(f"labels: expected torch.int64 class indices, got {labels.dtype}")
        if labels.shape != student.shape[:-1]:
            raise ValueError(
                f"labels: expected {list(student.shape[:-1])} to match student_logits"
                f" {list(student.shape)}, got {list(labels.shape)}"
            )
        if labels.device != student.device:
            raise ValueError(
                f"labels: expected the device of student_logits, {student.device},"
                f" got {labels.device}"
            )
    if class_weight is not None and class_weight.shape != student.shape[-1:]:
        raise ValueError(
            f"class_weight: expected one weight per class, [{student.shape[-1]}],"
            f" got {list(class_weight.shape)}"
        )
    if class_weight is not None and class_weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "class_weight: expected a tensor without gradient, got one that requires grad;"
            " its gradient is not computed"
        )
