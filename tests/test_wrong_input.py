"""What bad input gets, clause by clause: the kind of error, and a text that names the argument,
what came and what was expected."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastxkd
from fastxkd.cam import unicam_weights
from tests.conftest import needs

S, T, Y = torch.zeros(4, 10), torch.zeros(4, 10), torch.arange(4)
A = torch.rand(2, 3, 5, 5)
X = torch.rand(8, 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.flat = nn.Flatten()
        self.head = nn.Linear(4 * 36, 10)
        self.spare = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.flat(self.conv(images).relu()))


NET, OTHER = Net().eval(), Net().eval()
IMAGES = torch.rand(4, 3, 8, 8)
CAM = fastxkd.GradCAM(NET, "conv")
UNICAM = fastxkd.UniCAM(NET, OTHER, "conv")


def kd(student: Any = S, teacher: Any = T, labels: Any = Y, **options: Any) -> Any:
    return fastxkd.kd_loss(student, teacher, labels, **options)


def fss(mode: str, *batches: tuple[Tensor, Tensor]) -> Any:
    metric = fastxkd.FeatureSimilarityScore(mode)
    for batch in batches:
        metric.update(*batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return metric.compute()


Case = tuple[Callable[[], Any], type[Exception], str]

SHAPE_MISMATCH: dict[str, Case] = {
    "kd_loss rows": (
        lambda: kd(teacher=torch.zeros(5, 10)),
        ValueError,
        r"teacher_logits: expected the shape of student_logits \[4, 10\], got \[5, 10\]",
    ),
    "kd_loss labels": (
        lambda: kd(labels=torch.arange(3)),
        ValueError,
        r"labels: expected \[4\] to match student_logits \[4, 10\], got \[3\]",
    ),
    "kd_loss labels in a column": (
        lambda: kd(labels=Y[:, None]),
        ValueError,
        r"labels: expected \[4\] to match student_logits \[4, 10\], got \[4, 1\]",
    ),
    "kd_loss vector": (
        lambda: kd(S[0], T[0], None),
        ValueError,
        r"student_logits: expected \[..., rows, classes\], got shape \[10\]",
    ),
    "kd_loss class_weight": (
        lambda: kd(class_weight=torch.ones(9)),
        ValueError,
        r"class_weight: expected one weight per class, \[10\], got \[9\]",
    ),
    "kd_loss without classes": (
        lambda: kd(S[:, :0], T[:, :0], None),
        ValueError,
        r"student_logits: expected at least one class, got \[4, 0\]",
    ),
    "cam_from gradients": (
        lambda: fastxkd.cam_from(A, A[..., :4]),
        ValueError,
        r"gradients: expected \[2, 3, 5, 5\] to match activations .*got \[2, 3, 5, 4\]",
    ),
    "cam_from weights": (
        lambda: fastxkd.cam_from(A, A, "weights"),
        ValueError,
        r"gradients: expected \[2, 3\] to match activations .*got \[2, 3, 5, 5\]",
    ),
    "cam_from size": (
        lambda: fastxkd.cam_from(A, A, size=(0, 4)),
        ValueError,
        r"size: expected \(height, width\) of at least 1, got \(0, 4\)",
    ),
    "distance rows": (
        lambda: fastxkd.distance_correlation(X, X[:7]),
        ValueError,
        "y: expected 8 rows as in x, got 7",
    ),
    "distance vector": (
        lambda: fastxkd.distance_correlation(X, X[:, 0]),
        ValueError,
        r"y: expected features \[n, ...\] with at least one value a row, got shape \[8\]",
    ),
    "partial rows": (
        lambda: fastxkd.partial_distance_correlation(X, X, given=X[:7]),
        ValueError,
        "given: expected 8 rows as in x, got 7",
    ),
    "layer_scores rows": (
        lambda: fastxkd.layer_scores({"a": X}, {"b": X[:7]}, torch.arange(8) % 2),
        ValueError,
        r"base\['b'\]: expected 8 rows as in student\['a'\], got 7",
    ),
    "layer_scores layers": (
        lambda: fastxkd.layer_scores({"a": X}, {"a": X, "b": X}, torch.arange(8) % 2),
        ValueError,
        "base: expected 1 layers to pair with the student's, got 2: a, b",
    ),
    "layer_scores targets": (
        lambda: fastxkd.layer_scores({"a": X}, {"a": X}, torch.arange(7) % 2),
        ValueError,
        r"targets: expected 8 rows as in student\['a'\], got 7",
    ),
    "FeatureSimilarityScore rows": (
        lambda: fss("dataset", (X, X[:7])),
        ValueError,
        "base: expected 8 rows as in student, got 7",
    ),
    "GradCAM targets": (
        lambda: CAM(IMAGES, [1, 2]),
        ValueError,
        "targets: expected 4, one per image, got 2",
    ),
    "GradCAM target tensor": (
        lambda: CAM(IMAGES, torch.arange(3)),
        ValueError,
        r"targets: expected 4 class indices, one per image, got torch.int64 \[3\]",
    ),
    "UniCAM labels": (
        lambda: UNICAM(IMAGES, torch.arange(5)),
        ValueError,
        "labels_or_embeddings: expected 4 rows, one per image, got 5",
    ),
    "unicam_weights base": (
        lambda: unicam_weights(torch.rand(8, 2, 3, 3), X[:7], torch.arange(8) % 2),
        ValueError,
        "base_features: expected 8 rows, one per image, got 7",
    ),
    "UniCAM layers": (
        lambda: fastxkd.UniCAM(NET, OTHER, ["conv"], ["conv", "head"]),
        ValueError,
        "base_layers: expected 1 to pair with target_layers, got 2",
    ),
}

DTYPE_MISMATCH: dict[str, Case] = {
    "kd_loss teacher": (
        lambda: kd(teacher=T.double()),
        TypeError,
        "teacher_logits: expected torch.float32, the dtype of student_logits, or another",
    ),
    "kd_loss integer logits": (
        lambda: kd(S.long(), T.long()),
        TypeError,
        "student_logits: expected a floating-point dtype, got torch.int64",
    ),
    "kd_loss labels of another integer": (
        lambda: kd(labels=Y.int()),
        TypeError,
        "labels: expected torch.int64 class indices, got torch.int32",
    ),
    "kd_loss soft labels": (
        lambda: kd(labels=S),
        TypeError,
        "labels: expected torch.int64 class indices, got torch.float32",
    ),
    "kd_loss student is no tensor": (
        lambda: kd(S.numpy()),
        TypeError,
        "student_logits: expected a Tensor, got ndarray",
    ),
    "kd_loss teacher is no tensor": (
        lambda: kd(teacher=[1]),
        TypeError,
        "teacher_logits: expected Tensors, got int",
    ),
    "kd_loss labels are no tensor": (
        lambda: kd(labels=[0, 1, 2, 3]),
        TypeError,
        "labels: expected .*got list",
    ),
    "kd_loss class_weight is no tensor": (
        lambda: kd(class_weight=[1.0] * 10),
        TypeError,
        "class_weight: expected .*got list",
    ),
    "cam_from dtypes": (
        lambda: fastxkd.cam_from(A, A.double()),
        TypeError,
        "gradients: expected the dtype of activations, torch.float32, got torch.float64",
    ),
    "cam_from integers": (
        lambda: fastxkd.cam_from(A.long(), A.long()),
        TypeError,
        "activations: expected a floating-point dtype, got torch.int64",
    ),
    "cam_from no tensor": (
        lambda: fastxkd.cam_from(A, None),
        TypeError,
        "gradients: expected a Tensor, got NoneType",
    ),
    "distance integers": (
        lambda: fastxkd.distance_correlation(X, X.long()),
        TypeError,
        "y: expected a floating-point dtype, got torch.int64",
    ),
    "distance no tensor": (
        lambda: fastxkd.distance_correlation(X.tolist(), X),
        TypeError,
        "x: expected a Tensor, got list",
    ),
    "layer_scores targets": (
        lambda: fastxkd.layer_scores({"a": X}, {"a": X}, [0, 1] * 4),
        TypeError,
        "targets: expected a Tensor, got list",
    ),
    "layer_scores float labels": (
        lambda: fastxkd.layer_scores({"a": X}, {"a": X}, torch.rand(8)),
        ValueError,
        r"targets: expected embeddings \[n, e\] or int64 class indices \[n\], got torch.float32",
    ),
    "layer_scores integer matrix": (
        lambda: fastxkd.layer_scores({"a": X}, {"a": X}, torch.ones(8, 2).long()),
        ValueError,
        r"targets: expected int64 class indices \[n\], got torch.int64 \[8, 2\]",
    ),
    "GradCAM images": (
        lambda: CAM(IMAGES.numpy()),
        TypeError,
        "images: expected a Tensor, got ndarray",
    ),
    "GradCAM float targets": (
        lambda: CAM(IMAGES, torch.rand(4)),
        ValueError,
        "targets: expected 4 class indices, one per image, got torch.float32",
    ),
    "GradCAM targets of a strange kind": (
        lambda: CAM(IMAGES, ["cat"] * 4),
        TypeError,
        "targets: expected ints or callables, got str",
    ),
    "UniCAM images": (
        lambda: UNICAM(None, Y),
        TypeError,
        "images: expected a Tensor, got NoneType",
    ),
    "UniCAM labels": (
        lambda: UNICAM(IMAGES, [0, 1, 0, 1]),
        TypeError,
        "labels_or_embeddings: expected a Tensor, got list",
    ),
    "target layer of a strange kind": (
        lambda: fastxkd.GradCAM(NET, [3]),
        TypeError,
        "target_layers: expected names or modules of Net, got int",
    ),
}

LOGIT_LOSSES = (fastxkd.KDLoss, fastxkd.DKDLoss, fastxkd.DISTLoss)
OPTIONS: dict[str, Case] = {
    **{
        f"{loss.__name__} {name} {value}": (
            lambda loss=loss, name=name, value=value: loss(**{name: value}),
            error,
            f"{name}: expected {expected}",
        )
        for loss in (*LOGIT_LOSSES, fastxkd.LinearKDLoss)
        for name, value, error, expected in (
            ("class_weight", [1.0], TypeError, "a Tensor or None, got list"),
            ("class_weight", torch.ones(2, 2), ValueError, r".*\[classes\], got \[2, 2\]"),
            ("class_weight", torch.ones(2, dtype=torch.long), ValueError, ".*got .* torch.int64"),
            ("teacher_weights", 0.5, TypeError, "a sequence of numbers.*got 0.5"),
            ("teacher_weights", "ab", TypeError, "a sequence of numbers.*got 'ab'"),
            ("teacher_weights", ["a"], TypeError, "a number, got str"),
            ("teacher_weights", [0.0, 0.0], ValueError, "finite numbers of at least 0, not all 0"),
        )
        if not (name == "teacher_weights" and loss is fastxkd.LinearKDLoss)
    },
    **{
        f"LinearKDLoss {name} {value}": (
            lambda name=name, value=value: fastxkd.LinearKDLoss(**{name: value}),
            error,
            f"{name}: expected {expected}",
        )
        for name, value, error, expected in (
            ("chunk_rows", 0, ValueError, "at least 1, got 0"),
            ("chunk_rows", 1.5, TypeError, "an int or None, got float"),
            ("accumulate_dtype", "float32", TypeError, "a torch.dtype or None, got str"),
        )
    },
    **{
        f"temperature 1e7 of {loss.__name__}": (
            lambda loss=loss, models=models: loss(*models, temperature=1e7),
            ValueError,
            "temperature: expected a number from 1e-06 to 1e\\+06, got 10000000",
        )
        for loss, models in (
            *((loss, ()) for loss in (*LOGIT_LOSSES, fastxkd.LinearKDLoss, fastxkd.CKDLoss)),
            *((loss, (NET, NET)) for loss in (fastxkd.KDIGALoss, fastxkd.MixKDLoss)),
            (fastxkd.E2KDLoss, (NET, None, ["0"], None)),
        )
    },
    **{
        f"temperature {t}": (
            lambda t=t: kd(temperature=t),
            ValueError,
            f"temperature: expected a finite number above 0, got {t}",
        )
        for t in (0, -1.0, float("inf"), float("nan"))
    },
    **{
        f"{name} {w}": (
            lambda name=name, w=w: kd(**{name: w}),
            ValueError,
            f"{name}: expected a finite number of at least 0, got {w}",
        )
        for name in ("ce_weight", "kd_weight")
        for w in (-0.1, float("nan"), float("inf"))
    },
    "label_smoothing": (
        lambda: kd(label_smoothing=1.5),
        ValueError,
        r"label_smoothing: expected a number in \[0, 1\], got 1.5",
    ),
    "reduction": (
        lambda: kd(reduction="mean"),
        ValueError,
        "reduction: expected one of none, sum, batchmean, got 'mean'; .*batchmean",
    ),
    "divergence": (
        lambda: kd(divergence="hinton"),
        ValueError,
        "divergence: expected one of forward_kl, reverse_kl, jsd, tvd, got 'hinton'",
    ),
    "method": (
        lambda: fastxkd.cam_from(A, A, "scorecam"),
        ValueError,
        "method: expected one of gradcam, .*got 'scorecam'",
    ),
    "cam_from normalize": (
        lambda: fastxkd.cam_from(A, A, normalize="max"),
        ValueError,
        "normalize: expected 'minmax' or None, got 'max'",
    ),
    "GradCAM normalize": (
        lambda: CAM(IMAGES, normalize="max"),
        ValueError,
        "normalize: expected 'minmax' or None, got 'max'",
    ),
    "GradCAM output": (
        lambda: CAM(IMAGES, output="pil"),
        ValueError,
        "output: expected 'tensor' or 'numpy', got 'pil'",
    ),
    "GradCAM size": (
        lambda: CAM(IMAGES, size="layer"),
        ValueError,
        r"size: expected 'input', None or \(height, width\), got 'layer'",
    ),
    "GradCAM aggregate": (
        lambda: CAM(IMAGES, aggregate="max"),
        ValueError,
        "aggregate: expected 'mean' or None, got 'max'",
    ),
    "GradCAM targets beside an objective": (
        lambda: CAM(IMAGES, 1, objective=torch.sum),
        ValueError,
        "targets: expected None beside an objective, got both",
    ),
    "GradCAM objective": (
        lambda: CAM(IMAGES, objective=lambda out: out),
        ValueError,
        r"objective: expected a scalar Tensor, got \[4, 10\]",
    ),
    "GradCAM score of nothing": (
        lambda: CAM(IMAGES, objective=lambda out: torch.zeros(())),
        ValueError,
        "the score does not depend on the target layers",
    ),
    "capture score": (
        lambda: captured().cam(score=torch.zeros(3)),
        ValueError,
        r"score: expected a scalar with a graph, got \[3\]",
    ),
    "metric mode": (
        lambda: fss("epoch"),
        ValueError,
        "mode: expected one of dataset, batch, got 'epoch'",
    ),
}


def captured() -> fastxkd.capture:
    with fastxkd.capture(NET, "conv") as kept:
        NET(IMAGES)
    return kept


def check(case: Case) -> None:
    call, kind, message = case
    with pytest.raises(kind, match=message) as caught:
        call()
    assert type(caught.value) is kind


@pytest.mark.parametrize("case", SHAPE_MISMATCH)
def test_shape_mismatch(case: str) -> None:
    check(SHAPE_MISMATCH[case])


@pytest.mark.parametrize("case", DTYPE_MISMATCH)
def test_dtype_mismatch(case: str) -> None:
    check(DTYPE_MISMATCH[case])


@pytest.mark.parametrize("case", OPTIONS)
def test_option_out_of_range(case: str) -> None:
    check(OPTIONS[case])


@pytest.mark.parametrize("label", [10, -1, -101, 2**40], ids=str)
@pytest.mark.parametrize("need_grad", [True, False])
def test_labels_out_of_range(backend: str, label: int, need_grad: bool) -> None:
    labels = torch.tensor([1, 3, 2, label])
    student = S.clone().requires_grad_(need_grad)
    with pytest.raises(
        ValueError,
        match=r"labels: expected 0 <= label < 10 \(the classes of student_logits\) or"
        rf" ignore_index -100, got {label} at position 3",
    ):
        fastxkd.kd_loss(student, T, labels)
    # The same where the labels are not even needed for the value.
    with pytest.raises(ValueError, match=f"labels: .*got {label} at position 3"):
        fastxkd.kd_loss(student, T, labels, ce_weight=0)
    fastxkd.kd_loss(student, T, labels, ignore_index=label)


@pytest.mark.parametrize("target", [10, -1, [0, 1, 2, 99], torch.tensor([0, -3, 1, 1])], ids=str)
def test_targets_out_of_range(target: Any) -> None:
    wrong = next(t for t in (10, -1, 99, -3) if t in torch.as_tensor(target).reshape(-1).tolist())
    with pytest.raises(ValueError, match=f"targets: expected 0 <= class < 10, got {wrong}"):
        CAM(IMAGES, target)


def test_class_count_mismatch() -> None:
    with pytest.raises(
        ValueError,
        match=r"teacher_logits: expected 10 classes as in student_logits \[4, 10\],"
        r" got 12 in \[4, 12\]",
    ):
        kd(teacher=torch.zeros(4, 12))


@pytest.mark.parametrize("n", [1, 3])
def test_fewer_than_four_for_u_statistics(backend: str, n: int) -> None:
    x, y = torch.rand(n, 3), torch.arange(n)
    for call, name in {
        lambda: fastxkd.distance_correlation(x, x): "x",
        lambda: fastxkd.distance_correlation(x, x, unbiased=False): "x",
        lambda: fastxkd.partial_distance_correlation(x, x, given=x): "x",
        lambda: fastxkd.layer_scores({"a": x}, {"a": x}, y): r"student\['a'\]",
        lambda: fss("dataset", (x, x)): "student",
        lambda: unicam_weights(torch.rand(n, 2, 3, 3), x, y): "activations",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}: expected at least 4 rows.*got {n}"):
            call()
    with pytest.raises(
        ValueError, match=rf"images: expected a batch .* of at least 4, got \[{n}, 3, 8, 8\]"
    ):
        UNICAM(IMAGES[:n], y)


def test_empty_batch() -> None:
    with pytest.raises(
        ValueError, match=r"images: expected a batch .*with n > 0, got \[0, 3, 8, 8\]"
    ):
        CAM(IMAGES[:0])
    with pytest.raises(ValueError, match=r"images: .*got \[0, 3, 8, 8\]"):
        UNICAM(IMAGES[:0], Y[:0])
    with pytest.raises(ValueError, match=r"x: expected .*got"):
        fastxkd.distance_correlation(X[:0], X[:0])
    with pytest.raises(ValueError, match=r"FeatureSimilarityScore: compute\(\) before any"):
        fss("dataset")
    with pytest.raises(ValueError, match="FeatureSimilarityScore: no batch with a score"):
        fss("batch")


def test_empty_batch_has_no_mean(backend: str) -> None:
    with pytest.raises(ValueError, match=r"student_logits: expected .*got \[0, 10\]"):
        kd(S[:0], T[:0], Y[:0])


def test_target_layer_never_reached() -> None:
    for call in (
        lambda: fastxkd.GradCAM(NET, "spare")(IMAGES),
        lambda: fastxkd.GradCAM(NET, ["conv", NET.spare])(IMAGES),
        lambda: fastxkd.UniCAM(NET, OTHER, "conv", "spare")(IMAGES, Y),
    ):
        with pytest.raises(
            ValueError, match="target layer 'spare' was never reached in the forward pass"
        ):
            call()
    with fastxkd.capture(NET, "spare") as kept:
        NET(IMAGES)
    with pytest.raises(ValueError, match="target layer 'spare' was never reached"):
        _ = kept.activations


def test_target_layer_behind_the_score() -> None:
    """Reached, but nothing flows from it into what is explained."""
    model = nn.Module()
    model.conv, model.other, model.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(images: Tensor) -> Tensor:
        model.other(images)
        return model.head(model.conv(images).mean((2, 3)))

    model.forward = forward
    with pytest.raises(ValueError, match="target layer 'other': the score does not depend on it"):
        fastxkd.GradCAM(model, ["conv", "other"])(IMAGES)


def test_unknown_layer_name() -> None:
    message = "Net has no layer named 'convv'; did you mean 'conv'"
    for argument, call in {
        "target_layers": lambda: fastxkd.GradCAM(NET, "convv"),
        "layers": lambda: fastxkd.capture(NET, ["convv"]),
        "base_layers": lambda: fastxkd.UniCAM(NET, OTHER, "conv", "convv"),
    }.items():
        with pytest.raises(ValueError, match=f"{argument}: {message}"):
            call()
    with pytest.raises(ValueError, match=r"target_layers: Net has no layer named 'zzz'$"):
        fastxkd.GradCAM(NET, "zzz")
    with pytest.raises(ValueError, match="target_layers: Net has no layer named ''"):
        fastxkd.GradCAM(NET, "")


def test_layer_of_another_model() -> None:
    with pytest.raises(
        ValueError, match="target_layers: expected a layer of Net, got a Conv2d that is not part"
    ):
        fastxkd.GradCAM(NET, [OTHER.conv])


def test_no_layer() -> None:
    with pytest.raises(ValueError, match="target_layers: expected at least one layer, got none"):
        fastxkd.GradCAM(NET, [])


def test_model_without_spatial_activations() -> None:
    for call in (
        lambda: fastxkd.GradCAM(NET, "head")(IMAGES),
        lambda: fastxkd.UniCAM(NET, OTHER, "head")(IMAGES, Y),
    ):
        with pytest.raises(
            ValueError,
            match=r"target layer 'head': expected spatial activations \[n, channels, height,"
            r" width\], got \[4, 10\]",
        ):
            call()
    with pytest.raises(ValueError, match=r"activations: expected spatial maps .*got.*\[2, 3, 5\]"):
        fastxkd.cam_from(A[..., 0], A[..., 0])
    with pytest.raises(ValueError, match=r"activations: expected spatial maps .*got.*\[8, 3\]"):
        unicam_weights(X, X, torch.arange(8) % 2)


def test_model_without_logits() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(
        ValueError, match=r"targets: the model returned \[4, 4, 6, 6\], not logits.*objective="
    ):
        fastxkd.GradCAM(model, "0")(IMAGES)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_bad_value_touches_its_sample_alone(backend: str, bad: float) -> None:
    images = IMAGES.clone()
    images[2, 0, 3, 3] = bad
    clean, dirty = CAM(IMAGES, 1), CAM(images, 1)
    rest = [0, 1, 3]
    torch.testing.assert_close(dirty[rest], clean[rest], rtol=0, atol=1e-6)
    # Losses and operators: test_kd_loss.py and test_cam.py, by the same name.


def test_all_rows_ignored(backend: str) -> None:
    student = S.clone().requires_grad_(True)
    loss = fastxkd.kd_loss(student, T + torch.rand(4, 10), torch.full((4,), -100))
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


def test_constant_features(backend: str) -> None:
    constant = torch.full((8, 3), 0.1)
    labels = torch.arange(8) % 2
    assert fastxkd.distance_correlation(constant, X).item() == 0
    assert fastxkd.distance_correlation(constant, X, unbiased=False).item() == 0
    assert fastxkd.partial_distance_correlation(X, constant, given=X.cos()).item() == 0
    (row,) = fastxkd.layer_scores({"a": constant}, {"a": X}, labels, teacher={"a": constant})
    assert (row.fss, row.fss_teacher, row.rs_student, row.rs_distilled) == (0, 0, 0, 0)
    assert fss("dataset", (constant, X)).item() == 0
    assert fss("batch", (constant, X)).item() == 0


def test_teacher_that_requires_grad(backend: str) -> None:
    student, teacher = (x.clone().requires_grad_(True) for x in (S, T))
    with pytest.raises(
        ValueError, match=r"teacher_logits: expected a tensor without gradient.*no_grad.*detach"
    ):
        fastxkd.kd_loss(student, teacher, Y)
    with torch.no_grad():
        fastxkd.kd_loss(student, teacher, Y)


def test_class_weight_that_requires_grad(backend: str) -> None:
    """No gradient is computed for it; to return none would be silently wrong."""
    weight = torch.ones(10, requires_grad=True)
    with pytest.raises(ValueError, match="class_weight: expected a tensor without gradient"):
        fastxkd.kd_loss(S.clone().requires_grad_(True), T, Y, class_weight=weight)


def test_second_backward(backend: str) -> None:
    loss = fastxkd.kd_loss(S.clone().requires_grad_(True), T, Y)
    loss.backward()
    with pytest.raises(RuntimeError, match="kd_loss: backward was called a second time"):
        loss.backward()


def test_devices_that_differ() -> None:
    meta = torch.device("meta")
    for call, name in {
        lambda: kd(teacher=T.to(meta)): "teacher_logits",
        lambda: kd(labels=Y.to(meta)): "labels",
        lambda: fastxkd.cam_from(A, A.to(meta)): "gradients",
        lambda: fastxkd.distance_correlation(X, X.to(meta)): "y",
    }.items():
        with pytest.raises(ValueError, match=f"{name}: expected the device of .*cpu, got meta"):
            call()


def test_missing_extra_names_the_command() -> None:
    from fastxkd._extras import require

    assert require("json", extra="report").dumps([]) == "[]"
    with pytest.raises(ImportError, match=r"'nowhere_to_be_found': pip install 'fastxkd\[cli\]'"):
        require("nowhere_to_be_found", extra="cli")
    assert needs("torchmetrics")


ODD: list[Case] = [
    (lambda: kd(teacher=T.to(torch.float8_e4m3fn)), TypeError, "teacher_logits: expected torch.fl"),
    (lambda: fastxkd.box_masks(torch.ones(1, 4), (5,)), ValueError, "size: expected (height, wid"),
    (lambda: fastxkd.class_activations(A, None), TypeError, "weight: expected a Tensor, got None"),
    (
        lambda: fastxkd.CATKDLoss(NET, OTHER, "conv", "conv")(torch.ones(())),
        ValueError,
        "images: expected [n, ...], got []",
    ),
    (
        lambda: fastxkd.relevant_features(None, "a", IMAGES, Y),
        TypeError,
        "model: expected a Module, got NoneType",
    ),
]


@pytest.mark.parametrize(("call", "kind", "text"), ODD, ids=[text[:12] for *_, text in ODD])
def test_odd(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as error:
        call()
    assert text in str(error.value)
