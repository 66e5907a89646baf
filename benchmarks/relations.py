"""Losses on relations and features, forward and backward, against their usual form.

The floor of the relations is the products that no closed form avoids: both Gram matrices, and one
matrix of weights times the student's features for its gradient. That of the features reads both and
writes one, as no loss with a gradient can do less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._harness import Case, Spec, compiled, main
from fastxkd import losses
from fastxkd.losses import comparative

TESTS = ["tests/test_relations.py", "tests/test_features.py"]
Loss = Callable[[Tensor, Tensor], Tensor]


# --- the usual forms, restated


def eager_rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    scaled = []
    for x in (student, teacher):
        square = x.square().sum(1)
        d = (square[:, None] + square[None, :] - 2 * x @ x.T).clamp(min=1e-12).sqrt()
        d = d * (1 - torch.eye(len(x)))
        scaled.append(d / (d.sum() / (len(x) * (len(x) - 1))))
    return F.smooth_l1_loss(*scaled)


def eager_rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Every difference of two samples as a vector: n x n x d numbers for each side."""
    cosines = []
    for x in (student, teacher):
        unit = F.normalize(x[None] - x[:, None], dim=2)
        cosines.append(torch.bmm(unit, unit.transpose(1, 2)))
    return F.smooth_l1_loss(*cosines)


def eager_rkd(student: Tensor, teacher: Tensor) -> Tensor:
    return 25 * eager_rkd_distance(student, teacher) + 50 * eager_rkd_angle(student, teacher)


def eager_dc(student: Tensor, teacher: Tensor) -> Tensor:
    centred = []
    for x in (student, teacher):
        x = F.normalize(x, dim=1)
        d = ((x[None] - x[:, None]).square().sum(2) + 1e-12).sqrt()
        centred.append(d - d.mean(0, keepdim=True) - d.mean(1, keepdim=True) + d.mean())
    a, b = centred
    return 1 - (a * b).mean() / ((a * a).mean() * (b * b).mean()).sqrt()


def eager_sp(student: Tensor, teacher: Tensor) -> Tensor:
    grams = [F.normalize(x @ x.T, dim=1) for x in (student, teacher)]
    return (grams[0] - grams[1]).square().mean()


def eager_cc(student: Tensor, teacher: Tensor) -> Tensor:
    kernels = []
    for x in (student, teacher):
        x = F.normalize(x, dim=1)
        cosine = x @ x.T
        terms = [0.8**p / math.factorial(p) * cosine**p for p in (0, 1, 2)]
        kernels.append(math.exp(-0.8) * (terms[0] + terms[1] + terms[2]))
    return (kernels[0] - kernels[1]).square().mean()


def eager_pkt(student: Tensor, teacher: Tensor) -> Tensor:
    rows = []
    for x in (student, teacher):
        x = F.normalize(x, dim=1)
        kernel = (x @ x.T + 1) / 2
        rows.append(kernel / kernel.sum(1, keepdim=True))
    return (rows[1] * torch.log((rows[1] + 1e-7) / (rows[0] + 1e-7))).mean()


def eager_at(student: Tensor, teacher: Tensor) -> Tensor:
    maps = [F.normalize(x.pow(2).mean(1).flatten(1), dim=1) for x in (student, teacher)]
    return (maps[0] - maps[1]).pow(2).mean()


def eager_hcl(student: Tensor, teacher: Tensor) -> Tensor:
    loss, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
    for size in (4, 2, 1):
        if size < student.shape[2]:
            weight /= 2
            total += weight
            pools = [F.adaptive_avg_pool2d(x, size) for x in (student, teacher)]
            loss = loss + weight * F.mse_loss(*pools)
    return loss / total


def eager_vid(variance: Tensor) -> Loss:
    def vid(student: Tensor, teacher: Tensor) -> Tensor:
        v = variance.view(1, -1, 1, 1)
        return (0.5 * ((student - teacher) ** 2 / v + torch.log(v))).mean()

    return vid


def eager_ckd(picks: Tensor) -> Loss:
    def ckd(student: Tensor, teacher: Tensor) -> Tensor:
        s, t = (z[picks[:, :2]].mean(1) - z[picks[:, 2]] for z in (student, teacher))
        soft = F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction="batchmean")
        return 16 * soft

    return ckd


# --- cases


class Step:
    """Forward and backward of a loss; the gradient is dropped, as ``zero_grad`` does."""

    def __init__(self, loss: Loss, student: Tensor, teacher: Tensor) -> None:
        self.loss, self.inputs = loss, (student, teacher)

    def __call__(self) -> None:
        self.loss(*self.inputs).backward()
        self.inputs[0].grad = None


