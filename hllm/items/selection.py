"""What is read of a text that is longer than ``llm.max_tokens`` (``dataset.text.selection``): by BM25, what tells most.

A word weighs much in an item's text when it is frequent there and rare in the catalogue; a sentence weighs what its
words do, each once. Only long texts are touched. Costs: one BM25 index of the catalogue while the tables are filled,
none when they are read back.
"""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from hllm.config import Selection
from hllm.errors import ConfigError
from hllm.items.encoder import token_ids, token_lengths
from hllm.items.text import TextParts

VERSION = 1
"Of the rules in this file, part of the fingerprint: raise it with any change after which other pieces are kept."
CHUNK = 512
"Long texts worked on at a time: their tokens' positions are Python tuples, a hundred bytes each."
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
"Kana and Han, written without spaces: each character counts as a word."
TERM = rf"[{CJK}]|[^\W{CJK}]+"
WORD = re.compile(rf"[{CJK}]\W*|[^\s|/;{CJK}]+[|/;]*\s*|[\s|/;]+")
"Up to white space, or to what parts lists such as 'Drama|Sci-Fi'."
SENTENCE = re.compile(r".+?(?:[.!?…]+[\"')\]”’»]*(?=\s)|[。！？]+[”’」』]*|\n|\Z)\s*", re.DOTALL)  # noqa: RUF001
"Up to a full stop that white space follows, an East Asian one, or a line's end. It also parts 'Dr. Who'."
PIECES = {Selection.bm25_sentences: SENTENCE, Selection.bm25_words: WORD}


@dataclass(frozen=True)
class Piece:
    """A part of an item's text.

    Args:
        field: number of its segment; -1 for what is always kept: prompt, first field, closing literal.
        literal: stands before a field, and goes when nothing of the field is kept.
    """

    text: str
    field: int = -1
    literal: bool = False


def select_texts(
    parts: TextParts,
    corpus: TextParts | None,
    selection: Selection,
    tokenizer: Any,
    max_tokens: int,
    only: Sequence[int] | None = None,
) -> list[str]:
    """The texts of a catalogue, the longer ones with only their weightiest sentences or words.

    The prompt and the template's first field stay whole, as far as they fit. Of the other fields the pieces are taken
    by falling weight, and stand in their old order; a piece that does not fit is passed over for lighter ones, and the
    literal of a field of which nothing is left goes too. A template of one field, as each is under ``text.fusion``,
    is selected from itself. Where not one piece fits, the text keeps its beginning, as with ``head``.

    Args:
        parts: the texts to be read.
        corpus: further texts to weigh against. New items come with those of the data set's catalogue, so that one of
            them alone has weights like any other; its own text counts among them. None for the catalogue itself.
        tokenizer: measures; nothing of it is assumed but that it is a fast one.
        only: look at these rows and leave all other texts as they are; to show one item quickly.

    Raises:
        ConfigError: the tokenizer cannot say where its tokens stand in the text.
    """
    texts = parts.texts()
    if selection is Selection.head:
        return texts
    rows = list(range(len(parts)) if only is None else only)
    lengths = token_lengths(tokenizer, [texts[row] for row in rows])
    long = [row for row, length in zip(rows, lengths, strict=True) if length > max_tokens]
    if not long:
        return texts
    if not tokenizer.is_fast:
        raise ConfigError(
            f"dataset.text.selection={selection.name}: {type(tokenizer).__name__} does not say where its tokens stand; "
            "choose head, or a model with a tokenizer.json"
        )
    weights = TermWeights(_documents(parts) + ([] if corpus is None else _documents(corpus)), long)
    for start in range(0, len(long), CHUNK):
        chunk = long[start : start + CHUNK]
        chosen = _select(parts, chunk, weights, PIECES[selection], tokenizer, max_tokens)
        for row, text in zip(chunk, chosen, strict=True):
            texts[row] = text
    return texts


