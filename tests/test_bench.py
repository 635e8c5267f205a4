"""The benchmark: arms differ in what they say, runs are cold and paired, the JSON has what the docs promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from foregate.bench.arms import ORACLE, ORACLE_ALL, RESIDENT, choose, standard_arms
from foregate.bench.contention import contention
from foregate.bench.figure import parts
from foregate.bench.grid import never_below, worst
from foregate.bench.kept import Kept
from foregate.bench.lineup import line_up, parse_rivals, rivals_source
from foregate.bench.overhead import SPARE, STEP, measured_overhead
from foregate.bench.prompts import exact_prompts, parse_lengths
from foregate.bench.rivals import RIVALS
from foregate.bench.rivals.pagecache import drop
from foregate.bench.rivals.readahead import HeldError, read_ahead, setting_of
from foregate.bench.session import Outcome, Session, Setting
from foregate.bench.summary import _compute_s, _domains, bound, disk_limit, oracle_gain, paired, ratios, summarise
from foregate.bench.usage import gauged
from foregate.checkpoint.locate import locate
from foregate.checkpoint.opening import open_checkpoint
from foregate.checkpoint.pack import pack
from foregate.cli.main import main
from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.errors import ConfigError, ForegateError, KilledError
from foregate.testing.cgroup import Limits, available, confined

needs_cgroup = pytest.mark.skipif(available() is None, reason="no memory limit can be set here")


def _sets_read_ahead() -> bool:
    try:
        return os.access(setting_of(Path()), os.W_OK) and os.geteuid() == 0
    except ForegateError:
        return False


needs_read_ahead = pytest.mark.skipif(not _sets_read_ahead(), reason="read-ahead cannot be set here")


def test_an_arm_that_does_not_exist_is_refused_with_the_choices() -> None:
    arms = standard_arms(["next-gate"], 2, "lfru")
    assert [arm.name for arm in choose(arms, "oracle@,oracle-all@2,cache-only:lru")] == [
        "oracle@1", "oracle@2", "oracle@4", "oracle-all@2", "cache-only:lru",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"'oracles'.*all-resident"):
        choose(arms, "oracles")


def test_the_share_of_an_oracles_gain_is_told_against_each_kind_of_oracle() -> None:
    stalls = {"cache-only:lru": 10, "cache+prefetch:x@1": 7, "oracle@1": 8, "oracle@2": 6, "oracle-all@2": 4}
    arms = {name: {"exposed_io_ms": stall} for name, stall in stalls.items()}
    told = [oracle_gain(arms, "cache-only:lru", "cache+prefetch:x@1", kind) for kind in (ORACLE, ORACLE_ALL)]
    assert told == [0.75, 0.5]
    assert oracle_gain(arms, "cache-only:lru", "cache-only:lru", ORACLE) is None
    assert oracle_gain(arms, None, "cache+prefetch:x@1", ORACLE) is None


def test_ratios_pair_runs_of_the_same_prompt_and_round() -> None:
    times = {("a", 0): (2.0, 1.0), ("b", 0): (9.0, 3.0)}
    runs = [
        {"arm": arm, "prompt": prompt, "round": number, "step_s": [seconds]}
        for (prompt, number), pair in times.items()
        for arm, seconds in zip(("slow", "fast"), pair, strict=True)
    ]
    assert paired(runs, "fast", "slow") == {"median": 2.5, "min": 2.0, "max": 3.0, "pairs": 2}


def test_every_predictor_under_test_has_its_own_arms_at_its_own_lookahead() -> None:
    names = [arm.name for arm in standard_arms(["next-gate", "pre-attention-gate"], None, "lfru")]
    assert {
        "cache+prefetch:next-gate@1",
        "cache+prefetch:pre-attention-gate@0",
        "prefetch-only:pre-attention-gate@0",
    } <= set(names)
    assert len(set(names)) == len(names)
    with pytest.raises(ConfigError, match="'nex-gate'"):
        standard_arms(["nex-gate"], None, "lfru")


def _run(arm: str, seconds: float, prompt: str = "code/1", number: int = 0, ttft_s: float = 1.0) -> dict[str, Any]:
    return {
        "arm": arm, "prompt": prompt, "round": number, "step_s": [seconds],
        "report": {"ttft_s": ttft_s, "prefill": {"read_bytes": 10**9}},
    }  # fmt: skip


def test_a_gain_in_one_domain_does_not_hide_the_loss_in_another() -> None:
    times = {"code/1": (2.0, 1.0), "prose/1": (0.9, 1.0)}
    runs = [_run("cache-only:lru", both[0], prompt) for prompt, both in times.items()]
    runs += [_run("cache+prefetch:x@1", both[1], prompt) for prompt, both in times.items()]
    cell = {"budget": "25%", "throttle_bps": None, "domains": _domains(runs)}
    assert "never below 0.90 of the best cache-only arm over 1 cells and 2 domains" in str(never_below([cell]))
    found = worst([cell])
    assert found is not None
    assert (found["domain"], found["median"], found["by_arm"]) == ("prose", 0.9, {"cache+prefetch:x@1": 0.9})
    assert worst([{**cell, "domains": {}}]) is None


def test_prefetch_is_held_against_every_cache_policy_and_not_only_the_one_that_lost() -> None:
    seconds = {"cache-only:lru": (3.0, 1.0), "cache-only:echo": (2.0, 1.5), "cache+prefetch:x@1": (1.0, 1.0)}
    runs = [_run(arm, value, number=number) for arm, both in seconds.items() for number, value in enumerate(both)]
    found = ratios(runs)
    assert found["cache+prefetch:x@1 vs cache-only:lru"] == {"median": 2.0, "min": 1.0, "max": 3.0, "pairs": 2}
    assert found["cache+prefetch:x@1 vs best-cache-only"] == {
        "against": "cache-only:echo", "median": 1.75, "min": 1.5, "max": 2.0, "pairs": 2,
    }  # fmt: skip


def test_a_bound_is_the_slower_of_arithmetic_and_reading_and_no_more() -> None:
    reading = {"read_mb_per_token": 100.0, "tpot_ms": {"median": 200.0}}
    assert bound(reading, 80.0, disk=2.0) == {"bound_ms": 80.0, "distance_to_bound": 2.5}
    assert bound(reading, 80.0, disk=0.5)["bound_ms"] == 200.0
    assert disk_limit({"disk_gb_per_s_best": 1.4}, 300_000_000) == 0.3
    assert disk_limit({"disk_gb_per_s_best": 0.2}, 300_000_000) == 0.2


def test_a_prompt_has_exactly_as_many_tokens_as_asked_for_and_a_short_text_is_refused(tmp_path: Path) -> None:
    def encode(text: str) -> list[int]:
        return [len(word) for word in text.split()]

    found = exact_prompts(encode, [], None, [64, 512])
    assert {name: len(ids) for name, ids in found.items()} == {
        "code/64": 64, "code/512": 512, "prose/64": 64, "prose/512": 512,
    }  # fmt: skip
    assert found["code/512"][:64] == found["code/64"]
    short = tmp_path / "short.txt"
    short.write_text("only four words here")
    with pytest.raises(ConfigError, match="no text of 64 tokens"):
        exact_prompts(encode, [str(short)], None, [64])
    with pytest.raises(ConfigError, match="'6x'"):
        parse_lengths("64,6x")


PROTOCOL = """
import json, sys
from foregate.bench.rivals.outcome import measure, read_tokens
tokens = read_tokens(__import__("pathlib").Path(sys.argv[1]))
print("chatter of a library")
print(measure(tokens, lambda: lambda ids: ids[-1], rival="echo", version="1", settings={"threads": 1}).line())
"""


class Echo:
    """A program that follows the rivals' protocol, to test who starts it and reads it; no measure of anything."""

    FORMAT = "none"

    def __init__(self, source: str) -> None:
        self.source = source

    def available(self) -> str | None:
        return None

    def prepare(self, model_dir: Path, work_dir: Path, progress: Any) -> Path:
        file = work_dir / "weights"
        file.write_bytes(bytes(1 << 16))
        return file

    def command(self, prepared: Path, tokens_file: Path, threads: int) -> list[str]:
        return [sys.executable, "-c", self.source, str(tokens_file)]

    def files(self, prepared: Path) -> list[Path]:
        return [prepared]


