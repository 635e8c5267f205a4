"""Packs in an order of their own: same experts, same tokens, and what is chosen together lies together."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import foregate
from foregate.checkpoint.manifest import read_manifest, signed
from foregate.checkpoint.opening import open_checkpoint
from foregate.checkpoint.pack import pack
from foregate.checkpoint.packorder import by_coactivation, by_expert
from foregate.checkpoint.verify import verify
from foregate.cli.pack_order import traced_orders
from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.errors import PackError
from foregate.trace.reader import TraceReader

Tiny = Callable[[str], Path]
SAMPLE = Path(foregate.__file__).parent / "trace" / "reference-sample"


def shuffled(path: Path, seed: int = 4) -> tuple[tuple[int, ...], ...]:
    counts, rng = open_checkpoint(path).spec.experts_per_layer, random.Random(seed)
    return tuple(tuple(rng.sample(range(count), count)) for count in counts)


def tokens(path: Path) -> list[int]:
    with Engine(RunConfig(model=str(path), memory_budget="30%")) as engine:
        return [step.token_id for step in engine.stream(list(range(5, 25)), SamplingConfig(max_new_tokens=8))]


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
def test_another_order_is_the_same_model(tiny: Tiny, tmp_path: Path, family: str) -> None:
    source = tiny(family)
    orders = shuffled(source)
    pack(source, tmp_path / "plain")
    pack(source, tmp_path / "other", orders=orders)
    plain, other = read_manifest(tmp_path / "plain"), read_manifest(tmp_path / "other")
    assert other.orders == orders
    assert plain.orders == by_expert([len(layer.experts) for layer in plain.layers])
    assert [key.expert for key in other.order()] == [expert for order in orders for expert in order]
    for key in plain.order():
        assert plain.find(key).checksum == other.find(key).checksum
    assert verify(tmp_path / "other", source).experts == verify(tmp_path / "plain", source).experts
    assert tokens(tmp_path / "other") == tokens(tmp_path / "plain")


def test_a_pack_in_another_order_is_not_taken_for_the_one_that_is_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("qwen2_moe")
    pack(source, tmp_path / "packed")
    with pytest.raises(PackError, match="another order"):
        pack(source, tmp_path / "packed", orders=shuffled(source))
    assert pack(source, tmp_path / "packed").finished_before


@pytest.mark.parametrize("order", [[0] * 60, [1, 0], ["x"], "reversed"], ids=str)
def test_an_order_in_the_manifest_that_is_not_the_files_is_damage(tiny: Tiny, tmp_path: Path, order: object) -> None:
    pack(tiny("qwen2_moe"), tmp_path / "packed")
    path = tmp_path / "packed" / "foregate.json"
    content = json.loads(path.read_text())
    last = len(content["layers"][1]["experts"]) - 1
    content["layers"][1]["order"] = list(range(last, -1, -1)) if order == "reversed" else order
    content.pop("xxh3_128")
    path.write_text(signed(content))
    with pytest.raises(PackError, match="damaged"):
        open_checkpoint(tmp_path / "packed")


def test_orders_that_leave_an_expert_out_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("qwen2_moe")
    orders = shuffled(source)
    with pytest.raises(PackError, match="MoE layer 1 does not name"):
        pack(source, tmp_path / "packed", orders=(orders[0], (0, *orders[1][1:-1], 0), *orders[2:]))
    with pytest.raises(PackError, match="layers"):
        pack(source, tmp_path / "packed", orders=orders[:-1])


@pytest.mark.parametrize("size", [1, 2, 3, 8, 33])
def test_every_expert_has_one_place(size: int) -> None:
    for seed in range(5):
        counts = np.random.default_rng(seed).integers(0, 4, (size, size))
        assert sorted(by_coactivation(counts + counts.T)) == list(range(size))


def test_what_is_chosen_together_lies_together() -> None:
    """Pairs hidden by a permutation, with noise of a tenth: the greedy chain finds them all."""
    size, rng = 32, np.random.default_rng(1)
    hidden = rng.permutation(size)
    counts = rng.integers(0, 10, (size, size))
    counts += counts.T
    for a, b in zip(hidden[::2], hidden[1::2], strict=True):
        counts[a, b] = counts[b, a] = 200
    order = by_coactivation(counts)
    beside = {frozenset(pair) for pair in itertools.pairwise(order)}
    assert all(frozenset((int(a), int(b))) in beside for a, b in zip(hidden[::2], hidden[1::2], strict=True))


def test_the_order_of_a_trace_has_more_neighbours_chosen_together_than_ids() -> None:
    orders = traced_orders(SAMPLE)
    assert neighbours(orders) > 1.1 * neighbours(by_expert([len(order) for order in orders]))


def neighbours(orders: tuple[tuple[int, ...], ...]) -> int:
    """Pairs of neighbours that one token of the sample chose, over all tokens and layers."""
    places = [np.argsort(order) for order in orders]
    found = 0
    for part in TraceReader(SAMPLE):
        experts = part.grid(part.experts)
        for layer, place in enumerate(places):
            found += int((np.diff(np.sort(place[experts[:, layer]], axis=1), axis=1) == 1).sum())
    return found
