"""concepts against a loop over images and units: every number is an integer and has to be equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastxkd.ops import _library
from fastxkd.ops.concepts import concept_tally, label_areas, unit_counts, unit_values
from tests import oracles
from tests.conftest import needs
from tests.test_cam import LAYOUTS

LABELS = 9  # 0 among them
KINDS = 3
BUILT = pytest.mark.skipif(not _library.isa_levels(), reason="needs the C++ kernels")

# (n, units, h, w), layers, (H, W)
SHAPES = [
    ((3, 5, 7, 7), 1, (112, 112)),
    ((2, 70, 7, 7), 2, (28, 28)),
    ((1, 1, 1, 1), 1, (1, 1)),
    ((2, 3, 1, 1), 2, (5, 17)),
    ((2, 4, 3, 5), 3, (31, 67)),
    ((2, 4, 14, 13), 1, (7, 6)),  # a size smaller than the map
    ((3, 6, 4, 9), 1, (1, 1)),
    ((2, 2, 1, 6), 1, (33, 130)),
    ((4, 9, 5, 1), 2, (64, 64)),
    ((2, 3, 9, 9), 0, (20, 20)),  # image-level labels alone
    ((2, 3, 5, 4), 1, (5, 4)),  # as large as the map
    ((2, 3, 3, 70), 2, (9, 200)),  # positions and pixels of several words
]


def annotated(n: int, layers: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Patches of labels, and single pixels."""
    if layers == 0:
        return torch.zeros(n, 0, *size, dtype=dtype)
    coarse = torch.randint(0, LABELS, (n, layers, 3, 4)).double()
    masks = F.interpolate(coarse, size, mode="nearest")
    single = torch.rand(masks.shape) < 0.1
    masks[single] = torch.randint(0, LABELS, (int(single.sum()),)).double()
    return masks.to(dtype)


