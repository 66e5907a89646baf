"""What a teacher's answers rest on, as maps a student can be trained with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastxkd.cam.activation import CAM, EigenCAM
from fastxkd.cam.attribution import (
    SIGNS,
    attribution_maps,
    gradient_shap,
    input_x_gradient,
    integrated_gradients,
    occlusion,
)
from fastxkd.cam.capture import Layers, evaluating
from fastxkd.cam.explainer import Explainer
from fastxkd.cam.gradient import (
    EigenGradCAM,
    FinerCAM,
    GradCAM,
    GradCAMElementWise,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    XGradCAM,
)
from fastxkd.cam.perturbation import AblationCAM, ScoreCAM
from fastxkd.ops._checks import check_choice, check_counts, check_float, check_logits

__all__ = ["EXPLAINERS", "TeacherExplanations"]

_CAMS: dict[str, type[Explainer]] = {
    "gradcam": GradCAM,
    "gradcam++": GradCAMPlusPlus,
    "xgradcam": XGradCAM,
    "hirescam": HiResCAM,
    "layercam": LayerCAM,
    "elementwise": GradCAMElementWise,
    "eigengradcam": EigenGradCAM,
    "finercam": FinerCAM,
    "eigencam": EigenCAM,
    "cam": CAM,
    "scorecam": ScoreCAM,
    "ablationcam": AblationCAM,
}
_ATTRIBUTIONS: dict[str, Callable[..., Tensor]] = {
    "input_x_gradient": input_x_gradient,
    "integrated_gradients": integrated_gradients,
    "gradient_shap": gradient_shap,
    "occlusion": occlusion,
}
EXPLAINERS = (*_CAMS, *_ATTRIBUTIONS)
JOINS = ("concat", "mean")


def _options(name: str) -> list[str]:
    """Of an explainer, but for what is random, which ``seed`` decides."""
    explain: Any = _CAMS.get(name) or _ATTRIBUTIONS[name]
    own = inspect.signature(explain).parameters.values()
    return [p.name for p in own if p.kind is p.KEYWORD_ONLY and p.name != "generator"]


class TeacherExplanations:
    """Images to maps ``[n, k, h, w]`` in [0, 1] of why the teacher answers as it does.

    Explained is the teacher's first choice, so that no label is needed. Maps of the CAM family are
    scaled as they always are; of pixel attributions it is :func:`attribution_maps`. The choice of
    explainers and their number, how they are joined and what is done with signs are
    interpretations of XDistillation, whose digests name SHAP, LIME and Grad-CAM.

    Args:
        teacher: runs in eval mode during a call and is left as it was.
        explainers: one name or several out of ``EXPLAINERS``.
        target_layers: for the CAM family, as for :class:`fastxkd.GradCAM`.
        join: ``"concat"``, a map for each explainer, or ``"mean"`` of them, one map.
        sign: of pixel attributions: ``"absolute"`` or ``"positive"``.
        options: explainer to further arguments of its function or class, plain values:
            ``{"integrated_gradients": {"steps": 20}}``.
        batch_size: how many images, or variants of them, the teacher sees at once.
        seed: of what gradient SHAP draws; a call without ``draw`` draws the same each time.

    Raises:
        ValueError, TypeError: unknown explainers, options for others, missing layers.

    >>> import torch
    >>> teacher = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(),
    ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))
    >>> explain = TeacherExplanations(teacher, ["gradcam", "occlusion"], target_layers="1")
    >>> explain(torch.rand(2, 1, 12, 12)).shape, explain.maps
    (torch.Size([2, 2, 12, 12]), 2)
    """

    def __init__(
        self,
        teacher: nn.Module,
        explainers: Sequence[str] | str = ("gradcam",),
        *,
        target_layers: Layers | None = None,
        join: str = "concat",
        sign: str = "absolute",
        options: Mapping[str, Mapping[str, Any]] | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        if options is not None and not (
            isinstance(options, Mapping) and all(isinstance(o, Mapping) for o in options.values())
        ):
            raise TypeError(f"options: expected explainers to their options, got {options!r}")
        if not isinstance(explainers, (str, tuple, list)):
            raise TypeError(f"explainers: expected names, got {type(explainers).__name__}")
        self.explainers = (explainers,) if isinstance(explainers, str) else tuple(explainers)
        unknown = [name for name in self.explainers if name not in EXPLAINERS]
        if unknown or not self.explainers or len(set(self.explainers)) < len(self.explainers):
            raise ValueError(
                f"explainers: expected different ones of {', '.join(EXPLAINERS)}, got"
                f" {', '.join(map(repr, self.explainers)) or 'none'}"
            )
        check_choice("join", join, JOINS)
        check_choice("sign", sign, SIGNS)
        check_counts(batch_size=batch_size)
        self.options = {name: dict(given) for name, given in (options or {}).items()}
        others = [name for name in self.options if name not in self.explainers]
        if others:
            raise ValueError(f"options: {others[0]!r} is not one of the explainers")
        for name, given in self.options.items():
            known = _options(name)
            wrong = [option for option in given if option not in known]
            if wrong:
                raise ValueError(
                    f"options: {name} takes {', '.join(known)}, got {', '.join(map(repr, wrong))}"
                )
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher: expected a module, got {type(teacher).__name__}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
        self.teacher, self.join, self.sign, self.seed = teacher, join, sign, seed
        self.batch_size = batch_size
        self._cams: dict[str, Explainer] = {}
        for name in self.explainers:
            if name not in _CAMS:
                continue
            if target_layers is None:
                raise ValueError(f"target_layers: {name} needs the teacher's layer, got None")
            make: Any = _CAMS[name]
            chosen = {"batch_size": batch_size, **self.options.get(name, {})}
            self._cams[name] = make(teacher, target_layers, **chosen)

    @property
    def maps(self) -> int:
        """How many maps an image gets."""
        return 1 if self.join == "mean" else len(self.explainers)

    @property
    def names(self) -> list[str]:
        """What each map is called."""
        return ["mean of " + ", ".join(self.explainers)] * (self.join == "mean") or [
            *self.explainers
        ]

    def __call__(
        self, images: Tensor, targets: Tensor | None = None, *, draw: int | None = None
    ) -> Tensor:
        """Maps of a batch.

        Args:
            images: ``[n, channels, h, w]``, as the teacher takes them.
            targets: classes ``[n]``; None: the teacher's first choice.
            draw: further seed of what is random, such as the number of the batch.

        Returns:
            ``[n, k, h, w]`` float32, on the images' device.
        """
        check_float("images", images)
        if targets is None:
            targets = torch.cat([self._choice(part) for part in self._parts(images)])
        found = torch.stack([self._map(name, images, targets, draw) for name in self.explainers], 1)
        found = found.float()
        return found.mean(1, keepdim=True) if self.join == "mean" else found

    def _parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.split(self.batch_size)

    def _choice(self, images: Tensor) -> Tensor:
        with torch.no_grad(), evaluating(self.teacher):
            # A copy, which the teacher may change as it likes.
            logits = self.teacher(images.clone())
        check_logits("teacher", logits, images)
        return logits.argmax(1)

    def _map(self, name: str, images: Tensor, targets: Tensor, draw: int | None) -> Tensor:
        if name in self._cams:
            parts = zip(self._parts(images), self._parts(targets), strict=True)
            with self._cams[name] as cam:
                return torch.cat([cam(part.clone(), given) for part, given in parts])
        options: dict[str, Any] = dict(self.options.get(name, {}))
        if name == "gradient_shap":
            generator = torch.Generator()
            generator.manual_seed((self.seed * 1_000_003 + (draw or 0)) & 0x7FFF_FFFF_FFFF_FFFF)
            options["generator"] = generator
        options.setdefault("batch_size", self.batch_size)
        attributions = _ATTRIBUTIONS[name](self.teacher, images, targets, **options)
        return attribution_maps(attributions, sign=self.sign)

    def settings(self) -> dict[str, Any]:
        """What decides the maps besides the teacher's weights and the images, as plain values."""
        layers = {name: list(cam.target_layers) for name, cam in self._cams.items()}
        return {
            "explainers": list(self.explainers),
            "target_layers": layers,
            "join": self.join,
            "sign": self.sign,
            "options": self.options,
            # Nothing else is drawn.
            "explanation_seed": self.seed if "gradient_shap" in self.explainers else None,
        }
