"""The ``foregate`` command: registers one file a command, and turns our errors into one line and exit code 1."""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from foregate import __version__
from foregate.cli.analyze import analyze
from foregate.cli.bench import bench
from foregate.cli.dashboard import dashboard
from foregate.cli.doctor import doctor
from foregate.cli.evaluate import evaluate
from foregate.cli.inspect import inspect
from foregate.cli.pack import pack
from foregate.cli.predictor import app as predictor
from foregate.cli.quality import quality
from foregate.cli.reference import app as reference
from foregate.cli.run import run
from foregate.cli.timeline import timeline
from foregate.cli.trace import app as trace
from foregate.cli.train import train
from foregate.errors import ForegateError

# Before torch loads: compute threads that wait by spinning take the cores from readers and from everyone else
# (measured on a busy two-core machine: 65 against 119 ms a token).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    name="foregate",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run Mixture-of-Experts models that do not fit in memory.",
)
app.command()(run)
app.command()(inspect)
app.command()(pack)
app.command()(quality)
app.command()(doctor)
app.command()(analyze)
app.command()(bench)
app.command()(train)
app.command()(timeline)
app.command()(evaluate)
app.command()(dashboard)
app.add_typer(trace, name="trace")
app.add_typer(predictor, name="predictor", help="Predictors: which there are, what a file holds.")
app.add_typer(reference, name="reference", help="The built-in reference model: train it, judge it.")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"foregate {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 an error, 2 wrong usage, 130 interrupted; one line says why."""
    try:
        code = app(standalone_mode=False) or 0
        if code == 130:  # typer's word for an interrupt that it has swallowed
            raise KeyboardInterrupt
        raise SystemExit(code)
    except ForegateError as error:
        _fail(str(error), 1)
    except TyperException as error:
        _fail(error.format_message(), 2)
    except BrokenPipeError:
        # The reader of our output has gone (head, less): not an error, and nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except Exception as error:  # the outermost handler: nobody gets a stack trace who did not ask for one
        if os.environ.get("FOREGATE_DEBUG"):
            raise
        _fail(f"{type(error).__name__}: {error} (FOREGATE_DEBUG=1 shows where)", 1)


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()
