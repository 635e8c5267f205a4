"""Typed fields of parsed JSON. Every error names the file and the field."""

from __future__ import annotations

from typing import Any, TypeVar

from foregate.errors import TraceError

T = TypeVar("T")


class Fields:
    """A JSON object read field by field; ``where`` names the file (and line) in errors."""

    def __init__(self, raw: Any, where: str) -> None:
        if not isinstance(raw, dict):
            raise TraceError(f"{where}: a JSON object was expected, not {type(raw).__name__}")
        self._raw: dict[str, Any] = raw
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self._raw.get(name) is not None

    def text(self, name: str) -> str:
        return self._typed(name, str)

    def table(self, name: str) -> dict[str, Any]:
        return self._typed(name, dict)

    def sub(self, name: str) -> Fields:
        """The object under ``name``."""
        return Fields(self._raw.get(name), f"{self.where}: {name}")

    def subs(self, name: str) -> list[Fields]:
        """The objects of the list under ``name``."""
        return [Fields(item, f"{self.where}: {name}[{i}]") for i, item in enumerate(self._typed(name, list))]

    def count(self, name: str) -> int:
        """A whole number that is not negative."""
        value = self._typed(name, int)
        if isinstance(value, bool) or value < 0:
            raise TraceError(f"{self.where}: {name} is {value!r}, not a count")
        return value

    def counts(self, name: str) -> tuple[int, ...]:
        values = self._typed(name, list)
        if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values):
            raise TraceError(f"{self.where}: {name} is {values!r}, not a list of counts")
        return tuple(values)

    def texts(self, name: str, choices: tuple[str, ...]) -> tuple[str, ...]:
        """A list of names out of ``choices``."""
        values = self._typed(name, list)
        unknown = [value for value in values if value not in choices]
        if unknown:
            raise TraceError(f"{self.where}: {name} has {unknown[0]!r}; known: {', '.join(choices)}")
        return tuple(values)

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.text(name)
        if value not in choices:
            raise TraceError(f"{self.where}: {name} is {value!r}; known: {', '.join(choices)}")
        return value

    def _typed(self, name: str, kind: type[T]) -> T:
        value = self._raw.get(name)
        if not isinstance(value, kind):
            raise TraceError(f"{self.where}: {name} is missing or no {kind.__name__}")
        return value
