"""The losses on relations against the papers' formulas in float64, pairs and triples broadcast."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from benchmarks import relations as benchmark
from fastxkd import losses
from fastxkd.losses import comparative
from fastxkd.ops import rkd as operator
from tests import oracles

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# samples, the student's shape of one, the teacher's
SHAPES: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = [
    (4, (1,), (3,)),
    (5, (3,), (7,)),
    (17, (2, 3, 5), (11,)),
    (33, (64,), (64,)),
]
PICKS = 50
Loss = Callable[[Tensor, Tensor], Tensor]


# --- the formulas, in the dtype of the input


def normalized(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    grams = [normalized(x.flatten(1) @ x.flatten(1).T) for x in (student, teacher)]
    return (grams[0] - grams[1]).square().sum() / len(student) ** 2


def cc(
    student: Tensor, teacher: Tensor, kernel: str = "gaussian", gamma: float = 0.4, order: int = 2
) -> Tensor:
    kernels = []
    for x in (student.flatten(1), teacher.flatten(1)):
        if kernel == "bilinear":
            kernels.append(x @ x.T)
        else:
            cosine = normalized(x) @ normalized(x).T
            terms = [(2 * gamma) ** p / math.factorial(p) * cosine**p for p in range(order + 1)]
            kernels.append(math.exp(-2 * gamma) * sum(terms))
    return (kernels[0] - kernels[1]).square().sum() / len(student) ** 2


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    rows = []
    for x in (student.flatten(1), teacher.flatten(1)):
        kernel = (normalized(x) @ normalized(x).T + 1) / 2
        rows.append(kernel / kernel.sum(1, keepdim=True))
    s, t = rows
    return (t * torch.log((t + 1e-7) / (s + 1e-7))).mean()


def pkt_terms(student: Tensor, teacher: Tensor) -> float:
    """What cancels in a gradient: 3 / n^2 p_t / (p_s + 1e-7), through a cosine and a length."""
    kernels = [(normalized(x) @ normalized(x).T + 1) / 2 for x in (student, teacher)]
    s, t = (k / k.sum(1, keepdim=True) for k in kernels)
    ratio = (t / (s + 1e-7)).max() / (2 * kernels[0].sum(1).min())
    return (3 * ratio / len(student) ** 2 / student.norm(dim=1).min()).item()


def differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """``e[j, i] = x_i - x_j`` and its length, of which equal samples have none and no gradient."""
    x = x.flatten(1)
    e = x[None, :, :] - x[:, None, :]
    square = e.square().sum(2)
    apart = square > 0
    return e, torch.where(apart, square.where(apart, 1.0).sqrt(), 0.0)


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    scaled = []
    for x in (student, teacher):
        n = len(x)
        d = differences(x)[1].clamp_min(1e-6) * (1 - torch.eye(n, dtype=x.dtype))
        scaled.append(d / (d.sum() / (n * (n - 1))))
    return F.smooth_l1_loss(*scaled)


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    cosines = []
    for x in (student, teacher):
        e, length = differences(x)
        unit = e * torch.where(length > 0, 1 / length.where(length > 0, 1.0), 0.0)[:, :, None]
        cosines.append(torch.einsum("jid,jkd->jik", unit, unit))
    return F.smooth_l1_loss(*cosines)


def rkd(student: Tensor, teacher: Tensor) -> Tensor:
    return 25 * rkd_distance(student, teacher) + 50 * rkd_angle(student, teacher)


def dc(student: Tensor, teacher: Tensor) -> Tensor:
    rows = [normalized(x.flatten(1)) for x in (student, teacher)]
    return 1 - oracles.correlation(*rows, unbiased=False)


def dc_plain(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - oracles.correlation(student, teacher, unbiased=False)


class CKD:
    """Ours and the formula see the same draw: one seeded generator for each call."""

    def __init__(self, n: int, labels: Tensor | None = None, **options: Any) -> None:
        self.labels, self.options = labels, {"temperature": 4.0, **options}
        self.positives = self.options.get("positives", 2)
        self.size = self.positives + self.options.get("negatives", 1)
        self.picks = comparative._picks(n, PICKS, self.size, self.draw(), torch.device("cpu"))

    def draw(self) -> torch.Generator:
        return torch.Generator().manual_seed(5)

    def ours(self, student: Tensor, teacher: Tensor) -> Tensor:
        return losses.ckd_loss(
            student,
            teacher,
            self.labels,
            relations=PICKS,
            generator=self.draw(),
            **self.options,
        )

    def formula(self, student: Tensor, teacher: Tensor) -> Tensor:
        one_hot = None
        if self.labels is not None:
            one_hot = torch.eye(student.shape[1], dtype=student.dtype)[self.labels]
        t, total = self.options["temperature"], student.new_zeros(())
        for row in self.picks.tolist():
            p, n = row[: self.positives], row[self.positives :]
            log_q = F.log_softmax((student[p].mean(0) - student[n].mean(0)) / t, 0)
            for target in (teacher, one_hot):
                if target is not None:
                    log_p = F.log_softmax((target[p].mean(0) - target[n].mean(0)) / t, 0)
                    total = total + t * t * (log_p.exp() * (log_p - log_q)).sum()
        return total / len(self.picks)


PAIRS: dict[str, tuple[Loss, Loss]] = {
    "sp": (losses.sp_loss, sp),
    "cc": (losses.cc_loss, cc),
    "cc bilinear": (
        lambda s, t: losses.cc_loss(s, t, kernel="bilinear"),
        lambda s, t: cc(s, t, "bilinear"),
    ),
    "cc order 5": (
        lambda s, t: losses.cc_loss(s, t, gamma=0.9, order=5),
        lambda s, t: cc(s, t, gamma=0.9, order=5),
    ),
    "cc order 1": (
        lambda s, t: losses.cc_loss(s, t, order=1),
        lambda s, t: cc(s, t, order=1),
    ),
    "pkt": (losses.pkt_loss, pkt),
    "rkd": (losses.rkd_loss, rkd),
    "rkd distance": (
        lambda s, t: losses.rkd_loss(s, t, distance_weight=1, angle_weight=0),
        rkd_distance,
    ),
    "rkd angle": (
        lambda s, t: losses.rkd_loss(s, t, distance_weight=0, angle_weight=1),
        rkd_angle,
    ),
    "dc": (losses.dc_loss, dc),
    "dc plain": (lambda s, t: losses.dc_loss(s, t, normalize_rows=False), dc_plain),
}


def features(
    n: int, student: tuple[int, ...], teacher: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Of the same samples, so that there is something to lose and something to find."""
    common = torch.randn(n, 3, dtype=torch.float64)
    s, t = (
        common @ torch.randn(3, math.prod(shape), dtype=torch.float64)
        + torch.randn(n, math.prod(shape), dtype=torch.float64)
        for shape in (student, teacher)
    )
    # An offset: features come out of a ReLU, and are not centred.
    return (s + 0.5).view(n, *student).to(dtype), (t + 0.5).view(n, *teacher).to(dtype)


