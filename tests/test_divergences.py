"""The divergences, teachers and weights of kd_loss and dkd_loss, against autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastxkd
from tests import oracles
from tests.test_kd_loss import DTYPES, IGNORE, INF, REST, SLACK, by_dynamo, call, check, logits

DIVERGENCES: dict[str, dict[str, Any]] = {
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd", "beta": 0.5},
    "jsd 0.1": {"divergence": "jsd", "beta": 0.1},
    "tvd": {"divergence": "tvd"},
    "dkd": {"divergence": "dkd", "alpha": 1.0, "beta": 8.0},
    "dkd 0.5 2": {"divergence": "dkd", "alpha": 0.5, "beta": 2.0},
}
SHAPES = [(1, 1), (3, 2), (7, 33), (128, 100), (41, 1271)]
every_divergence = pytest.mark.parametrize("name", DIVERGENCES)

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{f"T={t}": ({"temperature": t}, {}) for t in (0.5, 1.0, 2.0, 3.0, 7.3, 20.0)},
    "scale 10": ({}, {"scale": 10}),
    "scale 10, T=1": ({"temperature": 1.0}, {"scale": 10}),
    "only soft": ({"ce_weight": 0.0, "kd_weight": 1.0}, {}),
    "only hard": ({"kd_weight": 0.0, "ce_weight": 1.0}, {}),
    "ignore some": ({}, {"ignored": 0.4}),
    "smoothing and weights": (
        {"label_smoothing": 0.1, "class_weight": True, "row_weight": True, "temperature": 2.5},
        {"ignored": 0.3},
    ),
    "row weight, sum": ({"row_weight": True, "reduction": "sum"}, {"ignored": 0.3}),
    "row weight, none": ({"row_weight": True, "reduction": "none"}, {"ignored": 0.3}),
    "masked in both": ({}, {"mask": "both"}),
    "masked in both, T=1": ({"temperature": 1.0}, {"mask": "both"}),
    "peaked, right": ({}, {"peak": 30.0}),
    "peaked, wrong": ({}, {"peak": -30.0}),
    "peaked, T=1": ({"temperature": 1.0}, {"peak": 60.0}),
    "offset": ({}, {"offset": 100.0}),
}


def given(options: dict[str, Any], rows: int = 9, classes: int = 33) -> dict[str, Any]:
    """The options with True replaced by tensors."""
    made = dict(options)
    if made.get("class_weight") is True:
        made["class_weight"] = torch.linspace(0, 2, classes)
    if made.get("row_weight") is True:
        made["row_weight"] = torch.linspace(0, 3, rows)
    return made


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_divergence
def test_matches_float64(
    backend: str, dtype: torch.dtype, shape: tuple[int, int], name: str
) -> None:
    check(*logits(*shape, dtype), DIVERGENCES[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_divergence
def test_matches_float64_on_a_vocabulary(backend: str, dtype: torch.dtype, name: str) -> None:
    check(*logits(4, 32000, dtype), {**DIVERGENCES[name], "temperature": 2.5})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@every_divergence
def test_options(backend: str, dtype: torch.dtype, case: str, name: str) -> None:
    options, how = CASES[case]
    check(*logits(9, 33, dtype, **how), given({**DIVERGENCES[name], **options}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["jsd", "tvd", "dkd"])
def test_masked_in_the_teacher_alone(backend: str, dtype: torch.dtype, name: str) -> None:
    check(*logits(9, 33, dtype, mask="teacher"), DIVERGENCES[name])


def test_reverse_kl_of_a_class_that_the_teacher_excludes_is_infinite(backend: str) -> None:
    student, teacher, _ = logits(4, 8, torch.float32)
    teacher[2, 1] = -INF
    rows = fastxkd.kd_loss(student, teacher, divergence="reverse_kl", reduction="none")
    assert rows[2] == INF
    assert rows[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17, 31, 32, 33, 511, 513, 1023, 1025, 2049])
@every_divergence
def test_every_block_boundary(backend: str, name: str, classes: int) -> None:
    check(*logits(5, classes, torch.float32), DIVERGENCES[name])


@pytest.mark.parametrize("label", [0, 1, 15, 16, 31, 32, 36])
def test_dkd_with_the_label_anywhere(backend: str, label: int) -> None:
    """The label's class is left out wherever its vector lies: first, within, last, padded."""
    student, teacher, _ = logits(5, 37, torch.float32)
    check(student, teacher, torch.full((5,), label), DIVERGENCES["dkd"])


