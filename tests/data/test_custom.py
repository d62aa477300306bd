"""A person's own files: every form they come in, columns that are found or named, and a model trained on them."""

import datetime
import gzip
import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from conftest import WORDS, Run
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hllm.build import build_datamodule
from hllm.config import Config, CustomConfig, TimestampUnit, compose, from_plain, to_plain
from hllm.data.base import SequenceDataModule
from hllm.data.custom import USUAL_NAMES, CustomData, _iso_seconds, find_column, iso_seconds, to_seconds
from hllm.errors import ConfigError, DataError
from hllm.items.text import item_texts
from hllm.recommend import main as recommend

EVENTS = [("u2", "b", 30), ("u1", "a", 10), ("u1", "c", 20), ("u2", "a", 40), ("u1", "b", 5)]
ITEMS = [("a", "Alpha", "1987", "x|y"), ("b", "Beta, the second", "", ""), ("c", "", "2001", "z")]
EVENT_COLUMNS, ITEM_COLUMNS = ("user_id", "item_id", "timestamp"), ("item_id", "title", "year", "tags")
Read = Callable[..., SequenceDataModule]


def csv_bytes(columns: tuple[str, ...], rows: list[tuple], separator: str = ",", encoding: str = "utf-8") -> bytes:
    quoted = [
        separator.join(f'"{value}"' if separator in str(value) else str(value) for value in row)
        for row in [columns, *rows]
    ]
    return "".join(line + "\n" for line in quoted).encode(encoding)


