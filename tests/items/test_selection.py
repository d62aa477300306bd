from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hllm.config import Selection, TextConfig
from hllm.data.schema import Catalog
from hllm.errors import ConfigError
from hllm.items.encoder import token_lengths
from hllm.items.selection import SENTENCE, WORD, Piece, choose, select_texts
from hllm.items.text import text_parts

TEMPLATE = "title: {title} genres: {genres}"
# word1 is in every description: it says nothing
COMMON = ["word1 word1 word1"] * 10


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_bert"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return AutoTokenizer.from_pretrained(request.getfixturevalue(request.param))


def select(
    tokenizer: Any,
    values: Sequence[str],
    max_tokens: int,
    selection: Selection = Selection.bm25_sentences,
    template: str = TEMPLATE,
    titles: Sequence[str] | None = None,
    corpus: Sequence[str] | None = None,
) -> list[str]:
    """Selected texts of items with these genres, without a prompt; special tokens come on top of max_tokens."""
    text = TextConfig(prompt="", template=template, selection=selection)
    of = [None if genres is None else text_parts(_catalog(genres, titles), text) for genres in (values, corpus)]
    return select_texts(*of, selection, tokenizer, max_tokens + tokenizer.num_special_tokens_to_add())


def _catalog(genres: Sequence[str], titles: Sequence[str] | None) -> Catalog:
    ids = [str(row) for row in range(len(genres))]
    return Catalog(ids, {"title": titles or ["word0"] * len(genres), "genres": genres})


def test_the_rarest_sentences_are_kept_in_their_order(tokenizer: Any) -> None:
    long = "word1 word1. word5 word6. word1 word2. word7 word8."
    common = [*COMMON, "word2"]
    # title: word0 genres: ... is 5 tokens, each sentence 3
    assert select(tokenizer, [long, *common], 12)[0] == "title: word0 genres: word5 word6. word7 word8."
    assert select(tokenizer, [long, *common], 15)[0] == "title: word0 genres: word5 word6. word1 word2. word7 word8."


def test_the_rarest_words_are_kept_in_their_order(tokenizer: Any) -> None:
    kept = select(tokenizer, ["word9 word1 word8 word1 word7", *COMMON], 8, Selection.bm25_words)[0]
    assert kept == "title: word0 genres: word9 word8 word7"


def test_texts_that_fit_are_untouched(tokenizer: Any) -> None:
    values = ["word3.  word4 .", "", "word1 word5. word6 word7. word8."]
    whole = select(tokenizer, values, 100)
    cut = select(tokenizer, values, 10)
    assert whole == [f"title: word0 genres: {' '.join(value.split())}".removesuffix(" genres: ") for value in values]
    assert cut[:2] == whole[:2]
    assert cut[2] != whole[2]


def test_a_sentence_too_long_is_passed_over_for_a_lighter_one(tokenizer: Any) -> None:
    long = "word5 word6 word7 word8 word9 word10. word1."
    assert select(tokenizer, [long, *COMMON], 9)[0] == "title: word0 genres: word1."


def test_the_first_field_is_kept_and_literals_go_with_their_fields(tokenizer: Any) -> None:
    text = TextConfig(prompt="", template="title: {title} following: {long} genres: {short} word39")
    fields = {"title": "word1 word1 word1", "long": "word5 word6 word7 word8 word9.", "short": "word1 word2. word1."}
    parts = text_parts(Catalog(["1", "2"], {name: [value, "word1"] for name, value in fields.items()}), text)
    limit = 12 + tokenizer.num_special_tokens_to_add()
    kept = select_texts(parts, None, Selection.bm25_sentences, tokenizer, limit)
    assert kept[0] == "title: word1 word1 word1 genres: word1 word2. word39"


def test_where_nothing_fits_the_beginning_is_read(tokenizer: Any) -> None:
    giant = " ".join(f"word{number}" for number in range(2, 30))
    assert select(tokenizer, [giant, *COMMON], 10)[0] == f"title: word0 genres: {giant}"


