"""Class activation maps: the operator on every backend beside the usual expression."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.stage import Stage, Variant, on_backend


@dataclass(frozen=True)
class Maps:
    """Activations as after a ReLU, gradients of either sign, in one of the two layouts."""

    activations: Tensor
    gradients: Tensor
    method: str

    def ours(self) -> Tensor:
        import fastxkd

        return fastxkd.cam_from(self.activations, self.gradients, self.method)

    def eager(self) -> Tensor:
        """As explainers write it."""
        a, g = self.activations, self.gradients
        if self.method == "layercam":
            raw = (g.clamp(min=0) * a).sum(1)
        else:
            if self.method == "gradcam":
                weights = g.mean((2, 3))
            else:
                below = 2 * g**2 + a.sum((2, 3), keepdim=True) * g**3 + 1e-6
                weights = (g.clamp(min=0) * torch.where(g != 0, g**2 / below, 0)).sum((2, 3))
            raw = (weights[:, :, None, None] * a).sum(1)
        raw = raw.clamp(min=0)
        raw = raw - raw.amin((1, 2), keepdim=True)
        return raw / (1e-7 + raw.amax((1, 2), keepdim=True))

    def backward(self) -> None:
        """Of the map before it is finished, to both tensors."""
        torch.ops.fastxkd.cam_backward(
            self.activations[:, 0].contiguous(), self.activations, self.gradients, self.method
        )

    def deviation(self, of: Callable[[], Tensor]) -> str:
        exact = Maps(self.activations.double(), self.gradients.double(), self.method).eager()
        return f"map off by {(of().double() - exact).abs().max():.1e}"


CAM_METHODS = ("gradcam", "layercam", "gradcam++")


def cam_kernels(stage: Stage) -> None:
    """The operator on every backend, both layouts, beside one reading of its inputs."""
    device = stage.clock.device
    for shape in stage.plan.maps:
        for layout in ("contiguous", "channels_last"):
            for name in stage.plan.dtypes:
                kind: dict[str, Any] = {"device": device, "dtype": getattr(torch, name)}
                torch.manual_seed(0)
                a, g = torch.randn(shape, **kind).relu_(), torch.randn(shape, **kind)
                if layout == "channels_last":
                    a, g = (x.contiguous(memory_format=torch.channels_last) for x in (a, g))
                moved = 2 * a.numel() * a.element_size()
                for method in CAM_METHODS:
                    case = f"cam {method} {'x'.join(map(str, shape))} {layout} {name}"
                    floor = Variant("floor: read both", lambda a=a, g=g: (a.sum(), g.sum()))  # type: ignore[misc]
                    stage.measure(case, floor, moved)
                    maps = Maps(a, g, method)
                    for backend in stage.plan.backends:
                        ours = on_backend(backend, maps.ours)
                        note = partial(maps.deviation, ours)
                        stage.measure(case, Variant(backend, ours, note=note), moved)
                        if layout == "contiguous":
                            back = on_backend(backend, maps.backward)
                            stage.measure(case, Variant(f"{backend}, backward", back), 2 * moved)
                    stage.measure(case, Variant("eager", maps.eager), moved)
