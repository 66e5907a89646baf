"""The harness's arithmetic on a clock of our own, and every benchmark's cases at a small size."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import _harness, _machine, _results, table
from benchmarks.__main__ import NAMES
from benchmarks._harness import Case, Spec, measure, rows_of
from benchmarks._machine import TICK, Reading, polluted
from tests._torchvision import declare_operators


class Clock:
    """Time passes in calls only; others use a share of a core meanwhile."""

    def __init__(self, others: float = 0.0, waiting: float = 0.0) -> None:
        self.now = 0.0
        self.busy = self.waited = 0.0
        self.others, self.waiting = others, waiting

    def read(self) -> Reading:
        cpu = self.now
        return Reading(self.now, cpu, cpu + self.busy, self.waited, int(self.now * 1000), self.now)

    def call(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds
            self.busy += self.others * seconds
            self.waited += self.waiting * seconds

        return run


def test_samples_are_at_least_as_long_as_asked_and_interleaved() -> None:
    clock, ran = Clock(), []

    def variant(name: str, seconds: float) -> Callable[[], None]:
        run = clock.call(seconds)

        def call() -> None:
            ran.append(name)
            run()

        return call

    variants = {"a": variant("a", 0.001), "b": variant("b", 0.2)}
    samples = measure(variants, rounds=5, seconds=0.05, read=clock.read)
    assert {name: len(s.clean) for name, s in samples.items()} == {"a": 5, "b": 5}
    assert not any(s.disturbed for s in samples.values())
    # One call of b is a sample; a needs fifty and some more to spare.
    turns = [name for i, name in enumerate(ran) if i == 0 or ran[i - 1] != name]
    assert ran.count("b") == 5 + 2
    assert 5 * 50 <= ran.count("a") <= 5 * 65 + 100
    assert len(turns) >= 6


def test_medians_ratios_and_faults() -> None:
    clock = Clock()
    variants = {"floor": clock.call(0.01), "eager": clock.call(0.1), "ours": clock.call(0.02)}
    samples = measure(variants, rounds=3, read=clock.read)
    rows = rows_of(
        samples,
        10**7,
        {"ours": 5},
        {"ours": "exact"},
        benchmark="x",
        case="c",
        threads=1,
        allocator="default",
    )
    floor, eager, ours = rows
    assert [r.median_ms for r in rows] == pytest.approx([10, 100, 20])
    assert [r.times_floor for r in rows] == pytest.approx([1, 10, 2])
    assert (floor.times_ours, eager.times_ours) == pytest.approx((0.5, 5))
    assert ours.floor_gb_s == pytest.approx(0.5)
    assert eager.faults == pytest.approx(100, abs=1)
    assert [r.paired_floor for r in rows] == pytest.approx([1, 10, 2])
    assert (ours.peak_bytes, ours.note, eager.peak_bytes) == (5, "exact", None)
    assert not any(r.noisy for r in rows)


def test_median_is_of_the_undisturbed_samples() -> None:
    clock = Clock()
    samples = _harness.Samples(clean=[(1.0, 0), (2.0, 0), (4.0, 0)], disturbed=[(100.0, 0)] * 9)
    (row,) = rows_of(
        {"floor": samples}, None, {}, {}, benchmark="x", case="c", threads=1, allocator="default"
    )
    assert (row.median_ms, row.min_ms, row.max_ms) == (2000, 1000, 4000)
    assert (row.kept, row.discarded, row.noisy, row.paired_floor) == (3, 9, 0, None)
    assert row.times_ours is None
    assert row.floor_gb_s is None
    assert clock.now == 0


@pytest.mark.parametrize("clock", [Clock(others=1.0), Clock(waiting=0.05)], ids=["busy", "waits"])
def test_busy_machine_ends_the_measurement_and_is_reported(clock: Clock) -> None:
    variants = {"floor": clock.call(0.06), "ours": clock.call(0.06)}
    samples = measure(variants, rounds=4, read=clock.read)
    assert {name: (len(s.clean), len(s.disturbed)) for name, s in samples.items()} == {
        "floor": (0, 12),
        "ours": (0, 12),
    }
    rows = rows_of(samples, None, {}, {}, benchmark="x", case="c", threads=1, allocator="default")
    assert [(r.noisy, r.kept, r.discarded) for r in rows] == [(1, 12, 0)] * 2
    assert rows[0].median_ms == pytest.approx(60)


def test_budget_ends_a_long_measurement_after_three_rounds() -> None:
    clock = Clock(others=1.0)
    samples = measure({"floor": clock.call(1.0)}, rounds=9, budget=2.0, read=clock.read)
    assert len(samples["floor"].disturbed) == 3


def test_count_of_calls_found_on_a_busy_machine_is_corrected() -> None:
    clock = Clock()
    slow_until = 2 * 0.05

    def call() -> None:
        clock.now += 0.05 if clock.now < slow_until else 0.001

    samples = measure({"floor": call}, rounds=3, read=clock.read)
    assert [seconds for seconds, _ in samples["floor"].clean] == pytest.approx([0.001] * 3)
    assert len(samples["floor"].disturbed) >= 1


def test_pollution_thresholds() -> None:
    start = Reading(0, 0, 0, 0, 0, 0)

    def after(others: float, waited: float) -> Reading:
        return Reading(1.0, 2.0, 2.0 + others, waited, 0, 1.0)

    assert not polluted(start, after(0.07, 0.02))
    assert not polluted(start, after(-3 * TICK, 0))
    assert polluted(start, after(0.09 + 2 * TICK, 0))
    assert polluted(start, after(0, 0.04))


def test_readings_of_this_machine_move_forward() -> None:
    before = _machine.read()
    torch.ones(1 << 20).sum()
    after = _machine.read()
    assert before.begin < before.end < after.begin
    assert after.cpu > before.cpu
    assert after.busy >= before.busy


def test_peak_allocated_counts_what_lives_at_once() -> None:
    def call() -> None:
        for _ in range(3):
            torch.ones(1 << 16), torch.ones(1 << 16)

    assert _machine.peak_allocated(call) == 2 * 4 << 16


def test_peak_resident_sees_memory_outside_torch() -> None:
    peak = _machine.peak_resident(lambda: bytearray(b"x" * (64 << 20)))
    if peak is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert 60 << 20 < peak < 140 << 20


def test_allocators_differ_in_their_environment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    monkeypatch.setenv("KEPT", "yes")
    default, tuned = _machine.environment("default"), _machine.environment("tuned")
    assert "THP_MEM_ALLOC_ENABLE" not in default
    assert tuned["THP_MEM_ALLOC_ENABLE"] == "1"
    assert default["KEPT"] == tuned["KEPT"] == "yes"


def test_red_tests_refuse_the_results(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    red, green = tmp_path / "test_red.py", tmp_path / "test_green.py"
    red.write_text("def test_wrong():\n    assert 1 + 1 == 3\n")
    green.write_text("def test_right():\n    assert 1 + 1 == 2\n")
    _harness.gate([str(green)])
    with pytest.raises(SystemExit, match=r"not written: .*test_red\.py must pass first"):
        _harness.gate([str(red)])
    assert "1 failed" in capfd.readouterr().out


def _run_main(monkeypatch: pytest.MonkeyPatch, path: Path, *options: str) -> list[str]:
    """``main`` of a tiny benchmark whose worker runs in this process."""
    spec = Spec("tiny", lambda: Case({"floor": lambda: None, "ours": lambda: None}))
    gated: list[str] = []

    def in_process(name: str, options: list[str], job: dict[str, object], allocator: str) -> object:
        return _harness._worker(name, [spec], job | {"allocator": allocator})

    monkeypatch.setattr(_harness, "_in_process", in_process)
    monkeypatch.setattr(_harness, "gate", gated.extend)
    monkeypatch.setattr(_harness, "append", lambda rows, facts: _results.append(rows, facts, path))
    monkeypatch.setattr(_harness, "measure", lambda v, **_: measure(v, rounds=3, seconds=1e-4))
    monkeypatch.setattr(sys, "argv", ["tiny", *options])
    _harness.main("tiny", lambda quick: [spec], ["tests/test_tiny.py"], "A benchmark.")
    return gated


def test_main_prints_and_writes_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.csv"
    threads = torch.get_num_threads()
    try:
        assert _run_main(monkeypatch, path, "--threads", "1") == []
        assert not path.exists()
        assert "tiny; 1 thread, tuned allocator" in capsys.readouterr().out
        assert _run_main(monkeypatch, path, "--write") == ["tests/test_tiny.py"]
        assert _run_main(monkeypatch, path, "--write", "--no-gate") == []
    finally:
        torch.set_num_threads(threads)
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(_results.COLUMNS)
    assert len(lines) == 1 + 2 * 4
    with pytest.raises(SystemExit):
        _run_main(monkeypatch, path, "--only", "huge")
    with pytest.raises(SystemExit):
        _run_main(monkeypatch, path, "--quick", "--write")
    assert "a quick look is not kept" in capsys.readouterr().err


def _row(allocator: str, variant: str, ms: float, ours: float, **more: object) -> _results.Row:
    row = _results.Row(
        "kd_loss",
        "256x1000",
        2,
        allocator,
        variant,
        ms,
        ms,
        ms,
        ms / 0.02,
        ms / ours,
        1.5,
        0,
        9,
        0,
        0,
    )
    for name, value in more.items():
        setattr(row, name, value)
    return row


def test_results_survive_the_file_and_the_newest_win(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    facts = dict.fromkeys(_results.FACTS, "1") | {"cpu": "A CPU, AVX512", "dirty": "0"}

    def at(when: str, *rows: _results.Row) -> None:
        _results.append(list(rows), facts | {"timestamp": when}, path)

    old = [_row("default", v, ms, 1.0) for v, ms in (("floor", 0.02), ("ours", 1.0))]
    new = [
        _row("default", "floor", 0.02, 0.1),
        _row("default", "eager", 1.1, 0.1, peak_bytes=6 << 20),
        _row("default", "ours", 0.1, 0.1, peak_bytes=1 << 20, note="error 1e-8, good"),
    ]
    tuned = [
        _row("tuned", v, ms, 0.1) for v, ms in (("floor", 0.02), ("eager", 0.5), ("ours", 0.1))
    ]
    at("2026-01-01T00:00:00", *old)
    at("2026-01-02T00:00:00", *new, *tuned)
    found = table.newest(path)
    for (_, row), written in zip(found, [*new, *tuned], strict=True):
        assert (row.variant, row.allocator, row.note) == (
            written.variant,
            written.allocator,
            written.note,
        )
        assert row.times_ours == pytest.approx(written.times_ours)
        assert row.peak_bytes == written.peak_bytes
    text = table.markdown(found)
    assert "| kd_loss | 256x1000, 2 threads | 0.1 ms (0.1 ms) | 5 (5) | eager 11× (5×) |" in text
    assert "eager 6.0 MiB, ours 1.0 MiB" in text
    assert "A CPU, AVX512, 1 cores" in text
    noisy = [(record | {"gated": "0"}, row) for record, row in found]
    noisy[0][1].noisy = 1
    assert "[noisy, tests not run]" in table.markdown(noisy)


def test_committed_results_have_the_columns_of_the_code() -> None:
    first, *rows = _results.RESULTS.read_text().splitlines()
    assert first == ",".join(_results.COLUMNS)
    assert len(table.newest()) <= len(rows)


def test_kd_loss_cases() -> None:
    from benchmarks import kd_loss

    case = kd_loss.case(8, 32, torch.float32)
    case.variants.pop("torch.compile")
    for call in case.variants.values():
        call()
    peaks = {name: _machine.peak_allocated(call) for name, call in case.variants.items()}
    unit = 8 * 32 * 4
    assert peaks["floor: add(s, t, out=g)"] == 0
    assert unit <= peaks["ours"] < 1.1 * unit
    assert peaks["eager"] > 5 * unit
    assert "loss off by" in case.notes()["ours"]
    inputs = (torch.randn(8, 32), torch.randn(8, 32), torch.arange(8))
    losses = [f(*inputs) for f in (kd_loss.eager, kd_loss.eager_log_target, kd_loss.ours)]
    torch.testing.assert_close(losses[0], losses[2])
    torch.testing.assert_close(losses[1], losses[2])


def test_unicam_case() -> None:
    from benchmarks import unicam

    case = unicam.case(12, 6, 4)
    for call in case.variants.values():
        call()
    labels = torch.eye(3, dtype=torch.float64)[torch.arange(12) % 3]
    activations, base = torch.rand(2, 12, 6, 4, 4, dtype=torch.float64)
    assert unicam._difference(activations, base, labels) < 1e-10
    assert "in float32" in case.notes()["ours"]


def test_distance_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import distance

    case = distance.scores(40, 16, 2)
    for call in case.variants.values():
        call()
    sides = {
        r: {"a": torch.randn(30, 8, dtype=torch.float64)} for r in ("student", "base", "teacher")
    }
    target = torch.arange(30) % 3
    dense = distance.dense_scores(sides, distance.label_embeddings(target))
    student, base, teacher = sides.values()
    (row,) = distance.fastxkd.layer_scores(student, base, target, teacher=teacher)
    assert dense[0] == pytest.approx(list(row[1:]), abs=1e-6)
    assert "differ from dense ones" in case.notes()["ours"]
    buffer = torch.empty(distance.TILE**2)
    x = torch.randn(distance.TILE + 3, 4)
    distance.symmetric_grams([x], buffer)
    torch.testing.assert_close(buffer[:9].view(3, 3), x[-3:] @ x[-3:].T)
    monkeypatch.setitem(sys.modules, "dcor", None)
    assert "dcor is not installed" in distance.pair(20, 6).notes()["ours"]


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "layercam", "gradcam++"])
def test_cam_operator_cases(method: str) -> None:
    from benchmarks import cam

    case = cam.operator((2, 5, 4, 4), method, with_compile=False)
    for call in case.variants.values():
        call()
    a, g = torch.rand(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    expected = torch.from_numpy(cam.in_numpy(a.numpy(), g.numpy(), method))
    torch.testing.assert_close(cam.fastxkd.cam_from(a, g, method), expected)
    assert "differ from float64 numpy" in case.notes()["ours"]


def test_cam_explainers_case() -> None:
    declare_operators()
    pytest.importorskip("pytorch_grad_cam")
    from benchmarks import cam

    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(6, 5),
    ).eval()
    case = cam.explainers(model, model[1], torch.rand(2, 3, 12, 12))
    for call in case.variants.values():
        call()
    off = [float(x) for x in re.findall(r"at most ([\d.e+-]+)", case.notes()["ours"])]
    assert len(off) == len(case.variants) - 2
    assert max(off) < 1e-5


def test_cam_component_case() -> None:
    declare_operators()
    pytest.importorskip("pytorch_grad_cam")
    from benchmarks import cam

    case = cam.component((2, 5, 4, 4))
    for call in case.variants.values():
        call()
    assert float(re.findall(r"at most ([\d.e+-]+)", case.notes()["ours"])[0]) < 1e-5


def test_missing_peer_is_a_skip_with_its_name() -> None:
    from benchmarks import cam

    with pytest.raises(_harness.Skip, match="needs no-such-package"):
        cam._imported("no_such_module", "no-such-package")


@pytest.mark.parametrize("name", NAMES)
def test_specs_have_distinct_names_and_tests_that_exist(name: str) -> None:
    module = __import__(f"benchmarks.{name}", fromlist=["_"])
    for quick in (True, False):
        names = [spec.name for spec in module.specs(quick)]
        assert names
        assert len(set(names)) == len(names)
    assert len(module.specs(True)) <= len(module.specs(False))
    for path in module.TESTS:
        assert (_machine.ROOT / path).is_file(), path
