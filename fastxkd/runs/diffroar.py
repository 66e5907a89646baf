"""DiffROAR: do a model's input gradients point at the pixels that its task needs?

A model of the same kind is trained anew on images of which only the pixels with the greatest
gradients are left, another on those with the smallest. What the first knows more than the second is
what the gradients knew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastxkd.metrics.agreement import check_fraction
from fastxkd.metrics.input_gradients import KEPT, check_gradient_options
from fastxkd.ops._checks import check_choice
from fastxkd.runs.answers import accuracy
from fastxkd.runs.data import ImageData, TrainBatches
from fastxkd.runs.diffroar_results import DiffROAR, Results, refuse_others
from fastxkd.runs.explain import steady
from fastxkd.runs.masked import BATCH, LABELS, masked_data, mean_pixel, rank_pixels
from fastxkd.runs.models import load_model
from fastxkd.train import Distiller, Progress, TrainSettings
from fastxkd.train.distiller import fingerprint

FRACTIONS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)


@steady()
def diffroar(
    model: nn.Module,
    data: ImageData,
    out: str | Path | None = None,
    *,
    student: str | Callable[[], nn.Module],
    settings: TrainSettings | None = None,
    fractions: Sequence[float] = FRACTIONS,
    seeds: Sequence[int] = (0, 1, 2),
    of: str = "loss",
    labels: str = "true",
    channels: str = "max",
    augmented: bool = False,
    workers: int = 0,
    device: torch.device | str = "cpu",
    resume: bool = True,
    checkpoint_seconds: float = 30.0,
    progress: Progress | None = None,
) -> DiffROAR:
    r"""DiffROAR (Shah et al. 2021) of a model's input gradients, by retraining.

    .. math:: DiffROAR(k) = predPower(top\ k) - predPower(bottom\ k)

    where predPower is the test accuracy of a model trained on images of which only k % of the
    pixels are left, those with the greatest (top) or the smallest gradients; test images are masked
    likewise, and all other pixels have the mean of the training images. At 100 % both are the same
    training, made once.

    Args:
        model: whose gradients are looked at; in eval mode, and left as it was.
        data: with training images; see :func:`fastxkd.runs.data.load_data`.
        out: a new folder, or one of the same call to go on with: every accuracy is on the disk
            as soon as it is known, and a training that was cut short goes on at its last
            checkpoint. The result, ``diffroar.json``, is the same to the bit. None: nothing is
            kept.
        student: what is trained: the name of a model, see :func:`fastxkd.runs.models.load_model`,
            or a callable that makes one, called after ``torch.manual_seed(seed)``. The papers
            retrain the model's own kind.
        settings: of each training; its seed is that of ``seeds``.
        fractions: k, above 0 and at most 1.
        seeds: one retraining each, of weights and of the order of images.
        of: the gradient of the ``"loss"``, as published first, or of the ``"logit"`` or the
            ``"probability"``.
        labels: ``"true"``: of the images' own class, as published; ``"predicted"``: of the class
            the model names.
        channels: how a pixel's channels become one number, ``"max"`` or ``"sum"`` of absolute
            values: an interpretation.
        augmented: shift and mirror the masked images while training: an interpretation, too.
        workers: processes that load images.
        device: of all models.
        resume: False starts over in ``out``.
        checkpoint_seconds: of :class:`fastxkd.train.Distiller`.
        progress: told of the ranking and of every training.

    Raises:
        ValueError, TypeError: options that do not fit, data without training images, a folder that
            holds something else, or a run with other settings, model or ranking.
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, once the state is saved.
    """
    settings = settings or TrainSettings()
    fractions, seeds = list(fractions), list(seeds)
    _check(data, fractions, seeds, of, labels, channels)
    device = torch.device(device)
    make = student if callable(student) else _maker(student, data)
    # Ranking takes long: what cannot be done is said before it.
    student_weights = fingerprint(_made(make, seeds[0]).state_dict())
    if out is not None:
        refuse_others(Path(out))
    model = model.to(device)
    fill = mean_pixel(data)
    assert data.train is not None
    # A model that draws numbers draws the same ones again, and a resumed run has the same ranking.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seeds[0])
        ranks = {
            name: rank_pixels(
                model,
                data,
                split,
                of=of,
                channels=channels,
                labels=labels,
                device=device,
                stage=f"ranking {name}",
                progress=progress,
            )
            for name, split in (("train", data.train), ("test", data.test))
        }
    facts = {
        **data.settings(),
        **{k: v for k, v in dataclasses.asdict(settings).items() if k != "seed"},
        "of": of,
        "channels": channels,
        "labels": labels,
        "model_weights": fingerprint(model.state_dict()),
        # Of gradients that were rounded otherwise, on other threads say, another ranking may come.
        "ranking": fingerprint(ranks),
        "student_weights": student_weights,
        "fill": fill.tolist(),
        "augmented": augmented,
        "fractions": [float(fraction) for fraction in fractions],
        "seeds": seeds,
    }
    with Results.open(None if out is None else Path(out), facts, resume=resume) as results:
        for fraction in fractions:
            for keep in KEPT[:1] if fraction == 1 else KEPT:
                masked = masked_data(data, ranks, fraction=fraction, keep=keep, fill=fill)
                for seed in seeds:
                    if results.known(keep, fraction, seed) is not None:
                        continue
                    key = results.key(keep, fraction, seed)
                    reached = retrained_accuracy(
                        masked,
                        make,
                        dataclasses.replace(settings, seed=seed),
                        augmented=augmented,
                        workers=workers,
                        device=device,
                        checkpoint=results.checkpoint(key),
                        checkpoint_seconds=checkpoint_seconds,
                        resume=resume,
                        identity={"kept": key, "ranking": facts["ranking"]},
                        stage=f"{keep} {fraction:.4g}, seed {seed}",
                        progress=progress,
                    )
                    results.add(keep, fraction, seed, reached)
        return results.finish(fractions, seeds)


def retrained_accuracy(
    data: ImageData,
    make: Callable[[], nn.Module],
    settings: TrainSettings,
    *,
    augmented: bool = False,
    workers: int = 0,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
    resume: bool = True,
    identity: Mapping[str, Any] | None = None,
    stage: str = "student",
    progress: Progress | None = None,
) -> float:
    """predPower: accuracy on ``data.test`` of a model trained on ``data.train`` alone."""
    model = _made(make, settings.seed)
    weights = fingerprint(model.state_dict())
    batches = TrainBatches(
        data,
        batch_size=settings.batch_size,
        seed=settings.seed,
        augmented=augmented,
        workers=workers,
        device=device,
    )
    distiller = Distiller(
        model,
        batches,
        settings,
        device=device,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
        identity={**data.settings(), **(identity or {}), "initial_weights": weights},
        stage=stage,
        progress=progress,
    )
    distiller.fit(resume=resume)
    return accuracy(distiller.student, data, data.test, BATCH, device)


def _maker(spec: str, data: ImageData) -> Callable[[], nn.Module]:
    classes, channels = len(data.classes), data.channels
    return lambda: load_model(spec, num_classes=classes, in_channels=channels)


def _made(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = make()
    if not isinstance(model, nn.Module):
        raise TypeError(f"student: expected it to make a Module, got {type(model).__name__}")
    return model


def _check(
    data: ImageData,
    fractions: Sequence[float],
    seeds: Sequence[int],
    of: str,
    labels: str,
    channels: str,
) -> None:
    check_gradient_options(of, channels)
    check_choice("labels", labels, LABELS)
    if data.train is None:
        raise ValueError(f"data: {data.spec!r} was loaded without training images")
    for fraction in fractions:
        check_fraction(fraction)
    for seed in seeds:
        if type(seed) is not int:
            raise TypeError(f"seeds: expected int, got {type(seed).__name__}")
    for name, values in (("fractions", fractions), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name}: expected one or more, each once, got {values}")
