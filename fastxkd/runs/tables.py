"""The scores of a chunk as a Parquet file, the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastxkd._extras import require
from fastxkd.runs.layout import Layout


def schema(layout: Layout) -> Any:
    """``index`` and the columns of the run, as a pyarrow schema."""
    arrow = require("pyarrow", extra="runs")
    kinds = {"bool": "bool_"}
    return arrow.schema(
        [("index", arrow.int64())]
        + [(name, getattr(arrow, kinds.get(kind, kind))()) for name, kind in layout.columns.items()]
    )


def to_table(layout: Layout, chunk: int, scores: Mapping[str, Any]) -> Any:
    """A pyarrow table of one chunk.

    Raises:
        ValueError: a column is missing, unknown, too long, too short, or of another type.
    """
    arrow = require("pyarrow", extra="runs")
    rows, wanted = layout.rows(chunk), schema(layout)
    if set(scores) != set(layout.columns):
        raise ValueError(
            f"scores: expected the columns {', '.join(layout.columns) or '(none)'}, "
            f"got {', '.join(map(str, scores)) or '(none)'}"
        )
    columns = [arrow.array(np.arange(rows.start, rows.stop))]
    for name, kind in layout.columns.items():
        values = scores[name]
        if hasattr(values, "detach"):
            values = values.detach().cpu().numpy()
        if len(values) != len(rows):
            raise ValueError(f"scores: {name} has {len(values)} values for {len(rows)} images")
        try:
            if kind == "string":
                values = [None if value is None else _text(value) for value in values]
            elif isinstance(values, np.ndarray):
                values = values.astype(kind, casting="same_kind")
            columns.append(arrow.array(values, wanted.field(name).type, from_pandas=False))
        except (ValueError, TypeError, OverflowError, arrow.ArrowException) as error:
            raise ValueError(f"scores: {name} is no column of {kind} ({error})") from error
    return arrow.table(columns, schema=wanted)


def _text(value: Any) -> str:
    """A string that UTF-8 can hold: names of files may be arbitrary bytes."""
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def to_parquet(table: Any) -> bytes:
    arrow, parquet = require("pyarrow", extra="runs"), require("pyarrow.parquet", extra="runs")
    sink = arrow.BufferOutputStream()
    parquet.write_table(
        table,
        sink,
        row_group_size=max(1, len(table)),
        compression="zstd",
        store_schema=False,
        write_page_checksum=True,
    )
    content: bytes = sink.getvalue().to_pybytes()
    return content


def from_parquet(content: bytes, layout: Layout, chunk: int) -> Any:
    """The table of a chunk.

    Raises:
        ValueError: damaged, or not the rows and columns that this chunk has.
    """
    arrow, parquet = require("pyarrow", extra="runs"), require("pyarrow.parquet", extra="runs")
    rows, wanted = layout.rows(chunk), schema(layout)
    try:
        file = parquet.ParquetFile(arrow.BufferReader(content), page_checksum_verification=True)
        found = file.schema_arrow
        if not found.equals(wanted):
            raise ValueError(
                f"expected the columns {', '.join(wanted.names)}, got {', '.join(found.names)}"
            )
        if file.metadata.num_rows != len(rows):
            raise ValueError(f"expected {len(rows)} rows, got {file.metadata.num_rows}")
        table = file.read(use_threads=False)
        table.validate(full=True)
        index = table.column("index").to_numpy()
    except (arrow.ArrowException, OSError, MemoryError, OverflowError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if not np.array_equal(index, np.arange(rows.start, rows.stop)):
        raise ValueError(f"expected the rows {rows.start} to {rows.stop - 1}")
    return table
