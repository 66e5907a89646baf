"""Small convolutional networks for small images, as teachers and students that train on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class SmallCNN(nn.Module):
    """Four stages of 3x3 convolution, batch norm and ReLU, global average pooling, linear head.

    ``stage2`` and ``stage3`` halve the resolution, so on 28 px the last map keeps 7x7 positions,
    fine enough for a saliency map.

    Args:
        widths: channels of the four stages.
        depths: convolutions in each.
        num_classes: outputs.
        in_channels: channels of the images.
    """

    stage1: nn.Module
    stage2: nn.Module
    stage3: nn.Module
    stage4: nn.Module

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        *,
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        inputs = in_channels
        stages = zip(widths, depths, (1, 2, 2, 1), strict=True)
        for number, (width, depth, stride) in enumerate(stages, 1):
            layers = [_convolution(inputs, width, stride)]
            layers += [_convolution(width, width) for _ in range(depth - 1)]
            self.add_module(f"stage{number}", nn.Sequential(*layers))
            inputs = width
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stage4(self.stage3(self.stage2(self.stage1(images))))
        logits: Tensor = self.head(self.pool(features).flatten(1))
        return logits


BUILTIN_MODELS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "cnn-large": ((24, 48, 96, 128), (1, 2, 2, 2)),
    "cnn-medium": ((16, 32, 64, 96), (1, 1, 1, 1)),
    "cnn-small": ((8, 16, 24, 32), (1, 1, 1, 1)),
}


def builtin_model(name: str, *, num_classes: int, in_channels: int) -> SmallCNN:
    widths, depths = BUILTIN_MODELS[name]
    return SmallCNN(widths, depths, num_classes=num_classes, in_channels=in_channels)
