"""What is trained, validated and tested: each protocol as ranges into the CSR arrays; nothing is copied.

U users, E events. A protocol says up to which event each user is trained on, and which events are predicted from which
histories. The history of a prediction is always everything the user did before it.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hllm.config import DatasetConfig, Protocol, SplitConfig, TemporalTarget, TrainRows
from hllm.data.schema import Array64, Interactions


@dataclass(frozen=True)
class Rows:
    """Training or evaluation rows as ranges into the CSR arrays.

    N rows. Row n reads events ``starts[n]:ends[n]`` and predicts, at each of them or only at the last, the event
    that follows it.

    Args:
        users: (N,) int64 user numbers.
        starts: (N,) int64 first event of the row.
        ends: (N,) int64 one past the last event that the row may read; the event ``ends[n]`` is a target.
        last_only: true where only event ``ends[n]`` is a target.
        targets: (N,) int64 the targets in place of ``ends``, of rows with ``last_only`` that leave events out of what
            they read: by number in the data with all events.
    """

    users: Array64
    starts: Array64
    ends: Array64
    last_only: bool
    targets: Array64 | None = None

    def __len__(self) -> int:
        return len(self.users)


@dataclass(frozen=True)
class Splits:
    """What a protocol makes of a data set.

    Args:
        train_ends: (U,) one past each user's last training event; a user whose end is its first event is not trained.
        validation: rows with one target each.
        test: likewise.
        needs: what a user must have to be evaluated, for messages.
    """

    train_ends: Array64
    validation: Rows
    test: Rows
    needs: str


def split(interactions: Interactions, dataset: DatasetConfig) -> Splits:
    """Cut histories as ``dataset.protocol`` says.

    leave_one_out, leave_one_out_official: the last event of each user is tested, the last but one validated, all
        before are trained. Users with fewer than 3 events train on everything and are not evaluated. The official
        form differs in how training rows are cut (``train_rows``) and how ids are numbered.
    user_split: users are shuffled by ``split.seed`` and cut by ``split.fractions``; training users are trained on
        everything, of the others the last event is predicted from all before it.
    temporal: two moments cut all events, in order of time, by ``split.fractions``. Events at the very moment of a cut
        come after it. Training ends at the first; in each later part ``split.target`` says which of a user's events
        are predicted: the last, the first, or each.
    """
    if dataset.protocol is Protocol.user_split:
        return _user_split(interactions, dataset.split, dataset.window)
    if dataset.protocol is Protocol.temporal:
        return _temporal(interactions, dataset.split, dataset.window)
    return Splits(
        train_ends=leave_one_out_ends(interactions),
        validation=leave_one_out_rows(interactions, 2, dataset.window),
        test=leave_one_out_rows(interactions, 1, dataset.window),
        needs="3 events",
    )


def evaluated_users(interactions: Interactions) -> Array64:
    """(V,) users with at least 3 events: one each for history, validation and test."""
    return np.flatnonzero(np.diff(interactions.offsets) >= 3).astype(np.int64)


def leave_one_out_rows(interactions: Interactions, held_out: int, max_history: int) -> Rows:
    """One evaluation row a user: the ``held_out``-th event from the end is the target, all before it the history."""
    users = evaluated_users(interactions)
    return _rows(interactions, users, interactions.offsets[users + 1] - held_out, max_history)


def leave_one_out_ends(interactions: Interactions) -> Array64:
    """(U,) one past each user's last training event under leave-one-out."""
    ends = interactions.offsets[1:].copy()
    ends[evaluated_users(interactions)] -= 2
    return ends


def _rows(interactions: Interactions, users: Array64, targets: Array64, max_history: int) -> Rows:
    """A row for each target event: the newest ``max_history`` events before it."""
    starts = np.maximum(interactions.offsets[users], targets - max_history)
    return Rows(users, starts, targets, last_only=True)


def _user_split(interactions: Interactions, config: SplitConfig, max_history: int) -> Splits:
    num_users = interactions.num_users
    order = np.random.default_rng(config.seed).permutation(num_users)
    cuts = np.round(np.cumsum(config.fractions[:2]) * num_users).astype(np.int64)
    _, *held_out = np.split(order, cuts)
    train_ends = interactions.offsets[1:].copy()
    train_ends[order[cuts[0] :]] = interactions.offsets[order[cuts[0] :]]
    lengths = np.diff(interactions.offsets)
    rows = []
    for users in held_out:
        users = np.sort(users[lengths[users] >= 2])
        rows.append(_rows(interactions, users, interactions.offsets[users + 1] - 1, max_history))
    return Splits(train_ends, rows[0], rows[1], needs="2 events")


