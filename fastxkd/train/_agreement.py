"""How far the maps of student and teacher agree, and which layers have none to compare."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastxkd.cam.maps import cam_from
from fastxkd.metrics.agreement import MEASURES
from fastxkd.train._watch import Seen, Side

# A layer's maps may have few positions: none for the windows of ssim.
AGREEMENTS = tuple(name for name in MEASURES if name != "ssim")
# Batches in a row whose maps are zero, before somebody is told.
BLANK_TIMES = 3
_GUIDED = ("student", "teacher")


class Agreement:
    """Of one monitor: it tells of a layer once."""

    def __init__(self, sides: Mapping[str, Side], method: str, measure: str) -> None:
        self._sides, self._method, self._measure = sides, method, measure
        self._alone: set[str] = set()  # layers that were told of
        self._blank: dict[tuple[str, str], int] = {}  # batches in a row without a map

    def of(
        self,
        name: str,
        spatial: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        passes: Mapping[str, Seen],
    ) -> dict[str, Tensor]:
        """Of one layer, its mean agreement and each map's largest value; nothing of a layer
        without positions.

        Raises:
            ValueError: activations that are not spatial.
        """
        _check_spatial(name, spatial)
        if not self._has_positions(name, spatial):
            return {}
        size = tuple(map(max, zip(*(spatial[role].shape[2:] for role in _GUIDED), strict=True)))
        maps = {
            role: self._map(role, name, spatial[role], gradients[role], passes[role], size)
            for role in _GUIDED
        }
        agree = MEASURES[self._measure](maps["student"], maps["teacher"])
        largest = torch.stack([maps[role].abs().amax() for role in _GUIDED])
        return {f"{name}/agreement": agree.mean(), f"{name}/largest": largest}

    def look_for_blank_maps(self, name: str, largest: Sequence[float]) -> None:
        """Tell of a layer none of whose positions speak for any class, however often they are
        asked: a head that begins with zeros has a gradient soon."""
        for role, value in zip(_GUIDED, largest, strict=True):
            times = self._blank.get((name, role), 0) + 1 if value == 0 else 0
            self._blank[name, role] = times
            if times == BLANK_TIMES:
                warnings.warn(
                    f"ExplanationMonitor: the maps of layer {name!r} of the {role} were zero for"
                    f" {times} batches: no gradient comes from the logits to its positions, or"
                    " none that speaks for the class. Of a transformer with a class token, take"
                    " what its last attention reads (such as blocks.11.norm1)",
                    stacklevel=2,
                )

    def _has_positions(self, name: str, spatial: Mapping[str, Tensor]) -> bool:
        """Whether there is more than one, else a map would be one number divided by itself."""
        alone = [role for role in _GUIDED if spatial[role].shape[2:].numel() == 1]
        if alone and name not in self._alone:
            self._alone.add(name)
            warnings.warn(
                f"ExplanationMonitor: layer {name!r} of the {alone[0]} has a single position for"
                " these images: there are no maps to agree; take one further to the front",
                stacklevel=2,
            )
        return not alone

    def _map(
        self,
        role: str,
        name: str,
        spatial: Tensor,
        gradient: Tensor,
        seen: Seen,
        size: tuple[int, ...],
    ) -> Tensor:
        pull = self._sides[role].spatial(gradient, seen, name)
        # 16 bits hold neither the map nor, of many positions, the gradient.
        exact = torch.promote_types(torch.float32, spatial.dtype)
        given = None if self._method == "eigencam" else pull.to(exact)
        maps = cam_from(spatial.to(exact), given, self._method, size)
        return maps.flatten(2) if maps.dim() > 3 else maps


def _check_spatial(name: str, found: Mapping[str, Tensor]) -> None:
    for role, spatial in found.items():
        if spatial.dim() not in (4, 5):
            raise ValueError(
                f"layers: {name!r} of the {role}: expected spatial activations [n, channels,"
                f" height, width], got {list(spatial.shape)}; use reshape_transform for token"
                " layouts, or metrics= without agreement"
            )
