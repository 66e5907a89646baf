"""Attributions to pixels: gradients at an image or on the way to it, and what hiding a patch costs.

Each is of a class's logit, in eval mode, without a trace on the model: no ``.grad``, flags as
they were. The images stay as they were as well, also where the model works in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxkd.cam.capture import evaluating
from fastxkd.cam.targets import Resolved, class_score, resolve_targets, row_scores
from fastxkd.ops._checks import (
    check_choice,
    check_counts,
    check_factors,
    check_float,
    check_generator,
    check_number,
)
from fastxkd.reference.cam import exact_dtype, min_max

__all__ = [
    "SIGNS",
    "attribution_maps",
    "gradient_shap",
    "input_x_gradient",
    "integrated_gradients",
    "occlusion",
]

SIGNS = ("absolute", "positive")
Model = Callable[[Tensor], Any]


def input_x_gradient(
    model: Model, images: Tensor, targets: Any = None, *, batch_size: int = 64
) -> Tensor:
    r"""Input times gradient (Shrikumar et al. 2016): :math:`x \cdot \partial z_c / \partial x`.

    Args:
        model: images to logits ``[n, classes]``.
        images: ``[n, channels, height, width]`` with n > 0.
        targets: as for :class:`GradCAM`: None (arg-max of each image) | int | list of int |
            int64 ``[n]`` | a callable on a row of the output, or a list of them.
        batch_size: how many images run at once.

    Returns:
        ``[n, channels, height, width]``, float32, float64 for float64 images. No gradient.

    Raises:
        ValueError, TypeError: images, targets or outputs that do not fit.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2, bias=False))
    >>> images = torch.ones(1, 1, 2, 2)
    >>> torch.equal(input_x_gradient(model, images, 1).flatten(), model[1].weight[1])
    True
    """
    check_counts(batch_size=batch_size)
    with _asked(model, images) as images:
        resolved = _resolved(model, images, targets, batch_size)
        return _gradients(model, images, resolved, batch_size).mul_(images)


def integrated_gradients(
    model: Model,
    images: Tensor,
    targets: Any = None,
    *,
    baseline: float | Tensor = 0.0,
    steps: int = 32,
    batch_size: int = 64,
) -> Tensor:
    r"""Integrated gradients (Sundararajan et al. 2017), from a baseline to the image.

    .. math:: (x - b) \int_0^1 \frac{\partial z_c}{\partial x}(b + \alpha (x - b)) \, d\alpha

    by Gauss-Legendre quadrature. Their sum over an image is :math:`z_c(x) - z_c(b)`, up to the
    quadrature's error, which tells whether ``steps`` are enough.

    Args:
        model, images, targets: as in :func:`input_x_gradient`.
        baseline: a number or a tensor that broadcasts to ``images``; 0 is the mean colour of
            normalised images.
        steps: points on the way.
        batch_size: how many points run at once, of all images together.

    Returns, raises: as :func:`input_x_gradient`.

    >>> import torch
    >>> model = lambda x: x.flatten(1) ** 3
    >>> integrated_gradients(model, torch.full((1, 1, 1, 2), 2.0), 0, steps=4).round(decimals=4)
    tensor([[[[8., 0.]]]])
    """
    check_counts(steps=steps, batch_size=batch_size)
    with _asked(model, images) as images:
        resolved = _resolved(model, images, targets, batch_size)
        start = _like(images, baseline)
        way = images - start
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        total = torch.zeros_like(images, dtype=exact_dtype(images))
        for first, last in _runs(steps, len(images), batch_size):
            share = torch.tensor((nodes[first:last] + 1) / 2).to(images)
            weight = torch.tensor(weights[first:last] / 2).to(total)
            points = (start + share.view(-1, 1, 1, 1, 1) * way).flatten(0, 1)
            found = _gradients(model, points, _repeated(resolved, last - first), batch_size)
            total += torch.einsum("s,snchw->nchw", weight, found.unflatten(0, (last - first, -1)))
        return total.mul_(way)


def gradient_shap(
    model: Model,
    images: Tensor,
    targets: Any = None,
    *,
    baselines: float | Tensor = 0.0,
    samples: int = 20,
    noise: float = 0.0,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Gradient SHAP (Lundberg and Lee 2017; Erion et al. 2021): gradients at random places.

    .. math:: \frac1S \sum_s (x_s - b_s) \frac{\partial z_c}{\partial x}
        (b_s + \alpha_s (x_s - b_s)), \quad \alpha_s \sim U(0, 1)

    with a random row of ``baselines`` as b and :math:`x_s` the image plus noise.

    Args:
        model, images, targets, batch_size: as in :func:`integrated_gradients`.
        baselines: a number, or ``[b, channels, height, width]`` to draw from.
        samples: S.
        noise: standard deviation of what is added to the image.
        generator: the source of all that is random, on the CPU; by default torch's own.

    Returns, raises: as :func:`input_x_gradient`.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    >>> images = torch.rand(3, 1, 2, 2)
    >>> found = gradient_shap(model, images, 0, samples=4)
    >>> torch.allclose(found, input_x_gradient(model, images, 0))
    True
    """
    check_counts(samples=samples, batch_size=batch_size)
    check_factors(noise=noise)
    check_generator(generator)
    with _asked(model, images) as images:
        resolved = _resolved(model, images, targets, batch_size)
        rows = _baselines(images, baselines)
        n, total = len(images), torch.zeros_like(images, dtype=exact_dtype(images))
        for first, last in _runs(samples, n, batch_size):
            count = last - first
            # One sample after the other, so that a draw does not depend on the batch size.
            drawn = [_draw(len(rows), images, noise, generator) for _ in range(count)]
            row, share, shift = (torch.stack(each) for each in zip(*drawn, strict=True))
            start = rows[row.to(images.device)]
            way = images + shift.to(images.device) - start
            points = start + share.to(images).view(count, n, 1, 1, 1) * way
            points = points.flatten(0, 1)
            found = _gradients(model, points, _repeated(resolved, count), batch_size)
            total += (found.view_as(way) * way).sum(0)
        return total.div_(samples)


