"""The trace that ships with the package, and the commands that make it and its larger siblings."""

from __future__ import annotations

from pathlib import Path

import pytest

from foregate.checkpoint.locate import locate
from foregate.errors import TraceError
from foregate.trace import make_traces, sample
from foregate.trace.identity import directory_fingerprint
from foregate.trace.info import describe


def test_the_sample_is_whole_small_and_of_the_reference_model() -> None:
    reader = sample.open_sample()
    found = describe(reader.path)
    assert found["problems"] == []
    assert found["complete"]
    assert found["fingerprint"] == directory_fingerprint(locate("reference"))
    assert set(found["domains"]) == {"mathematics", "code", "prose", "mmlu", "synthetic"}
    assert found["rows"] > 100_000
    size = sum(path.stat().st_size for path in reader.path.rglob("*") if path.is_file())
    assert size < make_traces.SAMPLE_LIMIT


def test_its_absence_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sample, "SAMPLE", tmp_path / "nothing")
    with pytest.raises(TraceError, match=r"nothing is not in this installation.*make_traces --sample"):
        sample.open_sample()


@pytest.mark.parametrize("small", [True, False])
def test_every_domain_has_a_command_that_can_be_resumed(small: bool) -> None:
    commands = make_traces.commands("reference", Path("out"), Path("data"), sample=small)
    assert [Path(command[command.index("--out") + 1]).name for command in commands] == list(make_traces.DOMAINS)
    assert all("--resume" in command and command[:2] == ["trace", "reference"] for command in commands)
    assert all(("--scores" in command) != small for command in commands)
    assert "data" in commands[0]


def test_a_command_that_fails_ends_the_rest(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"foregate trace info .* failed"):
        make_traces.run(["trace", "info", str(tmp_path)])
