"""What a monitor was asked to watch: checked, and the same whichever way it was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

METRICS = ("agreement", "fss", "rs", "unicam")

Layer = str | nn.Module


def metrics_of(given: Sequence[str] | None, base: bool) -> tuple[str, ...]:
    if given is None:
        return METRICS if base else METRICS[:-1]
    metrics = (given,) if isinstance(given, str) else tuple(given)
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(
            f"metrics: expected one or more of {', '.join(METRICS)}, got"
            f" {', '.join(map(repr, metrics)) or 'none'}"
        )
    if "unicam" in metrics and not base:
        raise ValueError("metrics: unicam compares the student with a base; pass base=")
    return tuple(name for name in METRICS if name in metrics)


def places_of(
    layers: Mapping[str, Layer | Sequence[Layer]] | Sequence[str] | str, roles: list[str]
) -> dict[str, dict[str, Layer]]:
    """A layer's name to role to its place in that model."""
    if isinstance(layers, str):
        layers = [layers]
    named: Mapping[str, Any] = (
        layers if isinstance(layers, Mapping) else {name: name for name in layers}
    )
    places = {}
    for name, given in named.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"layers: expected names for them, got {name!r}")
        each = [given] * len(roles) if isinstance(given, str) else given
        each = [each] if isinstance(each, nn.Module) else [*each]
        if len(each) == 2 and len(roles) == 3:
            each.append(each[0])  # a base is most often the student's twin
        if len(each) != len(roles):
            raise ValueError(
                f"layers: expected {name!r} in {', '.join(roles)}, got {len(each)} places"
            )
        places[name] = dict(zip(roles, each, strict=True))
    if not places:
        raise ValueError("layers: expected at least one layer, got none")
    return places
