"""Lossy modes: exact where they must be, lossy where they say so, and the reported deviation is the true one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from foregate.bench.quality import Tried, judge_modes
from foregate.checkpoint.pack import pack
from foregate.checkpoint.precision import Precision
from foregate.checkpoint.quantise import parse_scheme
from foregate.cli.bench_quality import quality_table, quality_texts
from foregate.cli.quality import quality
from foregate.cli.run import run
from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.engine.weighing import Weigher
from foregate.errors import ConfigError, TransferError
from foregate.interfaces import ExpertStore
from foregate.testing.faults import Fault, FaultyStore, Kind
from foregate.types import ExpertKey, Phase

PROMPT = [5 + (7 * i) % 240 for i in range(20)]
Tiny = Callable[[str], Path]


def generate(
    path: Path | str, *, faults: tuple[Fault, ...] = (), tokens: int = 10, prompt: int = 20, **settings: Any
) -> dict[str, Any]:
    """The report of a greedy run, after which the cache is sound and idle."""
    settings = {"memory_budget": "30%", "predictor": "next-gate", "prefetch": "4", **settings}
    wrap = (lambda store: FaultyStore(store, list(faults), seed=3)) if faults else None
    with Engine(RunConfig(model=str(path), **settings), wrap_store=wrap) as engine:
        for _ in engine.stream(PROMPT[:prompt], SamplingConfig(max_new_tokens=tokens)):
            pass
        engine.cache.check_integrity(idle=True)
        assert engine.report is not None
        return engine.report.as_dict()


@pytest.fixture
def packs(tiny: Tiny, tmp_path: Path) -> tuple[Path, Path]:
    """The same model in int8 and in int4."""
    source = tiny("qwen3_moe")
    for name in ("int8", "int4"):
        pack(source, tmp_path / name, precision=Precision(experts=parse_scheme(name)))
    return tmp_path / "int8", tmp_path / "int4"


def test_exact_is_the_default_and_says_so(tiny: Tiny) -> None:
    said = generate(tiny("qwen3_moe"))
    assert (said["exact"], said["lossy"]) == (True, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lossy": "skip"}, "unknown lossy mode 'skip'; choose from: execute-predicted"),
        ({"lossy": "execute-predicted", "predictor": "none"}, "predictor none"),
        ({"lossy": "execute-predicted", "prefetch": "off"}, "prefetch off"),
        ({"lossy": "low-precision-miss"}, "give --lossy low-precision-miss and --low-precision-pack together"),
        ({"lossy": "skip-late", "low_precision_pack": "x"}, "low-precision pack x"),
        ({"low_precision_pack": "x"}, "low-precision pack x"),
        ({"lossy": "skip-late", "predictor": "none", "prefetch": "off", "reader_threads": 0}, "reader threads 0"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(**settings)


# execute-predicted


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "olmoe"])
@pytest.mark.parametrize("predictor", ["oracle", "fresh-gate"])
def test_executing_a_perfect_prediction_changes_no_token(family: str, predictor: str, tiny: Tiny) -> None:
    path = tiny(family)
    said = generate(path, lossy="execute-predicted", predictor=predictor)
    assert said["token_ids"] == generate(path)["token_ids"]
    facts = said["lossy"]
    assert said["exact"] is False
    assert facts["mode"] == "execute-predicted"
    assert facts["set_agreement"] == 1
    assert facts["router_mass_not_run"] == 0
    # every layer of every decoded token but the first layer
    layers = len_layers(path)
    assert facts["predicted_layers"] * layers == facts["token_layers"] * (layers - 1) > 0


def len_layers(path: Path) -> int:
    from foregate.checkpoint.opening import open_checkpoint

    return open_checkpoint(path).spec.layers


@pytest.mark.parametrize("budget", ["30%", "100%"])
def test_only_predicted_experts_run_and_the_report_counts_where_they_differ(budget: str, tiny: Tiny) -> None:
    """The trace of what ran, against the trace of what the routers chose, counted by hand."""
    config = RunConfig(str(tiny("qwen3_moe")), memory_budget=budget, predictor="stale-gate", lossy="execute-predicted")
    chosen: list[tuple[int, frozenset[int]]] = []
    ran: list[tuple[int, frozenset[int]]] = []
    with Engine(config) as engine:
        decode = engine.pipeline.decode

        def watched(layer: int, needed: list[int], *rest: Any) -> None:
            ran.append((layer, frozenset(needed)))
            decode(layer, needed, *rest)

        class Watch:
            def on_route(self, step: Any) -> None:
                if step.phase is Phase.DECODE:
                    chosen.append((step.layer, frozenset(step.experts[-1].tolist())))

        engine.pipeline.decode = watched  # type: ignore[method-assign, assignment]
        engine.observers.append(Watch())
        list(engine.stream(PROMPT, SamplingConfig(max_new_tokens=8)))
        assert engine.report is not None
        facts = engine.report.as_dict()["lossy"]
    assert [layer for layer, _ in ran] == [layer for layer, _ in chosen]
    assert all(one == other for one, other in zip(ran, chosen, strict=True) if one[0] == 0)
    later = [(one[1], other[1]) for one, other in zip(ran, chosen, strict=True) if one[0] > 0]
    assert facts["predicted_layers"] == len(later) > 0
    assert facts["set_agreement"] == sum(one == other for one, other in later) / len(later) < 1
    assert facts["chosen_not_run"] == pytest.approx(
        sum(len(other - one) for one, other in later) / sum(len(other) for _, other in chosen)
    )


def test_a_predictor_that_fails_leaves_an_exact_run(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny("qwen3_moe")
    with Engine(RunConfig(str(path), memory_budget="100%", predictor="random", lossy="execute-predicted")) as engine:

        def fail(signals: object) -> None:
            raise ValueError("no idea")

        engine.predictor.predict = fail  # type: ignore[method-assign, assignment]
        tokens = [step.token_id for step in engine.stream(PROMPT, SamplingConfig(max_new_tokens=6))]
        assert engine.report is not None
        assert engine.report.as_dict()["lossy"]["predicted_layers"] == 0
    assert tokens == generate(path, tokens=6)["token_ids"]
    assert "no idea" in caplog.text


def test_a_family_that_weighs_outside_the_interface_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="llama4"):
        generate(tiny("llama4_text"), lossy="skip-late")


@pytest.mark.parametrize("rule", ["softmax over the chosen", "softmax", "sigmoid, normalised", "sigmoid"])
def test_weights_are_recognised_whatever_the_scale(rule: str) -> None:
    import numpy as np

    from foregate.engine.weighing import RULES

    rng = np.random.default_rng(1)
    weigher = Weigher("family")
    for _ in range(6):
        scores = rng.normal(size=16).astype(np.float32) * 2
        chosen = np.argsort(-scores)[:4]
        weigher.see(scores, chosen, (2.5 * RULES[rule](scores, chosen)).astype(np.float32))
    weigher.settle()
    assert weigher.rule == rule
    scores, chosen = rng.normal(size=16).astype(np.float32), np.array([3, 1, 8, 2])
    assert weigher.weigh(scores, chosen) == pytest.approx(2.5 * RULES[rule](scores, chosen), rel=1e-5)


def test_weights_that_follow_no_known_rule_are_an_error() -> None:
    import numpy as np

    weigher, rng = Weigher("strange family"), np.random.default_rng(1)
    for _ in range(6):
        weigher.see(rng.normal(size=16).astype(np.float32), np.arange(4), rng.random(4).astype(np.float32))
    with pytest.raises(ConfigError, match="strange family: how its routers weigh"):
        weigher.settle()


# skip-late


def test_late_experts_are_left_out_and_counted(tiny: Tiny) -> None:
    slow, given = Fault(Kind.SLOW, seconds=0.02), {"memory_budget": "100%", "predictor": "none", "prefetch": "auto"}
    said = generate(tiny("qwen3_moe"), faults=(slow,), prompt=2, tokens=30, lossy="skip-late", **given)
    facts = said["lossy"]
    assert 0 < facts["skipped_experts"] <= said["decode"]["misses"]
    needed = said["decode"]["hits"] + said["decode"]["misses"]
    assert facts["skipped_share"] == pytest.approx(facts["skipped_experts"] / needed)
    assert 0 < facts["skipped_mass"] < 1
    # what was left out arrives for later tokens
    assert said["decode"]["hits"] > 0
    assert said["decode"]["stall_s_per_token"] < 0.005


def test_nothing_is_skipped_where_nothing_is_late(tiny: Tiny) -> None:
    path = tiny("qwen3_moe")
    exact = generate(path, memory_budget="100%", predictor="none", prefetch="auto")
    with Engine(RunConfig(str(path), memory_budget="100%", predictor="none", lossy="skip-late")) as engine:
        whole = engine.encode("a") + list(range(5, 245))
        engine.logits(whole)
        for _ in range(6):  # until the prompts have brought every expert
            engine.logits([5 + (11 * i) % 240 for i in range(200)])
        tokens = [step.token_id for step in engine.stream(PROMPT, SamplingConfig(max_new_tokens=10))]
        assert engine.report is not None
        said = engine.report.as_dict()
    assert said["decode"]["misses"] == 0
    assert said["lossy"]["skipped_experts"] == 0
    assert tokens == exact["token_ids"]


def test_a_skipped_expert_is_as_if_its_router_had_not_chosen_it(tiny: Tiny) -> None:
    """The layer's output against that of the experts that were there, with weights of the same sum."""
    late = ExpertKey(1, 5)
    config = RunConfig(str(tiny("qwen3_moe")), memory_budget="100%", predictor="none", lossy="skip-late")
    slow = Fault(Kind.SLOW, keys={late}, seconds=0.2)
    with Engine(config, wrap_store=lambda store: FaultyStore(store, [slow])) as engine:
        engine.logits(PROMPT)
        engine.cache.release(late)
        there = [key.expert for key in engine.cache.resident if key.layer == 1][:2]
        engine.runtime.begin_decode(20, 7)
        x = torch.linspace(-1, 1, engine.spec.hidden_size)[None]

        def run(experts: list[int], weights: list[float]) -> torch.Tensor:
            given = torch.tensor([experts]), torch.tensor([weights])
            return engine.runtime.forward(1, engine._modules[1], x, *given)

        with torch.inference_mode():
            out = run([there[0], late.expert, there[1]], [0.2, 0.5, 0.3])
            assert engine.deviation is not None
            assert (engine.deviation.affected_experts, engine.deviation.affected_mass) == (1, pytest.approx(0.5))
            assert torch.allclose(out, run(there, [0.4, 0.6]), atol=1e-6)
        assert out.abs().sum() > 0
        engine.runtime.finish()
        assert late in engine.cache.resident


