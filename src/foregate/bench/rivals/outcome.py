"""The tokens a rival is given, and the one line of JSON in which it says what came of them.

Nothing heavy is imported: this runs inside the rival's process, whose memory counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

from foregate.errors import ConfigError

Feed = Callable[[list[int]], int]
"""Runs tokens after those before them; returns the id of the most likely next token."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """``prompt`` is given at once, then ``stream`` one token at a time, whatever the model would have chosen."""

    prompt: list[int]
    stream: list[int]

    @property
    def context(self) -> int:
        return len(self.prompt) + len(self.stream)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a rival measured about itself. Seconds, milliseconds, bytes; ``argmax`` has one id more than the stream.

    ``ttft_s`` is from the prompt's start to its last logits, the model being loaded; loading is ``load_s``. Bytes read
    are those that the kernel fetched from the disk for this process (/proc/self/io), read-ahead included.
    """

    rival: str
    version: str
    load_s: float
    ttft_s: float
    tpot_ms: list[float]
    read_bytes: int
    load_read_bytes: int
    prefill_read_bytes: int
    decode_read_bytes: int
    peak_rss_bytes: int
    argmax: list[int]
    settings: dict[str, Any]

    def line(self) -> str:
        return json.dumps(asdict(self))


def read_tokens(path: Path) -> Tokens:
    """``{"prompt": [ids], "stream": [ids]}``. Raises ConfigError naming the file."""
    try:
        content = json.loads(path.read_bytes())
        given = Tokens(_ids(content["prompt"]), _ids(content["stream"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a file of tokens ({error!r})") from error
    if not given.prompt:
        raise ConfigError(f"{path}: the prompt is empty")
    return given


def _ids(values: Iterable[Any]) -> list[int]:
    ids = list(values)
    if not all(isinstance(value, int) and value >= 0 for value in ids):
        raise ValueError("token ids are integers from 0 on")
    return ids


def measure(tokens: Tokens, load: Callable[[], Feed], *, rival: str, version: str, settings: dict[str, Any]) -> Outcome:
    """Load, feed the prompt, feed the stream token by token, and time each."""
    at_start, began = read_bytes(), perf_counter()
    feed = load()
    loaded, loaded_at = read_bytes(), perf_counter()
    argmax = [feed(tokens.prompt)]
    prefilled, moments = read_bytes(), [perf_counter()]
    for token in tokens.stream:
        argmax.append(feed([token]))
        moments.append(perf_counter())
    return Outcome(
        rival=rival,
        version=version,
        load_s=loaded_at - began,
        ttft_s=moments[0] - loaded_at,
        tpot_ms=[(after - before) * 1e3 for before, after in pairwise(moments)],
        read_bytes=read_bytes() - at_start,
        load_read_bytes=loaded - at_start,
        prefill_read_bytes=prefilled - loaded,
        decode_read_bytes=read_bytes() - prefilled,
        peak_rss_bytes=peak_rss(),
        argmax=argmax,
        settings=settings,
    )


def read_bytes() -> int:
    """Bytes fetched from block devices for this process so far, all threads."""
    return _field(Path("/proc/self/io"), "read_bytes")


def peak_rss() -> int:
    """Most bytes resident at a time, mapped pages of files included. Not getrusage's, which remembers the parent's."""
    return _field(Path("/proc/self/status"), "VmHWM") * 1024


def _field(file: Path, name: str) -> int:
    for line in file.read_text().splitlines():
        found, _, value = line.partition(":")
        if found == name:
            return int(value.split()[0])
    raise ConfigError(f"{file} has no {name}: this kernel does not account for it")
