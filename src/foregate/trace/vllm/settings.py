"""Settings of the plugin, which vLLM loads without arguments: environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from foregate.errors import ConfigError

PREFIX = "FOREGATE_VLLM_"
OUT, DOMAIN, NAME = PREFIX + "TRACE", PREFIX + "DOMAIN", PREFIX + "MODEL_NAME"
FLAGS = {name: PREFIX + name.upper() for name in ("scores", "timings", "resume", "untested")}
KNOWN = (OUT, DOMAIN, NAME, *FLAGS.values())

REQUESTS = "requests"
"""Domain where none is given."""


@dataclass(frozen=True, slots=True)
class Settings:
    """``out``: the directory of the trace. ``domain`` is noted for every request; ``name`` for the model."""

    out: Path
    domain: str = REQUESTS
    name: str = ""
    scores: bool = False
    timings: bool = False
    resume: bool = False
    untested: bool = False


def from_environment(environment: Mapping[str, str]) -> Settings | None:
    """None where FOREGATE_VLLM_TRACE names no directory. Raises ConfigError for unknown variables and values."""
    unknown = [name for name in environment if name.startswith(PREFIX) and name not in KNOWN]
    if unknown:
        raise ConfigError(f"{min(unknown)} is no setting; known: {', '.join(KNOWN)}")
    if not environment.get(OUT):
        return None
    flags = {name: _flag(environment, variable) for name, variable in FLAGS.items()}
    return Settings(Path(environment[OUT]), environment.get(DOMAIN) or REQUESTS, environment.get(NAME, ""), **flags)


def untested_allowed(environment: Mapping[str, str]) -> bool:
    """Whether an unknown version of vLLM may be tried."""
    return _flag(environment, FLAGS["untested"])


def _flag(environment: Mapping[str, str], variable: str) -> bool:
    value = environment.get(variable, "0")
    if value not in ("0", "1"):
        raise ConfigError(f"{variable} is {value!r}, not 0 or 1")
    return value == "1"
