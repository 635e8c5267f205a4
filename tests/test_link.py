"""What the link gives, against what layers take and steps need. No model, no timing."""

from __future__ import annotations

import pytest

from foregate.prefetch.link import Link

LAYERS = 4
EXPERT = 2**20


def link(*, read_s: float = 0.008, prompt_s: float | None = None) -> Link:
    """A layer takes 8 ms, an expert ``read_s`` by itself, and ``prompt_s`` in a prompt that it was the bound of."""
    found = Link(EXPERT, LAYERS)
    found.saw_io(EXPERT, read_s)
    found.saw_layer(0.008)
    if prompt_s is not None:
        found.saw_prompt(100 * EXPERT, 100 * prompt_s, 50 * prompt_s, 100 * prompt_s)
    return found


def needed_for(share: float, of: Link, expert_s: float = 0.008) -> None:
    """A step needs 16 experts, at ``expert_s`` for this share of its time."""
    of.saw_step(16, 16 * expert_s / share - LAYERS * 0.008)


@pytest.mark.parametrize(("read_s", "strain"), [(0.004, ""), (0.027, ""), (0.029, "slow")])
def test_a_link_is_slow_by_the_layers_time_that_an_expert_takes(read_s: float, strain: str) -> None:
    assert link(read_s=read_s).strain == strain


@pytest.mark.parametrize(
    ("flag", "read_s", "layers_s"),
    [("slow", 0.029, (0.009, 0.0105, 0.0085)), ("tight", 0.017, (0.009, 0.0099, 0.0087))],
)
def test_a_slow_or_tight_link_is_so_until_it_clearly_is_not(
    flag: str, read_s: float, layers_s: tuple[float, float, float]
) -> None:
    found = link(read_s=read_s)
    for layer_s, expected in zip(layers_s, (True, False, False), strict=True):
        for _ in range(200):
            found.saw_layer(layer_s)
        assert getattr(found, flag) is expected


def test_before_anything_is_known_it_is_neither_slow_nor_busy() -> None:
    found = Link(EXPERT, LAYERS)
    found.saw_step(16, 0.1)
    assert (found.expert_s, found.need, found.strain) == (0.0, 0.0, "")


def test_what_a_step_needs_counts_by_its_time() -> None:
    """8 ms of 40, and 160 of 200."""
    found = link()
    found.saw_step(1, 0.008)
    found.saw_step(20, 0.168)
    assert found.need == pytest.approx(168 / 240)


def test_a_link_that_steps_need_most_of_the_time_is_busy_until_they_clearly_do_not() -> None:
    found = link()
    needed_for(0.85, found)
    assert (found.strain, found.busy) == ("", False)
    needed_for(0.95, found)
    assert (found.strain, found.busy) == ("busy", True)
    for _ in range(20):
        needed_for(0.84, found)
    assert found.busy
    for _ in range(100):
        needed_for(0.75, found)
    assert not found.busy


def test_a_link_that_needs_two_layers_time_for_an_expert_is_busy_sooner() -> None:
    for expert_s, tight in ((0.0158, False), (0.0162, True)):
        found = link(read_s=expert_s)
        needed_for(0.79, found, expert_s)
        assert (found.tight, found.busy) == (tight, False)
        needed_for(0.85, found, expert_s)
        assert found.busy is tight
        for _ in range(100):
            needed_for(0.76, found, expert_s)
        assert found.busy is tight
        for _ in range(100):
            needed_for(0.70, found, expert_s)
        assert not found.busy


def test_a_prompt_tells_the_long_run_and_what_cannot_be_is_dropped_at_whichever_step_that_shows() -> None:
    """At two thirds of what the prompt said, steps need the link for 0.87 or 0.84 of their time."""
    for shares, busy in (([1.3], True), ([1.2, 1.32], False)):
        found = link(prompt_s=0.012)
        assert found.expert_s == 0.012
        for share in shares[:-1]:
            needed_for(share, found, 0.012)
            assert found.expert_s == 0.012
        needed_for(shares[-1], found, 0.012)
        assert found.expert_s == 0.008
        assert found.busy is busy


def test_what_steps_needed_of_the_link_is_told_by_what_it_is_known_to_give() -> None:
    found = link()
    needed_for(0.7, found)
    assert not found.busy
    found.saw_prompt(100 * EXPERT, 1.0, 0.5, 1.0)  # a throttle: 10 ms an expert
    assert found.busy
    found.saw_prompt(100 * EXPERT, 0.8, 0.5, 0.8)
    assert not found.busy


def test_steps_on_a_tight_link_are_told_at_what_layers_take_now() -> None:
    """As the first layers of a text take longer. What they took then still tells what the link cannot be."""
    found = link(prompt_s=0.012)
    found.saw_step(8, 0.082)
    for layer_s, busy in ((0.0065, False), (0.0045, True)):
        assert (found.need, found.busy) == (pytest.approx(96 / 114), False)
        for _ in range(200):
            found.saw_layer(layer_s)
        assert (found.tight, found.busy) == (busy, busy)
    assert found.need == pytest.approx(96 / 100, rel=1e-3)
    for _ in range(200):
        found.saw_layer(0.00001)
    found.saw_step(8, 0.068)
    assert found.need > 1.25
    assert found.expert_s == 0.012
