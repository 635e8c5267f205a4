"""Expert numbers in tensor names: ``….experts.17.gate_proj.weight`` is expert 17."""

from __future__ import annotations

from foregate.errors import CheckpointError

SHOWN = 8
"""Missing tensors listed in a message before it says how many more."""


def by_expert(names: list[str], experts: int, parameter: str) -> list[str]:
    """``names``, one tensor an expert, ordered by expert. Raises CheckpointError unless they are exactly 0 … E-1."""
    split = [name.split(".") for name in names]
    place = _place(split, parameter)
    numbered = {int(parts[place]): name for parts, name in zip(split, names, strict=True)}
    if len(numbered) != len(names):
        raise CheckpointError(f"{parameter}: two tensors for one expert among {names[0]} … {names[-1]}")
    missing = [expert for expert in range(experts) if expert not in numbered]
    if missing:
        example = split[0]
        wanted = [".".join([*example[:place], str(expert), *example[place + 1 :]]) for expert in missing[:SHOWN]]
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise CheckpointError(f"{parameter}: expert tensors are missing: {', '.join(wanted)}{more}")
    if len(numbered) > experts:
        raise CheckpointError(f"{parameter}: {numbered[max(numbered)]} is of expert {max(numbered)} of {experts}")
    return [numbered[expert] for expert in range(experts)]


def _place(split: list[list[str]], parameter: str) -> int:
    """Which dotted part of the names is the expert: the one that differs; of a single name, the last number."""
    if len({len(parts) for parts in split}) == 1:
        columns = list(zip(*split, strict=True))
        numeric = [index for index, column in enumerate(columns) if all(part.isdigit() for part in column)]
        differing = [index for index, column in enumerate(columns) if len(set(column)) > 1]
        if not differing and numeric:
            return numeric[-1]
        if len(differing) == 1 and differing[0] in numeric:
            return differing[0]
    raise CheckpointError(f"{parameter}: cannot tell the experts apart by number in {split and '.'.join(split[0])}")
