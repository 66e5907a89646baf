"""Images of a source as batches of pixels, in order; what cannot be had is a value, not an end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastxkd.runs.data import why
from fastxkd.runs.sources import ImageError, Sample, Source, spread

NO_LABEL = -1
# How far to look for images that can be read before work begins.
PROBED = 64


class Loaded(NamedTuple):
    """Rows ``first ..`` of the source. Failed ones are zeros, so that the others are computed in
    the same company with and without them."""

    first: int
    images: Tensor  # [n, c, h, w]
    labels: Tensor  # int64 [n], NO_LABEL where there is none
    names: list[str]
    failed: dict[int, str]  # row of the batch -> reason


def readable(source: Source, wanted: int = 2) -> list[int]:
    """Where the first images are that can be read.

    Looks at the first few of the source, then at a few from all over it.

    Raises:
        ValueError: none of them can be read.
    """
    count, reason = len(source), ""
    places = dict.fromkeys([*range(min(count, PROBED // 2)), *spread(count, PROBED // 2)])
    found = []
    for index in places:
        try:
            source[index]
            found.append(index)
        except ImageError as error:
            reason = reason or f"{error.name}: {error}"
        if len(found) == wanted:
            break
    if not found:
        raise ValueError(
            f"data: none of the {len(places)} images looked at can be read, the first: {reason}"
        )
    return found


class Images(torch.utils.data.Dataset[Loaded]):
    """Ranges of a source by (first, stop), or any places as a list; for a DataLoader's workers."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.dtype = torch.float32 if source.mean is None else torch.uint8

    def __getitem__(self, places: tuple[int, int] | list[int]) -> Loaded:
        rows = range(*places) if isinstance(places, tuple) else places
        images = torch.zeros(len(rows), *self.source.shape, dtype=self.dtype)
        labels = torch.full((len(rows),), NO_LABEL)
        names: list[str] = []
        failed: dict[int, str] = {}
        for row, index in enumerate(rows):
            try:
                sample: Sample = self.source[index]
                images[row] = sample.image
                if sample.label is not None:
                    labels[row] = sample.label
                names.append(sample.name)
            # The source turns what goes wrong with an image into an ImageError; what goes wrong
            # in the source itself must not end a run either.
            except Exception as error:
                images[row] = 0
                names.append(error.name if isinstance(error, ImageError) else f"image {index}")
                failed[row] = str(error) if isinstance(error, ImageError) else why(error)
        return Loaded(rows[0], images, labels, names, failed)


def ranges(
    chunks: Iterable[int], images: int, chunk: int, batch_size: int
) -> Iterator[tuple[int, int]]:
    """(first, stop) of the batches of chunks. A batch lies within a chunk, so that who shares it
    depends on nothing but the source, ``chunk`` and ``batch_size``.

    >>> list(ranges([1], 10, 5, 3))
    [(5, 8), (8, 10)]
    """
    for number in chunks:
        stop = min(images, (number + 1) * chunk)
        for first in range(number * chunk, stop, batch_size):
            yield first, min(stop, first + batch_size)


def load(images: Images, places: Iterable[Any], *, workers: int, pinned: bool) -> Iterator[Loaded]:
    """The batches at ``places`` in their order; ``places`` is read ahead as workers ask for it."""
    if not workers:
        return (images[place] for place in places)
    return iter(
        torch.utils.data.DataLoader(
            images,
            batch_size=None,
            sampler=places,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pinned,
            # Its own generator: a run must not move the caller's random numbers.
            generator=torch.Generator(),
        )
    )


def _as_it_is(batch: Any) -> Any:
    return batch
