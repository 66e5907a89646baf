"""Network dissection: which concepts the units of a layer stand for, in constant memory.

data -> activations of a layer -> thresholds (unit_thresholds.py) -> tally (ops/concepts.py)
     -> IoU, one label per unit, detectors (concept_scores.py)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastxkd.cam.capture import bare, capture, evaluating, resolve_layers
from fastxkd.cam.layouts import check_transform, to_spatial
from fastxkd.metrics._spool import Spool
from fastxkd.metrics.concept_scores import Concepts, Dissection
from fastxkd.metrics.unit_thresholds import (
    Quantile,
    check_activations,
    quantile_position,
    unit_thresholds,
)
from fastxkd.ops._checks import check_choice, check_number
from fastxkd.ops.concepts import REPEATS, concept_tally, label_areas, refuse_unknown

Repeats = Literal["each", "once"]


class DissectionTally:
    """Counts pixels of units and concepts, batch by batch, over a whole data set.

    Args:
        thresholds: ``[U]``, see :func:`fastxkd.metrics.unit_thresholds`.
        concepts: what the labels mean.
        iou_threshold: a unit is a detector from this IoU on.
        repeats: as in :class:`NetworkDissection`.

    >>> import torch
    >>> tally = DissectionTally(torch.tensor([0.5]), Concepts(("", "left"), ("part",), (0, 0)))
    >>> on_the_left = torch.tensor([[1.0, 0.0], [1.0, 0.0]])[None, None]
    >>> tally.update(on_the_left, torch.tensor([[1, 0], [1, 0]], dtype=torch.int32)[None, None])
    >>> round(tally.compute().units[0].iou, 6)
    1.0
    """

    def __init__(
        self,
        thresholds: Tensor,
        concepts: Concepts,
        *,
        iou_threshold: float = 0.05,
        repeats: Repeats = "each",
    ) -> None:
        check_threshold(iou_threshold)
        check_choice("repeats", repeats, REPEATS)
        _check_concepts(concepts)
        if not isinstance(thresholds, Tensor) or thresholds.dim() != 1:
            got = list(thresholds.shape) if isinstance(thresholds, Tensor) else type(thresholds)
            raise ValueError(f"thresholds: expected one for each unit [U], got {got}")
        self.thresholds, self.concepts = thresholds, concepts
        self._iou_threshold, self._repeats = iou_threshold, repeats
        self._categories = torch.tensor(concepts.category, device=thresholds.device)
        units, labels, kinds = len(thresholds), len(concepts), len(concepts.categories)
        zeros: dict[str, Any] = {"dtype": torch.int64, "device": thresholds.device}
        self._intersections = torch.zeros(units, labels, **zeros)
        self._areas = torch.zeros(units, kinds, **zeros)
        self._label_areas = torch.zeros(labels, **zeros)
        self._images, self._size = 0, (0, 0)

    def update(self, activations: Tensor, masks: Tensor, labels: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            activations: ``[n, U, h, w]``.
            masks: ``[n, M, H, W]``, uint8, int16 or int32: numbers of labels in M layers (0 or
                more), 0: none. H and W are what maps are up-sampled to, the same in all batches.
            labels: ``[n, S]``, integers: labels of whole images, filled up with 0.

        Raises:
            ValueError: other units, sizes or labels than there are.
        """
        check_activations(activations)
        _check_seen(masks, labels, len(activations))
        size = (masks.shape[2], masks.shape[3])
        if self._images and size != self._size:
            raise ValueError(f"masks: expected {self._size} as in the batches before, got {size}")
        device = self.thresholds.device
        there = masks.to(device), None if labels is None else labels.to(device)
        found = concept_tally(
            activations.to(device),
            self.thresholds,
            *there,
            self._categories,
            category_count=len(self.concepts.categories),
            repeats=self._repeats,
        )
        if device.type != "cpu":  # kernels on others pass over labels that are none
            none = masks.new_zeros(len(masks), 0)
            refuse_unknown(masks, none if labels is None else labels, len(self.concepts))
        self._intersections += found.intersections
        self._areas += found.areas
        self._label_areas += label_areas(*there, len(self.concepts), repeats=self._repeats)
        self._images, self._size = self._images + len(masks), size

    def compute(self) -> Dissection:
        """The result so far, on the CPU.

        Raises:
            ValueError: no image was seen.
        """
        if not self._images:
            raise ValueError("DissectionTally: compute() before any update()")
        return Dissection(
            self.concepts,
            self.thresholds.cpu(),
            self._intersections.cpu().clone(),
            self._areas.cpu().clone(),
            self._label_areas.cpu().clone(),
            self._images,
            self._iou_threshold,
        )


