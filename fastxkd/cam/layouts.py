"""Spatial maps out of the layouts of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import batchnorm, conv, pooling

MOST_PREFIX_TOKENS = 8
# Layers of torch that have channels on the second axis, whatever the sizes look like.
POOLING = (
    pooling._MaxPoolNd,
    pooling._AvgPoolNd,
    pooling._AdaptiveMaxPoolNd,
    pooling._AdaptiveAvgPoolNd,
)


def to_maps(tensor: Tensor, image: Sequence[int], prefix: int | None = None) -> Tensor:
    """``[n, channels, height, width]`` of a layer's output, for images of (height, width).

    ===================== ===================================================================
    ``[n, tokens, c]``    the trailing tokens form the grid with the images' aspect ratio (a
                          square one for square images); what is left in front, class and
                          register tokens, is dropped
    ``[n, h, w, c]``      recognised where the first two axes have the images' aspect ratio and
                          the last two have not (Swin)
    anything else         as it is
    ===================== ===================================================================

    Args:
        tensor: an activation or a gradient.
        image: (height, width) of the images.
        prefix: how many tokens precede the grid; None, or a number that leaves no such grid, finds
            the fewest that leave one.

    Sizes are all there is to tell by: ``[n, c, positions]``, what is left of a convolution's output
    by ``flatten(2)``, counts as tokens.

    Raises:
        ValueError: tokens that form no such grid.

    >>> import torch
    >>> to_maps(torch.rand(2, 197, 192), (224, 224)).shape
    torch.Size([2, 192, 14, 14])
    >>> to_maps(torch.rand(2, 7, 7, 768), (224, 224)).shape
    torch.Size([2, 768, 7, 7])
    """
    if tensor.dim() == 3:
        grid = _grid(tensor.shape[1], image, prefix)
        return tensor[:, -math.prod(grid) :].mT.unflatten(2, grid)
    return tensor.permute(0, 3, 1, 2) if channel_axis(tensor, image) == 3 else tensor


def channel_axis(tensor: Tensor, image: Sequence[int], layer: nn.Module | None = None) -> int:
    """Which axis of a layer's output counts channels: 1, or the last in a transformer's layout."""
    if tensor.dim() == 3:
        return 2
    if tensor.dim() != 4 or len(image) != 2 or (layer is not None and _convolves(layer, tensor)):
        return 1
    (_, first, second, last), (height, width) = tensor.shape, image
    leads = first * width == second * height
    trails = second * width == last * height
    # A square image makes square maps; of others a convolution only nearly keeps the aspect ratio.
    sure = height == width or last > max(first, second)
    return 3 if leads and not trails and sure else 1


def _convolves(layer: nn.Module, tensor: Tensor) -> bool:
    """Whether the layer is, or ends in, a module that has channels on the second axis.

    Sizes mislead: 64 channels of 64 x 128 look like 64 x 64 positions of 128 channels.
    """
    for module in reversed(list(layer.modules())):
        if isinstance(module, POOLING):
            return True
        if isinstance(module, conv._ConvNd):
            return module.out_channels == tensor.shape[1]
        if isinstance(module, batchnorm._NormBase):
            return module.num_features == tensor.shape[1]
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            return False
    return False


def _grid(tokens: int, image: Sequence[int], prefix: int | None) -> tuple[int, int]:
    height, width = image
    fewest = range(MOST_PREFIX_TOKENS + 1)
    for extra in fewest if prefix is None else (prefix, *fewest):
        # h w = tokens - extra and h / w = height / width
        rows = math.isqrt(max(0, tokens - extra) * height // width)
        if rows and (tokens - extra) % rows == 0:
            columns = (tokens - extra) // rows
            if rows * width == columns * height:
                return rows, columns
    raise ValueError(
        f"reshape_transform: {tokens} tokens form no grid with the aspect ratio of"
        f" {height} x {width} images; pass a function [n, tokens, c] -> [n, c, h, w]"
    )


def check_transform(transform: Any, argument: str = "reshape_transform") -> None:
    if not (transform is None or callable(transform)):
        raise TypeError(
            f"{argument}: expected a function [n, tokens, c] -> [n, c, h, w],"
            f" got {type(transform).__name__}"
        )


def to_spatial(
    tensor: Tensor,
    *,
    transform: Callable[[Tensor], Tensor] | None,
    image: Sequence[int] | None,
    model: nn.Module,
    layer: nn.Module,
    n: int | None = None,
    by_size: bool = True,
) -> Tensor:
    """A layer's output, or a gradient of its kind, as ``[n, channels, ...]``.

    Args:
        transform: the user's reshape_transform.
        image: (height, width) of the images; None where they are not known.
        model: says how many tokens precede the grid, where it is one of timm's.
        n: how many images there are; where they are not the leading axis (tokens in front, windows
            folded into the batch), the layout is left to a reshape_transform.
        layer: whose output it is; what a convolution gives is as it should be.
        by_size: recognise ``[n, h, w, c]`` at all.
    """
    if transform is not None:
        return transform(tensor)
    if image is None or len(image) != 2 or n not in (None, len(tensor)):
        return tensor
    if tensor.dim() == 3 and isinstance(layer, nn.Flatten):
        raise ValueError(
            f"reshape_transform: {list(tensor.shape)} of a Flatten are no tokens; pass a function"
            " [n, c, positions] -> [n, c, h, w], or take the layer in front of it"
        )
    if tensor.dim() == 4 and not (by_size and channel_axis(tensor, image, layer) == 3):
        return tensor
    prefix = getattr(model, "num_prefix_tokens", None)
    return to_maps(tensor, image, prefix if isinstance(prefix, int) else None)


def tokens_to_maps(height: int, width: int, *, prefix: int = 1) -> Callable[[Tensor], Tensor]:
    """A ``reshape_transform`` for token layouts that are not what :func:`to_maps` guesses.

    Args:
        height, width: the grid of tokens.
        prefix: class and register tokens in front of it.

    >>> import torch
    >>> tokens_to_maps(2, 3, prefix=1)(torch.rand(4, 7, 5)).shape
    torch.Size([4, 5, 2, 3])
    """

    def reshape(tensor: Tensor) -> Tensor:
        if tensor.dim() != 3 or tensor.shape[1] != prefix + height * width:
            raise ValueError(
                f"reshape_transform: expected [n, {prefix + height * width}, c], {prefix} and"
                f" {height} x {width} tokens, got {list(tensor.shape)}"
            )
        return tensor[:, prefix:].mT.unflatten(2, (height, width))

    return reshape
