"""How test_fuzz.py calls the names around interpretability and trained explanations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastxkd
from fastxkd.train import ExplanationAutoencoder, TrainSettings
from tests.fuzz_case import DTYPES, Case
from tests.fuzz_plans import (
    COUNTS,
    FLAGS,
    NETS,
    WEIGHTS,
    Plan,
    Shapes,
    explained,
    images,
    named,
    net,
    one_layer,
    tensor_of,
)

TEMPERATURES = (1.0, 4, 1e-4, 0.0, -1.0, math.nan, math.inf, "1", None)
ENTROPY = {"drop_true_class": FLAGS, "unit": ("nats", "bits", "other", None, 3)}
GROUPS = (
    [0, 0, 1, 1, 2],
    torch.tensor([3, 3, 3, 3, 3]),
    (-7, 2**62, 0, 0, 1),
    [0, 1],
    [],
    [2**70] * 5,
    [0.5] * 5,
    [True] * 5,
    torch.zeros(5),
    torch.zeros(5, 1, dtype=torch.long),
    "groups",
    3,
)


def rarely(c: Case, **choices: tuple[Any, ...]) -> dict[str, Any]:
    """One of these keywords, in some cases: many at once would hide what each does."""
    if not c.one_in(3):
        return {}
    c.ordinary = False
    if c.one_in(16):
        return {"no_such_option": 1}
    name = c.pick(*choices)
    return {name: c.pick(*choices[name])}


def usually_net(c: Case) -> Any:
    return net(c) if c.one_in(4) else NETS["net"]


def batch(c: Case) -> Tensor:
    """Images, odd as they may be; what is no tensor at all is the business of torch's layers."""
    given = images(c)
    return given if isinstance(given, Tensor) else c.keep(torch.rand(4, 3, 6, 6))


def of_every_class(c: Case, n: int) -> Any:
    return c.labels(n, 5) if c.one_in(2) else c.keep(torch.arange(n) % 5)


