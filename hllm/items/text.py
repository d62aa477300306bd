"""Catalogue row -> the text that the Item LLM reads.

The form is the official code's: a prompt, then ``key: value`` for each field, with no separator between them.
"""

import logging
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from hllm.config import TextConfig
from hllm.data.schema import Catalog
from hllm.errors import ConfigError
from hllm.items.clean import clean_column

log = logging.getLogger(__name__)

Segment = tuple[str, str]
"Literal text and the field that follows it; the field of a closing literal is empty."


@dataclass(frozen=True)
class TextParts:
    """What the texts of a catalogue are joined from.

    Args:
        prompt: stands before every text that is not empty.
        segments: the template, in order.
        columns: a segment's (I,) values each; "" where the item lacks the field, and for a closing literal.
    """

    prompt: str
    segments: Sequence[Segment]
    columns: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.columns[0])

    @property
    def names(self) -> list[str]:
        """The template's fields, in order."""
        return [name for _, name in self.segments if name]

    def values(self, row: int) -> list[tuple[str, str, str]]:
        """Literal, field and value of each segment that is in an item's text; none for an item without any field."""
        return self._present([column[row] for column in self.columns])

    def _present(self, values: Sequence[str]) -> list[tuple[str, str, str]]:
        if not any(values):
            return []
        segments = zip(self.segments, values, strict=True)
        return [(literal, name, value) for (literal, name), value in segments if value or not name]

    def text(self, row: int) -> str:
        return self._join([column[row] for column in self.columns])

    def _join(self, values: Sequence[str]) -> str:
        present = self._present(values)
        return self.prompt + "".join([literal + value for literal, _, value in present]) if present else ""

    def each(self) -> Iterator[str]:
        """The texts in order, made one by one: together they take as much memory as all the values."""
        return map(self._join, zip(*self.columns, strict=True))

    def texts(self) -> list[str]:
        return list(self.each())

    def apart(self) -> list[Self]:
        """Each field alone: its texts are the prompt, its literal and its value, and "" where the item lacks it."""
        fields = zip(self.segments, self.columns, strict=True)
        return [type(self)(self.prompt, [segment], [column]) for segment, column in fields if segment[1]]


def item_texts(catalog: Catalog, text: TextConfig) -> list[str]:
    """One text an item, in the catalogue's order.

    A field that is empty or only white space is missing: it is skipped together with the literal before it. An item
    with no field at all gets "", without the prompt; such items are counted in the log.

    Raises:
        ConfigError: the template is malformed or names a field that the catalogue does not have.
    """
    parts = text_parts(catalog, text)
    log_empty(parts)
    return parts.texts()


def text_parts(catalog: Catalog, text: TextConfig) -> TextParts:
    """Template and values, cleaned by ``hllm.items.clean`` unless ``text.clean`` is off; raises as ``item_texts``."""
    if not catalog.fields:
        raise ConfigError(
            "dataset.text: the items have no text for the Item LLM to read; give a file with some (dataset.items= of "
            "dataset=custom), or items=id, which needs none"
        )
    template = default_template(catalog) if text.template is None else text.template
    segments = parse_template(template, list(catalog.fields))
    columns = []
    for _, name in segments:
        if not name:
            columns.append([""] * len(catalog))
        elif text.clean:
            columns.append(clean_column(catalog.fields[name]))
        else:
            columns.append([value if value.strip() else "" for value in catalog.fields[name].to_list()])
    return TextParts(text.prompt, segments, columns)


def default_template(catalog: Catalog) -> str:
    """``name: {name}`` for every field, joined as the official code does."""
    return "".join(f"{name}: {{{name}}}" for name in catalog.fields)


def log_empty(parts: TextParts) -> None:
    """Say how many items have no text."""
    if empty := sum(not any(values) for values in zip(*parts.columns, strict=True)):
        log.warning("%d of %d items have no text: every field of the template is empty for them", empty, len(parts))


def parse_template(template: str, fields: list[str]) -> list[Segment]:
    """Cut a template such as ``"title: {title}genres: {genres}"`` into literals and fields.

    Raises:
        ConfigError: naming dataset.text.template, and the fields that exist.
    """
    segments: list[Segment] = []
    literal = ""
    try:
        for before, name, spec, conversion in string.Formatter().parse(template):
            literal += before
            if name is None:
                continue
            if spec or conversion:
                raise ValueError(f"{{{name}}} takes no format or conversion")
            if name not in fields:
                raise ValueError(f"{{{name}}} is not a field")
            segments.append((literal, name))
            literal = ""
    except ValueError as error:
        raise _template_error(template, str(error), fields) from error
    if not segments:
        raise _template_error(template, "it names no field", fields)
    return [*segments, (literal, "")] if literal else segments


def _template_error(template: str, reason: str, fields: list[str]) -> ConfigError:
    known = " ".join(f"{{{name}}}" for name in fields)
    return ConfigError(f"dataset.text.template={template!r}: {reason}; use literal text and plain fields of: {known}")
