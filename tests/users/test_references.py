"""Each user tower equals a reference of a few lines: one row at a time, one event at a time, sums written out.

The references read a tower's weights and share no code with it. Everything is in float64, so that 1e-9 is asked for.
n events of a row, D width.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import encode_rows
from hydra.utils import get_class
from torch import Tensor, nn

from hllm.config import LLMConfig, LLMUserConfig, compose
from hllm.items.backbone import load_trainable
from hllm.items.files import LLMFiles
from hllm.users import hstu as hstu_module
from hllm.users.llm import UserLLM

DIM, HEADS, LENGTH = 8, 2, 6
Weights = dict[str, Tensor]
Reference = Callable[[Weights, Tensor], Tensor]


def tower(name: str, *changes: str) -> nn.Module:
    """The tower of conf/user, small, with weights spread so that nothing is nearly 0, uniform or 1."""
    config = compose([f"user={name}", f"user.dim={DIM}", f"user.num_heads={HEADS}", "user.num_layers=2", *changes])
    torch.manual_seed(0)
    model: nn.Module = get_class(config.user._target_)(config.user, LENGTH).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Vectors, mask and times of rows with 6, 3 and 1 events; noise at padding."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(LENGTH) < torch.tensor([[6], [3], [1]])
    times = torch.randint(0, 100_000, (3, LENGTH), generator=generator).cumsum(1) * mask
    return torch.randn(3, LENGTH, DIM, generator=generator, dtype=torch.float64), mask, times


# the pieces that equations are made of


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    scaled = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def softmax_attention(weights: Weights, block: str, queries: Tensor, keys: Tensor) -> Tensor:
    """(n, D) both -> (n, D): each event attends to itself and those before it."""
    q, k, v = (
        x @ weights[f"{block}.qkv.weight"][part * DIM :][:DIM].T + weights[f"{block}.qkv.bias"][part * DIM :][:DIM]
        for part, x in enumerate((queries, keys, keys))
    )
    attended = torch.zeros_like(q)
    width = DIM // HEADS
    for head in range(HEADS):
        own = slice(head * width, (head + 1) * width)
        for i in range(len(q)):
            exps = [torch.exp(q[i, own] @ k[j, own] / math.sqrt(width)) for j in range(i + 1)]
            attended[i, own] = sum(exps[j] * v[j, own] for j in range(i + 1)) / sum(exps)
    return linear(weights, f"{block}.out", attended)


def sasrec(weights: Weights, x: Tensor) -> Tensor:
    """As kang205/SASRec: the query and the residual are normed, keys and values are not."""
    x = math.sqrt(DIM) * x + weights["position.weight"][: len(x)]
    for block in ("blocks.0", "blocks.1"):
        normed = norm(weights, f"{block}.attention_norm", x, 1e-8)
        x = normed + softmax_attention(weights, block, normed, x)
        normed = norm(weights, f"{block}.ffn_norm", x, 1e-8)
        x = normed + linear(weights, f"{block}.ffn.2", linear(weights, f"{block}.ffn.0", normed).clamp(min=0))
    return norm(weights, "norm", x, 1e-8)


def sasrec_bytedance(weights: Weights, x: Tensor) -> Tensor:
    """As bytedance/HLLM's IDNet/sasrec.py on a row that is padded on the left: the newest event has the last place."""
    x = norm(weights, "input_norm", x + weights["position.weight"][LENGTH - len(x) :], 1e-12)
    for block in ("blocks.0", "blocks.1"):
        x = norm(weights, f"{block}.attention_norm", x + softmax_attention(weights, block, x, x), 1e-12)
        inner = gelu(linear(weights, f"{block}.ffn.0", x))
        assert inner.shape[-1] == DIM
        x = norm(weights, f"{block}.ffn_norm", x + linear(weights, f"{block}.ffn.2", inner), 1e-12)
    return x


def esasrec(weights: Weights, x: Tensor) -> Tensor:
    """LiGR's layers as RecTools has them (arXiv 2502.03417): what a sublayer adds is weighed by a gate of its input."""
    x = x + weights["position.weight"][: len(x)]
    for block in ("blocks.0", "blocks.1"):
        normed = norm(weights, f"{block}.attention_norm", x, 1e-5)
        gate = sigmoid(linear(weights, f"{block}.attention_gate", x))
        x = x + gate * softmax_attention(weights, block, normed, normed)
        normed = norm(weights, f"{block}.ffn_norm", x, 1e-5)
        a, b = linear(weights, f"{block}.ffn.0", normed).split(4 * DIM, dim=-1)
        inner = a * sigmoid(a) * b
        x = x + sigmoid(linear(weights, f"{block}.ffn_gate", x)) * linear(weights, f"{block}.ffn.2", inner)
    assert "blocks.0.ffn.0.bias" not in weights
    return x


