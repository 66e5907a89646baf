"""CAT-KD and e2KD against their formulas in float64, and the models left as they were."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import fastxkd
from fastxkd.losses.explanations import (
    CATKDLoss,
    E2KDLoss,
    catkd_loss,
    class_activations,
    e2kd_loss,
)
from tests import oracles

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


# --- oracles, one image and one position at a time


def pooled(m: Tensor, size: int) -> Tensor:
    """[h, w] to [size, size], means over windows that may overlap."""
    h, w = m.shape

    def window(index: int, length: int) -> slice:
        return slice(index * length // size, math.ceil((index + 1) * length / size))

    rows = [
        torch.stack([m[window(i, h), window(j, w)].mean() for j in range(size)])
        for i in range(size)
    ]
    return torch.stack(rows)


def cat_oracle(
    student: Tensor,
    teacher: Tensor,
    *,
    pool: int | None = 2,
    normalize: bool = False,
    binarize: bool = False,
    top: int | None = None,
    bottom: int | None = None,
    teacher_logits: Tensor | None = None,
) -> Tensor:
    terms = []
    for i in range(len(student)):
        ranks = teacher[i].mean((1, 2)) if teacher_logits is None else teacher_logits[i]
        order = sorted(range(len(ranks)), key=lambda k: -float(ranks[k]))
        chosen = order[:top] if top else order[-bottom:] if bottom else order
        for k in chosen:
            s, t = student[i, k], teacher[i, k]
            if binarize:
                t = torch.where(t > t.abs().mean(), 1.0, 0.0).to(s.dtype)
            if pool is not None:
                s, t = pooled(s, pool), pooled(t, pool)
            if normalize:
                s, t = (m / m.norm() if m.any() else m for m in (s, t))
            terms.append((s - t).square().flatten())
    return torch.cat(terms).mean()


def e2_oracle(student: Tensor, teacher: Tensor) -> Tensor:
    cosines = []
    for s, t in zip(student.flatten(1), teacher.flatten(1), strict=True):
        zero = not s.any() or not t.any()
        cosines.append(s.sum() * 0 if zero else (s @ t) / (s @ s).sqrt() / (t @ t).sqrt())
    return 1 - torch.stack(cosines).mean()


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    leaf = at.detach().clone().requires_grad_(True)
    value = loss(leaf)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def check(
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    at: Tensor,
    terms: float = 0.0,
) -> None:
    """The error against the oracle in float64 is that of the formula in the dtype, and a 1e-6.

    ``terms`` is the size of what the loss is a difference of.
    """
    value, grad = gradient(ours, at)
    assert grad.dtype == at.dtype
    exact, exact_grad = gradient(theirs, at.double())
    eager, eager_grad = gradient(theirs, at)
    assert value.dtype == torch.promote_types(at.dtype, torch.float32)
    assert (value - exact).abs() <= (eager - exact).abs() + 1e-6 * exact.abs().clamp_min(terms)
    worst, allowed = (g.double().sub(exact_grad).norm() for g in (grad, eager_grad))
    cancelled = max(1.0, terms / max(exact.item(), 1e-30)) if terms < 1 else 1.0
    assert worst <= allowed + 1e-6 * cancelled * exact_grad.norm()


# --- CAT-KD on tensors

CAT_OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "one position": {"pool": 1},
    "finer than the map": {"pool": 8},
    "as they are": {"pool": None},
    "normalised": {"pool": 4, "normalize": True},
    "binarised": {"binarize": True},
    "binarised, normalised": {"binarize": True, "normalize": True, "pool": 3},
    "top": {"top": 2},
    "top, as they are": {"top": 3, "pool": None, "normalize": True},
    "bottom": {"bottom": 2},
    "top, binarised": {"top": 2, "binarize": True},
    "every class": {"top": 5},
}


def cams(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 5, 7, 6).to(dtype), torch.randn(3, 5, 7, 6).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", CAT_OPTIONS)
def test_catkd_equals_its_formula(name: str, dtype: torch.dtype) -> None:
    options = CAT_OPTIONS[name]
    student, teacher = cams(dtype)

    def theirs(leaf: Tensor) -> Tensor:
        return cat_oracle(leaf, teacher.to(leaf.dtype), **options)

    check(lambda leaf: catkd_loss(leaf, teacher, **options), theirs, student)


def test_catkd_ranks_by_logits_when_given() -> None:
    student, teacher = cams()
    logits = torch.randn(3, 5, dtype=torch.float64)
    options: dict[str, Any] = {"top": 2, "teacher_logits": logits}
    expected = cat_oracle(student, teacher, **options)
    torch.testing.assert_close(catkd_loss(student, teacher, **options), expected)
    assert catkd_loss(student, teacher, top=2) != expected


def test_catkd_gradcheck_and_double_backward() -> None:
    student, teacher = cams()
    student.requires_grad_(True)
    for options in ({}, {"normalize": True, "pool": 3}, {"bottom": 2}):
        call = lambda s, o=options: catkd_loss(s, teacher, **o)  # noqa: E731
        assert torch.autograd.gradcheck(call, (student,))
        assert torch.autograd.gradgradcheck(call, (student,))


def test_catkd_takes_maps_of_any_size_and_layout() -> None:
    student, teacher = cams()
    larger = F.interpolate(teacher, scale_factor=2, mode="nearest")
    torch.testing.assert_close(
        catkd_loss(student, larger, pool=1), catkd_loss(student, teacher, pool=1)
    )
    last = student.to(memory_format=torch.channels_last)
    torch.testing.assert_close(catkd_loss(last, teacher), catkd_loss(student, teacher))


def test_catkd_normalised_map_of_zeros() -> None:
    student, teacher = cams()
    student[0, 0] = 0
    teacher[1, 2] = 0
    value, grad = gradient(lambda s: catkd_loss(s, teacher, normalize=True), student)
    torch.testing.assert_close(value, cat_oracle(student, teacher, normalize=True))
    assert grad.isfinite().all()
    assert not grad[0, 0].any()


# --- e2KD on tensors


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_e2kd_equals_its_formula(dtype: torch.dtype) -> None:
    student, teacher = torch.rand(4, 9, 8).to(dtype), torch.rand(4, 9, 8).to(dtype)
    check(
        lambda leaf: e2kd_loss(leaf, teacher),
        lambda leaf: e2_oracle(leaf, teacher.to(leaf.dtype)),
        student,
    )


@pytest.mark.parametrize("power", [-100, 0, 100])
def test_e2kd_does_not_depend_on_scale(power: int) -> None:
    student, teacher = torch.rand(4, 9, 8), torch.rand(4, 9, 8)
    scale = 2.0**power  # the truth is that of scale 1, to the last bit
    value, grad = gradient(lambda s: e2kd_loss(s, teacher / scale), student * scale)
    exact, exact_grad = gradient(lambda s: e2_oracle(s, teacher.double()), student.double())
    eager, eager_grad = gradient(lambda s: e2_oracle(s, teacher), student)
    assert (value - exact).abs() <= (eager - exact).abs() + 1e-6
    worst = (grad.double() * scale - exact_grad).norm()
    assert worst <= (eager_grad - exact_grad).norm() + 1e-6 * exact_grad.norm()


# The list that every loss is tried on: maps of one row of positions.
LISTED = [(1, 1), (3, 2), (7, 33), (128, 100), (41, 1271), (256, 1000), (16, 32000)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", LISTED, ids=str)
def test_listed_shapes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    student, teacher = torch.rand(shape).to(dtype), torch.rand(shape).to(dtype)
    check(
        lambda leaf: e2kd_loss(leaf, teacher),
        lambda leaf: e2_oracle(leaf, teacher.to(leaf.dtype)),
        student,
        terms=1.0,
    )
    maps = [x[:, None, None, :] - 0.5 for x in (student, teacher)]
    # Pooled, what is squared is a difference of means in which numbers of both signs cancel.
    mean = (maps[0].abs().double().mean() * catkd_loss(*maps).sqrt()).item()
    for options in ({"pool": 2}, {"pool": None, "normalize": True}):
        check(
            lambda leaf, o=options: catkd_loss(leaf, maps[1], **o),
            lambda leaf, o=options: cat_oracle(leaf, maps[1].to(leaf.dtype), **o),
            maps[0],
            terms=2 / shape[1] if "normalize" in options else mean,
        )


TENSOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "catkd": catkd_loss,
    "catkd, normalised": lambda s, t: catkd_loss(s, t, normalize=True, top=2),
    "e2kd": e2kd_loss,
}


@pytest.mark.parametrize("name", TENSOR_LOSSES)
def test_under_every_transform(name: str) -> None:
    """Upstream gradients, layouts, autocast, checkpoints, torch.func, vmap: the same numbers."""
    loss = TENSOR_LOSSES[name]
    student, teacher = cams(torch.float32)
    value, grad = gradient(lambda s: loss(s, teacher), student)
    leaf = student.clone().requires_grad_(True)
    (three,) = torch.autograd.grad(loss(leaf, teacher), leaf, torch.tensor(3.0))
    torch.testing.assert_close(three, 3 * grad)
    torch.testing.assert_close(torch.func.grad(loss)(student, teacher), grad)
    two = torch.stack([student, student + 1]), torch.stack([teacher, teacher])
    torch.testing.assert_close(torch.func.vmap(loss)(*two)[0], value)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(*two)[0], grad)
    wide = student.new_full((3, 5, 7, 12), torch.nan)
    wide[..., ::2] = student
    for s, t in ((wide[..., ::2], teacher), (student, teacher.mT.contiguous().mT)):
        torch.testing.assert_close(gradient(lambda x, t=t: loss(x, t), s)[1], grad)
    same = student[:1].expand(3, 5, 7, 6)
    torch.testing.assert_close(
        gradient(lambda s: loss(s, teacher), same)[1],
        gradient(lambda s: loss(s, teacher), same.contiguous())[1],
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradient(lambda s: loss(s, teacher), student)
    torch.testing.assert_close(found, (value, grad), rtol=0, atol=0)
    found = gradient(
        lambda s: torch.utils.checkpoint.checkpoint(loss, s, teacher, use_reentrant=False), student
    )
    torch.testing.assert_close(found, (value, grad), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize("name", TENSOR_LOSSES)
def test_compiles_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    student, teacher = cams(torch.float32)
    compiled = torch.compile(
        TENSOR_LOSSES[name], fullgraph=True, backend="aot_eager", dynamic=False
    )
    found = gradient(lambda s: compiled(s, teacher), student)
    torch.testing.assert_close(found, gradient(lambda s: TENSOR_LOSSES[name](s, teacher), student))


@pytest.mark.parametrize("name", TENSOR_LOSSES)
def test_the_wider_of_two_dtypes(name: str) -> None:
    loss = TENSOR_LOSSES[name]
    student, teacher = cams()
    assert loss(student.float(), teacher).dtype == torch.float64
    assert torch.equal(loss(student.float(), teacher), loss(student.float().double(), teacher))
    low = student.bfloat16()
    assert torch.equal(loss(low, teacher.float()), loss(low.float(), teacher.float()))
    assert gradient(lambda s: loss(s, teacher.float()), low)[1].dtype == torch.bfloat16


def test_e2kd_gradcheck() -> None:
    student = torch.rand(3, 4, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.rand(3, 4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: e2kd_loss(s, teacher), (student,))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_e2kd_map_of_zeros_has_cosine_zero(dtype: torch.dtype) -> None:
    student, teacher = torch.rand(4, 3, 3).to(dtype), torch.rand(4, 3, 3).to(dtype)
    student[0], teacher[1], student[2], teacher[2] = 0, 0, 0, 0
    value, grad = gradient(lambda s: e2kd_loss(s, teacher), student)
    alive = F.cosine_similarity(student[3].double().flatten(), teacher[3].double().flatten(), 0)
    assert value.item() == pytest.approx(1 - alive.item() / 4, abs=1e-6)
    assert grad.isfinite().all()
    assert not grad[:3].any()
    assert grad[3].any()


def test_e2kd_shows_a_map_that_is_not_finite() -> None:
    student = torch.rand(2, 3, 3)
    student[0, 1, 1] = float("nan")
    assert e2kd_loss(student, torch.rand(2, 3, 3)).isnan()


# --- on models


class Net(nn.Module):
    """Smooth, with layers behind the explained one, so that its map has a second order gradient."""

    def __init__(self, width: int, *, norm: bool = False, drop: float = 0.0) -> None:
        super().__init__()
        first, second = (nn.BatchNorm2d(w) if norm else nn.Identity() for w in (width, width + 1))
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, 2), first)
        convolution = nn.Conv2d(width, width + 1, 2)
        self.tail = nn.Sequential(nn.Softplus(), convolution, second, nn.Softplus())
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(width + 1, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.drop(self.tail(self.body(images)).mean((2, 3))))


def pair(**options: Any) -> tuple[Net, Net]:
    student, teacher = Net(3, **options).double(), Net(5, **options).double()
    # Larger weights: predictions that differ from image to image.
    for parameter in [*student.head.parameters(), *teacher.head.parameters()]:
        parameter.data *= 4
    return student, teacher


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 1, 11, 9, dtype=torch.float64)


def parameter_gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@contextmanager
def nothing_left(*models: nn.Module) -> Iterator[None]:
    """Hooks, modes and gradients are those of before; so are the buffers of a model in eval."""

    def state(model: nn.Module) -> Any:
        hooks = [
            len(hooks)
            for m in model.modules()
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
        ]
        return hooks, [m.training for m in model.modules()], [p.grad for p in model.parameters()]

    before = [state(model) for model in models]
    yield
    assert [state(model) for model in models] == before


def test_class_activations_average_to_the_logits(images: Tensor) -> None:
    net, _ = pair()
    features = net.tail(net.body(images))
    maps = class_activations(features, net.head.weight, net.head.bias)
    torch.testing.assert_close(maps.mean((2, 3)), net(images))
    weight = net.head.weight[:, :, None, None]
    by_conv = class_activations(features, weight)
    torch.testing.assert_close(maps - by_conv, net.head.bias[:, None, None].expand_as(maps))
    leaves = [t.detach().requires_grad_(True) for t in (features, net.head.weight, net.head.bias)]
    assert torch.autograd.gradcheck(class_activations, leaves)


def test_class_activations_keep_float32_under_autocast() -> None:
    features, weight = torch.randn(2, 3, 4, 4), torch.randn(5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = class_activations(features, weight)
    assert torch.equal(maps, class_activations(features, weight))


@pytest.mark.parametrize("name", CAT_OPTIONS)
def test_catkd_module_equals_a_network_with_a_convolution_for_a_head(
    name: str, images: Tensor
) -> None:
    """The authors' way: the head becomes a 1x1 convolution before the pooling."""
    options = CAT_OPTIONS[name]
    if name in ("top", "bottom", "every class"):
        options = {key: min(value, 3) for key, value in options.items()}
    student, teacher = pair()

    def edited(net: Net) -> Tensor:
        weight = net.head.weight[:, :, None, None]
        return F.conv2d(net.tail(net.body(images)), weight, net.head.bias)

    with torch.no_grad():
        guidance, logits = edited(teacher), teacher(images)
    expected = cat_oracle(edited(student), guidance, teacher_logits=logits, **options)
    with nothing_left(student, teacher):
        out = CATKDLoss(student, teacher, "tail", teacher.tail, **options)(images)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.student_logits, student(images))
    torch.testing.assert_close(out.teacher_logits, logits)
    assert out.student_logits.requires_grad
    assert not out.teacher_logits.requires_grad
    both = F.cross_entropy(out.student_logits, torch.arange(4)) + 15 * out.loss
    again = F.cross_entropy(student(images), torch.arange(4)) + 15 * expected
    for ours, theirs in zip(
        parameter_gradients(student, both), parameter_gradients(student, again), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert all(p.grad is None for p in teacher.parameters())


def test_catkd_module_of_a_1x1_convolution_head_and_a_named_one() -> None:
    class Convolutional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(1, 3, 3)
            self.classifier = nn.Conv2d(3, 4, 1, bias=False)
            self.spare = nn.Linear(2, 2)
            self.other = nn.Linear(2, 2)

        def forward(self, images: Tensor) -> Tensor:
            return self.classifier(self.body(images).mean((2, 3), keepdim=True)).flatten(1)

    student, teacher = Convolutional(), Net(5)
    images = torch.randn(2, 1, 11, 9)
    criterion = CATKDLoss(student, teacher, "body", "tail", student_head="classifier")
    maps = class_activations(student.body(images), student.classifier.weight)
    guidance = class_activations(
        teacher.tail(teacher.body(images)), teacher.head.weight, teacher.head.bias
    )
    torch.testing.assert_close(criterion(images).loss, catkd_loss(maps, guidance.detach()))
    with pytest.raises(ValueError, match=r"student_head: .* has not one nn.Linear but 2"):
        CATKDLoss(student, teacher, "body", "tail")


def test_catkd_module_never_holds_every_map_at_full_size() -> None:
    def network() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 1000)
        )

    criterion = CATKDLoss(network(), network(), "0", "0")
    images = torch.randn(4, 1, 34, 34)
    criterion(images)
    full = 4 * 1000 * 32 * 32 * 4
    assert oracles.peak_bytes(lambda: criterion(images).loss.backward()) < full / 10


