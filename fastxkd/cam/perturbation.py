"""Weights by trial: the score of each channel shown alone, or taken away, in batches."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxkd.cam.capture import Layers, Tap
from fastxkd.cam.explainer import Explainer, Inputs, Signals
from fastxkd.cam.layouts import channel_axis
from fastxkd.cam.maps import principal_map
from fastxkd.cam.targets import Objective, Resolved, resolve_targets, row_scores
from fastxkd.reference.cam import exact_dtype, min_max

MASK_EPS = 1e-8
SCORE_EPS = 1e-7
# What pytorch-grad-cam subtracts from the smallest activation where that is not 0.
FAR_BELOW = 1e7


class TrialCAM(Explainer):
    """One weight per image and channel, from passes over batches of altered images.

    Args:
        model, target_layers, reshape_transform, batch_size: as in :class:`GradCAM`.
    """

    _gradients = False

    def _explain(
        self, inputs: Inputs, targets: Any, objective: Objective | None, differentiable: bool
    ) -> Signals:
        result, activations = self._forward(inputs, cut=False)
        chosen = resolve_targets(result, targets, len(inputs.images))
        weights: list[Tensor | None] = []
        spatial = self._spatial(activations, inputs)
        for name, own, maps in zip(self.target_layers, activations, spatial, strict=True):
            if maps.dim() not in (4, 5):
                break  # refused, with the layer's name, where maps are made
            weights.append(self._weights(inputs, result, chosen, name, own, maps))
        weights += [None] * (len(spatial) - len(weights))
        return Signals(result, spatial, weights, "weights")

    def _weights(
        self, inputs: Inputs, result: Any, targets: Resolved, name: str, own: Tensor, maps: Tensor
    ) -> Tensor:
        raise NotImplementedError


class ScoreCAM(TrialCAM):
    r"""Score-CAM (Wang et al. 2020): channels weighted by the score of what they let through.

    Each channel, resized to the image (bilinear, corners aligned) and scaled to [0, 1], masks the
    image; the softmax over channels of the masked images' scores is the weight. One forward pass
    per channel.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(),
    ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 10))
    >>> ScoreCAM(model, "1", batch_size=8)(torch.rand(2, 3, 16, 16), [3, 7]).shape
    torch.Size([2, 16, 16])
    """

    def _weights(
        self, inputs: Inputs, result: Any, targets: Resolved, name: str, own: Tensor, maps: Tensor
    ) -> Tensor:
        n, channels = maps.shape[:2]
        image = torch.arange(n, device=maps.device).repeat_interleave(channels)
        channel = torch.arange(channels, device=maps.device).repeat(n)
        scores = []
        size = self.batch_size
        for of, which in zip(image.split(size), channel.split(size), strict=True):
            rows = inputs.rows(of)
            masks = maps[of, which][:, None].to(exact_dtype(maps))
            masks = F.interpolate(
                masks,
                size=inputs.images.shape[2:],
                mode="bilinear" if masks.dim() == 4 else "trilinear",
                align_corners=True,
            )
            flat = masks.flatten(1)
            low, high = (
                x.reshape(-1, *[1] * (masks.dim() - 1)) for x in (flat.amin(1), flat.amax(1))
            )
            masks = (masks - low) / (high - low + MASK_EPS)
            masked = rows.images * masks.to(rows.images.dtype)
            output = rows.with_images(masked).run(self.bare)
            scores.append(row_scores(output, targets, of).to(masks.dtype))
        return torch.cat(scores).reshape(n, channels).softmax(1)


class _Feed(Tap):
    """Hands on given activations in place of a layer's own."""

    def __init__(self, model: nn.Module, name: str, module: nn.Module, given: Tensor) -> None:
        super().__init__({name: module}, cut=False, one_pass=False, model=model)
        self.given = given

    def take(self, name: str, output: Tensor, replica: bool) -> Tensor:
        return self.given


