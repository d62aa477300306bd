"""Causal attention: torch's fused kernels, or the products written out where those are faster.

B users, H heads, L history length, E width of a head.
"""

import functools
import os
import shutil
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hllm.config import AttentionPath
from hllm.errors import ConfigError

MOST_EVENTS = 256
"Longer rows' (B, H, L, L) weights, which the written-out form holds, cost more than a kernel does."


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
        path: auto chooses by device, dtype, length, bias and dropout.

    Returns:
        (B, H, L, E).

    Raises:
        ConfigError: flex is to be trained on a CPU.
    """
    length, width = q.shape[2:]
    if path is AttentionPath.auto:
        path = fastest(q.device, q.dtype, length, width, bias is not None, dropout)
    if path is AttentionPath.flex:
        assert dropout == 0, "FlexAttention drops no weights"
        return _flex(q, k, v, bias)
    if path is AttentionPath.kernel:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, dropout_p=dropout)
    if bias is None:
        bias = q.new_full((length, length), float("-inf")).triu(1)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT + bias
    return F.dropout(scores.softmax(-1), dropout) @ v


def fastest(
    device: torch.device, dtype: torch.dtype, length: int, width: int, biased: bool, dropout: float
) -> AttentionPath:
    """The path that ``auto`` takes: kernel, plain or flex.

    Up to ``MOST_EVENTS`` events the kernel with a bias in memory is the faster one on a GPU too.
    """
    if length <= MOST_EVENTS:
        slow = device.type == "cpu" and (biased or dtype is torch.bfloat16)
        return AttentionPath.plain if slow else AttentionPath.kernel
    # torch's template has heads of 16 and more, and sums in float32
    fits = width >= 16 and dtype is not torch.float64 and dropout == 0
    return AttentionPath.flex if biased and fits and can_compile(device) else AttentionPath.kernel


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile makes kernels for a device: on a GPU, by Triton and the C compiler that it calls."""
    return device.type == "cuda" and (torch.compiler.is_compiling() or _has_triton(device))


@functools.cache
def _has_triton(device: torch.device) -> bool:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    complete = find_spec("triton") is not None and compiler is not None
    return complete and torch.cuda.get_device_capability(device) >= (7, 0)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """For tensors of any size; compiled once in a process, when it is first called, which takes some 20 s."""
    import torch._dynamo.config as limits  # seconds to import

    # tiles that begin elsewhere, single users and evaluations are a form each, some ten; torch gives up after eight
    limits.recompile_limit = max(limits.recompile_limit, 32)
    found: Callable[..., Any] = torch.compile(function, dynamic=True)
    return found


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

    if torch.compiler.is_compiling():  # a block, whose graph takes all in and has no place for caches
        return flex_attention(q, k, v, score_mod=add, block_mask=_causal_blocks(length, q.device))
    blocks = _kept_blocks(length, q.device)
    if on_cpu:  # which evaluates what a GPU trained: written out, without 20 s of compiling
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            return flex_attention(q, k, v, score_mod=add, block_mask=blocks)
    attended: Tensor = compiled(flex_attention)(q, k, v, score_mod=add, block_mask=blocks)
    return attended


@functools.lru_cache(maxsize=1024)
def _kept_blocks(length: int, device: torch.device) -> Any:
    # made in an evaluation, as an inference tensor, it would be of no use in training
    with torch.inference_mode(False):
        return _causal_blocks(length, device)


def _causal_blocks(length: int, device: torch.device) -> Any:
    """Which blocks of 128 queries and 128 keys hold pairs to look at; making one takes 0.2 s."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(_not_after, None, None, length, length, device=device)


def _not_after(user: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key