def table(columns: tuple[str, ...], rows: list[tuple]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=list(columns), orient="row")


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads ``tmp_path``; plain files are written where there are none of the names."""

    def module(interactions: str = "events.csv", items: str | None = "items.csv", **changes: object) -> CustomData:
        if not (tmp_path / "events.csv").exists():
            (tmp_path / "events.csv").write_bytes(csv_bytes(EVENT_COLUMNS, EVENTS))
        if not (tmp_path / "items.csv").exists():
            (tmp_path / "items.csv").write_bytes(csv_bytes(ITEM_COLUMNS, ITEMS))
        overrides = ["dataset=custom", f"dataset.interactions={interactions}", f"dataset.root={tmp_path}"]
        config = replace(compose(overrides).dataset, items=items, **changes)
        assert isinstance(config, CustomConfig)
        data = CustomData(config, tmp_path / "cache")
        data.prepare_data()
        data.setup()
        return data

    return module


def histories(data: SequenceDataModule) -> dict[str, list[str]]:
    """Original item ids by original user id, oldest first."""
    found = data.interactions
    return {
        user: data.catalog.ids.gather(found.items[start:end] - 1).to_list()
        for user, start, end in zip(found.users, found.offsets, found.offsets[1:], strict=False)
    }


def columns(data: SequenceDataModule) -> dict[str, list[str]]:
    return {name: values.to_list() for name, values in data.catalog.fields.items()}


EXPECTED = {"u1": ["b", "a", "c"], "u2": ["b", "a"]}
TEXTS = {
    "title": ["Alpha", "Beta, the second", ""],
    "year": ["1987", "", "2001"],
    "tags": ["x|y", "", "z"],
}


def test_csv_files_are_read_by_path_alone(read: Read) -> None:
    data = read()
    assert histories(data) == EXPECTED
    assert data.catalog.ids.to_list() == ["a", "b", "c"]
    assert columns(data) == TEXTS


@pytest.mark.parametrize(
    ("events", "items", "separator"),
    [("e.tsv", "i.tsv", "\t"), ("e.txt", "i.txt", ","), ("e.csv.gz", "i.csv.gz", ","), ("E.TSV.gz", "I.CSV", None)],
)
def test_delimited_files_are_read_by_their_names(
    read: Read, tmp_path: Path, events: str, items: str, separator: str | None
) -> None:
    for name, header, rows in ((events, EVENT_COLUMNS, EVENTS), (items, ITEM_COLUMNS, ITEMS)):
        content = csv_bytes(header, rows, separator or ("\t" if "TSV" in name else ","))
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    data = read(events, items)
    assert histories(data) == EXPECTED
    assert columns(data) == TEXTS


@pytest.mark.parametrize(("given", "separator"), [(";", ";"), (r"\t", "\t"), ("|", "|")])
def test_another_separator_is_named(read: Read, tmp_path: Path, given: str, separator: str) -> None:
    (tmp_path / "events.csv").write_bytes(csv_bytes(EVENT_COLUMNS, EVENTS, separator))
    (tmp_path / "items.csv").write_bytes(csv_bytes(("item_id", "title"), [("a", "A"), ("b", ""), ("c", "")], separator))
    assert histories(read(separator=given)) == EXPECTED


def test_an_unnamed_separator_is_suggested(read: Read, tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_bytes(csv_bytes(EVENT_COLUMNS, EVENTS, ";"))
    with pytest.raises(DataError, match=r"""events\.csv: .*give 'dataset\.separator=";"'"""):
        read()


def test_windows_1252_is_read_and_its_want_is_named(read: Read, tmp_path: Path) -> None:
    items = [("a", "Café — “noir”", "", ""), *ITEMS[1:]]
    (tmp_path / "items.csv").write_bytes(csv_bytes(ITEM_COLUMNS, items, encoding="windows-1252"))
    assert columns(read(encoding="windows-1252"))["title"][0] == "Café — “noir”"
    with pytest.raises(DataError, match=r"items\.csv: row 2 is not UTF-8 text; .*dataset\.encoding="):
        read()


def test_headers_of_another_encoding_are_read(read: Read, tmp_path: Path) -> None:
    header = ("item_id", "Größe", "year", "tags")
    (tmp_path / "items.csv").write_bytes(csv_bytes(header, ITEMS, encoding="windows-1252"))
    assert list(columns(read(encoding="windows-1252"))) == ["Größe", "year", "tags"]


def test_a_header_of_items_may_stand_below_blank_lines_and_run_over_two(read: Read, tmp_path: Path) -> None:
    content = csv_bytes(ITEM_COLUMNS, ITEMS).replace(b",title,", b',"the\ntitle",', 1)
    (tmp_path / "items.csv").write_bytes(b"\n" + content)
    assert list(columns(read())) == ["the\ntitle", "year", "tags"]


def test_a_path_spelled_otherwise_is_not_prepared_again(
    read: Read, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read()
    (tmp_path / "copy.csv").write_bytes((tmp_path / "events.csv").read_bytes())
    caplog.set_level(logging.INFO)
    read("./copy.csv", f"{tmp_path}/items.csv")
    assert "; reused in" in caplog.text
    (tmp_path / "copy.tsv").write_bytes((tmp_path / "events.csv").read_bytes())
    with pytest.raises(DataError, match="not separated"):  # the ending says how it is read
        read("copy.tsv")


def test_a_byte_order_mark_and_windows_line_ends_are_read(read: Read, tmp_path: Path) -> None:
    for name, header, rows in (("events.csv", EVENT_COLUMNS, EVENTS), ("items.csv", ITEM_COLUMNS, ITEMS)):
        content = csv_bytes(header, rows).replace(b"\n", b"\r\n")
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    data = read()
    assert (histories(data), columns(data)) == (EXPECTED, TEXTS)


@pytest.mark.parametrize("kind", [pl.Int64, pl.Int32, pl.UInt16, pl.Float64, pl.String, pl.Categorical])
def test_parquet_columns_of_any_type_are_ids(read: Read, tmp_path: Path, kind: type[pl.DataType]) -> None:
    events = table(EVENT_COLUMNS, [(int(user[1]), "abc".index(item), time) for user, item, time in EVENTS])
    as_kind = pl.col("user_id", "item_id").cast(pl.String if kind is pl.Categorical else kind)
    events.with_columns(as_kind).cast({"user_id": kind, "item_id": kind}).write_parquet(tmp_path / "e.parquet")
    (tmp_path / "items.csv").write_bytes(csv_bytes(("item_id", "title"), [(0, "A"), (1, "B"), (2, "C")]))
    assert histories(read("e.parquet")) == {"1": ["1", "0", "2"], "2": ["1", "0"]}


def test_parquet_is_read_in_order_in_small_chunks(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 5_000
    rows = pl.DataFrame(
        {"user": [n % 7 for n in range(count)], "item": [f"i{n}" for n in range(count)], "time": [1] * count}
    )
    rows.write_parquet(tmp_path / "e.parquet", row_group_size=300)
    monkeypatch.setattr("hllm.data.custom.read_parquet_chunks.__defaults__", (64,))
    found = histories(read("e.parquet", items=None))
    assert found == {str(user): [f"i{n}" for n in range(user, count, 7)] for user in range(7)}


def test_items_from_parquet_become_text(read: Read, tmp_path: Path) -> None:
    pl.DataFrame(
        {
            "item_id": ["a", "b", "c"],
            "title": ["Alpha", None, "Gamma"],
            "tags": [["x", "y"], [], None],
            "year": [1987.0, None, 2001.0],
            "price": [1.5, 2.0, float("nan")],
            "deep": [[["x"], ["y", "z"]], [], None],
            "maker": [{"name": "Acme", "town": None}, None, {"name": "", "town": "Ulm"}],
            "released": [datetime.date(1987, 1, 2), None, None],
            "raw": [b"bytes", None, "é".encode()],
        }
    ).write_parquet(tmp_path / "i.parquet")
    assert columns(read(items="i.parquet")) == {
        "title": ["Alpha", "", "Gamma"],
        "tags": ["x, y", "", ""],
        "year": ["1987", "", "2001"],
        "price": ["1.5", "2.0", ""],
        "deep": ["x, y, z", "", ""],
        "maker": ["name: Acme", "", "town: Ulm"],
        "released": ["1987-01-02", "", ""],
        "raw": ["bytes", "", "é"],
    }


JSON_ITEMS = [
    {"asin": "a", "title": "Alpha", "tags": ["x", "y"], "year": 1987, "price": 1.50},
    {"asin": "b", "title": None, "description": ["one", ["two"]]},
    {"title": "Gamma", "asin": "c", "new": True, "details": {"brand": "Acme", "size": ""}},
]


@pytest.mark.parametrize("name", ["i.jsonl", "i.json", "i.json.gz", "i.ndjson"])
def test_items_from_json_lines_become_text(read: Read, tmp_path: Path, name: str) -> None:
    content = "".join(json.dumps(item).replace("1.5", "1.50") + "\n" for item in JSON_ITEMS).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert columns(read(items=name)) == {
        "title": ["Alpha", "", "Gamma"],
        "tags": ["x, y", "", ""],
        "year": ["1987", "", ""],
        "price": ["1.50", "", ""],
        "description": ["", "one, two", ""],
        "new": ["", "", "true"],
        "details": ["", "", "brand: Acme"],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"asin": "a"}\n{"asin": \n', r"i\.jsonl: row 2 is not JSON"),
        (b"{'asin': 'a'}\n", r"row 1 is not JSON"),
        (b'[{"asin": "a"}]\n', r"row 1 is not a JSON object, of which each line must hold one"),
        (b'{"asin": "a"}\n\n{"asin": "b"}\n', r"row 2 is empty"),
        (b'{"asin": "a"}\n{"asin": "\xff"}\n', r"row 2 is not UTF-8 text"),
        (b"", r"is empty"),
        (b'{"title": "a"}\n', r"no column has a usual name of a item; set dataset\.items_id_column="),
        (b'{"asin": "a"}\n{"title": "x"}\n', r"row 2 has no asin"),
        (b'{"asin": "a"}\n{"asin": "a"}\n', r"row 2 repeats asin 'a'"),
    ],
)
def test_malformed_json_lines_are_refused_by_row(read: Read, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "i.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(items="i.jsonl")


def test_without_an_items_file_items_are_their_ids(read: Read) -> None:
    data = read(items=None)
    assert data.catalog.ids.to_list() == ["b", "a", "c"]  # by first appearance
    assert (columns(data), data.catalog.titles) == ({}, ["b", "a", "c"])
    assert histories(data) == EXPECTED


def test_items_without_text_cannot_be_embedded(read: Read) -> None:
    data = read(items=None)
    for template in (None, "title: {title}"):
        with pytest.raises(ConfigError, match=r"the items have no text .*dataset\.items=.*items=id"):
            item_texts(data.catalog, replace(data.config.text, template=template))


@pytest.mark.parametrize(
    "names",
    [
        ("userId", "movieId", "timestamp"),
        ("USER ID", "Item-Id", "Time"),
        ("uid", "asin", "unixReviewTime"),
        ("reviewerID", "parent_asin", "ts"),
        ("customer_id", "article_id", "date"),
    ],
)
def test_usual_column_names_are_found(read: Read, tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / "events.csv").write_bytes(csv_bytes((*names[::-1], "x"), [(*row[::-1], "") for row in EVENTS]))
    (tmp_path / "items.csv").write_bytes(csv_bytes(("title", names[1]), [(item[1], item[0]) for item in ITEMS]))
    assert histories(read()) == EXPECTED


@pytest.mark.parametrize("name", ["id", "ID", "item", "productId"])
def test_the_items_file_may_name_its_ids_otherwise(read: Read, tmp_path: Path, name: str) -> None:
    (tmp_path / "items.csv").write_bytes(csv_bytes((name, *ITEM_COLUMNS[1:]), ITEMS))
    assert columns(read()) == TEXTS


def test_columns_of_any_name_are_configured(read: Read, tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_bytes(csv_bytes(("wer", "was", "wann"), EVENTS))
    (tmp_path / "items.csv").write_bytes(csv_bytes(("nr", *ITEM_COLUMNS[1:]), ITEMS))
    data = read(user_column="wer", item_column="was", timestamp_column="wann", items_id_column="nr")
    assert (histories(data), columns(data)) == (EXPECTED, TEXTS)


def test_an_ambiguous_or_unusual_column_shows_the_header_and_the_flag(tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    header = ["track_id", "artist_id", "wer"]
    with pytest.raises(DataError, match=r"track_id, artist_id could each be the item; set dataset\.item_column= to one "
                       r"of its header, \['track_id'"):  # fmt: skip
        find_column(path, header, "item", "dataset.item_column", None)
    with pytest.raises(DataError, match=r"no column has a usual name of a user; set dataset\.user_column="):
        find_column(path, header, "user", "dataset.user_column", None)
    with pytest.raises(DataError, match=r"dataset\.user_column=who: .* has no such column; its header is"):
        find_column(path, header, "user", "dataset.user_column", "who")
    assert find_column(path, header, "user", "dataset.user_column", "wer") == "wer"


def test_text_fields_choose_and_order_the_fields(read: Read) -> None:
    data = read(text_fields=["tags", "title"])
    assert list(data.catalog.fields) == ["tags", "title"]
    assert item_texts(data.catalog, replace(data.config.text, prompt=">"))[0] == ">tags: x|ytitle: Alpha"


def test_an_unset_template_names_every_field_in_the_order_of_the_file(read: Read) -> None:
    data = read()
    assert item_texts(data.catalog, replace(data.config.text, prompt="")) == [
        "title: Alphayear: 1987tags: x|y",
        "title: Beta, the second",
        "year: 2001tags: z",
    ]


@pytest.mark.parametrize("name", ["colour", "item_id"])
def test_a_text_field_that_is_not_there_is_refused(read: Read, name: str) -> None:
    with pytest.raises(DataError, match=rf"dataset\.text_fields: .*items\.csv has no text column '{name}'; it has \["):
        read(text_fields=["title", name])


def test_a_column_without_a_name_is_no_field(read: Read, tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_bytes(csv_bytes(("", *ITEM_COLUMNS), [(n, *row) for n, row in enumerate(ITEMS)]))
    assert columns(read()) == TEXTS


def test_ratings_are_only_read_for_the_filter(read: Read, tmp_path: Path) -> None:
    rows = [(*row, rating) for row, rating in zip(EVENTS, (5, 2, 4, "3.5", 4), strict=True)]
    (tmp_path / "events.csv").write_bytes(csv_bytes((*EVENT_COLUMNS, "stars"), rows))
    assert histories(read()) == EXPECTED
    rules = replace(read().config.filter, min_rating=3.5)
    assert histories(read(filter=rules)) == {"u1": ["b", "c"], "u2": ["b", "a"]}
    (tmp_path / "events.csv").write_bytes(csv_bytes(EVENT_COLUMNS, EVENTS))
    with pytest.raises(DataError, match=r"no column has a usual name of a rating; set dataset\.rating_column="):
        read(filter=rules)


def test_unknown_items_are_an_error_with_its_remedy(read: Read, tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_bytes(csv_bytes(ITEM_COLUMNS, ITEMS[:2]))
    with pytest.raises(DataError, match=r"events\.csv: row 4 names item 'c'.*dataset\.filter\.unknown_items=drop"):
        read()


def seconds(values: list[object], unit: str = "s", kind: type[pl.DataType] | None = None) -> list[int]:
    return to_seconds(pl.Series(values, dtype=kind), TimestampUnit(unit), Path("e.csv"), first_row=2).to_list()


@pytest.mark.parametrize(
    ("value", "unit"),
    [
        ("1396867869", "s"), (" 1396867869 ", "s"), ("1396867869.0", "s"), ("1396867869.9", "s"), (1396867869, "s"),
        (1396867869.5, "s"), ("1396867869999", "ms"), (1396867869123456, "us"), ("1396867869999999999", "ns"),
        ("2014-04-07T10:51:09.277Z", "iso"), ("2014-04-07 10:51:09", "iso"),
        ("2014-04-07 10:51:09 UTC", "iso"), ("2014-04-07T12:51:09+02:00", "iso"), ("20140407T105109Z", "iso"),
        (datetime.datetime(2014, 4, 7, 10, 51, 9, 500_000), "s"),
        (datetime.datetime(2014, 4, 7, 12, 51, 9, tzinfo=datetime.timezone(datetime.timedelta(hours=2))), "ms"),
    ],
)  # fmt: skip
def test_times_of_every_form_are_whole_seconds(value: object, unit: str) -> None:
    assert seconds([value], unit) == [1396867869]


def test_dates_are_their_first_second() -> None:
    expected = [1396828800]
    assert seconds(["2014-04-07"], "iso") == expected
    assert seconds([datetime.date(2014, 4, 7)]) == expected
    assert seconds([1396828800], kind=pl.UInt32) == expected


@pytest.mark.parametrize("time_unit", ["ms", "us", "ns"])
def test_datetimes_of_parquet_need_no_unit(read: Read, tmp_path: Path, time_unit: str) -> None:
    rows = table(EVENT_COLUMNS, EVENTS).with_columns((pl.col("timestamp") * 1000).cast(pl.Datetime("ms")))
    rows.cast({"timestamp": pl.Datetime(time_unit)}).write_parquet(tmp_path / "e.parquet")
    data = read("e.parquet")
    assert histories(data) == EXPECTED
    assert data.interactions.timestamps.tolist() == [5, 10, 20, 30, 40]


@pytest.mark.parametrize(
    ("value", "unit"),
    [
        ("1396867869123", "s"), (1396867869123, "s"), ("-1", "s"), ("x", "s"), ("nan", "s"), ("inf", "s"), ("", "ms"),
        (float("nan"), "s"), (None, "s"), ("2014-04-07", "s"), ("1396867869", "iso"), ("07.04.2014", "iso"),
        ("2014-13-07", "iso"), ("1.396867869e9", "s"), ("1960-01-01", "iso"), (datetime.datetime(1960, 1, 1), "s"),
        (None, "iso"),
    ],
)  # fmt: skip
def test_what_is_no_time_is_refused_with_its_row_and_the_remedy(value: object, unit: str) -> None:
    first = {"iso": "2014-04-07"}.get(unit, "1")
    values = [first, value] if isinstance(value, str) else [value, value]
    row = 3 if isinstance(value, str) else 2
    with pytest.raises(DataError, match=rf"e\.csv: row {row} has timestamp=.* under dataset\.timestamp_unit={unit}"):
        seconds(values, unit, None if value is not None else pl.Int64)


@pytest.mark.parametrize(
    ("value", "kind", "unit"),
    [(1396867869, pl.Float32, "s"), (2**24, pl.Float32, "s"), (2**53, pl.Float64, "us"), (1.4e18, pl.Float64, "ns")],
)
def test_floats_that_may_have_been_rounded_are_refused(value: float, kind: type[pl.DataType], unit: str) -> None:
    with pytest.raises(DataError, match=rf"row 3 has timestamp=.*, which {kind.__name__} cannot tell .*whole numbers"):
        seconds([float("nan") if value is None else 5, value], unit, kind)


def test_floats_and_long_texts_that_are_exact_are_read() -> None:
    assert seconds([2**24 - 1], kind=pl.Float32) == [2**24 - 1]
    assert seconds([1396867869.9], kind=pl.Float64) == [1396867869]
    assert seconds(["1396867869999999999.7"], "ns") == [1396867869]


WRITTEN = st.one_of(
    st.datetimes(timezones=st.none() | st.timezones()).map(lambda time: time.isoformat(" ")),
    st.datetimes(timezones=st.just(datetime.UTC)).map(lambda time: time.isoformat().replace("+00:00", "Z")),
    st.dates().map(str),
    st.builds(
        "{}{:04d}-{:02d}-{:02d}{}{:02d}:{:02d}:{:02d}{}{}{}".format,
        st.sampled_from(["", " "]),
        *(st.integers(0, 9999), st.integers(0, 13), st.integers(0, 32), st.sampled_from("T tx")),
        *(st.integers(0, 25), st.integers(0, 61), st.integers(0, 61)),
        st.sampled_from(["", ".", ".5", ".123456789123", ",5"]),
        st.sampled_from(["", "Z", "z", "+01:00", "-23:59", "+24:00", "+0100", "+05:30:15", "-05"]),
        st.sampled_from(["", " UTC", "\n", "UTC"]),
    ),
    st.text(st.sampled_from("0123456789-:T Z+.W"), max_size=20),
)


@given(st.lists(st.none() | WRITTEN, max_size=20))
@settings(deadline=None, derandomize=True, max_examples=300)
@example(
    ["2014-04-07 10:51:60", "2014-02-29", "20140407", "2014-W15-1", "2014-04-07T10:51", "9999-12-31 23:59:59-01:00"]
)
def test_written_times_mean_what_python_takes_them_for(values: list[str | None]) -> None:
    expected = [None if value is None else _iso_seconds(value) for value in values]
    assert iso_seconds(pl.Series(values, dtype=pl.String)).to_list() == expected


def test_times_of_no_fitting_type_are_refused() -> None:
    with pytest.raises(DataError, match=r"timestamps are of type Duration"):
        seconds([datetime.timedelta(1)])


def test_milliseconds_are_read_from_a_file(read: Read, tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_bytes(csv_bytes(EVENT_COLUMNS, [(u, i, t * 1000) for u, i, t in EVENTS]))
    assert read(timestamp_unit=TimestampUnit.ms).interactions.timestamps.tolist() == [5, 10, 20, 30, 40]


@pytest.mark.parametrize(
    ("flag", "name", "message"),
    [
        ("interactions", "nowhere.csv", r"dataset\.interactions=nowhere\.csv: no such file; relative paths are taken"),
        ("items", "nowhere.csv", r"dataset\.items=nowhere\.csv: no such file"),
        ("items", ".", r"dataset\.items=\.: is a folder; give one file"),
        ("interactions", "e.dat", r"dataset\.interactions=e\.dat: the end of the name says how .* \.csv \.tsv"),
        ("interactions", "e.jsonl", r"dataset\.interactions=e\.jsonl: the end of the name says"),
        ("interactions", "e.parquet", r"e\.parquet: cannot be read as Parquet"),
        ("items", "e.parquet", r"e\.parquet: cannot be read as Parquet"),
        ("interactions", "empty.csv", r"empty\.csv: is empty"),
        ("items", "empty.csv", r"empty\.csv: is empty"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(read: Read, tmp_path: Path, flag: str, name: str, message: str) -> None:
    for present in ("e.dat", "e.jsonl", "e.parquet"):
        (tmp_path / present).write_text("user,item,time\n")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(DataError, match=message):
        read(**{flag: name})


def test_a_torn_parquet_file_is_refused(read: Read, tmp_path: Path) -> None:
    table(EVENT_COLUMNS, EVENTS * 100).write_parquet(tmp_path / "e.parquet")
    content = bytearray((tmp_path / "e.parquet").read_bytes())
    content[20:60] = bytes(40)
    (tmp_path / "e.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"e\.parquet: "):
        read("e.parquet")


def test_relative_paths_are_taken_from_the_working_directory(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read()
    monkeypatch.chdir(tmp_path)
    config = compose(["dataset=custom", "dataset.interactions=events.csv", "dataset.items=items.csv"]).dataset
    data = CustomData(config, tmp_path / "cache")
    data.setup()
    assert histories(data) == EXPECTED


def test_interactions_are_asked_for_and_the_name_makes_a_folder() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.interactions: has no value; give dataset\.interactions="):
        compose(["dataset=custom"])
    with pytest.raises(ConfigError, match=r"dataset\.name=\.\./x: names a folder"):
        compose(["dataset=custom", "dataset.interactions=e.csv", "dataset.name=../x"])


@pytest.mark.parametrize("name", ["mydata", "amazon", "pixelrec", "base", "movielens_100k"])
def test_a_name_of_ones_own_survives_a_checkpoint(name: str) -> None:
    config = compose(["dataset=custom", "dataset.interactions=e.csv", f"dataset.name={name}"])
    assert isinstance(config.dataset, CustomConfig)
    assert from_plain(to_plain(config)) == config


PAGE = Path(__file__).parents[2] / "docs" / "your-own-data.md"


def test_the_page_names_every_usual_column() -> None:
    named = re.sub(r"[^a-z0-9,|]", "", PAGE.read_text().lower().replace("(_id)", ",ID,").replace(";", ","))
    for role, names in USUAL_NAMES.items():
        for name in names:
            stem = name.removesuffix("id") if len(name) > 4 else name
            assert re.search(rf"[,|]{name}[,|]|[,|]{stem}[,|]", named), f"{role}: {name}"


def test_the_files_of_the_page_are_read_as_it_shows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    page = PAGE.read_text()
    for name, content in re.findall(r"cat > (\S+) <<'EOF'\n(.*?)EOF\n", page, re.S):
        (tmp_path / name).write_text(content)
    flags = re.findall(r"dataset\S*=\S+", page.partition("python -m hllm.train")[2].partition("```")[0])
    with caplog.at_level(logging.INFO):
        build_datamodule(compose([*flags, f"dataset.root={tmp_path}", f"cache_dir={tmp_path}"]))
    shown = [line.partition("; prepared")[0] for line in page.splitlines() if line.startswith("custom: 19")]
    assert len(flags) == 4
    assert shown[0] in caplog.text


SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "ml-latest-small"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the files of ml-latest-small are not in ../shared/data")
def test_two_overrides_read_what_the_data_set_of_its_own_reads(tmp_path: Path) -> None:
    own = compose(["dataset=movielens_latest_small", f"dataset.root={SHARED}", f"cache_dir={tmp_path}"])
    custom = compose(
        [
            "dataset=custom",
            f"dataset.interactions={SHARED / 'ratings.csv'}",
            f"dataset.items={SHARED / 'movies.csv'}",
            f"cache_dir={tmp_path}",
        ]
    )
    expected, found = build_datamodule(own), build_datamodule(custom)
    assert found.fingerprint == expected.fingerprint
    assert found.catalog.ids.equals(expected.catalog.ids)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 customers who each buy 6 to 12 of 20 products, one after another, wherever they begin."""
    folder = tmp_path_factory.mktemp("shop")
    events = [
        (f"c{user}", f"p{(user * 3 + event) % 20}", f"2024-01-{event + 1:02d}")
        for user in range(30)
        for event in range(6 + user % 7)
    ]
    products = [{"product": f"p{n}", "name": f"{WORDS[n]} {WORDS[-n]}", "tags": [WORDS[n % 5]]} for n in range(20)]
    (folder / "orders.csv").write_bytes(csv_bytes(("customer", "product", "date"), events))
    (folder / "products.jsonl").write_text("".join(json.dumps(product) + "\n" for product in products))
    return folder


