"""Amazon product reviews of 1996 to 2014 (McAuley et al. 2015, arXiv 1506.04757): 5-core categories, and all Books.

Item texts are published as one Python literal a line, which is not JSON. They are read by ``ast.literal_eval``, which
builds values and runs nothing; the lines of items that nobody reviewed are skipped unread.
"""

import ast
import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
from tqdm import tqdm

from hllm.config import AmazonConfig, CatalogItems, DatasetConfig, FilterConfig, UnknownItems
from hllm.data.base import Counts, RawFiles, SequenceDataModule
from hllm.data.delimited import read_csv_catalog, read_csv_chunks
from hllm.data.schema import Catalog
from hllm.data.tables import find_pair, line_blocks, to_catalog
from hllm.errors import DataError

COUNTS = {
    "Beauty": Counts(interactions=198_502, users=22_363, items=12_101),
    "Sports_and_Outdoors": Counts(interactions=296_337, users=35_598, items=18_357),
    "Toys_and_Games": Counts(interactions=167_597, users=19_412, items=11_924),
    "Video_Games": Counts(interactions=231_780, users=24_303, items=10_672),
}
"5-core categories whose size is published, e.g. in table 1 of S3-Rec (arXiv 2008.07873); others are not checked."

REVIEW = {"reviewerID": pl.String, "asin": pl.String, "unixReviewTime": pl.Int64, "overall": pl.Float64}
TEXTS = ("title", "brand", "categories", "description")
META_BYTES = 1 << 22
"Of an item file, parsed at a time: about 4,000 lines."
ASIN = re.compile(rb"""asin['"]\s*:\s*['"]([^'"\\]+)""")
RELATED = re.compile(r"'related': \{(?:'\w+': \[(?:'\w+'(?:, )?)*\](?:, )?)*\}(?:, )?")
"Lists of items also bought or viewed: not used, and two thirds of the time that a literal takes."


class AmazonReviews(SequenceDataModule):
    """The 5-core of one category: every user and item has at least 5 reviews.

    All reviews are interactions, whatever their rating. Reviews are dated by the day and lie in the file in order of
    time, so that the stable sort keeps the published order of ties.
    """

    config: AmazonConfig
    published_filter = FilterConfig(drop_duplicates=False, unknown_items=UnknownItems.keep)

    def __init__(self, config: AmazonConfig, cache_dir: Path) -> None:
        super().__init__(config, cache_dir)
        self.counts = COUNTS.get(config.category)

    def find(self, folder: Path) -> RawFiles:
        category = self.config.category
        pair = (f"reviews_{category}_5.json.gz", f"meta_{category}.json.gz")
        return RawFiles(*find_pair(folder, [pair], self.config.where))

    def read_events(self, files: RawFiles) -> Iterator[pl.DataFrame]:
        names = {"user": "reviewerID", "item": "asin", "timestamp": "unixReviewTime"}
        for number, reviews in enumerate(read_reviews(files.interactions)):
            if number == 0 and reviews["overall"][0] is not None:
                names["rating"] = "overall"
            yield reviews.select(**names)

    def read_items(self, files: RawFiles, wanted: pl.Series) -> Catalog:
        return read_meta(files, wanted, self.config)


class AmazonBooks(SequenceDataModule):
    """All Book ratings, cut as ByteDance's process_books.py does: the HLLM paper's Books.

    Two forms are read: the published ``ratings_Books.csv`` with ``meta_Books.json.gz``, and the pair of CSV files that
    process_books.py makes of them and ByteDance offers. The latter went through the filter already. Filtering again
    would take more out, as one pass leaves items with fewer than 5 events, so there it is not applied twice.
    """

    counts = Counts(interactions=10_053_086, users=694_898, items=686_624)
    published_filter = FilterConfig(
        drop_duplicates=False, unknown_items=UnknownItems.keep, min_user_events=5, min_item_events=5
    )

    def find(self, folder: Path) -> RawFiles:
        pairs = [
            ("ratings_Books.csv", "meta_Books.json.gz"),
            ("dataset/amazon_books.csv", "information/amazon_books.csv"),
            ("amazon_books.csv", "amazon_books_item.csv"),
        ]
        interactions, items = find_pair(folder, pairs, self.config.where)
        return RawFiles(interactions, items, first_row=1 if interactions.name == "ratings_Books.csv" else 2)

    def filter_of(self, files: RawFiles) -> FilterConfig:
        rules, published = self.config.filter, self.published_filter
        core = ("min_user_events", "min_item_events", "iterated")
        if _is_raw(files) or any(getattr(rules, name) != getattr(published, name) for name in core):
            return rules
        return replace(rules, min_user_events=0, min_item_events=0)

    def read_events(self, files: RawFiles) -> Iterator[pl.DataFrame]:
        if _is_raw(files):
            header = ("user", "item", "rating", "timestamp")
            return read_csv_chunks(files.interactions, {name: name for name in header}, header=header)
        return read_csv_chunks(files.interactions, {"user": "user_id", "item": "item_id", "timestamp": "timestamp"})

    def read_items(self, files: RawFiles, wanted: pl.Series) -> Catalog:
        if _is_raw(files):
            return read_meta(files, wanted, self.config)
        assert files.items is not None
        return read_csv_catalog(files.items, ("item_id", "title", "description"), "item_id", last_counts=True)


def _is_raw(files: RawFiles) -> bool:
    return files.interactions.name == "ratings_Books.csv"


