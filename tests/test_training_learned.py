"""Learned predictors on a made-up model: what is trained in torch is served in numpy, with the same scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from foregate.errors import ConfigError
from foregate.native import products
from foregate.native.matrix import INT8
from foregate.native.predict import available
from foregate.predictors import PREDICTORS
from foregate.predictors.file import Artifact, load
from foregate.testing.routing import FEATURES, MadeModel, made_trace
from foregate.training import TRAINERS, estimator, fusion, history, ids_mlp, pre_attention, sequence
from foregate.training.counting import MarkovOptions, fit_markov, fit_popularity
from foregate.training.dataset import CHOICE, REPORT, TRAIN, VALIDATION, Dataset, Prompt
from foregate.training.learner import Learner
from foregate.training.routers import recover
from foregate.training.run import Request, train
from foregate.training.trainer import Options, parse_options
from foregate.training.view import Tensors, View
from foregate.types import Moment, Phase, RoutingStep

LEARNED = (
    "history-mlp",
    "history-lstm",
    "history-transformer",
    "ids-mlp",
    "estimator",
    "hybrid",
    "pre-attention",
    "sequence",
    "fusion",
)


class NoBar:
    state = Path()

    def begin(self, stage: str, total: int | None) -> None: ...

    def advance(self, units: int = 1) -> None: ...

    def tell(self, line: str) -> None: ...

    def log(self, record: Any) -> None: ...


class Replayed:
    """A prompt of a data set as ``interfaces.Signals``, without routers."""

    layers, top_k = 4, 2

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self.layer = self.position = self.token_id = 0
        self.moment = Moment.AFTER_ROUTING

    def choice_of(self, step: RoutingStep) -> None: ...

    def addresses(self, *names: str, numbers: int) -> None: ...

    def hidden(self, name: str) -> NDArray[np.float32]:
        return self._prompt.feature(name, slice(self.position, self.position + 1))[0, self.layer]

    def step(self, token: int, layer: int) -> RoutingStep:
        chosen = self._prompt.experts[token : token + 1, layer].astype(np.int64)
        weights = self._prompt.weights[token : token + 1, layer].astype(np.float32)
        return RoutingStep(layer, Phase.DECODE, token, chosen, weights)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_trace(tmp_path_factory.mktemp("made") / "trace", prompts=120, seed=3)


@pytest.fixture(scope="module")
def data(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset([trace], tmp_path_factory.mktemp("scratch"), features=FEATURES)


def learner(name: str, data: Dataset, *given: str) -> tuple[Learner, Options]:
    """A module of ``name`` with weights that are random everywhere, also where training begins at zero."""
    torch.manual_seed(1)
    options: Any = parse_options(TRAINERS.load(name).options, given)
    watch = NoBar()
    made: Learner
    if name == "ids-mlp":
        counts = fit_popularity(data, Options(), watch).tensors["popularity"]
        affinity = fit_markov(data, MarkovOptions(lookahead=options.lookahead), watch).tensors["transition"]
        made = ids_mlp.IdsMlp(data, options, counts, affinity)
    elif name in ("estimator", "hybrid"):
        made = estimator.Estimator(data, options, recover(data))
    else:
        kinds = {
            "history-mlp": history.HistoryMlp,
            "history-lstm": history.HistoryLstm,
            "history-transformer": history.HistoryTransformer,
            "pre-attention": pre_attention.PreAttention,
            "sequence": sequence.Sequence,
            "fusion": fusion.Fusion,
        }
        made = kinds[name](data, options)
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.2 * torch.randn_like(value))
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return made.eval(), options


def stored(name: str, made: Learner, options: Options, data: Dataset, extra: dict[str, Any]) -> Artifact:
    """What the file of ``made`` would hold."""
    model = data.model
    from foregate.predictors.file import ModelIdentity

    identity = ModelIdentity("made", model.fingerprint, model.experts_per_layer, model.width, model.hidden_size)
    settings = {**vars(options), **made.settings()}
    return Artifact(name, identity, options.lookahead, {**made.arrays(), **extra}, settings)


def served(name: str, made: Learner, options: Options, data: Dataset, extra: dict[str, Any]) -> Any:
    """The numpy predictor with the arrays of ``made``."""
    return PREDICTORS.load(name).from_file(stored(name, made, options, data, extra), options.lookahead)


CASES = [
    ("history-mlp", ("window=3",)),
    ("history-mlp", ("lookahead=3",)),
    ("history-lstm", ("hidden=32",)),
    ("history-transformer", ("window=3", "width=32")),
    ("history-transformer", ("lookahead=4", "width=32")),
    ("ids-mlp", ("lookahead=2",)),
    ("estimator", ("lookahead=2",)),
    ("pre-attention", ("arch=1", "hidden=64")),
    ("pre-attention", ("arch=2", "hidden=64", "previous=true")),
    ("sequence", ("lookahead=4", "width=32")),
    ("fusion", ("lookahead=1",)),
    ("fusion", ("lookahead=3",)),
]


@pytest.mark.parametrize("compiled", [False, True], ids=["numpy", "compiled"])
@pytest.mark.parametrize(("name", "given"), CASES, ids=[f"{name} {' '.join(given)}" for name, given in CASES])
def test_what_torch_trained_is_served_with_the_same_scores(
    name: str, given: Sequence[str], compiled: bool, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 up to rounding; with weights in int8 within a twentieth of the scores' spread, or, where nine matrices
    follow one another, a tenth.

    Not in int4, which is for corrections that were trained: these are random, and as large as what they correct.
    """
    monkeypatch.setattr("foregate.predictors.fusion.INT4", INT8)
    if not compiled:
        monkeypatch.setattr(products, "_linear", lambda: None)
    made, options = learner(name, data, *given)
    predictor = served(name, made, options, data, {})
    prompt = next(p for p in data.prompts(TRAIN) if p.tokens > 8)
    block = next(b for b in data.blocks(TRAIN, 10**6, FEATURES))
    start = next(
        i for i in np.flatnonzero(block.first) if (block.token_id[i : i + prompt.tokens] == prompt.token_id).all()
    )
    tensors = Tensors(block, data.model.experts_per_layer, data.score_kind)
    with torch.inference_mode():
        view = View(tensors, torch.arange(tensors.tokens))
        expected = made.scores(view, torch.arange(4)).numpy()[start : start + prompt.tokens]
    share = 0.1 if name == "history-transformer" else 0.05
    rounding = share * float(expected.std()) if compiled else 2e-4
    predictor.reset()
    signals = Replayed(prompt)
    for token in range(prompt.tokens):
        for layer in range(4):
            signals.position, signals.layer = token, layer
            if predictor.moment is not Moment.BEFORE_ATTENTION:
                predictor.observe(signals.step(token, layer))
            for prediction in predictor.predict(signals):
                scores = np.empty(8, np.float32)
                scores[list(prediction.experts)] = prediction.scores
                hop = made.hops.index(prediction.layer - layer)
                np.testing.assert_allclose(scores, expected[token, layer, hop], rtol=2e-4, atol=rounding)
            if predictor.moment is Moment.BEFORE_ATTENTION:
                predictor.observe(signals.step(token, layer))


