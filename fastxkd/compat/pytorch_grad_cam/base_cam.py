"""What their explainers share, and where users' own subclasses hook in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastxkd.cam.capture import Layers
from fastxkd.cam.explainer import Explainer, Inputs, Signals
from fastxkd.cam.gradient import explain_score
from fastxkd.cam.maps import Normalize, cam_from
from fastxkd.cam.targets import Objective, class_score, resolve_targets
from fastxkd.compat.pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from fastxkd.reference.cam import channel_weights, exact_dtype, finish, min_max

Array = np.ndarray[Any, Any]
Maps = np.ndarray[Any, np.dtype[np.float32]]


class Kept:
    """What the last call has seen of each layer: detached, never hooks."""

    def __init__(self, activations: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        self.activations = [a.detach() for a in activations]
        self.gradients = [g.detach() for g in gradients if g is not None]

    def clear(self) -> None:
        """Lets go of the tensors."""
        self.activations, self.gradients = [], []

    release = clear


class BaseCAM(Explainer):
    """``cam(input_tensor, targets, aug_smooth, eigen_smooth) -> float32 [n, height, width]``.

    A subclass may override ``get_cam_weights`` or ``get_cam_image``. These take and return NumPy
    arrays, layer by layer, which costs copies to the host that the methods here do without.

    Args:
        model, target_layers, reshape_transform: as in :class:`fastxkd.GradCAM`.
        uses_gradients: False runs the model only; ``grads`` is then None.
    """

    _class_per_view = True

    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
        uses_gradients: bool = True,
        *,
        batch_size: int = 32,
        **removed: Any,
    ) -> None:
        refuse_removed(removed)
        super().__init__(model, target_layers, reshape_transform, batch_size=batch_size)
        # Theirs takes every layout as it is. Sizes mislead in odd networks of convolutions; models
        # that put channels last normalise layers.
        self._layouts_by_size = any(isinstance(m, nn.LayerNorm) for m in self.bare.modules())
        self.uses_gradients = uses_gradients
        self.activations_and_grads = Kept([], [])

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.activations_and_grads.clear()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        parameter = next(self.model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def __call__(  # type: ignore[override]
        self,
        input_tensor: Tensor,
        targets: Sequence[Callable[[Any], Tensor]] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> Maps:
        if isinstance(input_tensor, Tensor):
            input_tensor = input_tensor.to(self.device)
        maps: Maps = super().__call__(
            input_tensor, _classes(targets), aug_smooth, eigen_smooth, output="numpy"
        )
        return maps

    def get_cam_weights(
        self,
        input_tensor: Tensor,
        target_layer: nn.Module,
        targets: Any,
        activations: Array,
        grads: Array,
    ) -> Array:
        """The weight of each channel, ``[n, channels]``."""
        method = getattr(self, "method", None)
        if method not in ("gradcam", "gradcam++", "xgradcam"):
            raise NotImplementedError(
                f"get_cam_weights: {type(self).__name__} has no weights of channels"
            )
        a, g = torch.from_numpy(activations), torch.from_numpy(grads)
        weights: Array = channel_weights(a, g, method).numpy()
        return weights

    def get_cam_image(
        self,
        input_tensor: Tensor,
        target_layer: nn.Module,
        targets: Any,
        activations: Array,
        grads: Array,
        eigen_smooth: bool = False,
    ) -> Array:
        """The map at the layer's resolution, ``[n, ...]``, signed."""
        a, method = torch.from_numpy(activations), getattr(self, "method", None)
        g: Tensor | None
        if _replaced(self, "get_cam_weights") or method is None:
            weights = self.get_cam_weights(input_tensor, target_layer, targets, activations, grads)
            g, method = torch.from_numpy(np.asarray(weights, activations.dtype)), "weights"
        else:
            g = None if method == "eigencam" else torch.from_numpy(grads)
        raw: Array = cam_from(
            a, g, method, normalize=None, relu=False, eigen_smooth=eigen_smooth
        ).numpy()
        return raw

    def is_overridden(self) -> bool:
        """Whether a subclass computes weights or maps of its own."""
        return _replaced(self, "get_cam_weights") or _replaced(self, "get_cam_image")

    def _views_at_once(self, n: int) -> int:
        # What a subclass computes may tie the images of its batch together.
        return 1 if self.is_overridden() else super()._views_at_once(n)

    def _explain(
        self, inputs: Inputs, targets: Any, objective: Objective | None, differentiable: bool
    ) -> Signals:
        # Of direct subclasses; the explainers here have one of their own.
        if self.uses_gradients:
            n = len(inputs.images)
            return explain_score(
                self, inputs, lambda out: class_score(out, targets, objective, n), "", False
            )
        result, activations = self._forward(inputs, cut=False)
        spatial = self._spatial(activations, inputs)
        return Signals(result, spatial, [None] * len(spatial), "")

    def _maps(
        self,
        inputs: Inputs,
        targets: Any,
        signals: Signals,
        *,
        eigen_smooth: bool,
        normalize: Normalize,
        size: tuple[int, ...] | None,
        aggregate: Literal["mean"] | None,
    ) -> Any:
        by_trial = signals.method == "weights"  # these are no gradients
        gradients = [None if by_trial else g for g in signals.gradients]
        self.activations_and_grads = Kept(signals.activations, gradients)
        if signals.method and not self.is_overridden():
            return super()._maps(
                inputs, targets, signals,
                eigen_smooth=eigen_smooth, normalize=normalize, size=size, aggregate=aggregate,
            )  # fmt: skip
        callables = _callables(targets, signals.output, len(inputs.images))
        maps = []
        for layer, a, g in zip(
            self.target_layers.values(), signals.activations, gradients, strict=True
        ):
            raw = self.get_cam_image(
                inputs.images,
                layer,
                callables,
                _array(a),
                None if g is None else _array(g),  # type: ignore[arg-type]  # as theirs
                eigen_smooth,
            )
            signed = torch.from_numpy(np.asarray(raw, np.float32))
            maps.append(finish(signed, list(size or signed.shape[1:]), True, 1))
        return min_max(torch.stack(maps).mean(0))


