"""kd_loss against autograd in float64, on every backend."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastxkd
from tests import oracles

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1), (3, 2), (7, 33), (128, 100), (41, 1271), (256, 1000)]
INF = float("inf")
# The sanitizers' build is not the one that ships: unoptimised, it rounds in another order. The
# tests then look for memory errors, and this only keeps the numbers sane.
SLACK = 1e-5 if os.environ.get("FASTXKD_SANITIZE") == "1" else 1e-6
# Nor does it fuse multiplications with additions, which keeps the digits of logits far from 0.
FAR = 500.0 if os.environ.get("FASTXKD_SANITIZE") == "1" else 1e4
IGNORE = -100
# What the bare operator takes between class_weight and reduction, at the defaults.
REST = (None, None, [], 0, 4.0, 0.1, 0.9, 0, 0.0, 0.5, -100)

# name -> keyword arguments of the loss, and keyword arguments of logits()
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{f"T={t}": ({"temperature": t}, {}) for t in (0.5, 1.0, 2.0, 3.0, 4.0, 7.3, 20.0)},
    **{f"T={t}, scale 10": ({"temperature": t}, {"scale": 10}) for t in (0.5, 1.0, 4.0, 7.3)},
    "no labels": ({}, {"labels": None}),
    "only hard": ({"kd_weight": 0.0, "ce_weight": 1.0}, {}),
    "only hard, T off the powers": ({"kd_weight": 0.0, "temperature": 2.5}, {}),
    "only soft": ({"ce_weight": 0.0, "kd_weight": 1.0}, {}),
    "both weights 0": ({"ce_weight": 0.0, "kd_weight": 0.0}, {}),
    "ignore some": ({}, {"ignored": 0.4}),
    "ignore some, hard only": ({"kd_weight": 0.0}, {"ignored": 0.4}),
    "ignore_index is a class": ({"ignore_index": 1}, {}),
    "label smoothing": ({"label_smoothing": 0.1}, {}),
    "label smoothing 1": ({"label_smoothing": 1.0}, {"ignored": 0.3}),
    "class weight": ({"class_weight": True}, {}),
    "class weight, smoothing, ignore": (
        {"class_weight": True, "label_smoothing": 0.2, "temperature": 2.5},
        {"ignored": 0.3},
    ),
    "sum": ({"reduction": "sum"}, {"ignored": 0.3}),
    "sum, class weight": ({"reduction": "sum", "class_weight": True}, {}),
    "none": ({"reduction": "none"}, {"ignored": 0.3}),
    "none, class weight": ({"reduction": "none", "class_weight": True}, {}),
    "masked in both": ({}, {"mask": "both"}),
    "masked in both, T=1": ({"temperature": 1.0}, {"mask": "both"}),
    "masked in teacher": ({"temperature": 2.0}, {"mask": "teacher"}),
    "peaked, right": ({}, {"peak": 30.0}),
    "peaked, wrong": ({}, {"peak": -30.0}),
    "peaked, T=1": ({"temperature": 1.0}, {"peak": 60.0}),
    "offset": ({}, {"offset": 100.0}),
}


def logits(
    rows: int,
    classes: int,
    dtype: torch.dtype,
    *,
    scale: float = 1,
    ignored: float = 0,
    mask: str = "",
    peak: float = 0,
    offset: float = 0,
    labels: Any = "random",
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(rows * 7919 + classes)
    student = scale * torch.randn(rows, classes, generator=generator) + offset
    teacher = scale * torch.randn(rows, classes, generator=generator)
    y = torch.randint(classes, (rows,), generator=generator)
    if peak:
        student[torch.arange(rows), y] += abs(peak)
        teacher[torch.arange(rows), y if peak > 0 else (y + 1) % classes] += abs(peak)
    if mask:
        gone = (y + 1) % classes
        teacher[torch.arange(rows), gone] = -INF
        if mask == "both":
            student[torch.arange(rows), gone] = -INF
    y[torch.rand(rows, generator=generator) < ignored] = IGNORE
    return student.to(dtype), teacher.to(dtype), None if labels is None else y


def oracle(
    student: Tensor, teacher: Tensor, labels: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(loss, gradient) by autograd, in the dtype of the logits."""
    leaf = student.detach().clone().requires_grad_(True)
    hard, soft = oracles.kd_parts(leaf, teacher, labels, **options)
    loss = hard + soft
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def terms(rows: int, options: dict[str, Any]) -> float:
    """Size of what the gradient is the difference of: a scale where they cancel to nothing."""
    parts = options["alpha"] + options["beta"] if options.get("divergence") == "dkd" else 1
    row = options.get("ce_weight", 0.1) + options.get("kd_weight", 0.9) * parts * options.get(
        "temperature", 4.0
    )
    batchmean = options.get("reduction", "batchmean") == "batchmean"
    return row * rows**0.5 / (rows if batchmean else 1) + 1e-30


