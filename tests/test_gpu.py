"""The GPU kernels where they run: numbers, streams, graphs, and that the host never waits.

Needs a CUDA device; ``python -m benchmarks.gpu`` runs it too. The truth is autograd in float64 on
the CPU. With FASTXKD_CUDA=1 a missing CUDA extension is a failure, without it a skip.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastxkd
from fastxkd.losses import explanations, features, inputs, linear, relations, review, similarity
from fastxkd.ops import _distance_gpu, _library, cam, concepts, distance
from tests import oracles, test_cam_emulator, test_concepts, test_distance, test_emulator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CUDA = torch.device("cuda")
IGNORE, NAN = -100, float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DIVERGENCES: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd", "beta": 0.3},
    "tvd": {"divergence": "tvd"},
    "dkd": {"divergence": "dkd", "alpha": 1.0, "beta": 8.0},
    "dist": {"divergence": "dist", "alpha": 1.0, "beta": 2.0},
}
# Warps, blocks, and rows that no block holds; lengths that no vector divides.
SHAPES = (
    (1, 1),
    (7, 33),
    (128, 100),
    (256, 1000),
    (41, 1271),
    (24, 5003),
    (16, 32000),
    (3, 151936),
)
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


# --- the comparison, which benchmarks.gpu uses as well


class Errors(NamedTuple):
    """Norms of differences from float64; each may be as large as its limit."""

    loss: float
    loss_limit: float
    grad: float
    grad_limit: float

    def within(self) -> bool:
        return self.loss <= self.loss_limit and self.grad <= self.grad_limit


def logits(
    rows: int, classes: int, dtype: torch.dtype, *, ignored: float = 0.0, scale: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 7919 + classes)
    teacher = scale * torch.randn(rows, classes, generator=generator)
    student = 0.8 * teacher + torch.randn(rows, classes, generator=generator)
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = IGNORE
    return student.to(dtype), teacher.to(dtype), labels


def loss_of(
    student: Tensor, teacher: Tensor, labels: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """The library's loss, by the oracle's names of the options."""
    rest = dict(options)
    divergence = rest.get("divergence")
    if divergence not in ("dkd", "dist"):
        found = fastxkd.kd_loss(student, teacher, labels, **rest)
    else:
        del rest["divergence"]
        weights = {
            "dkd": ("target_weight", "others_weight"),
            "dist": ("inter_weight", "intra_weight"),
        }
        rest |= dict(zip(weights[divergence], (rest.pop("alpha"), rest.pop("beta")), strict=True))
        rest = {"ce_weight": 0.1, "kd_weight": 0.9} | rest
        if divergence == "dkd":
            assert labels is not None
            found = fastxkd.dkd_loss(student, teacher, labels, **rest)
        else:
            found = fastxkd.losses.dist_loss(student, teacher, labels, **rest)
    assert isinstance(found, Tensor)
    return found


def parts_of(
    student: Tensor, teacher: Tensor, labels: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The oracle's hard and soft part."""
    if options.get("divergence") != "dist":
        return oracles.kd_parts(student, teacher, labels, **options)
    rest = options | {"divergence": "forward_kl", "kd_weight": 0.0}
    hard, _ = oracles.kd_parts(student, teacher, labels, **rest)
    keep = torch.ones(len(student), dtype=torch.bool) if labels is None else labels != IGNORE
    weight = options.get("row_weight")
    weight = (torch.ones(len(student)) if weight is None else weight)[keep].to(student.dtype)
    temperature = options.get("temperature", 4.0)
    q, p = (torch.softmax(x[keep] / temperature, 1) for x in (student, teacher))
    value = test_emulator.dist(q, p, weight, options["alpha"], options["beta"])
    return hard, options.get("kd_weight", 0.9) * temperature**2 * value


