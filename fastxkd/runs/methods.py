"""Explanations by name: what a run over a data set computes of one batch of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastxkd.cam import CAM, AblationCAM, EigenCAM, FinerCAM, ScoreCAM, UniCAM, UniCAMReference
from fastxkd.cam.capture import evaluating, resolve_layers
from fastxkd.cam.explainer import Explainer, Inputs, Signals
from fastxkd.cam.gradient import GradientCAM
from fastxkd.cam.maps import Normalize, check_normalize
from fastxkd.metrics.similarity import LayerScores

# Of one score's activations and gradients: any number of them costs one pass.
SHARED = (
    "gradcam",
    "gradcam++",
    "xgradcam",
    "hirescam",
    "layercam",
    "elementwise",
    "eigengradcam",
    "eigencam",
)
_OWN: dict[str, type[Explainer]] = {
    "cam": CAM,
    "finercam": FinerCAM,
    "scorecam": ScoreCAM,
    "ablationcam": AblationCAM,
}
METHODS = (*SHARED, *_OWN, "unicam")
UNICAM_MAPS = ("unicam-distilled", "unicam-residual")

Size = tuple[int, int] | str | None


class Explained(NamedTuple):
    """Of a batch: array's name -> maps ``[n, h, w]``; logits ``[n, classes]``; classes ``[n]``."""

    maps: dict[str, Tensor]
    logits: Tensor
    targets: Tensor


class _OnePass(GradientCAM):
    """Several methods on the same activations and gradients: a map per method and layer."""

    method = "gradcam"

    def __init__(self, model: nn.Module, layers: Sequence[str], methods: Sequence[str]) -> None:
        super().__init__(model, layers)
        self.methods = methods

    def _maps(self, inputs: Inputs, targets: Any, signals: Signals, **options: Any) -> Any:
        maps: list[Tensor] = []
        for method in self.methods:
            maps += super()._maps(inputs, targets, signals._replace(method=method), **options)
        return maps


def check_methods(methods: Sequence[str] | str) -> list[str]:
    """The names as a list.

    Raises:
        ValueError: an unknown name, one that comes twice, none at all.
    """
    names = [methods] if isinstance(methods, str) else list(methods)
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        got = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"methods: expected some of {', '.join(METHODS)}, got {got}")
    if len(set(names)) < len(names):
        raise ValueError(f"methods: expected each once, got {', '.join(names)}")
    return names


