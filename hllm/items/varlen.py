"""A text model over items packed end to end: no padding, and no attention from one item to another.

transformers keeps packed items apart with a dense (T, T) mask, or with flash-attention; without either, they leak
into one another in silence. Here every layer is told where the items lie. On CUDA, in 16 bits, a fused kernel does
the work; anywhere else items of equal length run together, exact in any dtype, a call a layer for each length that
occurs.

Attention dropout (a BERT's in training mode) is applied as the model asks. torch's kernel has none: where it is on,
flash_attn runs, and where that is not installed the exact form.

n items, T tokens of them all, H heads, d width of a head, E width of an embedding, D width of the model.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from hllm.errors import LLMError

FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "bert"}
"Models that take their attention from transformers' interface, every layer of it."
NAME = "hllm_varlen"
HALF = {torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class Pack:
    """Where the items lie in the tokens of one call.

    Args:
        borders: (n + 1,) int32 on the device, first token of each item, and T.
        longest: tokens of the longest item.
        order: (T,) on the device, the tokens with items of equal length side by side; None where they come so.
        groups: (items, tokens of each) for each length that occurs, in that order.
    """

    borders: Tensor
    longest: int
    order: Tensor | None
    groups: list[tuple[int, int]]


Span = tuple[int, int]
"How many tokens back and ahead a token may look; -1 is all of its item."
Kernel = Callable[[Tensor, Tensor, Tensor, Pack, Span, float | None, float], Tensor]
"(T, H, d) queries, keys and values, keys and values maybe of fewer heads; scale and dropout -> (T, H, d)."


def packed_hidden(model: Any, embeds: Tensor, lengths: Tensor, positions: Tensor) -> Tensor:
    """Hidden states of items end to end, each as if the model had read it alone.

    Inside the model the tokens lie as they are given. Where no fused kernel runs, the longest item first is cheapest.

    Gradient checkpointing may be on as transformers turns it on. Under another, such as torch's checkpoint_wrapper
    around the layers, the backward pass raises.

    Args:
        model: a transformers body of a family in ``FAMILIES``.
        embeds: (T, E) token embeddings.
        lengths: (n,) tokens of each item; on the CPU, or the call waits for the device once.
        positions: (T,) place of each token in its item.

    Returns:
        (T, D) what the model calls last_hidden_state: after the final norm.

    Raises:
        LLMError: the model is of another family.
    """
    _check_family(model)
    lengths = lengths.to("cpu", torch.long)
    assert int(lengths.sum()) == len(positions) == len(embeds), "lengths, positions and embeds are of other tokens"
    with _item_attention(model):
        hidden: Tensor = model(
            inputs_embeds=embeds[None],
            position_ids=positions[None],
            # no mask is made where one of four axes is given; this one fits no other attention, so that a layer
            # which missed ours fails where it would leak
            attention_mask=embeds.new_empty(1, 1, 1, 0),
            use_cache=False,
            pack=_lay_out(lengths, embeds.device),
        ).last_hidden_state[0]
    return hidden


def can_pack(model: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a fused kernel runs ``packed_hidden`` when the model computes in ``dtype``."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.model_type in FAMILIES and fused_kernel(device, dtype, width, dropout=False) is not exact


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What products of tensors of ``dtype`` run in: autocast's, where it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pack: Pack,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: (1, H, T, d) -> (1, T, H, d)."""
    causal = module.is_causal if is_causal is None else is_causal
    span = (-1, 0 if causal else -1)
    if sliding_window is not None and sliding_window < pack.longest:
        if not causal:
            raise LLMError("a sliding window that looks ahead cannot be packed; set sliding_window to null")
        span = (sliding_window - 1, 0)  # the window counts the token itself
    # under autocast rotary positions turn queries and keys, but not values, into float32
    dtype = product_dtype(value.device, value.dtype)
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))  # (T, H, d)
    kernel = fused_kernel(query.device, dtype, query.shape[-1], dropout > 0)
    return kernel(query, key, value, pack, span, scaling, dropout)[None], None


def exact(
    query: Tensor, key: Tensor, value: Tensor, pack: Pack, span: Span, scale: float | None, dropout: float
) -> Tensor:
    """The kernel for any device and dtype: items of one length are a batch."""
    if pack.order is not None:
        query, key, value = (states.index_select(0, pack.order) for states in (query, key, value))
    sizes = [items * tokens for items, tokens in pack.groups]
    parts = []
    for group, *states in zip(pack.groups, query.split(sizes), key.split(sizes), value.split(sizes), strict=True):
        q, k, v = (part.unflatten(0, group).transpose(1, 2) for part in states)  # (items, H, tokens, d)
        windowed = 0 <= span[0] < group[1] - 1
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_window(group[1], span[0], query.device) if windowed else None,
            dropout_p=dropout,
            is_causal=span[1] == 0 and not windowed,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))  # (items * tokens, H, d)
    mixed = torch.cat(parts)
    return mixed if pack.order is None else torch.empty_like(mixed).index_copy(0, pack.order, mixed)


