"""The training twin of the reference model: Qwen3-MoE in plain torch, shaped for speed on a CPU.

The routed experts of a layer are stacked, each expert gets a fixed number of rows (its capacity), and a layer
is three `bmm`s whatever the router decides. `export.py` turns the parameters into a transformers checkpoint.

Shapes: T tokens of a step, B sequences, S positions, E experts, k chosen, C capacity (rows of an expert),
D hidden, F expert hidden, L layers, H heads, G key/value heads, d head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; the defaults are the shipped one (about 29.5 M parameters)."""

    vocab_size: int = 4096
    hidden_size: int = 256
    layers: int = 16
    experts: int = 32
    experts_per_token: int = 4
    expert_hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    max_positions: int = 2048

    def capacity(self, tokens: int, factor: float) -> int:
        """Rows reserved for one expert when `tokens` are routed; a multiple of 16, at most `tokens`."""
        wanted = int(tokens * self.experts_per_token / self.experts * factor)
        return min(tokens, -(-wanted // 16) * 16)


class LayerWeights(NamedTuple):
    """Leaf parameters of one layer; matrices are [out, in]."""

    input_norm: Tensor  # [D]
    qkv: Tensor  # [(H + 2G) d, D]
    q_norm: Tensor  # [d]
    k_norm: Tensor  # [d]
    output: Tensor  # [D, H d]
    post_norm: Tensor  # [D]
    router: Tensor  # [E, D]
    gate_up: Tensor  # [E, 2F, D]
    down: Tensor  # [E, D, F]


class Weights(NamedTuple):
    """All leaf parameters. The embedding is tied to the output head."""

    embedding: Tensor  # [V, D]
    final_norm: Tensor  # [D]
    layers: tuple[LayerWeights, ...]


class Routing(NamedTuple):
    """Which row of which expert serves which token. Slots are numbered expert * C + row."""

    slot: Tensor  # [T, k] slot of an assignment (an arbitrary one where it was dropped)
    kept: Tensor  # [T, k] bool, false where the expert was full
    assignment: Tensor  # [E C] flat assignment (token * k + choice) in a slot (0 where the slot is empty)
    filled: Tensor  # [E C] bool


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the order of the flat buffer."""
    hidden, head = config.hidden_size, config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_norm": (hidden,),
        "qkv": ((config.heads + 2 * config.kv_heads) * head, hidden),
        "q_norm": (head,),
        "k_norm": (head,),
        "output": (hidden, config.heads * head),
        "post_norm": (hidden,),
        "router": (config.experts, hidden),
        "gate_up": (config.experts, 2 * config.expert_hidden, hidden),
        "down": (config.experts, hidden, config.expert_hidden),
    }
    named: dict[str, tuple[int, ...]] = {"embedding": (config.vocab_size, hidden), "final_norm": (hidden,)}
    for index in range(config.layers):
        named.update({f"layers.{index}.{name}": shape for name, shape in layer.items()})
    return named


def gather(config: ModelConfig, named: dict[str, Tensor]) -> Weights:
    """The named parameters as the tuples that the forward pass reads."""
    layers = tuple(
        LayerWeights(*(named[f"layers.{index}.{field}"] for field in LayerWeights._fields))
        for index in range(config.layers)
    )
    return Weights(named["embedding"], named["final_norm"], layers)


def initial(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Seeded fp32 initial values; the projections back into the residual are scaled by 1/sqrt(2L)."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes(config).items():
        if name.endswith("norm"):
            yield name, torch.ones(shape)
            continue
        kind = name.rsplit(".", 1)[-1]
        scale = 0.02 if kind in ("embedding", "router") else 0.5 * float(shape[-1]) ** -0.5
        if kind in ("output", "down"):
            scale /= (2 * config.layers) ** 0.5
        yield name, torch.randn(shape, generator=generator) * scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As transformers' Qwen3MoeRMSNorm: statistics in fp32, the product in the type of `x`."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rope_tables(config: ModelConfig, positions: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [positions, d]."""
    power = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
    angles = torch.outer(torch.arange(positions, dtype=torch.float), 1.0 / config.rope_theta**power)
    doubled = torch.cat((angles, angles), dim=-1)
    return doubled.cos().to(dtype), doubled.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, heads, S, d]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def attention(config: ModelConfig, w: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Causal grouped-query attention of x [B, S, D] (already normed)."""
    batch, length, _ = x.shape
    head, heads, kv = config.head_dim, config.heads, config.kv_heads
    parts = F.linear(x, w.qkv).view(batch, length, heads + 2 * kv, head).transpose(1, 2)
    query, key, value = torch.split(parts, [heads, kv, kv], dim=1)
    query = rotate(rms_norm(query, w.q_norm, config.norm_eps), cos, sin)
    key = rotate(rms_norm(key, w.k_norm, config.norm_eps), cos, sin)
    key = key.repeat_interleave(heads // kv, dim=1)
    value = value.repeat_interleave(heads // kv, dim=1)
    # Plain products and a softmax: torch's fused CPU kernel took 39 % of a training step, this a fraction of it.
    scores = (query @ key.transpose(2, 3)).float() * head**-0.5
    hidden_future = torch.ones(length, length, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(hidden_future, float("-inf")).softmax(-1).to(x.dtype) @ value
    return F.linear(mixed.transpose(1, 2).reshape(batch, length, heads * head), w.output)


def route(chosen: Tensor, experts: int, capacity: int) -> Routing:
    """Assign slots to the chosen experts [T, k]; when an expert is full, its latest tokens are dropped."""
    flat = chosen.reshape(-1)
    slots = experts * capacity
    order = torch.argsort(flat, stable=True)
    counts = (flat[:, None] == torch.arange(experts)).sum(0)
    start = counts.cumsum(0) - counts
    row = torch.empty_like(flat).scatter(0, order, torch.arange(flat.numel()) - start[flat[order]])
    kept = row < capacity
    slot = flat * capacity + row.clamp(max=capacity - 1)
    rows = torch.arange(capacity)
    filled = rows < counts[:, None]
    assignment = order[torch.where(filled, start[:, None] + rows, 0).reshape(slots)]
    return Routing(slot.view_as(chosen), kept.view_as(chosen), assignment, filled.reshape(slots))


class Dispatch(torch.autograd.Function):
    """Rows of tokens [T, D] to slots [E C, D]. Both directions gather: a scatter is far slower on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor, kept: Tensor, assignment: Tensor) -> Tensor:
        ctx.save_for_backward(slot, kept)
        return x[assignment // slot.shape[1]]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        slot, kept = ctx.saved_tensors
        picked = grads[0][slot].float() * kept[..., None]
        return picked.sum(1).to(grads[0].dtype), None, None, None


class Combine(torch.autograd.Function):
    """Weighted sum of a token's k slots: slots [E C, D], weights [T, k] -> [T, D]."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: Tensor, slot: Tensor, kept: Tensor, assignment: Tensor, filled: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows, weights, slot, kept, assignment, filled)
        return (rows[slot].float() * (weights * kept)[..., None]).sum(1).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        rows, weights, slot, kept, assignment, filled = ctx.saved_tensors
        grad = grads[0]
        share = weights.reshape(-1)[assignment] * filled
        to_rows = (grad[assignment // slot.shape[1]].float() * share[:, None]).to(rows.dtype)
        to_weights = (rows[slot].float() * grad[:, None, :].float()).sum(-1) * kept
        return to_rows, to_weights.to(weights.dtype), None, None, None, None


def choose(config: ModelConfig, w: LayerWeights, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Router of x [T, D]: fp32 logits [T, E], normalised weights [T, k] (type of x), chosen experts [T, k]."""
    logits = F.linear(x, w.router).float()
    top, chosen = torch.topk(logits.softmax(-1), config.experts_per_token, dim=-1)
    return logits, (top / top.sum(-1, keepdim=True)).to(x.dtype), chosen


def experts(config: ModelConfig, w: LayerWeights, x: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """Routed experts of x [T, D]."""
    slot, kept, assignment, filled = routing
    rows = Dispatch.apply(x, slot, kept, assignment).view(config.experts, -1, config.hidden_size)  # type: ignore[no-untyped-call]
    gate, up = torch.bmm(rows, w.gate_up.transpose(1, 2)).chunk(2, dim=-1)
    out = torch.bmm(F.silu(gate) * up, w.down.transpose(1, 2)).view(-1, config.hidden_size)
    mixed: Tensor = Combine.apply(out, weights.float(), slot, kept, assignment, filled)  # type: ignore[no-untyped-call]
    return mixed


def router_losses(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Balance loss E * sum(load * mean probability) (1 when uniform), z-loss, load [E] (shares of the choices)."""
    count = logits.shape[-1]
    load = (chosen.reshape(-1)[:, None] == torch.arange(count)).float().mean(0)
    balance = count * (load * logits.softmax(-1).mean(0)).sum()
    return balance, logits.logsumexp(-1).pow(2).mean(), load


class LayerResult(NamedTuple):
    """What a layer returns; statistics are of this batch."""

    x: Tensor  # [B, S, D]
    balance: Tensor  # scalar
    z: Tensor  # scalar
    load: Tensor  # [E]
    dropped: Tensor  # scalar, share of the assignments


def layer(config: ModelConfig, capacity: int, w: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor) -> LayerResult:
    """One decoder layer on x [B, S, D]."""
    x = x + attention(config, w, rms_norm(x, w.input_norm, config.norm_eps), cos, sin)
    normed = rms_norm(x, w.post_norm, config.norm_eps).reshape(-1, config.hidden_size)
    logits, weights, chosen = choose(config, w, normed)
    routing = route(chosen, config.experts, capacity)
    mixed = experts(config, w, normed, weights, routing)
    balance, z, load = router_losses(logits, chosen)
    dropped = 1.0 - routing.kept.float().mean()
    return LayerResult(x + mixed.view_as(x), balance, z, load, dropped)


LayerFunction = Callable[[ModelConfig, int, LayerWeights, Tensor, Tensor, Tensor], LayerResult]


class ForwardResult(NamedTuple):
    """Final hidden states and the routing statistics of all layers."""

    hidden: Tensor  # [B, S, D], normed
    balance: Tensor  # scalar, summed over layers
    z: Tensor  # scalar, summed over layers
    load: Tensor  # [L, E]
    dropped: Tensor  # [L]


def forward(
    config: ModelConfig, weights: Weights, tokens: Tensor, capacity: int, run_layer: LayerFunction = layer
) -> ForwardResult:
    """Run the model on tokens [B, S]; `run_layer` may be a compiled `layer`."""
    x = F.embedding(tokens, weights.embedding)
    cos, sin = rope_tables(config, tokens.shape[1], x.dtype)
    results: list[LayerResult] = []
    for w in weights.layers:
        results.append(run_layer(config, capacity, w, x, cos, sin))
        x = results[-1].x
    return ForwardResult(
        rms_norm(x, weights.final_norm, config.norm_eps),
        torch.stack([r.balance for r in results]).sum(),
        torch.stack([r.z for r in results]).sum(),
        torch.stack([r.load for r in results]).detach(),
        torch.stack([r.dropped for r in results]).detach(),
    )


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy through the tied head, in chunks: the [T, V] logits never exist as a whole."""

    CHUNK = 1024

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, embedding: Tensor, target: Tensor) -> Tensor:
        total = torch.zeros(())
        grad_hidden = torch.empty_like(hidden)
        grad_embedding = torch.zeros_like(embedding, dtype=torch.float)
        for rows in torch.split(torch.arange(target.numel()), HeadLoss.CHUNK):
            piece = slice(int(rows[0]), int(rows[-1]) + 1)
            log_probs = F.linear(hidden[piece], embedding).float().log_softmax(-1)
            total += F.nll_loss(log_probs, target[piece], reduction="sum")
            grad = log_probs.exp_()
            grad[torch.arange(len(rows)), target[piece]] -= 1.0
            scaled = grad.mul_(1.0 / target.numel()).to(hidden.dtype)
            grad_hidden[piece] = scaled @ embedding
            grad_embedding += scaled.t() @ hidden[piece]
        ctx.save_for_backward(grad_hidden, grad_embedding.to(embedding.dtype))
        return total / target.numel()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_embedding = ctx.saved_tensors
        return grad_hidden * grads[0].to(grad_hidden.dtype), grad_embedding * grads[0].to(grad_hidden.dtype), None


def head_loss(hidden: Tensor, embedding: Tensor, target: Tensor) -> Tensor:
    """Mean next-token loss (nats) of hidden [B, S, D] against target [B, S]."""
    loss: Tensor = HeadLoss.apply(hidden.reshape(-1, hidden.shape[-1]), embedding, target.reshape(-1))  # type: ignore[no-untyped-call]
    return loss


def logits(config: ModelConfig, weights: Weights, tokens: Tensor) -> Tensor:
    """Logits [B, S, V] with unlimited capacity (nothing dropped)."""
    result = forward(config, weights, tokens, capacity=tokens.numel())
    return F.linear(result.hidden, weights.embedding)
