"""Class activation maps: from a model, from a training step's own forward, from tensors."""

from fastxkd.cam.activation import CAM, EigenCAM
from fastxkd.cam.attribution import (
    attribution_maps,
    gradient_shap,
    input_x_gradient,
    integrated_gradients,
    occlusion,
)
from fastxkd.cam.capture import capture
from fastxkd.cam.gradient import (
    EigenGradCAM,
    FinerCAM,
    GradCAM,
    GradCAMElementWise,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    XGradCAM,
)
from fastxkd.cam.layouts import to_maps, tokens_to_maps
from fastxkd.cam.maps import cam_from
from fastxkd.cam.perturbation import AblationCAM, ScoreCAM
from fastxkd.cam.unicam import (
    UniCAM,
    UniCAMOutput,
    UniCAMReference,
    class_prototypes,
    unicam_weights,
)

__all__ = [
    "CAM",
    "AblationCAM",
    "EigenCAM",
    "EigenGradCAM",
    "FinerCAM",
    "GradCAM",
    "GradCAMElementWise",
    "GradCAMPlusPlus",
    "HiResCAM",
    "LayerCAM",
    "ScoreCAM",
    "UniCAM",
    "UniCAMOutput",
    "UniCAMReference",
    "XGradCAM",
    "attribution_maps",
    "cam_from",
    "capture",
    "class_prototypes",
    "gradient_shap",
    "input_x_gradient",
    "integrated_gradients",
    "occlusion",
    "to_maps",
    "tokens_to_maps",
    "unicam_weights",
]
