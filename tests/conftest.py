"""Fixtures shared by the tests: tiny checkpoints built once a session, and quiet, single-threaded torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# One compute thread: tiny matmuls gain nothing from two, and two wait for each other on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny(family)``: the directory of a seeded tiny checkpoint, built on first use."""
    root = tmp_path_factory.mktemp("tiny")

    def build(family: str) -> Path:
        from foregate.testing import tiny as builder

        path = root / family
        return path if (path / "config.json").exists() else builder.build(family, path)

    return build
