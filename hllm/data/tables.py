"""Raw files -> columns, with every refusal naming file and row.

Columns are found by name. A row is a line of the file, counted from 1 with the header.
"""

import codecs
import contextlib
import gzip
import io
import json
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from hllm.data.schema import Catalog
from hllm.data.values import MEND, to_ids, to_whole
from hllm.errors import DataError

log = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 26
"Of a delimited file, parsed at a time."


def read_parquet(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """Named columns of a Parquet file.

    Raises:
        DataError: the file is torn, empty, not Parquet, not UTF-8, or lacks a column.
    """
    with _reading_parquet(path):
        table = pl.read_parquet(path, glob=False)  # else brackets in a name would be a pattern
    check_header(path, columns, table.columns)
    return table.select(columns)


def read_parquet_header(path: Path) -> list[str]:
    """Names of a Parquet file's columns; raises DataError as ``read_parquet``."""
    with _reading_parquet(path), path.open("rb") as file:
        return list(pl.read_parquet_schema(file))


def read_parquet_chunks(path: Path, columns: Mapping[str, str], rows: int = 1 << 22) -> Iterator[pl.DataFrame]:
    """Columns of a Parquet file of any size, chunk by chunk, in file order and of the types that the file has.

    Args:
        columns: name in the result -> name in the file.
        rows: at a time, about.

    Raises:
        DataError: as ``read_parquet``.
    """
    check_header(path, list(columns.values()), read_parquet_header(path))
    wanted = [pl.col(name).alias(key) for key, name in columns.items()]
    with _reading_parquet(path):
        chunks = pl.scan_parquet(path, glob=False).select(wanted).collect_batches(chunk_size=rows, maintain_order=True)
    while True:
        with _reading_parquet(path):
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk


@contextlib.contextmanager
def _reading_parquet(path: Path) -> Iterator[None]:
    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); fetch the file again") from error


def check_header(path: Path, wanted: Sequence[str], found: Sequence[str]) -> None:
    """Raises DataError, with both headers, where a column is not there or is there twice."""
    for column in wanted:
        if column not in found:
            raise DataError(
                f"{path}: has no column {column!r}; expected {list(wanted)}, found {list(found)}. Is it the right "
                "file? Columns of your own are named by dataset=custom dataset.user_column= and the like"
            )
        if list(found).count(column) > 1:
            raise DataError(f"{path}: has two columns {column!r}; found {list(found)}. Rename one of them")


def find_pair(folder: Path, pairs: Sequence[tuple[str, str]], where: str = "") -> tuple[Path, Path]:
    """The first pair of interactions and items file that is whole in a folder; a name ending in .gz also without it.

    Args:
        where: from where to fetch them, for the message.

    Raises:
        DataError: no pair is whole; says what is there.
    """
    for names in pairs:
        found = [_find(folder, name) for name in names]
        if found[0] and found[1]:
            return found[0], found[1]
    wanted = " or ".join(f"{first} and {second}" for first, second in pairs)
    there = sorted({name for names in pairs for name in names if _find(folder, name)})
    only = f"; of these there is only {', '.join(there)}" if there else ""
    raise DataError(f"dataset.root={folder}: needs {wanted}{only}. {where}".rstrip())


def _find(folder: Path, name: str) -> Path | None:
    paths = (folder / name, folder / name.removesuffix(".gz"))
    return next((path for path in paths if path.is_file()), None)


def open_text(path: Path) -> io.BufferedIOBase:
    """A file, or what a gzip file holds, as bytes; raises DataError where it cannot be opened.

    Compression is known by the file's first bytes, not by its name: browsers unpack files and keep the name.
    """
    with reading(path):
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        return gzip.open(path) if packed else path.open("rb")


def line_blocks(path: Path, size: int | None = None) -> Iterator[bytes]:
    """Whole lines, about ``size`` bytes at a time, else ``BLOCK_BYTES``.

    Raises:
        DataError: the file cannot be read, or its compression is cut short or broken.
    """
    with open_text(path) as file:
        while True:
            with reading(path):
                block = file.read(size or BLOCK_BYTES)
                block += file.readline()
            if not block:
                return
            yield block


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the compressed file is cut short or broken; fetch it again") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; give a file that can be read") from error


def bad_row(path: Path, row: int, what: str) -> DataError:
    return DataError(f"{path}: row {row} {what}; {MEND}")


def empty_row(path: Path, row: int) -> DataError:
    return bad_row(path, row, "is empty, which only lines at the end of the file may be")


def decode(data: bytes, encoding: str, path: Path, row: int) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        row += data[: error.start].count(b"\n")
        raise DataError(
            f"{path}: row {row} is not {encoding.upper()} text; save the file as UTF-8, or name its encoding "
            "(dataset.encoding= of dataset=custom)"
        ) from error


