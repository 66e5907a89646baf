"""The kernels of one tile of K distance matrices; ``ops.pairs`` walks over the tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxkd.ops import _distance_gpu as gpu
from fastxkd.ops._library import DTYPES, kernels, serve


def run_grams(left: list[Tensor], right: list[Tensor], grams: list[Tensor]) -> None:
    """Products of K times ``[rows, width]`` and ``[cols, width]``, where run_tile wants them."""
    narrow = 0 if serve("distance", grams[0]) == "cpu" else gpu.NARROW
    with gpu.full_precision(grams[0]):
        for x, y, gram in zip(left, right, grams, strict=True):
            if x.shape[1] > narrow:
                torch.mm(x, y.T, out=gram)


def run_tile(
    grams: list[Tensor],
    features: list[Tensor],
    norms: tuple[Tensor, Tensor],
    shifts: Tensor,
    products: Tensor | None,
    row_sums: Tensor | None,
    offsets: tuple[int, int],
    *,
    diagonal: bool,
) -> None:
    """Gram products of centred features to distances, in place, and their sums if wanted.

    Args:
        grams: K times ``[rows, cols]``, float32 or float64; on a GPU in one piece, one after the
            other.
        features: K times ``[n, width]`` as they were given: near neighbours are taken from them.
        norms: squared norms of the centred rows ``[K, rows]`` and columns ``[K, cols]``.
        shifts: ``[K]``, float64: what is taken off every distance off the diagonal, where
            ``products`` are wanted.
        products, row_sums: ``[K, K]`` and ``[K, n]``, float64, added to; of both triangles.
        offsets: where the tile's rows and columns are in ``features`` and ``row_sums``.
        diagonal: the rows are the columns.
    """
    backend = serve("distance", grams[0])
    if backend != "cpu":
        gpu.run_tile(backend, grams, features, norms, shifts, products, row_sums, offsets, diagonal)
        return
    module, level, threads = kernels()
    module.distance_tile(
        level,
        threads,
        [g.data_ptr() for g in grams],
        [f.data_ptr() for f in features],
        [f.stride(0) for f in features],
        [DTYPES[f.dtype] for f in features],
        [f.shape[1] for f in features],
        norms[0].data_ptr(),
        norms[1].data_ptr(),
        shifts.tolist(),
        0 if products is None else products.data_ptr(),
        0 if row_sums is None else row_sums.data_ptr(),
        *grams[0].shape,
        *offsets,
        0 if row_sums is None else row_sums.stride(0),
        diagonal,
        int(grams[0].dtype == torch.float64),
    )


def run_grad_tile(
    distances: list[Tensor],
    weights: list[Tensor | None],
    grad_products: Tensor,
    grad_row_sums: Tensor,
    offsets: tuple[int, int],
) -> None:
    """Into ``weights`` where they are wanted: what ``x_i - x_j`` has in the gradient of ``x_i``."""
    backend = serve("distance", distances[0])
    if backend != "cpu":
        gpu.run_grad_tile(backend, distances, weights, grad_products, grad_row_sums, offsets)
        return
    module, level, threads = kernels()
    module.distance_grad_tile(
        level,
        threads,
        [d.data_ptr() for d in distances],
        [0 if w is None else w.data_ptr() for w in weights],
        grad_products.data_ptr(),
        grad_row_sums.data_ptr(),
        *distances[0].shape,
        *offsets,
        grad_row_sums.stride(0),
        int(distances[0].dtype == torch.float64),
    )
