"""``python -m benchmarks.registers [--write]``: what the GPU kernels ask of a processor.

Registers, shared memory and spills, read out of the compiled code; no GPU is needed. The Triton
kernels are compiled for each of TARGETS with the very arguments of a launch, the CUDA kernels are
read from the extension where it is built. ``--write`` puts the table into results/registers.csv.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks._machine import ROOT
from fastxkd._triton import cam, concepts, distance, plan
from fastxkd._triton import kd_loss as kernels
from fastxkd.ops._distance_gpu import NARROW
from fastxkd.ops._logits import DIVERGENCES, REDUCTIONS

RESULTS = ROOT / "benchmarks" / "results" / "registers.csv"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


@dataclass
class Usage:
    """A compiled kernel; ``registers`` are those of a thread, ``spills`` its loads and stores of
    what found no register."""

    kernel: str
    variant: str
    dtype: str
    target: str
    block: int | None  # not known of a CUDA kernel
    warps: int | None
    registers: int
    shared: int
    spills: int
    wide_loads: int  # 16 bytes at once; NVIDIA only

    @property
    def available(self) -> int:
        """Registers that a thread can have when ``warps`` make a block."""
        if self.target.startswith("gfx"):
            return 512 * 4 // max(self.warps, 4)
        return min(65536 // (32 * self.warps) // 8 * 8, 255)


@dataclass
class Case:
    """A launch to compile, by name."""

    variant: str
    classes: int
    dtype: torch.dtype
    divergence: str = ""  # "": the scaling of the gradient
    everything: bool = False  # weights, smoothing, and a temperature with its own exponential
    step: int = 0  # of the launches of one call

    def launch(self, target: str) -> plan.Launch:
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        logits = torch.empty(4096, self.classes, dtype=self.dtype, device="meta")
        kind = TARGETS[target]
        device = plan.Device(132, kind.warp_size, kind.backend == "cuda")

        def vector(count: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(count, dtype=dtype, device="meta")

        if not self.divergence:
            return kernels.plan_scale(logits, vector(4096, exact), device)
        return kernels.plan(
            logits,
            logits,
            vector(4096, torch.int64),
            vector(self.classes, exact) if self.everything else None,
            vector(4096, exact) if self.everything else None,
            2.5 if self.everything else 4.0,
            0.1,
            0.9,
            DIVERGENCES[self.divergence],
            1.0,
            0.5,
            -100,
            0.1 if self.everything else 0.0,
            REDUCTIONS["batchmean"],
            vector(1, exact)[0],
            vector(2, exact),
            logits,
            device,
        )[self.step]


@dataclass
class CamCase:
    """A launch of cam to compile, or of its gradient."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    method: str
    last: bool = False  # channels last
    normalize: int = 2
    step: int = -1  # of the launches: weights where the method has its own, sums, finish
    backward: bool = False

    @property
    def variant(self) -> str:
        layout = "channels last" if self.last else "contiguous"
        return f"{'x'.join(map(str, self.shape))}, {self.method}, {layout}"

    def launch(self, target: str) -> plan.Launch:
        kind = TARGETS[target]
        device = plan.Device(132, kind.warp_size, kind.backend == "cuda")
        n, channels, height, width = self.shape
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        a = torch.empty(self.shape, dtype=self.dtype, device="meta")
        g = a[:, :, 0, 0].contiguous() if self.method == "weights" else a
        if self.backward:
            upstream = torch.empty(n, height, width, dtype=exact, device="meta")
            return cam.plan_backward(upstream, a, g, a, g, self.method, device)
        image = channels * height * width
        strides = [image, 1, channels] if self.last else [image, height * width, 1]
        strides += [channels, 1, 0] if self.method == "weights" else strides
        out = torch.empty(n, 4 * height, 4 * width, dtype=exact, device="meta")
        return cam.plan(a, g, out, strides, self.method, True, self.normalize, device)[self.step]


