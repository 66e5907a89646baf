"""A memory bank of student, base and labels, against which images are explained one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastxkd.cam._unicam_distances import own_distances
from fastxkd.cam._unicam_side import Bank, Seen, Side
from fastxkd.cam.explainer import Inputs
from fastxkd.metrics.similarity import LayerScores


@dataclass(frozen=True)
class UniCAMReference:
    """What :meth:`UniCAM.reference` keeps: features of student and base, and labels.

    It belongs to the explainer that made it. ``scores`` are FSS and RS of its samples.
    """

    student: list[Bank]
    base: list[Bank]
    labels: Tensor
    label_distances: Tensor
    scores: list[LayerScores]

    def __len__(self) -> int:
        return len(self.labels)


def class_prototypes(features: Tensor, labels: Tensor) -> Tensor:
    r"""Embeddings of classes made of features of their images, where no words are at hand.

    .. math:: g_k \propto \sum_{i: y_i = k} x_i / |x_i|, \quad |g_k| = 1

    the prototypes that the authors of UniCAM make of the features of an image encoder.

    Args:
        features: ``[n, ...]``, flattened per image: of any encoder, of the teacher.
        labels: class indices ``[n]``, each of 0 ... max at least once.

    Returns:
        ``[classes, d]``, float64 for float64 features, else float32: ``class_embeddings`` of
        :class:`UniCAM`, or, indexed with labels, embeddings for any score of this package.

    Raises:
        ValueError, TypeError: rows that do not match, a class without a feature.

    >>> import torch
    >>> features = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    >>> class_prototypes(features, torch.tensor([0, 1, 1]))
    tensor([[1., 0.],
            [0., 1.]])
    """
    if not isinstance(features, Tensor) or not isinstance(labels, Tensor):
        name, got = ("features", features) if isinstance(labels, Tensor) else ("labels", labels)
        raise TypeError(f"{name}: expected a Tensor, got {type(got).__name__}")
    if not features.is_floating_point():
        raise TypeError(f"features: expected a floating-point dtype, got {features.dtype}")
    if features.dim() < 2 or features.numel() == 0:
        raise ValueError(f"features: expected [n, ...], got {list(features.shape)}")
    _check_indices(labels, "labels")
    if len(labels) != len(features):
        raise ValueError(f"labels: expected {len(features)}, one per feature, got {len(labels)}")
    index = labels.to(features.device, torch.int64)
    count = index.bincount()
    if not bool(count.all()):
        missing = int((count == 0).nonzero()[0])
        raise ValueError(f"labels: class {missing} of 0 ... {len(count) - 1} has no feature")
    exact = torch.float64 if features.dtype == torch.float64 else torch.float32
    rows = F.normalize(features.flatten(1).to(exact), dim=1)
    return F.normalize(rows.new_zeros(len(count), rows.shape[1]).index_add_(0, index, rows), dim=1)


def labels_of(
    given: Any, class_embeddings: Tensor | None, images: Tensor, name: str = "labels_or_embeddings"
) -> Tensor:
    """Class indices ``[n]`` or embeddings ``[n, e]`` on the images' device; indices into
    ``class_embeddings``, if any, become their rows."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(given).__name__}")
    if given.is_floating_point():
        if given.dim() < 2:
            raise ValueError(
                f"{name}: expected embeddings [n, e] or int64 class indices [n],"
                f" got {given.dtype} {list(given.shape)}"
            )
    else:
        _check_indices(given, name)
    if len(given) != len(images):
        raise ValueError(f"{name}: expected {len(images)} rows, one per image, got {len(given)}")
    if class_embeddings is None or given.is_floating_point():
        return given.to(images.device)
    outside = (given < 0) | (given >= len(class_embeddings))
    if bool(outside.any()):
        raise ValueError(
            f"{name}: expected 0 <= class < {len(class_embeddings)}, the class_embeddings,"
            f" got {int(given[outside][0])}"
        )
    rows = given.to(class_embeddings.device, torch.int64)
    return class_embeddings[rows].to(images.device)


def _check_indices(labels: Tensor, name: str) -> None:
    integer = not labels.is_floating_point() and labels.dtype != torch.bool
    if labels.dim() != 1 or not integer or labels.is_complex():
        raise ValueError(
            f"{name}: expected int64 class indices [n], got {labels.dtype} {list(labels.shape)}"
        )


class Keeper:
    """Chooses which samples of a stream stay: the first of each class, as many of each as fit."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.classes: list[Any] = []  # of what is kept, in its order

    def take(self, classes: list[Any]) -> tuple[list[int], list[int]]:
        """Of these, those that come in, and of what was kept, those that stay."""
        kept: list[tuple[Any, int]] = [(c, -1 - i) for i, c in enumerate(self.classes)]
        counts = Counter(self.classes)
        for i, c in enumerate(classes):
            if len(kept) == self.samples:
                common, most = counts.most_common(1)[0]
                if counts[c] + 1 >= most:
                    continue
                last = max(k for k, (other, _) in enumerate(kept) if other == common)
                del kept[last]
                counts[common] -= 1
            kept.append((c, i))
            counts[c] += 1
        self.classes = [c for c, _ in kept]
        return [i for _, i in kept if i >= 0], [-1 - i for _, i in kept if i < 0]


def batches_of(data: Any, labels: Any) -> Iterator[tuple[Any, Any]]:
    """(images, labels) of a loader, or of tensors given as they are."""
    if labels is not None:
        yield data, labels
        return
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(
            "data: expected images beside labels=, or batches (images, labels) of a loader,"
            f" got {type(data).__name__} alone"
        )
    for batch in data:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            what = f"{len(batch)} items" if isinstance(batch, (tuple, list)) else type(batch)
            raise TypeError(f"data: expected batches (images, labels), got {what}")
        yield batch[0], batch[1]


class Collector:
    """Features of one model, gathered from the samples that are kept."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.parts: list[list[tuple[Tensor, Tensor | None]]] = [[] for _ in side.layers]

    def add(self, inputs: Inputs, stay: list[int]) -> None:
        for parts, seen in zip(self.parts, self.side.look(inputs), strict=True):
            parts[:] = [parts[i] for i in stay]
            parts += _rows(seen)

    def banks(self, name: str) -> list[Bank]:
        banks = []
        for layer, parts in zip(self.side.layers, self.parts, strict=True):
            features = torch.stack([f for f, _ in parts])
            pools = [p for _, p in parts if p is not None]
            distances = own_distances(features, f"{name} {layer!r}", len(parts))
            banks.append(Bank(features, torch.stack(pools) if pools else None, distances))
        return banks


def _rows(seen: Seen) -> list[tuple[Tensor, Tensor | None]]:
    """Copies: a view would keep its whole batch alive."""
    features = [f.clone() for f in seen.compared]
    pools = [None] * len(features) if seen.feature is not None else [*seen.pulls.unbind()]
    return [*zip(features, pools, strict=True)]
