"""linear_kd_loss against autograd in float64 through the full matrices of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastxkd
from benchmarks import linear_kd_loss as benchmark
from fastxkd.losses.linear import LinearKDLoss, linear_kd_loss
from fastxkd.losses.logits import KDLossParts, kd_loss
from fastxkd.ops import linear_kd_loss as operator
from tests import oracles

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "tvd"]
IGNORE = -100
# rows, classes, the student's width, the teacher's, rows of a chunk
SHAPES = [
    (1, 2, 1, 3, None),
    (7, 33, 5, 12, 3),
    (10, 100, 17, 17, 10),
    (41, 127, 64, 40, 16),
    (600, 50, 24, 32, None),
]

CASES: dict[str, dict[str, Any]] = {
    **{d: {"divergence": d, "temperature": 2.0} for d in DIVERGENCES},
    "jsd, beta 0.1": {"divergence": "jsd", "beta": 0.1},
    "jsd, beta 0": {"divergence": "jsd", "beta": 0.0},
    "jsd, beta 1": {"divergence": "jsd", "beta": 1.0},
    "T=7.3": {"temperature": 7.3},
    "no labels": {"labels": None},
    "only hard": {"kd_weight": 0.0, "ce_weight": 1.0},
    "only soft": {"ce_weight": 0.0, "kd_weight": 1.0},
    "both weights 0": {"ce_weight": 0.0, "kd_weight": 0.0},
    "ignore some": {"ignored": 0.4},
    "ignore_index is a class": {"ignore_index": 1},
    "label smoothing": {"label_smoothing": 0.1, "ignored": 0.3},
    "class weight": {"class_weight": True, "ignored": 0.3},
    "class weight, smoothing": {"class_weight": True, "label_smoothing": 0.2},
    "row weight": {"row_weight": True},
    "row weight, no labels": {"row_weight": True, "labels": None},
    "row and class weight": {"row_weight": True, "class_weight": True, "ignored": 0.3},
    "sum": {"reduction": "sum", "ignored": 0.3},
    "sum, weights": {"reduction": "sum", "row_weight": True, "class_weight": True},
    "none": {"reduction": "none", "ignored": 0.3},
    "none, weights": {"reduction": "none", "row_weight": True, "class_weight": True},
}


class Inputs(NamedTuple):
    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    labels: Tensor | None

    def of(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The floating-point tensors, changed."""
        floats = (None if x is None else change(x) for x in self[:6])
        return Inputs(*floats, self.labels)

    def leaves(self) -> Inputs:
        student = (None if x is None else x.detach().clone().requires_grad_() for x in self[:3])
        return Inputs(*student, *self[3:])

    def grads(self) -> list[Tensor]:
        found = [x.grad for x in self[:3] if x is not None]
        assert all(g is not None for g in found)
        return found


