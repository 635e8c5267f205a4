"""The benchmark: arms differ in what they say, runs are cold and paired, the JSON has what the docs promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from foregate.bench.arms import RESIDENT, choose, standard_arms
from foregate.bench.summary import paired
from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.errors import ConfigError
from foregate.testing.cgroup import Limits, available, confined

needs_cgroup = pytest.mark.skipif(available() is None, reason="no memory limit can be set here")


def test_an_arm_that_does_not_exist_is_refused_with_the_choices() -> None:
    arms = standard_arms("next-gate", 2, "lfru")
    assert [arm.name for arm in choose(arms, "oracle,cache-only:lru")] == [
        "oracle@1", "oracle@2", "oracle@4", "cache-only:lru",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"'oracles'.*all-resident"):
        choose(arms, "oracles")


def test_ratios_pair_runs_of_the_same_prompt_and_round() -> None:
    times = {("a", 0): (2.0, 1.0), ("b", 0): (9.0, 3.0)}
    runs = [
        {"arm": arm, "prompt": prompt, "round": number, "step_s": [seconds]}
        for (prompt, number), pair in times.items()
        for arm, seconds in zip(("slow", "fast"), pair, strict=True)
    ]
    assert paired(runs, "fast", "slow") == {"median": 2.5, "min": 2.0, "max": 3.0, "pairs": 2}


def test_a_reset_engine_is_cold_and_says_the_same_tokens() -> None:
    ids = list(range(5, 25))
    with Engine(RunConfig(memory_budget="25%", predictor="none")) as engine:
        first = [step.token_id for step in engine.stream(ids, SamplingConfig(max_new_tokens=4))]
        for changes in (
            {"cache_policy": "lru"},
            {"predictor": "next-gate", "lookahead": 2},
            {"memory_budget": str(4 * engine.spec.expert_slot_bytes), "predictor": "none", "lookahead": None},
            {"reader_threads": 0, "prefetch": "off"},
        ):
            engine.reset(**changes)
            assert [step.token_id for step in engine.stream(ids, SamplingConfig(max_new_tokens=4))] == first
            assert engine.report is not None
            assert engine.report.cold
        assert engine.report.slots == 4
        assert engine.report.as_dict()["decode"]["hits"] == 0
        with pytest.raises(ConfigError, match="model cannot change"):
            engine.reset(model="other")


@needs_cgroup
def test_a_box_kills_what_takes_too_much_memory() -> None:
    command = [sys.executable, "-c", "x = bytearray(300 << 20); print(len(x))"]
    with confined(Limits(64 << 20)) as box:
        assert subprocess.run(box.command(command), preexec_fn=box.join, capture_output=True).returncode != 0
    with confined(Limits(600 << 20)) as box:
        assert subprocess.run(box.command(command), preexec_fn=box.join, capture_output=True).returncode == 0


@needs_cgroup
def test_the_command_ends_with_one_json_object(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "foregate", "bench", "reference", "--budget", "25%", "--tokens", "4"]
    command += [
        "--rounds",
        "1",
        "--out",
        str(tmp_path),
        "--arms",
        "cache-only:lru,cache+prefetch,oracle@1,all-resident",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["outputs_identical"] is True
    assert set(found["arms"]) == {"cache-only:lru", "cache+prefetch:next-gate@2", "oracle@1", RESIDENT}
    assert found["arms"]["cache-only:lru"]["read_mb_per_token"] > found["arms"][RESIDENT]["read_mb_per_token"]
    assert found["limits"]["disk_gb_per_s_best"] > 0
    assert {"cache+prefetch:next-gate@2 vs cache-only:lru", "oracle@1 vs cache-only:lru"} <= set(found["ratios"])
    assert json.loads((tmp_path / "bench.json").read_text()) == found


@pytest.mark.parametrize("option", [["--throttle", "fast"], ["--arms", "nothing"], ["--budget", "-3%"]])
def test_bad_input_is_one_line_with_the_value(option: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "foregate", "bench", "reference", *option], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert option[1].split(",")[0] in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
