"""How a kernel is launched: on which device, in tiles of what size, with how many registers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# By the bytes of a number that the kernels compute with: the longest row that is kept in registers
# (more would fit, but then no second block does, and memory waits while this one computes), the
# block in which longer rows are read, the numbers of a thread, and the registers it may have with
# 4, 8 and 16 warps. Left alone, ptxas takes as many as it likes, or spills to go below some number
# of its own. The common case needs fewer than the others, and a second block then has room.
# benchmarks/registers.py shows what the compilers make of it; nothing may spill.
ON_CHIP = {4: 4096, 8: 512}
LOOPED_BLOCK = {4: 2048, 8: 512}
PER_THREAD = {4: 8, 8: 2}
REGISTERS = {4: {4: 96, 8: 128, 16: 128}, 8: {4: 255, 8: 255, 16: 128}}
LEAN_REGISTERS = {4: {4: 80, 8: 80, 16: 64}}
# DIST keeps more numbers of a row. Down the columns it goes in tiles of so many columns and rows;
# and it puts runs together in tiles of so many runs and columns.
DIST_REGISTERS = {4: {4: 128, 8: 128, 16: 128}, 8: {4: 255, 8: 255, 16: 128}}
DOWN_BLOCK, DOWN_ROWS = {4: 512, 8: 256}, 4
DOWN_REGISTERS = 255
FINISH = (16, 32)


class Launch(NamedTuple):
    """A kernel with everything it is called with; benchmarks/registers.py compiles it without a
    device."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self, tensor: Tensor) -> None:
        with torch.cuda.device_of(tensor):
            self.kernel[(self.programs,)](**self.arguments, **self.options)


class Device(NamedTuple):
    processors: int
    lanes: int  # threads of a warp
    nvidia: bool


@lru_cache
def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    nvidia = torch.version.hip is None
    lanes = 32 if nvidia else properties.warp_size
    return Device(properties.multi_processor_count, lanes, nvidia)


def device_of(tensor: Tensor) -> Device:
    return _gpu(tensor.device.index) if tensor.device.type == "cuda" else Device(1, 32, True)


def block_of(classes: int, size: int) -> tuple[bool, int]:
    """Whether a row stays in registers, and in blocks of how many numbers it is read."""
    on_chip = classes <= ON_CHIP[size]
    return on_chip, triton.next_power_of_2(classes) if on_chip else LOOPED_BLOCK[size]


def tile_of(
    block: int, rows: int, size: int, device: Device, registers: dict[int, dict[int, int]]
) -> tuple[int, int, dict[str, Any]]:
    """Rows of a tile, programs, the compiler's options; for ``rows`` rows of ``block`` numbers."""
    of_tile = max(512 // block, 1)
    warps = of_tile * block // (PER_THREAD[size] * device.lanes)
    warps = min(max(warps, 128 // device.lanes), 512 // device.lanes)
    # Enough to fill the device: 1024 threads on every processor.
    programs = device.processors * (1024 // (warps * device.lanes))
    # Sums of products are rounded once, whatever the default of the version.
    options = {"num_warps": warps, "enable_fp_fusion": True}
    if device.nvidia:
        options["maxnreg"] = registers[size][warps]
    return of_tile, min(triton.cdiv(rows, of_tile), programs), options


def columns_of(
    classes: int, rows: int, size: int, device: Device
) -> tuple[int, int, dict[str, Any]]:
    """Columns of a tile, how many runs share the rows, the compiler's options."""
    block = min(triton.next_power_of_2(classes), DOWN_BLOCK[size])
    warps = 128 // device.lanes
    # As in tile_of: 1024 threads on every processor.
    runs = max(device.processors * 8 // triton.cdiv(classes, block), 1)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    if device.nvidia:
        options["maxnreg"] = DOWN_REGISTERS
    return block, min(triton.cdiv(rows, DOWN_ROWS), runs), options


def alignment(itemsize: int, *numbers: int, width: int = 16) -> int:
    """How many elements make ``width`` bytes, when all numbers are multiples of that, else 1.

    Triton asks of a number only whether it is a multiple of 16, which 1000 is not.
    """
    count = width // itemsize
    return count if all(n % count == 0 for n in numbers) else 1
