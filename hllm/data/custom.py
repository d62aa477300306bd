"""A person's own files, by path alone: CSV, Parquet or JSON lines, columns by their usual names or by flags.

docs/your-own-data.md leads through it.
"""

import datetime
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from hllm.config import CustomConfig, TimestampUnit
from hllm.data.base import RawFiles, SequenceDataModule
from hllm.data.delimited import read_csv_catalog, read_csv_chunks, read_csv_header, read_records_header
from hllm.data.schema import Catalog
from hllm.data.tables import (
    plain_text,
    read_json_lines,
    read_parquet,
    read_parquet_chunks,
    read_parquet_header,
    to_catalog,
    to_text,
)
from hllm.data.values import LATEST, is_rounded
from hllm.errors import DataError

log = logging.getLogger(__name__)

USUAL_NAMES = {
    "user": ("user", "userid", "uid", "username", "reviewer", "reviewerid", "customer", "customerid", "visitor",
             "visitorid"),
    "item": ("item", "itemid", "iid", "movie", "movieid", "product", "productid", "asin", "parentasin", "isbn", "sku",
             "article", "articleid", "book", "bookid", "track", "trackid", "song", "songid", "artist", "artistid",
             "video", "videoid", "news", "newsid", "game", "gameid", "business", "businessid"),
    "timestamp": ("timestamp", "time", "ts", "date", "datetime", "unixtime", "unixtimestamp", "unixreviewtime",
                  "eventtime", "createdat"),
    "rating": ("rating", "score", "stars", "overall"),
}  # fmt: skip
"Column names, in small letters and digits alone: userId, user_id and USER ID are all userid."
DIVISORS = {TimestampUnit.s: 1, TimestampUnit.ms: 10**3, TimestampUnit.us: 10**6, TimestampUnit.ns: 10**9}
USUAL_TIME = (
    r"^[1-9][0-9]{3}-[0-9]{2}-[0-9]{2}"
    r"(?:[ T][0-9]{2}:[0-9]{2}:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])?)?$"
)
"Written times that Polars is trusted with: it would also take the second 60."
DELIMITED, PARQUET, JSON = (".csv", ".tsv", ".txt"), (".parquet", ".pq"), (".jsonl", ".json", ".ndjson")


class CustomData(SequenceDataModule):
    """Files of your own; what is read of them is said in the log."""

    config: CustomConfig
    unkeyed = frozenset({"interactions", "items"})

    def _rules(self) -> dict[str, Any]:
        """Of the paths only how the files are read: what they hold is known by their content."""
        paths = (self.config.interactions, self.config.items)
        return {**super()._rules(), "kinds": [_kind(Path(path)) for path in paths if path]}

    def folder(self) -> Path:
        """dataset.root, or the working directory: relative paths are taken from there."""
        return Path() if self.config.root is None else super().folder()

    def find(self, folder: Path) -> RawFiles:
        interactions = _file(folder, "interactions", self.config.interactions, (*DELIMITED, *PARQUET))
        items = self.config.items and _file(folder, "items", self.config.items, (*DELIMITED, *PARQUET, *JSON))
        return RawFiles(interactions, items or None, first_row=2 if _kind(interactions) in DELIMITED else 1)

    def read_events(self, files: RawFiles) -> Iterator[pl.DataFrame]:
        path, config = files.interactions, self.config
        columns = {
            "user": self._column(path, "user", config.user_column),
            "item": self._column(path, "item", config.item_column),
            "timestamp": self._column(path, "timestamp", config.timestamp_column),
        }
        if config.filter.min_rating is not None:
            columns["rating"] = self._column(path, "rating", config.rating_column)
        log.info("%s: %s", path, ", ".join(f"{key} is {name!r}" for key, name in columns.items()))
        row = files.first_row
        for chunk in self._chunks(path, columns):
            times = to_seconds(chunk["timestamp"], config.timestamp_unit, path, row)
            yield chunk.with_columns(times.alias("timestamp"))
            row += len(chunk)

    def read_items(self, files: RawFiles, wanted: pl.Series) -> Catalog:
        path, chosen = files.items, self.config.text_fields
        if path is None:
            return Catalog(wanted.unique(maintain_order=True), {})
        table = read_json_lines(path) if _kind(path) in JSON else None
        header = self._items_header(path) if table is None else table.columns
        key = self._items_key(path, header, self._column(files.interactions, "item", self.config.item_column))
        unknown = [name for name in chosen if name not in header or name == key]
        if unknown:
            raise DataError(f"dataset.text_fields: {path} has no text column {unknown[0]!r}; it has {header}")
        fields = chosen or [name for name in header if name and name != key]  # pandas leaves its index without a name
        log.info("%s: id is %r, text fields are %s", path, key, ", ".join(fields) or "none")
        if _kind(path) in DELIMITED:
            separator = self._separators[_kind(path)]
            return read_csv_catalog(path, [key, *fields], key, separator, self.config.encoding)
        table = read_parquet(path, [key, *fields]) if table is None else table.select([key, *fields])
        return to_catalog(table.with_columns(_flat(table, name, path) for name in fields), key, path, first_row=1)

    @property
    def _separators(self) -> dict[str, str]:
        chosen = self.config.separator
        usual = {".tsv": "\t", ".csv": ",", ".txt": ","}
        return usual if chosen is None else dict.fromkeys(usual, chosen.replace(r"\t", "\t"))

    def _header(self, path: Path) -> list[str]:
        if _kind(path) in PARQUET:
            return read_parquet_header(path)
        return read_csv_header(path, self._separators[_kind(path)], self.config.encoding)

    def _items_header(self, path: Path) -> list[str]:
        if _kind(path) in PARQUET:
            return read_parquet_header(path)
        return read_records_header(path, self._separators[_kind(path)], self.config.encoding)

    def _chunks(self, path: Path, columns: Mapping[str, str]) -> Iterator[pl.DataFrame]:
        if _kind(path) in PARQUET:
            return read_parquet_chunks(path, columns)
        return read_csv_chunks(path, columns, self._separators[_kind(path)], self.config.encoding)

    def _column(self, path: Path, role: str, configured: str | None) -> str:
        """The column of the interactions that holds users, items, times or ratings."""
        return find_column(path, self._header(path), role, f"dataset.{role}_column", configured)

    def _items_key(self, path: Path, header: Sequence[str], item_column: str) -> str:
        """The id column of the items file: as configured, as in the interactions, or by its usual name."""
        configured = self.config.items_id_column or self.config.item_column
        if configured is None and item_column in header:
            return item_column
        return find_column(path, header, "item", "dataset.items_id_column", configured, also=("id",))


