"""Explanations inside Ray Data: a callable class for ``ray.data.Dataset.map_batches``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastxkd.cam.maps import Normalize
from fastxkd.runs.asked import answering, check_targets, choose_layers
from fastxkd.runs.data import DEFAULT_MEAN, DEFAULT_STD, normalize, per_channel
from fastxkd.runs.methods import Methods, Size, statistics
from fastxkd.runs.models import load_model


class Explain:
    """Adds maps and scores to batches of images.

    Ray makes one of these in every actor, which then holds the model::

        images = ray.data.read_images("cats/", size=(224, 224), mode="RGB")
        explained = images.map_batches(
            fastxkd.runs.ray.Explain,
            fn_constructor_kwargs={"model": "timm:resnet18", "weights": "r18.safetensors",
                                   "num_classes": 1000, "methods": ["gradcam", "layercam"]},
            batch_size=32, num_gpus=1, concurrency=4)
        explained.write_parquet("cats-explained/")

    A batch keeps its columns and gains, per map of ``fastxkd.runs.methods.Methods.arrays``, the map
    float32 ``[n, h, w]`` and ``NAME_mean``, ``NAME_spread``, ``NAME_peak_y``, ``NAME_peak_x``;
    and ``predicted``, ``target``, ``logit``, ``probability``, ``status`` ("ok", or why an image has
    no map; its numbers are NaN and its classes -1). Images of another size or kind than the first
    one of the actor's first batch are such failures. ``unicam``, which needs a reference set, is
    for :func:`fastxkd.runs.explain`.

    Args:
        model: a module, or the name of one, see :func:`fastxkd.runs.models.load_model`.
        methods, layers, targets, size, normalize: as in :func:`fastxkd.runs.explain`; of several
            layers the maps have names like ``gradcam/layer3``.
        weights: file, for a model given by name.
        num_classes: outputs of a model given by name.
        image, label: columns. An image is ``[h, w, c]``, as Ray reads them, ``[c, h, w]`` or
            ``[h, w]``; uint8, or floats that are taken as they are.
        mean, std: of uint8 pixels in [0, 1]; default 127/255, 128/255.
        device: ``"auto"`` is the GPU that Ray has given to the actor, else the CPU.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(),
    ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 10))
    >>> found = Explain(model)({"image": np.zeros((2, 16, 16, 3), np.uint8)})
    >>> found["gradcam"].shape, found["status"].tolist()
    ((2, 14, 14), ['ok', 'ok'])
    """

    def __init__(
        self,
        model: nn.Module | str,
        *,
        methods: Sequence[str] | str = ("gradcam",),
        layers: Sequence[str] | str | None = None,
        targets: str | int = "predicted",
        size: Size = None,
        normalize: Normalize = "minmax",
        weights: str | os.PathLike[str] | None = None,
        num_classes: int | None = None,
        image: str = "image",
        label: str = "label",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: str = "auto",
    ) -> None:
        if "unicam" in ([methods] if isinstance(methods, str) else methods):
            raise ValueError("methods: unicam needs a reference set; use fastxkd.runs.explain")
        targets = check_targets(targets)
        if isinstance(model, str) and num_classes is None:
            raise ValueError("num_classes: expected a number beside a model's name, got None")
        self._given, self._weights, self._classes = model, weights, num_classes
        self._methods, self._layers = methods, layers
        self._targets, self._size, self._normalize = targets, size, normalize
        self._image, self._label, self._mean, self._std = image, label, mean, std
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._device = torch.device(name)
        self._explain: Methods | None = None
        self._outputs = 0
        self._format: tuple[tuple[int, ...], torch.dtype] | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        if self._image not in batch:
            raise ValueError(f"image: expected a column {self._image!r}, got {', '.join(batch)}")
        if not len(batch[self._image]):  # what a filter has left of a block
            return dict(batch)
        images, failed = self._pixels(batch[self._image])
        if self._explain is None:
            self._explain = self._methods_for(images)
            self._outputs = self._explain.logits(images[:1]).shape[1]
        labels, targets = None, None
        if self._targets == "label":
            labels = self._labels(batch, len(images), failed)
            targets = labels
        elif self._targets != "predicted":
            targets = torch.full((len(images),), int(self._targets), device=self._device)
        found = self._explain(images, labels, targets)
        column = found.targets[:, None]
        values: dict[str, Tensor] = {
            "predicted": found.logits.argmax(1),
            "target": found.targets,
            "logit": found.logits.gather(1, column)[:, 0].float(),
            "probability": found.logits.double().softmax(1).gather(1, column)[:, 0],
        }
        for name, maps in found.maps.items():
            values[name] = maps.float()
            for what, numbers in statistics(maps).items():
                values[f"{name}_{what}"] = numbers
                for row in (~numbers.isfinite()).nonzero()[:, 0].tolist():
                    failed.setdefault(row, f"its map {name} is not finite")
        out = {name: value.cpu().numpy() for name, value in values.items()}
        for row in failed:
            for values_of in out.values():
                values_of[row] = np.nan if values_of.dtype.kind == "f" else -1
        status = np.array([failed.get(row, "ok") for row in range(len(images))], dtype=object)
        return {**batch, **out, "status": status}

    def _methods_for(self, example: Tensor) -> Methods:
        model = self._given
        if isinstance(model, str):
            assert self._classes is not None
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = load_model(
                    model,
                    num_classes=self._classes,
                    in_channels=example.shape[1],
                    weights=None if self._weights is None else os.fspath(self._weights),
                )
        model = model.to(self._device)
        with answering(model, "model", example[:1]):
            pass  # or it says why the model does not take them
        return Methods(
            model,
            self._methods,
            choose_layers(model, self._layers, example[:1]),
            size=self._size,
            normalize=self._normalize,
        )

    def _pixels(self, column: Any) -> tuple[Tensor, dict[int, str]]:
        """``[n, c, h, w]`` as the model takes it; rows that are no such image are zeros."""
        found: list[Tensor | None] = []
        failed: dict[int, str] = {}
        for row, item in enumerate(column):
            try:
                found.append(_as_image(np.asarray(item)))
            except (ValueError, TypeError) as error:
                found.append(None)
                failed[row] = str(error)
        if self._format is None:
            first = next((image for image in found if image is not None), None)
            if first is None:
                raise ValueError(f"image: none in {self._image!r} is one; the first: {failed[0]}")
            self._format = tuple(first.shape), first.dtype
        shape, dtype = self._format
        images = torch.zeros(len(found), *shape, dtype=dtype)
        for row, image in enumerate(found):
            if image is None:
                continue
            if (tuple(image.shape), image.dtype) == self._format:
                images[row] = image
            else:
                failed[row] = (
                    f"expected {dtype} {list(shape)} like the others, got"
                    f" {image.dtype} {list(image.shape)}"
                )
        if dtype != torch.uint8:
            return images.to(self._device), failed
        mean = per_channel("mean", self._mean, DEFAULT_MEAN, shape[0])
        std = per_channel("std", self._std, DEFAULT_STD, shape[0])
        return normalize(images, mean, std, self._device), failed

    def _labels(self, batch: Mapping[str, Any], n: int, failed: dict[int, str]) -> Tensor:
        if self._label not in batch:
            raise ValueError(f"label: expected a column {self._label!r}, got {', '.join(batch)}")
        labels = torch.zeros(n, dtype=torch.int64)
        for row, label in enumerate(batch[self._label]):
            try:
                labels[row] = int(label)
            except (ValueError, TypeError):
                failed.setdefault(row, f"its label is {label!r}, which is no class")
        outside = (labels < 0) | (labels >= self._outputs)
        for row in outside.nonzero()[:, 0].tolist():
            failed.setdefault(
                row, f"its label {int(labels[row])} is none of {self._outputs} classes"
            )
        return labels.where(~outside, 0).to(self._device)


def _as_image(array: np.ndarray[Any, Any]) -> Tensor:
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and array.shape[2] in (1, 3, 4) and array.shape[0] not in (1, 3, 4):
        array = np.moveaxis(array, 2, 0)
    if array.ndim != 3 or array.dtype not in (np.uint8, np.float32, np.float64):
        raise ValueError(
            "expected an image [h, w, c] or [c, h, w] of uint8 or floats, got"
            f" {array.dtype} {list(array.shape)}"
        )
    image = torch.from_numpy(np.ascontiguousarray(array))
    return image.float() if image.is_floating_point() else image
