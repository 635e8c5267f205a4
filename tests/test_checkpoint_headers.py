"""Damaged safetensors files: each is refused in one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from foregate.checkpoint.headers import read_header
from foregate.errors import CheckpointError


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(begin: int, end: int, **other: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end], **other}


def test_offsets_are_those_of_the_bytes_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.arange(6, dtype=torch.int16).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}
    save_file(tensors, path, metadata={"format": "pt"})
    found = read_header(path)
    assert set(found) == {"a", "b"}
    a = found["a"]
    assert (a.dtype, a.shape, a.nbytes) == ("I16", (2, 3), 12)
    assert path.read_bytes()[a.offset : a.offset + a.nbytes] == tensors["a"].numpy().tobytes()


def test_scalars_and_empty_tensors_are_tensors(tmp_path: Path) -> None:
    header = {"s": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "e": entry(4, 4)}
    found = read_header(write(tmp_path / "x.safetensors", header, bytes(4)))
    assert found["s"].nbytes == 4
    assert found["e"].nbytes == 0


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: file is missing"):
        read_header(tmp_path / "gone.safetensors")


def test_truncated_file_says_expected_and_actual_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(
        CheckpointError, match=rf"x\.safetensors: truncated: expected {whole} bytes, found {whole - 700}"
    ):
        read_header(path)


def test_truncated_inside_the_header(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": entry(0, 4)}, bytes(4))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 64, b"not a safetensors file at all"])
def test_junk_instead_of_a_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: not a safetensors file"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{not json", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ([1, 2], "a JSON list"),
        ({"a": {"dtype": "U8", "shape": [4]}}, "junk in the header of tensor 'a'"),
        ({"a": entry(0, 4, dtype="F99")}, "junk in the header of tensor 'a'"),
        ({"a": entry(0, 4, shape=[-4])}, "junk"),
        ({"a": entry(0, 4, shape=[4.0])}, "junk"),
        ({"a": entry(0, 4, shape=None)}, "junk"),
        ({"a": entry(0, 4, data_offsets=[4, 0])}, "junk"),
        ({"a": entry(0, 4, data_offsets=[0])}, "junk"),
        ({"a": "tensor"}, "junk"),
        ({"a": entry(0, 4, shape=[5])}, r"is U8 \[5\], 5 bytes, but its range has 4"),
        ({"a": entry(0, 3), "b": entry(2, 4)}, "tensor 'b' at byte .* overlaps"),
        ({"a": entry(0, 1), "b": entry(2, 4)}, "tensor 'b' at byte .* leaves a hole"),
        ({"a": entry(1, 4)}, "leaves a hole"),
        ({"a": entry(0, 3)}, "1 bytes after the last tensor"),
        ({"a": entry(0, 9)}, "truncated"),
    ],
)
def test_headers_that_contradict_themselves(tmp_path: Path, header: Any, message: str) -> None:
    path = write(tmp_path / "x.safetensors", header, bytes(4))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert "x.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
