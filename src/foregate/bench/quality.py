"""Loss against speed: every lossy mode on the same texts, beside the exact run of the same settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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


def judge_modes(tried: Tried, texts: Texts, *, tokens: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """``LossyQuality.as_dict`` of every mode, and ``delta`` (nats a token) and ``agreement`` over domains."""
    found = []
    for config in tried.configs():
        say(f"quality: {config.lossy}, {config.predictor}, {config.memory_budget}")
        facts = lossy_quality(config, texts, tokens=tokens).as_dict()
        judged = sum(line["tokens"] for line in facts["domains"])
        for name in ("delta", "agreement"):
            facts[name] = sum(line[name] * line["tokens"] for line in facts["domains"]) / judged
        found.append(facts)
    return found
