"""Raw field values -> plain text: what web shops and forums leave in titles and descriptions, taken out.

Only values that hold something to clean take the slow path, so 400,000 clean titles cost one pass of polars.
"""

import html
import re
from html.entities import html5

import polars as pl

MAX_PASSES = 10
"Entities may be encoded many times over; nothing that a person wrote needs more."
ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
"With its semicolon: 'AT&T', 'R&B' and 'a=1&copy=2' are no entities."
TAG = re.compile(r"<(/?[A-Za-z][A-Za-z0-9]*)[^<>]*>")
INLINE = frozenset(
    ["a", "abbr", "b", "big", "em", "font", "i", "mark", "s", "small", "span", "strike", "strong", "sub", "sup", "u"]
)
"Tags that stand inside words: taken out without a trace. All others part what stands beside them."
INVISIBLE = re.compile("[\u00ad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]")
JOINER = re.compile(r"(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])")
"Zero-width (non-)joiners, but for those between two characters beyond ASCII: emoji and Persian are spelled with them."
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
DIRTY = r"[&<\p{Cc}\p{Cf}]|\s\s|^\s|\s$|[^\S ]"
"Polars' pattern of the values that ``clean`` may change; it may match more, never less."


def clean(value: str) -> str:
    """One value, cleaned. In this order, until nothing changes:

    1. HTML entities become the characters they name, also when encoded more than once (``&amp;amp;`` is ``&``);
       unknown ones, and those without their semicolon, stay.
    2. HTML tags go: ``<`` directly followed by a letter or by ``/`` and a letter, up to the next ``>``. Inline ones
       (``<b>``) leave nothing, others (``<br>``) a space. ``I <3 U`` and ``a < b`` stay.
    3. Byte order marks, zero-width and direction marks and soft hyphens go; control characters become spaces.
    4. Runs of white space become one space; ends are stripped.

    What is left is never judged: ``NA``, ``None``, ``NULL``, ``nan``, ``0`` and ``1987`` are values. Only the empty
    string is missing.
    """
    for _ in range(MAX_PASSES):
        before = value
        value = ENTITY.sub(_character, value)
        value = TAG.sub(_gap, value)
        value = JOINER.sub("", INVISIBLE.sub("", value))
        value = " ".join(CONTROL.sub(" ", value).split())
        if value == before:
            break
    return value


def clean_column(values: pl.Series) -> list[str]:
    """``clean`` of each of (I,) strings."""
    cleaned: list[str] = values.to_list()
    for row in values.str.contains(DIRTY).arg_true().to_list():
        cleaned[row] = clean(cleaned[row])
    return cleaned


def _character(entity: re.Match[str]) -> str:
    # not html.unescape on names: it reads the beginning of an unknown one, and makes "¬it;" of "&notit;"
    name = entity[0][1:]
    return html.unescape(entity[0]) if name.startswith("#") else html5.get(name, entity[0])


def _gap(tag: re.Match[str]) -> str:
    return "" if tag[1].removeprefix("/").lower() in INLINE else " "
