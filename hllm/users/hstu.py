"""HSTU: hierarchical sequential transduction units (Zhai et al., arXiv 2402.17152, section 3 and appendix).

A block has no softmax and no feed-forward layer. With norms without weights,

    u, v, q, k = SiLU(norm(x) W)
    a_ij = SiLU(q_i k_j + p(i - j) + t(time_i - time_j)) / n   for j <= i
    x <- x + dropout(norm(sum_j a_ij v_j) * u) W' + b'

p and t are learned tables, one pair a block, shared by the heads, as in the code of Meta. ``time_i`` is the time of the
event to be predicted where that is known, else that of event i. n is the longest history: a constant, so that padding
changes nothing. ByteDance's HSTU (HLLM, 1.1.4) has neither table.

B users, L history length, T events of a batch, H heads, D width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hllm.compiling import compiled
from hllm.config import HSTUConfig
from hllm.dropout import Dropout, dropout
from hllm.users.layout import Layout
from hllm.users.position import place_vectors


def time_buckets(timestamps: Tensor, queries: Tensor, num_buckets: int) -> Tensor:
    """Bucket of the time from each event to each query: floor(ln(max(seconds, 1)) / 0.301), the last for all beyond.

    Args:
        timestamps: (B, L) int64 seconds.
        queries: (B, L) what queries are at.

    Returns:
        (B, L, L) int32; query i in row i.
    """
    seconds = (queries[:, :, None] - timestamps[:, None, :]).float()
    return seconds.abs_().clamp_(min=1).log_().div_(0.301).clamp_(max=num_buckets - 1).int()


class PointwiseAttention(torch.autograd.Function):
    """sum_j SiLU(q_i k_j + bias_ij) v_j / n over j <= i, with biases looked up where they are used.

    Scores are computed again in the backward pass, a few rows at a time, so that they stay in a core's cache: kept
    whole they are B H L L numbers, and every one of some twenty passes over them goes through memory. A GPU has no such
    cache: ``fuse`` has torch.compile make few passes of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_bias: Tensor | None,
        time_bias: Tensor | None,
        buckets: Tensor | None,
        n: int,
        fuse: bool = False,
    ) -> Tensor:
        """(B, H, L, E), (B, H, L, E), (B, H, L, V), (>= L,) by distance, (T,) by bucket, (B, L, L) -> (B, H, L, V)."""
        ctx.save_for_backward(q, k, v, position_bias, time_bias, buckets)
        ctx.n, ctx.fuse = n, fuse
        weigh, _ = _bodies(fuse)
        future, by_distance = _future(q), _by_distance(position_bias, q.shape[2])
        out = torch.empty_like(v)
        for tile in _tiles(q):
            rows, queries, keys = tile
            biases = _cut(by_distance, tile[1:]), time_bias, _cut(buckets, tile)
            weights = weigh(q[rows, :, queries], k[rows, :, keys], *biases, future[queries, keys])
            out[rows, :, queries] = weights @ v[rows, :, keys] / n
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, position_bias, time_bias, buckets = ctx.saved_tensors
        _, differentiate = _bodies(ctx.fuse)
        length, future = q.shape[2], _future(q)
        by_distance = _by_distance(position_bias, length)
        q_grad, k_grad, v_grad = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        summed = torch.float32 if q.dtype is torch.bfloat16 else q.dtype
        pairs = q.new_zeros(length, length, dtype=summed)  # gradients of scores, summed over users and heads
        time_grad = None if time_bias is None else torch.zeros_like(time_bias, dtype=summed)
        grad = grad / ctx.n
        for tile in _tiles(q):
            rows, queries, keys = tile
            query, key, out_grad = q[rows, :, queries], k[rows, :, keys], grad[rows, :, queries]
            biases = _cut(by_distance, tile[1:]), time_bias, _cut(buckets, tile)
            weights, slope = differentiate(query, key, v[rows, :, keys], out_grad, *biases, future[queries, keys])
            v_grad[rows, :, keys] += weights.mT @ out_grad
            q_grad[rows, :, queries] = slope @ key
            k_grad[rows, :, keys] += slope.mT @ query
            if position_bias is not None:
                pairs[queries, keys] += slope.sum((0, 1), dtype=summed)
            if time_grad is not None:
                # counting is twenty times faster than the gradient of an embedding with few rows
                flat = slope.sum(1, dtype=summed).flatten()
                time_grad += torch.bincount(buckets[tile].flatten(), flat, minlength=len(time_grad))
        position_grad = None if position_bias is None else _sum_by_distance(pairs, len(position_bias))
        time_grad = None if time_grad is None else time_grad.to(time_bias.dtype)
        return q_grad, k_grad, v_grad, position_grad, time_grad, None, None, None