class Methods:
    """Explainers of one model (for ``unicam`` of a pair), asked by name.

    No map depends on the other images of its batch: UniCAM, which compares images, is given a
    reference set by :meth:`prepare`.

    Args:
        model: explained as :class:`fastxkd.GradCAM` does it: in eval mode, left as it was.
        methods: names out of ``METHODS``.
        layers: of the model; each has maps of its own.
        base, base_layers: the other model of ``unicam`` and its layers, in the order of ``layers``.
        class_embeddings: of ``unicam``, ``[classes, e]``; None: one-hot vectors.
        size: of the maps: None (the layer's own), ``"input"`` or (height, width).
        normalize: ``"minmax"`` or None.
        batch_size: how many altered images ``scorecam`` and ``ablationcam`` run at once.

    Attributes:
        arrays: names of the maps: ``gradcam``, or ``gradcam/layer3`` where there are several
            layers; ``gradcampp`` for ``gradcam++``; UniCAM's are ``unicam-distilled`` and
            ``unicam-residual``.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(),
    ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 10))
    >>> found = Methods(model, ["gradcam", "eigencam"], ["1"])(torch.rand(2, 3, 16, 16))
    >>> {name: list(maps.shape) for name, maps in found.maps.items()}
    {'gradcam': [2, 14, 14], 'eigencam': [2, 14, 14]}
    """

    def __init__(
        self,
        model: nn.Module,
        methods: Sequence[str] | str,
        layers: Sequence[str],
        *,
        base: nn.Module | None = None,
        base_layers: Sequence[str] | None = None,
        class_embeddings: Tensor | None = None,
        size: Size = None,
        normalize: Normalize = "minmax",
        batch_size: int = 32,
    ) -> None:
        check_normalize(normalize)
        self.methods = check_methods(methods)
        self.model, self._dtype = model, dtype_of(model)
        if base is not None and dtype_of(base) != self._dtype:
            raise ValueError(
                f"base: expected weights of {self._dtype} like the model's, got {dtype_of(base)}"
            )
        self.size, self.normalize = size, normalize
        self._embeddings = class_embeddings
        self.layers = list(resolve_layers(model, list(layers), "layers"))
        self._explainers: list[tuple[Explainer, list[str]]] = []
        self._unicams: list[tuple[UniCAM, list[str]]] = []
        self._references: list[UniCAMReference] = []
        shared = [name for name in self.methods if name in SHARED]
        if shared:
            one = (
                EigenCAM(model, self.layers)
                if shared == ["eigencam"]
                else _OnePass(model, self.layers, shared)
            )
            self._explainers.append((one, [a for name in shared for a in self._named(name)]))
        for name in self.methods:
            if name not in _OWN:
                continue
            try:
                own = _OWN[name](model, self.layers, batch_size=batch_size)
            except ValueError as error:
                raise ValueError(f"methods: {name} does not fit: {error}") from error
            self._explainers.append((own, self._named(name)))
        if "unicam" in self.methods:
            if base is None:
                raise ValueError("base: unicam compares two models, got one")
            names = self.layers if base_layers is None else list(base_layers)
            if len(names) != len(self.layers):
                raise ValueError(
                    f"base_layers: expected {len(self.layers)} to pair with layers,"
                    f" got {len(names)}"
                )
            made = zip(*(self._named(name) for name in UNICAM_MAPS), strict=True)
            for layer, other, arrays in zip(self.layers, names, made, strict=True):
                unicam = UniCAM(model, base, [layer], [other], class_embeddings=class_embeddings)
                self._unicams.append((unicam, list(arrays)))
        known = {a for _, arrays in (*self._explainers, *self._unicams) for a in arrays}
        order = [a for name in (*self.methods, *UNICAM_MAPS) for a in self._named(name)]
        self.arrays = [name for name in order if name in known]

    def _named(self, method: str) -> list[str]:
        # A plus is no character for a file.
        array = method.replace("+", "p")
        return [array] if len(self.layers) == 1 else [f"{array}/{x}" for x in self.layers]

    @property
    def most_classes(self) -> int | None:
        """The rows of UniCAM's class embeddings, if it has some."""
        return None if self._embeddings is None else len(self._embeddings)

    @property
    def asks_for_labels(self) -> bool:
        return bool(self._unicams)

    def logits(self, images: Tensor) -> Tensor:
        """The model's answer ``[n, classes]``, and nothing else."""
        with torch.no_grad(), evaluating(self.model):
            return _checked(self.model(images.to(self._dtype)), len(images))

    def prepare(
        self, batches: Callable[[], Iterable[tuple[Tensor, Tensor]]], samples: int
    ) -> dict[str, LayerScores]:
        """Choose UniCAM's reference set; layer -> FSS and RS of its images.

        Args:
            batches: starts an iteration over batches (images, labels), the same every time.
            samples: as in :meth:`fastxkd.UniCAM.reference`.
        """
        self._references = [
            unicam.reference(
                ((images.to(self._dtype), labels) for images, labels in batches()),
                samples=samples,
            )
            for unicam, _ in self._unicams
        ]
        return {
            layer: reference.scores[0]
            for layer, reference in zip(self.layers, self._references, strict=False)
        }

    def __call__(
        self, images: Tensor, labels: Tensor | None = None, targets: Tensor | None = None
    ) -> Explained:
        """Maps of a batch.

        Args:
            images: ``[n, c, h, w]``, as the model takes them, but for their dtype.
            labels: class indices ``[n]``, which ``unicam`` asks for.
            targets: classes ``[n]`` to explain; None: the one with the largest logit.

        Raises:
            ValueError: a model that does not answer with logits, a method that does not fit.
        """
        images = images.to(self._dtype)
        maps: dict[str, Tensor] = {}
        logits: Tensor | None = None
        options: Any = {"size": self.size, "normalize": self.normalize}
        for explainer, arrays in self._explainers:
            found = explainer(images, targets, aggregate=None, **options)
            if logits is None:
                logits = _checked(explainer.outputs, len(images))
                targets = logits.argmax(1) if targets is None else targets
            explainer.outputs = None
            maps.update(zip(arrays, found, strict=True))
        if logits is None:
            logits = self.logits(images)
            targets = logits.argmax(1) if targets is None else targets
        assert targets is not None
        if self._unicams and labels is None:
            raise ValueError("labels: unicam asks for them, got None")
        if self._unicams and not self._references:
            raise ValueError("reference: unicam has none yet; call prepare() first")
        for (unicam, arrays), reference in zip(self._unicams, self._references, strict=True):
            assert labels is not None
            out = unicam(images, labels, reference=reference, **options)
            maps.update(zip(arrays, (out.distilled, out.residual), strict=True))
        return Explained({name: maps[name] for name in self.arrays}, logits, targets)


def dtype_of(model: nn.Module) -> torch.dtype:
    """What a model computes in, and wants its images in."""
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floats, torch.float32)


def _checked(output: Any, n: int) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != n:
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"model: expected logits [{n}, classes] for {n} images, got {got}")
    return output.detach()


def statistics(maps: Tensor) -> dict[str, Tensor]:
    r"""Numbers that say what a map looks like, each ``[n]`` float64.

    ``mean``; ``spread`` :math:`(\sum_p m_p)^2 / (P \sum_p m_p^2)`, the share of positions that a
    flat map of the same sum and energy would cover (1 for a flat map, 1/P for a single point, 0
    for a map of zeros); ``peak_y``, ``peak_x``: where the first of the largest values lies, in
    (0, 1), from the top left. NaN where a map is not finite.

    Args:
        maps: ``[n, h, w]``.

    >>> import torch
    >>> found = statistics(torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]))
    >>> {name: float(value) for name, value in found.items()}
    {'mean': 0.25, 'spread': 0.25, 'peak_y': 0.25, 'peak_x': 0.75}
    """
    height, width = maps.shape[1:]
    flat = maps.flatten(1).double()
    mean, energy = flat.mean(1), flat.square().mean(1)
    spread = torch.where(energy > 0, mean.square() / energy.where(energy > 0, 1), 0)
    at = flat.argmax(1)
    places = {
        "peak_y": (at.div(width, rounding_mode="floor") + 0.5) / height,
        "peak_x": (at % width + 0.5) / width,
    }
    known = flat.isfinite().all(1)
    found = {"mean": mean, "spread": spread, **places}
    return {k: torch.where(known, v.double(), float("nan")) for k, v in found.items()}
