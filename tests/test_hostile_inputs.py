"""Inputs that are broken or meant to harm: one image fails, the others do not, and nothing runs."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastxkd.runs import explain
from fastxkd.runs import open as open_run
from fastxkd.runs.data import load_data, why
from fastxkd.runs.models import check_weights, load_model, load_weights
from fastxkd.runs.names import printable
from fastxkd.runs.pictures import read_image
from fastxkd.runs.report import render_report
from fastxkd.runs.sources import PIXEL_LIMIT, ImageError, Source, open_source
from tests.conftest import needs
from tests.test_data import write_idx
from tests.test_report import Page, comparison, item, models
from tests.test_sources import png, saved_rows

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)


def encoded(form: str, pixels: np.ndarray | None = None, **options: Any) -> bytes:
    image_module = needs("PIL.Image")
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
    file = io.BytesIO()
    image_module.fromarray(noise if pixels is None else pixels).save(file, form, **options)
    return file.getvalue()


def claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is of any size."""

    def part(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", rows) + part(b"IEND", b"")


def outcome(source: Source, index: int) -> str:
    """What came of it: "read", or why not."""
    try:
        source[index]
    except ImageError as error:
        return str(error) if error.name == source.name(index) else f"of another: {error.name}"
    return "read"


def outcomes(source: Source) -> dict[str, str]:
    return {source.name(index): outcome(source, index) for index in range(len(source))}


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.png": (lambda: b"", "ValueError: no image of a known format"),
    "text.png": (lambda: b"not an image at all", "ValueError: no image of a known format"),
    "half.png": (lambda: encoded("PNG")[:5000], "truncated"),
    "half.jpg": (lambda: encoded("JPEG")[:1500], "truncated"),
    "half.gif": (lambda: encoded("GIF")[:1500], "Error"),
    "half.webp": (lambda: encoded("WEBP", lossless=True)[:3000], "Error"),
    "half.tif": (lambda: encoded("TIFF")[:5000], "Error"),
    "half.bmp": (lambda: encoded("BMP")[:5000], "truncated"),
    "half.ppm": (lambda: encoded("PPM")[:5000], "Error"),
    "head.png": (lambda: encoded("PNG")[:20], "Error"),
    "middle.png": (lambda: encoded("PNG")[:3000] + b"\0" * 200 + encoded("PNG")[3200:], "Error"),
    "large.png": (lambda: claims(9_000, 9_000), "9000 x 9000 pixels, expected 1 to 67,108,864"),
    "wide.png": (lambda: claims(1 << 30, 1), "Error"),
    "enormous.png": (lambda: claims(60_000, 60_000), "DecompressionBombError"),
    "nothing.png": (lambda: claims(0, 8), "Error"),
    # Pillow would hand this to Ghostscript, whatever it is called.
    "script.png": (
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) print\n%%EOF\n",
        "ValueError: no image of a known format",
    ),
    "float.tif": (lambda: encoded("TIFF", np.ones((8, 8), np.float32)), "pixels of mode F"),
    "int32.tif": (lambda: encoded("TIFF", np.ones((8, 8), np.int32)), "pixels of mode I"),
}


@pytest.fixture(scope="module")
def broken_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("PIL.Image")
    folder = tmp_path_factory.mktemp("broken")
    for name, (make, _) in BROKEN.items():
        (folder / name).write_bytes(make())
        (folder / f"{name}.beside.png").write_bytes(png(77))
    return folder


def check_broken(found: dict[str, str]) -> None:
    assert sum(reason == "read" for reason in found.values()) == len(BROKEN)
    for name, (_, reason) in BROKEN.items():
        assert reason in found[name], (name, found[name])
        assert found[f"{name}.beside.png"] == "read"
        assert " at 0x" not in found[name]
        assert "\n" not in found[name]


def test_broken_images_in_a_folder(broken_images):
    source = open_source(f"imagefolder:{broken_images}", image_size=8)
    first, second = outcomes(source), outcomes(source)
    check_broken(first)
    assert first == second