def network_dissection(
    activations: Tensor,
    masks: Tensor,
    labels: Tensor | None = None,
    *,
    concepts: Concepts,
    q: float = 0.005,
    quantile: Quantile = "exact",
    iou_threshold: float = 0.05,
    repeats: Repeats = "each",
) -> Dissection:
    """Network dissection of activations that are there already.

    Args:
        activations: ``[n, U, h, w]`` of a layer, of all images.
        masks, labels: as in :meth:`DissectionTally.update`.
        concepts, q, quantile, iou_threshold, repeats: as in :class:`NetworkDissection`.

    >>> import torch
    >>> maps, masks = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 8, 8, dtype=torch.int32)
    >>> maps[0, 0, :2], masks[0, 0, :4] = 1.0, 1
    >>> found = network_dissection(maps, masks, concepts=Concepts(("", "up"), ("part",), (0, 0)),
    ...     q=0.3)
    >>> found.units[0].name, round(found.units[0].iou, 2)
    ('up', 0.8)
    """
    thresholds = unit_thresholds(activations, q, quantile=quantile)
    tally = DissectionTally(thresholds, concepts, iou_threshold=iou_threshold, repeats=repeats)
    tally.update(activations, masks, labels)
    return tally.compute()


class NetworkDissection:
    r"""Which concepts the units of a layer stand for (Bau et al. 2017; Han et al. 2023).

    A unit is on where its activation, up-sampled to the size of the masks, is above the value that
    a share ``q`` of its own activations exceeds. Its IoU with a concept is one quotient of sums
    over the data set,

    .. math:: IoU_{u,c} = I_{u,c} / (A_{u,k(c)} + L_c - I_{u,c} + 10^{-10})

    with :math:`I` the pixels that both have, :math:`L_c` those of the concept, and
    :math:`A_{u,k}` those of the unit in images with a label of the concept's category under it.
    Its label is the concept with the highest IoU; from ``iou_threshold`` on it is a detector.

    Args:
        model: run in eval mode without a graph, and left as it was.
        layer: a name or module of it with one map per unit; tokens become maps as in
            :class:`fastxkd.GradCAM`.
        concepts: what the labels of the data mean.
        q: share of a unit's activations above its threshold.
        quantile: ``"exact"``, or ``"published"``: the point the authors' code reads, see
            :func:`fastxkd.metrics.unit_thresholds`.
        iou_threshold: 0.05 as Han et al.; Bau et al. have 0.04.
        repeats: a label that a pixel has in two layers of masks counts ``"each"`` time, as in the
            published code, or ``"once"``, as "pixels with the label" reads; an interpretation.
        spool: None: the model runs over the data three or four times, the last one for the tally;
            a folder: once, and activations, masks and labels wait on the disk, in files that go
            with the process. Memory does not grow with the number of images either way.
        reshape_transform: as in :class:`fastxkd.GradCAM`.
        device: where images go; None: where the model's weights are.

    >>> import torch, fastxkd
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    >>> concepts = Concepts(("", "sky"), ("scene",), (0, 0))
    >>> masks = torch.randint(0, 2, (5, 1, 16, 16), dtype=torch.int32)
    >>> found = NetworkDissection(model, "1", concepts)([(torch.rand(5, 3, 16, 16), masks)])
    >>> len(found.units), found.iou().shape
    (8, torch.Size([8, 2]))
    """

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module | str,
        concepts: Concepts,
        *,
        q: float = 0.005,
        quantile: Quantile = "exact",
        iou_threshold: float = 0.05,
        repeats: Repeats = "each",
        spool: str | os.PathLike[str] | None = None,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        found = resolve_layers(model, layer, "layer")
        if len(found) != 1:
            raise ValueError(f"layer: expected one, got {', '.join(found)}")
        ((self.layer, self._module),) = found.items()
        _check_concepts(concepts)
        quantile_position(q, quantile)
        check_threshold(iou_threshold)
        check_choice("repeats", repeats, REPEATS)
        check_transform(reshape_transform)
        self.model, self.concepts = model, concepts
        self.q, self.quantile = q, quantile
        self.iou_threshold, self.repeats = iou_threshold, repeats
        self.spool, self._transform = spool, reshape_transform
        weights = next(model.parameters(), None)
        self.device = torch.device(
            device if device is not None else "cpu" if weights is None else weights.device
        )

    def activations(self, images: Tensor) -> Tensor:
        """``[n, U, h, w]`` of the layer for a batch of images.

        Raises:
            ValueError: the layer is not reached, or gives no maps.
        """
        _check_images(images)
        images = images.to(self.device)
        with (
            torch.no_grad(),
            evaluating(self.model),
            capture(self.model, [self._module]) as captured,
        ):
            self.model(images)
            (found,) = captured.activations.values()
        found = to_spatial(
            found,
            transform=self._transform,
            image=tuple(images.shape[2:]),
            model=bare(self.model),
            layer=self._module,
            n=len(images),
        )
        if not isinstance(found, Tensor):
            raise TypeError(
                f"reshape_transform: expected a function to a Tensor, got {type(found).__name__}"
            )
        found = found[:, :, None, None] if found.dim() == 2 else found
        if found.dim() != 4 or len(found) != len(images):
            raise ValueError(
                f"layer: expected activations [{len(images)}, units, h, w] of {self.layer!r},"
                f" got {list(found.shape)}"
            )
        return found

    def __call__(self, batches: Iterable[Any]) -> Dissection:
        """Dissect the layer on a data set.

        Args:
            batches: ``(images, masks)`` or ``(images, masks, labels)``, as in
                :meth:`DissectionTally.update`. With a spool anything that can be iterated once;
                without, something that gives the same images every time it is iterated, in
                whatever order, such as a list or a DataLoader.

        Raises:
            ValueError: no batches, a one-way iterator without a spool, images that change from one
                time to the next, or batches that do not fit together.
        """
        if self.spool is None:
            if isinstance(batches, Iterator):
                raise ValueError(
                    "batches: expected a list, a DataLoader or the like, which can be iterated"
                    f" several times, got a {type(batches).__name__}; with a spool once is enough"
                )
            return self._dissected(
                lambda: (self.activations(images) for images, _, _ in _parts(batches)),
                ((self.activations(images), *seen) for images, *seen in _parts(batches)),
            )
        with ExitStack() as stack:
            # Masks and labels wait as well: data that is shuffled or augmented comes only once in
            # the order, and the shape, that the activations are of.
            found, masks, labels = (stack.enter_context(Spool(self.spool)) for _ in range(3))
            for images, *seen in _parts(batches):
                parts = (self.activations(images), *seen)
                for spool, part in zip((found, masks, labels), parts, strict=True):
                    spool.add(part)
            return self._dissected(
                lambda: (batch.to(self.device) for batch in found),
                zip(found, masks, labels, strict=True),
            )

    def _dissected(
        self,
        activations: Callable[[], Iterable[Tensor]],
        batches: Iterable[Iterable[Tensor]],
    ) -> Dissection:
        tally = DissectionTally(
            unit_thresholds(activations, self.q, quantile=self.quantile),
            self.concepts,
            iou_threshold=self.iou_threshold,
            repeats=self.repeats,
        )
        for batch in batches:
            tally.update(*batch)
        return tally.compute()


