"""The report: nothing missing, nothing loaded, nothing executed that a user wrote."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from fastxkd.pages import charts, numbers
from fastxkd.runs import report, verdict
from fastxkd.runs.comparison import Comparison, GalleryItem, LayerRow, ModelSummary
from tests.conftest import needs

NAN = float("nan")


class Page(HTMLParser):
    """Elements with their attributes, and the text a reader sees."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag in ("script", "style"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if not self._open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


class Backend(NamedTuple):
    operator: str
    device: str
    dtype: str
    kernel: str
    reason: str


def item(height: int = 28, width: int = 28, label: str = "Sandal", **changes: Any) -> GalleryItem:
    rng = np.random.default_rng(height + width)
    maps = {key: rng.random((height, width), np.float32) for key in report.MAPS}
    fields = {
        "image": rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        "label": label,
        "predictions": {
            "teacher": (label, 0.971),
            "base": ("Bag", 0.412),
            "student": (label, 0.688),
        },
        "maps": maps,
        "similarity": {"base": 0.31, "student": 0.79, "distilled": 0.47, "residual": -0.13},
    }
    return GalleryItem(**{**fields, **changes})


def layer(name: str = "stage1", **changes: Any) -> LayerRow:
    fields = {
        "layer": name,
        "base_layer": name,
        "teacher_layer": f"{name}.deep",
        "fss": 0.8123,
        "fss_teacher": 0.6234,
        "rs_student": 0.1345,
        "rs_base": 0.0456,
        "rs_teacher": 0.2567,
        "rs_distilled": 0.0678,
        "rs_residual": -0.0089,
    }
    return LayerRow(**{**fields, **changes})


def models(**changes: dict[str, Any]) -> list[ModelSummary]:
    rows = {
        "teacher": ModelSummary("teacher", "builtin:large", 512_394, 0.902, 1.0, 0.0, 1.0),
        "base": ModelSummary("base", "builtin:small", 24_138, 0.806, 0.822, 0.412, 0.613),
        "student": ModelSummary("student", "builtin:small", 24_139, 0.868, 0.886, 0.205, 0.742),
    }
    return [dataclasses.replace(row, **changes.get(role, {})) for role, row in rows.items()]


def comparison(**changes: Any) -> Comparison:
    history = [
        {"epoch": 1, "loss": 1.2345, "accuracy": 0.611, "seconds": 7.91},
        {"epoch": 2, "loss": 0.9876, "accuracy": 0.722, "seconds": 75.0},
    ]
    fields = {
        "title": "Fashion-MNIST, large to small",
        "models": models(),
        "layers": [layer("stem"), layer("stage1", fss=0.5432, rs_distilled=0.0901)],
        "gallery": [item()],
        "classes": ["Sandal", "Bag"],
        "samples": 500,
        "history": dict.fromkeys(report.ROLES, history),
        "run": {
            "command": "fastxkd demo --seed 5",
            "versions": {"torch": "2.13.0", "python": "3.11.2"},
            "seed": 5,
            "device": "cpu",
            "threads": 2,
            "backends": [Backend("kd_loss", "cpu", "float32", "cpu avx512", "compiled")],
            "data": {"spec": "builtin", "notice": "Copyright (c) 2017 Zalando SE, MIT"},
            "elapsed": {"train": 61.2, "explain": 0.84},
            "skipped": [],
        },
    }
    return Comparison(**{**fields, **changes})


def draw(**changes: Any) -> Page:
    return Page(report.render_report(comparison(**changes)))


