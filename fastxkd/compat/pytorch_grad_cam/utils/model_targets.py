"""What to explain: callables on one image's output, or on the output of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class ClassifierOutputTarget:
    """The logit of a class.

    >>> import torch
    >>> ClassifierOutputTarget(2)(torch.tensor([1.0, 2.0, 4.0]))
    tensor(4.)
    """

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output[..., self.category]


class ClassifierOutputSoftmaxTarget:
    """The probability of a class."""

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output.softmax(-1)[..., self.category]


class ClassifierOutputReST:
    """The logit of a class plus its log-probability (arXiv 2501.06261)."""

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        log_probability = F.log_softmax(model_output, -1)[..., self.category]
        return model_output[..., self.category] + log_probability


class BinaryClassifierOutputTarget:
    """The one logit of a binary classifier, for category 1; its negative for category 0."""

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output if self.category == 1 else -model_output


class SoftmaxOutputTarget:
    """All probabilities."""

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output.softmax(-1)


class RawScoresOutputTarget:
    """The output as it is."""

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output


class SemanticSegmentationTarget:
    """The sum of a category's scores ``[classes, height, width]`` over the pixels of a mask."""

    def __init__(self, category: int, mask: Any) -> None:
        self.category = category
        self.mask = torch.as_tensor(mask)

    def __call__(self, model_output: Tensor) -> Tensor:
        return (model_output[self.category] * self.mask.to(model_output.device)).sum()


class FasterRCNNBoxScoreTarget:
    """How well a detector's boxes match given ones: overlap plus score of each that is found.

    A given box counts if the detection that overlaps it most does so by more than
    ``iou_threshold`` and has its label.
    """

    def __init__(
        self, labels: Sequence[int], bounding_boxes: Any, iou_threshold: float = 0.5
    ) -> None:
        self.labels = labels
        self.bounding_boxes = bounding_boxes
        self.iou_threshold = iou_threshold

    def __call__(self, model_outputs: dict[str, Tensor]) -> Tensor:
        boxes = model_outputs["boxes"]
        total = boxes.new_zeros(1)
        if len(boxes) == 0:
            return total
        for given, label in zip(self.bounding_boxes, self.labels, strict=False):
            overlaps = _overlaps(torch.as_tensor(given).to(boxes), boxes)
            best = overlaps.argmax()
            if overlaps[best] > self.iou_threshold and model_outputs["labels"][best] == label:
                total = total + overlaps[best] + model_outputs["scores"][best]
        return total


def _overlaps(box: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of one box (x1, y1, x2, y2) with each of ``boxes``."""
    low = torch.maximum(box[:2], boxes[:, :2])
    high = torch.minimum(box[2:], boxes[:, 2:])
    shared = (high - low).clamp(min=0).prod(1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return shared / ((box[2:] - box[:2]).prod() + area - shared)


class FinerWeightedTarget:
    """How far a category's logit lies above others', weighted by their probabilities."""

    def __init__(
        self, main_category: int, comparison_categories: Sequence[int], alpha: float
    ) -> None:
        self.main_category = main_category
        self.comparison_categories = list(comparison_categories)
        self.alpha = alpha

    def __call__(self, model_output: Tensor) -> Tensor:
        own = model_output[..., self.main_category, None]
        weights = model_output.softmax(-1)[..., self.comparison_categories]
        margins = own - self.alpha * model_output[..., self.comparison_categories]
        return (weights * margins).sum(-1) / (weights.sum(-1) + 1e-9)
