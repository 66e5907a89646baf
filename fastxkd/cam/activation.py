"""Maps that ask for no gradient: of the activations alone, or with the head's own weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastxkd.cam.capture import Layers, resolve_layers
from fastxkd.cam.explainer import Explainer, Inputs, Signals
from fastxkd.cam.targets import Objective, class_score


class EigenCAM(Explainer):
    """Eigen-CAM (Muhammad and Yeasin 2020): the activations' first principal component.

    It knows of no class: ``targets`` are accepted, so that explainers can be exchanged, and choose
    nothing; an ``objective`` is refused. The sign is the one with which the map correlates with
    the mean activation.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),
    ...     torch.nn.Linear(784, 10))
    >>> EigenCAM(model, "1")(torch.rand(2, 3, 16, 16)).shape
    torch.Size([2, 16, 16])
    """

    def _explain(
        self, inputs: Inputs, targets: Any, objective: Objective | None, differentiable: bool
    ) -> Signals:
        if objective is not None:
            raise ValueError("objective: EigenCAM explains activations, not a score")
        result, activations = self._forward(inputs, cut=False)
        spatial = self._spatial(activations, inputs)
        return Signals(result, spatial, [None] * len(spatial), "eigencam")


class CAM(Explainer):
    """CAM (Zhou et al. 2016): channels weighted by the head's own weights of the class.

    For models that end in target layer, mean over positions, linear head; a ReLU or dropout in
    between changes nothing where it changes no activation. With that, the layer's map sums up to
    the logit, less its bias.

    Args:
        model, reshape_transform, batch_size: as in :class:`GradCAM`.
        target_layers: the one layer in front of the mean.
        head: name or module of the linear layer (or 1 x 1 convolution); None takes the model's
            last one that has the layer's channels on one side and the classes on the other.

    Raises:
        ValueError: a head that does not fit the layer, or a model whose output is not the head's
            answer to the layer's mean. Use :class:`GradCAM` there.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(),
    ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 10))
    >>> CAM(model, "1")(torch.rand(2, 3, 16, 16), 3).shape
    torch.Size([2, 16, 16])
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
        *,
        head: nn.Module | str | None = None,
        batch_size: int = 32,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, batch_size=batch_size)
        if len(self.target_layers) != 1:
            raise ValueError(
                f"target_layers: expected the one before the head, got {len(self.target_layers)}"
            )
        if head is None:
            heads = [module for module in model.modules() if _is_head(module)]
            if not heads:
                raise ValueError(f"head: {type(model).__name__} has no linear layer")
            self.heads: list[Any] = heads
        else:
            self.heads = [*resolve_layers(model, head, "head").values()]
            if not _is_head(self.heads[-1]):
                raise ValueError(
                    "head: expected a Linear or a 1 x 1 convolution,"
                    f" got {type(self.heads[-1]).__name__}"
                )

    def _explain(
        self, inputs: Inputs, targets: Any, objective: Objective | None, differentiable: bool
    ) -> Signals:
        result, activations = self._forward(inputs, cut=False)
        (maps,) = self._spatial(activations, inputs)
        head = self._head(result, maps)
        weight = head.weight.flatten(1)  # [classes, channels]
        self._check(result, maps, weight, head.bias)
        # The score's gradient on the logits, one-hot for a class, turns weights of classes into
        # weights of channels.
        logits = result if differentiable and result.requires_grad else result.detach()
        with torch.enable_grad():
            logits = logits if logits.requires_grad else logits.requires_grad_(True)
            score = class_score(logits, targets, objective, len(inputs.images))
        (slope,) = torch.autograd.grad(score, logits, create_graph=differentiable)
        return Signals(result.detach() if not differentiable else result, [maps],
                       [slope.to(weight.dtype) @ weight], "weights")  # fmt: skip

    def _head(self, result: Any, maps: Tensor) -> Any:
        if isinstance(result, Tensor) and maps.dim() > 3:
            sides = (result.shape[-1], maps.shape[1])
            fitting = [head for head in self.heads if head.weight.shape[:2] == sides]
            return [*self.heads, *fitting][-1]
        return self.heads[-1]

    def _check(self, result: Any, maps: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        name = next(iter(self.target_layers))
        if maps.dim() < 4 or maps.shape[1] != weight.shape[1]:
            raise ValueError(
                f"target layer {name!r}: expected [n, {weight.shape[1]}, ...], what the head"
                f" takes, got {list(maps.shape)}"
            )
        with torch.no_grad():
            shift = 0 if bias is None else bias.double()
            mean, weight = maps.detach().flatten(2).double().mean(2), weight.double()
            expected = mean @ weight.T + shift
            fits = isinstance(result, Tensor) and result.shape == expected.shape
            finite = expected.isfinite().all(1)
            if fits:  # by the images that are finite
                finite &= result.isfinite().all(1)
            if fits and bool(finite.any()):
                mean, expected, result = mean[finite], expected[finite], result[finite]
                # No class hides the others: of each, no more than its own weights can round, and
                # without the bias that masks it.
                size = (expected - shift).abs().amax().minimum(mean.abs() @ weight.abs().T)
                reach = 0.05 * (size + expected.abs())
                fits = bool(((result.double() - expected).abs() <= reach).all())
            if not fits:
                raise ValueError(
                    f"target layer {name!r}: the output is not the head's answer to this layer's"
                    " mean, which CAM asks for; use GradCAM"
                )


def _is_head(module: nn.Module) -> bool:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.groups == 1 and set(module.kernel_size) == {1}
    return isinstance(module, nn.Linear)
