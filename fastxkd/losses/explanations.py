"""Losses on explanations: the student looks where the teacher looks (CAT-KD, e2KD)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxkd.cam.capture import Layers, capture, evaluating, resolve_layers
from fastxkd.cam.gradient import (
    GradCAM,
    GradCAMPlusPlus,
    GradientCAM,
    HiResCAM,
    LayerCAM,
    XGradCAM,
)
from fastxkd.losses._blocks import without_autocast
from fastxkd.losses._criterion import Criterion
from fastxkd.losses._soft import soft_loss
from fastxkd.ops._checks import (
    check_choice,
    check_counts,
    check_factors,
    check_flags,
    check_float,
    check_guidance,
    check_logits,
)
from fastxkd.ops._library import exact_dtype
from fastxkd.ops._logits import check_temperature
from fastxkd.ops._rows import unit_rows

__all__ = [
    "CATKDLoss",
    "CATKDOutput",
    "E2KDLoss",
    "E2KDOutput",
    "catkd_loss",
    "class_activations",
    "e2kd_loss",
]

EXPLAINERS: dict[str, type[GradientCAM]] = {
    explainer.method: explainer
    for explainer in (GradCAM, GradCAMPlusPlus, XGradCAM, HiResCAM, LayerCAM)
}


class CATKDOutput(NamedTuple):
    """What :class:`CATKDLoss` returns: its term, and the logits of the passes it made."""

    loss: Tensor
    student_logits: Tensor
    teacher_logits: Tensor


class E2KDOutput(NamedTuple):
    """What :class:`E2KDLoss` returns: ``loss = kl + weight * alignment``.

    ``kl`` carries its ``T^2``; ``alignment`` is None in a step without explanations. Neither has a
    graph: ``loss`` and ``student_logits`` are what is differentiable.
    """

    loss: Tensor
    kl: Tensor
    alignment: Tensor | None
    student_logits: Tensor
    teacher_logits: Tensor


def class_activations(activations: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""One activation map per class: the linear head applied at every position, not to their mean.

    .. math:: M_{nkp} = \sum_c W_{kc} A_{ncp} + b_k

    Of a network that ends in global average pooling and a linear layer. The bias is added at
    every position, so the mean of a class's map is its logit. The authors of CAT-KD train heads
    without one (Guo et al., CVPR 2023).

    Args:
        activations: ``[n, channels, h, w]``, what the network pools.
        weight: ``[classes, channels]``, or ``[classes, channels, 1, 1]``.
        bias: ``[classes]``.

    Returns:
        ``[n, classes, h, w]``, differentiable in all three; float64 if activations or weight are
        float64, else float32.

    Raises:
        ValueError, TypeError: shapes that do not fit, something else than floating-point tensors.

    >>> import torch
    >>> activations = torch.tensor([[[[1.0, 3.0]], [[0.0, 2.0]]]])
    >>> class_activations(activations, torch.tensor([[1.0, 1.0], [1.0, -1.0]])).squeeze()
    tensor([[1., 5.],
            [1., 1.]])
    """
    _check_maps("activations", activations)
    channels = activations.shape[1]
    check_float("weight", weight)
    if bias is not None:
        check_float("bias", bias)
    fits = weight.dim() in (2, 4) and weight.shape[1] == weight.shape[1:].numel() == channels
    if not fits:
        raise ValueError(
            f"weight: expected [classes, {channels}] to match activations"
            f" {list(activations.shape)}, got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias: expected one value per class, [{len(weight)}], got {list(bias.shape)}"
        )
    exact = exact_dtype(activations, weight)
    # Autocast would round the products to 16 bits.
    with without_autocast(activations):
        return F.conv2d(
            activations.to(exact),
            weight.flatten(1)[:, :, None, None].to(exact),
            None if bias is None else bias.to(exact),
        )


