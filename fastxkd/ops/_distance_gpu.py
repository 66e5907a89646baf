"""distance on a GPU: its tiles by CUDA or Triton kernels, between the vendor's products.

A sweep runs ahead of the device: nothing here, and nothing it calls, waits for a result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt
from threading import Lock

import torch
from torch import Tensor

from fastxkd.ops._library import DTYPES, cuda_kernels, kernel_of

# Rows of a tile: enough that its products fill a GPU. Of many matrices fewer, so that their tiles
# take a quarter of a gigabyte at most, and of wide features so that a strip does.
TILE = 2048
TILES_BYTES = 1 << 28
STRIP_ELEMENTS = 1 << 26
PANEL_BYTES = 1 << 29
# Features of so few numbers a row have their differences taken instead of Gram products: no digit
# is lost, and labels, many of whose rows are the same, have no near neighbours to compute anew.
NARROW = 16


def tile_rows(widths: list[int], dtype: torch.dtype) -> int:
    of_tiles = isqrt(TILES_BYTES // (len(widths) * dtype.itemsize))
    found = min(TILE, of_tiles, STRIP_ELEMENTS // sum(widths))
    return max(32, found // 32 * 32)


_precision = Lock()


@contextmanager
def full_precision(tensor: Tensor) -> Iterator[None]:
    """float32 products in float32, whatever the caller has allowed: TensorFloat-32 keeps three of
    the digits that a distance is the difference of."""
    if tensor.device.type != "cuda" or tensor.dtype != torch.float32:
        yield
        return
    how = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(how, "fp32_precision") else "allow_tf32"
    # The setting is the process's. Others may meet the stricter one for a moment; two of these
    # must not take each other's for the caller's.
    with _precision:
        before = getattr(how, name)
        if before in (False, "none", "ieee"):
            yield
            return
        try:
            setattr(how, name, "ieee" if isinstance(before, str) else False)
            yield
        finally:
            if isinstance(before, str):
                # "none" hands the setting of all products down again, if that was it.
                setattr(how, name, "none")
            if getattr(how, name) != before:
                setattr(how, name, before)


def run_tile(
    backend: str,
    grams: list[Tensor],
    features: list[Tensor],
    norms: tuple[Tensor, Tensor],
    shifts: Tensor,
    products: Tensor | None,
    row_sums: Tensor | None,
    offsets: tuple[int, int],
    diagonal: bool,
) -> None:
    """As ``ops._tiles.run_tile``."""
    if backend == "triton":
        kernel_of(backend, "distance", "run_tile")(
            grams, features, norms, shifts, products, row_sums, offsets, diagonal, NARROW
        )
        return
    module, device, stream = cuda_kernels(grams[0])
    rows, cols = grams[0].shape
    scratch = None
    if products is not None:
        size = module.distance_workspace(len(grams), rows, cols, device)
        scratch = torch.empty(size, dtype=torch.float64, device=grams[0].device)
    module.distance_tile(
        device,
        stream,
        0 if scratch is None else scratch.data_ptr(),
        [g.data_ptr() for g in grams],
        [f.data_ptr() for f in features],
        [f.stride(0) for f in features],
        [DTYPES[f.dtype] for f in features],
        [f.shape[1] for f in features],
        norms[0].data_ptr(),
        norms[1].data_ptr(),
        shifts.data_ptr(),
        0 if products is None else products.data_ptr(),
        0 if row_sums is None else row_sums.data_ptr(),
        rows,
        cols,
        *offsets,
        0 if row_sums is None else row_sums.stride(0),
        diagonal,
        DTYPES[grams[0].dtype],
        NARROW,
    )


def run_grad_tile(
    backend: str,
    distances: list[Tensor],
    weights: list[Tensor | None],
    grad_products: Tensor,
    grad_row_sums: Tensor,
    offsets: tuple[int, int],
) -> None:
    """As ``ops._tiles.run_grad_tile``."""
    factors = (2 * (grad_products + grad_products.T)).to(distances[0].dtype)
    for k, weight in enumerate(weights):
        if weight is None:
            continue
        on_rows, on_cols = (grad_row_sums[k, offset:] for offset in offsets)
        if backend == "triton":
            kernel_of(backend, "distance", "run_grad_tile")(
                distances, weight, factors[k], on_rows, on_cols, k
            )
            continue
        module, device, stream = cuda_kernels(weight)
        module.distance_grad_tile(
            device,
            stream,
            distances[0].data_ptr(),
            weight.data_ptr(),
            factors[k].data_ptr(),
            on_rows.data_ptr(),
            on_cols.data_ptr(),
            len(distances),
            k,
            *weight.shape,
            DTYPES[weight.dtype],
        )


def pair_distances(backend: str, rows: Tensor) -> Tensor:
    """As ``ops.distance.pair_distances``, of contiguous rows."""
    n, width = rows.shape
    out = torch.empty(n, n, dtype=torch.float64, device=rows.device)
    if backend == "triton":
        kernel_of(backend, "distance", "pair_distances")(rows, out)
        return out
    module, device, stream = cuda_kernels(rows)
    module.pair_distances(
        device, stream, rows.data_ptr(), out.data_ptr(), n, width, DTYPES[rows.dtype]
    )
    return out
