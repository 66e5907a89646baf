"""A few images whose maps are watched over a whole training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastxkd.cam import render
from fastxkd.cam.maps import cam_from
from fastxkd.cam.unicam import unicam_weights
from fastxkd.train._lane import Lane, Parcel
from fastxkd.train._watch import Precision, Side, explained

# UniCAM's distances are between the images of the probe.
FEWEST_FOR_UNICAM = 4
_FEATURES = ":features"


class Frame(NamedTuple):
    """Maps of the probe at one step: ``layer/student``, ``layer/distilled``, ``layer/residual`` to
    ``[p, h, w]`` in [0, 1], at the layer's resolution."""

    step: int
    maps: dict[str, Tensor]


class Probe:
    """Images, what is explained of them, and the maps of the models that do not learn.

    Args:
        given: images ``[p, channels, height, width]``, or (images, labels).
        sides: the models by role.
        method: of the maps.
        mean, std: what the images were normalised with.
    """

    def __init__(
        self,
        given: Tensor | tuple[Tensor, Tensor],
        sides: Mapping[str, Side],
        method: str,
        mean: Any,
        std: Any,
    ) -> None:
        images, labels = given if isinstance(given, (tuple, list)) else (given, None)
        if not isinstance(images, Tensor):
            raise TypeError(f"probe: expected a Tensor of images, got {type(images).__name__}")
        if images.dim() != 4 or len(images) == 0 or not images.is_floating_point():
            raise ValueError(
                "probe: expected floats [p, channels, height, width] as the models take them, got"
                f" {images.dtype} {list(images.shape)}"
            )
        if labels is not None:
            labels = torch.as_tensor(labels).cpu()
            if labels.shape != (len(images),) or labels.is_floating_point():
                raise ValueError(
                    f"probe: expected {len(images)} class indices as its labels, got"
                    f" {labels.dtype} {list(labels.shape)}"
                )
        self.images = images.detach().cpu()
        self.picture = _picture(self.images, mean, std)
        self.labels = labels
        self.fixed: dict[str, Tensor] = {}  # layer/teacher, layer/base: [p, h, w]
        self._sides = sides
        self._method = method
        self._target: Tensor | None = None  # the classes explained, where the models are
        self._known: Tensor | None = None  # and on the host
        self._base: dict[str, Tensor] = {}  # its features, by layer
        self._there: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def look(self, lane: Lane) -> Parcel:
        """The student's maps, and the first time everybody's."""
        first = self._target is None
        unicam = "base" in self._sides and len(self.images) >= FEWEST_FOR_UNICAM
        found: dict[str, Tensor] = {}
        # The teacher comes first: where no labels are given, its classes are explained.
        for role in ("teacher", "base", "student") if first else ("student",):
            if role not in self._sides:
                continue
            side = self._sides[role]
            precision = Precision.current(side.device)._replace(enabled=False)
            seen = side.look((self._on(side),), {}, graph=True, precision=precision)
            if self._target is None:
                self._target = found["target"] = explained(seen.logits, self._wanted(side))
            self._target = self._target.to(side.device)
            target = explained(seen.logits, self._target)
            gradients = side.gradients(seen, target)
            with lane.beside([*seen.activations.values(), *gradients]), torch.no_grad():
                for (name, activation), gradient in zip(
                    seen.activations.items(), gradients, strict=True
                ):
                    spatial = side.spatial(activation.detach(), seen, name).float()
                    pull = side.spatial(gradient, seen, name).float()
                    found[f"{name}/{role}"] = cam_from(spatial, pull, self._method)
                    if unicam and role != "teacher":
                        found[f"{name}/{role}{_FEATURES}"] = spatial
        with lane.beside(found.values()):
            return lane.send(found)

    def _wanted(self, side: Side) -> Tensor | None:
        return None if self.labels is None else self.labels.to(side.device)

    def _on(self, side: Side) -> Tensor:
        key = side.device, side.dtype
        if key not in self._there:
            self._there[key] = self.images.to(*key)
        return self._there[key]

    def frame(self, step: int, found: dict[str, Tensor]) -> Frame:
        """On the host, of what :meth:`look` has sent."""
        features = {k: found.pop(k) for k in [*found] if k.endswith(_FEATURES)}
        self._known = found.pop("target", self._known)
        maps = {name: value for name, value in found.items() if name.endswith("/student")}
        self.fixed |= {name: value for name, value in found.items() if name not in maps}
        for name, value in features.items():
            layer, _, role = name.removesuffix(_FEATURES).rpartition("/")
            if role == "base":
                self._base[layer] = value
            else:
                maps |= self._unicam(layer, value)
        return Frame(step, maps)

    def _unicam(self, layer: str, student: Tensor) -> dict[str, Tensor]:
        base, target = self._base[layer], self._known
        assert target is not None
        pairs = {"distilled": (student, base), "residual": (base, student)}
        maps = {}
        for name, (own, other) in pairs.items():
            weights = unicam_weights(own, other, target)
            # They are the smaller the more positions share them; maps have a scale of their own.
            largest = weights.abs().amax(1, keepdim=True)
            weights = weights / largest.where(largest != 0, 1)
            maps[f"{layer}/{name}"] = cam_from(own, weights, "weights")
        return maps

    def strips(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All images of the probe side by side under each of ``maps``, uint8 ``[3, h, p w]``."""
        strips = {}
        for name, values in maps.items():
            heat = shown(values.numpy(), self.picture.shape[1:3])
            overlay = torch.from_numpy(render.overlay(self.picture, heat))  # [p, h, w, 3]
            strips[name] = overlay.permute(3, 1, 0, 2).flatten(2).contiguous()
        return strips

    def state_dict(self) -> dict[str, Any]:
        return {"target": self._known, "fixed": dict(self.fixed), "base": dict(self._base)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._target = self._known = state["target"]
        self.fixed, self._base = dict(state["fixed"]), dict(state["base"])


def shown(maps: np.ndarray[Any, Any], size: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Maps ``[..., h, w]`` at the size of the image, each on its own scale from 0 to 1."""
    heat = render.resize(np.asarray(maps, np.float32), size)
    known = np.isfinite(heat)
    low = np.where(known, heat, np.inf).min((-2, -1), keepdims=True)
    high = np.where(known, heat, -np.inf).max((-2, -1), keepdims=True)
    scaled: np.ndarray[Any, Any] = (heat - low) / np.maximum(high - low, 1e-7)
    return scaled


def _picture(images: Tensor, mean: Any, std: Any) -> np.ndarray[Any, Any]:
    """uint8 ``[p, h, w, 3]`` of images as a model takes them."""
    pixels = images.float()
    if pixels.shape[1] not in (1, 3):
        pixels, mean, std = pixels.mean(1, keepdim=True), None, None
    outside = bool((pixels < 0).any() or (pixels > 1).any())
    if mean is None and std is None and outside:
        # Normalised by nobody knows what: from their darkest to their brightest.
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low)
    elif mean is not None or std is not None:
        channels = pixels.shape[1]
        scale, shift = (
            torch.as_tensor(default if given is None else given).float().flatten()
            for given, default in ((std, 1.0), (mean, 0.0))
        )
        for name, values in (("std", scale), ("mean", shift)):
            if len(values) not in (1, channels):
                raise ValueError(f"{name}: expected 1 or {channels} numbers, got {len(values)}")
        # Normalisation rounds: what was 0 may be a little less now.
        pixels = (pixels * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).clamp(0, 1)
    return render.to_picture(pixels)
