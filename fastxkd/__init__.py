"""Explainable knowledge distillation at kernel speed."""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from fastxkd import losses, metrics
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
from fastxkd.losses import (
    ATLoss,
    CATKDLoss,
    CCLoss,
    CKDLoss,
    DCLoss,
    DISTLoss,
    DKDLoss,
    E2KDLoss,
    FitNetLoss,
    KDIGALoss,
    KDLoss,
    KDLossParts,
    LinearKDLoss,
    MixKDLoss,
    PKTLoss,
    ReviewKDLoss,
    RKDLoss,
    SPLoss,
    VIDLoss,
    dist_loss,
    dkd_loss,
    kd_loss,
    linear_kd_loss,
)
from fastxkd.metrics import distance_correlation, layer_scores, partial_distance_correlation
from fastxkd.ops._library import backends, use_backend

if _TYPE_CHECKING:
    from fastxkd.metrics import FeatureSimilarityScore, RelevanceScore

__all__ = [
    "ATLoss",
    "CATKDLoss",
    "CCLoss",
    "CKDLoss",
    "DCLoss",
    "DISTLoss",
    "DKDLoss",
    "E2KDLoss",
    "FeatureSimilarityScore",
    "FitNetLoss",
    "GradCAM",
    "GradCAMPlusPlus",
    "HiResCAM",
    "KDIGALoss",
    "KDLoss",
    "KDLossParts",
    "LayerCAM",
    "LinearKDLoss",
    "MixKDLoss",
    "PKTLoss",
    "RKDLoss",
    "RelevanceScore",
    "ReviewKDLoss",
    "SPLoss",
    "UniCAM",
    "VIDLoss",
    "XGradCAM",
    "__version__",
    "backends",
    "cam_from",
    "capture",
    "dist_loss",
    "distance_correlation",
    "dkd_loss",
    "kd_loss",
    "layer_scores",
    "linear_kd_loss",
    "losses",
    "metrics",
    "partial_distance_correlation",
    "use_backend",
]


def __getattr__(name: str) -> _Any:
    if name in ("FeatureSimilarityScore", "RelevanceScore"):
        return getattr(metrics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
