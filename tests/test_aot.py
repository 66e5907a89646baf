"""The Triton kernels compiled for GPUs that need not be there: nothing spills, loads are wide."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.conftest import needs

if TYPE_CHECKING:
    from benchmarks.registers import Case

TARGETS = ("sm_80", "sm_90", "gfx942")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", "dkd", "dist")
STEPS = ("rows", "columns", "finish", "gradient")  # the launches of DIST


def chosen() -> list[tuple[str, torch.dtype, str, bool]]:
    """Size of the rows, dtype, divergence, all options or none. A compilation takes a second, so
    not everything with everything: ``python -m benchmarks.registers`` has the whole table."""
    single, half, double = torch.float32, torch.bfloat16, torch.float64
    cases = [(size, single, name, True) for size in ("row", "long") for name in DIVERGENCES[:5]]
    cases += [(size, double, "dkd", True) for size in ("row", "long")]
    cases += [("rows", single, "tvd", False), ("half", half, "reverse_kl", False)]
    cases += [("row", half, name, False) for name in ("forward_kl", "reverse_kl")]
    cases += [("row", torch.float16, "jsd", True), ("long", half, "forward_kl", False)]
    cases += [("scale", dtype, "", False) for dtype in (single, half, double)]
    return cases


def case(size: str, dtype: torch.dtype, divergence: str, everything: bool, step: int = 0) -> Case:
    from benchmarks import registers

    classes = registers.sizes(dtype)["long" if size == "scale" else size]
    return registers.Case(size, classes, dtype, divergence, everything, step)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("options", chosen(), ids=lambda o: f"{o[0]}, {o[1]}, {o[2]}, {o[3]}")
def test_nothing_spills_and_loads_are_wide(
    options: tuple[str, torch.dtype, str, bool], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from benchmarks import registers

    usage, text = registers.compiled(case(*options), target)
    assert usage.spills == 0
    assert 0 < usage.registers <= usage.available
    if target.startswith("gfx"):
        assert "global_load_dwordx4" in text
    else:
        # Two matrices, at least one load of 16 bytes of each.
        assert usage.wide_loads >= (2 if options[2] else 1)
        assert "STG.E.128" in text


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("step", range(4), ids=STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_nothing_of_dist_spills(
    dtype: torch.dtype, step: int, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from benchmarks import registers

    by_row = step in (0, 3)
    for size in ("rows", "row", "long") if by_row else ("rows", "long"):
        usage, text = registers.compiled(case(size, dtype, "dist", True, step), target)
        assert usage.kernel == f"dist_{STEPS[step]}"
        assert usage.spills == 0, size
        assert 0 < usage.registers <= usage.available
        # Rows come 16 bytes at a time; of columns a thread has registers for four.
        if by_row and size != "rows" and not target.startswith("gfx"):
            assert usage.wide_loads >= 2
        if step == 1 and dtype == torch.bfloat16:
            assert ("global_load_dwordx2" if target.startswith("gfx") else "LDG.E.64") in text


SMALL, LARGE = (8, 2048, 7, 7), (32, 256, 56, 56)  # planes that no 16 bytes divide, and that do


def chosen_of_cam() -> list[tuple[dict[str, Any], int]]:
    """A launch of cam and how many loads of 16 bytes it must have; ``registers.cam_cases`` are
    all."""
    single, half, double = torch.float32, torch.bfloat16, torch.float64
    cases: list[tuple[dict[str, Any], int]] = []
    for dtype in (single, half, double):
        both = {"dtype": dtype, "method": "layercam", "step": 0}
        cases += [(both | {"shape": SMALL}, 2), (both | {"shape": LARGE, "last": True}, 2)]
        own = {"dtype": dtype, "shape": LARGE, "method": "gradcam++"}
        cases += [(own | {"step": 0}, 2), (own | {"step": 1, "last": True}, 1)]
        cases.append((own | {"backward": True}, 2))
    rest = {"dtype": single, "shape": SMALL}
    cases += [(rest | {"method": "xgradcam", "step": 0, "last": True}, 2)]
    cases += [(rest | {"method": "gradcam", "step": 1}, 1)]
    cases += [(rest | {"method": "weights", "dtype": half, "step": 0}, 1)]
    cases += [(rest | {"method": "xgradcam", "backward": True}, 0)]
    cases += [(rest | {"method": "elementwise", "dtype": double, "backward": True}, 0)]
    cases += [(rest | {"method": "weights", "normalize": n}, 0) for n in (0, 2)]
    cases += [(rest | {"method": "weights", "shape": LARGE, "dtype": double}, 0)]
    return cases


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("options", "wide"), chosen_of_cam(), ids=lambda o: str(o).replace("torch.", "")
)
def test_nothing_of_cam_spills(
    options: dict[str, Any], wide: int, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from benchmarks import registers

    usage, text = registers.compiled(registers.CamCase(**options), target)
    assert usage.spills == 0
    assert 0 < usage.registers <= usage.available
    loads = text.count("global_load_dwordx4") if target.startswith("gfx") else usage.wide_loads
    assert loads >= wide


def distance_launches() -> list[tuple[str, torch.dtype, int, int]]:
    """Kernel, dtype, width of the features, columns of the tile."""
    single, half, double = torch.float32, torch.bfloat16, torch.float64
    cases = [("distances", dtype, width, 2048) for dtype in (single, double) for width in (16, 512)]
    cases += [("distances", half, 512, 2048), ("distances", single, 512, 1001)]
    for kernel in ("products", "weights", "pairs"):
        cases += [(kernel, dtype, 512, 2048) for dtype in (single, double)]
    return cases


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("options", distance_launches(), ids=str)
def test_nothing_of_distance_spills(
    options: tuple[str, torch.dtype, int, int], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from benchmarks import registers

    kernel, dtype, width, cols = options
    usage, text = registers.compiled(registers.DistanceCase(kernel, dtype, width, cols), target)
    assert usage.kernel == kernel
    assert usage.spills == 0
    assert 0 < usage.registers <= usage.available
    # Tiles come 16 bytes at a time; narrow features and pairs have none to read.
    if kernel in ("products", "weights") or (kernel == "distances" and width > 16 and cols == 2048):
        if target.startswith("gfx"):
            assert "global_load_dwordx4" in text
        else:
            assert usage.wide_loads >= 2


def concept_launches() -> list[tuple[str, torch.dtype, torch.dtype]]:
    """Kernel, dtype of the maps, dtype of the masks."""
    single, half, double = torch.float32, torch.bfloat16, torch.float64
    byte, word = torch.uint8, torch.int32
    cases = [("tally", single, byte), ("tally", half, torch.int16), ("tally", double, word)]
    cases += [
        (kernel, dtype, byte) for kernel in ("lists", "unit_counts") for dtype in (half, double)
    ]
    cases += [
        (kernel, single, mask) for kernel in ("present", "label_areas") for mask in (byte, word)
    ]
    return cases


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("options", concept_launches(), ids=str)
def test_nothing_of_concepts_spills(
    options: tuple[str, torch.dtype, torch.dtype], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from benchmarks import registers

    usage, text = registers.compiled(registers.ConceptCase(*options), target)
    assert usage.kernel in (options[0], f"concepts_{options[0]}")
    assert usage.spills == 0
    assert 0 < usage.registers <= usage.available
    amd = target.startswith("gfx")
    if options[0] == "tally":
        # The products are the matrix units', and no operation of the up-sampling is fused.
        assert ("v_mfma" if amd else "HMMA" if target == "sm_80" else "MMA") in text
        assert not re.search(r"\b(v_fma_f|v_fmac_f|v_pk_fma|FFMA|DFMA)", text)
    if options[0] in ("present", "label_areas"):
        wide = text.count("global_load_dwordx4") if amd else usage.wide_loads
        assert wide >= (options[2] != torch.uint8)


@pytest.mark.parametrize("classes", [1000, 1001])
def test_rows_of_16_bytes_are_known_as_such(classes: int) -> None:
    """1000 is a multiple of 8, which makes 16 bytes of bfloat16; an odd number must not be taken
    for one."""
    needs("triton")
    from benchmarks import registers

    usage, text = registers.compiled(
        registers.Case("row", classes, torch.bfloat16, "forward_kl"), "sm_90"
    )
    matrices = 2 if classes == 1000 else 0
    assert usage.wide_loads >= matrices
    assert ("STG.E.128" in text) == (classes == 1000)


def test_spills_are_seen() -> None:
    """More numbers for a thread than it has registers: the count that the tests trust must rise."""
    needs("triton")
    from benchmarks import registers
    from fastxkd._triton import plan

    limits = plan.ON_CHIP
    plan.ON_CHIP = {4: 1 << 14, 8: 1 << 14}
    try:
        usage, _ = registers.compiled(
            registers.Case("row", 1 << 14, torch.float32, "forward_kl"), "sm_90"
        )
        assert usage.spills > 0
    finally:
        plan.ON_CHIP = limits


def test_the_compiled_kernels_are_those_of_a_call() -> None:
    """The arguments that decide what is compiled are the plan's own; here, that it follows them."""
    needs("triton")
    from benchmarks import registers

    for dtype in (torch.float32, torch.float64):
        for size, on_chip in (("rows", True), ("row", True), ("long", False)):
            launch = case(size, dtype, "dkd", True).launch("sm_90")
            assert launch.arguments["ON_CHIP"] == on_chip
            assert launch.arguments["ROWS"] == (4 if size == "rows" else 1)
            assert launch.programs <= 132 * 1024 // (32 * launch.options["num_warps"])
    assert set(registers.TARGETS) == set(TARGETS)
    assert set(registers.DIVERGENCES) == set(DIVERGENCES)
