"""Compose picture stamps into a folder of classes that ``imagefolder:`` reads.

    python scripts/make_stamps_folder.py /usr/share/tuxpaint/stamps OUT --count 64

ROOT holds Tux Paint's stamps (Debian package ``tuxpaint-stamps-default``, GPL-2): cut-outs with an
alpha channel. Each is pasted into the middle of a square, on white or on a plain noisy background,
and written to OUT/<category>/<name>.png. The pictures stay on your machine; they are real cut-outs
in a synthetic composition.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from fastxkd.runs.concept_stamps import OBJECTS, stamps_below


def chosen(root: Path, count: int, seed: int) -> list[tuple[str, Path]]:
    """``count`` stamps, as evenly over the categories as they allow."""
    random = np.random.RandomState(seed)
    pools = {}
    for category, place in OBJECTS.items():
        found = stamps_below(root / place)
        pools[category] = [found[at] for at in random.permutation(len(found))]
    picked: list[tuple[str, Path]] = []
    while len(picked) < count and any(pools.values()):
        for category, pool in pools.items():
            if pool and len(picked) < count:
                picked.append((category, pool.pop()))
    return picked


def composed(path: Path, size: int, textured: bool, random: np.random.RandomState) -> Image.Image:
    stamp = Image.open(path).convert("RGBA")
    box = stamp.getbbox()
    stamp = stamp.crop(box) if box else stamp
    scale = 0.8 * size / max(stamp.size)
    width, height = (max(1, round(scale * side)) for side in stamp.size)
    stamp = stamp.resize((width, height), Image.Resampling.LANCZOS)
    ground = np.full((size, size, 3), 255.0)
    if textured:
        # Noise of several grain sizes around a random colour.
        ground[:] = random.uniform(80, 200, 3)
        for grain in (2, 8, 32):
            small = random.normal(0, 14, (size // grain + 1, size // grain + 1, 1))
            ground += small.repeat(grain, 0).repeat(grain, 1)[:size, :size]
    picture = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    picture.paste(stamp, ((size - width) // 2, (size - height) // 2), stamp.getchannel("A"))
    return picture


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="folder of the stamps")
    parser.add_argument("out", type=Path, help="new folder to write")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--background", choices=["white", "texture"], default="white")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"{options.out} is not empty")
    picked = chosen(options.root, options.count, options.seed)
    if not picked:
        parser.error(f"no stamps below {options.root}; apt-get install tuxpaint-stamps-default")
    random = np.random.RandomState(options.seed)
    for category, path in picked:
        folder = options.out / category
        folder.mkdir(parents=True, exist_ok=True)
        picture = composed(path, options.size, options.background == "texture", random)
        picture.save(folder / path.name)
    print(
        f"{options.out}: {len(picked)} pictures in {len({name for name, _ in picked})} categories"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
