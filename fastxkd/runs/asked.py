"""What a run over a data set was asked for: checked, and made into models, layers and numbers."""

from __future__ import annotations

import hashlib
import logging
import math
import operator
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import fastxkd
from fastxkd._extras import require
from fastxkd.cam.capture import evaluating
from fastxkd.cam.maps import Normalize, check_normalize
from fastxkd.runs.chunks import Array
from fastxkd.runs.cnn import BUILTIN_MODELS
from fastxkd.runs.data import why
from fastxkd.runs.layers import last_spatial_layer
from fastxkd.runs.methods import dtype_of
from fastxkd.runs.models import check_normalisation, check_weights, load_model
from fastxkd.runs.ranks import Ranks
from fastxkd.runs.sources import Source
from fastxkd.train._watch import logits_of
from fastxkd.train.distiller import fingerprint

Dtype = Literal["float16", "float32", "uint8"]
Names = Sequence[str] | str | None
_log = logging.getLogger("fastxkd")
File = str | os.PathLike[str]


class Model(NamedTuple):
    """A model on its device; ``settings`` and ``file`` are what a run records of it."""

    module: nn.Module
    settings: dict[str, str]
    file: dict[str, str]


def check_numbers(*, chunk: int, batch_size: int, workers: int, gallery: int) -> None:
    given = {"chunk": chunk, "batch_size": batch_size, "workers": workers, "gallery": gallery}
    for name, value in given.items():
        least = 1 if name in ("chunk", "batch_size") else 0
        if type(value) is not int or value < least:
            raise ValueError(f"{name}: expected an int of at least {least}, got {value!r}")


def check_targets(given: Any) -> Any:
    """``"predicted"``, ``"label"``, or a class as an int.

    Raises:
        ValueError: anything else.
    """
    if isinstance(given, str) and given in ("predicted", "label"):
        return given
    try:
        if isinstance(given, bool):
            raise TypeError
        return operator.index(given)
    except TypeError:
        raise ValueError(
            f"targets: expected 'predicted', 'label' or a class, got {given!r}"
        ) from None


def stored_dtype(name: str, normalize: Normalize) -> torch.dtype:
    known = {"float16": torch.float16, "float32": torch.float32, "uint8": torch.uint8}
    if name not in known:
        raise ValueError(f"dtype: expected one of {', '.join(known)}, got {name!r}")
    check_normalize(normalize)
    if normalize is None and name != "float32":
        raise ValueError(f"dtype: expected float32 for maps with normalize=None, got {name}")
    return known[name]


