"""Explanations of a whole data set, as a run directory: what is computed when, and by whom.

    source -> batches (loading.py) -> maps and scores (work.py) -> chunks on the disk (chunks.py)

Chunks are ranges of images and batches lie within chunks, so every byte of a chunk follows from the
settings and the data: not from the number of ranks (ranks.py), who was first, or restarts.
"""

from __future__ import annotations

import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastxkd._extras import require
from fastxkd.cam.maps import Normalize
from fastxkd.runs import asked
from fastxkd.runs.asked import Dtype
from fastxkd.runs.background import Background
from fastxkd.runs.chunks import Array, RunWriter, Summary
from fastxkd.runs.loading import Images, Loaded, load, ranges, readable
from fastxkd.runs.methods import Methods, Size, check_methods
from fastxkd.runs.ranks import Ranks, meet
from fastxkd.runs.sources import PIXEL_LIMIT, Source, open_source
from fastxkd.runs.work import Answer, Chunk, Targets, Work, columns_of
from fastxkd.train.distiller import fingerprint

Progress = Callable[[int, int, int], None]  # images done, of, failed


def explain(
    model: nn.Module | str,
    data: Any,
    out: str | os.PathLike[str],
    *,
    methods: Sequence[str] | str = ("gradcam",),
    layers: Sequence[str] | str | None = None,
    targets: Targets = "predicted",
    size: Size = None,
    dtype: Dtype = "float16",
    normalize: Normalize = "minmax",
    base: nn.Module | str | None = None,
    base_layers: Sequence[str] | str | None = None,
    class_embeddings: Tensor | str | os.PathLike[str] | None = None,
    reference: int = 128,
    weights: str | os.PathLike[str] | None = None,
    base_weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    channels: int | None = None,
    max_pixels: int = PIXEL_LIMIT,
    follow_links: bool = False,
    chunk: int = 256,
    batch_size: int = 32,
    workers: int = 0,
    device: str = "auto",
    gallery: int = 12,
    progress: Progress | None = None,
) -> Summary:
    """Explain every image of a data set; leave maps, scores and a report in a directory.

    The same call after an interruption of any kind goes on where it stopped, and ends with the
    same bytes. Under ``torchrun`` the ranks share the work, with the same bytes again (as long as
    they compute on as many threads: kernels may round differently on more). An image that cannot
    be read, or whose map is not finite, is recorded, and the run goes on.

    Args:
        model: a module, which is moved to ``device``, or the name of one, see
            :func:`fastxkd.runs.models.load_model`. It answers with logits ``[n, classes]``, or with
            something that has them as ``.logits``, ``["logits"]`` or first.
        data: a data set by name or a map-style ``Dataset``, see
            :func:`fastxkd.runs.sources.open_source`.
        out: a new folder for the results, or a run with these settings to continue.
        methods: out of ``fastxkd.runs.methods.METHODS``. Those that weight activations with one
            and the same gradient share a pass: all of them cost little more than one.
        layers: by name, each with maps of its own; None: the last one with positions.
        targets: the class that is explained: the ``"predicted"`` one, the image's ``"label"``, or
            a class index.
        size: of the maps: None, the layer's; ``"input"``; or (height, width).
        dtype: what maps are stored as: ``"float16"``, ``"float32"``, or ``"uint8"``, [0, 1] in
            255 steps.
        normalize: ``"minmax"``, or None: magnitudes, which only float32 can hold.
        base, base_layers: of ``unicam``: the model that is taken out, and its layers in the order
            of ``layers`` (None: the same names, or its own last one).
        class_embeddings: of ``unicam``: what classes stand for, a tensor ``[classes, e]``, or a
            ``.npy`` or ``.safetensors`` file that holds one; None: one-hot vectors.
        reference: of ``unicam``: size of the set that every image is explained against, chosen
            from places all over the data, of as many classes as are found there.
        weights, base_weights: files, for models given by name.
        num_classes: outputs of models given by name, where they are not the classes of the data.
        class_names: of the outputs, for the report; None: those of the data, if it has as many.
        image_size, mean, std, channels, max_pixels, follow_links: as in
            :func:`fastxkd.runs.sources.open_source`. Published weights have a mean and std of their
            own: (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225) for most.
        chunk: images per chunk, which is done or not done as a whole.
        batch_size: images per pass.
        workers: processes that load images.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...; with the first, each of
            several ranks takes its own.
        gallery: images shown in the report.
        progress: called with (images done, images in all, failed so far), on rank 0.

    Returns:
        Where it lies, images, chunks, and how many images failed.

    Raises:
        ValueError, TypeError: something asked for does not fit. Nothing has been written.
        OSError: the disk is full or broken; what was written before is intact.
        ImportError: numcodecs, pyarrow, jinja2 or Pillow is missing (extra ``runs``).

    >>> import tempfile, torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(),
    ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))
    >>> images = [(torch.rand(1, 8, 8), i % 3) for i in range(5)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = explain(model, images, f"{folder}/run", methods=["gradcam", "layercam"])
    >>> found.images, found.failed
    (5, 0)
    """
    out = Path(out).expanduser()
    names = check_methods(methods)
    asked.check_numbers(chunk=chunk, batch_size=batch_size, workers=workers, gallery=gallery)
    targets = asked.check_targets(targets)
    stored = asked.stored_dtype(dtype, normalize)
    for module in ("numcodecs", "pyarrow", "jinja2", "PIL"):
        require(module, extra="runs")
    ranks = meet()
    place = asked.pick_device(device, ranks)
    with terminable(), steady(), ExitStack() as hooks:
        source = open_source(
            data,
            image_size=image_size,
            mean=mean,
            std=std,
            channels=channels,
            max_pixels=max_pixels,
            follow_links=follow_links,
        )
        own = asked.make_model(model, "model", weights, num_classes, source, place)
        other = None
        if "unicam" in names and base is not None:
            other = asked.make_model(base, "base", base_weights, num_classes, source, place)
        elif "unicam" in names:
            raise ValueError("base: unicam compares two models, got one")
        elif base is not None:
            raise ValueError("base: given without unicam in methods, which alone has a use for it")
        embeddings = asked.read_embeddings(class_embeddings)
        examples = readable(source)
        images = Images(source)
        example = source.normalize(images[examples].images, place)
        hooks.enter_context(asked.answering(own.module, "model", example))
        if other is not None:
            hooks.enter_context(asked.answering(other.module, "base", example))
        explained = asked.choose_layers(own.module, layers, example)
        paired = asked.choose_base_layers(
            None if other is None else other.module, base_layers, explained, example
        )
        explainers = Methods(
            own.module,
            names,
            explained,
            base=None if other is None else other.module,
            base_layers=paired,
            class_embeddings=embeddings,
            size=size,
            normalize=normalize,
            batch_size=batch_size,
        )
        work = Work(images, explainers, place, targets, stored)
        scores = work.prepare(reference, batch_size)
        arrays = work.rehearse(examples)
        shown = asked.choose_names(class_names, source, work.classes)
        asked.check_space(out, len(source), arrays)
        settings = {
            "data": source.describe(),
            "model": own.settings,
            "base": None if other is None else other.settings,
            "methods": names,
            "layers": explained,
            "base_layers": paired,
            "targets": targets,
            "size": list(size) if isinstance(size, (tuple, list)) else size,
            "dtype": dtype,
            "normalize": normalize,
            "reference": None if other is None else reference,
            "class_embeddings": None if embeddings is None else fingerprint({"": embeddings}),
            "batch_size": batch_size,
            "device": place.type,
        }
        files = {"model": own.file, "base": {} if other is None else other.file}
        writer = _claim(
            ranks,
            out,
            settings,
            images=len(source),
            chunk=chunk,
            arrays=arrays,
            columns=columns_of(arrays),
            facts=asked.facts(place, ranks, workers, files, scores),
        )
        with writer:
            _carry_out(work, writer, ranks, arrays, batch_size, workers, progress)
            summary = ranks.from_first(lambda: _finish(writer, source, gallery, shown))
            # Rank 0 may be the host of the store at which the others read this.
            ranks.wait()
    return Summary(Path(summary[0]), *summary[1:])


