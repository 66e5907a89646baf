"""Data sets that Hugging Face ``datasets`` wrote to disk, decoded here and not by that library."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastxkd._extras import require
from fastxkd.runs.data import why
from fastxkd.runs.items import IMAGE_KEYS, LABEL_KEYS, picture_shape
from fastxkd.runs.pictures import open_image, read_image
from fastxkd.runs.sources import Settings, Source

_TRIED = 16


class SavedSource(Source):
    """One ``datasets.Dataset``: its column of images, its column of labels if it has one."""

    def __init__(
        self, spec: str, dataset: Any, settings: Settings, *, follow_links: bool = False
    ) -> None:
        datasets = require("datasets", extra="datasets")
        require("PIL.Image", extra="cli")
        features: Mapping[str, Any] = dataset.features
        pictures = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        if not pictures:
            raise ValueError(
                f"data: {spec} has no column of images (feature Image); its columns are "
                f"{', '.join(map(str, features)) or 'none'}"
            )
        named = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        counted = [
            name
            for name, kind in features.items()
            if name in LABEL_KEYS and "int" in str(getattr(kind, "dtype", ""))
        ]
        self.image_column = _preferred(pictures, IMAGE_KEYS)
        self.label_column = _preferred(named or counted, LABEL_KEYS) if named or counted else None
        self._fingerprint = getattr(dataset, "_fingerprint", None)
        self._follow_links = follow_links
        wanted = [self.image_column, *([self.label_column] if self.label_column else [])]
        # The library's own decoder knows no limit of size and opens whatever file a path names.
        self._dataset = dataset.select_columns(wanted).cast_column(
            self.image_column, datasets.Image(decode=False)
        )
        classes = list(features[self.label_column].names) if named and self.label_column else None
        count = len(self._dataset)
        if count < 1:
            raise ValueError(f"data: {spec} has no images")
        shape = self._first_shape(count, spec, settings)
        super().__init__(spec, count, classes, shape, settings)

    def _first_shape(self, count: int, spec: str, settings: Settings) -> tuple[int, int, int]:
        failures = []
        for index in range(min(count, _TRIED)):
            try:
                with open_image(self._file(self._dataset[index])) as image:
                    return picture_shape(image, settings)
            except Exception as error:
                failures.append(why(error))
        raise ValueError(
            f"data: none of the first {len(failures)} images of {spec} can be had; the first: "
            f"{failures[0]}"
        )

    def _file(self, row: Mapping[str, Any]) -> Path | io.BytesIO:
        value = row[self.image_column]
        if not value or (value["bytes"] is None and value["path"] is None):
            raise ValueError("the row has no image")
        if value["bytes"] is not None:
            return io.BytesIO(value["bytes"])
        if not self._follow_links:
            raise ValueError(
                "its image is a file outside the data set; those are read on request only "
                f"(follow_links): {value['path']}"
            )
        return Path(value["path"])

    def _read(self, index: int) -> tuple[Tensor, int | None]:
        channels, size, _ = self.shape
        row = self._dataset[index]
        limit = self.settings.max_pixels
        pixels = read_image(self._file(row), size, channels=channels, max_pixels=limit)
        label = None if self.label_column is None else row[self.label_column]
        return pixels, label if label is not None and label >= 0 else None

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "columns": [self.image_column, self.label_column],
            "fingerprint": self._fingerprint,
            "follow_links": self._follow_links,
        }


def open_saved(
    spec: str, folder: Path, split: str | None, settings: Settings, *, follow_links: bool
) -> SavedSource:
    """Open what ``save_to_disk`` wrote; nothing is downloaded.

    The column of images is the one with the feature ``Image``, the column of labels the one with
    ``ClassLabel`` (or a whole number under a usual name); of several, the one with a usual name.

    Raises:
        ValueError: no such folder, not a saved data set, several splits and none was named, no
            column of images, no images.
        ImportError: ``datasets`` is missing (extra ``datasets``).
    """
    if not folder.is_dir():
        raise ValueError(f"data: {folder} is not a folder")
    datasets = require("datasets", extra="datasets")
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise ValueError(
            f"data: {folder} does not open as a data set that save_to_disk wrote: {why(error)}"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        names = list(found)
        if split is None and len(names) != 1:
            raise ValueError(
                f"data: {folder} has the splits {', '.join(names)}; name one as in "
                f"{spec}#{names[-1] if names else 'test'}"
            )
        if split is not None and split not in names:
            raise ValueError(f"data: {folder} has no split {split!r}; it has {', '.join(names)}")
        found = found[split or names[0]]
    elif split is not None:
        raise ValueError(f"data: {folder} is a single data set, so it has no split {split!r}")
    return SavedSource(spec, found, settings, follow_links=follow_links)


def _preferred(columns: list[str], usual: tuple[str, ...]) -> str:
    return next((name for name in usual if name in columns), columns[0])
