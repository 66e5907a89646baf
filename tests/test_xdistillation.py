"""XDistillation and MedTEX: phi, the fusions, both stages, and that stopping changes no bit."""

from __future__ import annotations

import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastxkd
from fastxkd.runs.cnn import SmallCNN
from fastxkd.runs.layers import default_layers
from fastxkd.train import (
    Distiller,
    ExplainedStudent,
    ExplanationAutoencoder,
    MedTEXDistiller,
    PhiTrainer,
    TeacherExplanations,
    TrainSettings,
    XDistiller,
    explanation_loss,
)
from fastxkd.train.distiller import learning_rate
from fastxkd.train.fusion import FUSIONS
from tests.conftest import needs
from tests.test_distiller import same_weights, stop_at

SETTINGS = TrainSettings(epochs=2, batch_size=8, lr=0.05, seed=4)
PHI = {"widths": (4, 6), "decoder": (6, 4)}


class Batches:
    """Four batches of noise an epoch, the same for the same step, with maps."""

    def __init__(self, maps: int = 1) -> None:
        self.maps = maps
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 4

    def iterate(self, first, last):
        for step in range(first, last):
            self.asked.append(step)
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(8, 1, 12, 12, generator=generator)
            labels = torch.randint(0, 3, (8,), generator=generator)
            extra = [torch.rand(8, self.maps, 12, 12, generator=generator)] * (self.maps > 0)
            yield images, labels, *extra


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = SmallCNN((4, 4, 6, 6), (1, 1, 1, 1), num_classes=3, in_channels=1)
    # Dropout draws random numbers, so a resumed run must pick up that thread as well.
    model.head = nn.Sequential(nn.Dropout(0.3), model.head)
    return model


def explained(fusion: str = "concat", maps: int = 1, **options) -> ExplainedStudent:
    if fusion == "attend":
        options = {"at": "stage4", **options}
    inner = classifier()
    torch.manual_seed(5)
    phi = None if fusion == "none" else ExplanationAutoencoder(1, maps, **PHI)
    return ExplainedStudent(inner, phi, fusion=fusion, **options)


def make(path=None, *, fusion="concat", batches=None, **options) -> XDistiller:
    chosen = {"phi_epochs": 2, "teacher": classifier(99), **options}
    student = chosen.pop("student", None) or explained(fusion)
    return XDistiller(student, batches or Batches(), SETTINGS, checkpoint=path, **chosen)


def raise_interrupt() -> None:
    raise KeyboardInterrupt


class Interrupts(fastxkd.train.Progress):
    """Ctrl-C after so many steps of a stage."""

    def __init__(self, stage: str, step: int) -> None:
        self.at, self.now, self.made = (stage, step), "", 0

    def start(self, stage, steps, done):
        self.now, self.made = stage, done

    def step(self, epoch, loss):
        self.made += 1
        if (self.now, self.made) == self.at:
            os.kill(os.getpid(), signal.SIGINT)


# --- phi


@pytest.mark.parametrize("size", [(28, 28), (17, 9), (8, 8)])
def test_phi_draws_maps_of_the_images_size(size):
    phi = ExplanationAutoencoder(3, 2).eval()
    maps, coarsest = phi.explained(torch.randn(2, 3, *size))
    assert maps.shape == (2, 2, *size)
    assert coarsest.shape == (2, 64, *(math.ceil(side / 8) for side in size))
    assert (maps > 0).all()
    assert (maps < 1).all()


def test_phi_is_small_and_separable():
    phi = ExplanationAutoencoder(3)
    pairs = [(3, 16), (16, 32), (32, 64), (64 + 32, 32), (32 + 16, 16), (16 + 3, 16)]
    expected = sum(9 * i + i * o + 2 * o for i, o in pairs) + 16 + 1
    assert sum(p.numel() for p in phi.parameters()) == expected < 12_000
    spatial = [m for m in phi.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    assert all(m.groups == m.in_channels for m in spatial)


def test_explanation_loss_against_the_formula():
    maps, target = torch.rand(3, 2, 14, 15), torch.rand(3, 2, 14, 15)
    assert explanation_loss(maps, target).item() == pytest.approx(
        ((maps - target) ** 2).mean().item(), rel=1e-6
    )
    ssim = [
        fastxkd.ssim_agreement(maps[:, k], target[:, k]).double().mean().item() for k in range(2)
    ]
    expected = ((maps - target) ** 2).mean().item() + 0.1 * (1 - sum(ssim) / 2)
    found = explanation_loss(maps, target, ssim_weight=0.1)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    double = maps.double().requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda m: explanation_loss(m, target.double(), ssim_weight=0.3), double, fast_mode=True
    )
    small = torch.rand(1, 1, 6, 5)
    assert explanation_loss(small, small, ssim_weight=1.0).item() == 0


