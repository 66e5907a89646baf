"""FSS and RS as torchmetrics: ``update`` over a loader, ``compute`` at the end."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from fastxkd.metrics.similarity import inner_products, label_embeddings, normalized_rows

MODES = ("dataset", "batch")


class _Similarity(Metric):
    """Features kept until ``compute`` (dataset), or a running mean of batch scores (batch)."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    columns: tuple[str, ...]
    total: Tensor
    batches: Tensor

    def __init__(self, mode: str = "dataset", **kwargs: Any) -> None:
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        super().__init__(**kwargs)
        self.mode = mode
        if mode == "batch":
            self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state("batches", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        else:
            for column in self.columns:
                self.add_state(column, [], dist_reduce_fx="cat")

    def _score(self, *columns: Tensor) -> Tensor:
        raise NotImplementedError

    def _take(self, *columns: Tensor) -> None:
        rows = columns[0].shape[0]
        for name, column in zip(self.columns, columns, strict=False):
            if column.shape[0] != rows:
                raise ValueError(
                    f"{name}: expected {rows} rows as in {self.columns[0]}, got {column.shape[0]}"
                )
        if self.mode == "dataset":
            for name, column in zip(self.columns, columns, strict=False):
                getattr(self, name).append(column.detach())
        elif rows < 4:
            warnings.warn(
                f"{type(self).__name__}: a batch of {rows} was left out;"
                " the mean is over batches of at least 4",
                stacklevel=3,
            )
        else:
            self.total += self._score(*(c.detach() for c in columns)).double()
            self.batches += 1

    def compute(self) -> Tensor:
        if self.mode == "batch":
            if not self.batches:
                raise ValueError(f"{type(self).__name__}: no batch of at least 4 rows was seen")
            return (self.total / self.batches).float()
        kept = [getattr(self, name) for name in self.columns]
        kept = [dim_zero_cat(column) for column in kept if not _empty(column)]
        if not kept:
            raise ValueError(f"{type(self).__name__}: compute() before any update()")
        return self._score(*kept).float()


def _empty(column: Any) -> bool:
    return isinstance(column, list) and not column


class FeatureSimilarityScore(_Similarity):
    r"""FSS: distance correlation of the student's features with the base's, layer by layer.

    High: the student looks at the same things as without its teacher. Low: guidance moved it
    (Adhane et al. 2025, section 3). One instance per layer.

    Args:
        mode: ``"dataset"``: exact over all samples (features are kept until ``compute``);
            ``"batch"``: the paper's mean of per-batch scores, in constant memory. Batches of fewer
            than 4 are left out with a warning.
        unbiased: the U-centred estimator in [-1, 1] instead of the biased one in [0, 1]. The paper
            does not name its estimator; biased is our reading, since its figures span [0, 1].
        normalize_rows: L2-normalise each sample's features first, as the authors' current code
            does; off by default, so that FSS and RS speak of the same distances.
        kwargs: of :class:`torchmetrics.Metric`.

    ``update(student, base)`` takes ``[n, ...]`` features of the same samples.

    >>> import torch
    >>> metric = FeatureSimilarityScore()
    >>> x = torch.arange(12.0).reshape(6, 2).cos()
    >>> metric.update(x, 3 * x)
    >>> round(metric.compute().item(), 4)
    1.0
    """

    columns = ("student", "base")

    def __init__(
        self,
        mode: str = "dataset",
        *,
        unbiased: bool = False,
        normalize_rows: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(mode, **kwargs)
        self.unbiased = unbiased
        self.normalize_rows = normalize_rows

    def update(self, student: Tensor, base: Tensor) -> None:
        self._take(student, base)

    def _score(self, *columns: Tensor) -> Tensor:
        features = [normalized_rows(c) for c in columns] if self.normalize_rows else list(columns)
        return inner_products(features, list(self.columns), unbiased=self.unbiased).correlation(
            0, 1
        )


class RelevanceScore(_Similarity):
    r"""RS: distance correlation of features with the labels: how much of the task a layer holds.

    With ``given``, the semi-partial :math:`P_{DC}(features | given; targets)`: distilled RS for
    student given base, residual RS for base given student (Adhane et al. 2025, section 3).

    Args:
        mode: as in :class:`FeatureSimilarityScore`.
        unbiased: the U-centred estimator, as the authors' code; only it is defined with ``given``.
        kwargs: of :class:`torchmetrics.Metric`.

    ``update(features, targets, given=None)``: features and given ``[n, ...]``; targets class
    indices ``[n]`` or embeddings ``[n, e]``. Give ``given`` always or never.

    >>> import torch
    >>> metric = RelevanceScore()
    >>> features = torch.tensor([[0.0], [0.1], [1.0], [1.1], [5.0], [5.1]])
    >>> metric.update(features, torch.tensor([0, 0, 1, 1, 2, 2]))
    >>> round(metric.compute().item(), 4)
    0.7689
    """

    columns = ("features", "targets", "given")

    def __init__(self, mode: str = "dataset", *, unbiased: bool = True, **kwargs: Any) -> None:
        super().__init__(mode, **kwargs)
        self.unbiased = unbiased
        self._partial: bool | None = None

    def reset(self) -> None:
        super().reset()
        self._partial = None

    def update(self, features: Tensor, targets: Tensor, given: Tensor | None = None) -> None:
        if given is not None and not self.unbiased:
            raise ValueError("given: a partial score needs unbiased=True")
        if self._partial not in (None, given is not None):
            raise ValueError("given: expected in every update or in none")
        self._partial = given is not None
        self._take(features, targets, *(() if given is None else (given,)))

    def _score(self, *columns: Tensor) -> Tensor:
        features, targets, *given = columns
        matrices = [features, label_embeddings(targets), *given]
        found = inner_products(
            matrices, list(self.columns[: len(matrices)]), unbiased=self.unbiased
        )
        return found.semi_partial(0, 2, 1) if given else found.correlation(0, 1)
