"""The figures of a run add up, mean what they say, and stay within the budget."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import Any

import pytest

from foregate.config import RunConfig, SamplingConfig
from foregate.engine import dense
from foregate.engine.engine import Engine
from foregate.errors import ConfigError, ForegateError, PromptError
from foregate.experts.echo import Echo
from foregate.native import kernels
from foregate.predictors.oracle import RouteRecorder
from foregate.testing.tiny import build
from foregate.types import FinishReason

PROMPT = [5 + (7 * i) % 240 for i in range(24)]
Tiny = Callable[[str], Path]


def report(path: Path, tokens: int = 12, **settings: Any) -> tuple[dict[str, Any], Engine, RouteRecorder]:
    with Engine(RunConfig(model=str(path), **settings)) as engine:
        recorder = RouteRecorder()
        engine.observers.append(recorder)
        list(engine.stream(PROMPT, SamplingConfig(max_new_tokens=tokens)))
        assert engine.report is not None
        return engine.report.as_dict(), engine, recorder


@pytest.mark.parametrize("predictor", ["stale-gate", "next-gate", "random", "oracle"])
def test_every_speculative_read_has_one_fate(predictor: str, tiny: Tiny) -> None:
    figures, _, _ = report(tiny("qwen2_moe"), memory_budget="30%", predictor=predictor, prefetch="4")
    fates = figures["prefetch"]
    assert fates["issued"] > 0
    assert fates["issued"] == fates["used"] + fates["wasted"] + fates["cancelled"]
    assert fates["late"] <= fates["used"]


def test_oracle_wastes_nothing_while_decoding(tiny: Tiny) -> None:
    config = RunConfig(model=str(tiny("qwen2_moe")), memory_budget="30%", predictor="oracle", prefetch="4")
    with Engine(config) as engine:
        list(engine.stream(PROMPT, SamplingConfig(max_new_tokens=12)))
        assert engine.report is not None
        decode = engine.report.decode
    assert sum(step.stats.used for step in decode) > 0
    assert sum(step.stats.wasted + step.stats.cancelled for step in decode) == 0


@pytest.mark.parametrize("settings", [{"predictor": "none"}, {"prefetch": "off"}], ids=str)
def test_off_means_off(settings: dict[str, str], tiny: Tiny) -> None:
    figures, _, _ = report(tiny("mixtral"), memory_budget="50%", **settings)
    assert figures["prefetch"] == {"issued": 0, "used": 0, "late": 0, "wasted": 0, "cancelled": 0}
    assert figures["read_bytes"]["prefetch"] == 0
    assert figures["controller"]["reason"]


def test_hits_and_misses_count_every_needed_expert_once(tiny: Tiny) -> None:
    figures, _, recorder = report(tiny("qwen3_moe"), memory_budget="40%", predictor="next-gate")
    needed = sum(len(chosen) for step in recorder.steps for chosen in step.values())
    decode = figures["decode"]
    assert decode["hits"] + decode["misses"] == needed


def test_everything_resident_reads_every_expert_at_most_once(tiny: Tiny) -> None:
    figures, engine, _ = report(tiny("qwen2_moe"), tokens=30, memory_budget="100%", predictor="next-gate")
    moved = figures["read_bytes"]["demand"] + figures["read_bytes"]["prefetch"]
    assert figures["expert_cache"]["evictions"] == 0
    # The direct store reads whole 4 KiB blocks around each tensor, hence the slack.
    assert moved <= 2 * engine.spec.experts * engine.plan.slot_bytes


def test_small_budgets_read_more_than_large_ones(tiny: Tiny) -> None:
    small, _, _ = report(tiny("olmoe"), memory_budget="13%", predictor="none")
    large, _, _ = report(tiny("olmoe"), memory_budget="100%", predictor="none")
    assert small["read_bytes"]["demand"] > large["read_bytes"]["demand"]
    assert small["decode"]["hit_rate"] < large["decode"]["hit_rate"]


def test_budget_bounds_what_is_held(tiny: Tiny) -> None:
    figures, engine, _ = report(tiny("mixtral"), memory_budget="200KB", predictor="next-gate", prefetch="8")
    assert 0 < figures["resident_bytes_peak"] <= figures["budget_bytes"] == 200_000
    assert engine.plan.slots == 200_000 // engine.plan.slot_bytes


def test_length_and_stop_reasons(tiny: Tiny) -> None:
    with Engine(RunConfig(model=str(tiny("qwen3_moe")))) as engine:
        steps = list(engine.stream(PROMPT, SamplingConfig(max_new_tokens=4)))
        assert [step.finish for step in steps] == [None, None, None, FinishReason.LENGTH]
        stop = steps[1].token_id
        engine.model.generation_config.eos_token_id = [stop]
        steps = list(engine.stream(PROMPT, SamplingConfig(max_new_tokens=4)))
        assert steps[-1].token_id == stop
        assert steps[-1].finish is FinishReason.STOP
        assert steps[-1].text == ""


def test_generation_ends_where_the_context_does(tiny: Tiny) -> None:
    with Engine(RunConfig(model=str(tiny("qwen3_moe")))) as engine:
        prompt = (PROMPT * 20)[: engine.context - 3]
        steps = list(engine.stream(prompt, SamplingConfig(max_new_tokens=50)))
        assert len(steps) == 3
        assert steps[-1].finish is FinishReason.LENGTH


def test_sampling_repeats_with_its_seed_and_differs_without(tiny: Tiny) -> None:
    with Engine(RunConfig(model=str(tiny("qwen3_moe")))) as engine:

        def sample(seed: int) -> list[int]:
            sampling = SamplingConfig(max_new_tokens=10, temperature=1.0, top_p=0.9, seed=seed)
            return [step.token_id for step in engine.stream(PROMPT, sampling)]

        assert sample(1) == sample(1)
        assert sample(1) != sample(2)


def test_a_slow_consumer_is_not_the_engines_time(tiny: Tiny) -> None:
    with Engine(RunConfig(model=str(tiny("qwen3_moe")))) as engine:
        stream = engine.stream(PROMPT, SamplingConfig(max_new_tokens=3))
        next(stream)
        sleep(0.5)
        assert next(stream).stats.wall_s < 0.5


def test_products_are_timed_where_the_kernels_have_them_and_not_guessed_elsewhere(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, _, _ = report(tiny("qwen3_moe"), memory_budget="40%")
    assert figures["decode"]["product_s_per_token"] is None  # torch multiplies matrices as small as these
    if kernels.library() is None:
        pytest.skip("the kernels are not built")
    monkeypatch.setattr(dense, "SMALLEST", 1)
    config = RunConfig(model=str(build("qwen3_moe", tmp_path / "model", dtype="bfloat16")), memory_budget="40%")
    with Engine(config) as engine:
        assert engine.dense.sufficient
        steps = list(engine.stream(PROMPT, SamplingConfig(max_new_tokens=12)))
    for step in steps[1:]:
        stats = step.stats
        assert 0 < stats.product_s < stats.wall_s - stats.stall_s


def test_oracle_tells_observers_once_and_keeps_no_recorder(tiny: Tiny) -> None:
    with Engine(RunConfig(model=str(tiny("qwen3_moe")), predictor="oracle")) as engine:
        heard = RouteRecorder()
        engine.observers.append(heard)
        for _ in range(2):
            list(engine.stream(PROMPT, SamplingConfig(max_new_tokens=4)))
        assert engine.observers == [heard]
        assert len(heard.steps) == 2 * 3


def test_what_a_prompt_streams_is_not_called_prediction(tiny: Tiny) -> None:
    figures, _, _ = report(tiny("olmoe"), tokens=1, memory_budget="60%", predictor="next-gate")
    assert figures["prefill"]["streamed_ahead"]["issued"] > 0
    assert figures["prefetch"]["issued"] == figures["read_bytes"]["prefetch"] == 0


def test_no_slot_is_set_aside_while_speculation_is_off(tiny: Tiny) -> None:
    config = RunConfig(model=str(tiny("qwen2_moe")), memory_budget="50%", predictor="random")
    with Engine(config) as engine:
        stream = engine.stream(PROMPT, SamplingConfig(max_new_tokens=40))
        for _ in range(4):  # the prompt, two control steps, one that speculates
            next(stream)
        assert engine.cache.staging > 0
        asked = engine.predictor.predict
        engine.predictor.predict = lambda signals: pytest.fail("asked while off")  # type: ignore[method-assign]
        engine.prefetcher.controller.switch_off("a test")
        next(stream)
        assert engine.cache.staging == 0
        engine.predictor.predict = asked  # type: ignore[method-assign]


def test_an_interrupted_engine_refuses_to_go_on(tiny: Tiny) -> None:
    with Engine(RunConfig(model=str(tiny("qwen3_moe")))) as engine:

        def interrupt(step: object) -> None:
            raise KeyboardInterrupt

        engine.predictor.observe = interrupt  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            list(engine.stream(PROMPT))
        with pytest.raises(ForegateError, match="rebuilt"):
            list(engine.stream(PROMPT))


def test_token_ids_outside_the_vocabulary_are_named(tiny: Tiny) -> None:
    with Engine(RunConfig(model=str(tiny("qwen3_moe")))) as engine, pytest.raises(PromptError, match="99999"):
        list(engine.stream([1, 99999]))


def test_lookahead_beyond_the_model_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="lookahead 3: at most 2 with 3 MoE layers"):
        Engine(RunConfig(model=str(tiny("qwen3_moe")), lookahead=3))


def test_no_weight_is_left_in_the_page_cache_or_on_a_mapped_file(tiny: Tiny) -> None:
    """Dense weights on a mapping of the checkpoint would let the page cache hold experts beside the budget."""
    path = tiny("olmoe")
    with Engine(RunConfig(model=str(path), memory_budget="25%")) as engine:
        list(engine.stream(PROMPT, SamplingConfig(max_new_tokens=4)))
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
        assert mapped == []
        assert cached_pages(path / "model.safetensors") == 0


def cached_pages(file: Path) -> int:
    """Pages of ``file`` in the page cache, by mincore(2)."""
    size = file.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    with (
        file.open("rb") as handle,
        mmap.mmap(handle.fileno(), size, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as view,
    ):
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        start = ctypes.addressof(ctypes.c_char.from_buffer(view))
        assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), pages) == 0
        return sum(page & 1 for page in pages)


def test_where_every_expert_fits_no_policy_watches_the_routing(tiny: Tiny) -> None:
    for budget, watches in (("100%", False), ("50%", True)):
        with Engine(RunConfig(model=str(tiny("mixtral")), memory_budget=budget, cache_policy="echo")) as engine:
            assert (engine.runtime._informed is not None) is watches
            assert isinstance(engine.cache.policy, Echo) is watches
