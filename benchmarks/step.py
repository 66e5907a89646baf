"""Explaining inside a training step, out of the step's own forward.

The floor is the step alone: forward, cross-entropy, backward, SGD. Beside it the same step that
also takes the Grad-CAM of its batch, and one whose loss holds the student's maps to given ones,
which needs a second derivative through what follows the layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastxkd
from benchmarks._harness import Case, Skip, Spec, main
from tests._torchvision import declare_operators

TESTS = ["tests/test_capture.py", "tests/test_gradcam.py"]
LAYER = "layer4"


def case(n: int, size: int) -> Case:
    declare_operators()
    try:
        from torchvision.models import resnet18
    except ImportError as error:
        raise Skip(f"needs torchvision ({error})") from None
    model = resnet18(weights=None).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images, labels = torch.randn(n, 3, size, size), torch.randint(1000, (n,))
    with fastxkd.capture(model, LAYER) as probe, torch.no_grad():
        model(images[:2])
    guidance = torch.rand(n, *next(iter(probe.activations.values())).shape[2:])

    def finish(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def bare() -> None:
        finish(F.cross_entropy(model(images), labels))

    def maps(differentiable: bool) -> tuple[Tensor, Tensor]:
        with fastxkd.capture(model, LAYER) as captured:
            logits = model(images)
        score = logits.gather(1, labels[:, None]).sum()
        found = captured.cam("gradcam", score=score, differentiable=differentiable)
        return F.cross_entropy(logits, labels), found

    def explained() -> None:
        loss, _ = maps(False)
        finish(loss)

    def aligned() -> None:
        loss, found = maps(True)
        finish(loss + F.mse_loss(found, guidance))

    return Case({"floor: the step": bare, "ours": explained, "ours, aligned": aligned})


def specs(quick: bool) -> list[Spec]:
    n, size = (4, 32) if quick else (64, 64)
    return [Spec(f"step, ResNet-18, {n}x3x{size}x{size}", lambda: case(n, size), rounds=15)]


if __name__ == "__main__":
    main("step", specs, TESTS, __doc__)
