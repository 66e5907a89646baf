"""Which layers of a model to compare, found by watching one forward pass."""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastxkd.cam.capture import eagerly, evaluating
from fastxkd.cam.layouts import to_maps
from fastxkd.train.fusion import ExplainedStudent

_STAGES = re.compile(r"(?:.*\.)?(?:layer|stage|block)_?\d+|(?:.*\.)?stages\.\d+")
_CONTAINERS = re.compile(r"(?:.*\.)?_?(?:blocks|features|stages|layers)\.\d+")
MOST_LAYERS = 4


# By class: torch's MultiheadAttention and what timm, torchvision and transformers call theirs.
_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)


class _Output(NamedTuple):
    name: str
    height: int
    width: int
    place: int  # in the order of the pass


class _Watcher:
    """What one forward pass shows of a model's modules.

    Attributes:
        outputs: modules that put out [N, C, H, W], in the order they finish; what lies inside the
            attention of a transformer is left out: [N, heads, tokens, ...] are no positions.
        tokens: modules whose tokens [N, T, C] an attention reads and which form a grid.
        calls: how often each module ran.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.outputs: list[_Output] = []
        self.tokens: list[_Output] = []
        self.calls: dict[str, int] = {}
        self._example = example
        self._prefix = getattr(model, "num_prefix_tokens", None)
        self._inside = 0
        self._place = 0
        # By address, which another tensor may have when this one is gone.
        self._made: dict[int, tuple[str, weakref.ref[Tensor]]] = {}

    def entering(self, module: nn.Module, inputs: tuple[Any, ...], keywords: Any) -> None:
        if not _ATTENTION.search(type(module).__name__):
            return
        given = [x for x in (*inputs, *keywords.values()) if isinstance(x, Tensor)]
        if not given or given[0].dim() != 3:
            return
        self._inside += 1
        name, made = self._made.get(id(given[0]), ("", None))
        read = None if made is None else made()
        if self._inside > 1 or read is None or read is not given[0]:
            return
        if len(read) != len(self._example):
            return
        prefix = self._prefix if isinstance(self._prefix, int) else None
        try:
            height, width = to_maps(read, self._example.shape[2:], prefix).shape[2:]
        except ValueError:  # no grid
            return
        self._place += 1
        self.tokens.append(_Output(name, height, width, self._place))

    def leaving(self, name: str, module: nn.Module, inputs: Any, keywords: Any, found: Any) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        if _ATTENTION.search(type(module).__name__):
            given = [x for x in (*inputs, *keywords.values()) if isinstance(x, Tensor)]
            self._inside -= bool(given) and given[0].dim() == 3
        if not isinstance(found, Tensor) or self._inside:
            return
        if found.dim() == 3:
            self._made[id(found)] = name, weakref.ref(found)
        elif found.dim() == 4 and len(found) == len(self._example):
            self._place += 1
            self.outputs.append(_Output(name, found.shape[2], found.shape[3], self._place))


def _watched(model: nn.Module, example: Tensor) -> tuple[list[_Output], list[_Output]]:
    """``outputs`` and ``tokens`` of a pass; of modules that run once each, root left out."""
    watcher = _Watcher(model, example)
    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(watcher.entering, with_kwargs=True))
            leaving = partial(watcher.leaving, name)
            handles.append(module.register_forward_hook(leaving, with_kwargs=True))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), eagerly(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    # A module that runs several times (a shared ReLU) has no single output to explain.
    outputs, tokens = (
        [one for one in found if watcher.calls[one.name] == 1 and one.height * one.width > 1]
        for found in (watcher.outputs, watcher.tokens)
    )
    return outputs, tokens


def _last_per_resolution(outputs: list[_Output]) -> list[str]:
    last = {(output.height, output.width): output.name for output in outputs}
    return list(last.values())[-MOST_LAYERS:]


def _outermost(names: list[str], pattern: re.Pattern[str]) -> set[str]:
    matching = [name for name in names if pattern.fullmatch(name)]
    shallowest = min((name.count(".") for name in matching), default=0)
    return {name for name in matching if name.count(".") == shallowest}


def default_layers(model: nn.Module, example: Tensor) -> list[str]:
    """Up to four layers worth comparing, from early to late.

    Modules called ``layer1``.. or ``stage1``.. (or ``stages.0``..) are taken as they are; of blocks
    in a container (``blocks``, ``features``, ``layers``) the last at every resolution; of any other
    model the last module at every resolution. Of a model that ends in attention over tokens: the
    layers whose (normalised) tokens an attention reads, because what comes after the last one
    reaches the answer through the class token alone, where there is one. Of an
    :class:`ExplainedStudent` those of the student inside it.

    Args:
        model: any classifier with spatial activations.
        example: a batch of at least one image it accepts.

    Raises:
        ValueError: nothing in the model puts out [N, C, H, W] with more than one position.
    """
    if isinstance(model, ExplainedStudent):
        with torch.no_grad(), evaluating(model):
            seen = model.seen(example)
        return [f"student.{name}" for name in default_layers(model.student, seen)]
    outputs, tokens = _watched(model, example)
    if tokens and tokens[-1].place > max((output.place for output in outputs), default=0):
        count = min(len(tokens), MOST_LAYERS)
        return [tokens[(k + 1) * len(tokens) // count - 1].name for k in range(count)]
    names = [output.name for output in outputs]
    stages = _outermost(names, _STAGES)
    if len(stages) > 1:
        return [name for name in names if name in stages][-MOST_LAYERS:]
    blocks = _outermost(names, _CONTAINERS)
    layers = _last_per_resolution([output for output in outputs if output.name in blocks])
    if len(layers) > 1:
        return layers
    layers = _last_per_resolution(outputs)
    if not layers:
        raise ValueError(
            f"model: {type(model).__name__} has no layer with spatial activations [N, C, H, W] on "
            f"images {list(example.shape[1:])}; name the layers to compare"
        )
    return layers


def last_spatial_layer(model: nn.Module, example: Tensor) -> str:
    """The layer whose maps explain the decision: the last of :func:`default_layers`."""
    return default_layers(model, example)[-1]


def pair_layers(
    student: list[str], base: list[str], teacher: list[str]
) -> tuple[list[str], list[str], list[str]]:
    """Equally long lists whose i-th entries belong together, counted from the last layer."""
    count = min(len(student), len(base), len(teacher))
    return student[-count:], base[-count:], teacher[-count:]


def choose_layers(
    models: dict[str, nn.Module],
    example: Tensor,
    *,
    student: Sequence[str] | None = None,
    base: Sequence[str] | None = None,
    teacher: Sequence[str] | None = None,
) -> dict[str, list[str]]:
    """The layers to compare, role -> names, equally many each and paired in order.

    Unless named, they are each model's :func:`default_layers`, paired from the last one. A base of
    the student's architecture, or the teacher itself as base, takes the layers of its twin, and a
    teacher of the student's class takes names that were given for the student.

    Raises:
        ValueError: names a model does not have, or lists of different length.
    """
    given = {"teacher": teacher, "base": base, "student": student}
    chosen: dict[str, list[str]] = {}
    for role in ("student", "teacher", "base"):
        wanted = given[role]
        if wanted is None:
            chosen[role] = _inherited(role, models, chosen, student is not None) or default_layers(
                models[role], example
            )
            continue
        unknown = [name for name in wanted if not _has(models[role], [name])]
        if unknown or not wanted:
            what = f"no layer named {unknown[0]!r}" if unknown else "no layers: none were named"
            raise ValueError(f"layers: {role} has {what}")
        chosen[role] = list(wanted)
    fixed = {role: len(chosen[role]) for role in given if given[role] is not None}
    if len(set(fixed.values())) > 1:
        listed = ", ".join(f"{count} for {role}" for role, count in fixed.items())
        raise ValueError(f"layers: expected equally many for every model, got {listed}")
    for role, count in fixed.items():
        short = next((other for other in given if len(chosen[other]) < count), None)
        if short is not None:
            raise ValueError(
                f"layers: {count} were named for {role}, but {short} has only "
                f"{len(chosen[short])} to pair them with ({', '.join(chosen[short])}); name them"
            )
    pairs = pair_layers(chosen["student"], chosen["base"], chosen["teacher"])
    return dict(zip(("student", "base", "teacher"), pairs, strict=True))


def _inherited(
    role: str, models: dict[str, nn.Module], chosen: dict[str, list[str]], named: bool
) -> list[str] | None:
    """The names to take over from a model of the same make, if there is one."""
    if role == "base":
        if models["teacher"] is models["base"]:
            return chosen["teacher"]
        return chosen["student"] if _alike(models["student"], models["base"]) else None
    same_class = type(models[role]) is type(models["student"])
    if named and role == "teacher" and same_class and _has(models[role], chosen["student"]):
        return chosen["student"]
    return None


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether the architecture is the same, as far as the weights show it."""
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (one, other)]
    return type(one) is type(other) and shapes[0] == shapes[1]


def _has(model: nn.Module, names: Sequence[str]) -> bool:
    known = dict(model.named_modules())
    return bool(names) and all(name in known and name for name in names)