def occlusion(
    model: Model,
    images: Tensor,
    targets: Any = None,
    *,
    window: int = 4,
    stride: int = 2,
    baseline: float | Tensor = 0.0,
    batch_size: int = 64,
) -> Tensor:
    """Occlusion (Zeiler and Fergus 2014): what hiding a square takes from the class's logit.

    A pixel's value is the mean over the squares that hide it. Squares start at every
    ``stride``-th pixel; the last ones may reach beyond the image.

    Args:
        model, images, targets, baseline, batch_size: as in :func:`integrated_gradients`.
        window: side of the square, in pixels.
        stride: at most ``window``, so that every pixel is hidden once at least.

    Returns:
        ``[n, 1, height, width]`` as :func:`input_x_gradient`.

    Raises:
        ValueError, TypeError: as there; a stride above the window.

    >>> import torch
    >>> model = lambda x: x.sum((2, 3))
    >>> occlusion(model, torch.ones(1, 1, 1, 4), 0, window=2, stride=2).flatten().tolist()
    [2.0, 2.0, 2.0, 2.0]
    """
    check_counts(window=window, stride=stride, batch_size=batch_size)
    if stride > window:
        raise ValueError(f"stride: expected at most the window, {window}, got {stride}")
    with _asked(model, images) as images, torch.no_grad():
        n, (height, width) = len(images), images.shape[2:]
        output = _output(model, images, batch_size)
        resolved = resolve_targets(output, targets, n)
        everyone = torch.arange(n, device=images.device)
        exact = exact_dtype(images)
        full = row_scores(output, resolved, everyone).to(exact)
        hidden_by = _like(images, baseline)
        down, across = (max(0, math.ceil((side - window) / stride)) + 1 for side in (height, width))
        places = torch.arange(down * across, device=images.device)
        drops = []
        for first, last in _runs(len(places), n, batch_size):
            inside_y = _within(places[first:last] // across * stride, window, height)
            inside_x = _within(places[first:last] % across * stride, window, width)
            hidden = (inside_y[:, :, None] & inside_x[:, None, :])[:, None, None]
            altered = torch.where(hidden, hidden_by, images).flatten(0, 1)
            whose = everyone.repeat(last - first).split(batch_size)
            left = torch.cat(
                [
                    row_scores(model(part), resolved, of)
                    for part, of in zip(altered.split(batch_size), whose, strict=True)
                ]
            )
            drops.append(full - left.to(exact).view(-1, n))
        grid = torch.cat(drops).T.reshape(n, 1, down, across)
        square = torch.ones(1, 1, window, window, dtype=exact, device=images.device)
        spread = F.conv_transpose2d(grid, square, stride=stride)
        often = F.conv_transpose2d(torch.ones_like(grid[:1]), square, stride=stride)
        return (spread / often)[..., :height, :width].contiguous()


def attribution_maps(attributions: Tensor, *, sign: str = "absolute") -> Tensor:
    """Attributions ``[n, channels, height, width]`` as maps ``[n, height, width]`` in [0, 1].

    The sum over channels, its magnitude or what of it is above 0, each map min-max scaled as
    those of the CAM family are. A constant one becomes 0.

    Args:
        sign: ``"absolute"``, or ``"positive"``: what speaks for the class alone.

    >>> import torch
    >>> attribution_maps(torch.tensor([[[[-4.0, 1.0, 2.0]]]]))
    tensor([[[1.0000, 0.0000, 0.3333]]])
    """
    check_float("attributions", attributions)
    if attributions.dim() != 4 or attributions.numel() == 0:
        raise ValueError(
            "attributions: expected [n, channels, height, width] with none of them 0, got"
            f" {list(attributions.shape)}"
        )
    check_choice("sign", sign, SIGNS)
    total = attributions.detach().sum(1, dtype=exact_dtype(attributions))
    return min_max(total.abs() if sign == "absolute" else total.clamp(min=0))


@contextmanager
def _asked(model: Model, images: Any) -> Iterator[Tensor]:
    """Images that a graph can start from, while the model is in eval mode."""
    check_float("images", images)
    if images.dim() != 4 or images.numel() == 0:
        raise ValueError(
            "images: expected [n, channels, height, width] with none of them 0, got"
            f" {list(images.shape)}"
        )
    with torch.inference_mode(False):
        images = images.clone() if images.is_inference() else images.detach()
        if not isinstance(model, nn.Module):
            yield images
            return
        with evaluating(model):
            yield images


def _resolved(model: Model, images: Tensor, targets: Any, batch_size: int) -> Resolved:
    with torch.no_grad():
        return resolve_targets(_output(model, images, batch_size), targets, len(images))


def _output(model: Model, images: Tensor, batch_size: int) -> Any:
    # Copies, which the model may change as it likes.
    parts = [model(part.clone()) for part in images.split(batch_size)]
    if len(parts) > 1 and all(isinstance(part, Tensor) and part.dim() for part in parts):
        return torch.cat(parts)
    return parts[0]


def _gradients(model: Model, points: Tensor, targets: Resolved, batch_size: int) -> Tensor:
    wanted = [targets[i : i + batch_size] for i in range(0, len(points), batch_size)]
    parts = zip(points.split(batch_size), wanted, strict=True)
    return torch.cat([_gradient(model, part, given) for part, given in parts])


def _gradient(model: Model, points: Tensor, targets: Resolved) -> Tensor:
    start = points.detach().requires_grad_(True)
    with torch.enable_grad():
        score = class_score(model(start.clone()), targets, None, len(start))
    found = None
    if score.requires_grad:
        (found,) = torch.autograd.grad(score, start, allow_unused=True)
    if found is None:
        raise ValueError("model: its output does not depend on the images")
    return found.to(exact_dtype(found))


def _repeated(targets: Resolved, times: int) -> Resolved:
    return targets.repeat(times) if isinstance(targets, Tensor) else targets * times


def _runs(count: int, n: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """``count`` variants of each of n images, a few at a time."""
    at_once = max(1, batch_size // n)
    for first in range(0, count, at_once):
        yield first, min(first + at_once, count)


def _like(images: Tensor, value: float | Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        check_number("baseline", value)
        return torch.full_like(images, float(value))
    check_float("baseline", value)
    try:
        return value.detach().to(images).expand_as(images)
    except RuntimeError:
        raise ValueError(
            f"baseline: expected a shape that broadcasts to images {list(images.shape)},"
            f" got {list(value.shape)}"
        ) from None


def _baselines(images: Tensor, given: float | Tensor) -> Tensor:
    if not isinstance(given, Tensor):
        check_number("baselines", given)
        return torch.full_like(images[:1], float(given))
    check_float("baselines", given)
    if given.dim() != 4 or given.shape[1:] != images.shape[1:] or len(given) == 0:
        raise ValueError(
            f"baselines: expected a number or [b, {', '.join(map(str, images.shape[1:]))}] like"
            f" the images, got {list(given.shape)}"
        )
    return given.detach().to(images)


def _draw(
    rows: int, images: Tensor, noise: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    n = len(images)
    row = torch.randint(rows, (n,), generator=generator)
    share = torch.rand(n, generator=generator, dtype=torch.float64)
    if noise == 0:
        return row, share, torch.zeros(1, 1, 1, 1, dtype=images.dtype)
    shift = torch.randn(images.shape, generator=generator, dtype=torch.float32)
    return row, share, (noise * shift).to(images.dtype)


def _within(first: Tensor, window: int, side: int) -> Tensor:
    at = torch.arange(side, device=first.device)
    return (at >= first[:, None]) & (at < first[:, None] + window)
