"""Train a student with or without a teacher, so that stopping and resuming changes nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxkd.losses import KDLoss
from fastxkd.train.checkpoint import check_settings, read_checkpoint, save_checkpoint

# On an accelerator the loss is looked at this often, because looking waits for the device.
_LOOK_EVERY = 20


class TrainingDiverged(ValueError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class TrainSettings:
    """What decides the weights a training ends with, besides model, data and teacher.

    SGD with Nesterov momentum; the learning rate climbs linearly for ``warmup`` of the steps and
    falls as a half cosine to zero. ``temperature``, ``ce_weight`` and ``kd_weight`` are those of
    :class:`fastxkd.KDLoss` and matter with a teacher only. ``label_smoothing`` a, with a teacher or
    without, makes of the labels' part ``(1 - a) * CE(y, p) + a * CE(uniform, p)``.
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    temperature: float = 4.0
    ce_weight: float = 0.1
    kd_weight: float = 0.9
    label_smoothing: float = 0.0
    seed: int = 0
    amp: bool = False

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch_size", 2)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        for name in ("lr", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("momentum", "weight_decay", "ce_weight", "kd_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: expected a share in [0, 1), got {self.warmup}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(
                f"label_smoothing: expected a share in [0, 1], got {self.label_smoothing}"
            )


@runtime_checkable
class Batches(Protocol):
    """A source of training batches numbered from the first step of training.

    Images, labels, and whatever else a trainer asks for, see there.
    """

    def __len__(self) -> int:
        """Steps per epoch."""

    def iterate(self, first: int, last: int) -> Iterator[tuple[Tensor, ...]]:
        """Images and labels of the steps ``first .. last - 1``; the same for the same number."""


class Progress:
    """What a training tells whoever watches it; this one keeps silent."""

    def start(self, stage: str, steps: int, done: int) -> None:
        """A stage of ``steps`` steps begins with ``done`` of them made before."""

    def step(self, epoch: int, loss: float | None) -> None:
        """One step was made."""

    def epoch(self, record: Mapping[str, Any]) -> None:
        """An epoch ended."""

    def finish(self) -> None:
        """The stage ended."""


