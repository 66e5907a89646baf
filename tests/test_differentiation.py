"""What autograd may not do quietly: forward mode, second derivatives, autocast, odd factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastxkd
from fastxkd import losses

TEACHER, LABELS = torch.randn(6, 5), torch.arange(6) % 5
HEADS = torch.randn(5, 5), torch.randn(5, 5)
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "kd": lambda x: losses.kd_loss(x, TEACHER, LABELS),
    "dkd": lambda x: losses.dkd_loss(x, TEACHER, LABELS),
    "dist": lambda x: losses.dist_loss(x, TEACHER, LABELS),
    "linear": lambda x: losses.linear_kd_loss(x, HEADS[0], TEACHER, HEADS[1], LABELS),
    "rkd": lambda x: losses.rkd_loss(x, TEACHER),
    "sp": lambda x: losses.sp_loss(x, TEACHER),
    "cc": lambda x: losses.cc_loss(x, TEACHER),
    "pkt": lambda x: losses.pkt_loss(x, TEACHER),
    "dc": lambda x: losses.dc_loss(x, TEACHER),
    "rows of kd": lambda x: losses.kd_loss(x, TEACHER, LABELS, reduction="none").square().sum(),
    "rows of linear": lambda x: losses.linear_kd_loss(
        x, HEADS[0], TEACHER, HEADS[1], LABELS, reduction="none"
    ).sum(),
}
MAP_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "at": lambda x: losses.at_loss(_planes(x), _planes(TEACHER)),
    "hcl": lambda x: losses.hcl_loss(_planes(x), _planes(TEACHER)),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def _planes(x: Tensor) -> Tensor:
    """``[6, 5]`` as two samples of three channels of 5 x 1."""
    return x.reshape(2, 3, 5, 1)


@every_loss
def test_a_gradient_penalty_is_refused(name: str) -> None:
    leaf = torch.randn(6, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(LOSSES[name](leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once|twice"):
        (grad.square().sum() + leaf.sum()).backward()


# torch builds its own rules of forward mode with torch.jit at their first use.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", [*LOSSES, *MAP_LOSSES])
def test_nested_transforms_are_refused(name: str) -> None:
    loss, x = {**LOSSES, **MAP_LOSSES}[name], torch.randn(6, 5)

    def penalty(x: Tensor) -> Tensor:
        return torch.func.grad(loss)(x).square().sum()

    assert penalty(x) > 0
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.grad(penalty)(x)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.jacrev(torch.func.grad(loss))(x)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.vmap(torch.func.grad(penalty))(torch.stack([x, -x]))
    for forward in (torch.func.jacfwd, torch.func.hessian):
        with pytest.raises((NotImplementedError, RuntimeError)):
            forward(penalty)(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    for transform in (torch.func.grad, torch.func.jacrev):
        torch.testing.assert_close(transform(loss)(x), expected)
    batch = torch.stack([x, expected])
    each = torch.stack([torch.func.grad(loss)(b) for b in batch])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(batch), each)


def test_nested_transforms_where_they_are_defined() -> None:
    """FitNet is plain torch under ``torch.func``: its second derivative is there."""
    target = _planes(TEACHER).double()

    def penalty(x: Tensor) -> Tensor:
        loss = torch.func.grad(lambda x: losses.fitnet_loss(_planes(x), target))
        return loss(x).square().sum()

    x = torch.randn(6, 5, dtype=torch.float64)
    found, step = torch.func.grad(penalty)(x), torch.randn(6, 5, dtype=torch.float64)
    rise = (penalty(x + 1e-4 * step) - penalty(x - 1e-4 * step)) / 2e-4
    torch.testing.assert_close((found * step).sum(), rise)


@every_loss
def test_vmap_of_a_leaf_keeps_its_gradient(name: str) -> None:
    """Within vmap a tensor does not say that it requires grad."""
    batch = torch.randn(3, 6, 5, requires_grad=True)
    losses_ = torch.func.vmap(LOSSES[name])(batch)
    (found,) = torch.autograd.grad(losses_.sum(), batch)
    copy = batch.detach().clone().requires_grad_(True)
    expected = torch.stack([LOSSES[name](x) for x in copy])
    torch.testing.assert_close(losses_, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), copy)[0])


# torch builds its own rules of forward mode with torch.jit at their first use.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "linear", "rkd"])
def test_forward_mode_is_refused(name: str) -> None:
    x = torch.randn(6, 5)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(LOSSES[name], (x,), (torch.ones(6, 5),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        LOSSES[name](torch.autograd.forward_ad.make_dual(x, torch.ones(6, 5)))


@pytest.mark.parametrize("name", ["sp", "cc", "pkt"])
def test_relations_keep_their_digits_under_autocast(name: str) -> None:
    x = torch.randn(6, 5, requires_grad=True)
    expected = LOSSES[name](x)
    with torch.autocast("cpu", torch.bfloat16):
        found = LOSSES[name](x)
    assert torch.equal(found, expected)
    grads = [torch.autograd.grad(loss, x)[0] for loss in (found, expected)]
    assert torch.equal(*grads)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "divergence": ({"divergence": "dkd"}, ValueError, "divergence: .* 'dkd'; use dkd_loss"),
    "temperature": (
        {"temperature": torch.tensor(4.0, requires_grad=True)},
        ValueError,
        "temperature: expected a number, got a tensor that requires grad",
    ),
    "text": ({"kd_weight": "a"}, TypeError, "kd_weight: expected a number, got str"),
    "ignore_index": ({"ignore_index": None}, TypeError, "ignore_index: expected an int, got None"),
    "weight dtype": (
        {"class_weight": torch.ones(5, dtype=torch.int64)},
        TypeError,
        "class_weight: expected a floating-point dtype, got torch.int64",
    ),
    "weight device": (
        {"class_weight": torch.ones(5, device="meta")},
        ValueError,
        "class_weight: expected the device of student_logits, cpu, got meta",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_factors(case: str) -> None:
    options, error, text = WRONG[case]
    with pytest.raises(error, match=text):
        fastxkd.kd_loss(torch.randn(6, 5), TEACHER, LABELS, **options)


def test_factors_may_be_any_number() -> None:
    x = torch.randn(6, 5)
    found = fastxkd.kd_loss(x, TEACHER, LABELS, temperature=torch.tensor(4.0), kd_weight=True)
    assert found == fastxkd.kd_loss(x, TEACHER, LABELS, temperature=4, kd_weight=1)


# --- class activation maps and distances

MAPS = ["gradcam", "gradcam++", "xgradcam", "hirescam", "layercam", "elementwise", "weights"]
COMPONENTS = {
    "eigencam": lambda a, g: fastxkd.cam_from(a, None, "eigencam"),
    "eigengradcam": lambda a, g: fastxkd.cam_from(a, g, "eigengradcam"),
    "eigen_smooth": lambda a, g: fastxkd.cam_from(a, g, eigen_smooth=True),
}
every_component = pytest.mark.parametrize("name", COMPONENTS)


def maps_and_gradients(method: str = "") -> tuple[Tensor, Tensor]:
    a, g = torch.rand(2, 3, 3, 2, dtype=torch.float64), torch.randn(2, 3, 3, 2).double()
    return a, g.mean((2, 3)) if method == "weights" else g


@pytest.mark.parametrize("method", MAPS)
def test_maps_are_differentiable_twice(method: str) -> None:
    a, g = (x.requires_grad_() for x in maps_and_gradients(method))

    def maps(a: Tensor, g: Tensor) -> Tensor:
        return fastxkd.cam_from(a, g, method, normalize=None, relu=False)

    assert torch.autograd.gradgradcheck(maps, (a, g))


def test_second_order_through_the_captured_graph(backend: str) -> None:
    """Gradients that are a function of the activations: of a sum of cubes."""
    a = torch.rand(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    maps = fastxkd.cam_from(a, a.square(), "hirescam", normalize=None, relu=False)
    (first,) = torch.autograd.grad(maps.sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), a)
    torch.testing.assert_close(first, 3 * a.square())
    torch.testing.assert_close(second, 6 * a)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", MAPS)
def test_maps_in_torch_func(method: str) -> None:
    a, g = maps_and_gradients(method)

    def score(a: Tensor) -> Tensor:
        return fastxkd.cam_from(a, g, method, size=(4, 4)).square().sum()

    leaf = a.clone().requires_grad_()
    (expected,) = torch.autograd.grad(score(leaf), leaf)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(score)(a), expected)
    with torch.autograd.forward_ad.dual_level():
        dual = score(torch.autograd.forward_ad.make_dual(a, torch.ones_like(a)))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, expected.sum())
    batch = torch.stack([a, a.flip(0), 2 * a], 1)
    each = torch.stack([torch.func.grad(score)(x) for x in batch.unbind(1)], 1)
    found = torch.func.grad(lambda x: torch.func.vmap(score, 1)(x).sum())(batch)
    torch.testing.assert_close(found, each)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(score), 1, 1)(batch), each)
    hessian = torch.func.hessian(score)(a)
    expected = torch.autograd.functional.hessian(score, a)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(hessian, expected)


@every_component
def test_components_are_differentiable_once(name: str) -> None:
    a, g = maps_and_gradients()

    def score(a: Tensor) -> Tensor:
        return COMPONENTS[name](a, g).square().sum()

    leaf = a.clone().requires_grad_()
    (grad,) = torch.autograd.grad(score(leaf), leaf, create_graph=True)
    assert grad.abs().max() > 1e-3
    torch.testing.assert_close(torch.func.grad(score)(a), grad.detach())
    with pytest.raises(RuntimeError, match="a principal component is differentiable once"):
        torch.autograd.grad(grad.square().sum() + leaf.sum(), leaf)
    for outer in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match="a principal component is differentiable once"):
            outer(lambda x: torch.func.grad(score)(x).square().sum())(a)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every_component
def test_components_in_forward_mode(name: str) -> None:
    a, g = maps_and_gradients()

    def score(a: Tensor) -> Tensor:
        return COMPONENTS[name](a, g).square().sum()

    torch.testing.assert_close(torch.func.jacfwd(score)(a), torch.func.grad(score)(a))


def correlation(x: Tensor) -> Tensor:
    return fastxkd.metrics.distance_correlation(x, TEACHER.double())


def test_distances_are_differentiable_once(backend: str) -> None:
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(correlation(x), x, create_graph=True)
    assert grad.abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(grad.square().sum() + x.square().sum(), x)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.grad(lambda x: torch.func.grad(correlation)(x).square().sum())(x.detach())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_distances_refuse_forward_mode() -> None:
    x = torch.randn(6, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(correlation, (x,), (x,))
    with pytest.raises(NotImplementedError):
        torch.func.jacfwd(correlation)(x)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        correlation(torch.autograd.forward_ad.make_dual(x, x))


def test_distances_under_vmap(backend: str) -> None:
    batch = torch.randn(3, 6, 4, dtype=torch.float64)
    mapped = torch.func.vmap(correlation)
    expected = torch.stack([correlation(x) for x in batch])
    torch.testing.assert_close(mapped(batch), expected)
    each = torch.stack([torch.func.grad(correlation)(x) for x in batch])
    assert each.abs().max() > 1e-3
    torch.testing.assert_close(torch.func.grad(lambda x: mapped(x).sum())(batch), each)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(correlation))(batch), each)
