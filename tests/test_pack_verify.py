"""Damaged packs: the first difference is reported with file, offset and expert."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import xxhash

from foregate.checkpoint import manifest as manifests
from foregate.checkpoint.manifest import DENSE_FILE, EXPERTS_FILE, read_manifest
from foregate.checkpoint.opening import open_checkpoint
from foregate.checkpoint.pack import pack
from foregate.checkpoint.verify import verify, verify_dense
from foregate.errors import CheckpointError, PackError
from foregate.types import ExpertKey
from test_checkpoint_support import edit_json, edit_manifest, flip, tiny

FAMILY = "gpt_oss"  # its slots have padding


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny(tmp_path / "source", FAMILY)


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    return pack(source, tmp_path / "out").directory


def refusal(packed: Path, source: Path | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        verify(packed, source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sound_pack(packed: Path, source: Path) -> None:
    assert verify(packed).source is None
    report = verify(packed, source)
    assert (report.experts, report.source) == (32, source)
    assert report.nbytes == sum((packed / name).stat().st_size for name in (EXPERTS_FILE, DENSE_FILE))


@pytest.mark.parametrize("where", [0, 8000, -1])
def test_one_bit_in_an_expert(packed: Path, where: int) -> None:
    """The last byte of a slot is padding: that counts too, or slots would not be reproducible."""
    place = read_manifest(packed).find(ExpertKey(2, 5))
    flip(packed / EXPERTS_FILE, place.offset + where % place.nbytes)
    message = f"{packed / EXPERTS_FILE} at byte {place.offset}: expert 5 of MoE layer 2: checksum mismatch"
    assert refusal(packed) == message


def test_the_first_of_several(packed: Path) -> None:
    for key in (ExpertKey(3, 0), ExpertKey(1, 7)):
        flip(packed / EXPERTS_FILE, read_manifest(packed).find(key).offset)
    assert "expert 7 of MoE layer 1" in refusal(packed)


@pytest.mark.parametrize("where", [20, -1])
def test_one_bit_in_the_dense_weights(packed: Path, where: int) -> None:
    """In the data; and in the header, where a name that changed is a tensor that is missing."""
    flip(packed / DENSE_FILE, where % (packed / DENSE_FILE).stat().st_size)
    assert DENSE_FILE in refusal(packed)


def test_a_change_with_a_matching_checksum_needs_the_source(packed: Path, source: Path) -> None:
    manifest = read_manifest(packed)
    place = manifest.find(ExpertKey(0, 3))
    flip(packed / EXPERTS_FILE, place.offset + 777)
    raw = (packed / EXPERTS_FILE).read_bytes()[place.offset : place.offset + place.nbytes]
    edit_manifest(packed, lambda m: m["layers"][0]["experts"][3].__setitem__(2, xxhash.xxh3_128(raw).hexdigest()))
    verify(packed)
    message = refusal(packed, source)
    assert message.startswith(f"{packed / EXPERTS_FILE} at byte {place.offset + 777}: expert 3 of MoE layer 0 differs")


def test_a_dense_change_with_a_matching_checksum_needs_the_source(packed: Path, source: Path) -> None:
    tensor = open_checkpoint(packed).dense["model.norm.weight"]
    flip(packed / DENSE_FILE, tensor.offset + 5)
    found = xxhash.xxh3_128((packed / DENSE_FILE).read_bytes()).hexdigest()
    edit_manifest(packed, lambda manifest: manifest["dense"].update(xxh3_128=found))
    verify(packed)
    message = refusal(packed, source)
    assert message.startswith(f"{packed / DENSE_FILE} at byte {tensor.offset + 5}: model.norm.weight differs")


def test_other_weights_of_the_same_shapes(packed: Path, tmp_path: Path) -> None:
    assert "was not made from" in refusal(packed, tiny(tmp_path / "other", FAMILY, seed=1))


def test_another_model(packed: Path, tmp_path: Path) -> None:
    assert "was not made from" in refusal(packed, tiny(tmp_path / "other", "olmoe"))


def test_a_pack_as_source(packed: Path) -> None:
    assert "is a pack itself" in refusal(packed, packed)


def test_an_original_is_not_a_pack(source: Path) -> None:
    assert refusal(source) == f"{source} is not a pack: it has no foregate.json"


@pytest.mark.parametrize("name", [EXPERTS_FILE, DENSE_FILE])
@pytest.mark.parametrize("damage", ["missing", "shorter", "longer"])
def test_files_of_the_wrong_size_are_seen_when_opening(packed: Path, name: str, damage: str) -> None:
    path = packed / name
    size = path.stat().st_size
    path.unlink() if damage == "missing" else os.truncate(path, size + (-1 if damage == "shorter" else 1))
    with pytest.raises(CheckpointError, match=name) as caught:
        open_checkpoint(packed)
    assert damage == "missing" or str(size) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 99}, "pack version 99; this Foregate reads versions 1 and 2"),
        ({"format": "zip"}, "not the manifest of a pack"),
        ({"layers": None}, "damaged"),
        ({"layers": [{"path": "x"}]}, "damaged"),
        ({"dense": []}, "damaged"),
        ({"dtype": "F8_E4M3"}, "the pack has dtype 'F8_E4M3'"),
        ({"layers": []}, "differently from the one installed"),
    ],
)
def test_manifests_that_cannot_be_used(packed: Path, changes: dict[str, Any], message: str) -> None:
    edit_manifest(packed, lambda manifest: manifest.update(changes))
    with pytest.raises(PackError, match=message):
        open_checkpoint(packed)


def swap(manifest: dict[str, Any], *fields: int) -> None:
    one, other = manifest["layers"][0]["experts"][2], manifest["layers"][0]["experts"][5]
    for field in fields:
        one[field], other[field] = other[field], one[field]


def test_two_experts_exchanged(packed: Path) -> None:
    """Every checksum in it matches the bytes at its place: only the manifest's own tells."""
    content = json.loads((packed / manifests.NAME).read_text())
    swap(content, 0, 1, 2)
    (packed / manifests.NAME).write_text(json.dumps(content))
    assert refusal(packed).startswith(
        f"{packed / manifests.NAME}: damaged: its content does not match its own checksum"
    )


