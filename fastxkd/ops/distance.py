"""distance: every inner product of K distance matrices, and their row sums, in one sweep.

``products[k, l] = sum_ij D^k_ij D^l_ij`` and ``row_sums[k, i] = sum_j D^k_ij`` with
``D^k_ij = |x^k_i - x^k_j|``: all that distance covariances need, see ``metrics.similarity``. The
sweep goes over symmetric tiles; nothing of size n x n is ever stored. The Gram products are the
vendor's GEMM, everything else is one kernel per tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastxkd.ops._library import DTYPES, define, kernels, serve
from fastxkd.reference import distance as reference

TILE = 512
# Two strips of centred rows of every matrix are alive at a time. Wide features make the tiles
# smaller, so that a sweep needs tens of megabytes beside its input, not a copy of it.
STRIP_ELEMENTS = 1 << 22


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
    sweep = _Sweep(features)
    k, n = len(features), sweep.n
    products = torch.zeros(k, k, dtype=torch.float64)
    row_sums = torch.zeros(k, n, dtype=torch.float64)
    for tile in sweep.tiles():
        sweep.distances(tile, products, row_sums)
    # What was taken off every distance off the diagonal goes back in, in float64.
    shift = torch.tensor(sweep.shifts, dtype=torch.float64)
    back = torch.outer(shift, row_sums.sum(1))
    products += back + back.T + n * (n - 1) * torch.outer(shift, shift)
    row_sums += (n - 1) * shift[:, None]
    return products, row_sums


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
    sweep = _Sweep(features)
    grad_products, grad_row_sums = grad_products.contiguous(), grad_row_sums.contiguous()
    grads = [
        torch.zeros(f.shape, dtype=sweep.dtype) if w else f.new_empty(0)
        for f, w in zip(sweep.features, wanted, strict=True)
    ]
    module, level, threads = kernels()
    for tile in sweep.tiles():
        distances = sweep.distances(tile, None, None)
        weights = [
            torch.empty_like(d) if w else None for d, w in zip(distances, wanted, strict=True)
        ]
        module.distance_grad_tile(
            level,
            threads,
            [d.data_ptr() for d in distances],
            [0 if w is None else w.data_ptr() for w in weights],
            grad_products.data_ptr(),
            grad_row_sums.data_ptr(),
            tile.rows.stop - tile.rows.start,
            tile.cols.stop - tile.cols.start,
            tile.rows.start,
            tile.cols.start,
            grad_row_sums.stride(0),
            int(sweep.dtype == torch.float64),
        )
        for grad, weight, x in zip(grads, weights, sweep.features, strict=True):
            if weight is not None:
                _pull(grad, weight, x, tile)
    return [
        g.view(f.shape).to(f.dtype) if w else f.new_empty(0)
        for g, f, w in zip(grads, features, wanted, strict=True)
    ]


def _served_by_reference(features: list[Tensor]) -> bool:
    return serve("distance", features[0]) == "reference"


def _rows(feature: Tensor) -> Tensor:
    """``[n, width]``, values of a row side by side; a view wherever that is possible."""
    flat = feature.reshape(feature.shape[0], -1)
    return flat if flat.shape[1] == 1 or flat.stride(1) == 1 else flat.contiguous()


class _Tile(NamedTuple):
    rows: slice
    cols: slice

    @property
    def diagonal(self) -> bool:
        return self.rows.start == self.cols.start


def _pull(grad: Tensor, weight: Tensor, x: Tensor, tile: _Tile) -> None:
    """grad_i += sum_j weight_ij (x_i - x_j), for both triangles of the tile."""
    rows, cols = x[tile.rows].to(grad.dtype), x[tile.cols].to(grad.dtype)
    grad[tile.rows] += weight.sum(1, keepdim=True) * rows
    grad[tile.rows].addmm_(weight, cols, alpha=-1)
    if not tile.diagonal:
        grad[tile.cols] += weight.sum(0)[:, None] * cols
        grad[tile.cols].addmm_(weight.T, rows, alpha=-1)


class _Sweep:
    """The walk over tiles: centred feature strips, their norms, and the Gram buffers."""

    def __init__(self, features: list[Tensor]) -> None:
        self.n = features[0].shape[0]
        self.features = [_rows(f) for f in features]
        self.dtype = (
            torch.float64 if any(f.dtype == torch.float64 for f in features) else torch.float32
        )
        # Distances do not see a shift, the digits of a Gram product do: any rough mean serves.
        self.means = [f.mean(0).to(self.dtype) for f in self.features]
        self.widths = [f.shape[1] for f in self.features]
        self.tile = max(32, min(TILE, STRIP_ELEMENTS // sum(self.widths)))
        self.shifts: list[float] = []
        self.buffers: dict[tuple[int, int], list[Tensor]] = {}

    def tiles(self) -> Iterator[_Tile]:
        for i in range(0, self.n, self.tile):
            rows = slice(i, min(i + self.tile, self.n))
            self.row_strip = self._strip(rows)
            if i == 0:
                # About the typical distance: |x - y|^2 is 2n/(n-1) |x - mean|^2 in the mean.
                # Any number would do.
                typical = self.row_strip[1].mean(1) * (2 * self.n / max(1, self.n - 1))
                self.shifts = typical.sqrt().tolist()
            for j in range(i, self.n, self.tile):
                cols = slice(j, min(j + self.tile, self.n))
                self.col_strip = self.row_strip  # lets the last strip go before the next is made
                if i != j:
                    self.col_strip = self._strip(cols)
                yield _Tile(rows, cols)

    def _strip(self, rows: slice) -> tuple[list[Tensor], Tensor]:
        strip = [
            torch.sub(f[rows].to(self.dtype), m)
            for f, m in zip(self.features, self.means, strict=True)
        ]
        # Not vecdot, which builds the product of the two before it sums.
        norms = torch.stack([torch.linalg.vector_norm(x, dim=1).square_() for x in strip])
        return strip, norms

    def distances(
        self, tile: _Tile, products: Tensor | None, row_sums: Tensor | None
    ) -> list[Tensor]:
        (row, row_norms), (col, col_norms) = self.row_strip, self.col_strip
        shape = (row_norms.shape[1], col_norms.shape[1])
        if shape not in self.buffers:
            self.buffers[shape] = [torch.empty(shape, dtype=self.dtype) for _ in row]
        grams = self.buffers[shape]
        for x, y, gram in zip(row, col, grams, strict=True):
            torch.mm(x, y.T, out=gram)
        module, level, threads = kernels()
        module.distance_tile(
            level,
            threads,
            [g.data_ptr() for g in grams],
            [f.data_ptr() for f in self.features],
            [f.stride(0) for f in self.features],
            [DTYPES[f.dtype] for f in self.features],
            self.widths,
            row_norms.data_ptr(),
            col_norms.data_ptr(),
            self.shifts,
            0 if products is None else products.data_ptr(),
            0 if row_sums is None else row_sums.data_ptr(),
            *shape,
            tile.rows.start,
            tile.cols.start,
            self.n,
            tile.diagonal,
            int(self.dtype == torch.float64),
        )
        return grams


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(*features: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.fastxkd.distance(list(features))  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, on_products: Tensor, on_row_sums: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad)
        grads = torch.ops.fastxkd.distance_backward(
            list(ctx.saved_tensors), on_products, on_row_sums, wanted
        )
        return tuple(g if w else None for g, w in zip(grads, wanted, strict=True))


def distance_sums(features: list[Tensor], names: list[str]) -> tuple[Tensor, Tensor]:
    """``(products [K, K], row_sums [K, n])``, float64, differentiable in every feature.

    Args:
        features: K tensors ``[n, ...]``, flattened per row; float32, float64, bfloat16 or float16.
            Accumulated in float32 within a row block, float64 beyond; all float64 if one is.
        names: what the caller's user calls them, for error messages.
    """
    _check(features, names)
    if torch.is_grad_enabled() and any(f.requires_grad for f in features):
        products, row_sums = _Distance.apply(*features)
    else:
        products, row_sums = torch.ops.fastxkd.distance(features)
    return products, row_sums


def _check(features: list[Tensor], names: list[str]) -> None:
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
        if _served_by_reference([rows]):
            return torch.cdist(
                rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist"
            )
        rows = rows.contiguous()
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
    _check([features], [name])
    if features.shape[0] != rows:
        raise ValueError(f"{name}: expected {rows} rows, one per image, got {features.shape[0]}")
    with torch.no_grad():
        if _served_by_reference([features]):
            return reference.distance_matrix(features)
        sweep = _Sweep([features])
        if sweep.n <= sweep.tile:
            return sweep.distances(next(sweep.tiles()), None, None)[0]
        out = torch.empty(sweep.n, sweep.n, dtype=sweep.dtype)
        for tile in sweep.tiles():
            block = sweep.distances(tile, None, None)[0]
            out[tile.rows, tile.cols] = block
            out[tile.cols, tile.rows] = block.T
        return out
