"""What models answer on the test images, in one pass, and which images are worth a look."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxkd import capture
from fastxkd.metrics.pooling import compared, compared_size
from fastxkd.runs.data import ImageData, Split

ROLES = ("teacher", "base", "student")


@dataclass
class Answers:
    """One pass over the test images: logits per role, and pooled features of the scored ones."""

    indices: np.ndarray
    labels: Tensor
    logits: dict[str, Tensor]
    features: dict[str, dict[str, Tensor]]
    shapes: dict[str, dict[str, str]]
    scored_labels: Tensor


def balanced(labels: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """Up to ``count`` of ``order``: the first of each class, then the second of each, ..."""
    rank = np.zeros(len(order), dtype=np.int64)
    seen: dict[int, int] = {}
    for position, index in enumerate(order):
        label = int(labels[index])
        rank[position] = seen.get(label, 0)
        seen[label] = int(rank[position]) + 1
    return order[np.lexsort((labels[order], rank))][:count]


def _shape_text(shape: Sequence[int], limit: int) -> str:
    own, smaller = list(shape), compared_size(shape, limit)
    text = " x ".join(map(str, own))
    return text if own == smaller else f"{text}, averaged to {' x '.join(map(str, smaller))}"


def ask(
    models: dict[str, nn.Module],
    data: ImageData,
    layers: dict[str, list[str]],
    batch_size: int,
    max_samples: int,
    feature_limit: int,
    device: torch.device,
    report: Callable[[str, int, int], None],
) -> Answers:
    everything = np.arange(len(data.test))
    scored = np.zeros(len(data.test), dtype=bool)
    scored[balanced(data.test.labels, everything, max_samples)] = True
    logits: dict[str, list[Tensor]] = {role: [] for role in ROLES}
    features: dict[str, dict[str, list[Tensor]]] = {
        role: {name: [] for name in layers[role]} for role in ROLES
    }
    shapes: dict[str, dict[str, str]] = {role: {} for role in ROLES}
    labels, indices = [], []
    for batch in data.batches(data.test, batch_size):
        pixels = data.normalize(batch.images, device)
        keep = torch.from_numpy(scored[batch.indices.numpy()]).to(device)
        for role in ROLES:
            with torch.no_grad(), capture(models[role], layers[role]) as captured:
                output = models[role](pixels)
            logits[role].append(_checked(output, role, len(pixels)))
            for name, found in captured.activations.items():
                features[role][name].append(compared(found[keep], feature_limit).float())
                shapes[role][name] = _shape_text(found.shape[1:], feature_limit)
        labels.append(batch.labels)
        indices.append(batch.indices)
        report("answers", int(batch.indices[-1]) + 1, len(data.test))
    if sum(map(len, labels)) < 4:
        raise ValueError(
            f"data: at least 4 readable test images are needed, got {sum(map(len, labels))}"
        )
    found_indices = torch.cat(indices).numpy()
    found_labels = torch.cat(labels)
    answers = Answers(
        found_indices,
        found_labels,
        {role: torch.cat(parts).double().cpu() for role, parts in logits.items()},
        {role: {k: torch.cat(v) for k, v in parts.items()} for role, parts in features.items()},
        shapes,
        found_labels[torch.from_numpy(scored[found_indices])],
    )
    widths = {role: answers.logits[role].shape[1] for role in ROLES}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{role} {width}" for role, width in widths.items())
        raise ValueError(
            f"models: expected the same number of outputs from all three, got {listed}"
        )
    return answers


def _checked(output: object, role: str, images: int) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != images:
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"{role}: expected logits [{images}, classes], got {got}")
    if not torch.isfinite(output).all():
        raise ValueError(f"{role}: its outputs are not all finite; are its weights damaged?")
    return output


def accuracy_defined(answers: Answers, data: ImageData) -> bool:
    return answers.logits["teacher"].shape[1] == len(data.classes)


def correct(answers: Answers, data: ImageData) -> dict[str, Tensor]:
    truth = answers.labels
    if not accuracy_defined(answers, data):
        truth = answers.logits["teacher"].argmax(1)
    return {role: answers.logits[role].argmax(1) == truth for role in ROLES}


def agreement(answers: Answers, role: str) -> float:
    same = answers.logits[role].argmax(1) == answers.logits["teacher"].argmax(1)
    return same.double().mean().item()


def divergence(answers: Answers, role: str) -> float:
    model, teacher = (answers.logits[name].log_softmax(1) for name in (role, "teacher"))
    return max(0.0, F.kl_div(model, teacher, reduction="batchmean", log_target=True).item())


def accuracy(
    model: nn.Module, data: ImageData, split: Split, batch_size: int, device: torch.device | str
) -> float:
    """Share of ``split`` that ``model`` has right; leaves it in eval mode."""
    model.eval()
    right = total = 0
    with torch.no_grad():
        for batch in data.batches(split, batch_size):
            found = model(data.normalize(batch.images, device)).argmax(1).cpu()
            right += int((found == batch.labels).sum())
            total += len(batch.labels)
    return right / total if total else math.nan
