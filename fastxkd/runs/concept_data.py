"""Images with concepts on them: what a network dissection asks the units of a layer about.

A concept source is a source of images (sources.py) whose items also have masks and labels. What is
wrong with one image, its masks or its row is an :class:`ImageError` that names file and row; what
makes the whole data set useless is a ``ValueError`` when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastxkd._extras import require
from fastxkd.metrics.concept_scores import Concepts
from fastxkd.runs.data import why
from fastxkd.runs.names import printable
from fastxkd.runs.pictures import PIXEL_LIMIT, open_image
from fastxkd.runs.sources import ImageError, Settings, Source

CONCEPT_SPECS = (
    "broden:ROOT[#SPLIT] (index.csv, label.csv, category.csv, c_*.csv), conceptfolder:ROOT "
    "(images/, masks/LAYER/, labels.csv) or composed[:COUNT[@SEED]] (stamps on textures)"
)
T = TypeVar("T")

# Labels are decoded from 16 bits.
MOST_LABELS = 1 << 16


class ConceptSample(NamedTuple):
    """image uint8 [C, H, W]; masks int32 [M, h, w], 0 for none; labels of the whole image."""

    image: Tensor
    masks: Tensor
    labels: list[int]
    name: str


class ConceptSource(Source):
    """Images by index with what is to be seen on them; see :func:`open_concepts`.

    Attributes:
        concepts: what the labels mean.
        mask_size: (h, w) of every mask that is handed out.
        allow_empty: whether a mask may have no labelled pixel at all.
    """

    def __init__(
        self,
        spec: str,
        count: int,
        concepts: Concepts,
        mask_size: tuple[int, int],
        settings: Settings,
        *,
        size: int | None = None,
        classes: list[str] | None = None,
        allow_empty: bool = False,
    ) -> None:
        side, channels = settings.image_size or 224, settings.channels or 3
        super().__init__(spec, count, classes, (channels, side, side), settings)
        if size is not None and size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        self.concepts, self.allow_empty = concepts, allow_empty
        self._stored_size = mask_size
        self.mask_size = mask_size if size is None else (size, size)
        # By number; labels without a name are none.
        self._known = np.zeros(MOST_LABELS, dtype=bool)
        self._known[: len(concepts)] = [bool(name) for name in concepts.names]
        self._known[0] = True

    def __getitem__(self, index: int) -> ConceptSample:  # type: ignore[override]
        return ConceptSample(*self._guarded(index, self._checked), self.name(index))

    def annotations(self, index: int) -> tuple[Tensor, list[int]]:
        """Masks and labels of an image that is not looked at itself.

        Raises:
            ImageError: they cannot be had.
        """
        return self._guarded(index, self._annotations)

    def _guarded(self, index: int, read: Callable[[int], T]) -> T:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        try:
            return read(index)
        # A decoder may raise anything on a damaged file; none of it may end a run.
        except Exception as error:
            raise ImageError(self.name(index), reason(error)) from error

    def _checked(self, index: int) -> tuple[Tensor, Tensor, list[int]]:
        found = self._concepts(index)
        self._check(found[0], None)
        return found

    def _concepts(self, index: int) -> tuple[Tensor, Tensor, list[int]]:
        """Image, masks and labels."""
        masks, labels = self._annotations(index)
        return self._picture(index), masks, labels

    def _annotations(self, index: int) -> tuple[Tensor, list[int]]:
        raise NotImplementedError

    def _picture(self, index: int) -> Tensor:
        raise NotImplementedError

    def _image(self, file: str | os.PathLike[str], place: str) -> Tensor:
        """All of an image as uint8 [C, H, W]; ``place`` is what errors call it."""
        channels, size, _ = self.shape
        try:
            return read_whole(file, size, channels=channels, max_pixels=self.settings.max_pixels)
        except Exception as error:
            raise ValueError(f"{place}: {reason(error)}") from error

    def _mask(self, file: str | os.PathLike[str], place: str) -> np.ndarray[Any, Any]:
        """The mask in a file, int32 [h, w]; ``place`` is what errors call it.

        Raises:
            ValueError: missing, damaged, of another size, with labels that are none, or without
                any.
        """
        try:
            mask = read_mask(file, self._stored_size)
        except Exception as error:
            raise ValueError(f"{place}: {reason(error)}") from error
        self._check_labels(np.flatnonzero(np.bincount(mask.ravel())), place)
        if not self.allow_empty and not mask.any():
            raise ValueError(f"{place}: no pixel has a label")
        return at_size(mask, self.mask_size)

    def _check_labels(self, labels: Any, place: str) -> None:
        unknown = [n for n in np.asarray(labels, dtype=np.int64).tolist() if not self._knows(n)]
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise ValueError(f"{place}: unknown label {unknown[0]}{more}")

    def _labels_in(self, items: Sequence[str], place: str) -> list[int]:
        """The labels in a field of a table."""
        odd = [item for item in items if not is_number(item)]
        if odd:
            raise ValueError(f"{place}: expected numbers of labels, got {odd[0][:40]!r}")
        labels = [int(item) for item in items]
        self._check_labels(labels, place)
        return labels

    def _knows(self, label: int) -> bool:
        return 0 <= label < MOST_LABELS and bool(self._known[label])

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "mask_size": list(self.mask_size),
            "categories": list(self.concepts.categories),
            "labels": sum(map(bool, self.concepts.names)),
            "concepts_fingerprint": hashlib.sha256(
                json.dumps(asdict(self.concepts)).encode()
            ).hexdigest(),
            "allow_empty": self.allow_empty,
        }


def is_number(text: str) -> bool:
    """Whether it is one, and not too long to be told from others."""
    return text.isdecimal() and len(text) < 19


def reason(error: Exception) -> str:
    """One line that says what went wrong."""
    return why(error).removeprefix("ValueError: ")


def at_size(mask: np.ndarray[Any, Any], size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Labels [h, w] at another size: of each pixel, the one under its centre."""
    if mask.shape == size:
        return mask
    rows, columns = (
        ((np.arange(to) + 0.5) * length / to).astype(np.int64)
        for to, length in zip(size, mask.shape, strict=True)
    )
    return mask[np.ix_(rows, columns)]