@pytest.mark.parametrize("temperature", [1.0, 4.0, 2.5])
@every_divergence
def test_far_above_the_first_classes(backend: str, name: str, temperature: float) -> None:
    """The kernel guesses a row's maximum from its first classes; here the guess is far off."""
    student, teacher, labels = logits(6, 700, torch.float32)
    student[:, 300] += 400
    teacher[:, 301] += 300
    student[1, :40], teacher[1, :40] = -INF, -INF
    student[2, :40] -= 1000
    teacher[3, :16] = -INF
    student[3, :16] = -INF
    assert labels is not None
    labels[1] = 300
    labels[3] = 100
    options = {**DIVERGENCES[name], "temperature": temperature}
    check(student[1:], teacher[1:], labels[1:], options)


@every_divergence
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("bad", [float("nan"), INF], ids=str)
def test_bad_value_stays_in_its_row(backend: str, name: str, whose: str, bad: float) -> None:
    student, teacher, labels = logits(8, 33, torch.float32)
    options = {**DIVERGENCES[name], "reduction": "none"}
    assert labels is not None
    labels[3] = 7
    _, clean = check(student, teacher, labels, options)
    (student if whose == "student" else teacher)[3, 5] = bad
    leaf = student.requires_grad_(True)
    loss = call(leaf, teacher, labels, options)
    loss.sum().backward()
    rest = torch.arange(8) != 3
    assert loss[3].isnan()
    assert loss[rest].isfinite().all()
    # The decoupled label may keep a finite entry: it does not look at the others one by one.
    others = torch.arange(33) != 7
    assert leaf.grad[3][others].isnan().all()
    assert torch.equal(leaf.grad[rest], clean[rest])


