"""Raw rows -> Interactions, and the arithmetic of splits: pure functions, no files.

Everything is vectorised: 100 thousand rows take milliseconds and the cost grows as sorting does.
"""

import logging
from dataclasses import dataclass

import numpy as np
import polars as pl

from hllm.config import TrainRows
from hllm.data.schema import Array64, Interactions
from hllm.errors import DataError

log = logging.getLogger(__name__)

COLUMNS = ("user", "item", "timestamp")


def drop_duplicates(events: pl.DataFrame, source: str) -> pl.DataFrame:
    """Drop rows that repeat an earlier row's user, item and timestamp; how many is logged.

    Args:
        events: columns user, item, timestamp in file order.
        source: the file, for the message.
    """
    kept = events.unique(subset=COLUMNS, keep="first", maintain_order=True)
    if skipped := len(events) - len(kept):
        log.warning("%s: skipped %d rows that repeat an earlier user, item and timestamp", source, skipped)
    return kept


def build_interactions(events: pl.DataFrame, item_ids: pl.Series, source: str) -> Interactions:
    """Encode ids, drop repeated rows, and sort by (user, time), keeping the file order of equal timestamps.

    Args:
        events: columns user (integer or string), item (string) and timestamp (int64 seconds), in file order.
        item_ids: the catalogue's original ids as strings; position r becomes item id r + 1.
        source: the file, for messages.

    Raises:
        DataError: no rows at all, or a row whose item is not in the catalogue.
    """
    if events.is_empty():
        raise DataError(f"{source}: holds no interactions; download the file again")
    index = pl.DataFrame({"item": item_ids, "item_id": np.arange(1, len(item_ids) + 1, dtype=np.int32)})
    encoded = events.with_row_index("row", offset=1).join(index, on="item", how="left", maintain_order="left")
    unknown = encoded.filter(pl.col("item_id").is_null())
    if len(unknown):
        row, item = unknown["row"][0], unknown["item"][0]
        raise DataError(
            f"{source}: row {row} names item {item!r}, which is not in the catalogue ({len(unknown)} such rows); "
            "take both files from the same release"
        )
    ordered = drop_duplicates(encoded, source).sort("user", "timestamp", maintain_order=True)
    counts = ordered.group_by("user", maintain_order=True).len()
    return Interactions(
        items=ordered["item_id"].to_numpy(),
        timestamps=ordered["timestamp"].cast(pl.Int64).to_numpy(),
        offsets=np.concatenate([[0], np.cumsum(counts["len"].to_numpy(), dtype=np.int64)]),
        users=counts["user"].cast(pl.String).to_numpy().astype(np.str_),
    )


@dataclass(frozen=True)
class Rows:
    """Training or evaluation rows as ranges into the CSR arrays; nothing is copied.

    N rows. Row n reads events ``starts[n]:ends[n]`` and predicts, at each of them or only at the last, the event
    that follows it.

    Args:
        users: (N,) int64 user numbers.
        starts: (N,) int64 first event of the row.
        ends: (N,) int64 one past the last event that the row may read; the event ``ends[n]`` is a target.
        last_only: true where only event ``ends[n]`` is a target.
    """

    users: Array64
    starts: Array64
    ends: Array64
    last_only: bool

    def __len__(self) -> int:
        return len(self.users)


def leave_one_out_rows(interactions: Interactions, held_out: int, max_history: int) -> Rows:
    """One evaluation row a user: the ``held_out``-th event from the end is the target, all before it the history.

    Args:
        held_out: 1 for test (the last event), 2 for validation (the last but one).
        max_history: newest events of the history that the row reads.

    Users with too few events for a history, a validation and a test item are left out.
    """
    users = evaluated_users(interactions)
    ends = interactions.offsets[users + 1] - held_out
    starts = np.maximum(interactions.offsets[users], ends - max_history)
    return Rows(users, starts, ends, last_only=True)


def evaluated_users(interactions: Interactions) -> Array64:
    """(V,) users with at least 3 events: one each for history, validation and test."""
    return np.flatnonzero(np.diff(interactions.offsets) >= 3).astype(np.int64)


def train_ends(interactions: Interactions) -> Array64:
    """(U,) one past each user's last training event; users too short to evaluate train on everything."""
    ends = interactions.offsets[1:].copy()
    ends[evaluated_users(interactions)] -= 2
    return ends


def train_rows(interactions: Interactions, max_history: int, kind: TrainRows) -> Rows:
    """Cut the training events into rows such that every transition is a target exactly once.

    windows: a user with n training events has n - 1 transitions; they are cut from the newest end into windows of
    ``max_history``. This is one pass over the data an epoch, where a row for every prefix with the loss on all
    positions, the light form's original, repeats a transition up to n times (88 times on average on MovieLens-100k).
    prefixes: a row for each transition with the history before it; only the last position is a target.
    """
    first = interactions.offsets[:-1]
    transitions = np.maximum(train_ends(interactions) - first - 1, 0)
    per_user = transitions if kind is TrainRows.prefixes else -(-transitions // max_history)
    users = np.repeat(np.arange(interactions.num_users, dtype=np.int64), per_user)
    # 0, 1, 2, ... within each user, counted from the newest row back
    back = np.arange(len(users), dtype=np.int64) - np.repeat(np.cumsum(per_user) - per_user, per_user)
    step = 1 if kind is TrainRows.prefixes else max_history
    ends = train_ends(interactions)[users] - 1 - back * step
    starts = np.maximum(first[users], ends - max_history)
    return Rows(users, starts, ends, last_only=kind is TrainRows.prefixes)


def train_counts(interactions: Interactions, num_items: int) -> Array64:
    """(I + 1,) how often each item occurs in the training events; entry 0, padding, is 0."""
    first, ends = interactions.offsets[:-1], train_ends(interactions)
    is_train = np.zeros(len(interactions) + 1, dtype=np.int64)
    np.add.at(is_train, first, 1)
    np.add.at(is_train, ends, -1)
    return np.bincount(interactions.items[np.cumsum(is_train[:-1]) > 0], minlength=num_items + 1)