def _claim(ranks: Ranks, out: str | os.PathLike[str], settings: Any, **sizes: Any) -> RunWriter:
    """The directory, for all ranks of this start together."""
    writers: list[RunWriter] = []

    def claim(token: str) -> str:
        which: Any = {"rank": ranks.rank, "ranks": ranks.ranks}
        writers.append(RunWriter(out, settings, **sizes, **which, token=token))
        return token

    token = ranks.from_first(lambda: claim(uuid.uuid4().hex))
    if ranks.rank > 0:
        claim(token)
    return writers[0]


def _carry_out(
    work: Work,
    writer: RunWriter,
    ranks: Ranks,
    arrays: Mapping[str, Array],
    batch_size: int,
    workers: int,
    progress: Progress | None,
) -> None:
    """Every chunk that is pending, by whichever rank comes to it first."""
    pending = writer.pending()
    total, chunk = len(work.images.source), len(writer.rows(0))
    before = total - sum(len(writer.rows(number)) for number in pending)
    ranks.wait()  # from here on what is pending changes
    if progress is not None and ranks.rank == 0:
        progress(before, total, 0)
    places = ranges(ranks.claims(pending), total, chunk, batch_size)
    # Processes first, the thread after: a fork would copy it without its life.
    batches = load(work.images, places, workers=workers, pinned=work.device.type == "cuda")
    current: Chunk | None = None
    with _watched(), Background(writer.write) as background:
        for batch, answer in _answers(work, _received(batches), batch_size):
            if current is None:
                number = batch.first // chunk
                current = Chunk(number, writer.rows(number), arrays)
            failed = ranks.count("failed", current.put(batch, answer))
            done = ranks.count("done", len(batch.names))
            if current.full:
                background.put(current.number, current.maps, current.scores, current.errors)
                current = None
            if progress is not None and ranks.rank == 0:
                progress(before + done, total, failed)
    ranks.wait()
    if progress is not None and ranks.rank == 0:
        progress(before + ranks.count("done"), total, ranks.count("failed"))


