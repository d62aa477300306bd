"""Amazon categories and Books in their published forms, and what malformed files get."""

import gzip
import json
import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hllm.build import build_datamodule
from hllm.config import compose, from_plain, to_plain
from hllm.data.amazon import COUNTS
from hllm.data.base import SequenceDataModule
from hllm.errors import ConfigError, DataError

BEAUTY = Path(__file__).parents[2].parent / "shared" / "data" / "amazon-beauty"
DAY = 86_400

REVIEWS = [("u2", "B1", 5), ("u1", "B3", 1), ("u1", "B2", 2), ("u2", "B2", 7), ("u1", "B1", 2), ("u1", "B4", 3)]
"User, item, day; u1 has a tie on day 2, B4 has no row in the item file."
META = [
    {"asin": "B0", "title": "Nobody reviewed it"},
    {"asin": "B1", "title": "Nail \u00e9lan", "categories": [["Beauty", "Nails"]], "brand": "OPI", "price": 9.5},
    {"related": {"also_bought": ["B9", "B1"]}, "asin": "B2", "description": ["Soft.", "Warm."], "salesRank": {"x": 1}},
    {"asin": "B3", "title": "It's \"new\"", "description": None, "categories": [["A, B", "C"], ["D"], ["D", "E"]]},
]  # fmt: skip
HEAD = ["dataset=amazon", "dataset.category=Tiny"]

Build = Callable[..., SequenceDataModule]


def write_reviews(folder: Path, reviews: list[tuple[str, str, int]] = REVIEWS, **more: Any) -> Path:
    lines = [
        json.dumps({"reviewerID": user, "asin": item, "unixReviewTime": day * DAY, **more}) + "\n"
        for user, item, day in reviews
    ]
    path = folder / "reviews_Tiny_5.json.gz"
    path.write_bytes(gzip.compress("".join(lines).encode()))
    return path


