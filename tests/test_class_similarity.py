"""Entropy within groups of classes, and the groups themselves."""

from __future__ import annotations

import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastxkd.metrics.class_similarity import class_groups, class_similarity, group_entropy
from fastxkd.metrics.interpretability import GroupEntropy

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def entropy(row: Any, label: int, groups: Any, drop: bool = False, base: float = math.e) -> float:
    """One row, one class after the other."""
    others = [
        k for k in range(len(row)) if groups[k] == groups[label] and not (drop and k == label)
    ]
    if not others:
        return 0.0
    p = np.exp(np.asarray(row, dtype=np.float64) - max(row))
    q = p[others] / p[others].sum()
    return float(-sum(v * math.log(v, base) for v in q if v > 0))


# --- the formula


@pytest.mark.parametrize("unit", ["nats", "bits"])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("n", [1, 7])
def test_is_the_formula(n: int, drop: bool, unit: str) -> None:
    logits, labels = 3 * torch.randn(n, 6, dtype=torch.float64), torch.randint(6, (n,))
    groups = [4, 0, 4, 4, 0, 7]
    found = group_entropy(logits, labels, groups, drop_true_class=drop, unit=unit)
    base = math.e if unit == "nats" else 2
    rows = zip(logits.tolist(), labels.tolist(), strict=True)
    assert found.tolist() == pytest.approx([entropy(*row, groups, drop, base) for row in rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(5, 6).to(dtype), torch.randint(6, (5,))
    found = group_entropy(logits, labels, [0, 0, 0, 1, 1, 1])
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rows = zip(logits.double().tolist(), labels.tolist(), strict=True)
    assert found.tolist() == pytest.approx(
        [entropy(*row, [0, 0, 0, 1, 1, 1]) for row in rows], abs=1e-6
    )


def test_closed_forms() -> None:
    """Equal answers: the logarithm of the group's size. Two classes: the binary entropy."""
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    labels = torch.arange(6)
    level = torch.full((6, 6), 2.5, dtype=torch.float64)
    assert group_entropy(level, labels, groups).tolist() == pytest.approx(
        [math.log(3)] * 3 + [math.log(2)] * 2 + [0]
    )
    assert group_entropy(level, labels, groups, drop_true_class=True).tolist() == pytest.approx(
        [math.log(2)] * 3 + [0] * 3
    )
    assert group_entropy(level).tolist() == pytest.approx([math.log(6)] * 6)
    for gap in (0.0, 0.3, 5.0, 40.0):
        p = 1 / (1 + math.exp(-gap))
        q = math.exp(-gap) / (1 + math.exp(-gap))
        wanted = -p * math.log2(p) - q * math.log2(q)
        logits = torch.tensor([[gap, 0.0, 99.0]], dtype=torch.float64)
        found = group_entropy(logits, torch.tensor([1]), [0, 0, 1], unit="bits")
        assert found.item() == pytest.approx(wanted, rel=1e-12)


def test_dark_knowledge_survives_certainty() -> None:
    """However sure of the true class: what is left is scaled to 1, not rounded to 0."""
    logits = torch.tensor([[900.0, 1.0, 1.0, -800.0]])
    found = group_entropy(logits, torch.tensor([0]), [0, 0, 0, 1], drop_true_class=True)
    assert found.item() == pytest.approx(math.log(2))
    within = group_entropy(logits, torch.tensor([3]), [0, 0, 1, 1])
    assert within.item() == 0
    assert group_entropy(logits, torch.tensor([0]), [0, 0, 0, 1]).item() == 0


def test_nothing_leaks_between_rows_and_groups() -> None:
    logits = torch.zeros(3, 4)
    logits[0, 0], logits[1, 3], logits[2, 2] = torch.nan, torch.nan, -torch.inf
    found = group_entropy(logits, torch.tensor([0, 0, 2]), [0, 0, 1, 1])
    assert found.isnan().tolist() == [True, False, False]
    assert found[1:].tolist() == pytest.approx([math.log(2), 0])
    assert not group_entropy(torch.zeros(2, 3, requires_grad=True)).requires_grad


# --- similarity and groups


def test_similarity_is_the_mean_answer() -> None:
    logits, labels = torch.randn(40, 5, dtype=torch.float64), torch.arange(40) % 5
    found = class_similarity(logits, labels, temperature=2.0)
    p = (logits / 2).softmax(1).numpy()
    mean = np.array([p[labels.numpy() == k].mean(0) for k in range(5)])
    np.testing.assert_allclose(found.numpy(), (mean + mean.T) / 2, rtol=1e-12)
    correlation = class_similarity(logits, kind="correlation")
    np.testing.assert_allclose(correlation.numpy(), np.corrcoef(logits.numpy().T), atol=1e-12)


def test_constant_logits_correlate_with_nothing() -> None:
    logits = torch.randn(9, 3)
    logits[:, 1] = 0.1
    assert class_similarity(logits, kind="correlation")[1].tolist() == [0, 0, 0]


def merged(alike: np.ndarray, count: int, linkage: str) -> list[int]:
    """Pairs of groups compared class by class, from nothing but the similarities."""
    groups = [[k] for k in range(len(alike))]
    measure = {"average": np.mean, "complete": np.min, "single": np.max}[linkage]
    while len(groups) > count:
        pairs = itertools.combinations(range(len(groups)), 2)
        value = {(i, j): measure(alike[np.ix_(groups[i], groups[j])]) for i, j in pairs}
        i, j = max(value, key=value.__getitem__)
        groups[i] += groups.pop(j)
    groups.sort(key=min)
    return [next(g for g, own in enumerate(groups) if k in own) for k in range(len(alike))]


@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
def test_groups_are_those_of_comparing_all(linkage: str) -> None:
    for seed in range(8):
        generator = np.random.default_rng(seed)
        alike = generator.random((9, 9))
        alike = alike + alike.T
        for count in range(1, 10):
            found = class_groups(torch.from_numpy(alike), count, linkage=linkage)
            assert found.tolist() == merged(alike, count, linkage), (seed, count)


def test_linkages_differ() -> None:
    """A chain: neighbours are alike, the ends are not."""
    place = torch.tensor([0.0, 1.0, 2.1, 3.3, 9.0])
    alike = -(place[:, None] - place).abs()
    assert class_groups(alike, 2, linkage="single").tolist() == [0, 0, 0, 0, 1]
    assert class_groups(alike, 3, linkage="complete").tolist() == [0, 0, 1, 1, 2]


def test_ties_are_settled_in_reading_order() -> None:
    found = [class_groups(torch.ones(6, 6), count).tolist() for count in (6, 4, 1)]
    assert found == [[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3], [0] * 6]


def test_groups_of_a_teacher_are_found() -> None:
    """Two superclasses, shuffled: a teacher that confuses within them gives them away."""
    truth = torch.tensor([0, 1, 1, 0, 1, 0])
    close = (truth[:, None] == truth).float()
    labels = torch.arange(6).repeat(20)
    logits = 2 * close[labels] + 3 * torch.eye(6)[labels] + 0.3 * torch.randn(120, 6)
    for kind in ("probability", "correlation"):
        assert class_groups(class_similarity(logits, labels, kind=kind), 2).tolist() == (
            truth.tolist()
        )


# --- the metric


def test_metric_is_the_mean_in_any_batches() -> None:
    logits, labels = torch.randn(11, 4), torch.randint(4, (11,))
    groups, options = torch.tensor([0, 1, 1, 0]), {"drop_true_class": True, "unit": "bits"}
    metric = GroupEntropy(groups, **options)
    for part in (slice(0, 3), slice(3, 11)):
        metric.update(logits[part], labels[part])
    metric = pickle.loads(pickle.dumps(metric))
    found = metric.compute()
    within = group_entropy(logits, labels, groups, **options).mean().item()
    plain = group_entropy(logits, labels, **options).mean().item()
    assert {k: v.item() for k, v in found.items()} == pytest.approx(
        {"within_group": within, "softmax": plain}
    )
    metric.reset()
    # It warns first.
    with pytest.raises((ValueError, UserWarning), match="before"):
        metric.compute()


# --- what does not fit

LOGITS, LABELS = torch.zeros(3, 4), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: group_entropy(LOGITS, None, [0, 0, 1, 1]), ValueError, "labels: expected the tru"),
        (lambda: group_entropy(LOGITS, drop_true_class=True), ValueError, "labels: expected the t"),
        (lambda: group_entropy(LOGITS, LABELS, [0, 0, 1]), ValueError, r"groups: expected \[4\]"),
        (lambda: group_entropy(LOGITS, LABELS, [0.0] * 4), TypeError, "groups: expected an integ"),
        (
            lambda: group_entropy(LOGITS, LABELS, torch.zeros(4)),
            TypeError,
            "groups: expected integers, got torch.float32",
        ),
        (lambda: group_entropy(LOGITS, LABELS + 2, [0] * 4), ValueError, "0 to 3, got 4"),
        (lambda: group_entropy(LOGITS, unit="digits"), ValueError, "unit: expected one of nats"),
        (lambda: group_entropy(LOGITS[0]), ValueError, r"logits: expected \[n, classes\]"),
        (lambda: group_entropy(LABELS), TypeError, "logits: expected a floating"),
        (
            lambda: group_entropy(LOGITS, LABELS, [0] * 4, drop_true_class=1),  # type: ignore[arg-type]
            TypeError,
            "drop_true_class: expected a bool",
        ),
        (lambda: class_similarity(LOGITS), ValueError, "labels: expected the true classes"),
        (lambda: class_similarity(LOGITS, LABELS), ValueError, "got none of class 3"),
        (lambda: class_similarity(LOGITS, LABELS, kind="x"), ValueError, "kind: expected one of"),
        (
            lambda: class_similarity(LOGITS, LABELS, temperature=0),
            ValueError,
            "temperature: expected",
        ),
        (lambda: class_groups(LOGITS, 1), ValueError, r"similarity: expected \[classes, classes\]"),
        (
            lambda: class_groups(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), 1),
            ValueError,
            "similarity: expected a symmetric",
        ),
        (
            lambda: class_groups(torch.full((2, 2), torch.nan), 1),
            ValueError,
            "similarity: expected a symmetric",
        ),
        (lambda: class_groups(torch.eye(3), 4), ValueError, "count: expected at most the 3"),
        (lambda: class_groups(torch.eye(3), 0), ValueError, "count: expected at least 1"),
        (lambda: class_groups(torch.eye(3), 2, linkage="ward"), ValueError, "linkage: expected"),
        (lambda: GroupEntropy([0, 1], unit="x"), ValueError, "unit: expected"),
    ],
)
def test_what_does_not_fit_is_named(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()


def test_groups_may_lie_elsewhere_and_be_of_any_integers() -> None:
    logits, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    of: list[Tensor] = [
        group_entropy(logits, labels, torch.tensor([9, -1, 9, -1], dtype=dtype))
        for dtype in (torch.int8, torch.int32, torch.int64)
    ]
    assert torch.equal(of[0], of[1])
    assert torch.equal(of[1], of[2])
