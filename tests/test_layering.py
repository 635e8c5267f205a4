"""Folder = layer, imports go down only; what must stay free of torch is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import foregate

ROOT = Path(foregate.__file__).parent
RANKS = {
    "types": 0, "errors": 0, "events": 0,
    "config": 1, "interfaces": 1, "registry": 1,
    "checkpoint": 2, "trace": 2, "datasets": 2, "native": 2,
    "experts": 3, "predictors": 3, "analysis": 3, "timeline": 3,
    "training": 4, "prefetch": 4, "testing": 4, "reference": 4,
    "engine": 5, "sim": 5,
    "bench": 6, "server": 6, "evaluation": 6,
    "cli": 7, "__main__": 8,
}  # fmt: skip
STRANGERS = [("experts", "predictors"), ("predictors", "experts"), ("engine", "training"), ("engine", "analysis")]
TORCH_FREE = ["types", "errors", "events", "config", "interfaces", "registry", "prefetch", "experts/cache",
              "experts/policy", "experts/slots", "experts/transfer", "predictors", "analysis", "timeline",
              "sim"]  # fmt: skip
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            # ``from foregate import events`` is an import of that module too.
            names |= {
                f"foregate.{alias.name}" for alias in node.names if node.module == "foregate" and alias.name in RANKS
            }
    return names


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def parts_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("foregate.")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    upward = [name for name in parts_imported(path) if RANKS[name] > RANKS[part(path)]]
    # testing/ is shipped scaffolding: its scripts may start the engine they exercise.
    assert not upward or part(path) == "testing", f"{path.relative_to(ROOT)} imports {upward}"


@pytest.mark.parametrize(("importer", "target"), STRANGERS)
def test_strangers_do_not_meet(importer: str, target: str) -> None:
    assert [p for p in FILES if part(p) == importer and target in parts_imported(p)] == []


@pytest.mark.parametrize("place", TORCH_FREE)
def test_no_torch_where_a_simulator_must_run(place: str) -> None:
    files = [path for path in FILES if path.relative_to(ROOT).with_suffix("").as_posix().startswith(place)]
    assert files
    assert [p for p in files if {name.split(".")[0] for name in imported(p)} & {"torch", "transformers"}] == []
