"""Decoder layers up to their experts in one compiled call: the same bits, the same signals, or their own forward."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from foregate.config import RunConfig, SamplingConfig
from foregate.engine import decoder_layer, dense
from foregate.engine.decoder_layer import TrialExperts
from foregate.engine.engine import Engine
from foregate.errors import ConfigError
from foregate.events import Part, TimeSpent
from foregate.native import kernels
from foregate.native.decoder_layer import DecoderLayer, turned
from foregate.native.router import Router
from foregate.predictors.base import BasePredictor
from foregate.testing import tiny
from foregate.types import Moment, Prediction, RoutingStep

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="the kernels are not built")

TAKEN = ("qwen3_moe", "olmoe", "mixtral")
LEFT = ("qwen2_moe", "granitemoe", "glm4_moe")
"""A shared expert, sums that are scaled, a router of another kind."""

PROMPT = [5 + (7 * i) % 50 for i in range(12)]
TOKENS = 6
SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def small_matrices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "SMALLEST", 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    built: dict[str, Path] = {}

    def checkpoint(family: str) -> str:
        if family not in built:
            directory = tmp_path_factory.mktemp(family)
            built[family] = tiny.build(family, directory / "model", dtype="bfloat16", **SIZES)
        return str(built[family])

    return checkpoint


def bf16_at(place: int, numbers: int) -> NDArray[np.float32]:
    bits = np.array((ctypes.c_uint16 * numbers).from_address(place), np.uint32) << 16
    return bits.view(np.float32)


class Spy(BasePredictor):
    """Keeps the hidden states it is told of, and names experts at random."""

    name = "spy"
    asks_routers = False

    def __init__(self, moment: Moment) -> None:
        super().__init__(1)
        self.moment = moment
        self.seen: list[NDArray[np.float32]] = []

    def observe(self, step: RoutingStep) -> None:
        self.seen.append(step.weights.copy())

    def predict(self, signals: Any) -> list[Prediction]:
        early = self.moment is Moment.BEFORE_ATTENTION
        for name in ("pre_attention",) if early else ("pre_attention", "residual", "router_input"):
            self.seen.append(signals.hidden(name))
        if early:
            (place,), _ = signals.addresses("pre_attention", numbers=SIZES["hidden_size"])
            self.seen.append(bf16_at(place, SIZES["hidden_size"]).copy())
            with pytest.raises(ConfigError, match="has no residual"):
                signals.addresses("pre_attention", "residual", numbers=SIZES["hidden_size"])
        else:
            self.seen.append(signals.normed(signals.layer, self.seen[-2]))
            places, _ = signals.addresses("residual", "pre_attention", "router_input", numbers=SIZES["hidden_size"])
            self.seen += [bf16_at(place, SIZES["hidden_size"]) for place in places]
        layer = signals.layer if early else signals.layer + 1
        return [Prediction(layer, (0, 1), (1.0, 0.5))] if layer < signals.layers else []


class Told:
    """What a policy is told."""

    def __init__(self, inside: Any) -> None:
        self.inside = inside
        self.scores: list[Any] = []

    def observe(self, layer: int, experts: Any, scores: Any = None) -> None:
        self.scores.append(None if scores is None else scores.copy())
        self.inside.observe(layer, experts, scores)


class Listener:
    def __init__(self, spent: list[Part]) -> None:
        self._spent = spent

    def on_event(self, event: Any) -> None:
        if isinstance(event, TimeSpent):
            self._spent.append(event.part)


HOW = ("modules", "layers", "whole")
"""Which forwards compute a decode step: transformers' own, with layers in one call, without its model around them."""


def ran(model: str, moment: Moment = Moment.AFTER_ROUTING, how: str = "whole", *, listen: bool = False) -> list[Any]:
    """Tokens, signals and scores of one engine, in one way of ``HOW``, which is then the only one."""
    config = RunConfig(model=model, memory_budget="50%", predictor="next-gate", prefetch="2", cache_policy="echo")
    with Engine(config) as engine:
        assert engine.step.ready
        engine.step.ready = how == "whole"
        if how == "modules":
            engine.layers.close()
        spy = engine.runtime.predictor = Spy(moment)
        told: Any = Told(engine.cache.policy)
        engine.runtime._informed = told
        spent: list[Part] = []
        if listen:
            engine.listen(Listener(spent))
        used, passes = counted(engine), 0
        theirs = engine._call

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal passes
            passes += 1
            return theirs(*args, **kwargs)

        engine._call = call  # type: ignore[method-assign]
        tokens = [step.token_id for step in engine.stream(PROMPT, SamplingConfig(max_new_tokens=TOKENS))]
        assert len(used) == (0 if how == "modules" else engine.spec.layers * (TOKENS - 1))
        assert passes == (1 if how == "whole" else TOKENS)
        if listen:
            assert {Part.ATTENTION, Part.ROUTING, Part.EXPERTS} <= set(spent)
    return [tokens, *spy.seen, *told.scores]


