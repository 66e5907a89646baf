"""How faithful a student is to its teacher: in what it answers, and in why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastxkd.cam.capture import evaluating
from fastxkd.metrics._maps import check_images, check_maps_of
from fastxkd.metrics.agreement import (
    check_fraction,
    cosine_agreement,
    pearson_agreement,
    ssim_agreement,
    top_agreement,
)
from fastxkd.metrics.perturbation import deletion_curve, insertion_curve
from fastxkd.ops._checks import check_counts, check_flags, check_logits

__all__ = ["ExplanationFidelity", "explanation_fidelity"]

# Of images and targets= to maps [n, h, w] in [0, 1]: an explainer of this library.
Explain = Callable[..., Tensor]


class ExplanationFidelity(NamedTuple):
    """Of :func:`explanation_fidelity`: one value an image, ``[n]`` float64 on the CPU.

    Means over images are what papers report; differences of two students' values, image by image,
    are what a paired test takes.
    """

    agreement: Tensor  # 1 where the first choices are the same, else 0
    divergence: Tensor  # KL(teacher || student), nats
    cosine: Tensor
    pearson: Tensor
    ssim: Tensor
    top: dict[float, Tensor]  # fraction of the pixels -> intersection over union
    deletion: Tensor | None  # AUC on the teacher, of the student's maps; lower is better
    insertion: Tensor | None  # higher is better

    def means(self) -> dict[str, float]:
        """Name to mean over the images; ``top_10`` for the first tenth of the pixels."""
        found = {
            name: float(value.mean())
            for name, value in self._asdict().items()
            if isinstance(value, Tensor)
        }
        found |= {f"top_{100 * share:g}": float(v.mean()) for share, v in self.top.items()}
        return found


def explanation_fidelity(
    student: nn.Module | Callable[[Tensor], Tensor],
    teacher: nn.Module | Callable[[Tensor], Tensor],
    images: Tensor,
    explain_student: Explain,
    explain_teacher: Explain,
    *,
    fractions: Sequence[float] = (0.1, 0.2),
    ssim_window: int = 11,
    curves: bool = True,
    steps: int | None = None,
) -> ExplanationFidelity:
    r"""Output and explanation fidelity of a student (XDistillation; Alharbi, Vu and Thai 2021).

    Both models' explanations are of the teacher's first choice, whatever the student's. The
    paper's own measure is not known; which similarity is meant is an interpretation, so here are
    several.

    Args:
        student, teacher: images to logits ``[n, classes]``; modules run in eval mode and are left
            as they were.
        images: ``[n, channels, h, w]``.
        explain_student, explain_teacher: callables of images and ``targets=`` to maps
            ``[n, h, w]`` in [0, 1], the same explainer on either model:
            ``fastxkd.GradCAM(student, "layer4")``.
        fractions: of the most relevant pixels, for the intersection over union.
        ssim_window: of SSIM, odd; made smaller where a map has fewer pixels on a side.
        curves: deletion and insertion of the student's maps on the *teacher*: whether what the
            student points at is what the teacher needs.
        steps: of these curves, see :func:`deletion_curve`.

    Returns:
        :class:`ExplanationFidelity`. NaN in an image's map is NaN in its own values.

    Raises:
        ValueError, TypeError: models, maps or options that do not fit.

    >>> import torch
    >>> from fastxkd.metrics.fidelity import explanation_fidelity
    >>> model = lambda x: x.flatten(1)
    >>> explain = lambda x, targets: x[:, 0]
    >>> found = explanation_fidelity(model, model, torch.eye(3)[None, None], explain, explain)
    >>> found.means()["agreement"], found.means()["cosine"]
    (1.0, 1.0)
    """
    check_images(images)
    check_flags(curves=curves)
    check_counts(ssim_window=ssim_window)
    if ssim_window % 2 == 0:
        raise ValueError(f"ssim_window: expected an odd number of pixels, got {ssim_window}")
    if not isinstance(fractions, (tuple, list)):
        raise TypeError(
            f"fractions: expected a sequence of numbers, got {type(fractions).__name__}"
        )
    for fraction in fractions:
        check_fraction(fraction)
    for name, explain in (("student", explain_student), ("teacher", explain_teacher)):
        if not callable(explain):
            raise TypeError(
                f"explain_{name}: expected a function of images and targets=, got"
                f" {type(explain).__name__}"
            )
    answers = {}
    for name, model in (("student", student), ("teacher", teacher)):
        answers[name] = _answers(model, images, name)
    if answers["student"].shape != answers["teacher"].shape:
        raise ValueError(
            f"teacher: expected logits {list(answers['student'].shape)} as of the student, got"
            f" {list(answers['teacher'].shape)}"
        )
    targets = answers["teacher"].argmax(1)
    maps, guide = (
        explain(images.clone(), targets=targets) for explain in (explain_student, explain_teacher)
    )
    check_maps_of(images, maps, "explain_student")
    check_maps_of(images, guide, "explain_teacher")
    side = min(ssim_window, *images.shape[2:])
    deletion = insertion = None
    if curves:
        deletion = _plain(deletion_curve(teacher, images, maps, targets, steps=steps).auc)
        insertion = _plain(insertion_curve(teacher, images, maps, targets, steps=steps).auc)
    log_student, log_teacher = (answers[name].log_softmax(1) for name in ("student", "teacher"))
    p = log_teacher.exp()
    # A class that the teacher rules out adds nothing, whatever the student says.
    divergence = (p * (log_teacher - log_student)).where(p != 0, 0).sum(1)
    return ExplanationFidelity(
        _plain(answers["student"].argmax(1) == targets),
        _plain(divergence),
        _plain(cosine_agreement(maps, guide)),
        _plain(pearson_agreement(maps, guide)),
        _plain(ssim_agreement(maps, guide, window=side - 1 + side % 2)),
        {share: _plain(top_agreement(maps, guide, fraction=share)) for share in fractions},
        deletion,
        insertion,
    )


def joined(parts: Sequence[ExplanationFidelity]) -> ExplanationFidelity:
    """The fidelity of several batches as that of one."""
    if not parts:
        raise ValueError("parts: expected at least one batch, got none")

    def whole(values: Sequence[Any]) -> Any:
        return None if values[0] is None else torch.cat(list(values))

    each = {
        name: whole([getattr(part, name) for part in parts])
        for name in ExplanationFidelity._fields
        if name != "top"
    }
    top = {share: torch.cat([part.top[share] for part in parts]) for share in parts[0].top}
    return ExplanationFidelity(**each, top=top)


def _answers(model: Any, images: Tensor, name: str) -> Tensor:
    with torch.no_grad():
        if isinstance(model, nn.Module):
            with evaluating(model):
                logits = model(images.clone())  # which a model may change as it likes
        else:
            logits = model(images.clone())
    check_logits(name, logits, images)
    return logits.double()


def _plain(values: Tensor) -> Tensor:
    return values.detach().double().cpu()
