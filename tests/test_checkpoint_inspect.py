"""``foregate inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from foregate.checkpoint.opening import open_checkpoint
from foregate.checkpoint.pack import pack
from foregate.cli.inspect import budgets, inspect
from foregate.errors import CheckpointError
from test_checkpoint_support import tiny

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(inspect)


def run(*arguments: object) -> dict[str, object]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert isinstance(facts, dict)
    return facts


def test_facts_are_those_of_the_spec(tmp_path: Path) -> None:
    spec = open_checkpoint(tiny(tmp_path, "qwen3_moe")).spec
    facts = run(tmp_path)
    assert facts["model_type"] == "qwen3_moe"
    assert facts["moe_layers"] == [0, 2, 3]
    assert facts["expert_bytes"] == spec.expert_bytes
    assert facts["bytes_per_token"] == spec.bytes_per_token
    assert facts["expert_bytes_per_token"] == spec.top_k * 3 * spec.expert_bytes
    assert facts["min_budget_bytes"] == spec.expert_slot_bytes
    assert facts["layer_budget_bytes"] == 4 * spec.expert_slot_bytes
    assert facts["packed"] is False


def test_a_pack_tells_the_same(tmp_path: Path) -> None:
    pack(tiny(tmp_path / "source"), tmp_path / "out")
    original, packed = run(tmp_path / "source"), run(tmp_path / "out")
    assert packed["packed"] is True
    for facts in (original, packed):
        del facts["directory"], facts["packed"]
    assert packed == original


def test_budgets_are_shares_of_all_slots(tmp_path: Path) -> None:
    rows = budgets(open_checkpoint(tiny(tmp_path)).spec)
    assert [(row["percent"], row["slots"], row["per_layer"]) for row in rows] == [
        (25, 16, 4.0),
        (50, 32, 8.0),
        (75, 48, 12.0),
        (100, 64, 16.0),
    ]
    assert rows[-1]["bytes"] == 64 * 12288


def test_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny(tmp_path, "deepseek_v2")
    inspect(str(tmp_path))
    table, err = capfd.readouterr()
    assert err == ""
    for text in (
        "deepseek_v2 (DeepseekV2ForCausalLM), BF16",
        "4, of which 3 with experts",
        "12, 3 chosen per token",
        "75%",
    ):
        assert text in table


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the header: the data of the file is never touched."""
    import builtins
    import io

    tiny(tmp_path)
    weights = tmp_path / "model.safetensors"
    limit = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    ends: list[int] = []

    class Watched(io.FileIO):
        def readall(self) -> bytes:
            raise AssertionError("the whole file is read")

        def close(self) -> None:
            if not self.closed:
                ends.append(self.tell())
            super().close()

    real = io.open

    def open_(self: Path, mode: str = "r", *arguments: object, **options: object) -> object:
        if self.name == "model.safetensors":
            return Watched(self, mode)
        return real(self, mode, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", open_)
    monkeypatch.setattr(builtins, "open", real)
    open_checkpoint(tmp_path)
    assert ends == [limit]


def test_errors_are_ours() -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        inspect("/no/such/model")
