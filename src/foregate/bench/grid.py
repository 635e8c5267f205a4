"""All cells of a benchmark together: one table of arms, one of ratios, and the worst that prefetching did anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foregate.bench.arms import BEST, PREFETCH

Cell = Mapping[str, Any]


def place(cell: Cell) -> str:
    """A cell's name: its budget, and its throttle if it has one."""
    bps = cell["throttle_bps"]
    return f"{cell['budget']}, {bps / 1e6:.0f} MB/s" if bps else str(cell["budget"])


def lines(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Every cell and process: its memory limit, and what it used of it."""
    return [{"cell": place(cell), "process": name, **used} for cell in cells for name, used in cell["uses"].items()]


def merged(cells: Sequence[Cell]) -> dict[str, Any]:
    """``arms`` and ``ratios`` of all cells; names carry the cell where there is more than one."""
    found: dict[str, Any] = {"arms": {}, "ratios": {}, "outputs_identical": all(c["outputs_identical"] for c in cells)}
    for cell in cells:
        where = f" [{place(cell)}]" if len(cells) > 1 else ""
        found["arms"] |= {name + where: arm for name, arm in cell["arms"].items()}
        found["ratios"] |= {name + where: ratio for name, ratio in cell["ratios"].items()}
    lowest = worst(cells)
    if lowest:
        found["ratios"]["worst"] = lowest
    return found


def worst(cells: Sequence[Cell]) -> dict[str, Any] | None:
    """Least speed-up of a cache+prefetch arm over the best cache-only arm, over cells and domains; None without both.

    ``by_arm`` has the least of every such arm.
    """
    every = [
        {"arm": name.removesuffix(f" vs {BEST}"), "cell": place(cell), "domain": domain, **ratio}
        for cell in cells
        for domain, ratios in cell["domains"].items()
        for name, ratio in ratios.items()
        if name.startswith(PREFETCH) and name.endswith(f" vs {BEST}")
    ]
    if not every:
        return None
    by_arm: dict[str, float] = {}
    for one in every:
        by_arm[one["arm"]] = min(one["median"], by_arm.get(one["arm"], one["median"]))
    least_pair = min(one["min"] for one in every)
    return {**min(every, key=lambda one: float(one["median"])), "by_arm": by_arm, "least_pair": least_pair}


def never_below(cells: Sequence[Cell]) -> str | None:
    """The line that sums up the grid, from what ``worst`` finds."""
    lowest = worst(cells)
    if lowest is None:
        return None
    domains = len({domain for cell in cells for domain in cell["domains"]})
    return (
        f"{lowest['arm']}: never below {lowest['median']:.2f} of the best cache-only arm over {len(cells)} cells and "
        f"{domains} domains (lowest: {lowest['cell']}, {lowest['domain']}, {lowest['against']}, median of "
        f"{lowest['pairs']} pairs; lowest single pair anywhere {lowest['least_pair']:.2f})"
    )
