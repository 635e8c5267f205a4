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
from foregate.checkpoint.verify import verify
from foregate.errors import CheckpointError, PackError
from foregate.types import ExpertKey
from test_checkpoint_support import edit_json, tiny

FAMILY = "gpt_oss"  # its slots have padding


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny(tmp_path / "source", FAMILY)


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    return pack(source, tmp_path / "out").directory


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


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
    text = (packed / manifests.NAME).read_text()
    (packed / manifests.NAME).write_text(text.replace(place.checksum, xxhash.xxh3_128(raw).hexdigest()))
    verify(packed)
    message = refusal(packed, source)
    assert message.startswith(f"{packed / EXPERTS_FILE} at byte {place.offset + 777}: expert 3 of MoE layer 0 differs")


def test_a_dense_change_with_a_matching_checksum_needs_the_source(packed: Path, source: Path) -> None:
    tensor = open_checkpoint(packed).dense["model.norm.weight"]
    flip(packed / DENSE_FILE, tensor.offset + 5)
    content = json.loads((packed / manifests.NAME).read_text())
    content["dense"]["xxh3_128"] = xxhash.xxh3_128((packed / DENSE_FILE).read_bytes()).hexdigest()
    (packed / manifests.NAME).write_text(json.dumps(content))
    verify(packed)
    message = refusal(packed, source)
    assert message.startswith(f"{packed / DENSE_FILE} at byte {tensor.offset + 5}: model.norm.weight differs")


def test_other_weights_of_the_same_shapes(packed: Path, tmp_path: Path) -> None:
    assert "differs from" in refusal(packed, tiny(tmp_path / "other", FAMILY, seed=1))


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
        ({"version": 99}, "pack version 99; this Foregate reads version 1"),
        ({"format": "zip"}, "not the manifest of a pack"),
        ({"layers": None}, "damaged"),
        ({"layers": [{"path": "x"}]}, "damaged"),
        ({"dense": []}, "damaged"),
        ({"dtype": "F8_E4M3"}, "the pack has dtype 'F8_E4M3'"),
        ({"layers": []}, "differently from the one installed"),
    ],
)
def test_manifests_that_cannot_be_used(packed: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(packed / manifests.NAME, **changes)
    with pytest.raises(PackError, match=message):
        open_checkpoint(packed)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_junk_manifest(packed: Path, content: str) -> None:
    (packed / manifests.NAME).write_text(content)
    with pytest.raises(PackError, match=r"foregate\.json"):
        open_checkpoint(packed)


def test_manifest_reads_back_what_it_wrote(packed: Path) -> None:
    manifest = read_manifest(packed)
    assert manifest.to_json() == (packed / manifests.NAME).read_text()
