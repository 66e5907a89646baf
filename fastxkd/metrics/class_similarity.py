"""Which classes a model takes for alike, and how much of that its answers say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastxkd.metrics._maps import exact_dtype
from fastxkd.ops._checks import (
    check_choice,
    check_classes,
    check_counts,
    check_flags,
    check_float,
    check_labels,
    check_positive,
)

Groups = Tensor | Sequence[int]
UNITS = ("nats", "bits")
SIMILARITIES = ("probability", "correlation")
LINKAGES = ("average", "complete", "single")


def group_entropy(
    logits: Tensor,
    labels: Tensor | None = None,
    groups: Groups | None = None,
    *,
    drop_true_class: bool = False,
    unit: str = "nats",
) -> Tensor:
    r"""Entropy of each answer within the group of its true class (Han et al., ICML 2023).

    .. math:: q_k = softmax(z)_k / \sum_{j \in g(y)} softmax(z)_j,\quad
        H = -\sum_{k \in g(y)} q_k \ln q_k

    A model that knows which classes are alike spreads its answer over them: the entropy is high,
    at most :math:`\ln |g|`. The paper gives the number and no formula: this one is our reading of
    it, and so are the groups.

    Args:
        logits: ``[n, classes]``.
        labels: int64 ``[n]``, the true classes; needed with ``groups`` and ``drop_true_class``.
        groups: the group of each class, ``[classes]`` integers: superclasses that are known, or
            those of :func:`class_groups`. None: all classes are one group, which gives the plain
            entropy of the softmax, to be reported next to it.
        drop_true_class: leave the true class out before the rest is scaled to 1: what is left is
            dark knowledge alone, however sure the model is. An interpretation.
        unit: ``"nats"`` (natural logarithm) or ``"bits"``: the paper does not say; its 2.9 need
            groups of 19 classes in nats and of 8 in bits.

    Returns:
        ``[n]``, float32, float64 for float64. 0 where at most one class is left. NaN in a group's
        logits is NaN in its row and in no other. No gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes, labels or groups that do not fit.

    >>> import torch
    >>> logits = torch.tensor([[2.0, 2.0, 9.0], [0.0, 0.0, 1.0]])
    >>> group_entropy(logits, torch.tensor([0, 2]), [0, 0, 1], unit="bits")
    tensor([1., 0.])
    """
    check_entropy_options(drop_true_class, unit)
    _check_answers(logits)
    classes = logits.shape[1]
    inside = torch.ones(logits.shape, dtype=torch.bool, device=logits.device)
    if labels is None:
        if groups is not None or drop_true_class:
            raise ValueError("labels: expected the true classes, with groups and drop_true_class")
    else:
        check_labels(labels, "logits", logits)
        check_classes(labels, classes)
        if groups is not None:
            group = check_groups(groups, classes).to(logits.device)
            inside = group[labels][:, None] == group
        if drop_true_class:
            inside = inside.scatter(1, labels[:, None], False)
    # A group that is all but impossible has probabilities of 0; its logits still differ.
    within = logits.detach().double().masked_fill(~inside, -torch.inf).softmax(1)
    entropy = torch.special.entr(within).sum(1).where(inside.any(1), 0)
    if unit == "bits":
        entropy = entropy / math.log(2)
    return entropy.to(exact_dtype(logits))


def check_entropy_options(drop_true_class: bool, unit: str) -> None:
    check_flags(drop_true_class=drop_true_class)
    check_choice("unit", unit, UNITS)


def check_groups(groups: Any, classes: int | None = None) -> Tensor:
    """int64 ``[classes]``."""
    if not isinstance(groups, Tensor):
        if not isinstance(groups, Sequence) or not all(
            type(group) is int and abs(group) < 2**63 for group in groups
        ):
            raise TypeError("groups: expected an integer (int64) for each class")
        groups = torch.tensor(list(groups), dtype=torch.int64)
    if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise TypeError(f"groups: expected integers, got {groups.dtype}")
    if groups.dim() != 1 or (classes is not None and len(groups) != classes):
        raise ValueError(
            f"groups: expected [{'classes' if classes is None else classes}], one for each class,"
            f" got {list(groups.shape)}"
        )
    return groups.long()


def class_similarity(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    kind: str = "probability",
    temperature: float = 1.0,
) -> Tensor:
    """How alike the classes are to a model, by its answers to a data set.

    Args:
        logits: ``[n, classes]``, all answers.
        labels: int64 ``[n]``, the true classes; needed for ``"probability"``, where each class
            needs an image.
        kind: an interpretation, as the paper names none. ``"probability"``: the mean probability
            that images of one class have of the other, the mean of both directions.
            ``"correlation"``: Pearson's of the two classes' logits over all images; 0 where they
            are constant.
        temperature: of the softmax of ``"probability"``; above 1 the small ones count more.

    Returns:
        ``[classes, classes]``, float64, symmetric.

    Raises:
        ValueError, TypeError: shapes, dtypes or labels that do not fit, a class without images.

    >>> import torch
    >>> logits = torch.tensor([[0.6, 0.4, 0.0], [0.4, 0.6, 0.0], [0.0, 0.0, 1.0]]).log()
    >>> class_similarity(logits, torch.arange(3))
    tensor([[0.6000, 0.4000, 0.0000],
            [0.4000, 0.6000, 0.0000],
            [0.0000, 0.0000, 1.0000]], dtype=torch.float64)
    """
    check_choice("kind", kind, SIMILARITIES)
    check_positive(temperature=temperature)
    _check_answers(logits)
    answers, classes = logits.detach().double(), logits.shape[1]
    if kind == "correlation":
        # A constant column minus its mean is rounding; minus its first value it is 0.
        answers = answers - answers[:1]
        answers = answers - answers.mean(0)
        lengths = answers.norm(dim=0)
        answers = answers / lengths.where(lengths > 0, 1)
        return _symmetric(answers.T @ answers)
    if labels is None:
        raise ValueError("labels: expected the true classes, with kind='probability'")
    check_labels(labels, "logits", logits)
    check_classes(labels, classes)
    images = labels.bincount(minlength=classes)
    if bool((images == 0).any()):
        raise ValueError(
            "labels: expected an image of each class, for kind='probability',"
            f" got none of class {int((images == 0).nonzero()[0])}"
        )
    total = answers.new_zeros(classes, classes)
    total.index_add_(0, labels, (answers / temperature).softmax(1))
    return _symmetric(total / images[:, None])


def class_groups(similarity: Tensor, count: int, *, linkage: str = "average") -> Tensor:
    """Groups of classes that are alike, by agglomerative clustering.

    The two most similar groups become one, until ``count`` are left; of equally similar pairs the
    first in reading order, so that the same similarities always give the same groups.

    Args:
        similarity: ``[classes, classes]``, symmetric, e.g. of :func:`class_similarity`; the
            diagonal is not looked at.
        count: of groups.
        linkage: how similar two groups are: by the mean over pairs of their classes
            (``"average"``), the least (``"complete"``) or the greatest (``"single"``).

    Returns:
        int64 ``[classes]`` on the CPU: 0 for the group of class 0, and so on in the order of the
        groups' first classes.

    Raises:
        ValueError, TypeError: a matrix that is not square, symmetric and finite; more groups
            than classes.

    >>> import torch
    >>> alike = torch.tensor([[1.0, 0.1, 0.5], [0.1, 1.0, 0.2], [0.5, 0.2, 1.0]])
    >>> class_groups(alike, 2)
    tensor([0, 1, 0])
    """
    check_choice("linkage", linkage, LINKAGES)
    check_counts(count=count)
    check_float("similarity", similarity)
    classes = len(similarity)
    if similarity.dim() != 2 or similarity.shape[1] != classes or classes == 0:
        raise ValueError(f"similarity: expected [classes, classes], got {list(similarity.shape)}")
    if count > classes:
        raise ValueError(f"count: expected at most the {classes} classes, got {count}")
    alike = similarity.detach().double().cpu().clone()
    if not torch.isfinite(alike).all() or not torch.allclose(alike, alike.T):
        raise ValueError("similarity: expected a symmetric matrix of finite numbers")
    alike.fill_diagonal_(-torch.inf)
    group, sizes = torch.arange(classes), torch.ones(classes, dtype=torch.float64)
    for _ in range(classes - count):
        # The matrix is symmetric: the first of equal pairs has its lower number first.
        kept, gone = divmod(int(alike.argmax()), classes)
        kept, gone = min(kept, gone), max(kept, gone)
        a, b = alike[kept], alike[gone]
        if linkage == "average":
            joined = (sizes[kept] * a + sizes[gone] * b) / (sizes[kept] + sizes[gone])
        else:
            joined = torch.minimum(a, b) if linkage == "complete" else torch.maximum(a, b)
        joined[kept] = -torch.inf
        alike[kept] = alike[:, kept] = joined
        alike[gone] = alike[:, gone] = -torch.inf
        sizes[kept] += sizes[gone]
        group[group == gone] = kept
    # A group goes by its lowest class, so sorting them numbers the groups by their first.
    return torch.unique(group, return_inverse=True)[1]


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _check_answers(logits: Any) -> None:
    check_float("logits", logits)
    if logits.dim() != 2 or logits.numel() == 0:
        raise ValueError(
            f"logits: expected [n, classes] with none of them 0, got {list(logits.shape)}"
        )
