"""The small autoencoder that learns to draw a teacher's explanations, and its loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxkd.metrics.agreement import structural_similarity
from fastxkd.ops._checks import check_counts, check_factors, check_float

__all__ = ["ExplanationAutoencoder", "explanation_loss"]


class _Separable(nn.Sequential):
    """Depthwise 3x3, pointwise 1x1, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, inputs, 3, stride=stride, padding=1, groups=inputs, bias=False),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class ExplanationAutoencoder(nn.Module):
    """Images ``[n, channels, h, w]`` to explanation maps ``[n, maps, h, w]`` in [0, 1].

    The encoder halves the resolution once per width, the decoder doubles it (bilinear) and sees
    the encoder's features of that resolution, the image itself at the end. All convolutions but
    the last, which is 1x1 with a sigmoid, are depthwise-separable.

    XDistillation (Alharbi, Vu and Thai 2021) says that its autoencoder has few parameters and is
    changed so as to lose little information. Layers, widths, separable convolutions for the one
    and skip connections for the other are an interpretation.

    Args:
        channels: of the images.
        maps: explanations to draw, one for every explainer.
        widths: channels of the encoder, from fine to coarse.
        decoder: channels of the decoder, from coarse to fine, as many.

    >>> import torch
    >>> phi = ExplanationAutoencoder(3, maps=2).eval()
    >>> phi(torch.rand(4, 3, 28, 28)).shape, phi.bottleneck
    (torch.Size([4, 2, 28, 28]), 64)
    """

    def __init__(
        self,
        channels: int,
        maps: int = 1,
        *,
        widths: Sequence[int] = (16, 32, 64),
        decoder: Sequence[int] = (32, 16, 16),
    ) -> None:
        super().__init__()
        check_counts(channels=channels, maps=maps)
        for name, given in (("widths", widths), ("decoder", decoder)):
            if not isinstance(given, Sequence):
                raise TypeError(f"{name}: expected a sequence, got {type(given).__name__}")
            check_counts(**{f"{name}[{i}]": width for i, width in enumerate(given)})
        if len(widths) != len(decoder) or not widths:
            raise ValueError(
                f"decoder: expected as many as widths, {len(widths)}, and at least one, got"
                f" {len(decoder)}"
            )
        self.channels, self.maps, self.bottleneck = channels, maps, widths[-1]
        self.widths, self.decoder_widths = tuple(widths), tuple(decoder)
        fine = [channels, *widths[:-1]]
        down = [_Separable(i, o, 2) for i, o in zip(fine, widths, strict=True)]
        coarse = [widths[-1], *decoder[:-1]]
        up = [
            _Separable(i + skip, o)
            for i, skip, o in zip(coarse, reversed(fine), decoder, strict=True)
        ]
        self.encoder, self.decoder = nn.ModuleList(down), nn.ModuleList(up)
        self.head = nn.Conv2d(decoder[-1], maps, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.explained(images)[0]

    def explained(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Maps, and the coarsest features ``[n, bottleneck, ...]``."""
        check_float("images", images)
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise ValueError(
                f"images: expected [n, {self.channels}, h, w], got {list(images.shape)}"
            )
        skips, features = [], images
        for step in self.encoder:
            skips.append(features)
            features = step(features)
        coarsest = features
        for step in self.decoder:
            skip = skips.pop()
            features = F.interpolate(
                features, size=skip.shape[2:], mode="bilinear", align_corners=False
            )
            features = step(torch.cat([features, skip], 1))
        return torch.sigmoid(self.head(features)), coarsest

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, maps={self.maps}, widths={self.widths},"
            f" decoder={self.decoder_widths}"
        )


def explanation_loss(maps: Tensor, target: Tensor, *, ssim_weight: float = 0.0) -> Tensor:
    r"""How far drawn maps are from the teacher's: :math:`MSE + w (1 - SSIM)`.

    Args:
        maps: ``[n, k, h, w]``.
        target: the same shape, in [0, 1], without gradient.
        ssim_weight: w; an interpretation, as the whole loss is: 0 (MSE alone) or 0.1. Windows are
            of 11 pixels, or of the largest odd number that fits a smaller map.

    Returns:
        A scalar, float32 (float64 for float64 maps).

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.

    >>> import torch
    >>> maps = torch.rand(2, 1, 16, 16)
    >>> explanation_loss(maps, maps, ssim_weight=0.1).item()
    0.0
    """
    for name, given in (("maps", maps), ("target", target)):
        check_float(name, given)
    if maps.dim() != 4 or maps.numel() == 0 or maps.shape != target.shape:
        raise ValueError(
            f"target: expected maps' shape, [n, k, h, w] with none of them 0, {list(maps.shape)},"
            f" got {list(target.shape)}"
        )
    check_factors(ssim_weight=ssim_weight)
    exact = torch.float64 if maps.dtype == torch.float64 else torch.float32
    maps, target = maps.to(exact), target.detach().to(exact)
    loss = F.mse_loss(maps, target)
    if ssim_weight == 0:
        return loss
    side = min(maps.shape[2:])
    window = min(11, side - 1 + side % 2)
    similar = structural_similarity(maps.flatten(0, 1), target.flatten(0, 1), window=window)
    return loss + ssim_weight * (1 - similar.mean())
