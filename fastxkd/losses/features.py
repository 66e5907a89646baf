"""Losses on features: the student's activations are pulled towards the teacher's.

Sums over both features are taken a few samples at a time (``_blocks.py``); all else is
convolutions, pooling and matrices of a few numbers, where plain torch is at its floor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxkd.losses._blocks import (
    blockwise,
    in_blocks,
    mean_squared_error,
    row_blocks,
    same_size,
    squared_error,
)
from fastxkd.losses._criterion import Criterion
from fastxkd.ops._checks import (
    NAMES,
    check_channels,
    check_counts,
    check_number,
    check_pair,
    check_positive,
    check_precision,
)
from fastxkd.ops._library import differentiable_once, exact_dtype
from fastxkd.ops._rows import at_hand, ordinary, power_of_two, unit_rows

__all__ = ["ATLoss", "FitNetLoss", "VIDLoss", "at_loss", "fitnet_loss", "vid_loss"]

# --- FitNet


def fitnet_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Hint loss of FitNets: the mean squared difference of two features.

    .. math:: L = \frac{1}{n c h w} \| F_s - F_t \|^2

    for features of equal channels, of which the larger is average-pooled to the smaller size (the
    teacher's features too: the features themselves, not a map made of them). For the regressor
    between different channels see :class:`FitNetLoss`. Usual factor: 100.

    Args:
        student_features: ``[n, channels]`` or ``[n, channels, ...]``, any float dtype.
        teacher_features: the same n and channels, without gradient.

    Returns:
        A scalar, float64 if one feature is float64, else float32; 16-bit gradients are rounded
        once. Differentiable once.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, a teacher that requires grad.

    Romero et al. 2015, FitNets: Hints for Thin Deep Nets.

    >>> import torch
    >>> fitnet_loss(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 8, 8)).item()
    1.0
    """
    check_pair(student_features, teacher_features)
    check_channels("teacher_features", teacher_features, student_features.shape[1])
    student, teacher = same_size(student_features, teacher_features)
    return mean_squared_error(student, teacher)


class _Regressor(nn.Sequential):
    """1x1 convolutions, on ``[n, channels]`` as well as on images; ReLU between them.

    In the dtype of their weights, whatever the features come in.
    """

    def __init__(self, channels: Sequence[int], *, bias: bool) -> None:
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(channels):
            layers += [nn.ReLU(), nn.Conv2d(narrow, wide, 1, bias=bias)]
        super().__init__(*layers[1:])

    @property
    def weight(self) -> Tensor:
        return next(self.parameters())

    def forward(self, features: Tensor) -> Tensor:
        features = features.to(self.weight.dtype)
        if features.dim() == 4:
            return super().forward(features)  # type: ignore[no-any-return]
        if features.dim() > 2:
            image = features.reshape(*features.shape[:2], -1, 1)
            return super().forward(image).reshape(features.shape[0], -1, *features.shape[2:])
        # A convolution of one position is a matrix product, and several times as slow as one.
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                features = F.linear(features, layer.weight.flatten(1), layer.bias)
            else:
                features = layer(features)
        return features


class FitNetLoss(nn.Module):
    """:func:`fitnet_loss` behind a regressor from the student's channels to the teacher's.

    A 1x1 convolution, on ``[n, channels]`` features a linear layer of the same weights; without
    batch norm. A student larger than its teacher is pooled before the regressor, which is the same
    and cheaper: averaging and a 1x1 convolution commute.

    Args:
        student_channels, teacher_channels: sizes of the features' second dimension.

    The student's features are brought to the dtype of the parameters, and may not be wider. The
    parameters belong to the training: pass ``criterion.parameters()`` to the optimiser too.

    >>> import torch
    >>> criterion = FitNetLoss(8, 16)
    >>> criterion(torch.randn(2, 8, 4, 4), torch.randn(2, 16, 4, 4)).shape
    torch.Size([])
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        check_counts(student_channels=student_channels, teacher_channels=teacher_channels)
        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self.regressor = _Regressor([student_channels, teacher_channels], bias=True)

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        check_pair(student_features, teacher_features)
        check_channels(NAMES[0], student_features, self.student_channels)
        check_channels(NAMES[1], teacher_features, self.teacher_channels)
        check_precision(NAMES[0], student_features, self.regressor.weight)
        student, teacher = same_size(student_features, teacher_features)
        student = self.regressor(student)
        return mean_squared_error(student, teacher)

    def extra_repr(self) -> str:
        return f"{self.student_channels}, {self.teacher_channels}"


# --- AT


class _Energy(torch.autograd.Function):
    """``[n, ...]`` means of ``|x|^p`` over the channels, each sample's up to a power of two.

    That power, for x and not for the means, is the second result: where squares vanish or overflow,
    and where asking would be a wait for the device. Else it is empty.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor, p: float, exact: torch.dtype) -> tuple[Tensor, Tensor]:
        scale = features.new_empty(0, dtype=exact)
        if blockwise(features):
            energy = _energy(features, p, scale)
            if ordinary(energy.flatten(1).amax(1)):
                return energy, scale
        others = tuple(range(1, features.dim()))
        scale = torch.cat(
            [power_of_two(features[rows].to(exact), others) for rows in row_blocks(features)]
        )
        return _energy(features, p, scale), scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], output[1])
        ctx.p = inputs[1]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None
        features, scale = ctx.saved_tensors
        factor = (upstream * (ctx.p / features.shape[1])).unsqueeze(1)
        if scale.numel():
            factor = factor * scale

        def part(rows: slice) -> Tensor:
            return _odd_power(_scaled(features[rows], scale, rows), ctx.p - 1) * factor[rows]

        return in_blocks(features, part), None, None


