"""linear_kd_loss: the distillation loss from hidden states, a chunk of rows at a time.

Both models' logits of a chunk, ``kd_loss`` on them, and its gradient taken back through the head
while it is there: nothing of size rows x classes is ever held. Four products are what this costs,
two going forward (student, teacher) and two back (hidden states, weight); what is not asked for is
not computed.

``kd_loss`` works on the chunk's sum. What turns sums into means goes into the weights that it takes
for rows and classes, up to a power of two that is applied at the very end, with the gradient from
above. That leaves a row a weight of 1 to 2 on average: the logits' gradient of a mean over many
rows and classes would underflow in float16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxkd.ops._library import (
    define,
    differentiable_once,
    unobserved,
    wants_function,
    wants_gradient,
)
from fastxkd.ops._logits import DIVERGENCES, REDUCTIONS, check_options, lift_of_float16
from fastxkd.ops._transforms import one_by_one
from fastxkd.ops.kd_loss import _kd_loss, _kd_loss_scale_

SCHEMA = (
    "linear_kd_loss(Tensor student_hidden, Tensor student_weight, Tensor? student_bias,"
    " Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, Tensor? labels,"
    " Tensor? class_weight, Tensor? row_weight, float temperature, float ce_weight,"
    " float kd_weight, int divergence, float beta, int ignore_index, float label_smoothing,"
    " int reduction, SymInt chunk_rows, ScalarType compute_dtype, ScalarType accumulate_dtype,"
    " bool[] needs) -> (Tensor loss, Tensor parts, Tensor factor, Tensor grad_hidden,"
    " Tensor grad_weight, Tensor grad_bias)"
)
TENSORS, ROW_WEIGHT, REDUCTION, NEEDS = 9, 8, 16, 20  # positions in it
# Rows of a chunk, each of which reads both heads and reads and writes the weight's gradient once
# more: enough for the products to hide that. A GPU multiplies faster for the memory that it has.
CHUNK_ROWS, CHUNK_ROWS_GPU = 1024, 2048
NAMES = {number: name for name, number in DIVERGENCES.items()}
BLOCK = 1 << 20  # entries of a bfloat16 weight's gradient that are added up at a time
SECOND_BACKWARD = (
    "linear_kd_loss: backward was called a second time; the gradients are handed on, not kept. "
    "Call linear_kd_loss again for another backward pass"
)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gradients(
    hidden: Tensor, weight: Tensor, compute: torch.dtype, accumulate: torch.dtype, needs: list[bool]
) -> tuple[Tensor, ...]:
    """Room for the gradients of hidden states, weight and bias; none for those not asked for."""
    classes, width = weight.shape
    shapes = ([hidden.shape[0], width], [classes, width], [classes])
    dtypes = (compute, accumulate, exact_dtype(compute))
    rooms = (
        torch.empty(shape if need else [0], dtype=dtype, device=hidden.device)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )
    return tuple(rooms)


def _fake(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    divergence: int,
    beta: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    chunk_rows: int,
    compute_dtype: torch.dtype,
    accumulate_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    shape = [] if reduction else [student_hidden.shape[0]]
    exact = exact_dtype(compute_dtype)
    loss = student_hidden.new_empty(shape, dtype=exact)
    parts = student_hidden.new_empty([2, *shape], dtype=exact)
    grads = _gradients(student_hidden, student_weight, compute_dtype, accumulate_dtype, needs)
    return loss, parts, student_hidden.new_empty([], dtype=exact), *grads


@define(SCHEMA, _fake)
def _linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    divergence: int,
    beta: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    chunk_rows: int,
    compute_dtype: torch.dtype,
    accumulate_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Hidden states are [rows, width]. ``needs`` says which gradients to make; they are still to be
    multiplied by ``factor``. Losses by row come without."""
    rows, classes = student_hidden.shape[0], student_weight.shape[0]
    if labels is not None and labels.device.type == "cpu":
        _check_labels(labels, classes, ignore_index)
    factor = 1.0
    if reduction == REDUCTIONS["batchmean"]:
        factor = 0.5 ** (rows - 1).bit_length()
        if compute_dtype == torch.float16:  # one row may be all that counts
            weights = (temperature, ce_weight, kd_weight, 0.0, 0.0)
            factor = max(factor, 1 / lift_of_float16(NAMES[divergence], *weights))
        class_weight, row_weight = _weights_of_a_mean(
            labels, class_weight, row_weight, ignore_index, student_hidden, classes, 1 / factor
        )
    student = _Head(student_hidden, student_weight, student_bias, compute_dtype)
    teacher = _Head(teacher_hidden, teacher_weight, teacher_bias, compute_dtype)
    grads = _gradients(student.hidden, student.weight, compute_dtype, accumulate_dtype, needs)
    grad_hidden, grad_weight, grad_bias = grads
    wanted = any(needs)
    # Chunks of one size, as near as can be: a short one at the end would be a slow one.
    chunks = max(1, -(-rows // chunk_rows))
    size = max(1, -(-rows // chunks))
    logits = student.logits_of(size)
    guidance = teacher.logits_of(size) if kd_weight else logits
    losses, found = [], []
    for first in range(0, max(1, rows), size):
        at = slice(first, first + size)
        s = student.project(at, logits)
        loss, parts, grad = _kd_loss(
            s,
            teacher.project(at, guidance) if kd_weight else s,
            None if labels is None else labels[at],
            class_weight,
            None if row_weight is None else row_weight[at],
            None,
            [],
            0,
            temperature,
            ce_weight,
            kd_weight,
            divergence,
            0.0,
            beta,
            ignore_index,
            label_smoothing,
            REDUCTIONS["sum" if reduction else "none"],
            wanted,
            room=s,  # the logits are of no more use
        )
        losses.append(loss)
        found.append(parts)
        if needs[0]:
            torch.mm(grad, student.weight, out=grad_hidden[at])
        if needs[1]:
            _add_product(grad_weight, grad, student.hidden[at], first > 0)
        if needs[2]:
            column = grad.sum(0, dtype=grad_bias.dtype)
            grad_bias = column if first == 0 else grad_bias.add_(column)
        del grad  # before the next chunk's is made
    exact = exact_dtype(compute_dtype)
    scale = torch.full((), factor, dtype=exact, device=grad_hidden.device)
    if reduction == REDUCTIONS["none"]:
        return torch.cat(losses), torch.cat(found, 1), scale, grad_hidden, grad_weight, grad_bias
    total = torch.stack(found).sum(0, dtype=torch.float64) * factor
    return total.sum().to(exact), total.to(exact), scale, grad_hidden, grad_weight, grad_bias


class _Head:
    """A model's last layer on its hidden states."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.hidden, self.weight = hidden.to(dtype), weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)

    def logits_of(self, rows: int) -> Tensor:
        return torch.empty(
            (rows, self.weight.shape[0]), dtype=self.weight.dtype, device=self.weight.device
        )

    def project(self, at: slice, room: Tensor) -> Tensor:
        hidden = self.hidden[at]
        out = room[: hidden.shape[0]]
        if self.bias is None:
            return torch.mm(hidden, self.weight.T, out=out)
        return torch.addmm(self.bias, hidden, self.weight.T, out=out)


def _add_product(total: Tensor, grad: Tensor, hidden: Tensor, more: bool) -> None:
    """total (+)= grad^T hidden."""
    if total.dtype != grad.dtype and grad.dtype == torch.bfloat16:
        # Multiplied in bfloat16, at twice the speed, for one rounding per chunk; and some classes
        # at a time, since torch makes a float32 copy of what it adds.
        classes = max(1, BLOCK // hidden.shape[1])
        for first in range(0, len(total), classes):
            part = total[first : first + classes]
            product = torch.mm(grad[:, first : first + classes].T, hidden)
            _ = part.add_(product) if more else part.copy_(product)
        return
    # A float16 product could overflow: a sum over rows may be beyond what float16 holds.
    grad, hidden = grad.to(total.dtype), hidden.to(total.dtype)
    torch.addmm(total, grad.T, hidden, beta=int(more), out=total)


def _weights_of_a_mean(
    labels: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    ignore_index: int,
    hidden: Tensor,
    classes: int,
    times: float,
) -> tuple[Tensor | None, Tensor]:
    """Weights of classes and rows with which ``kd_loss`` of the sum is ``times`` that of the mean.

    The soft part divides by the weights of the rows that count, the hard part by theirs times those
    of their labels' classes; the ratio of the two goes into the weights of the classes.
    """
    if row_weight is None:
        row_weight = torch.ones(hidden.shape[0], dtype=torch.float64, device=hidden.device)
    row_weight = row_weight.to(torch.float64)
    counted = row_weight
    if labels is not None:
        counted = torch.where(labels != ignore_index, row_weight, 0)
    total = counted.sum()
    if labels is not None and class_weight is not None:
        class_weight = class_weight.to(torch.float64)
        # On a GPU a label outside the classes is the kernel's to report.
        on_label = class_weight[labels.clamp(0, classes - 1)]
        class_weight = class_weight * _ratio(total, (counted * on_label).sum())
    return class_weight, row_weight * _ratio(times, total)


def _ratio(a: Tensor | float, b: Tensor) -> Tensor:
    """a / b; 0 where nothing counts."""
    return torch.where(b != 0, a / b, 0)


def _check_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    outside = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if bool(outside.any()):
        row = int(outside.nonzero()[0, 0])
        raise ValueError(
            f"labels: expected 0 <= label < {classes} (the rows of student_weight) or ignore_index"
            f" {ignore_index}, got {int(labels[row])} at position {row}"
        )


class _LinearKDLossEager(torch.autograd.Function):
    """For plain eager calls: backward scales the very buffers that forward filled."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rest: tuple[Any, ...],
        parts: list[Tensor],
    ) -> Tensor:
        loss, found, ctx.factor, *grads = _linear_kd_loss(hidden, weight, bias, *rest)
        parts.append(found)
        ctx.grads = [
            None if like is None else (grad, like.dtype)
            for grad, like in zip(grads, (hidden, weight, bias), strict=True)
        ]
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        return (_backward_once if torch.is_grad_enabled() else _backward)(ctx, upstream)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    grads, ctx.grads = ctx.grads, None
    if grads is None:
        raise RuntimeError(SECOND_BACKWARD)
    upstream = upstream * ctx.factor
    scaled: list[Tensor | None] = []
    for need, kept in zip(ctx.needs_input_grad, grads, strict=False):
        if not need:
            scaled.append(None)
            continue
        grad, dtype = kept
        grad = grad.to(torch.promote_types(grad.dtype, dtype))
        matrix = grad if grad.dim() == 2 else grad[None]
        direct = unobserved(grad) and type(upstream) is Tensor
        (_kd_loss_scale_ if direct else torch.ops.fastxkd.kd_loss_scale_.default)(matrix, upstream)
        scaled.append(grad.to(dtype))
    return (*scaled, None, None)


# With create_graph=True: a second derivative through the result is an error, not a zero.
_backward_once = differentiable_once(_backward)


class _LinearKDLoss(torch.autograd.Function):
    """The same in the form that the compiler and ``torch.func`` need; and losses by row, which
    cannot have their gradient before it is known what each row's counts for: the chunks are then
    done again in backward, with that as the weights of the rows."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        if arguments[REDUCTION] == REDUCTIONS["none"]:
            arguments = (*arguments[:NEEDS], (False,) * 3)
        return torch.ops.fastxkd.linear_kd_loss.default(*arguments)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:3])
        ctx.set_materialize_grads(False)
        ctx.options, ctx.needs = inputs[TENSORS:NEEDS], inputs[NEEDS]
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
        by_row = inputs[REDUCTION] == REDUCTIONS["none"]
        ctx.save_for_backward(*(inputs[:TENSORS] if by_row else output[2:]))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return one_by_one(_LinearKDLoss, info, in_dims, *arguments)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * (NEEDS + 1)
        factor, *grads = saved = ctx.saved_tensors
        if upstream.dim():
            weight = saved[ROW_WEIGHT]
            weight = upstream if weight is None else upstream * weight
            options = list(ctx.options)
            options[REDUCTION - TENSORS] = REDUCTIONS["sum"]
            _, _, factor, *grads = torch.ops.fastxkd.linear_kd_loss.default(
                *saved[:ROW_WEIGHT], weight, *options, ctx.needs
            )
        else:
            factor = factor * upstream
        scaled = (
            (grad.to(exact_dtype(grad.dtype)) * factor).to(dtype) if need else None
            for grad, dtype, need in zip(grads, ctx.dtypes, ctx.needs, strict=True)
        )
        return (*scaled, *(None,) * (NEEDS - 2))


def linear_kd_loss_parts(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    *,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    divergence: str,
    beta: float,
    ignore_index: int,
    label_smoothing: float,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    reduction: str,
    chunk_rows: int | None,
    accumulate_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """(loss, parts) of the checked arguments; see ``fastxkd.linear_kd_loss``."""
    tensors = {
        "student_hidden": student_hidden,
        "student_weight": student_weight,
        "student_bias": student_bias,
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
        "teacher_bias": teacher_bias,
        "labels": labels,
        "class_weight": class_weight,
        "row_weight": row_weight,
    }
    _check_types(tensors)
    device = student_hidden.device.type
    # Autocast would bring the inputs of a linear layer to one dtype, and leaves float64 alone.
    casts = torch.is_autocast_enabled(device) and student_hidden.dtype != torch.float64
    compute = torch.get_autocast_dtype(device) if casts else student_hidden.dtype
    _check_tensors(tensors, casts)
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
    shape = student_hidden.shape[:-1]
    _check_mean(reduction, shape)
    check_chunks(chunk_rows, accumulate_dtype)
    accumulate = _accumulate_dtype(accumulate_dtype, compute)
    if chunk_rows is None:
        chunk_rows = CHUNK_ROWS if device == "cpu" else CHUNK_ROWS_GPU
    if student_hidden.dim() != 2:
        student_hidden = student_hidden.flatten(0, -2)
        teacher_hidden = teacher_hidden.flatten(0, -2)
        labels = None if labels is None else labels.flatten()
        row_weight = None if row_weight is None else row_weight.flatten()
    # The ends of the generalised JSD are the two KLs; the formula itself is 0 there.
    if divergence == "jsd" and beta in (0, 1):
        divergence = "reverse_kl" if beta else "forward_kl"
    inputs = (student_hidden, student_weight, student_bias)
    needs = tuple(x is not None and wants_gradient(x) for x in inputs)
    rest: tuple[Any, ...] = (
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        labels,
        class_weight,
        row_weight,
        float(temperature),
        float(ce_weight),
        float(kd_weight),
        DIVERGENCES[divergence],
        float(beta),
        ignore_index,
        float(label_smoothing),
        REDUCTIONS[reduction],
        chunk_rows,
        compute,
        accumulate,
        needs,
    )
    plain = all(unobserved(x) for x in (*inputs, teacher_hidden, teacher_weight) if x is not None)
    if any(needs) and plain and reduction != "none":
        kept: list[Tensor] = []
        loss, parts = _LinearKDLossEager.apply(*inputs, rest, kept), kept[0]
    elif any(needs) or any(wants_function(x) for x in inputs if x is not None):
        loss, parts, *_ = _LinearKDLoss.apply(*inputs, *rest)
    elif plain:
        loss, parts, *_ = _linear_kd_loss(*inputs, *rest)
    else:
        loss, parts, *_ = torch.ops.fastxkd.linear_kd_loss.default(*inputs, *rest)
    if reduction == "none" and len(shape) != 1:
        loss, parts = loss.reshape(shape), parts.reshape(2, *shape)
    return loss, parts


def _accumulate_dtype(asked: torch.dtype | None, compute: torch.dtype) -> torch.dtype:
    if asked is None:
        return exact_dtype(compute)
    known = dict.fromkeys((exact_dtype(compute), compute))
    if asked not in known:
        raise ValueError(f"accumulate_dtype: expected {' or '.join(map(str, known))}, got {asked}")
    return asked


def _check_types(tensors: dict[str, Tensor | None]) -> None:
    needed = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name in needed):
            expected = "a Tensor" if name in needed else "a Tensor or None"
            raise TypeError(f"{name}: expected {expected}, got {type(tensor).__name__}")


def _check_tensors(tensors: dict[str, Any], casts: bool) -> None:
    hidden, weight = tensors["student_hidden"], tensors["student_weight"]
    if hidden.dim() < 2:
        raise ValueError(
            f"student_hidden: expected [..., rows, width], got shape {list(hidden.shape)}"
        )
    for name in ("student_weight", "teacher_weight"):
        if tensors[name].dim() != 2 or tensors[name].numel() == 0:
            raise ValueError(
                f"{name}: expected [classes, width] with at least one of each, got shape"
                f" {list(tensors[name].shape)}"
            )
    lead, classes = list(hidden.shape[:-1]), weight.shape[0]
    shapes = {
        "student_hidden": [*lead, weight.shape[1]],
        "student_bias": [classes],
        "teacher_weight": [classes, tensors["teacher_weight"].shape[1]],
        "teacher_hidden": [*lead, tensors["teacher_weight"].shape[1]],
        "teacher_bias": [classes],
        "labels": lead,
        "class_weight": [classes],
        "row_weight": lead,
    }
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if name in shapes and list(tensor.shape) != shapes[name]:
            beside = "teacher_weight" if name == "teacher_hidden" else "student_weight"
            raise ValueError(
                f"{name}: expected {shapes[name]}, of student_hidden {list(hidden.shape)} and"
                f" {beside} {list(tensors[beside].shape)}, got {list(tensor.shape)}"
            )
        if tensor.device != hidden.device:
            raise ValueError(
                f"{name}: expected the device of student_hidden, {hidden.device},"
                f" got {tensor.device}"
            )
        _check_dtype(name, tensor, hidden.dtype, casts)
        if not name.startswith("student") and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: expected a tensor without gradient, got one that requires grad; its"
                f" gradient is not computed: pass {name}.detach()"
            )


def _check_dtype(name: str, tensor: Tensor, dtype: torch.dtype, casts: bool) -> None:
    if name == "labels":
        if tensor.dtype != torch.int64:
            raise TypeError(f"labels: expected torch.int64 class indices, got {tensor.dtype}")
        return
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
    same = tensor.dtype == dtype or (casts and tensor.dtype != torch.float64)
    if not same and name not in ("class_weight", "row_weight"):
        raise TypeError(
            f"{name}: expected the dtype of student_hidden, {dtype}, got {tensor.dtype}"
        )


def _check_mean(reduction: str, shape: torch.Size) -> None:
    if reduction == "batchmean" and shape.numel() == 0:
        raise ValueError(
            "student_hidden: expected at least one row to take a mean of, got none in"
            f" {list(shape)}"
        )


def check_chunks(chunk_rows: int | None, accumulate_dtype: torch.dtype | None) -> None:
    """What can be known of the two before there is a batch."""
    if chunk_rows is not None:
        if isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int):
            raise TypeError(f"chunk_rows: expected an int or None, got {type(chunk_rows).__name__}")
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows: expected at least 1, got {chunk_rows}")
    if accumulate_dtype is not None and not isinstance(accumulate_dtype, torch.dtype):
        raise TypeError(
            "accumulate_dtype: expected a torch.dtype or None, got"
            f" {type(accumulate_dtype).__name__}"
        )