def test_broken_images_in_a_shard(broken_images, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for path in sorted(broken_images.iterdir()):
            archive.add(path, f"{path.name.replace('.', '-')}.{path.name}")
    source = open_source(f"webdataset:{tmp_path / 'x.tar'}", image_size=8)
    found = {
        name.partition("/")[2].partition(".")[2]: why for name, why in outcomes(source).items()
    }
    check_broken(found)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_broken_images_in_a_saved_data_set(broken_images, tmp_path):
    datasets = needs("datasets")
    paths = sorted(broken_images.iterdir(), key=lambda path: path.name != "text.png.beside.png")
    rows = {"image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    source = open_source(f"hf:{tmp_path / 'saved'}", image_size=8)
    check_broken({path.name: outcome(source, at) for at, path in enumerate(paths)})


def test_training_leaves_the_same_images_out(broken_images, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(broken_images)
    data = load_data(f"imagefolder:{tmp_path}", image_size=8, held_out=0)
    read = sum(len(batch.labels) for batch in data.batches(data.test, 7))
    assert read == 2 * len(BROKEN)
    assert {Path(path).name for path in data.skipped} == set(BROKEN)


def test_too_many_pixels_are_refused_before_one_is_decoded(tmp_path, monkeypatch):
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(needs("PIL.ImageFile").ImageFile, "load", refuse)
    (tmp_path / "large.png").write_bytes(claims(8192, 8193))
    source = open_source(f"imagefolder:{tmp_path}")
    with pytest.raises(ImageError, match="8192 x 8193 pixels, expected 1 to 67,108,864"):
        source[0]
    assert PIXEL_LIMIT == 8192 * 8192
    (tmp_path / "large.png").write_bytes(claims(64, 64))
    with pytest.raises(ImageError, match="64 x 64 pixels, expected 1 to 4,095"):
        open_source(f"imagefolder:{tmp_path}", max_pixels=4095)[0]
    with pytest.raises(ImageError, match="AssertionError: decoded"):
        open_source(f"imagefolder:{tmp_path}", max_pixels=4096)[0]


def test_pictures_and_pixels_in_objects_have_the_limit_too():
    image_module = needs("PIL.Image")
    large, small = image_module.new("L", (100, 100)), image_module.new("L", (10, 10))
    source = open_source([small, large], max_pixels=9999)
    assert outcome(source, 1) == "ValueError: 100 x 100 pixels, expected 1 to 9,999"
    pixels = [np.zeros((10, 10), np.uint8), np.zeros((100, 100), np.uint8)]
    source = open_source(pixels, image_size=8, max_pixels=9999)
    assert outcome(source, 1) == "ValueError: 100 x 100 pixels, expected 1 to 9,999"


def test_unusual_images_are_read_rightly(tmp_path):
    image_module = needs("PIL.Image")
    deep = (GREY.astype(np.uint16) << 8) + 255
    cmyk = image_module.fromarray(np.full((8, 8, 3), (10, 200, 30), np.uint8)).convert("CMYK")
    frames = [image_module.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    image_module.fromarray(deep).save(tmp_path / "16-bit.png")
    image_module.fromarray(deep).save(tmp_path / "16-bit.tif")
    (tmp_path / "16-bit.ppm").write_bytes(b"P5 8 8 65535 " + deep.astype(">u2").tobytes())
    cmyk.save(tmp_path / "cmyk.jpg", quality=100)
    for form in ("gif", "webp", "png"):
        frames[0].save(
            tmp_path / f"moving.{form}", save_all=True, append_images=frames[1:], lossless=True
        )
    (tmp_path / "really-a-png.jpg").write_bytes(png(42))
    (tmp_path / "really-a-jpeg.png").write_bytes(encoded("JPEG"))
    image_module.fromarray(GREY > 31).save(tmp_path / "one-bit.png")
    images = {path.name: read_image(path, 8) for path in tmp_path.iterdir()}
    for name in ("16-bit.png", "16-bit.tif", "16-bit.ppm"):
        assert torch.equal(images[name], torch.from_numpy(GREY).expand(3, 8, 8)), name
    for name in ("moving.gif", "moving.webp", "moving.png"):
        assert images[name][:, 0, 0].tolist() == [255, 0, 0], name
    difference = images["cmyk.jpg"].permute(1, 2, 0).int() - torch.tensor([10, 200, 30])
    assert difference.abs().max() <= 4
    assert (images["really-a-png.jpg"] == 42).all()
    assert images["one-bit.png"].unique().tolist() == [0, 255]


def test_damaged_bytes_never_do_worse_than_fail(tmp_path):
    random = np.random.RandomState(0)
    forms = [encoded(form, GREY) for form in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")]
    for number in range(240):
        content = bytearray(forms[number % len(forms)])
        for _ in range(random.randint(1, 6)):
            content[random.randint(len(content))] = random.randint(256)
        (tmp_path / f"{number:03d}.png").write_bytes(content)
    source = open_source(f"imagefolder:{tmp_path}", image_size=8)
    found = outcomes(source)
    assert 20 < sum(reason == "read" for reason in found.values()) < 220
    assert found == outcomes(source)


# Files and links


def test_links_out_of_the_folder_are_followed_on_request_only(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "cat").mkdir(parents=True)
    outside.mkdir()
    for place in (root / "cat" / "own.png", outside / "secret.png"):
        place.write_bytes(png(5))
    (root / "cat" / "absolute.png").symlink_to(outside / "secret.png")
    (root / "cat" / "relative.png").symlink_to("../../outside/secret.png")
    (root / "cat" / "inside.png").symlink_to("own.png")
    (root / "cat" / "broken.png").symlink_to("gone.png")
    (root / "cat" / "round.png").symlink_to("round.png")
    (root / "cat" / "up").symlink_to(root)
    found = outcomes(open_source(f"imagefolder:{root}", image_size=8))
    assert {name for name, reason in found.items() if reason == "read"} == {
        "cat/own.png",
        "cat/inside.png",
    }
    for name in ("cat/absolute.png", "cat/relative.png"):
        assert found[name].startswith("ValueError: a link that leads out of the data folder")
    assert found["cat/broken.png"] == "FileNotFoundError: No such file or directory"
    assert found["cat/round.png"] == "OSError: Too many levels of symbolic links"
    asked = outcomes(open_source(f"imagefolder:{root}", image_size=8, follow_links=True))
    assert {name for name, reason in asked.items() if reason != "read"} == {
        "cat/broken.png",
        "cat/round.png",
    }
    # The root itself may be a link: it is what the user named.
    (tmp_path / "name").symlink_to(root)
    named = outcomes(open_source(f"imagefolder:{tmp_path / 'name'}", image_size=8))
    assert named == found


@pytest.mark.parametrize("link", ["dog", "val"])
def test_folders_that_are_links_out_of_the_root(tmp_path, link):
    for place in ("root/train/cat", "outside/cat"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "x.png").write_bytes(png(5))
    (tmp_path / "root" / link).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=f"data: the folder .*{link} is a link that leads out of"):
        open_source(f"imagefolder:{tmp_path / 'root'}")
    assert open_source(f"imagefolder:{tmp_path / 'root'}", follow_links=True)[0].label is not None


@pytest.mark.timeout(20)
def test_pipes_devices_and_folders_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.png" / "inner.png").write_bytes(png(1))
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    found = outcomes(open_source(f"imagefolder:{tmp_path}", image_size=8, follow_links=True))
    assert found == {
        "folder.png/inner.png": "read",
        "pipe.png": "ValueError: not a regular file",
        "zero.png": "ValueError: not a regular file",
    }


def test_files_that_vanish_or_change_while_a_run_reads_them(tmp_path):
    for name in ("gone.png", "cut.png", "other.png", "folder.png"):
        (tmp_path / name).write_bytes(png(5, size=64))
    source = open_source(f"imagefolder:{tmp_path}", image_size=8)
    (tmp_path / "gone.png").unlink()
    (tmp_path / "cut.png").write_bytes(png(5, size=64)[:60])
    (tmp_path / "other.png").write_bytes(png(6))
    (tmp_path / "folder.png").unlink()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "new.png").write_bytes(png(7))
    found = outcomes(source)
    assert len(found) == 4
    assert found["gone.png"] == "FileNotFoundError: No such file or directory"
    assert "rror: " in found["cut.png"]
    assert found["other.png"] == "read"
    assert found["folder.png"] == "ValueError: not a regular file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_folders_that_may_not_be_listed(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat").chmod(0)
    try:
        with pytest.raises(ValueError, match=r"data: the folder .* cannot be listed: Permission"):
            open_source(f"imagefolder:{tmp_path}")
    finally:
        (tmp_path / "cat").chmod(0o700)


def test_names_that_are_no_text(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9 \x1b[2J\n.png"
    try:
        Path(os.fsdecode(name)).write_bytes(png(5))
    except OSError:
        pytest.skip("this file system has text for names only")
    (sample,) = (source[0] for source in [open_source(f"imagefolder:{tmp_path}", image_size=8)])
    assert sample.name == r"caf\xe9 \x1b[2J\n.png"
    assert json.dumps(sample.name).isascii()
    assert printable("\ud800") == r"\ud800"


def test_deep_folders(tmp_path):
    place = tmp_path
    for _ in range(300):
        place = place / "d"
    os.makedirs(place)
    (place / "x.png").write_bytes(png(5))
    source = open_source(f"imagefolder:{tmp_path}", image_size=8)
    assert source[0].name == "d/" * 300 + "x.png"


def test_packed_images_that_unpack_to_far_more(tmp_path):
    write_idx(tmp_path, packed=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    for shape, length in (((12, 28, 28), 1 << 26), ((1 << 20, 1 << 10, 1 << 10), 0)):
        head = struct.pack(">4I", 0x0803, *shape)
        path.write_bytes(gzip.compress(head + b"\0" * length, compresslevel=1))
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"data: .* is not a readable IDX file"):
            open_source(f"fashion-mnist:{tmp_path}")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 22


# Shards


def write_tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo, **options: Any) -> Source:
    with tarfile.open(path, "w", **options) as archive:
        for entry in members:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                archive.addfile(info, io.BytesIO(entry[1]))
    return open_source(f"webdataset:{path}", image_size=8)


def link(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_members_that_would_be_dangerous_to_unpack(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(5))
    before = sorted(tmp_path.iterdir())
    source = write_tar(
        tmp_path / "x.tar",
        ("good.png", png(1)),
        ("../up.png", png(2)),
        ("a/../../b.png", png(2)),
        ("/etc/absolute.png", png(3)),
        link("soft.png", tarfile.SYMTYPE, str(secret)),
        link("hard.png", tarfile.LNKTYPE, "good.png"),
        link("device.png", tarfile.CHRTYPE),
        link("block.png", tarfile.BLKTYPE),
        link("pipe.png", tarfile.FIFOTYPE),
        ("fine.png", png(4)),
        link("fine.cls", tarfile.SYMTYPE, "good.png"),
        ("last.png", png(6)),
    )
    found = outcomes(source)
    leaves = "ValueError: a path that leaves the folder it would be unpacked in"
    assert found == {
        "x.tar/good.png": "read",
        "x.tar/../up.png": leaves,
        "x.tar/a/../../b.png": leaves,
        "x.tar//etc/absolute.png": leaves,
        "x.tar/soft.png": "ValueError: its member soft.png is a symbolic link",
        "x.tar/hard.png": "ValueError: its member hard.png is a hard link",
        "x.tar/device.png": "ValueError: its member device.png is a character device",
        "x.tar/block.png": "ValueError: its member block.png is a block device",
        "x.tar/pipe.png": "ValueError: its member pipe.png is a named pipe",
        "x.tar/fine.png": "ValueError: its member fine.cls is a symbolic link",
        "x.tar/last.png": "read",
    }
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "x.tar"])


def test_two_members_of_one_name(tmp_path):
    source = write_tar(
        tmp_path / "x.tar",
        *[("a.png", png(1)), ("a.png", png(2))],
        *[("b.png", png(3)), ("b.cls", b"1"), ("b.cls", b"2")],
        ("c.png", png(4)),
    )
    assert outcomes(source) == {
        "x.tar/a.png": "ValueError: two members are named a.png",
        "x.tar/b.png": "ValueError: two members are named b.cls",
        "x.tar/c.png": "read",
    }


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_pickles_in_shards_are_never_opened(tmp_path):
    bomb = pickle.dumps(_Bomb(tmp_path / "exploded"))
    saved = io.BytesIO()
    torch.save(_Bomb(tmp_path / "exploded"), saved)
    source = write_tar(
        tmp_path / "x.tar",
        *[("a.pyd", bomb), ("b.pth", saved.getvalue()), ("c.pickle", bomb)],
        *[("d.png", png(1)), ("d.pyd", bomb), ("d.pth", saved.getvalue())],
        *[("e.png", bomb), ("f.png", png(2)), ("f.cls", bomb), ("g.png", png(3)), ("g.json", bomb)],
    )
    found = outcomes(source)
    assert found["x.tar/a.pyd"] == "ValueError: no image among its members (pyd)"
    assert found["x.tar/b.pth"] == "ValueError: no image among its members (pth)"
    assert found["x.tar/c.pickle"] == "ValueError: no image among its members (pickle)"
    assert found["x.tar/d.png"] == "read"
    assert found["x.tar/e.png"].startswith("ValueError: no image of a known format")
    assert found["x.tar/f.png"].startswith("ValueError: expected a whole number as label (cls)")
    assert found["x.tar/g.png"].startswith("ValueError: its label (json) cannot be read")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("suffix", "content", "expected"),
    [
        ("cls", b" 12\n", 12),
        ("cls", b"-1", None),
        ("cls", b"", "expected a whole number as label (cls), got ''"),
        ("cls", b"1.5", "got '1.5'"),
        ("cls", b"9" * 5000, "expected a whole number"),
        ("cls", b"9" * (1 << 21), "a label (cls) of 2,097,152 bytes"),
        ("json", b'{"label": 3, "cls": 4}', 3),
        ("json", b"7", 7),
        ("json", b'{"caption": "x"}', None),
        ("json", b'{"label": "cat"}', None),
        ("json", b'{"label": true}', None),
        ("json", b'{"label": NaN}', None),
        ("json", b'{"label": 99999999999999999999999}', "label 99999999999999999999999"),
        ("json", b"[" * 100_000, "its label (json) cannot be read"),
        ("json", b'{"label": 1' + b"0" * 5000 + b"}", "its label (json) cannot be read"),
        ("json", b"\xff\xfe{}", "its label (json) cannot be read"),
    ],
)
def test_labels_of_every_kind(tmp_path, suffix, content, expected):
    source = write_tar(tmp_path / "x.tar", ("a.png", png(1)), (f"a.{suffix}", content))
    if isinstance(expected, str):
        assert expected in outcome(source, 0)
    else:
        assert source[0].label == expected


def three_in_a_tar(path: Path) -> bytes:
    write_tar(path, *((f"{name}.png", png(value)) for value, name in enumerate("abc")))
    return path.read_bytes()


def relabelled(head: bytes, at: int, field: bytes) -> bytes:
    """A tar header with another field and the checksum that belongs to it."""
    changed = bytearray(head)
    changed[at : at + len(field)] = field
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


@pytest.mark.parametrize("where", ["header", "content", "boundary", "no end"])
def test_shards_that_are_cut_off(tmp_path, where):
    content = three_in_a_tar(tmp_path / "x.tar")
    third = content.rindex(b"c.png")
    end = {"header": third + 100, "content": third + 520, "boundary": third, "no end": None}[where]
    if end is None:
        end = len(content.rstrip(b"\0")) + 511 & ~511
    (tmp_path / "x.tar").write_bytes(content[:end])
    found = outcomes(open_source(f"webdataset:{tmp_path / 'x.tar'}", image_size=8))
    intact = ["a", "b", "c"] if where == "no end" else ["a", "b"]
    assert {n: r for n, r in found.items() if r == "read"} == {
        f"x.tar/{name}.png": "read" for name in intact
    }
    expected = "past the end" if where == "content" else "no end mark"
    assert expected in found["x.tar"]
    assert "whatever came after that is lost" in found["x.tar"]
    assert len(found) == len(intact) + 1


SIZES = {
    "too large": (b"%011o\0" % (1 << 30), "a member of 1,073,741,824 bytes goes past the end"),
    "too small": (b"%011o\0" % 0, "no tar header where one should be"),
    "huge": (b"\x80" + b"\xff" * 11, "goes past the end"),
    "negative": (b"\xff" * 12, "no tar header where one should be"),
    "no number": (b"12 4x567890\0", "no tar header where one should be"),
}


@pytest.mark.parametrize("kind", SIZES)
def test_headers_whose_size_lies(tmp_path, kind):
    field, reason = SIZES[kind]
    content = three_in_a_tar(tmp_path / "x.tar")
    second = content.index(b"b.png")
    head = relabelled(content[second : second + 512], 124, field)
    (tmp_path / "x.tar").write_bytes(content[:second] + head + content[second + 512 :])
    found = outcomes(open_source(f"webdataset:{tmp_path / 'x.tar'}", image_size=8))
    assert found["x.tar/a.png"] == "read"
    assert reason in found["x.tar"]
    assert "x.tar/c.png" not in found


def extension(kind: bytes, content: bytes, size: bytes | None = None) -> bytes:
    info = tarfile.TarInfo("ext")
    info.type, info.size = kind, len(content)
    head = info.tobuf(tarfile.USTAR_FORMAT)
    if size is not None:
        head = relabelled(head, 124, size)
    return head + content + b"\0" * (-len(content) % 512)


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (extension(b"L", b"x" * 2_000_000), "an extended header of 2,000,000 bytes"),
        (extension(b"x", b"", b"\xff" * 12), "no tar header where one should be"),
        (extension(b"x", b"999 path=x\n"), "an extended header that cannot be read"),
        (extension(b"x", b"0 path=x\n"), "an extended header that cannot be read"),
        (extension(b"x", b"-9 path=x\n"), "an extended header that cannot be read"),
        (extension(b"x", b"11 size=-1\n"), "whose size is no number"),
        (extension(b"x", b"18 size=999999999\n"), "999,999,999 bytes goes past the end"),
        (extension(b"g", b"10 path=x\n"), "a global header that renames"),
        (b"\1" * 512, "no tar header where one should be"),
    ],
)
def test_extended_headers_that_lie(tmp_path, before, reason):
    content = three_in_a_tar(tmp_path / "x.tar")
    second = content.index(b"b.png")
    (tmp_path / "x.tar").write_bytes(content[:second] + before + content[second:])
    found = outcomes(open_source(f"webdataset:{tmp_path / 'x.tar'}", image_size=8))
    assert found["x.tar/a.png"] == "read"
    assert reason in found["x.tar"]


