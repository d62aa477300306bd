import html

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hllm.items.clean import clean, clean_column

PIECES = [
    "&",
    "amp;",
    "lt;",
    "gt;",
    "#38;",
    "<",
    ">",
    "b",
    "/p",
    "br",
    " ",
    "\n",
    "\t",
    "\u200b",
    "\u200d",
    "\ufeff",
    "é",
    "x",
]
messy = st.one_of(st.text(max_size=20), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("Tom &amp;#38; Jerry", "Tom & Jerry"),
        ("&quot;Up&quot; &#39;n&#x27; &eacute;", "\"Up\" 'n' é"),
        ("AT&T, R&B, a=1&copy=2, &notit; &nothing;", "AT&T, R&B, a=1&copy=2, &notit; &nothing;"),
        ("<p>One<br/>two</p><P CLASS='x'>three", "One two three"),
        ("in<b>cred</b>ible <A HREF='/x'>link</A>", "incredible link"),
        ("&lt;p&gt;shop&lt;/p&gt;", "shop"),
        ("I <3 U, a < b, x<-y, 1<2>0", "I <3 U, a < b, x<-y, 1<2>0"),
        ("I &lt;3 U", "I <3 U"),
        ("a <b", "a <b"),
        ("one\x00two\x1fthree\x85four", "one two three four"),
        ("\ufeffwo\u200brd\u00ad s\u200dt", "word st"),
        ("👨\u200d👩\u200d👧 می\u200cخواهم", "👨\u200d👩\u200d👧 می\u200cخواهم"),  # noqa: RUF001
        (" \t one\r\n\ntwo\u00a0\u3000three  ", "one two three"),
        ("&nbsp;<br>\u200b", ""),
        ("", ""),
    ],
)
def test_what_is_no_text_is_taken_out(value: str, expected: str) -> None:
    assert clean(value) == expected


@pytest.mark.parametrize("value", ["NA", "None", "NULL", "nan", "null", "0", "1987", "False", "-", "剧情", "Amélie"])
def test_real_values_survive(value: str) -> None:
    assert clean_column(pl.Series([value])) == [value]


@given(st.lists(messy))
def test_a_column_is_cleaned_as_its_values_are(values: list[str]) -> None:
    assert clean_column(pl.Series(values, dtype=pl.String)) == [clean(value) for value in values]


@given(messy)
def test_clean_text_is_left_as_it_is(value: str) -> None:
    assert clean(clean(value)) == clean(value)


@given(st.text(st.characters(categories=["L", "N", "P"]), max_size=20))
def test_encoding_is_undone(value: str) -> None:
    assert clean(html.escape(html.escape(value))) == clean(value)
