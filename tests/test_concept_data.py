"""Concept data sets: what is read, what is refused, and which file and row the error names."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastxkd.runs.broden import open_broden
from fastxkd.runs.concept_data import ConceptImages, ConceptSource, at_size, open_concepts
from fastxkd.runs.concept_folder import write_concept_folder
from fastxkd.runs.concept_stamps import (
    COLOURS,
    OBJECTS,
    STAMPS,
    ComposedConcepts,
    hue_labels,
)
from fastxkd.runs.loading import readable
from fastxkd.runs.sources import ImageError, Settings
from fastxkd.runs.textures import DRAWN, PHOTOGRAPHED, TEXTURES, ground
from tests.concept_sets import (
    IMAGE,
    LABELS,
    SIZE,
    colours,
    row,
    save,
    table,
    write_broden,
    write_index,
)
from tests.conftest import needs


@pytest.fixture(autouse=True)
def _installed() -> None:
    needs("PIL")


def why_not(source: ConceptSource, index: int) -> str:
    with pytest.raises(ImageError) as caught:
        source[index]
    return str(caught.value)


def test_broden_is_read_as_it_is_written(tmp_path):
    content = write_broden(tmp_path)
    source = open_concepts(f"broden:{tmp_path}", image_size=IMAGE)
    assert (len(source), source.shape, source.mask_size) == (12, (3, IMAGE, IMAGE), (SIZE, SIZE))
    for index, wanted in enumerate(content):
        sample = source[index]
        assert sample.name == f"im/{index:03d}.png"
        assert np.array_equal(sample.image.numpy(), wanted["image"].transpose(2, 0, 1))
        assert np.array_equal(sample.masks.numpy(), np.stack(wanted["masks"]))
        assert sample.labels == wanted["labels"]
    # Two bytes: 700 = 188 + 2 * 256.
    assert 700 in source[0].masks.unique().tolist() + source[1].masks.unique().tolist()
    assert pickle.loads(pickle.dumps(source))[3].labels == content[3]["labels"]


def test_primary_category_is_the_one_that_a_label_covers_most_of(tmp_path):
    write_broden(tmp_path, 2)
    concepts = open_concepts(f"broden:{tmp_path}").concepts
    assert len(concepts) == 701
    found = {n: (concepts.names[n], concepts.category_of(n)) for n, _, _ in LABELS}
    assert found[1] == ("cat", "object")
    assert found[3] == ("painted", "object")  # 3.0 of object, 0.5 of color
    assert found[5] == ("grass", "texture")
    assert found[6] == ("both", "color")  # equal: the last category of the table
    assert concepts.names[4] == ""


def test_split_and_rows_without_labels(tmp_path):
    write_broden(tmp_path)
    assert len(open_concepts(f"broden:{tmp_path}#val")) == 3
    with pytest.raises(ValueError, match=r"no row with labels in the split 'test'.*train, val"):
        open_concepts(f"broden:{tmp_path}#test")
    lines = (tmp_path / "index.csv").read_text().splitlines()
    lines.insert(1, "im/none.png,train,24,24,12,12,,,")
    (tmp_path / "index.csv").write_text("\n".join(lines) + "\n")
    source = open_broden("b", tmp_path, None, Settings(image_size=IMAGE))
    assert (len(source), source.row(0)) == (12, 3)


def test_one_number_beside_masks_is_a_label_of_every_pixel(tmp_path):
    write_broden(tmp_path, 2)
    write_index(tmp_path, [row("im/000.png", "im/000_object.png;6", "2", "5")])
    sample = open_concepts(f"broden:{tmp_path}")[0]
    assert sample.masks.shape == (2, SIZE, SIZE)
    assert (sample.masks[1] == 6).all()
    assert sample.labels == [2, 5]


def test_masks_at_another_size(tmp_path):
    content = write_broden(tmp_path, 3)
    source = open_concepts(f"broden:{tmp_path}", size=SIZE // 3)
    assert torch.equal(source[0].masks, torch.from_numpy(content[0]["masks"][0][1::3, 1::3])[None])
    assert at_size(np.arange(6).reshape(2, 3), (4, 6)).tolist()[1] == [0, 0, 1, 1, 2, 2]


# What is done to the data set, and what the error of image 1, in row 3, must say.
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "mask of another size": (
        lambda root: save(root / "images/im/001_object.png", colours(np.ones((9, SIZE), int))),
        r"^index.csv row 3: im/001_object.png: 9 x 12 pixels, expected 12 x 12",
    ),
    "unknown label": (
        lambda root: save(root / "images/im/001_object.png", colours(np.full((SIZE, SIZE), 512))),
        r"^index.csv row 3: im/001_object.png: unknown label 512$",
    ),
    "number without a name": (
        lambda root: save(root / "images/im/001_object.png", colours(np.full((SIZE, SIZE), 4))),
        r"^index.csv row 3: im/001_object.png: unknown label 4$",
    ),
    "missing mask": (
        lambda root: (root / "images/im/001_object.png").unlink(),
        r"^index.csv row 3: im/001_object.png: FileNotFoundError",
    ),
    "missing image": (
        lambda root: (root / "images/im/001.png").unlink(),
        r"^index.csv row 3: im/001.png: FileNotFoundError",
    ),
    "damaged mask": (
        lambda root: (root / "images/im/001_object.png").write_bytes(b"\x89PNG\r\n"),
        r"^index.csv row 3: im/001_object.png: no image of a known format",
    ),
    "category without pixels": (
        lambda root: save(root / "images/im/001_object.png", colours(np.zeros((SIZE, SIZE), int))),
        r"^index.csv row 3: im/001_object.png: no pixel has a label$",
    ),
    "mask that lost its numbers": (
        lambda root: (
            needs("PIL.Image")
            .fromarray(colours(np.ones((SIZE, SIZE), int)))
            .save(root / "images/im/001_object.png", "JPEG")
        ),
        r"^index.csv row 3: im/001_object.png: a JPEG, which does not keep the numbers of labels",
    ),
    "image that is a mask of floats": (
        lambda root: (
            needs("PIL.Image")
            .fromarray(np.ones((SIZE, SIZE), np.float32))
            .save(root / "images/im/001_object.png", "TIFF")
        ),
        r"^index.csv row 3: im/001_object.png: a mask of float32",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_is_named_by_file_and_row(tmp_path, kind):
    write_broden(tmp_path, 4)
    damage, words = BROKEN[kind]
    damage(tmp_path)
    source = open_concepts(f"broden:{tmp_path}", image_size=IMAGE)
    with pytest.raises(ImageError, match=words) as caught:
        source[1]
    assert caught.value.name == "im/001.png"
    for index in (0, 2, 3):  # the others are as before
        source[index]
    batch = ConceptImages(source)[0, 4]
    assert batch.failed == {1: str(caught.value)}
    assert batch.kept == [0, 2, 3]
    assert not batch.masks[1].any()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"texture": "9"}, "index.csv row 3: unknown label 9$"),
        ({"texture": "9" * 18}, f"index.csv row 3: unknown label {'9' * 18}$"),
        (
            {"texture": "9" * 5000},
            f"index.csv row 3: expected numbers of labels, got '{'9' * 40}'$",
        ),
        (
            {"texture": f"im/000_object.png;{'9' * 20}"},
            "index.csv row 3: expected numbers of labels",
        ),
        ({"object": "im/000_object.png", "sh": 13}, "row 3: masks of sh x sw = 13 x 12, expected"),
        ({"object": "im/000_object.png", "sh": ""}, "row 3: masks of sh x sw = x 12, expected"),
        ({"object": "../../../x.png"}, r"row 3: \.\./\.\./\.\./x.png leads out of the data folder"),
    ],
)
def test_rows_that_are_broken(tmp_path, fields, words):
    write_broden(tmp_path, 3)
    lines = (tmp_path / "index.csv").read_text().splitlines()
    lines[2] = ",".join(map(str, row("im/001.png", **fields)))
    (tmp_path / "index.csv").write_text("\n".join(lines) + "\n")
    source = open_concepts(f"broden:{tmp_path}", image_size=IMAGE)
    with pytest.raises(ImageError, match=words):
        source[1]
    assert readable(source) == [0, 2]


@pytest.mark.parametrize("name", ["index.csv", "label.csv", "category.csv", "c_color.csv"])
def test_tables_of_spreadsheets(tmp_path, name):
    write_broden(tmp_path, 3)
    spec = f"broden:{tmp_path}"
    before = open_concepts(spec, image_size=IMAGE).describe()
    path = tmp_path / name
    text = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b",\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text)
    assert open_concepts(spec, image_size=IMAGE).describe() == before


def open_quote(path: Path, row: int) -> None:
    lines = path.read_text().splitlines()
    lines[row - 1] = f'"{lines[row - 1]}'
    path.write_text("\n".join(lines) + "\n")


def test_empty_masks_are_taken_on_request(tmp_path):
    write_broden(tmp_path, 2)
    save(tmp_path / "images/im/001_object.png", colours(np.zeros((SIZE, SIZE), int)))
    source = open_concepts(f"broden:{tmp_path}", image_size=IMAGE, allow_empty=True)
    assert not source[1].masks[0].any()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: (root / "label.csv").unlink(), "label.csv cannot be read"),
        (lambda root: (root / "c_color.csv").unlink(), "c_color.csv cannot be read"),
        (
            lambda root: table(root / "c_color.csv", ("number", "coverage"), [(2, 1), (9, 1)]),
            "c_color.csv row 3: label 9 is not in label.csv",
        ),
        (
            lambda root: table(root / "c_color.csv", ("number", "coverage"), [(2, "much")]),
            "c_color.csv row 2: coverage is 'much', expected a number",
        ),
        (
            lambda root: table(root / "c_color.csv", ("number", "coverage"), [(2, "nan")]),
            "c_color.csv row 2: coverage is 'nan', expected a number that is not below 0",
        ),
        (
            lambda root: table(root / "c_color.csv", ("number", "coverage"), [(2, 1), (3, -1)]),
            "c_color.csv row 3: coverage is '-1', expected a number that is not below 0",
        ),
        (
            lambda root: table(root / "label.csv", ("number", "name"), [("9" * 5000, "a")]),
            "label.csv row 2: the number of a label is '9{40}', expected 1 to 65535",
        ),
        (
            lambda root: open_quote(root / "index.csv", 4),
            "index.csv row 4: unexpected end of data$",
        ),
        (
            lambda root: table(root / "c_color.csv", ("number", "coverage"), []),
            "c_color.csv: the category 'color' has no labels",
        ),
        (
            lambda root: table(root / "label.csv", ("number", "name"), [(1, "a"), ("x", "b")]),
            "label.csv row 3: the number of a label is 'x'",
        ),
        (
            lambda root: table(root / "label.csv", ("number", "name"), [(1, "a"), (1, "b")]),
            "label.csv row 3: label 1 comes twice",
        ),
        (lambda root: table(root / "label.csv", ("name",), []), "label.csv has no column 'number'"),
        (
            lambda root: write_index(root, [row("im/000.png", "im/000_object.png", "2")]),
            "category.csv row 4: no image of index.csv has pixels or labels of the category 'tex",
        ),
        (
            lambda root: table(root / "index.csv", ("image", "split", "sh", "sw", "object"), []),
            "category.csv row 3: index.csv has no column for the category 'color'",
        ),
        (lambda root: write_index(root, [row("im/000.png")]), "index.csv has no row with labels$"),
        (
            lambda root: (root / "label.csv").write_bytes(b"number,name\n1,\xff\n"),
            "label.csv cannot be read",
        ),
    ],
)
def test_tables_that_are_broken(tmp_path, damage, words):
    write_broden(tmp_path, 5)
    damage(tmp_path)
    with pytest.raises(ValueError, match=words):
        open_concepts(f"broden:{tmp_path}")


def test_words_that_open_nothing(tmp_path):
    for spec in ("broden", "broden:", "conceptfolder:", "composed:many", "builtin", ""):
        with pytest.raises(ValueError, match="data: expected broden:ROOT"):
            open_concepts(spec)
    with pytest.raises(ValueError, match="is not a folder"):
        open_concepts(f"broden:{tmp_path}/none")
    with pytest.raises(TypeError, match=r"data: expected broden:ROOT.*got list"):
        open_concepts([])


def write_folder(root: Path) -> None:
    table(
        root / "labels.csv",
        ("number", "name", "category"),
        [(1, "cat", "object"), (2, "red", "color"), (4, "grass", "texture")],
    )
    random = np.random.RandomState(0)
    for i in range(4):
        pixels = random.randint(0, 256, (20, 20, 3)).astype(np.uint8)
        save(root / f"images/a/{i}.png", pixels)
        if i < 3:
            save(root / f"masks/things/a/{i}.png", np.full((10, 8), i % 2, np.uint8) + 1)
    save(root / "masks/shades/a/1.png", colours(np.full((10, 8), 2)))
    table(root / "images.csv", ("image", "labels"), [("a/0.png", "4"), ("a/2.png", "")])


def test_folder_of_images_and_masks(tmp_path):
    write_folder(tmp_path)
    source = open_concepts(f"conceptfolder:{tmp_path}", image_size=20)
    assert [source.name(i) for i in range(len(source))] == ["a/0.png", "a/1.png", "a/2.png"]
    assert source.mask_size == (10, 8)
    assert source.concepts.names == ("", "cat", "red", "", "grass")
    assert source.concepts.categories == ("object", "color", "texture")
    # In the order of the layers' names.
    assert [mask.unique().tolist() for mask in source[1].masks] == [[2], [2]]
    assert source[1].masks.shape == (2, 10, 8)
    assert source[0].labels == [4]
    assert source[2].labels == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda root: save(root / "masks/things/a/1.png", np.full((10, 9), 1, np.uint8)),
            "^masks/things/a/1.png: 10 x 9 pixels, expected 10 x 8",
        ),
        (
            lambda root: save(root / "masks/things/a/1.png", np.full((10, 8), 3, np.uint8)),
            "^masks/things/a/1.png: unknown label 3$",
        ),
        (lambda root: (root / "images/a/1.png").unlink(), "^images/a/1.png: FileNotFoundError"),
        (
            lambda root: table(root / "images.csv", ("image", "labels"), [("a/1.png", "1;9")]),
            "^images.csv row 2: unknown label 9$",
        ),
        (
            lambda root: table(root / "images.csv", ("image", "labels"), [("a/1.png", "cat")]),
            "^images.csv row 2: expected numbers of labels, got 'cat'$",
        ),
        (
            lambda root: (
                table(root / "images.csv", ("image", "labels"), [("a/1.png", "1")]),
                (root / "images/a/1.png").unlink(),
            ),
            "^images.csv row 2: images/a/1.png: FileNotFoundError",
        ),
    ],
)
def test_folders_that_are_broken(tmp_path, damage, words):
    write_folder(tmp_path)
    damage(tmp_path)
    source = open_concepts(f"conceptfolder:{tmp_path}", image_size=20)
    with pytest.raises(ImageError, match=words):
        source[1]
    source[0]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (
            "images/a/1.bmp",
            "images/a/1.bmp and images/a/1.png would have one mask, masks/shades/a/1",
        ),
        ("masks/things/a/1.bmp", "masks/things/a/1.bmp and masks/things/a/1.png are masks of one"),
    ],
)
def test_a_mask_belongs_to_one_image(tmp_path, extra, words):
    write_folder(tmp_path)
    save(tmp_path / extra, np.full((10, 8), 1, np.uint8))
    with pytest.raises(ValueError, match=words):
        open_concepts(f"conceptfolder:{tmp_path}")


def test_an_image_is_listed_once(tmp_path):
    write_folder(tmp_path)
    table(tmp_path / "images.csv", ("image", "labels"), [("./a/0.png", "4")])
    source = open_concepts(f"conceptfolder:{tmp_path}", image_size=20)
    assert [source.name(i) for i in range(len(source))] == ["a/0.png", "a/1.png", "a/2.png"]
    assert source[0].labels == [4]
    table(tmp_path / "images.csv", ("image", "labels"), [("./a/0.png", "4"), ("a/0.png", "1")])
    with pytest.raises(ValueError, match=r"images.csv row 3: a/0.png comes twice, first in row 2"):
        open_concepts(f"conceptfolder:{tmp_path}")


def test_other_concepts_are_other_data(tmp_path):
    write_folder(tmp_path)
    found = []
    for file, old, new in (
        ("labels.csv", "", ""),
        ("labels.csv", "4,grass,texture", "4,grass,object\n5,sand,texture"),
        ("labels.csv", "grass", "gravel"),
        ("images.csv", "a/0.png,4", "a/0.png,1"),
    ):
        text = (tmp_path / file).read_text()
        (tmp_path / file).write_text(text.replace(old, new))
        found.append(open_concepts(f"conceptfolder:{tmp_path}").describe())
    (tmp_path / "masks/things").rename(tmp_path / "masks/others")
    found.append(open_concepts(f"conceptfolder:{tmp_path}").describe())
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


def test_links_that_lead_out_are_not_followed(tmp_path):
    write_folder(tmp_path / "data")
    save(tmp_path / "secret.png", np.zeros((20, 20, 3), np.uint8))
    (tmp_path / "data/images/a/1.png").unlink()
    os.symlink(tmp_path / "secret.png", tmp_path / "data/images/a/1.png")
    source = open_concepts(f"conceptfolder:{tmp_path / 'data'}", image_size=20)
    assert "images/a/1.png leads out of the data folder" in why_not(source, 1)


def test_a_source_is_written_and_read_again(tmp_path):
    write_broden(tmp_path / "broden", 5)
    source = open_concepts(f"broden:{tmp_path / 'broden'}", image_size=IMAGE)
    write_concept_folder(source, tmp_path / "folder")
    again = open_concepts(f"conceptfolder:{tmp_path / 'folder'}", image_size=IMAGE)
    known = [n for n, name in enumerate(source.concepts.names) if name]
    for n in known:
        assert again.concepts.names[n] == source.concepts.names[n]
        assert again.concepts.category_of(n) == source.concepts.category_of(n)
    for i in range(len(source)):
        assert torch.equal(source[i].image, again[i].image)
        assert torch.equal(source[i].masks, again[i].masks)
        assert source[i].labels == again[i].labels
    with pytest.raises(ValueError, match="is not empty"):
        write_concept_folder(source, tmp_path / "folder")


def stamps() -> Path:
    root = Path(os.environ.get("FASTXKD_STAMPS") or STAMPS)
    needs("skimage")
    if not root.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have {root}")
        pytest.skip(f"no stamps in {root}")
    return root


def test_composed_images_follow_from_the_seed():
    stamps()
    one, same = (ComposedConcepts(20, seed=3) for _ in range(2))
    other = ComposedConcepts(20, seed=4)
    longer = open_concepts("composed:40@3")
    for i in (19, 0, 7):  # in any order
        assert torch.equal(one[i].image, same[i].image)
        assert torch.equal(one[i].masks, same[i].masks)
        assert torch.equal(one[i].image, longer[i].image)
        assert not torch.equal(one[i].image, other[i].image)
    assert one.describe()["fingerprint"] == other.describe()["fingerprint"]
    assert one.describe() != other.describe()


def test_composed_labels_are_where_they_belong():
    stamps()
    source = ComposedConcepts(30, mask_size=224)
    names, kinds = source.concepts.names, source.concepts.category_of
    assert source.targets.tolist()[:11] == [*range(10), 0]
    for i in range(0, 30, 7):
        sample = source[i]
        things, shades, ground = sample.masks
        assert things.unique().tolist() == [0, 1 + i % 10]
        assert names[1 + i % 10] == source.classes[source.targets[i]]
        inside = things > 0
        assert 0.02 < inside.float().mean() < 0.8
        assert torch.equal(shades > 0, inside)
        assert torch.equal(ground > 0, ~inside)
        assert {kinds(n) for n in shades[inside].unique().tolist()} == {"color"}
        assert {kinds(n) for n in ground[~inside].unique().tolist()} == {"texture"}
        assert sample.labels == []
        pixels = sample.image.permute(1, 2, 0).numpy()
        named = [names[n] for n in shades[inside].tolist()]
        assert named == [COLOURS[n] for n in hue_labels(pixels)[inside.numpy()]]
    whole = ComposedConcepts(3, texture_labels="image")[2]
    assert len(whole.masks) == 2
    assert names[whole.labels[0]] in TEXTURES
    assert ComposedConcepts(12, objects=3)[0].masks[0].unique().numel() > 2


def test_colours():
    corners = {
        "red": (230, 20, 25), "orange": (250, 140, 10), "yellow": (250, 230, 20),
        "green": (20, 160, 40), "cyan": (20, 220, 220), "blue": (30, 60, 220),
        "purple": (120, 20, 200), "pink": (240, 60, 180), "brown": (120, 70, 20),
        "black": (10, 12, 20), "white": (250, 250, 245), "grey": (120, 125, 120),
    }  # fmt: skip
    found = hue_labels(np.array([list(corners.values())], np.uint8))[0]
    assert [COLOURS[n] for n in found] == list(corners)
    assert set(corners) == set(COLOURS)


def test_missing_stamps_say_where_to_get_them(tmp_path):
    needs("skimage")
    with pytest.raises(ValueError, match=r"no stamps of bird.*tuxpaint-stamps-default"):
        ComposedConcepts(3, stamps=tmp_path)
    for place in OBJECTS.values():
        pixels = np.zeros((30, 20, 4), np.uint8)
        pixels[5:25, 5:15] = (200, 30, 30, 255)
        save(tmp_path / place / "a.png", pixels)
    sample = ComposedConcepts(3, stamps=tmp_path)[1]
    assert {"red"} == {COLOURS[n - 11] for n in sample.masks[1][sample.masks[1] > 0].tolist()}


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures(texture):
    if texture in PHOTOGRAPHED:
        needs("skimage")
    assert (texture in PHOTOGRAPHED) != (texture in DRAWN)
    for seed in range(3):
        one, same = (ground(texture, 96, np.random.RandomState(seed)) for _ in range(2))
        assert one.shape == (96, 96, 3)
        assert one.dtype == np.uint8
        assert np.array_equal(one, same)
        # Grey enough to be of no colour, and not flat.
        assert one.astype(int).std((0, 1)).min() > 10
        assert not np.array_equal(one, ground(texture, 96, np.random.RandomState(seed + 9)))
    assert ground(texture, 700, np.random.RandomState(0)).shape == (700, 700, 3)


def test_what_is_on_an_image_without_opening_it(tmp_path):
    write_broden(tmp_path, 6)
    source = open_concepts(f"broden:{tmp_path}", image_size=IMAGE)
    whole = ConceptImages(source)[1, 5]
    (tmp_path / "images/im/002.png").unlink()
    (tmp_path / "images/im/003_object.png").unlink()
    bare = ConceptImages(source, pixels=False)[1, 5]
    assert not bare.images.any()
    assert list(bare.failed) == [2]
    for at in (0, 1, 3):
        layers = len(source.annotations(1 + at)[0])
        assert torch.equal(bare.masks[at, :layers], whole.masks[at, :layers])
    assert torch.equal(bare.labels[3], whole.labels[3])
    with pytest.raises(ImageError, match=r"^index\.csv row 5: im/003_object\.png: FileNotFound"):
        source.annotations(3)
    with pytest.raises(IndexError, match="expected 0 to 5, got 6"):
        source.annotations(6)
