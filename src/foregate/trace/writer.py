"""Writes a trace prompt by prompt. What is added is on the disk when ``add`` returns; a kill loses at most one prompt.

Order of one ``add``: feature file, part (each written beside, flushed, renamed), then the line of the manifest. A
prompt exists when its line is whole, so at any moment a trace is a valid trace of the prompts finished by then.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np

from foregate.errors import TraceError
from foregate.trace import format as fmt
from foregate.trace.durable import TEMPORARY, make_directory, sync_directory, write_file
from foregate.trace.header import Header, RunInfo, Totals, read_header
from foregate.trace.manifest import Entry, FileInfo, Manifest, Skipped
from foregate.trace.parquet import encode_part
from foregate.trace.record import PromptRecord
from foregate.trace.tensors import encode_tensors


def check_out(directory: Path, *, resume: bool) -> None:
    """Raises TraceError where ``directory`` cannot become the output: it holds something, and no trace to resume."""
    if directory.exists() and not directory.is_dir():
        raise TraceError(f"{directory} is a file; a trace is a directory")
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    if names == {fmt.MANIFEST_FILE} and not (directory / fmt.MANIFEST_FILE).stat().st_size:
        return  # the beginning of a trace that failed before its first prompt
    if names and not resume:
        raise TraceError(f"{directory} is not empty; give another directory, or --resume to continue the trace in it")
    ours = {fmt.HEADER_FILE, fmt.HEADER_FILE + TEMPORARY, fmt.MANIFEST_FILE, fmt.PARTS, fmt.FEATURES}
    if names - ours or (names and not {fmt.HEADER_FILE, fmt.MANIFEST_FILE} & names):
        raise TraceError(f"{directory} holds {min(names - ours or names)!r}, which is no part of a trace")


class TraceWriter:
    """A trace being written to ``directory``. Not thread-safe; a second writer is refused.

    ``begin`` must come before ``add``; ``header`` is None until then in a new trace. ``close`` without ``finish``
    leaves a trace that can be read, and continued with ``resume``.
    """

    def __init__(self, directory: Path | str, *, resume: bool = False) -> None:
        """Raises TraceError where ``directory`` holds anything (unless it is a trace, and ``resume``), or is in use."""
        self.directory = Path(directory)
        check_out(self.directory, resume=resume)
        make_directory(self.directory)
        self._manifest = Manifest(self.directory)
        try:
            self.header: Header | None = self._existing()
            self._sweep()
        except BaseException:
            self._manifest.close()
            raise
        self._run = 0

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def done(self) -> set[str]:
        """Prompts that need no more work: traced, or skipped for good."""
        return self._manifest.prompts

    @property
    def entries(self) -> list[Entry]:
        """Prompts traced so far."""
        return self._manifest.entries

    @property
    def why_skipped(self) -> str:
        """The reason of the first prompt that was left out; empty where none was."""
        return next((line.skipped for line in self._manifest.lines if isinstance(line, Skipped)), "")

    def begin(self, header: Header) -> None:
        """Say what the rows hold; the last of ``header.runs`` is this run. The header is on disk when this returns.

        Raises TraceError where an existing trace is of another model, has other columns, or is of other work.
        """
        run = header.runs[-1]
        if self.header is None:
            self._run = 0
            self._save(header)
            return
        self.check_same(header.model.fingerprint, run)
        if header.layout != self.header.layout:
            raise TraceError(f"{self.directory} has other columns, features or numbers of experts than what is to come")
        self._run = self._add_run(run)

    def check_same(self, fingerprint: str, run: RunInfo) -> None:
        """Raises TraceError where an existing trace is of another model than ``fingerprint``, or of other work."""
        if self.header is None:
            return
        if self.header.model.fingerprint != fingerprint:
            there = self.header.model
            raise TraceError(f"{self.directory} is a trace of {there.name} ({there.fingerprint}), not of {fingerprint}")
        if not self.header.runs[-1].same_work(run):
            raise TraceError(f"{self.directory} was begun {_difference(self.header.runs[-1], run)}")

    def add(self, record: PromptRecord) -> None:
        """Write one prompt. Raises TraceError where it is there already or does not fit."""
        if self.header is None:
            raise TraceError(f"{self.directory}: nothing can be added before begin()")
        if record.prompt in self.done:
            raise TraceError(f"{self.directory}: prompt {record.prompt!r} is there already")
        stem = fmt.part_stem(record.prompt)
        part = encode_part(record, self.header)
        features = self._features(record)
        feature_file = self._write(f"{fmt.FEATURES}/{stem}.safetensors", features) if features else None
        part_file = self._write(f"{fmt.PARTS}/{stem}.parquet", part)
        self._manifest.append(_entry(record, self.header, self._run, part_file, feature_file))

    def adopt(self, entry: Entry, part: bytes, features: bytes | None) -> None:
        """Add a prompt whose files exist already, of a trace with the same layout; ``entry.run`` is of this trace."""
        if features is not None and entry.features is not None:
            self._write(entry.features.file, features)
        self._write(entry.part.file, part)
        self._manifest.append(entry)

    def skip(self, prompt: str, reason: str) -> None:
        """Note that ``prompt`` is left out for good."""
        self._manifest.append(Skipped(prompt, reason))

    def finish(self) -> None:
        """Every prompt is there: say so in the header. Does nothing where nothing was ever added."""
        if self.header is not None:
            rows = sum(entry.rows for entry in self.entries)
            self._save(replace(self.header, complete=Totals(len(self.entries), rows)))

    def close(self) -> None:
        """Let go of the directory."""
        self._manifest.close()

    def _existing(self) -> Header | None:
        if not (self.directory / fmt.HEADER_FILE).exists():
            if self._manifest.entries:
                raise TraceError(f"{self.directory / fmt.HEADER_FILE}: file is missing")
            return None
        return read_header(self.directory)

    def _sweep(self) -> None:
        """Delete what an interrupted write left behind: everything that no line of the manifest names."""
        known = {info.file for entry in self.entries for info in (entry.part, entry.features) if info}
        for name in (fmt.PARTS, fmt.FEATURES):
            folder = self.directory / name
            rest = [path for path in folder.iterdir() if f"{name}/{path.name}" not in known] if folder.is_dir() else []
            finished = [path for path in rest if path.suffix != TEMPORARY]
            if len(finished) > 1:  # an interrupted write leaves one; more are somebody's traces
                raise TraceError(
                    f"{finished[0]} and {len(finished) - 1} more are not in {fmt.MANIFEST_FILE}: cut short?"
                )
            for path in rest:
                path.unlink()
            if rest:
                sync_directory(folder)
        (self.directory / (fmt.HEADER_FILE + TEMPORARY)).unlink(missing_ok=True)

    def _add_run(self, run: RunInfo) -> int:
        """The index of ``run``: that of the last one if only the clock has moved, else of a new one."""
        assert self.header is not None
        runs = self.header.runs
        if dict(runs[-1].software) != dict(run.software):
            runs = (*runs, run)
        if runs != self.header.runs or self.header.complete:
            self._save(replace(self.header, runs=runs, complete=None))
        return len(runs) - 1

    def _save(self, header: Header) -> None:
        write_file(self.directory / fmt.HEADER_FILE, header.to_json())
        self.header = header

    def _features(self, record: PromptRecord) -> bytes | None:
        if not record.features:
            return None
        assert self.header is not None
        rows = {name: values.reshape(-1, values.shape[-1]) for name, values in record.features.items()}
        return encode_tensors(
            rows, {"format": fmt.VERSION, "model": self.header.model.fingerprint, "prompt": record.prompt}
        )

    def _write(self, file: str, content: bytes) -> FileInfo:
        path = self.directory / file
        make_directory(path.parent)
        write_file(path, content)
        return FileInfo(file, len(content), fmt.checksum(content))


def _entry(record: PromptRecord, header: Header, run: int, part: FileInfo, features: FileInfo | None) -> Entry:
    decode = np.asarray(record.decode, dtype=bool)
    asked = np.asarray(record.token_ids)[np.full_like(decode, decode.all()) | ~decode]
    return Entry(
        prompt=record.prompt,
        domain=record.domain,
        rows=record.tokens * header.model.layers,
        tokens=record.tokens,
        decode_tokens=int(decode.sum()),
        content=fmt.content_hash(asked),
        run=run,
        part=part,
        features=features,
    )


def _difference(there: RunInfo, here: RunInfo) -> str:
    """The first thing in which two runs differ, in words."""
    for name in ("source", "seed", "dataset", "settings"):
        old, new = getattr(there, name), getattr(here, name)
        if old != new and isinstance(old, dict):
            key = next(key for key in sorted({*old, *new}) if old.get(key) != new.get(key))
            return f"with {name} {key} {old.get(key)!r}, not {new.get(key)!r}; resume it in the same way"
        if old != new:
            return f"with {name} {old!r}, not {new!r}; resume it in the same way"
    raise AssertionError("the runs do not differ")