def _read_ahead_in(folder: Path) -> tuple[Any, Path]:
    """``read_ahead`` on a copy of /sys, and the file of the setting: other tests may hold the machine's."""
    device = folder.stat().st_dev
    setting = folder / "dev" / "block" / f"{os.major(device)}:{os.minor(device)}" / "queue" / "read_ahead_kb"
    setting.parent.mkdir(parents=True)
    setting.write_text("8192")
    return partial(read_ahead, sys=folder, state=folder / "state"), setting


@needs_cgroup
def test_a_rival_runs_in_the_same_limit_and_one_that_fails_is_listed_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_for_a_while, setting = _read_ahead_in(tmp_path)
    monkeypatch.setattr("foregate.bench.lineup.read_ahead", set_for_a_while)
    known = {
        "echo": Echo(PROTOCOL),
        "greedy": Echo("x = bytearray(3 << 30)"),
        "broken": Echo("import sys; sys.exit('error: no such tensor')"),
        "silent": Echo(f"print('read-ahead', open({str(setting)!r}).read(), end='')"),
    }
    lineup = line_up(list(known), open_checkpoint(locate("reference")), tmp_path, known, lambda text: None)
    session = Session(
        "reference", choose(standard_arms(["next-gate"], 1, "lfru"), "cache-only:lru,cache+prefetch"),
        {"code/1": list(range(5, 15))}, tokens=3, rounds=1, threads=1, cgroup="auto", lineup=lineup,
    )  # fmt: skip
    outcome = session.run(Setting("25%"))
    run = next(run for run in outcome.runs if run["arm"] == "rival:echo")
    assert run["limit_bytes"] == outcome.limit_bytes
    assert len(run["step_s"]) == 2
    assert run["rival"]["argmax"] == [14, *outcome.runs[0]["report"]["token_ids"][:2]]
    assert set(outcome.rivals_failed) == {"rival:greedy", "rival:broken", "rival:silent"}
    assert "more than" in outcome.rivals_failed["rival:greedy"]
    assert "no such tensor" in outcome.rivals_failed["rival:broken"]
    assert "last line 'read-ahead 128'" in outcome.rivals_failed["rival:silent"]
    assert setting.read_text().strip() == "8192"
    found = summarise(outcome, {"disk_gb_per_s_best": 1.0})
    assert found["rivals_failed"] == outcome.rivals_failed
    assert {"cache+prefetch:next-gate@1 vs rival:echo", "cache-only:lru vs rival:echo (TTFT)"} <= set(found["ratios"])
    assert found["outputs_identical"]
    assert json.loads(json.dumps(found)) == found