def counted(engine: Engine) -> list[int]:
    """Grows by one for every layer that is computed in one call."""
    used: list[int] = []
    for layer in engine.layers.layers:
        layer.kernel = Counted(layer.kernel, used)  # type: ignore[assignment]
    return used


class Counted:
    def __init__(self, kernel: DecoderLayer, used: list[int]) -> None:
        self._kernel, self._used = kernel, used

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def __call__(self, *args: Any) -> Any:
        self._used.append(1)
        return self._kernel(*args)

    def go_on(self, number: int, following: Any) -> Any:
        made = self._kernel.go_on(number, following)
        self._used += [1] * (made is not None)
        return made


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("moment", Moment)
@pytest.mark.parametrize("family", TAKEN)
def test_tokens_signals_and_scores_are_those_of_the_modules(family: str, moment: Moment, made: Any) -> None:
    wanted, *found = (ran(made(family), moment, how) for how in HOW)
    assert len(wanted) > 3 * TOKENS
    assert all(same(wanted, one) for one in found)


def test_listeners_are_told_of_every_part_and_change_nothing(made: Any) -> None:
    assert same(ran(made("mixtral"), listen=True), ran(made("mixtral")))


def test_a_lossy_mode_computes_the_same_either_way(made: Any) -> None:
    def lossy(*, ours: bool) -> list[int]:
        config = RunConfig(model=made("mixtral"), memory_budget="50%", predictor="next-gate", lossy="execute-predicted")
        with Engine(config) as engine:
            if not ours:
                engine.layers.close()
            used = counted(engine)
            found = tokens(engine)
            assert bool(used) is ours
            assert engine.deviation is not None
        return found

    assert lossy(ours=True) == lossy(ours=False)


@pytest.mark.parametrize("family", LEFT)
def test_layers_of_another_kind_are_left_alone(family: str, made: Any) -> None:
    with Engine(RunConfig(model=made(family), memory_budget="100%", predictor="none")) as engine:
        assert not engine.layers.layers
        assert not any("forward" in vars(part.decoder) for part in engine.signals.parts)


@pytest.fixture
def engine(made: Any) -> Iterator[Engine]:
    with Engine(RunConfig(model=made("qwen3_moe"), memory_budget="100%", predictor="none")) as engine:
        yield engine


def tokens(engine: Engine) -> list[int]:
    return [step.token_id for step in engine.stream(PROMPT, SamplingConfig(max_new_tokens=TOKENS))]


@pytest.mark.parametrize("part", ["input_layernorm", "self_attn.k_norm", "mlp", "mlp.gate", "mlp.experts"])
def test_a_hook_of_a_stranger_still_fires(part: str, engine: Engine) -> None:
    wanted = tokens(engine)
    used, fired = counted(engine), []
    module = engine.signals.parts[0].decoder.get_submodule(part)
    handle = module.register_forward_hook(lambda *_: fired.append(1))
    assert tokens(engine) == wanted
    assert len(fired) == TOKENS
    assert len(used) == (engine.spec.layers - 1) * (TOKENS - 1)
    handle.remove()
    assert tokens(engine) == wanted
    assert len(used) == (2 * engine.spec.layers - 1) * (TOKENS - 1)


@pytest.mark.parametrize("part", ["", "model", "model.embed_tokens", "model.layers.1", "model.norm", "lm_head"])
def test_a_hook_of_a_stranger_around_the_layers_still_fires(part: str, engine: Engine) -> None:
    wanted = tokens(engine)
    fired: list[int] = []
    handle = engine.model.get_submodule(part).register_forward_hook(lambda *_: fired.append(1))
    assert tokens(engine) == wanted
    assert len(fired) == TOKENS
    handle.remove()
    assert tokens(engine) == wanted


def test_a_hook_that_comes_in_the_middle_of_a_text_fires_from_then_on(engine: Engine) -> None:
    wanted = tokens(engine)
    fired: list[int] = []
    found, handle = [], None
    for step in engine.stream(PROMPT, SamplingConfig(max_new_tokens=TOKENS)):
        found.append(step.token_id)
        if step.index == 1:
            part = engine.signals.parts[-1].decoder.get_submodule("self_attn.q_proj")
            handle = part.register_forward_hook(lambda *_: fired.append(1))
    assert found == wanted
    assert len(fired) == TOKENS - 2
    assert handle is not None
    handle.remove()
    used = counted(engine)
    assert tokens(engine) == wanted
    assert used


