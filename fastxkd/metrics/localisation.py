"""Does a map lie where the object is: pointing game, energy inside, and grids of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastxkd.metrics._maps import check_images, check_maps, exact_dtype, nan_where_map_is
from fastxkd.ops._checks import check_counts, check_factors, check_labels


def pointing_game(maps: Tensor, masks: Tensor, *, tolerance: float | None = None) -> Tensor:
    """Pointing game (Zhang et al. 2016): is the most relevant pixel on the object, or near it?

    Args:
        maps: ``[n, h, w]``. Of several maxima the first in reading order counts.
        masks: ``[n, h, w]`` bool, the pixels of the object; of boxes see :func:`box_masks`. None
            may be empty.
        tolerance: a hit lies on the object or less than so many pixels from it. None: 15 pixels
            where the shorter side has 224, as TorchRay, and in proportion elsewhere.

    Returns:
        ``[n]``: 1 a hit, 0 a miss; float32, float64 for float64. NaN for a map with NaN.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, an empty mask.

    >>> import torch
    >>> maps = torch.tensor([[[0.0, 0.1, 0.9]]])
    >>> masks = torch.tensor([[[True, False, False]]])
    >>> pointing_game(maps, masks, tolerance=2), pointing_game(maps, masks, tolerance=2.5)
    (tensor([0.]), tensor([1.]))
    """
    _check_masks(maps, masks)
    h, w = maps.shape[1:]
    if tolerance is None:
        tolerance = 15 * min(h, w) / 224
    check_factors(tolerance=tolerance)
    empty = ~masks.flatten(1).any(1)
    if bool(empty.any()):
        raise ValueError(
            f"masks: expected at least one pixel of each object,"
            f" got none for image {int(empty.nonzero()[0])}"
        )
    peak = maps.detach().flatten(1).argmax(1)[:, None, None]
    rows = torch.arange(h, device=maps.device)[:, None] - peak // w  # [n, h, 1]
    columns = torch.arange(w, device=maps.device) - peak % w  # [n, 1, w]
    away = rows.square() + columns.square()
    near = (away == 0) | (away < tolerance * tolerance)
    hits = (near & masks).flatten(1).any(1).to(exact_dtype(maps))
    return nan_where_map_is(maps, hits)


def energy_pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    r"""Energy-based pointing game (Wang et al. 2020): how much of a map lies on the object.

    .. math:: \sum_{p \in mask} m_p / \sum_p m_p

    with negative values of m taken as 0.

    Args:
        maps, masks: as :func:`pointing_game`; masks may be empty.

    Returns:
        ``[n]`` in [0, 1], float32, float64 for float64; 0 for a map without positive values, NaN
        for a map with NaN.

    >>> import torch
    >>> energy_pointing_game(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[False, True]]]))
    tensor([0.7500])
    """
    _check_masks(maps, masks)
    energy = maps.detach().double().clamp(min=0).flatten(1)
    inside = (energy * masks.flatten(1)).sum(1)
    return _share(inside, energy.sum(1)).to(exact_dtype(maps))


def box_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks of boxes: the pixels whose centre lies inside.

    Args:
        boxes: ``[n, 4]``: left, top, right, bottom in pixels of the map; right and bottom are
            where the box ends, so that a box of one pixel is ``[x, y, x + 1, y + 1]``.
        size: (height, width) of the maps.

    Returns:
        ``[n, height, width]`` bool.

    >>> import torch
    >>> box_masks(torch.tensor([[1, 0, 3, 1]]), (2, 4))
    tensor([[[False,  True,  True, False],
             [False, False, False, False]]])
    """
    if not isinstance(boxes, Tensor):
        raise TypeError(f"boxes: expected a Tensor, got {type(boxes).__name__}")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes: expected [n, 4], got {list(boxes.shape)}")
    if not isinstance(size, Sequence) or len(size) != 2:
        raise ValueError(f"size: expected (height, width), got {size!r}")
    check_counts(height=size[0], width=size[1])
    left, top, right, bottom = boxes[:, :, None].unbind(1)  # [n, 1] each
    y, x = (torch.arange(length, device=boxes.device) + 0.5 for length in size)
    rows = (y >= top) & (y < bottom)
    columns = (x >= left) & (x < right)
    return rows[:, :, None] & columns[:, None, :]


