"""What the Item LLM reads, shown without it."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import transformers
from conftest import WORDS

from hllm import embed
from hllm.show import Lengths, show

Show = Callable[..., str]
# "Compress the following: title: wordN wordM (19NN)genres: A|B": the tiny tokenizer's words
TEXT = f"title: {WORDS[3]} {WORDS[-3]} (1963)genres: "


@pytest.fixture
def shown(
    movielens_folder: Path,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Show:
    """What ``hllm.embed show`` prints on the tiny MovieLens; the model cannot be loaded."""

    def load(*args: object, **options: object) -> None:
        pytest.fail("the model's weights were loaded")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", load)
    flags = [
        f"dataset.root={movielens_folder}",
        "dataset.check_counts=false",
        f"llm.model={tiny_llama}",
        "llm.wheel=null",
        "llm.gguf_file=null",
        "llm.name=tiny",
        f"cache_dir={tmp_path}",
    ]

    def output(*arguments: str) -> str:
        show([*flags, *arguments])
        return capsys.readouterr().out

    return output


def refused(shown: Show, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        shown(*arguments)
    assert exit_.value.code == 1
    return capsys.readouterr().err


def test_lengths_of_the_catalogue_are_counted(shown: Show) -> None:
    lines = shown("llm.max_tokens=20").splitlines()
    bars = [line.split() for line in lines[2:] if "█" in line]
    assert lines[0] == "movielens_100k, tiny, text"
    assert sum(int(bar[1]) for bar in bars) == 30
    assert "0 items have no text" in lines[-2]
    assert any("longer than llm.max_tokens=20" in line for line in lines)


def test_an_item_is_shown_as_it_is_read(shown: Show) -> None:
    text = shown("item=3", "dataset.text.prompt='Compress: '")
    assert f">>>Compress: {TEXT}" in text
    assert f"title: '{WORDS[3]} {WORDS[-3]} (1963)'" in text
    assert "read whole" in text
    assert f"tokens: Compress : title : {WORDS[3]} {WORDS[-3]} <unk> <unk> <unk>" in text


def test_the_cut_is_shown(shown: Show) -> None:
    text = shown(f"item={WORDS[3]} {WORDS[-3]} (1963)", "dataset.text.prompt=", "llm.max_tokens=4")
    assert f"cut after character {len(f'title: {WORDS[3]} {WORDS[-3]}')}: " in text
    assert f"{WORDS[-3]}' | " in text


def test_the_selection_is_shown(shown: Show) -> None:
    template = "dataset.text.template='genres: {genres} title: {title}'"
    flags = ["item=3", "dataset.text.prompt=", "dataset.text.selection=bm25_words", template]
    # genres and both literals are 9 tokens, the title 5
    text = shown(*flags, "llm.max_tokens=11")
    assert "selected by bm25_words, 11 tokens:" in text
    assert f"title: {WORDS[3]} {WORDS[-3]}<<<" in text
    assert "not one piece fits for bm25_words" in shown(*flags, "llm.max_tokens=5")


def test_fused_fields_are_shown_apart(shown: Show) -> None:
    fused = "dataset.text.fusion=concat"
    assert all(f"movielens_100k, tiny, field {name}\n" in shown(fused) for name in ("title", "genres"))
    text = shown(fused, "item=3", "dataset.text.prompt=")
    assert f">>>title: {WORDS[3]} {WORDS[-3]} (1963)<<<" in text
    assert ">>>genres: " in text


def test_a_picture_is_written(shown: Show, tmp_path: Path) -> None:
    shown(f"plot={tmp_path / 'lengths.png'}")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"item={WORDS[3]} {WORDS[-3]} (1964)"], f"did you mean '{WORDS[3]} {WORDS[-3]} (1963)'"),
        (['dataset.text.template="{name}"'], "dataset.text.template='{name}'"),
        (["dataset.text.fusion=sum", "+dataset.text.weights.name=2"], "dataset.text.weights.name: not a field"),
        (["llm.max_token=3"], "max_token"),
        (["plot=/no/where/x.png"], "plot=/no/where/x.png: cannot be written"),
        (["plot=x.png", "item=3"], "plot=x.png: shows the lengths of all items"),
    ],
)
def test_wrong_arguments_are_refused(
    shown: Show, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refused(shown, capsys, *arguments)


def test_a_missing_matplotlib_names_the_extra(
    shown: Show, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'plot: needs matplotlib; install it by: pip install "hllm[plots]"' in refused(shown, capsys, "plot=x.png")


def test_show_is_a_word_of_embed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["embed", "show", "--help"])
    embed.main()
    assert capsys.readouterr().out.startswith("usage: python -m hllm.embed show")


@pytest.mark.parametrize("tokens", [[5], [1, 400], [256, 257], list(range(10, 5000, 7))])
def test_bars_hold_every_text(tokens: list[int]) -> None:
    lengths = Lengths(np.array(tokens), 2, 256)
    edges, counts = lengths.histogram()
    assert sum(counts) == len(tokens)
    assert len(set(np.diff(edges))) == 1
    assert len(counts) <= 18
    assert "2 items have no text" in lengths.report()


def test_numbers_below_the_bars() -> None:
    report = Lengths(np.array([10, 20, 30, 300]), 1, 256).report()
    assert "mean 90.0, median 25, 95 % 259, max 300 tokens" in report
    assert "1 of 4 texts (25.0%) are longer than llm.max_tokens=256" in report


def test_a_catalogue_without_text_says_so() -> None:
    assert Lengths(np.array([], dtype=np.int64), 3, 256).report() == "no item has text (3 items)"
