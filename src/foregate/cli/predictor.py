"""``foregate predictor``: which predictors there are, and what a predictor file holds."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from foregate.cli import options
from foregate.cli.output import console, print_json, result, size, two_columns
from foregate.config import RunConfig
from foregate.errors import ConfigError
from foregate.predictors import PREDICTORS, choice
from foregate.predictors.file import load

_RUN = RunConfig()

app = typer.Typer(no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of a table.")]

_COLUMNS = ("name", "asked", "signal", "lookahead", "needs", "source")


@app.command("list")
def list_predictors(as_json: AsJson = False) -> None:
    """Every predictor, ours and those of installed packages. None changes a token: a prediction is a hint to read."""
    rows = [_row(name) for name in PREDICTORS.names]
    if as_json:
        print_json({"predictors": rows})
        return
    table = Table(title="predictors", title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for row in rows:
        needs = "a file" if row["needs_file"] else "routers" if row["asks_routers"] else ""
        shown = (row["name"], row["moment"], row["signal"], str(row["lookahead"]), needs, row["source"])
        table.add_row(*((row["name"], row["broken"]) if row["broken"] else shown))
    result().print(table)


@app.command()
def info(
    file: Annotated[Path, typer.Argument(help="A predictor file.")],
    as_json: AsJson = False,
) -> None:
    """What a predictor file holds: method, model, training data, metrics, arrays."""
    artifact = load(file)
    about = artifact.as_dict()
    if as_json:
        print_json(about)
        return
    model = artifact.model
    sizes = f"{model.layers} layers of {_counts(model.experts)} experts, top-{model.top_k}, hidden {model.hidden_size}"
    rows = [
        ("method", f"{artifact.method}, lookahead {artifact.lookahead}"),
        ("model", f"{model.name}: {sizes}"),
        ("fingerprint", model.fingerprint),
        ("fits", "this model, and copies inflated from it (hidden vectors: the first values)"),
        ("options", _pairs(artifact.options)),
        ("signals", ", ".join(artifact.features) or "none"),
        ("metrics", _pairs(artifact.metrics)),
        ("trained on", f"{', '.join(artifact.traces) or '-'} (hash {artifact.trace_hash or '-'})"),
        ("seed", str(artifact.seed)),
        ("parameters", f"{about['parameters']:,}"),
        ("arrays", ", ".join(f"{name} {'x'.join(map(str, s[1:]))} {s[0]}" for name, s in about["arrays"].items())),
        ("made by", f"foregate {artifact.version}, licence {artifact.licence}"),
    ]
    result().print(two_columns(str(file), rows))


@app.command()
def cost(
    predictor: Annotated[str, typer.Argument(help="A name of 'predictor list', or a predictor file.")],
    model: Annotated[str, typer.Option(help="Directory, hub id, pack, or 'reference'.")] = _RUN.model,
    lookahead: Annotated[int | None, typer.Option(help="As of foregate run.")] = _RUN.lookahead,
    memory_budget: Annotated[str, typer.Option("--memory-budget", "--budget", help="As of foregate run.")] = "50%",
    threads: options.Threads = _RUN.threads,
    tokens: Annotated[int, typer.Option(help="Tokens to decode.", min=1)] = 64,
    as_json: AsJson = False,
) -> None:
    """What one prediction takes in the engine, in microseconds, and which share of a layer's time that is."""
    config = RunConfig(
        model=model,
        memory_budget=memory_budget,
        predictor=choice.check(predictor),
        prefetch="1",
        lookahead=lookahead,
        threads=threads,
    )
    from foregate.bench.predictor_cost import measure  # torch takes seconds to import

    with console().status("measuring") if console().is_terminal else nullcontext():
        found = measure(config, tokens)
    if as_json:
        print_json(found)
        return
    beside = "" if found["alone_us"] is None else f" ({found['alone_us']:.1f} µs without a second thread)"
    rows = [
        ("prediction", f"{found['predict_us']:.1f} µs{beside}, observing {found['observe_us']:.1f} µs (medians)"),
        (
            "token",
            f"{found['us_per_token']:.0f} µs in {found['layers']} layers ({found['cpu_us_per_token']:.0f} µs CPU)",
        ),
        ("layer", f"{found['layer_us']:.0f} µs without waiting for reads; the predictor is {found['share']:.1%} of it"),
        ("with waits", f"{found['waiting_layer_us']:.0f} µs; the predictor is {found['waiting_share']:.1%} of it"),
        ("operations", f"{found['flops']:,} FLOPs, {size(found['bytes'])} read, {found['parameters']:,} parameters"),
    ]
    result().print(two_columns(f"{predictor}, lookahead {found['lookahead']}, on {model}", rows))


def _row(name: str) -> dict[str, Any]:
    try:
        method = PREDICTORS.load(name)
    except ConfigError as error:
        return {"name": name, "broken": str(error)}
    moment = getattr(method, "moment", "")
    return {
        "name": name,
        "moment": getattr(moment, "value", str(moment)),
        "signal": getattr(method, "signal", ""),
        "lookahead": getattr(method, "default_lookahead", 1),
        "needs_file": getattr(method, "needs_file", False),
        "asks_routers": getattr(method, "asks_routers", False),
        "source": getattr(method, "source", ""),
        "broken": "",
    }


def _counts(experts: tuple[int, ...]) -> str:
    return str(experts[0]) if len(set(experts)) == 1 else ", ".join(map(str, experts))


def _pairs(values: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "none"
