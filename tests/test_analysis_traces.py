"""Synthetic routers with known answers, traces of them by the real writer, and how an analysis reads traces."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from foregate.analysis.prompt import multi_hot
from foregate.analysis.settings import Settings
from foregate.analysis.source import Source
from foregate.analysis.study import analyse
from foregate.errors import ConfigError, TraceError
from foregate.trace.header import Header, ModelInfo, RunInfo
from foregate.trace.record import PromptRecord
from foregate.trace.writer import TraceWriter

TIMINGS = ("attention_ns", "routing_ns", "dispatch_ns", "experts_ns", "expert_wait_ns")
Ids = NDArray[np.uint8]


@dataclass(frozen=True)
class Independent:
    """Uniform k-subsets, every token and layer on its own: nothing to predict."""

    layers: int = 4
    experts: int = 16
    top_k: int = 2

    def choose(self, rng: np.random.Generator, domain: str, tokens: int) -> Ids:
        """[T, L, k]."""
        noise = rng.random((tokens, self.layers, self.experts))
        return np.argsort(noise, axis=2)[:, :, : self.top_k].astype(np.uint8)


@dataclass(frozen=True)
class Chain(Independent):
    """Layer l + 1 is a fixed permutation of layer l: everything can be predicted, at any hop."""

    def choose(self, rng: np.random.Generator, domain: str, tokens: int) -> Ids:
        out = super().choose(rng, domain, tokens)
        for layer in range(1, self.layers):
            step = np.random.default_rng(layer).permutation(self.experts).astype(np.uint8)
            out[:, layer] = step[out[:, layer - 1]]
        return out


@dataclass(frozen=True)
class Planted(Independent):
    """In the last layer, tokens of domain "b" choose the first experts more often; nothing else differs."""

    share: float = 0.3

    def choose(self, rng: np.random.Generator, domain: str, tokens: int) -> Ids:
        out = super().choose(rng, domain, tokens)
        if domain == "b":
            out[rng.random(tokens) < self.share, -1] = np.arange(self.top_k)
        return out


def header(router: Independent, *, timed: bool = False, name: str = "synthetic") -> Header:
    depth = router.layers
    sizes = (router.experts,) * depth, (router.top_k,) * depth
    model = ModelInfo(name, f"{name}-0000", "test", "float32", 8, tuple(range(depth)), *sizes)
    return Header(model, (RunInfo("synthetic", {}, 0, {}, {}, "2026-11-23"),), timings=TIMINGS if timed else ())


def write_trace(
    path: Path,
    router: Independent,
    *,
    prompts: int = 20,
    tokens: int = 50,
    domains: tuple[str, ...] = ("all",),
    decode_share: float = 0.5,
    seed: int = 0,
    timings: dict[str, int] | None = None,
    name: str = "synthetic",
) -> Path:
    """Domains take turns; ``timings`` gives the nanoseconds of every pass and layer. Returns ``path``."""
    rng = np.random.default_rng(seed)
    with TraceWriter(path) as writer:
        writer.begin(header(router, timed=timings is not None, name=name))
        for number in range(prompts):
            domain = domains[number % len(domains)]
            experts = router.choose(rng, domain, tokens)
            writer.add(record(f"{domain}/{seed}/{number}", domain, experts, decode_share, rng, timings))
        writer.finish()
    return path


def record(
    name: str, domain: str, experts: Ids, decode_share: float, rng: np.random.Generator, timings: Any = None
) -> PromptRecord:
    tokens, layers, top_k = experts.shape
    decode = np.arange(tokens) >= round(tokens * (1 - decode_share))
    measured = {}
    for key in TIMINGS if timings is not None else ():
        measured[key] = np.full((tokens, layers), timings.get(key, -1))
        measured[key][1 : int((~decode).sum())] = -1  # a pass has its times in the row of its first token
    return PromptRecord(
        prompt=name,
        domain=domain,
        positions=np.arange(tokens),
        token_ids=rng.integers(0, 30_000, tokens),
        decode=decode,
        passes=np.where(decode, np.cumsum(decode), 0),
        experts=experts,
        weights=np.broadcast_to(np.linspace(1, 0.5, top_k, dtype=np.float32), experts.shape).copy(),
        timings=measured,
    )


def test_every_prompt_text_is_on_one_side_of_the_split(tmp_path: Path) -> None:
    router = Independent()
    write_trace(tmp_path / "a", router, domains=("x", "y"), seed=1)
    write_trace(tmp_path / "b", router, domains=("x", "y"), seed=1, decode_share=0.4)  # same texts, traced anew
    items = Source([tmp_path / "a", tmp_path / "b"], Settings()).items
    sides: dict[str, set[bool]] = {}
    for item in items:
        sides.setdefault(item.entry.content, set()).add(item.test)
    assert all(len(side) == 1 for side in sides.values())
    assert {item.entry.domain for item in items if item.test} == {"x", "y"}


def test_the_same_file_in_two_traces_is_read_once(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "a", Independent(), prompts=5)
    assert len(Source([path, path], Settings()).items) == 5


def test_experts_come_by_weight_and_the_phase_filters_tokens(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "a", Independent(), prompts=2, tokens=10, decode_share=0.3)
    for phase, tokens in (("all", 10), ("decode", 3), ("prefill", 7)):
        found = list(Source([path], Settings(phase=phase)).prompts())
        assert [prompt.tokens for prompt in found] == [tokens, tokens]
        assert all(prompt.experts.shape == (tokens, 4, 2) for prompt in found)


def test_traces_of_two_models_are_refused(tmp_path: Path) -> None:
    paths = [write_trace(tmp_path / name, Independent(), prompts=1, name=name) for name in ("one", "two")]
    with pytest.raises(TraceError, match=r"two is a trace of two, .* of one"):
        Source(paths, Settings())


@pytest.mark.parametrize(
    "wrong", [{"phase": "later"}, {"permutations": 0}, {"seed": -1}, {"max_hop": 0}], ids=lambda w: next(iter(w))
)
def test_settings_that_cannot_be_honoured_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
        Settings(**wrong)


def test_padding_is_no_choice() -> None:
    found = multi_hot(np.array([[2, 0], [1, -1]], np.int32), 3)
    assert found.tolist() == [[1, 0, 1], [0, 1, 0]]


@dataclass(frozen=True)
class Uneven(Independent):
    """Layers of 8, 4 and 8 experts; the second chooses one, the others two."""

    layers: int = 3
    experts: int = 8

    def choose(self, rng: np.random.Generator, domain: str, tokens: int) -> Ids:
        out = super().choose(rng, domain, tokens)
        out[:, 1, 0] %= 4
        out[:, 1, 1] = 255  # what fills the list of a layer that chooses fewer
        return out


def write_uneven(path: Path, prompts: int = 10) -> Path:
    rng = np.random.default_rng(0)
    model = replace(header(Uneven()).model, experts_per_layer=(8, 4, 8), top_k=(2, 1, 2))
    with TraceWriter(path) as writer:
        writer.begin(replace(header(Uneven()), model=model))
        for number in range(prompts):
            one = record(str(number), "d", Uneven().choose(rng, "d", 20), 0.5, rng)
            one.weights[:, 1, 1] = np.nan
            writer.add(one)
        writer.finish()
    return path


class Recorder:
    """A progress display that remembers."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.rows: list[int] = []

    def stage(self, name: str, total: int) -> None:
        self.stages.append((name, total))
        self.rows.append(0)

    def advance(self, rows: int) -> None:
        self.rows[-1] += rows


