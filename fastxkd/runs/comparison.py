"""Teacher, base and student side by side: what they answer, what they hold, where they look."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastxkd import metrics
from fastxkd.runs.answers import (
    ROLES,
    Answers,
    accuracy_defined,
    agreement,
    ask,
    correct,
    divergence,
)
from fastxkd.runs.data import ImageData
from fastxkd.runs.explanations import cosines, explain, explained_order
from fastxkd.runs.fidelity import Fidelity
from fastxkd.runs.layers import choose_layers

# Above this many numbers per image a feature map is averaged over blocks before it is compared.
FEATURE_LIMIT = 16_384


@dataclass
class ModelSummary:
    """One model in numbers; ``accuracy`` is NaN where its outputs are not the data's classes."""

    role: str
    spec: str
    parameters: int
    accuracy: float
    agreement: float
    divergence: float
    explanation_agreement: float


@dataclass
class LayerRow:
    """FSS and RS of one student layer with the base and teacher layers it is paired with."""

    layer: str
    base_layer: str
    teacher_layer: str | None
    fss: float
    fss_teacher: float | None
    rs_student: float
    rs_base: float
    rs_teacher: float | None
    rs_distilled: float
    rs_residual: float


@dataclass
class GalleryItem:
    """One explained image; ``similarity`` is each map's cosine with the teacher's Grad-CAM."""

    image: np.ndarray
    label: str
    predictions: dict[str, tuple[str, float]]
    maps: dict[str, np.ndarray]
    similarity: dict[str, float]


@dataclass
class Comparison:
    """Everything a report says; plain numbers, text and NumPy arrays."""

    title: str
    models: list[ModelSummary]
    layers: list[LayerRow]
    gallery: list[GalleryItem]
    classes: list[str]
    samples: int
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    fidelity: Fidelity | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything but pictures, ready for ``json.dump``; NaN becomes None."""
        content = {
            "title": self.title,
            "models": [asdict(model) for model in self.models],
            "layers": [asdict(layer) for layer in self.layers],
            "gallery": [
                {"label": i.label, "predictions": i.predictions, "similarity": i.similarity}
                for i in self.gallery
            ],
            "classes": self.classes,
            "samples": self.samples,
            "history": self.history,
            "run": self.run,
        }
        if self.fidelity is not None:
            content["fidelity"] = {
                "method": self.fidelity.method,
                "fusion": self.fidelity.fusion,
                "matched": self.fidelity.matched,
                "images": self.fidelity.images,
                "rows": [asdict(row) for row in self.fidelity.rows],
                "differences": [asdict(each) for each in self.fidelity.differences],
            }
        return _plain(content)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def check_sizes(gallery: int, max_samples: int, explained: int, feature_limit: int) -> None:
    """Raise ValueError for a size that :func:`compare_models` could not work with."""
    for name, value, least in (
        ("gallery", gallery, 0),
        ("max_samples", max_samples, 4),
        ("explained", explained, 4),
        ("feature_limit", feature_limit, 1),
    ):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def compare_models(
    models: dict[str, nn.Module],
    data: ImageData,
    *,
    specs: dict[str, str],
    title: str,
    layers: Sequence[str] | None = None,
    base_layers: Sequence[str] | None = None,
    teacher_layers: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    max_samples: int = 1000,
    gallery: int = 12,
    explained: int = 128,
    feature_limit: int = FEATURE_LIMIT,
    outputs: Sequence[str] | None = None,
    history: dict[str, list[dict[str, Any]]] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Compare three models on ``data.test``.

    - Accuracy, top-1 agreement with the teacher and KL(teacher || model) are means over all test
      images. Accuracy needs models with one output per class of the data; it is NaN otherwise.
    - FSS and RS per layer come from one sweep over the distances between ``max_samples`` images
      (balanced over the classes). A layer's feature is its flattened activation; maps of more than
      ``feature_limit`` numbers per image are first averaged over blocks, the largest grid that
      fits. ``run["features"]`` names the shapes.
    - Grad-CAM explains the teacher's top-1 class in all three models, at each one's last compared
      layer. ``explanation_agreement`` is the mean cosine with the teacher's map over ``explained``
      images balanced over the classes. UniCAM runs on batches of up to 64, with the labels as the
      task.
    - The gallery takes, alternately over the classes: images that only the student has right (at
      most half), images that only the base has right (at most a quarter), then images that teacher
      and student agree on. Where accuracy is not defined, "right" means "as the teacher says".
      Within each group the first image of each class comes first; nothing is chosen by its map.

    Args:
        models: ``teacher``, ``base`` and ``student``; base may be the same object as teacher.
        specs: role -> how the model was named, for the report.
        layers: of the student; default :func:`fastxkd.runs.models.default_layers`.
        base_layers: default: those of the student, or of the teacher if that is the base's model.
        teacher_layers: default: the teacher's own default layers, paired from the last one.
        outputs: names of the models' outputs where they are not the data's classes.
        progress: called with (what, done, total).

    Raises:
        ValueError: fewer than 4 test images, models whose outputs do not match each other, layers
            that do not pair, outputs that are not finite.
    """
    missing = [role for role in ROLES if role not in models]
    if missing:
        raise ValueError(f"models: expected teacher, base and student, got no {missing[0]}")
    check_sizes(gallery, max_samples, explained, feature_limit)
    device = torch.device(device)
    for model in models.values():
        model.to(device).eval()
    report = progress or (lambda what, done, total: None)
    example = next(data.batches(data.test, 2), None)
    if example is None:
        raise ValueError(f"data: none of the test images of {data.spec!r} can be read")
    pixels = data.normalize(example.images, device)
    paired = choose_layers(
        models,
        pixels,
        student=layers,
        base=base_layers,
        teacher=teacher_layers,
    )
    answers = ask(models, data, paired, batch_size, max_samples, feature_limit, device, report)
    right = correct(answers, data)
    rows = _layer_rows(answers, paired)
    answers.features = {}

    order, sampled = explained_order(answers, right, gallery, max(explained, 4))
    shown = order[: min(gallery, len(answers.labels))]
    maps = explain(models, data, answers, order, paired, device, report)
    similarity = {role: cosines(maps[role], maps["teacher"]) for role in maps if role != "teacher"}
    defined = accuracy_defined(answers, data)
    summaries = [
        ModelSummary(
            role,
            specs[role],
            sum(parameter.numel() for parameter in models[role].parameters()),
            right[role].float().mean().item() if defined else math.nan,
            agreement(answers, role),
            divergence(answers, role),
            1.0 if role == "teacher" else similarity[role][torch.from_numpy(sampled)].mean().item(),
        )
        for role in ROLES
    ]
    names = list(data.classes) if defined else list(outputs or [])
    items = _gallery_items(data, answers, shown, maps, similarity, names)
    return Comparison(
        title,
        summaries,
        rows,
        items,
        list(data.classes),
        len(answers.labels),
        history or {},
        {
            "features": {
                "what": "flattened activations; larger maps averaged over blocks first",
                "most numbers per image": feature_limit,
                **answers.shapes,
            },
            "score_samples": len(answers.scored_labels),
            "explained_images": int(sampled.sum()),
            "explained_class": "the teacher's top-1",
            "explained_layers": {role: names_[-1] for role, names_ in paired.items()},
            "accuracy_defined": defined,
        },
    )


