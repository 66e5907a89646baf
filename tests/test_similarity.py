"""FSS and RS over layers and over a loader."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import fastxkd
from fastxkd.metrics import distance_correlation, layer_scores, partial_distance_correlation
from tests import oracles
from tests.conftest import needs

FSS, RS = fastxkd.FeatureSimilarityScore, fastxkd.RelevanceScore
SPLITS = [(40,), (16, 16, 8), (13, 9, 18), (37, 3)]


def data(n: int = 40, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Student, base and labels that have something to do with each other."""
    labels = torch.arange(n) % 3
    student = torch.randn(n, 4, 3, 2, dtype=dtype) + labels[:, None, None, None]
    base = student.flatten(1)[:, :10] + torch.randn(n, 10, dtype=dtype)
    return student, base, labels


def one_hot(labels: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(labels).double()


# --- layer_scores


@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize("embedded", [True, False])
def test_layer_scores_are_the_single_scores(
    backend: str, embedded: bool, with_teacher: bool
) -> None:
    labels = torch.arange(40) % 3
    targets = torch.randn(3, 5, dtype=torch.float64)[labels] if embedded else labels
    g = targets if embedded else one_hot(labels)
    student, base, teacher = (
        {f"{who}{i}": data()[i % 2] + i for i in range(4)} for who in ("s", "b", "t")
    )
    rows = layer_scores(student, base, targets, teacher=teacher if with_teacher else None)
    assert [row.layer for row in rows] == list(student)
    for row, s, b, t in zip(rows, student.values(), base.values(), teacher.values(), strict=True):
        expected = {
            "fss": distance_correlation(s, b, unbiased=False),
            "rs_student": distance_correlation(s, g),
            "rs_base": distance_correlation(b, g),
            "rs_distilled": partial_distance_correlation(s, g, given=b, semi_partial=True),
            "rs_residual": partial_distance_correlation(b, g, given=s, semi_partial=True),
        }
        if with_teacher:
            expected["fss_teacher"] = distance_correlation(s, t, unbiased=False)
            expected["rs_teacher"] = distance_correlation(t, g)
        else:
            assert row.fss_teacher is None
            assert row.rs_teacher is None
        for name, value in expected.items():
            assert isinstance(getattr(row, name), float)
            assert getattr(row, name) == pytest.approx(value.item(), abs=1e-12), name
        # And once against the formulas themselves.
        assert row.rs_distilled == pytest.approx(
            oracles.partial(s, g, b, semi=True).item(), abs=1e-12
        )


def test_layer_scores_of_float32_features(backend: str) -> None:
    student, base, labels = data(200, torch.float32)
    (row,) = layer_scores({"a": student}, {"a": base}, labels)
    s, b, g = student.double(), base.double(), one_hot(labels)
    assert row.fss == pytest.approx(oracles.correlation(s, b, unbiased=False).item(), abs=1e-5)
    assert row.rs_student == pytest.approx(
        oracles.correlation(s, g, unbiased=True).item(), abs=1e-5
    )
    assert row.rs_residual == pytest.approx(oracles.partial(b, g, s, semi=True).item(), abs=1e-5)


def test_what_classes_are_called_does_not_matter(backend: str) -> None:
    student, base, labels = data()
    scores = layer_scores({"a": student}, {"a": base}, labels)
    other = torch.tensor([900_000_000_000, -5, 17])[labels]
    for found, value in zip(layer_scores({"a": student}, {"a": base}, other), scores, strict=True):
        assert found[1:] == pytest.approx(value[1:], abs=1e-12)


def test_one_class_only_scores_zero(backend: str) -> None:
    student, base, labels = data()
    (row,) = layer_scores({"a": student}, {"a": base}, torch.full_like(labels, 7))
    assert (row.rs_student, row.rs_base, row.rs_distilled, row.rs_residual) == (0, 0, 0, 0)
    assert row.fss > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_student_equal_to_base(backend: str, dtype: torch.dtype) -> None:
    student, _, labels = data(dtype=dtype)
    (row,) = layer_scores({"a": student}, {"a": student.clone()}, labels)
    assert row.fss == pytest.approx(1, abs=1e-6)
    assert row.rs_student == row.rs_base
    assert (row.rs_distilled, row.rs_residual) == (0, 0)


# --- the metric classes


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("options", [{}, {"unbiased": True}, {"normalize_rows": True}], ids=str)
def test_fss_over_batches_is_one_call(split: tuple[int, ...], options: dict[str, Any]) -> None:
    student, base, _ = data()
    metric = FSS(**options)
    for s, b in zip(student.split(split), base.split(split), strict=True):
        metric.update(s, b)
    if options.get("normalize_rows"):
        student, base = (
            x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True) for x in (student, base)
        )
    true = oracles.correlation(student, base, unbiased=bool(options.get("unbiased")))
    found = metric.compute()
    assert found.shape == ()
    assert found.item() == pytest.approx(true.item(), abs=1e-6)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("embedded", [True, False])
