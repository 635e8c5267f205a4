"""All candidates, one after another or on several processes. Nothing is shared between them but the files."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from foregate.errors import ConfigError, ForegateError
from foregate.evaluation.candidates import Candidate
from foregate.evaluation.judge import Bench, Judged
from foregate.evaluation.provenance import provenance
from foregate.evaluation.settings import Settings

_bench: Bench | None = None


def judge_all(
    bench: Bench, chosen: Sequence[Candidate], jobs: int, done: Callable[[str], None] = lambda name: None
) -> tuple[dict[str, Judged], dict[str, str]]:
    """Results by name, in the order of ``chosen``, and why the others have none: a trace may lack what they look at.

    ``done`` is told of each. Raises ForegateError for what is wrong with the files themselves.
    """
    found: dict[str, Judged | str] = {}
    if jobs < 1:
        raise ConfigError(f"jobs {jobs} must be at least 1")
    for candidate in chosen:  # before the work, not in the midst of it
        provenance(candidate, bench.held)
    if jobs == 1 or len(chosen) == 1:
        for candidate in chosen:
            found[candidate.name] = _judge(bench, candidate)
            done(candidate.name)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, _open, (bench.settings,)) as pool:
            waiting = {pool.submit(_judge_here, candidate): candidate.name for candidate in chosen}
            for future in as_completed(waiting):
                found[waiting[future]] = future.result()
                done(waiting[future])
    results = {c.name: found[c.name] for c in chosen}
    judged = {name: value for name, value in results.items() if isinstance(value, Judged)}
    return judged, {name: value for name, value in results.items() if isinstance(value, str)}


def _open(settings: Settings) -> None:
    global _bench
    torch.set_num_threads(1)
    _bench = Bench(settings)


def _judge_here(candidate: Candidate) -> Judged | str:
    assert _bench is not None
    return _judge(_bench, candidate)


def _judge(bench: Bench, candidate: Candidate) -> Judged | str:
    try:
        return bench.judge(candidate)
    except ConfigError as error:
        return str(error)
    except ForegateError as error:
        raise type(error)(f"{candidate.name}: {error}") from error
