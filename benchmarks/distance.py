"""FSS and RS of many layers in one sweep, and distance correlation, against dense matrices.

The floors are the bare Gram products that any method by matrix products needs: over the half of
the tiles that symmetry leaves, and of whole n x n matrices. At the size of a data set no dense
matrix fits; there the scores are held to those of the same features in float64.
"""

from __future__ import annotations

import importlib
from functools import partial

import torch
from torch import Tensor

import fastxkd
from benchmarks._harness import Case, Spec, main
from fastxkd.metrics.similarity import label_embeddings
from fastxkd.ops.pairs import TILE

TESTS = ["tests/test_distance.py"]
Features = dict[str, dict[str, Tensor]]


def symmetric_grams(features: list[Tensor], buffer: Tensor) -> None:
    n = len(features[0])
    for i in range(0, n, TILE):
        for j in range(i, n, TILE):
            for x in features:
                rows, cols = x[i : i + TILE], x[j : j + TILE]
                out = buffer[: len(rows) * len(cols)].view(len(rows), len(cols))
                torch.mm(rows, cols.T, out=out)


def full_grams(features: list[Tensor], buffer: Tensor) -> None:
    for x in features:
        torch.mm(x, x.T, out=buffer)


def _doubly_centred(d: Tensor) -> Tensor:
    rows = d.mean(0)
    return d - rows[:, None] - rows[None, :] + rows.mean()


def _u_centred(d: Tensor) -> Tensor:
    n = len(d)
    rows = d.sum(0)
    centred = d - (rows[:, None] + rows[None, :]) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return centred.fill_diagonal_(0)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt())


def _semi_partial(a: Tensor, c: Tensor, t: Tensor) -> float:
    return _cosine(a - (a * c).sum() / (c * c).sum() * c, t)


def dense_scores(features: Features, labels: Tensor) -> list[list[float]]:
    """The scores of ``fastxkd.layer_scores`` in its order, from whole matrices."""
    target = _u_centred(torch.cdist(labels, labels))
    rows = []
    for s, b, t in zip(*(side.values() for side in features.values()), strict=True):
        d = [torch.cdist(x, x) for x in (s, b, t)]
        s2, b2, t2 = (_doubly_centred(x) for x in d)
        su, bu, tu = (_u_centred(x) for x in d)
        plain = [_cosine(s2, b2), _cosine(s2, t2), *(_cosine(x, target) for x in (su, bu, tu))]
        rows.append([*plain, _semi_partial(su, bu, target), _semi_partial(bu, su, target)])
    return rows


def models(n: int, width: int, layers: int, classes: Tensor) -> Features:
    pattern = torch.randn(10, width)[classes]
    shared = torch.randn(layers, n, width)
    return {
        role: {
            f"layer{i}": shared[i] + torch.randn(n, width) + 0.2 * pattern for i in range(layers)
        }
        for role in ("student", "base", "teacher")
    }


def scores(n: int, width: int, layers: int) -> Case:
    classes = torch.arange(n) % 10
    features = models(n, width, layers, classes)
    student, base, teacher = features.values()
    labels = label_embeddings(classes)
    matrices = [x for side in features.values() for x in side.values()] + [labels]
    buffer, tile = torch.empty(n, n), torch.empty(TILE * TILE)

    def ours() -> list[fastxkd.metrics.LayerScores]:
        return fastxkd.layer_scores(student, base, classes, teacher=teacher)

    def notes() -> dict[str, str]:
        off = max(
            abs(mine - theirs)
            for row, dense in zip(ours(), dense_scores(features, labels), strict=True)
            for mine, theirs in zip(row[1:], dense, strict=True)
        )
        matrix = n * n * 4 / 2**20
        return {
            "ours": f"scores differ from dense ones by at most {off:.1e};"
            f" one n x n matrix would be {matrix:.1f} MiB"
        }

    variants = {
        "floor: Gram, half the tiles": lambda: symmetric_grams(matrices, tile),
        "Gram, whole matrices": lambda: full_grams(matrices, buffer),
        "eager (cdist, dense)": lambda: dense_scores(features, labels),
        "ours": ours,
    }
    return Case(variants, notes=notes)


def data_set(n: int, width: int) -> Case:
    """Seven matrices of one width: two layers of three models, and embeddings of the classes."""
    classes = torch.arange(n) % 10
    features = models(n, width, 2, classes)
    labels = torch.randn(10, width)[classes]
    matrices = [x for side in features.values() for x in side.values()] + [labels]
    tile = torch.empty(TILE * TILE)

    def ours(dtype: torch.dtype = torch.float32) -> list[list[float]]:
        s, b, t = ({k: x.to(dtype) for k, x in side.items()} for side in features.values())
        return [
            [v for v in row[1:] if v is not None]
            for row in fastxkd.layer_scores(s, b, labels.to(dtype), teacher=t)
        ]

    def notes() -> dict[str, str]:
        off = max(
            abs(single / double - 1)
            for row, exact in zip(ours(), ours(torch.float64), strict=True)
            for single, double in zip(row, exact, strict=True)
        )
        held = sum(x.numel() * 4 for x in matrices) / 2**20
        return {
            "ours": f"scores differ from float64 by at most {off:.1e} of themselves;"
            f" the features are {held:.0f} MiB, not counted in the peak"
        }

    variants = {"floor: Gram, half the tiles": lambda: symmetric_grams(matrices, tile)}
    return Case({**variants, "ours": ours}, notes=notes)


def pair(n: int, width: int) -> Case:
    x = torch.randn(n, width, dtype=torch.float64)
    y = x[:, : width // 2] + torch.randn(n, width // 2, dtype=torch.float64)
    tile = torch.empty(TILE * TILE, dtype=torch.float64)

    def eager() -> float:
        return _cosine(*(_u_centred(torch.cdist(z, z)) for z in (x, y)))

    def ours() -> float:
        return float(fastxkd.distance_correlation(x, y))

    variants = {
        "floor: Gram, half the tiles": lambda: symmetric_grams([x, y], tile),
        "eager (cdist, dense)": eager,
        "ours": ours,
    }
    notes = {"ours": f"differs from eager by {abs(ours() - eager()):.1e}"}
    try:
        dcor = importlib.import_module("dcor")
    except ImportError:
        notes["ours"] += "; dcor is not installed"
    else:
        arrays = x.numpy(), y.numpy()
        variants["dcor"] = lambda: dcor.u_distance_correlation_sqr(*arrays)
        off = abs(ours() - float(dcor.u_distance_correlation_sqr(*arrays)))
        notes["ours"] += f", from dcor by {off:.1e}"
    return Case(variants, notes=lambda: notes)


def specs(quick: bool) -> list[Spec]:
    dense, all_of, two = (1000, 2000, 500) if quick else (5000, 20_000, 2000)
    wide = 256 if quick else 1024
    return [
        Spec(
            f"FSS and RS, 4 layers x 3 models, n = {dense}, d = 512",
            partial(scores, dense, 512, 4),
            rounds=5,
            resident=not quick,
        ),
        Spec(
            f"FSS and RS of a data set, 7 matrices, n = {all_of}, d = {wide}",
            partial(data_set, all_of, wide),
            rounds=3,
            resident=not quick,
        ),
        Spec(f"distance_correlation, n = {two}, d = 512 and 256, float64", partial(pair, two, 512)),
    ]


if __name__ == "__main__":
    main("distance", specs, TESTS, __doc__)