def _layer_rows(answers: Answers, layers: dict[str, list[str]]) -> list[LayerRow]:
    features = answers.features
    labels = answers.scored_labels.to(next(iter(features["student"].values())).device)
    scores = metrics.layer_scores(
        features["student"], features["base"], labels, teacher=features["teacher"]
    )
    return [
        LayerRow(
            layer,
            base_layer,
            teacher_layer,
            found.fss,
            found.fss_teacher,
            found.rs_student,
            found.rs_base,
            found.rs_teacher,
            found.rs_distilled,
            found.rs_residual,
        )
        for layer, base_layer, teacher_layer, found in zip(
            layers["student"], layers["base"], layers["teacher"], scores, strict=True
        )
    ]


def _gallery_items(
    data: ImageData,
    answers: Answers,
    shown: np.ndarray,
    maps: dict[str, Tensor],
    similarity: dict[str, Tensor],
    names: list[str],
) -> list[GalleryItem]:
    if not len(shown):
        return []
    images = data.test.load(answers.indices[shown]).images
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
    items = []
    for row, position in enumerate(shown.tolist()):
        predictions = {}
        for role in ROLES:
            probability, output = answers.logits[role][position].softmax(0).max(0)
            number = int(output)
            name = names[number] if number < len(names) else f"output {number}"
            predictions[role] = (name, float(probability))
        items.append(
            GalleryItem(
                images[row].permute(1, 2, 0).contiguous().numpy(),
                data.classes[int(answers.labels[position])],
                predictions,
                {key: value[row].numpy() for key, value in maps.items()},
                {key: float(value[row]) for key, value in similarity.items()},
            )
        )
    return items