def find_column(
    path: Path, header: Sequence[str], role: str, flag: str, configured: str | None, also: Sequence[str] = ()
) -> str:
    """A column's name in a header: the configured one, or the only one that bears a usual name.

    Args:
        role: a key of ``USUAL_NAMES``.
        flag: that configures it.
        also: further usual names.

    Raises:
        DataError: no such column, or more than one usual name; shows the header and names the flag.
    """
    if configured is not None:
        if configured not in header:
            raise DataError(f"{flag}={configured}: {path} has no such column; its header is {list(header)}")
        return configured
    usual = (*USUAL_NAMES[role], *also)
    found = [name for name in header if re.sub(r"[^a-z0-9]", "", name.lower()) in usual]
    if len(found) == 1:
        return found[0]
    what = (
        f"columns {', '.join(found)} could each be the {role}" if found else f"no column has a usual name of a {role}"
    )
    raise DataError(f"{path}: {what}; set {flag}= to one of its header, {list(header)}")


def to_seconds(values: pl.Series, unit: TimestampUnit, path: Path, first_row: int) -> pl.Series:
    """Times of any type as int64 whole seconds since 1970; fractions are cut off, so file order decides within one.

    Args:
        values: Parquet's dates and times, which know their unit; or numbers, also as text, or written dates.
        unit: of numbers; iso reads written dates, those without an offset as UTC.
        first_row: for messages.

    Raises:
        DataError: names file and row of the first value that is missing, is no time, is not of the unit, or is a float
            so large that it may have been rounded.
    """
    if isinstance(values.dtype, pl.Categorical | pl.Enum):
        values = values.cast(pl.String)
    if values.dtype == pl.Date or values.dtype == pl.Datetime:
        seconds = values.dt.epoch("s")
    elif values.dtype != pl.String and not values.dtype.is_numeric():
        raise DataError(f"{path}: timestamps are of type {values.dtype}; they must be numbers, texts, dates or times")
    elif unit is TimestampUnit.iso:
        seconds = iso_seconds(values.cast(pl.String))
    else:
        seconds = _number_seconds(values, DIVISORS[unit])
    rounded = is_rounded(values)
    wrong = (rounded | seconds.is_null() | ~seconds.is_between(0, LATEST)).arg_true()
    if len(wrong):
        row = int(wrong[0])
        what = f"{path}: row {first_row + row} has timestamp={values[row]!r}, which"
        if rounded[row]:
            raise DataError(f"{what} {values.dtype} cannot tell from its neighbours; store times as whole numbers")
        raise DataError(
            f"{what} is no time between the years 1970 and 9999 under dataset.timestamp_unit={unit.name}; choose of "
            "s, ms, us, ns (numbers) and iso (written dates)"
        )
    return seconds


