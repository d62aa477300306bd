"""Delimited text -> columns, with every refusal naming file and row.

Columns are found by name. A row is a line of the file, counted from 1 with the header. Good files are parsed by Polars,
a block at a time; a block in which a line may be wrong, or may mean something else to Polars, is read line by line.
"""

import codecs
import csv
import io
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import polars as pl

from hllm.data.schema import Catalog
from hllm.data.tables import bad_row, check_header, decode, empty_row, line_blocks, open_text, reading, to_catalog
from hllm.errors import DataError

QUOTED_BYTES = 1 << 22
"Of a block with quotes, looked through at a time."
TABLE_ROWS = 1 << 16
"Records of an items file held as Python objects at a time."
csv.field_size_limit(1 << 24)  # some descriptions are longer than the 128 KiB that Python allows


def read_delimited(path: Path, separator: str, columns: Sequence[str], encoding: str = "utf-8") -> pl.DataFrame:
    """``read_delimited_chunks`` at once; for item files."""
    return pl.concat(read_delimited_chunks(path, separator, columns, encoding), rechunk=True)


def read_delimited_chunks(
    path: Path, separator: str, columns: Sequence[str], encoding: str = "utf-8", size: int = 1 << 22
) -> Iterator[pl.DataFrame]:
    """A text file without a header, chunk by chunk, every value a string.

    Args:
        separator: between values, of any length; quotes have no meaning.
        columns: names by position; each line must hold exactly as many values.
        size: bytes at a time; split into values they take some twenty times that.

    Raises:
        DataError: no line at all, a byte that is not of the encoding, or a line with too few or too many values.
    """
    first_row = 1
    for block in line_blocks(path, size):
        if first_row == 1 and not block.strip():
            break
        # not splitlines(): it would also cut at a title's form feed or U+0085
        text = decode(block, encoding, path, first_row).removeprefix("\ufeff")
        lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
        rows = pl.Series("line", lines, dtype=pl.String).str.split(separator)
        lengths = rows.list.len()
        wrong = (lengths != len(columns)).arg_true()
        if len(wrong):
            place = int(wrong[0])
            raise DataError(
                f"{path}: row {first_row + place} has {lengths[place]} values, expected {len(columns)} "
                f"({', '.join(columns[:4])}, ...) separated by {separator!r}: {lines[place][:80]!r}"
            )
        yield rows.list.to_struct(fields=list(columns)).struct.unnest()
        first_row += len(lines)
    if first_row == 1:
        raise DataError(f"{path}: is empty; fetch the file again")


def read_csv_chunks(
    path: Path,
    columns: Mapping[str, str],
    separator: str = ",",
    encoding: str = "utf-8",
    header: Sequence[str] | None = None,
) -> Iterator[pl.DataFrame]:
    """A delimited file of any size, chunk by chunk, every value a string.

    A record is one line, ended by LF or CRLF; values may stand in double quotes, with "" for a quote inside, and a
    quote in the middle of a value is a character like others. A byte order mark at the beginning and empty lines at
    the end are skipped. Every line must hold as many values as the header, and the wanted ones must not be empty.

    Args:
        path: gzip is decompressed on the way.
        columns: name in the result -> name in the header.
        header: of a file that has none: its columns by position.

    Raises:
        DataError: names file and row; a wrong header is shown beside the expected one.
    """
    check_form(separator, encoding)
    row = 1
    names = None if header is None else list(header)
    empty: int | None = None
    for block in line_blocks(path):
        if row == 1:
            block = block.removeprefix(codecs.BOM_UTF8)
        if codecs.lookup(encoding).name != "utf-8":
            block = decode(block, encoding, path, row).encode()
        if names is None:
            line, _, block = block.partition(b"\n")
            names = _header(line, path, list(columns.values()), separator)
            row = 2
        if block.endswith(b"\r"):  # the end of the file is in the middle of a CRLF
            block += b"\n"
        body = block.rstrip(b"\r\n")
        if b"\r" in block[len(body) :].replace(b"\r\n", b""):  # belongs to a line, which is refused for it
            body = block.rstrip(b"\n")
        if body:
            if empty is not None:
                raise empty_row(path, empty)
            body += b"\n"
            yield _parse(body, path, row, columns, names, separator)
        lines, used = block.count(b"\n") + (block[-1:] not in (b"\n", b"")), body.count(b"\n")
        if lines > used and empty is None:
            empty = row + used
        row += lines
    if names is None or row == 1:
        raise DataError(f"{path}: is empty; fetch the file again")


