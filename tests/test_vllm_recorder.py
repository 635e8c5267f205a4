"""The recorder for vLLM against stand-ins of what it touches there: rows, requests, preemption, refusals. No vLLM."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from foregate.config import SamplingConfig
from foregate.datasets.prompt import Prompt
from foregate.errors import ConfigError, PromptError, TraceError
from foregate.trace.reader import TraceReader
from foregate.trace.vllm import plugin, recording
from foregate.trace.vllm.__main__ import main
from foregate.trace.vllm.engine import VllmEngine
from foregate.trace.vllm.identity import external_id
from foregate.trace.vllm.layers import LayerShape
from foregate.trace.vllm.recorder import Recorder
from foregate.trace.vllm.recording import Options, record
from foregate.trace.vllm.refusals import GAPS
from foregate.trace.vllm.sequence import Chunk, RoutedSequence
from foregate.trace.vllm.settings import FLAGS, OUT, from_environment
from foregate.trace.vllm.sink import TraceSink
from foregate.trace.vllm.versions import check_version, load, reach

HIDDEN, EXPERTS, TOP_K = 8, (6, 4), (2, 1)


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module ``vllm`` of a tested version, with nothing in it."""
    module = SimpleNamespace(__version__="0.32.0+cpu")
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


class Router:
    def __init__(self, top_k: int) -> None:
        self.top_k = top_k

    def _compute_routing(self, hidden: Any, router_logits: Any, indices_type: Any, *, input_ids: Any = None) -> Any:
        weights, experts = router_logits.softmax(-1).topk(self.top_k, sorted=False)
        return weights, experts.to(torch.int32)


class Routed(nn.Module):
    quant_method = SimpleNamespace()

    def forward_modular(self, x: Any, weights: Any, experts: Any) -> Any:
        return x * weights.sum(-1, keepdim=True)


class MoERunner(nn.Module):
    is_monolithic = False

    def __init__(self, number: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.layer_id, self.router, self.routed_experts = number, Router(top_k), Routed()
        self.moe_config = SimpleNamespace(num_logical_experts=experts, experts_per_token=top_k)

    def forward(self, x: Any, logits: Any) -> Any:
        weights, experts = self.router._compute_routing(x, logits, None)
        return self.routed_experts.forward_modular(x, weights, experts)


class Block(nn.Module):
    def __init__(self, number: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(HIDDEN, experts), MoERunner(number, experts, top_k)

    def forward(self, x: Any) -> Any:
        return self.experts(x, self.gate(x))


class SelfAttention(nn.Module):
    def forward(self, x: Any) -> Any:
        return x


class Layer(nn.Module):
    def __init__(self, number: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = SelfAttention(), Block(number, experts, top_k)

    def forward(self, x: Any) -> Any:
        return x + self.mlp(self.self_attn(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, HIDDEN)
        self.layers = nn.ModuleList(Layer(n, *shape) for n, shape in enumerate(zip(EXPERTS, TOP_K, strict=True)))

    @torch.inference_mode()
    def forward(self, ids: Any) -> Any:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


class Runner:
    """vLLM's model runner, as far as it is reached for. ``cached`` are the tokens of every request, by id."""

    uses_mrope = False

    def __init__(self) -> None:
        self.model = Model()
        self.input_ids = SimpleNamespace(gpu=torch.zeros(64, dtype=torch.int32))
        self.positions = torch.zeros(64, dtype=torch.int64)
        self.input_batch = SimpleNamespace(req_ids=[])
        self.tokens: dict[str, list[int]] = {}
        self.output: Any = None

    def execute_model(self, scheduled: Any) -> str:
        if scheduled.total_num_scheduled_tokens:
            self.input_batch.req_ids = list(scheduled.num_scheduled_tokens)[::-1]  # its order, not the scheduler's
            start = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
            cached = scheduled.scheduled_cached_reqs
            start |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            at = 0
            for name in self.input_batch.req_ids:
                n, first = scheduled.num_scheduled_tokens[name], start[name]
                self.input_ids.gpu[at : at + n] = torch.tensor(self.tokens[name][first : first + n])
                self.positions[at : at + n] = torch.arange(first, first + n)
                at += n
            self.output = self.model(self.input_ids.gpu[: at + 3])  # padded, as vLLM does
        return "done"


def allowed() -> Any:
    """A VllmConfig in which nothing is refused."""
    config = SimpleNamespace()
    for path, refused, _ in GAPS:
        *owners, last = path.split(".")
        place = config
        for owner in owners:
            place.__dict__.setdefault(owner, SimpleNamespace())
            place = getattr(place, owner)
        setattr(place, last, next(value for value in (False, True, 1, "auto") if not refused(value)))
    return config


@pytest.fixture
def worker() -> Any:
    return SimpleNamespace(rank=0, vllm_config=allowed(), model_runner=Runner())


def step(worker: Any, *, new: Sequence[tuple[str, int]] = (), more: Any = (), finished: Sequence[str] = ()) -> Any:
    """One pass: ``new`` requests with the tokens to route, ``more`` of (request, first position, tokens)."""
    tokens = worker.model_runner.tokens
    counts = dict(new) | {name: count for name, _, count in more}
    scheduled = SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, prompt_token_ids=tokens[name][:PROMPT], num_computed_tokens=0)
            for name, _ in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, _, _ in more], num_computed_tokens=[first for _, first, _ in more]
        ),
        num_scheduled_tokens=counts,
        total_num_scheduled_tokens=sum(counts.values()),
        finished_req_ids=set(finished),
    )
    return worker.model_runner.execute_model(scheduled)


