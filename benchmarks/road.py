"""ROADCombined of a batch of images against pytorch-grad-cam's.

The floor is the model alone: its pass over the images, and one over each perturbed copy of them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastxkd
from benchmarks._harness import Case, Skip, Spec, main
from fastxkd.metrics.road import PERCENTILES
from tests._torchvision import declare_operators

TESTS = ["tests/test_road.py"]
PEER_IMAGES = 2


def inputs(n: int, size: int) -> tuple[Tensor, Tensor]:
    """Images with structure at several scales, and maps as of a 7 x 7 layer, without ties."""
    coarse = F.interpolate(torch.randn(n, 3, size // 8, size // 8), (size, size), mode="bicubic")
    maps = F.interpolate(torch.rand(n, 1, 7, 7), (size, size), mode="bilinear")[:, 0]
    return coarse + 0.3 * torch.randn(n, 3, size, size), maps + 1e-3 * torch.rand_like(maps)


def peer(
    images: Tensor,
    maps: Tensor,
    classes: list[int],
    model: nn.Module,
    percentiles: Sequence[int] = PERCENTILES,
) -> Callable[[], Any]:
    """ROADCombined without noise, as a call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports
        from pytorch_grad_cam.metrics import road
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    def silent(metric: Callable[[int], Any], percentile: int) -> Any:
        made = metric(percentile)
        made.perturbation.imputer.noise = 0
        return made

    combined = road.ROADCombined(list(percentiles))
    for averager in (combined.morf_averager, combined.lerf_averager):
        averager.imputer = functools.partial(silent, averager.imputer)
    targets, arrays = [ClassifierOutputTarget(c) for c in classes], maps.numpy()

    def call() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its numbers
            return combined(images, arrays, targets, model)

    return call


def case(n: int, size: int) -> Case:
    declare_operators()
    try:
        import pytorch_grad_cam  # noqa: F401
        from torchvision.models import resnet18
    except ImportError as error:
        raise Skip(str(error)) from None
    model = resnet18(weights=None).eval()
    images, maps = inputs(n, size)
    classes = [37 * i % 1000 for i in range(n)]

    @torch.no_grad()
    def passes() -> None:
        for _ in range(1 + 2 * len(PERCENTILES)):
            model(images)

    def ours() -> Tensor:
        return fastxkd.road_score(model, images, maps, classes, score="logit", noise=0)

    # Theirs takes minutes for a batch, image after image: it is timed on the first ones alone.
    some = min(n, PEER_IMAGES)
    theirs = peer(images[:some], maps[:some], classes[:some], model)
    name = f"pytorch-grad-cam, {some} images"

    def notes() -> dict[str, str]:
        off = (ours()[:some] - torch.as_tensor(theirs())).abs().max().item()
        return {name: f"{some} of {n}", "ours": f"scores within {off:.1e} of pytorch-grad-cam's"}

    variants = {f"floor: {1 + 2 * len(PERCENTILES)} passes": passes, name: theirs, "ours": ours}
    return Case(variants, notes=notes)


def specs(quick: bool) -> list[Spec]:
    n, size = (2, 64) if quick else (32, 224)
    return [Spec(f"ROADCombined, ResNet-18, {n}x{size}x{size}", functools.partial(case, n, size),
                 rounds=3)]  # fmt: skip


if __name__ == "__main__":
    main("road", specs, TESTS, __doc__)
