"""concepts in Triton: three launches.

1. Which labels an image has anywhere in its masks.
2. The image's labels as a list, and the units that are above their thresholds somewhere as another.
3. So many units of the one list with so many labels of the other: pixels are up-sampled and held
   against the threshold, and what units and labels share is a product of two matrices of 0 and 1.
   Programs past the end of a list have nothing to do.

Other than in CUDA there are no bits: a processor's matrix units count faster than it could pack.
All numbers are integers and are added up by atomics, in whatever order.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# What triton.jit decorates is not Python, and its tensors have no types that mypy knows.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastxkd._triton.plan import Device, Launch, alignment, device_of

# Units, labels and pixels of a program's products, by the bytes of a number that is computed with;
# units and positions of a map that are looked through at a time, labels, and pixels of masks.
UNITS, LABELS, PIXELS = {4: 32, 8: 16}, 64, 32
LISTED, POSITIONS, NAMED = 16, 64, 1024
PLAIN = 1024
WARPS = 128  # threads
REGISTERS = 128
TALLY_REGISTERS = {4: 168, 8: 255}
_BITS = {
    torch.float32: tl.int32,
    torch.float64: tl.int64,
    torch.bfloat16: tl.int16,
    torch.float16: tl.int16,
}


@triton.jit
def _label_of(masks, at, wanted, count):
    """0 where there is none."""
    label = tl.load(masks + at, wanted, other=0)
    return tl.where((label > 0) & (label < count), label, 0).to(tl.int32)


@triton.jit
def _concepts_present(
    masks,
    present,
    units: tl.int64,
    labels: tl.int64,
    blocks: tl.int64,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``present`` [images, labels] of zeros gets a 1 for each label; an image has ``units`` of
    ALIGN pixels, all layers of it."""
    size = units * ALIGN
    image = tl.program_id(0).to(tl.int64) // blocks
    at = tl.program_id(0).to(tl.int64) % blocks * BLOCK + tl.arange(0, BLOCK)
    label = _label_of(masks + image * size, at, at < size, labels)
    # Many may store the same number to the same place.
    tl.store(present + image * labels + label, (label > 0).to(tl.int8), label > 0)


@triton.jit
def _concepts_lists(
    activations,
    thresholds,
    present,
    active_units,
    active_count,
    present_labels,
    present_count,
    units: tl.int64,
    plane: tl.int64,
    stride_n: tl.int64,
    stride_c: tl.int64,
    stride_p: tl.int64,
    labels: tl.int64,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
    LABELS: tl.constexpr,
    F: tl.constexpr,
):
    """Of an image, in order: units whose largest number is above the threshold, and its labels."""
    image = tl.program_id(0).to(tl.int64)
    count = tl.zeros([], tl.int32)
    for first in range(0, units, UNITS):
        unit = first + tl.arange(0, UNITS)
        exists = unit < units
        threshold = tl.load(thresholds + unit, exists, other=0)
        above = tl.zeros([UNITS, BLOCK], tl.int32)
        broken = above
        for start in range(0, plane, BLOCK):
            place = start + tl.arange(0, BLOCK)
            wanted = exists[:, None] & (place < plane)[None, :]
            at = image * stride_n + unit[:, None] * stride_c + place[None, :] * stride_p
            value = tl.load(activations + at, wanted, other=0).to(F)
            above |= (wanted & (value > threshold[:, None])).to(tl.int32)
            broken |= (wanted & (value != value)).to(tl.int32)
        # The largest of a map with NaN is NaN, which is above nothing.
        active = ((tl.max(above, 1) != 0) & (tl.max(broken, 1) == 0)).to(tl.int32)
        place = count + tl.cumsum(active, 0) - active
        tl.store(active_units + image * units + place, unit.to(tl.int32), active != 0)
        count += tl.sum(active, 0)
    tl.store(active_count + image, count)
    count = tl.zeros([], tl.int32)
    for first in range(0, labels, LABELS):
        label = first + tl.arange(0, LABELS)
        found = tl.load(present + image * labels + label, label < labels, other=0).to(tl.int32)
        place = count + tl.cumsum(found, 0) - found
        tl.store(present_labels + image * labels + place, label.to(tl.int32), found != 0)
        count += tl.sum(found, 0)
    tl.store(present_count + image, count)


@triton.jit
def _bounded(value, LARGEST: tl.constexpr):
    """An infinity counts as a quarter of the largest number."""
    return tl.minimum(tl.maximum(value, -LARGEST), LARGEST)