def torch_kernel(
    query: Tensor, key: Tensor, value: Tensor, pack: Pack, span: Span, scale: float | None, dropout: float
) -> Tensor:
    """torch's own fused kernel."""
    assert not dropout, "torch's kernel has no dropout"
    options: dict[str, Any] = {"scale": scale, "window_size": span}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in _varlen_options():
            options["enable_gqa"] = True
        else:  # torch 2.11
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    mixed = varlen_attn(query, key, value, pack.borders, pack.borders, pack.longest, pack.longest, **options)
    assert isinstance(mixed, Tensor)
    return mixed


def flash_kernel(
    query: Tensor, key: Tensor, value: Tensor, pack: Pack, span: Span, scale: float | None, dropout: float
) -> Tensor:
    """The flash_attn package's fused kernel."""
    borders, longest = pack.borders, pack.longest
    mixed: Tensor = importlib.import_module("flash_attn").flash_attn_varlen_func(
        query,
        key,
        value,
        borders,
        borders,
        longest,
        longest,
        dropout_p=dropout,
        softmax_scale=scale,
        causal=span[1] == 0,
        window_size=span,
    )
    return mixed


@functools.cache
def fused_kernel(device: torch.device, dtype: torch.dtype, width: int, dropout: bool) -> Kernel:
    """The fastest kernel that does what is asked; the fused ones need 16 bits, an Ampere and a width in eights."""
    if device.type != "cuda" or dtype not in HALF or width % 8 or width > 256:
        return exact
    if torch.cuda.get_device_capability(device) < (8, 0):
        return exact
    if torch.backends.cuda.is_flash_attention_available() and not dropout:
        return torch_kernel
    return exact if importlib.util.find_spec("flash_attn") is None else flash_kernel


def _varlen_options() -> set[str]:
    return set(inspect.signature(varlen_attn).parameters)


def _window(tokens: int, back: int, device: torch.device) -> Tensor:
    """(tokens, tokens) True where a token sees another: itself and ``back`` before it."""
    ones = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    return ones.tril().triu(-back)


def _lay_out(lengths: Tensor, device: torch.device) -> Pack:
    """(n,) int64 lengths on the CPU -> where the items lie."""
    lengths = lengths[lengths > 0]
    assert len(lengths), "no item has a token"
    ends = lengths.cumsum(0)
    borders = F.pad(ends, (1, 0)).to(device, torch.int32, non_blocking=True)
    grouped, items = lengths.sort(descending=True, stable=True)
    order = None
    if not torch.equal(grouped, lengths):
        moved = (ends - lengths)[items] - (grouped.cumsum(0) - grouped)  # (n,) how far each item's tokens move
        order = torch.arange(int(ends[-1])) + moved.repeat_interleave(grouped)  # (T,)
        order = order.to(device, non_blocking=True)
    tokens, counts = (part.tolist() for part in grouped.unique_consecutive(return_counts=True))
    return Pack(borders, tokens[0], order, list(zip(counts, tokens, strict=True)))


@contextlib.contextmanager
def _item_attention(model: Any) -> Iterator[None]:
    """The model's attention is ours: in this call, and where checkpointing runs a layer again in the backward pass.

    By then the call is long over, and any other attention would let the items leak into one another's gradients.
    """
    found = {module: module.__dict__.get("_gradient_checkpointing_func") for module in model.modules()}
    checkpoints = {module: checkpoint for module, checkpoint in found.items() if checkpoint is not None}
    for module, checkpoint in checkpoints.items():
        module._gradient_checkpointing_func = functools.partial(_checkpoint, checkpoint, model.config)
    try:
        with _implementation(model.config):
            yield
    finally:
        for module, checkpoint in checkpoints.items():
            module._gradient_checkpointing_func = checkpoint


def _checkpoint(checkpoint: Callable[..., Any], config: Any, layer: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(_implementation(config)(layer), *args)


@contextlib.contextmanager
def _implementation(config: Any) -> Iterator[None]:
    _register()
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)


def _check_family(model: Any) -> None:
    if (family := model.config.model_type) not in FAMILIES:
        raise LLMError(
            f"{family}: its items cannot be packed, attention might cross them; choose of {sorted(FAMILIES)}"
        )
