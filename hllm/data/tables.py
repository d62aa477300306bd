"""Raw files -> columns, with every refusal naming file and row."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from hllm.data.schema import Catalog
from hllm.errors import DataError


def read_parquet(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """Named columns of a Parquet file.

    Raises:
        DataError: the file is torn, empty, not Parquet, not UTF-8, or lacks a column.
    """
    try:
        table = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); fetch the file again") from error
    if missing := [column for column in columns if column not in table.columns]:
        raise DataError(f"{path}: has no column {missing[0]!r}; expected {list(columns)}, found {table.columns}")
    return table.select(columns)


def read_delimited(path: Path, separator: str, columns: Sequence[str], encoding: str = "utf-8") -> pl.DataFrame:
    """A text file without a header, every value a string.

    Args:
        separator: between values; quotes have no meaning.
        columns: names by position; each line must hold exactly as many values.

    Raises:
        DataError: no line at all, a byte that is not of the encoding, or a line with too few or too many values.
    """
    try:
        raw = path.read_bytes()
        # not splitlines(): it would also cut at a title's form feed or U+0085
        lines = [line.removesuffix("\r") for line in raw.decode(encoding).removesuffix("\n").split("\n")]
    except UnicodeDecodeError as error:
        row = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}: row {row} is not {encoding.upper()} text") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if not any(lines):
        raise DataError(f"{path}: is empty; fetch the file again")
    rows = pl.Series("line", lines, dtype=pl.String).str.split(separator)
    lengths = rows.list.len()
    wrong = (lengths != len(columns)).arg_true()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{path}: row {row + 1} has {lengths[row]} values, expected {len(columns)} "
            f"({', '.join(columns[:4])}, ...) separated by {separator!r}: {lines[row][:80]!r}"
        )
    return rows.list.to_struct(fields=list(columns)).struct.unnest()


def to_integers(table: pl.DataFrame, column: str, path: Path) -> pl.Series:
    """A column as int64; raises DataError at the first row that is missing or not a whole number."""
    values = table[column]
    numbers = values.cast(pl.Int64, strict=False)
    bad = numbers.is_null().arg_true()
    if not len(bad) and values.dtype.is_float():
        bad = (numbers != values).arg_true()
    if len(bad):
        row = int(bad[0])
        raise DataError(f"{path}: row {row + 1} has {column}={values[row]!r}, which is not a whole number")
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
    try:
        table = pl.read_csv(path, infer_schema=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error})") from error
    if "id" not in table.columns:
        raise DataError(f"{path}: has no column 'id'; its header is {table.columns}")
    ids = table["id"].fill_null("")
    wrong = (ids.is_duplicated() | (ids == "")).arg_true()
    if len(wrong) or table.is_empty():
        row = int(wrong[0]) if len(wrong) else 0
        raise DataError(f"{path}: row {row + 2} has no id of its own; ids must be there and unique")
    fields = {name: table[name].fill_null("").to_list() for name in table.columns if name != "id"}
    return Catalog(ids.to_list(), fields)
