"""Attributions to pixels: closed forms, loops written out, captum where it is installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastxkd.cam.attribution import (
    attribution_maps,
    gradient_shap,
    input_x_gradient,
    integrated_gradients,
    occlusion,
)
from tests.conftest import needs

EVERY = (input_x_gradient, integrated_gradients, gradient_shap, occlusion)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.Softplus(), nn.BatchNorm2d(5), nn.Dropout(0.5),
        nn.Conv2d(5, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 6 * 5, 3),
    ).double()  # fmt: skip


def pictures(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 2, 8, 7, dtype=torch.float64)


def gradient(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    images = images.clone().requires_grad_(True)
    model.eval()(images).gather(1, targets[:, None]).sum().backward()
    return images.grad


def test_input_x_gradient_is_the_product():
    model, images, targets = network(), pictures(), torch.tensor([2, 0, 1])
    found = input_x_gradient(model, images, targets)
    torch.testing.assert_close(found, images * gradient(model, images, targets))


def test_integrated_gradients_of_one_hidden_layer_are_a_closed_form():
    r"""Along the way each unit's :math:`u = w x + c` is linear, so that the mean of tanh's slope is
    a quotient of differences. The slope is analytic up to :math:`\pm i \pi / 2`: with
    :math:`|u_1 - u_0| < 2` Bernstein's ellipse has :math:`\rho > 3.4`, and 24 points are off by
    :math:`\rho^{-48} < 10^{-25}`. What is left is rounding."""
    torch.manual_seed(1)
    inner, outer = nn.Linear(112, 6).double(), nn.Linear(6, 3).double()
    images, targets = pictures(), torch.tensor([2, 0, 1])
    base = 0.3 * torch.ones(2, 8, 7, dtype=torch.float64)
    with torch.no_grad():
        before, after = inner(base.flatten()), inner(images.flatten(1))
        assert 0.1 < (after - before).abs().max() < 2
        slope = (after.tanh() - before.tanh()) / (after - before)
        expected = (outer.weight[targets] * slope) @ inner.weight * (images - base).flatten(1)
    model = nn.Sequential(nn.Flatten(), inner, nn.Tanh(), outer)
    found = integrated_gradients(model, images, targets, baseline=base, steps=24)
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-12, atol=1e-14)


def test_integrated_gradients_are_complete():
    model, images, targets = network(), pictures(), torch.tensor([2, 0, 1])
    base = 0.3 * torch.ones(2, 8, 7, dtype=torch.float64)
    found = integrated_gradients(model, images, targets, baseline=base, steps=24)
    model.eval()
    with torch.no_grad():
        rise = (model(images) - model(base.expand_as(images))).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.sum((1, 2, 3)), rise, rtol=0, atol=1e-12)


def test_gradient_shap_of_a_linear_model_and_its_mean():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(112, 3)).double()
    images, base = pictures(), pictures(1)
    found = gradient_shap(linear, images, 1, baselines=base, samples=3)
    weight = linear[1].weight[1].view(1, 2, 8, 7)
    torch.testing.assert_close(found, (images - base) * weight.detach())
    # Its expectation over one baseline is integrated gradients.
    model = network()
    generator = torch.Generator().manual_seed(3)
    drawn = gradient_shap(model, images, 0, baselines=base, samples=4000, generator=generator)
    exact = integrated_gradients(model, images, 0, baseline=base)
    assert (drawn - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_what_is_drawn_depends_on_the_generator_alone(noise):
    model, images, base = network(), pictures(), pictures(5)
    options = {"baselines": base, "samples": 5, "noise": noise}
    first, again, other = (
        gradient_shap(
            model, images, 0, batch_size=size, generator=torch.Generator().manual_seed(seed),
            **options,
        )
        for size, seed in ((64, 1), (2, 1), (64, 2))
    )  # fmt: skip
    torch.testing.assert_close(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize(("window", "stride"), [(3, 2), (4, 4), (1, 1), (9, 5)])
def test_occlusion_equals_a_loop(window, stride):
    model, images, targets = network().eval(), pictures(), torch.tensor([2, 0, 1])
    found = occlusion(
        model, images, targets, window=window, stride=stride, baseline=0.5, batch_size=7
    )
    with torch.no_grad():
        full = model(images).gather(1, targets[:, None])[:, 0]
        total, often = torch.zeros(3, 8, 7, dtype=torch.float64), torch.zeros(8, 7)
        for top in range(0, max(1, 8 - window + stride), stride):
            for left in range(0, max(1, 7 - window + stride), stride):
                hidden = images.clone()
                hidden[:, :, top : top + window, left : left + window] = 0.5
                drop = full - model(hidden).gather(1, targets[:, None])[:, 0]
                total[:, top : top + window, left : left + window] += drop[:, None, None]
                often[top : top + window, left : left + window] += 1
    assert (often > 0).all()
    torch.testing.assert_close(found[:, 0], total / often)


def test_captum_agrees():
    captum = needs("captum.attr")
    model, images, targets = network().eval(), pictures(), torch.tensor([2, 0, 1])
    theirs = captum.IntegratedGradients(model).attribute(images, target=targets, n_steps=32)
    ours = integrated_gradients(model, images, targets, steps=32)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    theirs = captum.InputXGradient(model).attribute(images.clone().requires_grad_(), target=targets)
    torch.testing.assert_close(input_x_gradient(model, images, targets), theirs.detach())
    theirs = captum.Occlusion(model).attribute(
        images, sliding_window_shapes=(2, 3, 3), strides=(2, 2, 2), target=targets
    )
    ours = occlusion(model, images, targets, window=3, stride=2)
    theirs = theirs.double()  # captum puts it out in single precision
    torch.testing.assert_close(ours.expand_as(theirs), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attribute", EVERY)
def test_the_model_is_left_as_it_was(attribute):
    model = network().train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = pictures()
    with torch.inference_mode():
        found = attribute(model, images.clone())
    assert found.shape[0] == 3
    assert model.training
    assert not model[2].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    # Without targets each image's first choice is explained; one at a time gives the same.
    if attribute is not gradient_shap:
        alone = torch.cat([attribute(model, image[None]) for image in images])
        torch.testing.assert_close(found.clone(), alone)


class InPlace(nn.Module):
    """Works on the very images that it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images):
        images -= 0.5
        return self.inner(images.relu_())


