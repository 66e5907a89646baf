"""Input gradients, their maps and ranks, and what they align with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxkd.metrics.input_gradients import (
    gradient_alignment,
    gradient_maps,
    input_gradients,
    kept_pixels,
    ranked_pixels,
    sobel_maps,
)
from fastxkd.metrics.interpretability import GradientAlignment


class Net(nn.Module):
    """Batch norm and dropout: what a pass in train mode would betray."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(5 * 16, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(images)).tanh().flatten(1)))


def net() -> Net:
    model = Net().double().train()
    model.norm.running_mean.normal_()
    return model


# --- gradients


@pytest.mark.parametrize("of", ["loss", "logit", "probability"])
def test_gradient_is_the_slope(of: str) -> None:
    """Against differences, one image and one pixel at a time."""
    model, images = net(), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    labels = torch.tensor([3, 0, 2])
    found = input_gradients(model, images, labels, of=of)
    assert model.training
    model.eval()

    def value(image: Tensor, label: int) -> float:
        with torch.no_grad():
            logits = model(image[None])[0]
        p = logits.softmax(0)
        return {"loss": -p.log(), "logit": logits, "probability": p}[of][label].item()

    for i in range(3):
        for c, y, x in [(0, 0, 0), (1, 3, 2), (0, 5, 5)]:
            up, down = images[i].clone(), images[i].clone()
            up[c, y, x] += 1e-5
            down[c, y, x] -= 1e-5
            slope = (value(up, labels[i].item()) - value(down, labels[i].item())) / 2e-5
            assert found[i, c, y, x].item() == pytest.approx(slope, abs=1e-8)


def test_model_and_images_are_left_as_they_were() -> None:
    model, images = net(), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        first = input_gradients(model, images)
    with torch.inference_mode():
        labels = model.eval()(images).argmax(1)
        second = input_gradients(model, images, labels)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not images.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_images_do_not_reach_each_other() -> None:
    model, images = net(), torch.randn(4, 2, 6, 6, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3])
    whole = input_gradients(model, images, labels)
    alone = torch.cat(
        [input_gradients(model, images[i : i + 1], labels[i : i + 1]) for i in range(4)]
    )
    torch.testing.assert_close(whole, alone, rtol=1e-12, atol=1e-14)
    images[1, 0, 0, 0] = torch.nan
    broken = input_gradients(model, images, labels)
    assert torch.equal(broken[[0, 2, 3]], input_gradients(model, images, labels)[[0, 2, 3]])
    assert not broken[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("of", ["loss", "probability"])
def test_a_model_that_is_sure_has_gradients_as_exact_as_any(of: str) -> None:
    """1 - p of the right class, from 0.5 to 1e-30, where float32 has 1 from 6e-8 on."""
    sure = torch.tensor([0.0, 10.0, 15.0, 17.5, 25.0, 70.0])
    weight = torch.tensor([[2.0, -1.0, 3.0, 0.5], [0.25, 1.0, -2.0, 1.0], [-1.0, 0.5, 1.5, 2.0]])

    def model(images: Tensor) -> Tensor:
        return images.flatten(1) @ weight.T + sure[:, None] * torch.tensor([0.0, 1.0, 0.0])

    found = input_gradients(model, torch.zeros(6, 1, 2, 2), torch.ones(6, dtype=torch.long), of=of)
    # By hand: 1 - p = 2 / (2 + e^sure), half of it for either of the others.
    rest = 2 / (2 + sure.double().exp())
    slope = (weight[0] + weight[2]).double() / 2 - weight[1]
    factor = rest if of == "loss" else -rest * (1 - rest)
    wanted = factor[:, None] * slope
    torch.testing.assert_close(found.flatten(1).double(), wanted, rtol=2e-6, atol=0)


def test_a_single_class_has_no_slope() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
    assert not input_gradients(model, torch.rand(2, 1, 2, 2), torch.zeros(2).long()).any()


def test_maps_and_ranks() -> None:
    gradients = torch.tensor([[[[1.0, -2.0]], [[-3.0, 0.5]]]])
    assert gradient_maps(gradients).tolist() == [[[3.0, 2.0]]]
    assert gradient_maps(gradients, channels="sum").tolist() == [[[4.0, 2.5]]]
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    model[1].weight.data = torch.tensor([[1.0, -5.0, 0.0, 2.0], [0.0, 0.0, 9.0, 0.0]])
    images, labels = torch.zeros(2, 1, 2, 2), torch.tensor([0, 1])
    assert ranked_pixels(model, images, labels, of="logit").tolist() == [
        [[2, 0], [3, 1]],
        [[1, 2], [0, 3]],
    ]


def test_gradients_that_are_no_numbers_have_no_order() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    images = torch.rand(3, 1, 2, 2)
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="got NaN in 1 images"):
        ranked_pixels(model, images, torch.zeros(3).long())


def test_kept_pixels_by_hand() -> None:
    maps = torch.tensor([[[5.0, 1.0, 1.0, 0.0, 9.0]]])
    for keep, fraction, wanted in [
        ("top", 0.2, [0, 0, 0, 0, 1]),
        ("top", 0.01, [0, 0, 0, 0, 1]),
        ("top", 0.6, [1, 1, 0, 0, 1]),
        ("bottom", 0.2, [0, 0, 0, 1, 0]),
        ("bottom", 0.4, [0, 0, 1, 1, 0]),
        ("bottom", 1.0, [1, 1, 1, 1, 1]),
    ]:
        assert kept_pixels(maps, fraction, keep=keep)[0, 0].int().tolist() == wanted
    maps = torch.randn(3, 8, 8)
    top, bottom = (kept_pixels(maps, 0.5, keep=keep) for keep in ("top", "bottom"))
    assert torch.equal(top, ~bottom)


