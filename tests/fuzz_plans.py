"""How test_fuzz.py calls every public name, and what shape its documentation promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastxkd
from tests._torchvision import declare_operators
from tests.fuzz_case import DTYPES, Case

declare_operators()


class Net(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU()
        self.head = nn.Linear(4, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.act(self.conv(images)).flatten(2).mean(2))


def nets() -> dict[str, nn.Module]:
    torch.manual_seed(5)
    broken = Net()
    with torch.no_grad():
        broken.conv.weight.fill_(math.nan)
    return {
        "net": Net().eval(),
        "training": Net(),
        "one class": Net(1).eval(),
        "nan": broken.eval(),
        "double": Net().double().eval(),
        "flat": nn.Sequential(nn.Flatten(), nn.Linear(108, 5)),
        "identity": nn.Identity(),
    }


NETS = nets()
Shapes = Callable[[Any], bool]
Plan = Callable[[Case, Any], tuple[Callable[[], Any], Shapes]]


def net(c: Case) -> Any:
    at = c.byte() % 16
    if at < 9:
        return NETS["net"]
    c.ordinary = False
    names = list(NETS)
    if at < 9 + len(names) - 1:
        return NETS[names[at - 8]]
    return c.odd(NETS["net"])


def layer(c: Case) -> Any:
    if c.one_in(8):
        c.ordinary = False
        return c.pick("head", "nowhere", "", None, 3, ["conv", "head"], [], nn.Identity(), "conv.x")
    return c.pick("act", ["act"], "conv")


def one_layer(c: Case) -> Any:
    return layer(c) if c.one_in(6) else "act"


def images(c: Case, n: int = 4) -> Any:
    c.dtype = torch.float32
    return c.tensor(n, 3, 6, 6)


def targets(c: Case) -> Any:
    if c.one_in(3):
        c.ordinary = False
        return c.pick(None, 0, 2, 99, -1, [0, 1, 2, 3], [0], "class", 1.5, [lambda out: out[0]], [])
    return c.labels(4, 5)


def scalar(found: Any) -> bool:
    """A loss: a scalar, or its parts."""
    if isinstance(found, tuple):
        return all(isinstance(part, Tensor) for part in found)
    return isinstance(found, Tensor) and found.dim() == 0 and found.is_floating_point()


def loss(found: Any) -> bool:
    """A loss that may keep its rows."""
    parts = found if isinstance(found, tuple) else (found,)
    return all(isinstance(part, Tensor) and part.is_floating_point() for part in parts)


def tensor_of(*dims: int) -> Shapes:
    return lambda found: isinstance(found, Tensor) and found.dim() in dims


WEIGHTS = (1.0, 0.0, 2, -1.0, math.nan, math.inf, "1", None, True)
TEMPERATURES = (4.0, 1, 0.5, 1e-4, 1e5, 0.0, -1.0, math.nan, math.inf, "4", None, True)
REDUCTIONS = ("batchmean", "sum", "none", "mean", "median", None, 1)
FORMS = ("logits", "probabilities", "log_probabilities", "top", None)
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", "other", None)
FLAGS = (False, True, None, "yes")
COUNTS = (1, 2, 3, 0, -1, None, 1.5, "2")
KD = {
    "temperature": TEMPERATURES,
    "ce_weight": WEIGHTS,
    "kd_weight": WEIGHTS,
    "ignore_index": (-100, 0, 1, -1, 2**62, -(2**63), 2**70, None, "0"),
    "label_smoothing": (0.0, 0.1, 1.0, -0.1, 2.0, math.nan, None),
    "class_weight": (None, torch.ones(5), -torch.ones(5), torch.ones(4), torch.zeros(5), "w"),
    "teacher_form": FORMS,
    "teacher_weights": (None, [1.0], [0.5, 0.5], [], [math.nan], "w"),
    "return_parts": FLAGS,
}
KINDS = {
    "kd": {**KD, "divergence": DIVERGENCES, "beta": (0.5, 0.0, 1.0, 2.0, math.nan, None)},
    "dkd": {**KD, "target_weight": WEIGHTS, "others_weight": WEIGHTS},
    "dist": {**KD, "inter_weight": WEIGHTS, "intra_weight": WEIGHTS},
}
KINDS["kd"]["reduction"] = KINDS["dkd"]["reduction"] = REDUCTIONS


def logits(kind: str) -> Plan:
    def plan(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
        c.dtype = c.pick(*DTYPES)
        shape = c.pick((4, 5), (1, 5), (2, 3, 5), (7, 130), (3, 1), (0, 5))
        n, classes = math.prod(shape[:-1]), shape[-1]
        student, teacher = c.tensor(*shape, grad=True), c.tensor(*shape)
        if c.one_in(8):
            c.ordinary = False
            teacher = c.pick([teacher], [teacher, teacher], [], [None], (teacher, student))
        labels = c.labels(n, classes)
        if len(shape) == 3 and isinstance(labels, Tensor) and labels.numel() == n:
            labels = labels.reshape(shape[:-1])
        if kind != "dkd" and c.one_in(3):
            labels = None
        options = c.options(**KINDS[kind])
        extra = c.options(
            row_weight=(torch.ones(4), torch.zeros(4), torch.ones(3), None, "w"),
            teacher_indices=(torch.zeros(4, 5, dtype=torch.long), torch.full((4, 5), 99), [], "i"),
        )
        c.ordinary &= not extra and n > 0 and classes > 1
        check = loss if kind != "dist" else scalar
        if isinstance(name, type):
            return lambda: name(**options)(student, teacher, labels, **extra), check
        return lambda: name(student, teacher, labels, **options, **extra), check

    return plan


def linear(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    c.dtype = c.pick(*DTYPES[:3])
    given = [c.tensor(4, 6, grad=True), c.tensor(5, 6, grad=True), c.tensor(4, 3), c.tensor(5, 3)]
    labels = c.labels(4, 5) if c.one_in(2) else None
    options = c.options(
        **{k: v for k, v in KINDS["kd"].items() if not k.startswith("teacher_")},
        chunk_rows=(None, 1, 2, 1000, 0, -1, "2"),
        accumulate_dtype=(None, torch.float32, torch.float64, torch.int64, "float32"),
    )
    extra = c.options(
        student_bias=(None, torch.zeros(5), torch.zeros(4), "b"),
        teacher_bias=(None, torch.zeros(5), torch.full((5,), math.nan), torch.zeros(1)),
        row_weight=(None, torch.ones(4), -torch.ones(4), torch.ones(5)),
    )
    if isinstance(name, type):
        return lambda: name(**options)(*given, labels, **extra), loss
    return lambda: name(*given, labels, **options, **extra), loss


def pair(
    *shapes: tuple[int, ...],
    check: Shapes = scalar,
    own: dict[str, tuple[Any, ...]] | None = None,
    grad: bool = True,
    **options: tuple[Any, ...],
) -> Plan:
    """Two tensors of one shape; ``own``: options of a module's making that a function has not."""

    def plan(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
        c.dtype = c.pick(*DTYPES)
        shape = c.pick(*shapes)
        first, second = c.tensor(*shape, grad=grad), c.tensor(*shape)
        if c.one_in(10):
            c.ordinary = False
            first, second = c.pick(([first], [second]), ([], []), ([first] * 2, [second]))
        found = c.options(**options, **(own or {}))
        if isinstance(name, type):
            return lambda: name(**found)(first, second), check
        return lambda: name(first, second, **found), check

    return plan


FEATURES = ((6, 4), (6, 2, 3, 3), (1, 4), (2, 4), (5, 300), (4, 3, 5))
MAPS = ((3, 15, 15), (1, 12, 11), (2, 1, 1), (3, 6, 6))


def channels(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    """Losses with layers of their own."""
    c.dtype = torch.float32
    counts = c.pick((3, 4), (3, 3), (3, 0), (-1, 4), ("3", 4), (3, 4.5), (4, 3))
    student, teacher = c.tensor(2, 3, 4, 4, grad=True), c.tensor(2, 4, 4, 4)
    if name is fastxkd.ReviewKDLoss:
        levels = c.pick(([3, 3], [4, 4]), ([3], [4]), ([], []), (3, 4), ([3], [4, 4]), ("34", "4"))
        options = c.options(mid_channels=(None, 2, 0, -1, "2"))
        deep = c.tensor(2, 3, 2, 2), c.tensor(2, 4, 2, 2)
        given = c.pick(([student, deep[0]], [teacher, deep[1]]), ([student], [teacher]), ([], []))
        return lambda: name(*levels, **options)(*given), scalar
    options = {}
    if name is fastxkd.VIDLoss:
        options = c.options(
            mid_channels=(None, 2, 0, -1, "2"),
            initial_variance=(5.0, 1e-6, 0.0, -1.0, math.nan, None),
            eps=(1e-5, 0.0, -1.0, math.nan, None),
        )
    return lambda: name(*counts, **options)(student, teacher), scalar


def vid(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    c.dtype = c.pick(*DTYPES[:2])
    student, teacher, variance = c.tensor(2, 3, 4, 4), c.tensor(2, 3, 4, 4), c.tensor(3, unit=True)
    return lambda: name(student, teacher, variance=variance), scalar


def comparative(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    c.dtype = c.pick(*DTYPES)
    student, teacher, labels = c.tensor(6, 5, grad=True), c.tensor(6, 5), c.labels(6, 2)
    c.ordinary = False  # of labels without a pair
    options = c.options(
        relations=(None, 1, 10, 0, -1, "3"),
        positives=(2, 1, 0, -1, None, 1.5),
        negatives=(1, 0, 2, -1, None),
        temperature=TEMPERATURES,
        generator=(None, torch.Generator(), "g"),
    )
    if isinstance(name, type):
        return lambda: name(**options)(student, teacher, labels), scalar
    return lambda: name(student, teacher, labels, **options), scalar


def on_inputs(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    student, teacher, given, labels = net(c), net(c), images(c), c.labels(4, 5)
    options = c.options(temperature=TEMPERATURES, ce_weight=WEIGHTS, return_parts=FLAGS)
    if name in (fastxkd.kdiga_loss, fastxkd.KDIGALoss):
        options |= c.options(alignment_weight=WEIGHTS, squared=FLAGS)
    else:
        options |= c.options(
            alpha=(0.4, 0.0, -1.0, math.nan, None),
            mix_weight=WEIGHTS,
            distance=("mse", "kl", "other", None),
            generator=(torch.Generator(), "g"),
        )
    if isinstance(name, type):
        return lambda: name(student, teacher, **options)(given, labels), scalar
    return lambda: name(student, teacher, given, labels, **options), scalar


def activations(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    c.dtype = c.pick(*DTYPES)
    given, weight, bias = c.tensor(2, 4, 5, 5), c.tensor(3, 4), c.tensor(3)
    bias = bias if c.one_in(2) else None
    return lambda: name(given, weight, bias), tensor_of(3, 4, 5)


CATKD = {
    "pool": (2, None, 1, 5, 6, 0, -1, "2"),
    "normalize": FLAGS,
    "binarize": FLAGS,
    "top": (None, 1, 3, 99, 0, -1, "1"),
    "bottom": (None, 1, 99, 0, -1),
}


def catkd(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    if isinstance(name, type):
        models, layers, given = (net(c), net(c)), (one_layer(c), one_layer(c)), images(c)
        options = c.options(**CATKD, student_head=(None, "head", "conv", "nowhere", 3))
        return lambda: name(*models, *layers, **options)(given), lambda found: len(found) > 1
    c.dtype = c.pick(*DTYPES)
    student, teacher, scores = c.tensor(2, 4, 5, 5), c.tensor(2, 4, 5, 5), c.tensor(2, 4)
    options = c.options(**CATKD)
    if c.one_in(2):
        options["teacher_logits"] = scores
    return lambda: name(student, teacher, **options), scalar


def e2kd(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    if not isinstance(name, type):
        return pair(*MAPS)(c, name)
    models, layers, given = (net(c), net(c)), (one_layer(c), one_layer(c)), images(c)
    options = c.options(
        temperature=TEMPERATURES,
        weight=WEIGHTS,
        method=("gradcam", "layercam", "other", None),
        every=(1, 2, 0, -1, None, "1"),
    )
    return lambda: name(*models, *layers, **options)(given), lambda found: len(found) > 1


def maps_from(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    c.dtype = c.pick(*DTYPES)
    shape = c.pick((2, 4, 5, 5), (1, 1, 1, 1), (2, 4, 3, 5, 4), (2, 70, 7, 7), (2, 4, 6))
    given, gradients = c.tensor(*shape), c.tensor(*shape)
    methods = [
        "gradcam",
        "hirescam",
        "layercam",
        "gradcam++",
        "xgradcam",
        "eigencam",
        "weights",
        "other",
    ]
    options = c.options(
        method=(*methods, None, 3),
        size=(None, (8, 8), (1, 1), (0, 4), (3,), (-1, 2), 5, "input", (2.5, 3), (4, 4, 4)),
        normalize=("minmax", None, "max", 3),
        relu=FLAGS,
        eigen_smooth=FLAGS,
    )
    return lambda: name(given, gradients, **options), tensor_of(len(shape) - 1)


def explainer(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    model, at, given, wanted = net(c), layer(c), images(c), targets(c)
    own = c.options(batch_size=(2, 32, 0, -1, None, "2"))
    if name is fastxkd.FinerCAM:
        own |= c.options(alpha=WEIGHTS, comparisons=((1, 2), (), (0,), (99,), None, "12"))
    elif name is fastxkd.AblationCAM:
        own |= c.options(
            ratio_channels_to_ablate=(1.0, 0.5, 0.0, 2.0, math.nan, None),
            value=("zero", "below", "other", None),
        )
    elif name is fastxkd.CAM:
        own |= c.options(head=(None, "head", "conv", "nowhere", 3))
    options = c.options(
        aug_smooth=FLAGS,
        eigen_smooth=FLAGS,
        output=("tensor", "numpy", "list", None),
        normalize=("minmax", None, "max"),
        size=("input", None, (3, 4), (0, 0), (1,), "output", 7),
        aggregate=("mean", None, "max"),
        differentiable=FLAGS,
        objective=(None, lambda out: out.sum(), lambda out: out, lambda out: 1.0, 3),
    )

    def call() -> Any:
        with name(model, at, **own) as cam:
            return cam(given, wanted, **options)

    return call, lambda found: isinstance(found, (Tensor, np.ndarray, dict, list))


def unicam(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    models, at, given = (net(c), net(c)), layer(c), images(c, 6)
    labels = c.labels(6, 3) if c.one_in(2) else c.tensor(6, 4)
    own = c.options(
        base_layers=(None, "conv", "head", "nowhere", []),
        objective=("semi_partial", "partial", "residual_argmax", "other", None),
        class_embeddings=(None, torch.randn(5, 3), torch.zeros(5), "c"),
    )
    options = c.options(
        size=("input", None, (3, 4), (0, 0), "output"),
        normalize=("minmax", None, "max"),
        reference=(None, 3, "r"),
    )
    return lambda: name(*models, at, **own)(given, labels, **options), lambda found: len(found) == 3


def captured(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    model, at, given, labels = net(c), layer(c), images(c), c.labels(4, 5)
    method = c.pick("gradcam", "layercam", "hirescam", "eigencam", "other", None)
    options = c.options(differentiable=FLAGS, size=(None, (3, 3), "input", (0, 1)))

    def call() -> Any:
        with name(model, at) as tap:
            out = model(given)
        score = out.gather(1, labels.reshape(-1, 1)) if isinstance(labels, Tensor) else out
        return tap.cam(method, score=score.sum(), **options)

    return call, lambda found: isinstance(found, (Tensor, dict, list))


def correlation(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    c.dtype = c.pick(*DTYPES)
    n = c.pick(8, 4, 5, 40, 3)
    x, y, given = c.tensor(n, 5, grad=True), c.tensor(n, 2, 3), c.tensor(n, 4)
    c.ordinary &= n > 4
    if name in (fastxkd.jackknife, fastxkd.permutation_test):
        y = c.labels(n, 3) if c.one_in(2) else y
        options = c.options(unbiased=FLAGS, given=(given, None, "g"))
        if name is fastxkd.permutation_test:
            options["permutations"] = c.pick(3, 1, 0, -1, None, 2.5, True)
            options |= c.options(
                memory=(1 << 30, 0, -1, 100, None, "m"), generator=(torch.Generator(), None, "g")
            )
        return lambda: name(x, y, **options), lambda found: found.value.dim() == 0
    options = c.options(unbiased=FLAGS, group=(None, "g"))
    if name is fastxkd.partial_distance_correlation:
        options = {"given": given, **c.options(semi_partial=FLAGS)}
    return lambda: name(x, y, **options), scalar


def layered(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    c.dtype = c.pick(*DTYPES)
    n = c.pick(8, 4, 5, 3)
    student, base, other = c.tensor(n, 5), c.tensor(n, 3), c.tensor(n, 2, 2)
    sides = c.pick(
        ({"a": student}, {"a": base}),
        ({"a": student, "b": other}, {"c": base, "d": other}),
        ({"a": student}, {}),
        ({}, {}),
        ([student], [base]),
    )
    labels = c.labels(n, 3) if c.one_in(2) else c.tensor(n, 2)
    options = c.options(teacher=(None, {"t": other}, {}, "t"))
    return lambda: name(*sides, labels, **options), lambda found: isinstance(found, list)


def similarity(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    c.dtype = c.pick(*DTYPES)
    n = c.pick(8, 4, 3, 5)
    x, y, given = c.tensor(n, 5), c.tensor(n, 2, 3), c.tensor(n, 4)
    relevance = name is fastxkd.RelevanceScore
    if relevance and c.one_in(2):
        y = c.labels(n, 3)
    options = c.options(
        mode=("dataset", "batch", "epoch", None),
        unbiased=FLAGS,
        projection=(None, 3, 0, -1, fastxkd.RandomProjection(2), "p", True),
        gather=FLAGS,
        normalize_rows=FLAGS,
    )
    partial, twice, then = c.one_in(3), c.one_in(3), c.pick("compute", "standard_error", "p_value")

    def call() -> Any:
        metric = name(**options)
        for _ in range(1 + twice):
            metric.update(x, y, *([given] if relevance and partial else []))
        found = metric.p_value(3) if then == "p_value" else getattr(metric, then)()
        metric.reset()
        return torch.as_tensor(found)

    return call, tensor_of(0)


def projection(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    if name is fastxkd.projected_width:
        n = c.pick(100, 2, 1, 0, -1, 10**9, None, 1.5, "n")
        error = c.pick(0.1, 0.5, 1.0, 0.0, -1.0, 1e-3, math.nan, math.inf, None)
        options = c.options(failure=(0.01, 0.0, 1.0, 2.0, -1.0, math.nan, "f"))
        return lambda: name(n, error=error, **options), lambda found: isinstance(found, int)
    c.dtype = c.pick(*DTYPES)
    width, given = c.pick(3, 1, 0, -1, None, 2.5, "w", True), c.tensor(5, 2, 4)
    options = c.options(seed=(0, 1, -1, 2**63, 2**70, None, "s", 1.5))
    return lambda: name(width, **options)(given), tensor_of(2)


def imputation(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    given = images(c)
    keep = c.mask(4, 6, 6)
    options = c.options(
        noise=(0.01, 0.0, -1.0, math.nan, None),
        generator=(None, torch.Generator(), "g"),
        tolerance=(1e-4, 0.1, 0.0, -1.0, math.nan, None),
        max_iterations=(100, 1, 0, -1, None),
    )
    return lambda: name(given, keep, **options), tensor_of(4)


def monitored(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    models, at, given = (net(c), net(c)), one_layer(c), images(c, 6)
    labels = c.labels(6, 5)
    layers: Any = {"x": (at, at)}
    if c.one_in(5):
        layers = c.pick(at, {"x": at}, {}, {"x": (at,)}, {"x": (at, "head")}, 3)
    options = c.options(
        base=(NETS["net"], None, "b"),
        sink=(None, lambda *a: None, lambda: None, 3, []),
        probe=(None, torch.ones(2, 3, 6, 6), torch.ones(2), (torch.ones(1, 3, 6, 6),), "p"),
        method=("gradcam", "layercam", "other", None),
        metrics=(None, ("agreement",), ("fss", "rs"), (), ("other",), "rs", 3),
        agreement=("cosine", "top", "ssim", None),
        width=(4096, 1, 0, -1, None),
        rank=(0, None, 1, -1, "r"),
        logits=(None, lambda out: out, lambda out: None, 3),
    )
    every = c.pick(2, 0, -1, None, "1") if c.one_in(6) else 1
    pool = c.pick(4, 99, 3, 0, None) if c.one_in(6) else 6

    def call() -> Any:
        monitor = name(*models, layers, every=every, pool=pool, **options)
        try:
            for _ in range(2):
                with monitor.step(labels):
                    models[0](given)
                    with torch.no_grad():
                        models[1](given)
            monitor.flush()
            return [value for record in monitor.history for value in record.values.values()]
        finally:
            monitor.close()

    return call, lambda found: all(isinstance(value, float) for value in found)


def relevant(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    options = c.options(
        percentile=(50.0, 0.0, 100.0, -1.0, 101.0, math.nan, None),
        noise=(0.01, 0.0, -1.0, math.nan, None),
        generator=(None, torch.Generator(), "g"),
    )
    given = images(c)
    if name is fastxkd.relevant_images:
        maps = c.tensor(4, 6, 6)
        return lambda: name(given, maps, **options), tensor_of(4)
    model, at, labels = net(c), layer(c), c.labels(4, 5)
    return lambda: name(model, at, given, labels, **options), lambda found: isinstance(found, dict)


def pointing(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    c.dtype = c.pick(*DTYPES)
    given, masks = c.tensor(3, 6, 6), c.mask(3, 6, 6)
    energy = name in (fastxkd.energy_pointing_game, fastxkd.EnergyPointingGame)
    options = {}
    if not energy:
        options = c.options(tolerance=(None, 0.0, 2, 100.0, -1.0, math.nan, "t"))
    if not isinstance(name, type):
        return lambda: name(given, masks, **options), tensor_of(1)
    if not energy:
        options |= c.options(classes=(3, None, 1, 0, -1, "c"))
    labels = (c.labels(3, 3),) if "classes" in options or c.one_in(8) else ()

    def call() -> Any:
        metric = name(**options)
        metric.update(given, masks, *labels)
        return metric.compute()

    return call, tensor_of(0, 1)


def boxes(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    c.dtype = c.pick(torch.float32, torch.int64, torch.float64)
    given = c.tensor(3, 4)
    size = c.pick((6, 6), (1, 1), (0, 5), (-1, 5), (5,), None, 5, ("6", 6), (2.5, 2))
    return lambda: name(given, size), tensor_of(3)


CELLS = (2, 1, 3, 0, -1, None, 1.5, "2")


def explained(given: Any, *_: Any, **__: Any) -> Any:
    return given[:, 0].detach().sigmoid()


def grids(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    given, options = images(c, 8), c.options(cells=CELLS)
    labels = c.labels(8, 4) if c.one_in(3) else c.keep(torch.arange(8) % 4)
    explain = c.pick(explained, explained, explained, lambda x, y: None, lambda x, y: x, None)
    if name is fastxkd.image_grids:
        return lambda: name(given, **options), tensor_of(4)
    if not isinstance(name, type):
        return lambda: name(explain, given, labels, **options), lambda f: isinstance(f, Tensor)

    def call() -> Any:
        metric = name(**options)
        metric.update(explain, given, labels)
        return metric.compute()

    return call, tensor_of(0)


SCORES = ("probability", "logit", "log_probability", "other", None)
STEPS = (3, None, 1, 36, 99, 0, -1, "3")
FAITHFUL = {
    "deletion": {"steps": STEPS, "baseline": (0.0, 1, math.nan, None, "b"), "score": SCORES},
    "insertion": {"steps": STEPS, "start": (None, 0.0, math.nan, "s"), "score": SCORES},
    "confidence": {"score": SCORES, "relative": FLAGS},
    "increase": {"score": SCORES},
    "road": {
        "order": ("combined", "morf", "lerf", "other", None),
        "percentiles": ((50.0,), (20.0, 80.0), (), (0.0,), (100.0,), (-1.0,), (math.nan,), None),
        "score": SCORES,
        "noise": (0.01, 0.0, -1.0, None),
        "ties": ("split", "other", None),
        "tolerance": (1e-4, 0.0, -1.0, None),
    },
}


def faithful(kind: str) -> Plan:
    def plan(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
        model, given, wanted = net(c), images(c), targets(c)
        maps = c.tensor(4, 6, 6, unit=True)
        options = c.options(**FAITHFUL[kind])
        if kind != "confidence" and kind != "increase":
            options |= c.options(steps_at_once=COUNTS)
        if kind == "road":
            options.setdefault("percentiles", (30.0, 60.0))

        def call() -> Any:
            if not isinstance(name, type):
                return name(model, given, maps, wanted, **options)
            metric = name(**options)
            metric.update(model, given, maps, wanted)
            return metric.compute()

        return call, lambda found: isinstance(found, (Tensor, tuple))

    return plan


def coherent(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    model, given, wanted = net(c), images(c), targets(c)
    explain = c.pick(explained, explained, explained, lambda *a, **k: None, lambda x, **k: x, None)
    maps = c.tensor(4, 6, 6, unit=True) if c.one_in(2) else None

    def call() -> Any:
        if not isinstance(name, type):
            return name(model, given, explain, wanted, maps=maps)
        metric = name()
        metric.update(model, given, explain, wanted, maps)
        return metric.compute()

    return call, lambda found: isinstance(found, (Tensor, tuple))


def agreements(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    c.dtype = c.pick(*DTYPES)
    shape = c.pick(*MAPS)
    first, second = c.tensor(*shape), c.tensor(*shape)
    options = c.options(
        measures=(("cosine",), ("ssim", "top"), (), ("other",), None, "cosine"), **SSIM, **TOP
    )

    def call() -> Any:
        metric = name(**options)
        metric.update(first, second)
        return metric.compute()

    return call, lambda found: isinstance(found, dict)


SSIM = {
    "data_range": (1.0, 0.0, -1.0, math.nan, None),
    "window": (11, 3, 1, 4, 0, -1, 99, None, 2.5),
    "sigma": (1.5, 0.0, -1.0, math.nan, None),
}
TOP = {"fraction": (0.1, 1.0, 0.0, 2.0, -1.0, math.nan, None)}


def saliency(model: nn.Module) -> Callable[..., Tensor]:
    return lambda given, *_, **__: fastxkd.GradCAM(model, "act")(given, 0)


def randomised(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    model, given, wanted = net(c), images(c), targets(c)
    made = c.pick(
        lambda m: saliency(m),
        lambda m: saliency(m),
        lambda m: explained,
        lambda m: None,
        lambda m: lambda *a: 3.0,
        None,
        "e",
    )
    options = c.options(
        layers=(None, ["conv"], "nowhere", []),
        measure=("spearman", "ssim", "other", None),
        cascade=FLAGS,
        seed=(0, 1, -1, 2**70, None, "s"),
    )

    def call() -> Any:
        if not isinstance(name, type):
            return name(model, made, given, wanted, **options)
        metric = name(made, **options)
        metric.update(model, given, wanted)
        return metric.compute()

    return call, lambda found: isinstance(found, (dict, tuple))


def blurry(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    given = images(c)
    return lambda: name(given), tensor_of(4)


def backend(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    if name is fastxkd.backends:
        return lambda: name(*c.pick((), (), (1,))), lambda found: isinstance(found, list)
    which = c.odd(c.pick("auto", "cpu", "reference", "cuda", "triton", "other", "", "CPU"))
    options = c.options(isa=(None, "baseline", "avx2", "avx512", "other", 3))

    def call() -> Any:
        with name(which, **options):
            return fastxkd.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3))

    return call, scalar


def named(c: Case, name: Any) -> tuple[Callable[[], Any], Shapes]:
    fields = name._fields if hasattr(name, "_fields") else list(name.__dataclass_fields__)
    given = [c.tensor(2) for _ in range(c.pick(len(fields), 0, 1, 9))]
    return lambda: name(*given), lambda found: all(
        getattr(found, field) is value for field, value in zip(fields, given, strict=False)
    )


feature_pairs = pair(*FEATURES)
CHEAP: dict[str, Plan] = {
    **dict.fromkeys(("kd_loss", "KDLoss"), logits("kd")),
    **dict.fromkeys(("dkd_loss", "DKDLoss"), logits("dkd")),
    **dict.fromkeys(("dist_loss", "DISTLoss"), logits("dist")),
    **dict.fromkeys(("linear_kd_loss", "LinearKDLoss"), linear),
    **dict.fromkeys(("fitnet_loss", "sp_loss", "SPLoss", "pkt_loss", "PKTLoss"), feature_pairs),
    "hcl_loss": pair((2, 3, 8, 8), (1, 2, 4, 4), (2, 3, 1, 1), (2, 3, 5, 7)),
    **dict.fromkeys(
        ("at_loss", "ATLoss"),
        pair((2, 3, 4, 4), (1, 1, 1, 1), p=(2.0, 1, 0.5, 4, 0.0, -1.0, math.nan, math.inf, None)),
    ),
    **dict.fromkeys(
        ("rkd_loss", "RKDLoss"),
        pair(*FEATURES, distance_weight=WEIGHTS, angle_weight=WEIGHTS),
    ),
    **dict.fromkeys(("dc_loss", "DCLoss"), pair(*FEATURES, normalize_rows=FLAGS)),
    **dict.fromkeys(
        ("cc_loss", "CCLoss"),
        pair(
            *FEATURES,
            kernel=("gaussian", "bilinear", "other", None),
            gamma=(0.4, 0.0, -1.0, 1e5, math.nan, None),
            order=(2, 1, 0, -1, 9, None, 1.5),
        ),
    ),
    **dict.fromkeys(("FitNetLoss", "VIDLoss", "ReviewKDLoss"), channels),
    "vid_loss": vid,
    **dict.fromkeys(("ckd_loss", "CKDLoss"), comparative),
    "class_activations": activations,
    "catkd_loss": catkd,
    "e2kd_loss": e2kd,
    "cam_from": maps_from,
    **dict.fromkeys(
        (
            "distance_correlation",
            "partial_distance_correlation",
            "jackknife",
            "permutation_test",
        ),
        correlation,
    ),
    **dict.fromkeys(("layer_scores", "layer_standard_errors"), layered),
    **dict.fromkeys(("FeatureSimilarityScore", "RelevanceScore"), similarity),
    **dict.fromkeys(("projected_width", "RandomProjection"), projection),
    **dict.fromkeys(
        ("cosine_agreement", "pearson_agreement", "spearman_agreement"),
        pair(*MAPS, check=tensor_of(1), grad=False),
    ),
    "ssim_agreement": pair(*MAPS, check=tensor_of(1), grad=False, **SSIM),
    "top_agreement": pair(*MAPS, check=tensor_of(1), grad=False, **TOP),
    "ExplanationAgreement": agreements,
    **dict.fromkeys(
        ("pointing_game", "PointingGame", "energy_pointing_game", "EnergyPointingGame"), pointing
    ),
    "box_masks": boxes,
    **dict.fromkeys(("image_grids", "grid_pointing_game", "GridPointingGame"), grids),
    "blurred": blurry,
    **dict.fromkeys(("backends", "use_backend"), backend),
    **dict.fromkeys(
        (
            "ADCCScores",
            "ConfidenceChange",
            "Estimate",
            "KDLossParts",
            "PermutationTest",
            "PerturbationCurve",
            "Randomisation",
        ),
        named,
    ),
}
WITH_MODELS: dict[str, Plan] = {
    **dict.fromkeys(("kdiga_loss", "KDIGALoss", "mixkd_loss", "MixKDLoss"), on_inputs),
    "CATKDLoss": catkd,
    "E2KDLoss": e2kd,
    **dict.fromkeys(
        (
            "AblationCAM",
            "CAM",
            "EigenCAM",
            "EigenGradCAM",
            "FinerCAM",
            "GradCAM",
            "GradCAMElementWise",
            "GradCAMPlusPlus",
            "HiResCAM",
            "LayerCAM",
            "ScoreCAM",
            "XGradCAM",
        ),
        explainer,
    ),
    "UniCAM": unicam,
    "ExplanationMonitor": monitored,
    "capture": captured,
    "linear_imputation": imputation,
    **dict.fromkeys(("deletion_curve", "DeletionAUC"), faithful("deletion")),
    **dict.fromkeys(("insertion_curve", "InsertionAUC"), faithful("insertion")),
    **dict.fromkeys(("confidence_change", "AverageDrop"), faithful("confidence")),
    "AverageIncrease": faithful("increase"),
    **dict.fromkeys(("road_score", "ROAD"), faithful("road")),
    **dict.fromkeys(("relevant_images", "relevant_features"), relevant),
    **dict.fromkeys(("adcc", "ADCC"), coherent),
    **dict.fromkeys(("randomisation_check", "RandomisationCheck"), randomised),
}