def _oracle(
    student: Tensor, teacher: Tensor, labels: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient, and the loss of every row."""
    leaf = student.detach().clone().requires_grad_(True)
    hard, soft = parts_of(leaf, teacher, labels, options)
    (hard + soft).sum().backward()
    assert leaf.grad is not None
    if options.get("divergence") == "dist":  # no sum over rows
        return (hard + soft).detach(), leaf.grad, (hard + soft).detach()
    with torch.no_grad():
        hard_rows, soft_rows = oracles.kd_parts(
            student, teacher, labels, **(options | {"reduction": "none"})
        )
    return (hard + soft).detach(), leaf.grad, hard_rows + soft_rows


def _untied(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The student without classes as likely as the teacher's to the last digits of a float32: the
    total variation's gradient jumps there, and either side is right."""
    while True:
        q, p = (torch.log_softmax(x.double() / temperature, 1) for x in (student, teacher))
        tied = (q - p).abs() < 1e-5
        if student.shape[1] == 1 or not tied.any():
            return student
        student = torch.where(tied, student + 0.25, student)


def compare(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    options: dict[str, Any],
    device: torch.device,
) -> Errors:
    """The library on ``device`` against float64 on the CPU, where the tensors are.

    The limits are what the formula in the same dtype costs and 1e-6; a 16-bit gradient's is a fifth
    above what storing the true one costs.
    """
    if options.get("divergence") == "tvd":
        student = _untied(student, teacher, options.get("temperature", 4.0))
    there = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in options.items()
    }
    leaf = student.to(device).detach().requires_grad_(True)
    loss = loss_of(leaf, teacher.to(device), None if labels is None else labels.to(device), there)
    loss.sum().backward()
    assert leaf.grad is not None
    exact = torch.float64 if student.dtype == torch.float64 else torch.float32
    assert (loss.dtype, leaf.grad.dtype) == (exact, student.dtype)
    assert leaf.grad.shape == student.shape

    true_loss, true_grad, true_rows = _oracle(student.double(), teacher.double(), labels, options)
    # DIST's squares underflow in float16: 0/0 is no limit.
    exactly = options.get("divergence") == "dist" and student.dtype != torch.float64
    how = torch.float32 if exactly else student.dtype
    eager_loss, eager_grad, eager_rows = _oracle(student.to(how), teacher.to(how), labels, options)
    eps = 1e-12 if student.dtype == torch.float64 else 1e-6
    mean = options.get("reduction", "batchmean") == "batchmean"
    rows = student.shape[0]
    # Errors of rows in quadrature: in eager's own sum they may cancel by luck.
    by_rows = (eager_rows.double() - true_rows).norm() / (rows if mean else 1)
    loss_limit = max((eager_loss.double() - true_loss).norm(), by_rows)
    unit = 1.0
    if options.get("divergence") == "dist":  # correlations of order 1, times that
        unit = options.get("kd_weight", 0.9) * options.get("temperature", 4.0) ** 2
        unit *= options["alpha"] + options["beta"]
    loss_limit += eps * max(true_loss.norm(), unit)
    # What the gradient is the difference of: its scale where that cancels to nothing.
    parts = options["alpha"] + options["beta"] if options.get("divergence") == "dkd" else 1
    terms = options.get("ce_weight", 0.1) + (
        options.get("kd_weight", 0.9) * parts * options.get("temperature", 4.0)
    )
    norm = max(true_grad.norm(), 0.1 * terms * rows**0.5 / (rows if mean else 1))
    if options.get("divergence") == "dist":
        rest = {"kd_weight": 0.9} | options
        norm = max(norm, test_emulator.terms(student, teacher, labels, rest))
    grad_limit = (eager_grad.double() - true_grad).norm()
    if student.dtype in (torch.bfloat16, torch.float16):
        grad_limit = 1.2 * (true_grad.to(student.dtype).double() - true_grad).norm()
    return Errors(
        float((loss.detach().cpu().double() - true_loss).norm()),
        float(loss_limit),
        float((leaf.grad.cpu().double() - true_grad).norm()),
        float(grad_limit + eps * norm),
    )


def check(*arguments: Any, device: torch.device = CUDA) -> None:
    errors = compare(*arguments, device)
    assert errors.loss <= errors.loss_limit, errors
    assert errors.grad <= errors.grad_limit, errors


# --- fixtures


