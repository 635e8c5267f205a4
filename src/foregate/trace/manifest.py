"""``manifest.jsonl``: the prompts of a trace, a line each, in the order in which they were finished.

A prompt is in the trace when, and only when, its line ends in a newline. What lies beside it in the directory without
a line is the rest of an interrupted write.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from foregate.errors import TraceError
from foregate.trace import format as fmt
from foregate.trace.durable import named, write_all
from foregate.trace.fields import Fields


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file of the trace: its path relative to the trace, its bytes and their xxh3 (128 bits)."""

    file: str
    bytes: int
    xxh3: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A traced prompt: ``tokens`` x layers = ``rows``. ``content`` is the hash of the prompt's own token ids.

    ``decode_tokens`` of the tokens follow the prompt. ``run`` is an index into the header's runs.
    """

    prompt: str
    domain: str
    rows: int
    tokens: int
    decode_tokens: int
    content: str
    run: int
    part: FileInfo
    features: FileInfo | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A prompt that was left out for good, and why."""

    prompt: str
    skipped: str


Line = Entry | Skipped


class Manifest:
    """The manifest of a trace that is being written. While it is open, no second writer can open it."""

    def __init__(self, directory: Path) -> None:
        """Open or create; cuts off a last line that a crash left unfinished. Raises TraceError if it is in use."""
        path = self._path = directory / fmt.MANIFEST_FILE
        with named(path):
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock(directory)
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            self.lines = parse_lines(content[:whole], path)
            self.prompts = {line.prompt for line in self.lines}
            os.ftruncate(self._handle, whole)
            os.fsync(self._handle)
        except BaseException:
            os.close(self._handle)
            raise

    @property
    def entries(self) -> list[Entry]:
        return [line for line in self.lines if isinstance(line, Entry)]

    def append(self, line: Line) -> None:
        """Add ``line``. It survives a crash once this returns. Raises TraceError where the disk is full."""
        before = os.fstat(self._handle).st_size
        with named(self._path):
            try:
                write_all(self._handle, (json.dumps(asdict(line), ensure_ascii=False) + "\n").encode())
                os.fsync(self._handle)
            except OSError:
                os.ftruncate(self._handle, before)  # half a line, as on a full disk, would spoil the next one
                raise
        self.lines.append(line)
        self.prompts.add(line.prompt)

    def close(self) -> None:
        """Let the next writer in."""
        os.close(self._handle)

    def _lock(self, directory: Path) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TraceError(f"{directory}: another process is writing this trace") from None


def read_manifest(directory: Path) -> list[Line]:
    """Every finished line. Raises TraceError with file and line number."""
    path = directory / fmt.MANIFEST_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_lines(content[: content.rfind(b"\n") + 1], path)


def parse_lines(content: bytes, path: Path) -> list[Line]:
    """The lines of ``content``, which ends in a newline or is empty. Refuses a prompt that is there twice."""
    lines: list[Line] = []
    seen: set[str] = set()
    for number, text in enumerate(content.split(b"\n")[:-1], 1):
        line = _parse(text, f"{path}:{number}")
        if line.prompt in seen:
            raise TraceError(f"{path}:{number}: prompt {line.prompt!r} is there twice")
        seen.add(line.prompt)
        lines.append(line)
    return lines


def _parse(text: bytes, where: str) -> Line:
    try:
        fields = Fields(json.loads(text), where)
    except ValueError as error:
        raise TraceError(f"{where}: corrupted: not JSON ({error})") from None
    if "skipped" in fields:
        return Skipped(fields.text("prompt"), fields.text("skipped"))
    return Entry(
        prompt=fields.text("prompt"),
        domain=fields.text("domain"),
        rows=fields.count("rows"),
        tokens=fields.count("tokens"),
        decode_tokens=fields.count("decode_tokens"),
        content=fields.text("content"),
        run=fields.count("run"),
        part=_file(fields.sub("part")),
        features=_file(fields.sub("features")) if "features" in fields else None,
    )


def _file(fields: Fields) -> FileInfo:
    name = fields.text("file")
    if name.startswith("/") or ".." in Path(name).parts:
        raise TraceError(f"{fields.where}: file {name!r} leads out of the trace")
    return FileInfo(name, fields.count("bytes"), fields.text("xxh3"))
