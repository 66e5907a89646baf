"""The Triton kernels of concepts, by the operators around them; how, says tests/test_triton.py.
Every number is an integer and has to be equal."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import needs
from tests.test_distance_triton import DEVICES, judge, verdicts
from tests.test_triton import Guards

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASK_DTYPES = (torch.uint8, torch.int16, torch.int32)
DEVICE = "cpu"
CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__.removeprefix("_").replace("_", " ")] = function
    return function


# --- from here on it is the other process that runs


def guarded(call: Callable[[], Any]) -> Any:
    """With every buffer of the call between guards."""
    guards, zeros = Guards(), torch.zeros

    def empty(*shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        size = shape[0] if len(shape) == 1 else shape
        return guards.empty((size,) if isinstance(size, int) else size, dtype=dtype, device=device)

    torch.empty = empty  # type: ignore[assignment]
    torch.zeros = lambda *shape, **how: empty(*shape, **how).zero_()  # type: ignore[assignment]
    try:
        found = call()
    finally:
        torch.empty, torch.zeros = guards.real, zeros
    guards.check()
    return found


def there(arguments: tuple[Tensor, ...]) -> list[Tensor]:
    return [x.to(DEVICE) for x in arguments]


def check(arguments: tuple[Tensor, ...]) -> None:
    """Tallies and areas, against a loop over images and units."""
    from fastxkd.ops.concepts import concept_tally, label_areas
    from tests import test_concepts

    expected = test_concepts.looped(arguments)
    moved = there(arguments)
    found = guarded(lambda: concept_tally(*moved, category_count=test_concepts.KINDS))  # type: ignore[arg-type]
    areas = guarded(lambda: label_areas(moved[2], moved[3], len(arguments[4])))
    for name, one, other in zip(
        ("intersections", "areas", "label areas"), (*found, areas), expected, strict=True
    ):
        assert torch.equal(one.cpu(), other), name


def made(*given: Any) -> tuple[Tensor, ...]:
    from tests import test_concepts

    return test_concepts.case(*given)


def _matches(
    shape: tuple[int, ...],
    layers: int,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    mask_dtype: torch.dtype = torch.uint8,
) -> None:
    check(made(shape, layers, size, dtype, mask_dtype))


# Several blocks of units and of pixels; maps of one position, one row or one column; a size smaller
# than the map; image-level labels alone.
for _shape, _layers, _size in (
    ((2, 70, 7, 7), 2, (14, 15)),
    ((1, 1, 1, 1), 1, (1, 1)),
    ((2, 3, 1, 1), 2, (5, 17)),
    ((2, 4, 14, 13), 1, (7, 6)),
    ((2, 2, 1, 6), 1, (3, 130)),
    ((4, 9, 5, 1), 2, (16, 16)),
    ((2, 3, 9, 9), 0, (10, 10)),
    ((2, 3, 5, 4), 1, (5, 4)),
):
    CASES[f"{_shape}, {_layers} layers, {_size}"] = partial(_matches, _shape, _layers, _size)
for _dtype in DTYPES:
    for _mask in MASK_DTYPES:
        CASES[f"{str(_dtype)[6:]}, {str(_mask)[6:]}"] = partial(
            _matches, (2, 18, 7, 7), 2, (9, 11), _dtype, _mask
        )


@case
def _layouts() -> None:
    from tests.test_cam import LAYOUTS

    activations, *rest = made((3, 35, 6, 7), 1, (8, 9))
    for lay in LAYOUTS.values():
        check((lay(activations), *rest))


@case
def _values_that_are_no_numbers() -> None:
    activations, thresholds, *rest = made((2, 5, 7, 7), 1, (9, 12))
    activations[0, 1, 3, 4] = activations[1, 0, 6, 6] = torch.nan
    thresholds[3], thresholds[4] = torch.nan, torch.inf
    check((activations, thresholds, *rest))
    # An infinity is a very large number.
    large = activations.clone()
    activations[0, 2, 3, 3], activations[1, 2, 0, 0] = torch.inf, -torch.inf
    large[0, 2, 3, 3], large[1, 2, 0, 0] = 1e30, -1e30
    from fastxkd.ops.concepts import concept_tally

    moved = there((activations, large, thresholds, *rest))
    tallies = [concept_tally(x, *moved[2:]) for x in moved[:2]]
    assert all(map(torch.equal, *tallies))


@case
def _thresholds_that_are_values_of_the_maps() -> None:
    """Of the up-sampled ones some would be above themselves if a product and a sum were rounded
    at once."""
    from fastxkd.reference.concepts import upsampled

    for dtype in DTYPES:
        activations, _, *rest = made((2, 20, 7, 7), 1, (13, 11), dtype)
        exact = activations.to(torch.float64 if dtype == torch.float64 else torch.float32)
        rows = exact.movedim(1, 0).flatten(1)
        check((activations, rows.quantile(0.9, 1, interpolation="higher"), *rest))
        check((activations, upsampled(exact, (13, 11))[0, :, 7, 4], *rest))


@case
def _plateaus() -> None:
    from fastxkd.ops.concepts import concept_tally

    for value in (0.1, -0.7, 1e-30):
        maps = torch.full((1, 2, 5, 6), value)
        masks = torch.ones(1, 1, 16, 9, dtype=torch.uint8)
        thresholds, categories = torch.full((2,), value), torch.tensor([0, 0])
        found = concept_tally(*there((maps, thresholds, masks, masks[:, 0, 0, :0], categories)))  # type: ignore[arg-type]
        assert not found.areas.any()
        assert not found.intersections.any()


@case
def _more_labels_than_a_block_has() -> None:
    """A label of its own for every pixel, and more than one byte holds."""
    maps = torch.randn(2, 3, 5, 5)
    masks = torch.randperm(1500)[: 2 * 2 * 9 * 20].view(2, 2, 9, 20).to(torch.int16)
    labels = torch.tensor([[3, 0, 3], [1499, 1, 700]])
    categories = torch.randint(0, 3, (1500,))
    check((maps, torch.zeros(3), masks, labels, categories))


@case
def _labels_that_there_are_not_are_passed_over() -> None:
    from fastxkd.ops.concepts import concept_tally, label_areas
    from tests.test_concepts import KINDS, LABELS, looped

    activations, thresholds, masks, labels, categories = made(
        (2, 4, 7, 7), 2, (9, 12), torch.float32, torch.int32
    )
    where = torch.rand(masks.shape) < 0.3
    masks[where], labels[:, 1] = 0, 0
    expected = looped((activations, thresholds, masks, labels, categories))
    wrong = torch.tensor([-1, LABELS, 2**31 - 1, -(2**31)]).int().repeat(999)
    masks[where] = wrong[: int(where.sum())]
    labels[0, 1], labels[1, 1] = 2**32 + 1, -1
    moved = there((activations, thresholds, masks, labels, categories))
    found = guarded(lambda: concept_tally(*moved, category_count=KINDS))  # type: ignore[arg-type]
    areas = guarded(lambda: label_areas(moved[2], moved[3], LABELS))
    for one, other in zip((*found, areas), expected, strict=True):
        assert torch.equal(one.cpu(), other)


@case
def _nothing() -> None:
    from fastxkd.ops.concepts import concept_tally, label_areas, unit_counts

    given = there(made((2, 5, 7, 7), 2, (9, 9)))
    none = [given[0][:0], given[1], given[2][:0], given[3][:0], given[4]]
    assert not concept_tally(*none, category_count=3).areas.any()  # type: ignore[arg-type]
    assert not label_areas(none[2], none[3], 9).any()
    counts = torch.zeros(5, 17, dtype=torch.int64, device=DEVICE)
    unit_counts(none[0], torch.zeros(5, dtype=torch.int64, device=DEVICE), 20, 4, counts)
    assert not counts.any()


def _unit_counts(dtype: torch.dtype, layout: str) -> None:
    from fastxkd.ops.concepts import unit_counts
    from tests.test_cam import LAYOUTS
    from tests.test_concepts import SPECIAL, counted_in_numpy, number_keys

    x = torch.randn(3, 19, 7, 10)
    x[:, 3] = x[:, 3].clamp(min=0)
    x[0, :, 0, :] = torch.tensor(SPECIAL)[:10]
    x = LAYOUTS[layout](x.to(dtype))
    width = 8 * x.element_size()
    lowest = torch.full((19,), -(2 ** (width - 1)))
    keys = torch.from_numpy(number_keys(x[1, :, 2, 3]))
    for low, shift, bits in (
        (lowest, width - 11, 11),
        (lowest, width - 1, 1),
        (keys, 0, 7),
        (keys, width - 6, 7),
    ):
        counts = torch.ones(19, 2**bits + 1, dtype=torch.int64)
        moved = counts.to(DEVICE)
        guarded(lambda: unit_counts(x.to(DEVICE), low.to(DEVICE), shift, bits, moved))  # noqa: B023
        assert torch.equal(moved.cpu() - 1, counted_in_numpy(x, low, shift, bits)), (shift, bits)


for _dtype in DTYPES:
    for _layout in ("contiguous", "channels_last"):
        CASES[f"unit counts, {str(_dtype)[6:]}, {_layout}"] = partial(_unit_counts, _dtype, _layout)


# --- the two processes


def work(device: str) -> None:
    global DEVICE
    DEVICE = device
    judge(CASES, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_kernel(name: str, device: str, request: pytest.FixtureRequest) -> None:
    needs("triton")
    chosen = {
        item.callspec.params["name"]
        for item in request.session.items
        if getattr(item, "originalname", "") == "test_kernel" and item.path == request.path
    }
    wrong = verdicts("tests.test_concepts_triton", device, tuple(sorted(chosen)))[name]
    assert not wrong, wrong
