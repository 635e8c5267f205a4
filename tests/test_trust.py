"""Whether advice is taken: judged by what was needed then, in the policy that takes it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from foregate.experts import trust as module
from foregate.experts.echo import JUDGED, SCORE_WEIGHTS, Echo
from foregate.experts.trust import ENOUGH, Trust

E = 8


def told(trust: Trust, gains: list[float]) -> None:
    """Trials of one token and two experts, of which none is needed; advice lowers the odds of one so that the loss is
    smaller by each of ``gains``."""
    for gain in gains:
        odds = [math.log(math.expm1(loss)) for loss in (2.0, 2.0 - gain)]
        trust.begin(0, *[np.array([one, -3], np.float32) for one in odds])
        trust.saw(0, np.array([[-1, 9]]))


def test_the_gain_is_how_much_smaller_the_loss_is() -> None:
    trust = Trust(4.0, 1)
    told(trust, [0.5, -0.1, 0.2])
    assert trust._mean == pytest.approx(0.2, abs=1e-5)
    assert trust.error == pytest.approx(np.std([0.5, -0.1, 0.2]) / math.sqrt(2), abs=1e-4)


def test_what_is_needed_counts_by_how_soon() -> None:
    trust, own, advised = Trust(4.0, 3), np.zeros(3, np.float32), np.array([2, -1, 1], np.float32)
    trust.begin(1, own, advised)
    for chosen in ([1], [0], [1]):
        trust.saw(0, np.array([[2]]))  # another layer
        trust.saw(1, np.array([chosen]))
    needed = [math.exp(-1 / 4), 1, 0]
    losses = [
        sum(math.log1p(math.exp(odds)) - y * odds for odds, y in zip(kind.tolist(), needed, strict=True))
        for kind in (own, advised)
    ]
    assert (trust.judged, trust._mean) == (1, pytest.approx(losses[0] - losses[1], abs=1e-5))


def test_advice_is_dropped_once_it_is_surely_worse_and_taken_again_once_it_is_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "RECENT", 1 / 64)
    trust = Trust(4.0, 1)
    told(trust, [-0.5, -0.6] * (ENOUGH // 2 - 1))
    assert trust.given, "too early"
    told(trust, [-0.5, -0.6])
    assert not trust.given
    told(trust, [0.4] * 10)
    assert not trust.given, "not better on the whole"
    told(trust, [0.4] * 64)
    assert trust.given


def test_one_absurd_value_does_not_outweigh_what_follows() -> None:
    trust, own = Trust(4.0, 1), np.zeros(2, np.float32)
    for advised in [np.array([-3e38, 0], np.float32)] + 200 * [np.array([-1.0, 0], np.float32)]:
        trust.begin(0, own, advised)
        trust.saw(0, np.array([[0]]))
    assert not trust.given


def test_what_may_be_chance_drops_nothing() -> None:
    trust = Trust(4.0, 1)
    told(trust, [-0.6, 0.5] * 40)
    assert trust._mean < 0
    assert trust.given


def test_a_prompt_ends_a_trial_without_a_judgement() -> None:
    trust, odds = Trust(4.0, 2), np.zeros(4, np.float32)
    trust.begin(0, odds, odds + 1)
    trust.saw(0, np.array([[1]]))
    trust.saw(0, np.array([[1], [2]]))
    trust.saw(0, np.array([[1]]))
    assert trust.judged == 0


@pytest.mark.parametrize("layers", [1, 3, 20])
@pytest.mark.parametrize("right", [True, False])
def test_the_policy_judges_one_layer_after_the_other_and_leaves_bad_advice_alone(layers: int, right: bool) -> None:
    """Experts take turns in every layer; advice knows which comes, or names others."""
    policy, begun, asked = Echo(), [], 0
    begin = policy._trust.begin

    def noting(layer: int, own: module.Floats, advised: module.Floats) -> None:
        begun.append(layer)
        begin(layer, own, advised)

    policy._trust.begin = noting  # type: ignore[method-assign]
    scores = np.random.default_rng(0).standard_normal((1, E)).astype(np.float32)
    for token in range(300):
        for layer in range(layers):
            policy.observe(layer, np.array([[(token + layer) % E]]), scores)
            before = policy.worth(layer)
            if not policy.wants_advice(layer):
                continue
            asked += 1
            distance = (np.arange(E) - token - layer - (1 if right else 5)) % E
            policy.advise(layer, (2 - distance).astype(np.float32), 0 * SCORE_WEIGHTS)
    assert policy.takes_advice() is right
    assert (asked == 300 * layers) is right, "what is not followed is asked for where it is judged only"
    assert bool((policy.worth(layers - 1) == before).all()) is not right
    assert policy._trust.judged >= 300 // (JUDGED + layers) - 1
    assert begun[: 2 * layers] == [n % layers for n in range(min(len(begun), 2 * layers))]