def test_the_file_is_there_and_complete(tmp_path: Path):
    path = report.write_report(comparison(), tmp_path / "new" / "report.html")
    assert path == tmp_path / "new" / "report.html"
    page = path.read_text("utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert page.rstrip().endswith("</html>")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_it_loads_nothing():
    text = report.render_report(comparison())
    page = Page(text)
    addresses = [
        value
        for _, attributes in page.elements
        for key, value in attributes.items()
        if key in ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
    ]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert set(re.findall(r"url\((?!data:image/png;base64,|#)", text)) == set()
    assert not re.search(r"https?://|@import|@font-face|<iframe|<object", text)
    policies = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert "default-src 'none'" in policies[0]


def test_the_script_is_the_one_its_policy_allows():
    import base64
    import hashlib

    text = report.render_report(comparison())
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    policy = next(m["content"] for m in Page(text).all("meta") if "http-equiv" in m)
    assert f"script-src 'sha256-{digest}'" in policy


def test_same_comparison_same_page():
    assert report.render_report(comparison()) == report.render_report(comparison())


def test_every_number_is_in_the_page():
    what = comparison()
    text = draw().text

    def pct(value: float) -> str:
        return f"{100 * value:.1f}\u202f%"

    wanted = [f"{what.samples} images"]
    for model in what.models:
        wanted += [model.spec, f"{model.parameters:,}", pct(model.accuracy), pct(model.agreement)]
        wanted += [f"{model.divergence:.3f}", f"{model.explanation_agreement:.3f}"]
    for row in what.layers:
        for field in dataclasses.fields(row):
            value = getattr(row, field.name)
            written = value if isinstance(value, str) else f"{value:.4f}"
            wanted.append(written.replace("-", "−"))
    for shown in what.gallery:
        wanted += [f"{value:.2f}".replace("-", "−") for value in shown.similarity.values()]
        wanted += [part for name, p in shown.predictions.values() for part in (name, pct(p))]
    wanted += ["1.2345", "0.9876", pct(0.611), pct(0.722), "7.91\u202fs", "1\u202fmin 15\u202fs"]
    wanted += ["fastxkd demo --seed 5", "2.13.0", "3.11.2", "cpu avx512", "compiled", "float32"]
    wanted += ["Zalando", "1\u202fmin 01\u202fs", "0.84\u202fs", "Every image was read"]
    assert [one for one in wanted if one not in text] == []


def test_pictures_are_there_with_words_for_them():
    page = draw()
    pictures = [a for a in page.all("img") if a["src"].startswith("data:image/png;base64,")]
    assert len(pictures) == 6
    assert all(picture["alt"] for picture in pictures)
    assert "Input image 1: Sandal" in [picture["alt"] for picture in pictures]
    assert sum("strongest at the" in picture["alt"] for picture in pictures) == 5
    assert page.text.count("✓ right") == 2
    assert page.text.count("✗ wrong") == 1


@pytest.mark.parametrize(
    ("row", "column", "where"),
    [(0, 0, "upper left"), (14, 14, "centre"), (27, 14, "lower centre"), (14, 27, "middle right")],
)
def test_alt_text_says_where(row: int, column: int, where: str):
    heat = np.zeros((28, 28), np.float32)
    heat[row, column] = 1.0
    alts = [a["alt"] for a in draw(**empty(gallery=[item(maps={"teacher": heat})])).all("img")]
    assert f"Grad-CAM of the teacher, image 1: strongest at the {where}" in alts


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"' onclick='x' {{ 7 * 7 }}"


def test_what_users_write_stays_text():
    run = dict(
        comparison().run,
        command=HOSTILE,
        versions={HOSTILE: HOSTILE},
        device=HOSTILE,
        backends=[{HOSTILE: HOSTILE, "kernel": HOSTILE}, Backend(*[HOSTILE] * 5)],
        data={"spec": HOSTILE, HOSTILE: HOSTILE},
        elapsed={HOSTILE: 1.0},
        skipped=[{"path": HOSTILE, "error": HOSTILE}],
        extra={HOSTILE: [HOSTILE]},
    )
    page = draw(
        title=HOSTILE,
        models=[dataclasses.replace(model, spec=HOSTILE) for model in models()],
        layers=[
            layer(HOSTILE, base_layer=HOSTILE + "b", teacher_layer=HOSTILE + "t"),
            layer("$x$"),
        ],
        gallery=[item(label=HOSTILE, predictions={"teacher": (HOSTILE, 0.5)})],
        classes=[HOSTILE],
        history={HOSTILE: [{"epoch": 1, HOSTILE: 1.0}], "student": [{"epoch": 1, "loss": 1.0}]},
        run=run,
    )
    assert len(page.all("script")) == 1
    assert not any(key.startswith("on") for _, a in page.elements for key in a)
    assert all(image["src"].startswith("data:image/png") for image in page.all("img"))
    assert page.text.count(HOSTILE) >= 15


def test_layer_names_in_charts_stay_text():
    page = report.render_report(
        comparison(layers=[layer("<b>&"), layer("$a_1$"), layer("#0a1b21")])
    )
    svg = re.findall(r"<svg.*?</svg>", page, re.DOTALL)[0]
    assert "&lt;b&gt;&amp;" in svg
    assert ">$a_1$<" in svg
    assert ">#0a1b21<" in svg


def empty(**changes: Any) -> dict[str, Any]:
    return {"layers": [], "gallery": [], "classes": [], "history": {}, "run": {}, **changes}


MISSING = {"accuracy": NAN, "agreement": NAN, "divergence": NAN, "explanation_agreement": NAN}
CASES: dict[str, dict[str, Any]] = {
    "nothing": empty(models=[], samples=0),
    "nothing measured": {"models": models(base=MISSING), "samples": 0},
    "none": {"models": [ModelSummary("student", "s", 1, *[None] * 4)]},  # type: ignore[arg-type]
    "all NaN": {"models": models(teacher=MISSING, base=MISSING, student=MISSING)},
    "infinite": {"models": models(student={"divergence": float("inf")})},
    "no base": {"models": [model for model in models() if model.role != "base"]},
    "no teacher": {"layers": [layer(teacher_layer=None, rs_teacher=None, fss_teacher=None)]},
    "NaN scores": {
        "layers": [layer(fss=NAN, fss_teacher=NAN, rs_student=NAN, rs_base=NAN, rs_teacher=NAN)]
    },
    "no score at all": {
        "layers": [layer(**{f.name: NAN for f in dataclasses.fields(LayerRow)[3:]})]
    },
    "one layer": {"layers": [layer()]},
    "16 layers": {"layers": [layer(f"features.denseblock{i}.conv2") for i in range(16)]},
    "layer in other letters": {"layers": [layer("слой"), layer("層")]},
    "one epoch": {"history": {"student": [{"epoch": 1, "loss": 0.5, "accuracy": NAN}]}},
    "NaN history": {"history": {"base": [{"epoch": 1, "loss": NAN, "accuracy": None}]}},
    "large": empty(gallery=[item(260, 260)]),
    "larger than shown": empty(gallery=[item(700, 900)]),
    "wide": empty(gallery=[item(20, 90)]),
    "tiny": empty(gallery=[item(1, 1)]),
    "map of another size": empty(gallery=[item(maps={"teacher": np.eye(7, dtype=np.float32)})]),
    "no maps": empty(gallery=[item(maps={}, similarity={}, predictions={})]),
    "no label": empty(gallery=[item(label="")]),
    "long names": empty(gallery=[item(label="word " * 60), item(label="x" * 300)]),
    "command as a list": {"run": {"command": ["fastxkd", "compare", "a b.pth"]}},
    "seconds as a number": {"run": {"elapsed": 12.5, "data": "builtin"}},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_edge_cases_render(changes: dict[str, Any]):
    page = draw(**changes)
    assert len(page.all("h1")) == 1
    assert {"accuracy", "layers", "gallery", "run"} <= {a.get("id") for _, a in page.elements}
    assert not re.search(r"\b(nan|None|inf|Undefined)\b", page.text)


def test_edge_cases_say_so():
    assert "No layer was scored" in draw(**empty()).text
    assert "No image was explained" in draw(**empty()).text
    assert "Every epoch" not in draw(**empty()).text
    assert "not measured" in draw(**CASES["all NaN"]).text
    assert "∞" in draw(**CASES["infinite"]).text
    assert "RS teacher" not in str(draw(**CASES["no teacher"]).elements)
    assert "fastxkd compare 'a b.pth'" in draw(**CASES["command as a list"]).text
    assert "no map" in draw(**CASES["no maps"]).text


def test_flat_and_broken_maps_are_named():
    flat = np.full((28, 28), 0.5, np.float32)
    page = draw(**empty(gallery=[item(maps={"teacher": flat, "base": flat * NAN})]))
    assert "flat map: no place stands out" in page.text
    assert "its values are not finite" in page.text
    assert "Grad-CAM of the teacher, image 1: flat" in [a["alt"] for a in page.all("img")]
    partly = flat.copy()
    partly[0, 0] = NAN
    assert len(draw(**empty(gallery=[item(maps={"teacher": partly})])).all("img")) == 2


def test_how_it_was_measured():
    run = {
        "features": {
            "what": "flattened",
            "limit": 16384,
            "shapes": {"student": {"stem": [8, 7, 7]}},
        },
        "score_samples": 1000,
        "explained_images": 128,
        "explained_class": "the teacher's top-1",
        "explained_layers": {"student": "stage3"},
        "accuracy_defined": False,
        "deterministic": True,
    }
    page = draw(**empty(gallery=[item()], layers=[layer()], run=run))
    for text in ("stem: 8 × 7 × 7", "16,384", "student: stage3", "one class: the teacher's top-1"):
        assert text in page.text
    assert "Scored on 1,000 images" in page.text
    assert "over 128 images" in page.text
    assert re.search(r"deterministic\s*yes", page.text)
    # The models' classes are not the data's: their names cannot be right or wrong.
    assert not re.search("✓|✗", page.text)


def test_skipped_images_are_listed():
    skipped = [{"path": f"bad{i}.png", "error": "truncated"} for i in range(205)]
    text = draw(**empty(run={"skipped": skipped})).text
    assert "205 images were skipped" in text
    assert "bad199.png" in text
    assert "bad200.png" not in text
    assert "and 5 more" in text
    assert "1 image was skipped" in draw(**empty(run={"skipped": skipped[:1]})).text


def test_file_names_outside_unicode(tmp_path: Path):
    run = {"skipped": [{"path": "caf\udce9.png", "error": "unreadable"}]}
    page = report.write_report(comparison(run=run), tmp_path / "r.html").read_text("utf-8")
    assert r"caf\udce9.png" in page


def test_small_pictures_keep_their_pixels():
    def classes(**changes: Any) -> str:
        return next(a["class"] for a in draw(**changes).all("article") if "item" in a["class"])

    assert "pixels" in classes(**empty(gallery=[item()]))
    assert "pixels" not in classes(**empty(gallery=[item(260, 260)]))


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_report(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(*(os, "fsync", fail) if fails == "fsync" else (Path, "replace", fail))
    with pytest.raises(OSError, match="no space left"):
        report.write_report(comparison(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_no_file(tmp_path: Path):
    with pytest.raises(ValueError, match=r"path: expected a file such as report\.html"):
        report.write_report(comparison(), tmp_path)


@pytest.mark.parametrize("module", ["jinja2", "matplotlib", "PIL"])
def test_a_missing_extra_is_named(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [*sys.modules]:
        if name.partition(".")[0] == module:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"'{module}'.*fastxkd\[report\]"):
        report.write_report(comparison(), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_headline_gains():
    said = verdict.of(comparison())
    assert said.headline == (
        "With the teacher’s guidance the student is more accurate, agrees with the teacher more "
        "often and looks more where the teacher looks"
    )
    assert said.sentences[0] == (
        "Accuracy rose from 80.6\u202f% without the teacher to 86.8\u202f% with it (+6.2 points); "
        "the teacher itself reaches 90.2\u202f%."
    )
    assert len(said.sentences) == 3


def test_headline_losses():
    worse = {"accuracy": 0.7, "agreement": 0.6, "explanation_agreement": 0.4}
    assert verdict.of(comparison(models=models(student={"accuracy": 0.7}))).headline == (
        "With the teacher’s guidance the student is less accurate, but agrees with the teacher "
        "more often and looks more where the teacher looks"
    )
    assert verdict.of(comparison(models=models(student=worse))).headline == (
        "With the teacher’s guidance the student is less accurate, agrees with the teacher less "
        "often and looks less where the teacher looks"
    )


def test_a_difference_within_chance_is_called_that():
    # Agresti and Caffo: 1.96 sqrt(0.7879 * 0.2121 / 66 + 0.8030 * 0.1970 / 66) = 0.1376.
    close = models(base={"accuracy": 51 / 64}, student={"accuracy": 52 / 64, "agreement": 0.99})
    found = verdict.changes(comparison(models=close, samples=64))[0]
    assert found.margin == pytest.approx(0.1376, abs=2e-4)
    assert found.direction == "even"
    assert found.judgement == "within chance"
    said = verdict.of(comparison(models=close, samples=64))
    assert said.headline.endswith("; its accuracy shows no clear difference")
    assert "with 64 images a difference below about 13.8 points can be chance" in said.sentences[0]
    big = verdict.changes(comparison(models=close, samples=64_000))[0]
    assert big.judgement == "better"


def test_no_difference_and_no_measurement():
    same = models(student=dataclasses.asdict(models()[1]) | {"role": "student"})
    said = verdict.of(comparison(models=same))
    assert said.headline == (
        "The teacher’s guidance made no clear difference to its accuracy, its agreement with the "
        "teacher and where it looks"
    )
    assert verdict.changes(comparison(models=same))[0].judgement == "unchanged"
    assert "is 80.6\u202f% without the teacher and with it" in said.sentences[0]
    unknown = verdict.of(comparison(models=[]))
    assert unknown.headline == "What the teacher’s guidance changed was not measured"


def test_without_a_base_nothing_is_credited_to_guidance():
    run = {"base": "No base was given, so the teacher serves as base."}
    same = models(base=dataclasses.asdict(models()[0]) | {"role": "base"})
    said = verdict.of(comparison(models=same, run=run))
    assert said.headline == "The student agrees with the teacher on 88.6\u202f% of the images"
    assert said.sentences[0] == "The student’s accuracy is 86.8\u202f%."
    assert said.sentences[-1] == run["base"]
    page = draw(**empty(models=same, run=run)).text
    assert page.count("no base to compare with") == 4
    assert not re.search("guidance|better|worse|▲|▼", page)


def test_lower_divergence_is_better():
    found = verdict.changes(comparison())[-1]
    assert (found.step_text, found.judgement) == ("−0.207", "better")
    assert "▲ better" in draw().text


def test_layer_sentences():
    said = verdict.of(comparison()).layers
    assert said[0] == (
        "Student and base differ most at stage1 (FSS 0.5432) and least at stem (FSS 0.8123)."
    )
    assert "in 2 of 2 layers" in said[1]
    assert said[2] == "Distilled RS is highest at stage1 (0.0901)."
    lost = layer(rs_distilled=-0.01, rs_residual=0.02)
    assert verdict.of(comparison(layers=[lost])).layers == [
        "Distilled RS is above residual RS in 0 of 1 layer."
    ]


def test_charts_take_their_colours_from_the_page():
    matplotlib = needs("matplotlib")
    before = dict(matplotlib.rcParams)
    series = [
        charts.Series("base", "base", [0.1, None, 0.3]),
        charts.Series("student", "student", [0.2, NAN, 0.4]),
    ]
    first = charts.lines("one", [1, 2, 3], series, xlabel="layer")
    assert first == charts.lines("one", [1, 2, 3], series, xlabel="layer")
    assert dict(matplotlib.rcParams) == before
    for name in ("ink", "muted", "line", "base", "student"):
        assert f"var(--{name})" in first
    assert not re.search(r"#[0-9a-f]{6}\b(?!\")", re.sub(r'(href|id)="[^"]*"', "", first))
    assert not re.search("<style|<metadata|<!--|http|DOCTYPE", first)
    second = charts.bars("two", [1, 2, 3], series, xlabel="layer")
    ids = re.findall(r'id="([^"]*)"', first + second)
    assert len(ids) == len(set(ids)) > 0
    assert charts.lines("none", [1], [charts.Series("a", "base", [None])], xlabel="x") == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.8449, "0.84 s"),
        (12.34, "12.3 s"),
        (59.96, "1 min 00 s"),
        (3725, "1 h 02 min"),
        (NAN, "–"),
    ],
)
def test_seconds(value: float, text: str):
    assert numbers.seconds(value).replace("\u202f", " ") == text


def test_numbers():
    assert numbers.number(-0.001) == "0.00"
    assert numbers.number(-0.5) == "−0.50"
    assert numbers.number(0.5, sign=True) == "+0.50"
    assert numbers.number(None) == numbers.percent(NAN) == "–"
    assert numbers.number(float("-inf")) == "−∞"
    assert numbers.percent(0.842) == "84.2\u202f%"
    assert numbers.percent(np.float32(1.0)) == "100.0\u202f%"
