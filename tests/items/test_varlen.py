import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from hllm.errors import LLMError
from hllm.items import varlen
from hllm.items.varlen import Pack, can_pack, exact, flash_kernel, packed_hidden, torch_kernel

LENGTHS = [3, 1, 9, 3, 5, 1, 9, 2]
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
GQA = SIZES | {"num_key_value_heads": 2}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaModel(LlamaConfig(**GQA)),
    "qwen2": lambda: Qwen2Model(Qwen2Config(**GQA)),
    "qwen3": lambda: Qwen3Model(Qwen3Config(**GQA, head_dim=16)),
    "mistral": lambda: MistralModel(MistralConfig(**GQA, sliding_window=None)),
    "bert": lambda: BertModel(BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
    "mistral_window": lambda: MistralModel(MistralConfig(**GQA, sliding_window=4)),
    "qwen2_window": lambda: Qwen2Model(Qwen2Config(**GQA, **SLIDING)),
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    """A tiny random model of each family; its weights are spread, so that every token tells on the others."""
    return build(request.param)


def build(family: str, std: float = 0.3) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[family]()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def checkpoint(model: Any) -> None:
    """Turns on what transformers called gradient checkpointing before 5.23."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(**{f"{enable.__name__.removesuffix('_enable')}_kwargs": {"use_reentrant": False}})


def items(lengths: list[int] = LENGTHS) -> list[Tensor]:
    """Token embeddings of each item, (tokens, 32)."""
    return list(torch.randn(sum(lengths), 32, generator=torch.Generator().manual_seed(1)).split(lengths))


def packed(model: Any, embeds: list[Tensor]) -> list[Tensor]:
    lengths = torch.tensor([len(item) for item in embeds])
    positions = torch.cat([torch.arange(len(item)) for item in embeds]).to(embeds[0].device)
    return list(packed_hidden(model, torch.cat(embeds), lengths, positions).split(lengths.tolist()))


def alone(model: Any, embeds: list[Tensor]) -> list[Tensor]:
    """The reference: an item a forward pass, under transformers' own attention."""
    return [model(inputs_embeds=item[None], use_cache=False).last_hidden_state[0] for item in embeds]


def gradients(model: Any, run: Callable[[Any, list[Tensor]], list[Tensor]]) -> dict[str, Tensor]:
    """Of every weight and embedding, for a loss that weighs every state differently."""
    embeds = [item.clone().requires_grad_() for item in items()]
    hidden = torch.cat(run(model, embeds))
    model.zero_grad()
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return found | {f"item {row}": item.grad for row, item in enumerate(embeds) if item.grad is not None}


def test_packed_equals_alone(model: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(packed(model, items()), alone(model, items()), atol=5e-6, rtol=0)


@pytest.mark.parametrize("lengths", [[9, 5, 5, 1], [1, 5, 5, 9], [5, 1, 5, 9], [4]])
def test_items_come_in_any_order(lengths: list[int]) -> None:
    model, embeds = build("llama"), items(lengths)
    with torch.no_grad():
        torch.testing.assert_close(packed(model, embeds), alone(model, embeds), atol=5e-6, rtol=0)
    assert (varlen._lay_out(torch.tensor(lengths), torch.device("cpu")).order is None) == (lengths[0] >= lengths[-1])


def test_inside_the_model_tokens_lie_as_given() -> None:
    model, seen = build("llama"), []
    model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    packed(model, items())
    assert torch.equal(seen[0], torch.cat(items())[None])


def test_items_without_tokens_are_passed_over() -> None:
    assert varlen._lay_out(torch.tensor([0, 3, 0, 2, 0]), torch.device("cpu")).groups == [(1, 3), (1, 2)]
    model, embeds = build("llama"), items([0, 3, 0, 2, 0])
    with torch.no_grad():
        torch.testing.assert_close(packed(model, embeds)[1::2], alone(model, embeds[1::2]), atol=5e-6, rtol=0)


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_an_item_never_sees_another(model: Any, value: float) -> None:
    changed = items()
    changed[3] = changed[3] + value  # as long as item 0, so that they run side by side
    with torch.no_grad():
        before, after = packed(model, items()), packed(model, changed)
    assert not torch.equal(before[3], after[3])
    for row in set(range(len(LENGTHS))) - {3}:
        assert torch.equal(before[row], after[row])


def test_gradients_of_packed_equal_those_of_alone(model: Any) -> None:
    torch.testing.assert_close(gradients(model, packed), gradients(model, alone), atol=1e-5, rtol=1e-5)


def test_gradients_under_checkpointing_equal_those_of_alone(model: Any) -> None:
    expected = gradients(model.train(), alone)
    checkpoint(model)
    layers = [*model.modules()]
    before = [module.__dict__.get("_gradient_checkpointing_func") for module in layers]
    torch.testing.assert_close(gradients(model, packed), expected, atol=1e-5, rtol=1e-5)
    assert [module.__dict__.get("_gradient_checkpointing_func") for module in layers] == before


def test_checkpointing_runs_layers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = build("llama").train(), []
    monkeypatch.setattr(varlen, "fused_kernel", lambda *asked: lambda *args: calls.append(args) or exact(*args))
    gradients(model, packed)
    assert len(calls) == 2
    checkpoint(model)
    gradients(model, packed)
    assert len(calls) == 2 + 4


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_layer_under_another_attention_fails_rather_than_leaks(
    model: Any, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.set_attn_implementation(implementation)
    checkpoint(model.train())
    monkeypatch.setattr(varlen, "_checkpoint", lambda checkpoint, config, layer, *args: checkpoint(layer, *args))
    with pytest.raises(RuntimeError, match="size"):
        gradients(model, packed)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_leaves_the_attention_as_it_was(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        expected = alone(model, items())
        packed(model, items())
        assert model.config._attn_implementation == implementation
        torch.testing.assert_close(alone(model, items()), expected, atol=0, rtol=0)
    monkeypatch.setattr(varlen, "fused_kernel", lambda *asked: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        packed(model, items())
    assert model.config._attn_implementation == implementation


def test_autocast_runs_attention_in_16_bits(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = []
    spy = lambda *args: dtypes.extend(part.dtype for part in args[:3]) or exact(*args)  # noqa: E731
    monkeypatch.setattr(varlen, "fused_kernel", lambda *asked: spy)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found, expected = packed(model, items()), alone(model, items())
    assert set(dtypes) == {torch.bfloat16}
    for ours, theirs in zip(found, expected, strict=True):
        assert F.cosine_similarity(ours.float(), theirs.float(), dim=-1).min() > 0.99


def test_attention_dropout_is_the_models() -> None:
    model = build("bert").train()
    for layer in model.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        found = packed(model, items())
        torch.manual_seed(0)
        torch.testing.assert_close(packed(model, items()), found, atol=0, rtol=0)
        assert not torch.allclose(torch.cat(packed(model, items())), torch.cat(found))
        torch.testing.assert_close(packed(model.eval(), items()), alone(model, items()), atol=5e-6, rtol=0)


def test_decoders_made_bidirectional_stay_so() -> None:
    model = build("llama")
    model.config.is_causal = False  # heeded by newer transformers only; under the others both are causal
    with torch.no_grad():
        torch.testing.assert_close(packed(model, items()), alone(model, items()), atol=5e-6, rtol=0)


def test_a_window_that_looks_ahead_is_refused() -> None:
    model = build("mistral_window")
    for layer in model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(LLMError, match="set sliding_window to null"):
        packed(model, items())


def test_other_families_are_refused(machine: Any) -> None:
    machine()
    model = GPT2Model(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(LLMError, match="gpt2: its items cannot be packed"):
        packed(model, items())
    assert not can_pack(model, torch.device("cuda"), torch.bfloat16)


def test_tokens_that_do_not_add_up_are_a_defect() -> None:
    embeds = torch.cat(items())
    with pytest.raises(AssertionError, match="of other tokens"):
        packed_hidden(build("llama"), embeds, torch.tensor([3, 4]), torch.zeros(len(embeds), dtype=torch.long))


def states(heads: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(heads)
    return torch.randn(sum(LENGTHS), heads, 8, generator=generator, dtype=torch.float32).to(device)


def layout(device: str = "cpu") -> Pack:
    return varlen._lay_out(torch.tensor(LENGTHS), torch.device(device))


def loop(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, left: int, right: int, scale: float) -> Tensor:
    """What a fused kernel computes, item by item; it wants as many heads of keys as of queries."""
    out = torch.empty_like(q)
    for start, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * scale
        ahead = torch.arange(end - start) - torch.arange(end - start)[:, None]
        hidden = (ahead > right if right >= 0 else ahead > end) | (ahead < -left if left >= 0 else ahead < -end)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[start:end] = torch.einsum("hqk,khd->qhd", weights, v[start:end])
    return out


def varlen_2_11(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == max(LENGTHS)
    return loop(q, k, v, cu_seq_k, *window_size, scale)


def varlen_2_12(q: Tensor, k: Tensor, v: Tensor, *places: Any, enable_gqa: bool = False, **options: Any) -> Tensor:
    assert enable_gqa == (q.shape[1] != k.shape[1])
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    return varlen_2_11(q, k, v, *places, **options)


SPANS = [(-1, -1), (-1, 0), (3, 0), (0, 0)]


@pytest.mark.parametrize("signature", [varlen_2_11, varlen_2_12])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("heads", [2, 4])
def test_torch_kernel_is_called_as_each_torch_wants(
    signature: Callable[..., Tensor], span: tuple[int, int], heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", signature)
    arguments = (states(4), states(heads), states(heads) + 1, layout(), span, 0.3, 0.0)
    torch.testing.assert_close(torch_kernel(*arguments), exact(*arguments), atol=1e-6, rtol=0)


@pytest.mark.parametrize("signature", [varlen_2_11, varlen_2_12])
def test_packed_through_the_torch_kernel_equals_alone(
    model: Any, signature: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", signature)
    monkeypatch.setattr(varlen, "fused_kernel", lambda *asked: torch_kernel)
    with torch.no_grad():
        torch.testing.assert_close(packed(model, items()), alone(model, items()), atol=5e-6, rtol=0)


@pytest.mark.parametrize("heads", [2, 4])
def test_torch_kernel_fits_the_installed_torch(heads: int) -> None:
    meta = (states(4, "meta"), states(heads, "meta"), states(heads, "meta"))
    assert torch_kernel(*meta, layout("meta"), (-1, 0), 0.3, 0.0).shape == meta[0].shape


@pytest.mark.parametrize("span", SPANS)
def test_flash_kernel_is_called_as_flash_attn_wants(span: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, *places: Any, dropout_p: float, softmax_scale: float, causal: bool, **rest: Any
    ) -> Tensor:
        assert dropout_p == 0.0
        assert causal == (rest["window_size"][1] == 0)
        return varlen_2_11(q, k, v, *places, scale=softmax_scale, **rest)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    arguments = (states(4), states(4), states(4) + 1, layout(), span, 0.3, 0.0)
    torch.testing.assert_close(flash_kernel(*arguments), exact(*arguments), atol=1e-6, rtol=0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends a GPU of some capability, with or without each kernel."""

    def pretend(capability: tuple[int, int] = (9, 0), in_torch: bool = True, flash_attn: bool = False) -> None:
        varlen.fused_kernel.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: in_torch)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if flash_attn else None)

    yield pretend
    varlen.fused_kernel.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_can_pack_on_a_gpu_in_16_bits(model: Any, machine: Any, dtype: torch.dtype) -> None:
    machine()
    assert can_pack(model, torch.device("cuda"), dtype)
    assert not can_pack(model, torch.device("cuda"), torch.float32)
    assert not can_pack(model, torch.device("cpu"), dtype)
    machine(capability=(7, 5))
    assert not can_pack(model, torch.device("cuda"), dtype)


@pytest.mark.parametrize(
    ("in_torch", "flash_attn", "dropout", "kernel"),
    [
        (True, True, False, torch_kernel),
        (True, False, True, exact),
        (True, True, True, flash_kernel),
        (False, True, False, flash_kernel),
        (False, False, False, exact),
    ],
)
def test_the_fastest_kernel_that_does_what_is_asked(
    machine: Any, in_torch: bool, flash_attn: bool, dropout: bool, kernel: Any
) -> None:
    machine(in_torch=in_torch, flash_attn=flash_attn)
    assert varlen.fused_kernel(torch.device("cuda"), torch.bfloat16, 64, dropout) is kernel
    assert varlen.fused_kernel(torch.device("cuda"), torch.bfloat16, 36, dropout) is exact
    assert varlen.fused_kernel(torch.device("cuda"), torch.bfloat16, 512, dropout) is exact


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the fused kernel needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fused_equals_exact_on_a_gpu(family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family, std=0.1).to("cuda", torch.bfloat16).train()
    if checkpointing:
        checkpoint(model)
    if not can_pack(model, torch.device("cuda:0"), torch.bfloat16):
        pytest.skip("no fused kernel for this GPU")

    def run() -> tuple[Tensor, Tensor]:
        embeds = [item.to("cuda", torch.bfloat16).requires_grad_() for item in items()]
        hidden = torch.cat(packed(model, embeds))
        hidden.float().square().mean().backward()
        return hidden.float(), torch.cat([item.grad.float() for item in embeds if item.grad is not None])

    found = run()
    monkeypatch.setattr(varlen, "fused_kernel", lambda *asked: exact)
    for ours, theirs in zip(found, run(), strict=True):
        assert F.cosine_similarity(ours, theirs, dim=-1).min() > 0.99
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
