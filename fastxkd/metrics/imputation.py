"""Noisy linear imputation: what is removed from an image becomes the mean of what is around it.

Each removed pixel is the weighted mean of its eight neighbours, removed ones included: one sparse
system per image, of as many unknowns as pixels were removed. All systems of a batch are solved
together on their device, by conjugate gradients with one multigrid V-cycle as preconditioner:
about as many iterations for a large hole as for a small one.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastxkd.metrics._maps import check_images, exact_dtype
from fastxkd.ops._checks import check_counts, check_factors, check_generator, check_positive

OFFSETS = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
COARSEST = 64  # unknowns that are solved for by a dense inverse
CPU_BLOCK = 4 * 3 * 224 * 224  # values, with which a processor's cache is full
# The eigenvalues of rapidly changing errors lie in [2/3, 4/3] on the image's grid and in
# [3/4, 3/2] on the others: each damping is 2 over the sum of the two.
FINE_DAMPING, DAMPING = 1.0, 8 / 9


def linear_imputation(
    images: Tensor,
    keep: Tensor,
    *,
    noise: float = 0.01,
    generator: torch.Generator | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
) -> Tensor:
    r"""Noisy linear imputation of ROAD (Rong et al. 2022): removed pixels from their neighbours.

    Every removed pixel satisfies

    .. math:: x_p = \sum_{q} w_{pq} x_q / \sum_{q} w_{pq} + \epsilon,\quad
        \epsilon \sim N(0, noise^2)

    over its neighbours q inside the image, removed or not, with w = 1/6 beside and above, 1/12
    across. The linear system is solved without the noise, which is added at the end, to removed
    pixels only.

    Args:
        images: ``[n, channels, h, w]``, usually normalised.
        keep: ``[n, h, w]`` bool; at least one pixel of each image must be kept.
        noise: standard deviation, in the units of ``images``.
        generator: of the noise, on the images' device; None is torch's own. The same seed gives
            the same noise on one kind of device.
        tolerance: the solver stops where its last step moved no pixel by more than this share of
            the range of the kept values of its channel. At 1e-4, far below the noise, the error
            is of the same size.
        max_iterations: about 10 suffice; a bound where rounding stands in the way of ``tolerance``.

    Returns:
        As ``images``; kept pixels are untouched. Solved in float32, float64 for float64. NaN in
        one channel stays in it. No gradient.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, an image of which nothing is kept.

    >>> import torch
    >>> image = torch.tensor([[[[0.0, 5.0, 6.0]]]])
    >>> keep = torch.tensor([[[True, False, True]]])
    >>> linear_imputation(image, keep, noise=0)
    tensor([[[[0., 3., 6.]]]])
    """
    check_images(images)
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        got = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise TypeError(f"keep: expected a bool Tensor, got {got}")
    n, _, h, w = images.shape
    if keep.shape != (n, h, w) or keep.device != images.device:
        raise ValueError(
            f"keep: expected {[n, h, w]} on {images.device},"
            f" got {list(keep.shape)} on {keep.device}"
        )
    check_factors(noise=noise)
    check_positive(tolerance=tolerance)
    check_counts(max_iterations=max_iterations)
    check_generator(generator)
    empty = ~keep.flatten(1).any(1)
    if bool(empty.any()):
        raise ValueError(
            f"keep: expected at least one pixel of each image,"
            f" got none of image {int(empty.nonzero()[0])}"
        )
    return impute(images, keep, draw(images, noise, generator), tolerance, max_iterations)


def draw(images: Tensor, noise: float, generator: torch.Generator | None) -> Tensor | None:
    """The noise of a batch; None is none of it."""
    if not noise:
        return None
    like: dict[str, Any] = {"device": images.device, "dtype": exact_dtype(images)}
    return torch.randn(images.shape, generator=generator, **like) * noise


@torch.no_grad()
def impute(
    images: Tensor, keep: Tensor, noise: Tensor | None, tolerance: float, max_iterations: int = 100
) -> Tensor:
    """:func:`linear_imputation` of arguments known to be good."""
    kept = keep[:, None]
    block = max(1, CPU_BLOCK // images[0].numel()) if images.is_cpu else len(images)
    with torch.autocast(images.device.type, enabled=False):
        filled = torch.cat(
            [
                _solve(some.to(exact_dtype(some)), where, tolerance, max_iterations)
                for some, where in zip(images.split(block), kept.split(block), strict=True)
            ]
        )
    if noise is not None:
        filled.add_(noise)
    return torch.where(kept, images, filled.to(images.dtype))


def _solve(images: Tensor, kept: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    """Conjugate gradients, one system for each image and channel."""
    # What is kept, less its mean: with it the solution shrinks to what is not constant.
    counts = kept.sum((2, 3), keepdim=True)
    mean = images.where(kept, 0).sum((2, 3), keepdim=True) / counts
    known = (images - mean).where(kept, 0)
    top = known.where(kept, -torch.inf).amax((2, 3), keepdim=True)
    bottom = known.where(kept, torch.inf).amin((2, 3), keepdim=True)
    spread = top - bottom
    # Rounding moves pixels as well: those of a constant channel would never be still.
    enough = tolerance * spread + torch.finfo(images.dtype).eps * (mean.abs() + spread)

    hierarchy = _Hierarchy(~kept, images.dtype)
    h, w = images.shape[2:]
    # The right side: what the kept neighbours of a removed pixel hold.
    r = _twice_smoothed(_framed(_rows(known), w), w) * (hierarchy.levels[0].unknown / 12)
    x = torch.zeros_like(r)
    z = hierarchy.cycle(r)
    p = z
    rz = _dot(r, _core(z, w))
    for _ in range(max_iterations):
        q = hierarchy.apply(0, p)
        # A system that is solved has nothing left to divide.
        curvature = _dot(_core(p, w), q)
        step = torch.where(curvature > 0, rz / curvature, 0)
        x.addcmul_(step, _core(p, w))
        moved = step.abs() * p.abs().amax(2, keepdim=True)
        if not bool((moved > enough[..., 0]).any()):
            break
        r.addcmul_(step, q, value=-1)
        z = hierarchy.cycle(r)
        before, rz = rz, _dot(r, _core(z, w))
        p = z.addcmul_(torch.where(before > 0, rz / before, 0), p)
    # NaN and infinities among the kept leave nothing to impute from.
    return (_grid(x, h, w) + mean).where(enough.isfinite(), torch.nan)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(2, keepdim=True)


# A grid is kept as its rows one after the other, with a 0 behind each, [n, c, h (w + 1)]: all left
# neighbours are then one slice, and so on. Framed, there are zeros for the neighbours of the first
# and the last row as well.


def _rows(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1)).flatten(2)


def _grid(rows: Tensor, h: int, w: int) -> Tensor:
    return rows.unflatten(2, (h, w + 1))[..., :w]


def _framed(rows: Tensor, w: int) -> Tensor:
    return F.pad(rows, (w + 2, w + 2))


def _core(frame: Tensor, w: int) -> Tensor:
    return frame[..., w + 2 : -(w + 2)]


def _twice_smoothed(frame: Tensor, w: int) -> Tensor:
    """[1, 2, 1] along both axes: 12 times the neighbours' mean, 4 times the point itself over."""
    x = frame[..., :-1] + frame[..., 1:]
    x = x[..., :-1] + x[..., 1:]
    x = x[..., : -(w + 1)] + x[..., w + 1 :]
    return x[..., : -(w + 1)] + x[..., w + 1 :]


