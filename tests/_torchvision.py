"""Lets torchvision import beside a torch it was not built for; tests and benchmarks only.

The wheel's compiled part does not load there, and ``import torchvision`` fails at registering fakes
for two operators of it. Declaring their schemas first is enough for models and transforms.
"""

from __future__ import annotations

import importlib.util

import torch

_library: torch.library.Library | None = None


def declare_operators() -> None:
    global _library
    if importlib.util.find_spec("torchvision") is None or _library is not None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
