"""The token cache: made once, mapped by later runs, made anew where it is torn or would be other tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hllm.config import LLMConfig, Pooling, TextConfig
from hllm.data.schema import Catalog
from hllm.items import tokens as cache
from hllm.items.backbone import load_tokenizer
from hllm.items.encoder import Tokens, tokenize
from hllm.items.files import LLMFiles
from hllm.items.text import item_texts
from hllm.items.tokens import catalog_tokens, tokens_digest

Make = Callable[..., Tokens]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever the catalogue is tokenised."""
    calls: list[int] = []
    monkeypatch.setattr(cache, "tokenize", lambda *args: calls.append(1) or tokenize(*args))
    return calls


@pytest.fixture
def make(
    tiny_bert: Path, llm_config: Callable[..., LLMConfig], movies: Catalog, text: TextConfig, tmp_path: Path
) -> Make:
    files = LLMFiles("tiny", tiny_bert)

    def tokens(tokenizer: Any = None, **options: Any) -> Tokens:
        llm = llm_config(tiny_bert, **options)
        return catalog_tokens(movies, text, llm, files, tokenizer or load_tokenizer(files), tmp_path)

    return tokens


def test_tokens_are_those_of_the_texts_and_made_once(
    make: Make, made: list[int], movies: Catalog, text: TextConfig, tiny_bert: Path
) -> None:
    """Golden string to ids: prompt and template as given, then what the tokenizer makes of it."""
    tokenizer = load_tokenizer(LLMFiles("tiny", tiny_bert))
    expected = [tokenizer.encode(one) for one in item_texts(movies, text)]
    assert [list(make())[row] for row in range(23)] == expected
    assert list(make()) == expected
    assert len(made) == 1


def test_before_an_item_token_a_text_keeps_its_first_tokens_alone(make: Make, made: list[int]) -> None:
    """Ids = tokenizer.encode(text)[:max_tokens]; without [ITEM] the tokenizer's [SEP] stays at the end."""
    whole = list(make(pooling=Pooling.item))
    plain, ended = (list(make(pooling=pooling, max_tokens=9)) for pooling in (Pooling.item, Pooling.last))
    assert plain == [ids[:9] for ids in whole]
    assert plain != ended
    assert all(ids[-1] == whole[0][-1] for ids in ended)
    assert len(made) == 3, "each is a cache entry of its own"


@pytest.mark.parametrize("name", ["ids", "lengths", "manifest.json"])
def test_a_torn_cache_is_made_anew(make: Make, made: list[int], tmp_path: Path, name: str) -> None:
    expected = list(make())
    (path,) = tmp_path.glob(f"tokens/*/{name}")
    path.write_bytes(path.read_bytes()[:-4])
    assert list(make()) == expected
    assert len(made) == 2


def test_a_tokenizer_that_reads_otherwise_has_a_cache_of_its_own(
    make: Make, made: list[int], tiny_family: Callable[[str], Path]
) -> None:
    """The same files can be read otherwise by another release: SmolLM2 adds BOS under some, and none under others."""
    assert list(make()) != list(make(load_tokenizer(LLMFiles("tiny", tiny_family("llama")))))
    assert len(made) == 2


def test_the_digest_is_of_every_token(make: Make) -> None:
    tokens = make()
    assert tokens_digest(tokens) == tokens_digest(make())
    changed = Tokens.of(tokens.ids.copy(), tokens.lengths)
    changed.ids[-1] += 1
    assert tokens_digest(changed) != tokens_digest(tokens)
