"""Activations and norms in numpy, as the trainers have them in torch. None overflows."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def sigmoid(x: Floats) -> Floats:
    out: Floats = x * 0.5
    np.tanh(out, out=out)
    out *= 0.5
    out += 0.5
    return out


def silu(x: Floats) -> Floats:
    out = sigmoid(x)
    out *= x
    return out


def gelu(x: Floats) -> Floats:
    """The tanh form."""
    inner = np.float32(0.7978845608) * (x + np.float32(0.044715) * x * x * x)
    out: Floats = np.float32(0.5) * x * (1 + np.tanh(inner))
    return out


def relu(x: Floats) -> Floats:
    out: Floats = np.maximum(x, np.float32(0))
    return out


def unit_rms(x: Floats) -> Floats:
    """``x`` [..., D] divided by its root mean square over the last axis."""
    mean = np.einsum("...d,...d->...", x, x)[..., None] / np.float32(x.shape[-1])
    out: Floats = x / np.sqrt(mean + np.float32(1e-9))
    return out


def inverse_rms(x: Floats) -> float:
    """What ``unit_rms`` multiplies ``x`` [D] with."""
    return 1 / math.sqrt(float(x.dot(x)) / len(x) + 1e-9)


def layer_norm(x: Floats, weight: Floats, bias: Floats) -> Floats:
    """Over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    out: Floats = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + np.float32(1e-5)) * weight + bias
    return out


def softmax(x: Floats) -> Floats:
    """Over the last axis."""
    grown = np.exp(x - x.max(-1, keepdims=True))
    out: Floats = grown / grown.sum(-1, keepdims=True)
    return out
