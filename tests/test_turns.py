"""Cosines and sines of many positions at a time: the bits of one by one, for every kind of rotary embedding."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from foregate.engine.turns import BLOCK, Positions

WIDTH = 32
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def rotary(kind: str) -> Any:
    config = Qwen3MoeConfig(
        hidden_size=64, num_attention_heads=2, head_dim=WIDTH, max_position_embeddings=128,
        rope_parameters={"rope_theta": 10000.0, **KINDS[kind]},
    )  # fmt: skip
    return Qwen3MoeRotaryEmbedding(config)


class Attention:
    """Takes everything."""

    def takes(self, x: Any, cos: Any, sin: Any) -> bool:
        return cos.shape == sin.shape == (1, 1, WIDTH)


def positions(module: Any) -> Positions:
    attention: Any = Attention()
    return Positions(module, attention, torch.zeros(1, 1, 64, dtype=torch.bfloat16))


def memory(at: int) -> torch.Tensor:
    return torch.frombuffer(bytearray((ctypes.c_char * (2 * WIDTH)).from_address(at).raw), dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_many_at_a_time_are_one_by_one(kind: str) -> None:
    given, plain = positions(rotary(kind)), rotary(kind)
    x = torch.zeros(1, 1, 64, dtype=torch.bfloat16)
    for position in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7, 500):
        wanted = plain(x, position_ids=torch.tensor([[position]]))
        assert all(map(torch.equal, given.at(position), wanted))
        turns = given.turns(position)
        assert turns is not None
        assert turns[2] == WIDTH
        for at, row in zip(turns, wanted, strict=False):
            assert torch.equal(memory(at), row[0, 0])


@pytest.mark.parametrize(("kind", "calls"), [("default", 1), ("yarn", 1), ("dynamic", BLOCK)])
@torch.no_grad()
def test_what_depends_on_the_length_is_asked_for_every_position(kind: str, calls: int) -> None:
    module = rotary(kind)
    given, asked = positions(module), []

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        asked.append(position_ids)
        return type(module).forward(module, x, position_ids)

    module.forward = forward
    for position in range(BLOCK):
        given.turns(position)
    assert len(asked) == calls


@torch.no_grad()
def test_a_rotary_embedding_that_was_changed_counts_from_the_next_text_on() -> None:
    module = rotary("default")
    given = positions(module)
    before = [part.clone() for part in given.at(5)]
    module.inv_freq.mul_(2)
    given.forget()
    assert not torch.equal(given.at(5)[0], before[0])


@torch.no_grad()
def test_one_whose_block_differs_is_asked_one_by_one() -> None:
    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> Iterator[torch.Tensor]:
        many = position_ids.shape[1]
        yield from (torch.full((1, many, WIDTH), float(many)).bfloat16() for _ in range(2))

    module = SimpleNamespace(rope_type="default", forward=lambda x, position_ids: tuple(forward(x, position_ids)))
    assert torch.equal(positions(module).at(3)[0], torch.ones(1, 1, WIDTH).bfloat16())