def catkd_loss(
    student_cams: Tensor,
    teacher_cams: Tensor,
    *,
    pool: int | None = 2,
    normalize: bool = False,
    binarize: bool = False,
    top: int | None = None,
    bottom: int | None = None,
    teacher_logits: Tensor | None = None,
) -> Tensor:
    r"""Class attention transfer (Guo et al., CVPR 2023): the maps of all classes, mean squared.

    .. math:: L = MSE\big( n(pool_r(M^s)),\; n(pool_r(M^t)) \big)

    with M as of :func:`class_activations`. Add it to the cross-entropy with the published factor:
    15 for ResNet32x4 to 8x4, 0.7 for 56 to 20, 12 for WRN-40-2 to 16-2, 4.5 for VGG13 to 8 on
    CIFAR-100; 600 with ``pool=4, normalize=True`` for 32x4 to ShuffleNet; 0.5 with ``pool=4``
    for ResNet34 to 18 on ImageNet.

    Args:
        student_cams: ``[n, classes, h, w]``, any float dtype.
        teacher_cams: the same images and classes, without gradient; h and w may differ unless
            ``pool`` is None.
        pool: r; maps are averaged to r x r positions first. None compares them as they are.
        normalize: divide every pooled map by its L2 norm (n); a map of zeros stays zeros.
        binarize: replace the teacher's maps, before pooling, by 1 where they exceed the spatial
            mean of their absolute values, and 0 elsewhere.
        top, bottom: compare these many classes of each image only, those the teacher holds most
            or least likely; the mean is then over them. At most one of the two.
        teacher_logits: ``[n, classes]`` to rank by; without them, the means of the teacher's maps.

    Returns:
        A scalar, float64 if one side is float64, else float32.

    Raises:
        ValueError, TypeError: tensors or options that do not fit, a teacher that requires grad.

    >>> import torch
    >>> student = torch.zeros(1, 2, 4, 4, requires_grad=True)
    >>> teacher = torch.stack([torch.ones(4, 4), 3 * torch.ones(4, 4)])[None]
    >>> catkd_loss(student, teacher).item(), catkd_loss(student, teacher, bottom=1).item()
    (5.0, 1.0)
    """
    _check_maps("student_cams", student_cams)
    _check_maps("teacher_cams", teacher_cams)
    _check_options(pool, normalize, binarize, top, bottom)
    same = slice(2) if pool is not None else slice(4)
    if student_cams.shape[same] != teacher_cams.shape[same]:
        what = "images and classes" if pool is not None else "shape (pool=None)"
        raise ValueError(
            f"teacher_cams: expected the {what} of student_cams {list(student_cams.shape)},"
            f" got {list(teacher_cams.shape)}"
        )
    check_guidance(("student_cams", "teacher_cams"), student_cams, teacher_cams)
    classes = student_cams.shape[1]
    for name, count in (("top", top), ("bottom", bottom)):
        if count is not None and count > classes:
            raise ValueError(f"{name}: expected at most the {classes} classes, got {count}")
    if teacher_logits is not None:
        check_float("teacher_logits", teacher_logits)
        if teacher_logits.shape != student_cams.shape[:2]:
            raise ValueError(
                f"teacher_logits: expected {list(student_cams.shape[:2])} to match student_cams"
                f" {list(student_cams.shape)}, got {list(teacher_logits.shape)}"
            )
    exact = exact_dtype(student_cams, teacher_cams)
    student, teacher = student_cams.to(exact), teacher_cams.to(exact)
    count = top or bottom
    if count is not None and count < classes:
        ranks = teacher.mean((2, 3)) if teacher_logits is None else teacher_logits.detach()
        chosen = ranks.topk(count, 1, largest=bottom is None).indices[:, :, None, None]
        student, teacher = (m.take_along_dim(chosen, 1) for m in (student, teacher))
    if binarize:
        teacher = (teacher > teacher.abs().mean((2, 3), keepdim=True)).to(exact)
    if pool is not None:
        student, teacher = _pooled(student, pool), _pooled(teacher, pool)
    if normalize:
        student, teacher = unit_rows(student.flatten(2)), unit_rows(teacher.flatten(2))
    return F.mse_loss(student, teacher)


