"""Distillation loss, forward and backward, against what people write and what compilers make of it.

The floor reads both matrices of logits and writes one: no loss with a gradient moves fewer bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastxkd
from benchmarks._harness import Case, Skip, Spec, compiled, main
from fastxkd.ops import _library
from fastxkd.reference import kd_loss as reference

TEMPERATURE, CE, KD = 4.0, 0.1, 0.9
TESTS = ["tests/test_kd_loss.py", "tests/test_divergences.py", "tests/test_dist.py"]
# Name of a variant -> (code of the divergence, alpha, beta) as the operator takes them.
DIVERGENCES = {
    "reverse KL": (1, 0.0, 0.0),
    "JSD": (2, 0.0, 0.5),
    "TVD": (3, 0.0, 0.0),
    "DKD": (4, 1.0, 8.0),
    "DIST": (5, 1.0, 1.0),
}


def eager(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The loss as in most training scripts."""
    soft = F.kl_div(
        F.log_softmax(student / TEMPERATURE, 1),
        F.softmax(teacher / TEMPERATURE, 1),
        reduction="batchmean",
    )
    return CE * F.cross_entropy(student, labels) + KD * TEMPERATURE**2 * soft


def eager_log_target(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    soft = F.kl_div(
        F.log_softmax(student / TEMPERATURE, 1),
        F.log_softmax(teacher / TEMPERATURE, 1),
        reduction="batchmean",
        log_target=True,
    )
    return CE * F.cross_entropy(student, labels) + KD * TEMPERATURE**2 * soft


def ours(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    loss = fastxkd.kd_loss(
        student, teacher, labels, temperature=TEMPERATURE, ce_weight=CE, kd_weight=KD
    )
    assert isinstance(loss, Tensor)
    return loss


def pearson(x: Tensor, y: Tensor) -> Tensor:
    x, y = (z - z.mean(1, keepdim=True) for z in (x, y))
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-8)


def eager_dist(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """DIST as its authors write it: correlations along rows and along columns."""
    q, p = ((x / TEMPERATURE).softmax(1) for x in (student, teacher))
    soft = 2 - pearson(q, p).mean() - pearson(q.T, p.T).mean()
    return CE * F.cross_entropy(student, labels) + KD * TEMPERATURE**2 * soft


def ours_dist(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    loss = fastxkd.dist_loss(
        student, teacher, labels, temperature=TEMPERATURE, ce_weight=CE, kd_weight=KD
    )
    assert isinstance(loss, Tensor)
    return loss


class Step:
    """Forward and backward of a loss; the gradient is dropped, as ``zero_grad`` does."""

    def __init__(self, loss: object, student: Tensor, teacher: Tensor, labels: Tensor) -> None:
        self.loss, self.inputs = loss, (student, teacher, labels)

    def __call__(self) -> None:
        self.loss(*self.inputs).backward()  # type: ignore[operator]
        self.inputs[0].grad = None


def kernel(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    divergence: tuple[int, float, float] = (0, 0.0, 0.0),
) -> Callable[[], object]:
    """The C++ function alone: every buffer exists already, nothing of torch is called."""
    rows, classes = student.shape
    grad, loss, parts = torch.empty_like(student), torch.empty(()), torch.empty(2)
    module, level, threads = _library.kernels()
    pointers = [t.data_ptr() for t in (student, teacher, labels)] + [0, 0, 0]
    pointers += [t.data_ptr() for t in (grad, loss, parts)]
    sizes = (rows, classes, student.stride(0), classes, teacher.stride(0), 0, (), 0)
    dtype = _library.DTYPES[student.dtype]
    factors = (TEMPERATURE, CE, KD, *divergence, 0.0, -100, 2, dtype, dtype)

    def call(_keep: object = (student, teacher, labels, grad, loss, parts)) -> None:
        module.kd_loss(level, threads, *pointers, *sizes, *factors)

    return call


# Of the bare operator, after the labels.
REST = (None, None, None, [], 0, TEMPERATURE, CE, KD, 0, 0.0, 0.0, -100, 0.0, 2, True)


def operator(student: Tensor, teacher: Tensor, labels: Tensor) -> Callable[[], object]:
    """The operator without autograd: the kernel, and a gradient allocated afresh."""

    def call() -> None:
        torch.ops.fastxkd.kd_loss(student, teacher, labels, *REST)

    return call


def errors(student: Tensor, teacher: Tensor, labels: Tensor, rows: int = 512) -> dict[str, str]:
    """Loss against float64; gradient against what rounding the exact one once would cost."""
    student, teacher, labels = (x[:rows].detach() for x in (student, teacher, labels))
    factors = (None, None, TEMPERATURE, CE, KD, 0, 0.0, 0.0, -100, 0.0, 2, True)
    exact_loss, _, exact = reference.kd_loss(student.double(), teacher.double(), labels, *factors)
    rounding = (exact.to(student.dtype).double() - exact).norm()
    found = {}
    for name, loss in (("ours", ours), ("eager", eager)):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher, labels)
        value.backward()
        assert leaf.grad is not None
        off = abs(value.item() - exact_loss.item()) / exact_loss.item()
        times = (leaf.grad.double() - exact).norm() / rounding
        found[name] = f"loss off by {off:.1e} of it; gradient error {times:.2f}x rounding it once"
    return found


def case(rows: int, classes: int, dtype: torch.dtype) -> Case:
    # Logits of a trained model are peaked, and student and teacher agree mostly.
    teacher = 3 * torch.randn(rows, classes)
    student = (0.8 * teacher + torch.randn(rows, classes)).to(dtype).requires_grad_()
    teacher = teacher.to(dtype)
    labels = torch.randint(classes, (rows,))
    inputs = (student, teacher, labels)
    out, detached = torch.empty_like(teacher), student.detach()
    variants = {
        "floor: add(s, t, out=g)": lambda: torch.add(detached, teacher, out=out),
        "eager": Step(eager, *inputs),
        "eager, log_target": Step(eager_log_target, *inputs),
        "torch.compile": Step(compiled(eager), *inputs),
        "ours": Step(ours, *inputs),
        "ours, operator only": operator(*inputs),
    }
    if _library.serve("kd_loss", student) == "cpu":
        variants["ours, kernel only"] = kernel(detached, teacher, labels)
    moved = 3 * out.numel() * out.element_size()
    return Case(variants, moved, lambda: errors(*inputs))  # type: ignore[arg-type]


def dist_case(rows: int, classes: int, dtype: torch.dtype) -> Case:
    teacher = 3 * torch.randn(rows, classes)
    student = (0.8 * teacher + torch.randn(rows, classes)).to(dtype).requires_grad_()
    teacher, labels = teacher.to(dtype), torch.randint(classes, (rows,))
    inputs, detached, out = (student, teacher, labels), student.detach(), torch.empty_like(teacher)
    variants = {
        "floor: add(s, t, out=g)": lambda: torch.add(detached, teacher, out=out),
        "eager": Step(eager_dist, *inputs),
        "torch.compile": Step(compiled(eager_dist), *inputs),
        "ours": Step(ours_dist, *inputs),
    }
    return Case(variants, 3 * out.numel() * out.element_size())  # type: ignore[arg-type]


def kernels_case(rows: int, classes: int, dtype: torch.dtype) -> Case:
    """The kernel of each divergence, beside that of the forward KL."""
    teacher = 3 * torch.randn(rows, classes)
    student = (0.8 * teacher + torch.randn(rows, classes)).to(dtype)
    teacher, labels = teacher.to(dtype), torch.randint(classes, (rows,))
    if _library.serve("kd_loss", student) != "cpu":
        raise Skip("the C++ kernels are not built")
    out = torch.empty_like(teacher)
    variants: dict[str, Callable[[], object]] = {
        "floor: add(s, t, out=g)": lambda: torch.add(student, teacher, out=out),
        "ours": kernel(student, teacher, labels),
    }
    for name, divergence in DIVERGENCES.items():
        variants[f"ours, {name}"] = kernel(student, teacher, labels, divergence)
    return Case(variants, 3 * out.numel() * out.element_size())


def specs(quick: bool) -> list[Spec]:
    shapes = [(256, 1000, torch.float32), (256, 1000, torch.bfloat16), (128, 100, torch.float32)]
    found = [
        Spec(
            f"{rows}x{classes} {str(dtype).removeprefix('torch.')}",
            partial(case, rows, classes, dtype),
            threads=(0,) if quick else (0, 1),
        )
        for rows, classes, dtype in shapes
    ]
    # One thread: what a kernel can do, free of how a machine shares its memory between cores.
    kernels = [
        Spec(
            f"kernels {rows}x{classes} {str(dtype).removeprefix('torch.')}",
            partial(kernels_case, rows, classes, dtype),
            threads=(1,),
            rounds=7,
        )
        for rows, classes in ((256, 1000), (4096, 32000))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    dist = Spec("DIST 256x1000 float32", partial(dist_case, 256, 1000, torch.float32))
    large = Spec("4096x32000 float32", partial(case, 4096, 32000, torch.float32), rounds=5)
    return found[:1] if quick else [*found, dist, *kernels, large]


if __name__ == "__main__":
    main("kd_loss", specs, TESTS, __doc__)
