"""KDExplainer's student: a hierarchy of blocks in which every class finds a path of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fastxkd.ops._checks import (
    check_choice,
    check_counts,
    check_float,
    check_number,
    check_positive,
)
from fastxkd.train.routing_tree import RoutingTree

HEADS = ("ce", "nce")
LEVELS = (2, 4, 8)
WIDTHS = ((64, 64), (64, 64), (64, 32))


class KDExplainer(nn.Module):
    r"""The student of KDExplainer (Xue et al., IJCAI 2021): K classes as K tasks of one class each.

    Levels of blocks, each (3x3 convolution, batch norm, ReLU) twice and max pooling by 2; after
    the last, one small head for each class, whose answers side by side are the logits. Between two
    levels a routing matrix W (children by parents) says where a child's input comes from:

    .. math::
        p_i = softmax_j(W_{ij} / 0.5),\quad
        d_i = softmax_j(\ln p_{ij} / t),\quad
        in_i = \sum_j d_{ij}\, out_j

    with t annealed while training (see :class:`fastxkd.train.KDExplainerDistiller`). In eval mode,
    and once the tree is fixed, d is 1 at the greatest p and 0 elsewhere.

    Images of any size from ``2 ** len(levels)`` pixels a side; the published network is for 32.

    Args:
        num_classes: K.
        in_channels: of the images.
        levels: blocks of each level.
        widths: channels in the middle and at the end of each level's blocks.
        head: ``"ce"``: one logit a class; ``"nce"``: two, of which the greater counts.
        pooled: side of what a head sees of the last level, by average pooling.
        hidden: width of the two hidden layers of a head.
        dropout: after each of them.
        head_std: spread of the heads' first weights. The published 0.01 is made for wide heads;
            narrow ones say next to nothing at first and learn sooner with 0.1.
        routing_temperature: the 0.5 above.
        stem: channels of a 7x7 convolution (batch norm, ReLU, max pooling by 2) before the levels,
            as published for larger images; None: none, as for CIFAR.

    Attributes:
        temperature: t; 10, that of the first epoch, until it is set. Not part of the state.

    Raises:
        ValueError, TypeError: numbers that do not fit.

    >>> student = KDExplainer(num_classes=3, in_channels=1, widths=[(4, 4)] * 3, hidden=8).eval()
    >>> student(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 3])
    >>> [gate.sum().item() for gate in student.gates()]
    [4.0, 8.0, 3.0]
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int = 3,
        levels: Sequence[int] = LEVELS,
        widths: Sequence[tuple[int, int]] = WIDTHS,
        head: str = "ce",
        pooled: int = 7,
        hidden: int = 128,
        dropout: float = 0.15,
        head_std: float = 0.01,
        routing_temperature: float = 0.5,
        stem: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("head", head, HEADS)
        check_counts(num_classes=num_classes, in_channels=in_channels, pooled=pooled, hidden=hidden)
        check_positive(routing_temperature=routing_temperature, head_std=head_std)
        check_number("dropout", dropout)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a share in [0, 1), got {dropout}")
        for name, given in (("levels", levels), ("widths", widths)):
            if not isinstance(given, Sequence):
                raise TypeError(f"{name}: expected a sequence, got {type(given).__name__}")
        levels, widths = tuple(levels), tuple(widths)
        for blocks in levels:
            check_counts(levels=blocks)
        if (
            not levels
            or len(widths) != len(levels)
            or any(not isinstance(pair, Sequence) or len(pair) != 2 for pair in widths)
        ):
            raise ValueError(
                f"widths: expected two for each of the levels {list(levels)}, got {list(widths)}"
            )
        for width in chain.from_iterable(widths):
            check_counts(widths=width)
        self.in_channels, self.levels = in_channels, levels
        self.routing_temperature = routing_temperature
        self.temperature, self.fixed = 10.0, False
        self.stem: nn.Module = nn.Identity()
        if stem is not None:
            check_counts(stem=stem)
            self.stem = nn.Sequential(
                nn.Conv2d(in_channels, stem, 7, bias=False),
                nn.BatchNorm2d(stem),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )
            in_channels = stem
        self.blocks = nn.ModuleList()
        for number, (blocks, (middle, outputs)) in enumerate(zip(levels, widths, strict=True)):
            self.blocks.append(_Level(blocks, in_channels, middle, outputs, shared=number == 0))
            in_channels = outputs
        self.routing = nn.ParameterList(
            nn.Parameter(torch.rand(children, parents))
            for parents, children in zip(levels, (*levels[1:], num_classes), strict=True)
        )
        self.pool = nn.AdaptiveAvgPool2d(pooled)
        self.heads = nn.Sequential(
            _Linears(num_classes, in_channels * pooled**2, hidden, head_std),
            nn.ReLU(),
            nn.Dropout(dropout),
            _Linears(num_classes, hidden, hidden, head_std),
            nn.ReLU(),
            nn.Dropout(dropout),
            _Linears(num_classes, hidden, 1 if head == "ce" else 2, head_std),
        )
        self.reset_weights()

    def forward(self, images: Tensor) -> Tensor:
        check_float("images", images)
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"images: expected [n, {self.in_channels}, h, w], got {list(images.shape)}"
            )
        smallest = 2 ** len(self.levels)
        outputs = self.stem(images)
        if min(outputs.shape[-2:]) < smallest:
            raise ValueError(
                f"images: expected at least {smallest} pixels a side"
                f"{'' if isinstance(self.stem, nn.Identity) else ' after the stem'},"
                f" got {list(outputs.shape[-2:])}"
            )
        last = len(self.levels) - 1
        for number, (level, blocks) in enumerate(zip(self.blocks, self.levels, strict=True)):
            outputs = level(outputs)
            if number == last:
                # Pooling commutes with the sum over parents, of which there are fewer.
                outputs = self.pool(outputs)
            children = self._route(number, outputs.unflatten(1, (blocks, -1)))
            outputs = children.flatten(1, 2)
        answers: Tensor = self.heads(children.flatten(2).transpose(0, 1))  # [classes, n, 1 or 2]
        return answers.amax(2).T

    def _route(self, number: int, outputs: Tensor) -> Tensor:
        """``[n, parents, channels, h, w]`` to ``[n, children, channels, h, w]``."""
        routing = self.routing[number]
        if self._hard():
            # Not a product with ones and zeros: what a block not taken computes may be infinite.
            return outputs[:, routing.argmax(1)]
        gates = self._gates(routing, self.temperature).to(outputs.dtype)
        return torch.einsum("kb,nbchw->nkchw", gates, outputs)

    def gates(self) -> list[Tensor]:
        """d of each routing as it is now, ``[children, parents]``; rows are one-hot in eval mode
        and once the tree is fixed."""
        if self._hard():
            return [
                nn.functional.one_hot(w.argmax(1), w.shape[1]).to(w.dtype) for w in self.routing
            ]
        return [self._gates(w, self.temperature) for w in self.routing]

    def _hard(self) -> bool:
        return self.fixed or not self.training

    def _gates(self, routing: Tensor, temperature: float) -> Tensor:
        return ((routing / self.routing_temperature).log_softmax(1) / temperature).softmax(1)

    def attention_entropy(self, temperature: float = 1.0) -> list[Tensor]:
        r"""How undecided each child is between its parents.

        .. math:: H_i = -\sum_j d_{ij} \ln d_{ij}

        The paper finds it lower after distillation than after training on labels, smoothed or not:
        classes that share a block quarrel less.

        Args:
            temperature: t of d. The paper does not say which; 1, where d is p, does not depend on
                the length of the training and is our reading. With the t of an epoch it is the
                entropy of the gates as they were then.

        Returns:
            ``[children]`` for each routing, without graph.

        >>> student = KDExplainer(num_classes=3, widths=[(4, 4)] * 3, hidden=8)
        >>> [h.shape for h in student.attention_entropy()]
        [torch.Size([4]), torch.Size([8]), torch.Size([3])]
        """
        check_positive(temperature=temperature)
        with torch.no_grad():
            gates = [self._gates(w.double(), temperature) for w in self.routing]
            return [torch.special.entr(gate).sum(1) for gate in gates]

    def tree(self) -> RoutingTree:
        """The path of each class in eval mode."""
        parents = tuple(tuple(w.detach().argmax(1).tolist()) for w in self.routing)
        return RoutingTree(self.levels, parents)

    def fix_tree(self, *, reset: bool = True) -> RoutingTree:
        """From here on the paths stay as they are, in train mode too: the second stage.

        Args:
            reset: draw the blocks' and heads' weights anew, as the published second stage does;
                False goes on from those of the first.
        """
        self.fixed = True
        for routing in self.routing:
            routing.requires_grad_(False)
        if reset:
            self.reset_weights()
        return self.tree()

    def routing_parameters(self) -> list[nn.Parameter]:
        return list(self.routing)

    def network_parameters(self) -> list[nn.Parameter]:
        routing = set(self.routing)
        return [p for p in self.parameters() if p not in routing]

    @torch.no_grad()
    def reset_weights(self) -> None:
        """Draw all weights but the routing anew."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.out_channels // module.groups * math.prod(module.kernel_size)
                if isinstance(module, _Shared):
                    fan //= module.blocks
                # Filled where it lies, a tensor's numbers would depend on its memory format.
                drawn = torch.randn(module.weight.shape, device=module.weight.device)
                module.weight.copy_(math.sqrt(2 / fan) * drawn)
            elif isinstance(module, (nn.BatchNorm2d, _Linears)):
                module.reset_parameters()


class _Shared(nn.Conv2d):
    """First convolution of several blocks that have the same input."""

    def __init__(self, blocks: int, inputs: int, outputs: int, **options: Any) -> None:
        super().__init__(inputs, outputs * blocks, **options)
        self.blocks = blocks


class _Level(nn.Sequential):
    """Blocks side by side: one convolution with a group for each, instead of many small ones."""

    def __init__(
        self, blocks: int, inputs: int, middle: int, outputs: int, *, shared: bool
    ) -> None:
        options: dict[str, Any] = {"kernel_size": 3, "padding": 1, "bias": False}
        first: nn.Module
        if shared:
            first = _Shared(blocks, inputs, middle, **options)
        else:
            first = nn.Conv2d(inputs * blocks, middle * blocks, groups=blocks, **options)
        super().__init__(
            first,
            nn.BatchNorm2d(middle * blocks),
            nn.ReLU(),
            nn.Conv2d(middle * blocks, outputs * blocks, groups=blocks, **options),
            nn.BatchNorm2d(outputs * blocks),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )


class _Linears(nn.Module):
    """A linear layer for each class: ``[classes, n, inputs]`` to ``[classes, n, outputs]``."""

    def __init__(self, classes: int, inputs: int, outputs: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(classes, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(classes, 1, outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, inputs, self.weight)
