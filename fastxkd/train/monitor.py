"""Explanations of a distillation while it runs, out of the steps' own forward passes."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastxkd.cam.maps import METHODS
from fastxkd.metrics.pooling import compared
from fastxkd.ops._checks import check_choice, check_counts
from fastxkd.train._agreement import AGREEMENTS, Agreement
from fastxkd.train._asked import Layer, metrics_of, places_of
from fastxkd.train._lane import Lane
from fastxkd.train._log import Draft, Log, Record
from fastxkd.train._pool import Pool
from fastxkd.train._probe import Frame, Probe
from fastxkd.train._watch import Precision, Seen, Side, Watch, explained
from fastxkd.train.checkpoint import check_settings
from fastxkd.train.sinks import Sink, open_sinks

# Pictures that are kept; of more, every second goes.
MOST_FRAMES = 64


class _Batch(NamedTuple):
    """A batch that the student has seen, and the teacher perhaps not yet."""

    seen: Seen
    gradients: list[Tensor]
    target: Tensor  # [n], the classes explained
    labels: Tensor | None
    base: Seen | None
    precision: Precision


class ExplanationMonitor:
    """Watches what student and teacher look at while the one learns from the other.

    Every ``every`` steps it takes the activations of the step's own forward passes, and the
    gradient of the class scores between a layer and the logits out of the step's own graph. The
    student runs no extra pass, and training ends with the same weights, bit for bit, as without a
    monitor: gradients, buffers, random numbers and train/eval flags stay as they are. In between
    there are no hooks and no cost.

    ================================ =============================================================
    ``LAYER/agreement``              mean over the images of how far the maps (Grad-CAM) of student
                                     and teacher agree, for the same class
    ``LAYER/fss_teacher``            FSS: distance correlation of the student's features with the
                                     teacher's
    ``LAYER/fss``                    the same with the base's
    ``LAYER/rs_student``,            RS: distance correlation of a model's features with the labels
    ``rs_teacher``, ``rs_base``
    ``LAYER/rs_distilled``,          UniCAM's scores: what of the student (of the base) the other
    ``rs_residual``                  one has not, with the labels
    ================================ =============================================================

    Names and estimators are those of :func:`fastxkd.layer_scores`. Scores of distances need more
    images than a batch has: batches of measured steps are pooled until there are ``pool``, and the
    score belongs to the step that fills the pool, which then starts empty.

    >>> import torch, fastxkd
    >>> from fastxkd.train import ExplanationMonitor
    >>> def net(width):
    ...     return torch.nn.Sequential(torch.nn.Conv2d(1, width, 3), torch.nn.ReLU(),
    ...         torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(width, 3))
    >>> student, teacher = net(4), net(8).eval()
    >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    >>> monitor = ExplanationMonitor(student, teacher, {"conv": ("1", "1")}, every=2, pool=16)
    >>> for images, labels in [(torch.rand(16, 1, 8, 8), torch.arange(16) % 3)] * 4:
    ...     with monitor.step(labels):
    ...         logits = student(images)
    ...         with torch.no_grad():
    ...             guidance = teacher(images)
    ...         loss = fastxkd.kd_loss(logits, guidance, labels)
    ...         optimizer.zero_grad()
    ...         loss.backward()
    ...         optimizer.step()
    >>> monitor.close()
    >>> [record.step for record in monitor.history]
    [0, 2]
    >>> sorted(monitor.history[0].values)
    ['conv/agreement', 'conv/fss_teacher', 'conv/rs_student', 'conv/rs_teacher']

    Args:
        student: the model that is trained; it may be wrapped in ``DistributedDataParallel`` or
            compiled. A step of a compiled one that is measured runs the model's own code, whose
            rounding is not the compiler's: weights are then equal to rounding, not to the bit.
        teacher: the model that guides it. Its forward pass of the step is used where it has one:
            before or after the student's. It runs a pass of its own, in eval
            mode, where it has none (logits that were stored), and where a graph could be noticed
            in the step's pass: in inference mode, with others' forward hooks on it, with torch's
            fast path for attention.
        layers: a layer's name to its place in student and teacher (and base): names or modules,
            ``{"last": ("layer4", "layer4")}``; or names that all models share.
        base: the student trained without the teacher, for FSS, distilled and residual scores. It
            runs a pass of its own on every measured batch.
        every: a step is measured when its number is a multiple of it.
        sink: who is told: a callable ``(step, values, pictures)``, a path that ends in ``.csv`` or
            ``.jsonl``, something of :mod:`fastxkd.train.sinks`, or several of them.
        probe: a few images ``[p, channels, height, width]`` as the models take them, or (images,
            labels), whose maps are pictures over time. They go through the student in eval mode
            at the end of the step. Explained are the labels or else the teacher's classes.
        probe_every: how often, in steps; by default a tenth as often as the measuring.
        mean, std: what the probe was normalised with, for pictures of it.
        method: of the maps, see :func:`fastxkd.cam_from`.
        metrics: of ``"agreement"``, ``"fss"``, ``"rs"`` and ``"unicam"``; None: all that the
            models allow (``"unicam"`` needs a base).
        agreement: ``"cosine"``, ``"pearson"``, ``"spearman"`` or ``"top"``, see
            :func:`fastxkd.cosine_agreement` and its neighbours; between maps at the resolution of
            the layer, the finer one's of the two.
        pool: images that make a score of distances, at least 4.
        width: numbers per image that are compared; larger maps are averaged over blocks first.
        reshape_transform: for token layouts, as in :class:`fastxkd.GradCAM`; one for all models,
            or by role (``"student"``, ``"teacher"``, ``"base"``).
        logits: a function that takes the logits out of a model's output; None takes a tensor as it
            is, ``output.logits``, ``output["logits"]`` or the first of a tuple.
        rank: which process of ``torch.distributed`` measures, its own share of the batches; the
            others do nothing. None: every one, each with its own sink.

    Use it as above, or by :meth:`begin_step` and :meth:`end_step`. Several forward passes in one
    step (gradient accumulation) are measured one by one, and are one record.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        layers: Mapping[str, Layer | Sequence[Layer]] | Sequence[str] | str,
        *,
        base: nn.Module | None = None,
        every: int = 100,
        sink: Sink | str | Path | Sequence[Sink | str | Path] | None = None,
        probe: Tensor | tuple[Tensor, Tensor] | None = None,
        probe_every: int | None = None,
        mean: Any = None,
        std: Any = None,
        method: str = "gradcam",
        metrics: Sequence[str] | None = None,
        agreement: str = "cosine",
        pool: int = 256,
        width: int = 4096,
        reshape_transform: Callable[[Tensor], Tensor] | Mapping[str, Any] | None = None,
        logits: Callable[[Any], Tensor] | None = None,
        rank: int | None = 0,
    ) -> None:
        metrics = metrics_of(metrics, base is not None)
        check_choice("method", method, [m for m in METHODS if m != "weights"])
        check_choice("agreement", agreement, AGREEMENTS)
        check_counts(
            every=every,
            pool=pool,
            width=width,
            probe_every=1 if probe_every is None else probe_every,
        )
        if pool < 4:
            raise ValueError(f"pool: expected at least 4 images for distances, got {pool}")
        models = {"student": student, "teacher": teacher} | ({} if base is None else {"base": base})
        places = places_of(layers, list(models))
        self.every, self.probe_every = every, probe_every or 10 * every
        self.method, self.metrics, self.agreement, self.rank = method, metrics, agreement, rank
        self.layers = list(places)
        self.frames: list[Frame] = []
        self._sides = {
            role: Side(
                role,
                model,
                {name: place[role] for name, place in places.items()},
                reshape_transform.get(role)
                if isinstance(reshape_transform, Mapping)
                else reshape_transform,
                logits,
            )
            for role, model in models.items()
        }
        self.probe = None if probe is None else Probe(probe, self._sides, method, mean, std)
        self._width = width
        self._maps = Agreement(self._sides, method, agreement)
        self._explains = "agreement" in metrics
        self._asks_labels = "rs" in metrics or "unicam" in metrics
        self._pool = Pool(
            pool,
            self.layers,
            list(models),
            fss="fss" in metrics,
            rs="rs" in metrics,
            unicam="unicam" in metrics,
        )
        self._compares = self._asks_labels or "fss" in metrics
        self._log = Log(open_sinks(sink))
        self._lane: Lane | None = None
        self._count = 0
        self._step: int | None = None  # the open step
        self._before: int | None = None  # of a measured one: parcels there were at its begin
        self._stack = ExitStack()
        self._labels: Any = None
        self._waiting: list[_Batch] = []  # for the teacher
        self._ahead: list[Seen] = []  # passes of the teacher before the student's
        self._measured = 0
        self._pictured: int | None = None
        self._warned = False
        self._went_back = False

    @property
    def history(self) -> list[Record]:
        """A record for every measured step, in order; of more than a few thousand, neighbours
        are one."""
        return self._log.history

    @property
    def count(self) -> int:
        """The number of the next step, where the caller gives none."""
        return self._count

    @contextmanager
    def step(self, labels: Any = None, *, step: int | None = None) -> Iterator[ExplanationMonitor]:
        """The ``with`` block of a training step, around the forward passes or the whole of it.

        Args:
            labels: class indices ``[n]`` of the batch, or soft labels ``[n, classes]``; None takes
                the keyword ``labels`` of the student's forward, as models of Hugging Face have it.
                Images with a negative index have no part in scores of distances.
            step: the step's number, which counts on from epoch to epoch; None counts. Blocks with
                the same number are one record.

        A step that raises leaves no hook and no record of this block.
        """
        self.begin_step(step, labels)
        try:
            yield self
        except BaseException:
            self.abandon_step()
            raise
        self.end_step()

    def begin_step(self, step: int | None = None, labels: Any = None) -> bool:
        """:meth:`step` for trainers with callbacks: before the step's forward passes.

        A step that is still open is abandoned. Results of the steps before go to the sink.

        Returns:
            Whether the step is measured.

        Raises:
            TypeError: ``step`` is no number; labels come after it.
        """
        if self._step is not None:
            self.abandon_step()
        if step is None:
            step = self._count
        try:
            step = operator.index(step)
        except TypeError:
            got = type(step).__name__
            raise TypeError(
                f"step: expected a whole number, got {got}; labels are the second argument"
            ) from None
        if step < 0:
            raise ValueError(f"step: expected a number from 0 on, got {step}")
        if step + 1 < self._count and not self._went_back:
            self._went_back = True
            warnings.warn(
                f"ExplanationMonitor: step {step} comes after step {self._count - 1}; number steps"
                " over all epochs, or leave the counting to the monitor, else records of several"
                " epochs have the same number",
                stacklevel=2,
            )
        self._log.deliver(step)
        self._step = step
        if step % self.every or not self._here():
            return False
        with ExitStack() as stack:
            watched = (("student", self._student_ran), ("teacher", self._teacher_ran))
            for role, found in watched:
                side = self._sides[role]
                stack.enter_context(side.eagerly())
                watch = Watch(side, found, trained=role == "student", graph=self._explains)
                stack.callback(watch.close)
            self._stack = stack.pop_all()
        self._labels, self._measured = labels, 0
        self._before = self._log.expected(step)
        return True

    def end_step(self) -> None:
        """After the step's forward passes; before or after its backward pass."""
        step = self._step
        if step is None:
            return
        try:
            if self._before is not None and not (self._measured or self._waiting):
                self._say_that_nothing_ran(step)
            for batch in self._waiting:
                self._measure(batch, self._guide_of(batch))
            self._look_at_probe(step)
        except BaseException:
            self.abandon_step()
            raise
        self._leave()
        self._count = step + 1

    def abandon_step(self) -> None:
        """The step is given up: of what was measured since :meth:`begin_step` nothing is kept."""
        if self._step is not None and self._before is not None:
            self._log.forget(self._step, self._before)
        self._leave()

    def _leave(self) -> None:
        self._step = self._before = self._labels = None
        self._waiting.clear()
        self._ahead.clear()
        self._stack.close()

    def _here(self) -> bool:
        if self.rank is None or not (dist.is_available() and dist.is_initialized()):
            return True
        return dist.get_rank() == self.rank

    def _say_that_nothing_ran(self, step: int) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"ExplanationMonitor: nothing was measured in step {step}: the student ran no forward"
            " pass in training mode with gradients between the step's begin and its end (a model"
            " that was compiled or wrapped later must be given as it is called)",
            stacklevel=4,
        )

    # While the graph is alive: at the end of a forward pass.

    def _student_ran(self, seen: Seen) -> None:
        labels = self._labels_of(seen)
        wanted = None
        if labels is not None:
            wanted = labels.argmax(1) if labels.is_floating_point() else labels
        target = explained(seen.logits, wanted)
        gradients = self._sides["student"].gradients(seen, target) if self._explains else []
        precision = Precision.current(seen.logits.device)
        base = None
        if "base" in self._sides:
            side = self._sides["base"]
            given = side.fitted(seen.arguments, seen.keywords, precision)
            base = side.look(*given, graph=False, precision=precision)
        batch = _Batch(_without_graph(seen), gradients, target, labels, base, precision)
        at = [i for i, guide in enumerate(self._ahead) if guide.images is seen.images]
        if at:
            self._measure(batch, self._ahead.pop(at[0]))
        else:
            self._waiting.append(batch)

    def _teacher_ran(self, seen: Seen) -> None:
        at = [i for i, batch in enumerate(self._waiting) if batch.seen.images is seen.images]
        if at:
            self._measure(self._waiting.pop(at[0]), seen)
        else:
            self._ahead.append(seen)

    def _guide_of(self, batch: _Batch) -> Seen:
        """At the end of the step, where the teacher has not had the very same tensor: a pass of
        as many images, or else one beside the step."""
        n = len(batch.seen.logits)
        for i, guide in enumerate(self._ahead):
            if guide.lasting and len(guide.logits) == n:
                return self._ahead.pop(i)
        side, precision = self._sides["teacher"], batch.precision
        given = side.fitted(batch.seen.arguments, batch.seen.keywords, precision)
        return side.look(*given, graph=self._explains, precision=precision)

    def _labels_of(self, seen: Seen) -> Tensor | None:
        labels = seen.keywords.get("labels") if self._labels is None else self._labels
        if labels is None:
            if self._asks_labels:
                raise ValueError(
                    "labels: rs and unicam ask for the labels of the batch; pass them to step(), or"
                    " metrics= without the two"
                )
            return None
        labels = torch.as_tensor(labels).detach()
        n, soft = len(seen.logits), labels.is_floating_point()
        if labels.dim() != 1 + soft or len(labels) != n or labels.dtype == torch.bool:
            raise ValueError(
                f"labels: expected {n} class indices, one per image, or soft labels [{n}, classes],"
                f" got {labels.dtype} {list(labels.shape)}"
            )
        # A copy: the loader may fill the same memory again.
        return labels.to(seen.logits.device, non_blocking=True, copy=True)

    def _measure(self, batch: _Batch, guide: Seen) -> None:
        """Everything about a batch, on its way to the host."""
        n = len(batch.seen.logits)
        if len(guide.logits) != n:
            raise ValueError(
                f"teacher: expected logits [{n}, classes] for the student's {n} images, got"
                f" {list(guide.logits.shape)}"
            )
        passes = {"student": batch.seen, "teacher": guide}
        if batch.base is not None:
            passes["base"] = batch.base
        pulls = {"student": batch.gradients, "teacher": []}
        if self._explains:
            target = explained(guide.logits, batch.target.to(guide.logits.device))
            pulls["teacher"] = self._sides["teacher"].gradients(guide, target)
        self._measured += 1
        found: dict[str, Tensor] = {}
        activations = [a for seen in passes.values() for a in seen.activations.values()]
        gradients = [*pulls["student"], *pulls["teacher"]]
        lane = self._lane_of(batch.seen.logits.device)
        with (
            lane.beside([*activations, *gradients]),
            torch.no_grad(),
            batch.precision._replace(enabled=False).again(),
        ):
            for i, name in enumerate(self.layers):
                spatial = {
                    role: self._sides[role].spatial(seen.activations[name].detach(), seen, name)
                    for role, seen in passes.items()
                }
                if self._explains:
                    pulled = {role: gradients[i] for role, gradients in pulls.items()}
                    found |= self._maps.of(name, spatial, pulled, passes)
                if self._compares:
                    for role, features in spatial.items():
                        found[f"{name}/{role}"] = compared(features, self._width)
            if self._asks_labels and batch.labels is not None:
                found["labels"] = batch.labels
            parcel = lane.send(found)
        explained_layers = [name for name in self.layers if f"{name}/largest" in found]

        def arrived(draft: Draft, tensors: dict[str, Tensor]) -> None:
            for name in explained_layers:
                self._maps.look_for_blank_maps(name, tensors.pop(f"{name}/largest").tolist())
                name = f"{name}/agreement"
                draft.add(name, float(tensors.pop(name)), n)
            for name, score in (self._pool.add(tensors) if self._compares else {}).items():
                draft.add(name, score, 1)

        assert self._step is not None
        self._log.expect(self._step, parcel, arrived)

    def _lane_of(self, device: torch.device) -> Lane:
        if self._lane is None or self._lane.device != device:
            self._lane = Lane(device)
        return self._lane

    def _look_at_probe(self, step: int) -> None:
        if self.probe is None or step % self.probe_every or not self._here():
            return
        if step == self._pictured:  # another micro-batch of the step
            return
        probe, known = self.probe, [*self.probe.fixed]
        parcel = probe.look(self._lane_of(self._sides["student"].device))

        def arrived(draft: Draft, tensors: dict[str, Tensor]) -> None:
            frame = probe.frame(step, tensors)
            self.frames.append(frame)
            if len(self.frames) > MOST_FRAMES:
                del self.frames[1::2]
            if self._log.sinks:
                fixed = {k: v for k, v in probe.fixed.items() if k not in known}
                draft.pictures |= probe.strips(fixed | frame.maps)

        self._log.expect(step, parcel, arrived)
        self._pictured = step

    def flush(self) -> None:
        """Hand everything measured so far to the sink; waits for what is on its way."""
        self._log.deliver(None)

    def close(self) -> None:
        """Hand over what is left, and close the sinks that can be closed."""
        if self._step is not None:
            self.abandon_step()
        self._log.close()

    def __enter__(self) -> ExplanationMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, plain data and tensors on the host; hands over what is ready.

        After :meth:`load_state_dict` the records go on as if the training had never stopped.
        """
        self.flush()
        return {
            "settings": self.settings(),
            "count": self._count,
            "pictured": self._pictured,
            "history": self._log.state_dict(),
            "frames": [[frame.step, dict(frame.maps)] for frame in self.frames],
            "pool": self._pool.state_dict(),
            "probe": None if self.probe is None else self.probe.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: it was taken of a monitor with other layers, metrics or the like, or is no
                such state.
        """
        if not isinstance(state, Mapping) or "settings" not in state:
            raise ValueError("state: expected what state_dict() of a monitor has given")
        check_settings(state["settings"], self.settings(), "this monitor")
        if (self.probe is None) != (state["probe"] is None):
            raise ValueError("probe: expected one as in the monitor whose state this is, or none")
        self._leave()
        self._count, self._pictured = state["count"], state["pictured"]
        self._log.load_state_dict(state["history"])
        self.frames = [Frame(step, dict(maps)) for step, maps in state["frames"]]
        self._pool.load_state_dict(state["pool"])
        if self.probe is not None:
            self.probe.load_state_dict(state["probe"])

    def settings(self) -> dict[str, Any]:
        """What decides the numbers, as plain values."""
        return {
            "layers": list(self.layers),
            "models": list(self._sides),
            "method": self.method,
            "metrics": list(self.metrics),
            "agreement": self.agreement,
            "pool": self._pool.size,
            "width": self._width,
        }

    def report(self, path: str | Path) -> Path:
        """Write a page that shows how the scores moved, and the probe's maps as a film strip.

        Everything is in the one HTML file. Records that were thinned out (more than a few
        thousand) are means of neighbours.

        Raises:
            ValueError: ``path`` is a folder.
            ImportError: jinja2, matplotlib or Pillow is missing (extra ``report``).
        """
        from fastxkd.train.film import write_film

        self.flush()
        return write_film(self, path)


def _without_graph(seen: Seen) -> Seen:
    activations = {name: a.detach() for name, a in seen.activations.items()}
    return seen._replace(activations=activations, logits=seen.logits.detach())
