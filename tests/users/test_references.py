"""Each user tower equals a reference of a few lines: one row at a time, one event at a time, sums written out.

The references read a tower's weights and share no code with it. Everything is in float64, so that 1e-9 is asked for.
n events of a row, D width.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hydra.utils import get_class
from torch import Tensor, nn

from hllm.config import compose

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
    found = model(x, mask, times)
    for row, count in enumerate(mask.sum(1)):
        expected = reference(dict(model.state_dict()), x[row, :count])
        torch.testing.assert_close(found[row, :count], expected, atol=1e-9, rtol=1e-9)
