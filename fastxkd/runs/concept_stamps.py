"""A concept set out of picture stamps on textures: real cut-outs in a synthetic composition.

The stamps are Tux Paint's (Debian package ``tuxpaint-stamps-default``, GPL-2): pictures with an
alpha channel that stay on the machine they are installed on. The textures are those of textures.py.
"""

from __future__ import annotations

import hashlib
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastxkd._extras import require
from fastxkd.metrics.concept_scores import Concepts
from fastxkd.ops._checks import check_choice, check_counts
from fastxkd.runs.concept_data import CONCEPT_SPECS, ConceptSource, at_size, stacked
from fastxkd.runs.pictures import open_image
from fastxkd.runs.sources import Settings
from fastxkd.runs.textures import TEXTURES, ground

if TYPE_CHECKING:
    from PIL.Image import Image

STAMPS = Path("/usr/share/tuxpaint/stamps")
OBJECTS = {
    "bird": "animals/birds",
    "flower": "plants/flowers",
    "fruit": "food/fruit",
    "insect": "animals/insects",
    "mammal": "animals/mammals",
    "road sign": "town/roadsigns",
    "sea animal": "animals/fish",
    "tool": "household/tools",
    "vegetable": "food/vegetables",
    "vehicle": "vehicles",
}
_NO_PHOTOGRAPHS = {"cartoon", "toys"}
# Where a hue begins, in degrees; what comes before the first is red as well.
_HUES = ((15, "orange"), (45, "yellow"), (70, "green"), (165, "cyan"), (195, "blue"),
         (260, "purple"), (300, "pink"), (345, "red"))  # fmt: skip
COLOURS = ("black", "grey", "white", "brown", "red", *(name for _, name in _HUES[:-1]))
_DARK, _PALE, _LIGHT, _BROWN = 0.2, 0.18, 0.8, 0.6
TextureLabels = Literal["pixels", "image"]


class ComposedConcepts(ConceptSource):
    """Stamps pasted on textures: image ``i`` follows from ``seed`` and ``i`` alone.

    Objects are labelled by the stamp's folder where its alpha exceeds a half, textures on what is
    left of the background, colours by hue on the objects. The classes, of which a model can be
    trained to tell the first object, are as frequent as one another: ``targets``.

    Args:
        count: images.
        seed: of everything that is drawn.
        stamps: folder of the stamps; None: ``$FASTXKD_STAMPS``, else where Debian puts them.
        mask_size: side of the masks.
        objects: stamps per image.
        texture_labels: ``"pixels"``, or ``"image"``: a label of the whole image, as Broden has for
            textures; which of the two an own set should have is a matter of interpretation.

    Raises:
        ValueError: no stamps, numbers that are none.
        ImportError: Pillow or scikit-image is missing.

    ``cutouts`` has the stamps' paths, a list for each class.

    What counts as a photograph, the edges between hues and the drawn textures are choices of this
    library: numbers on this set compare with one another, not with published ones.
    """

    def __init__(
        self,
        count: int = 600,
        *,
        seed: int = 0,
        stamps: str | os.PathLike[str] | None = None,
        mask_size: int = 112,
        objects: int = 1,
        texture_labels: TextureLabels = "pixels",
        settings: Settings | None = None,
    ) -> None:
        check_counts(count=count, mask_size=mask_size, objects=objects)
        check_choice("texture_labels", texture_labels, get_args(TextureLabels))
        require("PIL.Image", extra="concepts")
        require("skimage.data", extra="concepts")
        self.root = Path(stamps or os.environ.get("FASTXKD_STAMPS") or STAMPS).expanduser()
        self.seed, self.objects, self.texture_labels = seed, objects, texture_labels
        self.cutouts = [stamps_below(self.root / place) for place in OBJECTS.values()]
        missing = [n for n, found in zip(OBJECTS, self.cutouts, strict=True) if not found]
        if missing:
            raise ValueError(
                f"stamps: no stamps of {missing[0]} in {self.root / OBJECTS[missing[0]]}; get them"
                " with 'apt-get install tuxpaint-stamps-default', or set FASTXKD_STAMPS"
            )
        sizes = (len(OBJECTS), len(COLOURS), len(TEXTURES))
        concepts = Concepts(
            ("", *OBJECTS, *COLOURS, *TEXTURES),
            ("object", "color", "texture"),
            (0, *(place for place, size in enumerate(sizes) for _ in range(size))),
        )
        self._first_colour = 1 + len(OBJECTS)
        self._first_texture = self._first_colour + len(COLOURS)
        super().__init__(
            f"composed:{count}@{seed}",
            count,
            concepts,
            (mask_size, mask_size),
            settings or Settings(),
            classes=list(OBJECTS),
            allow_empty=True,
        )

    @property
    def targets(self) -> np.ndarray[Any, Any]:
        """int64 [count]: the class of each image, an index into ``classes``."""
        return np.arange(len(self)) % len(OBJECTS)

    def _concepts(self, index: int) -> tuple[Tensor, Tensor, list[int]]:
        random = np.random.RandomState([self.seed & 0xFFFFFFFF, index])
        side = self.shape[1]
        texture = random.randint(len(TEXTURES))
        image_module = require("PIL.Image", extra="concepts")
        picture = image_module.fromarray(ground(TEXTURES[texture], side, random))
        things = np.zeros((side, side), np.int32)
        kind = index % len(OBJECTS)
        for _ in range(self.objects):
            found = self.cutouts[kind]
            stamp = _resized(_stamp(found[random.randint(len(found))]), side, random)
            x, y = (random.randint(side - length + 1) for length in stamp.size)
            alpha = stamp.getchannel("A")
            picture.paste(stamp, (x, y), alpha)
            part = things[y : y + stamp.height, x : x + stamp.width]
            part[np.asarray(alpha) > 127] = kind + 1
            kind = random.randint(len(OBJECTS))
        pixels = np.array(picture)
        colours = np.where(things > 0, self._first_colour + hue_labels(pixels), 0)
        layers = [things, colours]
        labels: list[int] = []
        if self.texture_labels == "pixels":
            layers.append(np.where(things == 0, self._first_texture + texture, 0))
        else:
            labels = [self._first_texture + texture]
        masks = stacked([at_size(layer, self.mask_size) for layer in layers], self.mask_size)
        if self.shape[0] == 1:
            return torch.from_numpy(np.array(picture.convert("L")))[None], masks, labels
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), masks, labels

    def _annotations(self, index: int) -> tuple[Tensor, list[int]]:
        _, masks, labels = self._concepts(index)
        return masks, labels

    def describe(self) -> dict[str, Any]:
        found = [
            f"{path.relative_to(self.root)} {path.stat().st_size}"
            for paths in self.cutouts
            for path in paths
        ]
        return {
            **super().describe(),
            "seed": self.seed,
            "objects": self.objects,
            "texture_labels": self.texture_labels,
            "stamps": len(found),
            "fingerprint": hashlib.sha256("\n".join(found).encode()).hexdigest(),
        }