def test_rs_over_batches_is_one_call(split: tuple[int, ...], given: bool, embedded: bool) -> None:
    student, base, labels = data()
    targets = torch.randn(3, 5, dtype=torch.float64)[labels] if embedded else labels
    metric = RS()
    for s, b, y in zip(*(x.split(split) for x in (student, base, targets)), strict=True):
        metric.update(s, y, b if given else None)
    g = targets if embedded else one_hot(labels)
    true = (
        oracles.partial(student, g, base, semi=True)
        if given
        else oracles.correlation(student, g, unbiased=True)
    )
    assert metric.compute().item() == pytest.approx(true.item(), abs=1e-6)


def test_rs_biased() -> None:
    student, _, labels = data()
    metric = RS(unbiased=False)
    metric.update(student, labels)
    true = oracles.correlation(student, one_hot(labels), unbiased=False)
    assert metric.compute().item() == pytest.approx(true.item(), abs=1e-6)


def test_batch_mode_is_the_mean_of_batches() -> None:
    student, base, labels = data()
    fss, rs, partial = FSS("batch"), RS("batch"), RS("batch")
    each: list[list[float]] = []
    for s, b, y in zip(*(x.split(10) for x in (student, base, labels)), strict=True):
        fss.update(s, b)
        rs.update(s, y)
        partial.update(s, y, b)
        g = one_hot(y)
        each.append(
            [
                oracles.correlation(s, b, unbiased=False).item(),
                oracles.correlation(s, g, unbiased=True).item(),
                oracles.partial(s, g, b, semi=True).item(),
            ]
        )
    means = torch.tensor(each).mean(0).tolist()
    found = [m.compute().item() for m in (fss, rs, partial)]
    assert found == pytest.approx(means, abs=1e-6)
    exact = FSS()
    exact.update(student, base)
    assert abs(exact.compute().item() - found[0]) > 1e-4


def test_batch_mode_leaves_a_small_batch_out() -> None:
    student, base, _ = data(11)
    metric = FSS("batch")
    metric.update(student[:8], base[:8])
    with pytest.warns(UserWarning, match=r"FeatureSimilarityScore: a batch of 3 was left out.*4"):
        metric.update(student[8:], base[8:])
    true = oracles.correlation(student[:8], base[:8], unbiased=False)
    assert metric.compute().item() == pytest.approx(true.item(), abs=1e-6)


@pytest.mark.parametrize("embedded", [True, False])
def test_batch_mode_leaves_a_single_class_out(embedded: bool) -> None:
    """As from a loader that is not shuffled: zeros for such batches would hide the score."""
    student, base, labels = data(30)
    order = labels.sort(stable=True).indices
    targets = torch.randn(3, 4)[labels] if embedded else labels
    metric, partial = RS("batch"), RS("batch")
    metric.update(student[:12], targets[:12])
    partial.update(student[:12], targets[:12], base[:12])
    first = metric.compute(), partial.compute()
    one = order[:8]
    with pytest.warns(UserWarning, match="RelevanceScore: a batch of a single class was left out"):
        metric.update(student[one], targets[one])
    with pytest.warns(UserWarning, match="single class"):
        partial.update(student[one], targets[one], base[one])
    assert (metric.compute(), partial.compute()) == first
    alone = RS("batch")
    with pytest.warns(UserWarning, match="single class"):
        alone.update(student[one], targets[one])
    with pytest.raises(ValueError, match="RelevanceScore: no batch with a score was seen"):
        alone.compute()


def test_options_that_do_not_fit_together() -> None:
    with pytest.raises(ValueError, match="mode: expected one of dataset, batch, got 'epoch'"):
        FSS("epoch")
    with pytest.raises(ValueError, match="gather: True is for mode='dataset'"):
        RS("batch", gather=True)


