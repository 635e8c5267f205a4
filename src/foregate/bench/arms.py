"""The arms: what is compared, as settings of the engine. Every number of a benchmark belongs to one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from foregate.errors import ConfigError
from foregate.experts.policy import POLICIES
from foregate.interfaces import Advised
from foregate.predictors import PREDICTORS, choice
from foregate.predictors.file import load
from foregate.predictors.reuse import has_reuse

RESIDENT = "all-resident"
BASELINE = "cache-only"
CONTROL = "control:"
"""A cache-only arm once more: what two equal arms of a run differ by."""
ADVICE = "cache+advice:"
PREFETCH = "cache+prefetch"
ORACLE = "oracle@"
ORACLE_ALL = "oracle-all@"
RIVAL = "rival:"
BEST = "best-cache-only"
"""In ratios: the fastest cache-only arm of the runs compared, chosen after the fact."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run. ``settings`` are fields of RunConfig; ``slots_of_top_k``: a budget of that many times k slots."""

    name: str
    settings: Mapping[str, object]
    slots_of_top_k: int | None = None
    whole: bool = False
    """All experts resident: runs in a process of its own, outside the budget."""
    warm: bool = False
    """Every run is preceded by the same run, which is not counted: what it needs is in memory."""
    reads_all: bool = False
    """``prefetch`` is k: the controller decides nothing."""


def _arm(name: str, slots_of_top_k: int | None = None, *, reads_all: bool = False, **settings: Any) -> Arm:
    return Arm(name, MappingProxyType(settings), slots_of_top_k, reads_all=reads_all)


def standard_arms(predictors: Sequence[str], lookahead: int | None, policy: str) -> list[Arm]:
    """What an honest comparison needs, the predictors under test among it. ``lookahead`` None: each one's own."""
    quiet: dict[str, Any] = {"predictor": "none", "prefetch": "auto", "lookahead": None}
    found = [
        _arm("on-demand-sequential", 1, **{**quiet, "prefetch": "off"}, cache_policy="lru", reader_threads=0),
        _arm("on-demand-parallel", 1, **quiet, cache_policy="lru"),
    ]
    found += [_arm(f"{BASELINE}:{name}", **quiet, cache_policy=name) for name in POLICIES.names]
    found.append(_arm(f"{CONTROL}{policy}", **quiet, cache_policy=policy))
    for predictor, label in _labels(predictors).items():
        ahead = own_lookahead(predictor) if lookahead is None else lookahead
        found += [_prefetch_only(predictor, label, ahead), _both(predictor, label, ahead, policy)]
        if advises(predictor) and issubclass(POLICIES.load(policy), Advised):
            # its own lookahead: nothing is predicted
            advised: dict[str, Any] = {**quiet, "predictor": predictor, "prefetch": "off", "cache_policy": policy}
            found.append(_arm(f"{ADVICE}{label}", **advised))
    found += [_oracle(ahead, policy, all_read) for all_read in (False, True) for ahead in (1, 2, 4)]
    # prefetch off: a prompt's reading ahead of whole layers would read experts that no token has needed
    settled = MappingProxyType({**quiet, "prefetch": "off", "cache_policy": "lru"})
    return [*found, Arm(RESIDENT, settled, whole=True, warm=True)]


def own_lookahead(predictor: str) -> int:
    """What ``predictor``, a name or a file, looks ahead if not told. Raises ConfigError or PredictorError."""
    choice.check(predictor)
    if choice.is_file(predictor):
        return load(Path(predictor).expanduser()).lookahead
    return int(getattr(PREDICTORS.load(predictor), "default_lookahead", 1))


def advises(predictor: str) -> bool:
    """Whether ``predictor`` is a file that has advice for the eviction policy. Raises PredictorError."""
    return choice.is_file(predictor) and has_reuse(load(Path(predictor).expanduser()))


def _prefetch_only(predictor: str, label: str, lookahead: int) -> Arm:
    """Slots for the layer that runs and for those that are predicted: no cache to speak of."""
    return _arm(
        f"prefetch-only:{label}@{lookahead}",
        1 + lookahead,
        predictor=predictor,
        prefetch="auto",
        lookahead=lookahead,
        cache_policy="lru",
    )


def _both(predictor: str, label: str, lookahead: int, policy: str) -> Arm:
    """Cache and prefetch together, decided by the controller: what ``foregate run`` does."""
    return _arm(
        f"{PREFETCH}:{label}@{lookahead}",
        predictor=predictor,
        prefetch="auto",
        lookahead=lookahead,
        cache_policy=policy,
    )


def _oracle(lookahead: int, policy: str, reads_all: bool) -> Arm:
    """Perfect prediction, under the controller as any other, or with everything read that it foresees."""
    name = f"{ORACLE_ALL if reads_all else ORACLE}{lookahead}"
    decided: dict[str, Any] = {} if reads_all else {"prefetch": "auto"}
    return _arm(name, reads_all=reads_all, predictor="oracle", **decided, lookahead=lookahead, cache_policy=policy)


def _labels(predictors: Sequence[str]) -> dict[str, str]:
    """Predictor → its name, or the stem of its file; the whole path where two files have the same stem."""
    unique = list(dict.fromkeys(predictors))
    stems = [name if name in PREDICTORS.names else Path(name).stem for name in unique]
    return {name: stem if stems.count(stem) == 1 else name for name, stem in zip(unique, stems, strict=True)}


def choose(arms: list[Arm], wanted: str) -> list[Arm]:
    """The arms that ``wanted`` names: ``all``, or names or their beginnings, with commas between.

    Raises ConfigError for one that names nothing.
    """
    if wanted == "all":
        return arms
    chosen: list[Arm] = []
    for part in filter(None, (text.strip() for text in wanted.split(","))):
        found = [arm for arm in arms if arm.name == part or arm.name.startswith(part)]
        if not found:
            raise ConfigError(f"no arm {part!r}; choose from: {', '.join(arm.name for arm in arms)}")
        chosen += [arm for arm in found if arm not in chosen]
    if not chosen:
        raise ConfigError(f"arms {wanted!r} names none")
    return chosen
