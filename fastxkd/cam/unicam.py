"""UniCAM: what a student sees because of its teacher, and what it stopped seeing."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastxkd.cam._unicam_distances import (
    Distances,
    cross_distances,
    exact_dtype,
    joint_labels,
    own_distances,
)
from fastxkd.cam._unicam_reference import (
    Collector,
    Keeper,
    UniCAMReference,
    batches_of,
    class_prototypes,
    labels_of,
)
from fastxkd.cam._unicam_side import Bank, Features, Seen, Side
from fastxkd.cam._unicam_weights import (
    Objective,
    check_objective,
    check_samples,
    pair_weights,
    unicam_weights,
)
from fastxkd.cam.capture import Layers, resolve_layers
from fastxkd.cam.explainer import Inputs
from fastxkd.cam.layouts import check_transform
from fastxkd.cam.maps import Normalize, check_normalize, check_size, maps_of_layers
from fastxkd.metrics.similarity import (
    LayerScores,
    centre,
    label_embeddings,
    named_scores,
    scores_of_layer,
)

__all__ = ["UniCAM", "UniCAMOutput", "UniCAMReference", "class_prototypes", "unicam_weights"]


class UniCAMOutput(NamedTuple):
    """Maps ``[n, height, width]`` and, per layer, FSS and RS of the batch, or of the reference set
    that it was explained against."""

    distilled: Tensor
    residual: Tensor
    scores: list[LayerScores]


class UniCAM:
    """What is in the student because of its teacher (distilled), and what only the base has
    (residual), as maps and numbers (Adhane et al. 2025).

    The base is the student's architecture trained without the teacher, or any other model. A map
    shows where the part of a model's features that the other model does not have is related to
    the labels: the closed form of :func:`fastxkd.cam.unicam_weights`. Without a reference set it
    depends on the batch: distances are between its images; take at least a few dozen, of several
    classes. One image that is not finite makes every map NaN then, and against a reference set only
    its own.

    Args:
        student, base: the two models; run without gradients in eval mode, and left as they were.
        target_layers: layers of the student, names or modules, with spatial activations; with
            several, maps are averaged.
        base_layers: the base's layers to pair them with, in order; by default the same names.
            Channels, resolutions and architectures need not agree.
        reshape_transform: for token layouts, as in :class:`fastxkd.GradCAM`; linear.
        base_reshape_transform: the base's; by default the student's.
        features: what is compared where it is not the target layer's own output: names or modules
            of the student, further up, whose output it is (``"avgpool"``), or functions of the
            layer's output; one for all layers or one for each. One vector-Jacobian product leads
            from there to the layer, through a graph that starts at the layer.
        base_features: the base's; by default the same names or functions.
        objective: ``"semi_partial"``, ``"partial"`` or ``"residual_argmax"``, see
            :func:`fastxkd.cam.unicam_weights`. The last has no use for labels; the scores have.
        class_embeddings: ``[classes, e]``, what class indices stand for, such as embeddings of
            the classes' names or :func:`fastxkd.cam.class_prototypes`; None: one-hot vectors.

    >>> import torch, fastxkd
    >>> def net():
    ...     return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU())
    >>> unicam = UniCAM(net(), net(), target_layers=["1"])
    >>> images, labels = torch.rand(8, 1, 12, 12), torch.arange(8) % 2
    >>> out = unicam(images, labels)
    >>> out.distilled.shape, out.residual.shape, out.scores[0].layer
    (torch.Size([8, 12, 12]), torch.Size([8, 12, 12]), '1')

    Maps that do not depend on who else is in the batch:

    >>> reference = unicam.reference(images, labels)
    >>> unicam(torch.rand(1, 1, 12, 12), labels[:1], reference=reference).distilled.shape
    torch.Size([1, 12, 12])
    """

    def __init__(
        self,
        student: nn.Module,
        base: nn.Module,
        target_layers: Layers,
        base_layers: Layers | None = None,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
        *,
        base_reshape_transform: Callable[[Tensor], Tensor] | None = None,
        features: Features | None = None,
        base_features: Features | None = None,
        objective: Objective = "semi_partial",
        class_embeddings: Tensor | None = None,
    ) -> None:
        check_objective(objective)
        check_transform(reshape_transform)
        check_transform(base_reshape_transform, "base_reshape_transform")
        self.student = student
        self.base = base
        self.target_layers = resolve_layers(student, target_layers, "target_layers", "student")
        paired = list(self.target_layers) if base_layers is None else base_layers
        self.base_layers = resolve_layers(base, paired, "base_layers", "base")
        if len(self.target_layers) != len(self.base_layers):
            raise ValueError(
                f"base_layers: expected {len(self.target_layers)} to pair with target_layers,"
                f" got {len(self.base_layers)}"
            )
        if class_embeddings is not None:
            _check_embeddings(class_embeddings)
        self.objective = objective
        self.class_embeddings = class_embeddings
        self._student = Side(student, self.target_layers, features, reshape_transform, "features")
        self._base = Side(
            base,
            self.base_layers,
            self._student.features if base_features is None else base_features,
            reshape_transform if base_reshape_transform is None else base_reshape_transform,
            "base_features",
        )

    def reference(
        self, data: Any, labels: Tensor | None = None, *, samples: int = 128
    ) -> UniCAMReference:
        """A memory bank that batches can be explained against, each image by itself.

        Args:
            data: a loader of batches (images, labels); or images, with ``labels`` beside them.
                Images as in a call, labels too.
            labels: class indices ``[n]`` or embeddings ``[n, e]`` of images given as they are.
            samples: how many to keep, at least 4. Of more, the first of each class are, as many
                of each class as fit (of embeddings, the first). Only these go through the models.

        Raises:
            ValueError, TypeError: fewer than 4 samples, and as a call.
        """
        if not isinstance(samples, Integral):
            raise TypeError(f"samples: expected an int of at least 4, got {samples!r}")
        if samples < 4:
            raise ValueError(f"samples: expected at least 4, got {samples}")
        keeper = Keeper(samples)
        student, base = Collector(self._student), Collector(self._base)
        kept: list[Tensor] = []
        with torch.inference_mode(False):
            for images, given in batches_of(data, labels):
                inputs = Inputs(images).normal()
                found = labels_of(given, self.class_embeddings, inputs.images, "labels")
                # Rows of class_embeddings are told apart by their class.
                classes = [None] * len(found) if given.is_floating_point() else given.tolist()
                come, stay = keeper.take(classes)
                if not come:
                    continue
                chosen = inputs.rows(torch.tensor(come, device=inputs.images.device))
                student.add(chosen, stay)
                base.add(chosen, stay)
                kept = [kept[i] for i in stay] + [found[i].clone() for i in come]
            if len(kept) < 4:
                raise ValueError(f"data: expected at least 4 samples, got {len(kept)}")
            all_labels = torch.stack(kept)
            banks = student.banks("student"), base.banks("base")
            embedded = label_embeddings(all_labels).double()
            d_labels = own_distances(embedded, "labels", len(kept))
            scores = [
                _scores(
                    layer, [s.distances, b.distances, d_labels], exact_dtype(s.features, b.features)
                )
                for layer, s, b in zip(self.target_layers, *banks, strict=True)
            ]
            return UniCAMReference(*banks, all_labels, d_labels, scores)

    def __call__(
        self,
        images: Any,
        labels_or_embeddings: Tensor,
        *,
        reference: UniCAMReference | None = None,
        size: Literal["input"] | tuple[int, ...] | None = "input",
        normalize: Normalize = "minmax",
    ) -> UniCAMOutput:
        """Explain a batch.

        Args:
            images: ``[n, channels, height, width]``, n >= 5 (``residual_argmax``: 4); volumes, and
                several inputs as a tuple or a dict, as in :class:`fastxkd.GradCAM`. Both models get
                them.
            labels_or_embeddings: class indices ``[n]`` or embeddings of the labels ``[n, e]``.
            reference: of :meth:`reference`: each image is explained as if it alone had joined that
                set, whoever is in its batch; n may be 1.
            size, normalize: as in :class:`fastxkd.GradCAM`.

        Raises:
            ValueError, TypeError: too few images, labels that do not match, a layer that is
                never reached or has no spatial axes, features that do not depend on their layer.
        """
        inputs = Inputs(images)
        _check_call(inputs.images, reference, size, normalize)
        if reference is not None and len(reference.student) != len(self.target_layers):
            raise ValueError(
                f"reference: expected one of {len(self.target_layers)} layers, as this explainer"
                f" makes, got {len(reference.student)}"
            )
        labels = labels_of(labels_or_embeddings, self.class_embeddings, inputs.images)
        with torch.inference_mode(False), torch.no_grad():
            d_labels = _label_distances(labels, reference)
            inputs = inputs.normal()
            student, base = self._student.look(inputs), self._base.look(inputs)
            if reference is None:
                check_samples("images", len(labels), self.objective)
            banks: list[Any] = [[None] * len(student)] * 2
            if reference is not None:
                banks = [reference.student, reference.base]
            distilled, residual, scores = [], [], []
            for s, b, s_bank, b_bank in zip(student, base, *banks, strict=True):
                d_student, d_base = _distances(s, s_bank), _distances(b, b_bank)
                dtype = exact_dtype(s.compared, b.compared)
                used = None if self.objective == "residual_argmax" else d_labels
                pairs = pair_weights(d_student, d_base, used, self.objective, dtype)
                distilled.append(self._student.weights(s, pairs, s_bank, inputs))
                pairs = pair_weights(d_base, d_student, used, self.objective, dtype)
                residual.append(self._base.weights(b, pairs, b_bank, inputs))
                if reference is None:
                    scores.append(_scores(s.layer, [d_student.to, d_base.to, d_labels.to], dtype))
            return UniCAMOutput(
                _maps(student, distilled, inputs, size, normalize),
                _maps(base, residual, inputs, size, normalize),
                scores if reference is None else reference.scores,
            )


def _label_distances(labels: Tensor, reference: UniCAMReference | None) -> Distances:
    name = "labels_or_embeddings"
    if reference is None:
        embedded = label_embeddings(labels, name=name).double()
        return Distances(own_distances(embedded, name, len(labels)))
    own, others = joint_labels(labels, reference.labels, name)
    return Distances(cross_distances(own, others), reference.label_distances)


def _distances(seen: Seen, bank: Bank | None) -> Distances:
    features = seen.compared
    if bank is None:
        name = f"features of {seen.layer!r}"
        return Distances(own_distances(features, name, len(features)))
    if features.shape[1:] != bank.features.shape[1:]:
        raise ValueError(
            f"reference: expected features {list(features.shape[1:])} of {seen.layer!r}, as of"
            f" these images, got {list(bank.features.shape[1:])}"
        )
    return Distances(cross_distances(features, bank.features), bank.distances)


def _scores(layer: str, distances: list[Tensor], dtype: torch.dtype) -> LayerScores:
    """As ``metrics.layer_scores``, of the distances that are there already."""
    student_base_labels = torch.stack(distances)
    flat = student_base_labels.flatten(1)
    found = flat @ flat.T, student_base_labels.sum(2), dtype
    biased, unbiased = (centre(*found, unbiased=flag) for flag in (False, True))
    scores = scores_of_layer(biased, unbiased, [0, 1, 2])
    return named_scores(layer, {name: float(v) for name, v in scores.items()})


def _maps(
    layers: list[Seen], weights: list[Tensor], inputs: Inputs, size: Any, normalize: Normalize
) -> Tensor:
    # 16 bits would lose digits of weights that nearly cancel.
    spatial = [seen.spatial.to(w.dtype) for seen, w in zip(layers, weights, strict=True)]
    if normalize is not None:
        # The 1e-7 of a min-max is made for scores of classes: it must not see how many pairs and
        # positions share the gradient of one correlation.
        largest = [w.abs().amax(1, keepdim=True) for w in weights]
        weights = [w / x.where(x != 0, 1) for w, x in zip(weights, largest, strict=True)]
    if size == "input":
        size = tuple(inputs.images.shape[2 - spatial[0].dim() :])
    return maps_of_layers(  # type: ignore[no-any-return]
        [seen.layer for seen in layers],
        spatial,
        list(weights),
        method="weights",
        size=size,
        normalize=normalize,
        aggregate="mean",
    )


def _check_call(
    images: Tensor, reference: UniCAMReference | None, size: Any, normalize: Normalize
) -> None:
    if not (reference is None or isinstance(reference, UniCAMReference)):
        raise TypeError(
            f"reference: expected what UniCAM.reference() returns, got {type(reference).__name__}"
        )
    fewest = 4 if reference is None else 1
    if images.dim() < 3 or images.shape[0] < fewest:
        raise ValueError(
            f"images: expected a batch [n, channels, height, width] of at least {fewest},"
            f" got {list(images.shape)}"
        )
    check_normalize(normalize)
    check_size(size)


def _check_embeddings(table: Any) -> None:
    if not isinstance(table, Tensor):
        raise TypeError(f"class_embeddings: expected a Tensor, got {type(table).__name__}")
    if table.dim() != 2 or not table.is_floating_point() or table.numel() == 0:
        raise ValueError(
            f"class_embeddings: expected floats [classes, e], got {table.dtype} {list(table.shape)}"
        )
