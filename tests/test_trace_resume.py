"""A kill at any moment loses no finished prompt and doubles none; SIGTERM ends after the prompt in hand.

Run as a script, this file is the process that gets killed: torch and the model are loaded once, then a child is forked
for every life, so twenty kills do not cost twenty imports.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from foregate.trace.reader import TraceReader
from foregate.trace.writer import TraceWriter
from test_trace_records import make_header, make_record

KILLS = 20
LIFE = 8
"""Prompts that a life may last, on average twice as many as it does."""

Tiny = Callable[[str], Path]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@contextmanager
def killed_at(call: int) -> Iterator[list[str]]:
    """Inside, the ``call``-th system call that changes the disk does not happen (a write: half of it does)."""
    names = ("open", "write", "fsync", "replace", "mkdir", "unlink", "ftruncate")
    real = {name: getattr(os, name) for name in names}
    seen: list[str] = []

    def wrap(name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not str(args[0]).startswith("/dev"):
                seen.append(name)
            if len(seen) == call:
                if name == "write":
                    real["write"](args[0], bytes(args[1])[: len(args[1]) // 2])
                raise Killed
            return real[name](*args, **kwargs)

        return run

    for name in names:
        setattr(os, name, wrap(name))
    try:
        yield seen
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def test_a_kill_between_any_two_system_calls(tmp_path: Path) -> None:
    from foregate.trace.header import FeatureInfo

    header = make_header(features={"residual": FeatureInfo("float16", (3,), (0, 1, 2))})
    records = [make_record(header, f"code/{number}") for number in range(3)]

    def live(path: Path) -> None:
        with TraceWriter(path, resume=True) as writer:
            begun = False
            for record in records:
                if record.prompt not in writer.done:
                    if not begun:
                        writer.begin(header)
                    begun = True
                    writer.add(record)
            writer.finish()

    call, died = 0, True
    while died:
        call += 1
        path = tmp_path / str(call)
        with killed_at(call) as seen:
            try:
                live(path)
                died = False
            except Killed:
                died = True
        before = readable(path)
        live(path)
        check_whole(path, [record.prompt for record in records])
        assert readable(path)[: len(before)] == before
    assert len(seen) > 40
    assert {"write", "fsync", "replace", "open", "mkdir"} <= set(seen)


def readable(path: Path) -> list[tuple[str, bytes]]:
    """Prompts that can be read at this moment, with their experts; none where the trace has not even begun."""
    if not (path / "trace.json").exists():
        assert not list(path.glob("parts/*"))
        return []
    return [(part.prompt, part.experts.tobytes()) for part in TraceReader(path)]


def check_whole(path: Path, prompts: list[str]) -> None:
    """Exactly ``prompts``, each once, and not a file too many."""
    reader = TraceReader(path)
    assert reader.complete
    assert sorted(part.prompt for part in reader) == sorted(prompts)
    files = {info.file for entry in reader.entries for info in (entry.part, entry.features) if info}
    assert {
        f"{file.parent.name}/{file.name}" for folder in ("parts", "features") for file in (path / folder).glob("*")
    } == files


def test_twenty_kills_of_a_tracing_process(tiny: Tiny, tmp_path: Path) -> None:
    """Real SIGKILLs at random moments; then the trace is that of a process that was left alone."""
    done = subprocess.run(
        [sys.executable, __file__, str(tiny("qwen3_moe")), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kills"] == KILLS
    assert told["lives_with_progress"] >= KILLS // 3
    names = [f"p/{number}" for number in range(told["prompts"])]
    check_whole(tmp_path / "killed", names)
    check_whole(tmp_path / "alone", names)
    alone = {part.prompt: part for part in TraceReader(tmp_path / "alone")}
    for part in TraceReader(tmp_path / "killed"):
        assert np.array_equal(part.experts, alone[part.prompt].experts)
        assert np.array_equal(part.weights, alone[part.prompt].weights)
        assert np.array_equal(part.token_id, alone[part.prompt].token_id)
    assert 2 <= told["stopped_after"] < told["prompts"]
    check_whole(tmp_path / "stopped", names)


def main(model_path: str, out: str) -> None:
    """Kill a tracing child KILLS times, let the last one finish; then trace undisturbed; then stop one by SIGTERM."""
    import torch
    from transformers import AutoModelForCausalLM

    from foregate.config import SamplingConfig
    from foregate.datasets.prompt import Prompt
    from foregate.engine.model import load_tokenizer
    from foregate.engine.sampler import Sampler
    from foregate.trace.header import RunInfo
    from foregate.trace.models import ResidentModel
    from foregate.trace.session import Task, run_session, sigterm_noted
    from foregate.trace.tracker import RouterTracker

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    tokenizer = load_tokenizer(Path(model_path))
    resident = ResidentModel(
        model, tokenizer, lambda text: list(tokenizer(text)["input_ids"]), 256, lambda config: Sampler(config).choose
    )
    prompts = [Prompt(f"p/{number}", "test", f"prompt number {number} of many") for number in range(2000)]
    run = RunInfo("resident", {}, 0, {}, {}, "now")

    def live(path: Path, limit: int) -> None:
        with (
            sigterm_noted() as stop,
            TraceWriter(path, resume=True) as writer,
            RouterTracker(model, features=["router_input"]) as tracker,
        ):
            task = Task(SamplingConfig(max_new_tokens=4, temperature=0.8))
            run_session(resident, tracker, prompts[:limit], writer, task, lambda: tracker.header(run), stop=stop)

    def born(path: Path, limit: int) -> int:
        child = os.fork()
        if child == 0:
            live(path, limit)
            os._exit(0)
        return child

    def ends_well(path: Path, limit: int) -> None:
        assert os.waitpid(born(path, limit), 0)[1] == 0

    # Whatever the first prompt imports is imported here, once. One thread: nothing that a fork would lose.
    live(Path(out) / "warm", 1)
    began = time.perf_counter()
    live(Path(out) / "warm", 9)
    pace = (time.perf_counter() - began) / 8
    chance = random.Random(7)
    told = {"kills": 0, "lives_with_progress": 0}
    path = Path(out) / "killed"
    before: list[Any] = []
    while told["kills"] < KILLS:
        child = born(path, len(prompts))
        time.sleep(chance.uniform(0, LIFE * pace))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        after = readable(path)
        assert after[: len(before)] == before, "a finished prompt was lost or changed"
        told["kills"] += 1
        told["lives_with_progress"] += len(after) > len(before)
        before = after
    told["prompts"] = len(before) + 4
    ends_well(path, told["prompts"])
    ends_well(Path(out) / "alone", told["prompts"])

    path = Path(out) / "stopped"
    child = born(path, len(prompts))
    while len(readable(path)) < 2:
        time.sleep(pace)
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == 0, "SIGTERM must not kill"
    told["stopped_after"] = len(readable(path))
    assert not TraceReader(path).complete
    told["prompts"] = max(told["prompts"], told["stopped_after"] + 1)
    for name in ("stopped", "killed", "alone"):
        ends_well(Path(out) / name, told["prompts"])
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
