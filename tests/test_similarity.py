"""FSS and RS over layers and over a loader."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
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
    """A last batch of 3 has no score of its own."""
    student, base, _ = data(43)
    metric = FSS()
    for s, b in zip(student.split(20), base.split(20), strict=True):
        found = metric(s, b)
        if len(s) < 4:
            assert found.isnan()
        else:
            true = oracles.correlation(s, b, unbiased=False)
            assert found.item() == pytest.approx(true.item(), abs=1e-6)
        assert metric._forward_cache is found
    assert metric.update_count == 3
    true = oracles.correlation(student, base, unbiased=False)
    assert metric.compute().item() == pytest.approx(true.item(), abs=1e-6)


def test_forward_in_batch_mode_leaves_out_what_has_no_score() -> None:
    student, base, _ = data(43)
    metric = FSS("batch")
    each = [metric(s, b) for s, b in zip(student[:40].split(20), base[:40].split(20), strict=True)]
    with pytest.warns(UserWarning, match="a batch of 3 was left out"):
        assert metric(student[40:], base[40:]).isnan()
    assert metric.batches == 2
    assert metric.compute().item() == pytest.approx(sum(each).item() / 2, abs=1e-7)  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["dataset", "batch"])
def test_forward_of_a_single_class(mode: str) -> None:
    student, _, labels = data()
    metric, without = RS(mode), RS(mode)
    first = metric(student[:24], labels[:24])
    without.update(student[:24], labels[:24])
    one = labels == 1
    if mode == "batch":
        with pytest.warns(UserWarning, match="single class"):
            found = metric(student[one], labels[one])
    else:
        found = metric(student[one], labels[one])
        without.update(student[one], labels[one])
    assert not first.isnan()
    assert found.isnan()
    assert metric.compute() == without.compute()


@pytest.mark.parametrize("mode", ["dataset", "batch"])
def test_forward_that_fails_changes_nothing(mode: str) -> None:
    student, base, labels = data()
    metric = RS(mode)
    metric(student[:20], labels[:20], base[:20])
    before = metric.compute()
    for wrong in (
        (student[20:], labels[20:]),  # given before, not now
        (student[20:], labels[21:], base[20:]),
        (student[20:], labels[20:].float(), base[20:]),
    ):
        with pytest.raises(ValueError, match=r"given|targets"):
            metric(*wrong)
    metric._computed = None
    assert metric.compute() == before
    metric(student[20:], labels[20:], base[20:])
    whole = RS(mode)
    for part in (slice(0, 20), slice(20, 40)):
        whole.update(student[part], labels[part], base[part])
    assert metric.compute() == whole.compute()


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
def test_a_collection_keeps_metrics_apart_that_agree_at_first(mode: str) -> None:
    """Two scores of 1, and rows that have length 1 already."""
    torchmetrics = needs("torchmetrics")
    student, _, labels = data()
    student = student.flatten(1)
    base, unit = student + torch.randn_like(student), student / student.norm(dim=1, keepdim=True)
    known = labels[:, None].double().expand(-1, 24)  # the distances of the labels, nearly
    first, second = slice(0, 20), slice(20, 40)
    for kind, options, batches in (
        (
            FSS,
            [{}, {"unbiased": True}, {"normalize_rows": True}],
            [(unit[first], unit[first]), (student[second], base[second])],
        ),
        (
            RS,
            [{}, {"unbiased": False}],
            [(one_hot(labels[first]).repeat(1, 8), labels[first]), (known[second], labels[second])],
        ),
    ):
        together = torchmetrics.MetricCollection(
            {str(i): kind(mode, **chosen) for i, chosen in enumerate(options)}  # type: ignore[arg-type]
        )
        alone = [kind(mode, **chosen) for chosen in options]  # type: ignore[arg-type]
        for batch in batches:
            together.update(*batch)
            for metric in alone:
                metric.update(*batch)
        found = list(together.compute().values())
        assert found == [metric.compute() for metric in alone]
        assert len({float(x) for x in found}) == len(options)


@pytest.mark.parametrize("mode", ["dataset", "batch"])
def test_in_and_out_of_inference_mode(mode: str) -> None:
    student, base, labels = data()
    metric, plain = RS(mode), RS(mode)
    with torch.inference_mode():
        metric.update(student[:20], labels[:20], base[:20])
        metric.reset()
    metric.update(student[:20], labels[:20], base[:20])
    with torch.inference_mode():
        metric(student[20:30], labels[20:30], base[20:30])
    metric(student[30:], labels[30:], base[30:])
    for part in (slice(0, 20), slice(20, 30), slice(30, 40)):
        plain.update(student[part], labels[part], base[part])
    assert metric.compute() == plain.compute()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rows_of_any_length_are_normalised(dtype: torch.dtype) -> None:
    """Squares that the dtype does not hold, and a row of zeros."""
    student = 400 * torch.rand(16, 20_000).to(dtype)
    base = (student[:, :50].float() + 100 * torch.rand(16, 50)).to(dtype)
    student[3] = 0
    if dtype != torch.float16:
        student[4:] *= 1e30
    metric = FSS(normalize_rows=True)
    metric.update(student, base)
    x, y = student.double(), base.double()
    x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-300)
    true = oracles.correlation(x, y / y.norm(dim=1, keepdim=True), unbiased=False)
    assert metric.compute().item() == pytest.approx(true.item(), abs=2e-5)


@pytest.mark.parametrize("mode", ["dataset", "batch"])
def test_wrong_updates_are_refused_at_once(mode: str) -> None:
    student, base, labels = data()
    whole = torch.ones(40, 3, dtype=torch.long)
    for metric, given, error, text in (
        (RS(mode), (student, [0] * 40), TypeError, "targets: expected a Tensor, got list"),
        (RS(mode), (student, labels.float()), ValueError, r"targets: expected embeddings \[n, e\]"),
        (RS(mode), (student, whole), ValueError, "targets: expected int64 class indices"),
        (RS(mode), (student, labels > 0), ValueError, "targets: expected int64 class indices"),
        (RS(mode), (whole, labels), TypeError, "features: expected a floating-point dtype"),
        (RS(mode), (student, labels, whole), TypeError, "given: expected a floating-point dtype"),
        (RS(mode), (student[:, 0, 0, 0], labels), ValueError, r"features: .*got shape \[40\]"),
        (FSS(mode), (student, whole), TypeError, "base: expected a floating-point dtype"),
        (FSS(mode), (student.tolist(), base), TypeError, "student: expected a Tensor, got list"),
        (FSS(mode), (student, base[:, :0]), ValueError, r"base: .*got shape \[40, 0\]"),
        (FSS(mode), (student, base.numpy()), TypeError, "base: .*ndarray; .*distance_correlation"),
    ):
        for call in (metric.update, metric):
            with pytest.raises(error, match=text):
                call(*given)
        good = (student, labels) if isinstance(metric, RS) else (student, base)
        metric.update(*good)
        assert not metric.compute().isnan()


def test_a_mapped_file_is_for_the_functions(tmp_path: Path) -> None:
    student, base, _ = data()
    mapped = np.memmap(tmp_path / "base", np.float64, "w+", shape=tuple(base.shape))
    mapped[:] = base.numpy()
    with pytest.raises(TypeError, match=r"base: .* memmap; .*fastxkd.distance_correlation"):
        FSS().update(student, mapped)  # type: ignore[arg-type]
    found = fastxkd.distance_correlation(student, mapped, unbiased=False)
    true = oracles.correlation(student, base, unbiased=False)
    assert found.item() == pytest.approx(true.item(), abs=1e-12)


@pytest.mark.parametrize("width", [None, 5])
def test_batches_that_do_not_fit_the_first(width: int | None) -> None:
    student, base, labels = data()
    fss, rs, by_embeddings = FSS(projection=width), RS(projection=width), RS()
    fss.update(student, base)
    rs.update(student, labels)
    by_embeddings.update(student, base)
    for call, text in (
        (lambda: fss.update(student, base[:, 1:]), r"base: expected \[10\] a row .*, got \[9\]"),
        (lambda: fss(student[:, 1:], base), r"student: expected \[4, 3, 2\] a row"),
        (lambda: rs.update(student, base), r"targets: expected class indices .*, got \[10\] a row"),
        (lambda: by_embeddings.update(student, labels), "targets: .*, got class indices"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    rs.reset()
    rs.update(base, student)
    for metric in (fss, rs, by_embeddings):
        assert not metric.compute().isnan()


def test_flags_are_bools() -> None:
    for name in ("unbiased", "normalize_rows", "gather"):
        with pytest.raises(TypeError, match=f"{name}: expected a bool, got str"):
            FSS(**{name: "no"})  # type: ignore[arg-type]
    for name in ("unbiased", "gather"):
        with pytest.raises(TypeError, match=f"{name}: expected a bool, got int"):
            RS(**{name: 1})  # type: ignore[arg-type]


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
