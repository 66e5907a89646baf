"""Measures of how interpretable a model is as torchmetrics: means over a loader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastxkd.metrics.class_similarity import (
    Groups,
    check_entropy_options,
    check_groups,
    group_entropy,
)
from fastxkd.metrics.faithfulness import _Mean
from fastxkd.metrics.five_band import (
    THRESHOLDS,
    FiveBandScores,
    check_score_options,
    check_soft_options,
    five_band_curve,
)
from fastxkd.metrics.input_gradients import (
    Alignment,
    Model,
    check_alignment_options,
    check_gradient_options,
    gradient_alignment,
    input_gradients,
    sobel_maps,
)


class GroupEntropy(_Mean):
    """Mean of :func:`fastxkd.group_entropy` over images: within the group and of all classes.

    Args:
        groups: the group of each class, ``[classes]`` integers.
        drop_true_class, unit: as there; they hold for both.
        kwargs: of :class:`torchmetrics.Metric`.

    ``update(logits, labels)``. ``compute()`` gives a dict: ``within_group``, and ``softmax``, the
    plain entropy next to it.
    NaN in a group's logits is NaN in the mean.

    >>> import torch
    >>> metric = GroupEntropy([0, 0, 1, 1], unit="bits")
    >>> metric.update(torch.zeros(2, 4), torch.tensor([0, 3]))
    >>> metric.compute()
    {'within_group': tensor(1.), 'softmax': tensor(2.)}
    """

    higher_is_better = None

    def __init__(
        self, groups: Groups, *, drop_true_class: bool = False, unit: str = "nats", **kwargs: Any
    ) -> None:
        check_entropy_options(drop_true_class, unit)
        super().__init__(width=(2,), **kwargs)
        self.groups = check_groups(groups)
        self.options: dict[str, Any] = {"drop_true_class": drop_true_class, "unit": unit}

    def update(self, logits: Tensor, labels: Tensor) -> None:
        within = group_entropy(logits, labels, self.groups, **self.options)
        self._take(torch.stack([within, group_entropy(logits, labels, **self.options)], 1))

    def compute(self) -> dict[str, Tensor]:
        within, plain = super().compute()
        return {"within_group": within, "softmax": plain}


class FiveBandScore(_Mean):
    """Means of :func:`fastxkd.five_band_score` over images, or of its curve; higher is better.

    Args:
        steps: 1: the score; more: :func:`fastxkd.five_band_curve`, and ``compute()`` has a value
            for each step.
        delta, thresholds, truth_thresholds, scaling: as there.
        kwargs: of :class:`torchmetrics.Metric`.

    ``update(attributions, truth)``. ``compute()`` gives a dict: ``accuracy``, ``recall``,
    ``precision`` and ``false_positive_rate``.
    NaN in an attribution is NaN in the means.

    >>> import torch
    >>> metric = FiveBandScore()
    >>> metric.update(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[0.0, 0.9]]]))
    >>> {name: round(value.item(), 4) for name, value in metric.compute().items()}
    {'accuracy': 1.0, 'recall': 1.0, 'precision': 1.0, 'false_positive_rate': 0.0}
    """

    def __init__(
        self,
        *,
        steps: int = 1,
        delta: float = 0.005,
        thresholds: Sequence[float] = THRESHOLDS,
        truth_thresholds: Sequence[float] = THRESHOLDS,
        scaling: str = "after_sum",
        **kwargs: Any,
    ) -> None:
        check_score_options(thresholds, truth_thresholds, scaling)
        check_soft_options(delta, steps, thresholds)
        super().__init__(width=(len(FiveBandScores._fields), steps), **kwargs)
        self.options: dict[str, Any] = {
            "steps": steps,
            "delta": delta,
            "thresholds": tuple(thresholds),
            "truth_thresholds": tuple(truth_thresholds),
            "scaling": scaling,
        }

    def update(self, attributions: Tensor, truth: Tensor) -> None:
        self._take(torch.stack(five_band_curve(attributions, truth, **self.options), 1))

    def compute(self) -> dict[str, Tensor]:
        means = super().compute()
        if self.options["steps"] == 1:
            means = means[:, 0]
        return dict(zip(FiveBandScores._fields, means, strict=True))


class GradientAlignment(_Mean):
    """Means of :func:`fastxkd.gradient_alignment` over images; higher is better.

    Args:
        of: of :func:`fastxkd.input_gradients`.
        channels, sigma: of :func:`fastxkd.gradient_alignment`.
        kwargs: of :class:`torchmetrics.Metric`.

    ``update(model, images, labels=None, truth=None)``: masks of the objects, or None: the edges of
    the images, :func:`fastxkd.sobel_maps`. ``compute()`` gives a dict: ``cosine`` and ``pearson``.
    NaN in an image is NaN in the means.

    >>> import torch
    >>> metric = GradientAlignment(of="logit", sigma=0)
    >>> model = lambda images: images.flatten(1) * torch.tensor([0.0, 5.0])
    >>> metric.update(model, torch.ones(1, 1, 1, 2), truth=torch.tensor([[[False, True]]]))
    >>> metric.compute()
    {'cosine': tensor(1.), 'pearson': tensor(1.)}
    """

    def __init__(
        self, *, of: str = "loss", channels: str = "max", sigma: float = 1.0, **kwargs: Any
    ) -> None:
        check_gradient_options(of, channels)
        check_alignment_options(channels, sigma)
        super().__init__(width=(len(Alignment._fields),), **kwargs)
        self.of, self.channels, self.sigma = of, channels, sigma

    def update(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor | None = None,
        truth: Tensor | None = None,
    ) -> None:
        gradients = input_gradients(model, images, labels, of=self.of)
        if truth is None:
            truth = sobel_maps(images)
        found = gradient_alignment(gradients, truth, channels=self.channels, sigma=self.sigma)
        self._take(torch.stack(found, 1))

    def compute(self) -> dict[str, Tensor]:
        return dict(zip(Alignment._fields, super().compute(), strict=True))