def case(
    shape: tuple[int, ...],
    layers: int,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    mask_dtype: torch.dtype = torch.uint8,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    activations = torch.randn(shape).to(dtype)
    thresholds = torch.rand(shape[1]).to(torch.float64 if dtype == torch.float64 else torch.float32)
    labels = torch.randint(0, LABELS, (shape[0], 3)) * (torch.rand(shape[0], 3) < 0.4)
    categories = torch.randint(0, KINDS, (LABELS,))
    return (
        activations,
        thresholds,
        annotated(shape[0], layers, size, mask_dtype),
        labels,
        (categories),
    )


def looped(arguments: tuple[Tensor, ...], dtype: Any = None, **resize: Any) -> tuple[Tensor, ...]:
    activations = arguments[0]
    if dtype is None:
        dtype = np.float64 if activations.dtype == torch.float64 else np.float32
    arrays: list[Any] = [*(x.numpy() for x in arguments[1:]), KINDS]
    maps = activations.double().numpy().astype(dtype)
    return tuple(map(torch.from_numpy, oracles.concept_tallies(maps, *arrays, **resize)))


def check(arguments: tuple[Tensor, ...], expected: tuple[Tensor, ...] | None = None) -> None:
    expected = looped(arguments) if expected is None else expected
    found = concept_tally(*arguments, category_count=KINDS)
    assert found.intersections.dtype == found.areas.dtype == torch.int64
    assert torch.equal(found.intersections, expected[0])
    assert torch.equal(found.areas, expected[1])
    areas = label_areas(arguments[2], arguments[3], LABELS)
    assert areas.dtype == torch.int64
    assert torch.equal(areas, expected[2])


@pytest.mark.parametrize(("shape", "layers", "size"), SHAPES, ids=str)
def test_tallies(backend: str, shape: tuple[int, ...], layers: int, size: tuple[int, int]) -> None:
    arguments = case(shape, layers, size)
    expected = looped(arguments)
    check(arguments, expected)
    # In float64 nothing is so near to a threshold that rounding would decide.
    assert all(map(torch.equal, expected, looped(arguments, np.float64)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.int16, torch.int32], ids=str)
def test_dtypes(backend: str, dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    check(case((2, 6, 7, 7), 2, (28, 30), dtype, mask_dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, layout: str) -> None:
    activations, *rest = case((3, 70, 6, 7), 2, (20, 33))
    thresholds, masks, labels, categories = rest
    masks = torch.stack([masks, masks + 1], -1)[..., 0]
    labels = torch.cat([labels, labels + 1], 1)[:, :3]
    categories = torch.stack([categories, categories], 1)[:, 0]
    thresholds = thresholds.flip(0).repeat_interleave(2)[::2]
    check((LAYOUTS[layout](activations), thresholds, masks, labels, categories))


def test_expanded(backend: str) -> None:
    activations, thresholds, masks, labels, categories = case((3, 4, 7, 7), 1, (16, 16))
    check((activations[:, :1].expand(3, 4, 7, 7), thresholds, masks, labels, categories))
    check((activations[..., :1, :1].expand(3, 4, 7, 7), thresholds, masks, labels, categories))
    check((activations, thresholds[:1].expand(4), masks[:1].expand(3, 1, 16, 16), labels[:1].expand(
        3, 3), categories))  # fmt: skip


@pytest.mark.parametrize("size", [(112, 112), (56, 30), (10, 45)], ids=str)
def test_opencv(backend: str, size: tuple[int, int]) -> None:
    """Thresholds, tallies, scores and winning labels of the published procedure."""
    from fastxkd.ops.quantiles import exact_quantiles

    cv2 = needs("cv2")
    activations, _, masks, labels, categories = case((12, 8, 7, 7), 2, size)
    activations = activations.clamp(min=0)
    thresholds = exact_quantiles(lambda: activations.split(5), 0.9)
    rows = activations.double().movedim(1, 0).flatten(1).numpy()
    assert np.array_equal(thresholds.numpy(), np.quantile(rows, 0.9, axis=1))

    def resize(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return cv2.resize(plane, size[::-1], interpolation=cv2.INTER_LINEAR)  # type: ignore[no-any-return]

    arguments = activations, thresholds, masks, labels, categories
    expected = looped(arguments, resize=resize)
    check(arguments, expected)
    found = [*concept_tally(*arguments, category_count=KINDS), label_areas(masks, labels, LABELS)]
    scores = [i / (a[:, categories] + total - i + 1e-10) for i, a, total in (found, list(expected))]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-6)
    assert torch.equal(scores[0].argmax(1), scores[1].argmax(1))


def test_torch_interpolation(backend: str) -> None:
    activations, thresholds, masks, _, categories = case((4, 6, 7, 7), 1, (112, 112))
    up = F.interpolate(activations, (112, 112), mode="bilinear", align_corners=False)
    above = up > thresholds[:, None, None]
    found = concept_tally(activations, thresholds, masks, None, categories)
    for label in range(1, LABELS):
        expected = (above & (masks == label)).sum((0, 2, 3))
        assert torch.equal(found.intersections[:, label], expected)


@pytest.mark.parametrize("size", [(16, 16), (7, 9), (31, 23), (3, 3), (2, 5)], ids=str)
@pytest.mark.parametrize("value", [0.1, 1 / 3, -0.7, 1e-30])
def test_plateaus_are_not_above_their_own_value(
    backend: str, size: tuple[int, int], value: float
) -> None:
    maps = torch.full((1, 2, 5, 6), value)
    maps[0, 1, 2, 3] += abs(value)
    masks = torch.ones(1, 1, *size, dtype=torch.uint8)
    found = concept_tally(maps, maps[0, 0, :1, 0].expand(2), masks, None, torch.tensor([0, 0]))
    _, expected, _ = oracles.concept_tallies(
        maps.numpy(),
        maps[0, :, 0, 0].numpy(),
        masks.numpy(),
        np.zeros((1, 0), int),
        np.array([0, 0]),
        1,
    )
    assert found.intersections[0].tolist() == [0, 0]
    assert found.areas.tolist() == expected.tolist()
    # What lies on the plateau alone is equal to it: only neighbours of the bump are above.
    at = F.interpolate(maps.double(), size, mode="bilinear")[0, 1]
    assert found.areas[1, 0] == (at > maps[0, 0, 0, 0].double() + 1e-9 * abs(value)).sum()


def test_positions_that_fall_on_one_another(backend: str) -> None:
    """An odd ratio: every third pixel is a position, exactly, and none of them above its value."""
    maps = torch.randn(1, 1, 7, 7)
    masks = torch.zeros(1, 1, 21, 21, dtype=torch.uint8)
    masks[0, 0, 1::3, 1::3] = torch.arange(1, 50).view(7, 7)
    for value in maps.flatten():
        found = concept_tally(maps, value[None], masks, None, torch.zeros(50, dtype=torch.int64))
        assert torch.equal(found.intersections[0, 1:], (maps.flatten() > value).long())


def test_a_map_with_nan_has_no_mask(backend: str) -> None:
    activations, *rest = case((3, 5, 7, 7), 1, (28, 28))
    activations[0, 1, 3, 4] = activations[2, 0, 6, 6] = torch.nan
    masks, labels = rest[1].clone(), rest[2].clone()
    check((activations, *rest))
    # Only that unit in that image has lost its mask.
    whole = concept_tally(activations, *rest)
    parts = [
        concept_tally(activations[i : i + 1], rest[0], masks[i : i + 1], labels[i : i + 1], rest[3],
                      category_count=KINDS)
        for i in range(3)
    ]  # fmt: skip
    assert not parts[0].areas[1].any()
    assert parts[0].areas[[0, 2, 3, 4]].any()
    assert torch.equal(whole.intersections, torch.stack([p.intersections for p in parts]).sum(0))


def test_infinite_activations_are_very_large(backend: str) -> None:
    maps = torch.zeros(1, 3, 3, 3)
    maps[0, 0, 1, 1] = torch.inf
    maps[0, 1, 1, 1], maps[0, 1, 0, 0] = -torch.inf, 1
    maps[0, 2] = torch.inf
    masks = torch.ones(1, 1, 9, 9, dtype=torch.uint8)
    found = concept_tally(maps, torch.full((3,), 0.5), masks, None, torch.tensor([0, 0]))
    large = maps.clamp(-1e30, 1e30).double()
    expected = (F.interpolate(large, (9, 9), mode="bilinear") > 0.5).sum((0, 2, 3))
    assert expected[2] == 81
    assert torch.equal(found.areas[:, 0], expected)


def test_thresholds_that_are_no_number(backend: str) -> None:
    activations, _, masks, _, categories = case((2, 4, 7, 7), 1, (28, 28))
    thresholds = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.2])
    masks = masks.clamp(min=1)
    found = concept_tally(activations, thresholds, masks, None, categories)
    assert not found.intersections[:2].any()
    assert not found.areas[:2].any()
    assert found.intersections[2].sum() == masks.numel()
    assert 0 < found.intersections[3].sum() < masks.numel()


def test_thresholds_of_more_digits_than_the_maps(backend: str) -> None:
    """Strictly above in float64, though both are the same number in float32."""
    one = np.float32(0.1)
    maps = torch.full((1, 3, 2, 2), float(one))
    thresholds = torch.tensor([one, one, one], dtype=torch.float64)
    thresholds += torch.tensor([0, -1e-12, 1e-12], dtype=torch.float64)
    masks = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    found = concept_tally(maps, thresholds, masks, None, torch.tensor([0, 0]))
    assert found.areas[:, 0].tolist() == [0, 16, 0]


def test_repeats(backend: str) -> None:
    """Of two pixels one has label 1 in both layers; label 2 is the image's, given twice, too."""
    maps = torch.ones(1, 1, 1, 2)
    masks = torch.tensor([[[[1, 2]], [[1, 3]]]], dtype=torch.int16)
    labels, categories = torch.tensor([[2, 0, 2]]), torch.tensor([0, 0, 1, 1])
    arguments = maps, torch.zeros(1), masks, labels, categories
    each, once = (concept_tally(*arguments, repeats=how) for how in ("each", "once"))  # type: ignore[arg-type]
    assert each.intersections.tolist() == [[0, 2, 5, 1]]
    assert once.intersections.tolist() == [[0, 1, 2, 1]]
    assert each.areas.tolist() == once.areas.tolist() == [[2, 2]]
    assert label_areas(masks, labels, 4).tolist() == [0, 2, 5, 1]
    assert label_areas(masks, labels, 4, repeats="once").tolist() == [0, 1, 2, 1]
    assert masks.tolist() == [[[[1, 2]], [[1, 3]]]]


def test_category_under_the_mask_only(backend: str) -> None:
    """The area of a category is of images that have it under the mask, not of all of its images."""
    maps = torch.tensor([[[[0.0, 0, 0, 1]]], [[[0.0, 0, 0, 1]]]])
    masks = torch.tensor([[[[1, 1, 0, 2]]], [[[1, 1, 2, 0]]]], dtype=torch.uint8)
    labels = torch.tensor([[0], [3]])
    found = concept_tally(maps, torch.tensor([0.5]), masks, labels, torch.tensor([0, 0, 1, 2]))
    assert found.intersections.tolist() == [[0, 0, 1, 1]]
    assert found.areas.tolist() == [[0, 1, 1]]


def test_image_labels_alone(backend: str) -> None:
    activations, thresholds, _, labels, categories = case((4, 5, 7, 7), 0, (30, 31))
    found = concept_tally(
        activations, thresholds, None, labels.int(), categories, size=(30, 31), category_count=KINDS
    )
    none = torch.zeros(4, 0, 30, 31, dtype=torch.uint8)
    expected = looped((activations, thresholds, none, labels, categories))
    assert torch.equal(found.intersections, expected[0])
    assert torch.equal(found.areas, expected[1])
    assert torch.equal(label_areas(None, labels, LABELS, size=(30, 31)), expected[2])


def test_one_layer_without_its_dimension(backend: str) -> None:
    arguments = case((2, 3, 7, 7), 1, (12, 12))
    found = concept_tally(*arguments[:2], arguments[2][:, 0], *arguments[3:])
    assert torch.equal(found.intersections, concept_tally(*arguments).intersections)


def test_no_images(backend: str) -> None:
    arguments = case((2, 5, 7, 7), 2, (28, 28))
    none = [arguments[0][:0], arguments[1], arguments[2][:0], arguments[3][:0], arguments[4]]
    found = concept_tally(*none, category_count=KINDS)  # type: ignore[arg-type]
    assert found.intersections.shape == (5, LABELS)
    assert found.areas.shape == (5, KINDS)
    assert not found.intersections.any()
    assert not found.areas.any()
    assert not label_areas(none[2], none[3], LABELS).any()


def test_many_labels(backend: str) -> None:
    """A label of its own for every pixel, and labels that no byte holds."""
    maps = torch.randn(2, 3, 5, 5)
    masks = torch.randperm(5000)[: 2 * 2 * 30 * 31].view(2, 2, 30, 31).to(torch.int16)
    categories = torch.zeros(5000, dtype=torch.int64)
    found = concept_tally(maps, torch.zeros(3), masks, None, categories)
    expected = oracles.concept_tallies(
        maps.numpy(), np.zeros(3, np.float32), masks.numpy(), np.zeros((2, 0), int),
        categories.numpy(), 1,
    )  # fmt: skip
    assert torch.equal(found.intersections, torch.from_numpy(expected[0]))
    assert torch.equal(found.areas, torch.from_numpy(expected[1]))


@BUILT
@pytest.mark.parametrize("n", [1, 3, 40])
def test_threads_change_nothing(n: int) -> None:
    arguments = case((n, 90, 14, 14), 1, (56, 56))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            with _library.use_backend("cpu"):
                areas = label_areas(arguments[2], arguments[3], LABELS)
                found.append([*concept_tally(*arguments, category_count=KINDS), areas])
    finally:
        torch.set_num_threads(before)
    with _library.use_backend("reference"):
        areas = label_areas(arguments[2], arguments[3], LABELS)
        found.append([*concept_tally(*arguments, category_count=KINDS), areas])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_autocast_changes_nothing(backend: str) -> None:
    arguments = case((2, 5, 7, 7), 1, (64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        check(arguments)


def test_no_gradient(backend: str) -> None:
    activations, *rest = case((2, 5, 7, 7), 1, (28, 28))
    found = concept_tally(activations.requires_grad_(), *rest)
    assert not found.intersections.requires_grad


@pytest.mark.parametrize("where", ["masks", "labels"])
@pytest.mark.parametrize("wrong", [LABELS, -1, 30000])
def test_unknown_labels_name_their_image(backend: str, where: str, wrong: int) -> None:
    arguments = list(case((5, 3, 7, 7), 2, (28, 28), mask_dtype=torch.int16))
    given = arguments[2][:, 1, 27] if where == "masks" else arguments[3]
    given[3, 2] = given[4, 1] = wrong
    words = f"{where}: expected labels from 0 to 8, got {wrong} in image 3"
    with pytest.raises(ValueError, match=words):
        concept_tally(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words):
        label_areas(arguments[2], arguments[3], LABELS)


GOOD: dict[str, Any] = {
    "activations": torch.zeros(2, 3, 4, 4),
    "thresholds": torch.zeros(3),
    "masks": torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
    "labels": torch.zeros(2, 2, dtype=torch.int64),
    "categories": torch.zeros(5, dtype=torch.int64),
}
WRONG = [
    ({"activations": [1]}, TypeError, "activations: expected a Tensor, got list"),
    ({"activations": torch.zeros(2, 3, 4, 4).int()}, TypeError, "activations: .* floating-point"),
    ({"activations": torch.zeros(2, 3)}, ValueError, r"activations: .* got shape \[2, 3\]"),
    ({"thresholds": torch.zeros(4)}, ValueError, r"thresholds: expected \[3\], .* got \[4\]"),
    ({"thresholds": torch.zeros(3).int()}, TypeError, "thresholds: expected a floating-point"),
    ({"masks": torch.zeros(2, 1, 8, 8)}, TypeError, "masks: expected uint8, int16 or int32, got"),
    ({"masks": 1}, TypeError, "masks: expected a Tensor or None, got int"),
    ({"masks": GOOD["masks"][:1]}, ValueError, "masks: expected 2 images as in activations"),
    ({"masks": GOOD["masks"][0, 0]}, ValueError, r"masks: expected \[n, layers"),
    ({"masks": None}, ValueError, r"size: expected \(height, width\), since there are no masks"),
    ({"size": (8, 9)}, ValueError, r"masks: expected size \(8, 9\), got \(8, 8\)"),
    ({"size": (8,)}, ValueError, r"size: expected \(height, width\) of at least 1, got \(8,\)"),
    ({"labels": torch.zeros(2)}, ValueError, "labels: expected|labels: expected integers"),
    ({"labels": torch.zeros(2, 1)}, TypeError, "labels: expected integers, got torch.float32"),
    ({"labels": torch.zeros(3, 1).long()}, ValueError, "labels: expected 2 images as in"),
    ({"labels": torch.zeros(2).long()}, ValueError, r"labels: expected \[n, count\]"),
    ({"categories": [0]}, TypeError, "categories: expected a Tensor, got list"),
    ({"categories": torch.zeros(5)}, TypeError, "categories: expected torch.int64"),
    ({"categories": torch.zeros(5, 1).long()}, ValueError, r"categories: expected \[labels\]"),
    ({"categories": torch.tensor([0, -1])}, ValueError, "categories: expected .* got -1"),
    ({"category_count": 0}, ValueError, "category_count: expected at least 1"),
    ({"categories": torch.tensor([0, 3]), "category_count": 3}, ValueError,
     "categories: expected numbers from 0 to 2, got 3"),
    ({"repeats": "never"}, ValueError, "repeats: expected one of each, once, got 'never'"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "words"), WRONG, ids=[str(w[2])[:40] for w in WRONG])
def test_wrong_arguments(wrong: dict[str, Any], error: type[Exception], words: str) -> None:
    given = GOOD | wrong
    positional = [given.pop(name) for name in GOOD]
    with pytest.raises((error, TypeError) if "|" in words else error, match=words):
        concept_tally(*positional, **given)


def test_nothing_to_count() -> None:
    with pytest.raises(ValueError, match="masks, labels: expected at least one of them"):
        label_areas(None, None, 3)
    with pytest.raises(ValueError, match="labels: expected 2 images as in masks"):
        label_areas(GOOD["masks"], torch.zeros(3, 1).long(), 3)


def test_the_operators_are_good_citizens() -> None:
    activations, thresholds, masks, labels, categories = case((2, 3, 4, 4), 1, (8, 8))
    torch.library.opcheck(
        torch.ops.fastxkd.concepts, (activations, thresholds, masks, labels, categories, KINDS)
    )
    torch.library.opcheck(torch.ops.fastxkd.label_areas, (masks, labels, LABELS))
    low, counts = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 17, dtype=torch.int64)
    torch.library.opcheck(torch.ops.fastxkd.unit_counts_, (activations, low, 27, 4, counts))
    torch.library.opcheck(
        torch.ops.fastxkd.unit_values_, (activations, low, low + 2**30, counts, low.clone())
    )


def test_compiled() -> None:
    arguments = case((3, 5, 7, 7), 2, (28, 28))

    def both(*given: Tensor) -> tuple[Tensor, ...]:
        tally = concept_tally(*given, category_count=KINDS, repeats="once")
        return (
            tally.intersections,
            tally.areas,
            label_areas(given[2], given[3], LABELS, repeats="once"),
        )

    call = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, call(*arguments), both(*arguments)))

    def counted(x: Tensor, low: Tensor) -> Tensor:
        counts = x.new_zeros((x.shape[1], 2**11 + 1), dtype=torch.int64)
        unit_counts(x, low, 21, 11, counts)
        return counts

    low = torch.full((5,), -(2**31))
    count = torch.compile(counted, fullgraph=True, backend="aot_eager")
    assert torch.equal(count(arguments[0], low), counted(arguments[0], low))


