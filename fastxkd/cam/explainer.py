"""What all explainers share: arguments, views, and the way from signals to finished maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastxkd.cam.capture import Layers, Tap, bare, evaluating, resolve_layers
from fastxkd.cam.layouts import check_transform, to_spatial
from fastxkd.cam.maps import (
    Normalize,
    check_aggregate,
    check_normalize,
    check_size,
    maps_of_layers,
)
from fastxkd.cam.targets import Objective

# Flipped or not, and the factor on the input: the views of pytorch-grad-cam's aug_smooth.
VIEWS = tuple((flip, factor) for flip in (False, True) for factor in (1.0, 0.9, 1.1))


class Inputs:
    """The arguments of a model: a tensor, several, or keywords; the first tensor is the image."""

    def __init__(self, given: Any) -> None:
        keywords = isinstance(given, Mapping)
        items = (
            list(given.items())
            if keywords
            else [*enumerate(given if isinstance(given, (tuple, list)) else [given])]
        )
        first = next((key for key, value in items if isinstance(value, Tensor)), None)
        if first is None:
            got = f"{type(given).__name__} without one" if items[1:] else type(given).__name__
            raise TypeError(f"images: expected a Tensor, got {got}")
        self.items = dict(items)
        self.first = first
        self.keywords = keywords
        self.images: Tensor = self.items[first]

    def run(self, model: nn.Module) -> Any:
        return model(**self.items) if self.keywords else model(*self.items.values())

    def normal(self) -> Inputs:
        """Copies of what was made in inference mode, which no graph can be built on."""
        given = self.items.items()
        made = [k for k, v in given if isinstance(v, Tensor) and v.is_inference()]
        return self._like({**self.items, **{k: self.items[k].clone() for k in made}})

    def with_images(self, images: Tensor) -> Inputs:
        return self._like({**self.items, self.first: images})

    def rows(self, image: Tensor) -> Inputs:
        """Image ``image[r]`` in row r, of every tensor that has one entry per image."""
        n = len(self.images)
        per_image = {
            key: value[image]
            if isinstance(value, Tensor) and value.dim() > 0 and len(value) == n
            else value
            for key, value in self.items.items()
        }
        return self._like(per_image)

    def views(self, views: Sequence[tuple[bool, float]]) -> Inputs:
        """Every image in each of ``views``: flipped or not, times a factor."""
        images = []
        for flip, factor in views:
            view = self.images.flip(-1) if flip else self.images
            images.append(view * factor if factor != 1.0 else view)
        if len(views) == 1:
            return self.with_images(images[0])
        n = torch.arange(len(self.images), device=self.images.device)
        return self.rows(n.repeat(len(views))).with_images(torch.cat(images))

    def _like(self, items: dict[Any, Any]) -> Inputs:
        return Inputs(items if self.keywords else tuple(items.values()))


class Signals(NamedTuple):
    """What a method has found out about its layers."""

    output: Any
    activations: list[Tensor]
    # Gradients like the activations, weights [n, channels] or nothing, as the method has it.
    gradients: list[Tensor | None]
    method: str


class Explainer:
    """A model, its target layers, and maps of batches of images.

    Args:
        model: any module; runs in eval mode during a call and is left exactly as it was, flags,
            hooks and ``.grad`` included, also when it raises. Weights may be frozen.
        target_layers: modules or names; with several, each layer's map is scaled to the output
            size and the mean is taken.
        reshape_transform: for token layouts: ``[n, tokens, c] -> [n, c, h, w]``, applied to
            activations and gradients. None recognises the layouts of ViT and Swin
            (:func:`fastxkd.cam.to_maps`).
        batch_size: how many altered images run at once, of all images together.

    A model in ``DataParallel`` or ``DistributedDataParallel`` is explained on the device of its
    weights; one that ``torch.compile`` has compiled runs eagerly.
    """

    # Whether maps come with a gradient, and of any score.
    _gradients = True
    # Whether every view of aug_smooth chooses its own class where none is given.
    _class_per_view = False
    # Whether [n, h, w, c] is recognised by its sizes.
    _layouts_by_size = True

    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
        *,
        batch_size: int = 32,
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected an int of at least 1, got {batch_size!r}")
        check_transform(reshape_transform)
        self.model = model
        self.bare = bare(model)
        self.target_layers = resolve_layers(model, target_layers, "target_layers")
        self.reshape_transform = reshape_transform
        self.batch_size = batch_size
        self.outputs: Any = None

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.outputs = None

    def __call__(
        self,
        images: Any,
        targets: Any = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
        *,
        output: Literal["tensor", "numpy"] = "tensor",
        normalize: Normalize = "minmax",
        size: Literal["input"] | tuple[int, ...] | None = "input",
        aggregate: Literal["mean"] | None = "mean",
        differentiable: bool = False,
        objective: Objective | None = None,
    ) -> Any:
        """Maps of a batch of images.

        Args:
            images: ``[n, channels, height, width]`` or ``[n, channels, depth, height, width]``,
                n > 0. Models with several inputs take a tuple (by position) or a dict (by
                keyword), whose first tensor is the images. What else has one entry per image must
                be a tensor too where altered images run (aug_smooth, ScoreCAM, AblationCAM): lists
                are handed on as they are.
            targets: None (arg-max of each image) | int | list of int | LongTensor ``[n]`` | list
                of callables, one per image, on its row of the output | one callable for every
                row.
            aug_smooth: the mean of six maps: of the images and their mirror images, each times
                1, 0.9 and 1.1; after the images themselves, ``batch_size`` of these at once (all
                images of one view at a time for an objective). Without targets, all explain what
                the images themselves give.
            eigen_smooth: the first principal component of the weighted channels instead of their
                sum, with the sign of their sum.
            output: ``"tensor"``, on the images' device, or ``"numpy"``, always float32.
            normalize: ``"minmax"``, or None: magnitudes are kept (after ReLU).
            size: ``"input"``, (height, width), or None for the layer's resolution.
            aggregate: ``"mean"`` over layers, or None: a list with one tensor per layer.
            differentiable: keep the whole graph, for losses on maps.
            objective: instead of targets, a callable on the whole batch's output that returns a
                scalar, which may tie images together.

        Returns:
            ``[n, height, width]`` float32 in [0, 1]; tensors of a float64 model float64. The
            model's output stays in ``outputs`` until the next call, detached unless differentiable.

        Raises:
            ValueError, TypeError: a layer that is never reached, activations without spatial
                axes, targets that fit neither the batch nor the classes, an empty batch.
        """
        inputs = Inputs(images)
        _check_call(inputs.images, output, normalize, size, aggregate)
        if differentiable and not self._gradients:
            raise ValueError(f"differentiable: {type(self).__name__} has no gradient")
        if objective is not None and not self._gradients:
            raise ValueError(
                f"objective: {type(self).__name__} scores images one by one; pass targets"
            )
        if not (objective is None or callable(objective)):
            raise TypeError(
                f"objective: expected a callable on the model's output, got {objective!r}"
            )
        n = len(inputs.images)
        at_once = 1 if objective is not None else self._views_at_once(n)
        passes = [VIEWS[:1]]
        if aug_smooth:
            passes += [VIEWS[i : i + at_once] for i in range(1, len(VIEWS), at_once)]
        result: Any = None
        found: list[list[Tensor]] = []
        for views in passes:
            seen, maps = self._view(
                inputs.views(views), _repeated(targets, len(views)), objective,
                eigen_smooth=eigen_smooth, normalize=normalize, size=size, aggregate=aggregate,
                differentiable=differentiable,
            )  # fmt: skip
            each = zip(*(m.split(n) for m in (maps if aggregate is None else [maps])), strict=True)
            for (flip, _), layers in zip(views, each, strict=True):
                found.append([m.flip(-1) if flip else m for m in layers])
            if views == VIEWS[:1]:
                result = seen
                if targets is None and objective is None and not self._class_per_view:
                    targets = self._targets_of(result)
        self.outputs = result if differentiable else _detached(result)
        means = [
            torch.stack(each).mean(0) if len(each) > 1 else each[0]
            for each in zip(*found, strict=True)
        ]
        if output == "numpy":
            arrays = [m.detach().float().cpu().numpy() for m in means]
            return arrays[0] if aggregate else arrays
        return means[0] if aggregate else means

    def _view(
        self,
        inputs: Inputs,
        targets: Any,
        objective: Objective | None,
        *,
        eigen_smooth: bool,
        normalize: Normalize,
        size: Any,
        aggregate: Literal["mean"] | None,
        differentiable: bool,
    ) -> tuple[Any, Any]:
        # inference_mode(False): Lightning validates in inference mode, which enable_grad cannot
        # leave; the trunk itself needs no graph.
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(differentiable),
            evaluating(self.model),
        ):
            inputs = inputs.normal()
            signals = self._explain(inputs, targets, objective, differentiable)
            if size == "input":  # images of an activation's own number of axes
                size = tuple(inputs.images.shape[2 - signals.activations[0].dim() :])
            with torch.set_grad_enabled(differentiable):
                maps = self._maps(
                    inputs,
                    targets,
                    signals,
                    eigen_smooth=eigen_smooth,
                    normalize=normalize,
                    size=size,
                    aggregate=aggregate,
                )
        return signals.output, maps

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
        return maps_of_layers(
            list(self.target_layers),
            signals.activations,
            signals.gradients,
            method=signals.method,
            size=size,
            normalize=normalize,
            aggregate=aggregate,
            eigen_smooth=eigen_smooth,
        )

    def _explain(
        self, inputs: Inputs, targets: Any, objective: Objective | None, differentiable: bool
    ) -> Signals:
        raise NotImplementedError

    def _forward(self, inputs: Inputs, *, cut: bool) -> tuple[Any, list[Tensor]]:
        """The model's output, and what the target layers gave, in their own layout."""
        with Tap(self.target_layers, cut=cut, one_pass=True, model=self.bare) as tap:
            result = inputs.run(self.bare)
        return result, list(tap.reached().values())

    def _spatial(self, tensors: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
        """The layers' outputs, or gradients of their kind, as ``[n, channels, ...]``."""
        return [
            to_spatial(
                tensor,
                transform=self.reshape_transform,
                image=inputs.images.shape[2:],
                model=self.bare,
                layer=layer,
                n=len(inputs.images),
                by_size=self._layouts_by_size,
            )
            for tensor, layer in zip(tensors, self.target_layers.values(), strict=True)
        ]

    def _views_at_once(self, n: int) -> int:
        return max(1, self.batch_size // n)

    def _targets_of(self, output: Any) -> Any:
        """The classes that a call without targets has explained."""
        logits = isinstance(output, Tensor) and output.dim() == 2
        return output.detach().argmax(1) if logits else None


def _repeated(targets: Any, times: int) -> Any:
    """``targets`` of several views of the same images."""
    if times == 1 or targets is None or callable(targets) or isinstance(targets, Integral):
        return targets
    return targets.repeat(times) if isinstance(targets, Tensor) else list(targets) * times


def _detached(result: Any) -> Any:
    return result.detach() if isinstance(result, Tensor) else result


def _check_call(images: Tensor, output: Any, normalize: Any, size: Any, aggregate: Any) -> None:
    if images.dim() < 3 or images.shape[0] == 0:
        raise ValueError(
            f"images: expected a batch [n, channels, height, width] with n > 0,"
            f" got {list(images.shape)}"
        )
    check_normalize(normalize)
    if output not in ("tensor", "numpy"):
        raise ValueError(f"output: expected 'tensor' or 'numpy', got {output!r}")
    check_aggregate(aggregate)
    check_size(size)