@pytest.mark.parametrize("mode", ["dataset", "batch"])
def test_reset(mode: str) -> None:
    student, base, labels = data()
    metric = RS(mode)
    metric.update(student, labels, base)
    first = metric.compute()
    metric.reset()
    with (
        pytest.raises(ValueError, match="RelevanceScore: "),
        pytest.warns(UserWarning, match="compute"),
    ):
        metric.compute()
    metric.reset()
    metric.update(student, labels)  # without given now: a reset forgets that, too
    assert metric.compute() != first
    metric.reset()
    metric.update(student, labels, base)
    assert metric.compute() == first


def test_given_always_or_never() -> None:
    student, base, labels = data()
    for mode in ("dataset", "batch"):
        for first, second in ((base, None), (None, base)):
            metric = RS(mode)
            metric.update(student, labels, first)
            before = None if mode == "batch" else len(metric.features)
            with pytest.raises(ValueError, match="given: expected in every update or in none"):
                metric.update(student, labels, second)
            assert before is None or len(metric.features) == before
    with pytest.raises(ValueError, match="given: a partial score needs unbiased=True"):
        RS(unbiased=False).update(student, labels, base)


@pytest.mark.parametrize("mode", ["dataset", "batch"])
def test_pickle(mode: str) -> None:
    student, base, _ = data()
    metric = FSS(mode, normalize_rows=True)
    metric.update(student[:20], base[:20])
    copy = pickle.loads(pickle.dumps(metric))
    for m in (metric, copy):
        m.update(student[20:], base[20:])
    assert copy.compute() == metric.compute()


@pytest.mark.parametrize("mode", ["dataset", "batch"])
def test_states_merge(mode: str) -> None:
    """What torchmetrics does between processes: as if one metric had seen everything."""
    student, base, labels = data()
    whole, left, right = RS(mode), RS(mode), RS(mode)
    for i, (s, b, y) in enumerate(
        zip(*(x.split(10) for x in (student, base, labels)), strict=True)
    ):
        whole.update(s, y, b)
        (left if i < 2 else right).update(s, y, b)
    left.merge_state(right)
    assert left.compute().item() == pytest.approx(whole.compute().item(), abs=1e-7)


def test_forward_gives_the_batch_and_keeps_the_whole() -> None:
    student, base, _ = data()
    metric = FSS()
    for s, b in zip(student.split(20), base.split(20), strict=True):
        true = oracles.correlation(s, b, unbiased=False)
        assert metric(s, b).item() == pytest.approx(true.item(), abs=1e-6)
    true = oracles.correlation(student, base, unbiased=False)
    assert metric.compute().item() == pytest.approx(true.item(), abs=1e-6)


def test_in_a_collection() -> None:
    torchmetrics = needs("torchmetrics")
    student, base, _ = data()
    collection = torchmetrics.MetricCollection({"biased": FSS(), "unbiased": FSS(unbiased=True)})
    for s, b in zip(student.split(20), base.split(20), strict=True):
        collection.update(s, b)
    found = collection.compute()
    for name, unbiased in (("biased", False), ("unbiased", True)):
        true = oracles.correlation(student, base, unbiased=unbiased)
        assert found[name].item() == pytest.approx(true.item(), abs=1e-6)


@pytest.mark.parametrize("mode", ["dataset", "batch"])
def test_to_and_state_dict(mode: str) -> None:
    student, base, _ = data()
    metric = FSS(mode).to("cpu")
    metric.persistent(True)
    metric.update(student, base)
    state = metric.state_dict()
    other = FSS(mode)
    other.persistent(True)
    other.load_state_dict(state)
    other._update_count = 1
    assert other.compute() == metric.compute()
    assert metric.to("cpu").compute() == metric.compute()


def test_nothing_of_the_graph_is_kept() -> None:
    student, base, _ = data()
    metric = FSS()
    metric.update(student.requires_grad_(True), base)
    assert not metric.student[0].requires_grad
    assert not metric.compute().requires_grad


def test_the_classes_are_torchmetrics() -> None:
    torchmetrics = needs("torchmetrics")
    assert issubclass(FSS, torchmetrics.Metric)
    assert issubclass(RS, torchmetrics.Metric)
