"""Broken and odd files: each is read by a stated rule, or refused with file, row and remedy."""

import csv
import gzip
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hllm.config import CustomConfig
from hllm.data import tables
from hllm.data.custom import CustomData
from hllm.data.delimited import read_csv_catalog, read_csv_chunks, read_records_header
from hllm.data.prepare import RawEvents
from hllm.data.tables import read_parquet, to_catalog
from hllm.errors import DataError

COLUMNS = {"user": "user_id", "item": "item_id", "timestamp": "timestamp"}
HEAD = b"user_id,item_id,timestamp\n"
GOOD = [("u1", "a", 5), ("u2", "b", 6)]
MEND = "mend that row, or fetch the file again"
Rows = list[tuple[str, str, int]]


class Case(NamedTuple):
    """A file's bytes, and its rows or the error."""

    name: str
    data: bytes
    expected: Rows | str
    separator: str = ","
    encoding: str = "utf-8"


EVENTS = [
    # read by a stated rule
    Case("as it should be", HEAD + b"u1,a,5\nu2,b,6\n", GOOD),
    Case("byte order mark", b"\xef\xbb\xbf" + HEAD + b"u1,a,5\nu2,b,6\n", GOOD),
    Case("CRLF", b"user_id,item_id,timestamp\r\nu1,a,5\r\nu2,b,6\r\n", GOOD),
    Case("no line end at the end", HEAD + b"u1,a,5\nu2,b,6", GOOD),
    Case("CRLF, cut before its LF", b"user_id,item_id,timestamp\r\nu1,a,5\r\nu2,b,6\r", GOOD),
    Case("empty lines at the end", HEAD + b"u1,a,5\nu2,b,6\n\n\r\n\n", GOOD),
    Case("other columns and another order", b"timestamp,x,item_id,user_id\n5,,a,u1\n6,zz,b,u2\n", GOOD),
    Case("quoted values", b'"user_id","item_id","timestamp"\n"u1","a","5"\n"u2","b","6"\n', GOOD),
    Case("separator and quotes in quotes", HEAD + b'"u,1","a ""b""",5\n', [("u,1", 'a "b"', 5)]),
    Case(
        "a quote in the middle of a value", HEAD + b'u1,3" disc,5\nu"2,b,6\n', [("u1", '3" disc', 5), ('u"2', "b", 6)]
    ),
    Case("a quote in another column", b'item_id,user_id,title,timestamp\na,u1,the "x,5\nb,u2,y,6\n', GOOD),
    Case("white space around values", HEAD + b" u1,a\t, 5 \nu2 ,  b,6\n", GOOD),
    Case("white space inside ids", HEAD + b"u 1,a  b,5\n", [("u 1", "a  b", 5)]),
    Case("ids that are not ASCII", HEAD + "ü1,é—日本,5\n".encode(), [("ü1", "é—日本", 5)]),
    Case("words for nothing are ids", HEAD + b"nan,NULL,5\nNone,NA,6\n", [("nan", "NULL", 5), ("None", "NA", 6)]),
    Case("ids with zeros and points stay text", HEAD + b"007,1.0,5\n+7,1e3,6\n", [("007", "1.0", 5), ("+7", "1e3", 6)]),
    Case("ids above 64 bits", HEAD + b"99999999999999999999,a,5\n", [("99999999999999999999", "a", 5)]),
    Case("times with sign and zeros", HEAD + b"u1,a,+5\nu2,b,006\n", GOOD),
    Case(
        "the first and the last second", HEAD + b"u,a,0\nu,b,253402300799\n", [("u", "a", 0), ("u", "b", 253402300799)]
    ),
    Case("form feed and next line inside", HEAD + "u\x0c1,a\u0085b,5\n".encode(), [("u\x0c1", "a\u0085b", 5)]),
    Case("tabs, told so", b"user_id\titem_id\ttimestamp\nu1\ta\t5\nu2\tb\t6\n", GOOD, separator="\t"),
    Case("Windows-1252, told so", HEAD + "ü1,Ž€,5\n".encode("cp1252"), [("ü1", "Ž€", 5)], encoding="cp1252"),
    Case("UTF-8 under another name", b"\xef\xbb\xbf" + HEAD + b"u1,a,5\nu2,b,6\n", GOOD, encoding="UTF8"),
    Case("gzip", gzip.compress(HEAD + b"u1,a,5\nu2,b,6\n"), GOOD),
    Case("gzip in two parts", gzip.compress(HEAD + b"u1,a,5\n") + gzip.compress(b"u2,b,6\n"), GOOD),
    # refused
    Case("empty", b"", "is empty; fetch the file again"),
    Case("a byte order mark alone", b"\xef\xbb\xbf", f"row 1 is empty, .*; {MEND}"),
    Case("line ends alone", b"\n\n\n", f"row 1 is empty, .*; {MEND}"),
    Case("header only", HEAD, "holds no interactions; download the file again"),
    Case("header only, no line end", HEAD.strip(), "holds no interactions; download the file again"),
    Case("no header", b"u1,a,5\nu2,b,6\n", r"no column 'user_id'; expected \['user_id', .*found \['u1', 'a', '5'\]"),
    Case("a column is missing", b"user_id,item_id\nu1,a\n", r"has no column 'timestamp'.*dataset.user_column="),
    Case("a column twice", b"user_id,item_id,timestamp,item_id\nu,a,5,b\n", "has two columns 'item_id'.*Rename one"),
    Case("other capitals", b"User_ID,item_id,timestamp\nu,a,5\n", r"has no column 'user_id'.*found \['User_ID'"),
    Case(
        "tabs for commas",
        b"user_id\titem_id\ttimestamp\nu\ta\t5\n",
        r"row 1 is not separated by ','.*dataset.separator=.\\t",
    ),
    Case("semicolons", b"user_id;item_id;timestamp\nu;a;5\n", r"row 1 is not separated by ','.*dataset.separator=.;"),
    Case("spaces", b"user_id item_id timestamp\nu a 5\n", r"has no column 'user_id'.*found \['user_id item_id"),
    Case("another separator further down", HEAD + b"u1,a,5\nu2\tb\t6\n", f"row 3 has 1 values, expected 3 .*; {MEND}"),
    Case("missing last field", HEAD + b"u1,a,5\nu2,b\nu3,c,7\n", f"row 3 has 2 values, expected 3 .*'u2,b'; {MEND}"),
    Case("missing last field, first row", HEAD + b"u1,a\n", f"row 2 has 2 values, expected 3 .*; {MEND}"),
    Case(
        "cut in a number before a column nobody wants",
        b"user_id,item_id,timestamp,x\nu1,a,5,\nu2,b,88",
        f"row 3 has 3 values, expected 4 .*; {MEND}",
    ),
    Case("a value too many", HEAD + b"u1,a,5\nu2,b,6,7\n", f"row 3 has 4 values, expected 3 .*; {MEND}"),
    Case("a separator at each end", HEAD + b"u1,a,5,\nu2,b,6,\n", f"row 2 has 4 values, expected 3 .*; {MEND}"),
    Case("one short, one long", HEAD + b"u1,a,5\nu2,b\nu3,c,7,8\n", f"row 3 has 2 values, .*; {MEND}"),
    Case("empty line in the middle", HEAD + b"u1,a,5\n\nu2,b,6\n", f"row 3 is empty, .*end of the file.*; {MEND}"),
    Case("empty first line", b"\n" + HEAD + b"u1,a,5\n", f"row 1 is empty, .*; {MEND}"),
    Case("empty line under the header", HEAD + b"\nu1,a,5\n", f"row 2 is empty, .*; {MEND}"),
    Case("line of spaces", HEAD + b"u1,a,5\n   \n", f"row 3 has 1 values, expected 3 .*; {MEND}"),
    Case("line of separators", HEAD + b"u1,a,5\n,,\n", f"row 3 has no user_id; {MEND}"),
    Case("no user", HEAD + b"u1,a,5\n,b,6\n", f"row 3 has no user_id; {MEND}"),
    Case("no item, in quotes", HEAD + b'u1,a,5\nu2,"",6\n', f"row 3 has no item_id; {MEND}"),
    Case("a user of spaces", HEAD + b"u1,a,5\n  ,b,6\n", rf"row 3 has no user id \(found '  '\); {MEND}"),
    Case("no time", HEAD + b"u1,a,5\nu2,b,\n", f"row 3 has no timestamp; {MEND}"),
    Case("NaN", HEAD + b"u1,a,5\nu2,b,NaN\n", f"row 3 has timestamp='NaN', which is not a whole number.*; {MEND}"),
    Case("infinite time", HEAD + b"u1,a,inf\n", f"row 2 has timestamp='inf', which is not a whole number.*; {MEND}"),
    Case(
        "time with a point", HEAD + b"u1,a,5.0\n", f"row 2 has timestamp='5.0', which is not a whole number.*; {MEND}"
    ),
    Case("rounded time", HEAD + b"u1,a,1.46E+09\n", f"row 2 has timestamp='1.46E.09', which is not .*; {MEND}"),
    Case("written date", HEAD + b"u1,a,2014-07-23\n", f"row 2 has timestamp='2014-07-23', which is not .*; {MEND}"),
    Case("digits of another script", HEAD + "u1,a,٣\n".encode(), f"row 2 has timestamp='٣', which.*; {MEND}"),
    Case(
        "negative time", HEAD + b"u1,a,5\nu2,b,-6\n", f"row 3 has timestamp='-6', .*between the years 1970 .*; {MEND}"
    ),
    Case(
        "milliseconds",
        HEAD + b"u1,a,1406073600000\n",
        "row 2 has timestamp='1406073600000', which is not between.*seconds",
    ),
    Case("year 300000", HEAD + b"u1,a,9404640000000\n", "row 2 has timestamp='9404640000000', which is not between"),
    Case(
        "time above 64 bits", HEAD + b"u1,a,9223372036854775808\n", "row 2 has timestamp='9223372036854775808', which"
    ),
    Case(
        "quote never closed",
        HEAD + b'u1,"a,5\nu2,b,6\n',
        f"row 2 is not CSV .a quoted value does not end .*; {MEND}",
    ),
    Case(
        "record over two lines",
        HEAD + b'u1,"a\nb",5\n',
        f"row 2 is not CSV .a quoted value does not end on its.*; {MEND}",
    ),
    Case("text behind a closing quote", HEAD + b'u1,a,5\nu2,"b"c,6\n', f"row 3 is not CSV .*'u2,.*; {MEND}"),
    Case(
        "Windows-1252, not told",
        HEAD + "u1,a,5\nü2,b,6\n".encode("cp1252"),
        "row 3 is not UTF-8 text; save.*dataset.encoding=",
    ),
    Case("UTF-16", ("\ufeff" + HEAD.decode()).encode("utf-16-le"), "row 1 is not UTF-8 text; save the file as UTF-8"),
    Case(
        "UTF-16, told so",
        HEAD,
        "dataset.encoding=utf-16: has line ends of more than one byte; save.*",
        encoding="utf-16",
    ),
    Case("no such encoding", HEAD, "dataset.encoding=utf-9: Python knows no such encoding", encoding="utf-9"),
    Case("wrong encoding named", HEAD + "ü,a,5\n".encode(), "row 2 is not ASCII text", encoding="ascii"),
    Case("two-character separator", HEAD, "dataset.separator='::': must be one ASCII character", separator="::"),
    Case(
        "lone CR line ends",
        b"user_id,item_id,timestamp\ru1,a,5\ru2,b,6\r",
        f"row 1 holds a lone carriage return.*; {MEND}",
    ),
    Case("a lone CR inside", HEAD + b"u1,a,5\nu2,b\rc,6\n", f"row 3 holds a lone carriage return.*; {MEND}"),
    Case("CR CR LF", b"user_id,item_id,timestamp\r\r\nu1,a,5\r\r\n", f"row 1 holds a lone carriage return.*; {MEND}"),
    Case(
        "zero bytes", HEAD + b"u1,a,5\n" + bytes(64), f"row 3 holds a zero byte: the file is torn, or not text; {MEND}"
    ),
    Case("the header again", HEAD + b"u1,a,5\n" + HEAD, f"row 3 has timestamp='timestamp', which is not .*; {MEND}"),
    Case(
        "gzip cut short",
        gzip.compress(HEAD + b"u1,a,5\n" * 99)[:-9],
        "compressed file is cut short or broken; fetch it again",
    ),
    Case("gzip with a wrong checksum", gzip.compress(HEAD)[:-8] + bytes(8), "cut short or broken; fetch it again"),
    Case("gzip with rubbish behind", gzip.compress(HEAD) + b"rubbish", "cut short or broken; fetch it again"),
    Case("a web page", b"<!DOCTYPE html>\n<html>404</html>\n", r"has no column 'user_id'.*found \['<!DOCTYPE html>'\]"),
]


