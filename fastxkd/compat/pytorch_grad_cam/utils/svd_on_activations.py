"""The projection behind EigenCAM, on arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastxkd.cam.maps import principal_map


def get_2d_projection(activation_batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """``[n, channels, ...]`` on its first principal component, float32 ``[n, ...]``.

    NaN counts as 0. The sign is as :func:`fastxkd.cam_from` says.
    """
    values = np.nan_to_num(np.asarray(activation_batch), nan=0.0, posinf=np.inf, neginf=-np.inf)
    projected: np.ndarray[Any, Any] = principal_map(torch.from_numpy(values)).float().numpy()
    return projected