# --- unit_counts


def number_keys(x: Tensor) -> np.ndarray:
    """Signed integers in the order of the numbers: sign and magnitude of the bits, -0 as -1."""
    kind = {2: np.int16, 4: np.int32, 8: np.int64}[x.element_size()]
    bits = x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    magnitude = bits.numpy() & np.iinfo(kind).max
    return np.where(bits.numpy() < 0, -1 - magnitude.astype(np.int64), magnitude)  # type: ignore[no-any-return]


def counted_in_numpy(x: Tensor, low: Tensor, shift: int, bits: int) -> Tensor:
    counts = np.zeros((x.shape[1], 2**bits + 1), np.int64)
    for unit in range(x.shape[1]):
        values = x[:, unit].flatten()
        counts[unit, -1] = int(values.isnan().sum())
        for key in number_keys(values[~values.isnan()]).tolist():
            step = (key - int(low[unit])) >> shift  # Python's integers have no end
            if 0 <= step < 2**bits:
                counts[unit, step] += 1
    return torch.from_numpy(counts)


SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1.0, -1.0, 1e-44, 3e38, -3e38]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
def test_unit_counts(backend: str, dtype: torch.dtype, layout: str) -> None:
    x = torch.randn(4, 11, 7, 6)
    x[:, 3] = x[:, 3].clamp(min=0)
    x[0, :, 0] = torch.tensor(SPECIAL)[:, None]
    x = LAYOUTS[layout](x.to(dtype))
    width = 8 * x.element_size()
    keys = torch.from_numpy(number_keys(x[1, :, 2, 3]))
    for low, shift, bits in [
        (torch.full((11,), -(2 ** (width - 1))), width - 8, 8),
        (torch.full((11,), -(2 ** (width - 1))), width - 11, 11),
        (keys - 1000, 0, 11),
        (keys, width - 6, 7),
        (torch.full((11,), 2 ** (width - 1) - 1), 0, 1),
    ]:
        low = low.clamp(-(2 ** (width - 1)), 2 ** (width - 1) - 1)
        counts = torch.ones(11, 2**bits + 1, dtype=torch.int64)
        unit_counts(x, low, shift, bits, counts)
        assert torch.equal(counts - 1, counted_in_numpy(x, low, shift, bits)), (shift, bits)