def gradient(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_(True)  # in the layout that it has
    value = loss(leaf, teacher)
    (grad,) = torch.autograd.grad(value, leaf, torch.full_like(value, 3.0))
    return value.detach(), grad


def check(
    ours: Loss,
    formula: Loss,
    student: Tensor,
    teacher: Tensor,
    *,
    eps: float = 1e-6,
    scale: float = 0,
    times: tuple[Tensor | float, Tensor | float] = (1, 1),
) -> None:
    """No worse than eager on the same numbers in the precision that sums are taken in.

    ``scale`` is the size of the terms of a gradient that is 0 or nearly so. ``times``: what both
    are multiplied with for ours and the truth, out of eager's reach, where its error would be that
    of the features as they are.
    """
    dtype = student.dtype
    exact = torch.float64 if torch.float64 in (dtype, teacher.dtype) else torch.float32
    eager, eager_slope = gradient(formula, student.to(exact), teacher.to(exact))
    true, slope = gradient(formula, student.double(), teacher.double())
    off = abs(eager.item() - true.item())
    off_slope = (eager_slope.double() - slope).norm() / slope.norm().clamp_min(1e-300)
    value, grad = gradient(ours, times[0] * student, times[1] * teacher)
    true, slope = gradient(formula, times[0] * student.double(), times[1] * teacher.double())
    assert value.dtype == exact
    assert value.shape == ()
    assert grad.dtype == dtype
    assert grad.shape == student.shape
    eps = eps if exact == torch.float32 else 1e-12
    assert abs(value.item() - true.item()) <= off + eps * max(1, true)
    limit = off_slope * slope.norm() + eps * max(slope.norm(), scale)
    if dtype != exact:
        limit += 1.2 * (slope.to(dtype).double() - slope).norm()
    assert (grad.double() - slope).norm() <= limit


# --- values and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_matches_the_formula(
    name: str, shape: tuple[int, tuple[int, ...], tuple[int, ...]], dtype: torch.dtype
) -> None:
    # The operator under distance correlation has this limit in its own tests.
    eps = 1e-5 if "dc" in name else 1e-6
    # With one number a sample all angles are 0 or 180 degrees, and gradients cancel to nothing. The
    # terms of pkt, which there divides by its 1e-7, are p / (2 n^2 1e-7 |x|).
    scale = 0 if shape[1] != (1,) else 1e6 if name == "pkt" else 1
    check(*PAIRS[name], *features(*shape, dtype), eps=eps, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"labels": True}, {"positives": 3, "negatives": 2, "temperature": 1.5}],
    ids=str,
)
def test_ckd_matches_the_formula(dtype: torch.dtype, options: dict[str, Any]) -> None:
    student, teacher = features(9, (6,), (6,), dtype)
    labels = torch.arange(9) % 6 if options.pop("labels", False) else None
    pair = CKD(9, labels, **options)
    check(pair.ours, pair.formula, 3 * student, 3 * teacher)