def write_meta(folder: Path, lines: list[object] = META) -> Path:
    path = folder / "meta_Tiny.json.gz"
    text = "".join(f"{line}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()))
    return path


def histories(data: SequenceDataModule) -> dict[str, list[str]]:
    """Original user id -> original item ids in order."""
    ids, offsets = data.catalog.ids.to_list(), data.interactions.offsets
    return {
        user: [ids[item - 1] for item in data.interactions.items[offsets[number] : offsets[number + 1]]]
        for number, user in enumerate(data.interactions.users)
    }


def test_the_published_form_becomes_catalogue_and_histories(build: Build, tmp_path: Path) -> None:
    write_reviews(tmp_path)
    write_meta(tmp_path)
    data = build(*HEAD)
    assert data.config.name == "amazon_tiny"
    assert histories(data) == {"u1": ["B3", "B2", "B1", "B4"], "u2": ["B1", "B2"]}
    assert data.catalog.ids.to_list() == ["B1", "B2", "B3", "B4"]
    assert {name: values.to_list() for name, values in data.catalog.fields.items()} == {
        "title": ["Nail \u00e9lan", "", 'It\'s "new"', ""],
        "brand": ["OPI", "", "", ""],
        "categories": ["Beauty > Nails", "", "A, B > C; D > E", ""],
        "description": ["", "Soft. Warm.", "", ""],
    }
    assert [len(batch) for batch in data.test_dataloader()] == [1]


def test_unpacked_files_and_json_items_read_the_same(build: Build, tmp_path: Path) -> None:
    paths = [write_reviews(tmp_path), write_meta(tmp_path)]
    expected = build(*HEAD)
    for path in paths:
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    unpacked = build(*HEAD)
    (tmp_path / "meta_Tiny.json").write_text("".join(json.dumps(line) + "\n" for line in META))
    for data in (unpacked, build(*HEAD)):
        assert histories(data) == histories(expected)
        assert all((data.catalog.fields[name] == values).all() for name, values in expected.catalog.fields.items())


def test_a_line_that_nobody_reviewed_is_not_parsed(build: Build, tmp_path: Path) -> None:
    write_reviews(tmp_path)
    write_meta(tmp_path, ["{'asin': 'B0', broken", *META])
    assert len(build(*HEAD).catalog) == 4
    with pytest.raises(DataError, match=r"meta_Tiny\.json\.gz: row 1 is neither a Python literal nor JSON"):
        build(*HEAD, "dataset.filter.catalog=all")


def test_all_rows_of_the_item_file_can_be_ranked(build: Build, tmp_path: Path) -> None:
    write_reviews(tmp_path)
    write_meta(tmp_path)
    assert build(*HEAD, "dataset.filter.catalog=all").catalog.ids.to_list() == ["B0", "B1", "B2", "B3", "B4"]


def test_a_text_that_quotes_another_asin_does_not_hide_its_own(build: Build, tmp_path: Path) -> None:
    write_reviews(tmp_path)
    write_meta(
        tmp_path, [{"description": "it's like 'asin': 'B7'", "asin": "B1"}, {"title": "'asin': 'B1'", "asin": "B8"}]
    )
    assert build(*HEAD).catalog.fields["description"].to_list()[0] == "it's like 'asin': 'B7'"


def test_emoji_written_as_two_halves_become_one(build: Build, tmp_path: Path) -> None:
    write_reviews(tmp_path)
    write_meta(tmp_path, [r"{'asin': 'B1', 'title': 'Nails \ud83d\ude00', 'brand': 'half \ud83d'}"])
    fields = build(*HEAD).catalog.fields
    assert (fields["title"][0], fields["brand"][0]) == ("Nails \U0001f600", "half \ufffd")


def test_of_an_item_twice_in_the_item_file_the_last_row_counts(
    build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_reviews(tmp_path)
    write_meta(tmp_path, [*META, {"asin": "B1", "title": "Newer"}])
    with caplog.at_level(logging.WARNING):
        assert "Newer" in build(*HEAD).catalog.titles
    assert "meta_Tiny.json.gz: 1 rows repeat an item, 'B1' for one; the last counts" in caplog.text


def test_ratings_filter_where_there_are_any(build: Build, tmp_path: Path) -> None:
    write_meta(tmp_path)
    write_reviews(tmp_path, overall=3.0)
    assert len(build(*HEAD, "dataset.filter.min_rating=3").interactions) == 6
    with pytest.raises(DataError, match=r"no row is rated at least dataset\.filter\.min_rating=4"):
        build(*HEAD, "dataset.filter.min_rating=4")
    write_reviews(tmp_path)
    with pytest.raises(DataError, match=r"has no ratings for dataset\.filter\.min_rating=3"):
        build(*HEAD, "dataset.filter.min_rating=3")


def test_many_blocks_read_as_one(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_reviews(tmp_path)
    write_meta(tmp_path)
    expected = histories(build(*HEAD))
    for name in ("hllm.data.tables.BLOCK_BYTES", "hllm.data.amazon.META_BYTES"):
        monkeypatch.setattr(name, 10)
    assert histories(build(*HEAD, "dataset.legacy_sort=true")) == expected  # a key of its own in the cache


GOOD = '{"reviewerID": "u1", "asin": "B1", "unixReviewTime": 86400}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + '{"reviewerID": "u1", "asin":\n', r"row 2 is not a review as JSON \(.*'\{\"reviewerID\": \"u1\", "),
        (GOOD + "\n" + GOOD, "row 2 is empty"),
        (GOOD + "[1]\n", r"row 2 is not a review as JSON"),
        (GOOD + GOOD.replace("86400", '"soon"'), r"row 2 is not a review as JSON \(cannot parse 'soon'"),
        (GOOD + GOOD.replace("86400", "-5"), r"row 2 has timestamp=-5"),
        (GOOD + '{"asin": "B1", "unixReviewTime": 86400}\n', r"row 2 has no user"),
        (GOOD + '{"reviewerID": "u1", "asin": "B1"}\n', r"row 2 has timestamp=None"),
        ("", r"holds no interactions"),
    ],
)  # fmt: skip
def test_a_malformed_review_is_refused_by_file_and_row(build: Build, tmp_path: Path, text: str, message: str) -> None:
    write_meta(tmp_path)
    (tmp_path / "reviews_Tiny_5.json.gz").write_bytes(gzip.compress(text.encode()))
    with pytest.raises(DataError, match=r"reviews_Tiny_5\.json\.gz: " + message):
        build(*HEAD)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'asin': 'B1', 'title': __import__('os').system('touch ran')}", r"\(malformed node or.*fetch the file again"),
        ("{'asin': 'B1', 'title': 'torn", r"\(unterminated string literal"),
        ('{"asin": "B1", "title": ', r"\(Expecting value"),
        ("'asin': 'B1'", r"is neither"),
        ("['asin', 'B1']", r"\(no dictionary\)"),
        ("{'title': 'no key'}", r"row 2 has no asin: \"\{'title': 'no key'\}\""),
        ("{'asin': 'B1', 'x': " + "[" * 10_000, r"is neither"),
    ],
)  # fmt: skip
def test_a_malformed_item_is_refused_by_file_and_row(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_reviews(tmp_path)
    write_meta(tmp_path, [META[0], line])
    with pytest.raises(DataError, match=rf"meta_Tiny\.json\.gz: row 2 .*{message.removeprefix('row 2 ')}"):
        build(*HEAD)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["reviews_Tiny_5.json.gz", "meta_Tiny.json.gz"])
