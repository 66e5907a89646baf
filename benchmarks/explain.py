"""A run over a data set against reading it and a bare forward pass, on the same images and with as
many processes that load them; and whether its memory grows with the number of images.

The floor is what everybody would write: a DataLoader of the decoded images, normalisation, the
model without a graph. Ours does that, Grad-CAM, and puts maps, scores, checksums and a report on
the disk. Starting up is part of it: what is looked at before work begins, the page at the end.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._harness import Case, Skip, Spec, main
from benchmarks._machine import ROOT
from benchmarks.cam import _imported
from fastxkd.runs import reader
from fastxkd.runs.cnn import builtin_model
from fastxkd.runs.data import FASHION_MNIST_DIRECTORY
from fastxkd.runs.explain import explain
from fastxkd.runs.sources import Sample, Source, open_source

TESTS = ["tests/test_explain.py"]
BATCH, CHUNK = 32, 256
_folders: list[tempfile.TemporaryDirectory[str]] = []  # gone when the process ends


def photographs(count: int, side: int = 320) -> Path:
    """A folder of JPEG files with the detail of photographs: noise on all scales."""
    pillow: Any = _imported("PIL.Image", "Pillow")
    folder = Path(_temporary(), "images")
    random = np.random.RandomState(0)
    for number in range(count):
        picture = np.zeros((side, side, 3), np.float32)
        for scale in (4, 16, 64, side):
            coarse = random.randint(0, 256, (scale, scale, 3)).astype(np.uint8)
            grown = pillow.fromarray(coarse).resize((side, side), pillow.Resampling.BICUBIC)
            picture += np.asarray(grown, np.float32) / 4
        where = folder / f"{number % 10}"
        where.mkdir(parents=True, exist_ok=True)
        pillow.fromarray(picture.astype(np.uint8)).save(where / f"{number:05d}.jpg", quality=90)
    return folder


def _temporary() -> str:
    _folders.append(tempfile.TemporaryDirectory(prefix="fastxkd-bench-"))
    return _folders[-1].name


def resnet18() -> nn.Module:
    models: Any = _imported("torchvision.models", "torchvision")
    torch.manual_seed(0)
    model: nn.Module = models.resnet18(weights=None).eval()
    return model


def _stacked(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    labels = [-1 if sample.label is None else sample.label for sample in samples]
    return torch.stack([sample.image for sample in samples]), torch.tensor(labels)


def bare(model: nn.Module, source: Source, workers: int) -> None:
    """What there is without explanations: read, normalise, forward."""
    loader = torch.utils.data.DataLoader(
        source, batch_size=BATCH, num_workers=workers, collate_fn=_stacked
    )
    with torch.no_grad():
        for images, _ in loader:
            model(source.normalize(images)).argmax(1)


def run(model: nn.Module, source: Source, workers: int, **options: Any) -> Path:
    out = Path(_temporary(), "run")
    explain(
        model, source, out, batch_size=BATCH, chunk=CHUNK, workers=workers, device="cpu",
        gallery=0, **options,
    )  # fmt: skip
    return out


def whole(make: Callable[[], nn.Module], open_data: Callable[[], Source], workers: int) -> Case:
    model, source = make(), open_data()

    def ours(**options: Any) -> None:
        shutil.rmtree(run(model, source, workers, **options))

    def notes() -> dict[str, str]:
        out = run(model, source, workers)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        found = reader.open(out)
        each = size / len(found)
        shutil.rmtree(out)
        return {"ours": f"{len(source):,} images, {each:,.0f} bytes each on the disk"}

    return Case(
        {
            "floor: DataLoader + forward": lambda: bare(model, source, workers),
            "ours, maps of input size": lambda: ours(size="input"),
            "ours": ours,
        },
        notes=notes,
    )


def folder(count: int, size: int) -> Source:
    return open_source(f"imagefolder:{photographs(count)}", image_size=size)


def fashion(count: int) -> Source:
    if not FASHION_MNIST_DIRECTORY.is_dir():
        raise Skip("needs Fashion-MNIST: apt-get install dataset-fashion-mnist")
    return open_source(torch.utils.data.Subset(open_source("fashion-mnist#train"), range(count)))


def small() -> nn.Module:
    torch.manual_seed(0)
    return builtin_model("cnn-small", num_classes=10, in_channels=1).eval()


PEAK = """
import resource, sys
from benchmarks.explain import fashion, run, small
run(small(), fashion(int(sys.argv[1])), 0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
"""


def peak(count: int) -> int:
    """Bytes of resident memory that a process needs at most that explains so many images."""
    command = [sys.executable, "-c", PEAK, str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def growing(few: int, many: int) -> Case:
    case = whole(small, partial(fashion, few), 0)

    def notes() -> dict[str, str]:
        low, high = peak(few), peak(many)
        text = (
            f"peak resident memory {low / 1e6:.0f} MB for {few:,} images,"
            f" {high / 1e6:.0f} MB for {many:,}: {high / low:.3f}x"
        )
        return {"ours": text}

    return Case(case.variants, notes=notes)


def specs(quick: bool) -> list[Spec]:
    if quick:
        return [
            Spec(
                "ResNet-18, 96 px, 64 files", partial(whole, resnet18, partial(folder, 64, 96), 0)
            ),
            Spec("cnn-small, Fashion-MNIST, 500", partial(growing, 500, 2000)),
        ]
    found = [
        Spec(
            f"ResNet-18, 224 px, 512 files, {workers} workers",
            partial(whole, resnet18, partial(folder, 512, 224), workers),
            rounds=5,
        )
        for workers in (0, 2)
    ]
    return [*found, Spec("cnn-small, Fashion-MNIST, 5,000", partial(growing, 5000, 50_000))]


if __name__ == "__main__":
    main("explain", specs, TESTS, __doc__)
