"""docs/losses.md: every line that it tells to write, run as it stands, against the loss that it
replaces.

The formulas of the other projects are written out here, each from its definition.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastxkd.losses

PAGE = (Path(__file__).parents[1] / "docs" / "losses.md").read_text()
ROW = re.compile(r'^\| <a id="([\w-]+)"></a>.+? \| `([^`]+)` \| .+ \|$', re.MULTILINE)
LINES = dict(ROW.findall(PAGE))

Names = dict[str, Any]
Formula = Callable[..., Tensor]
FORMULAS: dict[str, tuple[Callable[[], Names], Formula, float]] = {}
CASES: list[Any] = []


def row(
    name: str, given: Callable[[], Names], rtol: float = 1e-9, **values: list[Any]
) -> Callable[[Formula], Formula]:
    """Register a formula for a row of the page, once for each of the values of a name."""

    def register(formula: Formula) -> Formula:
        assert name not in FORMULAS, name
        FORMULAS[name] = (given, formula, rtol)
        ((key, settings),) = values.items() or {"": [None]}.items()
        CASES.extend(
            pytest.param(name, {key: value} if key else {}, id=f"{name}-{value}" if key else name)
            for value in settings
        )
        return formula

    return register


# --- what the page's names stand for


def double(*shape: int, grad: bool = False) -> Tensor:
    return (2 * torch.randn(*shape, dtype=torch.float64)).requires_grad_(grad)


def classes() -> Names:
    s, t = double(6, 7, grad=True), double(6, 7)
    y = torch.tensor([0, 3, 6, 2, 3, 1])
    weights = torch.rand(6, dtype=torch.float64) + 0.1
    return {
        "s": s,
        "t": t,
        "y": y,
        "nothing": torch.full_like(y, -100),
        "C": 7,
        "T": 2.5,
        "a": 0.3,
        "b": 0.6,
        "e": 0.1,
        "w": torch.rand(7, dtype=torch.float64) + 0.1,
        "epoch": 5,
        "s_kd": double(6, 7, grad=True),
        "base": F.cross_entropy(s, y, label_smoothing=0.1),
        "mask": torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.float64),
        "weights": weights,
        "items": 24,
    }


def some_ignored() -> Names:
    given = classes()
    given["y"][[1, 4]] = -100
    return given


def tokens() -> Names:
    y = torch.randint(11, (2, 5))
    y[0, :3] = y[1, 4] = -100
    values, idx = double(2, 5, 11).log_softmax(-1).topk(3)
    return {
        "s": double(2, 5, 11, grad=True),
        "t": double(2, 5, 11),
        "y": y,
        "T": 2.5,
        "b": 0.3,
        "values": values,
        "idx": idx,
        "m": values.exp().sum(-1),
    }


def heads() -> Names:
    y = torch.randint(11, (9,))
    y[[0, 5]] = -100
    return {
        "hs": double(9, 4, grad=True),
        "ws": double(11, 4, grad=True),
        "ht": double(9, 6),
        "wt": double(11, 6),
        "y": y,
        "T": 2.5,
        "b": 0.3,
        "hard": 0.5,
        "soft": 0.7,
    }


def features() -> Names:
    return {
        "fs": double(5, 4, 8, 8, grad=True),
        "ft": double(5, 6, 4, 4),
        "layers_s": [double(5, 4, 8, 8, grad=True), double(5, 6, 4, 4, grad=True)],
        "layers_t": [double(5, 6, 4, 4), double(5, 9, 4, 4)],
        "regress": nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU()).double(),
        "vid": fastxkd.losses.VIDLoss(4, 6).double(),
    }


# --- classification


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def soft_kl(s: Tensor, t: Tensor, T: float) -> Tensor:
    """Of each row, teacher against student, both softened."""
    return kl((t / T).log_softmax(-1), (s / T).log_softmax(-1))


def label_ce(s: Tensor, y: Tensor) -> Tensor:
    return -s.log_softmax(-1)[torch.arange(len(y)), y]


@row("hinton", classes)
def hinton(s: Tensor, t: Tensor, y: Tensor, T: float, a: float) -> Tensor:
    return a * label_ce(s, y).mean() + (1 - a) * T**2 * soft_kl(s, t, T).mean()


@row("alpha-is-soft", classes)
def alpha_is_soft(s: Tensor, t: Tensor, y: Tensor, T: float, a: float) -> Tensor:
    return a * T**2 * soft_kl(s, t, T).mean() + (1 - a) * label_ce(s, y).mean()


@row("mean", classes)
def mean(s: Tensor, t: Tensor, y: Tensor, T: float, a: float) -> Tensor:
    p, q = ((x / T).log_softmax(1) for x in (t, s))
    pointwise = p.exp() * (p - q)
    return a * T**2 * pointwise.mean() + (1 - a) * label_ce(s, y).mean()


@row("no-t2", classes)
def without_t2(s: Tensor, t: Tensor, y: Tensor, T: float, a: float) -> Tensor:
    return a * label_ce(s, y).mean() + (1 - a) * soft_kl(s, t, T).mean()


@row("swapped", classes)
def swapped(s: Tensor, t: Tensor, T: float) -> Tensor:
    given, target = (t / T).log_softmax(1), (s / T).softmax(1)
    return T**2 * F.kl_div(given, target, reduction="batchmean")


@row("torchdistill", classes)
def torchdistill(s: Tensor, t: Tensor, y: Tensor, T: float, a: float, b: float) -> Tensor:
    return a * label_ce(s, y).mean() + b * T**2 * soft_kl(s, t, T).mean()


@row("torchdistill-soft", classes)
def torchdistill_without_labels(s: Tensor, t: Tensor, T: float) -> Tensor:
    return soft_kl(s, t, T).mean()


@row("mdistiller", classes)
def mdistiller(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return 0.1 * label_ce(s, y).mean() + 0.9 * 16 * soft_kl(s, t, 4).mean()


@row("dkd", classes, epoch=[0, 5, 40])
def dkd(s: Tensor, t: Tensor, y: Tensor, epoch: int) -> Tensor:
    target, others = [], []
    for student, teacher, label in zip(s / 4, t / 4, y, strict=True):
        p, q = teacher.softmax(0), student.softmax(0)
        sides = [torch.stack([x[label], 1 - x[label]]).log() for x in (p, q)]
        rest = [torch.cat([x[:label], x[label + 1 :]]).log_softmax(0) for x in (teacher, student)]
        target.append(kl(*sides))
        others.append(kl(*rest))
    decoupled = 1 * torch.stack(target).mean() + 8 * torch.stack(others).mean()
    return label_ce(s, y).mean() + min(epoch / 20, 1) * 16 * decoupled


@row("dist", classes, T=[1.0, 4.0])
def dist(s: Tensor, t: Tensor, y: Tensor, T: float) -> Tensor:
    def correlations(x: Tensor, z: Tensor) -> Tensor:
        x, z = (m - m.mean(1, keepdim=True) for m in (x, z))
        return (x * z).sum(1) / (x.norm(dim=1) * z.norm(dim=1) + 1e-8)

    q, p = (s / T).softmax(1), (t / T).softmax(1)
    inter, intra = (1 - correlations(x, z).mean() for x, z in ((q, p), (q.T, p.T)))
    return label_ce(s, y).mean() + 2 * T**2 * (1 * inter + 1 * intra)


@row("ce-options", some_ignored)
def ce_options(s: Tensor, t: Tensor, y: Tensor, T: float, a: float, w: Tensor, e: float) -> Tensor:
    counts = y != -100
    s, t, y = s[counts], t[counts], y[counts]
    wrong = -s.log_softmax(1)
    rows = (1 - e) * w[y] * wrong[torch.arange(len(y)), y] + e / s.shape[1] * (w * wrong).sum(1)
    return a * rows.sum() / w[y].sum() + (1 - a) * T**2 * soft_kl(s, t, T).mean()


@row("deit-soft", classes)
def deit_soft(base: Tensor, s_kd: Tensor, t: Tensor, T: float, a: float) -> Tensor:
    soft = soft_kl(s_kd, t, T).sum() * T**2 / s_kd.numel()
    return (1 - a) * base + a * soft


@row("deit-hard", classes)
def deit_hard(base: Tensor, s_kd: Tensor, t: Tensor, a: float) -> Tensor:
    return (1 - a) * base + a * label_ce(s_kd, t.max(1).indices).mean()


# --- language models


def generalized_jsd(s: Tensor, t: Tensor, T: float, b: float) -> Tensor:
    """Of each row; the mixture in log space, its ends the two KLs."""
    log_p, log_q = (t / T).log_softmax(-1), (s / T).log_softmax(-1)
    if b == 0:
        return kl(log_p, log_q)
    if b == 1:
        return kl(log_q, log_p)
    shares = torch.tensor([b, 1 - b], dtype=s.dtype).log()
    log_m = torch.logaddexp(log_p + shares[0], log_q + shares[1])
    return b * kl(log_p, log_m) + (1 - b) * kl(log_q, log_m)


EDGES = [0.0, 0.3, 0.5, 1.0]


@row("trl-gkd", tokens, b=EDGES)
def trl_gkd(s: Tensor, t: Tensor, y: Tensor, T: float, b: float) -> Tensor:
    counts = y != -100
    return generalized_jsd(s, t, T, b)[counts].sum() / counts.sum()


@row("trl-no-labels", tokens, b=EDGES)
def trl_without_labels(s: Tensor, t: Tensor, T: float, b: float) -> Tensor:
    return generalized_jsd(s, t, T, b).sum() / len(s)


@row("liger-kl", tokens)
def liger_kl(s: Tensor, t: Tensor) -> Tensor:
    given, target = s.log_softmax(-1), t.softmax(-1)
    return (target * (target.log() - given)).sum() / (s.shape[0] * s.shape[1])


@row("liger-jsd", tokens, b=EDGES)
def liger_jsd(s: Tensor, t: Tensor, y: Tensor, b: float) -> Tensor:
    x, target = s.log_softmax(-1), t.log_softmax(-1)
    p, q = target.exp(), x.exp()
    m = b * p + (1 - b) * q
    ends = {0.0: kl(target, x), 1.0: kl(x, target)}
    rows = ends.get(b, (b * p * target + (1 - b) * q * x - m * m.log()).sum(-1))
    return (rows * (y != -100)).sum() / (y != -100).sum()


@row("liger-tvd", tokens)
def liger_tvd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    apart = 0.5 * (s.softmax(-1) - t.softmax(-1)).abs().sum(-1)
    return (apart * (y != -100)).sum() / (y != -100).sum()


@row("log-probs", tokens)
def log_probs(s: Tensor, t: Tensor, y: Tensor, T: float) -> Tensor:
    softened = t.softmax(-1) ** (1 / T)
    p = softened / softened.sum(-1, keepdim=True)
    return T**2 * kl(p.log(), (s / T).log_softmax(-1))[y != -100].mean()


@row("top-k", tokens)
def top_k(s: Tensor, values: Tensor, idx: Tensor, T: float) -> Tensor:
    log_p = values / T - (values / T).logsumexp(-1, keepdim=True)
    log_q = s.gather(-1, idx) / T - (s / T).logsumexp(-1, keepdim=True)
    return T**2 * kl(log_p, log_q).mean()


@row("top-k-both", tokens)
def top_k_both(s: Tensor, values: Tensor, idx: Tensor, T: float) -> Tensor:
    picked = s.take_along_dim(idx, -1)
    return T**2 * kl((values / T).log_softmax(-1), (picked / T).log_softmax(-1)).mean()


@row("top-k-raw", tokens)
def top_k_raw(s: Tensor, values: Tensor, idx: Tensor) -> Tensor:
    log_q = s.log_softmax(-1).gather(-1, idx)
    return (values.exp() * (values - log_q)).sum(-1).mean()


@row("liger-linear-jsd", heads, b=EDGES)
def liger_linear_jsd(
    hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor, y: Tensor, T: float, b: float
) -> Tensor:
    rows = generalized_jsd(hs @ ws.T, ht @ wt.T, T, b)
    return rows[y != -100].sum() / (y != -100).sum()


@row("liger-chunked-jsd", heads, b=EDGES)
def liger_chunked_jsd(
    hs: Tensor,
    ws: Tensor,
    ht: Tensor,
    wt: Tensor,
    y: Tensor,
    T: float,
    b: float,
    hard: float,
    soft: float,
) -> Tensor:
    counts = y != -100
    ce = label_ce((hs @ ws.T)[counts], y[counts]).sum() / counts.sum()
    return hard * ce + soft * liger_linear_jsd(hs, ws, ht, wt, y, T, b)


# --- features


def smaller(*features: Tensor) -> list[Tensor]:
    size = min(f.shape[-1] for f in features)
    return [
        f.unflatten(3, (size, -1)).unflatten(2, (size, -1)).mean((3, 5)) if f.dim() > 2 else f
        for f in features
    ]


@row("fitnet", features)
def fitnet(fs: Tensor, ft: Tensor, regress: nn.Module) -> Tensor:
    return 100 * (regress(fs) - ft).square().mean()


@row("at", features)
def at(layers_s: list[Tensor], layers_t: list[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for pair in zip(layers_s, layers_t, strict=True):
        energies = [f.square().mean(1).flatten(1) for f in smaller(*pair)]
        x, z = (e / e.norm(dim=1, keepdim=True) for e in energies)
        total = total + (x - z).square().mean()
    return 1000 * total


@row("sp", features)
def sp(fs: Tensor, ft: Tensor) -> Tensor:
    grams = [f.flatten(1) @ f.flatten(1).T for f in (fs, ft)]
    x, z = (g / g.norm(dim=1, keepdim=True) for g in grams)
    return 3000 * (x - z).square().sum() / len(fs) ** 2


@row("rkd", features)
def rkd(fs: Tensor, ft: Tensor) -> Tensor:
    n = len(fs)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    distances, angles = [], []
    for f in (fs.flatten(1), ft.flatten(1)):
        d = torch.stack([(f[i] - f[j]).norm() for i, j in pairs])
        unit = {(i, j): (f[i] - f[j]) / (f[i] - f[j]).norm() for i, j in pairs}
        triples = [(i, j, k) for i, j in pairs for k in range(n) if k != j]
        distances.append(d / d.mean())
        angles.append(torch.stack([unit[i, j] @ unit[k, j] for i, j, k in triples]))
    # Of a sample and itself nothing differs; the means count it.
    far = F.smooth_l1_loss(*distances, reduction="sum") / n**2
    return 25 * far + 50 * F.smooth_l1_loss(*angles, reduction="sum") / n**3


@row("pkt", features, rtol=1e-7)
def pkt(fs: Tensor, ft: Tensor) -> Tensor:
    sides = []
    for f in (fs.flatten(1), ft.flatten(1)):
        f = f / (f.norm(dim=1, keepdim=True) + 1e-7)
        near = (f @ f.T + 1) / 2
        sides.append(near / near.sum(1, keepdim=True))
    q, p = sides
    return 30000 * (p * ((p + 1e-7) / (q + 1e-7)).log()).mean()


@row("vid", features)
def vid(fs: Tensor, ft: Tensor, vid: nn.Module) -> Tensor:
    x, target = smaller(fs, ft)
    *first, last = (p.flatten(1) for p in vid.regressor.parameters())
    for weight in first:
        x = torch.einsum("oc,nchw->nohw", weight, x).clamp_min(0)
    mu = torch.einsum("oc,nchw->nohw", last, x)
    variance = ((1 + vid.rho.exp()).log() + 1e-5)[:, None, None]
    return ((target - mu).square() / (2 * variance) + variance.log() / 2).mean()


@row("cc", features)
def cc(fs: Tensor, ft: Tensor) -> Tensor:
    kernels = []
    for f in (fs.flatten(1), ft.flatten(1)):
        cosine = F.cosine_similarity(f[:, None], f[None], dim=2)
        # The Taylor series of exp(-0.4 |x - y|^2) for x and y of length 1, up to order 2.
        kernels.append(math.exp(-0.8) * (1 + 0.8 * cosine + 0.32 * cosine**2))
    return (kernels[0] - kernels[1]).square().sum() / len(fs) ** 2


def test_the_other_correlation_is_another_loss() -> None:
    """What the page says of RepDistiller's: no factor makes the one of the other."""
    ratios = []
    for _ in range(2):
        x, z = double(5, 8), double(5, 8)
        apart = (x - z).abs()
        neighbours = (apart[:-1] * apart[1:]).sum(1).mean()
        ratios.append(neighbours / fastxkd.losses.cc_loss(x, z))
    assert abs(ratios[0] / ratios[1] - 1) > 0.1


