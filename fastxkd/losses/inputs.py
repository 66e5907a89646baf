"""Losses that run both models on inputs of their own: gradients of pixels, mixtures of samples."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxkd.cam.capture import evaluating
from fastxkd.losses._criterion import Criterion
from fastxkd.losses._soft import soft_loss
from fastxkd.ops._checks import (
    check_choice,
    check_classes,
    check_factors,
    check_flags,
    check_float,
    check_generator,
    check_labels,
    check_logits,
    check_positive,
)
from fastxkd.ops._library import exact_dtype
from fastxkd.ops._logits import check_temperature

__all__ = ["KDIGALoss", "KDIGAParts", "MixKDLoss", "MixKDParts", "kdiga_loss", "mixkd_loss"]

Model = Callable[[Tensor], Tensor]
DISTANCES = ("mse", "kl")


class KDIGAParts(NamedTuple):
    """What ``kdiga_loss(..., return_parts=True)`` returns: ``loss = ce + kl + alignment``.

    The parts carry their weights and no graph; they are for logging.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    alignment: Tensor
    student_logits: Tensor


class MixKDParts(NamedTuple):
    """What ``mixkd_loss(..., return_parts=True)`` returns: ``loss = ce + mixed + soft``.

    The parts carry their weights and no graph; they are for logging. ``student_logits``, of the
    inputs that were not mixed, is None with ``ce_weight=0`` and another weight above 0.
    """

    loss: Tensor
    ce: Tensor
    mixed: Tensor
    soft: Tensor
    student_logits: Tensor | None


def kdiga_loss(
    student: Model,
    teacher: Model,
    images: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    alignment_weight: float = 1.0,
    squared: bool = True,
    return_parts: bool = False,
) -> Tensor | KDIGAParts:
    r"""Distillation with input gradient alignment (Shao et al. 2021, arXiv 2110.12072).

    .. math::
        L = ce\_weight \cdot CE(s, y) + kd\_weight \cdot T^2 \cdot KL(softmax(t / T) \,\|\,
        softmax(s / T)) + alignment\_weight \cdot mean_i \big\| \nabla_x CE(s_i, y_i) - \nabla_x
        CE(t_i, y_i) \big\|_2^2

    It hands the teacher's robustness on. The gradient of the alignment is one of second order:
    every layer of the student needs a double backward, and smooth activations (GELU, SiLU,
    Softplus) make it more than piecewise zero. About three times the memory of plain training.

    Args:
        student: the images to logits ``[n, classes]``; a module runs in the mode it is in. Batch
            norm in train mode lets a sample's gradient reach the others of the batch.
        teacher: the same; a module runs in eval mode and is left as it was, ``.grad`` included. Its
            graph is gone before the student runs.
        images: ``[n, ...]``, floating point. No gradient is handed to them.
        labels: int64 class indices ``[n]``; every row counts, there is no label to be ignored.
        temperature: T of the KL.
        ce_weight, kd_weight, alignment_weight: the three factors. We know of no published ones; 1
            each is our reading.
        squared: the squared norm. The sources disagree; False takes the norm itself, with 1e-12
            inside the root.
        return_parts: return :class:`KDIGAParts` instead of the loss alone.

    Returns:
        A scalar, float32 (float64 for float64 models); under ``torch.no_grad()`` the same without
        a graph.

    Raises:
        ValueError, TypeError: images, labels, logits or factors that do not fit; a model whose
            loss does not depend on the images.

    >>> import torch
    >>> student, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> loss = kdiga_loss(student, teacher, torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    >>> loss.backward()
    >>> student.weight.grad is not None, teacher.weight.grad is None
    (True, True)
    """
    _check_inputs("images", images)
    check_labels(labels, "images", images)
    _check_kdiga(temperature, ce_weight, kd_weight, alignment_weight, squared)
    keep_graph = torch.is_grad_enabled()
    with torch.inference_mode(False):
        with _guiding(teacher), torch.enable_grad():
            teacher_logits, _, wanted = _input_gradient(
                teacher, images, labels, "teacher", create_graph=False
            )
        teacher_logits = teacher_logits.detach()
        with torch.enable_grad():
            student_logits, total, gradient = _input_gradient(
                student, images, labels, "student", create_graph=keep_graph
            )
        if not keep_graph:
            student_logits, total = student_logits.detach(), total.detach()
        ce = ce_weight * total / len(images)
        kl = soft_loss(student_logits, teacher_logits, temperature, kd_weight)
        exact = exact_dtype(gradient, wanted)
        apart = (gradient.to(exact) - wanted.to(exact)).flatten(1).square().sum(1)
        if not squared:
            # Where both gradients agree the root has no slope; the 1e-12 gives it one of 0.
            apart = (apart + 1e-12).sqrt()
        alignment = alignment_weight * apart.mean()
        loss = ce + kl + alignment
    if not return_parts:
        return loss
    return KDIGAParts(loss, ce.detach(), kl.detach(), alignment.detach(), student_logits)


