"""The model on the meta device, and the modules in it that hold the routed experts. No weight is read.

Shapes: E experts of a layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, initialization
from transformers.core_model_loading import build_glob_alternation

from foregate.checkpoint.reason import reason
from foregate.errors import UnsupportedModelError

DISPATCHED_FLAGS = ("is_transposed", "has_gate", "has_bias", "_is_expert_parallel")
"""Instance attributes set by transformers' ``use_experts_implementation``: the module goes through ExpertsInterface."""

EXTRA_CLASSES = ("Llama4TextExperts",)
"""Experts modules that are not dispatched by transformers, but have the same fused 3-D parameters."""

_LAYER_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_LOOKS_MOE = re.compile(r"experts?($|[A-Z])|moe|sparsemlp|FFNWithRouter", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ExpertsModule:
    """One MoE layer: the module at ``path`` of decoder layer ``layer``; ``params`` are [E, ...], in module order."""

    path: str
    layer: int
    module: nn.Module
    params: dict[str, nn.Parameter]

    @property
    def experts(self) -> int:
        """E, from the parameters: configs count experts that have no weights (zero experts, skips) too."""
        return int(next(iter(self.params.values())).shape[0])

    @property
    def transposed(self) -> bool:
        """True where matrices are [inputs, outputs]."""
        return bool(getattr(self.module, "is_transposed", type(self.module).__name__ in EXTRA_CLASSES))


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The whole model without memory, and its MoE layers in execution order."""

    model: PreTrainedModel
    config: PretrainedConfig
    dtype: torch.dtype
    moe: tuple[ExpertsModule, ...]

    def loaded_dtype(self, name: str, tensor: torch.Tensor) -> torch.dtype:
        """What ``from_pretrained`` loads the parameter ``name`` in: some families keep some of them in float32."""
        kept = self.model._get_dtype_plan(self.dtype)
        upcast = bool(kept) and build_glob_alternation(list(kept))[0].search(name) is not None
        return torch.float32 if upcast else tensor.dtype

    @property
    def dense_bytes(self) -> int:
        """Bytes of everything but the routed experts, once loaded; tied weights count once."""
        experts = {id(param) for module in self.moe for param in module.params.values()}
        stored = self.model.state_dict(keep_vars=True)
        unique = {id(tensor): (name, tensor) for name, tensor in stored.items() if id(tensor) not in experts}
        return sum(tensor.numel() * self.loaded_dtype(name, tensor).itemsize for name, tensor in unique.values())


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> Skeleton:
    """The model of ``config`` on the meta device, in ``dtype``.

    Raises UnsupportedModelError if it is not a Mixture-of-Experts model, or keeps its experts in a form of its own.
    """
    with torch.device("meta"), initialization.no_init_weights(), initialization.meta_device_safe_creation_ops():
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        # a config whose numbers do not fit together fails in the constructors, in any of these ways
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, ZeroDivisionError) as error:
            raise UnsupportedModelError(f"model type {config.model_type!r} cannot be built: {reason(error)}") from error
    model.tie_weights()
    modules = [_experts_module(path, module) for path, module in model.named_modules() if _holds_experts(module)]
    if not modules:
        raise UnsupportedModelError(_refusal(model, config.model_type))
    # stable: two experts modules of one layer stay in the order of the module tree
    return Skeleton(model, config, dtype, tuple(sorted(modules, key=lambda module: module.layer)))


def _holds_experts(module: nn.Module) -> bool:
    attributes = vars(module)
    return all(flag in attributes for flag in DISPATCHED_FLAGS) or type(module).__name__ in EXTRA_CLASSES


def _experts_module(path: str, module: nn.Module) -> ExpertsModule:
    # a vector with one number an expert is a scale, not a matrix or bias of an expert: it stays with the dense weights
    params = {name: param for name, param in module.named_parameters(recurse=False) if param.ndim >= 2}
    counts = {param.shape[0] for param in params.values()}
    if len(counts) != 1:
        message = f"{path} ({type(module).__name__}) has parameters for different numbers of experts: {sorted(counts)}"
        raise UnsupportedModelError(message)
    found = _LAYER_INDEX.search(path)
    return ExpertsModule(path, int(found.group(1)) if found else 0, module, params)


def _refusal(model: PreTrainedModel, model_type: str) -> str:
    names = {type(module).__name__ for module in model.modules() if module is not model}
    suspects = sorted(name for name in names if _LOOKS_MOE.search(name) and _own_experts(model, name))
    if suspects:
        return f"model type {model_type!r} keeps its experts in a form that is not supported ({', '.join(suspects)})"
    return f"model type {model_type!r} is not a Mixture-of-Experts model: it has no experts to predict or prefetch"


def _own_experts(model: PreTrainedModel, class_name: str) -> bool:
    """Whether the class may hold experts; one that is named after the family ("…MoeModel") says nothing."""
    family = type(model).__name__.removesuffix("ForCausalLM")
    return class_name != family and not class_name.endswith(("Model", "RotaryEmbedding", "RMSNorm", "Attention"))
