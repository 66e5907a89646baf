"""What a run leaves on disk, and how it never harms what lay there before."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import fastxkd
from fastxkd._extras import require
from fastxkd.runs.data import ImageData
from fastxkd.runs.report import write_report
from fastxkd.train.checkpoint import check_settings

if TYPE_CHECKING:
    from fastxkd.runs.comparison import Comparison

RUN_FILE = "run.json"
ROLES = ("teacher", "base", "student")
# Further models that some runs have, and the teacher's maps.
_MORE = ("kd.safetensors", "explanations")
_MADE_BY_A_RUN = (
    RUN_FILE,
    "metrics.json",
    "report.html",
    "checkpoints",
    *(f"{role}.safetensors" for role in ROLES),
    *_MORE,
)


def checkpoint_file(out: Path, role: str) -> Path:
    return out / "checkpoints" / f"{role}.pt"


def claim_folder(out: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
    """Make sure ``out`` is empty, or a run with the same settings; then leave the mark of one.

    Raises:
        ValueError: it holds something else, or a run with other settings (named).
    """
    mark = out / RUN_FILE
    if mark.is_file():
        try:
            stored = json.loads(mark.read_text("utf-8"))["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"out: {mark} is damaged ({error}); choose another folder") from error
        if resume:
            check_settings(stored, settings, f"the run in {out}")
    refuse_strangers(out, _MADE_BY_A_RUN if mark.is_file() else ())
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        for checkpoint in (out / "checkpoints").glob("*.pt"):
            checkpoint.unlink(missing_ok=True)
        for file in ("maps.jsonl", "maps.npy"):
            (out / "explanations" / file).unlink(missing_ok=True)
    _write_text(mark, json.dumps({"fastxkd": fastxkd.__version__, "settings": settings}, indent=2))


def refuse_strangers(out: Path, ours: Sequence[str] = ()) -> None:
    """Raise if ``out`` holds anything but ``ours`` and unfinished files."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, expected a folder")
    strangers = sorted(
        entry.name
        for entry in (out.iterdir() if out.is_dir() else ())
        if entry.name not in ours and not entry.name.endswith(".tmp")
    )
    if strangers:
        more = ", ..." if len(strangers) > 3 else ""
        raise ValueError(
            f"out: {out} is not empty and not a run to continue (it holds "
            f"{', '.join(strangers[:3])}{more}); nothing was overwritten, choose another folder"
        )


def save_weights(
    models: Mapping[str, nn.Module],
    out: Path,
    recipes: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """``ROLE.safetensors`` of each; a recipe says in the file how the model is built again."""
    save = require("safetensors.torch", extra="cli").save
    for role, model in models.items():
        # Clones: safetensors refuses tensors that share memory, as tied weights do.
        state = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in model.state_dict().items()
        }
        unfinished = out / f".{role}.safetensors.tmp"
        built = (recipes or {}).get(role)
        metadata = None if built is None else {"fastxkd": json.dumps(built)}
        unfinished.write_bytes(save(state, metadata=metadata))
        unfinished.replace(out / f"{role}.safetensors")


def _write_text(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text, "utf-8")
    unfinished.replace(path)


def write_results(comparison: Comparison, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    _write_text(out / "metrics.json", json.dumps(comparison.to_json(), indent=2) + "\n")
    write_report(comparison, out / "report.html")


def run_facts(
    data: ImageData,
    device: torch.device,
    seed: int,
    elapsed: dict[str, float],
    more: Mapping[str, Any],
) -> dict[str, Any]:
    on_gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    program = Path(sys.argv[0]).name
    return {
        "command": ["fastxkd" if program == "__main__.py" else program, *sys.argv[1:]],
        "versions": {
            "fastxkd": fastxkd.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "seed": seed,
        "device": str(device) if on_gpu is None else f"{device} ({on_gpu})",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "backends": [row._asdict() for row in fastxkd.backends()],
        "data": {
            "spec": data.spec,
            "notice": data.notice,
            "classes": len(data.classes),
            "image_size": data.image_size,
            "normalisation": f"(x / 255 - {_listed(data.mean)}) / {_listed(data.std)}",
        },
        "elapsed": elapsed,
        "skipped": [{"path": path, "error": why} for path, why in sorted(data.skipped.items())],
        **more,
    }


def _listed(values: Sequence[float]) -> str:
    distinct = values[:1] if len(set(values)) == 1 else values
    return ", ".join(f"{value:.4g}" for value in distinct)
