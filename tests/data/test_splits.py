"""Every protocol equals plain loops over histories, and nothing that is to be predicted is trained on."""

from collections import Counter
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hllm.config import DatasetConfig, Protocol, SplitConfig, TemporalTarget, TrainRows
from hllm.data.schema import Interactions
from hllm.data.splits import Rows, Splits, evaluated_users, keep_users, split, temporal_cuts, train_counts, train_rows
from hllm.errors import ConfigError

LEAVE_ONE_OUT = (Protocol.leave_one_out, Protocol.leave_one_out_official)
MAX_HISTORIES = st.sampled_from([1, 2, 3, 7, 100])
quickly = settings(max_examples=100, deadline=None, derandomize=True)


def dataset(protocol: Protocol, max_history: int = 100, **params: object) -> DatasetConfig:
    return DatasetConfig(
        name="made", _target_="", protocol=protocol, max_history=max_history, split=SplitConfig(**params)
    )


def histories(*times: list[int]) -> Interactions:
    """Users with events at these times; all events are different items, numbered through from 1."""
    lengths = [len(own) for own in times]
    return Interactions(
        items=np.arange(1, sum(lengths) + 1, dtype=np.int32),
        timestamps=np.array([time for own in times for time in own], dtype=np.int64),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        users=pl.Series([str(user) for user in range(len(times))]),
    )


def of_lengths(*lengths: int) -> Interactions:
    return histories(*(list(range(length)) for length in lengths))


HISTORIES = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=12).map(sorted), min_size=1, max_size=12).map(
    lambda times: histories(*times)
)
PROTOCOLS = st.builds(
    dataset,
    protocol=st.sampled_from(Protocol),
    max_history=MAX_HISTORIES,
    fractions=st.sampled_from([[0.8, 0.1, 0.1], [0.4, 0.3, 0.3], [0.1, 0.1, 0.8]]),
    seed=st.integers(0, 5),
    target=st.sampled_from(TemporalTarget),
)


def own_events(data: Interactions, user: int) -> list[int]:
    return list(range(int(data.offsets[user]), int(data.offsets[user + 1])))


def targets(rows: Rows) -> Counter[int]:
    """How often each event is a target."""
    return Counter(
        event + 1
        for start, end in zip(rows.starts.tolist(), rows.ends.tolist(), strict=True)
        for event in range(end - 1 if rows.last_only else start, end)
    )


def trained(data: Interactions, splits: Splits) -> list[list[int]]:
    """Each user's training events."""
    return [[e for e in own_events(data, u) if e < splits.train_ends[u]] for u in range(data.num_users)]


def pairs(rows: Rows) -> list[tuple[int, int, int]]:
    return list(zip(rows.users.tolist(), rows.starts.tolist(), rows.ends.tolist(), strict=True))


def kinds(protocol: Protocol) -> tuple[TrainRows, ...]:
    official = protocol is Protocol.leave_one_out_official
    own = [TrainRows.chunks] if official else [TrainRows.windows, TrainRows.prefixes]
    return (*own, TrainRows.latest)


@given(HISTORIES, PROTOCOLS)
@quickly
def test_nothing_to_be_predicted_is_read_or_predicted_in_training(data: Interactions, config: DatasetConfig) -> None:
    splits = split(data, config)
    held_out = targets(splits.validation) + targets(splits.test)
    assert max(held_out.values(), default=1) == 1  # no event is both
    for kind in kinds(config.protocol):
        rows = train_rows(data, splits.train_ends, config.max_history, kind)
        seen = {e for _, start, end in pairs(rows) for e in range(start, end + 1)}
        assert not seen & held_out.keys()
        assert seen <= {e for own in trained(data, splits) for e in own}


@given(HISTORIES, PROTOCOLS)
@quickly
def test_a_history_is_the_newest_events_right_before_the_target(data: Interactions, config: DatasetConfig) -> None:
    splits = split(data, config)
    for rows in (splits.validation, splits.test):
        assert rows.last_only
        for user, start, end in pairs(rows):
            own = own_events(data, user)
            assert end in own[1:]
            assert list(range(start, end)) == own[: own.index(end)][-config.max_history :]


