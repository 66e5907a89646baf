"""Data sets that hand out their own items: objects, factories of them, and torchvision's."""

from __future__ import annotations

import hashlib
import inspect
import logging
import operator
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastxkd._extras import require
from fastxkd.runs.data import why
from fastxkd.runs.models import find_factory, users_own
from fastxkd.runs.pictures import fit_image
from fastxkd.runs.sources import SPECS, ImageError, Settings, Source, spread

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_KEYS = ("image", "img", "images", "pixel_values", "input", "x")
LABEL_KEYS = ("label", "labels", "target", "targets", "cls", "class", "y")
_TRIED = 16
# Of items that stand for all of them when a run is continued.
_SAMPLED = 8
_log = logging.getLogger("fastxkd")


class ItemSource(Source):
    """Items of any object with a length: what :func:`open_items` describes."""

    def __init__(
        self, spec: str, dataset: Any, settings: Settings, reopen: Callable[[], Any] | None = None
    ) -> None:
        count = _length(dataset, spec)
        self._dataset, self._reopen = dataset, reopen
        first = _first(dataset, count, spec)
        if isinstance(first, Tensor):
            size = settings.image_size
            channels, height, width = first.shape
            floats = first.is_floating_point()
            if not floats and settings.channels not in (None, channels):
                raise ValueError(
                    f"channels: the images of {spec} have {channels}, got {settings.channels}"
                )
            shape = (channels, height, width) if size is None or floats else (channels, size, size)
        else:
            shape, floats = picture_shape(first, settings), False
        super().__init__(spec, count, _classes(dataset), shape, settings, floats=floats)

    def describe(self) -> dict[str, Any]:
        """With a fingerprint of a few items; None where they differ from one look to the next."""
        samples = [self._sampled(), self._sampled()]
        if samples[0] != samples[1]:
            _log.warning(
                "data: items of %s are others each time they are read (random augmentation?); "
                "every start of a run sees other images",
                self.spec,
            )
        return {**super().describe(), "fingerprint": samples[0] if len({*samples}) == 1 else None}

    def _sampled(self) -> str:
        digest = hashlib.sha256()
        for index in spread(len(self), _SAMPLED):
            try:
                image, label, _ = self[index]
                digest.update(f"{index} {label}".encode())
                digest.update(image.contiguous().numpy().data)
            except ImageError as error:
                digest.update(f"{index} {error}".encode())
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        # What was made here can be made again there, however it is put together inside.
        return {**self.__dict__, "_dataset": None} if self._reopen else self.__dict__

    def _read(self, index: int) -> tuple[Tensor, int | None]:
        if self._dataset is None and self._reopen is not None:
            self._dataset = self._reopen()
        count = len(self._dataset)
        if count != self._count:
            raise ValueError(f"the data set had {self._count} images when opened, now {count}")
        image, label = _split_item(self._dataset[index])
        found = _as_image(image)
        if isinstance(found, Tensor):
            wanted = self.settings.image_size
            if found.dtype == torch.uint8 and wanted is not None:
                found = _fit_pixels(found, wanted, self.settings.max_pixels)
        else:
            channels, size, _ = self.shape
            found = fit_image(found, size, channels=channels, max_pixels=self.settings.max_pixels)
        return found, _as_label(label)


def picture_shape(image: Image, settings: Settings) -> tuple[int, int, int]:
    """(C, H, W) of what is made of pictures if this is the first of them."""
    grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I;16")
    size = settings.image_size or max(8, min(224, *image.size))
    return settings.channels or (1 if grey else 3), size, size


