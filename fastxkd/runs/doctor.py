"""What this installation can do: versions, devices, extras, and the kernel behind each operator."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

import fastxkd
from fastxkd.ops._library import cuda_extension
from fastxkd.runs.data import BUILTIN_FILE, FASHION_MNIST_DIRECTORY

# distribution -> what it brings to fastxkd
_PACKAGES = {
    "numpy": "required",
    "torchmetrics": "required",
    "typer": "this command",
    "rich": "this command",
    "safetensors": "weights in .safetensors",
    "pillow": "imagefolder: data, reports",
    "jinja2": "reports",
    "matplotlib": "reports",
    "triton": "kernels for GPUs",
    "torchvision": "models torchvision:NAME",
    "timm": "models timm:NAME",
}


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def findings() -> dict[str, list[dict[str, str]]]:
    """Tables to print: title -> rows, all text."""
    capability = torch.backends.cpu.get_cpu_capability()
    machine = [
        {"": "fastxkd", "is": fastxkd.__version__},
        {"": "torch", "is": torch.__version__},
        {"": "Python", "is": platform.python_version()},
        {"": "system", "is": f"{platform.system()} {platform.release()} {platform.machine()}"},
        {
            "": "CPU",
            "is": f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {capability}",
        },
        {"": "GPU", "is": _gpus()},
        {"": "CUDA extension", "is": cuda_extension()},
    ]
    kernels = [
        {name: str(value) for name, value in row._asdict().items()} for row in fastxkd.backends()
    ]
    packages = [
        {"package": name, "version": _installed(name), "for": use}
        for name, use in _PACKAGES.items()
    ]
    root = os.environ.get("FASTXKD_FASHION_MNIST") or str(FASHION_MNIST_DIRECTORY)
    data = [
        {"data": "builtin", "is": "present" if BUILTIN_FILE.is_file() else "missing"},
        {
            "data": "fashion-mnist",
            "is": f"in {root}"
            if any(
                os.path.exists(os.path.join(root, f"train-images-idx3-ubyte{end}"))
                for end in ("", ".gz")
            )
            else f"not in {root} (optional)",
        },
    ]
    return {"This machine": machine, "Kernels": kernels, "Packages": packages, "Data": data}


def _gpus() -> str:
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "no device"
        return f"none ({built})"
    return ", ".join(
        torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())
    )