def test_phi_learns_a_simple_map():
    torch.manual_seed(0)
    phi = ExplanationAutoencoder(1, **PHI)
    optimizer = torch.optim.Adam(phi.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        images = torch.randn(16, 1, 12, 12)
        blurred = F.avg_pool2d(images, 3, 1, 1)
        loss = explanation_loss(phi(images), (blurred > 0).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- fusions


def test_each_fusion_sees_what_it_says():
    images = torch.randn(2, 1, 12, 12)
    for fusion in FUSIONS:
        model = explained(fusion, maps=2).eval()
        logits, maps = model.explained(images)
        assert torch.equal(model(images), logits)
        if fusion == "none":
            assert maps is None
            assert torch.equal(logits, model.student(images))
            continue
        assert torch.equal(maps, model.explain(images))
        mean = maps.mean(1, keepdim=True)
        seen = {
            "concat": torch.cat([images, maps], 1),
            "gate": images * (1 + mean),
            "mask": images * mean,
            "feature": images,
            "attend": images,
        }[fusion]
        torch.testing.assert_close(model.seen(images), seen)
        if fusion not in ("feature", "attend"):
            torch.testing.assert_close(model.student(seen), logits)


def test_feature_fusion_is_a_classifier_on_joined_features():
    model = explained("feature", first_weights="random").eval()
    images = torch.randn(4, 1, 12, 12)
    _, coarsest = model.phi.explained(images)
    with fastxkd.capture(model.student, ["pool"]) as captured:
        model.student(images)
    joined = torch.cat([captured.activations["pool"].flatten(1), coarsest.mean((2, 3))], 1)
    head = model.student.head[1]
    expected = joined @ torch.cat([head.weight, model.side.weight], 1).T + head.bias
    torch.testing.assert_close(model(images), expected)


def test_a_layer_that_attends_is_gated_where_explainers_look():
    model = explained("attend", maps=2).eval()
    images = torch.randn(4, 1, 12, 12)
    gate = 1 + F.adaptive_avg_pool2d(model.explain(images).mean(1, keepdim=True), 3)
    plain = classifier().eval()
    with fastxkd.capture(plain, ["stage4"]) as before, torch.no_grad():
        plain(images)
    with fastxkd.capture(model, ["student.stage4"]) as captured, torch.no_grad():
        logits = model(images)
    features = before.activations["stage4"] * gate
    torch.testing.assert_close(captured.activations["student.stage4"], features)
    torch.testing.assert_close(logits, plain.head(features.mean((2, 3))))
    # Alone, outside of a pass of the whole, the student is the plain one.
    torch.testing.assert_close(model.student(images), plain(images))
    with pytest.raises(ValueError, match="at: SmallCNN has no layer named 'stage9'"):
        explained("attend", at="stage9")
    with pytest.raises(ValueError, match="at: expected a layer with fusion='attend', got None"):
        explained("attend", at=None)
    with pytest.raises(ValueError, match="at: expected None with fusion='gate', got 'stage4'"):
        explained("gate", at="stage4")


@pytest.mark.parametrize("fusion", ["concat", "feature"])
def test_zeros_start_from_the_plain_student(fusion):
    plain, images = classifier().eval(), torch.randn(2, 1, 12, 12)
    torch.testing.assert_close(explained(fusion).eval()(images), plain(images))
    other = explained(fusion, first_weights="random").eval()(images)
    assert not torch.allclose(other, plain(images))


def test_a_widened_convolution_keeps_its_options():
    inner = nn.Sequential(
        nn.Conv2d(2, 4, (3, 5), stride=2, padding=1, dilation=1, padding_mode="reflect"),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    images = torch.randn(2, 2, 12, 12)
    before = inner(images)
    model = ExplainedStudent(inner, ExplanationAutoencoder(2, 3, **PHI)).eval()
    torch.testing.assert_close(model(images), before)
    assert model.student[0].in_channels == 5
    assert model.student[0].padding_mode == "reflect"


class Padded(nn.Conv2d):
    """A convolution that does more than one of torch's, as those with TensorFlow's padding do."""

    def forward(self, images):
        return super().forward(F.pad(images, (0, 1, 0, 1)))


def wired(convolution: nn.Module) -> nn.Module:
    return nn.Sequential(
        convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def test_a_widened_convolution_stays_the_module_it_was():
    first, ran = Padded(2, 4, 3), []
    first.register_forward_hook(lambda *_: ran.append(1))
    inner = wired(first.requires_grad_(False)).eval()
    images = torch.randn(2, 2, 12, 12)
    before = inner(images)
    ran.clear()
    model = ExplainedStudent(inner, ExplanationAutoencoder(2, **PHI)).eval()
    torch.testing.assert_close(model(images), before)
    assert model.student[0] is first
    assert ran == [1]
    assert not first.weight.requires_grad
    assert "Padded(3, 4" in repr(first)


class Named(nn.Module):
    """Calls its layer with a keyword, inside a checkpoint or not."""

    def __init__(self, reentrant=None) -> None:
        super().__init__()
        self.first, self.layer, self.reentrant = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), reentrant

    def forward(self, images):
        features = self.first(images).relu()
        if self.reentrant is None:
            return self.layer(input=features).mean((2, 3))
        run = torch.utils.checkpoint.checkpoint
        return run(self.layer, features, use_reentrant=self.reentrant).mean((2, 3))


def test_a_layer_that_attends_takes_keywords_and_refuses_a_second_run():
    images = torch.randn(2, 1, 12, 12)
    phi = ExplanationAutoencoder(1, **PHI)
    model = ExplainedStudent(Named(), phi, fusion="attend", at="layer")
    model(images).sum().backward()
    assert phi.head.weight.grad.abs().sum() > 0
    for reentrant in (True, False):
        model = ExplainedStudent(Named(reentrant), phi, fusion="attend", at="layer")
        with pytest.raises(RuntimeError, match="at: this layer is run again by a checkpoint"):
            model(images).sum().backward()


@pytest.mark.parametrize("fusion", ["gate", "mask"])
def test_maps_of_16_bits_gate_in_32(fusion):
    model, images = explained(fusion).eval(), torch.randn(2, 1, 12, 12)
    maps = model.explain(images).bfloat16()
    gate = maps.float() + (fusion == "gate")
    torch.testing.assert_close(model._seen(images, maps), images * gate)
    assert model.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("fusion", FUSIONS)
def test_cam_finds_the_student_s_head_not_phi_s(fusion):
    model, images = explained(fusion).eval(), torch.randn(3, 1, 12, 12)
    if fusion == "feature":
        nn.init.normal_(model.side.weight)
        with pytest.raises(ValueError, match="is not the head's answer to this layer's mean"):
            fastxkd.CAM(model, "student.stage4")(images)
        return
    named = fastxkd.CAM(model, "student.stage4", head=model.student.head[1])(images, 1)
    assert torch.equal(fastxkd.CAM(model, "student.stage4")(images, 1), named)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: explained("gate", classes=3), "classes: expected None with fusion='gate', got 3"),
        (
            lambda: ExplainedStudent(
                classifier(), ExplanationAutoencoder(1), fusion="gate", maps=1
            ),
            "maps: expected None with fusion='gate', got 1",
        ),
        (
            lambda: ExplainedStudent(wired(nn.Conv2d(2, 4, 3)), ExplanationAutoencoder(3)),
            "student: its first convolution, '0', takes 2 channels, but phi 3",
        ),
        (
            lambda: ExplainedStudent(
                wired(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3))),
                ExplanationAutoencoder(1),
            ),
            "student: its first convolution, '0', is parametrised",
        ),
        (
            lambda: ExplanationAutoencoder(3)(torch.zeros(2, 1, 8, 8)),
            r"images: expected \[n, 3, h, w\], got \[2, 1, 8, 8\]",
        ),
        (lambda: ExplainedStudent(classifier()), "phi: expected a module with fusion='concat'"),
        (
            lambda: ExplainedStudent(classifier(), ExplanationAutoencoder(1), fusion="none"),
            "phi: expected None with fusion='none', got ExplanationAutoencoder",
        ),
        (
            lambda: ExplainedStudent(classifier(), nn.Conv2d(1, 1, 1)),
            "maps: phi does not say; pass maps=",
        ),
        (
            lambda: ExplainedStudent(nn.Linear(3, 3), ExplanationAutoencoder(1)),
            "student: fusion='concat' needs one that starts with a Conv2d",
        ),
        (lambda: explained("addition"), "fusion: expected one of concat, gate"),
        (lambda: explained("none").explain(torch.zeros(1, 1, 8, 8)), "phi: this student was made"),
        (lambda: ExplanationAutoencoder(1, widths=(4,), decoder=(4, 4)), "decoder: expected as"),
        (
            lambda: ExplainedStudent(classifier(), nn.AvgPool2d(2), fusion="gate")(
                torch.zeros(2, 1, 8, 8)
            ),
            r"phi: expected maps \[2, k, 8, 8\]",
        ),
    ],
)
def test_a_student_that_cannot_be_built_says_why(build, text):
    with pytest.raises(ValueError, match=text):
        build()


