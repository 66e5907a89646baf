"""dist_loss against autograd in float64 through Pearson's formula, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastxkd
from tests.test_kd_loss import DTYPES, IGNORE, SHAPES, SLACK, by_dynamo, logits

# name -> keyword arguments of the loss, and keyword arguments of logits()
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{f"T={t}": ({"temperature": t}, {}) for t in (0.5, 1.0, 2.0, 3.0, 4.0, 7.3, 20.0)},
    **{f"T={t}, scale 10": ({"temperature": t}, {"scale": 10}) for t in (1.0, 4.0, 7.3)},
    "scale 0.001": ({"temperature": 1.0}, {"scale": 1e-3}),
    "no labels": ({}, {"labels": None}),
    "no labels, T off the powers": ({"temperature": 2.5}, {"labels": None}),
    "only hard": ({"kd_weight": 0.0}, {"ignored": 0.3}),
    "only soft": ({"ce_weight": 0.0}, {"ignored": 0.3}),
    "only rows": ({"intra_weight": 0.0}, {}),
    "only columns": ({"inter_weight": 0.0, "intra_weight": 0.5}, {}),
    "both correlations 0": ({"inter_weight": 0.0, "intra_weight": 0.0}, {}),
    "ignore some": ({}, {"ignored": 0.4}),
    "label smoothing": ({"label_smoothing": 0.1}, {"ignored": 0.3}),
    "class weight": ({"class_weight": True, "temperature": 2.5}, {}),
    "class weight, smoothing": ({"class_weight": True, "label_smoothing": 0.2}, {}),
    "row weight": ({"row_weight": True}, {}),
    "row weight, ignore": ({"row_weight": True, "class_weight": True}, {"ignored": 0.4}),
    "masked in both": ({}, {"mask": "both"}),
    "masked in teacher": ({"temperature": 1.0}, {"mask": "teacher"}),
    "peaked, right": ({}, {"peak": 30.0}),
    "peaked, wrong": ({"temperature": 1.0}, {"peak": -30.0}),
    "offset": ({}, {"offset": 100.0}),
}


def correlations(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Pearson's along the last dimension, whose entries count as often as ``weight`` says."""
    x, y = (z - (z * weight).sum(1, keepdim=True) / weight.sum() for z in (x, y))
    norms = [(weight * z * z).sum(1).sqrt() for z in (x, y)]
    return (weight * x * y).sum(1) / (norms[0] * norms[1] + 1e-8)