def _coarsen(x: Tensor) -> Tensor:
    """The transpose of :func:`_refine`: each coarse value gathers the 3 x 3 around it."""
    h, w = x.shape[2:]
    x = F.pad(x, (1, 2 - w % 2, 1, 2 - h % 2))
    x = torch.add(x[:, :, 1:-1:2], x[:, :, :-2:2] + x[:, :, 2::2], alpha=0.5)
    return torch.add(x[..., 1:-1:2], x[..., :-2:2] + x[..., 2::2], alpha=0.5)


def _refine(x: Tensor, h: int, w: int) -> Tensor:
    """Bilinear: coarse values lie at the even pixels, the last perhaps beyond the border."""
    for axis in (2, 3):
        size = x.shape[axis]
        shape = list(x.shape)
        shape[axis] = 2 * size - 1
        fine = x.new_empty(shape)
        even, odd = (fine.transpose(2, axis)[:, :, k::2].transpose(2, axis) for k in (0, 1))
        even.copy_(x)
        torch.lerp(x.narrow(axis, 0, size - 1), x.narrow(axis, 1, size - 1), 0.5, out=odd)
        x = fine
    return x[..., :h, :w]


def _stencil(removed: Tensor) -> Tensor:
    """The system's coefficients, ``[n, 3, 3, h, w]``: of a pixel and the 3 x 3 around it."""
    n, _, h, w = removed.shape
    around = F.pad(removed, (1, 1, 1, 1))
    stencil = removed.new_empty(n, 9, h, w)
    for k, (a, b) in enumerate(OFFSETS):
        near = around[:, 0, 1 + a : 1 + a + h, 1 + b : 1 + b + w]
        torch.mul(near, removed[:, 0] * (-1 / 12 if a and b else -1 / 6), out=stencil[:, k])
    ones = _rows(torch.ones_like(removed[:1]))
    inside = _twice_smoothed(_framed(ones, w), w) / 12 - ones / 3  # of the weights, in the image
    inside = inside.where(inside > 0, 1)  # a single pixel has no neighbours
    stencil[:, 4:5] = _grid(inside, h, w) * removed
    return stencil.unflatten(1, (3, 3))


