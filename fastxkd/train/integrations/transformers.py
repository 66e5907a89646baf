"""A callback that explains student against teacher in a Hugging Face ``Trainer``."""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastxkd._extras import require
from fastxkd.train.checkpoint import read_checkpoint, save_checkpoint
from fastxkd.train.integrations import sinks
from fastxkd.train.monitor import ExplanationMonitor

_TrainerCallback: Any = require("transformers", extra="transformers").TrainerCallback

STATE_FILE = "explanation_monitor.pt"


class ExplanationCallback(_TrainerCallback):
    """Puts an :class:`fastxkd.ExplanationMonitor` on the model that a ``Trainer`` trains.

    ``ExplanationCallback(teacher, {"last": ("encoder.stages.3", "stages.3")}).attach(trainer)``

    For models of images that return logits, or a ``ModelOutput`` with ``.logits``. The teacher
    runs where it always does, in your ``compute_loss``; the monitor sees it there. The batches of
    one accumulated step are one record. The monitor's state goes into the trainer's checkpoints,
    as ``explanation_monitor.pt``, and ``train(resume_from_checkpoint=...)`` takes it up again.
    With several processes rank 0 measures, on its own share of the batch.

    A ``Trainer`` shows its callbacks neither batches nor itself, and has no event between loss and
    backward. :meth:`attach` adds the callback and puts it around the trainer's ``compute_loss``,
    where all that is seen. Given as ``callbacks=[callback]`` instead, it knows the labels only
    where the student is called with them (not with label smoothing, a ``compute_loss_func``, or a
    ``compute_loss`` that takes them out), and hands values to ``sink`` but not to ``trainer.log``.

    Args:
        teacher: the teacher.
        layers: as for :class:`fastxkd.ExplanationMonitor`.
        base: a base model, or None.
        prefix: goes before the names that ``trainer.log`` is given.
        sink: as for :class:`fastxkd.ExplanationMonitor`, besides ``trainer.log``.
        **options: further arguments of :class:`fastxkd.ExplanationMonitor`, such as ``every``.

    Attributes:
        monitor: the monitor of the last ``train``; None before the first.

    Raises:
        ValueError: when training starts, ``torch_compile=True`` without :meth:`attach`.
    """

    def __init__(
        self,
        teacher: nn.Module,
        layers: Any,
        *,
        base: nn.Module | None = None,
        prefix: str = "explanation/",
        sink: Any = None,
        **options: Any,
    ) -> None:
        self.monitor: ExplanationMonitor | None = None
        self._teacher, self._base, self._layers = teacher, base, layers
        self._prefix, self._sink, self._options = prefix, sink, options
        self._trainer: Any = None
        self._step: int | None = None  # the optimizer step that is under way
        self._live = False

    def attach(self, trainer: Any) -> ExplanationCallback:
        """Add the callback to ``trainer``, with all that it can know there.

        Returns:
            The callback.

        Raises:
            ValueError: it is attached to a trainer already.
        """
        if self._trainer is not None:
            raise ValueError("trainer: this callback is attached to one already; make another")
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        compute_loss = trainer.compute_loss
        names = dict.fromkeys([*trainer.label_names, "labels", "label"])

        @functools.wraps(compute_loss)
        def watched(model: nn.Module, inputs: Mapping[str, Any], *more: Any, **named: Any) -> Any:
            if self._step is None or self.monitor is None:  # an evaluation
                return compute_loss(model, inputs, *more, **named)
            labels = next((inputs[name] for name in names if name in inputs), None)
            with self.monitor.step(labels, step=self._step):
                return compute_loss(model, inputs, *more, **named)

        trainer.compute_loss = watched
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._close()
        if self._trainer is None and args.torch_compile:
            raise ValueError(
                "torch_compile: a callback is not shown the compiled model; use"
                " ExplanationCallback(...).attach(trainer)"
            )
        self.monitor = ExplanationMonitor(
            others["model"] if self._trainer is None else self._trainer.model_wrapped,
            self._teacher,
            self._layers,
            base=self._base,
            sink=sinks(self._sink, *([] if self._trainer is None else [self._to_trainer])),
            **self._options,
        )
        self._live = True
        if state.global_step > 0 and state.is_world_process_zero:  # whose state is kept
            self._restore(args, state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step = state.global_step
        self._begin_batch()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._end_batch()
        self._begin_batch()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._end_batch()
        self._step = None
        if control.should_save or control.should_evaluate:
            self._flush()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._flush()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = _checkpoint(args, state)
        if self.monitor is not None and state.is_world_process_zero and folder.is_dir():
            content = {"run": _fingerprint(state), "monitor": self.monitor.state_dict()}
            save_checkpoint(folder / STATE_FILE, content)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._close()

    def _flush(self) -> None:
        # What is logged later is missing in the trainer_state.json of a checkpoint.
        if self.monitor is not None:
            self.monitor.flush()

    # Attached, a batch begins and ends with its compute_loss.
    def _begin_batch(self) -> None:
        if self._trainer is None and self.monitor is not None:
            self.monitor.begin_step(self._step)

    def _end_batch(self) -> None:
        if self._trainer is None and self.monitor is not None:
            self.monitor.end_step()

    def _to_trainer(self, step: int, values: Mapping[str, float], _: Any = None) -> None:
        control = self._trainer.control
        due = control.should_log
        self._trainer.log({self._prefix + name: value for name, value in values.items()})
        control.should_log = due  # the trainer's own log of this step is still to come

    def _restore(self, args: Any, state: Any) -> None:
        """Continue from the checkpoint that the trainer continues from, where it can be told."""
        assert self.monitor is not None
        # The trainer does not say which folder it has read.
        named = args.resume_from_checkpoint
        folders = [Path(named)] if isinstance(named, str) else []
        for folder in [*folders, _checkpoint(args, state)]:
            if (folder / STATE_FILE).is_file():
                content = read_checkpoint(folder / STATE_FILE)
                if content["run"] == _fingerprint(state):
                    self.monitor.load_state_dict(content["monitor"])
                    return
        warnings.warn(
            f"no {STATE_FILE} of this run was found for step {state.global_step}; the monitor"
            " starts afresh. A checkpoint outside of output_dir is found by"
            " TrainingArguments(resume_from_checkpoint=...)",
            stacklevel=2,
        )

    def _close(self) -> None:
        self._step = None
        if self._live and self.monitor is not None:
            self._live = False
            self.monitor.close()


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _fingerprint(state: Any) -> str:
    """Tells one run's step from the same step of another, by what was logged until then."""
    history = json.dumps([state.global_step, state.log_history], sort_keys=True)
    return hashlib.sha256(history.encode()).hexdigest()
