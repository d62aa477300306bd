from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hllm.config import Dtype, LLMConfig, Packing, Pooling, TextConfig
from hllm.data.schema import Catalog
from hllm.errors import ConfigError, LLMError
from hllm.items import encoder as encoders
from hllm.items.backbone import load_backbone
from hllm.items.encoder import Encoder, shared_prefix, token_ids
from hllm.items.files import LLMFiles
from hllm.items.text import item_texts

Config = Callable[..., LLMConfig]


def encoder(folder: Path, llm: LLMConfig, texts: list[str], **options: Any) -> Encoder:
    return Encoder(
        load_backbone(LLMFiles("tiny", folder), llm), llm, texts, [str(row) for row in range(len(texts))], **options
    )


def one_by_one(encoder: Encoder) -> Tensor:
    """The reference: one text a forward pass, no padding, no cache."""
    vectors = []
    for tokens in encoder.tokens:
        with torch.no_grad():
            hidden = encoder.backbone.model(input_ids=torch.tensor([tokens])).last_hidden_state[0].float()
        pooled = {Pooling.last: hidden[-1], Pooling.mean: hidden.mean(0), Pooling.cls: hidden[0]}
        vectors.append(pooled[encoder.llm.pooling])
    return torch.stack(vectors)


def batched(encoder: Encoder) -> Tensor:
    order = encoder.order()
    vectors = torch.empty(len(order), encoder.backbone.dim)
    vectors[order] = encoder.encode(order).float()
    return vectors


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("pooling", [Pooling.last, Pooling.mean])
def test_decoder_batched_equals_one_by_one(
    save_llama: Callable[..., Path],
    llm_config: Config,
    movies: Catalog,
    text: TextConfig,
    tmp_path: Path,
    padding_side: str,
    template: str,
    pooling: Pooling,
) -> None:
    folder = save_llama(tmp_path / "llama", template, padding_side)
    subject = encoder(folder, llm_config(folder, pooling=pooling), item_texts(movies, text))
    assert subject.backbone.tokenizer.padding_side == padding_side
    torch.testing.assert_close(batched(subject), one_by_one(subject), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("tiny_llama", {}),
        ("tiny_llama", {"save_work": False}),
        ("tiny_llama", {"pooling": Pooling.mean}),
        ("tiny_bert", {"pooling": Pooling.mean}),
        ("tiny_bert", {"pooling": Pooling.cls}),
    ],
)
def test_texts_end_to_end_equal_one_by_one(
    request: pytest.FixtureRequest,
    llm_config: Config,
    movies: Catalog,
    text: TextConfig,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    options: dict[str, Any],
) -> None:
    """And auto, where a kernel runs, takes them so unless they share much of their tokens."""
    folder, texts = request.getfixturevalue(model), item_texts(movies, text)
    subject = encoder(folder, llm_config(folder, packing=Packing.packed, **options), texts)
    expected = one_by_one(subject)
    monkeypatch.setattr(Encoder, "_run_prefix", None)
    torch.testing.assert_close(batched(subject), expected, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(encoders, "can_pack", lambda *_: True)
    subject = encoder(folder, llm_config(folder, **options), texts)
    if subject.share_prefix:
        with pytest.raises(TypeError):  # the prefix's pass
            batched(subject)
        monkeypatch.setattr(encoders, "PREFIX_SHARE", 1.0)
    monkeypatch.setattr(encoders, "pad", None)
    torch.testing.assert_close(batched(subject), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", [Pooling.last, Pooling.mean, Pooling.cls])
def test_bert_batched_equals_one_by_one(
    tiny_bert: Path, llm_config: Config, movies: Catalog, text: TextConfig, pooling: Pooling
) -> None:
    subject = encoder(tiny_bert, llm_config(tiny_bert, pooling=pooling), item_texts(movies, text))
    torch.testing.assert_close(batched(subject), one_by_one(subject), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bert"])
def test_bfloat16_stays_near_float32(
    request: pytest.FixtureRequest, llm_config: Config, movies: Catalog, text: TextConfig, model: str
) -> None:
    folder, texts = request.getfixturevalue(model), item_texts(movies, text)
    rounded = encoder(folder, llm_config(folder, dtype=Dtype.bfloat16), texts)
    exact = encoder(folder, llm_config(folder), texts)
    assert rounded.encode([0]).dtype == torch.bfloat16
    for reference in (one_by_one(rounded), one_by_one(exact)):
        assert torch.cosine_similarity(batched(rounded), reference).min() > 0.999


def test_shared_prefix_and_last_feed_forward_are_run_once_and_change_nothing(
    tiny_llama: Path, llm_config: Config, movies: Catalog, text: TextConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = item_texts(movies, text)
    plain = batched(encoder(tiny_llama, llm_config(tiny_llama, save_work=False), texts))
    prefixes: list[list[int]] = []
    run = Encoder._run_prefix
    monkeypatch.setattr(Encoder, "_run_prefix", lambda *args: prefixes.append(args[1]) or run(*args))
    saving = encoder(tiny_llama, llm_config(tiny_llama), texts)
    tokens: list[int] = []
    saving.backbone.model.layers[-1].mlp.act_fn.register_forward_hook(lambda *args: tokens.append(args[2].shape[-2]))
    torch.testing.assert_close(batched(saving), plain, atol=1e-5, rtol=1e-5)
    assert min(map(len, prefixes)) == 6, "Compress the following : title :"
    assert sum(tokens) == len(texts) + sum(map(len, prefixes)), (
        "the last feed-forward runs once a text, and for prefixes"
    )


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7]], [1, 2, 3, 4, 5]),
        ([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5]], [1, 2, 3, 4]),
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4]], []),
        ([[1, 2, 3, 4, 5], [9]], []),
        ([[1, 2, 3, 4, 5, 6]], []),
    ],
)
def test_every_text_keeps_a_token_of_its_own(batch: list[list[int]], expected: list[int]) -> None:
    assert shared_prefix(batch) == expected


