"""KDExplainer: the routed network against one written block by block, its schedule, its tree."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastxkd
from fastxkd.train import TrainingDiverged, TrainSettings
from fastxkd.train.kdexplainer import KDExplainer
from fastxkd.train.kdexplainer_distiller import (
    KDExplainerDistiller,
    TreeDistiller,
    train_kdexplainer,
)
from fastxkd.train.routing_tree import RoutingTree

SMALL: dict[str, Any] = {
    "num_classes": 5,
    "in_channels": 2,
    "levels": (2, 3),
    "widths": ((4, 3), (3, 2)),
    "pooled": 2,
    "hidden": 6,
    "dropout": 0.0,
}


def small(seed: int = 0, **changed: Any) -> KDExplainer:
    torch.manual_seed(seed)
    return KDExplainer(**{**SMALL, **changed})


# --- the network


def block_by_block(model: KDExplainer, images: Tensor, gates: list[Tensor]) -> Tensor:
    """As the specification reads: blocks one after the other, the sum over parents, one head a
    class. Weights are cut out of the model; nothing else is."""
    widths = [*model_widths(model)]
    inputs = [images] * model.levels[0]
    for number, blocks in enumerate(model.levels):
        first, norm1, _, second, norm2, _, _ = model.blocks[number]
        middle, outputs = widths[number]
        found = []
        for b in range(blocks):
            x = inputs[b]
            for conv, norm, width in ((first, norm1, middle), (second, norm2, outputs)):
                own = slice(b * width, (b + 1) * width)
                x = F.conv2d(x, conv.weight[own], padding=1)
                mean, var = norm.running_mean[own].clone(), norm.running_var[own].clone()
                x = F.batch_norm(x, mean, var, norm.weight[own], norm.bias[own], model.training)
                x = x.relu()
            found.append(F.max_pool2d(x, 2))
        gate = gates[number]
        inputs = [
            sum(gate[i, j] * found[j] for j in range(blocks))  # type: ignore[misc]
            for i in range(len(gate))
        ]
    logits = []
    for k, x in enumerate(inputs):
        y = F.adaptive_avg_pool2d(x, model.pool.output_size).flatten(1)
        for layer in (0, 3, 6):
            y = y @ model.heads[layer].weight[k] + model.heads[layer].bias[k]
            y = y.relu() if layer < 6 else y
        logits.append(y.max(1).values)
    return torch.stack(logits, 1)


def model_widths(model: KDExplainer) -> Any:
    for level, blocks in zip(model.blocks, model.levels, strict=True):
        yield level[1].num_features // blocks, level[4].num_features // blocks


def soft_gates(model: KDExplainer, t: float) -> list[Tensor]:
    """The definition, step by step."""
    gates = []
    for w in model.routing:
        p = torch.stack([torch.stack([(v / 0.5).exp() for v in row]) for row in w])
        p = p / p.sum(1, keepdim=True)
        d = (p.log() / t).exp()
        gates.append(d / d.sum(1, keepdim=True))
    return gates


@pytest.mark.parametrize("head", ["ce", "nce"])
@pytest.mark.parametrize("t", [10.0, 0.3])
def test_training_pass_is_the_specification(t: float, head: str) -> None:
    model, images = small(head=head).double(), torch.randn(4, 2, 14, 18, dtype=torch.float64)
    model.temperature = t
    found = model(images)
    wanted = block_by_block(model, images, soft_gates(model, t))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    direction = torch.randn_like(found)
    parameters = list(model.parameters())
    ours = torch.autograd.grad((found * direction).sum(), parameters)
    theirs = torch.autograd.grad((wanted * direction).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_eval_pass_follows_one_parent_each() -> None:
    model, images = small().double(), torch.randn(4, 2, 8, 8, dtype=torch.float64)
    for _ in range(3):
        model(torch.randn(6, 2, 8, 8, dtype=torch.float64))
    model.eval()
    gates = model.gates()
    for gate, w in zip(gates, model.routing, strict=True):
        assert ((gate == 0) | (gate == 1)).all()
        assert (gate.sum(1) == 1).all()
        assert torch.equal(gate.argmax(1), w.argmax(1))
    wanted = block_by_block(model, images, gates)
    torch.testing.assert_close(model(images), wanted, rtol=1e-10, atol=1e-12)
    # A block that no class goes through may compute anything.
    with torch.no_grad():
        for w in model.routing:
            w[:, 0] = 2
    before = model(images)
    with torch.no_grad():
        model.blocks[0][0].weight[4:] = torch.inf
        model.blocks[1][3].weight[2:] = torch.nan
    assert model.tree().used() == ((0,), (0,))
    assert torch.equal(model(images), before)


def test_gates_anneal_towards_one_hot() -> None:
    model = small().double().train()
    apart = []
    for t in (100.0, 10.0, 1.0, 0.1, 0.001):
        model.temperature = t
        soft = model.gates()
        for gate, wanted in zip(soft, soft_gates(model, max(t, 0.1)), strict=True):
            torch.testing.assert_close(gate.sum(1), torch.ones(len(gate)).double())
            if t >= 0.1:
                torch.testing.assert_close(gate, wanted, rtol=1e-9, atol=1e-12)
        hard = [F.one_hot(w.argmax(1), w.shape[1]) for w in model.routing]
        apart.append(max((a - b).abs().max().item() for a, b in zip(soft, hard, strict=True)))
    assert apart == sorted(apart, reverse=True)
    assert apart[-1] < 1e-6


def test_every_parameter_learns_while_training() -> None:
    model = small()
    model.temperature = 1.0
    F.cross_entropy(model(torch.randn(16, 2, 12, 12)), torch.arange(16) % 5).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_fixed_tree_trains_the_blocks_on_its_paths_alone() -> None:
    model = small()
    with torch.no_grad():
        for w in model.routing:
            w[:, 0] = 2
    tree = model.fix_tree(reset=False).used()
    assert tree == ((0,), (0,))
    F.cross_entropy(model(torch.randn(16, 2, 12, 12)), torch.arange(16) % 5).backward()
    assert all(w.grad is None for w in model.routing)
    assert model.blocks[0][0].weight.grad[:4].abs().max() > 0
    assert model.blocks[0][0].weight.grad[4:].abs().max() == 0
    model.train()
    assert [gate.max().item() for gate in model.gates()] == [1, 1]


def test_published_sizes() -> None:
    """The parameters of the specification, counted from it; convolutions here have no bias, which
    batch norm would take away again."""
    model = KDExplainer(num_classes=10, head="nce")
    blocks = 0
    for number, (a, b, c) in zip((2, 4, 8), ((3, 64, 64), (64, 64, 64), (64, 64, 32)), strict=True):
        blocks += number * (9 * a * b + 9 * b * c + 2 * b + 2 * c)
    heads = 10 * ((1568 * 128 + 128) + (128 * 128 + 128) + (128 * 2 + 2))
    routing = 4 * 2 + 8 * 4 + 10 * 8
    assert sum(p.numel() for p in model.parameters()) == blocks + heads + routing
    assert [tuple(w.shape) for w in model.routing] == [(4, 2), (8, 4), (10, 8)]
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    for w in model.routing:
        assert 0 <= w.min() < w.max() <= 1


def test_weights_start_as_those_of_single_blocks() -> None:
    """He's initialisation counts what one block puts out, not all of them side by side."""
    model = KDExplainer(num_classes=3, hidden=8)
    first, second = model.blocks[0][0], model.blocks[2][3]
    assert first.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.05)
    assert second.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 32)), rel=0.05)
    assert model.heads[0].weight.std().item() == pytest.approx(0.01, rel=0.05)
    wider = KDExplainer(num_classes=3, hidden=8, head_std=0.1)
    assert wider.heads[0].weight.std().item() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (4, (9, 33))])
