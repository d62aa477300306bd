"""Causal attention: torch's fused kernels, or the products written out where those are faster.

B users, H heads, L history length, T events of a batch, D width, E width of a head.
"""

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hllm.compiling import compiled
from hllm.config import AttentionPath
from hllm.dropout import dropout as drop
from hllm.errors import ConfigError
from hllm.items.varlen import Pack, exact, fused_kernel
from hllm.users.layout import Layout

MOST_EVENTS = 256
"Longer rows' (B, H, L, L) weights, which the written-out form holds, cost more than a kernel does."


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(
    qkv: Tensor, layout: Layout, num_heads: int, bias: Tensor | None, dropout: float, path: AttentionPath
) -> Tensor:
    """Causal attention of each event to those of its row: (T, 3 D) queries, keys and values -> (T, D).

    Events stay end to end where a fused kernel runs by sequence: on CUDA, in 16 bits, without a bias.

    Args:
        bias: (H, L, L) with -inf after the query, or none.
        dropout, path: as of ``causal_attention``.
    """
    heads = qkv.unflatten(-1, (3, num_heads, -1))  # (T, 3, H, E)
    kernel = fused_kernel(qkv.device, qkv.dtype, heads.shape[-1], dropout > 0)
    if kernel is not exact and bias is None and path in (AttentionPath.auto, AttentionPath.kernel):
        pack = Pack(layout.borders, layout.longest, None, [])
        queries, keys, values = heads.unbind(1)
        return kernel(queries, keys, values, pack, (-1, 0), None, dropout).flatten(1)

    def of_rows(part: Tensor) -> Tensor:
        """(b, l, 3 D) -> (b, l, D)."""
        q, k, v = part.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (b, H, l, E)
        own = None if bias is None else bias[:, : part.shape[1], : part.shape[1]]
        return causal_attention(q, k, v, own, dropout, path).transpose(1, 2).flatten(2)

    attended: Tensor = layout.by_row(of_rows, qkv)
    return attended


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float, path: AttentionPath = AttentionPath.auto
) -> Tensor:
    """softmax(q k' / sqrt(E) + bias) v over keys that do not come after the query.

    A CPU's kernel has a slow backward pass in bfloat16, and none under a bias that is trained: forward and backward,
    one thread of an EPYC with avx512_bf16, 64 rows of 50 events, 4 heads of 96: kernel 44 ms, written out 9; 64 rows of
    200, one head of 64: 42 and 18, with bias in float32 48 and 36. In float32 without bias the kernel is as fast.

    Args:
        q, k, v: (B, H, L, E).
        bias: (H, L, L) with -inf after the query, or none.
        dropout: of the weights; flex has none.
        path: auto chooses kernel or plain, by device, dtype, length and bias.

    Returns:
        (B, H, L, E).

    Raises:
        ConfigError: flex is to be trained on a CPU.
    """
    length = q.shape[2]
    if path is AttentionPath.auto:
        slow = q.device.type == "cpu" and length <= MOST_EVENTS and (bias is not None or q.dtype is torch.bfloat16)
        path = AttentionPath.plain if slow else AttentionPath.kernel
    if path is AttentionPath.flex:
        assert dropout == 0, "FlexAttention drops no weights"
        return _flex(q, k, v, bias)
    if path is AttentionPath.kernel:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, dropout_p=dropout)
    if bias is None:
        bias = q.new_full((length, length), float("-inf")).triu(1)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT + bias
    return drop(scores.softmax(-1), dropout) @ v


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """FlexAttention looks the bias up in its kernel and leaves out what comes after the query, in blocks of 128.

    The bias' gradients are added up by atomics: their order, and so their last digits, vary from run to run.
    """
    from torch.nn.attention.flex_attention import flex_attention  # brings the compiler along, seconds to import

    on_cpu, length = q.device.type == "cpu", q.shape[2]
    if on_cpu and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias)):
        raise ConfigError("user.attention=flex: has no backward pass on a CPU; set auto")
    # in float32, in which its gradients are then added up
    table = None if bias is None else bias.float()

    def add(score: Tensor, user: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score if table is None else score + table[head, query, key]

    blocks = _causal_blocks(length, q.device)
    if on_cpu:  # which evaluates what a GPU trained: written out, without 20 s of compiling
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            return flex_attention(q, k, v, score_mod=add, block_mask=blocks)
    attended: Tensor = compiled(flex_attention)(q, k, v, score_mod=add, block_mask=blocks)
    return attended


@functools.lru_cache(maxsize=1024)
def _causal_blocks(length: int, device: torch.device) -> Any:
    """Which blocks of 128 queries and 128 keys hold pairs to look at; making one takes 0.2 s."""
    from torch.nn.attention.flex_attention import create_block_mask

    with torch.inference_mode(False):  # made in an evaluation, it would be of no use in training
        return create_block_mask(_not_after, None, None, length, length, device=device)


def _not_after(user: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key
