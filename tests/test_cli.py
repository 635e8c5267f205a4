"""The command line as a user meets it: figures on request, one line and a non-zero exit on bad input."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foregate.cli import main as cli
from foregate.testing.tiny import build

Tiny = Callable[[str], Path]
KEYS = {
    "text", "token_ids", "prompt_tokens", "ttft_s", "tpot_s", "expert_cache", "read_bytes", "prefetch", "stall_s",
    "overlap_ratio", "resident_bytes_peak", "budget_bytes", "rss_peak_bytes", "predictor", "cache_policy",
}  # fmt: skip


@pytest.fixture
def foregate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """``foregate(*arguments, stdin=...)`` → exit code, stdout, stderr of the real entry point."""

    def call(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["foregate", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return call


Foregate = Callable[..., tuple[int, str, str]]


def fails(result: tuple[int, str, str], *words: str) -> None:
    """The result is one clear line on stderr with ``words`` in it, nothing on stdout, and a non-zero code."""
    code, out, err = result
    assert code != 0
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def test_run_json_has_every_promised_figure(foregate: Foregate, tiny: Tiny) -> None:
    code, out, _ = foregate("run", tiny("qwen2_moe"), "-p", "abc", "--max-new-tokens", 5, "--json")
    figures = json.loads(out)
    assert code == 0
    assert figures.keys() >= KEYS
    assert set(figures["expert_cache"]) == {"hits", "misses", "evictions"}
    assert set(figures["read_bytes"]) == {"demand", "prefetch"}
    assert set(figures["prefetch"]) == {"issued", "used", "late", "wasted", "cancelled"}
    assert len(figures["token_ids"]) == 5
    assert figures["ttft_s"] > 0
    assert figures["rss_peak_bytes"] > figures["resident_bytes_peak"] > 0


def test_text_is_the_same_streamed_or_in_json(foregate: Foregate, tiny: Tiny, tmp_path: Path) -> None:
    arguments = ("run", tiny("qwen2_moe"), "--max-new-tokens", 6, "--budget", "50%")
    file = tmp_path / "prompt.txt"
    file.write_text("abc")
    streamed = foregate(*arguments, "-p", "abc", "--stats")
    wanted = json.loads(foregate(*arguments, "-p", "abc", "--json")[1])["text"]
    assert streamed[1] == wanted + "\n"
    assert "decode speed" in streamed[2]
    assert json.loads(foregate(*arguments, "-f", file, "--json")[1])["text"] == wanted
    assert json.loads(foregate(*arguments, "--json", stdin="abc")[1])["text"] == wanted


def test_chat_template_is_used_unless_off(foregate: Foregate, tiny: Tiny) -> None:
    arguments = ("run", tiny("qwen2_moe"), "-p", "abc", "--max-new-tokens", 1, "--json")
    with_template = json.loads(foregate(*arguments)[1])["prompt_tokens"]
    without = json.loads(foregate(*arguments, "--chat-template", "off")[1])["prompt_tokens"]
    assert with_template > without


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory-budget", "nan"], ["'nan'", "finite"]),
        (["--memory-budget", "12 parsecs"], ["12 parsecs", "parsecs"]),
        (["--memory-budget", "-5%"], ["-5%"]),
        (["--memory-budget", "100"], ["100 bytes", "minimum", "24,576"]),
        (["--predictor", "crystal-ball"], ["crystal-ball", "choose from: none, popularity", "next-gate"]),
        (["--cache-policy", "fifo"], ["fifo", "lru, lfu, lfru, echo"]),
        (["--prefetch", "sometimes"], ["sometimes", "auto, off"]),
        (["--memory-budget", "1e308TB"], ["1e308TB"]),
        (["--predictor", "none", "--prefetch", "4"], ["none", "4"]),
        (["--lookahead", "99"], ["99", "at most 3"]),
        (["--temperature", "nan"], ["nan"]),
        (["--temperature", "1e-45"], ["1e-45"]),
        (["-p", "bad \udcff byte"], ["UTF-8"]),
        (["--top-p", "0.5"], ["0.5", "temperature"]),
        (["--max-new-tokens", "0"], ["0"]),
        (["--max-new-tokens", "many"], ["max-new-tokens"]),
        (["--reader-threads", "0"], ["0"]),
        (["--chat-template", "maybe"], ["maybe"]),
        (["-p", " "], ["empty"]),
        (["-p", "word " * 400], ["tokens", "context", "256"]),
        (["-f", "nowhere.txt"], ["nowhere.txt"]),
        (["--colour"], ["--colour"]),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else None,
)
def test_bad_input_is_one_line(arguments: list[str], words: list[str], foregate: Foregate, tiny: Tiny) -> None:
    prompt = [] if {"-p", "-f"} & set(arguments) else ["-p", "abc"]
    fails(foregate("run", tiny("qwen2_moe"), *prompt, *arguments), *words)


def test_no_prompt_at_all(foregate: Foregate, tiny: Tiny) -> None:
    fails(foregate("run", tiny("qwen2_moe")), "prompt", "empty")


def test_two_prompts(foregate: Foregate, tiny: Tiny) -> None:
    fails(foregate("run", tiny("qwen2_moe"), "-p", "a", "-f", "b.txt"), "not both")


def test_not_an_moe(foregate: Foregate, tmp_path: Path) -> None:
    fails(foregate("run", build("llama", tmp_path / "llama"), "-p", "abc"), "not a Mixture-of-Experts model", "llama")


def test_unsupported_family_by_name(foregate: Foregate, tmp_path: Path) -> None:
    fails(foregate("run", build("dbrx", tmp_path / "dbrx"), "-p", "abc"), "dbrx")


@pytest.mark.parametrize("command", ["run", "inspect"])
def test_no_such_model(command: str, foregate: Foregate) -> None:
    prompt = ["-p", "abc"] if command == "run" else []
    fails(foregate(command, "./nowhere", *prompt), "nowhere")


def damaged(tiny: Tiny, directory: Path, change: Callable[[Path], Any]) -> Path:
    shutil.copytree(tiny("qwen2_moe"), directory)
    change(directory)
    return directory


def truncate(directory: Path) -> None:
    shard = directory / "model.safetensors"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1000)


def remove_shard(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def wrong_index(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    names = {"model.not.there": "model-00001-of-00001.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def junk_header(directory: Path) -> None:
    with (directory / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * 8)


def integers(directory: Path) -> None:
    """Relabel every float32 tensor as int32: same size, wrong kind of number."""
    path = directory / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"F32"', b'"I32"'))


def broken_template(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ raise_exception('no thanks') }}")


def no_tokenizer(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (truncate, ["model.safetensors", "bytes"]),
        (remove_shard, ["safetensors"]),
        (wrong_index, ["model.not.there"]),
        (junk_header, ["model.safetensors"]),
        (integers, ["I32"]),
        (no_tokenizer, ["tokenizer"]),
        (broken_template, ["chat template", "no thanks"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damaged_checkpoint_is_one_line(
    change: Callable[[Path], Any], words: list[str], foregate: Foregate, tiny: Tiny, tmp_path: Path
) -> None:
    fails(foregate("run", damaged(tiny, tmp_path / "m", change), "-p", "abc"), *words)


def test_corrupt_pack_never_gives_tokens_of_wrong_weights(foregate: Foregate, tiny: Tiny, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    assert foregate("pack", tiny("qwen2_moe"), packed, "--quiet")[0] == 0
    path = packed / "experts.safetensors"
    content = bytearray(path.read_bytes())
    for offset in range(len(content) // 4 * 4096 // 4096, len(content), 4096):
        content[offset] ^= 1
    path.write_bytes(content)
    code, out, err = foregate("run", packed, "-p", "abc", "--json")
    assert (code, out) == (1, "")
    assert "checksum" in err or "header" in err
    fails(foregate("pack", "--verify", packed, "--quiet"), "experts.safetensors")


def test_corrupt_dense_weights_of_a_pack_are_noticed(foregate: Foregate, tiny: Tiny, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    assert foregate("pack", tiny("qwen2_moe"), packed, "--quiet")[0] == 0
    path = packed / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    fails(foregate("run", packed, "-p", "abc"), "model.safetensors")


def test_pack_into_an_impossible_place(foregate: Foregate, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fails(foregate("pack", tiny("qwen2_moe"), tmp_path / "file" / "out", "--quiet"), "out")


def test_inspect_json(foregate: Foregate, tiny: Tiny) -> None:
    code, out, _ = foregate("inspect", tiny("qwen2_moe"), "--json")
    figures = json.loads(out)
    assert code == 0
    assert figures["model_type"] == "qwen2_moe"
    assert figures["top_k"] == 2


def test_doctor_json(foregate: Foregate, tmp_path: Path) -> None:
    code, out, _ = foregate("doctor", "--dir", tmp_path, "--expert-size", "4MiB", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["disk"]["gb_per_s"]["1"] > 0
    assert found["disk"]["read_bytes"] == 4 * 2**20
    assert found["memory"]["limit_bytes"] <= found["memory"]["total_bytes"]
    assert found["versions"]["torch"]


def test_doctor_refuses_nonsense(foregate: Foregate, tmp_path: Path) -> None:
    fails(foregate("doctor", "--dir", tmp_path / "nowhere"), "nowhere")
    fails(foregate("doctor", "--expert-size", "50%"), "50%")


def test_an_unforeseen_error_is_one_line_too(foregate: Foregate, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr("foregate.checkpoint.locate.locate", fail)
    fails(foregate("inspect", tiny("qwen2_moe")), "RuntimeError: out of luck", "FOREGATE_DEBUG")


def test_version_and_help(foregate: Foregate) -> None:
    assert foregate("--version")[1].startswith("foregate ")
    assert "--memory-budget" in foregate("run", "--help")[1]
