"""Both stages of KDExplainer's training: first the paths with the network, then the tree alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastxkd.ops._checks import (
    check_choice,
    check_counts,
    check_factors,
    check_flags,
    check_positive,
)
from fastxkd.train.distiller import Batches, Distiller, TrainSettings, expect, learning_rate
from fastxkd.train.kdexplainer import KDExplainer
from fastxkd.train.routing_tree import RoutingTree

SCHEDULES = ("published", "cosine")


class KDExplainerDistiller(Distiller):
    r"""The first stage: paths and weights of a :class:`KDExplainer` together, with Adam.

    The loss is that of :class:`Distiller`, with a teacher 0.1 cross-entropy and 0.9 T^2 KL; without
    one, plain training, with whose attention entropy the paper compares. In epoch e, counted from
    1, the gates have the temperature ``annealing / e``.

    Args:
        student, batches, settings, options: as of :class:`Distiller`. Published are 300 epochs of
            batches of 128, a rate of 0.05 (``settings.lr``, of the network) and weight decay 5e-4.
            ``momentum`` is Adam's first beta; ``warmup`` counts with ``"cosine"`` only.
        routing_lr: of the routing matrices.
        routing_warmup: epochs in which they rest.
        annealing: temperature of the first epoch.
        schedule: ``"published"``: in the epochs of ``routing_warmup`` the network's rate doubles up
            to ``settings.lr``; from then on both rates fall every other epoch, to
            :math:`1 - e / \lfloor 1.03093\, E \rfloor` of what they were, e the epochs before.
            ``"cosine"``: both as the rate of :class:`Distiller`.

    Raises:
        ValueError, TypeError: a student of another class, one whose tree is fixed, or numbers that
            do not fit.
    """

    student: KDExplainer

    def __init__(
        self,
        student: KDExplainer,
        batches: Batches,
        settings: TrainSettings,
        *,
        routing_lr: float = 1e-2,
        routing_warmup: int = 2,
        annealing: float = 10.0,
        schedule: str = "published",
        **options: Any,
    ) -> None:
        _check_student(student, fixed=False)
        check_positive(annealing=annealing)
        check_factors(routing_lr=routing_lr)
        check_choice("schedule", schedule, SCHEDULES)
        if type(routing_warmup) is not int or routing_warmup < 0:
            raise ValueError(f"routing_warmup: expected an int of 0 or more, got {routing_warmup}")
        self.routing_lr, self.routing_warmup = routing_lr, routing_warmup
        self.annealing, self.schedule = annealing, schedule
        options["identity"] = {
            **(options.get("identity") or {}),
            "routing_lr": routing_lr,
            "routing_warmup": routing_warmup,
            "annealing": annealing,
            "schedule": schedule,
        }
        super().__init__(student, batches, settings, **options)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            [
                {"params": self.student.network_parameters()},
                {"params": self.student.routing_parameters()},
            ],
            lr=self.settings.lr,
            betas=(self.settings.momentum, 0.999),
            weight_decay=self.settings.weight_decay,
        )

    def rates(self, step: int) -> list[float]:
        epoch = step // len(self.batches)
        resting = self.routing_warmup - epoch
        if self.schedule == "cosine":
            share = learning_rate(self.settings, step, self.steps) / self.settings.lr
        elif resting > 0:
            share = 0.5**resting
        else:
            fallen = epoch - epoch % 2 if epoch > self.routing_warmup + 1 else 0
            share = 1 - fallen / max(1, int(1.03093 * self.settings.epochs))
        return [share * self.settings.lr, 0.0 if resting > 0 else share * self.routing_lr]

    def _loss(self, images: Tensor, labels: Tensor, *more: Tensor) -> Tensor:
        self.student.temperature = self.annealing / (self._step // len(self.batches) + 1)
        return super()._loss(images, labels, *more)


class TreeDistiller(Distiller):
    """The second stage: the weights of a :class:`KDExplainer` whose tree is fixed, with SGD.

    Args:
        student: after ``fix_tree()``, which as published also draws its weights anew.
        batches, settings, options: as of :class:`Distiller`. Published are 300 epochs of batches of
            128, a rate of 0.05, momentum 0.9 and weight decay 5e-4; ``warmup`` counts with
            ``"cosine"`` only.
        halve_every: the rate is halved in each epoch, counted from 1, that is a multiple of it,
            with ``"published"``.
        schedule: ``"published"``, or ``"cosine"`` as :class:`Distiller`.

    Raises:
        ValueError, TypeError: a student of another class, one whose tree is not fixed, or numbers
            that do not fit.
    """

    student: KDExplainer

    def __init__(
        self,
        student: KDExplainer,
        batches: Batches,
        settings: TrainSettings,
        *,
        halve_every: int = 30,
        schedule: str = "published",
        **options: Any,
    ) -> None:
        _check_student(student, fixed=True)
        check_counts(halve_every=halve_every)
        check_choice("schedule", schedule, SCHEDULES)
        self.halve_every, self.schedule = halve_every, schedule
        options["identity"] = {
            **(options.get("identity") or {}),
            "halve_every": halve_every,
            "schedule": schedule,
            "tree": student.tree().to_json(),
        }
        super().__init__(student, batches, settings, **options)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            self.student.network_parameters(),
            lr=self.settings.lr,
            momentum=self.settings.momentum,
            weight_decay=self.settings.weight_decay,
        )

    def rates(self, step: int) -> list[float]:
        if self.schedule == "cosine":
            return [learning_rate(self.settings, step, self.steps)]
        epoch = step // len(self.batches) + 1
        return [self.settings.lr * 0.5 ** (epoch // self.halve_every)]


class KDExplained(NamedTuple):
    """Of :func:`train_kdexplainer`."""

    tree: RoutingTree
    entropy: list[Tensor]  # attention entropy of each routing at the end of the first stage
    history: list[dict[str, Any]]
    tree_history: list[dict[str, Any]]


def train_kdexplainer(
    student: KDExplainer,
    batches: Batches,
    settings: TrainSettings,
    *,
    tree_settings: TrainSettings | None = None,
    teacher: nn.Module | None = None,
    reset: bool = True,
    entropy_temperature: float = 1.0,
    routing_lr: float = 1e-2,
    routing_warmup: int = 2,
    annealing: float = 10.0,
    halve_every: int = 30,
    schedule: str = "published",
    folder: str | Path | None = None,
    resume: bool = True,
    **options: Any,
) -> KDExplained:
    """Both stages of KDExplainer's training; ``student`` ends in eval mode with its tree fixed.

    Args:
        student, batches, settings, teacher, routing_lr, routing_warmup, annealing, schedule: as of
            :class:`KDExplainerDistiller`.
        tree_settings, halve_every: as of :class:`TreeDistiller`; None: ``settings`` at a rate of
            0.05.
        reset: of :meth:`KDExplainer.fix_tree`; the weights are drawn from ``tree_settings.seed``.
        entropy_temperature: of :meth:`KDExplainer.attention_entropy`.
        folder: for the checkpoints ``routing.pt`` and ``tree.pt``; the same call goes on where a
            killed one stopped and ends with the same weights. None: none.
        resume: False starts over.
        options: of :class:`Distiller`: evaluate, device, progress, identity, checkpoint_seconds,
            on_step.

    Raises:
        ValueError, TypeError: as there.
    """
    # Now, not once the first stage is over.
    expect("settings", settings, TrainSettings)
    check_positive(entropy_temperature=entropy_temperature)
    check_counts(halve_every=halve_every)
    check_flags(reset=reset, resume=resume)
    if tree_settings is None:
        tree_settings = dataclasses.replace(settings, lr=0.05)
    expect("tree_settings", tree_settings, TrainSettings)
    folder = None if folder is None else Path(folder)
    shared = {"teacher": teacher, **options}
    first = KDExplainerDistiller(
        student,
        batches,
        settings,
        routing_lr=routing_lr,
        routing_warmup=routing_warmup,
        annealing=annealing,
        schedule=schedule,
        stage="routing",
        checkpoint=None if folder is None else folder / "routing.pt",
        **shared,
    )
    history = first.fit(resume=resume)
    entropy = student.attention_entropy(entropy_temperature)
    torch.manual_seed(tree_settings.seed)
    tree = student.fix_tree(reset=reset)
    second = TreeDistiller(
        student,
        batches,
        tree_settings,
        halve_every=halve_every,
        schedule=schedule,
        stage="tree",
        checkpoint=None if folder is None else folder / "tree.pt",
        **shared,
    )
    return KDExplained(tree, entropy, history, second.fit(resume=resume))


def _check_student(student: Any, *, fixed: bool) -> None:
    if not isinstance(student, KDExplainer):
        raise TypeError(f"student: expected a KDExplainer, got {type(student).__name__}")
    if student.fixed != fixed:
        expected = "a fixed tree, see fix_tree()" if fixed else "a tree that is not fixed yet"
        raise ValueError(f"student: expected {expected}")
