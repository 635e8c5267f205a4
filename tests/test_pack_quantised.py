"""Quantised packs: what they hold, that verification sees every byte, and that tokens depend on nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from foregate.checkpoint.dense_int8 import replaced
from foregate.checkpoint.manifest import DENSE_FILE, EXPERTS_FILE, read_manifest
from foregate.checkpoint.opening import open_checkpoint
from foregate.checkpoint.pack import pack
from foregate.checkpoint.precision import Precision
from foregate.checkpoint.quantise import SCALE, dequantised, parse_scheme
from foregate.checkpoint.verify import verify
from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.errors import CheckpointError, ConfigError, PackError, TraceError
from foregate.experts.compute import DTYPES
from foregate.types import ExpertKey
from test_checkpoint_support import flip, slots, tiny

LONG = [5 + (7 * i) % 240 for i in range(24)]
SHORT = LONG[:6]
KINDS = ("int8", "int4/32")


def of(kind: str, **others: object) -> Precision:
    return Precision(experts=parse_scheme(kind), **others)  # type: ignore[arg-type]


def run(path: Path, budget: str, **settings: object) -> tuple[torch.Tensor, list[list[int]]]:
    with Engine(RunConfig(model=str(path), memory_budget=budget, **settings)) as engine:  # type: ignore[arg-type]
        logits = engine.logits(SHORT).clone()
        tokens = [[s.token_id for s in engine.stream(ids, SamplingConfig(max_new_tokens=8))] for ids in (LONG, SHORT)]
        engine.cache.check_integrity(idle=True)
        assert engine.pool.peak_bytes <= engine.plan.budget_bytes
        return logits, tokens


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny(tmp_path / "source", "qwen3_moe")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text", "mixtral"])
def test_packed_numbers_are_the_rounded_numbers_of_the_original(family: str, kind: str, tmp_path: Path) -> None:
    """Fused, transposed with biases, outside the interface, one tensor an expert."""
    original, out = tiny(tmp_path / "source", family), tmp_path / "out"
    pack(original, out, precision=of(kind))
    checkpoint, plain = open_checkpoint(out), open_checkpoint(original)
    found, wanted = slots(checkpoint), slots(plain)
    key = ExpertKey(1, 3)
    before = {p.name: (p, wanted[key]) for p in plain.layouts[1].params}
    after = {p.name: (p, found[key]) for p in checkpoint.layouts[1].params}

    def tensor(param: object, slot: bytes) -> torch.Tensor:
        raw = bytearray(slot[param.offset : param.offset + param.nbytes])  # type: ignore[attr-defined]
        return torch.frombuffer(raw, dtype=DTYPES[param.dtype]).view(param.shape)  # type: ignore[attr-defined]

    for name, (param, slot) in before.items():
        true = tensor(param, slot).float()
        if true.ndim != 2:
            assert torch.equal(tensor(*after[name]).float(), true)
            continue
        transposed = checkpoint.skeleton.moe[1].transposed
        pair = tensor(*after[name]), tensor(*after[name + SCALE])
        error = (dequantised(name, *pair, tuple(true.shape), transposed) - true).abs().max()
        # int4 may clip the largest of a group to make the others finer
        assert error <= true.abs().max() * (0.51 / 127 if kind == "int8" else 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_no_budget_or_predictor_changes_a_bit_of_a_quantised_pack(kind: str, source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "out", precision=of(kind))
    full = run(tmp_path / "out", "100%", predictor="none")
    others = [
        {"budget": "25%", "predictor": "next-gate", "lookahead": 2},
        {"budget": "50%", "predictor": "random", "prefetch": "4", "cache_policy": "lru"},
        {"budget": str(open_checkpoint(tmp_path / "out").spec.expert_slot_bytes), "reader_threads": 1},
        {"budget": "30%", "threads": 2},
    ]
    for settings in others:
        logits, tokens = run(tmp_path / "out", **settings)  # type: ignore[arg-type]
        assert tokens == full[1]
        assert torch.equal(logits, full[0])


@pytest.mark.parametrize(("family", "kind"), [("gpt_oss", "int4/32"), ("llama4_text", "int8")])
def test_unusual_families_run_quantised_too(family: str, kind: str, tmp_path: Path) -> None:
    pack(tiny(tmp_path / "source", family), tmp_path / "out", precision=of(kind))
    full = run(tmp_path / "out", "100%", predictor="none")
    few = run(tmp_path / "out", "25%", predictor="stale-gate")
    assert few[1] == full[1]
    assert torch.equal(few[0], full[0])
    original = run(tmp_path / "source", "100%", predictor="none")[0]
    assert (full[0] - original).abs().max() < (0.1 if kind == "int8" else 2.0) * original.abs().max()
    assert not torch.equal(full[0], original)


def test_a_budget_holds_more_quantised_experts(source: Path, tmp_path: Path) -> None:
    """Budgets count the bytes in slots, and those are quantised."""
    sizes = {"source": open_checkpoint(source).spec.expert_bytes}
    for kind in KINDS:
        pack(source, tmp_path / kind.replace("/", "-"), precision=of(kind))
        spec = open_checkpoint(tmp_path / kind.replace("/", "-")).spec
        sizes[kind] = spec.expert_bytes
        assert spec.dtype == "BF16"
    assert sizes["int8"] < 0.6 * sizes["source"]
    assert sizes["int4/32"] < 0.45 * sizes["source"]


@pytest.mark.parametrize("kind", KINDS)
def test_verification_sees_a_bit_in_values_and_in_scales(kind: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(source, out, precision=of(kind))
    assert verify(out, source).source == source
    place = read_manifest(out).find(ExpertKey(1, 2))
    for param in open_checkpoint(out).layouts[1].params[:2]:
        flip(out / EXPERTS_FILE, place.offset + param.offset)
        with pytest.raises(CheckpointError, match="expert 2 of MoE layer 1: checksum mismatch"):
            verify(out, source)
        flip(out / EXPERTS_FILE, place.offset + param.offset)


def test_a_pack_that_claims_more_than_its_original_gives_is_refused(source: Path, tmp_path: Path) -> None:
    """Sound checksums over values that the original does not have: only the comparison tells."""
    from foregate.checkpoint import quantise

    out = tmp_path / "out"
    real = quantise._int8
    try:
        quantise._int8 = lambda matrix: (real(matrix)[0] + 0, real(matrix)[1] * 1.001)
        pack(source, out, precision=of("int8"))
    finally:
        quantise._int8 = real
    verify(out)
    with pytest.raises(PackError, match="differs from the original"):
        verify(out, source)


def test_another_precision_is_another_pack(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "out", precision=of("int8"))
    with pytest.raises(PackError, match="with int8, not int4/32"):
        pack(source, tmp_path / "out", precision=of("int4"))
    assert pack(source, tmp_path / "out", precision=of("int8")).finished_before


def test_same_source_same_bytes_and_versions(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        pack(source, tmp_path / name, precision=of("int4"))
    assert (tmp_path / "one" / EXPERTS_FILE).read_bytes() == (tmp_path / "two" / EXPERTS_FILE).read_bytes()
    pack(source, tmp_path / "plain")
    versions = [json.loads((tmp_path / name / "foregate.json").read_text())["version"] for name in ("one", "plain")]
    assert versions == [2, 1]


def test_an_inflated_checkpoint_has_the_same_int8_routing(tmp_path: Path) -> None:
    """A scale a row: added columns are zero or smaller than the row's largest, added rows are no one's."""
    from foregate.testing.inflate import inflate

    original = tiny(tmp_path / "source", "qwen3_moe")
    inflate(str(original), tmp_path / "large", hidden_factor=4, intermediate=192)
    results = []
    for name in ("source", "large"):
        pack(tmp_path / name, tmp_path / f"{name}-int8", precision=of("int8"))
        results.append(routed(tmp_path / f"{name}-int8"))
    assert results[0] == results[1]


def routed(path: Path) -> list[object]:
    class Listener:
        def __init__(self) -> None:
            self.steps: list[object] = []

        def on_route(self, step: object) -> None:
            self.steps.append(step.experts.tolist())  # type: ignore[attr-defined]

    with Engine(RunConfig(model=str(path), memory_budget="50%", predictor="none")) as engine:
        listener = Listener()
        engine.observers.append(listener)
        tokens = [s.token_id for s in engine.stream(SHORT, SamplingConfig(max_new_tokens=6))]
        return [tokens, listener.steps]


DENSE = Precision(experts=parse_scheme("int8"), dense=parse_scheme("int8"))


@pytest.fixture
def small_matrices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of tiny models are not worth it otherwise."""
    monkeypatch.setattr("foregate.checkpoint.dense_int8.SMALLEST", 1024)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
