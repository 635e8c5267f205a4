"""Types of the options that several commands share: one name, one help text."""

from __future__ import annotations

from typing import Annotated

import typer

from foregate.experts.policy import POLICIES
from foregate.predictors import PREDICTORS

Model = Annotated[str, typer.Argument(help="Directory, hub id, pack, or 'reference' (built in).")]
MemoryBudget = Annotated[
    str,
    typer.Option("--memory-budget", "--budget", "--ram", help="Bytes (8GB, 512MiB), 25% of the experts, or auto."),
]
Predictor = Annotated[str, typer.Option(help=f"A predictor file, or one of: {', '.join(PREDICTORS.own_names)}.")]
Prefetch = Annotated[str, typer.Option(help="auto, off, or N experts a layer at most.")]
Lookahead = Annotated[
    int | None, typer.Option(help="Layers from signal to farthest prediction; else the predictor's own.")
]
CachePolicy = Annotated[str, typer.Option(help=f"One of: {', '.join(POLICIES.names)}.")]
ReaderThreads = Annotated[str, typer.Option(help="Threads that read experts, or auto: as measured.")]
Threads = Annotated[int | None, typer.Option(help="Compute threads; torch's choice if not given.")]
