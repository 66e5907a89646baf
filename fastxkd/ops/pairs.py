"""pairs: the walk over the tiles of K distance matrices, wherever their features are.

A panel of rows is held, centred; columns pass by it, a tile at a time. Features in memory are
looked at where they lie, others are read (``ops.stored``) or, between processes, handed on in a
ring (``ops.ring``): every process holds panels of its own rows while the others' tiles come by.
Memory is panels and tiles, whatever the number of rows; the features are read once per panel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastxkd.ops import _distance_gpu as gpu
from fastxkd.ops._library import serve
from fastxkd.ops._tiles import run_grams, run_tile
from fastxkd.ops.ring import Lost, Ring, Turn, agree
from fastxkd.ops.stored import Features, Rows

TILE = 512
# Wide features make the tiles smaller, so that a tile of centred rows stays in megabytes.
STRIP_ELEMENTS = 1 << 22
PANEL_BYTES = 1 << 26
SAMPLE = 512  # rows that tell a mean well enough


class Tile(NamedTuple):
    """Distances between ``rows`` and ``cols`` of the whole; its mirror image is never visited."""

    rows: slice
    cols: slice
    distances: list[Tensor]  # [K] of [rows, cols], overwritten by the next tile
    left: list[Tensor]  # [K] of [rows, width], less the same row of numbers as
    right: list[Tensor]  # [K] of [cols, width]

    @property
    def diagonal(self) -> bool:
        return self.rows.start == self.cols.start


class Pairs:
    """All pairs of rows of K features.

    Args:
        features: K times the rows this process has, ``[n, ...]``.
        names: what the caller's user calls them, for error messages.
        group: the processes that hold the other rows, in the order of their ranks. All of them
            make this object and go through every walk together.

    Raises:
        TypeError, ValueError, RuntimeError: in every process of the group, if in one.
    """

    def __init__(
        self,
        features: Sequence[Features],
        names: Sequence[str],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.group, self.ring = group, Ring(group)
        self.rank = self.ring.rank
        self.sources: list[Rows] = []
        self.counts = self._counts(features, names)
        self.own, self.n = self.counts[self.rank], sum(self.counts)
        self.starts = [sum(self.counts[:r]) for r in range(self.ring.world)]
        self.device = self.sources[0].device
        widths = [s.width for s in self.sources]
        self.tile, held = max(32, min(TILE, STRIP_ELEMENTS // sum(widths))), PANEL_BYTES
        if self._backend in ("cuda", "triton"):
            self.tile, held = gpu.tile_rows(widths, self.dtype), gpu.PANEL_BYTES
        held //= sum(widths) * self.dtype.itemsize
        most = -(-max(self.counts) // self.tile)
        self.panel = self.tile * max(1, min(held // self.tile, most))
        self._flat = [s.flat for s in self.sources if s.flat is not None]
        self._means = self._centres()
        self._shifts = torch.zeros(len(self.sources), dtype=torch.float64, device=self.device)

    def _counts(self, features: Sequence[Features], names: Sequence[str]) -> list[int]:
        def mine() -> tuple[int, list[tuple[int, torch.dtype]], str]:
            self.sources = [Rows(f, name) for f, name in zip(features, names, strict=True)]
            for source in self.sources:
                if source.n != self.sources[0].n:
                    raise ValueError(
                        f"{source.name}: expected {self.sources[0].n} rows as in {names[0]},"
                        f" got {source.n}"
                    )
                if source.device != self.sources[0].device:
                    raise ValueError(
                        f"{source.name}: expected the device of {names[0]},"
                        f" {self.sources[0].device}, got {source.device}"
                    )
            wide = any(s.dtype == torch.float64 for s in self.sources)
            self.dtype = torch.float64 if wide else torch.float32
            like = torch.empty(0, dtype=self.dtype, device=self.sources[0].device)
            self._backend = serve("distance", like)
            return self.sources[0].n, [(s.width, s.dtype) for s in self.sources], self._backend

        everyone = agree(mine, self.group)
        _, first, backend = everyone[0]
        for rank, (_, kinds, other_backend) in enumerate(everyone):
            if len(kinds) != len(first):
                raise ValueError(
                    f"{names[0]}: expected {len(first)} features as on rank 0,"
                    f" got {len(kinds)} on rank {rank}"
                )
            for name, kind, other in zip(names, kinds, first, strict=True):
                if kind != other:
                    raise ValueError(
                        f"{name}: expected {other[0]} values a row of {other[1]} as on rank 0,"
                        f" got {kind[0]} of {kind[1]} on rank {rank}"
                    )
            if other_backend != backend:  # they would cut other tiles
                raise ValueError(
                    f"{names[0]}: expected the backend of rank 0, {backend},"
                    f" got {other_backend} on rank {rank}"
                )
        counts = [count for count, *_ in everyone]
        if sum(counts) < 4:
            raise ValueError(
                f"{names[0]}: expected at least 4 rows for a U-centred statistic, got {sum(counts)}"
            )
        return counts

    def _centres(self) -> list[Tensor]:
        """Means of some rows: distances do not see a shift, and any that makes numbers small
        serves the digits of a Gram product."""
        if self.group is None and self.own <= self.tile:
            return [s.read(slice(0, self.own)).mean(0, dtype=self.dtype) for s in self.sources]
        totals: list[Tensor] = []
        with self.ring.until_met():
            totals += [self._sampled(source) for source in self.sources]
        self.ring.settle()
        self.reduce(*totals)
        return [total[:-1] / total[-1] for total in totals]

    def _sampled(self, source: Rows) -> Tensor:
        """Sums over some rows, and how many they are."""
        parts = 1 if self.own <= SAMPLE else 8
        step = max(1, -(-self.own // parts))
        length = min(step, SAMPLE // parts)
        total = torch.zeros(source.width + 1, dtype=self.dtype, device=self.device)
        for i in range(0, self.own, step):
            for begin in range(i, min(i + length, self.own), self.tile):
                x = source.read(slice(begin, min(begin + self.tile, i + length, self.own)))
                total[:-1] += x.sum(0, dtype=self.dtype)
                total[-1] += x.shape[0]
        return total

    def reduce(self, *totals: Tensor) -> None:
        """Add up, in place, what every process has taken from its share of the tiles."""
        self.ring.reduce(*totals)

    def sums(self) -> tuple[Tensor, Tensor]:
        """``(products [K, K], row_sums [K, n])``, as ``ops.distance.distance_sums``."""
        k = len(self.sources)
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        products, row_sums = zero.new_zeros(k, k), zero.new_zeros(k, self.n)
        kernel = self._kernel
        for tile in self._walk(products, row_sums):
            if kernel:  # has summed what it found
                continue
            flat = torch.stack(tile.distances).double()
            row_sums[:, tile.rows] += flat.sum(2)
            if not tile.diagonal:
                row_sums[:, tile.cols] += flat.sum(1)
            flat = flat.flatten(1)
            products += (1 if tile.diagonal else 2) * (flat @ flat.T)
        self.reduce(products, row_sums)
        if kernel:
            # What was taken off every distance off the diagonal goes back in, in float64.
            n, shift = self.n, self._shifts
            back = torch.outer(shift, row_sums.sum(1))
            products += back + back.T + n * (n - 1) * torch.outer(shift, shift)
            row_sums += (n - 1) * shift[:, None]
        return products, row_sums

    def tiles(self) -> Iterator[Tile]:
        """This process's share of the tiles."""
        return self._walk(None, None)

    def between(self, rows: Tensor, cols: Tensor) -> list[Tensor]:
        """Distances between the rows of those numbers; for one process, which has them all."""
        size, same = len(rows), rows is cols
        raw = [s.take(rows if same else torch.cat([rows, cols])) for s in self.sources]
        at = 0 if same else size
        left = [self._centred(x[:size], k) for k, x in enumerate(raw)]
        right = left if same else [self._centred(x[size:], k) for k, x in enumerate(raw)]
        if not self._kernel:
            return [_exact(x, y) for x, y in zip(left, right, strict=True)]
        shape = len(raw), size, len(cols)
        found = list(torch.empty(shape, dtype=self.dtype, device=self.device))
        run_grams(left, right, found)
        norms = _norms(left), _norms(right)
        run_tile(found, raw, norms, self._shifts, None, None, (0, at), diagonal=same)
        return found

    @property
    def _kernel(self) -> bool:
        """Gram products and a kernel, or, on the reference, differences taken exactly."""
        return self._backend != "reference"

    def _centred(self, x: Tensor, k: int, out: Tensor | None = None) -> Tensor:
        # Where differences are taken exactly, centring would only round what they differ by.
        off = self._means[k] if self._kernel else 0
        return torch.sub(x.to(self.dtype), off, out=out)

    def _walk(self, products: Tensor | None, row_sums: Tensor | None) -> Iterator[Tile]:
        space: _Space | None = None
        norms: Tensor | None = None
        for begin in range(0, max(self.counts), self.panel):
            held = max(0, min(self.panel, self.own - begin))
            with self.ring.until_met():
                space = space or _Space(self, sums=row_sums is not None)
                norms = self._hold(begin, held, space)
            self.ring.settle()
            assert space is not None
            assert norms is not None
            if begin == 0 and products is not None and self._kernel:
                self._shifts = self._typical(norms)
            yield from self._past(begin, held, space, norms, products, row_sums)
        self.ring.settle()

    def _hold(self, begin: int, held: int, space: _Space) -> Tensor:
        """Read the panel; its squared norms."""
        for i in range(0, held, self.tile):
            j = min(i + self.tile, held)
            for k, source in enumerate(self.sources):
                x = source.read(slice(begin + i, begin + j))
                if space.raw is not None:
                    space.raw[k][i:j] = x
                self._centred(x, k, space.left[k][i:j])
        return _norms([x[:held] for x in space.left])

    def _past(
        self,
        begin: int,
        held: int,
        space: _Space,
        norms: Tensor,
        products: Tensor | None,
        row_sums: Tensor | None,
    ) -> Iterator[Tile]:
        """Every column tile passes by the panel that starts at ``begin`` of the own rows.

        Whatever goes wrong here or in what is done with a tile, the others' tiles are handed on.
        """
        passing = self._passing(begin, held)
        try:
            yield from self._meet(passing, begin, held, space, norms, products, row_sums)
        except Lost:
            raise
        except GeneratorExit:
            if self.group is not None:
                with suppress(RuntimeError):  # what stopped the walk is on its way already
                    self.ring.failed(RuntimeError("stopped before all pairs were seen"))
                    for _ in passing:
                        pass
                    self.ring.settle()
            raise
        except Exception as error:
            self.ring.failed(error)
            for _ in passing:
                pass

    def _meet(
        self,
        passing: Iterator[tuple[int, Turn]],
        begin: int,
        held: int,
        space: _Space,
        norms: Tensor,
        products: Tensor | None,
        row_sums: Tensor | None,
    ) -> Iterator[Tile]:
        mine, kernel = self.starts[self.rank], self._kernel
        left = [x[:held] for x in space.left]
        if space.raw is None:
            raw, into, first = self._flat, row_sums, begin
        else:
            raw, into, first = space.raw, space.row_sums, 0
        for offset, (owner, tile, parity) in passing:
            start = self.starts[owner]
            size = max(0, min(self.tile, self.counts[owner] - offset))
            if not held or not size:
                continue
            cols = slice(start + offset, start + offset + size)
            if start == mine and begin <= offset < begin + held:
                in_panel = slice(offset - begin, offset - begin + size)
                right = [x[in_panel] for x in left]
                right_norms = norms[:, in_panel].contiguous()
                at = first + in_panel.start
            else:
                right = [self._centred(x, k, space.right[k][:size]) for k, x in enumerate(tile)]
                right_norms = _norms(right)
                at = offset
                if space.raw is not None:
                    at = held
                    for buffer, x in zip(raw, tile, strict=True):
                        buffer[held : held + size] = x
            for i in range(0, held, self.tile):
                if start == mine and begin + i > offset:
                    break  # its mirror image is in the upper triangle
                if parity is not None and (begin + i + offset) // self.tile % 2 != parity:
                    continue  # the owner of the columns has it in its own walk
                j = min(i + self.tile, held)
                rows = slice(mine + begin + i, mine + begin + j)
                some = [x[i:j] for x in left]
                if kernel:
                    shape = len(raw), j - i, size
                    found = list(space.grams[: prod(shape)].view(shape))
                    run_grams(some, right, found)
                    run_tile(
                        found,
                        raw,
                        (norms[:, i:j].contiguous(), right_norms),
                        self._shifts,
                        products,
                        into,
                        (first + i, at),
                        diagonal=rows.start == cols.start,
                    )
                else:
                    found = [_exact(x, y) for x, y in zip(some, right, strict=True)]
                yield Tile(rows, cols, found, some, right)
            if kernel and row_sums is not None and space.row_sums is not None:
                row_sums[:, mine + begin : mine + begin + held] += space.row_sums[:, :held]
                if at == held:
                    row_sums[:, cols] += space.row_sums[:, held : held + size]
                space.row_sums.zero_()

    def _typical(self, norms: Tensor) -> Tensor:
        """About the typical distance: |x - y|^2 is 2 |x - mean|^2 in the mean. Any number would
        do; this one makes the distances it is taken off small."""
        if self.group is None:
            return (2 * norms.mean(1)).sqrt().double()
        total = torch.cat([norms.sum(1), norms.new_full((1,), norms.shape[1])])
        self.reduce(total)
        return (2 * total[:-1] / total[-1]).sqrt().double()

    def _passing(self, begin: int, held: int) -> Iterator[tuple[int, Turn]]:
        """Column tiles, and where they begin in the rows of their owner. One process alone does
        not read those again that it holds."""
        alone = self.ring.world == 1
        for offset in range(begin if alone else 0, max(self.counts), self.tile):
            sizes = [max(0, min(self.tile, count - offset)) for count in self.counts]
            tile: list[Tensor] = []
            if not alone or offset >= begin + held:
                tile = self._read(offset, sizes[self.rank])
            for turn in self.ring.turns(tile, sizes):
                yield offset, turn

    def _read(self, offset: int, size: int) -> list[Tensor]:
        try:
            return [s.read(slice(offset, offset + size)) for s in self.sources]
        except Exception as error:
            self.ring.failed(error)
            # Something to hand on, until the others hear that it is nothing.
            return [
                torch.zeros(size, s.width, dtype=s.dtype, device=self.device) for s in self.sources
            ]


