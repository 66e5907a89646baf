"""How faithful the students of a run are to the teacher, and pictures of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastxkd.metrics.agreement import (
    cosine_agreement,
    pearson_agreement,
    ssim_agreement,
    top_agreement,
)
from fastxkd.metrics.fidelity import ExplanationFidelity, explanation_fidelity, joined
from fastxkd.runs.answers import accuracy, balanced
from fastxkd.runs.data import ImageData
from fastxkd.train.fusion import ExplainedStudent
from fastxkd.train.teacher_maps import TeacherExplanations

# Points of the deletion and insertion curves: each is a pass of the teacher over all images.
CURVE_STEPS = 14
_BATCH = 64
_TOP = (0.1, 0.2)


@dataclass
class FidelityRow:
    """One model under one explainer; ``phi`` has no answers of its own."""

    role: str
    explainer: str
    accuracy: float | None
    agreement: float | None
    divergence: float | None
    cosine: float
    pearson: float
    ssim: float
    top_10: float
    top_20: float
    deletion: float | None
    insertion: float | None


@dataclass
class Difference:
    """Mean over images of the student's cosine less the other's, with a 95 % interval."""

    explainer: str
    against: str
    value: float
    low: float
    high: float


@dataclass
class FidelityItem:
    """One image and maps of it: (role, explainer) -> [h, w] in [0, 1]."""

    image: np.ndarray
    label: str
    maps: dict[tuple[str, str], np.ndarray]
    cosine: dict[tuple[str, str], float]


@dataclass
class Fidelity:
    """A section of the report."""

    method: str
    fusion: str
    matched: bool
    images: int
    rows: list[FidelityRow]
    differences: list[Difference]
    gallery: list[FidelityItem]


def measure_fidelity(
    models: Mapping[str, nn.Module],
    data: ImageData,
    *,
    layers: Mapping[str, str],
    method: str,
    explainers: Sequence[str] = ("gradcam",),
    join: str = "concat",
    sign: str = "absolute",
    matched: bool = False,
    device: torch.device | str = "cpu",
    images: int = 128,
    gallery: int = 12,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Fidelity:
    """Compare base, kd (where there is one) and student with the teacher on test images.

    Every explainer is run in the same way on all models, on the teacher's first choice, at the
    last layer that is compared; phi's maps are compared with the teacher's as they are.

    Args:
        models: ``teacher``, ``student`` (an :class:`ExplainedStudent`), ``base``, perhaps ``kd``.
        layers: of teacher, base and student; kd is of the base's make.
        matched: whether the student's own maps were trained to be the teacher's.
        images: balanced over the classes.

    Raises:
        ValueError: none of the images can be read.
    """
    roles = [role for role in ("base", "kd", "student") if role in models]
    names = ["gradcam"] if method == "medtex" else list(explainers)
    place = {**layers, "kd": layers["base"]}
    explain = {
        (role, name): TeacherExplanations(
            models[role], [name], target_layers=[place[role]], sign=sign, seed=seed
        )
        for role in ("teacher", *roles)
        for name in names
    }
    student = models["student"]
    assert isinstance(student, ExplainedStudent)
    for model in models.values():
        model.to(device).eval()
    order = balanced(data.test.labels, np.arange(len(data.test)), images)
    found: dict[tuple[str, str], list[ExplanationFidelity]] = {}
    drawn: dict[str, list[list[Tensor]]] = {}
    items: list[FidelityItem] = []
    seen = 0
    for batch in data.batches(data.test, _BATCH, order):
        pixels = data.normalize(batch.images, device)
        with torch.no_grad():
            targets = models["teacher"](pixels).argmax(1)
            own = None if student.phi is None else student.explain(pixels)
        maps: dict[tuple[str, str], Tensor] = {}
        for name in names:
            guide = explain["teacher", name](pixels, targets)[:, 0]
            maps["teacher", name] = guide
            for role in roles:
                maps[role, name] = explain[role, name](pixels, targets)[:, 0]
                fidelity = explanation_fidelity(
                    models[role],
                    models["teacher"],
                    pixels,
                    _given(maps[role, name]),
                    _given(guide),
                    fractions=_TOP,
                    steps=min(CURVE_STEPS, pixels.shape[2]),
                )
                found.setdefault((role, name), []).append(fidelity)
        if own is not None:
            for at, (name, guide) in enumerate(_guides(maps, names, join).items()):
                maps["phi", name] = own[:, at]
                drawn.setdefault(name, []).append(_similar(own[:, at], guide))
        items += _items(data, batch, maps, gallery - len(items))
        seen += len(pixels)
        if progress is not None:
            progress("fidelity", seen, len(order))
    if not seen:
        raise ValueError(f"data: none of the test images of {data.spec!r} can be read")
    whole = {key: joined(parts) for key, parts in found.items()}
    right = {
        role: accuracy(models[role], data, data.test, 256, torch.device(device)) for role in roles
    }
    rows = [_row(role, name, value, right[role]) for (role, name), value in whole.items()]
    rows += [_phi_row(name, parts) for name, parts in drawn.items()]
    differences = [
        _difference(name, other, whole["student", name].cosine - whole[other, name].cosine)
        for name in names
        for other in roles[:-1]
    ]
    return Fidelity(method, student.fusion, matched, seen, rows, differences, items)


def _given(maps: Tensor) -> Callable[..., Tensor]:
    return lambda images, targets: maps


def _guides(
    maps: Mapping[tuple[str, str], Tensor], names: Sequence[str], join: str
) -> dict[str, Tensor]:
    """What each of phi's maps was to be like."""
    each = [maps["teacher", name] for name in names]
    if join == "mean" and len(names) > 1:
        return {"mean": torch.stack(each).mean(0)}
    return dict(zip(names, each, strict=True))