@every_divergence
def test_finite_differences(backend: str, name: str) -> None:
    student, teacher, labels = logits(5, 7, torch.float64, ignored=0.3)
    options = given({**DIVERGENCES[name], "row_weight": True, "temperature": 2.5}, rows=5)
    leaf = student.clone().requires_grad_(True)
    call(leaf, teacher, labels, options).backward()
    step, h = torch.randn_like(student), 1e-6
    ahead = call(student + h * step, teacher, labels, options)
    behind = call(student - h * step, teacher, labels, options)
    numeric = (ahead - behind) / (2 * h)
    torch.testing.assert_close((leaf.grad * step).sum(), numeric, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_too_large_for_a_cache_are_the_same_bits(dtype: torch.dtype) -> None:
    """From 64 MiB on the kernel writes past the caches, where a row is aligned."""
    rows = (64 << 20) // (16008 * dtype.itemsize) + 2
    student, teacher = torch.randn(rows, 16008).to(dtype), torch.randn(rows, 16008).to(dtype)
    whole, few = (student[:n].clone().requires_grad_(True) for n in (rows, 50))
    fastxkd.kd_loss(whole, teacher, reduction="sum").backward()
    fastxkd.kd_loss(few, teacher[:50], reduction="sum").backward()
    assert torch.equal(whole.grad[:50], few.grad)
    assert whole.grad.isfinite().all()


# --- what the divergences are to each other


def test_a_row_of_equal_distributions_costs_nothing(backend: str) -> None:
    student, _, labels = logits(9, 33, torch.float64)
    for options in DIVERGENCES.values():
        found = call(student, student + 3, labels, {**options, "ce_weight": 0.0})
        assert abs(found.item()) < 1e-12


def test_identities(backend: str) -> None:
    student, teacher, labels = logits(9, 33, torch.float64)
    assert labels is not None

    def soft(s: Tensor, t: Tensor, **options: Any) -> Tensor:
        return fastxkd.kd_loss(s, t, kd_weight=1.0, temperature=1.0, reduction="none", **options)

    forward, reverse = soft(student, teacher), soft(student, teacher, divergence="reverse_kl")
    torch.testing.assert_close(reverse, soft(teacher, student))
    jsd = soft(student, teacher, divergence="jsd")
    torch.testing.assert_close(jsd, soft(teacher, student, divergence="jsd"))
    torch.testing.assert_close(soft(student, teacher, divergence="jsd", beta=0.0), forward)
    torch.testing.assert_close(soft(student, teacher, divergence="jsd", beta=1.0), reverse)
    tvd = soft(student, teacher, divergence="tvd")
    assert ((tvd > 0) & (tvd < 1)).all()
    assert (jsd < torch.tensor(2.0).log()).all()
    assert (2 * tvd.square() <= forward).all()  # Pinsker
    # KL = KL(target or not) + (1 - p) KL among the others
    options = {"kd_weight": 1.0, "ce_weight": 0.0, "temperature": 1.0, "reduction": "none"}
    target = fastxkd.dkd_loss(student, teacher, labels, others_weight=0.0, **options)
    others = fastxkd.dkd_loss(
        student, teacher, labels, target_weight=0.0, others_weight=1.0, **options
    )
    p = teacher.softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(target + (1 - p) * others, forward)


# --- teachers


def kl(student: Tensor, p: Tensor, temperature: float, divergence: str, beta: float) -> Tensor:
    """A divergence against given probabilities at T."""
    options = {"divergence": divergence, "alpha": 1.0, "beta": beta}
    value = oracles.soft_rows(student / temperature, p.log(), None, **options)
    return temperature**2 * value.mean()


FORMS = {"forward_kl": 0.5, "jsd": 0.3, "tvd": 0.5}


def against(
    student: Tensor, teacher: Any, p: Tensor, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Loss and gradient for a teacher in some form, against the probabilities it stands for."""
    divergence = options.get("divergence", "forward_kl")
    exact = student.detach().double().clone().requires_grad_(True)
    expected = kl(exact, p, options["temperature"], divergence, FORMS[divergence])
    expected.backward()
    leaf = student.detach().to(dtype).clone().requires_grad_(True)
    found = fastxkd.kd_loss(leaf, teacher, kd_weight=1.0, beta=FORMS[divergence], **options)
    found.backward()
    eps = 1e-12 if dtype == torch.float64 else 2 * SLACK
    assert abs(found.item() - expected.item()) <= eps * max(1, expected.item())
    off = (leaf.grad.double() - exact.grad).norm()
    rounding = (exact.grad.to(dtype).double() - exact.grad).norm()
    assert off <= 1.2 * rounding + eps * max(exact.grad.norm(), options["temperature"] * 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", FORMS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_probabilities(
    backend: str, dtype: torch.dtype, divergence: str, temperature: float
) -> None:
    student, teacher, _ = logits(9, 133, dtype)
    probs = teacher.double().softmax(1)
    probs[:, 3] = 0
    probs = probs.to(dtype)
    options = {"divergence": divergence, "temperature": temperature}
    p = (probs.double().log() / temperature).softmax(1)
    against(student, probs, p, {**options, "teacher_form": "probs"}, dtype)
    log_probs = teacher.log_softmax(1)
    p = (log_probs.double() / temperature).softmax(1)
    against(student, log_probs, p, {**options, "teacher_form": "log_probs"}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", FORMS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("form", ["logits", "log_probs", "probs"])
@pytest.mark.parametrize("k", [1, 5])
def test_top_k(
    backend: str, dtype: torch.dtype, divergence: str, temperature: float, form: str, k: int
) -> None:
    student, teacher, _ = logits(9, 133, dtype)
    stored = {"logits": teacher, "log_probs": teacher.log_softmax(1), "probs": teacher.softmax(1)}
    values, indices = stored[form].topk(k, 1)
    order = torch.randperm(k)
    values, indices = values[:, order], indices[:, order]
    kept = values.double().log() if form == "probs" else values.double()
    p = torch.zeros(9, 133, dtype=torch.float64)
    p.scatter_(1, indices, (kept / temperature).softmax(1))
    options = {"divergence": divergence, "temperature": temperature, "teacher_form": form}
    against(student, values, p, {**options, "teacher_indices": indices}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", FORMS)
@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.0]], ids=str)
def test_several_teachers(
    backend: str, dtype: torch.dtype, divergence: str, weights: list[float] | None
) -> None:
    student, _, _ = logits(9, 133, dtype)
    teachers = [torch.randn(9, 133).to(dtype) * 2 for _ in range(3)]
    shares = torch.tensor(weights or [1.0, 1.0, 1.0], dtype=torch.float64)
    shares /= shares.sum()
    p = sum(w * (t.double() / 2.5).softmax(1) for w, t in zip(shares, teachers, strict=True))
    options = {"divergence": divergence, "temperature": 2.5, "teacher_weights": weights}
    against(student, teachers, p, options, dtype)


def test_several_teachers_with_top_k_and_leading_dimensions(backend: str) -> None:
    student = torch.randn(2, 4, 50, dtype=torch.float64)
    teachers = [torch.randn(2, 4, 50, dtype=torch.float64) for _ in range(2)]
    stored = [t.topk(6, -1) for t in teachers]
    found = fastxkd.kd_loss(
        student,
        [s.values for s in stored],
        teacher_indices=[s.indices for s in stored],
        temperature=2.0,
        reduction="none",
    )
    assert found.shape == (2, 4)
    p = sum(
        torch.zeros_like(student).scatter(-1, s.indices, (s.values / 2).softmax(-1)) / 2
        for s in stored
    )
    flat = F.kl_div((student / 2).log_softmax(-1), p, reduction="none").sum(-1)
    torch.testing.assert_close(found, 0.9 * 4 * flat)


def test_reverse_kl_against_several(backend: str) -> None:
    student, teacher, _ = logits(9, 33, torch.float64)
    both = [teacher, teacher.roll(1, 0)]
    p = sum((t / 2).softmax(1) for t in both) / 2
    q = (student / 2).softmax(1)
    found = fastxkd.kd_loss(student, both, divergence="reverse_kl", temperature=2.0, kd_weight=1.0)
    torch.testing.assert_close(found, 4 * (q * (q.log() - p.log())).sum(1).mean())


# --- weights of rows


@pytest.mark.parametrize("name", ["jsd", "dkd"])
def test_weights_of_0_and_1_are_a_mask(backend: str, name: str) -> None:
    student, teacher, labels = logits(12, 33, torch.float32)
    assert labels is not None
    keep = torch.arange(12) % 3 > 0
    options = {**DIVERGENCES[name], "class_weight": torch.linspace(0.5, 2, 33)}
    loss, grad = check(student, teacher, labels, {**options, "row_weight": keep.float()})
    ignored = labels.where(keep, IGNORE)
    same, same_grad = check(student, teacher, ignored, options)
    torch.testing.assert_close(loss, same)
    torch.testing.assert_close(grad, same_grad)
    without = call(student, teacher, labels, {**options, "row_weight": torch.zeros(12)})
    assert without == 0


# --- modules, compilers, wrong input


def test_modules_are_the_functions(backend: str) -> None:
    student, teacher, labels = logits(9, 33, torch.float32)
    batch = {"row_weight": torch.linspace(0, 1, 9)}
    options: dict[str, Any] = {
        "temperature": 2.5,
        "ce_weight": 0.3,
        "kd_weight": 0.6,
        "target_weight": 0.4,
        "others_weight": 3.0,
        "ignore_index": 5,
        "label_smoothing": 0.1,
        "class_weight": torch.linspace(0.5, 2, 33),
        "teacher_form": "probs",
        "reduction": "sum",
    }
    assert labels is not None
    labels[8] = 5
    probs = teacher.softmax(1)
    module = fastxkd.DKDLoss(**options)
    found = module(student, probs, labels, **batch)
    assert found == fastxkd.dkd_loss(student, probs, labels, **batch, **options)
    assert found != module(student, probs, labels)
    defaults = fastxkd.DKDLoss()
    for option in options:
        other = fastxkd.DKDLoss(**{**options, option: getattr(defaults, option)})
        if option == "ignore_index":
            other.ignore_index = 6
        assert other(student, probs, labels, **batch) != found, option
    general = fastxkd.KDLoss(divergence="jsd", beta=0.2, teacher_weights=[1.0, 2.0])
    expected = fastxkd.kd_loss(
        student, [teacher, probs], divergence="jsd", beta=0.2, teacher_weights=[1.0, 2.0]
    )
    assert general(student, [teacher, probs]) == expected
    assert fastxkd.KDLoss()(student, [teacher, probs]) != expected


def test_opcheck(backend: str) -> None:
    student, teacher, labels = logits(5, 7, torch.float32)
    values, indices = torch.stack([teacher, teacher * 2]).topk(3, -1)
    for divergence in range(5):
        rest = (None, torch.rand(5), None, [], 0, 2.5, 0.1, 0.9, divergence, 1.0, 0.5, -100)
        arguments = (student, teacher, labels, *rest, 0.0, 2, True)
        torch.library.opcheck(torch.ops.fastxkd.kd_loss.default, arguments)
    rest = (None, None, indices, [0.4, 0.6], 1, *REST[4:])
    arguments = (student, values.softmax(-1), labels, *rest, 0.0, 0, True)
    torch.library.opcheck(torch.ops.fastxkd.kd_loss.default, arguments)


@by_dynamo
def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    student, teacher, labels = logits(9, 33, torch.float32)
    values, indices = teacher.topk(4, 1)

    def step(s: Tensor) -> Tensor:
        decoupled = fastxkd.dkd_loss(s, teacher, labels)
        several = fastxkd.kd_loss(s, [teacher, -teacher], divergence="jsd")
        return decoupled + several + fastxkd.kd_loss(s, values, teacher_indices=indices)

    expected = torch.func.grad(step)(student)
    leaf = student.requires_grad_(True)
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(leaf)
    torch.testing.assert_close(loss, step(leaf))
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected)


S, T = torch.randn(4, 6), torch.randn(4, 6)
VALUES, INDICES = T.topk(2, 1)
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "beta": (lambda: fastxkd.kd_loss(S, T, divergence="jsd", beta=1.5), ValueError, "beta: .* 1.5"),
    "target_weight": (
        lambda: fastxkd.dkd_loss(S, T, torch.zeros(4, dtype=torch.int64), target_weight=-1.0),
        ValueError,
        "target_weight: .* got -1.0",
    ),
    "others_weight": (
        lambda: fastxkd.dkd_loss(S, T, torch.zeros(4, dtype=torch.int64), others_weight=INF),
        ValueError,
        "others_weight: .* got inf",
    ),
    "dkd without labels": (lambda: fastxkd.dkd_loss(S, T, None), ValueError, "labels: .* None"),
    "teacher_form": (
        lambda: fastxkd.kd_loss(S, T, teacher_form="softmax"),
        ValueError,
        "teacher_form: expected one of logits, log_probs, probs, got 'softmax'",
    ),
    "row_weight shape": (
        lambda: fastxkd.kd_loss(S, T, row_weight=torch.ones(3)),
        ValueError,
        r"row_weight: expected \[4\] .* got \[3\]",
    ),
    "row_weight dtype": (
        lambda: fastxkd.kd_loss(S, T, row_weight=torch.ones(4, dtype=torch.int64)),
        TypeError,
        "row_weight: expected a floating-point dtype, got torch.int64",
    ),
    "row_weight grad": (
        lambda: fastxkd.kd_loss(S, T, row_weight=torch.ones(4, requires_grad=True)),
        ValueError,
        "row_weight: expected a tensor without gradient",
    ),
    "indices dtype": (
        lambda: fastxkd.kd_loss(S, VALUES, teacher_indices=INDICES.int()),
        TypeError,
        "teacher_indices: expected torch.int64 classes, got torch.int32",
    ),
    "indices shape": (
        lambda: fastxkd.kd_loss(S, VALUES, teacher_indices=INDICES[:, :1]),
        ValueError,
        r"teacher_indices: expected the shape of teacher_logits \[4, 2\], got \[4, 1\]",
    ),
    "indices rows": (
        lambda: fastxkd.kd_loss(S, VALUES[:3], teacher_indices=INDICES[:3]),
        ValueError,
        r"teacher_logits: expected the rows of student_logits .* got \[3, 2\]",
    ),
    "indices outside": (
        lambda: fastxkd.kd_loss(S, VALUES, teacher_indices=INDICES + 6),
        ValueError,
        "teacher_indices: expected 0 <= index < 6 .* got",
    ),
    "top-k without indices": (
        lambda: fastxkd.kd_loss(S, VALUES),
        ValueError,
        "teacher_logits: expected 6 classes",
    ),
    "reverse top-k": (
        lambda: fastxkd.kd_loss(S, VALUES, teacher_indices=INDICES, divergence="reverse_kl"),
        ValueError,
        "divergence: .* 'reverse_kl'",
    ),
    "no teacher": (lambda: fastxkd.kd_loss(S, []), ValueError, "teacher_logits: .* empty"),
    "teacher is no tensor": (
        lambda: fastxkd.kd_loss(S, [T, 3]),
        TypeError,
        "teacher_logits: expected Tensors, got int",
    ),
    "teachers differ": (
        lambda: fastxkd.kd_loss(S, [T, T[:, :5]]),
        ValueError,
        r"teacher_logits: expected one shape and dtype .* got \[4, 5\]",
    ),
    "weights of one teacher": (
        lambda: fastxkd.kd_loss(S, T, teacher_weights=[1.0]),
        ValueError,
        "teacher_weights: expected None with one teacher",
    ),
    "weights count": (
        lambda: fastxkd.kd_loss(S, [T, T], teacher_weights=[1.0]),
        ValueError,
        "teacher_weights: expected one for each of the 2 teachers, got 1",
    ),
    "weights negative": (
        lambda: fastxkd.kd_loss(S, [T, T], teacher_weights=[1.0, -1.0]),
        ValueError,
        r"teacher_weights: expected finite numbers .* got \[1.0, -1.0\]",
    ),
    "indices of several": (
        lambda: fastxkd.kd_loss(S, [VALUES, VALUES], teacher_indices=INDICES),
        TypeError,
        "teacher_indices: expected one tensor for each teacher",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(backend: str, case: str) -> None:
    attempt, error, text = WRONG[case]
    with pytest.raises(error, match=text):
        attempt()