def learning_rate(settings: TrainSettings, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero after the last step."""
    warm = round(settings.warmup * steps)
    if step < warm:
        return settings.lr * (step + 1) / (warm + 1)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """A digest of weights: two models with the same one hold the same numbers."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f"{name} {list(value.shape)} {value.dtype} ".encode())
        plain = value.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects the first Ctrl-C or SIGTERM instead of letting it tear a step apart.

    A second one acts at once. Outside the main thread signals cannot be caught, and none are.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for other in signals:
            signal.signal(other, before[other])

    for number in signals:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number in signals:
            signal.signal(number, before[number])


class Distiller:
    """Trains ``student``; with a ``teacher`` on :class:`fastxkd.KDLoss`, without on cross-entropy.

    Args:
        student: trained in place, moved to ``device``.
        batches: see :class:`Batches`; labels are class indices.
        settings: see :class:`TrainSettings`. ``settings.seed`` seeds dropout and the like.
        teacher: frozen by being run in eval mode without gradients; left as it was otherwise.
        evaluate: called on the student after every epoch, returns its accuracy.
        checkpoint: file to resume from and to write to; None keeps nothing.
        checkpoint_seconds: how often, besides every epoch, the end, and an interruption.
        identity: further facts, plain values, that must be equal to resume (data, model names).
        on_step: called after every step with the number of steps made so far.

    Raises:
        TypeError: a student, teacher, batches or settings of another kind.

    Resuming continues at the step of the checkpoint and gives the same weights, bit for bit, as a
    training that never stopped, on the same machine with the same number of threads. Random
    numbers that a model draws from elsewhere than torch are not restored.
    """

    def __init__(
        self,
        student: nn.Module,
        batches: Batches,
        settings: TrainSettings,
        *,
        teacher: nn.Module | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        device: torch.device | str = "cpu",
        checkpoint: str | Path | None = None,
        checkpoint_seconds: float = 30.0,
        identity: Mapping[str, Any] | None = None,
        stage: str = "student",
        progress: Progress | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        expect("student", student, nn.Module)
        expect("settings", settings, TrainSettings)
        if teacher is not None:
            expect("teacher", teacher, nn.Module)
        if not isinstance(batches, Batches):
            raise TypeError(
                "batches: expected an object with __len__() and iterate(first, last), got"
                f" {type(batches).__name__}"
            )
        self.device = torch.device(device)
        self.student = student.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.teacher = None if teacher is None else teacher.to(self.device)
        self.batches, self.settings, self.evaluate = batches, settings, evaluate
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.checkpoint_seconds, self.stage = checkpoint_seconds, stage
        self.progress, self.on_step = progress or Progress(), on_step
        self.history: list[dict[str, Any]] = []
        self.steps = settings.epochs * len(batches)
        self.identity = {**dataclasses.asdict(settings), **(identity or {})}
        if settings.label_smoothing == 0:
            del self.identity["label_smoothing"]
        if teacher is None:
            # A setting without effect must not keep a run from being resumed.
            for name in ("temperature", "ce_weight", "kd_weight"):
                del self.identity[name]
        else:
            self.identity["teacher_weights"] = fingerprint(teacher.state_dict())
        self._step = 0
        self._partial = {"loss": 0.0, "images": 0, "seconds": 0.0}
        self._unseen: list[tuple[int, Tensor, int]] = []
        self._criterion = self._make_criterion().to(self.device)
        self._optimizer = self._make_optimizer()

    def _make_criterion(self) -> nn.Module:
        """The loss; what it learns is trained and saved with the student."""
        return KDLoss(
            temperature=self.settings.temperature,
            ce_weight=self.settings.ce_weight,
            kd_weight=self.settings.kd_weight,
            label_smoothing=self.settings.label_smoothing,
        )

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            [*self.student.parameters(), *self._criterion.parameters()],
            lr=self.settings.lr,
            momentum=self.settings.momentum,
            weight_decay=self.settings.weight_decay,
            nesterov=self.settings.momentum > 0,
        )

    def rates(self, step: int) -> list[float]:
        """Of each of the optimizer's groups in the step of this number, from 0."""
        groups = len(self._optimizer.param_groups)
        return [learning_rate(self.settings, step, self.steps)] * groups

    @property
    def finished(self) -> bool:
        return self._step == self.steps

    def fit(self, *, resume: bool = True) -> list[dict[str, Any]]:
        """Train to the end, from the checkpoint if there is one.

        Returns:
            One record per epoch: epoch (from 1), loss (mean), accuracy (None without
            ``evaluate``), lr (of the first group, in the last step), seconds.

        Raises:
            ValueError: a checkpoint that is damaged or was made with other settings.
            TrainingDiverged: the loss is not finite; the last checkpoint stays as it was.
            KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, once the state is saved.
        """
        torch.manual_seed(self.settings.seed)
        if resume and self.checkpoint is not None and self.checkpoint.exists():
            self._restore(self.checkpoint)
        self.progress.start(self.stage, self.steps, self._step)
        if not self.finished:
            with _stop_requests() as requests, self._teacher_in_eval():
                self._train(requests)
        self.student.eval()
        self.progress.finish()
        return self.history

    def _train(self, requests: list[int]) -> None:
        self.student.train()
        saved = clock = time.monotonic()
        for batch in self.batches.iterate(self._step, self.steps):
            self._advance(*batch)
            now = time.monotonic()
            self._partial["seconds"] += now - clock
            clock = now
            try:
                if self._step % len(self.batches) == 0:
                    self._end_epoch()
                    saved = clock = time.monotonic()
                elif now - saved >= self.checkpoint_seconds:
                    self._save()
                    saved = clock = time.monotonic()
                if self.on_step is not None:
                    self.on_step(self._step)
                if requests:
                    raise _interruption(requests[0])
            # The step is complete here, so this is a state to come back to.
            except (KeyboardInterrupt, SystemExit):
                self._save()
                raise

    def _advance(self, images: Tensor, labels: Tensor, *more: Tensor) -> None:
        epoch = self._step // len(self.batches)
        # Batch norm has nothing to normalise in less than two images (the rest was unreadable).
        if len(labels) > 1:
            rates = self.rates(self._step)
            for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            images = images.contiguous(memory_format=torch.channels_last)
            loss = self._loss(images, labels, *more)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
            self._unseen.append((self._step, loss.detach(), len(labels)))
        self._step += 1
        if self.device.type == "cpu" or len(self._unseen) >= _LOOK_EVERY:
            self._look()
        seen = self._partial["images"]
        self.progress.step(epoch, self._partial["loss"] / seen if seen else None)

    def _loss(self, images: Tensor, labels: Tensor, *more: Tensor) -> Tensor:
        with self._autocast():
            # A copy: what a student does to it in place must not reach the teacher.
            own = images if self.teacher is None else images.clone()
            logits = _logits(self.student(own), self.stage)
        return self._guided(logits, images, labels)

    def _guided(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """The loss on the student's logits of these images."""
        if self.teacher is None:
            smoothing = self.settings.label_smoothing
            return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        loss: Tensor = self._criterion(logits.float(), self._guidance(images).float(), labels)
        return loss

    def _guidance(self, images: Tensor) -> Tensor:
        assert self.teacher is not None
        with self._autocast(), torch.no_grad():
            return _logits(self.teacher(images), "teacher")

    def _autocast(self) -> Any:
        if not self.settings.amp:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _look(self) -> None:
        """Fetch the losses of the last steps and stop at the first that is not finite."""
        if not self._unseen:
            return
        values = torch.stack([loss for _, loss, _ in self._unseen]).tolist()
        for value, (step, _, images) in zip(values, self._unseen, strict=True):
            if not math.isfinite(value):
                raise TrainingDiverged(
                    f"{self.stage}: the loss became {value} at step {step + 1} of {self.steps} "
                    f"(epoch {step // len(self.batches) + 1}, learning rate "
                    f"{self.rates(step)[0]:.4g}); try a smaller lr"
                )
            self._partial["loss"] += value * images
            self._partial["images"] += images
        self._unseen.clear()

    def _end_epoch(self) -> None:
        self._look()
        epoch = self._step // len(self.batches)
        accuracy = None
        if self.evaluate is not None:
            accuracy = self.evaluate(self.student)
            self.student.train()
        record = {
            "epoch": epoch,
            "loss": self._partial["loss"] / max(1, self._partial["images"]),
            "accuracy": accuracy,
            "lr": self.rates(self._step - 1)[0],
            "seconds": self._partial["seconds"],
        }
        self.history.append(record)
        self._partial = {"loss": 0.0, "images": 0, "seconds": 0.0}
        self._save()
        self.progress.epoch(record)

    @contextmanager
    def _teacher_in_eval(self) -> Iterator[None]:
        if self.teacher is None:
            yield
            return
        modes = [(module, module.training) for module in self.teacher.modules()]
        self.teacher.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    def _save(self) -> None:
        # Weights after a loss that is not finite must never replace good ones.
        self._look()
        if self.checkpoint is None:
            return
        on_cuda = self.device.type == "cuda"
        content = {
            "settings": self.identity,
            "stage": self.stage,
            "step": self._step,
            "finished": self.finished,
            "model": self.student.state_dict(),
            "criterion": self._criterion.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if on_cuda else None,
            "partial": self._partial,
            "history": self.history,
        }
        save_checkpoint(self.checkpoint, content)

    def _restore(self, path: Path) -> None:
        content = read_checkpoint(path)
        check_settings(content["settings"], self.identity, f"the {self.stage} in {path}")
        self.student.load_state_dict(content["model"])
        self._criterion.load_state_dict(content.get("criterion", {}))
        self._optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["random"])
        if content["random_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(content["random_cuda"], self.device)
        self._step, self._partial = content["step"], content["partial"]
        self.history = content["history"]


def expect(name: str, given: object, kind: type) -> None:
    if not isinstance(given, kind):
        raise TypeError(f"{name}: expected a {kind.__name__}, got {type(given).__name__}")


def _logits(output: object, role: str) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != 2:
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"{role}: expected the model to put out logits [N, classes], got {got}")
    return output


def _interruption(number: int) -> BaseException:
    if number == signal.SIGINT:
        return KeyboardInterrupt()
    return SystemExit(128 + number)
