"""One image file to pixels: the only decoder there is, and what it refuses."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastxkd._extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "EXTENSIONS",
    "PIXEL_LIMIT",
    "fit_image",
    "is_image",
    "open_file",
    "open_image",
    "read_image",
]

EXTENSIONS = {
    ".jpg",
    ".jpeg",
    ".jfif",
    ".png",
    ".bmp",
    ".gif",
    ".webp",
    ".tif",
    ".tiff",
    ".pgm",
    ".ppm",
}
# 8192 x 8192. An image that claims more is refused before a single pixel of it is decoded.
PIXEL_LIMIT = 1 << 26
# Decoders for these and no other: left to itself Pillow would also hand PostScript to Ghostscript.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading; a pipe, which would wait for ever, or a device is refused."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


@contextmanager
def open_image(file: str | os.PathLike[str] | BinaryIO) -> Iterator[Image]:
    """A Pillow image whose pixels are not decoded yet; the content says what format it has."""
    pillow = require("PIL", extra="cli")
    image_module = require("PIL.Image", extra="cli")
    opened: AbstractContextManager[BinaryIO] = (
        open_file(file) if isinstance(file, (str, os.PathLike)) else nullcontext(file)
    )
    with opened as stream:
        try:
            image = image_module.open(stream, formats=_FORMATS)
        except pillow.UnidentifiedImageError:
            raise ValueError(f"no image of a known format ({', '.join(_FORMATS)})") from None
        with image:
            yield image


def read_image(
    file: str | os.PathLike[str] | BinaryIO,
    size: int,
    *,
    channels: int = 3,
    max_pixels: int = PIXEL_LIMIT,
) -> Tensor:
    """Decode a file to uint8 [channels, size, size], see :func:`fit_image`.

    Of an animation the first picture counts.

    Raises:
        ValueError: not an image, or one of more than ``max_pixels``, which is not decoded.
        OSError: the file cannot be read or ends too early.
        Exception: whatever else a decoder raises on a damaged file.
    """
    with open_image(file) as image:
        return fit_image(image, size, channels=channels, max_pixels=max_pixels)


def fit_image(
    image: Image, size: int, *, channels: int = 3, max_pixels: int = PIXEL_LIMIT
) -> Tensor:
    """A Pillow image to uint8 [channels, size, size]: EXIF turned, transparency on white.

    The shorter side is scaled to ``size`` and the middle is cut out. Three channels are RGB, one
    is grey. Pixels of 16 bits keep their upper eight.

    Raises:
        ValueError: more than ``max_pixels``; pixels whose range cannot be known.
    """
    image_module = require("PIL.Image", extra="cli")
    operations = require("PIL.ImageOps", extra="cli")
    width, height = image.size
    if not 0 < width * height <= max_pixels:
        raise ValueError(f"{width} x {height} pixels, expected 1 to {max_pixels:,}")
    # Turning makes a copy that no longer knows where it came from.
    scaled_to_16_bits = image.format in ("PNG", "PPM")
    image = operations.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and scaled_to_16_bits):
        image = image_module.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} can have any range; save 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = image_module.new("RGBA", image.size, (255, 255, 255, 255))
        image = image_module.alpha_composite(white, image)
    fitted = operations.fit(
        image.convert("L" if channels == 1 else "RGB"),
        (size, size),
        method=image_module.Resampling.BILINEAR,
    )
    pixels = torch.from_numpy(np.array(fitted))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()
