"""A trace that grows with the requests that a vLLM worker serves."""

from __future__ import annotations

from typing import Any

from foregate.trace.vllm.identity import external_id, header, model_info, run_info
from foregate.trace.vllm.recorder import Recorder
from foregate.trace.vllm.sequence import RoutedSequence
from foregate.trace.vllm.settings import Settings
from foregate.trace.writer import TraceWriter


class TraceSink:
    """Writes each request when the worker learns that it has finished; ``close`` writes the rest and ends the trace.

    A prompt is called by the id of its request. A request that ended before its prompt was routed is skipped.
    """

    def __init__(self, worker: Any, settings: Settings) -> None:
        """``worker`` has loaded its model. Raises TraceError, CheckpointError."""
        self._domain = settings.domain
        self._recorder = Recorder(worker, scores=settings.scores, timings=settings.timings)
        model = model_info(worker.vllm_config, [layer.shape for layer in self._recorder.layers], settings.name)
        run = run_info(int(worker.vllm_config.model_config.seed or 0), {"name": "requests"}, {})
        self._writer = TraceWriter(settings.out, resume=settings.resume)
        try:
            self._writer.begin(header(model, run, scores=settings.scores, timings=self._recorder.timings))
        except BaseException:
            self._writer.close()
            raise
        self._recorder.on_pass = self._write

    def close(self) -> None:
        """Write what is left and end the trace. The second call does nothing."""
        if self._recorder.on_pass is None:
            return
        self._recorder.on_pass = None
        self._recorder.close()
        self._add(self._recorder.take(everything=True))
        self._writer.finish()
        self._writer.close()

    def _write(self) -> None:
        self._add(self._recorder.take())

    def _add(self, finished: list[RoutedSequence]) -> None:
        for sequence in finished:
            name = external_id(sequence.request)
            prompt = sequence.request if name in self._writer.done else name
            if sequence.whole:
                self._writer.add(sequence.to_record(prompt, self._domain))
            else:
                self._writer.skip(prompt, "the request ended before its prompt was routed")
