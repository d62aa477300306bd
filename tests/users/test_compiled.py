"""What torch.compile makes for a GPU equals the plain functions. Here it compiles for the CPU, which asks for C++."""

import shutil
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hllm.config import AttentionPath
from hllm.users import hstu as hstu_module
from hllm.users.attention import causal_attention, compiled
from hllm.users.hstu import PointwiseAttention

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile for a CPU needs g++"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # torch's own, as its compiler is imported
]


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    """No pool of compiling processes that outlives the tests; nothing compiled is left for other tests."""
    from torch._inductor import config

    with config.patch(compile_threads=1):
        yield
    compiled.cache_clear()
    torch.compiler.reset()


def attend(users: int, length: int) -> list[Tensor]:
    """Output and gradients of HSTU's attention, of queries and keys of 3 and values of 5, in 2 heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(users, 2, length, 3), (users, 2, length, 3), (users, 2, length, 5), (length,), (4,)]
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    buckets = torch.randint(4, (users, length, length), generator=generator, dtype=torch.int32)
    out: Tensor = PointwiseAttention.apply(*inputs, buckets, length)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), inputs)]


def test_hstus_fused_tiles_have_the_plain_ones_output_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other sizes, too, than those that were compiled for."""
    plain, shapes = hstu_module._bodies, [(4, 7), (6, 9)]
    expected = [attend(*shape) for shape in shapes]
    fused: list[bool] = []
    monkeypatch.setattr(hstu_module, "_bodies", lambda fuse: fused.append(fuse) or plain(True))
    for shape, found in zip(shapes, expected, strict=True):
        torch.testing.assert_close(attend(*shape), found)
    assert fused == [False] * 4, "on a CPU it is not fused by itself"
    assert compiled.cache_info().currsize == 2


def test_flex_attention_in_a_compiled_block_equals_the_products_written_out() -> None:
    def block(x: Tensor, bias: Tensor, path: AttentionPath) -> Tensor:
        q, k, v = F.layer_norm(x, x.shape[-1:]).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return causal_attention(q, k, v, bias, 0.0, path) + 1

    length = 20
    x, bias = torch.randn(3, length, 96), torch.randn(2, length, length)
    bias = bias.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    with torch.no_grad():
        found = torch.compile(block, fullgraph=True)(x, bias, AttentionPath.flex)
        torch.testing.assert_close(found, block(x, bias, AttentionPath.plain))
