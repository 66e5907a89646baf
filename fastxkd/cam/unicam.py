"""UniCAM in closed form: what a student sees because of its teacher, and what it stopped seeing.

With A, C, T the U-centred distance matrices of student, base and labels,

    J = <R, T> / sqrt(<R, R> <T, T> + e),  R = A - alpha C,  alpha = <A, C> / (<C, C> + e')

U-centring is an orthogonal projection, so the gradient of J with respect to the student's
distances needs no autograd: with c = 1/(n(n-3)) and den = sqrt(<R, R> <T, T> + e)

    P = c (T/den - <R, T> <T, T>/den^3 R),  W = P - c (sum P C) / (<C, C> + e') C
    V_ij = 2 W_ij / D_ij,                   0 on the diagonal and where D_ij = 0

and with respect to the features it is diag(V 1) X - V X: linear in X, so its spatial mean, which
is all a channel weight is, needs only the pooled activations.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastxkd.cam.capture import Layers, Tap, evaluating, resolve_layers
from fastxkd.cam.maps import Normalize, maps_of_layers
from fastxkd.metrics.similarity import LayerScores, label_embeddings, layer_scores
from fastxkd.ops.distance import distance_matrix

SCORE_EPS = 1e-18
PROJECTION_EPS = 1e-12


class UniCAMOutput(NamedTuple):
    """Maps ``[n, height, width]`` and, per layer, FSS and RS of the same batch."""

    distilled: Tensor
    residual: Tensor
    scores: list[LayerScores]


def _u_centred(d: Tensor) -> Tensor:
    n = d.shape[0]
    rows = d.sum(1)
    centred = d - (rows[:, None] + rows[None, :]) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return centred.fill_diagonal_(0)


def _pair_weights(d: Tensor, base: Tensor, labels: Tensor) -> Tensor:
    """V of the module's text: ``[n, n]``, in float64 whatever the distances are in."""
    n = d.shape[0]
    scale = 1 / (n * (n - 3))
    a, c, t = _u_centred(d), _u_centred(base), _u_centred(labels)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return scale * (x * y).sum()

    projection = inner(c, c) + PROJECTION_EPS
    r = a - inner(a, c) / projection * c
    rt, tt = inner(r, t), inner(t, t)
    den = (inner(r, r) * tt + SCORE_EPS).sqrt()
    p = scale * (t / den - rt * tt / den**3 * r)
    w = p - scale * (p * c).sum() / projection * c
    return torch.where(d == 0, 0, 2 * w / d.where(d != 0, 1)).fill_diagonal_(0)


def unicam_weights(activations: Tensor, base_features: Tensor, targets: Tensor) -> Tensor:
    r"""Channel weights of UniCAM: the spatial mean of :math:`dJ/dA`, without autograd.

    J is the semi-partial distance correlation :math:`P_{DC}(A | base; targets)` of the batch
    (Adhane et al. 2025), features being the flattened activations.

    Args:
        activations: ``[n, c, h, w]`` of the explained model, n >= 4.
        base_features: ``[n, ...]`` of the model that is taken out.
        targets: class indices ``[n]`` or embeddings ``[n, e]``.

    Returns:
        ``[n, c]`` in the dtype of the activations (float32 for 16-bit ones). All zero where every
        label is the same: there is nothing to be relevant to.

    Raises:
        ValueError, TypeError: fewer than 4 samples, rows that do not match.
    """
    if activations.dim() != 4:
        raise ValueError(
            "activations: expected spatial maps [n, channels, height, width], got"
            f" {list(activations.shape)}"
        )
    labels = label_embeddings(targets)
    names = ["activations", "base_features", "targets"]
    distances = [
        distance_matrix(x, name, rows=activations.shape[0]).double()
        for x, name in zip((activations, base_features, labels), names, strict=True)
    ]
    return _channel_weights(activations, *distances)


def _channel_weights(activations: Tensor, d: Tensor, base: Tensor, labels: Tensor) -> Tensor:
    exact = torch.float64 if activations.dtype == torch.float64 else torch.float32
    pair = _pair_weights(d, base, labels)
    pooled = activations.mean((2, 3), dtype=exact).double()  # [n, c]
    return (pair.sum(1, keepdim=True) * pooled - pair @ pooled).to(exact)


