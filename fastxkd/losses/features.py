"""Losses on features: the student's activations are pulled towards the teacher's.

These move memory and compute little: the floor is to read both features once, and to read them
once more and write one gradient going back. Their sums are therefore walked a few samples at a time
(:func:`_row_blocks`), so that no temporary of a feature's size leaves the cache; all else is
convolutions, pooling and matrices of a few numbers, where plain torch is at its floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxkd.ops._library import differentiable_once, exact_dtype

BLOCK_ELEMENTS = 1 << 18  # of float32: a megabyte, a core's share of most second-level caches
Features = Tensor | Sequence[Tensor]

_AVERAGE_POOLS: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


# --- arguments


def check_pair(
    student: Tensor,
    teacher: Tensor,
    names: tuple[str, str] = ("student_features", "teacher_features"),
) -> None:
    """Two floating-point tensors ``[n, channels, ...]`` of the same n, the second a constant."""
    for name, tensor in zip(names, (student, teacher), strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
        if tensor.dim() < 2 or tensor.numel() == 0:
            raise ValueError(
                f"{name}: expected [n, ...] with at least one value a row,"
                f" got shape {list(tensor.shape)}"
            )
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"{names[1]}: expected {student.shape[0]} rows as in {names[0]}"
            f" {list(student.shape)}, got {teacher.shape[0]} in {list(teacher.shape)}"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"{names[1]}: expected the device of {names[0]}, {student.device}, got {teacher.device}"
        )
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{names[1]}: expected a tensor without gradient, got one that requires grad;"
            f" compute it under torch.no_grad() or pass {names[1]}.detach()"
        )


def check_layers(
    student: Features, teacher: Features, names: tuple[str, str]
) -> tuple[list[Tensor], list[Tensor]]:
    """One layer or many, as two lists of equal length; the layers themselves are not checked."""
    lists = []
    for name, given in zip(names, (student, teacher), strict=True):
        if not isinstance(given, Tensor | list | tuple):
            raise TypeError(
                f"{name}: expected a Tensor or a list of them, got {type(given).__name__}"
            )
        lists.append([given] if isinstance(given, Tensor) else list(given))
    if len(lists[0]) != len(lists[1]) or not lists[0]:
        raise ValueError(
            f"{names[1]}: expected as many layers as {names[0]} and at least one,"
            f" got {len(lists[1])} and {len(lists[0])}"
        )
    return lists[0], lists[1]


def _check_channels(name: str, features: Tensor, channels: int) -> None:
    if features.shape[1] != channels:
        raise ValueError(
            f"{name}: expected {channels} channels, the second dimension,"
            f" got {features.shape[1]} in {list(features.shape)}"
        )


def _check_positive(**counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name}: expected an int, got {type(count).__name__}")
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}")


# --- sums in blocks


def _row_blocks(features: Tensor) -> list[slice]:
    """Slices of samples that stay in the cache between one operation and the next.

    One slice of all on other devices, whose caches hide nothing from a launch, and for a compiler,
    which fuses the operations itself.
    """
    n = features.shape[0]
    whole = features.device.type != "cpu" or torch.compiler.is_compiling()
    step = n if whole else max(1, BLOCK_ELEMENTS * n // features.numel())
    return [slice(begin, min(begin + step, n)) for begin in range(0, n, step)]


def _in_blocks(features: Tensor, part: Callable[[slice], Tensor]) -> Tensor:
    """A tensor like ``features``, made block by block."""
    blocks = _row_blocks(features)
    if len(blocks) == 1:
        return part(blocks[0]).to(features.dtype)
    out = torch.empty_like(features)
    for rows in blocks:
        out[rows] = part(rows)
    return out


def _along_channels(values: Tensor, dim: int) -> Tensor:
    return values.view(-1, *[1] * (dim - 2))


class _SquaredError(torch.autograd.Function):
    """``[channels]`` sums of ``(student - teacher)^2`` over samples and positions."""

    @staticmethod
    def forward(student: Tensor, teacher: Tensor) -> Tensor:
        exact = exact_dtype(student, teacher)
        others = [d for d in range(student.dim()) if d != 1]
        total = student.new_zeros(student.shape[1], dtype=torch.float64)
        for rows in _row_blocks(student):
            error = student[rows].to(exact) - teacher[rows].to(exact)
            total += error.square_().sum(others)
        return total.to(exact)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        student, teacher = ctx.saved_tensors
        factor = _along_channels(2 * upstream, student.dim())
        exact = upstream.dtype

        def part(rows: slice) -> Tensor:
            return (student[rows].to(exact) - teacher[rows].to(exact)).mul_(factor)

        return _in_blocks(student, part), None


class _Energy(torch.autograd.Function):
    """``[n, ...]`` means of ``|x|^p`` over the channels."""

    @staticmethod
    def forward(features: Tensor, p: float, exact: torch.dtype) -> Tensor:
        return torch.cat(
            [_power(features[rows].to(exact), p).mean(1) for rows in _row_blocks(features)]
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, torch.dtype], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.p = inputs[1]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (features,) = ctx.saved_tensors
        factor = (upstream * (ctx.p / features.shape[1])).unsqueeze(1)

        def part(rows: slice) -> Tensor:
            return _odd_power(features[rows].to(upstream.dtype), ctx.p - 1) * factor[rows]

        return _in_blocks(features, part), None, None


def _power(x: Tensor, p: float) -> Tensor:
    return x.square() if p == 2 else x.abs() if p == 1 else x.abs().pow_(p)


def _odd_power(x: Tensor, p: float) -> Tensor:
    """sign(x) |x|^p, the derivative of |x|^(p + 1) without its factor."""
    return x if p == 1 else x.sign() if p == 0 else x.abs().pow_(p).mul_(x.sign())


# --- FitNet


def _pooled(features: Tensor, size: Sequence[int], exact: torch.dtype) -> Tensor:
    if tuple(features.shape[2:]) == tuple(size):
        return features
    if len(size) not in _AVERAGE_POOLS:
        raise ValueError(
            "student_features, teacher_features: expected one to three spatial dimensions where"
            f" they differ in size, got {len(size)}"
        )
    # In float32 or better: an average of rounded numbers need not be rounded once more.
    return _AVERAGE_POOLS[len(size)](features.to(exact), list(size))


def _same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both average-pooled to the smaller size, dimension by dimension."""
    if student.dim() != teacher.dim():
        raise ValueError(
            f"teacher_features: expected {student.dim()} dimensions as in student_features"
            f" {list(student.shape)}, got {list(teacher.shape)}"
        )
    size = [min(sizes) for sizes in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    exact = exact_dtype(student, teacher)
    return _pooled(student, size, exact), _pooled(teacher, size, exact)


def _squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    error: Tensor = _SquaredError.apply(student, teacher)
    return error


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
    _check_channels("teacher_features", teacher_features, student_features.shape[1])
    student, teacher = _same_size(student_features, teacher_features)
    return _squared_error(student, teacher).sum() / student.numel()


class _Regressor(nn.Sequential):
    """1x1 convolutions, on ``[n, channels]`` as well as on images; ReLU between them."""

    def __init__(self, channels: Sequence[int], *, bias: bool) -> None:
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(channels):
            layers += [nn.ReLU(), nn.Conv2d(narrow, wide, 1, bias=bias)]
        super().__init__(*layers[1:])

    def forward(self, features: Tensor) -> Tensor:
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

    The parameters belong to the training: pass ``criterion.parameters()`` to the optimiser too.

    >>> import torch
    >>> criterion = FitNetLoss(8, 16)
    >>> criterion(torch.randn(2, 8, 4, 4), torch.randn(2, 16, 4, 4)).shape
    torch.Size([])
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        _check_positive(student_channels=student_channels, teacher_channels=teacher_channels)
        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self.regressor = _Regressor([student_channels, teacher_channels], bias=True)

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        check_pair(student_features, teacher_features)
        _check_channels("student_features", student_features, self.student_channels)
        _check_channels("teacher_features", teacher_features, self.teacher_channels)
        student, teacher = _same_size(student_features, teacher_features)
        student = self.regressor(student.to(student_features.dtype))
        return _squared_error(student, teacher).sum() / student.numel()

    def extra_repr(self) -> str:
        return f"{self.student_channels}, {self.teacher_channels}"


# --- AT


def at_loss(student_features: Tensor, teacher_features: Tensor, *, p: float = 2.0) -> Tensor:
    r"""Attention transfer: where the activations are, whatever channel they are in.

    .. math::
        Q(F) = \frac{A}{\|A\|_2}, \quad A_{xy} = \frac{1}{c} \sum_c |F_{cxy}|^p, \qquad
        L = \mathrm{mean}\, (Q(F_s) - Q(F_t))^2

    over samples and positions, A flattened per sample. The features of the larger size are
    average-pooled to the smaller before their power is taken, as in the published code. Channels
    may differ. Usual factor: 1000. A sample without any activation has Q = 0 and no gradient.

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
    for name, features in (
        ("student_features", student_features),
        ("teacher_features", teacher_features),
    ):
        if features.dim() < 3:
            raise ValueError(
                f"{name}: expected [n, channels, ...] with spatial dimensions,"
                f" got shape {list(features.shape)}"
            )
    if not 1 <= p < math.inf:
        raise ValueError(f"p: expected a finite number of at least 1, got {p}")
    exact = exact_dtype(student_features, teacher_features)
    student, teacher = (
        unit_rows(_Energy.apply(x, float(p), exact).flatten(1))
        for x in _same_size(student_features, teacher_features)
    )
    return (student - teacher).square().mean()


def unit_rows(rows: Tensor) -> Tensor:
    """Rows of length 1. A row of zeros stays, without the huge gradient of a clamped division."""
    return rows * inverse(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def inverse(values: Tensor) -> Tensor:
    """1 / x, and 0 with gradient 0 where x is 0."""
    nonzero = values != 0
    return torch.where(nonzero, 1 / torch.where(nonzero, values, 1), 0)


class ATLoss(nn.Module):
    """:func:`at_loss` as a module: ``criterion(student_features, teacher_features)``.

    >>> import torch
    >>> x = torch.rand(2, 3, 4, 4)
    >>> ATLoss(p=1)(x, x).item()
    0.0
    """

    def __init__(self, *, p: float = 2.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        return at_loss(student_features, teacher_features, p=self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


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
        variance: :math:`\sigma^2`, ``[channels]``, positive; may require grad.

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
    _check_channels("teacher_features", teacher_features, student_features.shape[1])
    if not isinstance(variance, Tensor):
        raise TypeError(f"variance: expected a Tensor, got {type(variance).__name__}")
    if variance.shape != student_features.shape[1:2]:
        raise ValueError(
            f"variance: expected one value per channel, [{student_features.shape[1]}],"
            f" got shape {list(variance.shape)}"
        )
    student, teacher = _same_size(student_features, teacher_features)
    error = _squared_error(student, teacher) * (student.shape[1] / student.numel())
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

    The parameters belong to the training: pass ``criterion.parameters()`` to the optimiser too.

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
        _check_positive(
            student_channels=student_channels, teacher_channels=teacher_channels, mid_channels=mid
        )
        if not 0 < eps < math.inf:
            raise ValueError(f"eps: expected a finite number above 0, got {eps}")
        if not eps < initial_variance < math.inf:
            raise ValueError(
                f"initial_variance: expected a finite number above eps, {eps},"
                f" got {initial_variance}"
            )
        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
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
        _check_channels("student_features", student_features, self.student_channels)
        _check_channels("teacher_features", teacher_features, self.teacher_channels)
        student, teacher = _same_size(student_features, teacher_features)
        mean = self.regressor(student.to(student_features.dtype))
        return vid_loss(mean, teacher, variance=self.variance())

    def extra_repr(self) -> str:
        return f"{self.student_channels}, {self.teacher_channels}, eps={self.eps}"


# --- ReviewKD


def hcl_loss(student_features: Features, teacher_features: Features) -> Tensor:
    r"""Hierarchical context loss of ReviewKD: squared differences at several resolutions.

    .. math::
        L = \sum_{stages} \frac{\mathrm{MSE}(F_s, F_t) + \sum_l w_l\, \mathrm{MSE}(pool_l F_s,
        pool_l F_t)}{1 + \sum_l w_l}, \quad w = \tfrac12, \tfrac14, \tfrac18

    with average pools to l x l for those of l = 4, 2, 1 that are smaller than the stage; the
    weights go to the pools that are left, in this order. Pooling is linear, so that the difference
    is pooled, once. Published factors: 0.6 to 8 with a warm-up of 20 epochs.

    Args:
        student_features: ``[n, channels, height, width]`` or ``[n, channels]``, or a list of them,
            any float dtype.
        teacher_features: the same shapes, without gradient.

    Returns:
        A scalar, float64 if a feature is float64, else float32. Differentiable once.

    Raises:
        ValueError, TypeError: shapes, dtypes or lengths that do not fit, a teacher that requires
            grad.

    Chen et al. 2021, Distilling Knowledge via Knowledge Review.

    >>> import torch
    >>> hcl_loss([torch.ones(2, 3, 8, 8)], [torch.zeros(2, 3, 8, 8)]).item()
    1.0
    """
    names = ("student_features", "teacher_features")
    students, teachers = check_layers(student_features, teacher_features, names)
    stages = []
    for index, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        labels = names if isinstance(student_features, Tensor) else _indexed(names, index)
        check_pair(student, teacher, labels)
        if student.dim() not in (2, 4):
            raise ValueError(
                f"{labels[0]}: expected [n, channels] or [n, channels, height, width],"
                f" got shape {list(student.shape)}"
            )
        if student.shape != teacher.shape:
            raise ValueError(
                f"{labels[1]}: expected the shape of {labels[0]} {list(student.shape)},"
                f" got {list(teacher.shape)}"
            )
        stages.append(_stage(student, teacher))
    return sum(stages[1:], start=stages[0])


def _indexed(names: tuple[str, str], index: int) -> tuple[str, str]:
    return f"{names[0]}[{index}]", f"{names[1]}[{index}]"


def _stage(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared error of one stage, at its own size and at those of the pools, in their means."""
    size = student.shape[2:]
    levels = [level for level in (4, 2, 1) if size and level < min(size)]
    weights = [0.5**power for power in range(len(levels) + 1)]
    rows = student.shape[0] * student.shape[1]
    own, *pooled = (w / sum(weights) / rows for w in weights)
    own *= rows / student.numel()
    if not levels:
        return _squared_error(student, teacher).sum() * own
    exact = exact_dtype(student, teacher)
    bins, factors = [], []
    for level, factor in zip(levels, pooled, strict=True):
        sides = [
            F.adaptive_avg_pool1d(torch.eye(length, dtype=exact, device=student.device), level)
            for length in size
        ]
        bins.append(torch.einsum("ia,jb->ijab", *sides).reshape(-1, level**2))
        factors.append(student.new_full((level**2,), factor / level**2, dtype=exact))
    loss, _ = _Pyramid.apply(student, teacher, torch.cat(bins, 1), torch.cat(factors), own)
    return loss


class _Pyramid(torch.autograd.Function):
    """``own |d|^2 + sum_b factors_b |d bins_b|^2`` of the difference d.

    Every pool of every size is one column of ``bins [positions, 21]``, all of them one product
    while the difference is in the cache, and one that adds to it going back.
    """

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, bins: Tensor, factors: Tensor, own: float
    ) -> tuple[Tensor, Tensor]:
        total = bins.new_zeros((), dtype=torch.float64)
        pools = []
        for rows in _row_blocks(student):
            error = _planes(student[rows], bins.dtype) - _planes(teacher[rows], bins.dtype)
            pools.append(error @ bins)
            total += error.square_().sum()
        pooled = torch.cat(pools)
        return (total * own + (pooled.square().sum(0) * factors).sum()).to(bins.dtype), pooled

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4], output[1])
        ctx.own = inputs[4]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 5
        student, teacher, bins, factors, pooled = ctx.saved_tensors
        on_pools = pooled * (factors * (2 * upstream))
        on_own, channels = 2 * ctx.own * upstream, student.shape[1]

        def part(rows: slice) -> Tensor:
            error = _planes(student[rows], bins.dtype) - _planes(teacher[rows], bins.dtype)
            here = on_pools[rows.start * channels : rows.stop * channels]
            return error.mul_(on_own).addmm_(here, bins.T).view(student[rows].shape)

        return _in_blocks(student, part), None, None, None, None


