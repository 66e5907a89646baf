"""What nvcc makes of the CUDA kernels, on a machine that need not have a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cuda"
# Kernels of each: three element types by four layouts and three more by one, six forms of the loss
# each, and the totals; DIST with two launches by layout, one by element type, and one that merges;
# distance with four by element type, and one that adds up. cam: three methods' weights and seven
# gradients by two layouts, its sums by how memory lies, the weighted one also with weights of 16
# bits, and what finishes a map. concepts: two launches by the masks' type, one by that of the maps,
# and one that counts values by it.
KERNELS = {
    "kd_loss": (3 * 4 + 3) * 6 + 2,
    "dist": (3 * 4 + 3) * 2 + 6 + 2,
    "kd_loss_scale": 4,
    "distance": 4 * 2 + 1,
    "concepts": 3 + 4 + 3 + 4,
    "cam": 3 * 4 * 4 + (4 * 4 + 2) + (3 * 6 + 3 * 4 * 2) + 2 + 7 * 4 * 2,
}
ARCHITECTURES = ["80", "90"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the path"),
    pytest.mark.skipif(not SOURCES.exists(), reason="not a source checkout"),
]

# One kernel in the output of `ptxas -v`.
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<arch>\d+)'"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The extension as an installation makes it, and what ptxas said."""
    out = tmp_path_factory.mktemp("cuda")
    made = subprocess.run(
        [
            *[sys.executable, "setup.py", "-q", "build_ext"],
            *[f"--build-lib={out / 'lib'}", f"--build-temp={out / 'temp'}"],
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "FASTXKD_CPU": "0",
            "FASTXKD_CUDA": "1",
            "NVCC_APPEND_FLAGS": "-Xptxas=-v",
            "FASTXKD_CUDA_ARCH": ";".join(ARCHITECTURES),
        },
        capture_output=True,
        text=True,
    )
    told = made.stdout + made.stderr
    assert made.returncode == 0, told
    (path,) = (out / "lib" / "fastxkd").glob("_cuda.*")
    return path, told


def test_no_kernel_spills(built: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Every kernel keeps its row in registers, on both architectures."""
    _, told = built
    assert "warning" not in told, told
    kernels = [match.groupdict() for match in KERNEL.finditer(told)]
    assert len(kernels) == told.count("Compiling entry function")
    assert len(kernels) == len(ARCHITECTURES) * sum(KERNELS.values())
    names = subprocess.run(
        ["c++filt"], input="\n".join(k["name"] for k in kernels), capture_output=True, text=True
    ).stdout.splitlines()
    table: dict[str, list[str]] = {}
    for name, kernel in zip(names, kernels, strict=True):
        short = re.sub(r"^void |fxk::cuda::|\(anonymous namespace\)::|\(.*$", "", name)
        table.setdefault(short, []).append(f"sm_{kernel['arch']} {kernel['registers']:>3}")
    with capsys.disabled():
        print("\nregisters per thread")
        for name in sorted(table):
            print(f"  {name:60} {', '.join(sorted(table[name]))}")
    # Of the kernels and of the functions that they call.
    frames = re.findall(r"(\d+) bytes stack.*?(\d+) bytes spill s.*?(\d+) bytes spill l", told)
    assert len(frames) >= len(kernels)
    assert {number for frame in frames for number in frame} == {"0"}


WITHOUT_A_DRIVER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fastxkd._cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.ARCHITECTURES)
if module.problem() is None:
    print("has a device")
else:
    assert module.device_count() == 0
    for call, arguments in (
        *((module.kd_loss, [0] * 4 + [64] * 2 + [0] * 5 + [64, 64, 2, 3, 3, 3, 3, 0, (), 0]
           + [4.0, 0.1, 0.9, divergence, 1.0, 1.0, 0.0, -100, 2, 0, 0]) for divergence in (0, 5)),
        (module.kd_loss_workspace, [2, 3, 5, 0, 0]),
        (module.kd_loss_scale, [0, 0, 64, 64, 2, 3, False, 0]),
        (module.cam_workspace, [[2, 8, 4, 4, 4, 4], [128, 16, 1] * 2, 0, 0, 0]),
        (module.cam, [0, 0, *[64] * 4, [2, 8, 4, 4, 4, 4], [128, 16, 1] * 2, 0, True, 2, 0]),
        (module.cam_backward, [0, 0, *[64] * 5, 2, 8, 16, 0, 0]),
        (module.distance_workspace, [2, 3, 5, 0]),
        (module.distance_tile, [0, 0, 64, [64], [64], [3], [0], [3], *[64] * 5, 2, 3, 0, 2, 3,
                                False, 0, 0]),
        (module.distance_grad_tile, [0, 0, *[64] * 5, 1, 0, 2, 3, 0]),
        (module.pair_distances, [0, 0, 64, 64, 2, 3, 0]),
        (module.concepts, [0, 0, 64, [64] * 11, [2, 3, 4, 4, 1, 8, 8, 1, 5, 2], [48, 16, 1], 0, 0]),
        (module.label_areas, [0, 0, [64] * 3, [2, 1, 8, 8, 1, 5], 0]),
        (module.unit_counts, [0, 0, [64] * 3, [2, 3, 16, 21, 11], [48, 16, 1], 0]),
    ):
        try:
            call(*arguments)
        except RuntimeError as error:
            print(error)
"""


def test_the_extension_imports_without_a_driver(built: tuple[Path, str]) -> None:
    """Addresses that are nobody's: where there is no device, no launch gets as far as them."""
    path, _ = built
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_DRIVER, str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    archs, *errors = run.stdout.splitlines()
    assert archs.split(";") == ARCHITECTURES
    if errors != ["has a device"]:
        assert len(errors) == 14
        assert all("driver" in error or "device" in error for error in errors), errors