def test_a_torn_archive_is_refused(build: Build, tmp_path: Path, name: str) -> None:
    write_reviews(tmp_path)
    write_meta(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=rf"{name}: the compressed file is cut short or broken; fetch it again"):
        build(*HEAD)


def test_the_item_file_of_another_category_is_refused(build: Build, tmp_path: Path) -> None:
    write_reviews(tmp_path)
    write_meta(tmp_path, [META[0]])
    with pytest.raises(DataError, match=r"meta_Tiny\.json\.gz: has a row for none of the 4 items of .*one category"):
        build(*HEAD)


def test_missing_files_are_named_with_their_address(build: Build, tmp_path: Path) -> None:
    write_meta(tmp_path)
    with pytest.raises(DataError, match=r"needs reviews_Tiny_5\.json\.gz and meta_Tiny\.json\.gz; of these there is "
                       r"only meta_Tiny\.json\.gz\. .*http://snap"):  # fmt: skip
        build(*HEAD)


def test_counts_are_those_of_the_category(build: Build, tmp_path: Path) -> None:
    for path in (write_reviews(tmp_path), write_meta(tmp_path)):
        path.rename(path.with_name(path.name.replace("Tiny", "Toys_and_Games")))
    with pytest.raises(DataError, match=r"expected Counts\(interactions=167597, users=19412, items=11924\).*found"):
        build("dataset=amazon", "dataset.category=Toys_and_Games")


@pytest.mark.parametrize("option", ["amazon", "amazon_beauty"])
def test_name_and_addresses_follow_the_category(option: str) -> None:
    config = compose([f"dataset={option}", "dataset.category=Toys_and_Games"])
    assert config.dataset.name == "amazon_toys_and_games"
    assert [download.url.rpartition("/")[2] for download in config.dataset.downloads] == [
        "reviews_Toys_and_Games_5.json.gz",
        "meta_Toys_and_Games.json.gz",
    ]
    assert from_plain(to_plain(config)) == config
    assert compose([f"dataset={option}", "dataset.category=Beauty", "dataset.name=Mine"]).dataset.name == "Mine"


def test_a_category_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.category=: must be as in the file names, e\.g\. Toys_and_Games"):
        compose(["dataset=amazon"])


@pytest.mark.skipif(not BEAUTY.is_dir(), reason="needs ../shared/data/amazon-beauty beside the checkout")
def test_real_beauty_has_its_published_size_and_order(tmp_path: Path) -> None:
    data = build_datamodule(compose(["dataset=amazon_beauty", f"dataset.root={BEAUTY}", f"cache_dir={tmp_path}"]))
    assert isinstance(data, SequenceDataModule)
    found = (len(data.interactions), data.interactions.num_users, len(data.catalog))
    assert found == (198_502, 22_363, 12_101) == tuple(vars(COUNTS["Beauty"]).values())
    rows = defaultdict(list)
    with gzip.open(BEAUTY / "reviews_Beauty_5.json.gz") as file:
        for line in map(json.loads, file):
            rows[line["reviewerID"]].append((line["unixReviewTime"], line["asin"]))
    for user, items in list(histories(data).items())[::100]:
        assert items == [asin for _, asin in sorted(rows[user], key=lambda row: row[0])]
    titles = dict(zip(data.catalog.ids, data.catalog.titles, strict=True))
    assert titles["B004756YJA"] == "OPI Nail Lacquer, Simmer and Shimmer, 0.5-Fluid Ounce"
    assert not any(data.catalog.fields["title"] == "")


# Books. Every user of 1 to 5 rates A to E, users 1 to 4 also F, user 1 A twice. User 6 rates A, B, C, F and X: X has
# too few ratings, so that user 6 has 4 left and goes, and F, which had 5, is left with 4. One pass keeps F.
BOOK_EVENTS = [
    *((f"u{user}", item, 100 * user + place) for user in range(1, 6) for place, item in enumerate("ABCDE")),
    *((f"u{user}", "F", 100 * user + 50) for user in range(1, 5)),
    ("u1", "A", 100),
    *(("u6", item, 600 + place) for place, item in enumerate("ABCFX")),
]
BOOKS = ["dataset=amazon_books", "dataset.check_counts=false"]
KEPT = {f"u{user}": [*"ABCDEF"] for user in range(1, 5)} | {"u1": [*"AABCDEF"], "u5": [*"ABCDE"]}


def write_raw_books(folder: Path) -> None:
    rows = (f"{user},{item},5.0,{time}\n" for user, item, time in BOOK_EVENTS)
    (folder / "ratings_Books.csv").write_text("".join(rows))
    meta = [{"asin": item, "title": f"Book {item}", "description": "Long, or not."} for item in "ABCDEX"]
    (folder / "meta_Books.json.gz").write_bytes(gzip.compress("".join(f"{line}\n" for line in meta).encode()))


