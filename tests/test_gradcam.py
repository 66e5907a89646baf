"""The explainers on models: parity with pytorch-grad-cam, and the model left as it was."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastxkd
from tests import oracles
from tests.conftest import needs

EXPLAINERS = {
    "GradCAM": fastxkd.GradCAM,
    "HiResCAM": fastxkd.HiResCAM,
    "LayerCAM": fastxkd.LayerCAM,
    "GradCAMPlusPlus": fastxkd.GradCAMPlusPlus,
    "XGradCAM": fastxkd.XGradCAM,
}


class Net(nn.Module):
    """Small, with everything that gets in the way: batch norm, in-place ReLU, dropout."""

    def __init__(self, classes: int = 7) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        self.body = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12))
        self.act = nn.ReLU(inplace=True)
        self.tail = nn.Sequential(nn.Conv2d(12, 10, 3, stride=2), nn.ReLU())
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(10, classes)
        self.unused = nn.Conv2d(3, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.tail(self.act(self.body(self.stem(images))))
        return self.head(self.drop(x.mean((2, 3))))


class Tokens(nn.Module):
    """A tiny vision transformer: class token, attention, layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.block = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.mix = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 7)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.block(x)
        x, _ = self.mix(x, x, x)
        return self.head(x[:, 0])


def as_maps(tokens: Tensor) -> Tensor:
    n, _, c = tokens.shape
    return tokens[:, 1:].transpose(1, 2).reshape(n, c, 6, 5)


@pytest.fixture
def net() -> Net:
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 24, 20)


