"""What a dissection found: IoU of every unit with every concept, one label per unit, detectors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Keeps a unit and a concept without a pixel between them at 0 instead of 0 / 0.
_TINY = 1e-10


@dataclass(frozen=True)
class Concepts:
    """What the labels of a concept data set mean.

    Args:
        names: of the labels, by number; label 0 is "none of them" and counts nowhere.
        categories: names of the categories.
        category: of each label, as an index into ``categories``: the primary one, where it covers
            most pixels.

    Raises:
        ValueError: no label beside 0, lists of different length, a category that is none.

    >>> concepts = Concepts(("", "cat", "red"), ("object", "color"), (0, 0, 1))
    >>> concepts.category_of(2)
    'color'
    """

    names: tuple[str, ...]
    categories: tuple[str, ...]
    category: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            raise ValueError(
                f"names: expected label 0 and at least one more, got {len(self.names)}"
            )
        if len(self.category) != len(self.names):
            raise ValueError(
                f"category: expected one for each of {len(self.names)} labels,"
                f" got {len(self.category)}"
            )
        known = range(len(self.categories))
        wrong = [c for c in self.category if type(c) is not int or c not in known]
        if wrong:
            raise ValueError(
                f"category: expected indices of {len(known)} categories, got {wrong[0]!r}"
            )

    def __len__(self) -> int:
        return len(self.names)

    def category_of(self, label: int) -> str:
        return self.categories[self.category[label]]


class Unit(NamedTuple):
    """One unit: its concept (label 0, no name and no category where it overlaps with none)."""

    unit: int
    label: int
    name: str
    category: str
    iou: float
    threshold: float
    detector: bool


class Counts(NamedTuple):
    """Of a category: units that detect one of its concepts, and how many concepts that are."""

    detectors: int
    unique: int


def concept_iou(
    intersections: Tensor, areas: Tensor, label_areas: Tensor, categories: Tensor
) -> Tensor:
    r"""IoU of units and concepts over a whole data set, float64 ``[U, C]``.

    :math:`IoU_{u,c} = I_{u,c} / (A_{u,k(c)} + L_c - I_{u,c} + 10^{-10})`, one quotient of sums,
    never a mean over images. Column 0, which is no concept, is 0.

    Args:
        intersections: ``[U, C]``: pixels of the unit that carry the label.
        areas: ``[U, K]``: pixels of the unit, in images with a label of the category under it.
        label_areas: ``[C]``: pixels that carry the label.
        categories: int64 ``[C]``: k(c), the primary category of each label.

    Source: Bau et al. 2017, as Han et al. 2023 computed it.

    >>> import torch
    >>> I, A = torch.tensor([[0, 30]]), torch.tensor([[50]])
    >>> concept_iou(I, A, torch.tensor([0, 40]), torch.tensor([0, 0]))[0, 1].item()
    0.49999999999916667
    """
    units, labels = intersections.shape
    given = {"label_areas": label_areas, "categories": categories}
    for name, tensor in given.items():
        if tensor.shape != (labels,):
            raise ValueError(
                f"{name}: expected [{labels}] for intersections [{units}, {labels}],"
                f" got {list(tensor.shape)}"
            )
    if areas.dim() != 2 or len(areas) != units or areas.shape[1] <= int(categories.max()):
        raise ValueError(
            f"areas: expected [{units}, {int(categories.max()) + 1}] or more categories,"
            f" got {list(areas.shape)}"
        )
    both = intersections.double()
    union = areas.double()[:, categories] + label_areas.double() - both
    iou = both / (union + _TINY)
    iou[:, 0] = 0
    return iou


@dataclass(frozen=True, eq=False)
class Dissection:
    """Which concept each unit of a layer stands for.

    Attributes:
        concepts: what labels mean.
        thresholds: float64 [U]: a unit is on where its up-sampled map is above.
        intersections, areas, label_areas: int64 [U, C], [U, K], [C], see :func:`concept_iou`.
        images: how many were tallied.
        iou_threshold: a unit is a detector from this IoU on.

    >>> import torch
    >>> concepts = Concepts(("", "cat", "dog", "red"), ("object", "color"), (0, 0, 0, 1))
    >>> found = Dissection(concepts, torch.zeros(2), torch.tensor([[0, 30, 5, 0], [0, 1, 0, 0]]),
    ...     torch.tensor([[50, 50], [60, 60]]), torch.tensor([0, 40, 40, 40]), images=9)
    >>> [(unit.name, round(unit.iou, 3), unit.detector) for unit in found.units]
    [('cat', 0.5, True), ('cat', 0.01, False)]
    >>> found.detectors, found.unique_detectors, found.counts["object"]
    (1, 1, Counts(detectors=1, unique=1))
    """

    concepts: Concepts
    thresholds: Tensor
    intersections: Tensor
    areas: Tensor
    label_areas: Tensor
    images: int
    iou_threshold: float = 0.05

    def iou(self) -> Tensor:
        """The whole table, float64 [U, C], computed when it is asked for."""
        categories = torch.tensor(self.concepts.category)
        return concept_iou(self.intersections, self.areas, self.label_areas, categories)

    @cached_property
    def _best(self) -> tuple[Tensor, Tensor]:
        table = self.iou().numpy()
        # NumPy's arg-max is the first of equals, torch's may be any.
        labels = np.asarray(table.argmax(1), dtype=np.int64)
        return torch.from_numpy(labels), torch.from_numpy(table[np.arange(len(table)), labels])

    @property
    def labels(self) -> Tensor:
        """int64 [U]: the concept with the highest IoU, of equals the first; 0: all IoUs are 0."""
        return self._best[0]

    @property
    def scores(self) -> Tensor:
        """float64 [U]: the IoU with that concept."""
        return self._best[1]

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """One row per unit."""
        rows = zip(
            self.labels.tolist(), self.scores.tolist(), self.thresholds.tolist(), strict=True
        )
        return tuple(
            Unit(
                unit,
                label,
                self.concepts.names[label] if label else "",
                self.concepts.category_of(label) if label else "",
                iou,
                threshold,
                bool(label) and iou >= self.iou_threshold,
            )
            for unit, (label, iou, threshold) in enumerate(rows)
        )

    @property
    def detectors(self) -> int:
        """Units whose IoU with their concept reaches the threshold."""
        return sum(unit.detector for unit in self.units)

    @property
    def unique_detectors(self) -> int:
        """Concepts that at least one unit detects."""
        return len({unit.label for unit in self.units if unit.detector})

    @cached_property
    def counts(self) -> dict[str, Counts]:
        """Category -> its detectors, by the winning label's primary category."""
        found: dict[str, list[int]] = {category: [] for category in self.concepts.categories}
        for unit in self.units:
            if unit.detector:
                found[unit.category].append(unit.label)
        return {name: Counts(len(labels), len(set(labels))) for name, labels in found.items()}
