"""Safe capture: every way in which pytorch-grad-cam and others were seen to go wrong, by name."""

from __future__ import annotations

import copy
import gc
import importlib
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import fastxkd
from fastxkd import cam
from fastxkd.cam.capture import Tap
from fastxkd.compat import pytorch_grad_cam as compat
from fastxkd.compat.pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

# The package's attribute of that name is the class.
capturing = importlib.import_module("fastxkd.cam.capture")

EVERY = [
    cam.GradCAM, cam.HiResCAM, cam.GradCAMElementWise, cam.GradCAMPlusPlus, cam.XGradCAM,
    cam.LayerCAM, cam.EigenGradCAM, cam.FinerCAM, cam.EigenCAM, cam.CAM, cam.ScoreCAM,
    cam.AblationCAM,
]  # fmt: skip
every = pytest.mark.parametrize("explainer", EVERY, ids=lambda e: e.__name__)


class Block(nn.Sequential):
    """With a forward that ``compile`` takes; it leaves nn.Sequential's own alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x))


class Net(nn.Module):
    """Batch norm, in-place ReLU after the target, dropout; mean and linear head."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6))
        self.act = nn.ReLU(inplace)
        self.body = Block(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8))
        self.last = nn.ReLU(inplace)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.last(self.body(self.act(self.stem(images))))
        return self.head(self.drop(x.mean((2, 3))))


@pytest.fixture
def net() -> Net:
    model = Net()
    model(torch.randn(16, 3, 21, 17))
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 21, 17)


def layer_of(explainer: Any) -> str:
    return "last" if explainer is cam.CAM else "body"