def test_a_read_that_never_comes_is_an_error_in_time_even_if_skipped(tiny: Tiny) -> None:
    late = ExpertKey(1, 5)
    stores: list[FaultyStore] = []

    def wrap(store: ExpertStore) -> ExpertStore:
        stores.append(FaultyStore(store, [Fault(Kind.HANG, keys={late})]))
        return stores[0]

    given = {"memory_budget": "100%", "predictor": "none", "read_timeout_s": 0.3}
    with Engine(RunConfig(str(tiny("qwen3_moe")), lossy="skip-late", **given), wrap_store=wrap) as engine:  # type: ignore[arg-type]
        engine.runtime.begin_decode(0, 7)
        chosen = torch.tensor([[late.expert, 1]]), torch.tensor([[0.5, 0.5]])
        with torch.inference_mode():
            engine.runtime.forward(1, engine._modules[1], torch.ones(1, engine.spec.hidden_size), *chosen)
        with pytest.raises(TransferError, match=r"no data for 0\.3 s"):
            engine.runtime.finish()
        stores[0].release()


# low-precision-miss


def test_without_a_miss_low_precision_changes_no_token(packs: tuple[Path, Path]) -> None:
    exact, low = packs
    given = {"memory_budget": "100%", "predictor": "none", "prefetch": "auto"}
    with Engine(RunConfig(str(exact), **given, lossy="low-precision-miss", low_precision_pack=str(low))) as engine:  # type: ignore[arg-type]
        for _ in range(6):
            engine.logits([5 + (11 * i) % 240 for i in range(200)])
        engine.logits(list(range(240)))
        tokens = [step.token_id for step in engine.stream(PROMPT, SamplingConfig(max_new_tokens=10))]
        assert engine.report is not None
        said = engine.report.as_dict()
    assert said["decode"]["misses"] == 0
    assert (said["lossy"]["low_precision_experts"], said["lossy"]["saved_bytes"]) == (0, 0)
    assert tokens == generate(exact, **given)["token_ids"]  # type: ignore[arg-type]


