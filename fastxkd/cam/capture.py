"""Activations of named layers during somebody's forward pass, and nothing left behind."""

from __future__ import annotations

import difflib
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastxkd.cam.layouts import check_transform, to_spatial
from fastxkd.cam.maps import METHODS, Normalize, check_aggregate, check_size, maps_of_layers

Layers = Sequence[nn.Module | str] | nn.Module | str


def resolve_layers(
    model: nn.Module, layers: Layers, argument: str, owner: str = "model"
) -> dict[str, nn.Module]:
    """Layer names to modules, in the order given; modules are looked up for their name.

    Raises:
        ValueError: a name or module that the model does not have, an empty list.
        TypeError: anything else than names and modules, of something else than a model, which the
            caller's user calls ``owner``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{owner}: expected a Module, got {type(model).__name__}")
    if isinstance(layers, (nn.Module, str)):
        layers = [layers]
    if not isinstance(layers, Collection):
        raise TypeError(
            f"{argument}: expected names or modules of {type(model).__name__},"
            f" got {type(layers).__name__}"
        )
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
        module = next((m for name in options if (m := _submodule(model, name)) is not None), None)
        if module is None or layer == "":
            close = difflib.get_close_matches(layer, modules, n=3)
            hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
            raise ValueError(
                f"{argument}: {type(model).__name__} has no layer named {layer!r}{hint}"
            )
        found[layer] = module
    return found


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    """By any of its names: a module that is registered twice has several."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


class _Hook:
    """Keeps the output of one layer, for the thread that asked only."""

    def __init__(self, tap: Tap, name: str) -> None:
        self.tap = tap
        self.name = name

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        # DataParallel runs the model's replicas in threads of its own.
        replica = getattr(module, "_is_replica", False)
        if not replica and not self.tap.listens():
            return None
        whole, output = output, output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(output, Tensor):
            raise ValueError(
                f"target layer {self.name!r}: expected a Tensor as its output or as the first of"
                f" a tuple, got {type(output).__name__}"
            )
        passed_on = self.tap.take(self.name, output, replica)
        if output is whole:
            return passed_on
        make = getattr(type(whole), "_make", type(whole))  # a namedtuple takes no iterable
        return make([passed_on, *whole[1:]])


