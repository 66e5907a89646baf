"""A classifier that is told where to look: its own network, and phi's maps of the image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxkd.cam.capture import in_backward, resolve_layers
from fastxkd.ops._checks import check_choice, check_counts, check_flags, check_float

__all__ = ["FUSIONS", "ExplainedStudent"]

FUSIONS = ("concat", "gate", "attend", "feature", "mask", "none")
FIRST_WEIGHTS = ("zeros", "random")


class ExplainedStudent(nn.Module):
    r"""One module, images to logits, of a student and the explanations that phi draws for it.

    How the two are fused is an interpretation of XDistillation (Alharbi, Vu and Thai 2021), and so
    an argument; with m the maps :math:`\phi(x)`:

    ===========  =================================================================================
    ``concat``   the student sees ``[x ; m]``: its first convolution gets channels for the maps
    ``gate``     it sees :math:`x (1 + \bar m)`, the mean over maps
    ``attend``   the output of its layer ``at`` is multiplied by :math:`1 + \bar m`, averaged over
                 the pixels of each position
    ``feature``  phi's coarsest features, averaged over positions, beside the student's own in
                 front of the classifier; of a linear classifier on both that is the sum of one on
                 each, so the student stays as it is and a linear layer without bias is added
    ``mask``     it sees :math:`x \bar m` alone, as MedTEX's (with one map)
    ``none``     the student by itself: the ablation
    ===========  =================================================================================

    Args:
        student: a classifier; taken over, with ``concat`` its first convolution is widened: the
            first of its modules, which is to be the one that is given the images.
        phi: images to maps ``[n, k, h, w]`` of the images' size, an
            :class:`~fastxkd.train.ExplanationAutoencoder` or any other; None with ``none``.
        fusion: see above.
        first_weights: of what is added for the maps in ``concat`` and ``feature``: ``"zeros"``,
            so that training starts from the very student it is compared with, or ``"random"``.
        at: name of the student's layer, for ``attend``; its output is ``[n, channels, h, w]``.
        maps: that phi draws, for ``concat``; by default ``phi.maps``.
        classes: of the logits, for ``feature``; by default those of the last linear layer.

    Saved and loaded by ``state_dict`` like any module, into one made by the same call.

    Raises:
        ValueError, TypeError: a fusion without what it needs.

    >>> import torch
    >>> from fastxkd.train import ExplanationAutoencoder
    >>> classifier = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(),
    ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 10))
    >>> images = torch.rand(2, 3, 16, 16)
    >>> before = classifier(images)
    >>> model = ExplainedStudent(classifier, ExplanationAutoencoder(3)).eval()
    >>> torch.allclose(model(images), before), model.explain(images).shape
    (True, torch.Size([2, 1, 16, 16]))
    """

    def __init__(
        self,
        student: nn.Module,
        phi: nn.Module | None = None,
        *,
        fusion: str = "concat",
        first_weights: str = "zeros",
        at: str | None = None,
        maps: int | None = None,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        for name, module in (("student", student), ("phi", phi)):
            if not isinstance(module, nn.Module) and not (module is None and name == "phi"):
                raise TypeError(f"{name}: expected a module, got {type(module).__name__}")
        check_choice("fusion", fusion, FUSIONS)
        check_choice("first_weights", first_weights, FIRST_WEIGHTS)
        if (phi is None) != (fusion == "none"):
            raise ValueError(
                f"phi: expected {'None' if phi is not None else 'a module'} with fusion={fusion!r},"
                f" got {'None' if phi is None else type(phi).__name__}"
            )
        self.fusion, self.first_weights, self.phi_frozen = fusion, first_weights, False
        self.student, self.phi, self.at = student, phi, at
        if (at is None) == (fusion == "attend"):
            raise ValueError(
                f"at: expected {'a layer' if at is None else 'None'} with fusion={fusion!r},"
                f" got {at!r}"
            )
        for name, given, owner in (("maps", maps, "concat"), ("classes", classes, "feature")):
            if given is None:
                continue
            check_counts(**{name: given})
            if fusion != owner:
                raise ValueError(f"{name}: expected None with fusion={fusion!r}, got {given}")
        if at is not None:
            _attend(student, at)
        self.side: nn.Linear | None = None
        if fusion == "concat":
            assert phi is not None
            extra = _number(phi, "maps") if maps is None else maps
            _widen(student, getattr(phi, "channels", None), extra, first_weights)
        if fusion == "feature":
            assert phi is not None
            if not callable(getattr(phi, "explained", None)):
                raise TypeError("phi: fusion='feature' needs an ExplanationAutoencoder")
            self.side = nn.Linear(
                _number(phi, "bottleneck"), classes or _classes(student), bias=False
            )
            if first_weights == "zeros":
                nn.init.zeros_(self.side.weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.explained(images)[0]

    def explained(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and phi's maps ``[n, k, h, w]`` of the images; None without phi."""
        check_float("images", images)
        if self.phi is None:
            return self.student(images), None
        coarsest = None
        if self.side is not None:
            maps, coarsest = self.phi.explained(images)  # type: ignore[operator]
        else:
            maps = self.phi(images)
        check_float("phi", maps)
        if maps.dim() != 4 or maps.shape[2:] != images.shape[2:] or len(maps) != len(images):
            raise ValueError(
                f"phi: expected maps [{len(images)}, k, {', '.join(map(str, images.shape[2:]))}]"
                f" of images {list(images.shape)}, got {list(maps.shape)}"
            )
        with _shown(maps if self.fusion == "attend" else None):
            logits = self.student(self._seen(images, maps))
        if self.side is not None:
            assert coarsest is not None
            logits = logits + self.side(coarsest.flatten(2).mean(2))
        return logits, maps

    def explain(self, images: Tensor) -> Tensor:
        """phi's maps alone, ``[n, k, h, w]``.

        Raises:
            ValueError: there is no phi.
        """
        if self.phi is None:
            raise ValueError("phi: this student was made without one, there is nothing to draw")
        maps: Tensor = self.phi(images)
        return maps

    def seen(self, images: Tensor) -> Tensor:
        """What the student itself is given for these images."""
        check_float("images", images)
        return images if self.phi is None else self._seen(images, self.phi(images))

    def _seen(self, images: Tensor, maps: Tensor) -> Tensor:
        if self.fusion == "concat":
            return torch.cat([images, maps.to(images.dtype)], 1)
        if self.fusion == "gate":
            return (images * (1 + _mean(maps))).to(images.dtype)
        if self.fusion == "mask":
            return (images * _mean(maps)).to(images.dtype)
        return images.clone()  # which the student may change, where phi's backward pass needs it

    def freeze_phi(self, frozen: bool = True) -> None:
        """Keep phi as it is, running statistics included, while the rest is trained."""
        check_flags(frozen=frozen)
        if self.phi is None:
            raise ValueError("phi: this student was made without one")
        self.phi_frozen = frozen
        self.phi.requires_grad_(not frozen)
        self.phi.train(self.training and not frozen)

    def train(self, mode: bool = True) -> ExplainedStudent:
        super().train(mode)
        if self.phi is not None and self.phi_frozen:
            self.phi.eval()
        return self

    def extra_repr(self) -> str:
        return f"fusion={self.fusion!r}"


