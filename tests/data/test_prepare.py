"""Sorting, encoding and splitting, on histories small enough to write down."""

import logging
from collections import Counter

import numpy as np
import polars as pl
import pytest

from hllm.config import TrainRows
from hllm.data.prepare import (
    Rows,
    build_interactions,
    drop_duplicates,
    evaluated_users,
    leave_one_out_rows,
    train_counts,
    train_rows,
)
from hllm.data.schema import Interactions
from hllm.errors import DataError

ITEMS = pl.Series("item", ["a", "b", "c", "d", "e"])


def events(*rows: tuple[int, str, int]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row")


def histories(*lengths: int) -> Interactions:
    """Users with these numbers of events; all events are different items, numbered through."""
    total = sum(lengths)
    return Interactions(
        items=np.arange(1, total + 1, dtype=np.int32),
        timestamps=np.arange(total, dtype=np.int64),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        users=np.array([str(user) for user in range(len(lengths))]),
    )


def target_items(data: Interactions, rows: Rows) -> Counter[int]:
    """How often each event is a target, by a plain loop."""
    found: Counter[int] = Counter()
    for start, end in zip(rows.starts, rows.ends, strict=True):
        first = end - 1 if rows.last_only else start
        found.update(int(data.items[event + 1]) for event in range(first, end))
    return found


def test_shuffled_rows_become_csr_arrays_sorted_by_user_and_time() -> None:
    data = build_interactions(
        events((7, "c", 30), (2, "a", 50), (7, "a", 10), (2, "e", 40), (7, "b", 20)), ITEMS, "file"
    )
    assert data.users.tolist() == ["2", "7"]
    assert data.offsets.tolist() == [0, 2, 5]
    assert data.items.tolist() == [5, 1, 1, 2, 3]
    assert data.timestamps.tolist() == [40, 50, 10, 20, 30]
    assert (data.items.dtype, data.timestamps.dtype, data.offsets.dtype) == (np.int32, np.int64, np.int64)


def test_users_are_sorted_as_numbers() -> None:
    data = build_interactions(events((10, "a", 1), (9, "b", 1), (100, "c", 1)), ITEMS, "file")
    assert data.users.tolist() == ["9", "10", "100"]


def test_equal_timestamps_keep_the_order_of_the_file() -> None:
    rng = np.random.default_rng(0)
    catalogue = pl.Series([str(item) for item in range(400)])
    items, users = rng.permutation(400), rng.integers(0, 5, 400)
    rows = events(*((int(u), str(i), 0) for u, i in zip(users, items, strict=True)))
    data = build_interactions(rows, catalogue, "file")
    assert data.items.tolist() == [i + 1 for u in range(5) for i in items[users == u]]


def test_an_item_outside_the_catalogue_is_refused_by_row_and_name() -> None:
    with pytest.raises(DataError, match=r"u\.data: row 2 names item 'z', which is not in the catalogue \(2 such rows"):
        build_interactions(events((1, "a", 1), (1, "z", 2), (2, "y", 3)), ITEMS, "u.data")


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match=r"u\.data: holds no interactions"):
        build_interactions(events((1, "a", 1)).clear(), ITEMS, "u.data")


def test_repeated_rows_are_dropped_and_counted_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    rows = events((1, "a", 1), (1, "b", 1), (1, "a", 1), (1, "a", 2), (1, "a", 1))
    with caplog.at_level(logging.WARNING):
        kept = drop_duplicates(rows, "u.data")
    assert kept.rows() == [(1, "a", 1), (1, "b", 1), (1, "a", 2)]
    assert "u.data: skipped 2 rows" in caplog.text


def test_without_repeated_rows_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    drop_duplicates(events((1, "a", 1), (1, "a", 2)), "u.data")
    assert caplog.text == ""


def test_the_last_event_is_the_test_target_and_the_last_but_one_validation() -> None:
    data = histories(5, 2, 3)
    test, val = (leave_one_out_rows(data, held_out, max_history=100) for held_out in (1, 2))
    assert [(r.users.tolist(), r.starts.tolist(), r.ends.tolist()) for r in (test, val)] == [
        ([0, 2], [0, 7], [4, 9]),
        ([0, 2], [0, 7], [3, 8]),
    ]
    assert target_items(data, test) == Counter([5, 10])
    assert target_items(data, val) == Counter([4, 9])


def test_evaluation_rows_read_the_newest_events_only() -> None:
    rows = leave_one_out_rows(histories(9), 1, max_history=3)
    assert (rows.starts.tolist(), rows.ends.tolist()) == ([5], [8])


def test_users_with_fewer_than_three_events_are_not_evaluated() -> None:
    assert evaluated_users(histories(1, 2, 3, 4)).tolist() == [2, 3]


@pytest.mark.parametrize("kind", TrainRows)
@pytest.mark.parametrize("max_history", [1, 2, 3, 7, 100])
def test_every_training_transition_is_a_target_once_and_no_held_out_item_is(kind: TrainRows, max_history: int) -> None:
    lengths = [1, 2, 3, 4, 5, 8, 9, 17]
    data = histories(*lengths)
    rows = train_rows(data, max_history, kind)
    expected, first = Counter[int](), 1
    for length in lengths:
        trained = length if length < 3 else length - 2
        expected.update(range(first + 1, first + trained))  # all but a user's first event
        first += length
    assert target_items(data, rows) == expected
    assert int((rows.ends - rows.starts).max()) <= max_history


def test_windows_are_cut_from_the_newest_end() -> None:
    rows = train_rows(histories(10), 3, TrainRows.windows)  # 8 training events, 7 transitions
    assert list(zip(rows.starts.tolist(), rows.ends.tolist(), strict=True)) == [(4, 7), (1, 4), (0, 1)]


def test_a_prefix_row_reads_the_newest_history_before_its_target() -> None:
    rows = train_rows(histories(7), 2, TrainRows.prefixes)  # 5 training events, 4 transitions
    assert list(zip(rows.starts.tolist(), rows.ends.tolist(), strict=True)) == [(2, 4), (1, 3), (0, 2), (0, 1)]


def test_rows_stay_within_their_user() -> None:
    data = histories(4, 6, 3)
    for rows in (train_rows(data, 100, TrainRows.windows), train_rows(data, 100, TrainRows.prefixes)):
        assert (rows.starts >= data.offsets[rows.users]).all()
        assert (rows.ends < data.offsets[rows.users + 1]).all()


def test_train_counts_leave_out_held_out_events() -> None:
    data = Interactions(
        items=np.array([1, 2, 2, 3, 1, 3, 3, 3], dtype=np.int32),  # users: [1, 2 | 2, 3], [1, 3] and [3 | 3, ...]
        timestamps=np.zeros(8, dtype=np.int64),
        offsets=np.array([0, 4, 6, 8]),
        users=np.array(["a", "b", "c"]),
    )
    assert train_counts(data, num_items=4).tolist() == [0, 2, 1, 3, 0]


def test_the_fingerprint_follows_events_and_their_order() -> None:
    a = histories(3, 3)
    b = Interactions(a.items[::-1].copy(), a.timestamps, a.offsets, a.users)
    assert a.fingerprint() == histories(3, 3).fingerprint()
    assert len({a.fingerprint(), b.fingerprint(), histories(2, 4).fingerprint()}) == 3