class Tap:
    """Hooks on some layers of a model, while the ``with`` block lasts.

    Args:
        layers: names to modules.
        cut: start the graph at the first layer reached: what comes before it runs without one.
            Otherwise one starts only where gradients are wanted and what comes before, frozen, has
            none.
        one_pass: the layers run once, or once in each run of the model; warn where they run more
            often.
        model: what will run. Compiled, it runs eagerly in the block, since compiled code knows
            nothing of hooks that come later; from its call on, what an earlier pass left is gone.
            None: it runs already, or once only.
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        *,
        cut: bool,
        one_pass: bool,
        model: nn.Module | None = None,
    ) -> None:
        self.layers = layers
        self.cut = cut
        self.one_pass = one_pass
        self.model = model
        # One tensor for each layer, or one for each replica of it.
        self.parts: dict[str, list[Tensor]] = {}
        self.thread = 0
        # (height, width) of the images that went in, where the model itself was called with some.
        self.image: tuple[int, ...] | None = None
        self._running = False
        self._depth = 0
        self._stack: ExitStack | None = None

    def __enter__(self) -> Tap:
        if self._stack is not None:
            raise RuntimeError("capture: entered already; make one for each block")
        self.thread, self._depth = threading.get_ident(), _depth()
        with ExitStack() as stack:
            if self.model is not None:
                stack.enter_context(eagerly(self.model))
                handle = self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
                stack.callback(handle.remove)
                stack.callback(self.model.register_forward_hook(self._end).remove)
            for name, module in self.layers.items():
                handle = module.register_forward_hook(_Hook(self, name))
                stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    def listens(self) -> bool:
        """Whether this is a pass of the block's own: of its thread, and none that an explainer or
        a metric of this library runs inside it."""
        return threading.get_ident() == self.thread and _depth() == self._depth

    # torch registers such a hook in two steps: another thread can come by between them, and then
    # gives no keywords.
    def _begin(
        self, _: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any] | None = None
    ) -> None:
        if not self.listens() or in_backward():
            return
        self._running = True
        self.parts.clear()
        given = (*inputs, *(keywords or {}).values())
        tensors = [x for x in given if isinstance(x, Tensor)]
        self.image = tuple(tensors[0].shape[2:]) if tensors and tensors[0].dim() > 3 else None

    def _end(self, *_: Any) -> None:
        if self.listens():
            self._running = False

    def take(self, name: str, output: Tensor, replica: bool) -> Tensor:
        wanted = (self.cut or torch.is_grad_enabled()) and output.is_floating_point()
        if wanted and not output.requires_grad:
            torch.set_grad_enabled(True)
            # A tensor made in inference mode can start no graph; its copy can.
            output = (output.clone() if output.is_inference() else output).detach()
            output.requires_grad_(True)
        # The model gets a copy: an in-place operation further on must not reach what is kept.
        if in_backward():  # a checkpoint runs once more what has been kept
            return output.clone()
        if self.one_pass and self._running and name in self.parts and not replica:
            warnings.warn(
                f"target layer {name!r} ran more than once in this forward pass; the last run is"
                " explained",
                stacklevel=2,
            )
        if replica:
            self.parts.setdefault(name, []).append(output)
        else:
            self.parts[name] = [output]
        return output.clone()

    def replicas(self) -> dict[str, list[Tensor]]:
        """What each layer gave: one tensor, or those of its replicas, in the batch's order."""
        missing = [name for name in self.layers if name not in self.parts]
        if missing:
            raise ValueError(
                f"target layer {missing[0]!r} was never reached in the forward pass; it is"
                " defined in the model but not used for these inputs"
            )
        devices = getattr(self.model, "device_ids", None) or []

        def place(part: Tensor) -> int:
            index = part.device.index
            return devices.index(index) if index in devices else 0

        return {name: sorted(self.parts[name], key=place) for name in self.layers}

    def reached(self) -> dict[str, Tensor]:
        """What each layer gave, of the whole batch."""
        return {name: joined(parts) for name, parts in self.replicas().items()}


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The batch that replicas have seen in parts, on the first one's device."""
    return parts[0] if len(parts) == 1 else torch.cat([p.to(parts[0].device) for p in parts])