def make(
    rows: int,
    classes: int,
    width: int,
    teacher_width: int,
    dtype: torch.dtype = torch.float64,
    *,
    bias: bool = True,
    ignored: float = 0.0,
) -> Inputs:
    generator = torch.Generator().manual_seed(rows * 7919 + classes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    floats = [
        normal(rows, width),
        normal(classes, width) * 2 / width**0.5,
        normal(classes) if bias else None,
        normal(rows, teacher_width),
        normal(classes, teacher_width) * 2 / teacher_width**0.5,
        normal(classes) if bias else None,
    ]
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = IGNORE
    return Inputs(*(None if x is None else x.to(dtype) for x in floats), labels)


def ours(x: Inputs, **options: Any) -> Any:
    return linear_kd_loss(
        x.student_hidden,
        x.student_weight,
        x.teacher_hidden,
        x.teacher_weight,
        x.labels,
        student_bias=x.student_bias,
        teacher_bias=x.teacher_bias,
        **options,
    )


def eager_parts(x: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    """The formula in the dtype of the logits; of float64 inputs it is the truth."""
    if options.get("divergence") == "jsd" and options.get("beta", 0.5) in (0, 1):
        options["divergence"] = "reverse_kl" if options["beta"] else "forward_kl"
    student = F.linear(x.student_hidden, x.student_weight, x.student_bias)
    teacher = F.linear(x.teacher_hidden, x.teacher_weight, x.teacher_bias)
    return oracles.kd_parts(student, teacher, x.labels, **options)


def eager(x: Inputs, **options: Any) -> Tensor:
    return sum(eager_parts(x, **options))  # type: ignore[return-value]


def run(
    loss: Callable[..., Tensor], x: Inputs, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    leaves = x.leaves()
    value = loss(leaves, **options)
    value.backward(torch.ones_like(value) if upstream is None else upstream.to(value.dtype))
    return value.detach(), leaves.grads()


def check(
    x: Inputs, *, chunk_rows: int | None = None, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """Errors no larger than eager's of the same dtype, and a rounding of the last digit."""
    dtype = x.student_hidden.dtype
    loss, grads = run(ours, x, upstream, chunk_rows=chunk_rows, **options)
    true, true_grads = run(eager, x.of(Tensor.double), upstream, **options)
    eager_loss, eager_grads = run(eager, x, upstream, **options)
    eps = 1e-12 if dtype == torch.float64 else 1e-6
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Errors of single rows, in quadrature: in eager's own sum they may cancel by luck.
    by_row = {**options, "reduction": "none"}
    rows_off = (eager(x, **by_row).double() - eager(x.of(Tensor.double), **by_row)).norm()
    if options.get("reduction", "batchmean") == "batchmean":
        rows_off /= len(x.student_hidden)
    allowed = max((eager_loss.double() - true).norm(), rows_off)
    assert (loss.double() - true).norm() <= allowed + eps * max(true.norm(), 1)
    for like, grad, exact, other in zip(
        [t for t in x[:3] if t is not None], grads, true_grads, eager_grads, strict=True
    ):
        assert (grad.dtype, grad.shape) == (dtype, like.shape)
        assert grad.is_contiguous()
        off, eager_off = (grad.double() - exact).norm(), (other.double() - exact).norm()
        assert off <= eager_off + eps * max(exact.norm(), eps)
    return loss, grads


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(backend: str, dtype: torch.dtype, shape: tuple[Any, ...]) -> None:
    *sizes, chunk_rows = shape
    check(make(*sizes, dtype), chunk_rows=chunk_rows)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(dtype: torch.dtype, case: str) -> None:
    options = dict(CASES[case])
    x = make(23, 33, 9, 14, dtype, ignored=options.pop("ignored", 0.0))
    if "labels" in options:
        x = x._replace(labels=options.pop("labels"))
    if options.pop("class_weight", False):
        options["class_weight"] = torch.linspace(0, 2, 33)
    if options.pop("row_weight", False):
        options["row_weight"] = torch.linspace(0, 3, 23)
    upstream = torch.rand(23) + 0.5 if options.get("reduction") == "none" else None
    check(x, chunk_rows=6, upstream=upstream, **options)


@pytest.mark.parametrize("case", ["row and class weight", "none, weights", "jsd", "sum"])
def test_options_on_the_reference(case: str) -> None:
    with fastxkd.use_backend("reference"):
        for dtype in (torch.float32, torch.bfloat16):
            test_options(dtype, case)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_every_chunk_size_gives_the_same(reduction: str) -> None:
    x = make(13, 29, 6, 8, ignored=0.3)
    weights = {"class_weight": torch.linspace(0.1, 2, 29), "row_weight": torch.linspace(2, 0, 13)}
    logits = x.of(Tensor.double)
    student = F.linear(logits.student_hidden, logits.student_weight, logits.student_bias)
    teacher = F.linear(logits.teacher_hidden, logits.teacher_weight, logits.teacher_bias)
    whole = kd_loss(student, teacher, x.labels, reduction=reduction, **weights)
    first = None
    for chunk_rows in (*range(1, 15), 1000, None):
        found = run(ours, x, chunk_rows=chunk_rows, reduction=reduction, **weights)
        torch.testing.assert_close(found[0], whole, rtol=1e-12, atol=1e-14)
        first = first or found
        torch.testing.assert_close(found, first, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("student_bias", [False, True])
@pytest.mark.parametrize("teacher_bias", [False, True])
def test_biases(student_bias: bool, teacher_bias: bool) -> None:
    x = make(9, 33, 5, 7)
    x = x._replace(
        student_bias=x.student_bias if student_bias else None,
        teacher_bias=x.teacher_bias if teacher_bias else None,
    )
    check(x, chunk_rows=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype: torch.dtype) -> None:
    """Strided and expanded memory give what contiguous copies give."""
    x = make(9, 33, 5, 7, dtype)
    _, grads = check(x, chunk_rows=4)
    wide = torch.full((9, 14), float("nan"), dtype=dtype)
    wide[:, 3:8] = x.student_hidden
    strided = x._replace(
        student_hidden=wide[:, 3:8],
        student_weight=x.student_weight.T.contiguous().T,
        teacher_hidden=torch.stack([x.teacher_hidden] * 2, 2)[..., 0],
    )
    leaf = strided.student_hidden.requires_grad_()
    weight = strided.student_weight.requires_grad_()
    ours(strided, chunk_rows=4).backward()
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if dtype.itemsize == 2 else {}
    torch.testing.assert_close(leaf.grad, grads[0], **tolerance)
    torch.testing.assert_close(weight.grad, grads[1], **tolerance)

    row = x.student_hidden[:1].clone().requires_grad_()
    ours(x._replace(student_hidden=row.expand(9, 5)), chunk_rows=4).backward()
    copy = x.student_hidden[:1].clone().requires_grad_()
    ours(x._replace(student_hidden=copy.repeat(9, 1)), chunk_rows=4).backward()
    torch.testing.assert_close(row.grad, copy.grad, **tolerance)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@pytest.mark.parametrize("lead", [(2, 6), (2, 3, 2), (12,)], ids=str)
def test_leading_dimensions(lead: tuple[int, ...], reduction: str) -> None:
    x = make(12, 33, 5, 7, ignored=0.2)
    weight = torch.rand(12)
    loss, grads = check(x, reduction=reduction, row_weight=weight, chunk_rows=5)
    shaped = x._replace(
        student_hidden=x.student_hidden.reshape(*lead, 5).requires_grad_(),
        teacher_hidden=x.teacher_hidden.reshape(*lead, 7),
        labels=x.labels.reshape(lead),
    )
    options = {"reduction": reduction, "row_weight": weight.reshape(lead), "chunk_rows": 5}
    parts = ours(shaped, return_parts=True, **options)
    parts.loss.sum().backward()
    assert all(part.shape == (lead if reduction == "none" else ()) for part in parts)
    torch.testing.assert_close(parts.loss.flatten(), loss.flatten())
    torch.testing.assert_close(shaped.student_hidden.grad.reshape(12, 5), grads[0])


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_rows_ignored(backend: str, dtype: torch.dtype, reduction: str) -> None:
    x = make(5, 6, 3, 4, dtype)._replace(labels=torch.full((5,), IGNORE))
    found = run(ours, x, reduction=reduction, chunk_rows=2, class_weight=torch.ones(6))
    for value in (found[0], *found[1]):
        assert not value.any()


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(backend: str, dtype: torch.dtype, reduction: str) -> None:
    x = make(0, 6, 3, 4, dtype)
    loss, grads = run(ours, x, reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert not loss.any()
    assert [g.shape for g in grads] == [(0, 3), (6, 3), (6,)]
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_parts(reduction: str) -> None:
    x = make(9, 33, 5, 7, ignored=0.3)
    options = {"reduction": reduction, "class_weight": torch.linspace(0.5, 2, 33)}
    hard, soft = eager_parts(x, **options)
    parts = ours(x.leaves(), **options, chunk_rows=4, return_parts=True)
    assert isinstance(parts, KDLossParts)
    for value, expected in zip(parts, (hard + soft, hard, soft), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    assert [value.requires_grad for value in parts] == [True, False, False]


def test_module_is_the_function() -> None:
    x = make(9, 33, 5, 7, torch.bfloat16)
    options = {
        "temperature": 2.5,
        "ce_weight": 0.3,
        "kd_weight": 0.6,
        "divergence": "jsd",
        "beta": 0.2,
        "ignore_index": 5,
        "label_smoothing": 0.1,
        "class_weight": torch.linspace(0.5, 2, 33),
        "reduction": "sum",
        "return_parts": True,
        "chunk_rows": 4,
        "accumulate_dtype": torch.bfloat16,
    }
    x.labels[:2] = 5
    row_weight = torch.linspace(0.5, 1, 9)

    def of(module: LinearKDLoss, inputs: Inputs) -> Any:
        return module(
            inputs.student_hidden,
            inputs.student_weight,
            inputs.teacher_hidden,
            inputs.teacher_weight,
            inputs.labels,
            student_bias=inputs.student_bias,
            teacher_bias=inputs.teacher_bias,
            row_weight=row_weight,
        )

    module = LinearKDLoss(**options)
    assert "class_weight" in module.state_dict()
    assert "jsd" in repr(module)
    found = of(module, x)
    for value, expected in zip(found, ours(x, row_weight=row_weight, **options), strict=True):
        assert torch.equal(value, expected)

    def gradient(loss: LinearKDLoss) -> Tensor:
        leaves = x.leaves()
        of(loss, leaves).loss.backward()
        return leaves.student_weight.grad

    # Every option reaches the loss: taking one away changes the value or how it is summed.
    defaults = LinearKDLoss()
    for name in set(options) - {"return_parts", "chunk_rows"}:
        other = LinearKDLoss(**{**options, name: getattr(defaults, name)})
        if name == "accumulate_dtype":
            assert not torch.equal(gradient(other), gradient(module))
        else:
            assert of(other, x).loss != found.loss, name
    assert isinstance(of(LinearKDLoss(), x), Tensor)


# --- gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_upstream_gradient(backend: str, dtype: torch.dtype, reduction: str) -> None:
    upstream = torch.rand(40 if reduction == "none" else ()) * 2 - 3
    check(make(40, 60, 8, 6, dtype), reduction=reduction, upstream=upstream, chunk_rows=16)


def test_upstream_reaches_through_a_sum_of_losses() -> None:
    x = make(9, 33, 5, 7)

    def both(loss: Callable[..., Tensor]) -> Callable[[Inputs], Tensor]:
        return lambda y: 3 * loss(y) + y.student_weight.square().sum() + loss(y, temperature=2.0)

    torch.testing.assert_close(run(both(ours), x), run(both(eager), x), rtol=1e-12, atol=1e-14)


def close_in_float16(x: Inputs, upstream: Tensor) -> None:
    options = {"ce_weight": 0.0, "kd_weight": 1.0}
    _, true = run(eager, x.of(Tensor.double), upstream, **options)
    _, grads = run(ours, x, upstream, **options)
    for grad, exact in zip(grads, true, strict=True):
        assert grad.isfinite().all()
        assert (grad.double() - exact).norm() <= 1e-3 * exact.norm()


def test_small_float16_gradients_survive_a_scaled_loss() -> None:
    """The loss is scaled so that 16-bit gradients do not vanish; they must not have before."""
    close_in_float16(make(2000, 2000, 4, 4, torch.float16), torch.tensor(2.0**12))


def test_a_sum_of_float16_gradients_may_be_large() -> None:
    """Where all rows agree: the sum of 512 is beyond float16, its mean is not."""
    x = make(512, 3, 4, 4, torch.float16)
    x.student_hidden.fill_(200)
    x.student_weight.mul_(1e-3)
    x.student_bias.copy_(torch.tensor([20.0, 0, 0]))
    x.teacher_bias.copy_(torch.tensor([0.0, 20, 0]))
    close_in_float16(x, torch.tensor(16.0))


def test_one_row_of_many_may_be_all_that_counts() -> None:
    """In float16, a power of two that is fit for the mean over 65536 rows is not for this one."""
    x = make(65536, 3, 4, 4, torch.float16)
    labels = torch.full((65536,), -100)
    labels[5] = 1
    x = x._replace(labels=labels)
    _, true = run(eager, x.of(Tensor.double))
    _, grads = run(ours, x)
    for grad, exact in zip(grads, true, strict=True):
        assert grad.isfinite().all()
        assert (grad.double() - exact).norm() <= 2e-3 * exact.norm()


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_finite_differences(backend: str, divergence: str, reduction: str) -> None:
    """gradcheck by hand: torch's runs one graph backward several times, and here once is all."""
    x = make(5, 7, 3, 4, ignored=0.3)

    def loss(y: Inputs) -> Tensor:
        return ours(
            y,
            label_smoothing=0.1,
            temperature=2.5,
            divergence=divergence,
            reduction=reduction,
            chunk_rows=2,
        )

    for seed in range(2):
        torch.manual_seed(seed)
        upstream = torch.randn(5 if reduction == "none" else (), dtype=torch.float64)
        _, grads = run(loss, x, upstream)
        steps = [torch.randn_like(t) for t in x[:3]]
        h = 1e-6
        sides = [
            loss(Inputs(*(t + sign * h * d for t, d in zip(x, steps, strict=False)), *x[3:]))
            for sign in (1, -1)
        ]
        numeric = (upstream * (sides[0] - sides[1]) / (2 * h)).sum()
        found = sum((g * d).sum() for g, d in zip(grads, steps, strict=True))
        torch.testing.assert_close(found, numeric, rtol=1e-6, atol=1e-8)


def test_gradients_are_summed_in_float32() -> None:
    """Over many chunks a bfloat16 sum loses what float32 keeps."""
    x = make(512, 12, 6, 6, torch.bfloat16)
    _, true = run(eager, x.of(Tensor.double))

    def off(**options: Any) -> float:
        _, grads = run(ours, x, chunk_rows=4, **options)
        return ((grads[1].double() - true[1]).norm() / true[1].norm()).item()

    rounding = ((true[1].bfloat16().double() - true[1]).norm() / true[1].norm()).item()
    assert off() == off(accumulate_dtype=torch.float32)
    assert off() <= 2 * rounding
    assert off(accumulate_dtype=torch.bfloat16) > 3 * off()


@pytest.fixture
def flops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of the products that are made, one after the other."""
    counted: list[int] = []

    def count(name: str) -> None:
        product = getattr(torch, name)

        def counting(*matrices: Tensor, **options: Any) -> Tensor:
            a, b = matrices[-2:]
            counted.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
            return product(*matrices, **options)

        monkeypatch.setattr(torch, name, counting)

    count("mm")
    count("addmm")
    return counted


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_what_is_frozen_costs_no_product(
    frozen: tuple[int, ...], reduction: str, flops: list[int]
) -> None:
    x = make(8, 16, 4, 6)
    product = 2 * 8 * 16  # flops for each of the width
    leaves = x.leaves()
    for position in frozen:
        leaves[position].requires_grad_(False)
    ours(leaves, chunk_rows=3, reduction=reduction).sum().backward()
    # Losses by row go forward twice.
    forward = product * (4 + 6) * (2 if reduction == "none" else 1)
    back = product * 4 * sum(position not in frozen for position in (0, 1))
    assert sum(flops) == forward + back
    _, grads = run(ours, x, chunk_rows=3, reduction=reduction)
    for position, expected in enumerate(grads):
        if position in frozen:
            assert leaves[position].grad is None
        else:
            assert torch.equal(leaves[position].grad, expected)


def test_evaluation_goes_forward_only(flops: list[int]) -> None:
    x = make(8, 16, 4, 6)
    expected, _ = check(x, chunk_rows=3)
    for context in (torch.no_grad, torch.inference_mode):
        flops.clear()
        with context():
            loss = ours(x.leaves(), chunk_rows=3)
        assert sum(flops) == 2 * 8 * 16 * (4 + 6)
        assert not loss.requires_grad
        assert torch.equal(loss, expected)
    with torch.no_grad():  # where a teacher may have parameters
        head = x.teacher_weight.clone().requires_grad_()
        assert torch.equal(ours(x._replace(teacher_weight=head), chunk_rows=3), expected)
    assert not ours(x).requires_grad


def test_without_the_soft_part_the_teacher_is_not_asked(flops: list[int]) -> None:
    ours(make(8, 16, 4, 6), kd_weight=0.0)
    assert sum(flops) == 2 * 8 * 16 * 4


def test_inputs_are_left_alone(backend: str) -> None:
    x = make(9, 33, 5, 7, ignored=0.3)
    weights = {"class_weight": torch.linspace(0.5, 2, 33), "row_weight": torch.rand(9)}
    kept = [t.clone() for t in (*x, *weights.values())]
    run(ours, x, chunk_rows=4, **weights)
    for tensor, copy in zip((*x, *weights.values()), kept, strict=True):
        assert torch.equal(tensor, copy)


def test_second_backward_says_so() -> None:
    loss = ours(make(9, 33, 5, 7).leaves())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"linear_kd_loss: backward was called a second .*again"):
        loss.backward()


def test_losses_by_row_may_go_back_twice() -> None:
    leaves = make(9, 33, 5, 7).leaves()
    loss = ours(leaves, reduction="none", chunk_rows=4)
    loss.sum().backward(retain_graph=True)
    once = [g.clone() for g in leaves.grads()]
    loss.sum().backward()
    for grad, first in zip(leaves.grads(), once, strict=True):
        torch.testing.assert_close(grad, 2 * first)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_second_derivative_is_refused(reduction: str) -> None:
    leaves = make(9, 33, 5, 7).leaves()
    loss = ours(leaves, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, leaves.student_weight, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.square().sum(), leaves.student_weight)


# --- around it: compiler, transforms, autocast, checkpoints


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, reduction: int) -> None:
    x = make(5, 7, 3, 4, dtype)
    options = (4.0, 0.1, 0.9, 0, 0.5, IGNORE, 0.0, reduction, 2, dtype, torch.float32)
    for needs in ((False,) * 3, (True,) * 3, (False, True, False)):
        if reduction or not any(needs):
            arguments = (*x, torch.rand(7), None, *options, needs)
            torch.library.opcheck(torch.ops.fastxkd.linear_kd_loss.default, arguments)


# Dynamo makes an instance of every autograd.Function that it traces, inductor uses torch.jit.
by_dynamo = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@by_dynamo
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiles_as_one_graph(compiler: str, reduction: str) -> None:
    torch._dynamo.reset()
    x = make(9, 33, 12, 7, torch.float32, ignored=0.3)
    layer, head = torch.nn.Linear(5, 12), torch.nn.Linear(12, 33)

    def step(images: Tensor) -> Tensor:
        inputs = x._replace(
            student_hidden=layer(images), student_weight=head.weight, student_bias=head.bias
        )
        return (2 * ours(inputs, temperature=2.5, reduction=reduction, chunk_rows=4)).sum()

    parameters = [*layer.parameters(), *head.parameters()]
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for seed in range(2):
        images = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed))
        expected = step(images)
        loss = compiled(images)
        torch.testing.assert_close(loss, expected)
        for found in zip(
            torch.autograd.grad(loss, parameters),
            torch.autograd.grad(expected, parameters),
            strict=True,
        ):
            torch.testing.assert_close(*found)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), expected.detach())


@by_dynamo
def test_compiles_with_dynamic_rows_under_autocast() -> None:
    torch._dynamo.reset()

    def step(x: Inputs) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ours(x, chunk_rows=4)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 9, 17):
        x = make(rows, 33, 5, 7, torch.float32)
        for found, expected in zip(run(compiled, x)[1], run(step, x)[1], strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_func_grad(backend: str, reduction: str) -> None:
    x = make(9, 33, 5, 7)

    def loss(*student: Tensor) -> Tensor:
        return ours(Inputs(*student, *x[3:]), chunk_rows=4, reduction=reduction).sum()

    found = torch.func.grad(loss, argnums=(0, 1, 2))(*x[:3])
    _, grads = run(eager, x, None if reduction != "none" else torch.ones(9), reduction=reduction)
    torch.testing.assert_close(list(found), grads, rtol=1e-12, atol=1e-14)
    (only,) = torch.func.grad(loss, argnums=(1,))(*x[:3])
    torch.testing.assert_close(only, grads[1], rtol=1e-12, atol=1e-14)


# The weighted sum of rows goes back through the operator, which torch runs slice by slice.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_vmap_of_gradients(reduction: str) -> None:
    """A gradient for each sample's own rows: the head is shared."""
    x = make(18, 8, 5, 7)

    def loss(weight: Tensor, hidden: Tensor, guidance: Tensor, labels: Tensor) -> Tensor:
        inputs = Inputs(hidden, weight, None, guidance, x.teacher_weight, None, labels)
        return ours(inputs, chunk_rows=4, reduction=reduction).sum()

    batch = (x.student_hidden.view(3, 6, 5), x.teacher_hidden.view(3, 6, 7), x.labels.view(3, 6))
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(
        x.student_weight, *batch
    )
    for grad, hidden, guidance, labels in zip(found, *batch, strict=True):
        weight = x.student_weight.clone().requires_grad_()
        loss(weight, hidden, guidance, labels).backward()
        torch.testing.assert_close(grad, weight.grad)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_autocast(backend: str, reduction: str) -> None:
    """Products in bfloat16, sums and the parameters' gradients in float32."""
    x = make(40, 33, 12, 7, torch.float32)
    parameters = x._replace(student_hidden=x.student_hidden.bfloat16())
    upstream = torch.ones(40) if reduction == "none" else None

    def mixed(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(y: Inputs, **options: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return loss(y, **options)

        return call

    _, true = run(eager, x.of(Tensor.double), upstream, reduction=reduction)
    for inputs in (x, parameters):
        loss, grads = run(mixed(ours), inputs, upstream, reduction=reduction, chunk_rows=16)
        # The oracle does not mix dtypes by row; the sum's gradients are the same.
        how = "sum" if reduction == "none" else reduction
        _, usual = run(mixed(eager), inputs, reduction=how)
        assert loss.dtype == torch.float32
        assert [g.dtype for g in grads] == [t.dtype for t in inputs[:3]]
        for grad, exact, other in zip(grads, true, usual, strict=True):
            off, usual_off = (grad.double() - exact).norm(), (other.double() - exact).norm()
            assert off <= usual_off + 1e-6 * exact.norm()
            assert off > 1e-4 * exact.norm()  # it was bfloat16 indeed
    with torch.autocast("cpu", torch.bfloat16):  # leaves float64 alone
        check(make(9, 33, 5, 7))


def test_checkpoint() -> None:
    x = make(9, 33, 5, 7)

    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        inputs = Inputs(hidden.tanh(), weight, bias, *x[3:])
        return ours(inputs, chunk_rows=4)

    found = []
    for call in (step, lambda *leaves: checkpoint(step, *leaves, use_reentrant=False)):
        leaves = x.leaves()
        loss = call(*leaves[:3])
        loss.backward()
        found.append((loss.detach(), leaves.grads()))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


# --- memory


@pytest.mark.parametrize("chunk", [8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_that_of_the_gradients_and_a_chunk(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "BLOCK", 1 << 12)  # as small beside the rest as it is in use
    rows, classes, width = 1024, 2000, 64
    x = make(rows, classes, width, width, dtype, bias=False)

    def step(loss: Callable[..., Tensor], **options: Any) -> None:
        student = [t.detach().requires_grad_() for t in x[:2]]
        loss(Inputs(*student, *x[2:]), **options).backward()

    peak = oracles.peak_bytes(lambda: step(ours, chunk_rows=chunk))
    usual = oracles.peak_bytes(lambda: step(eager))
    # Of bfloat16: the sum in float32 and, at last, the result.
    weight = classes * width * (4 if dtype == torch.float32 else 4 + 2)
    # The C++ kernel puts a chunk's gradient where the student's logits were.
    held = 2 if fastxkd.backends()[0].kernel == "cpu" else 3
    own = rows * width * dtype.itemsize + weight + held * chunk * classes * dtype.itemsize
    assert 0.9 * own <= peak <= 1.1 * own
    assert peak < usual / 8


# --- wrong input


X = make(4, 10, 3, 5, torch.float32)
G = torch.zeros(1, requires_grad=True)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no tensor": (
        lambda: ours(X._replace(student_hidden=[1.0])),
        TypeError,
        "student_hidden: expected a Tensor, got list",
    ),
    "no weight": (
        lambda: ours(X._replace(teacher_weight=None)),
        TypeError,
        "teacher_weight: expected a Tensor, got NoneType",
    ),
    "no optional tensor": (
        lambda: ours(X._replace(student_bias=0.0)),
        TypeError,
        "student_bias: expected a Tensor or None, got float",
    ),
    "class weight as a list": (
        lambda: ours(X, class_weight=[1.0] * 10),
        TypeError,
        "class_weight: expected a Tensor or None, got list",
    ),
    "one dimension": (
        lambda: ours(X._replace(student_hidden=torch.zeros(3))),
        ValueError,
        r"student_hidden: expected \[..., rows, width\], got shape \[3\]",
    ),
    "weight of one dimension": (
        lambda: ours(X._replace(student_weight=torch.zeros(3))),
        ValueError,
        r"student_weight: expected \[classes, width\] with at least one of each, got shape \[3\]",
    ),
    "no classes": (
        lambda: ours(X._replace(teacher_weight=torch.zeros(0, 5))),
        ValueError,
        r"teacher_weight: expected \[classes, width\] with at least one of each, got shape \[0, 5",
    ),
    "widths": (
        lambda: ours(X._replace(student_hidden=torch.zeros(4, 5))),
        ValueError,
        r"student_hidden: expected \[4, 3\], of student_hidden \[4, 5\] and student_weight"
        r" \[10, 3\], got \[4, 5\]",
    ),
    "classes": (
        lambda: ours(X._replace(teacher_weight=torch.zeros(11, 5))),
        ValueError,
        r"teacher_weight: expected \[10, 5\], .* got \[11, 5\]",
    ),
    "rows": (
        lambda: ours(X._replace(teacher_hidden=torch.zeros(5, 5))),
        ValueError,
        r"teacher_hidden: expected \[4, 5\], of .* teacher_weight \[10, 5\], got \[5, 5\]",
    ),
    "student bias": (
        lambda: ours(X._replace(student_bias=torch.zeros(9))),
        ValueError,
        r"student_bias: expected \[10\], .* got \[9\]",
    ),
    "teacher bias": (
        lambda: ours(X._replace(teacher_bias=torch.zeros(10, 1))),
        ValueError,
        r"teacher_bias: expected \[10\], .* got \[10, 1\]",
    ),
    "labels' shape": (
        lambda: ours(X._replace(labels=torch.zeros(5, dtype=torch.int64))),
        ValueError,
        r"labels: expected \[4\], .* got \[5\]",
    ),
    "class weight's shape": (
        lambda: ours(X, class_weight=torch.zeros(3)),
        ValueError,
        r"class_weight: expected \[10\], .* got \[3\]",
    ),
    "row weight's shape": (
        lambda: ours(X, row_weight=torch.zeros(3)),
        ValueError,
        r"row_weight: expected \[4\], .* got \[3\]",
    ),
    "labels' dtype": (
        lambda: ours(X._replace(labels=torch.zeros(4))),
        TypeError,
        "labels: expected torch.int64 class indices, got torch.float32",
    ),
    "a label outside": (
        lambda: ours(X._replace(labels=torch.tensor([0, 1, 10, 2])), chunk_rows=1),
        ValueError,
        r"labels: expected 0 <= label < 10 \(the rows of student_weight\) or ignore_index -100,"
        " got 10 at position 2",
    ),
    "a label below": (
        lambda: ours(X._replace(labels=torch.tensor([0, -1, 1, 2])), reduction="sum"),
        ValueError,
        "labels: .* got -1 at position 1",
    ),
    "integers": (
        lambda: ours(X._replace(student_hidden=torch.zeros(4, 3, dtype=torch.int64))),
        TypeError,
        "student_hidden: expected a floating-point dtype, got torch.int64",
    ),
    "row weight of integers": (
        lambda: ours(X, row_weight=torch.ones(4, dtype=torch.int64)),
        TypeError,
        "row_weight: expected a floating-point dtype, got torch.int64",
    ),
    "dtypes": (
        lambda: ours(X._replace(teacher_hidden=X.teacher_hidden.half())),
        TypeError,
        "teacher_hidden: expected the dtype of student_hidden, torch.float32, got torch.float16",
    ),
    "devices": (
        lambda: ours(X._replace(student_weight=torch.zeros(10, 3, device="meta"))),
        ValueError,
        "student_weight: expected the device of student_hidden, cpu, got meta",
    ),
    **{
        f"{name} with gradient": (
            lambda name=name: ours(X._replace(**{name: getattr(X, name) + G})),
            ValueError,
            rf"{name}: expected a tensor without gradient, .*pass {name}.detach\(\)",
        )
        for name in ("teacher_hidden", "teacher_weight", "teacher_bias")
    },
    "row weight with gradient": (
        lambda: ours(X, row_weight=torch.ones(4) + G),
        ValueError,
        "row_weight: expected a tensor without gradient",
    ),
    "class weight with gradient": (
        lambda: ours(X, class_weight=torch.ones(10) + G),
        ValueError,
        "class_weight: expected a tensor without gradient",
    ),
    "no rows to average": (
        lambda: ours(make(0, 10, 3, 5)),
        ValueError,
        r"student_hidden: expected at least one row to take a mean of, got none in \[0\]",
    ),
    "temperature": (
        lambda: ours(X, temperature=0.0),
        ValueError,
        "temperature: expected a finite number above 0, got 0.0",
    ),
    "ce_weight": (
        lambda: ours(X, ce_weight=-1.0),
        ValueError,
        "ce_weight: expected a finite number of at least 0, got -1.0",
    ),
    "kd_weight": (
        lambda: ours(X, kd_weight=float("nan")),
        ValueError,
        "kd_weight: expected a finite number of at least 0, got nan",
    ),
    "divergence": (
        lambda: ours(X, divergence="dkd"),
        ValueError,
        "divergence: expected one of forward_kl, reverse_kl, jsd, tvd, got 'dkd'",
    ),
    "beta": (
        lambda: ours(X, divergence="jsd", beta=1.5),
        ValueError,
        r"beta: expected the teacher's share, a number in \[0, 1\], got 1.5",
    ),
    "label smoothing": (
        lambda: ours(X, label_smoothing=2.0),
        ValueError,
        r"label_smoothing: expected a number in \[0, 1\], got 2.0",
    ),
    "reduction": (
        lambda: ours(X, reduction="mean"),
        ValueError,
        "reduction: expected one of none, sum, batchmean, got 'mean'",
    ),
    "chunk of nothing": (
        lambda: ours(X, chunk_rows=0),
        ValueError,
        "chunk_rows: expected at least 1, got 0",
    ),
    "half a chunk": (
        lambda: ours(X, chunk_rows=2.5),
        TypeError,
        "chunk_rows: expected an int or None, got float",
    ),
    "accumulate_dtype": (
        lambda: ours(X, accumulate_dtype=torch.bfloat16),
        ValueError,
        "accumulate_dtype: expected torch.float32, got torch.bfloat16",
    ),
    "accumulate_dtype in words": (
        lambda: ours(X, accumulate_dtype="float32"),
        TypeError,
        "accumulate_dtype: expected a torch.dtype or None, got str",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case: str) -> None:
    call, kind, text = WRONG[case]
    with pytest.raises(kind, match=text):
        call()


def test_benchmark_cases() -> None:
    case = benchmark.case(12, 8, 30, torch.float32)
    for call in case.variants.values():
        call()
    assert "gradient by" in case.notes()["ours"]
    x = make(12, 30, 8, 8, bias=False)
    inputs = [x.student_hidden, x.student_weight, x.teacher_hidden, x.teacher_weight, x.labels]
    losses = [f(*inputs) for f in (benchmark.eager, benchmark.on_logits, benchmark.ours)]
    torch.testing.assert_close(losses[0], losses[2])
    torch.testing.assert_close(losses[1], losses[2])
    for quick in (True, False):
        assert benchmark.specs(quick)
