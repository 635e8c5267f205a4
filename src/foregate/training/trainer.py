"""The seam between ``foregate train`` and a method: options in, tensors and metrics out. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, get_type_hints

from numpy.typing import NDArray

from foregate.errors import ConfigError
from foregate.training.dataset import Dataset

Array = NDArray[Any]


@dataclass(frozen=True)
class Options:
    """What every method can be told. A method's own options are a frozen subclass; its field names are the keys.

    A field's metadata may hold ``choices``, a tuple of the values that are allowed.
    """

    lookahead: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError for a value outside its choices or its range."""
        self.at_least("lookahead", 0)
        for known in fields(self):
            choices = known.metadata.get("choices")
            value = getattr(self, known.name)
            if choices is not None and value not in choices:
                raise ConfigError(f"unknown {known.name} {value!r}; choose from: {', '.join(map(str, choices))}")

    def at_least(self, name: str, least: float) -> None:
        """Raises ConfigError where option ``name`` is smaller."""
        value = getattr(self, name)
        if not value >= least:
            raise ConfigError(f"option {name}={value} must be at least {least}")


@dataclass(frozen=True)
class Fitted:
    """What a trainer gives: the arrays and settings that serving needs, and what was measured on validation prompts.

    ``settings`` and ``metrics`` are JSON values. The same data, options and threads give the same bytes.
    """

    tensors: Mapping[str, Array]
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)


class Watch(Protocol):
    """What looks on while a method is trained: the progress bar, the loss curve, the place for checkpoints."""

    state: Path
    """Directory for checkpoints; what is found there was written by the same training, before a kill."""

    def begin(self, stage: str, total: int | None) -> None:
        """A stage of ``total`` units of work begins."""
        ...

    def advance(self, units: int = 1) -> None: ...

    def log(self, record: Mapping[str, Any]) -> None:
        """A point of the loss curve: JSON values, ``step`` among them."""
        ...


@dataclass(frozen=True)
class Trainer:
    """How one predictor is trained. ``features`` are hidden states that the traces must hold; ``scores`` likewise."""

    fit: Callable[[Dataset, Any, Watch], Fitted]
    options: type[Options] = Options
    features: tuple[str, ...] = ()
    scores: bool = False


def parse_options(kind: type[Options], given: Sequence[str]) -> Options:
    """Options from ``key=value`` texts. Raises ConfigError, with the choices, for what ``kind`` does not know."""
    types = get_type_hints(kind)
    known = {entry.name: types[entry.name] for entry in fields(kind)}
    values: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"option {text!r} is not key=value")
        if key not in known:
            raise ConfigError(f"unknown option {key!r}; choose from: {', '.join(known)}")
        values[key] = _value(key, value, known[key])
    return kind(**values)


def _value(key: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise ConfigError(f"option {key}={text!r} must be true or false")
        return text == "true"
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"option {key}={text!r} is no {kind.__name__}") from None
