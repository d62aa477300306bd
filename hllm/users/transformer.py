"""Causal transformer over item vectors: the user tower of the light HLLM, and of SASRec and eSASRec on id vectors.

A batch's events run end to end, without padding; attention alone knows which are whose (``layout.py``). As configured
by default: norm before each sublayer and once more at the end, GELU, inner width 4 D. The presets (``conf/user``,
docs/baselines.md has the equations):

- ``sasrec``: ReLU, inner width D, item vectors times sqrt(D) (arXiv 1808.09781). The paper's text has the norm before
  each sublayer; its code, which this follows, goes on with what came out of the norm: post-norm, but for keys and
  values, which are read before it. That code has no output matrix behind attention, drops attention weights and inside
  the feed-forward layers too, and counts positions from the row's end.
- ``sasrec_bytedance``: as HLLM's official code has it, BERT's blocks with an inner width of D.
- ``esasrec``: LiGR's gates and SwiGLU, as RecTools has them; there dropout also stands inside the feed-forward layers.

T events of a batch, L history length, H heads, D width, F inner width.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hllm.config import Activation, Norm, TimeBuckets, TransformerConfig
from hllm.dropout import Dropout, dropout
from hllm.users.attention import attend
from hllm.users.layout import Layout
from hllm.users.position import RelativePositionBias, TimeEmbedding, place_vectors


class SwiGLU(nn.Module):
    """(..., 2 F) -> (..., F): the silu of the first half times the second (arXiv 2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    Activation.gelu: nn.GELU,
    Activation.relu: nn.ReLU,
    Activation.silu: nn.SiLU,
    Activation.swiglu: SwiGLU,
}


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual and weighed by a gate g, sigmoid(W x + b) or 1.

    pre: x + g(x) * f(norm(x)). post: norm(x + g(x) * f(x)). query: n + g(n) * f(n), n = norm(x), where keys and values
    are of x.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, inner = config.dim, config.ffn_dim or 4 * config.dim
        self.num_heads, self.dropout, self.norm = config.num_heads, config.dropout, config.norm
        self.attention_dropout, self.path = config.attention_dropout, config.attention
        self.attention_norm = nn.LayerNorm(dim, config.norm_eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim, config.norm_eps)
        wide = 2 * inner if config.activation is Activation.swiglu else inner
        self.ffn = nn.Sequential(
            nn.Linear(dim, wide, config.ffn_bias),
            ACTIVATIONS[config.activation](),
            nn.Linear(inner, dim, config.ffn_bias),
        )
        self.attention_gate = nn.Linear(dim, dim) if config.gates else None
        self.ffn_gate = nn.Linear(dim, dim) if config.gates else None

    def forward(self, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
        """(T, D), additive bias (H, L, L) with the causal mask in it, or none -> (T, D)."""
        read = x if self.norm is Norm.post else self.attention_norm(x)
        qkv = self._qkv(read, x if self.norm is Norm.query else read)
        dropout = self.attention_dropout if self.training else 0.0
        attended = self.out(attend(qkv, layout, self.num_heads, bias, dropout, self.path))
        x = self._add(read if self.norm is Norm.query else x, attended, self.attention_norm, self.attention_gate)
        read = x if self.norm is Norm.post else self.ffn_norm(x)
        return self._add(read if self.norm is Norm.query else x, self.ffn(read), self.ffn_norm, self.ffn_gate)

    def _add(self, residual: Tensor, update: Tensor, norm: nn.Module, gate: nn.Module | None) -> Tensor:
        """(T, D) both -> (T, D)."""
        update = dropout(update, self.dropout, self.training)
        if gate is not None:
            update = update * gate(residual).sigmoid()
        x = residual + update
        return norm(x) if self.norm is Norm.post else x

    def _qkv(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(T, D) what queries, and what keys and values are made from -> (T, 3 D)."""
        if keys is queries:
            made: Tensor = self.qkv(queries)
            return made
        dim = queries.shape[-1]
        weights, biases = self.qkv.weight, self.qkv.bias
        own, others = F.linear(queries, weights[:dim], biases[:dim]), F.linear(keys, weights[dim:], biases[dim:])
        return torch.cat([own, others], dim=-1)


class UserTransformer(nn.Module):
    """History of item vectors -> a user vector at every event, which predicts the item that follows.

    Positions are counted from the row's oldest event, so that appending an event changes no earlier output; or, with
    ``positions=last``, such that the newest is the last of the table: what code sees that pads rows on the left.

    Args:
        config: the user group.
        max_history: longest row.
    """

    def __init__(self, config: TransformerConfig, max_history: int) -> None:
        super().__init__()
        self.max_history, self.positions = max_history, config.positions
        self.input_scale = math.sqrt(config.dim) if config.scale_inputs else 1.0
        self.position = nn.Embedding(max_history, config.dim)
        self.time = (
            TimeEmbedding(config.time_buckets, config.time_reference, config.num_time_buckets, config.dim)
            if config.time_buckets is not TimeBuckets.none
            else None
        )
        self.bias = RelativePositionBias(max_history, config.num_heads) if config.relative_position_bias else None
        self.input_norm = nn.LayerNorm(config.dim, config.norm_eps) if config.input_norm else nn.Identity()
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim, config.norm_eps) if config.final_norm else nn.Identity()
        self.apply(_init_weights)

    def forward(self, x: Tensor, layout: Layout, timestamps: Tensor, target_times: Tensor | None = None) -> Tensor:
        """Encode histories.

        Args:
            x: (T, D) item vectors.
            layout: which of the events are whose.
            timestamps: (T,) int64 seconds.
            target_times: not read: the target's time is in x, where ``user.target_time`` says that it is known.

        Returns:
            (T, D); an output depends on the events of its row up to its own only.
        """
        assert layout.longest <= self.max_history, f"rows of {layout.longest}, but positions for {self.max_history}"
        if self.input_scale != 1:
            x = x * self.input_scale
        x = x + place_vectors(self.position, layout, self.positions)
        if self.time is not None:
            x = x + self.time(timestamps, layout)
        x = self.dropout(self.input_norm(x))
        bias = self.bias(layout.longest).to(x.dtype) if self.bias is not None else None
        for block in self.blocks:
            x = block(x, layout, bias)
        normed: Tensor = self.norm(x)
        return normed


def _init_weights(module: nn.Module) -> None:
    """N(0, 0.02) for matrices and tables, zero biases, as GPT-2 and the official HLLM's own parameters."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
