"""Network dissection's thresholds and tallies: activations and masks that are there already, to
exact quantiles of every unit and the pixels of every unit under every label.

The floor is one reading of activations and masks. Nothing reaches it: thresholds have to be known
before the tally begins, and exact ones take three readings of their own. The loop is the published
procedure, image after image and unit after unit, with NumPy and OpenCV.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._harness import Case, Skip, Spec, main
from fastxkd.ops.concepts import concept_tally, label_areas
from fastxkd.ops.quantiles import exact_quantiles

TESTS = ["tests/test_concepts.py", "tests/test_quantiles.py"]
QUANTILE = 0.995
BATCH = 100
CATEGORIES = 6

Sums = tuple[Tensor, Tensor, Tensor]  # of units and labels, of units by category, of labels


class Data(NamedTuple):
    activations: Tensor  # [n, units, 7, 7]
    masks: Tensor  # [n, 1, 112, 112]
    labels: Tensor  # [n, 1], of the image
    categories: Tensor  # [labels]


def data(n: int, units: int, labels: int) -> Data:
    """Activations that are alike in neighbouring positions, and about eight regions an image."""
    coarse = F.interpolate(torch.randn(n, units, 4, 4), (7, 7), mode="bilinear")
    activations = (coarse + 0.5 * torch.randn(n, units, 7, 7)).relu()
    pixel_labels = labels - 10
    masks = torch.empty(n, 1, 112, 112, dtype=torch.uint8)
    for mask in masks:
        fields = F.interpolate(torch.randn(1, 8, 6, 6), (112, 112), mode="bicubic")[0]
        mask[0] = torch.randint(0, pixel_labels, (8,))[fields.argmax(0)].to(torch.uint8)
    scenes = torch.randint(pixel_labels, labels, (n, 1))
    categories = torch.arange(labels) % (CATEGORIES - 1)
    categories[pixel_labels:] = CATEGORIES - 1
    return Data(activations, masks, scenes, categories)


def ours(given: Data) -> Sums:
    thresholds = exact_quantiles(lambda: given.activations.split(BATCH), QUANTILE)
    units, labels = given.activations.shape[1], len(given.categories)
    intersections = torch.zeros(units, labels, dtype=torch.int64)
    areas = torch.zeros(units, CATEGORIES, dtype=torch.int64)
    totals = torch.zeros(labels, dtype=torch.int64)
    for maps, masks, scenes in zip(*(x.split(BATCH) for x in given[:3]), strict=True):
        tally = concept_tally(
            maps, thresholds, masks, scenes, given.categories, category_count=CATEGORIES
        )
        intersections += tally.intersections
        areas += tally.areas
        totals += label_areas(masks, scenes, labels)
    return intersections, areas, totals


def in_torch(given: Data) -> Sums:
    """Without a loop over units: those above their threshold, up-sampled and multiplied."""
    activations, masks, scenes, categories = given
    labels = len(categories)
    values = activations.movedim(1, 0).flatten(1).sort(1).values
    position = (values.shape[1] - 1) * QUANTILE
    low, high = values[:, int(position)].double(), values[:, int(position) + 1].double()
    thresholds = low + (high - low) * (position - int(position))
    intersections = torch.zeros(activations.shape[1], labels, dtype=torch.int64)
    areas = torch.zeros(activations.shape[1], CATEGORIES, dtype=torch.int64)
    kinds = F.one_hot(categories, CATEGORIES).float()
    for maps, mask, scene in zip(activations, masks[:, 0], scenes[:, 0], strict=True):
        active = (maps.amax((1, 2)) > thresholds).nonzero()[:, 0]
        up = F.interpolate(maps[None, active], mask.shape, mode="bilinear")[0]
        above = (up > thresholds[active, None, None]).flatten(1).float()
        found = above @ F.one_hot(mask.flatten().long(), labels).float()
        found[:, 0] = 0
        covered = above.sum(1)
        found[:, scene] += covered
        intersections[active] += found.long()
        areas[active] += (covered[:, None] * (found @ kinds > 0)).long()
    totals = torch.bincount(masks.flatten(), minlength=labels)
    totals += torch.bincount(scenes.flatten(), minlength=labels) * masks[0].numel()
    totals[0] = 0
    return intersections, areas, totals


def in_numpy(given: Data) -> Sums:
    try:
        import cv2
    except ImportError as error:
        raise Skip(str(error)) from None
    activations, masks, scenes, categories = (x.numpy() for x in given)
    units, labels = activations.shape[1], len(categories)
    rows = activations.transpose(1, 0, 2, 3).reshape(units, -1)
    thresholds = np.quantile(rows.astype(np.float64), QUANTILE, axis=1)
    kinds = np.eye(CATEGORIES, dtype=np.int64)[categories]
    intersections = np.zeros((units, labels), np.int64)
    areas, totals = np.zeros((units, CATEGORIES), np.int64), np.zeros(labels, np.int64)
    for maps, mask, scene in zip(activations, masks[:, 0], scenes[:, 0], strict=True):
        totals[1:] += np.bincount(mask.ravel(), minlength=labels)[1:]
        totals[scene] += mask.size
        for unit in range(units):
            if not maps[unit].max() > thresholds[unit]:
                continue
            up = cv2.resize(maps[unit], mask.shape[::-1], interpolation=cv2.INTER_LINEAR)
            above = up > thresholds[unit]
            covered = np.count_nonzero(above)
            found = np.bincount(mask[above], minlength=labels)
            found[0] = 0
            found[scene] += covered
            intersections[unit] += found
            areas[unit] += covered * (found @ kinds > 0)
    return tuple(map(torch.from_numpy, (intersections, areas, totals)))  # type: ignore[return-value]


def case(n: int, units: int, labels: int) -> Case:
    given = data(n, units, labels)

    def floor() -> None:
        given.activations.sum()
        given.masks.view(torch.int64).sum()

    variants: dict[str, Callable[[], object]] = {
        "floor: one reading": floor,
        "NumPy and OpenCV": partial(in_numpy, given),
        "plain torch": partial(in_torch, given),
        "ours": partial(ours, given),
    }

    def notes() -> dict[str, str]:
        found = ours(given)
        return {
            name: " ".join(
                f"{what} differ in {int((a != b).sum())} of {a.numel()}, by {(a - b).abs().sum()}"
                f" of {a.sum()} pixels;"
                for what, a, b in zip(
                    ("intersections", "areas", "labels"), found, other(given), strict=True
                )
            )
            for name, other in (("NumPy and OpenCV", in_numpy), ("plain torch", in_torch))
        }

    size = sum(x.numel() * x.element_size() for x in (given.activations, given.masks))
    return Case(variants, size, notes)


def specs(quick: bool) -> list[Spec]:
    found = []
    for n, units in [(40, 64)] if quick else [(1000, 512)]:
        name = f"{units} units, {n} images, 7x7 to 112x112, 60 labels"
        found.append(Spec(name, partial(case, n, units, 60), rounds=3))
    return found


if __name__ == "__main__":
    main("concepts", specs, TESTS, __doc__)
