"""cam: schema, checks, kernels and gradient of the class activation map.

Without a graph, one fused operator runs from activations and gradients to the finished map. With
one, the operator stops at the raw sum over channels, which is where the bytes are; ReLU, min-max
and resizing of the small map are left to torch and its autograd. Derivatives of second order and
of forward mode are those of the plain expression.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastxkd.ops._library import (
    DTYPES,
    cuda_kernels,
    define,
    kernel_of,
    kernels,
    serve,
    transformed,
    wants_function,
)
from fastxkd.reference import cam as reference

METHODS = {
    "gradcam": 0,
    "hirescam": 1,
    "layercam": 2,
    "gradcam++": 3,
    "xgradcam": 4,
    "weights": 5,
    "elementwise": 6,
}


def _fake(
    activations: Tensor, gradients: Tensor, method: str, size: list[int], relu: bool, normalize: int
) -> Tensor:
    dtype = reference.exact_dtype(activations)
    return activations.new_empty([activations.shape[0], *size], dtype=dtype)


@define(
    "cam(Tensor activations, Tensor gradients, str method, SymInt[] size, bool relu, int normalize)"
    " -> Tensor",
    _fake,
)
def _cam(
    activations: Tensor, gradients: Tensor, method: str, size: list[int], relu: bool, normalize: int
) -> Tensor:
    backend = serve("cam", activations)
    if backend == "reference":
        return reference.cam(activations, gradients, method, size, relu, normalize)
    n, channels, height, width = activations.shape
    activations, strides = _planes(activations)
    if method == "weights":
        gradients = gradients.contiguous()
        strides = [*strides, channels, 1, 0]
    else:
        # Both must run along the same axis; the activations decide which.
        last = strides[1] == 1 and strides[2] != 1
        gradients = gradients.contiguous(
            memory_format=torch.channels_last if last else torch.contiguous_format
        )
        stride = gradients.stride()
        strides = [*strides, stride[0], 1 if last else height * width, channels if last else 1]
    device, dtype = activations.device, DTYPES[activations.dtype]
    out = torch.empty((n, *size), dtype=reference.exact_dtype(activations), device=device)
    if backend == "triton":
        kernel_of(backend, "cam")(activations, gradients, out, strides, method, relu, normalize)
        return out
    sizes = [n, channels, height, width, *size]
    # cpu: the ISA level and the threads; cuda: the device and the stream, and what it works in.
    module, *how = kernels() if backend == "cpu" else cuda_kernels(activations)
    if backend == "cuda":
        room = module.cam_workspace(sizes, strides, METHODS[method], dtype, how[0])
        workspace = torch.empty(room, dtype=torch.float64, device=device)
        how.append(workspace.data_ptr())
    module.cam(
        *how,
        activations.data_ptr(),
        gradients.data_ptr(),
        out.data_ptr(),
        sizes,
        strides,
        METHODS[method],
        relu,
        normalize,
        dtype,
    )
    return out


def _planes(x: Tensor) -> tuple[Tensor, list[int]]:
    """``x`` and its strides over (image, channel, position), one of the last two being 1."""
    _, channels, height, width = x.shape
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return x, [x.stride(0), 1, channels]
    plane_is_dense = (width == 1 or x.stride(3) == 1) and (height == 1 or x.stride(2) == width)
    if not plane_is_dense:
        x = x.contiguous()
    return x, [x.stride(0), x.stride(1), 1]


def _fake_backward(
    upstream: Tensor, activations: Tensor, gradients: Tensor, method: str
) -> tuple[Tensor, Tensor]:
    return activations.new_empty(activations.shape), gradients.new_empty(gradients.shape)


@define(
    "cam_backward(Tensor upstream, Tensor activations, Tensor gradients, str method)"
    " -> (Tensor, Tensor)",
    _fake_backward,
)
def _cam_backward(
    upstream: Tensor, activations: Tensor, gradients: Tensor, method: str
) -> tuple[Tensor, Tensor]:
    backend = serve("cam", activations)
    if backend == "reference":
        on_a, on_g = reference.cam_backward(upstream, activations, gradients, method)
        return on_a.contiguous(), on_g.contiguous()
    n, channels, height, width = activations.shape
    activations, gradients = activations.contiguous(), gradients.contiguous()
    upstream = upstream.to(reference.exact_dtype(activations)).contiguous()
    on_activations, on_gradients = torch.empty_like(activations), torch.empty_like(gradients)
    if backend == "triton":
        backward = kernel_of(backend, "cam", "cam_backward")
        backward(upstream, activations, gradients, on_activations, on_gradients, method)
        return on_activations, on_gradients
    module, *how = kernels() if backend == "cpu" else cuda_kernels(activations)
    module.cam_backward(
        *how,
        activations.data_ptr(),
        gradients.data_ptr(),
        upstream.data_ptr(),
        on_activations.data_ptr(),
        on_gradients.data_ptr(),
        n,
        channels,
        height * width,
        METHODS[method],
        DTYPES[activations.dtype],
    )
    return on_activations, on_gradients


class _RawMap(torch.autograd.Function):
    @staticmethod
    def forward(activations: Tensor, gradients: Tensor, method: str) -> Tensor:
        size = list(activations.shape[2:])
        return torch.ops.fastxkd.cam(activations, gradients, method, size, False, 0)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.method = inputs[2]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        # Images know nothing of each other: a batch of batches is a longer batch.
        activations, gradients = (
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(arguments[:2], in_dims[:2], strict=True)
        )
        raw = _RawMap.apply(activations.flatten(0, 1), gradients.flatten(0, 1), arguments[2])
        return raw.unflatten(0, activations.shape[:2]), 0

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        # With create_graph=True the gradient must be differentiable: plain torch is.
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        plain = again or transformed()
        backward: Any = reference.cam_backward if plain else torch.ops.fastxkd.cam_backward
        return *backward(upstream, *ctx.saved_tensors, ctx.method), None


def cam_map(
    activations: Tensor,
    gradients: Tensor,
    *,
    method: str,
    size: tuple[int, int] | None,
    relu: bool,
    normalize: int,
) -> Tensor:
    """The finished map of checked arguments; see ``fastxkd.cam_from`` for their meaning."""
    _check(activations, gradients, method, size)
    shape = list(size) if size is not None else list(activations.shape[2:])
    if any(wants_function(x) for x in (activations, gradients)):
        forward_mode = forward_ad._current_level >= 0
        raw_map = reference.raw_map if forward_mode else _RawMap.apply
        raw = raw_map(activations, gradients, method)
        return reference.finish(raw, shape, relu, normalize)
    return torch.ops.fastxkd.cam(activations, gradients, method, shape, relu, normalize)  # type: ignore[no-any-return]


def _check(
    activations: Tensor, gradients: Tensor, method: str, size: tuple[int, int] | None
) -> None:
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    for name, tensor in (("activations", activations), ("gradients", gradients)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
    if activations.dim() != 4 or 0 in activations.shape[1:]:
        raise ValueError(
            "activations: expected spatial maps [n, channels, height, width], got shape"
            f" {list(activations.shape)}; use reshape_transform for token layouts"
        )
    expected = activations.shape[:2] if method == "weights" else activations.shape
    if gradients.shape != expected:
        raise ValueError(
            f"gradients: expected {list(expected)} to match activations"
            f" {list(activations.shape)}, got {list(gradients.shape)}"
        )
    if gradients.dtype != activations.dtype:
        raise TypeError(
            f"gradients: expected the dtype of activations, {activations.dtype},"
            f" got {gradients.dtype}"
        )
    if gradients.device != activations.device:
        raise ValueError(
            f"gradients: expected the device of activations, {activations.device},"
            f" got {gradients.device}"
        )
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size: expected (height, width) of at least 1, got {tuple(size)}")
