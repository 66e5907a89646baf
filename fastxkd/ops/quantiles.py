"""Exact quantiles of every unit over a stream of activations that is gone through several times.

A radix search: a pass counts, for every unit, into which of ``2**bits`` steps its values fall
(``ops.concepts.unit_counts``); the next one looks into the step that holds the quantile: it counts
again or, where no more than ``2**bits`` values are left, lists them (``unit_values``). What is kept
is ``units x steps`` numbers, however long the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastxkd.ops._checks import check_choice, check_counts, check_number
from fastxkd.ops.concepts import check_maps, unit_counts, unit_values
from fastxkd.reference.concepts import keyed_values

INTERPOLATIONS = ("linear", "lower", "higher")


class UnitQuantiles:
    r"""The quantile of each unit's values, over all images and positions, in several passes.

    Of :math:`n` values in order, :math:`x_0` to :math:`x_{n-1}`, the quantile is that at position
    :math:`(n - 1) \cdot quantile`, numpy's default: between two values linearly.

    Args:
        quantile: from 0 to 1; 0.995 leaves a two-hundredth above.
        interpolation: between the two values next to the position: ``"linear"`` (default),
            ``"lower"`` or ``"higher"`` of them.
        bits: :math:`2^{bits}` steps a pass, of 8 bytes a unit. With the default of 11 the first
            pass leaves a quarter of an octave: 2 passes are enough where at most 2048 values of a
            unit are in there, zeros not counted; float32 never takes more than 3, with 16 bits 2.

    Give every pass all batches, in any order and division, then ask whether it was the last:

    >>> import torch
    >>> from fastxkd.ops.quantiles import UnitQuantiles
    >>> batches = torch.arange(2400.0).view(4, 2, 3, 50, 2)  # four of [2, 3, 50, 2]
    >>> search, done = UnitQuantiles(0.995), False
    >>> while not done:
    ...     for batch in batches:
    ...         search.update(batch)
    ...     done = search.advance()
    >>> search.result().shape
    torch.Size([3])
    """

    def __init__(self, quantile: float, *, interpolation: str = "linear", bits: int = 11) -> None:
        check_number("quantile", quantile)
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile: expected a number from 0 to 1, got {quantile}")
        check_choice("interpolation", interpolation, INTERPOLATIONS)
        check_counts(bits=bits)
        if bits > 16:
            raise ValueError(f"bits: expected at most 16, got {bits}")
        self.quantile, self.interpolation, self.most_bits = quantile, interpolation, bits
        self.passes = 0
        """Passes that are over."""
        self.values: int | None = None
        """Values of each unit, once a pass is over."""
        self._dtype: torch.dtype | None = None
        self._seen = self._shift = self._bits = 0
        none = torch.empty(0, dtype=torch.int64)
        self._bad = self._decided = none.bool()  # [units]: has NaN; nothing is left to find
        # Of both values next to the position, [2, units]: the first key of the step that it is in,
        # how many values that step has, its rank among them; its key where that is known.
        self._low = self._size = self._rank = self._found = none
        # Units whose values are counted in this pass, into windows that begin at
        # [1 or 2, counted]: one where both values are in the same step.
        self._counted = self._windows = self._counts = none
        # Windows of the units whose values are listed, and what is in them.
        self._span, self._keys, self._listed = (none, none), none, none
        self._result: Tensor | None = None

    def update(self, activations: Tensor) -> None:
        """Look at a batch ``[n, units, h, w]`` in this pass.

        Raises:
            ValueError, TypeError: other units or another dtype than the batches before; the search
                is over.
        """
        if self._result is not None:
            raise ValueError("update: the quantiles are known, start a new search")
        if self._dtype is None:
            self._begin(activations)
        units = len(self._decided)
        if activations.dtype != self._dtype:
            raise TypeError(
                f"activations: expected {self._dtype} as before, got {activations.dtype}"
            )
        if activations.dim() != 4 or activations.shape[1] != units:
            raise ValueError(
                f"activations: expected [n, {units}, height, width] as before,"
                f" got {list(activations.shape)}"
            )
        if self._keys.numel():
            unit_values(activations, *self._span, self._keys, self._listed)
        some = activations
        if 0 < len(self._counted) < units:
            some = activations.index_select(1, self._counted)
        for low, counts in zip(self._windows, self._counts, strict=True):
            unit_counts(some, low, self._shift, self._bits, counts)
        self._seen += activations.numel() // units

    def _begin(self, activations: Tensor) -> None:
        check_maps(activations)
        self._dtype, width = activations.dtype, 8 * activations.element_size()
        self._shift = width
        self._counted = torch.arange(activations.shape[1], device=activations.device)
        self._decided = torch.zeros_like(self._counted, dtype=torch.bool)
        self._low = torch.full_like(self._counted, -(2 ** (width - 1))).expand(2, -1).clone()
        self._found = torch.zeros_like(self._low)
        self._count()

    def _count(self) -> None:
        """Steps within the last ones, for the units that are to be counted."""
        self._bits = min(self.most_bits, self._shift)
        self._shift -= self._bits
        low = self._low[:, self._counted]
        self._windows = low[:1] if torch.equal(low[0], low[1]) else low
        self._counts = low.new_zeros((*self._windows.shape, 2**self._bits + 1))

    def advance(self) -> bool:
        """End a pass; ``True`` when it was the last one.

        Raises:
            ValueError: the pass saw nothing, or other values than the one before it.
        """
        if self._result is not None:
            return True
        if self._seen == 0:
            raise ValueError("advance: the pass saw no values, expected all batches of the stream")
        if self.values is None:
            self.values, nan = self._seen, self._counts[0, :, -1]
            self._bad = nan > 0
            self._decided = self._bad.clone()
            position = int((self._seen - 1) * self.quantile)
            ranks = [position, min(position + 1, self._seen - 1)]
            self._rank = torch.stack([torch.full_like(nan, rank) for rank in ranks])
            self._size = (self._seen - nan).expand(2, -1).clone()
        elif self._seen != self.values:
            raise self._changed()
        if self._keys.numel():
            self._pick()
        if len(self._counted):
            self._narrow()
        self.passes += 1
        self._seen = 0
        if self._decided.all():
            self._finish()
            return True
        self._plan()
        return False

    def _changed(self) -> ValueError:
        return ValueError(
            f"advance: pass {self.passes + 1} saw other values than the first, which had"
            f" {self.values} a unit; expected the same batches in each"
        )

    def _narrow(self) -> None:
        """From the counts of a pass to a step of it, for both values."""
        units = self._counted
        steps = [counts[:, :-1] for counts in self._counts]
        upto = [x.cumsum(1).contiguous() for x in steps]
        for k in (0, 1):
            in_steps, until = steps[k % len(steps)], upto[k % len(steps)]
            if not torch.equal(until[:, -1], self._size[k, units]):
                raise self._changed()
            rank = self._rank[k, units][:, None]
            # A unit with NaN has fewer numbers than ranks: any step will do.
            step = torch.searchsorted(until, rank, right=True).clamp(max=in_steps.shape[1] - 1)
            count = in_steps.gather(1, step)
            self._rank[k, units] = (rank - (until.gather(1, step) - count))[:, 0]
            self._size[k, units] = count[:, 0]
            self._low[k, units] += step[:, 0] << self._shift
        if self._shift == 0:
            self._found[:, units] = torch.where(
                self._decided[units], self._found[:, units], self._low[:, units]
            )
            self._decided[units] = True

    def _pick(self) -> None:
        """From the listed values to both values; where they were too many nothing is decided."""
        same = self._low[0] == self._low[1]
        size = torch.where(same, self._size[0], self._size[0] + self._size[1])
        room, listed = self._keys.shape[1], self._listed
        wanted = self._span[0] <= self._span[1]
        # Zeros are left out of the list: as many as it is short of.
        zeros = torch.where(self._low[0] == 0, size - listed, 0)
        if (wanted & (zeros + listed != size) | (zeros < 0)).any():
            raise self._changed()
        done = wanted & (listed <= room)
        used = max(1, min(room, int(listed.max())))
        unused = torch.arange(used, device=listed.device) >= listed[:, None]
        keys = self._keys[:, :used].masked_fill(unused, torch.iinfo(torch.int64).min)
        # From the largest down to the lower of both: the rest is not worth sorting.
        first = self._rank[0]
        needed = torch.where(done, listed - (first - zeros), 1).clamp(1, used)
        keys = keys.topk(int(needed.max()), 1).values
        second = torch.where(same, self._rank[1], self._size[0] + self._rank[1])
        for k, rank in enumerate((first, second)):
            at = (listed - 1 - (rank - zeros)).clamp(0, keys.shape[1] - 1)[:, None]
            key = torch.where(rank < zeros, 0, keys.gather(1, at)[:, 0])
            self._found[k] = torch.where(done, key, self._found[k])
        self._decided = self._decided | done

    def _plan(self) -> None:
        """The next pass lists the values of a step where there is room, and counts elsewhere.

        The zeros of a ReLU may be any number and are not listed: they come first in their step.
        """
        room = 2**self.most_bits
        size = torch.where(self._low[0] == self._low[1], self._size[0], self._size.sum(0))
        many = size > room
        zero = self._low[0] == 0
        listed = ~self._decided & (~many | zero)
        last = self._low[1] + (1 << self._shift) - 1
        low = torch.where(listed, self._low[0] + zero.long(), 1)
        self._span = low, torch.where(listed, last, 0)
        rows = len(low) if listed.any() else 0
        self._keys = low.new_empty((rows, room))
        self._listed = torch.zeros_like(low)
        self._counted = (~self._decided & many).nonzero()[:, 0]
        if len(self._counted):
            self._count()
        else:
            self._windows = self._counts = low.new_zeros(0)

    def _finish(self) -> None:
        assert self._dtype is not None
        assert self.values is not None
        low, high = keyed_values(self._found, self._dtype).double()
        position = (self.values - 1) * self.quantile
        part = position - int(position)
        if self.interpolation == "lower" or part == 0:
            found = low
        elif self.interpolation == "higher":
            found = high
        else:
            # From the nearer side, as numpy does; infinities have no way between them.
            gap = high - low
            found = low + gap * part if part < 0.5 else high - gap * (1 - part)
            found = torch.where(low == high, low, found)
        self._result = torch.where(self._bad, torch.nan, found)
        self._counts = self._keys = self._found.new_zeros(0)

    def result(self) -> Tensor:
        """``[units]`` float64; NaN for a unit with a value that is NaN.

        Raises:
            ValueError: passes are left to make.
        """
        if self._result is None:
            raise ValueError(f"result: not known after {self.passes} passes; make another")
        return self._result


def exact_quantiles(
    batches: Callable[[], Iterable[Tensor]],
    quantile: float,
    *,
    interpolation: str = "linear",
    bits: int = 11,
) -> Tensor:
    """:class:`UnitQuantiles` of a stream that can be started again.

    Args:
        batches: called once for each pass; gives the batches ``[n, units, h, w]``.
        quantile, interpolation, bits: as of :class:`UnitQuantiles`.

    Returns:
        ``[units]`` float64.

    >>> import torch
    >>> from fastxkd.ops.quantiles import exact_quantiles
    >>> values = torch.randn(10, 3, 7, 7)
    >>> found = exact_quantiles(lambda: values.split(4), 0.9)
    >>> torch.equal(found, values.double().movedim(1, 0).flatten(1).quantile(0.9, 1))
    True
    """
    search = UnitQuantiles(quantile, interpolation=interpolation, bits=bits)
    while True:
        for batch in batches():
            search.update(batch)
        if search.advance():
            return search.result()
