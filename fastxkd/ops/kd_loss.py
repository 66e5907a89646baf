"""kd_loss: schema, checks, kernels and gradient of the distillation loss.

The forward pass computes the gradient with respect to the student's logits while the row is in
cache; the backward pass only scales it by what comes from above.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastxkd.ops._library import (
    DTYPES,
    cuda_kernels,
    define,
    differentiable_once,
    kernel_of,
    kernels,
    serve,
    ticket,
    unobserved,
    wants_function,
)
from fastxkd.reference import kd_loss as reference

REDUCTIONS = {"none": 0, "sum": 1, "batchmean": 2}
DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "tvd": 3, "dkd": 4}
# Log-probabilities are logits: softmax takes the constant away.
FORMS = {"logits": 0, "log_probs": 0, "probs": 1}

SCHEMA = (
    "kd_loss(Tensor student, Tensor teacher, Tensor? labels, Tensor? class_weight,"
    " Tensor? row_weight, Tensor? teacher_indices, float[] teacher_weights, int teacher_form,"
    " float temperature, float ce_weight, float kd_weight, int divergence, float alpha,"
    " float beta, int ignore_index, float label_smoothing, int reduction, bool need_grad)"
    " -> (Tensor loss, Tensor parts, Tensor grad)"
)
ARGUMENTS = 18
INF = float("inf")
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
    exact = torch.float64 if student.dtype == torch.float64 else torch.float32
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
    room: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """student [rows, classes]; teacher [rows, k] or [models, rows, k], see ``dense_teacher``.

    ``room``, which the dispatcher never gives: where the C++ kernel may put the gradient. It may be
    ``student`` itself, since that kernel has read a row before it writes the gradient's.
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
    device = student.device
    exact = torch.float64 if student.dtype == torch.float64 else torch.float32
    shape = (rows,) if reduction == 0 else ()
    loss = torch.empty(shape, dtype=exact, device=device)
    parts = torch.empty((2, *shape), dtype=exact, device=device)
    if room is None or not need_grad or backend != "cpu":
        room = torch.empty(
            (rows, classes) if need_grad else (0,), dtype=student.dtype, device=device
        )
    grad = room
    # cpu: the ISA level and the threads; cuda: the device and the stream, and what it works in.
    module, *how = kernels() if backend == "cpu" else cuda_kernels(student)
    if backend == "cuda":
        row_losses = torch.empty((2, rows), dtype=torch.float64, device=device)
        turn = ticket(student)
        how += [turn.data_ptr(), row_losses.data_ptr()]
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
        parts.data_ptr(),
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
    exact = torch.float64 if grad.dtype == torch.float64 else torch.float32
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
_backward_once = differentiable_once(_backward)


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
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * ARGUMENTS
        factor = upstream.unsqueeze(-1) if upstream.dim() else upstream
        return (ctx.grad * factor).to(ctx.grad.dtype), *(None,) * (ARGUMENTS - 1)


