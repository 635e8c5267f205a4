"""Real llama.cpp and real accelerate compute what transformers computes. ``make rivals-test``.

They live in an environment of their own, .venv-rivals (or FOREGATE_RIVALS_PYTHON names its Python); transformers is
that of this environment.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from foregate.bench.rivals import RIVALS
from foregate.bench.rivals.environment import RIVALS as THERE
from foregate.bench.rivals.environment import variables
from foregate.bench.rivals.outcome import Outcome
from foregate.bench.rivals.pagecache import cached_bytes, drop
from foregate.bench.rivals.readahead import read_ahead, setting_of
from foregate.checkpoint.locate import locate
from foregate.errors import ForegateError
from foregate.testing.cgroup import available, run_limited
from foregate.testing.inflate import inflate

pytestmark = [pytest.mark.rivals, pytest.mark.timeout(600)]

TEXT = (
    "Question: Natalia sold 48 clips in April and half as many in May. How many clips did she sell in all?\nAnswer: "
    "def add(numbers):\n    total = 0\n    for number in numbers:\n        total += number\n    return total\n"
    "The cmake command prints a message for the user; see the documentation of the other options. Ångström ≤ 10 µm"
)
PROMPT_TOKENS = 48

LOGITS = """
import sys, numpy as np
from pathlib import Path
from foregate.bench.rivals.llama_run import load
from foregate.bench.rivals.outcome import read_tokens
tokens = read_tokens(Path(sys.argv[2]))
llama = load(Path(sys.argv[1]), tokens, 1, exact=sys.argv[4] == "exact")
rows = [llama.logits(tokens.prompt).copy()] + [llama.logits([token]).copy() for token in tokens.stream]
np.save(sys.argv[3], np.stack(rows))
"""

SPLIT = """
import json, sys
from llama_cpp import Llama
llama = Llama(sys.argv[1], vocab_only=True, verbose=False)
print(json.dumps(llama.tokenize(sys.argv[2].encode(), add_bos=False)))
"""


@pytest.fixture(autouse=True, scope="module")
def installed() -> None:
    """Looked for when a test runs, not when tests are collected: it takes seconds."""
    needs(RIVALS["llama.cpp"].available() or RIVALS["accelerate"].available())


def needs(reason: str | None) -> None:
    """Skip for ``reason``, if there is one."""
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def reference() -> Path:
    return locate("reference")


@pytest.fixture(scope="module")
def ids(reference: Path) -> list[int]:
    found: list[int] = AutoTokenizer.from_pretrained(reference)(TEXT)["input_ids"]
    return found


@pytest.fixture(scope="module")
def tokens(ids: list[int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.json"
    path.write_text(json.dumps({"prompt": ids[:PROMPT_TOKENS], "stream": ids[PROMPT_TOKENS:]}))
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


def exported(reference: Path, work: Path, dtype: str) -> Path:
    from foregate.bench.rivals.gguf_export import export

    return export(reference, work / f"reference-{dtype}.gguf", dtype)


def expected(model: Path, ids: list[int], dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """transformers' logits after the prompt and after every token of the stream, [1 + stream, vocabulary]."""
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    with torch.inference_mode():
        logits: torch.Tensor = stock(torch.tensor([ids])).logits[0, PROMPT_TOKENS - 1 :].float()
    return logits.numpy()