@triton.jit
def _along_row(
    maps,
    row,
    left,
    right,
    stride,
    share,
    wanted,
    LARGEST: tl.constexpr,
    F: tl.constexpr,
):
    """``a + share (b - a)`` between two columns of each unit's map, each operation rounded."""
    a = _bounded(tl.load(maps + ((row + left) * stride)[None, :], wanted, other=0).to(F), LARGEST)
    b = _bounded(tl.load(maps + ((row + right) * stride)[None, :], wanted, other=0).to(F), LARGEST)
    return a + share[None, :] * (b - a)


@triton.jit
def _concepts_tally(
    activations,
    thresholds,
    masks,
    given,
    categories,
    rows,
    down,
    columns,
    along,
    active_units,
    active_count,
    present_labels,
    present_count,
    intersections,
    covered,
    seen,
    units: tl.int64,
    stride_n: tl.int64,
    stride_c: tl.int64,
    stride_p: tl.int64,
    height: tl.int64,
    width: tl.int64,
    layers: tl.int64,
    out_size: tl.int32,
    out_width: tl.int32,
    given_count: tl.int64,
    labels: tl.int64,
    category_count: tl.int64,
    unit_blocks: tl.int64,
    label_blocks: tl.int64,
    LARGEST: tl.constexpr,
    UNITS: tl.constexpr,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    """``covered`` [images, units]: pixels of each; ``seen`` [images, units, categories] of zeros
    gets a 1 for each category of a label that has some of them."""
    image = tl.program_id(0).to(tl.int64) // (unit_blocks * label_blocks)
    of_units = tl.program_id(0).to(tl.int64) // label_blocks % unit_blocks
    of_labels = tl.program_id(0).to(tl.int64) % label_blocks
    unit_count = tl.load(active_count + image)
    label_count = tl.load(present_count + image)
    first = of_labels == 0
    if (of_units * UNITS < unit_count) & (first | (of_labels * LABELS < label_count)):
        index = of_units * UNITS + tl.arange(0, UNITS)
        exists = index < unit_count
        unit = tl.load(active_units + image * units + index, exists, other=0).to(tl.int64)
        threshold = tl.load(thresholds + unit, exists, other=0)
        place = of_labels * LABELS + tl.arange(0, LABELS)
        known = place < label_count
        label = tl.load(present_labels + image * labels + place, known, other=0)
        maps = (activations + image * stride_n + unit * stride_c)[:, None]
        found = tl.zeros([UNITS, LABELS], tl.int32)
        area = tl.zeros([UNITS], tl.int32)
        for start in range(0, out_size, BLOCK):
            pixel = start + tl.arange(0, BLOCK)
            inside = pixel < out_size
            y, x = pixel // out_width, pixel % out_width
            top = tl.load(rows + y, inside, other=0).to(tl.int64)
            left = tl.load(columns + x, inside, other=0).to(tl.int64)
            bottom, right = tl.minimum(top + 1, height - 1), tl.minimum(left + 1, width - 1)
            share = tl.load(along + x, inside, other=0)
            wanted = exists[:, None] & inside[None, :]
            upper = _along_row(maps, top * width, left, right, stride_p, share, wanted, LARGEST, F)
            lower = _along_row(
                maps, bottom * width, left, right, stride_p, share, wanted, LARGEST, F
            )
            share = tl.load(down + y, inside, other=0)
            value = upper + share[None, :] * (lower - upper)
            above = wanted & (value > threshold[:, None])
            area += tl.sum(above.to(tl.int32), 1)
            # How many layers have the label; one that is not in the list is 0 and that nowhere.
            lies = tl.zeros([BLOCK, LABELS], tl.float16)
            for layer in range(layers):
                at = (image * layers + layer) * out_size + pixel
                mask = _label_of(masks, at, inside, labels)
                same = (mask[:, None] == label[None, :]) & (mask > 0)[:, None]
                lies += same.to(tl.float16)
            found += tl.dot(above.to(tl.float16), lies).to(tl.int32)
        mine = (image * units + unit) * category_count
        if first:
            tl.store(covered + image * units + unit, area.to(tl.int64), exists)
            on = exists & (area > 0)
            for s in range(given_count):
                which = tl.load(given + image * given_count + s)
                if (which > 0) & (which < labels):
                    tl.atomic_add(
                        intersections + unit * labels + which, area.to(tl.int64), on, "relaxed"
                    )
                    category = tl.load(categories + which)
                    if (category >= 0) & (category < category_count):
                        tl.store(seen + mine + category, tl.full([UNITS], 1, tl.int8), on)
        shared = exists[:, None] & known[None, :] & (found > 0)
        at = unit[:, None] * labels + label[None, :]
        tl.atomic_add(intersections + at, found.to(tl.int64), shared, "relaxed")
        category = tl.load(categories + label, known, other=-1)
        of_one = shared & ((category >= 0) & (category < category_count))[None, :]
        at = mine[:, None] + category[None, :]
        tl.store(seen + at, tl.full([UNITS, LABELS], 1, tl.int8), of_one)


@triton.jit
def _label_areas(
    masks,
    given,
    areas,
    units: tl.int64,
    given_count: tl.int64,
    pixels: tl.int64,
    labels: tl.int64,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of all images together: masks of ``units`` times ALIGN labels, ``given_count`` given ones."""
    size = units * ALIGN
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    label = _label_of(masks, at, at < size, labels)
    tl.atomic_add(areas + label, tl.full([BLOCK], 1, tl.int64), label > 0, "relaxed")
    label = _label_of(given, at, at < given_count, labels)
    tl.atomic_add(areas + label, tl.zeros([BLOCK], tl.int64) + pixels, label > 0, "relaxed")


@triton.jit
def _unit_counts(
    activations,
    low,
    counts,
    units: tl.int64,
    plane: tl.int64,
    stride_n: tl.int64,
    stride_c: tl.int64,
    stride_p: tl.int64,
    shift: tl.int64,
    mask: tl.int64,
    steps: tl.int64,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    F: tl.constexpr,
):
    blocks = tl.cdiv(units, UNITS)
    image = tl.program_id(0).to(tl.int64) // blocks
    unit = tl.program_id(0).to(tl.int64) % blocks * UNITS + tl.arange(0, UNITS)
    exists = unit < units
    first = tl.load(low + unit, exists, other=0)[:, None]
    for start in range(0, plane, BLOCK):
        place = start + tl.arange(0, BLOCK)
        wanted = exists[:, None] & (place < plane)[None, :]
        at = image * stride_n + unit[:, None] * stride_c + place[None, :] * stride_p
        value = tl.load(activations + at, wanted, other=0)
        bits = value.to(BITS, bitcast=True).to(tl.int64)
        key = tl.where(bits < 0, bits ^ MAGNITUDE, bits)
        number = value.to(F) == value.to(F)
        # Of keys of 64 bits the difference may need the bit of the sign.
        step = ((key - first) >> shift) & mask
        counted = number & (key >= first) & (step >= 0) & (step < steps)
        step = tl.where(number, step, steps)
        tl.atomic_add(
            counts + unit[:, None] * (steps + 1) + step,
            tl.full([UNITS, BLOCK], 1, tl.int64),
            wanted & (counted | (number == 0)),
            "relaxed",
        )


def _type(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _options(device: Device, registers: int = REGISTERS) -> dict[str, Any]:
    # Each operation is rounded by itself, or another pixel would be above the threshold than in
    # the other kernels.
    options: dict[str, Any] = {"num_warps": WARPS // device.lanes, "enable_fp_fusion": False}
    if device.nvidia:
        options["maxnreg"] = registers
    return options


def plan(
    activations: Tensor,
    thresholds: Tensor,
    masks: Tensor,
    labels: Tensor,
    categories: Tensor,
    vertical: tuple[Tensor, Tensor],
    horizontal: tuple[Tensor, Tensor],
    strides: list[int],
    intersections: Tensor,
    category_count: int,
    device: Device,
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches, and where they leave ``covered`` and ``seen``."""
    n, units, height, width = activations.shape
    layers, out_height, out_width = masks.shape[1:]
    count, out_size = len(categories), out_height * out_width
    size = thresholds.element_size()
    largest = torch.finfo(thresholds.dtype).max / 4
    if out_size >= 1 << 31:
        raise ValueError(f"size: expected less than 2^31 pixels, got {[out_height, out_width]}")
    options = _options(device)

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=activations.device)

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=activations.device)

    present = zeros(n, count, dtype=torch.int8)
    active_units, active_count = numbers(n, units), numbers(n)
    present_labels, present_count = numbers(n, count), numbers(n)
    covered = zeros(n, units, dtype=torch.int64)
    seen = zeros(n, units, category_count, dtype=torch.int8)
    launches = []
    pixels = layers * out_size
    if pixels:
        align = alignment(masks.element_size(), pixels)
        blocks = triton.cdiv(pixels, PLAIN)
        launches.append(
            Launch(
                _concepts_present,
                n * blocks,
                {
                    "masks": masks,
                    "present": present,
                    "units": pixels // align,
                    "labels": count,
                    "blocks": blocks,
                    "ALIGN": align,
                    "BLOCK": PLAIN,
                },
                options,
            )
        )
    maps = {
        "activations": activations,
        "thresholds": thresholds,
        "stride_n": strides[0],
        "stride_c": strides[1],
        "stride_p": strides[2],
        "units": units,
        "F": _type(activations.dtype),
    }
    lists = {
        "active_units": active_units,
        "active_count": active_count,
        "present_labels": present_labels,
        "present_count": present_count,
        "labels": count,
    }
    launches.append(
        Launch(
            _concepts_lists,
            n,
            {
                **maps,
                **lists,
                "present": present,
                "plane": height * width,
                "UNITS": LISTED,
                "BLOCK": min(triton.next_power_of_2(height * width), POSITIONS),
                "LABELS": min(triton.next_power_of_2(count), NAMED),
            },
            options,
        )
    )
    unit_blocks = triton.cdiv(units, UNITS[size])
    label_blocks = max(triton.cdiv(min(count - 1, pixels), LABELS), 1)
    launches.append(
        Launch(
            _concepts_tally,
            n * unit_blocks * label_blocks,
            {
                **maps,
                **lists,
                "masks": masks,
                "given": labels,
                "categories": categories,
                "rows": vertical[0],
                "down": vertical[1],
                "columns": horizontal[0],
                "along": horizontal[1],
                "intersections": intersections,
                "covered": covered,
                "seen": seen,
                "height": height,
                "width": width,
                "layers": layers,
                "out_size": out_size,
                "out_width": out_width,
                "given_count": labels.shape[1],
                "category_count": category_count,
                "unit_blocks": unit_blocks,
                "label_blocks": label_blocks,
                "LARGEST": largest,
                "UNITS": UNITS[size],
                "LABELS": LABELS,
                "BLOCK": PIXELS,
            },
            _options(device, TALLY_REGISTERS[size]),
        )
    )
    return launches, covered, seen


