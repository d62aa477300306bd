"""Causal pre-norm transformer over item vectors: the user tower of the light HLLM, and of SASRec on id vectors.

Rows hold real events first and padding behind them, so the causal mask alone keeps padding unseen and attention stays
on the fused causal kernels. Departures from SASRec (arXiv 1808.09781): norm before each sublayer and once more at the
end, GELU, inner width 4 D.

B users, L history length, H heads, D width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from hllm.config import TimeBuckets, TransformerConfig
from hllm.users.position import RelativePositionBias, TimeEmbedding


class Block(nn.Module):
    """Attention and feed-forward, each on the normed input and added back to it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, inner = config.dim, config.ffn_dim or 4 * config.dim
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.attention_dropout = config.attention_dropout
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(B, L, D), additive bias (H, L, L) with the causal mask in it, or none -> (B, L, D)."""
        x = x + F.dropout(self.out(self._attend(self.attention_norm(x), bias)), self.dropout, self.training)
        return x + F.dropout(self.ffn(self.ffn_norm(x)), self.dropout, self.training)

    def _attend(self, x: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, L, D / H)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=bias is None, dropout_p=self.attention_dropout if self.training else 0.0
        )
        return attended.transpose(1, 2).flatten(2)  # (B, L, D)


class UserTransformer(nn.Module):
    """History of item vectors -> a user vector at every event, which predicts the item that follows.

    Positions are counted from the row's oldest event, so that appending an event changes no earlier output.

    Args:
        config: the user group.
        max_history: longest row.
    """

    def __init__(self, config: TransformerConfig, max_history: int) -> None:
        super().__init__()
        self.max_history = max_history
        self.position = nn.Embedding(max_history, config.dim)
        self.time = (
            TimeEmbedding(config.time_buckets, config.time_reference, config.num_time_buckets, config.dim)
            if config.time_buckets is not TimeBuckets.none
            else None
        )
        self.bias = RelativePositionBias(max_history, config.num_heads) if config.relative_position_bias else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)
        self.apply(_init_weights)

    def forward(self, x: Tensor, mask: Tensor, timestamps: Tensor) -> Tensor:
        """Encode histories.

        Args:
            x: (B, L, D) item vectors, real events first.
            mask: (B, L) bool, true at real events.
            timestamps: (B, L) int64 seconds.

        Returns:
            (B, L, D); output i depends on events 0..i only. Outputs at padding carry no meaning.
        """
        length = x.shape[1]
        assert length <= self.max_history, f"rows of {length} events, but positions for {self.max_history}"
        x = x + self.position.weight[:length]
        if self.time is not None:
            x = x + self.time(timestamps, mask)
        x = self.dropout(x)
        bias = self.bias(length).to(x.dtype) if self.bias is not None else None
        for block in self.blocks:
            x = block(x, bias)
        normed: Tensor = self.norm(x)
        return normed


def _init_weights(module: nn.Module) -> None:
    """N(0, 0.02) for matrices and tables, zero biases, as GPT-2 and the official HLLM's own parameters."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
