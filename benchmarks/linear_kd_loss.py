"""Distillation loss from hidden states and heads, forward and backward, against whole logits.

The floor is four products, of which none can be left out (two for the logits, two for the student's
gradients), into matrices that exist already, and the kernel between them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastxkd
from benchmarks._harness import Case, Spec, main
from fastxkd.losses.linear import linear_kd_loss

TEMPERATURE, CE, KD = 4.0, 0.1, 0.9
TESTS = ["tests/test_linear.py"]
Heads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # hidden, weight; the teacher's; labels
# Of the bare operator: no weights, indices or models; forward KL, the mean, with gradient.
FACTORS = (None, None, None, [], 0, TEMPERATURE, CE, KD, 0, 0.0, 0.5, -100, 0.0, 2, True)


def eager(hidden: Tensor, weight: Tensor, guidance: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """The loss as in most training scripts."""
    student, teacher = hidden @ weight.T, guidance @ head.T
    soft = F.kl_div(
        F.log_softmax(student / TEMPERATURE, 1),
        F.softmax(teacher / TEMPERATURE, 1),
        reduction="batchmean",
    )
    return CE * F.cross_entropy(student, labels) + KD * TEMPERATURE**2 * soft


def on_logits(
    hidden: Tensor, weight: Tensor, guidance: Tensor, head: Tensor, labels: Tensor
) -> Tensor:
    """The fused loss, but of logits that are there."""
    options = {"temperature": TEMPERATURE, "ce_weight": CE, "kd_weight": KD}
    loss = fastxkd.kd_loss(hidden @ weight.T, guidance @ head.T, labels, **options)
    assert isinstance(loss, Tensor)
    return loss


def ours(*inputs: Tensor, chunk_rows: int | None = None) -> Tensor:
    options = {"temperature": TEMPERATURE, "ce_weight": CE, "kd_weight": KD}
    loss = linear_kd_loss(*inputs, chunk_rows=chunk_rows, **options)
    assert isinstance(loss, Tensor)
    return loss


class Step:
    """Forward and backward of a loss; the gradients are dropped, as ``zero_grad`` does."""

    def __init__(self, loss: Callable[..., Tensor], inputs: Heads) -> None:
        self.loss, self.inputs = loss, inputs

    def __call__(self) -> None:
        self.loss(*self.inputs).backward()
        self.inputs[0].grad = self.inputs[1].grad = None


def floor(
    hidden: Tensor, weight: Tensor, guidance: Tensor, head: Tensor, labels: Tensor
) -> Callable[[], object]:
    hidden, weight = hidden.detach(), weight.detach()
    student, teacher = hidden @ weight.T, guidance @ head.T
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def call() -> None:
        torch.mm(hidden, weight.T, out=student)
        torch.mm(guidance, head.T, out=teacher)
        _, _, grad = torch.ops.fastxkd.kd_loss(student, teacher, labels, *FACTORS)
        torch.mm(grad, weight, out=grad_hidden)
        torch.mm(grad.T, hidden, out=grad_weight)

    return call


def errors(inputs: Heads, rows: int = 64) -> dict[str, str]:
    """Loss and the weight's gradient against float64."""
    hidden, weight, guidance, head, labels = (x.detach() for x in inputs)
    hidden, guidance, labels = hidden[:rows], guidance[:rows], labels[:rows]
    found = {}
    for name, loss in (("truth", eager), ("ours", ours), ("eager", eager)):
        to = torch.float64 if name == "truth" else hidden.dtype
        leaf = weight.to(to, copy=True).requires_grad_()
        value = loss(hidden.to(to), leaf, guidance.to(to), head.to(to), labels)
        value.backward()
        assert leaf.grad is not None
        if name == "truth":
            true, exact = value.item(), leaf.grad
            continue
        off = abs(value.item() / true - 1)
        gradient = ((leaf.grad.double() - exact).norm() / exact.norm()).item()
        found[name] = f"loss off by {off:.1e} of it, gradient by {gradient:.1e}"
    return found


def case(rows: int, width: int, classes: int, dtype: torch.dtype) -> Case:
    hidden, guidance = torch.randn(rows, width), torch.randn(rows, width)
    weight, head = (2 * torch.randn(classes, width) / width**0.5 for _ in range(2))
    labels = torch.randint(classes, (rows,))
    inputs = (
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        guidance.to(dtype),
        head.to(dtype),
        labels,
    )
    variants: dict[str, Callable[[], object]] = {
        "floor: four products and the kernel": floor(*inputs),
        "eager": Step(eager, inputs),
        "kd_loss of logits": Step(on_logits, inputs),
        "ours": Step(ours, inputs),
    }
    if rows > 256:
        variants["ours, chunks of 256"] = Step(partial(ours, chunk_rows=256), inputs)
    return Case(variants, notes=lambda: errors(inputs))


def specs(quick: bool) -> list[Spec]:
    small = (512, 256, 4000)
    found = [
        Spec(f"{'x'.join(map(str, small))} {name}", partial(case, *small, dtype), rounds=5)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    ]
    # Seconds a call.
    large = Spec(
        "2048x1024x32000 float32", partial(case, 2048, 1024, 32000, torch.float32), rounds=3
    )
    return found[:1] if quick else [*found, large]


if __name__ == "__main__":
    main("linear_kd_loss", specs, TESTS, __doc__)