def llama_logits(gguf: Path, tokens: Path, out: Path, how: str) -> np.ndarray[Any, Any]:
    """``how``: ``exact`` (keys, values and attention in fp32) or ``usual``, as it is timed."""
    command = [THERE.python(), "-c", LOGITS, str(gguf), str(tokens), str(out), how]
    done = subprocess.run(command, env=variables(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    return np.asarray(np.load(out))


def outcome(line: str) -> Outcome:
    return Outcome(**json.loads(line))


def ran(name: str, prepared: Path, tokens: Path) -> Outcome:
    done = subprocess.run(RIVALS[name].command(prepared, tokens, 1), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    return outcome(done.stdout.splitlines()[-1])


def spread(row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Logits as log-probabilities: what sampling sees."""
    shifted = row - row.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def test_llama_cpp_in_fp32_gives_the_logits_of_transformers(
    reference: Path, ids: list[int], tokens: Path, work: Path
) -> None:
    """Permuted heads, swapped experts, another rope or epsilon would show here and not in a speed figure."""
    found = llama_logits(exported(reference, work, "f32"), tokens, work / "f32.npy", "exact")
    wanted = expected(reference, ids, torch.float32)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < 1e-4
    assert (found.argmax(-1) == wanted.argmax(-1)).all()


@pytest.mark.parametrize(("dtype", "agreeing", "median_shift"), [("bf16", 0.94, 0.01), ("q8_0", 0.9, 0.05)])
def test_llama_cpp_in_the_formats_that_are_timed_computes_the_same_model(
    reference: Path, ids: list[int], tokens: Path, work: Path, dtype: str, agreeing: float, median_shift: float
) -> None:
    found = llama_logits(exported(reference, work, dtype), tokens, work / f"{dtype}.npy", "usual")
    wanted = expected(reference, ids, torch.float32)
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() >= agreeing
    top = np.take_along_axis(spread(found) - spread(wanted), wanted.argmax(-1)[:, None], -1)
    assert np.median(np.abs(top)) < median_shift


def test_llama_cpp_splits_text_into_the_same_tokens(reference: Path, ids: list[int], work: Path) -> None:
    gguf = exported(reference, work, "f32")
    done = subprocess.run(
        [THERE.python(), "-c", SPLIT, str(gguf), TEXT], env=variables(), capture_output=True, text=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == ids


def test_inflated_models_are_the_same_model_to_llama_cpp(
    reference: Path, ids: list[int], tokens: Path, work: Path
) -> None:
    """Heads whose size is not hidden / heads, and a rescaled epsilon."""
    large = inflate("reference", work / "large", hidden_factor=4, intermediate=192, heads=8, kv_heads=4)
    found = llama_logits(exported(large, work / "large-gguf", "f32"), tokens, work / "large.npy", "exact")
    wanted = expected(reference, ids, torch.float32)
    assert np.abs(found - wanted).max() < 1e-4


def test_llama_cpp_runner_says_what_it_did(reference: Path, tokens: Path, work: Path) -> None:
    rival = RIVALS["llama.cpp"]
    prepared = rival.prepare(reference, work, lambda done, total: None)
    drop(rival.files(prepared))
    said = ran("llama.cpp", prepared, tokens)
    stream = json.loads(tokens.read_text())["stream"]
    assert len(said.tpot_ms) == len(stream) == len(said.argmax) - 1
    assert said.read_bytes >= prepared.stat().st_size * 0.9
    assert said.read_bytes == said.load_read_bytes + said.prefill_read_bytes + said.decode_read_bytes
    assert said.peak_rss_bytes > prepared.stat().st_size * 0.9
    assert min(said.ttft_s, *said.tpot_ms) > 0


def test_accelerate_offloads_and_still_computes_the_same_tokens(
    reference: Path, ids: list[int], tokens: Path, work: Path
) -> None:
    prepared = RIVALS["accelerate"].prepare(reference, work, lambda done, total: None)
    said = ran("accelerate", prepared, tokens)
    wanted = expected(reference, ids, torch.bfloat16).argmax(-1)
    # bfloat16: one pass and token by token round differently, 98 % of expert sets agree (dev/LOG.md)
    assert (np.asarray(said.argmax) == wanted).mean() >= 0.9


def test_airllm_streams_layers_and_still_computes_the_same_tokens(
    reference: Path, ids: list[int], tokens: Path, work: Path
) -> None:
    needs(RIVALS["airllm"].available())
    short = work / "short.json"
    short.write_text(json.dumps({"prompt": ids[:PROMPT_TOKENS], "stream": ids[PROMPT_TOKENS : PROMPT_TOKENS + 2]}))
    said = ran("airllm", RIVALS["airllm"].prepare(reference, work, lambda done, total: None), short)
    assert said.argmax == expected(reference, ids, torch.bfloat16).argmax(-1)[:3].tolist()


def test_flyweight_says_itself_why_it_is_not_run(tmp_path: Path) -> None:
    """If this fails, flyweight-llm may have learned the family: then it is a rival and wants a program."""
    needs(THERE.missing("flyweight"))
    said = RIVALS["flyweight-llm"].available()
    assert said is not None
    assert "required Qwen tensor is missing" in said
    with pytest.raises(ForegateError, match="required Qwen tensor"):
        RIVALS["flyweight-llm"].prepare(tmp_path, tmp_path, lambda done, total: None)


@pytest.mark.skipif(available() is None, reason="no way to limit memory here")
def test_accelerate_keeps_what_fits_the_limit_and_maps_the_rest(tokens: Path, work: Path) -> None:
    """All layers resident under a limit would be no offload; none would be no fair rival."""
    large = inflate("reference", work / "offloaded", hidden_factor=4, intermediate=512)
    rival = RIVALS["accelerate"]
    prepared = rival.prepare(large, work, lambda done, total: None)
    drop(rival.files(prepared))
    limit = 1 << 30
    done = run_limited(rival.command(prepared, tokens, 1), limit)
    assert done.returncode == 0, done.stderr[-500:]
    said = outcome(done.stdout.splitlines()[-1])
    assert said.settings["limit_bytes"] == limit
    assert said.settings["placed"]["disk"] >= 1
    assert done.peak_bytes is None or done.peak_bytes <= limit


@pytest.mark.skipif(available() is None, reason="no way to limit memory here")
def test_llama_cpp_under_a_limit_reads_the_file_again(reference: Path, tokens: Path, work: Path) -> None:
    """What is not resident must come from the disk: or the limit was none, or the page cache was another group's."""
    large = inflate("reference", work / "mapped", hidden_factor=4, intermediate=512)
    rival = RIVALS["llama.cpp"]
    prepared = rival.prepare(large, work, lambda done, total: None)
    drop(rival.files(prepared))
    assert cached_bytes(prepared) < prepared.stat().st_size * 0.01
    done = run_limited(rival.command(prepared, tokens, 1), prepared.stat().st_size // 2)
    assert done.returncode == 0, done.stderr[-500:]
    said = outcome(done.stdout.splitlines()[-1])
    assert said.prefill_read_bytes > prepared.stat().st_size * 0.3
    assert said.decode_read_bytes > 0


@pytest.mark.skipif(os.geteuid() != 0, reason="setting the read-ahead needs root")
def test_the_real_read_ahead_is_set_and_put_back(work: Path) -> None:
    setting = setting_of(work)
    before = int(setting.read_text())
    other = 64 if before != 64 else 128
    with read_ahead(work, other) as said:
        assert (said, int(setting.read_text())) == (before, other)
    assert int(setting.read_text()) == before