def test_a_template_of_one_field_is_selected_from_itself(tokenizer: Any) -> None:
    kept = select(tokenizer, ["word1 word1. word5 word6. word1.", *COMMON], 4, template="{genres}")[0]
    assert kept == "word5 word6."


def test_an_item_without_the_first_field_is_selected_from_the_others(tokenizer: Any) -> None:
    titles = [""] + ["word0"] * 10
    assert select(tokenizer, ["word1 word1. word5 word6. word1.", *COMMON], 5, titles=titles)[0] == (
        " genres: word5 word6."
    )


def test_new_items_are_weighed_against_the_catalogue(tokenizer: Any) -> None:
    new = ["word1 word2. word5 word6. word1 word2."]
    catalogue = ["word1 word2"] * 10
    assert select(tokenizer, new, 9, corpus=catalogue)[0] == "title: word0 genres: word5 word6."
    assert select(tokenizer, new, 9)[0] == "title: word0 genres: word1 word2."


def test_texts_of_punctuation_only_have_no_weights(tokenizer: Any) -> None:
    assert select(tokenizer, ["! ? ! ? ! ? !"] * 2, 4, Selection.bm25_words, "{genres}") == ["! ? ! ?"] * 2


words = st.lists(st.sampled_from(["word1", "word2", "word3.", "word4!", "剧情。", "-", "\n"]), min_size=1, max_size=30)


@pytest.mark.parametrize("selection", [Selection.bm25_sentences, Selection.bm25_words])
@given(st.lists(words.map(" ".join), min_size=1, max_size=5), st.integers(6, 20))
def test_no_selected_text_is_longer_than_the_model_reads(
    tokenizer: Any, selection: Selection, values: list[str], max_tokens: int
) -> None:
    whole = select(tokenizer, values, 1000, selection)
    kept = select(tokenizer, values, max_tokens, selection)
    assert kept == select(tokenizer, values, max_tokens, selection), "it is deterministic"
    limit = max_tokens + tokenizer.num_special_tokens_to_add()
    lengths = token_lengths(tokenizer, kept)
    # a text of which nothing fits keeps its beginning, for the encoder to cut
    assert all(length <= limit or text == old for length, text, old in zip(lengths, kept, whole, strict=True))


@pytest.mark.parametrize("cut", [SENTENCE, WORD])
@given(st.text(st.sampled_from("ab .!?|/\n\"'。剧ー\t"), max_size=40))
def test_pieces_are_the_text(cut: Any, text: str) -> None:
    assert "".join(cut.findall(text)) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('One 1.5 two. Three?! "Four." five', ["One 1.5 two. ", "Three?! ", '"Four." ', "five"]),
        ("好。不好。line\nnext", ["好。", "不好。", "line\n", "next"]),
    ],
)
def test_sentences_end_at_stops(text: str, expected: list[str]) -> None:
    assert SENTENCE.findall(text) == expected


def test_words_end_at_white_space_and_in_lists() -> None:
    assert WORD.findall("it's 1.5 Sci-Fi|War 好。人") == ["it's ", "1.5 ", "Sci-Fi|", "War ", "好。", "人"]


def test_a_literal_is_paid_for_once() -> None:
    pieces = [Piece("p"), Piece("d: ", 1, literal=True), Piece("a ", 1), Piece("b ", 1), Piece("c ", 1)]
    assert choose(pieces, [1, 2, 1, 1, 1], [4, 2, 3], 5) == {4, 2}
    assert choose(pieces, [1, 2, 1, 1, 1], [4, 2, 3], 3) == set()


def test_a_tokenizer_without_positions_is_refused(tiny_llama: Path) -> None:
    class Slow:
        is_fast = False

        def __call__(self, texts: list[str], **options: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [list(range(50)) for _ in texts]}

    with pytest.raises(ConfigError, match=r"dataset\.text\.selection=bm25_sentences: Slow does not say"):
        select_texts(
            text_parts(_catalog(["word1"], None), TextConfig(template=TEMPLATE)),
            None, Selection.bm25_sentences, Slow(), 5,
        )  # fmt: skip