@pytest.mark.usefixtures("small_matrices_too")
def test_dense_int8_runs_near_the_original_and_the_same_everywhere(family: str, tmp_path: Path) -> None:
    """Attention, shared experts and the output head; routers stay."""
    source, out = tiny(tmp_path / "source", family), tmp_path / "out"
    pack(source, out, precision=DENSE)
    assert verify(out, source).source == source
    checkpoint = open_checkpoint(out)
    int8 = set(replaced(checkpoint.skeleton.model))
    assert any("self_attn" in name for name in int8)
    assert any("shared_expert" in name for name in int8)
    assert not any(name.endswith("mlp.gate.weight") for name in int8)
    assert checkpoint.spec.dense_bytes < 0.8 * open_checkpoint(source).spec.dense_bytes
    full, few = run(out, "100%", predictor="none"), run(out, "25%", predictor="next-gate", threads=2)
    assert few[1] == full[1]
    assert torch.equal(few[0], full[0])
    original = run(source, "100%", predictor="none")[0]
    assert 0 < (full[0] - original).abs().max() < 0.1 * original.abs().max()


@pytest.mark.usefixtures("small_matrices_too")
def test_a_bit_in_a_dense_matrix_or_its_scales_is_seen(tmp_path: Path) -> None:
    source, out = tiny(tmp_path / "source", "qwen2_moe"), tmp_path / "out"
    pack(source, out, precision=DENSE)
    dense = open_checkpoint(out).dense
    name = next(name for name in sorted(dense) if name.endswith("weight_scale"))
    for tensor in (dense[name], dense[name.removesuffix("_scale")]):
        flip(out / DENSE_FILE, tensor.offset)
        with pytest.raises(PackError, match="dense weights: checksum mismatch"):
            verify(out)
        flip(out / DENSE_FILE, tensor.offset)


