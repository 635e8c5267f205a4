"""Settings: what is accepted means what it says, and everything else is refused with its value."""

from __future__ import annotations

import pytest

from foregate.config import Budget, RunConfig, SamplingConfig, parse_budget, parse_prefetch
from foregate.engine.memory import memory_limit, plan_slots, rss_peak
from foregate.errors import BudgetError, ConfigError
from foregate.registry import Registry


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1000", 1000), ("8GB", 8 * 10**9), ("8GiB", 8 * 2**30), ("512MB", 512 * 10**6), ("1.5k", 1536), ("2 MiB", 2**21)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_budget(text) == Budget(nbytes=nbytes)


def test_share_and_auto() -> None:
    assert parse_budget("25%") == Budget(share=0.25)
    assert parse_budget("AUTO").automatic


@pytest.mark.parametrize("text", ["", "nan", "-1", "0", "inf", "nan%", "-5%", "1e999", "GB", "5 XB", "1..2", "%"])
def test_impossible_budgets(text: str) -> None:
    with pytest.raises(BudgetError, match="memory budget"):
        parse_budget(text)


def test_prefetch_grammar() -> None:
    assert (parse_prefetch("auto"), parse_prefetch("off"), parse_prefetch("3")) == (None, 0, 3)
    with pytest.raises(ConfigError, match=r"'1\.5'"):
        parse_prefetch("1.5")


@pytest.mark.parametrize(
    "settings",
    [
        {"lookahead": -1},
        {"lookahead": 2, "prefetch": "off"},
        {"reader_threads": -1},
        {"reader_threads": 0},
        {"threads": 0},
        {"read_timeout_s": float("nan")},
    ],
    ids=str,
)
def test_run_config_refuses(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        RunConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("inf")}, {"top_p": 0.0, "temperature": 1.0},
     {"top_p": 0.5}, {"seed": -1}],
    ids=str,
)  # fmt: skip
def test_sampling_config_refuses(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        SamplingConfig(**settings)  # type: ignore[arg-type]


def test_slots_never_exceed_the_budget_or_the_experts() -> None:
    plan = plan_slots("100000", slot_bytes=4096, experts=64, dense_bytes=0)
    assert (plan.slots, plan.budget_bytes) == (24, 100_000)
    assert plan_slots("50%", slot_bytes=4096, experts=64, dense_bytes=0).slots == 32
    assert plan_slots("1TB", slot_bytes=4096, experts=64, dense_bytes=0).slots == 64
    assert plan_slots("auto", slot_bytes=4096, experts=64, dense_bytes=0).slots == 64


def test_a_budget_below_one_expert_states_the_minimum() -> None:
    with pytest.raises(BudgetError, match=r"4095 is 4,095 bytes; the minimum for this model is 4,096"):
        plan_slots("4095", slot_bytes=4096, experts=64, dense_bytes=0)


def test_auto_leaves_room_for_what_cannot_be_evicted() -> None:
    huge = memory_limit()
    plan = plan_slots("auto", slot_bytes=2**20, experts=huge // 2**20, dense_bytes=huge // 4)
    assert plan.slots * plan.slot_bytes < huge * 3 // 4
    with pytest.raises(BudgetError):
        plan_slots("auto", slot_bytes=2**20, experts=64, dense_bytes=2 * huge)


def test_peak_memory_is_read() -> None:
    assert rss_peak() > 10 * 2**20


def test_registry_lists_its_choices_and_guards_its_names() -> None:
    registry = Registry("colour", {"red": "decimal:Decimal"})
    assert registry.load("red")("1") == 1
    with pytest.raises(ConfigError, match=r"unknown colour 'blue'; choose from: red"):
        registry.load("blue")
    with pytest.raises(ConfigError, match="registered already"):
        registry.register("red", "fractions:Fraction")
