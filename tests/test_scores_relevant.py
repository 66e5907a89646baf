"""Relevant features: half of each image kept, the other half solved for, then scored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastxkd
from tests import oracles


def imputed(image: Tensor, keep: Tensor) -> Tensor:
    """One channel: every removed pixel the weighted mean of its neighbours, by a dense solve."""
    h, w = image.shape
    index = {p: k for k, p in enumerate(map(tuple, (~keep).nonzero().tolist()))}
    a, b = np.zeros((len(index), len(index))), np.zeros(len(index))
    for (i, j), k in index.items():
        for di in (-1, 0, 1):
            for dj in (-1, 0, 1):
                p = (i + di, j + dj)
                if (di, dj) == (0, 0) or not (0 <= p[0] < h and 0 <= p[1] < w):
                    continue
                weight = 1 / 12 if di and dj else 1 / 6
                a[k, k] += weight
                if p in index:
                    a[k, index[p]] -= weight
                else:
                    b[k] += weight * image[p].item()
    found = image.clone()
    for p, value in zip(index, np.linalg.solve(a, b), strict=True):
        found[p] = value
    return found


@pytest.mark.parametrize("percentile", [1, 20, 50, 95, 100])
def test_the_most_relevant_pixels_stay(percentile: float) -> None:
    images, maps = torch.randn(2, 3, 9, 7), torch.rand(2, 9, 7)
    found = fastxkd.metrics.relevant_images(images, maps, percentile=percentile, noise=0)
    for image, m, out in zip(images, maps, found, strict=True):
        limit = np.percentile(m.numpy(), 100 - percentile)
        keep = m.double() > limit if percentile < 100 else torch.ones_like(m, dtype=torch.bool)
        assert keep.sum() == max(1, -(-percentile * 62 // 100)) or percentile == 100
        assert torch.equal(out[:, keep], image[:, keep])
        for channel, mine in zip(image.double(), out, strict=True):
            torch.testing.assert_close(mine.double(), imputed(channel, keep), rtol=0, atol=2e-3)


def test_relevance_of_relevant_features() -> None:
    """A class told by the middle of the image; maps that point there beat maps that do not."""
    labels = torch.arange(60) % 3
    images = torch.randn(60, 1, 8, 8)
    images[:, :, 3:5, 3:5] += 2 * labels[:, None, None, None]
    layer = nn.Conv2d(1, 4, 3)
    middle = torch.zeros(60, 8, 8)
    middle[:, 2:6, 2:6] = 1
    scores = []
    for maps in (middle, 1 - middle):
        seen = fastxkd.metrics.relevant_images(images, maps, percentile=25, noise=0)
        with torch.no_grad():
            features = layer(seen)
        metric = fastxkd.RelevanceScore()
        metric.update(features, labels)
        scores.append(metric.compute().item())
        g = torch.nn.functional.one_hot(labels).double()
        true = oracles.correlation(features.double(), g, unbiased=True)
        assert scores[-1] == pytest.approx(true.item(), abs=1e-5)
    assert scores[0] > scores[1] + 0.1


@pytest.mark.parametrize("by_name", [True, False])
def test_relevant_features_are_the_recipe(by_name: bool) -> None:
    """Step by step: HiResCAM by hand, the dense solve, a forward hook."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 9, 5),
    )
    model[1].running_mean.uniform_(-1, 1)
    images, labels = torch.randn(4, 2, 8, 8), torch.tensor([3, 0, 4, 4])
    state = {k: v.clone() for k, v in model.state_dict().items()}
    layers = ["2", "4"] if by_name else [model[2], model[4]]
    found = fastxkd.relevant_features(model, layers, images, labels, percentile=30, noise=0)
    assert list(found) == ["2", "4"]
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model.eval()
    for name, features in found.items():
        cut = int(name) + 1
        with torch.no_grad():
            activation = model[:cut](images)
        activation.requires_grad_(True)
        probability = model[cut:](activation).softmax(1)[torch.arange(4), labels].sum()
        (gradient,) = torch.autograd.grad(probability, activation)
        maps = (gradient * activation).sum(1).relu().detach()
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        maps = (maps - low) / (high - low)
        maps = nn.functional.interpolate(maps[:, None], (8, 8), mode="bilinear")[:, 0]
        order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
        keep = torch.zeros(4, 64, dtype=torch.bool).scatter_(1, order[:, :19], True).view(4, 8, 8)
        kept = maps.flatten(1).gather(1, order)
        assert (kept[:, 18] > kept[:, 19]).all()  # no tie decides what is kept
        seen = torch.stack(
            [
                torch.stack([imputed(c, k) for c in image.double()])
                for image, k in zip(images, keep, strict=True)
            ]
        )
        with torch.no_grad():
            true = model[:cut](seen.float())
        assert not features.requires_grad
        torch.testing.assert_close(features, true, rtol=0, atol=5e-3)


def test_relevant_features_of_wrong_labels() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3))
    images = torch.rand(4, 1, 8, 8)
    with pytest.raises(TypeError, match="labels: expected an int64 Tensor, got list"):
        fastxkd.relevant_features(model, ["0"], images, [0, 1, 2, 0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels: expected \[4\], got \[3\]"):
        fastxkd.relevant_features(model, ["0"], images, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels: expected classes in \[0, 3\), got 0 to 3"):
        fastxkd.relevant_features(model, ["0"], images, torch.arange(4))
    with pytest.raises(ValueError, match="layers: Sequential has no layer named 'conv'"):
        fastxkd.relevant_features(model, "conv", images, torch.zeros(4, dtype=torch.long))
    assert model.training


def test_relevant_features_of_what_was_made_in_inference_mode() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4) % 3
    (true,) = fastxkd.relevant_features(model, ["1"], images, labels, noise=0).values()
    with torch.inference_mode():
        made = images.clone(), labels.clone()
        (inside,) = fastxkd.relevant_features(model, ["1"], *made, noise=0).values()
    (outside,) = fastxkd.relevant_features(model, ["1"], *made, noise=0).values()
    assert torch.equal(inside, true)
    assert torch.equal(outside, true)


def test_noise_and_errors() -> None:
    images, maps = torch.randn(2, 3, 6, 6, requires_grad=True), torch.rand(2, 6, 6)

    def seeded() -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return fastxkd.metrics.relevant_images(images, maps, noise=0.1, generator=generator)

    assert torch.equal(seeded(), seeded())
    assert not seeded().requires_grad
    for percentile in (0, 101):
        with pytest.raises(ValueError, match=r"percentile: expected a number in \(0, 100\]"):
            fastxkd.metrics.relevant_images(images, maps, percentile=percentile)
    with pytest.raises(ValueError, match="maps: expected"):
        fastxkd.metrics.relevant_images(images, maps[:, 1:])