def open_items(data: object, settings: Settings, *, follow_links: bool) -> Source:
    """Open an object with a length and items (a map-style ``Dataset``, a list).

    An item is an image, a tuple or list ``(image, label, ...)`` or a mapping with one of the keys
    ``image``, ``img``, ``images``, ``pixel_values``, ``input``, ``x`` and perhaps ``label``,
    ``labels``, ``target``, ``targets``, ``cls``, ``class``, ``y``. An image is a Pillow image, a
    tensor [C, H, W] or [H, W], or an array [H, W], [H, W, C] or [C, H, W]. Pixels of uint8 (and
    the upper half of uint16) are scaled to ``image_size`` and normalised; floats are taken to be
    what the model wants. A label that is no whole number, or below 0, counts as none.

    Raises:
        TypeError: no length or no items.
        ValueError: a length that is none, no images, none of the first images can be had.
    """
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(data, datasets.Dataset) and not data.format["type"]:
        from fastxkd.runs.huggingface import SavedSource

        spec = "a Hugging Face data set"
        return SavedSource(spec, data, settings, follow_links=follow_links)
    kind = type(data)
    if isinstance(data, torch.utils.data.IterableDataset) or not (
        hasattr(kind, "__len__") and hasattr(kind, "__getitem__")
    ):
        raise TypeError(
            f"data: expected {SPECS}; got a {kind.__name__}, which cannot be asked for its length "
            "and for one image after another"
        )
    return ItemSource(f"{kind.__module__}.{kind.__qualname__} object", data, settings)


def open_spec(spec: str, text: str, split: str | None, settings: Settings) -> Source:
    """Open ``torchvision:NAME:ROOT``, ``package.module:factory`` or ``file.py:factory``.

    Nothing is downloaded. A factory is called without arguments, or with ``image_size`` if its
    signature names that and the run was given one; workers call it again.

    Raises:
        ValueError: unknown name, a factory that fails or needs more, data that is not there.
    """
    kind, _, rest = text.partition(":")
    if kind == "torchvision":
        name, _, root = rest.partition(":")
        make: Callable[[], Any] = _Torchvision(name, root, split)
    elif split is None and text.rpartition(":")[0]:
        make = _Made(text, settings.image_size)
    else:
        raise ValueError(f"data: expected {SPECS}, got {spec!r}")
    dataset = make()
    kind_made = type(dataset)
    if not (hasattr(kind_made, "__len__") and hasattr(kind_made, "__getitem__")):
        raise ValueError(
            f"data: {spec} made a {kind_made.__name__}, expected a data set with a length and items"
        )
    return ItemSource(spec, dataset, settings, reopen=make)


