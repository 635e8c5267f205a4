"""Which vLLM this can read. What is private there may move with any release, so nothing is reached for unguarded."""

from __future__ import annotations

import importlib
from typing import Any

from foregate.errors import TraceError

TESTED = ("0.32.0",)
"""Versions whose routing was compared with transformers' (tests/test_vllm.py)."""


def vllm_version() -> str:
    """Of the vLLM that is installed. Raises TraceError where there is none."""
    try:
        return str(importlib.import_module("vllm").__version__)
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise TraceError("vLLM is not installed in this environment; see docs/vllm.md (make vllm-test)") from None


def check_version(*, untested: bool) -> str:
    """The version. Raises TraceError for one that was not tested, unless ``untested`` says to go on."""
    version = vllm_version()
    if version.split("+")[0] not in TESTED and not untested:
        message = f"vLLM {version} was not tested; Foregate reads {', '.join(TESTED)}"
        raise TraceError(f"{message}. To try all the same: FOREGATE_VLLM_UNTESTED=1")
    return version


def reach(owner: Any, path: str) -> Any:
    """``owner.a.b`` for the path ``a.b``. Raises TraceError, naming vLLM's version, where there is no such thing."""
    value = owner
    for name in path.split("."):
        if not hasattr(value, name):
            message = f"{type(value).__name__} has no {name!r} (wanted: {type(owner).__name__}.{path})"
            raise TraceError(f"vLLM {vllm_version()} is not laid out as expected: {message}")
        value = getattr(value, name)
    return value


def load(module: str, name: str) -> Any:
    """``name`` of a module of vLLM. Raises TraceError as ``reach`` does."""
    try:
        return reach(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        message = f"vLLM {vllm_version()} is not laid out as expected: no module {error.name}"
        raise TraceError(message) from None
