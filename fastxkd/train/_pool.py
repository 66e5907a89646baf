"""FSS and RS of the batches of a training, pooled until there are enough images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastxkd.metrics.similarity import InnerProducts, centre, label_embeddings, sums


class Pool:
    """Rows of features of every layer of every model, and the labels; on the host.

    Args:
        size: as many rows make a score, or the few more that the last batch brings.
        layers: names of the layers.
        roles: the models: student, teacher, and base if there is one.
        fss, rs, unicam: which scores to make.
    """

    def __init__(
        self,
        size: int,
        layers: Sequence[str],
        roles: Sequence[str],
        *,
        fss: bool,
        rs: bool,
        unicam: bool,
    ) -> None:
        self.size = size
        self.layers, self.roles = list(layers), list(roles)
        self._fss, self._rs, self._unicam = fss, rs, unicam
        self._rows: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return sum(len(next(iter(rows.values()))) for rows in self._rows)

    def add(self, rows: Mapping[str, Tensor]) -> dict[str, float]:
        """Rows by ``layer/role``, and ``labels``; scores of all if there are enough now, and
        then the pool is empty again.

        Rows of another width (images of another size) begin a new pool. Images whose label is
        negative, as those that a loss ignores have, are left out.
        """
        labels = rows.get("labels")
        if labels is not None and not labels.is_floating_point() and bool((labels < 0).any()):
            rows = {name: row[labels >= 0] for name, row in rows.items()}
        if self._rows and _kind(self._rows[0]) != _kind(rows):
            self._rows.clear()
        self._rows.append(dict(rows))
        if len(self) < self.size:
            return {}
        rows = self._joined()
        self._rows.clear()
        return self._scores(rows)

    def _joined(self) -> dict[str, Tensor]:
        names = list(self._rows[0]) if self._rows else []
        return {name: torch.cat([rows[name] for rows in self._rows]) for name in names}

    def _scores(self, rows: Mapping[str, Tensor]) -> dict[str, float]:
        names = [f"{layer}/{role}" for layer in self.layers for role in self.roles]
        matrices = [rows[name] for name in names]
        if "labels" in rows:
            matrices.append(label_embeddings(rows["labels"]))
            names.append("labels")
        found = sums(matrices, names)
        biased, unbiased = (centre(*found, unbiased=flag) for flag in (False, True))
        scores = {}
        for i, layer in enumerate(self.layers):
            first = i * len(self.roles)
            at = {role: first + j for j, role in enumerate(self.roles)}
            for name, value in self._of_layer(biased, unbiased, at, len(names) - 1).items():
                scores[f"{layer}/{name}"] = float(value)
        return scores

    def _of_layer(
        self, biased: InnerProducts, unbiased: InnerProducts, at: dict[str, int], labels: int
    ) -> dict[str, Tensor]:
        """Named and estimated as in :class:`fastxkd.metrics.LayerScores`."""
        student, base = at["student"], at.get("base")
        scores = {}
        if self._fss:
            if base is not None:
                scores["fss"] = biased.correlation(student, base)
            scores["fss_teacher"] = biased.correlation(student, at["teacher"])
        if self._rs:
            for role, k in at.items():
                scores[f"rs_{role}"] = unbiased.correlation(k, labels)
        if self._unicam and base is not None:
            scores["rs_distilled"] = unbiased.semi_partial(student, base, labels)
            scores["rs_residual"] = unbiased.semi_partial(base, student, labels)
        return scores

    def state_dict(self) -> dict[str, Any]:
        # Rows may be views of larger activations, which a checkpoint has no use for.
        return {name: rows.clone() for name, rows in self._joined().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rows = [dict(state)] if state else []


def _kind(rows: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: (row.shape[1:], row.dtype) for name, row in rows.items()}
