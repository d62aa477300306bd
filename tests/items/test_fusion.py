"""Fields embedded apart and joined; what a table's fingerprint is made of."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from hllm.config import Fusion, LLMConfig, Selection, TextConfig
from hllm.data.schema import Catalog
from hllm.errors import ConfigError
from hllm.items import cache, selection
from hllm.items.cache import embed_catalog
from hllm.items.fusion import fuse_vectors
from hllm.items.store import ItemTable, fingerprint

Embed = Callable[..., ItemTable]


@pytest.fixture
def embed(
    movies: Catalog, text: TextConfig, tiny_llama: Path, llm_config: Callable[..., LLMConfig], tmp_path: Path
) -> Embed:
    """Embeds the movies, or another catalogue; changes of the text group."""
    llm = llm_config(tiny_llama)
    return lambda catalog=movies, corpus=None, **changes: embed_catalog(
        catalog, replace(text, **changes), llm, tmp_path, corpus
    )


def alone(embed: Embed, template: str) -> torch.Tensor:
    return embed(template=template).vectors


@pytest.fixture
def gaps(movies: Catalog) -> Catalog:
    """The movies, the first two without one field each; item 7 has none at all."""
    title, genres = (values.to_list() for values in movies.fields.values())
    title[0] = genres[1] = ""
    return Catalog(movies.ids, {"title": title, "genres": genres})


def test_concat_puts_the_fields_side_by_side_with_zeros_for_missing_ones(embed: Embed, gaps: Catalog) -> None:
    table = embed(gaps, fusion=Fusion.concat)
    title, genres = (embed(gaps, template=field).vectors for field in ("title: {title}", " genres: {genres}"))
    assert table.vectors.shape == (23, 64)
    assert not table.vectors[0, :32].any()
    assert not table.vectors[1, 32:].any()
    torch.testing.assert_close(table.vectors[1:, :32], title[1:])
    torch.testing.assert_close(table.vectors[[0, *range(2, 23)], 32:], genres[[0, *range(2, 23)]])


def test_sum_is_the_weighted_mean_of_the_fields_that_are_there(embed: Embed, gaps: Catalog) -> None:
    table = embed(gaps, fusion=Fusion.sum, weights={"title": 3.0})
    title, genres = (embed(gaps, template=field).vectors for field in ("title: {title}", " genres: {genres}"))
    torch.testing.assert_close(table.vectors[2:], (3 * title + genres)[2:] / 4, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(table.vectors[0], genres[0])
    torch.testing.assert_close(table.vectors[1], title[1])


@pytest.mark.parametrize("fusion", [Fusion.concat, Fusion.sum])
def test_an_item_without_any_field_has_the_vector_of_the_empty_text(embed: Embed, fusion: Fusion) -> None:
    empty = embed().vectors[7]
    assert empty.any()
    for part in embed(fusion=fusion).vectors[7].split(32):
        torch.testing.assert_close(part, empty)


def test_16_bits_stay_16_bits() -> None:
    fields = [torch.ones(2, 4, dtype=torch.bfloat16)] * 3
    present = torch.tensor([[True, True], [True, False], [False, False]])
    for fusion, width in ((Fusion.concat, 12), (Fusion.sum, 4)):
        vectors = fuse_vectors(fields, present, fusion, [1.0, 2.0, 3.0])
        assert (vectors.dtype, vectors.shape) == (torch.bfloat16, (2, width))
    assert (vectors == 1).all()


def test_a_changed_field_is_embedded_again_alone_and_the_llm_is_loaded_once(
    embed: Embed, movies: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[object] = []
    load = cache.load_backbone
    monkeypatch.setattr(cache, "load_backbone", lambda *args: loads.append(args) or load(*args))

    def tables() -> set[str]:
        return {path.parent.name for path in tmp_path.glob("embeddings/*/manifest.json")}

    first = embed(fusion=Fusion.concat)
    assert (len(tables()), len(loads)) == (2, 1)
    changed = Catalog(movies.ids, movies.fields | {"genres": pl.Series(["word9"] * 23)})
    second = embed(changed, fusion=Fusion.concat)
    assert (len(tables()), len(loads)) == (3, 2)
    torch.testing.assert_close(first.vectors[:7, :32], second.vectors[:7, :32], atol=0, rtol=0)
    assert embed(fusion=Fusion.sum).fingerprint != first.fingerprint
    assert len(loads) == 2, "another way of joining embeds nothing"


def test_the_fused_fingerprint_is_made_of_all_that_moves_the_vectors(embed: Embed) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"fusion": Fusion.concat},
        {"fusion": Fusion.sum},
        {"fusion": Fusion.sum, "weights": {"title": 2.0}},
        {"fusion": Fusion.sum, "weights": {"genres": 2.0}},
        {"fusion": Fusion.concat, "prompt": ""},
        {"fusion": Fusion.concat, "template": "genres: {genres}title: {title}"},
        {"selection": Selection.bm25_sentences},
        {"selection": Selection.bm25_words},
    ]
    assert len({embed(**change).fingerprint for change in changes}) == len(changes)
    again = embed(fusion=Fusion.sum, weights={"title": 1.0})
    assert again.fingerprint == embed(fusion=Fusion.sum).fingerprint


def test_a_weight_of_no_field_names_those_that_are(embed: Embed) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.text\.weights\.name: not a field .*; it has title, genres"):
        embed(fusion=Fusion.sum, weights={"name": 2.0})


def test_a_table_without_selection_keeps_the_fingerprint_it_had_before(
    embed: Embed, movies: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    made = cache._parts
    monkeypatch.setattr(cache, "_parts", lambda *args: seen.append(made(*args)) or seen[-1])
    table = embed(corpus=movies)
    assert list(seen[0]) == ["texts", "llm", "revision", "weights", "pooling", "max_tokens", "dtype"]
    assert table.fingerprint == fingerprint({"layout": 1} | seen[0])
    embed(selection=Selection.bm25_words)
    assert seen[1].keys() - seen[0].keys() == {"selection"}


def test_all_that_a_selection_is_made_by_moves_the_fingerprint(
    embed: Embed, movies: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"selection": Selection.bm25_words}
    tables = [
        embed(**words),
        embed(corpus=movies, **words),
        embed(corpus=Catalog(movies.ids[:3], {name: values[:3] for name, values in movies.fields.items()}), **words),
    ]
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == "bm25s" else version(name))
    tables.append(embed(**words))
    monkeypatch.setattr(selection, "VERSION", 0)
    tables.append(embed(**words))
    assert len({table.fingerprint for table in tables}) == 5


def test_equal_texts_with_other_borders_between_the_fields_are_selected_apart(embed: Embed) -> None:
    # of the first field all is kept: whether word2 belongs to it decides what the model reads
    catalogs = [
        Catalog(["1"], {"title": title, "genres": genres})
        for title, genres in ((["word1"], ["word2 word3"]), (["word1 word2"], ["word3"]))
    ]
    plain, selected = (
        {embed(catalog, template="{title} {genres}", selection=choice).fingerprint for catalog in catalogs}
        for choice in (Selection.head, Selection.bm25_words)
    )
    assert (len(plain), len(selected)) == (1, 2)


def test_selection_moves_the_vectors_of_long_texts_only(
    movies: Catalog, text: TextConfig, tiny_llama: Path, llm_config: Callable[..., LLMConfig], tmp_path: Path
) -> None:
    llm = llm_config(tiny_llama, max_tokens=15)
    turned = replace(text, template="genres: {genres} title: {title}")
    head, words = (
        embed_catalog(movies, replace(turned, selection=choice), llm, tmp_path).vectors
        for choice in (Selection.head, Selection.bm25_words)
    )
    # prompt and literals are 8 tokens, the genre 1: titles of more than 6 words are cut
    long = torch.tensor([len(title.split()) > 6 for title in movies.fields["title"]])
    assert long.any()
    moved = (head - words).abs().amax(dim=1) > 1e-4
    assert not moved[~long].any()
    assert moved[long].any()
