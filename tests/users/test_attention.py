"""Both ways of computing attention give the same, and the one that is faster here is taken."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hllm.config import AttentionPath
from hllm.users.attention import MOST_EVENTS, causal_attention


def states(length: int = 7, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values of 3 users and 2 heads of 4, and a bias with the causal mask in it."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(3, 2, length, 4, generator=generator).to(dtype) for _ in range(3)]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    bias = torch.randn(2, length, length, generator=generator).to(dtype).masked_fill(future, float("-inf"))
    return [part.requires_grad_() for part in (*made, bias)]


@pytest.mark.parametrize("biased", [False, True])
def test_written_out_it_has_the_kernels_output_and_gradients(biased: bool) -> None:
    found = []
    for path in (AttentionPath.kernel, AttentionPath.plain):
        q, k, v, bias = states()
        out = causal_attention(q, k, v, bias if biased else None, 0.0, path)
        out.square().sum().backward()
        grads = [part.grad for part in (q, k, v, *([bias] if biased else []))]
        found.append([out, *(grad.nan_to_num() for grad in grads if grad is not None)])
    assert len(found[0]) == 4 + biased
    torch.testing.assert_close(found[0], found[1])


def test_in_bfloat16_they_are_as_near_to_float32_as_one_another() -> None:
    q, k, v, _ = states(50)
    exact = causal_attention(q, k, v, None, 0.0, AttentionPath.kernel)
    halves = [part.detach().bfloat16() for part in (q, k, v)]
    for path in (AttentionPath.kernel, AttentionPath.plain):
        rounded = causal_attention(*halves, None, 0.0, path).float()
        assert (rounded - exact).norm() < 0.01 * exact.norm(), path


@pytest.mark.parametrize(
    ("length", "dtype", "biased", "kernel"),
    [
        (7, torch.float32, False, True),
        (7, torch.float32, True, False),
        (7, torch.bfloat16, False, False),
        (MOST_EVENTS + 1, torch.bfloat16, False, True),
        (MOST_EVENTS + 1, torch.float32, True, True),
    ],
)
def test_a_cpu_takes_the_kernel_where_it_is_fast(
    length: int, dtype: torch.dtype, biased: bool, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    run = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **o: calls.append(1) or run(*a, **o))
    q, k, v, bias = states(length, dtype)
    causal_attention(q, k, v, bias if biased else None, 0.0)
    assert bool(calls) is kernel


@pytest.mark.parametrize("path", [AttentionPath.kernel, AttentionPath.plain])
def test_dropout_is_of_the_weights(path: AttentionPath) -> None:
    """Of equal values what is left of the weights is a multiple of 1 / (1 - p)."""
    length = 50
    q, k = torch.zeros(2, 4, 1, length, 8)
    torch.manual_seed(0)
    out = causal_attention(q, k, torch.ones(4, 1, length, 8), None, 0.5, path)
    assert torch.equal(out, out[..., :1].expand_as(out))
    assert set(out[:, 0, 0, 0].tolist()) <= {0.0, 2.0}
    assert out[:, 0, -1, 0].mean().item() == pytest.approx(1, abs=0.3)
