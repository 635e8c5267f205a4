"""What a pack holds, and what ``pack`` refuses to write over."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from foregate.checkpoint.manifest import DENSE_FILE, EXPERTS_FILE, read_manifest
from foregate.checkpoint.opening import open_checkpoint
from foregate.checkpoint.pack import pack
from foregate.errors import PackError
from foregate.testing.tiny import no_progress_bar
from test_checkpoint_support import edit_json, edit_tensors, keys, slots, tiny


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny(tmp_path / "source")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_every_expert_is_one_aligned_piece_in_order(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    places = [manifest.find(key) for key in manifest.order()]
    assert len(places) == 64
    assert all(place.offset % 4096 == 0 and place.nbytes % 4096 == 0 for place in places)
    assert all(one.offset + one.nbytes == other.offset for one, other in pairwise(places))
    last = places[-1]
    assert last.offset + last.nbytes == manifest.experts_nbytes == (tmp_path / "out" / EXPERTS_FILE).stat().st_size


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_experts_file_is_a_valid_safetensors_file(family: str, tmp_path: Path) -> None:
    """With true names, dtypes and shapes, and nothing but zeros as padding."""
    pack(tiny(tmp_path / "source", family), tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    found = slots(checkpoint)
    tensors = load_file(tmp_path / "out" / EXPERTS_FILE)
    for key in keys(checkpoint):
        for param in checkpoint.layouts[key.layer].params:
            tensor = tensors.pop(f"{checkpoint.spec.module_paths[key.layer]}.{key.expert}.{param.name}")
            assert tensor.dtype == torch.bfloat16
            assert tuple(tensor.shape) == param.shape
            raw = found[key][param.offset : param.offset + param.nbytes]
            assert tensor.view(torch.uint8).numpy().tobytes() == raw
    assert all("padding" in name and tensor.dtype == torch.uint8 for name, tensor in tensors.items())
    assert not any(tensor.any() for tensor in tensors.values())
    assert bool(tensors) == (family == "gpt_oss")


def test_dense_file_keeps_names_dtypes_and_bytes(source: Path, tmp_path: Path) -> None:
    edit_tensors(source, lambda t: {**t, "model.norm.weight": t["model.norm.weight"].float()})
    pack(source, tmp_path / "out")
    original, dense = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / DENSE_FILE)
    assert dense.keys() == {name for name in original if ".experts." not in name}
    for name, tensor in dense.items():
        assert tensor.dtype == original[name].dtype
        assert torch.equal(tensor, original[name])
    with safe_open(tmp_path / "out" / DENSE_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_transformers_reads_the_rest_of_a_pack(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "out")
    here, there = (AutoConfig.from_pretrained(path).to_dict() for path in (tmp_path / "out", source))
    assert {**here, "_name_or_path": ""} == {**there, "_name_or_path": ""}
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("Hello").input_ids
    assert ids == AutoTokenizer.from_pretrained(source)("Hello").input_ids


def test_tensors_that_the_model_does_not_have_are_left_out(source: Path, tmp_path: Path) -> None:
    edit_tensors(source, lambda tensors: {**tensors, "mtp.layers.0.weight": torch.zeros(4)})
    pack(source, tmp_path / "out")
    assert "mtp.layers.0.weight" not in load_file(tmp_path / "out" / DENSE_FILE)


def test_only_small_files_come_along(source: Path, tmp_path: Path) -> None:
    for name in ("LICENSE", "vocab.txt", "code.py", "pytorch_model.bin", "old.safetensors", "x.safetensors.index.json"):
        (source / name).write_text("{}")
    (source / "sub").mkdir()
    pack(source, tmp_path / "out")
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "vocab.txt", "config.json", "tokenizer.json"} < copied
    assert not copied & {"code.py", "pytorch_model.bin", "old.safetensors", "x.safetensors.index.json", "sub"}


def test_config_does_not_point_to_a_file_of_the_original(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").rename(source / "special.safetensors")
    edit_json(source / "config.json", transformers_weights="special.safetensors")
    pack(source, tmp_path / "out")
    assert "transformers_weights" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert open_checkpoint(tmp_path / "out").fingerprint == open_checkpoint(source).fingerprint


def test_same_source_same_bytes(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "one")
    pack(source, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_shards_make_no_difference_to_the_experts(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    with no_progress_bar():
        model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    pack(source, tmp_path / "one")
    pack(tmp_path / "shards", tmp_path / "two")
    assert (tmp_path / "one" / EXPERTS_FILE).read_bytes() == (tmp_path / "two" / EXPERTS_FILE).read_bytes()


def test_nothing_is_left_beside_the_pack(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert not [path for path in (tmp_path / "out").iterdir() if "journal" in path.name or "partial" in path.name]


def test_progress_ends_at_all_bytes(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    pack(source, tmp_path / "out", lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_packing_again_finds_it_done(source: Path, tmp_path: Path) -> None:
    first = pack(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    again = pack(source, tmp_path / "out")
    assert (first.finished_before, again.finished_before) == (False, True)
    assert contents(tmp_path / "out") == before


def test_output_may_be_an_empty_directory_or_new_all_the_way(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    pack(source, tmp_path / "empty")
    pack(source, tmp_path / "a" / "b" / "c")
    assert open_checkpoint(tmp_path / "a" / "b" / "c").packed


def refusal(source: Path, out: Path) -> str:
    before = contents(out) if out.is_dir() and not any(p.is_dir() for p in out.iterdir()) else None
    with pytest.raises(PackError) as caught:
        pack(source, out)
    assert before is None or contents(out) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_pack_of_another_model_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    pack(tiny(tmp_path / "other", "mixtral"), tmp_path / "out")
    assert "is a pack of another model" in refusal(source, tmp_path / "out")


@pytest.mark.parametrize("part", ["experts.5.down_proj", "gate.weight", "norm.weight"])
def test_a_pack_of_the_model_before_it_was_trained_is_not_taken_for_its_own(
    part: str, source: Path, tmp_path: Path
) -> None:
    """Same names, shapes and config: only the weights tell."""
    pack(source, tmp_path / "out")
    edit_tensors(source, lambda tensors: {n: t * 1.01 if part in n else t for n, t in tensors.items()})
    assert "is a pack of another model, or of this one as it was" in refusal(source, tmp_path / "out")


def test_a_damaged_pack_is_not_a_finished_one(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "out")
    (tmp_path / "out" / EXPERTS_FILE).unlink()
    assert f"{EXPERTS_FILE}: file is missing" in refusal(source, tmp_path / "out")


def test_other_files_are_not_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    assert "is not empty and not a pack" in refusal(source, tmp_path / "out")


def test_a_file_as_output(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    assert "is a file" in refusal(source, tmp_path / "out")


def test_the_source_as_output(source: Path) -> None:
    assert "the output is the checkpoint itself" in refusal(source, source)


def test_a_pack_as_source(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "out")
    assert "is a pack already" in refusal(tmp_path / "out", tmp_path / "again")
