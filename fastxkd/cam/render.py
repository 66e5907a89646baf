"""Saliency maps as pictures: colour, overlay, PNG.

Nothing here needs more than NumPy and torch, except the PNG encoder (Pillow, extra ``report``).
"""

from __future__ import annotations

import base64
import io
from typing import Any, TypeAlias

import numpy as np
import torch

from fastxkd._extras import require

ArrayLike: TypeAlias = "torch.Tensor | np.ndarray[Any, Any]"
Picture: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"

# Perceptually uniform (CC0, van der Walt and Smith), 33 colours each: linear interpolation between
# them stays within 2/255 of the full table, so drawing a map needs no matplotlib.
_ANCHORS = {
    "inferno": (
        "0000040403120b0724150b37210c4a2f0a5b3d09654a0c6b57106e64156e71196e"
        "7d1e6d8a226a972766a32c61b0315bbc3754c63d4dd04545da4e3ce35933eb6429"
        "f1711ff67e14f98c0afb9b06fcaa0ffbba1ff9c932f5d949f2e865f3f586fcffa4"
    ),
    "magma": (
        "0000040303120a0822130d341d114729115a36106b440f7651127c5d177f6a1c81"
        "762181832681902a819c2e7faa337db73779c23b75cf4070db476ae55064ee5b5e"
        "f4695cf9785dfb8761fd9668fea571feb47bfec287fed194fde0a1fceeb0fcfdbf"
    ),
    "viridis": (
        "440154470d6048186a482374472d7b4537814240863e49893b528b375b8d33638d"
        "2f6b8e2c728e297a8e26828e23898e21918c1f978b1f9f8821a68527ad8131b57b"
        "3dbc744cc26c5cc8636ece5881d34d95d840aadc32c0df25d5e21aeae51afde725"
    ),
}
COLORMAPS = tuple(_ANCHORS)

# A weak pixel keeps some tint: if it faded out altogether, the pale peak of the colour map and an
# untouched white background would look alike. With a tint, brighter always means more.
_WEAKEST = 0.4
OPACITY = 0.85
_ROUNDING = 1e-3


