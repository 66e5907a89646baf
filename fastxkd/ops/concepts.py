"""concepts: how the masks of every unit lie over labelled pixels, and the counts that exact
quantiles of every unit are found by. Nothing here has a gradient.

Every number is an integer, and the up-sampled values are rounded in one prescribed way: all
kernels give the same tallies, whatever the machine and however many threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastxkd.ops._checks import check_choice, check_counts, check_float
from fastxkd.ops._library import (
    DTYPES,
    cuda_kernels,
    define,
    exact_dtype,
    kernel_of,
    kernels,
    serve,
    unobserved,
)
from fastxkd.ops.cam import _planes
from fastxkd.reference import concepts as reference

MASK_DTYPES = {torch.uint8: 0, torch.int16: 1, torch.int32: 2}
REPEATS = ("each", "once")


class ConceptTally(NamedTuple):
    """What one batch adds: ``intersections`` ``[units, labels]``, ``areas``
    ``[units, categories]``, int64."""

    intersections: Tensor
    areas: Tensor


def _fake(
    activations: Tensor,
    thresholds: Tensor,
    masks: Tensor,
    labels: Tensor,
    categories: Tensor,
    category_count: int,
) -> tuple[Tensor, Tensor]:
    units = activations.shape[1]
    return (
        activations.new_empty((units, categories.shape[0]), dtype=torch.int64),
        activations.new_empty((units, category_count), dtype=torch.int64),
    )


@define(
    "concepts(Tensor activations, Tensor thresholds, Tensor masks, Tensor labels,"
    " Tensor categories, SymInt category_count) -> (Tensor intersections, Tensor areas)",
    _fake,
)
def _concepts(
    activations: Tensor,
    thresholds: Tensor,
    masks: Tensor,
    labels: Tensor,
    categories: Tensor,
    category_count: int,
) -> tuple[Tensor, Tensor]:
    """Of arguments as :func:`concept_tally` prepares them: thresholds ``[units]`` in the dtype that
    is computed in, masks ``[n, layers, H, W]``, int64 labels ``[n, count]`` and categories."""
    backend = serve("concepts", activations)
    if backend == "reference":
        refuse_unknown(masks, labels, len(categories))
        return reference.concepts(
            activations, thresholds, masks, labels, categories, category_count
        )
    n, units, height, width = activations.shape
    layers, out_height, out_width = masks.shape[1:]
    activations, strides = _planes(activations)
    thresholds, masks = thresholds.contiguous(), masks.contiguous()
    labels, categories = labels.contiguous(), categories.contiguous()
    device, dtype = activations.device, thresholds.dtype
    rows, down = reference.source_positions(height, out_height, dtype, device)
    columns, along = reference.source_positions(width, out_width, dtype, device)
    shape = (units, len(categories)), (units, category_count)
    intersections, areas = (torch.zeros(s, dtype=torch.int64, device=device) for s in shape)
    if backend == "triton":
        kernel_of(backend, "concepts")(
            *(activations, thresholds, masks, labels, categories),
            *((rows, down), (columns, along), strides, intersections, areas),
        )
        return intersections, areas
    sizes = [n, units, height, width, layers, out_height, out_width, labels.shape[1]]
    sizes += [len(categories), category_count]
    tensors = [activations, thresholds, masks, labels, categories]
    tensors += [rows, down, columns, along, intersections, areas]
    module, *how = kernels() if backend == "cpu" else cuda_kernels(activations)
    if backend == "cuda":
        room = module.concepts_workspace(sizes)
        workspace = torch.empty(room, dtype=torch.float64, device=device)
        how.append(workspace.data_ptr())
    status = module.concepts(
        *how,
        [t.data_ptr() for t in tensors],
        sizes,
        strides,
        DTYPES[activations.dtype],
        MASK_DTYPES[masks.dtype],
    )
    if backend == "cpu" and status >= 0:
        refuse_unknown(masks, labels, len(categories), int(status))
    return intersections, areas


def _fake_areas(masks: Tensor, labels: Tensor, count: int) -> Tensor:
    return masks.new_empty((count,), dtype=torch.int64)


@define("label_areas(Tensor masks, Tensor labels, SymInt count) -> Tensor", _fake_areas)
def _label_areas(masks: Tensor, labels: Tensor, count: int) -> Tensor:
    # Labels are of no dtype that kernels are chosen by.
    backend = serve("concepts", masks.new_empty(0, dtype=torch.float32))
    if backend == "reference":
        refuse_unknown(masks, labels, count)
        return reference.label_areas(masks, labels, count)
    masks, labels = masks.contiguous(), labels.contiguous()
    areas = torch.zeros(count, dtype=torch.int64, device=masks.device)
    if backend == "triton":
        kernel_of(backend, "concepts", "label_areas")(masks, labels, areas)
        return areas
    module, *how = kernels() if backend == "cpu" else cuda_kernels(masks)
    tensors = [t.data_ptr() for t in (masks, labels, areas)]
    sizes = [*masks.shape, labels.shape[1], count]
    status = module.label_areas(*how, tensors, sizes, MASK_DTYPES[masks.dtype])
    if backend == "cpu" and status >= 0:
        refuse_unknown(masks, labels, count, int(status))
    return areas


@define(
    "unit_counts_(Tensor activations, Tensor low, int shift, int bits, Tensor(a!) counts) -> ()",
    lambda activations, low, shift, bits, counts: None,
)
def _unit_counts(activations: Tensor, low: Tensor, shift: int, bits: int, counts: Tensor) -> None:
    backend = serve("concepts", activations)
    if backend == "reference":
        reference.unit_counts(activations, low, shift, bits, counts)
        return
    activations, strides = _planes(activations)
    low = low.contiguous()
    if backend == "triton":
        kernel = kernel_of(backend, "concepts", "unit_counts")
        kernel(activations, low, shift, bits, counts, strides)
        return
    module, *how = kernels() if backend == "cpu" else cuda_kernels(activations)
    n, units, height, width = activations.shape
    tensors = [t.data_ptr() for t in (activations, low, counts)]
    sizes = [n, units, height * width, shift, bits]
    module.unit_counts(*how, tensors, sizes, strides, DTYPES[activations.dtype])


@define(
    "unit_values_(Tensor activations, Tensor low, Tensor high, Tensor(a!) keys, Tensor(b!) found)"
    " -> ()",
    lambda activations, low, high, keys, found: None,
)
def _unit_values(
    activations: Tensor, low: Tensor, high: Tensor, keys: Tensor, found: Tensor
) -> None:
    # No kernel of its own on a GPU: what it looks for is few, and plain torch finds it.
    if serve("concepts", activations) != "cpu":
        reference.unit_values(activations, low, high, keys, found)
        return
    activations, strides = _planes(activations)
    low, high = low.contiguous(), high.contiguous()
    module, level, threads = kernels()
    n, units, height, width = activations.shape
    tensors = [t.data_ptr() for t in (activations, low, high, keys, found)]
    sizes = [n, units, height * width, keys.shape[1]]
    module.unit_values(level, threads, tensors, sizes, strides, DTYPES[activations.dtype])


def concept_tally(
    activations: Tensor,
    thresholds: Tensor,
    masks: Tensor | None,
    labels: Tensor | None,
    categories: Tensor,
    *,
    size: Sequence[int] | None = None,
    category_count: int | None = None,
    repeats: str = "each",
) -> ConceptTally:
    r"""What one batch of images adds to the tallies of network dissection (Bau et al. 2017).

    In image :math:`i`, unit :math:`u` has the mask

    .. math:: M_{iu} = \big\{\, p : \mathrm{up}(A_{iu})_p > T_u \,\big\},

    its real-valued map, bilinearly up-sampled with half-pixel centres, strictly above its
    threshold; none where the map's own largest value is not above it, or NaN. Summed over images:

    - ``intersections[u, c]``: pixels of :math:`M_{iu}` with label :math:`c`; all of them for an
      image-level label.
    - ``areas[u, k]``: :math:`|M_{iu}|`, of the images that carry a label of category :math:`k`
      under :math:`M_{iu}` or as an image-level label.

    Args:
        activations: ``[n, units, h, w]``, any floating-point dtype and layout. Values are
            up-sampled in float32 (float64 for float64); an infinite one counts as a very large
            one, a quarter of the largest number.
        thresholds: ``[units]``, floating point; with NaN or inf a unit has no masks.
        masks: ``[n, layers, H, W]``, uint8, int16 or int32: each pixel's labels, one a layer, 0
            for none; or ``[n, H, W]``. ``None``: image-level labels alone.
        labels: ``[n, count]`` integers: the image-level labels, padded with 0. ``None``: none.
        categories: ``[labels]`` int64: the primary category of each label, from 0; that of label
            0, which is no label, is ignored.
        size: ``(H, W)``; ``None`` (default): that of ``masks``.
        category_count: how many categories there are; ``None`` (default): as many as
            ``categories`` names.
        repeats: a label that a pixel has in two layers, or that an image has twice, is counted
            ``"each"`` time (default), as the published code does by its histogram over all
            layers, or ``"once"``. The formula's "pixels with label c" would be the latter: which
            of the two is an interpretation. Broden has few such pixels.

    Returns:
        :class:`ConceptTally`, of this batch: add up over the data set. With ``label_areas`` as
        :math:`L` the score is :math:`I_{uc} / (A_{u,cat(c)} + L_c - I_{uc})`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected. On a CPU a
            label outside ``categories`` names its image; on a GPU it is not looked for, and not
            counted.

    >>> import torch
    >>> from fastxkd.ops.concepts import concept_tally
    >>> maps = torch.tensor([[[[0.0, 4.0]], [[0.0, 0.0]]]])  # one image, two units, 1 x 2
    >>> masks = torch.tensor([[[[0, 1, 1, 2]]]], dtype=torch.uint8)
    >>> tally = concept_tally(maps, torch.tensor([2.0, 0.5]), masks, None, torch.tensor([0, 0, 1]))
    >>> tally.intersections.tolist(), tally.areas.tolist()  # up-sampled: 0 1 3 4
    ([[0, 1, 1], [0, 0, 0]], [[2, 2], [0, 0]])
    """
    check_choice("repeats", repeats, REPEATS)
    check_maps(activations)
    _check_thresholds(thresholds, activations)
    masks, labels = _annotations(masks, labels, size, activations)
    category_count = _check_categories(categories, category_count, activations)
    if repeats == "once":
        masks, labels = _once(masks, labels)
    found = torch.ops.fastxkd.concepts(
        activations.detach(),
        _rounded_down(thresholds.detach(), exact_dtype(activations)),
        masks,
        labels,
        categories,
        category_count,
    )
    return ConceptTally(*found)


def label_areas(
    masks: Tensor | None,
    labels: Tensor | None,
    count: int,
    *,
    size: Sequence[int] | None = None,
    repeats: str = "each",
) -> Tensor:
    """Pixels of each label, ``[count]`` int64; an image-level label has all of its image.

    Args:
        masks, labels, size, repeats: as of :func:`concept_tally`.
        count: how many labels there are, 0 among them: the length of ``categories``.

    >>> import torch
    >>> from fastxkd.ops.concepts import label_areas
    >>> masks = torch.tensor([[[[0, 1], [1, 2]]]], dtype=torch.uint8)
    >>> label_areas(masks, torch.tensor([[3, 0]]), 4).tolist()
    [0, 2, 1, 4]
    """
    check_choice("repeats", repeats, REPEATS)
    check_counts(count=count)
    masks, labels = _annotations(masks, labels, size, None)
    if repeats == "once":
        masks, labels = _once(masks, labels)
    return torch.ops.fastxkd.label_areas(masks, labels, count)  # type: ignore[no-any-return]


def unit_counts(activations: Tensor, low: Tensor, shift: int, bits: int, counts: Tensor) -> None:
    """Add to ``counts`` how many of each unit's values fall into each of :math:`2^{bits}` steps.

    One pass of a radix search for exact quantiles, see ``ops.quantiles``. A number's key is an
    integer in the order of the numbers (``reference.concepts.ordered_keys``: its bits, those after
    the sign turned over where it is negative), as many bits as the dtype has. A step holds
    :math:`2^{shift}` neighbouring keys, the first of them ``low``.

    Args:
        activations: ``[n, units, h, w]``, any floating-point dtype and layout.
        low: ``[units]`` int64 keys: where each unit's first step begins.
        shift, bits: the steps' width and number, as powers of two.
        counts: ``[units, 2**bits + 1]`` int64, added to; the last counts NaN, which is in no step.

    >>> import torch
    >>> from fastxkd.ops.concepts import unit_counts
    >>> counts = torch.zeros(1, 5, dtype=torch.int64)
    >>> values = torch.tensor([-1.0, 0.5, 1.0, float("nan")]).view(1, 1, 2, 2)
    >>> unit_counts(values, torch.tensor([-(2**31)]), 30, 2, counts)  # by sign and top exponent bit
    >>> counts.tolist()
    [[0, 1, 2, 0, 1]]
    """
    check_maps(activations)
    width = 8 * activations.element_size()
    if not 0 <= shift < width or not 1 <= bits <= width or bits > 24:
        raise ValueError(
            f"shift, bits: expected 0 <= shift < {width} and 1 <= bits <= {min(width, 24)} for"
            f" {activations.dtype}, got {shift} and {bits}"
        )
    units = activations.shape[1]
    _check_integers("low", low, (units,), activations)
    _check_integers("counts", counts, (units, 2**bits + 1), activations)
    _check_keys("low", low, activations)
    if not counts.is_contiguous():
        raise ValueError("counts: expected a contiguous tensor, it is added to in place")
    torch.ops.fastxkd.unit_counts_(activations.detach(), low, shift, bits, counts)


def unit_values(
    activations: Tensor, low: Tensor, high: Tensor, keys: Tensor, found: Tensor
) -> None:
    """Add to ``keys`` those of each unit's values that lie in a window, in no particular order.

    What ends a search that :func:`unit_counts` has begun.

    Args:
        activations: ``[n, units, h, w]``, any floating-point dtype and layout.
        low, high: ``[units]`` int64: the first and the last key that is wanted; none where ``high``
            is below ``low``. NaN is never wanted.
        keys: ``[units, room]`` int64, written to from position ``found`` on.
        found: ``[units]`` int64, added to: how many there are, those without room among them.

    >>> import torch
    >>> from fastxkd.ops.concepts import unit_values
    >>> from fastxkd.reference.concepts import keyed_values, ordered_keys
    >>> values = torch.tensor([-1.0, 0.5, 1.0, 2.0]).view(1, 1, 2, 2)
    >>> low, high = ordered_keys(torch.tensor([[0.5], [1.5]]))
    >>> keys, found = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    >>> unit_values(values, low, high, keys, found)
    >>> keyed_values(keys[:, : found.item()], torch.float32).tolist()
    [[0.5, 1.0]]
    """
    check_maps(activations)
    units = activations.shape[1]
    room = keys.shape[1] if isinstance(keys, Tensor) and keys.dim() == 2 else 1
    shapes = {"low": (units,), "high": (units,), "keys": (units, room), "found": (units,)}
    for (name, shape), tensor in zip(shapes.items(), (low, high, keys, found), strict=True):
        _check_integers(name, tensor, shape, activations)
        if name in ("low", "high"):
            _check_keys(name, tensor, activations)
        elif not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, it is written to in place")
    torch.ops.fastxkd.unit_values_(activations.detach(), low, high, keys, found)


def check_maps(activations: Tensor) -> None:
    check_float("activations", activations)
    if activations.dtype not in DTYPES:
        raise TypeError(
            f"activations: expected float32, float64, bfloat16 or float16, got {activations.dtype}"
        )
    if activations.dim() != 4 or 0 in activations.shape[1:]:
        raise ValueError(
            "activations: expected spatial maps [n, units, height, width], got shape"
            f" {list(activations.shape)}"
        )


def _check_integers(name: str, tensor: Tensor, shape: tuple[int, ...], activations: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name}: expected torch.int64, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
    _check_device(name, tensor, activations)


def _check_keys(name: str, keys: Tensor, activations: Tensor) -> None:
    """Integers of as many bits as the numbers have; looked at where that costs nothing."""
    width = 8 * activations.element_size()
    if width == 64 or not unobserved(keys) or keys.device.type != "cpu" or keys.numel() == 0:
        return
    least, most = (int(x) for x in keys.aminmax())
    if least < -(2 ** (width - 1)) or most >= 2 ** (width - 1):
        raise ValueError(
            f"{name}: expected keys of {activations.dtype}, integers of {width} bits, got"
            f" {least} to {most}"
        )


def _check_device(name: str, tensor: Tensor, activations: Tensor) -> None:
    if tensor.device != activations.device:
        raise ValueError(
            f"{name}: expected the device of activations, {activations.device}, got {tensor.device}"
        )


def _check_thresholds(thresholds: Tensor, activations: Tensor) -> None:
    check_float("thresholds", thresholds)
    if thresholds.shape != activations.shape[1:2]:
        raise ValueError(
            f"thresholds: expected {list(activations.shape[1:2])}, one for each unit of"
            f" activations {list(activations.shape)}, got {list(thresholds.shape)}"
        )
    _check_device("thresholds", thresholds, activations)


def _check_categories(categories: Tensor, count: int | None, activations: Tensor) -> int:
    if not isinstance(categories, Tensor):
        raise TypeError(f"categories: expected a Tensor, got {type(categories).__name__}")
    if categories.dtype != torch.int64:
        raise TypeError(f"categories: expected torch.int64, got {categories.dtype}")
    if categories.dim() != 1 or len(categories) == 0:
        raise ValueError(
            "categories: expected [labels], the first of them label 0, got shape"
            f" {list(categories.shape)}"
        )
    _check_device("categories", categories, activations)
    if count is not None:
        check_counts(category_count=count)
    if not unobserved(categories):
        if count is None:
            raise ValueError("category_count: compiled code cannot count them, give their number")
        return count
    if categories.device.type != "cpu" and count is not None:
        return count
    named = categories[1:]
    low, high = (int(x) for x in named.aminmax()) if len(named) else (0, 0)
    count = high + 1 if count is None else count
    if low < 0 or high >= count:
        raise ValueError(
            f"categories: expected numbers from 0 to {count - 1}, got {low if low < 0 else high}"
        )
    return count


def _annotations(
    masks: Tensor | None,
    labels: Tensor | None,
    size: Sequence[int] | None,
    activations: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Masks ``[n, layers, H, W]`` and int64 labels ``[n, count]``, either of which may be none."""
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size: expected (height, width) of at least 1, got {tuple(size)}")
    given = [t for t in (activations, masks, labels) if t is not None]
    if not given:
        raise ValueError("masks, labels: expected at least one of them")
    if masks is None:
        if size is None:
            raise ValueError("size: expected (height, width), since there are no masks to have it")
        masks = given[0].new_zeros((len(given[0]), 0, *size), dtype=torch.uint8)
    if not isinstance(masks, Tensor):
        raise TypeError(f"masks: expected a Tensor or None, got {type(masks).__name__}")
    if masks.dtype not in MASK_DTYPES:
        raise TypeError(f"masks: expected uint8, int16 or int32, got {masks.dtype}")
    if masks.dim() == 3:
        masks = masks[:, None]
    if masks.dim() != 4 or 0 in masks.shape[2:]:
        raise ValueError(
            f"masks: expected [n, layers, height, width], got shape {list(masks.shape)}"
        )
    if size is not None and tuple(size) != tuple(masks.shape[2:]):
        raise ValueError(
            f"masks: expected size {tuple(size)}, got {tuple(masks.shape[2:])} in shape"
            f" {list(masks.shape)}"
        )
    if labels is None:
        labels = masks.new_zeros((len(masks), 0), dtype=torch.int64)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a Tensor or None, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected integers, got {labels.dtype}")
    if labels.dim() != 2:
        raise ValueError(f"labels: expected [n, count], got shape {list(labels.shape)}")
    first = masks if activations is None else activations
    for name, tensor in (("masks", masks), ("labels", labels)):
        if len(tensor) != len(first):
            raise ValueError(
                f"{name}: expected {len(first)} images as in"
                f" {'masks' if activations is None else 'activations'} {list(first.shape)},"
                f" got {len(tensor)} in {list(tensor.shape)}"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name}: expected the device of"
                f" {'masks' if activations is None else 'activations'}, {first.device},"
                f" got {tensor.device}"
            )
    return masks, labels.long()


