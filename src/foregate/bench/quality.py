"""Loss against speed: every lossy mode on the same texts, beside the exact run of the same settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from foregate.bench.kept import Kept
from foregate.checkpoint.manifest import NAME
from foregate.config import LOSSY_MODES, RunConfig
from foregate.engine.lossy_quality import lossy_quality

Texts = Sequence[tuple[str, str]]
"""(domain, text)"""


@dataclass(frozen=True, slots=True)
class Tried:
    """Modes to judge. ``low_precision_pack`` None: low-precision-miss is left out, for it has nothing to read."""

    model: str
    budgets: Sequence[str]
    predictors: Sequence[str]
    cache_policy: str
    threads: int | None = None
    low_precision_pack: str | None = None

    def configs(self) -> list[RunConfig]:
        """Every mode with every predictor and budget; skip-late and low-precision-miss without prediction as well."""
        found = []
        for budget in self.budgets:
            for mode in LOSSY_MODES:
                low = self.low_precision_pack if mode == "low-precision-miss" else None
                if mode == "low-precision-miss" and low is None:
                    continue
                names = self.predictors if mode == "execute-predicted" else ("none", *self.predictors)
                found += [
                    self._config(budget, mode, name, low) for name in dict.fromkeys(names) if self._fits(mode, name)
                ]
        return found

    def _fits(self, mode: str, predictor: str) -> bool:
        """Nothing is executed that was not predicted, and an oracle knows no given text."""
        return predictor != "oracle" and (mode != "execute-predicted" or predictor != "none")

    def _config(self, budget: str, mode: str, predictor: str, low: str | None) -> RunConfig:
        return RunConfig(
            model=self.model,
            memory_budget=budget,
            predictor=predictor,
            cache_policy=self.cache_policy,
            threads=self.threads,
            lossy=mode,
            low_precision_pack=low,
        )


def judge_modes(
    tried: Tried,
    texts: Texts,
    *,
    tokens: int,
    say: Callable[[str], None],
    kept: Kept | None = None,
    machine: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """``LossyQuality.as_dict`` of every mode, and ``delta`` (nats a token) and ``agreement`` over domains.

    With ``kept``, what was judged before is not judged again; ``machine`` is what it depends on beside settings.
    """
    kept = kept or Kept(None)
    found = []
    for config in tried.configs():
        where = f"quality-{config.lossy}-{Path(config.predictor).stem}-{config.memory_budget}"
        say(where)
        identity = {**asdict(config), **(machine or {}), "texts": list(texts), "tokens": tokens}
        judge = partial(_judged, config, texts, tokens)
        found.append(kept.measured(where, {**identity, "low": _manifest(config)}, judge))
    return found


def _manifest(config: RunConfig) -> str | None:
    """What a pack of lower precision says of itself: a path alone does not tell one from the next."""
    return (Path(config.low_precision_pack) / NAME).read_text() if config.low_precision_pack else None


def _judged(config: RunConfig, texts: Texts, tokens: int) -> dict[str, Any]:
    facts = lossy_quality(config, texts, tokens=tokens).as_dict()
    judged = sum(line["tokens"] for line in facts["domains"])
    for name in ("delta", "agreement"):
        facts[name] = sum(line[name] * line["tokens"] for line in facts["domains"]) / judged
    return facts