def colors(colormap: str | ArrayLike = "inferno") -> Picture:
    """256 colours from low to high.

    Args:
        colormap: one of ``COLORMAPS``, or your own colours, uint8 [k, 3] with k >= 2, low to high.

    Returns:
        uint8 [256, 3], RGB.
    """
    if isinstance(colormap, str):
        if colormap not in _ANCHORS:
            raise ValueError(f"colormap: expected one of {', '.join(COLORMAPS)}, got {colormap!r}")
        anchors = np.frombuffer(bytes.fromhex(_ANCHORS[colormap]), np.uint8).reshape(-1, 3)
    else:
        anchors = _numpy("colormap", colormap)
        if anchors.dtype != np.uint8 or anchors.ndim != 2 or anchors.shape[1] != 3:
            raise ValueError(
                f"colormap: expected a name or uint8 colours [k, 3], "
                f"got {anchors.dtype} {list(anchors.shape)}"
            )
        if len(anchors) < 2:
            raise ValueError(f"colormap: expected at least 2 colours, got {len(anchors)}")
    at = np.linspace(0, len(anchors) - 1, 256)
    known = np.arange(len(anchors))
    channels = [np.interp(at, known, anchors[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)


def overlay(
    image: ArrayLike,
    map: ArrayLike,
    *,
    opacity: float = OPACITY,
    colormap: str | ArrayLike = "inferno",
    gray: bool = True,
    mean: Any = None,
    std: Any = None,
) -> Picture:
    """``(1 - a) * image + a * color(map)`` with ``a = opacity * (0.4 + 0.6 * map)``.

    Strong pixels cover the image, weak ones let it through, and brighter means more on dark, light
    and grey images alike. The image is shown in grey so that every hue comes from the map.

    Args:
        image: [3, H, W], [1, H, W], [H, W, 3], [H, W, 1] or [H, W], or a batch with N in front of
            the 3-d forms; uint8, or floats in [0, 1]. Tensors are read channels first and arrays
            channels last where both readings are possible.
        map: floats in [0, 1], [h, w] or, for a batch, [N, h, w]; resized to the image if it is
            smaller or larger (bilinear). NaN and Inf leave the image as it is there.
        opacity: weight of the colour where the map is 1, in [0, 1].
        colormap: one of ``COLORMAPS`` or your own uint8 colours [k, 3].
        gray: show the image in grey; ``False`` keeps its colours.
        mean, std: undo ``(x - mean) / std`` first; numbers or one value a channel.

    Returns:
        uint8 [H, W, 3], or [N, H, W, 3] for a batch.

    Raises:
        ValueError: a shape, size or value range that does not fit.
        TypeError: a dtype that is no picture or no map.

    Example:
        >>> import torch
        >>> overlay(torch.zeros(3, 32, 32), torch.rand(8, 8)).shape
        (32, 32, 3)
    """
    if not 0.0 <= opacity <= 1.0:
        raise ValueError(f"opacity: expected a number in [0, 1], got {opacity}")
    picture = to_picture(image, mean=mean, std=std)
    heat = _map(map, batch=picture.shape[:-3], size=picture.shape[-3:-1])
    base = picture.astype(np.float32)
    if gray:
        base = (base @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    known = np.isfinite(heat)
    heat = np.where(known, heat, 0.0)
    alpha = (opacity * (_WEAKEST + (1.0 - _WEAKEST) * heat) * known)[..., None]
    color = colors(colormap)[np.rint(heat * 255).astype(np.uint8)]
    blended: Picture = np.rint((1.0 - alpha) * base + alpha * color).astype(np.uint8)
    return blended


def to_picture(image: ArrayLike, *, mean: Any = None, std: Any = None) -> Picture:
    """An image as a person should see it: uint8 [H, W, 3], or [N, H, W, 3] for a batch.

    Args: as for :func:`overlay`. NaN and Inf pixels come out black.
    """
    channels_first = isinstance(image, torch.Tensor)
    pixels = _numpy("image", image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    elif pixels.ndim in (3, 4):
        first, last = pixels.shape[-3] in (1, 3), pixels.shape[-1] in (1, 3)
        if not (first or last):
            raise ValueError(f"image: expected 1 or 3 channels, got shape {list(pixels.shape)}")
        if first and (channels_first or not last):
            pixels = np.moveaxis(pixels, -3, -1)
    else:
        raise ValueError(
            f"image: expected [3, H, W], [H, W, 3], [H, W] or a batch, got {list(pixels.shape)}"
        )
    if pixels.size == 0:
        raise ValueError(f"image: expected at least one pixel, got shape {list(pixels.shape)}")
    normalised = mean is not None or std is not None
    if pixels.dtype == np.uint8 and not normalised:
        return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:-1], 3)))
    if not np.issubdtype(pixels.dtype, np.floating):
        wanted = "floats, as mean= and std= are given" if normalised else "uint8, or floats"
        raise TypeError(f"image: expected {wanted}, got {pixels.dtype}")
    if normalised:
        channels = pixels.shape[-1]
        pixels = pixels * _per_channel("std", std, channels, 1.0)
        pixels = pixels + _per_channel("mean", mean, channels, 0.0)
    pixels = np.nan_to_num(pixels, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(pixels.min()), float(pixels.max())
    if low < -_ROUNDING or high > 1.0 + _ROUNDING:
        raise ValueError(
            f"image: expected floats in [0, 1], got {low:.3g} to {high:.3g}; "
            "give uint8 pixels, or the mean= and std= the image was normalised with"
        )
    pixels = np.rint(np.clip(pixels, 0.0, 1.0) * 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:-1], 3)))


