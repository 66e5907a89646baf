"""Small trainings with and without a monitor, in plain torch: what trainers are held to."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastxkd.train.monitor import ExplanationMonitor
from tests._torchvision import declare_operators

declare_operators()

LAYERS = {"last": ("2", "3")}
OPTIONS: dict[str, Any] = {"every": 2, "pool": 16}
BATCH, BATCHES = 8, 6
ROOT = Path(__file__).parents[1]


class Images(Dataset[Any]):
    """The same noise every time; pairs, or the mappings that transformers wants."""

    def __init__(self, *, mapping: bool = False) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(BATCH * BATCHES, 3, 12, 12, generator=generator)
        self.labels = torch.randint(0, 4, (BATCH * BATCHES,), generator=generator)
        self.mapping = mapping

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        image, label = self.images[index], self.labels[index]
        return {"pixel_values": image, "labels": int(label)} if self.mapping else (image, label)

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.images.split(BATCH), self.labels.split(BATCH), strict=True))


def network(seed: int, *, deeper: bool = False, dropout: float = 0.0, norm: bool = True) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        *([nn.Conv2d(6, 6, 3, padding=1)] if deeper else []),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 4),
    )
    return model


def student(**options: Any) -> Any:
    return network(1, **options)


def teacher() -> Any:
    return network(2, deeper=True).eval().requires_grad_(False)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def distil(learner: nn.Module, guide: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The loss of a step; the teacher runs after the student, as it mostly does."""
    logits = learner(images)
    with torch.no_grad():
        wanted = guide(images)
    return F.cross_entropy(logits.float(), labels) + F.mse_loss(logits.float(), wanted.float())


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return list(mine) == list(other) and all(torch.equal(mine[k], other[k]) for k in mine)


def untouched(*models: nn.Module) -> bool:
    """Whether no hook is left on any layer."""
    return not any(
        m._forward_hooks or m._forward_pre_hooks for model in models for m in model.modules()
    )


def records(monitor: ExplanationMonitor | None) -> list[tuple[int, dict[str, float]]]:
    assert monitor is not None
    return [(record.step, dict(record.values)) for record in monitor.history]


def twins(
    learner: nn.Module,
    guide: nn.Module,
    shares: Sequence[Iterable[tuple[Tensor, Tensor]]],
    loss_of: Callable[..., Tensor] = distil,
    *,
    layers: Any = LAYERS,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = optimizer_of,
    options: dict[str, Any] | None = None,
) -> ExplanationMonitor:
    """Data-parallel training without processes: every rank's student in turn, gradients averaged.

    Returns:
        The monitor of rank 0, whose student is ``learner``.
    """
    ranks = [learner, *(copy.deepcopy(learner) for _ in shares[1:])]
    optimizers = [optimizer(model) for model in ranks]
    monitor = ExplanationMonitor(learner, guide, layers, **(options or OPTIONS))
    for step, batches in enumerate(zip(*shares, strict=True)):
        monitor.begin_step(step, labels=batches[0][1])
        for rank, (model, batch) in enumerate(zip(ranks, batches, strict=True)):
            loss = loss_of(model, guide, *batch)
            if rank == 0:
                monitor.end_step()
            loss.backward()
        for parameters in zip(*(model.parameters() for model in ranks), strict=True):
            mean = sum(p.grad / len(ranks) for p in parameters)
            for p in parameters:
                p.grad = mean.clone()
        for each in optimizers:
            each.step()
            each.zero_grad()
    monitor.close()
    return monitor


def plain(
    learner: nn.Module,
    guide: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    monitored: bool = True,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    layers: Any = LAYERS,
    loss_of: Callable[..., Tensor] = distil,
    options: dict[str, Any] | None = None,
) -> ExplanationMonitor | None:
    """A plain loop over ``batches``, ``accumulate`` of them a step; the monitor, closed."""
    optimizer = optimizer_of(learner)
    monitor = (
        ExplanationMonitor(learner, guide, layers, **(options or OPTIONS)) if monitored else None
    )
    for index, (images, labels) in enumerate(batches):
        if monitor is not None:
            monitor.begin_step(index // accumulate, labels=labels)
        with nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
            loss = loss_of(learner, guide, images, labels) / accumulate
        if monitor is not None:
            monitor.end_step()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if (index + 1) % accumulate == 0:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
    if monitor is not None:
        monitor.close()
    return monitor


def processes(target: str, folder: Path, ranks: int = 2) -> list[dict[str, Any]]:
    """Run ``module:function(folder)`` as ranks of one job, each a fresh process with one thread.

    Returns:
        What each saved as ``{rank}.pt`` in ``folder``.
    """
    module, function = target.split(":")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
        }
        code = f"import sys; from {module} import {function}; {function}(sys.argv[1])"
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", code, str(folder)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    for rank, process in enumerate(running):
        assert process.returncode == 0, f"rank {rank}:\n{said[rank]}"
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
