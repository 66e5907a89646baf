"""Faithfulness of a student: against the single measures, and in a run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastxkd
from fastxkd.metrics.fidelity import explanation_fidelity, joined
from tests.test_xdistillation import classifier


def explainers(*models):
    return [fastxkd.GradCAM(model, ["stage4"]) for model in models]


def test_it_is_the_single_measures_on_the_teachers_choice():
    student, teacher, images = classifier(1), classifier(2), torch.randn(9, 1, 12, 12)
    own, guide = explainers(student, teacher)
    found = explanation_fidelity(student, teacher, images, own, guide, steps=6)
    z_s, z_t = student.eval()(images).double(), teacher.eval()(images).double()
    targets = z_t.argmax(1)
    a, b = own(images, targets), guide(images, targets)
    assert torch.equal(found.agreement, (z_s.argmax(1) == targets).double())
    expected = F.kl_div(z_s.log_softmax(1), z_t.softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(found.divergence, expected.detach(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.cosine, fastxkd.cosine_agreement(a, b).double())
    torch.testing.assert_close(found.pearson, fastxkd.pearson_agreement(a, b).double())
    torch.testing.assert_close(found.ssim, fastxkd.ssim_agreement(a, b).double())
    for share in (0.1, 0.2):
        top = fastxkd.top_agreement(a, b, fraction=share).double()
        torch.testing.assert_close(found.top[share], top)
    deletion = fastxkd.deletion_curve(teacher, images, a, targets, steps=6).auc.double()
    insertion = fastxkd.insertion_curve(teacher, images, a, targets, steps=6).auc.double()
    torch.testing.assert_close(found.deletion, deletion)
    torch.testing.assert_close(found.insertion, insertion)
    means = found.means()
    assert means["cosine"] == pytest.approx(found.cosine.mean().item())
    assert set(means) == {
        "agreement", "divergence", "cosine", "pearson", "ssim", "top_10", "top_20", "deletion",
        "insertion",
    }  # fmt: skip


def test_a_teacher_is_faithful_to_itself_and_left_as_it_was():
    teacher = classifier(2).train()
    images = torch.randn(4, 1, 8, 8)
    found = explanation_fidelity(teacher, teacher, images, *explainers(teacher, teacher))
    assert teacher.training
    assert (found.agreement == 1).all()
    assert found.divergence.abs().max() < 1e-12
    for name in ("cosine", "pearson", "ssim"):
        torch.testing.assert_close(getattr(found, name), torch.ones(4, dtype=torch.float64))


def test_batches_are_joined():
    student, teacher, images = classifier(1), classifier(2), torch.randn(6, 1, 12, 12)
    own, guide = explainers(student, teacher)
    whole = explanation_fidelity(student, teacher, images, own, guide, curves=False)
    parts = [
        explanation_fidelity(student, teacher, part, own, guide, curves=False)
        for part in images.split(4)
    ]
    together = joined(parts)
    assert together.deletion is None
    torch.testing.assert_close(together.cosine, whole.cosine)
    torch.testing.assert_close(together.top[0.2], whole.top[0.2])


def test_classes_ruled_out_by_both_are_no_divergence():
    logits = torch.tensor([[1.0, 0.0, -torch.inf], [0.0, 2.0, -torch.inf]])
    images = torch.rand(2, 1, 4, 4)
    explain = lambda x, targets: x[:, 0]  # noqa: E731
    found = explanation_fidelity(
        lambda x: logits, lambda x: logits, images, explain, explain, curves=False
    )
    assert (found.divergence == 0).all()


def test_models_may_work_in_place():
    images = torch.rand(2, 1, 12, 12)
    kept, found = images.clone(), []
    explain = lambda x, targets: x[:, 0]  # noqa: E731
    plain = lambda x: (x - 0.5).flatten(1)[:, 40:50]  # noqa: E731
    for model in (lambda x: x.sub_(0.5).flatten(1)[:, 40:50], plain):
        found.append(explanation_fidelity(model, model, images, explain, explain, steps=6))
        assert torch.equal(images, kept)
    for one, other in zip(found[0], found[1], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ssim_window": 10}, "ssim_window: expected an odd number of pixels, got 10"),
        ({"ssim_window": 0}, "ssim_window: expected at least 1, got 0"),
        ({"images": torch.rand(1, 12, 12)}, r"images: expected \[n, channels, h, w\]"),
        ({"explain_student": lambda x, targets: x}, r"explain_student: expected \[n, h, w\]"),
        ({"explain_teacher": lambda x, targets: x[:, 0, 1:]}, r"explain_teacher: expected \[2, 12"),
        ({"student": lambda x: torch.zeros(2, 4)}, "teacher: expected logits .* as of the student"),
        ({"student": lambda x: x}, r"student: expected logits \[2, classes\]"),
        ({"fractions": [0.0]}, "fraction: expected 0 < fraction <= 1"),
    ],
)
def test_wrong_input_is_named(change, text):
    explain = lambda x, targets: x[:, 0]  # noqa: E731
    chosen = {
        "student": lambda x: torch.zeros(2, 3),
        "teacher": lambda x: torch.zeros(2, 3),
        "images": torch.rand(2, 1, 12, 12),
        "explain_student": explain,
        "explain_teacher": explain,
        **change,
    }
    with pytest.raises(ValueError, match=text):
        explanation_fidelity(**chosen)
