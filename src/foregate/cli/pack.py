"""``foregate pack``: rewrite a checkpoint so that every expert is one aligned read, or check that a pack is sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foregate.cli.output import console, print_json, size
from foregate.errors import ConfigError

if TYPE_CHECKING:
    from foregate.checkpoint.precision import Precision

Report = Callable[[int, int], None]


def pack(
    model: Annotated[
        str, typer.Argument(help="Directory, hub id or 'reference' to pack; or, alone, a pack to verify.")
    ],
    out: Annotated[Path | None, typer.Argument(help="Directory to write the pack to.")] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="Of the experts: source (as they are), int8 (a scale a row), int4 (a scale a group)."
        ),
    ] = "source",
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="Weights a scale in int4: 32, 64 or 128.  [default: 32]")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read everything back and compare every byte.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no summary.")] = False,
) -> None:
    """Pack a model; interrupted, run it again to go on. With --verify and a pack alone: check its checksums."""
    from foregate.checkpoint.locate import locate
    from foregate.checkpoint.precision import Precision
    from foregate.checkpoint.quantise import parse_scheme

    if out is None and not verify:
        raise ConfigError("give the directory to write the pack to (or --verify to check an existing pack)")
    precision = Precision(experts=parse_scheme(dtype, group_size))
    if out is None and not precision.plain:
        raise ConfigError(f"dtype {dtype}: nothing is written without an output directory")
    source = locate(model)
    said: dict[str, Any] = {}
    if out is not None:
        said |= _pack(source, out, precision, quiet)
    if verify:
        said |= _verify(source if out is None else out, None if out is None else source, quiet)
    if as_json:
        print_json(said)


def _pack(source: Path, out: Path, precision: Precision, quiet: bool) -> dict[str, Any]:
    from foregate.checkpoint.pack import pack as write

    with _progress("packing", quiet) as report:
        done = write(source, out, report, precision)
    if not quiet:
        state = "was packed already" if done.finished_before else "packed"
        resumed = f" ({done.resumed} before an interruption)" if done.resumed and not done.finished_before else ""
        console().print(f"{done.directory} {state}: {done.experts} experts{resumed}, {size(done.nbytes)}")
    return {
        "precision": precision.name,
        "directory": str(done.directory),
        "experts": done.experts,
        "bytes": done.nbytes,
        "resumed": done.resumed,
        "finished_before": done.finished_before,
    }


def _verify(directory: Path, source: Path | None, quiet: bool) -> dict[str, Any]:
    from foregate.checkpoint.verify import verify

    with _progress("verifying", quiet) as report:
        done = verify(directory, source, report)
    if not quiet:
        against = "checksums" if source is None else f"checksums, and every byte against {source}"
        console().print(f"{done.directory} is sound: {done.experts} experts, {size(done.nbytes)} ({against})")
    return {
        "directory": str(done.directory),
        "experts": done.experts,
        "verified": True,
        "verified_bytes": done.nbytes,
        "verified_against": None if source is None else str(source),
    }


@contextmanager
def _progress(what: str, quiet: bool) -> Iterator[Report]:
    """A bar with the time that is left, on stderr; gone when done."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    screen = console()
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=quiet or not screen.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
