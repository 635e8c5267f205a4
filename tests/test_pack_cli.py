"""``foregate pack``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from foregate.checkpoint.opening import open_checkpoint
from foregate.cli.pack import pack
from foregate.errors import ConfigError, PackError
from test_checkpoint_support import tiny

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(pack)


def run(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert isinstance(facts, dict)
    return facts


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny(tmp_path / "source")


def test_packs(source: Path, tmp_path: Path) -> None:
    facts = run(source, tmp_path / "out")
    assert facts["experts"] == 64
    assert facts["finished_before"] is False
    assert "verified" not in facts
    assert open_checkpoint(tmp_path / "out").packed


def test_packs_and_compares_with_the_source(source: Path, tmp_path: Path) -> None:
    facts = run(source, tmp_path / "out", "--verify")
    assert facts["verified"] is True
    assert facts["verified_against"] == str(source)


def test_verifies_an_existing_pack(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    facts = run("--verify", tmp_path / "out")
    assert facts["verified"] is True
    assert facts["verified_against"] is None


def test_says_what_it_did(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pack(str(source), tmp_path / "out", verify=True)
    pack(str(source), tmp_path / "out")
    out, said = capfd.readouterr()
    assert out == ""
    said = " ".join(said.split())
    assert "packed: 64 experts" in said
    assert "is sound: 64 experts" in said
    assert "was packed already" in said


def test_quiet(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pack(str(source), tmp_path / "out", verify=True, quiet=True)
    assert capfd.readouterr() == ("", "")


def test_output_is_needed(source: Path) -> None:
    with pytest.raises(ConfigError, match="give the directory to write the pack to"):
        pack(str(source))


def test_only_a_pack_can_be_verified_alone(source: Path) -> None:
    with pytest.raises(PackError, match="is not a pack"):
        pack(str(source), verify=True)
