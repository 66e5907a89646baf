"""ROAD: remove pixels by relevance, impute them from their surroundings, see what is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastxkd.metrics._maps import check_images, check_maps_of, nan_where_map_is, pixel_order
from fastxkd.metrics._scoring import SCORES, Model, Scorer
from fastxkd.metrics.imputation import draw, impute
from fastxkd.ops._checks import (
    check_choice,
    check_counts,
    check_factors,
    check_generator,
    check_number,
    check_positive,
)

PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)
ORDERS = ("combined", "morf", "lerf")
TIES = ("split", "remove")


def road_score(
    model: Model,
    images: Tensor,
    maps: Tensor,
    targets: Any = None,
    *,
    order: str = "combined",
    percentiles: Sequence[float] = PERCENTILES,
    score: str = "probability",
    noise: float = 0.01,
    generator: torch.Generator | None = None,
    ties: str = "split",
    tolerance: float = 1e-4,
    steps_at_once: int = 1,
) -> Tensor:
    r"""Remove and debias (Rong et al. 2022): how a score changes as pixels are imputed away.

    .. math:: MoRF = mean_p [f(x_{-top(100 - p)\%}) - f(x)],\quad
        LeRF = mean_p [f(x_{top(p)\%}) - f(x)],\quad combined = (LeRF - MoRF) / 2

    At percentile p, MoRF removes the most relevant (100 - p) % of the pixels and LeRF keeps the
    most relevant p %, as in pytorch-grad-cam. What is removed is filled in by
    :func:`linear_imputation`.

    Args:
        model: of images to ``[n, classes]``; a module runs in eval mode and without graph, and is
            left as it was.
        images: ``[n, channels, h, w]``, as the model takes them.
        maps: ``[n, h, w]``, higher where more relevant.
        targets: None (the class the model names for the image) | int | list of int | int64
            ``[n]`` | a callable, or a list of them, one per image, from an image's row of what
            ``score`` names to a scalar.
        order: ``"combined"``, where higher is better; ``"morf"``, lower; ``"lerf"``, higher.
        percentiles: between 0 and 100, one or more; the mean is taken over them.
        score: ``"probability"`` (softmax) or ``"logit"``.
        noise, generator, tolerance: of the imputation. The noise is drawn for one percentile after
            the other, those of MoRF first, so it does not depend on ``steps_at_once``.
        ties: ``"split"`` keeps exactly ``p/100 (hw - 1)`` pixels, rounded up, taking equal ones in
            reading order; ``"remove"`` removes every pixel that equals the percentile, as
            pytorch-grad-cam does, but always keeps one. Without ties the two are the same.
        steps_at_once: perturbed copies of the batch that are in memory, and in the model, at once.

    Returns:
        ``[n]``, float32, float64 for float64 scores; NaN for an image or a map with NaN, and for
        no other.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit.

    >>> import torch
    >>> images = torch.zeros(1, 1, 8, 8)
    >>> images[:, :, 2:5, 2:5] = 1  # what the model looks for
    >>> model = lambda x: torch.stack([x.amax((1, 2, 3)), x.mean((1, 2, 3))], 1)
    >>> options = {"targets": 0, "score": "logit", "noise": 0, "percentiles": [80]}
    >>> [round(road_score(model, images, m, **options).item(), 4)
    ...     for m in (images[:, 0], 1 - images[:, 0])]
    [0.5, -0.5]
    """
    check_images(images)
    check_maps_of(images, maps)
    check_options(order, percentiles, score, noise, ties, tolerance, steps_at_once)
    check_generator(generator)
    images, maps = images.detach(), maps.detach()
    scorer = Scorer(model, images, targets, score)
    masks = _Masks(maps, ties)
    steps = [(which, p) for which in ("morf", "lerf") if order in (which, "combined")
             for p in percentiles]  # fmt: skip
    found: dict[str, list[Tensor]] = {"morf": [], "lerf": []}
    for start in range(0, len(steps), steps_at_once):
        chunk = steps[start : start + steps_at_once]
        keep = torch.cat([masks.keep(which, p) for which, p in chunk])
        copies = images.repeat(len(chunk), 1, 1, 1)
        drawn = [draw(images, noise, generator) for _ in chunk]
        added = torch.cat([d for d in drawn if d is not None]) if noise else None
        imputed = impute(copies, keep, added, tolerance)
        scores = scorer(imputed.unflatten(0, (len(chunk), -1)))
        for (which, _), change in zip(chunk, scores - scorer.full, strict=True):
            found[which].append(change)
    means = {which: torch.stack(changes).mean(0) for which, changes in found.items() if changes}
    value = means[order] if order != "combined" else (means["lerf"] - means["morf"]) / 2
    return nan_where_map_is(maps, value)


def check_options(
    order: str,
    percentiles: Sequence[float],
    score: str,
    noise: float,
    ties: str,
    tolerance: float,
    steps_at_once: int,
) -> None:
    check_choice("order", order, ORDERS)
    check_choice("score", score, SCORES)
    check_choice("ties", ties, TIES)
    check_factors(noise=noise)
    check_positive(tolerance=tolerance)
    check_counts(steps_at_once=steps_at_once)
    if not isinstance(percentiles, Sequence) or isinstance(percentiles, str):
        raise TypeError(
            f"percentiles: expected a list of numbers, got {type(percentiles).__name__}"
        )
    for p in percentiles:
        check_number("percentiles", p)
        if not 0 < p < 100:
            raise ValueError(f"percentiles: expected numbers between 0 and 100, got {p}")
    if not percentiles:
        raise ValueError("percentiles: expected at least one, got none")


class _Masks:
    """What stays of each image, ``[n, h, w]``, from one sort of its map."""

    def __init__(self, maps: Tensor, ties: str) -> None:
        self.maps, self.ties = maps, ties
        self.rank = pixel_order(maps)
        self.last = maps[0].numel() - 1
        if ties == "remove":
            self.descending = maps.flatten(1).sort(1, descending=True).values[..., None, None]

    def keep(self, which: str, percentile: float) -> Tensor:
        count = max(1, math.ceil(percentile * self.last / 100))
        if self.ties == "split":
            return self.rank > self.last - count if which == "morf" else self.rank < count
        # A percentile lies between two values of the map; what is strictly beyond it is what is
        # strictly beyond the farther one.
        if which == "morf":
            limit = self.descending[:, max(self.last - count, 0)]
            return (self.maps < limit) | (self.rank == self.last)
        limit = self.descending[:, min(count, self.last)]
        return (self.maps > limit) | (self.rank == 0)
