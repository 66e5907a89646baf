"""The tree that a routing student ends with: which blocks each class goes through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RoutingTree:
    """Blocks in levels, each block and each class with one parent.

    Attributes:
        levels: blocks of each level, from the image on.
        parents: ``parents[l][i]`` is the block of level l that block i of the next level, or after
            the last level class i, takes its input from.

    >>> tree = RoutingTree((2, 3), ((0, 0, 1), (2, 0, 2, 1)))
    >>> tree.path(0)
    (1, 2)
    >>> tree.groups(), tree.groups(0)
    ((2, 0, 2, 1), (1, 0, 1, 0))
    >>> print(tree.text(["cat", "car", "dog", "bus"]))
    block 1.0
    ├─ block 2.0: car
    └─ block 2.1: bus
    block 1.1
    └─ block 2.2: cat, dog
    """

    levels: tuple[int, ...]
    parents: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        children = [*self.levels[1:], len(self.parents[-1]) if self.parents else 0]
        fits = len(self.parents) == len(self.levels) > 0 and all(
            len(row) == count and all(0 <= parent < blocks for parent in row)
            for row, count, blocks in zip(self.parents, children, self.levels, strict=True)
        )
        if not fits:
            raise ValueError(
                f"parents: expected for each level {list(self.levels)} the parents of the next"
                f" level's blocks, and of the classes after the last, got {self.parents}"
            )

    @property
    def classes(self) -> int:
        return len(self.parents[-1])

    def path(self, label: int) -> tuple[int, ...]:
        """The blocks of a class, first level first."""
        if not 0 <= label < self.classes:
            raise ValueError(f"label: expected 0 to {self.classes - 1}, got {label}")
        path = [label]
        for row in reversed(self.parents):
            path.append(row[path[-1]])
        return tuple(path[:0:-1])

    def groups(self, level: int = -1) -> tuple[int, ...]:
        """The block of a level that each class goes through: classes in groups."""
        return tuple(self.path(label)[level] for label in range(self.classes))

    def used(self) -> tuple[tuple[int, ...], ...]:
        """The blocks of each level that lie on the path of a class."""
        return tuple(tuple(sorted(set(self.groups(level)))) for level in range(len(self.levels)))

    def to_json(self) -> dict[str, Any]:
        return {"levels": list(self.levels), "parents": [list(row) for row in self.parents]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RoutingTree:
        return cls(tuple(content["levels"]), tuple(tuple(row) for row in content["parents"]))

    def text(self, names: Sequence[str] | None = None) -> str:
        """The tree in lines; blocks that no class goes through are left out.

        Args:
            names: of the classes; None: their numbers.
        """
        if names is not None and len(names) != self.classes:
            raise ValueError(f"names: expected {self.classes}, one a class, got {len(names)}")
        shown = [str(label) for label in range(self.classes)] if names is None else list(names)
        return "\n".join(
            line for block in self.used()[0] for line in self._lines(0, block, shown, "", "")
        )

    def _lines(
        self, level: int, block: int, names: Sequence[str], first: str, rest: str
    ) -> list[str]:
        here = f"{first}block {level + 1}.{block}"
        if level == len(self.levels) - 1:
            of = [name for name, own in zip(names, self.parents[-1], strict=True) if own == block]
            return [f"{here}: {', '.join(of)}"]
        below = [child for child in self.used()[level + 1] if self.parents[level][child] == block]
        lines = [here]
        for child in below:
            last = child == below[-1]
            fork, bar = ("└─ ", "   ") if last else ("├─ ", "│  ")
            lines += self._lines(level + 1, child, names, rest + fork, rest + bar)
        return lines
