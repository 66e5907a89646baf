"""Class activation maps: from a model, from a training step's own forward, from tensors."""

from fastxkd.cam.capture import capture
from fastxkd.cam.gradient import (
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    XGradCAM,
)
from fastxkd.cam.maps import cam_from
from fastxkd.cam.unicam import UniCAM, UniCAMOutput, unicam_weights

__all__ = [
    "GradCAM",
    "GradCAMPlusPlus",
    "HiResCAM",
    "LayerCAM",
    "UniCAM",
    "UniCAMOutput",
    "XGradCAM",
    "cam_from",
    "capture",
    "unicam_weights",
]
