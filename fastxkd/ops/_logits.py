"""What the losses on logits expect of their arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastxkd.ops import _library
from fastxkd.ops._checks import check_number

REDUCTIONS = {"none": 0, "sum": 1, "batchmean": 2}
DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "tvd": 3, "dkd": 4, "dist": 5}
OFFERED = ("forward_kl", "reverse_kl", "jsd", "tvd")  # under one name; the others have their own
# What alpha and beta weigh, where they do.
WEIGHTS = {
    "dkd": ("target_weight", "others_weight"),
    "dist": ("inter_weight", "intra_weight"),
}
# Log-probabilities are logits: softmax takes the constant away.
FORMS = {"logits": 0, "log_probs": 0, "probs": 1}
INF = float("inf")
# T^2 and what it is multiplied with must be numbers.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-6, 1e6
# A row's gradient is within ce_weight + kd_weight * T times alpha + beta; but these grow, with how
# far the logits are apart and with how little the probabilities are.
UNBOUNDED = {"reverse_kl": 64, "dist": 64}
FLOAT16_ROOM = 1 << 14


def lift_of_float16(
    divergence: str,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    alpha: float,
    beta: float,
) -> float:
    """The power of two with which a row's gradient, times its share in the mean, fits float16.

    A mean over many rows and classes has gradients that float16 rounds to nothing, long before the
    factor of a ``GradScaler``, which is there to save them, comes back with the upstream gradient.
    """
    parts = alpha + beta if divergence in WEIGHTS else 1.0
    row = (ce_weight + kd_weight * temperature * parts) * UNBOUNDED.get(divergence, 1)
    return 2.0 ** min(14, max(0, math.floor(math.log2(FLOAT16_ROOM / row)))) if row > 0 else 1.0


def shares_of_teachers(weights: Sequence[float] | None, models: int) -> tuple[float, ...]:
    """Shares of the teachers, which sum to 1."""
    if models == 0:
        raise ValueError("teacher_logits: expected at least one teacher, got an empty sequence")
    if weights is None:
        return (1 / models,) * models
    found = check_teacher_weights(weights)
    if len(found) != models:
        raise ValueError(
            f"teacher_weights: expected one for each of the {models} teachers, got {len(found)}"
        )
    return tuple(w / sum(found) for w in found)


def check_teacher_weights(weights: Sequence[float]) -> tuple[float, ...]:
    try:
        listed = [] if isinstance(weights, str) else list(weights)
    except TypeError:
        listed = []
    if not listed:
        raise TypeError(
            "teacher_weights: expected a sequence of numbers, one for each teacher, or None,"
            f" got {weights!r}"
        )
    for weight in listed:
        check_number("teacher_weights", weight)
    found = tuple(float(w) for w in listed)
    if not all(0 <= w < INF for w in found) or sum(found) == 0:
        raise ValueError(
            f"teacher_weights: expected finite numbers of at least 0, not all 0, got {list(found)}"
        )
    return found


def stacked(name: str, tensors: Tensor | Sequence[Tensor]) -> Tensor:
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


def check_options(
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    divergence: str,
    alpha: float,
    beta: float,
    ignore_index: int,
    label_smoothing: float,
    teacher_form: str,
    reduction: str,
    offered: Sequence[str] = OFFERED,
) -> None:
    """What a loss module can know of its options before it is called."""
    on_alpha, on_beta = WEIGHTS.get(divergence, ("alpha", "beta"))
    for name, value in (
        ("ce_weight", ce_weight),
        ("kd_weight", kd_weight),
        (on_alpha, alpha),
        (on_beta, beta),
        ("label_smoothing", label_smoothing),
    ):
        if type(value) not in (float, int):
            check_number(name, value)
    check_temperature(temperature)
    if not (0 <= ce_weight < INF and 0 <= kd_weight < INF):
        name, value = ("kd_weight", kd_weight)
        if not 0 <= ce_weight < INF:
            name, value = ("ce_weight", ce_weight)
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    if divergence not in DIVERGENCES or divergence not in offered:
        hint = f"; use {divergence}_loss" if divergence in WEIGHTS else ""
        raise ValueError(
            f"divergence: expected one of {', '.join(offered)}, got {divergence!r}{hint}"
        )
    if divergence == "jsd" and not 0 <= beta <= 1:
        raise ValueError(f"beta: expected the teacher's share, a number in [0, 1], got {beta}")
    if divergence in WEIGHTS:
        for name, value in ((on_alpha, alpha), (on_beta, beta)):
            if not 0 <= value < INF:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    if type(ignore_index) is not int:
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    if teacher_form not in FORMS:
        raise ValueError(f"teacher_form: expected one of {', '.join(FORMS)}, got {teacher_form!r}")
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


def check_temperature(temperature: float) -> None:
    check_number("temperature", temperature)
    if not 0 < temperature < INF:
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    if not LEAST_TEMPERATURE <= temperature <= MOST_TEMPERATURE:
        raise ValueError(
            f"temperature: expected a number from {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g},"
            f" got {temperature}"
        )


def check_kept(class_weight: Tensor | None, teacher_weights: Sequence[float] | None = None) -> None:
    """What a loss module keeps beside its options."""
    if teacher_weights is not None:
        check_teacher_weights(teacher_weights)
    if class_weight is None:
        return
    if not isinstance(class_weight, Tensor):
        raise TypeError(
            f"class_weight: expected a Tensor or None, got {type(class_weight).__name__}"
        )
    if class_weight.dim() != 1 or not class_weight.is_floating_point():
        raise ValueError(
            "class_weight: expected one floating-point weight per class, [classes], got"
            f" {list(class_weight.shape)} {class_weight.dtype}"
        )


def check_tensors(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    indices: Tensor | None,
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
    if student.dtype != teacher.dtype and (
        teacher.dtype not in _library.DTYPES
        or (teacher.dtype == torch.float64 and student.dtype != torch.float64)
    ):
        raise TypeError(
            f"teacher_logits: expected {student.dtype}, the dtype of student_logits, or another"
            f" one of at most float32, got {teacher.dtype}"
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
