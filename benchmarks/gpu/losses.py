"""Losses on logits, and on hidden states: ours on every backend, and what people run instead."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.stage import Stage, Variant, brief, on_backend

TEMPERATURE, CE, KD = 4.0, 0.1, 0.9


def correlation(q: Tensor, p: Tensor) -> Tensor:
    """Pearson's, the mean over rows, as the published code of DIST writes it."""
    q, p = (x - x.mean(1, keepdim=True) for x in (q, p))
    return ((q * p).sum(1) / (q.norm(dim=1) * p.norm(dim=1) + 1e-8)).mean()


def divergence_of(s: Tensor, t: Tensor, labels: Tensor, name: str) -> Tensor:
    """The mean over rows of softened logits, as training scripts write it."""
    if name == "dkd":
        at = F.one_hot(labels, s.shape[1]).bool()
        q, p = F.softmax(s, 1), F.softmax(t, 1)
        two_q, two_p = (torch.stack([x[at], 1 - x[at]], 1) for x in (q, p))
        target = F.kl_div(two_q.log(), two_p, reduction="batchmean")
        rest_q, rest_p = (x.masked_fill(at, -1000) for x in (s, t))
        others = F.kl_div(F.log_softmax(rest_q, 1), F.softmax(rest_p, 1), reduction="batchmean")
        return target + 8 * others
    if name == "forward_kl":
        return F.kl_div(F.log_softmax(s, 1), F.softmax(t, 1), reduction="batchmean")
    if name == "reverse_kl":
        return F.kl_div(F.log_softmax(t, 1), F.softmax(s, 1), reduction="batchmean")
    q, p = F.softmax(s, 1), F.softmax(t, 1)
    if name == "dist":
        return 2 - correlation(q, p) - correlation(q.T, p.T)
    if name == "tvd":
        return (q - p).abs().sum(1).mean() / 2
    m = ((q + p) / 2).log()
    both = F.kl_div(m, p, reduction="batchmean") + F.kl_div(m, q, reduction="batchmean")
    return both / 2


def eager(student: Tensor, teacher: Tensor, labels: Tensor, divergence: str) -> Tensor:
    soft = divergence_of(student / TEMPERATURE, teacher / TEMPERATURE, labels, divergence)
    return CE * F.cross_entropy(student, labels) + KD * TEMPERATURE**2 * soft


def forward_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return eager(student, teacher, labels, "forward_kl")