@pytest.mark.parametrize("positions", [1, 15, 31, 33, 63, 255, 257, 300, 513])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_positions_of_any_number(backend: str, dtype: torch.dtype, positions: int) -> None:
    """Long rows are read where they lie, short ones and ends with others; zeros are apart."""
    x = torch.randn(5, 3, 1, positions).clamp(min=0).to(dtype)
    x[1, 0, 0, -1], x[2, 1, 0, -1], x[:, 2, 0, 0] = torch.nan, -0.0, 0
    width = 8 * x.element_size()
    for start in (-(2 ** (width - 1)), -1, 0, 1, 2 ** (width - 2)):
        low = torch.full((3,), start)
        counts = torch.zeros(3, 2**6 + 1, dtype=torch.int64)
        unit_counts(x, low, width - 7, 6, counts)
        assert torch.equal(counts, counted_in_numpy(x, low, width - 7, 6)), start
        high = low.clamp(max=2 ** (width - 1) - 2 ** (width - 2)) + 2 ** (width - 2) - 1
        keys, found = torch.empty(3, x[:, 0].numel(), dtype=torch.int64), low * 0
        unit_values(x, low, high, keys, found)
        for unit in range(3):
            values = x[:, unit].flatten()
            expected = number_keys(values[~values.isnan()])
            expected = expected[(expected >= int(low[unit])) & (expected <= int(high[unit]))]
            assert sorted(keys[unit, : int(found[unit])].tolist()) == sorted(expected.tolist())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
