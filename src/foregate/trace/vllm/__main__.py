"""``python -m foregate.trace.vllm MODEL --dataset NAME|FILE --out DIR``: run inside an environment that has vLLM."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foregate.config import SamplingConfig, parse_budget
from foregate.datasets.catalogue import NAMES, open_dataset
from foregate.errors import ConfigError, ForegateError
from foregate.trace.session import Progress, sigterm_noted
from foregate.trace.vllm.engine import TEMPLATES
from foregate.trace.vllm.recording import Options, record

_SAMPLING, _OPTIONS = SamplingConfig(), Options()


def parser() -> argparse.ArgumentParser:
    """The command line; defaults are those of the functions it calls."""
    found = argparse.ArgumentParser(prog="python -m foregate.trace.vllm", description="Trace a model under real vLLM.")
    add = found.add_argument
    add("model", help="directory, hub id, or 'reference' (built in)")
    add("--dataset", required=True, help=f"one of {', '.join(NAMES)}; a file; or a hub id")
    add("--out", required=True, type=Path, help="directory of the new trace")
    add("--data-dir", type=Path, help="directory with local copies of known data sets")
    add("--split", help="split of the data set (test)")
    add("--domain", help="domain to note for prompts of a file")
    add("--limit", type=int, help="trace the first N prompts only")
    add("--max-new-tokens", type=int, default=_SAMPLING.max_new_tokens, help="tokens after each prompt at most")
    add("--temperature", type=float, default=_SAMPLING.temperature, help="0 is greedy")
    add("--seed", type=int, default=_SAMPLING.seed, help="of the sampling, and of synthetic prompts")
    add("--chat-template", choices=TEMPLATES, default=_OPTIONS.chat_template, help="use the model's, if it has one")
    add("--scores", action="store_true", help="keep the logits of all experts")
    add("--timings", action="store_true", help="keep the time of each part of each layer")
    add("--dtype", default=_OPTIONS.dtype, help="auto, float32, bfloat16 or float16, as vLLM takes it")
    add("--batch", type=int, default=_OPTIONS.batch, help="requests at a time at most")
    add("--kv-cache", default="256MiB", help="memory for keys and values, as 256MiB")
    add("--max-model-len", type=int, help="context, if not the model's own")
    add("--tensor-parallel-size", type=int, help="ranks")
    add("--resume", action="store_true", help="continue the trace in --out")
    add("--json", action="store_true", help="one JSON object on stdout at the end")
    return found


def run(given: argparse.Namespace) -> Progress:
    """Do what the command line says. SIGTERM ends after the current group of prompts. Raises ForegateError."""
    if given.limit is not None and given.limit < 1:
        raise ConfigError(f"limit {given.limit!r} must be at least 1")
    data = open_dataset(given.dataset, data_dir=given.data_dir, split=given.split, domain=given.domain, seed=given.seed)
    with sigterm_noted() as stop:
        return record(
            given.model,
            data,
            given.out,
            max_new_tokens=given.max_new_tokens,
            temperature=given.temperature,
            seed=given.seed,
            limit=given.limit,
            resume=given.resume,
            options=_options(given),
            on_done=_tell,
            stop=stop,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 an error of ours, in one line; whatever vLLM raises is shown whole."""
    given = parser().parse_args(arguments)
    # vLLM writes its log to stdout, which is for the result
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        done = run(given)
    except ForegateError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if given.json:
        values: dict[str, Any] = {name: getattr(done, name) for name in done.__dataclass_fields__}
        print(json.dumps({"out": str(given.out), **values}))
    return 0


def _options(given: argparse.Namespace) -> Options:
    cache = parse_budget(given.kv_cache).nbytes
    if cache is None:
        raise ConfigError(f"--kv-cache {given.kv_cache!r} is not a size such as 256MiB")
    wanted = {"max_model_len": given.max_model_len, "tensor_parallel_size": given.tensor_parallel_size}
    return Options(
        dtype=given.dtype,
        batch=given.batch,
        kv_cache_bytes=cache,
        scores=given.scores,
        timings=given.timings,
        chat_template=given.chat_template,
        more={name: value for name, value in wanted.items() if value is not None},
    )


def _tell(done: Progress) -> None:
    print(f"tracing: {done.done} of {done.total} prompts, {done.tokens:,} tokens", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
