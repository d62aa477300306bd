"""Both ways of computing attention give the same, and the one that is faster here is taken."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hllm.config import AttentionPath
from hllm.errors import ConfigError
from hllm.items.varlen import Pack, exact
from hllm.users import attention
from hllm.users.attention import MOST_EVENTS, causal_attention
from hllm.users.layout import Layout


def states(length: int = 7, dtype: torch.dtype = torch.float32, width: int = 4) -> list[Tensor]:
    """Queries, keys and values of 3 users and 2 heads, and a bias with the causal mask in it."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(3, 2, length, width, generator=generator).to(dtype) for _ in range(3)]
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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("biased", [False, True])
def test_flex_attention_on_a_cpu_has_the_same_output(biased: bool, mode: type) -> None:
    for length in (7, 130, 8):
        q, k, v, bias = (part.detach() for part in states(length))
        with mode():
            plain, flex = (
                causal_attention(q, k, v, bias if biased else None, 0.0, path)
                for path in (AttentionPath.plain, AttentionPath.flex)
            )
        torch.testing.assert_close(flex, plain)


def test_a_block_mask_made_in_an_evaluation_can_be_used_in_training() -> None:
    with torch.inference_mode():
        mask = attention._causal_blocks(9, torch.device("cpu"))
    assert attention._causal_blocks(9, torch.device("cpu")) is mask
    assert not mask.kv_indices.is_inference()


def test_flex_attention_is_not_trained_on_a_cpu() -> None:
    q, k, v, bias = states()
    with pytest.raises(ConfigError, match=r"user\.attention=flex: has no backward pass on a CPU; set auto"):
        causal_attention(q.detach(), k.detach(), v.detach(), bias, 0.0, AttentionPath.flex)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention has no backward pass on a CPU")
@pytest.mark.parametrize("length", [300, 128, 1000])
def test_flex_attention_has_the_plain_gradients_on_a_gpu(length: int) -> None:
    found = []
    for path in (AttentionPath.plain, AttentionPath.flex):
        parts = [part.detach().cuda().requires_grad_() for part in states(length, width=16)]
        causal_attention(*parts, 0.0, path).sin().sum().backward()
        found.append([part.grad.nan_to_num() for part in parts])
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-3)


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


def test_by_sequence_attention_equals_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs in one kernel, here sequence by sequence; and which paths, dropouts and biases leave it."""
    layout = Layout.of(torch.arange(6) < torch.tensor([[2], [6], [1], [3]]))
    qkv = torch.randn(len(layout.row), 3 * 8, generator=torch.Generator().manual_seed(0))
    calls: list[float] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, pack: Pack, span: tuple[int, int], scale: None, p: float) -> Tensor:
        calls.append(p)
        assert (pack.longest, span, scale) == (6, (-1, 0), None)
        borders = pack.borders.tolist()
        parts = [
            F.scaled_dot_product_attention(
                *(x[begin:end].transpose(0, 1) for x in (q, k, v)), is_causal=True
            ).transpose(0, 1)
            for begin, end in itertools.pairwise(borders)
        ]
        return torch.cat(parts)

    found = []
    for fused in (exact, kernel):
        monkeypatch.setattr(attention, "fused_kernel", lambda *asked, fused=fused: fused)
        own = qkv.clone().requires_grad_()
        out = attention.attend(own, layout, 2, None, 0.0, AttentionPath.auto)
        out.sin().sum().backward()
        found.append([out.detach(), own.grad])
    torch.testing.assert_close(*found)
    assert calls == [0.0]
    attention.attend(qkv, layout, 2, None, 0.0, AttentionPath.plain)
    attention.attend(qkv, layout, 2, torch.zeros(2, 6, 6), 0.0, AttentionPath.auto)
    assert calls == [0.0]
