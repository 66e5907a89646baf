"""Virtual attention (VAM): convolutions weigh groups of their inputs, and fold to plain ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastxkd.cam.capture import resolve_layers
from fastxkd.ops._checks import check_choice, check_counts, check_factors, check_positive
from fastxkd.train.distiller import Batches, Distiller, TrainSettings

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
REDUCTIONS = ("mean", "sum")


class VirtualAttention(nn.Module):
    r"""A model whose convolutions attend to groups of their input channels (Xue et al. 2021).

    The input channels of a convolution are G groups, its filters blocks; block j weighs group g:

    .. math::
        \alpha_{j} = softmax(a_j / \tau),\quad
        y_j = G \sum_g \alpha_{jg}\, (W_{jg} * x_g),\quad
        L = L_{KD} + \gamma\, mean_j H(\alpha_j)

    No equations of the paper's module (VAM) are to be found: these are our reading of its
    description, and so are all arguments. The factor G and a = 0 at the start make it the model as
    it was. The attention is a factor of the weight, so that training costs one convolution, too,
    and :meth:`fold` leaves plain convolutions.

    Args:
        model: is changed in place: its convolutions' weights become functions of the weights and
            of a. A convolution with groups of its own has G groups in each of them.
        groups: G. Where the input channels are no multiple of it, groups differ by a channel.
        blocks: of filters, of one attention each; None: as many as ``groups``. At most one for
            each filter; filters are shared out as the channels are.
        temperature: tau.
        layers: names or modules; None: all convolutions (1-D, 2-D and 3-D) with at least ``groups``
            input channels a group of their own, which leaves out depthwise ones and the first.
            Those that share their weight with another layer are left out as well.

    Raises:
        ValueError, TypeError: no such layers, a layer that is no convolution, has fewer input
            channels than ``groups`` or shares its weight; a convolution that is parametrised
            already.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.BatchNorm2d(8))
    >>> keys, images = list(model.state_dict()), torch.rand(2, 8, 5, 5)
    >>> before = model(images)
    >>> attending = VirtualAttention(model)
    >>> torch.equal(attending(images), before), round(attending.entropy().item(), 4)
    (True, 1.3863)
    >>> plain = attending.fold()
    >>> list(plain.state_dict()) == keys
    True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        groups: int = 4,
        blocks: int | None = None,
        temperature: float = 1.0,
        layers: Sequence[nn.Module | str] | nn.Module | str | None = None,
    ) -> None:
        super().__init__()
        check_counts(groups=groups)
        check_positive(temperature=temperature)
        if blocks is not None:
            check_counts(blocks=blocks)
        self.model = model
        self.layers = _convolutions(model, groups, layers)
        for name in self.layers:
            convolution = model.get_submodule(name)
            weight: Any = convolution.weight
            attention = _Attention(weight, groups, blocks or groups, temperature)
            parametrize.register_parametrization(convolution, "weight", attention)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.model(*inputs, **options)

    def attention(self) -> dict[str, Tensor]:
        r""":math:`\alpha` of each layer by name, ``[blocks, groups]``."""
        return {name: attention.alpha() for name, attention in self._attentions().items()}

    def entropy(self, reduction: str = "mean") -> Tensor:
        r"""The penalty, :math:`H(\alpha_j)` in nats, with gradient.

        Args:
            reduction: ``"mean"`` over the blocks of all layers; ``"sum"``: of the layers' means. An
                interpretation.
        """
        check_choice("reduction", reduction, REDUCTIONS)
        layers = [attention.entropy() for attention in self._attentions().values()]
        if reduction == "mean":
            return torch.cat(layers).mean()
        return torch.stack([layer.mean() for layer in layers]).sum()

    def attention_parameters(self) -> list[nn.Parameter]:
        return [attention.logits for attention in self._attentions().values()]

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """Multiply the attention into the weights; returns the model with plain convolutions.

        The model has the ``state_dict`` keys of the one that was wrapped, in the same order, and
        computes what it computed before. This wrapper is of no more use.
        """
        self._attentions()
        for name in self.layers:
            _restore(self.model.get_submodule(name))
        self.layers = []
        return self.model

    def _attentions(self) -> dict[str, _Attention]:
        if not self.layers:
            raise RuntimeError("VirtualAttention: it was folded already")
        found = {}
        for name in self.layers:
            convolution: Any = self.model.get_submodule(name)
            found[name] = convolution.parametrizations.weight[-1]
        return found


