"""``python -m benchmarks.gpu --out DIR``: everything a CUDA machine can say, in eight minutes.

Builds the CUDA extension, runs the tests that need a device, and times the kernels against the
machine's own copy bandwidth, eager torch, torch.compile and Liger-Kernel. Needs torch, numpy,
pytest and this repository; nvcc and setuptools with pybind11 for the build. Writes DIR/gpu.md,
DIR/gpu.json and DIR/gpu.log; what fails or runs out of time is said there, and the rest goes on.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import _machine
from benchmarks._machine import ROOT

TEMPERATURE, CE, KD = 4.0, 0.1, 0.9
GRACE = 10.0  # seconds that a stage gets beyond its time before it is ended


@dataclass(frozen=True)
class Plan:
    """What to measure and where; another device and small shapes make a test of it."""

    device: str = "cuda"
    backends: tuple[str, ...] = ("cuda", "triton")
    shapes: tuple[tuple[int, int], ...] = ((4096, 32000), (256, 1000), (128, 100), (8192, 151936))
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    divergences: tuple[str, ...] = ("forward_kl", "reverse_kl", "jsd", "tvd", "dkd", "dist")
    copied: int = 1 << 31  # bytes of the tensor whose copy gives the bandwidth
    flushed: int = 1 << 28  # bytes read between samples: more than a cache holds
    linear: tuple[int, int, int, int] = (4096, 2048, 4096, 32000)  # rows, widths, classes
    maps: tuple[tuple[int, ...], ...] = ((32, 256, 56, 56), (8, 2048, 7, 7))
    samples: tuple[int, int] = (4096, 512)  # rows and width, for distances
    layers: tuple[int, int, int] = (7, 20000, 1024)  # matrices, rows and width, for their sums
    units: tuple[int, int, int] = (64, 512, 7)  # images, units and the side of their maps
    masks: tuple[int, int, int] = (4, 112, 1200)  # layers, their side, and labels
    tests: tuple[str, ...] = ("tests/test_gpu.py", "-m", "gpu")
    rounds: int = 25
    seconds: float = 0.4  # for the samples of one figure
    compile: bool = True


# --- measuring


class Clock:
    """Times calls on a device: by events where there are some, else by the host's clock."""

    def __init__(self, plan: Plan) -> None:
        self.device = torch.device(plan.device)
        self.on_gpu = self.device.type == "cuda"
        self.rounds, self.seconds = plan.rounds, plan.seconds
        self.cold = torch.zeros(max(plan.flushed // 4, 1), device=self.device)
        self.scratch = torch.zeros((), device=self.device)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def _flush(self) -> None:
        # Reading, not writing: lines that must go back to memory would be charged to the call.
        torch.sum(self.cold, dim=0, out=self.scratch)
        if self.on_gpu and hasattr(torch.cuda, "_sleep"):
            torch.cuda._sleep(2_000_000)  # a millisecond, in which the host queues the launches

    def _sample(self, call: Callable[[], object]) -> float:
        self._flush()
        if not self.on_gpu:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def samples(
        self, call: Callable[[], object], before: Callable[[], object] | None = None
    ) -> list[float]:
        """Seconds of single calls on a cold cache: at least five, else until the time is up."""
        found: list[float] = []
        until = time.monotonic() + self.seconds
        while len(found) < 5 or (len(found) < self.rounds and time.monotonic() < until):
            if before is not None:
                before()
            found.append(self._sample(call))
        return found

    def each(self, call: Callable[[], object], about: float) -> float:
        """Seconds per call back to back, host and device together; one takes ``about`` so many."""
        count = min(max(int(self.seconds / 4 / about), 5), 200)
        self.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        self.synchronize()
        return (time.perf_counter() - begin) / count

    def peak(self, call: Callable[[], object]) -> int:
        """Bytes of tensors alive at once during a call, beyond those before it."""
        if not self.on_gpu:
            return _machine.peak_allocated(call)
        self.synchronize()
        held = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - held


@dataclass
class Row:
    """One line of the table."""

    case: str
    variant: str
    ms: float  # median of single calls on the device, cache cold
    min_ms: float
    max_ms: float
    call_ms: float  # per call back to back: what a training loop waits
    bandwidth: float | None  # share of the measured bandwidth that moving the floor's bytes makes
    times_floor: float | None  # over the floor of the same case
    peak_bytes: int
    note: str = ""


class Variant(NamedTuple):
    name: str
    call: Callable[[], object]
    before: Callable[[], object] | None = None  # not timed
    note: Callable[[], str] | None = None


class Stage:
    """A stage at work: what it has found goes to the file at once, so that no end can lose it."""

    def __init__(self, plan: Plan, lines: Path, seconds: float, bandwidth: float | None) -> None:
        self.plan, self.lines, self.bandwidth = plan, lines, bandwidth
        self.until = time.monotonic() + seconds
        self.clock = Clock(plan)
        self.floors: dict[str, float] = {}

    def put(self, kind: str, **value: Any) -> None:
        with self.lines.open("a") as file:
            file.write(json.dumps({"kind": kind, **value}) + "\n")

    def left_out(self, what: str, why: str) -> None:
        self.put("left out", what=what, why=why)

    def in_time(self, what: str) -> bool:
        if time.monotonic() < self.until:
            return True
        self.left_out(what, "no time left")
        return False

    def check_device(self, error: Exception) -> None:
        """Some errors leave a device on which nothing of this process runs any more: then the stage
        is over."""
        try:
            self.clock.synchronize()
        except Exception:
            raise error from None

    def measure(self, case: str, variant: Variant, floor_bytes: int | None) -> None:
        """A row, or why there is none: a variant that fails takes no other with it."""
        what = f"{case}: {variant.name}"
        if not self.in_time(what):
            return
        try:
            variant.call()  # warm-up: compilation, caches
            self.clock.synchronize()
            note = variant.note() if variant.note else ""
            seconds = self.clock.samples(variant.call, variant.before)
            row = Row(
                case,
                variant.name,
                *(1e3 * f(seconds) for f in (statistics.median, min, max)),
                call_ms=1e3 * self.clock.each(variant.call, statistics.median(seconds)),
                bandwidth=None,
                times_floor=None,
                peak_bytes=self.clock.peak(variant.call),
                note=note,
            )
        except Exception as error:
            self.check_device(error)
            self.left_out(what, brief(error))
            return
        if variant.name.startswith("floor"):
            self.floors[case] = row.ms
        if floor_bytes and self.bandwidth:
            row.bandwidth = floor_bytes / (row.ms * 1e-3) / self.bandwidth
        if case in self.floors:
            row.times_floor = row.ms / self.floors[case]
        self.put("row", **asdict(row))


def brief(error: BaseException) -> str:
    first = (str(error) or "no message").strip().splitlines()[0]
    return f"{type(error).__name__}: {first if len(first) <= 160 else first[:157] + '...'}"


# --- what is measured: the copy


def bandwidth(stage: Stage) -> None:
    plan = stage.plan
    size = plan.copied
    if stage.clock.on_gpu:
        size = min(size, torch.cuda.mem_get_info(stage.clock.device)[0] // 4)
    x = torch.randn(size // 4, device=stage.clock.device)
    y = torch.empty_like(x)
    y.copy_(x)
    clones = stage.clock.samples(lambda: x.clone())
    copies = stage.clock.samples(lambda: y.copy_(x))
    moved = 2 * x.numel() * x.element_size()
    stage.put(
        "bandwidth",
        bytes_per_s=moved / statistics.median(clones),
        copy_bytes_per_s=moved / statistics.median(copies),
        tensor_bytes=x.numel() * x.element_size(),
    )


# --- what is measured: losses on logits


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


def on_backend(backend: str, call: Callable[..., Any]) -> Callable[..., Any]:
    import fastxkd

    def chosen(*arguments: Any) -> Any:
        with fastxkd.use_backend(backend):
            return call(*arguments)

    return chosen


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


# --- what is measured: class activation maps


@dataclass(frozen=True)
class Maps:
    """Activations as after a ReLU, gradients of either sign, in one of the two layouts."""

    activations: Tensor
    gradients: Tensor
    method: str

    def ours(self) -> Tensor:
        import fastxkd

        return fastxkd.cam_from(self.activations, self.gradients, self.method)

    def eager(self) -> Tensor:
        """As explainers write it."""
        a, g = self.activations, self.gradients
        if self.method == "layercam":
            raw = (g.clamp(min=0) * a).sum(1)
        else:
            if self.method == "gradcam":
                weights = g.mean((2, 3))
            else:
                below = 2 * g**2 + a.sum((2, 3), keepdim=True) * g**3 + 1e-6
                weights = (g.clamp(min=0) * torch.where(g != 0, g**2 / below, 0)).sum((2, 3))
            raw = (weights[:, :, None, None] * a).sum(1)
        raw = raw.clamp(min=0)
        raw = raw - raw.amin((1, 2), keepdim=True)
        return raw / (1e-7 + raw.amax((1, 2), keepdim=True))

    def backward(self) -> None:
        """Of the map before it is finished, to both tensors."""
        torch.ops.fastxkd.cam_backward(
            self.activations[:, 0].contiguous(), self.activations, self.gradients, self.method
        )

    def deviation(self, of: Callable[[], Tensor]) -> str:
        exact = Maps(self.activations.double(), self.gradients.double(), self.method).eager()
        return f"map off by {(of().double() - exact).abs().max():.1e}"


CAM_METHODS = ("gradcam", "layercam", "gradcam++")


def cam_kernels(stage: Stage) -> None:
    """The operator on every backend, both layouts, beside one reading of its inputs."""
    device = stage.clock.device
    for shape in stage.plan.maps:
        for layout in ("contiguous", "channels_last"):
            for name in stage.plan.dtypes:
                kind: dict[str, Any] = {"device": device, "dtype": getattr(torch, name)}
                torch.manual_seed(0)
                a, g = torch.randn(shape, **kind).relu_(), torch.randn(shape, **kind)
                if layout == "channels_last":
                    a, g = (x.contiguous(memory_format=torch.channels_last) for x in (a, g))
                moved = 2 * a.numel() * a.element_size()
                for method in CAM_METHODS:
                    case = f"cam {method} {'x'.join(map(str, shape))} {layout} {name}"
                    floor = Variant("floor: read both", lambda a=a, g=g: (a.sum(), g.sum()))  # type: ignore[misc]
                    stage.measure(case, floor, moved)
                    maps = Maps(a, g, method)
                    for backend in stage.plan.backends:
                        ours = on_backend(backend, maps.ours)
                        note = partial(maps.deviation, ours)
                        stage.measure(case, Variant(backend, ours, note=note), moved)
                        if layout == "contiguous":
                            back = on_backend(backend, maps.backward)
                            stage.measure(case, Variant(f"{backend}, backward", back), 2 * moved)
                    stage.measure(case, Variant("eager", maps.eager), moved)


# --- what is measured: operators without a GPU kernel


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


# --- what is measured: distances


def gram_products(features: list[Tensor]) -> Callable[[], object]:
    """Of the tiles of one triangle, in float32: what no method by products can avoid."""
    from fastxkd.ops import _distance_gpu

    rows = _distance_gpu.tile_rows([x.shape[1] for x in features], features[0].dtype)
    out = torch.empty(rows, rows, dtype=features[0].dtype, device=features[0].device)

    def call() -> None:
        with _distance_gpu.full_precision(out):
            for x in features:
                strips = x.split(rows)
                for i, left in enumerate(strips):
                    for right in strips[i:]:
                        torch.mm(left, right.T, out=out[: len(left), : len(right)])

    return call


def distance_kernels(stage: Stage) -> None:
    """Distance correlation, and the sums that scores of many layers are made of; by backend, and
    in plain torch."""
    import fastxkd
    from fastxkd.ops.distance import distance_sums

    device = stage.clock.device
    torch.manual_seed(0)
    n, width = stage.plan.samples
    x, y = torch.randn(n, width, device=device), torch.randn(n, width, device=device)
    leaf = x.clone().requires_grad_(True)
    case = f"distance_correlation {n}x{width} float32"

    def backward() -> None:
        fastxkd.distance_correlation(leaf, y).backward()
        leaf.grad = None

    def deviation() -> str:
        few, others = x[:512], y[:512]
        found = fastxkd.distance_correlation(few, others).item()
        with fastxkd.use_backend("reference"):
            exact = fastxkd.distance_correlation(few.double(), others.double()).item()
        return f"off by {abs(found - exact):.1e}"

    backends = list(dict.fromkeys([*stage.plan.backends, "reference"]))
    stage.measure(case, Variant("floor: Gram products", gram_products([x, y])), None)
    for backend in backends:
        forward = partial(fastxkd.distance_correlation, x, y)
        note = on_backend(backend, deviation)
        stage.measure(case, Variant(backend, on_backend(backend, forward), note=note), None)
        both = Variant(f"{backend}, with backward", on_backend(backend, backward))
        stage.measure(case, both, None)

    count, n, width = stage.plan.layers
    features = [torch.randn(n, width, device=device) for _ in range(count - 1)]
    features.append(torch.eye(10, device=device)[torch.arange(n, device=device) % 10])
    names = [str(k) for k in range(count)]
    case = f"distance sums of {count} matrices {n}x{width} float32"
    stage.measure(case, Variant("floor: Gram products", gram_products(features[:-1])), None)
    for backend in backends:
        if backend != "reference":  # n x n differences of a thousand numbers: minutes
            call = partial(distance_sums, features, names)
            stage.measure(case, Variant(backend, on_backend(backend, call)), None)


# --- what is measured: network dissection


@dataclass(frozen=True)
class Concepts:
    """Maps as after a ReLU, thresholds that a two-hundredth is above, and masks in patches."""

    activations: Tensor
    thresholds: Tensor
    masks: Tensor
    labels: Tensor
    categories: Tensor
    low: Tensor
    counts: Tensor

    KINDS = 6

    @classmethod
    def made(cls, plan: Plan, dtype: torch.dtype, device: torch.device) -> Concepts:
        torch.manual_seed(0)
        (n, units, side), (layers, out_side, count) = plan.units, plan.masks
        activations = torch.randn(n, units, side, side, device=device).relu_().to(dtype)
        rows = activations.float().movedim(1, 0).flatten(1)
        thresholds = rows.kthvalue(max(int(0.995 * rows.shape[1]), 1), 1).values
        coarse = torch.randint(count, (n, layers, 6, 6), device=device).double()
        masks = F.interpolate(coarse, (out_side, out_side), mode="nearest").to(torch.int16)
        return cls(
            activations,
            thresholds,
            masks,
            torch.randint(count, (n, 2), device=device),
            torch.arange(count, device=device) % cls.KINDS,
            torch.full((units,), -(2**31) if dtype == torch.float32 else -(2**15), device=device),
            torch.zeros(units, 2**11 + 1, dtype=torch.int64, device=device),
        )

    def tally(self) -> tuple[Tensor, ...]:
        from fastxkd.ops.concepts import concept_tally

        given = (self.activations, self.thresholds, self.masks, self.labels, self.categories)
        return concept_tally(*given, category_count=self.KINDS)

    def areas(self) -> Tensor:
        from fastxkd.ops.concepts import label_areas

        return label_areas(self.masks, self.labels, len(self.categories))

    def count(self) -> Tensor:
        from fastxkd.ops.concepts import unit_counts

        shift = self.activations.element_size() * 8 - 11
        unit_counts(self.activations, self.low, shift, 11, self.counts)
        return self.counts

    def deviation(self, images: int = 4) -> str:
        """Of the first images, as on the CPU: integers, which have no tolerance."""
        import fastxkd

        by_image = {k: getattr(self, k)[:images] for k in ("activations", "masks", "labels")}
        few = replace(self, **by_image)
        exact = Concepts(*(getattr(few, f.name).cpu() for f in fields(few)))
        found = (*few.tally(), few.areas())
        with fastxkd.use_backend("reference"):
            expected = (*exact.tally(), exact.areas())
        same = all(torch.equal(x.cpu(), y) for x, y in zip(found, expected, strict=True))
        return "the same integers" if same else "OTHER integers"


def concept_kernels(stage: Stage) -> None:
    """Tallies, label areas and a pass of the thresholds, beside one reading of what they read."""
    plan = stage.plan
    shape = "x".join(map(str, (*plan.units, *plan.masks)))
    for name in plan.dtypes:
        given = Concepts.made(plan, getattr(torch, name), stage.clock.device)
        a, m = given.activations, given.masks
        of_maps, of_masks = (x.numel() * x.element_size() for x in (a, m))
        for case, call, floor, moved, note in (
            ("tally", given.tally, lambda a=a, m=m: (a.sum(), m.sum()), of_maps + of_masks, True),
            ("label areas", given.areas, lambda m=m: m.sum(), of_masks, True),
            ("unit counts", given.count, lambda a=a: a.sum(), of_maps, False),
        ):
            title = f"concepts, {case} {shape} {name}"
            stage.measure(title, Variant("floor: read", floor), moved)
            for backend in plan.backends:
                of = on_backend(backend, given.deviation) if note else None
                stage.measure(title, Variant(backend, on_backend(backend, call), note=of), moved)


# --- checks


def numbers(stage: Stage) -> None:
    """Errors of every divergence and loss on the device against float64 on the CPU."""
    import fastxkd
    from tests import test_gpu

    device = stage.clock.device
    for backend in stage.plan.backends:
        for name in stage.plan.divergences:
            for dtype in stage.plan.dtypes:
                what = f"{backend}, {name}, {dtype}"
                if not stage.in_time(what):
                    continue
                given = test_gpu.logits(41, 1271, getattr(torch, dtype), ignored=0.2)
                try:
                    with fastxkd.use_backend(backend):
                        e = test_gpu.compare(*given, test_gpu.DIVERGENCES[name], device)
                except Exception as error:
                    stage.check_device(error)
                    stage.put("check", what=what, passed=False, text=brief(error))
                    continue
                text = (
                    f"loss off by {e.loss:.1e} (limit {e.loss_limit:.1e}),"
                    f" gradient by {e.grad:.1e} (limit {e.grad_limit:.1e})"
                )
                stage.put("check", what=what, passed=e.within(), text=text)
        for name in test_gpu.CAM_METHODS:
            for dtype in stage.plan.dtypes:
                what = f"{backend}, cam {name}, {dtype}"
                if not stage.in_time(what):
                    continue
                try:
                    with fastxkd.use_backend(backend):
                        off, limit = test_gpu.cam_error(
                            (2, 40, 7, 7), getattr(torch, dtype), name, device
                        )
                except Exception as error:
                    stage.check_device(error)
                    stage.put("check", what=what, passed=False, text=brief(error))
                    continue
                text = f"map off by {off:.1e} (limit {limit:.1e})"
                stage.put("check", what=what, passed=off <= limit, text=text)
        for dtype in stage.plan.dtypes:
            what = f"{backend}, concepts, {dtype}"
            if not stage.in_time(what):
                continue
            try:
                with fastxkd.use_backend(backend):
                    wrong = test_gpu.concepts_that_differ(getattr(torch, dtype), device)
            except Exception as error:
                stage.check_device(error)
                stage.put("check", what=what, passed=False, text=brief(error))
                continue
            text = f"other integers: {', '.join(wrong)}" if wrong else "the same integers"
            stage.put("check", what=what, passed=not wrong, text=text)
    for name in test_gpu.LOSSES:
        if not stage.in_time(name):
            continue
        try:
            loss, grad = test_gpu.device_error(name, device)
        except Exception as error:
            stage.check_device(error)
            stage.put("check", what=name, passed=False, text=brief(error))
            continue
        text = f"loss off by {loss:.1e}, gradient by {grad:.1e} of itself"
        stage.put("check", what=name, passed=loss <= 1e-5 and grad <= 1e-4, text=text)


# --- stages, each in a process of its own


def build(plan: Plan) -> list[str]:
    return [sys.executable, "setup.py", "build_ext", "--inplace"]


def tests(plan: Plan) -> list[str]:
    # Without the project's pytest settings, which may ask for plugins that are not there.
    settings = [
        "-c",
        os.devnull,
        "--rootdir",
        str(ROOT),
        "-p",
        "no:cacheprovider",
        "-o",
        "markers=gpu",
    ]
    return [sys.executable, "-m", "pytest", *settings, "-v", "--tb=short", *plan.tests]


@dataclass(frozen=True)
class Job:
    """A stage: a command of its own, or a function of this module that fills in the report."""

    name: str
    seconds: float
    work: Callable[[Plan], list[str]] | Callable[[Stage], None]
    command: bool = False


# In the order of what would be missed most. The seconds are shares: a stage gets its own of what is
# left, so the time that one does not need goes to those after it.
JOBS = (
    Job("build", 100, build, command=True),
    Job("bandwidth", 25, bandwidth),
    Job("kernels", 110, kd_loss_kernels),
    Job("tests", 100, tests, command=True),
    Job("cam", 40, cam_kernels),
    Job("peers", 100, kd_loss_peers),
    Job("numbers", 35, numbers),
    Job("linear", 25, linear_loss),
    Job("distance", 30, distance_kernels),
    Job("concepts", 25, concept_kernels),
)


@dataclass
class Report:
    """What gpu.json holds."""

    facts: dict[str, str]
    stages: list[dict[str, Any]] = field(default_factory=list)
    bandwidth: dict[str, float] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def take(self, lines: Path) -> None:
        """What a stage has written, up to where it ended."""
        if not lines.exists():
            return
        for line in lines.read_text().splitlines():
            try:
                value = json.loads(line)
            except json.JSONDecodeError:  # cut off with the stage
                continue
            kind = value.pop("kind")
            if kind == "bandwidth":
                self.bandwidth = value
            else:
                {"row": self.rows, "check": self.checks, "left out": self.left_out}[kind].append(
                    value
                )


def environment(plan: Plan) -> dict[str, str]:
    env = dict(os.environ)
    if plan.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        arch = os.environ.get("FASTXKD_CUDA_ARCH") or f"{major}{minor}"
        # The C++ kernels take a minute more and are not what this is about.
        env |= {"FASTXKD_CUDA": "1", "FASTXKD_CPU": "0", "FASTXKD_CUDA_ARCH": arch}
    return env


def in_process(command: list[str], env: dict[str, str], log: Path, seconds: float) -> int | None:
    """The exit status; None when it did not end in time, and was ended with all it had started."""
    with log.open("a") as file:
        file.write(f"\n$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def run_stage(job: Job, plan: Plan, report: Report, log: Path, seconds: float) -> None:
    begin, mark = time.monotonic(), log.stat().st_size if log.exists() else 0
    with tempfile.TemporaryDirectory() as folder:
        lines, env = Path(folder, "lines"), environment(plan)
        if job.command:
            command = job.work(plan)
        else:
            command = [sys.executable, "-m", "benchmarks.gpu"]
            speed = report.bandwidth and report.bandwidth["bytes_per_s"]
            task = {
                "stage": job.name,
                "plan": asdict(plan),
                "lines": str(lines),
                "seconds": seconds,
                "bandwidth": speed,
            }
            env["FASTXKD_GPU_JOB"] = json.dumps(task)
        code = in_process(command, env, log, seconds + (0 if job.command else GRACE))  # type: ignore[arg-type]
        report.take(lines)
    said = log.read_bytes()[mark:].decode(errors="replace")
    state = {0: "done", None: "out of time"}.get(code, f"failed ({code})")
    text = "" if code == 0 and not job.command else last_words(said)
    took = round(time.monotonic() - begin, 1)
    report.stages.append({"stage": job.name, "state": state, "seconds": took, "text": text})


def last_words(said: str) -> str:
    """Its last line, the error or the summary; of tests that did not end, how far they came."""
    lines = [line.strip(" =") for line in said.splitlines()[1:] if line.strip(" =")]
    ended = re.findall(r"^tests/\S+ (PASSED|FAILED|SKIPPED|ERROR)", said, re.MULTILINE)
    if ended and not re.search(r" in [\d.]+s", lines[-1]):
        return "so far " + ", ".join(f"{ended.count(s)} {s.lower()}" for s in sorted(set(ended)))
    return lines[-1][:200] if lines else ""


def stage_process() -> None:
    """The other side: a stage in this process, as the environment says."""
    task = json.loads(os.environ["FASTXKD_GPU_JOB"])
    plan = Plan(**{k: _tuples(v) if isinstance(v, list) else v for k, v in task["plan"].items()})
    job = next(job for job in JOBS if job.name == task["stage"])
    guard = torch.cuda.device(0) if plan.device == "cuda" else nullcontext()
    with guard:
        stage = Stage(plan, Path(task["lines"]), task["seconds"], task["bandwidth"])
        job.work(stage)  # type: ignore[arg-type]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


# --- the report


def facts(plan: Plan) -> dict[str, str]:
    found = _machine.facts()
    found["python"] = platform.python_version()
    if plan.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["device"] = f"{properties.name}, {properties.multi_processor_count} processors"
        found["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        found["CUDA of torch"] = str(torch.version.cuda)
        fields_ = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        try:
            run = subprocess.run(
                ["nvidia-smi", f"--query-gpu={fields_}", "--format=csv,noheader", "-i", "0"],
                capture_output=True,
                text=True,
                timeout=20,
            )
            values = run.stdout.strip().split(", ")
            names = ("driver", "clock", "highest clock", "memory clock", "power limit", "degrees")
            found |= dict(zip(names, values, strict=False)) if run.returncode == 0 else {}
        except (OSError, subprocess.TimeoutExpired):
            found["driver"] = "unknown: no nvidia-smi"
    else:
        found["device"] = plan.device
    for package in ("triton", "liger_kernel"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        found[package] = version
    return found


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return [*lines, *(f"| {' | '.join(_cell(v) for v in row)} |" for row in rows)]


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def markdown(report: Report) -> str:
    lines = ["# fastxkd on a GPU", ""]
    lines += _table(("", ""), list(report.facts.items()))
    if report.bandwidth:
        speed = report.bandwidth["bytes_per_s"] / 1e9
        lines += ["", f"Copy bandwidth (clone, bytes read and written): {speed:.0f} GB/s."]
    lines += ["", "## Stages", ""]
    found = [(s["stage"], s["state"], f"{s['seconds']:.0f} s", s["text"]) for s in report.stages]
    lines += _table(("stage", "", "took", "last line"), found)
    lines += ["", "## Times", ""]
    lines.append(
        "Medians of single calls on the device with a cold cache; per call back to back; share of"
        " the copy bandwidth that moving the floor's bytes in that time makes; times the floor."
    )
    rows = []
    for r in sorted(report.rows, key=_place(report.rows)):
        share = "" if r["bandwidth"] is None else f"{100 * r['bandwidth']:.0f} %"
        floor = "" if r["times_floor"] is None else f"{r['times_floor']:.3g}"
        times = (f"{r['ms']:.4g}", f"{r['min_ms']:.4g} to {r['max_ms']:.4g}", f"{r['call_ms']:.4g}")
        figures = (*times, share, floor, _size(r["peak_bytes"]), r["note"])
        rows.append((r["case"], r["variant"], *figures))
    head = ("case", "variant", "ms", "range", "call ms", "bandwidth", "x floor", "peak", "")
    lines += ["", *_table(head, rows)]
    if report.checks:
        failed = sum(not c["passed"] for c in report.checks)
        lines += ["", f"## Numbers: {len(report.checks)} checks, {failed} failed", ""]
        verdicts = [
            (c["what"], "ok" if c["passed"] else "**FAILED**", c["text"]) for c in report.checks
        ]
        lines += _table(("", "", "against float64"), verdicts)
    if report.left_out:
        lines += ["", "## Left out", ""]
        lines += _table(("", "why"), [(x["what"], x["why"]) for x in report.left_out])
    return "\n".join([*lines, ""])


def _place(rows: list[dict[str, Any]]) -> Callable[[dict[str, Any]], int]:
    """Cases in the order they came in, the rows of a case together."""
    order: dict[str, int] = {}
    for row in rows:
        order.setdefault(row["case"], len(order))
    return lambda row: order[row["case"]]


def write(report: Report, out: Path) -> None:
    (out / "gpu.json").write_text(json.dumps(asdict(report), indent=1))
    (out / "gpu.md").write_text(markdown(report))


def run(plan: Plan, out: Path, budget: float, jobs: tuple[Job, ...] = JOBS) -> Report:
    """All stages, their files in ``out`` after each of them."""
    until = time.monotonic() + budget
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.write_text("")
    report = Report(facts(plan))
    shares = sum(job.seconds for job in jobs)
    for job in jobs:
        left = until - time.monotonic() - GRACE
        seconds = left * job.seconds / shares
        if seconds < min(5.0, budget / 20):
            text = "the stages before took the time"
            report.stages.append(
                {"stage": job.name, "state": "out of time", "seconds": 0.0, "text": text}
            )
        else:
            print(f"gpu: {job.name}, up to {seconds:.0f} s", file=sys.stderr)
            run_stage(job, plan, report, log, seconds)
            print(f"gpu: {job.name}: {report.stages[-1]['state']}", file=sys.stderr)
        shares -= job.seconds
        write(report, out)
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the report")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds in all (480)")
    parser.add_argument("--only", default="", metavar="STAGES", help="some of them, by comma")
    chosen = parser.parse_args(arguments)
    wanted = [name for name in chosen.only.split(",") if name]
    unknown = set(wanted) - {job.name for job in JOBS}
    if unknown:
        known = ", ".join(job.name for job in JOBS)
        parser.error(f"--only: expected stages of {known}, got {', '.join(sorted(unknown))}")
    if not chosen.budget > 0:
        parser.error(f"--budget: expected a number of seconds above 0, got {chosen.budget}")
    if not torch.cuda.is_available():
        why = (
            "this torch is built without CUDA" if torch.version.cuda is None else "torch sees none"
        )
        print(f"benchmarks.gpu: needs a CUDA device: {why}", file=sys.stderr)
        return 2
    jobs = tuple(job for job in JOBS if not wanted or job.name in wanted)
    report = run(Plan(), chosen.out, chosen.budget, jobs)
    print(markdown(report))
    passed = all(c["passed"] for c in report.checks)
    return 0 if passed and all(s["state"] == "done" for s in report.stages) else 1


if __name__ == "__main__":
    if "FASTXKD_GPU_JOB" in os.environ:
        stage_process()
    else:
        sys.exit(main())
