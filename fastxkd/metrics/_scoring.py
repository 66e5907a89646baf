"""What a model answers about images, and about the same images perturbed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fastxkd.cam.capture import evaluating
from fastxkd.cam.targets import resolve_targets
from fastxkd.metrics._maps import exact_dtype
from fastxkd.ops._checks import check_choice

Model = Callable[[Tensor], Any]
SCORES = ("probability", "logit")

# The docstrings' account of ``targets`` and ``score``, for those who read the code first:
# targets   None: the class the model names for the image as it is | int | list of int |
#           LongTensor [n] | a callable, or a list of them, one per image, on an image's row of
#           what `score` names
# score     "probability": the softmax of the model's output | "logit": its output


class Scorer:
    """Scores of the target classes, without graph and in eval mode; the model is left as it was.

    ``full`` holds those of the images as they are, ``[n]``; a call scores m perturbed versions of
    each, ``[m, n, channels, h, w]`` to ``[m, n]``, as one batch.
    """

    def __init__(self, model: Model, images: Tensor, targets: Any, score: str) -> None:
        if not callable(model):
            raise TypeError(f"model: expected a callable, got {type(model).__name__}")
        check_choice("score", score, SCORES)
        self.model, self.score, self.n = model, score, images.shape[0]
        answers = self._answers(images.clone())  # which a model may change as it likes
        self.targets = resolve_targets(answers, targets, self.n)
        self.full = self._pick(answers[None])[0]

    def __call__(self, perturbed: Tensor) -> Tensor:
        answers = self._answers(perturbed.flatten(0, 1))
        return self._pick(answers.unflatten(0, (-1, self.n)))

    def _answers(self, images: Tensor) -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if isinstance(self.model, nn.Module):
                stack.enter_context(evaluating(self.model))
            answers = self.model(images)
        if not isinstance(answers, Tensor) or answers.dim() != 2 or len(answers) != len(images):
            got = list(answers.shape) if isinstance(answers, Tensor) else type(answers).__name__
            raise ValueError(f"model: expected it to return [{len(images)}, classes], got {got}")
        answers = answers.detach().to(exact_dtype(answers))
        return answers.softmax(1) if self.score == "probability" else answers

    def _pick(self, answers: Tensor) -> Tensor:  # [m, n, classes]
        targets = self.targets
        if isinstance(targets, Tensor):
            return answers.gather(2, targets.expand(len(answers), -1)[..., None])[..., 0]
        with torch.no_grad():
            scores = [
                [_one(target(row)) for target, row in zip(targets, step, strict=True)]
                for step in answers
            ]
        return torch.stack([torch.stack(step) for step in scores])


def _one(score: Any) -> Tensor:
    if not isinstance(score, Tensor) or score.numel() != 1:
        got = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(f"targets: expected the callable to return a scalar Tensor, got {got}")
    return score.reshape(())
