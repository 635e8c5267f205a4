"""Other systems on the same model, the same tokens and under the same memory limit. docs/rivals.md."""

from __future__ import annotations

from collections.abc import Mapping

from foregate.bench.rivals import airllm_layers, disk_offload, flyweight, llama
from foregate.bench.rivals.rival import Rival

RIVALS: Mapping[str, Rival] = {
    "llama.cpp": llama,
    "accelerate": disk_offload,
    "flyweight-llm": flyweight,
    "airllm": airllm_layers,
}
"""Name in the table → the module that prepares and starts it."""
