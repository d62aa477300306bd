"""Compiled layers compute what they did, gradients included, and keep the names of their weights."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hllm import compiling
from hllm.build import build_datamodule, build_module
from hllm.compiling import compile_layers, compiled
from hllm.config import Config, LLMConfig, Packing, Pooling
from hllm.data.schema import Batch
from hllm.errors import ConfigError
from hllm.items.backbone import load_backbone
from hllm.items.encoder import Encoder
from hllm.items.files import LLMFiles
from hllm.module import Recommender
from hllm.users.hstu import PointwiseAttention

with_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler"
)
# what torch.compile says of itself: of an API that its own code still uses, and of breaks that are asked for
quietly = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    """No pool of compiling processes that outlives the tests; nothing compiled is left for other tests."""
    from torch._inductor import config

    with config.patch(compile_threads=1):
        yield
    compiled.cache_clear()
    torch.compiler.reset()


@pytest.fixture
def step(run_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Tensor]]:
    """Loss and gradients of two training steps of differently long rows, by name."""
    monkeypatch.setattr(Recommender, "log", lambda *args, **kwargs: None)

    def run(*overrides: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        config = run_config("items=id", "dataset.batch_size=5", *overrides)
        data = build_datamodule(config)
        module, found = build_module(config, data), {}
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        module.eval()  # no dropout
        torch.manual_seed(1)
        batches: list[Batch] = list(data.train_dataloader())[:2]
        assert len(batches[0].places) != len(batches[1].places)
        for number, batch in enumerate(batches):
            loss = module.training_step(batch, 0)
            loss.backward()
            found[f"loss {number}"] = loss.detach()
        assert set(module.state_dict()) == set(build_module(run_config("items=id", *overrides[:-1]), data).state_dict())
        return found | {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    return run


@with_compiler
@quietly
@pytest.mark.parametrize("tower", ["transformer", "hstu", "llm"])
def test_a_compiled_user_tower_takes_the_same_step(tower: str, step: Callable[..., dict[str, Tensor]]) -> None:
    plain, fused = (step(f"user={tower}", f"user.compile={flag}") for flag in (False, True))
    assert len(plain) > 6
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-4)


def hstu_attention(users: int, length: int, fuse: bool) -> list[Tensor]:
    """Output and gradients of HSTU's attention, of queries and keys of 3 and values of 5, in 2 heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(users, 2, length, 3), (users, 2, length, 3), (users, 2, length, 5), (length,), (4,)]
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    buckets = torch.randint(4, (users, length, length), generator=generator, dtype=torch.int32)
    out: Tensor = PointwiseAttention.apply(*inputs, buckets, length, fuse)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), inputs)]


@with_compiler
@quietly
def test_hstus_fused_tiles_have_the_plain_ones_output_and_gradients() -> None:
    """Of other sizes, too, than those that were compiled for."""
    for shape in ((4, 7), (6, 9)):
        torch.testing.assert_close(hstu_attention(*shape, fuse=True), hstu_attention(*shape, fuse=False))
    assert compiled.cache_info().currsize == 2


@with_compiler
@quietly
def test_a_compiled_item_llm_gives_the_same_vectors(
    tiny_family: Callable[[str], Path], llm_config: Callable[..., LLMConfig]
) -> None:
    texts = [f"word{n} word{n + 1} word7 word8"[: 12 + 3 * (n % 5)] for n in range(9)]
    names = [str(row) for row in range(9)]
    found = []
    for flag in (False, True):
        llm = llm_config(tiny_family("llama"), pooling=Pooling.last, packing=Packing.packed, compile=flag)
        encoder = Encoder(load_backbone(LLMFiles("tiny", tiny_family("llama")), llm), llm, texts, names)
        found.append(encoder.encode(encoder.order()))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_without_a_compiler_the_message_names_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"user.compile=true: torch.compile needs a C\+\+ compiler"):
        compile_layers(torch.nn.ModuleList([torch.nn.Linear(2, 2)]), "user.compile")


def test_each_layer_is_compiled_and_nothing_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: calls.append((module, options)))
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    compile_layers(torch.nn.Sequential(torch.nn.Linear(2, 2), layers), "llm.compile")
    assert calls == [(layer, {"dynamic": True}) for layer in layers]