class capture:
    """Keep the activations of layers during a forward pass of your own.

    The pass is yours: training mode, autocast, gradients and hooks stay as they are. One capture
    may see several passes; it holds the last, and passes that an explainer or a metric of this
    library runs inside the block do not count. Where what comes before a layer is frozen, the graph
    starts at the layer. Inside the block a model compiled by
    ``torch.compile`` runs eagerly, and its compiled code is as good as before afterwards.
    The replicas of ``DataParallel`` are put together again.

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
        self._model = model
        self._tap = Tap(
            resolve_layers(model, layers, "layers"), cut=False, one_pass=True, model=model
        )

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
        size: Literal["input"] | tuple[int, ...] | None = None,
        normalize: Normalize = "minmax",
        aggregate: Literal["mean"] | None = "mean",
        eigen_smooth: bool = False,
        differentiable: bool = False,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> Any:
        """Maps ``[n, h, w]`` of the captured pass, the mean over layers where there are several.

        Takes gradients of ``score`` (a scalar, e.g. the sum of the logits of interest) with
        respect to the captured activations only, and keeps the graph for the step's own backward.

        Args:
            method: as in :func:`fastxkd.cam_from`, but ``weights``.
            score: a scalar that depends on the captured layers.
            size: resize to (height, width), or to that of the ``"input"``; None keeps the first
                layer's resolution.
            normalize: ``"minmax"`` or None.
            aggregate: ``"mean"`` over layers, or None: a list with one tensor per layer.
            eigen_smooth: as in :func:`fastxkd.cam_from`.
            differentiable: build the graph for a loss on the maps.
            reshape_transform: as in :class:`fastxkd.GradCAM`; where only parts of the model were
                called, its images are not known, and token layouts need one.

        Raises:
            ValueError: a score without a graph or that does not depend on a layer, a layer that
                was not reached or ran without a graph.
        """
        if method not in METHODS or method == "weights":
            known = ", ".join(m for m in METHODS if m != "weights")
            raise ValueError(f"method: expected one of {known}, got {method!r}")
        check_transform(reshape_transform)
        check_size(size)
        layers = self._tap.replicas()
        if not isinstance(score, Tensor) or score.numel() != 1 or not score.requires_grad:
            what = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(f"score: expected a scalar with a graph, got {what}")
        image = self._tap.image
        if size == "input":
            if image is None:
                raise ValueError("size: no images are known, the model itself was not called")
            size = image
        check_aggregate(aggregate)
        for name, parts in layers.items():
            if not all(part.requires_grad for part in parts):
                raise ValueError(
                    f"target layer {name!r}: its output has no graph; it ran under no_grad, or in"
                    " a checkpoint with use_reentrant=True"
                )
        flat = [part for parts in layers.values() for part in parts]
        each = iter(
            torch.autograd.grad(
                score.sum(),
                flat,
                create_graph=differentiable,
                retain_graph=True,
                allow_unused=True,
            )
        )
        with torch.set_grad_enabled(differentiable):
            activations, gradients = [], []
            for name, parts in layers.items():
                found = [next(each) for _ in parts]
                unused = all(gradient is None for gradient in found)
                whole = [
                    torch.zeros_like(part) if gradient is None else gradient
                    for part, gradient in zip(parts, found, strict=True)
                ]
                spatial = partial(
                    to_spatial,
                    transform=reshape_transform,
                    image=image,
                    model=bare(self._model),
                    layer=self._tap.layers[name],
                )
                activations.append(spatial(joined(parts)))
                gradients.append(None if unused else spatial(joined(whole)))
            return maps_of_layers(
                list(layers),
                activations,
                gradients,
                method=method,
                size=size,
                normalize=normalize,
                aggregate=aggregate,
                eigen_smooth=eigen_smooth,
            )


# Compiled models that run eagerly: how many blocks ask for it, and the way back.
_eager: list[Any] = []
_eager_lock = threading.Lock()


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """A compiled model's own code, with its hooks, for a while; nothing is compiled anew."""
    # Older versions of torch have no stance; there, hooks in compiled code stay unseen.
    stance = getattr(torch.compiler, "set_stance", None)
    if stance is None or not any(map(is_compiled, model.modules())):
        yield
        return
    with _eager_lock:
        _eager.append(stance("force_eager") if not _eager else _eager[0])
    try:
        yield
    finally:
        with _eager_lock:
            last = _eager.pop()
            if not _eager:
                last.__exit__(None, None, None)


def is_compiled(module: nn.Module) -> bool:
    # The type's name: to import the compiler for its own takes a second.
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or type(module).__name__ == "OptimizedModule"


def bare(model: nn.Module) -> nn.Module:
    """What a wrapper of data parallelism wraps; gradients of one process, on one device."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return bare(model.module) if isinstance(model, parallel) else model


# Modules that are being evaluated, by how many, and which of them to set back to training.
_evaluated: dict[int, tuple[int, bool]] = {}
_evaluated_lock = threading.Lock()
_passes = threading.local()


def _depth() -> int:
    """How many :func:`evaluating` blocks this thread is in: each is a pass of the library's."""
    return getattr(_passes, "depth", 0)


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` for a while; every module gets its own flag back, also after an error.

    Where several threads explain one model, or models that share modules, the last to finish with
    a module puts its flag back.
    """
    modules = list(model.modules())
    with _evaluated_lock:
        training = [module for module in modules if module.training]
        if training:
            model.eval()
        for module in modules:
            users, flag = _evaluated.get(id(module), (0, False))
            _evaluated[id(module)] = users + 1, flag
        for module in training:
            _evaluated[id(module)] = _evaluated[id(module)][0], True
    _passes.depth = _depth() + 1
    try:
        yield
    finally:
        _passes.depth = _depth() - 1
        with _evaluated_lock:
            for module in modules:
                users, flag = _evaluated.pop(id(module))
                if users > 1:
                    _evaluated[id(module)] = users - 1, flag
                elif flag:
                    module.training = True
