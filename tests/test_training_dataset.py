"""Traces as training data: what was written comes back, mapped, and no text is on two sides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from foregate.errors import ConfigError, TraceError
from foregate.testing.routing import made_trace
from foregate.trace.reader import TraceReader
from foregate.training.dataset import SIDES, TEST, TRAIN, VALIDATION, Dataset, side
from foregate.training.trainer import Options, parse_options


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_trace(tmp_path_factory.mktemp("trace") / "t", prompts=40, seed=1)


@pytest.fixture
def data(trace: Path, tmp_path: Path) -> Iterator[Dataset]:
    return Dataset([trace], tmp_path / "scratch", features=("residual", "router_input"))


def test_prompts_come_back_as_they_were_traced(data: Dataset, trace: Path) -> None:
    parts = {part.prompt: part for part in TraceReader(trace).parts(order="weight")}
    seen = 0
    for where in SIDES:
        for prompt in data.prompts(where):
            part = parts[prompt.name]
            assert side(part.entry) == where
            np.testing.assert_array_equal(prompt.experts, part.grid(part.experts))
            np.testing.assert_array_equal(prompt.weights, part.grid(part.weights).astype(np.float16))
            np.testing.assert_array_equal(prompt.scores, part.grid(part.scores).astype(np.float16))
            np.testing.assert_array_equal(prompt.feature("residual"), part.grid(part.feature("residual")))
            np.testing.assert_array_equal(prompt.feature("residual", slice(2, 4)), prompt.feature("residual")[2:4])
            np.testing.assert_array_equal(prompt.token_id, part.grid(part.token_id)[:, 0])
            seen += 1
    assert seen == 40
    assert all(data.count(where) for where in SIDES)


def test_the_same_text_is_on_one_side_under_any_name_and_in_any_trace(tmp_path: Path) -> None:
    first = made_trace(tmp_path / "a", prompts=20, seed=1, name="a")
    second = made_trace(tmp_path / "b", prompts=20, seed=1, name="b")
    data = Dataset([first, second], tmp_path / "scratch")
    texts = {where: {prompt.content for prompt in data.prompts(where)} for where in SIDES}
    assert sum(len(found) for found in texts.values()) == 20
    assert not texts[TRAIN] & texts[VALIDATION]
    assert not (texts[TRAIN] | texts[VALIDATION]) & texts[TEST]


def test_blocks_hold_every_token_once_and_mark_where_prompts_begin(data: Dataset) -> None:
    blocks = list(data.blocks(TRAIN, 64, ("residual",), shuffle=(3, 0)))
    assert sum(block.tokens for block in blocks) == data.tokens(TRAIN)
    assert sum(int(block.first.sum()) for block in blocks) == data.count(TRAIN)
    assert all(block.features["residual"].shape[:2] == block.experts.shape[:2] for block in blocks)
    again = list(data.blocks(TRAIN, 64, ("residual",), shuffle=(3, 0)))
    other = list(data.blocks(TRAIN, 64, ("residual",), shuffle=(3, 1)))
    assert all((a.token_id == b.token_id).all() for a, b in zip(blocks, again, strict=True))
    assert [b.token_id.tolist() for b in blocks] != [b.token_id.tolist() for b in other]


def test_hash_depends_on_the_data_and_not_on_its_order(tmp_path: Path) -> None:
    first = made_trace(tmp_path / "a", prompts=12, seed=1, name="a")
    second = made_trace(tmp_path / "b", prompts=12, seed=2, name="b")
    both = Dataset([first, second], tmp_path / "s1").hash()
    assert Dataset([second, first], tmp_path / "s2").hash() == both
    assert Dataset([first], tmp_path / "s3").hash() != both


def test_a_feature_that_was_not_traced_is_named(tmp_path: Path) -> None:
    bare = made_trace(tmp_path / "bare", prompts=4, seed=1, features=())
    with pytest.raises(TraceError, match="traced without residual"):
        Dataset([bare], tmp_path / "scratch", features=("residual",))


def test_a_feature_file_with_one_changed_byte_is_refused(tmp_path: Path) -> None:
    path = made_trace(tmp_path / "t", prompts=3, seed=1)
    data = Dataset([path], tmp_path / "scratch", features=("residual",))
    for file in sorted((path / "features").iterdir()):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(TraceError, match="checksum"):
        [list(data.prompts(where)) for where in SIDES]


def test_traces_of_two_models_are_refused(tmp_path: Path) -> None:
    first = made_trace(tmp_path / "a", prompts=2, seed=1)
    second = made_trace(tmp_path / "b", prompts=2, seed=1, fingerprint="another")
    with pytest.raises(TraceError, match="another"):
        Dataset([first, second], tmp_path / "scratch")


@pytest.mark.parametrize(
    ("text", "message"), [("widow=3", "lookahead, seed"), ("seed=x", "seed='x' is no int"), ("seed", "not key=value")]
)
def test_an_option_that_nobody_reads_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_options(Options, [text])
