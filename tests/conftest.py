"""Tiny random language models, a tiny MovieLens and runs on them; the session's one cache of real files."""

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
)

from hllm.build import build_datamodule
from hllm.config import Config, Dtype, LLMConfig, TextConfig, compose
from hllm.data.base import SequenceDataModule
from hllm.data.schema import Catalog
from hllm.evaluate import Evaluation
from hllm.fit import train
from hllm.users.layout import Layout


def encode_rows(tower: nn.Module, x: Tensor, mask: Tensor, times: Tensor, targets: Tensor | None = None) -> Tensor:
    """What a user tower makes of (B, L, D) vectors of rows with a (B, L) mask: (B, L, D), zeros at padding."""
    layout = Layout.of(mask)
    return layout.rows(tower(x[mask], layout, times[mask], None if targets is None else targets[mask]))


WORDS = [f"word{number}" for number in range(40)]
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
"Of every tiny model."
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def pytest_configure() -> None:
    """One thread a worker, and in the processes it starts: tiny models gain nothing from more, and workers collide.

    And a port for processes that meet: below those that the system hands out, where a port that Lightning finds free
    may be taken before it is used.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["MASTER_PORT"] = str(20_000 + os.getpid() % 10_000)
    torch.set_num_threads(1)


def pytest_runtest_setup() -> None:
    """Another port each test: on a busy machine the processes of the test before may still listen on theirs.

    Each worker steps through ports that leave its own remainder.
    """
    for name in ("LOCAL_RANK", "NODE_RANK", "GLOBAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR"):
        os.environ.pop(name, None)  # left by a test with processes, they say that the next one's are started by others
    workers, own = (
        int(os.environ.get(f"PYTEST_XDIST_{name}", "1").removeprefix("gw")) for name in ("WORKER_COUNT", "WORKER")
    )
    port = int(os.environ["MASTER_PORT"]) + workers
    os.environ["MASTER_PORT"] = str(20_000 + (port - port % workers + own % workers) % 10_000)


@pytest.fixture
def text() -> TextConfig:
    return TextConfig(prompt="Compress the following: ", template="title: {title} genres: {genres}")


@pytest.fixture
def movies() -> Catalog:
    """23 items of 1 to 12 words; item 7 has no text at all."""
    titles = [" ".join(WORDS[(row * 7 + word) % 40] for word in range(1 + row % 12)) for row in range(23)]
    titles[7] = ""
    genres = [WORDS[row % 5] for row in range(23)]
    genres[7] = ""
    return Catalog([f"m{row}" for row in range(23)], {"title": titles, "genres": genres})


def _tokenizer(template: str, specials: dict[str, str], padding_side: str) -> PreTrainedTokenizerFast:
    prompt = ["Compress", "the", "following", ":", "title", "genres"]
    vocabulary = {word: number for number, word in enumerate([*specials.values(), *prompt, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=specials["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(word, vocabulary[word]) for word in specials.values()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side=padding_side, **specials)


def _save(model: Any, tokenizer: Any, folder: Path) -> Path:
    # spread the weights: with the usual initialisation all vectors look alike
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def save_llama() -> Callable[..., Path]:
    """Saves a random Llama of 2 layers, 32 wide; ``template`` is what its tokenizer puts around a text."""

    def save(folder: Path, template: str = "$A", padding_side: str = "right", dim: int = 32) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = LlamaConfig(hidden_size=dim, **SIZES)
            return _save(LlamaModel(config), _tokenizer(template, SPECIALS, padding_side), folder)

    return save


@pytest.fixture(scope="session")
def tiny_llama(save_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llm") / "llama")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    specials = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(hidden_size=32, **SIZES)
        tokenizer = _tokenizer("[CLS] $A [SEP]", specials, "right")
        return _save(BertModel(config), tokenizer, tmp_path_factory.mktemp("llm") / "bert")


@pytest.fixture(scope="session")
def tiny_family(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a random model of a family: bert, or a decoder of 2 layers, 32 wide, 4 heads on 2 of keys.

    The Llama's tokenizer adds a bos token, the others' add nothing; the Mistral looks 8 tokens back.
    """
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "llama": (LlamaConfig, LlamaModel, {}),
        "mistral": (MistralConfig, MistralModel, {"sliding_window": 8}),
        "qwen2": (Qwen2Config, Qwen2Model, {}),
        "qwen3": (Qwen3Config, Qwen3Model, {"head_dim": 8}),
    }

    @functools.cache
    def folder(family: str) -> Path:
        if family == "bert":
            return tiny_bert
        make_config, make_model, options = kinds[family]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = make_config(hidden_size=32, num_key_value_heads=2, **SIZES, **options)
            if family == "qwen2":  # its folders are read by this class whatever they say: a token a letter here
                letters = [*SPECIALS.values(), *"abcdefghijklmnopqrstuvwxyzC0123456789:Ġ"]
                tokenizer = Qwen2Tokenizer(vocab={text: number for number, text in enumerate(letters)}, merges=[])
            else:
                tokenizer = _tokenizer("<s> $A" if family == "llama" else "$A", SPECIALS, "right")
            return _save(make_model(config), tokenizer, tmp_path_factory.mktemp("llm") / family)

    return folder