# --- options


@row("mask", classes)
def mask_of_rows(s: Tensor, t: Tensor, T: float, mask: Tensor) -> Tensor:
    return T**2 * soft_kl(s, t, T)[mask == 1].mean()


def default_rows(s: Tensor, t: Tensor, y: Tensor, T: float) -> Tensor:
    return 0.1 * label_ce(s, y) + 0.9 * T**2 * soft_kl(s, t, T)


@row("row-weight", classes)
def row_weight(s: Tensor, t: Tensor, y: Tensor, T: float, weights: Tensor) -> Tensor:
    return (weights * default_rows(s, t, y, T)).mean()


@row("items", some_ignored)
def items_of_all_batches(s: Tensor, t: Tensor, y: Tensor, T: float, items: int) -> Tensor:
    counts = y != -100
    return default_rows(s[counts], t[counts], y[counts], T).sum() / items


@row("none", some_ignored)
def no_reduction(s: Tensor, t: Tensor, y: Tensor, T: float) -> Tensor:
    counts = y != -100
    return default_rows(s[counts], t[counts], y[counts], T).sum()


@row("all-ignored", classes)
def all_ignored(s: Tensor) -> Tensor:
    return 0 * s.sum()


# --- the page


def leaves(names: Names) -> Iterator[Tensor]:
    for value in names.values():
        if isinstance(value, nn.Module):
            yield from value.parameters()
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, Tensor) and tensor.requires_grad and tensor.is_leaf:
                yield tensor


