"""Pointing game, energy inside, and grids of images."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastxkd
from fastxkd import (
    box_masks,
    energy_pointing_game,
    grid_pointing_game,
    image_grids,
    pointing_game,
)
from tests.conftest import needs

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def hit(m: Tensor, mask: Tensor, tolerance: float) -> float:
    """One pixel after the other."""
    best = max(
        ((i, j) for i in range(m.shape[0]) for j in range(m.shape[1])),
        key=lambda at: (m[at].item(), -at[0], -at[1]),
    )
    for i in range(m.shape[0]):
        for j in range(m.shape[1]):
            away = (i - best[0]) ** 2 + (j - best[1]) ** 2
            if mask[i, j] and (away == 0 or away < tolerance**2):
                return 1.0
    return 0.0


def inside(m: Tensor, mask: Tensor) -> float:
    positive = [max(v, 0.0) for v in m.double().flatten().tolist()]
    part = sum(v for v, on in zip(positive, mask.flatten().tolist(), strict=True) if on)
    return part / sum(positive) if sum(positive) else 0.0


def data(n: int = 6, h: int = 11, w: int = 13) -> tuple[Tensor, Tensor]:
    masks = torch.rand(n, h, w) < 0.02
    masks[:, 4, 7] = True
    return torch.randn(n, h, w, dtype=torch.float64), masks


# --- the pointing games


@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("tolerance", [None, 0, 1, 1.001, 2.5, 100])
def test_pointing_is_the_rule(tolerance: float | None, n: int) -> None:
    maps, masks = data(n)
    found = pointing_game(maps, masks, tolerance=tolerance)
    pixels = 15 * 11 / 224 if tolerance is None else tolerance
    assert found.tolist() == [hit(*p, pixels) for p in zip(maps, masks, strict=True)]


def test_pointing_is_strict_at_the_tolerance() -> None:
    """TorchRay: squared distance < 225 at 224 pixels."""
    maps, masks = torch.zeros(2, 224, 300), torch.zeros(2, 224, 300, dtype=torch.bool)
    maps[:, 100, 100] = 1
    masks[0, 109, 112] = True  # 9^2 + 12^2 = 225
    masks[1, 109, 111] = True
    assert pointing_game(maps, masks).tolist() == [0, 1]


def test_pointing_of_several_maxima_takes_the_first() -> None:
    maps, masks = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.bool)
    masks[0, 0, 0] = masks[1, 1, 3] = True
    maps[1, 1, 3] = maps[1, 2, 0] = 5
    assert pointing_game(maps, masks, tolerance=0).tolist() == [1, 1]  # the first map is constant


@pytest.mark.parametrize("n", [1, 6])
def test_energy_is_the_formula(n: int) -> None:
    maps, masks = data(n)
    true = [inside(*p) for p in zip(maps, masks, strict=True)]
    assert energy_pointing_game(maps, masks).tolist() == pytest.approx(true, abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    maps, masks = data()
    maps = maps.to(dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    hits, energy = pointing_game(maps, masks, tolerance=3), energy_pointing_game(maps, masks)
    assert hits.dtype == energy.dtype == exact
    assert hits.tolist() == [hit(*p, 3) for p in zip(maps, masks, strict=True)]
    true = [inside(*p) for p in zip(maps, masks, strict=True)]
    assert energy.tolist() == pytest.approx(true, abs=1e-6)


def test_energy_of_maps_without_mass() -> None:
    maps = torch.stack([torch.zeros(3, 3), -torch.ones(3, 3), torch.full((3, 3), 1e-38)])
    masks = torch.zeros(3, 3, 3, dtype=torch.bool)
    masks[:, 0] = True
    assert energy_pointing_game(maps, masks).tolist() == pytest.approx([0, 0, 1 / 3])
    assert energy_pointing_game(maps + 1, torch.zeros_like(masks)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("game", [pointing_game, energy_pointing_game])
def test_nan_is_of_its_image_only(game: Callable[..., Tensor]) -> None:
    maps, masks = data()
    clean = game(maps, masks)
    maps[2, 5, 5] = torch.nan
    found = game(maps, masks)
    assert found.isnan().tolist() == [i == 2 for i in range(6)]
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(found[rest], clean[rest])
    assert not game(maps.requires_grad_(), masks).requires_grad


@pytest.mark.parametrize("game", [pointing_game, energy_pointing_game])
@pytest.mark.parametrize(
    ("maps", "masks", "error", "text"),
    [
        ([1], torch.ones(2, 3, 3).bool(), TypeError, "maps: expected a Tensor, got list"),
        (torch.ones(3, 3), torch.ones(3, 3).bool(), ValueError, r"maps: expected \[n, h, w\]"),
        (torch.ones(2, 3, 3), torch.ones(2, 3, 3), TypeError, "masks: expected a bool Tensor"),
        (torch.ones(2, 3, 3), torch.ones(2, 3, 4).bool(), ValueError, r"masks: expected \[2, 3, 3"),
    ],
    ids=str,
)
def test_games_refuse(
    game: Callable[..., Tensor], maps: Any, masks: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        game(maps, masks)


def test_pointing_refuses() -> None:
    maps, masks = data()
    with pytest.raises(ValueError, match="tolerance: expected"):
        pointing_game(maps, masks, tolerance=-1)
    masks[3] = False
    with pytest.raises(ValueError, match=r"masks: .*got none for image 3"):
        pointing_game(maps, masks)


# --- boxes


def test_boxes() -> None:
    boxes = torch.tensor([[1, 0, 3, 2], [0, 0, 5, 4], [-3, 2, 2, 9], [2, 2, 2, 3]])
    masks = box_masks(boxes, (4, 5))
    true = torch.zeros(4, 4, 5, dtype=torch.bool)
    for m, (left, top, right, bottom) in zip(true, boxes.clamp(min=0).tolist(), strict=True):
        m[top:bottom, left:right] = True
    assert torch.equal(masks, true)
    # Fractions: pixels whose centre is inside.
    assert box_masks(torch.tensor([[0.4, 0.0, 1.6, 0.6]]), (2, 3)).tolist() == [
        [[True, True, False], [False, False, False]]
    ]
    with pytest.raises(ValueError, match=r"boxes: expected \[n, 4\], got \[4\]"):
        box_masks(torch.zeros(4), (2, 2))
    with pytest.raises(TypeError, match="boxes: expected a Tensor"):
        box_masks([[0, 0, 1, 1]], (2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="height: expected at least 1"):
        box_masks(boxes, (0, 2))


# --- grids


@pytest.mark.parametrize("cells", [1, 2, 3])
def test_grids_are_filled_row_by_row(cells: int) -> None:
    images = torch.randn(2 * cells**2, 3, 4, 5)
    for given in (images, images.to(memory_format=torch.channels_last)):
        grids = image_grids(given, cells=cells)
        assert grids.shape == (2, 3, cells * 4, cells * 5)
        for i, image in enumerate(images):
            grid, place = divmod(i, cells**2)
            row, column = divmod(place, cells)
            cell = grids[grid, :, row * 4 : row * 4 + 4, column * 5 : column * 5 + 5]
            assert torch.equal(cell, image)


def pixelwise(x: Tensor, targets: Tensor) -> Tensor:
    return x[torch.arange(len(x)), targets]


@pytest.mark.parametrize("cells", [2, 3])
def test_grid_game_is_the_formula(cells: int) -> None:
    k = cells**2
    images = torch.randn(2 * k, 12, 4, 5, dtype=torch.float64)
    labels = torch.cat([torch.randperm(12)[:k] for _ in range(2)])
    found = grid_pointing_game(pixelwise, images, labels, cells=cells)
    true = []
    for i, label in enumerate(labels.tolist()):
        start = i // k * k
        positive = [images[j, label].clamp(min=0).sum().item() for j in range(start, start + k)]
        true.append(positive[i - start] / sum(positive))
    assert found.tolist() == pytest.approx(true, abs=1e-12)


def test_grid_game_of_the_best_and_of_none() -> None:
    images = torch.eye(4)[:, :, None, None].expand(4, 4, 3, 3)
    labels = torch.arange(4)
    assert grid_pointing_game(pixelwise, images, labels).tolist() == [1, 1, 1, 1]
    even = grid_pointing_game(lambda x, targets: torch.ones(len(x), 6, 6), images, labels)
    assert even.tolist() == [0.25] * 4
    zero = grid_pointing_game(lambda x, targets: -torch.ones(len(x), 6, 6), images, labels)
    assert zero.tolist() == [0] * 4


def test_grid_game_of_nan() -> None:
    def explain(x: Tensor, targets: Tensor) -> Tensor:
        maps = pixelwise(x, targets)
        maps[1, 0, 0] = torch.nan
        return maps

    images = torch.rand(4, 4, 3, 3)
    found = grid_pointing_game(explain, images, torch.arange(4))
    assert found.isnan().tolist() == [False, True, False, False]


def test_grid_game_with_an_explainer() -> None:
    """A network that counts colours: its maps lie where the colour is."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4)[:, :, None, None])
    images = torch.zeros(8, 4, 5, 5)
    labels = torch.tensor([0, 1, 2, 3, 2, 0, 3, 1])
    images[torch.arange(8), labels] = 1
    explain = functools.partial(fastxkd.HiResCAM(model, "0"), normalize=None)
    assert grid_pointing_game(explain, images, labels).tolist() == pytest.approx([1] * 8)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"explain": None}, TypeError, "explain: expected a callable, got NoneType"),
        ({"explain": lambda x, targets: x}, ValueError, r"explain: expected \[n, h, w\]"),
        (
            {"explain": lambda x, targets: x[:, 0, :5]},
            ValueError,
            r"explain: expected maps \[8, 6, 6\], got \[8, 5, 6\]",
        ),
        ({"images": torch.rand(7, 4, 3, 3)}, ValueError, "images: expected a multiple of 4"),
        ({"cells": 0}, ValueError, "cells: expected at least 1"),
        ({"labels": torch.arange(7)}, ValueError, r"labels: expected \[8\]"),
        ({"labels": torch.arange(8).float()}, TypeError, "labels: expected torch.int64"),
        (
            {"labels": torch.tensor([0, 1, 2, 3, 3, 1, 0, 3])},
            ValueError,
            r"labels: expected 4 different classes in a grid, got \[3, 1, 0, 3\] in grid 1",
        ),
    ],
)
def test_grid_game_refuses(change: dict[str, Any], error: type[Exception], text: str) -> None:
    given: dict[str, Any] = {
        "explain": pixelwise,
        "images": torch.rand(8, 4, 3, 3),
        "labels": torch.tensor([0, 1, 2, 3, 3, 2, 1, 0]),
        **change,
    }
    with pytest.raises(error, match=text):
        grid_pointing_game(given.pop("explain"), given.pop("images"), given.pop("labels"), **given)