def test_the_student_is_one_module_for_every_explainer(tmp_path):
    images = torch.randn(6, 1, 12, 12)
    labels = torch.arange(6) % 3
    for fusion in FUSIONS:
        model = explained(fusion).eval()
        layers = default_layers(model, images)
        assert layers == ["student.stage1", "student.stage2", "student.stage3", "student.stage4"]
        assert fastxkd.GradCAM(model, layers[-1:])(images).shape == (6, 12, 12)
        unicam = fastxkd.UniCAM(
            model, classifier().eval(), target_layers=layers[-1:], base_layers=["stage4"]
        )
        out = unicam(images, labels)
        assert out.distilled.shape == (6, 12, 12)
        save_file = needs("safetensors.torch").save_file
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(state, tmp_path / f"{fusion}.safetensors")
        other = explained(fusion, first_weights="random").train()
        other.load_state_dict(
            needs("safetensors.torch").load_file(tmp_path / f"{fusion}.safetensors")
        )
        assert torch.equal(other.eval()(images), model(images))


# --- training


def test_training_equals_two_loops_written_out():
    guide, model = classifier(99).eval(), explained("gate", maps=2)
    torch.manual_seed(SETTINGS.seed)
    adam = torch.optim.Adam(model.phi.parameters(), lr=1)
    stage = TrainSettings(epochs=2, lr=0.002)
    for step, (images, _, maps) in enumerate(Batches(2).iterate(0, 8)):
        adam.param_groups[0]["lr"] = learning_rate(stage, step, 8)
        loss = F.mse_loss(model.phi(images), maps)
        adam.zero_grad()
        loss.backward()
        adam.step()
    torch.manual_seed(SETTINGS.seed)
    sgd = torch.optim.SGD(model.parameters(), 1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    losses = []
    model.train()
    for step, (images, labels, maps) in enumerate(Batches(2).iterate(0, 8)):
        sgd.param_groups[0]["lr"] = learning_rate(SETTINGS, step, 8)
        drawn = model.phi(images)
        logits = model.student(images * (1 + drawn.mean(1, keepdim=True)))
        with torch.no_grad():
            p = (guide(images) / 4).softmax(1)
        soft = 16 * F.kl_div((logits / 4).log_softmax(1), p, reduction="batchmean")
        loss = 0.1 * F.cross_entropy(logits, labels) + 0.9 * soft + 2.5 * F.mse_loss(drawn, maps)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    trained = make(
        student=explained("gate", maps=2), batches=Batches(2), phi_lr=0.002, explanation_weight=2.5
    )
    history = trained.fit()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained.student.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert [record["loss"] for record in history] == pytest.approx(
        [sum(losses[:4]) / 4, sum(losses[4:]) / 4], rel=1e-3
    )
    assert [record["epoch"] for record in trained.phi_history] == [1, 2]
    assert not trained.student.training


@pytest.mark.parametrize(
    ("stage", "step"), [("phi", 3), ("phi", 8), ("student", 1), ("student", 6)]
)
@pytest.mark.parametrize("freeze", [False, True])
def test_interrupted_in_either_stage_and_resumed_equals_uninterrupted(
    tmp_path, stage, step, freeze
):
    whole = make(freeze_phi=freeze)
    history = whole.fit()
    broken = make(tmp_path / "s.pt", freeze_phi=freeze, progress=Interrupts(stage, step))
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    assert (tmp_path / "s-phi.pt").exists()
    assert (tmp_path / "s.pt").exists() == (stage == "student")
    torch.rand(100)
    batches = Batches()
    resumed = make(tmp_path / "s.pt", freeze_phi=freeze, batches=batches)
    again = resumed.fit()
    assert same_weights(whole.student, resumed.student)
    assert [r["loss"] for r in again] == [r["loss"] for r in history]
    assert [r["loss"] for r in resumed.phi_history] == [r["loss"] for r in whole.phi_history]
    left = [*range(step, 8), *range(8)] if stage == "phi" else [*range(step, 8)]
    assert batches.asked == left
    # Nothing is left to do, and the first stage's checkpoint is no longer needed.
    (tmp_path / "s-phi.pt").unlink()
    third = make(tmp_path / "s.pt", freeze_phi=freeze)
    third.fit()
    assert same_weights(whole.student, third.student)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"phi_lr": 0.1}, "the phi in .* lr was 0.001, now 0.1"),
        ({"ssim_weight": 0.1}, "ssim_weight was 0.0, now 0.1"),
        ({"phi_epochs": 3}, "epochs was 2, now 3"),
        ({"explanation_weight": 2.0}, "explanation_weight was 1.0, now 2.0"),
        ({"freeze_phi": True}, "freeze_phi was False, now True"),
        ({"fusion": "gate"}, "fusion was 'concat', now 'gate'"),
    ],
)
def test_resuming_with_other_options_is_refused(tmp_path, change, text):
    make(tmp_path / "s.pt").fit()
    with pytest.raises(ValueError, match=text):
        make(tmp_path / "s.pt", **change).fit()


