"""The section of the report about faithfulness, ready for its template."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastxkd.cam import render
from fastxkd.pages.images import fit, shrink
from fastxkd.pages.numbers import number
from fastxkd.runs.fidelity import Difference, Fidelity, FidelityItem

ROLES = {
    "teacher": "Teacher",
    "phi": "phi",
    "base": "Base",
    "kd": "Plain distillation",
    "student": "Student",
}
_TOLD = {
    "concat": "Beside the image the student sees what phi, a small autoencoder, draws of it: the"
    " teacher’s explanation.",
    "gate": "The student sees the image brighter where phi, a small autoencoder, draws the"
    " teacher’s explanation.",
    "attend": "The student’s last layer counts for more where phi, a small autoencoder, draws the"
    " teacher’s explanation.",
    "feature": "Beside the student’s own features stand those of phi, a small autoencoder that"
    " draws the teacher’s explanation.",
    "mask": "The student sees the image only through the mask that phi, a small autoencoder, lays"
    " over it.",
}
_MATCHED = "The student’s own maps were trained to be the teacher’s."
COLUMNS = (
    ("accuracy", "accuracy", "percent"),
    ("agreement", "agreement", "percent"),
    ("divergence", "KL", "number"),
    ("cosine", "cosine", "number"),
    ("pearson", "Pearson", "number"),
    ("ssim", "SSIM", "number"),
    ("top_10", "top 10 %", "number"),
    ("top_20", "top 20 %", "number"),
    ("deletion", "deletion", "number"),
    ("insertion", "insertion", "number"),
)


def section(found: Fidelity) -> dict[str, Any]:
    """What ``fidelity.html.j2`` shows."""
    order = ("base", "kd", "student", "phi")
    rows = sorted(found.rows, key=lambda row: order.index(row.role))
    explainers = list(dict.fromkeys(row.explainer for row in rows))
    return {
        "intro": " ".join(
            [*filter(None, [_TOLD.get(found.fusion)]), *([_MATCHED] if found.matched else [])]
        ),
        "images": found.images,
        "several": len(explainers) > 1,
        "roles": ROLES,
        "columns": COLUMNS,
        "rows": rows,
        "sentences": [_sentence(difference) for difference in found.differences],
        "items": [_item(index, item) for index, item in enumerate(found.gallery, start=1)],
    }


def _sentence(difference: Difference) -> str:
    other = {"base": "the base’s", "kd": "plain distillation’s"}[difference.against]
    value, low, high = (
        number(x, 3, sign=True) for x in (difference.value, difference.low, difference.high)
    )
    if difference.low > 0:
        verdict = f"closer to the teacher’s than {other}"
    elif difference.high < 0:
        verdict = f"further from the teacher’s than {other}"
    else:
        verdict = f"no closer to the teacher’s than {other}, nor further, as far as this shows"
    return (
        f"{difference.explainer}: the student’s maps are {verdict}: cosine {value}"
        f" (95 % interval over these images: {low} to {high})."
    )


def _item(index: int, item: FidelityItem) -> dict[str, Any]:
    image = render.to_picture(np.asarray(item.image))
    height, width = image.shape[:2]
    panels = []
    for role in ROLES:
        for (owner, explainer), heat in item.maps.items():
            if owner != role:
                continue
            known = np.isfinite(heat).any()
            panels.append(
                {
                    "role": role,
                    "title": ROLES[role],
                    "explainer": explainer,
                    "cosine": item.cosine.get((role, explainer)),
                    "heat": render.data_uri(render.heat_png(fit(heat, height, width)))
                    if known
                    else None,
                    "alt": f"{explainer} of {ROLES[role]}, image {index}",
                }
            )
    return {
        "index": index,
        "label": item.label,
        "image": render.data_uri(render.png(shrink(image))),
        "small": max(height, width) <= 64,
        "panels": panels,
    }
