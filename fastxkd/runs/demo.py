"""The plan of ``fastxkd demo``: settings fixed once, results as they come."""

from __future__ import annotations

from pathlib import Path

from fastxkd.runs.distill import DistillPlan
from fastxkd.train.distiller import TrainSettings


def demo_plan(out: Path, *, device: str = "auto", resume: bool = True) -> DistillPlan:
    return DistillPlan(
        teacher="cnn-large",
        student="cnn-small",
        data="builtin",
        out=out,
        settings=TrainSettings(epochs=24, batch_size=32, lr=0.05, seed=0),
        teacher_epochs=20,
        device=device,
        resume=resume,
        title="A small network learns from a large one: Fashion-MNIST",
    )
