"""Routing traces from real vLLM, in the same format as everybody else's.

``record`` runs vLLM over prompts. ``plugin.register`` (an entry point of vLLM) records what a server is asked.
Importing this imports neither vLLM nor torch: every process of vLLM loads the plugin, traced or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foregate.trace.vllm.recording import Options, record

__all__ = ["Options", "record"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from foregate.trace.vllm import recording

    return getattr(recording, name)