def stacked(masks: Sequence[np.ndarray[Any, Any]], size: tuple[int, int]) -> Tensor:
    """Masks as int32 [M, h, w], also where there are none."""
    if not masks:
        return torch.zeros(0, *size, dtype=torch.int32)
    return torch.from_numpy(np.stack(masks).astype(np.int32))


def read_whole(
    file: str | os.PathLike[str], size: int, *, channels: int, max_pixels: int
) -> Tensor:
    """An image to uint8 [channels, size, size], stretched where it is no square.

    Nothing is cut off and nothing is turned: masks lie on all of the image as it is stored.

    Raises:
        ValueError: not an image, one of too many pixels, or of pixels whose range is not known.
    """
    resampling = require("PIL.Image", extra="cli").Resampling
    with open_image(file) as image:
        width, height = image.size
        if not 0 < width * height <= max_pixels:
            raise ValueError(f"{width} x {height} pixels, expected 1 to {max_pixels:,}")
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            raise ValueError(f"pixels of mode {image.mode}, expected 8 bits a channel")
        whole = image.convert("L" if channels == 1 else "RGB")
        if whole.size != (size, size):
            whole = whole.resize((size, size), resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(whole))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def read_mask(file: str | os.PathLike[str], size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Numbers of labels, int32 [h, w]: R + 256 G of colours, else the grey or palette value.

    Raises:
        ValueError: not an image, of another size, or of pixels that cannot be numbers.
    """
    with open_image(file) as image:
        if image.format == "JPEG":
            raise ValueError("a JPEG, which does not keep the numbers of labels, expected PNG")
        if image.size != (size[1], size[0]):
            raise ValueError(
                f"{image.size[1]} x {image.size[0]} pixels, expected {size[0]} x {size[1]} like"
                " the other masks"
            )
        pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.dtype == np.uint8 and pixels.shape[2] in (3, 4):
        return pixels[..., 0].astype(np.int32) + 256 * pixels[..., 1].astype(np.int32)
    if pixels.ndim == 2 and pixels.dtype.kind in "bui":
        mask = pixels.astype(np.int64)
        if mask.min() >= 0 and mask.max() < MOST_LABELS:
            return mask.astype(np.int32)
    raise ValueError(
        f"a mask of {pixels.dtype} {list(pixels.shape)}, expected RGB, or grey of 8 or 16 bits"
    )


class ConceptBatch(NamedTuple):
    """Rows ``first ..`` of a source; failed ones are empty."""

    first: int
    images: Tensor  # uint8 [n, c, H, W]
    masks: Tensor  # int32 [n, M, h, w]
    labels: Tensor  # int64 [n, S]
    names: list[str]
    failed: dict[int, str]  # row of the batch -> reason

    @property
    def kept(self) -> list[int]:
        return [row for row in range(len(self.names)) if row not in self.failed]


class ConceptImages(torch.utils.data.Dataset[ConceptBatch]):
    """Ranges of a source by (first, stop); for a DataLoader's workers.

    Args:
        source: the data.
        pixels: without, images are zeros, and no image file is opened.
    """

    def __init__(self, source: ConceptSource, *, pixels: bool = True) -> None:
        self.source, self.pixels = source, pixels

    def __getitem__(self, place: tuple[int, int]) -> ConceptBatch:
        rows = range(*place)
        found: dict[int, tuple[Tensor, list[int]]] = {}
        images = torch.zeros(len(rows), *self.source.shape, dtype=torch.uint8)
        names: list[str] = []
        failed: dict[int, str] = {}
        for row, index in enumerate(rows):
            try:
                if self.pixels:
                    sample = self.source[index]
                    images[row], found[row] = sample.image, (sample.masks, sample.labels)
                else:
                    found[row] = self.source.annotations(index)
                names.append(self.source.name(index))
            except Exception as error:
                names.append(error.name if isinstance(error, ImageError) else f"image {index}")
                failed[row] = str(error) if isinstance(error, ImageError) else why(error)
        layers = max((len(masks) for masks, _ in found.values()), default=0)
        most = max((len(given) for _, given in found.values()), default=0)
        masks = torch.zeros(len(rows), layers, *self.source.mask_size, dtype=torch.int32)
        labels = torch.zeros(len(rows), most, dtype=torch.int64)
        for row, (some, given) in found.items():
            masks[row, : len(some)] = some
            labels[row, : len(given)] = torch.tensor(given, dtype=torch.int64)
        return ConceptBatch(rows[0], images, masks, labels, names, failed)


def open_concepts(
    data: object,
    *,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    channels: int | None = None,
    max_pixels: int = PIXEL_LIMIT,
    size: int | None = None,
    allow_empty: bool = False,
) -> ConceptSource:
    """Open a concept data set.

    Args:
        data: one of

            - ``broden:ROOT[#SPLIT]``, see :func:`fastxkd.runs.broden.open_broden`;
            - ``conceptfolder:ROOT``, see :func:`fastxkd.runs.concept_folder.open_concept_folder`;
            - ``composed[:COUNT[@SEED]]``, see
              :class:`fastxkd.runs.concept_stamps.ComposedConcepts`;
            - a :class:`ConceptSource`, which is returned.
        image_size: side in pixels that images are stretched to; default 224.
        mean, std, channels, max_pixels: as in :func:`fastxkd.runs.sources.open_source`.
        size: side that masks are brought to, by the label under each pixel's centre; None: as they
            are stored, for composed ones 112.
        allow_empty: take masks without a labelled pixel, which are damage otherwise.

    Raises:
        ValueError: unknown spec, missing or damaged tables, no images.
    """
    settings = Settings(
        image_size,
        channels,
        None if mean is None else tuple(map(float, mean)),
        None if std is None else tuple(map(float, std)),
        max_pixels,
    )
    if isinstance(data, ConceptSource):
        if settings != Settings() or size is not None or allow_empty:
            raise ValueError("data: this source is open already; give the options when opening it")
        return data
    if not isinstance(data, str):
        raise TypeError(f"data: expected {CONCEPT_SPECS}, got {type(data).__name__}")
    kind, _, rest = data.partition(":")
    options: dict[str, Any] = {"size": size, "allow_empty": allow_empty}
    if kind == "broden" and rest:
        from fastxkd.runs.broden import open_broden

        root, mark, split = rest.rpartition("#")
        if not mark or os.path.exists(os.path.expanduser(rest)):
            root, split = rest, ""
        folder = Path(root).expanduser()
        return open_broden(data, folder, split or None, settings, **options)
    if kind == "conceptfolder" and rest:
        from fastxkd.runs.concept_folder import open_concept_folder

        folder = Path(rest).expanduser()
        return open_concept_folder(data, folder, settings, **options)
    if kind == "composed":
        from fastxkd.runs.concept_stamps import open_composed

        return open_composed(data, rest, settings, size)
    raise ValueError(f"data: expected {CONCEPT_SPECS}, got {printable(data)!r}")