# --- alignment


def blur(m: np.ndarray, sigma: float) -> np.ndarray:
    """Each pixel the weighted mean of those around it, indices held at the edges."""
    reach = max(1, int(np.ceil(4 * sigma)))
    place = np.arange(-reach, reach + 1)
    weight = np.exp(-(place[:, None] ** 2 + place**2) / (2 * sigma**2))
    weight /= weight.sum()
    h, w = m.shape
    out = np.zeros_like(m)
    for i in range(h):
        for j in range(w):
            y, x = np.clip(i + place, 0, h - 1), np.clip(j + place, 0, w - 1)
            out[i, j] = (weight * m[np.ix_(y, x)]).sum()
    return out


@pytest.mark.parametrize("sigma", [0, 0.2, 1.0, 2.5])
@pytest.mark.parametrize("channels", ["max", "sum"])
def test_alignment_is_the_formula(channels: str, sigma: float) -> None:
    gradients = torch.randn(3, 2, 7, 9, dtype=torch.float64)
    masks = torch.rand(3, 7, 9) < 0.3
    found = gradient_alignment(gradients, masks, channels=channels, sigma=sigma)
    for i in range(3):
        g = abs(gradients[i].numpy())
        g = g.max(0) if channels == "max" else g.sum(0)
        a, b = (blur(g, sigma) if sigma else g).ravel(), masks[i].double().numpy().ravel()
        assert found.cosine[i].item() == pytest.approx(
            a @ b / np.sqrt((a @ a) * (b @ b)), abs=1e-12
        )
        assert found.pearson[i].item() == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)


def test_alignment_of_nothing_and_of_nan() -> None:
    gradients, masks = torch.randn(3, 1, 6, 6), torch.rand(3, 6, 6) < 0.5
    gradients[0], masks[1], gradients[2, 0, 0, 0] = 0, False, torch.nan
    found = gradient_alignment(gradients, masks)
    assert found.cosine.dtype == torch.float32
    assert found.cosine[:2].tolist() == found.pearson[:2].tolist() == [0, 0]
    assert found.cosine.isnan().tolist() == [False, False, True]


def test_sobel_is_the_two_filters() -> None:
    images = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=torch.float64)
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None]
    x, y = (F.conv2d(padded, k.view(1, 1, 3, 3)).view(images.shape) for k in (across, across.T))
    edges = (x**2 + y**2).sqrt()
    torch.testing.assert_close(sobel_maps(images), edges.amax(1))
    torch.testing.assert_close(sobel_maps(images, channels="sum"), edges.sum(1))
    assert sobel_maps(torch.full((1, 1, 4, 4), 0.1)).abs().max() < 1e-7


def test_metric_is_the_mean() -> None:
    model = net()
    images, labels = torch.randn(7, 2, 6, 6, dtype=torch.float64), torch.randint(4, (7,))
    masks = torch.rand(7, 6, 6) < 0.4
    gradients = input_gradients(model, images, labels)
    for truth in (masks, None):
        metric = GradientAlignment(channels="sum", sigma=0.5)
        for part in (slice(0, 2), slice(2, 7)):
            metric.update(model, images[part], labels[part], None if truth is None else truth[part])
        wanted = gradient_alignment(
            gradients, sobel_maps(images) if truth is None else truth, channels="sum", sigma=0.5
        )
        found = metric.compute()
        assert found["cosine"].item() == pytest.approx(wanted.cosine.mean().item(), abs=1e-6)
        assert found["pearson"].item() == pytest.approx(wanted.pearson.mean().item(), abs=1e-6)


# --- what does not fit

IMAGES = torch.randn(2, 2, 6, 6, dtype=torch.float64)
MASKS = torch.ones(2, 6, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: input_gradients(net(), IMAGES[0]), ValueError, r"images: expected \[n, channels"),
        (lambda: input_gradients(3, IMAGES), TypeError, "model: expected a callable"),  # type: ignore[arg-type]
        (
            lambda: input_gradients(net(), IMAGES, torch.tensor([0])),
            ValueError,
            r"labels: expected \[2\]",
        ),
        (
            lambda: input_gradients(net(), IMAGES, torch.tensor([0, 4])),
            ValueError,
            "labels: expected classes from 0 to 3",
        ),
        (lambda: input_gradients(net(), IMAGES, of="sum"), ValueError, "of: expected one of loss"),
        (
            lambda: input_gradients(lambda x: torch.zeros(2, 3), IMAGES),
            ValueError,
            "model: its logits do not depend on the images",
        ),
        (
            lambda: input_gradients(lambda x: x, IMAGES),
            ValueError,
            r"model: expected logits \[2, classes\]",
        ),
        (lambda: gradient_maps(IMAGES, channels="mean"), ValueError, "channels: expected one of"),
        (lambda: kept_pixels(IMAGES[:, 0], 0), ValueError, "fraction: expected 0 < fraction <= 1"),
        (
            lambda: kept_pixels(IMAGES[:, 0], 0.5, keep="middle"),
            ValueError,
            "keep: expected one of top, bottom",
        ),
        (
            lambda: gradient_alignment(IMAGES, MASKS[:, :5]),
            ValueError,
            r"truth: expected \[2, 6, 6\]",
        ),
        (lambda: gradient_alignment(IMAGES, MASKS.int()), TypeError, "truth: expected a float"),
        (lambda: gradient_alignment(IMAGES, MASKS, sigma=-1), ValueError, "sigma: expected"),
        (lambda: GradientAlignment(of="x"), ValueError, "of: expected"),
        (lambda: GradientAlignment(sigma=float("nan")), ValueError, "sigma: expected"),
    ],
)
def test_what_does_not_fit_is_named(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()
