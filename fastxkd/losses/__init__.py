"""Distillation losses: a function and a module each."""

from fastxkd.losses.dist import DISTLoss, dist_loss
from fastxkd.losses.explanations import (
    CATKDLoss,
    E2KDLoss,
    catkd_loss,
    class_activations,
    e2kd_loss,
)
from fastxkd.losses.features import (
    ATLoss,
    FitNetLoss,
    ReviewKDLoss,
    VIDLoss,
    at_loss,
    fitnet_loss,
    hcl_loss,
    vid_loss,
)
from fastxkd.losses.inputs import KDIGALoss, MixKDLoss, kdiga_loss, mixkd_loss
from fastxkd.losses.linear import LinearKDLoss, linear_kd_loss
from fastxkd.losses.logits import DKDLoss, KDLoss, KDLossParts, dkd_loss, kd_loss
from fastxkd.losses.relations import (
    CCLoss,
    CKDLoss,
    DCLoss,
    PKTLoss,
    RKDLoss,
    SPLoss,
    cc_loss,
    ckd_loss,
    dc_loss,
    pkt_loss,
    rkd_loss,
    sp_loss,
)

__all__ = [
    "ATLoss",
    "CATKDLoss",
    "CCLoss",
    "CKDLoss",
    "DCLoss",
    "DISTLoss",
    "DKDLoss",
    "E2KDLoss",
    "FitNetLoss",
    "KDIGALoss",
    "KDLoss",
    "KDLossParts",
    "LinearKDLoss",
    "MixKDLoss",
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