def _planes(images: Tensor, exact: torch.dtype) -> Tensor:
    return images.to(exact).reshape(-1, images.shape[2] * images.shape[3])


class ABF(nn.Module):
    """Attention-based fusion of ReviewKD: one stage of the student with what deeper stages left.

    ``forward(features, residual, size)`` returns the stage in the teacher's channels, at ``size``,
    and the residual for the next shallower stage.

    Args:
        student_channels, mid_channels, teacher_channels: of the stage, the residual, the result.
        fuse: whether there is a deeper stage; the deepest has no attention.
    """

    def __init__(
        self, student_channels: int, mid_channels: int, teacher_channels: int, *, fuse: bool
    ) -> None:
        super().__init__()
        reduce = nn.Conv2d(student_channels, mid_channels, 1, bias=False)
        expand = nn.Conv2d(mid_channels, teacher_channels, 3, padding=1, bias=False)
        for convolution in (reduce, expand):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.reduce = nn.Sequential(reduce, nn.BatchNorm2d(mid_channels))
        self.expand = nn.Sequential(expand, nn.BatchNorm2d(teacher_channels))
        self.attention = nn.Conv2d(2 * mid_channels, 2, 1) if fuse else None

    def forward(
        self, features: Tensor, residual: Tensor | None, size: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        x = self.reduce(features)
        if self.attention is not None and residual is not None:
            residual = F.interpolate(residual, x.shape[2:], mode="nearest")
            weights = self.attention(torch.cat([x, residual], 1)).sigmoid()
            x = x * weights[:, :1] + residual * weights[:, 1:]
        if tuple(x.shape[2:]) != tuple(size):
            x = F.interpolate(x, list(size), mode="nearest")
        return self.expand(x), x


class ReviewKDLoss(nn.Module):
    """ReviewKD: every teacher stage is learned from the student's stage and all deeper ones.

    Student stages are fused from the deepest to the shallowest by :class:`ABF` blocks; the fused
    ones are held to the teacher's by :func:`hcl_loss`.

    Args:
        student_channels, teacher_channels: of each stage, from the shallowest to the deepest,
            usually the pooled vector. Any number of stages; their sizes are those that come.
        mid_channels: width of the residual, by default the student's last stage, 512 at most.

    ``criterion(student_features, teacher_features)`` takes lists in that order of ``[n, channels,
    height, width]``; a vector may also be ``[n, channels]``. The published recipe takes the
    teacher's features before the last ReLU of their stage. The parameters belong to the training:
    pass ``criterion.parameters()`` to the optimiser too.

    Raises:
        ValueError, TypeError: lists of other lengths, channels or dtypes that do not fit, a teacher
            that requires grad.

    Chen et al. 2021, Distilling Knowledge via Knowledge Review.

    >>> import torch
    >>> criterion = ReviewKDLoss([8, 16, 16], [12, 24, 24])
    >>> student = [torch.randn(2, 8, 8, 8), torch.randn(2, 16, 4, 4), torch.randn(2, 16)]
    >>> teacher = [torch.randn(2, 12, 8, 8), torch.randn(2, 24, 4, 4), torch.randn(2, 24)]
    >>> criterion(student, teacher).shape
    torch.Size([])
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        mid_channels: int | None = None,
    ) -> None:
        super().__init__()
        if len(student_channels) != len(teacher_channels) or not student_channels:
            raise ValueError(
                "teacher_channels: expected as many stages as student_channels and at least one,"
                f" got {len(teacher_channels)} and {len(student_channels)}"
            )
        mid = min(512, student_channels[-1]) if mid_channels is None else mid_channels
        for name, channels in (
            ("student_channels", student_channels),
            ("teacher_channels", teacher_channels),
            ("mid_channels", [mid]),
        ):
            for count in channels:
                _check_positive(**{name: count})
        self.student_channels = list(student_channels)
        self.teacher_channels = list(teacher_channels)
        deepest = len(self.student_channels) - 1
        self.fusions = nn.ModuleList(
            ABF(s, mid, t, fuse=index < deepest)
            for index, (s, t) in enumerate(zip(student_channels, teacher_channels, strict=True))
        )

    def forward(
        self, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]
    ) -> Any:
        names = ("student_features", "teacher_features")
        students, teachers = check_layers(student_features, teacher_features, names)
        if len(students) != len(self.fusions):
            raise ValueError(
                f"student_features: expected {len(self.fusions)} stages, got {len(students)}"
            )
        for index, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
            labels = _indexed(names, index)
            check_pair(student, teacher, labels)
            for name, features, channels in (
                (labels[0], student, self.student_channels[index]),
                (labels[1], teacher, self.teacher_channels[index]),
            ):
                if features.dim() not in (2, 4):
                    raise ValueError(
                        f"{name}: expected [n, channels] or [n, channels, height, width],"
                        f" got shape {list(features.shape)}"
                    )
                _check_channels(name, features, channels)
        students, teachers = (
            [x[:, :, None, None] if x.dim() == 2 else x for x in side]
            for side in (students, teachers)
        )
        fused: list[Tensor] = []
        residual = None
        for fusion, student, teacher in zip(
            reversed(self.fusions), reversed(students), reversed(teachers), strict=True
        ):
            out, residual = fusion(student, residual, teacher.shape[2:])
            fused.append(out)
        return hcl_loss(fused[::-1], teachers)
