"""Features held by several processes: what they find together is what one finds alone.

Four processes, once for all tests; groups of two, three and four of them.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import fastxkd
from fastxkd.ops import pairs
from tests._torchvision import declare_operators

declare_operators()
RS, FSS = fastxkd.RelevanceScore, fastxkd.FeatureSimilarityScore  # imports torchmetrics
WORLD = 4
# Ranks, and how they share 140 rows: unevenly, in parts of tiles, one with none.
GROUPS = {
    "two": ([0, 1], [80, 60]),
    "three": ([1, 2, 3], [45, 70, 25]),
    "four": ([0, 1, 2, 3], [33, 0, 100, 7]),
}
N = sum(GROUPS["two"][1])


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(11)
    common = torch.randn(N, 3, dtype=torch.float64)
    x, y, z = (
        (common @ torch.randn(3, d, dtype=torch.float64) + 4 * torch.randn(N, d)).to(dtype)
        for d in (5, 7, 4)
    )
    return x, y.view(N, 7, 1), z, torch.arange(N) // 47  # not everybody has all classes


Part = Callable[[Tensor], Tensor]


def scores(part: Part, group: Any) -> dict[str, list[float]]:
    """Everything, of the rows that ``part`` picks; of all of them where ``group`` is None."""
    found: dict[str, list[float]] = {}
    for dtype in (torch.float64, torch.bfloat16):
        x, y, z, labels = (part(m) for m in data(dtype))
        kind = str(dtype)
        found[f"distance {kind}"] = [
            fastxkd.distance_correlation(x, y, unbiased=flag, group=group).item()
            for flag in (True, False)
        ]
        found[f"partial {kind}"] = [
            fastxkd.partial_distance_correlation(
                x, y, given=z, semi_partial=flag, group=group
            ).item()
            for flag in (True, False)
        ]
    x, y, z, labels = (part(m) for m in data())
    sides: Any = ({"a": x, "b": y}, {"a": z, "b": x}, labels)
    for name, call in (
        ("layers", fastxkd.layer_scores),
        ("errors", fastxkd.layer_standard_errors),
    ):
        rows = call(*sides, teacher={"a": y, "b": z}, group=group)
        found[name] = [v for row in rows for v in row[1:] if isinstance(v, float)]
    for target, given in ((y, None), (labels, None), (labels, z), (y, z)):
        error = fastxkd.jackknife(x, target, given=given, group=group)
        test = fastxkd.permutation_test(
            x,
            target,
            given=given,
            permutations=25,
            generator=torch.Generator().manual_seed(6),
            group=group,
        )
        found[f"inference {len(found)}"] = [v.item() for v in error] + [
            test.value.item(),
            test.p_value,
        ]
    return found


def metrics(part: Part, **options: Any) -> dict[str, list[float]]:
    x, y, z, labels = (part(m) for m in data())
    found = {}
    for mode in ("dataset", "batch"):
        if mode == "batch":
            labels = part(torch.arange(N) % 3)  # a batch of one class has no score
            options.pop("gather", None)  # there are no features to gather
        fss = FSS(mode, **options)
        rs = RS(mode, **options)
        partial = RS(mode, **options)
        for rows in range(0, len(x), 20):
            at = slice(rows, rows + 20)
            fss.update(x[at], y[at])
            rs.update(x[at], labels[at])
            partial.update(x[at], labels[at], z[at])
        for metric in (fss, rs, partial):
            name = f"{mode} {len(found)}"
            found[name] = [metric.compute().item(), metric.standard_error().item()]
            if mode == "dataset":
                generator = torch.Generator().manual_seed(9)
                found[name].append(metric.p_value(25, generator=generator))
                found[name].append(metric.compute().item())
    return found


def refusals(group: Any, rank: int) -> dict[str, str]:
    """What each process hears when one of them is wrong: none may be left waiting."""
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    cases: dict[str, tuple[Any, Any]] = {
        "rows": (x, y[1:] if rank else y),
        "width": (x[:, : 2 + rank], y),
        "dtype": (x.double() if rank else x, y),
        "kind": (x, "y" if rank else y),
        "few": (x[:1], y[:1]),
    }
    labels = torch.arange(6) % 2
    targets: dict[str, Any] = {
        "targets": labels.view(2, 3) if rank else labels,
        "one hot": torch.nn.functional.one_hot(labels).float() if rank else labels,
    }
    found = {}
    for name, (a, b) in cases.items():
        try:
            fastxkd.distance_correlation(a, b, group=group)
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    for name, target in targets.items():
        try:
            fastxkd.layer_scores({"a": x}, {"a": y}, target, group=group)
        except ValueError as error:
            found[name] = str(error)
    try:
        fastxkd.jackknife(x, targets["one hot"], group=group)
    except ValueError as error:
        found["either"] = str(error)
    try:
        fastxkd.permutation_test(x, y, permutations=1, memory=10, group=group)
    except ValueError as error:
        found["memory"] = str(error)
    return found


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    pairs.TILE = 32
    pairs.PANEL_BYTES = 40 * 16 * 8  # panels of one tile
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    found: dict[str, Any] = {}
    for name, (ranks, counts) in GROUPS.items():
        group = dist.new_group(ranks)
        if rank not in ranks:
            continue
        own = ranks.index(rank)
        start = sum(counts[:own])
        rows = slice(start, start + counts[own])
        found[name] = scores(lambda m, rows=rows: m[rows], group)
        if name == "two":
            for gather in (True, False):
                found[f"{name} gather={gather}"] = metrics(
                    lambda m, rows=rows: m[rows], gather=gather, process_group=group
                )
            found["refusals"] = refusals(group, own)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")
    folder: Path = tmp_path_factory.mktemp("ring")
    # One import of everything, not one a process.
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(process, args=(str(folder),), nprocs=WORLD, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {"scores": scores(lambda m: m, None), "metrics": metrics(lambda m: m)}


@pytest.mark.parametrize("group", GROUPS)
def test_scores_are_those_of_one_process(
    together: list[dict[str, Any]], alone: dict[str, Any], group: str
) -> None:
    for rank in GROUPS[group][0]:
        found = together[rank][group]
        assert list(found) == list(alone["scores"])
        for name, values in alone["scores"].items():
            tolerance = 1e-6 if "bfloat16" in name else 1e-10
            assert found[name] == pytest.approx(values, abs=tolerance), (rank, name)


def test_scores_say_something(alone: dict[str, Any]) -> None:
    values = alone["scores"]
    p = [v[-1] for name, v in values.items() if name.startswith("inference")]
    assert len(p) == 4
    assert max(p) > 1 / 26
    assert all(abs(v) > 1e-4 for found in values.values() for v in found)


@pytest.mark.parametrize("gather", [True, False])
def test_metrics_are_those_of_one_process(
    together: list[dict[str, Any]], alone: dict[str, Any], gather: bool
) -> None:
    for rank in GROUPS["two"][0]:
        found = together[rank][f"two gather={gather}"]
        assert list(found) == list(alone["metrics"])
        for name, values in alone["metrics"].items():
            assert found[name] == pytest.approx(values, abs=1e-6), (rank, name)


def test_all_processes_refuse_together(together: list[dict[str, Any]]) -> None:
    first, second = (together[rank]["refusals"] for rank in (0, 1))
    cases = ["rows", "width", "dtype", "kind", "few", "targets", "one hot", "either", "memory"]
    assert list(first) == list(second) == cases
    assert second["targets"].startswith("targets: expected int64 class indices [n]")
    assert first["targets"].startswith("on rank 1: targets: expected int64 class indices [n]")
    assert second["rows"] == "ValueError: y: expected 6 rows as in x, got 5"
    assert first["rows"] == "ValueError: on rank 1: y: expected 6 rows as in x, got 5"
    for found in (first, second):
        assert found["width"].startswith("ValueError: x: expected 2 values a row of torch.float32")
        assert "got 3 of torch.float64 on rank 1" in found["dtype"]
        assert "y: expected a Tensor" in found["kind"]
        assert found["few"] == (
            "ValueError: x: expected at least 4 rows for a U-centred statistic, got 2"
        )
        assert found["one hot"] == "targets: expected class indices in every process or in none"
        assert found["either"] == "y: expected class indices in every process or in none"
        assert found["memory"].startswith("memory: the distances of y take 576 bytes")
    assert first["kind"].startswith("TypeError: on rank 1: ")