def test_any_images_and_a_stem(channels: int, size: tuple[int, int]) -> None:
    images = torch.randn(2, channels, *size)
    assert small(in_channels=channels)(images).shape == (2, 5)
    model = small(in_channels=channels, stem=6)
    larger = torch.randn(2, channels, 40, 31)
    assert model(larger).shape == (2, 5)
    assert model.stem(larger).shape == (2, 6, 17, 12)


def test_state_goes_to_another_network() -> None:
    model, other = small(0), small(1)
    other.load_state_dict(model.state_dict())
    images = torch.randn(3, 2, 8, 8)
    assert torch.equal(other.eval()(images), model.eval()(images))
    assert other.tree() == model.tree()


def test_half_precision_and_maps() -> None:
    """bfloat16 autocast in both modes, and explainers at a level of blocks."""
    model, images = small(), torch.randn(4, 2, 16, 16)
    for mode in (True, False):
        wanted = model.train(mode)(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(images)
        assert (found - wanted).abs().max() < 0.05 * wanted.abs().max() + 0.01
    with fastxkd.GradCAM(model, "blocks.1") as cam:
        assert cam(images).shape == (4, 16, 16)


# --- attention entropy


def test_entropy_closed_forms() -> None:
    model = small()
    with torch.no_grad():
        model.routing[0].zero_()
        model.routing[1].zero_()
        for i, gap in enumerate((0.0, 0.5, 2.0)):
            model.routing[0][i, 1] = gap
        model.routing[1][0] = torch.tensor([0.0, 0.0, -1e4])
    found = model.attention_entropy()
    for i, gap in enumerate((0.0, 0.5, 2.0)):
        p = 1 / (1 + math.exp(-gap / 0.5))
        wanted = -p * math.log(p) - (1 - p) * math.log(1 - p)
        assert found[0][i].item() == pytest.approx(wanted, rel=1e-5)
    assert found[1].tolist() == pytest.approx([math.log(2)] + [math.log(3)] * 4, rel=1e-6)
    assert not found[0].requires_grad
    # At the temperature of an epoch: p^(1/t), scaled.
    p = 1 / (1 + math.exp(-2.0 / 0.5 / 4.0))
    wanted = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert model.attention_entropy(4.0)[0][2].item() == pytest.approx(wanted, rel=1e-5)


# --- the tree


def test_tree_by_hand() -> None:
    model = small()
    with torch.no_grad():
        model.routing[0].copy_(torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.4, 0.1]]))
        model.routing[1].copy_(F.one_hot(torch.tensor([2, 1, 1, 2, 0]), 3).float())
    tree = model.tree()
    assert tree == RoutingTree((2, 3), ((0, 1, 0), (2, 1, 1, 2, 0)))
    assert [tree.path(k) for k in range(5)] == [(0, 2), (1, 1), (1, 1), (0, 2), (0, 0)]
    assert tree.groups() == (2, 1, 1, 2, 0)
    assert tree.groups(0) == (0, 1, 1, 0, 0)
    assert tree.used() == ((0, 1), (0, 1, 2))
    assert RoutingTree.from_json(tree.to_json()) == tree
    assert tree.text().splitlines() == [
        "block 1.0",
        "├─ block 2.0: 4",
        "└─ block 2.2: 0, 3",
        "block 1.1",
        "└─ block 2.1: 1, 2",
    ]
    assert "bag, coat" in tree.text(["hat", "bag", "coat", "shoe", "sock"])


