"""Typed views over slots: no copies, made once for a slot and a layout."""

from __future__ import annotations

import torch

from foregate.experts.compute import SlotViews
from foregate.experts.slots import SlotPool
from foregate.types import ExpertLayout, ParamLayout


def layout(rows: int) -> ExpertLayout:
    return ExpertLayout((ParamLayout("down_proj", "F32", (rows, 4), 0, 16 * rows),), 4096)


def test_layers_of_equal_layout_share_the_views_of_a_slot() -> None:
    pool = SlotPool(3, 4096)
    views, one, same, other = SlotViews(pool), layout(2), layout(2), layout(3)
    found = views.weights(1, one)
    assert found is views.weights(1, one)
    assert found is views.weights(1, same)
    assert found is not views.weights(2, same)
    assert [tuple(views.weights(1, each).tensors["down_proj"].shape) for each in (one, other)] == [(2, 4), (3, 4)]
    pool.view(1)[:] = bytes(4096)
    found.tensors["down_proj"].fill_(1.0)
    assert torch.frombuffer(pool.view(1), dtype=torch.float32)[:8].sum() == 8
    views.clear()
    assert views.weights(1, one) is not found
