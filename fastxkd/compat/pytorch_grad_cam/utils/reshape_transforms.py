"""Reshape functions by their usual names; explainers recognise these layouts by themselves."""

from __future__ import annotations

from torch import Tensor

from fastxkd.cam.layouts import tokens_to_maps


def vit_reshape_transform(tensor: Tensor, height: int = 14, width: int = 14) -> Tensor:
    """``[n, 1 + height * width, c] -> [n, c, height, width]``, without the class token."""
    return tokens_to_maps(height, width, prefix=1)(tensor)


def swinT_reshape_transform(tensor: Tensor, height: int = 7, width: int = 7) -> Tensor:
    """``[n, height * width, c] -> [n, c, height, width]``."""
    return tokens_to_maps(height, width, prefix=0)(tensor)
