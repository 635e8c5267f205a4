"""``foregate run``: generate text under a memory budget."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from foregate.cli import options
from foregate.cli.explain import explain
from foregate.cli.output import console, print_json, size, two_columns
from foregate.config import LOSSY_MODES, RunConfig, SamplingConfig
from foregate.errors import ConfigError, PromptError
from foregate.experts.policy import POLICIES
from foregate.predictors import choice

if TYPE_CHECKING:
    from foregate.engine.engine import Engine
    from foregate.timeline.recorder import TimelineRecorder

_RUN = RunConfig()
_SAMPLING = SamplingConfig()


class ChatTemplate(str, Enum):
    auto = "auto"
    off = "off"


def run(
    model: options.Model = _RUN.model,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="The prompt.")] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Read the prompt from a file ('-': stdin).")] = None,
    memory_budget: options.MemoryBudget = _RUN.memory_budget,
    predictor: options.Predictor = _RUN.predictor,
    prefetch: options.Prefetch = _RUN.prefetch,
    lookahead: options.Lookahead = _RUN.lookahead,
    cache_policy: options.CachePolicy = _RUN.cache_policy,
    reader_threads: options.ReaderThreads = str(_RUN.reader_threads),
    threads: options.Threads = _RUN.threads,
    lossy: Annotated[
        str | None, typer.Option(help=f"Outputs may differ, for fewer reads: {', '.join(LOSSY_MODES)}. Off by default.")
    ] = _RUN.lossy,
    low_precision_pack: Annotated[
        str | None, typer.Option(help="Pack that low-precision-miss reads misses from (foregate pack --dtype int4).")
    ] = _RUN.low_precision_pack,
    prefill_chunk: Annotated[int, typer.Option(help="Tokens of a prompt computed at once.")] = _RUN.prefill_chunk,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = _SAMPLING.max_new_tokens,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = _SAMPLING.temperature,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; needs a temperature.")] = _SAMPLING.top_p,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = _SAMPLING.seed,
    chat_template: Annotated[
        ChatTemplate, typer.Option(help="Use the model's chat template if it has one.")
    ] = ChatTemplate.auto,
    trace_events: Annotated[
        Path | None, typer.Option(help="Write the run as a timeline for Perfetto and foregate timeline (JSON).")
    ] = None,
    explain_prefetch: Annotated[
        bool, typer.Option("--explain-prefetch", help="On stderr at the end: what was read ahead by layer, and why.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="A table of figures on stderr at the end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of the text.")] = False,
) -> None:
    """Generate text with a Mixture-of-Experts model whose experts need not fit in memory."""
    config = RunConfig(
        model=model,
        memory_budget=memory_budget,
        predictor=choice.check(predictor),
        prefetch=prefetch,
        lookahead=lookahead,
        cache_policy=POLICIES.check(cache_policy),
        reader_threads=reader_threads,
        threads=threads,
        prefill_chunk=prefill_chunk,
        lossy=lossy,
        low_precision_pack=low_precision_pack,
    )
    sampling = SamplingConfig(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    text = read_prompt(prompt, file)
    from foregate.engine.engine import Engine  # torch and transformers take seconds to import; errors above do not wait

    if lossy is not None:
        console().print(f"--lossy {lossy}: outputs may differ from the exact model's; foregate quality measures it")
    with console().status("loading") if console().is_terminal else nullcontext():
        engine = Engine(config)
    with engine, ExitStack() as stack:
        timeline = None if trace_events is None else stack.enter_context(record_timeline(engine, trace_events))
        for step in engine.stream(engine.encode(text, chat_template.value), sampling):
            if not as_json:
                sys.stdout.write(step.text)
                sys.stdout.flush()
        assert engine.report is not None
        report = engine.report.as_dict()
        if timeline is not None:
            timeline.about["report"] = report
    if as_json:
        print_json(report)
    else:
        sys.stdout.write("\n")
    if stats:
        console().print(stats_table(report))
    if explain_prefetch:
        for line in explain(report["prefetch_ledger"], report["controller"]["reason"]):
            console().print(line)


@contextmanager
def record_timeline(engine: Engine, path: Path) -> Iterator[TimelineRecorder]:
    """Write what ``engine`` does to ``path`` until the end."""
    from foregate.timeline.recorder import TimelineRecorder

    about = {"model": engine.config.model, "layers": engine.spec.layers, "budget_bytes": engine.plan.budget_bytes}
    with TimelineRecorder(path, slot_bytes=engine.plan.slot_bytes, about=about) as timeline:
        stop = engine.listen(timeline)
        try:
            yield timeline
        finally:
            stop()


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from exactly one of: the option, a file, stdin. Raises PromptError or ConfigError."""
    if prompt is not None and file is not None:
        raise ConfigError(f"give a prompt or a file, not both: {prompt!r} and {file}")
    if prompt is None:
        prompt = _read_file(file)
    if not prompt.strip():
        raise PromptError("the prompt is empty")
    return prompt


def _read_file(file: Path | None) -> str:
    if file is None or str(file) == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise PromptError("no prompt: give -p PROMPT, -f FILE, or pipe it into stdin")
        return _text(sys.stdin.read, "stdin")
    return _text(lambda: file.read_text(encoding="utf-8"), str(file))


def _text(read: Callable[[], str], place: str) -> str:
    try:
        return read()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read the prompt from {place}: {error}") from error


def stats_table(report: dict[str, Any]) -> Table:
    """Speed, hits, bytes, stalls and memory of one run."""
    decode, prefetch = report["decode"], report["prefetch"]
    advised = " advised by the predictor" if report["eviction_advised"] else ""
    if report["eviction_advice_fault"]:
        advised = f" (no advice: {report['eviction_advice_fault']})"
    speed = f"{1 / report['tpot_s']:.1f} tok/s" if report["tpot_s"] else "-"
    rows = [
        ("decode speed", f"{speed}  (TPOT {report['tpot_s'] * 1e3:.1f} ms, TTFT {report['ttft_s']:.2f} s)"),
        ("tokens", f"{report['prompt_tokens']} prompt, {report['completion_tokens']} generated"),
        ("expert hits", f"{decode['hit_rate']:.1%} of decode, {'cold' if report['cold'] else 'warm'} start"),
        ("read per token", size(decode["read_bytes_per_token"])),
        ("stall per token", f"{decode['stall_s_per_token'] * 1e3:.2f} ms"),
        ("overlap", f"{decode['overlap_ratio']:.0%} of decode's I/O time hidden"),
        ("experts in memory", f"{size(report['resident_bytes_peak'])} peak of {size(report['budget_bytes'])} budget"),
        ("process", f"{size(report['rss_peak_bytes'])} peak RSS, {size(report['dense_bytes'])} of it dense weights"),
        ("prefetch", ", ".join(f"{prefetch[name]} {name}" for name in prefetch)),
        ("predictor", f"{report['predictor']}, lookahead {report['lookahead']}: {report['controller']['reason']}"),
        ("cache", f"{report['cache_policy']}{advised}, {report['slots']} slots of {report['experts']} experts"),
        ("reads", f"{report['store']} file, {'O_DIRECT' if report['direct_io'] else 'buffered'}"),
    ]
    if report["lossy"]:
        rows.append(("lossy", lossy_line(report["lossy"])))
    return two_columns(f"{report['model']}", rows)


def lossy_line(facts: dict[str, Any]) -> str:
    """Mode and measured deviation, on one line."""
    said = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in facts.items())
    return ", ".join(said)
