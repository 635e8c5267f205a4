"""Runs a notebook from top to bottom and stores it with its output. Extra ``foregate[notebook]``.

``python -m foregate.analysis.notebook NOTEBOOK [TRACE...] [--out FILE]``: without traces the notebook reads the one
that ships with Foregate. The cell tagged ``parameters`` is where they go, as papermill has it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foregate.errors import ConfigError

TIMEOUT_S = 3600
KEPT = ("kernelspec", "language_info")


def execute(notebook: Path, traces: Sequence[Path] = ()) -> Any:
    """The executed notebook (nbformat). A cell that fails raises nbclient's CellExecutionError, with its traceback."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(notebook, as_version=4)
    if traces:
        _parameters(book, notebook).source = f"TRACES = {[str(trace.resolve()) for trace in traces]!r}\nSETTINGS = {{}}"
    NotebookClient(book, timeout=TIMEOUT_S, record_timing=False).execute()
    book.metadata = {key: value for key, value in book.metadata.items() if key in KEPT}
    book.metadata["language_info"] = {"name": "python"}
    return book


def _parameters(book: Any, notebook: Path) -> Any:
    found = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(found) != 1:
        raise ConfigError(f"{notebook} has {len(found)} cells tagged parameters, not one")
    return found[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    import nbformat

    parser = argparse.ArgumentParser(prog="python -m foregate.analysis.notebook", description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("traces", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, default=None, help="default: the notebook itself")
    given = parser.parse_args(arguments)
    if given.traces and given.out is None:
        parser.error("with traces give --out: the stored notebook is that of the shipped trace")
    out = given.out or given.notebook
    nbformat.write(execute(given.notebook, given.traces), out)
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
