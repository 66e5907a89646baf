"""Distillation losses: a function and a module each."""

from fastxkd.losses.comparative import CKDLoss, ckd_loss
from fastxkd.losses.dist import DISTLoss, dist_loss
from fastxkd.losses.explanations import (
    CATKDLoss,
    CATKDOutput,
    E2KDLoss,
    E2KDOutput,
    catkd_loss,
    class_activations,
    e2kd_loss,
)
from fastxkd.losses.features import (
    ATLoss,
    FitNetLoss,
    VIDLoss,
    at_loss,
    fitnet_loss,
    vid_loss,
)
from fastxkd.losses.inputs import (
    KDIGALoss,
    KDIGAParts,
    MixKDLoss,
    MixKDParts,
    kdiga_loss,
    mixkd_loss,
)
from fastxkd.losses.linear import LinearKDLoss, linear_kd_loss
from fastxkd.losses.logits import DKDLoss, KDLoss, KDLossParts, dkd_loss, kd_loss
from fastxkd.losses.relations import DCLoss, RKDLoss, dc_loss, rkd_loss
from fastxkd.losses.review import ReviewKDLoss, hcl_loss
from fastxkd.losses.similarity import CCLoss, PKTLoss, SPLoss, cc_loss, pkt_loss, sp_loss

__all__ = [
    "ATLoss",
    "CATKDLoss",
    "CATKDOutput",
    "CCLoss",
    "CKDLoss",
    "DCLoss",
    "DISTLoss",
    "DKDLoss",
    "E2KDLoss",
    "E2KDOutput",
    "FitNetLoss",
    "KDIGALoss",
    "KDIGAParts",
    "KDLoss",
    "KDLossParts",
    "LinearKDLoss",
    "MixKDLoss",
    "MixKDParts",
    "PKTLoss",
    "RKDLoss",
    "ReviewKDLoss",
    "SPLoss",
    "VIDLoss",
    "at_loss",
    "catkd_loss",
    "cc_loss",
    "ckd_loss",
    "class_activations",
    "dc_loss",
    "dist_loss",
    "dkd_loss",
    "e2kd_loss",
    "fitnet_loss",
    "hcl_loss",
    "kd_loss",
    "kdiga_loss",
    "linear_kd_loss",
    "mixkd_loss",
    "pkt_loss",
    "rkd_loss",
    "sp_loss",
    "vid_loss",
]