@needs_cgroup
@pytest.mark.parametrize("rivals", [[], ["e"]])
def test_every_other_round_runs_the_arms_backwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rivals: list[str]
) -> None:
    monkeypatch.setattr("foregate.bench.lineup.read_ahead", _read_ahead_in(tmp_path)[0])
    lineup = line_up(rivals, open_checkpoint(locate("reference")), tmp_path, {"e": Echo(PROTOCOL)}, lambda text: None)
    session = Session(
        "reference", choose(standard_arms(["next-gate"], 1, "lfru"), "cache-only:lru,cache+prefetch"),
        {"code/1": list(range(5, 15))}, tokens=2, rounds=3, threads=1, cgroup="auto", lineup=lineup,
    )  # fmt: skip
    runs = [(run["round"], run["arm"].split(":")[0]) for run in session.run(Setting("25%")).runs]
    ours = [run for run in runs if run[1] != "rival"]
    a, b = "cache-only", "cache+prefetch"
    assert ours == [(0, a), (0, b), (1, b), (1, a), (2, a), (2, b)]
    assert [number for number, arm in runs if arm == "rival"] == list(range(3 * len(rivals)))


@needs_cgroup
def test_a_second_benchmark_on_the_machine_is_an_error_and_not_the_failure_of_a_rival(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_for_a_while, _ = _read_ahead_in(tmp_path)
    monkeypatch.setattr("foregate.bench.lineup.read_ahead", set_for_a_while)
    lineup = line_up(["e"], open_checkpoint(locate("reference")), tmp_path, {"e": Echo(PROTOCOL)}, lambda text: None)
    session = Session(
        "reference", choose(standard_arms(["next-gate"], 1, "lfru"), "cache-only:lru"),
        {"code/1": list(range(5, 15))}, tokens=3, rounds=1, threads=1, cgroup="auto", lineup=lineup,
    )  # fmt: skip
    with set_for_a_while(tmp_path), pytest.raises(HeldError, match="held by process"):
        session.run(Setting("25%"))


def test_a_rival_that_is_missing_is_listed_and_an_unknown_one_refused(tmp_path: Path) -> None:
    class Missing(Echo):
        def available(self) -> str | None:
            return "No module named 'nothing'"

    lineup = line_up(["m"], open_checkpoint(locate("reference")), tmp_path, {"m": Missing("")}, lambda text: None)
    assert lineup.as_dict() == {"m": {"runs": False, "reason": "No module named 'nothing'"}}
    with pytest.raises(ConfigError, match=r"'lama\.cpp'.*llama\.cpp, accelerate"):
        parse_rivals("lama.cpp", RIVALS)


def test_rivals_are_given_the_checkpoint_that_a_pack_was_made_from_and_no_other(tmp_path: Path, tiny: Any) -> None:
    pack(locate("reference"), tmp_path / "packed")
    with pytest.raises(ConfigError, match="--rivals-model"):
        rivals_source(str(tmp_path / "packed"), None)
    with pytest.raises(ConfigError, match="fingerprints differ"):
        rivals_source(str(tmp_path / "packed"), str(tiny("qwen3_moe")))
    assert rivals_source(str(tmp_path / "packed"), "reference").directory == locate("reference")


def test_the_parts_of_a_bar_add_up_to_its_token() -> None:
    arm = {"tpot_ms": {"median": 10.0}, "compute_ms": 6.0, "exposed_io_ms": 3.0}
    assert sum(parts(arm)) == 10.0
    assert parts({**arm, "compute_ms": 8.0}) == [8.0, 3.0, 0.0, 0.0]
    assert parts({"tpot_ms": {"median": 7.0}}) == [0.0, 0.0, 0.0, 7.0]


def test_arithmetic_is_what_the_engine_timed_or_else_experts_and_the_dense_part() -> None:
    timed = [{"expert_compute_s_per_token": 3.0, "product_s_per_token": s} for s in (4.0, 6.0)]
    assert _compute_s(timed, 10.0) == 5.0
    assert _compute_s([*timed, {"expert_compute_s_per_token": 9.0, "product_s_per_token": None}], 10.0) == 15.0


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


def test_contention_compares_experts_beside_reads_with_experts_without() -> None:
    busy = [(1000 * i, 1000 * i + 300) for i in range(30)]
    quiet = [(100_000 + 1000 * i, 100_000 + 1000 * i + 100) for i in range(30)]
    grazed = [(29_900, 40_000)]
    found = contention([*quiet, *busy, *grazed], [(15_000, 30_000), (0, 20_000)])
    assert found["ratio"] == pytest.approx(3.0)
    assert (found["experts_while_reading"], found["experts_without"]) == (30, 30)
    assert contention(quiet, [])["ratio"] is None
    assert contention([], [])["experts_without"] == 0


def test_what_is_kept_is_found_again_only_where_nothing_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"value": len(calls)}

    kept = Kept(tmp_path)
    assert [kept.measured("25%-none", {"tokens": 4}, measure)["value"] for _ in range(2)] == [1, 1]
    assert kept.has("25%-none", {"tokens": 4})
    assert kept.measured("25%-none", {"tokens": 5}, measure)["value"] == 2
    monkeypatch.setattr("foregate.bench.kept.code_hash", lambda: "another version")
    assert kept.measured("25%-none", {"tokens": 4}, measure)["value"] == 3
    assert Kept(None).measured("25%-none", {"tokens": 4}, measure)["value"] == 4
    for file in tmp_path.iterdir():
        file.write_text("{")
    with pytest.raises(ConfigError, match="not a kept measurement"):
        kept.measured("25%-none", {"tokens": 4}, measure)


