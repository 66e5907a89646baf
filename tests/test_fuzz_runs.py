"""Run directories with damage of any kind: what is read is refused in words, or is what it was."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from fastxkd import runs
from tests.conftest import needs
from tests.fuzz_case import ASKED, Case, profile

CASES = 600


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A complete run of three chunks, and what is in its files."""
    for module in ("zarr", "pyarrow"):
        needs(module)
    from fastxkd.runs.chunks import Array, RunWriter

    folder = tmp_path_factory.mktemp("run") / "run"
    arrays = {"gradcam": Array((3, 3), "float16"), "unicam/layer4": Array((2, 4), "uint8")}
    columns = {"label": "int64", "name": "string", "score": "float32"}
    rng = np.random.default_rng(0)
    with RunWriter(folder, {"a": 1}, images=8, chunk=3, arrays=arrays, columns=columns) as writer:
        for chunk in writer.pending():
            rows = writer.rows(chunk)
            n = len(rows)
            writer.write(
                chunk,
                {
                    "gradcam": rng.random((n, 3, 3)).astype("f2"),
                    "unicam/layer4": rng.integers(0, 255, (n, 2, 4), "u1"),
                },
                {"label": [1] * n, "name": [f"image {i}" for i in rows], "score": [0.5] * n},
                [{"index": rows[0], "path": "x.jpg", "reason": "torn"}] if chunk == 1 else [],
            )
        writer.finish()
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    assert len(files) >= 3 + 3 * 3
    return folder, files


def damaged(c: Case, files: dict[str, bytes]) -> dict[str, bytes | None]:
    """One to three files, with other contents; None: gone."""
    found: dict[str, bytes | None] = {}
    names = list(files)
    for _ in range(c.pick(1, 1, 2, 3)):
        name = names[c.byte() % len(names)]
        content = files[name]
        at = (c.byte() * 256 + c.byte()) % (len(content) + 1)
        how = c.pick(
            "flip", "number", "cut", "ones", "zeros", "swap", "append", "gone", "repeat", "word"
        )
        if how == "flip":
            at = min(at, len(content) - 1)
            flipped = bytes([content[at] ^ (1 << c.byte() % 8)]) if content else b"?"
            found[name] = content[: max(at, 0)] + flipped + content[at + 1 :]
        elif how == "number":  # of those in run.json and the journal
            numbers = list(re.finditer(rb"-?\d+", content))
            if numbers:
                begin, end = numbers[c.byte() % len(numbers)].span()
                other = c.pick(b"0", b"-1", b"1", b"10000000000000", b"1e3", b"null", b'"1"', b"[]")
                found[name] = content[:begin] + other + content[end:]
        elif how == "cut":
            found[name] = content[:at]
        elif how in ("ones", "zeros"):
            found[name] = (
                content[:at] + (b"\xff" if how == "ones" else b"\0") * 8 + content[at + 8 :]
            )
        elif how == "swap":
            found[name] = files[names[c.byte() % len(names)]]
        elif how == "append":
            found[name] = content + content[:at] + b"\n"
        elif how == "gone":
            found[name] = None
        elif how == "repeat":
            found[name] = content[:at] + content[at : at + 30] * 3 + content[at + 30 :]
        else:
            word = c.pick(b"../../etc", b"\0", b"}", b'"', b"<script>", b"\xf0\x28", b"{" * 2000)
            found[name] = content[:at] + word + content[at:]
    return {name: new for name, new in found.items() if new != files[name]}


def refusal(call: Callable[[], object]) -> str | None:
    """What a ValueError says; None: there was none."""
    try:
        call()
    except ValueError as error:
        return f"{error}"
    return None


def read_all(folder: Path) -> list[str | None]:
    """What each way of reading is answered."""
    found = refusal(lambda: runs.open(folder))
    if found is not None:
        return [found]
    run = runs.open(folder)
    some = min(len(run), 20)
    return [
        refusal(read)
        for read in (
            lambda: run[:some],
            lambda: [run[i] for i in range(some)],
            lambda: run[-1],
            lambda: [array[:] for array in run.maps.values()],
            lambda: run.scores.to_pydict(),
            lambda: run.errors,
            lambda: repr(run),
        )
    ]


def test_reader_of_damaged_runs(whole_run: tuple[Path, dict[str, bytes]]) -> None:
    folder, files = whole_run
    assert not any(read_all(folder))
    assert runs.verify(folder) == []
    outcomes: Counter[str] = Counter()

    @profile(CASES)
    @hypothesis.given(st.binary(min_size=24, max_size=24))
    def run(choices: bytes) -> None:
        changes = damaged(Case(choices), files)
        outcomes["cases"] += 1
        try:
            for name, new in changes.items():
                if new is None:
                    (folder / name).unlink()
                else:
                    (folder / name).write_bytes(new)
            said = read_all(folder)
            assert "" not in said
            outcomes["refused" if any(said) else "read"] += 1
            problems: list[object] = []
            if refusal(lambda: problems.extend(runs.verify(folder))) is not None:
                problems = ["refused"]
            # Of what is stored not a bit can change unnoticed.
            assert problems or not any(n.startswith(("maps/", "scores/")) for n in changes)
        finally:
            for name in changes:
                (folder / name).write_bytes(files[name])

    run()
    assert outcomes["cases"] >= CASES
    if not ASKED:
        assert min(outcomes["read"], outcomes["refused"]) >= 50, outcomes
    assert not any(read_all(folder))
    assert runs.verify(folder) == []
