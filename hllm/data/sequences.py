"""Rows of CSR histories -> Batch, by one vectorised gather a batch: no Python loop over samples.

B rows, L longest history of the batch.
"""

import numpy as np
import torch
from torch.utils.data import Dataset

from hllm.data.schema import Array64, Batch, Interactions
from hllm.data.splits import Rows


class SequenceDataset(Dataset[Batch]):
    """Batches of rows; meant for a DataLoader whose sampler yields whole batches of row numbers.

    Args:
        interactions: what the rows read.
        with_seen: add the pairs of row and item to leave out of the ranking, for evaluation.
        whole: all events, where the rows read some of them: ``rows.targets`` and what is left out of the ranking are
            of these. Unset: what the rows read.
    """

    def __init__(
        self, interactions: Interactions, rows: Rows, with_seen: bool = False, whole: Interactions | None = None
    ) -> None:
        self.interactions = interactions
        self.rows = rows
        self.with_seen = with_seen
        self.whole = interactions if whole is None else whole
        self.targets = rows.ends if rows.targets is None else rows.targets

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Batch:
        return self.__getitems__([row])

    def __getitems__(self, indices: list[int]) -> Batch:
        """Gather rows into one Batch, padded on the right to the longest of them."""
        data, rows = self.interactions, self.rows
        index = np.asarray(indices, dtype=np.int64)
        users, starts, ends = rows.users[index], rows.starts[index], rows.ends[index]
        lengths = ends - starts
        longest = int(lengths.max())
        steps = np.arange(longest + 1)
        padding = steps[:-1] >= lengths[:, None]  # (B, L)
        # one window holds histories and targets; what it reads behind a row is zeroed
        window = starts[:, None] + steps  # (B, L + 1)
        events = data.items.take(window, mode="clip").astype(np.int64)
        times = data.timestamps.take(window, mode="clip")
        if rows.last_only:
            targets = np.zeros(padding.shape, np.int64)
            last = np.arange(len(index)), lengths - 1
            targets[last] = self.whole.items[self.targets[index]]
            times[:, 1:][last] = self.whole.timestamps[self.targets[index]]
        else:
            targets = events[:, 1:].copy()
            np.copyto(targets, 0, where=padding)
        items = np.ascontiguousarray(events[:, :-1])
        timestamps, target_times = np.ascontiguousarray(times[:, :-1]), times[:, 1:].copy()
        for values in (items, timestamps, target_times):
            np.copyto(values, 0, where=padding)
        return Batch(
            users=torch.from_numpy(users),
            items=torch.from_numpy(items),
            timestamps=torch.from_numpy(timestamps),
            targets=torch.from_numpy(targets),
            target_times=torch.from_numpy(target_times),
            mask=torch.from_numpy(~padding),
            seen=torch.from_numpy(
                self._seen(users, self.targets[index]) if self.with_seen else np.empty((2, 0), np.int64)
            ),
        )

    def _seen(self, users: Array64, ends: Array64) -> Array64:
        """(2, S) pairs of batch row and item of all events before the target, also those older than the window."""
        first = self.whole.offsets[users]
        lengths = ends - first
        row = np.repeat(np.arange(len(users)), lengths)
        event = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths) + first[row]
        return np.stack([row, self.whole.items[event].astype(np.int64)])
