"""What the build promises: no torch in it, one OpenMP runtime, no symbol that could be mixed up."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastxkd
from fastxkd.ops import _library

ROOT = Path(fastxkd.__file__).parents[1]
PACKAGE = Path(fastxkd.__file__).parent
OPERATORS = ["kd_loss", "cam", "distance", "principal", "concepts"]
SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))

SOURCE = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source checkout")
BUILT = pytest.mark.skipif(_library._cpu is None, reason="the C++ kernels are not built")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MAPPED = """
import re, torch, fastxkd
student = torch.randn(256, 1000, requires_grad=True)
fastxkd.kd_loss(student, torch.randn(256, 1000), torch.arange(256)).backward()
(torch.randn(300, 300) @ torch.randn(300, 300)).sum()
with open("/proc/self/maps") as maps:
    found = {line.split()[-1] for line in maps if re.search(r"lib(gomp|iomp5|omp)[^/]*\\.so", line)}
print("\\n".join(sorted(found)))
"""


@LINUX
@BUILT
def test_one_openmp_runtime_is_mapped() -> None:
    run = subprocess.run(
        [sys.executable, "-c", MAPPED], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert len(run.stdout.split()) == 1, run.stdout


HEAVY = ["torchmetrics", "torchvision", "timm", "typer", "rich", "jinja2", "matplotlib", "PIL"]


def test_import_is_light() -> None:
    code = f"import sys, torch; before = set(sys.modules); import fastxkd; print(*[m for m in\
 {HEAVY} if m in sys.modules and m not in before])"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert run.stdout.split() == []


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@SOURCE
def test_the_build_knows_no_torch() -> None:
    assert not imported(ROOT / "setup.py") & {"torch", "numpy", "fastxkd"}
    requires = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert requires is not None
    names = re.findall(r'"([A-Za-z0-9_]+)', requires.group(1))
    assert sorted(names) == ["pybind11", "setuptools"]
    for source in (ROOT / "csrc").rglob("*.[ch]*"):
        assert not re.search(r"#include\s*<(torch|ATen|c10)", source.read_text()), source
    for source in (ROOT / "csrc" / "cpu").iterdir():
        assert "pybind11" not in source.read_text(), source


@BUILT
def test_the_extension_links_no_torch() -> None:
    code = Path(_library._cpu.__file__).read_bytes()
    for library in (b"libtorch", b"libc10", b"libpython"):
        assert library not in code


def objects(tmp_path: Path) -> dict[str, list[Path]]:
    """The objects of the last build by level; without one, those of one level compiled here."""
    found: dict[str, list[Path]] = {}
    headers = [ROOT / "csrc" / "ops.h", *(ROOT / "csrc" / "cpu").glob("*.h")]
    newest = max(path.stat().st_mtime for path in [*SOURCES, *headers])
    for path in (ROOT / "build").glob("temp*/*/csrc/cpu/*.o"):
        if path.stat().st_mtime >= newest:
            found.setdefault(path.parents[2].name, []).append(path)
    levels = _library.isa_levels() or ("none",)
    if all(len(found.get(level, [])) == len(SOURCES) for level in levels):
        return found
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no objects of a build and no compiler")
    flags = ["-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-O1"]
    flags += ["-fno-exceptions", "-fno-signed-zeros", "-fvisibility=hidden", "-DFXK_ISA=baseline"]
    targets = [tmp_path / f"{source.stem}.o" for source in SOURCES]
    running = [
        subprocess.Popen([compiler, *flags, "-c", str(source), "-o", str(target)])
        for source, target in zip(SOURCES, targets, strict=True)
    ]
    assert all(process.wait() == 0 for process in running)
    return {"baseline": targets}


@LINUX
@SOURCE
def test_levels_share_no_symbol(tmp_path: Path) -> None:
    """A weak symbol of one level could be the one that the linker keeps for all."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    for level, paths in objects(tmp_path).items():
        for path in paths:
            listing = subprocess.run(
                [nm, "-C", str(path)], capture_output=True, text=True, check=True
            ).stdout.splitlines()
            symbols = [re.match(r"^[0-9a-f]*\s+(\w) (.*)$", line) for line in listing]
            defined = [(m.group(1), m.group(2)) for m in symbols if m]
            assert defined
            assert not [s for s in defined if s[0] in "WVuwv"], (level, path)
            for kind, name in defined:
                if kind in "TDBR":
                    assert f"fxk::{level}::" in name, (path, kind, name)


def test_kernels_are_called_by_the_operators_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "ops":
            continue
        text = path.read_text()
        assert not re.search(r"\b_(cpu|cuda)\b\.\w|import _(cpu|cuda)\b|data_ptr\(", text), path
    # And in there through one door: the table that checks level and threads.
    for path in (PACKAGE / "ops").glob("*.py"):
        if path.name != "_library.py":
            assert not re.search(r"\b_(cpu|cuda)\b", path.read_text()), path


def test_arrows_point_down() -> None:
    above = {
        "reference": ["ops", "losses", "cam", "metrics", "train", "runs", "cli"],
        "ops": ["losses", "cam", "metrics", "train", "runs", "cli"],
        "losses": ["train", "runs", "cli"],
        "cam": ["losses", "train", "runs", "cli"],
        "metrics": ["losses", "train", "runs", "cli"],
    }
    beside = {
        # Losses that are an explanation or a score made trainable.
        "losses/relations.py": "metrics",
        "losses/explanations.py": "cam",
        "losses/inputs.py": "cam",
        # Metrics that run a model: they leave it as the explainers do.
        "metrics/_scoring.py": "cam",
        "metrics/dissection.py": "cam",
        "metrics/faithfulness.py": "cam",
        "metrics/fidelity.py": "cam",
        "metrics/input_gradients.py": "cam",
        "metrics/relevant.py": "cam",
        "metrics/sanity.py": "cam",
    }
    for folder, forbidden in above.items():
        for path in (PACKAGE / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastxkd."):
                    target = node.module.split(".")[1]
                    assert target not in forbidden, (path, node.module)
                    if folder in ("losses", "metrics") and target in ("cam", "metrics"):
                        by = "metrics" if folder == target else beside.get(f"{folder}/{path.name}")
                        assert by == target, (path, node.module)


def test_one_basename_per_operator() -> None:
    for name in OPERATORS:
        assert (PACKAGE / "ops" / f"{name}.py").exists()
        assert (PACKAGE / "reference" / f"{name}.py").exists()
        if (ROOT / "setup.py").exists():
            assert (ROOT / "csrc" / "cpu" / f"{name}.cpp").exists()
    assert list(_library.OPERATORS) == OPERATORS


def test_version() -> None:
    try:
        installed = importlib.metadata.version("fastxkd")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from the source tree, not installed")
    assert installed == fastxkd.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z.]+\d+)?", fastxkd.__version__)


def test_public_names_exist_and_are_documented() -> None:
    for name in fastxkd.__all__:
        value = getattr(fastxkd, name)
        if name not in ("metrics", "__version__"):
            assert value.__doc__, name
    with pytest.raises(AttributeError, match="module 'fastxkd' has no attribute 'nothing'"):
        fastxkd.nothing  # noqa: B018