def image_grids(images: Tensor, *, cells: int = 2) -> Tensor:
    """Grids of ``cells x cells`` images each, filled row by row.

    Args:
        images: ``[n, channels, h, w]``, n a multiple of ``cells^2``.

    Returns:
        ``[n / cells^2, channels, cells h, cells w]``.

    >>> import torch
    >>> image_grids(torch.arange(4.0).view(4, 1, 1, 1))
    tensor([[[[0., 1.],
              [2., 3.]]]])
    """
    check_images(images)
    check_counts(cells=cells)
    n, c, h, w = images.shape
    if n % cells**2:
        raise ValueError(
            f"images: expected a multiple of {cells**2}, the images of one grid, got {n}"
        )
    tiles = images.unflatten(0, (-1, cells, cells))
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(-1, c, cells * h, cells * w)


def grid_pointing_game(
    explain: Callable[..., Tensor], images: Tensor, labels: Tensor, *, cells: int = 2
) -> Tensor:
    """Grid pointing game (Böhle et al. 2021): each class of a grid explained, its image found?

    Images of different classes are put together in grids. Each grid is explained once for each
    of its classes; the score is the share of the map's positive values in the cell where that
    class is. A map that finds nothing out has ``1 / cells^2``.

    Args:
        explain: of grids ``[n, channels, cells h, cells w]`` and ``targets=`` int64 ``[n]`` to
            maps of the same size: an explainer of this library, best unscaled
            (``functools.partial(cam, normalize=None)``): min-max moves the zero.
        images: ``[n, channels, h, w]``, each ``cells^2`` in turn a grid. Grids should be of
            images that the model is sure of.
        labels: int64 ``[n]``, different within a grid.
        cells: images along each side of a grid.

    Returns:
        ``[n]``, one for each image: its share, float32, float64 for float64 maps; 0 where the map
        has no positive value, NaN where it has NaN.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, a class twice in a grid.

    >>> import torch
    >>> images = torch.eye(4)[:, :, None, None].expand(4, 4, 3, 3)
    >>> explain = lambda x, targets: x[torch.arange(len(x)), targets]
    >>> grid_pointing_game(explain, images, torch.tensor([0, 1, 2, 3]))
    tensor([1., 1., 1., 1.])
    """
    if not callable(explain):
        raise TypeError(f"explain: expected a callable, got {type(explain).__name__}")
    grids = image_grids(images, cells=cells)
    check_labels(labels, "images", images)
    places = cells**2
    ordered = labels.view(-1, places).sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(1)
    if bool(twice.any()):
        which = int(twice.nonzero()[0])
        raise ValueError(
            f"labels: expected {places} different classes in a grid, got"
            f" {labels.view(-1, places)[which].tolist()} in grid {which}"
        )
    maps = explain(grids.repeat_interleave(places, 0), targets=labels)
    check_maps(maps, "explain")
    n, h, w = images.shape[0], *images.shape[2:]
    if list(maps.shape) != [n, cells * h, cells * w]:
        raise ValueError(
            f"explain: expected maps {[n, cells * h, cells * w]}, got {list(maps.shape)}"
        )
    energy = maps.detach().double().clamp(min=0).view(n, cells, h, cells, w).sum((2, 4)).flatten(1)
    own = torch.arange(n, device=maps.device) % places
    return _share(energy.gather(1, own[:, None])[:, 0], energy.sum(1)).to(exact_dtype(maps))


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part / whole.where(whole != 0, 1)


def _check_masks(maps: Any, masks: Any) -> None:
    check_maps(maps)
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        got = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise TypeError(f"masks: expected a bool Tensor, got {got}")
    if masks.shape != maps.shape or masks.device != maps.device:
        raise ValueError(
            f"masks: expected {list(maps.shape)} on {maps.device}, as maps,"
            f" got {list(masks.shape)} on {masks.device}"
        )
