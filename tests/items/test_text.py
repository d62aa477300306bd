import pytest

from hllm.config import TextConfig
from hllm.data.schema import Catalog
from hllm.errors import ConfigError
from hllm.items.text import item_texts

PROMPT = "Compress the following sentence into embedding: "


def texts(template: str, prompt: str = PROMPT, **fields: str) -> list[str]:
    return item_texts(Catalog(["1"], {name: [value] for name, value in fields.items()}), TextConfig(prompt, template))


def test_text_has_the_official_form() -> None:
    assert texts("title: {title}genres: {genres}", title="Toy Story (1995)", genres="Animation|Comedy") == [
        "Compress the following sentence into embedding: title: Toy Story (1995)genres: Animation|Comedy"
    ]


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
def test_only_empty_fields_are_missing(title: str, genres: str, expected: str) -> None:
    assert texts("title: {title}genres: {genres}.", "", title=title, genres=genres) == [expected]


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