def by_hand(
    model: nn.Module,
    layer: nn.Module,
    images: Tensor,
    index: list[int] | None = None,
    method: str = "gradcam",
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Hook, autograd, formula."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()

    handle = layer.register_forward_hook(keep)
    try:
        logits = model(images)
    finally:
        handle.remove()
    target = logits.argmax(1) if index is None else torch.tensor(index)
    score = logits.gather(1, target[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, kept[0])
    exact = torch.float64 if kept[0].dtype == torch.float64 else torch.float32
    a, g = kept[0].detach().to(exact), gradient.to(exact)
    return oracles.cam_finish(oracles.cam_raw(a, g, method), size or images.shape[2:], True, 2)


@pytest.fixture
def their() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their imports
        yield needs("pytorch_grad_cam")


def theirs(
    package: Any, name: str, model: nn.Module, layers: list[nn.Module], images: Tensor, **kw: Any
) -> Tensor:
    targets = kw.pop("targets", None)
    if targets is not None:
        output_target = package.utils.model_targets.ClassifierOutputTarget
        targets = [output_target(t) for t in targets]
    with getattr(package, name)(model=model, target_layers=layers, **kw) as cam:
        return torch.from_numpy(cam(input_tensor=images.clone(), targets=targets))


# --- parity


@pytest.mark.parametrize("name", EXPLAINERS)
@pytest.mark.parametrize("layers", [["layer4"], ["layer2.1"], ["layer3", "layer4.1"]], ids=str)
def test_equals_pytorch_grad_cam_on_a_resnet(their: Any, name: str, layers: list[str]) -> None:
    torchvision = needs("torchvision")
    model = torchvision.models.resnet18(weights=None).eval()
    images = torch.randn(2, 3, 96, 96)
    targets = [3, 907]
    modules = [model.get_submodule(layer) for layer in layers]
    with EXPLAINERS[name](model, layers) as cam:
        found = cam(images, targets)
    expected = theirs(their, name, model, modules, images, targets=targets)
    assert found.shape == (2, 96, 96)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", EXPLAINERS)
@pytest.mark.parametrize("layer", ["stem", "stem.0", "body", "act", "tail"])
def test_equals_pytorch_grad_cam(
    their: Any, net: Net, images: Tensor, name: str, layer: str
) -> None:
    module = net.get_submodule(layer)
    with EXPLAINERS[name](net, [module]) as cam:
        found = cam(images)
    if layer not in ("stem.0", "body"):  # an in-place ReLU overwrites what theirs has kept
        expected = theirs(their, name, net, [module], images)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    expected = by_hand(net, module, images, method=EXPLAINERS[name].method)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["GradCAM", "HiResCAM", "LayerCAM", "GradCAMPlusPlus"])
def test_equals_pytorch_grad_cam_on_tokens(their: Any, images: Tensor, name: str) -> None:
    model = Tokens().eval()
    layers = [model.block.norm2]
    with EXPLAINERS[name](model, layers, reshape_transform=as_maps) as cam:
        found = cam(images, 2)
    expected = theirs(
        their, name, model, layers, images, targets=[2] * 4, reshape_transform=as_maps
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# --- arguments


def test_targets(net: Net, images: Tensor) -> None:
    index = [3, 0, 6, 3]
    expected = by_hand(net, net.tail, images, index)

    def one(k: int) -> Callable[[Tensor], Tensor]:
        return lambda row: row[k]

    with fastxkd.GradCAM(net, net.tail) as cam:
        for targets in (
            index,
            tuple(index),
            torch.tensor(index),
            torch.tensor(index, dtype=torch.int32),
            [one(k) for k in index],
        ):
            torch.testing.assert_close(cam(images, targets), expected, rtol=0, atol=1e-6)
        objective = cam(images, objective=lambda out: out[torch.arange(4), index].sum())
        torch.testing.assert_close(objective, expected, rtol=0, atol=1e-6)
        for targets in (5, one(5)):  # of every image
            torch.testing.assert_close(
                cam(images, targets), by_hand(net, net.tail, images, [5] * 4), rtol=0, atol=1e-6
            )
        torch.testing.assert_close(cam(images), by_hand(net, net.tail, images), rtol=0, atol=1e-6)


def test_outputs_are_the_logits(net: Net, images: Tensor) -> None:
    cam = fastxkd.GradCAM(net, "tail")
    with cam:
        cam(images)
        assert torch.equal(cam.outputs, net(images))
        assert not cam.outputs.requires_grad
    assert cam.outputs is None


def test_sizes_and_scaling(net: Net, images: Tensor) -> None:
    with fastxkd.GradCAM(net, "tail") as cam:
        maps = cam(images)
        assert maps.dtype == torch.float32
        assert maps.shape == (4, 24, 20)
        assert 0 <= maps.min() <= maps.max() <= 1
        assert not maps.requires_grad
        layer = cam(images, size=None)
        assert layer.shape == (4, 5, 4)
        assert cam(images, size=(7, 9)).shape == (4, 7, 9)
        raw = cam(images, normalize=None, size=None)
        low, high = raw.amin((1, 2), keepdim=True), raw.amax((1, 2), keepdim=True)
        torch.testing.assert_close(layer, (raw - low) / (high - low + 1e-7))
        array = cam(images, output="numpy")
        assert isinstance(array, needs("numpy").ndarray)
        assert torch.equal(torch.from_numpy(array), maps)


def test_several_layers(net: Net, images: Tensor) -> None:
    with fastxkd.GradCAM(net, ["stem", net.tail]) as cam:
        each = cam(images, aggregate=None)
        mean = cam(images)
        arrays = cam(images, aggregate=None, output="numpy")
    assert isinstance(each, list)
    for maps, layer, array in zip(each, (net.stem, net.tail), arrays, strict=True):
        torch.testing.assert_close(maps, by_hand(net, layer, images), rtol=0, atol=1e-6)
        assert torch.equal(torch.from_numpy(array), maps)
    expected = torch.stack(each).mean(0)
    expected = expected - expected.amin((1, 2), keepdim=True)
    expected = expected / (1e-7 + expected.amax((1, 2), keepdim=True))
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-5)


# --- surroundings


def test_frozen_weights(net: Net, images: Tensor) -> None:
    expected = by_hand(net, net.body, images)
    net.requires_grad_(False)
    with fastxkd.GradCAM(net, "body") as cam:
        torch.testing.assert_close(cam(images), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layer", ["stem.0", "tail"])
def test_under_no_grad(net: Net, images: Tensor, context: Callable[[], Any], layer: str) -> None:
    expected = by_hand(net, net.get_submodule(layer), images)
    with fastxkd.GradCAM(net, layer) as cam, context():
        assert cam(images).equal(cam(images))
        made_inside = images.clone()
        found = cam(made_inside)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    # Made in inference mode, explained outside.
    torch.testing.assert_close(cam(made_inside), expected, rtol=0, atol=1e-6)


def test_targets_made_in_inference_mode(net: Net, images: Tensor) -> None:
    with torch.inference_mode():
        targets = torch.ones(len(images), dtype=torch.int64)
    with fastxkd.GradCAM(net, "stem.0") as cam:
        assert cam(images, targets).equal(cam(images, 1))


def test_layer_that_hands_an_inference_tensor_through(images: Tensor) -> None:
    model = nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 3), nn.Flatten(1), nn.Linear(1584, 5))
    expected = by_hand(model, model[0], images.clone().requires_grad_(True))
    with torch.inference_mode():
        inside = images.clone()
        found = fastxkd.GradCAM(model, "0")(inside)
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-6)


