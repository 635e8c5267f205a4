"""A model in numbers, and its fingerprint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from foregate.checkpoint import fingerprint as fingerprints
from foregate.checkpoint.opening import open_checkpoint
from foregate.errors import CheckpointError
from foregate.types import Segment
from test_checkpoint_support import edit_json, edit_tensors, flip, tiny


def test_numbers_of_a_known_model(tmp_path: Path) -> None:
    spec = open_checkpoint(tiny(tmp_path, "qwen3_moe")).spec
    assert (spec.model_type, spec.architecture, spec.dtype) == ("qwen3_moe", "Qwen3MoeForCausalLM", "BF16")
    assert spec.decoder_layers == 4
    assert spec.moe_layers == (0, 2, 3)  # layer 1 is dense
    assert spec.module_paths[1] == "model.layers.2.mlp.experts"
    assert spec.experts_per_layer == (16, 16, 16)
    assert (spec.layers, spec.experts, spec.top_k) == (3, 48, 4)
    assert (spec.hidden_size, spec.vocab_size, spec.context_length) == (64, 288, 256)
    assert spec.expert_bytes == 2 * (64 * 64 + 64 * 32)
    assert spec.expert_slot_bytes == 12288
    assert spec.total_expert_bytes == 48 * spec.expert_bytes
    assert spec.total_bytes == spec.dense_bytes + spec.total_expert_bytes
    assert spec.bytes_per_token == spec.dense_bytes + 3 * 4 * spec.expert_bytes
    assert spec.layer_budget == 4 * 12288


@pytest.mark.parametrize(
    ("family", "top_k", "shared"),
    [
        ("olmoe", 4, None),
        ("deepseek_v2", 3, 2),
        ("qwen2_moe", 2, 1),
        ("ernie4_5_moe", 2, 1),
        ("aria_text", 2, 1),
        ("hunyuan_v1_moe", 2, None),
        ("gemma4_text", 2, None),
    ],
)
def test_families_name_the_same_things_differently(family: str, top_k: int, shared: int | None, tmp_path: Path) -> None:
    spec = open_checkpoint(tiny(tmp_path, family)).spec
    assert (spec.top_k, spec.shared_experts) == (top_k, shared)


def test_expert_bytes_are_those_of_the_loaded_dtype(tmp_path: Path) -> None:
    """float32 on the disk, bfloat16 in memory."""
    edit_json(tiny(tmp_path, dtype="float32") / "config.json", dtype="bfloat16")
    assert open_checkpoint(tmp_path).spec.expert_bytes == 2 * (64 * 64 + 64 * 32)


def test_fingerprint_does_not_depend_on_the_place_or_the_time(tmp_path: Path) -> None:
    one = open_checkpoint(tiny(tmp_path / "one")).fingerprint
    assert len(one) == 32
    shutil.move(tmp_path / "one", tmp_path / "two")
    os.utime(tmp_path / "two" / "model.safetensors", (0, 0))
    assert open_checkpoint(tmp_path / "two").fingerprint == one
    # the hub's cache: a directory of links to blobs
    (tmp_path / "hub").mkdir()
    for number, path in enumerate(sorted((tmp_path / "two").iterdir())):
        shutil.copyfile(path, tmp_path / f"blob{number}")
        (tmp_path / "hub" / path.name).symlink_to(tmp_path / f"blob{number}")
    assert open_checkpoint(tmp_path / "hub").fingerprint == one


def change(directory: Path, name: str, where: float) -> None:
    """One bit of one tensor."""
    tensor = open_checkpoint(directory).shards.tensors[name]
    flip(Path(tensor.path), tensor.offset + int(where * (tensor.nbytes - 1)))


@pytest.mark.parametrize("where", [0, 0.3, 1])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.experts.11.up_proj.weight"])
def test_fingerprint_changes_with_any_bit_of_a_small_file(name: str, where: float, tmp_path: Path) -> None:
    before = open_checkpoint(tiny(tmp_path)).fingerprint
    change(tmp_path, name, where)
    assert open_checkpoint(tmp_path).fingerprint != before


@pytest.mark.parametrize(
    "part", ["norm.weight", "mlp.gate.weight", "q_proj", "experts", "up_proj", "embed_tokens", "lm_head", "layers.3."]
)
def test_fingerprint_of_large_files_changes_with_any_retraining(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is taken for a large one, and samples are small beside the tensors; one kind of tensor is trained."""
    monkeypatch.setattr(fingerprints, "WHOLE_BYTES", 0)
    monkeypatch.setattr(fingerprints, "SAMPLE_BYTES", 64)
    before = open_checkpoint(tiny(tmp_path)).fingerprint
    edit_tensors(tmp_path, lambda tensors: {n: t * 1.01 if part in n else t for n, t in tensors.items()})
    assert open_checkpoint(tmp_path).fingerprint != before


def test_fingerprint_reads_little_of_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """48 layers of 128 experts: 30 GB in a file with holes, a few hundred reads."""
    tensors, end = [], 0
    for layer in range(48):
        sizes = {f"experts.{e}.{p}_proj": 1 << 21 for e in range(128) for p in ("up", "gate", "down")}
        for name, nbytes in {**sizes, "gate": 1 << 19, "norm": 4096}.items():
            tensors.append(Segment(str(tmp_path / "x"), f"{layer}.{name}", end, nbytes, "U8", (nbytes,)))
            end += nbytes
    with (tmp_path / "x").open("wb") as file:
        file.truncate(end)
    real, reads = os.preadv, []

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        reads.append((offset, len(buffers[0])))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    one = fingerprints.fingerprint({}, tensors)
    assert 200 <= len(reads) <= fingerprints.SAMPLES
    assert reads == sorted(reads)
    assert max(length for _, length in reads) == fingerprints.SAMPLE_BYTES
    kinds = ("gate", "norm")
    sampled = {t.tensor for t in tensors for at, _ in reads if t.offset <= at < t.offset + t.nbytes}
    assert sum(name.split(".", 1)[1] in kinds for name in sampled) == 2 * 48
    assert fingerprints.fingerprint({}, tensors[::-1]) == one


def test_fingerprint_of_a_file_that_shrank(tmp_path: Path) -> None:
    tensors = open_checkpoint(tiny(tmp_path)).shards.tensors.values()
    os.truncate(tmp_path / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        fingerprints.fingerprint({}, tensors)


def test_fingerprint_does_not_depend_on_who_saved_the_config(tmp_path: Path) -> None:
    before = open_checkpoint(tiny(tmp_path)).fingerprint
    edit_json(tmp_path / "config.json", transformers_version="4.0.0", _name_or_path="elsewhere")
    assert open_checkpoint(tmp_path).fingerprint == before


def test_fingerprint_changes_with_config_and_tensors(tmp_path: Path) -> None:
    before = open_checkpoint(tiny(tmp_path)).fingerprint
    edit_json(tmp_path / "config.json", rms_norm_eps=1e-3)
    config = open_checkpoint(tmp_path).fingerprint
    edit_tensors(tmp_path, lambda tensors: {**tensors, "extra": torch.zeros(1)})
    assert len({before, config, open_checkpoint(tmp_path).fingerprint}) == 3
