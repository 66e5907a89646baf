"""What Alharbi, Vu and Thai (2021) claim, as questions to what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastxkd.runs.reproduce.claims import Claim, Part
from fastxkd.runs.reproduce.statistics import differences

NAME = "xdistillation"
# The student whose own map is a part of its loss as well.
HELD = "own map held"
_AGREEMENTS = ("cosine", "pearson", "ssim", "top_10")
# Plain distillation gains less than this: then it does not inherit explanations.
INHERITED = 0.05


def claims_of(seeds: Sequence[Mapping[str, float]]) -> list[Claim]:
    def of(name: str, what: str) -> list[float]:
        return [seed[f"{name}/{what}"] for seed in seeds]

    def gain(name: str, other: str, what: str, title: str = "", **more: Any) -> Part:
        return Part(title or what, differences(of(name, what), of(other, what)), **more)

    def level(name: str, what: str) -> Part:
        return Part(f"{what} of {name}", of(name, what), decides=False, level=True)

    note = "Similarity of Grad-CAM maps of the teacher's first choice, both models; top_10 is the "
    note += "overlap of the first tenth of the pixels. The paper's own measure is not known."
    found = [
        Claim(
            f"{NAME}.kd-inherits-no-explanations",
            "A student of plain distillation does not inherit the teacher's explanations.",
            "",
            "cosine with the teacher's maps, plain distillation - no teacher at all",
            [
                gain("kd", "scratch", "cosine", side="below", bound=INHERITED),
                level("kd", "cosine"),
                level("scratch", "cosine"),
            ],
            note=f"{note} “Not inherited” is read as a gain of less than {INHERITED:g}.",
        ),
        Claim(
            f"{NAME}.similarity",
            "The student that is shown explanations explains more like the teacher than that of "
            "plain distillation.",
            "",
            "similarity to the teacher's maps, shown explanations - plain distillation",
            [
                *(gain("xdistilled", "kd", what) for what in _AGREEMENTS),
                *(level(name, "cosine") for name in ("xdistilled", "kd")),
            ],
            note=note,
        ),
        Claim(
            f"{NAME}.autoencoder",
            "An autoencoder can approximate the teacher's explanations: what it draws is more like "
            "them than the maps of the student of plain distillation.",
            "",
            "cosine with the teacher's maps, the autoencoder's - plain distillation's Grad-CAM",
            [
                Part("difference", differences(of("xdistilled", "drawn"), of("kd", "cosine"))),
                level("xdistilled", "drawn"),
            ],
        ),
        Claim(
            f"{NAME}.accuracy",
            "It is more accurate than the student of plain distillation.",
            "",
            "accuracy, shown explanations - plain distillation",
            [
                gain("xdistilled", "kd", "accuracy"),
                *(level(name, "accuracy") for name in ("xdistilled", "kd", "scratch", "teacher")),
            ],
            unit="points",
            digits=2,
        ),
        Claim(
            f"{NAME}.accuracy-kept",
            "It costs no accuracy: at most half a point against plain distillation.",
            "",
            "accuracy, shown explanations - plain distillation",
            [gain("xdistilled", "kd", "accuracy", bound=-0.005)],
            note="Weaker than the paper's claim: what a user needs to know.",
            unit="points",
            digits=2,
        ),
        Claim(
            f"{NAME}.faithfulness",
            "Its explanations are more faithful to the teacher: the teacher's answer falls faster "
            "when the pixels they name are deleted, and rises faster when they are inserted.",
            "",
            "AUC on the teacher, shown explanations - plain distillation",
            [
                gain("xdistilled", "kd", "deletion", side="below"),
                gain("xdistilled", "kd", "insertion"),
            ],
        ),
        Claim(
            f"{NAME}.agreement",
            "It answers like the teacher more often than the student of plain distillation.",
            "",
            "share of images with the teacher's answer, shown explanations - plain distillation",
            [gain("xdistilled", "kd", "agreement")],
            unit="points",
            digits=2,
        ),
        Claim(
            f"{NAME}.ablations",
            "Each part of the method is needed: with the autoencoder frozen in the second stage, "
            "without the first stage, or without the autoencoder (plain distillation) explanations "
            "are less like the teacher's.",
            "",
            "cosine with the teacher's maps, the whole method - without a part",
            [
                gain("xdistilled", other, "cosine", title=f"without: {title}")
                for other, title in (
                    ("phi frozen", "training the autoencoder on"),
                    ("no first stage", "its first stage"),
                    ("kd", "the autoencoder"),
                )
            ],
            note="The paper's ablations are not known.",
        ),
    ]
    return [*found, *_held(gain, level)]


def _held(gain: Callable[..., Part], level: Callable[[str, str], Part]) -> list[Claim]:
    """The same two questions of a student whose own map is held to the teacher's."""
    note = "Not the paper's: beside all of it, e2KD's term (Parchami-Araghi et al. 2024)."
    return [
        Claim(
            f"{NAME}.held-similarity",
            "Where its own map is a part of the loss as well, the student explains more like the "
            "teacher than that of plain distillation.",
            "",
            "similarity to the teacher's maps, own map held - plain distillation",
            [*(gain(HELD, "kd", what) for what in _AGREEMENTS), level(HELD, "cosine")],
            note=note,
        ),
        Claim(
            f"{NAME}.held-accuracy-kept",
            "That costs no accuracy: at most half a point against plain distillation.",
            "",
            "accuracy, own map held - plain distillation",
            [gain(HELD, "kd", "accuracy", bound=-0.005), level(HELD, "accuracy")],
            note=note,
            unit="points",
            digits=2,
        ),
    ]
