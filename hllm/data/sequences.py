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
        with_seen: add the pairs of row and item to leave out of the ranking, for evaluation.
    """

    def __init__(self, interactions: Interactions, rows: Rows, with_seen: bool = False) -> None:
        self.interactions = interactions
        self.rows = rows
        self.with_seen = with_seen

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Batch:
        return self.__getitems__([row])

    def __getitems__(self, indices: list[int]) -> Batch:
        """Gather rows into one Batch, padded on the right to the longest of them."""
        data, rows = self.interactions, self.rows
        index = np.asarray(indices, dtype=np.int64)
        users, starts, ends = rows.users[index], rows.starts[index], rows.ends[index]
        position = starts[:, None] + np.arange((ends - starts).max())  # (B, L)
        mask = position < ends[:, None]
        position = np.where(mask, position, starts[:, None])
        is_target = position == ends[:, None] - 1 if rows.last_only else mask
        return Batch(
            users=torch.from_numpy(users),
            items=torch.from_numpy(np.where(mask, data.items[position], 0).astype(np.int64)),
            timestamps=torch.from_numpy(np.where(mask, data.timestamps[position], 0)),
            targets=torch.from_numpy(np.where(is_target & mask, data.items[position + 1], 0).astype(np.int64)),
            mask=torch.from_numpy(mask),
            seen=torch.from_numpy(self._seen(users, ends) if self.with_seen else np.empty((2, 0), np.int64)),
        )

    def _seen(self, users: Array64, ends: Array64) -> Array64:
        """(2, S) pairs of batch row and item of all events before the target, also those older than the window."""
        first = self.interactions.offsets[users]
        lengths = ends - first
        row = np.repeat(np.arange(len(users)), lengths)
        event = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths) + first[row]
        return np.stack([row, self.interactions.items[event].astype(np.int64)])