@pytest.mark.parametrize(("name", "changed"), CASES)
def test_the_line_gives_the_same_value_and_gradient(name: str, changed: Names) -> None:
    given, formula, rtol = FORMULAS[name]
    names = given() | changed
    public = {key: getattr(fastxkd.losses, key) for key in fastxkd.losses.__all__}
    wanted = formula(**{key: names[key] for key in inspect.signature(formula).parameters})
    inputs = list(leaves(names))
    wanted_grads = torch.autograd.grad(
        wanted, inputs, allow_unused=True, materialize_grads=True, retain_graph=True
    )
    got = eval(LINES[name], public | names)
    grads = torch.autograd.grad(got, inputs, allow_unused=True, materialize_grads=True)

    assert any(g.abs().max() > 0 for g in wanted_grads) or name == "all-ignored"
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol * 1e-3)
    for grad, exact in zip(grads, wanted_grads, strict=True):
        scale = exact.abs().max().item()
        torch.testing.assert_close(grad, exact, rtol=rtol, atol=rtol * max(scale, 1e-3))


def test_every_row_has_a_test_and_every_test_a_row() -> None:
    anchors = re.findall(r'<a id="([^"]*)">', PAGE)
    assert len(anchors) == len(set(anchors))
    assert set(anchors) == set(LINES), "a row that is not `anchor, line in backticks, words`"
    assert set(LINES) == set(FORMULAS)


def test_every_row_of_these_tables_has_an_anchor() -> None:
    for table in re.findall(r"^\| what you have .*\n\| --- .*\n((?:\|.*\n)+)", PAGE, re.MULTILINE):
        assert all(line.startswith('| <a id="') for line in table.splitlines())


def test_the_code_blocks_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    names: Names = {}
    for block in blocks:  # one after the other, as a reader would
        exec(block, names)


def test_the_list_names_all_losses() -> None:
    listed = re.findall(r"`(\w+_loss|\w+Loss)`", PAGE.split("## All losses")[1])
    public = [key for key in fastxkd.losses.__all__ if re.search("_loss$|Loss$", key)]
    # A set: kd_loss is named once more, in the line of linear_kd_loss.
    assert {*listed} == {*public}
