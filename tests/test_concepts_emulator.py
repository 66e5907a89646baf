"""The CUDA kernels of concepts, run on the CPU by the emulator of csrc/emulator/simt.h: the tests
of tests/test_concepts.py by the way that a tensor of a GPU takes, and the kernels by their
addresses. Every number is an integer and has to be equal."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastxkd.ops import _library
from fastxkd.ops import concepts as op
from fastxkd.ops.concepts import concept_tally, label_areas, unit_counts
from fastxkd.reference import concepts as reference
from tests import test_concepts, test_emulator
from tests.test_cam import LAYOUTS
from tests.test_concepts import KINDS, LABELS, SHAPES, case, check

emulator = test_emulator.emulator
either = test_emulator.either
module = test_emulator.module

DTYPES, GUARD = test_emulator.DTYPES, test_emulator.GUARD
MASK_DTYPES = [torch.uint8, torch.int16, torch.int32]
INF, NAN = float("inf"), float("nan")


def as_on_a_gpu(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "serve", lambda operator, tensor: "cuda")
    monkeypatch.setattr(op, "cuda_kernels", lambda tensor: (module, 0, 0))


@pytest.fixture
def gpu(emulator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The operators on the emulated device, in both orders of the warps."""
    as_on_a_gpu(emulator, monkeypatch)
    return emulator


@pytest.fixture
def gpu_either(either: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    as_on_a_gpu(either, monkeypatch)
    return either


# --- the operators


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("shape", "layers", "size"), SHAPES, ids=str)
def test_tallies(shape: tuple[int, ...], layers: int, size: tuple[int, int]) -> None:
    check(case(shape, layers, size))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    check(case((2, 6, 7, 7), 2, (28, 40), dtype, mask_dtype))


@pytest.mark.usefixtures("gpu_either")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_strides(layout: str) -> None:
    test_concepts.test_layouts("cuda", layout)


SAME: dict[str, Callable[[str], None]] = {
    name.removeprefix("test_"): getattr(test_concepts, name)
    for name in (
        "test_expanded",
        "test_positions_that_fall_on_one_another",
        "test_a_map_with_nan_has_no_mask",
        "test_infinite_activations_are_very_large",
        "test_thresholds_that_are_no_number",
        "test_thresholds_of_more_digits_than_the_maps",
        "test_repeats",
        "test_category_under_the_mask_only",
        "test_image_labels_alone",
        "test_one_layer_without_its_dimension",
        "test_no_images",
        "test_many_labels",
        "test_autocast_changes_nothing",
        "test_no_gradient",
    )
}


@pytest.mark.usefixtures("gpu_either")
@pytest.mark.parametrize("name", SAME)
def test_as_on_the_cpu(name: str) -> None:
    SAME[name]("cuda")


@pytest.mark.usefixtures("gpu_either")
@pytest.mark.parametrize("size", [(16, 16), (7, 9), (31, 23), (3, 3), (2, 5)], ids=str)
@pytest.mark.parametrize("value", [0.1, 1 / 3, -0.7, 1e-30])
def test_plateaus_are_not_above_their_own_value(size: tuple[int, int], value: float) -> None:
    test_concepts.test_plateaus_are_not_above_their_own_value("cuda", size, value)


def test_thresholds_that_are_values_of_the_maps(gpu: ModuleType) -> None:
    """Quantiles are values that the maps have; and of values that the up-sampled ones have, some
    would be above themselves if a product and a sum were rounded at once."""
    for dtype in DTYPES:
        activations, _, *rest = case((2, 20, 7, 7), 1, (50, 45), dtype)
        exact = activations.to(torch.float64 if dtype == torch.float64 else torch.float32)
        rows = exact.movedim(1, 0).flatten(1)
        pixels = reference.upsampled(exact, (50, 45))[0]
        for thresholds in (rows.quantile(0.9, 1, interpolation="higher"), pixels[:, 21, 13]):
            check((activations, thresholds, *rest))


@pytest.mark.parametrize("count", [1, 63, 64, 65, 150])
def test_many_categories(gpu: ModuleType, count: int) -> None:
    """More than a word has bits: further launches, which add no intersection twice."""
    activations, thresholds, _, _, _ = case((2, 4, 5, 5), 0, (1, 1))
    categories = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randperm(count)])
    masks = torch.randint(0, count + 1, (2, 2, 9, 40), dtype=torch.int16)
    labels = torch.randint(0, count + 1, (2, 2))
    found = concept_tally(activations, thresholds, masks, labels, categories, category_count=count)
    expected = reference.concepts(activations, thresholds, masks, labels, categories, count)
    assert all(map(torch.equal, found, expected))