@pytest.fixture(scope="module")
def trained(shop: Path, run_training: Callable[..., Run]) -> Run:
    return run_training(
        "dataset=custom",
        "dataset.name=shop",
        f"dataset.root={shop}",
        "dataset.interactions=orders.csv",
        "dataset.items=products.jsonl",
        "dataset.timestamp_unit=iso",
        "dataset.filter.min_user_events=5",
    )


def test_a_model_is_trained_on_files_of_ones_own(trained: Run) -> None:
    assert trained.evaluation.identity["dataset"] == "shop"
    assert trained.evaluation.results["test"]["all"]["users"] == 30
    stored: Config = from_plain(to_plain(trained.config))
    assert isinstance(stored.dataset, CustomConfig)


def test_the_run_holds_the_template_it_was_trained_with(trained: Run) -> None:
    assert "template: 'name: {name}tags: {tags}'" in (trained.folder / "config.yaml").read_text()


def test_products_are_recommended_by_name(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    recommend([f"ckpt={trained.best}", "user=c3", "k=3"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(any(word in line for word in WORDS) for line in lines[2:])


def test_new_products_are_ranked_by_the_template_of_training(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.csv").write_text("id,colour,name,tags\nn1,red,word1 word2,word3\n")
    capsys.readouterr()
    recommend([f"ckpt={trained.best}", "history=p1|p2", "k=30", f"new_items={tmp_path / 'new.csv'}"])
    assert "word1 word2" in capsys.readouterr().out