def test_a_sparse_member_is_not_read_as_if_it_were_whole(tmp_path):
    content = three_in_a_tar(tmp_path / "x.tar")
    second = content.index(b"b.png")
    head = relabelled(content[second : second + 512], 156, b"S")
    (tmp_path / "x.tar").write_bytes(content[:second] + head + content[second + 512 :])
    found = outcomes(open_source(f"webdataset:{tmp_path / 'x.tar'}", image_size=8))
    assert found == {
        "x.tar/a.png": "read",
        "x.tar/b.png": "ValueError: its member b.png is a sparse file",
        "x.tar/c.png": "read",
    }


@pytest.mark.timeout(60)
def test_damaged_shards_never_do_worse_than_fail(tmp_path):
    path = tmp_path / "x.tar"
    whole = bytearray(three_in_a_tar(path))
    random = np.random.RandomState(0)
    heads = [whole.index(f"{name}.png".encode()) for name in "abc"]
    read, refusals = 0, []
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(random.randint(1, 4)):
            content[heads[random.randint(3)] + random.randint(512)] = random.randint(256)
        if random.randint(3) == 0:
            del content[random.randint(len(content)) :]
        path.write_bytes(content)
        try:
            source = open_source(f"webdataset:{path}", image_size=8)
        except ValueError as error:
            refusals.append(str(error))
            continue
        assert 1 <= len(source) <= 4
        read += sum(reason == "read" for reason in outcomes(source).values())
    assert 100 < read < 900
    assert refusals
    assert all(text.startswith("data: ") for text in refusals)


