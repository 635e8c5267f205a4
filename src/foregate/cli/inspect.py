"""``foregate inspect``: what a model is and what it needs, from its config and headers alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foregate.cli.output import print_json, result, size, two_columns

if TYPE_CHECKING:
    from rich.table import Table

    from foregate.checkpoint.opening import Checkpoint
    from foregate.checkpoint.spec import MoeSpec

SHARES = (25, 50, 75, 100)
"""Budgets shown, in percent of all expert slots (what ``--memory-budget 25%`` means)."""


def inspect(
    model: Annotated[str, typer.Argument(help="Directory, hub id, pack, or 'reference' (built in).")] = "reference",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Family, layers, experts, sizes and budgets of a model. Reads headers only."""
    from foregate.checkpoint.locate import locate
    from foregate.checkpoint.opening import open_checkpoint

    checkpoint = open_checkpoint(locate(model))
    if as_json:
        print_json(facts(checkpoint))
    else:
        show(checkpoint)


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything, as JSON takes it. Sizes are bytes."""
    spec = checkpoint.spec
    return {
        "directory": str(checkpoint.directory),
        "packed": checkpoint.packed,
        "precision": checkpoint.precision.name,
        "fingerprint": checkpoint.fingerprint,
        **asdict(spec),
        "experts": spec.experts,
        "total_bytes": spec.total_bytes,
        "bytes_per_token": spec.bytes_per_token,
        "expert_bytes_per_token": spec.bytes_per_token - spec.dense_bytes,
        "min_budget_bytes": spec.expert_slot_bytes,
        "layer_budget_bytes": spec.layer_budget,
        "budgets": budgets(spec),
    }


def budgets(spec: MoeSpec) -> list[dict[str, Any]]:
    """What each of ``SHARES`` holds, on average over the MoE layers."""
    everything = spec.expert_slot_bytes * spec.experts
    found = []
    for share in SHARES:
        slots = spec.experts * share // 100
        per_layer = round(slots / spec.layers, 1)
        found.append({"percent": share, "bytes": everything * share // 100, "slots": slots, "per_layer": per_layer})
    return found


def show(checkpoint: Checkpoint) -> None:
    """The same as tables."""
    spec = checkpoint.spec
    shared = "not stated" if spec.shared_experts is None else str(spec.shared_experts)
    rows = [
        ("directory", f"{checkpoint.directory}{' (packed)' if checkpoint.packed else ''}"),
        ("family", f"{spec.model_type} ({spec.architecture}), {spec.dtype}"),
        ("expert weights", spec.dtype if checkpoint.precision.plain else checkpoint.precision.name),
        ("layers", f"{spec.decoder_layers}, of which {spec.layers} with experts"),
        ("experts per layer", f"{_range(spec.experts_per_layer)}, {spec.top_k} chosen per token, shared: {shared}"),
        ("hidden size, vocabulary", f"{spec.hidden_size}, {spec.vocab_size}"),
        ("context", "not stated" if spec.context_length is None else f"{spec.context_length} tokens"),
        ("one expert", f"{size(spec.expert_bytes)} ({size(spec.expert_slot_bytes)} in a slot)"),
        ("experts", f"{size(spec.total_expert_bytes)} in {spec.experts} experts"),
        ("dense weights", size(spec.dense_bytes)),
        ("touched per token", f"{size(spec.bytes_per_token)}, {size(_routed(spec))} of it experts"),
        ("minimum budget", f"{size(spec.expert_slot_bytes)} (one expert)"),
        ("one layer's experts", f"{size(spec.layer_budget)} ({spec.top_k} experts): a useful budget is larger"),
        ("fingerprint", checkpoint.fingerprint),
    ]
    result().print(two_columns("foregate inspect", rows))
    result().print(_budget_table(spec))


def _routed(spec: MoeSpec) -> int:
    return spec.bytes_per_token - spec.dense_bytes


def _range(counts: tuple[int, ...]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def _budget_table(spec: MoeSpec) -> Table:
    from rich.table import Table

    table = Table("--memory-budget", "bytes", "experts held", "per layer", title="budgets", title_justify="left")
    for row in budgets(spec):
        table.add_row(f"{row['percent']}%", size(row["bytes"]), f"{row['slots']}", f"{row['per_layer']}")
    return table