def test_a_frozen_phi_keeps_every_bit():
    student = explained()
    first = make(student=explained(), freeze_phi=True)
    first.fit()
    alone = make(student=student, freeze_phi=True)
    alone._first.fit()
    after_one = {name: value.clone() for name, value in student.phi.state_dict().items()}
    for name, value in first.student.phi.state_dict().items():
        assert torch.equal(value, after_one[name])
    assert all(p.requires_grad for p in first.student.parameters())
    joint = make().fit()
    assert joint[0]["loss"] != first.history[0]["loss"]


@pytest.mark.parametrize("freeze", [False, True])
def test_a_phi_trained_before_serves_like_one_trained_within(tmp_path, freeze):
    within = make(freeze_phi=freeze)
    within.fit()
    phi = explained().phi
    PhiTrainer(phi, Batches(), SETTINGS, epochs=2, checkpoint=tmp_path / "phi.pt").fit()
    student = explained()
    student.phi.load_state_dict(phi.state_dict())
    make(student=student, freeze_phi=freeze, phi_epochs=0).fit()
    assert same_weights(student, within.student)
    without = make(phi_epochs=0, freeze_phi=freeze)
    without.fit()
    assert not same_weights(without.student, within.student)


def test_the_first_stage_alone_refuses_a_negative_weight():
    with pytest.raises(ValueError, match="ssim_weight"):
        PhiTrainer(explained().phi, Batches(), SETTINGS, epochs=1, ssim_weight=-1.0)