class CATKDLoss(Criterion):
    """:func:`catkd_loss` of any two networks that end in global average pooling and a linear head.

    Runs both on a batch, reads their activations at a layer, and folds their own heads' weights
    into the maps; the networks need no change. Activations are pooled before the head is applied
    (both are linear), so the maps of all classes are never held at full size, except the
    teacher's when they are binarised.

        criterion = CATKDLoss(student, teacher, "layer4", "layer4")
        for images, labels in loader:
            out = criterion(images)
            loss = F.cross_entropy(out.student_logits, labels) + 15 * out.loss

    Args:
        student: runs in the mode it is in.
        teacher: runs in eval mode without a graph, and is left as it was.
        student_layer, teacher_layer: module or name whose output ``[n, channels, h, w]`` is pooled.
        student_head, teacher_head: the ``nn.Linear`` or 1x1 ``nn.Conv2d`` on what was pooled; None
            where the model has one ``nn.Linear`` only.
        pool, normalize, binarize, top, bottom: of :func:`catkd_loss`. Classes are ranked by the
            teacher's logits.

    The models are not submodules: ``parameters()`` is empty, and ``train()`` or ``to()`` reach
    neither.

    Raises:
        ValueError: layers or heads that the models do not have; at the first batch, a layer and
            head that do not give the model's logits, which is looked at in eval mode.

    >>> import torch
    >>> def network(width):
    ...     return torch.nn.Sequential(torch.nn.Conv2d(1, width, 3), torch.nn.ReLU(),
    ...         torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(width, 10))
    >>> criterion = CATKDLoss(network(4), network(8), "1", "1")
    >>> out = criterion(torch.rand(2, 1, 8, 8))
    >>> out.loss.requires_grad, out.student_logits.shape
    (True, torch.Size([2, 10]))
    """

    pool: int | None
    binarize: bool

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_layer: nn.Module | str,
        teacher_layer: nn.Module | str,
        *,
        student_head: nn.Module | str | None = None,
        teacher_head: nn.Module | str | None = None,
        pool: int | None = 2,
        normalize: bool = False,
        binarize: bool = False,
        top: int | None = None,
        bottom: int | None = None,
    ) -> None:
        _check_options(pool, normalize, binarize, top, bottom)
        super().__init__(pool=pool, normalize=normalize, binarize=binarize, top=top, bottom=bottom)
        self._student = _Classifier(student, student_layer, student_head, "student")
        self._teacher = _Classifier(teacher, teacher_layer, teacher_head, "teacher")
        self._checked = False

    def forward(self, images: Tensor) -> CATKDOutput:
        """``loss`` and the logits of both models on a batch of images ``[n, ...]``."""
        if isinstance(images, Tensor) and images.dim() < 2:
            raise ValueError(f"images: expected [n, ...], got {list(images.shape)}")
        if not self._checked:
            self._student.check(images[:2])
            self._teacher.check(images[:2])
            self._checked = True
        with torch.no_grad(), evaluating(self._teacher.model):
            teacher_cams, teacher_logits = self._teacher(
                images, None if self.binarize else self.pool
            )
        student_cams, student_logits = self._student(images, self.pool)
        loss = catkd_loss(
            student_cams, teacher_cams, teacher_logits=teacher_logits, **self.options()
        )
        return CATKDOutput(loss, student_logits, teacher_logits)


