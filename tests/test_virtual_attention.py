"""Virtual attention: the formula group by group, and what folding leaves."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxkd.runs.cnn import SmallCNN
from fastxkd.train import Distiller, TrainSettings
from fastxkd.train.virtual_attention import VirtualAttention, VirtualAttentionDistiller

CONVOLUTIONS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1-D": (lambda: nn.Conv1d(8, 12, 3, stride=2), (2, 8, 11)),
    "2-D": (lambda: nn.Conv2d(8, 12, 3, padding=1), (2, 8, 7, 6)),
    "3-D": (lambda: nn.Conv3d(8, 4, 2), (2, 8, 4, 5, 3)),
    "dilated": (lambda: nn.Conv2d(8, 12, 3, dilation=2, stride=2, bias=False), (2, 8, 9, 9)),
    "grouped": (lambda: nn.Conv2d(16, 12, 3, groups=2), (2, 16, 5, 5)),
    "reflecting": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), (2, 8, 6, 6)),
    "uneven": (lambda: nn.Conv2d(7, 9, (1, 3)), (2, 7, 3, 6)),
    "wide": (lambda: nn.Conv2d(8, 2, 1), (2, 8, 3, 3)),
}


def attended(kind: str, **options: Any) -> tuple[VirtualAttention, nn.Module, Tensor]:
    """The wrapper with attention drawn at random, the convolution before it, and inputs."""
    make, shape = CONVOLUTIONS[kind]
    plain = make().double()
    model = VirtualAttention(nn.Sequential(copy.deepcopy(plain), nn.Tanh()), **options)
    with torch.no_grad():
        for logits in model.attention_parameters():
            logits.normal_()
    return model, plain, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_starts_as_the_model_it_wraps(kind: str) -> None:
    make, shape = CONVOLUTIONS[kind]
    model, inputs = nn.Sequential(make(), nn.Tanh()), torch.randn(shape)
    wanted = model(inputs)
    torch.testing.assert_close(VirtualAttention(model)(inputs), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"groups": 3, "blocks": 2, "temperature": 0.5}])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_is_the_formula(kind: str, options: dict[str, Any]) -> None:
    """One filter and one group of input channels at a time."""
    model, plain, x = attended(kind, **options)
    groups, tau = options.get("groups", 4), options.get("temperature", 1.0)
    [logits] = model.attention_parameters()
    outputs, inputs = plain.weight.shape[:2]
    blocks = min(options.get("blocks", groups), outputs)
    assert logits.shape == (blocks, groups)
    own = plain.groups
    total = []
    for j in range(outputs):
        a = [(v / tau).exp().item() for v in logits[j * blocks // outputs]]
        part = 0
        for g in range(groups):
            mask = torch.tensor([float(c * groups // inputs == g) for c in range(inputs)])
            kernel = torch.zeros_like(plain.weight)
            kernel[j] = plain.weight[j] * mask.double().view(-1, *[1] * (plain.weight.dim() - 2))
            silent = copy.deepcopy(plain)
            silent.bias = None
            silent.weight.data = kernel
            part = part + a[g] / sum(a) * silent(x)[:, j]
        total.append(groups * part + (0 if plain.bias is None else plain.bias[j]))
    assert own * inputs == x.shape[1]
    torch.testing.assert_close(model(x), torch.stack(total, 1).tanh(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_folds_to_the_same_function(kind: str) -> None:
    model, plain, x = attended(kind)
    wanted = model(x)
    folded = model.fold()
    assert type(folded[0]) is type(plain)
    assert not hasattr(folded[0], "parametrizations")
    assert folded[0].weight.is_leaf
    assert (folded(x) - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert list(folded[0].state_dict()) == list(plain.state_dict())


def network(seed: int = 0) -> SmallCNN:
    torch.manual_seed(seed)
    return SmallCNN((4, 8, 8, 8), (1, 2, 1, 1), num_classes=3, in_channels=1)


def disturbed(model: VirtualAttention) -> VirtualAttention:
    with torch.no_grad():
        for logits in model.attention_parameters():
            logits.normal_()
    return model


def test_folded_model_is_the_original_s_kind() -> None:
    """In float32, through batch norm in both modes, and into a model that was never wrapped."""
    before = network()
    keys, shapes = list(before.state_dict()), [v.shape for v in before.state_dict().values()]
    parameters = [name for name, _ in before.named_parameters()]
    model, images = disturbed(VirtualAttention(before)), torch.randn(6, 1, 16, 16)
    assert model.layers == ["stage2.0.0", "stage2.1.0", "stage3.0.0", "stage4.0.0"]
    trained = [copy.deepcopy(model).train()(images), model.eval()(images)]
    for mode, wanted in zip((True, False), trained, strict=True):
        folded = copy.deepcopy(model).fold().train(mode)
        assert (folded(images) - wanted).abs().max() <= 1e-6
        assert [name for name, _ in folded.named_parameters()] == parameters
        state = folded.state_dict()
        assert (list(state), [v.shape for v in state.values()]) == (keys, shapes)
        fresh = network(5)
        fresh.load_state_dict(state)
        assert torch.equal(fresh.eval()(images), folded.eval()(images))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(trained[1], network().eval()(images))


def test_entropy_closed_forms() -> None:
    model = VirtualAttention(network(), groups=4)
    assert model.entropy().item() == pytest.approx(math.log(4))
    assert model.entropy("sum").item() == pytest.approx(4 * math.log(4))
    for name, alpha in model.attention().items():
        assert alpha.tolist() == [[0.25] * 4] * 4, name
    with torch.no_grad():
        first, *_ = model.attention_parameters()
        first.copy_(torch.tensor([[500.0, 0, 0, 0], [7.0, 7, -500, -500]] * 2))
    assert model.entropy("sum").item() == pytest.approx(3 * math.log(4) + math.log(2) / 2)
    assert model.entropy().item() == pytest.approx((12 * math.log(4) + 2 * math.log(2)) / 16)
    model.entropy().backward()
    assert torch.isfinite(first.grad).all()
    warm = VirtualAttention(nn.Conv2d(2, 1, 1), groups=2, temperature=2.0)
    with torch.no_grad():
        warm.attention_parameters()[0].copy_(torch.tensor([[3.0, 0.0]]))
    p = 1 / (1 + math.exp(-1.5))
    assert warm.entropy().item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))


def test_weights_and_attention_learn() -> None:
    model = disturbed(VirtualAttention(network()))
    F.cross_entropy(model(torch.randn(8, 1, 16, 16)), torch.arange(8) % 3).backward()
    assert len(model.attention_parameters()) == 4
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_layers_by_name_and_module() -> None:
    before = network()
    model = VirtualAttention(before, layers=["stage3.0.0", before.stage2[1][0]])
    assert model.layers == ["stage3.0.0", "stage2.1.0"]
    assert set(model.attention()) == {"stage3.0.0", "stage2.1.0"}


def test_layers_that_share_a_weight_are_left_alone() -> None:
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)))
    model[1].weight = model[0].weight
    attending = VirtualAttention(model)
    assert attending.layers == ["2"]
    with torch.no_grad():
        attending.attention_parameters()[0].normal_()
    images = torch.randn(2, 8, 5, 5)
    expected = attending(images)
    torch.testing.assert_close(attending.fold()(images), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="layers: '1' shares its weight with another layer"):
        VirtualAttention(model, layers="1")


class Scaled(nn.Conv2d):
    """A convolution with more to learn."""

    def __init__(self) -> None:
        super().__init__(8, 8, 3)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.gain * super().forward(images)


def test_a_convolution_s_own_parameters_keep_their_place() -> None:
    model = nn.Sequential(Scaled())
    keys = list(model.state_dict())
    folded = VirtualAttention(model).fold()
    assert keys == list(folded.state_dict()) == ["0.weight", "0.bias", "0.gain"]
    assert type(folded[0]) is Scaled


# --- training

SETTINGS = TrainSettings(epochs=2, batch_size=8, lr=0.05, seed=4)


class Batches:
    """Five batches of noise an epoch, the same for the same step."""

    def __len__(self) -> int:
        return 5

    def iterate(self, first: int, last: int) -> Any:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(8, 1, 12, 12, generator=generator)
            yield images, torch.randint(0, 3, (8,), generator=generator)


def make(path: Any = None, **options: Any) -> VirtualAttentionDistiller:
    options = {"entropy_weight": 0.3, "teacher": network(9), **options}
    return VirtualAttentionDistiller(
        VirtualAttention(network()), Batches(), SETTINGS, checkpoint=path, **options
    )


def test_loss_is_that_of_distillation_and_the_penalty() -> None:
    trainer = make(entropy_reduction="sum")
    disturbed(trainer.student)
    plain = Distiller(copy.deepcopy(trainer.student), Batches(), SETTINGS, teacher=network(9))
    images, labels = next(Batches().iterate(0, 1))
    found, base = trainer._loss(images, labels), plain._loss(images, labels)
    entropy = trainer.student.entropy("sum")
    assert found.item() == pytest.approx((base + 0.3 * entropy).item(), rel=1e-6)
    assert entropy.item() > 1


def test_penalty_sharpens_the_attention() -> None:
    found = {}
    for weight in (0.0, 3.0):
        trainer = make(entropy_weight=weight)
        disturbed(trainer.student)
        before = trainer.student.entropy().item()
        trainer.fit()
        found[weight] = trainer.student.entropy().item() - before
    assert found[3.0] < found[0.0] - 0.01


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path: Any) -> None:
    whole = make()
    whole.fit()

    def on_step(made: int) -> None:
        if made == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "s.pt", on_step=on_step).fit()
    torch.rand(5)
    resumed = make(tmp_path / "s.pt")
    resumed.fit()
    state = resumed.student.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in whole.student.state_dict().items())
    with pytest.raises(ValueError, match=r"entropy_weight was 0.3, now 0.2"):
        make(tmp_path / "s.pt", entropy_weight=0.2).fit()
    images = torch.randn(3, 1, 12, 12)
    wanted = resumed.student(images)
    assert (resumed.student.fold()(images) - wanted).abs().max() <= 1e-6


# --- what does not fit


def folded() -> VirtualAttention:
    model = VirtualAttention(network())
    model.fold()
    return model


def twice() -> None:
    model = network()
    VirtualAttention(model)
    VirtualAttention(model)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: VirtualAttention(3), TypeError, "model: expected a Module, got int"),  # type: ignore[arg-type]
        (lambda: VirtualAttention(network(), groups=0), ValueError, "groups: expected at least 1"),
        (lambda: VirtualAttention(network(), blocks=0), ValueError, "blocks: expected at least 1"),
        (lambda: VirtualAttention(network(), temperature=0), ValueError, "temperature: expected"),
        (
            lambda: VirtualAttention(network(), groups=9),
            ValueError,
            "model: expected a convolution with at least 9 input channels",
        ),
        (
            lambda: VirtualAttention(network(), layers=["head"]),
            ValueError,
            r"layers: expected convolutions .*'head' is a Linear",
        ),
        (
            lambda: VirtualAttention(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)), layers="0"),
            ValueError,
            r"layers: expected at least the 4 input channels .* '0' has 1",
        ),
        (lambda: VirtualAttention(network(), layers="stage9"), ValueError, "no layer named"),
        (
            lambda: VirtualAttention(nn.ConvTranspose2d(8, 8, 3)),
            ValueError,
            "model: expected a convolution",
        ),
        (twice, ValueError, r"model: 'stage2\.0\.0' is parametrised already"),
        (lambda: folded().fold(), RuntimeError, "it was folded already"),
        (lambda: folded().entropy(), RuntimeError, "it was folded already"),
        (
            lambda: VirtualAttention(network()).entropy("max"),
            ValueError,
            "reduction: expected one of mean, sum",
        ),
        (
            lambda: VirtualAttentionDistiller(network(), Batches(), SETTINGS),  # type: ignore[arg-type]
            TypeError,
            "student: expected a VirtualAttention, got SmallCNN",
        ),
        (lambda: make(entropy_weight=-1), ValueError, "entropy_weight: expected"),
        (lambda: make(entropy_reduction="x"), ValueError, "entropy_reduction: expected"),
    ],
)
def test_what_does_not_fit_is_named(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()
