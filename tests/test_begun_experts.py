"""Experts that other threads begin while their caller goes on: the same bits, and nobody is left waiting."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
from torch import Tensor

from foregate.config import RunConfig, SamplingConfig
from foregate.engine import dense
from foregate.engine.engine import Engine
from foregate.experts.compute import Weights, expert_forward
from foregate.native import kernels
from foregate.native.decoder_layer import DecoderLayer
from foregate.native.library import calls
from foregate.testing.tiny import build
from test_kernels import FORMATS, Experts, expert, inputs

HIDDEN, WIDTH = 256, 64

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="the compiled kernels were not built")


def begin(held: list[Weights], x: Tensor, threads: int, width: int = WIDTH) -> tuple[int, Callable[[], Tensor]]:
    """What the kernel answers, and what ends it and tells the outputs."""
    fused, hidden = [one.fused(width) for one in held], x.shape[1]
    out = torch.full((len(held), x.shape[1]), 7.0, dtype=x.dtype)
    places = (ctypes.c_void_p * (2 * len(held)))(*[one.at for one in fused], *[row.data_ptr() for row in out])
    at, kind = ctypes.addressof(places), kernels.ACTIVATIONS[x.dtype]
    code = kernels.called("foregate_experts_begin", 9)(
        at, at + ctypes.sizeof(places) // 2, len(held), width, x.data_ptr(), hidden, hidden, kind, threads
    )
    # Only what the experts are and where the results go is to stay: the list of places need not.
    ctypes.memset(at, 0, ctypes.sizeof(places))

    def end() -> Tensor:
        assert kernels.called("foregate_experts_end", 1)(0) >= 0
        return out

    return code, end


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("threads", [2, 3])
def test_they_have_the_bits_of_one_by_one_whatever_happens_in_between(kind: str, threads: int) -> None:
    module, other = Experts(HIDDEN, WIDTH), inputs(3, HIDDEN)
    held = [Weights(expert(HIDDEN, WIDTH, kind, seed)[0]) for seed in range(5)]
    wanted, between = expert_forward(module, other, held[0]), []

    def compute() -> None:
        between.append(expert_forward(module, other, held[0]))

    for dtype in (torch.float32, torch.bfloat16):
        x = inputs(1, HIDDEN).to(dtype)
        alone = torch.cat([expert_forward(module, x, one) for one in held])
        for count in (1, 5):
            for _ in range(20):
                code, end = begin(held[:count], x, threads)
                assert code == 0
                others = threading.Thread(target=compute)
                others.start()
                compute()
                others.join()
                assert torch.equal(end(), alone[:count])
    assert len(between) == 2 * 2 * 2 * 20
    assert all(torch.equal(one, wanted) for one in between)


def test_where_nobody_else_computes_nothing_is_begun() -> None:
    held, x = [Weights(expert(HIDDEN, WIDTH, "int8")[0])], inputs(1, HIDDEN)
    assert begin(held, x, 1)[0] == kernels.NOBODY
    code, end = begin(held, x, 2)
    assert (code, begin(held, x, 2)[0]) == (0, kernels.NOBODY)
    end()
    code, end = begin(held, x, 2)
    assert code == 0
    end()


def test_what_the_kernels_refuse_leaves_the_threads_free() -> None:
    x = inputs(1, HIDDEN)
    mixed = [Weights(expert(HIDDEN, WIDTH, kind)[0]) for kind in ("int8", "bf16")]
    assert begin(mixed, x, 2)[0] == kernels.REFUSED
    code, end = begin(mixed[:1], x, 2)
    assert code == 0
    end()


def test_what_an_interrupt_kept_from_its_end_is_dropped_by_its_own_thread() -> None:
    held, x = [Weights(expert(HIDDEN, WIDTH, "int8")[0])], inputs(1, HIDDEN)
    code, _kept = begin(held, x, 2)
    assert code == 0
    other = threading.Thread(target=kernels.drop_begun_experts)
    other.start()
    other.join()
    assert begin(held, x, 2)[0] == kernels.NOBODY
    for _ in range(2):  # nothing is left the second time
        kernels.drop_begun_experts()
    code, end = begin(held, x, 2)
    assert code == 0
    end()


def test_predictions_and_experts_may_be_begun_together_and_end_in_any_order() -> None:
    gate, x = torch.randn(40, HIDDEN).bfloat16(), torch.randn(1, HIDDEN).bfloat16()
    ranker, held = kernels.Ranker(gate, None, 4), [Weights(expert(HIDDEN, WIDTH, "int8", seed)[0]) for seed in range(5)]
    wanted, alone = (
        ranker.best(1, x.data_ptr(), 8),
        torch.cat([expert_forward(Experts(HIDDEN, WIDTH), x, e) for e in held]),
    )
    kernels.use_threads(2)
    try:
        for number in range(60):
            code, end = begin(held, x, 2) if number % 2 else (0, None)
            tell = ranker.begin(1, x.data_ptr(), 8)
            second = ranker.begin(1, x.data_ptr(), 8)  # one is posted; another is left to its caller
            if end is None:
                code, end = begin(held, x, 2)
            assert code == 0
            outs = end() if number % 3 else None
            assert (tell(), second()) == (wanted, wanted)
            assert torch.equal(end() if outs is None else outs, alone)
    finally:
        kernels.use_threads(None)


@pytest.mark.skipif(calls() is None, reason="nothing is begun without the compiled calls")
def test_a_prediction_that_is_thrown_away_leaves_the_threads_free() -> None:
    gate, x = torch.randn(40, HIDDEN).bfloat16(), torch.randn(1, HIDDEN).bfloat16()
    ranker = kernels.Ranker(gate, None, 4)
    nothing = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(lambda context, chunk: None)
    post, join = kernels.loaded().foregate_post, kernels.loaded().foregate_join
    post.argtypes = [type(nothing), ctypes.c_void_p, ctypes.c_int64]
    kernels.use_threads(2)
    try:
        for _ in range(20):
            thrown = ranker.begin(1, x.data_ptr(), 8)
            assert post(nothing, None, 2) == 0
            del thrown
            assert post(nothing, None, 2) == 1
            join()
    finally:
        kernels.use_threads(None)


def test_what_was_dropped_before_its_end_is_told() -> None:
    held, x = [Weights(expert(HIDDEN, WIDTH, "int8")[0])], inputs(1, HIDDEN)
    code, _kept = begin(held, x, 2)
    kernels.drop_begun_experts()
    assert code == 0
    assert kernels.called("foregate_experts_end", 1)(0) == -1


FORKING = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from foregate.experts.compute import Weights, expert_forward
from foregate.native import kernels
from test_begun_experts import begin
from test_kernels import Experts, expert, inputs

hidden, width = 1024, 2048  # milliseconds
held = [Weights(expert(hidden, width, "int8", seed)[0]) for seed in range(4)]
module = Experts(hidden, width)
for number in range(6):
    x = inputs(1, hidden) * (1 + number)  # what was computed before is no answer
    alone = torch.cat([expert_forward(module, x, one) for one in held])
    code, end = begin(held, x, 2, width)
    assert code == 0
    child = os.fork()
    if child == 0:
        answer = 3
        signal.alarm(60)
        try:
            if number % 3 == 1:
                kernels.drop_begun_experts()
            elif number % 3 == 2 and not torch.equal(end(), alone):
                os._exit(4)
            code, end = begin(held, x, 2, width)
            answer = 0 if code == 0 and torch.equal(end(), alone) else 5
            if kernels.called("foregate_experts_end", 1)(0) != -1:
                answer = 6
        finally:
            os._exit(answer)
    assert torch.equal(end(), alone)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child computes something else"
"""