# --- the metrics


def test_pointing_metric_is_the_mean_over_classes() -> None:
    maps, masks = data(9)
    labels = torch.tensor([0, 0, 0, 2, 2, 0, 0, 4, 0])
    hits = pointing_game(maps, masks, tolerance=4)
    by_class = torch.stack([hits[labels == c].mean() for c in (0, 2, 4)]).mean().item()
    metric, left, right = (fastxkd.PointingGame(classes=6, tolerance=4) for _ in range(3))
    plain = fastxkd.PointingGame(tolerance=4)
    for i, rows in enumerate(torch.arange(9).split([2, 6, 1])):
        metric(maps[rows], masks[rows], labels[rows])
        plain.update(maps[rows], masks[rows])
        (left if i else right).update(maps[rows], masks[rows], labels[rows])
    left.merge_state(right)
    for m in (metric, left, pickle.loads(pickle.dumps(metric))):
        assert m.compute().shape == ()
        assert m.compute().item() == pytest.approx(by_class, abs=1e-6)
    assert plain.compute().item() == pytest.approx(hits.mean().item(), abs=1e-6)
    metric.reset()
    with (
        pytest.raises(ValueError, match="PointingGame: compute"),
        pytest.warns(UserWarning, match="compute"),
    ):
        metric.compute()