def _tiles(q: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Users, queries, and the keys up to the last of those queries: half of all pairs are not looked at.

    A tile's scores take half a MiB on a CPU and 512 MiB on a GPU.
    """
    num_users, num_heads, length, _ = q.shape
    block, budget = (64, 2**19) if q.device.type == "cpu" else (256, 2**29)
    for begin in range(0, length, block):
        end = min(begin + block, length)
        step = max(budget // (4 * num_heads * (end - begin) * end), 1)
        for first in range(0, num_users, step):
            yield slice(first, first + step), slice(begin, end), slice(0, end)


def _future(q: Tensor) -> Tensor:
    """(L, L) bool, true where the key comes after the query."""
    length = q.shape[2]
    return torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)


def _by_distance(table: Tensor | None, length: int) -> Tensor | None:
    """(>= L,) -> (L, L) entry i - j; what is after the query gets entry 0."""
    if table is None:
        return None
    index = torch.arange(length, device=table.device)
    return table[(index[:, None] - index[None, :]).clamp(min=0)]


def _sum_by_distance(pairs: Tensor, size: int) -> Tensor:
    """The gradient of ``_by_distance``: (L, L) -> (size,); entries after the query are zero already."""
    index = torch.arange(len(pairs), device=pairs.device)
    distance = (index[:, None] - index[None, :]).clamp(min=0)
    return torch.bincount(distance.flatten(), pairs.flatten().float(), minlength=size).to(pairs.dtype)


def _cut(pairs: Tensor | None, tile: tuple[slice, ...]) -> Tensor | None:
    return None if pairs is None else pairs[tile]


# The maths of a tile: C users, Q queries, K keys. What is written into is made there.


def _bodies(fuse: bool) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    """``_weights`` and ``_slopes``, compiled or plain."""
    return (compiled(_weights), compiled(_slopes)) if fuse else (_weights, _slopes)


def _weights(
    query: Tensor,
    key: Tensor,
    by_distance: Tensor | None,
    time_bias: Tensor | None,
    bucket: Tensor | None,
    future: Tensor,
) -> Tensor:
    """SiLU of the scores: as ``_scores``, and (Q, K) bool -> (C, H, Q, K)."""
    scores = _scores(query, key, by_distance, time_bias, bucket)
    return F.silu(scores, inplace=True).masked_fill_(future, 0)


def _slopes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    by_distance: Tensor | None,
    time_bias: Tensor | None,
    bucket: Tensor | None,
    future: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weights again, and the gradient of the scores under ``grad`` (C, H, Q, V) of what they weigh."""
    scores = _scores(query, key, by_distance, time_bias, bucket)
    gate = torch.sigmoid(scores)
    weights = (scores * gate).masked_fill_(future, 0)
    # d SiLU(s) / ds = g + s g (1 - g)
    slope = gate.masked_fill(future, 0).addcmul_(weights, 1 - gate)
    slope *= grad @ value.mT
    return weights, slope


def _scores(
    query: Tensor, key: Tensor, by_distance: Tensor | None, time_bias: Tensor | None, bucket: Tensor | None
) -> Tensor:
    """(C, H, Q, E), (C, H, K, E), (Q, K), (T,), (C, Q, K) -> (C, H, Q, K)."""
    scores = query @ key.mT
    if by_distance is not None:
        scores += by_distance
    if time_bias is not None:
        assert bucket is not None
        scores += time_bias.index_select(0, bucket.flatten()).view(bucket.shape)[:, None]
    return scores


class HSTUBlock(nn.Module):
    """One unit. Weights begin as in Meta's code: N(0, 0.02) for W and the tables, Xavier for W'."""

    def __init__(self, config: HSTUConfig, max_history: int) -> None:
        super().__init__()
        heads, width = config.num_heads, config.dim // config.num_heads
        self.num_heads, self.max_history, self.dropout, self.fuse = heads, max_history, config.dropout, config.compile
        self.sizes = [heads * (config.v_dim or width)] * 2 + [heads * (config.qk_dim or width)] * 2
        self.uvqk = nn.Linear(config.dim, sum(self.sizes), bias=False)
        nn.init.normal_(self.uvqk.weight, std=0.02)
        self.out = nn.Linear(self.sizes[0], config.dim)
        nn.init.xavier_uniform_(self.out.weight)
        self.position_bias = nn.Parameter(torch.randn(max_history) * 0.02) if config.relative_position_bias else None
        self.time_bias = (
            nn.Parameter(torch.randn(config.num_time_buckets) * 0.02) if config.relative_time_bias else None
        )

    def forward(self, x: Tensor, layout: Layout, buckets: Sequence[Tensor | None]) -> Tensor:
        """(T, D), for each part of the layout (b, l, l) time buckets or none -> (T, D)."""
        u, vqk = F.silu(self.uvqk(_norm(x))).split([self.sizes[0], sum(self.sizes[1:])], dim=-1)
        gated = u * _norm(layout.by_row(self._attend, vqk, buckets))
        added: Tensor = self.out(dropout(gated, self.dropout, self.training))
        return x + added

    def _attend(self, vqk: Tensor, buckets: Tensor | None) -> Tensor:
        """(b, l, values, queries and keys of all heads) -> (b, l, values)."""
        v, q, k = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).contiguous()
            for part in vqk.split(self.sizes[1:], dim=-1)
        )
        with torch.autocast(vqk.device.type, enabled=False):
            biases = [None if bias is None else bias.to(q.dtype) for bias in (self.position_bias, self.time_bias)]
            attended: Tensor = PointwiseAttention.apply(q, k, v, *biases, buckets, self.max_history, self.fuse)  # type: ignore[no-untyped-call]
        return attended.transpose(1, 2).flatten(2)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class HSTU(nn.Module):
    """History of item vectors -> a user vector at every event, which predicts the item that follows.

    Args:
        config: the user group.
        max_history: longest row.
    """

    def __init__(self, config: HSTUConfig, max_history: int) -> None:
        super().__init__()
        self.max_history, self.positions = max_history, config.positions
        self.num_buckets = config.num_time_buckets
        self.scale = math.sqrt(config.dim) if config.scale_inputs else 1.0
        self.position = nn.Embedding(max_history, config.dim)
        nn.init.trunc_normal_(self.position.weight, std=math.sqrt(1 / config.dim) if config.scale_inputs else 0.02)
        self.dropout = Dropout(config.input_dropout)
        self.blocks = nn.ModuleList(HSTUBlock(config, max_history) for _ in range(config.num_layers))
        self.timed = config.relative_time_bias

    def forward(self, x: Tensor, layout: Layout, timestamps: Tensor, target_times: Tensor | None = None) -> Tensor:
        """Encode histories.

        Args:
            x: (T, D) item vectors.
            layout: which of the events are whose.
            timestamps: (T,) int64 seconds.
            target_times: (T,) int64 seconds of the events to be predicted; None where they are not known.

        Returns:
            (T, D); an output depends on the events of its row up to its own, and on its own target's time where it is
            given.
        """
        assert layout.longest <= self.max_history, f"rows of {layout.longest}, but positions for {self.max_history}"
        x = self.dropout(x * self.scale + place_vectors(self.position, layout, self.positions))
        buckets: Sequence[Tensor | None] = [None] * len(layout.shapes)
        if self.timed:
            queries = timestamps if target_times is None else target_times
            times = zip(layout.parts(timestamps), layout.parts(queries), strict=True)
            buckets = [time_buckets(keys, at, self.num_buckets) for keys, at in times]
        for block in self.blocks:
            x = block(x, layout, buckets)
        return x
