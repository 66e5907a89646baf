"""Pictures and tensors, both ways; nothing here needs OpenCV but other colour maps than jet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastxkd.reference.cam import finish

Array = np.ndarray[Any, Any]

COLORMAP_JET = 2  # OpenCV's number for it


def preprocess_image(
    img: Array, mean: Sequence[float] = (0.5, 0.5, 0.5), std: Sequence[float] = (0.5, 0.5, 0.5)
) -> torch.Tensor:
    """``[height, width, channels]`` as a normalised batch of one; uint8 is divided by 255."""
    pixels = torch.from_numpy(np.array(img)).permute(2, 0, 1)
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255
    shift, scale = (torch.tensor(values).to(pixels)[:, None, None] for values in (mean, std))
    return ((pixels - shift) / scale)[None]


def deprocess_image(img: Array) -> Array:
    """Any array as a picture: mean to mid-grey, standard deviation to a tenth of the range."""
    centred = (img - np.mean(img)) / (np.std(img) + 1e-5)
    picture: Array = (np.clip(0.1 * centred + 0.5, 0, 1) * 255).astype(np.uint8)
    return picture


def show_cam_on_image(
    img: Array,
    mask: Array,
    use_rgb: bool = False,
    colormap: int = COLORMAP_JET,
    image_weight: float = 0.5,
) -> Array:
    """A map over an image, as uint8 of the image's shape.

    Args:
        img: float ``[height, width, 3]`` in [0, 1].
        mask: float ``[height, width]`` in [0, 1].
        use_rgb: the image is RGB, not BGR.
        colormap: OpenCV's number of one; all but jet need OpenCV.
        image_weight: the image's share of the sum, in [0, 1].
    """
    if np.max(img) > 1:
        raise ValueError(f"img: expected floats in [0, 1], got up to {np.max(img):.4g}")
    if not 0 <= image_weight <= 1:
        raise ValueError(f"image_weight: expected a number in [0, 1], got {image_weight}")
    colors = _colors(int(colormap))  # BGR
    heat = (colors[:, ::-1] if use_rgb else colors)[(255 * np.asarray(mask)).astype(np.uint8)]
    blend = (1 - image_weight) * (np.float32(heat) / 255) + image_weight * img
    blend = blend / np.max(blend)
    drawn: Array = (255 * blend).astype(np.uint8)
    return drawn


def scale_cam_image(cam: Array, target_size: Sequence[int] | None = None) -> Array:
    """Each map to [0, 1], then to (width, height), or (depth's last axis first) of volumes."""
    maps = torch.from_numpy(np.float32(cam))
    size = list(target_size)[::-1] if target_size is not None else list(maps.shape[1:])
    scaled: Array = finish(maps, size, False, 1).numpy()
    return scaled


def _colors(colormap: int) -> Array:
    """256 colours, BGR uint8."""
    if colormap == COLORMAP_JET:
        i = np.arange(256)
        ramps = [
            (4 * i + 128, 638 - 4 * i),
            (4 * i - 128, 892 - 4 * i),
            (4 * i - 382, 1148 - 4 * i),
        ]
        table = np.stack([np.clip(np.minimum(*ramp), 0, 255) for ramp in ramps], 1)
        table[159, 0] = 1  # the one value of OpenCV's table that lies off its line
        return table.astype(np.uint8)
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            f"colormap {colormap} comes from OpenCV: pip install opencv-python-headless;"
            f" {COLORMAP_JET}, jet, needs nothing"
        ) from error
    colors: Array = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], colormap)[:, 0]
    return colors