def test_an_outcome_that_was_kept_is_the_one_that_was_measured() -> None:
    outcome = Outcome(Setting("25%", 300_000_000), 10**9, dense_s=0.5, runs=[_run("cache-only:lru", 1.0)], warm=True)
    outcome.used("foregate", 10**9, {"allocated_bytes": 5, "page_cache_bytes": 7})
    outcome.used("foregate", 10**9, {"allocated_bytes": 4, "page_cache_bytes": 9})
    assert outcome.uses["foregate"] == {"limit_bytes": 10**9, "allocated_bytes": 5, "page_cache_bytes": 9}
    assert Outcome.from_json(json.loads(json.dumps(asdict(outcome)))) == outcome


def test_the_measured_overhead_is_one_under_which_a_run_has_come_through() -> None:
    tried: list[int] = []

    def trial(overhead: int) -> dict[str, int]:
        tried.append(overhead)
        if overhead < 5 * STEP:
            raise KilledError("killed")
        return {"allocated_bytes": 1000 + 2 * STEP, "page_cache_bytes": 0}

    assert measured_overhead(trial, stated=24 * STEP, held=1000) == 5 * STEP + SPARE
    assert tried == [24 * STEP, 3 * STEP, 4 * STEP, 5 * STEP]
    assert measured_overhead(trial, stated=5 * STEP, held=1000) == 5 * STEP
    with pytest.raises(ForegateError, match="systemd-run"):
        measured_overhead(lambda overhead: None, stated=STEP, held=0)