def read(path: Path, separator: str = ",", encoding: str = "utf-8") -> Rows:
    """The rows of a file, through the encoded and spilled form."""
    with tempfile.TemporaryDirectory() as folder:
        raw = RawEvents(Path(folder), path, first_row=2)
        raw.fill(read_csv_chunks(path, COLUMNS, separator, encoding), None)
        users, items = raw.user_ids.ids(), raw.item_ids.ids()
        return [
            (users[int(user)], items[int(item)], int(time))
            for chunk in raw.chunks()
            for user, item, time in zip(*chunk, strict=True)
        ]


def assert_expected(path: Path, read: Callable[[], object], expected: object) -> None:
    if not isinstance(expected, str):
        assert read() == expected
        return
    with pytest.raises(DataError) as caught:
        read()
    assert re.search(expected, str(caught.value)), caught.value
    assert str(caught.value).startswith((f"{path}: ", "dataset."))


@pytest.mark.parametrize("case", EVENTS, ids=lambda case: case.name)
@pytest.mark.parametrize("block", [1, 30, 1 << 26])
def test_interactions(tmp_path: Path, case: Case, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong is found and named alike if every line is parsed by itself."""
    monkeypatch.setattr(tables, "BLOCK_BYTES", block)
    path = tmp_path / "events.csv"
    path.write_bytes(case.data)
    assert_expected(path, lambda: read(path, case.separator, case.encoding), case.expected)


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    for reader in (lambda: read(tmp_path), lambda: read_csv_catalog(tmp_path, [], "id")):
        assert_expected(tmp_path, reader, "Is a directory; give a file that can be read")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for reader in (lambda: read(tmp_path / "x"), lambda: read_csv_catalog(tmp_path / "x", [], "id")):
        assert_expected(tmp_path / "x", reader, "No such file or directory")


ITEM_HEAD = b"item_id,title,year\n"
Texts = list[tuple[str, ...]]


class ItemCase(NamedTuple):
    name: str
    data: bytes
    expected: Texts | str


ITEMS = [
    ItemCase("as it should be", ITEM_HEAD + b"a,A,1987\nb,B,\n", [("a", "A", "1987"), ("b", "B", "")]),
    ItemCase("byte order mark and CRLF", b"\xef\xbb\xbfitem_id,title\r\na,A\r\n", [("a", "A")]),
    ItemCase("lone CR line ends", b"item_id,title\ra,A\rb,B\r", [("a", "A"), ("b", "B")]),
    ItemCase("a blank first line", b"\r\n\nitem_id,title\r\na,A\r\n", [("a", "A")]),
    ItemCase("a line break in the header", b'item_id,"the\ntitle"\na,A\n', [("a", "A")]),
    ItemCase("semicolons", b"item_id;title\na;A\n", r"row 1 is not separated by ','.*dataset.separator=.;"),
    ItemCase("empty lines anywhere", b"\nitem_id,title\n\na,A\n\n\nb,B\n", [("a", "A"), ("b", "B")]),
    ItemCase(
        "words for nothing are titles",
        ITEM_HEAD + b"NA,None,NULL\nnan,0,-\n",
        [("NA", "None", "NULL"), ("nan", "0", "-")],
    ),
    ItemCase(
        "quotes inside titles",
        ITEM_HEAD + b'a,"the ""x"", y",1\nb,3" disc,\n',
        [("a", 'the "x", y', "1"), ("b", '3" disc', "")],
    ),
    ItemCase("a title of two lines", ITEM_HEAD + b'a,"one\ntwo",1\n', [("a", "one\ntwo", "1")]),
    ItemCase("white space around ids, not titles", ITEM_HEAD + b" a , A ,1\n", [("a", " A ", "1")]),
    ItemCase("titles that are not ASCII", ITEM_HEAD + "é,日本\u2028x,1\n".encode(), [("é", "日本\u2028x", "1")]),
    ItemCase("a title of 200 KB", ITEM_HEAD + b"a," + b"x" * 200_000 + b",1\n", [("a", "x" * 200_000, "1")]),
    ItemCase("empty", b"", "is empty; fetch the file again"),
    ItemCase("header only", ITEM_HEAD, "has no item, only a header; fetch the file again"),
    ItemCase("no id column", b"id,title\na,A\n", r"has no column 'item_id'; expected.*found \['id', 'title'\]"),
    ItemCase("a column twice", b"item_id,title,title\na,A,B\n", "has two columns 'title'.*Rename one"),
    ItemCase("missing field", ITEM_HEAD + b"a,A,1\nb,B\n", f"row 3 has 2 values, expected 3 .*; {MEND}"),
    ItemCase(
        "missing field behind a title of two lines",
        ITEM_HEAD + b'a,"A\nA",1\n"b\n",B\n',
        f"row 4 has 2 values.*; {MEND}",
    ),
    ItemCase(
        "a comma in a title without quotes", ITEM_HEAD + b"a,A, the,1\n", f"row 2 has 4 values, expected 3 .*; {MEND}"
    ),
    ItemCase("no id", ITEM_HEAD + b"a,A,1\n ,B,2\n", rf"row 3 has no item_id \(found ' '\); {MEND}"),
    ItemCase(
        "duplicate rows", ITEM_HEAD + b"a,A,1\nb,B,2\na,C,3\n", f"row 4 repeats item_id 'a'; ids must be unique; {MEND}"
    ),
    ItemCase("duplicate but for white space", ITEM_HEAD + b"a,A,1\na ,A,1\n", f"row 3 repeats item_id 'a'; .*; {MEND}"),
    ItemCase(
        "duplicate behind longer records",
        ITEM_HEAD + b'a,"A\nA",1\n\na,B,2\n',
        f"row 5 repeats item_id 'a'; .*; {MEND}",
    ),
    ItemCase(
        "quote never closed", ITEM_HEAD + b'a,A,1\nb,"B,2\nc,C,3\n', f"row 3 begins a record that is not CSV.*; {MEND}"
    ),
    ItemCase(
        "text behind a closing quote", ITEM_HEAD + b'a,"A" b,1\n', f"row 2 begins a record that is not CSV.*; {MEND}"
    ),
    ItemCase(
        "Windows-1252, not told",
        ITEM_HEAD + "a,A,1\nb,é,2\n".encode("cp1252"),
        "row 3 is not UTF-8 text; save.*encoding=",
    ),
    ItemCase("zero bytes", ITEM_HEAD + b"a,A,1\n" + bytes(9), f"row 3 holds a zero byte: the file is torn.*; {MEND}"),
    ItemCase("gzip cut short", gzip.compress(ITEM_HEAD + b"a,A,1\n" * 99)[:-9], "cut short or broken; fetch it again"),
]


@pytest.mark.parametrize("case", ITEMS, ids=lambda case: case.name)
def test_items(tmp_path: Path, case: ItemCase) -> None:
    path = tmp_path / "items.csv"
    path.write_bytes(case.data)

    def rows() -> Texts:
        catalog = read_csv_catalog(path, read_records_header(path), "item_id")
        return list(zip(catalog.ids, *catalog.fields.values(), strict=True))

    assert_expected(path, rows, case.expected)


def test_the_list_of_files_is_long() -> None:
    assert len({case.name for case in EVENTS}) + len(ITEMS) > 100


# Characters that mean something in a delimited file, and a few that do not
LINES = (
    st.lists(st.text(st.sampled_from('ab1,,,""\r\n\t \0é\ufeff'), max_size=14), max_size=6)
    .map("\n".join)
    .filter(lambda text: text.strip("\ufeff\r\n"))
)


def plain(text: str) -> Rows | None:
    """What a file means, line by line; None where it is refused."""
    lines = text.removeprefix("\ufeff").split("\n")
    if lines[-1] == "":
        lines.pop()
    lines = [line.removesuffix("\r") for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    try:
        rows = [tuple(next(csv.reader([line], strict=True))) for line in lines]
    except (csv.Error, StopIteration):
        return None
    refused = any(len(row) != 3 or not all(row) for row in rows) or any(set(line) & set("\r\0") for line in lines)
    return None if refused else rows


@given(LINES, st.sampled_from([1, 8, 1 << 26]))
@settings(max_examples=300, deadline=None, derandomize=True)
@example('a,b"x,c\na,b"x,c', 1 << 26)
@example("a,b,c\na,b\na,b,c,d", 1 << 26)
@example("\ufeffa,b,c\n\ufeffa,b,c", 8)
@example("a,b,c\r\n\r", 1)
@example('"p,q"\'"",b,c', 1 << 26)
@example('""x"y,",b,c', 1 << 26)
@example('"" "p,q",b,c', 1 << 26)
@example('"a\n",b,"c\n"', 1 << 26)
def test_the_fast_reader_finds_what_each_line_means(text: str, block: int) -> None:
    names = ["x", "y", "z"]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "BLOCK_BYTES", block)
        path = Path(folder) / "file.csv"
        path.write_text(text, newline="")
        chunks = read_csv_chunks(path, dict.fromkeys(names, "") | {name: name for name in names}, header=names)
        expected = plain(text)
        if expected is None:
            with pytest.raises(DataError, match=r"file\.csv: (row \d+ |is empty)"):
                list(chunks)
        else:
            assert pl.concat(chunks).rows() == expected


@pytest.mark.parametrize("case", EVENTS, ids=lambda case: case.name)
def test_interactions_of_a_custom_data_set(tmp_path: Path, case: Case) -> None:
    """The same files by another way in, which words some messages of its own."""
    path = tmp_path / "events.csv"
    path.write_bytes(case.data)
    columns = {"user_column": "user_id", "item_column": "item_id", "timestamp_column": "timestamp"}
    form = {"separator": case.separator, "encoding": case.encoding}
    config = CustomConfig(name="own", _target_="own", root=str(tmp_path), interactions=path.name, **columns, **form)
    data = CustomData(config, tmp_path / "cache")
    expected = [("u1", "a", 5)] if case.name == "time with a point" else case.expected
    if isinstance(expected, str):
        row = expected[: re.match(r"(row [2-9] )?", expected).end()]
        with pytest.raises(DataError, match=rf"events\.csv: {row}|^dataset\."):
            data.setup()
    else:
        data.setup()
        users = np.repeat(data.interactions.users.to_list(), np.diff(data.interactions.offsets))
        items = data.catalog.ids[data.interactions.items - 1]
        assert sorted(zip(users, items, data.interactions.timestamps, strict=True)) == sorted(expected)


def parquet_events(**columns: list[object] | pl.Series) -> pl.DataFrame:
    return pl.DataFrame({"user": ["u", "v"], "item": ["a", "b"], "timestamp": [5, 6], **columns}, strict=False)


TYPES = [
    ("whole floats", {"user": [1.0, 2.0], "item": [7, 8], "timestamp": [5.0, 6.0]}, [("1", "7", 5), ("2", "8", 6)]),
    (
        "dates",
        {"timestamp": pl.Series(["1970-01-02", "1970-01-03"]).str.to_date()},
        [("u", "a", 86400), ("v", "b", 172800)],
    ),
    (
        "moments, cut to seconds",
        {"timestamp": pl.Series([5_900_000, 6_000_000]).cast(pl.Datetime("us"))},
        [("u", "a", 5), ("v", "b", 6)],
    ),
    ("categories", {"user": pl.Series(["u", "v"], dtype=pl.Categorical)}, [("u", "a", 5), ("v", "b", 6)]),
    (
        "hashes of 64 bits as ids",
        {"user": pl.Series([2**63 + 5, 1], dtype=pl.UInt64)},
        [(str(2**63 + 5), "a", 5), ("1", "b", 6)],
    ),
    ("floats at the end of what they tell apart", {"user": [2.0**53, 1.0]}, "row 1 has no user id"),
    ("missing user", {"user": [1.0, None]}, "row 2 has no user id .found None"),
    ("NaN as user", {"user": [1.0, float("nan")]}, "row 2 has no user id .found nan"),
    ("infinite user", {"user": [float("inf"), 1.0]}, "row 1 has no user id .found inf"),
    ("half a user", {"user": [1.0, 1.5]}, "row 2 has no user id .found 1.5"),
    (
        "floats that cannot tell ids apart",
        {"item": [1.0, 2.0**53 + 2]},
        "row 2 has no item id .found 9007199254740994.0",
    ),
    (
        "narrow floats as times",
        {"timestamp": pl.Series([5, 1.4e9], dtype=pl.Float32)},
        "row 2 has timestamp=14.*not a whole",
    ),
    ("lists as users", {"user": [["u"], ["v"]]}, "row 1 has no user id .found"),
    ("bytes as items", {"item": [b"\xff", b"b"]}, "row 1 has no item id .found b'"),
    ("truth as a time", {"timestamp": [True, False]}, "row 1 has timestamp=True, which is not a whole number"),
    ("half a second", {"timestamp": [5.0, 6.5]}, "row 2 has timestamp=6.5, which is not a whole number"),
    ("NaN as a time", {"timestamp": [5.0, float("nan")]}, "row 2 has timestamp=nan, which is not a whole number"),
    (
        "a time above 64 bits",
        {"timestamp": pl.Series([5, 2**63], dtype=pl.UInt64)},
        "row 2 has timestamp=92233720368547758",
    ),
    ("a rating that is none", {"rating": ["5", "4,5"]}, "row 2 has rating='4,5', which is not a number"),
    ("an infinite rating", {"rating": [5.0, float("inf")]}, "row 2 has rating=inf, which is not a number"),
]


@pytest.mark.parametrize(("columns", "expected"), [case[1:] for case in TYPES], ids=[case[0] for case in TYPES])
def test_columns_of_any_type(tmp_path: Path, columns: dict[str, list[object]], expected: Rows | str) -> None:
    path = tmp_path / "events.parquet"

    def rows() -> Rows:
        raw = RawEvents(tmp_path, path, first_row=1)
        raw.fill([parquet_events(**columns)], None)
        ids = raw.user_ids.ids(), raw.item_ids.ids()
        return [
            (ids[0][int(u)], ids[1][int(i)], int(t)) for chunk in raw.chunks() for u, i, t in zip(*chunk, strict=True)
        ]

    assert_expected(path, rows, expected)


def test_items_of_other_types_are_text_and_floats_lose_their_point() -> None:
    table = pl.DataFrame({"id": [1.0, 2.0], "year": [1987.0, float("nan")], "score": [1.5, 2.0], "new": [True, None]})
    catalog = to_catalog(table, "id", Path("items.parquet"), first_row=1)
    assert catalog.ids.to_list() == ["1", "2"]
    assert {name: values.to_list() for name, values in catalog.fields.items()} == {
        "year": ["1987", ""],
        "score": ["1.5", "2.0"],
        "new": ["true", ""],
    }


@pytest.mark.parametrize("values", [[["a"]], [{"x": 1}], [b"a"]], ids=["list", "record", "bytes"])
def test_items_of_types_that_are_no_text_are_refused(values: list[object]) -> None:
    with pytest.raises(DataError, match=r"items\.parquet: column 'tags' holds .*, not text; leave it out"):
        to_catalog(pl.DataFrame({"id": ["a"], "tags": values}), "id", Path("items.parquet"), first_row=1)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"user_id,item_id\n"], ids=["empty", "torn", "CSV"])
def test_what_is_no_parquet_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "events.parquet"
    path.write_bytes(data)
    assert_expected(path, lambda: read_parquet(path, ["user"]), "cannot be read as Parquet .*fetch the file again")