def state(model: nn.Module) -> list[Any]:
    """Everything of a model that a call might leave behind, but tensors' values."""
    return [
        [m.training for m in model.modules()],
        [
            [list(vars(m)[kind]) for kind in vars(m) if kind.endswith("_hooks") or "hooks_" in kind]
            for m in model.modules()
        ],
        [sorted(vars(m)) for m in model.modules()],
        [(p.requires_grad, id(p.grad), p._version, p._backward_hooks) for p in model.parameters()],
        [b._version for b in model.buffers()],
        [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
        torch.is_autocast_enabled("cpu"),
    ]


def values(model: nn.Module) -> list[Tensor]:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [x.clone() for x in (*model.state_dict().values(), *grads)]


def same(found: Tensor, expected: Tensor, atol: float = 1e-6) -> None:
    assert expected.max() > 0.5  # a map of zeros compares with anything
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# --- the table of what goes wrong elsewhere


@pytest.mark.parametrize("targets", [[1, 2], [1] * 5, (3,), torch.tensor([1, 2, 3])], ids=str)
def test_target_list_shorter_than_batch(net: Net, images: Tensor, targets: Any) -> None:
    """Raises, where others answer with maps of zeros."""
    with pytest.raises(ValueError, match="targets: expected 4"):
        cam.GradCAM(net, "body")(images, targets)
    if not isinstance(targets, Tensor):
        wrapped = [ClassifierOutputTarget(k) for k in targets]
        with pytest.raises(ValueError, match=r"targets: expected 4, one per image, got \d"):
            compat.GradCAM(net, [net.body])(images, wrapped)


def test_several_layers_in_one_pass_in_any_order(net: Net, images: Tensor) -> None:
    passes = []
    net.register_forward_pre_hook(lambda *_: passes.append(1))
    one = cam.GradCAM(net, ["stem", "body", "last"], batch_size=1)(images, 1, aggregate=None)
    assert len(passes) == 1
    other = cam.GradCAM(net, [net.last, net.stem, net.body])(images, 1, aggregate=None)
    for a, b in zip(one, (other[1], other[2], other[0]), strict=True):
        assert a.equal(b)


def test_backward_extent_is_the_layer(net: Net, images: Tensor) -> None:
    """One forward pass, without a graph up to the layer; of gradients only the layer's own."""
    passes, graphs, gradients = [], {}, []
    net.register_forward_pre_hook(lambda *_: passes.append(1))
    for name, module in net.named_modules():
        module.register_forward_hook(
            lambda _, given, out, name=name: graphs.__setitem__(name, out.requires_grad)
        )
    for parameter in net.parameters():
        parameter.register_hook(gradients.append)
    cam.GradCAM(net, "body")(images)
    assert len(passes) == 1
    assert not gradients
    assert {name for name, graph in graphs.items() if graph} == {"", "last", "drop", "head"}


@every
def test_grad_of_the_user_is_kept(net: Net, images: Tensor, explainer: Any) -> None:
    for i, parameter in enumerate(net.parameters()):
        parameter.grad = torch.full_like(parameter, float(i)) if i % 2 else None
    before, kept = state(net), values(net)
    explainer(net, layer_of(explainer))(images, aug_smooth=True)
    assert state(net) == before
    assert all(a.equal(b) for a, b in zip(values(net), kept, strict=True))


@every
@pytest.mark.parametrize("raises_at", [None, 1, 2], ids=str)
def test_flags_and_hooks_as_before_also_when_the_model_raises(
    images: Tensor, explainer: Any, raises_at: int | None
) -> None:
    class Boom(Exception):
        pass

    net, calls = Net().train(), []
    net(images)
    net.body.eval()
    net.drop.register_forward_hook(lambda *_: None)

    def fail(*_: Any) -> None:
        calls.append(1)
        if raises_at is not None and len(calls) >= raises_at:
            raise Boom

    handle = net.head.register_forward_pre_hook(fail)
    before, kept = state(net), values(net)
    explain = explainer(net, layer_of(explainer))
    if raises_at is None:
        explain(images, aug_smooth=True)
    else:
        with pytest.raises(Boom):
            explain(images, aug_smooth=True)
    assert state(net) == before
    handle.remove()
    assert all(a.equal(b) for a, b in zip(values(net), kept, strict=True))


def test_capture_leaves_hooks_when_the_model_raises(net: Net, images: Tensor) -> None:
    before = state(net)
    with pytest.raises(RuntimeError), fastxkd.capture(net, ["stem", "body"]):
        net(images[:, :1])
    assert state(net) == before


def test_five_plain_forwards_keep_no_activation(net: Net, images: Tensor) -> None:
    for explain in (cam.GradCAM(net, "body"), compat.GradCAM(net, [net.body])):
        seen: list[weakref.ref[Tensor]] = []
        handle = net.body.register_forward_hook(
            lambda _, __, out, seen=seen: seen.append(weakref.ref(out))
        )
        for _ in range(5):
            net(images)
        handle.remove()
        gc.collect()
        assert len(seen) == 5
        assert [ref() for ref in seen] == [None] * 5
        explain(images)


@every
def test_no_tensor_leaks(net: Net, images: Tensor, explainer: Any) -> None:
    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    explain = explainer(net, layer_of(explainer))
    explain(images)
    before = alive()
    for _ in range(3):
        explain(images)
        with fastxkd.capture(net, "body") as captured:
            net(images)
        del captured
    assert alive() == before


@every
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_under_no_grad_and_inference_mode(
    net: Net, images: Tensor, explainer: Any, context: Callable[[], Any]
) -> None:
    explain = explainer(net, layer_of(explainer))
    expected = explain(images, [1, 0, 4, 2], True)
    with context():
        same(explain(images, [1, 0, 4, 2], True), expected)
        made_inside = images.clone()
        same(explain(made_inside, torch.tensor([1, 0, 4, 2]), True), expected)
    same(explain(made_inside, [1, 0, 4, 2], True), expected)


class Skip(nn.Module):
    """The images themselves are needed again, after the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head((images * self.body(images).sigmoid()).mean((2, 3)))


def test_images_of_inference_mode_that_the_graph_needs(images: Tensor) -> None:
    model = Skip()
    expected = cam.GradCAM(model, "body")(images, 1)
    with torch.inference_mode():
        inside = images.clone()
    same(cam.GradCAM(model, "body")(inside, 1), expected)


@every
def test_all_weights_frozen(net: Net, images: Tensor, explainer: Any) -> None:
    explain = explainer(net, layer_of(explainer))
    expected = explain(images)
    net.requires_grad_(False)
    same(explain(images), expected)


def reference(net: Net, images: Tensor, layer: str, dtype: torch.dtype) -> Tensor:
    """Grad-CAM in float64 of a net rounded to ``dtype``."""
    double = copy.deepcopy(net).to(dtype).double()
    return cam.GradCAM(double, layer)(images.to(dtype).double(), 1)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bf16_and_fp16_models(net: Net, images: Tensor, explainer: Any, dtype: torch.dtype) -> None:
    half = copy.deepcopy(net).to(dtype)
    found = explainer(half, layer_of(explainer))(images.to(dtype), 1)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert 0 <= found.min() <= found.max() <= 1
    if explainer is cam.GradCAM:
        expected = reference(net, images, "body", dtype).float()
        same(found, expected, 0.1 if dtype == torch.bfloat16 else 0.02)


@every
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast(net: Net, images: Tensor, explainer: Any, backend: str) -> None:
    """The model in bfloat16, the sums over channels in float32 for all that."""
    explain = explainer(net, layer_of(explainer))
    with fastxkd.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        found = explain(images, 1)
        assert torch.is_autocast_enabled("cpu")
        assert found.dtype == torch.float32
        assert found.isfinite().all()
        a, g = torch.rand(2, 64, 5, 5), torch.randn(2, 64, 5, 5)
        inside = fastxkd.cam_from(a, g, "gradcam", normalize=None)
        smooth = fastxkd.cam_from(a, g, "gradcam", normalize=None, eigen_smooth=True)
    expected = fastxkd.cam_from(a.double(), g.double(), "gradcam", normalize=None)
    torch.testing.assert_close(inside.double(), expected, rtol=0, atol=1e-5)
    expected = fastxkd.cam_from(a.double(), g.double(), normalize=None, eigen_smooth=True)
    torch.testing.assert_close(smooth.double(), expected, rtol=0, atol=1e-5)


@every
def test_in_place_relu_after_target(net: Net, images: Tensor, explainer: Any) -> None:
    pure = Net(inplace=False)
    pure.load_state_dict(net.state_dict())
    pure.eval()
    for layer in ("stem", "body", "body.1") if explainer is not cam.CAM else ("last",):
        expected = explainer(pure, layer)(images, 1)
        same(explainer(net, layer)(images, 1), expected)
    with fastxkd.capture(net, "body") as captured:
        found = captured.cam(score=net(images)[:, 1].sum(), size="input")
    same(found, cam.GradCAM(pure, "body")(images, 1))


@pytest.mark.parametrize("objects", ["one", "two"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "explainer", [cam.GradCAM, cam.EigenCAM, cam.AblationCAM], ids=lambda e: e.__name__
)
def test_two_threads_on_one_model(net: Net, objects: str, training: bool, explainer: Any) -> None:
    """0 wrong, 0 raised."""
    net.train(training)
    explainers = [explainer(net, "body"), explainer(net, "stem")]
    explainers = explainers[:1] * 2 if objects == "one" else explainers
    batches = [torch.randn(2, 3, 21, 17) for _ in range(24)]
    expected = [explainers[i % 2](batch, i % 5) for i, batch in enumerate(batches)]
    before, gate = state(net), threading.Barrier(2)

    def work(i: int) -> Tensor:
        gate.wait(30)
        return explainers[i % 2](batches[i], i % 5)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, range(24)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert state(net) == before


def test_two_threads_that_capture(net: Net) -> None:
    batches = [torch.randn(2, 3, 21, 17) for _ in range(24)]
    gate = threading.Barrier(2)

    def work(i: int) -> Tensor:
        with fastxkd.capture(net, "body") as captured:
            gate.wait(30)
            logits = net(batches[i])
            gate.wait(30)
        return captured.cam(score=logits[:, i % 5].sum(), size="input")

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, range(24)))
    for i, maps in enumerate(found):
        torch.testing.assert_close(
            maps, cam.GradCAM(net, "body")(batches[i], i % 5), rtol=0, atol=1e-6
        )


def test_class_index_out_of_range_in_with(net: Net, images: Tensor) -> None:
    """Raises inside the block and is not swallowed at its end."""
    with (
        pytest.raises(ValueError, match="targets: expected 0 <= class < 5, got 5"),
        compat.GradCAM(net, [net.body]) as explain,
    ):
        explain(images, [ClassifierOutputTarget(k) for k in (0, 1, 5, 2)])
    with pytest.raises(IndexError), cam.GradCAM(net, "body"):
        raise IndexError


@every
def test_nan_in_one_image(net: Net, images: Tensor, explainer: Any) -> None:
    explain = explainer(net, layer_of(explainer))
    rest = torch.tensor([0, 1, 3])
    expected = explain(images[rest], 1)
    images[2, :, 3, 4] = float("nan")
    found = explain(images, 1)
    assert found[2].isnan().all()
    torch.testing.assert_close(found[rest], expected, rtol=0, atol=1e-5)


def test_import_cost() -> None:
    """The drop-in needs none of what pytorch-grad-cam brings in."""
    code = (
        "import sys, fastxkd.compat.pytorch_grad_cam.utils.image;"
        "heavy = {'cv2', 'sklearn', 'matplotlib', 'ttach', 'pytorch_grad_cam'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    root = Path(fastxkd.__file__).parents[1]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


# --- a thousand calls


@pytest.mark.parametrize("training", [False, True])
def test_a_thousand_calls_change_nothing(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    model.train(training)
    before, kept = state(model), values(model)
    images = torch.randn(2, 1, 4, 4)
    explain = cam.GradCAM(model, "1")
    first = explain(images)
    for _ in range(1000):
        last = explain(images)
    assert last.equal(first)
    assert state(model) == before
    assert all(a.equal(b) for a, b in zip(values(model), kept, strict=True))
    model.eval()  # whose own forward changes nothing either
    for _ in range(300):
        with fastxkd.capture(model, "1") as captured:
            captured.cam(score=model(images).sum())
    model.train(training)
    assert state(model) == before
    assert all(a.equal(b) for a, b in zip(values(model), kept, strict=True))


# --- compiled models


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(net: Net, how: str, backend: Any) -> nn.Module:
    model = copy.deepcopy(net)
    if how == "root":
        return torch.compile(model, backend=backend)  # type: ignore[return-value]
    if how == "in place":
        model.compile(backend=backend)
    elif how == "layer":
        model.body = torch.compile(model.body, backend=backend)
    else:
        model.body.compile(backend=backend)
    return model


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", ["root", "in place", "layer", "layer in place"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo's own
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_models(net: Net, images: Tensor, how: str, backend: str) -> None:
    """Cold and warm; hooks come and go, and nothing is compiled again for them."""
    expected = cam.GradCAM(net, "body.1")(images, 1)
    graphs: list[int] = []

    def count(module: Any, given: Any) -> Any:
        graphs.append(1)
        return torch._dynamo.lookup_backend(backend)(module, given)

    model = compiled(net, how, count)
    prefix = "_orig_mod." if how == "layer" else ""
    layer = "body." + prefix + "1"
    explain = cam.GradCAM(model, layer)
    same(explain(images, 1), expected)
    assert not graphs  # explained before it was compiled
    logits = model(images)
    torch.testing.assert_close(logits, net(images))
    once = len(graphs)
    assert once >= 1
    for _ in range(2):
        same(explain(images, 1), expected)
        with fastxkd.capture(model, layer) as captured:
            score = model(images)[:, 1].sum()
        same(captured.cam(score=score, size="input"), expected)
        score.backward()  # after retain_graph
        model(images)
    assert len(graphs) == once


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_threads_on_one_compiled_model(net: Net, images: Tensor) -> None:
    """The first to leave must not switch the compiler on for the other, nor the last leave it."""
    model = torch.compile(net, backend="eager")
    model(images)
    expected = cam.GradCAM(net, "body")(images, 1)
    inside, left = threading.Event(), threading.Event()

    def second() -> Tensor:
        with fastxkd.capture(model, "body") as captured:
            inside.set()
            assert left.wait(30)
            score = model(images)[:, 1].sum()
        return captured.cam(score=score, size="input")

    with ThreadPoolExecutor(1) as pool:
        with fastxkd.capture(model, "body"):
            later = pool.submit(second)
            assert inside.wait(30)
        left.set()
        same(later.result(30), expected)
    from torch._dynamo import eval_frame

    assert eval_frame._stance.stance == "default"


# --- data parallelism


class Replicas(nn.Module):
    """What ``nn.DataParallel`` does with two devices, on one: replicas, each in a thread."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        done: dict[int, Tensor] = {}

        def run(i: int, part: Tensor, grad: bool) -> None:
            with torch.set_grad_enabled(grad):
                done[i] = replicate(self.module)(part)

        for i, part in enumerate(images.chunk(2)):
            worker = threading.Thread(target=run, args=(i, part, torch.is_grad_enabled()))
            worker.start()
            worker.join(30)
        return torch.cat([done[0], done[1]])


def replicate(module: nn.Module) -> nn.Module:
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(replica, name, replicate(child))
    for name, parameter in module.named_parameters(recurse=False):
        setattr(replica, name, parameter * 1)  # as Broadcast: no leaf
    for name, buffer in module.named_buffers(recurse=False):
        setattr(replica, name, buffer)
    return replica


@pytest.mark.parametrize("layers", [["body"], ["stem", "last"]], ids=str)
def test_data_parallel_replicas(net: Net, images: Tensor, layers: list[str]) -> None:
    """The whole batch's maps, not half of it."""
    model, step = Replicas(net), images[:3]
    expected = cam.GradCAM(net, layers)(step, 1)
    with fastxkd.capture(model, layers) as captured:
        model(images)  # an earlier pass
        logits = model(step)
    assert [a.shape[0] for a in captured.activations.values()] == [3] * len(layers)
    found = captured.cam(score=logits[:, 1].sum(), size="input")
    same(found, expected)
    logits.sum().backward()
    assert net.stem[0].weight.grad.abs().max() > 0
    # Only the second replica's half.
    with fastxkd.capture(model, layers) as captured:
        score = model(step)[2, 1]
    half = captured.cam(score=score, size="input", normalize=None)
    assert half[:2].abs().max() == 0
    assert half[2].max() > 0


def test_replicas_in_the_order_of_devices() -> None:
    class Part:
        def __init__(self, index: int) -> None:
            self.device = torch.device("cuda", index)

    layer = nn.Identity()
    wrapper = nn.Module()
    wrapper.device_ids = [2, 0, 1]
    tap = Tap({"a": layer}, cut=False, one_pass=False, model=wrapper)
    tap.parts["a"] = [Part(i) for i in (0, 1, 2)]
    assert [part.device.index for part in tap.replicas()["a"]] == [2, 0, 1]


def test_data_parallel_and_distributed_wrappers(net: Net, images: Tensor, tmp_path: Path) -> None:
    import torch.distributed as dist

    expected = cam.GradCAM(net, "body")(images, 1)
    same(cam.GradCAM(nn.DataParallel(net), "body")(images, 1), expected)
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(net)
        model.train()
        for _ in range(3):  # a step, a map of it, another map
            loss = F.cross_entropy(model(images), torch.tensor([0, 1, 2, 3]))
            loss.backward()
            kept = values(net)
            assert cam.GradCAM(model, net.body)(images, 1).shape == (4, 21, 17)
            with fastxkd.capture(model, "body") as captured:
                score = model(images)[:, 1].sum()
            captured.cam(score=score)
            score.backward()
            net.zero_grad()
        assert len(kept) > 0
        model.eval()
        assert all(not m._forward_hooks for m in model.modules())
    finally:
        dist.destroy_process_group()


# --- a step's own forward


class Tokens(nn.Module):
    num_prefix_tokens = 1

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.mix = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.last = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT
        x = self.mix(torch.cat([self.token.expand(len(x), -1, -1), x], 1))
        return self.head(self.last(x)[:, 0])


@pytest.mark.parametrize("size", [(16, 16), (8, 12)], ids=str)
def test_captured_tokens(size: tuple[int, int]) -> None:
    """By the images' aspect ratio where the model itself has run; else they must be explained."""
    model, images = Tokens().eval(), torch.randn(2, 3, *size)
    expected = cam.GradCAM(model, "mix")(images, 1)
    with fastxkd.capture(model, "mix") as captured:
        logits = model(images)
    same(captured.cam(score=logits[:, 1].sum(), size="input"), expected)
    grid = cam.tokens_to_maps(size[0] // 4, size[1] // 4)
    explicit = captured.cam(score=logits[:, 1].sum(), size=size, reshape_transform=grid)
    same(explicit, expected)
    with fastxkd.capture(model, "mix") as captured:
        logits = model.forward(images)
    score = logits[:, 1].sum()
    with pytest.raises(ValueError, match="size: no images are known"):
        captured.cam(score=score, size="input")
    with pytest.raises(ValueError, match=r"'mix': expected spatial .*use reshape_transform"):
        captured.cam(score=score, size=size)
    same(captured.cam(score=score, size=size, reshape_transform=grid), expected)


@pytest.mark.parametrize("eigen", [False, True])
def test_captured_layers_one_by_one(net: Net, images: Tensor, eigen: bool) -> None:
    explain = cam.LayerCAM(net, ["stem", "body"])
    expected = explain(images, 1, False, eigen, aggregate=None)
    with fastxkd.capture(net, ["stem", "body"]) as captured:
        score = net(images)[:, 1].sum()
    found = captured.cam("layercam", score=score, size="input", aggregate=None, eigen_smooth=eigen)
    for a, b in zip(found, expected, strict=True):
        same(a, b)
    with pytest.raises(ValueError, match="aggregate: expected 'mean' or None, got 'sum'"):
        captured.cam(score=score, aggregate="sum")


def test_a_layer_that_the_last_pass_left_out(images: Tensor) -> None:
    class Sometimes(Net):
        def forward(self, images: Tensor, all_of_it: bool = True) -> Tensor:
            return super().forward(images) if all_of_it else self.stem(images)

    model = Sometimes().eval()
    with fastxkd.capture(model, "body") as captured:
        model(images)
        model(images, all_of_it=False)
    with pytest.raises(ValueError, match="target layer 'body' was never reached"):
        _ = captured.activations


# --- views


@pytest.mark.parametrize(("batch_size", "passes"), [(32, [4, 20]), (8, [4, 8, 8, 4]), (1, [4] * 6)])
def test_aug_smooth_in_batches(
    net: Net, images: Tensor, batch_size: int, passes: list[int]
) -> None:
    rows: list[int] = []
    expected = cam.GradCAM(net, "body", batch_size=4)(images, [1, 0, 4, 2], True)
    net.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    explain = cam.GradCAM(net, "body", batch_size=batch_size)
    for targets in ([1, 0, 4, 2], torch.tensor([1, 0, 4, 2])):
        rows.clear()
        same(explain(images, targets, True), expected, 1e-5)
        assert rows == passes
        assert explain.outputs.shape == (4, 5)
    rows.clear()
    callables = [lambda row, k=k: row[k] for k in (1, 0, 4, 2)]
    same(explain(images, callables, True), expected, 1e-5)
    one_class = explain(images, 1, True)
    same(explain(images, lambda row: row[1], True), one_class, 1e-5)
    rows.clear()
    same(explain(images, None, True, objective=lambda out: out[:, 1].sum()), one_class, 1e-5)
    assert rows == [4] * 6  # an objective sees one view's batch at a time


# --- inside a training step


def test_capture_behind_a_frozen_backbone(net: Net, images: Tensor) -> None:
    """Nothing in front of the layer has a graph; the maps need one from the layer on."""
    expected = cam.GradCAM(net, "body")(images, 1)
    for part in (net.stem, net.body):
        part.requires_grad_(False)
    with fastxkd.capture(net, "body") as captured:
        logits = net(images)
    found = captured.cam(score=logits[:, 1].sum(), size="input")
    same(found, expected)
    maps = captured.cam("hirescam", score=logits[:, 1].sum(), differentiable=True, normalize=None)
    (logits.sum() + maps.sum()).backward()
    assert net.head.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in net.body.parameters())
    with torch.no_grad(), fastxkd.capture(net, "body") as captured:
        net(images)
    assert not captured.activations["body"].requires_grad


def test_capture_says_why_there_is_no_graph(net: Net, images: Tensor) -> None:
    with fastxkd.capture(net, "stem") as captured:
        with torch.no_grad():
            x = net.stem(images)
        score = net.head(net.body(x).mean((2, 3))).sum()
    with pytest.raises(
        ValueError, match="target layer 'stem': its output has no graph; it ran und"
    ):
        captured.cam(score=score)


class Checkpointed(Net):
    reentrant = False

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(self.stem(images))
        x = torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=self.reentrant)
        return self.head(self.last(x).mean((2, 3)))