def _energy(features: Tensor, p: float, scale: Tensor) -> Tensor:
    return torch.cat(
        [_power(_scaled(features[rows], scale, rows), p).mean(1) for rows in row_blocks(features)]
    )


def _scaled(features: Tensor, scale: Tensor, rows: slice) -> Tensor:
    features = features.to(scale.dtype)
    return features * scale[rows] if scale.numel() else features


def _power(x: Tensor, p: float) -> Tensor:
    return x.square() if p == 2 else x.abs() if p == 1 else x.abs().pow_(p)


def _odd_power(x: Tensor, p: float) -> Tensor:
    """sign(x) |x|^p, the derivative of |x|^(p + 1) without its factor."""
    return x if p == 1 else x.sign() if p == 0 else x.abs().pow_(p).mul_(x.sign())


def at_loss(student_features: Tensor, teacher_features: Tensor, *, p: float = 2.0) -> Tensor:
    r"""Attention transfer: where the activations are, whatever channel they are in.

    .. math::
        Q(F) = \frac{A}{\|A\|_2}, \quad A_{xy} = \frac{1}{c} \sum_c |F_{cxy}|^p, \qquad
        L = \mathrm{mean}\, (Q(F_s) - Q(F_t))^2

    over samples and positions, A flattened per sample. The features of the larger size are
    average-pooled to the smaller before their power is taken, as in the published code. Channels
    may differ. Usual factor: 1000. A sample without any activation has Q = 0 and no gradient;
    otherwise its size does not matter.

    Args:
        student_features: ``[n, channels, ...]`` with one to three spatial dimensions, any float
            dtype.
        teacher_features: the same n and number of dimensions, without gradient.
        p: at least 1.

    Returns:
        A scalar, float64 if one feature is float64, else float32. Differentiable once.

    Raises:
        ValueError, TypeError: shapes, dtypes or p that do not fit, a teacher that requires grad.

    Zagoruyko and Komodakis 2017, Paying More Attention to Attention.

    >>> import torch
    >>> x = torch.rand(2, 3, 4, 4)
    >>> round(at_loss(x, 5 * x.repeat(1, 2, 1, 1)).item(), 6)
    0.0
    """
    check_pair(student_features, teacher_features)
    for name, features in zip(NAMES, (student_features, teacher_features), strict=True):
        if features.dim() < 3:
            raise ValueError(
                f"{name}: expected [n, channels, ...] with spatial dimensions,"
                f" got shape {list(features.shape)}"
            )
    _check_power(p)
    exact = exact_dtype(student_features, teacher_features)
    student, teacher = (
        _attention(x, float(p), exact) for x in same_size(student_features, teacher_features)
    )
    return (student - teacher).square().mean()


def _attention(features: Tensor, p: float, exact: torch.dtype) -> Tensor:
    """``[n, positions]``, rows of length 1."""
    if at_hand(features) and len(row_blocks(features)) == 1:  # small: calls are what costs
        energy = _power(features.to(exact), p).mean(1).flatten(1)
        norm = torch.linalg.vector_norm(energy, dim=1, keepdim=True)
        if ordinary(norm):
            return energy / norm
    return unit_rows(_Energy.apply(features, p, exact)[0].flatten(1))


def _check_power(p: float) -> None:
    check_number("p", p)
    if not 1 <= p < math.inf:
        raise ValueError(f"p: expected a finite number of at least 1, got {p}")


class ATLoss(Criterion):
    """:func:`at_loss` as a module: ``criterion(student_features, teacher_features)``.

    >>> import torch
    >>> x = torch.rand(2, 3, 4, 4)
    >>> ATLoss(p=1)(x, x).item()
    0.0
    """

    def __init__(self, *, p: float = 2.0) -> None:
        _check_power(p)
        super().__init__(p=p)

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        return at_loss(student_features, teacher_features, **self.options())


# --- VID


