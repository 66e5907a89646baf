"""Maps as pictures: numbers of the blend, shapes, dtypes, PNG."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch

from fastxkd.cam import render
from tests.conftest import needs


def test_overlay_is_the_blend_it_documents():
    white = np.full((1, 3, 3), 255, np.uint8)
    heat = np.array([[0.0, 0.5, 1.0]], np.float32)
    color = render.colors("inferno").astype(float)
    want = np.stack(
        [
            (1 - a) * 255 + a * color[level]
            for a, level in ((0.85 * 0.4, 0), (0.85 * 0.7, 128), (0.85, 255))
        ]
    )
    assert np.abs(render.overlay(white, heat)[0] - want).max() <= 0.5
    assert render.overlay(white, heat, opacity=0.0).min() == 255
    assert np.array_equal(render.overlay(white, heat, opacity=1.0)[0, 2], color[255])


@pytest.mark.parametrize("background", [0, 128, 255])
def test_more_is_brighter_on_any_grey(background: int):
    image = np.full((1, 256, 3), background, np.uint8)
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None]
    luma = render.overlay(image, ramp)[0] @ np.array([0.2126, 0.7152, 0.0722])
    # Rounding to 8 bits may hold the value for a step, never lower it by more than that.
    assert np.diff(luma).min() > -1.0
    assert luma[-1] > luma[0] + 60


def test_gray_takes_the_hue_out_and_can_be_turned_off():
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 255
    nothing = np.zeros((2, 2), np.float32)
    assert np.ptp(render.overlay(red, nothing, opacity=0.0), axis=-1).max() == 0
    assert np.array_equal(render.overlay(red, nothing, opacity=0.0, gray=False), red)


@pytest.mark.parametrize("name", render.COLORMAPS)
def test_colors_match_matplotlib(name: str):
    table = needs("matplotlib").colormaps[name](np.arange(256))[:, :3] * 255
    assert np.abs(render.colors(name) - table).max() <= 2.5


def test_own_colors():
    grey = np.array([[0, 0, 0], [255, 255, 255]], np.uint8)
    assert np.array_equal(render.colors(grey), np.repeat(np.arange(256)[:, None], 3, 1))
    picture = render.overlay(
        np.zeros((1, 1)), np.ones((1, 1), np.float32), colormap=grey, opacity=1.0
    )
    assert picture.tolist() == [[[255, 255, 255]]]


SHAPES = {
    "chw": torch.zeros(3, 6, 5),
    "1hw": torch.zeros(1, 6, 5),
    "hw": torch.zeros(6, 5),
    "hwc": np.zeros((6, 5, 3)),
    "hw1": np.zeros((6, 5, 1)),
    "uint8": np.zeros((6, 5, 3), np.uint8),
    "uint8 tensor": torch.zeros(3, 6, 5, dtype=torch.uint8),
    "bfloat16": torch.zeros(3, 6, 5, dtype=torch.bfloat16),
    "grad": torch.zeros(3, 6, 5, requires_grad=True),
}


@pytest.mark.parametrize("image", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("as_tensor", [True, False])
def test_any_layout_gives_the_same_picture(image: render.ArrayLike, as_tensor: bool):
    heat = np.linspace(0, 1, 30, dtype=np.float32).reshape(6, 5)
    picture = render.overlay(image, torch.from_numpy(heat) if as_tensor else heat)
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, render.overlay(np.zeros((6, 5, 3), np.uint8), heat))


def test_batch_equals_its_images():
    images, maps = torch.rand(4, 3, 8, 9), torch.rand(4, 8, 9)
    together = render.overlay(images, maps)
    assert together.shape == (4, 8, 9, 3)
    assert np.array_equal(
        together, [render.overlay(i, m) for i, m in zip(images, maps, strict=True)]
    )


def test_layout_of_three_wide_pictures_follows_the_container():
    ambiguous = np.zeros((3, 4, 3), np.uint8)
    ambiguous[0] = 255
    assert render.to_picture(ambiguous)[0].min() == 255
    red = render.to_picture(torch.from_numpy(ambiguous))
    assert red.shape == (4, 3, 3)
    assert red[0, 0].tolist() == [255, 0, 0]


def test_small_map_is_resized_as_torch_does():
    heat = torch.rand(7, 7)
    big = torch.nn.functional.interpolate(heat[None, None], (28, 20), mode="bilinear")[0, 0]
    image = torch.rand(3, 28, 20)
    assert np.array_equal(render.overlay(image, heat), render.overlay(image, big))


def test_normalised_image_comes_back():
    image = torch.rand(3, 5, 5)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalised = (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    back = render.to_picture(normalised, mean=mean, std=std).astype(int)
    assert np.abs(back - render.to_picture(image)).max() <= 1
    assert np.array_equal(
        render.to_picture(torch.full((1, 2, 2), -1.0), mean=0.5, std=0.5), np.zeros((2, 2, 3))
    )


def test_missing_values_leave_the_image_alone():
    image = np.full((1, 3, 3), 200, np.uint8)
    heat = np.array([[np.nan, np.inf, 1.0]], np.float32)
    picture = render.overlay(image, heat)
    assert picture[0, :2].tolist() == [[200] * 3] * 2
    assert picture[0, 2].tolist() != [200] * 3
    broken = render.overlay(torch.tensor([[[float("nan"), 1.0]]]), np.zeros((1, 2), np.float32))
    assert broken.shape == (1, 2, 3)


WRONG = {
    "map shape": (torch.zeros(3, 4, 4), torch.zeros(2, 4, 4), ValueError, r"map: .*\[2, 4, 4\]"),
    "map batch": (torch.zeros(2, 3, 4, 4), torch.zeros(3, 4, 4), ValueError, r"\[2, H, W\]"),
    "map range": (torch.zeros(3, 4, 4), torch.full((4, 4), 5.0), ValueError, "normalize='minmax'"),
    "map dtype": (torch.zeros(3, 4, 4), torch.zeros(4, 4).int(), TypeError, "map: .*int32"),
    "map type": (torch.zeros(3, 4, 4), [[0.0]], TypeError, "map: .*list"),
    "map empty": (torch.zeros(3, 4, 4), torch.zeros(0, 4), ValueError, r"\[0, 4\]"),
    "image range": (torch.full((3, 4, 4), -2.0), torch.zeros(4, 4), ValueError, "image: .*mean="),
    "image dtype": (torch.zeros(3, 4, 4).long(), torch.zeros(4, 4), TypeError, "image: .*int64"),
    "image channels": (torch.zeros(2, 4, 4), torch.zeros(4, 4), ValueError, r"image: .*\[2, 4, 4"),
    "image rank": (torch.zeros(4), torch.zeros(4, 4), ValueError, r"image: .*\[4\]"),
    "image empty": (torch.zeros(3, 0, 4), torch.zeros(4, 4), ValueError, "at least one pixel"),
}


@pytest.mark.parametrize(("image", "heat", "kind", "text"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_says_what_came(image, heat, kind, text):
    with pytest.raises(kind, match=text):
        render.overlay(image, heat)


def test_wrong_options():
    image, heat = torch.zeros(3, 2, 2), torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"opacity: .*1\.5"):
        render.overlay(image, heat, opacity=1.5)
    with pytest.raises(ValueError, match=r"colormap: .*inferno.*'jet'"):
        render.overlay(image, heat, colormap="jet")
    with pytest.raises(ValueError, match=r"colormap: .*float64 \[4, 3\]"):
        render.overlay(image, heat, colormap=np.zeros((4, 3)))
    with pytest.raises(ValueError, match="at least 2 colours"):
        render.colors(np.zeros((1, 3), np.uint8))
    with pytest.raises(ValueError, match="std: expected 1 or 3 values, got 2"):
        render.overlay(image, heat, std=(1.0, 2.0))
    with pytest.raises(TypeError, match=r"image: expected floats.*uint8"):
        render.overlay(image.byte(), heat, mean=0.5)
    with pytest.raises(ValueError, match=r"picture: .*float32 \[2, 2\]"):
        render.png(np.zeros((2, 2), np.float32))


def test_inputs_are_not_written_to():
    image, heat = torch.rand(3, 4, 4), torch.rand(4, 4)
    before = image.clone(), heat.clone()
    render.overlay(image, heat)
    render.heat_png(heat)
    assert torch.equal(image, before[0])
    assert torch.equal(heat, before[1])


def test_png_holds_the_picture():
    pillow = needs("PIL.Image")
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    with pillow.open(io.BytesIO(render.png(picture))) as image:
        assert np.array_equal(np.asarray(image), picture)
    assert render.data_uri(b"abc") == "data:image/png;base64,YWJj"


@pytest.mark.parametrize("colormap", ["inferno", "viridis"])
def test_heat_layer_over_grey_is_the_overlay(colormap: str):
    pillow = needs("PIL.Image")
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (16, 16), dtype=np.uint8)
    heat = rng.random((16, 16), np.float32)
    heat[0] = np.linspace(0, 1, 16)
    heat[1, 1] = np.nan
    with pillow.open(io.BytesIO(render.heat_png(heat, colormap=colormap))) as file:
        layer = np.asarray(file.convert("RGBA")).astype(float)
    assert layer[1, 1, 3] == 0
    alpha = 0.85 * layer[..., 3:] / 255
    flat = (1 - alpha) * image[..., None] + alpha * layer[..., :3]
    want = render.overlay(image, heat, colormap=colormap)
    assert np.abs(flat - want).max() <= 3.0


def test_overlay_needs_no_extra_and_png_names_it(monkeypatch: pytest.MonkeyPatch):
    for module in ("PIL", "PIL.Image", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)
    picture = render.overlay(torch.zeros(3, 2, 2), torch.zeros(2, 2))
    with pytest.raises(ImportError, match=r"fastxkd\[report\]"):
        render.png(picture)