def test_embeddings_that_are_replaced_count(engine: Engine) -> None:
    before = tokens(engine)
    table = engine.model.get_input_embeddings()
    other = torch.nn.Parameter(table.weight.detach().roll(1, dims=0), requires_grad=False)
    table.weight = other
    changed = tokens(engine)
    engine.step.ready = False
    assert tokens(engine) == changed != before


def test_hidden_states_that_a_stranger_keeps_stay_what_they_were(engine: Engine) -> None:
    kept: list[torch.Tensor] = []
    copies: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: torch.Tensor) -> None:
        kept.append(output)
        copies.append(output.clone())

    engine.model.get_submodule("model.layers.0").register_forward_hook(keep)
    tokens(engine)
    assert len(kept) == TOKENS
    assert all(map(torch.equal, kept, copies))


def test_a_layer_in_between_is_given_hidden_states_that_stay(engine: Engine) -> None:
    kept: list[torch.Tensor] = []
    copies: list[torch.Tensor] = []

    def keep(module: Any, args: Any) -> None:
        kept.append(args[0])
        copies.append(args[0].clone())

    assert "mlp.gate" not in dict(engine.model.get_submodule("model.layers.1").named_modules())
    engine.model.get_submodule("model.layers.1.input_layernorm").register_forward_pre_hook(keep)
    tokens(engine)
    assert engine.step.ready
    assert len(kept) == TOKENS
    assert all(map(torch.equal, kept, copies))


class Meddler:
    """Changes what it is told."""

    def on_route(self, step: RoutingStep) -> None:
        step.experts[:] = step.experts[:, ::-1].copy()
        step.weights[:] = 0


def test_a_stranger_that_changes_what_it_is_told_changes_no_token(engine: Engine) -> None:
    wanted = tokens(engine)
    engine.observers.append(Meddler())
    assert tokens(engine) == wanted


class Wrapped(nn.Module):
    def __init__(self, inside: nn.Module, fired: list[int]) -> None:
        super().__init__()
        self.inside, self.fired = inside, fired

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.fired.append(1)
        return self.inside(*args, **kwargs)


@pytest.mark.parametrize(
    "part",
    ["model.layers.0.input_layernorm", "model.layers.2.self_attn.o_proj", "model.norm", "model.layers.2", "lm_head"],
)
@pytest.mark.parametrize("forward", [False, True])
def test_what_stands_in_for_a_part_is_called(part: str, forward: bool, engine: Engine) -> None:
    """Another forward of a module, or another module."""
    wanted, fired = tokens(engine), []
    inside = engine.model.get_submodule(part)
    if forward:
        theirs = inside.forward

        def counted_forward(*args: Any, **kwargs: Any) -> Any:
            fired.append(1)
            return theirs(*args, **kwargs)

        inside.forward = counted_forward
    else:
        parent, _, name = part.rpartition(".")
        setattr(engine.model.get_submodule(parent), name, Wrapped(inside, fired))
    assert tokens(engine) == wanted
    assert len(fired) == TOKENS


