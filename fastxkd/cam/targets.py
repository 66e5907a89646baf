"""What is explained: classes and callables, one per image or one for the batch."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

Objective = Callable[[Any], Tensor]
Resolved = Tensor | list[Callable[[Any], Tensor]]


def resolve_targets(output: Any, targets: Any, n: int) -> Resolved:
    """Class indices ``[n]`` on the output's device, or callables, one per image; checked."""
    if isinstance(targets, bool):
        raise TypeError(f"targets: expected ints or callables, got {targets}")
    if callable(targets):
        targets = [targets] * n
    several = targets is not None and not isinstance(targets, (Integral, Tensor))
    if several:
        targets = list(targets)
        if len(targets) != n:
            raise ValueError(f"targets: expected {n}, one per image, got {len(targets)}")
        if all(callable(t) for t in targets) and _rows(output) == n:
            return targets
    if not isinstance(output, Tensor) or output.dim() != 2:
        what = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"targets: the model returned {what}, not logits [n, classes]; pass objective=, a"
            " callable on the model's output"
        )
    if targets is None:
        index = output.argmax(1)
    elif isinstance(targets, Integral):
        index = torch.full((n,), int(targets), device=output.device)
    elif isinstance(targets, Tensor):
        index = targets
    else:
        if not all(isinstance(t, Integral) and not isinstance(t, bool) for t in targets):
            kinds = sorted({type(t).__name__ for t in targets})
            raise TypeError(f"targets: expected ints or callables, got {', '.join(kinds)}")
        index = torch.tensor([int(t) for t in targets], device=output.device)
    if index.shape != (n,) or index.dtype == torch.bool or index.is_floating_point():
        raise ValueError(
            f"targets: expected {n} class indices, one per image, got {index.dtype}"
            f" {list(index.shape)}"
        )
    classes = output.shape[1]
    # Indices that already lie on an accelerator are not read back; its own gather checks them.
    if index.device.type == "cpu" and bool(((index < 0) | (index >= classes)).any()):
        wrong = index[(index < 0) | (index >= classes)][0]
        raise ValueError(f"targets: expected 0 <= class < {classes}, got {int(wrong)}")
    index = index.to(output.device, torch.int64)
    # Made under inference_mode: autograd may not keep it.
    return index.clone() if index.is_inference() else index


def class_score(output: Any, targets: Any, objective: Objective | None, n: int) -> Tensor:
    """The scalar whose gradient is taken: the sum over images of what ``targets`` selects."""
    if objective is not None:
        if targets is not None:
            raise ValueError("targets: expected None beside an objective, got both")
        score = objective(output)
        if not isinstance(score, Tensor) or score.numel() != 1:
            got = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(f"objective: expected a scalar Tensor, got {got}")
        return score.sum()
    resolved = resolve_targets(output, targets, n)
    if isinstance(resolved, Tensor):
        return output.gather(1, resolved[:, None]).sum()
    return torch.stack([_score(t, o) for t, o in zip(resolved, output, strict=True)]).sum()


def row_scores(output: Any, targets: Resolved, image: Tensor) -> Tensor:
    """One score per row of a batch of altered images; row r is a variant of image ``image[r]``."""
    if isinstance(targets, Tensor):
        return output.gather(1, targets[image][:, None])[:, 0]
    return torch.stack(
        [_score(targets[i], row) for i, row in zip(image.tolist(), output, strict=True)]
    )


def _score(target: Callable[[Any], Tensor], row: Any) -> Tensor:
    score = target(row)
    if not isinstance(score, Tensor):
        raise ValueError(f"targets: expected the callable to return a Tensor, got {score!r}")
    return score.sum()


def _rows(output: Any) -> int | None:
    return len(output) if isinstance(output, (Tensor, list, tuple)) else None
