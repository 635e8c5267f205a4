"""Finds and loads the compiled libraries, and calls them. ``FOREGATE_NATIVE=off`` does without them."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Sequence
from ctypes import c_void_p
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

log = logging.getLogger("foregate")

VERSION = "foregate_version_11"
"""Of the kernels: counted up, here and in kernels.c, where a function of an old name takes or returns another thing."""
CALLS = 5
"""The same of call.c."""


def load(name: str, functions: Sequence[str]) -> ctypes.CDLL | None:
    """The library built from ``native/NAME.c``, or None where it was not built, cannot be loaded or is switched off.

    One that lacks any of ``functions``, or is of another ``VERSION``, was built from an older source: it is left alone,
    with a warning.
    """
    found = _open(name)
    wanted = [*functions, *([VERSION] if name == "kernels" else [])]
    missing = [] if found is None else [function for function in wanted if not hasattr(found, function)]
    if missing:
        log.warning("native/%s was built from an older source (no %s): install Foregate again", name, missing[0])
        return None
    return found


@cache
def _open(name: str) -> ctypes.CDLL | None:
    if os.environ.get("FOREGATE_NATIVE", "").lower() in ("off", "0", "no"):
        return None
    spec = find_spec(f"foregate.native._{name}")
    if spec is None or spec.origin is None:
        return None
    try:
        return ctypes.CDLL(spec.origin)
    except OSError:
        return None


def function(found: ctypes.CDLL, name: str, count: int) -> Callable[..., int]:
    """``name`` of ``found``: ``count`` arguments of 64 bits each, addresses (None: NULL) and integers; returns int."""
    made, fast = getattr(found, name), calls()
    made.argtypes = [c_void_p] * count
    callee: Callable[..., int] = made if fast is None else fast.Function(address(made), count)
    return callee


def address(made: Any) -> int | None:
    """Where a function of a library lies."""
    return ctypes.cast(made, c_void_p).value


@cache
def calls() -> Any:
    """``native/call.c``, which calls sooner than ctypes; None where it was not built (it needs Python's headers)."""
    try:
        found = import_module("foregate.native._call")
    except ImportError:
        return None
    return found if getattr(found, "VERSION", 0) == CALLS else None