@pytest.fixture(params=["cuda", "triton"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both GPU backends, one after the other."""
    missing = _library._has(request.param, "kd_loss", "cuda", torch.float32)
    if missing and os.environ.get("FASTXKD_CUDA") == "1":
        pytest.fail(f"{request.param}: {missing}")
    if missing:
        pytest.skip(missing)
    with fastxkd.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels are to write is NaN before."""
    real = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        out = real(*args, **kwargs)
        if out.is_floating_point() and out.device.type == "cuda" and type(out) is Tensor:
            with torch.no_grad():
                out.fill_(NAN)
        return out

    monkeypatch.setattr(torch, "empty", empty)


def on_gpu(*tensors: Tensor) -> list[Tensor]:
    return [t.to(CUDA) for t in tensors]


def step(
    student: Tensor, teacher: Tensor, labels: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_(True)
    loss = loss_of(leaf, teacher, labels, options)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), grad


# --- numbers


@every_divergence
@every_dtype
def test_matches_float64(kernel: str, dtype: torch.dtype, divergence: str) -> None:
    # Triton compiles for every length, dtype and divergence anew, a second each.
    shapes = SHAPES if kernel == "cuda" else ((41, 1271),)
    for shape in shapes:
        check(*logits(*shape, dtype, ignored=0.2 if shape[0] > 9 else 0), DIVERGENCES[divergence])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_float64_at_every_length(
    kernel: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    check(*logits(*shape, dtype), {"temperature": 2.0})


OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "none, T=1": {"reduction": "none", "temperature": 1.0},
    "a temperature without a power": {"temperature": 2.5},
    "only hard": {"kd_weight": 0.0, "ce_weight": 1.0},
    "only soft": {"ce_weight": 0.0, "kd_weight": 1.0},
    "smoothing and weights": {
        "label_smoothing": 0.1,
        "class_weight": torch.linspace(0, 2, 33),
        "row_weight": torch.linspace(0, 3, 9),
    },
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_options(kernel: str, dtype: torch.dtype, name: str) -> None:
    divergences = DIVERGENCES if kernel == "cuda" else {"forward_kl": {}}
    for divergence in divergences.values():
        if divergence.get("divergence") == "dist" and "reduction" in OPTIONS[name]:
            continue  # a mean and nothing else
        check(*logits(9, 33, dtype, ignored=0.3), divergence | OPTIONS[name])


def test_without_labels_and_without_gradient(kernel: str) -> None:
    student, teacher, _ = logits(9, 33, torch.float32)
    check(student, teacher, None, {})
    with torch.no_grad():
        loss = fastxkd.kd_loss(*on_gpu(student, teacher))
    with fastxkd.use_backend("reference"):
        torch.testing.assert_close(loss.cpu(), fastxkd.kd_loss(student, teacher))


@every_divergence
def test_rows_at_odd_places(kernel: str, divergence: str) -> None:
    """Strided rows whose first element is not where a vector begins."""
    student, teacher, labels = on_gpu(*logits(20, 1003, torch.float32))
    mine, theirs = student[::2, 1:-1], teacher[1::2, 2:]
    mine, theirs = mine[:, : theirs.shape[1]], theirs[:, : mine.shape[1]]
    y = labels[::2].clamp(max=mine.shape[1] - 1)
    loss, grad = step(mine, theirs, y, DIVERGENCES[divergence])
    expected = step(mine.contiguous(), theirs.contiguous(), y, DIVERGENCES[divergence])
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(grad, expected[1])
    check(mine.cpu(), theirs.cpu(), y.cpu(), DIVERGENCES[divergence])


def test_extreme_logits(kernel: str) -> None:
    student, teacher, labels = logits(9, 33, torch.float32)
    check(student * 30, teacher * 30, labels, {"temperature": 1.0})
    check(student + 1000, teacher - 1000, labels, {})
    teacher[:, 5] = student[:, 5] = -float("inf")
    labels[labels == 5] = 6
    check(student, teacher, labels, {})


@every_divergence
def test_ignored_rows_may_hold_anything(kernel: str, divergence: str) -> None:
    student, teacher, labels = on_gpu(*logits(12, 1000, torch.float32))
    labels[3:7] = IGNORE
    expected = step(student, teacher, labels, DIVERGENCES[divergence])
    student[3:7], teacher[4] = NAN, float("inf")
    loss, grad = step(student, teacher, labels, DIVERGENCES[divergence])
    torch.testing.assert_close(loss, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(grad, expected[1], rtol=0, atol=0)
    assert not grad[3:7].any()
    labels[:] = IGNORE
    loss, grad = step(student, teacher, labels, DIVERGENCES[divergence])
    assert loss.item() == 0
    assert not grad.any()


def test_a_wrong_label_is_its_rows_alone(kernel: str) -> None:
    student, teacher, labels = on_gpu(*logits(6, 100, torch.float32))
    expected = step(student, teacher, labels, {"reduction": "none"})
    labels[2], labels[4] = 100, -7
    loss, grad = step(student, teacher, labels, {"reduction": "none"})
    wrong = torch.tensor([False, False, True, False, True, False], device=CUDA)
    assert loss[wrong].isnan().all()
    assert grad[wrong].isnan().all()
    torch.testing.assert_close(loss[~wrong], expected[0][~wrong])
    torch.testing.assert_close(grad[~wrong], expected[1][~wrong])


@pytest.mark.parametrize("divergence", ["forward_kl", "dist"])
def test_the_same_numbers_every_time(kernel: str, divergence: str) -> None:
    given = on_gpu(*logits(4096, 1000, torch.float32, ignored=0.1))
    first = step(*given, DIVERGENCES[divergence])
    for _ in range(5):
        for one, other in zip(step(*given, DIVERGENCES[divergence]), first, strict=True):
            assert torch.equal(one, other)


def test_offsets_beyond_31_bits(kernel: str) -> None:
    rows, classes = 16_400, 131_072
    assert rows * classes > 2**31
    # Two matrices of logits, their gradient, and the noise that one is made of.
    needed = 4 * rows * classes * 2
    free = torch.cuda.mem_get_info()[0]
    if free < 1.2 * needed:
        pytest.skip(f"needs {1.2 * needed / 2**30:.0f} GiB of free memory, has {free / 2**30:.0f}")
    student = torch.randn(rows, classes, dtype=torch.bfloat16, device=CUDA)
    teacher = torch.randn(rows, classes, dtype=torch.bfloat16, device=CUDA)
    labels = torch.randint(classes, (rows,), device=CUDA)
    options = {"reduction": "none"}
    loss, grad = step(student, teacher, labels, options)
    for rows_ in (slice(0, 8), slice(rows - 8, rows)):
        part = step(student[rows_].clone(), teacher[rows_].clone(), labels[rows_], options)
        torch.testing.assert_close(loss[rows_], part[0])
        torch.testing.assert_close(grad[rows_], part[1])
    assert not loss.isnan().any()
    last = grad[-8:].clone()
    torch.ops.fastxkd.kd_loss_scale_(grad, torch.full((rows,), 2.0, device=CUDA))
    torch.testing.assert_close(grad[-8:], 2 * last, rtol=0, atol=0)


def test_dist_offsets_beyond_31_bits(kernel: str) -> None:
    """The same rows over and over: the same correlations, and of the gradient each row's share."""
    rows, classes, times = 100, 131_072, 164
    assert rows * times * classes > 2**31
    needed = 3 * rows * times * classes * 2
    free = torch.cuda.mem_get_info()[0]
    if free < 1.2 * needed:
        pytest.skip(f"needs {1.2 * needed / 2**30:.0f} GiB of free memory, has {free / 2**30:.0f}")
    once = on_gpu(*logits(rows, classes, torch.bfloat16))
    student, teacher, labels = once
    many = (student.repeat(times, 1), teacher.repeat(times, 1), labels.repeat(times))
    options = DIVERGENCES["dist"]
    loss, grad = step(*many, options)
    assert loss.isfinite()
    assert torch.equal(grad[-rows:], grad[:rows])
    # Of the rows alone: beside the columns' norms, which grow, 1e-8 is not the same.
    options = options | {"beta": 0.0}
    loss, grad = step(*many, options)
    expected = step(*once, options)
    torch.testing.assert_close(loss, expected[0])
    exact = expected[1].float()
    torch.testing.assert_close(
        grad[-rows:].float() * times, exact, rtol=0.01, atol=1e-5 * float(exact.abs().max())
    )


# --- the backward pass


@every_dtype
def test_scaling(kernel: str, dtype: torch.dtype) -> None:
    """By one nothing changes, not by a bit; by other factors each row by its own."""
    student, teacher, labels = on_gpu(*logits(37, 1003, dtype))
    _, grad = step(student, teacher, labels, {"reduction": "none"})
    factors = torch.tensor([1.0, 0.5, 1.0, -2.0, 0.0, 1.0, 4.0], device=CUDA).repeat(6)[:37]
    leaf = student.clone().requires_grad_(True)
    loss = fastxkd.kd_loss(leaf, teacher, labels, reduction="none")
    assert isinstance(loss, Tensor)
    (scaled,) = torch.autograd.grad((loss * factors.to(loss.dtype)).sum(), leaf)
    expected = grad.double() * factors[:, None].double()  # powers of two: exact
    if dtype == torch.float16:  # may fall below its smallest number
        torch.testing.assert_close(scaled.double(), expected, rtol=0, atol=6e-8)
    else:
        assert torch.equal(scaled.double(), expected)
    ones = grad.clone()
    torch.ops.fastxkd.kd_loss_scale_(ones, torch.ones((), device=CUDA))
    assert torch.equal(ones, grad)


def test_scaling_by_one_does_not_touch_the_gradient(kernel: str) -> None:
    """Rows whose factor is one are not rewritten: their NaN keep the bits that arithmetic sets."""
    odd = torch.full((8, 1024), 0x7F800001, dtype=torch.int32, device=CUDA)  # signalling NaN
    grad = odd.clone().view(torch.float32)
    factors = torch.tensor([1.0, 2.0] * 4, device=CUDA)
    torch.ops.fastxkd.kd_loss_scale_(grad, factors)
    bits = grad.view(torch.int32)
    assert torch.equal(bits[::2], odd[::2])
    assert grad[1::2].isnan().all()


# --- streams, graphs, and the host


def test_no_step_waits_for_the_device(kernel: str) -> None:
    weights = {
        "class_weight": torch.linspace(0, 2, 1000, device=CUDA),
        "row_weight": torch.linspace(0, 3, 64, device=CUDA),
        "label_smoothing": 0.1,
    }
    for divergence in DIVERGENCES.values():
        for more in ({}, {"reduction": "none"}, weights):
            if divergence.get("divergence") == "dist" and "reduction" in more:
                continue
            given = on_gpu(*logits(64, 1000, torch.bfloat16, ignored=0.2))
            expected = step(*given, divergence | more)  # compiles
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                found = step(*given, divergence | more)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("divergence", ["forward_kl", "dist"])
@pytest.mark.parametrize("shape", [(64, 100), (33, 5003), (8, 32000)], ids=str)
def test_graph_capture_and_replay(kernel: str, shape: tuple[int, int], divergence: str) -> None:
    options = DIVERGENCES[divergence]
    student, teacher, labels = on_gpu(*logits(*shape, torch.float32, ignored=0.2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(student, teacher, labels, options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = step(student, teacher, labels, options)
    for seed in range(3):
        generator = torch.Generator(CUDA).manual_seed(seed)
        student.normal_(generator=generator)
        teacher.normal_(generator=generator)
        labels.random_(shape[1], generator=generator)
        labels[seed] = IGNORE
        graph.replay()
        expected = step(student, teacher, labels, options)
        torch.testing.assert_close(loss, expected[0], rtol=0, atol=0)
        torch.testing.assert_close(grad, expected[1], rtol=0, atol=0)


@pytest.mark.parametrize("divergence", ["forward_kl", "dist"])
def test_two_streams(kernel: str, divergence: str) -> None:
    """Launches of two streams run beside each other and share no counter and no scratch."""
    options = DIVERGENCES[divergence]
    given = [on_gpu(*logits(rows, 5003, torch.float32, ignored=0.1)) for rows in (2000, 1999)]
    expected = [step(*g, options) for g in given]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for _ in range(10):
        for mine, stream, inputs_ in zip(found, streams, given, strict=True):
            with torch.cuda.stream(stream):
                mine.append(step(*inputs_, options))
    torch.cuda.synchronize()
    for mine, (loss, grad) in zip(found, expected, strict=True):
        for one in mine:
            assert torch.equal(one[0], loss)
            assert torch.equal(one[1], grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo's own, of autograd.Function
def test_compiled(kernel: str) -> None:
    student, teacher, labels = on_gpu(*logits(16, 1000, torch.float32))
    torch._dynamo.reset()
    compiled = torch.compile(fastxkd.kd_loss, fullgraph=True, backend="aot_eager")
    leaf = student.clone().requires_grad_(True)
    loss = compiled(leaf, teacher, labels)
    loss.backward()
    expected = step(student, teacher, labels, {})
    torch.testing.assert_close(loss.detach(), expected[0])
    torch.testing.assert_close(leaf.grad, expected[1])


# --- class activation maps

CAM_METHODS = tuple(cam.METHODS)
every_cam_method = pytest.mark.parametrize("method", CAM_METHODS)
# Planes that 16 bytes divide, of which several channels together do, of which none do; large ones.
CAM_SHAPES = (
    (1, 1, 1, 1),
    (2, 17, 5, 9),
    (8, 512, 7, 7),
    (3, 300, 14, 14),
    (2, 64, 55, 57),
    (2, 24, 112, 112),
)


def cam_pair(
    shape: tuple[int, ...], dtype: torch.dtype, method: str, last: bool = False
) -> list[Tensor]:
    a, g = test_cam_emulator.pair(shape, dtype, method)
    return [
        x.contiguous(memory_format=torch.channels_last) if last and x.dim() == 4 else x
        for x in (a, g)
    ]


def cam_error(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    method: str,
    device: torch.device,
    *,
    last: bool = False,
    size: tuple[int, int] = (33, 20),
) -> tuple[float, float]:
    """Of the map on ``device`` from float64 on the CPU, and by how much it may be off: by what the
    formula costs in eager torch, and a rounding."""
    a, g = cam_pair(shape, dtype, method, last)
    found = fastxkd.cam_from(a.to(device), g.to(device), method, size)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert (found.dtype, found.shape) == (exact, (shape[0], *size))
    true, eager = (
        oracles.cam_finish(oracles.cam_raw(a.to(kind), g.to(kind), method), size, True, 2).double()
        for kind in (torch.float64, exact)
    )
    eps = 1e-12 if exact == torch.float64 else 1e-6
    limit = (eager - true).abs().max() + eps
    return float((found.cpu().double() - true).abs().max()), float(limit)


def cam_step(a: Tensor, g: Tensor, method: str) -> list[Tensor]:
    """A finished map, and gradients through one."""
    leaves = [x.detach().requires_grad_(True) for x in (a, g)]
    maps = fastxkd.cam_from(leaves[0], leaves[1], method, (28, 30))
    grads = torch.autograd.grad(maps.square().sum(), leaves)
    return [fastxkd.cam_from(a, g, method, (28, 30)), maps.detach(), *grads]


@every_cam_method
@every_dtype
def test_cam_matches_float64(kernel: str, dtype: torch.dtype, method: str) -> None:
    # Triton compiles for many of the shapes anew, a second each.
    for shape in CAM_SHAPES if kernel == "cuda" else CAM_SHAPES[1:3]:
        for last in (False, True):
            off, limit = cam_error(shape, dtype, method, CUDA, last=last)
            assert off <= limit, (shape, last)


@every_cam_method
@every_dtype
def test_cam_gradient_matches_float64(kernel: str, dtype: torch.dtype, method: str) -> None:
    for shape in CAM_SHAPES if kernel == "cuda" else CAM_SHAPES[1:3]:
        a, g = cam_pair(shape, dtype, method)
        upstream = torch.randn(shape[0], *shape[2:], generator=torch.Generator().manual_seed(5))
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        found = torch.ops.fastxkd.cam_backward(
            upstream.to(CUDA, exact), a.to(CUDA), g.to(CUDA), method
        )
        grads = []
        for kind in (torch.float64, exact):
            leaves = [x.detach().to(kind).requires_grad_(True) for x in (a, g)]
            raw = oracles.cam_raw(leaves[0], leaves[1], method)
            grads.append(torch.autograd.grad(raw, leaves, upstream.to(kind)))
        eps = 1e-12 if exact == torch.float64 else 1e-6
        for ours, true, eager in zip(found, *grads, strict=True):
            limit = (eager.double() - true).norm() + eps * true.norm()
            if dtype != exact:
                limit += 1.2 * (true.to(dtype).double() - true).norm()
            assert (ours.cpu().double() - true).norm() <= limit, shape


@every_cam_method
def test_cam_bad_value_stays_in_its_image(kernel: str, method: str) -> None:
    for last in (False, True):
        a, g = on_gpu(*cam_pair((4, 40, 7, 7), torch.float32, method, last))
        clean = fastxkd.cam_from(a, g, method, (9, 9))
        a[2, 3, 1, 1] = NAN
        dirty = fastxkd.cam_from(a, g, method, (9, 9))
        rest = torch.tensor([0, 1, 3], device=CUDA)
        assert torch.equal(dirty[rest], clean[rest])
        assert dirty[2].isnan().all()


@every_cam_method
def test_cam_no_call_waits_and_the_numbers_are_the_same(kernel: str, method: str) -> None:
    for last in (False, True):
        given = on_gpu(*cam_pair((8, 512, 14, 14), torch.bfloat16, method, last))
        expected = cam_step(*given, method)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = cam_step(*given, method)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["gradcam++", "layercam"])
def test_cam_graph_capture_and_replay(kernel: str, method: str) -> None:
    a, g = on_gpu(*cam_pair((4, 64, 7, 7), torch.float32, method))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            cam_step(a, g, method)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = cam_step(a, g, method)
    for seed in range(3):
        generator = torch.Generator(CUDA).manual_seed(seed)
        a.uniform_(generator=generator)
        g.normal_(generator=generator)
        graph.replay()
        for one, other in zip(found, cam_step(a, g, method), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_cam_two_streams(kernel: str) -> None:
    """Launches of two streams run beside each other and share no scratch."""
    shapes = ((16, 256, 28, 28), (15, 256, 28, 28))
    given = [on_gpu(*cam_pair(shape, torch.float32, "xgradcam")) for shape in shapes]
    expected = [cam_step(*pair, "xgradcam") for pair in given]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found: list[list[list[Tensor]]] = [[], []]
    for _ in range(10):
        for mine, stream, pair in zip(found, streams, given, strict=True):
            with torch.cuda.stream(stream):
                mine.append(cam_step(*pair, "xgradcam"))
    torch.cuda.synchronize()
    for mine, right in zip(found, expected, strict=True):
        for one in mine:
            assert all(torch.equal(x, y) for x, y in zip(one, right, strict=True))


def test_cam_offsets_beyond_31_bits(kernel: str) -> None:
    shape = (600, 1200, 56, 56)
    count = torch.Size(shape).numel()
    assert count > 2**31
    free = torch.cuda.mem_get_info()[0]
    if free < 1.2 * 6 * count:
        pytest.skip(f"needs {7.2 * count / 2**30:.0f} GiB of free memory, has {free / 2**30:.0f}")
    a = torch.rand(shape, dtype=torch.bfloat16, device=CUDA)
    for method in ("gradcam++", "layercam"):
        maps = fastxkd.cam_from(a, a, method)
        torch.testing.assert_close(maps[-2:], fastxkd.cam_from(a[-2:], a[-2:], method))
    upstream = torch.rand(600, 56, 56, device=CUDA)
    weights = torch.rand(600, 1200, dtype=torch.bfloat16, device=CUDA)
    found = torch.ops.fastxkd.cam_backward(upstream, a, weights, "weights")
    part = torch.ops.fastxkd.cam_backward(upstream[-2:], a[-2:], weights[-2:], "weights")
    for one, other in zip(found, part, strict=True):
        torch.testing.assert_close(one[-2:], other)


# --- sums over pairs of distances


def distance_sums(features: list[Tensor]) -> list[Tensor]:
    """The sums and, of the first two features, a gradient."""
    leaves = [x.detach().requires_grad_(True) for x in features[:2]]
    names = [str(k) for k in range(len(features))]
    products, row_sums = distance.distance_sums([*leaves, *features[2:]], names)
    scale = products.detach().max()
    grads = torch.autograd.grad(products.sum() / scale + row_sums.sum() / scale, leaves)
    return [products.detach(), row_sums.detach(), *grads]


@pytest.fixture(params=["2048 rows", "64 rows"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_distance_gpu, "TILE", int(request.param.split()[0]))


@pytest.mark.usefixtures("tile")
@every_dtype
def test_distance_matches_float64(kernel: str, dtype: torch.dtype) -> None:
    eps = 1e-12 if dtype == torch.float64 else 1e-6
    for n, widths in ((4, [1, 2]), (33, [7, 64, 2]), (300, [20, 3, 16, 17, 500])):
        features = test_distance.related(n, widths, dtype)
        found = distance_sums(on_gpu(*features))
        true = distance_sums([x.double() for x in features])
        for one, other in zip(found[:2], true[:2], strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=eps, atol=0)
        for one, other in zip(found[2:], true[2:], strict=True):
            limit = 10 * eps * other.norm()
            if dtype in (torch.bfloat16, torch.float16):
                limit = limit + 1.2 * (other.to(dtype).double() - other).norm()
            assert (one.cpu().double() - other).norm() <= limit


def test_distance_of_near_neighbours(kernel: str) -> None:
    """Whatever is allowed of other products: these have all digits of float32."""
    x = 10 * torch.nn.functional.normalize(torch.randn(400, 64))
    x = torch.cat([x, x + 1e-4 * torch.randn(400, 64)])
    true = oracles.distances(x.double())
    before = torch.get_float32_matmul_precision()
    try:
        for allowed in ("highest", "high"):
            torch.set_float32_matmul_precision(allowed)
            d = distance.distance_matrix(x.to(CUDA), "x", rows=800).cpu().double()
            assert torch.get_float32_matmul_precision() == allowed
            near, rest = d.diagonal(400), true.diagonal(400)
            torch.testing.assert_close(near, rest, rtol=1e-6, atol=0)
            torch.testing.assert_close(d, true, rtol=1e-5, atol=0)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("tile")
def test_distance_never_waits_and_the_numbers_are_the_same(kernel: str) -> None:
    features = on_gpu(*test_distance.related(300, [20, 3, 100], torch.float32))
    expected = distance_sums(features)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = distance_sums(features)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_distance_graph_capture_and_replay(kernel: str) -> None:
    features = on_gpu(*test_distance.related(100, [20, 3], torch.float32))
    names = ["x", "y"]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            distance.distance_sums(features, names)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = distance.distance_sums(features, names)
    for seed in range(3):
        for x in features:
            x.normal_(generator=torch.Generator(CUDA).manual_seed(seed))
        graph.replay()
        for one, other in zip(found, distance.distance_sums(features, names), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_pair_distances(kernel: str) -> None:
    for dtype, eps in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        for n, width in ((1, 1), (33, 100), (300, 2000)):
            x = 100 + torch.randn(n, width, dtype=dtype)
            found = distance.pair_distances(x.to(CUDA)).cpu()
            true = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
            torch.testing.assert_close(found, true, rtol=eps, atol=0)


def test_backward_of_distance_is_on_the_backend_asked_for(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd's thread has not seen use_backend."""
    seen = []
    real = _distance_gpu.run_grad_tile

    def spy(backend: str, *rest: Any) -> None:
        seen.append(backend)
        real(backend, *rest)

    monkeypatch.setattr(_distance_gpu, "run_grad_tile", spy)
    distance_sums(on_gpu(*test_distance.related(20, [5, 30], torch.float32)))
    assert set(seen) == {kernel}


# --- network dissection: integers, which have no tolerance

CONCEPTS = (
    ((3, 5, 7, 7), 1, (112, 112)),
    ((2, 70, 7, 7), 2, (28, 28)),
    ((1, 1, 1, 1), 1, (1, 1)),
    ((2, 4, 14, 13), 1, (7, 6)),
    ((2, 2, 1, 6), 1, (33, 130)),
    ((2, 3, 9, 9), 0, (20, 20)),
)


def concept_counts(
    given: tuple[Tensor, ...], device: torch.device, kinds: int = test_concepts.KINDS
) -> dict[str, Tensor]:
    activations, thresholds, masks, labels, categories = (x.to(device) for x in given)
    tally = concepts.concept_tally(
        activations, thresholds, masks, labels, categories, category_count=kinds
    )
    bits = 8 * activations.element_size()
    counts = torch.zeros(activations.shape[1], 2**11 + 1, dtype=torch.int64, device=device)
    low = torch.full((activations.shape[1],), -(2 ** (bits - 1)), device=device)
    concepts.unit_counts(activations, low, bits - 11, 11, counts)
    areas = concepts.label_areas(masks, labels, len(categories))
    found = dict(zip(("intersections", "areas"), tally, strict=True))
    return found | {"label areas": areas, "unit counts": counts}


def concepts_that_differ(
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...] = (3, 20, 7, 7),
    layers: int = 2,
    size: tuple[int, int] = (40, 31),
    mask_dtype: torch.dtype = torch.uint8,
) -> list[str]:
    """Names of the counts on ``device`` that are not those of a loop over images and units."""
    given = test_concepts.case(shape, layers, size, dtype, mask_dtype)
    activations = given[0]
    activations[:, 0] = activations[:, 0].clamp(min=0)
    found = concept_counts(given, device)
    bits = 8 * activations.element_size()
    low = torch.full((shape[1],), -(2 ** (bits - 1)))
    counted = test_concepts.counted_in_numpy(activations, low, bits - 11, 11)
    expected = (*test_concepts.looped(given), counted)
    return [
        name
        for (name, one), other in zip(found.items(), expected, strict=True)
        if not torch.equal(one.cpu(), other)
    ]


@every_dtype
def test_concepts_are_counted_as_in_a_loop(kernel: str, dtype: torch.dtype) -> None:
    for mask_dtype in (torch.uint8, torch.int16, torch.int32):
        for shape, layers, size in CONCEPTS if kernel == "cuda" else CONCEPTS[1:2]:
            wrong = concepts_that_differ(dtype, CUDA, shape, layers, size, mask_dtype)
            assert not wrong, (shape, mask_dtype)


def test_concepts_of_other_layouts(kernel: str) -> None:
    activations, *rest = test_concepts.case((3, 70, 6, 7), 2, (20, 33))
    expected = test_concepts.looped((activations, *rest))
    for given in (activations, activations.contiguous(memory_format=torch.channels_last)):
        found = concept_counts((given, *rest), CUDA)
        for one, other in zip(found.values(), expected, strict=False):
            assert torch.equal(one.cpu(), other)


def test_concepts_of_values_that_are_no_numbers(kernel: str) -> None:
    activations, thresholds, *rest = test_concepts.case((3, 6, 7, 7), 1, (30, 30))
    activations[0, 1, 3, 4] = activations[2, 0, 6, 6] = NAN
    thresholds[4], thresholds[5] = NAN, float("inf")
    given = (activations, thresholds, *rest)
    found, expected = concept_counts(given, CUDA), test_concepts.looped(given)
    for one, other in zip(found.values(), expected, strict=False):
        assert torch.equal(one.cpu(), other)


def test_concepts_of_labels_that_there_are_not(kernel: str) -> None:
    """They are not looked for, since that would wait, and not counted."""
    given = list(test_concepts.case((3, 6, 7, 7), 2, (30, 30), mask_dtype=torch.int32))
    where, images = torch.rand(given[2].shape) < 0.3, torch.rand(given[3].shape) < 0.3
    given[2][where], given[3][images] = 0, 0
    expected = test_concepts.looped(tuple(given))
    wrong = torch.tensor([-1, test_concepts.LABELS, 2**31 - 1]).int()
    given[2][where] = wrong[torch.randint(3, (int(where.sum()),))]
    given[3][images] = 2**40 + 1
    found = concept_counts(tuple(given), CUDA)
    for one, other in zip(found.values(), expected, strict=False):
        assert torch.equal(one.cpu(), other)


def test_concepts_never_wait_and_the_numbers_are_the_same(kernel: str) -> None:
    given = tuple(on_gpu(*test_concepts.case((8, 100, 7, 7), 2, (56, 56))))
    low = torch.full((100,), -(2**31), device=CUDA)
    expected = concept_counts(given, CUDA)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tally = concepts.concept_tally(*given, category_count=test_concepts.KINDS)
        once = concepts.concept_tally(*given, category_count=test_concepts.KINDS, repeats="once")
        areas = concepts.label_areas(*given[2:4], test_concepts.LABELS)
        counts = torch.zeros(100, 2**11 + 1, dtype=torch.int64, device=CUDA)
        concepts.unit_counts(given[0], low, 21, 11, counts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip((*tally, areas, counts), expected.values(), strict=True):
        assert torch.equal(one, other)
    assert (once.intersections <= tally.intersections).all()


def test_concepts_graph_capture_and_replay(kernel: str) -> None:
    given = tuple(on_gpu(*test_concepts.case((4, 40, 7, 7), 2, (30, 40))))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            concept_counts(given, CUDA)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = concept_counts(given, CUDA)
    for seed in range(3):
        generator = torch.Generator(CUDA).manual_seed(seed)
        given[0].normal_(generator=generator)
        given[2].random_(0, test_concepts.LABELS, generator=generator)
        graph.replay()
        expected = concept_counts(given, CUDA)
        for one, other in zip(found.values(), expected.values(), strict=True):
            assert torch.equal(one, other)


def test_concepts_on_two_streams(kernel: str) -> None:
    """Launches of two streams run beside each other and share no scratch."""
    cases = [((16, 200, 7, 7), 2, (56, 56)), ((15, 200, 7, 7), 2, (56, 56))]
    given = [tuple(on_gpu(*test_concepts.case(*c))) for c in cases]
    expected = [concept_counts(g, CUDA) for g in given]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found: list[list[dict[str, Tensor]]] = [[], []]
    for _ in range(10):
        for mine, stream, inputs_ in zip(found, streams, given, strict=True):
            with torch.cuda.stream(stream):
                mine.append(concept_counts(inputs_, CUDA))
    torch.cuda.synchronize()
    for mine, right in zip(found, expected, strict=True):
        for one in mine:
            assert all(torch.equal(one[name], right[name]) for name in right)


def test_concept_offsets_beyond_31_bits(kernel: str) -> None:
    shape, size = (1400, 512, 56, 56), (300, 300)
    count = torch.Size(shape).numel()
    assert count > 2**31
    needed = 2 * count + 1400 * 18 * 300 * 300
    free = torch.cuda.mem_get_info()[0]
    if free < 1.3 * needed:
        pytest.skip(f"needs {1.3 * needed / 2**30:.0f} GiB of free memory")
    a = torch.zeros(shape, dtype=torch.bfloat16, device=CUDA)
    a[0, :, 20:24, 20:24] = a[-1, :, 20:24, 20:24] = 1
    masks = torch.zeros(1400, 18, *size, dtype=torch.uint8, device=CUDA)
    assert masks.numel() > 2**31
    masks[0, 0] = masks[-1, -1] = 1
    thresholds = torch.full((512,), 0.5, device=CUDA)
    categories = torch.zeros(2, dtype=torch.int64, device=CUDA)
    both = [
        concepts.concept_tally(x, thresholds, m, None, categories, category_count=1)
        for x, m in ((a, masks), (a[-1:], masks[-1:]))
    ]
    assert both[1].areas.min() > 0
    for one, other in zip(*both, strict=True):
        assert torch.equal(one, 2 * other)
    areas = concepts.label_areas(masks, None, 2)
    assert areas.tolist() == [0, 2 * 300 * 300]
    low = torch.full((512,), -(2**15), device=CUDA)
    counts = torch.zeros(512, 2**11 + 1, dtype=torch.int64, device=CUDA)
    concepts.unit_counts(a, low, 5, 11, counts)
    assert (counts.sum(1) == 1400 * 56 * 56).all()
    assert (counts.amin(1) == 0).all()
    assert (counts[:, :-1].sort(1).values[:, -2] == 32).all()


# --- everything else, on the device


def _net(width: int) -> nn.Module:
    torch.manual_seed(width)
    # Products of matrices and no convolutions: those may take TensorFloat-32 without being asked.
    hidden = nn.Linear(3 * 8 * 8, width)
    return nn.Sequential(nn.Flatten(), hidden, nn.SiLU(), nn.Linear(width, 7))


def _pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    common = torch.randn(shape, generator=generator)
    return tuple(  # type: ignore[return-value]
        (common + torch.randn(shape, generator=generator)).relu() for _ in range(2)
    )


Loss = Callable[..., Any]
# name -> student's tensor, what else is given, and the loss of both
LOSSES: dict[str, tuple[Tensor, list[Any], Loss]] = {
    **{
        name: (student, [teacher], loss)
        for (student, teacher), named in (
            (
                _pair(8, 16, 14, 14),
                {
                    "at": features.at_loss,
                    "catkd": explanations.catkd_loss,
                    "fitnet": features.fitnet_loss,
                    "hcl": review.hcl_loss,
                },
            ),
            (_pair(6, 9, 9), {"e2kd": explanations.e2kd_loss}),
            (
                _pair(24, 64),
                {
                    "cc": similarity.cc_loss,
                    "dc": relations.dc_loss,
                    "pkt": similarity.pkt_loss,
                    "rkd": relations.rkd_loss,
                    "sp": similarity.sp_loss,
                    "distance correlation": fastxkd.distance_correlation,
                },
            ),
        )
        for name, loss in named.items()
    },
    "vid": (
        *(_pair(8, 16, 14, 14)[0], [_pair(8, 16, 14, 14)[1], torch.linspace(0.5, 2, 16)]),
        lambda s, t, v: features.vid_loss(s, t, variance=v),
    ),
    "linear": (
        torch.randn(40, 12, generator=torch.Generator().manual_seed(5)),
        [
            *(torch.linspace(-1, 1, n * 12).sin().view(n, 12) for n in (300, 40, 300)),
            torch.arange(40),
        ],
        lambda s, w, t, v, y: linear.linear_kd_loss(s, w, t, v, y, chunk_rows=16),
    ),
    "cam": (
        _pair(4, 16, 7, 7)[0],
        [_pair(4, 16, 7, 7)[1] - 0.5],
        lambda a, g: fastxkd.cam_from(a, g, size=(28, 28)).square().mean(),
    ),
    "kdiga": (
        torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(6)),
        [_net(6), _net(9), torch.arange(4)],
        lambda x, s, t, y: _through(s, lambda: inputs.kdiga_loss(s, t, x, y)),
    ),
}


class _Through(NamedTuple):
    loss: Tensor
    parameter: Tensor


def _through(student: nn.Module, loss: Callable[[], Any]) -> _Through:
    """A loss whose gradient goes to the student, not to what it is given."""
    return _Through(loss(), next(student.parameters()))


def moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(device, dtype)
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


def loss_and_gradient(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    student, rest, loss = LOSSES[name]
    leaf = moved(student, device, dtype).clone().requires_grad_(True)
    found = loss(leaf, *(moved(value, device, dtype) for value in rest))
    value, source = found if isinstance(found, _Through) else (found, leaf)
    (grad,) = torch.autograd.grad(value, source)
    return value.detach().cpu().double(), grad.cpu().double()


def device_error(name: str, device: torch.device) -> tuple[float, float]:
    """Of loss and gradient in float32 on ``device``, relative to float64 on the CPU."""
    exact = loss_and_gradient(name, torch.device("cpu"), torch.float64)
    found = loss_and_gradient(name, device, torch.float32)
    return tuple(  # type: ignore[return-value]
        float((one - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)
    )


@pytest.mark.parametrize("name", LOSSES)
def test_other_losses(name: str) -> None:
    loss, grad = device_error(name, CUDA)
    # float32 without a kernel of ours: what torch's own reductions and products leave.
    assert loss <= 1e-5
    assert grad <= 1e-4
