"""Explanations inside Ray Data, on real actors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastxkd
from fastxkd.runs.cnn import SmallCNN
from fastxkd.runs.ray import Explain
from tests.conftest import needs

ROOT = Path(__file__).resolve().parents[1]


def small() -> SmallCNN:
    torch.manual_seed(0)
    return SmallCNN((4, 4, 6, 6), (1, 1, 1, 1), num_classes=5, in_channels=3).eval()


def pictures(count: int = 10) -> np.ndarray[Any, Any]:
    return np.random.RandomState(0).randint(0, 256, (count, 16, 16, 3)).astype(np.uint8)


def model_input(images: np.ndarray[Any, Any]) -> torch.Tensor:
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128


def test_a_batch_gains_maps_and_scores():
    model, images = small(), pictures()
    found = Explain(model, methods=["gradcam", "gradcam++"], layers=["stage3", "stage4"])(
        {"image": images, "name": np.arange(10)}
    )
    cam = fastxkd.GradCAM(model, ["stage3", "stage4"])
    maps = cam(model_input(images), size=None, aggregate=None)
    for layer, expected in zip(("stage3", "stage4"), maps, strict=True):
        np.testing.assert_allclose(found[f"gradcam/{layer}"], expected, atol=1e-6)
        assert found[f"gradcampp/{layer}"].shape == expected.shape
        np.testing.assert_allclose(found[f"gradcam/{layer}_mean"], expected.mean((1, 2)), rtol=1e-5)
    logits = cam.outputs
    assert found["predicted"].tolist() == logits.argmax(1).tolist() == found["target"].tolist()
    np.testing.assert_allclose(found["logit"], logits.amax(1), rtol=1e-6)
    assert found["status"].tolist() == ["ok"] * 10
    assert found["name"].tolist() == list(range(10))
    assert found["image"] is images


def test_batches_of_nothing_and_weights_of_16_bits():
    explain = Explain(small().bfloat16())
    empty = {"image": pictures(0), "name": np.arange(0)}
    for _ in range(2):  # before and after the first one with images
        assert explain(empty).keys() == {"image", "name"}
        found = explain({"image": pictures(3)})
    assert found["status"].tolist() == ["ok"] * 3
    assert found["logit"].dtype == np.float32
    with pytest.raises(ValueError, match=r"model: it does not take images \[1, 16, 16\]"):
        Explain(small())({"image": pictures(2)[..., 0]})


def test_images_that_do_not_fit_are_said_so():
    images = pictures(5)
    ragged = np.empty(5, dtype=object)
    for row in range(5):
        ragged[row] = images[row]
    ragged[1], ragged[3] = images[1][:7], None
    explain = Explain(small(), targets="label")
    labels = np.array([0, 1, 2, 3, 9])
    found = explain({"image": ragged, "label": labels})
    assert [status == "ok" for status in found["status"]] == [True, False, True, False, False]
    assert "expected torch.uint8 [3, 16, 16]" in found["status"][1]
    assert "its label 9 is none of 5 classes" in found["status"][4]
    whole = explain({"image": images, "label": labels.clip(max=4)})
    assert np.array_equal(found["gradcam"][[0, 2]], whole["gradcam"][[0, 2]])
    assert np.isnan(found["gradcam"][[1, 3, 4]]).all()
    assert found["target"].tolist() == [0, -1, 2, -1, -1]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"methods": "unicam"}, "methods: unicam needs a reference set"),
        ({"model": "cnn-small"}, "num_classes: expected a number"),
        ({"targets": "best"}, "targets: expected"),
        ({"methods": "nocam"}, "methods: expected some of"),
        ({"image": "picture"}, "image: expected a column 'picture'"),
        ({"targets": "label"}, "label: expected a column 'label'"),
        ({"layers": ["stage9"]}, "no layer named 'stage9'"),
    ],
)
def test_refused(options, text):
    given = {"model": small(), **options}
    with pytest.raises(ValueError, match=text):
        Explain(given.pop("model"), **given)({"image": pictures(2)})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own, of its dependencies
def test_real_ray(tmp_path, monkeypatch):
    ray = needs("ray")
    needs("ray.data")
    for module in ("safetensors", "pyarrow"):
        needs(module)
    from fastxkd.runs.models import load_model

    torch.manual_seed(1)
    model = load_model("cnn-small", num_classes=5, in_channels=3).eval()
    weights = tmp_path / "small.safetensors"
    needs("safetensors.torch").save_file(model.state_dict(), weights)
    images = pictures(24)
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False,
        runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
        object_store_memory=100_000_000,
    )  # fmt: skip
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [{"image": image, "number": i, "label": i % 5} for i, image in enumerate(images)]
        explained = ray.data.from_items(rows).map_batches(
            Explain,
            fn_constructor_kwargs={
                "model": "cnn-small", "weights": str(weights), "num_classes": 5,
                "methods": ["gradcam", "layercam"], "targets": "label",
            },
            batch_size=8, concurrency=2,
        )  # fmt: skip
        found = sorted(explained.take_all(), key=lambda row: row["number"])
    finally:
        ray.shutdown()
    assert [row["number"] for row in found] == list(range(24))
    cam = fastxkd.GradCAM(model, ["stage4"])
    maps = cam(model_input(images), torch.arange(24) % 5, size=None)
    np.testing.assert_allclose(np.stack([row["gradcam"] for row in found]), maps, atol=1e-5)
    assert {row["status"] for row in found} == {"ok"}
    assert [row["target"] for row in found] == [i % 5 for i in range(24)]
    assert all(row["layercam"].shape == maps.shape[1:] for row in found)
