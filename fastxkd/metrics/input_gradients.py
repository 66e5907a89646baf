"""Input gradients as explanations: their maps, images masked by them, and what they align with."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxkd.cam.capture import evaluating
from fastxkd.metrics._maps import (
    check_images,
    check_maps,
    check_maps_of,
    exact_dtype,
    pixel_order,
)
from fastxkd.metrics.agreement import check_fraction, cosine_agreement, pearson_agreement
from fastxkd.ops._checks import (
    check_choice,
    check_classes,
    check_factors,
    check_labels,
    check_logits,
)

OBJECTIVES = ("loss", "logit", "probability")
CHANNELS = ("max", "sum")
KEPT = ("top", "bottom")

Model = Callable[[Tensor], Tensor]


def input_gradients(
    model: Model, images: Tensor, labels: Tensor | None = None, *, of: str = "loss"
) -> Tensor:
    r"""Gradients of each image's loss or score in its pixels.

    Args:
        model: images to logits ``[n, classes]``; a module runs in eval mode, where no image reaches
            another, and is left as it was, ``.grad`` included.
        images: ``[n, channels, h, w]``.
        labels: int64 ``[n]``; None: the class the model names.
        of: the cross-entropy (``"loss"``), the logit or the probability of the label.

    Returns:
        ``[n, channels, h, w]`` with sign, of the images' dtype.

    Raises:
        ValueError, TypeError: images, labels or logits that do not fit; logits that do not depend
            on the images.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2, bias=False))
    >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> input_gradients(model, torch.zeros(1, 1, 1, 2), torch.tensor([1]), of="logit")
    tensor([[[[3., 4.]]]])
    """
    check_choice("of", of, OBJECTIVES)
    if not callable(model):
        raise TypeError(f"model: expected a callable, got {type(model).__name__}")
    check_images(images)
    if labels is not None:
        check_labels(labels, "images", images)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if isinstance(model, nn.Module):
            stack.enter_context(evaluating(model))
        # A tensor made in inference mode can be part of no graph; its copy can.
        start = images.clone() if images.is_inference() else images
        start = start.detach().requires_grad_(True)
        logits = model(start)
        check_logits("model", logits, images)
        if labels is None:
            labels = logits.detach().argmax(1)
        elif labels.is_inference():
            labels = labels.clone()
        check_classes(labels, logits.shape[1])
        scores, place = logits.double(), labels[:, None]
        own = scores.gather(1, place)[:, 0]
        if of == "logit":
            total = own.sum()
        else:
            # Probabilities of a model that is sure round to 1, and their slope to 0. What the
            # other classes have against the label's logit does not, so: -log p and p - 1 of that.
            against = scores.scatter(1, place, -torch.inf).logsumexp(1) - own
            total = (F.softplus(against) if of == "loss" else -against.sigmoid()).sum()
        gradient = None
        if total.requires_grad:
            (gradient,) = torch.autograd.grad(total, start, allow_unused=True)
    if gradient is None:
        raise ValueError("model: its logits do not depend on the images")
    return gradient


def gradient_maps(gradients: Tensor, *, channels: str = "max") -> Tensor:
    """Maps of input gradients: absolute values, the greatest of each pixel's channels or their sum.

    Args:
        gradients: ``[n, channels, h, w]``.
        channels: ``"max"`` or ``"sum"``: an interpretation where a paper names neither.

    Returns:
        ``[n, h, w]`` of the same dtype.

    >>> import torch
    >>> gradient_maps(torch.tensor([[[[1.0]], [[-3.0]]]]), channels="sum")
    tensor([[[4.]]])
    """
    check_choice("channels", channels, CHANNELS)
    check_images(gradients, "gradients")
    size = gradients.detach().abs()
    return size.amax(1) if channels == "max" else size.sum(1)


def kept_pixels(maps: Tensor, fraction: float, *, keep: str = "top") -> Tensor:
    """The pixels that DiffROAR leaves: the most or the least relevant of each image.

    Args:
        maps: ``[n, h, w]``. Of equal pixels the first in reading order is the more relevant.
        fraction: of the pixels, above 0 and at most 1; rounded, at least one pixel.
        keep: ``"top"`` or ``"bottom"``.

    Returns:
        bool ``[n, h, w]``.

    >>> import torch
    >>> kept_pixels(torch.tensor([[[1.0, 4.0, 3.0, 2.0]]]), 0.5, keep="bottom")
    tensor([[[ True, False, False,  True]]])
    """
    check_maps(maps)
    return kept_ranks(pixel_order(maps.detach()), fraction, keep=keep)


def kept_ranks(ranks: Tensor, fraction: float, *, keep: str = "top") -> Tensor:
    """:func:`kept_pixels` of the ranks of pixels, ``[n, h, w]``: 0 the most relevant."""
    check_fraction(fraction)
    check_choice("keep", keep, KEPT)
    pixels = ranks[0].numel()
    count = max(1, round(fraction * pixels))
    return ranks < count if keep == "top" else ranks >= pixels - count


class Alignment(NamedTuple):
    """Of :func:`gradient_alignment`, each ``[n]``."""

    cosine: Tensor
    pearson: Tensor


def gradient_alignment(
    gradients: Tensor, truth: Tensor, *, channels: str = "max", sigma: float = 1.0
) -> Alignment:
    r"""How far loss gradients lie where the object is, or its edges.

    Tsipras et al. (2018) show loss gradients of robust models to align with what people see, and
    Han et al. (2023) those of distilled ones: as pictures. Numbers for it are an interpretation
    of ours: cosine and Pearson's correlation of :math:`|\nabla_x CE|`, blurred, and a map.

    Args:
        gradients: ``[n, channels, h, w]`` of :func:`input_gradients`, with or without sign.
        truth: ``[n, h, w]``: masks of the objects (bool or float), or :func:`sobel_maps` of the
            images where there are none.
        channels: as in :func:`gradient_maps`.
        sigma: of the Gaussian that blurs the gradients' map, in pixels, cut off at 4 sigma, edges
            repeated; 0: none. The truth is not blurred.

    Returns:
        :class:`Alignment`, float32, float64 for float64 gradients: 0 where a map is 0 everywhere
        (cosine) or constant (Pearson). NaN in one image's gradients is NaN in its values alone.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.

    >>> import torch
    >>> mask = torch.tensor([[[False, True], [False, True]]])
    >>> gradients = torch.tensor([[[[0.0, -2.0], [0.0, 2.0]]]])
    >>> gradient_alignment(gradients, mask, sigma=0)
    Alignment(cosine=tensor([1.]), pearson=tensor([1.]))
    """
    check_alignment_options(channels, sigma)
    maps = gradient_maps(gradients, channels=channels)
    if isinstance(truth, Tensor) and truth.dtype == torch.bool:
        truth = truth.to(exact_dtype(maps))
    check_maps_of(gradients, truth, "truth")
    dtype = exact_dtype(maps)
    smooth = _blurred(maps.double(), sigma)
    return Alignment(
        cosine_agreement(smooth, truth).to(dtype), pearson_agreement(smooth, truth).to(dtype)
    )


def check_alignment_options(channels: str, sigma: float) -> None:
    check_choice("channels", channels, CHANNELS)
    check_factors(sigma=sigma)


def sobel_maps(images: Tensor, *, channels: str = "max") -> Tensor:
    r"""Edges of images: :math:`\sqrt{s_x^2 + s_y^2}` of Sobel's two filters, edges repeated.

    Args:
        images: ``[n, channels, h, w]``.
        channels: the strongest edge of a pixel's channels (``"max"``) or the sum of all.

    Returns:
        ``[n, h, w]``, float32, float64 for float64.

    >>> import torch
    >>> sobel_maps(torch.tensor([[[[0.0, 0.0, 1.0, 1.0]]]]))
    tensor([[[0., 4., 4., 0.]]])
    """
    check_images(images)
    smooth = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    slope = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    planes = images.detach().double().flatten(0, 1)
    across, down = _separable(planes, smooth, slope), _separable(planes, slope, smooth)
    edges = (across.square() + down.square()).sqrt().view(images.shape)
    return gradient_maps(edges, channels=channels).to(exact_dtype(images))


def _blurred(maps: Tensor, sigma: float) -> Tensor:
    if sigma == 0:
        return maps
    reach = max(1, math.ceil(4 * sigma))
    places = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = (-(places / sigma).square() / 2).exp()
    kernel = kernel / kernel.sum()
    return _separable(maps, kernel, kernel)


def _separable(planes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``[m, h, w]`` float64, filtered down its columns by ``rows`` and along its rows by
    ``columns``; edges repeated."""
    rows, columns = rows.to(planes.device), columns.to(planes.device)
    reach_y, reach_x = len(rows) // 2, len(columns) // 2
    padded = F.pad(planes[:, None], (reach_x, reach_x, reach_y, reach_y), mode="replicate")
    with torch.autocast(planes.device.type, enabled=False):
        down = F.conv2d(padded, rows.view(1, 1, -1, 1))
        return F.conv2d(down, columns.view(1, 1, 1, -1))[:, 0]


def check_gradient_options(of: Any, channels: Any) -> None:
    check_choice("of", of, OBJECTIVES)
    check_choice("channels", channels, CHANNELS)


def ranked_pixels(
    model: Model,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    of: str = "loss",
    channels: str = "max",
) -> Tensor:
    """Ranks of the pixels of images by their input gradients, int64 ``[n, h, w]``, 0 the first.

    Of equal pixels the first in reading order comes first, so that a gradient of 0 in every pixel
    ranks them in that order.

    Raises:
        ValueError: NaN in a gradient, as of damaged weights: it has no order.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2, bias=False))
    >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> ranked_pixels(model, torch.zeros(1, 1, 1, 2), of="logit")
    tensor([[[1, 0]]])
    """
    check_gradient_options(of, channels)
    maps = gradient_maps(input_gradients(model, images, labels, of=of), channels=channels)
    broken = int(maps.isnan().flatten(1).any(1).sum())
    if broken:
        raise ValueError(f"model: expected gradients that are numbers, got NaN in {broken} images")
    return pixel_order(maps)