class AblationCAM(TrialCAM):
    r"""Ablation-CAM (Desai and Ramaswamy 2020): channels weighted by the score they carry.

    :math:`w_c = (y - y_c) / y` with :math:`y_c` the score without channel c and :math:`|y|` at
    least 1e-7. One pass per channel,
    from the layer on: what comes before it runs for one image only, where a trial shows that the
    output depends on nothing else of it, and for the whole batch otherwise.

    Args:
        model, target_layers, reshape_transform: as in :class:`GradCAM`; a layer's channels are its
            second axis, in a transformer's layout (or with a reshape_transform) its last.
        batch_size: how many altered images run at once, of all images together.
        ratio_channels_to_ablate: below a half, only this share of channels with the most of their
            activation where the layer's first principal component is strong, and the same share
            with the least, are tried; others weigh nothing.
        value: ``"zero"`` as in the paper, or ``"below"``, pytorch-grad-cam's: 0 where the image's
            smallest activation is 0, else 1e7 below it for the first channel of each
            ``batch_size``, 2e7 for the second, and so on.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(),
    ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 10))
    >>> AblationCAM(model, "1", batch_size=8)(torch.rand(2, 3, 16, 16), [3, 7]).shape
    torch.Size([2, 16, 16])
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
        *,
        batch_size: int = 32,
        ratio_channels_to_ablate: float = 1.0,
        value: Literal["zero", "below"] = "zero",
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, batch_size=batch_size)
        given: Any = ratio_channels_to_ablate
        if not isinstance(given, Real):
            raise TypeError(
                f"ratio_channels_to_ablate: expected a number, got {type(given).__name__}"
            )
        if not 0 < ratio_channels_to_ablate <= 1:
            raise ValueError(
                "ratio_channels_to_ablate: expected a share in (0, 1],"
                f" got {ratio_channels_to_ablate!r}"
            )
        if value not in ("zero", "below"):
            raise ValueError(f"value: expected 'zero' or 'below', got {value!r}")
        self.ratio_channels_to_ablate = ratio_channels_to_ablate
        self.value = value

    def _weights(
        self, inputs: Inputs, result: Any, targets: Resolved, name: str, own: Tensor, maps: Tensor
    ) -> Tensor:
        n, channels = maps.shape[:2]
        everyone = torch.arange(n, device=own.device)
        score = row_scores(result, targets, everyone).to(exact_dtype(own))
        axis = self._axis(own, channels, inputs, self.target_layers[name])
        chosen = self._chosen(maps)  # [n, tried]
        tried = chosen.shape[1]
        lowest = self._values(own, tried)  # [n, tried]
        image = everyone.repeat_interleave(tried)
        trunk = self._short_trunk(inputs, targets, score, name, own)
        scores = []
        for at in torch.arange(n * tried, device=own.device).split(self.batch_size):
            of, column = image[at], chosen.flatten()[at]
            shape = [len(of), *[1] * (own.dim() - 1)]
            index = column.reshape(shape).expand(*_without(own, axis, len(of)))
            filler = lowest.flatten()[at].reshape(shape).expand_as(index)
            rows = own[of].scatter(axis, index, filler.to(own.dtype))
            output = self._from_layer(trunk or inputs.rows(of), name, rows)
            scores.append(row_scores(output, targets, of).to(score.dtype))
        without = torch.cat(scores).reshape(n, tried)
        # A score of exactly 0 divides nothing.
        base = score.abs().clamp(min=SCORE_EPS).copysign(score)[:, None]
        weights = score.new_zeros(n, channels)
        return weights.scatter(1, chosen, (score[:, None] - without) / base)

    def _from_layer(self, inputs: Inputs, name: str, rows: Tensor) -> Any:
        with _Feed(self.bare, name, self.target_layers[name], rows):
            return inputs.run(self.bare)

    def _short_trunk(
        self, inputs: Inputs, targets: Resolved, score: Tensor, name: str, own: Tensor
    ) -> Inputs | None:
        """The first image, if the layer's output alone decides on the scores."""
        first = inputs.rows(torch.zeros(1, dtype=torch.int64, device=own.device))
        try:
            twice = self._from_layer(first, name, torch.cat([own, own]))
            image = torch.arange(len(own), device=own.device).repeat(2)
            found = row_scores(twice, targets, image).to(score.dtype)
        except Exception:  # whatever a model raises when sizes do not fit its own
            return None
        if not isinstance(twice, Tensor) or len(twice) != len(image):
            return None
        # Each by itself: the score of a masked class would hide what the others differ by.
        same = torch.allclose(found, score.repeat(2), rtol=1e-4, atol=0, equal_nan=True)
        return first if same else None

    def _axis(self, own: Tensor, channels: int, inputs: Inputs, layer: nn.Module) -> int:
        by_size = own.dim() == 3 or self._layouts_by_size
        axis = channel_axis(own, inputs.images.shape[2:], layer) if by_size else 1
        if self.reshape_transform is not None and own.shape[-1] == channels:
            axis = own.dim() - 1
        if own.shape[axis] != channels:
            raise ValueError(
                f"reshape_transform: its {channels} channels are no axis of {list(own.shape)}"
            )
        return axis

    def _values(self, own: Tensor, tried: int) -> Tensor:
        lowest = own.flatten(1).amin(1).to(exact_dtype(own))
        if self.value == "zero":
            return lowest.new_zeros(len(own), tried)
        place = torch.arange(tried, device=own.device) % self.batch_size + 1
        below = lowest[:, None] - FAR_BELOW * place
        return torch.where(lowest[:, None] == 0, 0, below)

    def _chosen(self, maps: Tensor) -> Tensor:
        """Which channels are tried, ``[n, tried]``."""
        n, channels = maps.shape[:2]
        count = int(channels * self.ratio_channels_to_ablate)
        if 2 * count >= channels:
            return torch.arange(channels, device=maps.device).expand(n, channels)
        count = max(1, count)
        strong = min_max(principal_map(maps).abs()) > 0.01
        size = maps.to(exact_dtype(maps)).abs().flatten(2)
        size = size - size.amin(2, keepdim=True)
        inside = (size * strong.flatten(1)[:, None]).sum(2)
        total = size.sum(2)
        order = torch.where(total > 0, inside / total, 0).argsort(dim=1, stable=True)
        return torch.cat([order[:, -count:].flip(1), order[:, :count]], 1)


def _without(tensor: Tensor, axis: int, rows: int) -> list[int]:
    """The shape of one channel of ``rows`` rows."""
    shape = list(tensor.shape)
    shape[0], shape[axis] = rows, 1
    return shape