def check_form(separator: str, encoding: str) -> None:
    """Raises DataError where a file cannot be cut into lines and values in this way."""
    if len(separator) != 1 or not separator.isascii() or separator in '"\r\n\0':
        raise DataError(
            f"dataset.separator={separator!r}: must be one ASCII character, and neither a quote nor a line end"
        )
    try:
        if b"\n".decode(encoding) != "\n":
            raise UnicodeError
    except LookupError as error:
        raise DataError(f"dataset.encoding={encoding}: Python knows no such encoding") from error
    except UnicodeError as error:
        raise DataError(
            f"dataset.encoding={encoding}: has line ends of more than one byte; save the file as UTF-8"
        ) from error


def read_csv_header(path: Path, separator: str = ",", encoding: str = "utf-8") -> list[str]:
    """The names in the first line of a delimited file; raises DataError as ``read_csv_chunks``."""
    check_form(separator, encoding)
    block = next(line_blocks(path, size=len(codecs.BOM_UTF8)), b"").removeprefix(codecs.BOM_UTF8)
    line = block.partition(b"\n")[0]
    if not line.strip():
        raise DataError(f"{path}: is empty, or its first line is; that one must name the columns")
    return _header(decode(line, encoding, path, 1).encode(), path, [], separator)


def _header(line: bytes, path: Path, wanted: Sequence[str], separator: str) -> list[str]:
    names = _values(line, path, 1, separator)
    _check_names(names, path, 1, wanted, separator)
    return names


def _check_names(names: list[str], path: Path, row: int, wanted: Sequence[str], separator: str) -> None:
    """Raises DataError where a header lacks a wanted name, and says which separator would mend that."""
    other = next((mark for mark in ",\t;|" if mark != separator and mark in names[0]), None)
    if len(names) == 1 and other is not None and list(wanted) != names:
        raise DataError(
            f"{path}: row {row} is not separated by {separator!r}: {names[0][:80]!r}; with dataset=custom, give "
            # quoted for the shell and, inside, for Hydra, to which a semicolon or a comma means something
            f"'dataset.separator=\"{other.replace(chr(9), chr(92) + 't')}\"'"
        )
    check_header(path, wanted, names)


def _values(line: bytes, path: Path, row: int, separator: str) -> list[str]:
    """The values of one line; this says what a line means."""
    text = decode(line, "utf-8", path, row).removesuffix("\r")
    if not text:
        raise empty_row(path, row)
    if "\0" in text:
        raise bad_row(path, row, "holds a zero byte: the file is torn, or not text")
    if "\r" in text:
        raise bad_row(path, row, f"holds a lone carriage return: {text[:80]!r}; lines must end in LF or CRLF")
    try:
        return next(csv.reader([text], delimiter=separator, strict=True))
    except csv.Error as error:
        reason = "a quoted value does not end on its line" if "unexpected end" in str(error) else str(error)
        raise bad_row(path, row, f"is not CSV ({reason}): {text[:80]!r}") from error


def _parse(
    block: bytes, path: Path, row: int, columns: Mapping[str, str], names: Sequence[str], separator: str
) -> pl.DataFrame:
    """The wanted columns of some lines: at once, or line by line where it is not sure that this gives the same."""
    table = _parse_at_once(block, len(names), separator)
    if table is not None:
        found = table.select(pl.nth(names.index(name)).alias(key) for key, name in columns.items())
        if not any((values.is_null() | (values == "")).any() for values in found):
            return found
    rows = []
    for number, line in enumerate(block.split(b"\n")[:-1], start=row):
        values = _values(line, path, number, separator)
        _check_length(values, path, number, names, separator)
        record = dict(zip(names, values, strict=True))
        for name in columns.values():
            if not record[name]:
                raise bad_row(path, number, f"has no {name}")
        rows.append([record[name] for name in columns.values()])
    return pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.String), orient="row")


def _parse_at_once(block: bytes, width: int, separator: str) -> pl.DataFrame | None:
    """All columns of some lines; None where a line may be wrong or may mean something else."""
    if b"\0" in block or block.startswith(codecs.BOM_UTF8) or block.count(b"\r") != block.count(b"\r\n"):
        return None
    if b'"' in block and not all(_quotes_values(lines, separator) for lines in _pieces(block)):
        return None
    schema = {f"column {place}": pl.String for place in range(width)}
    try:
        table = pl.read_csv(block, separator=separator, has_header=False, schema=schema)
    except (pl.exceptions.PolarsError, ValueError):
        return None
    if len(table) != block.count(b"\n"):
        return None
    # Polars fills up lines that are too short
    if b'"' in block:
        return None if table.to_series(-1).has_nulls() else table
    return table if block.count(separator.encode()) == len(table) * (width - 1) else None