def _check_kdiga(
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    alignment_weight: float,
    squared: bool,
) -> None:
    check_temperature(temperature)
    check_factors(ce_weight=ce_weight, kd_weight=kd_weight, alignment_weight=alignment_weight)
    check_flags(squared=squared)


class KDIGALoss(Criterion):
    """:func:`kdiga_loss` as a module: ``criterion(images, labels)``.

    Takes the models and the keyword arguments of :func:`kdiga_loss`. The models are not submodules:
    ``parameters()`` is empty, and ``train()`` or ``to()`` reach neither.

    >>> import torch
    >>> criterion = KDIGALoss(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3), squared=False)
    >>> criterion(torch.rand(2, 4), torch.tensor([0, 2])).requires_grad
    True
    """

    def __init__(
        self,
        student: Model,
        teacher: Model,
        *,
        temperature: float = 4.0,
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        alignment_weight: float = 1.0,
        squared: bool = True,
        return_parts: bool = False,
    ) -> None:
        _check_kdiga(temperature, ce_weight, kd_weight, alignment_weight, squared)
        super().__init__(
            temperature=temperature,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            alignment_weight=alignment_weight,
            squared=squared,
            return_parts=return_parts,
        )
        self._models = (student, teacher)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor | KDIGAParts:
        return kdiga_loss(*self._models, images, labels, **self.options())