def test_pointing_metric_refuses() -> None:
    maps, masks = data()
    with pytest.raises(ValueError, match="labels: expected labels beside classes"):
        fastxkd.PointingGame(classes=3).update(maps, masks)
    with pytest.raises(ValueError, match="labels: expected None without classes"):
        fastxkd.PointingGame().update(maps, masks, torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels: expected classes from 0 to 2, got 3"):
        fastxkd.PointingGame(classes=3).update(maps, masks, torch.full((6,), 3))
    with pytest.raises(ValueError, match=r"labels: expected \[6\]"):
        fastxkd.PointingGame(classes=3).update(maps, masks, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="classes: expected at least 1"):
        fastxkd.PointingGame(classes=0)
    with pytest.raises(ValueError, match="tolerance: expected a finite number of at least 0"):
        fastxkd.PointingGame(tolerance=-1)
    with pytest.raises(TypeError, match="tolerance: expected a number, got str"):
        fastxkd.PointingGame(tolerance="near")  # type: ignore[arg-type]


def test_energy_metric_over_batches() -> None:
    maps, masks = data(7)
    metric, left, right = (fastxkd.EnergyPointingGame() for _ in range(3))
    true = energy_pointing_game(maps, masks).mean().item()
    for i, rows in enumerate(torch.arange(7).split([1, 4, 2])):
        of_batch = metric(maps[rows], masks[rows]).item()
        assert of_batch == pytest.approx(
            energy_pointing_game(maps[rows], masks[rows]).mean().item(), abs=1e-6
        )
        (left if i else right).update(maps[rows], masks[rows])
    left.merge_state(right)
    for m in (metric, left, pickle.loads(pickle.dumps(metric))):
        assert m.compute().item() == pytest.approx(true, abs=1e-6)


def test_grid_metric_over_batches() -> None:
    images, labels = torch.randn(12, 4, 3, 3), torch.arange(12) % 4
    metric = fastxkd.GridPointingGame()
    for rows in torch.arange(12).split([4, 8]):
        metric.update(pixelwise, images[rows], labels[rows])
    true = grid_pointing_game(pixelwise, images, labels).mean().item()
    for m in (metric, pickle.loads(pickle.dumps(metric))):
        assert m.compute().item() == pytest.approx(true, abs=1e-6)
    metric.reset()
    metric.update(pixelwise, images[:4], labels[:4])
    true = grid_pointing_game(pixelwise, images[:4], labels[:4]).mean().item()
    assert metric.compute().item() == pytest.approx(true, abs=1e-6)
    with pytest.raises(ValueError, match="cells: expected at least 1"):
        fastxkd.GridPointingGame(cells=0)


def test_a_collection_keeps_metrics_apart_that_agree_at_first() -> None:
    torchmetrics = needs("torchmetrics")
    maps, masks = data()
    hits = {t: pointing_game(maps, masks, tolerance=t) for t in (0, 100)}
    first = hits[0] == hits[100]
    rest = ~first
    maps[first] = masks[first].double()  # hits at any tolerance
    assert rest.any()
    collection = torchmetrics.MetricCollection(
        {"near": fastxkd.PointingGame(tolerance=0), "far": fastxkd.PointingGame(tolerance=100)}
    )
    for rows in (first, rest):
        if rows.any():
            collection.update(maps[rows], masks[rows])
    found = collection.compute()
    for name, tolerance in (("near", 0), ("far", 100)):
        true = pointing_game(maps, masks, tolerance=tolerance).mean().item()
        assert found[name].item() == pytest.approx(true, abs=1e-6)


def test_pointing_metric_over_processes() -> None:
    maps, masks = data(9)
    labels = torch.arange(9) % 4
    whole, here, there = (fastxkd.PointingGame(classes=5, tolerance=3) for _ in range(3))
    whole.update(maps, masks, labels)
    here.update(maps[:2], masks[:2], labels[:2])
    there.update(maps[2:], masks[2:], labels[2:])
    others = iter([getattr(there, state) for state in there._reductions])
    here.sync(dist_sync_fn=lambda x, group: [x, next(others)], distributed_available=lambda: True)
    assert torch.equal(here.hits, whole.hits)
    assert torch.equal(here.seen, whole.seen)
