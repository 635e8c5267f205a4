"""The entry point in ``vllm.general_plugins``: vLLM calls ``register`` in every process, before a worker exists.

It does nothing unless FOREGATE_VLLM_TRACE names a directory. It wraps WorkerWrapperBase.init_device, private to vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from foregate.trace.vllm.settings import Settings, from_environment
from foregate.trace.vllm.versions import check_version, load, reach

MARK = "foregate_settings"


def register() -> None:
    """Let every worker that this process makes record its requests. Raises ConfigError, TraceError."""
    settings = from_environment(os.environ)
    if settings is None:
        return
    check_version(untested=settings.untested)
    wrapper = load("vllm.v1.worker.worker_base", "WorkerWrapperBase")
    if not hasattr(wrapper, MARK):  # plugins may be loaded more than once in a process
        wrapper.init_device = _recording(reach(wrapper, "init_device"), settings)
        setattr(wrapper, MARK, settings)


def _recording(init_device: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    """``init_device`` of the wrapper, which makes the worker; ``init_worker`` has run when plugins are loaded."""

    @wraps(init_device)
    def prepared(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
        result = init_device(wrapper, *args, **kwargs)
        worker = reach(wrapper, "worker")
        if reach(worker, "rank") == 0:
            _record_after_loading(worker, settings)
        return result

    return prepared


def _record_after_loading(worker: Any, settings: Settings) -> None:
    load_model, shutdown = reach(worker, "load_model"), reach(worker, "shutdown")
    sinks: list[Any] = []

    def loaded(*args: Any, **kwargs: Any) -> Any:
        from foregate.trace.vllm.sink import TraceSink  # pyarrow and transformers: only where there is a trace

        result = load_model(*args, **kwargs)
        sinks.append(TraceSink(worker, settings))
        return result

    def ended(*args: Any, **kwargs: Any) -> Any:
        for sink in sinks:
            sink.close()
        return shutdown(*args, **kwargs)

    worker.load_model, worker.shutdown = loaded, ended
