"""``foregate pack``: rewrite a checkpoint so that every expert is one aligned read, or check that a pack is sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foregate.cli.output import console, print_json, size
from foregate.errors import ConfigError

if TYPE_CHECKING:
    from foregate.checkpoint.precision import Precision
    from foregate.types import ExpertKey

Report = Callable[[int, int], None]


class Order(str, Enum):
    """How the experts of a layer are placed."""

    expert = "expert"
    coactivation = "coactivation"


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
    keep: Annotated[
        str | None, typer.Option("--keep", help="Keep this share of the experts, the most used, finer: 10%.")
    ] = None,
    keep_dtype: Annotated[
        str | None, typer.Option("--keep-dtype", help="Of those: source or int8.  [default: int8]")
    ] = None,
    usage: Annotated[
        Path | None, typer.Option("--usage", help="Trace of the model that says which are most used.")
    ] = None,
    dense_dtype: Annotated[
        str, typer.Option("--dense-dtype", help="Of the matrices outside the experts: source or int8.")
    ] = "source",
    order: Annotated[
        Order, typer.Option("--order", help="Of a layer's experts in the file; coactivation needs --trace.")
    ] = Order.expert,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="A trace of this routing: experts chosen together lie together.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read everything back and compare every byte.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no summary.")] = False,
) -> None:
    """Pack a model; interrupted, run it again to go on. With --verify and a pack alone: check its checksums."""
    from foregate.checkpoint.locate import locate

    if out is None and not verify:
        raise ConfigError("give the directory to write the pack to (or --verify to check an existing pack)")
    precision = _precision(dtype, group_size, (keep_dtype or "int8") if keep else None, dense_dtype)
    if out is None and (not precision.plain or keep):
        raise ConfigError(f"{precision.name}: nothing is written without an output directory")
    if (order is Order.coactivation) != (trace is not None):
        raise ConfigError("--order coactivation and --trace DIR belong together: give both or neither")
    if out is None and trace is not None:
        raise ConfigError(f"order {order.value}: nothing is written without an output directory")
    source = locate(model)
    if keep is None and (usage or keep_dtype):
        raise ConfigError(
            f"{usage or keep_dtype}: --usage and --keep-dtype say how to --keep a share, which is not given"
        )
    if keep is not None:
        precision = replace(precision, kept_experts=_kept(keep, usage, precision, source))
    said: dict[str, Any] = {}
    if out is not None:
        said |= _pack(source, out, precision, trace, quiet)
    if verify:
        said |= _verify(source if out is None else out, None if out is None else source, quiet)
    if as_json:
        print_json(said)


def _precision(dtype: str, group_size: int | None, keep_dtype: str | None, dense_dtype: str) -> Precision:
    from foregate.checkpoint.precision import Precision
    from foregate.checkpoint.quantise import PLAIN, parse_scheme

    experts, dense = parse_scheme(dtype, group_size), parse_scheme(dense_dtype)
    if dense.bits == 4:
        raise ConfigError(f"dense dtype {dense_dtype}: choose source or int8")
    return Precision(experts=experts, dense=dense, kept=parse_scheme(keep_dtype) if keep_dtype else PLAIN)


def _kept(keep: str, usage: Path | None, precision: Precision, source: Path) -> frozenset[ExpertKey]:
    """The experts that ``--keep`` names. Raises ConfigError where it cannot be honoured."""
    from foregate.checkpoint.opening import open_checkpoint
    from foregate.trace.sample import locate as located
    from foregate.trace.usage import most_used

    if usage is None:
        raise ConfigError(f"keep {keep}: say with --usage which trace tells the most used experts")
    finer = precision.kept.bits or 16
    if not precision.experts.bits or finer <= precision.experts.bits:
        raise ConfigError(
            f"keep {keep} as {precision.kept.name}: no finer than the other experts' {precision.experts.name}"
        )
    try:
        share = float(keep.removesuffix("%")) / 100
    except ValueError:
        raise ConfigError(f"keep {keep!r}: give a percentage of the experts, such as 10%") from None
    return most_used(located(usage), share, open_checkpoint(source).fingerprint)


def _pack(source: Path, out: Path, precision: Precision, trace: Path | None, quiet: bool) -> dict[str, Any]:
    from foregate.checkpoint.pack import pack as write
    from foregate.cli.pack_order import traced_orders

    orders = None if trace is None else traced_orders(trace)

    with _progress("packing", quiet) as report:
        done = write(source, out, report, precision, orders)
    if not quiet:
        state = "was packed already" if done.finished_before else "packed"
        resumed = f" ({done.resumed} before an interruption)" if done.resumed and not done.finished_before else ""
        console().print(f"{done.directory} {state}: {done.experts} experts{resumed}, {size(done.nbytes)}")
    return {
        "precision": precision.name,
        "order": (Order.expert if orders is None else Order.coactivation).value,
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
