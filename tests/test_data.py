"""Data sets: what is found, what is refused, and batches that depend on their number alone."""

from __future__ import annotations

import gzip
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastxkd.runs.data import (
    BUILTIN_FILE,
    FASHION_MNIST_DIRECTORY,
    TrainBatches,
    augment,
    load_data,
)
from fastxkd.runs.pictures import read_image
from fastxkd.runs.sources import open_source
from tests.conftest import needs


def write_idx(folder: Path, *, packed: bool, train: int = 40, test: int = 12) -> None:
    random = np.random.RandomState(0)
    folder.mkdir(parents=True, exist_ok=True)
    for stem, count in (("train", train), ("t10k", test)):
        images = random.randint(0, 256, (count, 28, 28)).astype(np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in (
            (f"{stem}-images-idx3-ubyte", images),
            (f"{stem}-labels-idx1-ubyte", labels),
        ):
            content = struct.pack(f">{array.ndim + 1}I", 0x0800 + array.ndim, *array.shape)
            content += array.tobytes()
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


def write_images(root: Path, classes: dict[str, int], size: tuple[int, int] = (20, 16)) -> None:
    image_module = needs("PIL.Image")
    random = np.random.RandomState(len(root.name))
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = random.randint(0, 256, (*size, 3)).astype(np.uint8)
            image_module.fromarray(pixels).save(root / name / f"{number:02d}.png")


def test_builtin_is_balanced_and_carries_its_notice():
    data = load_data("builtin")
    assert (len(data.train), len(data.test), data.channels, data.image_size) == (2000, 500, 1, 28)
    assert np.bincount(data.train.labels).tolist() == [200] * 10
    assert np.bincount(data.test.labels).tolist() == [50] * 10
    assert data.classes[0] == "T-shirt/top"
    assert data.classes[9] == "Ankle boot"
    notice = BUILTIN_FILE.with_suffix(".LICENSE").read_text("utf-8")
    assert "Zalando SE" in notice
    assert "Permission is hereby granted, free of charge" in notice
    assert BUILTIN_FILE.stat().st_size < 1_200_000


@pytest.fixture
def fashion_mnist() -> Path:
    """Where the whole data set lies; CI must have it."""
    if not (FASHION_MNIST_DIRECTORY / "train-images-idx3-ubyte.gz").is_file():
        text = f"Fashion-MNIST is not in {FASHION_MNIST_DIRECTORY}"
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have it: {text}")
        pytest.skip(text)
    return FASHION_MNIST_DIRECTORY


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(
        [sys.executable, str(root / "scripts" / name), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_script_makes_the_committed_subset(fashion_mnist):
    done = run_script("make_fashion_mnist_subset.py", "--root", fashion_mnist, "--check")
    assert done.returncode == 0, done.stderr
    assert "same content: True" in done.stdout


def test_stamps_become_a_folder_of_classes(tmp_path):
    image_module = needs("PIL.Image")
    for place in ("animals/birds", "animals/birds/cartoon", "food/fruit", "vehicles/ship"):
        (tmp_path / "stamps" / place).mkdir(parents=True, exist_ok=True)
        for number in range(3):
            stamp = np.zeros((30, 50, 4), dtype=np.uint8)
            stamp[5:25, 10:40] = (200, 0, 0, 255)
            name = f"{place.replace('/', '-')}{number}.png"
            image_module.fromarray(stamp).save(tmp_path / "stamps" / place / name)
    options = ("--count", 7, "--size", 32)
    done = run_script("make_stamps_folder.py", tmp_path / "stamps", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    data = load_data(f"imagefolder:{tmp_path / 'out'}", image_size=32, held_out=0)
    assert data.classes == ["bird", "fruit", "vehicle"]
    assert np.bincount(data.test.labels).tolist() == [3, 2, 2]
    assert not any("cartoon" in path.name for path in data.test.paths)
    pixels = data.test.load([0]).images[0]
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]
    assert pixels[:, 16, 16].tolist() == [200, 0, 0]
    again = run_script("make_stamps_folder.py", tmp_path / "stamps", tmp_path / "out", *options)
    assert again.returncode == 2
    assert "is not empty" in again.stderr


def test_builtin_is_a_part_of_the_real_thing(fashion_mnist):
    real = load_data(f"fashion-mnist:{fashion_mnist}")
    assert (len(real.train), len(real.test)) == (60_000, 10_000)
    subset = load_data("builtin")
    for part, whole in ((subset.train, real.train), (subset.test, real.test)):
        known = {
            (image.tobytes(), int(label))
            for image, label in zip(whole.images.numpy(), whole.labels, strict=True)
        }
        mine = [
            (image.tobytes(), int(label))
            for image, label in zip(part.images.numpy(), part.labels, strict=True)
        ]
        assert all(item in known for item in mine)
        assert len({image for image, _ in mine}) == len(mine)


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_reads_idx_from_root_and_environment(tmp_path, monkeypatch, packed):
    write_idx(tmp_path / "mnist", packed=packed)
    data = load_data(f"fashion-mnist:{tmp_path / 'mnist'}")
    assert (len(data.train), len(data.test)) == (40, 12)
    assert data.train.labels[:11].tolist() == [*range(10), 0]
    monkeypatch.setenv("FASTXKD_FASHION_MNIST", str(tmp_path / "mnist"))
    again = load_data("fashion-mnist")
    assert torch.equal(again.train.images, data.train.images)


def test_fashion_mnist_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTXKD_FASHION_MNIST", str(tmp_path))
    with pytest.raises(ValueError, match=r"no train-images-idx3-ubyte\[\.gz\].*apt-get install"):
        load_data("fashion-mnist")


@pytest.mark.parametrize("damage", [b"", b"\x00\x00\x08\x01rest", b"\x00\x00\x08\x03\x00\x00"])
def test_damaged_idx_is_named(tmp_path, damage):
    write_idx(tmp_path, packed=False)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(damage)
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is not a readable IDX file"):
        load_data(f"fashion-mnist:{tmp_path}")


def test_truncated_gzip_is_named(tmp_path):
    write_idx(tmp_path, packed=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz is not a readable IDX file"):
        load_data(f"fashion-mnist:{tmp_path}")


@pytest.mark.parametrize("spec", ["cifar10", "imagefolder:", "imagefolder", "", "builtin:x"])
def test_unknown_spec(spec):
    with pytest.raises(ValueError, match=r"data: expected 'builtin', .* got"):
        load_data(spec)


def test_resized_builtin_keeps_the_picture():
    small, large = load_data("builtin"), load_data("builtin", image_size=56)
    assert large.test.images.shape == (500, 1, 56, 56)
    shrunk = torch.nn.functional.avg_pool2d(large.test.images.float(), 2)
    difference = (shrunk - small.test.images.float()).abs().mean().item()
    assert difference < 10  # two different pictures differ by about 80


def test_folder_split_is_seeded_and_complete(tmp_path):
    write_images(tmp_path, {"cat": 10, "ant": 5, "bee": 2})
    (tmp_path / "cat" / "deep").mkdir()
    (tmp_path / "cat" / "00.png").rename(tmp_path / "cat" / "deep" / "00.png")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no image")
    data = load_data(f"imagefolder:{tmp_path}", image_size=16, seed=3)
    assert data.classes == ["ant", "bee", "cat"]
    assert np.bincount(data.test.labels).tolist() == [1, 1, 2]
    assert np.bincount(data.train.labels).tolist() == [4, 1, 8]
    assert not set(data.train.paths) & set(data.test.paths)
    assert len(set(data.train.paths) | set(data.test.paths)) == 17
    again = load_data(f"imagefolder:{tmp_path}", image_size=16, seed=3)
    assert again.test.paths == data.test.paths
    others = [load_data(f"imagefolder:{tmp_path}", seed=s).test.paths for s in range(4, 8)]
    assert any(paths != data.test.paths for paths in others)
    everything = load_data(f"imagefolder:{tmp_path}", held_out=0)
    assert everything.train is None
    assert len(everything.test) == 17


def test_folder_with_its_own_split(tmp_path):
    write_images(tmp_path / "train", {"a": 3, "b": 4})
    write_images(tmp_path / "val", {"b": 2, "a": 1})
    data = load_data(f"imagefolder:{tmp_path}", image_size=16)
    assert (len(data.train), len(data.test)) == (7, 3)
    assert data.test.labels.tolist() == [0, 1, 1]
    write_images(tmp_path / "val", {"c": 1})
    with pytest.raises(ValueError, match=r"expected the classes of .*train in .*val, got c"):
        load_data(f"imagefolder:{tmp_path}")


def test_parts_without_training_images_are_no_classes(tmp_path):
    write_images(tmp_path / "val", {"a": 3, "b": 4})
    write_images(tmp_path / "test", {"a": 1, "b": 1})
    data = load_data(f"imagefolder:{tmp_path}", image_size=16, held_out=0)
    assert data.train is None
    assert data.classes == ["a", "b"]
    assert data.test.labels.tolist() == [0] * 3 + [1] * 4
    assert "test images from val/" in data.notice
    source = open_source(f"imagefolder:{tmp_path}", image_size=16)
    assert (source.classes, len(source)) == (data.classes, len(data.test))
    with pytest.raises(ValueError, match=r"has a 'val' folder but no 'train'; .*/val$"):
        load_data(f"imagefolder:{tmp_path}")
    assert len(load_data(f"imagefolder:{tmp_path}/val", image_size=16).train) == 5
    # With other folders of images beside them they are classes like these.
    write_images(tmp_path, {"plane": 2})
    assert load_data(f"imagefolder:{tmp_path}", held_out=0).classes == ["plane", "test", "val"]


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        load_data(f"imagefolder:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match=r"at least 2 folders with images .* got 0 \(none\)"):
        load_data(f"imagefolder:{tmp_path}")
    write_images(tmp_path, {"only": 3})
    with pytest.raises(ValueError, match=r"at least 2 folders with images .* got 1 \(only\)"):
        load_data(f"imagefolder:{tmp_path}")
    write_images(tmp_path, {"single": 1})
    with pytest.raises(ValueError, match=r"class 'single' has 1 image"):
        load_data(f"imagefolder:{tmp_path}")
    write_images(tmp_path / "train", {"a": 2, "b": 2})
    with pytest.raises(ValueError, match="has a 'train' folder but none of val, test"):
        load_data(f"imagefolder:{tmp_path}")


def test_transparency_becomes_white_and_exif_turns(tmp_path):
    image_module = needs("PIL.Image")
    clear = np.zeros((8, 8, 4), dtype=np.uint8)
    clear[:, 4:] = (255, 0, 0, 255)
    image_module.fromarray(clear).save(tmp_path / "clear.png")
    pixels = read_image(tmp_path / "clear.png", 8)
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]
    assert pixels[:, 0, 7].tolist() == [255, 0, 0]

    turned = image_module.fromarray(np.dstack([np.arange(64, dtype=np.uint8).reshape(8, 8)] * 3))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held on its side: show it turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    plain = np.rot90(np.arange(64, dtype=np.uint8).reshape(8, 8), -1)
    assert torch.equal(read_image(tmp_path / "turned.png", 8)[0], torch.from_numpy(plain.copy()))


def test_grey_palette_and_16_bit_images_become_rgb(tmp_path):
    image_module = needs("PIL.Image")
    grey = np.full((8, 8), 128, dtype=np.uint8)
    image_module.fromarray(grey).save(tmp_path / "grey.png")
    image_module.fromarray(grey).convert("P").save(tmp_path / "palette.gif")
    image_module.fromarray(grey.astype(np.uint16) << 8).save(tmp_path / "deep.png")
    for name in ("grey.png", "palette.gif", "deep.png"):
        assert read_image(tmp_path / name, 8).float().mean().item() == pytest.approx(128, abs=1)


def test_damaged_images_are_skipped_and_recorded(tmp_path):
    write_images(tmp_path, {"a": 6, "b": 6})
    (tmp_path / "a" / "01.png").write_bytes(b"not an image")
    whole = (tmp_path / "b" / "02.png").read_bytes()
    (tmp_path / "b" / "02.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b" / "03.png").write_bytes(b"")
    data = load_data(f"imagefolder:{tmp_path}", image_size=16, held_out=0)
    seen = sum(len(batch.labels) for batch in data.batches(data.test, 4))
    assert seen == 9
    assert sorted(Path(path).name for path in data.skipped) == ["01.png", "02.png", "03.png"]
    assert all(": " in reason for reason in data.skipped.values())


def test_augmentation_depends_on_seed_epoch_and_index_only():
    images = load_data("builtin").train.images[:32]
    indices = torch.arange(32)
    together = augment(images, indices, seed=1, epoch=2)
    alone = torch.cat(
        [augment(images[i : i + 1], indices[i : i + 1], seed=1, epoch=2) for i in range(32)]
    )
    assert torch.equal(together, alone)
    assert not torch.equal(together, augment(images, indices, seed=1, epoch=3))
    assert not torch.equal(together, augment(images, indices, seed=2, epoch=2))
    # Both mirrored and unmirrored images occur, and shifts in every direction.
    ramp = torch.arange(28, dtype=torch.uint8).expand(200, 1, 28, 28).contiguous()
    moved = augment(ramp, torch.arange(200), seed=0, epoch=0)[:, 0, 14].long()
    rising = moved[:, 20] > moved[:, 8]
    assert 60 < rising.sum() < 140
    assert {int(row[14]) - 14 for row in moved[rising]} == {-2, -1, 0, 1, 2}


def steps(data, first, last, **options):
    return list(TrainBatches(data, batch_size=16, seed=5, **options).iterate(first, last))


# Python 3.12 warns about forking a process that has threads, as torch's loader does.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_batches_are_the_same_from_any_step_with_any_workers(tmp_path):
    write_images(tmp_path, {"a": 30, "b": 30})
    data = load_data(f"imagefolder:{tmp_path}", image_size=16)
    whole = steps(data, 0, 9)
    assert len(whole) == 9
    for other in (steps(data, 4, 9), steps(data, 4, 9, workers=2)):
        for (images, labels), (same_images, same_labels) in zip(whole[4:], other, strict=True):
            assert torch.equal(images, same_images)
            assert torch.equal(labels, same_labels)


def test_every_epoch_is_another_order_of_all_images():
    data = load_data("builtin")
    batches = TrainBatches(data, batch_size=500, seed=0)
    epochs = [torch.cat([batches[4 * e + s].indices for s in range(4)]) for e in range(2)]
    for order in epochs:
        assert order.sort().values.equal(torch.arange(2000))
    assert not torch.equal(*epochs)


def test_workers_leave_the_global_random_state_alone():
    data = load_data("builtin")
    before = torch.get_rng_state()
    next(iter(TrainBatches(data, batch_size=8, seed=0, workers=1).iterate(0, 1)))
    assert torch.equal(before, torch.get_rng_state())


def test_normalisation():
    data = load_data("builtin")
    values = data.normalize(torch.tensor([0, 127, 255], dtype=torch.uint8).view(1, 1, 1, 3))
    expected = (torch.tensor([0.0, 127.0, 255.0]) - 127) / 128
    torch.testing.assert_close(values.view(-1), expected)
    with pytest.raises(ValueError, match="mean: expected 1 or 1 numbers, got 3"):
        load_data("builtin", mean=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="std: expected positive"):
        load_data("builtin", std=(0.0,))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"image_size": 4}, "image_size: expected at least 8, got 4"),
        ({"held_out": 1.0}, r"held_out: expected a share in \[0, 1\), got 1.0"),
    ],
)
def test_options_out_of_range(options, text):
    with pytest.raises(ValueError, match=text):
        load_data("builtin", **options)