def _number_seconds(values: pl.Series, divisor: int) -> pl.Series:
    """Numbers, or text that is one, as whole seconds; null where one is none."""
    if values.dtype == pl.String:
        # 1.46474E+09, as spreadsheets write, has lost the order of events; a point is cut off as text, as digits beyond
        # the 53 bits of a float would be lost too
        values = values.str.strip_chars().str.replace(r"^(\+?[0-9]+)\.[0-9]*$", "$1")
    if values.dtype.is_float():
        return (values.cast(pl.Float64) / divisor).floor().cast(pl.Int64, strict=False)
    return values.cast(pl.Int64, strict=False) // divisor


def iso_seconds(texts: pl.Series) -> pl.Series:
    """Written dates and times as int64 seconds, cut off; null where one is none.

    The usual forms are read column-wise, a million in half a second; what is left, distinct value by distinct value.
    """
    text = pl.col("text").str.strip_chars().str.strip_suffix(" UTC")
    offset = text.str.slice(19).str.extract(r"([+-].*)$")
    sign = pl.when(offset.str.starts_with("-")).then(-60).otherwise(60)
    minutes = offset.str.slice(1, 2).cast(pl.Int64) * 60 + offset.str.slice(4, 2).cast(pl.Int64)
    time = text.str.head(19).str.replace("T", " ", literal=True)
    long = time.str.len_bytes() == 19
    local = pl.coalesce(
        pl.when(long).then(time.str.to_datetime("%Y-%m-%d %H:%M:%S", strict=False, time_unit="ms")),
        pl.when(~long).then(time.str.to_date("%Y-%m-%d", strict=False)),
    )
    usual = pl.when(text.str.contains(USUAL_TIME)).then(local.dt.epoch("s") - (sign * minutes).fill_null(0))
    found = pl.DataFrame({"text": texts}).select("text", seconds=usual)
    left = found.filter(pl.col("seconds").is_null())["text"].drop_nulls().unique()
    if not len(left):
        return found["seconds"]
    others = pl.DataFrame([left, pl.Series("other", [_iso_seconds(value) for value in left], pl.Int64)])
    joined = found.join(others, on="text", how="left", maintain_order="left")
    return joined.select(pl.coalesce("seconds", "other")).to_series()


def _iso_seconds(value: str) -> int | None:
    try:
        time = datetime.datetime.fromisoformat(value.strip().removesuffix(" UTC"))
    except ValueError:
        return None
    return math.floor((time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).timestamp())


def _flat(table: pl.DataFrame, column: str, path: Path) -> pl.Series:
    """A column of a Parquet file without lists, which are joined by ", ", records ("key: value") and bytes."""
    values = table[column]
    if values.dtype.is_nested():
        return pl.Series(column, [plain_text(value) for value in values.to_list()], dtype=pl.String)
    return pl.Series(column, to_text(table, column, path)) if values.dtype == pl.Binary else values


def _file(folder: Path, flag: str, name: str, suffixes: Sequence[str]) -> Path:
    """A file of the person's; raises DataError where it is not there or its name does not say how to read it."""
    path = folder / Path(name).expanduser()
    if path.is_dir():
        raise DataError(f"dataset.{flag}={name}: is a folder; give one file")
    if not path.is_file():
        raise DataError(
            f"dataset.{flag}={name}: no such file; relative paths are taken from dataset.root where it is set, else "
            f"from the working directory, here {folder.resolve()}"
        )
    if _kind(path) not in suffixes:
        raise DataError(
            f"dataset.{flag}={name}: the end of the name says how a file is read; rename it to one of "
            f"{' '.join(suffixes)} (text files also with .gz)"
        )
    return path


def _kind(path: Path) -> str:
    """The suffix that says how a file is read; a Parquet file may bear its compression behind, as .parquet.gzip."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if ".parquet" in suffixes[-2:]:
        return ".parquet"
    return "".join(suffixes[-2:-1] if suffixes[-1:] == [".gz"] else suffixes[-1:])
