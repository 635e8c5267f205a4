"""Do the tensors outside the experts fit the model's parameters and buffers? From headers alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from foregate.checkpoint.dtypes import DENSE_FLOATS
from foregate.checkpoint.renaming import Renamed, Target
from foregate.errors import CheckpointError
from foregate.types import Segment


def check_dense(
    parameters: Mapping[str, torch.Tensor], renamed: Renamed, tensors: Mapping[str, Segment], dense: Collection[str]
) -> None:
    """Compare the tensors named in ``dense`` with the ``parameters`` (a state dict) that they are loaded into.

    Raises CheckpointError naming the tensor where a floating-point parameter would be filled with anything else, or
    where a tensor that only changes its name has another shape. Shapes that are converted are left to transformers.
    """
    kept = set(dense)
    for target in renamed.targets.values():
        parameter = parameters[target.parameter]
        sources = [tensors[name] for names in target.sources.values() for name in names if name in kept]
        for tensor in sources:
            if parameter.is_floating_point() and tensor.dtype not in DENSE_FLOATS:
                message = f"{tensor.path}: tensor {tensor.tensor!r} is {tensor.dtype}, but {target.parameter} holds"
                raise CheckpointError(f"{message} floating-point numbers; supported: {', '.join(DENSE_FLOATS)}")
        if len(sources) == 1:
            _check_shape(target, sources[0], tuple(parameter.shape))


def _check_shape(target: Target, tensor: Segment, wanted: tuple[int, ...]) -> None:
    if target.converter is None and tensor.shape != wanted:
        message = f"{tensor.path}: tensor {tensor.tensor!r} is {list(tensor.shape)}, but by config.json"
        raise CheckpointError(f"{message} {target.parameter} is {list(wanted)}")
