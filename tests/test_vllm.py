"""Real vLLM against transformers: both route the same tokens to the same experts. ``make vllm-test``.

vLLM lives in an environment of its own, .venv-vllm (or FOREGATE_VLLM_PYTHON names its Python), and runs as a process;
transformers is that of this environment.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foregate
from foregate.checkpoint.locate import locate
from foregate.errors import CheckpointError
from foregate.testing.tiny import build
from foregate.trace.reader import TraceReader
from foregate.trace.vllm.agreement import Agreement, compare, self_agreement

ROOT = Path(foregate.__file__).parents[2]
PYTHON = Path(os.environ.get("FOREGATE_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
SOURCES = str(Path(foregate.__file__).parents[1])

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PYTHON.is_file(), reason=f"no vLLM: {PYTHON} is not there (make vllm-test makes it)"),
]

QUESTIONS = [
    f"Question: {name} has {count} marbles and finds {more} more in the garden. A third of them are blue, and half of "
    f"the blue ones are large. On Sunday {name} gives {more} away to a friend who has none, and the friend loses two "
    f"of them on the way home. How many marbles do they have together in the end?\nAnswer:"
    for name, count, more in (("Tom", 41, 13), ("Ada", 28, 5), ("Kofi", 77, 19), ("Mei", 16, 8))
]

CALL = """
import json, sys
from foregate.trace.vllm import Options, record
given = json.loads(sys.argv[1])
done = record(given["model"], given["prompts"], given["out"], options=Options(**given["options"]), **given["more"])
print(json.dumps([done.total, done.before, done.done, done.tokens, done.skipped]))
"""


@pytest.fixture(scope="module")
def reference() -> str:
    try:
        return str(locate("reference"))
    except CheckpointError as error:
        pytest.skip(str(error))


def environment(**more: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": SOURCES,
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        **more,
    }


def record(model: str, prompts: list[str], out: Path, options: dict[str, Any], **more: Any) -> list[int]:
    """``record`` in a process with vLLM; its progress: total, before, done, tokens, skipped."""
    given = json.dumps({"model": model, "prompts": prompts, "out": str(out), "options": options, "more": more})
    run = subprocess.run(
        [str(PYTHON), "-c", CALL, given], env=environment(), capture_output=True, text=True, check=False, timeout=400
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found: list[int] = json.loads(run.stdout.strip().splitlines()[-1])
    return found


def show(title: str, found: Agreement) -> None:
    """Figures for the log: ``pytest -s``."""
    print(f"\n{title}: {json.dumps(found.summary())}")


def test_float32_agrees_in_every_decision_under_chunks_batches_and_preemption(tmp_path: Path, reference: str) -> None:
    """Memory for five blocks of 128 tokens: four requests of up to two blocks do not fit, so some start again."""
    options = {
        "dtype": "float32",
        "batch": 4,
        "scores": True,
        "timings": True,
        "kv_cache_bytes": 10 << 20,
        "more": {"max_model_len": 512, "max_num_batched_tokens": 48},
    }
    out = tmp_path / "trace"
    assert record(reference, QUESTIONS, out, options, max_new_tokens=96, limit=1)[:3] == [1, 0, 1]
    assert record(reference, QUESTIONS, out, options, max_new_tokens=96, resume=True)[:3] == [4, 1, 4]
    reader = TraceReader(out)
    assert reader.complete
    passes = [part.grid(part.pass_index)[:, 0] for part in reader]
    assert any(len(set(found[:90].tolist())) > 1 for found in passes), "no prompt came in chunks"
    assert any(found[0] > 0 for found in passes), "no request was preempted"
    for part in reader:
        assert (part.grid(part.position)[:, 0] == np.arange(part.entry.tokens)).all()
        begins = np.diff(part.grid(part.pass_index)[:, 0], prepend=-1) != 0
        for name in reader.header.timings:
            assert (part.grid(part.timing(name))[~begins] == -1).all()
    timed = {name: [part.grid(part.timing(name)) for part in reader] for name in reader.header.timings}
    assert set(timed) == {"attention_ns", "routing_ns", "dispatch_ns", "experts_ns"}
    counts = {name: sum(int((values[:, 0] >= 0).sum()) for values in found) for name, found in timed.items()}
    assert len(set(counts.values())) == 1, counts
    assert counts["attention_ns"] > 96
    found = compare(out, reference)
    show("float32", found)
    assert found.share == 1.0
    assert np.nanmax(found.weights) < 5e-4  # float16 on disk


def test_bfloat16_differs_at_near_ties_alone(tmp_path: Path, reference: str) -> None:
    """Both sides round to 8 bits in another order. Where they differ, two experts were as good as equal."""
    out = tmp_path / "trace"
    record(reference, QUESTIONS, out, {"dtype": "bfloat16", "batch": 4, "scores": True}, max_new_tokens=96)
    found, control = compare(out, reference), self_agreement(out, reference)
    show("bfloat16", found)
    show("transformers, token by token against one pass", control)
    assert found.share > 0.96
    apart = ~found.equal
    assert (found.margin[apart] <= 2 * found.shift[apart] + 1e-6).all()
    new = apart & found.first
    assert found.margin[new].max(initial=0.0) < np.quantile(found.margin, 0.2)
    # as transformers differs from itself when it multiplies matrices of other shapes
    assert (1 - found.share) < 4 * (1 - control.share) + 0.005


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_other_families_agree_in_every_decision(family: str, tmp_path: Path) -> None:
    # vLLM's attention on CPU takes heads of 32 and up; those of the tiny checkpoints are 16 wide
    model, out = str(build(family, tmp_path / family, num_attention_heads=2)), tmp_path / "trace"
    prompts = ["the answer is in the other hand", "a test of others and an attention", "seven"]
    record(model, prompts, out, {"dtype": "float32", "chat_template": "off", "scores": True}, max_new_tokens=40)
    found = compare(out, model)
    show(family, found)
    assert len(found.equal) > 400
    assert found.share == 1.0


def test_errors_of_the_command_are_one_line(tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("hello there")
    command = [str(PYTHON), "-m", "foregate.trace.vllm", "reference", "--dataset", str(text), "--out"]
    run = subprocess.run(
        [*command, str(text)], env=environment(), capture_output=True, text=True, check=False, timeout=400
    )
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1] == f"error: {text} is a file; a trace is a directory"


def test_a_server_with_the_plugin_traces_its_requests(tmp_path: Path, reference: str) -> None:
    out, plugins = tmp_path / "trace", tmp_path / "plugins"
    entry = plugins / "foregate_for_test-0.dist-info"  # the entry point, whether or not foregate is installed there
    entry.mkdir(parents=True)
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: foregate-for-test\nVersion: 0\n")
    (entry / "entry_points.txt").write_text("[vllm.general_plugins]\nforegate = foregate.trace.vllm.plugin:register\n")
    path = os.pathsep.join((SOURCES, str(plugins)))
    with server(reference, tmp_path / "log", PYTHONPATH=path, FOREGATE_VLLM_TRACE=str(out)) as url:
        for number, question in enumerate(QUESTIONS[:2]):
            ask(url, f"mine/{number}", question)
    reader = TraceReader(out)
    assert reader.complete
    assert [entry.prompt for entry in reader.entries] == ["cmpl-mine/0-0", "cmpl-mine/1-0"]
    assert {entry.decode_tokens for entry in reader.entries} == {15}
    assert compare(out, reference).share == 1.0


@contextmanager
def server(model: str, log: Path, **variables: str) -> Iterator[str]:
    """An OpenAI server of vLLM in float32; ends it and waits."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "it"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-num-seqs", "4"]
    command += ["--enforce-eager", "--no-enable-prefix-caching", "--kv-cache-memory-bytes", str(128 << 20)]
    command += ["--shutdown-timeout", "60"]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment(**variables), stdout=file, stderr=file)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1/completions"
        finally:
            process.terminate()
            process.wait(timeout=120)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def ask(url: str, name: str, prompt: str) -> None:
    body = {"model": "it", "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    headers = {"Content-Type": "application/json", "X-Request-Id": name}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=120) as reply:
        assert json.loads(reply.read())["usage"]["completion_tokens"] == 16
