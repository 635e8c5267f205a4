"""Rivals made ready, and one run of one of them under the memory limit of our own arms (docs/rivals.md)."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foregate.bench.arms import RESIDENT, RIVAL
from foregate.bench.rivals.pagecache import drop
from foregate.bench.rivals.readahead import USUAL_KIB, read_ahead
from foregate.bench.rivals.rival import Rival
from foregate.bench.usage import gauged
from foregate.checkpoint.locate import locate
from foregate.checkpoint.opening import Checkpoint, open_checkpoint
from foregate.errors import ConfigError, ForegateError
from foregate.testing.cgroup import Limits, confined

MAPPED = ("llama.cpp",)
"""Their weights are the page cache, so with enough of it they are compared with our all-resident arm; then they run
``--warm``, as that arm does."""

BITS = {"bf16": "bf16", "Q8_0": "int8"}
"""How a rival's ``FORMAT`` begins → our format with the same bits a weight (but for Q8_0's scales)."""

SHORT = {"airllm": 2}
"""Tokens of the stream, and then one round only: seconds to minutes a token."""

TIMEOUT_S = 1800

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Lineup:
    """``ready``: name → the rival and what it runs from. ``absent``: name → why it does not run."""

    ready: Mapping[str, tuple[Rival, Path]] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)

    def weight_bytes(self, name: str) -> int:
        """Size of the weight files of ``name``."""
        rival, prepared = self.ready[name]
        return sum(file.stat().st_size for file in rival.files(prepared))

    def arms(self, *, resident: bool, warm: bool = False) -> list[tuple[str, str, bool]]:
        """(name of the arm, rival, whether everything fits); the latter only where our all-resident arm runs too.

        ``warm``: the cell has room for everything, so mapped weights run at their full size only.
        """
        found = [(RIVAL + name, name, False) for name in self.ready if not (warm and name in MAPPED)]
        full = resident or warm
        return found + [(f"{RIVAL}{name}:{RESIDENT}", name, True) for name in self.ready if full and name in MAPPED]

    def as_dict(self, ours: str = "") -> dict[str, Any]:
        """JSON form: who ran with which weights, and who did not and why. ``ours``: the format of our experts."""
        ran = {
            name: {"runs": True, "format": rival.FORMAT, "same_bits": BITS.get(rival.FORMAT.split(",")[0]) == ours}
            for name, (rival, _) in self.ready.items()
        }
        return {**ran, **{name: {"runs": False, "reason": why} for name, why in self.absent.items()}}


def parse_rivals(text: str, known: Mapping[str, Rival]) -> list[str]:
    """Names with commas between. Raises ConfigError for one that is not known."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in known:
            raise ConfigError(f"no rival {name!r}; choose from: {', '.join(known)}")
    if not names:
        raise ConfigError(f"rivals {text!r} names none")
    return names


def rivals_source(model: str, given: str | None) -> Checkpoint:
    """The original checkpoint that rivals read: ``model`` itself, or ``given``, of which it was packed.

    Raises ConfigError.
    """
    ours = open_checkpoint(locate(model))
    if given is None:
        if ours.packed:
            raise ConfigError(f"{model} is a pack, which no rival reads: give its original with --rivals-model")
        return ours
    theirs = open_checkpoint(locate(given))
    if theirs.packed:
        raise ConfigError(f"--rivals-model {given} is a pack, which no rival reads: give the original checkpoint")
    if theirs.fingerprint != ours.fingerprint:
        raise ConfigError(f"--rivals-model {given} is another model than {model}: their fingerprints differ")
    return theirs


def line_up(names: Sequence[str], source: Checkpoint, work_dir: Path, known: Mapping[str, Rival], say: Say) -> Lineup:
    """Whoever can run, with its weights in ``work_dir``, in a folder named after the checkpoint's fingerprint."""
    place = work_dir / source.fingerprint
    ready: dict[str, tuple[Rival, Path]] = {}
    absent: dict[str, str] = {}
    for name in names:
        say(f"rival {name}")
        rival = known[name]
        why = rival.available()
        try:
            if why is None:
                place.mkdir(parents=True, exist_ok=True)
                ready[name] = rival, rival.prepare(source.directory, place, _percent(name, say))
        except (ForegateError, OSError) as error:
            why = str(error)
        if why is not None:
            absent[name] = why
    return Lineup(ready, absent)


def default_work_dir() -> Path:
    """Where prepared weights are kept: the XDG cache directory."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "foregate" / "rivals"


def stream_for(name: str, token_ids: Sequence[int]) -> list[int]:
    """The tokens that ``name`` is fed after the prompt: those that our decode steps were fed."""
    return list(token_ids[:-1][: SHORT.get(name, len(token_ids))])


def run_rival(
    rival: Rival,
    prepared: Path,
    tokens: Mapping[str, list[int]],
    limits: Limits,
    *,
    cgroup: str,
    threads: int,
    warm: bool = False,
) -> dict[str, Any]:
    """One run: its ``Outcome`` as a dict, ``peak_bytes`` of the group and what it ``uses``. The start is cold.

    ``warm``: everything once before, not counted. Raises ForegateError saying why not.
    """
    with tempfile.TemporaryDirectory() as folder, read_ahead(prepared, USUAL_KIB), confined(limits, cgroup) as box:
        file = Path(folder) / "tokens.json"
        file.write_text(json.dumps(tokens))
        drop(rival.files(prepared))
        command = box.command([*rival.command(prepared, file, threads), *(["--warm"] if warm else [])])
        try:
            with gauged(box) as usage:
                done = subprocess.run(command, capture_output=True, text=True, preexec_fn=box.join, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise ForegateError(f"gave no answer within {TIMEOUT_S} s") from error
        return {**_outcome(done, limits), "peak_bytes": box.peak_bytes(), "uses": usage.as_dict()}


def _outcome(done: subprocess.CompletedProcess[str], limits: Limits) -> dict[str, Any]:
    if done.returncode in (-9, 137):
        raise ForegateError(f"killed: it needs more than {limits.memory_bytes / 1e9:.2f} GB of memory")
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise ForegateError(f"exit code {done.returncode}: {said[-1] if said else 'it said nothing'}")
    line = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        found = json.loads(line)
        return {name: found[name] for name in NEEDED}
    except (ValueError, KeyError, TypeError) as error:
        raise ForegateError(f"its last line {line[:80]!r} is not the JSON that docs/rivals.md describes") from error


NEEDED = (
    "rival", "version", "load_s", "ttft_s", "tpot_ms", "load_read_bytes", "prefill_read_bytes", "decode_read_bytes",
    "peak_rss_bytes", "argmax", "settings",
)  # fmt: skip
"""Of ``rivals.outcome.Outcome``."""


def _percent(name: str, say: Say) -> Callable[[int, int], None]:
    return lambda done, total: say(f"rival {name}: preparing {done / max(1, total):.0%}")
