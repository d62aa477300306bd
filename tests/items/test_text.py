import hashlib
import json
from dataclasses import replace

import pytest

from hllm.config import TextConfig
from hllm.data.schema import Catalog
from hllm.errors import ConfigError
from hllm.items.store import texts_digest
from hllm.items.text import item_texts, text_parts

PROMPT = "Compress the following sentence into embedding: "


def texts(template: str, prompt: str = PROMPT, clean: bool = False, **fields: str) -> list[str]:
    catalog = Catalog(["1"], {name: [value] for name, value in fields.items()})
    return item_texts(catalog, TextConfig(prompt, template, clean))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("title: {title}genres: {genres}", "title: Toy Story (1995)genres: Animation|Comedy"),
        ("title: {title}description: {description}", "title: Toy Story (1995)description: A boy's toys live. "),
        (
            "title: {title}tag: {tag}description: {description}",
            "title: Toy Story (1995)tag: toysdescription: A boy's toys live. ",
        ),
        ("tag: {tag}title: {title}", "tag: toystitle: Toy Story (1995)"),
    ],
)
def test_text_has_the_official_form_in_the_templates_order(template: str, expected: str) -> None:
    fields = {"description": "A boy's toys live. ", "tag": "toys", "genres": "Animation|Comedy"}
    assert texts(template, **fields, title="Toy Story (1995)") == [PROMPT + expected]


def test_prompt_may_be_any_or_none() -> None:
    assert texts("{title}", "", title="Alien") + texts("{title}", "item:", title="Alien") == ["Alien", "item:Alien"]


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize(
    ("title", "genres", "expected"),
    [
        ("", "Comedy", "genres: Comedy."),
        ("Alien", " \t", "title: Alien."),
        ("None", "nan", "title: Nonegenres: nan."),
        ("NULL", "{genres}", "title: NULLgenres: {genres}."),
        ("Misérables, Les", "剧情", "title: Misérables, Lesgenres: 剧情."),
    ],
)
def test_only_empty_fields_are_missing(title: str, genres: str, expected: str, clean: bool) -> None:
    assert texts("title: {title}genres: {genres}.", "", clean, title=title, genres=genres) == [expected]


def test_values_are_cleaned_and_the_template_is_not() -> None:
    fields = {"title": " Tom &amp;amp; <b>Jerry</b>\n", "genres": "<br>&nbsp;"}
    assert texts("<b>&amp;  {title} g: {genres}", " p  ", True, **fields) == [" p  <b>&amp;  Tom & Jerry"]
    raw = f" p  <b>&amp;  {fields['title']} g: {fields['genres']}"
    assert texts("<b>&amp;  {title} g: {genres}", " p  ", False, **fields) == [raw]


def test_item_without_any_field_has_no_text_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    assert texts("title: {title}.", title=" ") == [""]
    assert "1 of 1 items have no text" in caplog.text


def test_long_title_is_kept_whole() -> None:
    assert len(texts("{title}", "", title="x" * 10_000)[0]) == 10_000


def test_doubled_braces_are_literal() -> None:
    assert texts("{{a}} {title}", "", title="Alien") == ["{a} Alien"]


@pytest.mark.parametrize(
    "template", ["{name}", "{title", "{}", "{0}", "{title.x}", "{title[0]}", "{title:>9}", "{title!r}", "no field", ""]
)
def test_bad_template_names_the_flag_and_the_fields(template: str) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.text\.template=.*\{title\} \{genres\}"):
        texts(template, title="Alien", genres="Horror")


def test_fields_apart_have_prompt_and_literal_each(movies: Catalog, text: TextConfig) -> None:
    parts = text_parts(movies, replace(text, template=text.template + "."))
    title, genres = parts.apart()
    assert title.text(1) == "Compress the following: title: " + movies.fields["title"][1]
    assert genres.text(1) == "Compress the following:  genres: " + movies.fields["genres"][1]
    assert title.text(7) == genres.text(7) == parts.text(7) == ""


def test_a_digest_needs_no_two_texts_at_once(movies: Catalog, text: TextConfig) -> None:
    parts = text_parts(movies, text)
    pairs = zip(movies.ids, parts.texts(), strict=True)
    expected = hashlib.sha256("".join(map(json.dumps, pairs)).encode()).hexdigest()
    assert texts_digest(movies.ids, parts.each()) == expected
    quotes = ['"', "\\ \n\x00é😀"]
    assert (
        texts_digest(quotes, quotes)
        == hashlib.sha256("".join(json.dumps([one, one]) for one in quotes).encode()).hexdigest()
    )