def concepts(
    activations: Tensor,
    thresholds: Tensor,
    masks: Tensor,
    labels: Tensor,
    categories: Tensor,
    vertical: tuple[Tensor, Tensor],
    horizontal: tuple[Tensor, Tensor],
    strides: list[int],
    intersections: Tensor,
    areas: Tensor,
) -> None:
    """As ``reference.concepts.concepts``, added to the last two; ``strides`` over (image, unit,
    position), and for rows and columns of the output what ``source_positions`` says."""
    if not activations.numel():
        return
    launches, covered, seen = plan(
        activations,
        thresholds,
        masks,
        labels,
        categories,
        vertical,
        horizontal,
        strides,
        intersections,
        areas.shape[1],
        device_of(activations),
    )
    for launch in launches:
        launch.run(activations)
    areas += (covered[:, :, None] * seen).sum(0)


def plan_label_areas(masks: Tensor, labels: Tensor, areas: Tensor, device: Device) -> Launch:
    align = alignment(masks.element_size(), masks.numel())
    return Launch(
        _label_areas,
        triton.cdiv(max(masks.numel(), labels.numel()), PLAIN),
        {
            "masks": masks,
            "given": labels,
            "areas": areas,
            "units": masks.numel() // align,
            "given_count": labels.numel(),
            "pixels": masks.shape[2] * masks.shape[3],
            "labels": len(areas),
            "ALIGN": align,
            "BLOCK": PLAIN,
        },
        _options(device),
    )