@pytest.mark.parametrize("protocol", list(Protocol))
def test_evaluation_may_see_a_shorter_history_than_training(protocol: Protocol) -> None:
    """MAX_ITEM_LIST_LENGTH_TEST of the official code, which trains HLLM-1B with 28k negatives on 55 and tests on 50."""
    data, config = of_lengths(*[9] * 20), dataset(protocol, 6)
    longer, shorter = split(data, config), split(data, replace(config, eval_history=2))
    for long, short in ((longer.validation, shorter.validation), (longer.test, shorter.test)):
        assert short.ends.tolist() == long.ends.tolist()
        assert (short.ends - short.starts).tolist() == [min(2, length) for length in long.ends - long.starts]
    assert (longer.test.ends - longer.test.starts).max() == 6
    assert shorter.train_ends.tolist() == longer.train_ends.tolist()


@given(HISTORIES, st.sampled_from(LEAVE_ONE_OUT), MAX_HISTORIES)
@quickly
def test_leave_one_out_tests_the_last_event_and_validates_the_last_but_one(
    data: Interactions, protocol: Protocol, max_history: int
) -> None:
    splits = split(data, dataset(protocol, max_history))
    every = [own_events(data, user) for user in range(data.num_users)]
    assert [end for _, _, end in pairs(splits.test)] == [own[-1] for own in every if len(own) >= 3]
    assert [end for _, _, end in pairs(splits.validation)] == [own[-2] for own in every if len(own) >= 3]
    assert trained(data, splits) == [own[:-2] if len(own) >= 3 else own for own in every]


@given(HISTORIES, st.sampled_from([[0.4, 0.3, 0.3], [0.8, 0.1, 0.1]]), st.integers(0, 9))
@quickly
def test_user_split_trains_on_other_users_than_it_evaluates(
    data: Interactions, fractions: list[float], seed: int
) -> None:
    splits = split(data, dataset(Protocol.user_split, fractions=fractions, seed=seed))
    training = {user for user, own in enumerate(trained(data, splits)) if own}
    assert all(own in ([], own_events(data, user)) for user, own in enumerate(trained(data, splits)))
    groups = [training, set(splits.validation.users.tolist()), set(splits.test.users.tolist())]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert all(len(own_events(data, user)) >= 2 for user in groups[1] | groups[2])
    for rows in (splits.validation, splits.test):
        assert [end for _, _, end in pairs(rows)] == [own_events(data, int(user))[-1] for user in rows.users]


@pytest.mark.parametrize("num_users", [10, 97, 1000])
def test_user_split_keeps_its_fractions_within_rounding(num_users: int) -> None:
    data = of_lengths(*[2] * num_users)
    splits = split(data, dataset(Protocol.user_split))
    found = [sum(map(bool, trained(data, splits))), len(splits.validation), len(splits.test)]
    assert sum(found) == num_users
    assert np.abs(np.array(found) - np.array([0.8, 0.1, 0.1]) * num_users).max() <= 1


def test_the_seed_alone_says_who_is_tested() -> None:
    data = of_lengths(*[3] * 100)
    first, again, other = (split(data, dataset(Protocol.user_split, seed=seed)).test.users for seed in (1, 1, 2))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


