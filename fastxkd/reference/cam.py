"""cam in plain torch: the raw map, its finishing, and the gradient in closed form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PLUS_PLUS_EPS = 1e-6
XGRAD_EPS = 1e-7
MIN_MAX_EPS = 1e-7


def exact_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def channel_weights(a: Tensor, g: Tensor, method: str) -> Tensor:
    """The weight of each channel, ``[n, c]``, of activations and gradients ``[n, c, ...]``."""
    space = tuple(range(2, a.dim()))
    if method == "weights":
        return g
    if method == "gradcam":
        return g.mean(space)
    if method == "xgradcam":
        return (a * g).sum(space) / (a.sum(space) + XGRAD_EPS)
    total = a.sum(space, keepdim=True)
    alpha = g.square() / (2 * g.square() + total * g.pow(3) + PLUS_PLUS_EPS)
    return torch.where(g == 0, 0, g.clamp(min=0) * alpha).sum(space)


def raw_map(activations: Tensor, gradients: Tensor, method: str) -> Tensor:
    """The weighted sum over channels, signed, at the layer's resolution: ``[n, h, w]``."""
    exact = exact_dtype(activations)
    a, g = activations.to(exact), gradients.to(exact)  # [n, c, h, w]
    if method == "hirescam":
        return (a * g).sum(1)
    if method == "layercam":
        return (a * g.clamp(min=0)).sum(1)
    if method == "elementwise":
        return (a * g).clamp(min=0).sum(1)
    return torch.einsum("nc,nchw->nhw", channel_weights(a, g, method), a)


def min_max(maps: Tensor) -> Tensor:
    """Each map to [0, 1]: ``(m - min) / (1e-7 + max - min)``; a constant map becomes 0."""
    space = tuple(range(1, maps.dim()))
    shifted = maps - maps.amin(space, keepdim=True)
    return shifted / (MIN_MAX_EPS + shifted.amax(space, keepdim=True))


def finish(maps: Tensor, size: list[int], relu: bool, normalize: int) -> Tensor:
    """ReLU, min-max, linear resizing to ``size``, min-max again (``normalize`` 0, 1 or 2)."""
    if relu:
        maps = maps.clamp(min=0)
    if normalize >= 1:
        maps = min_max(maps)
    if list(maps.shape[1:]) != list(size):
        mode = "bilinear" if maps.dim() == 3 else "trilinear"
        maps = F.interpolate(maps[:, None], size=size, mode=mode, align_corners=False)[:, 0]
    return min_max(maps) if normalize >= 2 else maps


def cam(
    activations: Tensor, gradients: Tensor, method: str, size: list[int], relu: bool, normalize: int
) -> Tensor:
    return finish(raw_map(activations, gradients, method), size, relu, normalize).contiguous()


def cam_backward(
    upstream: Tensor, activations: Tensor, gradients: Tensor, method: str
) -> tuple[Tensor, Tensor]:
    """Gradient of :func:`raw_map` with respect to activations and gradients."""
    exact = exact_dtype(activations)
    a, g = activations.to(exact), gradients.to(exact)
    u = upstream.to(exact)[:, None]  # [n, 1, h, w]
    if method in ("hirescam", "layercam", "elementwise"):
        on_a, on_g = g * u, a * u
        if method != "hirescam":
            none = (g if method == "layercam" else a * g) <= 0  # NaN is not
            on_a, on_g = on_a.masked_fill(none, 0), on_g.masked_fill(none, 0)
        return on_a.to(activations.dtype), on_g.to(gradients.dtype)
    on_weight = (a * u).sum((2, 3), keepdim=True)  # [n, c, 1, 1]
    if method == "weights":
        on_a, on_g = g[:, :, None, None] * u, on_weight[:, :, 0, 0]
    elif method == "gradcam":
        on_a = g.mean((2, 3), keepdim=True) * u
        on_g = (on_weight / (a.shape[2] * a.shape[3])).expand_as(a)
    elif method == "xgradcam":
        total = a.sum((2, 3), keepdim=True) + XGRAD_EPS
        weight = (a * g).sum((2, 3), keepdim=True) / total
        on_a = weight * u + on_weight / total * (g - weight)
        on_g = on_weight / total * a
    else:
        total = a.sum((2, 3), keepdim=True)
        positive = g.clamp(min=0)
        q = 2 * g.square() + total * g.pow(3) + PLUS_PLUS_EPS
        term = positive.pow(3) / q
        slope = (3 * g.square() * q - g.pow(3) * (4 * g + 3 * total * g.square())) / q.square()
        on_a = term.sum((2, 3), keepdim=True) * u
        on_a = on_a - on_weight * term.square().sum((2, 3), keepdim=True)
        on_g = (on_weight * slope).masked_fill(g <= 0, 0)
    return on_a.to(activations.dtype), on_g.to(gradients.dtype).contiguous()