def refuse_removed(options: dict[str, Any]) -> None:
    """Refuses arguments that are not there, with a hint for the one that once was."""
    if "use_cuda" in options:
        raise TypeError(
            "use_cuda: gone since pytorch-grad-cam 1.5; explainers run where the model is, move"
            " it with model.to('cuda')"
        )
    if options:
        raise TypeError(f"unexpected keyword arguments {', '.join(map(repr, sorted(options)))}")


def _replaced(explainer: BaseCAM, name: str) -> bool:
    return getattr(type(explainer), name) is not getattr(BaseCAM, name)


def _array(tensor: Tensor) -> Array:
    tensor = tensor.detach().to(exact_dtype(tensor))
    array: Array = tensor.cpu().numpy()
    return array


def _classes(targets: Any) -> Any:
    """A list of nothing but ``ClassifierOutputTarget``, ours or theirs, as plain classes.

    One gather then takes all scores, instead of one operation per image.
    """
    if not isinstance(targets, (list, tuple)):
        return targets
    plain = [type(t).__name__ == "ClassifierOutputTarget" for t in targets]
    if not all(plain) or not all(isinstance(t.category, (int, np.integer)) for t in targets):
        return targets
    # A negative category counts from the end; the target itself knows how.
    return targets if any(t.category < 0 for t in targets) else [int(t.category) for t in targets]


def _callables(targets: Any, output: Any, n: int) -> list[Any]:
    """Targets as pytorch-grad-cam hands them on: one callable per image."""
    resolved = resolve_targets(output, targets, n)
    if isinstance(resolved, Tensor):
        return [ClassifierOutputTarget(category) for category in resolved.tolist()]
    return resolved