def selection_identity(parts: TextParts, corpus: TextParts | None, selection: Selection) -> dict[str, Any]:
    """What decides, beside the whole texts and the tokenizer, which of their pieces are kept; for the fingerprint.

    Two templates may give equal texts with other borders between the fields, of which other pieces are kept.
    """
    return {
        "name": selection.value,
        "rules": VERSION,
        "bm25s": importlib.metadata.version("bm25s"),
        "parts": _digest(parts),
        "corpus": None if corpus is None else _digest(corpus),
    }


def _digest(parts: TextParts) -> str:
    """Hex sha256 over prompt, template and values; each is quoted, so that no two run together."""
    digest = hashlib.sha256(json.dumps([parts.prompt, parts.segments]).encode())
    for values in zip(*parts.columns, strict=True):
        digest.update(json.dumps(values).encode())
    return digest.hexdigest()


def _documents(parts: TextParts) -> list[str]:
    """What BM25 counts of each item: its values, without prompt and literals, which all items share."""
    return ["\n".join(values) for values in zip(*parts.columns, strict=True)]


class TermWeights:
    """BM25 weights (Lucene's form, k1 = 1.5, b = 0.75) of each term in some of the documents.

    Args:
        documents: all that are counted.
        rows: those whose weights are asked for.
    """

    def __init__(self, documents: Sequence[str], rows: Sequence[int]) -> None:
        import bm25s

        self._find = re.compile(TERM).findall
        counted = bm25s.tokenize(documents, token_pattern=TERM, stopwords=[], show_progress=False)
        self.vocabulary: dict[str, int] = counted.vocab
        self.rows: dict[int, int] = {row: place for place, row in enumerate(rows)}
        self.terms_in = lru_cache(maxsize=200_000)(self._terms_in)  # of all words, a few make up most texts
        if not self.vocabulary:  # texts of punctuation only
            self.bounds = np.zeros(len(rows) + 1, dtype=np.int64)
            return
        index = bm25s.BM25(k1=1.5, b=0.75, method="lucene", csc_backend="numpy", auto_compile=False)
        index.index(counted, create_empty_token=False, show_progress=False)
        self._by_document(index.scores, rows, len(documents))

    def _by_document(self, scores: dict[str, npt.NDArray[Any]], rows: Sequence[int], num_documents: int) -> None:
        """The library keeps (term, documents) columns; turn those of the wanted rows into (document, terms)."""
        wanted = np.zeros(num_documents, dtype=bool)
        wanted[np.asarray(rows)] = True
        postings = np.flatnonzero(wanted[scores["indices"]])
        order = postings[np.argsort(scores["indices"][postings], kind="stable")]
        starts = np.searchsorted(scores["indices"][order], np.asarray(rows))
        self.bounds = np.append(starts, len(order))
        self.terms = np.searchsorted(scores["indptr"], order, side="right") - 1
        self.values = scores["data"][order]

    def _terms_in(self, text: str) -> tuple[int, ...]:
        """The terms of a text, each once, in ascending order."""
        return tuple(sorted({self.vocabulary[term] for term in self._find(text.lower()) if term in self.vocabulary}))

    def of(self, row: int) -> dict[int, float]:
        """Term -> weight in a document; ``rows`` must have named it."""
        place = self.rows[row]
        start, end = self.bounds[place], self.bounds[place + 1]
        if start == end:
            return {}
        return dict(zip(self.terms[start:end].tolist(), self.values[start:end].tolist(), strict=True))