class _Classifier:
    """A network, the layer it pools and its head; no module, so that it is nobody's submodule."""

    def __init__(
        self, model: nn.Module, layer: nn.Module | str, head: nn.Module | str | None, role: str
    ) -> None:
        self.model, self.role = model, role
        ((self.name, self.layer),) = _only(model, layer, f"{role}_layer").items()
        self.head = _linear_head(model, head, f"{role}_head")

    def __call__(self, images: Tensor, pool: int | None) -> tuple[Tensor, Tensor]:
        """Class activation maps, of activations already pooled, and the logits."""
        with capture(self.model, self.layer) as captured:
            logits = self.model(images)
        (activations,) = captured.activations.values()
        if activations.dim() != 4:
            raise ValueError(
                f"{self.role}_layer: expected spatial activations [n, channels, h, w] of"
                f" {self.name!r}, got {list(activations.shape)}"
            )
        weight: Any = self.head.weight
        if activations.shape[1] != weight.shape[1]:
            raise ValueError(
                f"{self.role}_layer: expected the {weight.shape[1]} channels that the head takes,"
                f" got {list(activations.shape)} of {self.name!r}"
            )
        if pool is not None:
            activations = _pooled(activations.to(exact_dtype(activations)), pool)
        return class_activations(activations, weight, self.head.bias), logits  # type: ignore[arg-type]

    def check(self, images: Tensor) -> None:
        """Raise where the maps' means are not the logits: a wrong layer would teach nonsense."""
        with torch.no_grad(), evaluating(self.model):
            cams, logits = self(images, 1)
        if not isinstance(logits, Tensor) or logits.shape != cams.shape[:2]:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"{self.role}: expected logits {list(cams.shape[:2])} as of its head, got {got}"
            )
        worst = (cams[:, :, 0, 0] - logits).abs().max()
        # Loose enough for a model that rounds to 16 bits.
        if worst > 0.05 * logits.abs().max() + 1e-6:
            raise ValueError(
                f"{self.role}_layer: the mean of {self.name!r} through the head is not the model's"
                f" logits (they differ by {worst.item():.3g}); name the layer whose output is"
                " averaged over positions and given to the head"
            )