def _answers(
    work: Work, batches: Iterator[Loaded], batch_size: int
) -> Iterator[tuple[Loaded, Answer]]:
    """One later than asked for: meanwhile an accelerator works on the next."""
    last = None
    for batch in batches:
        try:
            current = batch, work.answer(batch)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"batch_size: {batch_size} images do not fit into the memory of {work.device}"
            ) from error
        if last is not None:
            yield last
        last = current
    if last is not None:
        yield last


def _received(batches: Iterator[Loaded]) -> Iterator[Loaded]:
    try:
        yield from batches
    except (OSError, EOFError) as error:  # images themselves raise nothing
        raise _died(error) from error


@contextmanager
def _watched() -> Iterator[None]:
    """A process that loads images and dies raises by a signal, wherever the main thread is."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise _died(error) from error


def _died(error: Exception) -> OSError:
    return OSError(
        f"workers: a process that loads images has died ({error}); the same command goes on where"
        " it stopped"
    )


def _finish(
    writer: RunWriter, source: Source, gallery: int, class_names: Sequence[str] | None
) -> list[Any]:
    from fastxkd.runs.run_report import write_run_report

    summary = writer.finish()
    write_run_report(summary, source, gallery=gallery, class_names=class_names)
    return [str(summary.out), *summary[1:]]


@contextmanager
def steady() -> Iterator[None]:
    """Kernels that give the same bits every time, whatever block the caller is in."""
    cudnn = torch.backends.cudnn
    with (
        cudnn.flags(
            enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=cudnn.allow_tf32
        ),
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else nullcontext(),
    ):
        yield


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: hooks come off, processes that load images end."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