@given(HISTORIES, st.sampled_from(TemporalTarget), st.sampled_from([[0.4, 0.3, 0.3], [0.8, 0.1, 0.1], [0.6, 0.3, 0.1]]))
@quickly
def test_temporal_equals_a_loop(data: Interactions, target: TemporalTarget, fractions: list[float]) -> None:
    config = dataset(Protocol.temporal, fractions=fractions, target=target)
    splits, times = split(data, config), data.timestamps.tolist()
    ordered = sorted(times)
    tenths = [round(10 * share) for share in fractions]  # exactly: 0.6 + 0.3 is a little less than 0.9
    cuts = [ordered[sum(tenths[:part]) * len(times) // 10] for part in (1, 2)]
    assert list(temporal_cuts(data, config.split)) == cuts
    every = [own_events(data, user) for user in range(data.num_users)]
    assert trained(data, splits) == [[e for e in own if times[e] < cuts[0]] for own in every]
    for rows, begin, end in ((splits.validation, *cuts), (splits.test, cuts[1], 2**62)):
        candidates = [[e for e in own[1:] if begin <= times[e] < end] for own in every]
        chosen = {
            TemporalTarget.last: [own[-1:] for own in candidates],
            TemporalTarget.first: [own[:1] for own in candidates],
            TemporalTarget.successive: candidates,
        }[target]
        assert [(u, e) for u, _, e in pairs(rows)] == [(u, e) for u, own in enumerate(chosen) for e in own]


def test_events_at_the_moment_of_a_cut_come_after_it_all_of_them() -> None:
    data = histories([0, 1, 5, 5, 9], [2, 5, 5, 8], [3, 5])  # eleven events; five of them, also the sixth, fall on 5
    splits = split(data, dataset(Protocol.temporal, fractions=[0.5, 0.32, 0.18], target=TemporalTarget.successive))
    assert temporal_cuts(data, SplitConfig(fractions=[0.5, 0.32, 0.18])) == (5, 8)
    assert trained(data, splits) == [[0, 1], [5], [9]]
    assert sorted(targets(splits.validation)) == [2, 3, 6, 7, 10]
    assert sorted(targets(splits.test)) == [4, 8]


@pytest.mark.parametrize(
    ("target", "validation", "test"),
    [(TemporalTarget.last, [3, 7], [5, 9]), (TemporalTarget.first, [2, 7], [4, 8])],
)
def test_last_and_first_predict_one_event_of_each_part(
    target: TemporalTarget, validation: list[int], test: list[int]
) -> None:
    # parts: before 10, before 20, after; the second user's first event, 6, has no history to be predicted from
    data = histories([0, 9, 10, 11, 20, 21], [12, 13, 22, 23], [1], [24])
    splits = split(data, dataset(Protocol.temporal, fractions=[0.25, 0.34, 0.41], target=target))
    assert temporal_cuts(data, SplitConfig(fractions=[0.25, 0.34, 0.41])) == (10, 20)
    assert sorted(targets(splits.validation)) == validation
    assert sorted(targets(splits.test)) == test


def test_a_last_share_of_nearly_nothing_still_has_a_cut() -> None:
    assert temporal_cuts(of_lengths(10), SplitConfig(fractions=[0.5, 0.5, 1e-7])) == (5, 9)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), MAX_HISTORIES, st.sampled_from(list(TrainRows)[:2]))
@quickly
def test_windows_and_prefixes_predict_every_training_transition_once(
    lengths: list[int], max_history: int, kind: TrainRows
) -> None:
    data = of_lengths(*lengths)
    splits = split(data, dataset(Protocol.leave_one_out))
    rows = train_rows(data, splits.train_ends, max_history, kind)
    assert targets(rows) == Counter(e for own in trained(data, splits) for e in own[1:])
    for user, start, end in pairs(rows):
        own = own_events(data, user)
        assert own[0] <= start < end <= start + max_history
        if kind is TrainRows.prefixes:
            assert list(range(start, end)) == own[: own.index(end)][-max_history:]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), MAX_HISTORIES)
@quickly
def test_official_rows_are_those_of_bytedances_loop(lengths: list[int], max_history: int) -> None:
    data, size = of_lengths(*lengths), max_history + 1
    splits = split(data, dataset(Protocol.leave_one_out_official, max_history))
    chunks, latest = [], []
    for user, own in enumerate(trained(data, splits)):
        # dataload.py: seq = seq[len(seq) % (S + 1):], then pieces of S + 1; a single event predicts nothing
        whole = own[len(own) % size :] if len(own) > size else own
        pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
        chunks += [(user, piece[0], piece[-1]) for piece in pieces if len(piece) > 1]
        latest += [(user, own[-size:][0], own[-1])] if len(own) > 1 else []
    found = {
        kind: train_rows(data, splits.train_ends, max_history, kind)
        for kind in kinds(Protocol("leave_one_out_official"))
    }
    assert sorted(pairs(found[TrainRows.chunks])) == chunks
    assert pairs(found[TrainRows.latest]) == latest


@given(HISTORIES, PROTOCOLS)
@quickly
def test_latest_is_one_row_of_each_users_newest_training_events(data: Interactions, config: DatasetConfig) -> None:
    splits, size = split(data, config), config.max_history + 1
    rows = train_rows(data, splits.train_ends, config.max_history, TrainRows.latest)
    newest = [(user, own[-size:]) for user, own in enumerate(trained(data, splits)) if len(own) > 1]
    assert pairs(rows) == [(user, own[0], own[-1]) for user, own in newest]
    assert not rows.last_only  # each but the first is a target


@pytest.mark.parametrize("protocol", Protocol)
def test_the_protocols_name_says_that_only_the_newest_events_are_trained(protocol: Protocol) -> None:
    config = dataset(protocol)
    name = replace(config, train_rows=TrainRows.latest).protocol_name
    assert name == config.protocol_name.replace(protocol.name, f"{protocol.name} latest")