def read_json_lines(path: Path) -> pl.DataFrame:
    """One JSON object a line as a table of text, missing values ""; columns by first appearance.

    Numbers keep the digits that the file has, lists are joined by ", " and objects as "key: value".

    Raises:
        DataError: names file and row of what is no JSON object.
    """
    columns: dict[str, list[str]] = {}
    row = 0
    blank = 0
    for block in line_blocks(path):
        block = block if row else block.removeprefix(codecs.BOM_UTF8)
        for line in decode(block, "utf-8", path, row + 1).removesuffix("\n").split("\n"):
            row += 1
            if not line.strip():
                blank = blank or row
                continue
            if blank:
                raise empty_row(path, blank)
            try:
                record = json.loads(line, parse_int=str, parse_float=str)
            except ValueError as error:
                raise bad_row(path, row, f"is not JSON ({error}): {line[:80]!r}") from error
            if not isinstance(record, dict):
                raise bad_row(path, row, f"is not a JSON object, of which each line must hold one: {line[:80]!r}")
            for name in record:
                columns.setdefault(name, [""] * (row - 1))
            for name, values in columns.items():
                values.append(plain_text(record.get(name)))
    if not columns:
        raise DataError(f"{path}: is empty; fetch the file again")
    return pl.DataFrame([pl.Series(name, values, dtype=pl.String) for name, values in columns.items()])


def plain_text(value: Any) -> str:
    """A value of JSON or of a nested Parquet column, for reading.

    >>> plain_text({"brand": "Acme", "categories": [["Hair", "Care"], None], "year": 1987.0, "new": True})
    'brand: Acme, categories: Hair, Care, year: 1987, new: true'
    """
    if value is None or value != value:  # not a number
        return ""
    if isinstance(value, dict):
        value = [f"{name}: {text}" for name, item in value.items() if (text := plain_text(item))]
    if isinstance(value, list):
        return ", ".join(text for item in value if (text := plain_text(item)))
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def to_text(table: pl.DataFrame, column: str, path: Path) -> list[str]:
    """A column as text, missing values as empty strings; raises DataError at bytes that are not UTF-8."""
    values = table[column]
    if values.dtype != pl.Binary:
        return values.cast(pl.String).fill_null("").to_list()
    decoded = []
    for row, value in enumerate(values):
        try:
            decoded.append((value or b"").decode())
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: row {row + 1} has a {column} that is not UTF-8 text") from error
    return decoded


def to_catalog(
    table: pl.DataFrame,
    column: str,
    path: Path,
    first_row: int,
    rows: Sequence[int] = (),
    last_counts: bool = False,
) -> Catalog:
    """A table of items as a Catalog: ids without white space around them, all other columns as text fields.

    Ids follow the rule of ``values.to_ids``, so that they are those of the interactions. A column of floats that are
    all whole numbers loses its ".0".

    Args:
        table: text, numbers or dates; missing values become "".
        column: of the original ids.
        first_row: line of the first record, for messages.
        rows: line of each record, where records are not a line each.
        last_counts: of several rows of an item the last is taken, with a warning, as S3-Rec and ByteDance do.

    Raises:
        DataError: no row, no such column, a column that is not text, or an id that is missing or occurs twice.
    """
    check_header(path, [column], table.columns)
    ids = to_ids(table[column])
    if not len(ids):
        raise DataError(f"{path}: has no item, only a header; fetch the file again")
    repeats = ~ids.is_first_distinct()
    for wrong, values, what in (
        (ids.is_null() | (ids == ""), table[column], "has no {} (found {!r})"),
        (repeats if not last_counts else repeats & False, ids, "repeats {} {!r}; ids must be unique"),
    ):
        if wrong.any():
            place = int(wrong.arg_true()[0])
            row = rows[place] if rows else first_row + place
            raise bad_row(path, row, what.format(column, values[place]))
    if repeats.any():
        message = "%s: %d rows repeat an item, %r for one; the last counts"
        log.warning(message, path, repeats.sum(), ids.filter(repeats)[0])
        last = ids.is_last_distinct()
        ids, table = ids.filter(last), table.filter(last)
    return Catalog(ids, {name: _field(table[name], path) for name in table.columns if name != column})


def _field(values: pl.Series, path: Path) -> pl.Series:
    if values.dtype.is_nested() or values.dtype in (pl.Binary, pl.Object):
        raise DataError(
            f"{path}: column {values.name!r} holds {values.dtype}, not text; leave it out (dataset.text_fields= of "
            "dataset=custom), or store it as text"
        )
    if values.dtype.is_float():
        values = values.fill_nan(None)
        whole = to_whole(values)
        values = whole if whole.null_count() == values.null_count() else values
    return values.cast(pl.String).fill_null("")