def _pieces(block: bytes) -> Iterator[bytes]:
    """Whole lines, about ``QUOTED_BYTES`` at a time."""
    begin = 0
    while begin < len(block):
        end = block.find(b"\n", begin + QUOTED_BYTES) + 1 or len(block)
        yield block[begin:end]
        begin = end


def _quotes_values(lines: bytes, separator: str) -> bool:
    """Whether quotes stand only around whole values, and doubled inside those; readers differ on all others."""
    text = np.frombuffer(lines, np.uint8)
    quotes = np.flatnonzero(text == ord('"'))
    opening, closing = quotes[::2], quotes[1::2]
    if len(opening) != len(closing):
        return False
    # a quote beside them: one that closes and one that opens make a doubled one; before the first byte is the last
    borders = np.frombuffer(f'{separator}\r\n"'.encode(), np.uint8)
    if not (np.isin(text[opening - 1], borders).all() and np.isin(text[closing + 1], borders).all()):
        return False
    ends = np.searchsorted(quotes, np.flatnonzero(text == ord("\n")))
    return not (ends % 2).any()  # an odd number of quotes before a line end: it is inside a value


def _check_length(values: Sequence[str], path: Path, row: int, names: Sequence[str], separator: str) -> None:
    if len(values) != len(names):
        raise bad_row(
            path,
            row,
            f"has {len(values)} values, expected {len(names)} ({', '.join(names[:4])}) separated by {separator!r}: "
            f"{separator.join(values)[:80]!r}",
        )


def read_csv_catalog(
    path: Path,
    columns: Sequence[str],
    id_column: str,
    separator: str = ",",
    encoding: str = "utf-8",
    last_counts: bool = False,
) -> Catalog:
    """Named columns of a delimited file of items as a Catalog, every value text, missing ones "".

    Records may run over several lines where values are quoted. Lines end in LF, CRLF or CR. A byte order mark and
    empty lines are skipped, so that the first line which is not empty is the header. Every record must hold as many
    values as the header.

    Args:
        columns: names in the header; empty takes all.
        id_column: as in ``to_catalog``; so is ``last_counts``.

    Raises:
        DataError: names file and row, where a record begins; a wrong header is shown beside the expected one.
    """
    records = read_records(path, separator, encoding)
    row, names = next(records)
    _check_names(names, path, row, columns or names, separator)
    places = {name: names.index(name) for name in (columns or names)}
    parts, rows = [_to_table([], places)], array("q")
    while part := list(islice(records, TABLE_ROWS)):
        for row, values in part:
            _check_length(values, path, row, names, separator)
            rows.append(row)
        parts.append(_to_table([values for _, values in part], places))
    return to_catalog(pl.concat(parts), id_column, path, 2, rows, last_counts)


def read_records_header(path: Path, separator: str = ",", encoding: str = "utf-8") -> list[str]:
    """The first record of a delimited file of items; raises DataError as ``read_csv_catalog``."""
    row, names = next(read_records(path, separator, encoding))
    _check_names(names, path, row, [], separator)
    return names


def read_records(path: Path, separator: str, encoding: str) -> Iterator[tuple[int, list[str]]]:
    """Each record of a delimited file, the header too, behind the number of the line on which it begins.

    Raises:
        DataError: no record at all, or one that is not CSV; names file and row.
    """
    check_form(separator, encoding)
    row, found = 1, False
    codec = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    try:
        with reading(path), io.TextIOWrapper(cast(BinaryIO, open_text(path)), codec, newline="") as text:
            reader = csv.reader(_without_zeros(text, path), delimiter=separator, strict=True)
            for values in reader:
                if any(values) if not found else values:
                    found = True
                    yield row, values
                row = reader.line_num + 1
    except csv.Error as error:
        raise bad_row(path, row, f"begins a record that is not CSV ({error})") from error
    except UnicodeDecodeError:
        # the codec reads ahead: only a second look finds the row
        decode(b"".join(line_blocks(path)), encoding, path, 1)
        raise
    if not found:
        raise DataError(f"{path}: is empty; fetch the file again")


def _without_zeros(lines: Iterable[str], path: Path) -> Iterator[str]:
    for row, line in enumerate(lines, start=1):
        if "\0" in line:
            raise bad_row(path, row, "holds a zero byte: the file is torn, or not text")
        yield line


def _to_table(rows: list[list[str]], places: Mapping[str, int]) -> pl.DataFrame:
    return pl.DataFrame(
        [pl.Series(name, [values[place] for values in rows], dtype=pl.String) for name, place in places.items()]
    )


def read_catalog(path: Path) -> Catalog:
    """Items of a person's own: a CSV file with a header, a column ``id``, and text columns; values stay text.

    Raises:
        DataError: the file is missing, empty or torn, has no column id, or an id is empty or occurs twice.
    """
    return read_csv_catalog(path, [], "id")
