"""Training loops around the losses, and a monitor for anybody's loop."""

from fastxkd.train._log import Record
from fastxkd.train._probe import Frame
from fastxkd.train.distiller import Distiller, Progress, TrainingDiverged, TrainSettings
from fastxkd.train.monitor import ExplanationMonitor
from fastxkd.train.sinks import CSVSink, JSONLSink, TensorBoardSink, WandbSink

__all__ = [
    "CSVSink",
    "Distiller",
    "ExplanationMonitor",
    "Frame",
    "JSONLSink",
    "Progress",
    "Record",
    "TensorBoardSink",
    "TrainSettings",
    "TrainingDiverged",
    "WandbSink",
]