def pick_device(name: str, ranks: Ranks) -> torch.device:
    """``auto`` and ``cuda`` are this rank's own CUDA device; ``auto`` is the CPU without one.

    Raises:
        ValueError: a device this machine or this torch does not have.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{ranks.local_rank % torch.cuda.device_count()}"
    try:
        device = torch.device("cpu" if name == "auto" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device: {name!r} cannot be used here ({reason})") from error
    return device


def make_model(
    given: nn.Module | str,
    role: str,
    weights: File | None,
    num_classes: int | None,
    source: Source,
    device: torch.device,
) -> Model:
    """The model that was given, or the one of that name.

    Raises:
        ValueError: an unknown name, weights that do not fit or are not finite.
        TypeError: neither a module nor a name.
    """
    file: dict[str, str] = {}
    if isinstance(given, nn.Module):
        if weights is not None:
            raise ValueError(f"{role}: weights go with a model's name, got a module and {weights}")
        module, name = given, f"{type(given).__module__}.{type(given).__qualname__}"
    elif isinstance(given, str):
        count = num_classes or (len(source.classes) if source.classes else 0)
        if not count:
            raise ValueError("num_classes: the data names no classes; say how many outputs")
        # Without weights a model is what its name and this seed make it, here and in a restart.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = load_model(
                given,
                num_classes=count,
                in_channels=source.shape[0],
                weights=None if weights is None else Path(weights),
            )
        name = given
        if weights is None and given.partition(":")[0] in (*BUILTIN_MODELS, "timm", "torchvision"):
            _log.warning("%s: %s without weights is made of random numbers", role, given)
        if weights is not None:
            with Path(weights).expanduser().open("rb") as content:
                file = {"path": str(weights), "sha256": _sha256(content)}
    else:
        raise TypeError(f"{role}: expected a module or the name of one, got {type(given).__name__}")
    broken = check_weights(module)
    if broken:
        name_of, many = next(iter(broken.items()))
        raise ValueError(
            f"{role}: {len(broken)} of its weights are not finite, {many:,} numbers of {name_of!r};"
            " every map would be noise"
        )
    if source.settings.mean is None and source.settings.std is None:
        check_normalisation(role, name, module, weights, source.mean, source.std)
    settings = {"name": name, "weights": fingerprint(module.state_dict())}
    return Model(module.to(device), settings, file)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


@contextmanager
def answering(model: nn.Module, role: str, example: Tensor) -> Iterator[None]:
    """Have a model answer with its logits alone, for a while, where it says more.

    Raises:
        ValueError: it does not take such images; says what it said.
    """
    example = example.to(dtype_of(model))
    try:
        with torch.no_grad(), evaluating(model):
            plain = isinstance(model(example), Tensor)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever its own code raises
        raise ValueError(
            f"{role}: it does not take images {list(example.shape[1:])} {example.dtype}; do"
            f" image_size and channels fit? {why(error)}"
        ) from error
    if plain:
        yield
        return
    handle = model.register_forward_hook(lambda module, inputs, output: logits_of(output))
    try:
        yield
    finally:
        handle.remove()


def choose_names(
    given: Sequence[str] | None, source: Source, outputs: int | None
) -> Sequence[str] | None:
    """Of a model's outputs: the given names, or those of the data if they can be meant.

    Raises:
        ValueError: more or fewer names than outputs.
    """
    if given is None:
        return source.classes if len(source.classes or ()) == outputs else None
    if len(given) != outputs:
        raise ValueError(f"class_names: expected {outputs}, one per output, got {len(given)}")
    return given


def choose_layers(model: nn.Module, given: Names, example: Tensor) -> list[str]:
    """The named ones, or the last with positions."""
    if given is None:
        return [last_spatial_layer(model, example.to(dtype_of(model)))]
    return [given] if isinstance(given, str) else list(given)


def choose_base_layers(
    base: nn.Module | None, given: Names, layers: list[str], example: Tensor
) -> list[str] | None:
    """The named ones; the model's names where the base has them; its own last one for one."""
    if base is None:
        if given is not None:
            raise ValueError("base_layers: given without a base, which unicam compares with")
        return None
    if given is None and len(layers) == 1 and layers[0] not in dict(base.named_modules()):
        return choose_layers(base, None, example)
    return layers if given is None else choose_layers(base, given, example)


def read_embeddings(given: Tensor | File | None) -> Tensor | None:
    """Embeddings as they are, or the one tensor of a file.

    Raises:
        ValueError: a file of another kind, or damaged, or with more in it.
    """
    if given is None or isinstance(given, Tensor):
        return given
    path = Path(given).expanduser()
    if path.suffix not in (".npy", ".safetensors"):
        raise ValueError(
            f"class_embeddings: expected a .npy or .safetensors file, got {path.name!r}"
        )
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        tensors = require("safetensors.torch", extra="cli").load_file(path)
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(f"class_embeddings: {path} cannot be read ({error})") from error
    if len(tensors) != 1:
        raise ValueError(f"class_embeddings: expected one tensor in {path}, got {len(tensors)}")
    return next(iter(tensors.values()))  # type: ignore[no-any-return]


def check_space(out: Path, images: int, arrays: Mapping[str, Array]) -> None:
    """Refuse a run that its disk cannot hold even if its maps shrink to a half.

    Raises:
        ValueError: says how much is needed, and how much there is.
    """
    each = sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in arrays.values())
    out = out.expanduser().absolute()
    disk = next(folder for folder in (out, *out.parents) if folder.exists())
    free = shutil.disk_usage(disk).free
    if images * each <= 2 * free:
        return
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if images * each > 2 * (free + written):
        raise ValueError(
            f"out: the maps of {images:,} images are {images * each / 1e9:.2g} GB before they are"
            f" packed, and {disk} has {free / 1e9:.2g} GB left. Take fewer methods or layers, a"
            " smaller size, dtype uint8, or another disk"
        )


def facts(
    device: torch.device,
    ranks: Ranks,
    workers: int,
    files: Mapping[str, dict[str, str]],
    reference: Mapping[str, Any],
) -> dict[str, Any]:
    """What ``run.json`` says beside the settings: where and with what the run began."""
    on_gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    program = Path(sys.argv[0]).name
    return {
        "command": ["fastxkd" if program == "__main__.py" else program, *sys.argv[1:]],
        "versions": {
            "fastxkd": fastxkd.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "numcodecs": require("numcodecs", extra="runs").__version__,
            "pyarrow": require("pyarrow", extra="runs").__version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "device": f"{device}{on_gpu}",
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "ranks": ranks.ranks,
        "workers": workers,
        "backends": [row._asdict() for row in fastxkd.backends()],
        "weights": {role: file for role, file in files.items() if file},
        "unicam_reference": reference,
    }
