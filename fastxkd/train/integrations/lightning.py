"""A Lightning callback that explains student against teacher while ``Trainer.fit`` runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastxkd._extras import require
from fastxkd.train.integrations import sinks
from fastxkd.train.monitor import ExplanationMonitor

_Callback: Any = require("lightning.pytorch", extra="lightning").Callback

_LABELS = ("labels", "label", "targets", "target", "y")


class ExplanationCallback(_Callback):
    """Puts an :class:`fastxkd.ExplanationMonitor` on the models of a ``LightningModule``.

    ``trainer = Trainer(callbacks=[ExplanationCallback({"last": ("layer4", "layer4")})])``

    Every batch is announced to the monitor in ``on_train_batch_start``, under the number of its
    optimizer step, so the batches of one accumulated step are one record. Values go to the
    trainer's loggers under the step they were measured in, whatever ``log_every_n_steps`` says,
    and to ``trainer.callback_metrics`` for ``ModelCheckpoint`` and ``EarlyStopping``. The
    monitor's state is part of the trainer's checkpoints. With several processes rank 0 measures,
    on its own share of the batch, and ``callback_metrics`` has the values there alone.

    Args:
        layers: as for :class:`fastxkd.ExplanationMonitor`.
        student: the ``LightningModule``'s attribute that holds the student; dots go deeper.
        teacher: attribute of the teacher, or the teacher itself where the module does not own it.
        base: the same for a base model; None: there is none.
        labels: takes a batch and returns its labels ``[n]``. None: the second of a tuple or list,
            or a mapping's entry labels, label, targets, target or y; where there is no such, the
            monitor does without.
        log: give values to the trainer's loggers and ``callback_metrics``, and the probe's pictures
            to loggers of TensorBoard.
        prefix: goes before the names there; another one for each of several callbacks.
        sink: as for :class:`fastxkd.ExplanationMonitor`, besides the trainer's loggers.
        **options: further arguments of :class:`fastxkd.ExplanationMonitor`, such as ``every``.

    Attributes:
        monitor: the monitor of the last ``fit``; None before the first.

    Raises:
        ValueError: when training starts, an attribute that the module does not have; a module
            that is compiled as a whole.
        TypeError: when training starts, an attribute that is no ``nn.Module``.
    """

    def __init__(
        self,
        layers: Any,
        *,
        student: str = "student",
        teacher: str | nn.Module = "teacher",
        base: str | nn.Module | None = None,
        labels: Callable[[Any], Tensor | None] | None = None,
        log: bool = True,
        prefix: str = "explanation/",
        sink: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.monitor: ExplanationMonitor | None = None
        self._layers, self._options = layers, options
        self._models = {"student": student, "teacher": teacher, "base": base}
        self._labels = labels or labels_of
        self._log, self._prefix, self._sink = log, prefix, sink
        self._loggers: list[Any] = []
        self._state: dict[str, Any] | None = None  # from a checkpoint, for the next monitor
        self._news: dict[str, float] = {}
        self._live = False

    @property
    def state_key(self) -> str:
        """Tells callbacks of one trainer apart in its checkpoints: by their prefixes."""
        return f"{type(self).__qualname__}({self._prefix})"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if getattr(pl_module, "_compiler_ctx", None) is not None:
            raise ValueError(
                f"{type(pl_module).__name__} is compiled as a whole, which hides its layers;"
                " compile the student inside of it instead"
            )
        models: dict[str, Any] = {
            role: model if isinstance(model, nn.Module) else _attribute(pl_module, model, role)
            for role, model in self._models.items()
            if model is not None
        }
        self._close()
        self._loggers, self._news = trainer.loggers, {}
        self.monitor = ExplanationMonitor(
            **models,
            layers=self._layers,
            sink=sinks(self._sink, *([self._to_trainer] if self._log else [])),
            **self._options,
        )
        self._live = True
        if self._state is not None and trainer.is_global_zero:  # whose state it is
            self.monitor.load_state_dict(self._state)
        self._state = None

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.monitor is not None
        self.monitor.begin_step(trainer.global_step, self._labels(batch))
        if self._news:
            pl_module.log_dict(self._news, on_step=True, on_epoch=False, logger=False)
            self._news = {}

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        # Of a batch with several backwards (manual optimisation) what precedes the first counts.
        assert self.monitor is not None
        self.monitor.end_step()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.monitor is not None
        self.monitor.abandon_step()  # where there was no backward

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def state_dict(self) -> dict[str, Any]:
        return self._state or {} if self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict

    def _to_trainer(
        self, step: int, values: Mapping[str, float], pictures: Mapping[str, Tensor] | None = None
    ) -> None:
        named = {self._prefix + name: value for name, value in values.items()}
        for logger in self._loggers:
            logger.log_metrics(named, step=step)
            board: Any = getattr(logger, "experiment", None)
            if pictures and hasattr(board, "add_image"):
                for name, picture in pictures.items():
                    board.add_image(self._prefix + name, picture, step)
        self._news.update(named)

    def _close(self) -> None:
        if self._live and self.monitor is not None:
            self._live = False
            self.monitor.close()


def labels_of(batch: Any) -> Tensor | None:
    """The labels in a batch of one of the usual forms, or None."""
    found = None
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in _LABELS if name in batch), None)
    elif isinstance(batch, Sequence) and len(batch) > 1:
        found = batch[1]
    return found if isinstance(found, Tensor) else None


def _attribute(module: nn.Module, name: str, role: str) -> nn.Module:
    try:
        found = operator.attrgetter(name)(module)
    except AttributeError:
        raise ValueError(
            f"{role}: {type(module).__name__} has no attribute {name!r}; name the one that holds"
            f" the {role}"
        ) from None
    if not isinstance(found, nn.Module):
        raise TypeError(
            f"{role}: expected {type(module).__name__}.{name} to be a module,"
            f" got {type(found).__name__}"
        )
    return found