def alike(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    c.dtype = c.pick(*DTYPES)
    if name is fastxkd.class_groups:
        given, symmetric = c.tensor(5, 5), not c.one_in(4)
        options = c.options(linkage=("average", "complete", "single", "other", None))
        count = c.pick(2, 1, 5, 6, 0, -1, None, "2", 1.5, True)

        def call() -> Any:
            alike = symmetric and isinstance(given, Tensor)
            return name(given + given.mT if alike else given, count, **options)

        return call, tensor_of(1)
    given, labels = c.tensor(10, 5), of_every_class(c, 10)
    if name is fastxkd.class_similarity:
        options = c.options(
            kind=("probability", "correlation", "other", None), temperature=TEMPERATURES
        )
        labels = None if c.one_in(4) else labels
        return lambda: name(given, labels, **options), tensor_of(2)
    groups, options = c.pick(*GROUPS), c.options(**ENTROPY)
    if name is fastxkd.group_entropy:
        groups, labels = c.pick((groups, labels), (None, labels), (None, None), (groups, None))[:2]
        return lambda: name(given, labels, groups, **options), tensor_of(1)

    def call() -> Any:
        metric = name(groups, **options)
        metric.update(given, labels)
        return metric.compute()

    return call, lambda found: set(found) == {"within_group", "softmax"}


THRESHOLDS = (
    (-0.7, -0.3, 0.3, 0.7),
    torch.tensor([-0.5, -0.1, 0.1, 0.5]),
    (0.1, 0.2, 0.3, 0.4),
    (0.7, 0.3, -0.3, -0.7),
    (0.0, 0.0, 0.0, 0.0),
    (1, 2, 3),
    (),
    (math.nan,) * 4,
    (-math.inf, -1, 1, math.inf),
    "abcd",
    ("a", "b", "c", "d"),
    None,
    0.3,
)


def bands(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    c.dtype = c.pick(*DTYPES)
    if name is fastxkd.five_bands:
        shape, options = c.pick((3, 4), (2, 3, 4, 5), (5,), (1,)), c.options(thresholds=THRESHOLDS)
        values = c.tensor(*shape)
        return lambda: name(values, **options), lambda found: found.dtype == torch.int8
    given, truth = c.tensor(*c.pick((2, 6, 6), (2, 3, 6, 6))), c.tensor(2, 6, 6, unit=True)
    options = c.options(
        thresholds=THRESHOLDS,
        truth_thresholds=THRESHOLDS,
        scaling=("after_sum", "before_sum", "other", None),
    )
    if name is not fastxkd.five_band_score:
        options |= c.options(
            delta=(0.005, 0.0, 0.1, 1.0, -1.0, math.nan, None), steps=(3, 1, 99, 0, -1, None, 1.5)
        )
    if not isinstance(name, type):
        return lambda: name(given, truth, **options), lambda found: len(found) == 4

    def call() -> Any:
        metric = name(**options)
        metric.update(given, truth)
        return metric.compute()

    return call, lambda found: isinstance(found, dict) and len(found) == 4


CHANNELS = ("max", "sum", "other", None)
SIGMAS = (1.0, 0, 0.1, 30.0, -1.0, math.nan, math.inf, None, "1")
OBJECTIVES = ("loss", "logit", "probability", "other", None)


def pixels(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    c.dtype = c.pick(*DTYPES)
    if name is fastxkd.kept_pixels:
        maps = c.tensor(*c.pick((2, 6, 6), (1, 1, 1), (3, 1, 7)))
        fraction = c.pick(0.5, 1, 1e-9, 0, -1.0, 1.5, math.nan, None, "0.5")
        options = c.options(keep=("top", "bottom", "other", None))
        return lambda: name(maps, fraction, **options), lambda f: f.dtype == torch.bool
    given, options = c.tensor(2, 3, 6, 6), c.options(channels=CHANNELS)
    if name is not fastxkd.gradient_alignment:
        return lambda: name(given, **options), tensor_of(3)
    options |= c.options(sigma=SIGMAS)
    truth = c.mask(2, 6, 6)
    return lambda: name(given, truth, **options), lambda found: len(found) == 2


def gradients(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    model, given, labels = net(c), images(c), None if c.one_in(3) else c.labels(4, 5)
    options = c.options(of=OBJECTIVES)
    if name is fastxkd.input_gradients:
        return lambda: name(model, given, labels, **options), tensor_of(4)
    options |= c.options(channels=CHANNELS)
    if name is fastxkd.ranked_pixels:
        return lambda: name(model, given, labels, **options), tensor_of(3)
    options |= c.options(sigma=SIGMAS)
    truth = c.mask(4, 6, 6) if c.one_in(2) else None

    def call() -> Any:
        metric = name(**options)
        metric.update(model, given, labels, truth)
        return metric.compute()

    return call, lambda found: set(found) == {"cosine", "pearson"}


NAMES = ("", "sky", "dog", "red")
CONCEPTS = fastxkd.Concepts(NAMES, ("object", "colour"), (0, 0, 0, 1))


def meanings(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    names = c.odd(c.pick(NAMES, list(NAMES), ("", "one"), ("",), (), "text", ("", None)))
    categories = c.odd(c.pick(("object", "colour"), ("one",), (), "ab", ["x"] * 9))
    category = c.odd(
        c.pick((0, 0, 0, 1), (0, 0), [0] * 4, (), (0, 0, 0, 2), (-1,) * 4, ("0",) * 4, None)
    )
    return lambda: name(names, categories, category), lambda found: len(found) == len(names)


def label_map(c: Case, *shape: int) -> Any:
    """Numbers of concepts."""
    values = torch.randint(len(NAMES), c.sizes(*shape), generator=c.generator)
    if c.one_in(12) and values.numel():
        c.ordinary = False
        values.view(-1)[c.byte() % values.numel()] = c.pick(4, 255, -1, 30_000, 2**31)
    usual = c.pick(torch.uint8, torch.int16, torch.int32)
    dtype = usual if not c.one_in(8) else c.pick(torch.int64, torch.float32, torch.bool)
    return c.odd(c.keep(values.to(dtype)))


DISSECTED = {
    "q": (0.1, 0.005, 0.999, 0.0, 1.0, -1.0, math.nan, None, "q"),
    "quantile": ("exact", "published", "other", None),
    "iou_threshold": (0.05, 1.0, 0.0, 2.0, math.nan, None),
    "repeats": ("each", "once", "other", None),
}


def dissected(found: Any) -> bool:
    kinds = len(found.concepts.categories)
    return found.iou().shape == (len(found.units), 4) and len(found.counts) == kinds


def dissection(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    c.dtype = c.pick(*DTYPES)
    options = rarely(c, **DISSECTED)
    meaning = c.odd(CONCEPTS)
    if name is fastxkd.network_dissection:
        given, masks = c.tensor(3, 4, 3, 3), label_map(c, 3, 2, 8, 8)
        labels = label_map(c, 3, 2) if c.one_in(2) else None
        return lambda: name(given, masks, labels, concepts=meaning, **options), dissected
    model, at = usually_net(c), one_layer(c)
    given, masks = images(c), label_map(c, 4, 1, 8, 8)
    labels = (label_map(c, 4, 2),) if c.one_in(2) else ()
    batches = [(given, masks, *labels)] * c.pick(1, 2, 0)
    if c.one_in(8):
        batches = c.pick([given], [()], [None], iter(batches), None, 3)
    options |= rarely(
        c,
        reshape_transform=(None, lambda x: x, lambda x: x[0], lambda x: None, 3),
        device=(None, "cpu", "nowhere", -5),
    )
    return lambda: name(model, at, meaning, **options)(batches), dissected


def fidelity(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    models, given = (usually_net(c), usually_net(c)), images(c)
    explainers = [
        c.pick(explained, explained, explained, lambda *a, **k: None, lambda x, **k: x, None)
        for _ in range(2)
    ]
    options = rarely(
        c,
        fractions=((0.1, 0.2), (1.0,), (), (0.0,), (math.nan,), None, 0.1, "f"),
        ssim_window=(11, 3, 1, 4, 0, -1, None, 2.5),
        curves=FLAGS,
        steps=(None, 3, 1, 0, -1, "3"),
    )
    return lambda: name(*models, given, *explainers, **options).means(), lambda found: all(
        isinstance(value, float) for value in found.values()
    )


class Batches:
    """One batch an epoch."""

    def __init__(self, *tensors: Any) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return 1

    def iterate(self, first: int, last: int) -> Iterator[tuple[Any, ...]]:
        for _ in range(first, last):
            yield self.tensors


def drawn(c: Case) -> Any:
    """A phi."""
    if c.one_in(8):
        c.ordinary = False
        return c.pick(None, NETS["net"], NETS["identity"], "phi", nn.Conv2d(3, 1, 3), nn.Sigmoid())
    torch.manual_seed(3)
    return ExplanationAutoencoder(3, widths=(4,), decoder=(4,))


def fused(c: Case, name: Any) -> Callable[[], Any]:
    model, phi = usually_net(c), drawn(c)
    fusion = c.pick("concat", "gate", "attend", "feature", "mask", "none", c.odd("mask"))
    at = one_layer(c) if (fusion == "attend") != c.one_in(16) else None
    options = rarely(
        c,
        first_weights=("zeros", "random", "other", None),
        maps=(None, 1, 2, 0, -1, "1"),
        classes=(None, 5, 4, 0, -1, "5"),
    )
    phi = None if fusion == "none" else phi
    # It takes its models over: they are copies.
    return lambda: name(copy.deepcopy(model), copy.deepcopy(phi), fusion=fusion, at=at, **options)


def fusion(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    make, given = fused(c, name), batch(c)
    what = c.pick("forward", "explain", "seen")
    # Without phi the student is shown what was given, whatever that was.
    return lambda: getattr(make().eval(), what)(
        given
    ), lambda found: isinstance(found, Tensor) or found is given


def distilled(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    make, teacher = fused(c, fastxkd.ExplainedStudent), usually_net(c)
    teacher = teacher if isinstance(teacher, nn.Module) else NETS["net"]
    torch.manual_seed(c.byte())
    tensors = [torch.randn(4, 3, 6, 6), torch.arange(4), torch.rand(4, 1, 6, 6)]
    if c.one_in(2):
        at, strange = c.pick((0, images(c)), (1, c.labels(4, 5)), (2, c.tensor(4, 1, 6, 6)))
        tensors[at] = strange if isinstance(strange, Tensor) else torch.zeros(3, 0, 2)
    given, labels, maps = map(c.keep, tensors)
    batches = Batches(given, labels, *c.pick((maps,), (maps,), (maps,), (), (maps, maps)))
    options = rarely(
        c,
        explanation_weight=WEIGHTS,
        ssim_weight=WEIGHTS,
        match_weight=WEIGHTS,
        match_layer=("student.act", None, "nowhere", "", 3),
        phi_epochs=(1, 0, -1, None, 1.5, "1", True),
        phi_lr=(1e-3, 0.0, -1.0, math.nan, None),
        phi_weight_decay=WEIGHTS,
        freeze_phi=FLAGS,
        device=("cpu", "nowhere", None),
        evaluate=(None, lambda model: 0.5, 3),
    )
    if options.get("match_weight"):
        options["match_layer"] = "student.act"
    options.setdefault("phi_epochs", 1)
    settings = TrainSettings(epochs=1, batch_size=4, lr=c.pick(0.01, 0.01, 1e30))
    plain = c.one_in(16)

    def call() -> Any:
        student = NETS["net"] if plain else make()
        return name(student, batches, settings, teacher=teacher, **options).fit()

    return call, lambda found: len(found) == 1 and math.isfinite(found[0]["loss"])


def routed(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    given = images(c)
    options: dict[str, Any] = {"num_classes": 3, "pooled": 2, "hidden": 4}
    options |= {"levels": (2, 3), "widths": ((2, 3), (3, 2))}
    options |= rarely(
        c,
        num_classes=(1, 0, -1, None, 2.5, "3", True),
        in_channels=(3, 1, 0, -1, None),
        levels=((2, 3), (1,), (), (2, 0), ("2", 3), 3, None, (2,) * 9),
        widths=(((2, 3), (3, 2)), ((2, 3),), (), (2, 3), ((2,), (3,)), ((2, -3), (3, 2)), None),
        head=("ce", "nce", "other", None),
        pooled=COUNTS,
        hidden=COUNTS,
        dropout=(0.15, 0.0, 1.0, -1.0, 2.0, math.nan, None),
        head_std=WEIGHTS,
        routing_temperature=TEMPERATURES,
        stem=(None, 2, 0, -1, "2"),
    )
    mode = c.pick(False, True)
    temperature = c.pick(1.0, *TEMPERATURES)
    what = c.pick("forward", "gates", "entropy", "tree", "fix")

    def call() -> Any:
        torch.manual_seed(4)
        student = name(**options).train(mode)
        if what == "gates":
            return student.gates()
        if what == "entropy":
            return student.attention_entropy(temperature)
        if what == "tree":
            return [torch.tensor(student.tree().groups())]
        if what == "fix":
            student.fix_tree(reset=mode)
        return student(given)

    return call, lambda found: isinstance(found, (Tensor, list))


def attending(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    model, given = usually_net(c), images(c)
    options = {
        "groups": c.pick(2, 1, 3, 3, 2, c.pick(4, 99, 0, -1, None, "2", 1.5)),
        **rarely(
            c,
            blocks=(None, 1, 99, 0, -1, "2"),
            temperature=TEMPERATURES,
            layers=(None, "conv", ["conv"], [], "head", "nowhere", 3, nn.Identity()),
        ),
    }
    what = c.pick("forward", "fold", "twice", "entropy")
    reduction = c.pick("mean", "sum", "other", None)

    def call() -> Any:
        wrapped = name(copy.deepcopy(model), **options)
        if what == "entropy":
            return wrapped.entropy(reduction)
        if what == "twice":
            wrapped.fold()
        return wrapped.fold()(given) if what != "forward" else wrapped(given)

    return call, tensor_of(0, 2)


CHEAP: dict[str, Plan] = {
    **dict.fromkeys(("class_groups", "class_similarity", "group_entropy", "GroupEntropy"), alike),
    **dict.fromkeys(("five_bands", "five_band_score", "five_band_curve", "FiveBandScore"), bands),
    **dict.fromkeys(("kept_pixels", "gradient_maps", "sobel_maps", "gradient_alignment"), pixels),
    "Concepts": meanings,
    "network_dissection": dissection,
    **dict.fromkeys(("Alignment", "Dissection", "ExplanationFidelity", "FiveBandScores"), named),
}
WITH_MODELS: dict[str, Plan] = {
    **dict.fromkeys(("input_gradients", "ranked_pixels", "GradientAlignment"), gradients),
    "NetworkDissection": dissection,
    "explanation_fidelity": fidelity,
    "ExplainedStudent": fusion,
    "KDExplainer": routed,
    "VirtualAttention": attending,
    "XDistiller": distilled,
}