@pytest.mark.parametrize("attribute", EVERY)
def test_a_model_may_work_in_place(attribute):
    model, images, targets = network(), pictures(), torch.tensor([2, 0, 1])
    found, kept = [], images.clone()
    for each in (InPlace(model), lambda x: model.eval()((x - 0.5).relu())):
        torch.manual_seed(0)
        found.append(attribute(each, images, targets))
        assert torch.equal(images, kept)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("attribute", EVERY)
def test_no_more_run_at_once_than_the_batch_size(attribute):
    model, images, seen = network().eval(), pictures(11), []

    def watched(points):
        seen.append(len(points))
        return model(points)

    found = []
    for size in (4, 1000):
        torch.manual_seed(0)
        found.append(attribute(watched, images, batch_size=size))
        assert (max(seen) <= 4) == (size == 4)
    torch.testing.assert_close(*found)


def test_one_image_with_nan_spoils_no_other():
    model, images = network(), pictures()
    images[1, 0, 0, 0] = float("nan")
    good = integrated_gradients(model, images[[0, 2]], 0)
    torch.testing.assert_close(integrated_gradients(model, images, 0)[[0, 2]], good)


def test_maps_of_attributions():
    given = torch.tensor([[[[-3.0, 1.0], [0.0, 2.0]], [[1.0, 1.0], [0.0, 0.0]]]])
    absolute = attribution_maps(given)[0]
    torch.testing.assert_close(absolute, torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    positive = attribution_maps(given, sign="positive")[0]
    torch.testing.assert_close(positive, torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    assert (attribution_maps(torch.ones(2, 3, 4, 4)) == 0).all()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m, x: integrated_gradients(m, x, steps=0), "steps: expected at least 1, got 0"),
        (lambda m, x: occlusion(m, x, window=2, stride=3), "stride: expected at most the window"),
        (lambda m, x: integrated_gradients(m, x, baseline=x[:2]), "baseline: expected a shape"),
        (lambda m, x: gradient_shap(m, x, baselines=x[0]), r"baselines: expected a number or \[b"),
        (lambda m, x: input_x_gradient(m, x[0]), r"images: expected \[n, channels"),
        (lambda m, x: input_x_gradient(m, x, 3), "targets: expected 0 <= class < 3, got 3"),
        (lambda m, x: input_x_gradient(lambda i: torch.ones(3, 2), x), "does not depend"),
        (lambda m, x: attribution_maps(x, sign="both"), "sign: expected one of absolute"),
    ],
)
def test_wrong_input_is_named(call, text):
    with pytest.raises(ValueError, match=text):
        call(network(), pictures())


def test_a_quadrature_needs_few_steps():
    model = lambda x: x.flatten(1) ** 5  # noqa: E731
    image = torch.full((1, 1, 1, 2), 2.0, dtype=torch.float64)
    found = integrated_gradients(model, image, 0, steps=3)
    np.testing.assert_allclose(found.numpy().ravel(), [32.0, 0.0], atol=1e-12)
