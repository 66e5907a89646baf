"""Build the kernels: one CPU extension with every ISA level inside, one CUDA extension.

FASTXKD_CPU=1    a failing C++ build is an error (default: install without kernels, say so)
FASTXKD_CPU=0    leave the C++ kernels out
FASTXKD_CUDA=1   a failing CUDA build is an error; 0 leaves it out (default: where nvcc is)
FASTXKD_CUDA_ARCH="80;90"    architectures; the last one also as PTX
FASTXKD_EMULATOR=1           the CUDA kernels for the CPU as well: tests/test_emulator.py
FASTXKD_SANITIZE=1           address and undefined-behaviour sanitizers, for the tests
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
# The C++ kernels, one source each.
SOURCES = ["kd_loss", "dist", "cam", "distance", "pairs", "principal", "concepts", "unit_counts"]
# What a source needs beyond the flags below: sums that are the same on every machine.
OWN_FLAGS = {"concepts": ["-ffp-contract=off"]}
HEADERS = [str(CSRC / "ops.h"), *sorted(map(str, (CSRC / "cpu").glob("*.h")))]
X86 = platform.machine().lower() in ("x86_64", "amd64")
SANITIZE = os.environ.get("FASTXKD_SANITIZE") == "1"
# -fno-math-errno and -fno-trapping-math let gcc vectorise the exponential; NaN and infinities
# keep their meaning, which -ffast-math would take away.
# -fno-signed-zeros lets it drop sums of nothing. Kernels throw nothing.
FLAGS = ["-std=c++17", "-fopenmp", "-fvisibility=hidden", "-fno-exceptions"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
if SANITIZE:
    # Of what a dereference may be, the address sanitizer sees the same; half the time to compile.
    FLAGS += ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=null,object-size,vptr"]
    FLAGS += ["-DFXK_BLOCK=32"]
else:
    FLAGS += ["-O3", "-g0"]
LEVELS = {"baseline": []}
if X86:
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] = [
        *["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
        "-mprefer-vector-width=512",
        *["-Wno-maybe-uninitialized", "-Wno-uninitialized"],  # from gcc 12's own intrinsics headers
    ]


def wanted(name: str) -> bool | None:
    """True: must be built, False: must not, None: where it can be."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}: expected 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def cuda_root(nvcc: str) -> Path | None:
    """The toolkit's folder, asked of nvcc itself: it may be a wrapper far from the toolkit."""
    dry = subprocess.run(
        [nvcc, "-dryrun", "-x", "cu", os.devnull, "-o", os.devnull, "-c"],
        capture_output=True,
        text=True,
    )
    found = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
    return Path(found.group(1).strip()) if found else None


