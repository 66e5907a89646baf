"""dist_loss against autograd in float64 through Pearson's formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastxkd
from tests.test_kd_loss import DTYPES, IGNORE, by_dynamo, logits

WEIGHTS = [(1.0, 1.0), (2.0, 0.0), (0.0, 0.5)]


def pearson(x: Tensor, y: Tensor) -> Tensor:
    x, y = (z - z.mean(1, keepdim=True) for z in (x, y))
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-8)


def parts(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    temperature: float = 4.0,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    keep = torch.arange(len(student)) if labels is None else (labels != IGNORE).nonzero()[:, 0]
    s, t = student[keep], teacher[keep]
    hard = s.sum() * 0 if labels is None else F.cross_entropy(s, labels[keep])
    q, p = ((x / temperature).softmax(1) for x in (s, t))
    inter, intra = 1 - pearson(q, p).mean(), 1 - pearson(q.T, p.T).mean()
    return hard, 2 * temperature**2 * (inter_weight * inter + intra_weight * intra)


def check(student: Tensor, teacher: Tensor, labels: Tensor | None, **options: Any) -> Tensor:
    leaf = student.clone().requires_grad_(True)
    loss = fastxkd.losses.dist_loss(leaf, teacher, labels, **options)
    loss.backward()
    exact = student.double().clone().requires_grad_(True)
    true = sum(parts(exact, teacher.double(), labels, **options))
    true.backward()
    eager = student.clone().requires_grad_(True)
    same = sum(parts(eager, teacher, labels, **options))
    same.backward()
    eps = 1e-12 if student.dtype == torch.float64 else 1e-6
    # The correlations are of order 1, times kd_weight T^2 each.
    unit = 2 * options.get("temperature", 4.0) ** 2
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    assert abs(loss.item() - true.item()) <= abs(same.item() - true.item()) + eps * unit
    off, eager_off = ((x.grad.double() - exact.grad).norm() for x in (leaf, eager))
    norm = max(exact.grad.norm(), 0.1)
    # In float16 eager's own squares underflow, and 0/0 follows.
    assert off <= eager_off.nan_to_num(torch.inf) + eps * norm
    if student.dtype in (torch.bfloat16, torch.float16):
        rounding = (exact.grad.to(student.dtype).double() - exact.grad).norm()
        assert off <= 1.2 * rounding + eps * norm
    return leaf.grad


@pytest.mark.parametrize("shape", [(3, 2), (7, 33), (41, 1271), (256, 100)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check(*logits(*shape, dtype))


@pytest.mark.parametrize("temperature", [1.0, 4.0, 7.3])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(dtype: torch.dtype, weights: tuple[float, float], temperature: float) -> None:
    options = dict(zip(("inter_weight", "intra_weight"), weights, strict=True))
    student, teacher, labels = logits(9, 33, dtype, ignored=0.3)
    check(student, teacher, labels, temperature=temperature, **options)
    check(student, teacher, None, temperature=temperature, **options)


def test_ignored_rows_may_hold_anything() -> None:
    student, teacher, labels = logits(12, 33, torch.float32, ignored=0.4)
    assert labels is not None
    clean = check(student, teacher, labels)
    gone = labels == IGNORE
    student[gone], teacher[gone] = float("nan"), float("inf")
    leaf = student.requires_grad_(True)
    fastxkd.losses.dist_loss(leaf, teacher, labels).backward()
    assert torch.equal(leaf.grad, clean)
    leaf = torch.full((4, 6), float("nan"), requires_grad=True)
    loss = fastxkd.losses.dist_loss(leaf, leaf.detach(), torch.full((4,), IGNORE))
    loss.backward()
    assert loss == 0
    assert not leaf.grad.any()


def test_no_spread_correlates_with_nothing() -> None:
    flat = torch.zeros(4, 6, requires_grad=True)
    teacher = torch.randn(4, 6)
    loss = fastxkd.losses.dist_loss(flat, teacher, temperature=1.0)
    loss.backward()
    assert loss == 4
    assert flat.grad.isfinite().all()
    one = torch.randn(1, 6, requires_grad=True)  # no column has spread
    fastxkd.losses.dist_loss(one, teacher[:1]).backward()
    assert one.grad.isfinite().all()


def test_upstream_layout_and_parts() -> None:
    student, teacher, labels = logits(12, 33, torch.float64)
    assert labels is not None
    leaf = student.clone().requires_grad_(True)
    found = fastxkd.losses.dist_loss(leaf, teacher.T.contiguous().T, labels, return_parts=True)
    (3 * found.loss).backward()
    torch.testing.assert_close(leaf.grad, 3 * check(student, teacher, labels))
    hard, soft = parts(student, teacher, labels)
    torch.testing.assert_close(found.hard, hard)
    torch.testing.assert_close(found.soft, soft)
    lead = student.reshape(3, 4, 33), teacher.reshape(3, 4, 33), labels.reshape(3, 4)
    torch.testing.assert_close(fastxkd.losses.dist_loss(*lead), found.loss)
    module = fastxkd.DISTLoss(temperature=2.0, inter_weight=0.5, ce_weight=0.3)
    expected = fastxkd.losses.dist_loss(
        student, teacher, labels, temperature=2.0, inter_weight=0.5, ce_weight=0.3
    )
    assert module(student, teacher, labels) == expected
    assert fastxkd.DISTLoss()(student, teacher, labels) == found.loss
    with torch.no_grad():
        assert not fastxkd.losses.dist_loss(leaf, teacher, labels).requires_grad


@by_dynamo
def test_compilers_and_transforms() -> None:
    torch._dynamo.reset()
    student, teacher, labels = logits(9, 33, torch.float32)

    def step(s: Tensor) -> Tensor:
        return fastxkd.losses.dist_loss(s, teacher, labels)

    expected = torch.func.grad(step)(student)
    torch.testing.assert_close(expected, check(student, teacher, labels))
    leaf = student.clone().requires_grad_(True)
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(leaf)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected)
    for y, need_grad in ((labels, True), (labels, False), (None, True)):
        weight = None if y is None else torch.rand(33)
        arguments = (student, teacher, y, weight, 4.0, 1.0, 1.0, 2.0, IGNORE, 0.1, need_grad)
        torch.library.opcheck(torch.ops.fastxkd.dist_loss.default, arguments)


@pytest.mark.parametrize("option", ["inter_weight", "intra_weight", "kd_weight", "ce_weight"])
def test_wrong_input(option: str) -> None:
    student, teacher, labels = logits(9, 33, torch.float32)
    with pytest.raises(ValueError, match=f"{option}: expected a finite number of at least 0"):
        fastxkd.losses.dist_loss(student, teacher, labels, **{option: -1.0})
    with pytest.raises(ValueError, match="teacher_logits: expected 33 classes"):
        fastxkd.losses.dist_loss(student, teacher[:, :5], labels)