def test_unit_values(backend: str, dtype: torch.dtype, layout: str) -> None:
    x = torch.randn(7, 11, 7, 6)
    x[0, :, 0] = torch.tensor(SPECIAL)[:, None]
    x = LAYOUTS[layout](x.to(dtype))
    width = 8 * x.element_size()
    largest, middle = 2 ** (width - 1) - 1, torch.from_numpy(number_keys(x[1, :, 2, 3]))
    low = torch.stack([middle, torch.full_like(middle, -largest - 1), middle * 0])
    high = torch.stack([torch.full_like(middle, largest), middle, middle * 0])
    low[0, 3], high[0, 3] = 1, 0  # not this unit
    for least, most in zip(low, high, strict=True):
        keys, found = torch.full((11, 60), -7), torch.full((11,), 2)
        for batch in x.split(3):
            unit_values(batch, least, most, keys, found)
        for unit in range(11):
            values = x[:, unit].flatten()
            expected = number_keys(values[~values.isnan()])
            expected = expected[(expected >= int(least[unit])) & (expected <= int(most[unit]))]
            assert found[unit] == 2 + len(expected)
            kept = keys[unit, 2 : int(found[unit])]
            assert keys[unit, :2].tolist() == [-7, -7]
            assert set(kept.tolist()) <= set(expected.tolist())
            if len(expected) <= 58:
                assert sorted(kept.tolist()) == sorted(expected.tolist())
            else:
                assert len(kept) == 58


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"low": torch.full((3,), 2**31)}, ValueError, "low: expected keys of torch.float32"),
        ({"high": torch.zeros(2).long()}, ValueError, r"high: expected \[3\], got \[2\]"),
        ({"keys": torch.zeros(3).long()}, ValueError, r"keys: expected \[3, 1\], got \[3\]"),
        ({"keys": torch.zeros(3, 5)}, TypeError, "keys: expected torch.int64, got torch.float32"),
        ({"keys": torch.zeros(5, 3).long().T}, ValueError, "keys: expected a contiguous tensor"),
        ({"found": None}, TypeError, "found: expected a Tensor, got NoneType"),
    ],
    ids=str,
)
def test_unit_values_of_wrong_arguments(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    whole = {"low": (3,), "high": (3,), "keys": (3, 5), "found": (3,)}
    given: dict[str, Any] = {k: torch.zeros(s, dtype=torch.int64) for k, s in whole.items()}
    with pytest.raises(error, match=words):
        unit_values(torch.zeros(2, 3, 4, 4), **(given | change))


@BUILT
def test_unit_counts_on_threads() -> None:
    x, low = torch.randn(50, 70, 7, 7), torch.full((70,), -(2**31))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            counts = torch.zeros(70, 2**11 + 1, dtype=torch.int64)
            unit_counts(x, low, 21, 11, counts)
            found.append(counts)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert (found[0].sum(1) == 50 * 49).all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"shift": 32}, ValueError, "shift, bits: expected 0 <= shift < 32"),
        ({"bits": 0}, ValueError, "shift, bits: expected"),
        ({"bits": 25}, ValueError, "shift, bits: expected .* 1 <= bits <= 24"),
        ({"low": [0]}, TypeError, "low: expected a Tensor, got list"),
        ({"low": torch.zeros(3)}, TypeError, "low: expected torch.int64, got torch.float32"),
        ({"low": torch.zeros(2).long()}, ValueError, r"low: expected \[3\], got \[2\]"),
        ({"low": torch.full((3,), 2**31)}, ValueError, "low: expected keys of torch.float32"),
        ({"counts": torch.zeros(3, 4).long()}, ValueError, r"counts: expected \[3, 5\], got"),
        ({"counts": torch.zeros(5, 3).long().T}, ValueError, "counts: expected a contiguous"),
        ({"activations": torch.zeros(2, 3)}, ValueError, "activations: expected spatial maps"),
    ],
    ids=str,
)
def test_unit_counts_of_wrong_arguments(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    given: dict[str, Any] = {
        "activations": torch.zeros(2, 3, 4, 4),
        "low": torch.zeros(3, dtype=torch.int64),
        "shift": 20,
        "bits": 2,
        "counts": torch.zeros(3, 5, dtype=torch.int64),
    }
    with pytest.raises(error, match=words):
        unit_counts(**(given | change))