def test_shards_of_which_nothing_can_be_read(tmp_path):
    for name, content, text in (
        ("empty.tar", b"", r"no image in the 1 shard\(s\).*empty\.tar: the file is empty"),
        ("text.tar", b"no tar file\n" * 100, "no tar header where one should be"),
        ("short.tar", b"no tar file\n", "cut off: it has no end mark"),
        ("none.tar", b"\0" * 1024, "has no images"),
        ("x.tar", b"\x1f\x8b\x08" + b"\0" * 600, r"x\.tar is compressed \(gzip\)"),
        ("y.tar", b"BZh9" + b"\0" * 600, r"y\.tar is compressed \(bzip2\)"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"data: .*{text}"):
            open_source(f"webdataset:{tmp_path / name}")
    (tmp_path / "folder.tar").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")
    for name in ("folder.tar", "pipe.tar"):
        with pytest.raises(ValueError, match=f"data: the shard .*{name} cannot be read: not a reg"):
            open_source(f"webdataset:{tmp_path / name}")
    # One that is empty does not take the others down with it.
    three_in_a_tar(tmp_path / "empty2.tar")
    found = outcomes(open_source(f"webdataset:{tmp_path}/empty*.tar", image_size=8))
    assert [reason == "read" for reason in found.values()] == [False, True, True, True]
    assert "the file is empty" in found["empty.tar"]


@pytest.mark.parametrize(
    "pattern", ["pipe:touch {}/exploded", "http://localhost/x.tar", "s3://x/y"]
)
def test_shards_are_files_and_nothing_else(tmp_path, pattern):
    with pytest.raises(ValueError, match="data: only local shards can be read"):
        open_source(f"webdataset:{pattern.format(tmp_path)}")
    assert not (tmp_path / "exploded").exists()


def test_a_shard_that_changes_while_a_run_reads_it(tmp_path):
    path = tmp_path / "x.tar"
    content = three_in_a_tar(path)
    source = open_source(f"webdataset:{path}", image_size=8)
    path.write_bytes(content + b"\0" * 512)
    assert set(outcomes(source).values()) == {
        "ValueError: its shard was changed after this run had read what is in it"
    }
    path.unlink()
    assert set(outcomes(source).values()) == {"FileNotFoundError: No such file or directory"}


def test_a_member_too_large_for_its_pixels_is_not_read(tmp_path):
    write_tar(tmp_path / "x.tar", ("a.png", png(1) + b"\0" * (3 << 20)), ("b.png", png(1)))
    source = open_source(f"webdataset:{tmp_path / 'x.tar'}", image_size=8, max_pixels=1 << 16)
    assert outcome(source, 0).endswith("bytes, more than 65,536 pixels can take")
    assert outcome(source, 1) == "read"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_saved_data_set_does_not_open_other_files(tmp_path):
    datasets = needs("datasets")
    (tmp_path / "secret.png").write_bytes(png(5))
    rows = saved_rows(datasets, 2).to_dict()
    rows["img"][1] = {"bytes": None, "path": str(tmp_path / "secret.png")}
    features = saved_rows(datasets, 1).features
    unsafe = datasets.Dataset.from_dict(rows, features=features)
    source = open_source(unsafe)
    assert outcome(source, 0) == "read"
    assert outcome(source, 1).startswith("ValueError: its image is a file outside the data set")
    assert outcome(open_source(unsafe, follow_links=True), 1) == "read"


# Data sets that lie


class Lying(torch.utils.data.Dataset):
    """Says it has ``said`` images and has ``held``; ``odd`` are not like the others."""

    def __init__(self, said: Any, held: int = 4, odd: dict[int, Any] | None = None) -> None:
        self.said, self.held, self.odd = said, held, odd or {}

    def __len__(self) -> Any:
        if isinstance(self.said, Exception):
            raise self.said
        return self.said

    def __getitem__(self, index: int) -> Any:
        if index >= self.held:
            raise IndexError(f"{index} is out of range")
        found = self.odd.get(index, torch.zeros(3, 8, 8))
        if isinstance(found, Exception):
            raise found
        return found


def test_a_length_that_is_too_long():
    found = outcomes(open_source(Lying(6)))
    assert [reason == "read" for reason in found.values()] == [True] * 4 + [False] * 2
    assert found["image 4"] == "IndexError: 4 is out of range"


def test_a_length_that_is_too_short_is_believed():
    assert list(outcomes(open_source(Lying(2))).values()) == ["read", "read"]


def test_a_length_that_changes():
    data = Lying(4)
    source = open_source(data)
    assert outcome(source, 0) == "read"
    for said in (5, 3):
        data.said = said
        assert len(source) == 4
        expected = f"ValueError: the data set had 4 images when opened, now {said}"
        assert outcome(source, 0) == expected
    data.said = RuntimeError("gone")
    assert outcome(source, 0) == "RuntimeError: gone"
    data.said = 4
    assert outcome(source, 0) == "read"


@pytest.mark.parametrize(
    "said", [-1, 2.5, "four", None, 1 << 70, RuntimeError("no length today")], ids=str
)
def test_a_length_that_is_none(said):
    with pytest.raises(ValueError, match=r"data: .*Lying object has no usable length: \w+Error: "):
        open_source(Lying(said))


def test_items_that_are_not_like_the_first():
    class Unspeakable(Exception):
        def __str__(self) -> str:
            return f"{object()!r}\n  and\x1b[2J more\n" + 1000 * "x"

    odd = {
        1: torch.zeros(3, 8, 9),
        2: torch.zeros(1, 8, 8),
        3: torch.zeros(3, 8, 8, dtype=torch.uint8),
        4: torch.full((3, 8, 8), float("nan")),
        5: torch.zeros(3, 8, 8).index_fill(0, torch.tensor(1), -float("inf")),
        6: OSError(5, "Input/output error", "/data/x"),
        7: Unspeakable(),
        8: (torch.zeros(3, 8, 8), 1 << 63),
        9: None,
        10: "x.png",
        11: (torch.zeros(3, 8, 8), -(1 << 80)),
    }
    found = list(outcomes(open_source(Lying(13, 13, odd))).values())
    assert found[0] == found[11] == found[12] == "read"
    assert found[1] == (
        "ValueError: expected torch.float32 [3, 8, 8] like the other images, got torch.float32 "
        "[3, 8, 9]"
    )
    assert found[2].endswith("got torch.float32 [1, 8, 8]")
    assert found[3].endswith("got torch.uint8 [3, 8, 8]")
    assert found[4] == found[5] == "ValueError: pixels that are NaN or infinite"
    assert found[6] == "OSError: Input/output error"
    assert found[7].startswith(r"Unspeakable: <object object> and\x1b[2J more xxx")
    assert len(found[7]) < 400
    assert found[8].startswith("ValueError: label 9223372036854775808, expected 0 to")
    assert found[9].endswith("got a NoneType")
    assert found[10].endswith("got a str")


def test_labels_of_no_class():
    class Named(Lying):
        classes = ("a", "b")

    pixels = torch.zeros(3, 8, 8)
    odd = {index: (pixels, index) for index in range(4)}
    found = list(outcomes(open_source(Named(4, 4, odd))).values())
    assert found == ["read", "read", *(f"ValueError: label {i}, expected 0 to 1" for i in (2, 3))]


def test_what_is_no_failure_of_an_image_ends_the_run():
    class Stopped(Lying):
        def __getitem__(self, index: int) -> Any:
            if index == 2:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    source = open_source(Stopped(4))
    with pytest.raises(KeyboardInterrupt):
        source[2]


def test_a_reason_without_words():
    assert why(ValueError()) == "ValueError"


# Class names


def test_markup_in_class_names_stays_text(tmp_path):
    needs("jinja2")
    evil = "<img src=x onerror=alert(1)>"
    for name in (evil, "<script>alert(2)<", "plain & simple"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "<b>bold<b>.png").write_bytes(png(5))
        (tmp_path / name / "<i>.png").write_bytes(b"broken")
    source = open_source(f"imagefolder:{tmp_path}", image_size=8)
    assert source.classes == ["<img src=x onerror=alert(1)>", "<script>alert(2)<", "plain & simple"]
    failed = [
        {"path": name, "error": reason}
        for name, reason in outcomes(source).items()
        if reason != "read"
    ]
    assert len(failed) == 3
    picture = item(
        label=evil, predictions=dict.fromkeys(("teacher", "base", "student"), (evil, 0.5))
    )
    harmless = Page(render_report(comparison(classes=["a"], gallery=[item(label="a")])))
    text = render_report(
        comparison(
            title=evil,
            classes=source.classes,
            gallery=[picture],
            models=models(student={"spec": evil}),
            run={**comparison().run, "skipped": failed, "data": {"notice": evil}},
        )
    )
    page = Page(text)
    assert len(page.all("script")) == len(harmless.all("script")) == 1
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert not page.all("b") or all(not attributes for attributes in page.all("b"))
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert len(page.all("img")) == len(harmless.all("img"))
    for written in (evil, "<script>alert(2)<", "plain & simple", "<i>.png"):
        assert written in page.text


# Weights


def small() -> torch.nn.Module:
    return load_model("cnn-small", num_classes=3, in_channels=1)


def test_code_in_checkpoints_is_not_run(tmp_path):
    bomb = _Bomb(tmp_path / "exploded")
    state = small().state_dict()
    torch.save({**state, "head.bias": bomb}, tmp_path / "among.pth")
    torch.save({"state_dict": state, "optimizer": bomb}, tmp_path / "beside.pt")
    torch.save(bomb, tmp_path / "alone.ckpt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(bomb, protocol=2))
    (tmp_path / "named.safetensors").write_bytes(pickle.dumps(bomb))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=f"weights: .*{path.name}"):
            load_weights(small(), path)
    assert not (tmp_path / "exploded").exists()


def test_safetensors_whose_header_lies(tmp_path):
    save = needs("safetensors.torch").save
    good = save(small().state_dict())
    (length,) = struct.unpack_from("<Q", good)
    head = json.loads(good[8 : 8 + length])
    name = next(key for key in head if key != "__metadata__")

    def with_head(changes: dict[str, Any]) -> bytes:
        text = json.dumps({**head, name: {**head[name], **changes}}).encode()
        return struct.pack("<Q", len(text)) + text + good[8 + length :]

    for number, content in enumerate(
        (
            struct.pack("<Q", 1 << 62) + good[8:],
            struct.pack("<Q", 100_000_001) + good[8:],
            with_head({"data_offsets": [0, 1 << 40]}),
            with_head({"data_offsets": [8, 4]}),
            with_head({"shape": [1 << 40, 1 << 40]}),
            with_head({"dtype": "EVIL"}),
            good[: 8 + length],
            b"",
        )
    ):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"weights: .*{number}.safetensors is not a readable"):
            load_weights(small(), path)


