"""distance in Triton: a tile of the sweep over pairs, after the vendor's products.

1. By matrix: Gram products become distances, in place, and their sums along rows and columns of a
   block are taken. Features of few numbers have their differences taken instead, and so have near
   neighbours, of whose distance a Gram product has lost the digits.
2. The products of every four matrices with every four, of a share of the tile.

The sums over programs are torch's, in double precision and always in the same order; there are no
atomics. As in the C++ kernels a typical distance is taken off before anything is summed.
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

# Rows and columns of a program's distances; of one whose differences are taken, of which every one
# needs both a number in single and one in double precision.
ROWS, COLS = 8, {4: 128, 8: 64}
PAIRS = 32
RUN = 64  # numbers of a row whose squares are summed before they go to double
# Matrices on either side of a program's products, their distances at a time, and how many times.
GROUP, BLOCK, TURNS = 4, {4: 256, 8: 128}, 16
REGISTERS = 128
_RUN, _TURNS = tl.constexpr(RUN), tl.constexpr(TURNS)


@triton.jit
def _squares(
    feature,
    i,
    j,
    i_exists,
    j_exists,
    stride,
    width,
    F: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """|x - y|^2 of rows i and j, from the features as they were given."""
    total = tl.zeros([R, C], tl.float64)
    for start in range(0, width, _RUN):
        part = tl.zeros([R, C], F)
        for w in range(start, tl.minimum(start + _RUN, width)):
            x = tl.load(feature + i * stride + w, i_exists, other=0).to(F)
            y = tl.load(feature + j * stride + w, j_exists, other=0).to(F)
            d = x[:, None] - y[None, :]
            part = tl.fma(d, d, part)
        total += part.to(tl.float64)
    return total


@triton.jit
def _root(square):
    # Of float32 tl.sqrt is an approximation.
    if square.dtype == tl.float32:
        return tl.sqrt_rn(square)
    else:
        return tl.sqrt(square)


@triton.jit
def _distances(
    tile,
    feature,
    row_norms,
    col_norms,
    shift,
    by_row,
    by_col,
    rows: tl.int64,
    units: tl.int64,
    row_offset: tl.int64,
    col_offset: tl.int64,
    stride: tl.int64,
    width: tl.int64,
    NARROW: tl.constexpr,
    DIAGONAL: tl.constexpr,
    SUMS: tl.constexpr,
    SHARE: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    """Columns come in units of ALIGN."""
    cols = units * ALIGN
    blocks = tl.cdiv(cols, BLOCK)
    row_block, col_block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    i = row_block * ROWS + tl.arange(0, ROWS).to(tl.int64)
    j = col_block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    i_exists, j_exists = i < rows, j < cols
    inside = i_exists[:, None] & j_exists[None, :]
    apart = inside
    if DIAGONAL:
        apart = inside & (i[:, None] != j[None, :])
    at = i[:, None] * cols + j[None, :]
    if NARROW:
        square = _squares(
            feature,
            i + row_offset,
            j + col_offset,
            i_exists,
            j_exists,
            stride,
            width,
            F,
            ROWS,
            BLOCK,
        ).to(F)
    else:
        scale = tl.load(row_norms + i, i_exists, other=0)[:, None]
        scale = scale + tl.load(col_norms + j, j_exists, other=0)[None, :]
        square = scale - 2 * tl.load(tile + at, inside, other=0)
        # Not the other way round: what is no number is taken from the features, and stays none.
        near = apart & ((square >= SHARE * scale) == 0)
        if tl.sum(tl.sum(near.to(tl.int32), 1), 0) != 0:
            exact = _squares(
                feature,
                i + row_offset,
                j + col_offset,
                i_exists,
                j_exists,
                stride,
                width,
                F,
                ROWS,
                BLOCK,
            ).to(F)
            square = tl.where(near, exact, square)
    d = _root(tl.where(apart, square, 0))
    if SUMS:
        d = tl.where(apart, d - tl.load(shift).to(F), 0)
        tl.store(by_row + col_block * rows + i, tl.sum(d, 1).to(tl.float64), i_exists)
        tl.store(by_col + row_block * cols + j, tl.sum(d, 0).to(tl.float64), j_exists)
    tl.store(tile + at, d, inside)


@triton.jit
def _products(
    tiles,
    partials,
    matrices: tl.int64,
    units: tl.int64,
    shares: tl.int64,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    """Sizes of a tile and of a program's share of it come in units of ALIGN and of TURNS blocks."""
    size = units * ALIGN
    groups = tl.cdiv(matrices, GROUP)
    share = tl.program_id(0).to(tl.int64) // (groups * groups)
    first = tl.program_id(0) // groups % groups
    second = tl.program_id(0) % groups
    if first <= second:
        k = first * GROUP + tl.arange(0, GROUP).to(tl.int64)
        m = second * GROUP + tl.arange(0, GROUP).to(tl.int64)
        total = tl.zeros([GROUP, GROUP], tl.float64)
        begin = share * shares * (_TURNS * BLOCK)
        end = tl.minimum(begin + shares * (_TURNS * BLOCK), size)
        for start in range(begin, end, _TURNS * BLOCK):
            part = tl.zeros([GROUP, GROUP, BLOCK], F)
            for turn in range(0, _TURNS * BLOCK, BLOCK):
                at = start + turn + tl.arange(0, BLOCK)
                inside = (at < end)[None, :]
                x = tl.load(
                    tiles + k[:, None] * size + at[None, :],
                    inside & (k < matrices)[:, None],
                    other=0,
                )
                y = tl.load(
                    tiles + m[:, None] * size + at[None, :],
                    inside & (m < matrices)[:, None],
                    other=0,
                )
                part += x[:, None, :] * y[None, :, :]
            total += tl.sum(part.to(tl.float64), 2)
        side = groups * GROUP
        there = partials + share * side * side
        tl.store(there + k[:, None] * side + m[None, :], total)
        if first < second:
            tl.store(there + m[None, :] * side + k[:, None], total)


