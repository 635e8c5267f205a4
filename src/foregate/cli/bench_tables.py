"""What ``foregate bench`` found, as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from foregate.bench.arms import BEST
from foregate.bench.grid import lines, place
from foregate.cli.output import size


def limits_table(limits: Mapping[str, Any]) -> Table:
    """The physical limits: disk by readers and size of a read, kernels by format."""
    shown = _table(f"physical limits, {limits['threads']} compute threads", ("limit", "value"))
    expert = size(limits["expert_bytes"])
    for point in limits["disk"]:
        name = f"disk: experts of {expert}, {size(point['chunk_bytes'])} a read, {point['depth']} at once"
        shown.add_row(name, f"{point['gb_per_s']:.2f} GB/s, {point['cpu_ms_per_gb']:.0f} ms of processor a GB")
    if not limits["direct_io"]:
        shown.add_row("O_DIRECT", "refused: these are reads through the page cache")
    for kind, speed in limits["matmul"].items():
        name = f"expert in {kind}" + (" (this model's)" if kind == limits["format"] else "")
        rate = f"{speed['gb_per_s']:.1f} GB/s, {speed['share']:.0%} of plain reading"
        shown.add_row(name, f"{speed['expert_us']:.0f} us, {rate} ({speed['instructions']})")
    shown.add_row("memory, plain reading", f"{limits['memory_read_gb_per_s']:.1f} GB/s")
    return shown


def arms_table(cell: Mapping[str, Any]) -> Table:
    """One cell of the grid: an arm a row."""
    same = "yes" if cell["outputs_identical"] else "NO"
    names = (
        "arm", "TPOT ms (range)", "p95", "TTFT s", "disk, prefill", "hit", "MB/ token", "C ms", "stall ms", "over- lap",
        "over- head", "x reads", "C when reading", "x bound",
    )  # fmt: skip
    shown = _table(f"{place(cell)}, {'warm' if cell['warm'] else 'cold'}; outputs identical: {same}", names)
    for name, arm in cell["arms"].items():
        tpot = arm["tpot_ms"]
        share = max(prompt["prefill_disk_share"] for prompt in arm["prompts"].values())
        shown.add_row(
            name,
            f"{tpot['median']:.0f} ({tpot['min']:.0f}-{tpot['max']:.0f})",
            f"{tpot['p95']:.0f}",
            f"{arm['ttft_s']:.2f}",
            f"{share:.0%}",
            _or_dash(arm, "hit", "{:.0%}"),
            f"{arm['read_mb_per_token']:.0f}",
            _or_dash(arm, "compute_ms", "{:.0f}"),
            _or_dash(arm, "exposed_io_ms", "{:.0f}"),
            _or_dash(arm, "overlap", "{:.0%}"),
            _or_dash(arm, "overhead_ms", "{:.1f}"),
            _or_dash(arm, "amplification", "{:.2f}"),
            _or_dash(arm.get("contention") or {}, "ratio", "x {:.2f}"),
            _or_dash(arm, "distance_to_bound", "{:.2f}"),
        )
    return shown


def ratios_table(cells: Sequence[Mapping[str, Any]], worst: Mapping[str, Any] | None) -> Table:
    """Speed-ups of all cells, and the least that prefetching was worth anywhere."""
    shown = _table("how many times faster (paired runs)", ("cell", "ratio", "median", "range", "pairs"))
    for cell in cells:
        for name, ratio in cell["ratios"].items():
            against = f" ({ratio['against']})" if "against" in ratio else ""
            shown.add_row(place(cell), name + against, *_spread(ratio))
    if worst:
        name = f"least over cells and domains: {worst['arm']} vs {BEST} ({worst['against']}, {worst['domain']})"
        shown.add_section()
        shown.add_row(worst["cell"], name, *_spread(worst))
    return shown


def rivals_table(rivals: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> Table:
    """Who ran, with which weights, and who did not and why."""
    shown = _table("rivals", ("rival", "cell", "what happened"))
    for name, said in rivals.items():
        shown.add_row(name, "all", _weights(said) if said["runs"] else f"not run: {said['reason']}")
    for cell in cells:
        for name, why in cell["rivals_failed"].items():
            shown.add_row(name, place(cell), f"not run: {why}")
    return shown


def memory_table(cells: Sequence[Mapping[str, Any]]) -> Table:
    """What every process was allowed, and what it used of it."""
    shown = _table("memory", ("cell", "process", "limit", "most allocated", "most page cache"))
    for line in lines(cells):
        used = (size(line[name]) if name in line else "-" for name in ("allocated_bytes", "page_cache_bytes"))
        shown.add_row(line["cell"], line["process"], size(line["limit_bytes"]), *used)
    return shown


def _weights(said: Mapping[str, Any]) -> str:
    return str(said["format"]) + ("" if said["same_bits"] else "; NOT the bits of our experts: no like for like")


def _table(title: str, columns: Sequence[str]) -> Table:
    shown = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        shown.add_column(name, justify="left" if number == 0 or len(columns) < 4 else "right", no_wrap=number == 0)
    return shown


def _spread(ratio: Mapping[str, Any]) -> tuple[str, str, str]:
    return f"{ratio['median']:.2f}", f"{ratio['min']:.2f}-{ratio['max']:.2f}", str(ratio["pairs"])


def _or_dash(arm: Mapping[str, Any], name: str, form: str) -> str:
    """A rival does not tell what our arms tell."""
    value = arm.get(name)
    return "-" if value is None else form.format(value)
