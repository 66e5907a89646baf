"""The losses on features against their formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from fastxkd import losses
from fastxkd.losses import _blocks, review
from tests import oracles

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# the student's feature, the teacher's size
SHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((1, 1, 1, 1), (1, 1)),
    ((3, 5, 7, 4), (7, 4)),
    ((2, 3, 8, 8), (4, 4)),
    ((2, 3, 4, 5), (9, 7)),
    ((2, 3, 4, 9), (6, 5)),
    ((4, 3, 6), (4,)),
    ((2, 2, 3, 4, 5), (2, 4, 6)),
    ((5, 7), ()),
]
Loss = Callable[[Tensor, Tensor], Tensor]


# --- the formulas, in the dtype of the input


def averaged(x: Tensor, size: Sequence[int]) -> Tensor:
    """Average of the bins from floor(i h / s) to ceil((i + 1) h / s), one dimension at a time."""
    for dim, s in enumerate(size, start=2):
        h = x.shape[dim]
        if h == s:
            continue
        bins = [(i * h // s, -(-(i + 1) * h // s)) for i in range(s)]
        x = torch.stack([x.narrow(dim, a, b - a).mean(dim) for a, b in bins], dim)
    return x


def matched(student: Tensor, teacher: Tensor) -> list[Tensor]:
    pairs = zip(student.shape[2:], teacher.shape[2:], strict=True)
    size = [min(pair) for pair in pairs]
    return [averaged(x, size) for x in (student, teacher)]


def fitnet(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = matched(student, teacher)
    return (s - t).square().sum() / s.numel()


def attention(p: float) -> Loss:
    def at(student: Tensor, teacher: Tensor) -> Tensor:
        maps = []
        for x in matched(student, teacher):
            a = (x.abs() ** p).mean(1).flatten(1)
            maps.append(a / a.square().sum(1, keepdim=True).sqrt())
        return (maps[0] - maps[1]).square().mean()

    return at


def vid_of(variance: Tensor) -> Loss:
    def vid(student: Tensor, teacher: Tensor) -> Tensor:
        s, t = matched(student, teacher)
        v = variance.to(s.dtype).view(-1, *[1] * (s.dim() - 2))
        return (v.sqrt().log() + (t - s).square() / (2 * v)).mean()

    return vid


def hcl(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    loss = students[0].new_zeros(())
    for s, t in zip(students, teachers, strict=True):
        terms, weights = [(s - t).square().mean()], [1.0]
        for level in (4, 2, 1):
            if s.dim() == 4 and level < min(s.shape[2:]):
                pooled = averaged(s, (level, level)) - averaged(t, (level, level))
                terms.append(pooled.square().mean())
                weights.append(weights[-1] / 2)
        total = sum(w * term for w, term in zip(weights, terms, strict=True))
        loss = loss + total / sum(weights)
    return loss


VARIANCE = torch.tensor([0.3, 2.0, 1.1, 5.0, 0.7, 1.3, 0.9], dtype=torch.float64)


def vid_loss(student: Tensor, teacher: Tensor) -> Tensor:
    return losses.vid_loss(student, teacher, variance=VARIANCE.repeat(5000)[: student.shape[1]])


def vid(student: Tensor, teacher: Tensor) -> Tensor:
    return vid_of(VARIANCE.repeat(5000)[: student.shape[1]])(student, teacher)


PAIRS: dict[str, tuple[Loss, Loss]] = {
    "fitnet": (losses.fitnet_loss, fitnet),
    "vid": (vid_loss, vid),
    "at": (losses.at_loss, attention(2)),
    "at p=1": (lambda s, t: losses.at_loss(s, t, p=1), attention(1)),
    "at p=1.5": (lambda s, t: losses.at_loss(s, t, p=1.5), attention(1.5)),
    "at p=4": (lambda s, t: losses.at_loss(s, t, p=4), attention(4)),
}


def pair(
    student: tuple[int, ...], size: tuple[int, ...], dtype: torch.dtype, channels: int = 0
) -> tuple[Tensor, Tensor]:
    teacher = (student[0], channels or student[1], *size)
    return (
        (torch.randn(student, dtype=torch.float64) + 0.2).to(dtype),
        (2 * torch.randn(teacher, dtype=torch.float64) + 0.1).to(dtype),
    )


def gradient(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_(True)  # in the layout that it has
    value = loss(leaf, teacher)
    (grad,) = torch.autograd.grad(value, leaf, torch.full_like(value, 3.0))
    return value.detach(), grad


def check(ours: Loss, formula: Loss, student: Tensor, teacher: Tensor) -> None:
    """No worse than eager on the same numbers in the precision that sums are taken in."""
    dtype = student.dtype
    exact = torch.float64 if torch.float64 in (dtype, teacher.dtype) else torch.float32
    value, grad = gradient(ours, student, teacher)
    true, slope = gradient(formula, student.double(), teacher.double())
    eager, eager_slope = gradient(formula, student.to(exact), teacher.to(exact))
    assert value.dtype == exact
    assert value.shape == ()
    assert grad.dtype == dtype
    assert grad.shape == student.shape
    eps = 1e-6 if exact == torch.float32 else 1e-12
    assert abs(value.item() - true.item()) <= abs(eager.item() - true.item()) + eps * max(1, true)
    limit = (eager_slope.double() - slope).norm() + eps * slope.norm() + eps * 1e-3
    if dtype != exact:
        limit += 1.2 * (slope.to(dtype).double() - slope).norm()
    assert (grad.double() - slope).norm() <= limit


def cases() -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    for name in PAIRS:
        for shape, size in SHAPES:
            if size or not name.startswith("at"):
                yield name, shape, size


# --- values and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "shape", "size"), list(cases()), ids=str)
def test_matches_the_formula(
    name: str, shape: tuple[int, ...], size: tuple[int, ...], dtype: torch.dtype
) -> None:
    channels = 4 if name.startswith("at") else 0
    check(*PAIRS[name], *pair(shape, size, dtype, channels))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [1, 40, 100, 10_000])
def test_blocks_of_samples_do_not_matter(
    monkeypatch: pytest.MonkeyPatch, block: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(_blocks, "BLOCK_ELEMENTS", block)
    for name in ("fitnet", "vid", "at", "at p=1.5"):
        check(*PAIRS[name], *pair((7, 3, 4, 4), (4, 4), dtype))
    check(losses.hcl_loss, lambda s, t: hcl([s], [t]), *pair((7, 3, 6, 5), (6, 5), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 8, 12], ids=str)
def test_hcl_matches_the_formula(dtype: torch.dtype, size: int) -> None:
    student, teacher = pair((3, 5, size, size + size % 2), (size, size + size % 2), dtype)
    check(losses.hcl_loss, lambda s, t: hcl([s], [t]), student, teacher)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hcl_of_stages_is_their_sum(dtype: torch.dtype) -> None:
    student, teacher = pair((3, 5, 8, 8), (8, 8), dtype)
    vector, target = pair((3, 6), (), torch.float64 if dtype == torch.float64 else torch.float32)
    check(
        lambda s, t: losses.hcl_loss([s, vector], (t, target)),
        lambda s, t: hcl([s, vector.to(s.dtype)], [t, target.to(s.dtype)]),
        student,
        teacher,
    )
    one = vector[:, :, None, None], target[:, :, None, None]
    assert losses.hcl_loss(vector, target).item() == pytest.approx(losses.hcl_loss(*one).item())


def test_mixed_dtypes() -> None:
    student, teacher = pair((3, 4, 6, 6), (4, 4), torch.float64)
    for name in PAIRS:
        check(*PAIRS[name], student.float(), teacher)
        check(*PAIRS[name], student, teacher.bfloat16())
    s, t = pair((3, 4, 6, 6), (6, 6), torch.float64)
    check(losses.hcl_loss, lambda a, b: hcl([a], [b]), s.float(), t)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("size", [(3, 2), (5, 5)], ids=str)
def test_gradcheck(name: str, size: tuple[int, int]) -> None:
    student, teacher = pair((2, 3, 4, 3), size, torch.float64)
    ours, leaf = PAIRS[name][0], student.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda s: 2 * ours(s, teacher), (leaf,))


def test_gradcheck_of_hcl_and_of_the_variance() -> None:
    student, teacher = pair((2, 2, 6, 5), (6, 5), torch.float64)
    leaf = student.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda s: losses.hcl_loss(s, teacher), (leaf,))
    variance = (torch.rand(2, dtype=torch.float64) + 0.3).requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda s, v: losses.vid_loss(s, teacher, variance=v), (leaf, variance)
    )


@pytest.mark.parametrize("name", [*PAIRS, "hcl"])
def test_layouts(name: str) -> None:
    ours = losses.hcl_loss if name == "hcl" else PAIRS[name][0]
    student, teacher = pair((4, 3, 6, 6), (6, 6), torch.float32)
    expected, slope = gradient(ours, student, teacher)
    hole = torch.full((8, 3, 6, 6, 2), torch.nan)
    hole[::2, ..., 0] = student
    for s, t in (
        (hole[::2, ..., 0], teacher.transpose(2, 3).clone().transpose(2, 3)),
        (student.contiguous(memory_format=torch.channels_last), teacher),
    ):
        leaf = s.requires_grad_(True)
        found = ours(leaf, t)
        (grad,) = torch.autograd.grad(3 * found, leaf)
        assert not s.is_contiguous()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(grad, slope)
    same = student[:1].expand(4, -1, -1, -1)
    torch.testing.assert_close(
        gradient(ours, same, teacher)[1], gradient(ours, same.contiguous(), teacher)[1]
    )


# The list that every loss is tried on: as vectors of channels, or as one row of positions.
LISTED = [(1, 1), (3, 2), (7, 33), (128, 100), (41, 1271), (256, 1000), (16, 32000)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LISTED, ids=str)
@pytest.mark.parametrize("name", ["fitnet", "vid", "at", "hcl"])
def test_listed_shapes(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if name == "at":
        check(*PAIRS[name], *pair((shape[0], 2, 1, shape[1]), (1, shape[1]), dtype, channels=3))
    elif name == "hcl":
        check(losses.hcl_loss, lambda s, t: hcl([s], [t]), *pair(shape, (), dtype))
    else:
        check(*PAIRS[name], *pair(shape, (), dtype))


# Powers of two: what does not depend on the size is the same to the last bit.
@pytest.mark.parametrize("power", [-73, -50, 40, 63, 100], ids=str)  # 1e-22 to 1e30
@pytest.mark.parametrize("name", [name for name in PAIRS if name.startswith("at")])
def test_attention_of_features_of_any_size(name: str, power: int) -> None:
    ours, formula = PAIRS[name]
    student, teacher = pair((3, 4, 5, 5), (4, 4), torch.float32)
    true, slope = gradient(formula, student.double(), teacher.double())
    eager, eager_slope = gradient(formula, student, teacher)
    one = torch.ones(3, 1, 1, 1)
    one[1] = 2.0**power
    for s, t in ((2.0**power, 1.0), (1.0, 2.0**power), (one, 1.0), (2.0**power, one)):
        value, grad = gradient(ours, s * student, t * teacher)
        assert abs(value - true) <= abs(eager - true) + 1e-6
        limit = (eager_slope - slope).norm() + 1e-6 * slope.norm()
        assert (grad * torch.as_tensor(s).double() - slope).norm() <= limit


@pytest.mark.parametrize("scale", [1e-22, 1e15], ids=str)
@pytest.mark.parametrize("name", ["fitnet", "vid", "hcl"])
def test_squared_errors_of_any_size(name: str, scale: float) -> None:
    """These losses grow with the square: their value may leave float32, their gradient does not."""
    ours, formula = (losses.hcl_loss, lambda s, t: hcl([s], [t])) if name == "hcl" else PAIRS[name]
    student, teacher = (scale * x for x in pair((3, 4, 6, 6), (6, 6), torch.float32))
    _, grad = gradient(ours, student, teacher)
    _, slope = gradient(formula, student.double(), teacher.double())
    assert (grad - slope).norm() <= 1e-6 * slope.norm()


@pytest.mark.parametrize("name", [*PAIRS, "hcl"])
def test_vmap(name: str) -> None:
    """Of a stack of batches: the same as one after the other, with gradients or without."""
    ours = losses.hcl_loss if name == "hcl" else PAIRS[name][0]
    batches = [pair((3, 4, 6, 6), (6, 6), torch.float32) for _ in range(2)]
    students, teachers = (torch.stack(side) for side in zip(*batches, strict=True))
    values, slopes = zip(*(gradient(ours, s, t) for s, t in batches), strict=True)
    expected, slope = torch.stack(values), torch.stack(slopes)
    torch.testing.assert_close(torch.func.vmap(ours)(students, teachers), expected)
    found = torch.func.vmap(torch.func.grad(lambda s, t: 3 * ours(s, t)))(students, teachers)
    torch.testing.assert_close(found, slope)
    leaf = students.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(3 * torch.func.vmap(ours)(leaf, teachers).sum(), leaf)
    torch.testing.assert_close(found, slope)
    found = torch.func.vmap(torch.func.grad(ours), in_dims=(0, None))(students, teachers[0])
    torch.testing.assert_close(3 * found[0], slope[0])
    found = torch.func.vmap(torch.func.grad(ours), in_dims=(None, 0))(students[0], teachers)
    torch.testing.assert_close(3 * found[0], slope[0])


@pytest.mark.parametrize("name", [*PAIRS, "hcl"])
def test_autocast_and_checkpoints(name: str) -> None:
    ours = losses.hcl_loss if name == "hcl" else PAIRS[name][0]
    student, teacher = pair((3, 4, 6, 6), (6, 6), torch.float32)
    expected, slope = gradient(ours, student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, grad = gradient(ours, student, teacher)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(grad, slope, rtol=0, atol=0)

    def kept(s: Tensor, t: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(ours, s, t, use_reentrant=False)

    found, grad = gradient(kept, student, teacher)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(grad, slope, rtol=0, atol=0)


def test_at_of_nothing() -> None:
    """Samples without activation have no direction: Q = 0, and no gradient of 1e12."""
    student, teacher = pair((3, 4, 5, 5), (5, 5), torch.float32)
    student[1], teacher[2] = 0, 0
    for p in (1, 2, 3):
        value, grad = gradient(lambda s, t, p=p: losses.at_loss(s, t, p=p), student, teacher)
        assert value.isfinite()
        assert grad.isfinite().all()
        assert not grad[1].any()
        assert grad[0].any()


def test_nothing_is_written_and_nothing_kept_without_gradient() -> None:
    student, teacher = pair((3, 4, 5, 5), (5, 5), torch.float32)
    before = student.clone(), teacher.clone()
    for name, (ours, _) in [*PAIRS.items(), ("hcl", (losses.hcl_loss, fitnet))]:
        gradient(ours, student, teacher)
        assert not ours(student, teacher).requires_grad, name
        with torch.no_grad():
            assert not ours(student.clone().requires_grad_(True), teacher).requires_grad
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["fitnet", "vid", "at"])
def test_no_temporary_of_a_features_size(name: str, dtype: torch.dtype) -> None:
    """The peak is the gradient that is returned, and blocks that fit a cache."""
    student, teacher = pair((64, 64, 32, 32), (32, 32), dtype)
    size = student.numel() * student.element_size()
    leaf = student.requires_grad_(True)
    assert oracles.peak_bytes(lambda: PAIRS[name][0](leaf, teacher)) < 0.6 * size
    assert oracles.peak_bytes(lambda: PAIRS[name][0](leaf, teacher).backward()) < 1.7 * size


@pytest.mark.parametrize("name", [*PAIRS, "hcl"])
def test_torch_func_grad(name: str) -> None:
    student, teacher = pair((3, 4, 5, 5), (5, 5), torch.float32)
    ours = losses.hcl_loss if name == "hcl" else PAIRS[name][0]
    found, value = torch.func.grad_and_value(lambda s: 3 * ours(s, teacher))(student)
    expected, slope = gradient(ours, student, teacher)
    torch.testing.assert_close(value, 3 * expected)
    torch.testing.assert_close(found, slope)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo's own, of autograd.Function
@pytest.mark.parametrize("name", ["fitnet", "vid", "at", "hcl"])
def test_compiles_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    student, teacher = pair((3, 4, 6, 6), (6, 6), torch.bfloat16)
    ours = losses.hcl_loss if name == "hcl" else PAIRS[name][0]
    compiled = torch.compile(
        lambda s, t: ours(s.tanh(), t), fullgraph=True, backend="aot_eager", dynamic=False
    )
    found, slope = gradient(compiled, student, teacher)
    expected, expected_slope = gradient(lambda s, t: ours(s.tanh(), t), student, teacher)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(slope, expected_slope)


# --- modules


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "size"), [((3, 5), ()), ((2, 5, 4, 4), (4, 4)), ((2, 5, 6, 6), (3, 3))], ids=str
)
def test_fitnet_module_is_a_regressor_before_the_loss(
    dtype: torch.dtype, shape: tuple[int, ...], size: tuple[int, ...]
) -> None:
    criterion = losses.FitNetLoss(5, 7).to(dtype)
    (weight, bias) = (x.detach().double() for x in criterion.parameters())
    assert weight.shape == (7, 5, 1, 1)
    student, teacher = pair(shape, size, dtype, channels=7)

    def formula(s: Tensor, t: Tensor) -> Tensor:
        mapped = torch.einsum("oc,nc...->no...", weight.flatten(1).to(s.dtype), s)
        mapped = mapped + bias.to(s.dtype).view(-1, *[1] * (s.dim() - 2))
        return fitnet(mapped, t)  # pooled after the regressor: it is the same

    value, grad = gradient(criterion, student, teacher)
    true, slope = gradient(formula, student.double(), teacher.double())
    # The convolution rounds to the dtype of its weights, as every layer of the model does.
    tolerance = 4 * torch.finfo(dtype).eps
    assert value.item() == pytest.approx(true.item(), rel=tolerance)
    assert (grad.double() - slope).norm() <= tolerance * slope.norm()


@pytest.mark.parametrize("shape", [(4, 5, 3, 3), (4, 5), (4, 5, 6), (2, 5, 2, 3, 2)], ids=str)
def test_vid_module(shape: tuple[int, ...]) -> None:
    criterion = losses.VIDLoss(5, 7, mid_channels=6, initial_variance=2.5).double()
    assert torch.allclose(criterion.variance(), torch.tensor(2.5, dtype=torch.float64))
    names = [tuple(p.shape) for p in criterion.regressor.parameters()]
    assert names == [(6, 5, 1, 1), (6, 6, 1, 1), (7, 6, 1, 1)]
    student, teacher = pair(shape, shape[2:], torch.float64, channels=7)
    with torch.no_grad():
        criterion.rho += torch.randn(7, dtype=torch.float64)

    def formula(s: Tensor, t: Tensor) -> Tensor:
        for index, weight in enumerate(criterion.regressor.parameters()):
            s = torch.einsum("oc,nc...->no...", weight.flatten(1), F.relu(s) if index else s)
        return vid_of(torch.log(1 + criterion.rho.exp()) + 1e-5)(s, t)

    check(criterion, formula, student, teacher)
    grads = []
    for loss in (criterion, formula):
        criterion.zero_grad()
        loss(student, teacher).backward()
        grads.append([p.grad.clone() for p in criterion.parameters() if p.grad is not None])
    assert len(grads[0]) == 4
    for found, true in zip(*grads, strict=True):
        torch.testing.assert_close(found, true)


@pytest.mark.parametrize("make", ["fitnet", "vid", "review"])
def test_modules_take_features_of_less_precision(make: str) -> None:
    """In the dtype of the parameters, as if the features had come in it."""
    listed = make == "review"
    criterion: Any = {
        "fitnet": lambda: losses.FitNetLoss(4, 6),
        "vid": lambda: losses.VIDLoss(4, 6),
        "review": lambda: losses.ReviewKDLoss([4], [6]),
    }[make]()
    student, teacher = pair((3, 4, 5, 5), (5, 5), torch.bfloat16, channels=6)
    teacher = teacher.float()

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return criterion([s], [t]) if listed else criterion(s, t)

    value, grad = gradient(loss, student, teacher)
    expected, slope = gradient(loss, student.float(), teacher)
    assert torch.equal(value, expected)
    assert torch.equal(grad, slope.bfloat16())
    with pytest.raises(TypeError, match=r"at most the precision .*got torch.float64"):
        loss(student.double(), teacher)


def test_vid_module_defaults() -> None:
    criterion = losses.VIDLoss(5, 7)
    assert [m.out_channels for m in criterion.regressor if isinstance(m, nn.Conv2d)] == [7, 7, 7]
    assert criterion.variance().tolist() == pytest.approx([5.0] * 7, rel=1e-6)
    assert torch.isfinite(losses.VIDLoss(1, 1, initial_variance=1e4).rho).all()


def test_vid_learns_the_mean_and_the_noise() -> None:
    """The variance that minimises the loss is the mean squared error."""
    student, teacher = pair((64, 3, 2, 2), (2, 2), torch.float64)
    rho = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([rho], max_iter=50)

    def step() -> Tensor:
        optimiser.zero_grad()
        loss = losses.vid_loss(student, teacher, variance=rho.exp())
        loss.backward()
        return loss

    optimiser.step(step)
    torch.testing.assert_close(
        rho.exp().detach(), (student - teacher).square().mean((0, 2, 3)), rtol=1e-4, atol=0
    )


def batch_normalized(x: Tensor) -> Tensor:
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


def nearest(x: Tensor, size: Sequence[int]) -> Tensor:
    rows = [i * x.shape[2] // size[0] for i in range(size[0])]
    cols = [i * x.shape[3] // size[1] for i in range(size[1])]
    return x[:, :, rows][:, :, :, cols]


def reviewed(
    criterion: losses.ReviewKDLoss, students: Sequence[Tensor], teachers: Sequence[Tensor]
) -> Tensor:
    residual, outs = None, []
    for fusion, s, t in reversed(list(zip(criterion.fusions, students, teachers, strict=True))):
        s, t = (x[:, :, None, None] if x.dim() == 2 else x for x in (s, t))
        x = batch_normalized(F.conv2d(s, fusion.reduce[0].weight))
        if residual is not None:
            r = nearest(residual, x.shape[2:])
            z = F.conv2d(torch.cat([x, r], 1), fusion.attention.weight, fusion.attention.bias)
            w = 1 / (1 + (-z).exp())
            x = x * w[:, 0, None] + r * w[:, 1, None]
        x = nearest(x, t.shape[2:])
        outs.append(batch_normalized(F.conv2d(x, fusion.expand[0].weight, padding=1)))
        residual = x
    targets = [x[:, :, None, None] if x.dim() == 2 else x for x in teachers]
    return hcl(outs[::-1], targets)


@pytest.mark.parametrize(
    ("students", "teachers"),
    [
        ([(4, 8, 8), (6, 4, 4), (6,)], [(5, 8, 8), (7, 4, 4), (9,)]),
        (
            [(4, 9, 6), (6, 5, 3), (8, 2, 2), (8, 1, 1)],
            [(5, 8, 8), (7, 5, 3), (6, 4, 4), (9, 1, 1)],
        ),
        ([(3, 5, 5)], [(2, 7, 7)]),
    ],
    ids=["three stages", "other sizes", "one stage"],
)
def test_reviewkd_matches_the_formula(
    students: list[tuple[int, ...]], teachers: list[tuple[int, ...]]
) -> None:
    criterion = losses.ReviewKDLoss([s[0] for s in students], [t[0] for t in teachers]).double()
    leaves = [torch.randn(6, *s, dtype=torch.float64, requires_grad=True) for s in students]
    targets = [torch.randn(6, *t, dtype=torch.float64) for t in teachers]
    weights = [w for w in criterion.parameters() if w.dim() == 4]
    assert criterion.fusions[-1].attention is None
    assert len(weights) == 3 * len(students) - 1
    found, true = criterion(leaves, targets), reviewed(criterion, leaves, targets)
    torch.testing.assert_close(found, true, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(found, [*leaves, *weights]),
        torch.autograd.grad(true, [*leaves, *weights]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_reviewkd_widths() -> None:
    assert losses.ReviewKDLoss([8, 1024], [4, 4]).fusions[0].reduce[0].out_channels == 512
    assert losses.ReviewKDLoss([8, 16], [4, 4]).fusions[0].reduce[0].out_channels == 16
    made = losses.ReviewKDLoss([8, 16], [4, 4], mid_channels=3)
    assert made.fusions[1].expand[0].in_channels == 3
    torch.manual_seed(0)
    weight = review.ABF(64, 32, 16, fuse=True).reduce[0].weight
    bound = math.sqrt(3 / 64)  # kaiming_uniform with a = 1
    assert 0.9 * bound < weight.abs().max() <= bound


def test_modules_are_the_functions() -> None:
    student, teacher = pair((3, 4, 5, 5), (5, 5), torch.float32)
    for options in ({}, {"p": 1.0}):
        module = losses.ATLoss(**options)
        expected = losses.at_loss(student, teacher, **options)
        assert module(student, teacher).item() == expected.item()
        assert f"p={options.get('p', 2.0)}" in repr(module)
    assert "4, 7" in repr(losses.FitNetLoss(4, 7))
    shown = repr(losses.VIDLoss(4, 7, initial_variance=2.0))
    assert "4, 7, mid_channels=7, initial_variance=2.0, eps=1e-05" in shown
    assert "[4, 8], [5, 6], mid_channels=8" in repr(losses.ReviewKDLoss([4, 8], [5, 6]))


def test_modules_train_and_travel() -> None:
    """Parameters are registered, follow dtypes and come back from a state dict."""
    student, teacher = pair((8, 4, 5, 5), (5, 5), torch.float32, channels=6)
    for make in (
        lambda: losses.FitNetLoss(4, 6),
        lambda: losses.VIDLoss(4, 6),
        lambda: losses.ReviewKDLoss([4], [6]),
    ):
        criterion = make()
        listed = isinstance(criterion, losses.ReviewKDLoss)
        arguments: Any = ([student], [teacher]) if listed else (student, teacher)
        optimiser = torch.optim.Adam(criterion.parameters(), lr=0.05)
        first = criterion(*arguments)
        for _ in range(10):
            optimiser.zero_grad()
            loss = criterion(*arguments)
            loss.backward()
            optimiser.step()
        assert criterion(*arguments).item() < first.item()
        other = make()
        other.load_state_dict(criterion.state_dict())
        assert other(*arguments).item() == criterion(*arguments).item()


# --- wrong input

S, T = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "fitnet": losses.fitnet_loss,
    "at": losses.at_loss,
    "vid": lambda s, t: losses.vid_loss(s, t, variance=torch.ones(3)),
    "hcl": losses.hcl_loss,
    "FitNetLoss": losses.FitNetLoss(3, 3),
    "VIDLoss": losses.VIDLoss(3, 3),
}


def wrong() -> Iterator[tuple[str, Callable[[], Any], type[Exception], str]]:
    for name, loss in FUNCTIONS.items():
        list_too = " or a list of them" if name == "hcl" else ""
        for case, arguments, kind, text in (
            (
                "no tensor",
                (S, None),
                TypeError,
                f"teacher_features: expected a Tensor{list_too}, got NoneType",
            ),
            (
                "integers",
                (S.int(), T),
                TypeError,
                "student_features: expected a floating-point dtype, got torch.int32",
            ),
            (
                "vector",
                (S, T[0, 0, 0]),
                ValueError,
                r"teacher_features: expected \[n, ...\] with at least one value a row, got shape",
            ),
            (
                "empty",
                (S[:0], T[:0]),
                ValueError,
                r"student_features: expected \[n, ...\] with at least one value a row, got shape",
            ),
            (
                "rows",
                (S, T[:1]),
                ValueError,
                r"teacher_features: expected 2 rows as in student_features \[2, 3, 4, 4\], got 1",
            ),
            (
                "teacher with gradient",
                (S, T.clone().requires_grad_(True)),
                ValueError,
                r"teacher_features: expected a tensor without .*teacher_features.detach\(\)",
            ),
        ):
            yield f"{name} {case}", lambda loss=loss, a=arguments: loss(*a), kind, text
    dimensions = r"teacher_features: expected 4 dimensions as in student_features \[2, 3, 4, 4\]"
    channels = "teacher_features: expected 3 channels, the second dimension, got 2"
    for name in ("fitnet", "vid", "FitNetLoss", "VIDLoss"):
        loss = FUNCTIONS[name]
        yield f"{name} dimensions", lambda loss=loss: loss(S, T[:, :, 0]), ValueError, dimensions
        yield f"{name} channels", lambda loss=loss: loss(S, T[:, :2]), ValueError, channels
    review = losses.ReviewKDLoss([3, 5], [4, 6])
    vectors = torch.zeros(2, 5), torch.zeros(2, 6)
    four = torch.zeros(2, 4, 4, 4)
    for case, call, kind, text in (
        ("at dimensions", lambda: losses.at_loss(S, T[:, :, 0]), ValueError, dimensions),
        (
            "at vectors",
            lambda: losses.at_loss(S[:, :, 0, 0], T[:, :, 0, 0]),
            ValueError,
            r"student_features: expected \[n, channels, ...\] with spatial dimensions, got shape",
        ),
        (
            "at p",
            lambda: losses.at_loss(S, T, p=0.5),
            ValueError,
            "p: expected a finite number of at least 1, got 0.5",
        ),
        (
            "four spatial dimensions",
            lambda: losses.fitnet_loss(
                torch.zeros(1, 1, 2, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2, 3)
            ),
            ValueError,
            "expected one to three spatial dimensions where they differ in size, got 4",
        ),
        (
            "vid variance",
            lambda: losses.vid_loss(S, T, variance=torch.ones(4)),
            ValueError,
            r"variance: expected one value per channel, \[3\], got shape \[4\]",
        ),
        (
            "vid variance of 0",
            lambda: losses.vid_loss(S, T, variance=torch.tensor([1.0, 0.0, 2.0])),
            ValueError,
            "variance: expected values above 0, got 0.0",
        ),
        (
            "vid variance below 0",
            lambda: losses.vid_loss(S, T, variance=torch.tensor([1.0, -0.5, 2.0])),
            ValueError,
            "variance: expected values above 0, got -0.5",
        ),
        (
            "ATLoss p",
            lambda: losses.ATLoss(p=0.5),
            ValueError,
            "p: expected a finite number of at least 1, got 0.5",
        ),
        (
            "ATLoss p type",
            lambda: losses.ATLoss(p="2"),  # type: ignore[arg-type]
            TypeError,
            "p: expected a number, got str",
        ),
        (
            "vid variance type",
            lambda: losses.vid_loss(S, T, variance=1.0),  # type: ignore[arg-type]
            TypeError,
            "variance: expected a Tensor, got float",
        ),
        (
            "hcl shape",
            lambda: losses.hcl_loss(S, T[..., :3]),
            ValueError,
            r"teacher_features: expected the shape of student_features \[2, 3, 4, 4\], got",
        ),
        (
            "hcl dimensions",
            lambda: losses.hcl_loss(S[0], T[0]),
            ValueError,
            r"student_features: expected \[n, channels\] or \[n, channels, height, width\], got",
        ),
        (
            "hcl lengths",
            lambda: losses.hcl_loss([S], [T, T]),
            ValueError,
            "teacher_features: expected as many layers as student_features and at least one, got 2"
            " and 1",
        ),
        (
            "hcl second",
            lambda: losses.hcl_loss([S, S], [T, T[:1]]),
            ValueError,
            r"teacher_features\[1\]: expected 2 rows as in student_features\[1\]",
        ),
        (
            "FitNetLoss student channels",
            lambda: losses.FitNetLoss(5, 3)(S, T),
            ValueError,
            "student_features: expected 5 channels, the second dimension, got 3",
        ),
        (
            "FitNetLoss channels",
            lambda: losses.FitNetLoss(0, 3),
            ValueError,
            "student_channels: expected at least 1, got 0",
        ),
        (
            "VIDLoss channels",
            lambda: losses.VIDLoss(2, 3, mid_channels=2.5),  # type: ignore[arg-type]
            TypeError,
            "mid_channels: expected an int, got float",
        ),
        (
            "VIDLoss eps",
            lambda: losses.VIDLoss(2, 3, eps=0),
            ValueError,
            "eps: expected a finite number above 0, got 0",
        ),
        (
            "VIDLoss variance",
            lambda: losses.VIDLoss(2, 3, initial_variance=1e-6),
            ValueError,
            "initial_variance: expected a finite number above eps, 1e-05, got 1e-06",
        ),
        (
            "ReviewKDLoss lengths",
            lambda: losses.ReviewKDLoss([3], [4, 6]),
            ValueError,
            "teacher_channels: expected as many stages as student_channels and at least one, got 2"
            " and 1",
        ),
        (
            "ReviewKDLoss channels",
            lambda: losses.ReviewKDLoss([3, 5], [4, 0]),
            ValueError,
            "teacher_channels: expected at least 1, got 0",
        ),
        (
            "ReviewKDLoss stages",
            lambda: review([S], [four]),
            ValueError,
            "student_features: expected 2 stages, got 1",
        ),
        (
            "ReviewKDLoss stage channels",
            lambda: review([S, vectors[0]], [S, vectors[1]]),
            ValueError,
            r"teacher_features\[0\]: expected 4 channels, the second dimension, got 3",
        ),
        (
            "ReviewKDLoss dimensions",
            lambda: review([S, vectors[0][..., None]], [four, vectors[1]]),
            ValueError,
            r"student_features\[1\]: expected \[n, channels\] or \[n, channels, height, width\]",
        ),
        (
            "ReviewKDLoss teacher with gradient",
            lambda: review([S, vectors[0]], [four, vectors[1].clone().requires_grad_(True)]),
            ValueError,
            r"teacher_features\[1\]: expected a tensor without gradient",
        ),
    ):
        yield case, call, kind, text


WRONG = {name: rest for name, *rest in wrong()}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name: str) -> None:
    call, kind, text = WRONG[name]
    with pytest.raises(kind, match=text):
        call()
