"""Which layers of a model to compare, found by watching one forward pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastxkd.cam.capture import evaluating
from fastxkd.train.fusion import ExplainedStudent

_STAGES = re.compile(r"(?:.*\.)?(?:layer|stage|block)_?\d+|(?:.*\.)?stages\.\d+")
_CONTAINERS = re.compile(r"(?:.*\.)?_?(?:blocks|features|stages|layers)\.\d+")
MOST_LAYERS = 4


class _Output(NamedTuple):
    name: str
    height: int
    width: int


def _spatial_outputs(model: nn.Module, example: Tensor) -> list[_Output]:
    """Modules that put out [N, C, H, W], in the order they finish; run once each, root left out."""
    order: list[_Output] = []
    calls: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(output, Tensor) and output.dim() == 4 and len(output) == len(example):
                order.append(_Output(name, output.shape[2], output.shape[3]))

        return hook

    handles = [
        module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name
    ]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    # A module that runs several times (a shared ReLU) has no single output to explain.
    return [output for output in order if calls[output.name] == 1]


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
    model the last module at every resolution. Of an :class:`ExplainedStudent` those of the student
    inside it.

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
    outputs = [
        output for output in _spatial_outputs(model, example) if output.height * output.width > 1
    ]
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
