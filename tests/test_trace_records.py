"""Any routing goes into a trace and comes out again exactly; what does not fit is refused with the prompt named.

``make_header`` and ``make_record`` are used by the other tests of the trace.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foregate.errors import TraceError
from foregate.trace import format as fmt
from foregate.trace.header import FeatureInfo, Header, ModelInfo, RunInfo, ScoreInfo
from foregate.trace.reader import TraceReader
from foregate.trace.record import PromptRecord
from foregate.trace.tensors import widen_bfloat16
from foregate.trace.writer import TraceWriter

RUN = RunInfo(
    "test", {"foregate": "0"}, 3, {"name": "made up", "xxh3": "1"}, {"max_new_tokens": 4}, "2026-11-23T00:00Z"
)


def make_header(
    experts: tuple[int, ...] = (8, 8, 8), top_k: tuple[int, ...] = (2, 2, 2), *, model: str = "a" * 32, **more: Any
) -> Header:
    """A header for layers with these numbers of experts and choices."""
    layers = tuple(range(1, len(experts) + 1))
    return Header(ModelInfo("made up", model, "tiny", "float32", 16, layers, experts, top_k), (RUN,), **more)


def make_record(header: Header, prompt: str = "p/0", tokens: int = 7, asked: int = 4, seed: int = 0) -> PromptRecord:
    """Random routing of ``asked`` prompt tokens in one pass and the rest in one pass each."""
    random = np.random.default_rng([seed, len(prompt), *prompt.encode()])
    model = header.model
    grid = (tokens, model.layers)
    experts = np.full((*grid, model.width), fmt.padding(model.expert_dtype))
    weights = np.full(experts.shape, np.nan, np.float32)
    for layer, (count, chosen) in enumerate(zip(model.experts_per_layer, model.top_k, strict=True)):
        experts[:, layer, :chosen] = random.random((tokens, count)).argsort(axis=1)[:, :chosen]
        weights[:, layer, :chosen] = random.random((tokens, chosen))
    first = np.arange(tokens) >= asked
    first[0] = True
    timings = {name: np.where(first[:, None], random.integers(0, 9**12, grid), -1) for name in header.timings}
    features = {
        name: random.normal(size=(*grid, *info.shape)).astype(np.float16) for name, info in header.features.items()
    }
    for name, info in header.features.items():
        if info.dtype == "bfloat16":
            features[name] = random.integers(0, 2**15, (*grid, *info.shape)).astype(np.uint16)
    return PromptRecord(
        prompt=prompt,
        domain=prompt.split("/")[0],
        positions=np.arange(tokens),
        token_ids=random.integers(0, 99, tokens),
        decode=np.arange(tokens) >= asked,
        passes=np.maximum(np.arange(tokens) - asked + 1, 0),
        experts=experts,
        weights=weights,
        scores=random.normal(size=(*grid, header.scores.width)) if header.scores else None,
        timings=timings,
        features=features,
    )


def write(path: Path, header: Header, records: list[PromptRecord], *, finish: bool = True) -> Path:
    with TraceWriter(path) as writer:
        writer.begin(header)
        for record in records:
            writer.add(record)
        if finish:
            writer.finish()
    return path


@st.composite
def headers(draw: st.DrawFn) -> Header:
    experts = tuple(draw(st.lists(st.sampled_from([1, 3, 8, 64, 255, 256, 600]), min_size=1, max_size=4)))
    top_k = tuple(draw(st.integers(1, min(count, 9))) for count in experts)
    scores = draw(st.sampled_from([None, ScoreInfo(max(experts), "logits")]))
    timings = draw(st.sampled_from([(), fmt.TIMINGS[:4], fmt.TIMINGS]))
    features = {
        name: FeatureInfo(draw(st.sampled_from(fmt.FEATURE_DTYPES)), (draw(st.integers(1, 5)),), (0,))
        for name in draw(st.sets(st.sampled_from(fmt.FEATURE_NAMES)))
    }
    return make_header(experts, top_k, scores=scores, timings=timings, features=features)


@settings(max_examples=40, deadline=None)
@given(headers(), st.integers(1, 9), st.integers(0, 9), st.text(min_size=1, max_size=90))
def test_every_shape_comes_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, header: Header, tokens: int, asked: int, prompt: str
) -> None:
    record = make_record(header, prompt, tokens, asked)
    reader = TraceReader(write(tmp_path_factory.mktemp("t") / "trace", header, [record]))
    (part,) = reader
    model = header.model
    assert reader.header == replace(header, complete=reader.header.complete)
    assert (part.prompt, part.domain, part.entry.rows) == (prompt, record.domain, tokens * model.layers)
    assert np.array_equal(part.grid(part.experts), record.experts)
    assert np.array_equal(part.grid(part.weights), record.weights.astype(np.float16), equal_nan=True)
    for name, column in (("position", record.positions), ("token_id", record.token_ids), ("decode", record.decode)):
        assert np.array_equal(part.grid(getattr(part, name)), np.repeat(column[:, None], model.layers, axis=1))
    assert np.array_equal(part.grid(part.pass_index)[:, 0], record.passes)
    assert np.array_equal(part.layer, np.tile(np.arange(model.layers), tokens))
    if record.scores is not None:
        assert np.array_equal(part.grid(part.scores), record.scores.astype(np.float16))
    for name in header.timings:
        assert np.array_equal(part.grid(part.timing(name)), record.timings[name])
    for name, info in header.features.items():
        values = record.features[name]
        exact = values.astype(np.float32) if info.dtype == "float16" else widen_bfloat16(values)
        assert np.array_equal(part.grid(part.feature(name)), exact, equal_nan=True)


@pytest.fixture
def trace(tmp_path: Path) -> TraceReader:
    header = make_header((8, 5, 8), (2, 1, 2))
    records = [make_record(header, f"{kind}/{number}", 5 + number) for kind in ("code", "prose") for number in range(3)]
    return TraceReader(write(tmp_path / "trace", header, records))


def test_filters_choose_rows_and_keep_the_grid(trace: TraceReader) -> None:
    whole = {part.prompt: part for part in trace}
    for part in trace.parts(domains=["prose"], phases=["decode"], layers=[2, 0]):
        full = whole[part.prompt]
        rows = full.decode & np.isin(full.layer, [0, 2])
        assert part.domain == "prose"
        assert np.array_equal(part.experts, full.experts[rows])
        assert np.array_equal(part.position, full.position[rows])
        assert part.grid(part.experts).shape == (part.entry.decode_tokens, 2, 2)
    assert [part.prompt for part in trace.parts(prompts=["prose/1"])] == ["prose/1"]
    assert sum(len(part.layer) for part in trace.parts(phases=["prefill"])) == 6 * 4 * 3


@pytest.mark.parametrize(
    "wrong", [{"domains": ["poetry"]}, {"phases": ["fill"]}, {"layers": [3]}, {"order": "up"}, {"prompts": ["x"]}]
)
def test_a_filter_for_what_is_not_there_is_an_error(trace: TraceReader, wrong: dict[str, Any]) -> None:
    (value,) = wrong.values()
    with pytest.raises(TraceError, match=value if isinstance(value, str) else str(value[0])):
        list(trace.parts(**wrong))


def test_order_by_weight_sorts_both_lists_and_leaves_padding_last(trace: TraceReader) -> None:
    for given_order, ranked in zip(trace, trace.parts(order="weight"), strict=True):
        weights = np.nan_to_num(ranked.weights, nan=-1)
        assert (np.diff(weights, axis=1) <= 0).all()
        assert (ranked.experts[ranked.layer == 1, 1] == 255).all()
        pairs = zip(given_order.experts, given_order.weights, ranked.experts, ranked.weights, strict=True)
        for ids, values, ranked_ids, ranked_values in pairs:
            assert (
                dict(zip(ids, values, strict=True)).keys() == dict(zip(ranked_ids, ranked_values, strict=True)).keys()
            )


def test_what_was_not_traced_cannot_be_asked_for(trace: TraceReader) -> None:
    part = next(iter(trace))
    with pytest.raises(TraceError, match="without router scores"):
        _ = part.scores
    with pytest.raises(TraceError, match="no timing 'experts_ns'; it has: none"):
        part.timing("experts_ns")
    with pytest.raises(TraceError, match="no feature 'residual'"):
        part.feature("residual")


def test_unknown_tokens_are_null_on_disk(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    header = make_header()
    record = replace(make_record(header), token_ids=np.full(7, fmt.UNKNOWN_TOKEN))
    reader = TraceReader(write(tmp_path / "trace", header, [record]))
    assert (next(iter(reader)).token_id == -1).all()
    assert pq.read_table(reader.path / reader.entries[0].part.file)["token_id"].null_count == 21


HEADER = make_header(
    (8, 8), (2, 1), timings=("experts_ns",), features={"residual": FeatureInfo("float16", (3,), (0, 1))}
)
GOOD = make_record(HEADER)
WRONG = {
    "no tokens": replace(GOOD, positions=GOOD.positions[:0]),
    "experts too many": replace(GOOD, experts=np.where(GOOD.experts == 255, 255, 8)),
    "negative expert": replace(GOOD, experts=np.where(GOOD.experts == 255, 255, -1)),
    "no padding": replace(GOOD, experts=np.where(GOOD.experts == 255, 0, GOOD.experts)),
    "another layer count": replace(GOOD, experts=GOOD.experts[:, :1], weights=GOOD.weights[:, :1]),
    "weights of other shape": replace(GOOD, weights=GOOD.weights[:, :, :1]),
    "token ids short": replace(GOOD, token_ids=GOOD.token_ids[:-1]),
    "unexpected scores": replace(GOOD, scores=np.zeros((7, 2, 8))),
    "no timings": replace(GOOD, timings={}),
    "timing below -1": replace(GOOD, timings={"experts_ns": np.full((7, 2), -2)}),
    "no features": replace(GOOD, features={}),
    "feature of float32": replace(GOOD, features={"residual": np.zeros((7, 2, 3), np.float32)}),
    "weight beyond float16": replace(GOOD, weights=np.where(GOOD.experts == 255, np.nan, 1e6)),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_record_that_does_not_fit_is_refused_and_leaves_nothing(what: str, tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "trace") as writer:
        writer.begin(HEADER)
        with pytest.raises(TraceError, match="prompt 'p/0'"):
            writer.add(WRONG[what])
        assert not (tmp_path / "trace" / "parts").exists()
        writer.add(GOOD)
        with pytest.raises(TraceError, match="'p/0' is there already"):
            writer.add(GOOD)


def test_feature_files_are_plain_safetensors(tmp_path: Path) -> None:
    from safetensors import safe_open

    header = make_header(
        features={"residual": FeatureInfo("bfloat16", (3,), (0,)), "router_input": FeatureInfo("float16", (4,), (0,))}
    )
    record = make_record(header)
    reader = TraceReader(write(tmp_path / "trace", header, [record]))
    info = reader.entries[0].features
    assert info is not None
    with safe_open(reader.path / info.file, framework="pt") as file:
        assert file.metadata()["prompt"] == "p/0"
        residual, router_input = file.get_tensor("residual"), file.get_tensor("router_input")
    part = next(iter(reader))
    assert np.array_equal(residual.float().numpy(), part.feature("residual"), equal_nan=True)
    assert np.array_equal(router_input.float().numpy(), part.feature("router_input"))


def test_a_part_is_small(tmp_path: Path) -> None:
    """Random routing of 16 layers, 32 experts, top 4 (nothing to compress): below 12 bytes a row, overhead included."""
    header = make_header((32,) * 16, (4,) * 16)
    reader = TraceReader(write(tmp_path / "trace", header, [make_record(header, tokens=220, asked=90)]))
    assert reader.entries[0].part.bytes / reader.rows < 12


def test_reading_and_writing_need_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, foregate.trace.reader, foregate.trace.writer, foregate.trace.copying, foregate.trace.info;"
        "import foregate.datasets.catalogue; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