def mixkd_loss(
    student: Model,
    teacher: Model,
    inputs: Tensor,
    labels: Tensor,
    *,
    teacher_inputs: Tensor | None = None,
    alpha: float = 0.4,
    ce_weight: float = 1.0,
    mix_weight: float = 1.0,
    kd_weight: float = 1.0,
    distance: str = "mse",
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    return_parts: bool = False,
) -> Tensor | MixKDParts:
    r"""MixKD (Liang et al., ICLR 2021): the student imitates the teacher on mixtures of samples.

    .. math::
        L = ce\_weight \cdot CE(S(x), y) + mix\_weight \cdot CE(S(x'), y')
            + kd\_weight \cdot d\big(S(x'), T(x')\big), \qquad
        x'_i = \lambda_i x_i + (1 - \lambda_i) x_{\pi(i)}

    with :math:`y'` mixed alike, :math:`\lambda_i \sim Beta(\alpha, \alpha)` drawn for every row
    and :math:`\pi` a permutation of the batch. The teacher gets the very same mixtures. Inputs may
    be images or any other floating-point tensors, such as the token embeddings of the paper:

        embedded, guided = student.embed(tokens), teacher.embed(tokens)
        loss = mixkd_loss(student.encode, teacher.encode, embedded, labels, teacher_inputs=guided)

    Args:
        student: inputs to logits ``[n, classes]``; a module runs in the mode it is in, once on the
            inputs and once on their mixtures.
        teacher: the same; runs without a graph, a module in eval mode; it is left as it was.
        inputs: ``[n, ...]``, floating point; a gradient reaches them if they require one.
        labels: int64 class indices ``[n]``; every row counts, there is no label to be ignored.
        teacher_inputs: ``[n, ...]`` for a teacher that takes other tensors of the same samples
            (its own embeddings); mixed with the same lambda and permutation.
        alpha: of the Beta distribution, above 0; 0.4 is our reading.
        ce_weight, mix_weight, kd_weight: the three factors; we know of no published ones. A factor
            of 0 leaves out the passes that only it needs; with all of them 0 the student still runs
            on the inputs, so that the gradient is one of zeros.
        distance: ``"mse"`` of the logits, or ``"kl"``: ``T^2 * KL(teacher || student)``.
        temperature: T of ``"kl"``.
        generator: source of lambda and permutation; by default torch's own.
        return_parts: return :class:`MixKDParts` instead of the loss alone.

    Returns:
        A scalar, float32 (float64 for float64 models).

    Raises:
        ValueError, TypeError: inputs, labels, logits or factors that do not fit.

    >>> import torch
    >>> student, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> inputs, labels = torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])
    >>> draw = [mixkd_loss(student, teacher, inputs, labels,
    ...     generator=torch.Generator().manual_seed(3)).item() for _ in range(2)]
    >>> draw[0] == draw[1]
    True
    """
    _check_inputs("inputs", inputs)
    check_labels(labels, "inputs", inputs)
    _check_mixkd(alpha, ce_weight, mix_weight, kd_weight, distance, temperature, generator)
    if teacher_inputs is not None:
        _check_inputs("teacher_inputs", teacher_inputs)
        if len(teacher_inputs) != len(inputs):
            raise ValueError(
                f"teacher_inputs: expected {len(inputs)} rows as in inputs,"
                f" got {len(teacher_inputs)}"
            )
    # Drawn whatever the factors are: the next step's draw must not depend on them.
    share, partner = draw_pairs(len(inputs), alpha, generator, device=inputs.device)
    student_logits = None
    ce = mixed_ce = soft = torch.zeros((), device=inputs.device)
    if ce_weight > 0 or not (mix_weight > 0 or kd_weight > 0):
        student_logits = _logits(student, inputs, "student")
        check_classes(labels, student_logits.shape[1])
        ce = ce_weight * F.cross_entropy(_exact(student_logits), labels)
    if mix_weight > 0 or kd_weight > 0:
        mixed = mix(inputs, share, partner)
        mixed_logits = _logits(student, mixed, "student")
        if mix_weight > 0:
            # Cross-entropy is linear in the label, so no mixed label is built.
            logits = _exact(mixed_logits)
            check_classes(labels, logits.shape[1])
            first = F.cross_entropy(logits, labels, reduction="none")
            second = F.cross_entropy(logits, labels[partner], reduction="none")
            mixed_ce = mix_weight * torch.lerp(second, first, share.to(first.dtype)).mean()
        if kd_weight > 0:
            with torch.no_grad(), _guiding(teacher):
                if teacher_inputs is not None:
                    mixed = mix(teacher_inputs, share, partner)
                teacher_logits = _logits(teacher, mixed.detach(), "teacher")
            if teacher_logits.shape != mixed_logits.shape:
                raise ValueError(
                    f"teacher: expected logits {list(mixed_logits.shape)} as of the student,"
                    f" got {list(teacher_logits.shape)}"
                )
            if distance == "mse":
                exact = exact_dtype(mixed_logits, teacher_logits)
                soft = kd_weight * F.mse_loss(mixed_logits.to(exact), teacher_logits.to(exact))
            else:
                soft = soft_loss(mixed_logits, teacher_logits, temperature, kd_weight)
    loss = ce + mixed_ce + soft
    if not return_parts:
        return loss
    return MixKDParts(loss, ce.detach(), mixed_ce.detach(), soft.detach(), student_logits)


def _check_mixkd(
    alpha: float,
    ce_weight: float,
    mix_weight: float,
    kd_weight: float,
    distance: str,
    temperature: float,
    generator: torch.Generator | None,
) -> None:
    check_positive(alpha=alpha)
    check_temperature(temperature)
    check_factors(ce_weight=ce_weight, mix_weight=mix_weight, kd_weight=kd_weight)
    check_choice("distance", distance, DISTANCES)
    check_generator(generator)


