"""The explainers with pytorch-grad-cam's arguments: positional, and NumPy arrays out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastxkd import cam as native
from fastxkd.cam.capture import Layers
from fastxkd.cam.explainer import Inputs
from fastxkd.compat.pytorch_grad_cam.ablation_layer import AblationLayer
from fastxkd.compat.pytorch_grad_cam.base_cam import BaseCAM, Maps, refuse_removed


class GradCAM(native.GradCAM, BaseCAM):
    """See :class:`fastxkd.GradCAM`."""


class HiResCAM(native.HiResCAM, BaseCAM):
    """See :class:`fastxkd.HiResCAM`."""


class GradCAMElementWise(native.GradCAMElementWise, BaseCAM):
    """See :class:`fastxkd.cam.GradCAMElementWise`."""


class GradCAMPlusPlus(native.GradCAMPlusPlus, BaseCAM):
    """See :class:`fastxkd.GradCAMPlusPlus`."""


class XGradCAM(native.XGradCAM, BaseCAM):
    """See :class:`fastxkd.XGradCAM`."""


class LayerCAM(native.LayerCAM, BaseCAM):
    """See :class:`fastxkd.LayerCAM`."""


class EigenCAM(native.EigenCAM, BaseCAM):
    """See :class:`fastxkd.cam.EigenCAM`."""

    method = "eigencam"


class EigenGradCAM(native.EigenGradCAM, BaseCAM):
    """See :class:`fastxkd.cam.EigenGradCAM`."""


class ScoreCAM(native.ScoreCAM, BaseCAM):
    """See :class:`fastxkd.cam.ScoreCAM`; ``batch_size`` is an attribute here."""

    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
        **removed: Any,
    ) -> None:
        refuse_removed(removed)
        super().__init__(model, target_layers, reshape_transform, batch_size=16)


class AblationCAM(native.AblationCAM, BaseCAM):
    """See :class:`fastxkd.cam.AblationCAM`, with ``value="below"``."""

    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
        ablation_layer: AblationLayer | None = None,
        batch_size: int = 32,
        ratio_channels_to_ablate: float = 1.0,
        **removed: Any,
    ) -> None:
        refuse_removed(removed)
        super().__init__(
            model,
            target_layers,
            reshape_transform,
            batch_size=batch_size,
            ratio_channels_to_ablate=ratio_channels_to_ablate,
            value="below",
        )
        self.ablation_layer = ablation_layer

    def _axis(self, own: Tensor, channels: int, inputs: Inputs, layer: nn.Module) -> int:
        if self.ablation_layer is None:
            return super()._axis(own, channels, inputs, layer)
        axis = self.ablation_layer.axis % own.dim()
        if own.shape[axis] != channels:
            raise ValueError(
                f"ablation_layer: expected {channels} channels on axis {axis},"
                f" got {list(own.shape)}"
            )
        return axis


class FinerCAM:
    """See :class:`fastxkd.cam.FinerCAM`."""

    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
        base_method: type[Any] = GradCAM,
        **removed: Any,
    ) -> None:
        refuse_removed(removed)
        self.base_cam = base_method(model, target_layers, reshape_transform)
        if self.base_cam.is_overridden():
            raise TypeError(
                f"base_method: {base_method.__name__} computes maps of its own; pass"
                " FinerWeightedTarget targets to it instead"
            )
        self._finer = self._explainer()

    def _explainer(
        self, alpha: float = 1, comparisons: Sequence[int] = (1, 2, 3)
    ) -> native.FinerCAM:
        base = self.base_cam
        layers = [*base.target_layers.values()]
        made = native.FinerCAM(
            base.model,
            layers,
            base.reshape_transform,
            type(base),
            alpha=alpha,
            comparisons=comparisons,
        )
        made._layouts_by_size = base._layouts_by_size
        return made

    def __enter__(self) -> FinerCAM:
        return self

    def __exit__(self, *_: object) -> None:
        self._finer.__exit__()

    @property
    def outputs(self) -> Any:
        """The model's output of the last call."""
        return self._finer.outputs

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Callable[[Any], Tensor]] | None = None,
        eigen_smooth: bool = False,
        alpha: float = 1,
        comparison_categories: Sequence[int] | None = None,
        target_idx: int | None = None,
    ) -> Maps:
        chosen: Any = list(targets) if targets is not None else target_idx
        ranks = (1, 2, 3) if comparison_categories is None else tuple(comparison_categories)
        # One for each call: two threads may ask for two kinds of comparison.
        finer = self._finer = self._explainer(alpha, ranks)
        images = input_tensor.to(self.base_cam.device)
        maps: Maps = finer(images, chosen, False, eigen_smooth, output="numpy")
        return maps
