"""Records every request of one vLLM worker: wraps its model runner's passes, and puts everything back on ``close``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from foregate.errors import TraceError
from foregate.trace import format as fmt
from foregate.trace.vllm.batch import Span, check_positions, spans
from foregate.trace.vllm.layers import VllmLayer, find_layers
from foregate.trace.vllm.passes import RoutedPass, gather
from foregate.trace.vllm.refusals import check_config
from foregate.trace.vllm.sequence import Chunk, RoutedSequence
from foregate.trace.vllm.stopwatch import TIMINGS, LayerClock
from foregate.trace.vllm.tap import LayerPass, RouterTap
from foregate.trace.vllm.versions import reach

NEEDED = ("execute_model", "model", "input_batch.req_ids", "input_ids.gpu", "positions", "uses_mrope")
"""What of a model runner is reached for."""


class Recorder:
    """``take`` gives the requests that have finished since. One worker, one thread; eager mode.

    ``on_pass``, if there is one, is called when a pass begins and the requests that finished in the last one are known.
    """

    def __init__(self, worker: Any, *, scores: bool, timings: bool) -> None:
        """``worker`` has loaded its model. Raises TraceError for what cannot be traced, or is not laid out as known."""
        check_config(reach(worker, "vllm_config"))
        self._runner = reach(worker, "model_runner")
        for path in NEEDED:
            reach(self._runner, path)
        self.layers: list[VllmLayer] = find_layers(self._runner.model)
        self.timings = TIMINGS if timings else ()
        self._pad = fmt.padding(fmt.expert_dtype(max(layer.experts for layer in self.layers)))
        cuda = next(self._runner.model.parameters()).device.type == "cuda"
        prepare_tiles()
        self._clock = LayerClock(self.layers, self._current, cuda=cuda) if timings else None
        self._tap = RouterTap(self.layers, scores=scores)
        self.on_pass: Callable[[], None] | None = None
        self._running: dict[str, RoutedSequence] = {}
        self._finished: list[RoutedSequence] = []
        self._execute = self._runner.execute_model
        self._runner.execute_model = self._recorded

    def take(self, *, everything: bool = False) -> list[RoutedSequence]:
        """Requests that finished since the last call. With ``everything``, also those of which vLLM has not said so.

        vLLM tells its workers in the next pass, which after the last request never comes.
        """
        if everything:
            self._finish(tuple(self._running))
        found, self._finished = self._finished, []
        return found

    def close(self) -> None:
        """The runner and its model are as they were."""
        self._runner.execute_model = self._execute
        self._tap.close()
        if self._clock is not None:
            self._clock.close()

    def _recorded(self, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of ``execute_model``."""
        self._finish(scheduled.finished_req_ids)
        if self.on_pass is not None:
            self.on_pass()
        self._open(scheduled)
        if not scheduled.total_num_scheduled_tokens:
            return self._execute(scheduled, *args, **kwargs)
        self._tap.begin()
        try:
            result = self._execute(scheduled, *args, **kwargs)
            self._note(scheduled, self._tap.end())
        finally:
            self._tap.cancel()
        return result

    def _open(self, scheduled: Any) -> None:
        for new in scheduled.scheduled_new_reqs:
            if new.prompt_token_ids is None:
                raise TraceError(f"vLLM: request {new.req_id!r} has no token ids, which the trace would need")
            self._running[new.req_id] = RoutedSequence(new.req_id, len(new.prompt_token_ids))

    def _finish(self, requests: Any) -> None:
        self._finished += [self._running.pop(request) for request in requests if request in self._running]

    def _note(self, scheduled: Any, layers: list[LayerPass]) -> None:
        """Share the rows of a pass out to its requests."""
        rows = int(scheduled.total_num_scheduled_tokens)
        found = spans(scheduled, self._runner.input_batch.req_ids)
        if not self._runner.uses_mrope:
            check_positions(found, self._runner.positions[:rows].cpu().numpy())
        tokens = self._runner.input_ids.gpu[:rows].cpu().numpy().astype(np.int64)
        routed = gather(layers, rows, self._pad, self.timings)
        for span in found:
            sequence = self._running[span.request]
            sequence.add(_chunk(span, sequence.passes, tokens, routed))

    def _current(self, number: int) -> LayerPass | None:
        return None if self._tap.open is None else self._tap.open[number]


def _chunk(span: Span, number: int, tokens: Any, routed: RoutedPass) -> Chunk:
    rows = span.rows
    return Chunk(
        number=number,
        first=span.first,
        token_ids=tokens[rows],
        experts=routed.experts[rows],
        weights=routed.weights[rows],
        scores=None if routed.scores is None else routed.scores[rows],
        # a pass may serve several requests: its time is noted once, in its first row, so that sums are right
        timings=routed.timings
        if span.row == 0
        else {name: np.full_like(t, fmt.NOT_MEASURED) for name, t in routed.timings.items()},
    )


def prepare_tiles() -> None:
    """Ask the system for AMX: vLLM's kernels do not, and die (SIGILL) if a bf16 pass of one or two tokens is first."""
    prepare = getattr(torch.cpu, "_init_amx", None)
    if prepare is not None:
        prepare()
