"""UniCAM's claims (Adhane et al. 2025): what guidance adds to the layers of a student.

Two experiments, as the paper's: a student of its teacher's architecture under three kinds of
guidance, where the teacher is the base; and a small student of a large teacher, with and without an
assistant of medium size between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastxkd import capture
from fastxkd.metrics import layer_scores
from fastxkd.runs.answers import accuracy, balanced
from fastxkd.runs.data import ImageData
from fastxkd.runs.reproduce import fashion
from fastxkd.runs.reproduce.claims import Claim, Part
from fastxkd.runs.reproduce.fashion import MODELS, FashionModels, noticed
from fastxkd.runs.reproduce.statistics import differences, slope
from fastxkd.runs.reproduce.tasks import Context, Measurement, Training
from fastxkd.runs.reproduce.training import STAGES

NAME = "unicam"
GUIDANCE = ("response", "attention", "feature")
# Student and base of each comparison.
PAIRS = {
    "response": "base",
    "attention": "base",
    "feature": "base",
    "direct": "small",
    "assisted": "small",
}
_PAPER_RS = {
    "response": "R50, layer 4: ASIRRA .0861 (Base .0141), CIFAR-10 .0585 (Base .0417)",
    "attention": ".0583 and .0437, the Bases as above; below Base only at layer 3 of CIFAR-10",
    "feature": ".0953 and .0794, the Bases as above",
}
_PAPER_UNIQUE = {
    "response": "residual and distilled, layer 4: ASIRRA .0043, .006; CIFAR-10 .0090, .0106; the "
    "other way round at layer 1 of ASIRRA",
    "attention": ".0082, .0102; .0017, .0021; the other way round at layer 1 of ASIRRA and layer 3 "
    "of CIFAR-10",
    "feature": ".0012, .0258; .0024, .0150",
}


class UnicamStudy:
    """Trains and measures what the claims need, for any number of seeds.

    Args:
        data: with training and test images.
        size: of the trainings.
        samples: test images that the scores are of, balanced over the classes; all in one sweep,
            where the paper averages over mini-batches (an interpretation: the same quantity
            without the noise of small batches). Features are the layers' own, as the authors'
            current instructions have them, not those of images reduced to what is relevant.
    """

    name = NAME

    def __init__(
        self, data: ImageData, size: fashion.Size = fashion.FULL, *, samples: int = 1000
    ) -> None:
        self.models, self.samples = FashionModels(data, size), samples
        self.data = self.models.data
        self.notice = noticed(self.data)

    def tasks(self, seed: int) -> list[Training | Measurement]:
        trainings = self.models.trainings(list(MODELS), seed)
        measurement = Measurement(
            key=f"{NAME}/{seed}/scores",
            kind=f"{NAME}/scores",
            facts={**self.data.settings(), "samples": self.samples, "pairs": PAIRS},
            needs=[self.models.key(name, seed) for name in MODELS],
            measure=self._measure,
            guess=20.0,
        )
        return [*trainings, measurement]

    def _measure(self, models: Sequence[nn.Module], context: Context) -> dict[str, float]:
        named = dict(zip(MODELS, models, strict=True))
        data, device = self.data, context.device
        found = {
            f"{name}/accuracy": accuracy(model, data, data.test, 256, device)
            for name, model in named.items()
        }
        chosen = balanced(data.test.labels, np.arange(len(data.test)), self.samples)
        labels = torch.from_numpy(data.test.labels[chosen]).to(device)
        features = {
            name: features_of(named[name], data, chosen, device)
            for name in dict.fromkeys([*PAIRS, *PAIRS.values()])
        }
        for number, (student, base) in enumerate(PAIRS.items(), 1):
            for row in layer_scores(features[student], features[base], labels):
                prefix = f"{student}/{row.layer}"
                found[f"{prefix}/fss"] = row.fss
                found[f"{prefix}/rs"] = row.rs_student
                found[f"{prefix}/rs base"] = row.rs_base
                found[f"{prefix}/distilled"] = row.rs_distilled
                found[f"{prefix}/residual"] = row.rs_residual
            context.watch.tick(number, len(PAIRS))
        return found

    def claims(self, seeds: Sequence[Mapping[str, Mapping[str, float]]]) -> list[Claim]:
        """The verdicts on the paper's section 4, from the measurements of each seed."""
        return _claims([seed["scores"] for seed in seeds])


def features_of(
    model: nn.Module, data: ImageData, indices: np.ndarray, device: torch.device
) -> dict[str, Tensor]:
    """What each stage makes of test images: flattened activations, in the order of ``indices``."""
    parts: dict[str, list[Tensor]] = {name: [] for name in STAGES}
    model.eval()
    for batch in data.batches(data.test, 256, indices):
        with torch.no_grad(), capture(model, list(STAGES)) as captured:
            model(data.normalize(batch.images, device))
        for name, found in captured.activations.items():
            parts[name].append(found.flatten(1).float())
    return {name: torch.cat(found) for name, found in parts.items()}


