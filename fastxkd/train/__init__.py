"""Training loops around the losses, and a monitor for anybody's loop."""

from fastxkd.train._log import Record
from fastxkd.train._probe import Frame
from fastxkd.train.autoencoder import ExplanationAutoencoder, explanation_loss
from fastxkd.train.distiller import Distiller, Progress, TrainingDiverged, TrainSettings
from fastxkd.train.fusion import ExplainedStudent
from fastxkd.train.kdexplainer import KDExplainer
from fastxkd.train.kdexplainer_distiller import (
    KDExplained,
    KDExplainerDistiller,
    TreeDistiller,
    train_kdexplainer,
)
from fastxkd.train.medtex import MedTEXDistiller
from fastxkd.train.monitor import ExplanationMonitor
from fastxkd.train.routing_tree import RoutingTree
from fastxkd.train.sinks import CSVSink, JSONLSink, TensorBoardSink, WandbSink
from fastxkd.train.teacher_maps import TeacherExplanations
from fastxkd.train.virtual_attention import VirtualAttention, VirtualAttentionDistiller
from fastxkd.train.xdistillation import PhiTrainer, XDistiller

__all__ = [
    "CSVSink",
    "Distiller",
    "ExplainedStudent",
    "ExplanationAutoencoder",
    "ExplanationMonitor",
    "Frame",
    "JSONLSink",
    "KDExplained",
    "KDExplainer",
    "KDExplainerDistiller",
    "MedTEXDistiller",
    "PhiTrainer",
    "Progress",
    "Record",
    "RoutingTree",
    "TeacherExplanations",
    "TensorBoardSink",
    "TrainSettings",
    "TrainingDiverged",
    "TreeDistiller",
    "VirtualAttention",
    "VirtualAttentionDistiller",
    "WandbSink",
    "XDistiller",
    "explanation_loss",
    "train_kdexplainer",
]
