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
    at_loss,
    catkd_loss,
    cc_loss,
    ckd_loss,
    class_activations,
    dc_loss,
    dist_loss,
    dkd_loss,
    e2kd_loss,
    fitnet_loss,
    hcl_loss,
    kd_loss,
    kdiga_loss,
    linear_kd_loss,
    mixkd_loss,
    pkt_loss,
    rkd_loss,
    sp_loss,
    vid_loss,
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
    "at_loss",
    "backends",
    "cam_from",
    "capture",
    "catkd_loss",
    "cc_loss",
    "ckd_loss",
    "class_activations",
    "dc_loss",
    "dist_loss",
    "distance_correlation",
    "dkd_loss",
    "e2kd_loss",
    "fitnet_loss",
    "hcl_loss",
    "kd_loss",
    "kdiga_loss",
    "layer_scores",
    "linear_kd_loss",
    "losses",
    "metrics",
    "mixkd_loss",
    "partial_distance_correlation",
    "pkt_loss",
    "rkd_loss",
    "sp_loss",
    "use_backend",
    "vid_loss",
]


def __getattr__(name: str) -> _Any:
    if name in ("FeatureSimilarityScore", "RelevanceScore"):
        return getattr(metrics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