def test_catkd_module_looks_at_layer_and_head(images: Tensor) -> None:
    student, teacher = pair(drop=0.5)
    assert student.training
    CATKDLoss(student, teacher, "tail", "tail")(images)  # dropout alone is no mismatch
    wrong = CATKDLoss(student, teacher, "tail", "tail.1")
    with (
        nothing_left(student, teacher),
        pytest.raises(ValueError, match=r"teacher_layer: the mean of 'tail.1' .* is not"),
    ):
        wrong(images)
    with pytest.raises(ValueError, match=r"student_layer: expected the 4 channels .*\[2, 3, 5, 4"):
        CATKDLoss(student, teacher, "body", "tail")(images)


def test_catkd_module_runs_the_student_once_and_the_teacher_in_eval(images: Tensor) -> None:
    student, teacher = pair(norm=True)
    criterion = CATKDLoss(student, teacher, "tail", "tail")
    kept = {key: value.clone() for key, value in teacher.state_dict().items()}
    criterion(images)
    criterion(images)
    assert student.body[1].num_batches_tracked == 2
    assert all(torch.equal(kept[key], value) for key, value in teacher.state_dict().items())
    assert teacher.training
    assert not list(criterion.parameters())
    criterion.eval()
    assert student.training


def e2_by_hand(
    net: Net, images: Tensor, targets: Tensor, *, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """Grad-CAM at ``body``: maps at the size of the images, not scaled, and logits."""
    features = net.body(images)
    logits = net.head(net.tail(features).mean((2, 3)))
    score = logits.gather(1, targets[:, None]).sum()
    (slope,) = torch.autograd.grad(score, features, create_graph=create_graph, retain_graph=True)
    raw = torch.einsum("nc,nchw->nhw", slope.mean((2, 3)), features)
    size = (images.shape[2], images.shape[3])
    maps = F.interpolate(raw.relu()[:, None], size=size, mode="bilinear", align_corners=False)
    return maps[:, 0], logits


def e2_loss_by_hand(
    student: Net, teacher: Net, images: Tensor, temperature: float, weight: float
) -> Tensor:
    targets = teacher(images).argmax(1)
    guidance, t = (x.detach() for x in e2_by_hand(teacher, images, targets, create_graph=False))
    maps, s = e2_by_hand(student, images, targets, create_graph=True)
    p = (t / temperature).softmax(1)
    rows = (p * (p.log() - (s / temperature).log_softmax(1))).sum(1)
    return temperature**2 * rows.mean() + weight * e2_oracle(maps, guidance)


def test_e2kd_module_equals_autograd(backend: str, images: Tensor) -> None:
    student, teacher = pair()
    with nothing_left(student, teacher):
        criterion = E2KDLoss(student, teacher, "body", "body", temperature=5.0, weight=3.0)
        out = criterion(images)
    expected = e2_loss_by_hand(student, teacher, images, 5.0, 3.0)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.student_logits, student(images))
    torch.testing.assert_close(out.loss.detach(), out.kl + 3 * out.alignment)
    assert 0.01 < out.alignment < 0.99
    for ours, theirs in zip(
        parameter_gradients(student, out.loss), parameter_gradients(student, expected), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "layercam", "xgradcam", "gradcam++"])
