"""The teacher's maps on disk: right, resumable, refused to strangers, moved with their images."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastxkd.runs.data import TrainBatches, load_data
from fastxkd.runs.explained_batches import ExplainedBatches, explanation_cache
from fastxkd.runs.explanation_cache import ExplanationCache
from fastxkd.train.teacher_maps import TeacherExplanations
from tests.test_data import write_images
from tests.test_xdistillation import classifier

COUNT = 22


def images(indices) -> torch.Tensor:
    return torch.stack(
        [torch.randn(1, 12, 12, generator=torch.Generator().manual_seed(int(i))) for i in indices]
    )


def load(indices):
    kept = torch.from_numpy(indices)
    return images(kept), kept


def explanations(seed: int = 99, **options) -> TeacherExplanations:
    chosen = {"explainers": ["gradcam", "gradient_shap"], "target_layers": ["stage4"], **options}
    shap = {"gradient_shap": {"samples": 3, "noise": 0.1}}
    return TeacherExplanations(classifier(seed), **chosen, options=shap)


def make(folder, given=None, **options) -> ExplanationCache:
    chosen = {"count": COUNT, "image_size": (12, 12), "chunk": 5, "dtype": "float32", **options}
    return ExplanationCache(folder, given or explanations(), **chosen)


def test_maps_are_those_of_the_teacher(tmp_path):
    cache = make(tmp_path / "maps")
    assert not cache.complete
    seen = []
    assert cache.fill(load, lambda done, total: seen.append((done, total))) == COUNT
    assert cache.complete
    assert seen == [(5, 22), (10, 22), (15, 22), (20, 22), (22, 22)]
    wanted = [21, 3, 3, 0]
    found = cache.read(wanted)
    assert found.shape == (4, 2, 12, 12)
    everything = cache.read(range(COUNT))
    torch.testing.assert_close(found, everything[wanted])
    expected = explanations()(images(range(5, 10)), draw=1)
    torch.testing.assert_close(everything[5:10], expected)
    assert cache.verify() == []
    # A plain NumPy file, readable without this library.
    assert np.load(tmp_path / "maps" / "maps.npy").shape == (COUNT, 2, 12, 12)


def test_half_precision_and_smaller_maps_on_disk(tmp_path):
    exact = make(tmp_path / "a")
    exact.fill(load)
    half = make(tmp_path / "b", dtype="float16")
    half.fill(load)
    torch.testing.assert_close(
        half.read(range(COUNT)), exact.read(range(COUNT)), rtol=0, atol=2**-11
    )
    small = make(tmp_path / "c", size=(6, 6))
    small.fill(load)
    found = small.read([4])
    assert found.shape == (1, 2, 12, 12)
    assert np.load(tmp_path / "c" / "maps.npy").shape == (COUNT, 2, 6, 6)
    resized = torch.nn.functional.interpolate(exact.read([4]), (6, 6), mode="bilinear")
    back = torch.nn.functional.interpolate(resized, (12, 12), mode="bilinear")
    torch.testing.assert_close(found, back)


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    whole = make(tmp_path / "whole")
    whole.fill(load)

    def stopping(indices):
        if indices[0] == 10:
            raise KeyboardInterrupt
        return load(indices)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "maps").fill(stopping)
    resumed = make(tmp_path / "maps")
    with pytest.raises(ValueError, match="has no maps of chunk 2 yet; call fill"):
        resumed.read([0, 12])
    asked = []
    resumed.fill(lambda indices: (asked.append(int(indices[0])), load(indices))[1])
    assert asked == [10, 15, 20]
    assert torch.equal(resumed.read(range(COUNT)), whole.read(range(COUNT)))
    assert make(tmp_path / "maps").fill(load) == 0


_KILLED = """
import sys, time
from tests.test_explanation_cache import load, make
def slow(indices):
    print(int(indices[0]), flush=True)
    time.sleep(0.2)
    return load(indices)
make(sys.argv[1]).fill(slow)
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(tmp_path / "maps")],
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_WAIT_POLICY": "passive"},
    ) as process:
        for line in process.stdout:
            if int(line) == 10:
                process.kill()
                break
        process.wait(timeout=30)
    assert process.returncode == -signal.SIGKILL
    resumed, whole = make(tmp_path / "maps"), make(tmp_path / "whole")
    assert resumed.fill(load) == COUNT - 10
    whole.fill(load)
    assert torch.equal(resumed.read(range(COUNT)), whole.read(range(COUNT)))