def test_with_one_slot_every_decode_step_is_the_low_packs(packs: tuple[Path, Path]) -> None:
    """One slot: nothing survives until its next use, so after the (exact) prompt all is low precision.

    The reference: the exact engine reads the prompt, the low pack's own engine goes on from its KV cache.
    """
    exact, low = packs
    with Engine(RunConfig(str(exact), predictor="none")) as one, Engine(RunConfig(str(low), predictor="none")) as other:
        slot = one.spec.expert_slot_bytes
        logits, past = one._forward(PROMPT, None, len(PROMPT) - 1, Phase.PREFILL)
        expected = [int(logits.argmax())]
        other.runtime.begin_prefill()
        other.runtime.end_prefill()
        for position in range(9):
            logits, past = other._forward([expected[-1]], past, len(PROMPT) + position, Phase.DECODE)
            expected.append(int(logits.argmax()))
        spared = sum(one.checkpoint.layouts[0].nbytes - other.checkpoint.layouts[0].nbytes for _ in range(1))
    said = generate(
        exact,
        memory_budget=str(slot),
        predictor="none",
        prefetch="auto",
        lossy="low-precision-miss",
        low_precision_pack=str(low),
    )
    assert said["token_ids"] == expected
    facts = said["lossy"]
    assert facts["low_precision_share"] == 1
    assert facts["low_precision_mass"] == pytest.approx(1)
    assert facts["saved_bytes"] == spared * facts["low_precision_experts"] > 0
    assert said["resident_bytes_peak"] <= slot


