"""Corrupted, truncated, foreign and future traces are refused, with the file named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foregate.errors import TraceError
from foregate.trace import durable
from foregate.trace.header import FeatureInfo, Header
from foregate.trace.info import describe
from foregate.trace.reader import TraceReader
from foregate.trace.writer import TraceWriter
from test_trace_records import make_header, make_record, write

FEATURES = {"residual": FeatureInfo("float16", (3,), (0, 1, 2))}


def fill(path: Path, header: Header | None = None, prompts: int = 3) -> Path:
    header = header or make_header(features=FEATURES)
    return write(path, header, [make_record(header, f"code/{number}") for number in range(prompts)])


def read_all(path: Path) -> None:
    for part in TraceReader(path):
        _ = part.experts, part.weights, part.feature("residual")


def refused(path: Path, *words: str) -> None:
    """Reading says, in one line, which file it is and what is wrong."""
    with pytest.raises(TraceError) as caught:
        read_all(path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def only_part(path: Path, folder: str = "parts") -> Path:
    return sorted((path / folder).iterdir())[1]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x40
    path.write_bytes(bytes(content))


def test_a_good_trace_is_read(tmp_path: Path) -> None:
    read_all(fill(tmp_path / "t"))


@pytest.mark.parametrize("folder", ["parts", "features"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.999])
def test_a_flipped_bit_anywhere_is_found(folder: str, share: float, tmp_path: Path) -> None:
    path = fill(tmp_path / "t")
    victim = only_part(path, folder)
    flip(victim, int(victim.stat().st_size * share))
    refused(path, str(victim), "corrupted")
    found = describe(path)
    assert len(found["problems"]) == 1
    assert str(victim) in found["problems"][0]


@pytest.mark.parametrize("folder", ["parts", "features"])
def test_truncated_and_missing_files_are_found_on_opening(folder: str, tmp_path: Path) -> None:
    path = fill(tmp_path / "t")
    victim = only_part(path, folder)
    os.truncate(victim, victim.stat().st_size - 1)
    refused(path, str(victim), "truncated")
    victim.unlink()
    refused(path, str(victim), "No such file")


def test_a_manifest_cut_short_is_found(tmp_path: Path) -> None:
    path = fill(tmp_path / "t")
    manifest = path / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join(lines[:2]))
    refused(path, str(manifest), "truncated", "2 prompts")
    manifest.write_bytes(b"".join(lines[:2]) + lines[2][:-1])
    refused(path, str(manifest), "truncated")
    manifest.unlink()
    refused(path, str(manifest))


@pytest.mark.parametrize("junk", [b"{]\n", b"[]\n", b"{}\n", b'{"prompt": "x", "part": 3}\n', b"\xff\xfe\n"])
def test_a_junk_line_of_the_manifest_is_named(junk: bytes, tmp_path: Path) -> None:
    path = fill(tmp_path / "t")
    manifest = path / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(lines[0] + junk + lines[2])
    refused(path, f"{manifest}:2")


def test_a_prompt_twice_and_a_path_out_of_the_trace_are_refused(tmp_path: Path) -> None:
    path = fill(tmp_path / "t")
    manifest = path / "manifest.jsonl"
    good = manifest.read_bytes()
    manifest.write_bytes(good + good.splitlines(keepends=True)[0])
    refused(path, f"{manifest}:4", "twice")
    manifest.write_bytes(good.replace(b"parts/", b"../"))
    refused(path, f"{manifest}:1", "leads out")


def test_a_part_of_another_model_is_named(tmp_path: Path) -> None:
    path = fill(tmp_path / "t")
    other = fill(tmp_path / "u", make_header(features=FEATURES, model="b" * 32))
    victim = only_part(path)
    shutil.copy(only_part(other), victim)
    lines = (other / "manifest.jsonl").read_text().splitlines()
    mine = (path / "manifest.jsonl").read_text().splitlines()
    (path / "manifest.jsonl").write_text("\n".join([mine[0], lines[1], mine[2]]) + "\n")
    shutil.copy(only_part(other, "features"), only_part(path, "features"))
    refused(path, str(victim), "another model", "b" * 32, "a" * 32)


def test_a_part_of_another_prompt_or_layout_is_named(tmp_path: Path) -> None:
    path = fill(tmp_path / "t")
    lines = [json.loads(line) for line in (path / "manifest.jsonl").read_text().splitlines()]
    lines[0]["part"], lines[1]["part"] = lines[1]["part"], lines[0]["part"]
    (path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    refused(path, lines[0]["part"]["file"], "prompt", "code/0", "code/1")
    other = fill(tmp_path / "u", make_header((8, 8, 9), features=FEATURES))
    shutil.copy(other / "trace.json", path / "trace.json")
    refused(path, "layout")


def test_a_parquet_file_that_is_no_part_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from foregate.trace.format import checksum

    path = fill(tmp_path / "t")
    lines = [json.loads(line) for line in (path / "manifest.jsonl").read_text().splitlines()]
    victim = path / lines[1]["part"]["file"]
    for content in (pa.table({"a": [1]}), None):
        victim.write_bytes(b"PAR1 and nothing else PAR1") if content is None else pq.write_table(content, victim)
        content_bytes = victim.read_bytes()
        lines[1]["part"] |= {"bytes": len(content_bytes), "xxh3": checksum(content_bytes)}
        (path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        refused(path, str(victim), "part")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda raw: raw.update(format="foregate-trace/2"), "'foregate-trace/2' is not known"),
        (lambda raw: raw.pop("format"), "format"),
        (lambda raw: raw["model"].update(top_k=[2, 2, 3]), "layout"),
        (lambda raw: raw["model"].update(top_k=[2, 2]), "same length"),
        (lambda raw: raw["model"].update(experts_per_layer=[8, -1, 8]), "experts_per_layer"),
        (lambda raw: raw["model"].update(hidden_size=True), "hidden_size"),
        (lambda raw: raw.update(timings=["lunch_ns"]), "lunch_ns"),
        (lambda raw: raw["features"]["residual"].update(dtype="int4"), "int4"),
        (lambda raw: raw.update(runs={}), "runs"),
        (lambda raw: raw.update(complete={"prompts": 3, "rows": 1}), "rows"),
    ],
)
def test_a_wrong_header_is_named(change: Callable[[dict[str, Any]], Any], word: str, tmp_path: Path) -> None:
    path = fill(tmp_path / "t")
    edit(path / "trace.json", change)
    refused(path, str(path), word)


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "absent")
    refused(tmp_path, "trace.json", "is missing")
    (tmp_path / "trace.json").write_text("{")
    refused(tmp_path, "trace.json", "not JSON")
    refused(tmp_path / "trace.json", "trace.json is a file")


def test_an_unfinished_trace_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    header = make_header()
    path = write(tmp_path / "t", header, [make_record(header, f"code/{n}") for n in range(3)], finish=False)
    with (path / "manifest.jsonl").open("ab") as file:
        file.write(b'{"prompt": "code/3", "dom')
    reader = TraceReader(path)
    assert not reader.complete
    assert [part.prompt for part in reader] == ["code/0", "code/1", "code/2"]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    path = fill(tmp_path / "t")
    with pytest.raises(TraceError, match=r"not empty.*--resume"):
        TraceWriter(path)
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "thesis.tex").write_text("years of work")
    with pytest.raises(TraceError, match=r"thesis\.tex"):
        TraceWriter(tmp_path / "u", resume=True)
    with pytest.raises(TraceError, match="is a file"):
        TraceWriter(tmp_path / "u" / "thesis.tex")
    (path / "manifest.jsonl").unlink()
    with pytest.raises(TraceError, match=r"not in manifest\.jsonl"):
        TraceWriter(path, resume=True)
    assert len(list((path / "parts").iterdir())) == 3


def test_two_writers_are_one_too_many(tmp_path: Path) -> None:
    header = make_header()
    with TraceWriter(tmp_path / "t") as writer:
        writer.begin(header)
        with pytest.raises(TraceError, match="another process is writing"):
            TraceWriter(tmp_path / "t", resume=True)
    with TraceWriter(tmp_path / "t", resume=True) as writer:
        assert writer.done == set()


def test_other_work_is_not_mixed_in(tmp_path: Path) -> None:
    header = make_header()
    path = write(tmp_path / "t", header, [make_record(header)])

    def resumed(run: Any = header.runs[0], **changes: Any) -> None:
        with TraceWriter(path, resume=True) as writer:
            writer.begin(replace(header, runs=(run,), **changes))

    with pytest.raises(TraceError, match="is a trace of made up"):
        resumed(model=replace(header.model, fingerprint="b" * 32))
    with pytest.raises(TraceError, match="other columns"):
        resumed(timings=("experts_ns",))
    for change, word in (
        ({"seed": 4}, "seed 3, not 4"),
        ({"source": "vllm"}, "source 'test', not 'vllm'"),
        ({"dataset": {"name": "made up", "xxh3": "2"}}, "dataset xxh3 '1', not '2'"),
        ({"settings": {"max_new_tokens": 5}}, "settings max_new_tokens 4, not 5"),
    ):
        with pytest.raises(TraceError, match=word):
            resumed(replace(header.runs[0], **change))
    resumed(replace(header.runs[0], created="later"))
    assert len(TraceReader(path).header.runs) == 1
    resumed(replace(header.runs[0], software={"foregate": "1"}))
    reader = TraceReader(path)
    assert [run.software["foregate"] for run in reader.header.runs] == ["0", "1"]
    assert not reader.complete


def test_a_full_disk_is_one_line_and_costs_nothing_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = make_header()
    write_all = durable.write_all

    def full(handle: int, content: bytes) -> None:
        write_all(handle, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with TraceWriter(tmp_path / "t") as writer:
        writer.begin(header)
        writer.add(make_record(header, "code/0"))
        for place in ("foregate.trace.durable.write_all", "foregate.trace.manifest.write_all"):
            with monkeypatch.context() as patched:
                patched.setattr(place, full)
                with pytest.raises(TraceError, match="No space left on device"):
                    writer.add(make_record(header, "code/1"))
        writer.add(make_record(header, "code/1"))
        writer.finish()
    assert [part.prompt for part in TraceReader(tmp_path / "t")] == ["code/0", "code/1"]
    assert describe(tmp_path / "t")["problems"] == []