def _claims(seeds: Sequence[Mapping[str, float]]) -> list[Claim]:
    def of(model: str, stage: str, what: str) -> list[float]:
        return [seed[f"{model}/{stage}/{what}"] for seed in seeds]

    def layers(model: str, first: str, second: str, **more: Any) -> list[Part]:
        """first - second of a pair's scores, layer by layer."""
        return [
            Part(stage, differences(of(model, stage, first), of(model, stage, second)), **more)
            for stage in STAGES
        ]

    def mean_first(parts: list[Part]) -> list[Part]:
        """The mean over the layers decides, the layers are shown."""
        mean = [sum(values) / len(parts) for values in zip(*(p.values for p in parts), strict=True)]
        shown = [Part(p.name, p.values, p.side, p.bound, decides=False) for p in parts]
        return [Part("mean of the layers", mean, parts[0].side), *shown]

    def fss_slopes(model: str) -> list[float]:
        columns = [of(model, stage, "fss") for stage in STAGES]
        return [slope((1, 2, 3, 4), values) for values in zip(*columns, strict=True)]

    def level(title: str, what: str) -> Part:
        return Part(title, [seed[what] for seed in seeds], decides=False, level=True)

    def mean_rs(model: str, what: str = "rs") -> list[float]:
        columns = [of(model, stage, what) for stage in STAGES]
        return [sum(values) / len(STAGES) for values in zip(*columns, strict=True)]

    found = []
    for kind in GUIDANCE:
        found.append(
            Claim(
                f"{NAME}.{kind}-above-base",
                f"With {kind}-based guidance every layer of the student holds more of the task "
                "than the base's: its relevance score is higher.",
                _PAPER_RS[kind],
                "RS(student) - RS(base), layer by layer",
                layers(kind, "rs", "rs base"),
                digits=4,
            )
        )
    for kind in GUIDANCE:
        found.append(
            Claim(
                f"{NAME}.{kind}-distilled-above-residual",
                f"What only the {kind}-guided student has says more about the task than what only "
                "the base has (nearly always).",
                _PAPER_UNIQUE[kind],
                "distilled RS - residual RS",
                mean_first(layers(kind, "distilled", "residual")),
                note="The paper itself has exceptions, so the mean over the layers decides.",
                digits=4,
            )
        )
    found.append(
        Claim(
            f"{NAME}.feature-best",
            "Of the three kinds of guidance the one by features leaves the student with the most "
            "relevant layers.",
            "CIFAR-10, layer 4: feature .0794, response .0585, attention .0437",
            "RS(feature) - RS(other), mean of the layers",
            [
                Part(f"feature - {other}", differences(mean_rs("feature"), mean_rs(other)))
                for other in ("response", "attention")
            ],
            note="FitNets' loss at every stage stands for the paper's overhaul distillation.",
            digits=4,
        )
    )
    capacity = "R18 with R101, layers 1 to 4: .0022 .0035 .0045 .0052; base .0037 .0039 .0057 .0063"
    assisted = "with R50 between: .0052 .005 .0074 .0082"
    found.append(
        Claim(
            f"{NAME}.capacity-gap",
            "A teacher far larger than its student leaves it below the base at every layer.",
            capacity,
            "RS(student of the large teacher) - RS(base), layer by layer",
            layers("direct", "rs", "rs base", side="below"),
            digits=4,
        )
    )
    found.append(
        Claim(
            f"{NAME}.assistant-above-base",
            "With an assistant of medium size between them every layer is above the base's.",
            assisted,
            "RS(student of the assistant) - RS(base), layer by layer",
            layers("assisted", "rs", "rs base"),
            digits=4,
        )
    )
    found.append(
        Claim(
            f"{NAME}.assistant-above-direct",
            "The assistant leaves the student with more relevant layers than the large teacher.",
            f"{capacity}; {assisted}",
            "RS(student of the assistant) - RS(student of the large teacher), layer by layer",
            [
                Part(stage, differences(of("assisted", stage, "rs"), of("direct", stage, "rs")))
                for stage in STAGES
            ],
            digits=4,
        )
    )
    found.append(
        Claim(
            f"{NAME}.fss-rises",
            "The deeper the layer, the more alike are the features of student and base (FSS).",
            "a figure only: between .3 and .9",
            "slope of FSS over the number of the layer",
            [
                *(Part(kind, fss_slopes(kind)) for kind in GUIDANCE),
                *(
                    level(f"FSS of {kind}, {stage}", f"{kind}/{stage}/fss")
                    for kind in GUIDANCE
                    for stage in (STAGES[0], STAGES[-1])
                ),
            ],
        )
    )
    found.append(
        Claim(
            f"{NAME}.accuracy",
            "Guidance makes the student more accurate than the base.",
            "curves only",
            "accuracy(student) - accuracy(base)",
            [
                *(
                    Part(
                        f"{student} - {base}",
                        [seed[f"{student}/accuracy"] - seed[f"{base}/accuracy"] for seed in seeds],
                    )
                    for student, base in PAIRS.items()
                ),
                *(
                    level(f"accuracy of {name}", f"{name}/accuracy")
                    for name in ("base", "small", "large")
                ),
            ],
            unit="points",
            digits=2,
        )
    )
    return found
