"""A lazy registry: name → ``module:attribute``, imported on first use; its error lists the choices."""

from __future__ import annotations

from functools import cached_property
from importlib import import_module
from importlib.metadata import distributions
from typing import Any

from foregate.errors import ConfigError


class Registry:
    """Maps the names that users type to classes, without importing any of them up front.

    ``group`` is an entry point group through which installed packages add names; a name of ours is never replaced.
    """

    def __init__(self, kind: str, targets: dict[str, str], group: str = "") -> None:
        self.kind = kind
        self._group = group
        self._own = dict(targets)

    @property
    def names(self) -> tuple[str, ...]:
        """Our own, then those of installed packages."""
        return tuple(self._targets)

    @property
    def own_names(self) -> tuple[str, ...]:
        return tuple(self._own)

    def register(self, name: str, target: str) -> None:
        """Add ``name``; raises ConfigError if it is taken by another target."""
        if self._targets.get(name, target) != target:
            raise ConfigError(f"{self.kind} {name!r} is registered already, as {self._targets[name]}")
        self._own[name] = target

    def check(self, name: str) -> str:
        """``name`` itself; raises ConfigError with the choices if it is unknown."""
        if name not in self._targets:
            raise ConfigError(f"unknown {self.kind} {name!r}; choose from: {', '.join(self.names)}")
        return name

    def load(self, name: str) -> Any:
        """The registered object. Raises ConfigError for an unknown name, or a stranger's that cannot be imported."""
        target = self._targets[self.check(name)]
        if name in self._own:
            return _imported(target)
        try:
            return _imported(target)
        except Exception as error:  # a stranger's package, which may break in any way
            raise ConfigError(
                f"{self.kind} {name!r} ({target}) cannot be loaded: {type(error).__name__}: {error}"
            ) from error

    @property
    def _targets(self) -> dict[str, str]:
        return self._own | {name: target for name, target in self._installed.items() if name not in self._own}

    @cached_property
    def _installed(self) -> dict[str, str]:
        return _entry_points(self._group) if self._group else {}


def _imported(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def _entry_points(group: str) -> dict[str, str]:
    """Name → target of what installed packages offer; the first on the path wins, broken metadata offers nothing."""
    found: dict[str, str] = {}
    for package in distributions():
        try:
            offered = {point.name: point.value for point in package.entry_points if point.group == group}
        except Exception:  # a stranger's metadata, which may be malformed in any way
            continue
        found = offered | found
    return found
