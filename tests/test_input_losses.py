"""KDIGA and MixKD against their formulas in float64, and the models left as they were."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from fastxkd.losses.inputs import (
    KDIGALoss,
    MixKDLoss,
    draw_pairs,
    kdiga_loss,
    mixkd_loss,
)


class Net(nn.Module):
    """Smooth, so that the gradient of an input gradient is not zero almost everywhere."""

    def __init__(self, width: int, *, norm: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, 2)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.head = nn.Linear(width, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.softplus(self.norm(self.conv(images))).mean((2, 3)))


def pair(**options: Any) -> tuple[Net, Net]:
    student, teacher = Net(3, **options).double(), Net(5, **options).double()
    # Larger weights: logits and input gradients of a size that a mistake would show in.
    for parameter in [*student.parameters(), *teacher.parameters()]:
        parameter.data *= 3
    return student, teacher


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 1, 9, 8, dtype=torch.float64)


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 3, 1, 1, 2])


@contextmanager
def nothing_left(*models: nn.Module) -> Iterator[None]:
    """Hooks, modes and gradients are those of before."""

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


def parameter_gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def soft(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    p = (t / temperature).softmax(1)
    rows = (p * (p.log() - (s / temperature).log_softmax(1))).sum(1)
    return temperature**2 * rows.mean()


def assert_slope(loss: Callable[[], Tensor], model: nn.Module) -> None:
    """Central differences along random directions of the parameters."""
    parameters = list(model.parameters())
    gradients = parameter_gradients(model, loss())
    for _ in range(3):
        directions = [torch.randn_like(p) for p in parameters]
        slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
        values = []
        for step in (2e-5, -1e-5, -2e-5, -1e-5):  # at 2, 1, -1, -2 steps of 1e-5
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.data.add_(direction, alpha=step)
            values.append(loss().detach())
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.data.add_(direction, alpha=2e-5)
        # Right to the fourth order of the step, and to the rounding of values divided by it.
        found = (8 * (values[1] - values[2]) - (values[0] - values[3])) / 12e-5
        torch.testing.assert_close(found, slope, rtol=1e-8, atol=1e-9)


# --- KDIGA


def input_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """One image at a time."""
    rows = []
    for image, label in zip(images, labels, strict=True):
        leaf = image[None].detach().requires_grad_(True)
        ce = -model(leaf).log_softmax(1)[0, label]
        rows.append(torch.autograd.grad(ce, leaf, create_graph=True)[0][0])
    return torch.stack(rows)


def kdiga_by_hand(
    student: Net, teacher: Net, images: Tensor, labels: Tensor, squared: bool, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    s, t = student(images), teacher(images).detach()
    ce = torch.stack([-row.log_softmax(0)[y] for row, y in zip(s, labels, strict=True)]).mean()
    apart = input_gradients(student, images, labels)
    apart = apart - input_gradients(teacher, images, labels).detach()
    norms = [row.square().sum() if squared else row.flatten().norm() for row in apart]
    return ce, soft(s, t, temperature), torch.stack(norms).mean()


@pytest.mark.parametrize("squared", [True, False])
def test_kdiga_equals_autograd(backend: str, squared: bool, images: Tensor, labels: Tensor) -> None:
    student, teacher = pair()
    options: dict[str, Any] = {
        "temperature": 3.0,
        "ce_weight": 0.5,
        "kd_weight": 2.0,
        "alignment_weight": 7.0,
        "squared": squared,
    }
    with nothing_left(student, teacher):
        parts = kdiga_loss(student, teacher, images, labels, return_parts=True, **options)
    ce, kl, alignment = kdiga_by_hand(student, teacher, images, labels, squared, 3.0)
    expected = 0.5 * ce + 2 * kl + 7 * alignment
    torch.testing.assert_close(parts.loss, expected)
    torch.testing.assert_close(parts.ce, 0.5 * ce.detach())
    torch.testing.assert_close(parts.kl, 2 * kl.detach())
    torch.testing.assert_close(parts.alignment, 7 * alignment.detach())
    torch.testing.assert_close(parts.student_logits, student(images))
    assert parts.alignment > 0.01
    for ours, theirs in zip(
        parameter_gradients(student, parts.loss),
        parameter_gradients(student, expected),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    alone = kdiga_loss(student, teacher, images, labels, **options)
    assert torch.equal(alone, parts.loss)
    assert torch.equal(KDIGALoss(student, teacher, **options)(images, labels), alone)


@pytest.mark.parametrize("squared", [True, False])
def test_kdiga_gradient_is_the_slope(squared: bool, images: Tensor, labels: Tensor) -> None:
    student, teacher = pair()
    assert_slope(
        lambda: kdiga_loss(
            student, teacher, images, labels, alignment_weight=10.0, squared=squared
        ),
        student,
    )


def test_kdiga_double_backward_is_there(images: Tensor, labels: Tensor) -> None:
    student, teacher = pair()
    near, far = (
        kdiga_loss(student, teacher, images, labels, alignment_weight=weight)
        for weight in (0.0, 10.0)
    )
    for without, aligned in zip(
        parameter_gradients(student, near), parameter_gradients(student, far), strict=True
    ):
        assert (without - aligned).abs().max() > 1e-6


def test_kdiga_of_the_teacher_itself_is_cross_entropy(images: Tensor, labels: Tensor) -> None:
    student, _ = pair()
    for squared in (True, False):
        loss = kdiga_loss(student, student, images, labels, squared=squared)
        ce = F.cross_entropy(student(images), labels)
        torch.testing.assert_close(loss, ce, rtol=0, atol=1.01e-6)
        gradients = parameter_gradients(student, loss)
        for ours, theirs in zip(gradients, parameter_gradients(student, ce), strict=True):
            assert ours.isfinite().all()
            torch.testing.assert_close(ours, theirs)


def test_kdiga_training_aligns_the_gradients(images: Tensor, labels: Tensor) -> None:
    _, teacher = pair()
    student = copy.deepcopy(teacher)
    for parameter in student.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    criterion = KDIGALoss(student, teacher, ce_weight=0.0, kd_weight=0.0, return_parts=True)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    history = []
    with nothing_left(teacher):
        for _ in range(60):
            parts = criterion(images, labels)
            optimizer.zero_grad()
            parts.loss.backward()
            optimizer.step()
            history.append(parts.alignment.item())
    assert history[-1] < 0.05 * history[0]


def test_kdiga_runs_the_student_once_and_the_teacher_in_eval(
    images: Tensor, labels: Tensor
) -> None:
    student, teacher = pair(norm=True)
    kept = {key: value.clone() for key, value in teacher.state_dict().items()}
    criterion = KDIGALoss(student, teacher)
    criterion(images, labels)
    criterion(images, labels)
    assert student.norm.num_batches_tracked == 2
    assert all(torch.equal(kept[key], value) for key, value in teacher.state_dict().items())
    assert teacher.training
    assert not list(criterion.parameters())
    criterion.eval()
    assert student.training


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_kdiga_without_gradients(context: Any, images: Tensor, labels: Tensor) -> None:
    student, teacher = pair(norm=True)
    student.eval(), teacher.eval()
    expected = kdiga_loss(student, teacher, images, labels)
    with context(), nothing_left(student, teacher):
        loss = kdiga_loss(student, teacher, images.clone(), labels.clone())
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())


def test_kdiga_leaves_gradients_that_are_there(images: Tensor, labels: Tensor) -> None:
    student, teacher = pair()
    for parameter in [*student.parameters(), *teacher.parameters()]:
        parameter.grad = torch.ones_like(parameter)
    images.requires_grad_(True)
    loss = kdiga_loss(student, teacher, images, labels)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in student.parameters())
    loss.backward()
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in teacher.parameters())
    assert not any(torch.equal(p.grad, torch.ones_like(p)) for p in student.parameters())
    assert images.grad is None


def test_kdiga_frozen_teacher_and_autocast(labels: Tensor) -> None:
    student, teacher = (net.float() for net in pair())
    teacher.requires_grad_(False)
    images = torch.randn(5, 1, 9, 8)
    exact = kdiga_loss(student, teacher, images, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = kdiga_loss(student, teacher, images, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


class Saved:
    """A tensor that autograd keeps; lives as long as the graph does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("kind", ["kdiga", "mixkd"])