class _Attention(nn.Module):
    """Of a convolution's weight ``[outputs, inputs, ...]``."""

    output_block: Tensor
    input_group: Tensor

    def __init__(self, weight: Tensor, groups: int, blocks: int, temperature: float) -> None:
        super().__init__()
        outputs, inputs = weight.shape[:2]
        self.groups, self.temperature = groups, temperature
        blocks = min(blocks, outputs)
        self.logits = nn.Parameter(weight.new_zeros(blocks, groups))
        for name, count, parts in (
            ("output_block", outputs, blocks),
            ("input_group", inputs, groups),
        ):
            place = torch.arange(count, device=weight.device) * parts // count
            self.register_buffer(name, place, persistent=False)

    def alpha(self) -> Tensor:
        return (self.logits / self.temperature).softmax(1)

    def entropy(self) -> Tensor:
        # The logarithm of the softmax, whose gradient is finite where the softmax is 0.
        surprise = (self.logits / self.temperature).log_softmax(1)
        return -(surprise.exp() * surprise).sum(1)

    def forward(self, weight: Tensor) -> Tensor:
        scale = self.groups * self.alpha()
        each = scale[self.output_block][:, self.input_group]
        return weight * each.view(*weight.shape[:2], *[1] * (weight.dim() - 2))


class VirtualAttentionDistiller(Distiller):
    """A :class:`Distiller` of a :class:`VirtualAttention` student, with its entropy in the loss.

    Args:
        student, batches, settings, options: as of :class:`Distiller`.
        entropy_weight: gamma. The paper's value is not to be found; 0.01 is ours, to be tuned.
        entropy_reduction: of :meth:`VirtualAttention.entropy`.

    Raises:
        ValueError, TypeError: a student of another class, or numbers that do not fit.
    """

    student: VirtualAttention

    def __init__(
        self,
        student: VirtualAttention,
        batches: Batches,
        settings: TrainSettings,
        *,
        entropy_weight: float = 1e-2,
        entropy_reduction: str = "mean",
        **options: Any,
    ) -> None:
        if not isinstance(student, VirtualAttention):
            raise TypeError(f"student: expected a VirtualAttention, got {type(student).__name__}")
        check_factors(entropy_weight=entropy_weight)
        check_choice("entropy_reduction", entropy_reduction, REDUCTIONS)
        self.entropy_weight, self.entropy_reduction = entropy_weight, entropy_reduction
        options["identity"] = {
            **(options.get("identity") or {}),
            "entropy_weight": entropy_weight,
            "entropy_reduction": entropy_reduction,
        }
        super().__init__(student, batches, settings, **options)

    def _loss(self, images: Tensor, labels: Tensor, *more: Tensor) -> Tensor:
        penalty = self.student.entropy(self.entropy_reduction)
        return super()._loss(images, labels, *more) + self.entropy_weight * penalty


def _restore(convolution: Any) -> None:
    """Not with ``remove_parametrizations``, which takes the weight from the class that copies of
    the module share: folding one would break the others."""
    weight = convolution.weight
    original = convolution.parametrizations.weight.original
    original.copy_(weight)
    del convolution._modules["parametrizations"]
    convolution.__class__ = type(convolution).__bases__[0]
    # In front of the bias and whatever else there is, as it was: files whose names differ are read
    # in order.
    others = dict(convolution._parameters)
    convolution._parameters.clear()
    convolution._parameters.update(weight=original, **others)


def _convolutions(model: Any, groups: int, layers: Any) -> list[str]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a Module, got {type(model).__name__}")
    named = layers is not None
    modules = resolve_layers(model, layers, "layers") if named else dict(model.named_modules())
    weights = [id(weight) for owner in model.modules() for weight in owner._parameters.values()]
    found = []
    for name, module in modules.items():
        if not isinstance(module, CONVOLUTIONS):
            if named:
                raise ValueError(
                    f"layers: expected convolutions (Conv1d, Conv2d, Conv3d), {name!r} is a"
                    f" {type(module).__name__}"
                )
            continue
        inputs = module.in_channels // module.groups
        if inputs < groups:
            if named:
                raise ValueError(
                    f"layers: expected at least the {groups} input channels of groups= in each"
                    f" group of a convolution's own, {name!r} has {inputs}"
                )
            continue
        weight = module._parameters.get("weight")
        if weight is None or parametrize.is_parametrized(module):
            raise ValueError(f"model: {name!r} is parametrised already")
        # One weight cannot hold the attentions of two layers.
        if weights.count(id(weight)) > 1:
            if named:
                raise ValueError(f"layers: {name!r} shares its weight with another layer")
            continue
        found.append(name)
    if not found:
        raise ValueError(
            f"model: expected a convolution with at least {groups} input channels and a weight of"
            " its own"
        )
    return found
