"""Prompts in chunks: where they are cut, that they compute the same model, and that no budget changes a bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from foregate.checkpoint.expand import Scratch
from foregate.config import RunConfig, SamplingConfig
from foregate.engine.chunks import READ_WHOLE, REST, chunk_bounds
from foregate.engine.engine import Engine
from foregate.engine.runtime import _Groups
from foregate.engine.signals import KEPT_ROWS
from foregate.errors import ConfigError
from foregate.events import Event, ReadEnded
from foregate.testing.tiny import FAMILIES
from foregate.trace.tracker import RouterTracker
from foregate.types import ExpertKey

Tiny = Callable[[str], Path]

CHUNKED = ("llama4_text", "gpt_oss", "granitemoe_swa", "qwen3_next", "jamba")
TOLERANCE = 1e-4
"""Of logits of about 4 in float32. Linear attention scans in blocks, which the cut moves: 7e-5; others below 1e-5."""


def ids_of(tokens: int) -> list[int]:
    return [5 + (7 * i + i * i // 5) % 240 for i in range(tokens)]


def config(path: Path, budget: str = "100%", **settings: object) -> RunConfig:
    return RunConfig(model=str(path), memory_budget=budget, threads=1, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [16, 64, 512])
@pytest.mark.parametrize("tokens", [1, 8, 16, 17, 24, 25, 511, 512, 520, 521, 1024, 2047])
def test_every_token_is_in_one_chunk_and_no_pass_is_wasted_on_a_rest(tokens: int, size: int) -> None:
    bounds = chunk_bounds(tokens, size)
    assert [i for first, last in bounds for i in range(first, last)] == list(range(tokens))
    assert all(last - first == size for first, last in bounds[:-1])
    if len(bounds) > 1:
        assert REST < bounds[-1][1] - bounds[-1][0] <= size + REST


def test_a_chunk_too_small_to_be_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="prefill chunk 8"):
        RunConfig(prefill_chunk=8)


def chunked_difference(path: Path) -> float:
    with Engine(config(path, predictor="none")) as engine:
        whole = engine.logits(ids_of(60)).clone()
        engine.reset(prefill_chunk=20)
        return float((engine.logits(ids_of(60)) - whole).abs().max())


@pytest.mark.parametrize("family", CHUNKED)
def test_a_layer_that_forgets_its_state_between_chunks_would_be_seen(family: str, tiny: Tiny) -> None:
    difference = chunked_difference(tiny(family))
    assert difference < TOLERANCE
    assert (difference == 0) == (family in READ_WHOLE)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_chunks_as_it_reads_the_whole(family: str, tiny: Tiny) -> None:
    assert chunked_difference(tiny(family)) < TOLERANCE


@pytest.mark.parametrize("tokens", [9, 64, 230])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_no_budget_changes_a_bit_of_a_prompt_in_chunks(tokens: int, family: str, tiny: Tiny) -> None:
    def run(budget: str) -> tuple[torch.Tensor, list[int]]:
        with Engine(config(tiny(family), budget, prefill_chunk=48)) as engine:
            logits = engine.logits(ids_of(tokens)).clone()
            made = [s.token_id for s in engine.stream(ids_of(tokens), SamplingConfig(max_new_tokens=5))]
            engine.cache.check_integrity(idle=True)
            return logits, made

    logits, made = run("100%")
    for budget in ("50%", "25%", "13%"):
        other, tokens_made = run(budget)
        assert torch.equal(logits, other)
        assert made == tokens_made


def test_a_trace_of_chunks_has_the_positions_of_the_whole(tiny: Tiny) -> None:
    records = []
    for chunk in (512, 16):
        with Engine(config(tiny("qwen3_moe"), prefill_chunk=chunk)) as engine, RouterTracker(engine) as tracker:
            engine.logits(ids_of(40))
            records.append(tracker.take("p"))
    assert records[0].positions.tolist() == records[1].positions.tolist() == list(range(40))
    assert not records[1].decode.any()


def test_sorting_once_finds_the_tokens_that_searching_for_each_expert_found() -> None:
    torch.manual_seed(0)
    index = torch.stack([torch.randperm(9)[:3] for _ in range(40)])  # 8 is no expert: expert parallelism's sentinel
    weights = torch.rand(40, 3)
    groups = _Groups(index, weights, 8)
    for expert in range(8):
        token, rank = torch.where(index == expert)
        found, weight = groups.of(expert)
        assert torch.equal(found, token)
        assert torch.equal(weight, weights[token, rank, None])


def test_scratch_is_kept_and_two_matrices_do_not_share_it() -> None:
    scratch = Scratch()
    up, down = scratch.take("up", (4, 6), torch.bfloat16), scratch.take("down", (6, 4), torch.bfloat16)
    assert scratch.take("up", (4, 6), torch.bfloat16).data_ptr() == up.data_ptr() != down.data_ptr()
    assert scratch.take("up", (8, 6), torch.bfloat16).shape == (8, 6)


def test_a_cache_that_holds_every_expert_reads_none_twice(tiny: Tiny) -> None:
    """A prompt reads the next layer ahead whole: what it did not need used to be dropped, and read again each time.

    Whole reads are counted, not bytes: one that is cancelled under way is begun again in a later pass.
    """
    whole: Counter[ExpertKey] = Counter()

    class Ear:
        def on_event(self, event: Event) -> None:
            if isinstance(event, ReadEnded) and event.ok:
                whole[event.key] += 1

    with Engine(config(tiny("qwen3_moe"), "100%")) as engine:
        engine.listen(Ear())
        for _ in range(3):
            list(engine.stream(ids_of(30), SamplingConfig(max_new_tokens=2)))
        engine.cache.check_integrity(idle=True)
    assert set(whole.values()) == {1}


def test_a_prompt_leaves_few_of_its_hidden_states_behind(tiny: Tiny) -> None:
    """Three of every layer used to stay for the whole chunk: with 512 tokens a process was killed by its limit."""
    with Engine(config(tiny("qwen3_moe"), "50%")) as engine:
        for _ in range(2):  # the first pass finds the norms, later ones watch them
            engine.logits(ids_of(60))
            for part in engine.signals._flow.parts:
                for kept in (part.pre_attention, part.residual, part.router_input):
                    assert kept is not None
                    assert kept.untyped_storage().nbytes() <= KEPT_ROWS * kept.shape[-1] * kept.element_size()