def test_a_phi_that_came_frozen_is_not_trained():
    student = explained()
    student.freeze_phi()
    before = {name: value.clone() for name, value in student.phi.state_dict().items()}
    for options in ({}, {"freeze_phi": True}, {"phi_epochs": 0}):
        with pytest.raises(ValueError, match="student: its phi is frozen, expected freeze_phi"):
            make(student=student, **options)
    make(student=student, freeze_phi=True, phi_epochs=0).fit()
    assert all(torch.equal(before[name], value) for name, value in student.phi.state_dict().items())
    assert student.phi_frozen
    assert not any(p.requires_grad for p in student.phi.parameters())


def test_without_phi_it_is_plain_distillation():
    guide = classifier(99)
    plain = Distiller(classifier(), Batches(0), SETTINGS, teacher=guide)
    history = plain.fit()
    batches = Batches()
    ablation = make(fusion="none", batches=batches, teacher=guide)
    assert [r["loss"] for r in ablation.fit()] == [r["loss"] for r in history]
    assert same_weights(ablation.student.student, plain.student)
    assert batches.asked == list(range(8))


class Halved(nn.Module):
    """A classifier of half the image, which it halves in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.inner, self.in_place = classifier(), in_place

    def forward(self, images):
        return self.inner(images.mul_(0.5) if self.in_place else images * 0.5)


@pytest.mark.parametrize("fusion", [None, "none", "attend", "feature"])
def test_a_student_that_works_in_place_takes_nothing_from_the_teacher(fusion):
    losses = []
    for in_place in (True, False):
        student = Halved(in_place)
        if fusion is None:
            trainer = Distiller(student, Batches(0), SETTINGS, teacher=classifier(99))
        else:
            torch.manual_seed(5)
            phi = None if fusion == "none" else ExplanationAutoencoder(1, **PHI)
            at = "inner.stage4" if fusion == "attend" else None
            trainer = make(student=ExplainedStudent(student, phi, fusion=fusion, at=at))
        losses.append([record["loss"] for record in trainer.fit()])
    assert losses[0] == losses[1]


def test_without_stage_one_it_trains_jointly():
    batches = Batches()
    trained = make(phi_epochs=0, batches=batches)
    before = {name: value.clone() for name, value in trained.student.phi.state_dict().items()}
    trained.fit()
    assert batches.asked == list(range(8))
    assert trained.phi_history == []
    assert not torch.equal(before["head.weight"], trained.student.phi.head.weight)


def test_the_explanation_weight_reaches_phi_and_the_teacher_stays():
    guide = classifier(99).train()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    heavy = make(teacher=guide, explanation_weight=50.0, phi_epochs=0)
    heavy.fit()
    light = make(explanation_weight=0.0, phi_epochs=0)
    light.fit()
    errors = []
    for trained in (heavy, light):
        images, _, maps = next(Batches().iterate(3, 4))
        errors.append(F.mse_loss(trained.student.explain(images), maps).item())
    assert errors[0] < errors[1]
    assert guide.training
    assert all(torch.equal(before[name], value) for name, value in guide.state_dict().items())


@pytest.mark.parametrize("fusion", ["concat", "none"])
def test_the_students_own_map_is_matched(fusion):
    trainer = make(fusion=fusion, match_weight=0.7, match_layer="student.stage4", batches=Batches())
    other = make(fusion=fusion)
    images, labels, maps = next(Batches().iterate(0, 1))
    images, maps = images.double(), maps.double()
    found = []
    for each in (trainer, other):
        torch.manual_seed(0)
        each.teacher.double().eval()
        each.student.double()
        found.append(each._loss(images, labels, maps))
    model = other.student.train()
    targets = other.teacher(images).argmax(1)
    torch.manual_seed(0)
    with fastxkd.capture(model, ["student.stage4"]) as captured:
        logits = model(images)
    features = captured.activations["student.stage4"]
    (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), features)
    cam = (features * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True).relu()
    cam = F.interpolate(cam, (12, 12), mode="bilinear").flatten(1)
    expected = 0.7 * (1 - F.cosine_similarity(cam, maps[:, 0].flatten(1))).mean()
    torch.testing.assert_close(found[0] - found[1], expected)
    for module in (trainer.teacher, trainer.student):
        module.float()
    trainer.fit()
    with pytest.raises(ValueError, match="match_layer: expected a layer of the student"):
        make(match_weight=1.0)
    with pytest.raises(ValueError, match="match_layer: ExplainedStudent has no layer named"):
        make(match_weight=1.0, match_layer="stage4")


@pytest.mark.parametrize("trainer", [XDistiller, MedTEXDistiller])
@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"student": 3}, "student: expected an ExplainedStudent"),
        ({"teacher": "x"}, "teacher: expected a Module, got str"),
        ({"teacher": None}, "teacher: expected a Module, got NoneType"),
        ({"settings": []}, "settings: expected a TrainSettings, got list"),
        ({"batches": None}, r"batches: expected an object with __len__\(\) and .* got NoneType"),
    ],
)
def test_arguments_of_another_kind(trainer, wrong, text):
    given = {"student": explained("mask"), "batches": Batches(), "settings": SETTINGS}
    with pytest.raises(TypeError, match=text):
        trainer(**{**given, "teacher": classifier(99), **wrong})


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"student": classifier()}, TypeError, "student: expected an ExplainedStudent"),
        ({"teacher": None}, TypeError, "teacher: expected a Module, got NoneType"),
        ({"phi_epochs": -1}, ValueError, "phi_epochs: expected 0 or more, got -1"),
        ({"explanation_weight": -1.0}, ValueError, "explanation_weight: expected a finite"),
        ({"phi_lr": 0.0}, ValueError, "phi_lr: expected a finite number above 0"),
        ({"batches": Batches(0)}, ValueError, "batches: expected images, labels and the teacher's"),
        ({"batches": Batches(2)}, ValueError, r"to have the shape of phi's, \[8, 1, 12, 12\]"),
    ],
)
def test_what_cannot_be_trained_is_named(options, error, text):
    with pytest.raises(error, match=text):
        make(**options).fit()


# --- MedTEX

PAIRS = [("student.stage2", "stage2"), ("student.stage4", "stage4")]


def medtex(path=None, **options) -> MedTEXDistiller:
    settings = TrainSettings(epochs=2, batch_size=8, seed=4, ce_weight=0.0, kd_weight=1.0)
    chosen = {"teacher": classifier(99), "layers": PAIRS, **options}
    return MedTEXDistiller(explained("mask"), Batches(0), settings, checkpoint=path, **chosen)


def test_medtex_equals_the_formula_at_its_first_step():
    trainer = medtex(vid_weight=0.3, sparsity_weight=0.7)
    model, guide = trainer.student.double().train(), trainer.teacher.double().eval()
    trainer._criterion.double()
    images, labels = next(Batches(0).iterate(0, 1))
    images = images.double()
    torch.manual_seed(0)
    found = trainer._loss(images, labels)
    torch.manual_seed(0)
    mask = model.phi(images)
    with fastxkd.capture(model, [own for own, _ in PAIRS]) as own:
        logits = model.student(images * mask)
    with torch.no_grad(), fastxkd.capture(guide, [name for _, name in PAIRS]) as teacher:
        p = (guide(images) / 4).softmax(1)
    expected = 16 * F.kl_div((logits / 4).log_softmax(1), p, reduction="batchmean")
    expected = expected + 0.7 * mask.mean()
    for vid, (s, t) in zip(trainer._criterion.vid, PAIRS, strict=True):
        mean = vid.regressor(own.activations[s])
        variance = vid.variance().view(1, -1, 1, 1)
        error = (teacher.activations[t] - mean) ** 2 / (2 * variance)
        expected = expected + 0.3 * (0.5 * variance.log() + error).mean()
    # The trainer takes the logits' loss in float32.
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)


def test_medtex_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    whole = medtex()
    history = whole.fit()
    with pytest.raises(KeyboardInterrupt):
        medtex(tmp_path / "m.pt", on_step=stop_at(5, raise_interrupt)).fit()
    torch.rand(100)
    resumed = medtex(tmp_path / "m.pt")
    assert [r["loss"] for r in resumed.fit()] == [r["loss"] for r in history]
    assert same_weights(whole.student, resumed.student)
    assert same_weights(whole._criterion, resumed._criterion)
    start = medtex()._criterion.state_dict()
    assert any(not torch.equal(start[k], v) for k, v in whole._criterion.state_dict().items())
    with pytest.raises(ValueError, match=r"sparsity_weight was 0\.01, now 0\.5"):
        medtex(tmp_path / "m.pt", sparsity_weight=0.5).fit()


def test_sparsity_closes_the_mask():
    images, _ = next(Batches(0).iterate(0, 1))
    means = []
    for weight in (0.0, 20.0):
        trainer = medtex(layers=[], sparsity_weight=weight)
        trainer.fit()
        means.append(trainer.student.explain(images).mean().item())
    assert means[1] < means[0] - 0.05


def test_medtex_names_what_is_missing():
    with pytest.raises(ValueError, match=r"layers of the student: .* no layer named 'stage9'"):
        medtex(layers=[("stage9", "stage2")])
    for layers in (["stage2"], [("student.stage2", "stage2", "stage3")], [(1, 2)]):
        with pytest.raises(ValueError, match="layers: expected pairs of names"):
            medtex(layers=layers)
    with pytest.raises(TypeError, match="teacher: expected a Module, got NoneType"):
        medtex(teacher=None)
    with pytest.raises(TypeError, match="vid_options: expected a dict, got int"):
        medtex(vid_options=3)
    with pytest.raises(TypeError, match="student: expected an ExplainedStudent with a phi"):
        MedTEXDistiller(explained("none"), Batches(0), SETTINGS, teacher=classifier(9))


# --- the teacher's explanations


def test_explanations_are_those_of_the_explainers():
    guide, images = classifier(99).eval(), torch.randn(3, 1, 12, 12)
    names = ["gradcam", "layercam", "integrated_gradients", "occlusion", "input_x_gradient"]
    explain = TeacherExplanations(
        guide, names, target_layers=["stage4"], options={"integrated_gradients": {"steps": 4}}
    )
    maps = explain(images)
    targets = guide(images).argmax(1)
    assert maps.shape == (3, 5, 12, 12)
    assert explain.maps == 5
    torch.testing.assert_close(maps[:, 0], fastxkd.GradCAM(guide, ["stage4"])(images, targets))
    torch.testing.assert_close(maps[:, 1], fastxkd.LayerCAM(guide, ["stage4"])(images, targets))
    from fastxkd.cam.attribution import attribution_maps, integrated_gradients

    found = attribution_maps(integrated_gradients(guide, images, targets, steps=4))
    torch.testing.assert_close(maps[:, 2], found)
    mean = TeacherExplanations(
        guide, names, target_layers=["stage4"], join="mean", options=explain.options
    )
    torch.testing.assert_close(mean(images), maps.mean(1, keepdim=True))
    assert mean.maps == 1


def test_the_teacher_sees_no_more_than_a_batch_at_once():
    # In float64: the formulas of all six are held, not their rounding in other orders.
    guide, images, seen = classifier(99).double(), torch.randn(9, 1, 12, 12).double(), []
    guide.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    names = ["gradcam", "eigencam", "scorecam", "input_x_gradient", "gradient_shap", "occlusion"]
    found = []
    for size in (4, 1000):
        explain = TeacherExplanations(guide, names, target_layers="stage4", batch_size=size)
        found.append(explain(images))
        assert (max(seen) <= 4) == (size == 4)
    torch.testing.assert_close(*found, rtol=0, atol=2e-7)  # maps are float32


def test_gradient_shap_draws_the_same_for_the_same_draw():
    # Without noise this network's gradient is the same all the way to an image of zeros.
    noisy = {"gradient_shap": {"samples": 2, "noise": 0.3}}
    explain = TeacherExplanations(classifier(99), "gradient_shap", seed=3, options=noisy)
    images = torch.randn(2, 1, 12, 12)
    assert torch.equal(explain(images, draw=1), explain(images, draw=1))
    assert not torch.equal(explain(images, draw=1), explain(images, draw=2))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"explainers": ["lime"]}, "explainers: expected different ones of gradcam"),
        ({"explainers": []}, "explainers: expected different ones .* got none"),
        ({"explainers": ["gradcam", "gradcam"]}, "explainers: expected different"),
        ({"explainers": "gradcam"}, "target_layers: gradcam needs the teacher's layer"),
        ({"explainers": "occlusion", "join": "sum"}, "join: expected one of concat, mean"),
        (
            {"explainers": "occlusion", "options": {"gradcam": {}}},
            "options: 'gradcam' is not one of the explainers",
        ),
        (
            {"explainers": "occlusion", "options": {"occlusion": {"size": 3}}},
            "options: occlusion takes window, stride, baseline, batch_size, got 'size'",
        ),
        (
            {"explainers": "gradient_shap", "options": {"gradient_shap": {"generator": None}}},
            "options: gradient_shap takes baselines, samples, noise, batch_size, got 'generator'",
        ),
    ],
)
def test_explanations_that_cannot_be_made(options, text):
    with pytest.raises(ValueError, match=text):
        TeacherExplanations(classifier(99), **options)


def test_a_batch_size_of_an_explainer_s_own():
    for name in ("gradcam", "occlusion"):
        options = {name: {"batch_size": 2}}
        explain = TeacherExplanations(classifier(9), name, target_layers="stage4", options=options)
        assert explain(torch.randn(3, 1, 12, 12)).shape == (3, 1, 12, 12)
    for wrong in ({"options": 3}, {"options": {"gradcam": 3}}, {"seed": 0.5}, {"explainers": 3}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            TeacherExplanations(classifier(9), **{"target_layers": "stage4", **wrong})


def test_amp_trains_both_in_bfloat16():
    settings = TrainSettings(epochs=1, batch_size=8, amp=True)
    seen = []
    for trainer in (
        XDistiller(
            explained("gate"),
            Batches(),
            settings,
            teacher=classifier(99),
            phi_epochs=1,
            ssim_weight=0.1,
            match_weight=1.0,
            match_layer="student.stage4",
        ),
        MedTEXDistiller(
            explained("mask"), Batches(0), settings, teacher=classifier(99), layers=PAIRS
        ),
    ):
        seen.clear()
        for module in (trainer.student.phi.head, trainer.student.student.stage4):
            module.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
        history = trainer.fit()
        assert set(seen) == {torch.bfloat16}
        assert math.isfinite(history[0]["loss"])
        assert all(p.dtype == torch.float32 for p in trainer.student.parameters())


# --- the page


def test_the_page_runs():
    page = (Path(__file__).parents[1] / "docs" / "xdistillation.md").read_text("utf-8")
    scope: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/xdistillation.md", "exec"), scope)
    assert scope["drawn"].shape == (8, 2, 28, 28)
    assert 0 <= scope["found"].means()["insertion"] <= 1
