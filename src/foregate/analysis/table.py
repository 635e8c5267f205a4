"""Tidy tables: one observation a row; written as Parquet and, unless they are very long, as CSV."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

CSV_ROWS = 250_000
"""Longer tables come as Parquet alone."""


@dataclass(frozen=True, slots=True)
class Table:
    """``chunks()`` gives the rows, a bounded number at a time, always with the same columns."""

    name: str
    description: str
    chunks: Callable[[], Iterable[pa.Table]]

    def whole(self) -> pa.Table:
        """All rows. For tables known to be short, and for tests."""
        return pa.concat_tables(self.chunks())

    def write(self, directory: Path) -> dict[str, Any]:
        """Write ``name``.parquet (and .csv); returns what was written, as JSON takes it."""
        parquet, comma = directory / f"{self.name}.parquet", directory / f"{self.name}.csv"
        rows = 0
        writer: pq.ParquetWriter | None = None
        csv: pa_csv.CSVWriter | None = None
        for chunk in self.chunks():
            if writer is None:
                writer = pq.ParquetWriter(parquet, chunk.schema, compression="zstd")
                csv = pa_csv.CSVWriter(comma, chunk.schema)
            writer.write_table(chunk)
            rows += len(chunk)
            if csv is not None and rows > CSV_ROWS:
                csv.close()
                csv = None
                comma.unlink()
            if csv is not None:
                csv.write_table(chunk)
        assert writer is not None, f"table {self.name} has no chunk"
        writer.close()
        if csv is not None:
            csv.close()
        return {"name": self.name, "description": self.description, "rows": rows, "csv": csv is not None}


def table(name: str, description: str, **columns: Any) -> Table:
    """A short table held in memory. Scalars are repeated; NaN is written as null."""
    length = max((len(values) for values in columns.values() if not _scalar(values)), default=1)
    arrays = {key: _column(values, length) for key, values in columns.items()}
    held = pa.table(arrays)
    return Table(name, description, lambda: [held])


def records(name: str, description: str, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> Table:
    """A short table from dictionaries; ``columns`` gives the order, and what an empty table has."""
    return table(name, description, **{key: [row.get(key) for row in rows] for key in columns})


def _scalar(values: Any) -> bool:
    return isinstance(values, (str, int, float)) or values is None


def _column(values: Any, length: int) -> pa.Array:
    full = [values] * length if _scalar(values) else values
    array = np.asarray(full) if not isinstance(full, list) else None
    if array is not None and array.dtype.kind == "f":
        return pa.array(array, from_pandas=True)
    return pa.array(full if array is None else array)