def _once(masks: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What a pixel, or an image, has said before is taken out."""
    count = labels.shape[1]
    earlier = torch.ones(count, count, dtype=torch.bool, device=labels.device).tril(-1)
    repeated = ((labels[:, :, None] == labels[:, None, :]) & earlier).any(2)
    labels = labels.masked_fill(repeated, 0)
    layers: list[Tensor] = []
    for layer in masks.unbind(1):
        for other in layers:
            layer = layer.masked_fill(layer == other, 0)
        layers.append(layer)
    for s in range(count):
        layers = [x.masked_fill(x == labels[:, s, None, None], 0) for x in layers]
    return (torch.stack(layers, 1) if layers else masks), labels


def _rounded_down(thresholds: Tensor, dtype: torch.dtype) -> Tensor:
    """To the number of ``dtype`` that the same numbers of ``dtype`` are above."""
    near = thresholds.to(dtype)
    below = torch.nextafter(near, torch.full_like(near, -torch.inf))
    return torch.where(near.double() > thresholds.double(), below, near)


def refuse_unknown(masks: Tensor, labels: Tensor, count: int, image: int | None = None) -> None:
    """The first image with a label that there is not; ``image`` where a kernel has found it."""
    for i in range(len(masks)) if image is None else [image]:
        for name, given in (("masks", masks[i]), ("labels", labels[i])):
            if given.numel() == 0:
                continue
            low, high = (int(x) for x in given.aminmax())
            if low < 0 or high >= count:
                raise ValueError(
                    f"{name}: expected labels from 0 to {count - 1},"
                    f" got {low if low < 0 else high} in image {i}"
                )
