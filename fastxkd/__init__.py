"""Explainable knowledge distillation at kernel speed."""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from fastxkd import metrics
from fastxkd._version import __version__
from fastxkd.cam import (
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    UniCAM,
    XGradCAM,
    cam_from,
    capture,
)
from fastxkd.losses import KDLoss, KDLossParts, kd_loss
from fastxkd.metrics import distance_correlation, layer_scores, partial_distance_correlation
from fastxkd.ops._library import backends, use_backend

if _TYPE_CHECKING:
    from fastxkd.metrics import FeatureSimilarityScore, RelevanceScore

__all__ = [
    "FeatureSimilarityScore",
    "GradCAM",
    "GradCAMPlusPlus",
    "HiResCAM",
    "KDLoss",
    "KDLossParts",
    "LayerCAM",
    "RelevanceScore",
    "UniCAM",
    "XGradCAM",
    "__version__",
    "backends",
    "cam_from",
    "capture",
    "distance_correlation",
    "kd_loss",
    "layer_scores",
    "metrics",
    "partial_distance_correlation",
    "use_backend",
]


def __getattr__(name: str) -> _Any:
    if name in ("FeatureSimilarityScore", "RelevanceScore"):
        return getattr(metrics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