def test_deep_tree_text() -> None:
    tree = RoutingTree((1, 2, 3), ((0, 0), (0, 0, 1), (0, 2, 1)))
    assert tree.text(["a", "b", "c"]).splitlines() == [
        "block 1.0",
        "├─ block 2.0",
        "│  ├─ block 3.0: a",
        "│  └─ block 3.1: c",
        "└─ block 2.1",
        "   └─ block 3.2: b",
    ]


# --- training

SETTINGS = TrainSettings(epochs=5, batch_size=8, lr=0.02, seed=3)


class Batches:
    """Four batches of noise an epoch, the same for the same step."""

    def __len__(self) -> int:
        return 4

    def iterate(self, first: int, last: int) -> Any:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(8, 2, 8, 8, generator=generator)
            yield images, torch.randint(5, (8,), generator=generator)


def teacher() -> nn.Module:
    torch.manual_seed(9)
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 5))


def test_published_rates() -> None:
    """Epoch by epoch, as published for 300: a quarter, a half, all, and from the fifth epoch every
    other one less."""
    settings = TrainSettings(epochs=300, batch_size=8, lr=0.05)
    trainer = KDExplainerDistiller(small(), Batches(), settings)
    rates = {epoch: trainer.rates(4 * epoch) for epoch in range(300)}
    assert rates[0] == pytest.approx([0.0125, 0])
    assert rates[1] == pytest.approx([0.025, 0])
    assert rates[2] == rates[3] == pytest.approx([0.05, 0.01])
    assert rates[4] == rates[5] == pytest.approx([0.05 * (1 - 4 / 309), 0.01 * (1 - 4 / 309)])
    assert rates[299] == pytest.approx([0.05 * (1 - 298 / 309), 0.01 * (1 - 298 / 309)])
    assert trainer.rates(3) == rates[0]
    model = small()
    model.fix_tree()
    tree = TreeDistiller(model, Batches(), settings)
    halves = [tree.rates(4 * (epoch - 1))[0] for epoch in (1, 29, 30, 59, 60, 300)]
    assert halves == pytest.approx([0.05, 0.05, 0.025, 0.025, 0.0125, 0.05 / 1024])