def test_residents_and_predictions_stay_exact(packs: tuple[Path, Path]) -> None:
    exact, low = packs
    said = generate(exact, memory_budget="50%", lossy="low-precision-miss", low_precision_pack=str(low))
    facts = said["lossy"]
    assert facts["low_precision_experts"] == said["decode"]["misses"] - said["prefetch"]["late"]
    assert 0 < facts["low_precision_share"] < 1


def test_a_pack_of_another_model_is_refused(packs: tuple[Path, Path], tiny: Tiny, tmp_path: Path) -> None:
    exact, low = packs
    pack(tiny("olmoe"), tmp_path / "other", precision=Precision(experts=parse_scheme("int4")))
    given = {"lossy": "low-precision-miss", "tokens": 2}
    with pytest.raises(ConfigError, match="another model"):
        generate(exact, low_precision_pack=str(tmp_path / "other"), **given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not smaller"):
        generate(low, low_precision_pack=str(exact), **given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is no pack"):
        generate(exact, low_precision_pack=str(tiny("qwen3_moe")), **given)  # type: ignore[arg-type]


# quality


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    words = "The quick brown fox jumps over the lazy dog and runs away from it, again and again. "
    rows = [{"prompt": words * 2, "domain": "one"}, {"prompt": words[10:] * 2, "domain": "two"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_followed_token_by_token_the_logits_are_those_of_the_generation(tiny: Tiny) -> None:
    with Engine(RunConfig(str(tiny("qwen3_moe")), memory_budget="30%")) as engine:
        made = [step.token_id for step in engine.stream(PROMPT, SamplingConfig(max_new_tokens=8))]
        logits = engine.follow([*PROMPT, *made], len(PROMPT))
        engine.cache.check_integrity(idle=True)
        assert logits.argmax(dim=-1).tolist() == made


@pytest.mark.parametrize(("predictor", "same"), [("fresh-gate", True), ("previous-token", False)])
def test_a_perfect_prediction_costs_nothing_and_a_poor_one_does(
    predictor: str, same: bool, tiny: Tiny, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quality(
        str(tiny("qwen3_moe")),
        [str(texts)],
        memory_budget="50%",
        lossy="execute-predicted",
        predictor=predictor,
        tokens=40,
        as_json=True,
    )
    said = json.loads(capsys.readouterr().out)
    assert (said["exact"], said["mode"], said["predictor"]) == (False, "execute-predicted", predictor)
    assert [line["domain"] for line in said["domains"]] == ["one", "two"]
    # the rule that weighs predicted experts rounds in another order than the router
    assert all((abs(line["delta"]) < 1e-5) is same for line in said["domains"])
    assert (said["deviation"]["set_agreement"] == 1) is same
    parts = [part["token_layers"] for part in said["deviation_by_domain"].values()]
    assert said["deviation"]["token_layers"] == sum(parts) > 0


def test_quality_refuses_what_it_would_ignore(tiny: Tiny, texts: Path) -> None:
    model = str(tiny("qwen3_moe"))
    with pytest.raises(ConfigError, match="need --lossy"):
        quality(model, [str(texts)], predictor="next-gate")
    with pytest.raises(ConfigError, match="leave --against away"):
        quality(model, [str(texts)], against=model, lossy="skip-late")
    with pytest.raises(ConfigError, match="oracle"):
        quality(model, [str(texts)], lossy="execute-predicted", predictor="oracle", memory_budget="50%")


def test_run_says_that_outputs_may_differ_before_anything_else(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"memory_budget": "100%", "max_new_tokens": 3, "prompt": "some words to begin with", "stats": True}
    run(str(tiny("qwen3_moe")), lossy="execute-predicted", **given)  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert said.startswith("--lossy execute-predicted: outputs may differ")
    assert "set_agreement" in said
    run(str(tiny("qwen3_moe")), **given)  # type: ignore[arg-type]
    assert "lossy" not in capsys.readouterr().err


def test_bench_judges_every_mode_that_has_something_to_do(packs: tuple[Path, Path]) -> None:
    exact, low = packs
    tried = Tried(str(exact), ["50%"], ["stale-gate"], "lru", low_precision_pack=str(low))
    words = "The quick brown fox jumps over the lazy dog and runs away from it, again and again. "
    found = judge_modes(tried, [("one", words), ("two", words[9:])], tokens=24, say=lambda text: None)
    assert [(line["mode"], line["predictor"]) for line in found] == [
        ("execute-predicted", "stale-gate"),
        ("skip-late", "none"),
        ("skip-late", "stale-gate"),
        ("low-precision-miss", "none"),
        ("low-precision-miss", "stale-gate"),
    ]
    assert all(line["exact"] is False and line["tpot_s"] > 0 and 0 <= line["agreement"] <= 1 for line in found)
    assert quality_table(found).row_count == 5
    assert len(Tried(str(exact), ["25%", "50%"], ["stale-gate"], "lru").configs()) == 2 * 3


def test_bench_refuses_quality_without_texts() -> None:
    with pytest.raises(ConfigError, match="give --dataset"):
        quality_texts(True, None, None, [], None, [])
    with pytest.raises(ConfigError, match="low-precision pack x"):
        quality_texts(False, "x", None, [], None, [])
    with pytest.raises(ConfigError, match="quality tokens 9"):
        quality_texts(False, None, 9, [], None, [])