class _Made:
    """Calls a user's factory, here and again in every worker."""

    def __init__(self, spec: str, image_size: int | None) -> None:
        self.spec, self.image_size = spec, image_size

    def __call__(self) -> Any:
        factory = find_factory(self.spec, argument="data", expected=SPECS)
        try:
            parameters = dict(inspect.signature(factory).parameters)
        except (TypeError, ValueError):
            parameters = {}
        size = parameters.pop("image_size", None)
        missing = [
            name
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        if size is not None and size.default is size.empty and self.image_size is None:
            raise ValueError(f"image_size: {self.spec} needs it")
        if missing:
            raise ValueError(
                f"data: {self.spec} needs the argument(s) {', '.join(missing)}, but a run can only "
                "give image_size"
            )
        given = {} if size is None or self.image_size is None else {"image_size": self.image_size}
        try:
            return factory(**given)
        except Exception as error:
            raise ValueError(f"data: {self.spec} failed: {why(error)}") from error


class _Torchvision:
    """Opens a data set of torchvision from files that are there already."""

    def __init__(self, name: str, root: str, split: str | None) -> None:
        self.name, self.root, self.split = name, root, split

    def __call__(self) -> Any:
        module = users_own("torchvision.datasets")
        made: Any = getattr(module, self.name, None) if self.name in module.__all__ else None
        if not isinstance(made, type) or not self.root:
            close = [name for name in module.__all__ if name.lower() == self.name.lower()]
            hint = f"; did you mean {close[0]}?" if close and self.name not in close else ""
            raise ValueError(
                f"data: expected torchvision:NAME:ROOT with a class of torchvision.datasets, got "
                f"{self.name!r} and {self.root!r}{hint}"
            )
        parameters = inspect.signature(made).parameters
        options: dict[str, Any] = {"download": False} if "download" in parameters else {}
        if "train" in parameters and self.split in (None, "train", "test"):
            options["train"] = self.split == "train"
        elif "split" in parameters:
            options["split"] = self.split or "test"
        elif self.split is not None:
            raise ValueError(f"data: torchvision's {self.name} has no part {self.split!r}")
        try:
            return made(str(Path(self.root).expanduser()), **options)
        except Exception as error:
            raise ValueError(
                f"data: torchvision's {self.name} does not open in {self.root}: {why(error)}"
            ) from error


def _length(dataset: Any, spec: str) -> int:
    try:
        return len(dataset)
    except Exception as error:
        raise ValueError(f"data: {spec} has no usable length: {why(error)}") from error


def _first(dataset: Any, count: int, spec: str) -> Any:
    """The first image that can be had: it decides what the others must look like."""
    failures = []
    for index in range(min(count, _TRIED)):
        try:
            return _as_image(_split_item(dataset[index])[0])
        except Exception as error:
            failures.append(why(error))
    if not failures:
        raise ValueError(f"data: {spec} has no images")
    raise ValueError(
        f"data: none of the first {len(failures)} images of {spec} can be had; the first: "
        f"{failures[0]}"
    )


def _split_item(item: Any) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        image = next((key for key in IMAGE_KEYS if key in item), None)
        if image is None:
            raise ValueError(
                f"expected one of the keys {', '.join(IMAGE_KEYS)}, got "
                f"{', '.join(map(str, item)) or 'none'}"
            )
        label = next((key for key in LABEL_KEYS if key in item), None)
        return item[image], None if label is None else item[label]
    if isinstance(item, (tuple, list)):
        if not item:
            raise ValueError(f"expected an image, got an empty {type(item).__name__}")
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _as_image(image: Any) -> Any:
    """A Pillow image as it is; anything else as a tensor [C, H, W], uint8 or float32."""
    pillow = sys.modules.get("PIL.Image")
    if pillow is not None and isinstance(image, pillow.Image):
        return image
    if isinstance(image, np.ndarray):
        pixels = _from_array(image)
    elif isinstance(image, Tensor):
        pixels = image.detach().cpu()
    else:
        raise ValueError(
            f"expected a Pillow image, a tensor or an array, got a {type(image).__name__}"
        )
    if pixels.dim() == 2:
        pixels = pixels[None]
    if pixels.dim() != 3 or 0 in pixels.shape:
        raise ValueError(f"expected an image [C, H, W], got {list(pixels.shape)}")
    if pixels.is_floating_point():
        return pixels.float()
    if pixels.dtype != torch.uint8:
        raise ValueError(f"expected pixels of uint8 or floats, got {pixels.dtype}")
    return pixels


def _from_array(image: np.ndarray) -> Tensor:
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    if image.dtype.kind not in "fu":
        raise ValueError(f"expected pixels of uint8, uint16 or floats, got {image.dtype}")
    if image.ndim == 3 and image.shape[2] in (1, 3, 4):
        image = image.transpose(2, 0, 1)
    # A copy: arrays may be read-only, and tensors know no such thing.
    return torch.from_numpy(np.array(image, order="C", copy=True))


def _as_label(label: Any) -> int | None:
    if isinstance(label, Tensor):
        label = label.item() if label.numel() == 1 else None
    try:
        number = operator.index(label)
    except TypeError:
        return None
    return number if number >= 0 else None


def _fit_pixels(pixels: Tensor, size: int, max_pixels: int) -> Tensor:
    """uint8 [C, H, W] as if every channel were a grey picture, which is what a picture does."""
    make = require("PIL.Image", extra="cli").fromarray
    channels = [make(channel.contiguous().numpy()) for channel in pixels]
    return torch.cat([fit_image(c, size, channels=1, max_pixels=max_pixels) for c in channels])


def _classes(dataset: Any) -> list[str] | None:
    try:
        found = getattr(dataset, "classes", None)
    except Exception:  # a property of the user's that does not work is as good as none
        return None
    if isinstance(found, (list, tuple)) and found and all(isinstance(name, str) for name in found):
        return list(found)
    return None
