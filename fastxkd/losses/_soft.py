"""The soft part alone, for losses that have it as a term."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fastxkd.losses.logits import kd_loss


def soft_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, weight: float = 1.0
) -> Tensor:
    """``weight * T^2 * KL(teacher || student)``, in the wider of the two dtypes."""
    wide = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    loss = kd_loss(
        student_logits.to(wide),
        teacher_logits.to(wide),
        temperature=temperature,
        ce_weight=0.0,
        kd_weight=weight,
    )
    return cast(Tensor, loss)  # no parts were asked for
