"""One prompt's rows as a Parquet file, and back. No torch.

Shapes: T tokens, L MoE layers, N = T x L rows (token by token), k width of the expert lists, S of the score lists.
"""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from foregate.errors import TraceError
from foregate.trace import format as fmt
from foregate.trace.header import Header
from foregate.trace.record import PromptRecord

COMPRESSION = {"compression": "zstd", "compression_level": 9}
SPLIT = ["weights.list.element", "scores.list.element"]
"""Columns stored byte plane by byte plane. They are float32, which every reader of Parquet knows (few know half
floats), but hold half-precision values: the low bytes are zeros, and the file is no larger than with half floats."""


def encode_part(record: PromptRecord, header: Header) -> bytes:
    """The Parquet file of ``record``. Raises TraceError where it does not fit the trace, or a number does not fit."""
    record.check(header)
    schema = header.schema
    lists = [name for name in SPLIT if name.split(".")[0] in schema.names]
    flat = [name for name in schema.names if name not in ("experts", "weights", "scores")]
    out = io.BytesIO()
    # Without Arrow's own schema (1 kB a part) every reader sees the same plain types.
    with pq.ParquetWriter(
        out, schema, use_dictionary=flat, use_byte_stream_split=lists, store_schema=False, **COMPRESSION
    ) as writer:
        writer.write_table(pa.table(_columns(record, header), schema=schema))
        writer.add_key_value_metadata({fmt.FOOTER_KEY: _footer(record, header)})
    return out.getvalue()


def footer_fields(header: Header, *, prompt: str, domain: str, rows: int, tokens: int) -> dict[str, Any]:
    """What the footer of a part says; the reader compares it with what it expects."""
    return {
        "format": fmt.VERSION,
        "model": header.model.fingerprint,
        "layout": header.layout,
        "prompt": prompt,
        "domain": domain,
        "rows": rows,
        "tokens": tokens,
    }


def _footer(record: PromptRecord, header: Header) -> bytes:
    rows = record.tokens * header.model.layers
    fields = footer_fields(header, prompt=record.prompt, domain=record.domain, rows=rows, tokens=record.tokens)
    return json.dumps(fields, ensure_ascii=False).encode()


def _columns(record: PromptRecord, header: Header) -> dict[str, pa.Array]:
    layers = header.model.layers
    rows = record.tokens * layers
    token_ids = _nullable(np.repeat(record.token_ids, layers), np.int32, fmt.UNKNOWN_TOKEN)
    phases = pa.array([fmt.PREFILL, fmt.DECODE])
    columns = {
        "prompt": _constant(record.prompt, rows),
        "domain": _constant(record.domain, rows),
        "phase": pa.DictionaryArray.from_arrays(np.repeat(record.decode, layers).astype(np.int32), phases),
        "pass": pa.array(np.repeat(record.passes, layers).astype(np.int32)),
        "position": pa.array(np.repeat(record.positions, layers).astype(np.int32)),
        "token_id": token_ids,
        "layer": pa.array(np.tile(np.arange(layers, dtype=np.uint16), record.tokens)),
        "experts": _lists(record.experts.astype(header.model.expert_dtype)),
        "weights": _lists(_half(record.weights, f"prompt {record.prompt!r}: router weights")),
    }
    if record.scores is not None:
        columns["scores"] = _lists(_half(record.scores, f"prompt {record.prompt!r}: router scores"))
    for name in header.timings:
        columns[name] = _nullable(record.timings[name].reshape(-1), np.int64, fmt.NOT_MEASURED)
    return columns


def _constant(text: str, rows: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), pa.array([text]))


def _nullable(values: NDArray[Any], dtype: type, absent: int) -> pa.Array:
    return pa.array(values.astype(dtype), mask=values == absent)


def _lists(values: NDArray[Any]) -> pa.Array:
    """[T, L, w] → N lists of w."""
    width = values.shape[-1]
    offsets = np.arange(0, values.size + 1, width, dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(values).reshape(-1)))


def _half(values: NDArray[Any], what: str) -> NDArray[np.float32]:
    """``values`` rounded to half precision. Raises TraceError, naming ``what``, where they are too large for it."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if np.isinf(half).any() and not np.isinf(values).any():
        raise TraceError(f"{what} of up to {np.nanmax(np.abs(values)):g} do not fit in float16")
    return half.astype(np.float32)


def open_part(content: bytes, expected: dict[str, Any], header: Header, where: str) -> pq.ParquetFile:
    """Open a part and compare its footer and columns with what it must be. Raises TraceError naming ``where``."""
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        found = json.loads((file.metadata.metadata or {}).get(fmt.FOOTER_KEY, b"null"))
    except (pa.ArrowException, ValueError, OSError) as error:
        raise TraceError(f"{where}: corrupted: no Parquet part ({error})") from None
    if not isinstance(found, dict):
        raise TraceError(f"{where}: a Parquet file, but no part of a routing trace")
    if found.get("model") != expected["model"]:
        message = f"{where}: of another model ({found.get('model')}); this trace is of {expected['model']}"
        raise TraceError(message)
    for name, value in expected.items():
        if found.get(name) != value:
            raise TraceError(f"{where}: its {name} is {found.get(name)!r}; the trace says {value!r}")
    if file.schema_arrow.names != header.schema.names or file.metadata.num_rows != expected["rows"]:
        raise TraceError(f"{where}: corrupted: {file.metadata.num_rows} rows of {file.schema_arrow.names}")
    return file


def read_flat(file: pq.ParquetFile, name: str, absent: int, where: str) -> NDArray[Any]:
    """A column [N] of numbers; nulls become ``absent``."""
    column = _column(file, name, where)
    return np.asarray((column.fill_null(absent) if column.null_count else column).to_numpy())


def read_text(file: pq.ParquetFile, name: str, where: str) -> NDArray[np.str_]:
    """A column [N] of text."""
    return np.asarray(_column(file, name, where).cast(pa.string()).to_numpy(zero_copy_only=False), dtype=np.str_)


def read_lists(file: pq.ParquetFile, name: str, width: int, where: str) -> NDArray[Any]:
    """A column of lists as [N, width]. Raises TraceError where a list has another length."""
    column = _column(file, name, where)
    values = np.asarray(column.flatten().to_numpy())
    lengths = np.asarray(column.value_lengths().to_numpy(zero_copy_only=False))
    if column.null_count or len(values) != len(column) * width or not (lengths == width).all():
        raise TraceError(f"{where}: corrupted: lists of {name} that do not have {width} values")
    return values.reshape(len(column), width)


def _column(file: pq.ParquetFile, name: str, where: str) -> pa.Array:
    try:
        return file.read([name], use_threads=False).column(0).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise TraceError(f"{where}: corrupted: column {name} cannot be read ({error})") from None
