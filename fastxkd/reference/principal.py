"""principal: the first principal component of each image's channels, from an eigendecomposition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastxkd.reference.cam import exact_dtype

# How many elements of a batch are projected at once on a CPU: their copies stay in its cache.
CHUNK = 1 << 20

# Columns of a Gram matrix at a time.
BAND = 64


def principal(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Projection ``[n, p]`` and summed loadings ``[n]`` of ``[n, c, p]``, both float64."""
    on_cpu = parts.device.type == "cpu"
    rows = max(1, CHUNK // max(1, parts[0].numel())) if len(parts) else 1
    if on_cpu and len(parts) > rows:
        found = [principal(chunk) for chunk in parts.split(rows)]
        projections, sums = zip(*found, strict=True)
        return torch.cat(projections), torch.cat(sums)
    exact = exact_dtype(parts)
    # Products of float32 are of float32 only where nobody can have allowed them fewer digits.
    full = on_cpu and torch.get_float32_matmul_precision() != "medium"
    full = full and not torch.is_autocast_enabled("cpu")
    x = parts.to(exact if full else torch.float64)
    reach = torch.maximum(x.detach().amax((1, 2)), -x.detach().amin((1, 2)))
    finite = reach.isfinite()
    reach = torch.where(finite, reach, 1)
    # Squares shall neither overflow nor vanish; a power of two changes no digit.
    scale = torch.ldexp(torch.ones_like(reach), reach.frexp().exponent - 1)
    x = (x / scale[:, None, None]).nan_to_num_(0, 0, 0)
    x -= x.mean(2, keepdim=True)  # [n, c, p]
    wide = x.double()
    if x.shape[1] < x.shape[2]:
        vector, _ = _leading(x, wide)
        loadings = vector.detach().sum(1)
        projection = (vector[:, None] @ wide)[:, 0]
    else:
        vector, value = _leading(x.mT, wide.mT)
        length = torch.where(value > 0, value, 1).sqrt()
        loadings = (vector * wide.sum(1)).detach().sum(1) / length.detach()
        projection = torch.where(value > 0, length, 0)[:, None] * vector
    projection = torch.where(finite[:, None], projection * scale[:, None], float("nan"))
    return projection, torch.where(finite, loadings, float("nan"))


def _leading(x: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    """Leading left singular vectors ``[n, m]`` and squared singular values ``[n]`` of ``wide``,
    ``[n, m, k]`` in float64, of which ``x`` may be a rounded copy.

    The Gram matrix and its ``eigh`` are of ``x``; a step of first-order perturbation restores what
    they lose. That step is the gradient too: the one of ``eigh`` is NaN as soon as *any* two
    eigenvalues are equal, as the zeros of a deficient matrix are.
    """
    known = x.detach()
    gram = known.new_zeros(*x.shape[:2], x.shape[1])
    for i in range(0, x.shape[1], BAND):  # the lower triangle is all that eigh reads
        gram[:, i:, i : i + BAND] = known[:, i:] @ known[:, i : i + BAND].mT
    values, vectors = (found.double() for found in torch.linalg.eigh(gram, UPLO="L"))
    vector = F.normalize(vectors[..., -1:], dim=1)  # [n, m, 1], of length 1 in float64 too
    others = vectors[..., :-1]
    pull = wide @ (wide.mT @ vector)
    value = vector.mT @ pull
    gaps = value.detach() - values[:, :-1, None]
    # Where a gap is no more than rounding, the step must stay small all the same.
    least = torch.finfo(x.dtype).eps ** 0.5 * values[:, -1:, None]
    inverse = torch.where(gaps > 0, 1 / gaps.maximum(least), 0)
    moved = others @ (inverse * (others.mT @ (pull - value * vector)))
    return (vector + moved)[..., 0], value[:, 0, 0]
