"""What the operators are held to: the papers' formulas written out, in the dtype of the input.

Called with float64 tensors these are the truth; called with the tested dtype they are the eager
computation whose error a kernel may not exceed. Nothing here imports the library.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def _without_masked(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per row, classes without probability in p left out."""
    masked = log_p == -torch.inf
    pointwise = F.kl_div(
        log_q.masked_fill(masked, 0),
        log_p.masked_fill(masked, 0),
        reduction="none",
        log_target=True,
    )
    return pointwise.masked_fill(masked, 0).sum(1)


def soft_rows(
    s: Tensor, t: Tensor, labels: Tensor | None, divergence: str, alpha: float, beta: float
) -> Tensor:
    """The divergence of each row, of logits already divided by the temperature."""
    if divergence == "dkd":
        assert labels is not None
        rows, classes = s.shape
        others = F.one_hot(labels, classes) == 0
        picked = [x.gather(1, labels[:, None]) for x in (s, t)]
        rest = [x[others].view(rows, classes - 1) for x in (s, t)]
        pairs = [
            F.log_softmax(torch.cat([p, torch.logsumexp(r, 1, keepdim=True)], 1), 1)
            for p, r in zip(picked, rest, strict=True)
        ]
        target = _without_masked(pairs[1], pairs[0])
        if classes == 1:
            return alpha * target
        among = _without_masked(F.log_softmax(rest[1], 1), F.log_softmax(rest[0], 1))
        return alpha * target + beta * among
    log_q, log_p = F.log_softmax(s, 1), F.log_softmax(t, 1)
    if divergence == "forward_kl":
        return _without_masked(log_p, log_q)
    if divergence == "reverse_kl":
        return _without_masked(log_q, log_p)
    if divergence == "jsd":
        weights = torch.tensor([beta, 1 - beta], dtype=s.dtype).log()
        both = torch.stack([log_p + weights[0], log_q + weights[1]])
        # logsumexp of nothing but -inf has no gradient; such a class has no say.
        nowhere = (both == -torch.inf).all(0)
        log_m = torch.logsumexp(both.masked_fill(nowhere, 0), 0).masked_fill(nowhere, 0)
        return beta * _without_masked(log_p, log_m) + (1 - beta) * _without_masked(log_q, log_m)
    assert divergence == "tvd"
    return (log_p.exp() - log_q.exp()).abs().sum(1) / 2