def transformer(weights: Weights, x: Tensor) -> Tensor:
    """The default without its time buckets: pre-norm, GELU, inner width 4 D."""
    x = x + weights["position.weight"][: len(x)]
    for block in ("blocks.0", "blocks.1"):
        normed = norm(weights, f"{block}.attention_norm", x, 1e-5)
        x = x + softmax_attention(weights, block, normed, normed)
        inner = gelu(linear(weights, f"{block}.ffn.0", norm(weights, f"{block}.ffn_norm", x, 1e-5)))
        assert inner.shape[-1] == 4 * DIM
        x = x + linear(weights, f"{block}.ffn.2", inner)
    return norm(weights, "norm", x, 1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "reference"),
    [
        ("transformer", ["user.time_buckets=none"], transformer),
        ("sasrec", [], sasrec),
        ("sasrec_bytedance", [], sasrec_bytedance),
        ("esasrec", [], esasrec),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_transformer_equals_its_equations(name: str, changes: list[str], reference: Reference, rows: Any) -> None:
    x, mask, times = rows
    model = tower(name, *changes)
    found = encode_rows(model, x, mask, times)
    for row, count in enumerate(mask.sum(1)):
        expected = reference(dict(model.state_dict()), x[row, :count])
        torch.testing.assert_close(found[row, :count], expected, atol=1e-9, rtol=1e-9)


def hstu(
    weights: Weights,
    x: Tensor,
    events: Tensor,
    queries: Tensor,
    scale: float,
    heads: int = HEADS,
    from_last: bool = False,
) -> Tensor:
    """The equations of arXiv 2402.17152 with the biases that there are weights of.

    Args:
        events: (n,) seconds. queries: (n,) seconds at which each prediction is made.
    """
    places = slice(LENGTH - len(x), LENGTH) if from_last else slice(0, len(x))
    x = scale * x + weights["position.weight"][places]
    block = 0
    while f"blocks.{block}.uvqk.weight" in weights:
        name = f"blocks.{block}"
        projected = plain_norm(x) @ weights[f"{name}.uvqk.weight"].T
        gate_width = weights[f"{name}.out.weight"].shape[1]
        key_width = projected.shape[1] // 2 - gate_width
        u, v, q, k = (projected * sigmoid(projected)).split([gate_width, gate_width, key_width, key_width], dim=-1)
        attended = torch.zeros_like(v)
        for head in range(heads):
            values = slice(head * gate_width // heads, (head + 1) * gate_width // heads)
            keys = slice(head * key_width // heads, (head + 1) * key_width // heads)
            for i in range(len(x)):
                for j in range(i + 1):
                    score = q[i, keys] @ k[j, keys]
                    if f"{name}.position_bias" in weights:
                        score = score + weights[f"{name}.position_bias"][i - j]
                    if f"{name}.time_bias" in weights:
                        seconds = max(abs(int(queries[i]) - int(events[j])), 1)
                        score = score + weights[f"{name}.time_bias"][min(int(math.log(seconds) / 0.301), 9)]
                    attended[i, values] += score * sigmoid(score) * v[j, values] / LENGTH
        x = x + linear(weights, f"{name}.out", plain_norm(attended) * u)
        block += 1
    return x


def plain_norm(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()


HSTUS = {
    "both biases": ["hstu"],
    "one head": ["hstu", "user.num_heads=1"],
    "widths of its own": ["hstu", "user.qk_dim=3", "user.v_dim=5"],
    "no position bias": ["hstu", "user.relative_position_bias=false"],
    "no time bias": ["hstu", "user.relative_time_bias=false"],
    "no bias": ["hstu", "user.relative_position_bias=false", "user.relative_time_bias=false"],
    "large": ["hstu_large"],
    "bytedance": ["hstu_bytedance"],
}


def hstu_tower(name: str, *changes: str) -> tuple[nn.Module, float, int]:
    """The model, what item vectors are multiplied by, and its heads."""
    buckets = [] if name == "hstu_bytedance" else ["user.num_time_buckets=10"]
    heads = 1 if "user.num_heads=1" in changes else HEADS
    scale = 1.0 if name == "hstu_bytedance" else math.sqrt(DIM)
    return tower(name, *buckets, *changes), scale, heads


@pytest.mark.parametrize("known", [False, True], ids=["target time hidden", "target time known"])
@pytest.mark.parametrize("form", HSTUS.values(), ids=HSTUS)
def test_hstu_equals_its_equations(form: list[str], known: bool, rows: Any) -> None:
    x, mask, times = rows
    model, scale, heads = hstu_tower(*form)
    targets = times + 7_000 * (1 + torch.arange(LENGTH)) * mask
    found = encode_rows(model, x, mask, times, targets if known else None)
    for row, count in enumerate(mask.sum(1)):
        queries = (targets if known else times)[row, :count]
        weights = dict(model.state_dict())
        last = "bytedance" in form[0]
        expected = hstu(weights, x[row, :count], times[row, :count], queries, scale, heads, last)
        torch.testing.assert_close(found[row, :count], expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("users", "queries"), [(3, 6), (1, 6), (2, 4), (3, 1)])
@pytest.mark.parametrize("form", HSTUS.values(), ids=HSTUS)
def test_hstus_gradients_are_those_of_its_equations(
    form: list[str], users: int, queries: int, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its attention takes users and queries of a batch in tiles."""
    tiles = [
        (slice(first, first + users), slice(begin, min(begin + queries, 6)), slice(0, min(begin + queries, 6)))
        for begin in range(0, 6, queries)
        for first in range(0, 3, users)
    ]
    monkeypatch.setattr(hstu_module, "_tiles", lambda q: tiles)
    x, mask, times = rows
    model, scale, heads = hstu_tower(*form)
    x.requires_grad_()
    encode_rows(model, x, mask, times)[mask].sin().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()} | {"x": x.grad}
    model.zero_grad()
    x.grad = None
    weights = dict(model.named_parameters())
    for row, count in enumerate(mask.sum(1)):
        own = times[row, :count]
        hstu(weights, x[row, :count], own, own, scale, heads, "bytedance" in form[0]).sin().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()} | {"x": x.grad}
    for name, gradient in expected.items():
        assert gradient is not None
        assert gradient.any(), name
        # those of the biases are summed in float32
        torch.testing.assert_close(
            found[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda text, of=name: f"{of}: {text}"
        )


@pytest.mark.parametrize(("users", "heads", "length"), [(1, 1, 1), (70, 2, 64), (5, 3, 200), (2, 8, 129)])
def test_hstus_tiles_hold_each_pair_of_a_query_and_what_it_may_see_once(users: int, heads: int, length: int) -> None:
    seen = torch.zeros(users, length, length, dtype=torch.int64)
    for tile in hstu_module._tiles(torch.zeros(users, heads, length, 4)):
        seen[tile] += 1
    assert (seen.tril() == torch.ones(length, length).tril()).all()


def test_hstu_1b_has_the_published_number_of_weights_in_its_blocks() -> None:
    """22 blocks of 32 heads, 2,048 wide: the 462 M of the HLLM paper, of which 461.4 M are in the blocks."""
    config = compose(["user=hstu_1b", "items=id"])
    with torch.device("meta"):
        model = get_class(config.user._target_)(config.user, 50)
    assert sum(parameter.numel() for parameter in model.blocks.parameters()) == 461_418_496
    assert (len(model.blocks), model.blocks[0].num_heads) == (22, 32)


def llama(weights: Weights, x: Tensor, heads: int, key_heads: int) -> Tensor:
    """A Llama's decoder (arXiv 2302.13971) on vectors in place of words: RMS norms, rotary positions, shared keys."""

    def rms(name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]

    def turned(x: Tensor, place: int) -> Tensor:
        half = len(x) // 2
        angles = torch.tensor([place / 10_000 ** (pair / half) for pair in range(half)])
        a, b = x[:half], x[half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])

    layer = 0
    while (block := f"model.layers.{layer}") + ".self_attn.q_proj.weight" in weights:
        normed = rms(f"{block}.input_layernorm", x)
        q, k, v = (linear(weights, f"{block}.self_attn.{part}_proj", normed) for part in "qkv")
        width = q.shape[1] // heads
        attended = torch.zeros_like(q)
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            shared = slice(head * key_heads // heads * width, (head * key_heads // heads + 1) * width)
            for i in range(len(x)):
                scores = [turned(q[i, own], i) @ turned(k[j, shared], j) / math.sqrt(width) for j in range(i + 1)]
                exps = torch.stack(scores).exp()
                attended[i, own] = (exps / exps.sum()) @ v[: i + 1, shared]
        x = x + linear(weights, f"{block}.self_attn.o_proj", attended)
        normed = rms(f"{block}.post_attention_layernorm", x)
        gate, up = (linear(weights, f"{block}.mlp.{part}_proj", normed) for part in ("gate", "up"))
        x = x + linear(weights, f"{block}.mlp.down_proj", gate * sigmoid(gate) * up)
        layer += 1
    assert layer == 2
    return rms("model.norm", x)


def test_the_user_llm_equals_a_llamas_equations(
    tiny_family: Callable[[str], Path], llm_config: Callable[..., LLMConfig]
) -> None:
    """The tower of SASRec-1B: with items=id items.dim=512 its inputs are ids through a linear map."""
    folder = tiny_family("llama")
    loaded, _ = load_trainable(LLMFiles("tiny", folder), llm_config(folder))
    model = UserLLM(loaded, LLMUserConfig(name="llm"), LENGTH).eval()
    mask = torch.arange(LENGTH) < torch.tensor([[6], [3], [1]])
    x = torch.randn(3, LENGTH, model.dim, generator=torch.Generator().manual_seed(1))
    found = encode_rows(model, x, mask, torch.zeros_like(mask, dtype=torch.int64))
    for row, count in enumerate(mask.sum(1)):
        expected = llama(dict(model.state_dict()), x[row, :count], heads=4, key_heads=2)
        torch.testing.assert_close(found[row, :count], expected, atol=1e-5, rtol=1e-5)
