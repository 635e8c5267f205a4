"""``foregate dashboard``: a model's experts in the browser, while it generates."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from foregate.cli.output import console
from foregate.config import RunConfig
from foregate.errors import ConfigError
from foregate.experts.policy import POLICIES
from foregate.predictors import PREDICTORS, choice

_RUN = RunConfig()
HOST, PORT = "127.0.0.1", 8080


def dashboard(
    model: Annotated[str, typer.Argument(help="Directory, hub id, pack, or 'reference' (built in).")] = _RUN.model,
    host: Annotated[str, typer.Option(help="Address to listen on; one that others reach needs --allow-remote.")] = HOST,
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = PORT,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Let other machines in: there is no password.")
    ] = False,
    memory_budget: Annotated[
        str,
        typer.Option("--memory-budget", "--budget", "--ram", help="Bytes (8GB, 512MiB), 25% of the experts, or auto."),
    ] = _RUN.memory_budget,
    predictor: Annotated[
        str, typer.Option(help=f"A predictor file, or one of: {', '.join(PREDICTORS.own_names)}.")
    ] = _RUN.predictor,
    prefetch: Annotated[str, typer.Option(help="auto, off, or N experts a layer at most.")] = _RUN.prefetch,
    lookahead: Annotated[
        int | None, typer.Option(help="Layers from signal to farthest prediction; else the predictor's own.")
    ] = _RUN.lookahead,
    cache_policy: Annotated[str, typer.Option(help=f"One of: {', '.join(POLICIES.names)}.")] = _RUN.cache_policy,
    reader_threads: Annotated[str, typer.Option(help="Threads that read experts, or auto: as measured.")] = str(
        _RUN.reader_threads
    ),
    threads: Annotated[int | None, typer.Option(help="Compute threads; torch's choice if not given.")] = _RUN.threads,
) -> None:
    """Watch experts come and go in the browser, token by token, while the model generates. Ctrl-C ends it."""
    if any(find_spec(name) is None for name in ("fastapi", "uvicorn")):
        raise ConfigError(
            "the dashboard needs FastAPI and uvicorn, which are missing: pip install 'foregate[dashboard]'"
        )
    from foregate.server.dashboard.serve import bind, serve

    config = RunConfig(
        model=model,
        memory_budget=memory_budget,
        predictor=choice.check(predictor),
        prefetch=prefetch,
        lookahead=lookahead,
        cache_policy=POLICIES.check(cache_policy),
        reader_threads=reader_threads,
        threads=threads,
    )
    with bind(host, port, allow_remote=allow_remote) as listening:
        from foregate.engine.engine import Engine

        with Engine(config) as engine:
            serve(engine, listening, lambda address: console().print(f"{model} on {address} (Ctrl-C ends it)"))
