"""Known answers: deterministic chains, independent routing, hand-computed probabilities, locality, timings."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foregate.analysis.accuracy import METHODS, Accuracy, chance
from foregate.analysis.crosslayer import CrossLayer
from foregate.analysis.evidence import ranks
from foregate.analysis.information import associate, entropy, normalised_entropy
from foregate.analysis.locality import Locality
from foregate.analysis.pairs import PairCounts, check_bytes, count_bytes
from foregate.analysis.paths import Paths
from foregate.analysis.prefixes import prefix_rows
from foregate.analysis.prompt import Prompt, Shape
from foregate.analysis.ratio import RatioSums, t_quantile
from foregate.analysis.settings import Settings
from foregate.analysis.source import Source
from foregate.analysis.study import Study, analyse
from foregate.errors import ConfigError
from test_analysis_traces import Chain, Independent, record, write_trace


def by_name(study: Study, name: str) -> Any:
    return next(section for section in study.sections if section.name == name)


def rows(study: Study, section: str, table: str) -> list[dict[str, Any]]:
    found = next(one for one in by_name(study, section).tables if one.name == table)
    return list(found.whole().to_pylist())


def prompt(experts: Any, decode: Any = None) -> Prompt:
    ids = np.asarray(experts, np.int32)
    flags = np.zeros(len(ids), bool) if decode is None else np.asarray(decode)
    return Prompt(0, "d", False, True, True, ids, flags, np.zeros(len(ids), np.int32))


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_deterministic_chain_is_predicted_without_error_at_every_hop(tmp_path: Path, top_k: int) -> None:
    study = analyse([write_trace(tmp_path / "t", Chain(layers=5, top_k=top_k), prompts=12)], Settings(permutations=10))
    found = rows(study, "accuracy", "accuracy_by_hop")
    sure = [row for row in found if row["method"] in ("layer", "prefix")]
    assert {row["hop"] for row in sure} == {1, 2, 3, 4}
    assert {row["phase"] for row in sure} == {"prefill", "decode"}
    assert all(row["value"] == 1 for row in sure if "recall_2k" not in row["metric"] or top_k == 1)
    assert all(row["value"] < 0.6 for row in found if row["method"] == "popularity" and row["metric"] == "recall_k")
    pairs = rows(study, "cross_layer", "layer_pairs")
    if top_k == 1:
        assert all(row["affinity"] > 0.97 and row["cramers_v"] > 0.97 for row in pairs)
    assert all(row["best_phi"] == pytest.approx(1) for row in pairs)
    certain = [row for row in rows(study, "cross_layer", "conditional") if row["probability"] > 0.999]
    assert len(certain) == 10 * 16  # every expert of every earlier layer names its successor


def test_independent_routing_reads_chance_within_its_interval(tmp_path: Path) -> None:
    inside = []
    for seed in range(6):
        path = write_trace(tmp_path / str(seed), Independent(layers=5), prompts=30, tokens=40, seed=seed)
        scores = scored(path)
        every = scores.hops.summed(0)
        for method in range(2):
            for hop in range(1, 5):
                found = every.at((method, 1, hop, 1))
                assert abs(found.value - 2 / 16) < 0.05
                inside.append(found.low <= 2 / 16 <= found.high)
    assert np.mean(inside) > 0.85  # 95 % intervals; 48 of them, not independent of each other


def scored(path: Path) -> Accuracy:
    source = Source([path], Settings())
    cross = CrossLayer(source.shape, source.settings)
    for one in source.prompts():
        cross.add(one)
    cross.flush()
    scores = Accuracy(cross.train, source.domains, sum(item.test for item in source.items), source.settings)
    for one in source.prompts(test_only=True):
        scores.add(one)
    scores.flush()
    return scores


def test_independent_routing_has_no_association_and_full_entropy(tmp_path: Path) -> None:
    study = analyse(
        [write_trace(tmp_path / "t", Independent(), prompts=40, tokens=100)],
        Settings(permutations=10, replay_events=500),
    )
    pairs = rows(study, "cross_layer", "layer_pairs")
    assert np.mean([row["mi_plain"] for row in pairs]) > 0.005  # the bias of counting that is taken off
    assert np.mean([row["affinity"] for row in pairs]) < 0.001
    assert by_name(study, "usage").summary["entropy_by_layer"] > 0.995
    overlap = by_name(study, "locality").summary["overlap_previous_token"]["decode"]
    assert overlap["overlap"] == pytest.approx(overlap["expected"], abs=0.02) == pytest.approx(2 / 16, abs=0.02)


def test_recall_on_misses_is_what_remains_when_the_residents_are_left_out(tmp_path: Path) -> None:
    study = analyse([write_trace(tmp_path / "t", Chain(layers=4), prompts=12)], Settings(permutations=10))
    found = rows(study, "accuracy", "accuracy_by_hop")
    missed = [row for row in found if "LRU misses" in row["metric"] and row["hop"] > 0]
    assert {row["metric"].split(" at ")[1] for row in missed} == {"25% residency", "50% residency"}
    assert {row["phase"] for row in missed} == {"decode"}
    assert all(row["value"] == 1 for row in missed if row["method"] == "prefix")
    assert all(row["value"] < 0.05 for row in missed if row["method"] == "previous-token")  # history is resident


def test_counts_equal_counting_by_hand() -> None:
    shape = Shape((4, 4, 4), (2, 2, 1))
    experts = np.array([[[0, 1], [2, 3], [1, -1]], [[0, 2], [2, 1], [3, -1]]], np.int32)
    counts = PairCounts(shape)
    counts.add(experts)
    counts.flush()
    expected = np.zeros((3, 3, 4, 4), int)
    for token in experts:
        for first in range(3):
            for second in range(first, 3):
                for a in token[first][token[first] >= 0]:
                    for b in token[second][token[second] >= 0]:
                        expected[first, second, a, b] += 1
    assert all((counts.pair(i, j) == expected[i, j]).all() for i in range(3) for j in range(i, 3))
    assert counts.chosen(0).tolist() == [2, 1, 1, 0]


def test_ranks_equal_a_stable_sort() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (50, 9)).astype(float)  # many ties
    chosen = np.argsort(rng.random((50, 9)), axis=1)[:, :3].astype(np.int32)
    order = np.argsort(-scores, axis=1, kind="stable")
    expected = [[list(order[t]).index(e) for e in chosen[t]] for t in range(50)]
    assert ranks(scores, chosen).tolist() == expected


def test_a_model_whose_counts_would_not_fit_is_told_which_hop_fits() -> None:
    shape = Shape((512,) * 48, (10,) * 48)
    assert count_bytes(shape, None) == 4 * 48 * 49 // 2 * 512**2
    with pytest.raises(ConfigError, match=r"--max-hop 30 fits"):
        check_bytes(shape, None, 2 << 30)
    assert check_bytes(shape, 30, 2 << 30) <= 2 << 30


def test_max_hop_bounds_what_is_counted_and_says_so(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t", Chain(layers=5), prompts=8)
    study = analyse([path], Settings(permutations=10, max_hop=2))
    assert max(row["hop"] for row in rows(study, "accuracy", "accuracy_by_hop")) == 2
    assert max(row["hop"] for row in rows(study, "cross_layer", "conditional")) == 2
    assert "Hops above 2 were not counted" in by_name(study, "cross_layer").notes[0]


def test_entropies_of_known_distributions() -> None:
    assert entropy(np.array([1, 1, 1, 1])) == 2
    assert entropy(np.array([5, 0])) == 0
    assert normalised_entropy(np.array([3, 3, 0, 0]), 4) == 0.5
    assert np.isnan(normalised_entropy(np.array([3]), 1))
    same = np.diag([10, 10, 10, 10])
    found = associate(same, np.full(4, 10), np.full(4, 10), 10**9, (1, 1))
    assert found.plain == pytest.approx(2)
    assert found.normalised == pytest.approx(1)


def test_overlap_reuse_and_working_set_by_hand() -> None:
    locality = Locality(Shape((4,), (1,)), Settings())
    locality.add(prompt([[[0]], [[0]], [[1]], [[0]]]))
    section = locality.finish()
    tables = {table.name: table.whole().to_pylist() for table in section.tables}
    lags = {row["lag"]: row["overlap"] for row in tables["overlap"]}
    assert lags == {1: pytest.approx(1 / 3), 2: pytest.approx(1 / 2), 3: 1}
    reuse = {row["distance"]: row["uses"] for row in tables["reuse_distance"] if row["uses"]}
    assert reuse == {1: 1, 2: 1, None: 2}
    sets = {row["window"]: row["distinct"] for row in tables["working_set"]}
    assert sets == {1: 1, 2: 1.5, 4: 2}


def test_paths_are_counted_over_full_depth() -> None:
    paths = Paths(Shape((4, 4), (2, 2)), Settings())
    paths.add(prompt([[[0, 1], [2, 3]], [[0, 2], [2, 1]], [[1, 0], [3, 2]], [[0, 1], [2, 3]]]))
    facts = paths.finish().summary
    assert (facts["first expert"]["distinct"], facts["whole set"]["distinct"]) == (2, 2)
    assert facts["first expert"]["top_share"] == 0.75
    assert facts["whole set"]["top_share"] == 0.75  # {0,1} then {2,3}, in any order
    assert facts["whole set"]["once"] == 0.5


def test_timings_are_shares_of_layer_time_and_the_claim_is_checked(tmp_path: Path) -> None:
    known = {"attention_ns": 200, "routing_ns": 300, "dispatch_ns": 200, "experts_ns": 300, "expert_wait_ns": 100}
    path = write_trace(tmp_path / "t", Independent(), prompts=4, timings=known)
    section = by_name(analyse([path], Settings(permutations=10)), "timing")
    for phase in ("prefill", "decode"):
        assert section.summary[phase]["routing_and_dispatch"] == pytest.approx(0.5)
        assert section.summary[phase]["without_wait"] == pytest.approx(0.5 / 0.9)
        assert section.summary[phase]["in_published_range"]
    assert section.summary["prefill"]["seconds"]["wait"] == pytest.approx(4 * 4 * 100e-9)


def test_parts_of_a_layer_that_were_not_measured_are_not_invented(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t", Independent(), prompts=4, timings={"routing_ns": 300, "experts_ns": 300})
    section = by_name(analyse([path], Settings(permutations=10)), "timing")
    assert section.summary["decode"]["measured"] == ["routing", "compute"]
    assert "routing or dispatch was not measured" in section.findings[0]


def test_a_ratio_and_its_interval_equal_the_formula() -> None:
    above, below = np.array([3.0, 1, 4]), np.array([5.0, 5, 5])
    sums = RatioSums((1,))
    for one in zip(above, below, strict=True):
        sums.add(np.array([one[0]]), np.array([one[1]]))
    found = sums.at(0)
    shares = above / below
    half = 4.303 * shares.std(ddof=1) / np.sqrt(3)  # equal sizes: the standard error of the mean
    assert found.value == pytest.approx(shares.mean())
    assert found.high - found.value == pytest.approx(min(1 - found.value, half))
    assert [round(t_quantile(n), 2) for n in (1, 4, 10, 30)] == [12.71, 2.78, 2.23, 2.04]


def test_chance_is_that_of_random_guesses() -> None:
    guess = partial(chance, top_k=2, experts=8)
    assert (guess("top1"), guess("recall_k"), guess("recall_2k"), guess("exact_set")) == (0.25, 0.25, 0.5, 1 / 28)
    assert METHODS[:2] == ("layer", "prefix")


def test_one_token_prompts_are_counted_but_have_no_past(tmp_path: Path) -> None:
    study = analyse([write_trace(tmp_path / "t", Chain(), prompts=30, tokens=1)], Settings(permutations=10))
    assert "No prompt has two tokens" in by_name(study, "locality").notes[0]


def test_record_helper_is_a_valid_prompt() -> None:
    rng = np.random.default_rng(0)
    assert record("p", "d", Independent().choose(rng, "d", 3), 0.5, rng).tokens == 3


def test_a_prefix_of_a_deterministic_chain_leaves_no_doubt_and_one_of_independent_layers_all_of_it(
    tmp_path: Path,
) -> None:
    options = Settings(permutations=5, replay_events=500)
    chain = analyse([write_trace(tmp_path / "c", Chain(layers=4, top_k=1), prompts=10)], options)
    found = rows(chain, "paths", "prefix_conditional")
    assert {(row["layer"], row["hop"]) for row in found} == {(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1)}
    assert all((row["probability"], row["followers"]) == (1, 1) for row in found)
    free = analyse([write_trace(tmp_path / "i", Independent(experts=4, top_k=1), prompts=40, tokens=100)], options)
    shares = [row["probability"] for row in rows(free, "paths", "prefix_conditional") if row["layer"] == 0]
    assert np.mean(shares) == pytest.approx(1 / 4, abs=0.001)
    assert max(shares) < 0.32


def test_what_follows_a_prefix_equals_counting_by_hand() -> None:
    paths, counts = np.array([[0, 1, 2], [0, 1, 3], [0, 2, 2], [1, 1, 1]]), np.array([6, 2, 2, 4])
    found = {(r["prefix"], r["later"], r["expert"]): r["probability"] for r in prefix_rows(paths, counts)}
    assert found == {
        ("0", 1, 1): 0.8, ("0", 1, 2): 0.2, ("0", 2, 2): 0.8, ("0", 2, 3): 0.2,
        ("0-1", 2, 2): 0.75, ("0-1", 2, 3): 0.25,
    }  # fmt: skip
