"""distance: every inner product of K distance matrices, and their row sums, in one sweep.

``products[k, l] = sum_ij D^k_ij D^l_ij`` and ``row_sums[k, i] = sum_j D^k_ij`` with
``D^k_ij = |x^k_i - x^k_j|``: all that distance covariances need, see ``metrics.similarity``. The
sweep goes over symmetric tiles (``ops.pairs``); nothing of size n x n is ever stored. The Gram
products are the vendor's GEMM, everything else is one kernel per tile (``ops._tiles``).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastxkd.ops import _distance_gpu as gpu
from fastxkd.ops._library import DTYPES, chosen, define, kernels, serve, using, wants_function
from fastxkd.ops._tiles import run_grad_tile
from fastxkd.ops._transforms import one_by_one
from fastxkd.ops.pairs import Pairs, Tile
from fastxkd.reference import distance as reference


def _fake(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    k, n = len(features), features[0].shape[0]
    return (
        features[0].new_empty((k, k), dtype=torch.float64),
        features[0].new_empty((k, n), dtype=torch.float64),
    )


@define("distance(Tensor[] features) -> (Tensor products, Tensor row_sums)", _fake)
def _distance(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    if _served_by_reference(features):
        return reference.distance(features)
    return Pairs(features, _names(features)).sums()


def _fake_backward(
    features: list[Tensor], grad_products: Tensor, grad_row_sums: Tensor, wanted: list[bool]
) -> list[Tensor]:
    return [f.new_empty(f.shape if w else (0,)) for f, w in zip(features, wanted, strict=True)]


@define(
    "distance_backward(Tensor[] features, Tensor grad_products, Tensor grad_row_sums,"
    " bool[] wanted) -> Tensor[]",
    _fake_backward,
)
def _distance_backward(
    features: list[Tensor], grad_products: Tensor, grad_row_sums: Tensor, wanted: list[bool]
) -> list[Tensor]:
    if _served_by_reference(features):
        return reference.distance_backward(features, grad_products, grad_row_sums, wanted)
    walk = Pairs(features, _names(features))
    grad_products, grad_row_sums = grad_products.contiguous(), grad_row_sums.contiguous()
    grads = [
        torch.zeros(walk.n, source.width, dtype=walk.dtype, device=walk.device) if w else None
        for source, w in zip(walk.sources, wanted, strict=True)
    ]
    for tile in walk.tiles():
        weights = [
            torch.empty_like(d) if w else None for d, w in zip(tile.distances, wanted, strict=True)
        ]
        offsets = tile.rows.start, tile.cols.start
        run_grad_tile(tile.distances, weights, grad_products, grad_row_sums, offsets)
        for k, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            if grad is not None and weight is not None:
                _pull(grad, weight, tile, k)
    return [
        f.new_empty(0) if g is None else g.view(f.shape).to(f.dtype)
        for g, f in zip(grads, features, strict=True)
    ]


def _names(features: list[Tensor]) -> list[str]:
    return [f"features[{k}]" for k in range(len(features))]


def _served_by_reference(features: list[Tensor]) -> bool:
    return serve("distance", features[0]) == "reference"


def _pull(grad: Tensor, weight: Tensor, tile: Tile, k: int) -> None:
    """grad_i += sum_j weight_ij (x_i - x_j), for both triangles of the tile."""
    left, right = tile.left[k], tile.right[k]
    with gpu.full_precision(weight):
        grad[tile.rows] += weight.sum(1, keepdim=True) * left
        grad[tile.rows].addmm_(weight, right, alpha=-1)
        if not tile.diagonal:
            grad[tile.cols] += weight.sum(0)[:, None] * right
            grad[tile.cols].addmm_(weight.T, left, alpha=-1)


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(*features: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.fastxkd.distance(list(features))  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        # A GPU's backward runs on a thread of its own, which has not seen use_backend.
        ctx.choice = None if torch.compiler.is_compiling() else chosen()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *features: Any) -> Any:
        return one_by_one(_Distance, info, in_dims, *features)

    @staticmethod
    def backward(ctx: Any, on_products: Tensor, on_row_sums: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad)
        with using(ctx.choice) if ctx.choice is not None else nullcontext():
            if torch.compiler.is_compiling():  # refuses second derivatives itself
                grads = torch.ops.fastxkd.distance_backward(
                    list(ctx.saved_tensors), on_products, on_row_sums, wanted
                )
            else:
                grads = _Gradient.apply(wanted, on_products, on_row_sums, *ctx.saved_tensors)
        return tuple(g if w else None for g, w in zip(grads, wanted, strict=True))


class _Gradient(torch.autograd.Function):
    """A node of its own, for a second derivative to run into: ``once_differentiable`` lets one
    pass by where autograd has another way to the features."""

    @staticmethod
    def forward(wanted: list[bool], *arguments: Tensor) -> tuple[Tensor, ...]:
        on_products, on_row_sums, *features = arguments
        grads = torch.ops.fastxkd.distance_backward(features, on_products, on_row_sums, wanted)
        return tuple(grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return one_by_one(_Gradient, info, (None, *in_dims[1:]), *arguments)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("distance: the gradient comes in closed form and is differentiable once")


def distance_sums(features: list[Tensor], names: list[str]) -> tuple[Tensor, Tensor]:
    """``(products [K, K], row_sums [K, n])``, float64, differentiable in every feature, once.

    Args:
        features: K tensors ``[n, ...]``, flattened per row; float32, float64, bfloat16 or float16.
            Accumulated in float32 within a row block, float64 beyond; all float64 if one is.
        names: what the caller's user calls them, for error messages.
    """
    check_features(features, names)
    if any(wants_function(f) for f in features):
        products, row_sums = _Distance.apply(*features)
    else:
        products, row_sums = torch.ops.fastxkd.distance(features)
    return products, row_sums


def check_features(features: list[Tensor], names: list[str]) -> None:
    for name, feature in zip(names, features, strict=True):
        if not isinstance(feature, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(feature).__name__}")
        if not feature.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point dtype, got {feature.dtype}")
        if feature.dim() < 2 or feature.numel() == 0:
            raise ValueError(
                f"{name}: expected features [n, ...] with at least one value a row,"
                f" got shape {list(feature.shape)}"
            )
        if feature.shape[0] != features[0].shape[0]:
            raise ValueError(
                f"{name}: expected {features[0].shape[0]} rows as in {names[0]},"
                f" got {feature.shape[0]}"
            )
        if feature.device != features[0].device:
            raise ValueError(
                f"{name}: expected the device of {names[0]}, {features[0].device},"
                f" got {feature.device}"
            )
    if features[0].shape[0] < 4:
        raise ValueError(
            f"{names[0]}: expected at least 4 rows for a U-centred statistic,"
            f" got {features[0].shape[0]}"
        )


def pair_distances(rows: Tensor) -> Tensor:
    """``[n, n]`` distances, float64, of float32 or float64 rows ``[n, width]``: for a loss that is
    made of what nearly equal distances differ by. Not differentiable."""
    with torch.no_grad():
        backend = serve("distance", rows)
        if backend == "reference":
            return torch.cdist(
                rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist"
            )
        rows = rows.contiguous()
        if backend != "cpu":
            return gpu.pair_distances(backend, rows)
        n, width = rows.shape
        out = torch.empty(n, n, dtype=torch.float64)
        module, level, threads = kernels()
        module.pair_distances(
            level, threads, rows.data_ptr(), out.data_ptr(), n, width, DTYPES[rows.dtype]
        )
        return out


def distance_matrix(features: Tensor, name: str, *, rows: int) -> Tensor:
    """``[n, n]`` distances of ``features`` ``[n, ...]``, for a batch; float32 or float64.

    The tile of the sweep, kept. Not differentiable.
    """
    check_features([features], [name])
    if features.shape[0] != rows:
        raise ValueError(f"{name}: expected {rows} rows, one per image, got {features.shape[0]}")
    with torch.no_grad():
        if _served_by_reference([features]):
            return reference.distance_matrix(features)
        walk = Pairs([features], [name])
        if walk.n <= walk.tile:
            return next(walk.tiles()).distances[0]
        out = torch.empty(walk.n, walk.n, dtype=walk.dtype, device=walk.device)
        for tile in walk.tiles():
            (block,) = tile.distances
            out[tile.rows, tile.cols] = block
            out[tile.cols, tile.rows] = block.T
        return out