def kd_parts(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    divergence: str = "forward_kl",
    alpha: float = 1.0,
    beta: float = 0.5,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> tuple[Tensor, Tensor]:
    """(hard, soft) with their weights, differentiable by autograd."""
    rows = student.shape[0]
    keep = torch.arange(rows) if labels is None else (labels != ignore_index).nonzero()[:, 0]
    s, t = student[keep], teacher[keep]
    y = None if labels is None else labels[keep]
    on_row = s.new_ones(len(keep)) if row_weight is None else row_weight[keep].to(s.dtype)
    hard = s.new_zeros(len(keep))
    weights = on_row
    if y is not None:
        weight = None if class_weight is None else class_weight.to(s.dtype)
        weights = weights if weight is None else weight[y] * on_row
        hard = on_row * F.cross_entropy(
            s, y, weight=weight, label_smoothing=label_smoothing, reduction="none"
        )
    value = soft_rows(s / temperature, t / temperature, y, divergence, alpha, beta)
    hard, soft = ce_weight * hard, kd_weight * temperature**2 * on_row * value
    if reduction == "none":
        place = student.new_zeros(rows)
        return place.index_add(0, keep, hard), place.index_add(0, keep, soft)
    hard, soft = hard.sum(), soft.sum()
    if reduction == "batchmean":
        hard = hard / weights.sum() if weights.sum() > 0 else hard * 0
        soft = soft / on_row.sum() if on_row.sum() > 0 else soft * 0
    return hard, soft


def cam_raw(activations: Tensor, gradients: Tensor, method: str) -> Tensor:
    """The table of methods, one image at a time."""
    maps = []
    for a, g in zip(activations, gradients, strict=True):  # [c, h, w]
        total = a.sum((1, 2), keepdim=True)
        if method == "weights":
            weight = g[:, None, None]
        elif method == "gradcam":
            weight = g.mean((1, 2), keepdim=True)
        elif method == "xgradcam":
            weight = (g * a).sum((1, 2), keepdim=True) / (total + 1e-7)
        elif method == "gradcam++":
            alpha = (g**2 / (2 * g**2 + total * g**3 + 1e-6)).masked_fill(g == 0, 0)
            weight = (F.relu(g) * alpha).sum((1, 2), keepdim=True)
        elif method == "hirescam":
            weight = g
        elif method == "elementwise":
            maps.append(sum(F.relu(g * a).unbind(0)))
            continue
        else:
            weight = F.relu(g)
        maps.append(sum((weight * a).unbind(0)))  # one channel after the other
    return torch.stack(maps)


def _min_max(m: Tensor) -> Tensor:
    shifted = m - m.min()
    return shifted / (1e-7 + shifted.max())


def cam_finish(raw: Tensor, size: tuple[int, int], relu: bool, normalize: int) -> Tensor:
    finished = []
    for m in raw:
        m = F.relu(m) if relu else m
        m = _min_max(m) if normalize >= 1 else m
        if tuple(m.shape) != tuple(size):
            m = F.interpolate(m[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        finished.append(_min_max(m) if normalize == 2 else m)
    return torch.stack(finished)


def distances(x: Tensor) -> Tensor:
    """n x n x d broadcast; the square root is kept off its pole so that autograd gives 0 there."""
    x = x.flatten(1)
    square = (x[:, None, :] - x[None, :, :]).square().sum(2)
    apart = square > 0
    return torch.where(apart, square.where(apart, 1.0).sqrt(), 0.0)


def u_centred(d: Tensor) -> Tensor:
    n = d.shape[0]
    rows = d.sum(1, keepdim=True)
    p = d - rows / (n - 2) - rows.T / (n - 2) + d.sum() / ((n - 1) * (n - 2))
    return p * (1 - torch.eye(n, dtype=d.dtype))


def double_centred(d: Tensor) -> Tensor:
    return d - d.mean(0, keepdim=True) - d.mean(1, keepdim=True) + d.mean()


def inner(p: Tensor, q: Tensor) -> Tensor:
    n = p.shape[0]
    return (p * q).sum() / (n * (n - 3))


def _cosine(p: Tensor, q: Tensor) -> Tensor:
    return (p * q).sum() / ((p * p).sum() * (q * q).sum()).sqrt()


def _without(p: Tensor, q: Tensor) -> Tensor:
    return p - (p * q).sum() / (q * q).sum() * q


def correlation(x: Tensor, y: Tensor, *, unbiased: bool) -> Tensor:
    centre = u_centred if unbiased else double_centred
    return _cosine(centre(distances(x)), centre(distances(y)))


def partial(x: Tensor, y: Tensor, given: Tensor, *, semi: bool) -> Tensor:
    """P_DC(x | given; y), or the textbook pdcor, which projects y as well."""
    a, b, c = (u_centred(distances(m)) for m in (x, y, given))
    return _cosine(_without(a, c), b if semi else _without(b, c))


def unicam_weights(activations: Tensor, base: Tensor, labels: Tensor) -> Tensor:
    """The published way: autograd through the broadcast, then the spatial mean."""
    leaf = activations.detach().requires_grad_(True)
    a, c, t = (u_centred(distances(m)) for m in (leaf, base, labels))
    r = a - inner(a, c) / (inner(c, c) + 1e-12) * c
    score = inner(r, t) / (inner(r, r) * inner(t, t) + 1e-18).sqrt()
    return torch.autograd.grad(score, leaf)[0].mean((2, 3))


def resized(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear with half-pixel centres, along the rows first, in the dtype of the map."""
    for axis, length in ((1, size[1]), (0, size[0])):
        last, pieces = plane.shape[axis] - 1, []
        for i in range(length):
            at = max(Fraction(2 * i + 1, 2) * (last + 1) / length - Fraction(1, 2), Fraction(0))
            low = int(at)
            a, b = plane.take(low, axis), plane.take(min(low + 1, last), axis)
            pieces.append(a + plane.dtype.type(float(at - low)) * (b - a))
        plane = np.stack(pieces, axis)
    return plane


def concept_tallies(
    activations: np.ndarray,
    thresholds: np.ndarray,
    masks: np.ndarray,
    labels: np.ndarray,
    categories: np.ndarray,
    kinds: int,
    resize: Callable[[np.ndarray, tuple[int, int]], np.ndarray] = resized,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Network dissection's sums, image after image and unit after unit: intersections, areas of
    the units by category, areas of the labels."""
    units, count = activations.shape[1], len(categories)
    intersections = np.zeros((units, count), np.int64)
    areas, label_areas = np.zeros((units, kinds), np.int64), np.zeros(count, np.int64)
    for maps, layers, given in zip(activations, masks, labels, strict=True):
        size = layers.shape[1], layers.shape[2]
        given = given[given > 0]
        for label in given:
            label_areas[label] += size[0] * size[1]
        if len(layers):
            seen = np.bincount(layers.ravel(), minlength=count)
            label_areas[1:] += seen[1:]
        for unit, plane in enumerate(maps):
            if not plane.max() > thresholds[unit]:
                continue
            above = resize(plane, size) > thresholds[unit]
            found = np.bincount(layers[:, above].ravel(), minlength=count)
            found[0] = 0
            kind_seen = {categories[c] for c in [*found.nonzero()[0], *given]}
            for label in given:
                found[label] += above.sum()
            intersections[unit] += found
            for kind in kind_seen:
                areas[unit, kind] += above.sum()
    return intersections, areas, label_areas


def peak_bytes(work: Callable[[], object]) -> int:
    """Peak of what ``work`` has allocated through torch at one time."""
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