class _Space:
    """What one walk writes to, again and again.

    Near neighbours are taken from the features as they are, rows and columns at one address: where
    they lie if all are in memory, or in a buffer that has the tile of columns behind the panel.
    """

    def __init__(self, pairs: Pairs, *, sums: bool) -> None:
        k, panel, tile = len(pairs.sources), min(pairs.panel, pairs.own), pairs.tile
        last = min(tile, max(pairs.counts))

        def empty(*shape: int, dtype: torch.dtype = pairs.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=pairs.device)

        self.grams = empty(k * min(tile, panel) * last)
        self.left = [empty(panel, s.width) for s in pairs.sources]
        self.right = [empty(last, s.width) for s in pairs.sources]
        self.raw: list[Tensor] | None = None
        self.row_sums: Tensor | None = None
        if pairs.group is not None or len(pairs._flat) < k:
            self.raw = [empty(panel + last, s.width, dtype=s.dtype) for s in pairs.sources]
            if sums:
                self.row_sums = empty(k, panel + last, dtype=torch.float64).zero_()


def _norms(strip: list[Tensor]) -> Tensor:
    # Not vecdot, which builds the product of the two before it sums.
    return torch.stack([torch.linalg.vector_norm(x, dim=1).square_() for x in strip])


def _exact(rows: Tensor, cols: Tensor) -> Tensor:
    return torch.cdist(rows, cols, compute_mode="donot_use_mm_for_euclid_dist")
