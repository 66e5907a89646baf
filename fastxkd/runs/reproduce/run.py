"""From the name of a study to a table of claims."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

import fastxkd
from fastxkd._extras import require
from fastxkd.pages.numbers import seconds as duration
from fastxkd.runs.data import ImageData, fashion_mnist_folder, load_data
from fastxkd.runs.distill import pick_device
from fastxkd.runs.reproduce import fashion, interpretability, unicam, xdistillation
from fastxkd.runs.reproduce.claims import Claim
from fastxkd.runs.reproduce.ledger import Ledger
from fastxkd.runs.reproduce.page import write_page
from fastxkd.runs.reproduce.table import Outcome, to_json, to_markdown
from fastxkd.runs.reproduce.tasks import Context, Task, work_through
from fastxkd.runs.reproduce.watch import Watch

STUDIES = ("unicam", "interpretability", "xdistillation")
FULL_SET = "fashion-mnist"
QUICK_SEEDS, FULL_SEEDS = 3, 5


class Study(Protocol):
    """Work for any seed, and claims from what was measured."""

    name: str
    notice: str

    def tasks(self, seed: int) -> Sequence[Task]:
        """In an order in which everything needed comes before."""

    def claims(self, seeds: Sequence[Mapping[str, Mapping[str, float]]]) -> list[Claim]:
        """From the measurements of each seed, by the last part of their keys."""


def reproduce(
    study: str,
    out: str | Path,
    *,
    quick: bool = False,
    seeds: int | None = None,
    data: str | None = None,
    stamps: str | Path | None = None,
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> Outcome:
    """Train, measure and judge what the papers claim.

    Whatever ends the process, the same call goes on after the last trained model or measurement,
    and within a training after its last checkpoint; ``claims.json`` is then the same as that of a
    run that nobody disturbed. More seeds, or another study, may be asked for later in the same
    folder.

    Args:
        study: ``"unicam"``, ``"interpretability"``, ``"xdistillation"`` or ``"all"``.
        out: folder for models, measurements, ``claims.json``, ``claims.md`` and ``report.html``.
        quick: smaller parts of the data, fewer epochs.
        seeds: how many, from 0 on; default 3 for quick, else 5. One seed decides nothing.
        data: ``"fashion-mnist[:ROOT]"`` or ``"builtin"``, the small subset of the package; by
            default the full set, and with ``quick`` the subset where the full set is missing.
        stamps: folder of the picture stamps of the concept study; default: where Debian has them.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
        say: takes lines about the progress.

    Raises:
        ValueError: an unknown study, data that is not there, a folder that holds something else.
        ImportError: a package is missing; says so before any work.
    """
    names = _names(study)
    count = (QUICK_SEEDS if quick else FULL_SEEDS) if seeds is None else seeds
    if count < 1:
        raise ValueError(f"seeds: expected at least 1, got {count}")
    for module in ("safetensors", "jinja2"):
        require(module, extra="cli")
    where = pick_device(device)
    pictures_alone = names == ["interpretability"]
    if pictures_alone and not quick:
        data = data or FULL_SET
    spec, remark = choose_data(data, quick)
    # Pictures alone need no other data; the folder is marked with what another study would take.
    images, remark = (None, "") if pictures_alone else (load_data(spec), remark)
    if remark:
        say(remark)
    settings = {"quick": quick, "data": spec}
    chosen = [_study(name, images, quick, stamps) for name in names]
    return run_studies(
        chosen, Path(out), range(count), settings=settings, device=where, remark=remark, say=say
    )


def _names(study: str) -> list[str]:
    if study == "all":
        return list(STUDIES)
    if study not in STUDIES:
        raise ValueError(f"study: expected {', '.join(STUDIES)} or all, got {study!r}")
    return [study]


def choose_data(data: str | None, quick: bool) -> tuple[str, str]:
    """What the students of Fashion-MNIST train on, and a remark where it is not the full set.

    Raises:
        ValueError: the full set is missing and nobody agreed to less.
    """
    if data is not None:
        small = data == "builtin"
        return data, "data: the built-in subset, as asked for, not the full set" if small else ""
    folder = fashion_mnist_folder("")
    found = any((folder / f"train-images-idx3-ubyte{end}").is_file() for end in (".gz", ""))
    if found:
        return FULL_SET, ""
    if not quick:
        raise ValueError(
            f"data: the full Fashion-MNIST is not in {folder}; apt-get install "
            "dataset-fashion-mnist, point $FASTXKD_FASHION_MNIST at it, or agree to the built-in "
            "subset with --data builtin"
        )
    return "builtin", f"data: the built-in subset, because the full set is not in {folder}"


def _study(name: str, data: ImageData | None, quick: bool, stamps: str | Path | None) -> Study:
    if name == "unicam":
        assert data is not None
        return unicam.UnicamStudy(data, fashion.QUICK if quick else fashion.FULL)
    if name == "xdistillation":
        assert data is not None
        sizes = xdistillation.QUICK, xdistillation.FULL
        return xdistillation.XDistillationStudy(data, sizes[not quick])
    place = None if stamps is None else Path(stamps)
    sizes_of = interpretability.QUICK, interpretability.FULL
    return interpretability.InterpretabilityStudy(sizes_of[not quick], stamps=place)


def run_studies(
    studies: Sequence[Study],
    out: Path,
    seeds: Sequence[int],
    *,
    settings: Mapping[str, Any],
    device: torch.device,
    remark: str = "",
    say: Callable[[str], None] = print,
) -> Outcome:
    """Do the work of studies and write down what came of it."""
    began = time.monotonic()
    # Nothing else makes a resumed run on a GPU end with the same bits.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    with Ledger(out, settings) as ledger:
        context = Context(device, Watch(say), ledger)
        # Seed by seed: whoever stops early has whole seeds.
        found = [task for seed in seeds for study in studies for task in study.tasks(seed)]
        # Studies share models.
        tasks = list({task.key: task for task in found}.values())
        measured = work_through(tasks, context)
        claims = [claim for study in studies for claim in _judged(study, seeds, measured)]
        worked = sum(sum(times) for times in ledger.seconds().values())
        outcome = Outcome(
            claims,
            {
                **settings,
                "seeds": list(seeds),
                "studies": [study.name for study in studies],
                "notices": list(dict.fromkeys(study.notice for study in studies)),
                "remark": remark,
            },
            {
                "command": ["fastxkd", *sys.argv[1:]],
                "versions": {
                    "fastxkd": fastxkd.__version__,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                    "system": f"{platform.system()} {platform.machine()}",
                },
                "device": str(device),
                "threads": torch.get_num_threads(),
                "work": duration(worked),
                "this start": duration(time.monotonic() - began),
            },
        )
        ledger.write("claims.json", to_json(outcome))
        ledger.write("claims.md", to_markdown(outcome))
        write_page(outcome, out / "report.html")
    return outcome


def _judged(
    study: Study, seeds: Sequence[int], measured: Mapping[str, Mapping[str, float]]
) -> list[Claim]:
    found = []
    for seed in seeds:
        prefix = f"{study.name}/{seed}/"
        found.append(
            {
                key.removeprefix(prefix): values
                for key, values in measured.items()
                if key.startswith(prefix)
            }
        )
    return study.claims(found)