def _parts(batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images, masks and labels, of which there may be none, of every batch."""
    some = False
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            got = f"{len(batch)} of them" if isinstance(batch, (tuple, list)) else type(batch)
            raise ValueError(
                f"batches: expected (images, masks) or (images, masks, labels), got {got}"
            )
        images, masks, labels = (*batch, None)[:3]
        _check_images(images)
        _check_seen(masks, labels, len(images))
        some = True
        yield images, masks, torch.zeros(len(images), 0).long() if labels is None else labels
    if not some:
        raise ValueError("batches: expected at least one, got none")


def _check_images(images: object) -> None:
    if not isinstance(images, Tensor) or images.dim() != 4:
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images: expected [n, channels, H, W], got {got}")


def _check_seen(masks: object, labels: object, images: int) -> None:
    if not isinstance(masks, Tensor) or masks.dim() != 4 or len(masks) != images:
        got = list(masks.shape) if isinstance(masks, Tensor) else type(masks).__name__
        raise ValueError(f"masks: expected [{images}, layers, H, W], got {got}")
    if labels is not None and not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a Tensor or None, got {type(labels).__name__}")


def check_threshold(iou_threshold: float) -> None:
    check_number("iou_threshold", iou_threshold)
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold: expected a number in (0, 1], got {iou_threshold}")


def _check_concepts(concepts: object) -> None:
    if not isinstance(concepts, Concepts):
        raise TypeError(f"concepts: expected Concepts, got {type(concepts).__name__}")
