"""What one read ahead is worth: how likely it is to be used, and in how long, against what the link takes. No I/O."""

from __future__ import annotations

from typing import NamedTuple


class Odds(NamedTuple):
    """Of one read: the probability that it is used, and the seconds until its layer is routed (None: nobody knows)."""

    precision: float
    window_s: float | None


class Costs(NamedTuple):
    """Seconds that the link takes for an expert, that a miss is waited for, that an expert's bytes take of a processor,
    and that all readers together need for what they have in their hands; and the share of a read's time by which one
    in vain delays others."""

    read_s: float
    miss_s: float
    cpu_s: float
    in_hand_s: float
    crowding: float

    def worth(self, odds: Odds, queued: int) -> float:
        """Seconds that the read, behind ``queued`` reads in flight, saves more than it costs. Expected."""
        precision, window_s = odds
        read_s, miss_s, cpu_s, in_hand_s, crowding = self
        if window_s is None:
            saving_s, over_s = miss_s, 0.5 * in_hand_s
        else:
            left_s = window_s - queued * read_s
            if left_s <= 0.0:  # not begun by then: nothing saved, nothing lost
                return 0.0
            saving_s, over_s = min(miss_s, left_s), min(in_hand_s, max(0.0, read_s - left_s))
        delay_s = over_s + crowding * (read_s - over_s)
        return precision * saving_s - cpu_s - (1.0 - precision) * delay_s