def _similar(own: Tensor, guide: Tensor) -> list[Tensor]:
    side = min(11, *own.shape[1:])
    values = [
        cosine_agreement(own, guide),
        pearson_agreement(own, guide),
        ssim_agreement(own, guide, window=side - 1 + side % 2),
        *(top_agreement(own, guide, fraction=share) for share in _TOP),
    ]
    return [value.double().cpu() for value in values]


def _row(role: str, name: str, value: ExplanationFidelity, right: float) -> FidelityRow:
    means = value.means()
    return FidelityRow(
        role,
        name,
        right,
        **{key: means.get(key, math.nan) for key in _MEASURES},
    )


_MEASURES = (
    "agreement",
    "divergence",
    "cosine",
    "pearson",
    "ssim",
    "top_10",
    "top_20",
    "deletion",
    "insertion",
)


def _phi_row(name: str, parts: list[list[Tensor]]) -> FidelityRow:
    cosine, pearson, ssim, first, second = (
        float(torch.cat(each).mean()) for each in zip(*parts, strict=True)
    )
    return FidelityRow(
        "phi", name, None, None, None, cosine, pearson, ssim, first, second, None, None
    )


def _difference(explainer: str, against: str, values: Tensor) -> Difference:
    mean = float(values.mean())
    spread = float(values.std()) if len(values) > 1 else math.nan
    reach = 1.96 * spread / math.sqrt(len(values))
    return Difference(explainer, against, mean, mean - reach, mean + reach)


def _items(
    data: ImageData, batch: Any, maps: Mapping[tuple[str, str], Tensor], most: int
) -> list[FidelityItem]:
    pictures = batch.images.expand(-1, 3, -1, -1) if batch.images.shape[1] == 1 else batch.images
    guides = {name: value for (role, name), value in maps.items() if role == "teacher"}
    cosine = {
        key: cosine_agreement(value, guides[key[1]])
        for key, value in maps.items()
        if key[0] != "teacher" and key[1] in guides
    }
    return [
        FidelityItem(
            pictures[row, :3].permute(1, 2, 0).contiguous().numpy(),
            data.classes[int(batch.labels[row])],
            {key: value[row].cpu().numpy() for key, value in maps.items()},
            {key: float(value[row]) for key, value in cosine.items()},
        )
        for row in range(min(max(most, 0), len(batch.labels)))
    ]