def heat_png(map: ArrayLike, *, colormap: str | ArrayLike = "inferno") -> bytes:
    """The colour layer of :func:`overlay` alone, as a small PNG with an alpha channel.

    Laid over the image (in grey) at opacity ``o`` it gives ``overlay(..., opacity=o)``.

    Args:
        map: floats in [0, 1], [H, W]; NaN and Inf are transparent.
        colormap: as for :func:`overlay`.
    """
    heat = _map(map, batch=(), size=None)
    known = np.isfinite(heat)
    # Entry 0 is "no value"; the map has the other 255.
    index = np.where(known, 1 + np.rint(np.where(known, heat, 0.0) * 254), 0).astype(np.uint8)
    level = np.concatenate([[0.0], np.linspace(0.0, 1.0, 255)])
    alpha = np.rint(255 * (_WEAKEST + (1.0 - _WEAKEST) * level)).astype(np.uint8)
    alpha[0] = 0
    palette = colors(colormap)[np.rint(255 * level).astype(np.uint8)]
    layer = _pillow().fromarray(index)
    layer.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    layer.save(buffer, format="PNG", optimize=True, transparency=alpha.tobytes())
    return buffer.getvalue()


def resize(map: np.ndarray[Any, Any], size: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Maps [..., h, w] at another size (H, W), bilinear; NaN spreads to its neighbours."""
    if map.shape[-2:] == tuple(size):
        return map
    stacked = torch.from_numpy(np.array(map, np.float32)).reshape(-1, 1, *map.shape[-2:])
    resized = torch.nn.functional.interpolate(stacked, size=tuple(size), mode="bilinear")
    drawn: np.ndarray[Any, Any] = resized.reshape(*map.shape[:-2], *size).numpy()
    return drawn


def png(picture: Picture) -> bytes:
    """uint8 [H, W, 3] or [H, W] as the bytes of a PNG file."""
    fits = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] == 3)
    if picture.dtype != np.uint8 or not fits:
        raise ValueError(
            f"picture: expected uint8 [H, W, 3], got {picture.dtype} {list(picture.shape)}"
        )
    buffer = io.BytesIO()
    _pillow().fromarray(np.ascontiguousarray(picture)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_uri(data: bytes, *, mime: str = "image/png") -> str:
    """``data:image/png;base64,...``: the picture itself where a page expects an address."""
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def _pillow() -> Any:
    return require("PIL.Image", extra="report")


def _numpy(name: str, value: ArrayLike) -> np.ndarray[Any, Any]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        # NumPy has no bfloat16.
        return (value.float() if value.is_floating_point() else value).numpy()
    if isinstance(value, np.ndarray):
        return value
    raise TypeError(f"{name}: expected a tensor or an array, got {type(value).__name__}")


def _per_channel(name: str, value: Any, channels: int, default: float) -> np.ndarray[Any, Any]:
    values = np.asarray(default if value is None else value, np.float32).reshape(-1)
    if len(values) not in (1, channels):
        raise ValueError(f"{name}: expected 1 or {channels} values, got {len(values)}")
    return values


def _map(
    map: ArrayLike, *, batch: tuple[int, ...], size: tuple[int, ...] | None
) -> np.ndarray[Any, Any]:
    heat = _numpy("map", map)
    if not np.issubdtype(heat.dtype, np.floating):
        raise TypeError(f"map: expected floats in [0, 1], got {heat.dtype}")
    if heat.ndim != 2 + len(batch) or heat.shape[:-2] != batch or heat.size == 0:
        wanted = ", ".join([*(str(n) for n in batch), "H", "W"])
        raise ValueError(f"map: expected [{wanted}] to match the image, got {list(heat.shape)}")
    known = np.isfinite(heat)
    finite = heat[known]
    if finite.size and (finite.min() < -_ROUNDING or finite.max() > 1.0 + _ROUNDING):
        raise ValueError(
            f"map: expected values in [0, 1], got {finite.min():.3g} to {finite.max():.3g}; "
            "ask the explainer for normalize='minmax'"
        )
    heat = np.where(known, np.clip(heat, 0.0, 1.0), np.nan).astype(np.float32)
    return heat if size is None else resize(heat, size)