PROMPT = 5
A, B = "7-0a1b2c3d", "8-0a1b2c3d"


def truth(model: Model, tokens: list[int]) -> list[tuple[Any, Any]]:
    """Experts and weights of every layer, by the routers themselves."""
    found, x = [], model.embed(torch.tensor(tokens))
    with torch.inference_mode():
        for layer in model.layers:
            weights, experts = layer.mlp.experts.router._compute_routing(x, layer.mlp.gate(x), None)
            found.append((experts.numpy(), weights.numpy()))
            x = layer(x)
    return found


def check(model: Model, sequence: Any, tokens: list[int]) -> None:
    record = sequence.to_record("name", "domain")
    assert record.token_ids.tolist() == tokens
    assert record.positions.tolist() == list(range(len(tokens)))
    assert record.decode.tolist() == [position >= PROMPT for position in range(len(tokens))]
    for number, (experts, weights) in enumerate(truth(model, tokens)):
        k = TOP_K[number]
        assert (record.experts[:, number, :k] == experts).all()
        assert (record.experts[:, number, k:] == 255).all()
        np.testing.assert_allclose(record.weights[:, number, :k], weights, rtol=1e-5)
        assert np.isnan(record.weights[:, number, k:]).all()


def test_rows_reach_their_requests_in_the_order_of_the_batch(worker: Any) -> None:
    runner = worker.model_runner
    runner.tokens = {A: list(range(8)), B: list(range(20, 28))}
    recorder = Recorder(worker, scores=False, timings=False)
    assert step(worker, new=[(A, 5), (B, 3)]) == "done"
    step(worker, more=[(A, 5, 1), (B, 3, 2)])  # B's prompt comes in two chunks
    step(worker, more=[(B, 5, 1)], finished=[A])
    (first,) = recorder.take()
    assert first.request == A
    assert first.passes == 2
    check(runner.model, first, list(range(6)))
    (second,) = recorder.take(everything=True)
    check(runner.model, second, list(range(20, 26)))
    assert second.to_record("b", "").passes.tolist() == [0, 0, 0, 1, 1, 2]
    assert recorder.take() == []


def test_a_preempted_request_has_each_position_once(worker: Any) -> None:
    worker.model_runner.tokens = {A: list(range(9))}
    recorder = Recorder(worker, scores=False, timings=False)
    step(worker, new=[(A, 5)])
    step(worker, more=[(A, 5, 1)])
    step(worker, more=[(A, 0, 4)])  # preempted: everything again, in chunks that end elsewhere
    step(worker, more=[(A, 4, 3)])
    (found,) = recorder.take(everything=True)
    check(worker.model_runner.model, found, list(range(7)))
    assert found.to_record("a", "").passes.tolist() == [2, 2, 2, 2, 3, 3, 3]


def test_a_request_resumed_inside_a_chunk_keeps_what_was_not_routed_again(worker: Any) -> None:
    worker.model_runner.tokens = {A: list(range(9))}
    recorder = Recorder(worker, scores=True, timings=True)
    step(worker, new=[(A, 5)])
    step(worker, more=[(A, 3, 3)])
    (found,) = recorder.take(everything=True)
    check(worker.model_runner.model, found, list(range(6)))


