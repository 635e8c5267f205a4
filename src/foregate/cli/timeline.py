"""``foregate timeline``: a figure of what ``foregate run --trace-events`` has written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foregate.cli.output import console, print_json


def timeline(
    file: Annotated[Path, typer.Argument(help="Written by foregate run --trace-events.")],
    out: Annotated[Path, typer.Option(help="The figure: .svg, .png or .pdf.")],
    token: Annotated[
        int | None, typer.Option(help="Token to draw, from 0; the decoded token of median duration if not given.")
    ] = None,
    to: Annotated[int | None, typer.Option(help="Last token to draw; needs --token.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Overlap of what is drawn as one JSON object.")] = False,
) -> None:
    """Draw copies under compute: which reads were hidden, which were waited for, what predictions brought."""
    from foregate.errors import ConfigError
    from foregate.timeline.figure import check_figure, draw, tokens_of
    from foregate.timeline.reading import read_timeline

    check_figure(out)
    if to is not None and (token is None or to < token):
        raise ConfigError(f"--to {to} needs a --token that is not after it, got {token}")
    whole = read_timeline(file)
    tokens = tokens_of(whole, token, to)
    draw(whole, tokens, out)
    times = whole.overlap(tokens[0].began, tokens[-1].ended)
    shown = {"first_token": tokens[0].args["index"], "last_token": tokens[-1].args["index"], **times}
    if as_json:
        print_json({"figure": str(out), **shown})
    else:
        line = "tokens {first_token}-{last_token}: read {reading_s:.4f} s, of it hidden {hidden_s:.4f} s"
        console().print(f"{line.format(**shown)}, waited {times['waiting_s']:.4f} s; open {out}")