def test_a_torn_line_costs_its_chunk_alone(tmp_path):
    cache = make(tmp_path)
    cache.fill(load)
    before = cache.read(range(COUNT))
    journal = tmp_path / "maps.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    again = make(tmp_path)
    assert not again.complete
    assert again.fill(load) == 2
    assert torch.equal(again.read(range(COUNT)), before)
    assert len(journal.read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"given": explanations(7)}, "teacher_weights was '[0-9a-f]{16}', now"),
        ({"given": explanations(sign="positive")}, "sign was 'absolute', now 'positive'"),
        (
            {"given": explanations(target_layers=["stage3"])},
            r"target_layers\.gradcam was \['stage4'\], now \['stage3'\]",
        ),
        ({"data": {"data": "other"}}, r"data\.data was None, now 'other'"),
        ({"count": 23}, r"shape was \[22, 2, 12, 12\], now \[23, 2, 12, 12\]"),
        ({"dtype": "float16"}, "dtype was 'float32', now 'float16'"),
    ],
)
def test_another_teachers_maps_are_refused(tmp_path, change, text):
    make(tmp_path).fill(load)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("maps.*")}
    with pytest.raises(ValueError, match=text):
        make(tmp_path, **change)
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("maps.*")}
    assert make(tmp_path).key != make(tmp_path / "other", data={"data": "other"}).key


def test_damage_is_named(tmp_path):
    make(tmp_path).fill(load)
    file = tmp_path / "maps.npy"
    good = file.read_bytes()
    file.write_bytes(good[:-5] + b"\x01" + good[-4:])
    with pytest.raises(ValueError, match=r"chunk 4 of .*maps\.npy is not what was written; remove"):
        make(tmp_path)
    file.write_bytes(good[:500])
    with pytest.raises(ValueError, match=r"maps\.npy is damaged or missing"):
        make(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"maps\.npy is damaged or missing"):
        make(tmp_path)


