"""What autograd may not do quietly: forward mode, second derivatives, autocast, odd factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastxkd
from fastxkd import losses

TEACHER, LABELS = torch.randn(6, 5), torch.arange(6) % 5
HEADS = torch.randn(5, 5), torch.randn(5, 5)
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "kd": lambda x: losses.kd_loss(x, TEACHER, LABELS),
    "dkd": lambda x: losses.dkd_loss(x, TEACHER, LABELS),
    "dist": lambda x: losses.dist_loss(x, TEACHER, LABELS),
    "linear": lambda x: losses.linear_kd_loss(x, HEADS[0], TEACHER, HEADS[1], LABELS),
    "rkd": lambda x: losses.rkd_loss(x, TEACHER),
    "sp": lambda x: losses.sp_loss(x, TEACHER),
    "cc": lambda x: losses.cc_loss(x, TEACHER),
    "pkt": lambda x: losses.pkt_loss(x, TEACHER),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


@every_loss
def test_a_gradient_penalty_is_refused(name: str) -> None:
    leaf = torch.randn(6, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(LOSSES[name](leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once|twice"):
        (grad.square().sum() + leaf.sum()).backward()


@every_loss
def test_vmap_of_a_leaf_keeps_its_gradient(name: str) -> None:
    """Within vmap a tensor does not say that it requires grad."""
    batch = torch.randn(3, 6, 5, requires_grad=True)
    losses_ = torch.func.vmap(LOSSES[name])(batch)
    (found,) = torch.autograd.grad(losses_.sum(), batch)
    copy = batch.detach().clone().requires_grad_(True)
    expected = torch.stack([LOSSES[name](x) for x in copy])
    torch.testing.assert_close(losses_, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), copy)[0])


# torch builds its own rules of forward mode with torch.jit at their first use.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "linear", "rkd"])
def test_forward_mode_is_refused(name: str) -> None:
    x = torch.randn(6, 5)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(LOSSES[name], (x,), (torch.ones(6, 5),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        LOSSES[name](torch.autograd.forward_ad.make_dual(x, torch.ones(6, 5)))


@pytest.mark.parametrize("name", ["sp", "cc", "pkt"])
def test_relations_keep_their_digits_under_autocast(name: str) -> None:
    x = torch.randn(6, 5, requires_grad=True)
    expected = LOSSES[name](x)
    with torch.autocast("cpu", torch.bfloat16):
        found = LOSSES[name](x)
    assert torch.equal(found, expected)
    grads = [torch.autograd.grad(loss, x)[0] for loss in (found, expected)]
    assert torch.equal(*grads)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "divergence": ({"divergence": "dkd"}, ValueError, "divergence: .* 'dkd'; use dkd_loss"),
    "temperature": (
        {"temperature": torch.tensor(4.0, requires_grad=True)},
        ValueError,
        "temperature: expected a number, got a tensor that requires grad",
    ),
    "text": ({"kd_weight": "a"}, TypeError, "kd_weight: expected a number, got str"),
    "ignore_index": ({"ignore_index": None}, TypeError, "ignore_index: expected an int, got None"),
    "weight dtype": (
        {"class_weight": torch.ones(5, dtype=torch.int64)},
        TypeError,
        "class_weight: expected a floating-point dtype, got torch.int64",
    ),
    "weight device": (
        {"class_weight": torch.ones(5, device="meta")},
        ValueError,
        "class_weight: expected the device of student_logits, cpu, got meta",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_factors(case: str) -> None:
    options, error, text = WRONG[case]
    with pytest.raises(error, match=text):
        fastxkd.kd_loss(torch.randn(6, 5), TEACHER, LABELS, **options)


def test_factors_may_be_any_number() -> None:
    x = torch.randn(6, 5)
    found = fastxkd.kd_loss(x, TEACHER, LABELS, temperature=torch.tensor(4.0), kd_weight=True)
    assert found == fastxkd.kd_loss(x, TEACHER, LABELS, temperature=4, kd_weight=1)