def kd_loss_parts(
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
) -> tuple[Tensor, Tensor]:
    """(loss, parts) of the checked arguments; see ``fastxkd.kd_loss`` for their meaning."""
    student: Tensor = student_logits
    teacher: Any = teacher_logits
    indices: Any = teacher_indices
    weights: tuple[float, ...] = ()
    if isinstance(teacher, (list, tuple)):
        weights = _teacher_weights(teacher_weights, len(teacher))
        teacher = _stacked("teacher_logits", teacher)
        indices = None if indices is None else _stacked("teacher_indices", indices)
    elif teacher_weights is not None:
        raise ValueError(
            "teacher_weights: expected None with one teacher, got"
            f" {list(teacher_weights)}; several teachers are a list of tensors"
        )
    _check(
        student,
        teacher,
        labels,
        temperature,
        ce_weight,
        kd_weight,
        divergence,
        alpha,
        beta,
        label_smoothing,
        class_weight,
        row_weight,
        teacher_form,
        indices,
        reduction,
        bool(weights),
    )
    if type(ignore_index) is not int:
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    shape = student.shape[:-1]
    if student.dim() != 2:
        student = student.reshape(-1, student.shape[-1])
        lead = (len(weights), -1) if weights else (-1,)
        teacher = teacher.reshape(*lead, teacher.shape[-1])
        indices = None if indices is None else indices.reshape(*lead, teacher.shape[-1])
        labels = None if labels is None else labels.reshape(-1)
        row_weight = None if row_weight is None else row_weight.reshape(-1)
    need_grad = student.requires_grad and torch.is_grad_enabled()
    # The ends of the generalised JSD are the two KLs; the formula itself is 0 there.
    if divergence == "jsd" and beta in (0, 1):
        divergence = "reverse_kl" if beta else "forward_kl"
    rest: tuple[Any, ...] = (
        teacher,
        labels,
        class_weight,
        row_weight,
        indices,
        weights,
        FORMS[teacher_form],
        float(temperature),
        float(ce_weight),
        float(kd_weight),
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
        kept: list[Tensor] = []
        loss = _KDLossEager.apply(student, rest, kept)
        parts = kept[0]
    else:
        loss, parts, _ = _kd_loss(student, *rest)
    if reduction == "none" and len(shape) != 1:
        loss, parts = loss.reshape(shape), parts.reshape(2, *shape)
    return loss, parts


def check_logits(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    label_smoothing: float,
    class_weight: Tensor | None,
) -> None:
    """What every loss of logits and a mean over rows expects."""
    _check(
        student,
        teacher,
        labels,
        temperature,
        ce_weight,
        kd_weight,
        "forward_kl",
        0.0,
        0.0,
        label_smoothing,
        class_weight,
        None,
        "logits",
        None,
        "batchmean",
        False,
    )


def _teacher_weights(weights: Sequence[float] | None, models: int) -> tuple[float, ...]:
    """Shares of the teachers, which sum to 1."""
    if models == 0:
        raise ValueError("teacher_logits: expected at least one teacher, got an empty sequence")
    if weights is None:
        return (1 / models,) * models
    found = tuple(float(w) for w in weights)
    if len(found) != models:
        raise ValueError(
            f"teacher_weights: expected one for each of the {models} teachers, got {len(found)}"
        )
    if not all(0 <= w < INF for w in found) or sum(found) == 0:
        raise ValueError(
            f"teacher_weights: expected finite numbers of at least 0, not all 0, got {list(found)}"
        )
    return tuple(w / sum(found) for w in found)


def _stacked(name: str, tensors: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(tensors, Tensor):
        raise TypeError(f"{name}: expected one tensor for each teacher in a sequence, got a Tensor")
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected Tensors, got {type(tensor).__name__}")
        if tensor.shape != tensors[0].shape or tensor.dtype != tensors[0].dtype:
            raise ValueError(
                f"{name}: expected one shape and dtype for all teachers, {list(tensors[0].shape)}"
                f" {tensors[0].dtype}, got {list(tensor.shape)} {tensor.dtype}"
            )
    return torch.stack(list(tensors))


def _check(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    divergence: str,
    alpha: float,
    beta: float,
    label_smoothing: float,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    teacher_form: str,
    indices: Tensor | None,
    reduction: str,
    several: bool,
) -> None:
    if not isinstance(student, Tensor) or not isinstance(teacher, Tensor):
        culprit = "student_logits" if not isinstance(student, Tensor) else "teacher_logits"
        got = type(student if culprit == "student_logits" else teacher).__name__
        raise TypeError(f"{culprit}: expected a Tensor, got {got}")
    # On every call, and as long as a small batch's kernel: no loops where none are needed.
    if not (
        (labels is None or isinstance(labels, Tensor))
        and (class_weight is None or isinstance(class_weight, Tensor))
        and (row_weight is None or isinstance(row_weight, Tensor))
        and (indices is None or isinstance(indices, Tensor))
    ):
        names = ("labels", "class_weight", "row_weight", "teacher_indices")
        given = (labels, class_weight, row_weight, indices)
        for name, tensor in zip(names, given, strict=True):
            if tensor is not None and not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a Tensor or None, got {type(tensor).__name__}")
    if student.dim() < 2:
        raise ValueError(
            f"student_logits: expected [..., rows, classes], got shape {list(student.shape)}"
        )
    if not student.is_floating_point():
        raise TypeError(f"student_logits: expected a floating-point dtype, got {student.dtype}")
    _check_teacher(student, teacher, indices, several)
    if student.shape[-1] == 0:
        raise ValueError(f"student_logits: expected at least one class, got {list(student.shape)}")
    if reduction == "batchmean" and student.numel() == 0:
        raise ValueError(
            f"student_logits: expected at least one row to take a mean of, got"
            f" {list(student.shape)}"
        )
    for name, value in (
        ("temperature", temperature),
        ("ce_weight", ce_weight),
        ("kd_weight", kd_weight),
    ):
        if type(value) not in (float, int):
            _check_number(name, value)
    if not temperature > 0 or temperature == INF:
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    if not (0 <= ce_weight < INF and 0 <= kd_weight < INF):
        name, value = ("kd_weight", kd_weight)
        if not 0 <= ce_weight < INF:
            name, value = ("ce_weight", ce_weight)
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    if divergence not in DIVERGENCES or (divergence == "dkd" and labels is None):
        known = ", ".join(d for d in DIVERGENCES if d != "dkd")
        raise ValueError(f"divergence: expected one of {known}, got {divergence!r}")
    if divergence == "jsd" and not 0 <= beta <= 1:
        raise ValueError(f"beta: expected the teacher's share, a number in [0, 1], got {beta}")
    if divergence == "dkd":
        for name, value in (("target_weight", alpha), ("others_weight", beta)):
            if not 0 <= value < INF:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    if divergence == "reverse_kl" and indices is not None:
        raise ValueError(
            "divergence: expected one that allows a teacher without the other classes, got"
            " 'reverse_kl': with teacher_indices it is infinite; use forward_kl, jsd or tvd"
        )
    if teacher_form not in FORMS:
        raise ValueError(f"teacher_form: expected one of {', '.join(FORMS)}, got {teacher_form!r}")
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
        _check_rows("labels", labels, student)
    if row_weight is not None:
        if not row_weight.is_floating_point():
            raise TypeError(f"row_weight: expected a floating-point dtype, got {row_weight.dtype}")
        _check_rows("row_weight", row_weight, student)
        _check_constant("row_weight", row_weight)
    if class_weight is not None:
        if class_weight.shape != student.shape[-1:]:
            raise ValueError(
                f"class_weight: expected one weight per class, [{student.shape[-1]}],"
                f" got {list(class_weight.shape)}"
            )
        if not class_weight.is_floating_point():
            raise TypeError(
                f"class_weight: expected a floating-point dtype, got {class_weight.dtype}"
            )
        if class_weight.device != student.device:
            raise ValueError(
                f"class_weight: expected the device of student_logits, {student.device},"
                f" got {class_weight.device}; a module's moves with .to(device)"
            )
        _check_constant("class_weight", class_weight)


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"{name}: expected a number, got a tensor that requires grad; its gradient is not"
            " computed"
        )
    try:
        float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}") from None
    if isinstance(value, str):
        raise TypeError(f"{name}: expected a number, got str")