class UniCAM:
    """What is in the student because of its teacher (distilled), and what only the base has
    (residual), as maps and numbers (Adhane et al. 2025).

    The base is the student's architecture trained without the teacher. A map shows where the part
    of a model's features that the other model does not have is related to the labels. It depends
    on the batch: distances are between its images; take at least a few dozen, of several classes.

    Args:
        student, base: the two models; run without gradients in eval mode, and left as they were.
        target_layers: layers of the student, names or modules, with spatial activations.
        base_layers: the base's layers to pair them with, in order; by default the same names.

    >>> import torch, fastxkd
    >>> def net():
    ...     return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU())
    >>> unicam = UniCAM(net(), net(), target_layers=["1"])
    >>> out = unicam(torch.rand(8, 1, 12, 12), torch.arange(8) % 2)
    >>> out.distilled.shape, out.residual.shape, out.scores[0].layer
    (torch.Size([8, 12, 12]), torch.Size([8, 12, 12]), '1')
    """

    def __init__(
        self,
        student: nn.Module,
        base: nn.Module,
        target_layers: Layers,
        base_layers: Layers | None = None,
    ) -> None:
        self.student = student
        self.base = base
        self.target_layers = resolve_layers(student, target_layers, "target_layers")
        paired = list(self.target_layers) if base_layers is None else base_layers
        self.base_layers = resolve_layers(base, paired, "base_layers")
        if len(self.target_layers) != len(self.base_layers):
            raise ValueError(
                f"base_layers: expected {len(self.target_layers)} to pair with target_layers,"
                f" got {len(self.base_layers)}"
            )

    def __call__(
        self,
        images: Tensor,
        labels_or_embeddings: Tensor,
        *,
        size: Literal["input"] | tuple[int, int] | None = "input",
        normalize: Normalize = "minmax",
    ) -> UniCAMOutput:
        """Explain a batch.

        Args:
            images: ``[n, channels, height, width]``, n >= 4.
            labels_or_embeddings: class indices ``[n]`` or embeddings of the labels ``[n, e]``.
            size, normalize: as in :class:`fastxkd.GradCAM`.

        Raises:
            ValueError, TypeError: fewer than 4 images, labels that do not match, a layer that is
                never reached or has no spatial axes.
        """
        if not isinstance(images, Tensor):
            raise TypeError(f"images: expected a Tensor, got {type(images).__name__}")
        if images.dim() < 3 or images.shape[0] < 4:
            raise ValueError(
                "images: expected a batch [n, channels, height, width] of at least 4,"
                f" got {list(images.shape)}"
            )
        labels = label_embeddings(labels_or_embeddings, name="labels_or_embeddings")
        with torch.inference_mode(False), torch.no_grad():
            student = _activations(self.student, self.target_layers, images)
            base = _activations(self.base, self.base_layers, images)
            rows = images.shape[0]
            d_labels = distance_matrix(labels, "labels_or_embeddings", rows=rows).double()
            distilled, residual = [], []
            for (name, a), (base_name, b) in zip(student.items(), base.items(), strict=True):
                for layer, activation in ((name, a), (base_name, b)):
                    if activation.dim() != 4:
                        raise ValueError(
                            f"target layer {layer!r}: expected spatial activations [n, channels,"
                            f" height, width], got {list(activation.shape)}"
                        )
                d_student = distance_matrix(a, name, rows=rows).double()
                d_base = distance_matrix(b, base_name, rows=rows).double()
                distilled.append(_channel_weights(a, d_student, d_base, d_labels).to(a.dtype))
                residual.append(_channel_weights(b, d_base, d_student, d_labels).to(b.dtype))
            height, width = images.shape[-2:]
            out_size = (height, width) if size == "input" else size
            distilled_map, residual_map = (
                maps_of_layers(
                    list(layers),
                    list(layers.values()),
                    list(weights),
                    method="weights",
                    size=out_size,
                    normalize=normalize,
                    aggregate="mean",
                )
                for layers, weights in ((student, distilled), (base, residual))
            )
            return UniCAMOutput(distilled_map, residual_map, layer_scores(student, base, labels))


def _activations(
    model: nn.Module, layers: dict[str, nn.Module], images: Tensor
) -> dict[str, Tensor]:
    with evaluating(model), Tap(layers, cut=False, one_pass=True) as tap:
        model(images)
    return tap.reached()