@pytest.mark.parametrize("protocol", Protocol)
def test_rows_that_a_protocol_has_not_are_refused(protocol: Protocol) -> None:
    for kind in set(TrainRows) - set(kinds(protocol)):
        with pytest.raises(ConfigError, match=rf"dataset\.train_rows={kind.name}: .*choose of .*latest"):
            replace(dataset(protocol), train_rows=kind)


def test_25_events_and_windows_of_10_lose_their_oldest_3_and_make_two_chunks_of_11() -> None:
    data = of_lengths(27)  # 25 to train on
    ends = split(data, dataset(Protocol.leave_one_out_official)).train_ends
    assert sorted(pairs(train_rows(data, ends, 10, TrainRows.chunks))) == [(0, 3, 13), (0, 14, 24)]
    assert pairs(train_rows(data, ends, 10, TrainRows.latest)) == [(0, 14, 24)]
    assert sorted(targets(train_rows(data, ends, 10, TrainRows.chunks))) == [*range(4, 14), *range(15, 25)]


def test_three_users_by_hand() -> None:
    data = of_lengths(5, 2, 3)  # events 0-4, 5-6, 7-9
    splits = split(data, dataset(Protocol.leave_one_out_official, max_history=3))
    assert splits.train_ends.tolist() == [3, 7, 8]
    assert pairs(splits.validation) == [(0, 0, 3), (2, 7, 8)]
    assert pairs(splits.test) == [(0, 1, 4), (2, 7, 9)]
    assert pairs(train_rows(data, splits.train_ends, 3, TrainRows.chunks)) == [(0, 0, 2), (1, 5, 6)]
    assert pairs(train_rows(data, splits.train_ends, 1, TrainRows.windows)) == [(0, 1, 2), (0, 0, 1), (1, 5, 6)]


def test_windows_are_cut_from_the_newest_end() -> None:
    rows = train_rows(of_lengths(8), np.array([8]), 3, TrainRows.windows)
    assert pairs(rows) == [(0, 4, 7), (0, 1, 4), (0, 0, 1)]


def test_a_prefix_row_reads_the_newest_history_before_its_target() -> None:
    rows = train_rows(of_lengths(5), np.array([5]), 2, TrainRows.prefixes)
    assert pairs(rows) == [(0, 2, 4), (0, 1, 3), (0, 0, 2), (0, 0, 1)]


def test_users_with_fewer_than_three_events_are_not_evaluated() -> None:
    assert evaluated_users(of_lengths(1, 2, 3, 4)).tolist() == [2, 3]


@given(HISTORIES, PROTOCOLS, st.integers(0, 9))
@quickly
def test_train_counts_equal_a_loop(data: Interactions, config: DatasetConfig, seed: int) -> None:
    items = np.random.default_rng(seed).integers(1, 5, len(data)).astype(np.int32)
    data = Interactions(items, data.timestamps, data.offsets, data.users)
    splits = split(data, config)
    counts = Counter(int(items[e]) for own in trained(data, splits) for e in own)
    assert train_counts(data, splits.train_ends, num_items=6).tolist() == [counts[item] for item in range(7)]


@pytest.mark.parametrize(("share", "kept"), [(0.3, 2), (0.5, 4), (1.0, 7)])
def test_a_share_of_the_trained_users_is_trained_on(share: float, kept: int) -> None:
    data = of_lengths(5, 1, 5, 4, 9, 2, 6, 5)
    first, ends = data.offsets[:-1], data.offsets[1:].copy()
    ends[1] = first[1]  # one that is not trained anyway
    found = keep_users(ends, first, share, seed=0)
    trained = found > first
    assert trained.sum() == kept
    assert (found[trained] == ends[trained]).all()
    assert (found[~trained] == first[~trained]).all()
    rows = train_rows(data, found, 10, TrainRows.windows)
    counts = train_counts(data, found, len(data))
    assert set(rows.users) == set(np.flatnonzero(trained & (ends - first > 1)))
    assert counts.sum() == (found - first).sum()


def test_more_users_hold_those_of_a_smaller_share() -> None:
    data = of_lengths(*[3] * 20)
    small, large = (keep_users(data.offsets[1:], data.offsets[:-1], share, seed=3) for share in (0.2, 0.6))
    assert (large[small > data.offsets[:-1]] > data.offsets[:-1][small > data.offsets[:-1]]).all()
    assert (keep_users(data.offsets[1:], data.offsets[:-1], 0.2, seed=4) != small).any()
