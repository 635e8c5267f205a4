"""Faulty readers under a real generation: the right tokens, or one clear error. Never wrong tokens, never a hang."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from foregate.checkpoint.pack import pack
from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.errors import ForegateError, TransferError
from foregate.testing.faults import Fault, FaultyStore, Kind

PROMPT = [5 + (7 * i) % 240 for i in range(20)]
Tiny = Callable[[str], Path]


def generate(path: Path, *faults: Fault, predictor: str = "next-gate", **settings: object) -> tuple[list[int], Engine]:
    """Greedy tokens with ``faults`` in the store; every fault given must have struck."""
    prefetch = "auto" if predictor == "none" else "4"
    config = RunConfig(model=str(path), memory_budget="30%", predictor=predictor, prefetch=prefetch, **settings)  # type: ignore[arg-type]
    stores: list[FaultyStore] = []

    def wrap(store: object) -> FaultyStore:
        stores.append(FaultyStore(store, list(faults), seed=3))  # type: ignore[arg-type]
        return stores[0]

    with Engine(config, wrap_store=wrap) as engine:  # type: ignore[arg-type]
        tokens = [step.token_id for step in engine.stream(PROMPT, SamplingConfig(max_new_tokens=10))]
        engine.cache.check_integrity(idle=True)
        assert all(stores[0].injected[fault.kind] for fault in faults)
        return tokens, engine


@pytest.fixture(params=["direct", "packed"])
def model(request: pytest.FixtureRequest, tiny: Tiny, tmp_path: Path) -> Path:
    path = tiny("qwen2_moe")
    if request.param == "direct":
        return path
    pack(path, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("predictor", ["none", "next-gate", "random"])
@pytest.mark.parametrize(
    "fault",
    [
        Fault(Kind.EIO, first=2),
        Fault(Kind.EIO, rate=0.2),
        Fault(Kind.SLOW, rate=0.2, seconds=0.002),
    ],
    ids=["first two reads fail", "a fifth of reads fail", "a fifth of reads are slow"],
)
def test_passing_faults_change_no_token(fault: Fault, predictor: str, model: Path) -> None:
    assert generate(model, fault, predictor=predictor)[0] == generate(model)[0]


def test_retries_are_reported(model: Path) -> None:
    _, engine = generate(model, Fault(Kind.EIO, first=1))
    assert engine.report is not None
    assert engine.report.as_dict()["read_retries"] > 0


def test_a_bit_flip_in_a_pack_is_read_again(tiny: Tiny, tmp_path: Path) -> None:
    pack(tiny("qwen2_moe"), tmp_path / "packed")
    assert generate(tmp_path / "packed", Fault(Kind.CORRUPT, first=1))[0] == generate(tiny("qwen2_moe"))[0]


@pytest.mark.parametrize("kind", [Kind.EIO, Kind.SHORT], ids=lambda kind: kind.value)
@pytest.mark.parametrize("predictor", ["none", "next-gate"])
def test_lasting_faults_end_in_one_error(kind: Kind, predictor: str, model: Path) -> None:
    with pytest.raises(TransferError) as caught:
        generate(model, Fault(kind), predictor=predictor)
    message = str(caught.value)
    assert "\n" not in message
    assert ".safetensors" in message
    assert "expert" in message


def test_a_lasting_bit_flip_is_an_error_not_a_token(tiny: Tiny, tmp_path: Path) -> None:
    pack(tiny("qwen2_moe"), tmp_path / "packed")
    with pytest.raises(TransferError, match="checksum"):
        generate(tmp_path / "packed", Fault(Kind.CORRUPT))


def test_a_hanging_read_is_an_error_in_time(model: Path) -> None:
    with pytest.raises(TransferError, match=r"no data for 0\.3 s"):
        generate(model, Fault(Kind.HANG), read_timeout_s=0.3)


def test_a_failed_engine_says_so_instead_of_going_on(model: Path) -> None:
    config = RunConfig(model=str(model), memory_budget="30%")
    with Engine(config, wrap_store=lambda store: FaultyStore(store, [Fault(Kind.EIO)])) as engine:
        with pytest.raises(TransferError):
            list(engine.stream(PROMPT))
        with pytest.raises(ForegateError, match="rebuilt"):
            list(engine.stream(PROMPT))
