"""Self-attention of one decoded token, its four matrices included, in one or two calls of the kernels (``block.h``).

Shapes: D hidden, H heads, G key/value heads, W width of a head, S positions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from foregate.native.kernels import check, loaded, num_threads
from foregate.native.matrix import Matrix


class HeadNorm(ctypes.Structure):
    """``head_norm`` of block.h."""

    _fields_ = [("weight", c_void_p), ("width", c_int32), ("epsilon", c_float)]


class _Block(ctypes.Structure):
    """``attention_block`` of block.h."""

    _fields_ = [
        *((name, Matrix) for name in ("q", "k", "v", "o")),
        *((f"{name}_bias", c_void_p) for name in ("q", "k", "v", "o")),
        *((f"{name}_norm", HeadNorm) for name in ("q", "k")),
        *((name, c_int32) for name in ("heads", "shared", "width")),
        ("scale", c_float),
    ]


@dataclass(frozen=True, slots=True)
class Heads:
    """How a token's query, key and value are divided, and what attention scores are multiplied by."""

    heads: int
    shared: int
    width: int
    scale: float


class AttentionBlock:
    """The matrices (q, k, v, o), their biases (bf16) and the norms of queries and keys (weight, epsilon).

    Matrices are bf16 or int8, those of q, k and v of one dtype. A norm is W wide, or as wide as all heads together.
    """

    def __init__(
        self,
        heads: Heads,
        matrices: Sequence[Matrix],
        biases: Sequence[Tensor | None],
        norms: Sequence[tuple[Tensor, float] | None],
    ) -> None:
        self._kept = (biases, norms)
        made = [HeadNorm() if n is None else HeadNorm(n[0].data_ptr(), len(n[0]), n[1]) for n in norms]
        pointers = [None if bias is None else bias.data_ptr() for bias in biases]
        self._block = _Block(*matrices, *pointers, *made, heads.heads, heads.shared, heads.width, heads.scale)
        self.at = ctypes.addressof(self._block)
        self.shared, self.width = heads.shared, heads.width
        self._queries = (1, heads.heads, 1, heads.width)
        self._keys = (1, heads.shared, 1, heads.width)
        self._out = (1, 1, matrices[3].rows)
        self.inputs, self.outputs = matrices[0].columns, matrices[3].rows
        library = loaded()
        self._qkv, self._attend, self._whole = (
            library.foregate_qkv, library.foregate_attend_out, library.foregate_attention
        )  # fmt: skip

    def takes(self, x: Tensor, cos: Tensor, sin: Tensor) -> bool:
        """Whether ``qkv`` does."""
        turned = cos.shape[-1]
        return (
            x.dtype is cos.dtype is sin.dtype is torch.bfloat16
            and x.shape == (1, 1, self.inputs)
            and cos.shape == sin.shape == (1, 1, turned)
            and turned % 2 == 0
            and turned <= self._queries[3]
            and x.is_contiguous()
            and cos.is_contiguous()
            and sin.is_contiguous()
        )

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [1, H, 1, W], key and value [1, G, 1, W] of ``x`` [1, 1, D], turned by ``cos`` and ``sin`` [1, 1, R].

        All bf16 and contiguous; R is even and at most W. Raises as ``check``.
        """
        bf16 = torch.bfloat16
        query, key = torch.empty(self._queries, dtype=bf16), torch.empty(self._keys, dtype=bf16)
        value = torch.empty(self._keys, dtype=bf16)
        code = self._qkv(
            self.at, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[2],
            query.data_ptr(), key.data_ptr(), value.data_ptr(), num_threads(),
        )  # fmt: skip
        check(code)
        return query, key, value

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor, place: tuple[int, ...]) -> Tensor:
        """``qkv`` and ``attend`` in one. ``place``: addresses and strides (of a head, of a row) of the keys and of the
        values of S positions, and S; the last of them are written to."""
        out = torch.empty(self._out, dtype=torch.bfloat16)
        code = self._whole(
            self.at, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[2], *place, out.data_ptr(), num_threads()
        )
        check(code)
        return out

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Output [1, 1, D] for ``query`` over ``key`` and ``value`` [1, G, S, W] (bf16, rows of stride 1)."""
        out = torch.empty(self._out, dtype=torch.bfloat16)
        _, k_head, k_row, _ = key.stride()
        _, v_head, v_row, _ = value.stride()
        code = self._attend(
            self.at, query.data_ptr(), key.data_ptr(), k_head, k_row,
            value.data_ptr(), v_head, v_row, key.shape[2], out.data_ptr(), num_threads(),
        )  # fmt: skip
        check(code)
        return out
