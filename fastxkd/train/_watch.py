"""What models make of a training step's own batch: hooks while it runs, or a pass beside it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastxkd.cam.capture import Tap, bare, eagerly, evaluating, is_compiled, resolve_layers
from fastxkd.cam.layouts import to_spatial

# Their evaluation without a graph takes another way, with other rounding, than with one.
_FAST_PATHS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


class Precision(NamedTuple):
    """What autocast does on a device."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def current(cls, device: torch.device) -> Precision:
        kind = device.type
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def again(self) -> torch.autocast:
        # Without its cache: what is cast without a graph must not be found by a pass with one.
        return torch.autocast(
            self.device, dtype=self.dtype, enabled=self.enabled, cache_enabled=False
        )


class Seen(NamedTuple):
    """One forward pass of a model."""

    activations: dict[str, Tensor]  # by the monitor's name of the layer, with their graph
    logits: Tensor  # [n, classes]
    images: Tensor | None  # what went in, where that is tensors
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    lasting: bool = True  # False: the graph is the step's, and gone after its backward


class Side:
    """One of the models: its layers, and its passes during a step.

    Args:
        role: ``"student"``, ``"teacher"`` or ``"base"``, for messages.
        model: may be wrapped for data parallelism or compiled; hooks go to what is wrapped.
        layers: the monitor's names to layers of the model.
        transform: of token layouts, as ``reshape_transform`` of :class:`fastxkd.GradCAM`.
        logits: what of the model's output is the logits; None finds out.
    """

    def __init__(
        self,
        role: str,
        model: nn.Module,
        layers: Mapping[str, str | nn.Module],
        transform: Callable[[Tensor], Tensor] | None,
        logits: Callable[[Any], Tensor] | None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{role}: expected a Module, got {type(model).__name__}")
        self.role = role
        self.model = model
        self.core = _core(model)
        self.layers: dict[str, nn.Module] = {}
        for name, layer in layers.items():
            (self.layers[name],) = resolve_layers(self.core, [layer], "layers").values()
        # Walking over a deep model takes as long as some of its layers.
        self.modules = [*self.core.modules()]
        self._transform = transform
        self._logits = logits

    @property
    def device(self) -> torch.device:
        first = next(self.core.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        floats = (p.dtype for p in self.core.parameters() if p.is_floating_point())
        return next(floats, torch.float32)

    def eagerly(self) -> AbstractContextManager[None]:
        """The model's own code, with its hooks, where it is compiled."""
        compiled = self.model is not self.core or any(map(is_compiled, self.modules))
        return eagerly(self.model) if compiled else nullcontext()

    def spatial(self, tensor: Tensor, seen: Seen, name: str) -> Tensor:
        """The named layer's activation or gradient as ``[n, channels, ...]``."""
        images = seen.images
        return to_spatial(
            tensor,
            transform=self._transform,
            image=images.shape[2:] if images is not None and images.dim() > 3 else None,
            model=self.core,
            layer=self.layers[name],
            n=len(seen.logits),
        )

    def seen(
        self, tap: Tap, output: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Seen:
        logits = logits_of(output) if self._logits is None else self._logits(output)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"{self.role}: expected logits [n, classes] as its output, got {got}; pass"
                " logits=, a function that takes them out of it"
            )
        images = [x for x in (*arguments, *keywords.values()) if isinstance(x, Tensor)]
        return Seen(tap.reached(), logits, next(iter(images), None), arguments, keywords)

    def gradients(self, seen: Seen, target: Tensor) -> list[Tensor]:
        """Of the logits ``target`` ``[n]`` with respect to every layer; the graph stays."""
        # float16 would lose a gradient that is spread over many positions.
        scale = 256.0 if seen.logits.dtype == torch.float16 else 1.0
        chosen = torch.zeros_like(seen.logits).scatter_(1, target[:, None], scale)
        try:
            found = torch.autograd.grad(
                seen.logits, list(seen.activations.values()), chosen, retain_graph=True,
                allow_unused=True,
            )  # fmt: skip
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise ValueError(
                f"{self.role}: what lies between its layers and its logits is checkpointed with"
                " use_reentrant=True, through which no gradient can be asked for; use"
                " use_reentrant=False, layers behind it, or metrics= without agreement"
            ) from error
        for name, gradient in zip(seen.activations, found, strict=True):
            if gradient is None:
                raise ValueError(
                    f"layers: the logits of the {self.role} do not depend on its layer {name!r}"
                    " (inside a checkpoint with use_reentrant=True that cannot be seen)"
                )
        return [gradient.float() / scale if scale != 1 else gradient for gradient in found]

    def fitted(
        self, arguments: tuple[Any, ...], keywords: dict[str, Any], precision: Precision
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What another model was called with, where this one is and in its own precision."""

        def fit(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            cast = value.is_floating_point() and not precision.enabled
            return value.to(self.device, self.dtype if cast else value.dtype, non_blocking=True)

        with torch.no_grad():
            return tree_map(fit, (arguments, keywords))  # type: ignore[no-any-return]

    def look(
        self,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        *,
        graph: bool,
        precision: Precision,
    ) -> Seen:
        """A pass beside the step's own: in eval mode, unseen by anybody's hooks, and without a
        trace in random numbers, flags and buffers.

        Args:
            graph: whether there shall be one from the layers to the logits.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices),
            torch.inference_mode(False),
            torch.no_grad(),
            precision.again(),
            evaluating(self.core),
            self.eagerly(),
            _unhooked(self.core),
            Tap(self.layers, cut=graph, one_pass=False) as tap,
        ):
            arguments, keywords = tree_map(_normal, (arguments, keywords))
            output = self.core.forward(*arguments, **keywords)
            return self.seen(tap, output, arguments, keywords)


class Watch:
    """Hooks on a model during a measured step, that call ``found`` with what a pass has shown.

    Args:
        side: the model.
        found: called at the end of every pass, while its graph is alive.
        trained: only passes in training mode with gradients count; anything else is somebody's
            validation. Otherwise the model is one that guides: a graph is made from its layers
            on, and none of it is left in what the caller gets.
        graph: False where activations are all that is asked of a model that guides.
    """

    def __init__(
        self, side: Side, found: Callable[[Seen], None], *, trained: bool, graph: bool
    ) -> None:
        self._side = side
        self._found = found
        self._trained = trained
        self._graph = graph
        self._thread = threading.get_ident()
        self._tap: Tap | None = None
        self._gradients_before = True
        self._detach = False
        core = side.core
        self._handles = [
            core.register_forward_pre_hook(self._begin, with_kwargs=True),
            core.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    def __reduce__(self) -> tuple[Callable[[], Watch], tuple[()]]:
        # A copy of the model that is made, or saved, in the middle of a step has our hooks. It must
        # not take a copy of everything that watches along, nor be watched.
        return _nobody, ()

    def close(self) -> None:
        if self._tap is not None:  # an interrupted pass; its gradient mode is gone with its frames
            self._tap.__exit__()
            self._tap = None
        for handle in self._handles:
            handle.remove()

    def _begin(self, core: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        if getattr(core, "_is_replica", False):
            raise ValueError(
                f"{self._side.role}: the replicas of DataParallel cannot be watched; use"
                " DistributedDataParallel"
            )
        if self._tap is not None or threading.get_ident() != self._thread:
            return
        enabled = torch.is_grad_enabled()
        if self._trained:
            if not (core.training and enabled):
                return
        else:
            given = chain(arguments, keywords.values(), core.parameters())
            learns = enabled and any(isinstance(x, Tensor) and x.requires_grad for x in given)
            self._detach = self._graph and not learns
            if self._detach and self._must_be_left_alone():
                precision = Precision.current(self._side.device)
                found = self._side.look(arguments, keywords, graph=True, precision=precision)
                self._found(found)
                return
        self._gradients_before = enabled
        self._tap = Tap(self._side.layers, cut=self._graph, one_pass=False)
        self._tap.__enter__()

    def _must_be_left_alone(self) -> bool:
        """Whether a graph in the guide's own pass could be noticed: by those whose hooks watch
        it, or in the last digits of its output."""
        if torch.is_inference_mode_enabled():
            return True
        core, modules = self._side.core, self._side.modules
        if not core.training and any(isinstance(m, _FAST_PATHS) for m in modules):
            return True
        return any(len(m._forward_hooks) > (m is core) for m in modules)

    def _end(self, core: nn.Module, arguments: Any, keywords: dict[str, Any], output: Any) -> Any:
        tap = self._tap
        if tap is None or threading.get_ident() != self._thread:
            return None
        self._tap = None
        tap.__exit__()
        torch.set_grad_enabled(self._gradients_before)
        if output is None:  # the pass has raised
            return None
        seen = self._side.seen(tap, output, arguments, keywords)
        self._found(seen._replace(lasting=self._detach or not self._graph))
        return tree_map(_detached, output) if self._detach else None


def _nobody() -> Watch:
    """Whose hooks do nothing: no thread has this number."""
    watch = object.__new__(Watch)
    watch._tap, watch._thread, watch._handles = None, -1, []
    return watch


def _core(model: nn.Module) -> nn.Module:
    """What is wrapped, for data parallelism or by the compiler, however often."""
    while True:
        inner = bare(model)
        if type(inner).__name__ == "OptimizedModule":
            inner = inner._orig_mod  # type: ignore[assignment]
        if inner is model:
            return model
        model = inner


def logits_of(output: Any) -> Any:
    """What of a model's output is taken for its logits, where nobody says."""
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _normal(value: Any) -> Any:
    # A graph cannot be built on what was made in inference mode.
    made = isinstance(value, Tensor) and value.is_inference()
    return value.clone() if made else value


@contextmanager
def _unhooked(model: nn.Module) -> Iterator[None]:
    """Without anybody's forward hooks: who watches the model must not see a pass of ours."""
    with ExitStack() as stack:
        for module in model.modules():
            if module._forward_hooks:
                stack.callback(setattr, module, "_forward_hooks", module._forward_hooks)
                module._forward_hooks = OrderedDict()
        yield


def explained(logits: Tensor, wanted: Tensor | None) -> Tensor:
    """The classes ``[n]`` to explain: those wanted, and where a model has no such class, or none
    is wanted, the one it gives itself."""
    best = logits.detach().argmax(1)
    if wanted is None:
        return best
    return torch.where((wanted >= 0) & (wanted < logits.shape[1]), wanted.to(best.dtype), best)
