"""One tracing session: prompts through a model, each durable when it is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import xxhash

from foregate.config import SamplingConfig
from foregate.errors import PromptError, TraceError
from foregate.trace.header import Header
from foregate.trace.models import TracedModel
from foregate.trace.record import PromptRecord
from foregate.trace.tracker import RouterTracker
from foregate.trace.writer import TraceWriter


class Ask(Protocol):
    """A prompt of a data set."""

    @property
    def id(self) -> str: ...
    @property
    def domain(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def reference(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Task:
    """How every prompt is routed. With ``teacher_forced``, over its reference instead of what the model says."""

    sampling: SamplingConfig
    teacher_forced: bool = False

    def sampling_of(self, prompt: str) -> SamplingConfig:
        """A seed of its own for every prompt, so that it does not matter which were traced before."""
        seed = xxhash.xxh3_64_intdigest(prompt.encode(), seed=self.sampling.seed) >> 1
        return replace(self.sampling, seed=seed)


@dataclass(slots=True)
class Progress:
    """``done`` of ``total`` prompts are in the trace or were skipped, ``before`` of them by earlier sessions."""

    total: int
    before: int
    done: int = 0
    tokens: int = 0
    skipped: int = 0
    stopped: bool = False


def run_session(
    model: TracedModel,
    tracker: RouterTracker,
    prompts: Sequence[Ask],
    writer: TraceWriter,
    task: Task,
    header: Callable[[], Header],
    *,
    on_done: Callable[[Progress], Any] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> Progress:
    """Trace all ``prompts`` that ``writer`` does not have; ``stop`` is asked before each. ``tracker`` is attached.

    ``header`` is called after the first prompt. A prompt that does not fit the model is skipped, and noted. Raises
    TraceError where all were skipped.
    """
    todo = [prompt for prompt in prompts if prompt.id not in writer.done]
    progress = Progress(len(prompts), len(prompts) - len(todo), len(prompts) - len(todo))
    begun = False
    for prompt in todo:
        if stop():
            progress.stopped = True
            return progress
        record = _route(model, tracker, prompt, task, writer)
        if record is not None and not begun:
            writer.begin(header())
            begun = True
        if record is not None:
            writer.add(record)
        progress.done += 1
        progress.tokens += record.tokens if record is not None else 0
        progress.skipped += record is None
        on_done(progress)
    if writer.header is None:
        raise TraceError(
            f"{writer.directory}: none of the {len(prompts)} prompts could be traced: {writer.why_skipped}"
        )
    writer.finish()
    return progress


def _route(
    model: TracedModel, tracker: RouterTracker, prompt: Ask, task: Task, writer: TraceWriter
) -> PromptRecord | None:
    """The record of one prompt; None where it cannot be traced, which is noted."""
    try:
        ids = model.encode(prompt.text)
    except PromptError as error:
        writer.skip(prompt.id, str(error))
        return None
    tracker.clear()
    if task.teacher_forced:
        room = min(task.sampling.max_new_tokens, model.context - len(ids))
        model.force(ids + model.encode_more(prompt.reference)[:room])
    else:
        model.generate(ids, task.sampling_of(prompt.id))
    return tracker.take(prompt.id, prompt.domain, prompt_tokens=len(ids))


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM does not kill: the function given tells whether it has come. Only in the main thread."""
    came = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
