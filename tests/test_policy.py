"""Known answers of the eviction policies, and equality with the definitions written down naively."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from foregate.errors import ConfigError, IntegrityError
from foregate.experts.echo import Echo
from foregate.experts.policy import POLICIES, Lfru, Lfu, Lru
from foregate.interfaces import EvictionPolicy
from foregate.types import ExpertKey

A, B, C, D = (ExpertKey(0, expert) for expert in range(4))


def touched(policy: EvictionPolicy, accesses: list[ExpertKey]) -> EvictionPolicy:
    for key in accesses:
        policy.touch(key)
    return policy


def test_the_registry_lists_the_policies_and_refuses_others() -> None:
    assert POLICIES.names == ("lru", "lfu", "lfru", "echo")
    assert [POLICIES.load(name) for name in POLICIES.names] == [Lru, Lfu, Lfru, Echo]
    with pytest.raises(ConfigError, match=r"unknown cache policy 'fifo'; choose from: lru, lfu, lfru, echo"):
        POLICIES.load("fifo")


@pytest.mark.parametrize(
    ("policy", "accesses", "victim"),
    [
        (Lru, [A, B, C], A),
        (Lru, [A, B, C, A], B),
        (Lru, [A, A, A, B, C], A),
        (Lfu, [A, B, C], A),
        (Lfu, [A, A, A, B, C], B),
        (Lfu, [A, B, B, C, A, C, C], B),  # A and B twice each: B was touched longer ago
        (Lfru, [A, B, C], A),
        (Lfru, [A, A, A, B, C], B),  # A: 3/(2+1) = 1, B: 1/2, C: 1
        (Lfru, [A, A, B, C, B, C, B, C], A),  # A: 2/7, B: 3/2, C: 3: old frequency fades
        (Lfru, [A] * 9 + [B, C, D], B),  # A: 9/4, B: 1/3, C: 1/2: but not at once
        (Lfru, [A, A, B], A),  # A: 2/2, B: 1/1: a tie goes to the older
    ],
)
def test_known_answers(policy: Callable[[], EvictionPolicy], accesses: list[ExpertKey], victim: ExpertKey) -> None:
    assert touched(policy(), accesses).victim(sorted(set(accesses))) == victim


@pytest.mark.parametrize("policy", [Lru, Lfu, Lfru, Echo])
def test_only_candidates_are_evicted(policy: Callable[[], EvictionPolicy]) -> None:
    assert touched(policy(), [A, B, C, C]).victim([C]) == C


@pytest.mark.parametrize("policy", [Lfu, Lfru])
def test_eviction_resets_the_frequency(policy: Callable[[], EvictionPolicy]) -> None:
    keys = touched(policy(), [A, A, A])
    keys.forget(A)
    assert touched(keys, [A, B, B]).victim([A, B]) == A


@pytest.mark.parametrize("policy", [Lru, Lfu, Lfru, Echo])
def test_forgetting_the_unknown_is_harmless_and_unknown_candidates_are_refused(
    policy: Callable[[], EvictionPolicy],
) -> None:
    keys = touched(policy(), [A])
    keys.forget(B)
    keys.forget(A)
    with pytest.raises(IntegrityError, match="none of 1 candidates"):
        keys.victim([A])


def naive_score(name: str, count: int, last: int, now: int) -> float:
    return {"lru": 0.0, "lfu": float(count), "lfru": count / (now - last + 1)}[name]


@pytest.mark.parametrize("name", ["lru", "lfu", "lfru"])
@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_the_definition_on_random_traffic(name: str, seed: int) -> None:
    rng = random.Random(seed)
    policy: EvictionPolicy = POLICIES.load(name)()
    seen: dict[ExpertKey, tuple[int, int]] = {}
    for now in range(1, 400):
        key = ExpertKey(rng.randrange(2), min(rng.randrange(12), rng.randrange(12)))
        policy.touch(key)
        seen[key] = (seen.get(key, (0, 0))[0] + 1, now)
        candidates = {k for k in seen if rng.random() < 0.7}
        if candidates and rng.random() < 0.3:
            expected = min(candidates, key=lambda k: (naive_score(name, *seen[k], now), seen[k][1]))
            assert policy.victim(candidates) == expected
            policy.forget(expected)
            del seen[expected]


class Counted(dict[ExpertKey, None]):
    """Candidates that count how often they are looked at."""

    looked = 0

    def __contains__(self, key: object) -> bool:
        self.looked += 1
        return super().__contains__(key)

    def __iter__(self) -> Iterator[ExpertKey]:
        self.looked += len(self)
        return super().__iter__()


@pytest.mark.parametrize(("name", "most"), [("lru", 1), ("lfu", 1), ("lfru", 400), ("echo", 1)])
def test_a_victim_among_thousands_is_found_without_a_scan(name: str, most: int) -> None:
    rng = random.Random(1)
    policy: EvictionPolicy = POLICIES.load(name)()
    keys = [ExpertKey(layer, expert) for layer in range(48) for expert in range(128)]
    touched(policy, keys + [keys[int(rng.paretovariate(0.5)) % len(keys)] for _ in range(20_000)])
    candidates = Counted.fromkeys(keys)
    for _ in range(50):
        policy.touch(policy.victim(candidates))
    assert candidates.looked <= most * 50
