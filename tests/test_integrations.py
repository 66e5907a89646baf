"""The monitor in other people's trainers: the real packages, with models of a few weights."""

from __future__ import annotations

import csv
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from tests.conftest import needs
from tests.monitored import (
    BATCH,
    BATCHES,
    LAYERS,
    OPTIONS,
    Images,
    distil,
    optimizer_of,
    plain,
    processes,
    records,
    same_weights,
    student,
    teacher,
    twins,
    untouched,
)

# What these packages say about newer versions of what they use is theirs to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode"),  # the teacher
]


def _import(module: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return needs(module)


@pytest.fixture(scope="module")
def lightning() -> Any:
    return _import("lightning.pytorch")


@pytest.fixture
def transformers() -> Iterator[Any]:
    _import("accelerate")
    before = dict(os.environ)  # where torch_compile=True leaves a note for whoever comes next
    yield _import("transformers")
    os.environ.clear()
    os.environ.update(before)


def lightning_callback(**options: Any) -> Any:
    from fastxkd.train.integrations.lightning import ExplanationCallback

    return ExplanationCallback(LAYERS, **{**OPTIONS, **options})


# --- Lightning


def lightning_module(pl: Any, *, dropout: float = 0.2, compute: Any = distil) -> Any:
    class Distillation(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = student(dropout=dropout), teacher()

        def training_step(self, batch: Any, _: int) -> Any:
            return compute(self.student, self.teacher, *batch)

        def validation_step(self, batch: Any, _: int) -> None:
            self.student(batch[0])

        def configure_optimizers(self) -> Any:
            return optimizer_of(self.student)

    return Distillation()


def fit(
    pl: Any,
    callback: Any | None,
    folder: Path,
    module: Any = None,
    *,
    more: tuple[Any, ...] = (),
    validate: bool = False,
    resume: Path | None = None,
    **options: Any,
) -> Any:
    module = lightning_module(pl) if module is None else module
    settings: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 1,
        **options,
    }
    trainer = pl.Trainer(
        default_root_dir=folder,
        callbacks=[*([] if callback is None else [callback]), *more],
        **settings,
    )
    torch.manual_seed(3)
    loaders = [DataLoader(Images(), BATCH) for _ in range(1 + validate)]
    trainer.fit(module, *loaders, ckpt_path=resume)
    return module


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_measures_what_a_plain_loop_does(
    lightning: Any, tmp_path: Path, accumulate: int, precision: str
) -> None:
    options = {"accumulate_grad_batches": accumulate, "precision": precision}
    callback = lightning_callback()
    module = lightning_module(lightning, dropout=0)
    fit(lightning, callback, tmp_path, module, **options)
    learner = student()
    expected = plain(
        learner,
        teacher(),
        Images().batches(),
        accumulate=accumulate,
        autocast=torch.bfloat16 if precision == "bf16-mixed" else None,
    )
    assert same_weights(module.student, learner)
    assert records(callback.monitor) == records(expected)
    assert [step for step, _ in records(expected)] == ([0, 2, 4] if accumulate == 1 else [0, 2])
    assert untouched(module.student, module.teacher)


def test_lightning_weights_are_those_without_the_callback(lightning: Any, tmp_path: Path) -> None:
    """Dropout included: no random number is taken, validation in between or not."""
    options: dict[str, Any] = {"validate": True, "val_check_interval": 2, "max_epochs": 2}
    callback = lightning_callback(every=1)
    monitored = fit(lightning, callback, tmp_path, **options)
    alone = fit(lightning, None, tmp_path, **options)
    assert same_weights(monitored, alone)
    assert [step for step, _ in records(callback.monitor)] == list(range(2 * BATCHES))


def test_lightning_loggers_and_callbacks_get_the_values(lightning: Any, tmp_path: Path) -> None:
    _import("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [
        lightning.loggers.CSVLogger(tmp_path / "csv"),
        lightning.loggers.TensorBoardLogger(tmp_path / "board"),
    ]
    own: list[int] = []

    def sink(step: int, values: Any, pictures: Any = None) -> None:
        own.append(step)

    found: dict[str, float] = {}

    class Reader(lightning.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            found.update({k: float(v) for k, v in trainer.callback_metrics.items()})

    probe = Images().images[:2]
    callback = lightning_callback(sink=sink, pool=BATCH, probe=probe, probe_every=4)
    fit(lightning, callback, tmp_path, logger=loggers, more=(Reader(),))
    expected = records(callback.monitor)
    assert own == [step for step, _ in expected] == [0, 2, 4]
    names = {f"explanation/{name}" for name in expected[0][1]}
    assert len(names) > 1
    with (Path(loggers[0].log_dir) / "metrics.csv").open() as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    events = EventAccumulator(loggers[1].log_dir).Reload()
    for name in names:
        values = [(step, values[name.removeprefix("explanation/")]) for step, values in expected]
        for step, value in values:
            assert float(rows[step][name]) == pytest.approx(value, rel=1e-6)
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in values
        ]
    tags = events.Tags()["images"]
    assert all(tag.startswith("explanation/") for tag in tags)
    # The probe and the teacher's maps once, the student's again.
    assert {events.Images(tag)[-1].step for tag in tags} == {0, 4}
    # A record is handed on when the next step begins.
    assert names <= found.keys()
    assert found[min(names)] == pytest.approx(expected[-1][1][min(names)[12:]], rel=1e-6)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_lightning_checkpoints_hold_the_monitor(lightning: Any, tmp_path: Path) -> None:
    """The first epoch ends with a pool that is half full."""
    runs = []
    for name, epochs in (("whole", [2]), ("parts", [1, 2])):
        resume = None
        for last in epochs:
            callback = lightning_callback(every=1, pool=4 * BATCH)
            keep = lightning.callbacks.ModelCheckpoint(tmp_path / name)
            module = fit(
                lightning,
                callback,
                tmp_path,
                lightning_module(lightning, dropout=0),
                more=(keep,),
                enable_checkpointing=True,
                max_epochs=last,
                resume=resume,
            )
            resume = Path(keep.best_model_path)
        runs.append((module, records(callback.monitor)))
    (whole, expected), (resumed, found) = runs
    assert same_weights(resumed, whole)
    assert found == expected
    assert [step for step, values in found if "last/fss_teacher" in values] == [3, 7, 11]


def test_lightning_callbacks_beside_each_other(lightning: Any, tmp_path: Path) -> None:
    first, second = lightning_callback(), lightning_callback(prefix="second/", every=1)
    assert first.state_key != second.state_key
    fit(lightning, first, tmp_path, more=(second,))
    found, steps = records(first.monitor), [step for step, _ in records(second.monitor)]
    assert found
    assert steps == list(range(BATCHES))
    alone = lightning_callback()
    fit(lightning, alone, tmp_path / "alone")
    assert found == records(alone.monitor)


def test_lightning_manual_optimisation(lightning: Any, tmp_path: Path) -> None:
    class Manual(lightning.LightningModule):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = student(), teacher()

        def training_step(self, batch: Any, _: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(distil(self.student, self.teacher, *batch))
            optimizer.step()

        def configure_optimizers(self) -> Any:
            return optimizer_of(self.student)

    callback = lightning_callback()
    module = fit(lightning, callback, tmp_path, Manual())
    learner = student()
    expected = plain(learner, teacher(), Images().batches())
    assert same_weights(module.student, learner)
    assert records(callback.monitor) == records(expected)


def test_lightning_steps_that_fail_leave_nothing_behind(lightning: Any, tmp_path: Path) -> None:
    def fail(learner: nn.Module, guide: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        learner(images)
        raise RuntimeError("out of luck")

    callback = lightning_callback(every=1)
    module = lightning_module(lightning, compute=fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(lightning, callback, tmp_path, module)
    assert untouched(module.student, module.teacher)
    assert records(callback.monitor) == []


def test_lightning_a_step_without_a_loss_is_no_record(lightning: Any, tmp_path: Path) -> None:
    calls = []

    def sometimes(learner: nn.Module, guide: nn.Module, *batch: Tensor) -> Tensor | None:
        calls.append(1)
        loss = distil(learner, guide, *batch)
        return None if len(calls) == 2 else loss

    callback = lightning_callback(every=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*returned `None`")
        module = fit(lightning, callback, tmp_path, lightning_module(lightning, compute=sometimes))
    # Lightning counts the second step all the same.
    assert [step for step, _ in records(callback.monitor)] == [0, *range(2, BATCHES)]
    assert untouched(module.student, module.teacher)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"student": "net"}, ValueError, "student: Distillation has no attribute 'net'"),
        ({"teacher": "device"}, TypeError, "teacher: expected Distillation.device to be a module"),
    ],
)
def test_lightning_attributes_are_checked(
    lightning: Any, tmp_path: Path, options: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        fit(lightning, lightning_callback(**options), tmp_path)


def test_lightning_a_module_compiled_as_a_whole_is_refused(lightning: Any, tmp_path: Path) -> None:
    module = torch.compile(lightning_module(lightning), backend="eager")
    with pytest.raises(ValueError, match="compile the student inside of it instead"):
        fit(lightning, lightning_callback(), tmp_path, module)


def test_lightning_a_compiled_student(lightning: Any, tmp_path: Path) -> None:
    runs = []
    for callback in (lightning_callback(), None):
        torch.compiler.reset()
        module = lightning_module(lightning, dropout=0)
        module.student.compile(backend="aot_eager")
        fit(lightning, callback, tmp_path, module)
        runs.append((module.student, callback))
    (monitored, callback), (alone, _) = runs
    assert same_weights(monitored, alone)
    expected = plain(student(), teacher(), Images().batches())
    assert callback is not None
    assert records(callback.monitor) == records(expected)


def test_labels_of_batches(lightning: Any) -> None:
    from fastxkd.train.integrations.lightning import labels_of

    images, labels = torch.zeros(2, 3), torch.tensor([1, 0])
    for batch in ((images, labels), [images, labels, images], {"x": images, "label": labels}):
        assert labels_of(batch) is labels
    for batch in (images, (images,), {"x": images}, (images, "a")):
        assert labels_of(batch) is None


# --- Hugging Face

HF_LAYERS = {"last": ("resnet.encoder.stages.1", "resnet.encoder.stages.1")}


def hf_network(transformers: Any, seed: int, width: int = 4) -> Any:
    torch.manual_seed(seed)
    config = transformers.ResNetConfig(
        embedding_size=4,
        hidden_sizes=[width, 6],
        depths=[1, 1],
        layer_type="basic",
        num_labels=4,
    )
    return transformers.ResNetForImageClassification(config)


def hf_student(transformers: Any) -> Any:
    return hf_network(transformers, 1)


def hf_teacher(transformers: Any) -> Any:
    return hf_network(transformers, 2, 8).eval().requires_grad_(False)


def hf_loss(learner: Any, guide: Any, images: Tensor, labels: Tensor) -> Any:
    outputs = learner(pixel_values=images, labels=labels)
    with torch.no_grad():
        wanted = guide(pixel_values=images)
    return outputs.loss + F.mse_loss(outputs.logits.float(), wanted.logits.float())


def hf_callback(transformers: Any, guide: Any, **options: Any) -> Any:
    from fastxkd.train.integrations.transformers import ExplanationCallback

    return ExplanationCallback(guide, HF_LAYERS, **{**OPTIONS, **options})


def hf_trainer(
    transformers: Any,
    learner: Any,
    guide: Any,
    folder: Path,
    callbacks: tuple[Any, ...] = (),
    loss_of: Any = hf_loss,
    **options: Any,
) -> Any:
    class Distilling(transformers.Trainer):
        loss_is_scaled_for_ga = False

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any
        ) -> Any:
            loss = loss_of(model, guide, inputs["pixel_values"], inputs["labels"])
            return (loss, {"loss": loss}) if return_outputs else loss

    settings: dict[str, Any] = {
        "max_steps": BATCHES,
        "per_device_train_batch_size": BATCH,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "learning_rate": 0.1,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "max_grad_norm": 0.0,
        **options,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder / "out"), **settings)
    data = Images(mapping=True)
    return Distilling(
        learner, arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks)
    )


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize(("accumulate", "bf16"), [(1, False), (2, False), (1, True)])
def test_trainer_measures_what_a_plain_loop_does(
    transformers: Any, tmp_path: Path, attached: bool, accumulate: int, bf16: bool
) -> None:
    learner, guide = hf_student(transformers), hf_teacher(transformers)
    callback = hf_callback(transformers, guide)
    trainer = hf_trainer(
        transformers,
        learner,
        guide,
        tmp_path,
        () if attached else (callback,),
        max_steps=BATCHES // accumulate,
        gradient_accumulation_steps=accumulate,
        bf16=bf16,
    )
    if attached:
        assert callback.attach(trainer) is callback
    trainer.train()
    other = hf_student(transformers)
    expected = plain(
        other,
        guide,
        Images().batches(),
        accumulate=accumulate,
        autocast=None,
        layers=HF_LAYERS,
        loss_of=_student_in_bf16 if bf16 else hf_loss,
    )
    assert same_weights(learner, other)
    assert records(callback.monitor) == records(expected)
    assert [step for step, _ in records(expected)] == ([0, 2, 4] if accumulate == 1 else [0, 2])
    assert untouched(learner, guide)