MIXED = Precision(
    experts=parse_scheme("int4"),
    kept=parse_scheme("int8"),
    kept_experts=frozenset({ExpertKey(0, 1), ExpertKey(1, 0), ExpertKey(1, 3)}),
)


def test_mixed_precision_reads_fewer_bytes_and_changes_no_token_with_the_budget(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(source, out, precision=MIXED)
    assert verify(out, source).source == source
    checkpoint = open_checkpoint(out)
    assert checkpoint.precision == MIXED
    finer, others = checkpoint.layout_of(ExpertKey(1, 3)), checkpoint.layout_of(ExpertKey(1, 2))
    assert checkpoint.spec.expert_slot_bytes == finer.nbytes > others.nbytes
    assert read_manifest(out).find(ExpertKey(1, 2)).nbytes == others.nbytes
    full, few = run(out, "100%", predictor="none"), run(out, "25%", predictor="next-gate")
    assert few[1] == full[1]
    assert torch.equal(few[0], full[0])
    with pytest.raises(PackError, match="3 experts int8"):
        pack(source, out, precision=of("int4"))


def test_the_most_used_experts_of_a_trace_are_kept() -> None:
    """The shipped sample, counted here by hand; a trace of another model is refused."""
    from collections import Counter

    from foregate.trace.reader import TraceReader
    from foregate.trace.sample import SAMPLE
    from foregate.trace.usage import most_used

    header = TraceReader(SAMPLE).header.model
    counts: Counter[ExpertKey] = Counter()
    for part in TraceReader(SAMPLE):
        for layer, experts in zip(part.layer, part.experts, strict=True):
            counts.update(ExpertKey(int(layer), int(expert)) for expert in experts)
    kept = most_used(SAMPLE, 0.1, header.fingerprint)
    assert len(kept) == round(0.1 * sum(header.experts_per_layer))
    assert min(counts[key] for key in kept) >= max(counts[key] for key in counts.keys() - kept)
    with pytest.raises(TraceError, match="a trace of another model"):
        most_used(SAMPLE, 0.1, "0" * 32)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        most_used(SAMPLE, 1.5, header.fingerprint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int5"], "choose source, int8 or int4"),
        (["--dtype", "int8", "--group-size", "32"], "only int4 has groups"),
        (["--dtype", "int4", "--group-size", "48"], "choose 32, 64, 128"),
        (["--dense-dtype", "int4"], "choose source or int8"),
        (["--dtype", "int4", "--keep", "10%"], "say with --usage"),
        (["--dtype", "int8", "--keep-dtype", "int8"], "say how to --keep"),
        (["--dtype", "int8", "--keep", "10%", "--usage", "nowhere"], "no finer than"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    from foregate.cli.pack import pack as command

    names = {"--dtype": "dtype", "--group-size": "group_size", "--dense-dtype": "dense_dtype", "--keep": "keep"}
    names |= {"--keep-dtype": "keep_dtype", "--usage": "usage"}
    given: dict[str, Any] = {names[a]: b for a, b in zip(options[::2], options[1::2], strict=True)}
    given["group_size"] = int(given["group_size"]) if "group_size" in given else None
    given["usage"] = Path(given["usage"]) if "usage" in given else None
    with pytest.raises(ConfigError, match=message):
        command("reference", tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
