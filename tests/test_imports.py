"""Arrows point down: who may import whom, lazily or not."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1] / "fastxkd"
# From the bottom up; parts of one level do not know each other. FSS is below the maps it is made
# visible in.
LEVELS = [
    {"_extras", "_version"},
    {"_ranges"},
    {"reference"},
    {"ops"},
    {"_triton", "metrics.similarity"},
    {"cam"},
    {"losses", "metrics", "compat"},
    {"pages"},
    {"", "train"},
    {"runs"},
    {"cli"},
]


def part_of(module: str) -> str:
    """``cam.maps`` is of ``cam``; the package itself is ``""``."""
    if f"{module}.".startswith("metrics.similarity."):
        return "metrics.similarity"
    first = module.partition(".")[0]
    return "cli" if first in ("_commands", "__main__") else first


LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of the package below ``fastxkd``; ``""`` for a public name of the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            # What is imported may be a module itself.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "fastxkd":
                yield rest if part_of(rest) in LEVEL else ""


def upward(module: str, source: str) -> list[str]:
    """Imports of ``module`` that do not point down."""
    own = part_of(module)
    return [
        f"{module} imports fastxkd.{name}"
        for name in imported(ast.parse(source))
        if part_of(name) != own and LEVEL[part_of(name)] >= LEVEL[own]
    ]


def modules() -> Iterator[tuple[str, str]]:
    for path in sorted(ROOT.rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path.read_text("utf-8")


def test_every_part_has_its_level() -> None:
    found = {part_of(name) for name, _ in modules()} - {"__init__"}
    assert found == LEVEL.keys() - {""}


def test_imports_point_down() -> None:
    # The package itself names what is public, wherever it lies.
    assert not [
        arrow for name, source in modules() if name != "__init__" for arrow in upward(name, source)
    ]


def test_an_arrow_that_points_up_is_found() -> None:
    assert upward("train.film", "def f():\n    from fastxkd.runs import charts")
    assert upward("cam.unicam", "from fastxkd.metrics.scores import layer_scores")
    assert upward("losses.at", "import fastxkd.metrics")
    assert upward("ops.cam", "from fastxkd import GradCAM")
    assert not upward("cam.unicam", "from fastxkd.metrics.similarity import gram")
    assert not upward("runs.explain", "import fastxkd\nfrom fastxkd import metrics, capture")