def _student_in_bf16(learner: Any, guide: Any, images: Tensor, labels: Tensor) -> Any:
    """The student alone, as accelerate does it, which also gives float32 back."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = learner(pixel_values=images, labels=labels)
    with torch.no_grad():
        wanted = guide(pixel_values=images)
    return outputs.loss.float() + F.mse_loss(outputs.logits.float(), wanted.logits)


def test_trainer_weights_and_logs_are_those_without_the_callback(
    transformers: Any, tmp_path: Path
) -> None:
    guide = hf_teacher(transformers)
    runs = []
    for monitored in (True, False):
        learner = hf_student(transformers)
        trainer = hf_trainer(
            transformers,
            learner,
            guide,
            tmp_path,
            logging_steps=2,
            max_grad_norm=1.0,
            optim="adamw_torch",
            optim_args=None,
        )
        if monitored:
            callback = hf_callback(transformers, guide, every=1).attach(trainer)
        trainer.train()
        runs.append((learner, trainer.state.log_history))
    (mine, history), (alone, plain_history) = runs
    assert same_weights(mine, alone)
    ours = [entry for entry in history if "explanation/" in str(entry)]
    theirs = [entry for entry in history if entry not in ours]
    assert [{k: entry[k] for k in ("step", "loss") if k in entry} for entry in theirs] == [
        {k: entry[k] for k in ("step", "loss") if k in entry} for entry in plain_history
    ]
    # A step has number k while it is made, and k + 1 steps are done when it is logged.
    assert [(entry["step"] - 1) for entry in ours] == list(range(BATCHES))
    for entry, (_, values) in zip(ours, records(callback.monitor), strict=True):
        assert {f"explanation/{k}": v for k, v in values.items()}.items() <= entry.items()


@pytest.mark.parametrize("way", ["smoothing", "loss function", "taken out"])
def test_trainer_labels_that_never_reach_the_model(
    transformers: Any, tmp_path: Path, way: str
) -> None:
    """A classifier is trained and only watched beside its teacher, which runs in the loss."""
    guide = hf_teacher(transformers)
    seen: list[bool] = []  # whether the labels reached the student

    def loss_of(learner: Any, guide: Any, images: Tensor, labels: Tensor) -> Any:
        logits = learner(pixel_values=images).logits
        with torch.no_grad():
            wanted = guide(pixel_values=images).logits
        return F.cross_entropy(logits, labels) + F.mse_loss(logits, wanted)

    found = []
    for labelled in (True, False):
        learner = hf_student(transformers)
        if labelled:
            trainer = hf_trainer(transformers, learner, guide, tmp_path)
        elif way == "taken out":
            trainer = hf_trainer(transformers, learner, guide, tmp_path, loss_of=loss_of)
        else:
            trainer = _stock_trainer(transformers, learner, guide, tmp_path, way, seen)
        callback = hf_callback(transformers, guide, every=BATCHES).attach(trainer)
        trainer.train()
        found.append(records(callback.monitor))
    assert len(found[0]) == 1
    assert found[0] == found[1]
    assert not any(seen)
    assert len(seen) == (0 if way == "taken out" else BATCHES)


def _stock_trainer(
    transformers: Any, learner: Any, guide: Any, folder: Path, way: str, seen: list[bool]
) -> Any:
    """The trainer as it is; the teacher runs when the student has, from a hook of this test."""

    def run_teacher(_: Any, __: Any, named: Any, ___: Any) -> None:
        seen.append("labels" in named)
        with torch.no_grad():
            guide(pixel_values=named["pixel_values"])

    learner.register_forward_hook(run_teacher, with_kwargs=True)

    def loss_function(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs.logits, labels)

    smoothing = {"label_smoothing_factor": 0.1} if way == "smoothing" else {}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=BATCHES,
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **smoothing,
    )
    return transformers.Trainer(
        learner,
        arguments,
        train_dataset=Images(mapping=True),
        compute_loss_func=loss_function if way == "loss function" else None,
    )


def _saving(transformers: Any, folder: Path, steps: int, **options: Any) -> tuple[Any, Any, Any]:
    """A trainer that saves at step 3, its student and its attached callback."""
    learner, guide = hf_student(transformers), hf_teacher(transformers)
    trainer = hf_trainer(
        transformers,
        learner,
        guide,
        folder,
        max_steps=steps,
        save_strategy="steps",
        save_steps=3,
        **options,
    )
    return trainer, learner, hf_callback(transformers, guide).attach(trainer)


@pytest.mark.parametrize("moved", [False, True])
def test_trainer_checkpoints_hold_the_monitor(
    transformers: Any, tmp_path: Path, moved: bool
) -> None:
    trainer, uninterrupted, whole = _saving(transformers, tmp_path / "whole", BATCHES)
    trainer.train()
    trainer, _, first = _saving(transformers, tmp_path / "parts", 3)
    trainer.train()
    assert [step for step, _ in records(first.monitor)] == [0, 2]
    kept = tmp_path / "parts" / "out" / "checkpoint-3"
    folder, options = tmp_path / "parts", {}
    if moved:
        kept = Path(shutil.move(kept, tmp_path / "elsewhere"))
        folder, options = tmp_path / "new", {"resume_from_checkpoint": str(kept)}
    trainer, resumed, second = _saving(transformers, folder, BATCHES, **options)
    trainer.train(resume_from_checkpoint=str(kept))
    assert same_weights(resumed, uninterrupted)
    assert records(second.monitor) == records(whole.monitor)


@pytest.mark.parametrize("stale", [False, True])
def test_trainer_never_takes_up_another_runs_monitor(
    transformers: Any, tmp_path: Path, stale: bool
) -> None:
    trainer, _, _ = _saving(transformers, tmp_path, 3)
    trainer.train()
    kept = Path(shutil.move(tmp_path / "out" / "checkpoint-3", tmp_path / "elsewhere"))
    if stale:
        trainer, _, _ = _saving(transformers, tmp_path, 3, learning_rate=0.05)
        trainer.train()
        assert (tmp_path / "out" / "checkpoint-3" / "explanation_monitor.pt").is_file()
    trainer, _, callback = _saving(transformers, tmp_path, BATCHES)
    with pytest.warns(UserWarning, match="the monitor starts afresh"):
        trainer.train(resume_from_checkpoint=str(kept))
    assert [step for step, _ in records(callback.monitor)] == [4]


def test_trainer_evaluation_is_no_step(transformers: Any, tmp_path: Path) -> None:
    learner, guide = hf_student(transformers), hf_teacher(transformers)
    trainer = hf_trainer(
        transformers,
        learner,
        guide,
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        prediction_loss_only=True,
    )
    callback = hf_callback(transformers, guide).attach(trainer)
    trainer.train()
    expected = plain(
        hf_student(transformers),
        guide,
        Images().batches(),
        layers=HF_LAYERS,
        loss_of=hf_loss,
    )
    assert records(callback.monitor) == records(expected)
    logged = [entry["step"] for entry in trainer.state.log_history if "explanation" in str(entry)]
    assert logged == [1, 3, 5]  # each before the evaluation that its step brings
    losses = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == list(range(1, BATCHES + 1))


def test_trainer_a_callback_serves_one_trainer(transformers: Any, tmp_path: Path) -> None:
    guide = hf_teacher(transformers)
    trainer = hf_trainer(transformers, hf_student(transformers), guide, tmp_path)
    callback = hf_callback(transformers, guide).attach(trainer)
    with pytest.raises(ValueError, match="trainer: this callback is attached to one already"):
        callback.attach(trainer)


def test_trainer_compiled(transformers: Any, tmp_path: Path) -> None:
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    guide = hf_teacher(transformers)
    runs = []
    for monitored in (True, False):
        torch.compiler.reset()
        learner = hf_student(transformers)
        trainer = hf_trainer(transformers, learner, guide, tmp_path, **options)
        callback = hf_callback(transformers, guide)
        if monitored:
            callback.attach(trainer)
        trainer.train()
        runs.append((learner, callback))
    (learner, callback), (alone, _) = runs
    assert same_weights(learner, alone)
    expected = plain(
        hf_student(transformers), guide, Images().batches(), layers=HF_LAYERS, loss_of=hf_loss
    )
    assert records(callback.monitor) == records(expected)
    callback = hf_callback(transformers, guide)
    trainer = hf_trainer(transformers, learner, guide, tmp_path, (callback,), **options)
    with pytest.raises(ValueError, match="torch_compile: a callback is not shown the compiled"):
        trainer.train()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_trainer_vision_transformer(transformers: Any, tmp_path: Path, checkpointed: bool) -> None:
    """Tokens and dropout; activations that are made again in the backward pass."""

    def vit(seed: int) -> Any:
        torch.manual_seed(seed)
        config = transformers.ViTConfig(
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=12,
            patch_size=4,
            num_labels=4,
            hidden_dropout_prob=0.1,
        )
        return transformers.ViTForImageClassification(config)

    from fastxkd.train.integrations.transformers import ExplanationCallback

    guide = vit(2).eval().requires_grad_(False)
    runs = []
    for monitored in (True, False):
        learner = vit(1)
        options = {"activation_checkpointing": True} if checkpointed else {}
        trainer = hf_trainer(transformers, learner, guide, tmp_path, **options)
        callback = ExplanationCallback(guide, ["vit.layers.1.layernorm_before"], every=1, pool=16)
        if monitored:
            callback.attach(trainer)
        trainer.train()
        runs.append((learner, callback))
    (learner, callback), (alone, _) = runs
    assert same_weights(learner, alone)
    found = records(callback.monitor)
    assert [step for step, _ in found] == list(range(BATCHES))
    assert all(0 < v < 1 for _, values in found for k, v in values.items() if "agreement" in k)


# --- Two processes


def lightning_rank(folder: str) -> None:
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    import lightning.pytorch as pl

    rank = int(os.environ["RANK"])
    monitored, alone = lightning_module(pl, dropout=0), lightning_module(pl, dropout=0)
    callback = lightning_callback()
    options = {"devices": 2, "strategy": "ddp"}
    fit(pl, callback, Path(folder), monitored, **options)
    fit(pl, None, Path(folder), alone, **options)
    found: dict[str, Any] = {"records": records(callback.monitor)}
    found["same"] = same_weights(monitored, alone)
    if rank == 0:
        samplers = [DistributedSampler(Images(), 2, of) for of in range(2)]
        shares = [DataLoader(Images(), BATCH, sampler=sampler) for sampler in samplers]
        learner = student()
        monitor = twins(learner, teacher(), shares)
        found.update(expected=records(monitor), right=same_weights(learner, monitored.student))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def trainer_rank(folder: str) -> None:
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    import transformers

    rank = int(os.environ["RANK"])
    guide = hf_teacher(transformers)
    options = {"max_steps": BATCHES // 2, "ddp_backend": "gloo"}
    learners = [hf_student(transformers) for _ in range(3)]
    trainer = hf_trainer(transformers, learners[0], guide, Path(folder), **options)
    callback = hf_callback(transformers, guide).attach(trainer)
    trainer.train()
    hf_trainer(transformers, learners[1], guide, Path(folder), **options).train()
    found: dict[str, Any] = {"records": records(callback.monitor)}
    found["same"] = same_weights(learners[0], learners[1])
    if rank == 0:
        batches = Images().batches()
        monitor = twins(
            learners[2], guide, [batches[0::2], batches[1::2]], hf_loss, layers=HF_LAYERS
        )
        found.update(expected=records(monitor), right=same_weights(learners[0], learners[2]))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("trainer", ["lightning", "trainer"])
def test_two_processes(trainer: str, tmp_path: Path) -> None:
    """Rank 0 measures its share; the weights know nothing of it, in either process."""
    _import("lightning.pytorch" if trainer == "lightning" else "accelerate")
    first, second = processes(f"tests.test_integrations:{trainer}_rank", tmp_path)
    assert first["same"]
    assert second["same"]
    assert first["right"]
    assert first["records"] == first["expected"]
    assert [step for step, _ in first["records"]] == [0, 2]
    assert second["records"] == []