def test_e2kd_module_gradient_is_the_slope(method: str, images: Tensor) -> None:
    """Central differences: the second order part included."""
    student, teacher = pair()
    criterion = E2KDLoss(student, teacher, "body", "body", weight=10.0, method=method)
    parameters = list(student.parameters())
    out = criterion(images)
    assert 0.01 < out.alignment < 0.99
    gradients = parameter_gradients(student, out.loss)
    for _ in range(3):
        directions = [torch.randn_like(p) for p in parameters]
        slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
        values = []
        for step in (2e-5, -1e-5, -2e-5, -1e-5):  # at 2, 1, -1, -2 steps of 1e-5
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.data.add_(direction, alpha=step)
            values.append(criterion(images).loss.detach())
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.data.add_(direction, alpha=2e-5)
        # Right to the fourth order of the step, and to the rounding of values divided by it.
        found = (8 * (values[1] - values[2]) - (values[0] - values[3])) / 12e-5
        torch.testing.assert_close(found, slope, rtol=1e-8, atol=1e-9)


def test_e2kd_alignment_reaches_the_weights_behind_the_layer(images: Tensor) -> None:
    """The map depends on them through its gradient only: it must have kept the graph."""
    student, teacher = pair()
    near, far = (
        E2KDLoss(student, teacher, "body", "body", weight=weight)(images).loss
        for weight in (0.0, 10.0)
    )
    without, with_maps = (torch.autograd.grad(x, student.tail[1].weight)[0] for x in (near, far))
    assert (without - with_maps).abs().max() > 1e-6


