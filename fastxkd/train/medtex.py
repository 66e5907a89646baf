"""MedTEX: an explainer masks the image, and the student answers from what is left of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastxkd.cam.capture import Tap, evaluating, resolve_layers
from fastxkd.losses import VIDLoss
from fastxkd.ops._checks import check_factors
from fastxkd.train.distiller import Batches, Distiller, TrainSettings, _logits, expect
from fastxkd.train.fusion import ExplainedStudent

__all__ = ["MedTEXDistiller"]


class MedTEXDistiller(Distiller):
    r"""Trains explainer and student together, on the teacher's answers to the whole image.

    .. math:: ce\_weight \cdot CE(z_s, y) + kd\_weight \cdot T^2 KL(z_t(x) \| z_s(x \cdot m))
        + \beta \sum_i VID_i + \eta \, mean(m)

    with m the explainer's importance of each pixel, in [0, 1], and :math:`VID_i` the variational
    bound on the mutual information of the i-th pair of layers (:class:`fastxkd.VIDLoss`). Only the
    masking, the sigmoid and that layers are paired is known of MedTEX (a self-explaining student
    for X-ray images); the loss and its weights are an interpretation. It has no labels:
    ``TrainSettings(ce_weight=0, kd_weight=1)``. No explanation of the teacher is needed.

    Args:
        student: an :class:`ExplainedStudent` with ``fusion="mask"`` (or any other with a phi).
        batches, settings, teacher: as for :class:`Distiller`.
        layers: pairs of names, of the student's and the teacher's layer. Names of the student are
            those inside the ExplainedStudent: ``student.stage2``. None: no VID.
        vid_weight: beta, an interpretation; 0.1 to 1.
        sparsity_weight: eta, an interpretation.
        vid_options: further arguments of :class:`fastxkd.VIDLoss`, such as ``mid_channels``.
        options: as for :class:`Distiller`.

    Raises:
        ValueError, TypeError: a student without phi, layers that are not there, a first batch that
            is empty.
    """

    student: ExplainedStudent

    def __init__(
        self,
        student: ExplainedStudent,
        batches: Batches,
        settings: TrainSettings,
        *,
        teacher: nn.Module,
        layers: Sequence[tuple[str, str]] = (),
        vid_weight: float = 1.0,
        sparsity_weight: float = 1e-2,
        vid_options: Mapping[str, Any] | None = None,
        identity: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(student, ExplainedStudent) or student.phi is None:
            raise TypeError(
                "student: expected an ExplainedStudent with a phi, such as"
                " ExplainedStudent(student, ExplanationAutoencoder(channels), fusion='mask')"
            )
        expect("teacher", teacher, nn.Module)
        check_factors(vid_weight=vid_weight, sparsity_weight=sparsity_weight)
        _check_pairs(layers)
        if vid_options is not None and not isinstance(vid_options, Mapping):
            raise TypeError(f"vid_options: expected a dict, got {type(vid_options).__name__}")
        self.layers = [(own, guide) for own, guide in layers] if vid_weight else []
        self.vid_weight, self.sparsity_weight = vid_weight, sparsity_weight
        self._vid_options = dict(vid_options or {})
        told = {
            "fusion": student.fusion,
            "layers": [list(pair) for pair in self.layers],
            "vid_weight": vid_weight,
            "sparsity_weight": sparsity_weight,
            "vid_options": self._vid_options,
        }
        super().__init__(
            student,
            batches,
            settings,
            teacher=teacher,
            identity={**(identity or {}), **told},
            **options,
        )

    def _make_criterion(self) -> nn.Module:
        assert self.teacher is not None
        own, guide = self._taps()
        if not self.layers:
            return _Criterion(super()._make_criterion(), [])
        batch = next(iter(self.batches.iterate(0, 1)), None)
        if batch is None or len(batch[0]) == 0:
            raise ValueError("batches: the first one is empty, so no layer's size is known")
        images = batch[0].to(self.device)
        with torch.no_grad(), evaluating(self.student), evaluating(self.teacher), own, guide:
            self.student(images)
            self.teacher(images)
        channels = zip(own.reached().values(), guide.reached().values(), strict=True)
        # The same first weights whatever was drawn before.
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.settings.seed)
            vid = [VIDLoss(s.shape[1], t.shape[1], **self._vid_options) for s, t in channels]
        return _Criterion(super()._make_criterion(), vid)

    def _taps(self) -> tuple[Tap, Tap]:
        assert self.teacher is not None
        return (
            _tap(self.student, [own for own, _ in self.layers], "layers of the student"),
            _tap(self.teacher, [guide for _, guide in self.layers], "layers of the teacher"),
        )

    def _loss(self, images: Tensor, labels: Tensor, *more: Tensor) -> Tensor:
        assert self.teacher is not None
        criterion = self._criterion
        assert isinstance(criterion, _Criterion)
        own, guide = self._taps()
        with self._autocast(), own:
            logits, maps = self.student.explained(images)
        with guide:
            guidance = self._guidance(images)
        assert maps is not None
        logits = _logits(logits, self.stage)
        loss: Tensor = criterion.kd(logits.float(), guidance.float(), labels)
        loss = loss + self.sparsity_weight * maps.float().mean()
        pairs = zip(criterion.vid, own.reached().values(), guide.reached().values(), strict=True)
        for vid, student, teacher in pairs:
            loss = loss + self.vid_weight * vid(student.float(), teacher.float())
        return loss


class _Criterion(nn.Module):
    def __init__(self, kd: nn.Module, vid: Sequence[nn.Module]) -> None:
        super().__init__()
        self.kd, self.vid = kd, nn.ModuleList(vid)


def _check_pairs(layers: Any) -> None:
    if not isinstance(layers, (tuple, list)):
        raise TypeError(f"layers: expected pairs of names, got {type(layers).__name__}")
    for pair in layers:
        if not isinstance(pair, (tuple, list)) or [type(name) for name in pair] != [str, str]:
            raise ValueError(
                "layers: expected pairs of names, of the student's and the teacher's layer, got"
                f" {pair!r}"
            )


def _tap(model: nn.Module, names: Sequence[str], argument: str) -> Tap:
    if len(set(names)) != len(names):
        raise ValueError(f"{argument}: expected each once, got {', '.join(names)}")
    layers = resolve_layers(model, names, argument) if names else {}
    return Tap(layers, cut=False, one_pass=True, model=model)