def test_a_child_that_is_forked_in_between_computes_all_of_it() -> None:
    here = str(Path(__file__).parent)
    found = subprocess.run([sys.executable, "-c", FORKING, here], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr


def test_the_time_in_which_others_compute_is_told_without_that_in_which_nobody_does() -> None:
    hidden, width = 1024, 2048
    held, x = [Weights(expert(hidden, width, "int8", seed)[0]) for seed in range(4)], inputs(1, hidden)
    told = []
    for _ in range(5):
        code, _kept = begin(held, x, 2, width)
        assert code == 0
        sleep(0.2)
        told.append(kernels.called("foregate_experts_end", 1)(0))
    assert all(0 <= ns < 195e6 for ns in told)
    assert any(told)


def test_a_slot_of_two_layers_is_computed_with_the_width_of_each() -> None:
    weights = Weights(expert(HIDDEN, WIDTH, "int8")[0])
    assert [weights.fused(width).hidden for width in (WIDTH, WIDTH // 2, WIDTH)] == [WIDTH, WIDTH // 2, WIDTH]


@pytest.mark.parametrize("budget", ["50%", "100%"])
def test_an_engine_whose_other_threads_begin_gives_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: str
) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = build("qwen3_moe", tmp_path, dtype="bfloat16", **sizes)
    begun: list[bool] = []
    begins = DecoderLayer.begin_experts

    def counted(layer: DecoderLayer, *given: Any) -> bool:
        begun.append(begins(layer, *given))
        return begun[-1]

    monkeypatch.setattr(dense, "SMALLEST", 1)
    results = []
    for begin_experts in (counted, lambda *_: False):
        monkeypatch.setattr(DecoderLayer, "begin_experts", begin_experts)
        config = RunConfig(model=str(model), memory_budget=budget, predictor="next-gate", prefetch="2", threads=2)
        with Engine(config) as engine:
            steps = engine.stream([1, 2, 3, 4], SamplingConfig(max_new_tokens=8))
            results.append([step.token_id for step in steps])
    assert results[0] == results[1]
    assert any(begun)