def test_the_graph_of_the_teacher_is_gone_before_the_student_runs(
    kind: str, images: Tensor, labels: Tensor
) -> None:
    student, teacher = pair()
    of_teacher: weakref.WeakSet[Saved] = weakref.WeakSet()
    alive: list[int] = []
    running: list[bool] = [False]

    def pack(tensor: Tensor) -> Saved:
        box = Saved(tensor)
        if running[0]:
            of_teacher.add(box)
            alive.append(1)
        return box

    def set_running(value: bool) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            running[0] = value

        return hook

    left: list[int] = []
    teacher.register_forward_pre_hook(set_running(True))
    teacher.register_forward_hook(set_running(False))
    student.register_forward_pre_hook(lambda *_: left.append(len(of_teacher)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        if kind == "kdiga":
            kdiga_loss(student, teacher, images, labels).backward()
            assert alive  # the teacher had a graph
        else:
            mixkd_loss(student, teacher, images, labels).backward()
            assert not alive  # it never had one
    assert not any(left)
    assert left


# --- MixKD


def mixkd_by_hand(
    student: Net,
    teacher: Net,
    images: Tensor,
    labels: Tensor,
    share: Tensor,
    partner: Tensor,
    distance: str,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mixed, mixed_labels = [], []
    for i, (lam, j) in enumerate(zip(share.tolist(), partner.tolist(), strict=True)):
        mixed.append(lam * images[i] + (1 - lam) * images[j])
        one, other = (F.one_hot(labels[k], 4).double() for k in (i, j))
        mixed_labels.append(lam * one + (1 - lam) * other)
    s, t = student(torch.stack(mixed)), teacher(torch.stack(mixed)).detach()
    ce = -(F.one_hot(labels, 4) * student(images).log_softmax(1)).sum(1).mean()
    mixed_ce = -(torch.stack(mixed_labels) * s.log_softmax(1)).sum(1).mean()
    d = (s - t).square().mean() if distance == "mse" else soft(s, t, temperature)
    return ce, mixed_ce, d


@pytest.mark.parametrize("distance", ["mse", "kl"])
def test_mixkd_equals_its_formula(
    backend: str, distance: str, images: Tensor, labels: Tensor
) -> None:
    student, teacher = pair()
    options: dict[str, Any] = {
        "ce_weight": 0.5,
        "mix_weight": 2.0,
        "kd_weight": 3.0,
        "distance": distance,
        "temperature": 2.5,
        "alpha": 0.7,
    }
    share, partner = draw_pairs(
        5, 0.7, torch.Generator().manual_seed(3), device=torch.device("cpu")
    )
    assert (partner != torch.arange(5)).any()
    with nothing_left(student, teacher):
        parts = mixkd_loss(
            student,
            teacher,
            images,
            labels,
            generator=torch.Generator().manual_seed(3),
            return_parts=True,
            **options,
        )
    ce, mixed, d = mixkd_by_hand(student, teacher, images, labels, share, partner, distance, 2.5)
    expected = 0.5 * ce + 2 * mixed + 3 * d
    torch.testing.assert_close(parts.loss, expected)
    torch.testing.assert_close(parts.ce, 0.5 * ce.detach())
    torch.testing.assert_close(parts.mixed, 2 * mixed.detach())
    torch.testing.assert_close(parts.soft, 3 * d.detach())
    torch.testing.assert_close(parts.student_logits, student(images))
    for ours, theirs in zip(
        parameter_gradients(student, parts.loss),
        parameter_gradients(student, expected),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    module = MixKDLoss(student, teacher, generator=torch.Generator().manual_seed(3), **options)
    assert torch.equal(module(images, labels), parts.loss)


def test_mixkd_gradient_is_the_slope(images: Tensor, labels: Tensor) -> None:
    student, teacher = pair()
    for distance in ("mse", "kl"):
        assert_slope(
            lambda d=distance: mixkd_loss(
                student,
                teacher,
                images,
                labels,
                distance=d,
                generator=torch.Generator().manual_seed(1),
            ),
            student,
        )


def test_mixkd_draws_are_reproducible_and_beta() -> None:
    cpu = torch.device("cpu")
    one = draw_pairs(50, 0.4, torch.Generator().manual_seed(8), device=cpu)
    other = draw_pairs(50, 0.4, torch.Generator().manual_seed(8), device=cpu)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    assert one[1].sort().values.tolist() == list(range(50))
    generator = torch.Generator().manual_seed(8)
    first, second = (draw_pairs(50, 0.4, generator, device=cpu)[0] for _ in range(2))
    assert not torch.equal(first, second)
    for alpha in (0.4, 1.0, 3.0):
        share, _ = draw_pairs(40_000, alpha, generator, device=cpu)
        assert ((share >= 0) & (share <= 1)).all()
        assert share.mean().item() == pytest.approx(0.5, abs=0.01)
        assert share.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


def test_mixkd_takes_the_seed_of_torch_without_a_generator(images: Tensor, labels: Tensor) -> None:
    student, teacher = pair()
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values.append(mixkd_loss(student, teacher, images, labels).item())
    assert values[0] == values[1] != values[2]


def test_mixkd_draws_the_same_whatever_the_factors(images: Tensor, labels: Tensor) -> None:
    student, teacher = pair()
    for factors in ({"ce_weight": 0.0}, {"mix_weight": 0.0, "kd_weight": 0.0}):
        generators = [torch.Generator().manual_seed(5) for _ in range(2)]
        mixkd_loss(student, teacher, images, labels, generator=generators[0])
        mixkd_loss(student, teacher, images, labels, generator=generators[1], **factors)
        assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_mixkd_runs_no_pass_without_a_use(images: Tensor, labels: Tensor) -> None:
    seen: list[str] = []

    def model(role: str) -> Callable[[Tensor], Tensor]:
        def run(inputs: Tensor) -> Tensor:
            seen.append(role)
            return inputs.flatten(1)[:, :4]

        return run

    for factors, passes in {
        (1, 1, 1): ["student", "student", "teacher"],
        (0, 1, 1): ["student", "teacher"],
        (1, 1, 0): ["student", "student"],
        (1, 0, 0): ["student"],
        (0, 0, 1): ["student", "teacher"],
    }.items():
        seen.clear()
        names = ("ce_weight", "mix_weight", "kd_weight")
        options = dict(zip(names, factors, strict=True))
        parts = mixkd_loss(
            model("student"), model("teacher"), images, labels, return_parts=True, **options
        )
        assert seen == passes
        assert (parts.student_logits is None) == (factors[0] == 0)


def test_mixkd_on_embeddings_of_two_widths() -> None:
    """As in the paper: tokens are embedded, mixed and encoded; each model has its own table."""

    class Text(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.table = nn.Embedding(11, width)
            self.head = nn.Linear(width, 3)

        def encode(self, embedded: Tensor) -> Tensor:
            return self.head(torch.tanh(embedded).mean(1))

    student, teacher = Text(4).double(), Text(6).double()
    tokens, labels = torch.randint(11, (5, 7)), torch.tensor([0, 1, 2, 0, 1])

    def loss() -> Tensor:
        return mixkd_loss(
            student.encode,
            teacher.encode,
            student.table(tokens),
            labels,
            teacher_inputs=teacher.table(tokens),
            generator=torch.Generator().manual_seed(2),
        )

    share, partner = draw_pairs(
        5, 0.4, torch.Generator().manual_seed(2), device=torch.device("cpu")
    )
    weight = share[:, None, None].double()
    s, t = (
        m.encode(weight * m.table(tokens) + (1 - weight) * m.table(tokens[partner]))
        for m in (student, teacher)
    )
    one_hot = F.one_hot(labels, 3)
    mixed = weight[:, :, 0] * one_hot + (1 - weight[:, :, 0]) * one_hot[partner]
    expected = F.cross_entropy(student.encode(student.table(tokens)), labels)
    expected = expected + F.cross_entropy(s, mixed) + F.mse_loss(s, t)
    torch.testing.assert_close(loss(), expected)
    assert_slope(loss, student)  # the table learns as well
    assert all(p.grad is None for p in teacher.parameters())


def test_mixkd_leaves_the_models_and_inputs_as_they_were(images: Tensor, labels: Tensor) -> None:
    student, teacher = pair(norm=True)
    before = images.clone()
    kept = {key: value.clone() for key, value in teacher.state_dict().items()}
    criterion = MixKDLoss(student, teacher)
    with nothing_left(teacher):
        criterion(images, labels).backward()
    assert torch.equal(images, before)
    assert all(torch.equal(kept[key], value) for key, value in teacher.state_dict().items())
    assert student.norm.num_batches_tracked == 2
    assert not list(criterion.parameters())
    criterion.eval()
    assert student.training
    with torch.no_grad(), nothing_left(student, teacher):
        assert not criterion(images, labels).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_mixkd_of_16_bit_models_sums_in_float32(dtype: torch.dtype, labels: Tensor) -> None:
    student, teacher = (net.to(dtype) for net in pair())
    images = torch.randn(5, 1, 9, 8).to(dtype)
    for distance in ("mse", "kl"):
        loss = mixkd_loss(student, teacher, images, labels, distance=distance)
        assert loss.dtype == torch.float32
        loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_models_are_left_as_they_were_after_an_error(images: Tensor, labels: Tensor) -> None:
    class Broken(Net):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("broken")

    net, broken = Net(3).double(), Broken(3).double()
    broken.head.eval()
    for student, teacher in ((net, broken), (broken, net)):
        for loss in (kdiga_loss, mixkd_loss):
            with nothing_left(net, broken), pytest.raises(RuntimeError, match="broken"):
                loss(student, teacher, images, labels)


# The list that every loss is tried on: samples by width, of two linear models.
LISTED = [(1, 1), (3, 2), (7, 33), (128, 100), (41, 1271), (256, 1000), (16, 32000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", LISTED, ids=str)
@pytest.mark.parametrize("kind", ["kdiga", "mixkd", "mixkd, kl"])
def test_listed_shapes(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """No worse than the formulas in the dtype of the models."""
    rows, width = shape
    student, teacher = nn.Linear(width, 4).to(dtype), nn.Linear(width, 4).to(dtype)
    inputs, labels = torch.randn(shape).to(dtype), torch.randint(4, (rows,))
    draw = draw_pairs(rows, 0.4, torch.Generator().manual_seed(3), device=torch.device("cpu"))

    def ours(s: nn.Module, t: nn.Module, x: Tensor) -> Tensor:
        if kind == "kdiga":
            return kdiga_loss(s, t, x, labels)
        distance = "kl" if "kl" in kind else "mse"
        generator = torch.Generator().manual_seed(3)
        return mixkd_loss(s, t, x, labels, distance=distance, generator=generator)

    def formula(s: Any, t: Any, x: Tensor) -> Tensor:
        one_hot = F.one_hot(labels, 4).to(x.dtype)
        logits, guidance = s(x), t(x).detach()
        if kind == "kdiga":
            # Of a linear model the input gradient is (p - y) W.
            slopes = [(z.softmax(1) - one_hot) @ m.weight for z, m in ((logits, s), (guidance, t))]
            apart = (slopes[0] - slopes[1].detach()).square().sum(1).mean()
            ce = -(one_hot * logits.log_softmax(1)).sum(1).mean()
            return ce + soft(logits, guidance, 4.0) + apart
        share, partner = draw[0].to(x.dtype)[:, None], draw[1]
        mixed = share * x + (1 - share) * x[partner]
        target = share * one_hot + (1 - share) * one_hot[partner]
        s_mixed, t_mixed = s(mixed), t(mixed).detach()
        d = soft(s_mixed, t_mixed, 1.0) if "kl" in kind else (s_mixed - t_mixed).square().mean()
        ce = -(one_hot * logits.log_softmax(1)).sum(1).mean()
        return ce - (target * s_mixed.log_softmax(1)).sum(1).mean() + d

    wide = [copy.deepcopy(m).double() for m in (student, teacher)]
    true = formula(*wide, inputs.double())
    slopes = parameter_gradients(wide[0], 3 * true)
    value, eager = ours(student, teacher, inputs), formula(student, teacher, inputs)
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert abs(value.item() - true.item()) <= abs(eager.item() - true.item()) + 1e-6 * true.abs()
    grads, eager_grads = (parameter_gradients(student, 3 * x) for x in (value, eager))
    for grad, eager_grad, slope in zip(grads, eager_grads, slopes, strict=True):
        # Of 16-bit models each term's gradient is rounded, and their sum once more.
        eps = 1e-6 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps
        limit = (eager_grad - slope).norm() + eps * slope.norm()
        assert (grad - slope).norm() <= limit


def test_mixkd_with_no_factor_has_a_gradient_of_zeros(images: Tensor, labels: Tensor) -> None:
    student, teacher = pair()
    none = {"ce_weight": 0.0, "mix_weight": 0.0, "kd_weight": 0.0}
    parts = mixkd_loss(student, teacher, images, labels, return_parts=True, **none)
    parts.loss.backward()
    assert parts.loss.item() == 0
    assert parts.student_logits is not None
    assert all(p.grad is not None and not p.grad.any() for p in student.parameters())


@pytest.mark.parametrize("loss", [kdiga_loss, mixkd_loss])
def test_under_autocast_and_checkpoints(
    loss: Callable[..., Tensor], images: Tensor, labels: Tensor
) -> None:
    """A student whose layers are checkpointed: the double backward goes through them again."""
    student, teacher = pair()

    def kept(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(student, x, use_reentrant=False)

    found = []
    for model in (student, kept):
        torch.manual_seed(4)
        student.zero_grad()
        loss(model, teacher, images, labels).backward()
        found.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    assert len(found[0]) == 4
    torch.testing.assert_close(found[1], found[0])


def test_the_wider_of_two_dtypes(labels: Tensor) -> None:
    student, teacher = nn.Linear(6, 4).bfloat16(), nn.Linear(6, 4)
    inputs = torch.randn(5, 6)
    for distance in ("mse", "kl"):
        loss = mixkd_loss(
            student,
            teacher,
            inputs.bfloat16(),
            labels,
            teacher_inputs=inputs,
            ce_weight=0.0,
            mix_weight=0.0,
            distance=distance,
            generator=torch.Generator().manual_seed(3),
        )
        share, partner = draw_pairs(
            5, 0.4, torch.Generator().manual_seed(3), device=torch.device("cpu")
        )
        s, t = (
            m(torch.lerp(x[partner], x, share.to(x.dtype)[:, None])).double()
            for m, x in ((student, inputs.bfloat16()), (teacher, inputs))
        )
        true = (s - t).square().mean() if distance == "mse" else soft(s, t, 1.0)
        assert loss.item() == pytest.approx(true.item(), rel=1e-5)


# --- wrong input

X, Y = torch.rand(3, 4), torch.tensor([0, 1, 2])
NET = nn.Linear(4, 3)

WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "kdiga images": (
        lambda: kdiga_loss(NET, NET, X.numpy(), Y),
        TypeError,
        "images: expected a Tensor, got ndarray",
    ),
    "kdiga integer images": (
        lambda: kdiga_loss(NET, NET, X.to(torch.uint8), Y),
        TypeError,
        "images: expected a floating-point dtype, got torch.uint8",
    ),
    "kdiga labels": (
        lambda: kdiga_loss(NET, NET, X, Y[:2]),
        ValueError,
        r"labels: expected \[3\], one for each row of images \[3, 4\], got \[2\]",
    ),
    "kdiga label dtype": (
        lambda: kdiga_loss(NET, NET, X, Y.float()),
        TypeError,
        "labels: expected torch.int64 class indices, got torch.float32",
    ),
    "kdiga label to ignore": (
        lambda: kdiga_loss(NET, NET, X, torch.tensor([0, -100, 2])),
        ValueError,
        "labels: expected classes from 0 to 2, got -100; every row counts",
    ),
    "kdiga label too high": (
        lambda: kdiga_loss(NET, NET, X, torch.tensor([0, 3, 2])),
        ValueError,
        "labels: expected classes from 0 to 2, got 3",
    ),
    "mixkd label to ignore": (
        lambda: mixkd_loss(NET, NET, X, torch.tensor([0, -100, 2])),
        ValueError,
        "labels: expected classes from 0 to 2, got -100; every row counts",
    ),
    "mixkd label too high, of mixtures alone": (
        lambda: mixkd_loss(NET, NET, X, torch.tensor([0, 3, 2]), ce_weight=0.0),
        ValueError,
        "labels: expected classes from 0 to 2, got 3",
    ),
    "KDIGALoss": (
        lambda: KDIGALoss(NET, NET, temperature=0.0),
        ValueError,
        "temperature: expected a finite number above 0, got 0.0",
    ),
    "KDIGALoss flag": (
        lambda: KDIGALoss(NET, NET, squared="no"),  # type: ignore[arg-type]
        TypeError,
        "squared: expected a bool, got str",
    ),
    "MixKDLoss": (
        lambda: MixKDLoss(NET, NET, distance="l1"),
        ValueError,
        "distance: expected one of mse, kl, got 'l1'",
    ),
    "MixKDLoss weight": (
        lambda: MixKDLoss(NET, NET, kd_weight=-1.0),
        ValueError,
        "kd_weight: expected a finite number of at least 0, got -1.0",
    ),
    "kdiga weight": (
        lambda: kdiga_loss(NET, NET, X, Y, alignment_weight=-1.0),
        ValueError,
        "alignment_weight: expected a finite number of at least 0, got -1.0",
    ),
    "kdiga temperature": (
        lambda: kdiga_loss(NET, NET, X, Y, temperature=0.0),
        ValueError,
        "temperature: expected a finite number above 0, got 0.0",
    ),
    "kdiga output": (
        lambda: kdiga_loss(NET, nn.Flatten(0), X, Y),
        ValueError,
        r"teacher: expected logits \[3, classes\], got \[12\]",
    ),
    "kdiga constant": (
        lambda: kdiga_loss(lambda x: torch.zeros(3, 3), NET, X, Y),
        ValueError,
        "student: its logits do not depend on the images",
    ),
    "kdiga classes": (
        lambda: kdiga_loss(NET, nn.Linear(4, 5), X, Y),
        ValueError,
        "teacher_logits: expected 3 classes as in student_logits",
    ),
    "mixkd inputs": (
        lambda: mixkd_loss(NET, NET, torch.zeros(3, 4, dtype=torch.long), Y),
        TypeError,
        "inputs: expected a floating-point dtype, got torch.int64",
    ),
    "mixkd empty": (
        lambda: mixkd_loss(NET, NET, X[:0], Y[:0]),
        ValueError,
        r"inputs: expected a batch \[n, ...\] with n > 0, got \[0, 4\]",
    ),
    "mixkd teacher_inputs": (
        lambda: mixkd_loss(NET, NET, X, Y, teacher_inputs=X[:2]),
        ValueError,
        "teacher_inputs: expected 3 rows as in inputs, got 2",
    ),
    "mixkd alpha": (
        lambda: mixkd_loss(NET, NET, X, Y, alpha=0.0),
        ValueError,
        "alpha: expected a finite number above 0, got 0.0",
    ),
    "mixkd distance": (
        lambda: mixkd_loss(NET, NET, X, Y, distance="l1"),
        ValueError,
        "distance: expected one of mse, kl, got 'l1'",
    ),
    "mixkd weight": (
        lambda: mixkd_loss(NET, NET, X, Y, mix_weight=float("nan")),
        ValueError,
        "mix_weight: expected a finite number of at least 0, got nan",
    ),
    "mixkd classes": (
        lambda: mixkd_loss(NET, nn.Linear(4, 5), X, Y),
        ValueError,
        r"teacher: expected logits \[3, 3\] as of the student, got \[3, 5\]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(name: str) -> None:
    call, error, message = WRONG[name]
    with nothing_left(NET), pytest.raises(error, match=message):
        call()


def test_modules_describe_themselves() -> None:
    shown = repr(KDIGALoss(NET, NET, squared=False))
    assert "alignment_weight=1.0, squared=False, return_parts=False" in shown
    shown = repr(MixKDLoss(NET, NET, distance="kl", temperature=2.0))
    assert "distance='kl', temperature=2.0, generator=None, return_parts=False" in shown
