"""What the metrics ask of images and maps, and the order they put pixels in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxkd.ops._checks import check_float


def check_images(images: Any, name: str = "images") -> None:
    check_float(name, images)
    if images.dim() != 4 or images.numel() == 0:
        raise ValueError(
            f"{name}: expected [n, channels, h, w] with none of them 0, got {list(images.shape)}"
        )


def check_maps(maps: Any, name: str = "maps") -> None:
    check_float(name, maps)
    if maps.dim() != 3 or maps.numel() == 0:
        raise ValueError(f"{name}: expected [n, h, w] with none of them 0, got {list(maps.shape)}")


def check_maps_of(images: Tensor, maps: Any, name: str = "maps") -> None:
    """Maps at the images' resolution, on their device."""
    check_maps(maps, name)
    expected = [images.shape[0], *images.shape[2:]]
    if list(maps.shape) != expected:
        raise ValueError(
            f"{name}: expected {expected}, one value a pixel of images {list(images.shape)}, got"
            f" {list(maps.shape)}; explainers resize to the input by default"
        )
    if maps.device != images.device:
        raise ValueError(
            f"{name}: expected the device of images, {images.device}, got {maps.device}"
        )


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """What a value that has been rounded is worked on in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def pixel_order(maps: Tensor) -> Tensor:
    """``[n, h, w]`` ranks: 0 the most relevant pixel; equal ones in reading order."""
    flat = maps.flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(flat.shape[1], device=maps.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view(maps.shape)


def nan_where_map_is(maps: Tensor, values: Tensor) -> Tensor:
    """A map with NaN has no order: what came of it is NaN, and of no other."""
    return values.where(~maps.flatten(1).isnan().any(1), torch.nan)