def parts(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    temperature: float = 4.0,
    ce_weight: float = 1.0,
    kd_weight: float = 2.0,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    keep = torch.arange(len(student)) if labels is None else (labels != IGNORE).nonzero()[:, 0]
    s, t = student[keep], teacher[keep]
    weight = s.new_ones(len(s)) if row_weight is None else row_weight[keep].to(s.dtype)
    hard = s.new_zeros(())
    if labels is not None:
        on = None if class_weight is None else class_weight.to(s.dtype)
        y = labels[keep]
        each = F.cross_entropy(s, y, on, reduction="none", label_smoothing=label_smoothing)
        mass = weight if on is None else weight * on[y]
        hard = ce_weight * (weight * each).sum() / mass.sum()
    q, p = ((x / temperature).softmax(1) for x in (s, t))
    along_rows = correlations(q, p, q.new_ones(q.shape[1]))
    inter = 1 - (weight * along_rows).sum() / weight.sum()
    intra = 1 - correlations(q.T, p.T, weight).mean()
    return hard, kd_weight * temperature**2 * (inter_weight * inter + intra_weight * intra)


def one_digit(
    student: Tensor, teacher: Tensor, labels: Tensor | None, options: dict[str, Any]
) -> float:
    """What the last digit of a probability is to the gradient, where its row or column has little
    spread: the centred value loses |mean| / norm of its digits, in a slope of 1 / norm."""
    keep = torch.ones(len(student)) if labels is None else (labels != IGNORE).double()
    weight = keep * options.get("row_weight", torch.ones(len(student)))
    temperature = options.get("temperature", 4.0)
    q, p = ((x.double() / temperature).softmax(1)[weight > 0] for x in (student, teacher))
    weight = weight[weight > 0][:, None].double()
    size = 0.0
    for name, dim, many, by in (
        ("inter_weight", 1, weight.sum(), torch.ones_like(q)),
        ("intra_weight", 0, q.shape[1], weight.expand_as(q)),
    ):
        means = [(by * x).sum(dim, keepdim=True) / by.sum(dim, keepdim=True) for x in (q, p)]
        norms = [
            (by * (x - m) ** 2).sum(dim, keepdim=True).sqrt() + 1e-8
            for x, m in zip((q, p), means, strict=True)
        ]
        lost = sum(m / n for m, n in zip(means, norms, strict=True))
        slopes = weight * q / norms[0] * lost / many
        size += options.get(name, 1.0) * float(slopes.norm())
    eps = torch.finfo(torch.promote_types(student.dtype, torch.float32)).eps
    return eps * options.get("kd_weight", 2.0) * temperature * size


def by_autograd(
    student: Tensor, teacher: Tensor, labels: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_(True)
    loss = sum(parts(leaf, teacher, labels, **options), start=leaf.new_zeros(()))
    loss.backward()
    # The norm of nothing has no slope in torch; here it is 0.
    return loss.detach(), torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.nan_to_num()


def check(student: Tensor, teacher: Tensor, labels: Tensor | None, **options: Any) -> Tensor:
    leaf = student.detach().requires_grad_(True)
    loss = fastxkd.dist_loss(leaf, teacher, labels, **options)
    loss.backward()
    assert leaf.grad is not None
    true_loss, true_grad = by_autograd(student.double(), teacher.double(), labels, options)
    # In float16 eager's own squares underflow: its error then says nothing, float32's does.
    same = student.float() if student.dtype == torch.float16 else student
    eager_loss, eager_grad = by_autograd(same, teacher.to(same.dtype), labels, options)
    eps = 1e-12 if student.dtype == torch.float64 else SLACK
    # Correlations are of order 1, times kd_weight T^2 each.
    unit = options.get("kd_weight", 2.0) * options.get("temperature", 4.0) ** 2 + 1
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    assert abs(loss.item() - true_loss) <= abs(eager_loss.item() - true_loss) + eps * unit
    off, eager_off = ((x.double() - true_grad).norm() for x in (leaf.grad, eager_grad))
    slack = eps * max(true_grad.norm(), 0.1) + one_digit(student, teacher, labels, options)
    if student.dtype in (torch.bfloat16, torch.float16):
        rounding = (true_grad.to(student.dtype).double() - true_grad).norm()
        assert off <= 1.2 * rounding + slack
    else:
        assert off <= eager_off + slack
    return leaf.grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(backend: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check(*logits(*shape, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_float64_on_a_vocabulary(backend: str, dtype: torch.dtype) -> None:
    check(*logits(16, 32000, dtype, ignored=0.2), temperature=2.5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(backend: str, dtype: torch.dtype, case: str) -> None:
    options, how = CASES[case]
    options = dict(options)
    if options.pop("class_weight", False):
        options["class_weight"] = torch.linspace(0, 2, 33)
    if options.pop("row_weight", False):
        options["row_weight"] = torch.linspace(0, 3, 9)
    check(*logits(9, 33, dtype, **how), **options)


@pytest.mark.parametrize("shape", [(2, 2), (2, 10), (3, 16), (4, 100)], ids=str)
def test_few_rows(backend: str, shape: tuple[int, int]) -> None:
    """Columns of two or three values correlate by nearly 1 or -1, and slopes are what is left."""
    found, eager = [], []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        student, teacher = (torch.randn(shape, generator=generator) for _ in range(2))
        leaf = student.clone().requires_grad_(True)
        fastxkd.dist_loss(leaf, teacher, ce_weight=0.0).backward()
        exact = by_autograd(student.double(), teacher.double(), None, {})[1]
        eagers = by_autograd(student, teacher, None, {})[1]
        for grad, errors in ((leaf.grad, found), (eagers, eager)):
            errors.append((grad.double() - exact).norm() / exact.norm())
    ours, theirs = (
        torch.stack(x).quantile(torch.tensor([0.5, 0.9], dtype=torch.float64))
        for x in (found, eager)
    )
    # The same operations in another order; SLACK would hide what is looked for here.
    assert (ours <= 1.5 * theirs).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_and_columns_of_little_spread(backend: str, dtype: torch.dtype) -> None:
    """What is left without the mean is 1e-4 of it: raw sums of squares would lose it."""
    student, teacher, labels = logits(300, 33, dtype)
    base = torch.linspace(-2, 2, 33, dtype=dtype)
    check(base + 1e-4 * student, base + 1e-4 * teacher, labels)
    check(1e-4 * student, 1e-4 * teacher, None, temperature=1.0)


def test_a_weight_is_a_number_of_copies(backend: str) -> None:
    student, teacher, labels = logits(6, 33, torch.float64)
    assert labels is not None
    times = torch.tensor([1, 2, 0, 3, 1, 1])
    weighted = fastxkd.dist_loss(student, teacher, labels, row_weight=times.double())
    copies = (x.repeat_interleave(times, 0) for x in (student, teacher, labels))
    torch.testing.assert_close(weighted, fastxkd.dist_loss(*copies))


@pytest.mark.parametrize("form", ["probs", "log_probs", "top-k", "two teachers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_teachers_in_other_forms(backend: str, dtype: torch.dtype, form: str) -> None:
    student, teacher, labels = logits(9, 33, dtype)
    _, other, _ = logits(10, 33, dtype)
    other = other[:9]
    options: dict[str, Any] = {"teacher_form": form}
    given: Any = teacher.softmax(1) if form == "probs" else teacher.log_softmax(1)
    dense = teacher
    if form == "top-k":
        given, indices = teacher.topk(5)
        options = {"teacher_indices": indices}
        dense = torch.full_like(teacher, -torch.inf).scatter(1, indices, given)
    if form == "two teachers":
        given, options = [teacher, other], {"teacher_weights": [3, 1]}
        mixed = 0.75 * (teacher / 2).softmax(1) + 0.25 * (other / 2).softmax(1)
        dense = 2 * mixed.log()
    leaf = student.clone().requires_grad_(True)
    loss = fastxkd.dist_loss(leaf, given, labels, temperature=2.0, **options)
    loss.backward()
    exact, grad = by_autograd(student.double(), dense.double(), labels, {"temperature": 2.0})
    eps = 1e-12 if dtype == torch.float64 else 1e-6
    assert abs(loss.item() - exact) <= 16 * eps
    assert (leaf.grad.double() - grad).norm() <= 5 * eps * max(grad.norm(), 1)


def test_ignored_rows_may_hold_anything(backend: str) -> None:
    student, teacher, labels = logits(12, 33, torch.float32, ignored=0.4)
    assert labels is not None
    clean = check(student, teacher, labels)
    gone = labels == IGNORE
    assert 0 < gone.sum() < 12
    student[gone], teacher[gone] = float("nan"), float("inf")
    leaf = student.requires_grad_(True)
    fastxkd.dist_loss(leaf, teacher, labels).backward()
    assert torch.equal(leaf.grad, clean)
    leaf = torch.full((4, 6), float("nan"), requires_grad=True)
    loss = fastxkd.dist_loss(leaf, leaf.detach(), torch.full((4,), IGNORE))
    loss.backward()
    assert loss == 0
    assert not leaf.grad.any()


def test_a_bad_value_is_not_hidden(backend: str) -> None:
    student, teacher, labels = logits(12, 33, torch.float32)
    student[3, 5] = float("nan")
    leaf = student.requires_grad_(True)
    loss = fastxkd.dist_loss(leaf, teacher, labels)
    loss.backward()
    assert loss.isnan()
    assert leaf.grad[3].isnan().all()


def test_no_spread_correlates_with_nothing(backend: str) -> None:
    flat = torch.zeros(4, 6, requires_grad=True)
    teacher = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    loss = fastxkd.dist_loss(flat, teacher, temperature=1.0)
    loss.backward()
    assert loss == 4
    assert flat.grad.isfinite().all()
    one = teacher[:1].clone().requires_grad_(True)  # no column has spread
    fastxkd.dist_loss(one, teacher[1:2]).backward()
    assert one.grad.isfinite().all()


def test_upstream_layout_and_parts(backend: str) -> None:
    student, teacher, labels = logits(12, 33, torch.float64)
    assert labels is not None
    leaf = student.clone().requires_grad_(True)
    found = fastxkd.dist_loss(leaf, teacher.T.contiguous().T, labels, return_parts=True)
    (3 * found.loss).backward()
    torch.testing.assert_close(leaf.grad, 3 * check(student, teacher, labels))
    hard, soft = parts(student, teacher, labels)
    torch.testing.assert_close(found.hard, hard)
    torch.testing.assert_close(found.soft, soft)
    lead = student.reshape(3, 4, 33), teacher.reshape(3, 4, 33), labels.reshape(3, 4)
    torch.testing.assert_close(fastxkd.dist_loss(*lead), found.loss)
    wide = torch.full((12, 50), float("nan"), dtype=torch.float64)
    wide[:, 3:36] = student
    torch.testing.assert_close(check(wide[:, 3:36], teacher, labels), leaf.grad / 3)
    torch.testing.assert_close(
        fastxkd.dist_loss(student[:1].expand(4, 33), teacher[:4]),
        fastxkd.dist_loss(student[:1].repeat(4, 1), teacher[:4]),
    )
    with torch.no_grad():
        assert not fastxkd.dist_loss(leaf, teacher, labels).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_equal_rows_have_no_columns_to_correlate(
    backend: str, dtype: torch.dtype, rows: int
) -> None:
    """Weights round, and 1e-8 beside the norms would magnify what a rounded mean leaves."""
    student, teacher, _ = logits(1, 33, dtype)
    weight = torch.linspace(0.3, 1.7, rows)
    leaf = student.repeat(rows, 1).requires_grad_(True)
    loss = fastxkd.dist_loss(
        leaf, teacher.repeat(rows, 1), inter_weight=0.0, row_weight=weight, temperature=1.0
    )
    loss.backward()
    assert loss == 2
    assert leaf.grad.abs().max() == 0


def test_float16_gradients_outlive_the_mean(backend: str) -> None:
    student, teacher, labels = logits(64, 4000, torch.float16)
    leaf = student.requires_grad_(True)
    (65536 * fastxkd.dist_loss(leaf, teacher, labels)).backward()
    assert leaf.grad is not None
    exact = 65536 * by_autograd(student.detach().double(), teacher.double(), labels, {})[1]
    rounding = (exact.half().double() - exact).norm()
    assert (leaf.grad.double() - exact).norm() <= 1.2 * rounding + 1e-5 * exact.norm()


def test_many_rows_over_threads(backend: str) -> None:
    """Every thread has columns of its own, which are merged; the blocks of rows do not divide."""
    student, teacher, labels = logits(1037, 100, torch.float32, ignored=0.1)
    check(student, teacher, labels, row_weight=torch.linspace(0, 2, 1037))


def test_module_is_the_function() -> None:
    student, teacher, labels = logits(9, 33, torch.float32, ignored=0.3)
    options: dict[str, Any] = {
        "temperature": 2.5,
        "ce_weight": 0.3,
        "kd_weight": 0.6,
        "inter_weight": 0.5,
        "intra_weight": 2.0,
        "ignore_index": 5,
        "label_smoothing": 0.1,
        "class_weight": torch.linspace(0.5, 2, 33),
        "teacher_form": "log_probs",
        "return_parts": True,
    }
    row_weight = torch.linspace(0, 1, 9)
    labels = labels.clamp(min=0)
    module = fastxkd.DISTLoss(**options)
    expected = fastxkd.dist_loss(student, teacher, labels, row_weight=row_weight, **options)
    assert module(student, teacher, labels, row_weight=row_weight) == expected
    assert "inter_weight=0.5" in repr(module)
    assert module.class_weight is dict(module.named_buffers())["class_weight"]


def test_finite_differences(backend: str) -> None:
    """gradcheck by hand: torch's runs one graph backward several times, and here once is all."""
    student, teacher, labels = logits(5, 7, torch.float64, ignored=0.3)
    weight = torch.linspace(0.5, 2, 5)

    def loss(x: Tensor) -> Tensor:
        return fastxkd.dist_loss(x, teacher, labels, label_smoothing=0.1, row_weight=weight)

    leaf = student.clone().requires_grad_(True)
    loss(leaf).backward()
    for seed in range(3):
        step = torch.randn(student.shape, generator=torch.Generator().manual_seed(seed)).double()
        slope = (loss(student + 1e-6 * step) - loss(student - 1e-6 * step)) / 2e-6
        torch.testing.assert_close((leaf.grad * step).sum(), slope, rtol=1e-7, atol=1e-8)


@by_dynamo
def test_compilers_and_transforms() -> None:
    torch._dynamo.reset()
    student, teacher, labels = logits(9, 33, torch.float32)

    def step(s: Tensor) -> Tensor:
        return fastxkd.dist_loss(s, teacher, labels)

    expected = torch.func.grad(step)(student)
    torch.testing.assert_close(expected, check(student, teacher, labels))
    leaf = student.clone().requires_grad_(True)
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(leaf)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected)
    for y, need_grad in ((labels, True), (labels, False), (None, True)):
        weight = None if y is None else torch.rand(33)
        factors = (4.0, 1.0, 2.0, 5, 1.0, 2.0, IGNORE, 0.1, 2, need_grad)
        arguments = (student, teacher, y, weight, None, None, [], 0, *factors)
        torch.library.opcheck(torch.ops.fastxkd.kd_loss.default, arguments)


@pytest.mark.parametrize("option", ["inter_weight", "intra_weight", "kd_weight", "ce_weight"])
def test_wrong_input(option: str) -> None:
    student, teacher, labels = logits(9, 33, torch.float32)
    with pytest.raises(ValueError, match=f"{option}: expected a finite number of at least 0"):
        fastxkd.dist_loss(student, teacher, labels, **{option: -1.0})
    with pytest.raises(ValueError, match=f"{option}: expected a finite number of at least 0"):
        fastxkd.DISTLoss(**{option: -1.0})
    with pytest.raises(TypeError, match=f"{option}: expected a number, got str"):
        fastxkd.DISTLoss(**{option: "1"})
    with pytest.raises(ValueError, match="teacher_logits: expected 33 classes"):
        fastxkd.dist_loss(student, teacher[:, :5], labels)
