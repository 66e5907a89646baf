"""The cases of test_fuzz.py: strings of bytes, read as choices."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor

ASKED = os.environ.get("FASTXKD_FUZZ_CASES")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WRONG_DTYPES = (torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn)


def profile(cases: int) -> settings:
    """The same cases in every run; no database, no time limit of a case."""
    return settings(
        max_examples=int(ASKED) if ASKED else cases,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


class Case:
    """The choices of one case, and the tensors that it has made of them."""

    def __init__(self, choices: bytes) -> None:
        self.choices = iter(choices)
        self.generator = torch.Generator().manual_seed(sum(choices[:8]))
        self.made: list[tuple[Tensor, bytes]] = []
        self.ordinary = True  # nothing but finite numbers of a usual size, and defaults
        self.dtype = torch.float32

    def byte(self) -> int:
        return next(self.choices, 0)

    def pick(self, *options: Any) -> Any:
        return options[self.byte() % len(options)]

    def one_in(self, n: int) -> bool:
        return self.byte() % n == n - 1

    def odd(self, value: Any) -> Any:
        """The value; now and then something else altogether."""
        if not self.one_in(16):
            return value
        self.ordinary = False
        return self.pick(
            None,
            "text",
            -1,
            0.5,
            math.nan,
            [],
            {},
            (),
            object(),
            True,
            np.zeros((2, 3), np.float32),
            torch.zeros(()),
            torch.zeros(0),
            torch.zeros(3, 0, 2),
            torch.zeros(2, 3, 4, 5, 6),
            torch.zeros(4, 5, device="meta"),
            torch.eye(4).to_sparse(),
            [torch.zeros(2, 3)],
            torch.zeros(4, 5, dtype=torch.complex64),
            Tensor,
        )

    def options(self, **choices: tuple[Any, ...]) -> dict[str, Any]:
        """Some of these keywords; the first of the values is ordinary."""
        found = {}
        for name, values in choices.items():
            if self.one_in(4):
                at = self.byte() % len(values)
                self.ordinary &= at == 0
                found[name] = values[at]
        if self.one_in(40):
            self.ordinary = False
            found["no_such_option"] = 1
        return found

    def sizes(self, *usual: int) -> list[int]:
        """Sizes, one of which may be another."""
        sizes = list(usual)
        if self.one_in(8):
            self.ordinary = False
            at = self.byte() % len(sizes)
            sizes[at] = self.pick(0, 1, 2, 3, 5, 17, 33, 70)
        return sizes

    def tensor(self, *shape: int, unit: bool = False, grad: bool = False) -> Any:
        """Of about that shape, between 0 and 1 if they are to be: of any contents and layout."""
        sizes = self.sizes(*shape) if shape else []
        dtype = self.dtype
        if self.one_in(12):
            self.ordinary = False
            dtype = self.pick(*DTYPES, *WRONG_DTYPES)
        values = torch.randn(sizes, generator=self.generator)
        values = values.sigmoid() if unit else values
        contents = self.byte() % 20
        if contents > 11 and values.numel():
            self.ordinary = False
            flat = values.view(-1)
            at = self.byte() % len(flat)
            if contents < 16:
                flat[at] = (math.nan, math.inf, -math.inf, 1e30)[contents - 12]
            else:
                values = (
                    torch.zeros_like(values),
                    torch.full_like(values, 3e38),
                    values * 1e-40,
                    values.sign() * 1e4,
                )[contents - 16]
        values = values.to(dtype)
        layout = self.byte() % 16
        if layout == 11 and values.dim() > 1:
            values = values.transpose(0, -1).contiguous().transpose(0, -1)
        elif layout == 12 and values.dim():
            wide = torch.zeros(*values.shape[:-1], 2 * values.shape[-1], dtype=dtype)
            wide[..., ::2] = values
            values = wide[..., ::2]
        elif layout == 13 and values.dim() and len(values):
            self.ordinary = False
            values = values[:1].expand(values.shape)
        elif layout == 14:
            values = torch.cat([torch.zeros(3, dtype=dtype), values.flatten()])[3:].view(sizes)
        elif layout == 15 and values.dim() > 1 and len(values):
            self.ordinary = False
            values = values[0]
        if grad and values.is_floating_point() and self.one_in(3):
            values = values.requires_grad_()
        if self.one_in(60):
            self.ordinary = False
            values = values.detach().requires_grad_() if values.is_floating_point() else values
        return self.odd(self.keep(values))

    def keep(self, values: Tensor) -> Tensor:
        self.made.append((values, memory(values)))
        return values

    def labels(self, n: int, classes: int) -> Any:
        (n,) = self.sizes(n)
        values = torch.randint(max(classes, 1), (n,), generator=self.generator)
        strange = self.byte() % 16
        if strange > 9 and n:
            self.ordinary = False
            values[self.byte() % n] = (classes, -1, -100, 2**62, -(2**63), 0)[strange - 10]
        if self.one_in(12):
            self.ordinary = False
            values = self.pick(
                values.int(), values.float(), values.bool(), values[:, None], values.to(torch.uint8)
            )
        return self.odd(self.keep(values))

    def mask(self, *shape: int) -> Any:
        values = self.tensor(*shape)
        usual = isinstance(values, Tensor) and values.dtype in DTYPES
        if not usual or values.layout != torch.strided or self.one_in(6):
            return values
        return self.keep(values.detach() > 0)

    def unchanged(self) -> bool:
        return all(memory(v) == before and v.grad is None for v, before in self.made)


def memory(values: Tensor) -> bytes:
    """All of the memory that it lies in, its neighbours too."""
    values = values.detach()
    if values.layout != torch.strided or values.device.type != "cpu":
        return b""
    whole = torch.zeros(0, dtype=torch.uint8).set_(values.untyped_storage())
    return whole.numpy().tobytes()