@pytest.mark.skipif(not available(), reason="the kernels are not built")
@pytest.mark.parametrize(
    ("name", "given"), [case for case in CASES if case[0] in ("pre-attention", "fusion")], ids=lambda value: str(value)
)
def test_one_compiled_call_gives_what_the_steps_give(name: str, given: Sequence[str], data: Dataset) -> None:
    """The same rounded weights, multiplied step by step."""
    made, options = learner(name, data, *given)
    one, steps = (served(name, made, options, data, {}) for _ in range(2))
    assert steps._kernel is not None
    steps._kernel = None
    prompt = next(p for p in data.prompts(TRAIN) if p.tokens > 8)
    signals = Replayed(prompt)
    for token in range(prompt.tokens):
        for layer in range(4):
            signals.position, signals.layer = token, layer
            if one.moment is not Moment.BEFORE_ATTENTION:
                one.observe(signals.step(token, layer))
                steps.observe(signals.step(token, layer))
            for ours, theirs in zip(one.predict(signals), steps.predict(signals), strict=True):
                assert ours.layer == theirs.layer
                np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-4, atol=1e-4)


def test_a_last_batch_of_one_token_does_not_end_the_training_of_architecture_1(data: Dataset) -> None:
    made, _ = learner("pre-attention", data, "arch=1", "hidden=64")
    block = next(b for b in data.blocks(TRAIN, 10**6, FEATURES))
    tensors = Tensors(block, data.model.experts_per_layer, data.score_kind)
    made.train()
    assert made.scores(View(tensors, torch.arange(1)), torch.arange(4)).isfinite().all()


