"""What one read ahead is worth, in numbers that can be followed by hand. Seconds."""

from __future__ import annotations

import pytest

from foregate.prefetch.odds import Costs, Odds

# A read takes 8, a miss is waited for for 7, 1 of a processor, and what readers hold takes 2.
RESTING = Costs(read_s=8, miss_s=7, cpu_s=1, in_hand_s=2, crowding=0)
BUSY = RESTING._replace(crowding=1)


@pytest.mark.parametrize(
    ("window_s", "queued", "worth"),
    [
        (20, 0, 0.5 * 7 - 1),  # over before its layer comes: all of a miss, and its bytes
        (20, 2, 0.5 * 4 - 0.5 * 2 - 1),  # 16 go by until it begins: 4 left, and readers are at it when it is over
        (9, 1, 0.5 * 1 - 0.5 * 2 - 1),
        (16, 2, 0),  # not begun by then
        (None, 5, 0.5 * 7 - 0.5 * 1 - 1),
    ],
)
def test_a_read_saves_what_its_window_has_room_for_and_costs_what_it_is_in_the_way_of(
    window_s: float | None, queued: int, worth: float
) -> None:
    assert RESTING.worth(Odds(0.5, window_s), queued) == pytest.approx(worth)


def test_on_a_link_that_never_rests_a_read_in_vain_costs_all_of_its_time() -> None:
    for window_s in (9, 20, None):
        assert BUSY.worth(Odds(0.0, window_s), 0) == pytest.approx(-(1 + 8))
        assert BUSY.worth(Odds(1.0, window_s), 0) == RESTING.worth(Odds(1.0, window_s), 0) > 0
    assert BUSY.worth(Odds(0.0, 8), 1) == 0