# What the layer that attends is shown, for the pass that runs in this thread.
_MAP: ContextVar[Tensor | None] = ContextVar("map", default=None)


@contextmanager
def _shown(maps: Tensor | None) -> Iterator[None]:
    token = _MAP.set(maps)
    try:
        yield
    finally:
        _MAP.reset(token)


class _Attending(nn.Module):
    """A layer, and one plus the map over its output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        features: Tensor = self.inner(*inputs, **options)
        maps = _MAP.get()
        if maps is None:
            if in_backward():
                raise RuntimeError(
                    "at: this layer is run again by a checkpoint, which does not know phi's maps;"
                    " expected a student without checkpoints around its layer at="
                )
            return features
        height, width = features.shape[2:]
        gate = 1 + F.adaptive_avg_pool2d(_mean(maps), (height, width))
        return (features * gate).to(features.dtype)


def _mean(maps: Tensor) -> Tensor:
    # Under autocast maps have 16 bits, in which one plus a map loses what tells it from another.
    return maps.to(torch.promote_types(maps.dtype, torch.float32)).mean(1, keepdim=True)


def _attend(student: nn.Module, at: str) -> None:
    layers = resolve_layers(student, at, "at", "student")
    name, layer = next(iter(layers.items()))
    parent, _, child = name.rpartition(".")
    setattr(student.get_submodule(parent), child, _Attending(layer))


def _widen(student: nn.Module, channels: int | None, extra: int, first_weights: str) -> None:
    """Give the first convolution of ``student`` ``extra`` more channels to read.

    It stays the module that it is, of whatever class, with its hooks and flags.
    """
    check_counts(maps=extra)
    convolutions = [(n, m) for n, m in student.named_modules() if isinstance(m, nn.Conv2d)]
    if not convolutions:
        raise ValueError("student: fusion='concat' needs one that starts with a Conv2d, found none")
    name, old = convolutions[0]
    if old.groups != 1:
        raise ValueError(
            f"student: its first convolution, {name!r}, has {old.groups} groups; fusion='concat'"
            " needs one without"
        )
    if not name:
        raise ValueError("student: expected a classifier, got a convolution")
    if channels not in (None, old.in_channels):
        raise ValueError(
            f"student: its first convolution, {name!r}, takes {old.in_channels} channels, but phi"
            f" {channels}; fusion='concat' widens the one that is given the images"
        )
    if not isinstance(old._parameters.get("weight"), nn.Parameter):
        raise ValueError(
            f"student: its first convolution, {name!r}, is parametrised; fusion='concat' needs a"
            " plain one"
        )
    wide = nn.Conv2d(
        old.in_channels + extra,
        old.out_channels,
        kernel_size=(old.kernel_size[0], old.kernel_size[1]),
        bias=old.bias is not None,
        device=old.weight.device,
        dtype=old.weight.dtype,
    ).weight
    with torch.no_grad():
        wide[:, : old.in_channels] = old.weight
        if first_weights == "zeros":
            wide[:, old.in_channels :] = 0
    old.weight = wide.requires_grad_(old.weight.requires_grad)
    old.in_channels += extra


def _number(phi: nn.Module, name: str) -> int:
    value = getattr(phi, name, None)
    if not isinstance(value, int):
        raise ValueError(f"{name}: phi does not say; pass {name}= or an ExplanationAutoencoder")
    return value


def _classes(student: nn.Module) -> int:
    heads = [module for module in student.modules() if isinstance(module, nn.Linear)]
    if not heads:
        raise ValueError("classes: the student has no linear layer that would tell; pass classes=")
    return heads[-1].out_features
