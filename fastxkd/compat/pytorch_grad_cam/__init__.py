"""The interface of pytorch-grad-cam 1.5.7, on fastxkd's explainers.

Change the import and keep the rest::

    from fastxkd.compat.pytorch_grad_cam import GradCAM
    from fastxkd.compat.pytorch_grad_cam.utils.image import show_cam_on_image
    from fastxkd.compat.pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with GradCAM(model=model, target_layers=[model.layer4[-1]]) as cam:
        maps = cam(input_tensor=images, targets=[ClassifierOutputTarget(281)])

Maps are the same within 1e-5. On purpose it differs where theirs goes wrong:

- a list of targets that has not one per image is refused, not cut short;
- the model's train and eval flags, hooks and ``.grad`` are left as they were, and an
  ``IndexError`` inside a ``with`` block is not swallowed;
- principal components (EigenCAM, EigenGradCAM, ``eigen_smooth``) have the sign that
  :func:`fastxkd.cam_from` documents, instead of whichever comes;
- an operation in place after the target layer (the ReLU after DenseNet's last norm, or after a
  ResNet block's ``bn2``) does not overwrite what is explained;
- of a layer that runs more than once in a pass the last run is explained, with a warning, not the
  first one's activations;
- volumes are resized linearly, not by a cubic spline;
- NaN in an activation shows as NaN in the map of that image;
- what subclasses override are ``get_cam_weights`` and ``get_cam_image`` (of
  ``fastxkd.compat.pytorch_grad_cam.BaseCAM`` or of an explainer), no other methods;
- ``AblationCAM`` with a ratio of a half or more tries every channel.
"""

from fastxkd.compat.pytorch_grad_cam import utils
from fastxkd.compat.pytorch_grad_cam.ablation_layer import AblationLayer, AblationLayerVit
from fastxkd.compat.pytorch_grad_cam.base_cam import BaseCAM
from fastxkd.compat.pytorch_grad_cam.explainers import (
    AblationCAM,
    EigenCAM,
    EigenGradCAM,
    FinerCAM,
    GradCAM,
    GradCAMElementWise,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    ScoreCAM,
    XGradCAM,
)

__all__ = [
    "AblationCAM",
    "AblationLayer",
    "AblationLayerVit",
    "BaseCAM",
    "EigenCAM",
    "EigenGradCAM",
    "FinerCAM",
    "GradCAM",
    "GradCAMElementWise",
    "GradCAMPlusPlus",
    "HiResCAM",
    "LayerCAM",
    "ScoreCAM",
    "XGradCAM",
    "utils",
]