class BuildKernels(build_ext):
    def build_extension(self, ext: Pybind11Extension) -> None:
        kind = ext.name.rpartition("_")[2]
        try:
            if kind != "emulator":
                ext.extra_objects = self.cpu_objects() if kind == "cpu" else self.cuda_objects(ext)
            super().build_extension(ext)
        except Exception as error:
            if wanted(f"FASTXKD_{kind.upper()}"):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            reason = reason if len(reason) <= 120 else f"{reason[:117]}..."
            print(f"fastxkd: installed without {kind.upper()} kernels: {reason}", file=sys.stderr)

    # An extension that was left out has no file to copy.
    def copy_extensions_to_source(self) -> None:
        self.extensions = [
            e
            for e in self.extensions
            if Path(self.get_ext_fullpath(e.name)).exists()
            or Path(self.build_lib, self.get_ext_filename(e.name)).exists()
        ]
        super().copy_extensions_to_source()

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def cpu_objects(self) -> list[str]:
        jobs = [(source, level) for level in LEVELS for source in SOURCES]

        def compile_one(job: tuple[str, str]) -> list[str]:
            source, level = job
            return self.compiler.compile(
                [str(CSRC / "cpu" / f"{source}.cpp")],
                output_dir=str(Path(self.build_temp) / level),
                macros=[("FXK_ISA", level)],
                extra_postargs=[*FLAGS, *LEVELS[level], *OWN_FLAGS.get(source, [])],
                depends=HEADERS,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [obj for objects in pool.map(compile_one, jobs) for obj in objects]

    def cuda_objects(self, ext: Pybind11Extension) -> list[str]:
        nvcc = shutil.which("nvcc")
        root = cuda_root(nvcc) if nvcc else None
        if nvcc is None or root is None:
            raise RuntimeError("no nvcc on the path")
        archs = os.environ.get("FASTXKD_CUDA_ARCH", "80;90").split(";")
        gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        gencode.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        objects = []
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            target = Path(self.build_temp) / f"{source.stem}.cu.o"
            command = [nvcc, "-std=c++17", "-O3", "-Xcompiler=-fPIC", "--threads=0", *gencode]
            objects.append(str(target))
            # nvcc takes most of a minute: not for an object that is newer than all it is made of.
            used = [Path("setup.py"), CSRC / "ops.h", *(CSRC / "cuda").glob("*")]
            newest = max(path.stat().st_mtime for path in used)
            if not target.exists() or target.stat().st_mtime < newest:
                subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
        library = next(
            p
            for d in ("lib64", "lib", "targets/x86_64-linux/lib")
            if (p := root / d / "libcudart_static.a").exists()
        )
        ext.define_macros = [("FXK_CUDA_ARCHITECTURES", '"' + ";".join(archs) + '"')]
        return [*objects, str(library)]


def extensions() -> list[Pybind11Extension]:
    found = []
    link = ["-fopenmp", "-Wl,--exclude-libs,ALL"] if sys.platform == "linux" else ["-fopenmp"]
    if wanted("FASTXKD_CPU") is not False:
        sources = [str(CSRC / "cpu" / f"{source}.cpp") for source in SOURCES]
        found.append(
            Pybind11Extension(
                "fastxkd._cpu",
                [str(CSRC / "bindings.cpp")],
                cxx_std=17,
                define_macros=[("FXK_X86", "1")] if X86 else [],
                extra_compile_args=["-fsanitize=address,undefined", "-g"] if SANITIZE else [],
                extra_link_args=link + (["-fsanitize=address,undefined"] if SANITIZE else []),
                depends=[*sources, *HEADERS],
            )
        )
    cuda = wanted("FASTXKD_CUDA")
    if cuda or (cuda is None and shutil.which("nvcc")):
        found.append(
            Pybind11Extension(
                "fastxkd._cuda",
                [str(CSRC / "bindings_cuda.cpp")],
                cxx_std=17,
                extra_link_args=[*link, "-ldl", "-lrt", "-lpthread", "-s"],
                depends=[str(p) for p in sorted((CSRC / "cuda").glob("*"))] + HEADERS,
            )
        )
    elif cuda is None:
        print("fastxkd: no nvcc, the CUDA extension is left out", file=sys.stderr)
    if wanted("FASTXKD_EMULATOR"):
        # Small bounds, so that small batches reach what large ones run through.
        flags = ["-fvisibility=hidden", "-fno-math-errno", "-Wno-unknown-pragmas"]
        flags.append("-ffp-contract=off")  # what is fused says so
        # The sanitizers' checks in optimised code take many minutes to compile.
        sanitizers = ["-fsanitize=address,undefined", "-O0", "-g1", "-DFXK_EMULATOR_UCONTEXT"]
        found.append(
            Pybind11Extension(
                "fastxkd._emulator",
                [str(CSRC / "emulator" / "bindings_emulator.cpp")],
                cxx_std=17,
                define_macros=[("FXK_TOTALS_READS", "64"), ("FXK_ENTRY_BYTES", "8192")],
                extra_compile_args=[*flags, "-O1", "-g0", *(sanitizers if SANITIZE else [])],
                extra_link_args=sanitizers[:1] if SANITIZE else [],
                depends=[
                    str(p) for folder in ("cuda", "emulator") for p in (CSRC / folder).glob("*")
                ]
                + HEADERS,
            )
        )
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
