"""XDistillation: a student that learns the teacher's answers and is shown the teacher's reasons."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastxkd.cam.capture import capture, resolve_layers
from fastxkd.losses import e2kd_loss
from fastxkd.ops._checks import check_factors, check_flags, check_positive
from fastxkd.train.autoencoder import explanation_loss
from fastxkd.train.distiller import Batches, Distiller, Progress, TrainSettings, _logits, expect
from fastxkd.train.fusion import ExplainedStudent

__all__ = ["PhiTrainer", "XDistiller"]


class XDistiller(Distiller):
    r"""Trains an :class:`ExplainedStudent` in two stages (Alharbi, Vu and Thai 2021).

    First phi alone, on :func:`explanation_loss` with the teacher's maps; then phi and student
    together on

    .. math:: ce\_weight \cdot CE(z_s, y) + kd\_weight \cdot T^2 KL(z_t \| z_s)
        + explanation\_weight \cdot L_{exp}(\phi(x), E_T(x))
        + match\_weight \cdot (1 - \cos(CAM_s(x), E_T(x)))

    The paper's layers, losses, weights and schedule are not known: everything here is an
    interpretation, and so an argument. The last term is no part of what is known of it and off
    unless asked for: e2KD's (Parchami-Araghi et al. 2024), with maps from disk, which makes the
    student's own explanation the teacher's.

    Args:
        student: an :class:`ExplainedStudent`, whose ``fusion`` says how it is told; trained in
            place, afterwards one module from images to logits. With ``fusion="none"`` this is
            plain distillation (the ablation without phi).
        batches: yields images, labels and the teacher's maps ``[n, k, h, w]`` in [0, 1] of these
            very images, moved with them where they were augmented: see
            :class:`fastxkd.runs.explained_batches.ExplainedBatches`. Both stages start from step 0.
        settings: of the second stage; see :class:`TrainSettings`.
        teacher: frozen by being run in eval mode without gradients.
        explanation_weight: of L_exp in the second stage.
        ssim_weight: of ``1 - SSIM`` in L_exp, in both stages.
        phi_epochs: of the first stage; 0 trains jointly from the start (the ablation without
            stage 1).
        phi_lr: highest learning rate of the first stage (Adam; warm-up and cosine as in the
            second).
        phi_weight_decay: in the first stage.
        match_weight: of the student's own Grad-CAM of the teacher's first choice, as it deviates
            from the first of the teacher's maps.
        match_layer: for that, the student's layer, such as ``student.stage4``.
        freeze_phi: keep phi as the first stage left it, running statistics included (ablation);
            with ``phi_epochs=0``, one that was trained before as it came.
        evaluate, device, checkpoint, checkpoint_seconds, identity, stage, progress, on_step: as
            for :class:`Distiller`. The first stage keeps its own checkpoint beside ``checkpoint``,
            ``NAME-phi``. ``on_step`` hears of the second stage.

    Stopping in either stage and resuming gives the same weights, bit for bit.

    Raises:
        ValueError, TypeError: options out of range, batches without maps, a student whose phi was
            frozen and would be trained.
    """

    student: ExplainedStudent

    def __init__(
        self,
        student: ExplainedStudent,
        batches: Batches,
        settings: TrainSettings,
        *,
        teacher: nn.Module,
        explanation_weight: float = 1.0,
        ssim_weight: float = 0.0,
        match_weight: float = 0.0,
        match_layer: str | None = None,
        phi_epochs: int = 50,
        phi_lr: float = 1e-3,
        phi_weight_decay: float = 0.0,
        freeze_phi: bool = False,
        identity: Mapping[str, Any] | None = None,
        checkpoint: str | Path | None = None,
        device: torch.device | str = "cpu",
        checkpoint_seconds: float = 30.0,
        stage: str = "student",
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(student, ExplainedStudent):
            raise TypeError(
                f"student: expected an ExplainedStudent, got {type(student).__name__}; wrap it:"
                " ExplainedStudent(student, ExplanationAutoencoder(channels, maps))"
            )
        expect("teacher", teacher, nn.Module)
        check_factors(
            explanation_weight=explanation_weight,
            ssim_weight=ssim_weight,
            match_weight=match_weight,
            phi_weight_decay=phi_weight_decay,
        )
        if match_weight and match_layer is None:
            raise ValueError(
                "match_layer: expected a layer of the student with match_weight, got None"
            )
        self.match_weight, self.match_layer = match_weight, match_layer
        if match_layer is not None:
            resolve_layers(student, match_layer, "match_layer", "student")
        check_positive(phi_lr=phi_lr)
        check_flags(freeze_phi=freeze_phi)
        if isinstance(phi_epochs, bool) or not isinstance(phi_epochs, int) or phi_epochs < 0:
            raise ValueError(f"phi_epochs: expected 0 or more, got {phi_epochs!r}")
        if student.phi_frozen and (phi_epochs or not freeze_phi):
            raise ValueError(
                "student: its phi is frozen, expected freeze_phi=True and phi_epochs=0; to train"
                " it, call student.freeze_phi(False)"
            )
        self.explanation_weight, self.ssim_weight = explanation_weight, ssim_weight
        self.freeze_phi = freeze_phi and student.phi is not None
        own = {
            "explanation_weight": explanation_weight,
            "ssim_weight": ssim_weight,
            "phi_epochs": phi_epochs,
            "phi_lr": phi_lr,
            "phi_weight_decay": phi_weight_decay,
            "freeze_phi": freeze_phi,
        }
        told = {"fusion": student.fusion, **(own if student.phi is not None else {})}
        if match_weight:
            told |= {"match_weight": match_weight, "match_layer": match_layer}
        common: dict[str, Any] = {
            "device": device,
            "checkpoint_seconds": checkpoint_seconds,
            "progress": progress,
        }
        super().__init__(
            student,
            batches,
            settings,
            teacher=teacher,
            identity={**(identity or {}), **told},
            checkpoint=checkpoint,
            stage=stage,
            **common,
            **options,
        )
        self._first: PhiTrainer | None = None
        if student.phi is not None and phi_epochs:
            self._first = PhiTrainer(
                student.phi,
                batches,
                settings,
                epochs=phi_epochs,
                lr=phi_lr,
                weight_decay=phi_weight_decay,
                ssim_weight=ssim_weight,
                identity=identity,
                checkpoint=_beside(self.checkpoint),
                **common,
            )

    @property
    def phi_history(self) -> list[dict[str, Any]]:
        """One record per epoch of the first stage."""
        return [] if self._first is None else self._first.history

    def fit(self, *, resume: bool = True) -> list[dict[str, Any]]:
        """Both stages to the end; what a checkpoint holds is not repeated.

        Returns, raises: as :meth:`Distiller.fit`, of the second stage.
        """
        further = resume and self.checkpoint is not None and self.checkpoint.exists()
        if self._first is not None and not (further and not _exists(self._first.checkpoint)):
            self._first.fit(resume=resume)
        if not self.freeze_phi:
            return super().fit(resume=resume)
        frozen = self.student.phi_frozen
        self.student.freeze_phi()
        try:
            return super().fit(resume=resume)
        finally:
            self.student.freeze_phi(frozen)

    def _loss(self, images: Tensor, labels: Tensor, *more: Tensor) -> Tensor:
        own = None
        if self.match_weight and self.match_layer is not None:
            own = capture(self.student, self.match_layer)
        with self._autocast(), own or nullcontext():
            logits, maps = self.student.explained(images.clone())  # as in Distiller
        logits, guidance = _logits(logits, self.stage), self._guidance(images)
        loss: Tensor = self._criterion(logits.float(), guidance.float(), labels)
        if maps is not None and not self.freeze_phi and self.explanation_weight:
            wanted = _target(more, maps)
            explained = explanation_loss(maps.float(), wanted, ssim_weight=self.ssim_weight)
            loss = loss + self.explanation_weight * explained
        if own is not None:
            height, width = images.shape[2:]
            cam = own.cam(
                score=logits.gather(1, guidance.argmax(1, keepdim=True)).sum(),
                size=(height, width),
                normalize=None,
                differentiable=True,
            )
            loss = loss + self.match_weight * e2kd_loss(cam, _given(more)[:, 0])
        return loss


class PhiTrainer(Distiller):
    r"""XDistillation's first stage alone: Adam on :math:`L_{exp}(\phi(x), E_T(x))`.

    :math:`L_{exp}` is :func:`explanation_loss`. One phi may serve several students: an
    :class:`XDistiller` of a student that holds it goes on from there with ``phi_epochs=0``, to the
    same weights as if it had trained phi itself. An interpretation, as all of that class.

    Args:
        phi: images ``[n, c, h, w]`` to maps ``[n, k, h, w]`` in [0, 1], such as
            :class:`ExplanationAutoencoder`; trained in place.
        batches: as for :class:`XDistiller`, maps of the shape of phi's.
        settings: of the second stage, of which batch size, warm-up, seed and ``amp`` hold here as
            well. The loss is float32 with ``amp``, too.
        epochs, lr, weight_decay: of this stage.
        ssim_weight: of ``1 - SSIM`` in the loss, 0 or more.
        identity, stage, rest: as for :class:`Distiller`.

    Raises:
        ValueError, TypeError: numbers out of range; in ``fit``, batches without maps.

    Source: Alharbi, Vu and Thai 2021, who say nothing of the stage's details.
    """

    def __init__(
        self,
        phi: nn.Module,
        batches: Batches,
        settings: TrainSettings,
        *,
        epochs: int,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        ssim_weight: float = 0.0,
        identity: Mapping[str, Any] | None = None,
        stage: str = "phi",
        **rest: Any,
    ) -> None:
        check_factors(ssim_weight=ssim_weight)
        self.ssim_weight = ssim_weight
        own = dataclasses.replace(
            settings, epochs=epochs, lr=lr, weight_decay=weight_decay, label_smoothing=0.0
        )
        facts = {**(identity or {}), "ssim_weight": ssim_weight}
        super().__init__(phi, batches, own, identity=facts, stage=stage, **rest)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            self.student.parameters(),
            lr=self.settings.lr,
            weight_decay=self.settings.weight_decay,
        )

    def _loss(self, images: Tensor, labels: Tensor, *more: Tensor) -> Tensor:
        with self._autocast():
            maps = self.student(images)
        return explanation_loss(maps.float(), _target(more, maps), ssim_weight=self.ssim_weight)


def _given(more: tuple[Tensor, ...]) -> Tensor:
    if len(more) != 1 or more[0].dim() != 4:
        raise ValueError(
            f"batches: expected images, labels and the teacher's maps, got {2 + len(more)} tensors"
        )
    return more[0]


def _target(more: tuple[Tensor, ...], maps: Tensor) -> Tensor:
    given = _given(more)
    if given.shape != maps.shape:
        raise ValueError(
            f"batches: expected the teacher's maps to have the shape of phi's, {list(maps.shape)},"
            f" got {list(given.shape)}"
        )
    return given


def _beside(checkpoint: Path | None) -> Path | None:
    if checkpoint is None:
        return None
    return checkpoint.with_name(f"{checkpoint.stem}-phi{checkpoint.suffix}")


def _exists(checkpoint: Path | None) -> bool:
    return checkpoint is not None and checkpoint.exists()
