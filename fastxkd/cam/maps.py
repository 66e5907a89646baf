"""From activations and gradients to maps."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastxkd.ops.cam import cam_map
from fastxkd.reference.cam import min_max

Normalize = Literal["minmax"] | None


def cam_from(
    activations: Tensor,
    gradients: Tensor,
    method: str = "gradcam",
    size: tuple[int, int] | None = None,
    normalize: Normalize = "minmax",
    *,
    relu: bool = True,
) -> Tensor:
    r"""Class activation maps of tensors: the operator beneath the explainers.

    The channel-weighted sum :math:`\sum_c w_c A_c`, then ReLU, min-max, bilinear resizing
    (half-pixel centres) and min-max again. With g the gradient of a score with respect to A and
    :math:`S_c = \sum_p A_{cp}`:

    ============== ================================================================
    ``gradcam``    :math:`w_c = mean_p\, g` (Selvaraju et al. 2017)
    ``gradcam++``  :math:`w_c = \sum_p relu(g)\, g^2 / (2 g^2 + S_c g^3 + 10^{-6})`
    ``xgradcam``   :math:`w_c = \sum_p g A / (S_c + 10^{-7})`
    ``hirescam``   :math:`\sum_c g A`, element-wise
    ``layercam``   :math:`\sum_c relu(g) A`, element-wise
    ``weights``    ``gradients`` are the :math:`w_c` themselves, ``[n, c]``
    ============== ================================================================

    Args:
        activations, gradients: ``[n, c, h, w]`` of one float dtype, contiguous or channels-last.
        method: one of the table.
        size: (height, width) of the maps; None keeps h, w.
        normalize: ``"minmax"`` scales each map to [0, 1] with the 1e-7 of pytorch-grad-cam (a map
            that is constant becomes 0); None keeps magnitudes.
        relu: False keeps negative evidence.

    Returns:
        ``[n, height, width]`` float32 (float64 for float64 input), differentiable in activations
        and gradients. NaN in one image makes that image's map NaN and no other.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, an unknown method.

    >>> import torch
    >>> activations = torch.tensor([[[[1.0, 2.0], [0.0, 3.0]]]])
    >>> cam_from(activations, torch.full((1, 1, 2, 2), 0.5), normalize=None)
    tensor([[[0.5000, 1.0000],
             [0.0000, 1.5000]]])
    """
    check_normalize(normalize)
    scaling = 0 if normalize is None else (1 if size is None else 2)
    return cam_map(activations, gradients, method=method, size=size, relu=relu, normalize=scaling)


def check_normalize(normalize: Normalize) -> None:
    if normalize not in ("minmax", None):
        raise ValueError(f"normalize: expected 'minmax' or None, got {normalize!r}")


def maps_of_layers(
    names: list[str],
    activations: list[Tensor],
    gradients: list[Tensor | None],
    *,
    method: str,
    size: tuple[int, int] | None,
    normalize: Normalize,
    aggregate: Literal["mean"] | None,
) -> Any:
    """One map per layer, or their mean scaled once more."""
    for name, activation, gradient in zip(names, activations, gradients, strict=True):
        if activation.dim() != 4:
            raise ValueError(
                f"target layer {name!r}: expected spatial activations [n, channels, height,"
                f" width], got {list(activation.shape)}; use reshape_transform for token layouts"
            )
        if gradient is None:
            raise ValueError(f"target layer {name!r}: the score does not depend on it")
    pairs = [
        (a, g.to(a.dtype)) for a, g in zip(activations, gradients, strict=True) if g is not None
    ]
    if aggregate is None or len(pairs) == 1:
        maps = [cam_from(a, g, method, size, normalize) for a, g in pairs]
        return maps if aggregate is None else maps[0]
    size = size or (activations[0].shape[2], activations[0].shape[3])
    scaling = 0 if normalize is None else 1
    each = [cam_map(a, g, method=method, size=size, relu=True, normalize=scaling) for a, g in pairs]
    mean = torch.stack(each).mean(0)
    return mean if normalize is None else min_max(mean)
