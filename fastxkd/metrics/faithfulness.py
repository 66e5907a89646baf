"""The scores of explanations as torchmetrics: means over a loader, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from fastxkd.cam.capture import Layers
from fastxkd.metrics._scoring import Model
from fastxkd.metrics.agreement import (
    MEASURES,
    check_fraction,
    check_ssim_options,
    ssim_agreement,
    top_agreement,
)
from fastxkd.metrics.localisation import (
    energy_pointing_game,
    grid_pointing_game,
    pointing_game,
)
from fastxkd.metrics.perturbation import (
    Explainer,
    adcc,
    check_change_options,
    check_curve_options,
    confidence_change,
    deletion_curve,
    insertion_curve,
)
from fastxkd.metrics.road import PERCENTILES, check_options, road_score
from fastxkd.metrics.sanity import check_options as check_sanity_options
from fastxkd.metrics.sanity import randomisation_check
from fastxkd.ops._checks import check_counts, check_factors, check_labels


class _Score(Metric):
    """What all have in common."""

    is_differentiable = False
    higher_is_better: bool | None = True
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # A MetricCollection takes metrics whose states are close after one batch for the same and
        # updates only one of them from then on. A drop and an increase of 0 are close; NaN is
        # close to nothing.
        self.add_state("apart", torch.tensor(torch.nan), dist_reduce_fx="sum")


class _Mean(_Score):
    """The mean over all images of one value each, or of ``width`` values each."""

    total: Tensor
    images: Tensor

    def __init__(self, *, width: tuple[int, ...] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _take(self, values: Tensor) -> None:
        """``[n]``, or ``[n, width]``."""
        # Not in place: the number of layers of a RandomisationCheck is known at its first update,
        # and states made under inference_mode may not be written to outside.
        self.total = self.total + values.double().sum(0)
        self.images = self.images + len(values)

    def compute(self) -> Any:
        if not self.images:
            raise ValueError(f"{type(self).__name__}: compute() before any update()")
        return (self.total / self.images).float()


class ROAD(_Mean):
    """Mean of :func:`fastxkd.road_score` over images.

    Args:
        order, percentiles, score, noise, ties, tolerance, steps_at_once: as there.
        kwargs: of :class:`torchmetrics.Metric`.

    ``update(model, images, maps, targets=None, generator=None)``.
    NaN in an image or a map is NaN in the mean.

    >>> import torch
    >>> images = torch.zeros(2, 1, 8, 8)
    >>> images[:, :, 2:5, 2:5] = 1
    >>> metric = ROAD(percentiles=[80], score="logit", noise=0)
    >>> metric.update(lambda x: x.amax((2, 3)), images, images[:, 0], 0)
    >>> round(metric.compute().item(), 4)
    0.5
    """

    def __init__(
        self,
        *,
        order: str = "combined",
        percentiles: Sequence[float] = PERCENTILES,
        score: str = "probability",
        noise: float = 0.01,
        ties: str = "split",
        tolerance: float = 1e-4,
        steps_at_once: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.options: dict[str, Any] = {
            "order": order,
            "percentiles": percentiles,
            "score": score,
            "noise": noise,
            "ties": ties,
            "tolerance": tolerance,
            "steps_at_once": steps_at_once,
        }
        check_options(**self.options)

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        return bool(self.options["order"] != "morf")

    def update(
        self,
        model: Model,
        images: Tensor,
        maps: Tensor,
        targets: Any = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self._take(road_score(model, images, maps, targets, generator=generator, **self.options))


class DeletionAUC(_Mean):
    """Mean area under the curve of :func:`fastxkd.deletion_curve` over images; lower is better.

    Args:
        steps, baseline, score, steps_at_once: as there; baseline a number.
        kwargs: of :class:`torchmetrics.Metric`.

    ``update(model, images, maps, targets=None)``.
    NaN in an image or a map is NaN in the mean.

    >>> import torch
    >>> metric = DeletionAUC(steps=4, score="logit")
    >>> images = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    >>> metric.update(lambda x: x.flatten(1), images, images[:, 0], 3)
    >>> metric.compute()
    tensor(0.5000)
    """

    higher_is_better = False

    def __init__(
        self,
        *,
        steps: int | None = None,
        baseline: float = 0.0,
        score: str = "probability",
        steps_at_once: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.options: dict[str, Any] = {
            "steps": steps,
            "baseline": baseline,
            "score": score,
            "steps_at_once": steps_at_once,
        }
        check_curve_options(**self.options)

    def update(self, model: Model, images: Tensor, maps: Tensor, targets: Any = None) -> None:
        self._take(deletion_curve(model, images, maps, targets, **self.options).auc)


class InsertionAUC(_Mean):
    """Mean area under the curve of :func:`fastxkd.insertion_curve` over images; higher is better.

    Args:
        steps, start, score, steps_at_once: as there; start a number, or None for blurred images.
        kwargs: of :class:`torchmetrics.Metric`.

    ``update(model, images, maps, targets=None)``.
    NaN in an image or a map is NaN in the mean.

    >>> import torch
    >>> metric = InsertionAUC(steps=4, start=0.0, score="logit")
    >>> images = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    >>> metric.update(lambda x: x.flatten(1), images, images[:, 0], 3)
    >>> metric.compute()
    tensor(3.5000)
    """

    def __init__(
        self,
        *,
        steps: int | None = None,
        start: float | None = None,
        score: str = "probability",
        steps_at_once: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.options: dict[str, Any] = {
            "steps": steps,
            "start": start,
            "score": score,
            "steps_at_once": steps_at_once,
        }
        check_curve_options(**self.options)

    def update(self, model: Model, images: Tensor, maps: Tensor, targets: Any = None) -> None:
        self._take(insertion_curve(model, images, maps, targets, **self.options).auc)


class AverageDrop(_Mean):
    """Mean drop of :func:`fastxkd.confidence_change` over images, a fraction; lower is better.

    Args:
        score, relative: as there.
        kwargs: of :class:`torchmetrics.Metric`.

    ``update(model, images, maps, targets=None)``.
    NaN in an image or a map is NaN in the mean.

    >>> import torch
    >>> metric = AverageDrop(score="logit", relative=False)
    >>> metric.update(lambda x: x.flatten(1), torch.full((1, 1, 1, 2), 3.0),
    ...     torch.tensor([[[0.5, 1.0]]]), 0)
    >>> metric.compute()
    tensor(1.5000)
    """

    higher_is_better = False

    def __init__(self, *, score: str = "probability", relative: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options: dict[str, Any] = {"score": score, "relative": relative}
        check_change_options(**self.options)

    def update(self, model: Model, images: Tensor, maps: Tensor, targets: Any = None) -> None:
        self._take(confidence_change(model, images, maps, targets, **self.options).drop)


class AverageIncrease(_Mean):
    """Share of images whose score rises in :func:`fastxkd.confidence_change`; higher is better.

    Args:
        score: as there.
        kwargs: of :class:`torchmetrics.Metric`.

    ``update(model, images, maps, targets=None)``.
    NaN in an image or a map is NaN in the mean.

    >>> import torch
    >>> metric = AverageIncrease()
    >>> metric.update(lambda x: x.flatten(1), torch.ones(1, 1, 1, 2),
    ...     torch.tensor([[[1.0, 0.2]]]), 0)
    >>> metric.compute()
    tensor(1.)
    """

    def __init__(self, *, score: str = "probability", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_change_options(score, relative=False)
        self.score = score

    def update(self, model: Model, images: Tensor, maps: Tensor, targets: Any = None) -> None:
        found = confidence_change(model, images, maps, targets, score=self.score, relative=False)
        self._take(found.increase)


class ADCC(_Mean):
    """Mean of :func:`fastxkd.adcc` over images; higher is better.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.

    ``update(model, images, explain, targets=None, maps=None)``.
    NaN in an image or a map is NaN in the mean.

    >>> import torch
    >>> metric = ADCC()
    >>> metric.update(lambda x: x.flatten(1), torch.tensor([[[[4.0, 0.0], [0.0, 0.0]]]]),
    ...     lambda x, targets: x[:, 0] / x.amax(), 0)
    >>> round(metric.compute().item(), 4)
    0.9
    """

    def update(
        self,
        model: Model,
        images: Tensor,
        explain: Explainer,
        targets: Any = None,
        maps: Tensor | None = None,
    ) -> None:
        self._take(adcc(model, images, explain, targets, maps=maps).adcc)


class PointingGame(_Score):
    """Accuracy in :func:`fastxkd.pointing_game`; higher is better.

    Args:
        classes: how many there are; the accuracy is then the mean over classes that were seen, as
            in the paper. None: over images.
        tolerance: as there.
        kwargs: of :class:`torchmetrics.Metric`.

    ``update(maps, masks, labels=None)``: labels int64 ``[n]``, the objects' classes, if and only
    if ``classes`` is given.
    NaN in a map is NaN in the mean.

    >>> import torch
    >>> metric = PointingGame(classes=3, tolerance=0)
    >>> maps = torch.eye(3)[:, None]
    >>> masks = torch.tensor([[True, False, False]]).expand(3, 1, 3)
    >>> metric.update(maps, masks, torch.tensor([0, 2, 2]))
    >>> metric.compute()
    tensor(0.5000)
    """

    hits: Tensor
    seen: Tensor

    def __init__(
        self, *, classes: int | None = None, tolerance: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if classes is not None:
            check_counts(classes=classes)
        if tolerance is not None:
            check_factors(tolerance=tolerance)
        self.classes, self.tolerance = classes, tolerance
        self.add_state("hits", torch.zeros(classes or 1, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(classes or 1, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, maps: Tensor, masks: Tensor, labels: Tensor | None = None) -> None:
        if (labels is None) != (self.classes is None):
            expected = "labels beside classes" if labels is None else "None without classes="
            raise ValueError(f"labels: expected {expected}")
        hits = pointing_game(maps, masks, tolerance=self.tolerance)
        if labels is None:
            labels = torch.zeros(len(maps), dtype=torch.int64, device=maps.device)
        check_labels(labels, "maps", maps)
        outside = (labels < 0) | (labels >= len(self.seen))
        if bool(outside.any()):
            raise ValueError(
                f"labels: expected classes from 0 to {len(self.seen) - 1},"
                f" got {int(labels[outside][0])}"
            )
        self.hits = self.hits.index_add(0, labels, hits.double())
        self.seen = self.seen + labels.bincount(minlength=len(self.seen))

    def compute(self) -> Tensor:
        seen = self.seen > 0
        if not seen.any():
            raise ValueError("PointingGame: compute() before any update()")
        return (self.hits[seen] / self.seen[seen]).mean().float()


class EnergyPointingGame(_Mean):
    """Mean of :func:`fastxkd.energy_pointing_game` over images; higher is better.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.

    ``update(maps, masks)``.
    NaN in a map is NaN in the mean.

    >>> import torch
    >>> metric = EnergyPointingGame()
    >>> metric.update(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[False, True]]]))
    >>> metric.compute()
    tensor(0.7500)
    """

    def update(self, maps: Tensor, masks: Tensor) -> None:
        self._take(energy_pointing_game(maps, masks))


class GridPointingGame(_Mean):
    """Mean of :func:`fastxkd.grid_pointing_game` over images; higher is better.

    Args:
        cells: as there.
        kwargs: of :class:`torchmetrics.Metric`.

    ``update(explain, images, labels)``.
    NaN in an image or a map is NaN in the mean.

    >>> import torch
    >>> images = torch.eye(4)[:, :, None, None].expand(4, 4, 3, 3)
    >>> metric = GridPointingGame()
    >>> metric.update(lambda x, targets: x.mean(1), images, torch.arange(4))
    >>> metric.compute()
    tensor(0.2500)
    """

    def __init__(self, *, cells: int = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_counts(cells=cells)
        self.cells = cells

    def update(self, explain: Explainer, images: Tensor, labels: Tensor) -> None:
        self._take(grid_pointing_game(explain, images, labels, cells=self.cells))


class ExplanationAgreement(_Mean):
    """Means over images of how far two explanations agree, e.g. a student's and its teacher's.

    Args:
        measures: of ``"cosine"``, ``"pearson"``, ``"spearman"``, ``"ssim"`` and ``"top"``, which
            are the functions ``*_agreement``.
        fraction: of :func:`fastxkd.top_agreement`.
        data_range, window, sigma: of :func:`fastxkd.ssim_agreement`.
        kwargs: of :class:`torchmetrics.Metric`.

    ``update(first, second)``: maps ``[n, h, w]``. ``compute()`` gives a dict, name to mean.
    NaN in a map is NaN in the mean.

    >>> import torch
    >>> metric = ExplanationAgreement(["pearson", "top"])
    >>> maps = torch.arange(12.0).view(1, 3, 4)
    >>> metric.update(maps, 2 * maps + 1)
    >>> metric.compute()
    {'pearson': tensor(1.), 'top': tensor(1.)}
    """

    def __init__(
        self,
        measures: Sequence[str] = tuple(MEASURES),
        *,
        fraction: float = 0.1,
        data_range: float = 1.0,
        window: int = 11,
        sigma: float = 1.5,
        **kwargs: Any,
    ) -> None:
        measures = tuple(measures)
        unknown = [m for m in measures if m not in MEASURES]
        if unknown or not measures or len({*measures}) < len(measures):
            raise ValueError(
                f"measures: expected one or more of {', '.join(MEASURES)}, each once,"
                f" got {', '.join(map(repr, measures)) or 'none'}"
            )
        check_fraction(fraction)
        check_ssim_options(data_range, window, sigma)
        super().__init__(width=(len(measures),), **kwargs)
        self.measures, self.fraction = measures, fraction
        self.ssim_options = {"data_range": data_range, "window": window, "sigma": sigma}

    def update(self, first: Tensor, second: Tensor) -> None:
        self._take(torch.stack([self._values(m, first, second) for m in self.measures], 1))

    def _values(self, measure: str, first: Tensor, second: Tensor) -> Tensor:
        if measure == "top":
            return top_agreement(first, second, fraction=self.fraction)
        if measure == "ssim":
            return ssim_agreement(first, second, **self.ssim_options)  # type: ignore[arg-type]
        return MEASURES[measure](first, second)

    def compute(self) -> dict[str, Tensor]:
        return dict(zip(self.measures, super().compute(), strict=True))


class RandomisationCheck(_Mean):
    """Mean of :func:`fastxkd.randomisation_check` over images; lower is better.

    Args:
        explainer, layers, measure, cascade, seed: as there. The same weights are drawn in every
            ``update``.
        kwargs: of :class:`torchmetrics.Metric`.

    ``update(model, images, targets=None)``. ``compute()`` gives a dict, layer to mean agreement
    after it was randomised, in that order.
    NaN in an image or a map is NaN in the mean.

    >>> import torch, fastxkd
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(),
    ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))
    >>> metric = RandomisationCheck(lambda m: fastxkd.GradCAM(m, "1"))
    >>> metric.update(model, torch.rand(2, 1, 8, 8))
    >>> list(metric.compute())
    ['4', '0']
    """

    higher_is_better = False

    def __init__(
        self,
        explainer: Callable[[nn.Module], Explainer],
        *,
        layers: Layers | None = None,
        measure: str = "spearman",
        cascade: bool = True,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.explainer = explainer
        self.options: dict[str, Any] = {
            "layers": layers,
            "measure": measure,
            "cascade": cascade,
            "seed": seed,
        }
        check_sanity_options(explainer, measure, cascade, seed)
        self.names: tuple[str, ...] = ()

    def update(self, model: nn.Module, images: Tensor, targets: Any = None) -> None:
        found = randomisation_check(model, self.explainer, images, targets, **self.options)
        if self.names not in ((), found.layers):
            raise ValueError(
                f"model: expected the layers {', '.join(self.names)} as in the first update,"
                f" got {', '.join(found.layers)}"
            )
        self.names = found.layers
        self._take(found.agreement.T)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        names = getattr(incoming_state, "names", self.names) or self.names
        if self.names not in ((), names):
            raise ValueError(
                f"incoming_state: expected the layers {', '.join(self.names)},"
                f" got {', '.join(names)}"
            )
        super().merge_state(incoming_state)
        self.names = names

    def reset(self) -> None:
        super().reset()
        self.names = ()

    def compute(self) -> dict[str, Tensor]:
        return dict(zip(self.names, super().compute(), strict=True))