def _check_rows(name: str, tensor: Tensor, student: Tensor) -> None:
    if tensor.shape != student.shape[:-1]:
        raise ValueError(
            f"{name}: expected {list(student.shape[:-1])} to match student_logits"
            f" {list(student.shape)}, got {list(tensor.shape)}"
        )
    if tensor.device != student.device:
        raise ValueError(
            f"{name}: expected the device of student_logits, {student.device}, got {tensor.device}"
        )


def _check_constant(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a tensor without gradient, got one that requires grad;"
            " its gradient is not computed"
        )


def _check_teacher(student: Tensor, teacher: Tensor, indices: Tensor | None, several: bool) -> None:
    shape = teacher.shape[1:] if several else teacher.shape
    if indices is not None:
        if indices.dtype != torch.int64:
            raise TypeError(f"teacher_indices: expected torch.int64 classes, got {indices.dtype}")
        if indices.shape != teacher.shape:
            raise ValueError(
                f"teacher_indices: expected the shape of teacher_logits {list(teacher.shape)},"
                f" got {list(indices.shape)}"
            )
        if shape[:-1] != student.shape[:-1] or not 0 < shape[-1] <= student.shape[-1]:
            raise ValueError(
                f"teacher_logits: expected the rows of student_logits {list(student.shape)} and"
                f" 1 to {student.shape[-1]} values beside teacher_indices, got {list(shape)}"
            )
        if indices.device != student.device:
            raise ValueError(
                f"teacher_indices: expected the device of student_logits, {student.device},"
                f" got {indices.device}"
            )
    elif student.shape[-1] != shape[-1]:
        raise ValueError(
            f"teacher_logits: expected {student.shape[-1]} classes as in student_logits"
            f" {list(student.shape)}, got {shape[-1]} in {list(shape)}"
        )
    elif student.shape != shape:
        raise ValueError(
            f"teacher_logits: expected the shape of student_logits {list(student.shape)},"
            f" got {list(shape)}"
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