@pytest.fixture
def llm_config() -> Callable[..., LLMConfig]:
    """An LLMConfig for a tiny model's folder: float32 on the CPU, small shards and batches."""

    def config(folder: Path, **changes: Any) -> LLMConfig:
        values = {"shard_items": 5, "token_budget": 64, "max_tokens": 32, "dtype": Dtype.float32, "device": "cpu"}
        return LLMConfig(name="tiny", model=str(folder), **(values | changes))

    return config


@pytest.fixture(scope="session")
def shared_cache() -> Path:
    """Where the pinned files are fetched once for all sessions and runs."""
    return Path(os.environ.get("HLLM_CACHE", "~/.cache/hllm")).expanduser()


GENRES = 19
NUM_MOVIES, NUM_USERS = 30, 40


@pytest.fixture(scope="session")
def movielens_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """u.data and u.item of 40 users who each watch 5 to 14 of 30 movies one after another, wherever they begin."""
    folder = tmp_path_factory.mktemp("movielens")
    movies = [
        f"{movie}|{WORDS[movie]} {WORDS[-movie]} ({1960 + movie})|01-Jan-1995||http://m|"
        + "|".join(str(int(genre in (movie % 5 + 1, movie % 7 + 6))) for genre in range(GENRES))
        for movie in range(1, NUM_MOVIES + 1)
    ]
    ratings = [
        f"{user}\t{(user * 7 + event) % NUM_MOVIES + 1}\t{user % 5 + 1}\t{880_000_000 + 600 * event}"
        for user in range(1, NUM_USERS + 1)
        for event in range(5 + user % 10)
    ]
    (folder / "u.item").write_text("\n".join(movies) + "\n", encoding="iso-8859-1")
    (folder / "u.data").write_text("\n".join(sorted(ratings)) + "\n")
    return folder


@pytest.fixture(scope="session")
def run_config(
    movielens_folder: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Config]:
    """Config of a training run that takes a second: the data of ``movielens_folder``, a random Llama, one layer."""
    cache = tmp_path_factory.mktemp("cache")

    def config(*overrides: str) -> Config:
        # a User LLM has its own width; a trained Item LLM the trainer's precision, and room for [ITEM]
        user = [] if "user=llm" in overrides else ["user.dim=16"]
        llm = ["llm.max_tokens=63"] if "items=llm" in overrides else ["llm.max_tokens=64", "llm.dtype=float32"]
        return compose(
            [
                f"dataset.root={movielens_folder}",
                "dataset.check_counts=false",
                "dataset.batch_size=8",
                f"llm.model={tiny_llama}",
                "llm.wheel=null",
                "llm.gguf_file=null",
                "llm.name=tiny",
                *llm,
                "llm.device=cpu",
                f"cache_dir={cache}",
                "logger=csv",
                "user.num_layers=1",
                *user,
                "optimizer.lr=0.01",
                "trainer.max_epochs=3",
                "trainer.accelerator=cpu",
                "trainer.enable_progress_bar=false",
                "trainer.log_every_n_steps=1",
                "evaluation.ks=[5,10]",
                "evaluation.bucket_edges=[1,10,14]",
                *overrides,
            ]
        )

    return config


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    config: Config
    folder: Path
    evaluation: Evaluation

    @property
    def best(self) -> Path:
        return self.folder / "checkpoints" / "best.ckpt"

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def run_training(run_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Trains in a folder of its own."""

    def run(*overrides: str) -> Run:
        config, folder = run_config(*overrides), tmp_path_factory.mktemp("run")
        with warnings.catch_warnings():
            return Run(config, folder, train(config, folder))

    return run


@pytest.fixture(scope="session")
def id_run(run_training: Callable[..., Run]) -> Run:
    return run_training("items=id")


@pytest.fixture(scope="session")
def cached_run(run_training: Callable[..., Run]) -> Run:
    return run_training("items=cached")


@pytest.fixture(scope="session")
def joint_run(run_training: Callable[..., Run]) -> Run:
    """Both language models trained together, as the official HLLM."""
    flags = ["loss=nce_official", "loss.num_negatives=8", "head=cosine_learned", "optimizer=hllm", "optimizer.lr=0.001"]
    return run_training("items=llm", "user=llm", *flags, "trainer.max_epochs=1")


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., SequenceDataModule]:
    """The data module of a composed config, on the files of ``tmp_path``."""

    def module(*overrides: str) -> SequenceDataModule:
        data = build_datamodule(compose([*overrides, f"dataset.root={tmp_path}", f"cache_dir={tmp_path / 'cache'}"]))
        assert isinstance(data, SequenceDataModule)
        return data

    return module
