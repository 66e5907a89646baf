"""Similarity of what two models compute, and its relevance to the task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastxkd.metrics.similarity import (
    LayerScores,
    distance_correlation,
    layer_scores,
    partial_distance_correlation,
)

if TYPE_CHECKING:
    from fastxkd.metrics.scores import FeatureSimilarityScore, RelevanceScore

__all__ = [
    "FeatureSimilarityScore",
    "LayerScores",
    "RelevanceScore",
    "distance_correlation",
    "layer_scores",
    "partial_distance_correlation",
]


def __getattr__(name: str) -> Any:
    # torchmetrics imports torchvision and more where they are installed: seconds that only the
    # users of the metric classes should pay.
    if name in ("FeatureSimilarityScore", "RelevanceScore"):
        from fastxkd.metrics import scores

        return getattr(scores, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