class Boom(Exception):
    pass


@pytest.mark.parametrize("where", [None, "stem", "head", "objective", "layer"])
def test_the_model_is_left_as_it_was(net: Net, images: Tensor, where: str | None) -> None:
    """Flags, hooks, buffers, .grad and the grad mode; after an error of anybody's as well."""
    net.train()
    net.body.eval()
    for i, parameter in enumerate(net.parameters()):
        parameter.grad = torch.full_like(parameter, float(i)) if i % 2 else None

    def state() -> list[Any]:
        return [
            [m.training for m in net.modules()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()],
            [len(m._backward_hooks) + len(m._backward_pre_hooks) for m in net.modules()],
            [p.requires_grad for p in net.parameters()],
            [id(p.grad) for p in net.parameters()],
            [p._backward_hooks for p in net.parameters()],
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        ]

    def tensors() -> list[Tensor]:
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        return [x.clone() for x in [*net.state_dict().values(), *grads]]

    before, values = state(), tensors()

    def fail(*_: Any) -> Any:
        raise Boom

    explainer = fastxkd.GradCAM(net, ["unused"] if where == "layer" else ["stem", "tail"])
    if where is None:
        with explainer as cam:
            cam(images)
            cam(images, differentiable=True)
    elif where == "objective":
        with pytest.raises(Boom):
            explainer(images, objective=fail)
    elif where == "layer":
        with pytest.raises(ValueError, match="never reached"):
            explainer(images)
    else:
        handle = net.get_submodule(where).register_forward_pre_hook(fail)
        with pytest.raises(Boom):
            explainer(images)
        handle.remove()
    assert state() == before
    assert all(torch.equal(a, b) for a, b in zip(tensors(), values, strict=True))


def test_a_model_in_training_is_explained_in_eval_mode(net: Net, images: Tensor) -> None:
    expected = by_hand(net, net.tail, images)
    net.train()
    torch.testing.assert_close(fastxkd.GradCAM(net, "tail")(images), expected, rtol=0, atol=1e-6)


def test_images_are_left_alone(net: Net, images: Tensor) -> None:
    before = images.clone()
    fastxkd.GradCAM(net, "stem.0")(images)
    assert torch.equal(images, before)
    assert not images.requires_grad
    leaf = images.clone().requires_grad_(True)
    fastxkd.GradCAM(net, "tail")(leaf)
    assert leaf.grad is None


def test_the_trunk_runs_without_a_graph(net: Net, images: Tensor) -> None:
    seen: dict[str, bool] = {}
    handles = [
        module.register_forward_hook(
            lambda _, __, out, name=name: seen.__setitem__(name, out.requires_grad)
        )
        for name, module in net.named_children()
    ]
    fastxkd.GradCAM(net, "body")(images)
    for handle in handles:
        handle.remove()
    # The user's hook on the layer itself came first: it saw the output before the cut.
    assert seen == {
        "stem": False, "body": False, "act": True, "tail": True, "drop": True, "head": True
    }  # fmt: skip


def test_bfloat16_model(net: Net, images: Tensor) -> None:
    net, images = net.bfloat16(), images.bfloat16()
    found = fastxkd.GradCAM(net, "body")(images, 3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_hand(net, net.body, images, [3] * 4), rtol=0, atol=1e-4)


