"""FSS and RS as torchmetrics: ``update`` over a loader, ``compute`` at the end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from fastxkd.metrics.inference import jackknife, permutation_test
from fastxkd.metrics.projection import RandomProjection
from fastxkd.metrics.similarity import (
    check_targets,
    inner_products,
    label_embeddings,
    label_rows,
    normalized_rows,
)
from fastxkd.ops._checks import check_flags, check_float
from fastxkd.ops.ring import agree
from fastxkd.ops.stored import Features, Pieces

MODES = ("dataset", "batch")


class _Kind(NamedTuple):
    """What one row of a column is."""

    row: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        return f"{self.dtype} [n, {', '.join(map(str, self.row))}] on {self.device}"


class _Similarity(Metric):
    """Features kept until ``compute`` (dataset), or a running mean of batch scores (batch)."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    columns: tuple[str, ...]
    unbiased: bool
    total: Tensor
    squares: Tensor
    batches: Tensor

    def __init__(
        self,
        mode: str = "dataset",
        *,
        projection: RandomProjection | int | None = None,
        gather: bool = False,
        **kwargs: Any,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        if projection is not None and not isinstance(projection, RandomProjection):
            if isinstance(projection, bool) or not isinstance(projection, int):
                raise TypeError(
                    "projection: expected an int or a RandomProjection,"
                    f" got {type(projection).__name__}"
                )
            if projection < 1:
                raise ValueError(f"projection: expected a width of at least 1, got {projection}")
            projection = RandomProjection(projection)
        if gather and mode == "batch":
            raise ValueError("gather: True is for mode='dataset'; batches leave no features")
        if mode == "dataset" and not gather and kwargs.get("dist_sync_fn") is not None:
            raise ValueError("dist_sync_fn: expected none without gather=True")
        super().__init__(**kwargs)
        self.mode = mode
        self.projection = projection
        self.gather = gather
        self._stays = mode == "dataset" and not gather  # features, where they are
        if mode == "batch":
            for name in ("total", "squares"):
                self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state("batches", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        else:
            for column in self.columns:
                self.add_state(column, [], dist_reduce_fx="cat")
        # As of the metrics in faithfulness.py: NaN is close to nothing, so that a MetricCollection
        # does not take two for one that agree on a first batch.
        self.add_state("apart", torch.tensor(torch.nan), dist_reduce_fx="sum")
        self._rows: dict[str, str] = {}  # what the first update had

    def _embedded(self, y: Features, group: dist.ProcessGroup | None) -> Features:
        return y

    def _score(
        self,
        x: Features,
        y: Features,
        given: Features | None = None,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, torch.dtype]:
        matrices = [x, self._embedded(y, group), *([] if given is None else [given])]
        names = self.columns[: len(matrices)]
        found = inner_products(matrices, names, unbiased=self.unbiased, group=group)
        score = found.correlation(0, 1) if given is None else found.semi_partial(0, 2, 1)
        return score, found.dtype

    def _narrow(self, features: Tensor, name: str) -> Tensor:
        if self.projection is None:
            return features
        return self.projection(features, name=name)

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
            self._leave_out(f"a batch of {rows} was left out; a score needs at least 4")
        elif self._one_class(*columns):
            self._leave_out("a batch of a single class was left out: it cannot tell relevance")
        else:
            score, _ = self._score(*(c.detach() for c in columns))
            score = score.double()
            # Not in place: states made under inference_mode may not be written to outside.
            self.total = self.total + score
            self.squares = self.squares + score.square()
            self.batches = self.batches + 1

    def _one_class(self, *columns: Tensor) -> bool:
        return False

    def _check_given(self, *given: Any) -> dict[str, str]:
        """At the batch that is wrong, not at the end. Returns what rows are, in all batches."""
        for name, features in zip(self.columns, given, strict=False):
            if isinstance(features, np.ndarray):
                raise TypeError(
                    f"{name}: expected a Tensor, got {type(features).__name__}; arrays and mapped"
                    " files are for the functions: fastxkd.distance_correlation, jackknife, ..."
                )
            if name == "targets":
                check_targets(features, name)
                continue
            check_float(name, features)
            if features.dim() < 2 or features.shape[1:].numel() == 0:
                raise ValueError(
                    f"{name}: expected features [n, ...] with at least one value a row,"
                    f" got shape {list(features.shape)}"
                )
        for name, features in zip(self.columns, given, strict=False):
            if features.device != given[0].device:
                raise ValueError(
                    f"{name}: expected the device of {self.columns[0]}, {given[0].device},"
                    f" got {features.device}"
                )
        rows = {
            name: f"{list(x.shape[1:])} a row" if x.is_floating_point() else "class indices"
            for name, x in zip(self.columns, given, strict=False)
        }
        for name, first in self._rows.items() if self.mode == "dataset" else ():
            if rows.get(name, first) != first:
                raise ValueError(f"{name}: expected {first} as at first, got {rows[name]}")
        return rows

    def reset(self) -> None:
        super().reset()
        self._rows = {}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``update``, and the score of this batch alone: NaN where it is too small for one, or of
        a single class."""
        if self._is_synced:
            return super().forward(*args, **kwargs)  # type: ignore[no-any-return]  # raises
        # torchmetrics' resets, and what it had put aside is lost where update or compute raise.
        before = {name: getattr(self, name) for name in self._defaults}
        for name, state in before.items():
            setattr(self, name, torch.zeros_like(state) if isinstance(state, Tensor) else [])
        try:
            self.update(*args, **kwargs)
            with self.sync_context(self.dist_sync_fn, should_sync=self.dist_sync_on_step):
                own = torch.tensor(torch.nan, device=self.device)
                if self._group is not None or self._has_score():
                    own = type(self).compute(self)
        finally:
            if self._is_synced:
                self.unsync()
            for name, state in before.items():
                setattr(self, name, state + getattr(self, name))
        self._forward_cache = own  # type: ignore[assignment]
        return own

    def _has_score(self) -> bool:
        if self.mode == "batch":
            return bool(self.batches)
        columns = cast("list[Tensor]", self._seen())  # of one process: whole tensors
        return columns[0].shape[0] >= 4 and not self._one_class(*columns)

    def _leave_out(self, why: str) -> None:
        # Past _take, update and what torchmetrics puts around it.
        warnings.warn(f"{type(self).__name__}: {why}", stacklevel=5)

    def _seen(self) -> list[Features]:
        """What ``update`` kept; a process of several that has none has no rows of it."""
        columns = {name: getattr(self, name) for name in self.columns}
        columns = {name: column for name, column in columns.items() if not _empty(column)}
        group = self._group
        if group is None:
            if not columns:
                raise ValueError(f"{type(self).__name__}: compute() before any update()")
            return [dim_zero_cat(column) for column in columns.values()]

        mine: list[Pieces] = []

        def kinds() -> list[_Kind]:
            mine.extend(Pieces(column, name) for name, column in columns.items())
            return [_Kind(tuple(p.shape[1:]), p.dtype, p.device.type) for p in mine]

        everyone = agree(kinds, group)
        first = next((rank for rank, found in enumerate(everyone) if found), None)
        if first is None:
            raise ValueError(f"{type(self).__name__}: compute() before any update()")
        for rank, found in enumerate(everyone):
            if found and found != everyone[first]:
                raise ValueError(
                    f"{', '.join(self.columns[: len(found)])}: expected the same in every process,"
                    f" got {', '.join(map(str, everyone[first]))} on rank {first}"
                    f" and {', '.join(map(str, found))} on rank {rank}"
                )
        for kind in everyone[first] if not mine else ():
            mine.append(Pieces([torch.empty(0, *kind.row, dtype=kind.dtype, device=kind.device)]))
        return [p if p.dtype.is_floating_point else p[:] for p in mine]

    @property
    def _group(self) -> dist.ProcessGroup | None:
        """The processes to ask for their rows, now that a score of all is asked for."""
        if not self._stays or not self._is_synced:
            return None
        return self.process_group or dist.group.WORLD

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        if not self._stays:
            super()._sync_dist(*args, **kwargs)

    def _copy_state_dict(self) -> dict[str, Any]:
        if not self._stays:
            return super()._copy_state_dict()
        return {name: list(getattr(self, name)) for name in self.columns}

    @contextmanager
    def _alone_again(self) -> Iterator[None]:
        """torchmetrics leaves a metric whose ``compute`` fails as it was among others: no update
        would be taken any more."""
        try:
            yield
        except Exception:
            if self._is_synced:
                self.unsync()
            raise

    @contextmanager
    def _synced(self) -> Iterator[None]:
        """As torchmetrics does around ``compute``."""
        context = self.sync_context(
            dist_sync_fn=self.dist_sync_fn,
            should_sync=self._to_sync,
            should_unsync=self._should_unsync,
        )
        with context, self._alone_again():
            yield

    def compute(self) -> Tensor:
        if self.mode == "batch":
            if not self.batches:
                raise ValueError(f"{type(self).__name__}: no batch with a score was seen")
            return (self.total / self.batches).float()
        with self._alone_again():
            score, dtype = self._score(*self._seen(), group=self._group)
        return score.to(dtype)

    def standard_error(self) -> Tensor:
        """Of ``compute()``, by the jackknife: over samples (dataset) or batches (batch).

        For a mean of batches that is their standard deviation over the root of their number.
        Processes call it together, as ``compute``.

        Raises:
            ValueError: fewer than 5 samples, or than 2 batches.
        """
        with self._synced():
            if self.mode == "dataset":
                found = jackknife(**self._operands(), unbiased=self.unbiased)
                return found.standard_error
            n = self.batches
            if n < 2:
                raise ValueError(
                    f"{type(self).__name__}: expected at least 2 batches of at least 4 rows for a"
                    f" standard error, got {int(n)}"
                )
            spread = (self.squares - self.total.square() / n).clamp(min=0)
            return (spread / (n * (n - 1))).sqrt().float()

    def p_value(
        self,
        permutations: int = 999,
        *,
        generator: torch.Generator | None = None,
        memory: int = 1 << 30,
    ) -> float:
        """Of independence, by :func:`~fastxkd.metrics.permutation_test`; ``mode="dataset"`` only.

        Processes call it together, as ``compute``.
        """
        if self.mode != "dataset":
            raise ValueError("p_value: expected mode='dataset', which keeps the samples to permute")
        with self._synced():
            return permutation_test(
                **self._operands(),
                unbiased=self.unbiased,
                permutations=permutations,
                generator=generator,
                memory=memory,
            ).p_value

    def _operands(self) -> dict[str, Any]:
        x, y, *given = self._seen()
        return {"x": x, "y": y, "given": given[0] if given else None, "group": self._group}


def _empty(column: Any) -> bool:
    # Never used, it is an empty list; torchmetrics gathers an empty tensor of that.
    return len(column) == 0


class FeatureSimilarityScore(_Similarity):
    r"""FSS: distance correlation of the student's features with the base's, layer by layer.

    High: the student looks at the same things as without its teacher. Low: guidance moved it
    (Adhane et al. 2025, section 3). One instance per layer.

    Args:
        mode: ``"dataset"``: exact over all samples (features are kept until ``compute``);
            ``"batch"``: the paper's mean of per-batch scores, in constant memory. Batches of fewer
            than 4 are left out, with a warning; ``metric(student, base)``, which is ``update`` and
            the batch's own score, gives NaN for them. NaN in a feature is NaN in the score and in
            the mean.
        unbiased: the U-centred estimator in [-1, 1] instead of the biased one in [0, 1]. The paper
            does not name its estimator; biased is our reading, since its figures span [0, 1].
        normalize_rows: L2-normalise each sample's features first, as the authors' current code
            does; off by default, so that FSS and RS speak of the same distances.
        projection: a width or :class:`~fastxkd.metrics.RandomProjection`: keep that many values a
            sample, for very wide features. Its docstring says what error that may bring.
        gather: Among several processes (``torch.distributed``) features stay where they are, and
            tiles of them travel in a ring: all processes call ``compute``, also those without a
            sample, and all get the score of all samples; what fails in one is raised in all. With
            True they are copied to each of them instead, as torchmetrics does.
            ``mode="dataset"`` only.
        kwargs: of :class:`torchmetrics.Metric`.

    ``update(student, base)`` takes ``[n, ...]`` features of the same samples. ``compute()`` is
    float64 for float64 features in ``mode="dataset"``, else float32.

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
        projection: RandomProjection | int | None = None,
        gather: bool = False,
        **kwargs: Any,
    ) -> None:
        check_flags(unbiased=unbiased, normalize_rows=normalize_rows, gather=gather)
        super().__init__(mode, projection=projection, gather=gather, **kwargs)
        self.unbiased = unbiased
        self.normalize_rows = normalize_rows

    def update(self, student: Tensor, base: Tensor) -> None:
        rows = self._check_given(student, base)
        features = (student, base)
        if self.normalize_rows:
            features = (normalized_rows(student), normalized_rows(base))
        self._take(*(self._narrow(f, n) for f, n in zip(features, self.columns, strict=True)))
        self._rows = rows


class RelevanceScore(_Similarity):
    r"""RS: distance correlation of features with the labels: how much of the task a layer holds.

    With ``given``, the semi-partial :math:`P_{DC}(features | given; targets)`: distilled RS for
    student given base, residual RS for base given student (Adhane et al. 2025, section 3).

    Args:
        mode: as in :class:`FeatureSimilarityScore`; a batch of a single class is left out as well,
            with a warning: shuffle the loader.
        unbiased: the U-centred estimator, as the authors' code; only it is defined with ``given``.
        projection: of features and given, as in :class:`FeatureSimilarityScore`.
        gather: as there.
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

    def __init__(
        self,
        mode: str = "dataset",
        *,
        unbiased: bool = True,
        projection: RandomProjection | int | None = None,
        gather: bool = False,
        **kwargs: Any,
    ) -> None:
        check_flags(unbiased=unbiased, gather=gather)
        super().__init__(mode, projection=projection, gather=gather, **kwargs)
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
        rows = self._check_given(features, targets, *([] if given is None else [given]))
        narrow = self._narrow(features, "features")
        partial = () if given is None else (self._narrow(given, "given"),)
        self._take(narrow, targets, *partial)
        self._rows, self._partial = rows, given is not None

    def _embedded(self, y: Features, group: dist.ProcessGroup | None) -> Features:
        if not isinstance(y, Tensor):
            return y  # embeddings, in pieces
        return label_embeddings(y) if group is None else label_rows(y, group=group)

    def _one_class(self, *columns: Tensor) -> bool:
        targets = columns[1]
        return bool((targets == targets[:1]).all())
