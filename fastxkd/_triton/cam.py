"""cam in Triton: up to three launches, as csrc/cuda/cam.cu has them.

1. weights: of each channel, where the method has any of its own; sums over positions.
2. sums: over channels, a run of them to a program; what is left is the map in several parts.
3. finish: a program for each image adds the parts up; then ReLU, min-max, resizing and min-max.

One kernel serves both layouts: a tile is [channels, positions], and what differs is along which of
the two memory runs. Where planes do not divide into 16 bytes, as those of 7 x 7, several channels
together are a plane of their own, `fold` times as long, and each gives `fold` parts.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# What triton.jit decorates is not Python, and its tensors have no types that mypy knows.
from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastxkd._triton.logits import INF
from fastxkd._triton.plan import Device, Launch, alignment, device_of
from fastxkd.reference import cam as reference

GRADCAM, PLUS_PLUS, XGRADCAM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
HIRESCAM, LAYERCAM, ELEMENTWISE = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
WEIGHTS = tl.constexpr(6)
METHODS = {
    "gradcam": GRADCAM,
    "gradcam++": PLUS_PLUS,
    "xgradcam": XGRADCAM,
    "hirescam": HIRESCAM,
    "layercam": LAYERCAM,
    "elementwise": ELEMENTWISE,
    "weights": WEIGHTS,
}
OWN_WEIGHTS = ("gradcam", "gradcam++", "xgradcam")
_PLUS_PLUS_EPS = tl.constexpr(reference.PLUS_PLUS_EPS)
_XGRAD_EPS = tl.constexpr(reference.XGRAD_EPS)
_MIN_MAX_EPS = tl.constexpr(reference.MIN_MAX_EPS)

# By the bytes of a number that the kernels compute with: the numbers of a tile, the channels of one
# where memory runs along them (to find weights, and to sum over them), the registers of a thread.
TILE = {4: 2048, 8: 1024}
ALONG = {4: (64, 256), 8: (32, 128)}
WARPS = 128  # threads
REGISTERS = {4: 128, 8: 255}
FINISH = 1024  # positions at a time
PARTS = 2048  # numbers of a tile of parts
LEAST_RUN, LONGEST_RUN = 8, 64  # steps of a sum in single precision


@triton.jit
def _load(tensor, offsets, wanted, F: tl.constexpr):
    return tl.load(tensor + offsets, wanted, other=0).to(F)


@triton.jit
def _positive(x):
    return tl.where(x < 0, 0, x)  # NaN passes


@triton.jit
def _plus_plus(g, total):
    """What each gradient adds to its channel's weight, and the denominator."""
    square = g * g
    below = 2 * square + total * square * g + _PLUS_PLUS_EPS
    return tl.where(g <= 0, 0, square * g / below), below  # NaN is not


@triton.jit
def _tile(step, place, LAST: tl.constexpr, line):
    """Offsets of [steps, places]; memory runs along steps in one layout, along places else."""
    if LAST:
        return step[:, None] + place[None, :] * line
    else:
        return step[:, None] * line + place[None, :]


