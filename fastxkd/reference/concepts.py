"""concepts in plain torch: where units are above their thresholds, held against labelled pixels;
how many of a unit's values fall into each of many equal steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastxkd.reference.cam import exact_dtype

# Units whose masks are there at one time.
UNITS = 64

# Integers as wide as the number, for its bits.
_BITS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def source_positions(
    length: int, out_length: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The lower of the two positions each output is between (int32), and how far it is from it.

    Half-pixel centres, from integers: a centre that meets a position lies exactly on it, and no
    fraction rounds up to 1.
    """
    steps = 2 * torch.arange(out_length, device=device) + 1
    at = (steps * length - out_length).clamp(min=0)
    fraction = (at % (2 * out_length)).double() / (2 * out_length)
    return (at // (2 * out_length)).int(), fraction.to(dtype)


def upsampled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """``[..., h, w]`` bilinearly to ``[..., H, W]``: along the rows, then from row to row.

    ``a + f (b - a)``, each operation rounded by itself: it is ``a`` where both are, and never above
    the larger. An infinity counts as a quarter of the largest number.
    """
    largest = torch.finfo(maps.dtype).max / 4
    maps = maps.clamp(-largest, largest)
    for dim, length in ((-1, size[1]), (-2, size[0])):
        last = maps.shape[dim] - 1
        lower, fraction = source_positions(last + 1, length, maps.dtype, maps.device)
        a = maps.index_select(dim, lower)
        b = maps.index_select(dim, (lower + 1).clamp(max=last))
        maps = a + (fraction if dim == -1 else fraction[:, None]) * (b - a)
    return maps


def concepts(
    activations: Tensor,
    thresholds: Tensor,
    masks: Tensor,
    labels: Tensor,
    categories: Tensor,
    category_count: int,
) -> tuple[Tensor, Tensor]:
    """See ``fastxkd.ops.concepts.concept_tally``; every label must be one of ``categories``."""
    units, size = activations.shape[1], (masks.shape[2], masks.shape[3])
    intersections = masks.new_zeros((units, len(categories)), dtype=torch.int64)
    areas = masks.new_zeros((units, category_count), dtype=torch.int64)
    if not units or not len(activations):
        return intersections, areas
    of_category = F.one_hot(categories[1:], category_count).double()
    for image, layers, given in zip(activations, masks, labels, strict=True):
        image = image.to(exact_dtype(image))
        # The largest of a map with NaN is NaN, which is above nothing.
        active = (image.amax((1, 2)) > thresholds).nonzero()[:, 0]
        for chosen in active.split(UNITS):
            above = upsampled(image[chosen], size) > thresholds[chosen, None, None]
            found, covered = tally(above.flatten(1), layers.flatten(1), given, len(categories))
            seen = (found[:, 1:].double() @ of_category) > 0  # [chosen, categories]
            intersections[chosen] += found
            areas[chosen] += covered[:, None] * seen
    return intersections, areas


def tally(above: Tensor, layers: Tensor, given: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Pixels of each unit under each label ``[units, count]``, and of each unit ``[units]``.

    From masks ``[units, pixels]``, an image's layers ``[layers, pixels]`` and its image-level
    labels. Products are of float64, which autocast leaves alone.
    """
    covered = above.sum(1)
    found = covered[:, None] * torch.bincount(given, minlength=count)
    for layer in layers:
        present, which = layer.unique(return_inverse=True)
        pixels = above.double() @ F.one_hot(which, len(present)).double()
        found[:, present.long()] += pixels.long()
    found[:, 0] = 0
    return found, covered


def label_areas(masks: Tensor, labels: Tensor, count: int) -> Tensor:
    """Pixels of each label, ``[count]``; an image-level label has every pixel of its image."""
    pixels = masks.shape[2] * masks.shape[3]
    found = torch.bincount(labels.flatten(), minlength=count) * pixels
    found += torch.bincount(masks.flatten(), minlength=count)
    found[0] = 0
    return found


def ordered_keys(values: Tensor) -> Tensor:
    """int64 in the order of the numbers; those of 16 and 32 bits have keys of as many bits.

    -0 comes just below 0; a NaN has no meaningful key.
    """
    bits = values.contiguous().view(_BITS[values.dtype])
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits).long()


def keyed_values(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of :func:`ordered_keys`."""
    kind = _BITS[dtype]
    bits = torch.where(keys < 0, keys ^ torch.iinfo(kind).max, keys)
    return bits.to(kind).view(dtype)


def unit_counts(activations: Tensor, low: Tensor, shift: int, bits: int, counts: Tensor) -> None:
    """See ``fastxkd.ops.concepts.unit_counts``."""
    for image in activations:
        values = image.flatten(1)  # [units, positions]
        keys, numbers = ordered_keys(values), ~values.isnan()
        # The difference of two keys of 64 bits may need the sign as a digit.
        steps = (keys - low[:, None] >> shift) & (-1 if shift == 0 else (1 << 64 - shift) - 1)
        inside = numbers & (keys >= low[:, None]) & (steps >= 0) & (steps < 1 << bits)
        steps = torch.where(inside, steps, 0)
        counts.scatter_add_(1, steps, inside.long())
        counts[:, -1] += (~numbers).sum(1)


def unit_values(
    activations: Tensor, low: Tensor, high: Tensor, keys: Tensor, found: Tensor
) -> None:
    """See ``fastxkd.ops.concepts.unit_values``."""
    for image in activations:
        values = image.flatten(1)  # [units, positions]
        ordered = ordered_keys(values)
        inside = (ordered >= low[:, None]) & (ordered <= high[:, None]) & ~values.isnan()
        unit, position = inside.nonzero(as_tuple=True)  # one unit after the other
        place = torch.arange(len(unit), device=unit.device) - torch.searchsorted(unit, unit)
        place += found[unit]
        fits = place < keys.shape[1]
        unit, position, place = unit[fits], position[fits], place[fits]
        keys[unit, place] = ordered[unit, position]
        found += inside.sum(1)