@needs_cgroup
def test_a_box_tells_what_was_allocated_apart_from_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(8 << 20))
    drop([file])
    source = f"x = bytearray(b'1') * (64 << 20); y = open({str(file)!r}, 'rb').read(); import time; time.sleep(0.6)"
    with confined(Limits(512 << 20)) as box, gauged(box) as usage:
        subprocess.run(box.command([sys.executable, "-c", source]), preexec_fn=box.join, check=True)
    found = usage.as_dict()
    assert found is not None
    assert 64 << 20 <= found["allocated_bytes"] < 128 << 20
    assert found["page_cache_bytes"] >= 8 << 20


@needs_cgroup
def test_a_box_kills_what_takes_too_much_memory() -> None:
    command = [sys.executable, "-c", "x = bytearray(300 << 20); print(len(x))"]
    with confined(Limits(64 << 20)) as box:
        assert subprocess.run(box.command(command), preexec_fn=box.join, capture_output=True).returncode != 0
    with confined(Limits(600 << 20)) as box:
        assert subprocess.run(box.command(command), preexec_fn=box.join, capture_output=True).returncode == 0


@needs_cgroup
def test_the_command_ends_with_one_json_object(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "foregate", "bench", "reference", "--budget", "25%", "--tokens", "4", "--rounds", "1",
        "--out", str(tmp_path), "--lookahead", "2",
        "--arms", "cache-only:lru,cache+prefetch,oracle@1,oracle-all@1,all-resident",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["outputs_identical"] is True
    assert set(found["arms"]) == {"cache-only:lru", "cache+prefetch:next-gate@2", "oracle@1", "oracle-all@1", RESIDENT}
    asked = [name for name, arm in found["arms"].items() if arm["controller"]["reason"] == "4 a layer, as asked"]
    assert asked == ["oracle-all@1"]
    assert found["arms"]["cache-only:lru"]["read_mb_per_token"] > 0
    assert found["arms"][RESIDENT]["read_mb_per_token"] == 0
    assert found["arms"][RESIDENT]["hit"] == 1
    assert [name for name, arm in found["arms"].items() if arm["warm"]] == [RESIDENT]
    assert found["arms"][RESIDENT]["expert_vs_resident"] == 1
    uses = found["cells"][0]["uses"]
    assert set(uses) == {"foregate", f"foregate:{RESIDENT}"}
    assert all(0 < used["allocated_bytes"] <= used["limit_bytes"] for used in uses.values())
    limits = found["limits"]
    assert min(limits["disk_gb_per_s_best"], limits["memory_read_gb_per_s"]) > 0
    assert "contention" not in limits
    watched = found["arms"]["cache-only:lru"]["contention"]
    assert watched["experts_while_reading"] + watched["experts_without"] > 0
    assert {"bf16", "int8", "int4/32"} <= set(limits["matmul"])
    vs = ("cache+prefetch:next-gate@2 vs cache-only:lru", "oracle@1 vs best-cache-only")
    assert set(vs) <= set(found["ratios"])
    assert "never below" in found["summary"]
    assert set(found["ratios"]["worst"]["by_arm"]) == {"cache+prefetch:next-gate@2"}
    assert found["model"]["fingerprint"] == open_checkpoint(locate("reference")).fingerprint
    assert {"name", "model"} <= set(found["disk"])
    assert json.loads((tmp_path / "bench.json").read_text()) == found
    assert b"bound" in (tmp_path / "bench.svg").read_bytes()
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    said = [done.stdout.index(text) for text in ("physical limits", "TPOT ms", "how many times faster")]
    assert said == sorted(said)


@pytest.mark.rivals
@pytest.mark.timeout(600)
@needs_cgroup
@needs_read_ahead
def test_llama_cpp_and_accelerate_run_beside_our_arms(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "foregate", "bench", "reference", "--budget", "50%", "--tokens", "4", "--rounds", "1",
        "--arms", "cache+prefetch,all-resident", "--rivals", "llama.cpp,accelerate,flyweight-llm",
        "--work-dir", str(tmp_path), "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["arms"]["rival:llama.cpp"]["agreement"] > 0.8
    assert "all-resident vs rival:llama.cpp:all-resident" in found["ratios"]
    assert {"rival:accelerate"} <= {*found["arms"], *found["cells"][0]["rivals_failed"]}
    assert "flyweight" in found["rivals"]["flyweight-llm"]["reason"]


@pytest.mark.parametrize(
    "option",
    [
        ["--throttle", "fast"],
        ["--domain", "poetry"],
        ["--overhead", "little"],
        ["--quality-tokens", "9"],
        ["--arms", "nothing"],
        ["--budget", "-3%"],
        ["--predictor", "seer"],
        ["--prompt-tokens", "0"],
        ["--prompts", "6"],
        ["--prompts", "7", "--prompt-tokens", "64"],
        ["--rivals", "lama.cpp"],
        ["--work-dir", "elsewhere"],
    ],
)
def test_bad_input_is_one_line_with_the_value(
    option: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["foregate", "bench", "reference", *option])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert option[1].split(",")[0] in said
    assert len(said.strip().splitlines()) == 1
