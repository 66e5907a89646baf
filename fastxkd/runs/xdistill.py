"""The student of a run that is shown explanations: how it is built, and how it is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastxkd.cam.attribution import SIGNS
from fastxkd.ops._checks import check_choice, check_factors, check_positive
from fastxkd.runs.data import ImageData, TrainBatches
from fastxkd.runs.explained_batches import ExplainedBatches, explanation_cache
from fastxkd.runs.explanation_cache import check_folder
from fastxkd.runs.models import load_model
from fastxkd.train.autoencoder import ExplanationAutoencoder
from fastxkd.train.distiller import Distiller, TrainSettings
from fastxkd.train.fusion import FIRST_WEIGHTS, FUSIONS, ExplainedStudent
from fastxkd.train.medtex import MedTEXDistiller
from fastxkd.train.teacher_maps import EXPLAINERS, JOINS, TeacherExplanations
from fastxkd.train.xdistillation import XDistiller

METHODS = ("kd", "xdistill", "medtex")


@dataclass
class ExplainedOptions:
    """What ``--method xdistill`` and ``medtex`` ask for besides the common; see the options."""

    fusion: str = "concat"
    explainers: Sequence[str] = ("gradcam",)
    join: str = "concat"
    sign: str = "absolute"
    first_weights: str = "zeros"
    explanation_weight: float = 1.0
    ssim_weight: float = 0.0
    match_weight: float = 0.0
    phi_epochs: int = 50
    phi_lr: float = 1e-3
    freeze_phi: bool = False
    explanations: Path | None = None
    vid_weight: float = 1.0
    sparsity_weight: float = 1e-2
    reference_kd: bool = True

    def settings(self, method: str) -> dict[str, Any]:
        """What decides the trained weights, of the options that ``method`` has."""
        found = {name: getattr(self, name) for name in _OF[method] if name not in _BESIDE}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}


_OF = {
    "kd": (),
    "xdistill": (
        "fusion",
        "explainers",
        "join",
        "sign",
        "first_weights",
        "explanation_weight",
        "ssim_weight",
        "match_weight",
        "phi_epochs",
        "phi_lr",
        "freeze_phi",
        "explanations",
        "reference_kd",
    ),
    "medtex": ("vid_weight", "sparsity_weight", "reference_kd"),
}
# Where maps lie and what the student is compared with decide no weights.
_BESIDE = ("explanations", "reference_kd")


def explained_options(method: str, given: Mapping[str, Any]) -> ExplainedOptions | None:
    """The options out of those that were given (not None); None for plain distillation.

    Raises:
        ValueError: an unknown method, or an option that it does not have.
    """
    check_method(method)
    asked = {name: value for name, value in given.items() if value is not None}
    for name in asked:
        if name not in _OF[method]:
            owners = " or ".join(m for m in METHODS if name in _OF[m])
            raise ValueError(f"{name}: belongs to --method {owners}, the method is {method}")
    return None if method == "kd" else ExplainedOptions(**asked)


def check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")


def check_options(method: str, options: ExplainedOptions) -> None:
    """Raise ValueError for what would otherwise fail only once the teacher is trained."""
    check_method(method)
    check_factors(
        explanation_weight=options.explanation_weight,
        ssim_weight=options.ssim_weight,
        match_weight=options.match_weight,
        vid_weight=options.vid_weight,
        sparsity_weight=options.sparsity_weight,
    )
    if method == "xdistill":
        check_positive(phi_lr=options.phi_lr)
        if options.phi_epochs < 0:
            raise ValueError(f"phi_epochs: expected 0 or more, got {options.phi_epochs}")
        check_choice("first_weights", options.first_weights, FIRST_WEIGHTS)
        check_choice("join", options.join, JOINS)
        check_choice("sign", options.sign, SIGNS)
        if options.explanations is not None:
            check_folder(options.explanations)
        fusions = [fusion for fusion in FUSIONS if fusion != "mask"]
        if options.fusion not in fusions:
            raise ValueError(
                f"fusion: expected one of {', '.join(fusions)}, got {options.fusion!r}"
            )
        unknown = [name for name in options.explainers if name not in EXPLAINERS]
        if len(set(options.explainers)) < len(options.explainers):
            raise ValueError(
                f"explainers: expected different ones, got {', '.join(options.explainers)}"
            )
        if "cam" in options.explainers and options.fusion == "feature":
            raise ValueError(
                "explainers: cam asks for one head on the student's features, which"
                " fusion='feature' gives a second beside it"
            )
        if unknown or not options.explainers:
            raise ValueError(
                f"explainers: expected some of {', '.join(EXPLAINERS)}, got"
                f" {', '.join(map(repr, unknown)) or 'none'}"
            )


def check_cam(
    models: Mapping[str, nn.Module],
    options: ExplainedOptions,
    layers: Mapping[str, Sequence[str]],
    example: torch.Tensor,
) -> None:
    """Raise ValueError where CAM, which not every model allows, is asked for and cannot be had."""
    if "cam" in options.explainers:
        for role, model in models.items():
            TeacherExplanations(model, "cam", target_layers=[layers[role][-1]])(example)


def explained_student(
    classifier: nn.Module,
    method: str,
    options: ExplainedOptions,
    *,
    channels: int,
    layer: str,
    seed: int,
) -> ExplainedStudent:
    """``classifier``, taken over, and a phi whose first weights depend on the seed alone.

    Args:
        layer: of the classifier, the one that attends where the fusion is ``attend``.
    """
    torch.manual_seed(seed)
    if method == "medtex":
        return ExplainedStudent(classifier, ExplanationAutoencoder(channels), fusion="mask")
    if options.fusion == "none":
        return ExplainedStudent(classifier, None, fusion="none")
    maps = 1 if options.join == "mean" else len(options.explainers)
    return ExplainedStudent(
        classifier,
        ExplanationAutoencoder(channels, maps),
        fusion=options.fusion,
        first_weights=options.first_weights,
        at=layer if options.fusion == "attend" else None,
    )


def teacher_explanations(
    teacher: nn.Module, options: ExplainedOptions, layer: str, seed: int
) -> TeacherExplanations:
    return TeacherExplanations(
        teacher,
        options.explainers,
        target_layers=[layer],
        join=options.join,
        sign=options.sign,
        seed=seed,
    )


def explained_trainer(
    student: ExplainedStudent,
    data: ImageData,
    settings: TrainSettings,
    method: str,
    options: ExplainedOptions,
    *,
    layers: Mapping[str, Sequence[str]],
    folder: Path,
    batch_options: Mapping[str, Any],
    identity: Mapping[str, Any],
    measure: Callable[[str, int, int], None],
    **common: Any,
) -> Distiller:
    """The trainer of a run's student; the teacher's maps are computed where they are missing.

    Args:
        layers: role to layer names, paired; the last of the teacher is explained.
        folder: of the maps on disk.
        batch_options: as for :class:`TrainBatches`.
        measure: called with (what, done, total) as maps are made.
        common: as for :class:`Distiller`, ``teacher`` among them.
    """
    if method == "medtex":
        return MedTEXDistiller(
            student,
            TrainBatches(data, **batch_options),
            settings,
            layers=list(zip(layers["student"], layers["teacher"], strict=True)),
            vid_weight=options.vid_weight,
            sparsity_weight=options.sparsity_weight,
            identity=identity,
            **common,
        )
    if student.phi is None and not options.match_weight:
        return XDistiller(
            student, TrainBatches(data, **batch_options), settings, identity=identity, **common
        )
    common["teacher"].to(common["device"]).eval()
    explanations = teacher_explanations(
        common["teacher"], options, layers["teacher"][-1], settings.seed
    )
    maps = explanation_cache(
        folder,
        explanations,
        data,
        device=common["device"],
        progress=lambda done, total: measure("the teacher's maps", done, total),
    )
    return XDistiller(
        student,
        ExplainedBatches(data, maps, **batch_options),
        settings,
        explanation_weight=options.explanation_weight,
        ssim_weight=options.ssim_weight,
        match_weight=options.match_weight,
        match_layer=layers["student"][-1] if options.match_weight else None,
        phi_epochs=options.phi_epochs,
        phi_lr=options.phi_lr,
        freeze_phi=options.freeze_phi,
        identity={**identity, "explanations": maps.key},
        **common,
    )


def recipe(student: ExplainedStudent, spec: str, data: ImageData) -> dict[str, Any]:
    """How to build ``student`` again around the model ``spec``, as plain values."""
    phi = student.phi
    assert phi is None or isinstance(phi, ExplanationAutoencoder)
    return {
        "student": spec,
        "classes": len(data.classes),
        "channels": data.channels,
        "fusion": student.fusion,
        "at": student.at,
        "phi": None
        if phi is None
        else {"maps": phi.maps, "widths": phi.widths, "decoder": phi.decoder_widths},
    }


def from_recipe(recipe: Mapping[str, Any], *, num_classes: int, in_channels: int) -> nn.Module:
    """The model of :func:`recipe`, with fresh weights.

    Raises:
        ValueError: it was made for other classes or channels, or is no recipe.
    """
    try:
        classes, channels = int(recipe["classes"]), int(recipe["channels"])
        spec, fusion = str(recipe["student"]), str(recipe["fusion"])
        at, phi = recipe["at"], recipe["phi"]
        shape = None if phi is None else [tuple(phi[k]) for k in ("widths", "decoder")]
        maps = 0 if phi is None else int(phi["maps"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"model: no recipe of an explained student ({error})") from error
    for name, made, wanted in (
        ("num_classes", classes, num_classes),
        ("in_channels", channels, in_channels),
    ):
        if made != wanted:
            raise ValueError(f"model: this student was made with {name}={made}, not {wanted}")
    classifier = load_model(spec, num_classes=classes, in_channels=channels)
    if shape is None:
        return ExplainedStudent(classifier, None, fusion="none")
    explainer = ExplanationAutoencoder(in_channels, maps, widths=shape[0], decoder=shape[1])
    return ExplainedStudent(classifier, explainer, fusion=fusion, at=at)