def dist(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return eager(student, teacher, labels, "dist")


def ours(student: Tensor, teacher: Tensor, labels: Tensor, divergence: str) -> Tensor:
    import fastxkd

    weights = {"temperature": TEMPERATURE, "ce_weight": CE, "kd_weight": KD}
    if divergence == "dkd":
        return fastxkd.dkd_loss(student, teacher, labels, **weights)  # type: ignore[return-value]
    if divergence == "dist":
        return fastxkd.losses.dist_loss(student, teacher, labels, **weights)  # type: ignore[return-value]
    return fastxkd.kd_loss(student, teacher, labels, divergence=divergence, **weights)  # type: ignore[return-value]


def liger() -> Callable[..., Tensor]:
    """Its KL and its cross-entropy, temperature and sum outside: the nearest that it has."""
    peer = importlib.import_module("liger_kernel.transformers")
    kl, ce = peer.LigerKLDIVLoss(reduction="batchmean"), peer.LigerCrossEntropyLoss()

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        # The cross-entropy last: it writes its gradient over the logits.
        soft = kl(F.log_softmax(student / TEMPERATURE, 1), F.softmax(teacher / TEMPERATURE, 1))
        return CE * ce(student, labels) + KD * TEMPERATURE**2 * soft  # type: ignore[no-any-return]

    return loss


@dataclass
class Batch:
    """Logits of a trained model are peaked, and student and teacher agree mostly."""

    rows: int
    classes: int
    dtype: torch.dtype
    device: torch.device
    student: Tensor = field(init=False)
    teacher: Tensor = field(init=False)
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        shape, how = (self.rows, self.classes), {"dtype": self.dtype, "device": self.device}
        self.teacher = torch.randn(shape, **how).mul_(3)  # type: ignore[call-overload]
        student = torch.randn(shape, **how).add_(self.teacher, alpha=0.8)  # type: ignore[call-overload]
        self.student = student.requires_grad_(True)
        self.labels = torch.randint(self.classes, (self.rows,), device=self.device)

    @property
    def unit(self) -> int:
        return self.student.numel() * self.student.element_size()

    def step(self, loss: Callable[..., Tensor]) -> Callable[[], None]:
        def call() -> None:
            loss(self.student, self.teacher, self.labels).backward()
            self.student.grad = None

        return call

    def deviation(self, loss: Callable[..., Tensor], divergence: str, rows: int = 64) -> str:
        """Of the loss of the first rows from float64's."""
        s, t, y = self.student[:rows].detach(), self.teacher[:rows], self.labels[:rows]
        exact = eager(s.double(), t.double(), y, divergence).item()
        found = loss(s.clone().requires_grad_(True), t, y).item()
        return f"loss off by {abs(found / exact - 1):.1e}"


def operator(batch: Batch, divergence: str) -> Callable[[], object]:
    """The operator without autograd: the kernel, and what it writes allocated afresh."""
    import fastxkd  # noqa: F401
    from fastxkd.ops._logits import DIVERGENCES

    alpha, beta = {"dkd": (1.0, 8.0), "dist": (1.0, 1.0)}.get(divergence, (0.0, 0.5))
    weights = (TEMPERATURE, CE, KD, DIVERGENCES[divergence], alpha, beta)
    rest = (None, None, None, [], 0, *weights, -100, 0.0, 2, True)
    student = batch.student.detach()
    return lambda: torch.ops.fastxkd.kd_loss(student, batch.teacher, batch.labels, *rest)


def cases(stage: Stage) -> Iterator[tuple[str, Batch]]:
    """Batches that fit, one at a time."""
    for rows, classes in stage.plan.shapes:
        for name in stage.plan.dtypes:
            case, dtype = f"kd_loss {rows}x{classes} {name}", getattr(torch, name)
            if not stage.in_time(case):
                continue
            if stage.clock.on_gpu:
                torch.cuda.empty_cache()
                free = torch.cuda.mem_get_info(stage.clock.device)[0]
                if 6 * rows * classes * dtype.itemsize > free:
                    stage.left_out(case, f"needs more than the free {free / 2**30:.0f} GiB")
                    continue
            batch = Batch(rows, classes, dtype, stage.clock.device)
            yield case, batch
            del batch


def own_variants(batch: Batch, backend: str, divergence: str) -> Iterator[Variant]:
    suffix = "" if divergence == "forward_kl" else f", {divergence}"
    loss = partial(ours, divergence=divergence)
    yield Variant(f"{backend}, operator{suffix}", on_backend(backend, operator(batch, divergence)))
    yield Variant(
        f"{backend}{suffix}",
        on_backend(backend, batch.step(loss)),
        note=on_backend(backend, partial(batch.deviation, loss, divergence)),
    )


def floor_of(batch: Batch) -> Variant:
    out, detached = torch.empty_like(batch.teacher), batch.student.detach()
    return Variant("floor: add(s, t, out=g)", lambda: torch.add(detached, batch.teacher, out=out))


def kd_loss_kernels(stage: Stage) -> None:
    """Ours, on every backend: first what most people run, then every divergence."""
    plan = stage.plan
    for chosen in (plan.divergences[:1], plan.divergences[1:]):
        for case, batch in cases(stage):
            if chosen == plan.divergences[:1]:
                stage.measure(case, floor_of(batch), 3 * batch.unit)
            for divergence in chosen:
                for backend in plan.backends:
                    for variant in own_variants(batch, backend, divergence):
                        stage.measure(case, variant, 3 * batch.unit)


def kd_loss_peers(stage: Stage) -> None:
    """What people run instead; the floor once more, since this is another process."""
    for case, batch in cases(stage):
        moved = 3 * batch.unit
        stage.measure(case, floor_of(batch), moved)
        for divergence in stage.plan.divergences:
            loss = partial(eager, divergence=divergence)
            suffix = "" if divergence == "forward_kl" else f", {divergence}"
            note = partial(batch.deviation, loss, divergence)
            stage.measure(case, Variant(f"eager{suffix}", batch.step(loss), note=note), moved)
        try:
            peer = liger()
        except ImportError as error:
            stage.left_out(f"{case}: Liger KL + CE", brief(error))
        else:
            kept = batch.student.detach().clone()
            restore = partial(batch.student.detach().copy_, kept)
            note = partial(batch.deviation, peer, "forward_kl")
            liger_kl = Variant("Liger KL + CE", batch.step(peer), restore, note)
            stage.measure(case, liger_kl, moved)
            restore()
            del kept, restore, liger_kl
        if stage.plan.compile:
            torch.compiler.reset()
            for divergence, of in (("forward_kl", forward_kl), ("dist", dist)):
                if divergence not in stage.plan.divergences:
                    continue
                suffix = "" if divergence == "forward_kl" else f", {divergence}"
                fast = torch.compile(of, dynamic=False)
                stage.measure(case, Variant(f"torch.compile{suffix}", batch.step(fast)), moved)


def linear_loss(stage: Stage) -> None:
    rows, width, width_t, classes = stage.plan.linear
    name = stage.plan.dtypes[-1]
    how: dict[str, Any] = {"dtype": getattr(torch, name), "device": stage.clock.device}
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, **how).requires_grad_(True)
    weight = (torch.randn(classes, width, **how) / width**0.5).requires_grad_(True)
    guide, guide_weight = (
        torch.randn(rows, width_t, **how),
        torch.randn(classes, width_t, **how) / width_t**0.5,
    )
    labels = torch.randint(classes, (rows,), device=stage.clock.device)
    case = f"linear_kd_loss {rows}x{width}/{width_t} to {classes} {name}"

    def products() -> None:
        s, w = hidden.detach(), weight.detach()
        grad = torch.mm(s, w.T)
        torch.mm(guide, guide_weight.T)
        torch.mm(grad, w)
        torch.mm(grad.T, s)

    def forget() -> None:
        hidden.grad = weight.grad = None

    def with_logits(loss: Callable[..., Tensor]) -> None:
        loss(hidden @ weight.T, guide @ guide_weight.T, labels, "forward_kl").backward()
        forget()

    def without_logits() -> None:
        from fastxkd.losses.linear import linear_kd_loss

        factors = {"temperature": TEMPERATURE, "ce_weight": CE, "kd_weight": KD}
        loss = linear_kd_loss(hidden, weight, guide, guide_weight, labels, **factors)
        loss.backward()  # type: ignore[union-attr]
        forget()

    for variant in (
        Variant("floor: four products", products),
        Variant("eager", partial(with_logits, eager)),
        Variant("logits, kd_loss", partial(with_logits, ours)),
        Variant("ours", without_logits),
    ):
        stage.measure(case, variant, None)
