"""Training loops around the losses."""

from fastxkd.train.distiller import Distiller, Progress, TrainingDiverged, TrainSettings

__all__ = ["Distiller", "Progress", "TrainSettings", "TrainingDiverged"]