def test_a_trial_runs_what_a_step_runs(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    called = DecoderLayer.__call__

    def spied(self: DecoderLayer, x: Any, turns: Any, place: Any, normed: bool) -> bool:
        seen.append(normed)
        return called(self, x, turns, place, normed)

    monkeypatch.setattr(DecoderLayer, "__call__", spied)
    mixed: list[int] = []
    mix = DecoderLayer.mix

    def spied_mix(self: DecoderLayer) -> None:
        mixed.append(1)
        mix(self)

    monkeypatch.setattr(DecoderLayer, "mix", spied_mix)
    with Engine(RunConfig(model=made("mixtral"), memory_budget="100%", predictor="none")) as engine:
        layers = engine.spec.layers
    assert seen.count(False) == seen.count(True) == 3 * layers
    assert len(mixed) == 6 * layers


def test_a_window_is_left_to_the_model(made: Any, tmp_path: Path) -> None:
    windowed = tiny.build("mixtral", tmp_path / "model", dtype="bfloat16", **SIZES, sliding_window=8)
    with Engine(RunConfig(model=str(windowed), memory_budget="100%", predictor="none")) as engine:
        assert not engine.step.ready


def test_a_head_that_computes_something_else_is_left_alone(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeModel

    theirs = Qwen3MoeModel.forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = theirs(self, *args, **kwargs)
        out.last_hidden_state = 2 * out.last_hidden_state
        return out

    monkeypatch.setattr(Qwen3MoeModel, "forward", doubled)
    with Engine(RunConfig(model=made("qwen3_moe"), memory_budget="100%", predictor="none")) as engine:
        assert engine.layers.layers
        assert not engine.step.ready


def test_a_tie_is_left_to_the_router_itself(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in engine.signals.parts:
        assert part.router is not None
        weight = part.router.get_parameter("weight").data
        weight.copy_(weight[torch.arange(len(weight)) // 3])
    used = counted(engine)
    settled = [0]
    settle = DecoderLayer.settle

    def watched(self: DecoderLayer, *routing: torch.Tensor) -> bool:
        done = settle(self, *routing)
        settled[0] += done
        return done

    monkeypatch.setattr(DecoderLayer, "settle", watched)
    found = tokens(engine)
    assert used
    assert settled[0]
    engine.layers.close()
    assert tokens(engine) == found


def test_closing_gives_the_layers_their_own_forward_back(engine: Engine) -> None:
    assert all("forward" in vars(part.decoder) for part in engine.signals.parts)
    engine.layers.close()
    assert not any("forward" in vars(part.decoder) for part in engine.signals.parts)


def test_a_layer_that_computes_something_else_is_left_alone(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

    theirs = Qwen3MoeDecoderLayer.forward
    monkeypatch.setattr(
        Qwen3MoeDecoderLayer, "forward", lambda self, *args, **kwargs: 2 * theirs(self, *args, **kwargs)
    )
    with Engine(RunConfig(model=made("qwen3_moe"), memory_budget="100%", predictor="none")) as engine:
        assert not engine.layers.layers


def test_a_trial_leaves_no_trace(made: Any) -> None:
    with Engine(RunConfig(model=made("qwen3_moe"), memory_budget="100%", predictor="none")) as engine:
        assert engine.layers.layers
        for part in engine.signals.parts:
            assert part.pre_attention is part.residual is part.router_input is None


def test_without_pythons_headers_ctypes_calls(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ran(made("qwen3_moe"))
    for module in ("library", "asking"):
        monkeypatch.setattr(f"foregate.native.{module}.calls", lambda: None)
    kernels.called.cache_clear()
    try:
        assert same(ran(made("qwen3_moe")), wanted)
        assert isinstance(kernels.called("foregate_layer", 14), ctypes._CFuncPtr)  # type: ignore[attr-defined]
    finally:
        kernels.called.cache_clear()


def test_norms_of_another_width_are_refused() -> None:
    from foregate.errors import IntegrityError
    from foregate.native.attention_block import AttentionBlock, Heads

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(torch.bfloat16)

    kept = [rows(*shape) for shape in ((32, 64), (16, 64), (16, 64), (64, 32))]
    block = AttentionBlock(Heads(2, 1, 16, 0.25), [kernels.matrix(part, None) for part in kept], [None] * 4, [None] * 2)
    router = Router(rows(8, 64), 2, normalised=True, dtype=torch.bfloat16)
    layer = DecoderLayer(block, (rows(64), 1e-6), (rows(32), 1e-6), router)
    turns, held = rows(2, 1, 1, 16), rows(2, 1, 4, 16)
    place = (held[0].data_ptr(), 64, 16, held[1].data_ptr(), 64, 16, 1)
    x = rows(1, 1, 64)
    with pytest.raises(IntegrityError):
        layer(x.data_ptr(), turned(turns[0], turns[1]), place, False)


def test_a_trial_that_breaks_leaves_the_modules_as_they_are(
    made: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = ran(made("mixtral"), how="modules")[0]
    monkeypatch.setattr(TrialExperts, "forward", lambda *_: 1 / 0)
    with caplog.at_level("INFO"), Engine(RunConfig(model=made("mixtral"), memory_budget="50%")) as engine:
        assert not engine.layers.layers
        assert not engine.step.ready
        assert tokens(engine) == wanted
    assert "ZeroDivisionError" in caplog.text


def test_layers_that_are_not_taken_are_called_in_between(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ran(made("mixtral"), how="modules")[0]
    agrees = decoder_layer._agrees
    monkeypatch.setattr(decoder_layer, "_agrees", lambda layer, rotary: layer.index != 1 and agrees(layer, rotary))
    with Engine(RunConfig(model=made("mixtral"), memory_budget="50%")) as engine:
        used = counted(engine)
        assert engine.step.ready
        assert tokens(engine) == wanted
        wanted_calls = (engine.spec.layers - 1) * (TOKENS - 1)
        # The first layer once more where slots are set aside after it has begun.
        assert 0 < wanted_calls <= len(used) < wanted_calls + TOKENS
