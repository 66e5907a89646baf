"""Models by name, weights by file: everything a run needs to hold a network in its hands."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import logging
import os
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastxkd._extras import require
from fastxkd.runs.cnn import BUILTIN_MODELS, builtin_model
from fastxkd.runs.layers import choose_layers, default_layers, last_spatial_layer, pair_layers
from fastxkd.runs.layout import RUN

__all__ = [
    "check_normalisation",
    "check_weights",
    "choose_layers",
    "default_layers",
    "find_factory",
    "last_spatial_layer",
    "load_model",
    "load_weights",
    "pair_layers",
    "users_own",
]

SPECS = (
    f"one of {', '.join(BUILTIN_MODELS)}, timm:NAME, torchvision:NAME, package.module:factory, "
    "path/to/file.py:factory or xdistill:path/to/student.safetensors"
)
_CLASS_KEYWORDS = ("num_classes", "n_classes", "classes")
_CHANNEL_KEYWORDS = ("in_channels", "in_chans", "num_channels", "input_channels")
_WRAPPERS = ("state_dict", "model", "model_state_dict", "model_state", "net")
# What these train with, where a model does not say.
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_PUBLISHED = {"timm": _IMAGENET, "torchvision": _IMAGENET}
_log = logging.getLogger("fastxkd")


def load_model(
    spec: str, *, num_classes: int, in_channels: int, weights: str | Path | None = None
) -> nn.Module:
    """Build a model and fill in its weights.

    Args:
        spec: ``cnn-large`` | ``cnn-medium`` | ``cnn-small``, ``timm:NAME``, ``torchvision:NAME``,
            ``package.module:factory`` or ``path/to/file.py:factory``. A factory is called with
            ``num_classes`` and ``in_channels`` (or ``in_chans``) if its signature names them.
            ``xdistill:FILE`` is an explained student of ``fastxkd distill``, weights included.
        num_classes: outputs of the model.
        in_channels: channels of the images. torchvision models are made for three; for another
            number their first convolution is replaced by a fresh one.
        weights: ``.safetensors``, ``.pth`` or ``.pt`` file, see :func:`load_weights`.

    Raises:
        ValueError: unknown spec, or weights that do not fit.
    """
    kind, _, name = spec.rpartition(":")
    if spec in BUILTIN_MODELS:
        model: object = builtin_model(spec, num_classes=num_classes, in_channels=in_channels)
    elif kind == "timm" and name:
        model = _timm(name, num_classes, in_channels)
    elif kind == "torchvision" and name:
        model = _torchvision(name, num_classes, in_channels)
    elif kind == "xdistill" and name:
        model = _explained(Path(name).expanduser(), num_classes, in_channels)
    elif kind and name:
        model = _call(find_factory(spec), num_classes, in_channels, spec)
    else:
        raise ValueError(f"model: expected {SPECS}, got {spec!r}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: {spec} made a {type(model).__name__}, expected a torch.nn.Module")
    if weights is not None:
        load_weights(model, weights)
    return model


def _timm(name: str, num_classes: int, in_channels: int) -> nn.Module:
    timm = users_own("timm")
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        hint = f"; for example {', '.join(close)}" if close else ""
        raise ValueError(f"model: timm has no {name!r}{hint}")
    return timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels)


def _explained(path: Path, num_classes: int, in_channels: int) -> nn.Module:
    from fastxkd.runs.xdistill import from_recipe

    if not path.is_file():
        raise ValueError(f"model: {path} does not exist")
    safetensors = require("safetensors", extra="cli")
    try:
        with safetensors.safe_open(path, "pt") as file:
            recipe = json.loads((file.metadata() or {}).get("fastxkd", "null"))
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"model: {path} is not a readable safetensors file ({error})") from error
    if not isinstance(recipe, Mapping):
        raise ValueError(f"model: {path} does not say how its student is built")
    model = from_recipe(recipe, num_classes=num_classes, in_channels=in_channels)
    load_weights(model, path)
    return model


def _torchvision(name: str, num_classes: int, in_channels: int) -> nn.Module:
    models = users_own("torchvision.models")
    known = models.list_models(module=models)
    if name not in known:
        close = [other for other in known if other.startswith(name[:4])][:5]
        hint = f"; for example {', '.join(close)}" if close else ""
        raise ValueError(f"model: torchvision has no classifier {name!r}{hint}")
    # Inception and GoogLeNet answer with tuples in training mode while they have auxiliary heads.
    plain = (
        {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    )
    model = models.get_model(name, weights=None, num_classes=num_classes, **plain)
    if in_channels != 3:
        _replace_first_convolution(model, in_channels)
    return model


def _replace_first_convolution(model: nn.Module, in_channels: int) -> None:
    name, old = next(
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.in_channels == 3
    )
    options: dict[str, Any] = {
        name: getattr(old, name)
        for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    }
    new = nn.Conv2d(in_channels, old.out_channels, bias=old.bias is not None, **options)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def users_own(module: str) -> ModuleType:
    """Import what the user brings along: its version is theirs to choose, so no extra names it."""
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != package:
            raise
        raise ImportError(
            f"this needs {package}, which is not installed: pip install {package}"
        ) from error
    # A torchvision built for another torch fails with a RuntimeError about its operators.
    except RuntimeError as error:
        raise ImportError(
            f"{package} is installed but does not import beside torch {torch.__version__}: {error}"
        ) from error


def find_factory(
    spec: str, *, argument: str = "model", expected: str = SPECS
) -> Callable[..., object]:
    """What ``package.module:name`` or ``path/to/file.py:name`` stands for; runs the user's code.

    Raises:
        ValueError: no such file, module or callable; the text begins with ``argument``.
    """
    place, _, name = spec.rpartition(":")
    if place.endswith(".py"):
        path = Path(place).expanduser().resolve()
        if not path.is_file():
            raise ValueError(f"{argument}: {path} of {spec!r} does not exist")
        module_spec = importlib.util.spec_from_file_location(f"_fastxkd_user_{path.stem}", path)
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_spec.name] = module
        module_spec.loader.exec_module(module)
    else:
        # A console script does not look into the working directory, unlike `python -m`.
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name and (place == error.name or place.startswith(f"{error.name}.")):
                raise ValueError(
                    f"{argument}: no module {error.name!r}; expected {expected}, got {spec!r}"
                ) from error
            raise
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ValueError(f"{argument}: {place} has no callable {name!r} (from {spec!r})")
    return factory


def _call(factory: Callable[..., object], num_classes: int, in_channels: int, spec: str) -> object:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return factory()
    keywords: dict[str, int] = {}
    for names, value in ((_CLASS_KEYWORDS, num_classes), (_CHANNEL_KEYWORDS, in_channels)):
        keywords.update({name: value for name in names if name in parameters})
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in keywords
    ]
    if missing or any(
        parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty
        for parameter in parameters.values()
    ):
        raise ValueError(
            f"model: {spec} needs the argument(s) {', '.join(missing) or 'positional'}, but a run "
            f"can only give {_CLASS_KEYWORDS[0]} and {_CHANNEL_KEYWORDS[0]}"
        )
    return factory(**keywords)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill ``model`` from a file; nothing is ever unpickled.

    A wrapper such as ``{"state_dict": ...}`` is opened and the prefix ``module.`` dropped. Keys
    must match. Where every name differs but number, order and shapes agree, tensors are taken in
    order and a warning says so: that is how the published EfficientNet-Lite checkpoints fit timm.

    Raises:
        ValueError: unreadable file, or keys and shapes that do not fit.
    """
    path = Path(path).expanduser()
    state = _plain_state(_read(path), path)
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    if missing and len(missing) == len(wanted) and _same_shapes(wanted, state):
        _log.warning(
            "%s: no name matches the model, but number, order and shapes of all %d tensors do; "
            "they were taken in order",
            path,
            len(wanted),
        )
        state = dict(zip(wanted, state.values(), strict=True))
        missing = unexpected = []
    misshapen = [
        f"{key} {list(state[key].shape)} for {list(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    problems = [
        f"{len(found)} {what} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for what, found in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if found
    ]
    if problems:
        raise ValueError(
            f"weights: {path} does not fit {type(model).__name__}: {'; '.join(problems)}"
        )
    model.load_state_dict(state)


