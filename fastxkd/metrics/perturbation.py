"""What an image's score becomes as pixels go or come by relevance, and through its own map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastxkd.metrics._maps import (
    check_images,
    check_maps,
    check_maps_of,
    exact_dtype,
    nan_where_map_is,
    pixel_order,
)
from fastxkd.metrics._scoring import SCORES, Model, Scorer
from fastxkd.metrics.agreement import pearson_agreement
from fastxkd.ops._checks import (
    check_choice,
    check_counts,
    check_flags,
    check_float,
    check_number,
)

Explainer = Callable[..., Tensor]


class PerturbationCurve(NamedTuple):
    """Of :func:`deletion_curve` and :func:`insertion_curve`."""

    auc: Tensor  # [n]
    scores: Tensor  # [n, steps + 1], both ends included


def deletion_curve(
    model: Model,
    images: Tensor,
    maps: Tensor,
    targets: Any = None,
    *,
    steps: int | None = None,
    baseline: float | Tensor = 0.0,
    score: str = "probability",
    steps_at_once: int = 1,
) -> PerturbationCurve:
    r"""Deletion (RISE, Petsiuk et al. 2018): the most relevant pixels go first. Lower is better.

    With :math:`y_k` the score after k of K steps,

    .. math:: AUC = (y_0 / 2 + y_1 + \dots + y_{K-1} + y_K / 2) / K

    Args:
        model, images, maps, targets, score, steps_at_once: as in :func:`fastxkd.road_score`.
        steps: K; the pixels are shared out evenly. None: one for each row of the image, which
            with 224 x 224 pixels are the 224 at a time of RISE.
        baseline: what a deleted pixel becomes: a number or a tensor that broadcasts to
            ``images``; 0 is the mean colour of normalised images.

    Returns:
        :class:`PerturbationCurve`; NaN for an image or a map with NaN, and for no other. Pixels
        of equal relevance go in reading order.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit, more steps than pixels.

    >>> import torch
    >>> images = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    >>> model = lambda x: x.flatten(1)
    >>> deletion_curve(model, images, images[:, 0], 3, steps=4, score="logit").scores
    tensor([[4., 0., 0., 0., 0.]])
    """
    check_curve_options(steps, score, steps_at_once)
    _check_call(images, maps, steps)
    return _curve(
        Scorer(model, images, targets, score),
        maps,
        first=images,
        last=_like(images, baseline, "baseline"),
        steps=steps,
        steps_at_once=steps_at_once,
        full_at=0,
    )


def insertion_curve(
    model: Model,
    images: Tensor,
    maps: Tensor,
    targets: Any = None,
    *,
    steps: int | None = None,
    start: float | Tensor | None = None,
    score: str = "probability",
    steps_at_once: int = 1,
) -> PerturbationCurve:
    """Insertion (RISE, Petsiuk et al. 2018): the most relevant pixels come first. Higher is better.

    Args:
        model, images, maps, targets, score, steps_at_once: as in :func:`fastxkd.road_score`.
        steps: as in :func:`deletion_curve`.
        start: the image without its pixels: a number or a tensor that broadcasts to ``images``;
            None: the image blurred as RISE does, :func:`blurred`.

    Returns, raises: as :func:`deletion_curve`.

    >>> import torch
    >>> images = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    >>> model = lambda x: x.flatten(1)
    >>> insertion_curve(model, images, images[:, 0], 2, steps=4, start=0.0, score="logit").scores
    tensor([[0., 0., 3., 3., 3.]])
    """
    check_curve_options(steps, score, steps_at_once)
    _check_call(images, maps, steps)
    scorer = Scorer(model, images, targets, score)
    return _curve(
        scorer,
        maps,
        first=blurred(images) if start is None else _like(images, start, "start"),
        last=images,
        steps=steps,
        steps_at_once=steps_at_once,
        full_at=-1,
    )


def check_curve_options(
    steps: int | None, score: str, steps_at_once: int, **filling: float | Tensor | None
) -> None:
    if steps is not None:
        check_counts(steps=steps)
    check_choice("score", score, SCORES)
    check_counts(steps_at_once=steps_at_once)
    for name, value in filling.items():
        if value is not None and not isinstance(value, Tensor):
            check_number(name, value)


def _check_call(images: Any, maps: Any, steps: int | None) -> None:
    check_images(images)
    check_maps_of(images, maps)
    if steps is not None and steps > maps[0].numel():
        raise ValueError(
            f"steps: expected at most one for each of {maps[0].numel()} pixels, got {steps}"
        )


def _like(images: Tensor, value: float | Tensor, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        check_number(name, value)
        value = torch.tensor(value, dtype=images.dtype, device=images.device)
    check_float(name, value)
    try:
        return value.detach().to(images).expand_as(images)
    except RuntimeError:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to images {list(images.shape)},"
            f" got {list(value.shape)}"
        ) from None


def _curve(
    scorer: Scorer,
    maps: Tensor,
    *,
    first: Tensor,
    last: Tensor,
    steps: int | None,
    steps_at_once: int,
    full_at: int,
) -> PerturbationCurve:
    """From first to last, the most relevant pixels earliest; the end that is known is not run."""
    first, last, maps = first.detach(), last.detach(), maps.detach()
    rank = pixel_order(maps)[:, None]  # [n, 1, h, w]
    pixels, steps = maps[0].numel(), steps or maps.shape[1]
    changed = torch.arange(steps + 1, device=maps.device) * pixels // steps
    changed = changed[1:] if full_at == 0 else changed[:-1]
    scores = torch.cat(
        [
            scorer(torch.where(rank < counts[:, None, None, None, None], last, first))
            for counts in changed.split(steps_at_once)
        ]
    )
    ends = [scorer.full[None], scores] if full_at == 0 else [scores, scorer.full[None]]
    curve = nan_where_map_is(maps, torch.cat(ends)).T.contiguous()
    return PerturbationCurve(torch.trapezoid(curve, dx=1 / steps, dim=1), curve)


def blurred(images: Tensor) -> Tensor:
    """Where insertion starts in RISE: a Gaussian of sigma 5, on 11 x 11 pixels.

    What of the Gaussian lies beyond the window is folded back into it, as the published kernel, a
    filtered point, has it; beyond the image is 0.

    >>> import torch
    >>> blurred(torch.ones(1, 1, 24, 24))[0, 0, 12, 12:].round(decimals=4)[:3]
    tensor([1., 1., 1.])
    """
    check_images(images)
    place = torch.arange(-20, 21, dtype=torch.float64)
    weight = (-place.square() / 50).exp()
    # 11 places and their mirror image, over and over.
    inside = (place + 5).long() % 22
    inside = torch.where(inside < 11, inside, 21 - inside)
    kernel = torch.zeros(11, dtype=torch.float64).index_add(0, inside, weight / weight.sum())
    kernel = kernel.to(images.device)
    with torch.autocast(images.device.type, enabled=False):
        # In float64: cuDNN rounds what it convolves in float32.
        x = images.flatten(0, 1)[:, None].double()
        x = F.conv2d(x, kernel.view(1, 1, 11, 1), padding=(5, 0))
        x = F.conv2d(x, kernel.view(1, 1, 1, 11), padding=(0, 5))
    return x.view(images.shape).to(images.dtype)


class ConfidenceChange(NamedTuple):
    """Of :func:`confidence_change`, each ``[n]``."""

    drop: Tensor
    increase: Tensor  # 1 where the score rose, else 0


def confidence_change(
    model: Model,
    images: Tensor,
    maps: Tensor,
    targets: Any = None,
    *,
    score: str = "probability",
    relative: bool = True,
) -> ConfidenceChange:
    r"""Drop and increase in confidence (Chattopadhay et al. 2018): the image times its map.

    With Y the score of the image and O that of image times map,

    .. math:: drop = max(0, Y - O) / Y,\quad increase = [O > Y]

    Their means over images are average drop (lower is better) and average increase (higher),
    here as fractions, where the paper has per cent.

    Args:
        model, images, maps, targets, score: as in :func:`fastxkd.road_score`, maps in [0, 1].
        relative: False leaves out the division by Y, as pytorch-grad-cam's ``DropInConfidence``;
            needed with ``score="logit"``, which may be negative.

    Returns:
        :class:`ConfidenceChange`; NaN where image or map have NaN. A score of 0 cannot drop: 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit, maps beyond [0, 1].

    >>> import torch
    >>> images = torch.tensor([[[[4.0, 1.0]]]])
    >>> confidence_change(lambda x: x.flatten(1), images, torch.tensor([[[0.5, 1.0]]]), 0,
    ...     score="logit", relative=False)
    ConfidenceChange(drop=tensor([2.]), increase=tensor([0.]))
    """
    check_images(images)
    check_maps_of(images, maps)
    check_change_options(score, relative)
    _check_unit(maps)
    scorer = Scorer(model, images, targets, score)
    return _change(scorer, _through(images, maps), relative)


def check_change_options(score: str, relative: bool) -> None:
    check_choice("score", score, SCORES)
    check_flags(relative=relative)
    if relative and score == "logit":
        raise ValueError(
            "relative: expected False with score='logit', which may be negative; got True"
        )


def _check_unit(maps: Tensor) -> None:
    low, high = (float(x) for x in torch.nan_to_num(maps.detach(), nan=0.5).aminmax())
    if low < 0 or high > 1:
        raise ValueError(
            f"maps: expected values in [0, 1], got {low:.4g} to {high:.4g}; explainers scale them"
            " with normalize='minmax'"
        )


def _through(images: Tensor, maps: Tensor) -> Tensor:
    return (images.detach() * maps.detach()[:, None]).to(images.dtype)


def _change(scorer: Scorer, masked: Tensor, relative: bool) -> ConfidenceChange:
    full, left = scorer.full, scorer(masked[None])[0]
    drop = (full - left).clamp(min=0)
    if relative:
        drop = torch.where(full == 0, 0, drop / full)
    return ConfidenceChange(
        drop, (left > full).to(full).where(~(left.isnan() | full.isnan()), torch.nan)
    )


class ADCCScores(NamedTuple):
    """Of :func:`adcc`, each ``[n]``."""

    adcc: Tensor
    coherency: Tensor
    complexity: Tensor
    drop: Tensor


def adcc(
    model: Model,
    images: Tensor,
    explain: Explainer,
    targets: Any = None,
    *,
    maps: Tensor | None = None,
) -> ADCCScores:
    r"""ADCC (Poppi et al. 2021): harmonic mean of what average drop, coherency and complexity say.

    .. math:: coherency = (Pearson(m(x), m(x \odot m(x))) + 1) / 2,\quad
        complexity = mean(m(x)),\quad
        ADCC = 3 / (1/coherency + 1/(1 - complexity) + 1/(1 - drop))

    Higher is better. A map that is constant has coherency 1/2 (Pearson is taken as 0); where one
    of the three is at its worst, ADCC is 0.

    Args:
        model, images: as in :func:`fastxkd.road_score`.
        explain: of images and ``targets=`` to maps ``[n, h, w]`` in [0, 1]: an explainer of this
            library. Called for the images and for images times maps, with the same classes.
        targets: None (the class the model names for the image) | int | list of int | int64 ``[n]``.
        maps: of the images, where they are at hand.

    Returns:
        :class:`ADCCScores`; NaN where image or map have NaN.

    Raises:
        ValueError, TypeError: shapes, dtypes or targets that do not fit, maps beyond [0, 1].

    >>> import torch
    >>> from fastxkd.metrics import adcc
    >>> model = lambda x: x.flatten(1)
    >>> explain = lambda x, targets: x[:, 0] / x.amax()
    >>> adcc(model, torch.tensor([[[[4.0, 0.0], [0.0, 0.0]]]]), explain, 0)[:3]
    (tensor([0.9000]), tensor([1.]), tensor([0.2500]))
    """
    check_images(images)
    if not callable(explain):
        raise TypeError(f"explain: expected a callable, got {type(explain).__name__}")
    scorer = Scorer(model, images, targets, "probability")
    if not isinstance(scorer.targets, Tensor):
        raise TypeError("targets: expected class indices, which explain= takes as well")
    if maps is None:
        maps = explain(images, targets=scorer.targets)
        check_maps(maps, "explain")
    check_maps_of(images, maps)
    _check_unit(maps)
    masked = _through(images, maps)
    again = explain(masked, targets=scorer.targets)
    check_maps_of(images, again, "explain")
    coherency = (pearson_agreement(maps, again) + 1) / 2
    complexity = maps.detach().flatten(1).mean(1, dtype=exact_dtype(maps))
    drop = _change(scorer, masked, relative=True).drop
    harmonic = 3 / (1 / coherency + 1 / (1 - complexity) + 1 / (1 - drop))
    return ADCCScores(harmonic, coherency, complexity, drop)
