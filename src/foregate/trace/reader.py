"""Reads a trace part by part; nothing is held but the prompt in hand. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from foregate.errors import TraceError
from foregate.trace import format as fmt
from foregate.trace.header import Header, read_header
from foregate.trace.manifest import Entry, FileInfo, Skipped, read_manifest
from foregate.trace.part import ORDERS, ROUTER, Part, Rows, known


class TraceReader:
    """A trace on disk. Opening checks version, manifest and file sizes; reading a part checks its checksum.

    Iterating gives every prompt as a ``Part``. ``entries`` says what there is without reading any part.
    """

    def __init__(self, path: Path | str) -> None:
        """Raises TraceError, naming the file, for an unknown version and anything missing, truncated or malformed."""
        self.path = Path(path)
        self.header: Header = read_header(self.path)
        lines = read_manifest(self.path)
        self.entries = tuple(line for line in lines if isinstance(line, Entry))
        self.skipped = tuple(line for line in lines if isinstance(line, Skipped))
        for entry in self.entries:
            self._check_entry(entry)
        self._check_totals()

    def __iter__(self) -> Iterator[Part]:
        return self.parts()

    def __len__(self) -> int:
        """Prompts."""
        return len(self.entries)

    @property
    def complete(self) -> bool:
        """False for a trace whose writing was interrupted; the prompts that are there are whole all the same."""
        return self.header.complete is not None

    @property
    def rows(self) -> int:
        return sum(entry.rows for entry in self.entries)

    @property
    def domains(self) -> tuple[str, ...]:
        """In order of appearance."""
        return tuple(dict.fromkeys(entry.domain for entry in self.entries))

    def parts(
        self,
        *,
        domains: Collection[str] | None = None,
        prompts: Collection[str] | None = None,
        phases: Collection[str] | None = None,
        layers: Collection[int] | None = None,
        order: str = ROUTER,
    ) -> Iterator[Part]:
        """Prompts in manifest order, one in memory at a time; other domains' files are not touched.

        ``phases`` (prefill, decode) and ``layers`` (MoE layers) choose rows. Raises TraceError for a filter that names
        what the trace does not have, and for a part that is not what it should be.
        """
        known("domain", domains, self.domains)
        known("phase", phases, (fmt.PREFILL, fmt.DECODE))
        known("MoE layer", layers, range(self.header.model.layers))
        known("prompt", prompts, {entry.prompt for entry in self.entries} if prompts is not None else ())
        known("order", (order,), ORDERS)
        for entry in self.entries:
            if (domains is None or entry.domain in domains) and (prompts is None or entry.prompt in prompts):
                yield Part(self.path, self.header, entry, self.content, Rows(phases, layers, order))

    def content(self, info: FileInfo) -> bytes:
        """Bytes of a file of the trace. Raises TraceError where they are not those that were written."""
        path = self.path / info.file
        try:
            content = path.read_bytes()
        except OSError as error:
            raise TraceError(f"{path}: cannot be read ({error.strerror})") from None
        if fmt.checksum(content) != info.xxh3:
            raise TraceError(f"{path}: corrupted: its checksum is not the one recorded")
        return content

    def _check_entry(self, entry: Entry) -> None:
        where = self.path / entry.part.file
        if entry.rows != entry.tokens * self.header.model.layers or not entry.decode_tokens <= entry.tokens:
            raise TraceError(
                f"{where}: {entry.rows} rows for {entry.tokens} tokens of {self.header.model.layers} layers"
            )
        if entry.run >= len(self.header.runs):
            raise TraceError(f"{where}: of run {entry.run}; {fmt.HEADER_FILE} has {len(self.header.runs)}")
        if bool(self.header.features) != (entry.features is not None):
            raise TraceError(f"{where}: the trace has features {sorted(self.header.features)}, the prompt others")
        for info in (entry.part, entry.features):
            if info is not None:
                self._check_size(info)

    def _check_size(self, info: FileInfo) -> None:
        path = self.path / info.file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise TraceError(f"{path}: cannot be read ({error.strerror})") from None
        if size != info.bytes:
            raise TraceError(f"{path}: truncated or changed: {size:,} bytes, not {info.bytes:,}")

    def _check_totals(self) -> None:
        totals = self.header.complete
        if totals is not None and (totals.prompts, totals.rows) != (len(self.entries), self.rows):
            message = (
                f"{len(self.entries)} prompts and {self.rows} rows; the trace has {totals.prompts} and {totals.rows}"
            )
            raise TraceError(f"{self.path / fmt.MANIFEST_FILE}: truncated: {message}")
