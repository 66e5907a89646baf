"""The exact quantiles of a stream, against numpy's of all values at once in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastxkd.ops.quantiles import UnitQuantiles, exact_quantiles

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def rows(x: Tensor) -> np.ndarray:
    return x.double().movedim(1, 0).flatten(1).numpy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 0.995, 994 / 999, 1.0])
def test_quantiles(backend: str, dtype: torch.dtype, quantile: float) -> None:
    x = torch.randn(31, 6, 5, 7)
    x[:, 1] = x[:, 1].clamp(min=0)  # ties
    x[:, 2] = 0.3
    x[:, 3] = x[:, 3].abs().neg()
    x[:, 4] *= 1e-6
    x = x.to(dtype)
    found = exact_quantiles(lambda: x.split(7), quantile)
    assert found.dtype == torch.float64
    assert np.array_equal(found.numpy(), np.quantile(rows(x), quantile, axis=1))


@pytest.mark.parametrize("bits", [1, 4, 11, 16])
def test_any_number_of_passes_and_any_division(bits: int) -> None:
    x = torch.randn(10, 3, 4, 4)
    search, done = UnitQuantiles(0.97, bits=bits), False
    while not done:
        for batch in x[torch.randperm(10)].split(1 + search.passes % 4):
            search.update(batch)
        done = search.advance()
    assert 2 <= search.passes <= max(2, -(-32 // bits))
    assert bits < 8 or search.passes == 2
    assert search.values == 160
    assert np.array_equal(search.result().numpy(), np.quantile(rows(x), 0.97, axis=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 7, 9])
def test_more_values_in_a_step_than_there_is_room_for(
    backend: str, dtype: torch.dtype, bits: int
) -> None:
    """Units of which some are listed, some counted, and some both: zeros beside tiny numbers."""
    x = torch.randn(40, 8, 7, 7)
    x[:, 1] = 1 + x[:, 1] * 1e-3
    x[:, 2] = x[:, 2].clamp(min=0)
    x[:, 3] = 0
    x[:, 4] = torch.where(x[:, 4] > 1, 1e-40, 0)
    x[:, 5] = torch.where(x[:, 5] > 0, torch.rand_like(x[:, 5]) * 1e-40, 0)
    x[:, 6] = torch.where(x[:, 6] > 0, -0.0, 0.0)
    x[:, 7] = -x[:, 7].clamp(min=0)
    x = x.to(dtype)
    for quantile in (0.02, 0.5, 0.8, 0.9, 0.999):
        found = exact_quantiles(lambda: x.split(11), quantile, bits=bits)
        assert np.array_equal(found.numpy(), np.quantile(rows(x), quantile, axis=1))


def test_neighbours_in_different_steps() -> None:
    """The two values that the quantile lies between have nothing in common, not even the sign."""
    x = torch.tensor([-1e30, 1e30]).repeat_interleave(50).view(1, 1, 10, 10)
    x = torch.cat([x, torch.arange(100.0).view(1, 1, 10, 10)], 1)
    found = exact_quantiles(lambda: [x], 0.5)
    assert np.array_equal(found.numpy(), np.quantile(rows(x), 0.5, axis=1))


@pytest.mark.parametrize(("interpolation", "value"), [("lower", 2), ("higher", 3), ("linear", 2.5)])
def test_interpolation(interpolation: str, value: float) -> None:
    x = torch.arange(6.0).view(1, 1, 2, 3)
    assert exact_quantiles(lambda: [x], 0.5, interpolation=interpolation).item() == value
    x = torch.arange(5.0).view(1, 1, 1, 5)
    assert exact_quantiles(lambda: [x], 0.5, interpolation=interpolation).item() == 2


def test_not_finite(backend: str) -> None:
    x = torch.randn(8, 5, 4, 4)
    x[3, 0, 1, 1] = torch.nan
    x[:, 1, 0] = torch.inf
    x[:, 2] = -torch.inf
    x[:, 3] = torch.nan
    found = exact_quantiles(lambda: x.split(3), 0.95)
    assert found[[0, 3]].isnan().all()
    assert found[1] == torch.inf
    assert found[2] == -torch.inf
    assert found[4] == np.quantile(rows(x)[4], 0.95)


def test_one_value() -> None:
    x = torch.tensor([[[[3.0]], [[-2.0]]]])
    assert exact_quantiles(lambda: [x], 0.995).tolist() == [3, -2]


def test_batches_of_another_size_and_of_none() -> None:
    x, y = torch.randn(3, 2, 4, 4), torch.randn(2, 2, 7, 5)
    found = exact_quantiles(lambda: [x[:0], x, y, x[:0]], 0.9)
    both = np.concatenate([rows(x), rows(y)], 1)
    assert np.array_equal(found.numpy(), np.quantile(both, 0.9, axis=1))


def test_memory_does_not_depend_on_the_stream() -> None:
    bits = 7

    def kept(images: int) -> int:
        search, most, done = UnitQuantiles(0.9, bits=bits), 0, False
        x = torch.randn(images, 2, 3, 3)
        while not done:
            for batch in x.split(4):
                search.update(batch)
            held = [v for v in vars(search).values() if isinstance(v, Tensor)]
            most = max(most, sum(v.numel() for v in held))
            done = search.advance()
        return most

    for images in (40, 400, 4000):
        assert kept(images) <= 2 * (3 * 2**bits + 20)


def test_misuse() -> None:
    x = torch.randn(4, 3, 4, 4)
    search = UnitQuantiles(0.9)
    with pytest.raises(ValueError, match="advance: the pass saw no values"):
        search.advance()
    with pytest.raises(ValueError, match="activations: expected spatial maps"):
        search.update(x[0])
    search.update(x)
    with pytest.raises(ValueError, match=r"activations: expected \[n, 3, height, width\] as"):
        search.update(x[:, :2])
    with pytest.raises(TypeError, match=r"activations: expected torch.float32 as before"):
        search.update(x.double())
    with pytest.raises(ValueError, match="result: not known after 0 passes"):
        search.result()
    assert not search.advance()
    search.update(x[:3])
    with pytest.raises(ValueError, match=r"advance: pass 2 saw other values .* had 64 a unit"):
        search.advance()


def test_values_that_change_between_passes() -> None:
    x = torch.randn(4, 3, 4, 4)
    search = UnitQuantiles(0.9)
    search.update(x)
    assert not search.advance()
    search.update(x * 10)
    with pytest.raises(ValueError, match="advance: pass 2 saw other values than the first"):
        search.advance()


def test_a_search_that_is_over() -> None:
    x = torch.randn(4, 3, 4, 4).half()
    search = UnitQuantiles(0.9, bits=16)
    search.update(x)
    assert search.advance()
    assert search.advance()
    with pytest.raises(ValueError, match="update: the quantiles are known"):
        search.update(x)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"quantile": 1.5}, ValueError, "quantile: expected a number from 0 to 1, got 1.5"),
        ({"quantile": "0.5"}, TypeError, "quantile: expected a number, got str"),
        ({"quantile": 0.5, "bits": 0}, ValueError, "bits: expected at least 1"),
        ({"quantile": 0.5, "bits": 17}, ValueError, "bits: expected at most 16"),
        ({"quantile": 0.5, "interpolation": "cubic"}, ValueError, "interpolation: expected one of"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        UnitQuantiles(**arguments)  # type: ignore[arg-type]
