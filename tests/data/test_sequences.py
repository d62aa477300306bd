"""The vectorised gather equals a loop over samples."""

import numpy as np
import polars as pl
import pytest
import torch

from hllm.config import TrainRows
from hllm.data.schema import Batch, Interactions
from hllm.data.sequences import SequenceDataset
from hllm.data.splits import Rows, leave_one_out_ends, leave_one_out_rows, train_rows


@pytest.fixture
def data() -> Interactions:
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 25, size=30)
    total = int(lengths.sum())
    return Interactions(
        items=rng.integers(1, 50, total).astype(np.int32),
        timestamps=rng.integers(1, 10**9, total),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        users=pl.Series(np.arange(30).astype(str)),
    )


def naive(data: Interactions, rows: Rows, indices: list[int], with_seen: bool) -> Batch:
    """The same batch by plain loops."""
    samples, seen = [], []
    for number, row in enumerate(indices):
        user, start, end = int(rows.users[row]), int(rows.starts[row]), int(rows.ends[row])
        items, times = data.items[start:end].tolist(), data.timestamps[start:end].tolist()
        targets = data.items[start + 1 : end + 1].tolist()
        target_times = data.timestamps[start + 1 : end + 1].tolist()
        if rows.last_only:
            targets = [0] * (len(targets) - 1) + targets[-1:]
        samples.append((user, items, times, targets, target_times))
        if with_seen:
            seen += [(number, int(item)) for item in data.items[data.offsets[user] : end]]
    length = max(len(items) for _, items, *_ in samples)

    def padded(column: int) -> torch.Tensor:
        return torch.tensor([sample[column] + [0] * (length - len(sample[column])) for sample in samples])

    return Batch(
        users=torch.tensor([sample[0] for sample in samples]),
        items=padded(1),
        timestamps=padded(2),
        targets=padded(3),
        target_times=padded(4),
        mask=padded(1) > 0,
        seen=torch.tensor(seen, dtype=torch.int64).reshape(-1, 2).T,
    )


def assert_same(found: Batch, expected: Batch) -> None:
    for name in ("users", "items", "timestamps", "targets", "target_times", "mask", "seen"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("kind", TrainRows)
@pytest.mark.parametrize("max_history", [1, 4, 100])
def test_training_batches_equal_a_loop_over_samples(data: Interactions, kind: TrainRows, max_history: int) -> None:
    rows = train_rows(data, leave_one_out_ends(data), max_history, kind)
    dataset = SequenceDataset(data, rows)
    for indices in torch.randperm(len(rows)).split(13):
        assert_same(dataset.__getitems__(indices.tolist()), naive(data, rows, indices.tolist(), with_seen=False))


@pytest.mark.parametrize("held_out", [1, 2])
@pytest.mark.parametrize("max_history", [1, 5, 100])
def test_evaluation_batches_equal_a_loop_over_samples(data: Interactions, held_out: int, max_history: int) -> None:
    rows = leave_one_out_rows(data, held_out, max_history)
    dataset = SequenceDataset(data, rows, with_seen=True)
    for indices in torch.arange(len(rows)).split(7):
        assert_same(dataset.__getitems__(indices.tolist()), naive(data, rows, indices.tolist(), with_seen=True))


def test_seen_holds_the_whole_history_also_what_the_window_cuts_off(data: Interactions) -> None:
    rows = leave_one_out_rows(data, 1, max_history=2)
    user = int(np.diff(data.offsets).argmax())
    batch = SequenceDataset(data, rows, with_seen=True)[rows.users.tolist().index(user)]
    history = data.items[data.offsets[user] : data.offsets[user + 1] - 1].tolist()
    assert batch.items[0].tolist() == history[-2:]
    assert batch.seen.tolist() == [[0] * len(history), history]


def test_batches_are_padded_to_their_own_longest_row(data: Interactions) -> None:
    rows = leave_one_out_rows(data, 1, max_history=100)
    lengths = rows.ends - rows.starts
    short = np.flatnonzero(lengths <= 5).tolist()
    batch = SequenceDataset(data, rows).__getitems__(short)
    assert batch.items.shape == (len(short), lengths[short].max())
    assert batch.mask.sum(1).tolist() == lengths[short].tolist()


def test_a_target_that_ends_the_file_is_read(data: Interactions) -> None:
    lengths = np.diff(data.offsets)
    user = int(np.flatnonzero(lengths >= 3)[-1])
    cut = Interactions(
        *(a[: data.offsets[user + 1]] for a in (data.items, data.timestamps)), data.offsets[: user + 2], data.users
    )
    rows = leave_one_out_rows(cut, 1, max_history=100)
    batch = SequenceDataset(cut, rows).__getitems__([len(rows) - 1, int((rows.ends - rows.starts).argmax())])
    assert batch.targets[0, lengths[user] - 2] == data.items[data.offsets[user + 1] - 1]