class MixKDLoss(Criterion):
    """:func:`mixkd_loss` as a module: ``criterion(inputs, labels)``.

    Takes the models and the keyword arguments of :func:`mixkd_loss`, ``teacher_inputs`` with the
    call. The models are not submodules: ``parameters()`` is empty, and ``train()`` or ``to()``
    reach neither.

    >>> import torch
    >>> criterion = MixKDLoss(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3), distance="kl")
    >>> criterion(torch.rand(2, 4), torch.tensor([0, 2])).requires_grad
    True
    """

    def __init__(
        self,
        student: Model,
        teacher: Model,
        *,
        alpha: float = 0.4,
        ce_weight: float = 1.0,
        mix_weight: float = 1.0,
        kd_weight: float = 1.0,
        distance: str = "mse",
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        return_parts: bool = False,
    ) -> None:
        _check_mixkd(alpha, ce_weight, mix_weight, kd_weight, distance, temperature, generator)
        super().__init__(
            alpha=alpha,
            ce_weight=ce_weight,
            mix_weight=mix_weight,
            kd_weight=kd_weight,
            distance=distance,
            temperature=temperature,
            generator=generator,
            return_parts=return_parts,
        )
        self._models = (student, teacher)

    def forward(
        self, inputs: Tensor, labels: Tensor, *, teacher_inputs: Tensor | None = None
    ) -> Tensor | MixKDParts:
        return mixkd_loss(
            *self._models, inputs, labels, teacher_inputs=teacher_inputs, **self.options()
        )


def draw_pairs(
    n: int, alpha: float, generator: torch.Generator | None, *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Shares ``[n]`` from Beta(alpha, alpha), and each row's partner, a permutation ``[n]``."""
    where = "cpu" if generator is None else generator.device
    # torch draws no Beta from a generator of one's own; NumPy does, seeded from it.
    seed = torch.randint(2**63 - 1, (), generator=generator, device=where)
    source = np.random.default_rng(int(seed))
    share = torch.from_numpy(source.beta(alpha, alpha, n)).float()
    partner = torch.from_numpy(source.permutation(n))
    return share.to(device, non_blocking=True), partner.to(device, non_blocking=True)


def mix(inputs: Tensor, share: Tensor, partner: Tensor) -> Tensor:
    """``share`` of each row and the rest of its partner's."""
    weight = share.to(inputs.dtype).reshape(-1, *[1] * (inputs.dim() - 1))
    return torch.lerp(inputs[partner], inputs, weight)


def _input_gradient(
    model: Model, images: Tensor, labels: Tensor, role: str, *, create_graph: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, the sum of the rows' cross-entropies, and its gradient in the images."""
    # A tensor made in inference mode can be part of no graph; its copy can.
    images, labels = (t.clone() if t.is_inference() else t for t in (images, labels))
    start = images.detach().requires_grad_(True)
    logits = _logits(model, start, role)
    check_classes(labels, logits.shape[1])
    total = F.cross_entropy(_exact(logits), labels, reduction="sum")
    gradient = None
    if total.requires_grad:
        (gradient,) = torch.autograd.grad(
            total, start, create_graph=create_graph, allow_unused=True
        )
    if gradient is None:
        raise ValueError(f"{role}: its logits do not depend on the images")
    return logits, total, gradient


def _exact(logits: Tensor) -> Tensor:
    return logits.to(exact_dtype(logits))


def _guiding(teacher: Model) -> AbstractContextManager[None]:
    return evaluating(teacher) if isinstance(teacher, nn.Module) else nullcontext()


def _logits(model: Model, inputs: Tensor, role: str) -> Tensor:
    logits = model(inputs)
    check_logits(role, logits, inputs)
    return logits


def _check_inputs(name: str, inputs: Any) -> None:
    check_float(name, inputs)
    if inputs.dim() < 2 or len(inputs) == 0:
        raise ValueError(f"{name}: expected a batch [n, ...] with n > 0, got {list(inputs.shape)}")
