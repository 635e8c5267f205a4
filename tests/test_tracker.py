"""RouterTracker beside the choice itself: hidden states, scores, timings, batches, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from foregate.checkpoint.opening import open_checkpoint
from foregate.checkpoint.pack import pack
from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.errors import ConfigError, TraceError
from foregate.testing.tiny import FAMILIES, build
from foregate.trace.format import FEATURE_NAMES, TIMINGS
from foregate.trace.header import RunInfo
from foregate.trace.identity import directory_fingerprint, live_fingerprint
from foregate.trace.tensors import widen_bfloat16
from foregate.trace.tracker import RouterTracker

Tiny = Callable[[str], Path]
IDS = [5, 90, 17, 33, 101, 64]
RUN = RunInfo("test", {}, 0, {}, {}, "")

WITHOUT = {"pre_attention": {"nemotron_h"}, "residual": {"flex_olmo", "gemma4_text", "qwen4_exp_text"}}
"""Families that have no such signal: no attention in the layers with experts; routers that read the residual itself."""


def load(path: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": "auto", **more}).eval()


@torch.inference_mode()
def forward(model: Any, ids: list[int] = IDS, **more: Any) -> Any:
    return model(input_ids=torch.tensor([ids]), **more)


@pytest.mark.parametrize("family", sorted({*FAMILIES, "llama4_text"}))
def test_scores_and_features_of_every_family(family: str, tiny: Tiny) -> None:
    model = load(tiny(family))
    wanted = [name for name in FEATURE_NAMES if family not in WITHOUT.get(name, ())]
    for name in FEATURE_NAMES:
        if name not in wanted:
            with RouterTracker(model, features=[name]) as tracker:
                forward(model)
                with pytest.raises(TraceError, match=f"{family}.*{name}"):
                    tracker.take("p")
    with RouterTracker(model, features=wanted, scores=True) as tracker:
        past = forward(model, use_cache=True).past_key_values
        forward(model, [7], past_key_values=past)
        record = tracker.take("p")
        header = tracker.header(RUN)
    record.check(header)
    assert record.tokens == len(IDS) + 1
    for name in wanted:
        assert header.features[name].layers == tuple(range(header.model.layers))
        assert header.features[name].shape == (64,)
        assert np.isfinite(record.features[name]).all()
    assert header.scores is not None
    assert record.scores is not None
    assert np.isfinite(record.scores).all()
    assert header.scores.width in (max(header.model.experts_per_layer), max(header.model.experts_per_layer) + 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_are_what_flowed_through_the_named_modules(dtype: str, tmp_path: Path) -> None:
    model = load(build("qwen3_moe", tmp_path, dtype=dtype))
    layers = [layer for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in (*FEATURE_NAMES, "logits")}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: seen[name].append((args[0] if args else kwargs["hidden_states"]).clone()[0])

    handles = []
    for layer in layers:
        handles.append(layer.self_attn.register_forward_pre_hook(note("pre_attention"), with_kwargs=True))
        handles.append(layer.post_attention_layernorm.register_forward_pre_hook(note("residual"), with_kwargs=True))
        handles.append(layer.mlp.register_forward_pre_hook(note("router_input"), with_kwargs=True))
        handles.append(layer.mlp.gate.register_forward_hook(lambda m, a, out: seen["logits"].append(out[0].clone())))
    forward(model)
    for handle in handles:
        handle.remove()
    with RouterTracker(model, features=FEATURE_NAMES, scores=True) as tracker:
        forward(model)
        record = tracker.take("p")
        header = tracker.header(RUN)
    half = torch.float16 if dtype == "float32" else torch.bfloat16
    for name in FEATURE_NAMES:
        assert header.features[name].dtype == str(half)[6:]
        stored = record.features[name]
        got = widen_bfloat16(stored) if stored.dtype == np.uint16 else stored.astype(np.float32)
        assert np.array_equal(got, torch.stack(seen[name], dim=1).to(half).float().numpy())
    assert record.scores is not None
    assert np.array_equal(record.scores, torch.stack(seen["logits"], dim=1).float().numpy())


def test_kinds_of_scores(tiny: Tiny) -> None:
    kinds = {}
    for family in ("qwen3_moe", "llama4_text", "gpt_oss"):
        model = load(tiny(family))
        with RouterTracker(model, scores=True) as tracker:
            forward(model)
            record = tracker.take("p")
            scores = tracker.header(RUN).scores
        assert scores is not None
        assert record.scores is not None
        kinds[family] = scores.kind
        top = record.experts[..., 0]
        assert np.array_equal(record.scores.argmax(-1), top), "the first choice has the largest score"
    assert set(kinds.values()) <= {"logits", "probabilities"}


def test_features_that_overflow_float16_say_so(tiny: Tiny) -> None:
    model = load(tiny("qwen3_moe"))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e7)
    with RouterTracker(model, features=["residual"]) as tracker:
        forward(model)
        with pytest.raises(TraceError, match=r"residual does not fit in float16; record it as bfloat16"):
            tracker.take("p")
    with RouterTracker(model, features=["residual"], feature_dtype="bfloat16") as tracker:
        forward(model)
        assert tracker.take("p").features["residual"].dtype == np.uint16


def test_timings_are_of_passes_and_fit_into_the_clock(tiny: Tiny) -> None:
    model = load(tiny("deepseek_v3"))
    forward(model)
    with RouterTracker(model, timings=True) as tracker:
        began = perf_counter_ns()
        past = forward(model, use_cache=True).past_key_values
        forward(model, [7], past_key_values=past)
        wall = perf_counter_ns() - began
        record = tracker.take("p")
        assert tracker.header(RUN).timings == TIMINGS[:-1] == tuple(record.timings)
    total = 0
    for values in record.timings.values():
        assert (values[[0, len(IDS)]] > 0).all()
        assert (values[1 : len(IDS)] == -1).all()
        total += int(values[values > 0].sum())
    assert total < wall


def test_a_batch_with_padding_is_one_record_a_sequence(tiny: Tiny) -> None:
    model = load(tiny("mixtral"))
    short = IDS[:4]
    with RouterTracker(model, features=["router_input"], timings=True) as tracker:
        forward(model, short)
        alone = tracker.take("alone")
        padded = torch.tensor([[258, 258, *short], IDS])
        mask = (padded != 258).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.inference_mode():
            model(input_ids=padded, attention_mask=mask, position_ids=positions)
        one, two = tracker.take_batch(["one", "two"], "test")
    assert one.positions.tolist() == [0, 1, 2, 3]
    assert one.token_ids.tolist() == short
    assert two.token_ids.tolist() == IDS
    assert np.array_equal(one.experts, alone.experts)
    assert np.allclose(one.features["router_input"], alone.features["router_input"], atol=1e-2)
    assert (one.timings["experts_ns"][0] > 0).all()
    assert (one.timings["experts_ns"][1:] == -1).all()
    assert two.domain == "test"


def test_generate_of_transformers_is_traced(tiny: Tiny) -> None:
    model = load(tiny("gpt_oss"))
    with RouterTracker(model) as tracker:
        out = model.generate(torch.tensor([IDS]), max_new_tokens=14, do_sample=False)
        record = tracker.take("p")
    assert record.positions.tolist() == list(range(len(IDS) + 13))
    assert record.token_ids.tolist() == out[0, :-1].tolist()
    assert record.decode.tolist() == [False] * len(IDS) + [True] * 13
    assert record.passes.tolist() == [0] * len(IDS) + list(range(1, 14))


def test_chunks_of_a_prompt_are_passes_of_one_record(tiny: Tiny) -> None:
    model = load(tiny("qwen3_next"))
    with RouterTracker(model) as tracker:
        past = forward(model, IDS[:4], use_cache=True).past_key_values
        forward(model, IDS[4:], past_key_values=past)
        record = tracker.take("p", prompt_tokens=len(IDS))
    assert record.positions.tolist() == list(range(len(IDS)))
    assert record.passes.tolist() == [0, 0, 0, 0, 1, 1]
    assert not record.decode.any()


def test_embeddings_have_no_token_ids(tiny: Tiny) -> None:
    model = load(tiny("olmoe"))
    with RouterTracker(model) as tracker, torch.inference_mode():
        model(inputs_embeds=model.get_input_embeddings()(torch.tensor([IDS])))
        record = tracker.take("p")
    assert (record.token_ids == -1).all()


def test_a_pass_that_breaks_leaves_no_trace(tiny: Tiny) -> None:
    model = load(tiny("olmoe"))
    with RouterTracker(model) as tracker:
        handle = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forward(model)
        handle.remove()
        forward(model)
        assert tracker.take("p").tokens == len(IDS)


def test_clear_and_close(tiny: Tiny) -> None:
    model = load(tiny("olmoe"))
    with RouterTracker(model) as tracker:
        forward(model)
        tracker.clear()
        forward(model, IDS[:2])
        with pytest.raises(TraceError, match="attached already"):
            tracker.__enter__()
    forward(model)
    assert tracker.take("p").tokens == 2, "what was recorded survives close, and nothing is recorded after it"
    with tracker:
        forward(model, IDS[:3])
        assert tracker.take("q").tokens == 3, "a tracker can be used again"


def test_fingerprints_are_those_of_the_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny("qwen3_moe")
    expected = open_checkpoint(path).fingerprint
    pack(path, tmp_path / "pack")
    model = load(path)
    assert directory_fingerprint(path) == directory_fingerprint(tmp_path / "pack") == expected
    with RouterTracker(model) as tracker:
        forward(model)
        tracker.take("p")
    assert tracker.header(RUN).model.fingerprint == expected
    config = model.config
    config._name_or_path = ""
    assert tracker.header(RUN).model.fingerprint == live_fingerprint(model) != expected
    with Engine(RunConfig(model=str(path), predictor="none")) as engine, RouterTracker(engine) as tracker:
        list(engine.stream(IDS, SamplingConfig(max_new_tokens=2)))
        tracker.take("p")
        header = tracker.header(RUN, name="mine", tokenizer="t")
    assert (header.model.fingerprint, header.model.name, header.model.tokenizer) == (expected, "mine", "t")
    assert header.model.moe_layers == (0, 2, 3)


@pytest.mark.parametrize("family", ["llama", "dbrx", "jetmoe"])
def test_models_without_routing_that_can_be_followed_are_named(family: str, tiny: Tiny) -> None:
    with pytest.raises(TraceError, match=f"{family}.*no routing to trace"):
        RouterTracker(load(tiny(family)))


def test_wrong_use_is_named(tiny: Tiny) -> None:
    model = load(tiny("olmoe"))
    with pytest.raises(ConfigError, match=r"'dreams'.*pre_attention, residual, router_input"):
        RouterTracker(model, features=["dreams"])
    with pytest.raises(ConfigError, match="'int8'"):
        RouterTracker(model, features=["residual"], feature_dtype="int8")
    tracker = RouterTracker(model)
    with pytest.raises(TraceError, match=r"'p'.* 0 forward passes"):
        tracker.take("p")
    with pytest.raises(TraceError, match="nothing has been recorded"):
        tracker.header(RUN)
    with tracker:
        forward(model)
        with pytest.raises(TraceError, match="'a'"):
            tracker.take_batch(["a", "b"])
