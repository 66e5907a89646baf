"""What losses and metrics ask of their arguments, in one wording."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastxkd.ops._library import unobserved

Features = Tensor | Sequence[Tensor]
NAMES = ("student_features", "teacher_features")


def check_float(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")


def check_guidance(names: tuple[str, str], student: Tensor, teacher: Tensor) -> None:
    """The teacher's is a constant on the student's device."""
    if student.device != teacher.device:
        raise ValueError(
            f"{names[1]}: expected the device of {names[0]}, {student.device}, got {teacher.device}"
        )
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{names[1]}: expected a tensor without gradient, got one that requires grad;"
            f" compute it under torch.no_grad() or pass {names[1]}.detach()"
        )


def check_pair(student: Tensor, teacher: Tensor, names: tuple[str, str] = NAMES) -> None:
    """Two floating-point tensors ``[n, ...]`` of the same n, the second a constant."""
    for name, tensor in zip(names, (student, teacher), strict=True):
        check_float(name, tensor)
        if tensor.dim() < 2 or tensor.numel() == 0:
            raise ValueError(
                f"{name}: expected [n, ...] with at least one value a row,"
                f" got shape {list(tensor.shape)}"
            )
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"{names[1]}: expected {student.shape[0]} rows as in {names[0]}"
            f" {list(student.shape)}, got {teacher.shape[0]} in {list(teacher.shape)}"
        )
    check_guidance(names, student, teacher)


def check_layers(
    student: Features, teacher: Features
) -> list[tuple[tuple[str, str], Tensor, Tensor]]:
    """One layer or many, as a list of names and tensors; the layers themselves are not checked."""
    lists = []
    for name, given in zip(NAMES, (student, teacher), strict=True):
        if not isinstance(given, Tensor | list | tuple):
            raise TypeError(
                f"{name}: expected a Tensor or a list of them, got {type(given).__name__}"
            )
        lists.append([given] if isinstance(given, Tensor) else list(given))
    students, teachers = lists
    if len(students) != len(teachers) or not students:
        raise ValueError(
            f"{NAMES[1]}: expected as many layers as {NAMES[0]} and at least one,"
            f" got {len(teachers)} and {len(students)}"
        )
    if isinstance(student, Tensor):
        return [(NAMES, students[0], teachers[0])]
    return [
        ((f"{NAMES[0]}[{i}]", f"{NAMES[1]}[{i}]"), s, t)
        for i, (s, t) in enumerate(zip(students, teachers, strict=True))
    ]


def check_rows(name: str, tensor: Tensor, least: int, what: str) -> None:
    if tensor.shape[0] < least:
        raise ValueError(
            f"{name}: expected at least {least} samples, for {what}; got {tensor.shape[0]}"
            f" in {list(tensor.shape)}"
        )


def check_channels(name: str, features: Tensor, channels: int) -> None:
    if features.shape[1] != channels:
        raise ValueError(
            f"{name}: expected {channels} channels, the second dimension,"
            f" got {features.shape[1]} in {list(features.shape)}"
        )


def check_precision(name: str, features: Tensor, parameters: Tensor) -> None:
    """Features are brought to the dtype of a module's parameters, which may not lose digits."""
    if torch.promote_types(features.dtype, parameters.dtype) != parameters.dtype:
        raise TypeError(
            f"{name}: expected at most the precision of the module's parameters,"
            f" {parameters.dtype}, got {features.dtype}; use criterion.to({features.dtype})"
        )


def check_number(name: str, value: Any) -> None:
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


def check_positive(**values: float) -> None:
    for name, value in values.items():
        check_number(name, value)
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def check_factors(**values: float) -> None:
    for name, value in values.items():
        check_number(name, value)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")


def check_counts(**values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def check_flags(**values: bool) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def check_generator(generator: torch.Generator | None) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator: expected a torch.Generator or None, got {type(generator).__name__}"
        )


def check_labels(labels: Any, name: str, samples: Tensor) -> None:
    """int64 ``[n]`` beside the samples of that name; see :func:`check_classes` for the values."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a Tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected torch.int64 class indices, got {labels.dtype}")
    if labels.shape != samples.shape[:1]:
        raise ValueError(
            f"labels: expected {list(samples.shape[:1])}, one for each row of {name}"
            f" {list(samples.shape)}, got {list(labels.shape)}"
        )
    if labels.device != samples.device:
        raise ValueError(
            f"labels: expected the device of {name}, {samples.device}, got {labels.device}"
        )


def check_logits(name: str, logits: Any, samples: Tensor) -> None:
    """What a model answers: ``[n, classes]``."""
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(samples):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{name}: expected logits [{len(samples)}, classes], got {got}")


def check_classes(labels: Tensor, classes: int) -> None:
    """Every row counts here: no label is there to be ignored. Compiled code does not look."""
    if not unobserved(labels):
        return
    low, high = (int(x) for x in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels: expected classes from 0 to {classes - 1}, got {low if low < 0 else high};"
            " every row counts, leave out those without a label"
        )
