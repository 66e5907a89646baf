"""Relevant features: what a model computes of the part of an image that it looks at."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastxkd.cam.capture import Layers, capture, evaluating, resolve_layers
from fastxkd.cam.gradient import HiResCAM
from fastxkd.metrics._maps import check_images, check_maps_of, pixel_order
from fastxkd.metrics.imputation import linear_imputation
from fastxkd.ops._checks import check_number


def relevant_images(
    images: Tensor,
    maps: Tensor,
    *,
    percentile: float = 50.0,
    noise: float = 0.01,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images of which only what a map calls relevant is left; the rest is imputed from it.

    FSS and RS of relevant features (Adhane et al. 2025, section 3) are the scores of what the
    layers make of these images instead of the originals, each model's by its own maps: Grad-CAM or
    HiResCAM (:func:`relevant_features`), or UniCAM for distilled and residual features.

    Args:
        images: ``[n, channels, h, w]``, as the model takes them.
        maps: ``[n, h, w]``, higher where more relevant.
        percentile: share of the pixels that is kept, in percent, as in :func:`road_score`: the
            authors' main scripts keep 50, others 20. Of equal pixels the first in reading order.
        noise, generator: of :func:`linear_imputation`.

    Returns:
        As ``images``; kept pixels are untouched. No gradient. (The authors' scripts also squeeze
        the result to a tenth of its contrast and to 8 bits; it stays what the model takes here.)

    Raises:
        ValueError, TypeError: shapes, dtypes or a percentile that do not fit.

    >>> import torch
    >>> images = torch.tensor([[[[4.0, 9.0, 1.0, 6.0]]]])
    >>> maps = torch.tensor([[[0.9, 0.1, 0.0, 0.8]]])
    >>> relevant_images(images, maps, noise=0).mul(10).round().div(10)
    tensor([[[[4.0000, 4.7000, 5.3000, 6.0000]]]])
    """
    check_images(images)
    check_maps_of(images, maps)
    check_number("percentile", percentile)
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile: expected a number in (0, 100], got {percentile}")
    count = max(1, math.ceil(percentile * (maps[0].numel() - 1) / 100))
    if percentile == 100:
        count = maps[0].numel()
    keep = pixel_order(maps.detach()) < count
    return linear_imputation(images.detach(), keep, noise=noise, generator=generator)


def relevant_features(
    model: nn.Module,
    layers: Layers,
    images: Tensor,
    labels: Tensor,
    *,
    percentile: float = 50.0,
    noise: float = 0.01,
    generator: torch.Generator | None = None,
    reshape_transform: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """What layers make of the part of each image that they find relevant for its class.

    Per layer: the HiResCAM map of the probability of the true class, the images with all but its
    highest pixels imputed (:func:`relevant_images`), and what the layer makes of these. Features
    of student, base and teacher for :func:`fastxkd.layer_scores` and the metric classes, as the
    authors of FSS and RS take them (Adhane et al. 2025, section 3).

    Args:
        model: returns logits ``[n, classes]``; runs in eval mode and is left as it was.
        layers: names or modules whose output is a map, or tokens as in :class:`fastxkd.HiResCAM`.
        images: ``[n, channels, h, w]``, as the model takes them.
        labels: int64 class indices ``[n]``.
        percentile, noise, generator: of :func:`relevant_images`; layers draw one after the other.
        reshape_transform: of :class:`fastxkd.HiResCAM`.

    Returns:
        Name to the layer's output ``[n, ...]``. No gradient. One pass with a backward from the
        layers on, then one pass per layer.

    Raises:
        ValueError, TypeError: as :func:`relevant_images` and :class:`fastxkd.HiResCAM`; labels that
            are not one class of the model per image.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(),
    ...     torch.nn.Flatten(), torch.nn.Linear(2 * 36, 3))
    >>> features = relevant_features(model, ["0", "1"], torch.rand(5, 1, 8, 8), torch.arange(5) % 3)
    >>> {name: list(x.shape) for name, x in features.items()}
    {'0': [5, 2, 6, 6], '1': [5, 2, 6, 6]}
    """
    check_images(images)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected an int64 Tensor, got {got}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels: expected {[len(images)]}, got {list(labels.shape)}")
    named = resolve_layers(model, layers, "layers")

    def probability(logits: Tensor) -> Tensor:
        classes = logits.shape[1]
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise ValueError(
                f"labels: expected classes in [0, {classes}),"
                f" got {int(labels.min())} to {int(labels.max())}"
            )
        # Cloned: what was made under inference_mode cannot be saved for a backward.
        own = labels.to(logits.device).clone()
        return logits.float().softmax(1).gather(1, own[:, None]).sum()

    images = images.detach()
    explain = HiResCAM(model, list(named.values()), reshape_transform)
    maps = explain(images, objective=probability, aggregate=None)
    features = {}
    for (name, layer), of_layer in zip(named.items(), maps, strict=True):
        seen = relevant_images(
            images, of_layer, percentile=percentile, noise=noise, generator=generator
        )
        with torch.no_grad(), evaluating(model), capture(model, layer) as captured:
            model(seen)
        (features[name],) = captured.activations.values()
    return features
