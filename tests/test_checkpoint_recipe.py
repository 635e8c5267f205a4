"""Conversions expert by expert are the conversions of all experts together, for every operation that is allowed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    Transpose,
    WeightConverter,
)

from foregate.checkpoint.layout import gaps, lay_out
from foregate.checkpoint.recipe import Recipe, Source, plan
from foregate.errors import CheckpointError, UnsupportedModelError
from foregate.types import ParamLayout, Segment

E = 5


def segment(name: str, shape: tuple[int, ...], offset: int = 0) -> Segment:
    return Segment("x.safetensors", name, offset, 4 * torch.Size(shape).numel(), "F32", shape)


def param(*shape: int) -> ParamLayout:
    return lay_out([("gate_up_proj", "F32", shape)]).params[0]


def convert(converter: WeightConverter, tensors: dict[str, list[torch.Tensor]], shape: tuple[int, ...]) -> torch.Tensor:
    """What transformers makes of all experts together."""
    model = SimpleNamespace(get_parameter=lambda name: torch.empty(shape, device="meta"))
    result = dict(tensors)
    for operation in converter.operations:
        result = operation.convert(
            result,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name="p",
            model=model,
        )
    value = next(iter(result.values()))
    return value[0] if isinstance(value, list) else value


def check(
    patterns: list[str], operations: list[ConversionOps], part: tuple[int, ...], whole: tuple[int, ...]
) -> Recipe:
    """Compare ``make`` for every expert with ``convert``; parts have shape ``part``, the parameter ``whole``."""
    merges = isinstance(operations[0], MergeModulelist)
    converter = WeightConverter(patterns, "experts.p", operations)
    torch.manual_seed(0)
    data = {pattern: torch.randn(E, *part) for pattern in patterns}
    sources = []
    for pattern in reversed(patterns):  # the order in the checkpoint is not the order of the patterns
        tensors = [segment(f"{pattern}{i}", part) for i in range(E)] if merges else [segment(pattern, (E, *part))]
        sources.append(Source(pattern, tuple(tensors), fused=not merges))
    recipe = plan(param(*whole), E, tuple(sources), converter, "family")
    wanted = convert(converter, {p: list(t) if merges else [t] for p, t in data.items()}, (E, *whole))
    for expert in range(E):
        made = recipe.make([data[source.pattern][expert] for source in recipe.sources])
        assert torch.equal(made, wanted[expert])
    return recipe


def test_merge_and_concatenate_only_copy() -> None:
    recipe = check(["a.*.w", "b.*.w"], [MergeModulelist(0), Concatenate(1)], (4, 6), (8, 6))
    assert recipe.copies
    assert [source.pattern for source in recipe.sources] == ["a.*.w", "b.*.w"]


def test_concatenate_along_the_last_dimension_does_not() -> None:
    assert not check(["a.*.w", "b.*.w"], [MergeModulelist(0), Concatenate(2)], (4, 6), (4, 12)).copies


def test_fused_concatenate_only_copies() -> None:
    assert check(["a.w", "b.w"], [Concatenate(1)], (4, 6), (8, 6)).copies


def test_transpose() -> None:
    assert not check(["a.w"], [Transpose(1, 2)], (4, 6), (6, 4)).copies


def test_merge_then_transpose() -> None:
    check(["a.*.w"], [MergeModulelist(0), Transpose(1, 2)], (4, 6), (6, 4))


def test_transpose_that_checks_the_shape_does_nothing_where_it_fits() -> None:
    assert check(["a.w"], [Transpose(1, 2, check_dims=True)], (4, 6), (4, 6)).copies


def test_transpose_that_checks_the_shape_transposes_where_it_does_not() -> None:
    check(["a.w"], [Transpose(1, 2, check_dims=True)], (4, 6), (6, 4))


@pytest.mark.parametrize("inverse", [False, True])
def test_interleave(inverse: bool) -> None:
    check(["a.w"], [Interleave(1, inverse=inverse)], (4, 6), (4, 6))


def test_merge_concatenate_interleave_transpose() -> None:
    operations = [MergeModulelist(0), Concatenate(1), Interleave(1), Transpose(1, 2)]
    check(["a.*.w", "b.*.w"], operations, (4, 6), (6, 8))


@pytest.mark.parametrize(
    "operation",
    [Concatenate(0), Transpose(0, 1), Interleave(0), MergeModulelist(1), Chunk(1), PermuteForRope(), Transpose(-1, -2)],
)
def test_operations_that_may_mix_experts_are_refused(operation: ConversionOps) -> None:
    converter = WeightConverter("a.w", "experts.p", [operation])
    source = Source("a.w", (segment("a.w", (E, 4, 6)),), fused=True)
    with pytest.raises(UnsupportedModelError, match=f"'family' converts its experts with {type(operation).__name__}"):
        plan(param(4, 6), E, (source,), converter, "family")


def test_subclasses_of_allowed_operations_are_not_allowed() -> None:
    class Surprise(Transpose):
        pass

    source = Source("a.w", (segment("a.w", (E, 4, 6)),), fused=True)
    with pytest.raises(UnsupportedModelError, match="Surprise"):
        plan(param(6, 4), E, (source,), WeightConverter("a.w", "experts.p", [Surprise(1, 2)]), "family")


def test_shapes_that_cannot_be_joined() -> None:
    converter = WeightConverter(["a.w", "b.w"], "experts.p", [Concatenate(1)])
    sources = [Source("a.w", (segment("a.w", (E, 4, 6)),), True), Source("b.w", (segment("b.w", (E, 4, 7)),), True)]
    with pytest.raises(CheckpointError, match=r"x\.safetensors: a\.w .* Concatenate\(dim=1\) fails"):
        plan(param(8, 6), E, tuple(sources), converter, "family")


def test_slices_of_a_fused_tensor() -> None:
    source = Source("a.w", (segment("a.w", (E, 4, 6), offset=1000),), fused=True)
    last = source.segment(E - 1)
    assert (last.offset, last.nbytes, last.shape) == (1000 + (E - 1) * 96, 96, (4, 6))
    assert source.largest == 96


def test_layout_is_aligned_and_its_gaps_are_known() -> None:
    layout = lay_out([("a", "BF16", (3, 11)), ("b", "F32", (5,)), ("c", "BF16", (32,))])
    assert [param.offset for param in layout.params] == [0, 128, 192]
    assert layout.nbytes == 4096
    assert layout.weight_bytes == 66 + 20 + 64
    assert gaps(layout) == [(66, 128), (148, 192), (256, 4096)]


def test_a_full_block_has_no_gap() -> None:
    layout = lay_out([("a", "U8", (4096,))])
    assert layout.nbytes == 4096
    assert gaps(layout) == []
