"""Raw files -> columns, with every refusal naming file and row.

Columns are found by name. A row is a line of the file, counted from 1 with the header.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl

from hllm.data.schema import Catalog
from hllm.errors import DataError

BLOCK_BYTES = 1 << 26
"Of a delimited file, parsed at a time."
csv.field_size_limit(1 << 24)  # some descriptions are longer than the 128 KiB that Python allows


def read_parquet(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """Named columns of a Parquet file.

    Raises:
        DataError: the file is torn, empty, not Parquet, not UTF-8, or lacks a column.
    """
    try:
        table = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); fetch the file again") from error
    check_header(path, columns, table.columns)
    return table.select(columns)


def check_header(path: Path, wanted: Sequence[str], found: Sequence[str]) -> None:
    """Raises DataError, with both headers, where a column is not there or is there twice."""
    for column in wanted:
        if column not in found:
            raise DataError(f"{path}: has no column {column!r}; expected {list(wanted)}, found {list(found)}")
        if list(found).count(column) > 1:
            raise DataError(f"{path}: has two columns {column!r}; found {list(found)}")


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
        text = _decode(block, encoding, path, first_row).removeprefix("\ufeff")
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


def open_text(path: Path) -> io.BufferedIOBase:
    """A file, or what a .gz file holds, as bytes; raises DataError where it cannot be opened."""
    try:
        return gzip.open(path) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def line_blocks(path: Path, size: int = BLOCK_BYTES) -> Iterator[bytes]:
    """Whole lines, about ``size`` bytes at a time.

    Raises:
        DataError: the file cannot be read, or its compression is cut short or broken.
    """
    with open_text(path) as file:
        while True:
            try:
                block = file.read(size)
                block += file.readline()
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise DataError(f"{path}: the compressed file is cut short or broken; fetch it again") from error
            except OSError as error:
                raise DataError(f"{path}: {error.strerror or error}") from error
            if not block:
                return
            yield block


def read_csv_chunks(
    path: Path,
    columns: Mapping[str, str],
    separator: str = ",",
    encoding: str = "utf-8",
    header: Sequence[str] | None = None,
) -> Iterator[pl.DataFrame]:
    """A delimited file of any size, chunk by chunk, every value a string.

    A record is one line; values may stand in double quotes, with "" for a quote inside. A byte order mark, CRLF line
    ends and empty lines at the end of the file are skipped. Every line must hold as many values as the header, and
    the wanted ones must not be empty.

    Args:
        path: .gz is decompressed on the way.
        columns: name in the result -> name in the header.
        header: of a file that has none: its columns by position.

    Raises:
        DataError: names file and row; a wrong header is shown beside the expected one.
    """
    row = 1
    names = None if header is None else list(header)
    blank_since: int | None = None
    for block in line_blocks(path):
        if row == 1:
            block = block.removeprefix(b"\xef\xbb\xbf")
        if encoding.lower() not in ("utf-8", "utf8"):
            block = _decode(block, encoding, path, row).encode()
        if names is None:
            line, _, block = block.partition(b"\n")
            names = next(csv.reader([_decode(line, "utf-8", path, 1).rstrip("\r\n")], delimiter=separator), [])
            check_header(path, list(columns.values()), names)
            row = 2
        lines = block.count(b"\n") + (not block.endswith(b"\n"))
        if not block.strip():
            if block:
                blank_since = row if blank_since is None else blank_since
                row += lines
            continue
        if blank_since is not None:
            raise DataError(f"{path}: row {blank_since} is empty; only the end of the file may be")
        stripped = block.rstrip(b"\r\n")
        tail = lines - (stripped.count(b"\n") + 1)
        yield _parse(stripped + b"\n", path, row, columns, names, separator)
        if tail:
            blank_since = row + lines - tail
        row += lines
    if names is None:
        raise DataError(f"{path}: is empty; fetch the file again")


def _decode(data: bytes, encoding: str, path: Path, row: int) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        row += data[: error.start].count(b"\n")
        raise DataError(
            f"{path}: row {row} is not {encoding.upper()} text; save the file as UTF-8, or name its encoding "
            "(dataset.encoding= of dataset=custom)"
        ) from error
    except LookupError as error:
        raise DataError(f"dataset.encoding={encoding}: Python knows no such encoding") from error


def _parse(
    block: bytes, path: Path, row: int, columns: Mapping[str, str], names: Sequence[str], separator: str
) -> pl.DataFrame:
    """The wanted columns of some lines."""
    schema = {f"column {place}": pl.String for place in range(len(names))}
    try:
        table = pl.read_csv(block, separator=separator, has_header=False, schema=schema)
        if len(table) != block.count(b"\n"):
            raise pl.exceptions.ComputeError("a record of several lines")
    except (pl.exceptions.PolarsError, ValueError) as error:
        raise _diagnose(block, path, row, names, separator, error) from error
    found = table.select(pl.col(f"column {names.index(name)}").alias(key) for key, name in columns.items())
    for key in found.columns:
        if found[key].has_nulls():
            # an empty value, or a line that ended before it
            raise _diagnose(block, path, row, names, separator, None, columns[key], found[key].is_null().arg_true()[0])
    return found


def _diagnose(
    block: bytes,
    path: Path,
    row: int,
    names: Sequence[str],
    separator: str,
    error: Exception | None,
    column: str = "",
    place: int = 0,
) -> DataError:
    """What is wrong with lines that could not be parsed: the first line that has another number of values."""
    expected = f"expected {len(names)} ({', '.join(names[:4])}) separated by {separator!r}"
    for number, line in enumerate(block.split(b"\n")[:-1], start=row):
        text = _decode(line, "utf-8", path, number).rstrip("\r")
        if not text.strip():
            return DataError(f"{path}: row {number} is empty; only the end of the file may be")
        try:
            values = next(csv.reader([text], delimiter=separator, strict=True))
        except csv.Error as reason:
            return DataError(f"{path}: row {number} is not CSV ({reason}): {text[:80]!r}")
        if len(values) != len(names):
            return DataError(f"{path}: row {number} has {len(values)} values, {expected}: {text[:80]!r}")
    if column:
        return DataError(f"{path}: row {row + place} has no {column}")
    return DataError(f"{path}: rows {row} and following cannot be read as CSV ({error})")


def read_csv_table(path: Path, columns: Sequence[str], separator: str = ",", encoding: str = "utf-8") -> pl.DataFrame:
    """Named columns of a delimited file with a header, every value a string, missing ones null; for item files.

    Records may run over several lines where values are quoted. Every record must hold as many values as the header.

    Args:
        columns: names in the header; empty takes all.

    Raises:
        DataError: names file and row; a wrong header is shown beside the expected one.
    """
    blocks = list(line_blocks(path))
    text = _decode(b"".join(blocks), encoding, path, 1).removeprefix("\ufeff")
    # NUL cannot stand in a file of text, and csv would read past it
    if not text.strip():
        raise DataError(f"{path}: is empty; fetch the file again")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[list[str]] = []
    try:
        names = next(reader)
        check_header(path, columns or names, names)
        for values in reader:
            if len(values) != len(names):
                if not values:
                    continue
                raise DataError(
                    f"{path}: row {reader.line_num} has {len(values)} values, expected {len(names)} "
                    f"({', '.join(names[:4])}) separated by {separator!r}: {separator.join(values)[:80]!r}"
                )
            rows.append(values)
    except csv.Error as error:
        raise DataError(f"{path}: row {reader.line_num} is not CSV ({error})") from error
    by_column = list(zip(*rows, strict=True)) or [()] * len(names)
    wanted = [(name, by_column[names.index(name)]) for name in (columns or names)]
    return pl.DataFrame([pl.Series(name, values, dtype=pl.String) for name, values in wanted])


def to_integers(table: pl.DataFrame, column: str, path: Path, first_row: int = 1) -> pl.Series:
    """A column as int64; raises DataError at the first row that is missing or not a whole number."""
    values = table[column]
    numbers = values.cast(pl.Int64, strict=False)
    bad = numbers.is_null().arg_true()
    if not len(bad) and values.dtype.is_float():
        bad = (numbers != values).arg_true()
    if len(bad):
        row = int(bad[0])
        raise DataError(f"{path}: row {first_row + row} has {column}={values[row]!r}, which is not a whole number")
    return numbers


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


def read_catalog(path: Path) -> Catalog:
    """Items of a person's own: a CSV file with a header, a column ``id``, and text columns; values stay text.

    Raises:
        DataError: the file is missing, empty or torn, has no column id, or an id is empty or occurs twice.
    """
    return to_catalog(read_csv_table(path, []), "id", path, first_row=2)


def to_catalog(table: pl.DataFrame, column: str, path: Path, first_row: int) -> Catalog:
    """A table of items as a Catalog: ids without white space around them, all other columns as text fields.

    Args:
        table: text or numbers; missing values become "".
        column: of the original ids.
        first_row: line of the first record, for messages.

    Raises:
        DataError: no row, no such column, or an id that is empty or occurs twice.
    """
    check_header(path, [column], table.columns)
    ids = table[column].cast(pl.String).fill_null("").str.strip_chars()
    if not len(ids):
        raise DataError(f"{path}: has no item, only a header")
    if (ids == "").any():
        raise DataError(f"{path}: row {first_row + int((ids == '').arg_true()[0])} has no {column}")
    repeated = ~ids.is_first_distinct()
    if repeated.any():
        row = int(repeated.arg_true()[0])
        raise DataError(f"{path}: row {first_row + row} repeats {column} {ids[row]!r}; ids must be unique")
    fields = {name: table[name].cast(pl.String).fill_null("") for name in table.columns if name != column}
    return Catalog(ids, fields)