def temporal_cuts(interactions: Interactions, config: SplitConfig) -> tuple[int, int]:
    """The moments, in seconds, at which validation and test begin."""
    # rounded down, and 0.6 + 0.3 is a little less than 0.9
    places = (np.cumsum(config.fractions[:2]) * len(interactions) + 1e-6).astype(np.int64)
    places = places.clip(max=len(interactions) - 1)
    ordered = np.partition(interactions.timestamps, places)
    return int(ordered[places[0]]), int(ordered[places[1]])


def _temporal(interactions: Interactions, config: SplitConfig, max_history: int) -> Splits:
    first = interactions.offsets[:-1]
    bounds = [
        first + np.add.reduceat(interactions.timestamps < cut, first, dtype=np.int64)
        for cut in temporal_cuts(interactions, config)
    ]
    bounds.append(interactions.offsets[1:])
    rows = []
    for begins, ends in pairwise(bounds):
        # a user's very first event has no history to be predicted from
        begins = np.maximum(begins, first + 1)
        users = np.flatnonzero(ends > begins).astype(np.int64)
        if config.target is TemporalTarget.last:
            targets = ends[users] - 1
        elif config.target is TemporalTarget.first:
            targets = begins[users]
        else:
            users, targets = ranges(users, begins[users], ends[users])
        rows.append(_rows(interactions, users, targets, max_history))
    return Splits(bounds[0], rows[0], rows[1], needs="an event after the cut and one before it")


def keep_users(train_ends: Array64, first: Array64, share: float, seed: int) -> Array64:
    """(U,) ends of training with a share of the trained users left; a larger share of one seed holds a smaller one.

    Args:
        train_ends: (U,) one past each user's last training event.
        first: (U,) each user's first event: where training ends that has none.
        share: above 0 and at most 1, rounded to a user.
    """
    order = np.random.default_rng(seed).permutation(np.flatnonzero(train_ends > first))
    left_out = order[round(share * len(order)) :]
    ends = train_ends.copy()
    ends[left_out] = first[left_out]
    return ends


def ranges(values: Array64, begins: Array64, ends: Array64) -> tuple[Array64, Array64]:
    """Every whole number of ``begins[n]:ends[n]``, and ``values[n]`` beside it."""
    lengths = ends - begins
    repeated = np.repeat(begins - (np.cumsum(lengths) - lengths), lengths)
    return np.repeat(values, lengths), repeated + np.arange(len(repeated), dtype=np.int64)


def train_rows(interactions: Interactions, train_ends: Array64, max_history: int, kind: TrainRows) -> Rows:
    """Cut each user's training events into rows.

    windows: n training events have n - 1 transitions; they are cut from the newest end into windows of
        ``max_history``. Every transition is a target exactly once an epoch, where a row for every prefix with the
        loss on all positions, the light form's original, repeats one up to n times (88 on average, MovieLens-100k).
    prefixes: a row for each transition with the history before it; only the last position is a target.
    chunks: ByteDance's ``data_split=True`` (trainset.py, dataload.py). With S = ``max_history``, histories longer
        than S + 1 lose their oldest n mod (S + 1) events, the rest is cut into chunks of S + 1 events: a chunk's
        first event is never a target.
    latest: its ``data_split=False``, and how SASRec is commonly trained: one row of the newest S + 1 events. Targets
        are S transitions a user at most; older events are not trained on at all.
    """
    first = interactions.offsets[:-1]
    lengths = train_ends - first
    transitions = np.maximum(lengths - 1, 0)
    if kind is TrainRows.prefixes:
        per_user, step = transitions, 1
    elif kind is TrainRows.windows:
        per_user, step = -(-transitions // max_history), max_history
    elif kind is TrainRows.latest:
        per_user, step = np.minimum(transitions, 1), max_history
    else:
        # a short history is one row as it stands
        per_user, step = np.maximum(lengths // (max_history + 1), np.minimum(transitions, 1)), max_history + 1
    users = np.repeat(np.arange(interactions.num_users, dtype=np.int64), per_user)
    # 0, 1, 2, ... within each user, counted from the newest row back
    back = np.arange(len(users), dtype=np.int64) - np.repeat(np.cumsum(per_user) - per_user, per_user)
    ends = train_ends[users] - 1 - back * step
    starts = np.maximum(first[users], ends - max_history)
    return Rows(users, starts, ends, last_only=kind is TrainRows.prefixes)


def train_counts(interactions: Interactions, train_ends: Array64, num_items: int) -> Array64:
    """(I + 1,) how often each item occurs in the training events; entry 0, padding, is 0."""
    counts = np.zeros(num_items + 1, dtype=np.int64)
    for begin in range(0, len(interactions), 1 << 24):  # bincount makes a wider copy of what it counts
        counts += np.bincount(interactions.items[begin : begin + (1 << 24)], minlength=num_items + 1)
    _, held_out = ranges(train_ends, train_ends, interactions.offsets[1:])
    return counts - np.bincount(interactions.items[held_out], minlength=num_items + 1)