def vid_loss(student_features: Tensor, teacher_features: Tensor, *, variance: Tensor) -> Tensor:
    r"""Variational information distillation: a Gaussian with one variance per channel.

    .. math:: L = \mathrm{mean}\, \left[ \log \sigma_c + \frac{(F_t - \mu)^2}{2 \sigma_c^2} \right]

    over all elements: the negative log-likelihood of the teacher's features, without its constant,
    given the mean :math:`\mu` predicted from the student's. Sizes are matched as in
    :func:`fitnet_loss`. Of the variance only the sums per channel are divided. Usual factor: 1.

    Args:
        student_features: the prediction :math:`\mu`, ``[n, channels]`` or ``[n, channels, ...]``.
        teacher_features: the same n and channels, without gradient.
        variance: :math:`\sigma^2`, ``[channels]``, above 0; may require grad. Its values are looked
            at on the CPU only, outside of compiled code; elsewhere the loss is NaN or infinite.

    Returns:
        A scalar, float64 if one feature is float64, else float32. It has no lower bound: variances
        may shrink with the error. Differentiable once in the features.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, a teacher that requires grad.

    Ahn et al. 2019, Variational Information Distillation for Knowledge Transfer.

    >>> import torch
    >>> x = torch.ones(2, 3, 4, 4)
    >>> vid_loss(x, 3 * x, variance=torch.ones(3)).item()
    2.0
    """
    check_pair(student_features, teacher_features)
    check_channels("teacher_features", teacher_features, student_features.shape[1])
    if not isinstance(variance, Tensor):
        raise TypeError(f"variance: expected a Tensor, got {type(variance).__name__}")
    if variance.shape != student_features.shape[1:2]:
        raise ValueError(
            f"variance: expected one value per channel, [{student_features.shape[1]}],"
            f" got shape {list(variance.shape)}"
        )
    if at_hand(variance) and not bool((variance > 0).all()):
        least = variance.detach().amin().item()
        raise ValueError(f"variance: expected values above 0, got {least}")
    student, teacher = same_size(student_features, teacher_features)
    error = squared_error(student, teacher) * (student.shape[1] / student.numel())
    variance = variance.to(error.dtype)
    return 0.5 * (variance.log() + error / variance).mean()


class VIDLoss(nn.Module):
    r""":func:`vid_loss` with its learned parts.

    The mean comes from three 1x1 convolutions with ReLU between them and no biases, from the
    student's channels over ``mid_channels`` twice to the teacher's; the variance is
    :math:`\mathrm{softplus}(\rho_c) + \epsilon`.

    Args:
        student_channels, teacher_channels: sizes of the features' second dimension.
        mid_channels: those in between, the teacher's by default.
        initial_variance: above ``eps``.
        eps: the least variance, above 0.

    The student's features are brought to the dtype of the parameters, and may not be wider. The
    parameters belong to the training: pass ``criterion.parameters()`` to the optimiser too.

    >>> import torch
    >>> criterion = VIDLoss(8, 16)
    >>> criterion(torch.randn(2, 8, 4, 4), torch.randn(2, 16, 4, 4)).shape
    torch.Size([])
    >>> round(criterion.variance()[0].item(), 4)
    5.0
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        mid_channels: int | None = None,
        initial_variance: float = 5.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        mid = teacher_channels if mid_channels is None else mid_channels
        check_counts(
            student_channels=student_channels, teacher_channels=teacher_channels, mid_channels=mid
        )
        check_positive(eps=eps)
        check_number("initial_variance", initial_variance)
        if not eps < initial_variance < math.inf:
            raise ValueError(
                f"initial_variance: expected a finite number above eps, {eps},"
                f" got {initial_variance}"
            )
        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self.mid_channels = mid
        self.initial_variance = initial_variance
        self.eps = eps
        self.regressor = _Regressor([student_channels, mid, mid, teacher_channels], bias=False)
        start = initial_variance - eps
        # The inverse of softplus; log(exp(x) - 1) would overflow for large variances.
        rho = start + math.log(-math.expm1(-start))
        self.rho = nn.Parameter(torch.full((teacher_channels,), rho))

    def variance(self) -> Tensor:
        return F.softplus(self.rho) + self.eps

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        check_pair(student_features, teacher_features)
        check_channels(NAMES[0], student_features, self.student_channels)
        check_channels(NAMES[1], teacher_features, self.teacher_channels)
        check_precision(NAMES[0], student_features, self.regressor.weight)
        student, teacher = same_size(student_features, teacher_features)
        return vid_loss(self.regressor(student), teacher, variance=self.variance())

    def extra_repr(self) -> str:
        return (
            f"{self.student_channels}, {self.teacher_channels}, mid_channels={self.mid_channels},"
            f" initial_variance={self.initial_variance}, eps={self.eps}"
        )
