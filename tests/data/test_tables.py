"""What comes out of files that are as they should be; broken ones are in test_bad_files.py."""

import gzip
from pathlib import Path

import polars as pl
import pytest

from hllm.data import delimited, tables
from hllm.data.delimited import read_catalog, read_csv_catalog, read_csv_chunks, read_csv_header, read_delimited
from hllm.data.tables import line_blocks, open_text, read_parquet, read_parquet_chunks, read_parquet_header, to_text
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
    monkeypatch.setattr(delimited, "TABLE_ROWS", 2)
    path.write_text("a;b;c\n" + "".join(f"1;{n};3\n" for n in range(5)))
    catalog = read_csv_catalog(path, ["c", "b", "a"], "b", separator=";")
    assert catalog.ids.to_list() == list("01234")
    assert {name: values.to_list() for name, values in catalog.fields.items()} == {"c": ["3"] * 5, "a": ["1"] * 5}


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


def test_brackets_in_a_path_are_no_pattern(tmp_path: Path) -> None:
    path = tmp_path / "a[1]" / "x*?.parquet"
    path.parent.mkdir()
    pl.DataFrame({"a": [1, 2]}).write_parquet(path)
    assert read_parquet_header(path) == ["a"]
    assert read_parquet(path, ["a"])["a"].to_list() == [1, 2]
    assert [chunk["b"].to_list() for chunk in read_parquet_chunks(path, {"b": "a"})] == [[1, 2]]


@pytest.mark.parametrize("data", [b"", b"\n", b"\r\n\n", b"\xef\xbb\xbf\na,b\n", b"\na,b\n1,2\n"])
def test_the_first_line_of_interactions_must_name_the_columns(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"new\.csv: is empty, or its first line is; that one must name the columns"):
        read_csv_header(path)


def test_quotes_of_a_block_are_looked_through_piece_by_piece(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "QUOTED_BYTES", 8)
    path.write_text("a,b\n" + '"x,""y",2\n' * 9)
    assert pl.concat(read_csv_chunks(path, {"a": "a"}))["a"].to_list() == ['x,"y'] * 9
    assert delimited._parse_at_once(b'"a""","b"\r\n"",""""\r\n' * 9, 2, ",") is not None
    assert delimited._parse_at_once(b'"a",b\n' * 9 + b'"a"c,b\n', 2, ",") is None


def test_bytes_become_text_or_are_refused_by_row(path: Path) -> None:
    table = pl.DataFrame({"title": ["é".encode(), None]})
    assert to_text(table, "title", path) == ["é", ""]
    with pytest.raises(DataError, match=r"new\.csv: row 2 has a title that is not UTF-8 text"):
        to_text(pl.DataFrame({"title": [b"a", b"\xff"]}), "title", path)
