"""The threshold of every unit: the value that a small share of its activations exceeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, get_args

from torch import Tensor

from fastxkd.ops._checks import check_choice, check_float, check_number
from fastxkd.ops.quantiles import exact_quantiles

Quantile = Literal["exact", "published"]
# The published code reads one of this many points off its sketch.
_POINTS = 1000


def quantile_position(q: float, quantile: Quantile) -> float:
    """Where in the sorted values the threshold lies, as a share of the way from first to last.

    >>> quantile_position(0.005, "exact"), round(quantile_position(0.005, "published"), 6)
    (0.995, 0.994995)
    """
    check_number("q", q)
    if not 0 < q < 1:
        raise ValueError(f"q: expected a share between 0 and 1, got {q}")
    check_choice("quantile", quantile, get_args(Quantile))
    if quantile == "exact":
        return 1 - q
    return max(0, int(_POINTS * (1 - q) - 1)) / (_POINTS - 1)


def unit_thresholds(
    activations: Tensor | Callable[[], Iterable[Tensor]],
    q: float = 0.005,
    *,
    quantile: Quantile = "exact",
) -> Tensor:
    """Threshold of every unit, float64 ``[U]``, over all images and positions.

    Args:
        activations: ``[n, U, ...]``, or a function that starts an iteration over batches of them,
            the same every time: it is called two or three times for float32, and nothing is kept.
        q: share of positions at which a unit is on.
        quantile: ``"exact"``: the quantile 1 - q, between two values by linear interpolation (as
            NumPy's); ``"published"``: the point int(1000 (1 - q) - 1) of 1,000 evenly spaced ones,
            which the authors' code reads: 994 / 999 for q = 0.005.

    A unit that is NaN anywhere has NaN, and is on nowhere.

    Raises:
        ValueError: no value came; batches that differ from one time to the next.

    >>> import torch
    >>> unit_thresholds(torch.arange(101.0).reshape(1, 1, 101), 0.25)
    tensor([75.], dtype=torch.float64)
    """
    if not isinstance(activations, Tensor) and not callable(activations):
        raise TypeError(
            "activations: expected a Tensor or a function that starts an iteration, got"
            f" {type(activations).__name__}"
        )

    def batches() -> Iterator[Tensor]:
        for batch in (activations,) if isinstance(activations, Tensor) else activations():
            check_activations(batch)
            flat = batch if batch.dim() == 4 else batch.reshape(*batch.shape[:2], -1, 1)
            yield flat

    return exact_quantiles(batches, quantile_position(q, quantile))


def check_activations(activations: Tensor) -> None:
    check_float("activations", activations)
    if activations.dim() < 2 or 0 in activations.shape[1:]:
        raise ValueError(
            "activations: expected [n, units, ...] with at least one unit and position, got"
            f" {list(activations.shape)}"
        )