def test_capture_in_a_checkpoint(images: Tensor) -> None:
    """The run of the layer in the backward pass replaces nothing."""
    net = Checkpointed().eval()
    expected = cam.GradCAM(net, "body")(images, 1)
    with fastxkd.capture(net, "body") as captured:
        score = net(images)[:, 1].sum()
        same(captured.cam(score=score, size="input"), expected)
        same(captured.cam(score=score, size="input"), expected)
        score.backward()
    net.reentrant = True
    with fastxkd.capture(net, "body") as captured:
        score = net(images)[:, 1].sum()
    with pytest.raises(ValueError, match=r"'body': its output has no graph.*use_reentrant=True"):
        captured.cam(score=score)


def test_explainers_inside_the_block_do_not_count(net: Net, images: Tensor) -> None:
    other = torch.randn(2, 3, 21, 17)
    expected = cam.GradCAM(net, "body")(images, 1)
    with fastxkd.capture(net, "body") as captured:
        score = net(images)[:, 1].sum()
        maps = cam.GradCAM(net, "body")(other, 1)
        cam.ScoreCAM(net, "body")(other, 1)
        fastxkd.metrics.deletion_curve(net, other, maps, 1, steps=2)
    same(captured.cam(score=score, size="input"), expected)
    assert captured.activations["body"].shape[0] == 4