def test_e2kd_training_aligns_the_maps(images: Tensor) -> None:
    student, teacher = pair()
    criterion = E2KDLoss(student, teacher, "body", "body", weight=5.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    history = []
    for _ in range(60):
        out = criterion(images)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        history.append(out)
    assert history[-1].alignment < 0.5 * history[0].alignment
    assert history[-1].kl < history[0].kl
    assert all(p.grad is None for p in teacher.parameters())


def test_e2kd_explains_the_class_of_the_teacher(images: Tensor) -> None:
    student, teacher = pair()
    targets = teacher(images).argmax(1)
    assert (student(images).argmax(1) != targets).any()
    wanted, _ = e2_by_hand(student, images, targets, create_graph=False)
    seen: list[Tensor] = []

    def spy(maps: Tensor, guidance: Tensor) -> Tensor:
        seen.append(maps)
        return e2kd_loss(maps, guidance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastxkd.losses.explanations.e2kd_loss", spy)
        E2KDLoss(student, teacher, "body", "body")(images)
    torch.testing.assert_close(seen[0], wanted)


def test_e2kd_frozen_mode_equals_the_live_one(images: Tensor) -> None:
    student, teacher = pair(norm=True)
    live = E2KDLoss(student, teacher, "body", "body", weight=2.0)
    maps, logits = live.explain_teacher(images)
    assert maps.shape == (4, 11, 9)
    assert not maps.requires_grad
    assert not logits.requires_grad
    expected = live(images)
    frozen = E2KDLoss(student, None, "body", None, weight=2.0)
    out = frozen(images, teacher_maps=maps, teacher_logits=logits)
    assert torch.equal(out.loss, expected.loss)
    # With the maps alone the teacher is asked for its logits only.
    assert torch.equal(live(images, teacher_maps=maps).loss, expected.loss)
    assert teacher.training
    with pytest.raises(ValueError, match="teacher: expected a model to explain, got None"):
        frozen(images)
    with pytest.raises(ValueError, match="teacher_logits: expected logits where there is no"):
        frozen(images, teacher_maps=maps)
    with pytest.raises(ValueError, match=r"teacher_maps: expected the shape .*\[4, 11, 9\], got"):
        frozen(images, teacher_maps=maps[:, :10], teacher_logits=logits)


def test_e2kd_every_so_many_steps(images: Tensor) -> None:
    student, teacher = pair()
    criterion = E2KDLoss(student, teacher, "body", "body", every=3)
    aligned = [criterion(images).alignment is not None for _ in range(4)]
    assert aligned == [True, False, False, True]
    with torch.no_grad():
        assert criterion(images).alignment is not None  # validation: always, and not counted
    resumed = E2KDLoss(student, teacher, "body", "body", every=3)
    resumed.load_state_dict(criterion.state_dict())
    assert [resumed(images).alignment is not None for _ in range(3)] == [False, False, True]
    out = criterion(images)
    assert torch.equal(out.loss, out.kl)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_e2kd_without_gradients(context: Any, images: Tensor) -> None:
    student, teacher = pair(norm=True)
    student.eval()
    criterion = E2KDLoss(student, teacher, "body", "body")
    expected = criterion(images)
    with context(), nothing_left(student, teacher):
        out = criterion(images.clone())
    torch.testing.assert_close(out.loss, expected.loss.detach())
    assert not out.loss.requires_grad


def test_e2kd_frozen_weights_of_the_teacher_and_autocast() -> None:
    student, teacher = (net.float() for net in pair())
    teacher.requires_grad_(False)
    images = torch.randn(4, 1, 11, 9)
    criterion = E2KDLoss(student, teacher, "body", "body")
    exact = criterion(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = criterion(images)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert out.alignment.item() == pytest.approx(exact.alignment.item(), abs=0.02)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


class Saved:
    """A tensor that autograd keeps; lives as long as the graph does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("kind", ["catkd", "e2kd"])
def test_the_graph_of_the_teacher_is_gone_before_the_student_runs(
    kind: str, images: Tensor
) -> None:
    student, teacher = pair()
    make = CATKDLoss if kind == "catkd" else E2KDLoss
    layer = "tail" if kind == "catkd" else "body"
    criterion = make(student, teacher, layer, layer)
    criterion(images)  # the look at layer and head is over
    saved: weakref.WeakSet[Saved] = weakref.WeakSet()
    counts: list[int] = []

    def pack(tensor: Tensor) -> Saved:
        box = Saved(tensor)
        saved.add(box)
        return box

    handle = student.register_forward_pre_hook(lambda *_: counts.append(len(saved)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        out = criterion(images)
    handle.remove()
    assert counts == [0]
    assert out.loss.requires_grad
    assert len(saved) > 0


def test_modules_leave_the_models_as_they_were_after_an_error(images: Tensor) -> None:
    class Broken(Net):
        def forward(self, images: Tensor) -> Tensor:
            self.body(images)
            raise RuntimeError("broken")

    student, teacher = Broken(3).double(), Net(5).double()
    teacher.tail.eval()
    for criterion in (
        CATKDLoss(student, teacher, "tail", "tail"),
        E2KDLoss(student, teacher, "body", "body"),
        E2KDLoss(teacher, student, "body", "body"),
    ):
        with nothing_left(student, teacher), pytest.raises(RuntimeError, match="broken"):
            criterion(images)


# --- wrong input

M = torch.rand(2, 3, 4, 4)
NET = Net(3)
IMAGES = torch.rand(2, 1, 11, 9)

WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "catkd tensor": (
        lambda: catkd_loss(M.numpy(), M),
        TypeError,
        "student_cams: expected a Tensor, got ndarray",
    ),
    "catkd integers": (
        lambda: catkd_loss(M, M.long()),
        TypeError,
        "teacher_cams: expected a floating-point dtype, got torch.int64",
    ),
    "catkd dimensions": (
        lambda: catkd_loss(M[0], M),
        ValueError,
        r"student_cams: expected maps \[n, channels, h, w\] .*got \[3, 4, 4\]",
    ),
    "catkd classes": (
        lambda: catkd_loss(M, M[:, :2]),
        ValueError,
        r"teacher_cams: expected the images and classes of student_cams \[2, 3, 4, 4\], got \[2, 2",
    ),
    "catkd sizes": (
        lambda: catkd_loss(M, M[..., :2], pool=None),
        ValueError,
        r"teacher_cams: expected the shape \(pool=None\) of student_cams .*got \[2, 3, 4, 2\]",
    ),
    "catkd teacher with gradient": (
        lambda: catkd_loss(M, M.clone().requires_grad_()),
        ValueError,
        r"teacher_cams: expected a tensor without gradient.*teacher_cams.detach\(\)",
    ),
    "catkd pool": (
        lambda: catkd_loss(M, M, pool=0),
        ValueError,
        "pool: expected at least 1, got 0",
    ),
    "catkd top and bottom": (
        lambda: catkd_loss(M, M, top=1, bottom=1),
        ValueError,
        "top: expected None beside bottom=1, got 1",
    ),
    "catkd too many classes": (
        lambda: catkd_loss(M, M, bottom=4),
        ValueError,
        "bottom: expected at most the 3 classes, got 4",
    ),
    "catkd logits": (
        lambda: catkd_loss(M, M, top=1, teacher_logits=torch.rand(2, 4)),
        ValueError,
        r"teacher_logits: expected \[2, 3\] to match student_cams .*got \[2, 4\]",
    ),
    "catkd flag": (
        lambda: catkd_loss(M, M, normalize="no"),  # type: ignore[arg-type]
        TypeError,
        "normalize: expected a bool, got str",
    ),
    "catkd logits type": (
        lambda: catkd_loss(M, M, top=1, teacher_logits=[0.5]),  # type: ignore[arg-type]
        TypeError,
        "teacher_logits: expected a Tensor, got list",
    ),
    "CATKDLoss top and bottom": (
        lambda: CATKDLoss(NET, NET, "tail", "tail", top=1, bottom=1),
        ValueError,
        "top: expected None beside bottom=1, got 1",
    ),
    "class_activations weight": (
        lambda: class_activations(M, torch.rand(5, 4)),
        ValueError,
        r"weight: expected \[classes, 3\] to match activations .*got \[5, 4\]",
    ),
    "class_activations bias": (
        lambda: class_activations(M, torch.rand(5, 3), torch.rand(3)),
        ValueError,
        r"bias: expected one value per class, \[5\], got \[3\]",
    ),
    "CATKDLoss layer": (
        lambda: CATKDLoss(NET, NET, "trail", "tail"),
        ValueError,
        "student_layer: Net has no layer named 'trail'; did you mean 'tail'",
    ),
    "CATKDLoss layers": (
        lambda: CATKDLoss(NET, NET, "tail", ["tail"]),  # type: ignore[arg-type]
        TypeError,
        "teacher_layer: expected a name or a module, got list",
    ),
    "CATKDLoss head": (
        lambda: CATKDLoss(NET, NET, "tail", "tail", teacher_head="body.0"),
        ValueError,
        "teacher_head: expected an nn.Linear or a 1x1 nn.Conv2d, got 'body.0', a Conv2d",
    ),
    "CATKDLoss top": (
        lambda: CATKDLoss(NET, NET, "tail", "tail", top=0),
        ValueError,
        "top: expected at least 1, got 0",
    ),
    "CATKDLoss tokens": (
        lambda: CATKDLoss(NET, NET, "head", "tail")(IMAGES),
        ValueError,
        r"student_layer: expected spatial activations .* of 'head', got \[2, 4\]",
    ),
    "e2kd tensor": (
        lambda: e2kd_loss(M, None),  # type: ignore[arg-type]
        TypeError,
        "teacher_maps: expected a Tensor, got NoneType",
    ),
    "e2kd shape": (
        lambda: e2kd_loss(M, M[:1]),
        ValueError,
        r"teacher_maps: expected the shape of student_maps \[2, 3, 4, 4\], got \[1, 3, 4, 4\]",
    ),
    "e2kd empty": (
        lambda: e2kd_loss(M[:0], M[:0]),
        ValueError,
        r"student_maps: expected \[n, ...\] with n > 0 .*got \[0, 3, 4, 4\]",
    ),
    "e2kd teacher with gradient": (
        lambda: e2kd_loss(M, M.clone().requires_grad_()),
        ValueError,
        r"teacher_maps: expected a tensor without gradient.*teacher_maps.detach\(\)",
    ),
    "E2KDLoss method": (
        lambda: E2KDLoss(NET, NET, "body", "body", method="weights"),
        ValueError,
        r"method: expected one of gradcam, gradcam\+\+, .*got 'weights'",
    ),
    "E2KDLoss weight": (
        lambda: E2KDLoss(NET, NET, "body", "body", weight=-1),
        ValueError,
        "weight: expected a finite number of at least 0, got -1",
    ),
    "E2KDLoss every": (
        lambda: E2KDLoss(NET, NET, "body", "body", every=0),
        ValueError,
        "every: expected at least 1, got 0",
    ),
    "E2KDLoss temperature": (
        lambda: E2KDLoss(NET, NET, "body", "body", temperature=0),
        ValueError,
        "temperature: expected a finite number above 0, got 0",
    ),
    "E2KDLoss layer": (
        lambda: E2KDLoss(NET, NET, "body", "boddy"),
        ValueError,
        "teacher_layer: Net has no layer named 'boddy'",
    ),
    "E2KDLoss teacher without a layer": (
        lambda: E2KDLoss(NET, NET, "body", None),
        ValueError,
        "teacher_layer: expected a layer of the teacher, got None",
    ),
    "E2KDLoss output": (
        lambda: E2KDLoss(NET.body, NET, "0", "body")(IMAGES),
        ValueError,
        r"student: expected logits \[2, classes\], got \[2, 3, 5, 4\]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(name: str) -> None:
    call, error, message = WRONG[name]
    with nothing_left(NET), pytest.raises(error, match=message):
        call()


def test_modules_describe_themselves() -> None:
    shown = repr(CATKDLoss(NET, NET, "tail", "tail", top=2))
    assert "pool=2, normalize=False, binarize=False, top=2, bottom=None" in shown
    shown = repr(E2KDLoss(NET, NET, "body", "body", every=16))
    assert "temperature=1.0, weight=1.0, method='gradcam', every=16" in shown
    assert fastxkd.__version__
