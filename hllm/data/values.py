"""Raw columns of any type -> ids, times and ratings: what a value means, and which ones are refused."""

from pathlib import Path

import polars as pl

from hllm.errors import DataError

LATEST = 253_402_300_799
"The last second of the year 9999: what is later is no time in seconds."
MEND = "mend that row, or fetch the file again"
_EXACT_BITS = ((pl.Float16, 11), (pl.Float32, 24), (pl.Float64, 53))


def check_events(chunk: pl.DataFrame, source: Path, first_row: int) -> pl.DataFrame:
    """Raw columns of any type as user and item (text), timestamp (int64 seconds) and, where there, rating (float64).

    Each value is judged by itself, so that it does not matter how rows are cut into chunks. White space around a value
    has no meaning. An id is text, "nan" and "007" too, or a whole number. A time is a whole number of seconds since
    1970, in digits if it is text, or a column of dates or datetimes, read as UTC and cut to seconds. A rating is a
    finite number.

    Raises:
        DataError: names file and row of the first value that is missing or not what it should be.
    """
    columns = []
    for name in ("user", "item"):
        ids = to_ids(chunk[name])
        _refuse(ids.is_null() | (ids == ""), source, first_row, f"has no {name} id (found {{!r}})", chunk[name])
        columns.append(ids.alias(name))
    raw = chunk["timestamp"]
    times = raw.dt.epoch("s") if raw.dtype in (pl.Date, pl.Datetime) else to_whole(raw)
    _refuse(times.is_null(), source, first_row, "has timestamp={!r}, which is not a whole number of seconds", raw)
    _refuse(
        (times < 0) | (times > LATEST),
        *(source, first_row, "has timestamp={!r}, which is not between the years 1970 and 9999 in seconds", raw),
    )
    columns.append(times.alias("timestamp"))
    if "rating" in chunk.columns:
        ratings = _cast(chunk["rating"], pl.Float64)
        finite = ratings.is_not_null() & ratings.is_finite()
        _refuse(~finite.fill_null(False), source, first_row, "has rating={!r}, which is not a number", chunk["rating"])
        columns.append(ratings.alias("rating"))
    return pl.DataFrame(columns)


def to_ids(values: pl.Series) -> pl.Series:
    """Ids as text without white space around them; null where a value is neither text nor a whole number.

    Whole numbers that a file holds as floats lose their ".0".
    """
    if values.dtype.is_integer():  # as they are: hashes take all 64 bits
        return values.cast(pl.String)
    if values.dtype.is_numeric():
        return to_whole(values).cast(pl.String)
    if values.dtype == pl.String or isinstance(values.dtype, pl.Categorical | pl.Enum):
        return values.cast(pl.String).str.strip_chars()
    return pl.Series(values.name, [None] * len(values), pl.String)


def to_whole(values: pl.Series) -> pl.Series:
    """Values as int64; null where one is not a whole number, or is a float too large to tell it from its neighbours."""
    numbers = _cast(values, pl.Int64)
    if values.dtype.is_float() or values.dtype.is_decimal():
        whole = (numbers == values) & ~is_rounded(values)
        numbers = pl.select(pl.when(whole).then(numbers)).to_series().alias(values.name)
    return numbers


def is_rounded(values: pl.Series) -> pl.Series:
    """Where a float stands for several whole numbers: it was perhaps rounded. False for other types and for NaN."""
    bits = next((bits for kind, bits in _EXACT_BITS if values.dtype == kind), None)
    return pl.repeat(False, len(values), eager=True) if bits is None else values.is_finite() & (values.abs() >= 2**bits)


def _cast(values: pl.Series, kind: type[pl.Int64 | pl.Float64]) -> pl.Series:
    """Numbers, or text that is one, as ``kind``; null where a value is none."""
    if values.dtype.is_numeric():
        return values.cast(kind, strict=False)
    if values.dtype != pl.String:
        return pl.Series(values.name, [None] * len(values), kind)
    numbers = values.cast(kind, strict=False)
    return values.str.strip_chars().cast(kind, strict=False) if numbers.has_nulls() else numbers


def _refuse(wrong: pl.Series, source: Path, first_row: int, message: str, values: pl.Series) -> None:
    if wrong.any():
        place = int(wrong.arg_true()[0])
        raise DataError(f"{source}: row {first_row + place} {message.format(values[place])}; {MEND}")
