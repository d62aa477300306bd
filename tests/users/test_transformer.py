"""The user transformer equals PyTorch's own layers, and sees neither the future nor padding."""

import math
from typing import Any

import pytest
import torch
from conftest import encode_rows
from torch import Tensor, nn

from hllm.config import AttentionPath, TimeBuckets, TimeReference, TransformerConfig
from hllm.users.attention import attend
from hllm.users.layout import Layout
from hllm.users.transformer import UserTransformer

DIM, LENGTH = 8, 6
FORMS = [
    {},
    {"num_layers": 1, "num_heads": 1},
    {"num_layers": 3, "ffn_dim": 5},
    {"time_buckets": TimeBuckets.log},
    {"relative_position_bias": True},
    {"relative_position_bias": True, "time_buckets": TimeBuckets.sqrt, "num_time_buckets": 7},
]


def transformer(**changes: Any) -> UserTransformer:
    torch.manual_seed(0)
    config = TransformerConfig(name="transformer", _target_="", dim=DIM, **changes)
    model = UserTransformer(config, max_history=LENGTH).eval()
    for parameter in model.parameters():  # as initialised, attention is nearly uniform and biases are 0
        nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def history() -> tuple[Tensor, Tensor, Tensor]:
    """Vectors, mask and times of rows with 6, 3 and 1 events."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(LENGTH) < torch.tensor([[6], [3], [1]])
    times = torch.randint(0, 100_000, (3, LENGTH), generator=generator).cumsum(1) * mask
    return torch.randn(3, LENGTH, DIM, generator=generator), mask, times


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_outputs_do_not_depend_on_later_events(form: dict[str, Any], history: tuple[Tensor, Tensor, Tensor]) -> None:
    model, (x, mask, times) = transformer(**form), history
    before = encode_rows(model, x, mask, times)
    for event in range(LENGTH):
        changed, later = x.clone(), times.clone()
        changed[:, event:] = changed[:, event:].flip(-1)  # not a shift: LayerNorm would take it off again
        later[:, event:] += 10_000_000
        after = encode_rows(model, changed, mask, later)
        torch.testing.assert_close(after[:, :event], before[:, :event], atol=1e-6, rtol=0)
        assert not torch.allclose(after[0, event:], before[0, event:], atol=1e-2)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_stands_at_padding_changes_nothing(form: dict[str, Any], history: tuple[Tensor, Tensor, Tensor]) -> None:
    model, (x, mask, times) = transformer(**form), history
    noise = torch.where(mask[..., None], x, torch.randn_like(x) * 10)
    torch.testing.assert_close(
        encode_rows(model, noise, mask, times)[mask], encode_rows(model, x, mask, times)[mask], atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_amount_of_padding_changes_nothing(form: dict[str, Any], history: tuple[Tensor, Tensor, Tensor]) -> None:
    model, (x, mask, times) = transformer(**form), history
    alone = encode_rows(model, x[1:2, :3], mask[1:2, :3], times[1:2, :3])
    torch.testing.assert_close(encode_rows(model, x, mask, times)[1:2, :3], alone, atol=1e-5, rtol=1e-5)


def test_time_until_the_end_tells_about_the_future(history: tuple[Tensor, Tensor, Tensor]) -> None:
    """Which is why the config allows it only where the last position alone is trained."""
    model, (x, mask, times) = transformer(time_buckets=TimeBuckets.log, time_reference=TimeReference.end), history
    later = times.clone()
    later[0, -1] += 10_000_000
    assert not torch.allclose(encode_rows(model, x, mask, later)[0, 0], encode_rows(model, x, mask, times)[0, 0])


def reference_layer(model: UserTransformer, layer: int, num_heads: int) -> nn.TransformerEncoderLayer:
    """PyTorch's own pre-norm layer with the weights of one of ours."""
    block = model.blocks[layer]
    reference = nn.TransformerEncoderLayer(
        DIM, num_heads, block.ffn[0].out_features, 0.0, "gelu", batch_first=True, norm_first=True
    )
    pairs = {"self_attn.in_proj_": block.qkv, "self_attn.out_proj.": block.out, "linear1.": block.ffn[0]}
    pairs |= {"linear2.": block.ffn[2], "norm1.": block.attention_norm, "norm2.": block.ffn_norm}
    state = {prefix + name: value for prefix, part in pairs.items() for name, value in part.state_dict().items()}
    reference.load_state_dict(state)
    return reference.train()  # the fused path of evaluation takes no causal mask


@pytest.mark.parametrize("num_layers", [1, 2, 4])
@pytest.mark.parametrize("num_heads", [1, 4])
def test_equals_pytorchs_encoder_layers(
    num_layers: int, num_heads: int, history: tuple[Tensor, Tensor, Tensor]
) -> None:
    model, (x, mask, times) = transformer(num_layers=num_layers, num_heads=num_heads), history
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    expected = x + model.position.weight
    for layer in range(num_layers):
        expected = reference_layer(model, layer, num_heads)(expected, src_mask=causal)
    found = encode_rows(model, x, mask, times)
    torch.testing.assert_close(found[mask], model.norm(expected)[mask], atol=1e-5, rtol=1e-5)


def test_relative_bias_equals_attention_written_out(history: tuple[Tensor, Tensor, Tensor]) -> None:
    model = transformer(num_heads=2, relative_position_bias=True)
    block, x = model.blocks[0], history[0]
    assert model.bias is not None
    q, k, v = (part.unflatten(-1, (2, DIM // 2)) for part in block.qkv(x).chunk(3, dim=-1))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(DIM / 2) + model.bias(LENGTH)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
    layout = Layout.of(torch.ones(x.shape[:2], dtype=torch.bool))
    found = attend(block.qkv(x).flatten(0, 1), layout, 2, model.bias(LENGTH), 0.0, AttentionPath.auto)
    torch.testing.assert_close(found, expected.flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_dropout_acts_in_training_only(history: tuple[Tensor, Tensor, Tensor]) -> None:
    model = transformer(dropout=0.5, attention_dropout=0.5)
    assert torch.equal(encode_rows(model, *history), encode_rows(model, *history))
    model.train()
    assert not torch.equal(encode_rows(model, *history), encode_rows(model, *history))


def test_fresh_weights_have_the_spread_of_gpt2() -> None:
    model = UserTransformer(TransformerConfig(name="transformer", _target_="", dim=64), max_history=50)
    assert model.blocks[0].qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.position.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.blocks[0].qkv.bias.any()
