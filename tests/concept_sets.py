"""Small concept data sets on the disk, whole and broken."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import needs

SIZE = 12  # of masks
IMAGE = 24
# number, name, {category: coverage}
LABELS = (
    (1, "cat", {"object": 4.5}),
    (2, "red", {"color": 2.0}),
    (3, "painted", {"color": 0.5, "object": 3.0}),
    (5, "grass", {"texture": 7.0}),
    (6, "both", {"object": 1.0, "color": 1.0}),
    (700, "rare", {"object": 0.1}),
)
CATEGORIES = ("object", "color", "texture")
HEADER = ("image", "split", "ih", "iw", "sh", "sw", *CATEGORIES)


def colours(mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """As Broden stores labels: R + 256 G, and B means nothing."""
    mask = np.asarray(mask)
    return np.stack([mask % 256, mask // 256, np.full_like(mask, 77)], 2).astype(np.uint8)


def save(path: Path, pixels: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    needs("PIL.Image").fromarray(pixels).save(path)


def table(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def write_broden_tables(root: Path) -> None:
    """Everything but index.csv and images."""
    root.mkdir(parents=True, exist_ok=True)
    table(
        root / "category.csv",
        ("name", "first", "last", "count", "frequency"),
        [(name, 1, 700, 3, 10) for name in CATEGORIES],
    )
    table(
        root / "label.csv",
        ("number", "name", "category", "frequency", "coverage", "syns"),
        [
            (number, name, ";".join(f"{c}(9)" for c in covered), 9, 1.0, "")
            for number, name, covered in LABELS
        ],
    )
    for category in CATEGORIES:
        rows = [(n, name, c[category]) for n, name, c in LABELS if category in c]
        table(
            root / f"c_{category}.csv",
            ("code", "number", "name", "frequency", "coverage"),
            [(code, n, name, 9, cover) for code, (n, name, cover) in enumerate(rows, 1)],
        )


def write_index(root: Path, rows: Sequence[Sequence[Any]]) -> None:
    table(root / "index.csv", HEADER, rows)


def row(image: str, object: str = "", color: str = "", texture: str = "", **changes: Any) -> list:
    """A row of index.csv."""
    fixed = {"split": "train", "ih": IMAGE, "iw": IMAGE, "sh": SIZE, "sw": SIZE, **changes}
    return [image, *(fixed[name] for name in HEADER[1:6]), object, color, texture]


def write_broden(root: Path, count: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """A data set with masks in one and two layers and labels of whole images; what is in it."""
    random = np.random.RandomState(seed)
    write_broden_tables(root)
    rows, content = [], []
    for i in range(count):
        pixels = random.randint(0, 256, (IMAGE, IMAGE, 3)).astype(np.uint8)
        things = random.choice([0, 0, 1, 3, 6, 700], (SIZE // 3, SIZE // 3))
        things = things.repeat(3, 0).repeat(3, 1)
        shades = [random.choice([0, 2, 3], (SIZE, SIZE)) for _ in range(i % 3)]
        pixels[..., 0] = np.where((things == 1).repeat(2, 0).repeat(2, 1), 250, pixels[..., 0])
        save(root / "images" / f"im/{i:03d}.png", pixels)
        save(root / "images" / f"im/{i:03d}_object.png", colours(things))
        for j, shade in enumerate(shades):
            save(root / "images" / f"im/{i:03d}_color_{j}.png", colours(shade))
        labels = [5] if i % 4 == 0 else []
        rows.append(
            row(
                f"im/{i:03d}.png",
                f"im/{i:03d}_object.png",
                ";".join(f"im/{i:03d}_color_{j}.png" for j in range(len(shades))),
                ";".join(map(str, labels)),
                split="train" if i % 5 else "val",
            )
        )
        content.append({"image": pixels, "masks": [things, *shades], "labels": labels})
    write_index(root, rows)
    return content
