"""``record``: prompts through real vLLM into a trace, durable group by group."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foregate.checkpoint.locate import locate
from foregate.checkpoint.manifest import is_pack
from foregate.config import SamplingConfig
from foregate.datasets.prompt import Dataset, Prompt, make_dataset
from foregate.errors import ConfigError, PromptError, TraceError
from foregate.trace.identity import directory_fingerprint
from foregate.trace.session import Progress, Task
from foregate.trace.vllm.engine import TEMPLATES, VllmEngine
from foregate.trace.vllm.identity import header, model_info, run_info
from foregate.trace.vllm.settings import untested_allowed
from foregate.trace.vllm.stopwatch import TIMINGS
from foregate.trace.vllm.versions import check_version
from foregate.trace.writer import TraceWriter, check_out

_SAMPLING = SamplingConfig()


@dataclass(frozen=True, slots=True)
class Options:
    """How vLLM runs. ``batch`` requests at a time; ``dtype`` as vLLM takes it; ``more``: arguments of ``vllm.LLM``."""

    dtype: str = "auto"
    batch: int = 8
    kv_cache_bytes: int = 256 << 20
    scores: bool = False
    timings: bool = False
    chat_template: str = "auto"
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError(f"batch {self.batch!r} must be at least 1")
        if self.chat_template not in TEMPLATES:
            raise ConfigError(f"chat template {self.chat_template!r} is not one of {', '.join(TEMPLATES)}")


def record(
    model: str,
    prompts: Dataset | Sequence[str | Prompt],
    out: Path | str,
    *,
    max_new_tokens: int = _SAMPLING.max_new_tokens,
    temperature: float = _SAMPLING.temperature,
    seed: int = _SAMPLING.seed,
    limit: int | None = None,
    resume: bool = False,
    options: Options | None = None,
    on_done: Callable[[Progress], Any] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> Progress:
    """Generate from ``prompts`` with vLLM and write what every router chose to the trace ``out``.

    ``model`` is a directory, a hub id, or ``reference``. ``limit``: the first so many prompts only. Groups of twice
    ``options.batch`` prompts become durable together; ``stop`` is asked before each. Needs vLLM.
    Raises ForegateError (ConfigError, TraceError, CheckpointError, DatasetError), and whatever vLLM does.
    """
    options = options or Options()
    check_version(untested=untested_allowed(os.environ))
    task = Task(SamplingConfig(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed))
    data = _dataset(prompts)
    check_out(Path(out), resume=resume)
    directory = locate(model)
    if is_pack(directory):
        raise ConfigError(f"{model} is a pack, which vLLM cannot load; give the original checkpoint")
    run = run_info(seed, dict(data.origin), _settings(task, options))
    with TraceWriter(out, resume=resume) as writer:
        writer.check_same(directory_fingerprint(directory), run)
        engine = VllmEngine(
            directory,
            dtype=options.dtype,
            seed=seed,
            batch=options.batch,
            kv_cache_bytes=options.kv_cache_bytes,
            scores=options.scores,
            timings=options.timings,
            more=options.more,
        )
        info = model_info(engine.config, engine.shapes, model if not Path(model).is_dir() else "")
        writer.begin(header(info, run, scores=options.scores, timings=TIMINGS if options.timings else ()))
        return _run(engine, data.prompts[:limit], writer, task, options, on_done, stop)


def _run(
    engine: VllmEngine,
    prompts: Sequence[Prompt],
    writer: TraceWriter,
    task: Task,
    options: Options,
    on_done: Callable[[Progress], Any],
    stop: Callable[[], bool],
) -> Progress:
    todo = [prompt for prompt in prompts if prompt.id not in writer.done]
    before = len(prompts) - len(todo)
    progress = Progress(len(prompts), before, before)
    for group in _groups(todo, 2 * options.batch):
        if stop():
            progress.stopped = True
            return progress
        _trace(engine, group, writer, task, options, progress)
        on_done(progress)
    if not writer.entries:
        raise TraceError(f"{writer.directory}: none of {len(prompts)} prompts could be traced: {writer.why_skipped}")
    writer.finish()
    return progress


def _trace(
    engine: VllmEngine, group: Sequence[Prompt], writer: TraceWriter, task: Task, options: Options, progress: Progress
) -> None:
    """One group: encode, generate, write. A prompt that does not fit the model is skipped, and noted."""
    encoded: list[tuple[Prompt, list[int]]] = []
    for prompt in group:
        try:
            encoded.append((prompt, engine.encode(prompt.text, options.chat_template)))
        except PromptError as error:
            writer.skip(prompt.id, str(error))
            progress.skipped += 1
    sampling = [task.sampling_of(prompt.id) for prompt, _ in encoded]
    found = engine.generate([ids for _, ids in encoded], sampling) if encoded else []
    for (prompt, _), sequence in zip(encoded, found, strict=True):
        writer.add(sequence.to_record(prompt.id, prompt.domain))
        progress.tokens += len(sequence.token_ids)
    progress.done += len(group)


def _groups(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    return (prompts[at : at + size] for at in range(0, len(prompts), size))


def _dataset(prompts: Dataset | Sequence[str | Prompt]) -> Dataset:
    if isinstance(prompts, Dataset):
        return prompts
    named = [
        prompt if isinstance(prompt, Prompt) else Prompt(f"prompt/{number:05d}", "prompts", prompt)
        for number, prompt in enumerate(prompts)
    ]
    return make_dataset("prompts", named, "given")


def _settings(task: Task, options: Options) -> dict[str, Any]:
    """What of the settings a reader of the trace wants to know, and a resumed run must repeat."""
    return {
        "max_new_tokens": task.sampling.max_new_tokens,
        "temperature": task.sampling.temperature,
        "chat_template": options.chat_template,
        "batch": options.batch,
        "vllm": {name: repr(value) for name, value in options.more.items()},
    }
