"""Make the built-in Fashion-MNIST subset: 2,000 training and 500 test images, class balanced.

    python scripts/make_fashion_mnist_subset.py [--root DIR] [--out FILE] [--check]

The source is the four IDX files of Fashion-MNIST, for example from Debian's package
``dataset-fashion-mnist``. Choice and order of the images depend on a fixed seed only, and the
archive carries no time stamps, so the same zlib gives the same bytes; another zlib may pack
differently, but the digest of the pixels and labels printed at the end is the same everywhere.
``--check`` compares with the committed file and writes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import zipfile
from pathlib import Path

import numpy as np

from fastxkd.runs.data import BUILTIN_FILE, FASHION_MNIST_DIRECTORY, read_idx_pair

PER_CLASS = {"train": 200, "test": 50}
SEED = 20170825


def balanced(labels: np.ndarray, per_class: int, random: np.random.RandomState) -> np.ndarray:
    chosen = [
        random.permutation(np.flatnonzero(labels == label))[:per_class]
        for label in np.unique(labels)
    ]
    return random.permutation(np.concatenate(chosen))


def subset(root: Path) -> dict[str, np.ndarray]:
    # RandomState, not default_rng: numpy promises that its stream never changes.
    random = np.random.RandomState(SEED)
    arrays: dict[str, np.ndarray] = {}
    for split in ("train", "test"):
        images, labels = read_idx_pair(root, split)
        keep = balanced(labels, PER_CLASS[split], random)
        arrays[f"{split}_images"] = images[keep]
        arrays[f"{split}_labels"] = labels[keep].astype(np.uint8)
    return arrays


def packed(arrays: dict[str, np.ndarray]) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), version=(1, 0))
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            file.writestr(entry, member.getvalue(), zipfile.ZIP_DEFLATED, 9)
    return archive.getvalue()


def digest(arrays: dict[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return total.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=FASHION_MNIST_DIRECTORY)
    parser.add_argument("--out", type=Path, default=BUILTIN_FILE)
    parser.add_argument("--check", action="store_true", help="compare with the file, write nothing")
    options = parser.parse_args()

    arrays = subset(options.root)
    content = packed(arrays)
    print(f"pixels and labels sha256 {digest(arrays)}")
    if options.check:
        with np.load(options.out) as stored:
            same = digest({name: stored[name] for name in stored.files}) == digest(arrays)
        identical = options.out.read_bytes() == content
        print(f"{options.out}: same content: {same}, same bytes: {identical}")
        return 0 if same else 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(content)
    print(f"{options.out}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
