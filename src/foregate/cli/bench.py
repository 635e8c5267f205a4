"""``foregate bench``: how fast, against what, and how far from what the machine can do."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from foregate.cli.output import console, print_json, result
from foregate.config import RunConfig, parse_budget
from foregate.errors import BudgetError, ConfigError
from foregate.experts.policy import POLICIES

_RUN = RunConfig()
WIDTH = 130
"""Columns of the table where the terminal does not say."""


def bench(
    model: Annotated[str, typer.Argument(help="Directory, hub id, pack, or 'reference' (built in).")] = _RUN.model,
    budget: Annotated[str, typer.Option("--memory-budget", "--budget", "--ram", help="One or more, with commas.")] = (
        "25%,50%,75%"
    ),
    arms: Annotated[str, typer.Option(help="all, or names (or their beginnings), with commas.")] = "all",
    predictor: Annotated[str, typer.Option(help="The predictor under test: a name or a file.")] = _RUN.predictor,
    lookahead: Annotated[int, typer.Option(help="Layers it looks ahead.")] = 2,
    cache_policy: Annotated[str, typer.Option(help=f"One of: {', '.join(POLICIES.names)}.")] = _RUN.cache_policy,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens generated in a run.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every arm runs, interleaved.")] = 3,
    dataset: Annotated[list[str] | None, typer.Option(help="Prompts from a data set (again for more).")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Directory with local copies of data sets.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each data set.")] = 1,
    throttle: Annotated[str, typer.Option(help="Bytes a second the disk may give (300MB), or none; with commas.")] = (
        "none"
    ),
    cgroup: Annotated[str, typer.Option(help="auto, v1, v2 or systemd-run.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Compute threads; torch's choice if not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for bench.json and bench.svg.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Nothing but the JSON line.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same: no table.")] = False,
) -> None:
    """Compare arms under a memory limit, cold, interleaved. The last line of stdout is one JSON object."""
    from foregate.bench.arms import choose, standard_arms
    from foregate.bench.limits import physical_limits
    from foregate.bench.session import Session, Setting
    from foregate.bench.summary import summarise

    chosen = choose(standard_arms(predictor, lookahead, POLICIES.check(cache_policy)), arms)
    settings = [Setting(each, bps) for bps in _throttles(throttle) for each in _budgets(budget)]
    ids = _prompt_ids(model, dataset or [], data_dir, prompts)
    shown = console()
    silent = quiet or as_json
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=shown, disable=silent or not shown.is_terminal,
    ) as progress:  # fmt: skip
        task = progress.add_task("limits")
        limits = physical_limits(model, threads, lambda text: progress.update(task, description=text))
        session = Session(
            model, chosen, ids, tokens=tokens, rounds=rounds, threads=threads, cgroup=cgroup,
            progress=lambda text: progress.update(task, advance=1, description=text),
        )  # fmt: skip
        progress.update(task, total=session.steps * len(settings))
        cells = [summarise(session.run(setting), limits) for setting in settings]
    found = {"limits": limits, **_merged(cells), "cells": cells, **_provenance(model, ids, tokens, rounds)}
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
    if not silent:
        for cell in cells:
            shown = result()
            shown.print(table(cell), width=max(WIDTH, shown.width))
    print_json(found)


def _budgets(text: str) -> list[str]:
    budgets = [part.strip() for part in text.split(",") if part.strip()]
    for each in budgets:
        parse_budget(each)
    if not budgets:
        raise BudgetError(f"memory budget {text!r} names none")
    return budgets


def _throttles(text: str) -> list[int | None]:
    found: list[int | None] = []
    for part in (part.strip() for part in text.split(",")):
        if part.lower() == "none":
            found.append(None)
            continue
        nbytes = parse_budget(part.removesuffix("/s")).nbytes if part[:1].isdigit() else None
        if nbytes is None:
            raise ConfigError(f"throttle {part!r} is not bytes a second, such as 300MB, or none")
        found.append(nbytes)
    return found


def _prompt_ids(model: str, datasets: list[str], data_dir: Path | None, each: int) -> dict[str, list[int]]:
    from foregate.bench.prompts import load_prompts
    from foregate.checkpoint.locate import locate
    from foregate.engine.model import load_tokenizer
    from foregate.engine.text import encode

    tokenizer = load_tokenizer(locate(model))
    return load_prompts(lambda text: encode(tokenizer, text, template="auto", context=2**31), datasets, data_dir, each)


def _merged(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """``arms`` and ``ratios`` of all cells; names carry the cell where there is more than one."""
    if len(cells) == 1:
        return {name: cells[0][name] for name in ("arms", "ratios", "outputs_identical")}
    found: dict[str, Any] = {"arms": {}, "ratios": {}, "outputs_identical": all(c["outputs_identical"] for c in cells)}
    for cell in cells:
        place = _place(cell)
        found["arms"] |= {f"{name} [{place}]": arm for name, arm in cell["arms"].items()}
        found["ratios"] |= {f"{name} [{place}]": ratio for name, ratio in cell["ratios"].items()}
    return found


def _place(cell: dict[str, Any]) -> str:
    bps = cell["throttle_bps"]
    return f"{cell['budget']}, {bps / 1e6:.0f} MB/s" if bps else str(cell["budget"])


def _provenance(model: str, ids: dict[str, list[int]], tokens: int, rounds: int) -> dict[str, Any]:
    from foregate import __version__
    from foregate.checkpoint.locate import locate
    from foregate.checkpoint.opening import open_checkpoint

    checkpoint = open_checkpoint(locate(model))
    return {
        "model": {"name": model, "fingerprint": checkpoint.fingerprint, "packed": checkpoint.packed},
        "prompts": {name: len(prompt) for name, prompt in ids.items()},
        "tokens": tokens,
        "rounds": rounds,
        "cold": True,
        "foregate": __version__,
        "commit": _commit(),
        "kernel": platform.release(),
        "machine": platform.machine(),
    }


def _commit() -> str | None:
    """Commit of the source tree that runs, where it is one."""
    here = Path(__file__).resolve().parent
    done = subprocess.run(["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or None


def table(cell: dict[str, Any]) -> Table:
    """One cell of the grid: an arm a row."""
    same = "yes" if cell["outputs_identical"] else "NO"
    shown = Table(title=f"{_place(cell)}, cold; outputs identical: {same}", title_justify="left")
    names = ("arm", "TPOT ms (range)", "p95", "TTFT s", "hit", "MB/token", "stall ms", "overlap", "overhead", "x reads")
    for name in names:
        shown.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for name, arm in cell["arms"].items():
        tpot = arm["tpot_ms"]
        shown.add_row(
            name,
            f"{tpot['median']:.0f} ({tpot['min']:.0f}-{tpot['max']:.0f})",
            f"{tpot['p95']:.0f}",
            f"{arm['ttft_s']:.2f}",
            f"{arm['hit']:.0%}",
            f"{arm['read_mb_per_token']:.0f}",
            f"{arm['exposed_io_ms']:.0f}",
            f"{arm['overlap']:.0%}",
            f"{arm['overhead_ms']:.1f}",
            f"{arm['amplification']:.2f}" if arm["amplification"] else "-",
        )
    return shown
