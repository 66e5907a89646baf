"""Sanity check: a map that outlives the model's weights does not explain the model."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastxkd.cam.capture import Layers, resolve_layers
from fastxkd.metrics._maps import check_images, check_maps
from fastxkd.metrics._scoring import Scorer
from fastxkd.metrics.agreement import MEASURES
from fastxkd.ops._checks import check_choice, check_flags


class Randomisation(NamedTuple):
    """Of :func:`randomisation_check`."""

    layers: tuple[str, ...]  # in the order they were randomised
    agreement: Tensor  # [layers, n]


def randomisation_check(
    model: nn.Module,
    explainer: Callable[[nn.Module], Callable[..., Tensor]],
    images: Tensor,
    targets: Any = None,
    *,
    layers: Layers | None = None,
    measure: str = "spearman",
    cascade: bool = True,
    seed: int = 0,
) -> Randomisation:
    """Model parameter randomisation (Adebayo et al. 2018): maps must change with the weights.

    From the output downwards, layer after layer is initialised anew; after each, the maps are
    compared with those of the trained model. A faithful explanation loses its agreement.

    Args:
        model: is copied, and itself left alone.
        explainer: of a model to an explainer, which takes images and ``targets=``, e.g.
            ``lambda model: fastxkd.GradCAM(model, "layer4")``; layers by name, since it is given
            the copy.
        images: ``[n, channels, h, w]``.
        targets: None (the class the trained model names, where it returns logits) or what the
            explainer takes; the same for every randomised model.
        layers: names or modules, in the order to randomise; each with all that is under it. None:
            every module with parameters of its own, and these only, last defined first.
        measure: ``"spearman"``, ``"pearson"``, ``"cosine"``, ``"ssim"`` or ``"top"``, as the
            functions ``*_agreement``.
        cascade: layers stay random as one goes down; False: one at a time.
        seed: of the new weights; torch's own generators are left as they were.

    Returns:
        :class:`Randomisation`. Weights are drawn by ``reset_parameters`` of the module; parameters
        that it does not change, or of a module without, from a normal distribution with their
        own mean and spread.

    Raises:
        ValueError, TypeError: layers that the model does not have or without parameters, an
            unknown measure.

    >>> import torch, fastxkd
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(),
    ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))
    >>> check = randomisation_check(model, lambda m: fastxkd.GradCAM(m, "1"),
    ...     torch.rand(2, 1, 8, 8))
    >>> check.layers, check.agreement.shape
    (('4', '0'), torch.Size([2, 2]))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_options(explainer, measure, cascade, seed)
    check_images(images)
    names = _names(model, layers)
    if targets is None:
        targets = Scorer(model, images, None, "logit").targets
    trained = explainer(model)(images, targets=targets)
    check_maps(trained, "explainer")
    trained = trained.detach().clone()  # an explainer may reuse its memory
    devices = sorted({p.get_device() for p in model.parameters() if p.is_cuda})
    random = deepcopy(model)
    rows: list[Tensor] = []
    with torch.random.fork_rng(devices):
        # torch.manual_seed would reach devices that were not forked.
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        for name in names:
            if not cascade and rows:
                random = deepcopy(model)
            layer = random.get_submodule(name)
            for module in [layer] if layers is None else layer.modules():
                _randomise(module)
            maps = explainer(random)(images, targets=targets)
            rows.append(MEASURES[measure](trained, maps))
    return Randomisation(tuple(names), torch.stack(rows))


def check_options(explainer: Any, measure: str, cascade: bool, seed: int) -> None:
    if not callable(explainer):
        raise TypeError(f"explainer: expected a callable, got {type(explainer).__name__}")
    check_choice("measure", measure, tuple(MEASURES))
    check_flags(cascade=cascade)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, got {type(seed).__name__}")


def _names(model: nn.Module, layers: Layers | None) -> list[str]:
    if layers is None:
        own = [name for name, m in model.named_modules() if [*m.parameters(recurse=False)]]
        if not own:
            raise ValueError(f"model: expected parameters, {type(model).__name__} has none")
        return own[::-1]
    modules = {module: name for name, module in model.named_modules()}
    found = resolve_layers(model, layers, "layers")
    for name, module in found.items():
        if not [*module.parameters()]:
            raise ValueError(f"layers: expected layers with parameters, {name!r} has none")
    return [modules[module] for module in found.values()]


@torch.no_grad()
def _randomise(module: nn.Module) -> None:
    """The parameters of a module itself."""
    trained = [(p, p.clone()) for p in module.parameters(recurse=False)]
    # nn.MultiheadAttention and nn.Transformer keep theirs to themselves.
    reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
    if callable(reset):
        reset()
    for parameter, before in trained:
        # Without a reset, or with one that does not know of it, as of torch's older weight_norm.
        if torch.equal(parameter, before):
            # One value has no spread of its own.
            spread = before.std() if before.numel() > 1 else before.abs().squeeze()
            parameter.copy_(torch.randn_like(before) * spread + before.mean())
