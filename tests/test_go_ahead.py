"""What a token's step leaves begun for the next one: never another token, whatever happens in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Thread
from time import perf_counter_ns, sleep
from typing import Any

import pytest
import torch

from foregate.config import RunConfig, SamplingConfig
from foregate.engine import dense
from foregate.engine.clock import Clock
from foregate.engine.decode_step import DecodeStep
from foregate.engine.decoder_layer import Layer
from foregate.engine.engine import Engine
from foregate.experts.compute import Ended
from foregate.native import kernels
from foregate.native.decoder_layer import DecoderLayer
from foregate.native.head import Head, best
from foregate.testing.tiny import build
from foregate.types import ExpertKey
from test_residents import Silent, threads_are_free

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="the compiled kernels were not built")

PROMPT, OTHER, SAMPLING = [1, 2, 3, 4], [9, 8, 7], SamplingConfig(max_new_tokens=12)
ENGINES: list[Engine] = []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return str(build("qwen3_moe", tmp_path_factory.mktemp("model"), dtype="bfloat16", **sizes))


@pytest.fixture
def engine(model: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(dense, "SMALLEST", 1)
    given: Any = {"memory_budget": "60%", "predictor": "next-gate", "prefetch": "2", "threads": 2}
    with Engine(RunConfig(model=model, **given)) as made:
        yield made


@pytest.fixture
def full(model: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Has every expert resident, so that something is always begun."""
    monkeypatch.setattr(dense, "SMALLEST", 1)
    with Engine(RunConfig(model=model, memory_budget="100%", predictor="none", threads=2)) as made:
        ENGINES.append(made)
        yield made
        ENGINES.remove(made)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every decode step, whether it has gone on with what was begun."""
    seen: list[bool] = []
    gone = DecodeStep._gone_ahead

    def watched(self: DecodeStep, *given: Any) -> bool | None:
        found = gone(self, *given)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(DecodeStep, "_gone_ahead", watched)
    return seen


def tokens(engine: Engine, prompt: list[int] = PROMPT) -> list[int]:
    return [step.token_id for step in engine.stream(prompt, SAMPLING)]


def plain(engine: Engine, prompt: list[int]) -> list[int]:
    """Greedy tokens by the model's own forward, prompt and all, token by token."""
    ids = list(prompt)
    for _ in range(SAMPLING.max_new_tokens):
        ids.append(int(engine.logits(ids)[-1].float().argmax()))
    return ids[len(prompt) :]


def test_every_step_but_the_first_has_been_begun(engine: Engine, used: list[bool]) -> None:
    found = tokens(engine)
    assert used == [False] + [True] * (SAMPLING.max_new_tokens - 2)
    assert found == plain(engine, PROMPT)


