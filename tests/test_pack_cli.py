"""``foregate pack``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import foregate
from foregate.checkpoint.manifest import read_manifest
from foregate.checkpoint.opening import open_checkpoint
from foregate.cli.pack import pack
from foregate.cli.pack_order import traced_orders
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


@pytest.mark.parametrize("options", [["--order", "coactivation"], ["--trace", "somewhere"]])
def test_an_order_without_a_trace_or_a_trace_without_an_order_is_refused(
    source: Path, tmp_path: Path, options: list[str]
) -> None:
    with pytest.raises(ConfigError, match="--order coactivation and --trace DIR belong together"):
        run(source, tmp_path / "out", *options)


def test_a_trace_of_another_model_gives_no_order(source: Path, tmp_path: Path) -> None:
    sample = Path(foregate.__file__).parent / "trace" / "reference-sample"
    with pytest.raises(PackError, match="MoE layer"):
        run(source, tmp_path / "out", "--order", "coactivation", "--trace", sample)
    assert not (tmp_path / "out").exists()


def test_the_order_of_a_trace_is_written(tmp_path: Path) -> None:
    sample = Path(foregate.__file__).parent / "trace" / "reference-sample"
    facts = run("reference", tmp_path / "out", "--order", "coactivation", "--trace", sample)
    assert facts["order"] == "coactivation"
    assert read_manifest(tmp_path / "out").orders == traced_orders(sample)