@dataclass
class DistanceCase:
    """A launch of distance to compile."""

    kernel: str  # distances, products, weights, pairs
    dtype: torch.dtype  # of the features
    width: int = 1024
    cols: int = 2048  # of a tile

    @property
    def variant(self) -> str:
        return f"{self.kernel}, width {self.width}, {self.cols} columns"

    def launch(self, target: str) -> plan.Launch:
        kind = TARGETS[target]
        device = plan.Device(132, kind.warp_size, kind.backend == "cuda")
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        tile = torch.empty(2048, self.cols, dtype=exact, device="meta")
        feature = torch.empty(4096, self.width, dtype=self.dtype, device="meta")
        double = torch.empty(2048, 2048, dtype=torch.float64, device="meta")
        if self.kernel == "pairs":
            return distance.plan_pairs(feature.to(exact), double, device)
        if self.kernel == "products":
            return distance.plan_products(tile, tile.numel(), 7, device)[0]
        norms = tile[0], tile[0]
        if self.kernel == "weights":
            return distance.plan_weights(tile, tile, tile[0, :7], double[0], double[0], 1, device)
        sums = double, double
        return distance.plan_distances(
            tile, feature, norms, double[0, 0], sums, (0, 2048), True, NARROW, device
        )


@dataclass
class ConceptCase:
    """A launch of concepts to compile, or of the counts beside it."""

    kernel: str  # present, lists, tally, label_areas, unit_counts
    dtype: torch.dtype = torch.float32
    mask_dtype: torch.dtype = torch.int16

    @property
    def variant(self) -> str:
        of_masks = self.kernel in ("present", "tally", "label_areas")
        kind = str(self.mask_dtype).removeprefix("torch.")
        return self.kernel + (f", masks of {kind}" if of_masks else "")

    def launch(self, target: str) -> plan.Launch:
        kind = TARGETS[target]
        device = plan.Device(132, kind.warp_size, kind.backend == "cuda")
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32

        def tensor(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        maps, strides = tensor(64, 512, 7, 7, dtype=self.dtype), [512 * 49, 49, 1]
        masks, labels = tensor(64, 6, 112, 112, dtype=self.mask_dtype), tensor(64, 4)
        if self.kernel == "label_areas":
            return concepts.plan_label_areas(masks, labels, tensor(1200), device)
        if self.kernel == "unit_counts":
            counts = tensor(512, 2**11 + 1)
            return concepts.plan_unit_counts(maps, tensor(512), 21, 11, counts, strides, device)
        between = tensor(112, dtype=torch.int32), tensor(112, dtype=exact)
        tables = masks, labels, tensor(1200), between, between
        launches, _, _ = concepts.plan(
            maps, tensor(512, dtype=exact), *tables, strides, tensor(512, 1200), 6, device
        )
        return launches[("present", "lists", "tally").index(self.kernel)]


def compiled(case: Case | CamCase | DistanceCase | ConceptCase, target: str) -> tuple[Usage, str]:
    """The usage and the machine code in text of a launch, compiled as a call would compile it."""
    launch = case.launch(target)
    constants, signature, aligned = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = parameter.annotation_type
    kind = TARGETS[target]
    built = triton.compile(
        ASTSource(launch.kernel, signature, constants, aligned),
        target=kind,
        options=launch.options,
    )
    if kind.backend == "cuda":
        text = _disassembled(built.asm["cubin"])
        registers, spills = int(re.findall(r"\bREG:(\d+)", text)[0]), _spills(text)
    else:
        text = built.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
        spills = int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)[0])
    usage = Usage(
        launch.kernel.__name__.strip("_"),
        case.variant,
        str(case.dtype).removeprefix("torch."),
        target,
        launch.arguments["BLOCK"],
        launch.options["num_warps"],
        registers,
        built.metadata.shared,
        spills,
        _wide_loads(text),
    )
    return usage, text


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.backends.nvidia.__path__[0]) / "bin" / name
    run = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return run.stdout


def _disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _tool("cuobjdump", "-res-usage", "-sass", file.name)


def _spills(sass: str) -> int:
    return len(re.findall(r"\b(?:LDL|STL)\b", sass))


def _wide_loads(sass: str) -> int:
    return len(re.findall(r"\bLDG\.E\.\S*128", sass))