def test_weights_that_are_no_numbers_are_found():
    model = small()
    assert check_weights(model) == {}
    with torch.no_grad():
        model.head.weight[0, :5] = float("nan")
        model.head.bias[1] = -float("inf")
    assert check_weights(model) == {"head.weight": 5, "head.bias": 1}
    model = small()
    name, statistics = next((n, b) for n, b in model.named_buffers() if n.endswith("running_var"))
    statistics[2] = float("nan")
    assert check_weights(model) == {name: 1}
    masked = torch.nn.Linear(2, 2).half()
    masked.register_buffer("mask", torch.full((3,), -float("inf")))
    masked.register_buffer("steps", torch.tensor(3))
    assert check_weights(masked) == {}
    with torch.no_grad():
        masked.weight[0, 0] = float("inf")
    assert check_weights(masked) == {"weight": 1}


def test_weights_that_are_no_numbers_load_and_are_found(tmp_path):
    state = small().state_dict()
    state["head.weight"].fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pth")
    model = small()
    load_weights(model, tmp_path / "nan.pth")
    assert check_weights(model) == {"head.weight": state["head.weight"].numel()}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("modern", [True, False])
def test_damaged_checkpoints_never_do_worse_than_fail(tmp_path, modern):
    path, model = tmp_path / "w.pth", small()
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=modern)
    whole = path.read_bytes()
    random = np.random.RandomState(0)
    # What says how to read the rest lies at the start and, of a zip file, at the end.
    places = np.r_[: min(4000, len(whole)), max(0, len(whole) - 4000) : len(whole)]
    loaded = 0
    for _ in range(150):
        content = bytearray(whole)
        for place in random.choice(places, random.randint(1, 4)):
            content[place] = random.randint(256)
        if random.randint(4) == 0:
            del content[random.randint(len(content)) :]
        path.write_bytes(content)
        try:
            load_weights(model, path)
            loaded += 1
        except ValueError as error:
            if not str(error).startswith("weights: "):
                raise
    assert loaded < 150


