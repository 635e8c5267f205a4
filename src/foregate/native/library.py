"""Finds and loads the compiled libraries. ``FOREGATE_NATIVE=off`` does without them."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.util import find_spec


@cache
def load(name: str) -> ctypes.CDLL | None:
    """The library built from ``native/NAME.c``, or None where it was not built, cannot be loaded or is switched off."""
    if os.environ.get("FOREGATE_NATIVE", "").lower() in ("off", "0", "no"):
        return None
    spec = find_spec(f"foregate.native._{name}")
    if spec is None or spec.origin is None:
        return None
    try:
        return ctypes.CDLL(spec.origin)
    except OSError:
        return None