@pytest.mark.usefixtures("gpu_either")
def test_unknown_labels_and_categories_are_passed_over() -> None:
    activations, thresholds, masks, labels, categories = case(
        (3, 4, 7, 7), 2, (20, 33), mask_dtype=torch.int32
    )
    spoiled, given = masks.clone(), torch.cat([labels, labels[:, :2]], 1)
    where = torch.rand(masks.shape) < 0.3
    spoiled[where] = 0
    given[:, 3:] = 0
    expected = reference.concepts(activations, thresholds, spoiled, given, categories, KINDS)
    areas = reference.label_areas(spoiled, given, LABELS)
    spoiled[where] = (
        torch.tensor([-1, LABELS, 2**31 - 1, -(2**31)]).int().repeat(9999)[: int(where.sum())]
    )
    given[:, 3], given[:, 4] = LABELS, -(2**62)
    given[1, 3] = 2**32 + 1
    found = concept_tally(activations, thresholds, spoiled, given, categories, category_count=KINDS)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(label_areas(spoiled, given, LABELS), areas)


def test_images_in_portions(gpu: ModuleType) -> None:
    """Labels are written down of one image after the other, and of eight and then three."""
    for size, portion in (((12, 50), 1), ((4, 30), 8)):
        arguments = case((11, 3, 4, 4), 1, size)
        rooms = [
            gpu.concepts_workspace([n, 3, 4, 4, 1, *size, 3, LABELS, KINDS])
            for n in (1, portion, portion + 1, 10**6)
        ]
        assert rooms[1] == rooms[2] == rooms[3] == portion * rooms[0]
        check(arguments)


