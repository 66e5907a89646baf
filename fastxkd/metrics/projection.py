r"""Features of very many values a row, made narrow: distances survive a random projection.

Of n rows projected to m values by random signs over sqrt(m), every squared distance keeps its value
within a factor 1 +- eps, all n(n-1)/2 at once, with probability at least 1 - delta if

    m >= ln(n^2 / delta) / (eps^2/4 - eps^3/6)

(Johnson and Lindenstrauss; signs: Achlioptas 2003, whose bound for one distance,
2 exp(-m (eps^2/4 - eps^3/6)), is here summed over all pairs). What that means for a score: distance
matrices a before and a' after differ by |a' - a| <= rho |a'|, rho = 1/sqrt(1 - eps) - 1, in the
Frobenius norm, and centring, an orthogonal projection of matrices, adds nothing to it. The cosine
of the centred A with any other matrix then changes by at most

    2 rho |a'| / |A'|

which is what a distance correlation changes by per projected feature. The bound is for the worst
of all pairs and signs; a squared distance has a relative standard deviation of at most sqrt(2/m),
and a score, taken over all pairs, moves far less.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, log, sqrt
from typing import Any

import torch
from torch import Tensor

from fastxkd.metrics.similarity import centre
from fastxkd.ops.pairs import Pairs
from fastxkd.ops.stored import Features, Rows

BLOCK = 1 << 22  # signs unpacked at a time
READ = 1 << 24  # values read at a time
# Rows that share the signs unpacked for them, however wide they are: fewer would spend more on
# the signs than on the product. Of features in memory no copy is made.
READ_ROWS, ROWS = 64, 1024


def projected_width(n: int, *, error: float, failure: float = 0.01) -> int:
    """Values a row that keep all squared distances of ``n`` rows within a factor ``1 +- error``.

    Args:
        n: rows, at least 2.
        error: eps, in (0, 1).
        failure: delta, the probability, in (0, 1), that some distance is farther off.

    >>> projected_width(1000, error=0.2)
    2126
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n: expected an int, got {type(n).__name__}")
    if n < 2:
        raise ValueError(f"n: expected at least 2 rows, got {n}")
    _in_unit("error", error)
    _in_unit("failure", failure)
    return ceil(log(n * n / failure) / _exponent(error))


def _exponent(error: float) -> float:
    return error**2 / 4 - error**3 / 6


def _in_unit(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name}: expected a number in (0, 1), got {value!r}")


class RandomProjection:
    """``[n, ...]`` features to ``[n, width]``, distances kept approximately.

    The projection is the same for every call, process and split into batches: its signs are drawn
    from ``seed`` and the number of values a row alone. They are kept as bits, d x width / 8 bytes.
    It pays where rows are wide, above all where they are mapped: they are read once, 64 rows or
    more at a time.

    Args:
        width: m, values a row; :func:`projected_width` finds it for an error.
        seed: of the signs.

    >>> import torch
    >>> narrow = RandomProjection(512)(torch.eye(4, 3000))
    >>> narrow.shape
    torch.Size([4, 512])
    """

    def __init__(self, width: int, *, seed: int = 0) -> None:
        if isinstance(width, bool) or not isinstance(width, int):
            raise TypeError(f"width: expected an int, got {type(width).__name__}")
        if width < 1:
            raise ValueError(f"width: expected at least 1, got {width}")
        self.width, self.seed = width, seed
        self._signs: dict[int, Tensor] = {}

    def __call__(self, features: Features, *, name: str = "features") -> Tensor:
        """``[n, width]``: float64 for float64 features, else float32. Not differentiable."""
        rows = Rows(features, name)
        exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
        out = torch.zeros(rows.n, self.width, dtype=exact, device=rows.device)
        at_once = max(READ_ROWS if rows.flat is None else ROWS, READ // rows.width)
        for begin in range(0, rows.n, at_once):
            part = slice(begin, min(begin + at_once, rows.n))
            x = rows.read(part)
            for values, signs in self._blocks(rows.width, out):
                out[part].addmm_(x[:, values].to(exact), signs)
        return out.div_(sqrt(self.width))

    def relative_error(self, n: int, *, failure: float = 0.01) -> float:
        """The smallest ``error`` for which this width serves ``n`` rows; infinite if none does.

        >>> round(RandomProjection(2126).relative_error(1000), 2)
        0.2
        """
        if projected_width(n, error=1 - 1e-9, failure=failure) > self.width:
            return float("inf")
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            enough = _exponent(middle) * self.width >= log(n * n / failure)
            low, high = (low, middle) if enough else (middle, high)
        return high

    def score_error(
        self, projected: Features, *, unbiased: bool = True, failure: float = 0.01
    ) -> float:
        """How far the projection may have moved a distance correlation of ``projected``.

        The bound of the module, from the projected features themselves: with probability at least
        ``1 - failure`` the score with what it was made of is no farther away.
        """
        pairs = Pairs([projected], ["projected"])
        error = self.relative_error(pairs.n, failure=failure)
        products, row_sums = pairs.sums()
        found = centre(products, row_sums, pairs.dtype, unbiased=unbiased)
        n = pairs.n
        centred = float(found.values[0, 0].clamp(min=0)) * (n * (n - 3) if unbiased else n * n)
        if error >= 1 or centred == 0:
            return float("inf")
        rho = 1 / sqrt(1 - error) - 1
        return 2 * rho * sqrt(float(products[0, 0]) / centred)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_signs": {}}

    def _blocks(self, d: int, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the d x width matrix of signs, some at a time."""
        if d not in self._signs:
            generator = torch.Generator().manual_seed(self.seed)
            packed = torch.zeros(d, -(-self.width // 8), dtype=torch.uint8)
            self._signs[d] = packed.random_(0, 256, generator=generator)
        # The eight signs of every byte: one look-up unpacks it.
        byte, bit = torch.arange(256, device=like.device), torch.arange(8, device=like.device)
        table = ((byte[:, None] >> bit) & 1).to(like.dtype) * 2 - 1
        at_once = max(1, BLOCK // self.width)
        for begin in range(0, d, at_once):
            packed = self._signs[d][begin : begin + at_once].to(like.device)
            signs = table.index_select(0, packed.flatten().int())
            yield slice(begin, begin + len(packed)), signs.view(len(packed), -1)[:, : self.width]
