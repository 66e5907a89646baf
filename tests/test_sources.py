"""Data for runs over whole data sets: what is found, in which order, and that all workers agree."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import tarfile
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastxkd.runs.data import load_data
from fastxkd.runs.names import Names, printable
from fastxkd.runs.pictures import read_image
from fastxkd.runs.sources import ImageError, Sample, Source, open_source
from fastxkd.runs.tar import members
from tests._torchvision import declare_operators
from tests.conftest import needs
from tests.test_data import write_idx, write_images

FACTORIES = """
import torch

class Squares(torch.utils.data.Dataset):
    classes = ["small", "large"]
    def __init__(self, size):
        self.size, self.scale = size, lambda: None  # which pickle refuses
    def __len__(self):
        return 6
    def __getitem__(self, index):
        return torch.full((3, self.size, self.size), index, dtype=torch.uint8), index % 2

def squares(image_size=12):
    return Squares(image_size)
def demanding(image_size):
    return Squares(image_size)
def needy(folder):
    return Squares(8)
def broken():
    raise OSError(2, "No such file or directory", "gone")
def wrong():
    return 3
value = 3
"""


def png(value: int | np.ndarray, size: int = 16) -> bytes:
    image_module = needs("PIL.Image")
    pixels = np.full((size, size, 3), value, dtype=np.uint8) if isinstance(value, int) else value
    file = io.BytesIO()
    image_module.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def all_of(source: Source) -> list[Sample]:
    return [source[index] for index in range(len(source))]


def same(left: Sample, right: Sample) -> bool:
    return left[1:] == right[1:] and torch.equal(left.image, right.image)


def test_names_are_compact():
    names = [f"class {i % 7}/image-{i:08d}.jpg".encode() for i in range(20_000)]
    tracemalloc.start()
    kept = Names(name for name in names)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [kept[i] for i in range(len(kept))] == names
    # A growing block has an eighth to spare.
    assert size < 1.25 * (sum(map(len, names)) + 8 * len(names))
    assert kept.digest() == Names(names).digest()
    # The same text, cut in another place, is another list of names.
    assert Names([b"ab", b"c"]).digest() != Names([b"a", b"bc"]).digest()
    for index in (-1, 20_000):
        with pytest.raises(IndexError, match=f"expected 0 to 19999, got {index}"):
            kept[index]


def test_builtin_is_what_training_sees():
    data = load_data("builtin", mean=(0.3,), std=(0.5,))
    for spec, split in (("builtin", data.test), ("builtin#train", data.train)):
        source = open_source(spec, mean=(0.3,), std=(0.5,))
        assert (len(source), source.shape) == (len(split), (1, 28, 28))
        assert source.classes == data.classes
        assert source[7].name == "image 7"
        assert source[7].label == split.labels[7]
        assert torch.equal(source[7].image, split.images[7])
        pixels = torch.stack([source[i].image for i in range(5)])
        assert torch.equal(source.normalize(pixels), data.normalize(split.images[:5]))


def test_one_image_is_resized_as_all_are():
    resized = load_data("builtin", image_size=40).test.images
    source = open_source("builtin", image_size=40)
    assert all(torch.equal(source[i].image, resized[i]) for i in range(0, 500, 50))
    colour = open_source("builtin", image_size=40, channels=3)[3].image
    assert torch.equal(colour, resized[3].repeat(3, 1, 1))


def test_what_is_handed_out_may_be_written_to():
    source = open_source("builtin")
    before = source[0].image.clone()
    source[0].image.zero_()
    assert torch.equal(source[0].image, before)


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_by_part(tmp_path, monkeypatch, packed):
    write_idx(tmp_path, packed=packed)
    data = load_data(f"fashion-mnist:{tmp_path}")
    monkeypatch.setenv("FASTXKD_FASHION_MNIST", str(tmp_path))
    for spec, split in (
        (f"fashion-mnist:{tmp_path}", data.test),
        ("fashion-mnist", data.test),
        (f"fashion-mnist:{tmp_path}#train", data.train),
        ("fashion-mnist#train", data.train),
    ):
        source = open_source(spec)
        assert len(source) == len(split)
        assert torch.equal(source[5].image, split.images[5])
        assert source[5].label == split.labels[5]


def test_folder_is_in_the_order_of_its_paths(tmp_path):
    write_images(tmp_path, {"cat": 4, "ant": 2, "b.b": 2, "b": 2, "empty": 0})
    (tmp_path / "b" / "deep").mkdir()
    (tmp_path / "b" / "00.png").rename(tmp_path / "b" / "deep" / "00.png")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.png").write_bytes(png(1))
    (tmp_path / "cat" / "readme.txt").write_text("no image")
    source = open_source(f"imagefolder:{tmp_path}", image_size=16)
    data = load_data(f"imagefolder:{tmp_path}", image_size=16, held_out=0)
    assert source.classes == data.classes == ["ant", "b", "b.b", "cat"]
    samples = all_of(source)
    assert [tmp_path / sample.name for sample in samples] == data.test.paths
    assert [sample.label for sample in samples] == data.test.labels.tolist()
    batch = data.test.load(range(len(source)))
    assert torch.equal(torch.stack([sample.image for sample in samples]), batch.images)


def test_flat_folder_has_no_labels(tmp_path):
    for name in ("b.png", "a.PNG", ".hidden.png"):
        (tmp_path / name).write_bytes(png(3))
    source = open_source(f"imagefolder:{tmp_path}", image_size=8, channels=1)
    assert source.classes is None
    assert [(s.name, s.label, tuple(s.image.shape)) for s in all_of(source)] == [
        ("a.PNG", None, (1, 8, 8)),
        ("b.png", None, (1, 8, 8)),
    ]
    # Images beside class folders are not lost; they are of no class.
    write_images(tmp_path, {"ab": 1})
    mixed = open_source(f"imagefolder:{tmp_path}", image_size=8)
    assert [(s.name, s.label) for s in all_of(mixed)] == [
        ("a.PNG", None),
        ("ab/00.png", 0),
        ("b.png", None),
    ]


def test_folder_with_parts_keeps_the_numbers_of_training(tmp_path):
    write_images(tmp_path / "train", {"a": 1, "b": 1, "c": 1})
    write_images(tmp_path / "val", {"c": 1, "b": 1})
    source = open_source(f"imagefolder:{tmp_path}", image_size=8)
    assert source.classes == ["a", "b", "c"]
    assert [(s.name, s.label) for s in all_of(source)] == [("b/00.png", 1), ("c/00.png", 2)]
    assert len(open_source(f"imagefolder:{tmp_path}#train")) == 3
    assert len(open_source(f"imagefolder:{tmp_path}#val")) == 2
    with pytest.raises(ValueError, match="has no folder 'test'; it has train, val"):
        open_source(f"imagefolder:{tmp_path}#test")
    write_images(tmp_path / "val", {"d": 1})
    with pytest.raises(ValueError, match=r"expected the classes of .*train in .*val, got d"):
        open_source(f"imagefolder:{tmp_path}")
    # Folders without images beside them change nothing.
    (tmp_path / "devkit" / "data").mkdir(parents=True)
    assert open_source(f"imagefolder:{tmp_path}#train").classes == ["a", "b", "c"]
    with pytest.raises(ValueError, match="got d"):
        open_source(f"imagefolder:{tmp_path}")
    # With other folders of images beside them, train and val are classes like these.
    write_images(tmp_path / "plane", {"x": 1})
    assert open_source(f"imagefolder:{tmp_path}").classes == ["plane", "train", "val"]


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_one_part_alone_has_its_own_classes(tmp_path, part):
    write_images(tmp_path / part, {"a": 1, "b": 1})
    source = open_source(f"imagefolder:{tmp_path}", image_size=8)
    assert [(s.name, s.label) for s in all_of(source)] == [("a/00.png", 0), ("b/00.png", 1)]
    # Without folders of its own it is one.
    write_images(tmp_path / "other", {part: 1})
    assert open_source(f"imagefolder:{tmp_path / 'other'}").classes == [part]


def test_a_folder_may_have_the_mark_of_a_part_in_its_name(tmp_path):
    write_images(tmp_path / "c#sharp", {"a": 1})
    assert len(open_source(f"imagefolder:{tmp_path / 'c#sharp'}")) == 1


def test_opening_a_folder_opens_no_image(tmp_path, monkeypatch):
    for number in range(50):
        (tmp_path / f"{number:03d}.jpg").write_bytes(b"not read yet")

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("opened")

    with monkeypatch.context() as patched:
        patched.setattr(needs("PIL.Image"), "open", refuse)
        patched.setattr("fastxkd.runs.pictures.open_file", refuse)
        source = open_source(f"imagefolder:{tmp_path}")
        assert (len(source), source.describe()["images"]) == (50, 50)
    with pytest.raises(ImageError):
        source[0]


def test_index_of_many_files_is_small(tmp_path):
    for number in range(2_000):
        (tmp_path / f"a rather long name {number:06d}.jpg").touch()
    source = open_source(f"imagefolder:{tmp_path}")
    per_file = len("a rather long name 000000.jpg") + 8 + 4
    assert len(pickle.dumps(source)) < 1.05 * 2_000 * per_file + 2_000


def write_shards(folder: Path, *, shards: int = 3, each: int = 4) -> str:
    """Shards as the real package writes them: images as png or jpg, labels as cls or json."""
    webdataset = needs("webdataset")
    random = np.random.RandomState(0)
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"part-{shard:03d}.tar"), mtime=0) as writer:
            for number in range(each):
                key = f"{'deep/er/' if number % 2 else ''}{shard:02d}{number:04d}"
                pixels = random.randint(0, 256, (20, 24, 3)).astype(np.uint8)
                sample: dict[str, Any] = {"__key__": key, "txt": f"caption of {key}"}
                sample["jpg" if number % 2 else "png"] = pixels
                if number % 3:
                    sample["cls"] = 10 * shard + number
                else:
                    sample["json"] = {"label": 10 * shard + number, "source": "made up"}
                writer.write(sample)
    return f"webdataset:{folder}/part-{{000..{shards - 1:03d}}}.tar"


def read_with_webdataset(folder: Path) -> list[dict[str, Any]]:
    webdataset = needs("webdataset")
    paths = sorted(map(str, folder.glob("*.tar")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))


def test_shards_are_read_as_webdataset_reads_them(tmp_path):
    spec = write_shards(tmp_path)
    expected = read_with_webdataset(tmp_path)
    source = open_source(spec, image_size=20)
    assert len(source) == len(expected) == 12
    for index, theirs in enumerate(expected):
        ours = source[index]
        suffix = "png" if "png" in theirs else "jpg"
        shard = Path(theirs["__url__"]).name
        assert ours.name == f"{shard}/{theirs['__key__']}.{suffix}"
        assert torch.equal(ours.image, read_image(io.BytesIO(theirs[suffix]), 20))
        label = int(theirs["cls"]) if "cls" in theirs else json.loads(theirs["json"])["label"]
        assert ours.label == label
    assert source.classes is None
    by_glob = open_source(f"webdataset:{tmp_path}/*.tar", image_size=20)
    assert all(same(*pair) for pair in zip(all_of(source), all_of(by_glob), strict=True))
    assert by_glob.describe()["fingerprint"] == source.describe()["fingerprint"]


NAMES = [
    "a.png",
    "a.cls",
    "a.seg.png",
    "sub.dir/b.JPG",
    "sub.dir/b.json",
    "c",
    "__meta__/x.png",
    "__info__.json",
    "d.input.png",
    "d.cls",
    "a.png",
    "dir/a.png",
    "x" * 80 + "/" + "y" * 90 + ".png",
    "long/" * 60 + "z.png",
    "ünï/cödé.png",
    "empty.png",
]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_and_groups_of_every_kind_of_tar(tmp_path, form):
    contents = {name: bytes([at]) * (700 * at) for at, name in enumerate(NAMES[:-1])}
    contents["empty.png"] = b""
    names = [n for n in NAMES if form != tarfile.USTAR_FORMAT or len(n) < 200]
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=form) as archive:
        folder = tarfile.TarInfo("sub.dir")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(contents[name])
            info.mtime = 0.5 if form == tarfile.PAX_FORMAT else 0
            archive.addfile(info, io.BytesIO(contents[name]))
    with path.open("rb") as file:
        found = list(members(file.fileno()))
        assert [printable(member.name) for member in found] == names
        for member, name in zip(found, names, strict=True):
            assert member.problem is None
            assert os.pread(file.fileno(), member.size, member.start) == contents[name]
    source = open_source(f"webdataset:{path}")
    theirs = [s["__key__"] for s in read_with_webdataset(tmp_path)]
    names_of_rows = [source.name(i).partition("/")[2] for i in range(len(source))]
    keys = [re.sub(r"\.[^/]*$", "", name) for name in names_of_rows]
    assert keys == theirs
    assert names_of_rows[0] == "a.png"
    assert "d.input.png" in names_of_rows


@pytest.mark.parametrize(
    ("content", "label"),
    [
        ('{"label": 3}', 3),
        ('{"label": "3", "cls": 4}', 3),
        ('"12"', 12),
        ('{"target": "-1"}', None),
        ('{"class": "cat"}', None),
        ('{"label": true}', None),
        ('{"label": "3.0"}', None),
    ],
)
def test_labels_in_json(tmp_path, content, label):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in (("a.png", png(9)), ("a.json", content.encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert open_source(f"webdataset:{tmp_path / 'x.tar'}", image_size=8)[0].label == label


def test_large_sizes_in_base_256(tmp_path):
    """GNU tar writes sizes from 8 GiB on in binary; a small one written so reads the same."""
    info = tarfile.TarInfo("a.png")
    content = png(9)
    info.size = len(content)
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    head[124:136] = b"\x80" + len(content).to_bytes(11, "big")
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + 256 + sum(head[156:]))
    padding = b"\0" * (-len(content) % 512)
    (tmp_path / "x.tar").write_bytes(bytes(head) + content + padding + b"\0" * 1024)
    source = open_source(f"webdataset:{tmp_path / 'x.tar'}", image_size=8)
    assert (source[0].image == 9).all()


def test_shards_by_brackets(tmp_path):
    write_shards(tmp_path, shards=12, each=1)
    several = open_source(f"webdataset:{tmp_path}/part-0{{08..11}}.tar")
    assert [several.name(i).partition("/")[0] for i in range(4)] == [
        "part-008.tar",
        "part-009.tar",
        "part-010.tar",
        "part-011.tar",
    ]
    assert len(open_source(f"webdataset:{tmp_path}/{{part-00[01],part-011}}.tar")) == 3
    (tmp_path / "b").mkdir()
    (tmp_path / "part-000.tar").rename(tmp_path / "b" / "part-001.tar")
    both = open_source(f"webdataset:{tmp_path}/{{b/,}}part-001.tar")
    assert [both.name(i) for i in range(2)] == [
        "b/part-001.tar/000000.png",
        "part-001.tar/010000.png",
    ]
    for pattern, text in (
        ("part-{001..012}.tar", r"no shard .*part-012\.tar"),
        ("*.tgz", r"no shard .*\*\.tgz"),
        ("part-{5..2}.tar", "stands for 0 shards"),
        ("part-{0..999999999}.tar", "stands for 1,000,000,000 shards"),
        ("part-{0..99999}{0..99999}.tar", "stands for 10,000,000,000 shards"),
    ):
        with pytest.raises(ValueError, match=f"data: .*{text}"):
            open_source(f"webdataset:{tmp_path}/{pattern}")


@pytest.fixture
def datasets() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return needs("datasets")


def saved_rows(datasets: Any, count: int = 6, **columns: Any) -> Any:
    image_module = needs("PIL.Image")
    rows = {
        "note": [f"row {i}" for i in range(count)],
        "img": [
            image_module.fromarray(np.full((20, 24, 3), 10 * i, dtype=np.uint8))
            for i in range(count)
        ],
        "label": [i % 3 for i in range(count)],
        **columns,
    }
    features = {
        "note": datasets.Value("string"),
        "img": datasets.Image(),
        "label": datasets.ClassLabel(names=["x", "y", "z"]),
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def test_saved_hugging_face_data_set(tmp_path, datasets):
    rows = saved_rows(datasets)
    rows.save_to_disk(str(tmp_path / "one"))
    source = open_source(f"hf:{tmp_path / 'one'}")
    assert (len(source), source.classes, source.shape) == (6, ["x", "y", "z"], (3, 20, 20))
    assert [s.label for s in all_of(source)] == [0, 1, 2, 0, 1, 2]
    assert [int(s.image.unique()) for s in all_of(source)] == [0, 10, 20, 30, 40, 50]
    assert source.describe()["columns"] == ["img", "label"]
    again = pickle.loads(pickle.dumps(source))
    assert all(same(*pair) for pair in zip(all_of(source), all_of(again), strict=True))
    straight = open_source(rows, image_size=12)
    assert straight[3].image.shape == (3, 12, 12)
    assert straight.classes == ["x", "y", "z"]

    both = datasets.DatasetDict({"train": rows, "test": rows.select([5, 1])})
    both.save_to_disk(str(tmp_path / "two"))
    test = open_source(f"hf:{tmp_path / 'two'}#test")
    assert [int(s.image.unique()) for s in all_of(test)] == [50, 10]
    with pytest.raises(ValueError, match=r"has the splits train, test; name one as in .*two#test"):
        open_source(f"hf:{tmp_path / 'two'}")
    with pytest.raises(ValueError, match=r"has no split 'val'; it has train, test"):
        open_source(f"hf:{tmp_path / 'two'}#val")
    with pytest.raises(ValueError, match="so it has no split 'val'"):
        open_source(f"hf:{tmp_path / 'one'}#val")


def test_grey_hugging_face_images_and_labels_without_names(tmp_path, datasets):
    image_module = needs("PIL.Image")
    grey = [image_module.fromarray(np.full((28, 28), i, dtype=np.uint8)) for i in range(3)]
    features = datasets.Features({"picture": datasets.Image(), "y": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"picture": grey, "y": [4, -1, None]}, features=features)
    rows.save_to_disk(str(tmp_path / "grey"))
    source = open_source(f"hf:{tmp_path / 'grey'}")
    assert (source.classes, source.shape) == (None, (1, 28, 28))
    assert [s.label for s in all_of(source)] == [4, None, None]
    assert open_source(f"hf:{tmp_path / 'grey'}", channels=3).shape == (3, 28, 28)


def test_hugging_face_data_that_cannot_be_used(tmp_path, datasets):
    text = datasets.Dataset.from_dict({"text": ["a"]})
    text.save_to_disk(str(tmp_path / "text"))
    with pytest.raises(ValueError, match=r"data: .* has no column of images .* text"):
        open_source(f"hf:{tmp_path / 'text'}")
    with pytest.raises(ValueError, match=r"data: .*nowhere is not a folder"):
        open_source(f"hf:{tmp_path / 'nowhere'}")
    (tmp_path / "else").mkdir()
    with pytest.raises(ValueError, match=r"data: .*else does not open as a data set"):
        open_source(f"hf:{tmp_path / 'else'}")
    with pytest.raises(ValueError, match="data: a Hugging Face data set has no images"):
        open_source(saved_rows(datasets, 0))


def test_torchvision_data_sets(tmp_path):
    declare_operators()
    needs("torchvision.datasets")
    write_idx(tmp_path / "FashionMNIST" / "raw", packed=False)
    plain = load_data(f"fashion-mnist:{tmp_path / 'FashionMNIST' / 'raw'}")
    for part, split in (("", plain.test), ("#train", plain.train)):
        source = open_source(f"torchvision:FashionMNIST:{tmp_path}{part}")
        assert (len(source), source.shape) == (len(split), (1, 28, 28))
        assert source.classes == plain.classes
        assert torch.equal(source[3].image, split.images[3])
        assert source[3].label == split.labels[3]
    copy = pickle.loads(pickle.dumps(source))
    assert same(copy[3], source[3])
    write_images(tmp_path / "folder", {"cat": 2, "ant": 1}, size=(40, 30))
    folder = open_source(f"torchvision:ImageFolder:{tmp_path / 'folder'}")
    assert (folder.classes, folder.shape) == (["ant", "cat"], (3, 30, 30))
    ours = open_source(f"imagefolder:{tmp_path / 'folder'}", image_size=30)
    for one, other in zip(all_of(folder), all_of(ours), strict=True):
        assert torch.equal(one.image, other.image)
        assert one.label == other.label


def test_torchvision_never_downloads(tmp_path, monkeypatch):
    declare_operators()
    needs("torchvision.datasets")

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    for name in ("FashionMNIST", "CIFAR10", "SVHN", "STL10", "Flowers102", "OxfordIIITPet"):
        with pytest.raises(ValueError, match=f"data: torchvision's {name} does not open in"):
            open_source(f"torchvision:{name}:{tmp_path}")
    for spec, text in (
        ("torchvision:fashionmnist:/x", r"got 'fashionmnist' and '/x'; did you mean FashionMNIST"),
        ("torchvision:VisionDataset:", "got 'VisionDataset' and ''"),
        ("torchvision:os:/x", "got 'os' and '/x'"),
        (f"torchvision:ImageFolder:{tmp_path}#val", "ImageFolder has no part 'val'"),
    ):
        with pytest.raises(ValueError, match=f"data: .*{text}"):
            open_source(spec)
    assert list(tmp_path.iterdir()) == []


def test_factories_in_files_and_modules(tmp_path, monkeypatch):
    (tmp_path / "made_data.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    for place in (str(tmp_path / "made_data.py"), "made_data"):
        source = open_source(f"{place}:squares")
        assert (len(source), source.shape) == (6, (3, 12, 12))
        assert source.classes == ["small", "large"]
        assert [s.label for s in all_of(source)] == [0, 1, 0, 1, 0, 1]
        assert open_source(f"{place}:squares", image_size=9).shape == (3, 9, 9)
        copy = pickle.loads(pickle.dumps(source))
        assert all(same(*pair) for pair in zip(all_of(source), all_of(copy), strict=True))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("missing", "data: made_data has no callable 'missing'"),
        ("value", "data: made_data has no callable 'value'"),
        ("needy", r"data: made_data:needy needs the argument\(s\) folder"),
        ("demanding", "image_size: made_data:demanding needs it"),
        ("broken", "data: made_data:broken failed: FileNotFoundError: No such file"),
        ("wrong", "data: made_data:wrong made a int, expected a data set"),
    ],
)
def test_factories_that_cannot_be_used(tmp_path, monkeypatch, name, text):
    (tmp_path / "made_data.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=text):
        open_source(f"made_data:{name}")


@pytest.mark.parametrize(
    "spec",
    ["", "cifar10", "imagefolder:", "webdataset:", "hf:", "builtin:x", "builtin#val", ":", "x:"],
)
def test_unknown_specs(spec):
    with pytest.raises(ValueError, match=r"data: expected builtin, .* got"):
        open_source(spec)
    with pytest.raises(ValueError, match="data: no module 'no_such_module_here'"):
        open_source("no_such_module_here:f")
    with pytest.raises(ValueError, match=r"data: .*nowhere\.py of .* does not exist"):
        open_source("nowhere.py:f")


GREY = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)
COLOUR = np.stack([GREY, GREY.T, 255 - GREY])


def kinds_of_items() -> dict[str, tuple[Any, torch.Tensor, int | None]]:
    image_module = needs("PIL.Image")
    colour = torch.from_numpy(COLOUR)
    read_only = np.frombuffer(GREY.tobytes(), np.uint8).reshape(16, 16)
    return {
        "tensor": (colour, colour, None),
        "grey tensor": (torch.from_numpy(GREY), colour[:1], None),
        "pair": ((colour, 3), colour, 3),
        "list": ([colour, np.int64(4), "more"], colour, 4),
        "alone in a tuple": ((colour,), colour, None),
        "tensor label": ((colour, torch.tensor(2)), colour, 2),
        "label in a vector": ((colour, torch.tensor([5])), colour, 5),
        "many labels": ((colour, torch.tensor([1, 0, 1])), colour, None),
        "text for a label": ((colour, "cat"), colour, None),
        "no label": ((colour, -1), colour, None),
        "dict": ({"image": colour, "label": 1, "id": 9}, colour, 1),
        "other keys": ({"pixel_values": colour, "target": 7}, colour, 7),
        "channels last": (COLOUR.transpose(1, 2, 0), colour, None),
        "channels first": (COLOUR, colour, None),
        "read-only array": (read_only, colour[:1], None),
        "16 bits": (COLOUR.astype(np.uint16) << 8, colour, None),
        "floats": (colour.double(), colour.float(), None),
        "float array": (COLOUR.astype(np.float16), colour.float(), None),
        "picture": (image_module.fromarray(COLOUR.transpose(1, 2, 0)), colour, None),
        "grey picture": (image_module.fromarray(GREY), colour[:1], None),
        "trained on": (colour.float().requires_grad_(), colour.float(), None),
    }


@pytest.mark.parametrize("number", range(21))
def test_items_of_every_kind(number):
    kinds = list(kinds_of_items().values())
    assert len(kinds) == 21
    item, image, label = kinds[number]
    source = open_source([item, item])
    found = source[1]
    assert found == Sample(found.image, label, "image 1")
    assert found.image.dtype == image.dtype
    assert torch.equal(found.image, image)
    assert not found.image.requires_grad
    if image.is_floating_point():
        assert source.mean is None
        assert torch.equal(source.normalize(found.image[None])[0], image)
        with pytest.raises(ValueError, match=r"image_size: .* are floats .* taken as they are"):
            open_source([item], image_size=8)
        with pytest.raises(ValueError, match=r"mean: .* are floats"):
            open_source([item], mean=(0.5,))
    else:
        assert open_source([item], image_size=8)[0].image.shape == (len(image), 8, 8)


def test_pixels_are_cut_and_scaled_as_pictures_are():
    image_module = needs("PIL.Image")
    wide = np.random.RandomState(0).randint(0, 256, (32, 64, 3)).astype(np.uint8)
    picture = open_source([image_module.fromarray(wide)], image_size=16)[0].image
    pixels = open_source([wide], image_size=16)[0].image
    assert torch.equal(picture, pixels)
    middle = torch.tensor(wide[:, 16:48]).permute(2, 0, 1)
    assert torch.equal(open_source([wide], image_size=32)[0].image, middle)


def test_the_first_picture_decides_the_size():
    image_module = needs("PIL.Image")
    pictures = [image_module.new("RGB", size) for size in ((50, 40), (300, 300), (20, 90))]
    source = open_source(pictures)
    assert {sample.image.shape for sample in all_of(source)} == {(3, 40, 40)}
    assert open_source(pictures[1:]).shape == (3, 224, 224)
    assert open_source([image_module.new("L", (3, 3))], channels=3).shape == (3, 8, 8)


def test_objects_that_are_no_data_sets():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    for stranger in (Stream(), iter([]), 3, None, Path("x"), torch.utils.data.Dataset()):
        with pytest.raises(TypeError, match=r"data: expected builtin.*; got a"):
            open_source(stranger)
    for empty in ([], {}, torch.empty(0, 3, 8, 8)):
        with pytest.raises(ValueError, match=r"data: .* has no images"):
            open_source(empty)
    for wrong, text in (
        (["a", "b"], "a Pillow image, a tensor or an array, got a str"),
        ([()], "expected an image, got an empty tuple"),
        ([{"text": 1}], "expected one of the keys image, .* got text"),
        ([torch.zeros(2, 3, 8, 8)], r"expected an image \[C, H, W\], got \[2, 3, 8, 8\]"),
        ([torch.zeros(3, 0, 8)], r"got \[3, 0, 8\]"),
        (
            [torch.zeros(3, 8, 8, dtype=torch.int64)],
            "expected pixels of uint8 or floats, got torch.int64",
        ),
        (
            [np.zeros((8, 8), dtype=object)],
            "of uint8, uint16 or floats, got object",
        ),
    ):
        with pytest.raises(ValueError, match=f"data: none of the first .* can be had; .*{text}"):
            open_source(wrong)


def test_an_open_source_is_taken_as_it_is():
    source = open_source("builtin")
    assert open_source(source) is source
    with pytest.raises(ValueError, match="data: this source is open already"):
        open_source(source, image_size=32)
    with pytest.raises(IndexError, match="index: expected 0 to 499, got 500"):
        source[500]
    with pytest.raises(IndexError, match="index: expected 0 to 499, got -1"):
        source[-1]
    with pytest.raises(TypeError):
        source[1.5]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"image_size": 4}, "image_size: expected at least 8, got 4"),
        ({"channels": 2}, "channels: expected 1 or 3, got 2"),
        ({"max_pixels": 0}, "max_pixels: expected at least 1, got 0"),
        ({"mean": (0.1, 0.2)}, "mean: expected 1 or 1 numbers, got 2"),
        ({"std": (0.0,)}, "std: expected positive numbers"),
    ],
)
def test_options_out_of_range(options, text):
    with pytest.raises(ValueError, match=text):
        open_source("builtin", **options)


def test_tensors_have_the_channels_they_have():
    with pytest.raises(ValueError, match=r"channels: the images of .* have 3, got 1"):
        open_source([torch.zeros(3, 8, 8, dtype=torch.uint8)], channels=1)


def test_description_says_what_has_to_be_equal(tmp_path):
    write_images(tmp_path / "images", {"a": 2, "b": 2})
    spec = f"imagefolder:{tmp_path / 'images'}"
    first = open_source(spec, image_size=16).describe()
    assert json.loads(json.dumps(first)) == first
    assert first == open_source(spec, image_size=16).describe()
    assert first != open_source(spec, image_size=24).describe()
    (tmp_path / "images" / "a" / "00.png").rename(tmp_path / "images" / "a" / "02.png")
    moved = open_source(spec, image_size=16).describe()
    assert {key for key in first if first[key] != moved[key]} == {"fingerprint"}
    (tmp_path / "images" / "b" / "00.png").write_bytes(b"another picture")
    replaced = open_source(spec, image_size=16).describe()
    assert {key for key in moved if moved[key] != replaced[key]} == {"fingerprint"}
    shards = write_shards(tmp_path / "shards", shards=2)
    before = open_source(shards).describe()
    assert json.loads(json.dumps(before)) == before
    with tarfile.open(tmp_path / "shards" / "part-001.tar", "a") as archive:
        archive.add(tmp_path / "images" / "a" / "01.png", "one more.png")
    after = open_source(shards).describe()
    assert {key for key in before if before[key] != after[key]} == {"fingerprint", "images"}
    builtin = open_source("builtin").describe()
    assert builtin["fingerprint"] != open_source("builtin#train").describe()["fingerprint"]
    assert json.loads(json.dumps(builtin)) == builtin


def test_objects_are_told_apart_by_a_few_of_their_items(caplog):
    made = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 9, 9), generator=made, dtype=torch.uint8)
    data = [(image, i % 3) for i, image in enumerate(images)]
    first = open_source(data).describe()
    assert first == open_source(list(data)).describe()
    assert json.loads(json.dumps(first)) == first
    for others in (
        [(255 - image, i) for image, i in data],
        [(image, 1 - i % 2) for image, i in data],
    ):
        second = open_source(others).describe()
        assert {key for key in first if first[key] != second[key]} == {"fingerprint"}
    assert not caplog.text


def test_items_that_change_from_look_to_look_are_told_of(caplog):
    class Augmented:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.rand(1, 9, 9), index

    assert open_source(Augmented()).describe()["fingerprint"] is None
    assert "others each time they are read (random augmentation?)" in caplog.text


# Python 3.12 warns about forking a process that has threads, as torch's loader does.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_see_the_same_images(tmp_path, start):
    (tmp_path / "made_data.py").write_text(FACTORIES)
    write_images(tmp_path / "images", {"a": 3, "b": 3})
    sources = [
        open_source(f"imagefolder:{tmp_path / 'images'}", image_size=16),
        open_source(write_shards(tmp_path / "shards", shards=2), image_size=16),
        open_source(f"{tmp_path / 'made_data.py'}:squares"),
        open_source([torch.full((1, 9, 9), i, dtype=torch.uint8) for i in range(3)]),
    ]
    everything: Any = torch.utils.data.ConcatDataset(sources)
    loader = torch.utils.data.DataLoader(
        everything,
        batch_size=5,
        num_workers=1,
        collate_fn=list,
        multiprocessing_context=start,
        generator=torch.Generator(),
    )
    found = [sample for batch in loader for sample in batch]
    expected = [sample for source in sources for sample in all_of(source)]
    assert len(found) == len(expected) == 6 + 8 + 6 + 3
    assert all(same(*pair) for pair in zip(found, expected, strict=True))


def test_an_image_error_survives_the_way_home():
    error = pickle.loads(pickle.dumps(ImageError("a/b.png", "ValueError: no image")))
    assert (error.name, str(error)) == ("a/b.png", "ValueError: no image")
