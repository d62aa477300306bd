"""Numbering, sorting and filtering equal plain Python on any events, however they are cut into chunks and blocks."""

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hllm.config import CatalogItems, FilterConfig, UnknownItems
from hllm.data import prepare as module
from hllm.data.prepare import RawEvents, first_places, has_core, prepare
from hllm.data.schema import Catalog, Interactions
from hllm.errors import DataError


class Event(NamedTuple):
    user: str
    item: str
    timestamp: int
    rating: float = 5.0


CATALOG = ["e", "c", "a", "d", "b", "nobody"]
# few users, items and times: much is tied, repeated and filtered out
EVENTS = st.lists(
    st.builds(
        Event,
        user=st.sampled_from(["9", "10", " 10", "07", "7", "é"]) | st.sampled_from(["2", "1", "-3"]),
        item=st.sampled_from(["a", "b", "c", "d", "a ", "unknown", "other"]),
        timestamp=st.integers(0, 4) | st.sampled_from([0, 2**31, 253_402_300_799]),
        rating=st.sampled_from([1.0, 3.0, 5.0]),
    ),
    min_size=1,
    max_size=40,
)
RULES = st.builds(
    FilterConfig,
    min_rating=st.sampled_from([None, 3.0]),
    drop_duplicates=st.booleans(),
    unknown_items=st.sampled_from(UnknownItems),
    min_user_events=st.integers(0, 4),
    min_item_events=st.integers(0, 4),
    iterated=st.booleans(),
    catalog=st.sampled_from(CatalogItems),
)
quickly = settings(max_examples=100, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def tiny_blocks() -> Iterator[None]:
    """Rows are passed over three at a time and sorted five at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_ROWS", 3)
        patch.setattr(module, "BLOCK_ROWS", 5)
        yield


def table(events: list[Event]) -> pl.DataFrame:
    kinds = {"user": pl.String, "item": pl.String, "timestamp": pl.Int64, "rating": pl.Float64}
    return pl.DataFrame(events, schema=kinds, orient="row")


def run(
    chunks: list[pl.DataFrame],
    rules: FilterConfig | None = None,
    by_appearance: bool = False,
    legacy_sort: bool = False,
) -> tuple[Interactions, Catalog]:
    rules = rules or FilterConfig(unknown_items=UnknownItems.keep)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = RawEvents(folder, Path("events.csv"), first_row=2)
        raw.fill(chunks, rules.min_rating)
        catalog = Catalog(CATALOG, {"title": [item.upper() for item in CATALOG]})
        items_file = Path("items.csv")
        offsets, users, catalog = prepare(raw, catalog, rules, folder, items_file, by_appearance, legacy_sort)
        items, times = np.fromfile(folder / "items", np.int32), np.fromfile(folder / "timestamps", np.int64)
    return Interactions(items, times, offsets, users), catalog


def histories(data: Interactions, catalog: Catalog) -> dict[str, list[tuple[str, int]]]:
    """Original user id -> original item ids and times."""
    return {
        user: [
            (catalog.ids[int(item) - 1], int(time))
            for item, time in zip(data.items[b:e], data.timestamps[b:e], strict=True)
        ]
        for user, b, e in zip(data.users, data.offsets[:-1], data.offsets[1:], strict=True)
    }


def plain(events: list[Event], rules: FilterConfig) -> list[Event] | None:
    """What is left, by (user, time, file order); None: unknown items are refused."""
    left = [e._replace(user=e.user.strip(), item=e.item.strip()) for e in events]
    left = [e for e in left if rules.min_rating is None or e.rating >= rules.min_rating]
    if rules.unknown_items is UnknownItems.error and any(e.item not in CATALOG for e in left):
        return None
    left = [e for e in left if rules.unknown_items is UnknownItems.keep or e.item in CATALOG]
    if rules.drop_duplicates:
        left = [Event(*row) for row in dict.fromkeys(e[:3] for e in left)]
    while True:
        users, items = Counter(e.user for e in left), Counter(e.item for e in left)
        kept = [e for e in left if users[e.user] >= rules.min_user_events and items[e.item] >= rules.min_item_events]
        if not rules.iterated:
            users = Counter(e.user for e in kept)
            kept = [e for e in kept if users[e.user] >= rules.min_user_events]
        if len(kept) == len(left) or not rules.iterated:
            return sorted(kept, key=lambda e: (e.user, e.timestamp))  # stable
        left = kept


def in_order(users: set[str]) -> list[str]:
    return sorted(users, key=lambda u: (int(u), u)) if all(u.lstrip("-").isdigit() for u in users) else sorted(users)


@given(EVENTS, RULES)
@quickly
def test_prepared_data_equal_plain_python(events: list[Event], rules: FilterConfig) -> None:
    expected = plain(events, rules)
    if not expected:
        with pytest.raises(DataError, match=r"events\.csv: "):
            run([table(events)], rules)
        return
    data, catalog = run([table(events)], rules)
    assert histories(data, catalog) == {
        user: [(e.item, e.timestamp) for e in own] for user, own in groupby(expected, lambda e: e.user)
    }
    read = {e.user.strip() for e in events if e.rating >= (rules.min_rating or 0)}
    assert data.users.to_list() == [user for user in in_order(read) if user in set(data.users)]


@given(EVENTS, RULES)
@quickly
def test_numbers_are_a_bijection_with_what_is_left(events: list[Event], rules: FilterConfig) -> None:
    expected = plain(events, rules)
    if not expected:
        return
    data, catalog = run([table(events)], rules)
    assert data.users.is_unique().all()
    assert catalog.ids.is_unique().all()
    interacted = {e.item for e in expected}
    appeared = list(dict.fromkeys(e.item.strip() for e in events if e.rating >= (rules.min_rating or 0)))
    known = CATALOG + [item for item in appeared if item not in CATALOG and rules.unknown_items is UnknownItems.keep]
    every = rules.catalog is CatalogItems.all
    assert catalog.ids.to_list() == [item for item in known if every or item in interacted]
    assert catalog.fields["title"].to_list() == [item.upper() if item in CATALOG else "" for item in catalog.ids]
    assert set(data.items.tolist()) == {catalog.ids.to_list().index(item) + 1 for item in interacted}


@given(EVENTS, RULES, st.lists(st.integers(0, 40)), st.booleans(), st.booleans())
@quickly
def test_chunks_do_not_matter(
    events: list[Event], rules: FilterConfig, cuts: list[int], by_appearance: bool, legacy_sort: bool
) -> None:
    if not plain(events, rules):
        return
    legacy_sort &= max(rules.min_user_events, rules.min_item_events) <= 1
    legacy_sort = legacy_sort and not has_core(rules)  # which is refused
    bounds = [0, *sorted(cuts), len(events)]
    chunks = [table(events[begin:end]) for begin, end in pairwise(bounds)]
    (data, catalog), (again, same) = (run(c, rules, by_appearance, legacy_sort) for c in ([table(events)], chunks))
    assert data.fingerprint == again.fingerprint
    assert data.users.equals(again.users)
    assert catalog.ids.equals(same.ids)


@given(EVENTS, RULES)
@quickly
def test_by_appearance_numbers_run_in_the_order_of_the_file(events: list[Event], rules: FilterConfig) -> None:
    if not plain(events, rules):
        return
    data, catalog = run([table(events)], rules, by_appearance=True)
    read = [e for e in events if rules.min_rating is None or e.rating >= rules.min_rating]
    users, items = (list(dict.fromkeys(getattr(e, name).strip() for e in read)) for name in ("user", "item"))
    assert data.users.to_list() == [user for user in users if user in set(data.users)]
    rest = [item for item in CATALOG if item not in items]
    assert catalog.ids.to_list() == [item for item in items + rest if item in set(catalog.ids)]
    ordered, named = run([table(events)], rules)
    assert histories(data, catalog) == histories(ordered, named)


@given(EVENTS, st.booleans())
@quickly
def test_the_legacy_sort_is_by_time_alone_and_then_by_user(events: list[Event], by_appearance: bool) -> None:
    rules = FilterConfig(unknown_items=UnknownItems.keep, drop_duplicates=False)
    data, catalog = run([table(events)], rules, by_appearance, legacy_sort=True)
    order = np.argsort(np.array([e.timestamp for e in events]), kind="quicksort")
    expected: dict[str, list[tuple[str, int]]] = {}
    for event in (events[place] for place in order):
        expected.setdefault(event.user.strip(), []).append((event.item.strip(), event.timestamp))
    assert histories(data, catalog) == expected


def test_the_legacy_sort_differs_from_the_stable_one_where_times_are_tied() -> None:
    rng = np.random.default_rng(0)
    users, items, times = rng.integers(0, 5, 200), rng.integers(0, 99, 200), rng.integers(0, 9, 200)
    events = [table([Event(str(u), f"item {i}", int(t)) for u, i, t in zip(users, items, times, strict=True)])]
    stable, legacy = run(events), run(events, legacy_sort=True)
    assert (stable[0].timestamps == legacy[0].timestamps).all()
    assert (stable[0].items != legacy[0].items).any()


def test_the_legacy_sort_is_refused_under_a_filter_that_changes_its_ties() -> None:
    with pytest.raises(DataError, match=r"dataset\.legacy_sort: .*min_user_events=0"):
        run([table([Event("u", "a", 1)])], FilterConfig(min_user_events=2), legacy_sort=True)


@pytest.mark.parametrize("num_chunks", [1, 2, 7])
def test_columns_in_many_pieces_are_numbered_as_in_one(num_chunks: int) -> None:
    items = [f"item {n * 7919 % 5000}" for n in range(20_000)]
    pieces = [
        pl.DataFrame({"user": piece, "item": piece, "timestamp": 0}) for piece in np.array_split(items, num_chunks)
    ]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_ROWS", 1 << 22)
        raw = RawEvents(Path(folder), Path("events.csv"), first_row=2)
        raw.fill([pl.concat(pieces, rechunk=False)], None)
        first = list(dict.fromkeys(items))
        assert raw.item_ids.ids().to_list() == first
        ((users, codes, _),) = raw.chunks()
    assert (users == codes).all()
    assert codes.tolist() == [first.index(item) for item in items[:5000]] * 4


def test_histories_are_sorted_by_user_and_time_and_ties_keep_the_order_of_the_file() -> None:
    rows = [("7", "c", 30), ("2", "a", 50), ("7", "a", 10), ("2", "e", 50), ("7", "b", 10), ("10", "d", 0)]
    data, catalog = run([table([Event(*row) for row in rows])])
    assert data.users.to_list() == ["2", "7", "10"]
    assert data.offsets.tolist() == [0, 2, 5, 6]
    assert [catalog.ids[int(item) - 1] for item in data.items] == ["a", "e", "a", "b", "c", "d"]
    assert data.timestamps.tolist() == [50, 50, 10, 10, 30, 0]
    assert (data.items.dtype, data.timestamps.dtype, data.offsets.dtype) == (np.int32, np.int64, np.int64)


@pytest.mark.parametrize(
    ("users", "expected"),
    [
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["10", "9", "u1"], ["10", "9", "u1"]),
        (["7", "007", "07"], ["007", "07", "7"]),
        (["é", "z", "Z"], ["Z", "z", "é"]),
        ([str(2**63), "5"], ["5", str(2**63)]),
    ],
    ids=["numbers", "text", "equal as numbers", "code points", "above 64 bits"],
)
def test_users_are_numbered_in_the_order_of_their_ids(users: list[str], expected: list[str]) -> None:
    data, _ = run([table([Event(user, "a", 0) for user in users])])
    assert data.users.to_list() == expected


def test_ids_that_differ_only_in_white_space_around_them_are_one() -> None:
    data, catalog = run([table([Event("u", "a", 1), Event(" u", "b\t", 2), Event("u\u00a0", " a", 3)])])
    assert histories(data, catalog) == {"u": [("a", 1), ("b", 2), ("a", 3)]}


# Three users, three items. u3 has one event; i3 has two, of which one is u3's.
CORE = [("u1", "a"), ("u1", "b"), ("u1", "c"), ("u2", "a"), ("u2", "b"), ("u3", "c")]


@pytest.mark.parametrize(
    ("iterated", "expected"),
    # counted once, c stays with one event: its other went with u3
    [(False, {"u1": "abc", "u2": "ab"}), (True, {"u1": "ab", "u2": "ab"})],
)
def test_a_single_pass_leaves_what_the_core_does_not(iterated: bool, expected: dict[str, str]) -> None:
    events = [table([Event(user, item, place) for place, (user, item) in enumerate(CORE)])]
    rules = FilterConfig(min_user_events=2, min_item_events=2, iterated=iterated)
    assert {u: "".join(i for i, _ in own) for u, own in histories(*run(events, rules)).items()} == expected


def test_a_user_with_more_events_than_a_block_and_users_without_any_are_sorted() -> None:
    events = [Event("1", "abcd"[n % 4], -n % 7) for n in range(31)] + [Event("2", "unknown", 0), Event("3", "b", 1)]
    rules = FilterConfig(unknown_items=UnknownItems.drop, drop_duplicates=False)
    data, _ = run([table([*events, Event("4", "unknown", 1)])], rules)
    assert data.users.to_list() == ["1", "3"]
    assert data.offsets.tolist() == [0, 31, 32]


def test_unknown_items_are_refused_by_row_and_name_unless_told_otherwise() -> None:
    chunks = [table([Event("u", "a", 1)]), table([Event("u", "b", 2), Event("u", "x", 3), Event("u", "y", 3)])]
    message = (
        r"events.csv: row 4 names item 'x', .* not in the catalogue items.csv \(2 such items\).*unknown_items=drop"
    )
    with pytest.raises(DataError, match=message):
        run(chunks, FilterConfig())


@pytest.mark.parametrize(("unknown", "word"), [(UnknownItems.drop, "left out"), (UnknownItems.keep, "without text")])
def test_unknown_items_are_counted_in_the_log(
    unknown: UnknownItems, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run([table([Event("u", "a", 1), Event("u", "x", 3)])], FilterConfig(unknown_items=unknown))
    assert "events.csv: 1 items are not in items.csv, 'x' for one" in caplog.text
    assert word in caplog.text


def test_repeated_rows_are_counted_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    events = [Event("u", "a", 1), Event("u", "a", 2), Event("u", "a", 1), Event("v", "a", 1)]
    with caplog.at_level(logging.WARNING):
        data, _ = run([table(events)], FilterConfig())
    assert len(data) == 3
    assert "events.csv: skipped 1 rows that repeat an earlier user, item and timestamp" in caplog.text


@pytest.mark.parametrize(
    ("chunks", "rules", "message"),
    [
        ([], FilterConfig(), "holds no interactions"),
        ([table([])], FilterConfig(), "holds no interactions"),
        ([table([Event("u", "a", 1, 2.0)])], FilterConfig(min_rating=3), "no row is rated at least .*min_rating=3"),
        ([table([Event("u", "x", 1)])], FilterConfig(unknown_items=UnknownItems.drop), "no event names an item"),
        ([table([Event("u", "a", 1)])], FilterConfig(min_user_events=2), "nothing is left of 1 events .*user_events=2"),
        ([table([Event("u", "a", 1)]).drop("rating")], FilterConfig(min_rating=3), "has no ratings .*min_rating=3"),
    ],
    ids=["no chunk", "empty chunk", "min_rating", "unknown items", "core", "no ratings"],
)
def test_nothing_left_is_refused(chunks: list[pl.DataFrame], rules: FilterConfig, message: str) -> None:
    with pytest.raises(DataError, match=f"events.csv: {message}"):
        run(chunks, rules)


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=9)))
@quickly
def test_codes_run_by_first_appearance_and_name_their_row(chunks: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        raw = RawEvents(Path(folder), Path("events.csv"), first_row=2)
        items = [item for chunk in chunks for item in chunk]
        if not items:
            return
        raw.fill([table([Event("u", item, 0) for item in chunk]) for chunk in chunks], None)
        codes = np.concatenate([codes for _, codes, _ in raw.chunks()])
        assert raw.item_ids.ids().to_list() == list(dict.fromkeys(items))
        assert [raw.item_ids.ids()[int(code)] for code in codes] == items
        assert [raw.row_of_item(code) for code in range(len(set(items)))] == [
            2 + items.index(item) for item in dict.fromkeys(items)
        ]


def test_the_first_places_of_codes_never_seen_before() -> None:
    assert first_places(np.array([1, 4, 0, 4, 5, 4], np.int32), known=4).tolist() == [1, 4]


def test_the_fingerprint_follows_events_and_their_order() -> None:
    events = [Event("u", "a", 1), Event("u", "b", 1), Event("v", "a", 1)]
    swapped = [events[1], events[0], events[2]]
    moved = [events[0], *(event._replace(user="v") for event in events[1:])]
    prints = [run([table(rows)])[0].fingerprint for rows in (events, list(events), swapped, moved)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_codes_are_by_first_appearance_in_columns_of_many_pieces(tmp_path: Path) -> None:
    """As every reader yields them: Polars would encode the pieces side by side, in an order of chance."""
    ids = np.random.default_rng(0).integers(0, 60_000, 400_000)
    whole = pl.DataFrame({"user": ids, "item": ids, "timestamp": ids}).cast({"user": pl.String, "item": pl.String})
    pieces = pl.concat([whole[begin : begin + 16_000] for begin in range(0, len(whole), 16_000)], rechunk=False)
    assert pieces.n_chunks() == 25
    raw = RawEvents(tmp_path, tmp_path / "events.csv", 2)
    raw.fill([pieces], None)
    expected = whole["item"].unique(maintain_order=True)
    assert raw.item_ids.ids().equals(expected)
    assert raw.user_ids.ids().equals(expected)
    late = int(np.flatnonzero(ids == int(expected[-1]))[0])
    assert raw.row_of_item(len(expected) - 1) == late + 2


def test_the_legacy_sort_is_refused_where_rows_would_be_filtered_after_it() -> None:
    with pytest.raises(DataError, match=r"dataset.legacy_sort: .* use the filtered file"):
        run([table([Event("u", "a", 1, 1.0)])], FilterConfig(min_user_events=2), legacy_sort=True)