def variants(
    floor: tuple[str, Callable[[], object]],
    eager: Loss,
    ours: Loss,
    student: Tensor,
    teacher: Tensor,
) -> Case:
    inputs = (student.requires_grad_(), teacher)

    def notes() -> dict[str, str]:
        with torch.no_grad():
            true = eager(*(x.double() for x in inputs)).item()
            off = {name: abs(f(*inputs).item() / true - 1) for name, f in named.items()}
        return {name: f"loss off by {value:.1e} of float64's" for name, value in off.items()}

    named = {"eager": eager, "ours": ours}
    steps: dict[str, Callable[[], object]] = {
        f"floor: {floor[0]}": floor[1],
        "eager": Step(eager, *inputs),
        "torch.compile": Step(compiled(eager), *inputs),
        "ours": Step(ours, *inputs),
    }
    return Case(steps, notes=notes)


def related(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Features after a ReLU that have something to do with each other."""
    common = torch.randn(shape)
    return (common + torch.randn(shape)).relu_(), (common + torch.randn(shape)).relu_()


def relation(eager: Loss, ours: Loss, n: int, width: int) -> Case:
    student, teacher = related((n, width))
    gram, grad, weight = torch.empty(n, n), torch.empty(n, width), torch.rand(n, n)
    first = student.detach()

    def products() -> None:
        torch.mm(first, first.T, out=gram)
        torch.mm(teacher, teacher.T, out=gram)
        torch.mm(weight, first, out=grad)

    return variants(("two Gram, one back", products), eager, ours, student, teacher)


def feature(eager: Loss, ours: Loss, shape: tuple[int, ...]) -> Case:
    student, teacher = related(shape)
    first, out = student.detach(), torch.empty_like(student)
    floor = ("add(s, t, out=g)", lambda: torch.add(first, teacher, out=out))
    case = variants(floor, eager, ours, student, teacher)
    case.floor_bytes = 3 * out.numel() * out.element_size()
    return case


def vid(shape: tuple[int, ...]) -> Case:
    variance = torch.rand(shape[1]) + 0.5
    return feature(eager_vid(variance), partial(losses.vid_loss, variance=variance), shape)


def ckd(n: int, classes: int, count: int) -> Case:
    """The same relations for all; ours also draws them, at every call."""

    def draw() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    picks = comparative._picks(n, count, 3, draw(), torch.device("cpu"))

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        return losses.ckd_loss(student, teacher, relations=count, generator=draw())

    return feature(eager_ckd(picks), ours, (n, classes))


RELATIONS: dict[str, tuple[Loss, Loss]] = {
    "RKD": (eager_rkd, losses.rkd_loss),
    "RKD distance": (
        eager_rkd_distance,
        partial(losses.rkd_loss, distance_weight=1, angle_weight=0),
    ),
    "DC": (eager_dc, losses.dc_loss),
    "SP": (eager_sp, losses.sp_loss),
    "CC": (eager_cc, losses.cc_loss),
    "PKT": (eager_pkt, losses.pkt_loss),
}
FEATURES: dict[str, tuple[Loss, Loss]] = {
    "AT": (eager_at, losses.at_loss),
    "FitNet": (F.mse_loss, losses.fitnet_loss),
    "HCL": (eager_hcl, losses.hcl_loss),
}


def specs(quick: bool) -> list[Spec]:
    n, width = (64, 256) if quick else (256, 2048)
    shape = (16, 64, 16, 16) if quick else (64, 256, 32, 32)
    found = [
        Spec(f"{name}, {n}x{width}", partial(relation, *pair, n, width), rounds=5)
        for name, pair in RELATIONS.items()
    ]
    size = "x".join(map(str, shape))
    found += [
        Spec(f"{name}, {size}", partial(feature, *pair, shape)) for name, pair in FEATURES.items()
    ]
    found.append(Spec(f"VID, {size}", partial(vid, shape)))
    for count in (256,) if quick else (256, 10_000):
        found.append(Spec(f"CKD, 256x100, {count} relations", partial(ckd, 256, 100, count)))
    if not quick:  # where calls cost as much as arithmetic
        found += [
            Spec(f"{name}, 64x128", partial(relation, *RELATIONS[name], 64, 128))
            for name in RELATIONS
        ]
    return found


if __name__ == "__main__":
    main("relations", specs, TESTS, __doc__)
