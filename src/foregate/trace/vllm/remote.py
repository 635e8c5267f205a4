"""What ``LLM.collective_rpc`` runs inside the workers of vLLM. The first argument is the worker."""

from __future__ import annotations

from typing import Any

from foregate.trace.vllm.layers import LayerShape
from foregate.trace.vllm.recorder import Recorder
from foregate.trace.vllm.sequence import RoutedSequence

ATTRIBUTE = "foregate_recorder"


def attach(worker: Any, scores: bool, timings: bool) -> list[LayerShape]:
    """Begin to record in the first worker; every other sees the same tokens and is left alone.

    Returns the shape of every MoE layer; nothing for the other workers. Raises TraceError.
    """
    if worker.rank != 0:
        return []
    recorder = Recorder(worker, scores=scores, timings=timings)
    setattr(worker, ATTRIBUTE, recorder)
    return [layer.shape for layer in recorder.layers]


def take(worker: Any) -> list[RoutedSequence]:
    """Everything recorded since the last call."""
    recorder: Recorder | None = getattr(worker, ATTRIBUTE, None) if worker.rank == 0 else None
    return recorder.take(everything=True) if recorder is not None else []


def detach(worker: Any) -> None:
    """The worker is as it was before ``attach``."""
    recorder: Recorder | None = getattr(worker, ATTRIBUTE, None) if worker.rank == 0 else None
    if recorder is not None:
        recorder.close()
        delattr(worker, ATTRIBUTE)
