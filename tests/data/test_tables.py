"""What comes out of files that are as they should be; broken ones are in test_bad_files.py."""

import gzip
from pathlib import Path

import polars as pl
import pytest

from hllm.data import tables
from hllm.data.tables import (
    line_blocks,
    open_text,
    read_catalog,
    read_csv_chunks,
    read_csv_table,
    read_delimited,
    to_integers,
    to_text,
)
from hllm.errors import DataError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new.csv"


def test_values_of_a_catalogue_stay_text_and_missing_ones_are_empty(path: Path) -> None:
    path.write_text('id,title,genres\n007,"Bond, James",\n1.50,,Drama\n')
    catalog = read_catalog(path)
    assert catalog.ids.to_list() == ["007", "1.50"]
    assert {name: values.to_list() for name, values in catalog.fields.items()} == {
        "title": ["Bond, James", ""],
        "genres": ["", "Drama"],
    }
    assert catalog.titles == ["Bond, James", "1.50"]


def test_chunks_are_whole_lines_and_together_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text("b,a\n" + "".join(f"{n},x{n}\n" for n in range(50)))
    monkeypatch.setattr(tables, "BLOCK_BYTES", 20)
    chunks = list(read_csv_chunks(path, {"one": "a", "two": "b"}))
    assert len(chunks) > 5
    assert pl.concat(chunks).rows() == [(f"x{n}", str(n)) for n in range(50)]


def test_a_file_without_a_header_is_read_by_the_names_given(path: Path) -> None:
    path.write_text("1,2,3\n4,5,6\n")
    (chunk,) = read_csv_chunks(path, {"last": "c"}, header=["a", "b", "c"])
    assert chunk.to_dict(as_series=False) == {"last": ["3", "6"]}


def test_only_wanted_columns_of_a_table_are_kept_in_the_order_wanted(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "TABLE_ROWS", 2)
    path.write_text("a;b;c\n" + "1;2;3\n" * 5)
    table = read_csv_table(path, ["c", "a"], separator=";")
    assert table.to_dict(as_series=False) == {"c": ["3"] * 5, "a": ["1"] * 5}


@pytest.mark.parametrize("name", ["packed.gz", "packed.csv"])
def test_gzip_is_known_by_content_whatever_the_name(tmp_path: Path, name: str) -> None:
    for data in (gzip.compress(b"a\nb\n"), b"a\nb\n"):
        (tmp_path / name).write_bytes(data)
        assert b"".join(line_blocks(tmp_path / name, size=1)) == b"a\nb\n"
        with open_text(tmp_path / name) as file:
            assert file.read(3) == b"a\nb"


def test_a_delimited_file_keeps_quotes_and_takes_long_separators(path: Path) -> None:
    path.write_bytes('1::"x"::Ü\r\n2::a\x0cb::\n'.encode("latin-1"))
    table = read_delimited(path, "::", ["id", "title", "genre"], encoding="iso-8859-1")
    assert table.rows() == [("1", '"x"', "Ü"), ("2", "a\x0cb", "")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"1::a\n2\n", r"row 2 has 1 values, expected 2 \(id, title"),
        (b"1::a\n2::\xff\n", "row 2 is not UTF-8 text"),
    ],
)
def test_a_broken_delimited_file_is_refused_by_row(path: Path, data: bytes, message: str) -> None:
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"new\.csv: {message}"):
        read_delimited(path, "::", ["id", "title"])


@pytest.mark.parametrize("values", [["1", "2.5"], [1, None], [1.0, 2.5], ["1", "x"]])
def test_what_is_no_whole_number_is_refused_by_row(path: Path, values: list[object]) -> None:
    with pytest.raises(DataError, match=r"new\.csv: row 3 has n=.*, which is not a whole number"):
        to_integers(pl.DataFrame({"n": values}), "n", path, first_row=2)


def test_bytes_become_text_or_are_refused_by_row(path: Path) -> None:
    table = pl.DataFrame({"title": ["é".encode(), None]})
    assert to_text(table, "title", path) == ["é", ""]
    with pytest.raises(DataError, match=r"new\.csv: row 2 has a title that is not UTF-8 text"):
        to_text(pl.DataFrame({"title": [b"a", b"\xff"]}), "title", path)