def label_areas(masks: Tensor, labels: Tensor, areas: Tensor) -> None:
    """As ``reference.concepts.label_areas``, added to ``areas``."""
    if masks.numel() or labels.numel():
        plan_label_areas(masks, labels, areas, device_of(masks)).run(masks)


def plan_unit_counts(
    activations: Tensor,
    low: Tensor,
    shift: int,
    bits: int,
    counts: Tensor,
    strides: list[int],
    device: Device,
) -> Launch:
    n, units, height, width = activations.shape
    return Launch(
        _unit_counts,
        n * triton.cdiv(units, LISTED),
        {
            "activations": activations,
            "low": low,
            "counts": counts,
            "units": units,
            "plane": height * width,
            "stride_n": strides[0],
            "stride_c": strides[1],
            "stride_p": strides[2],
            "shift": shift,
            "mask": (1 << (64 - shift)) - 1 if shift else -1,
            "steps": 1 << bits,
            "UNITS": LISTED,
            "BLOCK": min(triton.next_power_of_2(height * width), POSITIONS),
            "BITS": _BITS[activations.dtype],
            "MAGNITUDE": (1 << (8 * activations.element_size() - 1)) - 1,
            "F": _type(activations.dtype),
        },
        _options(device),
    )


def unit_counts(
    activations: Tensor, low: Tensor, shift: int, bits: int, counts: Tensor, strides: list[int]
) -> None:
    """As ``reference.concepts.unit_counts``; ``strides`` over (image, unit, position)."""
    if activations.numel():
        device = device_of(activations)
        plan_unit_counts(activations, low, shift, bits, counts, strides, device).run(activations)