def test_a_layer_begins_while_the_one_before_is_not_done_with(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []

    def noted(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(self: Layer, *given: Any) -> Any:
            if what == "begins":
                order.append((what, self.number))
            made = call(self, *given)
            if what == "ends":
                order.append((what, self.number))
            return made

        return watched

    def ahead(step: DecodeStep, number: int, routed: bool) -> None:
        layer = step._decoders[number][1]
        assert layer is not None
        order.append(("begins", layer.number))
        has_begun(step, number, routed)

    has_begun = DecodeStep._has_begun
    monkeypatch.setattr(DecodeStep, "_has_begun", ahead)
    monkeypatch.setattr(Layer, "begin", noted("begins", Layer.begin))
    monkeypatch.setattr(Layer, "end", noted("ends", Layer.end))
    tokens(engine)
    # A layer without experts, transformers' own, lies between the first two.
    assert order[:6] == [("begins", 0), ("ends", 0), ("begins", 1), ("begins", 2), ("ends", 1), ("ends", 2)]


@pytest.mark.parametrize("between", ["stream", "whole", "logits", "follow", "reset", "listen", "forward"])
def test_whatever_happens_between_two_tokens_they_stay(engine: Engine, used: list[bool], between: str) -> None:
    wanted, other = tokens(engine), tokens(engine, OTHER)
    used.clear()
    second = engine.stream(OTHER, SAMPLING)
    mixed: list[int] = []
    found: list[int] = []
    for number, step in enumerate(engine.stream(PROMPT, SAMPLING)):
        found.append(step.token_id)
        if number == SAMPLING.max_new_tokens - 1:
            break
        if between == "stream":
            mixed.append(next(second).token_id)
        elif between == "whole" and number == 5:
            assert tokens(engine, OTHER) == other
        elif between == "logits":
            engine.logits(OTHER)
        elif between == "follow":
            engine.follow(OTHER, 1)
        elif between == "reset" and number == 5:
            engine.reset(memory_budget="100%")
        elif between == "listen" and number == 5:
            engine.listen(Silent())
        elif between == "forward":
            with torch.inference_mode():
                engine.model(input_ids=torch.tensor([OTHER]))
    assert found == wanted
    assert mixed == other[: len(mixed)]
    assert False in used[1:] or between == "forward"


def test_a_text_that_is_left_leaves_the_threads_free(full: Engine) -> None:
    wanted = tokens(full)
    steps = full.stream(PROMPT, SAMPLING)
    for _ in range(4):
        next(steps)
    assert held()
    steps.close()
    assert not held()
    assert tokens(full) == wanted


def held() -> bool:
    """Whether something is begun that can still be ended."""
    at = [layer.kernel.residents for engine in ENGINES for layer in engine.layers.layers]
    numbers = [there.number for there in at if there is not None and there.begun]
    # Asking ends it, which its owner takes for dropped.
    return any(kernels.called("foregate_experts_end", 1)(number) >= 0 for number in numbers)


def test_texts_of_two_engines_side_by_side_stay_what_they_are(full: Engine, model: str) -> None:
    wanted, other = tokens(full), tokens(full, OTHER)
    with Engine(RunConfig(model=model, memory_budget="100%", predictor="none", threads=2)) as second:
        pairs = list(zip(full.stream(PROMPT, SAMPLING), second.stream(OTHER, SAMPLING), strict=True))
    assert [one.token_id for one, _ in pairs] == wanted
    assert [two.token_id for _, two in pairs] == other


def test_each_step_on_a_thread_of_its_own(full: Engine) -> None:
    wanted, found = tokens(full), []
    steps = full.stream(PROMPT, SAMPLING)
    for _ in wanted:
        thread = Thread(target=lambda: found.append(next(steps).token_id))
        thread.start()
        thread.join()
    assert found == wanted
    steps.close()
    assert threads_are_free()


def test_who_needs_the_threads_takes_them_from_a_text_that_rests(full: Engine) -> None:
    wanted, found = tokens(full), []
    for step in full.stream(PROMPT, SAMPLING):
        found.append(step.token_id)
        sleep(0.01)  # by then what was begun has run
        assert threads_are_free()
    assert found == wanted


def test_a_cache_that_is_turned_over_between_two_tokens_changes_nothing(engine: Engine) -> None:
    wanted, found = tokens(engine), []
    for step in engine.stream(PROMPT, SAMPLING):
        found.append(step.token_id)
        with torch.inference_mode():
            for first in range(0, 40, 4):
                engine.model(input_ids=torch.arange(first, first + 4)[None])
    assert found == wanted


@pytest.mark.parametrize(("computed", "counted"), [(5, [(0, 5)]), (20, [(0, 10)]), (40, [(0, 10), (30, 40)])])
def test_what_others_compute_while_the_user_has_control_is_nobodys_time(
    computed: int, counted: list[tuple[int, int]]
) -> None:
    clock, ms = Clock(), 10**6
    since = perf_counter_ns() - 50 * ms
    clock.away(since + 10 * ms, since + 30 * ms)
    clock.ended(since, lambda: Ended(computed * ms))
    *others, _own = clock._spans
    spans = [((first - since) // ms, (last - since) // ms) for first, last in others]
    assert [span for span in spans if span[0] < span[1]] == counted


def test_every_step_has_figures_of_its_own_after_a_reset(engine: Engine) -> None:
    steps = []
    for step in engine.stream(PROMPT, SAMPLING):
        steps.append(step)
        if len(steps) == 5:
            engine.reset(memory_budget="100%")
    assert len({id(step.stats) for step in steps}) == len(steps)
    assert all(step.stats.hits + step.stats.misses for step in steps)


def read_ahead(engine: Engine) -> None:
    """Something, whatever the predictor says."""
    everyone = [ExpertKey(at, e) for at, there in enumerate(engine.spec.experts_per_layer) for e in range(there)]
    absent = next(key for key in everyone if not engine.cache.holds(key))
    engine.cache.set_staging(2)
    assert engine.prefetcher._submit(absent, None)
    assert engine.cache.staged


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_reset_in_the_middle_ends_what_is_read_ahead(engine: Engine, cancelled: bool) -> None:
    wanted = tokens(engine)
    stream = engine.stream(PROMPT, SAMPLING)
    found = [next(stream).token_id for _ in range(5)]
    read_ahead(engine)
    if cancelled:  # and still being read
        engine.prefetcher._dying.update(engine.prefetcher._tickets)
        engine.prefetcher._tickets.clear()
        engine.prefetcher.stats.cancelled += 1
    engine.reset(memory_budget="60%")
    assert not engine.cache.staged
    assert found + [step.token_id for step in stream] == wanted


def test_an_oracle_records_another_text_while_something_is_read_ahead(model: str) -> None:
    given: Any = {"memory_budget": "60%", "predictor": "oracle", "prefetch": "2", "threads": 2}
    with Engine(RunConfig(model=model, **given)) as engine:
        wanted = tokens(engine)
        stream = engine.stream(PROMPT, SAMPLING)
        found = [next(stream).token_id for _ in range(5)]
        read_ahead(engine)
        tokens(engine, OTHER)
        assert found + [step.token_id for step in stream] == wanted


def test_slots_that_are_set_aside_are_not_computed_from(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = tokens(engine)
    found, dropped, begun = [], [], []
    set_staging, forget = engine.cache.set_staging, engine.step.forget

    def forgotten() -> None:
        begun.append(engine.step._ahead is not None)
        forget()

    def watched(slots: int) -> None:
        dropped.append(engine.step._ahead is None)
        set_staging(slots)

    monkeypatch.setattr(engine.runtime, "_forget", forgotten)
    monkeypatch.setattr(engine.cache, "set_staging", watched)
    for step in engine.stream(PROMPT, SAMPLING):
        found.append(step.token_id)
        engine.runtime._decode_staging = 1 + len(found) % 3
        engine.cache.check_integrity()
    assert found == wanted
    assert len(dropped) > 4
    assert all(dropped)
    assert sum(begun) > 4


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 4099])
def test_the_best_is_the_first_of_the_largest(count: int) -> None:
    for seed in range(8):
        logits = (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 2).to(torch.bfloat16)
        assert best(logits) == best(logits.float()) == int(logits.argmax())
    assert best(torch.full((count,), -torch.inf, dtype=torch.bfloat16)) == 0
    logits[-1] = torch.nan
    assert best(logits) == best(logits.float()) == count - 1


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_the_head_is_norm_and_product(kind: str) -> None:
    weight, norm, x = (torch.randn(*shape).to(torch.bfloat16) for shape in ((96, 64), (64,), (1, 64)))
    scales = torch.rand(96) if kind == "int8" else None
    weight = weight if scales is None else (weight * 40).to(torch.int8)
    made = kernels.matrix(weight, scales)
    found = Head((norm, 1e-6), made, [weight])(x)
    wanted = kernels.linear(made, kernels.rms_norm(x, norm, 1e-6), 96)
    assert torch.equal(found, wanted[0])


def test_a_choice_of_another_form_is_not_taken(engine: Engine) -> None:
    kernel: DecoderLayer = engine.layers.layers[0].kernel
    made = kernel.choice
    assert not kernel.settle(made.logits.float(), made.weights, made.index)
    assert not kernel.settle(made.logits, made.weights, torch.full_like(made.index, made.logits.shape[1]))
