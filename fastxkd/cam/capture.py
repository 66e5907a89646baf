"""Activations of named layers during somebody's forward pass, and nothing left behind."""

from __future__ import annotations

import difflib
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastxkd.cam.maps import Normalize, maps_of_layers

Layers = Sequence[nn.Module | str] | nn.Module | str


def resolve_layers(model: nn.Module, layers: Layers, argument: str) -> dict[str, nn.Module]:
    """Layer names to modules, in the order given; modules are looked up for their name.

    Raises:
        ValueError: a name or module that the model does not have, an empty list.
        TypeError: anything else than names and modules.
    """
    if isinstance(layers, (nn.Module, str)):
        layers = [layers]
    if len(layers) == 0:
        raise ValueError(f"{argument}: expected at least one layer, got none")
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    found: dict[str, nn.Module] = {}
    for layer in layers:
        if isinstance(layer, nn.Module):
            if layer not in names:
                raise ValueError(
                    f"{argument}: expected a layer of {type(model).__name__}, got a"
                    f" {type(layer).__name__} that is not part of it"
                )
            found[names[layer]] = layer
            continue
        if not isinstance(layer, str):
            raise TypeError(
                f"{argument}: expected names or modules of {type(model).__name__},"
                f" got {type(layer).__name__}"
            )
        # DataParallel-style wrappers and torch.compile put the model one attribute further down.
        options = (layer, f"module.{layer}", f"_orig_mod.{layer}")
        name = next((option for option in options if option in modules), None)
        if name is None or layer == "":
            close = difflib.get_close_matches(layer, modules, n=3)
            hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
            raise ValueError(
                f"{argument}: {type(model).__name__} has no layer named {layer!r}{hint}"
            )
        found[layer] = modules[name]
    return found


class _Hook:
    """Keeps the output of one layer, for the thread that asked only."""

    def __init__(self, tap: Tap, name: str) -> None:
        self.tap = tap
        self.name = name

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if threading.get_ident() != self.tap.thread:
            return None
        whole, output = output, output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(output, Tensor):
            raise ValueError(
                f"target layer {self.name!r}: expected a Tensor as its output or as the first of"
                f" a tuple, got {type(output).__name__}"
            )
        passed_on = self.tap.take(self.name, output)
        if output is whole:
            return passed_on
        make = getattr(type(whole), "_make", type(whole))  # a namedtuple takes no iterable
        return make([passed_on, *whole[1:]])


class Tap:
    """Hooks on some layers of a model, while the ``with`` block lasts.

    Args:
        cut: start the graph at the first layer reached: what comes before it runs without one.
        one_pass: the model runs once; warn where a layer runs more often.
    """

    def __init__(self, layers: dict[str, nn.Module], *, cut: bool, one_pass: bool) -> None:
        self.layers = layers
        self.cut = cut
        self.one_pass = one_pass
        self.activations: dict[str, Tensor] = {}
        self.thread = 0
        self._handles: list[Any] = []

    def __enter__(self) -> Tap:
        self.thread = threading.get_ident()
        for name, module in self.layers.items():
            self._handles.append(module.register_forward_hook(_Hook(self, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def take(self, name: str, output: Tensor) -> Tensor:
        if self.one_pass and name in self.activations:
            warnings.warn(
                f"target layer {name!r} ran more than once in this forward pass; the last run is"
                " explained",
                stacklevel=2,
            )
        if self.cut and not output.requires_grad:
            torch.set_grad_enabled(True)
            # A tensor made in inference mode can start no graph; its copy can.
            output = (output.clone() if output.is_inference() else output).detach()
            output.requires_grad_(True)
        self.activations[name] = output
        # The model gets a copy: an in-place operation further on must not reach what is kept.
        return output.clone()

    def reached(self) -> dict[str, Tensor]:
        missing = [name for name in self.layers if name not in self.activations]
        if missing:
            raise ValueError(
                f"target layer {missing[0]!r} was never reached in the forward pass; it is"
                " defined in the model but not used for these inputs"
            )
        return {name: self.activations[name] for name in self.layers}


class capture:
    """Keep the activations of layers during a forward pass of your own.

    The pass is yours: training mode, autocast, gradients and hooks stay as they are. One capture
    may see several passes; it holds the last.

    Args:
        model: the model that will run inside the ``with`` block.
        layers: names or modules of it.

    >>> import torch, fastxkd
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(),
    ...     torch.nn.Flatten(), torch.nn.Linear(2 * 36, 3))
    >>> with fastxkd.capture(model, ["1"]) as captured:
    ...     logits = model(torch.rand(5, 1, 8, 8))
    >>> captured.activations["1"].shape
    torch.Size([5, 2, 6, 6])
    >>> captured.cam("gradcam", score=logits[:, 0].sum()).shape
    torch.Size([5, 6, 6])
    """

    def __init__(self, model: nn.Module, layers: Layers) -> None:
        self._tap = Tap(resolve_layers(model, layers, "layers"), cut=False, one_pass=False)

    def __enter__(self) -> capture:
        self._tap.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._tap.__exit__()

    @property
    def activations(self) -> dict[str, Tensor]:
        """Name to output ``[n, ...]`` of the last pass, with its graph if it has one."""
        return self._tap.reached()

    def cam(
        self,
        method: str = "gradcam",
        *,
        score: Tensor,
        size: tuple[int, int] | None = None,
        normalize: Normalize = "minmax",
        differentiable: bool = False,
    ) -> Tensor:
        """Maps ``[n, h, w]`` of the captured pass, the mean over layers where there are several.

        Takes gradients of ``score`` (a scalar, e.g. the sum of the logits of interest) with
        respect to the captured activations only, and keeps the graph for the step's own backward.

        Args:
            method: as in :func:`fastxkd.cam_from`.
            score: a scalar that depends on the captured layers.
            size: resize to (height, width); None keeps the first layer's resolution.
            normalize: ``"minmax"`` or None.
            differentiable: build the graph for a loss on the maps.
        """
        activations = list(self.activations.values())
        if not isinstance(score, Tensor) or score.numel() != 1 or not score.requires_grad:
            what = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(f"score: expected a scalar with a graph, got {what}")
        gradients = torch.autograd.grad(
            score.sum(),
            activations,
            create_graph=differentiable,
            retain_graph=True,
            allow_unused=True,
        )
        with torch.set_grad_enabled(differentiable):
            return maps_of_layers(
                list(self._tap.layers),
                activations,
                list(gradients),
                method=method,
                size=size,
                normalize=normalize,
                aggregate="mean",
            )


# Models that are being evaluated, by whom many, and what to set back to training afterwards.
_evaluated: dict[int, tuple[int, list[nn.Module]]] = {}
_evaluated_lock = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` for a while; every module gets its own flag back, also after an error.

    Where several threads explain one model, the last to finish puts the flags back.
    """
    with _evaluated_lock:
        users, training = _evaluated.get(id(model), (0, []))
        if users == 0:
            training = [module for module in model.modules() if module.training]
            if training:
                model.eval()
        _evaluated[id(model)] = (users + 1, training)
    try:
        yield
    finally:
        with _evaluated_lock:
            users, training = _evaluated.pop(id(model))
            if users > 1:
                _evaluated[id(model)] = (users - 1, training)
            else:
                for module in training:
                    module.training = True