def sizes(dtype: torch.dtype) -> dict[str, int]:
    """Classes: several rows in a tile, the longest row kept in registers and half of it, block
    after block."""
    longest = plan.ON_CHIP[8 if dtype == torch.float64 else 4]
    return {"rows": 104, "half": longest // 2, "row": longest, "long": 32000}


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def cam_cases() -> Iterator[CamCase]:
    """Planes of 7 x 7, which no 16 bytes divide, and large ones, in both layouts."""
    for dtype in DTYPES:
        for shape in ((8, 2048, 7, 7), (32, 256, 56, 56)):
            for method in cam.METHODS:
                for last in (False, True):
                    for step in (0, 1) if method in cam.OWN_WEIGHTS else (0,):
                        yield CamCase(shape, dtype, method, last, step=step)
                yield CamCase(shape, dtype, method, backward=True)
            for normalize in (0, 1, 2):
                yield CamCase(shape, dtype, "weights", normalize=normalize)


def distance_cases() -> Iterator[DistanceCase]:
    for dtype in DTYPES:
        for cols in (2048, 1001):
            yield DistanceCase("distances", dtype, NARROW, cols)
            yield DistanceCase("distances", dtype, 1024, cols)
    for dtype in (torch.float32, torch.float64):
        yield DistanceCase("pairs", dtype)
        for cols in (2048, 1001):
            yield DistanceCase("products", dtype, cols=cols)
            yield DistanceCase("weights", dtype, cols=cols)


def concept_cases() -> Iterator[ConceptCase]:
    for dtype in DTYPES:
        for kernel in ("lists", "tally", "unit_counts"):
            yield ConceptCase(kernel, dtype)
    for mask_dtype in (torch.uint8, torch.int32):
        for kernel in ("present", "tally", "label_areas"):
            yield ConceptCase(kernel, mask_dtype=mask_dtype)


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for size, classes in sizes(dtype).items():
            for divergence in DIVERGENCES:
                for step in range(4 if divergence == "dist" else 1):
                    for everything in (False, True):
                        name = f"{size}, {divergence}" + everything * ", all options"
                        yield Case(name, classes, dtype, divergence, everything, step)
        yield Case("scale", 32000, dtype)


def triton_kernels() -> Iterator[Usage]:
    for case in chain(cases(), cam_cases(), distance_cases(), concept_cases()):
        for target in TARGETS:
            yield compiled(case, target)[0]


def cuda_kernels(library: Path) -> Iterator[Usage]:
    """Of the extension; its kernels' names carry their template arguments."""
    resources = _tool("cuobjdump", "-res-usage", str(library))
    spills: dict[tuple[str, str], int] = {}
    wide: dict[tuple[str, str], int] = {}
    for arch, text in _by_architecture(_tool("cuobjdump", "-sass", str(library))):
        for function, body in _by_function(text):
            spills[arch, function] = _spills(body)
            wide[arch, function] = _wide_loads(body)
    for arch, text in _by_architecture(resources):
        for function, body in _by_function(text):
            name, template = _readable(function)
            yield Usage(
                name,
                template,
                "",
                arch,
                None,
                None,
                int(re.findall(r"REG:(\d+)", body)[0]),
                int(re.findall(r"SHARED:(\d+)", body)[0]),
                spills[arch, function],
                wide[arch, function],
            )


def _by_architecture(text: str) -> Iterator[tuple[str, str]]:
    parts = re.split(r"^arch = (sm_\w+)$", text, flags=re.MULTILINE)
    return zip(parts[1::2], parts[2::2], strict=True)


def _by_function(text: str) -> Iterator[tuple[str, str]]:
    parts = re.split(r"^\s*Function\s*:?\s+([\w$]+):?\s*$", text, flags=re.MULTILINE)
    return zip(parts[1::2], parts[2::2], strict=True)


def _readable(symbol: str) -> tuple[str, str]:
    """Name and template arguments of a kernel; the symbol as it is where nothing can read it."""
    if shutil.which("c++filt") is None:
        return symbol, ""
    run = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True)
    found = re.search(r"(\w+)(<.*>)?\(", run.stdout.replace("(anonymous namespace)::", ""))
    return (found[1], found[2] or "") if found else (symbol, "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    write = parser.parse_args().write
    layout = "{:<18} {:<30} {:<9} {:<7} {:>5} {:>5} {:>9} {:>7} {:>6} {:>10}"
    names = [f.name for f in fields(Usage)]
    print(layout.format(*(name.replace("_", " ") for name in names)))
    rows: list[Usage] = []
    cuda = [row for library in ROOT.glob("fastxkd/_cuda*.so") for row in cuda_kernels(library)]
    if not cuda:
        print("the CUDA extension is not built, or holds no kernels")
    for row in chain(cuda, triton_kernels()):
        rows.append(row)
        values = asdict(row).values()
        print(layout.format(*("-" if v is None else v for v in values)), flush=True)
    if write:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    main()