def test_hybrid_takes_each_layer_from_the_source_that_was_chosen(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_linear", lambda: None)
    made, options = learner("hybrid", data, "lookahead=2")
    plain = estimator.Plain(data, made.hops, recover(data))
    estimated = np.asarray([[1, 0], [0, 1], [1, 1], [0, 0]], np.uint8)
    extra = {"estimated": estimated, "router": plain.router.numpy(), "router_bias": plain.bias.numpy()}
    predictor = served("hybrid", made, options, data, extra)
    prompt = next(data.prompts(TRAIN))
    signals = Replayed(prompt)
    tensors = Tensors(next(data.blocks(TRAIN, 64, FEATURES)), data.model.experts_per_layer, data.score_kind)
    with torch.inference_mode():
        view = View(tensors, torch.arange(1))
        both = made.scores(view, torch.arange(4))[0].numpy(), plain.scores(view, torch.arange(4))[0].numpy()
    for layer in range(4):
        signals.layer = layer
        for hop, prediction in enumerate(predictor.predict(signals)):
            expected = both[0 if estimated[layer, hop] else 1][layer, hop]
            np.testing.assert_allclose(sorted(prediction.scores), sorted(expected), rtol=1e-3, atol=1e-3)


def test_hybrid_reports_on_the_prompts_by_which_it_chose(
    trace: Path, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    judge = estimator.judge

    def watched(made: Learner, data: Dataset, where: str, options: Any) -> dict[str, Any]:
        asked.append((type(made).__name__, where))
        return judge(made, data, where, options)

    monkeypatch.setattr(estimator, "judge", watched)
    given = ("block=256", "batch=64", "epochs=2", "hidden=32")
    artifact = train(Request("hybrid", (trace,), tmp_path / "h.safetensors", given), NoBar())
    assert asked == [("Estimator", CHOICE), ("Plain", CHOICE), ("Mixed", REPORT)]
    halves = [{prompt.content for prompt in data.prompts(where)} for where in (CHOICE, REPORT)]
    assert not halves[0] & halves[1]
    assert halves[0] | halves[1] == {prompt.content for prompt in data.prompts(VALIDATION)}
    assert [artifact.metrics[name] for name in ("chosen_by_prompts", "judged_on_prompts")] == [*map(len, halves)]


def test_hybrid_of_one_validation_prompt_claims_nothing(trace: Path, tmp_path: Path) -> None:
    """Nor does it fail: a first try is on a small trace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "_halves", lambda self: {CHOICE: self._by_side[VALIDATION], REPORT: []})
        given = ("block=256", "batch=64", "epochs=1", "hidden=32")
        artifact = train(Request("hybrid", (trace,), tmp_path / "h.safetensors", given), NoBar())
    assert "recall_at_k" not in artifact.metrics
    assert artifact.metrics["judged_on_prompts"] == 0
    assert artifact.metrics["estimator"]["recall_at_k"] > 0


def test_routers_come_back_from_a_trace(data: Dataset) -> None:
    """The made-up routers are known: what is recovered ranks as they do."""
    found, true = recover(data), MadeModel()
    centred = 2 * (true.routers - true.routers.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(found.weight, centred, atol=0.02)
    np.testing.assert_allclose(found.norm, true.norms, rtol=0.01)


SMALL = {
    "history-transformer": ("width=32", "epochs=8", "dropout=0"),
    "history-lstm": ("hidden=48", "epochs=25", "learning_rate=0.01"),
    "pre-attention": ("hidden=128",),
    "sequence": ("width=48", "block=128"),
}


@pytest.mark.parametrize("name", LEARNED)
def test_training_learns_more_than_popularity(name: str, trace: Path, data: Dataset, tmp_path: Path) -> None:
    popular = fit_popularity(data, Options(), NoBar()).tensors["popularity"].argsort(axis=1)[:, ::-1][:, :2]
    hits = [(popular[None, :, :, None] == p.experts[:, :, None]).any(2).mean() for p in data.prompts(VALIDATION)]
    given = ("block=256", "batch=64", "learning_rate=0.005", *SMALL.get(name, ()))
    merged = {text.partition("=")[0]: text for text in given}
    artifact = train(Request(name, (trace,), tmp_path / "p.safetensors", tuple(merged.values())), NoBar())
    assert artifact.metrics["recall_at_k"] > np.mean(hits) + 0.05
    assert load(tmp_path / "p.safetensors").metrics == artifact.metrics


def test_a_lookahead_that_was_not_trained_is_refused(data: Dataset) -> None:
    made, options = learner("ids-mlp", data)
    artifact = stored("ids-mlp", made, options, data, {})
    with pytest.raises(ConfigError, match="trained for 1"):
        PREDICTORS.load("ids-mlp").from_file(artifact, 2)