def test_ckd_takes_a_cache_of_another_dtype() -> None:
    student, teacher = features(9, (6,), (6,), torch.float32)
    pair = CKD(9)
    check(pair.ours, pair.formula, student, teacher.half())
    check(pair.ours, pair.formula, student.bfloat16(), teacher.double())


@pytest.mark.parametrize("name", PAIRS)
def test_mixed_dtypes(name: str) -> None:
    student, teacher = features(9, (5,), (4,), torch.float64)
    check(*PAIRS[name], student.float(), teacher)
    check(*PAIRS[name], student, teacher.bfloat16())


# Not ckd: kd_loss, which it ends in, hands its gradient out once, and gradcheck asks twice.
@pytest.mark.parametrize("name", PAIRS)
def test_gradcheck(name: str) -> None:
    student, teacher = features(6, (4,), (4,), torch.float64)
    ours = PAIRS[name][0]
    leaf = student.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda s: 2 * ours(s, teacher), (leaf,), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", [*PAIRS, "ckd"])
def test_layouts(name: str) -> None:
    student, teacher = features(12, (6,) if name == "ckd" else (4, 3, 2), (6,), torch.float32)
    pair = (CKD(12).ours, CKD(12).formula) if name == "ckd" else PAIRS[name]

    def strided(x: Tensor) -> Tensor:
        hole = torch.full((24, *x.shape[1:], 2), torch.nan)
        hole[::2, ..., 0] = x
        return hole[::2, ..., 0]

    variants = [(strided(student), strided(teacher))]
    if name != "ckd":
        last = student.contiguous(memory_format=torch.channels_last)
        variants.append((last, teacher.T.clone().T))
        # One feature map for several samples, and one value for all positions.
        variants.append((student[:6].repeat(2, 1, 1, 1), teacher[:, :1].expand(12, 6)))
        variants.append((student[:, :, :1].expand(12, 4, 3, 2), teacher))
    for s, t in variants:
        check(*pair, s, t, eps=1e-5 if "dc" in name else 1e-6)
    assert not any(s.is_contiguous() and t.is_contiguous() for s, t in variants)


def test_no_gradient_where_none_is_asked_for() -> None:
    student, teacher = features(9, (5,), (4,), torch.float32)
    for name, (ours, _) in PAIRS.items():
        value, _ = gradient(ours, student, teacher)
        assert not ours(student, teacher).requires_grad
        with torch.no_grad():
            found = ours(student.clone().requires_grad_(True), teacher)
        assert not found.requires_grad, name
        torch.testing.assert_close(found, value)
        before = student.clone()
        assert torch.equal(before, student)


