"""principal: the first principal component of each image's channels.

On a CPU one C++ call; elsewhere, and wherever a gradient is due, plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastxkd.ops._library import DTYPES, define, kernels, serve, wants_function
from fastxkd.reference.principal import principal as reference


def _fake(parts: Tensor) -> tuple[Tensor, Tensor]:
    n, _, positions = parts.shape
    double = torch.float64
    return parts.new_empty(n, positions, dtype=double), parts.new_empty(n, dtype=double)


@define("principal(Tensor parts) -> (Tensor projection, Tensor loadings)", _fake)
def _principal(parts: Tensor) -> tuple[Tensor, Tensor]:
    if serve("principal", parts) == "reference":
        return reference(parts)
    cpu, level, threads = kernels()
    projection, loadings = _fake(parts)
    sizes = [*parts.shape, *parts.stride()]
    cpu.principal(
        level,
        threads,
        parts.data_ptr(),
        projection.data_ptr(),
        loadings.data_ptr(),
        sizes,
        DTYPES[parts.dtype],
    )
    return projection, loadings


def principal(parts: Tensor) -> tuple[Tensor, Tensor]:
    """``[n, c, p]`` projected onto the first principal component over the channels.

    Returns ``[n, p]`` float64, of no particular sign and up to a constant, and ``[n]`` float64, the
    component's loadings added up. NaN for an image that is not finite.
    """
    if wants_function(parts) or parts.dtype not in DTYPES or 0 in parts.shape:
        return reference(parts)
    return torch.ops.fastxkd.principal(parts)  # type: ignore[no-any-return]