def test_a_run_over_hostile_data_does_the_rest_and_says_so(tmp_path, broken_images):
    """All of it at once: half of the images are broken, names are markup, a link leads out."""
    needs("zarr")
    needs("pyarrow")
    evil = "<img src=x onerror=alert(1)>"
    (tmp_path / "data").mkdir()
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(5))
    for name in (evil, "plain"):
        shutil.copytree(broken_images, tmp_path / "data" / name)
        (tmp_path / "data" / name / "out.png").symlink_to(secret)
        (tmp_path / "data" / name / "<b>bold<b>.png").write_bytes(png(9))
    summary = explain(
        "cnn-small", f"imagefolder:{tmp_path / 'data'}", tmp_path / "run", image_size=16, chunk=7
    )
    assert (summary.images, summary.failed) == (4 * len(BROKEN) + 4, 2 * len(BROKEN) + 2)
    lines = (tmp_path / "run" / "errors.jsonl").read_text("utf-8").splitlines()
    failures = {Path(line["path"]).name: line["reason"] for line in map(json.loads, lines)}
    assert len(lines) == summary.failed
    for name, (_, reason) in BROKEN.items():
        assert reason in failures[name]
    assert "a link that leads out of the data folder" in failures["out.png"]
    run = open_run(tmp_path / "run")
    source = open_source(f"imagefolder:{tmp_path / 'data'}", image_size=16)
    for index in range(len(source)):
        assert (outcome(source, index) == "read") == (run[index].error is None)
    page = Page((tmp_path / "run" / "report.html").read_text("utf-8"))
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert evil in page.text