def test_equal_relations_cost_nothing() -> None:
    student, _ = features(20, (6,), (1,), torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    for name, (ours, _) in PAIRS.items():
        if name != "cc bilinear":
            assert abs(ours(student, 3 * student @ turn).item()) < 1e-12, name
    shifted = student @ turn + 7  # distances do not see a shift
    assert losses.rkd_loss(student, shifted).item() < 1e-12
    assert abs(losses.dc_loss(student, shifted, normalize_rows=False).item()) < 1e-12


def test_smooth_l1_beyond_its_threshold() -> None:
    """Cosines that differ by more than 1, and scaled distances too: the loss is linear there."""
    line = torch.arange(6.0, dtype=torch.float64)
    student = torch.stack([line, 0 * line], 1)
    teacher = torch.stack([line.remainder(2), 3 * line.square().remainder(5)], 1)
    teacher[5] = 30
    student, teacher = (
        x + 0.1 * torch.randn(6, 2, dtype=torch.float64) for x in (student, teacher)
    )
    cosines = [(lambda u: u @ u.mT)(normalized_differences(x)) for x in (student, teacher)]
    assert (cosines[0] - cosines[1]).abs().max() > 1.5
    for name in ("rkd", "rkd distance", "rkd angle"):
        check(*PAIRS[name], student, teacher)
        check(*PAIRS[name], student.float(), teacher.float())


def normalized_differences(x: Tensor) -> Tensor:
    e, length = differences(x)
    return e / length.where(length > 0, 1.0)[:, :, None]


@pytest.mark.parametrize("angles", [1, 100, 5000])
def test_rkd_in_any_number_of_pieces(monkeypatch: pytest.MonkeyPatch, angles: int) -> None:
    monkeypatch.setattr(operator, "ANGLES", angles)
    check(losses.rkd_loss, rkd, *features(23, (5,), (4,), torch.float64))


def test_rkd_of_two_and_three_samples() -> None:
    for n in (2, 3):
        pair = features(n, (5,), (4,), torch.float64)
        check(*PAIRS["rkd distance"], *pair)
    check(losses.rkd_loss, rkd, *pair)


@pytest.mark.parametrize("name", ["rkd", "dc", "dc plain", "ckd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_every_backend(backend: str, name: str, dtype: torch.dtype) -> None:
    """Those that stand on operators with kernels of their own."""
    student, teacher = features(33, (40,), (40,), dtype)
    pair = (CKD(33).ours, CKD(33).formula) if name == "ckd" else PAIRS[name]
    check(*pair, student, teacher, eps=1e-5 if "dc" in name else 1e-6)
    if name == "rkd":
        check(*pair, student.repeat(2, 1) + 1e-3, teacher.repeat(2, 1).flip(0))


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6], ids=str)
def test_rkd_of_near_pairs_and_clusters(gap: float) -> None:
    """Sides of 1 and of 1e-6: the law of cosines in float32 has no digit of these angles."""
    common = torch.randn(6, 8).repeat_interleave(4, 0)
    student = common + gap * torch.randn(24, 8)
    teacher = torch.randn(24, 5)
    check(losses.rkd_loss, rkd, student, teacher)
    check(losses.rkd_loss, rkd, teacher, student)
    check(losses.rkd_loss, rkd, 1000 + student, teacher)


# --- sizes


# Powers of two: the truth at a scale is the truth at 1, to the last bit.
@pytest.mark.parametrize("power", [-73, -50, 40, 63], ids=str)  # 1e-22 to 1e19
@pytest.mark.parametrize("name", PAIRS)
def test_features_of_any_size(backend: str, name: str, power: int) -> None:
    """Squares that vanish or overflow in float32, in the student, the teacher and one sample."""
    ours, formula = PAIRS[name]
    if name == "cc bilinear":  # grows with the fourth power: only as far as float32 goes
        power //= 8
    if name.startswith("rkd") and power < 0:  # 1e-6 is the least distance, see below
        ours, formula = PAIRS["rkd angle"]
    student, teacher = features(9, (5,), (4,), torch.float32)
    one = torch.ones(9, 1)
    one[3] = 2.0**power
    for s, t in ((2.0**power, 1.0), (1.0, 2.0**power), (one, 1.0), (2.0**power, one)):
        lonely = ["sp"] * (power > 0) + ["rkd", "rkd angle", "rkd distance", "dc plain"]
        if (isinstance(s, Tensor) or isinstance(t, Tensor)) and name in lonely:
            continue  # of one sample far from all others, the gradient is what rounding leaves
        check(ours, formula, student, teacher, times=(s, t))


@pytest.mark.parametrize("name", PAIRS)
def test_the_size_of_all_features_does_not_matter(name: str) -> None:
    if name in ("cc bilinear", "rkd", "rkd distance"):
        return
    student, teacher = features(9, (5,), (4,), torch.float32)
    value, grad = gradient(PAIRS[name][0], student, teacher)
    found, slope = gradient(PAIRS[name][0], student * 2.0**-30, teacher * 2.0**100)
    torch.testing.assert_close(found, value, rtol=0, atol=0 if "dc" not in name else 1e-6)
    torch.testing.assert_close(slope * 2.0**-30, grad, rtol=1e-5, atol=1e-6)


def test_rkd_of_distances_below_the_least() -> None:
    """All students are then equally far apart: a constant, and the truth has no gradient either."""
    student, teacher = features(9, (5,), (4,), torch.float32)
    for scale in (1e-8, 1e-22):
        value, grad = gradient(PAIRS["rkd distance"][0], student * scale, teacher)
        true, slope = gradient(rkd_distance, student.double() * scale, teacher.double())
        assert value.item() == pytest.approx(true.item(), rel=1e-6)
        assert not grad.any()
        assert not slope.any()


@pytest.mark.parametrize("power", [10, 25, 40, 63, 100], ids=str)
def test_rkd_of_one_sample_far_from_all_others(power: int) -> None:
    """However far: cosines of the others keep what digits there are, and stay cosines."""
    student, teacher = features(9, (5,), (4,), torch.float32)
    student[3] *= 2.0**power
    value, grad = gradient(PAIRS["rkd angle"][0], student, teacher)
    true, _ = gradient(rkd_angle, student.double(), teacher.double())
    assert grad.isfinite().all()
    assert value <= 1.5
    if power <= 25:
        assert value.item() == pytest.approx(true.item(), abs=1e-6)


# The list that every loss is tried on; samples by width.
LISTED = [(3, 2), (7, 33), (128, 100), (41, 1271), (256, 1000), (16, 32000)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LISTED, ids=str)
@pytest.mark.parametrize("name", ["sp", "cc", "pkt", "rkd", "dc", "ckd"])
def test_listed_shapes(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    n, width = shape
    ours, formula = (CKD(n).ours, CKD(n).formula) if name == "ckd" else PAIRS[name]
    if name == "dc" and n < 4:
        return
    if n == 256 and name in ("rkd", "dc"):
        if dtype != torch.bfloat16:
            return  # the formula broadcasts [n, n, width]; one dtype, and a part of the width
        width = 100
    if width == 32000 and name == "rkd" and dtype in (torch.float16, torch.float64):
        return  # seconds each
    student, teacher = features(n, (width,), (width,), dtype)
    terms = pkt_terms(student.double(), teacher.double()) if name == "pkt" else 0
    check(ours, formula, student, teacher, eps=1e-5 if name == "dc" else 1e-6, scale=terms)


# --- what has no direction


@pytest.mark.parametrize("name", [*PAIRS, "ckd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_samples_and_zeros(name: str, dtype: torch.dtype) -> None:
    student, teacher = features(8, (5,), (5,), dtype)
    ours = CKD(8).ours if name == "ckd" else PAIRS[name][0]
    formula = CKD(8).formula if name == "ckd" else PAIRS[name][1]
    twins = student.clone()
    twins[3] = twins[6] = twins[1]
    other = teacher.clone()
    other[2] = other[5]
    if dtype == torch.float64 and "dc" not in name:
        check(ours, formula, twins, other)
    zeros = student.clone()
    zeros[4] = 0
    for s in (twins, zeros, torch.zeros_like(student), torch.ones_like(student)):
        for t in (teacher, other, torch.zeros_like(teacher)):
            value, grad = gradient(ours, s, t)
            assert value.isfinite()
            assert grad.isfinite().all()
            assert grad.abs().max() < 1e4


def test_a_constant_layer_tells_nothing() -> None:
    _, teacher = features(8, (5,), (5,), torch.float32)
    value, grad = gradient(losses.dc_loss, torch.ones(8, 3), teacher)
    assert value.item() == 1
    assert not grad.any()


# --- options


def test_dc_of_layers_is_their_mean() -> None:
    pairs = [features(9, (s,), (t,), torch.float64) for s, t in ((5, 4), (2, 2), (1, 7))]
    found = losses.dc_loss([s for s, _ in pairs], tuple(t for _, t in pairs))
    expected = sum(dc(s, t) for s, t in pairs) / 3
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    single = losses.dc_loss([pairs[0][0].float()], [pairs[0][1]])
    assert single.dtype == torch.float64


def test_picks_are_different_and_fair() -> None:
    draw = torch.Generator().manual_seed(1)
    picks = comparative._picks(5, 60_000, 3, draw, torch.device("cpu"))
    assert picks.min() == 0
    assert picks.max() == 4
    assert (picks.sort(1).values.diff(dim=1) > 0).all()
    number = (picks * torch.tensor([25, 5, 1])).sum(1)
    counts = number.bincount(minlength=125)
    assert (counts > 0).sum() == 5 * 4 * 3  # every ordered triple of different samples, no other
    seen = counts[counts > 0].double() / len(picks)
    assert (seen * 60 - 1).abs().max() < 0.15


def test_ckd_draws_are_reproducible() -> None:
    student, teacher = features(9, (6,), (6,), torch.float32)
    draws = [torch.Generator().manual_seed(seed) for seed in (3, 3, 4)]
    a, b, c = (losses.ckd_loss(student, teacher, generator=draw).item() for draw in draws)
    assert a == b != c
    module = losses.CKDLoss(relations=7, generator=torch.Generator().manual_seed(3))
    value = module(student, teacher).item()
    assert value != module(student, teacher).item()
    torch.manual_seed(11)
    first = losses.ckd_loss(student, teacher).item()
    torch.manual_seed(11)
    assert losses.ckd_loss(student, teacher).item() == first


def test_modules_are_the_functions() -> None:
    student, teacher = features(9, (6,), (6,), torch.float32)
    for module, expected in (
        (losses.SPLoss(), losses.sp_loss(student, teacher)),
        (losses.CCLoss(), losses.cc_loss(student, teacher)),
        (
            losses.CCLoss(kernel="bilinear", gamma=1.0, order=3),
            losses.cc_loss(student, teacher, kernel="bilinear"),
        ),
        (losses.CCLoss(gamma=1.0, order=3), losses.cc_loss(student, teacher, gamma=1.0, order=3)),
        (losses.PKTLoss(), losses.pkt_loss(student, teacher)),
        (losses.RKDLoss(), losses.rkd_loss(student, teacher)),
        (
            losses.RKDLoss(distance_weight=2, angle_weight=3),
            losses.rkd_loss(student, teacher, distance_weight=2, angle_weight=3),
        ),
        (losses.DCLoss(), losses.dc_loss(student, teacher)),
        (
            losses.DCLoss(normalize_rows=False),
            losses.dc_loss(student, teacher, normalize_rows=False),
        ),
    ):
        assert module(student, teacher).item() == expected.item()
        assert list(module.parameters()) == []
        assert type(module).__name__ in repr(module)
    labels = torch.arange(9) % 6
    options = {"relations": 4, "positives": 1, "negatives": 3, "temperature": 2.0}
    made = losses.CKDLoss(**options, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(0)
    expected = losses.ckd_loss(student, teacher, labels, **options, generator=draw)
    assert made(student, teacher, labels).item() == expected.item()
    assert "relations=4" in repr(made)


# --- memory


def test_rkd_memory_is_far_below_the_cube_and_the_broadcast() -> None:
    n, d = 256, 128
    student, teacher = torch.randn(n, d), torch.randn(n, d)
    leaf = student.requires_grad_(True)
    peak = oracles.peak_bytes(lambda: losses.rkd_loss(leaf, teacher).backward())
    assert peak < 4 * n**3 / 3  # one cube of angles
    assert peak < 4 * n**2 * d  # one broadcast of differences


# --- torch's own checks


def test_opcheck() -> None:
    student, teacher = features(6, (4,), (3,), torch.float32)
    for need_grad in (True, False):
        arguments = (student, teacher, 25.0, 50.0, need_grad)
        torch.library.opcheck(torch.ops.fastxkd.rkd.default, arguments)


@pytest.mark.parametrize("name", ["sp", "cc", "pkt", "rkd", "dc", "ckd"])
def test_torch_func_grad(name: str) -> None:
    student, teacher = features(8, (5,), (5,), torch.float32)
    ours = CKD(8, torch.arange(8) % 5).ours if name == "ckd" else PAIRS[name][0]
    found, value = torch.func.grad_and_value(lambda s: 3 * ours(s, teacher))(student)
    expected, slope = gradient(ours, student, teacher)
    torch.testing.assert_close(value, 3 * expected)
    torch.testing.assert_close(found, slope)


@pytest.mark.parametrize("name", PAIRS)
def test_vmap(name: str) -> None:
    """Of a stack of batches: the same as one after the other, with gradients or without."""
    ours = PAIRS[name][0]
    batches = [features(8, (5,), (4,), torch.float32) for _ in range(3)]
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


def test_vmap_over_layers_of_distances() -> None:
    student, teacher = features(8, (5,), (4,), torch.float32)
    layers = torch.func.vmap(lambda s, t: losses.dc_loss([s, t], [t, t]))
    found = layers(torch.stack([student] * 2), torch.stack([teacher] * 2))
    torch.testing.assert_close(found[1], losses.dc_loss([student, teacher], [teacher, teacher]))


@pytest.mark.parametrize("name", ["sp", "cc", "pkt", "rkd", "dc", "ckd"])
def test_autocast_and_checkpoints(name: str) -> None:
    student, teacher = features(8, (5,), (5,), torch.float32)
    ours = CKD(8).ours if name == "ckd" else PAIRS[name][0]
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo's own, of autograd.Function
@pytest.mark.parametrize("name", ["sp", "cc", "pkt", "rkd", "dc", "ckd"])
def test_compiles_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    student, teacher = features(8, (5,), (5,), torch.float32)
    labels = torch.arange(8) % 5

    def seeded(s: Tensor, t: Tensor) -> Tensor:
        return losses.ckd_loss(s, t, labels)

    ours = seeded if name == "ckd" else PAIRS[name][0]
    compiled = torch.compile(
        lambda s, t: ours(s.tanh(), t), fullgraph=True, backend="aot_eager", dynamic=False
    )
    torch.manual_seed(1)
    found, slope = gradient(compiled, student, teacher)
    torch.manual_seed(1)
    expected, expected_slope = gradient(lambda s, t: ours(s.tanh(), t), student, teacher)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(slope, expected_slope)


@pytest.mark.parametrize("name", ["sp", "cc", "pkt", "rkd", "dc"])
def test_second_derivatives_are_an_error_and_not_a_zero(name: str) -> None:
    student, teacher = features(6, (3,), (4,), torch.float64)
    leaf = student.requires_grad_(True)
    loss = PAIRS[name][0](leaf, teacher).square()
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("name", [spec.name for spec in benchmark.specs(True)])
def test_what_is_timed_is_the_same_loss(name: str) -> None:
    case = next(spec for spec in benchmark.specs(True) if spec.name == name).build()
    assert next(iter(case.variants)).startswith("floor")
    (eager, ours) = (case.variants[which] for which in ("eager", "ours"))
    assert all(a is b for a, b in zip(eager.inputs, ours.inputs, strict=True))
    found, expected = gradient(ours.loss, *ours.inputs), gradient(eager.loss, *ours.inputs)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-7)
    for variant in ("ours", next(iter(case.variants))):
        case.variants[variant]()
    assert ours.inputs[0].grad is None
    assert set(case.notes()) == {"eager", "ours"}


def test_modules_show_every_option() -> None:
    shown = {
        losses.CCLoss(gamma=0.5): ["kernel='gaussian'", "gamma=0.5", "order=2"],
        losses.RKDLoss(): ["distance_weight=25.0", "angle_weight=50.0"],
        losses.DCLoss(normalize_rows=False): ["normalize_rows=False"],
        losses.CKDLoss(): ["relations=None", "positives=2", "negatives=1", "generator=None"],
    }
    for module, options in shown.items():
        assert all(option in repr(module) for option in options), module


# --- wrong input

S, T = torch.zeros(5, 6), torch.zeros(5, 4)
Z = torch.zeros(5, 6)


def wrong() -> Iterator[tuple[str, Callable[[], Any], type[Exception], str]]:
    for name in ("sp", "cc", "pkt", "rkd", "dc"):
        loss = getattr(losses, f"{name}_loss")
        list_too = " or a list of them" if name == "dc" else ""
        least = {"rkd": 3, "dc": 4}.get(name, 2)
        for case, arguments, kind, text in (
            (
                "no tensor",
                ("x", T),
                TypeError,
                rf"student_features: expected a Tensor{list_too}, got str",
            ),
            (
                "integers",
                (S, T.int()),
                TypeError,
                "teacher_features: expected a floating-point dtype, got torch.int32",
            ),
            (
                "vector",
                (S[0], T),
                ValueError,
                r"student_features: expected \[n, ...\] with at least one value a row, got shape",
            ),
            (
                "rows",
                (S, T[:4]),
                ValueError,
                r"teacher_features: expected 5 rows as in student_features \[5, 6\], got 4 in",
            ),
            (
                "teacher with gradient",
                (S, T.clone().requires_grad_(True)),
                ValueError,
                r"teacher_features: expected a tensor without .*teacher_features.detach\(\)",
            ),
            (
                "too few",
                (S[: least - 1], T[: least - 1]),
                ValueError,
                rf"student_features: expected at least {least} samples, .*; got {least - 1} in",
            ),
        ):
            yield f"{name} {case}", lambda loss=loss, a=arguments: loss(*a), kind, text
    for case, call, kind, text in (
        (
            "rkd distance_weight",
            lambda: losses.rkd_loss(S, T, distance_weight=-1),
            ValueError,
            "distance_weight: expected a finite number of at least 0, got -1",
        ),
        (
            "rkd angle_weight",
            lambda: losses.rkd_loss(S, T, angle_weight=math.inf),
            ValueError,
            "angle_weight: expected a finite number of at least 0, got inf",
        ),
        (
            "rkd one sample",
            lambda: losses.rkd_loss(S[:1], T[:1], angle_weight=0),
            ValueError,
            "student_features: expected at least 2 samples, for a distance between two; got 1",
        ),
        (
            "cc kernel",
            lambda: losses.cc_loss(S, T, kernel="rbf"),
            ValueError,
            "kernel: expected one of gaussian, bilinear, got 'rbf'",
        ),
        (
            "cc gamma",
            lambda: losses.cc_loss(S, T, gamma=0),
            ValueError,
            "gamma: expected a finite number above 0, got 0",
        ),
        (
            "cc order",
            lambda: losses.cc_loss(S, T, order=0),
            ValueError,
            "order: expected at least 1, got 0",
        ),
        (
            "cc order type",
            lambda: losses.cc_loss(S, T, order=1.5),
            TypeError,
            "order: expected an int, got float",
        ),
        (
            "dc layers",
            lambda: losses.dc_loss([S, S], [T]),
            ValueError,
            "teacher_features: expected as many layers as student_features and at least one, got 1"
            " and 2",
        ),
        (
            "dc no layer",
            lambda: losses.dc_loss([], []),
            ValueError,
            "at least one, got 0 and 0",
        ),
        (
            "dc second layer",
            lambda: losses.dc_loss([S, S], [T, T[:3]]),
            ValueError,
            r"teacher_features\[1\]: expected 5 rows as in student_features\[1\]",
        ),
        (
            "ckd shape",
            lambda: losses.ckd_loss(Z, T),
            ValueError,
            r"teacher_logits: expected the shape of student_logits \[5, 6\], got \[5, 4\]",
        ),
        (
            "ckd dimensions",
            lambda: losses.ckd_loss(Z[None], Z[None]),
            ValueError,
            r"student_logits: expected \[n, classes\], got shape \[1, 5, 6\]",
        ),
        (
            "ckd teacher with gradient",
            lambda: losses.ckd_loss(Z, Z.clone().requires_grad_(True)),
            ValueError,
            r"teacher_logits: expected a tensor without gradient.*teacher_logits.detach\(\)",
        ),
        (
            "ckd too few",
            lambda: losses.ckd_loss(Z, Z, positives=4, negatives=2),
            ValueError,
            "student_logits: expected at least 6 samples, for the groups of a relation; got 5",
        ),
        (
            "ckd relations",
            lambda: losses.ckd_loss(Z, Z, relations=0),
            ValueError,
            "relations: expected at least 1, got 0",
        ),
        (
            "ckd positives",
            lambda: losses.ckd_loss(Z, Z, positives=True),
            TypeError,
            "positives: expected an int, got bool",
        ),
        (
            "ckd negatives",
            lambda: losses.ckd_loss(Z, Z, negatives=0),
            ValueError,
            "negatives: expected at least 1, got 0",
        ),
        (
            "ckd temperature",
            lambda: losses.ckd_loss(Z, Z, temperature=0),
            ValueError,
            "temperature: expected a finite number above 0, got 0",
        ),
        (
            "ckd labels",
            lambda: losses.ckd_loss(Z, Z, torch.arange(4)),
            ValueError,
            r"labels: expected \[5\], one for each row of student_logits \[5, 6\], got \[4\]",
        ),
        (
            "ckd labels dtype",
            lambda: losses.ckd_loss(Z, Z, torch.zeros(5)),
            TypeError,
            "labels: expected torch.int64 class indices, got torch.float32",
        ),
        (
            "ckd labels type",
            lambda: losses.ckd_loss(Z, Z, [0] * 5),  # type: ignore[arg-type]
            TypeError,
            "labels: expected a Tensor, got list",
        ),
        (
            "ckd label too high",
            lambda: losses.ckd_loss(Z, Z, torch.full((5,), 6)),
            ValueError,
            "labels: expected classes from 0 to 5, got 6",
        ),
        (
            "ckd label negative",
            lambda: losses.ckd_loss(Z, Z, torch.full((5,), -100)),
            ValueError,
            "labels: expected classes from 0 to 5, got -100",
        ),
        (
            "CCLoss kernel",
            lambda: losses.CCLoss(kernel="rbf"),
            ValueError,
            "kernel: expected one of gaussian, bilinear, got 'rbf'",
        ),
        (
            "CCLoss gamma",
            lambda: losses.CCLoss(gamma="a"),  # type: ignore[arg-type]
            TypeError,
            "gamma: expected a number, got str",
        ),
        (
            "RKDLoss",
            lambda: losses.RKDLoss(angle_weight=-1),
            ValueError,
            "angle_weight: expected a finite number of at least 0, got -1",
        ),
        (
            "DCLoss",
            lambda: losses.DCLoss(normalize_rows="no"),  # type: ignore[arg-type]
            TypeError,
            "normalize_rows: expected a bool, got str",
        ),
        (
            "CKDLoss",
            lambda: losses.CKDLoss(temperature=0),
            ValueError,
            "temperature: expected a finite number above 0, got 0",
        ),
        (
            "CKDLoss generator",
            lambda: losses.CKDLoss(generator=5),  # type: ignore[arg-type]
            TypeError,
            "generator: expected a torch.Generator or None, got int",
        ),
    ):
        yield case, call, kind, text


WRONG = {name: rest for name, *rest in wrong()}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name: str) -> None:
    call, kind, text = WRONG[name]
    with pytest.raises(kind, match=text):
        call()
