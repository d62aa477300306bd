"""python -m hllm.embed show: how long the item texts are, or what the Item LLM reads of one item.

Only the tokenizer is loaded, never the model's weights. No run folder is made.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hllm.build import build_datamodule, cache_dir
from hllm.cli import report_errors, split_own
from hllm.config import Config, Fusion, Selection, compose
from hllm.data.lookup import find_row
from hllm.data.schema import Catalog
from hllm.errors import ConfigError
from hllm.items.backbone import load_tokenizer
from hllm.items.encoder import token_ids, token_lengths
from hllm.items.files import locate
from hllm.items.fusion import field_weights
from hllm.items.selection import select_texts
from hllm.items.text import TextParts, text_parts

USAGE = """usage: python -m hllm.embed show [item=ID_OR_TITLE] [plot=FILE.png] [flags as of hllm.train]

Shows what the Item LLM reads, by its tokenizer alone: the model's weights are not loaded.
  (no item)  how many tokens the items' texts have, before any is cut
  item       one item: its fields, its exact text, its tokens, and where llm.max_tokens cuts it
  plot       write the lengths as a picture too; needs the extra "plots" (matplotlib)

  python -m hllm.embed show item="Toy Story (1995)"
  python -m hllm.embed show llm=minilm llm.max_tokens=64 dataset.text.selection=bm25_sentences item=1"""

NUM_BARS = 16
BAR = 40
FEW_TOKENS = 64
"A longer list of tokens is not read by anybody."
NICE = (1, 2, 4, 5, 8, 10)
"Bars are one of these times a power of ten tokens wide."


@report_errors
def show(arguments: Sequence[str]) -> None:
    """Print what ``USAGE`` says; errors a person can mend become one line and exit status 1."""
    if any(argument in ("-h", "--help") for argument in arguments):
        print(USAGE)
        return
    own, overrides = split_own(arguments, ("item", "plot"))
    if own["plot"]:
        if own["item"]:
            raise ConfigError(f"plot={own['plot']}: shows the lengths of all items; leave out item=")
        _matplotlib()  # before the texts are counted
    config = compose(overrides)
    catalog = build_datamodule(config).catalog
    parts = text_parts(catalog, config.dataset.text)
    field_weights(parts.names, config.dataset.text)
    if own["item"]:
        print(item_report(config, catalog, parts, find_row(catalog, own["item"], "item")))
        return
    texts = _read_apart(config, parts)
    lengths = {name: Lengths.of(_tokenizer(config), part, config.llm.max_tokens) for name, part in texts.items()}
    for name, counted in lengths.items():
        print(f"{config.dataset.name}, {config.llm.name}, {name}\n{counted.report()}\n")
    if own["plot"]:
        plot(lengths, Path(own["plot"]))


def _tokenizer(config: Config) -> Any:
    return load_tokenizer(locate(config.llm, cache_dir(config), weights=False))


def _read_apart(config: Config, parts: TextParts) -> dict[str, TextParts]:
    """What is embedded for an item, by what to call it: its text, or under fusion a text a field."""
    if config.dataset.text.fusion is Fusion.none:
        return {"text": parts}
    return {f"field {name}": part for name, part in zip(parts.names, parts.apart(), strict=True)}


@dataclass(frozen=True)
class Lengths:
    """Token counts of the texts of a catalogue.

    Args:
        tokens: (I,) int64, special tokens included, before any text is cut; items without text are left out.
        num_empty: items without text.
    """

    tokens: npt.NDArray[np.int64]
    num_empty: int
    max_tokens: int

    @classmethod
    def of(cls, tokenizer: Any, parts: TextParts, max_tokens: int) -> "Lengths":
        texts = [text for text in parts.texts() if text]
        return cls(np.array(token_lengths(tokenizer, texts), dtype=np.int64), len(parts) - len(texts), max_tokens)

    def report(self) -> str:
        """Bars and numbers, for a terminal."""
        if not len(self.tokens):
            return f"no item has text ({self.num_empty} items)"
        edges, counts = self.histogram()
        width = len(str(edges[-1]))
        lines = []
        for start, end, count in zip(edges, edges[1:], counts, strict=False):
            span = f"{start:>{width}}" + (f"-{end - 1}" if end > start + 1 else "")
            here = f"  < llm.max_tokens={self.max_tokens}" if start <= self.max_tokens < end else ""
            bar = "█" * math.ceil(BAR * count / max(counts))
            lines.append(f"  {span:<{2 * width + 1}} {count:>7} {bar}{here}".rstrip())
        return "\n".join(["  tokens    items", *lines, *(f"  {line}" for line in self.summary())])

    def histogram(self) -> tuple[list[int], list[int]]:
        """Edges, one more than counts, of bars that are equally wide and begin at a round number."""
        low, high = int(self.tokens.min()), int(self.tokens.max())
        wide = (high - low + 1) / NUM_BARS
        step = next(nice * 10**power for power in range(12) for nice in NICE if nice * 10**power >= wide)
        edges = list(range(low // step * step, high + step + 1, step))
        edges = edges[: next(number for number, edge in enumerate(edges) if edge > high) + 1]
        return edges, np.histogram(self.tokens, bins=edges)[0].tolist()

    def summary(self) -> list[str]:
        long = int((self.tokens > self.max_tokens).sum())
        return [
            f"mean {self.tokens.mean():.1f}, median {np.median(self.tokens):.0f}, "
            f"95 % {np.percentile(self.tokens, 95):.0f}, max {self.tokens.max()} tokens",
            f"{long} of {len(self.tokens)} texts ({long / len(self.tokens):.1%}) are longer than "
            f"llm.max_tokens={self.max_tokens}",
            f"{self.num_empty} items have no text",
        ]


def item_report(config: Config, catalog: Catalog, parts: TextParts, row: int) -> str:
    """One item: its fields as the catalogue has them and as they are read, and each text that is embedded of it."""
    lines = [f"item {catalog.ids[row]} of {config.dataset.name}: {catalog.titles[row]}", ""]
    for name, values in catalog.fields.items():
        cleaned = {name: value for _, name, value in parts.values(row)}.get(name, "")
        note = "" if name in parts.names else "  (not in the template)"
        note = f"  cleaned: {cleaned!r}" if not note and cleaned != values[row] else note
        lines.append(f"  {name}: {values[row]!r}{note}" if values[row] else f"  {name}: missing")
    tokenizer = _tokenizer(config)
    for name, part in _read_apart(config, parts).items():
        lines += ["", f"{name}, by the tokenizer of {config.llm.name}:", *_text_report(config, tokenizer, part, row)]
    return "\n".join(lines)


def _text_report(config: Config, tokenizer: Any, parts: TextParts, row: int) -> list[str]:
    """The exact text between >>> and <<<, what is read of it, and the tokens where they are few."""
    limit, selection = config.llm.max_tokens, config.dataset.text.selection
    text = parts.text(row)
    if not text:
        return ["  no text: every field of it is empty; read as the tokenizer's special tokens alone"]
    length = token_lengths(tokenizer, [text])[0]
    lines = [f"  >>>{text}<<<", f"  {length} tokens, llm.max_tokens={limit}"]
    if length <= limit:
        lines.append("  read whole")
    else:
        if selection is not Selection.head:
            # the whole catalogue counts in the weights; only this item's text is selected from
            whole, text = text, select_texts(parts, None, selection, tokenizer, limit, only=[row])[row]
            if text == whole:
                lines.append(f"  not one piece fits for {selection.name}: its beginning is read")
            else:
                length = token_lengths(tokenizer, [text])[0]
                lines += [f"  selected by {selection.name}, {length} tokens:", f"  >>>{text}<<<"]
        lines += _cut_report(tokenizer, text, limit)
    ids = token_ids(tokenizer, [text], truncation=True, max_length=limit)["input_ids"][0]
    if len(ids) <= FEW_TOKENS:
        lines.append(f"  tokens: {' '.join(tokenizer.convert_ids_to_tokens(ids))}")
    return lines


def _cut_report(tokenizer: Any, text: str, limit: int) -> list[str]:
    """Where a text is cut, if it is."""
    if not tokenizer.is_fast:
        return [f"  the first {limit} tokens are read"]
    spans = token_ids(tokenizer, [text], truncation=True, max_length=limit, return_offsets_mapping=True)
    end = max(end for _, end in spans["offset_mapping"][0])
    return [f"  cut after character {end}: ...{text[:end][-40:]!r} | {text[end:][:40]!r}..."] if end < len(text) else []


def plot(lengths: dict[str, Lengths], path: Path) -> None:
    """The histograms as a picture, one below the other.

    Raises:
        ConfigError: matplotlib is not there, or the file cannot be written.
    """
    figure = _matplotlib().Figure(figsize=(8, 3 * len(lengths)), layout="constrained")
    for axes, (name, counted) in zip(figure.subplots(len(lengths), squeeze=False)[:, 0], lengths.items(), strict=True):
        if len(counted.tokens):
            edges, counts = counted.histogram()
            axes.stairs(counts, edges, fill=True)
        axes.axvline(counted.max_tokens, color="black", linestyle="--", label=f"llm.max_tokens={counted.max_tokens}")
        axes.set(title=name, xlabel="tokens", ylabel="items")
        axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"plot={path}: cannot be written ({error})") from error


def _matplotlib() -> Any:
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ConfigError('plot: needs matplotlib; install it by: pip install "hllm[plots]"') from error
    return matplotlib.figure
