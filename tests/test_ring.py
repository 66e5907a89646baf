"""The ring: scores of a data set whose rows stay in the processes that have them.

Four gloo processes, once for most tests, in groups of one, two and four; three for what happens
when one dies, and two for one that never comes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import warnings
import weakref
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastxkd
from fastxkd.ops import pairs, ring
from fastxkd.ops.stored import OneHot, Pieces
from tests._torchvision import declare_operators

declare_operators()
RS, FSS = fastxkd.RelevanceScore, fastxkd.FeatureSimilarityScore  # imports torchmetrics
WORLD, N = 4, 150
# How they share the rows: unevenly, in parts of tiles, some with none.
SHARES = {
    "one": [150],
    "two": [97, 53],
    "two, one empty": [0, 150],
    "four": [33, 0, 110, 7],
    "four, even": [40, 40, 40, 30],
}


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    common = torch.randn(N, 3, dtype=torch.float64)
    x, y, z = (
        common @ torch.randn(3, d, dtype=torch.float64) + 3 * torch.randn(N, d, dtype=torch.float64)
        for d in (6, 8, 5)
    )
    labels = torch.arange(N) // 37  # not everybody has all classes
    x[:, 0] += 3 * labels
    z[:, 0] += labels
    return x, y.view(N, 2, 4), z, labels


def scores(rows: slice, **options: Any) -> dict[str, list[float]]:
    x, y, z, labels = (m[rows] for m in data())
    embeddings = torch.nn.functional.one_hot(labels, 5).double() * 2
    found = {}
    for name, metric, columns in (
        ("fss", FSS(**options), (x, y)),
        ("rs", RS(**options), (x, labels)),
        ("distilled rs", RS(**options), (x, labels, z)),
        ("rs of embeddings", RS(**options), (x, embeddings)),
    ):
        for at in range(0, len(x), 19):  # in pieces that are not those of the walk
            metric.update(*(c[at : at + 19] for c in columns))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torchmetrics: a process has seen no update
            p = metric.p_value(9, generator=torch.Generator().manual_seed(2))
            found[name] = [metric.compute().item(), metric.standard_error().item(), p]
            assert metric.compute().dtype == torch.float64
    return found


class Breaks:
    """A slice of a file that cannot be read the k-th time."""

    def __init__(self, features: Tensor, at: int | None) -> None:
        self.features, self.at, self.count = features, at, 0

    def get_shape(self) -> list[int]:
        return list(self.features.shape)

    def get_dtype(self) -> str:
        return "F64"

    def __getitem__(self, rows: slice) -> Tensor:
        self.count += 1
        if self.count - 1 == self.at:
            raise OSError("the disk is gone")
        return self.features[rows]


def said(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def reading(group: Any, rows: slice) -> dict[str, Any]:
    """A file that fails in rank 1 at every moment at which it is read at all."""
    x, y, *_ = (m[rows] for m in data())
    broken = dist.get_rank(group) == 1
    whole = Breaks(x, None)
    expected = fastxkd.distance_correlation(whole, y, group=group).item()
    reads = [whole.count]
    dist.broadcast_object_list(reads, dist.get_global_rank(group, 1), group=group)
    found = []
    for at in range(reads[0]):
        failing = Breaks(x, at if broken else None)
        found.append(said(lambda f=failing: fastxkd.distance_correlation(f, y, group=group)))
    again = fastxkd.distance_correlation(x, y, group=group).item()
    return {"said": found, "reads": reads[0], "again": again - expected}


def working(group: Any, rows: slice) -> list[str]:
    """What is done with a tile fails in rank 1, at every tile."""
    x = data()[0][rows]
    walk = pairs.Pairs([x], ["x"], group)
    shares: list[int] = [0] * dist.get_world_size(group)
    dist.all_gather_object(shares, sum(1 for _ in walk.tiles()), group=group)

    def work(at: int) -> None:
        for count, _ in enumerate(walk.tiles()):
            if count == at and dist.get_rank(group) == 1:
                raise MemoryError("no room")

    return [said(lambda at=at: work(at)) for at in range(shares[1])]


def metric_that_fails(group: Any, rows: slice) -> tuple[str, float]:
    """A row too wide in one process; the metric can be used again."""
    x, y, *_ = (m[rows].flatten(1) for m in data()[:2])
    metric = FSS(process_group=group)
    metric.update(x, y)
    whole = metric.compute().item()
    metric.reset()
    narrow = x[:, :5] if dist.get_rank(group) else x
    metric.update(narrow, y)
    text = said(metric.compute)
    metric.update(narrow, y)  # would raise, were it left as it was among others
    metric.reset()
    metric.update(x, y)
    return text, metric.compute().item() - whole


def coverage(group: Any, rows: slice) -> list[tuple[slice, slice]]:
    walk = pairs.Pairs([data()[0][rows]], ["x"], group)
    return [(tile.rows, tile.cols) for tile in walk.tiles()]


def tiles_alive(group: Any, rows: slice) -> tuple[int, list[str]]:
    """The highest number of tiles of others at a time, and in which order things happen."""
    alive: list[weakref.ref[Tensor]] = []
    events: list[str] = []
    most = 0
    hand_on = ring.Ring._hand_on

    def spied(self: ring.Ring, tile: list[Tensor], size: int) -> Any:
        nonlocal most
        events.append("under way")
        arrived = hand_on(self, tile, size)

        def waits() -> list[Tensor]:
            events.append("waits")
            taken = arrived()
            alive.append(weakref.ref(taken[0]))
            return taken

        most = max(most, sum(r() is not None for r in alive) + 1)
        return waits

    ring.Ring._hand_on = spied  # type: ignore[method-assign]
    try:
        walk = pairs.Pairs([data()[0][rows]], ["x"], group)
        for offset, turn in walk._passing(0, walk.own):
            events.append(f"turn {offset} {(dist.get_rank(group) - turn.owner) % walk.ring.world}")
            del turn
    finally:
        ring.Ring._hand_on = hand_on  # type: ignore[method-assign]
    return most, events


def process(rank: int, folder: str) -> None:
    start(rank, WORLD, folder)
    import torchmetrics.metric

    def gathers(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("features were gathered")

    torchmetrics.metric.gather_all_tensors = gathers
    found: dict[str, Any] = {}
    for name, counts in SHARES.items():
        ranks = list(range(len(counts)))
        group = dist.new_group(ranks)
        if rank not in ranks:
            continue
        rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        found[name] = scores(rows, process_group=group)
        found[f"{name}: tiles"] = coverage(group, rows)
        if name == "four, even":
            found["alive"] = tiles_alive(group, rows)
        if name in ("two", "four, even"):
            found[f"{name}: reading"] = reading(group, rows)
            found[f"{name}: working"] = working(group, rows)
            found[f"{name}: metric"] = metric_that_fails(group, rows)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def start(rank: int, world: int, folder: str, timeout: float = 60) -> None:
    torch.set_num_threads(1)
    pairs.TILE = 32
    pairs.PANEL_BYTES = 40 * 16 * 8  # panels of one tile
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )


def run(target: Any, world: int, folder: Path) -> list[int | None]:
    """Exit codes of so many processes."""
    # One import of everything, not one a process.
    multiprocessing.set_forkserver_preload([__name__])
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=target, args=(r, str(folder))) for r in range(world)]
    for each in processes:
        each.start()
    until = time.monotonic() + 120
    for each in processes:
        each.join(max(0, until - time.monotonic()))
    stuck = [each.pid for each in processes if each.is_alive()]
    for each in processes:
        each.kill()
        each.join()
    assert not stuck
    return [each.exitcode for each in processes]


@pytest.fixture(scope="module", autouse=True)
def _gloo() -> None:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ring")
    assert run(process, WORLD, folder) == [0] * WORLD
    # slices, which no safe loader knows; the files are our own
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone() -> dict[str, list[float]]:
    return scores(slice(None))


@pytest.mark.parametrize("share", SHARES)
def test_metrics_are_those_of_one_process(
    together: list[dict[str, Any]], alone: dict[str, list[float]], share: str
) -> None:
    for rank in range(len(SHARES[share])):
        found = together[rank][share]
        assert list(found) == list(alone)
        for name, values in alone.items():
            assert found[name] == pytest.approx(values, abs=1e-10), (rank, name)


def test_scores_say_something(alone: dict[str, list[float]]) -> None:
    assert len(alone) == 4
    assert all(0.01 < abs(value[0]) < 0.99 and value[1] > 1e-3 for value in alone.values())


@pytest.mark.parametrize("share", SHARES)
def test_every_pair_once(together: list[dict[str, Any]], share: str) -> None:
    seen = torch.zeros(N, N, dtype=torch.long)
    work = []
    for rank in range(len(SHARES[share])):
        before = int(seen.sum())
        for rows, cols in together[rank][f"{share}: tiles"]:
            seen[rows, cols] += 1
            if rows != cols:
                seen[cols, rows] += 1
        work.append(int(seen.sum()) - before)
    assert (seen == 1).all()
    if share == "four, even":  # and nobody has much more to do than others
        assert max(work) < 1.5 * N * N / WORLD, work


def test_two_tiles_of_others_at_most_and_one_is_under_way(together: list[dict[str, Any]]) -> None:
    for rank in range(WORLD):
        most, events = together[rank]["alive"]
        assert most == 2  # at hand, and arriving
        one_round = ["under way", "turn {0} 0", "waits", "under way", "turn {0} 1", "waits"]
        expected = [e.format(offset) for offset in (0, 32) for e in [*one_round, "turn {0} 2"]]
        assert events == expected


@pytest.mark.parametrize("share", ["two", "four, even"])
def test_what_cannot_be_read_is_heard_by_all(together: list[dict[str, Any]], share: str) -> None:
    world = len(SHARES[share])
    for rank in range(world):
        found = together[rank][f"{share}: reading"]
        expected = "OSError: the disk is gone"
        if rank != 1:
            expected = f"RuntimeError: on rank 1: {expected}"
        assert found["reads"] >= 5
        assert found["said"] == [expected] * found["reads"]
        assert found["again"] == 0


@pytest.mark.parametrize("share", ["two", "four, even"])
def test_work_that_fails_is_heard_by_all(together: list[dict[str, Any]], share: str) -> None:
    for rank in range(len(SHARES[share])):
        found = together[rank][f"{share}: working"]
        expected = "MemoryError: no room"
        if rank != 1:
            expected = "RuntimeError: on rank 1: RuntimeError: stopped before all pairs were seen"
        assert len(found) >= 3
        assert found == [expected] * len(found)


@pytest.mark.parametrize("share", ["two", "four, even"])
def test_metric_after_an_error(together: list[dict[str, Any]], share: str) -> None:
    for rank in range(len(SHARES[share])):
        text, difference = together[rank][f"{share}: metric"]
        assert text.startswith("ValueError: student, base: expected the same in every process,")
        assert "torch.float64 [n, 6] on cpu" in text
        assert "torch.float64 [n, 5] on cpu" in text
        assert text.endswith("on rank 1")
        assert difference == 0


def dies(rank: int, folder: str) -> None:
    start(rank, 3, folder)
    x = data()[0]

    def work() -> None:
        for count, _ in enumerate(pairs.Pairs([x], ["x"], dist.group.WORLD).tiles()):
            if rank == 1 and count == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    Path(folder, f"{rank}.txt").write_text(said(work))


def test_a_process_that_dies_stops_the_others(tmp_path: Path) -> None:
    begin = time.monotonic()
    assert run(dies, 3, tmp_path) == [0, -signal.SIGKILL, 0]
    assert time.monotonic() - begin < 50  # at once, not after the timeout
    for rank in (0, 2):
        # Lost where tiles are handed on, gloo's own words where all meet.
        text = (tmp_path / f"{rank}.txt").read_text()
        assert "closed" in text or "reset" in text or "lost a process" in text, text


def late(rank: int, folder: str) -> None:
    start(rank, 2, folder, timeout=3)
    if rank == 1:
        (x,) = (data()[0][:40],)
        Path(folder, "said").write_text(
            said(lambda: fastxkd.distance_correlation(x, x, group=dist.group.WORLD))
        )
    else:  # does something else
        until = time.monotonic() + 60
        while not Path(folder, "said").exists() and time.monotonic() < until:
            time.sleep(0.05)


def test_a_process_that_never_comes_is_waited_for_as_long_as_the_group_says(
    tmp_path: Path,
) -> None:
    run(late, 2, tmp_path)
    text = (tmp_path / "said").read_text()
    assert "Timed out" in text or "timeout" in text.lower(), text


def test_pieces_are_read_as_one() -> None:
    whole = torch.arange(60.0).view(20, 3)
    pieces = Pieces([whole[:7], whole[7:7], whole[7:8], whole[8:], whole[:0]])
    assert pieces.shape == (20, 3)
    for begin in range(21):
        for end in range(begin, 21):
            assert torch.equal(pieces[begin:end], whole[begin:end])
    assert torch.equal(pieces[:], whole)
    assert torch.equal(Pieces([whole[:0]])[:], whole[:0])
    with pytest.raises(ValueError, match=r"x: expected torch.float32 \[3\] a row as at first"):
        Pieces([whole, whole[:, :2]], "x")


def test_pieces_and_classes_score_as_tensors_do() -> None:
    x, y, _, labels = data()
    y = y.flatten(1)
    one_hot = torch.nn.functional.one_hot(labels).float()
    for a, b in ((Pieces(x.split(17)), Pieces(y.split(31))), (x, Pieces(y.split(150)))):
        found = fastxkd.distance_correlation(a, b)
        assert found.item() == pytest.approx(fastxkd.distance_correlation(x, y).item(), abs=1e-12)
    found = fastxkd.distance_correlation(x, OneHot(labels, int(labels.max()) + 1))
    expected = fastxkd.distance_correlation(x, one_hot)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)


def test_agreement_says_what_others_could_not() -> None:
    def fails() -> Iterator[None]:
        raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        ring.agree(fails, None)
    walk = ring.Ring(None)
    with pytest.raises(OSError, match="gone"), walk.until_met():
        raise OSError("gone")
    walk.settle()
    assert [turn.owner for turn in walk.turns([], [3])] == [0]
