"""The gradient-weighted family: a forward pass without a graph up to the layer, with one from
there on, and one fused operator from activations and gradients to maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastxkd.cam.capture import Layers, Tap, evaluating, resolve_layers
from fastxkd.cam.maps import Normalize, check_normalize, maps_of_layers


class GradientCAM:
    """What the explainers share; a subclass names its method (see :func:`fastxkd.cam_from`).

    Args:
        model: any module; runs in eval mode during a call and is left exactly as it was, flags,
            hooks and ``.grad`` included, also when it raises. Weights may be frozen.
        target_layers: modules or names; with several, each layer's map is scaled to the output
            size and the mean is taken.
        reshape_transform: for token layouts: ``[n, tokens, c] -> [n, c, h, w]``, applied to
            activations and gradients.
    """

    method: str

    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model = model
        self.target_layers = resolve_layers(model, target_layers, "target_layers")
        self.reshape_transform = reshape_transform
        self.outputs: Any = None

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.outputs = None

    def __call__(
        self,
        images: Tensor,
        targets: Any = None,
        *,
        output: Literal["tensor", "numpy"] = "tensor",
        normalize: Normalize = "minmax",
        size: Literal["input"] | tuple[int, int] | None = "input",
        aggregate: Literal["mean"] | None = "mean",
        differentiable: bool = False,
        objective: Callable[[Any], Tensor] | None = None,
    ) -> Any:
        """Maps of a batch of images.

        The trunk runs without a graph, the graph starts at the first target layer, and no
        gradient is taken further down: a call costs a forward pass and little more.

        Args:
            images: ``[n, channels, height, width]``, n > 0.
            targets: None (arg-max of each image) | int | list of int | LongTensor ``[n]`` | list
                of callables, one per image, on its row of logits | one callable on the batch
                output.
            output: ``"tensor"``, on the images' device, or ``"numpy"``.
            normalize: ``"minmax"``, or None: magnitudes are kept (after ReLU).
            size: ``"input"``, (height, width), or None for the layer's resolution.
            aggregate: ``"mean"`` over layers, or None: a list with one tensor per layer.
            differentiable: keep the whole graph, for losses on maps.
            objective: instead of targets, a callable on the batch output that returns a scalar.

        Returns:
            ``[n, height, width]`` float32 in [0, 1] (float64 for a float64 model). The model's
            output stays in ``outputs`` until the next call, detached unless differentiable.

        Raises:
            ValueError, TypeError: a layer that is never reached, activations without spatial
                axes, targets that fit neither the batch nor the classes, an empty batch.
        """
        _check_call(images, output, normalize, size, aggregate)
        tap = Tap(self.target_layers, cut=not differentiable, one_pass=True)
        # inference_mode(False): Lightning validates in inference mode, which enable_grad cannot
        # leave; the trunk itself needs no graph.
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(differentiable),
            evaluating(self.model),
        ):
            with tap:
                result = self.model(images)
            activations = list(tap.reached().values())
            with torch.enable_grad():
                score = class_score(result, targets, objective, images.shape[0])
            if not score.requires_grad:
                raise ValueError("targets: the score does not depend on the target layers")
            gradients: list[Tensor | None] = list(
                torch.autograd.grad(
                    score, activations, create_graph=differentiable, allow_unused=True
                )
            )
            with torch.set_grad_enabled(differentiable):
                if self.reshape_transform is not None:
                    activations = [self.reshape_transform(a) for a in activations]
                    gradients = [g if g is None else self.reshape_transform(g) for g in gradients]
                height, width = images.shape[-2:]
                maps = maps_of_layers(
                    list(self.target_layers),
                    activations,
                    gradients,
                    method=self.method,
                    size=(height, width) if size == "input" else size,
                    normalize=normalize,
                    aggregate=aggregate,
                )
        self.outputs = result if differentiable else _detached(result)
        if output == "tensor":
            return maps
        arrays = [m.detach().float().cpu().numpy() for m in ([maps] if aggregate else maps)]
        return arrays[0] if aggregate else arrays


def _detached(result: Any) -> Any:
    return result.detach() if isinstance(result, Tensor) else result


def _check_call(images: Any, output: Any, normalize: Any, size: Any, aggregate: Any) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a Tensor, got {type(images).__name__}")
    if images.dim() < 3 or images.shape[0] == 0:
        raise ValueError(
            f"images: expected a batch [n, channels, height, width] with n > 0,"
            f" got {list(images.shape)}"
        )
    check_normalize(normalize)
    if output not in ("tensor", "numpy"):
        raise ValueError(f"output: expected 'tensor' or 'numpy', got {output!r}")
    if aggregate not in ("mean", None):
        raise ValueError(f"aggregate: expected 'mean' or None, got {aggregate!r}")
    if isinstance(size, str) and size != "input":
        raise ValueError(f"size: expected 'input', None or (height, width), got {size!r}")


def class_score(
    output: Any, targets: Any, objective: Callable[[Any], Tensor] | None, n: int
) -> Tensor:
    """The scalar whose gradient is taken: the sum over images of what ``targets`` selects."""
    if objective is not None:
        if targets is not None:
            raise ValueError("targets: expected None beside an objective, got both")
        score = objective(output)
        if not isinstance(score, Tensor) or score.numel() != 1:
            got = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(f"objective: expected a scalar Tensor, got {got}")
        return score.sum()
    if callable(targets):
        score = targets(output)
        if not isinstance(score, Tensor):
            raise ValueError(f"targets: expected the callable to return a Tensor, got {score!r}")
        return score.sum()
    if not isinstance(output, Tensor) or output.dim() != 2:
        what = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"targets: the model returned {what}, not logits [n, classes]; pass objective=, a"
            " callable on the model's output"
        )
    if targets is None:
        index = output.argmax(1)
    elif isinstance(targets, int):
        index = torch.full((n,), targets, device=output.device)
    elif isinstance(targets, Tensor):
        index = targets
    else:
        targets = list(targets)
        if len(targets) != n:
            raise ValueError(f"targets: expected {n}, one per image, got {len(targets)}")
        if all(callable(t) for t in targets):
            return torch.stack([t(o).sum() for t, o in zip(targets, output, strict=True)]).sum()
        if not all(isinstance(t, int) for t in targets):
            kinds = sorted({type(t).__name__ for t in targets})
            raise TypeError(f"targets: expected ints or callables, got {', '.join(kinds)}")
        index = torch.tensor(targets, device=output.device)
    if index.shape != (n,) or index.is_floating_point():
        raise ValueError(
            f"targets: expected {n} class indices, one per image, got {index.dtype}"
            f" {list(index.shape)}"
        )
    classes = output.shape[1]
    # Indices that already lie on an accelerator are not read back; its own gather checks them.
    if index.device.type == "cpu" and bool(((index < 0) | (index >= classes)).any()):
        wrong = index[(index < 0) | (index >= classes)][0]
        raise ValueError(f"targets: expected 0 <= class < {classes}, got {int(wrong)}")
    index = index.to(output.device, torch.int64)
    if index.is_inference():  # made under inference_mode: autograd may not keep it
        index = index.clone()
    return output.gather(1, index[:, None]).sum()


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
