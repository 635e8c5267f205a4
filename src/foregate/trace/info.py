"""What a trace holds, in numbers, and whether every byte of it is as it was written."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from foregate.errors import TraceError
from foregate.trace.manifest import Entry
from foregate.trace.part import Part
from foregate.trace.reader import TraceReader


def describe(path: Path) -> dict[str, Any]:
    """Everything about the trace at ``path``, as JSON takes it; reads every file. Sizes are bytes.

    ``problems`` names the files that are not as they were written. Raises TraceError where the trace cannot be opened.
    """
    reader = TraceReader(path)
    model, entries = reader.header.model, reader.entries
    problems, ranked = check(reader)
    return {
        "path": str(path),
        "complete": reader.complete,
        "problems": problems,
        "model": model.name,
        "model_type": model.model_type,
        "fingerprint": model.fingerprint,
        "layers": model.layers,
        "experts_per_layer": list(model.experts_per_layer),
        "top_k": list(model.top_k),
        **_totals(entries),
        "skipped": len(reader.skipped),
        "domains": {name: _totals([e for e in entries if e.domain == name]) for name in reader.domains},
        "scores": reader.header.scores.kind if reader.header.scores else None,
        "timings": list(reader.header.timings),
        "features": {name: info.dtype for name, info in reader.header.features.items()},
        "rows_by_weight": ranked,
        "runs": [asdict(run) for run in reader.header.runs],
    }


def check(reader: TraceReader) -> tuple[list[str], float]:
    """One line for every part that is not as it was written, and the share of rows with descending weights."""
    problems: list[str] = []
    ranked = rows = 0
    for part in reader:
        try:
            ranked += _read_all(part, reader)
            rows += part.entry.rows
        except TraceError as error:
            problems.append(str(error))
    return problems, ranked / rows if rows else 0.0


def _read_all(part: Part, reader: TraceReader) -> int:
    """Decode every column of a part; the number of rows whose weights descend. Raises TraceError."""
    header = reader.header
    expected = np.tile(np.arange(header.model.layers), part.entry.tokens)
    if (
        not np.array_equal(part.layer, expected)
        or int(part.decode.sum()) != part.entry.decode_tokens * header.model.layers
    ):
        raise TraceError(f"{part.where}: its layers or phases are not those of {part.entry.tokens} tokens")
    _ = part.experts, part.position, part.token_id, part.pass_index
    if header.scores:
        _ = part.scores
    for name in header.timings:
        part.timing(name)
    for name in header.features:
        part.feature(name)
    steps = np.diff(np.nan_to_num(part.weights, nan=-1e6), axis=1)  # padding comes last, below any float16
    return int((~(steps > 0)).all(axis=1).sum())


def _totals(entries: list[Entry] | tuple[Entry, ...]) -> dict[str, int]:
    files = [info for entry in entries for info in (entry.part, entry.features) if info is not None]
    return {
        "prompts": len(entries),
        "tokens": sum(entry.tokens for entry in entries),
        "decode_tokens": sum(entry.decode_tokens for entry in entries),
        "rows": sum(entry.rows for entry in entries),
        "bytes": sum(info.bytes for info in files),
    }
