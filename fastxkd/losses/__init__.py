"""Distillation losses."""

from fastxkd.losses.logits import KDLoss, KDLossParts, kd_loss

__all__ = ["KDLoss", "KDLossParts", "kd_loss"]
