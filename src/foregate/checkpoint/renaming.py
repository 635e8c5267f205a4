"""Checkpoint tensor → model parameter, by transformers' own conversion mapping. Knows nothing about experts.

Follows ``convert_and_load_state_dict_in_model`` key by key: every tensor ends where ``from_pretrained`` puts it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


@dataclass(slots=True)
class Target:
    """One parameter and the tensors it is made from: pattern → names, in the order transformers would stack them.

    ``converter`` is None where the tensor only changes its name; then there is one pattern, the name itself.
    """

    parameter: str
    converter: WeightConverter | None
    sources: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Renamed:
    """What becomes of the tensors of a checkpoint. ``unused`` are names that the model has no parameter for."""

    targets: dict[str, Target]
    unused: tuple[str, ...]


def rename(model: PreTrainedModel, names: Iterable[str]) -> Renamed:
    """Map every tensor name of a checkpoint of ``model``."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    targets: dict[str, Target] = {}
    unused: list[str] = []
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if renamed not in parameters and name in parameters:
            renamed, pattern = rename_source_key(name, [], [], prefix, parameters)
        if renamed not in parameters:
            unused.append(name)
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        target = targets.setdefault(renamed, Target(renamed, converter))
        target.sources.setdefault(pattern if pattern is not None else name, []).append(name)
    return Renamed(targets, tuple(unused))