@pytest.mark.parametrize("content", ["", "[1, 2]\nnonsense\n", "[1, 2]\n", "5\n", '{"format": 1'])
def test_a_damaged_journal_is_named(tmp_path, content):
    make(tmp_path).fill(load)
    (tmp_path / "maps.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"maps\.jsonl is damaged .*; remove .* to compute the ma"):
        make(tmp_path)


def test_strangers_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds something else \(thesis.txt\)"):
        make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_at_once_are_refused(tmp_path):
    first = make(tmp_path)

    def nested(indices):
        if indices[0]:
            return load(indices)
        with pytest.raises(ValueError, match="is writing in"):
            make(tmp_path).fill(load)
        return load(indices)

    first.fill(nested)
    assert first.complete


def test_images_that_cannot_be_read_have_no_maps(tmp_path):
    def broken(indices):
        kept = torch.from_numpy(indices[indices % 7 != 3])
        return images(kept), kept

    cache = make(tmp_path)
    assert cache.fill(broken) == COUNT - 3
    assert (cache.read([3, 10, 17]) == 0).all()
    assert (cache.read([4]) != 0).any()


def test_maps_that_are_not_finite_are_named(tmp_path):
    def broken(indices):
        found, kept = load(indices)
        found[indices == 12] = torch.nan
        return found[1:], kept[1:]

    cache = make(tmp_path)
    with pytest.raises(ValueError, match="explanations: those of image 12 are not finite"):
        cache.fill(broken)
    assert (cache.read([9]) != 0).any()


def test_indices_and_sizes_beyond_are_named(tmp_path):
    cache = make(tmp_path)
    cache.fill(load)
    for index in (-1, COUNT):
        with pytest.raises(ValueError, match=f"indices: expected 0 to {COUNT - 1}, got "):
            cache.read([3, index])
    for wrong in ({"image_size": 12}, {"size": (6,)}, {"size": (6.5, 6)}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            make(tmp_path / "other", **wrong)


def test_maps_move_exactly_as_their_images(tmp_path):
    data = load_data("builtin")
    torch.manual_seed(0)
    from fastxkd.runs.cnn import builtin_model

    teacher = builtin_model("cnn-small", num_classes=10, in_channels=1)
    explain = TeacherExplanations(teacher, target_layers=["stage4"])
    data.train.images, data.train.labels = data.train.images[:60], data.train.labels[:60]
    cache = explanation_cache(tmp_path, explain, data, dtype="float32")
    options = {"batch_size": 20, "seed": 3}
    batches = ExplainedBatches(data, cache, **options)
    plain = TrainBatches(data, **options)
    moved = 0
    for step, (pixels, labels, maps) in enumerate(batches.iterate(0, 6)):
        batch = plain[step]
        assert torch.equal(pixels, data.normalize(batch.images))
        assert torch.equal(labels, batch.labels)
        for row, index in enumerate(batch.indices.tolist()):
            still = explain(data.normalize(data.train.images[index][None]))[0]
            torch.testing.assert_close(cache.read([index])[0], still, rtol=1e-4, atol=1e-5)
            still = cache.read([index])[0]
            shift = found_shift(data.train.images[index], batch.images[row])
            moved += shift != (0, 0, False)
            assert torch.equal(maps[row], moved_by_hand(still, *shift))
            if row < 2:
                assert torch.equal(maps[row], by_hand(still, *shift))
    assert moved > 80
    still = next(ExplainedBatches(data, cache, augmented=False, **options).iterate(0, 1))[2]
    order = np.random.RandomState([3, 0]).permutation(60)[:20]
    assert torch.equal(still, cache.read(order))


def by_hand(picture: torch.Tensor, down: int, right: int, mirrored: bool) -> torch.Tensor:
    """Row r of the result is row r + down, edges repeated; then the mirror image."""
    height, width = picture.shape[1:]
    out = torch.zeros_like(picture)
    for r in range(height):
        for c in range(width):
            from_r = min(max(r + down, 0), height - 1)
            from_c = min(max(c + right, 0), width - 1)
            if mirrored:
                from_c = width - 1 - from_c
            out[:, r, c] = picture[:, from_r, from_c]
    return out


def found_shift(before: torch.Tensor, after: torch.Tensor) -> tuple[int, int, bool]:
    """What was done to an image, found by trying everything that may have been done."""
    for mirrored in (False, True):
        for down in range(-2, 3):
            for right in range(-2, 3):
                if torch.equal(moved_by_hand(before, down, right, mirrored), after):
                    return down, right, mirrored
    raise AssertionError("no shift and mirror explains the image")


def moved_by_hand(picture: torch.Tensor, down: int, right: int, mirrored: bool) -> torch.Tensor:
    if mirrored:
        picture = picture.flip(-1)
    padded = torch.nn.functional.pad(picture[None].float(), (2, 2, 2, 2), mode="replicate")[0]
    height, width = picture.shape[1:]
    return padded[:, 2 + down : 2 + down + height, 2 + right : 2 + right + width].to(picture.dtype)


def test_a_folder_of_images_with_a_broken_one(tmp_path):
    write_images(tmp_path / "images", {"a": 12, "b": 12}, size=(16, 16))
    (tmp_path / "images" / "a" / "02.png").write_bytes(b"damaged")
    data = load_data(f"imagefolder:{tmp_path}/images", image_size=16)
    from fastxkd.runs.cnn import SmallCNN

    teacher = SmallCNN((4, 4, 4, 4), (1, 1, 1, 1), num_classes=2, in_channels=3)
    explain = TeacherExplanations(teacher, target_layers=["stage4"])
    cache = explanation_cache(tmp_path / "maps", explain, data)
    batches = ExplainedBatches(data, cache, batch_size=6, seed=0)
    for images_, labels, maps in batches.iterate(0, 3):
        assert len(images_) == len(labels) == len(maps)
    head = json.loads((tmp_path / "maps" / "maps.jsonl").read_text().splitlines()[0])
    assert head["data"]["data"] == f"imagefolder:{tmp_path}/images"
    with pytest.raises(ValueError, match="maps: expected those of"):
        ExplainedBatches(load_data("builtin"), cache, batch_size=4, seed=0)
