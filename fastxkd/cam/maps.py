"""From activations and gradients to maps."""

from __future__ import annotations

from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from fastxkd.ops import cam as operator
from fastxkd.ops._library import wants_function
from fastxkd.ops.cam import cam_map
from fastxkd.ops.principal import principal
from fastxkd.reference.cam import channel_weights, exact_dtype, finish, min_max

Normalize = Literal["minmax"] | None

# The last two are plain torch.
METHODS = (*operator.METHODS, "eigencam", "eigengradcam")

# The loadings of a principal component sum up to about 1 at random and to the square root of the
# number of channels where all agree; below this it is rounding that decides.
SIGN_SHARE = 1e-2
TWICE = "eigencam, eigengradcam, eigen_smooth: a principal component is differentiable once"


def cam_from(
    activations: Tensor,
    gradients: Tensor | None,
    method: str = "gradcam",
    size: tuple[int, ...] | None = None,
    normalize: Normalize = "minmax",
    *,
    relu: bool = True,
    eigen_smooth: bool = False,
) -> Tensor:
    r"""Class activation maps of tensors: the operator beneath the explainers.

    The channel-weighted sum :math:`\sum_c w_c A_c`, then ReLU, min-max, bilinear (of volumes:
    trilinear) resizing with half-pixel centres, and min-max again. With g the gradient of a score
    with respect to A and :math:`S_c = \sum_p A_{cp}`:

    ================ ================================================================
    ``gradcam``      :math:`w_c = mean_p\, g` (Selvaraju et al. 2017)
    ``gradcam++``    :math:`w_c = \sum_p relu(g)\, g^2 / (2 g^2 + S_c g^3 + 10^{-6})`
    ``xgradcam``     :math:`w_c = \sum_p g A / (S_c + 10^{-7})`
    ``hirescam``     :math:`\sum_c g A`, element-wise
    ``layercam``     :math:`\sum_c relu(g) A`, element-wise
    ``elementwise``  :math:`\sum_c relu(g A)`, element-wise
    ``weights``      ``gradients`` are the :math:`w_c` themselves, ``[n, c]``
    ``eigencam``     first principal component of A over the channels (Muhammad and Yeasin 2020)
    ``eigengradcam`` first principal component of :math:`g A`
    ================ ================================================================

    A principal component has no sign of its own: it gets the one with which it correlates with
    the plain sum over channels (of A; of g A). Where its loadings add up to less than 0.01, as
    after a layer norm, whose channels cancel, its largest magnitude is positive.

    Args:
        activations, gradients: ``[n, c, h, w]``, or volumes ``[n, c, d, h, w]``, of one float
            dtype, contiguous or channels-last; ``eigencam`` takes None for the gradients.
        method: one of the table.
        size: (height, width), or (depth, height, width), of the maps; None keeps the layer's.
        normalize: ``"minmax"`` scales each map to [0, 1] with the 1e-7 of pytorch-grad-cam (a map
            that is constant becomes 0); None keeps magnitudes.
        relu: False keeps negative evidence.
        eigen_smooth: the first principal component of the weighted channels instead of their sum.

    Returns:
        ``[n, height, width]`` float32 (float64 for float64 input), differentiable in activations
        and gradients, any number of times (principal components: once). NaN in one image makes that
        image's map NaN and no other.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, an unknown method.

    >>> import torch
    >>> activations = torch.tensor([[[[1.0, 2.0], [0.0, 3.0]]]])
    >>> cam_from(activations, torch.full((1, 1, 2, 2), 0.5), normalize=None)
    tensor([[[0.5000, 1.0000],
             [0.0000, 1.5000]]])
    """
    check_normalize(normalize)
    check_size(size, "None or (height, width)")
    for name, flag in (("relu", relu), ("eigen_smooth", eigen_smooth)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected True or False, got {flag!r}")
    scaling = 0 if normalize is None else (1 if size is None else 2)
    return _map(activations, gradients, method, size, relu, scaling, eigen_smooth)


def check_aggregate(aggregate: Any) -> None:
    if aggregate not in ("mean", None):
        raise ValueError(f"aggregate: expected 'mean' or None, got {aggregate!r}")


def check_normalize(normalize: Normalize) -> None:
    if normalize not in ("minmax", None):
        raise ValueError(f"normalize: expected 'minmax' or None, got {normalize!r}")


def check_size(size: Any, expected: str = "'input', None or (height, width)") -> None:
    if size is None or (isinstance(size, str) and size == "input" and size in expected):
        return
    if isinstance(size, str) or not isinstance(size, (tuple, list)):
        error = ValueError if isinstance(size, str) else TypeError
        raise error(f"size: expected {expected}, got {size!r}")
    if not all(isinstance(x, (Integral, torch.SymInt)) for x in size):
        raise TypeError(f"size: expected {expected}, whole numbers, got {tuple(size)}")


def _map(
    activations: Tensor,
    gradients: Tensor | None,
    method: str,
    size: tuple[int, ...] | None,
    relu: bool,
    normalize: int,
    eigen_smooth: bool,
) -> Tensor:
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    device = activations.device.type if isinstance(activations, Tensor) else "cpu"
    if torch.is_autocast_enabled(device):  # it would sum up in 16 bits
        with torch.autocast(device, enabled=False):
            return _map(activations, gradients, method, size, relu, normalize, eigen_smooth)
    volume = isinstance(activations, Tensor) and activations.dim() == 5
    if method in operator.METHODS and not (volume or eigen_smooth):
        return cam_map(
            activations,
            gradients,  # type: ignore[arg-type]  # checked by the operator
            method=method,
            size=size,  # type: ignore[arg-type]
            relu=relu,
            normalize=normalize,
        )
    _check(activations, gradients, method, size)
    if eigen_smooth or method not in operator.METHODS:
        raw = principal_map(_parts(activations, gradients, method))
    else:
        # The sum over channels asks for positions, not for their order: a volume is a tall image.
        assert gradients is not None
        a, g = (x.flatten(2, 3) if x.dim() == 5 else x for x in (activations, gradients))
        raw = cam_map(a, g, method=method, size=None, relu=False, normalize=0)
        raw = raw.unflatten(1, activations.shape[2:4])
    return finish(raw, list(size or raw.shape[1:]), relu, normalize)


def _parts(activations: Tensor, gradients: Tensor | None, method: str) -> Tensor:
    """What a method sums over channels, ``[n, c, ...]``."""
    exact = exact_dtype(activations)
    a = activations.to(exact)
    if gradients is None:
        return a
    g = gradients.to(exact)
    if method in ("hirescam", "eigengradcam"):
        return a * g
    if method == "layercam":
        return a * g.clamp(min=0)
    if method == "elementwise":
        return (a * g).clamp(min=0)
    weights = channel_weights(a, g, method)
    return a * weights.reshape(*weights.shape, *[1] * (a.dim() - 2))


def principal_map(parts: Tensor) -> Tensor:
    """``[n, c, ...]`` projected onto its first principal component over channels, ``[n, ...]``.

    The sign is as :func:`cam_from` says; an image that is not finite gets a map of NaN.
    """
    if wants_function(parts):
        parts = _Once.apply(parts)
    projection, loadings = principal(parts.flatten(2))
    # What rounding leaves of a channel without spread is a constant.
    projection = projection - projection.mean(1, keepdim=True)
    known = projection.detach()
    largest = known.gather(1, known.abs().argmax(1, keepdim=True))[:, 0]
    leading = torch.where(loadings.abs() > SIGN_SHARE, loadings, largest)
    projection = torch.where((leading < 0)[:, None], -projection, projection)
    return projection.to(exact_dtype(parts)).unflatten(1, parts.shape[2:])


class _Once(torch.autograd.Function):
    """In front of a principal component, whose gradient takes the other components as constants:
    right, but itself not to be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(parts: Tensor) -> Tensor:
        return parts.view_as(parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return _Constant.apply(upstream)  # type: ignore[no-any-return]


class _Constant(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(TWICE)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(TWICE)


def _check(activations: Any, gradients: Any, method: str, size: tuple[int, ...] | None) -> None:
    if not isinstance(activations, Tensor):
        raise TypeError(f"activations: expected a Tensor, got {type(activations).__name__}")
    if not activations.is_floating_point():
        raise TypeError(f"activations: expected a floating-point dtype, got {activations.dtype}")
    if activations.dim() not in (4, 5) or 0 in activations.shape[1:]:
        raise ValueError(
            "activations: expected spatial maps [n, channels, height, width] or volumes"
            f" [n, channels, depth, height, width], got shape {list(activations.shape)}"
        )
    if size is not None and (len(size) != activations.dim() - 2 or min(size) < 1):
        raise ValueError(
            f"size: expected {activations.dim() - 2} lengths of at least 1, got {tuple(size)}"
        )
    if method == "eigencam":
        if gradients is not None:
            raise ValueError("gradients: expected None, eigencam takes none, got a tensor")
        return
    if not isinstance(gradients, Tensor):
        raise TypeError(f"gradients: expected a Tensor, got {type(gradients).__name__}")
    expected = activations.shape[:2] if method == "weights" else activations.shape
    if gradients.shape != expected:
        raise ValueError(
            f"gradients: expected {list(expected)} to match activations"
            f" {list(activations.shape)}, got {list(gradients.shape)}"
        )
    if (gradients.dtype, gradients.device) != (activations.dtype, activations.device):
        raise TypeError(
            "gradients: expected dtype and device of activations,"
            f" {activations.dtype} on {activations.device},"
            f" got {gradients.dtype} on {gradients.device}"
        )


def maps_of_layers(
    names: list[str],
    activations: list[Tensor],
    gradients: list[Tensor | None],
    *,
    method: str,
    size: tuple[int, ...] | None,
    normalize: Normalize,
    aggregate: Literal["mean"] | None,
    eigen_smooth: bool = False,
) -> Any:
    """One map per layer, or their mean scaled once more."""
    pairs: list[tuple[Tensor, Tensor | None]] = []
    for name, activation, gradient in zip(names, activations, gradients, strict=True):
        if activation.dim() not in (4, 5):
            raise ValueError(
                f"target layer {name!r}: expected spatial activations [n, channels, height,"
                f" width], got {list(activation.shape)}; use reshape_transform for token layouts"
            )
        if method == "eigencam":
            gradient = None
        elif gradient is None:
            raise ValueError(f"target layer {name!r}: the score does not depend on it")
        else:
            gradient = gradient.to(activation.dtype)
        pairs.append((activation, gradient))
    if aggregate is None or len(pairs) == 1:
        maps = [
            cam_from(a, g, method, size, normalize, eigen_smooth=eigen_smooth) for a, g in pairs
        ]
        return maps if aggregate is None else maps[0]
    size = size or tuple(activations[0].shape[2:])
    scaling = 0 if normalize is None else 1
    each = [_map(a, g, method, size, True, scaling, eigen_smooth) for a, g in pairs]
    mean = torch.stack(each).mean(0)
    return mean if normalize is None else min_max(mean)