@pytest.mark.parametrize("schedule", ["published", "cosine"])
def test_first_stage_equals_a_loop_written_out(schedule: str) -> None:
    guide, model = teacher(), small()
    model.train()
    optimizer = torch.optim.Adam(
        [{"params": model.network_parameters()}, {"params": model.routing_parameters()}],
        weight_decay=5e-4,
    )
    trainer = KDExplainerDistiller(
        small(), Batches(), SETTINGS, teacher=guide, schedule=schedule, annealing=7.0
    )
    started = [w.detach().clone() for w in model.routing]
    for step, (images, labels) in enumerate(Batches().iterate(0, 20)):
        if schedule == "published" and step == 8:
            assert all(torch.equal(a, b) for a, b in zip(model.routing, started, strict=True))
        for group, rate in zip(optimizer.param_groups, trainer.rates(step), strict=True):
            group["lr"] = rate
        model.temperature = 7.0 / (step // 4 + 1)
        logits = model(images)
        with torch.no_grad():
            p = (guide(images) / 4).softmax(1)
        soft = 16 * F.kl_div((logits / 4).log_softmax(1), p, reduction="batchmean")
        loss = 0.1 * F.cross_entropy(logits, labels) + 0.9 * soft
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    history = trainer.fit()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trainer.student.state_dict()[name], value, rtol=2e-2, atol=2e-3)
    assert any(not torch.equal(a, b) for a, b in zip(trainer.student.routing, started, strict=True))
    assert trainer.student.temperature == 7.0 / 5
    assert [r["lr"] for r in history] == [trainer.rates(4 * e + 3)[0] for e in range(5)]


def test_a_loss_that_is_not_finite_names_the_rate_of_its_own_schedule() -> None:
    class Poisoned(Batches):
        def iterate(self, first: int, last: int) -> Any:
            for step, (images, labels) in enumerate(super().iterate(first, last), first):
                yield (images / 0 if step == 9 else images), labels

    trainer = KDExplainerDistiller(small(), Poisoned(), SETTINGS)
    with pytest.raises(TrainingDiverged, match=rf"step 10 of 20 .*learning rate {SETTINGS.lr:g}\)"):
        trainer.fit()


def interrupt_at(step: int) -> Any:
    count = [0]

    def on_step(made: int) -> None:
        count[0] += 1
        if count[0] == step:
            raise KeyboardInterrupt

    return on_step


@pytest.mark.parametrize("stop", [3, 8, 20, 21, 33])
def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path: Any, stop: int) -> None:
    options: dict[str, Any] = {
        "teacher": teacher(),
        "tree_settings": TrainSettings(epochs=4, batch_size=8, seed=5),
    }
    dropout = {"dropout": 0.3}
    whole = small(**dropout)
    wanted = train_kdexplainer(whole, Batches(), SETTINGS, **options)
    with pytest.raises(KeyboardInterrupt):
        train_kdexplainer(
            small(**dropout),
            Batches(),
            SETTINGS,
            folder=tmp_path,
            on_step=interrupt_at(stop),
            **options,
        )
    torch.rand(11)
    resumed = small(**dropout)
    found = train_kdexplainer(resumed, Batches(), SETTINGS, folder=str(tmp_path), **options)
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    assert found.tree == wanted.tree == whole.tree()
    assert all(torch.equal(a, b) for a, b in zip(found.entropy, wanted.entropy, strict=True))
    for ours, theirs in (
        (found.history, wanted.history),
        (found.tree_history, wanted.tree_history),
    ):
        assert [(r["loss"], r["lr"]) for r in ours] == [(r["loss"], r["lr"]) for r in theirs]
    with pytest.raises(ValueError, match=r"annealing was 10\.0, now 5\.0"):
        train_kdexplainer(
            small(**dropout), Batches(), SETTINGS, folder=tmp_path, annealing=5.0, **options
        )


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"entropy_temperature": 0.0}, ValueError),
        ({"halve_every": 0}, ValueError),
        ({"tree_settings": 3}, TypeError),
        ({"reset": 1}, TypeError),
    ],
)
def test_the_second_stage_s_options_are_checked_before_the_first(
    wrong: dict[str, Any], kind: type[Exception]
) -> None:
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(kind, match=next(iter(wrong))):
        train_kdexplainer(model, Batches(), SETTINGS, **wrong)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_second_stage_starts_anew_or_goes_on() -> None:
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tree = model.tree()
    assert model.fix_tree(reset=False) == tree
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.fix_tree()
    after = model.state_dict()
    assert model.tree() == tree
    assert not torch.equal(after["blocks.0.0.weight"], before["blocks.0.0.weight"])
    assert not torch.equal(after["heads.3.weight"], before["heads.3.weight"])
    assert torch.equal(after["routing.0"], before["routing.0"])