def open_composed(
    spec: str, rest: str, settings: Settings, size: int | None = None
) -> ComposedConcepts:
    """``composed[:COUNT[@SEED]]``."""
    match = re.fullmatch(r"(?:composed:)?(\d{1,9})(?:@(\d{1,9}))?", rest or "600")
    if match is None:
        raise ValueError(f"data: expected {CONCEPT_SPECS}, got {spec!r}")
    count, seed = int(match[1]), int(match[2] or 0)
    return ComposedConcepts(count, seed=seed, mask_size=size or 112, settings=settings)


def hue_labels(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """uint8 [h, w, 3] to indices into ``COLOURS``, int64 [h, w].

    >>> [COLOURS[i] for i in hue_labels(np.array([[[250, 9, 9], [0, 0, 90], [90, 90, 90]]]))[0]]
    ['red', 'blue', 'grey']
    """
    rgb = np.asarray(pixels, np.float64) / 255
    value, low = rgb.max(2), rgb.min(2)
    spread = np.where(value > low, value - low, 1.0)
    r, g, b = np.moveaxis(rgb, 2, 0)
    later = np.where(value == g, 2 + (b - r) / spread, 4 + (r - g) / spread)
    hue = np.where(value == r, (g - b) / spread, later)
    degrees = (60 * hue) % 360
    edges = [start for start, _ in _HUES]
    names = [COLOURS.index(name) for name in ("red", *(name for _, name in _HUES))]
    found = np.array(names)[np.searchsorted(edges, degrees, side="right")]
    found[(found == COLOURS.index("orange")) & (value < _BROWN)] = COLOURS.index("brown")
    pale = (value - low) <= _PALE * value
    found[pale] = np.where(value[pale] > _LIGHT, COLOURS.index("white"), COLOURS.index("grey"))
    found[value < _DARK] = COLOURS.index("black")
    return found.astype(np.int64)


def stamps_below(folder: Path) -> list[Path]:
    """The photographs among the stamps of a folder and of those in it."""
    return sorted(path for path in folder.rglob("*.png") if not _NO_PHOTOGRAPHS & set(path.parts))


@lru_cache(maxsize=64)
def _stamp(path: Path) -> Image:
    """RGBA, without the transparent margin."""
    with open_image(path) as image:
        stamp = image.convert("RGBA")
    box = stamp.getchannel("A").getbbox()
    return stamp.crop(box) if box else stamp


def _resized(stamp: Image, side: int, random: np.random.RandomState) -> Image:
    """Its longer side 0.4 to 0.85 of the image's; one in two mirrored."""
    image_module = require("PIL.Image", extra="concepts")
    scale = random.uniform(0.4, 0.85) * side / max(stamp.size)
    size = [min(side, max(1, round(scale * length))) for length in stamp.size]
    stamp = stamp.resize((size[0], size[1]), image_module.Resampling.LANCZOS)
    return stamp.transpose(image_module.Transpose.FLIP_LEFT_RIGHT) if random.randint(2) else stamp