def test_positions_that_were_never_routed_are_an_error(worker: Any) -> None:
    worker.model_runner.tokens = {A: list(range(9))}
    Recorder(worker, scores=False, timings=False)
    step(worker, new=[(A, 3)])
    with pytest.raises(TraceError, match="positions 3 to 4 were not routed"):
        step(worker, more=[(A, 5, 1)])


def test_positions_of_another_row_are_an_error(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = worker.model_runner
    runner.tokens = {A: list(range(9))}
    inner = runner.execute_model

    def shifted(scheduled: Any) -> Any:
        result = inner(scheduled)
        runner.positions += 1
        return result

    runner.execute_model = shifted
    Recorder(worker, scores=False, timings=False)
    with pytest.raises(TraceError, match="cannot be told apart"):
        step(worker, new=[(A, 3)])


def test_scores_are_the_logits_and_timings_are_in_the_first_row_of_a_pass(worker: Any) -> None:
    worker.model_runner.tokens = {A: list(range(9))}
    recorder = Recorder(worker, scores=True, timings=True)
    step(worker, new=[(A, 5)])
    step(worker, more=[(A, 5, 1)])
    (found,) = recorder.take(everything=True)
    made = found.to_record("a", "")
    assert made.scores is not None
    assert made.scores.shape == (6, 2, 6)
    assert np.isnan(made.scores[:, 1, 4:]).all()
    best = made.scores[:, 0].argsort(-1)[:, -2:]
    assert (np.sort(best) == np.sort(made.experts[:, 0])).all()
    assert set(made.timings) == {"attention_ns", "routing_ns", "dispatch_ns", "experts_ns"}
    for values in made.timings.values():
        assert (values[[0, 5]] >= 0).all()
        assert (values[1:5] == -1).all()


def test_the_time_of_a_pass_is_noted_once(worker: Any) -> None:
    worker.model_runner.tokens = {A: list(range(8)), B: list(range(20, 28))}
    recorder = Recorder(worker, scores=False, timings=True)
    step(worker, new=[(A, 5), (B, 5)])
    made = [found.to_record("name", "") for found in recorder.take(everything=True)]
    assert sorted(int((one.timings["experts_ns"] >= 0).sum()) for one in made) == [0, 2]


def test_what_the_model_computes_is_unchanged_and_close_puts_everything_back(worker: Any) -> None:
    runner = worker.model_runner
    runner.tokens = {A: list(range(9))}
    step(worker, new=[(A, 9)])
    before = runner.output.clone()
    recorder = Recorder(worker, scores=True, timings=True)
    step(worker, new=[(A, 9)])
    assert torch.equal(runner.output, before)
    recorder.close()
    step(worker, new=[(A, 9)])
    assert torch.equal(runner.output, before)
    (found,) = recorder.take(everything=True)
    assert found.passes == 1  # nothing was recorded after close()
    assert runner.execute_model.__func__ is Runner.execute_model
    for layer in runner.model.layers:
        assert layer.mlp.experts.router._compute_routing.__func__ is Router._compute_routing
        assert layer.mlp.experts.routed_experts.forward_modular.__func__ is Routed.forward_modular
        assert not layer.self_attn._forward_hooks
        assert not layer.mlp.gate._forward_pre_hooks


def test_passes_outside_of_a_step_are_not_recorded(worker: Any) -> None:
    recorder = Recorder(worker, scores=False, timings=True)
    worker.model_runner.model(torch.arange(4))
    step(worker)
    assert recorder.take(everything=True) == []


def test_a_failed_pass_leaves_the_recorder_usable(worker: Any) -> None:
    worker.model_runner.tokens = {A: list(range(9)), B: [99] * 9}
    recorder = Recorder(worker, scores=False, timings=False)
    with pytest.raises(IndexError):
        step(worker, new=[(B, 2)])
    step(worker, new=[(A, 9)])
    check(worker.model_runner.model, recorder.take(everything=True)[-1], list(range(9)))


def test_prompts_without_token_ids_are_refused(worker: Any) -> None:
    Recorder(worker, scores=False, timings=False)
    new = SimpleNamespace(req_id="x", prompt_token_ids=None, num_computed_tokens=0)
    scheduled = SimpleNamespace(scheduled_new_reqs=[new], finished_req_ids=())
    with pytest.raises(TraceError, match="'x' has no token ids"):
        worker.model_runner.execute_model(scheduled)


@pytest.mark.parametrize("path", [path for path, _, _ in GAPS])
def test_settings_that_make_gaps_are_refused_by_name(worker: Any, path: str) -> None:
    refused = next(refused for name, refused, _ in GAPS if name == path)
    *owners, last = path.split(".")
    place = worker.vllm_config
    for owner in owners:
        place = getattr(place, owner)
    setattr(place, last, next(value for value in (True, False, 2, "dummy") if refused(value)))
    with pytest.raises(TraceError, match=path):
        Recorder(worker, scores=False, timings=False)


def test_kernels_that_route_inside_are_refused(worker: Any) -> None:
    worker.model_runner.model.layers[1].mlp.experts.is_monolithic = True
    with pytest.raises(TraceError, match=r"layers\.1\.mlp\.experts: the kernel .* routes inside"):
        Recorder(worker, scores=False, timings=False)


def test_a_model_without_experts_is_refused(worker: Any) -> None:
    worker.model_runner.model = nn.Linear(2, 2)
    with pytest.raises(TraceError, match="no MoE layer"):
        Recorder(worker, scores=False, timings=False)


def test_another_layout_of_vllm_is_one_error_that_names_the_version(worker: Any) -> None:
    del worker.model_runner.input_batch
    with pytest.raises(
        TraceError, match=r"vLLM 0\.32\.0\+cpu is not laid out as expected: Runner has no 'input_batch'"
    ):
        Recorder(worker, scores=False, timings=False)


def test_a_module_that_moved_is_the_same_error() -> None:
    with pytest.raises(TraceError, match=r"vLLM 0\.32\.0\+cpu is not laid out as expected: no module"):
        load("vllm.v1.worker.worker_base", "WorkerWrapperBase")


def test_other_versions_are_refused_unless_asked_for(vllm: Any) -> None:
    assert check_version(untested=False) == "0.32.0+cpu"
    vllm.__version__ = "0.40.1"
    with pytest.raises(TraceError, match=r"vLLM 0\.40\.1 was not tested.*FOREGATE_VLLM_UNTESTED=1"):
        check_version(untested=False)
    assert check_version(untested=True) == "0.40.1"


def test_no_vllm_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(TraceError, match="vLLM is not installed"):
        record("reference", ["hello"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_reach_follows_a_path() -> None:
    assert reach(SimpleNamespace(a=SimpleNamespace(b=3)), "a.b") == 3


@pytest.mark.parametrize("options", [{"batch": 0}, {"chat_template": "perhaps"}])
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Options(**options)


def test_arguments_of_vllm_that_are_set_here_cannot_be_given(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="enable_prefix_caching"):
        VllmEngine(
            tmp_path, dtype="auto", seed=0, batch=1, kv_cache_bytes=1, scores=False, timings=False,
            more={"enable_prefix_caching": True},
        )  # fmt: skip


def test_the_plugin_sleeps_without_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OUT, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)
    plugin.register()


def test_the_plugin_records_every_worker_that_is_made_from_then_on(
    served: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class WorkerWrapperBase:
        def init_device(self) -> None:
            self.worker = served

    ended = []
    served.load_model = lambda: None
    served.shutdown = lambda: ended.append(True)
    module = SimpleNamespace(WorkerWrapperBase=WorkerWrapperBase)
    monkeypatch.setattr(plugin, "load", lambda name, attribute: getattr(module, attribute))
    monkeypatch.setenv(OUT, str(tmp_path / "out"))
    plugin.register()
    plugin.register()  # vLLM may load plugins more than once
    wrapper = WorkerWrapperBase()
    wrapper.init_device()
    served.load_model()
    served.model_runner.tokens = {A: list(range(8))}
    step(served, new=[(A, 5)])
    served.shutdown()
    assert ended == [True]
    reader = TraceReader(tmp_path / "out")
    assert reader.complete
    assert [entry.tokens for entry in reader.entries] == [5]


def test_the_plugin_leaves_other_ranks_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class WorkerWrapperBase:
        def init_device(self) -> None:
            self.worker = SimpleNamespace(rank=1)

    monkeypatch.setattr(plugin, "load", lambda name, attribute: WorkerWrapperBase)
    monkeypatch.setenv(OUT, str(tmp_path / "out"))
    plugin.register()
    WorkerWrapperBase().init_device()
    assert not (tmp_path / "out").exists()


def test_settings_come_from_the_environment() -> None:
    given = {OUT: "/tmp/x", FLAGS["scores"]: "1", "FOREGATE_VLLM_DOMAIN": "chat", "PATH": "/bin"}
    found = from_environment(given)
    assert found is not None
    assert (found.out, found.scores, found.timings, found.domain) == (Path("/tmp/x"), True, False, "chat")
    assert from_environment({}) is None


@pytest.mark.parametrize("given", [{"FOREGATE_VLLM_SCORE": "1"}, {OUT: "x", FLAGS["timings"]: "yes"}])
def test_unknown_settings_are_refused(given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="FOREGATE_VLLM_"):
        from_environment(given)


def test_ids_of_requests_lose_what_vllm_appends() -> None:
    assert external_id("cmpl-mine/1-0-816b081d") == "cmpl-mine/1-0"
    assert external_id("mine") == "mine"


@pytest.fixture
def served(worker: Any, tiny: Any) -> Any:
    """The worker, with a config that names a checkpoint whose fingerprint the trace takes."""
    directory = tiny("olmoe")
    model = worker.vllm_config.model_config
    model.model, model.seed, model.dtype = str(directory), 0, torch.float32
    model.hf_text_config = SimpleNamespace(model_type="olmoe")
    model.get_hidden_size = lambda: HIDDEN
    return worker


def test_a_server_writes_each_request_when_it_has_finished(served: Any, tmp_path: Path) -> None:
    served.model_runner.tokens = {A: list(range(8)), B: list(range(20, 28)), "9": [1] * 8}
    sink = TraceSink(served, from_environment({OUT: str(tmp_path / "out"), FLAGS["timings"]: "1"}))  # type: ignore[arg-type]
    step(served, new=[(A, 5), (B, 3)])
    step(served, more=[(A, 5, 1)], finished=[B])  # ended by its client inside its prompt
    step(served, new=[("9", 6)], finished=[A])
    assert [entry.prompt for entry in TraceReader(tmp_path / "out").entries] == ["7"]
    assert not TraceReader(tmp_path / "out").complete
    sink.close()
    sink.close()
    reader = TraceReader(tmp_path / "out")
    assert reader.complete
    assert [entry.prompt for entry in reader.entries] == ["7", "9"]
    assert [line.prompt for line in reader.skipped] == ["8"]
    assert reader.header.model.experts_per_layer == EXPERTS
    assert reader.header.model.top_k == TOP_K
    assert reader.header.runs[0].source == "vllm"
    assert reader.domains == ("requests",)


def test_two_requests_of_one_name_are_two_prompts(served: Any, tmp_path: Path) -> None:
    served.model_runner.tokens = {"7-00000000": list(range(8)), "7-11111111": list(range(8))}
    sink = TraceSink(served, from_environment({OUT: str(tmp_path / "out")}))  # type: ignore[arg-type]
    step(served, new=[("7-00000000", 6)])
    step(served, new=[("7-11111111", 6)], finished=["7-00000000"])
    sink.close()
    assert [entry.prompt for entry in TraceReader(tmp_path / "out").entries] == ["7", "7-11111111"]


class FakeEngine:
    """What ``record`` drives in place of vLLM: three tokens after every prompt, one token a word."""

    made: Any = None

    def __init__(self, directory: Path, **options: Any) -> None:
        type(self).made = self
        self.options, self.groups, self.sampling = options, [], []
        self.shapes = [LayerShape(number, *shape) for number, shape in enumerate(zip(EXPERTS, TOP_K, strict=True))]
        self.config = allowed()
        model = self.config.model_config
        model.model, model.dtype = str(directory), torch.bfloat16
        model.hf_text_config = SimpleNamespace(model_type="olmoe")
        model.get_hidden_size = lambda: HIDDEN

    def encode(self, text: str, template: str) -> list[int]:
        if len(text.split()) > 5:
            raise PromptError("too long")
        return [len(word) for word in text.split()]

    def generate(self, prompts: Sequence[list[int]], sampling: Sequence[SamplingConfig]) -> list[RoutedSequence]:
        self.groups.append(len(prompts))
        self.sampling += sampling
        return [self._routed(ids) for ids in prompts]

    def _routed(self, ids: list[int]) -> RoutedSequence:
        n = len(ids) + 2
        experts = np.tile(np.array([[[3, 5], [2, 255]]]), (n, 1, 1))
        weights = np.tile(np.array([[[0.5, 0.25], [1, np.nan]]], np.float32), (n, 1, 1))
        sequence = RoutedSequence("x", len(ids))
        sequence.add(Chunk(0, 0, np.array([*ids, 1, 2]), experts, weights, None, {}))
        return sequence


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    monkeypatch.setattr(recording, "VllmEngine", FakeEngine)
    return FakeEngine


PROMPTS = ["one", "two three", "four five six seven eight nine", "ten", "eleven"]


def test_prompts_are_traced_in_groups_and_what_does_not_fit_is_skipped(
    fake_engine: Any, tiny: Any, tmp_path: Path
) -> None:
    seen = []
    done = record(
        str(tiny("olmoe")), PROMPTS, tmp_path / "out", options=Options(batch=1), on_done=lambda p: seen.append(p.done)
    )
    assert (done.total, done.done, done.skipped, done.tokens) == (5, 5, 1, 3 + 4 + 3 + 3)
    assert fake_engine.made.groups == [2, 1, 1]
    assert seen == [2, 4, 5]
    reader = TraceReader(tmp_path / "out")
    assert reader.complete
    assert [entry.prompt for entry in reader.entries] == [f"prompt/{n:05d}" for n in (0, 1, 3, 4)]
    assert [(line.prompt, line.skipped) for line in reader.skipped] == [("prompt/00002", "too long")]
    assert next(iter(reader)).grid(next(iter(reader)).experts)[0].tolist() == [[3, 5], [2, 255]]
    assert reader.header.model.dtype == "bfloat16"
    assert reader.header.runs[0].settings["batch"] == 1


def test_a_stopped_session_resumes_without_repeating(fake_engine: Any, tiny: Any, tmp_path: Path) -> None:
    asked = iter([False, True])
    model, out, options = str(tiny("olmoe")), tmp_path / "out", Options(batch=1)
    done = record(model, PROMPTS, out, options=options, stop=lambda: next(asked))
    assert (done.stopped, done.done) == (True, 2)
    assert not TraceReader(out).complete
    with pytest.raises(TraceError, match="begun with settings max_new_tokens 128, not 5"):
        record(model, PROMPTS, out, options=options, resume=True, max_new_tokens=5)
    done = record(model, PROMPTS, out, options=options, resume=True)
    assert (done.before, done.done, done.stopped) == (2, 5, False)
    assert len(TraceReader(out)) == 4
    with pytest.raises(TraceError, match="not empty"):
        record(model, PROMPTS, out)


def test_each_prompt_samples_with_a_seed_of_its_own(fake_engine: Any, tiny: Any, tmp_path: Path) -> None:
    record(str(tiny("olmoe")), PROMPTS, tmp_path / "a", temperature=0.7, seed=3, limit=2)
    first = [config.seed for config in fake_engine.made.sampling]
    record(str(tiny("olmoe")), PROMPTS, tmp_path / "b", temperature=0.7, seed=4, limit=2)
    assert len({*first, *(config.seed for config in fake_engine.made.sampling)}) == 4


def test_nothing_that_fits_is_an_error(fake_engine: Any, tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="none of 1 prompts could be traced: too long"):
        record(str(tiny("olmoe")), [PROMPTS[2]], tmp_path / "out")


def test_the_command_takes_data_sets_and_options(
    fake_engine: Any, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny("olmoe")), "--dataset", "synthetic", "--limit", "1", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--scores", "--max-model-len", "64", "--kv-cache", "1MiB", "--json"]) == 1
    assert "none of 1 prompts" in capsys.readouterr().err
    assert fake_engine.made.options["scores"] is True
    assert fake_engine.made.options["kv_cache_bytes"] == 1 << 20
    assert fake_engine.made.options["more"] == {"max_model_len": 64}
    assert main([*arguments, "--kv-cache", "auto"]) == 1
    assert "--kv-cache 'auto' is not a size" in capsys.readouterr().err


def test_named_prompts_keep_their_names_and_domains(fake_engine: Any, tiny: Any, tmp_path: Path) -> None:
    record(str(tiny("olmoe")), [Prompt("mine/1", "code", "a b")], tmp_path / "out")
    assert [(entry.prompt, entry.domain) for entry in TraceReader(tmp_path / "out").entries] == [("mine/1", "code")]
