"""The frame of `fastxkd reproduce`: intervals, verdicts, the ledger, tables, what is refused."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from fastxkd import cli
from fastxkd.runs.reproduce import run
from fastxkd.runs.reproduce.claims import FAILS, HOLDS, OPEN, Claim, Part
from fastxkd.runs.reproduce.ledger import Ledger
from fastxkd.runs.reproduce.page import render_page
from fastxkd.runs.reproduce.statistics import interval, slope, t_quantile, t_within
from fastxkd.runs.reproduce.table import Outcome, escaped, to_json, to_markdown, to_text
from fastxkd.runs.reproduce.tasks import Context, Measurement, Training, work_through
from fastxkd.runs.reproduce.watch import Watch
from tests.conftest import needs


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 29, 100, 301])
def test_student_t_against_scipy(freedom):
    stats = needs("scipy.stats")
    for t in (0.01, 0.5, 1.0, 2.2, 7.0, 40.0):
        inside = stats.t.cdf(t, freedom) - stats.t.cdf(-t, freedom)
        assert t_within(t, freedom) == pytest.approx(inside, abs=1e-12)
    for confidence in (0.5, 0.9, 0.95, 0.9875, 0.999):
        wanted = stats.t.ppf((1 + confidence) / 2, freedom)
        assert t_quantile(confidence, freedom) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("count", [2, 3, 5, 12])
def test_intervals_against_scipy(count):
    stats = needs("scipy.stats")
    values = [random.Random(count).gauss(3, 2) for _ in range(count)]
    found = interval(values, 0.9)
    half = stats.t.ppf(0.95, count - 1) * stats.sem(values)
    mean = sum(values) / count
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half), rel=1e-9)
    assert found.mean == pytest.approx(sum(values) / count)


def test_paired_intervals_are_those_of_a_paired_test():
    stats = needs("scipy.stats")
    draw = random.Random(1).gauss
    first = [draw(0, 1) for _ in range(6)]
    second = [value + draw(0.3, 0.1) for value in first]
    found = interval([b - a for a, b in zip(first, second, strict=True)])
    wanted = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-9)


def test_intervals_that_say_nothing():
    assert math.isnan(interval([]).mean)
    assert interval([2.0]).mean == 2
    assert math.isnan(interval([2.0]).low)
    assert all(map(math.isnan, interval([1.0, math.nan, 2.0])))
    assert interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"confidence: .* got 1.5"):
        t_quantile(1.5, 3)
    with pytest.raises(ValueError, match=r"freedom: .* got 0"):
        t_quantile(0.95, 0)
    with pytest.raises(ValueError, match="at: expected at least two places"):
        slope([1, 1], [0, 1])
    assert slope([1, 2, 3, 4], [0, 3, 1, 4]) == pytest.approx(1.0)


def claim(*parts: Part, **more: object) -> Claim:
    given = {
        "id": "unicam.x", "statement": "It is so.", "paper": "1 > 0", "measured": "a - b", **more
    }  # fmt: skip
    return Claim(parts=parts, **given)


UP, DOWN, NOISE = (0.9, 1.0, 1.1), (-0.9, -1.0, -1.1), (-1.0, 0.1, 1.0)


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ([Part("a", UP)], HOLDS),
        ([Part("a", DOWN)], FAILS),
        ([Part("a", NOISE)], OPEN),
        ([Part("a", DOWN, "below")], HOLDS),
        ([Part("a", UP, "below")], FAILS),
        ([Part("a", UP, bound=0.5)], HOLDS),
        ([Part("a", UP, bound=1.0)], OPEN),
        ([Part("a", UP, bound=2.0)], FAILS),
        # A claim about all of them needs all of them.
        ([Part("a", UP), Part("b", UP)], HOLDS),
        ([Part("a", UP), Part("b", NOISE)], OPEN),
        ([Part("a", UP), Part("b", DOWN)], FAILS),
        ([Part("a", NOISE), Part("b", DOWN)], FAILS),
        # What is only shown decides nothing.
        ([Part("a", UP), Part("b", DOWN, decides=False)], HOLDS),
        ([Part("b", UP, decides=False, level=True)], OPEN),
        # One seed, or a number that is none, decides nothing.
        ([Part("a", (1.0,))], OPEN),
        ([Part("a", (1.0, math.nan, 1.0))], OPEN),
        ([Part("a", UP), Part("b", (math.nan,) * 3)], OPEN),
    ],
)
def test_the_rule_decides(parts, verdict):
    assert claim(*parts).verdict() == verdict
    assert claim(*parts).to_json()["verdict"] == verdict


def test_many_parts_do_not_make_a_failure_by_chance():
    stats = needs("scipy.stats")
    values = (-1.0, -0.8, -1.2)
    alone = stats.ttest_1samp(values, 0).confidence_interval(0.95).high
    joint = stats.ttest_1samp(values, 0).confidence_interval(1 - 0.05 / 4).high
    assert alone < 0 < joint
    assert claim(Part("a", values)).verdict() == FAILS
    assert claim(Part("a", values), *(Part(n, NOISE) for n in "bcd")).verdict() == OPEN


def test_the_rule_in_words_names_what_decides():
    assert claim(Part("a", UP, bound=0.5)).rule() == (
        "holds if the 95 % interval lies above 0.5; does not hold if it lies below"
    )
    text = claim(Part("a", UP, bound=-0.005), unit="points").rule()
    assert "above -0.5 points" in text
    with pytest.raises(ValueError, match="level: a is shown"):
        Part("a", UP, level=True)
    text = claim(Part("a", UP), Part("b", DOWN, "below")).rule()
    assert "each of the 2" in text
    assert "above 0 or below 0" in text


STRANGE = claim(
    Part("<b>|*stage*", UP),
    Part("level", UP, decides=False, level=True),
    id="unicam.strange",
    statement="a | b <script>alert(1)</script> [x](y) `code` $z$",
    paper="R2 < 3 & more|less",
    measured="x_y \\ z",
    note="two\nlines",
)
SETTINGS = {"quick": True, "seeds": [0, 1, 2], "studies": ["unicam"], "notices": ["Fashion|MNIST"]}


def test_tables_are_escaped():
    text = to_markdown(Outcome([STRANGE], SETTINGS, {}))
    (row,) = [line for line in text.splitlines() if "unicam.strange" in line]
    cells = row.replace("\\|", "").split("|")
    assert len(cells) == 6, "four cells, whatever stands in them"
    assert "<script>" not in row
    assert "&lt;script&gt;" in row
    assert "\\[x\\](y)" in row
    assert "x\\_y \\\\ z" in row
    assert "two lines" in row
    assert "**holds**" in row
    assert "Fashion\\|MNIST" in text
    assert escaped("\x1b[2J") == "\\\\x1b\\[2J"


def test_the_page_is_escaped_and_complete():
    needs("jinja2")
    page = render_page(Outcome([STRANGE, claim(Part("a", NOISE))], SETTINGS, {"device": "<cpu>"}))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "&lt;cpu&gt;" in page
    assert "+1.000" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count('<article class="card claim"') == 2
    assert "1 holds, 0 do not, 1 is not decided" in page


def test_the_text_says_claims_one_by_one():
    text = to_text(Outcome([STRANGE, claim(Part("a", DOWN))], SETTINGS, {}))
    assert "unicam.strange: HOLDS" in text
    assert "unicam.x: DOES NOT HOLD" in text
    assert "    a: -1.000 [-1.248, -0.752]" in text
    assert "\x1b" not in text


def test_json_has_no_number_that_is_none():
    broken = claim(Part("a", (1.0, math.nan)))
    content = json.loads(to_json(Outcome([broken], SETTINGS, {"work": 1.0})))
    assert content["claims"][0]["parts"][0]["values"] == [1.0, None]
    assert content["claims"][0]["parts"][0]["interval"] == [None, None]
    assert content["verdicts"] == {HOLDS: 0, FAILS: 0, OPEN: 1}
    assert "facts" not in content, "times would make two runs differ"


def test_the_ledger_knows_what_was_done_and_from_what(tmp_path):
    needs("safetensors")
    model = torch.nn.Linear(2, 2)
    with Ledger(tmp_path / "out", {"a": 1}) as ledger:
        stamp = ledger.save("s/0/m", model)
        ledger.record("s/0/m", "s/m", {"lr": 1}, 2.0, file=stamp, fingerprint="f")
        ledger.record("s/0/v", "s/v", {"x": 1}, 1.0, values={"v": 0.1})
        assert not ledger.known("s/0/other", {})
    with Ledger(tmp_path / "out", {"a": 1}) as ledger:
        assert ledger.known("s/0/v", {"x": 1})["values"] == {"v": 0.1}
        assert ledger.known("s/0/v", {"x": 2}) is None
        assert ledger.known("s/0/m", {"lr": 1})["fingerprint"] == "f"
        assert ledger.seconds() == {"s/m": [2.0], "s/v": [1.0]}
        loaded = ledger.load("s/0/m", torch.nn.Linear(2, 2))
        assert torch.equal(loaded.weight, model.weight)
        assert not loaded.training
        # A model whose file is not what it was does not count; one without may not be needed.
        file = ledger.model_file("s/0/m")
        file.write_bytes(file.read_bytes()[:-1])
        assert ledger.known("s/0/m", {"lr": 1}) is None
        file.unlink()
        assert ledger.known("s/0/m", {"lr": 1})


def test_a_line_that_was_cut_short_does_not_count(tmp_path):
    with Ledger(tmp_path, {}) as ledger:
        ledger.record("a", "k", {}, 1.0, values={})
    (file,) = (tmp_path / "journal").iterdir()
    with file.open("ab") as journal:
        journal.write(b'{"key": "b", "facts"')
    with Ledger(tmp_path, {}) as ledger:
        assert ledger.last("a")
        assert not ledger.last("b")
        ledger.record("b", "k", {}, 1.0, values={})
    with Ledger(tmp_path, {}) as ledger:
        assert ledger.last("b")
    with file.open("ab") as journal:
        journal.write(b": 1]\n")
    with pytest.raises(ValueError, match=r"0001\.jsonl: line 2 is damaged"):
        Ledger(tmp_path, {})


@pytest.mark.parametrize(
    "changed", [{"key": None}, {"seconds": "2"}, {"values": [1.0]}, {"values": None}]
)
def test_a_line_that_is_none_of_ours_is_named(tmp_path, changed):
    with Ledger(tmp_path, {}) as ledger:
        ledger.record("a", "k", {}, 1.0, values={})
    (file,) = (tmp_path / "journal").iterdir()
    entry = json.loads(file.read_text()) | changed
    entry = {name: value for name, value in entry.items() if value is not None}
    file.write_text(f"{json.dumps(entry)}\n")
    with pytest.raises(ValueError, match=r"0001\.jsonl: line 1 is damaged .*; remove the line"):
        Ledger(tmp_path, {})


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b'{"reproduce": [1]}', b'{"reproduce": null}']
)
def test_a_mark_that_is_none_of_ours_is_named(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"out: .*run\.json is no reproduction's"):
        Ledger(tmp_path, {})


def test_the_ledger_refuses_strangers_others_and_other_settings(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"is not empty .*thesis.txt"):
        Ledger(tmp_path / "thesis", {})
    with (
        Ledger(tmp_path / "out", {"quick": True}),
        pytest.raises(ValueError, match="another run"),
    ):
        Ledger(tmp_path / "out", {"quick": True})
    with pytest.raises(ValueError, match="quick was True, now False"):
        Ledger(tmp_path / "out", {"quick": False})
    (tmp_path / "out" / "run.json").write_text('{"settings": {}}')
    with pytest.raises(ValueError, match="is no reproduction's"):
        Ledger(tmp_path / "out", {"quick": True})


def measured(key: str, values: list[str], **facts: object) -> Measurement:
    def measure(models, context):
        values.append(key)
        return {"x": float(len(values)), "none": math.nan}

    return Measurement(f"s/{key}", "s/m", facts, [], measure, 1.0)


def test_work_is_done_once_unless_its_facts_change(tmp_path):
    calls: list[str] = []
    for again in range(2):
        lines: list[str] = []
        with Ledger(tmp_path, {}) as ledger:
            context = Context(torch.device("cpu"), Watch(lines.append), ledger)
            found = work_through([measured("a", calls), measured("b", calls)], context)
        assert calls == ["a", "b"]
        assert found["s/b"]["x"] == 2
        assert math.isnan(found["s/b"]["none"])
        assert ("2 of them done before" in lines[0]) == bool(again)
    with Ledger(tmp_path, {}) as ledger:
        context = Context(torch.device("cpu"), Watch.silent(), ledger)
        work_through([measured("a", calls, lr=2), measured("b", calls)], context)
        lines = []
        context = Context(torch.device("cpu"), Watch(lines.append), ledger)
        work_through([measured("a", calls, lr=3), measured("b", calls)], context)
    assert calls == ["a", "b", "a", "a"]
    assert "plan: 2 pieces of work, 1 of them done before" in lines[0]
    assert "  1 x s/m" in lines[1]


def test_what_was_made_from_other_weights_is_made_again(tmp_path):
    needs("safetensors")
    trained: list[str] = []
    weight = 1.0

    class Fitted:
        def __init__(self, name: str, model: torch.nn.Linear, teacher: torch.nn.Linear | None):
            self.name, self.model, self.teacher = name, model, teacher

        def fit(self):
            trained.append(self.name)
            source = weight if self.teacher is None else self.teacher.weight.item() + 1
            torch.nn.init.constant_(self.model.weight, source)
            return [{"seconds": 0.0, "loss": 0.0}]

    def training(name: str, *teachers: str) -> Training:
        return Training(
            f"s/{name}",
            f"s/{name}",
            {},
            [f"s/{teacher}" for teacher in teachers],
            lambda: torch.nn.Linear(1, 1, bias=False),
            lambda model, models, context: Fitted(name, model, *models or [None]),  # type: ignore
        )

    def taken(models, context):
        return {"weight": models[0].weight.item()}

    def done() -> float:
        trained.clear()
        tasks = [
            training("teacher"),
            training("student", "teacher"),
            Measurement("s/v", "s/v", {}, ["s/student"], taken),
            Measurement("s/w", "s/w", {}, ["s/teacher"], taken),
        ]
        with Ledger(tmp_path, {}) as ledger:
            context = Context(torch.device("cpu"), Watch.silent(), ledger)
            return work_through(tasks, context)["s/v"]["weight"]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fastxkd.runs.reproduce.tasks.costs", lambda *_: {})
        assert done() == 2
        assert trained == ["teacher", "student"]
        models = tmp_path / "models" / "s"
        (models / "teacher.safetensors").unlink()
        assert done() == 2
        assert trained == [], "nothing is to be made from the teacher"
        (models / "student.safetensors").write_bytes(b"cut")
        assert done() == 2
        assert trained == ["teacher", "student"]
        weight = 5.0
        (models / "teacher.safetensors").write_bytes(b"cut")
        assert done() == 6
        assert trained == ["teacher", "student"]


def test_the_time_left_comes_from_what_was_measured():
    now = [0.0]
    lines: list[str] = []
    watch = Watch(lines.append, clock=lambda: now[0])
    tasks = [measured(str(i), []) for i in range(4)]
    watch.plan(tasks, tasks, {"s/m": 10.0})
    assert "about 40.0\u202fs on this machine" in lines[0]
    watch.begin("s/0", "s/m")
    assert lines[-1] == "[1/4] s/0  about 40.0\u202fs left"
    watch.start("s/0", 100, 0)
    now[0] = 11.0
    for _ in range(50):
        watch.step(0, 0.5)
    assert lines[-1] == "  s/0: 1 %  loss 0.500  about 39.9\u202fs left"
    watch.end(30.0)
    watch.begin("s/1", "s/m")
    assert lines[-1] == "[2/4] s/1  about 1\u202fmin 30\u202fs left"


def test_data_is_the_full_set_or_what_was_agreed_to(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTXKD_FASHION_MNIST", str(tmp_path))
    with pytest.raises(ValueError, match="agree to the built-in subset with --data builtin"):
        run.choose_data(None, quick=False)
    spec, remark = run.choose_data(None, quick=True)
    assert spec == "builtin"
    assert "because the full set is not in" in remark
    spec, remark = run.choose_data("builtin", quick=False)
    assert "as asked for" in remark
    (tmp_path / "train-images-idx3-ubyte.gz").touch()
    assert run.choose_data(None, quick=True) == ("fashion-mnist", "")
    assert run.choose_data(None, quick=False) == ("fashion-mnist", "")


@pytest.mark.parametrize("quick", [True, False])
def test_pictures_alone_leave_the_folder_to_other_studies(tmp_path, monkeypatch, quick):
    """Where the full set is missing, with --quick all studies take the same."""
    marked = []

    def noted(*arguments, settings, remark, **rest):
        marked.append((settings["data"], remark))

    monkeypatch.setenv("FASTXKD_FASHION_MNIST", str(tmp_path))
    monkeypatch.setattr(run, "run_studies", noted)
    monkeypatch.setattr(run, "_study", lambda *arguments: None)
    for module in ("safetensors", "jinja2"):
        needs(module)
    run.reproduce("interpretability", tmp_path / "out", quick=quick)
    assert marked == [("builtin" if quick else "fashion-mnist", "")]
    if quick:
        run.reproduce("unicam", tmp_path / "out", quick=True)
        assert marked[1][0] == marked[0][0]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["vision"], "study: expected unicam, interpretability, xdistillation or all, got 'vision"),
        (["unicam", "--seeds", "0"], "seeds: expected at least 1, got 0"),
        (["unicam", "--device", "cuda:77"], "device: 'cuda:77' cannot be used here"),
        (["unicam", "--data", "cifar"], "data: expected 'builtin'"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, capsys, words, text):
    for module in ("typer", "rich"):
        needs(module)
    assert cli.main(["reproduce", *words, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastxkd: error: ")
    assert text in captured.err
    assert not (tmp_path / "out").exists()
