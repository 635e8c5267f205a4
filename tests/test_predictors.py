"""Each method against a slow and obvious version of its rule; each control reads what it must."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from foregate.errors import ConfigError, PredictorError
from foregate.predictors import PREDICTORS
from foregate.predictors.file import Artifact, ModelIdentity
from foregate.predictors.oracle import Oracle, RouteRecorder
from foregate.testing.routing import MadeModel, made_trace
from foregate.training import TRAINERS
from foregate.training.dataset import TEST, TRAIN, Dataset, Prompt
from foregate.training.trainer import parse_options
from foregate.types import Moment, Phase, Prediction, RoutingStep

MADE = MadeModel()
LAYERS, EXPERTS, K = MADE.layers, MADE.experts, MADE.top_k
FITTED = ("popularity", "markov", "eam", "expert-map")


class Quiet:
    """A ``Watch`` that looks away."""

    state = Path()

    def begin(self, stage: str, total: int | None) -> None: ...

    def advance(self, units: int = 1) -> None: ...

    def log(self, record: Mapping[str, Any]) -> None: ...


class TracedSignals:
    """``interfaces.Signals`` over one token of a trace of the made-up model."""

    def __init__(self, prompt: Prompt, token: int, layer: int, moment: Moment) -> None:
        self.layers, self.top_k, self.experts = LAYERS, K, (EXPERTS,) * LAYERS
        self.layer, self.moment, self.position, self.token_id = layer, moment, token, int(prompt.token_id[token])
        self._prompt = prompt

    def addresses(self, *names: str, numbers: int) -> None: ...

    def hidden(self, name: str) -> NDArray[np.float32]:
        return self._prompt.feature(name, slice(self.position, self.position + 1))[0, self.layer]

    def normed(self, target: int, residual: NDArray[np.float32]) -> NDArray[np.float32]:
        values: NDArray[np.float32] = residual / np.sqrt((residual**2).mean()) * MADE.norms[target]
        return values

    def scores(self, target: int, router_input: NDArray[np.float32]) -> NDArray[np.float32]:
        values: NDArray[np.float32] = 2 * MADE.routers[target] @ router_input
        return values

    def rank(self, target: int, source: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        value = self.hidden(source)
        scores = self.scores(target, self.normed(target, value) if source == "residual" else value)
        order = np.argsort(-scores)
        return order, scores[order]

    def choice_of(self, step: RoutingStep) -> None: ...

    def begin_shifted(self, target: int, shift: int, most: int) -> None: ...

    def best(self, target: int, source: str, most: int | None) -> Prediction:
        order, scores = self.rank(target, source)
        return Prediction(target, tuple(order[:most].tolist()), tuple(scores[:most].tolist()))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("made")
    trace = made_trace(root / "trace", prompts=60, tokens=16, seed=3)
    return Dataset([trace], root / "scratch", features=("pre_attention", "residual", "router_input"))


def identity(data: Dataset) -> ModelIdentity:
    model = data.model
    return ModelIdentity(model.name, model.fingerprint, model.experts_per_layer, model.width, model.hidden_size)


def fitted(data: Dataset, method: str, *options: str) -> Artifact:
    trainer = TRAINERS.load(method)
    parsed = parse_options(trainer.options, options)
    made = trainer.fit(data, parsed, Quiet())
    return Artifact(method, identity(data), parsed.lookahead, made.tensors, made.settings, trainer.features)


def make(data: Dataset, method: str, lookahead: int, *options: str) -> Any:
    kind = PREDICTORS.load(method)
    if kind.needs_file:
        return kind.from_file(fitted(data, method, f"lookahead={lookahead}", *options), lookahead)
    return kind(lookahead=lookahead)


def step(prompt: Prompt, first: int, last: int, layer: int) -> RoutingStep:
    phase = Phase.DECODE if first else Phase.PREFILL
    experts, weights = prompt.experts[first:last, layer], prompt.weights[first:last, layer]
    return RoutingStep(layer, phase, first, experts.astype(np.int64), weights.astype(np.float32))


Asked = tuple[int, int, list[Prediction]]


def asked(predictor: Any, prompt: Prompt, prefill: int = 4) -> Iterator[Asked]:
    """Token, layer and predictions, as the engine would have asked."""
    predictor.reset()
    for layer in range(LAYERS):
        predictor.observe(step(prompt, 0, prefill, layer))
    for token in range(prefill, prompt.tokens):
        for layer in range(LAYERS):
            late = predictor.moment is Moment.AFTER_ROUTING
            if late:
                predictor.observe(step(prompt, token, token + 1, layer))
            yield token, layer, list(predictor.predict(TracedSignals(prompt, token, layer, predictor.moment)))
            if not late:
                predictor.observe(step(prompt, token, token + 1, layer))


def first_prompts(data: Dataset, count: int = 3) -> list[Prompt]:
    return [prompt for prompt in data.prompts(TRAIN) if prompt.tokens > 8][:count]


def best_first(prediction: Prediction, scores: NDArray[Any], rounding: float = 1e-5) -> None:
    """The prediction ranks all experts by ``scores``."""
    assert sorted(prediction.experts) == list(range(EXPERTS))
    np.testing.assert_allclose(prediction.scores, scores[list(prediction.experts)], rtol=rounding, atol=rounding)
    assert all(a >= b - 1e-6 for a, b in zip(prediction.scores, prediction.scores[1:], strict=False))


def tables(data: Dataset, hop: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """How often e was followed by f ``hop`` layers later, [L, E, E], and how often e had a later layer, [L, E]."""
    pairs, rows = np.zeros((LAYERS, EXPERTS, EXPERTS)), np.zeros((LAYERS, EXPERTS))
    for prompt in data.prompts(TRAIN):
        flat = [list(map(int, chosen)) for token in prompt.experts for chosen in token]
        for place in range(len(flat) - hop):
            for e in flat[place]:
                rows[place % LAYERS, e] += 1
                for f in flat[place + hop]:
                    pairs[place % LAYERS, e, f] += 1
    return pairs, rows


def test_popularity_is_the_share_of_training_tokens(data: Dataset) -> None:
    counts = np.zeros((LAYERS, EXPERTS))
    for prompt in data.prompts(TRAIN):
        for token in prompt.experts:
            for layer, chosen in enumerate(token):
                counts[layer, chosen] += 1
    for _, layer, predictions in asked(make(data, "popularity", 3), first_prompts(data)[0]):
        assert [p.layer for p in predictions] == [layer + 1, layer + 2, layer + 3]
        for prediction in predictions:
            best_first(prediction, counts[prediction.layer % LAYERS] / data.tokens(TRAIN))


def test_previous_token_repeats_and_knows_the_next_tokens_layers(data: Dataset) -> None:
    prompt = first_prompts(data)[0]
    for token, layer, predictions in asked(make(data, "previous-token", LAYERS), prompt):
        for prediction in predictions:
            of_next = prediction.layer >= LAYERS
            before = prompt.experts[token if of_next else token - 1, prediction.layer % LAYERS]
            assert list(prediction.experts) == before.tolist()
        assert predictions[-1].layer == layer + LAYERS


@pytest.mark.parametrize("smoothing", [0.0, 2.5])
def test_markov_is_the_conditional_share_averaged_over_the_chosen(data: Dataset, smoothing: float) -> None:
    predictor = make(data, "markov", 3, f"smoothing={smoothing}")
    counted = {hop: tables(data, hop) for hop in (1, 2, 3)}
    for prompt in first_prompts(data):
        for token, layer, predictions in asked(predictor, prompt):
            assert [p.layer - layer for p in predictions] == [1, 2, 3]
            for prediction in predictions:
                pairs, rows = counted[prediction.layer - layer]
                tokens = rows[layer].sum() / K
                average = pairs[layer].sum(axis=0) / (K * tokens)
                chosen = prompt.experts[token, layer]
                shares = [
                    (pairs[layer, e] + smoothing * average) / max(rows[layer, e] + smoothing, 1e-12) for e in chosen
                ]
                best_first(prediction, np.mean(shares, axis=0))


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def hot(experts: NDArray[Any]) -> NDArray[Any]:
    return np.bincount(experts.ravel().astype(int), minlength=EXPERTS).astype(float)


@pytest.mark.parametrize("scope", ["token", "request"])
def test_eam_follows_the_stored_request_with_the_nearest_prefix(data: Dataset, scope: str) -> None:
    artifact = fitted(data, "eam", f"scope={scope}", "capacity=9")
    library = artifact.arrays["library"].astype(float)
    assert len(library) == 9
    np.testing.assert_allclose(library.sum(axis=2), 1, rtol=1e-5)
    predictor = PREDICTORS.load("eam").from_file(artifact, 2)
    for prompt in first_prompts(data):
        for token, layer, predictions in asked(predictor, prompt):
            likeness = np.zeros(len(library))
            for seen in range(LAYERS):
                if scope == "token":
                    rows = prompt.experts[token : token + 1, seen] if seen <= layer else None
                else:
                    rows = prompt.experts[: token + (seen <= layer), seen]
                if rows is not None:
                    likeness += [cosine(stored[seen], hot(rows)) for stored in library]
            # a tie to within rounding may fall either way
            near = np.flatnonzero(likeness > likeness.max() - 1e-5)
            for prediction in predictions:
                decay = 1 - (prediction.layer - layer) / LAYERS
                expected = [decay * library[n, prediction.layer % LAYERS] for n in near]
                given = np.zeros(EXPERTS)
                given[list(prediction.experts)] = prediction.scores
                assert any(np.allclose(given, values, atol=1e-5) for values in expected)


def test_eam_keeps_requests_that_differ() -> None:
    from foregate.training.library import spread_out

    rows = np.repeat(np.eye(4, dtype=np.float32), 10, axis=0)
    assert {int(rows[i].argmax()) for i in spread_out(rows, 4)} == {0, 1, 2, 3}
    assert spread_out(rows[:3], 5).tolist() == [0, 1, 2]


def test_expert_map_matches_the_input_first_then_the_routing(data: Dataset) -> None:
    artifact = fitted(data, "expert-map", "capacity=50")
    maps, inputs = artifact.arrays["maps"].astype(float), artifact.arrays["inputs"].astype(float)
    np.testing.assert_allclose(maps.sum(axis=2), 1, rtol=1e-2)
    predictor = PREDICTORS.load("expert-map").from_file(artifact, 2)
    counts = set()
    for prompt in first_prompts(data):
        entered = prompt.feature("pre_attention").astype(float)
        for token, layer, predictions in asked(predictor, prompt):
            if layer == 0:
                likeness = [cosine(stored, entered[token, 0]) for stored in inputs]
            else:
                seen = np.zeros((LAYERS, EXPERTS))
                for earlier in range(layer + 1):
                    seen[earlier, prompt.experts[token, earlier]] = prompt.weights[token, earlier]
                likeness = [cosine(stored[: layer + 1].ravel(), seen[: layer + 1].ravel()) for stored in maps]
            match, score = int(np.argmax(likeness)), max(likeness)
            for prediction in predictions:
                there = maps[match, prediction.layer % LAYERS]
                order = np.argsort(-there, kind="stable")
                needed = int(np.searchsorted(np.cumsum(there[order]), 1 - score)) + 1
                assert list(prediction.experts) == order[: min(max(needed, K), EXPERTS)].tolist()
                counts.add(len(prediction.experts))
    assert counts


def test_a_bad_match_keeps_more_experts_than_a_good_one(data: Dataset) -> None:
    artifact = fitted(data, "expert-map", "capacity=50")
    predictor = PREDICTORS.load("expert-map").from_file(artifact, 1)
    lengths = [len(predictor._kept(0, score, 1, 0).experts) for score in (1.0, 0.5, 0.1, -1.0)]
    assert lengths == sorted(lengths)
    assert lengths[0] == K < lengths[-1] == EXPERTS


def test_quasi_hidden_adds_what_the_chosen_experts_give(data: Dataset) -> None:
    # the made-up model's experts give constants, so the guess is the true residual before the next attention
    arrays = {"experts": 0.3 * MADE.outputs.astype(np.float32), "rest": np.zeros((LAYERS, MADE.hidden), np.float32)}
    predictor = PREDICTORS.load("quasi-hidden").from_file(Artifact("quasi-hidden", identity(data), 1, arrays), 1)
    for prompt in first_prompts(data):
        residual = prompt.feature("residual").astype(float)
        for token, layer, predictions in asked(predictor, prompt):
            if layer == LAYERS - 1:
                assert not predictions
                continue
            guess = residual[token, layer].copy()
            for expert, weight in zip(prompt.experts[token, layer], prompt.weights[token, layer], strict=True):
                guess += float(weight) * 0.3 * MADE.outputs[layer, expert]
            read = guess / np.sqrt((guess**2).mean()) * MADE.norms[layer + 1]
            best_first(predictions[0], 2 * MADE.routers[layer + 1] @ read, rounding=0.02)  # int8


def recall(predictor: Any, data: Dataset) -> float:
    """Of the experts that were chosen, the share among the k first predicted; only layers of the same token."""
    hits = total = 0
    for prompt in data.prompts(TEST):
        for token, _, predictions in asked(predictor, prompt):
            for prediction in predictions:
                if prediction.layer < LAYERS:
                    chosen = set(prompt.experts[token, prediction.layer].tolist())
                    hits += len(chosen & set(prediction.experts[: len(chosen)]))
                    total += len(chosen)
    assert total
    return hits / total


def test_fresh_gate_reads_one_hundred_percent(data: Dataset) -> None:
    # features are stored in half precision: a tie may fall the other way
    assert recall(make(data, "fresh-gate", 0), data) > 0.99


def recording(prompt: Prompt, prefill: int = 4) -> RouteRecorder:
    recorder = RouteRecorder()
    for token in range(prefill, prompt.tokens):
        for layer in range(LAYERS):
            recorder.on_route(step(prompt, token, token + 1, layer))
    return recorder


def replayed(kind: type[Oracle], data: Dataset, **options: Any) -> float:
    """Recall over TRAIN prompts (there are more of them), each with its own recording."""
    hits = total = 0
    for prompt in data.prompts(TRAIN):
        predictor = kind(2, **options)
        predictor.load(recording(prompt), prompt.name)
        for token, _, predictions in asked(predictor, prompt):
            for prediction in predictions:
                later = token + prediction.layer // LAYERS
                chosen = set(prompt.experts[later, prediction.layer % LAYERS].tolist())
                hits += len(chosen & set(prediction.experts))
                total += len(chosen)
    return hits / total


def test_oracle_reads_one_hundred_percent_and_shuffled_chance(data: Dataset) -> None:
    assert replayed(PREDICTORS.load("oracle"), data) == 1
    shuffled = PREDICTORS.load("shuffled")
    assert np.mean([replayed(shuffled, data, seed=seed) for seed in range(8)]) == pytest.approx(K / EXPERTS, abs=0.06)


@pytest.mark.parametrize("method", ["next-gate", "markov", "expert-map"])
def test_methods_that_know_something_beat_popularity(method: str, data: Dataset) -> None:
    options = ("capacity=300",) if method == "expert-map" else ()
    assert recall(make(data, method, 1, *options), data) > recall(make(data, "popularity", 1), data) + 0.05


@pytest.mark.parametrize("method", FITTED)
def test_fitting_twice_gives_the_same_arrays(method: str, data: Dataset) -> None:
    one, two = fitted(data, method), fitted(data, method)
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, two.arrays[name])


@pytest.mark.parametrize("method", [*FITTED, "quasi-hidden"])
def test_an_artifact_without_its_arrays_is_refused(method: str, data: Dataset) -> None:
    with pytest.raises(PredictorError, match="is missing"):
        PREDICTORS.load(method).from_file(Artifact(method, identity(data), 1, {}), 1)


def test_a_reset_predictor_repeats_itself(data: Dataset) -> None:
    prompts = first_prompts(data, 2)
    for method in (*FITTED, "previous-token", "random"):
        predictor = make(data, method, 2)
        once = [list(asked(predictor, prompt)) for prompt in prompts]
        again = [list(asked(predictor, prompt)) for prompt in prompts]
        assert again == once, method


def test_needs_a_file_and_lookahead_that_predicts_nothing_are_refused() -> None:
    from foregate.predictors.choice import make_predictor

    def model() -> ModelIdentity:
        raise AssertionError("asked for the model without need")

    with pytest.raises(ConfigError, match="'markov' must be trained first"):
        make_predictor("markov", None, model)
    with pytest.raises(ConfigError, match="lookahead 0"):
        make_predictor("next-gate", 0, model)
    assert make_predictor("pre-attention-gate", None, model).lookahead == 0
    assert make_predictor("next-gate", None, model).lookahead == 1