def _coarse_stencil(stencil: Tensor) -> Tensor:
    """The coefficients that the coarser grid sees through _refine: first rows, then columns."""
    for axis in (0, 1):
        shape = list(stencil.shape)
        size = shape[3 + axis]
        shape[3 + axis] = size // 2 + 1
        fine, stencil = stencil, stencil.new_zeros(shape)
        # The neighbour k of the fine point i beside a coarse one, and the coarse point c beside
        # that one which the neighbour is interpolated from.
        for c, k, i in itertools.product((-1, 0, 1), repeat=3):
            weight = _hat(i) * _hat(i + k - 2 * c)
            if weight:
                first = int(i < 0)  # none is before the border, nor behind
                count = (size - 1 - i) // 2 + 1 - first
                places = (..., slice(2 * first + i, None, 2), slice(None))[: 3 - axis]
                seen = fine.select(1 + axis, 1 + k)[places]
                out = stencil.select(1 + axis, 1 + c)
                out.narrow(2 + axis, first, count).add_(seen, alpha=weight)
    return stencil


def _hat(distance: int) -> float:
    """What a coarse value counts for so many fine points away."""
    return max(0.0, 1 - abs(distance) / 2)


class _Level(NamedTuple):
    h: int
    w: int
    stencil: Tensor  # [n, 9, rows]; of level 0, the diagonal [n, 1, rows] plus 1/3
    damped: Tensor  # [n, 1, rows]: damping over the diagonal, 0 where there is no unknown
    unknown: Tensor  # [n, 1, rows] of 0 and 1


class _Hierarchy:
    """The systems of one batch at every resolution, each the one above seen through _refine."""

    def __init__(self, removed: Tensor, dtype: torch.dtype) -> None:
        h, w = removed.shape[2:]
        removed = removed.to(dtype)
        stencil = _stencil(removed)
        unknown = _rows(removed)
        diagonal = _rows(stencil[:, 1, 1:2])
        inverse = unknown / diagonal.where(diagonal > 0, 1)
        self.levels = [_Level(h, w, diagonal + unknown / 3, FINE_DAMPING * inverse, unknown)]
        while h * w > COARSEST:
            stencil = _coarse_stencil(stencil)
            h, w = stencil.shape[3:]
            coefficients = _rows(stencil.flatten(1, 2))
            diagonal = coefficients[:, 4:5]
            unknown = (diagonal > 0).to(dtype)
            inverse = unknown / diagonal.where(diagonal > 0, 1)
            self.levels.append(_Level(h, w, coefficients, DAMPING * inverse, unknown))
        self.inverse = self._coarsest_inverse()

    def _coarsest_inverse(self) -> Tensor:
        h, w, _, _, unknown = self.levels[-1]
        eye = torch.eye(h * w, dtype=unknown.dtype, device=unknown.device)
        points = _rows(eye.view(1, h * w, h, w)) * unknown
        columns = _grid(self.apply(len(self.levels) - 1, _framed(points, w)), h, w)
        # Four coarse unknowns around a single removed pixel say the same: the diagonal, a little
        # larger, makes the matrix regular, and _refine sees nothing of the difference.
        # In float64, whose products no setting of torch lets a device round.
        matrix = columns.flatten(2).double()
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        larger = 100 * torch.finfo(unknown.dtype).eps * diagonal
        matrix = matrix + torch.diag_embed(torch.where(diagonal > 0, larger, 1))
        found: Tensor = torch.linalg.inv_ex(matrix)[0]
        return found

    def apply(self, level: int, frame: Tensor) -> Tensor:
        """The system of that level times a framed grid, which is 0 where there is no unknown."""
        _, w, stencil, _, unknown = self.levels[level]
        if level == 0:
            out = stencil * _core(frame, w)
            return out.addcmul_(unknown, _twice_smoothed(frame, w), value=-1 / 12)
        out = stencil[:, 4:5] * _core(frame, w)
        for k, (a, b) in enumerate(OFFSETS):
            if k != 4:
                start = (1 + a) * (w + 1) + 1 + b
                out.addcmul_(stencil[:, k : k + 1], frame[..., start : start + out.shape[2]])
        return out

    def cycle(self, r: Tensor, level: int = 0) -> Tensor:
        """A V-cycle: an approximate solution for the residual r, framed; symmetric in r."""
        h, w, _, damped, unknown = self.levels[level]
        if level == len(self.levels) - 1:
            solved = (self.inverse @ _grid(r, h, w).flatten(2).mT.double()).mT.to(r)
            return _framed(_rows(solved.unflatten(2, (h, w))) * unknown, w)
        frame = _framed(damped * r, w)
        x = _core(frame, w)
        coarse = self.levels[level + 1]
        rest = _coarsen(_grid(r - self.apply(level, frame), h, w))
        better = _grid(_core(self.cycle(_rows(rest), level + 1), coarse.w), coarse.h, coarse.w)
        x.addcmul_(_rows(_refine(better, h, w)), unknown)
        x.addcmul_(damped, r - self.apply(level, frame))
        return frame
