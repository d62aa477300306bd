"""Catalogue row -> the text that the Item LLM reads.

The form is the official code's: a prompt, then ``key: value`` for each field, with no separator between them.
"""

import logging
import string

from hllm.config import TextConfig
from hllm.data.schema import Catalog
from hllm.errors import ConfigError

log = logging.getLogger(__name__)

Segment = tuple[str, str]
"Literal text and the field that follows it; the field of a closing literal is empty."


def item_texts(catalog: Catalog, text: TextConfig) -> list[str]:
    """One text an item, in the catalogue's order.

    A field that is empty or only white space is missing: it is skipped together with the literal before it. An item
    with no field at all gets "", without the prompt; such items are counted in the log.

    Raises:
        ConfigError: the template is malformed or names a field that the catalogue does not have.
    """
    segments = parse_template(text.template, list(catalog.fields))
    columns = [catalog.fields.get(name, [""] * len(catalog)) for _, name in segments]
    texts = [_text(text.prompt, segments, [column[row] for column in columns]) for row in range(len(catalog))]
    if empty := texts.count(""):
        log.warning("%d of %d items have no text: every field of the template is empty for them", empty, len(texts))
    return texts


def _text(prompt: str, segments: list[Segment], values: list[str]) -> str:
    present = [bool(value.strip()) for value in values]
    if not any(present):
        return ""
    parts = [
        literal + value
        for (literal, name), value, there in zip(segments, values, present, strict=True)
        if there or not name
    ]
    return prompt + "".join(parts)


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