def _same_shapes(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    return [value.shape for value in wanted.values()] == [value.shape for value in state.values()]


def _read(path: Path) -> object:
    if not path.is_file():
        raise ValueError(f"weights: {path} does not exist")
    if path.suffix == ".safetensors":
        safetensors = require("safetensors", extra="cli")
        try:
            return require("safetensors.torch", extra="cli").load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"weights: {path} is not a readable safetensors file ({error})"
            ) from error
    if path.suffix not in (".pth", ".pt", ".bin", ".ckpt"):
        raise ValueError(f"weights: expected a .safetensors, .pth or .pt file, got {path.name!r}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weights: {path} would have to be unpickled, which can run any code, or is damaged; "
            "save the state_dict alone (torch.save(model.state_dict(), ...)) or as .safetensors"
        ) from error
    # Damage can trip the reader anywhere, and it answers with whatever that raises.
    except Exception as error:
        raise ValueError(f"weights: {path} is damaged or no torch file ({error})") from error


def _plain_state(content: object, path: Path) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"weights: {path} holds a {type(content).__name__}, expected a state_dict")
    strange = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(
            f"weights: {path} holds more than tensors ({', '.join(map(str, strange[:3]))}), "
            "expected a state_dict"
        )
    state = dict(content)
    while state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def check_weights(model: nn.Module) -> dict[str, int]:
    """Weights that make every answer meaningless: name -> how many of its numbers are not finite.

    Buffers may hold infinities on purpose (masks do), so only NaN counts there. An empty dict
    means that all is well.

    >>> layer = torch.nn.Linear(2, 2, bias=False)
    >>> check_weights(layer)
    {}
    >>> check_weights(layer.requires_grad_(False).apply(lambda x: x.weight[0].fill_(torch.nan)))
    {'weight': 2}
    """
    found: dict[str, int] = {}
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.is_floating_point() and not (fine := torch.isfinite(value)).all():
                found[name] = int((~fine).sum())
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point() and (broken := torch.isnan(buffer)).any():
                found[name] = int(broken.sum())
    return found


def check_normalisation(
    role: str,
    spec: str,
    model: nn.Module,
    weights: str | os.PathLike[str] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> None:
    """Say so where weights were most likely trained on images with another mean and spread.

    Weights in a run's folder (of ``fastxkd distill``) are taken to be used as they were trained.

    Args:
        mean, std: of the images where nobody chose them; None: they are taken as they are.
    """
    library = spec.partition(":")[0]
    if weights is None or library not in _PUBLISHED or mean is None or std is None:
        return
    if (Path(weights).expanduser().parent / RUN).exists():
        return
    config = getattr(model, "pretrained_cfg", None) or {}
    wanted = {name: tuple(config.get(name, value)) for name, value in _PUBLISHED[library].items()}
    pairs = [*zip(mean, wanted["mean"], strict=False), *zip(std, wanted["std"], strict=False)]
    if all(abs(own - published) < 0.01 for own, published in pairs):
        return
    options = (f"--{name} {','.join(f'{x:g}' for x in values)}" for name, values in wanted.items())
    _log.warning(
        "%s: images are normalised as fastxkd trains (mean %.3f, std %.3f); weights that %s"
        " publishes are made for %s",
        role,
        mean[0],
        std[0],
        library,
        " ".join(options),
    )