@triton.jit
def _weights(
    distances,
    weights,
    factors,
    on_rows,
    on_cols,
    matrices: tl.int64,
    k: tl.int64,
    rows: tl.int64,
    units: tl.int64,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    cols = units * ALIGN
    blocks = tl.cdiv(cols, BLOCK)
    i = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS).to(tl.int64)
    j = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    i_exists, j_exists = i < rows, j < cols
    inside = i_exists[:, None] & j_exists[None, :]
    at = i[:, None] * cols + j[None, :]
    on_row = tl.load(on_rows + i, i_exists, other=0)
    on_col = tl.load(on_cols + j, j_exists, other=0)
    v = (on_row[:, None] + on_col[None, :]).to(F)
    for other in range(matrices):
        # Without a factor what it stands before is not asked: it may be infinite.
        factor = tl.load(factors + other)
        if factor != 0:
            v += factor * tl.load(distances + other * rows * cols + at, inside, other=0)
    own = tl.load(distances + k * rows * cols + at, inside, other=0)
    tl.store(weights + at, tl.where(own == 0, 0, v / tl.where(own == 0, 1, own)), inside)


@triton.jit
def _pairs(features, out, n: tl.int64, width: tl.int64, BLOCK: tl.constexpr, F: tl.constexpr):
    blocks = tl.cdiv(n, BLOCK)
    first, second = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if first <= second:
        i = first * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        j = second * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        i_exists, j_exists = i < n, j < n
        d = tl.sqrt(_squares(features, i, j, i_exists, j_exists, width, width, F, BLOCK, BLOCK))
        inside = i_exists[:, None] & j_exists[None, :]
        tl.store(out + i[:, None] * n + j[None, :], d, inside)
        if first < second:
            tl.store(out + j[None, :] * n + i[:, None], d, inside)


