"""The arms: what is compared, as settings of the engine. Every number of a benchmark belongs to one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from foregate.errors import ConfigError
from foregate.experts.policy import POLICIES
from foregate.predictors import PREDICTORS

RESIDENT = "all-resident"
BASELINE = "cache-only"


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run. ``settings`` are fields of RunConfig; ``slots_of_top_k``: a budget of that many times k slots."""

    name: str
    settings: Mapping[str, object]
    slots_of_top_k: int | None = None
    whole: bool = False
    """All experts resident: runs in a process of its own, outside the budget."""


def _arm(name: str, slots_of_top_k: int | None = None, **settings: Any) -> Arm:
    return Arm(name, MappingProxyType(settings), slots_of_top_k)


def standard_arms(predictor: str, lookahead: int, policy: str) -> list[Arm]:
    """What an honest comparison needs, the predictor under test among it."""
    quiet: dict[str, Any] = {"predictor": "none", "prefetch": "auto", "lookahead": None}
    found = [
        _arm("on-demand-sequential", 1, **{**quiet, "prefetch": "off"}, cache_policy="lru", reader_threads=0),
        _arm("on-demand-parallel", 1, **quiet, cache_policy="lru"),
    ]
    found += [_arm(f"{BASELINE}:{name}", **quiet, cache_policy=name) for name in POLICIES.names]
    found += [
        _arm(
            f"prefetch-only:{_short(predictor)}",
            1 + lookahead,
            predictor=predictor,
            prefetch="auto",
            lookahead=lookahead,
            cache_policy="lru",
        ),
        prefetch_arm(predictor, lookahead, policy),
    ]
    found += [_oracle(ahead, policy) for ahead in (1, 2, 4)]
    return [*found, Arm(RESIDENT, MappingProxyType({**quiet, "cache_policy": "lru"}), whole=True)]


def prefetch_arm(predictor: str, lookahead: int, policy: str) -> Arm:
    """Cache and prefetch together, decided by the controller: what ``foregate run`` does."""
    return _arm(
        f"cache+prefetch:{_short(predictor)}@{lookahead}",
        predictor=predictor,
        prefetch="auto",
        lookahead=lookahead,
        cache_policy=policy,
    )


def _oracle(lookahead: int, policy: str) -> Arm:
    return _arm(f"oracle@{lookahead}", predictor="oracle", prefetch="auto", lookahead=lookahead, cache_policy=policy)


def _short(predictor: str) -> str:
    """A predictor's name, or the stem of its file."""
    return predictor if predictor in PREDICTORS.names else predictor.rsplit("/", 1)[-1].rsplit(".", 1)[0]


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