def _select(
    parts: TextParts, rows: Sequence[int], weights: TermWeights, cut: re.Pattern[str], tokenizer: Any, max_tokens: int
) -> list[str]:
    """The selected text of each of some long rows."""
    pieces = [cut_text(parts, row, cut) for row in rows]
    costs = _costs(pieces, tokenizer)
    ranks = [_rank(row_pieces, weights, row) for row, row_pieces in zip(rows, pieces, strict=True)]
    budgets = dict.fromkeys(range(len(rows)), max_tokens)
    texts = [""] * len(rows)
    while budgets:
        for row, budget in budgets.items():
            kept = choose(pieces[row], costs[row], ranks[row], budget)
            texts[row] = join(pieces[row], kept) if kept else parts.text(rows[row])
            if not kept:
                budgets[row] = 0  # its beginning is read: nothing more to try
        # where pieces meet anew, tokens may differ from those of the whole text: such a text tries for fewer
        lengths = token_lengths(tokenizer, [texts[row] for row in budgets])
        over = {row: length - max_tokens for row, length in zip(budgets, lengths, strict=True)}
        budgets = {row: budget - over[row] for row, budget in budgets.items() if budget and over[row] > 0}
    return texts


def cut_text(parts: TextParts, row: int, cut: re.Pattern[str]) -> list[Piece]:
    """An item's text in pieces, in order; joined they are the text."""
    several = len(parts.names) > 1
    pieces = [Piece(parts.prompt)]
    for number, ((literal, name), column) in enumerate(zip(parts.segments, parts.columns, strict=True)):
        value = column[row]
        if not name:
            pieces.append(Piece(literal))
        elif value and number == 0 and several:
            pieces.append(Piece(literal + value))
        elif value:
            pieces.append(Piece(literal, number, literal=True))
            pieces += [Piece(piece, number) for piece in cut.findall(value)]
    return pieces


def choose(pieces: Sequence[Piece], costs: Sequence[int], ranking: Sequence[int], budget: int) -> set[int]:
    """Which pieces to take: by rank, each that fits with what is always kept; empty where none does.

    Args:
        costs: tokens of each piece; the first one's also counts the special tokens.
        ranking: the pieces that can be chosen, best first.
        budget: tokens of the whole text.
    """
    literals = {piece.field: cost for piece, cost in zip(pieces, costs, strict=True) if piece.literal}
    left = budget - sum(cost for piece, cost in zip(pieces, costs, strict=True) if piece.field < 0)
    chosen: set[int] = set()
    for number in ranking:
        field = pieces[number].field
        cost = costs[number] + literals.get(field, 0)
        if cost <= left:
            chosen.add(number)
            left -= cost
            literals.pop(field, None)  # paid for
    return chosen


def join(pieces: Sequence[Piece], chosen: set[int]) -> str:
    """The text of what is kept; between a field's last piece and the next literal there is nothing, as ever."""
    text = ""
    for field, numbers in groupby(range(len(pieces)), key=lambda number: pieces[number].field):
        group = list(numbers)
        if field < 0:
            text += "".join(pieces[number].text for number in group)
        elif taken := "".join(pieces[number].text for number in group if number in chosen):
            text += pieces[group[0]].text + taken.rstrip()
    return text


def _costs(texts: Sequence[Sequence[Piece]], tokenizer: Any) -> list[list[int]]:
    """Tokens of each piece in the whole text: a token belongs to the piece that its last character stands in."""
    whole = ["".join(piece.text for piece in pieces) for pieces in texts]
    offsets = token_ids(tokenizer, whole, return_offsets_mapping=True)["offset_mapping"]
    costs = []
    for pieces, spans in zip(texts, offsets, strict=True):
        ends = np.cumsum([len(piece.text) for piece in pieces])
        last = [end - 1 for start, end in spans if end > start]
        cost = np.bincount(np.searchsorted(ends, last, side="right"), minlength=len(pieces)).tolist()
        cost[0] += len(spans) - len(last)  # special tokens stand nowhere
        costs.append(cost)
    return costs


def _rank(pieces: Sequence[Piece], weights: TermWeights, row: int) -> list[int]:
    """Numbers of the pieces that can be chosen, weightiest first; of equal ones the earlier."""
    of_term = weights.of(row)
    heavy = {
        number: sum(of_term.get(term, 0.0) for term in weights.terms_in(piece.text))
        for number, piece in enumerate(pieces)
        if piece.field >= 0 and not piece.literal
    }
    return sorted(heavy, key=lambda number: (-heavy[number], number))