def test_second_stage_starts_from_its_own_seed() -> None:
    tiny = TrainSettings(epochs=1, lr=1e-12, seed=5)
    model, wanted = small(), small()
    train_kdexplainer(model, Batches(), SETTINGS, tree_settings=tiny)
    torch.manual_seed(5)
    wanted.fix_tree()
    for ours, theirs in zip(model.network_parameters(), wanted.network_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_learns() -> None:
    """Classes that a mean tells apart: after both stages most are known."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 2, 8, 8, generator=generator)

    class Real(Batches):
        def iterate(self, first: int, last: int) -> Any:
            for step in range(first, last):
                noise = torch.Generator().manual_seed(step)
                labels = torch.arange(30) % 5
                yield means[labels] + 0.5 * torch.randn(30, 2, 8, 8, generator=noise), labels

    model = small(widths=((8, 8), (8, 8)), hidden=16, head_std=0.1)
    train_kdexplainer(
        model,
        Real(),
        TrainSettings(epochs=6, lr=0.02),
        tree_settings=TrainSettings(epochs=20, lr=0.1),
    )
    assert not model.training
    images, labels = next(iter(Real().iterate(999, 1000)))
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).float().mean() > 0.7


# --- what does not fit


def fixed() -> KDExplainer:
    model = small()
    model.fix_tree()
    return model


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: small(head="mse"), ValueError, "head: expected one of ce, nce"),
        (lambda: small(levels=()), ValueError, r"widths: expected two for each of the levels \[\]"),
        (lambda: small(widths=((4, 3),)), ValueError, "widths: expected two for each of the level"),
        (lambda: small(widths=((4, 3), (3, 0))), ValueError, "widths: expected at least 1"),
        (lambda: small(levels=(2, 0)), ValueError, "levels: expected at least 1"),
        (lambda: small(num_classes=0), ValueError, "num_classes: expected at least 1"),
        (lambda: small(routing_temperature=0), ValueError, "routing_temperature: expected"),
        (
            lambda: small()(torch.zeros(2, 2, 3, 8)),
            ValueError,
            r"images: expected at least 4 pixels a side, got \[3, 8\]",
        ),
        (
            lambda: small()(torch.zeros(2, 3, 8, 8)),
            ValueError,
            r"images: expected \[n, 2, h, w\], got \[2, 3, 8, 8\]",
        ),
        (lambda: small(dropout=float("nan")), ValueError, r"dropout: expected a share in \[0, 1\)"),
        (lambda: small(head_std=-1), ValueError, "head_std: expected"),
        (lambda: small().attention_entropy(0), ValueError, "temperature: expected"),
        (
            lambda: KDExplainerDistiller(nn.Linear(2, 2), Batches(), SETTINGS),  # type: ignore[arg-type]
            TypeError,
            "student: expected a KDExplainer, got Linear",
        ),
        (
            lambda: KDExplainerDistiller(small(), Batches(), SETTINGS, teacher="x"),
            TypeError,
            "teacher: expected a Module, got str",
        ),
        (
            lambda: train_kdexplainer(small(), None, SETTINGS),  # type: ignore[arg-type]
            TypeError,
            "batches: expected an object with",
        ),
        (
            lambda: train_kdexplainer(small(), Batches(), []),  # type: ignore[arg-type]
            TypeError,
            "settings: expected a TrainSettings, got list",
        ),
        (
            lambda: train_kdexplainer(small(), Batches(), SETTINGS, tree_settings="x"),  # type: ignore[arg-type]
            TypeError,
            "tree_settings: expected a TrainSettings, got str",
        ),
        (
            lambda: KDExplainerDistiller(fixed(), Batches(), SETTINGS),
            ValueError,
            "student: expected a tree that is not fixed yet",
        ),
        (
            lambda: TreeDistiller(small(), Batches(), SETTINGS),
            ValueError,
            "student: expected a fixed tree",
        ),
        (
            lambda: KDExplainerDistiller(small(), Batches(), SETTINGS, routing_warmup=-1),
            ValueError,
            "routing_warmup: expected an int of 0 or more",
        ),
        (
            lambda: KDExplainerDistiller(small(), Batches(), SETTINGS, schedule="step"),
            ValueError,
            "schedule: expected one of published, cosine",
        ),
        (
            lambda: TreeDistiller(fixed(), Batches(), SETTINGS, halve_every=0),
            ValueError,
            "halve_every: expected at least 1",
        ),
        (lambda: RoutingTree((2,), ((0, 2),)), ValueError, "parents: expected for each level"),
        (lambda: RoutingTree((), ()), ValueError, "parents: expected for each level"),
        (lambda: small().tree().text(["a"]), ValueError, "names: expected 5"),
        (lambda: small().tree().path(5), ValueError, "label: expected 0 to 4, got 5"),
    ],
)
def test_what_does_not_fit_is_named(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()