def test_float64_model(net: Net, images: Tensor) -> None:
    net, images = net.double(), images.double()
    found = fastxkd.XGradCAM(net, "tail")(images)
    assert found.dtype == torch.float64
    expected = by_hand(net, net.tail, images, method="xgradcam")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_autocast(net: Net, images: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        expected = by_hand(net, net.body[0], images, [3] * 4)
        found = fastxkd.GradCAM(net, "body.0")(images, 3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", EXPLAINERS)
def test_channels_last(net: Net, images: Tensor, name: str) -> None:
    explainer = EXPLAINERS[name]
    expected = explainer(net, "tail")(images)
    net.to(memory_format=torch.channels_last)
    found = explainer(net, "tail")(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_two_threads_on_one_model(net: Net) -> None:
    batches = [torch.randn(2, 3, 24, 20) for _ in range(16)]
    cams = [fastxkd.GradCAM(net, layer) for layer in ("stem", "tail")]
    jobs = [(cams[i % 2], batch, i % 7) for i, batch in enumerate(batches)]
    expected = [cam(batch, target) for cam, batch, target in jobs]
    gate = threading.Barrier(2)

    def work(job: Any) -> Tensor:
        gate.wait()
        return job[0](job[1], job[2])

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, jobs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert all(not m._forward_hooks for m in net.modules())


def test_two_threads_on_one_model_in_training(net: Net, images: Tensor) -> None:
    """One is done, and hands the model back in training mode, while the other is in its trunk."""
    expected = fastxkd.GradCAM(net, "tail")(images)
    net.train()
    before = [x.clone() for x in net.state_dict().values()]
    inside, first_done = threading.Event(), threading.Event()

    def pause(*_: Any) -> None:
        if threading.current_thread().name == "second":
            inside.set()
            first_done.wait(10)

    entered = threading.Event()

    def hold(*_: Any) -> None:
        if threading.current_thread().name == "first":
            entered.set()
            inside.wait(10)

    handles = [net.stem[0].register_forward_pre_hook(f) for f in (hold, pause)]
    found: dict[str, Tensor] = {}

    def explain() -> None:
        name = threading.current_thread().name
        if name == "second":
            entered.wait(10)
        found[name] = fastxkd.GradCAM(net, "tail")(images)
        if name == "first":
            first_done.set()

    threads = [threading.Thread(target=explain, name=n) for n in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    assert all(m.training for m in net.modules())
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before, strict=True))
    for maps in found.values():
        torch.testing.assert_close(maps, expected, rtol=0, atol=1e-6)


# --- unusual models


class Pair(NamedTuple):
    maps: Tensor
    note: str


class Odd(nn.Module):
    """A layer that returns more than a tensor, a model that returns more than logits."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.net = Net().eval()
        self.kind = kind
        self.layer = Wrapped(self.net.stem, kind)

    def forward(self, images: Tensor) -> Any:
        out = self.layer(images)
        x = out[0]
        assert type(out) is self.kind
        logits = self.net.head(self.net.tail(self.net.body(x)).mean((2, 3)))
        return logits, {"aux": 2 * logits}


class Wrapped(nn.Module):
    def __init__(self, layer: nn.Module, kind: type) -> None:
        super().__init__()
        self.layer = layer
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        x = self.layer(x)
        return Pair(x, "seen") if self.kind is Pair else self.kind([x, "seen"])


@pytest.mark.parametrize("kind", [tuple, list, Pair], ids=lambda k: k.__name__)
def test_tuples_from_layer_and_model(images: Tensor, kind: type) -> None:
    model = Odd(kind).eval()
    with fastxkd.GradCAM(model, "layer") as cam:
        found = cam(images, objective=lambda out: out[0][:, 2].sum())
        assert isinstance(cam.outputs, tuple)
        with pytest.raises(ValueError, match=r"targets: the model returned tuple.*objective="):
            cam(images)
    flat = nn.Sequential(
        model.net.stem, model.net.body, model.net.tail, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        model.net.head,
    )  # fmt: skip
    expected = by_hand(flat, model.net.stem, images, [2] * 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(images).relu()).mean((2, 3)))


def test_a_layer_that_runs_twice_warns(images: Tensor) -> None:
    model = Twice().eval()
    with pytest.warns(UserWarning, match="'shared' ran more than once.*last run is explained"):
        found = fastxkd.GradCAM(model, "shared")(images, 1)
    with torch.no_grad():
        a = model.shared(model.shared(images).relu())
    w = model.head.weight[1].detach() / (24 * 20)
    raw = torch.einsum("c,nchw->nhw", w, a)
    torch.testing.assert_close(found, oracles.cam_finish(raw, (24, 20), True, 2), atol=1e-5, rtol=0)


def test_wrapped_model(net: Net, images: Tensor) -> None:
    """Names resolve through the wrapper that data parallelism puts around a model."""
    expected = fastxkd.GradCAM(net, "tail")(images, 1)
    wrapped = nn.Module()
    wrapped.module = net
    wrapped.forward = net.forward
    torch.testing.assert_close(fastxkd.GradCAM(wrapped, "tail")(images, 1), expected)


# --- a training step's own forward


def step(model: nn.Module, images: Tensor, labels: Tensor, explain: bool) -> list[Tensor]:
    torch.manual_seed(3)  # dropout
    model.zero_grad()
    if explain:
        with fastxkd.capture(model, ["body", "tail"]) as captured:
            logits = model(images)
        maps = captured.cam("gradcam", score=logits.gather(1, labels[:, None]).sum())
        assert maps.shape == (4, 12, 10)
        assert not maps.requires_grad
    else:
        logits = model(images)
    nn.functional.cross_entropy(logits, labels).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_capture_leaves_the_step_bit_identical(net: Net, images: Tensor) -> None:
    labels = torch.tensor([1, 0, 6, 2])
    net.train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    plain = step(net, images, labels, explain=False)
    after = {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(state)
    explained = step(net, images, labels, explain=True)
    assert len(plain) == len(explained) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, explained, strict=True))
    assert all(torch.equal(net.state_dict()[k], v) for k, v in after.items())
    assert all(not m._forward_hooks for m in net.modules())
    assert all(m.training for m in net.modules())


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "layercam", "gradcam++", "xgradcam"])
def test_captured_cam(net: Net, images: Tensor, method: str) -> None:
    with fastxkd.capture(net, [net.body]) as captured:
        logits = net(images)
    assert list(captured.activations) == ["body"]
    assert captured.activations["body"].shape == (4, 12, 12, 10)
    score = logits[:, 2].sum()
    found = captured.cam(method, score=score, size=(24, 20))
    expected = by_hand(net, net.body, images, [2] * 4, method)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert captured.cam(method, score=score, normalize=None).shape == (4, 12, 10)


def test_capture_holds_the_last_of_several_passes(net: Net, images: Tensor) -> None:
    with fastxkd.capture(net, "tail") as captured:
        net(2 * images)
        net(images)
    with fastxkd.capture(net, "tail") as once:
        net(images)
    assert torch.equal(captured.activations["tail"], once.activations["tail"])


def test_capture_without_gradients(net: Net, images: Tensor) -> None:
    with torch.no_grad(), fastxkd.capture(net, "tail") as captured:
        logits = net(images)
    assert not captured.activations["tail"].requires_grad
    with pytest.raises(ValueError, match="score: expected a scalar with a graph"):
        captured.cam(score=logits.sum())


# --- losses on maps


@pytest.mark.parametrize("name", EXPLAINERS)
@pytest.mark.parametrize("captured", [True, False])
def test_map_losses_have_the_right_gradient(
    net: Net, images: Tensor, name: str, captured: bool
) -> None:
    """Against finite differences, through maps, resizing and scaling, down to the first layer."""
    net, images = net.double(), images.double()
    explainer = EXPLAINERS[name](net, ["act", "tail"] if name == "GradCAM" else ["act"])
    weight = net.stem[0].weight
    aim = torch.rand(4, 24, 20, dtype=torch.float64)

    def loss(differentiable: bool) -> Tensor:
        if captured:
            with fastxkd.capture(net, list(explainer.target_layers)) as kept:
                logits = net(images)
            maps = kept.cam(
                explainer.method,
                score=logits[:, 1].sum(),
                size=(24, 20),
                differentiable=differentiable,
            )
        else:
            maps = explainer(images, 1, differentiable=differentiable)
        assert maps.requires_grad == differentiable
        return (maps - aim).square().mean()

    loss(True).backward()
    assert weight.grad is not None
    direction = torch.randn_like(weight)
    h = 1e-7  # larger steps carry some ReLU over its kink
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * h * direction)
        values.append(loss(False).item())
        with torch.no_grad():
            weight.sub_(sign * h * direction)
    numeric = (values[0] - values[1]) / (2 * h)
    assert abs(numeric) > 1e-7
    assert (weight.grad * direction).sum().item() == pytest.approx(numeric, rel=1e-4)
