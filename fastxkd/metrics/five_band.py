"""Five-band score: does an attribution find the object, and what tells it from others?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastxkd.metrics._maps import check_maps, exact_dtype
from fastxkd.ops._checks import check_choice, check_counts, check_float, check_number

THRESHOLDS = (-0.7, -0.3, 0.3, 0.7)
SCALINGS = ("after_sum", "before_sum")
_ROUNDING = 1e-6  # of the published ratios: what keeps 0 / 0 from being NaN


class FiveBandScores(NamedTuple):
    """Of :func:`five_band_score`, each ``[n]``, and :func:`five_band_curve`, ``[n, steps]``."""

    accuracy: Tensor
    recall: Tensor
    precision: Tensor
    false_positive_rate: Tensor


def five_bands(values: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> Tensor:
    r"""Bands of values in [-1, 1]: how many thresholds lie below a value, minus 2.

    A value on a threshold, rounded to the values' dtype, belongs to the band below it.

    Args:
        values: any shape.
        thresholds: four, ascending.

    Returns:
        int8 of the same shape, -2 to 2.

    >>> import torch
    >>> five_bands(torch.tensor([-1.0, -0.5, 0.0, 0.4, 0.9]))
    tensor([-2, -1,  0,  1,  2], dtype=torch.int8)
    """
    check_float("values", values)
    return _bands(values.detach(), check_thresholds(thresholds))


def five_band_score(
    attributions: Tensor,
    truth: Tensor,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    truth_thresholds: Sequence[float] = THRESHOLDS,
    scaling: str = "after_sum",
) -> FiveBandScores:
    r"""Five-band score (Tjoa & Guan 2020) of attributions of images whose zones are known.

    Attribution h and truth :math:`h_0` become five bands each, and are compared pixel by pixel:

    .. math::
        accuracy = mean[h = h_0],\quad
        recall = \frac{TP}{TP + FN + 10^{-6}},\quad
        precision = \frac{TP}{TP + FP + 10^{-6}},\quad
        FPR = \frac{FP}{FP + TN + 10^{-6}}

    with TP where both are of the same band and not of band 0, FN where h alone is of band 0, TN
    where both are, and FP elsewhere: where h is of another band, :math:`h_0` of band 0 or not.

    Args:
        attributions: ``[n, h, w]``, or ``[n, channels, h, w]``, which are added up; each is divided
            by its greatest absolute value. One that is 0 everywhere stays so.
        truth: ``[n, h, w]`` in [-1, 1]: 0 background, 0.4 the object (localisation zone), 0.9 what
            tells its class (discriminative zone). See ``fastxkd.runs.three_zones``.
        thresholds: of the attributions, see :func:`five_bands`.
        truth_thresholds: of the truth.
        scaling: ``"after_sum"``, as published by default, or ``"before_sum"``: channels are divided
            by their common greatest absolute value before as well as after they are added up. Both
            are in the published code; in exact arithmetic they are the same.

    Returns:
        :class:`FiveBandScores`, float32, float64 for float64; NaN for an image with NaN.

    Raises:
        ValueError, TypeError: shapes, dtypes or thresholds that do not fit.

    >>> import torch
    >>> truth = torch.tensor([[[0.0, 0.4, 0.9, 0.9]]])
    >>> scores = five_band_score(torch.tensor([[[0.0, 1.0, 2.0, 0.5]]]), truth)
    >>> [round(score.item(), 4) for score in scores]
    [0.75, 0.6667, 1.0, 0.0]
    """
    curve = _scores(attributions, truth, [check_thresholds(thresholds)], truth_thresholds, scaling)
    return FiveBandScores(*(score[:, 0] for score in curve))


def five_band_curve(
    attributions: Tensor,
    truth: Tensor,
    *,
    delta: float = 0.005,
    steps: int = 56,
    thresholds: Sequence[float] = THRESHOLDS,
    truth_thresholds: Sequence[float] = THRESHOLDS,
    scaling: str = "after_sum",
) -> FiveBandScores:
    """The soft version of :func:`five_band_score`: the same for thresholds that shrink towards 0.

    Recall against precision is then a curve.

    Args:
        delta: what each step takes off every threshold's absolute value. The paper's experiments
            have 56 steps of 0.005, the published code 11 of 0.02 by default.
        steps: the first is with the thresholds as they are.
        attributions, truth, thresholds, truth_thresholds, scaling: as there; the truth's thresholds
            stay.

    Returns:
        :class:`FiveBandScores` of ``[n, steps]`` each.

    Raises:
        ValueError, TypeError: as there; a threshold that comes to 0 or beyond.

    >>> import torch
    >>> truth = torch.tensor([[[0.0, 0.4, 0.9, 0.9]]])
    >>> attributions = torch.tensor([[[0.05, 1.1, 2.0, 1.3]]])
    >>> five_band_curve(attributions, truth, delta=0.1, steps=3).accuracy
    tensor([[0.7500, 1.0000, 0.7500]])
    """
    check_soft_options(delta, steps, thresholds)
    shrunk = [
        [t - step * delta if t > 0 else t + step * delta for t in thresholds]
        for step in range(steps)
    ]
    return _scores(attributions, truth, shrunk, truth_thresholds, scaling)


def check_soft_options(delta: float, steps: int, thresholds: Sequence[float]) -> None:
    check_counts(steps=steps)
    check_number("delta", delta)
    least = min(abs(t) for t in check_thresholds(thresholds))
    if not delta >= 0 or (steps > 1 and (steps - 1) * delta >= least):
        raise ValueError(
            f"delta: expected at least 0 and {steps - 1} times less than the threshold {least:g},"
            f" got {delta}"
        )


def check_thresholds(thresholds: Sequence[float], name: str = "thresholds") -> Sequence[float]:
    if not isinstance(thresholds, Iterable):
        raise TypeError(f"{name}: expected four numbers, got {type(thresholds).__name__}")
    for threshold in thresholds:
        check_number(name, threshold)
    if len(thresholds) != 4 or not all(a < b for a, b in pairwise(thresholds)):
        raise ValueError(f"{name}: expected four numbers, ascending, got {list(thresholds)}")
    return thresholds


def check_score_options(
    thresholds: Sequence[float], truth_thresholds: Sequence[float], scaling: str
) -> None:
    check_thresholds(thresholds)
    check_thresholds(truth_thresholds, "truth_thresholds")
    check_choice("scaling", scaling, SCALINGS)


def _scores(
    attributions: Tensor,
    truth: Tensor,
    thresholds: Sequence[Sequence[float]],
    truth_thresholds: Sequence[float],
    scaling: str,
) -> FiveBandScores:
    check_score_options(thresholds[0], truth_thresholds, scaling)
    heat = _heat(attributions, truth, scaling)
    wanted = _bands(truth.detach(), truth_thresholds)
    there = wanted != 0
    rows = []
    for step in thresholds:
        found = _bands(heat, step)
        same, seen = found == wanted, found != 0
        pixels = [same, same & seen, seen & ~same, ~seen & ~there, ~seen & there]
        equal, tp, fp, tn, fn = (p.flatten(1).sum(1).double() for p in pixels)
        ratios = [
            equal / heat[0].numel(),
            tp / (tp + fn + _ROUNDING),
            tp / (tp + fp + _ROUNDING),
            fp / (fp + tn + _ROUNDING),
        ]
        rows.append(torch.stack(ratios))
    broken = (heat.isnan() | truth.isnan()).flatten(1).any(1)[:, None]
    scores = torch.stack(rows, 2).masked_fill(broken, torch.nan)
    return FiveBandScores(*scores.to(exact_dtype(attributions)))


def _heat(attributions: Any, truth: Any, scaling: str) -> Tensor:
    """``[n, h, w]`` in [-1, 1]."""
    check_maps(truth, "truth")
    check_float("attributions", attributions)
    n, h, w = truth.shape
    if (
        attributions.dim() not in (3, 4)
        or attributions.shape[0] != n
        or (list(attributions.shape[-2:]) != [h, w])
    ):
        raise ValueError(
            f"attributions: expected {[n, h, w]} or [{n}, channels, {h}, {w}], as truth,"
            f" got {list(attributions.shape)}"
        )
    if attributions.device != truth.device:
        raise ValueError(
            f"truth: expected the device of attributions, {attributions.device}, got {truth.device}"
        )
    # Rounded once, at the end: 3 / 10 then lies on the threshold 0.3, in whatever dtype.
    heat = attributions.detach().double()
    if heat.dim() == 4:
        heat = (_scaled(heat) if scaling == "before_sum" else heat).sum(1)
    return _scaled(heat).to(attributions.dtype)


def _scaled(heat: Tensor) -> Tensor:
    most = heat.flatten(1).abs().amax(1).view(-1, *[1] * (heat.dim() - 1))
    return heat / most.where(most != 0, 1)


def _bands(values: Tensor, thresholds: Sequence[float]) -> Tensor:
    bands = torch.full(values.shape, -2, dtype=torch.int8, device=values.device)
    for threshold in thresholds:
        bands += values > values.new_full((), float(threshold))
    return bands
