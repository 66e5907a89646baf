"""Which images of a comparison are explained, and their maps."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxkd import GradCAM, UniCAM
from fastxkd.runs.answers import ROLES, Answers, balanced
from fastxkd.runs.data import ImageData

# A batch of UniCAM: its distances are between all images of the batch, so more is better, but
# every image's activations are held at once.
UNICAM_BATCH = 64


def explained_order(
    answers: Answers, right: dict[str, Tensor], gallery: int, explained: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions in ``answers`` of the images to explain, and which of them a mean may be over.

    Those of the gallery, chosen by who has them right, come first. Means are over the first
    ``explained`` images balanced over the classes, whether the gallery has them or not.
    """
    labels = answers.labels.numpy()
    student, base, teacher = (right[role].numpy() for role in ("student", "base", "teacher"))
    agreeing = (answers.logits["student"].argmax(1) == answers.logits["teacher"].argmax(1)).numpy()
    chosen: list[int] = []
    for group, most, until in (
        (student & ~base, (gallery + 1) // 2, gallery),
        (base & ~student, gallery // 4, gallery),
        (agreeing & teacher, gallery, gallery),
        (np.ones(len(labels), dtype=bool), gallery, gallery),
    ):
        left = np.setdiff1d(np.flatnonzero(group), chosen)
        chosen += balanced(labels, left, min(most, until - len(chosen))).tolist()
    sample = balanced(labels, np.arange(len(labels)), explained)
    order = np.asarray([*chosen, *sample[~np.isin(sample, chosen)]], dtype=np.int64)
    return order, np.isin(order, sample)


def explain(
    models: dict[str, nn.Module],
    data: ImageData,
    answers: Answers,
    order: np.ndarray,
    layers: dict[str, list[str]],
    device: torch.device,
    report: Callable[[str, int, int], None],
) -> dict[str, Tensor]:
    """Maps of the explained images, [n, H, W] each: Grad-CAM by role, distilled, residual."""
    last = {role: layers[role][-1:] for role in ROLES}
    targets = answers.logits["teacher"].argmax(1)
    unicam = UniCAM(
        models["student"],
        models["base"],
        target_layers=last["student"],
        base_layers=last["base"],
    )
    parts: dict[str, list[Tensor]] = {key: [] for key in (*ROLES, "distilled", "residual")}
    for chunk in _even_chunks(order, UNICAM_BATCH):
        batch = data.test.load(answers.indices[chunk])
        pixels = data.normalize(batch.images, device)
        for role in ROLES:
            with GradCAM(models[role], target_layers=last[role]) as cam:
                parts[role].append(cam(pixels, targets[chunk].to(device)).cpu())
        out = unicam(pixels, answers.labels[chunk].to(device))
        parts["distilled"].append(out.distilled.float().cpu())
        parts["residual"].append(out.residual.float().cpu())
        report("explanations", sum(map(len, parts["teacher"])), len(order))
    return {key: torch.cat(maps) for key, maps in parts.items()}


def _even_chunks(order: np.ndarray, most: int) -> list[np.ndarray]:
    """Contiguous chunks of nearly equal size, so that none is too small for UniCAM."""
    return np.array_split(order, max(1, math.ceil(len(order) / most)))


def cosines(maps: Tensor, teacher: Tensor) -> Tensor:
    return F.cosine_similarity(maps.flatten(1).double(), teacher.flatten(1).double(), dim=1)