def test_batches_keep_the_budget_and_the_order(
    tiny_llama: Path, llm_config: Config, movies: Catalog, text: TextConfig
) -> None:
    subject = encoder(tiny_llama, llm_config(tiny_llama), item_texts(movies, text))
    batches = subject._batches(subject.order())
    assert [row for batch in batches for row in batch] == subject.order()
    sizes = [len(batch) * max(len(subject.tokens[row]) for row in batch) for batch in batches]
    assert max(sizes) <= 64
    assert max(map(len, batches)) > 1


def test_long_text_is_cut_and_counted(tiny_bert: Path, llm_config: Config, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["word1 " * 10_000, "word1"]
    subject = encoder(tiny_bert, llm_config(tiny_bert, pooling=Pooling.cls), texts)
    assert "1 of 2 item texts are longer than llm.max_tokens=32" in caplog.text
    separator = subject.backbone.tokenizer.sep_token_id
    assert [len(tokens) for tokens in subject.tokens] == [32, 3]
    assert subject.tokens[0][-1] == separator


def test_a_large_catalogue_passes_the_tokenizer_in_chunks_and_its_tokens_stay_the_same(
    tiny_bert: Path, llm_config: Config, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["word1 " * (7 * row % 50) for row in range(20)]
    whole = encoder(tiny_bert, llm_config(tiny_bert), texts)
    reference = token_ids(whole.backbone.tokenizer, texts, truncation=True, max_length=32)["input_ids"]
    asked: list[int] = []
    monkeypatch.setattr(encoders, "CHUNK", 3)
    monkeypatch.setattr(
        encoders, "token_ids", lambda *args, **options: asked.append(len(args[1])) or token_ids(*args, **options)
    )
    caplog.clear()
    subject = encoder(tiny_bert, llm_config(tiny_bert), texts)
    assert max(asked) == 3
    assert list(subject.tokens) == list(whole.tokens) == reference
    assert subject.tokens.ids.dtype == np.int32
    assert subject.order() == sorted(range(20), key=lambda row: (-len(reference[row]), row))
    assert [record.getMessage().split(" texts")[0] for record in caplog.records] == [
        f"{sum(len(text.split()) + 2 > 32 for text in texts)} of 20 item"
    ]


def test_empty_text_has_a_vector(tiny_llama: Path, llm_config: Config) -> None:
    subject = encoder(tiny_llama, llm_config(tiny_llama), ["", "word1"])
    assert subject.tokens[0] == [subject.backbone.tokenizer.bos_token_id]
    assert batched(subject).isfinite().all()


def test_vector_that_is_not_finite_names_item_and_dtype(tiny_llama: Path, llm_config: Config) -> None:
    subject = encoder(tiny_llama, llm_config(tiny_llama), ["word1 word2", "word1"])
    with torch.no_grad():
        subject.backbone.model.get_input_embeddings().weight[subject.tokens[0][1]] = torch.nan
    with pytest.raises(LLMError, match=r"item '0': .*llm\.dtype=float32"):
        batched(subject)


def test_cls_pooling_needs_a_cls_token(tiny_llama: Path, llm_config: Config) -> None:
    with pytest.raises(ConfigError, match=r"llm\.pooling=cls: .*no \[CLS\] token"):
        encoder(tiny_llama, llm_config(tiny_llama, pooling=Pooling.cls), ["word1"])


def test_max_tokens_beyond_the_model_is_refused(tiny_bert: Path, llm_config: Config) -> None:
    with pytest.raises(ConfigError, match=r"llm\.max_tokens=65: .* at most 64"):
        encoder(tiny_bert, llm_config(tiny_bert, max_tokens=65, token_budget=65), ["word1"])


def test_tokenizer_of_another_model_is_refused(tiny_llama: Path, llm_config: Config) -> None:
    llm = llm_config(tiny_llama)
    backbone = load_backbone(LLMFiles("tiny", tiny_llama), llm)
    backbone.model.resize_token_embeddings(20)
    with pytest.raises(LLMError, match="do not belong together"):
        Encoder(backbone, llm, ["word39"], ["0"])
