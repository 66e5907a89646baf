"""What the loss modules share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Criterion(nn.Module):
    """A loss and its options: attributes, shown by ``repr``, handed on with every call.

    A tensor among them is a buffer and follows ``.to(device)``; so does a later ``class_weight``.
    """

    _names: tuple[str, ...]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            if name == "class_weight" or isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}=[{len(value)}]" if isinstance(value, Tensor) else f"{name}={value!r}"
            for name, value in self.options().items()
        )
