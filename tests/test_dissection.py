"""Network dissection against a plain loop over images and units, written from the specification."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastxkd.metrics.concept_scores import Concepts, Dissection, concept_iou
from fastxkd.metrics.dissection import DissectionTally, NetworkDissection, network_dissection
from fastxkd.metrics.unit_thresholds import unit_thresholds
from tests.conftest import needs

ROOT = Path(__file__).resolve().parents[1]
CONCEPTS = Concepts(
    ("", "cat", "dog", "wheel", "red", "blue", "grass", "street", "rare"),
    ("object", "part", "color", "texture", "scene", "none of these"),
    (0, 0, 0, 1, 2, 2, 3, 4, 0),
)


def net(units: int = 10, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, units, 3, 2), nn.ReLU(),
        nn.Dropout(0.5), nn.Flatten(), nn.Linear(49 * units, 4),
    )  # fmt: skip


def data(count: int = 23, seed: int = 0, layers: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Images that show something of their masks; labels of whole images."""
    random = np.random.RandomState(seed)
    things = random.choice([0, 0, 1, 2, 3, 8], (count, 4, 5)).repeat(7, 1).repeat(5, 2)
    shades = random.choice([0, 4, 5], (count, 28, 25))
    masks = np.stack([things, shades, np.zeros_like(things)][:layers], 1)
    masks[::5] = 0
    labels = np.stack([random.choice([0, 6], count), random.choice([0, 7], count)], 1)
    images = random.normal(size=(count, 3, 32, 32))
    for i in range(count):
        where = things[i][np.ix_(np.arange(32) * 28 // 32, np.arange(32) * 25 // 32)]
        images[i, 0] += 2.0 * (where == 1)
        images[i, 1] += 2.0 * (where == 2)
        images[i, 2] += 1.5 * (labels[i, 0] == 6)
    return (
        torch.from_numpy(images).float(),
        torch.from_numpy(masks).int(),
        torch.from_numpy(labels),
    )


def in_batches(*tensors: Tensor, size: int = 5) -> list[tuple[Tensor, ...]]:
    return list(zip(*(tensor.split(size) for tensor in tensors), strict=True))


def straightforward(
    model: nn.Module,
    layer: nn.Module,
    batches: list[tuple[Tensor, ...]],
    position: float = 0.995,
) -> dict[str, Any]:
    """The whole procedure: one image and one unit at a time."""
    cv2 = needs("cv2")
    kept: list[np.ndarray[Any, Any]] = []
    handle = layer.register_forward_hook(lambda m, i, output: kept.append(output.numpy().copy()))
    model.eval()
    with torch.no_grad():
        for images, *_ in batches:
            model(images)
    handle.remove()
    maps = np.concatenate(kept)
    masks = torch.cat([batch[1] for batch in batches]).numpy()
    whole = torch.cat([batch[2] for batch in batches]).numpy()
    count, units = maps.shape[:2]
    height, width = masks.shape[2:]
    labels, kinds = len(CONCEPTS.names), len(CONCEPTS.categories)
    thresholds = np.array(
        [np.quantile(maps[:, u].astype(np.float64).ravel(), position) for u in range(units)]
    )
    both, area, truth = (np.zeros(shape) for shape in ((units, labels), (units, kinds), (labels,)))
    for i in range(count):
        given = [c for c in whole[i] if c]
        for c in given:
            truth[c] += height * width
        for c in range(1, labels):
            truth[c] += (masks[i] == c).sum()
        for u in range(units):
            if maps[i, u].max() <= thresholds[u]:
                continue
            large = cv2.resize(maps[i, u], (width, height), interpolation=cv2.INTER_LINEAR)
            on = large > thresholds[u]
            seen = set()
            for layer_of_labels in masks[i]:
                under = layer_of_labels[on]
                for c in range(1, labels):
                    pixels = (under == c).sum()
                    both[u, c] += pixels
                    if pixels:
                        seen.add(CONCEPTS.category[c])
            for c in given:
                both[u, c] += on.sum()
                seen.add(CONCEPTS.category[c])
            for k in seen:
                area[u, k] += on.sum()
    iou = np.zeros((units, labels))
    for u in range(units):
        for c in range(1, labels):
            k = CONCEPTS.category[c]
            iou[u, c] = both[u, c] / (area[u, k] + truth[c] - both[u, c] + 1e-10)
    return {"thresholds": thresholds, "iou": iou, "best": iou.argmax(1), "top": iou.max(1)}


def agrees(found: Dissection, wanted: dict[str, Any]) -> None:
    assert np.array_equal(found.thresholds.numpy(), wanted["thresholds"])
    assert np.abs(found.iou().numpy() - wanted["iou"]).max() <= 1e-6
    assert found.labels.tolist() == wanted["best"].tolist()
    assert np.allclose(found.scores.numpy(), wanted["top"], atol=1e-6)
    detectors = wanted["top"] >= 0.05
    assert found.detectors == detectors.sum()
    assert found.unique_detectors == len(set(wanted["best"][detectors]))
    for k, name in enumerate(CONCEPTS.categories):
        won = [c for c in wanted["best"][detectors] if CONCEPTS.category[c] == k]
        assert found.counts[name] == (len(won), len(set(won)))


@pytest.mark.parametrize("spooled", [False, True])
@pytest.mark.parametrize(("layers", "q"), [(1, 0.2), (2, 0.05), (3, 0.1)])
def test_against_the_plain_loop(backend, tmp_path, spooled, layers, q):
    model, batches = net(), in_batches(*data(layers=layers))
    wanted = straightforward(model, model[4], batches, 1 - q)
    model.train()
    spool = tmp_path if spooled else None
    found = NetworkDissection(model, "4", CONCEPTS, q=q, spool=spool)(batches)
    agrees(found, wanted)
    # It must be a case in which something is found, and something is not.
    assert found.detectors > 0
    assert len(set(found.labels.tolist())) > 1
    assert all(module.training for module in model.modules())
    assert not model[4]._forward_hooks
    assert list(tmp_path.iterdir()) == []


def test_the_published_point_of_the_quantile():
    model, batches = net(), in_batches(*data())
    wanted = straightforward(model, model[4], batches, 994 / 999)
    found = NetworkDissection(model, model[4], CONCEPTS, quantile="published")(batches)
    agrees(found, wanted)
    exact = NetworkDissection(model, model[4], CONCEPTS)(batches)
    assert not torch.equal(found.thresholds, exact.thresholds)


def test_the_core_takes_tensors():
    model, (images, masks, labels) = net(), data()
    wanted = straightforward(model, model[4], [(images, masks, labels)], 0.9)
    with torch.no_grad():
        maps = model.eval()[:5](images)
    found = network_dissection(maps, masks, labels, concepts=CONCEPTS, q=0.1)
    agrees(found, wanted)
    assert torch.equal(unit_thresholds(lambda: maps.split(4), 0.1), found.thresholds)


def test_batches_do_not_matter():
    model, (images, masks, labels) = net(), data()
    with torch.no_grad():
        maps = model.eval()[:5](images)
    whole = network_dissection(maps, masks, labels, concepts=CONCEPTS, q=0.1)
    tally = DissectionTally(whole.thresholds, CONCEPTS)
    for start in range(0, 23, 4):
        part = slice(start, start + 4)
        tally.update(maps[part], masks[part], labels[part])
    found = tally.compute()
    assert torch.equal(found.intersections, whole.intersections)
    assert torch.equal(found.areas, whole.areas)
    assert torch.equal(found.label_areas, whole.label_areas)
    assert found.images == 23


def test_a_label_in_two_layers_counts_each_time_or_once():
    maps = torch.zeros(1, 1, 2, 2)
    maps[0, 0, 0] = 1.0
    masks = torch.zeros(1, 2, 4, 4, dtype=torch.int32)
    masks[0, :, :2] = 1
    concepts = Concepts(("", "up"), ("part",), (0, 0))
    for repeats, pixels in (("each", 8), ("once", 4)):
        tally = DissectionTally(torch.tensor([0.8]), concepts, repeats=repeats)
        tally.update(maps, masks)
        found = tally.compute()
        assert found.intersections[0, 1] == pixels
        assert found.label_areas[1] == 2 * pixels
        assert found.areas[0, 0] == 4


def test_ties_go_to_the_first_label_and_nothing_has_no_name():
    concepts = Concepts(("", "a", "b", "c"), ("one", "two"), (0, 1, 0, 0))
    found = Dissection(
        concepts,
        torch.zeros(2),
        torch.tensor([[0, 3, 3, 1], [0, 0, 0, 0]]),
        torch.tensor([[6, 6], [0, 0]]),
        torch.tensor([0, 6, 6, 6]),
        images=1,
        iou_threshold=0.3,
    )
    first, second = found.units
    assert (first.label, first.name, first.category) == (1, "a", "two")
    assert first.iou == pytest.approx(3 / 9, abs=1e-10)
    assert first.detector
    assert (second.label, second.name, second.category, second.detector) == (0, "", "", False)
    assert (found.detectors, found.unique_detectors) == (1, 1)
    assert found.counts == {"one": (0, 0), "two": (1, 1)}


def test_iou_is_that_of_the_formula():
    random = torch.Generator().manual_seed(0)
    both = torch.randint(0, 50, (4, 5), generator=random)
    areas = torch.randint(50, 90, (4, 2), generator=random)
    truth = torch.randint(50, 90, (5,), generator=random)
    kinds = torch.tensor([0, 0, 1, 1, 0])
    found = concept_iou(both, areas, truth, kinds)
    assert found.dtype == torch.float64
    for u in range(4):
        for c in range(1, 5):
            union = int(areas[u, kinds[c]]) + int(truth[c]) - int(both[u, c])
            assert found[u, c].item() == pytest.approx(int(both[u, c]) / union, rel=1e-9)
    assert not found[:, 0].any()


class Tokens(nn.Module):
    """A transformer's layout: a class token and a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.cut, self.block = nn.Conv2d(3, 6, 8, 8), nn.Linear(6, 6)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.cut(images).flatten(2).mT
        out: Tensor = self.block(torch.cat([tokens[:, :1], tokens], 1))
        return out.mean(1)


def test_tokens_and_pooled_units():
    model, batches = Tokens(), in_batches(*data())
    dissection = NetworkDissection(model, "block", CONCEPTS, q=0.1)
    assert dissection.activations(batches[0][0]).shape == (5, 6, 4, 4)
    assert len(dissection(batches).units) == 6
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    dissection = NetworkDissection(pooled, "2", CONCEPTS, q=0.3)
    assert dissection.activations(batches[0][0]).shape == (5, 4, 1, 1)
    assert dissection(batches).images == 23


def test_half_precision_is_exact():
    model, batches = net().bfloat16(), in_batches(*data())
    batches = [(images.bfloat16(), *rest) for images, *rest in batches]
    found = NetworkDissection(model, "4", CONCEPTS, q=0.1)(batches)
    with torch.no_grad():
        maps = torch.cat([model.eval()[:5](images) for images, *_ in batches])
    wanted = [np.quantile(maps[:, u].double().numpy().ravel(), 0.9) for u in range(10)]
    assert found.thresholds.tolist() == wanted


class Fickle(nn.Module):
    """Another answer every time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Identity(), 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.layer(images * self.calls)
        return out


def test_a_model_that_changes_its_mind_needs_a_spool(tmp_path):
    batches = in_batches(*data())
    with pytest.raises(ValueError, match="other values than the first"):
        NetworkDissection(Fickle(), "layer", CONCEPTS, q=0.1)(batches)
    found = NetworkDissection(Fickle(), "layer", CONCEPTS, q=0.1, spool=tmp_path)(batches)
    assert found.images == 23


class Shuffled:
    """Images in another order every time."""

    def __init__(self) -> None:
        self.tensors, self.random = data(), np.random.RandomState(3)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = torch.from_numpy(self.random.permutation(len(self.tensors[0])))
        return iter(in_batches(*(tensor[order] for tensor in self.tensors), size=1))


@pytest.mark.parametrize("spooled", [False, True])
def test_order_does_not_matter(tmp_path, spooled):
    model = net().eval()
    spool = tmp_path if spooled else None
    found = NetworkDissection(model, "4", CONCEPTS, q=0.1, spool=spool)(Shuffled())
    agrees(found, straightforward(model, model[4], in_batches(*data(), size=1), 0.9))


def test_with_a_spool_data_comes_once(tmp_path):
    model = net().eval()
    batches = in_batches(*data())
    nobody = tuple(tensor[:0] for tensor in batches[0])
    dissection = NetworkDissection(model, "4", CONCEPTS, q=0.1, spool=tmp_path)
    found = dissection(batch for batch in [nobody, *batches])
    agrees(found, straightforward(model, model[4], batches, 0.9))
    without = dissection(batch[:2] for batch in batches)
    assert torch.equal(without.thresholds, found.thresholds)
    assert found.label_areas[6:8].all()
    assert not without.label_areas[6:8].any()


def test_labels_that_are_none_are_named_on_every_device():
    tally = DissectionTally(torch.zeros(1, device="meta"), CONCEPTS)
    maps, masks = torch.zeros(2, 1, 3, 3), torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    masks[1, 0, 0, 0] = 9
    with pytest.raises(ValueError, match="masks: expected labels from 0 to 8, got 9 in image 1"):
        tally.update(maps, masks)


def test_what_does_not_fit_is_named(tmp_path):
    model, batches = net(), in_batches(*data())
    for given, words in (
        ({"q": 0}, "q: expected a share between 0 and 1, got 0"),
        ({"quantile": "some"}, "quantile: expected one of exact, published, got 'some'"),
        ({"iou_threshold": 2.0}, "iou_threshold: expected a number in"),
        ({"repeats": "twice"}, "repeats: expected one of each, once"),
    ):
        with pytest.raises(ValueError, match=words):
            NetworkDissection(model, "4", CONCEPTS, **given)
    with pytest.raises(ValueError, match="layer: Sequential has no layer named 'five'"):
        NetworkDissection(model, "five", CONCEPTS)
    with pytest.raises(TypeError, match="concepts: expected Concepts, got list"):
        NetworkDissection(model, "4", [])
    with pytest.raises(ValueError, match="spool: expected a folder, got"):
        NetworkDissection(model, "4", CONCEPTS, spool=tmp_path / "none")(batches)
    dissection = NetworkDissection(model, "4", CONCEPTS, q=0.1)
    with pytest.raises(ValueError, match=r"batches: expected a list.*got a list_iterator"):
        dissection(iter(batches))
    with pytest.raises(ValueError, match="images: expected"):
        dissection([(torch.zeros(3), torch.zeros(3))])
    images, masks, labels = batches[0]
    for other, words in (
        (masks[:, 0], r"masks: expected \[5, layers, H, W\], got \[5, 28, 25\]"),
        (masks[:3], r"masks: expected \[5, layers, H, W\], got \[3, 2, 28, 25\]"),
        (masks.float(), "masks: expected uint8, int16 or int32"),
        (masks + 9, "masks: expected labels from 0 to 8, got 9 in image 0"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            dissection([(images, other, labels)])
    with pytest.raises(ValueError, match=r"masks: expected .*as in the batches before"):
        dissection([batches[0], (images, masks[..., :9, :9], labels)])
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        dissection([])
    for odd, got in (
        ((images,), "1 of them"),
        ((*batches[0], 1), "4 of them"),
        ({"images": images}, "<class 'dict'>"),
    ):
        with pytest.raises(ValueError, match=rf"batches: expected \(images, masks\).*got {got}"):
            dissection([odd])
    with pytest.raises(TypeError, match="spool: expected a folder, got int"):
        NetworkDissection(model, "4", CONCEPTS, spool=3)(batches)
    for wrong, words in (
        ((("",), ("a",), (0,)), "names: expected label 0 and at least one more, got 1"),
        ((("", "x"), ("a",), (0,)), "category: expected one for each of 2 labels, got 1"),
        ((("", "x"), ("a",), (0, 1)), "category: expected indices of 1 categories, got 1"),
    ):
        with pytest.raises(ValueError, match=words):
            Concepts(*wrong)
    with pytest.raises(ValueError, match=r"label_areas: expected \[2\]"):
        concept_iou(torch.zeros(1, 2), torch.zeros(1, 1), torch.zeros(3), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"areas: expected \[1, 2\] or more categories"):
        concept_iou(torch.zeros(1, 2), torch.zeros(1, 1), torch.zeros(2), torch.tensor([0, 1]))


# In a process of its own: what the memory of this one has been through does not matter there.
MEMORY = """
import tempfile
import torch
from torch import nn
from fastxkd.metrics.concept_scores import Concepts
from fastxkd.metrics.dissection import NetworkDissection
torch.set_num_threads(1)
concepts = Concepts(("", "a", "b"), ("object",), (0, 0, 0))
model = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU())

class Batches:
    def __init__(self, count):
        self.count = count
    def __iter__(self):
        for i in range(self.count):
            made = torch.Generator().manual_seed(i)
            masks = torch.randint(0, 3, (8, 1, 8, 8), generator=made, dtype=torch.int32)
            yield torch.rand(8, 3, 32, 32, generator=made), masks

def peak():
    # Not ru_maxrss, which begins with the peak of the process that started this one.
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

def run(mode, count):
    if mode == "hoard":
        maps = [model(images).detach() for images, _ in Batches(count)]
        return len(maps)
    spool = tempfile.gettempdir() if mode == "spool" else None
    return NetworkDissection(model, "1", concepts, spool=spool)(Batches(count)).images

for mode in ("passes", "spool", "hoard"):
    run(mode, 10)
    before = peak()
    run(mode, 210 if mode == "hoard" else 110)
    print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    # MiB that more batches take: 100 of them, or 200 kept, of half a MiB of activations each.
    passes, spool, hoard = map(float, done.stdout.split())
    assert passes < 8
    assert spool < 8
    assert hoard > 40
