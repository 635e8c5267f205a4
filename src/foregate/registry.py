"""A lazy registry: name → ``module:attribute``, imported on first use; its error lists the choices."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from foregate.errors import ConfigError


class Registry:
    """Maps the names that users type to classes, without importing any of them up front."""

    def __init__(self, kind: str, targets: dict[str, str]) -> None:
        self.kind = kind
        self._targets = dict(targets)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._targets)

    def register(self, name: str, target: str) -> None:
        """Add ``name``; raises ConfigError if it is taken by another target."""
        if self._targets.setdefault(name, target) != target:
            raise ConfigError(f"{self.kind} {name!r} is registered already, as {self._targets[name]}")

    def check(self, name: str) -> str:
        """``name`` itself; raises ConfigError with the choices if it is unknown."""
        if name not in self._targets:
            raise ConfigError(f"unknown {self.kind} {name!r}; choose from: {', '.join(self.names)}")
        return name

    def load(self, name: str) -> Any:
        """The registered object. Raises ConfigError for an unknown name."""
        module, _, attribute = self._targets[self.check(name)].partition(":")
        return getattr(import_module(module), attribute)