@pytest.mark.parametrize("key", ["fingerprint", "dtype", "dense", "foregate_version", manifests.CHECKSUM])
def test_a_manifest_that_was_edited(packed: Path, key: str) -> None:
    edit_json(packed / manifests.NAME, **{key: None})
    with pytest.raises(PackError, match="does not match its own checksum"):
        open_checkpoint(packed)


@pytest.mark.parametrize(
    ("field", "value"), [(0, 0), (0, 4097), (0, -4096), (0, 1 << 60), (1, 0), (1, 4095), (1, 1 << 60)]
)
def test_places_that_do_not_follow_from_the_layouts(packed: Path, field: int, value: int) -> None:
    edit_manifest(packed, lambda manifest: manifest["layers"][2]["experts"][4].__setitem__(field, value))
    with pytest.raises(PackError, match=r"foregate\.json: damaged: expert 4 of MoE layer 2 has") as caught:
        open_checkpoint(packed)
    assert f" {value} " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_exchanged_places_with_a_matching_checksum(packed: Path) -> None:
    edit_manifest(packed, lambda manifest: swap(manifest, 0, 1, 2))
    with pytest.raises(PackError, match="expert 2 of MoE layer 0 has"):
        open_checkpoint(packed)


def test_an_experts_file_that_is_longer_than_its_experts(packed: Path) -> None:
    size = (packed / EXPERTS_FILE).stat().st_size
    os.truncate(packed / EXPERTS_FILE, size + 4096)
    edit_manifest(packed, lambda manifest: manifest["experts"].update(nbytes=size + 4096))
    with pytest.raises(PackError, match=rf"has {size + 4096} bytes instead of {size}"):
        open_checkpoint(packed)


def test_one_bit_in_the_header_of_the_experts(packed: Path) -> None:
    flip(packed / EXPERTS_FILE, 100)
    assert refusal(packed) == f"{packed / EXPERTS_FILE} at byte 100: the header is not the one that was written"


def test_verify_dense_sees_one_bit(packed: Path, source: Path) -> None:
    """What the engine asks before it loads them."""
    checkpoint = open_checkpoint(packed)
    verify_dense(checkpoint)
    flip(packed / DENSE_FILE, -1 % (packed / DENSE_FILE).stat().st_size)
    with pytest.raises(PackError) as caught:
        verify_dense(checkpoint)
    assert str(caught.value) == f"{packed / DENSE_FILE} at byte 0: dense weights: checksum mismatch"
    flip(source / "model.safetensors", -1 % (source / "model.safetensors").stat().st_size)
    verify_dense(open_checkpoint(source))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000])
def test_junk_manifest(packed: Path, content: str) -> None:
    (packed / manifests.NAME).write_text(content)
    with pytest.raises(PackError, match=r"foregate\.json"):
        open_checkpoint(packed)


def test_manifest_reads_back_what_it_wrote(packed: Path) -> None:
    manifest = read_manifest(packed)
    assert manifest.to_json() == (packed / manifests.NAME).read_text()
