"""Image data for a run: where it lies, how it is split, and batches that never change.

A batch is a function of (seed, epoch, position) alone. Workers, restarts and the order in which
batches are asked for change nothing, which is what makes a resumed run end with the same weights.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastxkd.runs.names import printable

BUILTIN_FILE = Path(__file__).resolve().parent.parent / "assets" / "fashion_mnist_subset.npz"
FASHION_MNIST_DIRECTORY = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SPECS = "'builtin', 'fashion-mnist[:ROOT]' or 'imagefolder:ROOT'"
# (x - 127) / 128 on pixels 0..255: zero-centred, about [-1, 1], the same for every channel.
DEFAULT_MEAN, DEFAULT_STD = (127 / 255,), (128 / 255,)
_LONGEST_REASON = 300
_LARGEST_IDX = 1 << 30


class Batch(NamedTuple):
    """images uint8 [m, C, H, W]; labels int64 [m]; indices int64 [m] into the split."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    errors: list[tuple[str, str]]


def random_bits(seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    """64 well-mixed bits for every (seed, epoch, index): SplitMix64 over the three."""
    with np.errstate(over="ignore"):
        state = np.full(len(indices), seed & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
        for word in (np.uint64(epoch), indices.astype(np.uint64)):
            state = state + np.uint64(0x9E3779B97F4A7C15) * (word + np.uint64(1))
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def normalize(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
) -> Tensor:
    """uint8 [m, C, H, W] to float32 ``(x / 255 - mean) / std`` on ``device``."""
    pixels = images.to(device, non_blocking=True).float()
    shift = torch.tensor(mean, device=pixels.device).view(1, -1, 1, 1) * 255
    scale = torch.tensor(std, device=pixels.device).view(1, -1, 1, 1) * 255
    return (pixels - shift) / scale


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 [m, C, H, W] to uint8 [m, C, size, size]: bilinear, antialiased."""
    resized = F.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def why(error: Exception) -> str:
    """One line that says what went wrong and is the same wherever and whenever it does.

    >>> why(OSError(2, "No such file or directory", "/data/a.png"))
    'FileNotFoundError: No such file or directory'
    """
    text = str(getattr(error, "strerror", None) or error)
    # Addresses in the text of an object differ from process to process.
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(text.split()))
    kind = type(error).__name__
    return f"{kind}: {printable(text)[:_LONGEST_REASON]}" if text else kind


def augment(images: Tensor, indices: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Shift by up to 7 % of the side (edges repeated) and mirror one image in two.

    Args:
        images: uint8 [m, C, H, W].
        indices: int64 [m]; with ``seed`` and ``epoch`` the only source of randomness.

    Returns:
        uint8 [m, C, H, W], a new tensor.
    """
    count, _, height, width = images.shape
    bits = random_bits(seed, epoch, indices.numpy())
    reach_y, reach_x = max(1, round(0.07 * height)), max(1, round(0.07 * width))
    shift_y = (bits & np.uint64(0xFFFF)) % np.uint64(2 * reach_y + 1)
    shift_x = ((bits >> np.uint64(16)) & np.uint64(0xFFFF)) % np.uint64(2 * reach_x + 1)
    mirrored = torch.from_numpy(((bits >> np.uint64(32)) & np.uint64(1)).astype(np.int64))[:, None]

    row_shift = torch.from_numpy(shift_y.astype(np.int64))[:, None] - reach_y
    column_shift = torch.from_numpy(shift_x.astype(np.int64))[:, None] - reach_x
    rows = (torch.arange(height) + row_shift).clamp_(0, height - 1)
    columns = (torch.arange(width) + column_shift).clamp_(0, width - 1)
    columns = torch.where(mirrored == 1, width - 1 - columns, columns)
    which = torch.arange(count)[:, None, None]
    # Advanced indices around the channel slice put the channels last: [m, H, W, C].
    return images[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class Split:
    """Labelled images that can be asked for by index, in memory or on disk."""

    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def _read(self, index: int) -> Tensor:
        raise NotImplementedError

    def name(self, index: int) -> str:
        raise NotImplementedError

    def load(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The images at ``indices``; unreadable ones are left out and named in ``errors``."""
        images, kept, errors = [], [], []
        for index in map(int, indices):
            try:
                images.append(self._read(index))
                kept.append(index)
            # A decoder may raise anything on a damaged file; none of it may end a run.
            except Exception as error:
                errors.append((self.name(index), why(error)))
        positions = torch.tensor(kept, dtype=torch.int64)
        pixels = torch.stack(images) if images else torch.empty(0, 1, 1, 1, dtype=torch.uint8)
        return Batch(pixels, torch.from_numpy(self.labels[positions.numpy()]), positions, errors)


class ArraySplit(Split):
    """Images held in memory: uint8 [n, C, H, W]."""

    def __init__(self, images: Tensor, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels.astype(np.int64)

    def name(self, index: int) -> str:
        return f"image {index}"

    def load(self, indices: Sequence[int] | np.ndarray) -> Batch:
        positions = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        labels = torch.from_numpy(self.labels[positions.numpy()])
        return Batch(self.images[positions], labels, positions, [])


@dataclass
class ImageData:
    """A data set ready for a run.

    Attributes:
        train: training images; None when the data was loaded for evaluation only.
        test: held-out images.
        mean, std: per-channel normalisation on pixels scaled to [0, 1].
        notice: where the images come from and how they were split, for reports.
        skipped: path -> reason of every image that could not be read so far.
    """

    spec: str
    classes: list[str]
    train: Split | None
    test: Split
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notice: str
    skipped: dict[str, str] = field(default_factory=dict)

    def normalize(self, images: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """uint8 [m, C, H, W] to float32 ``(x / 255 - mean) / std`` on ``device``."""
        return normalize(images, self.mean, self.std, device)

    def batches(
        self, split: Split, batch_size: int, indices: np.ndarray | None = None
    ) -> Iterator[Batch]:
        """Batches in order without augmentation; unreadable images are recorded and left out."""
        order = np.arange(len(split)) if indices is None else indices
        for start in range(0, len(order), batch_size):
            batch = split.load(order[start : start + batch_size])
            self.skipped.update(batch.errors)
            if len(batch.labels):
                yield batch

    def settings(self) -> dict[str, object]:
        """What must be equal for two runs to see the same numbers."""
        return {
            "data": self.spec,
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "train_images": 0 if self.train is None else len(self.train),
        }


class TrainBatches(torch.utils.data.Dataset[Batch]):
    """Shuffled, augmented batches of ``data.train``, numbered from the first step of training.

    Each epoch is a seeded permutation; images left over by the batch size wait for the next epoch.
    """

    def __init__(
        self,
        data: ImageData,
        *,
        batch_size: int,
        seed: int,
        augmented: bool = True,
        workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if data.train is None:
            raise ValueError(f"data: {data.spec!r} was loaded without training images")
        if batch_size < 2:
            raise ValueError(f"batch_size: expected at least 2, got {batch_size}")
        if workers < 0:
            raise ValueError(f"workers: expected 0 or more, got {workers}")
        self.data, self.split, self.seed = data, data.train, seed
        self.batch_size = min(batch_size, len(self.split))
        self.augmented, self.workers, self.device = augmented, workers, device
        self.steps_per_epoch = len(self.split) // self.batch_size

    def __getitem__(self, step: int) -> Batch:
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.random.RandomState([self.seed & 0xFFFFFFFF, epoch]).permutation(len(self.split))
        batch = self.split.load(order[position * self.batch_size :][: self.batch_size])
        if not self.augmented or not len(batch.labels):
            return batch
        moved = augment(batch.images, batch.indices, seed=self.seed, epoch=epoch)
        return batch._replace(images=moved)

    def __len__(self) -> int:
        return self.steps_per_epoch

    def iterate(self, first: int, last: int) -> Iterator[tuple[Tensor, ...]]:
        """Normalised images and labels of the steps ``first .. last - 1``, on the device."""
        for batch in self._source(first, last):
            self.data.skipped.update(batch.errors)
            labels = batch.labels.to(self.device, non_blocking=True)
            yield self.data.normalize(batch.images, self.device), labels

    def _source(self, first: int, last: int) -> Iterator[Batch]:
        if not self.workers:
            return (self[step] for step in range(first, last))
        loader: torch.utils.data.DataLoader[Batch] = torch.utils.data.DataLoader(
            self,
            batch_size=None,
            sampler=range(first, last),
            num_workers=self.workers,
            pin_memory=torch.device(self.device).type == "cuda",
            # Its own generator: drawing worker seeds from the global one would shift dropout.
            generator=torch.Generator(),
        )
        return iter(loader)


def load_data(
    spec: str,
    *,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    held_out: float = 0.2,
    seed: int = 0,
) -> ImageData:
    """Open a data set.

    Args:
        spec: ``builtin`` (2,000 + 500 images of Fashion-MNIST that come with the package),
            ``fashion-mnist[:ROOT]`` (IDX files, looked for in ROOT, ``$FASTXKD_FASHION_MNIST``,
            ``/usr/share/datasets/fashion-mnist``) or ``imagefolder:ROOT`` (``ROOT/CLASS/**`` or
            ``ROOT/train/CLASS/**`` with ``ROOT/val`` or ``ROOT/test``).
        image_size: side in pixels; default 28 for Fashion-MNIST, 224 for folders.
        mean, std: one number or one per channel, for pixels in [0, 1]; default 127/255, 128/255.
        held_out: share of every class that a folder without its own test images sets aside; with
            0 nothing is set aside, all images are test images and there is nothing to train on.
        seed: of that choice.

    Raises:
        ValueError: unknown spec, missing files, fewer than two classes, no images.
    """
    kind, _, root = spec.partition(":")
    if image_size is not None and image_size < 8:
        raise ValueError(f"image_size: expected at least 8, got {image_size}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out: expected a share in [0, 1), got {held_out}")
    if spec == "builtin":
        data = _builtin(spec, image_size)
    elif kind == "fashion-mnist":
        data = _fashion_mnist(spec, root, image_size)
    elif kind == "imagefolder" and root:
        from fastxkd.runs.folders import load_folder

        data = load_folder(spec, Path(root).expanduser(), image_size or 224, held_out, seed)
    else:
        raise ValueError(f"data: expected {SPECS}, got {spec!r}")
    data.mean = per_channel("mean", mean, DEFAULT_MEAN, data.channels)
    data.std = per_channel("std", std, DEFAULT_STD, data.channels)
    if min(data.std) <= 0:
        raise ValueError(f"std: expected positive numbers, got {list(data.std)}")
    return data


def per_channel(
    name: str, values: Sequence[float] | None, default: tuple[float, ...], channels: int
) -> tuple[float, ...]:
    given = tuple(float(value) for value in (default if values is None else values))
    if len(given) not in (1, channels):
        raise ValueError(f"{name}: expected 1 or {channels} numbers, got {len(given)}")
    return given if len(given) == channels else given * channels


def read_builtin(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, H, W] and labels [n] of one split of the subset in the package."""
    with np.load(BUILTIN_FILE) as arrays:
        return arrays[f"{split}_images"], arrays[f"{split}_labels"]


def _builtin(spec: str, image_size: int | None) -> ImageData:
    train, test = (_array_split(*read_builtin(split), image_size) for split in ("train", "test"))
    notice = (
        "Fashion-MNIST (Zalando SE, MIT licence), class-balanced subset that comes with fastxkd: "
        f"{len(train):,} training and {len(test):,} test images."
    )
    return _fashion(spec, train, test, image_size, notice)


def _fashion(
    spec: str, train: Split, test: Split, image_size: int | None, notice: str
) -> ImageData:
    classes = list(FASHION_MNIST_CLASSES)
    return ImageData(
        spec, classes, train, test, 1, image_size or 28, DEFAULT_MEAN, DEFAULT_STD, notice
    )


def fashion_mnist_folder(root: str) -> Path:
    """Where the IDX files are looked for: ``root``, the environment, the Debian package."""
    wanted = root or os.environ.get("FASTXKD_FASHION_MNIST") or str(FASHION_MNIST_DIRECTORY)
    return Path(wanted).expanduser()


def _fashion_mnist(spec: str, root: str, image_size: int | None) -> ImageData:
    folder = fashion_mnist_folder(root)
    train = _array_split(*read_idx_pair(folder, "train"), image_size)
    test = _array_split(*read_idx_pair(folder, "test"), image_size)
    notice = (
        f"Fashion-MNIST (Zalando SE, MIT licence): {len(train):,} training and {len(test):,} "
        "test images."
    )
    return _fashion(spec, train, test, image_size, notice)


def _array_split(images: np.ndarray, labels: np.ndarray, image_size: int | None) -> ArraySplit:
    pixels = torch.from_numpy(images)[:, None]
    if image_size is not None and image_size != pixels.shape[-1]:
        pixels = torch.cat([resize(part, image_size) for part in pixels.split(1024)])
    return ArraySplit(pixels, labels)


def read_idx_pair(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, H, W] and labels [n] of one split of an IDX data set, gzipped or not."""
    stem = {"train": "train", "test": "t10k"}[split]
    images = _read_idx(folder, f"{stem}-images-idx3-ubyte", 3)
    labels = _read_idx(folder, f"{stem}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise ValueError(f"data: {folder} has {len(images)} {split} images, {len(labels)} labels")
    return images, labels


def _read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    packed, plain = folder / f"{name}.gz", folder / name
    if not packed.is_file() and not plain.is_file():
        raise ValueError(
            f"data: no {name}[.gz] in {folder}; get Fashion-MNIST with 'apt-get install "
            "dataset-fashion-mnist' or from github.com/zalandoresearch/fashion-mnist, and point "
            "fashion-mnist:ROOT or $FASTXKD_FASHION_MNIST at the folder"
        )
    path = packed if packed.is_file() else plain
    try:
        with gzip.open(path) if path is packed else path.open("rb") as file:
            magic, *shape = struct.unpack(f">{dimensions + 1}I", file.read(4 * (dimensions + 1)))
            if magic != 0x0800 + dimensions:
                raise ValueError(f"magic number {magic:#x}, expected {0x0800 + dimensions:#x}")
            size = math.prod(shape)
            if size > _LARGEST_IDX:
                raise ValueError(f"{size:,} values, expected at most {_LARGEST_IDX:,}")
            # No more than the header promises: a small packed file can unpack to any size.
            content = file.read(size + 1)
        return np.frombuffer(content, dtype=np.uint8).reshape(shape).copy()
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"data: {path} is not a readable IDX file ({error})") from error
