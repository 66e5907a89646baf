"""The gradient-weighted family: a forward pass without a graph up to the layer, with one from
there on, and one fused operator from activations and gradients to maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from fastxkd.cam.capture import Layers
from fastxkd.cam.explainer import Explainer, Inputs, Signals
from fastxkd.cam.targets import Objective, class_score, resolve_targets


class GradientCAM(Explainer):
    """A subclass names its method (see :func:`fastxkd.cam_from`).

    The trunk runs without a graph, the graph starts at the first target layer, and no gradient is
    taken further down: a call costs a forward pass and little more.
    """

    method: str

    def _explain(
        self, inputs: Inputs, targets: Any, objective: Objective | None, differentiable: bool
    ) -> Signals:
        return explain_score(
            self,
            inputs,
            lambda output: self._score(output, targets, objective, len(inputs.images)),
            self.method,
            differentiable,
        )

    def _score(self, output: Any, targets: Any, objective: Objective | None, n: int) -> Tensor:
        return class_score(output, targets, objective, n)


def explain_score(
    explainer: Explainer,
    inputs: Inputs,
    score_of: Callable[[Any], Tensor],
    method: str,
    differentiable: bool,
) -> Signals:
    """Activations, and gradients of a score of the model's output with respect to them."""
    result, activations = explainer._forward(inputs, cut=not differentiable)
    with torch.enable_grad():
        score = score_of(result)
    if not score.requires_grad:
        raise ValueError(
            "targets: the score does not depend on the target layers, or not by a graph that"
            " the model has left switched on"
        )
    gradients = torch.autograd.grad(
        score, activations, create_graph=differentiable, allow_unused=True
    )
    missing = [g is None for g in gradients]
    with torch.set_grad_enabled(differentiable):
        given = [a if g is None else g for a, g in zip(activations, gradients, strict=True)]
        spatial = explainer._spatial(given, inputs)
        return Signals(
            result,
            explainer._spatial(activations, inputs),
            [None if unused else g for unused, g in zip(missing, spatial, strict=True)],
            method,
        )


class GradCAM(GradientCAM):
    """Grad-CAM (Selvaraju et al. 2017): channels weighted by their mean gradient.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(),
    ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 10))
    >>> with GradCAM(model, target_layers=["1"]) as cam:
    ...     maps = cam(torch.rand(2, 3, 16, 16), targets=[3, 7])
    ...     logits = cam.outputs
    >>> maps.shape, logits.shape
    (torch.Size([2, 16, 16]), torch.Size([2, 10]))
    """

    method = "gradcam"


class HiResCAM(GradientCAM):
    """HiResCAM (Draelos and Carin 2020): activations times gradients, element by element."""

    method = "hirescam"


class LayerCAM(GradientCAM):
    """LayerCAM (Jiang et al. 2021): activations times positive gradients; good at early layers."""

    method = "layercam"


class GradCAMPlusPlus(GradientCAM):
    """Grad-CAM++ (Chattopadhay et al. 2018): positive gradients, weighted by second order terms."""

    method = "gradcam++"


class XGradCAM(GradientCAM):
    """XGrad-CAM (Fu et al. 2020): gradients weighted by normalised activations."""

    method = "xgradcam"


class GradCAMElementWise(GradientCAM):
    """Element-wise Grad-CAM: positive products of activations and gradients (LayerCAM's map
    where activations are not negative)."""

    method = "elementwise"


class EigenGradCAM(GradientCAM):
    """The first principal component of activations times gradients, with HiResCAM's sign."""

    method = "eigengradcam"


class FinerCAM(GradientCAM):
    r"""Finer-CAM (Zhang et al. 2025): what tells a class from the classes most like it.

    The score of class k is :math:`\sum_j p_j (z_k - \alpha z_j) / \sum_j p_j` over the classes j
    whose logits are closest to :math:`z_k`, with p the softmax of the logits z.

    Args:
        model, target_layers, reshape_transform, batch_size: as in :class:`GradCAM`.
        base_method: the explainer that turns the score's gradients into maps.
        alpha: how much of the others is taken away.
        comparisons: which of the others, by closeness; 1 is the closest. Ranks that a model has
            no classes for are left out.

    ``targets`` as anywhere: callables and an objective replace the score.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(),
    ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 10))
    >>> FinerCAM(model, "1", comparisons=[1])(torch.rand(2, 3, 16, 16), [3, 7]).shape
    torch.Size([2, 16, 16])
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
        base_method: type[GradientCAM] = GradCAM,
        *,
        alpha: float = 1.0,
        comparisons: Sequence[int] = (1, 2, 3),
        batch_size: int = 32,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, batch_size=batch_size)
        if not (isinstance(base_method, type) and issubclass(base_method, GradientCAM)):
            raise TypeError(
                f"base_method: expected an explainer of gradients, like GradCAM, got {base_method}"
            )
        if not hasattr(base_method, "method"):
            raise TypeError(f"base_method: {base_method.__name__} names no method of its own")
        ranks: Any = comparisons
        whole = isinstance(ranks, Iterable) and all(isinstance(r, Integral) for r in ranks)
        if not whole:
            raise TypeError(f"comparisons: expected ranks from 1 on, got {ranks!r}")
        if not comparisons or min(comparisons) < 1:
            raise ValueError(f"comparisons: expected ranks from 1 on, got {list(comparisons)}")
        factor: Any = alpha
        if not isinstance(factor, Real):
            raise TypeError(f"alpha: expected a number, got {type(factor).__name__}")
        self.method = base_method.method
        self.alpha = alpha
        self.comparisons = tuple(comparisons)

    def _score(self, output: Any, targets: Any, objective: Objective | None, n: int) -> Tensor:
        chosen = targets if objective is not None else resolve_targets(output, targets, n)
        if not isinstance(chosen, Tensor):
            return class_score(output, chosen, objective, n)
        return finer_score(output, chosen, self.comparisons, self.alpha).sum()


def finer_score(logits: Tensor, target: Tensor, comparisons: Sequence[int], alpha: float) -> Tensor:
    """:class:`FinerCAM`'s score of class ``target[i]`` in row i of ``logits``, ``[n]``."""
    ranks = [rank for rank in comparisons if rank < logits.shape[1]]
    if not ranks:
        raise ValueError(
            f"comparisons: {list(comparisons)} leave no other of {logits.shape[1]} classes"
        )
    own = logits.gather(1, target[:, None])
    distance = (logits.detach() - own.detach()).abs()
    # A class is closest to itself also where others have its very logit.
    distance = distance.scatter(1, target[:, None], -1.0)
    others = distance.argsort(dim=1, stable=True)[:, ranks]
    weights = logits.softmax(1).gather(1, others)
    margins = own - alpha * logits.gather(1, others)
    return (weights * margins).sum(1) / (weights.sum(1) + 1e-9)
