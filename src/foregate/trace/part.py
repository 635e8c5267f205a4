"""One prompt of a trace as numpy arrays. No torch.

Shapes: T tokens, L MoE layers, N rows of a prompt that pass the filters, k width of the expert lists, S of the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from foregate.errors import TraceError
from foregate.trace import format as fmt
from foregate.trace.header import Header
from foregate.trace.manifest import Entry, FileInfo
from foregate.trace.parquet import footer_fields, open_part, read_flat, read_lists, read_text
from foregate.trace.tensors import decode_tensors

ROUTER, WEIGHT = "router", "weight"
ORDERS = (ROUTER, WEIGHT)
"""Orders of the experts of a row: as the router gave them, or by router weight, largest first (ties as given)."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows of a prompt are wanted (None: all), and in which order their experts."""

    phases: Collection[str] | None = None
    layers: Collection[int] | None = None
    order: str = ROUTER


class Part:
    """One prompt of a trace. Columns are arrays of N rows, decoded when they are first asked for.

    Every token has a row for every layer, so ``grid`` can give any column the shape [T, L, ...].
    """

    def __init__(
        self, directory: Path, header: Header, entry: Entry, fetch: Callable[[FileInfo], bytes], rows: Rows
    ) -> None:
        """``fetch`` gives the verified bytes of a file of the trace in ``directory``."""
        self.entry = entry
        self.prompt, self.domain = entry.prompt, entry.domain
        self._directory, self._header, self._fetch, self._rows = directory, header, fetch, rows

    @cached_property
    def position(self) -> NDArray[np.int32]:
        """Position in the sequence, from 0."""
        return self._flat("position", 0)

    @cached_property
    def token_id(self) -> NDArray[np.int32]:
        """Token that was fed in; -1 where it is not known."""
        return self._flat("token_id", fmt.UNKNOWN_TOKEN)

    @cached_property
    def layer(self) -> NDArray[np.uint16]:
        """MoE layer, from 0."""
        return self._flat("layer", 0)

    @cached_property
    def pass_index(self) -> NDArray[np.int32]:
        """Forward pass of the prompt that routed the row, from 0."""
        return self._flat("pass", 0)

    @cached_property
    def decode(self) -> NDArray[np.bool_]:
        """True for tokens after the prompt, False for the prompt's own."""
        return self._every_decode[self._mask]

    @cached_property
    def experts(self) -> NDArray[Any]:
        """Chosen experts [N, k]; see the format for layers that choose fewer than k."""
        return self._ordered(self._lists("experts", self._header.model.width))

    @cached_property
    def weights(self) -> NDArray[np.float32]:
        """Router weights [N, k] of ``experts``."""
        return self._ordered(self._given_weights)

    @cached_property
    def scores(self) -> NDArray[np.float32]:
        """Router scores [N, S] of all experts. Raises TraceError where the trace has none."""
        if self._header.scores is None:
            raise TraceError(f"{self._directory}: traced without router scores")
        values: NDArray[np.float32] = self._lists("scores", self._header.scores.width).astype(np.float32)
        return values

    def timing(self, name: str) -> NDArray[np.int64]:
        """Nanoseconds [N] of ``name`` (attention_ns, …); -1 where nothing was measured. Raises TraceError."""
        known("timing", (name,), self._header.timings)
        return self._flat(name, fmt.NOT_MEASURED)

    def feature(self, name: str) -> NDArray[np.float32]:
        """Feature tensor [N, D]; NaN in layers that have none. Raises TraceError where it was not traced."""
        known("feature", (name,), self._header.features)
        values = self._tensors[name]
        if values.shape != (self.entry.rows, *self._header.features[name].shape):
            raise TraceError(f"{self._feature_path}: {name} of shape {values.shape} for {self.entry.rows} rows")
        return values[self._mask]

    def grid(self, values: NDArray[Any]) -> NDArray[Any]:
        """A column of this part, [N, ...] → [T, L, ...], with the tokens and layers that pass the filters."""
        layers = self._header.model.layers if self._rows.layers is None else len(set(self._rows.layers))
        return values.reshape(-1, layers, *values.shape[1:])

    @property
    def where(self) -> str:
        """The file, for error messages."""
        return str(self._directory / self.entry.part.file)

    @cached_property
    def _file(self) -> pq.ParquetFile:
        entry = self.entry
        expected = footer_fields(
            self._header, prompt=entry.prompt, domain=entry.domain, rows=entry.rows, tokens=entry.tokens
        )
        return open_part(self._fetch(entry.part), expected, self._header, self.where)

    @cached_property
    def _mask(self) -> NDArray[np.bool_]:
        """Rows [T x L] that pass the filters."""
        layer = np.arange(self.entry.rows) % self._header.model.layers
        mask = np.ones(self.entry.rows, bool) if self._rows.layers is None else np.isin(layer, list(self._rows.layers))
        if self._rows.phases is not None:
            wanted = [phase in self._rows.phases for phase in (fmt.PREFILL, fmt.DECODE)]
            mask &= np.asarray(wanted)[self._every_decode.astype(int)]
        return mask

    @cached_property
    def _every_decode(self) -> NDArray[np.bool_]:
        return np.asarray(read_text(self._file, "phase", self.where) == fmt.DECODE)

    @cached_property
    def _given_weights(self) -> NDArray[np.float32]:
        return self._lists("weights", self._header.model.width).astype(np.float32)

    @cached_property
    def _ranks(self) -> NDArray[np.int64]:
        """Indices [N, k] that sort a row by weight."""
        return np.argsort(-self._given_weights, axis=1, kind="stable")

    def _ordered(self, values: NDArray[Any]) -> NDArray[Any]:
        return values if self._rows.order == ROUTER else np.take_along_axis(values, self._ranks, axis=1)

    @cached_property
    def _tensors(self) -> dict[str, NDArray[np.float32]]:
        assert self.entry.features is not None
        return decode_tensors(self._fetch(self.entry.features), self._feature_path)

    @property
    def _feature_path(self) -> str:
        assert self.entry.features is not None
        return str(self._directory / self.entry.features.file)

    def _flat(self, name: str, absent: int) -> NDArray[Any]:
        return read_flat(self._file, name, absent, self.where)[self._mask]

    def _lists(self, name: str, width: int) -> NDArray[Any]:
        return read_lists(self._file, name, width, self.where)[self._mask]


def known(what: str, wanted: Collection[Any] | None, choices: Collection[Any]) -> None:
    """Raises TraceError for the first of ``wanted`` that is not one of ``choices``."""
    unknown = [name for name in wanted or () if name not in choices]
    if unknown:
        raise TraceError(f"the trace has no {what} {unknown[0]!r}; it has: {', '.join(map(str, choices)) or 'none'}")