def e2kd_loss(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    r"""Explanation alignment of e2KD (Parchami-Araghi et al., ECCV 2024).

    .. math:: L = 1 - \frac{1}{n} \sum_i \cos\big(E^s_i, E^t_i\big)

    over flattened maps, of the teacher's predicted class in both models. Scales do not matter; a
    map of zeros has cosine 0 and gradient 0. The authors add it to ``T^2 * KL`` with a factor of
    0.2 to 10 and use no cross-entropy: see :class:`E2KDLoss`.

    Args:
        student_maps: ``[n, ...]``, any float dtype, at least one value each.
        teacher_maps: the same shape, without gradient.

    Returns:
        A scalar, float64 if one side is float64, else float32.

    Raises:
        ValueError, TypeError: tensors that do not fit, a teacher that requires grad.

    >>> import torch
    >>> student = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    >>> e2kd_loss(student, torch.tensor([[5.0, 0.0], [0.0, 2.0]])).item()
    0.5
    """
    for name, maps in (("student_maps", student_maps), ("teacher_maps", teacher_maps)):
        check_float(name, maps)
        if maps.dim() < 2 or maps.numel() == 0:
            raise ValueError(
                f"{name}: expected [n, ...] with n > 0 and values in each, got {list(maps.shape)}"
            )
    if student_maps.shape != teacher_maps.shape:
        raise ValueError(
            f"teacher_maps: expected the shape of student_maps {list(student_maps.shape)},"
            f" got {list(teacher_maps.shape)}"
        )
    check_guidance(("student_maps", "teacher_maps"), student_maps, teacher_maps)
    exact = exact_dtype(student_maps, teacher_maps)
    student, teacher = student_maps.to(exact).flatten(1), teacher_maps.to(exact).flatten(1)
    return 1 - (unit_rows(student) * unit_rows(teacher)).sum(1).mean()


class E2KDLoss(Criterion):
    r"""Explanation-enhanced distillation (Parchami-Araghi et al., ECCV 2024), in one call a step.

    .. math:: L = T^2 \cdot KL\big(\sigma(t / T) \,\|\, \sigma(s / T)\big)
        + weight \cdot (1 - mean_i \cos(E^s_i, E^t_i))

    There is no cross-entropy. E is the class activation map of the teacher's most likely class in
    both models, after ReLU, at the size of the images, not min-max scaled. The student's map
    keeps the graph (a second order gradient from the layer on); the teacher's is made without one
    up to its layer and leaves nothing behind.

        criterion = E2KDLoss(student, teacher, "layer4", "layer4", weight=5.0)
        for images, _ in loader:
            criterion(images).loss.backward()

    Args:
        student: runs in the mode it is in.
        teacher: runs in eval mode, and is left as it was, ``.grad`` included. None where every call
            brings the teacher's maps and logits.
        student_layer, teacher_layer: modules or names, commonly the last convolution; with several,
            the mean of their maps.
        temperature: T; the authors use 1 and 5.
        weight: factor of the alignment; the authors search 0, 0.2, 1, 5, 10. 0 makes no maps.
        method: ``"gradcam"`` (the authors'), ``"gradcam++"``, ``"xgradcam"``, ``"hirescam"`` or
            ``"layercam"``.
        every: align in every so many steps only, the first included; the KL is in all of them. The
            count is part of the ``state_dict``. Calls without gradients always align and do not
            count; they explain the student in eval mode.

    The models are not submodules: ``parameters()`` is empty, and ``train()`` or ``to()`` reach
    neither. In train mode, batch norm makes a student's map depend on the batch, as it does in
    the authors' training.

    Raises:
        ValueError, TypeError: layers that the models do not have, options that do not fit.

    >>> import torch
    >>> def network(width):
    ...     return torch.nn.Sequential(torch.nn.Conv2d(1, width, 3), torch.nn.Softplus(),
    ...         torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(width, 10))
    >>> student, teacher = network(4), network(8)
    >>> criterion = E2KDLoss(student, teacher, "1", "1", weight=5.0)
    >>> out = criterion(torch.rand(2, 1, 8, 8))
    >>> out.loss.backward()
    >>> bool(out.loss == out.kl + 5 * out.alignment), teacher[0].weight.grad is None
    (True, True)
    """

    temperature: float
    weight: float
    method: str
    every: int

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        student_layer: Layers,
        teacher_layer: Layers | None,
        *,
        temperature: float = 1.0,
        weight: float = 1.0,
        method: str = "gradcam",
        every: int = 1,
    ) -> None:
        check_temperature(temperature)
        check_factors(weight=weight)
        check_choice("method", method, list(EXPLAINERS))
        check_counts(every=every)
        super().__init__(temperature=temperature, weight=weight, method=method, every=every)
        explainer = EXPLAINERS[method]
        # In tuples and explainers, neither model becomes a submodule.
        self._student = (student, resolve_layers(student, student_layer, "student_layer"))
        self._teacher = None
        self._teacher_cam = None
        if teacher is not None:
            if teacher_layer is None:
                raise ValueError("teacher_layer: expected a layer of the teacher, got None")
            self._teacher = (teacher,)
            self._teacher_cam = explainer(
                teacher, list(resolve_layers(teacher, teacher_layer, "teacher_layer"))
            )
        self.calls = 0

    def explain_teacher(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's maps ``[n, height, width]`` and logits, to keep for the frozen mode."""
        if self._teacher_cam is None:
            raise ValueError("teacher: expected a model to explain, got None")
        with self._teacher_cam as cam:
            maps = cam(images, normalize=None)
            return maps, cam.outputs

    def forward(
        self,
        images: Tensor,
        *,
        teacher_maps: Tensor | None = None,
        teacher_logits: Tensor | None = None,
    ) -> E2KDOutput:
        """The loss of a batch of images ``[n, channels, height, width]``.

        Args:
            images: the batch.
            teacher_maps: frozen mode: ``[n, height, width]`` of the same images, as of
                :meth:`explain_teacher`.
            teacher_logits: ``[n, classes]`` of the same images; with both, or with logits in a
                step that does not align, the teacher is not run.
        """
        training = torch.is_grad_enabled()
        align = self.weight > 0 and (not training or self.calls % self.every == 0)
        if align and teacher_maps is None:
            teacher_maps, computed = self.explain_teacher(images)
            teacher_logits = computed if teacher_logits is None else teacher_logits
        elif teacher_logits is None:
            if self._teacher is None:
                raise ValueError("teacher_logits: expected logits where there is no teacher")
            with torch.no_grad(), evaluating(self._teacher[0]):
                teacher_logits = self._teacher[0](images)
        check_logits("teacher_logits", teacher_logits, images)
        maps, student_logits = self._run_student(images, teacher_logits.argmax(1), align)
        kl = soft_loss(student_logits, teacher_logits, self.temperature)
        alignment = None
        loss = kl
        if maps is not None and teacher_maps is not None:
            alignment = e2kd_loss(maps, teacher_maps)
            loss = kl + self.weight * alignment
            alignment = alignment.detach()
        # Counted once the step has gone well.
        self.calls += training
        return E2KDOutput(loss, kl.detach(), alignment, student_logits, teacher_logits)

    def _run_student(
        self, images: Tensor, targets: Tensor, align: bool
    ) -> tuple[Tensor | None, Tensor]:
        model, layers = self._student
        if not align:
            logits = model(images)
            check_logits("student", logits, images)
            return None, logits
        if not torch.is_grad_enabled():
            # Indices made in inference mode can be part of no graph, and the map needs one.
            with torch.inference_mode(False):
                targets = targets.clone()
            with EXPLAINERS[self.method](model, list(layers)) as cam:
                return cam(images, targets, normalize=None), cam.outputs
        with capture(model, list(layers)) as captured:
            logits = model(images)
        check_logits("student", logits, images)
        maps = captured.cam(
            self.method,
            score=logits.gather(1, targets[:, None]).sum(),
            size=(images.shape[-2], images.shape[-1]),
            normalize=None,
            differentiable=True,
        )
        return maps, logits

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


def _pooled(maps: Tensor, size: int) -> Tensor:
    return maps if maps.shape[2:] == (size, size) else F.adaptive_avg_pool2d(maps, size)


def _check_maps(name: str, tensor: Any) -> None:
    check_float(name, tensor)
    if tensor.dim() != 4 or tensor.numel() == 0:
        raise ValueError(
            f"{name}: expected maps [n, channels, h, w] with none of them 0, got"
            f" {list(tensor.shape)}"
        )


def _check_options(
    pool: int | None, normalize: bool, binarize: bool, top: int | None, bottom: int | None
) -> None:
    for name, value in (("pool", pool), ("top", top), ("bottom", bottom)):
        if value is not None:
            check_counts(**{name: value})
    check_flags(normalize=normalize, binarize=binarize)
    if top is not None and bottom is not None:
        raise ValueError(f"top: expected None beside bottom={bottom}, got {top}")


def _only(model: nn.Module, layer: nn.Module | str, argument: str) -> dict[str, nn.Module]:
    if not isinstance(layer, (nn.Module, str)):
        raise TypeError(f"{argument}: expected a name or a module, got {type(layer).__name__}")
    return resolve_layers(model, layer, argument)


def _linear_head(model: nn.Module, head: nn.Module | str | None, argument: str) -> nn.Module:
    if head is None:
        linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        if len(linear) != 1:
            found = f"{len(linear)}: {', '.join(linear[-3:])}" if linear else "none"
            raise ValueError(
                f"{argument}: expected the head's name, since {type(model).__name__} has not one"
                f" nn.Linear but {found}"
            )
        head = linear[0]
    ((name, module),) = _only(model, head, argument).items()
    one_by_one = isinstance(module, nn.Conv2d) and (module.kernel_size, module.groups) == (
        (1, 1),
        1,
    )
    if not isinstance(module, nn.Linear) and not one_by_one:
        raise ValueError(
            f"{argument}: expected an nn.Linear or a 1x1 nn.Conv2d, got {name!r}, a"
            f" {type(module).__name__}"
        )
    return module