def call(
    student: Tensor, teacher: Tensor, labels: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """The library's loss, by the oracle's names of the options."""
    options = dict(options)
    if options.get("divergence") != "dkd":
        return fastxkd.kd_loss(student, teacher, labels, **options)
    del options["divergence"]
    weights = {"target_weight": options.pop("alpha"), "others_weight": options.pop("beta")}
    return fastxkd.dkd_loss(
        student, teacher, labels, **{"ce_weight": 0.1, "kd_weight": 0.9, **options, **weights}
    )


def by_row(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "reduction": "none"}


def check(
    student: Tensor, teacher: Tensor, labels: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The library's error may exceed eager's of the same dtype by rounding of the last digit."""
    leaf = student.detach().requires_grad_(True)
    loss = call(leaf, teacher, labels, options)
    loss.sum().backward()
    assert leaf.grad is not None
    grad = leaf.grad
    exact_dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    assert loss.dtype == exact_dtype
    assert grad.dtype == student.dtype
    assert grad.shape == student.shape

    true_loss, true_grad = oracle(student.double(), teacher.double(), labels, options)
    eager_loss, eager_grad = oracle(student, teacher, labels, options)
    eps = 1e-12 if student.dtype == torch.float64 else SLACK
    # Errors of single rows, in quadrature: in eager's own sum they may cancel by luck.
    rows_true = sum(oracles.kd_parts(student.double(), teacher.double(), labels, **by_row(options)))
    rows_eager = sum(oracles.kd_parts(student, teacher, labels, **by_row(options)))
    luckless = (rows_eager.double() - rows_true).norm()
    if options.get("reduction", "batchmean") == "batchmean":
        luckless /= student.shape[0]
    off = (loss.detach().double() - true_loss).norm()
    eager_off = (eager_loss.double() - true_loss).norm()
    # The decoupled loss is several divergences, with weights of their own.
    unit = options["alpha"] + options["beta"] if options.get("divergence") == "dkd" else 1
    assert off <= max(eager_off, luckless) + eps * max(true_loss.norm(), unit)

    norm = max(true_grad.norm(), 0.1 * terms(student.shape[0], options))
    grad_off = (grad.double() - true_grad).norm()
    eager_grad_off = (eager_grad.double() - true_grad).norm()
    assert grad_off / norm <= eager_grad_off / norm + eps
    if student.dtype in (torch.bfloat16, torch.float16):
        rounding = (true_grad.to(student.dtype).double() - true_grad).norm()
        assert grad_off <= 1.2 * rounding + eps * norm
    return loss.detach(), grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(backend: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check(*logits(*shape, dtype), {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_float64_on_a_vocabulary(backend: str, dtype: torch.dtype) -> None:
    check(*logits(16, 32000, dtype, ignored=0.2), {"temperature": 2.5})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(backend: str, dtype: torch.dtype, case: str) -> None:
    options, how = CASES[case]
    options = dict(options)
    if options.pop("class_weight", False):
        options["class_weight"] = torch.linspace(0, 2, 33)
    check(*logits(9, 33, dtype, **how), options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    """Strided rows, expanded rows and transposed memory give what contiguous copies give."""
    student, teacher, labels = logits(7, 33, dtype)
    wide = torch.full((7, 50), float("nan"), dtype=dtype)
    wide[:, 3:36] = student
    transposed = teacher.T.contiguous().T
    assert wide[:, 3:36].stride() == (50, 1)
    assert transposed.stride() == (1, 7)
    loss, grad = check(wide[:, 3:36], transposed, labels, {})
    same_loss, same_grad = check(student, teacher, labels, {})
    assert torch.equal(loss, same_loss)
    assert torch.equal(grad, same_grad)
    assert grad.is_contiguous()

    row = student[:1].clone().requires_grad_(True)
    fastxkd.kd_loss(row.expand(7, 33), teacher[:1].expand(7, 33), labels).backward()
    copy = student[:1].clone().requires_grad_(True)
    fastxkd.kd_loss(copy.repeat(7, 1), teacher[:1].repeat(7, 1), labels).backward()
    assert torch.equal(row.grad, copy.grad)

    every_other = torch.stack([student, -student], 2).flatten(1)[:, ::2]
    assert every_other.stride(1) == 2
    assert torch.equal(check(every_other, teacher, labels, {})[1], same_grad)


@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_teacher_of_another_dtype(backend: str, dtype: torch.dtype, given: torch.dtype) -> None:
    """Nothing of the teacher's digits is lost before the sums."""
    student, _, labels = logits(9, 33, dtype)
    _, teacher, _ = logits(9, 33, given)
    if given == torch.float64 and dtype != given:
        with pytest.raises(TypeError, match="at most float32, got torch"):
            fastxkd.kd_loss(student, teacher, labels)
        return
    leaf = student.clone().requires_grad_(True)
    loss = fastxkd.kd_loss(leaf, teacher, labels)
    loss.backward()
    exact, grad = oracle(student.double(), teacher.double(), labels, {})
    eps = 1e-12 if dtype == torch.float64 else 1e-6
    wide = torch.promote_types(dtype, torch.float32)
    eager, _ = oracle(student.to(wide), teacher.to(wide), labels, {})
    assert abs(loss.item() - exact) <= abs(eager.item() - exact) + eps * exact
    rounding = (grad.to(dtype).double() - grad).norm()
    assert (leaf.grad.double() - grad).norm() <= 1.2 * rounding + eps * terms(9, {})


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_rows(backend: str, reduction: str) -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    loss = fastxkd.kd_loss(student, torch.zeros(0, 5), labels, reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    loss.sum().backward()
    assert loss.sum().item() == 0
    assert student.grad is not None
    assert student.grad.shape == (0, 5)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_rows_ignored(backend: str, dtype: torch.dtype, reduction: str) -> None:
    student = torch.full((4, 6), float("nan"), dtype=dtype, requires_grad=True)
    labels = torch.full((4,), IGNORE)
    parts = fastxkd.kd_loss(
        student, student.detach(), labels, reduction=reduction, return_parts=True
    )
    parts.loss.sum().backward()
    for value in (*parts, student.grad):
        assert not value.any()


def test_ignored_rows_may_hold_anything(backend: str) -> None:
    student, teacher, labels = logits(12, 33, torch.float32, ignored=0.5)
    assert labels is not None
    gone = labels == IGNORE
    assert 0 < gone.sum() < 12
    loss, grad = check(student, teacher, labels, {})
    student[gone], teacher[gone] = float("nan"), INF
    leaf = student.requires_grad_(True)
    dirty = fastxkd.kd_loss(leaf, teacher, labels)
    dirty.backward()
    assert torch.equal(dirty, loss)
    assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("bad", [float("nan"), INF], ids=str)
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bad_value_stays_in_its_row(
    backend: str, dtype: torch.dtype, whose: str, bad: float
) -> None:
    student, teacher, labels = logits(8, 33, dtype)
    _, clean = check(student, teacher, labels, {"reduction": "none"})
    (student if whose == "student" else teacher)[3, 5] = bad
    leaf = student.requires_grad_(True)
    loss = fastxkd.kd_loss(leaf, teacher, labels, reduction="none")
    loss.sum().backward()
    rest = torch.arange(8) != 3
    assert loss[3].isnan()
    assert loss[rest].isfinite().all()
    assert leaf.grad[3].isnan().all()
    assert torch.equal(leaf.grad[rest], clean[rest])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd", "dkd"])
@pytest.mark.parametrize("temperature", [1.0, 2.5, 4.0])
def test_logits_far_apart(backend: str, temperature: float, divergence: str) -> None:
    """Whatever the first logits of a row say of where it lies, the others say otherwise."""
    student, teacher, labels = logits(12, 100, torch.float32)
    for row, far in enumerate((-FAR, -200.0, -90.0, 90.0, 200.0, FAR)):
        student[2 * row, :20] += far
        teacher[2 * row, :20] += far
        student[2 * row + 1, 20:] += far
        teacher[2 * row + 1, 20:] += far
    options: dict[str, Any] = {"temperature": temperature, "divergence": divergence}
    if divergence == "dkd":
        options.update(alpha=1.0, beta=8.0)
    check(student, teacher, labels, options)


@pytest.mark.parametrize("far", [1e10, -1e10, torch.finfo(torch.float32).min], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 4.0, 2.5])
def test_rows_far_from_0(backend: str, temperature: float, far: float) -> None:
    """A row all masked with a large number instead of -inf: a softmax does not see the shift."""
    student, teacher, labels = logits(4, 100, torch.float32)
    student[1], teacher[1] = far, far
    student[2], teacher[2] = far, far
    student[2, 7] = teacher[2, 7] = far / 2
    leaf = student.requires_grad_(True)
    rows = fastxkd.kd_loss(leaf, teacher, labels, temperature=temperature, reduction="none")
    rows.sum().backward()
    options = by_row({"temperature": temperature})
    exact, slopes = oracle(leaf.detach().double(), teacher.double(), labels, options)
    torch.testing.assert_close(rows.detach().double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), slopes, rtol=1e-5, atol=1e-6)


def test_a_temperature_near_0(backend: str) -> None:
    student, teacher, labels = logits(4, 33, torch.float32, scale=3000)
    rows = fastxkd.kd_loss(student, teacher, labels, temperature=1e-6, reduction="none")
    exact = fastxkd.kd_loss(
        student.double(), teacher.double(), labels, temperature=1e-6, reduction="none"
    )
    torch.testing.assert_close(rows.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd", "dkd"])
def test_float16_gradients_outlive_the_mean(backend: str, divergence: str) -> None:
    """A GradScaler multiplies the loss so that small gradients survive; most of these would be
    lost in float16 before its factor came back."""
    student, teacher, labels = logits(64, 4000, torch.float16)
    options: dict[str, Any] = {"divergence": divergence}
    if divergence == "dkd":
        options.update(alpha=1.0, beta=8.0)
    leaf = student.requires_grad_(True)
    (65536 * call(leaf, teacher, labels, options)).backward()
    assert leaf.grad is not None
    _, exact = oracle(leaf.detach().double(), teacher.double(), labels, options)
    exact = 65536 * exact
    rounding = (exact.half().double() - exact).norm()
    assert (leaf.grad.double() - exact).norm() <= 1.2 * rounding + 1e-6 * exact.norm()


def test_class_masked_in_student_only_is_infinite(backend: str) -> None:
    """The teacher gives a class probability that the student cannot have: KL is infinite."""
    student, teacher, _ = logits(4, 8, torch.float32)
    student[2, 1] = -INF
    rows = fastxkd.kd_loss(student, teacher, reduction="none")
    assert rows[2] == INF
    assert rows[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@pytest.mark.parametrize("lead", [(2, 5), (2, 3, 2), (4,)], ids=str)
def test_leading_dimensions(backend: str, lead: tuple[int, ...], reduction: str) -> None:
    rows = torch.Size(lead).numel()
    student, teacher, labels = logits(rows, 33, torch.float32, ignored=0.2)
    assert labels is not None
    leaf = student.reshape(*lead, 33).requires_grad_(True)
    parts = fastxkd.kd_loss(
        leaf,
        teacher.reshape(*lead, 33),
        labels.reshape(lead),
        reduction=reduction,
        return_parts=True,
    )
    parts.loss.sum().backward()
    loss, grad = check(student, teacher, labels, {"reduction": reduction})
    shape = lead if reduction == "none" else ()
    assert all(value.shape == shape for value in parts)
    assert torch.equal(parts.loss.flatten(), loss.flatten())
    assert torch.equal(leaf.grad.flatten(0, -2), grad)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_parts(backend: str, reduction: str) -> None:
    student, teacher, labels = logits(9, 33, torch.float64, ignored=0.3)
    options = {"reduction": reduction, "class_weight": torch.linspace(0.5, 2, 33)}
    hard, soft = oracles.kd_parts(student, teacher, labels, **options)
    parts = fastxkd.kd_loss(
        student.requires_grad_(True), teacher, labels, **options, return_parts=True
    )
    assert isinstance(parts, fastxkd.KDLossParts)
    torch.testing.assert_close(parts.hard, hard, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(parts.soft, soft, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(parts.loss, hard + soft, rtol=1e-12, atol=1e-14)
    assert parts.loss.requires_grad
    assert not parts.hard.requires_grad
    assert not parts.soft.requires_grad


def test_module_is_the_function(backend: str) -> None:
    student, teacher, labels = logits(9, 33, torch.float32, ignored=0.3)
    options = {
        "temperature": 2.5,
        "ce_weight": 0.3,
        "kd_weight": 0.6,
        "ignore_index": 5,
        "label_smoothing": 0.1,
        "class_weight": torch.linspace(0.5, 2, 33),
        "reduction": "sum",
        "return_parts": True,
    }
    labels = labels.where(labels != IGNORE, 5)
    module = fastxkd.KDLoss(**options)
    assert "class_weight" in module.state_dict()
    found = module(student, teacher, labels)
    for value, expected in zip(
        found, fastxkd.kd_loss(student, teacher, labels, **options), strict=True
    ):
        assert torch.equal(value, expected)
    # Every option reaches the loss: taking one away changes the value.
    defaults = fastxkd.KDLoss()
    for name in set(options) - {"return_parts"}:
        other = fastxkd.KDLoss(**{**options, name: getattr(defaults, name)})
        if name == "ignore_index":
            other.ignore_index = 6
        assert other(student, teacher, labels).loss != found.loss, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_upstream_gradient(backend: str, dtype: torch.dtype, reduction: str) -> None:
    student, teacher, labels = logits(40, 1000, dtype)
    shape = (40,) if reduction == "none" else ()
    upstream = torch.rand(shape, dtype=torch.float64) + 0.5
    leaf = student.clone().requires_grad_(True)
    loss = fastxkd.kd_loss(leaf, teacher, labels, reduction=reduction)
    loss.backward(upstream.to(loss.dtype))
    exact = student.double().requires_grad_(True)
    sum(oracles.kd_parts(exact, teacher.double(), labels, reduction=reduction)).backward(upstream)
    # Rounded once by the forward pass and once by the scaling.
    limit = 2.5 * (exact.grad.to(dtype).double() - exact.grad).norm()
    limit += (1e-6 if dtype != torch.float64 else 1e-13) * exact.grad.norm()
    assert (leaf.grad.double() - exact.grad).norm() <= limit


def test_upstream_reaches_through_a_sum_of_losses(backend: str) -> None:
    student, teacher, labels = logits(9, 33, torch.float64)
    leaf = student.requires_grad_(True)
    (3 * fastxkd.kd_loss(leaf, teacher, labels) + leaf.square().sum()).backward()
    _, grad = oracle(student, teacher, labels, {})
    torch.testing.assert_close(leaf.grad, 3 * grad + 2 * student.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_left_alone(backend: str, dtype: torch.dtype) -> None:
    student, teacher, labels = logits(9, 33, dtype, ignored=0.3)
    weight = torch.linspace(0.5, 2, 33)
    before = [x.clone() for x in (student, teacher, labels, weight)]
    leaf = student.requires_grad_(True)
    upstream = torch.full((9,), 3.0, dtype=torch.float64 if dtype == torch.float64 else None)
    loss = fastxkd.kd_loss(leaf, teacher, labels, class_weight=weight, reduction="none")
    loss.backward(upstream)
    for x, copy in zip((student, teacher, labels, weight), before, strict=True):
        assert torch.equal(x, copy)
    assert (upstream == 3).all()
    assert leaf.grad.data_ptr() != leaf.data_ptr()


def test_second_backward_says_so(backend: str) -> None:
    student, teacher, labels = logits(9, 33, torch.float32)
    loss = fastxkd.kd_loss(student.requires_grad_(True), teacher, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"kd_loss: backward was called a second time.*again"):
        loss.backward()


def test_second_derivative_is_refused(backend: str) -> None:
    student, teacher, labels = logits(9, 33, torch.float32)
    leaf = student.requires_grad_(True)
    loss = fastxkd.kd_loss(leaf, teacher, labels)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.square().sum(), leaf)


def test_evaluation_builds_no_gradient(backend: str) -> None:
    student, teacher, labels = logits(9, 33, torch.float32)
    expected, _ = check(student, teacher, labels, {})
    leaf = student.requires_grad_(True)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            loss = fastxkd.kd_loss(leaf, teacher, labels)
        assert not loss.requires_grad
        assert torch.equal(loss, expected)
    detached = student.detach()
    assert not fastxkd.kd_loss(detached, teacher, labels).requires_grad
    _, _, grad = torch.ops.fastxkd.kd_loss(detached, teacher, labels, None, *REST, 0.0, 2, False)
    assert grad.numel() == 0


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_finite_differences(backend: str, reduction: str) -> None:
    """gradcheck by hand: torch's runs one graph backward several times, and here once is all."""
    student, teacher, labels = logits(5, 7, torch.float64, ignored=0.3)

    def loss(x: Tensor) -> Tensor:
        return fastxkd.kd_loss(
            x, teacher, labels, label_smoothing=0.1, temperature=2.5, reduction=reduction
        )

    for seed in range(3):
        torch.manual_seed(seed)
        leaf = student.clone().requires_grad_(True)
        value = loss(leaf)
        upstream = torch.randn_like(value)
        value.backward(upstream)
        step = torch.randn_like(student)
        h = 1e-6
        numeric = (loss(student + h * step) - loss(student - h * step)) / (2 * h)
        torch.testing.assert_close(
            (leaf.grad * step).sum(), (upstream * numeric).sum(), rtol=1e-7, atol=1e-9
        )


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("need_grad", [True, False])
def test_opcheck(backend: str, reduction: int, need_grad: bool) -> None:
    student, teacher, labels = logits(5, 7, torch.float32)
    weight = torch.rand(7)
    for y, w in ((labels, weight), (labels, None), (None, None)):
        arguments = (student, teacher, y, w, *REST, 0.1, reduction, need_grad)
        torch.library.opcheck(torch.ops.fastxkd.kd_loss.default, arguments)


@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
def test_opcheck_of_the_scaling(backend: str, shape: tuple[int, ...]) -> None:
    arguments = (torch.rand(5, 7), torch.rand(shape) + 2)
    torch.library.opcheck(torch.ops.fastxkd.kd_loss_scale_.default, arguments)


# Dynamo makes an instance of every autograd.Function that it traces, inductor uses torch.jit.
by_dynamo = pytest.mark.filterwarnings("ignore::DeprecationWarning")
COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@by_dynamo
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiles_as_one_graph(compiler: str) -> None:
    torch._dynamo.reset()
    layer = torch.nn.Linear(12, 33)
    images, (_, teacher, labels) = torch.randn(9, 12), logits(9, 33, torch.float32, ignored=0.3)

    def step(x: Tensor) -> Tensor:
        return 2 * fastxkd.kd_loss(layer(x), teacher, labels, temperature=2.5)

    expected = step(images)
    grads = torch.autograd.grad(expected, list(layer.parameters()))
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for _ in range(2):
        loss = compiled(images)
        found = torch.autograd.grad(loss, list(layer.parameters()))
        torch.testing.assert_close(loss, expected)
        for a, b in zip(found, grads, strict=True):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), expected)


@by_dynamo
def test_compiles_with_dynamic_rows() -> None:
    torch._dynamo.reset()

    def step(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return fastxkd.kd_loss(s, t, y, reduction="none")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 9, 17):
        student, teacher, labels = logits(rows, 33, torch.float32)
        leaf = student.requires_grad_(True)
        compiled(leaf, teacher, labels).sum().backward()
        _, grad = oracle(student, teacher, labels, {"reduction": "none"})
        torch.testing.assert_close(leaf.grad, grad)


def test_func_grad(backend: str) -> None:
    student, teacher, labels = logits(9, 33, torch.float64)
    found = torch.func.grad(lambda s: fastxkd.kd_loss(s, teacher, labels))(student)
    _, grad = oracle(student, teacher, labels, {})
    torch.testing.assert_close(found, grad, rtol=1e-12, atol=1e-14)


def stacked() -> tuple[Tensor, Tensor, Tensor]:
    student, teacher, labels = logits(18, 8, torch.float64)
    assert labels is not None
    return student.view(3, 6, 8), teacher.view(3, 6, 8), labels.view(3, 6)


# Without a batching rule of its own the operator runs once per slice; torch says so, rightly.
def test_vmap(backend: str) -> None:
    batch = stacked()
    found = torch.func.vmap(fastxkd.kd_loss)(*batch)
    for value, student, teacher, labels in zip(found, *batch, strict=True):
        torch.testing.assert_close(value, oracle(student, teacher, labels, {})[0])


def test_vmap_of_gradients(backend: str) -> None:
    batch = stacked()
    found = torch.func.vmap(torch.func.grad(fastxkd.kd_loss))(*batch)
    for value, student, teacher, labels in zip(found, *batch, strict=True):
        torch.testing.assert_close(value, oracle(student, teacher, labels, {})[1])


def test_autocast(backend: str) -> None:
    layer = torch.nn.Linear(12, 33)
    images = torch.randn(9, 12)
    _, _, labels = logits(9, 33, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        student, teacher = layer(images), layer(-images).detach()
        loss = fastxkd.kd_loss(student, teacher, labels)
    assert student.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    (grad,) = torch.autograd.grad(loss, student)
    true_loss, true_grad = oracle(student.double().detach(), teacher.double(), labels, {})
    assert abs(loss.item() - true_loss.item()) <= 1e-6
    rounding = (true_grad.bfloat16().double() - true_grad).norm()
    assert (grad.double() - true_grad).norm() <= 1.2 * rounding


def test_checkpoint(backend: str) -> None:
    student, teacher, labels = logits(9, 33, torch.float32)
    expected, grad = check(student, teacher, labels, {})
    leaf = student.requires_grad_(True)
    leaf.grad = None

    def step(s: Tensor) -> Tensor:
        return fastxkd.kd_loss(s.tanh().atanh() * 0 + s, teacher, labels)

    loss = checkpoint(step, leaf, use_reentrant=False)
    loss.backward()
    assert torch.equal(loss.detach(), expected)
    torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_any_number_of_threads_gives_the_same_bits(backend: str, dtype: torch.dtype) -> None:
    student, teacher, labels = logits(203, 700, dtype, ignored=0.1)
    upstream = torch.tensor(0.7)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = student.clone().requires_grad_(True)
            loss = fastxkd.kd_loss(leaf, teacher, labels)
            loss.backward(upstream.to(loss.dtype))
            found.append((loss.detach(), leaf.grad))
    finally:
        torch.set_num_threads(before)
    if backend == "reference":  # torch's own reductions may split differently
        for loss, grad in found[1:]:
            torch.testing.assert_close((loss, grad), found[0])
        return
    for loss, grad in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(grad, found[0][1])


@pytest.mark.parametrize("upstream", [1.0, 2.0])
def test_one_matrix_of_memory(upstream: float) -> None:
    """Forward and backward need the gradient and nothing else of the logits' size."""
    student, teacher, labels = logits(256, 1000, torch.float32)
    unit = student.numel() * student.element_size()

    def step() -> None:
        # A leaf of its own: what the step allocates it also frees, and nothing older.
        leaf = student.detach().requires_grad_(True)
        (upstream * fastxkd.kd_loss(leaf, teacher, labels)).backward()
        assert leaf.grad is not None

    with fastxkd.use_backend("auto"):
        if fastxkd.backends()[0].kernel != "cpu":
            pytest.skip("the C++ kernels are not built")
        peak = oracles.peak_bytes(step)
    assert unit <= peak <= 1.1 * unit


def test_independent_graphs_do_not_share_a_buffer(backend: str) -> None:
    """Two losses of one student, run backward together: each gradient counts once."""
    student, teacher, labels = logits(9, 33, torch.float64)
    leaf = student.requires_grad_(True)
    first = fastxkd.kd_loss(leaf, teacher, labels)
    second = fastxkd.kd_loss(leaf, teacher, labels, temperature=2.0)
    (first + second).backward()
    grads = [oracle(student, teacher, labels, {"temperature": t})[1] for t in (4.0, 2.0)]
    torch.testing.assert_close(leaf.grad, grads[0] + grads[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 63, 65, 511, 512, 513, 1025])
@pytest.mark.parametrize("temperature", [4.0, 2.5])
def test_every_block_boundary(backend: str, temperature: float, classes: int) -> None:
    check(*logits(5, classes, torch.float32), {"temperature": temperature})
