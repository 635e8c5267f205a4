"""Keys and values that grow in place: what transformers' own cache holds, without a copy a token."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from foregate.engine.kv_room import BLOCK, RoomyLayer, make_room
from foregate.native import kernels

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="the kernels are not built")


def states(positions: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    maker = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, 2, positions, 16, generator=maker).to(dtype) for _ in range(2))
    return keys, values


def caches(positions: int) -> tuple[DynamicCache, DynamicCache]:
    """transformers' own, and one with room, both with ``positions``."""
    own, ours = DynamicCache(), DynamicCache()
    for cache in (own, ours):
        cache.update(*states(positions), 0)
    make_room(ours)
    assert type(ours.layers[0]) is RoomyLayer
    return own, ours


def test_every_position_is_kept_over_several_blocks() -> None:
    own, ours = caches(BLOCK - 3)
    for step in range(2 * BLOCK):
        wanted, found = (cache.update(*states(1 + step % 2, step), 0) for cache in (own, ours))
        assert all(map(torch.equal, wanted, found))
    assert ours.get_seq_length() == own.get_seq_length() == 4 * BLOCK - 3


def test_a_token_copies_nothing_and_the_room_is_at_most_a_block() -> None:
    _, ours = caches(40)
    addresses = set()
    for step in range(BLOCK):
        keys, values = ours.update(*states(1, step), 0)
        addresses.add((keys.data_ptr(), values.data_ptr()))
        held = keys.untyped_storage().nbytes() // (2 * 16 * 2)
        assert keys.shape[2] <= held <= keys.shape[2] + BLOCK
    assert len(addresses) == 2  # 41 to 127 positions, then up to 255


def test_what_was_cropped_or_reordered_goes_on() -> None:
    own, ours = caches(10)
    changes: list[Callable[[Any], None]] = [
        lambda cache: cache.crop(-4),
        lambda cache: cache.reorder_cache(torch.tensor([0])),
        lambda cache: cache.reset(),
    ]
    for change in changes:
        for cache in (own, ours):
            cache.update(*states(3, 1), 0)
            change(cache)
        for seed in (2, 3):
            wanted, found = (cache.update(*states(2, seed), 0) for cache in (own, ours))
            assert all(map(torch.equal, wanted, found))


def test_what_the_kernels_do_not_attend_to_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DynamicCache()
    cache.update(*states(4, dtype=torch.float32), 0)
    cache.layers.append(DynamicSlidingWindowLayer(8))
    cache.update(*states(4), 1)
    cache.layers.append(DynamicLayer())
    make_room(cache)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer, DynamicSlidingWindowLayer, DynamicLayer]
    monkeypatch.setattr(kernels, "library", lambda: None)
    cache.update(*states(4), 2)
    make_room(cache)
    assert type(cache.layers[2]) is DynamicLayer


def test_positions_that_others_write_to_are_kept_too() -> None:
    own, ours = caches(BLOCK - 3)
    layer = ours.layers[0]
    for step in range(BLOCK):
        new = states(1, step)
        own.update(*new, 0)
        place = layer.place(2, 16)
        assert place == layer.place(2, 16)
        assert place[-1] == own.get_seq_length()
        for (at, head, row), added in zip((place[:3], place[3:6]), new, strict=True):
            for group in range(2):
                written = added[0, group, 0].contiguous()
                ctypes.memmove(at + 2 * (group * head + (place[-1] - 1) * row), written.data_ptr(), 2 * 16)
        assert layer.get_seq_length() == own.get_seq_length() - 1
        layer.grow()
    assert all(map(torch.equal, (own.layers[0].keys, own.layers[0].values), (layer.keys, layer.values)))
    assert ours.get_seq_length() == own.get_seq_length() == 2 * BLOCK - 3


def test_a_place_is_found_again_after_a_crop() -> None:
    _, ours = caches(BLOCK)
    layer = ours.layers[0]
    before = layer.place(2, 16)
    layer.grow()
    ours.crop(-4)
    after = layer.place(2, 16)
    assert after[-1] == BLOCK - 2
    assert after[0] != before[0]


@pytest.mark.parametrize(("heads", "width"), [(1, 16), (2, 8)])
def test_other_heads_have_no_place(heads: int, width: int) -> None:
    assert caches(5)[1].layers[0].place(heads, width) is None


def test_copies_go_their_own_ways() -> None:
    _, ours = caches(5)
    ours.layers[0].place(2, 16)
    for twin in (copy.deepcopy(ours), copy.deepcopy(ours)):
        place = twin.layers[0].place(2, 16)
        assert place[0] != ours.layers[0].place(2, 16)[0]
        twin.layers[0].grow()
    assert ours.get_seq_length() == 5
    shallow = copy.copy(ours.layers[0])
    shallow.grow()
    assert (shallow.get_seq_length(), ours.get_seq_length()) == (6, 5)


def test_states_of_another_form_leave_the_length_as_it_was() -> None:
    _, ours = caches(5)
    with pytest.raises(RuntimeError):
        ours.update(torch.zeros(1, 2, 1, 8, dtype=torch.bfloat16), torch.zeros(1, 2, 1, 8, dtype=torch.bfloat16), 0)
    assert ours.get_seq_length() == 5
    assert torch.equal(ours.layers[0].keys, states(5)[0])
