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
from fastxkd.losses.logits import kd_loss

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
    inputs that were not mixed, is None with ``ce_weight=0``.
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
        labels: int64 class indices ``[n]``; every row counts.
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
    _check_labels(labels, images)
    _check_factors(ce_weight=ce_weight, kd_weight=kd_weight, alignment_weight=alignment_weight)
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
        kl = _soft_term(student_logits, teacher_logits, temperature, kd_weight)
        exact = torch.promote_types(gradient.dtype, torch.float32)
        apart = (gradient.to(exact) - wanted.to(exact)).flatten(1).square().sum(1)
        if not squared:
            # Where both gradients agree the root has no slope; the 1e-12 gives it one of 0.
            apart = (apart + 1e-12).sqrt()
        alignment = alignment_weight * apart.mean()
        loss = ce + kl + alignment
    if not return_parts:
        return loss
    return KDIGAParts(loss, ce.detach(), kl.detach(), alignment.detach(), student_logits)


class KDIGALoss(nn.Module):
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
        super().__init__()
        self._models = (student, teacher)
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight
        self.alignment_weight = alignment_weight
        self.squared = squared
        self.return_parts = return_parts

    def forward(self, images: Tensor, labels: Tensor) -> Tensor | KDIGAParts:
        return kdiga_loss(
            *self._models,
            images,
            labels,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            kd_weight=self.kd_weight,
            alignment_weight=self.alignment_weight,
            squared=self.squared,
            return_parts=self.return_parts,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, ce_weight={self.ce_weight},"
            f" kd_weight={self.kd_weight}, alignment_weight={self.alignment_weight},"
            f" squared={self.squared}"
        )


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
        labels: int64 class indices ``[n]``; every row counts.
        teacher_inputs: ``[n, ...]`` for a teacher that takes other tensors of the same samples
            (its own embeddings); mixed with the same lambda and permutation.
        alpha: of the Beta distribution, above 0; 0.4 is our reading.
        ce_weight, mix_weight, kd_weight: the three factors; we know of no published ones. A factor
            of 0 leaves out the passes that only it needs.
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
    _check_labels(labels, inputs)
    _check_factors(ce_weight=ce_weight, mix_weight=mix_weight, kd_weight=kd_weight)
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha: expected a finite number above 0, got {alpha}")
    if distance not in DISTANCES:
        raise ValueError(f"distance: expected one of {', '.join(DISTANCES)}, got {distance!r}")
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
    if ce_weight > 0:
        student_logits = _logits(student, inputs, "student")
        ce = ce_weight * F.cross_entropy(_exact(student_logits), labels)
    if mix_weight > 0 or kd_weight > 0:
        mixed = mix(inputs, share, partner)
        mixed_logits = _logits(student, mixed, "student")
        if mix_weight > 0:
            # Cross-entropy is linear in the label, so no mixed label is built.
            logits = _exact(mixed_logits)
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
                wanted = teacher_logits.to(_exact(mixed_logits))
                soft = kd_weight * F.mse_loss(_exact(mixed_logits), wanted)
            else:
                soft = _soft_term(mixed_logits, teacher_logits, temperature, kd_weight)
    loss = ce + mixed_ce + soft
    if not return_parts:
        return loss
    return MixKDParts(loss, ce.detach(), mixed_ce.detach(), soft.detach(), student_logits)


class MixKDLoss(nn.Module):
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
        super().__init__()
        self._models = (student, teacher)
        self.alpha = alpha
        self.ce_weight = ce_weight
        self.mix_weight = mix_weight
        self.kd_weight = kd_weight
        self.distance = distance
        self.temperature = temperature
        self.generator = generator
        self.return_parts = return_parts

    def forward(
        self, inputs: Tensor, labels: Tensor, *, teacher_inputs: Tensor | None = None
    ) -> Tensor | MixKDParts:
        return mixkd_loss(
            *self._models,
            inputs,
            labels,
            teacher_inputs=teacher_inputs,
            alpha=self.alpha,
            ce_weight=self.ce_weight,
            mix_weight=self.mix_weight,
            kd_weight=self.kd_weight,
            distance=self.distance,
            temperature=self.temperature,
            generator=self.generator,
            return_parts=self.return_parts,
        )

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, ce_weight={self.ce_weight}, mix_weight={self.mix_weight},"
            f" kd_weight={self.kd_weight}, distance={self.distance!r}"
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
    total = F.cross_entropy(_exact(logits), labels, reduction="sum")
    gradient = None
    if total.requires_grad:
        (gradient,) = torch.autograd.grad(
            total, start, create_graph=create_graph, allow_unused=True
        )
    if gradient is None:
        raise ValueError(f"{role}: its logits do not depend on the images")
    return logits, total, gradient


def _soft_term(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, weight: float
) -> Tensor:
    soft = kd_loss(
        student_logits,
        teacher_logits.to(student_logits.dtype),
        temperature=temperature,
        ce_weight=0.0,
        kd_weight=weight,
    )
    assert isinstance(soft, Tensor)
    return soft


def _exact(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _guiding(teacher: Model) -> AbstractContextManager[None]:
    return evaluating(teacher) if isinstance(teacher, nn.Module) else nullcontext()


def _logits(model: Model, inputs: Tensor, role: str) -> Tensor:
    logits: Any = model(inputs)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(inputs):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{role}: expected logits [{len(inputs)}, classes], got {got}")
    return logits


def _check_inputs(name: str, inputs: Any) -> None:
    if not isinstance(inputs, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(inputs).__name__}")
    if not inputs.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {inputs.dtype}")
    if inputs.dim() < 2 or len(inputs) == 0:
        raise ValueError(f"{name}: expected a batch [n, ...] with n > 0, got {list(inputs.shape)}")


def _check_labels(labels: Any, inputs: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a Tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected torch.int64 class indices, got {labels.dtype}")
    if labels.shape != inputs.shape[:1]:
        raise ValueError(
            f"labels: expected [{len(inputs)}], one per sample, got {list(labels.shape)}"
        )
    if labels.device != inputs.device:
        raise ValueError(
            f"labels: expected the device of the inputs, {inputs.device}, got {labels.device}"
        )


def _check_factors(**factors: float) -> None:
    for name, value in factors.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