def write_processed_books(folder: Path, interactions: str, items: str) -> None:
    """What process_books.py makes of the same files."""
    kept = [event for event in BOOK_EVENTS if event[0] != "u6"]
    for name in (interactions, items):
        (folder / name).parent.mkdir(exist_ok=True)
    rows = (f"{item},{user},{time}\n" for user, item, time in kept)
    (folder / interactions).write_text("item_id,user_id,timestamp\n" + "".join(rows))
    texts = (f'{item},"Long, or not.",Book {item}\n' for item in "ABCDEX")
    (folder / items).write_text("item_id,description,title\n" + "".join(texts))


def test_raw_books_are_filtered_once_and_keep_duplicates(build: Build, tmp_path: Path) -> None:
    write_raw_books(tmp_path)
    data = build(*BOOKS)
    assert histories(data) == KEPT
    assert data.catalog.titles == [*(f"Book {item}" for item in "ABCDE"), "F"]
    assert data.catalog.fields["description"].to_list() == ["Long, or not."] * 5 + [""]
    iterated = build(*BOOKS, "dataset.filter.iterated=true")
    assert histories(iterated) == {user: [item for item in items if item != "F"] for user, items in KEPT.items()}


@pytest.mark.parametrize(
    "names",
    [("dataset/amazon_books.csv", "information/amazon_books.csv"), ("amazon_books.csv", "amazon_books_item.csv")],
)
def test_processed_books_are_the_raw_ones_and_are_not_filtered_again(
    build: Build, tmp_path: Path, names: tuple[str, str]
) -> None:
    write_processed_books(tmp_path, *names)
    data = build(*BOOKS)
    assert histories(data) == KEPT
    assert data.catalog.titles == [*(f"Book {item}" for item in "ABCDE"), "F"]
    other = build(*BOOKS, "dataset.filter.min_user_events=6", "dataset.filter.min_item_events=1")
    assert histories(other) == {user: items for user, items in KEPT.items() if user != "u5"}


def test_books_of_another_size_than_the_papers_are_refused(build: Build, tmp_path: Path) -> None:
    write_raw_books(tmp_path)
    with pytest.raises(DataError, match=r"expected Counts\(interactions=10053086, users=694898, items=686624\), found "
                       r"Counts\(interactions=30, users=5, items=6\)"):  # fmt: skip
        build("dataset=amazon_books")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("dataset/amazon_books.csv", "user,item,time\nu,i,5\n", r"'item_id'.*\['user', 'item', 'time'\]"),
        ("information/amazon_books.csv", "item_id,title\nA,x\n", r"no column 'description'.*\['item_id', 'title'\]"),
        ("dataset/amazon_books.csv", "item_id,user_id,timestamp\nA,u\n", r"row 2 has 2 values, expected 3"),
    ],
)
def test_a_malformed_processed_file_is_refused(
    build: Build, tmp_path: Path, name: str, text: str, message: str
) -> None:
    write_processed_books(tmp_path, "dataset/amazon_books.csv", "information/amazon_books.csv")
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=name + ": .*" + message):
        build(*BOOKS)


def test_of_several_rows_of_a_processed_book_the_last_counts(
    build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_processed_books(tmp_path, "amazon_books.csv", "amazon_books_item.csv")
    items = tmp_path / "amazon_books_item.csv"
    header = items.read_text().partition("\n")[0].split(",")
    added = [{"item_id": " A", "title": "of two\nlines"}, {"item_id": "", "title": "none"}]
    lines = [",".join(f'"{row.get(name, "")}"' for name in header) + "\n" for row in added]
    items.write_text(items.read_text() + lines[0])
    assert "of two\nlines" in build(*BOOKS).catalog.titles
    assert "1 rows repeat an item, 'A' for one; the last counts" in caplog.text
    number = items.read_text().count("\n") + 1
    items.write_text(items.read_text() + lines[1])
    with pytest.raises(DataError, match=rf"amazon_books_item\.csv: row {number} has no item_id"):
        build(*BOOKS)


def test_a_malformed_rating_is_refused_by_row(build: Build, tmp_path: Path) -> None:
    write_raw_books(tmp_path)
    with (tmp_path / "ratings_Books.csv").open("a") as file:
        file.write("u1,A,5.0\n")
    with pytest.raises(DataError, match=rf"ratings_Books\.csv: row {len(BOOK_EVENTS) + 1} has 3 values, expected 4"):
        build(*BOOKS)


def test_missing_books_are_named_in_all_forms(build: Build) -> None:
    with pytest.raises(DataError, match=r"needs ratings_Books\.csv and meta_Books\.json\.gz or dataset/amazon_books"
                       r"\.csv and information/amazon_books\.csv or amazon_books\.csv and .*huggingface"):  # fmt: skip
        build(*BOOKS)
