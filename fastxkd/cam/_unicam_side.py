"""One of UniCAM's two models: its layers, the features of it that are compared, and its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastxkd.cam._unicam_distances import exact_dtype
from fastxkd.cam._unicam_weights import pooled, pulled
from fastxkd.cam.capture import Tap, bare, evaluating, resolve_layers
from fastxkd.cam.explainer import Inputs
from fastxkd.cam.layouts import to_spatial

Feature = Callable[[Tensor], Tensor] | nn.Module | str
Features = Feature | Sequence[Feature | None]


class Seen(NamedTuple):
    """What one layer made of a batch."""

    layer: str
    activation: Tensor  # in the layer's own layout; a leaf, where the feature has a graph
    spatial: Tensor  # [n, c, ...]
    feature: Tensor | None  # None: the feature is the activation

    @property
    def compared(self) -> Tensor:
        return (self.activation if self.feature is None else self.feature).detach()

    @property
    def pulls(self) -> Tensor:
        """``[n, k]``, float64, what the weights of pairs are applied to: pooled activations, or
        the whole feature where it is not the layer."""
        if self.feature is None:
            return pooled(self.spatial)
        return self.compared.flatten(1).double()


class Bank(NamedTuple):
    """One layer of one model for the m samples of the reference set."""

    features: Tensor  # [m, ...], what is compared
    pooled: Tensor | None  # [m, c], where that is the layer itself
    distances: Tensor  # [m, m], float64

    @property
    def columns(self) -> Tensor:
        return self.features.flatten(1).double() if self.pooled is None else self.pooled


class Side:
    """A model of the pair.

    Args:
        model, layers: the explained layers, by name.
        features: what is compared of each: None, the layer's own output; a module or name of the
            model, its output; a function, of the layer's output. One for all or one per layer.
        transform: of token layouts; None recognises those of ViT and Swin.
        argument: what the caller's user calls ``features``.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        features: Features | None,
        transform: Callable[[Tensor], Tensor] | None,
        argument: str,
    ) -> None:
        self.model = model
        self.layers = layers
        self.transform = transform
        self.argument = argument
        self.features: list[Callable[[Tensor], Tensor] | str | None] = [None] * len(layers)
        self.modules: dict[str, nn.Module] = {}
        self._resolve(features)

    def _resolve(self, features: Features | None) -> None:
        several: list[Any] = [*features] if isinstance(features, (list, tuple)) else [features]
        if len(several) == 1:
            several *= len(self.layers)
        if len(several) != len(self.layers):
            raise ValueError(
                f"{self.argument}: expected one, or one for each of {len(self.layers)} layers,"
                f" got {len(several)}"
            )
        own = [*self.model.modules()]
        for i, (layer, feature) in enumerate(zip(self.layers, several, strict=True)):
            if feature is None:
                continue
            if callable(feature) and not any(feature is module for module in own):
                self.features[i] = feature
                continue
            ((name, module),) = resolve_layers(self.model, [feature], self.argument).items()
            if module is not self.layers[layer]:
                self.features[i] = name
                self.modules[name] = module

    def look(self, inputs: Inputs) -> list[Seen]:
        """One forward pass; with a graph only between a layer and a later module's feature."""
        model, taps = bare(self.model), self.layers | self.modules
        tap = Tap(taps, cut=bool(self.modules), one_pass=True, model=model)
        with torch.no_grad(), evaluating(self.model), tap:
            inputs.run(model)
        reached = tap.reached()
        return [
            self._seen(layer, reached, feature, inputs)
            for layer, feature in zip(self.layers, self.features, strict=True)
        ]

    def _seen(
        self,
        layer: str,
        reached: dict[str, Tensor],
        how: Callable[[Tensor], Tensor] | str | None,
        inputs: Inputs,
    ) -> Seen:
        activation = reached[layer]
        feature = None
        if isinstance(how, str):
            feature = reached[how]
        elif how is not None:
            activation = activation.detach().requires_grad_()
            with torch.enable_grad():
                feature = how(activation)
            if not isinstance(feature, Tensor):
                raise TypeError(
                    f"{self.argument}: expected a function that returns a Tensor,"
                    f" got {type(feature).__name__}"
                )
        spatial = self._spatial(activation.detach(), layer, inputs)
        if spatial.dim() not in (4, 5):
            raise ValueError(
                f"target layer {layer!r}: expected spatial activations [n, channels, height,"
                f" width], got {list(spatial.shape)}; use reshape_transform for token layouts"
            )
        n = len(inputs.images)
        for what, x in (("target layer", spatial), (self.argument, feature)):
            if x is not None and (x.dim() < 2 or len(x) != n):
                raise ValueError(
                    f"{what}: expected {n} rows, one per image, of {layer!r}, got {list(x.shape)}"
                )
        return Seen(layer, activation, spatial, feature)

    def _spatial(self, tensor: Tensor, layer: str, inputs: Inputs) -> Tensor:
        return to_spatial(
            tensor,
            transform=self.transform,
            image=inputs.images.shape[2:],
            model=bare(self.model),
            layer=self.layers[layer],
            n=len(inputs.images),
        )

    def weights(self, seen: Seen, pairs: Tensor, bank: Bank | None, inputs: Inputs) -> Tensor:
        """``[n, c]`` channel weights, of the weights of pairs with each other or with a bank.

        One vector-Jacobian product leads from a feature to its layer.
        """
        exact = exact_dtype(seen.activation)
        pull = pulled(pairs, seen.pulls, seen.pulls if bank is None else bank.columns)
        if seen.feature is None:
            return pull.to(exact)
        # Of size 1 on the way: products of 16-bit features would lose a gradient as small as it is.
        largest = pull.abs().amax()
        largest = torch.where(largest > 0, largest, 1)
        gradient: Tensor | None = None
        if seen.feature.requires_grad and seen.activation.requires_grad:
            (gradient,) = torch.autograd.grad(
                seen.feature,
                seen.activation,
                (pull / largest).reshape(seen.feature.shape).to(seen.feature.dtype),
                retain_graph=True,
                allow_unused=True,
            )
        if gradient is None:
            raise ValueError(f"{self.argument}: does not depend on target layer {seen.layer!r}")
        return (pooled(self._spatial(gradient, seen.layer, inputs)) * largest).to(exact)