def test_layers_may_differ_in_experts_and_in_how_many_they_choose(tmp_path: Path) -> None:
    study = analyse([write_uneven(tmp_path / "t")], Settings(permutations=5))
    tables = {one.name: one.whole().to_pylist() for section in study.sections for one in section.tables}
    assert [row["tokens"] for row in tables["usage"] if row["layer"] == 1] == pytest.approx([50] * 4, abs=30)
    assert sum(row["tokens"] for row in tables["usage"]) == 200 * (2 + 1 + 2)
    assert max(row["b"] for row in tables["conditional"] if row["later"] == 1) == 3
    sums: dict[Any, float] = {}
    for row in tables["conditional"]:
        key = (row["layer"], row["later"], row["a"])
        sums[key] = sums.get(key, 0) + row["probability"]
    assert all(total == pytest.approx((2, 1, 2)[later]) for (_, later, _), total in sums.items())
    paths = [row["path"] for row in tables["top_paths"] if row["kind"] == "whole set"]
    assert all([len(step.split("+")) for step in path.split("-")] == [2, 1, 2] for path in paths)
    chances = {r["hop"]: r["chance"] for r in tables["accuracy_by_hop"] if r["metric"] == "recall_k"}
    assert chances == {0: 0.25, 1: 0.25, 2: 0.25}


def test_progress_reaches_the_end_of_every_stage(tmp_path: Path) -> None:
    shown = Recorder()
    analyse([write_trace(tmp_path / "t", Independent(), prompts=10)], Settings(permutations=5), shown)
    counted = [("counting decisions", 2000), ("scoring decisions", 400)]
    assert shown.stages[:2] == counted
    assert [name for name, _ in shown.stages[2:]] == ["replaying events", "comparing domains"]
    assert shown.rows == [total for _, total in shown.stages]
