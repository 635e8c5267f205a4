"""Predictors of other packages: what docs/predictors.md shows works as it stands, and what is broken stays alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foregate.errors import ConfigError
from foregate.registry import Registry

DOCS = (Path(__file__).parent.parent / "docs" / "predictors.md").read_text()
GROUP = "foregate.predictors"


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", DOCS, re.M | re.S)
    assert found, language
    return found.group(1)


def installed(site: Path, name: str, module: str, entry_points: str) -> None:
    """What pip leaves in ``site``: the module, and the metadata with the entry points."""
    (site / f"{name}.py").write_text(module)
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


def foregate(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path])}
    command = [sys.executable, "-m", "foregate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)


def test_the_predictor_of_the_documentation_runs_from_its_package(tmp_path: Path) -> None:
    module = block("python")
    assert len(module.splitlines()) <= 34
    name, target = re.findall(r'^(\w+) = "(.+)"$', block("toml"), re.M)[0]
    assert f'[project.entry-points."{GROUP}"]' in block("toml")
    installed(tmp_path, "foregate_recent", module, f"[{GROUP}]\n{name} = {target}\n")

    def generated(*options: str) -> dict[str, Any]:
        ran = foregate(tmp_path, "run", "-p", "2 + 2 =", "--max-new-tokens", "8", "--budget", "13%", "--json", *options)
        assert ran.returncode == 0, ran.stderr
        report: dict[str, Any] = json.loads(ran.stdout)
        return report

    with_it = generated("--predictor", name, "--prefetch", "4")
    assert with_it["token_ids"] == generated("--predictor", "none")["token_ids"]
    assert with_it["predictor"] == name
    assert with_it["prefetch"]["issued"] > 0


def test_a_broken_package_is_listed_as_broken_and_harms_nobody(tmp_path: Path) -> None:
    installed(
        tmp_path,
        "shattered",
        "raise OSError('no\\nluck')",
        f"[{GROUP}]\nshattered = shattered:It\nnone = shattered:It\n",
    )
    installed(tmp_path, "garbled", "", f"[{GROUP}\nthis is = no [entry point\n==\n")
    listed = foregate(tmp_path, "predictor", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    rows = {row["name"]: row for row in json.loads(listed.stdout)["predictors"]}
    assert "no\nluck" in rows["shattered"]["broken"]
    assert rows["none"]["broken"] == rows["next-gate"]["broken"] == ""
    refused = foregate(tmp_path, "run", "-p", "x", "--predictor", "shattered")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: predictor 'shattered' (shattered:It) cannot be loaded: OSError: no luck")
    assert refused.stderr.count("\n") == 1


def test_the_first_package_on_the_path_wins_and_ours_always(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in ("1", "2"):
        (tmp_path / number).mkdir()
        module = f"class It:\n    number = {number}\n"
        installed(tmp_path / number, f"package_{number}", module, f"[g]\nit = package_{number}:It\nours = nothing:X\n")
        monkeypatch.syspath_prepend(tmp_path / number)
    registry = Registry("thing", {"ours": "pathlib:Path"}, group="g")
    assert registry.names == ("ours", "it")
    assert registry.load("it").number == 2
    assert registry.load("ours") is Path
    with pytest.raises(ConfigError, match="choose from: ours, it"):
        registry.check("other")
    with pytest.raises(ConfigError, match="registered already"):
        registry.register("it", "elsewhere:It")
