"""``foregate dashboard``: a model's experts in the browser, while it generates."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from foregate.cli import options
from foregate.cli.output import console
from foregate.config import RunConfig
from foregate.errors import ConfigError
from foregate.experts.policy import POLICIES
from foregate.predictors import choice

_RUN = RunConfig()
HOST, PORT = "127.0.0.1", 8080


def dashboard(
    model: options.Model = _RUN.model,
    host: Annotated[str, typer.Option(help="Address to listen on; one that others reach needs --allow-remote.")] = HOST,
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = PORT,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Let other machines in: there is no password.")
    ] = False,
    memory_budget: options.MemoryBudget = _RUN.memory_budget,
    predictor: options.Predictor = _RUN.predictor,
    prefetch: options.Prefetch = _RUN.prefetch,
    lookahead: options.Lookahead = _RUN.lookahead,
    cache_policy: options.CachePolicy = _RUN.cache_policy,
    reader_threads: options.ReaderThreads = str(_RUN.reader_threads),
    threads: options.Threads = _RUN.threads,
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
