"""What the teacher's guidance changed, in words no better than the numbers."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastxkd.pages.numbers import finite, number, percent, score

if TYPE_CHECKING:
    from fastxkd.runs.comparison import Comparison

Direction = Literal["up", "down", "even"]
# A mean cosine moves by this much when the explained images are others; less is not worth a word.
_COSINE_STEP = 0.02
_NATS_STEP = 0.01


@dataclass(frozen=True)
class Change:
    """One measure, from the base to the student."""

    key: str
    title: str
    meaning: str
    unit: Literal["points", "cosine", "nats"]
    values: dict[str, float | None]
    margin: float
    higher_is_better: bool = True

    @property
    def before(self) -> float | None:
        return self.values.get("base")

    @property
    def after(self) -> float | None:
        return self.values.get("student")

    @property
    def step(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def direction(self) -> Direction | None:
        if self.step is None:
            return None
        if abs(self.step) <= self.margin:
            return "even"
        return "up" if self.step > 0 else "down"

    @property
    def judgement(self) -> str:
        """``better``, ``worse``, or why it is neither."""
        if self.direction is None or self.step is None:
            return ""
        if self.direction == "even":
            if abs(self.step) < 5e-4:
                return "unchanged"
            return "within chance" if self.unit == "points" else "hardly changed"
        return "better" if (self.direction == "up") == self.higher_is_better else "worse"

    @property
    def step_text(self) -> str:
        if self.step is None:
            return ""
        if self.unit == "points":
            return f"{number(100 * self.step, 1, sign=True)} points"
        return number(self.step, 3, sign=True)


@dataclass(frozen=True)
class Verdict:
    """The headline, the sentences under it, and one reading of the layer scores."""

    headline: str
    sentences: list[str]
    layers: list[str]


def has_base(comparison: Comparison) -> bool:
    """Whether the base is a model that went without the teacher, not the teacher once more."""
    return not comparison.run.get("base")


def changes(comparison: Comparison) -> list[Change]:
    """Accuracy, agreement, explanation agreement and divergence, each base to student."""
    images = f"the {comparison.samples:,} image{'s' * (comparison.samples != 1)}"
    explained = comparison.run.get("explained_images")
    return [
        _shares(
            comparison,
            "accuracy",
            "Accuracy",
            f"Share of {images} it classifies right.",
        ),
        _shares(
            comparison,
            "agreement",
            "Agreement with the teacher",
            f"Share of {images} on which its first choice is the teacher’s.",
        ),
        Change(
            key="explanation_agreement",
            title="Explanation agreement",
            meaning="Mean cosine of its Grad-CAM maps with the teacher’s"
            + (f", over {explained:,} images" if explained else "")
            + ": 1 is the same map.",
            unit="cosine",
            values=_values(comparison, "explanation_agreement"),
            margin=_COSINE_STEP,
        ),
        Change(
            key="divergence",
            title="Divergence from the teacher",
            meaning="KL(teacher ‖ model) in nats: 0 is the same probabilities, lower is closer.",
            unit="nats",
            values=_values(comparison, "divergence"),
            margin=_NATS_STEP,
            higher_is_better=False,
        ),
    ]


def _shares(comparison: Comparison, key: str, title: str, meaning: str) -> Change:
    change = Change(key, title, meaning, "points", _values(comparison, key), margin=0.0)
    if change.before is None or change.after is None:
        return change
    margin = _chance(change.before, change.after, comparison.samples)
    return dataclasses.replace(change, margin=margin)


def of(comparison: Comparison) -> Verdict:
    """The verdict on ``comparison``."""
    found = {change.key: change for change in changes(comparison)}
    accuracy, agreement = found["accuracy"], found["agreement"]
    explanation = found["explanation_agreement"]
    teacher = accuracy.values.get("teacher")
    sentences = []
    if accuracy.step is not None:
        reach = "" if teacher is None else f"; the teacher itself reaches {percent(teacher)}"
        caveat = _caveat(accuracy, comparison.samples)
        sentences.append(f"Accuracy {_moved(accuracy)}{reach}{caveat}.")
    if agreement.step is not None:
        sentences.append(
            f"Agreement with the teacher {_moved(agreement)}"
            f"{_caveat(agreement, comparison.samples)}."
        )
    if explanation.step is not None:
        sentences.append(
            f"The mean cosine between its Grad-CAM maps and the teacher’s {_moved(explanation)}."
        )
    headline = _headline(accuracy, agreement, explanation)
    if not has_base(comparison):
        headline, sentences = _without_base(comparison, accuracy, agreement, explanation)
    return Verdict(headline, sentences, _layers(comparison))


def _without_base(
    comparison: Comparison, accuracy: Change, agreement: Change, explanation: Change
) -> tuple[str, list[str]]:
    sentences = []
    if accuracy.after is not None:
        sentences.append(f"The student’s accuracy is {percent(accuracy.after)}.")
        if (teacher := accuracy.values.get("teacher")) is not None:
            sentences.append(f"The teacher’s is {percent(teacher)}.")
    if explanation.after is not None:
        sentences.append(
            "The mean cosine between its Grad-CAM maps and the teacher’s is "
            f"{number(explanation.after, 3)}."
        )
    sentences.append(str(comparison.run["base"]))
    agrees = "an unknown share" if agreement.after is None else percent(agreement.after)
    return f"The student agrees with the teacher on {agrees} of the images", sentences


_PHRASES = {
    ("accuracy", "up"): "is more accurate",
    ("accuracy", "down"): "is less accurate",
    ("agreement", "up"): "agrees with the teacher more often",
    ("agreement", "down"): "agrees with the teacher less often",
    ("explanation_agreement", "up"): "looks more where the teacher looks",
    ("explanation_agreement", "down"): "looks less where the teacher looks",
}
_NOUNS = {
    "accuracy": "its accuracy",
    "agreement": "its agreement with the teacher",
    "explanation_agreement": "where it looks",
}


def _headline(*found: Change) -> str:
    known = [change for change in found if change.direction is not None]
    if not known:
        return "What the teacher’s guidance changed was not measured"
    moved = [change for change in known if change.direction != "even"]
    still = [_NOUNS[change.key] for change in known if change.direction == "even"]
    if not moved:
        return f"The teacher’s guidance made no clear difference to {_join(still)}"
    first = moved[0].direction
    groups = [
        _join([_PHRASES[c.key, c.direction] for c in moved if c.direction == direction])  # type: ignore[index]
        for direction in (first, "down" if first == "up" else "up")
    ]
    text = "With the teacher’s guidance the student " + ", but ".join(filter(None, groups))
    verb = "shows" if len(still) == 1 else "show"
    return text + (f"; {_join(still)} {verb} no clear difference" if still else "")


def _layers(comparison: Comparison) -> list[str]:
    sentences = []
    rows = [row for row in comparison.layers if finite(row.fss) is not None]
    if len(rows) > 1:
        least = min(rows, key=lambda row: row.fss)
        most = max(rows, key=lambda row: row.fss)
        sentences.append(
            f"Student and base differ most at {least.layer} (FSS {score(least.fss)}) "
            f"and least at {most.layer} (FSS {score(most.fss)})."
        )
    pairs = [
        row
        for row in comparison.layers
        if finite(row.rs_distilled) is not None and finite(row.rs_residual) is not None
    ]
    if pairs:
        gained = sum(row.rs_distilled > row.rs_residual for row in pairs)
        top = max(pairs, key=lambda row: row.rs_distilled)
        sentences.append(
            f"Distilled RS is above residual RS in {gained} of {len(pairs)} "
            f"layer{'s' * (len(pairs) != 1)}"
            + (": there, what only the student has says more about the labels" if gained else "")
            + (" than what only the base has." if gained else ".")
        )
        if len(pairs) > 1:
            sentences.append(f"Distilled RS is highest at {top.layer} ({score(top.rs_distilled)}).")
    return sentences


def _values(comparison: Comparison, key: str) -> dict[str, float | None]:
    return {
        model.role: finite(getattr(model, key))
        for model in comparison.models
        if model.role != "base" or has_base(comparison)
    }


def _chance(p: float, q: float, n: int) -> float:
    """Half the 95 % interval of ``q - p`` for two shares of ``n`` images (Agresti and Caffo).

    Both models see the same images, so the true interval is narrower: this errs on the side of
    not claiming a difference.
    """
    if n < 1:
        return math.inf
    variance = 0.0
    for share in (p, q):
        adjusted = (share * n + 1) / (n + 2)
        variance += adjusted * (1 - adjusted) / (n + 2)
    return 1.96 * math.sqrt(variance)


def _moved(change: Change) -> str:
    if change.before is None or change.after is None:
        return "was not measured"
    write = percent if change.unit == "points" else functools.partial(number, digits=3)
    before, after = write(change.before), write(change.after)
    if before == after:
        return f"is {after} without the teacher and with it"
    verb = "rose" if change.after > change.before else "fell"
    return f"{verb} from {before} without the teacher to {after} with it ({change.step_text})"


def _caveat(change: Change, samples: int) -> str:
    chance = change.direction == "even" and change.judgement != "unchanged"
    if not chance or not math.isfinite(change.margin):
        return ""
    points = f"{100 * change.margin:.1f}"
    return f"; with {samples:,} images a difference below about {points} points can be chance"


def _join(parts: list[str]) -> str:
    if len(parts) < 2:
        return "".join(parts)
    return ", ".join(parts[:-1]) + " and " + parts[-1]
