"""Kernels that are asked for predictions: a call, or a beginning and an end with another thread at work in between."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from struct import Struct
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from foregate.errors import IntegrityError
from foregate.native.library import address, calls, function
from foregate.native.matrix import threads_asked
from foregate.types import Prediction

_BESIDE = ("foregate_post", "foregate_join")
"""Functions of the kernels by which another thread computes."""


WORTH_BEGINNING = 200 << 10
"""Bytes of weights from which on another thread is had to compute: to tell it, and to ask it again, takes what half of
that takes to read."""


Place = int | NDArray[Any] | None
"""An argument of a kernel: a number, or an array in one piece, of which it gets the address. Whoever calls keeps it."""


class Ask(Protocol):
    """Asks a kernel: for each of its layers a prediction, or what is made of an answer of the kernel that is not 0."""

    @property
    def open(self) -> bool | int:
        """Whether it has begun and not told: then its answer's place is taken, and it must not be asked."""
        ...

    def __call__(self, *given: Place) -> list[Prediction]: ...

    def begin(self, kept: object, *given: Place) -> Callable[[], list[Prediction]]:
        """As a call, but what is returned tells, once (RuntimeError the second time): another thread computes meanwhile
        if one is there. Thrown away instead, it drops that: the other thread is free again, and only then what is
        ``kept`` for it."""
        ...


class _SlowAsk:
    """Without Python's headers: all at the end."""

    def __init__(self, ask: Callable[..., list[Prediction]], kept: object) -> None:
        self._ask, self._kept = ask, kept
        self.open = False

    def __call__(self, *given: Place) -> list[Prediction]:
        return self._ask(*[_address(one) for one in given])

    def begin(self, kept: object, *given: Place) -> Callable[[], list[Prediction]]:
        left = [(kept, given)]

        def tell() -> list[Prediction]:
            if not left:
                raise RuntimeError("what had begun was told before")
            last = left.pop()
            return self(*last[1])

        return tell


class Told:
    """What a kernel writes: scores [A, ``named``], then experts, for ``layers`` of so many experts each; a negative one
    is after the last."""

    def __init__(self, asked: int, named: int, layers: Sequence[tuple[int, int]]) -> None:
        half = asked * named
        self._form = Struct(f"{half}f{half}i")
        self._memory = ctypes.create_string_buffer(self._form.size)
        at = ctypes.addressof(self._memory)
        self._to = at, at + 4 * half
        self._half = half
        self._parts = tuple((layer, hop * named, min(named, there)) for hop, (layer, there) in enumerate(layers))

    def asked_of(
        self,
        found: Any,
        name: str,
        *known: int,
        given: int = 0,
        kept: object = None,
        refused: Callable[[int], list[Prediction]] | None = None,
    ) -> Ask:
        """What calls the kernel ``name`` of ``found`` with ``known``, as many arguments as are to be ``given``, where
        its answer goes, and a last one, threads, that is given. ``kept`` lives as long: what ``known`` points to.
        ``refused`` says what becomes of an answer that is not 0; without it MemoryError or IntegrityError."""
        refused = refused or refuse
        fast = calls()
        if fast is None:
            run = function(found, name, len(known) + given + 3)

            def run_and_read(*rest: Place) -> list[Prediction]:
                answer = run(*known, *rest[:-1], *self._to, rest[-1])
                return refused(answer) if answer else self._read()

            return _SlowAsk(run_and_read, kept)
        kernel, post, join = (address(getattr(found, part)) for part in (name, *_BESIDE))
        kept = self._memory, kept
        ask: Ask = fast.Asker(kernel, known, given, self._to, self._parts, Prediction, refused, post, join, kept)
        return ask

    def _read(self) -> list[Prediction]:
        found = self._form.unpack(self._memory)  # one call: numpy's lists take several times as long
        scores, experts = found[: self._half], found[self._half :]
        ends = [
            (layer, at, next((i for i in range(at, at + n) if experts[i] < 0), at + n)) for layer, at, n in self._parts
        ]
        return [Prediction(layer, experts[at:end], scores[at:end]) for layer, at, end in ends]


class LayerKernel(ABC):
    """A kernel that is asked for the predictions of a layer. ``given`` is what a subclass says that it needs."""

    _ask: list[Ask]
    """Who asks for each layer."""
    _large: bool
    """Whether another thread is worth it."""

    def __call__(self, layer: int, *given: Any) -> list[Prediction]:
        """What is said at ``layer``: the best experts first, and their scores. Raises MemoryError or IntegrityError."""
        return self._free(layer)(*self._arguments(*given), threads_asked() or 1)

    def begin(self, layer: int, *given: Any) -> Callable[[], list[Prediction]]:
        """As a call, but what this returns tells, and another compute thread does it meanwhile if it is worth it. What
        is given must not change until then."""
        threads = (threads_asked() or 1) if self._large else 1
        return self._free(layer).begin(given, *self._arguments(*given), threads)

    def _free(self, layer: int) -> Ask:
        """Who asks: another where a question is open."""
        ask = self._ask[layer]
        return self._asker(layer) if ask.open else ask

    @abstractmethod
    def _arguments(self, *given: Any) -> tuple[Place, ...]:
        """Of the kernel."""

    @abstractmethod
    def _asker(self, layer: int) -> Ask: ...


def _address(given: Place) -> int | None:
    return given.ctypes.data if isinstance(given, np.ndarray) else given


def refuse(answer: int) -> NoReturn:
    """For an answer of a predictor's kernel that is not 0. Raises MemoryError or IntegrityError."""
    if answer == 2:
        raise MemoryError("no memory for a prediction")
    raise IntegrityError("the kernels refused the arrays of a predictor")