def test_blocks_that_take_turns(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(module, monkeypatch)
    arguments = case((2, 90, 3, 3), 2, (6, 35))
    x, low = torch.randn(4, 90, 5, 5), torch.full((90,), -(2**31))
    counted = torch.zeros(90, 2**11 + 1, dtype=torch.int64)
    reference.unit_counts(x, low, 21, 11, counted)
    try:
        for processors in (1, 3, 64):
            for reversed_ in (False, True):
                module.set_device(processors, reversed_)
                check(arguments)
                counts = torch.zeros_like(counted)
                unit_counts(x, low, 21, 11, counts)
                assert torch.equal(counts, counted)
    finally:
        module.set_device(2, False)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
def test_unit_counts(dtype: torch.dtype, layout: str) -> None:
    test_concepts.test_unit_counts("cuda", dtype, layout)


@pytest.mark.usefixtures("gpu_either")
def test_the_host_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number goes from a tensor to Python; nor one the other way, whose copy would wait."""
    arguments = case((2, 5, 7, 7), 2, (20, 20))
    low, counts = torch.zeros(5, dtype=torch.int64), torch.zeros(5, 17, dtype=torch.int64)

    def refuse(*given: Any, **options: Any) -> Any:
        raise AssertionError("the host asks for a number")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, refuse)
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, refuse)
    for repeats in ("each", "once"):
        # As of a GPU, whose categories and keys nobody looks at: these are on the CPU.
        masks, labels = op._annotations(*arguments[2:4], None, arguments[0])
        if repeats == "once":
            masks, labels = op._once(masks, labels)
        torch.ops.fastxkd.concepts(*arguments[:2], masks, labels, arguments[4], KINDS)
        label_areas(*arguments[2:4], LABELS, repeats=repeats)
    torch.ops.fastxkd.unit_counts_(arguments[0], low, 27, 4, counts)


# --- the kernels by their addresses


def guarded(count: int) -> tuple[Tensor, Tensor]:
    """int64 zeros, and what they lie in."""
    whole = torch.full((count + 2 * GUARD,), 77)
    return whole, whole[GUARD : GUARD + count].zero_()


def untouched(whole: Tensor) -> bool:
    return bool((whole[:GUARD] == 77).all() and (whole[-GUARD:] == 77).all())


@pytest.mark.parametrize(("shape", "layers", "size"), SHAPES[1:8], ids=str)
def test_nothing_is_written_beside_the_results(
    emulator: ModuleType, shape: tuple[int, ...], layers: int, size: tuple[int, int]
) -> None:
    n, units, height, width = shape
    activations, thresholds, masks, labels, categories = case(shape, layers, size)  # type: ignore[arg-type]
    rows, down = reference.source_positions(height, size[0], torch.float32, masks.device)
    columns, along = reference.source_positions(width, size[1], torch.float32, masks.device)
    sizes = [*shape, layers, *size, 3, LABELS, KINDS]
    room = emulator.concepts_workspace(sizes)
    wholes, (tally, areas, scratch, of_labels, counts) = zip(
        *map(guarded, (units * LABELS, units * KINDS, room, LABELS, units * 5)), strict=True
    )
    tensors = [activations, thresholds, masks, labels, categories]
    tensors += [rows, down, columns, along, tally, areas]
    before = [t.clone() for t in tensors[:9]]
    strides = [activations.stride(0), activations.stride(1), 1]
    emulator.concepts(
        *(0, 0, scratch.data_ptr(), [t.data_ptr() for t in tensors], sizes, strides, 0, 0)
    )
    tensors = [masks, labels, of_labels]
    emulator.label_areas(*(0, 0, [t.data_ptr() for t in tensors], [n, layers, *size, 3, LABELS], 0))
    low = torch.zeros(units, dtype=torch.int64)
    tensors = [activations, low, counts]
    emulator.unit_counts(
        *(0, 0, [t.data_ptr() for t in tensors], [n, units, height * width, 28, 2], strides, 0)
    )
    assert all(map(untouched, wholes))
    given = (activations, thresholds, masks, labels, categories, rows, down, columns, along)
    assert all(map(torch.equal, given, before))
    expected = reference.concepts(*given[:5], KINDS)
    assert torch.equal(tally.view(units, LABELS), expected[0])
    assert torch.equal(areas.view(units, KINDS), expected[1])


def test_arguments_that_no_kernel_serves(either: ModuleType) -> None:
    sizes = [1, 1, 1, 1, 1, 1, 1, 1, 2, 1]
    for wrong, words in (
        ({5: 2**20 + 1}, "2\\^20 rows or columns"),
        ({2: 2**16, 3: 2**16}, "2\\^31 - 1 positions"),
        ({8: 2**31}, "2\\^31 - 1 labels"),
    ):
        changed = [wrong.get(i, size) for i, size in enumerate(sizes)]
        with pytest.raises(ValueError, match=words):
            either.concepts_workspace(changed)
        with pytest.raises(ValueError, match=words):
            either.concepts(0, 0, 0, [0] * 11, changed, [1, 1, 1], 0, 0)
    for dtype, mask_dtype, words in ((4, 0, "unknown dtype"), (0, 3, "unknown dtype of masks")):
        with pytest.raises(ValueError, match=words):
            either.concepts(0, 0, 0, [0] * 11, sizes, [1, 1, 1], dtype, mask_dtype)
    with pytest.raises(ValueError, match="expected ten sizes"):
        either.concepts_workspace(sizes[1:])
    with pytest.raises(ValueError, match="eleven tensors and three strides"):
        either.concepts(0, 0, 0, [0] * 10, sizes, [1, 1, 1], 0, 0)
    with pytest.raises(ValueError, match="three tensors and six sizes"):
        either.label_areas(0, 0, [0] * 3, sizes, 0)
    with pytest.raises(ValueError, match="unknown dtype of masks"):
        either.label_areas(0, 0, [0] * 3, sizes[:6], 3)
    with pytest.raises(ValueError, match="three tensors, five sizes"):
        either.unit_counts(0, 0, [0] * 3, sizes, [1, 1, 1], 0)
    for shift, bits in ((64, 1), (0, 25)):
        with pytest.raises(ValueError, match="at most 24 bits"):
            either.unit_counts(0, 0, [0] * 3, [1, 1, 1, shift, bits], [1, 1, 1], 0)


def test_they_have_kernels_on_a_gpu() -> None:
    assert "concepts" in _library.ON_GPU


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(test_emulator.SANITIZED, reason="runs under the sanitizers already")
def test_under_the_sanitizers() -> None:
    """What the kernels read and write out of bounds, which the numbers need not show."""
    chosen = "beside or serves or turns or portions or (forward and (tallies or unit_counts))"
    test_emulator.under_the_sanitizers(__file__, chosen)
