"""How far two explanations of the same images agree: a student's map and its teacher's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastxkd.metrics._maps import check_maps, exact_dtype, nan_where_map_is, pixel_order
from fastxkd.ops._checks import check_counts, check_number, check_positive


def cosine_agreement(first: Tensor, second: Tensor) -> Tensor:
    r"""Cosine of two maps of each image, :math:`a \cdot b / (|a| |b|)`.

    Args:
        first, second: ``[n, h, w]`` of one shape and any float dtypes.

    Returns:
        ``[n]``, float32, float64 where a map is; 0 where a map is all 0. NaN in a map is NaN in
        its image's value and in no other. No gradient.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.

    >>> import torch
    >>> cosine_agreement(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[4.0, 3.0]]]))
    tensor([0.9600])
    """
    dtype = _check_pair(first, second)
    return _cosine(_rows(first), _rows(second)).to(dtype)


def pearson_agreement(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of two maps of each image, over pixels; 0 where a map is constant.

    Args, returns, raises: as :func:`cosine_agreement`.

    >>> import torch
    >>> pearson_agreement(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[6.0, 4.0, 2.0]]]))
    tensor([-1.])
    """
    dtype = _check_pair(first, second)
    return _pearson(_rows(first), _rows(second)).to(dtype)


def spearman_agreement(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation of two maps of each image: Pearson's of their pixels' ranks.

    Equal pixels share their mean rank. Args, returns, raises: as :func:`pearson_agreement`.

    >>> import torch
    >>> spearman_agreement(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 9.0, 99.0]]]))
    tensor([1.])
    """
    dtype = _check_pair(first, second)
    value = _pearson(_mean_ranks(first), _mean_ranks(second))
    return nan_where_map_is(first, nan_where_map_is(second, value)).to(dtype)


def ssim_agreement(
    first: Tensor,
    second: Tensor,
    *,
    data_range: float = 1.0,
    window: int = 11,
    sigma: float = 1.5,
) -> Tensor:
    r"""Structural similarity (Wang et al. 2004) of two maps of each image.

    .. math:: \frac{(2 \mu_a \mu_b + c_1)(2 \sigma_{ab} + c_2)}
        {(\mu_a^2 + \mu_b^2 + c_1)(\sigma_a^2 + \sigma_b^2 + c_2)},\quad
        c_1 = (0.01 R)^2,\ c_2 = (0.03 R)^2

    in Gaussian windows, the mean over those that lie wholly inside the map.

    Args:
        first, second: as in :func:`cosine_agreement`.
        data_range: R: 1 for maps in [0, 1].
        window: odd; both sides of a map must be at least as long.
        sigma: of the Gaussian, in pixels.

    Returns:
        ``[n]`` as :func:`cosine_agreement`; equal maps have 1, constant ones included.

    Raises:
        ValueError, TypeError: as there; a window that is even or longer than a side.

    >>> import torch
    >>> maps = torch.eye(16)[None]
    >>> ssim_agreement(maps, maps)
    tensor([1.])
    """
    dtype = _check_pair(first, second)
    check_ssim_options(data_range, window, sigma)
    if window > min(first.shape[1:]):
        raise ValueError(
            f"window: expected an odd number of pixels, at most the {min(first.shape[1:])} of the"
            f" maps' shorter side, got {window}"
        )
    value = structural_similarity(
        first.detach(), second.detach(), data_range=data_range, window=window, sigma=sigma
    )
    return value.to(dtype)


def structural_similarity(
    first: Tensor,
    second: Tensor,
    *,
    data_range: float = 1.0,
    window: int = 11,
    sigma: float = 1.5,
) -> Tensor:
    """:func:`ssim_agreement` of checked maps, ``[n]`` float64, with a gradient in both."""
    places = torch.arange(window, dtype=torch.float64, device=first.device) - window // 2
    kernel = (-(places / sigma).square() / 2).exp()
    kernel = kernel / kernel.sum()
    # Variances are differences of squares: in float64 nothing is lost by it.
    a, b = first.double(), second.double()
    x = torch.stack([a, b, a * a, b * b, a * b]).flatten(0, 1)[:, None]
    x = F.conv2d(F.conv2d(x, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    mean_a, mean_b, aa, bb, ab = x[:, 0].unflatten(0, (5, -1))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    numerator = (2 * mean_a * mean_b + c1) * (2 * (ab - mean_a * mean_b) + c2)
    spread = (aa - mean_a.square()) + (bb - mean_b.square())
    value = numerator / ((mean_a.square() + mean_b.square() + c1) * (spread + c2))
    return value.mean((1, 2))


def check_ssim_options(data_range: float, window: int, sigma: float) -> None:
    check_positive(data_range=data_range, sigma=sigma)
    check_counts(window=window)
    if window % 2 == 0:
        raise ValueError(f"window: expected an odd number of pixels, got {window}")


def top_agreement(first: Tensor, second: Tensor, *, fraction: float = 0.1) -> Tensor:
    """Intersection over union of the most relevant pixels of two maps of each image.

    Args:
        first, second: as in :func:`cosine_agreement`.
        fraction: of the pixels, above 0 and at most 1; rounded, at least one pixel. Of equal
            pixels the first in reading order count, so that the number is exact.

    Returns:
        ``[n]`` in [0, 1], as :func:`cosine_agreement`.

    Raises:
        ValueError, TypeError: as there; a fraction beyond (0, 1].

    >>> import torch
    >>> a, b = torch.tensor([[[9.0, 8, 1, 0]]]), torch.tensor([[[9.0, 0, 8, 1]]])
    >>> top_agreement(a, b, fraction=0.5)
    tensor([0.3333])
    """
    dtype = _check_pair(first, second)
    check_fraction(fraction)
    count = max(1, round(fraction * first[0].numel()))
    a, b = (pixel_order(m.detach()).flatten(1) < count for m in (first, second))
    value = (a & b).sum(1, dtype=dtype) / (a | b).sum(1, dtype=dtype)
    return nan_where_map_is(first, nan_where_map_is(second, value))


def check_fraction(fraction: float) -> None:
    check_number("fraction", fraction)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: expected 0 < fraction <= 1, got {fraction}")


MEASURES = {
    "cosine": cosine_agreement,
    "pearson": pearson_agreement,
    "spearman": spearman_agreement,
    "ssim": ssim_agreement,
    "top": top_agreement,
}


def _check_pair(first: Any, second: Any) -> torch.dtype:
    """The dtype of the answer."""
    check_maps(first, "first")
    check_maps(second, "second")
    if first.shape != second.shape:
        raise ValueError(
            f"second: expected the shape of first, {list(first.shape)}, got {list(second.shape)}"
        )
    if first.device != second.device:
        raise ValueError(
            f"second: expected the device of first, {first.device}, got {second.device}"
        )
    return torch.promote_types(exact_dtype(first), exact_dtype(second))


def _rows(maps: Tensor) -> Tensor:
    return maps.detach().flatten(1).double()


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    # A constant row minus its mean is rounding; minus its first value it is 0.
    a, b = a - a[:, :1], b - b[:, :1]
    return _cosine(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    # Divided by their largest first: a square must neither overflow nor vanish.
    a, b = (x / _or_one(x.abs().amax(1, keepdim=True)) for x in (a, b))
    lengths = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return ((a * b).sum(1) / _or_one(lengths)).clamp(-1, 1)


def _or_one(divisor: Tensor) -> Tensor:
    return divisor.where(divisor != 0, 1)


def _mean_ranks(maps: Tensor) -> Tensor:
    flat = maps.detach().flatten(1).to(exact_dtype(maps)).contiguous()
    ordered = flat.sort(1).values
    first, behind = (torch.searchsorted(ordered, flat, right=right) for right in (False, True))
    return (first + behind).double()