@triton.jit
def _cam_weights(
    activations,
    gradients,
    weights,
    inner: tl.int64,
    outer: tl.int64,
    activation_image: tl.int64,
    activation_line: tl.int64,
    gradient_image: tl.int64,
    gradient_line: tl.int64,
    blocks: tl.int64,
    METHOD: tl.constexpr,
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    """``inner``: how long a line is, in units of ALIGN like the strides; ``outer``: how many."""
    channels, plane = outer, inner * ALIGN
    if LAST:
        channels, plane = inner * ALIGN, outer
    image = tl.program_id(0).to(tl.int64) // blocks
    channel = tl.program_id(0).to(tl.int64) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    activations += image * activation_image * ALIGN
    gradients += image * gradient_image * ALIGN
    total = tl.zeros([CHANNELS], F)
    of_activations = tl.zeros([CHANNELS, BLOCK], F)
    if METHOD == PLUS_PLUS:
        for start in range(0, plane, BLOCK):
            place = start + tl.arange(0, BLOCK)
            wanted = exists[:, None] & (place < plane)[None, :]
            there = _tile(channel, place, LAST, activation_line * ALIGN)
            of_activations += _load(activations, there, wanted, F)
        total = tl.sum(of_activations.to(tl.float64), 1).to(F)
    found = tl.zeros([CHANNELS, BLOCK], F)
    for start in range(0, plane, BLOCK):
        place = start + tl.arange(0, BLOCK)
        wanted = exists[:, None] & (place < plane)[None, :]
        g = _load(gradients, _tile(channel, place, LAST, gradient_line * ALIGN), wanted, F)
        if METHOD == XGRADCAM:
            there = _tile(channel, place, LAST, activation_line * ALIGN)
            a = _load(activations, there, wanted, F)
            of_activations += a
            found += g * a
        elif METHOD == PLUS_PLUS:
            term, _ = _plus_plus(g, total[:, None])
            found += term
        else:
            found += g
    weight = tl.sum(found.to(tl.float64), 1)
    if METHOD == GRADCAM:
        weight = weight / plane.to(tl.float64)
    elif METHOD == XGRADCAM:
        weight = weight / (tl.sum(of_activations.to(tl.float64), 1) + _XGRAD_EPS)
    tl.store(weights + image * channels + channel, weight.to(F), exists)


@triton.jit
def _cam_sums(
    activations,
    gradients,
    weights,
    parts,
    inner: tl.int64,
    outer: tl.int64,
    activation_image: tl.int64,
    activation_line: tl.int64,
    gradient_image: tl.int64,
    gradient_line: tl.int64,
    channels: tl.int64,
    plane: tl.int64,
    segments: tl.int64,
    splits: tl.int64,
    per_split: tl.int64,
    METHOD: tl.constexpr,
    LAST: tl.constexpr,
    FOLD: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    """Steps are channels, or FOLD of them; places are positions, of FOLD channels together."""
    run = tl.program_id(0).to(tl.int64) // segments
    segment = tl.program_id(0).to(tl.int64) % segments
    image = run // splits
    if LAST:
        places, first, last = outer, 0, inner * ALIGN  # not split
    else:
        places, first = inner * ALIGN, run % splits * per_split
        last = tl.minimum(first + per_split, outer)
    place = segment * BLOCK + tl.arange(0, BLOCK)
    exists = place < places
    activations += image * activation_image * ALIGN
    gradients += image * gradient_image * ALIGN
    found = tl.zeros([CHANNELS, BLOCK], F)
    for start in range(first, last, CHANNELS):
        step = start + tl.arange(0, CHANNELS)
        wanted = (step < last)[:, None] & exists[None, :]
        a = _load(activations, _tile(step, place, LAST, activation_line * ALIGN), wanted, F)
        if METHOD == WEIGHTS:
            if FOLD > 1:
                channel = step[:, None] * FOLD + (place // plane)[None, :]
                w = _load(weights, image * channels + channel, wanted, F)
            else:
                w = _load(weights, image * channels + step, step < last, F)[:, None]
            found = tl.fma(a, tl.broadcast_to(w, a.shape), found)
        else:
            g = _load(gradients, _tile(step, place, LAST, gradient_line * ALIGN), wanted, F)
            if METHOD == HIRESCAM:
                found += g * a
            elif METHOD == LAYERCAM:
                found += _positive(g) * a
            else:
                found += _positive(g * a)
    total = tl.sum(found.to(tl.float64), 0)
    tl.store(parts + run * places + place, total.to(F), exists)


@triton.jit
def _scaled(x, low, high):
    if x.dtype == tl.float32:
        # The common division may be off by two units, and 1 by one too many.
        return tl.div_rn(x - low, _MIN_MAX_EPS + (high - low))
    else:
        return (x - low) / (_MIN_MAX_EPS + (high - low))


@triton.jit
def _wider(low, high, bad, x, inside):
    known = inside & (x == x)
    low = tl.minimum(low, tl.where(known, x, INF))
    high = tl.maximum(high, tl.where(known, x, -INF))
    return low, high, bad | (inside & (x != x)).to(tl.int32)


@triton.jit
def _extrema(low, high, bad):
    """One NaN makes the scale of the whole picture unknown."""
    return tl.where(tl.max(bad, 0) != 0, float("nan"), tl.min(low, 0)), tl.max(high, 0)


@triton.jit
def _between(i, before, after, F: tl.constexpr):
    """Where a row or column lies between two others: half-pixel centres, in whole numbers."""
    at = tl.maximum((2 * i + 1) * before - after, 0)
    lower = at // (2 * after)
    share = (at - lower * (2 * after)).to(F) / (2 * after).to(F)
    return lower, tl.minimum(lower + 1, before - 1), share


@triton.jit
def _value(
    values,
    at,
    inside,
    height,
    width,
    out_height,
    out_width,
    low,
    high,
    NORMALIZE: tl.constexpr,
    SAME: tl.constexpr,
    F: tl.constexpr,
):
    """The output at some places, but for the last min-max."""
    if SAME:
        found = tl.load(values + at, inside, other=0)
        if NORMALIZE >= 1:
            found = _scaled(found, low, high)
        return found
    else:
        top, bottom, down = _between(at // out_width, height, out_height, F)
        left, right, across = _between(at % out_width, width, out_width, F)
        a = tl.load(values + top * width + left, inside, other=0)
        b = tl.load(values + bottom * width + left, inside, other=0)
        c = tl.load(values + top * width + right, inside, other=0)
        d = tl.load(values + bottom * width + right, inside, other=0)
        if NORMALIZE >= 1:
            a, b = _scaled(a, low, high), _scaled(b, low, high)
            c, d = _scaled(c, low, high), _scaled(d, low, high)
        # a + f (b - a), which is a where both are: min-max would blow another's rounding up.
        on_left, on_right = tl.fma(down, b - a, a), tl.fma(down, d - c, c)
        return tl.fma(across, on_right - on_left, on_left)


@triton.jit
def _cam_finish(
    parts,
    values,
    out,
    count: tl.int64,
    plane: tl.int64,
    height: tl.int32,
    width: tl.int32,
    out_height: tl.int32,
    out_width: tl.int32,
    RELU: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SAME: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    F: tl.constexpr,
):
    """``parts`` [images, count, plane]; PARTS x BLOCK of them at a time, WIDE of the output."""
    image = tl.program_id(0).to(tl.int64)
    size = out_height * out_width
    parts += image * count * plane
    values += image * plane
    out += image * size
    low = tl.full([BLOCK], INF, F)
    high, bad = -low, tl.zeros([BLOCK], tl.int32)
    for start in range(0, plane, BLOCK):
        place = start + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float64)
        for first in range(0, count, PARTS):
            part = first + tl.arange(0, PARTS)
            wanted = (part < count)[:, None] & (place < plane)[None, :]
            found = _load(parts, part[:, None] * plane + place[None, :], wanted, tl.float64)
            total += tl.sum(found, 0)
        value = total.to(F)
        if RELU:
            value = _positive(value)
        tl.store(values + place, value, place < plane)
        low, high, bad = _wider(low, high, bad, value, place < plane)
    least, most = _extrema(low, high, bad)
    tl.debug_barrier()  # other threads of the program read what these have stored
    if NORMALIZE < 2:
        for start in range(0, size, WIDE):
            at = start + tl.arange(0, WIDE)
            inside = at < size
            value = _value(
                values,
                at,
                inside,
                height,
                width,
                out_height,
                out_width,
                least,
                most,
                NORMALIZE,
                SAME,
                F,
            )
            tl.store(out + at, value, inside)
    else:
        lower = tl.full([WIDE], INF, F)
        upper, worse = -lower, tl.zeros([WIDE], tl.int32)
        for start in range(0, size, WIDE):
            at = start + tl.arange(0, WIDE)
            inside = at < size
            value = _value(
                values,
                at,
                inside,
                height,
                width,
                out_height,
                out_width,
                least,
                most,
                NORMALIZE,
                SAME,
                F,
            )
            tl.store(out + at, value, inside)
            lower, upper, worse = _wider(lower, upper, worse, value, inside)
        least, most = _extrema(lower, upper, worse)
        tl.debug_barrier()  # as above
        for start in range(0, size, WIDE):
            at = start + tl.arange(0, WIDE)
            value = tl.load(out + at, at < size, other=0)
            tl.store(out + at, _scaled(value, least, most), at < size)


@triton.jit
def _cam_backward(
    activations,
    gradients,
    upstream,
    on_activations,
    on_gradients,
    rows: tl.int64,
    channels: tl.int64,
    units: tl.int64,
    METHOD: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    """Rows are the planes of channels; sums over them first, where a method has any."""
    plane = units * ALIGN
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    here = row[:, None] * plane
    above = (row // channels)[:, None] * plane
    BY_ELEMENT: tl.constexpr = (METHOD == HIRESCAM) | (METHOD == LAYERCAM) | (METHOD == ELEMENTWISE)
    weight = tl.zeros([ROWS], F)
    share, more = weight, weight
    if not BY_ELEMENT:
        dot = tl.zeros([ROWS, BLOCK], F)
        total, others = dot, dot
        for start in range(0, plane, BLOCK):
            place = start + tl.arange(0, BLOCK)
            wanted = exists[:, None] & (place < plane)[None, :]
            a = _load(activations, here + place[None, :], wanted, F)
            dot = tl.fma(a, _load(upstream, above + place[None, :], wanted, F), dot)
            total += a
            if METHOD == GRADCAM:
                others += _load(gradients, here + place[None, :], wanted, F)
            elif METHOD == XGRADCAM:
                others += a * _load(gradients, here + place[None, :], wanted, F)
        on_weight, whole, other = tl.sum(dot, 1), tl.sum(total, 1), tl.sum(others, 1)
        if METHOD == WEIGHTS:
            weight = _load(gradients, row, exists, F)
            tl.store(on_gradients + row, on_weight.to(on_gradients.dtype.element_ty), exists)
        elif METHOD == GRADCAM:
            weight, share = other / plane.to(F), on_weight / plane.to(F)
        elif METHOD == XGRADCAM:
            weight, share = other / (whole + _XGRAD_EPS), on_weight / (whole + _XGRAD_EPS)
        else:
            terms = tl.zeros([ROWS, BLOCK], F)
            squares = terms
            for start in range(0, plane, BLOCK):
                place = start + tl.arange(0, BLOCK)
                wanted = exists[:, None] & (place < plane)[None, :]
                g = _load(gradients, here + place[None, :], wanted, F)
                term, below = _plus_plus(g, whole[:, None])
                terms += term
                squares += term * term
                # (g^3 / q)' with q = 2 g^2 + S g^3 + eps
                slope = 3 * g * g * below - g * g * g * (4 * g + 3 * whole[:, None] * g * g)
                slope = tl.where(g <= 0, 0, on_weight[:, None] * (slope / (below * below)))
                there = on_gradients + here + place[None, :]
                tl.store(there, slope.to(on_gradients.dtype.element_ty), wanted)
            weight, more = tl.sum(terms, 1), -on_weight * tl.sum(squares, 1)
    for start in range(0, plane, BLOCK):
        place = start + tl.arange(0, BLOCK)
        wanted = exists[:, None] & (place < plane)[None, :]
        u = _load(upstream, above + place[None, :], wanted, F)
        if BY_ELEMENT or METHOD == XGRADCAM:
            a = _load(activations, here + place[None, :], wanted, F)
            g = _load(gradients, here + place[None, :], wanted, F)
        if BY_ELEMENT:
            on_a, on_g = g * u, a * u
            if METHOD == LAYERCAM:
                on_a, on_g = tl.where(g <= 0, 0, on_a), tl.where(g <= 0, 0, on_g)
            elif METHOD == ELEMENTWISE:
                none = g * a <= 0
                on_a, on_g = tl.where(none, 0, on_a), tl.where(none, 0, on_g)
        elif METHOD == XGRADCAM:
            on_a = weight[:, None] * u + share[:, None] * (g - weight[:, None])
            on_g = share[:, None] * a
        else:
            on_a = weight[:, None] * u + more[:, None]
            on_g = tl.broadcast_to(share[:, None], u.shape)
        tl.store(
            on_activations + here + place[None, :],
            on_a.to(on_activations.dtype.element_ty),
            wanted,
        )
        if METHOD != WEIGHTS and METHOD != PLUS_PLUS:
            tl.store(
                on_gradients + here + place[None, :],
                on_g.to(on_gradients.dtype.element_ty),
                wanted,
            )


def _options(size: int, device: Device) -> dict[str, Any]:
    # Sums of products are rounded once, whatever the default of the version.
    options: dict[str, Any] = {"num_warps": WARPS // device.lanes, "enable_fp_fusion": True}
    if device.nvidia:
        options["maxnreg"] = REGISTERS[size]
    return options


def fold_of(itemsize: int, channels: int, plane: int, lines: list[int]) -> int:
    """Of how many channels together the planes divide into 16 bytes; 1 where that cannot be."""
    vector = 16 // itemsize
    fold = vector // gcd(plane, vector)
    dense = all(line == plane for line in lines)
    return fold if dense and channels % fold == 0 else 1


def plan(
    activations: Tensor,
    gradients: Tensor,
    out: Tensor,
    strides: list[int],
    method: str,
    relu: bool,
    normalize: int,
    device: Device,
) -> list[Launch]:
    """The launches for these arguments; ``strides`` over (image, channel, position) of both."""
    n, channels, height, width = activations.shape
    plane, out_size = height * width, out.shape[1] * out.shape[2]
    if max(plane, out_size, 2 * height * out.shape[1], 2 * width * out.shape[2]) >= 1 << 31:
        raise ValueError(
            "size: expected less than 2^31 positions, and sides whose product with the layer's is"
            f" less than 2^30, got {list(out.shape[1:])} for a layer of {[height, width]}"
        )
    size, itemsize = out.element_size(), activations.element_size()
    exact = tl.float64 if size == 8 else tl.float32
    last = strides[1] == 1 and (plane == 1 or strides[2] != 1)
    own = method in OWN_WEIGHTS
    images, lines = [strides[0]], [strides[2 if last else 1]]
    # Weights that are given, or found, are all that the sum wants to know of the gradients.
    if method != "weights":
        images.append(strides[3])
        lines.append(strides[5 if last else 4])
    both = method not in ("weights", *OWN_WEIGHTS)
    options = _options(size, device)
    launches = []

    weights = gradients
    if own:
        weights = torch.empty((n, channels), dtype=out.dtype, device=out.device)
        inner, outer = (channels, plane) if last else (plane, channels)
        align = alignment(itemsize, inner, *images, *lines)
        if last:
            of_tile = min(triton.next_power_of_2(channels), ALONG[size][0])
            block = min(triton.next_power_of_2(plane), TILE[size] // of_tile)
        else:
            block = min(triton.next_power_of_2(plane), TILE[size] // 2)
            of_tile = min(triton.next_power_of_2(channels), TILE[size] // 2 // block)
        blocks = triton.cdiv(channels, of_tile)
        launches.append(
            Launch(
                _cam_weights,
                n * blocks,
                {
                    "activations": activations,
                    "gradients": gradients,
                    "weights": weights,
                    "inner": inner // align,
                    "outer": outer,
                    "activation_image": images[0] // align,
                    "activation_line": lines[0] // align,
                    "gradient_image": images[1] // align,
                    "gradient_line": lines[1] // align,
                    "blocks": blocks,
                    "METHOD": METHODS[method].value,
                    "LAST": last,
                    "ALIGN": align,
                    "CHANNELS": of_tile,
                    "BLOCK": block,
                    "F": exact,
                },
                options,
            )
        )

    if not both:
        images, lines = images[:1], lines[:1]
    fold = 1 if last else fold_of(itemsize, channels, plane, lines)
    steps, places = channels // fold, fold * plane
    inner, outer = (steps, places) if last else (places, steps)
    lines = [fold * line for line in lines]
    align = alignment(itemsize, inner, *images, *lines)
    if last:
        of_tile = min(triton.next_power_of_2(steps), ALONG[size][1])
        block = min(triton.next_power_of_2(places), TILE[size] // of_tile)
    else:
        block = min(triton.next_power_of_2(places), TILE[size] // 8)
        of_tile = min(triton.next_power_of_2(steps), TILE[size] // block, LEAST_RUN)
    segments = triton.cdiv(places, block)
    run = steps
    if not last:
        # Enough programs to fill the device, runs short enough for single precision, and, as far
        # as that allows, no more parts than one program adds up in the time of the others.
        programs = device.processors * (1024 // WARPS)
        run = max(triton.cdiv(steps * n * segments, programs), LEAST_RUN)
        run = min(max(run, triton.cdiv(steps * places, 1 << 17)), LONGEST_RUN, steps)
    splits = triton.cdiv(steps, run)
    parts = torch.empty((n, splits * fold, plane), dtype=out.dtype, device=out.device)
    launches.append(
        Launch(
            _cam_sums,
            n * splits * segments,
            {
                "activations": activations,
                "gradients": gradients if both else activations,
                "weights": weights,
                "parts": parts,
                "inner": inner // align,
                "outer": outer,
                "activation_image": images[0] // align,
                "activation_line": lines[0] // align,
                "gradient_image": images[-1] // align,
                "gradient_line": lines[-1] // align,
                "channels": channels,
                "plane": plane,
                "segments": segments,
                "splits": splits,
                "per_split": run,
                "METHOD": METHODS[method if both else "weights"].value,
                "LAST": last,
                "FOLD": fold,
                "ALIGN": align,
                "CHANNELS": of_tile,
                "BLOCK": block,
                "F": exact,
            },
            options,
        )
    )

    count = splits * fold
    block = min(triton.next_power_of_2(plane), FINISH)
    launches.append(
        Launch(
            _cam_finish,
            n,
            {
                "parts": parts,
                "values": torch.empty((n, plane), dtype=out.dtype, device=out.device),
                "out": out,
                "count": count,
                "plane": plane,
                "height": height,
                "width": width,
                "out_height": out.shape[1],
                "out_width": out.shape[2],
                "RELU": relu,
                "NORMALIZE": normalize,
                "SAME": (height, width) == tuple(out.shape[1:]),
                "PARTS": min(triton.next_power_of_2(count), PARTS // block),
                "BLOCK": block,
                "WIDE": min(triton.next_power_of_2(out_size), FINISH),
                "F": exact,
            },
            _options(size, device) | {"num_warps": 2 * WARPS // device.lanes},
        )
    )
    return launches


def cam(
    activations: Tensor,
    gradients: Tensor,
    out: Tensor,
    strides: list[int],
    method: str,
    relu: bool,
    normalize: int,
) -> None:
    """As ``reference.cam.cam``, into ``out`` [n, height, width]."""
    if out.shape[0] == 0:
        return
    device = device_of(activations)
    for launch in plan(activations, gradients, out, strides, method, relu, normalize, device):
        launch.run(activations)


def plan_backward(
    upstream: Tensor,
    activations: Tensor,
    gradients: Tensor,
    on_activations: Tensor,
    on_gradients: Tensor,
    method: str,
    device: Device,
) -> Launch:
    n, channels, height, width = activations.shape
    plane, size = height * width, upstream.element_size()
    align = alignment(activations.element_size(), plane)
    block = min(triton.next_power_of_2(plane), TILE[size] // 2)
    of_tile = min(triton.next_power_of_2(n * channels), TILE[size] // 2 // block)
    return Launch(
        _cam_backward,
        triton.cdiv(n * channels, of_tile),
        {
            "activations": activations,
            "gradients": gradients,
            "upstream": upstream,
            "on_activations": on_activations,
            "on_gradients": on_gradients,
            "rows": n * channels,
            "channels": channels,
            "units": plane // align,
            "METHOD": METHODS[method].value,
            "ALIGN": align,
            "ROWS": of_tile,
            "BLOCK": block,
            "F": tl.float64 if size == 8 else tl.float32,
        },
        _options(size, device),
    )


def cam_backward(
    upstream: Tensor,
    activations: Tensor,
    gradients: Tensor,
    on_activations: Tensor,
    on_gradients: Tensor,
    method: str,
) -> None:
    """As ``reference.cam.cam_backward``, of contiguous tensors, into the last two."""
    if activations.shape[0]:
        device = device_of(activations)
        launch = plan_backward(
            upstream, activations, gradients, on_activations, on_gradients, method, device
        )
        launch.run(activations)
