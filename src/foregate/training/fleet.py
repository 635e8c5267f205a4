"""``foregate train --all``: every method in a process of its own. One that fails does not take the others with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from foregate.errors import ConfigError
from foregate.training import TRAINERS
from foregate.training.run import SUFFIX, Request, find_trainer
from foregate.training.standing import Standing, read

VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "pre-attention-1": ("pre-attention", ("arch=1", "epochs=5")),
    "pre-attention-128": ("pre-attention", ("hidden=128", "epochs=5")),
}
"""Trained beside each method's defaults: name of the file → predictor, options."""

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """One training; ``name`` is that of its files."""

    name: str
    predictor: str
    given: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a job ended. ``error`` is empty where it went well; ``metrics`` are those of the file."""

    name: str
    predictor: str
    seconds: float
    error: str = ""
    metrics: dict[str, Any] | None = None


class FleetBar(Protocol):
    """Told of jobs as they begin, go on and end."""

    def started(self, job: Job) -> None: ...

    def stands(self, job: Job, at: Standing) -> None: ...

    def ended(self, outcome: Outcome) -> None: ...


def jobs(only: Sequence[str], given: Sequence[str], model: str | None = None) -> list[Job]:
    """Every method and variant, or ``only`` those; ``given`` are NAME:key=value. ``model`` is for those that run it.

    Raises ConfigError.
    """
    known = {**{name: (name, ()) for name in TRAINERS.names}, **VARIANTS}
    wanted = list(only) or list(known)
    own: dict[str, list[str]] = {name: [] for name in wanted}
    for name in wanted:
        if name not in known:
            raise ConfigError(f"unknown predictor {name!r} in --only; choose from: {', '.join(known)}")
    for text in given:
        name, colon, option = text.partition(":")
        if not colon or name not in own:
            raise ConfigError(f"--set {text!r}: with --all it is NAME:key=value, NAME one of: {', '.join(own)}")
        own[name].append(option)
    if model is not None:
        running = [name for name in wanted if hasattr(find_trainer(known[name][0]).options, "model")]
        if not running:
            raise ConfigError(f"--model {model}: none of {', '.join(wanted)} runs the model")
        for name in running:
            own[name].append(f"model={model}")
    return [Job(name, known[name][0], (*known[name][1], *own[name])) for name in wanted]


def train_all(
    todo: Sequence[Job], traces: Sequence[Path], out: Path, count: int, threads: int | None, bar: FleetBar
) -> list[Outcome]:
    """Run ``todo``, ``count`` at a time. What was finished before is left as it is; what was interrupted continues."""
    out.mkdir(parents=True, exist_ok=True)
    waiting, ended = list(todo), list[Outcome]()
    running: dict[subprocess.Popen[bytes], tuple[Job, float]] = {}
    threads = threads or max(1, (os.cpu_count() or 1) // count)
    try:
        while waiting or running:
            while waiting and len(running) < count:
                job = waiting.pop(0)
                running[_start(job, traces, out, threads)] = (job, time.monotonic())
                bar.started(job)
            for process in [process for process in running if process.poll() is not None]:
                job, began = running.pop(process)
                ended.append(_outcome(job, out, process.returncode, time.monotonic() - began))
                bar.ended(ended[-1])
            for job, _ in running.values():
                at = read(Request(job.predictor, (), out / f"{job.name}{SUFFIX}").state)
                if at is not None:
                    bar.stands(job, at)
            time.sleep(POLL_SECONDS if running else 0)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return ended


def _start(job: Job, traces: Sequence[Path], out: Path, threads: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "foregate", "train", "--predictor", job.predictor, "--json"]
    command += [part for trace in traces for part in ("--trace", str(trace))]
    command += [part for option in job.given for part in ("--set", option)]
    command += ["--out", str(out / f"{job.name}{SUFFIX}"), "--threads", str(threads)]
    with _log(out, job, "out").open("wb") as stdout, _log(out, job, "err").open("wb") as stderr:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)


def _outcome(job: Job, out: Path, code: int, seconds: float) -> Outcome:
    """From what the process left; its logs stay only where it failed."""
    stdout, stderr = _log(out, job, "out"), _log(out, job, "err")
    if code == 0:
        metrics = json.loads(stdout.read_text().splitlines()[-1])["metrics"]
        stdout.unlink()
        stderr.unlink()
        return Outcome(job.name, job.predictor, round(seconds, 1), metrics=metrics)
    lines = stderr.read_text(errors="replace").strip().splitlines()
    told = lines[-1].removeprefix("error: ") if lines else f"ended with code {code}"
    stdout.unlink()
    return Outcome(job.name, job.predictor, round(seconds, 1), error=told)


def _log(out: Path, job: Job, kind: str) -> Path:
    return out / f"{job.name}.{kind}.log"
