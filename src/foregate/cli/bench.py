"""``foregate bench``: how fast, against what, and how far from what the machine can do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from foregate.cli import options
from foregate.cli.bench_quality import QUALITY_TOKENS, quality_table, quality_texts
from foregate.cli.bench_tables import arms_table, limits_table, memory_table, ratios_table, rivals_table
from foregate.cli.output import console, print_json, result
from foregate.config import RunConfig, parse_budget
from foregate.errors import ConfigError
from foregate.experts.policy import POLICIES

if TYPE_CHECKING:
    from foregate.bench.session import Session, Setting

_RUN = RunConfig()
WIDTH = 150
"""Columns of the table where the terminal does not say."""


def bench(
    model: options.Model = _RUN.model,
    budget: Annotated[
        list[str] | None,
        typer.Option("--memory-budget", "--budget", "--ram", help="Again for more, or with commas; 25%,50%,75%."),
    ] = None,
    arms: Annotated[str, typer.Option(help="all, or names (or their beginnings), with commas.")] = "all",
    predictor: Annotated[list[str] | None, typer.Option(help="Under test: a name or a file (again for more).")] = None,
    lookahead: Annotated[int | None, typer.Option(help="Layers they look ahead; each one's own if not given.")] = None,
    cache_policy: options.CachePolicy = _RUN.cache_policy,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens generated in a run.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every arm runs, interleaved.")] = 3,
    dataset: Annotated[list[str] | None, typer.Option(help="Prompts from a data set (again for more).")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Directory with local copies of data sets.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each data set.")] = 1,
    prompt_tokens: Annotated[
        str | None, typer.Option(help="Exact lengths of prompts, with commas: real text, cut. For TTFT.")
    ] = None,
    domain: Annotated[list[str] | None, typer.Option(help="Only prompts of this domain (again for more).")] = None,
    throttle: Annotated[
        list[str] | None,
        typer.Option(help="Bytes a second the disk may give (300MB/s), or none; again for more, or with commas."),
    ] = None,
    overhead: Annotated[
        str, typer.Option(help="Memory beside budget and dense weights: stated, measured (tight), or bytes (512MB).")
    ] = "stated",
    cgroup: Annotated[str, typer.Option(help="auto, v1, v2 or systemd-run.")] = "auto",
    threads: options.Threads = None,
    rivals: Annotated[
        str | None, typer.Option(help="llama.cpp, accelerate, airllm, flyweight-llm, with commas: docs/rivals.md.")
    ] = None,
    rivals_model: Annotated[str | None, typer.Option(help="What a pack was made from: rivals read no packs.")] = None,
    work_dir: Annotated[Path | None, typer.Option(help="Where rivals' weights are kept; the cache directory.")] = None,
    quality: Annotated[bool, typer.Option("--quality", help="Also every lossy mode: loss against speed.")] = False,
    quality_tokens: Annotated[
        int | None,
        typer.Option(min=1, help=f"With --quality: tokens judged in each domain and mode; {QUALITY_TOKENS}."),
    ] = None,
    low_precision_pack: Annotated[str | None, typer.Option(help="With --quality: for low-precision-miss.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for bench.json, a figure, and cells: what is there is not run again.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Nothing but the JSON line.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same: no table.")] = False,
) -> None:
    """Compare arms under a memory limit, cold, interleaved. The last line of stdout is one JSON object."""
    from foregate.bench.arms import choose, standard_arms
    from foregate.bench.figure import check_figure, draw
    from foregate.bench.grid import merged, never_below
    from foregate.bench.kept import Kept
    from foregate.bench.limits import physical_limits
    from foregate.bench.provenance import provenance
    from foregate.bench.quality import Tried, judge_modes
    from foregate.bench.session import Outcome, Session, Setting
    from foregate.bench.summary import summarise

    tested = predictor or [_RUN.predictor]
    chosen = choose(standard_arms(tested, lookahead, POLICIES.check(cache_policy)), arms)
    budgets = _budgets(budget or ["25%,50%,75%"])
    settings = [Setting(each, bps) for bps in _throttles(throttle or ["none"]) for each in budgets]
    beside = _overhead(overhead)
    if out:
        check_figure(out)
    if rivals is None and (rivals_model or work_dir):
        raise ConfigError(f"{rivals_model or work_dir} is for rivals: give --rivals too")
    texts = quality_texts(quality, low_precision_pack, quality_tokens, dataset or [], data_dir, domain or [])
    ids = _of_domains(_prompt_ids(model, dataset or [], data_dir, prompts, prompt_tokens), domain or [])
    shown, silent = console(), quiet or as_json
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=shown, disable=silent or not shown.is_terminal,
    ) as progress:  # fmt: skip
        task = progress.add_task("limits", total=None)

        def say(text: str) -> None:
            progress.update(task, description=text)

        lineup = _lineup(rivals, model, rivals_model, work_dir, say)
        facts = provenance(model, ids, tokens=tokens, rounds=rounds, predictors=tested)
        machine = {name: facts[name] for name in ("model", "kernel", "cpu", "disk")} | {"threads": threads}
        kept = Kept(out / "cells" if out else None)
        limits = kept.measured("limits", machine, lambda: physical_limits(model, threads, say))
        if not silent:
            _print(limits_table(limits))

        def session_with(overhead_bytes: int | None) -> Session:
            return Session(
                model, chosen, ids, tokens=tokens, rounds=rounds, threads=threads, cgroup=cgroup, lineup=lineup,
                overhead_bytes=overhead_bytes,
                progress=lambda text: progress.update(task, advance=1, description=text),
            )  # fmt: skip

        session = session_with(beside if isinstance(beside, int) else None)
        same = {
            **machine, **{name: facts[name] for name in ("predictors", "prompts", "tokens", "rounds")},
            "cgroup": cgroup, "arms": [str(arm) for arm in chosen], "rivals": list(lineup.ready),
        }  # fmt: skip
        if beside == "measured":
            say("overhead")
            session = session_with(kept.measured("overhead", same, lambda: _measured(session))["overhead_bytes"])
        same["overhead_bytes"] = session.overhead_bytes
        progress.update(task, total=sum(map(session.steps, settings)))
        cells = []
        for number, setting in enumerate(settings, start=1):
            where, identity = f"{setting.budget}-{setting.throttle_bps or 'none'}", {**same, **asdict(setting)}
            there = kept.has(where, identity)
            if there:
                progress.update(task, advance=session.steps(setting))
            if not silent and not shown.is_terminal:
                shown.print(f"cell {number} of {len(settings)}: {where}{', kept' if there else ''}")
            outcome = kept.measured(where, identity, partial(_outcome, session, setting))
            cells.append(summarise(Outcome.from_json(outcome), limits))
            if not silent:
                _print(arms_table(cells[-1]))
        tried = Tried(model, budgets, tested, cache_policy, threads, low_precision_pack)
        count = quality_tokens or QUALITY_TOKENS
        judged = judge_modes(tried, texts, tokens=count, say=say, kept=kept, machine=machine) if quality else []
    found = {
        "limits": limits,
        **merged(cells),
        "cells": cells,
        "summary": never_below(cells),
        "overhead": {"how": overhead, "bytes": session.overhead_bytes, "stated_bytes": session.stated_overhead},
        "rivals": lineup.as_dict(limits["format"]),
        "quality": judged,
        **facts,
    }
    if out:
        (out / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
        draw(cells, out)
    if not silent:
        for table in _closing_tables(found, quality=quality, rivals=bool(rivals)):
            _print(table)
    print_json(found)


def _closing_tables(found: dict[str, Any], *, quality: bool, rivals: bool) -> Iterator[Any]:
    """What is shown once every cell has been measured."""
    cells = found["cells"]
    yield memory_table(cells)
    yield ratios_table(cells, found["ratios"].get("worst"))
    if quality:
        yield quality_table(found["quality"])
    if rivals:
        yield rivals_table(found["rivals"], cells)
    if found["summary"]:
        yield found["summary"]


def _print(table: Any) -> None:
    shown = result()
    shown.width = max(WIDTH, shown.width)
    shown.print(table)


def _lineup(rivals: str | None, model: str, source: str | None, work_dir: Path | None, say: Any) -> Any:
    from foregate.bench.lineup import Lineup

    if rivals is None:
        return Lineup()
    from foregate.bench.lineup import default_work_dir, line_up, parse_rivals, rivals_source
    from foregate.bench.rivals import RIVALS

    names = parse_rivals(rivals, RIVALS)
    return line_up(names, rivals_source(model, source), work_dir or default_work_dir(), RIVALS, say)


def _outcome(session: Session, setting: Setting) -> dict[str, Any]:
    return asdict(session.run(setting))


def _measured(session: Session) -> dict[str, int]:
    from foregate.bench.overhead import measured_overhead

    least = measured_overhead(session.trial, stated=session.stated_overhead, held=session.trial_held)
    return {"overhead_bytes": least}


def _overhead(text: str) -> int | str:
    """``stated``, ``measured`` or bytes. Raises ConfigError."""
    if text in ("stated", "measured"):
        return text
    nbytes = parse_budget(text).nbytes if text[:1].isdigit() else None
    if nbytes is None:
        raise ConfigError(f"overhead {text!r} is not stated, measured or bytes, such as 512MB")
    return nbytes


def _of_domains(ids: dict[str, list[int]], wanted: list[str]) -> dict[str, list[int]]:
    """The prompts of those domains; all where none is named. Raises ConfigError for one that there is not."""
    from foregate.bench.summary import domain as domain_of

    there = list(dict.fromkeys(map(domain_of, ids)))
    for name in wanted:
        if name not in there:
            raise ConfigError(f"no prompt of domain {name!r}; there are: {', '.join(there)}")
    return {name: own for name, own in ids.items() if not wanted or domain_of(name) in wanted}


def _split(texts: list[str], what: str) -> list[str]:
    """What was given again or with commas, each once. Raises ConfigError where that is nothing."""
    found = list(dict.fromkeys(part.strip() for text in texts for part in text.split(",") if part.strip()))
    if not found:
        raise ConfigError(f"{what} {','.join(texts)!r} names none")
    return found


def _budgets(texts: list[str]) -> list[str]:
    budgets = _split(texts, "memory budget")
    for each in budgets:
        parse_budget(each)
    return budgets


def _throttles(texts: list[str]) -> list[int | None]:
    found: list[int | None] = []
    for part in _split(texts, "throttle"):
        if part.lower() == "none":
            found.append(None)
            continue
        nbytes = parse_budget(part.removesuffix("/s")).nbytes if part[:1].isdigit() else None
        if nbytes is None:
            raise ConfigError(f"throttle {part!r} is not bytes a second, such as 300MB, or none")
        found.append(nbytes)
    return found


def _prompt_ids(
    model: str, datasets: list[str], data_dir: Path | None, each: int, lengths: str | None
) -> dict[str, list[int]]:
    from foregate.bench.prompts import exact_prompts, load_prompts, parse_lengths
    from foregate.checkpoint.locate import locate
    from foregate.engine.model import load_tokenizer
    from foregate.engine.text import encode

    if each != 1 and (lengths is not None or not datasets):
        raise ConfigError(f"prompts {each} is for whole prompts of data sets: name one with --dataset")
    tokenizer = load_tokenizer(locate(model))
    if lengths is not None:
        plain = partial(encode, tokenizer, template="off", context=2**31)
        return exact_prompts(plain, datasets, data_dir, parse_lengths(lengths))
    return load_prompts(partial(encode, tokenizer, template="auto", context=2**31), datasets, data_dir, each)
