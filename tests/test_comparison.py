"""The comparison: every number against the same number worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from fastxkd import GradCAM, UniCAM, metrics
from fastxkd.metrics.pooling import compared_size
from fastxkd.runs.answers import balanced
from fastxkd.runs.cnn import SmallCNN
from fastxkd.runs.comparison import compare_models
from fastxkd.runs.data import ArraySplit, ImageData, load_data
from tests.conftest import needs
from tests.test_data import write_images

SCORES = (
    "fss",
    "fss_teacher",
    "rs_student",
    "rs_base",
    "rs_teacher",
    "rs_distilled",
    "rs_residual",
)
SPECS = {"teacher": "large", "base": "small", "student": "small"}


def tiny_data(count: int = 40, classes: int = 3, size: int = 12) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(count) % classes
    images = torch.randint(0, 256, (count, 1, size, size), generator=generator).to(torch.uint8)
    names = [f"class {number}" for number in range(classes)]
    split = ArraySplit(images, labels)
    return ImageData("tiny", names, split, split, 1, size, (0.5,), (0.5,), "noise")


def network(seed: int, outputs: int = 3, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    widths = (width, width, 2 * width, 2 * width)
    return SmallCNN(widths, (1, 1, 1, 1), num_classes=outputs, in_channels=1).eval()


def three(**options) -> dict[str, nn.Module]:
    return {
        "teacher": network(1, width=6, **options),
        "base": network(2, **options),
        "student": network(3, **options),
    }


def compared(models=None, data=None, **options):
    models = models or three()
    return compare_models(models, data or tiny_data(), specs=SPECS, title="t", **options)


def features(model: nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("stage1", "stage2", "stage3", "stage4"):
        pixels = getattr(model, name)(pixels)
        found[name] = pixels
    return found


def test_models_in_numbers():
    data, models = tiny_data(), three()
    result = compared(models, data, batch_size=7)
    pixels = data.normalize(data.test.images)
    truth = torch.from_numpy(data.test.labels)
    with torch.no_grad():
        logits = {role: model(pixels).double() for role, model in models.items()}
    taught = logits["teacher"].softmax(1)
    assert [model.role for model in result.models] == ["teacher", "base", "student"]
    assert result.samples == 40
    for summary in result.models:
        mine = logits[summary.role]
        assert summary.accuracy == pytest.approx((mine.argmax(1) == truth).double().mean().item())
        same = (mine.argmax(1) == taught.argmax(1)).double().mean().item()
        assert summary.agreement == pytest.approx(same)
        kl = (taught * (taught.log() - mine.log_softmax(1))).sum(1).mean().item()
        assert summary.divergence == pytest.approx(kl, rel=1e-4, abs=1e-9)
        count = sum(p.numel() for p in models[summary.role].parameters())
        assert summary.parameters == count
    assert result.models[0].agreement == 1
    assert result.models[0].explanation_agreement == 1


def test_layers_are_scored_over_all_images():
    data, models = tiny_data(), three()
    result = compared(models, data, batch_size=16)
    pixels, labels = data.normalize(data.test.images), torch.from_numpy(data.test.labels)
    with torch.no_grad():
        taken = {role: features(model, pixels) for role, model in models.items()}
    expected = metrics.layer_scores(
        taken["student"], taken["base"], labels, teacher=taken["teacher"]
    )
    assert [row.layer for row in result.layers] == ["stage1", "stage2", "stage3", "stage4"]
    for row, scores in zip(result.layers, expected, strict=True):
        for name in SCORES:
            assert getattr(row, name) == pytest.approx(getattr(scores, name), abs=1e-5), name


def test_explanations_are_of_the_teachers_class():
    data, models = tiny_data(), three()
    result = compared(models, data, explained=40, gallery=6)
    pixels = data.normalize(data.test.images)
    with torch.no_grad():
        targets = models["teacher"](pixels).argmax(1)
    maps = {
        role: GradCAM(model, ["stage4"])(pixels, targets).flatten(1).double()
        for role, model in models.items()
    }
    for summary in result.models[1:]:
        cosine = nn.functional.cosine_similarity(maps[summary.role], maps["teacher"]).mean()
        assert summary.explanation_agreement == pytest.approx(cosine.item(), abs=1e-5)
    images = [data.test.images[i, 0].numpy() for i in range(40)]
    for item in result.gallery:
        (at,) = [i for i in range(40) if np.array_equal(images[i], item.image[:, :, 1])]
        assert item.image.shape == (12, 12, 3)
        assert item.label == data.classes[data.test.labels[at]]
        for role in models:
            np.testing.assert_allclose(item.maps[role].ravel(), maps[role][at].numpy(), atol=1e-5)
            with torch.no_grad():
                chance = models[role](pixels[at : at + 1]).softmax(1)[0]
            name, probability = item.predictions[role]
            assert name == data.classes[int(chance.argmax())]
            assert probability == pytest.approx(chance.max().item(), rel=1e-4)
        assert set(item.similarity) == {"base", "student", "distilled", "residual"}
        for key, value in item.similarity.items():
            a, b = item.maps[key].ravel(), item.maps["teacher"].ravel()
            norm = max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12)
            assert value == pytest.approx(a @ b / norm, abs=1e-4)


def test_unicam_sees_the_explained_images_together():
    data, models = tiny_data(), three()
    result = compared(models, data, explained=40, gallery=4)
    # Same images, other order: UniCAM does not depend on the order within its batch.
    out = UniCAM(models["student"], models["base"], ["stage4"])(
        data.normalize(data.test.images), torch.from_numpy(data.test.labels)
    )
    images = data.test.images[:, 0].numpy()
    for item in result.gallery:
        (at,) = [i for i in range(40) if np.array_equal(images[i], item.image[:, :, 0])]
        np.testing.assert_allclose(item.maps["distilled"], out.distilled[at], atol=1e-3)
        np.testing.assert_allclose(item.maps["residual"], out.residual[at], atol=1e-3)


class _Fixed(nn.Module):
    """Answers by a table of the image's first pixel, through one spatial layer."""

    def __init__(self, answers: list[int]) -> None:
        super().__init__()
        self.layer1 = nn.Conv2d(1, 3, 3, padding=1)
        self.answers = torch.tensor(answers)

    def forward(self, pixels):
        pooled = self.layer1(pixels).mean((2, 3))
        rows = ((pixels[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().long()
        return 1e-3 * pooled + nn.functional.one_hot(self.answers[rows], 3)


def test_gallery_shows_wins_losses_and_agreement():
    data = tiny_data(count=24)
    data.test.images[:, 0, 0, 0] = torch.arange(24)
    truth = data.test.labels.tolist()
    wrong = [(label + 1) % 3 for label in truth]
    student = [t if i >= 6 else w for i, (t, w) in enumerate(zip(truth, wrong, strict=True))]
    base = [t if i < 12 else w for i, (t, w) in enumerate(zip(truth, wrong, strict=True))]
    models = {"teacher": _Fixed(truth), "base": _Fixed(base), "student": _Fixed(student)}
    result = compared(models, data, gallery=8, layers=["layer1"])
    kinds = [
        (item.predictions["student"][0] == item.label, item.predictions["base"][0] == item.label)
        for item in result.gallery
    ]
    assert kinds[:6] == [(True, False)] * 4 + [(False, True)] * 2
    # The teacher is always right here, so whatever agrees with it is right too.
    assert [student for student, _ in kinds[6:]] == [True, True]
    assert {item.label for item in result.gallery[:3]} == set(data.classes)
    again = compared(models, data, gallery=8, layers=["layer1"])
    for item, same in zip(result.gallery, again.gallery, strict=True):
        assert np.array_equal(item.image, same.image)


def test_outputs_that_are_not_the_classes_of_the_data():
    models = three(outputs=7)
    result = compared(models, outputs=["zero", "one"], gallery=5)
    assert all(math.isnan(model.accuracy) for model in result.models)
    assert all(0 <= model.agreement <= 1 for model in result.models)
    known = {"zero", "one", *(f"output {number}" for number in range(2, 7))}
    assert {item.predictions["teacher"][0] for item in result.gallery} <= known
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert [model["accuracy"] for model in content["models"]] == [None] * 3
    assert content["run"]["accuracy_defined"] is False


def test_json_holds_everything_but_pictures():
    result = compared(history={"student": [{"epoch": 1, "loss": np.float32(0.5)}]}, gallery=3)
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert set(content) == {
        "title", "models", "layers", "gallery", "classes", "samples", "history", "run",
    }  # fmt: skip
    assert content["history"]["student"][0]["loss"] == 0.5
    assert len(content["gallery"]) == 3
    assert "image" not in content["gallery"][0]
    assert "maps" not in content["gallery"][0]


def test_teacher_may_serve_as_base():
    models = three()
    models["base"] = models["teacher"]
    result = compared(models)
    assert [row.base_layer for row in result.layers] == [row.teacher_layer for row in result.layers]
    for row in result.layers:
        assert row.fss == pytest.approx(row.fss_teacher, abs=1e-6)
        assert row.rs_base == pytest.approx(row.rs_teacher, abs=1e-6)


def test_samples_are_capped_and_balanced():
    data = tiny_data(count=60)
    result = compared(data=data, max_samples=9)
    assert result.samples == 60
    assert result.run["score_samples"] == 9
    order = balanced(np.array([0, 0, 0, 0, 1, 1, 2]), np.arange(7), 5)
    assert order.tolist() == [0, 4, 6, 1, 5]


def test_large_maps_are_averaged_over_blocks():
    assert compared_size([64, 56, 56], 16_384) == [64, 16, 16]
    assert compared_size([4, 12, 12], 16_384) == [4, 12, 12]
    assert compared_size([40_000, 7, 7], 16_384) == [40_000, 1, 1]
    assert compared_size([512], 100) == [512]
    models, data = three(), tiny_data()
    result = compared(models, data, feature_limit=64)
    assert result.run["features"]["student"]["stage1"] == "4 x 12 x 12, averaged to 4 x 4 x 4"
    assert result.run["features"]["student"]["stage3"] == "8 x 3 x 3, averaged to 8 x 2 x 2"
    pixels, labels = data.normalize(data.test.images), torch.from_numpy(data.test.labels)
    with torch.no_grad():
        pooled = {
            role: {
                name: nn.functional.adaptive_avg_pool2d(
                    value, compared_size(value.shape[1:], 64)[1:]
                )
                for name, value in features(model, pixels).items()
            }
            for role, model in models.items()
        }
    expected = metrics.layer_scores(
        pooled["student"], pooled["base"], labels, teacher=pooled["teacher"]
    )
    for row, scores in zip(result.layers, expected, strict=True):
        assert row.rs_student == pytest.approx(scores.rs_student, abs=1e-5)


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match="same number of outputs from all three, got teacher 7"):
        compared({**three(), "teacher": network(1, outputs=7)})
    with pytest.raises(ValueError, match="at least 4 readable test images are needed, got 3"):
        compared(data=tiny_data(count=3))
    broken = three()
    with torch.no_grad():
        broken["base"].head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="base: its outputs are not all finite"):
        compared(broken)
    with pytest.raises(ValueError, match=r"student: expected logits \[40, classes\]"):
        compared({**three(), "student": three()["student"].stage1})
    with pytest.raises(ValueError, match="expected teacher, base and student, got no base"):
        compared({"teacher": network(1), "student": network(2)})
    with pytest.raises(ValueError, match="gallery: expected at least 0, got -1"):
        compared(gallery=-1)


def test_damaged_images_are_in_no_number(tmp_path):
    needs("PIL.Image")
    write_images(tmp_path, {"a": 8, "b": 8}, size=(16, 16))
    for name in ("a/00.png", "b/07.png"):
        (tmp_path / name).write_bytes(b"damaged")
    data = load_data(f"imagefolder:{tmp_path}", image_size=16, held_out=0)

    def colour(seed):
        torch.manual_seed(seed)
        return SmallCNN((4, 4, 4, 4), (1, 1, 1, 1), num_classes=2, in_channels=3)

    models = {"teacher": colour(1), "base": colour(2), "student": colour(3)}
    result = compared(models, data, batch_size=4, gallery=14)
    assert result.samples == 14
    assert result.run["score_samples"] == 14
    assert len(result.gallery) == 14
    assert len(data.skipped) == 2