def read_reviews(path: Path) -> Iterator[pl.DataFrame]:
    """A file of JSON lines, block by block: the columns of ``REVIEW``, null where a line lacks one.

    Raises:
        DataError: the file is torn, or a line is no JSON object or has a value of another type; names file and row.
    """
    row = 1
    for block in line_blocks(path):
        lines = block.rstrip()
        try:
            reviews = pl.read_ndjson(lines, schema=REVIEW)
            if len(reviews) != lines.count(b"\n") + 1:
                raise ValueError("empty lines")
        except (pl.exceptions.PolarsError, ValueError) as error:
            raise _bad_review(lines, path, row) from error
        row += len(reviews)
        yield reviews


def _bad_review(block: bytes, path: Path, row: int) -> DataError:
    """The first line that cannot be read by itself."""
    reason = "no line is wrong by itself"
    for number, line in enumerate(block.split(b"\n"), start=row):
        try:
            if len(pl.read_ndjson(line, schema=REVIEW)) != 1:
                return DataError(f"{path}: row {number} is empty; only the end of the file may be")
        except (pl.exceptions.PolarsError, ValueError) as error:
            row, reason, block = number, str(error).split("\n")[0], line
            break
    return DataError(
        f"{path}: row {row} is not a review as JSON ({reason}): {_beginning(block)}; mend it, or fetch the file again"
    )


def _beginning(line: bytes) -> str:
    return repr(line[:80].decode(errors="replace"))


def read_meta(files: RawFiles, wanted: pl.Series, config: DatasetConfig) -> Catalog:
    """Item texts: title, brand, categories and description, empty where missing.

    Args:
        wanted: ids of the items that have reviews; all rows are read under ``filter.catalog=all``.

    Raises:
        DataError: the file is torn, a line that is read is no record with an asin, or no wanted item is there.
    """
    path = files.items
    assert path is not None
    chosen = None if config.filter.catalog is CatalogItems.all else {item.encode() for item in wanted}
    parts, row = [], 1
    with (
        tqdm(desc=f"reading {path.name}", total=len(wanted), unit=" items", leave=False, disable=None) as bar,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", SyntaxWarning)  # of a backslash in a text that escapes nothing
        for block in line_blocks(path, META_BYTES):
            lines = block.split(b"\n")
            texts = [
                text
                for number, line in enumerate(lines, start=row)
                if (text := _item(line, chosen, path, number)) is not None
            ]
            parts.append(pl.DataFrame(texts, schema=dict.fromkeys(("asin", *TEXTS), pl.String), orient="row"))
            row += block.count(b"\n")
            bar.update(len(texts))
    if not any(map(len, parts)):
        raise DataError(
            f"{path}: has a row for none of the {len(wanted)} items of {files.interactions}; take both files of one "
            "category, whole"
        )
    return to_catalog(pl.concat(parts), "asin", path, first_row=1, last_counts=True)


def _item(line: bytes, wanted: Collection[bytes] | None, path: Path, row: int) -> tuple[str, ...] | None:
    """Asin and texts of a line; None where it is empty or of an item that is not wanted."""
    if not line.strip():
        return None
    if wanted is not None:
        # each place that looks like the key: a text may quote one, but then the true one is among them
        asins = ASIN.findall(line)
        if asins and not any(asin in wanted for asin in asins):
            return None
    record = _record(line, path, row)
    asin = record.get("asin")
    if not isinstance(asin, str) or not asin.strip():
        raise DataError(f"{path}: row {row} has no asin: {_beginning(line)}")
    if wanted is not None and asin.encode(errors="replace") not in wanted:
        return None
    paths = category_paths(record.get("categories"))
    return asin, *(paths if name == "categories" else to_line(record.get(name)) for name in TEXTS)


def _record(line: bytes, path: Path, row: int) -> Mapping[str, Any]:
    """A line as Python literal, or as JSON where its keys stand in double quotes."""
    try:
        text = line.decode().strip()
        record = json.loads(text) if text.startswith('{"') else ast.literal_eval(RELATED.sub("", text))
        if not isinstance(record, dict):
            raise TypeError("no dictionary")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise DataError(
            f"{path}: row {row} is neither a Python literal nor JSON ({reason}): {_beginning(line)}; "
            "mend it, or fetch the file again"
        ) from error
    return record


def to_line(value: object) -> str:
    """A value as text: parts of a list with spaces between them, nothing for None.

    >>> to_line(["A book.", None, "In two parts."])
    'A book. In two parts.'
    """
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return " ".join(part for part in map(to_line, value) if part)
    text = str(value)
    if not text.isascii():  # literals write an emoji as two halves, which UTF-8 has no form for
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def category_paths(value: object) -> str:
    """Category paths as text: levels joined by " > ", paths by "; "; a path that another one goes on from is left out.

    Category names have commas in them, so commas cannot part them.

    >>> category_paths([["Beauty", "Makeup"], ["Beauty", "Makeup", "Nails"], ["Clothing, Shoes & Jewelry"]])
    'Beauty > Makeup > Nails; Clothing, Shoes & Jewelry'
    """
    if not isinstance(value, list | tuple):
        return to_line(value)
    paths = dict.fromkeys(
        tuple(map(to_line, path)) if isinstance(path, list | tuple) else (to_line(path),) for path in value
    )
    leaves = [path for path in paths if not any(path == other[: len(path)] for other in paths if other != path)]
    return "; ".join(" > ".join(path) for path in leaves if any(path))