def _type(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def _options(device: Device) -> dict[str, Any]:
    """128 threads, and no more registers than four such blocks leave to each: left alone, ptxas
    spills a few to go below some number of its own."""
    options = {"num_warps": 128 // device.lanes, "enable_fp_fusion": True}
    if device.nvidia:
        options["maxnreg"] = REGISTERS
    return options


def _blocks(rows: int, cols: int, size: int) -> tuple[int, int]:
    return triton.cdiv(rows, ROWS), triton.cdiv(cols, COLS[size])


def plan_distances(
    gram: Tensor,
    feature: Tensor,
    norms: tuple[Tensor, Tensor],
    shift: Tensor,
    sums: tuple[Tensor, Tensor] | None,
    offsets: tuple[int, int],
    diagonal: bool,
    narrow: int,
    device: Device,
) -> Launch:
    """Of one matrix; ``sums`` are its sums along rows, by block of columns, and along columns."""
    rows, cols = gram.shape
    size = gram.element_size()
    row_blocks, col_blocks = _blocks(rows, cols, size)
    align = alignment(size, cols)
    return Launch(
        _distances,
        row_blocks * col_blocks,
        {
            "tile": gram,
            "feature": feature,
            "row_norms": norms[0],
            "col_norms": norms[1],
            "shift": shift,
            "by_row": None if sums is None else sums[0],
            "by_col": None if sums is None else sums[1],
            "rows": rows,
            "units": cols // align,
            "row_offset": offsets[0],
            "col_offset": offsets[1],
            "stride": feature.stride(0),
            "width": feature.shape[1],
            "NARROW": feature.shape[1] <= narrow,
            "DIAGONAL": diagonal,
            "SUMS": sums is not None,
            # Below this share of the norms the digits of the difference are gone.
            "SHARE": 1e-5 if size == 8 else 1e-2,
            "ALIGN": align,
            "ROWS": ROWS,
            "BLOCK": COLS[size],
            "F": _type(gram),
        },
        _options(device),
    )


def plan_products(tiles: Tensor, size: int, matrices: int, device: Device) -> tuple[Launch, Tensor]:
    """The products of ``matrices`` tiles of ``size`` distances, and where each program's are to be:
    ``[shares, ., .]``, of which the first ``matrices`` rows and columns count."""
    groups, block = triton.cdiv(matrices, GROUP), BLOCK[tiles.element_size()]
    turns = triton.cdiv(size, TURNS * block)
    each = triton.cdiv(turns, 4 * device.processors)
    shares = triton.cdiv(turns, each)
    side = groups * GROUP
    partials = torch.empty((shares, side, side), dtype=torch.float64, device=tiles.device)
    align = alignment(tiles.element_size(), size)
    launch = Launch(
        _products,
        shares * groups * groups,
        {
            "tiles": tiles,
            "partials": partials,
            "matrices": matrices,
            "units": size // align,
            "shares": each,
            "ALIGN": align,
            "GROUP": GROUP,
            "BLOCK": block,
            "F": _type(tiles),
        },
        _options(device),
    )
    return launch, partials


def run_tile(
    grams: list[Tensor],
    features: list[Tensor],
    norms: tuple[Tensor, Tensor],
    shifts: Tensor,
    products: Tensor | None,
    row_sums: Tensor | None,
    offsets: tuple[int, int],
    diagonal: bool,
    narrow: int,
) -> None:
    """As ``ops._distance_gpu.run_tile``."""
    rows, cols = grams[0].shape
    count, device = len(grams), device_of(grams[0])
    sums = None
    if products is not None and row_sums is not None:
        row_blocks, col_blocks = _blocks(rows, cols, grams[0].element_size())
        double: dict[str, Any] = {"dtype": torch.float64, "device": grams[0].device}
        by_row = torch.empty((count, col_blocks, rows), **double)
        by_col = torch.empty((count, row_blocks, cols), **double)
        sums = by_row, by_col
    for k, (gram, feature) in enumerate(zip(grams, features, strict=True)):
        plan_distances(
            gram,
            feature,
            (norms[0][k], norms[1][k]),
            shifts[k],
            None if sums is None else (sums[0][k], sums[1][k]),
            offsets,
            diagonal,
            narrow,
            device,
        ).run(gram)
    if sums is None or products is None or row_sums is None:
        return
    launch, partials = plan_products(grams[0], rows * cols, count, device)
    launch.run(grams[0])
    # The mirrored tile is never visited.
    products.add_(partials.sum(0)[:count, :count], alpha=1 if diagonal else 2)
    row_sums[:, offsets[0] : offsets[0] + rows] += sums[0].sum(1)
    if not diagonal:
        row_sums[:, offsets[1] : offsets[1] + cols] += sums[1].sum(1)


def plan_weights(
    distances: Tensor,
    weight: Tensor,
    factors: Tensor,
    on_rows: Tensor,
    on_cols: Tensor,
    k: int,
    device: Device,
) -> Launch:
    rows, cols = weight.shape
    row_blocks, col_blocks = _blocks(rows, cols, weight.element_size())
    align = alignment(weight.element_size(), cols)
    return Launch(
        _weights,
        row_blocks * col_blocks,
        {
            "distances": distances,
            "weights": weight,
            "factors": factors,
            "on_rows": on_rows,
            "on_cols": on_cols,
            "matrices": len(factors),
            "k": k,
            "rows": rows,
            "units": cols // align,
            "ALIGN": align,
            "ROWS": ROWS,
            "BLOCK": COLS[weight.element_size()],
            "F": _type(weight),
        },
        _options(device),
    )


def run_grad_tile(
    distances: list[Tensor],
    weight: Tensor,
    factors: Tensor,
    on_rows: Tensor,
    on_cols: Tensor,
    k: int,
) -> None:
    """The weights of matrix k, whose row of ``2 (P + P^T)`` is ``factors``."""
    plan_weights(distances[0], weight, factors, on_rows, on_cols, k, device_of(weight)).run(weight)


def plan_pairs(features: Tensor, out: Tensor, device: Device) -> Launch:
    n, width = features.shape
    return Launch(
        _pairs,
        triton.cdiv(n, PAIRS) ** 2,
        {
            "features": features,
            "out": out,
            "n": n,
            "width": width,
            "BLOCK": PAIRS,
            "F": _type(features),
        },
        _options(device),
    )


def pair_distances(features: Tensor, out: Tensor) -> None:
    """``out`` [n, n], of contiguous rows."""
    plan_pairs(features, out, device_of(out)).run(out)
