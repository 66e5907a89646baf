"""What Han, Kim, Choi and Yoon (2023) claim, as questions to what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastxkd.runs.reproduce.claims import Claim, Part
from fastxkd.runs.reproduce.statistics import differences, slope

NAME = "interpretability"


def smoothed_at(temperature: float) -> str:
    """The student of the teacher of smoothed labels, at a temperature."""
    return f"smoothed-kd-{temperature:g}"


def detectors_from(iou: float) -> str:
    """What is counted with another threshold than the one that decides."""
    return f"detectors from {iou:g}"


def claims_of(
    seeds: Sequence[Mapping[str, float]],
    temperatures: Sequence[float],
    width: int,
    iou_thresholds: Sequence[float],
) -> list[Claim]:
    """Detectors are counted from the first of the thresholds on; the others are shown."""

    def of(name: str, what: str) -> list[float]:
        return [seed[f"{name}/{what}"] for seed in seeds]

    def gain(name: str, what: str, other: str = "scratch", **more: Any) -> Part:
        return Part(f"{name} - {other}", differences(of(name, what), of(other, what)), **more)

    def level(name: str, what: str) -> Part:
        return Part(f"{what} of {name}", of(name, what), decides=False, level=True)

    def over_temperatures(what: str) -> list[float]:
        at = [math.log2(t) for t in temperatures]
        columns = [of(smoothed_at(t), what) for t in temperatures]
        return [slope(at, values) for values in zip(*columns, strict=True)]

    def counts(name: str, other: str = "scratch", **more: Any) -> list[Part]:
        """The difference that decides, and what it is with other thresholds."""
        found = [gain(name, "detectors", other, **more)]
        for least in iou_thresholds[1:]:
            what = detectors_from(least)
            values = differences(of(name, what), of(other, what))
            found.append(Part(f"from an IoU of {least:g} on", values, decides=False))
        return found

    def rest(name: str) -> list[float]:
        """Detectors of anything but objects."""
        return differences(of(name, "detectors"), of(name, "object"))

    units = (
        f"Of {width} units of a small network, from an IoU of {iou_thresholds[0]:g} on, in "
        "composed pictures; the paper: of 512 units of a ResNet-18, from 0.05 on, in Broden."
    )
    counted: dict[str, Any] = {"note": units, "digits": 1}
    object_gain = differences(of("kd", "object"), of("scratch", "object"))
    rest_gain = differences(rest("kd"), rest("scratch"))
    return [
        Claim(
            f"{NAME}.accuracy",
            "Distillation of every kind (logits, attention, from itself) makes the student more "
            "accurate.",
            "ImageNet: KD 70.80, scratch 69.94",
            "accuracy, distilled - scratch",
            [
                *(gain(name, "accuracy") for name in ("kd", "attention", "self")),
                *(level(name, "accuracy") for name in ("scratch", "teacher")),
            ],
            note="FT, CRD and SSKD, which the paper has as well, are not in this library.",
            unit="points",
            digits=2,
        ),
        Claim(
            f"{NAME}.kd-detectors",
            "Distillation of logits makes more units detect a concept.",
            "KD 312, scratch 275",
            "concept detectors, KD - scratch",
            [*counts("kd"), *(level(n, "detectors") for n in ("scratch", "kd"))],
            **counted,
        ),
        Claim(
            f"{NAME}.attention-detectors",
            "So does attention transfer, and with it other distillation of features.",
            "",
            "concept detectors, attention transfer - scratch",
            [*counts("attention"), level("attention", "detectors")],
            **counted,
        ),
        Claim(
            f"{NAME}.logits-add-detectors",
            "Logits added to the distillation of features make more detectors still.",
            "",
            "concept detectors, attention and logits - attention alone",
            counts("attention-kd", "attention"),
            **counted,
        ),
        Claim(
            f"{NAME}.self-detectors",
            "Self-distillation makes more detectors as well: it is not the teacher's capacity.",
            "",
            "concept detectors, taught by itself - scratch",
            [*counts("self"), level("self", "detectors")],
            **counted,
        ),
        Claim(
            f"{NAME}.kd-objects",
            "What distillation adds are mostly detectors of objects.",
            "",
            "detectors gained, KD - scratch: of objects, and of these - of all the rest",
            [
                # Without a gain nothing is mostly of objects, whatever else is lost.
                Part("objects gained", object_gain),
                Part("objects - others", differences(object_gain, rest_gain)),
                Part("others gained", rest_gain, decides=False),
            ],
            **counted,
        ),
        Claim(
            f"{NAME}.smoothing-accuracy",
            "Smoothed labels make the network more accurate.",
            "70.13, scratch 69.94",
            "accuracy, smoothed labels - scratch",
            [gain("smoothed", "accuracy")],
            unit="points",
            digits=2,
        ),
        Claim(
            f"{NAME}.smoothing-detectors",
            "Smoothed labels leave fewer detectors.",
            "219, scratch 275",
            "concept detectors, smoothed labels - scratch",
            [*counts("smoothed", side="below"), level("smoothed", "detectors")],
            **counted,
        ),
        Claim(
            f"{NAME}.smoothing-objects",
            "Smoothed labels leave fewer detectors of objects and more of scenes.",
            "",
            "detectors, smoothed labels - scratch",
            [
                Part(
                    "objects",
                    differences(of("smoothed", "object"), of("scratch", "object")),
                    "below",
                ),
                Part("textures", differences(of("smoothed", "texture"), of("scratch", "texture"))),
            ],
            note=f"The backgrounds' textures stand for scenes; hardly a unit detects one. {units}",
            digits=1,
        ),
        Claim(
            f"{NAME}.smoothing-entropy",
            "Smoothed labels take away what a model says about similar classes: the entropy of its "
            "answers within the group of the true class is lower.",
            "2.6040, scratch 2.8986",
            "mean entropy within the group (nats), smoothed labels - scratch",
            [
                gain("smoothed", "entropy", side="below"),
                *(level(name, "entropy") for name in ("scratch", "smoothed")),
            ],
            note="Groups: animals, plants, things. Groups and formula are an interpretation.",
            digits=4,
        ),
        Claim(
            f"{NAME}.kd-entropy",
            "Distillation transfers it: the entropy is higher.",
            "2.9041, scratch 2.8986",
            "mean entropy within the group (nats), KD - scratch",
            [gain("kd", "entropy"), level("kd", "entropy")],
            note="Groups: animals, plants, things. Groups and formula are an interpretation.",
            digits=4,
        ),
        Claim(
            f"{NAME}.smoothed-teacher-detectors",
            "With a teacher of smoothed labels, more detectors come with a higher temperature.",
            "a figure only",
            "detectors for each doubling of the temperature",
            [
                Part("slope", over_temperatures("detectors")),
                *(level(smoothed_at(t), "detectors") for t in temperatures),
            ],
            **counted,
        ),
        Claim(
            f"{NAME}.smoothed-teacher-accuracy",
            "The same higher temperature costs accuracy.",
            "a figure only",
            "accuracy for each doubling of the temperature",
            [
                Part("slope", over_temperatures("accuracy"), "below"),
                *(level(smoothed_at(t), "accuracy") for t in temperatures),
            ],
            unit="points",
            digits=2,
        ),
    ]