def test_capture_warns_of_a_layer_that_runs_twice(net: Net, images: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, images: Tensor) -> Tensor:
            return self.net(images) + self.net(images.flip(3))

    with (
        fastxkd.capture(Twice(), "net.body") as captured,
        pytest.warns(UserWarning, match=r"'net.body' ran more than once"),
    ):
        captured._model(images)
    with fastxkd.capture(net, "body"):  # several passes, or parts of the model, are no surprise
        for _ in range(2):
            net(images)
            net.body(net.stem(images))


def test_capture_is_entered_once(net: Net, images: Tensor) -> None:
    captured = fastxkd.capture(net, "body")
    before = state(net)
    with captured:
        with pytest.raises(RuntimeError, match="capture: entered already"):
            captured.__enter__()
        net(images)
    assert state(net) == before
    with captured:  # one block after the other
        net(images[:2])
    assert captured.activations["body"].shape[0] == 2
    assert state(net) == before


def test_a_plain_forward_of_another_thread_has_no_keywords(net: Net, images: Tensor) -> None:
    """torch registers a hook first, and only then that it takes keywords."""
    captured = fastxkd.capture(net, "body")
    with captured, ThreadPoolExecutor(1) as pool:
        net(images)
        assert pool.submit(captured._tap._begin, net, (images[:1],)).result() is None
        assert captured._tap.image == (21, 17)
        assert captured._tap._begin(net, (torch.rand(1, 3, 9, 8),)) is None
        assert captured._tap.image == (9, 8)


def test_flags_of_modules_that_two_explained_models_share(net: Net) -> None:
    """The inner model is done first, or the outer one: neither ends the other's evaluation."""
    outer = nn.Sequential(net).train()
    before = values(outer)
    for first, second in ((net, outer), (outer, net)):
        one, two = capturing.evaluating(first), capturing.evaluating(second)
        one.__enter__()
        two.__enter__()
        assert not any(m.training for m in net.modules())
        one.__exit__(None, None, None)
        assert not any(m.training for m in net.modules())
        with torch.no_grad():
            second(torch.randn(4, 3, 21, 17))
        two.__exit__(None, None, None)
        assert all(m.training for m in outer.modules())
    assert all(a.equal(b) for a, b in zip(values(outer), before, strict=True))
    assert not capturing._evaluated


def test_a_layer_by_its_second_name(net: Net, images: Tensor) -> None:
    expected = cam.GradCAM(net, "body")(images, 1)
    net.alias = net.body
    for layer in ("body", "alias", net.body, "alias.1"):
        assert cam.GradCAM(net, layer)(images, 1).shape == expected.shape
    assert cam.GradCAM(net, "alias")(images, 1).equal(expected)
